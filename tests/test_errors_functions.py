"""Every error of the functions: right exception, a message with argument, got, expected, nothing changed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import batchnorm
import numpy as np
import pytest

SHAPE = (2, 6, 4, 5)
CHANNELS = 6
MOST_SECONDS = 0.05

# What appears for "expected" and "got" in messages about many arguments.
VECTOR = r"float32 or float64"
ARRAY = r"ndarray|array"
TENSOR = r"float32, float64, float16 or bfloat16"
WRITABLE = r"writable|read-only"


class Case(NamedTuple):
    name: str
    function: str
    change: dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]  # replaces arguments of a valid call
    error: type[Exception]
    match: tuple[str, ...]  # each is searched for in the message: argument, got, expected

    def __str__(self):
        return f"{self.function}-{self.name}"


class Drop:
    """Stands for an argument that is left out."""


def arguments(function):
    """A valid call's arguments, freshly made."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal(SHAPE).astype(np.float32)
    gamma, beta = np.full(CHANNELS, 1.5, np.float32), np.full(CHANNELS, 0.25, np.float32)
    mean, var = np.full(CHANNELS, 0.5), np.full(CHANNELS, 2.0)
    running = {"running_mean": np.zeros(CHANNELS, np.float32), "running_var": np.ones(CHANNELS, np.float32)}
    if function == "batch_norm":
        return dict(
            x=x, mean=mean, var=var, gamma=gamma, beta=beta, eps=1e-3, activation=None, out=np.ones_like(x)
        )
    if function == "batch_norm_train":
        return dict(
            x=x, gamma=gamma, beta=beta, **running, decay=0.5, running_ddof=1, eps=1e-3, out=np.ones_like(x)
        )
    if function == "batch_norm_backward":
        return dict(
            dy=x[::-1].copy(),
            x=x,
            mean=mean,
            inv_std=var,
            gamma=gamma,
            beta=beta,
            stats="batch",
            out=np.ones_like(x),
        )
    if function in ("moments", "activation_mask_bytes"):
        return dict(x=x)
    if function == "update_running":
        return dict(**running, mean=mean, var=var, decay=0.5, count=40, ddof=1)
    raise AssertionError(function)


THREADED = ("batch_norm", "batch_norm_train", "batch_norm_backward", "moments")
TENSOR_FUNCTIONS = (*THREADED, "activation_mask_bytes")
FUNCTIONS = (*TENSOR_FUNCTIONS, "update_running")
CASES: list[Case] = []


def case(functions, name, change, error, *match):
    for function in [functions] if isinstance(functions, str) else functions:
        CASES.append(Case(name, function, change, error, match))


# ---- x -------------------------------------------------------------------------------------------

x0 = np.arange(240.0).reshape(SHAPE)
STRUCTURED = np.zeros(SHAPE, [("a", "f4"), ("b", "f4")])
WRONG_X = {
    "list": (x0.tolist(), "list", ARRAY),
    "tuple": ((1.0, 2.0), "tuple", ARRAY),
    "None": (None, "None", ARRAY),
    "str": ("x", "str", ARRAY),
    "float": (3.0, "float", ARRAY),
    "NumPy scalar": (np.float32(3), "float32", ARRAY),
    "memoryview": (memoryview(x0), "memoryview", ARRAY),
    "masked": (np.ma.masked_array(x0.astype(np.float32), x0 > 7), "[Mm]asked", ARRAY),
    "int64": (x0.astype(np.int64), "int64", TENSOR),
    "int8": (x0.astype(np.int8), "int8", TENSOR),
    "uint8": ((x0 % 256).astype(np.uint8), "uint8", TENSOR),
    "bool": (x0 > 7, "bool", TENSOR),
    "complex64": (x0.astype(np.complex64), "complex64", TENSOR),
    "complex128": (x0.astype(np.complex128), "complex128", TENSOR),
    "longdouble": (x0.astype(np.longdouble), "float128|longdouble|float96", TENSOR),
    "object": (x0.astype(object), "object", TENSOR),
    "str array": (x0.astype("U8"), "U8", TENSOR),
    "bytes array": (x0.astype("S8"), "S8", TENSOR),
    "structured": (STRUCTURED, "'a'", TENSOR),
    "datetime": (x0.astype("M8[s]"), "datetime64", TENSOR),
    "timedelta": (x0.astype("m8[s]"), "timedelta64", TENSOR),
    "big-endian float32": (x0.astype(">f4"), ">f4", "byte order"),
    "big-endian float64": (x0.astype(">f8"), ">f8", "byte order"),
    "big-endian float16": (x0.astype(">f2"), ">f2", "byte order"),
}
IMAGES = ("batch_norm", "moments")  # they take some integers: test_images.py
for name, (value, got, expected) in WRONG_X.items():
    for function in TENSOR_FUNCTIONS:
        if name == "uint8" and function in IMAGES:
            continue
        change = (
            {"x": value} if function in ("moments", "activation_mask_bytes") else {"x": value, "out": None}
        )
        case(function, f"x {name}", change, TypeError, r"\bx\b", got, expected)
    change = {"dy": value, "out": None}
    case("batch_norm_backward", f"dy {name}", change, TypeError, r"\bdy\b", got, expected)

f32 = np.float32
for shape in ((), (6,)):
    change = {"x": np.zeros(shape, f32)}
    case(
        TENSOR_FUNCTIONS,
        f"x {len(shape)}-D",
        change,
        ValueError,
        r"\bx\b",
        re.escape(str(shape)),
        r"at least 2 dim|>= 2",
    )
for shape in ((2, 0), (2, 0, 4), (0, 0, 3)):
    change = {"x": np.zeros(shape, f32)}
    case(
        TENSOR_FUNCTIONS,
        f"x {shape}",
        change,
        ValueError,
        r"\bx\b",
        re.escape(str(shape)),
        r"0 channels.*at least 1",
    )

