"""`axis=` a tuple: every combination of the channel axes is a channel of its own."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

AXES = [(1, 2, 3), (1,), (2, 3), (1, 3), (-1, 1), (0, 2), (3, 2)]


def data(rng, shape=(5, 3, 4, 6), dtype=np.float32):
    return rng.normal(2, 3, shape).astype(dtype)


def expected_forward(x, axes, gamma, beta, eps=1e-5):
    """In NumPy, over the other axes."""
    axes = sorted(a % x.ndim for a in axes)
    others = tuple(a for a in range(x.ndim) if a not in axes)
    wide = x.astype(np.float64)
    mean, var = wide.mean(axis=others), wide.var(axis=others)
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    inv_std = 1 / np.sqrt(var + eps)
    x_hat = (wide - mean.reshape(shape)) * inv_std.reshape(shape)
    return x_hat * gamma.reshape(shape) + beta.reshape(shape), mean, inv_std, x_hat, others, shape


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("order", ["C", "F", "last"])
def test_forward_and_backward(rng, axes, order):
    x, dy = data(rng), data(rng)
    if order == "last":
        x, dy = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (x, dy))
    else:
        x, dy = (np.asarray(a, order=order) for a in (x, dy))
    shape = tuple(x.shape[a] for a in sorted(a % 4 for a in axes))
    gamma, beta = rng.normal(size=(2, *shape)).astype(np.float32)
    y, mean, inv_std, x_hat, others, wide = expected_forward(x, axes, gamma, beta)
    running_mean, running_var = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    got = batchnorm.batch_norm_train(
        x, gamma, beta, axis=axes, running_mean=running_mean, running_var=running_var, decay=0, running_ddof=0
    )
    assert got.y.strides == np.empty_like(x).strides
    np.testing.assert_allclose(got.y, y, rtol=1e-5, atol=2e-5)
    assert got.mean.shape == got.inv_std.shape == shape
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.inv_std, inv_std, rtol=1e-6)
    np.testing.assert_allclose(running_mean, mean, rtol=1e-5)

    grads = batchnorm.batch_norm_backward(dy, x, got.mean, got.inv_std, gamma, beta, axis=axes)
    count = x.size // gamma.size
    dbeta, dgamma = dy.sum(axis=others, dtype=np.float64), (dy * x_hat).sum(axis=others)
    dx = (gamma * inv_std).reshape(wide) * (
        dy - dbeta.reshape(wide) / count - x_hat * dgamma.reshape(wide) / count
    )
    np.testing.assert_allclose(grads.dx, dx, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads.dgamma, dgamma, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads.dbeta, dbeta, rtol=1e-4, atol=1e-4)

    given = batchnorm.batch_norm(x, mean, 1 / inv_std**2, gamma, beta, eps=0, axis=axes)
    np.testing.assert_allclose(given, y, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("axes", AXES)
def test_moments(rng, axes):
    x = data(rng, dtype=np.float64)
    others = tuple(a for a in range(4) if a not in [b % 4 for b in axes])
    got = batchnorm.moments(x, axis=axes, ddof=1)
    np.testing.assert_allclose(got.mean, x.mean(axis=others), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got.var, x.var(axis=others, ddof=1), rtol=1e-12)
    kept = batchnorm.moments(x, axis=axes, keepdims=True)
    assert kept.mean.shape == x.mean(axis=others, keepdims=True).shape
    assert np.array_equal(kept.mean.reshape(got.mean.shape), got.mean)


def test_equals_one_axis(rng):
    x = data(rng)
    one, several = batchnorm.batch_norm_train(x), batchnorm.batch_norm_train(x, axis=(1,))
    assert all(np.array_equal(a, b) for a, b in zip(one, several, strict=True))
    flat = batchnorm.batch_norm_train(x.reshape(5, -1))
    each = batchnorm.batch_norm_train(x, axis=(1, 2, 3))
    assert np.array_equal(each.y.reshape(5, -1), flat.y)
    assert np.array_equal(each.mean.reshape(-1), flat.mean)


def test_out_and_in_place(rng):
    x = data(rng)
    want = batchnorm.batch_norm_train(x, axis=(2, 3)).y
    out = np.empty_like(x)
    assert batchnorm.batch_norm_train(x, axis=(2, 3), out=out).y is out
    assert np.array_equal(out, want)
    assert batchnorm.batch_norm_train(x, axis=(2, 3), out=x).y is x
    assert np.array_equal(x, want)


def test_residual_and_its_gradient(rng):
    x, z, dy = (data(rng) for _ in range(3))
    f = batchnorm.batch_norm_train(x, axis=(1, 2), residual=z, activation="relu")
    plain = batchnorm.batch_norm_train(x, axis=(1, 2)).y + z
    np.testing.assert_allclose(f.y, np.maximum(plain, 0), atol=1e-6)
    g = batchnorm.batch_norm_backward(
        dy, x, f.mean, f.inv_std, axis=(1, 2), activation="relu", activation_mask=f.activation_mask,
        needs=("dx", "dresidual"),
    )  # fmt: skip
    assert np.array_equal(g.dresidual, dy * (f.y > 0)) and g.dgamma is None
    assert len(f.activation_mask) == batchnorm.activation_mask_bytes(x, axis=(1, 2))


def refused(error, match, x=None, **options):
    x = np.ones((4, 3, 5), np.float32) if x is None else x
    with pytest.raises(error, match=match):
        batchnorm.batch_norm_train(x, **options)


@pytest.mark.parametrize(
    ("axis", "error", "match"),
    [
        ((), ValueError, r"axis is \(\), expected one or more different axes of x \(4, 3, 5\)"),
        ((1, 1), ValueError, r"axis is \(1, 1\), which names an axis twice"),
        ((1, -2), ValueError, "names an axis twice"),
        ((0, 1, 2), ValueError, "all axes of x .* expected at least one other, the batch"),
        ((1, 3), ValueError, r"axis is \(1, 3\), expected -3 <= axis < 3"),
        ((1, "2"), TypeError, "axis is '2'"),
        ((1, True), TypeError, "axis is True"),
        ((1, 2.0), TypeError, r"axis is 2\.0"),
    ],
)
def test_bad_axes(axis, error, match):
    refused(error, match, axis=axis)


def test_bad_arrays():
    refused(TypeError, "say the same thing", axis=(1, 2), data_format="NCL")
    refused(ValueError, "0 channels on axes", x=np.ones((4, 0, 5), np.float32), axis=(1, 2))
    refused(TypeError, "x is of type list|x is", x=[[1.0]], axis=(0,))
    refused(
        ValueError,
        r"gamma has shape \(3,\), expected a float32 or float64 array of shape \(3, 5\)",
        axis=(1, 2),
        gamma=np.ones(3, np.float32),
    )
    refused(TypeError, "gamma is 1", axis=(1, 2), gamma=1)
    refused(ValueError, r"residual has shape", axis=(1, 2), residual=np.ones((4, 3, 4), np.float32))
    wide = np.asarray(np.ones((3, 5), np.float32), order="F")
    match = "running_mean has strides .* expected a contiguous array, updated in place"
    refused(ValueError, match, axis=(1, 2), running_mean=wide, running_var=np.ones((3, 5), np.float32))
    refused(ValueError, "do not lie side by side", axis=(0, 2), out=np.ones((4, 3, 5), np.float32))
    refused(ValueError, "from which no variance", x=np.ones((1, 3, 5), np.float32), axis=(1, 2))
