"""Integer images: ``batch_norm`` of uint8, int16 and uint16, and preprocessing on top of it.

``batch_norm`` in ``_functional`` hands integer ``x`` to `batch_norm_integers`; `normalize_images` is the
whole of ``(x / 255 - mean) / std`` with a change of layout, in one pass over the pixels.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _args, _core

__all__ = ["normalize_images"]

Array = NDArray[Any]

FloatName = Literal["float32", "float64", "float16", "bfloat16"]
ImageFormatName = Literal["NHWC", "NCHW"]

_FLOATS = "float32, float64, float16 or bfloat16"
_FLOAT32 = np.dtype(np.float32)
_PLAIN: dict[type, np.dtype[Any]] = {
    np.float32: _FLOAT32,
    np.float16: np.dtype(np.float16),
    np.float64: np.dtype(np.float64),
}
_CHANNEL_AXES = {"NHWC": -1, "NCHW": -3}
_LARGEST = {np.dtype(t): float(np.iinfo(t).max) for t in (np.uint8, np.int16, np.uint16)}


# ---- batch_norm --------------------------------------------------------------------------------------------


def has_integers(x: object) -> bool:
    """Whether x is an array of integers or bools, of which some are images."""
    return isinstance(x, np.ndarray) and x.dtype.kind in "iub"


def _result_dtype(dtype: object, out: object) -> np.dtype[Any]:
    """The dtype of the result: what is asked for, or out's, or float32."""
    if dtype is None:
        return out.dtype if isinstance(out, np.ndarray) else _FLOAT32
    if isinstance(dtype, type) and dtype in _PLAIN:
        return _PLAIN[dtype]
    try:
        result = np.dtype(dtype)  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(f"dtype is {_args._kind(dtype)}, expected {_FLOATS}") from None
    return _floating(result, f"dtype is {result}")


def _floating(dtype: np.dtype[Any], found: str) -> np.dtype[Any]:
    if (dtype in _PLAIN.values() and dtype.isnative) or _args._is_bfloat16(dtype):
        return dtype
    raise TypeError(f"{found}, expected {_FLOATS}")


def _result_axis(out_format: object, x: Array, axis: int) -> int:
    """The channel axis of the result, counted from 0; x's is `axis`."""
    if out_format is None:
        return axis
    if not isinstance(out_format, str) or out_format not in _args.DATA_FORMATS:
        expected = f"None or one of {', '.join(_args.DATA_FORMATS)}"
        if not isinstance(out_format, str):
            raise TypeError(f"out_format is {_args._kind(out_format)}, expected {expected}")
        close = difflib.get_close_matches(out_format.lower(), _args.DATA_FORMATS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"out_format is {out_format!r}, expected {expected}{hint}")
    rank, channel_axis = _args.DATA_FORMATS[out_format]
    if rank is not None and x.ndim != rank:
        raise ValueError(
            f"out_format is {out_format!r}, which needs {rank} dimensions, but x has shape {x.shape}"
        )
    return channel_axis % x.ndim


def keep_like_x(x: object, axis: object, data_format: object, dtype: object, out_format: object) -> None:
    """For floating x: `dtype` and `out_format` may only say what the result is anyway."""
    x, axis = _args._input(x, axis, data_format, integers=True)
    if dtype is not None and _result_dtype(dtype, None) != x.dtype:
        raise ValueError(
            f"dtype is {_result_dtype(dtype, None)} and x has dtype {x.dtype}, expected None or x's own: "
            f"only integers change their type; drop dtype= and convert the result"
        )
    if out_format is not None and _result_axis(out_format, x, axis % x.ndim) != axis % x.ndim:
        raise ValueError(
            f"out_format is {out_format!r} and the channels of x {x.shape} are on axis {axis}, expected "
            f"None or x's own: only integers change their layout; drop out_format= and use numpy.moveaxis"
        )


def batch_norm_integers(
    x: object,
    mean: object,
    var: object,
    gamma: object,
    beta: object,
    eps: object,
    axis: object,
    data_format: object,
    num_threads: object,
    out: object,
    dtype: object,
    out_format: object,
    **absent: object,
) -> Array:
    """`batch_norm` of integer x, or the error that explains. `absent` are options that it does not have."""
    image, from_axis = _args._input(x, axis, data_format, integers=True)
    for name, value in absent.items():
        if value is not None:
            raise ValueError(
                f"{name} is given and x has dtype {image.dtype}, expected None: images are normalised and "
                f"nothing else; drop it or use x.astype(numpy.float32)"
            )
    from_axis %= image.ndim
    to_axis = _result_axis(out_format, image, from_axis)
    return _normalised(image, mean, var, gamma, beta, eps, from_axis, to_axis, num_threads, out, dtype)


