"""Every check of a Python argument, and every message about one.

The functions call the extension first; it takes arguments that are exactly right and gives None for
anything else, untouched. Only then is this module asked. `inference`, `training`, `backward` and
`statistics` either raise the error that explains, or return the arguments in a form the extension takes:
names resolved, numbers made plain, and arrays that are only read copied where their memory does not allow a
direct view. Arrays that are written are never copied.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from . import _core

Array = NDArray[Any]

ActivationName = Literal["relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"]
DataFormatName = Literal[
    "NC", "NCL", "NLC", "NCHW", "NHWC", "NCDHW", "NDHWC", "channels_first", "channels_last"
]
ACTIVATIONS: tuple[str, ...] = get_args(ActivationName)
# Those of which one bit per element tells backward enough.
PIECEWISE_LINEAR = ("relu", "leaky_relu", "relu6")
DEFAULT_SLOPE = 0.01
_TOO_LARGE_FOR_FLOAT32 = 2.0**128 - 2.0**103  # rounds to infinity from here on
GRADIENTS = ("dx", "dgamma", "dbeta")
NEEDS = (*GRADIENTS, "dresidual")

# data_format: (rank it needs or None, channel axis)
DATA_FORMATS: dict[str, tuple[int | None, int]] = {
    "NC": (2, 1),
    "NCL": (3, 1),
    "NLC": (3, -1),
    "NCHW": (4, 1),
    "NHWC": (4, -1),
    "NCDHW": (5, 1),
    "NDHWC": (5, -1),
    "channels_first": (None, 1),
    "channels_last": (None, -1),
}


class _DefaultAxis(int):
    """The axis 1 that nobody asked for: an int, but told from a caller's own 1 by identity."""


DEFAULT_AXIS = _DefaultAxis(1)


# ---- options -----------------------------------------------------------------------------------------------


def _kind(value: object) -> str:
    """What a value is, for a message: its type, and for short plain values the value."""
    if value is None:
        return "None"
    module = type(value).__module__.partition(".")[0]
    name = type(value).__name__ if module == "builtins" else f"{module}.{type(value).__name__}"
    if isinstance(value, str | int | float | complex | bool | np.generic):
        text = repr(value)
        return f"{text if len(text) <= 40 else text[:40] + '...'} ({name})"
    return f"of type {name}"


_MODES = "use batch_norm_train or batch_norm; a BatchNorm has train() and eval()"
# Keywords of other libraries, and what to write here instead.
_FOREIGN = {
    "affine": "leave gamma and beta away (functions), or pass scale=False, center=False (BatchNorm)",
    "weight": "it is called gamma here",
    "bias": "it is called beta here",
    "offset": "it is called beta here",
    "variance": "it is called var here",
    "moving_mean": "it is called running_mean here",
    "moving_variance": "it is called running_var here",
    "moving_var": "it is called running_var here",
    "epsilon": "it is called eps here",
    "variance_epsilon": "it is called eps here",
    "num_channels": "it is called num_features here",
    "track_running_stats": "batch_norm_train without running arrays uses batch statistics only",
    "training": _MODES,
    "is_training": _MODES,
    "train": _MODES,
    "inplace": "pass out=x",
    "trainable": "freeze() makes a BatchNorm use the running statistics and update nothing",
    "device": "there is only the CPU",
    "activation_fn": "it is called activation here",
    "negative_slope": "it is called slope here",
}


def reject_keywords(called: Callable[..., object], unknown: Mapping[str, object]) -> NoReturn:
    """Raise the TypeError for keyword arguments that the function or constructor called does not have."""
    code = called.__code__
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    known = known[1:]  # x, dy and the like are not what a keyword is mistaken for, nor is self
    function = called.__qualname__.removesuffix(".__init__")
    name = next(iter(unknown))
    value = unknown[name]
    if name == "momentum":
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            new, old = f"decay={1 - float(value):g}", f"decay={float(value):g}"
        else:
            new, old = "decay=1 - momentum", "decay=momentum"
        raise TypeError(
            f"{function}() has no argument 'momentum', which means opposite things: where it weighs the new "
            f"value (PyTorch, cuDNN, TensorFlow's fused op) pass {new}; where it weighs the old value ("
            f"Keras, Flax, ONNX, MXNet, Paddle) pass {old}"
        )
    if name in _FOREIGN:
        raise TypeError(f"{function}() has no argument {name!r}; {_FOREIGN[name]}")
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
    raise TypeError(f"{function}() has no argument {name!r}{hint}")


