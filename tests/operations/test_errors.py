"""Every message of the functions: the right exception, argument, got, expected, remedy; and nothing changed.

The table is built by `case(calls, name, change, error, *words)`: `change` replaces arguments of a valid call,
and each of the `words` is in the message.
"""

from __future__ import annotations

import inspect
import pathlib
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import batchnorm
import numpy as np
import pytest
from batchnorm import Saved

from support.refusals import refused

pytestmark = pytest.mark.quick

N, C = 2, 6
SHAPE = (N, C, 4, 5)
f32, f64 = np.float32, np.float64
Change = Mapping[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]


class Case(NamedTuple):
    call: str
    name: str
    change: Change
    error: type[Exception]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.call}-{self.name}"


CASES: list[Case] = []
T, V, R = TypeError, ValueError, RuntimeError
DROP = object()  # stands for an argument that is left out

INFERENCE, TRAIN, BACKWARD = "batch_norm", "batch_norm_train", "batch_norm_backward"
DOUBLE, OF, MOMENTS, UPDATE = "batch_norm_double_backward", "Saved.of", "moments", "update_running"
FORWARD = (INFERENCE, TRAIN)
SECOND = (BACKWARD, DOUBLE)
OF_X = (INFERENCE, TRAIN, OF, MOMENTS)  # that take an x with its axes
THREADED = (INFERENCE, TRAIN, BACKWARD, DOUBLE, MOMENTS)
ALL = (*THREADED, OF, UPDATE)


def function(call: str) -> Any:
    return Saved.of if call == OF else getattr(batchnorm, call)


