"""Why a layer that trains well tests badly: its statistics looked at, in words and numbers.

`report` looks at a layer alone, `diagnose_layer` at an input beside it, `diagnose` at a network's layers.
None of them changes statistics. Each finding says what is so, how much, where, and what to do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..running import COLD, updates_until
from ..typing import Array, LayerLike, Mask, Vector
from .network import Collector, Layers, named, run, watching

__all__ = ["Diagnosis", "Finding", "diagnose"]

# A batch and the running statistics disagree if they differ by more than this ...
_MEAN_DISTANCE = 0.5  # standard deviations
_VAR_RATIO = 2.0
# ... and by more than so many standard errors of the batch's own statistics.
_ERRORS = 5.0
# Batch statistics of fewer values than this are uncertain by 18 % of a standard deviation, 25 % of var.
_FEW = 32
# A smaller decay than this averages fewer than 10 batches, so it is never advised.
_LEAST_DECAY = 0.9
# A gamma is the standard deviation of what a channel gives; it begins at 1, and trained ones rarely pass 10.
_HUGE_GAMMA = 100.0
_KEEP_OUT = "BatchNorm(on_nonfinite='raise') or 'skip' keeps them out of the running statistics"
_LOOK = "Look for NaN and Inf in the data or in the layers before this one"
_FITS = "no channel is further off than chance explains"
_SHOWN = 5  # channels that a text lists
_NETWORK = "batchnorm.recalibrate(layers, forward, batches) in a network"
_RECALIBRATE = f"{_NETWORK}, bn.recalibrate(inputs) of one layer"

_Where = NDArray[np.intp]


@dataclass(frozen=True)
class Finding:
    """One thing that is so with a layer.

    Attributes
    ----------
    code : str
        "never_updated", "cold", "mismatched", "invalid_statistics", "skipped_batches", "invalid_batch",
        "small_batch", "constant_channels", "eps_dominates", "not_reached" or "fine". Of files also
        "dead_channels", "huge_gamma", "shifted_var", "unsure" and "unreadable".
    text : str
        What is so, in words and numbers.
    remedy : str
        What to do about it; empty where nothing needs to be done.
    channels : tuple of int
        The channels concerned, worst first; empty if it concerns all. With several channel axes they are
        counted through, the last axis fastest.
    numbers : dict of str to float
        The numbers of the text, by name.
    layer : str
        The layer's name, empty if it has none.
    """

    code: str
    text: str
    remedy: str = ""
    channels: tuple[int, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    layer: str = ""

    def __str__(self) -> str:
        text = f"{self.layer}: {self.text}." if self.layer else f"{self.text}."
        return f"{text} {self.remedy}." if self.remedy else text


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Findings about layers; ``print`` it, iterate over it, or ask ``codes``.

    Layers are in their order, of each the most serious finding comes first.

    Attributes
    ----------
    findings : tuple of Finding
        Never empty: without faults it has the finding "fine".
    """

    findings: tuple[Finding, ...]

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


# ---- what is asked -----------------------------------------------------------------------------------------


def report(layer: LayerLike) -> Diagnosis:
    """What the running statistics tell of themselves."""
    running = layer.running
    how = _times(running.num_updates, "update") if running.num_updates else "assigned or loaded"
    if running.untouched().any():
        how = "the initial ones, which are allowed"
    return _diagnosis(_of_layer(layer), f"the running statistics are in order ({how})", layer)


def diagnose_layer(layer: LayerLike, x: Array, **positions: Any) -> Diagnosis:
    """What the running statistics tell, and how they compare with those of an input."""
    collector = Collector(layer)
    collector(x, **positions)()
    if not collector.batches:
        got = f"x has shape {x.shape} and no values that count"
        raise ValueError(f"{got}, expected a batch like those in use")
    return _diagnosis(_of_layer(layer, collector), f"the running statistics fit this batch: {_FITS}", layer)


def _diagnosis(found: list[Finding], fine: str, layer: LayerLike | None = None) -> Diagnosis:
    numbers, name = ({}, "") if layer is None else (_counts(layer), layer.name or "")
    return Diagnosis(tuple(found) or (Finding("fine", fine, "", (), numbers, name),))


