"""A call of a layer, the long way: any statistics, any schedule, guarded, with a residual.

`BatchNorm.__call__` does the everyday call itself and sends all others here. A call that fails leaves the
layer as it was: the last thing that happens is the commit. What backward needs is returned as a `Kept`.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _args, _positions, _running, _ways
from ._functional import activation_mask_bytes, batch_norm, moments
from ._layer_base import COLD, STATISTICS, LayerBase
from ._ways import Kept

Array = NDArray[Any]


class ColdStatisticsWarning(UserWarning):
    """Running statistics were used while the initial values still weigh more than 1 % in them."""


class Request(NamedTuple):
    """The arguments of a call; None where they were not given."""

    training: bool
    stats: Any = None
    update: Any = None
    keep: Any = None
    residual: Any = None
    out: Any = None
    mask: Any = None
    lengths: Any = None
    lengths_axis: Any = None
    weights: Any = None

    def positions(self) -> dict[str, Any]:
        """The arguments about which positions count, as far as they were given."""
        given = {
            "mask": self.mask, "lengths": self.lengths, "lengths_axis": self.lengths_axis,
            "weights": self.weights,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


def spoils(out: Array | None, kept: Kept | None) -> bool:
    """Whether `out` overwrote the residual that backward, after a smooth activation, reads again."""
    residual = None if kept is None else kept.options.get("residual")
    return out is not None and residual is not None and _args._share(out, residual)


class Resolved(NamedTuple):
    """What a call does."""

    batch: bool  # normalise with the batch's own statistics
    update: bool
    keep: bool


def resolve(layer: LayerBase, request: Request) -> Resolved:
    """What the layer's modes and the arguments of a call come to."""
    learning = request.training and not layer._frozen
    batch = learning
    if request.stats is not None:
        if not isinstance(request.stats, str):
            raise TypeError(f"stats is {_args._kind(request.stats)}, expected 'batch' or 'running'")
        if request.stats not in ("batch", "running"):
            raise ValueError(f"stats is {request.stats!r}, expected 'batch' or 'running'")
        batch = request.stats == "batch"
    update = learning and layer._updating
    if request.update is not None:
        update = _args.check_flag(request.update, "update")
        if update and layer._frozen:
            raise ValueError("update is True, but the layer is frozen: drop it, or call unfreeze() first")
        if update and not layer._updating:
            raise ValueError("update is True inside no_update(): drop one of them")
    keep = request.training if request.keep is None else _args.check_flag(request.keep, "keep")
    if layer._collector is not None:
        if update and request.update is not None:
            raise ValueError("update is True inside recalibrating(), which replaces the statistics: drop it")
        return Resolved(True, False, keep)
    return Resolved(batch, update, keep)


def forward(layer: LayerBase, x: Array, request: Request, where: dict[str, Any]) -> tuple[Array, Kept | None]:
    """Normalise `x`; `where` is axis and data_format. Returns y, and what backward needs if that is kept."""
    todo = resolve(layer, request)
    part = None
    if layer._collector is not None:
        part = layer._collector.measure(x, where, request.positions())  # before x is overwritten in place
    step = Step(layer, x, where, request.positions()) if todo.update else None
    if step is not None and not step.count:
        step = None  # an empty batch counts for nothing
    way = _by_batch if todo.batch else _by_running
    y, kept = way(layer, x, request, where, todo.keep, step)
    if step is not None:
        step.commit()
    if part is not None and layer._collector is not None:
        layer._collector.add(part)
    return y, kept


def _by_batch(
    layer: LayerBase, x: Array, request: Request, where: dict[str, Any], keep: bool, step: Step | None
) -> tuple[Array, Kept | None]:
    if step is not None and layer._on_nonfinite == "raise" and request.out is not None and step.count > 1:
        if layer._virtual_batch_size is None:
            step.foresee()
            step.set_aside()
    arguments = {
        "eps": layer._eps, "activation": layer._activation, "slope": layer._slope,
        "residual": request.residual, "out": request.out, **where,
    }  # fmt: skip
    y, kept = _ways.by_batch(layer, x, arguments, request.positions(), step)
    if step is not None:
        step.check()
    return y, kept if keep else None