def arguments(call: str) -> dict[str, Any]:
    """A valid call's arguments, freshly made."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal(SHAPE).astype(f32)
    affine = {"gamma": np.full(C, 1.5, f32), "beta": np.full(C, 0.25, f32)}
    mean, var = np.full(C, 0.5), np.full(C, 2.0)
    running = {"running_mean": np.zeros(C, f32), "running_var": np.ones(C, f32)}
    match call:
        case "batch_norm":
            return {"x": x, "mean": mean, "var": var, **affine, "eps": 1e-3, "out": np.ones_like(x)}
        case "batch_norm_train":
            return {"x": x, **affine, **running, "decay": 0.5, "eps": 1e-3, "out": np.ones_like(x)}
        case "Saved.of":
            return {"x": x, "mean": mean, "inv_std": var, **affine}
        case "batch_norm_backward":
            return {"dy": x[::-1].copy(), "saved": forward(x, **affine), "out": np.ones_like(x)}
        case "batch_norm_double_backward":
            return {"dy": x[::-1].copy(), "saved": forward(x, **affine), "ddx": x + 1}
        case "moments":
            return {"x": x}
        case "update_running":
            return {**running, "mean": mean, "var": var, "decay": 0.5, "count": 40}
    raise AssertionError(call)


def forward(x: Any, **options: Any) -> Saved:
    return batchnorm.batch_norm_train(x, **options).saved


def case(
    calls: str | tuple[str, ...], name: str, change: Change, error: type[Exception], *words: str
) -> None:
    for call in (calls,) if isinstance(calls, str) else calls:
        CASES.append(Case(call, name, change, error, words))


def tensor(call: str, value: Any, name: str = "x") -> dict[str, Any]:
    """`value` for a tensor, and no output that would have to fit it."""
    return {name: value} if call in (MOMENTS, OF, DOUBLE) else {name: value, "out": None}


def saved(change: Callable[[Any], None] | None = None, **options: Any) -> Change:
    """A Saved of a forward with these options, after a change of its x and y."""

    def made(a: dict[str, Any]) -> dict[str, Any]:
        x = a["dy"].copy()
        y, s = batchnorm.batch_norm_train(x, out=x if options.get("out") else None,
                                          **{k: v for k, v in options.items() if k != "out"})  # fmt: skip
        if change is not None:
            change(y if options.get("keep") == "y" else x)
        return {"saved": s}

    return made


def fill(a: Any) -> None:
    a[...] = 7


# ---- tensors ----

x0 = np.arange(240.0).reshape(SHAPE)

FLOATS = "float32, float64, float16 or bfloat16"
WRONG_TENSOR: dict[str, tuple[Any, tuple[str, ...]]] = {
    "list": (x0.tolist(), ("list", "ndarray")),
    "None": (None, ("None", "ndarray")),
    "str": ("x", ("str", "ndarray")),
    "float": (3.0, ("3.0 (float)", "ndarray")),
    "NumPy scalar": (f32(3), ("float32", "ndarray")),
    "int64": (x0.astype(np.int64), ("int64", FLOATS, ".astype(numpy.float64)")),
    "uint32": (x0.astype(np.uint32), ("uint32", FLOATS, ".astype(numpy.float64)")),
    "int32": (x0.astype(np.int32), ("int32", FLOATS, ".astype(numpy.float64)")),
    "int8": (x0.astype(np.int8), ("int8", FLOATS, ".astype(numpy.float32)")),
    "bool": (x0 > 7, ("bool", FLOATS, ".astype(numpy.float32)")),
    "complex64": (x0.astype(np.complex64), ("complex64", FLOATS)),
    "longdouble": (x0.astype(np.longdouble), (str(np.dtype(np.longdouble)), ".astype(numpy.float64)")),
    "object": (x0.astype(object), ("object", FLOATS)),
    "text": (x0.astype("U8"), ("U8", FLOATS)),
    "structured": (np.zeros(SHAPE, [("a", "f4")]), ("'a'", FLOATS)),
    "datetime": (x0.astype("M8[s]"), ("datetime64", FLOATS)),
    "big-endian": (x0.astype(">f4"), (">f4", "byte order", ".astype('float32')")),
}
for name, (value, words) in WRONG_TENSOR.items():
    for call in OF_X:
        case(call, f"x {name}", tensor(call, value), T, "x ", *words)
    for call in SECOND:
        case(call, f"dy {name}", tensor(call, value, "dy"), T, "dy ", *words)
    if value is not None:
        for call in FORWARD:
            case(call, f"residual {name}", {"residual": value}, T, "residual ", *words)
        case(DOUBLE, f"ddx {name}", {"ddx": value}, T, "ddx ", *words)
for dtype in (np.uint8, np.int16, np.uint16):
    for call in (TRAIN, OF):
        change = tensor(call, (x0 % 256).astype(dtype))
        case(
            call, f"x {np.dtype(dtype)}", change, T, "x ", np.dtype(dtype).name, "integers have no gradients"
        )
masked = np.ma.masked_greater(x0.astype(f32), 7)
for call in (INFERENCE, TRAIN, OF):
    words = ("x is a masked array", "x.data", "mask=~numpy.ma.getmaskarray(x)")
    case(call, "x masked", tensor(call, masked), T, *words)
for shape in ((), (6,)):
    for call in OF_X:
        words = ("x has shape", str(shape), "at least 2 dimensions")
        case(call, f"x {len(shape)}-D", tensor(call, np.zeros(shape, f32)), V, *words)
for shape in ((2, 0), (2, 0, 4), (0, 0, 3)):
    for call in OF_X:
        change = tensor(call, np.zeros(shape, f32))
        case(call, f"x {shape}", change, V, "x has shape", str(shape), "0 channels", "at least 1")
for shape in ((2, 6, 5, 4), (2, 6, 20), (1, 6, 4, 5), (0, 6, 4, 5), (2, 6, 4, 1), (6,)):
    value = np.zeros(shape, f32)
    for call in SECOND:
        case(call, f"dy {shape}", {"dy": value}, V, "dy has shape", str(shape), str(SHAPE))
    case(FORWARD, f"residual {shape}", {"residual": value}, V, "residual has", str(shape), str(SHAPE))
    case(DOUBLE, f"ddx {shape}", {"ddx": value}, V, "ddx has shape", str(shape), str(SHAPE))
for dtype in ("float64", "float16"):
    value = np.zeros(SHAPE, dtype)
    case(SECOND, f"dy {dtype}", {"dy": value}, T, "dy has dtype", dtype, "expected float32")
    words = ("residual has dtype", dtype, "expected float32", "residual.astype")
    case(FORWARD, f"residual {dtype}", {"residual": value}, T, *words)

# ---- channel_axis and data_format ----

for axis in (4, 7, -5, 2**31, 2**62, 2**70):
    words = ("channel_axis", "-4", "4", str(SHAPE)) if axis < 2**70 else ("channel_axis",)
    case(OF_X, f"channel_axis {axis}", {"channel_axis": axis}, V, *words)
NOT_AXES = {"float": 1.0, "bool": True, "NumPy bool": np.True_, "str": "1", "array": np.array([1])}
for name, axis in NOT_AXES.items():
    got = type(axis).__name__
    case(OF_X, f"channel_axis {name}", {"channel_axis": axis}, T, "channel_axis", got, "int")
for axes, words in {
    (): ("()",),
    (1, 1): ("(1, 1)", "twice"),
    (1, -3): ("(1, -3)", "twice"),
    (1, 4): ("(1, 4)", str(SHAPE)),
    (0, 2, 3): ("(0, 2, 3)", "channel_axis=1"),
    (0, 1): ("(0, 1)", "channel_axis=(2, 3)"),
    (0, 1, 2, 3): ("(0, 1, 2, 3)",),
}.items():
    case(OF_X, f"channel_axis {axes}", {"channel_axis": axes}, V, "channel_axis", *words)
case(OF_X, "channel_axis of floats", {"channel_axis": (1.0, 2)}, T, "channel_axis", "float")
for name, hint in {
    "nhwc": "'NHWC'",
    "NWHC": "'NHWC'",
    "": "NHWC",
    "channels-last": "'channels_last'",
}.items():
    words = ("data_format", repr(name), hint)
    case(OF_X, f"data_format {name!r}", {"data_format": name}, V, *words)
for value in (1, False, b"NHWC", ["NHWC"]):
    words = ("data_format", type(value).__name__, "str")
    case(OF_X, f"data_format {value!r}", {"data_format": value}, T, *words)
for name, rank in {"NC": 2, "NLC": 3, "NCDHW": 5}.items():
    words = ("data_format", name, f"{rank} dim", str(SHAPE))
    case(OF_X, f"data_format {name} of 4-D", {"data_format": name}, V, *words)
for axis in (1, 3):
    change = {"channel_axis": axis, "data_format": "NCHW"}
    case(OF_X, f"data_format with {axis}", change, T, "channel_axis", "data_format", "one of them")
change = {"x": (x0 % 256).astype(np.uint8), "channel_axis": (1, 2), "out_format": "NHWC", "out": None,
          **dict.fromkeys(("mean", "var", "gamma", "beta"), np.ones((C, 4)))}  # fmt: skip
case(INFERENCE, "out_format of several axes", change, V, "out_format is given", "axes (1, 2)", "drop")
change = {"x": (x0 % 256).astype(np.uint8), "dtype": f64}
case(INFERENCE, "out of another dtype than said", change, T, "out has dtype float32", "float64", "dtype=")
for value in (np.int32, "complex64", "nonsense"):
    case(
        INFERENCE,
        f"dtype {value}",
        {**change, "dtype": value, "out": None},
        T,
        "dtype is",
        "float16 or bfloat16",
    )
for name in ("out_format", "dtype"):
    value = "NHWC" if name == "out_format" else f64
    case(INFERENCE, f"{name} of floats", {name: value, "out": None}, V, name, "integer")

# ---- one value per channel, read ----

READ = {
    INFERENCE: ("mean", "var", "gamma", "beta"),
    TRAIN: ("gamma", "beta"),
    OF: ("mean", "inv_std", "gamma", "beta"),
    DOUBLE: ("ddgamma", "ddbeta"),
    UPDATE: ("mean", "var"),
}
WRONG_VECTOR: dict[str, tuple[Any, tuple[str, ...]]] = {
    "list": (["one"] * C, ("list", "array")),
    "float": (1.0, ("1.0 (float)", "array")),
    "str": ("ones", ("str", "array")),
    "masked": (np.ma.masked_array(np.ones(C), [0, 1] * 3), ("masked", "array")),
    "int64": (np.ones(C, np.int64), ("int64", "float32 or float64", ".astype(numpy.float64)")),
    "bool": (np.ones(C, bool), ("bool", "float32 or float64")),
    "complex": (np.ones(C, complex), ("complex128", "float32 or float64")),
    "float16": (np.ones(C, np.float16), ("float16", ".astype(numpy.float32)")),
    "longdouble": (np.ones(C, np.longdouble), ("float32 or float64", ".astype(numpy.float64)")),
    "object": (np.ones(C, object), ("object", "float32 or float64")),
    "big-endian": (np.ones(C, ">f8"), (">f8", "float32 or float64")),
}
WRONG_SHAPE = {
    "short": np.ones(C - 1), "long": np.ones(C + 1), "of one": np.ones(1), "empty": np.ones(0),
    "0-D": np.ones(()), "(C, 1)": np.ones((C, 1)), "keepdims": np.ones((1, C, 1, 1)),
}  # fmt: skip
for call, names in READ.items():
    for name in names:
        for kind, (value, words) in WRONG_VECTOR.items():
            case(call, f"{name} {kind}", {name: value}, T, f"{name} ", *words)
        for kind, value in WRONG_SHAPE.items():
            words = (f"{name} has shape", str(value.shape), f"({C},)")
            case(call, f"{name} {kind}", {name: value}, V, *words)
        if name in ("mean", "var", "inv_std"):
            case(call, f"{name} None", {name: None}, T, f"{name} is None", "expected")
        elif call != DOUBLE:
            words = (f"{name} has shape", "(3, 6)", "(2, 6)")
            case(call, f"{name} of 3 samples", {name: np.ones((3, C))}, V, *words)
            rows = np.ones((N, C))
            rows[1, 4] = np.nan
            words = (f"{name} is nan at sample 1, channel 4", "finite")
            case(call, f"{name} nan per sample", {name: rows}, V, *words)
        if call in FORWARD or name in ("gamma", "beta", "ddgamma", "ddbeta"):
            for value in (np.nan, np.inf, -np.inf):
                for dtype in (f32, f64):
                    vector = np.ones(C, dtype)
                    vector[-1] = value
                    words = (f"{name} is {value} at channel {C - 1}", "finite")
                    case(call, f"{name} {value} {np.dtype(dtype)}", {name: vector}, V, *words)
for call in (INFERENCE, UPDATE):
    for value in (-1.0, -5e-324):
        vector = np.ones(C)
        vector[2] = value
        case(call, f"var {value}", {"var": vector}, V, f"var is {value:.3g}"[:8], "channel 2", ">= 0")

# ---- numbers and names ----

NOT_REAL = {"str": "1e-5", "complex": 1e-5 + 0j, "bool": True, "bool_": np.False_, "list": [1e-5]}
for name, value in NOT_REAL.items():
    got = type(value).__name__
    case(FORWARD, f"eps {name}", {"eps": value}, T, "eps is", got, "finite number >= 0")
    case((TRAIN, UPDATE), f"decay {name}", {"decay": value}, T, "decay is", got, "[0, 1]")
case(FORWARD, "eps None", {"eps": None}, T, "eps is None", "finite number >= 0")
for value in (-1e-5, -1, np.nan, np.inf, f32(-1)):
    case(FORWARD, f"eps {value!r}", {"eps": value}, V, "eps is", "finite number >= 0")
case(FORWARD, "eps 10**400", {"eps": 10**400}, V, "eps is", "finite number >= 0")
for value in (-0.1, 1.0000001, 2, np.nan, np.inf):
    case((TRAIN, UPDATE), f"decay {value!r}", {"decay": value}, V, "decay is", "[0, 1]", "old value")
decays = np.full(C, 0.5)
decays[3] = 1.5
case((TRAIN, UPDATE), "decay per channel", {"decay": decays}, V, "decay is 1.5 at channel 3", "[0, 1]")
case((TRAIN, UPDATE), "decay short", {"decay": decays[1:]}, V, "decay has shape (5,)", f"({C},)")
case((TRAIN, UPDATE), "decay None", {"decay": None}, V, "decay is None", "seen")
case((TRAIN, UPDATE), "decay and seen", {"seen": 3.0}, V, "seen", "decay")
for value in (-1.0, np.nan, np.inf):
    change = {"decay": None, "seen": value}
    case((TRAIN, UPDATE), f"seen {value}", change, V, "seen is", "finite", ">= 0")
change = {"decay": None, "seen": "5"}
case((TRAIN, UPDATE), "seen str", change, T, "seen is '5' (str)", "number")
change = {"decay": None, "seen": 3.0, "running_mean": None, "running_var": None}
case(TRAIN, "seen without running", change, V, "seen", "running_mean")

NOT_INT = {"None": None, "str": "1", "float": 1.0, "bool": True, "numpy.bool": np.True_, "ndarray": x0[0]}
for call, name in ((TRAIN, "running_ddof"), (UPDATE, "ddof"), (MOMENTS, "ddof")):
    for kind, value in NOT_INT.items():
        case(call, f"{name} {kind}", {name: value}, T, f"{name} is", kind, "expected")
for call, name in ((TRAIN, "running_ddof"), (UPDATE, "ddof")):
    for value in (-1, 2, 2**70):
        case(call, f"{name} {value}", {name: value}, V, f"{name} is", "0", "1", "n - 1")
case(MOMENTS, "ddof -1", {"ddof": -1}, V, "ddof is -1", ">= 0")
for value in (40, 41, 2**40):
    case(MOMENTS, f"ddof {value} of 40", {"ddof": value}, V, f"ddof is {value}", "less than", "40")
for value in (-1, np.nan):
    case(UPDATE, f"count {value}", {"count": value}, V, "count is", ">= 0")
case(UPDATE, "count 1", {"count": 1}, V, "count is 1", "more than ddof = 1")
case(UPDATE, "count str", {"count": "3"}, T, "count is", "str")
case(UPDATE, "count missing", {"count": DROP}, T, "count")

FUSED = (INFERENCE, TRAIN, OF)
for value, hint in {
    "ReLU": "'relu'", "Relu6": "'relu6'", "swish": "'silu'", "SiLU": "'silu'", "lrelu": "'leaky_relu'",
    "none": "None", "linear": "None", "identity": "None", "gelu": "outside", "": "'relu'", "relu ": "'relu'",
}.items():  # fmt: skip
    words = ("activation is", repr(value), "expected", hint)
    case(FUSED, f"activation {value!r}", {"activation": value}, V, *words)
for value in (0, True, b"relu", np.tanh, ["relu"]):
    got = type(value).__name__
    case(FUSED, f"activation {got}", {"activation": value}, T, "activation is", got, "'relu'")
change = {"slope": 0.1, "activation": "relu"}
case(FUSED, "slope of relu", change, V, "slope is given", "activation='relu'", "'leaky_relu'")
case(FUSED, "slope alone", {"slope": 0.1}, V, "slope is given", "activation=None", "'leaky_relu'")
for value, words in {np.nan: ("nan",), np.inf: ("inf",), 1e39: ("1e+39", "float32")}.items():
    change = {"slope": value, "activation": "leaky_relu"}
    case(FUSED, f"slope {value}", change, V, "slope is", *words, "finite")
change = {"slope": "0.1", "activation": "leaky_relu"}
case(FUSED, "slope str", change, T, "slope is '0.1' (str)", "finite number")
for value in (0, -1, 65537, 2**70):
    words = ("num_threads is", "an int from 1 to 65536")
    case(THREADED, f"num_threads {value}", {"num_threads": value}, V, *words)
for kind, value in NOT_INT.items():
    if value is not None:
        words = ("num_threads is", kind, "an int from 1 to 65536")
        case(THREADED, f"num_threads {kind}", {"num_threads": value}, T, *words)
CHOICES = {
    (TRAIN, "on_nonfinite"): ("'propagate'", "'raise'", "'skip'"),
    (TRAIN, "keep"): ("'x'", "'y'", "None"),
    (OF, "stats"): ("'batch'", "'fixed'"),
}
for (call, name), words in CHOICES.items():
    case(call, f"{name} 'yes'", {name: "yes"}, V, f"{name} is 'yes'", *words)
    case(call, f"{name} bool", {name: True}, T, f"{name} is True", "bool", *words)

# ---- unknown keywords ----

for call in (TRAIN, UPDATE):
    words = ("no argument 'momentum'", "PyTorch", "decay=0.9", "Keras", "decay=0.1")
    case(call, "momentum", {"momentum": 0.1}, T, *words)
for keyword in ("axis", "axes"):
    words = (f"no argument {keyword!r}", "opposite", "other axes than 0", "channel_axis=1, what")
    case((*FORWARD, OF, MOMENTS), keyword, {keyword: (0, 2, 3)}, T, *words)
    words = ("pass channel_axis=0;", "pass channel_axis=(1, 2, 3), what it leaves out")
    case((*FORWARD, OF, MOMENTS), f"{keyword} 0", {keyword: 0}, T, *words)
for call, keyword, words in (
    (INFERENCE, "weight", ("gamma",)),
    (INFERENCE, "bias", ("beta",)),
    (INFERENCE, "offset", ("beta",)),
    (INFERENCE, "variance", ("var",)),
    (INFERENCE, "running_var", ("var",)),
    (INFERENCE, "epsilon", ("eps",)),
    (INFERENCE, "training", ("batch_norm_train", "eval()")),
    (INFERENCE, "is_training", ("batch_norm_train",)),
    (INFERENCE, "phase", ("batch_norm_train",)),
    (TRAIN, "moving_variance", ("running_var",)),
    (TRAIN, "inplace", ("out=x",)),
    (TRAIN, "track_running_stats", ("without running arrays",)),
    (TRAIN, "batch_weights", ("weights",)),
    (TRAIN, "sample_weight", ("weights",)),
    (TRAIN, "where", ("it is called mask here",)),
    (TRAIN, "grad_output", ("it has x, gamma, beta",)),
    (INFERENCE, "unbiased", ("batch_norm_train() takes it: pass running_ddof=1",)),
    (INFERENCE, "renorm_clipping", ("batch_norm_train() takes it: pass renorm={'rmin'",)),
    (INFERENCE, "momentum", ("batch_norm_train() takes it: it means opposite things",)),
    (OF, "variance", ("pass inv_std=1 / numpy.sqrt(var + eps)",)),
    (OF, "epsilon", ("pass inv_std=1 / numpy.sqrt(var + eps)",)),
    (TRAIN, "padding_mask", ("mask=~padding_mask",)),
    (MOMENTS, "attention_mask", ("mask=attention_mask != 0",)),
    (MOMENTS, "momentum", ("update_running()",)),
    (BACKWARD, "inplace", ("pass out=dy",)),
    (BACKWARD, "scale", ("it is called gamma there",)),
    (BACKWARD, "keepdims", ("it has dy, saved",)),
    (TRAIN, "skipna", ("mask=~numpy.isnan(x)",)),
    (TRAIN, "nan_policy", ("mask=~numpy.isnan(x)",)),
    (TRAIN, "renorm_clipping", ("renorm={'rmin'",)),
    (TRAIN, "num_dims", ("any rank",)),
    (TRAIN, "device", ("arrays",)),
    (TRAIN, "save_memory", ("keep='y'",)),
    (TRAIN, "rmax", ("renorm=",)),
    (TRAIN, "epss", ("did you mean 'eps'?",)),
    (TRAIN, "runing_var", ("did you mean 'running_var'?",)),
    (BACKWARD, "need", ("did you mean 'needs'?",)),
    (BACKWARD, "inv_std", ("Saved.of(x, mean, inv_std",)),
    (BACKWARD, "activation_mask", ("y, saved = batch_norm_train",)),
    (BACKWARD, "stats", ("Saved.of",)),
    (MOMENTS, "shift", ("drop it",)),
    (MOMENTS, "keepdim", ("did you mean 'keepdims'?",)),
    (MOMENTS, "unbiased", ("ddof=1",)),
    (MOMENTS, "correction", ("ddof",)),
    (UPDATE, "samples", ("seen",)),
):
    case(call, f"unknown {keyword}", {keyword: 1}, T, f"no argument {keyword!r}", *words)
case(ALL, "unknown word", {"zzz": 1}, T, "no argument 'zzz'", "it has ")

# ---- the batch and running statistics ----

for shape in ((1, C), (1, C, 1), (1, C, 1, 1)):
    words = ("x has shape", str(shape), "one value per channel", "at least 2", "larger batch")
    case(TRAIN, f"one value {shape}", tensor(TRAIN, np.zeros(shape, f32)), V, *words)
one = np.zeros(SHAPE, bool)
one[0, :, 0, 0] = True
case(TRAIN, "mask of one value", {"mask": one}, V, "one value per channel that counts", "at least 2")
pairs = (("running_mean", "running_var"), ("mean", "var"))
for name, other in (*pairs, *[pair[::-1] for pair in pairs]):
    change = {name: None, other: np.ones(C)}
    words = (f"{name} is None", f"{other} is given", "both or neither")
    case(TRAIN, f"{other} alone", change, V, *words)


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def within(name: str, other: str) -> Change:
    """This argument is memory of another one."""
    return lambda a: {name: a[other].reshape(-1)[3 : 3 + C]}


def overlapping(_: dict[str, Any]) -> dict[str, Any]:
    both = np.ones(C + 2)
    return {"running_mean": both[:C], "running_var": both[2:]}


def unaligned(shape: tuple[int, ...], dtype: Any = f64) -> Any:
    """An array that starts one byte past where its elements should."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


