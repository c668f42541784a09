"""Calls of every public function, each a description, and hashes of the bytes that version 0.1 gave for them.

A case is a dict: what is called (`kind`), the shape and dtype of x, and the options of the call. Its data is
made of its numbers alone, by integer arithmetic, so that it is the same with every NumPy. `results` runs a
case; `golden.json` holds, per case, a hash of each result. What has changed since is in `CHANGED`, with why.

    python tests/support/golden.py          names what differs
    python tests/support/golden.py --add    stores the hashes of cases that golden.json does not have yet
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batchnorm
import numpy as np

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

STORED = Path(__file__).with_suffix(".json")

# Patterns of "case result" whose bytes are not those of 0.1, each with the reason.
CHANGED: dict[str, str] = {
    "double *": "the second order is one pass in float64, also of narrower data",
    'train float64 *"NC"* dx': "each sample's sums are multiplied by its gamma, then added: another last bit",
    'train *keep="y"* dx': "x comes back from y on load, where a tensor of x_hat was made before",
    'train *keep="y"* dgamma': "the same",
    'layer *"keep":"y"*': "the same",
    "train *virtual_batch_size=* running_*": "one step by the parts' average; 0.1 made one for each part",
    'layer float64 *"virtual_batch_size":*': "var is not had back from inv_std: another last bit",
}

Case = dict[str, Any]
Results = dict[str, np.ndarray]


# ---- data ------------------------------------------------------------------------------------------------


def dtype_of(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def uniform(seed: object, shape: tuple[int, ...] | int) -> np.ndarray:
    """Numbers in [0, 1) by splitmix64 (Steele, Lea and Flood 2014), multiples of 2^-24."""
    with np.errstate(over="ignore"):
        n = np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint64)
        z = np.uint64(zlib.crc32(repr(seed).encode())) + n * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z >> np.uint64(40)).astype(np.float64) / 2.0**24).reshape(shape)


def channel_axes(case: Case) -> tuple[int, ...]:
    axis, rank = case.get("channel_axis", 1), len(case["shape"])
    return tuple(sorted(a % rank for a in (axis if isinstance(axis, tuple) else (axis,))))


def channels_of(case: Case) -> tuple[int, ...]:
    return tuple(case["shape"][a] for a in channel_axes(case))


def tensor(case: Case, name: str, offset: float = 0.0) -> np.ndarray:
    """Bell-shaped values; those of x have an offset and a scale per channel."""
    shape, dtype = case["shape"], dtype_of(case["dtype"])
    values = sum(uniform((name, i, shape), shape) for i in range(3)) * 2 - 3 + offset
    if dtype.kind in "iu":
        lowest, highest = max(-3000, np.iinfo(dtype).min), min(9000, np.iinfo(dtype).max)
        return np.floor(lowest + uniform((name, shape), shape) * (highest - lowest + 1)).astype(dtype)
    if name == "x":
        wide = [n if a in channel_axes(case) else 1 for a, n in enumerate(shape)]
        c = np.arange(math.prod(wide)).reshape(wide)
        values = values * 2.0 ** (c % 5 - 2) + (c % 7 - 3) * 0.75
    values = values.astype(dtype)
    order = case.get("order")
    return (
        values
        if order is None
        else np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    )


def vector(case: Case, name: str, low: float, high: float, kind: str = "C", dtype: str | None = None):
    """Per-channel values, or rows of them with kind "NC"."""
    shape = channels_of(case) if kind == "C" else (case["shape"][0], *channels_of(case))
    kinds = {"float64": "float64"}.get(case["dtype"], "float32")
    return (low + uniform((name, shape), shape) * (high - low)).astype(dtype or kinds)


def affine(case: Case) -> list[np.ndarray | None]:
    """gamma of either sign, and beta."""
    gamma, beta = case.get("affine", ("C", "C"))
    made = [None if gamma is None else vector(case, "gamma", 0.5, 2, gamma)]
    if gamma is not None:
        made[0][..., ::3] *= -1
    return [*made, None if beta is None else vector(case, "beta", -1, 1.5, beta)]


def positions(case: Case) -> dict[str, np.ndarray]:
    """mask, lengths and weights as named in case["positions"], over every axis but the channels'."""
    names, shape = case.get("positions", ""), case["shape"]
    rest = tuple(n for a, n in enumerate(shape) if a not in channel_axes(case))
    given = {}
    if "mask" in names:
        given["mask"] = uniform(("mask", rest), rest) < 0.7
        given["mask"].flat[:2] = True
    if "lengths" in names:
        given["lengths"] = np.floor(uniform(("lengths", shape), shape[0]) * rest[1]).astype(int) + 1
    if "weights" in names:
        given["weights"] = uniform(("weights", rest), rest) * 3 + 0.25
    return given