def _real(value: object, name: str, expected: str) -> float:
    """A plain float of a Python or NumPy real number; not of a bool, string or array."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real | np.floating):
        raise TypeError(f"{name} is {_kind(value)}, expected {expected}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float, expected {expected}") from None


def check_eps(eps: object) -> float:
    """`eps` as a float: finite and >= 0."""
    value = _real(eps, "eps", "a finite number >= 0")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"eps is {value}, expected a finite number >= 0")
    return value


def check_decay(decay: object, name: str = "decay") -> float:
    """`decay` (the weight of the old value) as a float in [0, 1]."""
    value = _real(decay, name, "a number in [0, 1], the weight of the old value")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, expected a number in [0, 1], the weight of the old value")
    return value


def check_int(value: object, name: str, expected: str) -> int:
    """`value` as an int that fits 64 bits; bool is not an int here."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {_kind(value)}, expected {expected}")
    try:
        result = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {_kind(value)}, expected {expected}") from None
    if not -(2**63) <= result < 2**63:
        raise ValueError(f"{name} is {result:.6g}, expected {expected}")
    return result


def check_ddof(ddof: object, name: str) -> int:
    """`ddof` of a running variance: 0 or 1."""
    value = check_int(ddof, name, "0 or 1")
    if value not in (0, 1):
        raise ValueError(f"{name} is {value}, expected 0 (divide by n) or 1 (divide by n - 1)")
    return value


def check_flag(value: object, name: str) -> bool:
    """A plain bool. Anything else that is merely truthy would choose a mode nobody asked for."""
    if value is not True and value is not False:
        raise TypeError(f"{name} is {_kind(value)}, expected True or False")
    return value


def check_activation(activation: object) -> str | None:
    """An activation's name or None."""
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return None if activation is None else str(activation)
    expected = f"None, {' or '.join(', '.join(map(repr, ACTIVATIONS)).rsplit(', ', 1))}"
    close = (
        difflib.get_close_matches(activation.lower(), ACTIVATIONS, n=1) if isinstance(activation, str) else ()
    )
    hint = f"; did you mean {close[0]!r}?" if close else ""
    error = ValueError if isinstance(activation, str) else TypeError
    raise error(f"activation is {_kind(activation)}, expected {expected}{hint}")


def check_slope(slope: object, activation: str | None, dtype: object = np.float64) -> float | None:
    """leaky_relu's slope as a float, its default for None; None for other activations, which have none."""
    expected = "a finite number, leaky_relu's factor for values below 0"
    if slope is None:
        return DEFAULT_SLOPE if activation == "leaky_relu" else None
    value = _real(slope, "slope", expected)
    if activation != "leaky_relu":
        raise ValueError(
            f"slope is given with activation={activation!r}, which has none; drop it, or use "
            f"activation='leaky_relu'"
        )
    if not math.isfinite(value):
        raise ValueError(f"slope is {value}, expected {expected}")
    if dtype != np.float64 and abs(value) >= _TOO_LARGE_FOR_FLOAT32:
        raise ValueError(
            f"slope is {value}, expected {expected}, within the range of float32 for x of {dtype}"
        )
    return value


def resolve_axis_argument(axis: object, data_format: object) -> int:
    """The channel axis, from `axis` or its alias `data_format`; both together are an error."""
    if data_format is None:
        return int(check_int(axis, "axis", "an int, the axis of x that holds the channels"))
    if axis is not DEFAULT_AXIS:
        raise TypeError(
            f"axis is {axis!r} and data_format is {data_format!r}; they say the same thing, give one of them"
        )
    if not isinstance(data_format, str):
        raise TypeError(
            f"data_format is {_kind(data_format)}, expected a str, one of {', '.join(DATA_FORMATS)}"
        )
    if data_format not in DATA_FORMATS:
        close = difflib.get_close_matches(data_format.upper(), DATA_FORMATS, n=1)
        close = close or difflib.get_close_matches(data_format.lower(), DATA_FORMATS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"data_format is {data_format!r}, expected one of {', '.join(DATA_FORMATS)}{hint}")
    return DATA_FORMATS[data_format][1]


def _axis_of(x: Array, axis: object, data_format: object) -> int:
    """The channel axis, checked against x's rank."""
    resolved = resolve_axis_argument(axis, data_format)
    if isinstance(data_format, str):
        rank = DATA_FORMATS[data_format][0]
        if rank is not None and x.ndim != rank:
            raise ValueError(
                f"data_format is {data_format!r}, which needs {rank} dimensions, but x has shape {x.shape}"
            )
    if not -x.ndim <= resolved < x.ndim:
        raise ValueError(
            f"axis is {resolved}, expected -{x.ndim} <= axis < {x.ndim} for x of shape {x.shape}"
        )
    return resolved


