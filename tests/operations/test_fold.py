"""fold: the folded layer is the layer and the normalisation after it, in every layout of weights."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

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


def vectors(dtype=np.float64):
    generator = np.random.default_rng(0)
    mean, gamma, beta, bias = generator.standard_normal((4, C)).astype(dtype)
    return mean, generator.uniform(0.5, 2, C).astype(dtype), gamma, beta, bias


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
        ({"mean": [0.0] * C}, TypeError, "mean is of type list"),
        ({"var": np.ones(C - 1)}, ValueError, r"var has shape \(5,\)"),
        ({"var": -np.ones(C)}, ValueError, r"var \+ eps is -0.9.* at channel 0"),
        ({"var": np.zeros(C), "eps": 0.0}, ValueError, r"var \+ eps is 0.0 at channel 0"),
        ({"gamma": np.full(C, np.nan)}, ValueError, "gamma.*nan"),
        ({"eps": "1e-5"}, TypeError, r"eps is '1e-5' \(str\)"),
        (
            {"out_axis": 1},
            ValueError,
            r"out_axis is 1, of length 3 in weight \(6, 3\).*the 6 channels of mean",
        ),
        ({"out_axis": 2}, ValueError, "out_axis is 2"),
        ({"out_axis": (0, 0)}, ValueError, r"out_axis is \(0, 0\)"),
        ({"out_axis": 1, "groups": 4}, ValueError, r"groups=4.*\(inputs, 1.5"),
        ({"groups": 0}, ValueError, "groups is 0"),
    ],
    ids=str,
)
def test_errors(change, error, words):
    call = {"weight": np.ones((C, 3)), "bias": None, "mean": np.zeros(C), "var": np.ones(C), "eps": 0.1}
    with pytest.raises(error, match=words):
        batchnorm.fold(**{**call, "out_axis": 0, **change})


def test_eps_and_out_axis_have_no_default():
    with pytest.raises(TypeError, match=r"eps.*out_axis"):
        batchnorm.fold(np.ones((C, 3)), None, np.zeros(C), np.ones(C))