def _by_running(
    layer: LayerBase, x: Array, request: Request, where: dict[str, Any], keep: bool, step: Step | None
) -> tuple[Array, Kept | None]:
    """Normalise with the running statistics as they are before this call's update."""
    if not layer._counters.trusted:
        check_statistics(layer, x, where, 6)
    if step is not None:
        step.foresee()
        if step.reference is not None and step.measured is not None:
            mean, var = step.measured
            _running.update_running(
                *step.reference, mean, np.sqrt(var + layer._eps), decay=_reference_decay(layer, step.decay),
                count=1, ddof=0,
            )  # fmt: skip
    counting = request.positions()
    counting.pop("weights", None)  # they weigh in the batch's statistics alone
    backward: dict[str, Any] = {"stats": "fixed", **counting}
    if keep and request.residual is not None and layer._activation is not None:
        if layer._activation in _args.PIECEWISE_LINEAR:
            backward["activation_mask"] = np.zeros(activation_mask_bytes(x, **where), np.uint8)
        else:
            backward["residual"] = request.residual
    y = batch_norm(
        x, layer._running_mean, layer._running_var, layer._gamma, layer._beta, eps=layer._eps,
        activation=layer._activation, slope=layer._slope, residual=request.residual, out=request.out,
        activation_mask=backward.get("activation_mask"), **counting, **where,
    )  # fmt: skip
    if not keep:
        return y, None
    with np.errstate(all="ignore"):  # var = eps = 0 gives inf, as in the forward
        inv_std = 1.0 / np.sqrt(layer._running_var.astype(np.float64) + layer._eps)
    mean = layer._running_mean.astype(np.float64)
    return y, Kept(x, mean, inv_std, backward, request.residual is not None)


def _reference_decay(layer: LayerBase, decay: float) -> float:
    own = layer._renorm["decay"]
    return decay if own is None else float(own)


class Step:
    """An update of running statistics, prepared aside where it may not come to pass."""

    def __init__(self, layer: LayerBase, x: Array, where: dict[str, Any], positions: dict[str, Any]) -> None:
        self.layer, self.x, self.where, self.positions = layer, x, where, positions
        self.reference: tuple[Array, Array] | None = None  # renorm_mean and renorm_std, if there are any
        channels = layer._num_features or 1
        self.count = self._values() if positions else x.size // channels if isinstance(x, np.ndarray) else 0
        counters = layer._counters
        self.decay = (
            0.0
            if not self.count
            else _running.scheduled(
                layer._decay, layer._warmup, layer._zero_debias, counters.num_updates,
                counters.num_values / channels, self.count,
            )
        )  # fmt: skip
        self.aside = layer._on_nonfinite != "propagate"
        self.mean, self.var = layer._running_mean, layer._running_var
        if layer._renorm_mean is not None:
            self.reference = layer._renorm_mean, layer._renorm_std
        if self.aside or layer._virtual_batch_size is not None:
            self.set_aside()
        self.skipped = False
        self.measured: tuple[Array, Array] | None = None
        self.measured_count: float = self.count  # values that `measured` is of

    def set_aside(self) -> None:
        """Let the update happen to copies, as they are now."""
        self.aside = True
        self.mean, self.var = self.layer._running_mean.copy(), self.layer._running_var.copy()
        if self.reference is not None:
            self.reference = self.layer._renorm_mean.copy(), self.layer._renorm_std.copy()

    def measure(self, mean: Array, inv_std: Array) -> None:
        """Note the batch's statistics, for the history."""
        if self.layer._history is not None:
            with np.errstate(all="ignore"):
                self.measured = mean, inv_std**-2.0 - self.layer._eps

    def take(self, mean: Array, var: Array, count: int) -> None:
        """Update the statistics by a mean and a population variance of parts of `count` values."""
        self._move(mean, var, count)
        self.measured, self.measured_count = (mean, var), count

    def _move(self, mean: Array, var: Array, count: float) -> None:
        ddof = self.layer._running_ddof
        if not isinstance(count, int):  # a sum of weights
            if count <= ddof:
                raise ValueError(f"weights sum to {count:g}, expected more than running_ddof = {ddof}")
            var, count, ddof = var * (count / (count - ddof)), 1, 0
        _running.update_running(self.mean, self.var, mean, var, decay=self.decay, count=count, ddof=ddof)

    def _values(self) -> float:
        """Values per channel that count, with weights their sum."""
        positions = _positions.checked(self.x, self.where, self.positions)
        return float(positions.n) if positions.weighted else int(positions.n)

    def refer(self, mean: Array, inv_std: Array) -> None:
        """Let a batch be the reference of batch renormalisation."""
        assert self.reference is not None
        for vector, value in zip(self.reference, (mean, 1 / inv_std), strict=True):
            np.copyto(vector, value, casting="same_kind")

    def foresee(self) -> None:
        """Update the statistics without normalising, and see whether that will do."""
        batch = moments(self.x, **self.where, **self.positions)
        self.set_aside()
        self._move(batch.mean, batch.var, self.count)
        self.check()
        self.measured = batch.mean, batch.var

    def check(self) -> None:
        """Look for NaN and Inf, if that is wanted."""
        layer = self.layer
        if layer._on_nonfinite == "propagate":
            return
        found = _running.first_nonfinite(self.mean, self.var)
        if found is None:
            return
        name, channel, value = found
        self.skipped = layer._on_nonfinite == "skip"
        if not self.skipped:
            raise ValueError(
                f"the running {name} would become {value} at channel {channel}: x holds NaN, Inf or values "
                f"whose {name} does not fit {layer._dtype}; the layer is unchanged. Leave this batch out, or "
                f"use on_nonfinite='skip' (go on without its statistics) or 'propagate'"
            )

    def commit(self) -> None:
        """Make it so; cannot fail."""
        layer = self.layer
        if self.skipped:
            layer._counters.num_skipped += 1
            return
        if self.aside:
            np.copyto(layer._running_mean, self.mean)
            np.copyto(layer._running_var, self.var)
            if self.reference is not None:
                np.copyto(layer._renorm_mean, self.reference[0])
                np.copyto(layer._renorm_std, self.reference[1])
        layer._counters.step(self.decay, self.count * (layer._num_features or 1))
        if layer._history is not None and self.measured is not None:
            layer._history.add(layer, *self.measured, self.measured_count)