# ---- arrays ------------------------------------------------------------------------------------------------


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is ml_dtypes.bfloat16; tells the extension its type number when it is."""
    if dtype.name != "bfloat16" or dtype.itemsize != 2 or dtype.type.__module__ != "ml_dtypes":
        return False
    _core.set_bfloat16_type_num(dtype.num)
    return True


def _ndarray(value: object, name: str, expected: str) -> Array:
    """A plain ndarray; subclasses that only add behaviour (memmap, matrix) as plain views."""
    if not isinstance(value, np.ndarray):
        hint = f"; use {name}.detach().cpu().numpy()" if type(value).__module__ == "torch" else ""
        raise TypeError(f"{name} is {_kind(value)}, expected {expected}{hint}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored, expected {expected}")
    return value.view(np.ndarray) if type(value) is not np.ndarray else value


# Types of images, which only some functions take.
_INTEGERS = (np.uint8, np.int16, np.uint16)


def _tensor(value: object, name: str, integers: bool = False) -> Array:
    expected = "float32, float64, float16 or bfloat16"
    if integers:
        expected += ", or uint8, int16 or uint16 of images"
    x = _ndarray(value, name, f"a numpy.ndarray of {expected}")
    dtype = x.dtype
    native = (
        (np.float32, np.float64, np.float16, *_INTEGERS) if integers else (np.float32, np.float64, np.float16)
    )
    if dtype not in native and not _is_bfloat16(dtype):
        if dtype.newbyteorder("=") in native:
            raise TypeError(
                f"{name} has dtype {dtype.str} of foreign byte order, expected the machine's own; "
                f"use {name}.astype({dtype.newbyteorder('=').name!r})"
            )
        wide = dtype.kind == "f" and dtype.itemsize > 8
        use = "numpy.float64" if wide else "numpy.float32"
        hint = f"; use {name}.astype({use})" if wide or dtype.kind in "iub" else ""
        if dtype in _INTEGERS and name == "x":
            hint = (
                f": integers have no gradients; normalise images before (normalize_images), or use "
                f"x.astype({use})"
            )
        raise TypeError(f"{name} has dtype {dtype}, expected {expected}{hint}")
    if not dtype.isnative:
        raise TypeError(
            f"{name} has dtype {dtype.str} of foreign byte order, expected the machine's own; "
            f"use {name}.astype({dtype.newbyteorder('=').name!r})"
        )
    if x.ndim < 2:
        raise ValueError(
            f"{name} has shape {x.shape}, expected at least 2 dimensions, one of them the channels"
        )
    return x


def _input(value: object, axis: object, data_format: object, integers: bool = False) -> tuple[Array, int]:
    """x and its channel axis."""
    x = _tensor(value, "x", integers)
    channel_axis = _axis_of(x, axis, data_format)
    if x.shape[channel_axis] == 0:
        raise ValueError(f"x has shape {x.shape} with 0 channels on axis {channel_axis}, expected at least 1")
    return x, channel_axis


def _vector(value: object, name: str) -> Array:
    expected = "a one-dimensional float32 or float64 array, one value per channel"
    v = _ndarray(value, name, expected)
    if v.dtype not in (np.float32, np.float64) or not v.dtype.isnative:
        shown = v.dtype if v.dtype.isnative else v.dtype.str
        hint = (
            f"; use {name}.astype(numpy.float32)"
            if v.dtype.kind in "fiub" or v.dtype.name == "bfloat16"
            else ""
        )
        raise TypeError(f"{name} has dtype {shown}, expected float32 or float64{hint}")
    if v.ndim != 1:
        hint = f"; use {name}.reshape(-1)" if v.ndim and v.size == max(v.shape) else ""
        raise ValueError(f"{name} has shape {v.shape}, expected {expected}{hint}")
    return v


def _per_channel(value: object, name: str, x: Array, axis: int, *, finite: bool = True) -> Array:
    """A per-channel array that is only read: float32 or float64, shape (C,)."""
    channels = x.shape[axis]
    if value is None:
        raise TypeError(f"{name} is None, expected a float32 or float64 array of shape ({channels},)")
    v = _vector(value, name)
    if v.shape != (channels,):
        raise ValueError(
            f"{name} has shape {v.shape}, expected ({channels},) to match channel axis {axis} of x {x.shape}"
        )
    if finite and not np.isfinite(v).all():
        channel = int(np.flatnonzero(~np.isfinite(v))[0])
        raise ValueError(f"{name} is {v[channel]} at channel {channel}, expected finite values")
    return v if v.flags.aligned and v.strides[0] % v.itemsize == 0 else v.copy()


def _given_statistics(mean: object, var: object, x: Array, axis: int) -> tuple[Array, Array]:
    m = _per_channel(mean, "mean", x, axis)
    v = _per_channel(var, "var", x, axis)
    if (v < 0).any():
        channel = int(np.flatnonzero(v < 0)[0])
        raise ValueError(f"var is {v[channel]} at channel {channel}, expected values >= 0")
    return m, v


def _affine(gamma: object, beta: object, x: Array, axis: int) -> tuple[Array | None, Array | None]:
    return (
        None if gamma is None else _per_channel(gamma, "gamma", x, axis),
        None if beta is None else _per_channel(beta, "beta", x, axis),
    )


def _written_vector(value: object, name: str) -> Array:
    """A vector that is updated in place, so nothing about it may need a copy."""
    expected = "a writable float32 or float64 array, updated in place"
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is {_kind(value)}, expected {expected}")
    v = _vector(value, name)
    if not v.flags.writeable:
        raise ValueError(f"{name} is read-only, expected {expected}; pass {name}.copy() and keep it")
    if v.size > 1 and v.strides[0] == 0:
        raise ValueError(
            f"{name} has stride 0, so that its channels are one element, expected separate elements; "
            f"use {name}.copy()"
        )
    if not v.flags.aligned or v.strides[0] % v.itemsize:
        raise ValueError(
            f"{name} is not aligned to its element size, expected an aligned array; use {name}.copy()"
        )
    return v


def _running_pair(running_mean: object, running_var: object) -> tuple[Array, Array]:
    mean, var = _written_vector(running_mean, "running_mean"), _written_vector(running_var, "running_var")
    if np.shares_memory(mean, var):
        raise ValueError("running_mean and running_var share memory, expected two separate arrays")
    return mean, var


def _share(a: Array, b: Array) -> bool:
    """Whether two arrays have an element in common; undecided within bounds counts as yes."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape are the same elements in the same order."""
    return a.ctypes.data == b.ctypes.data and all(
        s == t or n <= 1 for n, s, t in zip(a.shape, a.strides, b.strides, strict=True)
    )