# ---- axis and data_format ------------------------------------------------------------------------

for axis in (4, 7, -5, 2**31, -(2**31), 2**62):
    case(
        TENSOR_FUNCTIONS,
        f"axis {axis}",
        {"axis": axis},
        ValueError,
        r"\baxis\b",
        re.escape(str(axis)),
        "-4.*4",
    )
case(TENSOR_FUNCTIONS, "axis 2**70", {"axis": 2**70}, ValueError, r"\baxis\b", "int|1.18059e\\+21")
case(TENSOR_FUNCTIONS, "axis -2**70", {"axis": -(2**70)}, ValueError, r"\baxis\b", "int|1.18059e\\+21")
NOT_AXES = {"float": 1.0, "bool": True, "NumPy bool": np.True_, "None": None, "str": "1", "list": [1]}
for name, axis in {**NOT_AXES, "list": [0, 1], "array": np.array([1])}.items():
    got = type(axis).__name__ if axis is not None else "None"
    case(TENSOR_FUNCTIONS, f"axis {name}", {"axis": axis}, TypeError, r"\baxis\b", got, r"\bint\b")

for name in ("nhwc", "NWHC", "NCHWC", "", "nchw", "channels-last", "Channels_Last", "NHWC "):
    case(
        TENSOR_FUNCTIONS,
        f"data_format {name!r}",
        {"data_format": name},
        ValueError,
        "data_format",
        repr(name),
        "NHWC",
    )
for name, value in {"int": 1, "bool": False, "bytes": b"NHWC", "list": ["NHWC"]}.items():
    got = type(value).__name__
    case(
        TENSOR_FUNCTIONS,
        f"data_format {name}",
        {"data_format": value},
        TypeError,
        "data_format",
        got,
        "str|NHWC",
    )
for name, rank in {"NC": 2, "NCL": 3, "NLC": 3, "NCDHW": 5, "NDHWC": 5}.items():
    match = ("data_format", f"{rank} dim", re.escape(str(SHAPE)))
    case(TENSOR_FUNCTIONS, f"data_format {name} of 4-D", {"data_format": name}, ValueError, *match)
for axis in (1, 3):
    both = {"axis": axis, "data_format": "NCHW"}
    case(
        TENSOR_FUNCTIONS,
        f"data_format with axis {axis}",
        both,
        TypeError,
        r"\baxis\b",
        "data_format",
        "one of them",
    )

# ---- per-channel arrays that are read ------------------------------------------------------------

READ = {
    "batch_norm": ("mean", "var", "gamma", "beta"),
    "batch_norm_train": ("gamma", "beta"),
    "batch_norm_backward": ("mean", "inv_std", "gamma", "beta"),
    "update_running": ("mean", "var"),
}
ten_d = np.zeros((0,) * 10)
WRONG_KIND = {
    "list": ([1.0] * CHANNELS, "list", "array"),
    "tuple": ((1.0,) * CHANNELS, "tuple", "array"),
    "float": (1.0, "float", "array"),
    "str": ("ones", "str", "array"),
    "NumPy scalar": (np.float64(1), "float64", "array"),
    "masked": (np.ma.masked_array(np.ones(CHANNELS), [0, 1] * 3), "[Mm]asked", "array"),
    "int64": (np.ones(CHANNELS, np.int64), "int64", VECTOR),
    "uint8": (np.ones(CHANNELS, np.uint8), "uint8", VECTOR),
    "bool": (np.ones(CHANNELS, bool), "bool", VECTOR),
    "complex": (np.ones(CHANNELS, complex), "complex128", VECTOR),
    "float16": (np.ones(CHANNELS, np.float16), "float16", VECTOR),
    "longdouble": (np.ones(CHANNELS, np.longdouble), "float128|longdouble|float96", VECTOR),
    "object": (np.ones(CHANNELS, object), "object", VECTOR),
    "str array": (np.full(CHANNELS, "1"), "U1", VECTOR),
    "big-endian": (np.ones(CHANNELS, ">f8"), ">f8", VECTOR),
}
WRONG_SHAPE = {
    "short": np.ones(CHANNELS - 1),
    "long": np.ones(CHANNELS + 1),
    "length 1": np.ones(1),
    "length of another axis": np.ones(5),
    "empty": np.ones(0),
    "0-D": np.ones(()),
    "2-D": np.ones((CHANNELS, 1)),
    "keepdims": np.ones((1, CHANNELS, 1, 1)),
    "empty 10-D": ten_d,
}
for function, names in READ.items():
    for name in names:
        word = rf"\b{name}\b"
        for kind, (value, got, expected) in WRONG_KIND.items():
            case(function, f"{name} {kind}", {name: value}, TypeError, word, got, expected)
        for kind, value in WRONG_SHAPE.items():
            expected = rf"\({CHANNELS},\)|one-dimensional"
            case(
                function,
                f"{name} {kind}",
                {name: value},
                ValueError,
                word,
                re.escape(str(value.shape)),
                expected,
            )
        if name in ("mean", "var", "inv_std"):
            case(function, f"{name} None", {name: None}, TypeError, word, "None", "expected")
        if function in ("batch_norm", "batch_norm_train") or name in ("gamma", "beta"):
            for value in (np.nan, np.inf, -np.inf):
                for dtype in (np.float32, np.float64):
                    vector = np.ones(CHANNELS, dtype)
                    vector[-1] = value
                    match = (word, rf"{value}.*{CHANNELS - 1}", "finite")
                    case(function, f"{name} {value} {dtype.__name__}", {name: vector}, ValueError, *match)
for function in ("batch_norm", "update_running"):
    for value in (-1.0, -1e-30, -5e-324):
        vector = np.ones(CHANNELS)
        vector[2] = value
        case(function, f"var {value}", {"var": vector}, ValueError, r"\bvar\b", rf"{value}.*2", ">= 0")

