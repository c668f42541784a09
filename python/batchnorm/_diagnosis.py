"""Why a layer that trains well tests badly: its statistics looked at, in words and numbers.

`report` looks at the layer alone, `diagnose` at a batch beside it. Neither changes anything. Each finding
says what is so, how much, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _args, _forward, _positions
from ._functional import MeanVar, moments
from ._layer_base import COLD, INITIAL, STATISTICS, LayerBase

__all__ = ["Diagnosis", "Finding"]

Array = NDArray[Any]

# A batch and the running statistics disagree if they differ by more than this ...
_MEAN_DISTANCE = 0.5  # standard deviations
_VAR_RATIO = 2.0
# ... and by more than so many standard errors of the batch's own statistics.
_ERRORS = 5.0
# Batch statistics of fewer values than this are uncertain by 18 % of a standard deviation, 25 % of var.
_FEW = 32
_SHOWN = 5  # channels that a text lists


@dataclass(frozen=True)
class Finding:
    """One thing that is so with a layer.

    Attributes
    ----------
    code : str
        "never_updated", "cold", "mismatched", "invalid_statistics", "skipped_batches", "invalid_batch",
        "small_batch", "constant_channels", "eps_dominates" or "fine".
    text : str
        What is so, in words and numbers.
    remedy : str
        What to do about it; empty where nothing needs to be done.
    channels : tuple of int
        The channels concerned, worst first; empty if it concerns all.
    numbers : dict of str to float
        The numbers of the text, by name.
    """

    code: str
    text: str
    remedy: str = ""
    channels: tuple[int, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.text}. {self.remedy}." if self.remedy else f"{self.text}."


class Diagnosis:
    """Findings about a layer, the most serious ones first; ``print`` it, iterate over it, or ask ``codes``.

    Attributes
    ----------
    findings : tuple of Finding
        Never empty: a layer without faults has the finding "fine".
    """

    __slots__ = ("findings",)

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = tuple(findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings."""
        return tuple(finding.code for finding in self.findings)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.codes == ("fine",)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        return "\n".join(f"{finding.code}: {finding}" for finding in self.findings)

    def __repr__(self) -> str:
        return f"Diagnosis({', '.join(self.codes)})"


# ---- the layer alone ---------------------------------------------------------------------------------------


def report(layer: LayerBase) -> Diagnosis:
    """What the running statistics tell of themselves."""
    found = _of_state(layer)
    counters = layer._counters
    if not found:
        how = "assigned or loaded" if not counters.num_updates else _times(counters.num_updates, "update")
        if layer._allow_initial_statistics and layer._untouched_statistics():
            how = "the initial ones, which are allowed"
        found = [
            Finding("fine", f"the running statistics are in order ({how})", numbers=_counts(layer)),
        ]
    return Diagnosis(found)


def _of_state(layer: LayerBase) -> list[Finding]:
    found = [*_never_updated(layer), *_invalid(layer), *_cold(layer), *_skipped(layer)]
    if layer._num_features is not None and found[:1] == []:
        found += _eps_dominates(layer, layer._running_var, "running variance")
    return found


def _counts(layer: LayerBase) -> dict[str, float]:
    counters = layer._counters
    return {"num_updates": counters.num_updates, "initial_weight": counters.initial_weight}


def _never_updated(layer: LayerBase) -> list[Finding]:
    untouched = layer._untouched_statistics()
    if not untouched or layer._allow_initial_statistics:
        return []
    names = " and ".join(untouched)
    skipped = layer._counters.num_skipped
    why = f"; {_times(skipped, 'batch', 'es')} with NaN or Inf were left out" if skipped else ""
    return [
        Finding(
            "never_updated",
            f"{names} never updated: eval calls would use mean 0 and variance 1, whatever the data are{why}",
            "Train in training mode, call recalibrate(batches), load a state, or assign both statistics",
            numbers=_counts(layer),
        )
    ]


def _invalid(layer: LayerBase) -> list[Finding]:
    if layer._num_features is None:
        return []
    found = []
    for name in STATISTICS:
        values = getattr(layer, "_" + name)
        bad = ~np.isfinite(values) | (values < 0 if name == "running_var" else False)
        if bad.any():
            where = np.flatnonzero(bad)
            found.append(
                Finding(
                    "invalid_statistics",
                    f"{name} is NaN, Inf{' or negative' * (name == 'running_var')} in {_channels(where)}, "
                    f"such as {values[where[0]]:g}: eval calls are an error",
                    "Call recalibrate(batches) or load a good state; on_nonfinite='raise' or 'skip' keeps "
                    "bad batches out",
                    tuple(map(int, where)),
                    {"channels": len(where)},
                )
            )
    return found