def _output(
    value: object,
    name: str,
    x: Array,
    in_place_of: Mapping[str, Array],
    apart_from: Mapping[str, Array | None],
) -> Array:
    """An output array: x's shape and dtype, writable; may be one of `in_place_of`, overlaps nothing else."""
    expected = f"a writable {x.dtype} array of shape {x.shape}"
    y = _ndarray(value, name, expected)
    if y.dtype != x.dtype or not y.dtype.isnative:
        raise TypeError(
            f"{name} has dtype {y.dtype if y.dtype.isnative else y.dtype.str}, expected {x.dtype} as x has"
        )
    if y.shape != x.shape:
        raise ValueError(f"{name} has shape {y.shape}, expected {x.shape} as x has")
    if not y.flags.writeable:
        raise ValueError(f"{name} is read-only, expected {expected}")
    extent = 0  # reached by the smaller strides
    for stride, n in sorted((abs(s), n) for n, s in zip(y.shape, y.strides, strict=True) if n > 1):
        if y.size and stride <= extent:
            raise ValueError(
                f"{name} has strides {y.strides} for shape {y.shape}, so that several of its elements are "
                f"one, expected {expected}"
            )
        extent += stride * (n - 1)
    if not y.flags.aligned or any(s % y.itemsize for s in y.strides):
        raise ValueError(f"{name} is not aligned to its element size, expected an aligned array")
    for other_name, other in in_place_of.items():
        if not _same_memory(y, other) and _share(y, other):
            raise ValueError(
                f"{name} overlaps {other_name} without being the same array, expected {other_name} itself or "
                f"a separate array"
            )
    for other_name, vector in apart_from.items():
        if vector is not None and _share(y, vector):
            raise ValueError(f"{name} overlaps {other_name}, expected separate arrays")
    return y


def _copy_like(a: Array, order: Array) -> Array:
    """A copy of ``a`` in the memory order of ``order``, without gaps."""
    copy = np.empty_like(order)
    np.copyto(copy, a)
    return copy