stride_0 = np.lib.stride_tricks.as_strided(np.ones(1), (C,), (0,))
for name, other in (("running_mean", "running_var"), ("running_var", "running_mean")):
    for kind, (value, words) in WRONG_VECTOR.items():
        case((TRAIN, UPDATE), f"{name} {kind}", {name: value}, T, f"{name} ", *words[:1])
    for kind, value in WRONG_SHAPE.items():
        case(TRAIN, f"{name} {kind}", {name: value}, V, name, str(value.shape), f"({C},)")
    for value, words in (
        (read_only(np.ones(C)), ("read-only", "writable", f"{name}.copy()")),
        (stride_0, ("stride 0", "separate elements")),
        (unaligned((C,)), ("aligned", f"{name}.copy()")),
    ):
        case((TRAIN, UPDATE), f"{name} {words[0]}", {name: value}, V, name, *words)
    two_axes = {"channel_axis": (1, 2), "gamma": None, "beta": None, other: np.ones((C, 4))}
    change = {**two_axes, name: np.ones((4, C)).T}
    case(
        TRAIN, f"{name} transposed", change, V, f"{name} has strides (8, 48)", "contiguous", f"{name}.copy()"
    )
    same = lambda a, n=name, o=other: {n: a[o]}  # noqa: E731
    case((TRAIN, UPDATE), f"{name} is {other}", same, V, name, other, "separate arrays")
    for tensor_name in ("x", "out"):
        words = (name, tensor_name, "separate arrays")
        case(TRAIN, f"{name} within {tensor_name}", within(name, tensor_name), V, *words)
    for vector_name in ("gamma", "beta"):
        same = lambda a, n=name, o=vector_name: {n: a[o]}  # noqa: E731
        case(TRAIN, f"{name} is {vector_name}", same, V, name, vector_name, "separate arrays")
    case(UPDATE, f"{name} None", {name: None}, T, f"{name} is None", "array")