# ---- numbers and names ---------------------------------------------------------------------------

NOT_REAL = {
    "None": (None, "None"),
    "str": ("1e-5", "str"),
    "complex": (1e-5 + 0j, "complex"),
    "True": (True, "bool"),
    "NumPy bool": (np.False_, "bool"),
    "array": (np.array([1e-5]), "ndarray"),
    "0-D array": (np.array(1e-5), "ndarray"),
    "list": ([1e-5], "list"),
}
EPS = ("batch_norm", "batch_norm_train")
DECAY = ("batch_norm_train", "update_running")
for name, (value, got) in NOT_REAL.items():
    case(EPS, f"eps {name}", {"eps": value}, TypeError, r"\beps\b", got, "number >= 0")
    case(DECAY, f"decay {name}", {"decay": value}, TypeError, r"\bdecay\b", got, r"\[0, 1\]")
for value in (-1e-5, -1, np.nan, np.inf, -np.inf, np.float32(-1), np.float64("nan")):
    got = re.escape(str(float(value)))
    case(EPS, f"eps {value!r}", {"eps": value}, ValueError, r"\beps\b", got, "number >= 0")
case(EPS, "eps 10**400", {"eps": 10**400}, ValueError, r"\beps\b", "large", "number >= 0")
for value in (-0.1, 1.0000001, 2, -1, 99, np.nan, np.inf, -np.inf):
    got = re.escape(str(float(value)))
    case(DECAY, f"decay {value!r}", {"decay": value}, ValueError, r"\bdecay\b", got, r"\[0, 1\]")
case("update_running", "decay missing", {"decay": Drop}, TypeError, r"\bdecay\b", "None")
case("update_running", "count missing", {"count": Drop}, TypeError, r"\bcount\b", "None")

NOT_INT = {
    "None": (None, "None"),
    "str": ("1", "str"),
    "float": (1.0, "float"),
    "True": (True, "bool"),
    "NumPy bool": (np.True_, "bool"),
    "array": (np.array([1]), "ndarray"),
    "complex": (1j, "complex"),
}
INTEGERS = {"batch_norm_train": ("running_ddof",), "moments": ("ddof",), "update_running": ("ddof", "count")}
for function, names in INTEGERS.items():
    for name in names:
        expected = "0 or 1" if function != "moments" and name != "count" else r"\bint\b"
        for kind, (value, got) in NOT_INT.items():
            case(function, f"{name} {kind}", {name: value}, TypeError, rf"\b{name}\b", got, expected)
for function, name in (("batch_norm_train", "running_ddof"), ("update_running", "ddof")):
    for value in (-1, 2, 100, 2**70):
        got = re.escape(f"{value:.6g}")
        case(function, f"{name} {value}", {name: value}, ValueError, rf"\b{name}\b", got, "0.*or 1")
for value in (-1, -100):
    case("moments", f"ddof {value}", {"ddof": value}, ValueError, r"\bddof\b", str(value), ">= 0")
for value in (40, 41, 2**40):
    case(
        "moments",
        f"ddof {value} of 40 values",
        {"ddof": value},
        ValueError,
        r"\bddof\b",
        str(value),
        "less than.*40",
    )
for value in (0, 1, -1, -40):
    case(
        "update_running",
        f"count {value}",
        {"count": value},
        ValueError,
        r"\bcount\b",
        str(value),
        "more than.*1",
    )
case("update_running", "count 2**70", {"count": 2**70}, ValueError, r"\bcount\b", "1.18059e\\+21", r"\bint\b")
for kind, value in {
    "int": 1,
    "None": None,
    "str": "yes",
    "NumPy bool": np.True_,
    "array": np.array([True]),
}.items():
    got = "None" if value is None else type(value).__name__
    case("moments", f"keepdims {kind}", {"keepdims": value}, TypeError, "keepdims", got, "True or False")

ACTIVATED = ("batch_norm", "batch_norm_train", "batch_norm_backward")
for value in ("ReLU", "gelu", "", "relu ", "none"):
    case(
        ACTIVATED,
        f"activation {value!r}",
        {"activation": value},
        ValueError,
        "activation",
        repr(value),
        "None.*'relu'",
    )
for kind, value in {"int": 0, "bool": True, "bytes": b"relu", "function": np.tanh, "list": ["relu"]}.items():
    got = type(value).__name__
    case(ACTIVATED, f"activation {kind}", {"activation": value}, TypeError, "activation", got, "None.*'relu'")
BACKWARD = "batch_norm_backward"
for value in ("running", "Batch", "", "eval"):
    case(
        BACKWARD,
        f"stats {value!r}",
        {"stats": value},
        ValueError,
        r"\bstats\b",
        repr(value),
        "'batch'.*'fixed'",
    )
for kind, value in {
    "None": None,
    "bool": True,
    "int": 1,
    "list": ["batch"],
    "array": np.array("batch"),
}.items():
    got = "None" if value is None else type(value).__name__
    case(BACKWARD, f"stats {kind}", {"stats": value}, TypeError, r"\bstats\b", got, "'batch'.*'fixed'")
for value in (("dx", "dz"), ["dX"], {"dx", "gamma"}):
    got = "dz|dX|gamma"
    case(
        BACKWARD,
        f"needs {value!r}",
        {"needs": value},
        ValueError,
        r"\bneeds\b",
        got,
        "'dx', 'dgamma', 'dbeta'",
    )
for kind, value in {
    "str": "dx",
    "None": None,
    "int": 3,
    "bool": True,
    "dict": {"dx": True},
    "array": np.array(["dx"]),
}.items():
    got = "None" if value is None else type(value).__name__
    case(BACKWARD, f"needs {kind}", {"needs": value}, TypeError, r"\bneeds\b", got, "'dx', 'dgamma', 'dbeta'")
