"""`Moments` and `dataset_moments`: sums against fractions, order and grouping, state, pieces, progress."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import random
import signal
import sys
from fractions import Fraction

import batchnorm
import numpy as np
import pytest
from batchnorm import DatasetMoments, Moments, _core, dataset_moments

import processes
import reference
import tolerances
from cases import AVAILABLE_DTYPES, DTYPES, FLOAT16, FLOAT32, FLOAT64, SOME_SHAPES, exact, rng, same_bits


def batches(count, channels=3, dtype=FLOAT64, mean=0.0, spread=1.0, seed=0):
    """Batches (n, channels, s) of different sizes."""
    generator = rng("batches", count, channels, str(dtype), mean, seed)
    mean = min(mean, 1e4) if dtype == FLOAT16 else mean
    sizes = generator.integers(1, 60, (count, 2))
    return [(generator.standard_normal((n, channels, s)) * spread + mean).astype(dtype) for n, s in sizes]


def moments_of(arrays):
    return [Moments().update(x) for x in arrays]


def sums_of(x):
    return Moments().update(x)._sums


def flat(arrays):
    """All values, [channels, n]."""
    return np.concatenate([np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in arrays], axis=1)


def values(sums, channel):
    """What the three doubles of count, sum and sum_sq add up to."""
    three = (sums[:3], *sums[3:].reshape(2, 3, -1)[..., channel])
    return tuple(sum(map(Fraction, parts.tolist())) for parts in three)


def exact_values(x, channel):
    data = [Fraction(float(v)) for v in x[:, channel].ravel()]
    return len(data), sum(data), sum(v * v for v in data)


def ulps(got, want):
    """Distance in units in the last place, of want a number or a Fraction."""
    return abs(Fraction(float(got)) - Fraction(want)) / Fraction(math.ulp(float(want)))


def same(a, b):
    if a.count == b.count == 0:
        return True
    return a.count == b.count and same_bits(a.mean, b.mean) and same_bits(a.m2, b.m2)


# ---- sums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0, 3, 96, 1e6, -12345678.0])
def test_sums_of_a_batch_are_exact(dtype, mean, isa):
    # Small integers times 2^-k around the mean: every sum about any value near it is exact.
    generator = np.random.default_rng(1)
    mean = np.clip(mean, -2e4, 2e4) if dtype == FLOAT16 else mean
    x = (mean + generator.integers(-8, 9, (5, 4, 9)) / 4.0).astype(dtype)
    sums = sums_of(x)
    for c in range(4):
        assert values(sums, c) == exact_values(x, c)


def test_products_that_no_two_doubles_hold():
    # Constant channels: x^2 has 106 bits, n x^2 more.
    for value in (0.1, 1 / 3, 1e100 / 7, -3.3e-100):
        x = np.full((7, 2, 1013), value)
        assert values(sums_of(x), 1) == (
            7091,
            7091 * Fraction(value),
            7091 * Fraction(value) ** 2,
        )


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e6])
def test_merging_is_exact(mean):
    sums = [sums_of(x) for x in batches(20, mean=mean)]
    total = sums[0]
    for other in sums[1:]:
        total = _core.merged_moment_sums(total, other)
    for c in range(3):
        assert values(total, c) == tuple(map(sum, zip(*(values(s, c) for s in sums), strict=True)))


@pytest.mark.parametrize("mean", [0.0, 1.0, -1e3, 1e6, 1e12])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_mean_and_m2_of_the_sums_are_within_one_ulp(mean, dtype):
    total = Moments.merged(moments_of(batches(10, mean=mean, dtype=dtype)))
    for c in range(3):
        n, s, q = values(total._sums, c)
        assert ulps(total.mean[c], s / n) <= Fraction(1, 2)
        assert ulps(total.m2[c], q - s * s / n) <= 1
        assert total.var[c] == total.m2[c] / total.count


# ---- against all values at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_exact_data_has_exact_moments(shape, dtype, isa):
    x, mean, var = exact(shape, dtype)
    pairs = range(0, x.shape[2], 2)  # whole pairs, so that every piece has the channel's mean
    pieces = [x] if shape.inner == 1 or shape.outer > 100 else [x[:, :, i : i + 2] for i in pairs]
    total = Moments.merged(moments_of(pieces))
    np.testing.assert_array_equal(total.mean, mean)
    np.testing.assert_array_equal(total.var, var)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_all_values_at_once(dtype, ratio):
    arrays = batches(30, dtype=dtype, mean=3 * ratio, spread=3.0)
    total = Moments.merged(moments_of(arrays))
    mean, var = reference.moments(flat(arrays).T, dtype=np.longdouble)
    assert total.count == flat(arrays).shape[1]
    # Of narrow data moments may take the sums about 0 up to |mean| / std = 128: their rounding, 1e-13 at
    # worst, is then amplified by 128^2 in each batch.
    error = tolerances.VAR_FLOAT64 if dtype == FLOAT64 else 1e-13 * 128**2
    assert np.all(np.abs(total.mean - mean) <= tolerances.mean_error(dtype, mean, np.sqrt(var)))
    assert np.all(np.abs(total.var - var) <= error * var)
    np.testing.assert_array_equal(total.std, np.sqrt(total.var))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_far_apart(dtype):
    # Each batch has a mean of its own, thousands of its standard deviations away from the others'.
    generator = np.random.default_rng(0)
    arrays = [(m + generator.standard_normal((3, 2, 8)) * 0.01).astype(dtype) for m in (-20, 0.5, 7, 90)]
    total = Moments.merged(moments_of(arrays))
    mean, var = reference.moments(flat(arrays).T, dtype=np.longdouble)
    assert np.all(np.abs(total.mean - mean) <= tolerances.mean_error(dtype, mean, np.sqrt(var)))
    assert np.all(np.abs(total.var - var) <= tolerances.var_error(dtype) * var)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_batch_is_moments(dtype):
    x = batches(1, dtype=dtype, mean=2.0)[0]
    got, want = Moments().update(x), batchnorm.moments(x)
    np.testing.assert_allclose(got.mean, want.mean, rtol=4 * tolerances.U64, atol=0)
    # moments takes the mean's square off in one double, which costs 1 + mean^2 / var of its rounding.
    np.testing.assert_allclose(got.var, want.var, rtol=32 * tolerances.U64, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, -3.7, 1234.567])
def test_constant_channel_has_variance_zero(dtype, value):
    total = Moments()
    for n in (1, 2, 17, 1013):
        total.update(np.full((n, 2, 3), value).astype(dtype))
    np.testing.assert_array_equal(total.mean, np.full(2, value).astype(dtype).astype(np.float64))
    np.testing.assert_array_equal(total.m2, np.zeros(2))


def test_one_value_at_a_time():
    x = np.random.default_rng(0).standard_normal((300, 4)) + 1e5
    total = Moments()
    for row in x:
        total.update(row[None])
    n, s, q = values(total._sums, 2)
    assert (n, s, q) == exact_values(x, 2)
    assert ulps(total.variance(1)[2], (q - s * s / n) / (n - 1)) <= 2


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16"])
def test_integers_are_exact_in_any_cut(dtype, isa):
    info = np.iinfo(dtype)
    x = rng(dtype).integers(info.min, info.max, (40, 3, 9, 11), dtype, endpoint=True)
    want = Moments().update(x)
    for c in range(3):
        assert values(want._sums, c) == exact_values(x, c)
    for chunk in (1, 700, 5000):
        assert same(dataset_moments(x, chunk_bytes=chunk).moments, want)
    assert same(Moments(axis=-1).update(np.moveaxis(x, 1, -1).copy()), want)
    whole = batchnorm.moments(x)
    assert same_bits(want.mean, whole.mean)
    np.testing.assert_allclose(want.var, whole.var, rtol=2 * tolerances.U64, atol=0)


# ---- order and grouping ------------------------------------------------------------------------------------


def in_some_order(accumulators, generator):
    """Merge random pairs until one is left."""
    left = [m.copy() for m in accumulators]
    while len(left) > 1:
        a, b = (left.pop(generator.randrange(len(left))) for _ in range(2))
        left.append(a + b if generator.random() < 0.5 else a.merge(b))
    return left[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.0, 10.0, 1e6])
def test_order_and_grouping_do_not_matter(dtype, ratio):
    parts = moments_of(batches(25, dtype=dtype, mean=ratio))
    want = Moments.merged(parts)
    generator = random.Random(0)
    for _ in range(60):
        assert same(in_some_order(parts, generator), want)


def test_order_of_values_far_apart():
    # Squares from 1e-60 to 1e60 do not fit 159 bits.
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((4, 3)) * 10.0**p for p in (-30, 30, 0, -20, 28, 29, 10)]
    parts, seen = moments_of(arrays), []
    for order in itertools.permutations(parts):
        seen.append(Moments.merged(order))
    for name in ("mean", "var"):
        low, high = (f([getattr(m, name) for m in seen], axis=0) for f in (np.min, np.max))
        assert np.all(high <= np.nextafter(low, np.inf))


@pytest.mark.parametrize("dtype", AVAILABLE_DTYPES, ids=str)
def test_threads_do_not_matter(dtype, threads):
    x = rng("threads").standard_normal((9, 33, 529)).astype(dtype)
    total, one = Moments().update(x), Moments().update(x, num_threads=1)
    assert same_bits(total._sums, one._sums)


def test_merging_with_itself_and_huge_counts():
    x = batches(1, mean=100.0)[0]
    one = Moments().update(x)
    total = one.copy()
    for _ in range(100):
        total.merge(total)
    assert total.count == one.count * 2**100 and isinstance(total.count, int)
    assert same_bits(total.mean, one.mean) and same_bits(total.var, one.var)
    assert same_bits(total.m2, one.m2 * 2.0**100)
    odd = Moments().update(x[:1, :, :1])
    assert (total + odd).count == one.count * 2**100 + 1


# ---- weights, mask, lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", [lambda x: x, np.asfortranarray, lambda x: x.transpose(0, 2, 1).copy().transpose(0, 2, 1)]
)
def test_weights_are_copies(dtype, layout):
    generator = np.random.default_rng(2)
    x = layout((100 + generator.integers(-8, 9, (6, 3, 40)) / 4.0).astype(dtype))
    weights = generator.integers(0, 4, (6, 40))
    copies = np.repeat(np.moveaxis(x, 1, 2).reshape(-1, 3), weights.ravel(), axis=0)
    got = Moments().update(x, weights=weights)
    assert got.count == weights.sum() and isinstance(got.count, int)
    for c in range(3):
        assert values(got._sums, c) == exact_values(copies, c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_count_is_not_there(dtype):
    x = batches(1, dtype=dtype, mean=3.0)[0]
    mask = rng("mask").random((x.shape[0], x.shape[2])) < 0.6
    dirty = np.where(mask[:, None], x, np.array(np.nan, x.dtype)).astype(dtype)
    got, want = Moments().update(dirty, mask=mask), Moments().update(np.moveaxis(x, 1, 2)[mask])
    assert got.count == want.count == mask.sum()
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-14)
    np.testing.assert_allclose(got.var, want.var, rtol=1e-12)
    lengths = np.arange(x.shape[0]) % (x.shape[2] + 1)
    ends = Moments().update(x, mask=np.arange(x.shape[2]) < lengths[:, None])
    assert same(Moments().update(x, lengths=lengths), ends)
    image = x.reshape(x.shape[0], 3, 1, -1)
    assert same(Moments().update(image, lengths=lengths, lengths_axis=3), ends)


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-100, 3e100])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e6])
def test_fractional_weights(mean, scale):
    arrays = batches(12, mean=mean)
    weights = [rng("weights", i).random((x.shape[0], x.shape[2])) * scale for i, x in enumerate(arrays)]
    parts = [Moments().update(x, weights=w) for x, w in zip(arrays, weights, strict=True)]
    total, generator = Moments.merged(parts), random.Random(0)
    for _ in range(20):
        assert same(in_some_order(parts, generator), total)
    w = np.concatenate([w.ravel() for w in weights]).astype(np.longdouble)
    x = flat(arrays).astype(np.longdouble)
    want = (x * w).sum(axis=1) / w.sum()
    var = ((x - want[:, None]) ** 2 * w).sum(axis=1) / w.sum()
    np.testing.assert_allclose(float(total.count), float(w.sum()), rtol=1e-14)
    assert np.all(np.abs(total.mean - want) <= 4 * tolerances.U64 * np.abs(want) + 1e-14 * np.sqrt(var))
    np.testing.assert_allclose(total.var, var.astype(np.float64), rtol=1e-13)


def test_nothing_counts():
    x = np.ones((4, 3, 2))
    total = Moments().update(x, mask=np.zeros((4, 2), bool)).update(x, weights=np.zeros(4))
    assert total.count == 0 and total.channels is None


# ---- values that are no numbers, batches without values ----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_stay_in_their_channel(dtype):
    clean = batches(3, channels=5, dtype=dtype)
    dirty = [x.copy() for x in clean]
    dirty[1][0, 0, 0], dirty[1][0, 1, 0], dirty[2][0, 2, -1] = np.nan, np.inf, -np.inf
    dirty[0][0, 3, 0], dirty[2][0, 3, 0] = np.inf, -np.inf
    for order in itertools.permutations(dirty):
        got = Moments.merged(moments_of(order))
        np.testing.assert_array_equal(got.mean[:4], [np.nan, np.inf, -np.inf, np.nan])
        np.testing.assert_array_equal(got.var[:4], np.full(4, np.nan))
        want = Moments.merged(moments_of(clean))
        assert got.mean[4] == want.mean[4] and got.var[4] == want.var[4]


def test_overflow_is_infinite():
    with np.errstate(over="ignore"):
        total = Moments().update(np.array([[1e300, 1.0], [-1e300, 2.0]]))
    np.testing.assert_array_equal(total.mean, [0, 1.5])
    np.testing.assert_array_equal(total.var, [np.inf, 0.25])


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_batches_without_values_do_nothing(shape):
    empty = np.empty(shape, np.float32)
    total = Moments().update(empty)
    assert total.count == 0 and total.channels is None
    before = total.update(np.ones((4, 3, 2), np.float32))._sums
    assert total.update(empty)._sums is before and total.merge(Moments())._sums is before
    assert same(Moments().merge(total), total)


@pytest.mark.parametrize("name", ["mean", "var", "std", "m2", "variance"])
def test_no_values_no_moments(name):
    empty = Moments()
    with pytest.raises(ValueError, match=r"seen no values.*call update"):
        result = getattr(empty, name)
        result()


# ---- axes, layouts, options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 3, 4)),
        ({"axis": -1}, (5, 4, 3)),
        ({"axis": 0}, (3, 7)),
        ({"data_format": "NHWC"}, (2, 4, 5, 3)),
    ],
)
def test_axes(options, shape):
    x = rng(shape).standard_normal(shape)
    axis = {"NHWC": -1}.get(options.get("data_format"), options.get("axis", 1))
    got = Moments(**options).update(x).update(x[:, :1] if axis == 0 else x[:1])
    data = np.moveaxis(x, axis, 0).reshape(3, -1)
    more = np.moveaxis(x[:, :1] if axis == 0 else x[:1], axis, 0).reshape(3, -1)
    both = np.concatenate([data, more], axis=1)
    assert got.channels == 3 and got.count == both.shape[1]
    np.testing.assert_allclose(got.mean, both.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(got.var, both.var(axis=1), rtol=1e-12)


def test_layouts_and_ranks_mix():
    x = rng("layouts").standard_normal((6, 4, 5, 7))
    total = Moments()
    for part in (x[:1], np.asfortranarray(x[1:3]), x[3:4, :, ::2, ::-1], x[3:4, :, 1::2], x[4, :, :, 0].T):
        total.update(part)
    assert total.count == 35 * 4 + 5
    data = [x[:4].transpose(0, 2, 3, 1).reshape(-1, 4), x[4, :, :, 0].T]
    np.testing.assert_allclose(total.mean, np.concatenate(data).mean(axis=0), rtol=0, atol=1e-15)


def test_variance_divides_by_count_less_ddof():
    total = Moments().update(np.array([[1.0], [2.0], [6.0]]))
    assert total.m2[0] == 14 and [total.variance(d)[0] for d in (0, 1, np.int64(2))] == [14 / 3, 7, 14]


def test_reading_changes_nothing():
    total = Moments.merged(moments_of(batches(3)))
    before = total._sums.copy()
    for array in (total.mean, total.var, total.std, total.m2, *total.state_dict().values()):
        array[...] = 7 if array.dtype.kind != "U" else ""
    assert same_bits(total._sums, before)


# ---- copies and state --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [
        Moments.copy,
        copy.copy,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: Moments.from_state(m.state_dict()),
        lambda m: Moments().merge(m),
    ],
)
def test_copies_go_their_own_way(copied):
    first, second, third = batches(3, mean=1e3)
    total = Moments().update(first)
    twin = copied(total)
    assert type(twin) is Moments and repr(twin) == repr(total) and same_bits(twin._sums, total._sums)
    twin.update(second)
    total.update(third)
    assert same(twin, Moments.merged(moments_of([first, second])))
    assert same(total, Moments.merged(moments_of([first, third])))


@pytest.mark.parametrize("options", [{}, {"axis": -1}, {"data_format": "NHWC"}])
def test_state_through_a_file(tmp_path, options):
    empty, full = Moments(**options), Moments(**options).update(np.random.default_rng(0).random((3, 4, 5, 6)))
    for total in (empty, full):
        np.savez(tmp_path / "state.npz", **total.state_dict())
        with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
            again = Moments.from_state(state)
        assert repr(again) == repr(total)
        again.update(np.ones((2, 4, 5, 6)))
    assert same(again, full.update(np.ones((2, 4, 5, 6))))


def test_repr():
    assert repr(Moments(data_format="NLC")) == "Moments(data_format='NLC', channels=None, count=0)"
    assert repr(Moments(axis=-1).update(np.ones((2, 5)))) == "Moments(axis=-1, channels=5, count=2)"


def changed(**entries):
    state = Moments().update(np.ones((4, 3, 2), np.float32)).state_dict()
    for name, value in entries.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


BAD_STATES = [
    (7, TypeError, r"state is 7 \(int\), expected a mapping"),
    (changed(count=None, sum=None), ValueError, r"lacks count, sum and has unexpected nothing.*exactly axis"),
    (changed(total=np.ones(3)), ValueError, r"lacks nothing and has unexpected total"),
    (changed(sum=[1.0]), TypeError, r"state\['sum'\] is of type list, expected an array of float64"),
    (changed(sum=np.ones((3, 3), np.float32)), TypeError, r"\['sum'\] has dtype float32, expected float64"),
    (changed(axis=np.array(1.0)), TypeError, r"\['axis'\] has dtype float64, expected int64"),
    (changed(data_format=np.array(3)), TypeError, r"\['data_format'\] has dtype int64, expected str"),
    (changed(sum=np.ones(3)), ValueError, r"\['sum'\] has shape \(3,\), expected \(3, 0\)"),
    (changed(sum_sq=np.ones((3, 4))), ValueError, r"\['sum_sq'\] has shape \(3, 4\), expected \(3, 3\)"),
    (changed(count=np.ones(2)), ValueError, r"\['count'\] has shape \(2,\), expected \(3,\)"),
    (changed(axis=np.array([1])), ValueError, r"\['axis'\] has shape \(1,\), expected \(\)"),
    (changed(data_format=np.array("NCX")), ValueError, r"data_format is 'NCX'"),
    (changed(data_format=np.array("NHWC")), ValueError, r"axis 1 and data_format 'NHWC', which is -1"),
    (changed(count=np.array([-1.0, 0, 0])), ValueError, r"\['count'\] is \[-1.0, 0.0, 0.0\] with 3 channels"),
    (changed(count=np.zeros(3)), ValueError, r"\['count'\] is \[0.0, 0.0, 0.0\] with 3 channels"),
    (changed(count=np.array([4, np.nan, 0])), ValueError, r"\['count'\] is \[4.0, nan, 0.0\].*finite"),
    (changed(sum=np.ones((3, 0)), sum_sq=np.ones((3, 0))), ValueError, r"with 0 channels.*or 0 without"),
    (
        changed(sum_sq=np.full((3, 3), -2.0)),
        ValueError,
        r"\['sum_sq'\] is -2.0 at channel 0, expected .* >= 0",
    ),
]


@pytest.mark.parametrize(("state", "error", "match"), BAD_STATES, ids=range(len(BAD_STATES)))
def test_bad_states(state, error, match):
    with pytest.raises(error, match=match):
        Moments.from_state(state)


# ---- errors of the accumulator -----------------------------------------------------------------------------

BAD_CALLS = [
    (lambda m: m.update([[1.0]]), TypeError, "x is of type list"),
    (lambda m: m.update(np.ones((2, 3), np.int32)), TypeError, r"x has dtype int32.*astype"),
    (lambda m: m.update(np.ones(3)), ValueError, r"at least 2 dimensions"),
    (
        lambda m: m.update(np.ones((2, 4, 5))),
        ValueError,
        r"with 4 channels on axis 1, expected 3 as the batches",
    ),
    (lambda m: m.update(np.empty((0, 4))), ValueError, r"with 4 channels on axis 1, expected 3"),
    (lambda m: m.update(np.ones((2, 3)), num_threads=0), ValueError, "num_threads is 0"),
    (lambda m: m.update(np.ones((2, 3)), mask=np.ones(3, bool)), ValueError, r"mask has shape \(3,\)"),
    (
        lambda m: m.update(np.ones((2, 4)), weights=np.ones(2)),
        ValueError,
        "with 4 channels on axis 1, expected 3",
    ),
    (
        lambda m: m.update(np.ones((2, 3), np.uint8), weights=np.ones(2)),
        TypeError,
        "dtype uint8, of which all",
    ),
    (lambda m: m.merge(3), TypeError, r"other is 3 \(int\), expected a Moments"),
    (lambda m: m.merge(Moments().update(np.ones((2, 4)))), ValueError, "other has 4 channels, expected 3"),
    (lambda m: m + Moments().update(np.ones((2, 4))), ValueError, "other has 4 channels, expected 3"),
    (lambda m: m + 1, TypeError, "unsupported operand"),
    (lambda m: Moments.merged([m, 2]), TypeError, r"accumulators\[1\] is 2 \(int\), expected a Moments"),
    (lambda m: Moments.merged([]), ValueError, "accumulators is empty"),
    (lambda m: m.variance(-1), ValueError, "ddof is -1, expected an int >= 0"),
    (lambda m: m.variance(1.0), TypeError, r"ddof is 1.0 \(float\), expected an int >= 0"),
    (lambda m: m.variance(8), ValueError, "ddof is 8, expected less than the 8 values"),
    (lambda m: Moments(axis=1, data_format="NHWC"), TypeError, "they say the same thing"),
    (lambda m: Moments(axis=1.5), TypeError, "axis is 1.5"),
    (lambda m: Moments(axes=1), TypeError, r"Moments\(\) has no argument 'axes'; did you mean 'axis'"),
    (lambda m: Moments(axis=5).update(np.ones((2, 3))), ValueError, r"axis is 5, expected -2 <= axis < 2"),
    (lambda m: Moments(data_format="NCL").update(np.ones((2, 3))), ValueError, "'NCL', which needs 3"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_errors_change_nothing(call, error, match):
    total = Moments().update(np.ones((4, 3, 2), np.float32))
    before = total._sums.copy()
    with pytest.raises(error, match=match):
        call(total)
    assert same_bits(total._sums, before) and repr(total) == "Moments(axis=1, channels=3, count=8)"


def test_sums_of_another_length_are_refused_by_the_core():
    sums = sums_of(np.ones((2, 3)))
    for bad in (sums[:-1], sums[:0], sums[:3]):
        with pytest.raises(ValueError, match="expected moment_sums_size"):
            _core.moments_from_sums(bad)
        with pytest.raises(ValueError, match="expected moment_sums_size"):
            _core.merged_moment_sums(sums, bad)


# ---- a data set --------------------------------------------------------------------------------------------


class Slices:
    """Something like an array that is no ndarray and keeps account of what is read of it."""

    def __init__(self, x, read):
        self.x, self.read = x, read
        self.shape, self.dtype, self.ndim = x.shape, x.dtype, x.ndim

    def __getitem__(self, key):
        return Slices(self.x[key], self.read)

    def __array__(self, dtype=None, copy=None):
        self.read.append(self.x.shape)
        return self.x


def data_set(seed=0, shape=(50, 3, 7, 5)):
    return rng("data set", seed).standard_normal(shape).astype(np.float32)


def assert_whole(result, x, axis=1):
    assert type(result) is DatasetMoments and result.moments.count == result.count == x.size // x.shape[axis]
    mean, var = reference.moments(x, axis, np.longdouble)
    np.testing.assert_allclose(result.mean, mean.astype(np.float64), rtol=1e-13)
    np.testing.assert_allclose(result.var, var.astype(np.float64), rtol=1e-12)
    assert len(result) == 2 and result._fields == ("mean", "var")


def test_an_array_larger_than_chunk_bytes(tmp_path):
    x = data_set()
    for chunk in (1, 100, 420, 4000, 1 << 20):
        assert_whole(dataset_moments(x, chunk_bytes=chunk), x)
    mapped = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=x.shape)
    mapped[...] = x
    assert_whole(dataset_moments(mapped, chunk_bytes=2000), x)


@pytest.mark.parametrize(
    ("shape", "axis", "chunk", "pieces"),
    [
        ((50, 3, 7, 5), 1, 4200, [(10, 3, 7, 5)] * 5),
        ((50, 3, 7, 5), 1, 4199, [(9, 3, 7, 5)] * 5 + [(5, 3, 7, 5)]),
        ((3, 50, 35), 0, 4200, [(3, 10, 35)] * 5),
        ((1, 3, 50, 35), 1, 4200, [(1, 3, 10, 35)] * 5),
        ((2, 3, 7, 5), -1, 60, [(1, 1, 3, 5)] * 2 * 3 * 2 + [(1, 1, 1, 5)] * 6),
        ((2, 3), 1, 1, [(1, 3)] * 2),
        ((0, 3), 1, 1, [(0, 3)]),
    ],
)
def test_pieces(shape, axis, chunk, pieces):
    x, read = data_set(shape=shape), []
    if x.size:
        assert_whole(dataset_moments(Slices(x, read), axis=axis, chunk_bytes=chunk), x, axis)
    else:
        assert dataset_moments([np.ones((1, 3)), Slices(x, read)]).count == 1
    assert sorted(read) == sorted(pieces)


def test_pieces_are_cut_along_the_outermost_axis_in_memory():
    x = np.asfortranarray(data_set())
    seen = []
    dataset_moments(x, chunk_bytes=4200, transform=lambda b: seen.append(b.shape) or b)
    assert seen == [(50, 3, 7, 1)] * 5


def test_a_slice_is_not_copied():
    x, seen = data_set(), []
    dataset_moments(x, chunk_bytes=4200, transform=lambda b: seen.append(np.shares_memory(b, x)) or b)
    assert seen == [True] * 5


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, lambda a: (x for x in a), lambda a: dict(enumerate(a)).values()]
)
def test_iterables(kind):
    x = data_set()
    parts = [x[:7], x[7:8], x[8:8], x[8:40], x[40:]]
    result = dataset_moments(kind(parts))
    assert_whole(result, x)
    assert same(result.moments, Moments.merged(moments_of(parts)))


def test_files(tmp_path):
    x = data_set()
    paths = [tmp_path / f"{i}.npy" for i in range(4)]
    for path, part in zip(paths, (x[:20], x[20:21], np.asfortranarray(x[21:]), x[:0]), strict=True):
        np.save(path, part)
    assert_whole(dataset_moments(paths, chunk_bytes=1000), x)
    assert_whole(dataset_moments(map(str, paths)), x)
    assert_whole(dataset_moments([paths[0], x[20:]]), x)
    assert_whole(dataset_moments(paths[0], chunk_bytes=1000), x[:20])
    assert_whole(dataset_moments(str(paths[0])), x[:20])


def test_transform_makes_arrays_of_anything():
    x = data_set()
    pairs = [(part, i) for i, part in enumerate(np.split(x, 5))]
    assert_whole(dataset_moments(pairs, transform=lambda pair: pair[0]), x)
    images = np.arange(256, dtype=np.uint8).repeat(6).reshape(-1, 2, 3)
    result = dataset_moments(
        images, axis=-1, chunk_bytes=100, transform=lambda b: b.astype(np.float32) / 255, ddof=1
    )
    np.testing.assert_allclose(result.mean, np.full(3, 0.5), rtol=1e-7)
    want = (images / 255).reshape(-1, 3).var(axis=0, ddof=1)
    np.testing.assert_allclose(result.var, want, rtol=1e-6)


def test_workers_and_going_on():
    x = data_set()
    parts = np.array_split(x, 11)
    whole = dataset_moments(parts)
    first, second = dataset_moments(parts[:4]).moments, dataset_moments(parts[4:][::-1]).moments
    assert same(second + first, whole.moments)
    on = dataset_moments(parts[4:], moments=first)
    assert on.moments is first and same(first, whole.moments) and same_bits(on.mean, whole.mean)
    first.update(x)
    assert on.count == whole.count  # of the time it was made


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_what_is_finished(error):
    parts = np.array_split(data_set(), 10)

    def interrupted():
        yield from parts[:6]
        raise error

    total = Moments()
    with pytest.raises(error):
        dataset_moments(interrupted(), moments=total)
    assert same(total, Moments.merged(moments_of(parts[:6])))
    assert same(dataset_moments(parts[6:], moments=total).moments, Moments.merged(moments_of(parts)))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_a_signal_inside_a_call():
    x, total = data_set(shape=(64, 3, 128, 128)), Moments()
    one = Moments().update(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            dataset_moments(itertools.repeat(x), moments=total, chunk_bytes=x.nbytes)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    copies, rest = divmod(total.count, one.count)
    assert rest == 0 and same(total, Moments.merged([one] * copies) if copies else Moments())


BAD_DATA_SETS = [
    (3, {}, TypeError, r"batches is 3 \(int\), expected an array, a path of an .npy file, or an iterable"),
    (b"x.npy", {}, TypeError, "batches is of type bytes, expected an array"),
    ({"a": np.ones((2, 3))}, {}, TypeError, r"batches is of type dict, a mapping; pass its values\(\)"),
    ([[1.0, 2.0]], {}, TypeError, "something of type list, expected arrays or paths.*transform="),
    ([np.ones((2, 3)), None], {}, TypeError, "something None, expected arrays"),
    ([np.ones((2, 3)), np.ones((2, 4))], {}, ValueError, "4 channels on axis 1, expected 3"),
    (np.ones((2, 3), int), {}, TypeError, "x has dtype int64"),
    (np.float64(3), {}, TypeError, "batches is"),
    (np.ones(3), {}, ValueError, "at least 2 dimensions"),
    (np.ones((2, 3)), {"axis": 2}, ValueError, "axis is 2"),
    ([], {}, ValueError, "batches holds no values.*gone through"),
    (np.ones((0, 3)), {}, ValueError, "batches holds no values"),
    (np.ones((2, 3)), {"ddof": 2}, ValueError, "ddof is 2, expected less than the 2"),
    ([], {"ddof": -1}, ValueError, "ddof is -1"),
    ([], {"chunk_bytes": 0}, ValueError, "chunk_bytes is 0, expected an int >= 1"),
    ([], {"chunk_bytes": 1e6}, TypeError, "chunk_bytes is 1000000.0"),
    ([], {"transform": 3}, TypeError, r"transform is 3 \(int\), expected a function"),
    (np.ones((2, 3)), {"transform": lambda b: list(b)}, TypeError, "x is of type list"),
    ([], {"moments": 3}, TypeError, r"moments is 3 \(int\), expected a Moments to go on with"),
    ([], {"moments": Moments(), "axis": 1}, TypeError, "has its own axis; drop axis"),
    ([], {"moments": Moments(), "data_format": "NC"}, TypeError, "has its own axis; drop data_format"),
    ([], {"progress": 1}, TypeError, r"progress is 1 \(int\), expected True or False"),
    ([], {"num_threads": 0}, ValueError, "num_threads is 0"),
    ([], {"chunksize": 7}, TypeError, "no argument 'chunksize'"),
]


@pytest.mark.parametrize(
    ("batches", "options", "error", "match"), BAD_DATA_SETS, ids=range(len(BAD_DATA_SETS))
)
def test_bad_data_sets(batches, options, error, match):
    with pytest.raises(error, match=match):
        dataset_moments(batches, **options)


def test_bad_files(tmp_path):
    np.save(tmp_path / "good.npy", np.ones((2, 3)))
    good = (tmp_path / "good.npy").read_bytes()
    np.savez(tmp_path / "archive.npz", np.ones((2, 3)))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes(good[:-1])
    (tmp_path / "huge.npy").write_bytes(
        good.replace(b"(2, 3)", b"(2, 300000000000)").replace(b" " * 12, b" ", 1)
    )
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1]))
    for name in ("archive.npz", "objects.npy", "short.npy", "huge.npy", "empty.npy", "pickle.npy"):
        with pytest.raises(ValueError, match=rf"cannot read '.*{name}' as an .npy file"):
            dataset_moments([tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"missing\.npy"):
        dataset_moments(tmp_path / "missing.npy")
    with pytest.raises(IsADirectoryError, match=r"this is a folder; pass sorted\(pathlib.Path"):
        dataset_moments(tmp_path)
    with pytest.raises(TypeError, match="path b'x', expected str"):
        dataset_moments(BytesPath())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe' is not a regular file"):
        dataset_moments(tmp_path / "pipe")


class BytesPath:
    def __fspath__(self):
        return b"x"


# ---- progress ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "files", "list", "generator"])
def test_progress_is_shown_on_stderr(tmp_path, capsys, kind):
    x = data_set()
    np.save(tmp_path / "x.npy", x)
    data = {"array": x, "files": [tmp_path / "x.npy"], "list": [x[:9], x[9:]], "generator": iter([x])}[kind]
    assert same_bits(dataset_moments(data, progress=True).var, dataset_moments(x).var) or kind == "list"
    out, err = capsys.readouterr()
    assert out == "" and "moments" in err and "21.0" in err


@pytest.mark.parametrize("progress", [None, False])
def test_no_progress(capsys, progress):
    dataset_moments(data_set(), progress=progress)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    dataset_moments(data_set())
    assert "moments" in capsys.readouterr().err


def test_without_rich(monkeypatch, capsys):
    for name in [n for n in sys.modules if n == "rich" or n.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(
        ImportError, match=r"progress=True needs the package rich: pip install 'batchnorm\[progress\]'.*False"
    ):
        dataset_moments(data_set(), progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    dataset_moments(data_set())
    assert capsys.readouterr() == ("", "")


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_DATA of Linux")
def test_a_gigabyte_needs_no_gigabyte(tmp_path):
    # Every second column has no view the core can use and is copied: chunk by chunk. RLIMIT_DATA does not
    # count what is mapped from files.
    code = f"""
        import resource
        import numpy as np, batchnorm
        x = np.memmap({str(tmp_path / "zeros")!r}, np.float32, "w+", shape=(2048, 4, 256, 128))  # sparse
        batchnorm.moments(x[:1])
        with open("/proc/self/status") as status:
            data = next(line for line in status if line.startswith("VmData"))
        limit = int(data.split()[1]) * 1024 + (100 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        whole = batchnorm.dataset_moments(x, chunk_bytes=16 << 20)
        every_second = batchnorm.dataset_moments(x[..., ::2], chunk_bytes=16 << 20)
        print(whole.count, every_second.count, whole.var.tolist())
        try:
            np.empty(200 << 20, np.uint8)
        except MemoryError:
            print("the limit holds")
        """
    assert processes.output(code, OMP_NUM_THREADS="2").split("\n") == [
        f"{2**26} {2**25} [0.0, 0.0, 0.0, 0.0]",
        "the limit holds",
    ]