case(
    UPDATE, "running_mean 0-D", {"running_mean": np.zeros(())}, V, "running_mean has shape ()", "channel axes"
)
case((TRAIN, UPDATE), "running arrays overlap", overlapping, V, "running_mean", "running_var", "separate")

# ---- out ----

WRITING = (*FORWARD, BACKWARD)


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    return np.lib.stride_tricks.as_strided(np.zeros(shape, f32), SHAPE, strides)


WRONG_OUT: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "list": (x0.tolist(), T, ("list", "array")),
    "bool": (True, T, ("bool", "array")),
    "masked": (np.ma.masked_array(np.zeros(SHAPE, f32)), T, ("masked", "array")),
    "float64": (np.zeros(SHAPE), T, ("float64", "float32")),
    "big-endian": (np.zeros(SHAPE, ">f4"), T, (">f4", "float32")),
    "other shape": (np.zeros((2, 6, 5, 4), f32), V, ("(2, 6, 5, 4)", str(SHAPE))),
    "other rank": (np.zeros((2, 6, 20), f32), V, ("(2, 6, 20)", str(SHAPE))),
    "larger": (np.zeros((3, 6, 4, 5), f32), V, ("(3, 6, 4, 5)", str(SHAPE))),
    "read-only": (read_only(np.zeros(SHAPE, f32)), V, ("read-only", "writable")),
    "stride 0": (strided((6, 4, 5), (0, 80, 20, 4)), V, ("strides (0,",)),
    "overlapping itself": (strided((9, 4, 5), (80, 80, 20, 4)), V, ("strides (80,",)),
    "unaligned": (unaligned(SHAPE, f32), V, ("aligned",)),
    "every second column": (np.zeros((2, 6, 4, 10), f32)[..., ::2], V, ("strides", "empty_like")),
}
for name, (value, error, words) in WRONG_OUT.items():
    case(WRITING, f"out {name}", {"out": value}, error, "out ", *words)
    change = lambda a, v=value: {**saved(residual=np.zeros(SHAPE, f32))(a), "out_residual": v}  # noqa: E731
    case(BACKWARD, f"out_residual {name}", change, error, "out_residual ", *words)


def shifted(name: str) -> Change:
    def change(a: dict[str, Any]) -> dict[str, Any]:
        base = np.zeros(a[name].size + 20, f32)
        base[: a[name].size] = a[name].ravel()
        return {name: base[: a[name].size].reshape(SHAPE), "out": base[20:].reshape(SHAPE)}

    return change


for call, name in ((INFERENCE, "x"), (TRAIN, "x"), (BACKWARD, "dy")):
    words = ("out", name, "separate")
    case(call, f"out shifted against {name}", shifted(name), V, *words)
    for axis in (0, 1, 3):
        back = lambda a, n=name, k=axis: {"out": np.flip(a[n], k)}  # noqa: E731
        case(call, f"out is {name} back along {axis}", back, V, *words)
for call in FORWARD:
    for name in READ[call]:
        case(call, f"{name} within out", within(name, "out"), V, "out", name, "separate")


def crop_in_place(_: dict[str, Any]) -> dict[str, Any]:
    crop = np.zeros((8, C, 8, 8), f32)[:, :, 1:-1, 1:-1]
    return {"x": crop, "out": crop}


base = np.ones(120)
change = {"weights": base[:40].reshape(2, 1, 4, 5), "out": base.view(f32).reshape(SHAPE)}
case(TRAIN, "out over weights", change, V, "out", "weights", "separate")
words = ("out has strides", "empty_like", "out[...] = ")
case(FORWARD, "a crop in place", crop_in_place, V, *words)
x_last = np.asfortranarray(x0)
change = {"x": x_last, "out": np.empty_like(x_last), "gamma": np.ones((N, C))}
words = ("out has strides", "samples, axis 0", "numpy.empty(x.shape, x.dtype)")
case(FORWARD, "samples last", change, V, *words)

# ---- mask, lengths, weights ----

POSITIONED = (INFERENCE, TRAIN, OF, MOMENTS)
for shape, words in {
    (3,): ("(2,)",), (4, 5): ("(2, 4, 5)", str(SHAPE)), (2, 5): ("(2, 4, 5)",), (2, 5, 4): ("(2, 4, 5)",),
    (2, 6, 4, 4): (str(SHAPE),), (2, 1, 4): ("(2, 4, 5)",), (1, 2, 6, 4, 5): (str(SHAPE),), (): ("(2,)",),
}.items():  # fmt: skip
    case(POSITIONED, f"mask {shape}", {"mask": np.ones(shape, bool)}, V, f"mask has shape {shape}", *words)
    change = {"weights": np.ones(shape)}
    words = (f"weights has shape {shape}", *words[:1])
    case((TRAIN, OF, MOMENTS), f"weights {shape}", change, V, *words)
change = {"weights": np.ones(SHAPE)}
case((TRAIN, OF, MOMENTS), "weights per channel", change, V, "weights has shape", str(SHAPE), "channel")
for dtype in ("uint8", "int64", "float32"):
    words = (f"mask has dtype {dtype}", "bool", "mask.astype(bool)")
    case(POSITIONED, f"mask {dtype}", {"mask": np.ones((N, 4, 5), dtype)}, T, *words)
case(POSITIONED, "mask list", {"mask": ["yes", "no"]}, T, "mask is of type list", "bool")
case(POSITIONED, "mask masked", {"mask": np.ma.masked_array(np.ones(N, bool))}, T, "mask", "masked")
change = {"mask": np.ones(N, bool), "lengths": np.ones(N, int), "lengths_axis": 2}
case(POSITIONED, "mask and lengths", change, V, "mask and lengths", "drop one")
change = {"lengths": np.array([3, 4])}
case(POSITIONED, "lengths_axis None", change, V, "lengths_axis is None", str(SHAPE))
case(POSITIONED, "lengths_axis alone", {"lengths_axis": 2}, V, "lengths_axis", "without lengths")
for axis, words in {0: ("samples",), 1: ("channels",), 4: ("-4", "4"), -5: ("-4",)}.items():
    change = {"lengths": np.array([3, 4]), "lengths_axis": axis}
    case(POSITIONED, f"lengths_axis {axis}", change, V, f"lengths_axis is {axis}", *words)
change = {"lengths": np.array([3, 4]), "lengths_axis": 2.0}
case(POSITIONED, "lengths_axis float", change, T, "lengths_axis is 2.0 (float)", "int")
for values, words in {
    (3, 5): ("lengths is 5 at sample 1", "0 to 4"),
    (-1, 4): ("lengths is -1 at sample 0", "0 to 4"),
    (3, 4, 4): ("lengths has shape (3,)", "(2,)"),
}.items():
    change = {"lengths": np.array(values), "lengths_axis": 2}
    case(POSITIONED, f"lengths {values}", change, V, *words)
change = {"lengths": np.array([3.0, 4.0]), "lengths_axis": 2}
case(POSITIONED, "lengths float", change, T, "lengths has dtype float64", "int")
WEIGHTED = (TRAIN, OF, MOMENTS)
for value in (-1.0, np.nan, np.inf):
    change = {"weights": np.array([1.0, value])}
    case(WEIGHTED, f"weights {value}", change, V, "weights holds", "(1,)", "finite values >= 0")
case(WEIGHTED, "weights bool", {"weights": np.ones(N, bool)}, T, "weights has dtype bool", "mask=")
change = {"weights": np.ones(N, np.longdouble)}
case(WEIGHTED, "weights longdouble", change, T, "weights has dtype", "weights.astype(numpy.float64)")
change = {"weights": np.full(N, 0.01)}
case(
    TRAIN,
    "weights of too small a sum",
    change,
    V,
    "weights sum to 0.4",
    "more than running_ddof = 1",
    "larger",
)
change = {"weights": np.full(N, 0.1), "ddof": 5}
case(MOMENTS, "ddof beyond weights", change, V, "ddof is 5", "less than", "weights sum to")
case(WEIGHTED, "weights complex", {"weights": np.ones(N, complex)}, T, "weights has dtype complex128")
case(WEIGHTED, "weights too large", {"weights": np.full(N, 1e308)}, V, "weights")
for change in (
    {"mask": np.ones(N, bool)},
    {"weights": np.ones(N)},
    {"lengths": np.ones(N, int), "lengths_axis": 2},
):
    (name, *_), axis_0 = change, {**change, "channel_axis": 0, "gamma": None, "beta": None}
    case(MOMENTS, f"{name} of channels on axis 0", {**change, "channel_axis": 0}, V, name, "axis 0")

