"""The ways a layer normalises by the batch: plainly, renormalised, in parts, or keeping y instead of x.

Each is made of the function of the same name. `_forward` calls the one that the layer's options ask for;
what it returns for backward is a `Kept`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _args, _renorm
from ._from_output import batch_norm_backward_from_output, batch_norm_train_saving
from ._functional import Gradients, batch_norm_backward, batch_norm_train
from ._ghost import ghost_batch_norm_backward, ghost_batch_norm_train
from ._layer_base import LayerBase

if TYPE_CHECKING:
    from ._forward import Step

Array = NDArray[Any]


class Kept(NamedTuple):
    """What backward needs of a forward."""

    x: Array  # or y, where `saved` is given
    mean: Array
    inv_std: Array
    options: dict[str, Any]  # of `function`
    residual: bool = False
    function: Callable[..., Gradients] = batch_norm_backward
    saved: Any = None  # of batch_norm_train_saving

    def backward(self, layer: LayerBase, dy: Array, out: Array | None) -> Gradients:
        """The gradients that the layer wants."""
        needs = (*layer._needs, "dresidual") if self.residual else layer._needs
        if self.saved is not None:
            return batch_norm_backward_from_output(dy, self.x, self.saved, needs=needs, out=out)
        return self.function(
            dy, self.x, self.mean, self.inv_std, gamma=layer._gamma, beta=layer._beta, axis=layer._axis,
            activation=layer._activation, slope=layer._slope, needs=needs, out=out, **self.options,
        )  # fmt: skip


def by_batch(
    layer: LayerBase, x: Array, arguments: dict[str, Any], positions: dict[str, Any], step: Step | None
) -> tuple[Array, Kept]:
    """Normalise `x` with its own statistics, and let them enter those of `step`."""
    if positions:
        _refuse_positions(layer, positions)
        y, kept = by_batch(layer, x, {**arguments, **positions}, {}, step)
        return y, kept._replace(options={**kept.options, **positions})
    if layer._virtual_batch_size is not None:
        return _in_parts(layer, x, arguments, step)
    if step is not None:
        arguments = {
            **arguments, "running_mean": step.mean, "running_var": step.var, "decay": step.decay,
            "running_ddof": layer._running_ddof,
        }  # fmt: skip
    if layer._save_memory:
        return _saving(layer, x, arguments, step)
    if layer._renorm is not None and layer._collector is None and not _unknown_reference(layer):
        return _renormalised(layer, x, arguments, step)
    return _plain(layer, x, arguments, step)


def _refuse_positions(layer: LayerBase, positions: dict[str, Any]) -> None:
    options = {
        "renorm": layer._renorm is not None, "virtual_batch_size": layer._virtual_batch_size is not None,
        "save_memory": layer._save_memory,
    }  # fmt: skip
    for option, given in options.items():
        if given:
            raise ValueError(
                f"{next(iter(positions))} is given and the layer has {option}, which cannot leave positions "
                f"out: drop one of them"
            )


def _unknown_reference(layer: LayerBase) -> bool:
    """Whether batch renormalisation has nothing yet to go by."""
    if not has_reference(layer._renorm):
        return bool(layer._untouched_statistics())
    return bool((layer._renorm_mean == 0).all() and (layer._renorm_std == 1).all())


def has_reference(renorm: Mapping[str, Any] | None) -> bool:
    """Whether a layer with this option has renorm_mean and renorm_std."""
    return renorm is not None and renorm["decay"] is not None


def _gate_of(result: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What tells backward the activation's derivative: after a residual a mask, or the residual again."""
    mask, residual = getattr(result, "activation_mask", None), arguments["residual"]
    if mask is not None:
        return {"activation_mask": mask}
    return {} if residual is None or arguments["activation"] is None else {"residual": residual}


def _plain(layer: LayerBase, x: Array, arguments: dict[str, Any], step: Step | None) -> tuple[Array, Kept]:
    result = batch_norm_train(x, layer._gamma, layer._beta, **arguments)
    if step is not None:
        step.measure(result.mean, result.inv_std)
        if step.reference is not None:  # the first batch of a reference that is not known yet
            step.refer(result.mean, result.inv_std)
    return result.y, Kept(
        x, result.mean, result.inv_std, _gate_of(result, arguments), arguments["residual"] is not None
    )