# ---- running a case --------------------------------------------------------------------------------------

CALL = ("eps", "channel_axis", "activation", "slope")
KEYS = (*CALL, "decay", "running_ddof", "virtual_batch_size")


def chosen(case: Case, names: tuple[str, ...]) -> Case:
    return {name: case[name] for name in names if name in case}


def gradients(case: Case, saved: object, results: Results) -> None:
    got = batchnorm.batch_norm_backward(tensor(case, "dy", 0.25), saved)
    for name in ("dx", "dgamma", "dbeta", "dresidual"):
        if getattr(got, name) is not None:
            results[name] = getattr(got, name)


def train(case: Case) -> Results:
    running = {}
    if "decay" in case:
        running = dict(running_mean=vector(case, "rm", -1, 1), running_var=vector(case, "rv", 0.5, 2))
    options = chosen(case, KEYS) | running | positions(case)
    if "renorm" in case:
        own = dict(mean=vector(case, "mean", -2, 2), std=vector(case, "std", 0.5, 3)) if not running else {}
        options["renorm"] = {**case["renorm"], **own}
    if case.get("residual"):
        options["residual"] = tensor(case, "z")
    y, saved = batchnorm.batch_norm_train(
        tensor(case, "x"), *affine(case), keep=case.get("keep", "x"), **options
    )
    results = dict(y=y, mean=saved.mean, inv_std=saved.inv_std, **running)
    if "renorm" in case:
        results |= dict(r=saved.r, d=saved.d)
    gradients(case, saved, results)
    return results


def given(case: Case) -> Results:
    """Given statistics: inference, and the gradients behind it."""
    x, statistics = tensor(case, "x"), (vector(case, "mean", -2, 2), vector(case, "var", 0.5, 3))
    options = chosen(case, CALL) | positions(case)
    if case.get("residual"):
        options["residual"] = tensor(case, "z")
    mean, var = statistics
    y, saved = batchnorm.batch_norm_train(x, *affine(case), mean=mean, var=var, **options)
    results = dict(y=batchnorm.batch_norm(x, *statistics, *affine(case), **options), trained=y)
    gradients(case, saved, results)
    return results


def of(case: Case) -> Results:
    """Gradients from stored statistics."""
    x, inv_std = tensor(case, "x"), vector(case, "inv_std", 0.5, 2)
    saved = batchnorm.Saved.of(
        x, vector(case, "mean", -2, 2), inv_std, *affine(case), **chosen(case, ("stats", *CALL))
    )
    results: Results = {}
    gradients(case, saved, results)
    return results


def double(case: Case) -> Results:
    x, (gamma, beta) = tensor(case, "x"), affine(case)
    if case["stats"] == "fixed":
        statistics = dict(mean=vector(case, "mean", -2, 2), var=vector(case, "var", 0.5, 3))
    else:
        statistics = {}
    _, saved = batchnorm.batch_norm_train(x, gamma, beta, **statistics, **chosen(case, CALL))
    got = batchnorm.batch_norm_double_backward(
        tensor(case, "dy"), saved, ddx=tensor(case, "ddx"), ddgamma=vector(case, "ddgamma", -1, 1),
        ddbeta=vector(case, "ddbeta", -1, 1),
    )  # fmt: skip
    return dict(ddy=got.ddy, dx=got.dx, dgamma=got.dgamma)


def moments(case: Case) -> Results:
    mean, var = batchnorm.moments(
        tensor(case, "x"), **chosen(case, ("channel_axis", "ddof", "keepdims")), **positions(case)
    )
    return dict(mean=mean, var=var)