# ---- renorm, parts, keep ----

for name, value, words in (
    ("int", 1, ("renorm is 1 (int)", "mapping")),
    ("str", "yes", ("renorm is 'yes' (str)", "mapping")),
    ("rmax str", {"rmax": "3"}, ("rmax", "'3' (str)", "number")),
    ("mean list", {"mean": [0.0] * C, "std": np.ones(C)}, ("mean", "list")),
):
    case(TRAIN, f"renorm {name}", {"renorm": value}, T, *words)
for name, value, words in (
    ("rmin 2", {"rmin": 2.0}, ("rmin is 2", "[0, 1]")),
    ("rmax 0.5", {"rmax": 0.5}, ("rmax is 0.5", ">= 1")),
    ("dmax -1", {"dmax": -1.0}, ("dmax is -1", ">= 0")),
    ("rmax nan", {"rmax": np.nan}, ("rmax is nan", ">= 1")),
    ("unknown key", {"rmaxx": 3.0}, ("renorm has no option 'rmaxx'", "rmin, rmax, dmax", "mean 'rmax'?")),
    ("mean alone", {"mean": np.zeros(C)}, ("renorm std is absent", "mean is given", "both or neither")),
    ("std 0", {"mean": np.zeros(C), "std": np.zeros(C)}, ("channel 0", "> 0")),
    ("mean nan", {"mean": np.full(C, np.nan), "std": np.ones(C)}, ("nan", "channel 0", "finite")),
    ("std short", {"mean": np.zeros(C), "std": np.ones(C - 1)}, ("renorm std has shape (5,)", "(6,)")),
    ("decay alone", {"decay": 0.9}, ("decay", "mean", "std")),
):
    case(TRAIN, f"renorm {name}", {"renorm": value}, V, *words)
change = {"renorm": True, "running_mean": None, "running_var": None}
case(TRAIN, "renorm without reference", change, V, "renorm", "reference", "running_mean")
change = {"renorm": {"mean": read_only(np.zeros(C)), "std": np.ones(C), "decay": 0.9}}
case(TRAIN, "renorm mean read-only", change, V, "mean", "read-only", "writable")
for value in (0, -1):
    words = (f"virtual_batch_size is {value}", "at least 1", "samples per part")
    case(TRAIN, f"virtual_batch_size {value}", {"virtual_batch_size": value}, V, *words)
for value in (2.0, True, "2"):
    words = ("virtual_batch_size is", type(value).__name__, "int")
    case(TRAIN, f"virtual_batch_size {value!r}", {"virtual_batch_size": value}, T, *words)
x_first = {"x": np.zeros((C, 8), f32), "out": None, "channel_axis": 0}
words = ("virtual_batch_size", "axis 0", "samples")
case(TRAIN, "parts of channels on axis 0", {**x_first, "virtual_batch_size": 2}, V, *words)
for activation in ("relu", "relu6", "sigmoid", "tanh", "silu"):
    words = ("keep is 'y'", repr(activation), "leaky_relu", "keep='x'")
    case(TRAIN, f"keep y with {activation}", {"keep": "y", "activation": activation}, V, *words)
for slope in (0.0, -0.1, 2.0**-61, 2.0**61):
    change = {"keep": "y", "activation": "leaky_relu", "slope": slope}
    case(TRAIN, f"keep y with slope {slope}", change, V, "slope is", "2**-60", "2**60")
change = {"keep": "y", "residual": np.zeros(SHAPE, f32)}
case(TRAIN, "keep y with residual", change, V, "keep is 'y'", "residual", "keep='x'")


def infinite(a: dict[str, Any]) -> dict[str, Any]:
    x = a["x"].copy()
    x[0, 2, 0, 0] = np.inf
    return {"x": x, "on_nonfinite": "raise"}


case(TRAIN, "on_nonfinite raise", infinite, V, "channel 2", "on_nonfinite")

# ---- saved ----

for name, value, words in (
    ("x", x0.astype(f32), ("Saved.of(x, mean, inv_std, gamma, ...)", "batch_norm_train")),
    ("None", None, ("None", "batch_norm_train")),
    ("result", batchnorm.batch_norm_train(x0), ("TrainResult", "result.saved")),
):
    case(SECOND, f"saved {name}", {"saved": value}, T, "saved is", *words)


case(SECOND, "x overwritten", saved(fill), R, "x has been overwritten", "unchanged", "copy")
case(BACKWARD, "y overwritten", saved(fill, keep="y"), R, "y has been overwritten", "unchanged")
case(SECOND, "x overwritten by out", saved(out=True), R, "out", "keep='y'")
case(SECOND, "keep None without x", saved(keep=None), R, "keep=None", "x=")
case(SECOND, "keep None and another x", lambda a: {**saved(keep=None)(a), "x": np.zeros((2, 6, 20), f32)}, V,
     "x has shape (2, 6, 20)", str(SHAPE), "as in the forward")  # fmt: skip
z0 = x0.astype(f32)
change = lambda a: {**saved(keep=None, residual=z0, activation="silu")(a), "x": z0}  # noqa: E731
case(SECOND, "keep None without residual", change, R, "saved holds no residual", "residual=, the forward's")


def residual_in_place(a: dict[str, Any]) -> dict[str, Any]:
    z = a["dy"].copy()
    return {"saved": forward(a["dy"], residual=z, activation="silu", out=z)}


def used_up(output: str, **options: Any) -> Change:
    """After a backward that put its result into what another one would read."""

    def made(a: dict[str, Any]) -> dict[str, Any]:
        x, z = a["dy"].copy(), a["dy"] + 1
        residual = z if output == "out_residual" else None
        y, s = batchnorm.batch_norm_train(x, residual=residual, **options)
        over = z if residual is not None else y if options else x
        batchnorm.batch_norm_backward(a["dy"], s, **{output: over})
        return {"saved": s}

    return made


case(
    SECOND,
    "residual overwritten by out",
    residual_in_place,
    R,
    "out= of the forward was the residual",
    "another",
)
case(SECOND, "x overwritten by backward", used_up("out"), R, "out= of backward was x itself")
case(SECOND, "y overwritten by backward", used_up("out", keep="y"), R, "out= of backward was y itself")
words = ("saved holds no residual", "an output of backward was the residual itself")
case(SECOND, "residual overwritten by backward", used_up("out_residual", activation="silu"), R, *words)
case(BACKWARD, "all_reduce", {"all_reduce": True}, V, "all_reduce is True", "no group")
case(BACKWARD, "all_reduce int", {"all_reduce": 1}, T, "all_reduce is 1 (int)", "True or False")
case(TRAIN, "group", {"group": object()}, T, "group is of type object", "mpi4py", "torch_group")
case(SECOND, "x beside a kept one", {"x": x0.astype(f32)}, V, "x is given", "saved")
case(SECOND, "residual without one", {"residual": x0.astype(f32)}, V, "residual is given", "saved")
for value in (("dx", "dz"), ["dX"], {"gamma"}):
    words = ("needs contains", "'dx', 'dgamma', 'dbeta', 'dresidual'")
    case(BACKWARD, f"needs {value!r}", {"needs": value}, V, *words)
for value in ("dx", 3, True, {"dx": True}, ("dx", 3)):
    case(BACKWARD, f"needs {value!r}", {"needs": value}, T, "needs ", "'dx'")
change = {"needs": ("dgamma",)}
case(BACKWARD, "out without dx", change, V, "out is given", "needs", "'dx'")
change = {"needs": ("dx", "dresidual")}
case(BACKWARD, "dresidual of none", change, V, "needs", "'dresidual'", "residual")
change = {"out_residual": np.zeros(SHAPE, f32)}
case(BACKWARD, "out_residual of none", change, V, "out_residual", "residual")
change = {"ddx": None}
case(DOUBLE, "nothing given", change, V, "ddx, ddgamma, ddbeta and ddresidual", "at least one")
case(DOUBLE, "ddresidual of none", {"ddresidual": np.zeros(SHAPE, f32)}, V, "ddresidual", "residual")
for name in ("ddgamma", "ddbeta"):
    change = lambda a, n=name: {**saved()(a), n: np.ones(C)}  # noqa: E731
    case(DOUBLE, f"{name} of none", change, V, name, name[2:])


# ---- the table ----


