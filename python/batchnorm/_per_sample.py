"""A scale and shift for every sample: gamma or beta of shape [N, C], as conditional batch norm makes them.

The statistics are those of the whole batch. Where samples and channels lie side by side in memory, the
elementwise passes take every channel of every sample as a channel of its own, else sample by sample. Called
by the functions of ``_functional`` for a gamma or beta of that shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _args, _core, _functional, _running

Array = NDArray[Any]


def asked(x: Any, gamma: Any, beta: Any, axis: Any, data_format: Any) -> bool:
    """Whether gamma or beta has a row for each sample of x."""
    if not isinstance(x, np.ndarray) or x.ndim < 2:
        return False
    if not any(isinstance(v, np.ndarray) and v.ndim == 2 for v in (gamma, beta)):
        return False
    channel_axis = _args._axis_of(x, axis, data_format) % x.ndim
    shape = (x.shape[0], x.shape[channel_axis])
    return channel_axis != 0 and any(isinstance(v, np.ndarray) and v.shape == shape for v in (gamma, beta))


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """`function` of its `arguments` by name, of which gamma or beta, or both, have shape [N, C]."""
    known = inspect.signature(function).parameters
    options = {name: value for name, value in arguments.items() if name in known and name != "unknown"}
    for name in ("weights", "mask", "lengths", "lengths_axis"):
        if options.pop(name, None) is not None:
            raise ValueError(
                f"{name} is given together with gamma or beta of shape (N, C), which are not served "
                f"together; drop {name}, or give gamma and beta of shape (C,)"
            )
    serve: dict[str, Callable[..., Any]] = {
        "batch_norm": _inference,
        "batch_norm_train": _training,
        "batch_norm_backward": _backward,
    }
    return serve[function.__name__](**options)


class _Affine:
    """gamma or beta, checked: a row per sample, one row for all, or none."""

    def __init__(self, value: Any, name: str, x: Array, axis: int, default: float) -> None:
        self.given = value
        samples, channels = x.shape[0], x.shape[axis]
        if isinstance(value, np.ndarray) and value.ndim == 2:
            expected = f"({samples}, {channels}) or ({channels},) for x of shape {x.shape}"
            if value.shape != (samples, channels):
                raise ValueError(f"{name} has shape {value.shape}, expected {expected}")
            flat = _args._vector(np.ascontiguousarray(value).reshape(-1), name)
            if not np.isfinite(flat).all():
                sample, channel = divmod(int(np.flatnonzero(~np.isfinite(flat))[0]), channels)
                raise ValueError(
                    f"{name} is {value[sample, channel]} at sample {sample}, channel {channel}, expected "
                    f"finite values"
                )
            self.rows = flat.reshape(samples, channels)
        elif value is None:
            self.rows = np.full((1, channels), default, np.float64)
        else:
            self.rows = _args._per_channel(value, name, x, axis)[None]
        self.wide = np.broadcast_to(self.rows, (samples, channels)).astype(np.float64)

    def gradient(self, sums: Array, other: _Affine, x: Array) -> Array:
        """Sums [N, C] in the parameter's shape and type."""
        known = self.given if self.given is not None else other.given
        wide = x.dtype == np.float64 if known is None else known.dtype == np.float64
        per_sample = self.given is not None and self.given.ndim == 2
        return (sums if per_sample else sums.sum(axis=0)).astype(np.float64 if wide else np.float32)


class _Parts:
    """How tensors and per-channel numbers are cut so that each part has one scale and shift per channel."""

    def __init__(self, axis: int, *tensors: Array | None) -> None:
        present = [a for a in tensors if a is not None]
        self.axis = axis
        self.samples, self.channels = present[0].shape[0], present[0].shape[axis]
        self.merged = axis == 1 and all(
            a.shape[0] == 1 or self.channels == 1 or a.strides[0] == self.channels * a.strides[1]
            for a in present
        )

    def __iter__(self) -> Iterator[int]:
        return iter(range(1 if self.merged else self.samples))

    def tensor(self, a: Array, i: int) -> Array:
        if not self.merged:
            return a[i : i + 1]
        return a.reshape(1, self.samples * self.channels, *a.shape[2:])  # a view

    def optional(self, a: Array | None, i: int) -> Array | None:
        return None if a is None else self.tensor(a, i)

    def numbers(self, rows: Array, i: int) -> Array:
        """Of [N, C] numbers per sample, or (C,) for all."""
        every = np.broadcast_to(rows, (self.samples, self.channels))
        return np.ascontiguousarray(every.reshape(-1) if self.merged else every[i])

    def bits(self, activation_mask: Array | None, i: int) -> Array | None:
        if activation_mask is None or self.merged:
            return activation_mask
        return np.split(activation_mask, self.samples)[i]