for kind, value in {"int": 3, "None": None, "bytes": b"dx"}.items():
    case(
        BACKWARD,
        f"needs holding {kind}",
        {"needs": ("dx", value)},
        TypeError,
        r"\bneeds\b",
        f"{kind}|{value!r}",
        "'dx'",
    )
case(BACKWARD, "out without dx", {"needs": ("dgamma",)}, ValueError, r"\bout\b", r"\bneeds\b", "'dx'")

case(
    FUNCTIONS,
    "momentum 0.1",
    {"momentum": 0.1},
    TypeError,
    "momentum",
    "PyTorch",
    "Keras",
    r"decay=0\.9",
    r"decay=0\.1",
)
case(
    FUNCTIONS, "momentum None", {"momentum": None}, TypeError, "momentum", "PyTorch", "Keras", r"1 - momentum"
)
for function, wrong, right in (
    ("batch_norm", "epss", "eps"),
    ("batch_norm", "activaton", "activation"),
    ("batch_norm_train", "running_means", "running_mean"),
    ("batch_norm_train", "runing_var", "running_var"),
    ("batch_norm_train", "decays", "decay"),
    ("batch_norm_backward", "need", "needs"),
    ("batch_norm_backward", "stat", "stats"),
    ("moments", "keepdim", "keepdims"),
    ("moments", "dataformat", "data_format"),
    ("moments", "axes", "axis"),
    ("batch_norm", "residuals", "residual"),
    ("batch_norm", "activation_masks", "activation_mask"),
    ("batch_norm_train", "n_threads", "num_threads"),
    ("batch_norm_backward", "out_residuals", "out_residual"),
    ("activation_mask_bytes", "axes", "axis"),
    ("update_running", "dof", "ddof"),
    ("update_running", "counts", "count"),
):
    case(function, f"unknown {wrong}", {wrong: 1}, TypeError, function, repr(wrong), rf"mean '{right}'")
case(FUNCTIONS, "unknown word", {"zzz": 1}, TypeError, "'zzz'", "it has")

# ---- training ------------------------------------------------------------------------------------

for shape in ((1, CHANNELS), (1, CHANNELS, 1), (1, CHANNELS, 1, 1)):
    change = {"x": np.zeros(shape, f32), "out": None}
    match = (r"\bx\b", re.escape(str(shape)), "one value per channel", "larger batch", "running statistics")
    case("batch_norm_train", f"one value per channel {shape}", change, ValueError, *match)
    change = {"x": np.zeros(shape, f32), "dy": np.zeros(shape, f32), "out": None}
    match = (r"\bx\b", re.escape(str(shape)), "one value per channel", "'fixed'")
    case("batch_norm_backward", f"one value per channel {shape}", change, ValueError, *match)
TRAIN = "batch_norm_train"
RUNNING = (TRAIN, "update_running")
case(
    TRAIN,
    "running_mean alone",
    {"running_var": None},
    ValueError,
    "running_var",
    "None",
    "running_mean",
    "both or neither",
)
case(
    TRAIN,
    "running_var alone",
    {"running_mean": None},
    ValueError,
    "running_mean",
    "None",
    "running_var",
    "both or neither",
)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


for name in ("running_mean", "running_var"):
    word, other = rf"\b{name}\b", "running_var" if name == "running_mean" else "running_mean"
    for kind, (value, got, expected) in WRONG_KIND.items():
        case(RUNNING, f"{name} {kind}", {name: value}, TypeError, word, got, expected)
    for kind, value in WRONG_SHAPE.items():
        # update_running learns C from running_mean: with a 1-D one of another length, some other argument
        # does not fit.
        functions = RUNNING if name == "running_var" or value.ndim != 1 else TRAIN
        expected = rf"\({CHANNELS},\)|one-dimensional|float32 or float64 array"
        case(
            functions,
            f"{name} {kind}",
            {name: value},
            ValueError,
            word,
            re.escape(str(value.shape)),
            expected,
        )
    case(
        RUNNING,
        f"{name} read-only",
        {name: read_only(np.ones(CHANNELS))},
        ValueError,
        word,
        "read-only",
        "writable",
    )
    stride_0 = np.lib.stride_tricks.as_strided(np.ones(1), (CHANNELS,), (0,))
    case(RUNNING, f"{name} stride 0", {name: stride_0}, ValueError, word, "stride 0", "separate|distinct")
    case(
        RUNNING,
        f"{name} the same array",
        lambda a, n=name, o=other: {n: a[o]},
        ValueError,
        word,
        other,
        "separate|two",
    )
    case(TRAIN, f"{name} is gamma", lambda a, n=name: {n: a["gamma"]}, ValueError, word, "gamma", "separate")
    case(TRAIN, f"{name} is beta", lambda a, n=name: {n: a["beta"][:]}, ValueError, word, "beta", "separate")
    case(
        TRAIN,
        f"{name} within x",
        lambda a, n=name: {n: a["x"].reshape(-1)[3:9]},
        ValueError,
        word,
        r"\bx\b",
        "separate",
    )
    within = lambda a, n=name: {n: a["out"].reshape(-1)[3:9]}  # noqa: E731
    case(TRAIN, f"{name} within out", within, ValueError, word, r"\bout\b", "separate")
case(
    "update_running", "running_mean None", {"running_mean": None}, TypeError, "running_mean", "None", "array"
)
case("update_running", "running_var None", {"running_var": None}, TypeError, "running_var", "None", "array")
case(
    "update_running",
    "mean is running_mean",
    lambda a: {"mean": a["running_mean"]},
    ValueError,
    r"\bmean\b",
    "running_mean",
    "separate",
)
case(
    "update_running",
    "var is running_var",
    lambda a: {"var": a["running_var"]},
    ValueError,
    r"\bvar\b",
    "running_var",
    "separate",
)


def overlapping(a):
    both = np.ones(CHANNELS + 2)
    return {"running_mean": both[:CHANNELS], "running_var": both[2:]}