def test_the_table_names_each_case_once():
    names = [str(c) for c in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("call", ALL)
def test_the_unchanged_call_is_valid(call):
    function(call)(**arguments(call))


@pytest.mark.parametrize("wrong", CASES, ids=str)
def test_error(wrong):
    values = arguments(wrong.call)
    values.update(wrong.change(values) if callable(wrong.change) else wrong.change)
    values = {name: value for name, value in values.items() if value is not DROP}
    refused(lambda: function(wrong.call)(**values), wrong.error, wrong.words, lambda: values)


# ---- kinds of fault: an error, or right ----


def test_integers_take_a_mask():
    x = np.array([[[7, 7, 9, 0]]], np.uint16)
    mean, var = batchnorm.moments(x, mask=np.array([[1, 1, 1, 0]], bool))
    assert mean.tolist() == [23 / 3] and var.tolist() == [8 / 9]
    y = batchnorm.batch_norm(x, mean, var, mask=x > 0)
    assert y[0, 0, 3] == 0 and y[0, 0, 2] > 0


def test_a_mask_of_the_shape_of_x_counts_each_channel():
    x = np.array([[1, 5], [3, -9999]], f32)
    mask = np.array([[1, 1], [1, 0]], bool)
    mean, var = batchnorm.moments(x, mask=mask)
    assert mean.tolist() == [2, 5] and var.tolist() == [1, 0]
    saved = forward(x, mask=mask)
    assert saved.count.tolist() == [2, 1] and saved.mean.tolist() == [2, 5]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": {"rmax": 3.0, "dmax": 5.0}},
    "parts": {"virtual_batch_size": 2},
    "kept y": {"keep": "y"},
    "a row per sample": {"gamma": np.linspace(0.5, 2, 15).reshape(5, 3), "beta": np.ones((5, 3))},
    "several axes": {"channel_axis": (1, 2)},
    "residual": {"residual": np.linspace(-1, 1, 240).reshape(5, 3, 4, 4), "activation": "relu"},
    "smooth": {"activation": "silu"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("full", [False, True])
def test_what_does_not_count_has_no_influence(options, full):
    # In every variant, forward, backward and second order: NaN where nothing counts changes no bit elsewhere.
    generator = np.random.default_rng(1)
    x, dy, ddx = generator.standard_normal((3, 5, 3, 4, 4))
    mask = generator.random((5, 3, 4, 4) if full else (5, 1, 4, 4)) < 0.7
    if "channel_axis" in options and not full:
        mask = generator.random((5, 4)) < 0.7
    spread = mask[:, None, None] if mask.ndim == 2 else mask
    off = ~np.broadcast_to(spread, x.shape)
    results = []
    for value in (0.0, np.nan):
        channels = (3, 4) if "channel_axis" in options else 3
        running = {"running_mean": np.zeros(channels), "running_var": np.ones(channels)}
        for a in (x, dy, ddx):
            a[off] = value
        y, saved = batchnorm.batch_norm_train(x, mask=mask, **running, **options)
        assert (y[off] == 0).all()
        g = batchnorm.batch_norm_backward(dy, saved, needs=("dx", "dgamma", "dbeta"))
        assert (g.dx[off] == 0).all()
        arrays = [y, *g, saved.mean, saved.var, saved.count, *running.values()]
        if options.get("keep") != "y":
            second = batchnorm.batch_norm_double_backward(dy, saved, ddx=ddx)
            arrays += [a for a in second if a is not None]
        results.append([a.tobytes() for a in arrays])
        assert all(np.isfinite(a).all() for a in arrays)
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint32", "uint64", "longdouble", "bool"])
@pytest.mark.parametrize("name", ["x", "mean", "gamma", "residual"])
def test_the_advice_of_an_error_works_and_loses_no_digit(dtype, name):
    # K3: a variance of 1 at 2^24 and beyond must survive what the message says to do.
    big = 1 if dtype == "bool" else 100 if dtype == "int8" else 2**31 - 3 if "32" in dtype else 2**53 - 3
    values = np.full((4, 3), big).astype(dtype)
    values[::2] = not big if dtype == "bool" else big + 2
    wrong = values if name in ("x", "residual") else np.abs(values[0])
    call = {"x": np.ones((4, 3)), "mean": np.ones(3), "var": np.ones(3), name: wrong}
    with pytest.raises(TypeError) as caught:
        batchnorm.batch_norm(**call)
    advice = str(caught.value).split("; use ")[1].split(",")[0]
    mended = eval(advice, {"numpy": np, name: wrong, "x": call["x"]})
    assert (mended.astype(np.longdouble) == wrong.astype(np.longdouble)).all(), advice
    if name == "residual":
        call["x"] = call["x"].astype(mended.dtype)
    batchnorm.batch_norm(**{**call, name: mended})


# ---- what a message says to do, done to the letter ----

X4 = np.random.default_rng(5).normal(3, 2, (3, 4, 5, 6))
X5 = np.random.default_rng(6).normal(3, 2, (8, 3, 5, 2))
GREY = np.arange(60, dtype=np.uint8).reshape(3, 4, 5, 1)
PARTS = np.random.default_rng(7).normal(size=(12, 3))
ONES = np.ones(4)


train, moments = batchnorm.batch_norm_train, batchnorm.moments


def near(got: Any, want: Any) -> bool:
    return bool(np.allclose(got, want, rtol=1e-12, atol=1e-12))


def per_sample(channel_axis: int) -> Any:
    return [moments(X4[i : i + 1], channel_axis=channel_axis).mean for i in range(3)]


def of_parts(**options: Any) -> Any:
    return train(X4, **options).saved.mean


def affine(gamma: Any, **options: Any) -> Any:
    return train(X5, gamma, **options).y


def used(x: Any, change: Callable[[Any], None] | None = None, **options: Any) -> Any:
    """A backward pass after x (or what takes its place) was changed."""
    x = x.copy()
    y, saved = train(x, **options)
    if change is not None:
        change(x)
    return batchnorm.batch_norm_backward(np.ones_like(y), saved).dx


G53 = np.arange(15.0).reshape(5, 3)
# The call, what its error says, and whether doing that gives what is right.
ADVICE: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
    "axes with the samples": (
        lambda: moments(X4, axis=(0, 2, 3)), "pass channel_axis=1, what it leaves out",
        lambda: near(moments(X4, channel_axis=1).mean, X4.mean((0, 2, 3)))),
    "negative axes": (
        lambda: moments(X4, axis=(-4, -3, -2)), "pass channel_axis=3, what it leaves out",
        lambda: near(moments(X4, channel_axis=3).mean, X4.mean((0, 1, 2)))),
    "two axes": (
        lambda: moments(X4, axis=[0, 1]), "pass channel_axis=(2, 3), what it leaves out",
        lambda: near(moments(X4, channel_axis=(2, 3)).mean, X4.mean((0, 1)))),
    "axis 0": (
        lambda: moments(X4, axis=0), "pass channel_axis=(1, 2, 3), what it leaves out",
        lambda: near(moments(X4, channel_axis=(1, 2, 3)).mean, X4.mean(0))),
    "all but axis 0": (
        lambda: moments(X4, axis=(1, 2, 3)), "pass channel_axis=0, what it leaves out",
        lambda: near(moments(X4, channel_axis=0).mean, X4.mean((1, 2, 3)))),
    "all axes": (
        lambda: moments(X4, axis=(0, 1, 2, 3)), "pass x.reshape(-1, 1)",
        lambda: near(moments(X4.reshape(-1, 1)).mean, X4.mean())),
    "instance norm, NCHW": (
        lambda: moments(X4, axes=(2, 3)), "pass x[i : i + 1] and channel_axis=1:",
        lambda: near(per_sample(1), X4.mean((2, 3)))),
    "instance norm, NHWC": (
        lambda: moments(X4, axes=(1, 2)), "pass x[i : i + 1] and channel_axis=3:",
        lambda: near(per_sample(3), X4.mean((1, 2)))),
    "instance norm in training": (
        lambda: train(X4, axis=(2, 3)), "pass virtual_batch_size=1 and channel_axis=1:",
        lambda: near(of_parts(virtual_batch_size=1, channel_axis=1), X4.mean((2, 3)))),
    "channel_axis with the samples": (
        lambda: moments(X4, channel_axis=(0, 1)), "sample pass x[i : i + 1] and channel_axis=1",
        lambda: near(per_sample(1), X4.mean((2, 3)))),
    "reduction_axes": (
        lambda: moments(X4, reduction_axes=(0, 1, 2)), "; pass channel_axis=3, what it leaves out",
        lambda: near(moments(X4, channel_axis=3).mean, X4.mean((0, 1, 2)))),
    "scale": (
        lambda: batchnorm.dataset_moments(GREY, scale=1 / 255, channel_axis=-1), "pass max_value=255.0,",
        lambda: near(batchnorm.dataset_moments(GREY, max_value=255.0, channel_axis=-1).mean,
                     GREY.mean() / 255)),
    "rescale": (
        lambda: batchnorm.normalize_images(GREY, [0.5], [0.25], rescale=1 / 127.5), "pass max_value=127.5,",
        lambda: near(batchnorm.normalize_images(GREY, [0.5], [0.25], max_value=127.5, dtype=f64),
                     (GREY.transpose(0, 3, 1, 2) / 127.5 - 0.5) * 4)),
    "a scale that is no number": (
        lambda: batchnorm.dataset_moments(GREY, scale=ONES, channel_axis=-1), "pass max_value=1 / scale,",
        lambda: near(batchnorm.dataset_moments(GREY, max_value=1 / 0.5, channel_axis=-1).mean,
                     GREY.mean() * 0.5)),
    "momentum of new values": (
        lambda: batchnorm.effective_decay(momentum=1e-7), "pass decay=0.9999999;",
        lambda: batchnorm.effective_decay(0.9999999) == 1 - 1e-7),
    "momentum of old values": (
        lambda: batchnorm.effective_decay(momentum=0.9999999), "pass decay=0.9999999",
        lambda: batchnorm.effective_decay(0.9999999) == 0.9999999),
    "momentum of many digits": (
        lambda: batchnorm.effective_decay(momentum=0.00012345678), "pass decay=0.99987654322;",
        lambda: batchnorm.effective_decay(0.99987654322) == 1 - 0.00012345678),
    "activation of another name": (
        lambda: train(X4, activation="Swish"), "did you mean 'silu'?",
        lambda: train(X4, activation="silu")),
    "NWC": (
        lambda: moments(X4[0], data_format="NWC"), "did you mean 'NLC'?",
        lambda: near(moments(X4[0], data_format="NLC").mean, X4[0].mean((0, 1)))),
    "NCW": (
        lambda: moments(X4[0], data_format="NCW"), "did you mean 'NCL'?",
        lambda: near(moments(X4[0], data_format="NCL").mean, X4[0].mean((0, 2)))),
    "HWC": (
        lambda: moments(X4[0], data_format="HWC"), "pass x[None] with 'NHWC'",
        lambda: near(moments(X4[0][None], data_format="NHWC").mean, X4[0].mean((0, 1)))),
    "gamma of another order": (
        lambda: affine(G53, channel_axis=(2, 1)),
        "to match channel axes (1, 2) of x (8, 3, 5, 2); use gamma.transpose(1, 0)",
        lambda: near(affine(G53.transpose(1, 0), channel_axis=(2, 1)),
                     affine(None, channel_axis=(2, 1)) * G53.T[None, ..., None])),
    "flat gamma": (
        lambda: affine(G53.T.reshape(-1), channel_axis=(1, 2)), "use gamma.reshape(3, 5)",
        lambda: near(affine(G53.T.reshape(-1).reshape(3, 5), channel_axis=(1, 2)),
                     affine(None, channel_axis=(1, 2)) * G53.T[None, ..., None])),
    "gamma with axes of length 1": (
        lambda: affine(np.arange(3.0).reshape(1, 3, 1, 1)), "use gamma.reshape(-1)",
        lambda: near(affine(np.arange(3.0).reshape(1, 3, 1, 1).reshape(-1)),
                     affine(None) * np.arange(3.0)[:, None, None])),
    "running arrays of another order": (
        lambda: train(X5, running_mean=G53.copy(), running_var=G53.copy(), channel_axis=(1, 2)),
        "use running_mean.transpose(1, 0).copy() and keep it",
        lambda: train(X5, running_mean=G53.transpose(1, 0).copy(),
                                           running_var=G53.transpose(1, 0).copy(), channel_axis=(1, 2))),
    "parts of one value": (
        lambda: train(PARTS, virtual_batch_size=1),
        "virtual_batch_size is 1 and a part of x (12, 3) has one value per channel",
        lambda: train(PARTS, virtual_batch_size=2) and train(PARTS)),
    "one sample is no part": (
        lambda: train(PARTS[:1], virtual_batch_size=4), "x has shape (1, 3) with one value",
        lambda: train(PARTS[:2], virtual_batch_size=4)),
    "weights of channels": (
        lambda: moments(X4, weights=ONES), "expected (3,), (3, 5, 6) or (3, 1, 5, 6), with 1",
        lambda: [moments(X4, weights=np.ones(s)) for s in ((3,), (3, 5, 6), (3, 1, 5, 6), (1, 1, 1, 6))]),
    "weights of the last axis": (
        lambda: moments(X4, weights=np.arange(6.0)), "use weights.reshape(1, 1, 1, 6)",
        lambda: near(moments(X4, weights=np.arange(6.0).reshape(1, 1, 1, 6)).mean,
                     np.average(X4, axis=3, weights=np.arange(6.0)).mean((0, 2)))),
    "x overwritten": (lambda: used(X5, fill), "a copy, or with keep='y'", lambda: used(X5, fill, keep="y")),
    "old words of backward": (
        lambda: batchnorm.batch_norm_backward(X5, forward(X5), gamma=ONES),
        "batch_norm_train() takes it; write batch_norm_backward(dy, saved) with y, saved = batch_norm_train(",
        lambda: batchnorm.batch_norm_backward(X5, train(X5, ONES[:3], ONES[:3])[1])),
    "the old long form": (
        lambda: batchnorm.batch_norm_backward(X5, X5, mean=ONES, inv_std=ONES, gamma=ONES),
        "saved = Saved.of(x, mean, inv_std, gamma, ...)",
        lambda: batchnorm.batch_norm_backward(X5, Saved.of(X5, ONES[:3], ONES[:3], ONES[:3]))),
    "renorm's reference": (
        lambda: train(X5, renorm={"mean": np.zeros(3, int), "std": np.ones(3)}),
        "use renorm['mean'].astype(numpy.float64)",
        lambda: train(X5, renorm={"mean": np.zeros(3), "std": np.ones(3)})),
    "renorm's limits": (
        lambda: train(X5, renorm={"mean": np.zeros(3), "std": np.ones(3), "r_max": 3.0}),
        "did you mean 'rmax'?",
        lambda: train(X5, renorm={"mean": np.zeros(3), "std": np.ones(3), "rmax": 3.0})),
    "by position": (
        lambda: moments(X4, 1), "takes by position x, and was given 2 positional arguments; pass the others "
        "by name: channel_axis=", lambda: moments(X4, channel_axis=1)),
    "Moments by position": (
        lambda: batchnorm.Moments(1), "takes by position nothing", lambda: batchnorm.Moments(channel_axis=1)),
    "mask of Moments": (
        lambda: batchnorm.Moments(where=X4 > 3), "Moments.update() takes it: it is called mask there",
        lambda: batchnorm.Moments().update(X4, mask=X4 > 3)),
    "where of an update": (
        lambda: batchnorm.Moments().update(X4, where=X4 > 3), "it is called mask here",
        lambda: batchnorm.Moments().update(X4, mask=X4 > 3)),
    "nodata of an update": (
        lambda: batchnorm.Moments().update(X4, nodata=0), "Moments() takes it",
        lambda: batchnorm.Moments(nodata=0).update(X4)),
    "unbiased": (
        lambda: batchnorm.Moments(unbiased=True), "Moments.variance() takes it: pass ddof=1 for True",
        lambda: near(batchnorm.Moments().update(X4).variance(ddof=1), X4.var((0, 2, 3), ddof=1))),
    "axis of fold": (
        lambda: batchnorm.fold(np.eye(4), None, ONES, ONES, eps=0, axis=0), "it is called out_axis here",
        lambda: batchnorm.fold(np.eye(4), None, ONES, ONES, eps=0, out_axis=0)),
    "kernel of fold": (
        lambda: batchnorm.fold(kernel=np.eye(4), bias=None), "it is called weight here",
        lambda: batchnorm.fold(weight=np.eye(4), bias=None, mean=ONES, var=ONES, eps=0, out_axis=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_advice_works_when_it_is_followed(name):
    wrong, words, followed = ADVICE[name]
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        wrong()
    assert words in str(caught.value)
    result = followed()
    assert result if isinstance(result, bool) else result is not None


@pytest.mark.parametrize("call", [batchnorm.Moments, batchnorm.BatchNorm])
def test_no_axis_is_named_where_the_rank_is_not_known(call):
    for axes in ((0, 1), (2, 3), (1, 2), (0, 2), (0, 2, 3)):
        with pytest.raises(TypeError, match="the axes that it leaves out") as caught:
            call(axis=axes)
        assert not re.search(r"channel_axis=\W?\d", str(caught.value).split("axes to reduce")[1])
        if 0 in axes:
            with pytest.raises(ValueError, match="those that they leave out as channel_axis="):
                call(channel_axis=axes)


KEPT = {"relu": {"activation": "relu"}, "residual": {"residual": X5}, "kept y": {"keep": "y"},
        "slope": {"activation": "leaky_relu", "slope": -1.0}}  # fmt: skip


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_keep_y_is_no_advice_where_it_is_refused(options):
    for change in (fill, None):
        x = X5.copy()
        with pytest.raises(RuntimeError) as caught:
            y, saved = train(x, out=None if change else x, **options)
            fill(y if options.get("keep") == "y" else x)
            batchnorm.batch_norm_backward(X5, saved)
        assert "keep='y'" not in str(caught.value)
    own = Saved.of(x, ONES[:3], ONES[:3])
    x[...] = 3
    with pytest.raises(RuntimeError, match=r"call the forward with a copy$"):
        batchnorm.batch_norm_backward(X5, own)


def test_a_residual_that_was_overwritten_is_called_so():
    z = X5.copy()
    saved = forward(X5, residual=z, activation="silu")
    fill(z)
    with pytest.raises(RuntimeError, match=r"^residual has been overwritten.* with a copy$"):
        batchnorm.batch_norm_backward(X5, saved)


def test_integers_beyond_2_to_the_53_are_offset_first():
    x = np.arange(2**60, 2**60 + 8, dtype=np.int64).reshape(4, 2)
    with pytest.raises(TypeError, match=r"exact up to 2\*\*53: of larger values first subtract an offset"):
        moments(x)
    assert moments((x - 2**60).astype(np.float64)).var.tolist() == [5, 5]


ENTRANCES: dict[str, Callable[..., Any]] = {
    "moments": lambda **k: moments(X4, **k), "Moments": batchnorm.Moments,
    "Moments.update": lambda **k: batchnorm.Moments().update(X4, **k),
    "Moments.variance": lambda **k: batchnorm.Moments().update(X4).variance(**k),
    "dataset_moments": lambda **k: batchnorm.dataset_moments(X4, **k),
    "normalize_images": lambda **k: batchnorm.normalize_images(GREY, [0.5], [0.2], **k),
    "effective_decay": lambda **k: batchnorm.effective_decay(0.9, **k),
    "fold": lambda **k: batchnorm.fold(np.eye(4), None, ONES, ONES, eps=0, out_axis=0, **k),
    "freeze": lambda **k: batchnorm.freeze([], **k),
    "no_update": lambda **k: batchnorm.no_update([], **k).__enter__(),
    "recalibrate": lambda **k: batchnorm.recalibrate([], abs, [], **k),
    "diagnose": lambda **k: batchnorm.diagnose([], abs, [], **k),
    "batch_norm": lambda **k: batchnorm.batch_norm(X4, ONES, ONES, **k),
    "Saved.of": lambda **k: Saved.of(X4, ONES, ONES, **k),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRANCES)
def test_every_entrance_translates(name):
    for keyword, words in {"device": "the arrays say where", "zzz": "it has "}.items():
        with pytest.raises(TypeError) as caught:
            ENTRANCES[name](**{keyword: 1})
        assert str(caught.value).startswith(f"{name}() has no argument '{keyword}'; {words}")


def test_an_entrance_is_a_function_and_its_own_errors_are_left_alone():
    assert inspect.isroutine(batchnorm.moments) and batchnorm.moments.__name__ == "moments"
    assert [*inspect.signature(batchnorm.Moments.update).parameters][:3] == ["self", "x", "mask"]
    assert [*inspect.signature(batchnorm.Moments).parameters] == ["channel_axis", "data_format", "nodata"]
    assert pickle.loads(pickle.dumps(batchnorm.moments)) is batchnorm.moments
    assert not hasattr(batchnorm.moments, "keywords")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        moments()
    with pytest.raises(TypeError, match="abs\\(\\) takes exactly one argument"):
        batchnorm.dataset_moments([X4], transform=lambda piece: abs(piece, piece))


class Foreign:
    """Of a module that does not name it."""


Foreign.__module__ = "batchnorm.somewhere"


def test_what_a_message_calls_a_type_is_its_name():
    for value, name in {
        Foreign(): "batchnorm.somewhere.Foreign",
        pathlib.Path(): "pathlib.PosixPath",
    }.items():
        with pytest.raises(TypeError, match=f"^x is of type {name}, expected"):
            moments(value)
    with pytest.raises(TypeError, match=r"^x is of type numpy\.ma\.MaskedArray|^x is a masked array"):
        batchnorm.batch_norm(np.ma.ones((2, 4)), ONES, ONES)
    with pytest.raises(TypeError, match=r"^ddof is of type int, expected|^ddof is"):
        moments(X4, ddof=np.ma.ones(2))
    with pytest.raises(ValueError, match=r"^eps is too large"):
        batchnorm.batch_norm(X4, ONES, ONES, eps=10**5000)


def test_masks_are_read_by_rank_never_by_size():
    # K5: where samples, channels and steps have one length, nothing but the rank tells.
    x = np.random.default_rng(2).standard_normal((4, 4, 4))
    keep = np.array([True, True, False, True])
    assert np.allclose(batchnorm.moments(x, mask=keep).mean, x[keep].mean(axis=(0, 2)))
    steps = np.broadcast_to(keep, (4, 4))
    assert np.allclose(batchnorm.moments(x, mask=steps).mean, x[:, :, keep].mean(axis=(0, 2)))
    columns = np.broadcast_to(keep[:, None], (1, 4, 1))
    mean = batchnorm.moments(x, mask=columns).mean
    assert np.isnan(mean[2]) and np.allclose(mean[keep], x.mean(axis=(0, 2))[keep])
    assert np.allclose(batchnorm.moments(x, channel_axis=2, mask=steps).mean, x.mean(axis=(0, 1)), atol=2)
    want = x[:, keep].mean(axis=(0, 1))
    assert np.allclose(batchnorm.moments(x, channel_axis=2, mask=steps).mean, want)


@pytest.mark.parametrize("name", ["mean", "gamma"])
def test_messages_of_several_channel_axes_speak_of_them(name):
    x = np.ones((2, 3, 4, 5), f32)
    call = {"x": x, "mean": np.zeros((3, 4)), "var": np.ones((3, 4)), name: np.ones(12)}
    with pytest.raises(ValueError, match=rf"{name} has shape \(12,\), expected \(3, 4\)"):
        batchnorm.batch_norm(**call, channel_axis=(1, 2))
    values = np.ones((3, 4))
    values[2, 1] = np.nan
    with pytest.raises(ValueError, match=rf"{name} is nan at channel \(2, 1\)"):
        batchnorm.batch_norm(**{**call, name: values}, channel_axis=(1, 2))


def test_images_in_other_units_than_their_statistics():
    # K4: statistics of 0..255 where those of x / 255 belong.
    x = np.array([[[[0], [255]]]], np.uint8)
    with pytest.raises(ValueError, match="max_value"):
        batchnorm.normalize_images(x, [127.5], [127.5])
    assert batchnorm.normalize_images(x, [127.5], [127.5], max_value=1).ravel().tolist() == [-1, 1]


def test_backward_is_that_of_the_forward_whatever_becomes_of_its_arguments():
    # K4: gamma, beta, mask and weights may change before backward; x may not, and that is noticed.
    generator = np.random.default_rng(3)
    x, dy = generator.standard_normal((2, 8, 3, 5))
    gamma, beta, mask, weights = np.full(3, 2.0), np.ones(3), generator.random((8, 5)) < 0.8, np.ones(8)
    want = batchnorm.batch_norm_backward(dy, forward(x, gamma=gamma, beta=beta, mask=mask, weights=weights))
    saved = forward(x, gamma=gamma, beta=beta, mask=mask, weights=weights)
    gamma *= 2
    beta += 1
    mask[...] = True
    weights[...] = 3
    for a, b in zip(want, batchnorm.batch_norm_backward(dy, saved), strict=True):
        assert (a == b).all()
    x *= 2
    with pytest.raises(RuntimeError, match="overwritten"):
        batchnorm.batch_norm_backward(dy, saved)


def test_options_are_keyword_only_and_the_long_form_is_spelt_out():
    a = arguments(INFERENCE)
    with pytest.raises(TypeError, match=r"batch_norm\(\).* positional"):
        batchnorm.batch_norm(a["x"], a["mean"], a["var"], a["gamma"], a["beta"], 1e-5)
    with pytest.raises(TypeError, match=r"Saved\.of\(x, mean, inv_std, gamma, \.\.\.\)"):
        batchnorm.batch_norm_backward(a["x"], a["x"], a["mean"], a["var"], a["gamma"])
    with pytest.raises(TypeError, match="missing"):
        batchnorm.batch_norm(a["x"])
    with pytest.raises(TypeError, match=r"multiple values|twice"):
        batchnorm.batch_norm(a["x"], a["mean"], a["var"], mean=a["mean"])


@pytest.mark.parametrize("call", FORWARD)
def test_an_empty_batch_is_checked_too(call):
    values = {**arguments(call), "x": np.zeros((0, C), f32), "out": None}
    function(call)(**values)
    with pytest.raises(ValueError, match="channel_axis is 5"):
        function(call)(**values, channel_axis=5)
    with pytest.raises(ValueError, match="gamma has shape"):
        function(call)(**{**values, "gamma": np.ones(C + 1)})


def test_raise_on_nonfinite_writes_nothing_in_place_either():
    x = np.random.default_rng(4).standard_normal((4, 3))
    x[1, 1] = np.nan
    before, running = x.copy(), {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    with pytest.raises(ValueError, match="on_nonfinite"):
        batchnorm.batch_norm_train(x, **running, on_nonfinite="raise", out=x)
    assert x.tobytes() == before.tobytes()
    assert running["running_mean"].tolist() == [0, 0, 0] and running["running_var"].tolist() == [1, 1, 1]
    saved = forward(x, **running, on_nonfinite="skip")
    assert not saved.updated and running["running_var"].tolist() == [1, 1, 1]