def _mask_for(parts: _Parts, x: Array) -> Array:
    """Zeros for the activation_mask of all parts, one after the other."""
    sizes = [_functional.activation_mask_bytes(parts.tensor(x, i), axis=parts.axis) for i in parts]
    return np.zeros(sum(sizes), np.uint8)


def _apply(
    x: Array, mean: Array, var: Array, gamma: _Affine, beta: _Affine, axis: int, out: Array | None,
    residual: Array | None, activation_mask: Array | None, parts: _Parts, **options: Any,
) -> Array:  # fmt: skip
    y: Array = _core.new_like(x) if out is None else out
    for i in parts:
        _functional.batch_norm(
            parts.tensor(x, i), parts.numbers(mean, i), parts.numbers(var, i), parts.numbers(gamma.rows, i),
            parts.numbers(beta.rows, i), axis=axis, residual=parts.optional(residual, i),
            out=parts.tensor(y, i), activation_mask=parts.bits(activation_mask, i), **options,
        )  # fmt: skip
    return y


def _inference(
    x: Any, mean: Any, var: Any, gamma: Any, beta: Any, *, eps: Any, axis: Any, data_format: Any,
    residual: Any, activation_mask: Any, out: Any, **options: Any,
) -> Array:  # fmt: skip
    checked = _args.inference(
        x, mean, var, None, None, eps, axis, data_format, options["activation"], options["slope"], residual,
        None, options["num_threads"], out,
    )  # fmt: skip
    x, mean, var, axis, residual = (
        checked[0],
        checked[1],
        checked[2],
        checked[6] % checked[0].ndim,
        checked[9],
    )
    scale, shift = _Affine(gamma, "gamma", x, axis, 1), _Affine(beta, "beta", x, axis, 0)
    if x.size == 0:
        return np.empty_like(x) if out is None else out
    parts = _Parts(axis, x, residual, out)
    return _apply(x, mean, var, scale, shift, axis, out, residual, activation_mask, parts, eps=eps, **options)


def _training(
    x: Any, gamma: Any, beta: Any, *, running_mean: Any, running_var: Any, decay: Any, running_ddof: Any,
    eps: Any, axis: Any, data_format: Any, residual: Any, out: Any, **options: Any,
) -> Any:  # fmt: skip
    checked = _args.training(
        x, None, None, running_mean, running_var, decay, running_ddof, eps, axis, data_format,
        options["activation"], options["slope"], residual, options["num_threads"], out,
    )  # fmt: skip
    x, axis, residual = checked[0], checked[8] % checked[0].ndim, checked[11]
    scale, shift = _Affine(gamma, "gamma", x, axis, 1), _Affine(beta, "beta", x, axis, 0)
    mean, var = _functional.moments(x, axis=axis, num_threads=options["num_threads"])
    inv_std = 1 / np.sqrt(var + eps)
    y = np.empty_like(x) if out is None else out
    bits = None
    if x.size:
        parts = _Parts(axis, x, residual, out)
        if residual is not None and options["activation"] in _args.PIECEWISE_LINEAR:
            bits = _mask_for(parts, x)
        y = _apply(x, mean, var, scale, shift, axis, out, residual, bits, parts, eps=eps, **options)
        if running_mean is not None:
            _running.update_running(
                running_mean,
                running_var,
                mean,
                var,
                decay=decay,
                count=x.size // x.shape[axis],
                ddof=running_ddof,
            )
    result = (y, mean, inv_std)
    return _functional.TrainResult(*result) if bits is None else _functional._with_mask((*result, bits))


