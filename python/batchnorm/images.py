"""Preprocessing of integer images: ``(x / max_value - mean) / std`` and a change of layout, in one pass."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from . import _core
from ._arrays import dask_of, is_masked, per_task
from .functional import batch_norm
from .moments import array_of, unit
from .settings import kind, real, word
from .typing import Array, Vector

__all__ = ["normalize_images"]

ImageFormatName = Literal["NHWC", "NCHW"]

CHANNEL_AXES = {"NHWC": -1, "NCHW": -3}
GREY = {"NHWC": "x[..., None]", "NCHW": "x[..., None, :, :]"}  # grey images with a channel axis
_DTYPES = tuple(map(np.dtype, ("uint8", "int16", "uint16")))
_MOST = sys.float_info.max
_TINY = 1e-300  # whose reciprocal is a float64
_SLACK = 1.001  # how far beyond its bound a statistic may be, for rounding


@_core.entrance
def normalize_images(
    x: Array, mean: Sequence[float] | Array, std: Sequence[float] | Array, *, max_value: float | None = None,
    data_format: ImageFormatName = "NHWC", out_format: ImageFormatName = "NCHW",
    dtype: DTypeLike | None = None, num_threads: int | None = None, out: Array | None = None,
) -> Array:  # fmt: skip
    """Preprocess images in one pass: ``(x / max_value - mean) / std``, pixels to planes.

    Parameters
    ----------
    x : array of uint8, int16 or uint16, shape (N, H, W, C), or (H, W, C) for one image
        Any strides: crops and memory-mapped files are welcome. With ``data_format="NCHW"`` (N, C, H, W) or
        (C, H, W). Or a Dask array of these; the result is then one, made block by block when it is computed.
    mean, std : sequence of C floats, or array of real numbers of shape (C,)
        In units of the scaled image, where ``max_value`` is 1: ``[0.485, 0.456, 0.406]`` and ``[0.229, 0.224,
        0.225]`` of ImageNet, or what ``dataset_moments(..., max_value=255)`` gives of images of your own.
        Finite; ``std > 0``. Statistics that no image of this dtype can have are an error.
    max_value : float, optional
        The value that becomes 1, so at least 1; absent means the largest of the dtype: 255, 32767, 65535.
        Pass 1 for ``mean`` and ``std`` in units of the pixels.
    data_format, out_format : "NHWC" or "NCHW"
        Layout of ``x`` and of the result.
    dtype : dtype, optional
        Of the result: float32 (also if absent), float64, float16 or bfloat16.
    num_threads : int, optional
        As in :func:`batch_norm`.
    out : array, optional
        Receives the result; of its shape and dtype, not overlapping ``x``.

    Returns
    -------
    array of `dtype`, shape (N, C, H, W) or (C, H, W)
        ``(N, H, W, C)`` or ``(H, W, C)`` with ``out_format="NHWC"``. ``out`` if it was given.

    Raises
    ------
    TypeError
        An argument of the wrong kind or dtype, among them floating images: scale those with
        :func:`batch_norm`.
    ValueError
        A wrong shape or value, an unknown format. A mean beyond the least or the largest value of the dtype,
        or a standard deviation beyond that of a sample of these two, their distance over the square root of
        2, all over ``max_value``: with uint8 and 255 a mean outside [0, 1] or a ``std`` above 0.71.

    See Also
    --------
    dataset_moments : Mean and standard deviation of a data set.

    Notes
    -----
    ``y = (x - max_value * mean) * (1 / (max_value * std))``, per-channel numbers and arithmetic in float64,
    rounded to `dtype` at the end (to 16 bits by way of float32). So the result is within half a unit in the
    last place, and 4e-16 of ``(|mean| + 1) / std``, of the exact one; the usual float32 steps lose some bits
    more. For another affine map, such as scaling alone, :func:`batch_norm` takes integers, too.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> photos = np.full((8, 32, 48, 3), 128, np.uint8)
    >>> y = batchnorm.normalize_images(photos, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    >>> y.shape, y.dtype
    ((8, 3, 32, 48), dtype('float32'))
    """
    expected = word(*CHANNEL_AXES)
    from_axis = CHANNEL_AXES[expected("data_format", data_format)]
    to_axis = CHANNEL_AXES[expected("out_format", out_format)]
    if dask_of(x) is not None:
        options: dict[str, Any] = {"max_value": max_value, "data_format": data_format, "dtype": dtype}
        return _normalize_lazily(x, mean, std, out, num_threads, out_format=out_format, **options)
    images = _images(array_of(x), max_value, data_format, to_axis, "batch_norm")
    channels, info = images.shape[from_axis], np.iinfo(images.dtype)
    if channels == 0:
        raise ValueError(f"x has shape {images.shape} with 0 channels ({data_format}), expected at least 1")
    top = float(info.max) if max_value is None else unit(max_value, images.dtype)
    m, s = (_per_channel(name, v, images, data_format) for name, v in (("mean", mean), ("std", std)))
    low, high = info.min / top, info.max / top
    of_mean = "mean", m, low, high, f"{low:.6g} to"
    of_std = "std", s, max(_TINY / top, math.ulp(0)), (high - low) / math.sqrt(2), "more than 0, up to"
    for name, values, least, most, beyond in (of_mean, of_std):
        bad = ~((least <= values) & (values <= most * _SLACK))
        if bad.any():
            raise ValueError(
                f"{name} is {values[bad][0]:g} at channel {bad.argmax()}, expected {beyond} {most:.6g}, as "
                f"{images.dtype} over {top:g} is within {low:.6g} and {high:.6g}; take the statistics with "
                f"dataset_moments(..., max_value={top:g}), or pass max_value=1 for those of the pixels"
            )
    if out is not None:
        shape = list(images.shape)
        shape.insert(images.ndim + to_axis, shape.pop(from_axis))
        _check_out(out, tuple(shape))
    one = None if images.ndim == 3 else slice(None)  # an axis of length 1 for one image, or x as it is
    y = batch_norm(
        images[one], m * top, np.ones(channels), 1 / (s * top), eps=0.0, channel_axis=4 + from_axis,
        out_format=out_format, dtype=dtype, num_threads=num_threads,
        out=out if out is None else out[one],
    )  # fmt: skip
    return out if out is not None else y[0] if one is None else y


def _normalize_lazily(
    x: Any, mean: Any, std: Any, out: Any, num_threads: int | None, **options: Any
) -> Array:
    """The same of a Dask array, lazily."""
    from .dask import blocks_of, channels_of, mapped

    options["num_threads"] = per_task(num_threads)
    x = blocks_of("x", x)
    if out is not None:
        raise TypeError("out is given and x is a Dask array, whose result is one: drop out, and store() it")
    from_axis, to_axis = (CHANNEL_AXES[options[name]] for name in ("data_format", "out_format"))
    like = np.broadcast_to(np.zeros((), x.dtype), [0 if np.isnan(n) else int(n) for n in x.shape])
    _images(like, options["max_value"], options["data_format"], to_axis, "batchnorm.dask.batch_norm")
    (channel,) = channels_of(x, {"channel_axis": from_axis})
    empty = 1 if channel == 0 else 0
    normalize_images(like.take([], axis=empty), mean, std, **options)  # for its errors
    operands = {name: (np.array(v), (channel,)) for name, v in (("mean", mean), ("std", std))}
    order = [a for a in range(x.ndim) if a != channel]
    order.insert(x.ndim + to_axis, channel)
    result: Array = mapped(x, (channel,), partial(normalize_images, **options), operands, tuple(order))
    return result


def _images(x: Any, max_value: float | None, data_format: str, to_axis: int, function: str) -> Array:
    """x, if it is images; else an error with what to do instead, by `function` with floats."""
    expected, from_axis = "uint8, int16 or uint16", CHANNEL_AXES[data_format]
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x is {kind(x)}, expected an array of {expected}")
    moved = "{}" if from_axis == to_axis else f"numpy.moveaxis({{}}, {from_axis}, {to_axis})"
    if is_masked(x):
        use = f"pass x.data for y, and then set y[{moved.format('numpy.ma.getmaskarray(x)')}] = 0"
        raise TypeError(f"x is {kind(x)}, expected an array of {expected} without a mask; {use}")
    if x.ndim not in (3, 4):
        hint = f"; use {GREY[data_format]} for grey images" * (x.ndim == 2)
        raise ValueError(f"x has shape {x.shape}, expected 4 dimensions, or 3 for one image{hint}")
    if x.dtype not in _DTYPES:
        hint = _instead(x, max_value, moved, to_axis, function)
        raise TypeError(f"x has dtype {x.dtype}, expected {expected}{hint}")
    return x


def _check_out(out: Any, shape: tuple[int, ...]) -> None:
    """What the core says of it, in the words of one image where x is one."""
    if not isinstance(out, np.ndarray) or is_masked(out):
        got = "a masked array" if is_masked(out) else kind(out)
        raise TypeError(f"out is {got}, expected a writable ndarray of shape {shape}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, expected {shape}, as x has in out_format")
    if not out.flags.writeable:
        raise ValueError(f"out is read-only, expected a writable array of shape {shape}")


def _instead(x: Array, max_value: float | None, moved: str, axis: int, function: str) -> str:
    """What to do with numbers of another dtype."""
    if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
        return "; pass x.astype of one that holds its values, and max_value, the value that becomes 1"
    called = moved.format("x" if x.dtype.isnative and x.itemsize <= 8 else "x.astype(numpy.float64)")
    scale = "" if max_value is None else f" * {max_value}"
    statistics = f"numpy.array(mean, float){scale}, (numpy.array(std, float){scale})**2"
    return f"; use {function}({called}, {statistics}, eps=0, channel_axis={axis})"


def _per_channel(name: str, value: Any, x: Array, data_format: str) -> Vector:
    """A sequence of numbers or an array, as float64."""
    channels = x.shape[CHANNEL_AXES[data_format]]
    if isinstance(value, list | tuple):
        value = np.array([real(name, v, -_MOST, _MOST, "finite numbers") for v in value])
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        hint = f"; use [{value}]" if isinstance(value, int | float) and channels == 1 else ""
        shown = f"of dtype {value.dtype}" if isinstance(value, np.ndarray) else kind(value)
        raise TypeError(f"{name} is {shown}, expected a sequence of {channels} floats, one per channel{hint}")
    if value.shape != (channels,):
        hint = f"; for grey images use {GREY[data_format]}" * (value.size == 1 and x.ndim == 3)
        what = f"({channels},), one per channel of x {x.shape} in {data_format}"
        raise ValueError(f"{name} has shape {value.shape}, expected {what}{hint}")
    return value.astype(np.float64)