def images(case: Case) -> Results:
    x, channels = tensor(case, "x"), channels_of(case)[0]
    mean, std = ([0.25 + 0.125 * c for c in range(channels)], [0.25 + 0.0625 * c for c in range(channels)])
    formats = chosen(case, ("data_format", "out_format"))
    formats["dtype"] = dtype_of(case["out"])
    scaled = batchnorm.normalize_images(x, mean, std, **formats)
    wide = [vector(case, name, 20, 90, dtype="float64") for name in ("mean", "var")]
    y = batchnorm.batch_norm(x, *wide, *affine(case), **formats, **chosen(case, ("activation",)))
    sums = batchnorm.moments(x, data_format=case["data_format"])
    return dict(scaled=scaled, y=y, mean=sums.mean, var=sums.var)


def accumulate(case: Case) -> Results:
    """Moments: in pieces, merged, and by dataset_moments."""
    axis = case.get("channel_axis", 1)
    x, more = tensor(case, "x"), positions(case)
    cut = case["shape"][0] // 2
    halves = []
    for part in (slice(None, cut), slice(cut, None)):
        m = batchnorm.Moments(channel_axis=axis)
        halves.append(m.update(x[part], **{name: a[part] for name, a in more.items()}))
    both = halves[0] + halves[1]
    whole = batchnorm.dataset_moments([x[:cut], x[cut:]], channel_axis=axis)
    return dict(
        mean=both.mean, var=both.var, var1=both.variance(1), m2=both.m2, std=both.std,
        dataset_mean=whole.mean, dataset_var=whole.var,
    )  # fmt: skip


def running(case: Case) -> Results:
    mean, var = vector(case, "rm", -1, 1), vector(case, "rv", 0.5, 2)
    batch = vector(case, "mean", -2, 2, dtype="float64"), vector(case, "var", 0.5, 3, dtype="float64")
    batchnorm.update_running(mean, var, *batch, **case["options"])
    return dict(running_mean=mean, running_var=var)


def decays(case: Case) -> Results:
    return dict(decay=np.float64(batchnorm.effective_decay(case["decay"], **case["options"])))


def layer(case: Case) -> Results:
    """Three steps of training, each with an optimiser's step, then inference."""
    channels = channels_of(case)
    bn = batchnorm.BatchNorm(channels[0], channel_axis=case.get("channel_axis", 1), **case["layer"])
    ys, dxs = [], []
    for step in range(3):
        x = tensor(case, "x") + dtype_of(case["dtype"]).type(step * 0.5)
        options = positions(case) | ({"residual": tensor(case, "z")} if case.get("residual") else {})
        ys.append(bn(x, **options))
        dxs.append(bn.backward(tensor(case, "dy", 0.25)))
        for p in bn.parameters():
            p.value -= p.value.dtype.type(0.125) * p.grad
    results = dict(y=np.stack(ys), dx=np.stack(dxs), running_mean=bn.running_mean, running_var=bn.running_var)
    results |= {name: getattr(bn, name) for name in ("gamma", "beta") if getattr(bn, name) is not None}
    options.pop("weights", None)
    results["inferred"] = bn.eval()(tensor(case, "x"), **options)
    results = {name: a.copy() for name, a in results.items()}
    bn.recalibrate([tensor(case, "x"), tensor(case, "z")])
    return results | dict(population_mean=bn.running_mean.copy(), population_var=bn.running_var.copy())


KINDS = dict(
    train=train, given=given, of=of, double=double, moments=moments, images=images, accumulate=accumulate,
    running=running, decays=decays, layer=layer,
)  # fmt: skip


def results(case: Case) -> Results:
    """What the case's calls give, by name."""
    return KINDS[case["kind"]](case)


# ---- the cases -------------------------------------------------------------------------------------------

