"""fold: the folded layer is the layer and the normalisation after it, in every layout of weights."""

from __future__ import annotations

import ast
import functools
import itertools
import re

import batchnorm
import numpy as np
import pytest

from support.problem import BFLOAT16

pytestmark = pytest.mark.quick

N, INPUTS, C, GROUPS = 5, 4, 6, 2


def by_groups(equation, *shape):
    """A layer whose inputs, and weights of this shape, are taken apart into groups."""
    return lambda x, w: np.einsum(equation, x.reshape(N, GROUPS, -1), w.reshape(shape)).reshape(N, C)


# Shape of the weight, out_axis, groups, and the layer. Without pixels, layouts say all that there is to know.
LAYERS = {
    "dense, outputs first": ((C, INPUTS), 0, 1, lambda x, w: x @ w.T),
    "dense, outputs last": ((INPUTS, C), -1, 1, lambda x, w: x @ w),
    "OIHW": ((C, INPUTS, 1, 1), 0, 1, lambda x, w: np.einsum("ni,oihw->no", x, w)),
    "HWIO": ((1, 1, INPUTS, C), 3, 1, lambda x, w: np.einsum("ni,hwio->no", x, w)),
    "transposed IOHW": ((INPUTS, C, 1, 1), 1, 1, lambda x, w: np.einsum("ni,iohw->no", x, w)),
    "transposed HWOI": ((1, 1, C, INPUTS), -2, 1, lambda x, w: np.einsum("ni,hwoi->no", x, w)),
    "grouped": ((C, INPUTS // GROUPS, 1), 0, GROUPS, by_groups("ngi,goi->ngo", GROUPS, -1, 2)),
    "grouped transposed": ((INPUTS, C // GROUPS, 1), 1, GROUPS, by_groups("ngi,gio->ngo", GROUPS, 2, -1)),
    "depthwise HWCM": ((1, 1, 2, 3), (2, 3), 1, lambda x, w: (x[:, :2, None] * w[0, 0]).reshape(N, C)),
    "outputs of two axes": (
        (3, INPUTS, 2), (2, 0), 1, lambda x, w: np.einsum("ni,mig->ngm", x, w).reshape(N, C),
    ),
}  # fmt: skip


def vectors(dtype=np.float64, channels=C):
    generator = np.random.default_rng(0)
    mean, gamma, beta, bias = generator.standard_normal((4, channels)).astype(dtype)
    return mean, generator.uniform(0.5, 2, channels).astype(dtype), gamma, beta, bias


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_layout(layer, with_bias):
    shape, out_axis, groups, apply = layer
    generator = np.random.default_rng(1)
    x, weight = generator.standard_normal((N, INPUTS)), generator.standard_normal(shape)
    mean, var, gamma, beta, bias = vectors()
    bias = bias if with_bias else None
    before = weight.copy()
    w, b = batchnorm.fold(weight, bias, mean, var, gamma, beta, eps=1e-3, out_axis=out_axis, groups=groups)
    want = batchnorm.batch_norm(
        apply(x, weight) + (0 if bias is None else bias), mean, var, gamma, beta, eps=1e-3
    )
    assert np.allclose(apply(x, w) + b, want, rtol=1e-12, atol=1e-12)
    assert (weight == before).all() and w.shape == shape and b.shape == (C,)


def convolve(x, w, groups=1):
    """x (N, inputs, H, W) by w (outputs, inputs / groups, h, w), without padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3))
    windows = windows.reshape(len(x), groups, -1, *windows.shape[2:])
    y = np.einsum("ngihwkl,goikl->ngohw", windows, w.reshape(groups, -1, *w.shape[1:]))
    return y.reshape(len(x), -1, *y.shape[3:])


def transposed(x, w, groups=1):
    """x (N, inputs, H, W) by w (inputs, outputs / groups, h, w): the convolution's gradient by its input."""
    padded = np.pad(x, [(0, 0), (0, 0), *((size - 1, size - 1) for size in w.shape[2:])])
    kernels = w.reshape(groups, -1, *w.shape[1:]).swapaxes(1, 2)[..., ::-1, ::-1]
    return convolve(padded, kernels.reshape(-1, len(w) // groups, *w.shape[2:]), groups)


def of_keras(layer):
    return lambda x, w: layer(x, w.transpose(3, 2, 0, 1))


OI, IO, T = (
    "a layer (outputs, inputs, ...)",
    "a layer (..., inputs, outputs)",
    "a transposed convolution (%s)",
)
TORCH, KERAS = T % "inputs, outputs / groups, ...", T % "..., outputs, inputs"
DEPTHWISE = "a depthwise convolution (..., inputs, multiplier)"
# Of 4 inputs and 8 outputs: shape of the weight, out_axis, groups, what errors call it, the layer.
CONVOLUTIONS = {
    "OIHW": ((8, 4, 3, 2), 0, 1, OI, convolve),
    "HWIO": ((3, 2, 4, 8), -1, 1, IO, of_keras(convolve)),
    "grouped OIHW": ((8, 2, 3, 2), 0, 2, OI, functools.partial(convolve, groups=2)),
    "grouped HWIO": ((3, 2, 2, 8), -1, 1, IO, of_keras(functools.partial(convolve, groups=2))),
    "depthwise OIHW": ((8, 1, 3, 2), 0, 4, OI, functools.partial(convolve, groups=4)),
    "depthwise HWCM": (
        (3, 2, 4, 2), (2, 3), 1, DEPTHWISE,
        lambda x, w: convolve(x, w.transpose(2, 3, 0, 1).reshape(8, 1, 3, 2), 4),
    ),
    "transposed IOHW": ((4, 8, 3, 2), 1, 1, TORCH, transposed),
    "transposed HWOI": ((3, 2, 8, 4), -2, 1, KERAS, of_keras(transposed)),
    "grouped transposed": ((4, 4, 3, 2), 1, 2, TORCH, functools.partial(transposed, groups=2)),
    "depthwise transposed": ((4, 2, 3, 2), -3, 4, TORCH, functools.partial(transposed, groups=4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_the_remedies_for_wrong_axes(name):
    shape, right_axis, right_groups, what, layer = CONVOLUTIONS[name]
    generator = np.random.default_rng(2)
    x, weight = generator.standard_normal((2, 4, 5, 6)), generator.standard_normal(shape)
    mean, var, gamma, beta, bias = vectors(channels=8)
    y = layer(x, weight) + bias[:, None, None]
    want = batchnorm.batch_norm(y, mean, var, gamma, beta, eps=1e-3)

    def error(out_axis, groups):
        w, b = batchnorm.fold(
            weight, bias, mean, var, gamma, beta, eps=1e-3, out_axis=out_axis, groups=groups
        )
        return np.abs(layer(x, w) + b[:, None, None] - want).max()

    assert error(right_axis, right_groups) < 1e-12
    refused = 0
    for axis, groups in itertools.product((*range(-4, 4), (2, 3), (0, 1)), (1, 2, 3, 4, 8)):
        try:
            error(axis, groups)
        except ValueError as caught:
            refused += 1
            remedy = re.search(rf"out_axis=([^=]+), groups=(\d+) for {re.escape(what)}", str(caught))
            assert error(ast.literal_eval(remedy[1]), int(remedy[2])) < 1e-12, caught
    assert refused > 25


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_types_are_those_of_the_layer(dtype):
    mean, var, *_, bias = vectors(np.float32)
    weight = np.ones((C, 3), dtype)
    w, b = batchnorm.fold(weight, None, mean, var, eps=1e-5, out_axis=0)
    assert w.dtype == dtype and b.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert batchnorm.fold(weight, bias, mean, var, eps=1e-5, out_axis=0)[1].dtype == np.float32
    want = 1 / np.sqrt(var.astype(np.float64) + 1e-5)
    assert (w[:, 0] == want.astype(dtype)).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": np.ones((C, 3), int)}, TypeError, "weight has dtype int64"),
        ({"weight": [1.0]}, TypeError, "weight is of type list"),
        ({"weight": np.ma.ones((C, 3))}, TypeError, "weight is of type numpy"),
        ({"mean": [0.0] * C}, TypeError, "mean is of type list"),
        ({"var": np.ones(C - 1)}, ValueError, r"var has shape \(5,\)"),
        ({"var": -np.ones(C)}, ValueError, "var is -1.0 at channel 0, expected var >= 0"),
        ({"var": np.full(C, -1e-9)}, ValueError, "var is -1e-09 at channel 0"),
        ({"var": np.zeros(C), "eps": 0.0}, ValueError, r"var \+ eps is 0.0.*expected var >= 0 and var"),
        ({"eps": np.inf}, ValueError, "eps is inf, expected a finite number"),
        ({"gamma": np.full(C, np.nan)}, ValueError, "gamma.*nan"),
        ({"eps": "1e-5"}, TypeError, r"eps is '1e-5' \(str\)"),
        (
            {"out_axis": 1},
            ValueError,
            r"out_axis is 1 and groups is 1 with weight \(6, 3\), .* 6 channels of mean: "
            r"out_axis=0, groups=1 for a layer \(outputs, inputs, ...\)$",  # of dense layers no other fits
        ),
        ({"out_axis": 2}, ValueError, "out_axis is 2"),
        ({"out_axis": (0, 0)}, ValueError, r"out_axis is \(0, 0\)"),
        (
            {"out_axis": 1, "groups": 4},
            ValueError,
            "groups is 4 with weight.*out_axis=0, groups=1 for a layer",
        ),
        ({"groups": 4}, ValueError, "groups is 4 with weight.*out_axis=0, groups=1 for a layer"),
        (
            {"weight": np.ones((8, C, 3)), "out_axis": 1, "groups": 2},
            ValueError,
            "out_axis=1, groups=1 for a tr",
        ),
        ({"weight": np.ones((5, 3))}, ValueError, "weight and mean are not of the same layer"),
        ({"weight": np.full((C, 3), np.nan)}, ValueError, "weight and bias are not finite in float64"),
        ({"groups": 0}, ValueError, "groups is 0"),
    ],
    ids=str,
)
def test_errors(change, error, words):
    call = {"weight": np.ones((C, 3)), "bias": None, "mean": np.zeros(C), "var": np.ones(C), "eps": 0.1}
    with pytest.raises(error, match=words):
        batchnorm.fold(**{**call, "out_axis": 0, **change})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BFLOAT16])
def test_what_a_dtype_cannot_hold(dtype):
    if dtype is None:
        pytest.skip("ml_dtypes is not installed")
    weight = np.array([[6e4 if dtype == np.float16 else 3e38]], dtype)
    rest = (None, np.zeros(1), np.full(1, 1e-4))
    with pytest.raises(ValueError, match=r"not finite in \w+ and float32.*of float64"):
        batchnorm.fold(weight, *rest, eps=0, out_axis=0)
    wide = weight.astype(np.float64)
    assert np.allclose(batchnorm.fold(wide, *rest, eps=0, out_axis=0)[0], wide * 100, rtol=1e-15)


def test_eps_and_out_axis_have_no_default():
    with pytest.raises(TypeError, match=r"eps.*out_axis"):
        batchnorm.fold(np.ones((C, 3)), None, np.zeros(C), np.ones(C))