case(RUNNING, "running arrays overlap", overlapping, ValueError, "running_mean", "running_var", "separate")

# ---- out -----------------------------------------------------------------------------------------

OUT = ("batch_norm", "batch_norm_train", "batch_norm_backward")


def strided(shape, strides):
    return np.lib.stride_tricks.as_strided(np.zeros(shape, f32), SHAPE, strides)


WRONG_OUT = {
    "list": (x0.tolist(), TypeError, "list", "array"),
    "str": ("out", TypeError, "str", "array"),
    "True": (True, TypeError, "bool", "array"),
    "masked": (np.ma.masked_array(np.zeros(SHAPE, f32)), TypeError, "[Mm]asked", "array"),
    "float64": (np.zeros(SHAPE), TypeError, "float64", "float32"),
    "float16": (np.zeros(SHAPE, np.float16), TypeError, "float16", "float32"),
    "int32": (np.zeros(SHAPE, np.int32), TypeError, "int32", "float32"),
    "big-endian": (np.zeros(SHAPE, ">f4"), TypeError, ">f4", "float32"),
    "other shape": (np.zeros((2, 6, 5, 4), f32), ValueError, r"\(2, 6, 5, 4\)", re.escape(str(SHAPE))),
    "other rank": (np.zeros((2, 6, 20), f32), ValueError, r"\(2, 6, 20\)", re.escape(str(SHAPE))),
    "broadcastable": (np.zeros((2, 6, 4, 1), f32), ValueError, r"\(2, 6, 4, 1\)", re.escape(str(SHAPE))),
    "larger": (np.zeros((3, 6, 4, 5), f32), ValueError, r"\(3, 6, 4, 5\)", re.escape(str(SHAPE))),
    "0-D": (np.zeros((), f32), ValueError, r"\(\)", re.escape(str(SHAPE))),
    "read-only": (read_only(np.zeros(SHAPE, f32)), ValueError, "read-only", "writable"),
    "broadcast": (
        np.broadcast_to(np.zeros((1, 6, 4, 5), f32), SHAPE),
        ValueError,
        "read-only|stride 0",
        "writable",
    ),
    "stride 0": (strided((6, 4, 5), (0, 80, 20, 4)), ValueError, r"strides \(0|stride 0", "writable"),
    "overlapping itself": (
        strided((9, 4, 5), (80, 80, 20, 4)),
        ValueError,
        "strides|twice|overlap",
        "expected",
    ),
    "every second column": (np.zeros((2, 6, 4, 10), f32)[..., ::2], ValueError, "strides", "empty_like"),
}
for name, (value, error, got, expected) in WRONG_OUT.items():
    case(OUT, f"out {name}", {"out": value}, error, r"\bout\b", got, expected)


def shifted(a):
    base = np.zeros(a["x"].size + 20, f32)
    base[: a["x"].size] = a["x"].ravel()
    return {"x": base[: a["x"].size].reshape(SHAPE), "out": base[20:].reshape(SHAPE)}


def shifted_dy(a):
    both = shifted({"x": a["dy"]})
    return {"dy": both["x"], "out": both["out"]}


for name, change in {
    "out shifted against x": shifted,
    "out is x reversed": lambda a: {"out": a["x"][::-1]},
    "out is x with channels reversed": lambda a: {"out": a["x"][:, ::-1]},
    "out is x with columns reversed": lambda a: {"out": a["x"][..., ::-1]},
}.items():
    case(OUT, name, change, ValueError, r"\bout\b", r"\bx\b", "separate")
case(BACKWARD, "out shifted against dy", shifted_dy, ValueError, r"\bout\b", r"\bdy\b", "separate")
case(
    BACKWARD,
    "out is dy reversed",
    lambda a: {"out": a["dy"][::-1]},
    ValueError,
    r"\bout\b",
    r"\bdy\b",
    "separate",
)
for function in OUT:
    for name in READ[function]:
        within = lambda a, n=name: {n: a["out"].reshape(-1)[7 : 7 + CHANNELS]}  # noqa: E731
        case(function, f"{name} within out", within, ValueError, r"\bout\b", rf"\b{name}\b", "separate")

# ---- dy ------------------------------------------------------------------------------------------

for shape in ((2, 6, 5, 4), (2, 6, 4), (1, 6, 4, 5), (3, 6, 4, 5), (0, 6, 4, 5), (2, 6, 4, 1)):
    change = {"dy": np.zeros(shape, f32)}
    case(BACKWARD, f"dy {shape}", change, ValueError, r"\bdy\b", re.escape(str(shape)), re.escape(str(SHAPE)))
for dtype in ("float64", "float16"):
    case(
        BACKWARD,
        f"dy {dtype} for float32 x",
        {"dy": np.zeros(SHAPE, dtype)},
        TypeError,
        r"\bdy\b",
        dtype,
        "float32",
    )

# ---- num_threads ---------------------------------------------------------------------------------

for value in (0, -1, 65537, 2**40, -(2**40)):
    match = ("num_threads", re.escape(str(value)), "an int from 1 to 65536")
    case(THREADED, f"num_threads {value}", {"num_threads": value}, ValueError, *match)
for value in (2**70, -(2**70)):
    match = ("num_threads", r"1\.18059e\+21", "an int from 1 to 65536")
    case(THREADED, f"num_threads {value}", {"num_threads": value}, ValueError, *match)
NOT_THREADS = {**NOT_INT, "2.5": (2.5, "float"), "list": ([2], "list"), "bytes": (b"2", "bytes")}
for kind, (value, got) in NOT_THREADS.items():
    if value is not None:
        match = ("num_threads", got, "an int from 1 to 65536")
        case(THREADED, f"num_threads {kind}", {"num_threads": value}, TypeError, *match)

# ---- residual ------------------------------------------------------------------------------------

