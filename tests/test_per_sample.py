"""gamma and beta of shape [N, C]: each sample has a scale and shift of its own."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

SHAPES = [
    ((5, 7), 1),
    ((4, 3, 6), 1),
    ((4, 6, 3), -1),
    ((3, 18, 5, 5), 1),
    ((3, 5, 5, 18), 3),
    ((1, 4, 9), 1),
]
KINDS = [("NC", "NC"), ("NC", "C"), ("C", "NC"), ("NC", None), (None, "NC")]


def vectors(rng, kind, shape, axis, dtype=np.float32):
    if kind is None:
        return None
    size = (shape[0], shape[axis]) if kind == "NC" else (shape[axis],)
    return rng.normal(size=size).astype(dtype)


def widened(v, default, x, axis):
    """As an array that broadcasts against x."""
    axis %= x.ndim
    rows = np.full((1, x.shape[axis]), default) if v is None else np.atleast_2d(v).astype(np.float64)
    return rows.reshape([len(rows)] + [x.shape[axis] if a == axis else 1 for a in range(1, x.ndim)])


def reference(x, dy, gamma, beta, axis, relu, eps=1e-5, fixed=None):
    axis %= x.ndim
    others = tuple(a for a in range(x.ndim) if a != axis)
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    g, b = widened(gamma, 1, x, axis), widened(beta, 0, x, axis)
    mean, var = x.mean(axis=others, keepdims=True), x.var(axis=others, keepdims=True)
    s = 1 / np.sqrt(var + eps)
    x_hat = (x - mean) * s
    y = x_hat * g + b
    if relu:
        dy = dy * (y > 0)
        y = np.maximum(y, 0)
    n = x.size // x.shape[axis]
    gdy = g * dy
    dx = s * gdy
    if not fixed:
        dx = s * (
            gdy - gdy.sum(axis=others, keepdims=True) / n
            - x_hat * (gdy * x_hat).sum(axis=others, keepdims=True) / n
        )  # fmt: skip
    spatial = tuple(a for a in others if a != 0)
    grads = []
    for value, full in ((gamma, dy * x_hat), (beta, dy)):
        per_sample = full.sum(axis=spatial) if spatial else full
        grads.append(per_sample if value is not None and value.ndim == 2 else per_sample.sum(axis=0))
    return y, mean.reshape(-1), s.reshape(-1), var.reshape(-1), dx, *grads


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("gamma_kind", "beta_kind"), KINDS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_training_inference_backward(rng, shape, axis, gamma_kind, beta_kind, activation):
    x, dy = rng.normal(2, 3, (2, *shape)).astype(np.float32)
    gamma, beta = vectors(rng, gamma_kind, shape, axis), vectors(rng, beta_kind, shape, axis)
    y, mean, s, var, dx, dgamma, dbeta = reference(x, dy, gamma, beta, axis, activation)
    options = {"axis": axis, "activation": activation}
    channels = shape[axis]
    running = {"running_mean": np.zeros(channels), "running_var": np.ones(channels)}
    plain = {name: v.copy() for name, v in running.items()}
    got = batchnorm.batch_norm_train(x, gamma, beta, **running, **options)
    same = batchnorm.batch_norm_train(x, **plain, axis=axis)
    assert all(np.array_equal(running[name], plain[name]) for name in running)
    assert np.array_equal(got.mean, same.mean) and np.array_equal(got.inv_std, same.inv_std)
    np.testing.assert_allclose(got.y, y, rtol=1e-5, atol=1e-5)
    inference = batchnorm.batch_norm(x, mean, var, gamma, beta, **options)
    np.testing.assert_allclose(inference, y, rtol=1e-5, atol=1e-5)

    grads = batchnorm.batch_norm_backward(dy, x, got.mean, got.inv_std, gamma, beta, **options)
    np.testing.assert_allclose(grads.dx, dx, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(grads.dgamma, dgamma, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(grads.dbeta, dbeta, rtol=1e-4, atol=2e-4)
    assert grads.dgamma.dtype == grads.dbeta.dtype == np.float32

    fixed = batchnorm.batch_norm_backward(dy, x, mean, s, gamma, beta, stats="fixed", **options)
    want = reference(x, dy, gamma, beta, axis, activation, fixed=True)
    np.testing.assert_allclose(fixed.dx, want[4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fixed.dgamma, want[5], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_equal_rows_are_one_row(rng, shape, axis):
    x, dy = rng.normal(2, 3, (2, *shape)).astype(np.float32)
    gamma, beta = rng.normal(size=(2, shape[axis])).astype(np.float32)
    rows = [np.tile(v, (shape[0], 1)) for v in (gamma, beta)]
    one, each = (batchnorm.batch_norm_train(x, *pair, axis=axis) for pair in ((gamma, beta), rows))
    assert all(np.array_equal(a, b) for a, b in zip(one, each, strict=True))
    g1 = batchnorm.batch_norm_backward(dy, x, one.mean, one.inv_std, gamma, beta, axis=axis)
    g2 = batchnorm.batch_norm_backward(dy, x, one.mean, one.inv_std, *rows, axis=axis)
    np.testing.assert_allclose(g1.dx, g2.dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(g1.dgamma, g2.dgamma.sum(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_residual_with_activation(rng, shape, axis, stats):
    x, dy, z = rng.normal(1, 2, (3, *shape)).astype(np.float32)
    gamma, beta = rng.normal(size=(2, shape[0], shape[axis])).astype(np.float32)
    f = batchnorm.batch_norm_train(x, gamma, beta, axis=axis, residual=z, activation="relu")
    plain = batchnorm.batch_norm_train(x, gamma, beta, axis=axis).y + z
    assert np.array_equal(f.y, np.maximum(plain, 0))
    g = batchnorm.batch_norm_backward(
        dy, x, f.mean, f.inv_std, gamma, beta, axis=axis, stats=stats, activation="relu",
        activation_mask=f.activation_mask, needs=("dx", "dgamma", "dbeta", "dresidual"),
    )  # fmt: skip
    masked = dy * (plain > 0)
    want = batchnorm.batch_norm_backward(masked, x, f.mean, f.inv_std, gamma, beta, axis=axis, stats=stats)
    assert np.array_equal(g.dresidual, masked)
    for a, b in zip(g, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_in_place_and_memory_orders(rng):
    x, dy = rng.normal(size=(2, 4, 3, 5, 6)).astype(np.float32)
    gamma, beta = rng.normal(size=(2, 4, 3)).astype(np.float32)
    want = batchnorm.batch_norm_train(x, gamma, beta)
    dx = batchnorm.batch_norm_backward(dy, x, want.mean, want.inv_std, gamma, beta).dx
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    crop = np.zeros((4, 3, 8, 8), np.float32)[:, :, 1:6, 2:8]
    crop[...] = x
    for other in (last, crop, x[:, ::1]):
        got = batchnorm.batch_norm_train(other, gamma, beta)
        np.testing.assert_allclose(got.y, want.y, rtol=1e-5, atol=1e-6)
        grads = batchnorm.batch_norm_backward(dy, other, got.mean, got.inv_std, gamma, beta)
        np.testing.assert_allclose(grads.dx, dx, rtol=1e-4, atol=1e-6)
    place = dy.copy()
    grads = batchnorm.batch_norm_backward(place, x, want.mean, want.inv_std, gamma, beta, out=place)
    assert grads.dx is place and np.array_equal(place, dx)
    place = x.copy()
    assert batchnorm.batch_norm_train(place, gamma, beta, out=place).y is place
    assert np.array_equal(place, want.y)


def test_selective_and_empty(rng):
    x = rng.normal(size=(4, 3, 5))
    gamma = rng.normal(size=(4, 3))
    f = batchnorm.batch_norm_train(x, gamma)
    only = batchnorm.batch_norm_backward(x, x, f.mean, f.inv_std, gamma, needs=("dgamma",))
    assert only.dx is None and only.dbeta is None and only.dgamma.dtype == np.float64
    empty = np.empty((0, 3, 5), np.float32)
    nothing = np.empty((0, 3), np.float32)
    got = batchnorm.batch_norm_train(empty, nothing)
    assert got.y.shape == empty.shape and np.isnan(got.mean).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"beta": np.ones((3, 4))}, r"beta has shape \(3, 4\), expected \(4, 3\) or \(3,\)"),
        ({"beta": np.ones(4)}, r"beta has shape \(4,\), expected \(3,\)"),
        ({"gamma": np.full((4, 3), np.nan)}, "gamma is nan at sample 0, channel 0, expected finite"),
        ({"running_mean": np.zeros(3)}, "running_var is None"),
        ({"x": np.ones((4, 3))[:1], "gamma": np.ones((1, 3))}, "one value per channel"),
    ],
)
def test_errors_change_nothing(change, match):
    arguments = {"x": np.ones((4, 3, 5)), "gamma": np.ones((4, 3)), "beta": np.ones((4, 3))}
    arguments = {"x": arguments["x"], "gamma": arguments["gamma"], "beta": None} | change
    with pytest.raises(ValueError, match=match):
        batchnorm.batch_norm_train(**arguments)
    if "running_mean" in change:
        assert not change["running_mean"].any()