def _normalised(
    image: Array,
    mean: object,
    var: object,
    gamma: object,
    beta: object,
    eps: object,
    from_axis: int,
    to_axis: int,
    num_threads: object,
    out: object,
    dtype: object,
) -> Array:
    """The channels of an image, which is checked, moved from one axis to another, both counted from 0."""
    kind = _result_dtype(dtype, out)
    if not isinstance(out, np.ndarray) or out.dtype == kind:
        y = _core.batch_norm_integers(
            image, mean, var, gamma, beta, eps, from_axis, to_axis, kind, num_threads, out, False, False
        )
        if y is not None:
            return y
    m, v = _args._given_statistics(mean, var, image, from_axis)
    g, b = _args._affine(gamma, beta, image, from_axis)
    numbers_ = _args.check_eps(eps), from_axis, to_axis, kind
    threads = _args._threads(num_threads)
    y = None
    if out is not None:
        y = _output(
            out, kind, image, from_axis, to_axis, {"x": image, "mean": m, "var": v, "gamma": g, "beta": b}
        )
    for readable in _readable(image, y, from_axis, to_axis):
        result = _core.batch_norm_integers(readable, m, v, g, b, *numbers_, threads, y, True, False)
        if result is not None:
            return result
    assert y is not None
    raise ValueError(
        f"out has strides {y.strides} for shape {y.shape}, which cannot be written in one pass over memory "
        f"(channel axis {to_axis}); use a contiguous array, or leave out= away and assign, out[...] = result"
    )


def _readable(x: Array, y: Array | None, from_axis: int, to_axis: int) -> Any:
    """x, then copies of it whose memory suits: without gaps, and in the order of the result."""
    yield x
    yield _args._copy_like(x, x)
    shape = np.moveaxis(x, from_axis, to_axis).shape
    order = np.empty(shape, x.dtype) if y is None else np.empty_like(y, dtype=x.dtype)
    yield _args._copy_like(x, np.moveaxis(order, to_axis, from_axis))


def _output(
    out: object,
    kind: np.dtype[Any],
    x: Array,
    from_axis: int,
    to_axis: int,
    apart_from: dict[str, Array | None],
) -> Array:
    shape = np.moveaxis(x, from_axis, to_axis).shape
    expected = f"a writable {kind} array of shape {shape}"
    y = _args._ndarray(out, "out", expected)
    _floating(y.dtype, f"out has dtype {y.dtype if y.dtype.isnative else y.dtype.str}")
    if y.dtype != kind:
        raise TypeError(
            f"out has dtype {y.dtype} and dtype is {kind}; they say different things, drop dtype="
        )
    if y.shape != shape:
        moved = "" if from_axis == to_axis else f" with the channels on axis {to_axis}"
        raise ValueError(f"out has shape {y.shape}, expected {shape} as x has{moved}")
    return _args._output(y, "out", y, {}, apart_from)


# ---- normalize_images --------------------------------------------------------------------------------------