def _in_one_direction(
    x: Array, other: Array | None, outputs: Mapping[str, Array | None], axis: int
) -> tuple[Array, Array | None]:
    """x and dy, or x and the residual, so that all arrays have a common view: copied where they do not, x
    leading; outputs never.

    The order in which a channel is summed follows from x alone.
    """
    strides = x.strides
    if not _core.has_view([x], axis):
        x = _copy_like(x, x)
    together = [x]
    for name, out in outputs.items():
        if out is None:
            continue
        together.append(out)
        if not _core.has_view(together, axis):
            raise ValueError(
                f"{name} has strides {out.strides} for shape {out.shape}, which cannot be written in one "
                f"pass over memory together with x of strides {strides} (channel axis {axis}); use "
                f"numpy.empty_like(x), or leave {name}= away and assign, {name}[...] = result"
            )
    if other is not None and not _core.has_view([*together, other], axis):
        other = _copy_like(other, x)
    return x, other


def _like_x(value: object, name: str, x: Array) -> Array:
    """A second tensor that is only read: x's dtype and shape."""
    array = _tensor(value, name)
    if array.dtype != x.dtype:
        raise TypeError(
            f"{name} has dtype {array.dtype}, expected {x.dtype} as x has; use {name}.astype(x.dtype)"
        )
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {x.shape} as x has")
    return array


def _residual(value: object, x: Array) -> Array | None:
    return None if value is None else _like_x(value, "residual", x)


def _mask(
    value: object, x: Array, axis: int, activation: str | None, apart_from: Mapping[str, Array | None]
) -> Array | None:
    """An activation_mask for x, which has its final memory order; overlapping none of `apart_from`."""
    if value is None:
        return None
    count = _core.activation_mask_bytes(x, axis)
    made = "as the forward made it or numpy.zeros(activation_mask_bytes(x))"
    expected = f"a contiguous array of {count} uint8, {made}"
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        kind = f"has dtype {value.dtype}" if isinstance(value, np.ndarray) else f"is {_kind(value)}"
        raise TypeError(f"activation_mask {kind}, expected {expected}")
    if value.shape != (count,) or value.strides != (1,):
        raise ValueError(
            f"activation_mask has shape {value.shape} and strides {value.strides}, expected {expected}"
        )
    if activation not in PIECEWISE_LINEAR:
        raise ValueError(
            f"activation_mask is given with activation={activation!r}, expected one of which it can tell, "
            f"{' or '.join(map(repr, PIECEWISE_LINEAR))}; drop one of them"
        )
    for name, array in apart_from.items():
        if array is not None and _share(value, array):
            raise ValueError(f"activation_mask overlaps {name}, expected separate arrays")
    return value.view(np.ndarray)


def _counted(positions: Any, x: Array, axis: int) -> dict[str, Array | None]:
    """Check a `_positions.Positions` or None; its arrays, which no output may overlap."""
    if positions is None:
        return {}
    positions.check(x, axis)
    vectors: dict[str, Array | None] = positions.vectors()
    return vectors


def _values_per_channel(x: Array, axis: int, positions: Any) -> int:
    return x.size // x.shape[axis] if positions is None else int(positions.counting)


def _that_counts(positions: Any) -> str:
    return "" if positions is None else "that counts "


def _threads(num_threads: object) -> int | None:
    return None if num_threads is None else thread_count(num_threads)


# ---- calls -------------------------------------------------------------------------------------------------


def inference(
    x: object,
    mean: object,
    var: object,
    gamma: object,
    beta: object,
    eps: object,
    axis: object,
    data_format: object,
    activation: object,
    slope: object,
    residual: object,
    activation_mask: object,
    num_threads: object,
    out: object,
    positions: Any = None,
) -> tuple[Any, ...]:
    """Arguments of `_core.batch_norm` after `x`'s checks, or the error that explains."""
    x, channel_axis = _input(x, axis, data_format, integers=True)
    m, v = _given_statistics(mean, var, x, channel_axis)
    g, b = _affine(gamma, beta, x, channel_axis)
    eps, activation, threads = check_eps(eps), check_activation(activation), _threads(num_threads)
    slope = check_slope(slope, activation, x.dtype)
    z, y = _residual(residual, x), None
    vectors = {"mean": m, "var": v, "gamma": g, "beta": b, **_counted(positions, x, channel_axis)}
    if out is not None:
        y = _output(out, "out", x, {"x": x} if z is None else {"x": x, "residual": z}, vectors)
    apart = {"x": x, "residual": z, "out": y, **vectors}
    x, z = _in_one_direction(x, z, {"out": y}, channel_axis)
    bits = _mask(activation_mask, x, channel_axis, activation, apart)
    if bits is not None and not bits.flags.writeable:
        raise ValueError("activation_mask is read-only, expected a writable array")
    counted = None if positions is None else positions.in_order_of(x)
    return x, m, v, g, b, eps, channel_axis, activation, slope, z, bits, threads, y, counted, True, True