FORWARD = ("batch_norm", "batch_norm_train")
for name, (value, got, expected) in WRONG_X.items():
    if value is not None:
        change = {"residual": value, "activation": "relu"}
        case(FORWARD, f"residual {name}", change, TypeError, r"\bresidual\b", got, expected)
for dtype in ("float64", "float16"):
    match = (r"\bresidual\b", dtype, "expected float32 as x has", r"residual\.astype")
    case(FORWARD, f"residual {dtype}", {"residual": np.zeros(SHAPE, dtype)}, TypeError, *match)
for shape in ((2, 6, 5, 4), (2, 6, 20), (1, 6, 4, 5), (3, 6, 4, 5), (0, 6, 4, 5), (2, 6, 1, 1), (1, 1)):
    match = (r"\bresidual\b", re.escape(str(shape)), re.escape(f"expected {SHAPE} as x has"))
    case(FORWARD, f"residual {shape}", {"residual": np.zeros(shape, f32)}, ValueError, *match)
for shape in ((), (6,)):
    match = (r"\bresidual\b", re.escape(str(shape)), "at least 2 dim")
    case(FORWARD, f"residual {len(shape)}-D", {"residual": np.zeros(shape, f32)}, ValueError, *match)


def shifted_residual(a):
    both = shifted({"x": a["x"]})
    return {"residual": both["x"], "out": both["out"]}


def reversed_residual(a):
    z = a["x"].copy()
    return {"residual": z, "out": z[::-1]}


def residual_of_another_order(a):
    z = np.zeros((2, 4, 5, 6), f32).transpose(0, 3, 1, 2)
    return {"residual": z, "out": z}


for name, change in {"shifted against": shifted_residual, "reversed": reversed_residual}.items():
    match = (r"\bout\b", r"\bresidual\b", "separate")
    case(FORWARD, f"out {name} residual", change, ValueError, *match)
match = (r"\bout has strides\b", "x of strides", "empty_like")
case(FORWARD, "out is a residual of another order", residual_of_another_order, ValueError, *match)
for name in ("running_mean", "running_var"):

    def within_residual(a, name=name):
        z = a["x"].copy()
        return {"residual": z, name: z.reshape(-1)[3:9]}

    match = (rf"\b{name}\b", "residual", "separate")
    case(TRAIN, f"{name} within residual", within_residual, ValueError, *match)

# ---- activation_mask ------------------------------------------------------------------------------------

MASKED = ("batch_norm", "batch_norm_backward")
MASK_BYTES = 40  # 12 runs of 20 elements, 3 bytes each, and 4
mask0 = np.zeros(MASK_BYTES, np.uint8)
WRONG_MASK = {
    "list": ([0] * MASK_BYTES, TypeError, "list"),
    "bytes": (bytes(MASK_BYTES), TypeError, "bytes"),
    "bytearray": (bytearray(MASK_BYTES), TypeError, "bytearray"),
    "int": (1, TypeError, "1 .int"),
    "True": (True, TypeError, "bool"),
    "NumPy scalar": (np.uint8(1), TypeError, "uint8"),
    "bool array": (mask0.astype(bool), TypeError, "dtype bool"),
    "int8": (mask0.view(np.int8), TypeError, "dtype int8"),
    "uint16": (mask0.astype(np.uint16), TypeError, "dtype uint16"),
    "float32": (mask0.astype(f32), TypeError, "dtype float32"),
    "like x": (np.zeros(SHAPE, bool), TypeError, "dtype bool"),
    "short": (mask0[:-1], ValueError, r"\(39,\)"),
    "long": (np.zeros(41, np.uint8), ValueError, r"\(41,\)"),
    "of the bits alone": (mask0[:-4], ValueError, r"\(36,\)"),
    "empty": (mask0[:0], ValueError, r"\(0,\)"),
    "0-D": (np.zeros((), np.uint8), ValueError, r"\(\)"),
    "2-D": (mask0.reshape(5, 8), ValueError, r"\(5, 8\)"),
    "strided": (np.zeros(2 * MASK_BYTES, np.uint8)[::2], ValueError, r"strides \(2,\)"),
    "reversed": (mask0[::-1], ValueError, r"strides \(-1,\)"),
    "one byte": (np.broadcast_to(mask0[:1], MASK_BYTES), ValueError, r"strides \(0,\)"),
}
for name, (value, error, got) in WRONG_MASK.items():
    change = {"activation_mask": value, "activation": "relu"}
    case(
        MASKED,
        f"activation_mask {name}",
        change,
        error,
        r"\bactivation_mask\b",
        got,
        "40 uint8",
        r"activation_mask_bytes\(x\)",
    )
match = (r"\bactivation_mask\b", "activation=None", "'relu', 'leaky_relu' or 'relu6'|'relu' or", "drop one")
case(
    MASKED,
    "activation_mask without activation",
    {"activation_mask": mask0, "activation": None},
    ValueError,
    *match,
)
change = {"activation_mask": read_only(mask0), "activation": "relu"}
case(
    "batch_norm",
    "activation_mask read-only",
    change,
    ValueError,
    r"\bactivation_mask\b",
    "read-only",
    "writable",
)


def mask_within(name, a):
    """This argument and an activation_mask, made of the same memory."""
    like = a.get(name, a["x"])
    memory = np.zeros(max(like.nbytes, MASK_BYTES), np.uint8)
    return {
        "activation": "relu",
        name: memory[: like.nbytes].view(like.dtype).reshape(like.shape),
        "activation_mask": memory[:MASK_BYTES],
    }


for name in ("x", "residual", "out", "mean", "var", "gamma", "beta"):
    change = lambda a, n=name: mask_within(n, a)  # noqa: E731
    match = ("activation_mask overlaps", rf"\b{name}\b", "separate")
    case("batch_norm", f"activation_mask within {name}", change, ValueError, *match)