def _backward(
    dy: Any, x: Any, mean: Any, inv_std: Any, gamma: Any, beta: Any, *, axis: Any, data_format: Any,
    stats: Any, activation: Any, slope: Any, activation_mask: Any, residual: Any, needs: Any,
    num_threads: Any, out: Any, out_residual: Any, **options: Any,
) -> Any:  # fmt: skip
    checked = _args.backward(
        dy, x, mean, inv_std, None, None, axis, data_format, stats, None, None, None, None, needs,
        num_threads, out, out_residual,
    )  # fmt: skip
    dy, x, mean, inv_std, axis = checked[0], checked[1], checked[2], checked[3], checked[6] % checked[1].ndim
    scale, shift = _Affine(gamma, "gamma", x, axis, 1), _Affine(beta, "beta", x, axis, 0)
    need_dx, need_dgamma, need_dbeta, need_dresidual = _args.check_needs(needs)
    activation = _args.check_activation(activation)
    slope = _args.check_slope(slope, activation, x.dtype)
    z = _args._backward_residual(residual, x, activation, activation_mask, need_dresidual)
    if z is not None and any(o is not None and _args._share(o, z) for o in (out, out_residual)):
        z = z.copy()  # a sample of it is read when another may have been written over it
    shape = (x.shape[0], x.shape[axis])
    dgamma, dbeta, dx, dz = np.zeros(shape), np.zeros(shape), None, None
    if need_dx:
        dx = _core.new_like(x) if out is None else out
    if need_dresidual:
        dz = _core.new_like(x) if out_residual is None else out_residual
    if x.size:
        parts = _Parts(axis, x, dy, dx, dz, z)

        def each(i: int, wanted: tuple[str, ...], dy: Array, gated: bool = False, **outputs: Any) -> Any:
            gate: dict[str, Any] = {}
            if not gated:
                gate = {"activation": activation, "slope": slope, "residual": parts.optional(z, i)}
                gate["activation_mask"] = parts.bits(activation_mask, i)
            return _functional.batch_norm_backward(
                parts.tensor(dy, i), parts.tensor(x, i), parts.numbers(mean, i), parts.numbers(inv_std, i),
                parts.numbers(scale.wide, i), parts.numbers(shift.wide, i), axis=axis, stats="fixed",
                needs=wanted, num_threads=num_threads, **gate, **outputs, **options,
            )  # fmt: skip

        for i in parts if need_dgamma or need_dbeta or (need_dx and stats == "batch") else ():
            sums = each(i, ("dgamma", "dbeta"), dy)
            rows = slice(None) if parts.merged else slice(i, i + 1)
            dgamma[rows], dbeta[rows] = (v.reshape(-1, shape[1]) for v in (sums.dgamma, sums.dbeta))
        inside = dy
        gated = activation_mask is not None or z is not None
        if gated and (dz is not None or (dx is not None and stats == "batch")):
            inside = _core.new_like(x) if dz is None else dz  # dy behind the activation
            for i in parts:
                each(i, ("dresidual",), dy, out_residual=parts.tensor(inside, i))
        elif dz is not None:
            np.copyto(dz, dy)
        if dx is not None and stats == "fixed":
            for i in parts:
                each(i, ("dx",), inside, gated=inside is not dy, out=parts.tensor(dx, i))
        elif dx is not None:
            act = None if gated or activation is None else (activation, slope)
            _dx(inside, x, mean, inv_std, scale, shift, dgamma, dbeta, act, parts, num_threads, dx)
    gradients = (
        dx,
        scale.gradient(dgamma, shift, x) if need_dgamma else None,
        shift.gradient(dbeta, scale, x) if need_dbeta else None,
    )
    return _functional.Gradients(*gradients) if dz is None else _functional._with_dresidual((*gradients, dz))


def _dx(
    dy: Array, x: Array, mean: Array, inv_std: Array, gamma: _Affine, beta: _Affine, dgamma: Array,
    dbeta: Array, act: tuple[str, float | None] | None, parts: _Parts, num_threads: int | None, out: Array,
) -> None:  # fmt: skip
    """dx = inv_std (gamma dy - sum gamma dy / n - x_hat sum gamma dy x_hat / n), gamma that of the sample."""
    n, s = x.size // parts.channels, inv_std.astype(np.float64)
    k_x = -s * s * (gamma.wide * dgamma).sum(axis=0) / n
    k_0 = -s * (gamma.wide * dbeta).sum(axis=0) / n
    for i in parts:
        gate = None
        if act is not None:
            gate = (
                act[0], parts.numbers(s, i), parts.numbers(gamma.wide, i), parts.numbers(beta.wide, i),
                act[1],
            )  # fmt: skip
        _core.combine(
            parts.tensor(dy, i), parts.tensor(x, i), parts.numbers(gamma.wide * s, i), parts.numbers(mean, i),
            parts.numbers(k_x, i), parts.numbers(k_0, i), parts.axis, gate, num_threads, parts.tensor(out, i),
        )  # fmt: skip
