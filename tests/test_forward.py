"""`batch_norm` and `batch_norm_train` against the reference, and what their options mean."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import reference
import tolerances
from cases import DTYPES, FLOAT32, FLOAT64, SOME_SHAPES, TRAIN_SHAPES, Shape, normal, parameters, same_bits
from checks import assert_forward, precision

FORMATS = {
    "NC": (2, 1),
    "NCL": (3, 1),
    "NLC": (3, 2),
    "NCHW": (4, 1),
    "NHWC": (4, 3),
    "NCDHW": (5, 1),
    "NDHWC": (5, 4),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TRAIN_SHAPES, ids=str)
def test_training(shape, dtype):
    x = normal(shape, dtype)
    gamma, beta = parameters(shape.channels, np.float64 if dtype == FLOAT64 else np.float32)
    got = batchnorm.batch_norm_train(x, gamma, beta)
    mean, var = reference.moments(x, dtype=np.longdouble)
    assert np.all(np.abs(got.mean - mean) <= tolerances.mean_error(dtype, mean, np.sqrt(var)))
    assert np.all(np.abs(got.inv_std * np.sqrt(var + 1e-5) - 1) <= tolerances.inv_std_error(dtype))
    want = reference.normalize(x, mean, var, gamma, beta, dtype=precision(dtype))
    assert_forward(got.y, x, want, gamma, beta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_inference(shape, dtype):
    x = normal(shape, dtype)
    gamma, beta = parameters(shape.channels)
    mean, var = (v.astype(np.float32) for v in reference.moments(x))
    got = batchnorm.batch_norm(x, mean, var, gamma, beta, eps=1e-3)
    want = reference.normalize(x, mean, var, gamma, beta, eps=1e-3, dtype=precision(dtype))
    assert_forward(got, x, want, gamma, beta, exact_mean=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [Shape("ncs", 1, 3, 1), Shape("ncs", 1, 20, 1), Shape("nsc", 1, 65, 1)], ids=str
)
def test_inference_takes_one_value_per_channel(shape, dtype):
    x = normal(shape, dtype)
    mean, var = np.full(shape.channels, 0.5), np.full(shape.channels, 2.0)
    want = reference.normalize(x, mean, var, dtype=precision(dtype))
    assert_forward(batchnorm.batch_norm(x, mean, var), x, want, exact_mean=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_beta", [False, True], ids=["no beta", "beta"])
@pytest.mark.parametrize("with_gamma", [False, True], ids=["no gamma", "gamma"])
def test_gamma_and_beta_are_independent(with_gamma, with_beta, dtype):
    shape = Shape("ncs", 4, 5, 23)
    x = normal(shape, dtype)
    gamma, beta = parameters(5)
    gamma, beta = gamma if with_gamma else None, beta if with_beta else None
    want = reference.train(x, gamma, beta, dtype=precision(dtype))
    assert_forward(batchnorm.batch_norm_train(x, gamma, beta).y, x, want, gamma, beta)
    assert_forward(
        batchnorm.batch_norm(x, want.mean.astype(float), want.var.astype(float), gamma, beta),
        x,
        want,
        gamma,
        beta,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_parameters_are_one_and_zero(dtype):
    x = normal(Shape("ncs", 4, 5, 23), dtype)
    one, zero = np.ones(5), np.zeros(5)
    explicit = batchnorm.batch_norm_train(x, one, zero)
    assert same_bits(explicit.y, batchnorm.batch_norm_train(x).y)
    assert same_bits(explicit.y, batchnorm.batch_norm_train(x, gamma=one).y)
    assert same_bits(explicit.y, batchnorm.batch_norm_train(x, beta=zero).y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_channel_types_do_not_matter(dtype):
    # The same numbers as float32 or float64, contiguous or not, give the same bits.
    x = normal(Shape("ncs", 4, 5, 23), dtype)
    gamma, beta = parameters(5)
    mean, var = np.float32([1, -2, 0.5, 0, 3]), np.float32([1, 4, 0.5, 2, 3])
    want = batchnorm.batch_norm(x, mean, var, gamma, beta)
    assert same_bits(want, batchnorm.batch_norm(x, *(v.astype(np.float64) for v in (mean, var, gamma, beta))))
    assert same_bits(
        want, batchnorm.batch_norm(x, mean.astype(np.float64), var, gamma.astype(np.float64), beta)
    )
    assert same_bits(want, batchnorm.batch_norm(x, *(np.repeat(v, 3)[::3] for v in (mean, var, gamma, beta))))
    assert same_bits(want, batchnorm.batch_norm(x, *(v[::-1].copy()[::-1] for v in (mean, var, gamma, beta))))
    assert same_bits(
        batchnorm.batch_norm_train(x, gamma, beta).y,
        batchnorm.batch_norm_train(x, gamma.astype(float), beta).y,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1e-3, 1, 100.0])
def test_eps_is_inside_the_square_root(eps, dtype):
    x = normal(Shape("ncs", 4, 5, 23), dtype)
    want = reference.train(x, eps=eps, dtype=precision(dtype))
    got = batchnorm.batch_norm_train(x, eps=eps)
    assert_forward(got.y, x, want)
    np.testing.assert_allclose(
        got.inv_std, want.inv_std.astype(np.float64), rtol=tolerances.inv_std_error(dtype), atol=0
    )


def test_default_eps():
    x = normal(Shape("ncs", 4, 5, 23), FLOAT32)
    assert same_bits(batchnorm.batch_norm_train(x).inv_std, batchnorm.batch_norm_train(x, eps=1e-5).inv_std)
    mean = var = np.ones(5)
    assert same_bits(batchnorm.batch_norm(x, mean, var), batchnorm.batch_norm(x, mean, var, eps=1e-5))


@pytest.mark.parametrize(
    "number", [1, np.float32(0.5), np.float64(1e-3), np.int64(2)], ids=lambda n: type(n).__name__
)
def test_eps_takes_any_real_number(number):
    x = normal(Shape("ncs", 4, 5, 23), FLOAT32)
    assert same_bits(
        batchnorm.batch_norm_train(x, eps=number).y, batchnorm.batch_norm_train(x, eps=float(number)).y
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_relu_is_the_maximum_with_zero(shape, dtype):
    x = normal(shape, dtype)
    gamma, beta = parameters(shape.channels)
    plain = batchnorm.batch_norm_train(x, gamma, beta)
    fused = batchnorm.batch_norm_train(x, gamma, beta, activation="relu")
    assert (plain.y < 0).any() and (plain.y > 0).any()
    np.testing.assert_array_equal(fused.y, np.maximum(plain.y, dtype.type(0)))
    assert same_bits(plain.mean, fused.mean) and same_bits(plain.inv_std, fused.inv_std)
    var = batchnorm.moments(x).var
    np.testing.assert_array_equal(
        batchnorm.batch_norm(x, plain.mean, var, gamma, beta, activation="relu"), fused.y
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_of_nan_is_nan(dtype):
    x = normal(Shape("ncs", 2, 3, 21), dtype)
    x[0, 1, 20] = np.nan
    y = batchnorm.batch_norm(x, np.zeros(3), np.ones(3), activation="relu")
    assert np.isnan(y[0, 1, 20]) and np.isnan(y).sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_training_is_inference_with_the_batch_moments(shape, dtype):
    x = normal(shape, dtype)
    gamma, beta = parameters(shape.channels)
    got = batchnorm.batch_norm_train(x, gamma, beta, eps=1e-3)
    mean, var = batchnorm.moments(x)
    assert same_bits(got.mean, mean)
    assert same_bits(got.y, batchnorm.batch_norm(x, mean, var, gamma, beta, eps=1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_type(dtype):
    x = normal(Shape("ncs", 4, 5, 23), dtype)
    got = batchnorm.batch_norm_train(x)
    assert type(got).__name__ == "TrainResult" and got._fields == ("y", "mean", "inv_std")
    assert got.y.dtype == x.dtype and got.y.shape == x.shape
    assert got.mean.dtype == got.inv_std.dtype == np.float64
    assert got.mean.shape == got.inv_std.shape == (5,)
    y = batchnorm.batch_norm(x, got.mean, np.ones(5))
    assert type(y) is np.ndarray and y.dtype == x.dtype and y.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ndim", [2, 3, 4, 5, 6])
def test_every_axis(ndim, dtype):
    shape = (3, 4, 2, 5, 2, 3)[:ndim]
    x = np.random.default_rng(ndim).standard_normal(shape).astype(dtype)
    for axis in range(-ndim, ndim):
        gamma, beta = parameters(shape[axis])
        want = reference.train(x, gamma, beta, axis=axis, dtype=precision(dtype))
        assert_forward(batchnorm.batch_norm_train(x, gamma, beta, axis=axis).y, x, want, gamma, beta, axis)
        mean, var = (v.astype(np.float64) for v in (want.mean, want.var))
        assert_forward(batchnorm.batch_norm(x, mean, var, gamma, beta, axis=axis), x, want, gamma, beta, axis)
        assert same_bits(
            batchnorm.batch_norm(x, mean, var, axis=np.int64(axis)),
            batchnorm.batch_norm(x, mean, var, axis=axis),
        )


@pytest.mark.parametrize("name", [*FORMATS, "channels_first", "channels_last"])
def test_data_format_is_an_alias_of_axis(name):
    ndim, axis = FORMATS.get(name, (4, 1 if name == "channels_first" else -1))
    x = np.random.default_rng(5).standard_normal((3, 4, 2, 5, 2)[:ndim]).astype(np.float32)
    gamma, beta = parameters(x.shape[axis])
    want, got = (
        batchnorm.batch_norm_train(x, gamma, beta, **how) for how in ({"axis": axis}, {"data_format": name})
    )
    assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))
    var = np.ones_like(want.mean)
    want_y, got_y = (
        batchnorm.batch_norm(x, want.mean, var, **how) for how in ({"axis": axis}, {"data_format": name})
    )
    assert same_bits(want_y, got_y)
    want_g, got_g = (
        batchnorm.batch_norm_backward(x, x, want.mean, want.inv_std, **how)
        for how in ({"axis": axis}, {"data_format": name})
    )
    assert all(same_bits(a, b) for a, b in zip(want_g, got_g, strict=True))
    assert same_bits(batchnorm.moments(x, axis=axis).var, batchnorm.moments(x, data_format=name).var)


@pytest.mark.parametrize("ndim", [2, 3, 5])
def test_channels_first_and_last_fit_any_rank(ndim):
    x = np.random.default_rng(5).standard_normal((3, 4, 2, 5, 2)[:ndim]).astype(np.float32)
    for name, axis in (("channels_first", 1), ("channels_last", -1)):
        assert same_bits(batchnorm.moments(x, data_format=name).mean, batchnorm.moments(x, axis=axis).mean)


def test_default_axis_is_one():
    x = np.random.default_rng(6).standard_normal((3, 4, 5)).astype(np.float32)
    assert same_bits(batchnorm.batch_norm_train(x).y, batchnorm.batch_norm_train(x, axis=1).y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0), (2, 3, 4, 0)], ids=str)
def test_empty_batch(shape, dtype):
    x = np.empty(shape, dtype)
    running_mean, running_var = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    got = batchnorm.batch_norm_train(x, *parameters(3), running_mean=running_mean, running_var=running_var)
    assert got.y.shape == shape and got.y.dtype == dtype
    np.testing.assert_array_equal(got.mean, np.full(3, np.nan))
    np.testing.assert_array_equal(got.inv_std, np.full(3, np.nan))
    np.testing.assert_array_equal(running_mean, [1, 2, 3])
    np.testing.assert_array_equal(running_var, [4, 5, 6])
    y = batchnorm.batch_norm(x, np.zeros(3), np.ones(3))
    assert y.shape == shape and y.dtype == dtype
    out = np.empty(shape, dtype)
    assert batchnorm.batch_norm_train(x, out=out).y is out
    assert batchnorm.batch_norm(x, np.zeros(3), np.ones(3), out=out) is out


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_reading_leaves_arguments_alone(dtype):
    x = normal(Shape("ncs", 4, 5, 23), dtype)
    gamma, beta = parameters(5)
    mean, var = np.zeros(5), np.ones(5)
    arrays = x, gamma, beta, mean, var
    copies = [a.copy() for a in arrays]
    for array in arrays:
        array.flags.writeable = False
    got = batchnorm.batch_norm_train(x, gamma, beta)
    batchnorm.batch_norm(x, mean, var, gamma, beta)
    batchnorm.batch_norm_backward(x, x, got.mean, got.inv_std, gamma, beta)
    assert all(same_bits(a, b) for a, b in zip(arrays, copies, strict=True))
    assert got.y.flags.writeable and got.mean.flags.writeable and got.inv_std.flags.writeable
