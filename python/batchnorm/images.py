"""Preprocessing of integer images: ``(x / max_value - mean) / std`` and a change of layout, in one pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import DTypeLike

from ._hints import refuse_keywords
from .functional import batch_norm
from .moments import POSITIVE
from .settings import kind, real, word
from .typing import Array, Vector

__all__ = ["normalize_images"]

ImageFormatName = Literal["NHWC", "NCHW"]

_CHANNEL_AXES = {"NHWC": -1, "NCHW": -3}
_DTYPES = (np.uint8, np.int16, np.uint16)
_MOST = sys.float_info.max
_TINY = 1e-300  # whose reciprocal is a float64
# How far beyond its bound a standard deviation may be: that of a sample of n divides by n - 1.
_SLACK = 1.001


def normalize_images(
    x: Array, mean: Sequence[float] | Array, std: Sequence[float] | Array, *, max_value: float | None = None,
    data_format: ImageFormatName = "NHWC", out_format: ImageFormatName = "NCHW",
    dtype: DTypeLike | None = None, num_threads: int | None = None, out: Array | None = None,
    **unknown: NoReturn,
) -> Array:  # fmt: skip
    """Preprocess images in one pass: ``(x / max_value - mean) / std``, pixels to planes.

    Parameters
    ----------
    x : array of uint8, int16 or uint16, shape (N, H, W, C), or (H, W, C) for one image
        Any strides: crops and memory-mapped files are welcome. With ``data_format="NCHW"`` (N, C, H, W) or
        (C, H, W).
    mean, std : sequence of C floats, or array of real numbers of shape (C,)
        In units of the scaled image, where ``max_value`` is 1: ``[0.485, 0.456, 0.406]`` and ``[0.229, 0.224,
        0.225]`` of ImageNet, or what ``dataset_moments(..., max_value=255)`` gives of images of your own.
        Finite; ``std > 0``. Statistics that no image of this dtype can have are an error.
    max_value : float, optional
        The value that becomes 1; absent means the largest of the dtype: 255, 32767, 65535. Pass 1 for
        ``mean`` and ``std`` in units of the pixels.
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
        or a standard deviation of more than half their distance, all over ``max_value``: with uint8 and 255 a
        mean outside [0, 1] or a ``std`` above 0.5.

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
    if unknown:
        refuse_keywords("normalize_images", unknown, normalize_images.__kwdefaults__)
    images, expected = _images(x), word(*_CHANNEL_AXES)
    from_axis = _CHANNEL_AXES[expected("data_format", data_format)]
    expected("out_format", out_format)
    channels, info = images.shape[from_axis], np.iinfo(images.dtype)
    if channels == 0:
        raise ValueError(f"x has shape {images.shape} with 0 channels ({data_format}), expected at least 1")
    top = float(info.max) if max_value is None else real("max_value", max_value, *POSITIVE)
    m, s = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    low, high = info.min / top, info.max / top
    of_mean = "mean", m, low, high, f"{low:.6g} to"
    of_std = "std", s, _TINY / top, (high - low) / 2, "more than 0, up to"
    for name, values, least, most, beyond in (of_mean, of_std):
        bad = ~((least <= values) & (values <= most * _SLACK))
        if bad.any():
            raise ValueError(
                f"{name} is {values[bad][0]:g} at channel {bad.argmax()}, expected {beyond} {most:.6g}, as "
                f"{images.dtype} over {top:g} is within {low:.6g} and {high:.6g}; take the statistics with "
                f"dataset_moments(..., max_value={top:g}), or pass max_value=1 for those of the pixels"
            )
    one = None if images.ndim == 3 else slice(None)  # an axis of length 1 for one image, or x as it is
    y = batch_norm(
        images[one], m * top, np.ones(channels), 1 / (s * top), eps=0.0, channel_axis=4 + from_axis,
        out_format=out_format, dtype=dtype, num_threads=num_threads,
        out=out[one] if isinstance(out, np.ndarray) else out,
    )  # fmt: skip
    return out if out is not None else y[0] if one is None else y


def _images(x: object) -> Array:
    expected = "uint8, int16 or uint16"
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"x is {kind(x)}, expected an array of {expected}")
    if x.dtype not in _DTYPES:
        floating = x.dtype.kind == "f" or x.dtype.name == "bfloat16"
        hint = "; normalise floating images with batch_norm(x, mean, std**2, eps=0)" * floating
        raise TypeError(f"x has dtype {x.dtype}, expected {expected}{hint}")
    if x.ndim not in (3, 4):
        hint = "; use x[..., None] for grey images" * (x.ndim == 2)
        raise ValueError(f"x has shape {x.shape}, expected 4 dimensions, or 3 for one image{hint}")
    return x


def _per_channel(name: str, value: Any, channels: int) -> Vector:
    """A sequence of numbers or an array, as float64."""
    if isinstance(value, list | tuple):
        value = np.array([real(name, v, -_MOST, _MOST, "finite numbers") for v in value])
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        hint = f"; use [{value}]" if isinstance(value, int | float) and channels == 1 else ""
        shown = f"of dtype {value.dtype}" if isinstance(value, np.ndarray) else kind(value)
        raise TypeError(f"{name} is {shown}, expected a sequence of {channels} floats, one per channel{hint}")
    if value.shape != (channels,):
        raise ValueError(f"{name} has shape {value.shape}, expected ({channels},), one per channel of x")
    return value.astype(np.float64)