# ---- statistics that nobody has learned --------------------------------------------------------------------


def check_statistics(layer: LayerBase, x: Array, where: dict[str, Any], stacklevel: int) -> None:
    """Before running statistics are used: raise if they are no statistics, warn if they are cold."""
    counters = layer._counters
    if layer._allow_initial_statistics:
        return  # a setting, which may change, and which layers that share the statistics may not have
    if counters.initial_weight <= COLD:
        counters.trusted = True
    elif counters.num_updates:
        if not counters.warned:
            warnings.warn(cold_message(layer), ColdStatisticsWarning, stacklevel=stacklevel)
            counters.warned = True
    elif untouched := layer._untouched_statistics():
        batch_norm(x, layer._running_mean, layer._running_var, **where)  # what is wrong with x comes first
        raise RuntimeError(never_updated_message(layer, untouched))
    else:
        counters.trusted = True  # they were written in place


def never_updated_message(layer: LayerBase, untouched: list[str]) -> str:
    """Why statistics that were never updated cannot be used, and what to do."""
    skipped = layer._counters.num_skipped
    if skipped:
        why = (
            f"all training batches so far ({skipped}) held NaN or Inf, and on_nonfinite='skip' left them out"
        )
    elif len(untouched) < len(STATISTICS):
        why = f"{untouched[0]} has been neither updated nor assigned"
    else:
        why = "no training forward has updated them"
    return (
        f"the running statistics are still the initial ones: {why}. Train first (bn(x) in training mode), or "
        "bn.recalibrate(batches), or load a state, or assign bn.running_mean and bn.running_var; if mean 0 "
        "and variance 1 are meant, build the layer with allow_initial_statistics=True"
    )


def cold_message(layer: LayerBase) -> str:
    """How cold statistics are, and what to do."""
    counters, decay = layer._counters, layer._decay
    updates = counters.num_updates
    number = "None" if decay is None else f"{decay:g}"
    _, wait = missing(layer, COLD)
    return (
        f"the running statistics are cold: after {updates} update{'s' * (updates != 1)} with decay={number} "
        f"the initial values still weigh {percent(counters.initial_weight)} %; {wait}. "
        f"{remedy(layer, COLD)}; bn.recalibrate(batches) mends the statistics now"
    )


def missing(layer: LayerBase, aim: float) -> tuple[float, str]:
    """How many updates, or of a cumulative average values, bring the initial values' weight to `aim`."""
    counters, decay = layer._counters, layer._decay
    share, percent = aim / counters.initial_weight, f"bring that to {100 * aim:.2g} %"
    if decay is None:
        more = counters.num_values / (layer._num_features or 1) * (1 / share - 1)
        return more, f"{more:.0f} more values per channel {percent}"
    more = _running.updates_until(share, decay, layer._warmup, counters.num_updates)
    return more, f"{more:.0f} more updates {percent}" if more < 1e15 else "no update changes that"


def remedy(layer: LayerBase, aim: float) -> str:
    """What helps against cold statistics, of what this layer's schedule allows."""
    if layer._decay is None:
        return "Train longer"
    ways = [] if layer._decay == 1 else ["train longer"]
    ways.append(f"use decay={_floor(aim ** (1 / layer._counters.num_updates))} or less for so many updates")
    if not layer._warmup:
        ways += ["zero_debias=True", "decay=None"]
    text = ", or ".join(ways)
    return text[0].upper() + text[1:]


def percent(share: float) -> str:
    """A share in percent, in two digits or so."""
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.2g}"


def _floor(value: float) -> str:
    """A decay in few digits, rounded down."""
    return f"{int(value * 1000) / 1000:g}"
