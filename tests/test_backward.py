"""`batch_norm_backward` against the reference, and what its options mean."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

from cases import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    SOME_SHAPES,
    TRAIN_SHAPES,
    Shape,
    gradient_of,
    normal,
    parameters,
    rng,
    same_bits,
    subsets,
)
from checks import assert_gradients

NEEDS = ("dx", "dgamma", "dbeta")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TRAIN_SHAPES, ids=str)
def test_batch_statistics(shape, dtype):
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    gamma, beta = parameters(shape.channels, np.float64 if dtype == FLOAT64 else np.float32)
    forward = batchnorm.batch_norm_train(x, gamma, beta)
    got = batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std, gamma, beta)
    assert_gradients(got, dy, x, forward.mean, forward.inv_std, gamma)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SOME_SHAPES, Shape("ncs", 1, 3, 1), Shape("nsc", 1, 20, 1)], ids=str)
def test_fixed_statistics(shape, dtype):
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    gamma, beta = parameters(shape.channels)
    generator = rng("fixed", shape.channels)
    mean, inv_std = generator.standard_normal(shape.channels), generator.uniform(0.25, 4, shape.channels)
    got = batchnorm.batch_norm_backward(dy, x, mean, inv_std, gamma, beta, stats="fixed")
    assert_gradients(got, dy, x, mean, inv_std, gamma, stats="fixed")


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_relu_masks_dy_where_forward_was_positive(shape, dtype, stats):
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    gamma, beta = parameters(shape.channels)
    forward = batchnorm.batch_norm_train(x, gamma, beta, activation="relu")
    on = np.asarray(forward.y > 0)
    assert on.any() and not on.all()
    masked = np.where(on, dy, dtype.type(0))
    got = batchnorm.batch_norm_backward(
        dy, x, forward.mean, forward.inv_std, gamma, beta, stats=stats, activation="relu"
    )
    assert_gradients(got, masked, x, forward.mean, forward.inv_std, gamma, stats=stats)
    plain = batchnorm.batch_norm_backward(
        shape.array(masked), x, forward.mean, forward.inv_std, gamma, beta, stats=stats
    )
    for fused, separate in zip(got, plain, strict=True):
        np.testing.assert_array_equal(fused, separate)


@pytest.mark.parametrize("with_beta", [False, True], ids=["no beta", "beta"])
@pytest.mark.parametrize("with_gamma", [False, True], ids=["no gamma", "gamma"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gamma_and_beta_are_independent(activation, with_gamma, with_beta):
    shape = Shape("ncs", 4, 5, 23)
    x, dy = normal(shape, FLOAT32), gradient_of(shape, FLOAT32)
    gamma, beta = parameters(5)
    gamma, beta = gamma if with_gamma else None, beta if with_beta else None
    forward = batchnorm.batch_norm_train(x, gamma, beta, activation=activation)
    got = batchnorm.batch_norm_backward(
        dy, x, forward.mean, forward.inv_std, gamma, beta, activation=activation
    )
    masked = dy if activation is None else np.where(forward.y > 0, dy, np.float32(0))
    assert_gradients(got, masked, x, forward.mean, forward.inv_std, gamma)


def test_beta_matters_only_with_an_activation():
    shape = Shape("ncs", 4, 5, 23)
    x, dy = normal(shape, FLOAT32), gradient_of(shape, FLOAT32)
    gamma, beta = parameters(5)
    mean, inv_std = batchnorm.batch_norm_train(x)[1:]
    with_beta, without = (batchnorm.batch_norm_backward(dy, x, mean, inv_std, gamma, b) for b in (beta, None))
    assert all(same_bits(a, b) for a, b in zip(with_beta, without, strict=True))


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("needs", subsets(NEEDS), ids="+".join)
@pytest.mark.parametrize("container", [tuple, list, set])
def test_needs_selects_without_changing_bits(needs, stats, container):
    shape = Shape("nsc", 40, 5, 3)
    x, dy = normal(shape, FLOAT32), gradient_of(shape, FLOAT32)
    gamma, beta = parameters(5)
    mean, inv_std = batchnorm.batch_norm_train(x)[1:]
    arguments = {"stats": stats, "activation": "relu"}
    full = batchnorm.batch_norm_backward(dy, x, mean, inv_std, gamma, beta, **arguments)
    got = batchnorm.batch_norm_backward(
        dy, x, mean, inv_std, gamma, beta, needs=container(needs), **arguments
    )
    for name in NEEDS:
        if name in needs:
            assert same_bits(getattr(got, name), getattr(full, name))
        else:
            assert getattr(got, name) is None


@pytest.mark.parametrize("beta_dtype", [None, FLOAT32, FLOAT64], ids=lambda t: f"beta {t}")
@pytest.mark.parametrize("gamma_dtype", [None, FLOAT32, FLOAT64], ids=lambda t: f"gamma {t}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_types(dtype, gamma_dtype, beta_dtype):
    # Each gradient has its parameter's type; an absent parameter takes the other's, or the type that suits x.
    shape = Shape("ncs", 4, 5, 23)
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    gamma = None if gamma_dtype is None else parameters(5)[0].astype(gamma_dtype)
    beta = None if beta_dtype is None else parameters(5)[1].astype(beta_dtype)
    mean, inv_std = batchnorm.batch_norm_train(x)[1:]
    got = batchnorm.batch_norm_backward(dy, x, mean, inv_std, gamma, beta)
    default = FLOAT64 if dtype == FLOAT64 else FLOAT32
    assert type(got).__name__ == "Gradients" and got._fields == NEEDS
    assert got.dx.dtype == dtype and got.dx.shape == x.shape
    assert got.dgamma.dtype == (gamma_dtype or beta_dtype or default)
    assert got.dbeta.dtype == (beta_dtype or gamma_dtype or default)
    assert got.dgamma.shape == got.dbeta.shape == (5,)
    assert_gradients(got, dy, x, mean, inv_std, gamma)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_statistics_may_be_float32(dtype):
    shape = Shape("ncs", 4, 5, 23)
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    mean, inv_std = (v.astype(np.float32) for v in batchnorm.batch_norm_train(x)[1:])
    narrow = batchnorm.batch_norm_backward(dy, x, mean, inv_std)
    wide = batchnorm.batch_norm_backward(dy, x, mean.astype(np.float64), inv_std.astype(np.float64))
    assert all(same_bits(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ndim", [2, 3, 4, 5])
def test_every_axis(ndim, dtype):
    shape = (3, 4, 2, 5, 2)[:ndim]
    generator = np.random.default_rng(ndim)
    x, dy = (generator.standard_normal(shape).astype(dtype) for _ in range(2))
    for axis in range(-ndim, ndim):
        gamma, beta = parameters(shape[axis])
        mean, inv_std = batchnorm.batch_norm_train(x, axis=axis)[1:]
        for stats in ("batch", "fixed"):
            got = batchnorm.batch_norm_backward(dy, x, mean, inv_std, gamma, beta, axis=axis, stats=stats)
            assert_gradients(got, dy, x, mean, inv_std, gamma, axis, stats)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_empty_batch(shape, stats, dtype):
    x = np.empty(shape, dtype)
    forward = batchnorm.batch_norm_train(x)
    gamma = np.ones(3)
    got = batchnorm.batch_norm_backward(x.copy(), x, forward.mean, forward.inv_std, gamma, stats=stats)
    assert got.dx.shape == shape and got.dx.dtype == dtype
    np.testing.assert_array_equal(got.dgamma, np.zeros(3))
    np.testing.assert_array_equal(got.dbeta, np.zeros(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_saved_statistics_stays_in_its_channel(dtype):
    shape = Shape("nsc", 40, 5, 3)
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    x[3, 2, 1] = np.nan
    forward = batchnorm.batch_norm_train(x)
    assert np.isnan(forward.mean[2]) and np.isnan(forward.inv_std[2])
    got = batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std)
    other = [0, 1, 3, 4]
    assert np.isnan(got.dx[:, 2]).all() and np.isnan(got.dgamma[2])
    assert np.isfinite(got.dx[:, other].astype(np.float64)).all() and np.isfinite(got.dgamma[other]).all()
    assert np.isfinite(got.dbeta).all()


def test_two_values_per_channel():
    # With two values and eps = 0, x_hat is -1 and 1 and the gradient vanishes whatever dy is.
    x, dy = np.float64([[1, 5], [3, -5]]), np.float64([[2, 7], [11, -3]])
    forward = batchnorm.batch_norm_train(x, eps=0)
    np.testing.assert_array_equal(forward.y, [[-1, 1], [1, -1]])
    got = batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std)
    np.testing.assert_array_equal(got.dbeta, [13, 4])
    np.testing.assert_array_equal(got.dgamma, [9, 10])
    np.testing.assert_allclose(got.dx, np.zeros((2, 2)), atol=1e-14)