DTYPES = ("float32", "float64", "float16", "bfloat16")
FIRST = [
    (2, 3, 4, 5), (3, 20, 7, 9), (5, 65, 3, 11), (2, 2, 1, 16385), (300, 2, 7), (17, 3), (37, 64), (3, 64),
    (5, 65), (245, 20), (5, 2051), (1025, 100),
]  # fmt: skip
LAST = [(3, 5, 7, 20), (9, 9, 5, 65), (4097, 1, 1, 3)]
FEW = [
    dict(shape=(4, 3, 35)),
    dict(shape=(6, 20, 7, 9)),
    dict(shape=(6, 5, 7, 20), channel_axis=-1),
    dict(shape=(66, 65)),
]
ACTIVATIONS = (
    dict(activation="relu"), dict(activation="leaky_relu", slope=0.125), dict(activation="relu6"),
    dict(activation="sigmoid"), dict(activation="tanh"), dict(activation="silu"),
)  # fmt: skip
RUNNING = dict(decay=0.75)


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        plain = [dict(shape=s) for s in FIRST] + [dict(shape=s, channel_axis=-1) for s in LAST]
        for where in plain:
            yield dict(kind="train", dtype=dtype, **where, **RUNNING)
            yield dict(kind="given", dtype=dtype, **where)
        for where, order in itertools.product(FEW[:2], ((1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 1, 0))):
            order = tuple(a for a in order if a < len(where["shape"]))
            yield dict(kind="train", dtype=dtype, order=order, **where, **RUNNING)
    for dtype, where in itertools.product(DTYPES[:3], FEW):
        for options in ACTIVATIONS:
            yield dict(kind="train", dtype=dtype, **where, **options)
            if dtype != "float16":
                yield dict(kind="train", dtype=dtype, residual=True, **where, **options)
        yield dict(kind="train", dtype=dtype, residual=True, **where)
        yield dict(kind="given", dtype=dtype, residual=True, **where, **ACTIVATIONS[0])
    for dtype, where, names in itertools.product(DTYPES[:2], FEW, ("mask", "weights", "mask weights")):
        yield dict(kind="train", dtype=dtype, positions=names, **where, **RUNNING)
        yield dict(kind="moments", dtype=dtype, positions=names, ddof=1, **where)
        if "weights" not in names:
            yield dict(kind="given", dtype=dtype, positions=names, **where, **ACTIVATIONS[5])
    for dtype, where in itertools.product(DTYPES[:2], [FEW[0], dict(shape=(5, 9, 6), channel_axis=-1)]):
        yield dict(kind="train", dtype=dtype, positions="lengths", **where, **ACTIVATIONS[0])
        yield dict(kind="train", dtype=dtype, positions="lengths weights", residual=True, **where)
    for dtype, where in itertools.product(DTYPES[:3], FEW):
        for limits in ({}, dict(rmin=0.5, rmax=1.25, dmax=0.5)):
            yield dict(kind="train", dtype=dtype, renorm=limits, **where, **RUNNING)
        yield dict(kind="train", dtype=dtype, renorm=dict(rmax=2.0), **where, **ACTIVATIONS[0])
        yield dict(kind="train", dtype=dtype, keep="y", **where)
        yield dict(kind="train", dtype=dtype, keep="y", **where, **ACTIVATIONS[1])
        for size in (2, 1) if len(where["shape"]) > 2 else (22,):
            yield dict(kind="train", dtype=dtype, virtual_batch_size=size, **where, **RUNNING)
        yield dict(kind="train", dtype=dtype, virtual_batch_size=2, residual=True, **where, **ACTIVATIONS[0])
    for dtype, where in itertools.product(DTYPES[:2], FEW):
        for pair in (("NC", "NC"), ("NC", "C"), ("C", "NC"), ("NC", None)):
            yield dict(kind="train", dtype=dtype, affine=pair, **where, **ACTIVATIONS[0])
        yield dict(kind="given", dtype=dtype, affine=("NC", "NC"), **where)
        for pair in ((None, None), ("C", None), (None, "C")):
            yield dict(kind="train", dtype=dtype, affine=pair, eps=1e-3, running_ddof=0, **where, **RUNNING)
        for stats, options in itertools.product(("batch", "fixed"), ({}, ACTIVATIONS[1])):
            yield dict(kind="of", dtype=dtype, stats=stats, **where, **options)
            yield dict(kind="double", dtype=dtype, stats=stats, **where, **options)
    for dtype, axes in itertools.product(DTYPES[:2], ((1,), (1, 2), (2, 3), (1, 3), (-1, 1), (1, 2, 3))):
        yield dict(kind="train", dtype=dtype, shape=(5, 3, 4, 6), channel_axis=axes, **RUNNING)
        yield dict(kind="moments", dtype=dtype, shape=(5, 3, 4, 6), channel_axis=axes, keepdims=True)
    for dtype, where in itertools.product((*DTYPES, "uint8", "int16", "uint16"), FEW):
        yield dict(kind="moments", dtype=dtype, **where)
        yield dict(kind="accumulate", dtype=dtype, **where)
    for where in FEW[:2]:
        yield dict(kind="accumulate", dtype="float32", positions="mask weights", **where)
    for dtype, out in (
        ("uint8", "float32"),
        ("uint8", "float16"),
        ("int16", "float64"),
        ("uint16", "float32"),
    ):
        for there, back in (("NHWC", "NCHW"), ("NHWC", "NHWC"), ("NCHW", "NCHW")):
            shape, axis = ((3, 9, 17, 3), -1) if there == "NHWC" else ((3, 3, 9, 17), 1)
            formats = dict(data_format=there, out_format=back, out=out)
            yield dict(kind="images", dtype=dtype, shape=shape, channel_axis=axis, **formats)
    for options in (
        dict(decay=0.9, count=12), dict(decay=0.5, count=2, ddof=0), dict(seen=20, count=12),
        dict(seen=0, count=7, ddof=0),
    ):  # fmt: skip
        for dtype in DTYPES[:2]:
            yield dict(kind="running", dtype=dtype, shape=(1, 7), options=options)
    for decay, options in (
        (0.9, dict(updates=3, warmup=True)), (0.99, dict(updates=7, zero_debias=True)),
        (None, dict(seen=24.0, count=8.0)), (0.9, {}),
    ):  # fmt: skip
        yield dict(kind="decays", dtype="float64", shape=(1, 1), decay=decay, options=options)
    for settings, more in (
        ({}, {}), (dict(decay=None), {}), (dict(warmup=True), {}), (dict(zero_debias=True), {}),
        (dict(scale=False), {}), (dict(center=False, running_ddof=0, eps=1e-3), {}),
        (dict(activation="relu"), {}), (dict(activation="relu"), dict(residual=True)),
        (dict(activation="silu"), dict(residual=True)), (dict(activation="leaky_relu", slope=0.25), {}),
        (dict(renorm=dict(rmax=3.0, dmax=5.0)), {}), (dict(renorm=True, activation="relu"), {}),
        (dict(virtual_batch_size=2), {}), (dict(keep="y"), {}), (dict(keep="y", activation="leaky_relu"), {}),
        ({}, dict(positions="mask")), (dict(activation="relu"), dict(positions="mask weights")),
    ):  # fmt: skip
        for dtype, where in itertools.product(DTYPES[:2], FEW[::2]):
            settings = {**settings, "dtype": dtype, "allow_initial_statistics": True}
            yield dict(kind="layer", dtype=dtype, layer=settings, **where, **more)


