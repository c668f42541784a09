"""Running statistics: the update inside `batch_norm_train`, and `update_running` by itself."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import reference
import tolerances
from cases import DTYPES, FLOAT32, FLOAT64, SOME_SHAPES, Shape, exact, normal, rng, same_bits

SHAPE = Shape("ncs", 4, 5, 23)
COUNT = 4 * 23
RUNNING_DTYPES = pytest.mark.parametrize("running_dtype", [FLOAT32, FLOAT64], ids=str)


def running_pair(channels, dtype, seed=0):
    generator = rng("running", channels, seed)
    return generator.standard_normal(channels).astype(dtype), generator.uniform(0.5, 2, channels).astype(
        dtype
    )


def assert_updated(new, old, mean, var, decay, count, ddof):
    wanted = reference.update_running(*old, mean, var, decay, count, ddof)
    batch = mean, var * count / (count - ddof)
    for got, want, before, value in zip(new, wanted, old, batch, strict=True):
        bound = tolerances.running_error(got.dtype, decay, before.astype(np.float64), value)
        assert got.dtype == before.dtype
        assert np.all(np.abs(got - want) <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
@RUNNING_DTYPES
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("decay", [0, 0.1, 0.9, 0.999, 1])
def test_training_updates_in_place(decay, ddof, running_dtype, dtype):
    x = normal(SHAPE, dtype)
    mean, var = batchnorm.moments(x)
    new, old = running_pair(5, running_dtype), running_pair(5, running_dtype)
    got = batchnorm.batch_norm_train(
        x, running_mean=new[0], running_var=new[1], decay=decay, running_ddof=ddof
    )
    assert_updated(new, old, mean, var, decay, COUNT, ddof)
    assert same_bits(got.y, batchnorm.batch_norm_train(x).y), "running statistics must not change y"


@RUNNING_DTYPES
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_update_running_is_the_same_step(shape, decay, ddof, running_dtype):
    x = normal(shape, FLOAT32)
    mean, var = batchnorm.moments(x)
    inside, alone = running_pair(shape.channels, running_dtype), running_pair(shape.channels, running_dtype)
    batchnorm.batch_norm_train(
        x, running_mean=inside[0], running_var=inside[1], decay=decay, running_ddof=ddof
    )
    assert batchnorm.update_running(*alone, mean, var, decay=decay, count=shape.count, ddof=ddof) is None
    assert same_bits(inside[0], alone[0]) and same_bits(inside[1], alone[1])


@RUNNING_DTYPES
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("count", [2, 3, 1000, 2**40])
def test_update_running_against_reference(count, ddof, running_dtype):
    generator = rng("update", count)
    mean, var = generator.standard_normal(7), generator.uniform(0, 3, 7)
    new, old = running_pair(7, running_dtype), running_pair(7, running_dtype)
    batchnorm.update_running(*new, mean, var, decay=0.75, count=count, ddof=ddof)
    assert_updated(new, old, mean, var, 0.75, count, ddof)


def test_one_value_has_no_unbiased_variance_but_a_biased_one():
    running_mean, running_var = np.zeros(3), np.ones(3)
    batchnorm.update_running(running_mean, running_var, np.ones(3), np.zeros(3), decay=0.5, count=1, ddof=0)
    np.testing.assert_array_equal(running_mean, np.full(3, 0.5))
    np.testing.assert_array_equal(running_var, np.full(3, 0.5))


def test_defaults_are_decay_0_9_and_unbiased_variance():
    x = normal(SHAPE, FLOAT32)
    explicit, default = running_pair(5, FLOAT64), running_pair(5, FLOAT64)
    batchnorm.batch_norm_train(x, running_mean=default[0], running_var=default[1])
    batchnorm.batch_norm_train(
        x, running_mean=explicit[0], running_var=explicit[1], decay=0.9, running_ddof=1
    )
    assert same_bits(explicit[0], default[0]) and same_bits(explicit[1], default[1])
    mean, var = batchnorm.moments(x)
    again = running_pair(5, FLOAT64)
    batchnorm.update_running(*again, mean, var, decay=0.9, count=COUNT)
    assert same_bits(again[1], default[1])


@RUNNING_DTYPES
def test_decay_one_keeps_every_bit(running_dtype):
    new, old = running_pair(5, running_dtype), running_pair(5, running_dtype)
    batchnorm.batch_norm_train(normal(SHAPE, FLOAT32), running_mean=new[0], running_var=new[1], decay=1)
    assert same_bits(new[0], old[0]) and same_bits(new[1], old[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_decay_zero_takes_the_batch_exactly(shape, dtype):
    x, mean, var = exact(shape, dtype)
    running_mean, running_var = running_pair(shape.channels, FLOAT64)
    batchnorm.batch_norm_train(x, running_mean=running_mean, running_var=running_var, decay=0, running_ddof=0)
    np.testing.assert_array_equal(running_mean, mean)
    np.testing.assert_array_equal(running_var, var)


@RUNNING_DTYPES
def test_unbiased_variance(running_dtype):
    # Values -1 and 1: population variance 1, unbiased 2; in exact numbers.
    x = np.float32([[-1, 3], [1, 5]])
    running_mean, running_var = np.zeros(2, running_dtype), np.zeros(2, running_dtype)
    batchnorm.batch_norm_train(x, running_mean=running_mean, running_var=running_var, decay=0.5)
    np.testing.assert_array_equal(running_mean, [0, 2])
    np.testing.assert_array_equal(running_var, [1, 1])
    batchnorm.batch_norm_train(
        x, running_mean=running_mean, running_var=running_var, decay=0.5, running_ddof=0
    )
    np.testing.assert_array_equal(running_mean, [0, 3])
    np.testing.assert_array_equal(running_var, [1, 1])


def test_many_updates_follow_the_formula():
    running, expected = running_pair(5, FLOAT64), running_pair(5, FLOAT64)
    for step in range(50):
        x = normal(SHAPE, FLOAT32, seed=step)
        batchnorm.batch_norm_train(x, running_mean=running[0], running_var=running[1], decay=0.8)
        expected = reference.update_running(*expected, *reference.moments(x), 0.8, COUNT, 1)
    np.testing.assert_allclose(running[0], expected[0], rtol=0, atol=50 * tolerances.VAR_NARROW)
    np.testing.assert_allclose(running[1], expected[1], rtol=50 * tolerances.VAR_NARROW)


def test_float32_and_float64_together():
    x = normal(SHAPE, FLOAT32)
    running_mean, running_var = running_pair(5, FLOAT32)[0], running_pair(5, FLOAT64)[1]
    same_mean, same_var = running_pair(5, FLOAT32)[0], running_pair(5, FLOAT64)[1]
    batchnorm.batch_norm_train(x, running_mean=running_mean, running_var=running_var)
    batchnorm.update_running(same_mean, same_var, *batchnorm.moments(x), decay=0.9, count=COUNT)
    assert same_bits(running_mean, same_mean) and same_bits(running_var, same_var)


@RUNNING_DTYPES
@pytest.mark.parametrize("stride", [2, 3, -1, -2])
def test_strided_running_arrays_are_updated_in_place(stride, running_dtype):
    x = normal(SHAPE, FLOAT32)
    plain = running_pair(5, running_dtype)
    bases = [np.full(5 * abs(stride), 77, running_dtype) for _ in plain]
    views = [base[::stride] for base in bases]
    for view, values in zip(views, plain, strict=True):
        view[...] = values
    batchnorm.batch_norm_train(x, running_mean=views[0], running_var=views[1])
    batchnorm.batch_norm_train(x, running_mean=plain[0], running_var=plain[1])
    for view, base, values in zip(views, bases, plain, strict=True):
        assert same_bits(view, values)
        view[...] = 77
        assert np.all(base == 77)


def test_two_columns_of_one_array():
    table, plain = np.zeros((5, 2)), (np.zeros(5), np.zeros(5))
    x = normal(SHAPE, FLOAT32)
    batchnorm.batch_norm_train(x, running_mean=table[:, 0], running_var=table[:, 1])
    batchnorm.batch_norm_train(x, running_mean=plain[0], running_var=plain[1])
    assert same_bits(table[:, 0], plain[0]) and same_bits(table[:, 1], plain[1])


@RUNNING_DTYPES
def test_nan_already_there_propagates_in_its_channel(running_dtype):
    running_mean, running_var = running_pair(5, running_dtype)
    running_mean[1], running_var[3] = np.nan, np.nan
    batchnorm.batch_norm_train(normal(SHAPE, FLOAT32), running_mean=running_mean, running_var=running_var)
    np.testing.assert_array_equal(np.isnan(running_mean), [False, True, False, False, False])
    np.testing.assert_array_equal(np.isnan(running_var), [False, False, False, True, False])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_the_batch_reaches_its_channel_only(dtype):
    x = normal(SHAPE, dtype)
    clean, dirty = running_pair(5, FLOAT64), running_pair(5, FLOAT64)
    batchnorm.batch_norm_train(x, running_mean=clean[0], running_var=clean[1])
    x[2, 3, 4] = np.nan
    batchnorm.batch_norm_train(x, running_mean=dirty[0], running_var=dirty[1])
    for before, after in zip(clean, dirty, strict=True):
        assert np.isnan(after[3])
        assert same_bits(np.delete(before, 3), np.delete(after, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@RUNNING_DTYPES
def test_update_running_takes_non_finite_statistics_as_training_does(running_dtype, value):
    mean, var = np.zeros(5), np.ones(5)
    mean[1], var[3] = value, np.nan
    running_mean, running_var = running_pair(5, running_dtype)
    batchnorm.update_running(running_mean, running_var, mean, var, decay=0.9, count=10)
    np.testing.assert_array_equal(np.isfinite(running_mean), [True, False, True, True, True])
    np.testing.assert_array_equal(np.isfinite(running_var), [True, True, True, False, True])