@_core.entrance
def diagnose(layers: Layers, forward: Callable[[Any], Any], batches: Iterable[Any]) -> Diagnosis:
    """Why is a network good in training and bad in testing? Look at its layers while data runs through.

    Parameters
    ----------
    layers : iterable of BatchNorm, or mapping of names to them
        The layers to look at, in the order in which data reaches them.
    forward : callable
        ``forward(batch)`` runs the network. What it returns is ignored.
    batches : iterable
        What `forward` takes: best many and large ones of the data that tests badly.

    Returns
    -------
    Diagnosis
        To print, to iterate over, or to ask for its ``codes``. Each finding names its layer.

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong kind, or whatever `forward` raises.

    Notes
    -----
    Every layer normalises with each batch's own statistics meanwhile, whatever its mode, and updates nothing.
    So one layer with wrong statistics does not make those behind it look wrong. What is found for each layer
    is what ``BatchNorm.diagnose`` finds. A layer that did not know its channel count learns it.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm, diagnose
    >>> layers = {"bn1": BatchNorm(3), "bn2": BatchNorm(3)}
    >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    >>> found = diagnose(layers, lambda x: layers["bn2"](layers["bn1"](x)), [x])
    >>> [(finding.layer, finding.code) for finding in found]
    [('bn1', 'never_updated'), ('bn2', 'never_updated')]
    """
    chosen = named(layers)
    with watching(chosen) as collectors:
        run(forward, batches)
    found = [
        replace(finding, layer=name)
        for name, layer in chosen.items()
        for finding in _of_layer(layer, collectors[name])
    ]
    fine = f"the running statistics of {_times(len(chosen), 'layer')} fit these batches: {_FITS}"
    return _diagnosis(found, fine)


def _of_layer(layer: LayerLike, collector: Collector | None = None) -> list[Finding]:
    """All that is wrong with a layer, the most serious first."""
    state = (never_updated(layer), *_invalid(layer), cold(layer), *_skipped(layer))
    found = [finding for finding in state if finding is not None] or _eps_dominates(layer)
    if collector is not None:
        found = [*found, *_beside(layer, collector, "cold" in (finding.code for finding in found))]
    return [replace(finding, layer=layer.name or "") for finding in found]


# ---- the layer alone ---------------------------------------------------------------------------------------


def never_updated(layer: LayerLike) -> Finding | None:
    """That nothing has given the layer its statistics, in some channel."""
    running, untouched = layer.running, layer.running.untouched().ravel()
    if layer.settings.allow_initial_statistics or not untouched.any():
        return None
    some, skipped = _some(np.flatnonzero(untouched), untouched), running.num_skipped
    when = "of a frozen layer" if layer.frozen else "in eval mode"
    why = f"; {_times(skipped, 'batch', 'es')} with NaN or Inf left out" if skipped else ""
    text = (
        f"{' and '.join(running.untouched_names())} never updated{some[0]}: calls {when} would use the "
        f"initial values, mean 0 and variance 1 as a rule, whatever the data are{why}"
    )
    train = "Call unfreeze() and train" if layer.frozen else "Train"
    remedy = (
        f"{train} in training mode; or load a state; or assign running_mean and running_var; or call "
        f"{_RECALIBRATE}. If initial values are meant, build the layer with allow_initial_statistics=True"
    )
    return Finding("never_updated", text, remedy, some[1], _counts(layer), layer.name or "")


