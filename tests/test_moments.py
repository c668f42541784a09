"""`moments`: exact data without tolerance, general data against longdouble, shapes, types and options."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import reference
import tolerances
from cases import DTYPES, EDGE_SHAPES, FLOAT32, FLOAT64, SOME_SHAPES, exact, normal, same_bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EDGE_SHAPES, ids=str)
def test_exact_data_has_exact_moments(shape, dtype, isa):
    x, mean, var = exact(shape, dtype)
    got = batchnorm.moments(x)
    np.testing.assert_array_equal(got.mean, mean)
    np.testing.assert_array_equal(got.var, var)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_training_reports_the_same_moments(shape, dtype):
    x, mean, var = exact(shape, dtype)
    got = batchnorm.batch_norm_train(x, eps=1e-5)
    np.testing.assert_array_equal(got.mean, mean)
    # One addition, one square root, one division: within 2 units of roundoff of the exact value.
    np.testing.assert_allclose(got.inv_std, 1 / np.sqrt(var + 1e-5), rtol=4 * tolerances.U64, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EDGE_SHAPES, ids=str)
def test_general_data(shape, dtype):
    x = normal(shape, dtype)
    mean, var = reference.moments(x, dtype=np.longdouble)
    got = batchnorm.moments(x)
    assert np.all(np.abs(got.mean - mean) <= tolerances.mean_error(dtype, mean, np.sqrt(var)))
    assert np.all(np.abs(got.var - var) <= tolerances.var_error(dtype) * var)


def test_tiles_with_different_means():
    # Halves around 1 and around 3: tiles of a power of two values whose means differ, and exactly.
    x = np.empty((1, 2, 32768), np.float32)
    x[..., :16384:2], x[..., 1:16384:2] = -1, 3
    x[..., 16384::2], x[..., 16385::2] = 1, 5
    for array, axis in ((x, 1), (np.ascontiguousarray(x.transpose(0, 2, 1)), 2)):
        got = batchnorm.moments(array, axis=axis)
        np.testing.assert_array_equal(got.mean, [2, 2])
        np.testing.assert_array_equal(got.var, [5, 5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3), (4, 5, 6), (2, 3, 4, 5), (2, 3, 2, 3, 2), (2, 3, 2, 1, 2, 2)], ids=str
)
def test_every_axis(shape, dtype):
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    for axis in range(-len(shape), len(shape)):
        mean, var = reference.moments(x, axis, np.longdouble)
        got = batchnorm.moments(x, axis=axis)
        assert got.mean.shape == got.var.shape == (shape[axis],)
        assert np.all(np.abs(got.mean - mean) <= tolerances.mean_error(dtype, mean, np.sqrt(var)))
        assert np.all(np.abs(got.var - var) <= tolerances.var_error(dtype) * var)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_type(dtype):
    x = np.ones((2, 3, 4), dtype)
    got = batchnorm.moments(x)
    assert type(got).__name__ == "MeanVar"
    assert got._fields == ("mean", "var")
    assert got.mean.dtype == got.var.dtype == np.float64


@pytest.mark.parametrize(("axis", "shape"), [(0, (3, 1, 1, 1)), (1, (1, 4, 1, 1)), (-1, (1, 1, 1, 6))])
def test_keepdims(axis, shape):
    x = np.random.default_rng(2).standard_normal((3, 4, 5, 6))
    kept, plain = (
        batchnorm.moments(x, axis=axis, keepdims=True),
        batchnorm.moments(x, axis=axis, keepdims=False),
    )
    assert kept.mean.shape == kept.var.shape == shape
    assert same_bits(kept.mean.ravel(), plain.mean) and same_bits(kept.var.ravel(), plain.var)


@pytest.mark.parametrize("ddof", [0, 1, 2, 5])
def test_ddof_divides_by_count_less_ddof(ddof):
    x = np.random.default_rng(3).standard_normal((3, 4, 5))
    _, var = reference.moments(x, dtype=np.longdouble)
    got = batchnorm.moments(x, ddof=ddof)
    assert same_bits(got.mean, batchnorm.moments(x).mean)
    np.testing.assert_allclose(
        got.var, (var * 15 / (15 - ddof)).astype(np.float64), rtol=tolerances.VAR_FLOAT64
    )


def test_ddof_takes_numpy_integers():
    x = np.random.default_rng(3).standard_normal((3, 4, 5))
    assert same_bits(batchnorm.moments(x, ddof=np.int64(1)).var, batchnorm.moments(x, ddof=1).var)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_per_channel(dtype):
    x = np.arange(5, dtype=np.float32).astype(dtype)[None, :]
    got = batchnorm.moments(x)
    np.testing.assert_array_equal(got.mean, np.arange(5))
    np.testing.assert_array_equal(got.var, np.zeros(5))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_no_values_have_no_moments(shape, dtype):
    got = batchnorm.moments(np.empty(shape, dtype))
    np.testing.assert_array_equal(got.mean, np.full(3, np.nan))
    np.testing.assert_array_equal(got.var, np.full(3, np.nan))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_variance_of_a_constant_is_zero(shape, dtype):
    constants = np.linspace(-3.7, 1234.567, shape.channels)[None, :, None].astype(dtype)
    x = shape.like((shape.outer, shape.channels, shape.inner), dtype, constants)
    got = batchnorm.moments(x)
    np.testing.assert_array_equal(got.mean, constants[0, :, 0].astype(np.float64))
    np.testing.assert_array_equal(got.var, np.zeros(shape.channels))


def test_input_is_not_written():
    x = np.random.default_rng(4).standard_normal((3, 4, 5)).astype(np.float32)
    before = x.copy()
    x.flags.writeable = False
    batchnorm.moments(x)
    assert same_bits(x, before)