def _cold(layer: LayerBase, bound: float = COLD) -> list[Finding]:
    counters = layer._counters
    weight, updates, decay = counters.initial_weight, counters.num_updates, layer._decay
    if weight <= bound or not updates or layer._allow_initial_statistics:
        return []
    aim = COLD if weight > COLD else weight / 100  # means far from 0 show less than 1 % of it
    more, wait = _forward.missing(layer, aim)
    numbers = {**_counts(layer), "recommended_decay": aim ** (1 / updates)}
    numbers["values_missing" if decay is None else "updates_missing"] = more
    return [
        Finding(
            "cold",
            f"the running statistics are cold: after {_times(updates, 'update')} the initial values still "
            f"weigh {_forward.percent(weight)} %, {wait}",
            f"{_forward.remedy(layer, aim)}; recalibrate(batches) mends the statistics now",
            numbers=numbers,
        )
    ]


def _skipped(layer: LayerBase) -> list[Finding]:
    skipped = layer._counters.num_skipped
    if not skipped or not layer._counters.num_updates:
        return []
    return [
        Finding(
            "skipped_batches",
            f"{_times(skipped, 'batch', 'es')} with NaN or Inf were left out of the running statistics, "
            f"{layer._counters.num_updates} are in",
            "Look for NaN and Inf in the data or in the layers before this one",
            numbers={"num_skipped": skipped, "num_updates": layer._counters.num_updates},
        )
    ]


def _eps_dominates(layer: LayerBase, var: Array, what: str) -> list[Finding]:
    with np.errstate(invalid="ignore"):
        where = np.flatnonzero((var < layer._eps) & (var > 0))
    if not len(where):
        return []
    where = where[np.argsort(var[where], kind="stable")]
    smallest = float(var[where[0]])
    return [
        Finding(
            "eps_dominates",
            f"the {what} is below eps = {layer._eps:g} in {_channels(where)}, {smallest:.3g} at the least: "
            f"their output has a standard deviation of {np.sqrt(smallest / (smallest + layer._eps)):.3g} "
            f"instead of 1",
            f"Scale the data up, or use an eps well below the variances, such as eps={smallest / 100:.1g}",
            tuple(map(int, where)),
            {"smallest_var": smallest, "eps": layer._eps},
        )
    ]


# ---- beside a batch ----------------------------------------------------------------------------------------


def diagnose(layer: LayerBase, x: Array, where: dict[str, Any], positions: dict[str, Any]) -> Diagnosis:
    """What the running statistics tell, and how they compare with those of a batch."""
    batch = moments(x, **where, **positions)
    count = x.size // len(batch.mean)
    if positions:
        count = _positions.checked(x, where, positions).counting
    if not count:
        raise ValueError(f"x has shape {x.shape}, which holds no values, expected a batch like those in use")
    found = _of_state(layer)
    known = layer._num_features is not None and "never_updated" not in [f.code for f in found]
    finite = np.isfinite(batch.mean) & np.isfinite(batch.var)
    found += _invalid_batch(finite)
    if known:
        found += _mismatched(layer, batch, _samples(x, where), finite, found)
    found += _constant(batch, count, finite)
    found += _small(count)
    if not found:
        text = "the running statistics fit this batch: no channel is further off than chance explains"
        found = [Finding("fine", text, numbers={**_counts(layer), "count": count})]
    return Diagnosis(found)


def _samples(x: Array, where: dict[str, Any]) -> int:
    """How many independent values a channel has at the least: one per sample, as neighbours are alike."""
    axis = _args._axis_of(x, where.get("axis", _args.DEFAULT_AXIS), where.get("data_format"))
    return int(x.shape[1 if axis % x.ndim == 0 else 0])