def normalize_images(
    x: Array,
    mean: Sequence[float] | Array,
    std: Sequence[float] | Array,
    *,
    max_value: float | None = None,
    data_format: ImageFormatName = "NHWC",
    out_format: ImageFormatName = "NCHW",
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
    out: Array | None = None,
    **unknown: NoReturn,
) -> Array:
    """Preprocess images in one pass: ``(x / max_value - mean) / std``, pixels to planes.

    Parameters
    ----------
    x : array of uint8, int16 or uint16, shape (N, H, W, C), or (H, W, C) for one image
        Any strides: crops and memory-mapped files are welcome. With ``data_format="NCHW"`` (N, C, H, W) or
        (C, H, W).
    mean, std : sequence of C floats, or array of float32 or float64 of shape (C,)
        In units of the scaled image, where ``max_value`` is 1: ``[0.485, 0.456, 0.406]`` and ``[0.229, 0.224,
        0.225]`` of ImageNet. Finite; ``std > 0``.
    max_value : float, optional
        The value that becomes 1; absent means the largest of the dtype: 255, 32767, 65535.
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
        A wrong shape or value, an unknown format.

    Notes
    -----
    ``y = (x - max_value * mean) * (1 / (max_value * std))``, per-channel numbers and arithmetic in float64,
    rounded to `dtype` at the end (to 16 bits by way of float32). So the result is within half a unit in the
    last place, and 4e-16 of ``(|mean| + 1) / std``, of the exact one; the usual float32 steps lose some bits
    more. :func:`batch_norm` takes integers, too, for statistics in units of the pixels, as :func:`moments`
    gives them.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> photos = np.full((8, 32, 48, 3), 128, np.uint8)
    >>> y = batchnorm.normalize_images(photos, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    >>> y.shape, y.dtype
    ((8, 3, 32, 48), dtype('float32'))
    """
    if unknown:
        _args.reject_keywords(normalize_images, unknown)
    image = _image(x)
    from_axis, to_axis = _format(data_format, "data_format"), _format(out_format, "out_format")
    channels, rank = image.shape[from_axis], image.ndim
    if channels == 0:
        raise ValueError(f"x has shape {image.shape} with 0 channels ({data_format}), expected at least 1")
    top = _LARGEST[image.dtype] if max_value is None else _positive(max_value)
    where = f"({channels},) to match x {image.shape}, {data_format}"
    m, s = _per_channel(mean, "mean", channels, where), _per_channel(std, "std", channels, where)
    for channel, value in enumerate(s):
        if not value > 0:
            raise ValueError(f"std is {value} at channel {channel}, expected values > 0")
    center = [value * top for value in m]
    scale = [1 / (value * top) if value * top else math.inf for value in s]
    for name, values, derived in (("mean", m, center), ("std", s, scale)):
        if not all(map(math.isfinite, derived)):
            channel = [math.isfinite(v) for v in derived].index(False)
            raise ValueError(
                f"{name} is {values[channel]} at channel {channel}, expected a value that float64 holds in "
                f"units of the pixels, {top:g} times as large"
            )
    if isinstance(out, np.ndarray):
        shape = list(image.shape)
        shape.insert(rank + to_axis, shape.pop(from_axis))
        if out.shape != tuple(shape):
            raise ValueError(
                f"out has shape {out.shape}, expected {tuple(shape)}, {out_format} of x {image.shape}"
            )
    batch, result = image, out
    if rank == 3:
        batch, result = image[None], out[None] if isinstance(out, np.ndarray) else out
    y = _normalised(
        batch, np.array(center), np.ones(channels), np.array(scale), None, 0.0, 4 + from_axis, 4 + to_axis,
        num_threads, result, dtype,
    )  # fmt: skip
    if out is not None:
        return out
    return y[0] if rank == 3 else y


def _image(x: object) -> Array:
    if type(x) is np.ndarray and x.dtype in _LARGEST and 3 <= x.ndim <= 4:
        return x
    image = _args._ndarray(x, "x", "an array of uint8, int16 or uint16")
    if image.dtype.kind == "f" or image.dtype.name == "bfloat16":
        raise TypeError(
            f"x has dtype {image.dtype}, expected uint8, int16 or uint16; normalise floating images with "
            f"batch_norm(x, mean, std**2, eps=0)"
        )
    if image.ndim not in (3, 4):
        hint = "; use x[..., None] for grey images" if image.ndim == 2 else ""
        raise ValueError(f"x has shape {image.shape}, expected 4 dimensions, or 3 for one image{hint}")
    return _args._tensor(image, "x", integers=True)


def _format(value: object, name: str) -> int:
    """The channel axis, counted from the end."""
    expected = " or ".join(map(repr, _CHANNEL_AXES))
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_args._kind(value)}, expected {expected}")
    if value not in _CHANNEL_AXES:
        hint = f"; did you mean {value.upper()!r}?" if value.upper() in _CHANNEL_AXES else ""
        raise ValueError(f"{name} is {value!r}, expected {expected}{hint}")
    return _CHANNEL_AXES[value]


def _positive(max_value: object) -> float:
    expected = "a finite number > 0, the value that becomes 1"
    value = _args._real(max_value, "max_value", expected)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"max_value is {value}, expected {expected}")
    return value


def _per_channel(value: object, name: str, channels: int, where: str) -> list[float]:
    """A sequence of numbers or an array, as floats."""
    expected = f"{channels} floats, one per channel"
    if isinstance(value, np.ndarray):
        v: list[float] = _args._vector(value, name).tolist()
    elif isinstance(value, list | tuple):
        v = [n if type(n) is float else _args._real(n, name, expected) for n in value]
    else:
        hint = f"; use [{value}]" if isinstance(value, numbers.Real) and channels == 1 else ""
        raise TypeError(f"{name} is {_args._kind(value)}, expected a sequence of {expected}{hint}")
    if len(v) != channels:
        raise ValueError(f"{name} has shape ({len(v)},), expected {where}")
    for channel, number in enumerate(v):
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number} at channel {channel}, expected finite values")
    return v
