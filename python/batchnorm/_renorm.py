"""Batch renormalisation: training that normalises a batch almost as inference will."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import _args, _core
from ._functional import Gradients, ResidualGradients, TrainResult, batch_norm_backward

__all__ = ["RenormTrainResult", "batch_renorm_backward", "batch_renorm_train"]

Array = NDArray[Any]


class RenormTrainResult(TrainResult):
    """A TrainResult, three values to unpack, with what batch renormalisation did to the normalised values:
    multiplied them by ``r`` and added ``d``, float64 of shape (C,). After a residual with an activation
    ``activation_mask`` is as in a :class:`ResidualTrainResult`, else None."""

    r: NDArray[np.float64]
    d: NDArray[np.float64]
    activation_mask: NDArray[np.uint8] | None


def batch_renorm_train(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    renorm_mean: Array | None = None,
    renorm_std: Array | None = None,
    rmin: float = 0.0,
    rmax: float = math.inf,
    dmax: float = math.inf,
    decay: float = 0.9,
    renorm_decay: float | None = None,
    running_ddof: int = 1,
    eps: float = 1e-5,
    axis: int = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    activation: _args.ActivationName | None = None,
    slope: float | None = None,
    residual: Array | None = None,
    num_threads: int | None = None,
    out: Array | None = None,
    **unknown: NoReturn,
) -> RenormTrainResult:
    """Normalise ``x`` with its batch statistics, corrected towards reference statistics within limits.

    The reference is ``running_mean`` and ``sqrt(running_var + eps)`` as they are before this call updates
    them, or a pair of its own, ``renorm_mean`` and ``renorm_std``.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Any strides. Not changed, unless it is also ``out``.
    gamma, beta : array of float32 or float64, shape (C,), optional
        Scale and shift per channel; absent means 1 and 0. Finite.
    running_mean, running_var : writable array of float32 or float64, shape (C,)
        Both or neither; updated in place with ``decay`` as by :func:`batch_norm_train`. May be absent only
        beside ``renorm_mean``.
    renorm_mean, renorm_std : writable array of float32 or float64, shape (C,), optional
        A reference of its own, both or neither: moving averages of the batch's mean and of ``sqrt(var +
        eps)``, updated in place with ``renorm_decay``. Start with zeros and ones.
    rmin, rmax, dmax : float
        Limits of the correction: ``0 <= rmin <= 1 <= rmax``, ``dmax >= 0``. The defaults, 0, inf and inf, do
        not limit; 1, 1 and 0 make this :func:`batch_norm_train`.
    decay : float in [0, 1]
        Weight of the OLD running value.
    renorm_decay : float in [0, 1], optional
        The same for ``renorm_mean`` and ``renorm_std``; absent means ``decay``.
    running_ddof, eps, axis, data_format, activation, slope, residual, num_threads, out
        As in :func:`batch_norm_train`.

    Returns
    -------
    RenormTrainResult
        ``y, mean, inv_std`` as from :func:`batch_norm_train` (mean and inv_std are the batch's own), and
        attributes ``r`` and ``d`` for :func:`batch_renorm_backward`. An empty batch gives an empty ``y``, NaN
        statistics and no update.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_train`; also no reference at all, a reference standard deviation that is not
        positive, limits out of order, ``renorm_decay`` without a reference of its own. Nothing is changed.

    Notes
    -----
    ``y = act((x - mean) / std * r * gamma + d * gamma + beta + residual)`` with ``std = sqrt(var + eps)``,
    ``r = clip(std / reference std, rmin, rmax)`` and ``d = clip((mean - reference mean) / reference std,
    -dmax, dmax)`` [1]_. Where nothing is clipped that is inference with the reference. r and d take part per
    channel alone: the pass over the elements is that of batch_norm_train. The variance in ``std`` is the
    population variance, that of the reference whatever the running variance estimates.

    .. [1] S. Ioffe, "Batch Renormalization", 2017, arXiv:1702.03275, algorithm 1.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32)
    >>> running_mean, running_var = np.zeros(64, np.float32), np.ones(64, np.float32)
    >>> result = batchnorm.batch_renorm_train(
    ...     x, running_mean=running_mean, running_var=running_var, rmax=3.0, dmax=5.0
    ... )
    >>> result.y.shape, result.r.shape, result.d.shape
    ((8, 64, 32, 32), (64,), (64,))
    """
    plain_options = data_format is None and renorm_decay is None and not unknown and type(eps) is float
    if plain_options and renorm_mean is None and renorm_std is None and type(running_var) is np.ndarray:
        # As in batch_norm_train: the extension takes what is exactly right, which saves small calls time.
        kind = running_var.dtype
        if kind == np.float32 or kind == np.float64:
            renorm: Any = (running_mean, _std_of(running_var, eps), rmin, rmax, dmax)
            result = _core.batch_norm_train(
                x, gamma, beta, running_mean, running_var, decay, running_ddof, eps, axis, activation, slope,
                residual, num_threads, out, None, renorm, False, False,
            )  # fmt: skip
            if result is not None:
                return _renormalised(result)
    if unknown:
        _args.reject_keywords(batch_renorm_train, unknown)
    arguments = _args.training(
        x,
        gamma,
        beta,
        running_mean,
        running_var,
        decay,
        running_ddof,
        eps,
        axis,
        data_format,
        activation,
        slope,
        residual,
        num_threads,
        out,
    )
    x_checked, channel_axis = _args._input(x, axis, data_format)
    limits = _limits(rmin, rmax, dmax)
    pair: tuple[Array, Array] | None = None
    pair_decay = 0.0
    if renorm_mean is not None or renorm_std is not None:
        others = {
            "x": x, "gamma": gamma, "beta": beta, "residual": residual, "out": out,
            "running_mean": running_mean, "running_var": running_var,
        }  # fmt: skip
        pair = _own_reference(renorm_mean, renorm_std, x_checked, channel_axis, others)
        pair_decay = _args.check_decay(decay if renorm_decay is None else renorm_decay, "renorm_decay")
        mean, std = pair
    else:
        if renorm_decay is not None:
            raise ValueError(
                "renorm_decay is given without renorm_mean and renorm_std, which alone it moves; drop it, or "
                "pass them"
            )
        if running_mean is None or running_var is None:
            raise ValueError(
                "running_mean and running_var are None, expected them, or renorm_mean and renorm_std: batch "
                "renormalisation needs a reference; use batch_norm_train for none"
            )
        mean, std = running_mean, _std_of(running_var, _args.check_eps(eps))
    _check_reference(mean, std, "running" if pair is None else "renorm")
    result = _core.batch_norm_train(*(*arguments[:-3], (mean, std, *limits), True, True))
    assert result is not None
    renormalised = _renormalised(result)
    count = x.size // renormalised.mean.size
    if pair is not None and count:
        _core.update_running(*pair, renormalised.mean, 1 / renormalised.inv_std, pair_decay, count, 0)
    return renormalised


def _renormalised(result: tuple[Any, ...]) -> RenormTrainResult:
    renormalised = RenormTrainResult(*result[:3])
    renormalised.activation_mask, renormalised.r, renormalised.d = result[3:]
    return renormalised


def _std_of(var: Array, eps: float) -> NDArray[np.float64]:
    """sqrt(var + eps), and the sum itself where it has no root: whoever checks it finds it not positive."""
    total = var.astype(np.float64) + eps
    return np.sqrt(total, out=total, where=total > 0)


def _limits(rmin: object, rmax: object, dmax: object) -> tuple[float, float, float]:
    low = _args._real(rmin, "rmin", "a number in [0, 1]")
    if not 0 <= low <= 1:
        raise ValueError(f"rmin is {low}, expected a number in [0, 1]; 0 does not limit")
    high = _args._real(rmax, "rmax", "a number >= 1")
    if not high >= 1:
        raise ValueError(f"rmax is {high}, expected a number >= 1; math.inf does not limit")
    shift = _args._real(dmax, "dmax", "a number >= 0")
    if not shift >= 0:
        raise ValueError(f"dmax is {shift}, expected a number >= 0; math.inf does not limit")
    return low, high, shift


def _own_reference(
    renorm_mean: object, renorm_std: object, x: Array, axis: int, others: dict[str, Any]
) -> tuple[Array, Array]:
    """renorm_mean and renorm_std, which are updated in place: as running arrays, but apart from them."""
    pair = {"renorm_mean": renorm_mean, "renorm_std": renorm_std}
    for name, value in pair.items():
        if value is None:
            raise ValueError(f"{name} is None but its other half is given, expected both or neither")
        vector = _args._written_vector(value, name)
        if vector.shape != (x.shape[axis],):
            raise ValueError(
                f"{name} has shape {vector.shape}, expected ({x.shape[axis]},) to match channel axis {axis} "
                f"of x {x.shape}"
            )
        for other_name, other in (*others.items(), *pair.items()):
            if isinstance(other, np.ndarray) and other_name != name and _args._share(vector, other):
                raise ValueError(f"{name} shares memory with {other_name}, expected separate arrays")
        pair[name] = vector
    mean, std = pair.values()
    assert isinstance(mean, np.ndarray) and isinstance(std, np.ndarray)
    return mean, std


def _check_reference(mean: Array, std: Array, prefix: str) -> None:
    for values, name, good, expected in (
        (mean, "mean", np.isfinite(mean), "a finite number"),
        (std, "standard deviation", np.isfinite(std) & (std > 0), "a finite number > 0"),
    ):
        if not good.all():
            c = int(np.flatnonzero(~good)[0])
            source = f"{prefix}_mean and {prefix}_{'var' if prefix == 'running' else 'std'}"
            raise ValueError(
                f"{source} give a reference {name} of {values[c]} at channel {c}, expected {expected}"
            )


def batch_renorm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    inv_std: Array,
    r: Array,
    d: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    **options: Any,
) -> Gradients:
    """Gradients of :func:`batch_renorm_train` with respect to ``x``, ``gamma``, ``beta`` and the residual.

    Parameters
    ----------
    dy, x, mean, inv_std
        As in :func:`batch_norm_backward`; mean and inv_std are those of the forward pass.
    r, d : array of float32 or float64, shape (C,)
        The forward pass's; constants: no gradient flows through them.
    gamma, beta : array of float32 or float64, shape (C,), optional
        The forward pass's scale and shift.
    options
        Keywords of :func:`batch_norm_backward`, but for ``stats``.

    Returns
    -------
    Gradients
        As from :func:`batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_backward`; also with ``stats``.

    Notes
    -----
    ``dbeta = sum(dy)``, ``dgamma = sum(dy * (x_hat * r + d))``, and dx is that of batch normalization with
    ``gamma * r`` for gamma [1]_.

    .. [1] S. Ioffe, "Batch Renormalization", 2017, arXiv:1702.03275, section 3.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32)
    >>> forward = batchnorm.batch_renorm_train(x, running_mean=np.zeros(64), running_var=np.ones(64))
    >>> dx, dgamma, dbeta = batchnorm.batch_renorm_backward(
    ...     x, x, forward.mean, forward.inv_std, forward.r, forward.d
    ... )
    >>> dx.shape, dgamma.shape, dbeta.shape
    ((8, 64, 32, 32), (64,), (64,))
    """
    if "stats" in options:
        raise TypeError(
            "batch_renorm_backward() has no argument 'stats'; r and d come from batch statistics: drop it, "
            "or use batch_norm_backward, which has stats='fixed'"
        )
    x, channel_axis = _args._input(
        x, options.get("axis", _args.DEFAULT_AXIS), options.get("data_format", None)
    )
    r, d = (_args._per_channel(v, n, x, channel_axis, finite=False) for v, n in ((r, "r"), (d, "d")))
    g, b = _args._affine(gamma, beta, x, channel_axis)
    need_dx, need_dgamma, need_dbeta, need_dresidual = _args.check_needs(
        options.pop("needs", _args.GRADIENTS)
    )
    # dgamma takes sum(dy) too. In float64 both, so that they are rounded once, when they have been added.
    asked = (need_dx, need_dgamma, need_dgamma or need_dbeta, need_dresidual)
    needs = tuple(name for name, need in zip(_args.NEEDS, asked, strict=True) if need)
    ones, zeros = np.ones(r.shape), np.zeros(r.shape)
    scale = (ones if g is None else g) * r.astype(np.float64)
    offset = (zeros if b is None else b) + (ones if g is None else g) * d.astype(np.float64)
    # A channel whose statistics are NaN has NaN for r and d as well, and NaN gradients whatever its scale is.
    scale, offset = np.where(np.isfinite(scale), scale, 1), np.where(np.isfinite(offset), offset, 0)
    result = batch_norm_backward(dy, x, mean, inv_std, scale, offset, needs=needs, **options)
    default = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    types = [v.dtype for v in (g, b) if v is not None] or [default]
    dgamma = (r * result.dgamma + d * result.dbeta).astype(types[0]) if need_dgamma else None
    dbeta = result.dbeta.astype(types[-1]) if need_dbeta else None
    if not need_dresidual:
        return Gradients(result.dx, dgamma, dbeta)
    assert isinstance(result, ResidualGradients)
    gradients = ResidualGradients(result.dx, dgamma, dbeta)
    gradients.dresidual = result.dresidual
    return gradients