def name_of(case: Case) -> str:
    """A line that says what the case is."""
    said = [case["kind"], case["dtype"], "x".join(map(str, case["shape"]))]
    rest = {k: v for k, v in case.items() if k not in ("kind", "dtype", "shape")}
    if "layer" in rest:
        rest["layer"] = {
            k: v for k, v in rest["layer"].items() if k not in ("dtype", "allow_initial_statistics")
        }
    return " ".join([*said, *(f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in rest.items())])


CASES = {name_of(case): case for case in _cases() if ml_dtypes is not None or case["dtype"] != "bfloat16"}


def hashes(case: Case, run: Any = results) -> dict[str, str]:
    """A hash of the bytes, shape and dtype of each result."""
    made = {}
    for name, value in run(case).items():
        a = np.ascontiguousarray(value)
        text = f"{a.dtype.name} {np.shape(value)} ".encode() + a.tobytes()
        made[name] = hashlib.sha256(text).hexdigest()[:8]
    return made


def stored() -> dict[str, dict[str, str]]:
    return {
        case: dict(pair.split(":") for pair in line.split())
        for case, line in json.loads(STORED.read_text()).items()
    }


def store(all_hashes: dict[str, dict[str, str]]) -> None:
    lines = {case: " ".join(f"{k}:{v}" for k, v in made.items()) for case, made in all_hashes.items()}
    STORED.write_text(json.dumps(lines, indent=0) + "\n")


def differences(case: str, wanted: dict[str, str]) -> list[str]:
    """Names of the results of a case whose hash is another."""
    made = hashes(CASES[case])
    return sorted(name for name in made.keys() | wanted.keys() if made.get(name) != wanted.get(name))


if __name__ == "__main__":
    known = stored()
    if "--add" in sys.argv:
        store(known | {name: hashes(case) for name, case in CASES.items() if name not in known})
    else:
        for name in CASES:
            for result in differences(name, known[name]):
                print(name, result)