def _mismatched(
    layer: LayerBase, batch: MeanVar, samples: int, finite: Array, found: list[Finding]
) -> list[Finding]:
    mean, var = (v.astype(np.float64) for v in (layer._running_mean, layer._running_var))
    valid = finite & np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    far, badness, distance, ratio = _compared(layer, batch, samples, mean, var, valid)
    weight = layer._counters.initial_weight
    if not far.any() or weight >= 0.999:
        return []
    cold = weight > 0 and not layer._allow_initial_statistics
    if cold:  # do the batches seen, without the initial values, say the same?
        mean = (mean - weight * INITIAL["running_mean"]) / (1 - weight)
        var = np.maximum(var - weight * INITIAL["running_var"], 0) / (1 - weight)
        far, badness, distance, ratio = _compared(layer, batch, samples, mean, var, valid)
        if not far.any():
            return [] if "cold" in [f.code for f in found] else _cold(layer, 0)
    where = np.flatnonzero(far)
    where = where[np.argsort(-badness[where], kind="stable")]
    shown = ", ".join(
        f"channel {c}: mean off by {distance[c]:.2g} standard deviations, variance {_factor(ratio[c])}"
        for c in where[:_SHOWN]
    )
    more = ", ..." if len(where) > _SHOWN else ""
    worst = int(where[0])
    numbers = {
        "channels": len(where), "distance": float(distance[worst]), "ratio": float(ratio[worst]),
        "distance_max": float(distance[where].max()),
    }  # fmt: skip
    beyond = ", more than the initial values in them explain" if "cold" in [f.code for f in found] else ""
    return [
        Finding(
            "mismatched",
            f"the running statistics are not those of this batch in {len(where)} of {len(mean)} "
            f"channels{beyond} ({shown}{more})",
            "If this batch is prepared as in training, the statistics are out of date: recalibrate(batches), "
            f"or let newer batches weigh more (decay is {layer._decay}); if it is not, prepare it the same "
            "way (scaling, colour order, augmentation), or give this data statistics of its own, "
            "clone(share='params')",
            tuple(map(int, where)),
            numbers,
        )
    ]


def _compared(
    layer: LayerBase, batch: MeanVar, samples: int, mean: Array, var: Array, valid: Array
) -> tuple[Array, Array, Array, Array]:
    """Which channels differ, how badly, the distance of the means, the ratio of the variances."""
    with np.errstate(all="ignore"):
        distance = np.abs(batch.mean - mean) / np.sqrt(var + layer._eps)
        ratio = (batch.var + layer._eps) / (var + layer._eps)
        error = np.sqrt(np.maximum(ratio, 1) / samples)  # of the batch's mean, in running deviations
        far_mean = valid & (distance > np.maximum(_MEAN_DISTANCE, _ERRORS * error))
        spread = max(_VAR_RATIO, np.exp(_ERRORS * np.sqrt(2 / samples)))  # of the variance, as a factor
        # The variance of a handful of samples is often far too small.
        far_var = valid & ((ratio > spread) | ((ratio < 1 / spread) & (samples >= 16)))
        off = np.maximum(ratio, 1 / ratio)
    badness = np.maximum(np.where(far_mean, distance / _MEAN_DISTANCE, 0), np.where(far_var, off, 0))
    return far_mean | far_var, badness, distance, ratio


def _factor(ratio: float) -> str:
    return f"{ratio:.3g} times as large" if ratio >= 1 else f"{1 / ratio:.3g} times as small"


def _invalid_batch(finite: Array) -> list[Finding]:
    where = np.flatnonzero(~finite)
    if not len(where):
        return []
    return [
        Finding(
            "invalid_batch",
            f"the batch holds NaN or Inf in {_channels(where)}",
            "Look for them in the data or in the layers before this one; on_nonfinite='raise' or 'skip' "
            "keeps them out of the running statistics",
            tuple(map(int, where)),
            {"channels": len(where)},
        )
    ]


def _constant(batch: MeanVar, count: int, finite: Array) -> list[Finding]:
    if count < 2:
        return []
    where = np.flatnonzero(finite & (batch.var == 0))
    if not len(where):
        return []
    dead = where[batch.mean[where] == 0]
    zero = f", {len(dead)} of them 0 everywhere" if len(dead) else ""
    return [
        Finding(
            "constant_channels",
            f"the batch is constant in {_channels(where)}{zero}: their output is beta alone",
            "Look for units that died before this layer (a ReLU with too large a learning rate) or for "
            "constant inputs",
            tuple(map(int, where)),
            {"channels": len(where), "zero": len(dead)},
        )
    ]


def _small(count: int) -> list[Finding]:
    if count >= _FEW:
        return []
    mean_error, var_error = (1 / count) ** 0.5, (2 / max(count - 1, 1)) ** 0.5
    return [
        Finding(
            "small_batch",
            f"this batch has {_times(count, 'value')} per channel: its mean is uncertain by "
            f"{mean_error:.2g} standard deviations, its variance by {100 * var_error:.0f} %",
            "Use larger batches in training, or batch renormalisation; this batch proves little about the "
            "running statistics, diagnose a larger one",
            numbers={"count": count, "mean_error": mean_error, "var_error": var_error},
        )
    ]


def _channels(where: Array) -> str:
    listed = ", ".join(map(str, where[:_SHOWN])) + (", ..." if len(where) > _SHOWN else "")
    return f"channel {listed}" if len(where) == 1 else f"{len(where)} channels ({listed})"


def _times(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"