# ---- gradient of the residual --------------------------------------------------------------------

ALL = ("dx", "dgamma", "dbeta", "dresidual")
for name in ("out", "out_residual"):
    change = lambda a, n=name: {"needs": ALL, **mask_within(n, a)}  # noqa: E731
    match = ("activation_mask overlaps", rf"\b{name}\b", "separate")
    case(BACKWARD, f"activation_mask within {name}", change, ValueError, *match)
for needs in (ALL, ("dresidual",)):
    change = {"needs": needs, "activation": "relu", "out": None}
    match = (r"\bactivation_mask is None\b", "expected that of the forward pass", "residual")
    case(BACKWARD, f"dresidual of {len(needs)} without activation_mask", change, ValueError, *match)
for needs in (("dx", "dgamma", "dbeta"), ("dgamma",), ()):
    change = {"needs": needs, "out": None, "out_residual": np.zeros(SHAPE, f32)}
    match = (r"\bout_residual\b", r"\bneeds\b", "'dresidual'", "drop one")
    case(BACKWARD, f"out_residual, needs {needs}", change, ValueError, *match)
change = {"needs": ("dresidual",)}
case(BACKWARD, "out, needs dresidual alone", change, ValueError, r"\bout\b", r"\bneeds\b", "'dx'")
for value in ("dresiduals", "residual", "dz"):
    match = (r"\bneeds\b", repr(value), "'dx', 'dgamma', 'dbeta', 'dresidual'")
    case(BACKWARD, f"needs {value} as well", {"needs": (*ALL, value)}, ValueError, *match)
for name, (value, error, got, expected) in WRONG_OUT.items():
    change = {"needs": ALL, "out_residual": value}
    case(BACKWARD, f"out_residual {name}", change, error, r"\bout_residual\b", got, expected)
for name in ("x", "dy"):
    change = lambda a, n=name: {"needs": ALL, "out_residual": a[n][::-1]}  # noqa: E731
    match = (r"\bout_residual\b", rf"\b{name}\b", "separate")
    case(BACKWARD, f"out_residual is {name} reversed", change, ValueError, *match)
for name in READ[BACKWARD]:

    def within_out_residual(a, name=name):
        z = np.zeros(SHAPE, f32)
        return {"needs": ALL, "out_residual": z, name: z.reshape(-1)[7 : 7 + CHANNELS]}

    match = (r"\bout_residual\b", rf"\b{name}\b", "separate")
    case(BACKWARD, f"{name} within out_residual", within_out_residual, ValueError, *match)


def two_outputs(a, shift):
    """out and out_residual in the same memory."""
    memory = np.zeros(a["x"].size + shift, f32)
    out, other = (memory[i : i + a["x"].size].reshape(SHAPE) for i in (0, shift))
    return {"needs": ALL, "out": out, "out_residual": other}


for shift in (0, 1, 239):
    change = lambda a, s=shift: two_outputs(a, s)  # noqa: E731
    match = (r"\bout and out_residual\b", "overlap", "two separate arrays")
    case(BACKWARD, f"out and out_residual shifted by {shift}", change, ValueError, *match)
change = lambda a: {"needs": ALL, "out": a["dy"], "out_residual": a["dy"]}  # noqa: E731
case(BACKWARD, "out and out_residual are dy", change, ValueError, "out and out_residual overlap")
change = lambda a: {"needs": ALL, "out_residual": a["x"]}  # noqa: E731
case(BACKWARD, "out_residual is x", change, ValueError, "out_residual overlaps x", "separate")


# ---- the tests -----------------------------------------------------------------------------------


def snapshot(values):
    """Bytes of every array among the arguments, and of the memory it is a view of."""
    arrays = [a for a in values.values() if isinstance(a, np.ndarray) and a.dtype != object]
    owners = [a.base if isinstance(a.base, np.ndarray) else a for a in arrays]
    return [np.ascontiguousarray(a).tobytes() for a in arrays + owners]