def cold(layer: LayerLike, bound: float = COLD) -> Finding | None:
    """That the initial values still weigh more than `bound` in the statistics."""
    running, settings, decay = layer.running, layer.settings, layer.settings.decay
    weights = np.where(running.untouched(), 0, running.initial_weight).ravel()
    worst, weight = int(weights.argmax()), float(weights.max())
    if weight <= bound or not running.num_updates or settings.allow_initial_statistics:
        return None
    aim = COLD if weight > COLD else weight / 100  # means far from 0 show less than 1 % of it
    updates = int(running.num_updates - running.missed_updates.flat[worst])
    if decay is None:
        unit, more = "values per channel", float(running.num_values.flat[worst]) * (weight / aim - 1)
    else:
        unit, more = "updates", updates_until(aim / weight, decay, settings.warmup, updates)
    numbers = {**_counts(layer), f"{unit.split()[0]}_missing": more}
    wait, ways = "no update changes that", []
    if more < 1e15:
        wait, ways = f"{more:.0f} more {unit} bring that to {100 * aim:.2g} %", ["train longer"]
    enough = math.floor(1000 * aim ** (1 / max(updates, 1))) / 1000
    if decay is not None and enough >= _LEAST_DECAY:
        numbers["recommended_decay"] = enough
        ways.append(f"use decay={enough:g} or less for so many updates")
    if decay is not None and not (settings.warmup or settings.zero_debias):
        ways.append("build the layer with zero_debias=True or decay=None")
    remedy, some = ", or ".join(ways), _some(np.flatnonzero(weights > bound), -weights)
    remedy = f"{remedy[:1].upper()}{remedy[1:]}. To mend the statistics now call {_RECALIBRATE}"
    share = f"{100 * weight:{'.0f' if weight >= 0.1 else '.2g'}} %"
    after = f"after {_times(updates, 'update')} with decay={decay} the initial values still weigh {share}"
    text = f"the running statistics are cold{some[0]}: {after}, {wait}"
    return Finding("cold", text, remedy, some[1], numbers, layer.name or "")


def _counts(layer: LayerLike) -> dict[str, float]:
    running = layer.running
    return {"num_updates": running.num_updates, "initial_weight": float(running.initial_weight.max())}


def invalid(layer: LayerLike) -> Finding | None:
    """That the running statistics are no statistics."""
    found = next(_invalid(layer), None)
    return found and replace(found, layer=layer.name or "")


def _invalid(layer: LayerLike) -> Iterator[Finding]:
    for name, vector in (("running_mean", layer.running.mean), ("running_var", layer.running.var)):
        values = np.zeros(0) if vector is None else vector.ravel()
        bad = np.flatnonzero(~np.isfinite(values) | ((values < 0) & (name == "running_var")))
        shown = ", ".join(f"{value:g}" for value in values[bad[:_SHOWN]])
        text = f"{name} is {shown} in {_channels(bad)}: calls in eval mode are an error"
        remedy = f"Load a good state, or call {_RECALIBRATE}. {_KEEP_OUT}"
        yield from _in(bad, "invalid_statistics", text, remedy)


def _skipped(layer: LayerLike) -> Iterator[Finding]:
    numbers: dict[str, float] = {n: getattr(layer.running, n) for n in ("num_skipped", "num_updates")}
    if all(numbers.values()):
        skipped, updates = numbers.values()
        text = f"{_times(skipped, 'batch', 'es')} with NaN or Inf left out of the running statistics"
        yield Finding("skipped_batches", f"{text}, {updates} taken in", _LOOK, (), numbers)


def _eps_dominates(layer: LayerLike) -> list[Finding]:
    var, eps = layer.running.var, layer.settings.eps
    var = np.zeros(0) if var is None else var.ravel()
    where = _sorted(np.flatnonzero((var < eps) & (var > 0)), var)
    least = float(var[where[:1]].sum())
    std = (least / (least + (eps or 1))) ** 0.5
    text = f"the running variance is below eps={eps:g} in {_channels(where)}, {least:.3g} at the least: the"
    text += f" output there has a standard deviation of {std:.3g} instead of 1"
    remedy = f"Scale the data up, or use an eps well below the variances, such as eps={least / 100:.1g}"
    return _in(where, "eps_dominates", text, remedy, smallest_var=least, eps=eps)


# ---- the layer in a file -----------------------------------------------------------------------------------


def of_file(layer: LayerLike) -> list[Finding]:
    """What the numbers of a trained layer tell, of its gamma too: 0 is where training may begin."""
    return [*_of_layer(layer), *_dead(layer), *_huge(layer)]