def _renormalised(
    layer: LayerBase, x: Array, arguments: dict[str, Any], step: Step | None
) -> tuple[Array, Kept]:
    limits = {name: layer._renorm[name] for name in ("rmin", "rmax", "dmax")}
    if step is None:  # read the statistics, update copies of them
        copies = layer._running_mean.copy(), layer._running_var.copy()
        arguments = {**arguments, "running_mean": copies[0], "running_var": copies[1]}
    if has_reference(layer._renorm):
        pair = None if step is None else step.reference
        mean, std = pair or (layer._renorm_mean.copy(), layer._renorm_std.copy())
        limits |= {"renorm_mean": mean, "renorm_std": std, "renorm_decay": layer._renorm["decay"]}
    result = _renorm.batch_renorm_train(x, layer._gamma, layer._beta, **arguments, **limits)
    if step is not None:
        step.measure(result.mean, result.inv_std)
    options = {**_gate_of(result, arguments), "r": result.r, "d": result.d}
    kept = Kept(
        x, result.mean, result.inv_std, options, arguments["residual"] is not None,
        _renorm.batch_renorm_backward,
    )  # fmt: skip
    return result.y, kept


def _in_parts(layer: LayerBase, x: Array, arguments: dict[str, Any], step: Step | None) -> tuple[Array, Kept]:
    """The running statistics receive the average of the parts' in one step, so that decay means the same."""
    size = layer._virtual_batch_size
    out = arguments["out"]
    aside = out is not None and step is not None and layer._on_nonfinite == "raise"
    if aside:  # out may be written only once the statistics are known to be good
        arguments = {**arguments, "out": None}
    result = ghost_batch_norm_train(x, layer._gamma, layer._beta, virtual_batch_size=size, **arguments)
    if step is not None:
        with np.errstate(all="ignore"):
            var = np.maximum(result.inv_std**-2.0 - layer._eps, 0)
        step.take(result.mean.mean(axis=0), var.mean(axis=0), step.count * size // len(x))
        if aside:
            step.check()
    y = result.y
    if aside:
        places = {"x": x, "residual": arguments["residual"]}
        y = _args._output(out, "out", x, {n: v for n, v in places.items() if v is not None}, {})
        np.copyto(y, result.y)
        y = out
    options = {**_gate_of(result, arguments), "virtual_batch_size": size}
    kept = Kept(
        x, result.mean, result.inv_std, options, arguments["residual"] is not None, ghost_batch_norm_backward
    )
    return y, kept


def _saving(layer: LayerBase, x: Array, arguments: dict[str, Any], step: Step | None) -> tuple[Array, Kept]:
    given = {name: value for name, value in arguments.items() if name != "residual"}
    if arguments["residual"] is not None:
        raise ValueError(
            "residual is given and save_memory is True: y with a residual does not tell x; drop one of them, "
            "or add the residual afterwards"
        )
    result = batch_norm_train_saving(x, layer._gamma, layer._beta, **given)
    if step is not None:
        step.measure(result.mean, result.inv_std)
    return result.y, Kept(result.y, result.mean, result.inv_std, {}, saved=result.saved)


# ---- the options -------------------------------------------------------------------------------------------


def check_renorm(value: object) -> dict[str, Any] | None:
    """The option `renorm`: None, True, or limits by name."""
    if value is None or value is False:
        return None
    limits: dict[str, Any] = {"rmin": 0.0, "rmax": math.inf, "dmax": math.inf, "decay": None}
    if value is True:
        return limits
    if not isinstance(value, Mapping):
        raise TypeError(
            f"renorm is {_args._kind(value)}, expected True, None, or a mapping such as "
            f"{{'rmax': 3.0, 'dmax': 5.0}}"
        )
    for name in value:
        if name not in limits:
            raise ValueError(f"renorm names {name!r}, expected names among {', '.join(limits)}")
    limits |= value
    limits["rmin"], limits["rmax"], limits["dmax"] = _renorm._limits(
        limits["rmin"], limits["rmax"], limits["dmax"]
    )
    if limits["decay"] is not None:
        limits["decay"] = _args.check_decay(limits["decay"])
    return limits


def check_virtual_batch_size(value: object) -> int | None:
    """The option `virtual_batch_size`: None or an int >= 1."""
    if value is None:
        return None
    size = _args.check_int(value, "virtual_batch_size", "an int >= 1, or None")
    if size < 1:
        raise ValueError(f"virtual_batch_size is {size}, expected an int >= 1, or None")
    return size


def check_together(renorm: object, virtual_batch_size: object, save_memory: bool, activation: object) -> None:
    """The ways exclude each other, and keeping y needs a y that tells x."""
    given = {"renorm": renorm, "virtual_batch_size": virtual_batch_size, "save_memory": save_memory or None}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are given, which exclude each other: drop one of them")
    if save_memory and activation not in (None, "leaky_relu"):
        raise ValueError(
            f"save_memory is True and activation is {activation!r}, from whose output x cannot be recovered: "
            f"drop one of them, or apply the activation afterwards"
        )