def seconds(call):
    """Of the fastest of three tries, for a machine that is busy with something else."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises((TypeError, ValueError)):
            call()
        times.append(time.perf_counter() - start)
        if times[-1] <= MOST_SECONDS:
            break
    return min(times)


def test_the_table():
    assert len(CASES) >= 120
    assert len({str(c) for c in CASES}) == len(CASES)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_unchanged_call_is_valid(function):
    getattr(batchnorm, function)(**arguments(function))


@pytest.mark.parametrize("wrong", CASES, ids=str)
def test_error(wrong):
    values = arguments(wrong.function)
    values.update(wrong.change(values) if callable(wrong.change) else wrong.change)
    values = {name: value for name, value in values.items() if value is not Drop}
    if wrong.function == "moments":
        values.pop("out", None)
    before = snapshot(values)

    def call():
        getattr(batchnorm, wrong.function)(**values)

    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert issubclass(caught.type, wrong.error), caught.value
    for pattern in wrong.match:
        assert re.search(pattern, str(caught.value), re.DOTALL), f"{pattern!r} is not in: {caught.value}"
    assert snapshot(values) == before, "an error changes nothing"
    assert seconds(call) <= MOST_SECONDS


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("sse9", ValueError, r"isa.*'sse9'.*'baseline'"),
        ("AVX2", ValueError, r"isa.*'AVX2'.*'baseline'"),
        ("", ValueError, r"isa.*''.*'baseline'"),
        (None, TypeError, r"isa.*None.*baseline"),
        (2, TypeError, r"isa.*2.*baseline"),
        (b"avx2", TypeError, r"isa.*bytes.*baseline"),
    ],
    ids=repr,
)
def test_set_isa(name, error, match):
    before = batchnorm.get_isa()
    with pytest.raises(error, match=match):
        batchnorm.set_isa(name)
    assert batchnorm.get_isa() == before


@pytest.mark.parametrize(
    ("n", "error", "got"),
    [
        (0, ValueError, "0"),
        (-1, ValueError, "-1"),
        (65537, ValueError, "65537"),
        (2**70, ValueError, "1.18059e"),
        (2.0, TypeError, "float"),
        (True, TypeError, "bool"),
        ("2", TypeError, "str"),
        (None, TypeError, "None"),
    ],
    ids=repr,
)
def test_set_num_threads(n, error, got):
    before = batchnorm.get_num_threads()
    with pytest.raises(error, match=rf"num_threads is .*{re.escape(got)}.*expected an int from 1"):
        batchnorm.set_num_threads(n)
    assert batchnorm.get_num_threads() == before


def test_options_are_keyword_only():
    a = arguments("batch_norm")
    with pytest.raises(TypeError, match="positional"):
        batchnorm.batch_norm(a["x"], a["mean"], a["var"], a["gamma"], a["beta"], 1e-5)
    with pytest.raises(TypeError, match="positional"):
        batchnorm.moments(a["x"], 1)


@pytest.mark.parametrize("function", TENSOR_FUNCTIONS)
def test_an_empty_batch_is_checked_too(function):
    # No values, but wrong arguments all the same.
    values = arguments(function)
    empty = np.zeros((0, CHANNELS), np.float32)
    values.update({name: empty for name in ("x", "dy") if name in values})
    values.pop("out", None)
    getattr(batchnorm, function)(**values)
    with pytest.raises(ValueError, match="axis is 5"):
        getattr(batchnorm, function)(**values, axis=5)
    if "gamma" in values:
        with pytest.raises(ValueError, match="gamma has shape"):
            getattr(batchnorm, function)(**{**values, "gamma": np.ones(CHANNELS + 1)})


@pytest.mark.parametrize(
    "function, keyword, here",
    [
        ("batch_norm", "weight", "gamma"),
        ("batch_norm", "bias", "beta"),
        ("batch_norm", "epsilon", "eps"),
        ("batch_norm", "training", "batch_norm_train"),
        ("batch_norm_train", "moving_variance", "running_var"),
        ("batch_norm_train", "inplace", "out=x"),
        ("batch_norm_train", "track_running_stats", "without running arrays"),
        ("batch_norm_backward", "device", "CPU"),
    ],
)
def test_keywords_of_other_libraries_are_translated(function, keyword, here):
    with pytest.raises(TypeError, match=rf"{function}\(\) has no argument '{keyword}'; .*{re.escape(here)}"):
        getattr(batchnorm, function)(**arguments(function), **{keyword: True})


def test_update_running_translates_momentum():
    a = np.zeros(3)
    with pytest.raises(TypeError, match=r"pass decay=0\.9; .*pass decay=0\.1"):
        batchnorm.update_running(a, a + 1, a, a, momentum=0.1, count=5)


class Tensor:
    """Stands for a torch.Tensor."""


Tensor.__module__ = "torch"


@pytest.mark.parametrize(
    "change, match",
    [
        ({"x": Tensor()}, r"x is of type torch\.Tensor, .*use x\.detach\(\)\.cpu\(\)\.numpy\(\)"),
        ({"x": np.zeros((4, 3), np.longdouble)}, r"use x\.astype\(numpy\.float64\)"),
        ({"x": np.zeros((4, 3), np.int32)}, r"use x\.astype\(numpy\.float32\)"),
        (
            {"mean": np.zeros(CHANNELS, np.float16)},
            r"mean has dtype float16.*use mean\.astype\(numpy\.float32\)",
        ),
        ({"mean": np.zeros((1, CHANNELS, 1, 1))}, r"mean has shape \(1, .*use mean\.reshape\(-1\)"),
        ({"data_format": "nhwc"}, r"data_format is 'nhwc'.*did you mean 'NHWC'"),
        ({"data_format": "channel_last"}, r"did you mean 'channels_last'"),
        ({"eps": np.True_}, r"eps is .*numpy\.bool"),
    ],
    ids=str,
)
def test_remedies(change, match):
    with pytest.raises((TypeError, ValueError), match=match):
        batchnorm.batch_norm(**{**arguments("batch_norm"), **change})


def test_a_crop_cannot_be_written_in_place():
    whole = np.zeros((8, 4, 8, 8), np.float32)
    crop = whole[:, :, 1:-1, 1:-1]
    with pytest.raises(
        ValueError, match=rf"out has strides {re.escape(str(crop.strides))}.*x of strides .1024.*assign"
    ):
        batchnorm.batch_norm(crop, np.zeros(4), np.ones(4), beta=np.ones(4), out=crop)
    assert not whole.any()


def test_valid_calls_beside_the_errors():
    # What the cases above spoil: an activation_mask, a residual, both outputs of backward; memory that is
    # only read may be shared.
    a = arguments("batch_norm") | {"activation": "relu"}
    assert batchnorm.activation_mask_bytes(a["x"]) == MASK_BYTES
    activation_mask = np.zeros(MASK_BYTES, np.uint8)
    batchnorm.batch_norm(**a, residual=a["x"], activation_mask=activation_mask)
    assert activation_mask.any()
    b = arguments(BACKWARD) | {"activation": "relu", "needs": ALL, "out_residual": np.ones(SHAPE, f32)}
    want = batchnorm.batch_norm_backward(**b, activation_mask=activation_mask)
    assert want.dx is b["out"] and want.dresidual is b["out_residual"]
    for crop in (slice(None), slice(1, -1)):  # as it is, and by way of a copy
        a = mask_within("x", b) | {"dy": b["dy"], "mean": b["mean"], "inv_std": b["inv_std"]}
        a["x"], a["dy"] = a["x"][..., crop], a["dy"][..., crop]
        a["activation_mask"] = a["activation_mask"][: batchnorm.activation_mask_bytes(a["x"])]
        batchnorm.batch_norm_backward(**a)