def _dead(layer: LayerLike) -> Iterator[Finding]:
    var = layer.running.var.ravel()
    gamma = np.ones_like(var) if layer.gamma is None else layer.gamma.ravel()
    where, zero = np.flatnonzero((var == 0) | (gamma == 0)), int((gamma == 0).sum())
    text = f"the running variance or gamma is 0 in {_channels(where)}, gamma in {zero} of them"
    remedy = "Their output is constant in use, or was in training: prune them, or look for units that died"
    yield from _in(where, "dead_channels", text, remedy, gamma_zero=zero, var_zero=int((var == 0).sum()))


def _huge(layer: LayerLike) -> Iterator[Finding]:
    gamma = np.zeros(0) if layer.gamma is None else np.abs(layer.gamma.ravel())
    where = np.flatnonzero(~(gamma <= _HUGE_GAMMA))  # so is NaN
    where, most = _sorted(where, -gamma), float(np.max(gamma, initial=0))
    text = f"|gamma| is above {_HUGE_GAMMA:g} in {_channels(where)}, {most:.3g} at the most"
    remedy = "Look for training that diverged, or for another array in gamma's place"
    yield from _in(where, "huge_gamma", text, remedy, largest=most)


# ---- beside batches ----------------------------------------------------------------------------------------


def _beside(layer: LayerLike, collector: Collector, called_cold: bool) -> Iterator[Finding]:
    """What the statistics of what passed through tell."""
    if not collector.batches:
        text = "no values of these batches reached this layer"
        yield Finding("not_reached", text, "Check that forward calls it")
        return
    total = collector.moments
    counts, mean, var = collector.counts.ravel(), total.mean.ravel(), total.var.ravel()
    finite = np.isfinite(mean) & np.isfinite(var)
    bad = np.flatnonzero((counts > 0) & ~finite)
    text = f"the batch holds NaN or Inf in {_channels(bad)}"
    yield from _in(bad, "invalid_batch", text, f"{_LOOK}. {_KEEP_OUT}")
    known = (counts > 0) & finite & ~layer.running.untouched().ravel()
    samples = np.minimum(counts, collector.samples)  # values of one sample count as one: neighbours are alike
    yield from _mismatched(layer, (mean, var, samples), known, called_cold)
    constant = np.flatnonzero((counts >= 2) & finite & (var == 0))
    zero = int((mean[constant] == 0).sum())
    text = f"the batch is constant in {_channels(constant)}{f', {zero} of them 0 everywhere' * (zero > 0)}"
    text += ": the output there is beta alone"
    remedy = "Look for units that died before this layer (ReLU, too large a learning rate) or constant inputs"
    yield from _in(constant, "constant_channels", text, remedy, zero=zero)
    yield from _small(layer, collector, counts)


def _mismatched(
    layer: LayerLike, batch: tuple[Vector, Vector, Vector], known: Mask, called_cold: bool
) -> Iterator[Finding]:
    if layer.running.mean is None:
        return
    mean, var = (v.astype(np.float64).ravel() for v in (layer.running.mean, layer.running.var))
    weight, eps = layer.running.initial_weight.ravel(), layer.settings.eps
    valid = known & np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    badness, distance, ratio = _compared(eps, batch, mean, var, valid)
    if not layer.settings.allow_initial_statistics and weight[badness > 0].any():
        # Do the batches seen, without the initial values, say the same?
        with np.errstate(all="ignore"):
            mean, var = mean / (1 - weight), np.maximum((var - weight) / (1 - weight), 0)
        badness, distance, ratio = _compared(eps, batch, mean, var, valid & (weight < 0.999))
        if not badness.any() and not called_cold and (finding := cold(layer, 0)):
            yield finding
    where = _sorted(np.flatnonzero(badness), -badness)
    sizes = [f"{r:.3g} times as large" if r >= 1 else f"{1 / r:.3g} times as small" for r in ratio[where]]
    shown = _list(
        f"channel {c}: mean off by {distance[c]:.2g} standard deviations, variance {size}"
        for c, size in zip(where, sizes, strict=True)
    )
    beyond = ", more than the initial values in them explain" * called_cold
    count = f"{len(where)} of {len(mean)} channels{beyond}"
    text = f"the running statistics are not those of this batch in {count} ({shown})"
    remedy = (
        f"If this batch is prepared as in training, the statistics are out of date: call {_RECALIBRATE}. If "
        "not, prepare it the same way (scaling, colour order, augmentation), or give this data statistics of "
        "its own, bn.clone(share='params')"
    )
    off, ratio_off = (float(values[where[:1]].sum()) for values in (distance, ratio))
    yield from _in(where, "mismatched", text, remedy, distance=off, ratio=ratio_off)