def training(
    x: object,
    gamma: object,
    beta: object,
    running_mean: object,
    running_var: object,
    decay: object,
    running_ddof: object,
    eps: object,
    axis: object,
    data_format: object,
    activation: object,
    slope: object,
    residual: object,
    num_threads: object,
    out: object,
    positions: Any = None,
) -> tuple[Any, ...]:
    """Arguments of `_core.batch_norm_train`, or the error that explains."""
    x, channel_axis = _input(x, axis, data_format)
    channels = x.shape[channel_axis]
    g, b = _affine(gamma, beta, x, channel_axis)
    if (running_mean is None) != (running_var is None):
        missing, given = (
            ("running_mean", "running_var") if running_mean is None else ("running_var", "running_mean")
        )
        raise ValueError(f"{missing} is None but {given} is given, expected both or neither")
    z = _residual(residual, x)
    rm = rv = None
    if running_mean is not None:
        rm, rv = _running_pair(running_mean, running_var)
        for vector, name in ((rm, "running_mean"), (rv, "running_var")):
            if vector.shape != (channels,):
                raise ValueError(
                    f"{name} has shape {vector.shape}, expected ({channels},) to match channel axis "
                    f"{channel_axis} of x {x.shape}"
                )
            for other, other_name in ((x, "x"), (g, "gamma"), (b, "beta"), (z, "residual")):
                if other is not None and _share(vector, other):
                    raise ValueError(f"{name} shares memory with {other_name}, expected separate arrays")
    decay, ddof = check_decay(decay), check_ddof(running_ddof, "running_ddof")
    eps, activation, threads = check_eps(eps), check_activation(activation), _threads(num_threads)
    slope = check_slope(slope, activation, x.dtype)
    counted_vectors = _counted(positions, x, channel_axis)
    if _values_per_channel(x, channel_axis, positions) == 1:
        raise ValueError(
            f"x has shape {x.shape} with one value per channel {_that_counts(positions)}(axis "
            f"{channel_axis}), from which no variance can be had, expected at least 2; use a larger "
            f"batch, normalise with running statistics (batch_norm, or the layer's eval mode), or "
            f"normalise another axis"
        )
    if rm is not None and positions is not None and positions.counting and positions.n <= ddof:
        raise ValueError(
            f"weights sum to {positions.n}, expected more than running_ddof = {ddof} for the running "
            f"variance, var * n / (n - {ddof}); use running_ddof=0, or larger weights"
        )
    y = None
    if out is not None:
        vectors = {"gamma": g, "beta": b, "running_mean": rm, "running_var": rv, **counted_vectors}
        y = _output(out, "out", x, {"x": x} if z is None else {"x": x, "residual": z}, vectors)
    x, z = _in_one_direction(x, z, {"out": y}, channel_axis)
    counted = None if positions is None else positions.in_order_of(x)
    return (
        x, g, b, rm, rv, decay, ddof, eps, channel_axis, activation, slope, z, threads, y, counted, None,
        True, True,
    )  # fmt: skip


def check_stats(stats: object) -> bool:
    """Whether the statistics were given ("fixed") rather than the batch's own ("batch")."""
    if not isinstance(stats, str):
        raise TypeError(f"stats is {_kind(stats)}, expected 'batch' or 'fixed'")
    if stats not in ("batch", "fixed"):
        raise ValueError(
            f"stats is {stats!r}, expected 'batch' (batch_norm_train's own) or 'fixed' (given statistics)"
        )
    return stats == "fixed"


def check_needs(needs: object) -> tuple[bool, bool, bool, bool]:
    """Which of dx, dgamma, dbeta, dresidual are asked for."""
    expected = "a tuple of 'dx', 'dgamma', 'dbeta', 'dresidual'"
    if isinstance(needs, str):
        raise TypeError(f"needs is {needs!r} (str), expected {expected}, for example ({needs!r},)")
    if not isinstance(needs, tuple | list | set | frozenset):
        raise TypeError(f"needs is {_kind(needs)}, expected {expected}")
    for name in needs:
        if not isinstance(name, str):
            raise TypeError(f"needs contains {_kind(name)}, expected {expected}")
        if name not in NEEDS:
            raise ValueError(f"needs contains {name!r}, expected {expected}")
    return "dx" in needs, "dgamma" in needs, "dbeta" in needs, "dresidual" in needs


