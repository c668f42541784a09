"""Ghost batches: a large batch normalised in parts, each by its own statistics."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import _args, _core
from ._functional import (
    Gradients,
    ResidualGradients,
    ResidualTrainResult,
    TrainResult,
    batch_norm_backward,
    batch_norm_train,
)

__all__ = ["ghost_batch_norm_backward", "ghost_batch_norm_train"]

Array = NDArray[Any]


def ghost_batch_norm_train(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    virtual_batch_size: int,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    decay: float = 0.9,
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
) -> TrainResult:
    """Normalise each ``virtual_batch_size`` samples of ``x`` with the statistics of these samples.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        N samples along axis 0, which is not the channel axis. Any strides. Not changed, unless it is also
        ``out``.
    gamma, beta : array of float32 or float64, shape (C,), optional
        Scale and shift per channel, of all parts; absent means 1 and 0. Finite.
    virtual_batch_size : int
        Samples of a part; a divisor of N. The parts are samples 0 to virtual_batch_size - 1, and so on.
    running_mean, running_var : writable array of float32 or float64, shape (C,), optional
        Both or neither. Updated in place once the call has succeeded, by each part in turn.
    decay, running_ddof, eps, axis, data_format, activation, slope, residual, num_threads, out
        As in :func:`batch_norm_train`.

    Returns
    -------
    TrainResult
        As from :func:`batch_norm_train`, but ``mean`` and ``inv_std`` have shape (G, C) for G = N /
        virtual_batch_size parts, and ``activation_mask``, if there is one, has a row for each.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_train`; also a ``virtual_batch_size`` that does not divide N, or that leaves one
        value per channel, and channels on axis 0. Nothing is changed then.

    Notes
    -----
    The same bits as :func:`batch_norm_train` of each part in turn [1]_, written into one array. The running
    statistics so receive ``decay`` G times in a call; for the pace of a whole batch give ``decay ** (1 /
    G)``.

    .. [1] E. Hoffer, I. Hubara, D. Soudry, "Train longer, generalize better", 2017, arXiv:1705.08741,
       algorithm 1.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(32, 64, 8, 8)).astype(np.float32)
    >>> y, mean, inv_std = batchnorm.ghost_batch_norm_train(x, virtual_batch_size=8)
    >>> y.shape, mean.shape, inv_std.shape
    ((32, 64, 8, 8), (4, 64), (4, 64))
    """
    if unknown:
        _args.reject_keywords(ghost_batch_norm_train, unknown)
    x, channel_axis, size = _parts_of(x, axis, data_format, virtual_batch_size)
    z = _args._residual(residual, x)
    running = None
    if running_mean is not None and running_var is not None:
        running = _args._running_pair(running_mean, running_var)
        _apart(running, {"x": x, "gamma": gamma, "beta": beta, "residual": z})
    if out is None:
        y = _core.new_like(x)
    else:
        vectors = {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
        apart_from = {n: v if isinstance(v, np.ndarray) else None for n, v in vectors.items()}
        y = _args._output(out, "out", x, {"x": x} if z is None else {"x": x, "residual": z}, apart_from)
    direct = _writes_parts(y, x, channel_axis, size)
    # The first part's call checks what all have in common before anything is written. Running statistics move
    # in copies until all have succeeded.
    kept = (running_mean, running_var) if running is None else tuple(v.copy() for v in running)
    parts = []
    for first in range(0, max(len(x), 1), size):  # an empty batch takes part once
        part = slice(first, first + size)
        parts.append(
            batch_norm_train(
                x[part],
                gamma,
                beta,
                running_mean=kept[0],
                running_var=kept[1],
                decay=decay,
                running_ddof=running_ddof,
                eps=eps,
                axis=channel_axis,
                activation=activation,
                slope=slope,
                residual=None if z is None else z[part],
                num_threads=num_threads,
                out=y[part] if direct else None,
            )
        )
        if not direct:
            y[part] = parts[-1].y
    if running is not None:
        for vector, moved in zip(running, kept, strict=True):
            vector[...] = moved
    n = len(x) // size
    y = y if out is None else out
    mean, inv_std = np.stack([p.mean for p in parts])[:n], np.stack([p.inv_std for p in parts])[:n]
    if not isinstance(parts[0], ResidualTrainResult):
        return TrainResult(y, mean, inv_std)
    result = ResidualTrainResult(y, mean, inv_std)
    masks = [p.activation_mask for p in parts if isinstance(p, ResidualTrainResult)]
    result.activation_mask = np.stack(masks)[:n]
    return result


def ghost_batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    inv_std: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    virtual_batch_size: int,
    axis: int = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    activation: _args.ActivationName | None = None,
    slope: float | None = None,
    activation_mask: NDArray[np.uint8] | None = None,
    residual: Array | None = None,
    needs: tuple[str, ...] = _args.GRADIENTS,
    num_threads: int | None = None,
    out: Array | None = None,
    out_residual: Array | None = None,
    **unknown: NoReturn,
) -> Gradients:
    """Gradients of :func:`ghost_batch_norm_train`.

    Parameters
    ----------
    dy, x : array
        As in :func:`batch_norm_backward`.
    mean, inv_std : array of float32 or float64, shape (G, C)
        As the forward pass returned them.
    gamma, beta : array of float32 or float64, shape (C,), optional
        The forward pass's scale and shift.
    virtual_batch_size : int
        The forward pass's.
    activation_mask : uint8 array with G rows, optional
        The forward pass's.
    axis, data_format, activation, slope, residual, needs, num_threads, out, out_residual
        As in :func:`batch_norm_backward`.

    Returns
    -------
    Gradients
        As from :func:`batch_norm_backward`: dgamma and dbeta are sums over the parts.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_backward` and :func:`ghost_batch_norm_train`.

    Notes
    -----
    :func:`batch_norm_backward` of each part, written into one array; the parts' dgamma and dbeta are added in
    float64 before they are rounded.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.random.default_rng(0).normal(size=(32, 64, 8, 8)).astype(np.float32)
    >>> y, mean, inv_std = batchnorm.ghost_batch_norm_train(x, virtual_batch_size=8)
    >>> dx, dgamma, dbeta = batchnorm.ghost_batch_norm_backward(y, x, mean, inv_std, virtual_batch_size=8)
    >>> dx.shape, dgamma.shape, dbeta.shape
    ((32, 64, 8, 8), (64,), (64,))
    """
    if unknown:
        _args.reject_keywords(ghost_batch_norm_backward, unknown)
    x, channel_axis, size = _parts_of(x, axis, data_format, virtual_batch_size)
    dy, z = _args._like_x(dy, "dy", x), _args._residual(residual, x)
    channels, n = x.shape[channel_axis], len(x) // size
    mean, inv_std = (_by_part(v, name, n, channels) for v, name in ((mean, "mean"), (inv_std, "inv_std")))
    g, b = _args._affine(gamma, beta, x, channel_axis)
    need_dx, need_dgamma, need_dbeta, need_dresidual = _args.check_needs(needs)
    if activation_mask is not None and (
        not isinstance(activation_mask, np.ndarray) or activation_mask.shape[:1] != (n,)
    ):
        raise ValueError(
            f"activation_mask has no {n} rows, expected that of ghost_batch_norm_train, one row for each part"
        )
    read = {"dy": dy} if z is None else {"dy": dy, "residual": z}
    dx = _destination(out, "out", need_dx, x, {**read, "x": x}, {"mean": mean, "inv_std": inv_std})
    dz = _destination(
        out_residual,
        "out_residual",
        need_dresidual,
        x,
        read,
        {"x": x, "mean": mean, "inv_std": inv_std},
    )
    if dx is not None and dz is not None and _args._share(dx, dz):
        raise ValueError("out and out_residual overlap, expected two separate arrays")
    dx_direct, dz_direct = (a is not None and _writes_parts(a, x, channel_axis, size) for a in (dx, dz))
    # In float64, so that the sums over parts are rounded once.
    wide = [np.full(channels, v) if p is None else p.astype(np.float64) for v, p in ((1.0, g), (0.0, b))]
    sums = np.zeros((2, channels))
    for i in range(max(n, 1)):
        part = slice(i * size, (i + 1) * size)
        result = batch_norm_backward(
            dy[part],
            x[part],
            *((mean[i], inv_std[i]) if n else wide),
            *wide,
            axis=channel_axis,
            activation=activation,
            slope=slope,
            activation_mask=activation_mask if activation_mask is None else activation_mask[i],
            residual=None if z is None else z[part],
            needs=tuple(needs),
            num_threads=num_threads,
            out=dx[part] if dx is not None and dx_direct else None,
            out_residual=dz[part] if dz is not None and dz_direct else None,
        )
        if dx is not None and not dx_direct:
            dx[part] = result.dx
        if dz is not None and not dz_direct:
            assert isinstance(result, ResidualGradients)
            dz[part] = result.dresidual
        with np.errstate(invalid="ignore"):  # Inf - Inf, of a channel that is lost
            for total, gradient in zip(sums, result[1:3], strict=True):
                total += 0 if gradient is None else gradient
    default = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    types = [v.dtype for v in (g, b) if v is not None] or [default]
    gradients = (
        None if dx is None else dx if out is None else out,
        sums[0].astype(types[0]) if need_dgamma else None,
        sums[1].astype(types[-1]) if need_dbeta else None,
    )
    if dz is None:
        return Gradients(*gradients)
    with_residual = ResidualGradients(*gradients)
    with_residual.dresidual = dz if out_residual is None else out_residual
    return with_residual


def _parts_of(
    value: object, axis: object, data_format: object, virtual_batch_size: object
) -> tuple[Array, int, int]:
    """x, its channel axis, and the number of samples in a part."""
    x, channel_axis = _args._input(value, axis, data_format)
    if channel_axis % x.ndim == 0:
        raise ValueError(
            f"axis is {channel_axis}, the axis of the samples that virtual_batch_size divides, expected "
            f"another one for x of shape {x.shape}"
        )
    size = _args.check_int(virtual_batch_size, "virtual_batch_size", "an int >= 1")
    if size < 1:
        raise ValueError(f"virtual_batch_size is {size}, expected an int >= 1")
    samples = len(x)
    if samples % size:
        below = max(d for d in range(1, min(size, samples) + 1) if samples % d == 0)
        above = [d for d in range(size + 1, samples + 1) if samples % d == 0][:1]
        raise ValueError(
            f"virtual_batch_size is {size}, which does not divide the {samples} samples of x {x.shape}, "
            f"expected a divisor, such as {' or '.join(map(str, [below, *above]))}"
        )
    if samples and x.size // samples * size == x.shape[channel_axis]:
        raise ValueError(
            f"virtual_batch_size is {size}, with which a part of x {x.shape} has one value per channel (axis "
            f"{channel_axis}), from which no variance can be had, expected at least 2 samples"
        )
    return x, channel_axis, size


def _apart(running: tuple[Array, Array], others: dict[str, Any]) -> None:
    """The copies that the parts move would hide what the vectors themselves overlap."""
    for vector, name in zip(running, ("running_mean", "running_var"), strict=True):
        for other_name, other in others.items():
            if isinstance(other, np.ndarray) and _args._share(vector, other):
                raise ValueError(f"{name} shares memory with {other_name}, expected separate arrays")


def _by_part(value: object, name: str, parts: int, channels: int) -> Array:
    expected = f"a float32 or float64 array of shape ({parts}, {channels}), a row for each part of x"
    v = _args._ndarray(value, name, expected)
    if v.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} has dtype {v.dtype}, expected {expected}")
    if v.shape != (parts, channels):
        raise ValueError(f"{name} has shape {v.shape}, expected {expected}")
    return v


def _writes_parts(y: Array, x: Array, axis: int, size: int) -> bool:
    """Whether the functions can write parts of y; if samples lie innermost, they cannot."""
    part, of_x = y[:size], x[:size]
    together = [of_x, part] if _core.has_view([of_x], axis) else [part]
    return _core.has_view(together, axis)


def _destination(
    value: object, name: str, needed: bool, x: Array, in_place_of: dict[str, Array], apart: dict[str, Array]
) -> Array | None:
    """Where a gradient of x's shape goes."""
    if value is None:
        return _core.new_like(x) if needed else None
    if not needed:
        gradient = "dx" if name == "out" else "dresidual"
        raise ValueError(
            f"{name} is given but needs does not contain {gradient!r}, which it would receive; drop one of "
            f"them"
        )
    return _args._output(value, name, x, in_place_of, apart)