def _compared(
    eps: float, batch: tuple[Vector, Vector, Vector], mean: Vector, var: Vector, valid: Mask
) -> tuple[Vector, Vector, Vector]:
    """How badly each channel differs (0: not), the distance of the means, the ratio of the variances."""
    with np.errstate(all="ignore"):
        distance, samples = np.abs(batch[0] - mean) / np.sqrt(var + eps), batch[2]
        ratio = (batch[1] + eps) / (var + eps)
        error = np.sqrt(np.maximum(ratio, 1) / samples)  # of the batch's mean, in running deviations
        far_mean = valid & (distance > np.maximum(_MEAN_DISTANCE, _ERRORS * error))
        spread = np.maximum(_VAR_RATIO, np.exp(_ERRORS * np.sqrt(2 / samples)))  # of the variance, a factor
        # The variance of a handful of samples is often far too small.
        far_var = valid & ((ratio > spread) | ((ratio < 1 / spread) & (samples >= 16)))
        off = np.maximum(ratio, 1 / ratio)
    badness = np.maximum(np.where(far_mean, distance / _MEAN_DISTANCE, 0), np.where(far_var, off, 0))
    return badness, distance, ratio


def _small(layer: LayerLike, collector: Collector, counts: Vector) -> Iterator[Finding]:
    """Whether what is normalised together, a batch or a part of one, has few values."""
    samples, size = collector.samples / collector.batches, layer.settings.virtual_batch_size or math.inf
    per_batch = counts / collector.batches * min(1, size / samples)
    where = np.flatnonzero((per_batch > 0) & (per_batch < _FEW))
    if len(where):
        count = max(float(per_batch[where].min()), 1.0)
        mean_error, var_error = (1 / count) ** 0.5, (2 / max(count - 1, 1)) ** 0.5
        some, renorm = _some(where, per_batch), "" if layer.settings.renorm else ", or batch renormalisation"
        what = "a batch" if size >= samples else f"a part of {_times(size, 'sample')}"
        by = f"{mean_error:.2g} of a standard deviation, the variance by {100 * var_error:.0f} %"
        has = f"{what} has {count:.3g} value{'s' * (count > 1)} per channel{some[0]}"
        text = f"{has}: the mean is uncertain by {by}"
        more = "diagnose more values than these, which prove little"
        remedy = f"Use larger batches in training{renorm}; {more}"
        numbers = {"count": count, "mean_error": mean_error, "var_error": var_error}
        yield Finding("small_batch", text, remedy, some[1], numbers)


# ---- words -------------------------------------------------------------------------------------------------


def _in(where: _Where, code: str, text: str, remedy: str, **numbers: float) -> list[Finding]:
    """The finding of some channels, if there are any."""
    numbers = {"channels": len(where), **numbers}
    return [Finding(code, text, remedy, tuple(map(int, where)), numbers)] if len(where) else []


def _some(where: _Where, order: Array) -> tuple[str, tuple[int, ...]]:
    """Words and channels, least of `order` first, for a finding that may concern some channels or all."""
    where = _sorted(where, order)
    return ("", ()) if len(where) == len(order) else (f" in {_channels(where)}", tuple(map(int, where)))


def _sorted(where: _Where, order: Array) -> _Where:
    return where[np.argsort(order[where], kind="stable")]


def _channels(where: _Where) -> str:
    listed = _list(map(str, where))
    return f"channel {listed}" if len(where) == 1 else f"{len(where)} channels ({listed})"


def _list(words: Iterable[str]) -> str:
    first = [*itertools.islice(words, _SHOWN + 1)]
    return ", ".join(first[:_SHOWN]) + ", ..." * (len(first) > _SHOWN)


def _times(number: float, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"