def _backward_residual(
    residual: object, x: Array, activation: str | None, activation_mask: object, need_dresidual: bool
) -> Array | None:
    """The forward's residual, where it can be used and is not missing."""
    z = _residual(residual, x)
    if z is not None:
        if activation is None:
            raise ValueError(
                "residual is given without an activation, for which alone backward reads it; drop it"
            )
        if activation_mask is not None:
            raise ValueError("residual and activation_mask are given, which tell the same; drop one of them")
    elif need_dresidual and activation is not None and activation_mask is None:
        name = "activation_mask" if activation in PIECEWISE_LINEAR else "residual"
        raise ValueError(
            f"{name} is None, expected that of the forward pass: with a residual, x does not "
            f"tell where the activation was on"
        )
    return z


def backward(
    dy: object,
    x: object,
    mean: object,
    inv_std: object,
    gamma: object,
    beta: object,
    axis: object,
    data_format: object,
    stats: object,
    activation: object,
    slope: object,
    activation_mask: object,
    residual: object,
    needs: object,
    num_threads: object,
    out: object,
    out_residual: object,
    positions: Any = None,
) -> tuple[Any, ...]:
    """Arguments of `_core.batch_norm_backward`, or the error that explains."""
    x, channel_axis = _input(x, axis, data_format)
    dy = _like_x(dy, "dy", x)
    for value, name in ((mean, "mean"), (inv_std, "inv_std")):
        if value is None:
            raise TypeError(f"{name} is None, expected the {name} that the forward pass returned")
    m = _per_channel(mean, "mean", x, channel_axis, finite=False)
    s = _per_channel(inv_std, "inv_std", x, channel_axis, finite=False)
    g, b = _affine(gamma, beta, x, channel_axis)
    fixed, activation = check_stats(stats), check_activation(activation)
    slope = check_slope(slope, activation, x.dtype)
    need_dx, need_dgamma, need_dbeta, need_dresidual = check_needs(needs)
    threads = _threads(num_threads)
    if fixed and positions is not None and positions.weighted:
        raise ValueError(
            "weights is given with stats='fixed', where no statistics are taken that they could weigh; drop "
            "one of them"
        )
    counted_vectors = _counted(positions, x, channel_axis)
    if not fixed and _values_per_channel(x, channel_axis, positions) == 1:
        raise ValueError(
            f"x has shape {x.shape} with one value per channel {_that_counts(positions)}(axis "
            f"{channel_axis}), expected at least 2 with stats='batch'; after a forward with given "
            f"statistics use stats='fixed'"
        )
    z = _backward_residual(residual, x, activation, activation_mask, need_dresidual)
    vectors = {"mean": m, "inv_std": s, "gamma": g, "beta": b, **counted_vectors}
    outputs: dict[str, Array | None] = {"out": None, "out_residual": None}
    for name, value, gradient, needed in (
        ("out", out, "dx", need_dx),
        ("out_residual", out_residual, "dresidual", need_dresidual),
    ):
        if value is None:
            continue
        if not needed:
            raise ValueError(
                f"{name} is given but needs does not contain {gradient!r}, which it would receive; drop one "
                f"of them"
            )
        # The residual's gradient may be written before x has been read.
        in_place_of = {"dy": dy, "x": x} if name == "out" else {"dy": dy}
        if z is not None:
            in_place_of["residual"] = z
        apart_from = vectors if name == "out" else {**vectors, "x": x}
        outputs[name] = _output(value, name, x, in_place_of, apart_from)
    dx, dresidual = outputs.values()
    if dx is not None and dresidual is not None and _share(dx, dresidual):
        raise ValueError("out and out_residual overlap, expected two separate arrays")
    x, other = _in_one_direction(x, dy, outputs, channel_axis)
    _, z = _in_one_direction(x, z, {"dy": other, **outputs}, channel_axis)
    bits = _mask(activation_mask, x, channel_axis, activation, outputs)
    counted = None if positions is None else positions.in_order_of(x)
    return (
        other, x, m, s, g, b, channel_axis, fixed, activation, slope, bits, z, need_dx, need_dgamma,
        need_dbeta, need_dresidual, threads, dx, dresidual, counted, True, True,
    )  # fmt: skip


