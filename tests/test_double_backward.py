"""`batch_norm_double_backward` against finite differences of the backward pass, and identities."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

EPS = 1e-3


def backward(dy, x, gamma, *, axis, stats, activation, given):
    """dx, dgamma, dbeta in NumPy longdouble, statistics recomputed from x unless fixed."""
    dy, x, gamma = (a.astype(np.longdouble) for a in (dy, x, gamma))
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    shape = [1] * x.ndim
    shape[axis] = -1
    n = x.size // x.shape[axis]
    mean, var, beta = given
    if stats == "batch":
        mean, var = x.mean(axis=others), x.var(axis=others)
    s = (1 / np.sqrt(var + EPS)).reshape(shape)
    h = (x - mean.reshape(shape)) * s
    if activation:
        dy = dy * (h * gamma.reshape(shape) + beta.reshape(shape) > 0)
    dgamma, dbeta = (dy * h).sum(axis=others), dy.sum(axis=others)
    dx = gamma.reshape(shape) * s * dy
    if stats == "batch":
        dx = gamma.reshape(shape) * s * (dy - dbeta.reshape(shape) / n - h * dgamma.reshape(shape) / n)
    return dx, dgamma, dbeta


def problem(seed, shape, axis, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x, dy, ddx = (rng.normal(1, 2, shape).astype(dtype) for _ in range(3))
    channels = shape[axis]
    gamma, beta, ddgamma, ddbeta = rng.normal(size=(4, channels))
    return x, dy, ddx, gamma, beta, ddgamma, ddbeta


CASES = [
    ((6, 3), 1), ((4, 2, 5), 1), ((4, 5, 2), -1), ((2, 17, 3, 3), 1), ((3, 3, 2, 5), -1),
]  # fmt: skip


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_against_finite_differences(shape, axis, stats, activation):
    x, dy, ddx, gamma, beta, ddgamma, ddbeta = problem(1, shape, axis)
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    mean, var = x.mean(axis=others), x.var(axis=others)
    options = {"axis": axis, "stats": stats, "activation": activation}
    got = batchnorm.batch_norm_double_backward(
        ddx, ddgamma, ddbeta, dy, x, mean, 1 / np.sqrt(var + EPS), gamma, beta, **options
    )

    def loss(dy, x, gamma):
        results = backward(dy, x, gamma, given=(mean, var, beta), **options)
        return sum((a * b).sum() for a, b in zip(results, (ddx, ddgamma, ddbeta), strict=True))

    def slope_of(index, array):
        step, values = np.longdouble(1e-6), [dy, x, gamma]
        gradient = np.zeros(array.shape, np.longdouble)
        for i in np.ndindex(array.shape):
            sides = []
            for sign in (1, -1):
                moved = array.astype(np.longdouble)
                moved[i] += sign * step
                sides.append(loss(*values[:index], moved, *values[index + 1 :]))
            gradient[i] = (sides[0] - sides[1]) / (2 * step)
        return gradient

    for index, (name, array) in enumerate((("ddy", dy), ("dx", x), ("dgamma", gamma))):
        want = slope_of(index, array)
        np.testing.assert_allclose(
            getattr(got, name), want.astype(np.float64), rtol=1e-6, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("stats", ["batch", "fixed"])
def test_it_is_linear_and_none_is_zero(stats):
    x, dy, ddx, gamma, _, ddgamma, ddbeta = problem(2, (5, 3, 4), 1)
    f = batchnorm.batch_norm_train(x)
    rest = (dy, x, f.mean, f.inv_std, gamma)
    whole = batchnorm.batch_norm_double_backward(ddx, ddgamma, ddbeta, *rest, stats=stats)
    parts = [
        batchnorm.batch_norm_double_backward(*cotangents, *rest, stats=stats)
        for cotangents in ((ddx, None, None), (None, ddgamma, None), (None, None, ddbeta))
    ]
    for i in range(3):
        np.testing.assert_allclose(sum(part[i] for part in parts), whole[i], rtol=1e-12, atol=1e-12)


def test_what_the_first_order_maps_to_zero():
    """dx does not change with a constant or x itself added to dy, so no ddx leads there."""
    x, dy, ddx, gamma, *_ = problem(3, (8, 2, 6), 1)
    f = batchnorm.batch_norm_train(x, eps=0)
    ddy = batchnorm.batch_norm_double_backward(ddx, None, None, dy, x, f.mean, f.inv_std, gamma).ddy
    np.testing.assert_allclose(ddy.sum(axis=(0, 2)), 0, atol=1e-12)
    np.testing.assert_allclose((ddy * x).sum(axis=(0, 2)), 0, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "axis"), [((16, 8, 9, 9), 1), ((16, 9, 9, 8), -1)])
def test_narrow_types_follow_float64(dtype, shape, axis):
    x, dy, ddx, gamma, beta, ddgamma, ddbeta = problem(4, shape, axis, dtype)
    results = []
    for kind in (dtype, np.float64):
        a, b, c = (v.astype(kind) for v in (ddx, dy, x))
        f = batchnorm.batch_norm_train(c, axis=axis)
        results.append(
            batchnorm.batch_norm_double_backward(
                a, ddgamma, ddbeta, b, c, f.mean, f.inv_std, gamma, beta, axis=axis, activation="relu"
            )
        )
    got, want = results
    assert got.ddy.dtype == got.dx.dtype == dtype
    for name in ("ddy", "dx"):
        a, b = getattr(got, name).astype(np.float64), getattr(want, name)
        # Two elementwise steps, each of four roundings relative to the largest term.
        assert np.abs(a - b).max() <= 16 * np.finfo(dtype).eps * max(1, np.abs(b).max()), name


def test_memory_orders_and_several_axes():
    x, dy, ddx, gamma, _, ddgamma, ddbeta = problem(5, (5, 3, 4, 2), 1)
    f = batchnorm.batch_norm_train(x)
    want = batchnorm.batch_norm_double_backward(ddx, ddgamma, ddbeta, dy, x, f.mean, f.inv_std, gamma)
    crop = np.zeros((5, 3, 9, 9))[:, :, 2:6, 3:5]
    crop[...] = x
    got = batchnorm.batch_norm_double_backward(
        np.asfortranarray(ddx), ddgamma, ddbeta, dy[::1], crop, f.mean, f.inv_std, gamma
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    got = batchnorm.batch_norm_double_backward(
        ddx, ddgamma, ddbeta, dy, x, f.mean, f.inv_std, gamma, axis=(1,)
    )
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_empty_batch_and_result_types():
    x = np.empty((0, 3, 4), np.float32)
    zeros = np.zeros(3)
    got = batchnorm.batch_norm_double_backward(x, zeros, zeros, x, x, zeros, zeros)
    assert got.ddy.shape == got.dx.shape == x.shape and got.dgamma.dtype == np.float32
    assert np.array_equal(got.dgamma, [0, 0, 0])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"ddx": None, "ddgamma": None, "ddbeta": None}, ValueError, "all None, expected at least one"),
        ({"ddx": np.ones((4, 3, 4))}, ValueError, r"ddx has shape \(4, 3, 4\), expected \(4, 3, 5\)"),
        ({"ddx": np.ones((4, 3, 5), np.float32)}, TypeError, "ddx has dtype float32, expected float64"),
        ({"ddgamma": np.ones(2)}, ValueError, r"ddgamma has shape \(2,\), expected \(3,\)"),
        ({"ddbeta": np.full(3, np.nan)}, ValueError, "ddbeta is nan at channel 0, expected finite"),
        ({"dy": np.ones((4, 3))}, ValueError, "dy has shape"),
        ({"stats": "running"}, ValueError, "stats is 'running'"),
        ({"activation": "tanhh"}, ValueError, "activation is 'tanhh'"),
        ({"epsilon": 1e-5}, TypeError, "no argument 'epsilon'"),
    ],
)
def test_errors(change, error, match):
    a = np.ones((4, 3, 5))
    v = np.ones(3)
    arguments = {"ddx": a, "ddgamma": v, "ddbeta": v, "dy": a, "x": a, "mean": v, "inv_std": v}
    with pytest.raises(error, match=match):
        batchnorm.batch_norm_double_backward(**arguments | change)