def statistics(
    x: object,
    axis: object,
    data_format: object,
    ddof: object,
    num_threads: object,
    positions: Any = None,
) -> tuple[Any, ...]:
    """Arguments of `_core.moments`, or the error that explains."""
    x, channel_axis = _input(x, axis, data_format, integers=True)
    delta = check_int(ddof, "ddof", "an int >= 0")
    if delta < 0:
        raise ValueError(f"ddof is {delta}, expected an int >= 0")
    _counted(positions, x, channel_axis)
    count = _values_per_channel(x, channel_axis, positions)
    if count > 0 and positions is not None and positions.weighted and positions.n <= delta:
        raise ValueError(f"ddof is {delta}, expected less than the {positions.n} that the weights sum to")
    if 0 < count <= delta and not (positions is not None and positions.weighted):
        raise ValueError(
            f"ddof is {delta}, expected less than the {count} values per channel {_that_counts(positions)}of "
            f"x {x.shape}"
        )
    threads = _threads(num_threads)
    x, _ = _in_one_direction(x, None, {}, channel_axis)
    return x, channel_axis, delta, threads, None if positions is None else positions.in_order_of(x), True


def check_shift(shift: object, x: Array, axis: int) -> None:
    """TensorFlow's `shift` of moments: a number or one per channel."""
    if shift is None:
        return
    if isinstance(shift, np.ndarray) and shift.ndim:
        _per_channel(shift, "shift", x, axis)
    elif isinstance(shift, np.ndarray):
        _real(shift[()], "shift", "a number, or an array of one per channel")
    elif not math.isfinite(_real(shift, "shift", "a number, or an array of one per channel")):
        raise ValueError(f"shift is {shift}, expected finite values")


def mask_view(x: object, axis: object, data_format: object) -> tuple[Array, int]:
    """Arguments of `_core.activation_mask_bytes`, or the error that explains."""
    x, channel_axis = _input(x, axis, data_format)
    return _in_one_direction(x, None, {}, channel_axis)[0], channel_axis


def running_update(
    running_mean: object,
    running_var: object,
    mean: object,
    var: object,
    decay: object,
    count: object,
    ddof: object,
) -> tuple[Any, ...]:
    """Arguments of `_core.update_running`, or the error that explains."""
    rm, rv = _running_pair(running_mean, running_var)
    if rv.shape != rm.shape:
        raise ValueError(f"running_var has shape {rv.shape}, expected {rm.shape} as running_mean has")
    vectors = []
    for value, name in ((mean, "mean"), (var, "var")):
        if value is None:
            raise TypeError(f"{name} is None, expected a float32 or float64 array of shape {rm.shape}")
        v = _vector(value, name)
        if v.shape != rm.shape:
            raise ValueError(f"{name} has shape {v.shape}, expected {rm.shape} as running_mean has")
        for running, running_name in ((rm, "running_mean"), (rv, "running_var")):
            if _share(v, running):
                raise ValueError(f"{name} shares memory with {running_name}, expected separate arrays")
        if name == "var" and (v < 0).any():
            channel = int(np.flatnonzero(v < 0)[0])
            raise ValueError(f"var is {v[channel]} at channel {channel}, expected values >= 0")
        vectors.append(v if v.flags.aligned and v.strides[0] % v.itemsize == 0 else v.copy())
    weight = check_decay(decay)
    delta = check_ddof(ddof, "ddof")
    n = check_int(count, "count", "an int, the number of values per channel")
    if n <= delta:
        raise ValueError(f"count is {n}, expected more than ddof = {delta}")
    return rm, rv, vectors[0], vectors[1], weight, n, delta


def thread_count(num_threads: object) -> int:
    """A number of threads: an int from 1 to 65536."""
    value = check_int(num_threads, "num_threads", "an int from 1 to 65536")
    if not 1 <= value <= 65536:
        raise ValueError(f"num_threads is {value}, expected an int from 1 to 65536")
    return value


def cache_limit(limit: object) -> int:
    """A number of bytes: an int >= 0."""
    value = check_int(limit, "limit", "an int >= 0, in bytes")
    if value < 0:
        raise ValueError(f"limit is {value}, expected an int >= 0, in bytes")
    return value


def isa_name(name: object) -> str:
    """The name of an ISA level of this build that this CPU can run."""
    if not isinstance(name, str):
        raise TypeError(f"isa is {_kind(name)}, expected a str, one of {', '.join(_core.isa_levels())}")
    if name not in _core.isa_levels():
        reason = ", which this CPU cannot run" if name in _core.isa_built() else ""
        raise ValueError(
            f"isa is {name!r}{reason}, expected one of {', '.join(map(repr, _core.isa_levels()))}"
        )
    return name
