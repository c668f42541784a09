"""`Moments`: its sums against fractions, order and grouping, counts per channel, state."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
import pickle
import random
import re
from fractions import Fraction

import batchnorm
import numpy as np
import pytest
from batchnorm import Moments, _core, dataset_moments

from support import tolerances
from support.checks import excess, same_bits
from support.problem import DTYPES, rng

FLOAT32, FLOAT64, FLOAT16 = DTYPES[:3]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def batches(count, channels=3, dtype=FLOAT64, mean=0.0, spread=1.0, seed=0):
    """Batches (n, channels, s) of different sizes."""
    generator = rng("batches", count, channels, str(dtype), mean, seed)
    mean = min(mean, 1e4) if dtype == FLOAT16 else mean
    sizes = generator.integers(1, 60, (count, 2))
    return [(generator.standard_normal((n, channels, s)) * spread + mean).astype(dtype) for n, s in sizes]


def moments_of(arrays):
    return [Moments().update(x) for x in arrays]


def merged(parts):
    return Moments.merged(moments_of(parts))


def wide(arrays):
    """Mean and variance of all values at once, in longdouble."""
    rows = [np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in arrays]
    rows = np.concatenate(rows, axis=1).astype(np.float64).astype(np.longdouble)
    return rows.mean(axis=1), rows.var(axis=1)


def sums(m):
    """What the three doubles of count, sum and sum of squares add up to, of each channel."""
    return [
        tuple(sum(map(Fraction, parts)) for parts in c)
        for c in m.to_array()[5:].reshape(3, 3, -1).transpose(2, 0, 1).tolist()
    ]


def exact_sums(*arrays):
    """The same of arrays (n, channels, ...)."""
    found = []
    for c in range(arrays[0].shape[1]):
        data = [Fraction(float(v)) for x in arrays for v in x[:, c].ravel()]
        found.append((len(data), sum(data), sum(v * v for v in data)))
    return found


def ulps(got, want):
    """Distance in units in the last place, of want a number or a Fraction."""
    return abs(Fraction(float(got)) - Fraction(want)) / Fraction(math.ulp(float(want)))


def same(a, b):
    if a.channels is None or b.channels is None:
        return a.channels is b.channels
    return all(same_bits(getattr(a, name), getattr(b, name)) for name in ("counts", "mean", "m2"))


# ---- sums --------------------------------------------------------------------------------------------------


@pytest.mark.quick
@dtypes
@pytest.mark.parametrize("mean", [0, 3, 96, 1e6, -12345678.0])
def test_sums_of_a_batch_are_exact(dtype, mean, isa):
    # Small integers times 2^-k around the mean: every sum about any value near it is exact.
    mean = np.clip(mean, -2e4, 2e4) if dtype == FLOAT16 else mean
    x = (mean + rng(1).integers(-8, 9, (5, 4, 9)) / 4.0).astype(dtype)
    assert sums(Moments().update(x)) == exact_sums(x)


def test_products_that_no_two_doubles_hold():
    # Constant channels: x^2 has 106 bits, n x^2 more.
    for value in (0.1, 1 / 3, 1e100 / 7, -3.3e-100):
        got = sums(Moments().update(np.full((7, 2, 1013), value)))
        assert got[1] == (7091, 7091 * Fraction(value), 7091 * Fraction(value) ** 2)


@pytest.mark.parametrize("mean", [0.0, 1.0, -1e3, 1e6, 1e12])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_merging_is_exact_and_reading_within_one_ulp(mean, dtype):
    parts = moments_of(batches(20, mean=mean, dtype=dtype))
    total = Moments.merged(parts)
    for c, got in enumerate(sums(total)):
        assert got == tuple(map(sum, zip(*(sums(p)[c] for p in parts), strict=True)))
        n, s, q = got
        assert ulps(total.mean[c], s / n) <= Fraction(1, 2)
        assert ulps(total.m2[c], q - s * s / n) <= 1
        assert total.var[c] == total.m2[c] / total.count


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16"])
def test_integers_are_exact_in_any_cut(dtype, isa):
    info = np.iinfo(dtype)
    x = rng(dtype).integers(info.min, info.max, (40, 3, 9, 11), dtype, endpoint=True)
    want = Moments().update(x)
    assert sums(want) == exact_sums(x)
    for chunk in (1, 700, 5000):
        assert same(dataset_moments(x, chunk_bytes=chunk).moments, want)
    assert same(Moments(channel_axis=-1).update(np.moveaxis(x, 1, -1).copy()), want)
    whole = batchnorm.moments(x)
    assert same_bits(want.mean, whole.mean)
    np.testing.assert_allclose(want.var, whole.var, rtol=2 * tolerances.U64, atol=0)
    mask = rng("mask").random(x.shape) < 0.5
    got = Moments().update(x, mask=mask)
    assert sums(got) == [exact_sums(x[:, c][mask[:, c]][:, None])[0] for c in range(3)]


# ---- against all values at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, 100.0, 1e3, 1e4, 1e6])
@dtypes
def test_against_all_values_at_once(dtype, ratio):
    arrays = batches(30, dtype=dtype, mean=3 * ratio, spread=3.0)
    # Each batch with a mean of its own, thousands of its standard deviations away from the others'.
    apart = [(m + rng(m).standard_normal((3, 3, 8)) * 0.01).astype(dtype) for m in (-20, 0.5, 7, 90)]
    # Of narrow data moments may take the sums about 0 up to |mean| / std = 128: their rounding, 1e-13 at
    # worst, is then amplified by 128^2 in each batch.
    for parts, error in ((arrays, 1e-13 * 128**2), (apart, tolerances.VAR_NARROW)):
        total, (mean, var) = merged(parts), wide(parts)
        error = tolerances.VAR_FLOAT64 if dtype == FLOAT64 else error
        assert excess(total.mean, mean, tolerances.mean_error(dtype, mean, np.sqrt(var))) <= 1
        assert excess(total.var, var, error * var) <= 1
        assert same_bits(total.std, np.sqrt(total.var))


# ---- order and grouping ------------------------------------------------------------------------------------


def in_some_order(accumulators, generator):
    """Merge random pairs until one is left."""
    left = [m.copy() for m in accumulators]
    while len(left) > 1:
        a, b = (left.pop(generator.randrange(len(left))) for _ in range(2))
        left.append(a + b if generator.random() < 0.5 else a.merge(b))
    return left[0]


@dtypes
@pytest.mark.parametrize("ratio", [0.0, 10.0, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_order_and_grouping_do_not_matter(dtype, ratio, masked):
    arrays = batches(25, dtype=dtype, mean=ratio)
    masks = [rng(i).random(x.shape) < 0.7 if masked else None for i, x in enumerate(arrays)]
    parts = [Moments().update(x, mask=mask) for x, mask in zip(arrays, masks, strict=True)]
    want, generator = Moments.merged(parts), random.Random(0)
    for _ in range(60):
        assert same(in_some_order(parts, generator), want)


def test_order_of_values_far_apart():
    # Squares from 1e-60 to 1e60 do not fit 159 bits.
    arrays = [rng(p).standard_normal((4, 3)) * 10.0**p for p in (-30, 30, 0, -20, 28, 29, 10)]
    seen = [Moments.merged(order) for order in itertools.permutations(moments_of(arrays))]
    for name in ("mean", "var"):
        low, high = (f([getattr(m, name) for m in seen], axis=0) for f in (np.min, np.max))
        assert np.all(high <= np.nextafter(low, np.inf))


@dtypes
def test_threads_do_not_matter(dtype, threads):
    x = rng("threads").standard_normal((9, 33, 529)).astype(dtype)
    mask = rng("mask").random(x.shape) < 0.8
    for options in ({}, {"mask": mask}, {"mask": mask[:, 0]}, {"weights": rng("w").random((9, 529))}):
        total, one = Moments().update(x, **options), Moments().update(x, **options, num_threads=1)
        assert same_bits(total.to_array(), one.to_array())


def test_merging_with_itself_and_huge_counts():
    one = Moments().update(batches(1, mean=100.0)[0])
    total = one.copy()
    for _ in range(100):
        total.merge(total)
    assert total.count == one.count * 2**100 and isinstance(total.count, int)
    assert same_bits(total.mean, one.mean) and same_bits(total.var, one.var)
    assert same_bits(total.m2, one.m2 * 2.0**100)
    odd = Moments().update(np.ones((1, 3)))
    assert sums(total + odd)[0][0] == one.count * 2**100 + 1


# ---- what counts -------------------------------------------------------------------------------------------


TURNED = [np.array, np.asfortranarray, lambda x: x.transpose(0, 2, 1).copy().transpose(0, 2, 1)]


@dtypes
@pytest.mark.parametrize("layout", TURNED)
def test_weights_are_copies(dtype, layout):
    generator = rng(2)
    x = layout((100 + generator.integers(-8, 9, (6, 3, 40)) / 4.0).astype(dtype))
    weights = generator.integers(0, 4, (6, 40))
    copies = np.repeat(np.moveaxis(x, 1, 2).reshape(-1, 3), weights.ravel(), axis=0)
    got = Moments().update(x, weights=weights)
    assert got.count == weights.sum() and isinstance(got.count, int)
    assert sums(got) == exact_sums(copies)


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
    x = np.concatenate([np.moveaxis(x, 1, 0).reshape(3, -1) for x in arrays], axis=1).astype(np.longdouble)
    want = (x * w).sum(axis=1) / w.sum()
    var = ((x - want[:, None]) ** 2 * w).sum(axis=1) / w.sum()
    np.testing.assert_allclose(total.counts, float(w.sum()), rtol=1e-14)
    assert np.all(np.abs(total.mean - want) <= 4 * tolerances.U64 * np.abs(want) + 1e-14 * np.sqrt(var))
    np.testing.assert_allclose(total.var, var.astype(np.float64), rtol=1e-13)


def test_counts_of_each_channel():
    # A channel that is absent from some batches has the statistics of those in which it is not.
    arrays = [x[:, :, :20] for x in batches(5, mean=7.0)]
    masks = [rng(i).random(x.shape) < np.array([1, 0.5, 0.1])[:, None] for i, x in enumerate(arrays)]
    masks[0][:, 2] = False
    total = Moments()
    for x, mask in zip(arrays, masks, strict=True):
        total.update(x, mask=mask)
    counts = sum(mask.sum((0, 2)) for mask in masks)
    assert total.counts.dtype == np.float64 and total.counts.tolist() == counts.tolist()
    for c in range(3):
        values = np.concatenate([x[:, c][mask[:, c]] for x, mask in zip(arrays, masks, strict=True)])
        np.testing.assert_allclose([total.mean[c], total.var[c]], [values.mean(), values.var()], rtol=1e-13)
        np.testing.assert_allclose(total.variance(1)[c], values.var(ddof=1), rtol=1e-13)
    with pytest.raises(ValueError, match=rf"{counts.min()} to {counts.max()}; use counts"):
        _ = total.count
    assert re.fullmatch(
        rf"Moments\(channel_axis=1, channels=3, counts={counts.min()} to {counts.max()}\)", repr(total)
    )
    rare = Moments().update(np.eye(3), mask=np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], bool))
    assert rare.counts.tolist() == [3, 1, 0]
    np.testing.assert_array_equal(rare.mean, [1 / 3, 0, np.nan])
    np.testing.assert_array_equal(np.isnan(rare.variance(1)), [False, True, True])
    np.testing.assert_array_equal(np.isnan(rare.var), [False, False, True])
    later = rare + Moments().update(np.full((2, 3), 4.0))
    assert later.mean[2] == 4 and later.counts.tolist() == [5, 3, 2]


def test_nothing_counts():
    x = np.ones((4, 3, 2))
    total = Moments().update(x, mask=np.zeros((4, 2), bool)).update(x, weights=np.zeros(4))
    total.update(x, mask=np.zeros_like(x, bool))
    assert total.count == 0 and total.channels is None and total.counts.shape == (0,)
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0)):
        assert total.update(np.empty(shape, np.float32)).channels is None
    full = Moments().update(x)
    before = full.to_array()
    assert same_bits(full.update(x[:0]).merge(Moments()).to_array(), before)
    assert same(Moments().merge(full), full)
    for name in ("mean", "var", "std", "m2", "variance"):
        with pytest.raises(ValueError, match=r"seen no values.*call update"):
            getattr(total, name)()


@dtypes
def test_non_finite_values_stay_in_their_channel(dtype):
    clean = batches(3, channels=5, dtype=dtype)
    dirty = [x.copy() for x in clean]
    dirty[1][0, 0, 0], dirty[1][0, 1, 0], dirty[2][0, 2, -1] = np.nan, np.inf, -np.inf
    dirty[0][0, 3, 0], dirty[2][0, 3, 0] = np.inf, -np.inf
    want = merged(clean)
    for order in itertools.permutations(dirty):
        got = merged(order)
        np.testing.assert_array_equal(got.mean[:4], [np.nan, np.inf, -np.inf, np.nan])
        np.testing.assert_array_equal(got.var[:4], np.full(4, np.nan))
        assert got.mean[4] == want.mean[4] and got.var[4] == want.var[4]
        again = Moments.from_array(got.to_array())
        np.testing.assert_array_equal(again.mean, got.mean)


# ---- axes, layouts -----------------------------------------------------------------------------------------


AXES = [
    ({}, (2, 3, 4)), ({"channel_axis": -1}, (5, 4, 3)), ({"channel_axis": 0}, (3, 7)),
    ({"data_format": "NHWC"}, (2, 4, 5, 3)), ({"channel_axis": (1, 3)}, (6, 3, 5, 4)),
    ({"channel_axis": (-1, 1)}, (6, 3, 5, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("options", "shape"), AXES, ids=str)
def test_axes(options, shape):
    x = rng(shape).standard_normal(shape)
    total = Moments(**options)
    axes = np.atleast_1d(total.channel_axis) % x.ndim
    rest = tuple(a for a in range(x.ndim) if a not in axes)
    more = np.take(x, [0], rest[0])
    total.update(x).update(more)
    both = np.concatenate([x, more], axis=rest[0])
    np.testing.assert_allclose(total.mean, both.mean(rest), rtol=1e-12)
    np.testing.assert_allclose(total.var, both.var(rest), rtol=1e-12)
    assert total.channels == total.mean.size and total.counts.shape == total.mean.shape
    assert total.count == both.size // total.channels
    again = Moments.from_array(total.to_array())
    assert same(again, total) and again.channel_axis == total.channel_axis
    assert same(again.update(x), total.update(x))


# ---- copies and state --------------------------------------------------------------------------------------

COPIES = {
    "copy": Moments.copy,
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "state": lambda m: Moments.from_state(m.state_dict()),
    "array": lambda m: Moments.from_array(m.to_array()),
    "merge": lambda m: Moments().merge(m),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_go_their_own_way(name):
    first, second, third = batches(3, mean=1e3)
    total = Moments().update(first)
    twin = COPIES[name](total)
    assert type(twin) is Moments and repr(twin) == repr(total)
    assert same_bits(twin.to_array(), total.to_array())
    twin.update(second)
    total.update(third)
    assert same(twin, merged([first, second])) and same(total, merged([first, third]))


def test_reading_changes_nothing():
    total = merged(batches(3))
    before = total.to_array()
    for name in ("mean", "var", "std", "m2", "counts"):
        getattr(total, name)[...] = 7
    for array in (total.to_array(), *total.state_dict().values()):
        array[...] = 7 if array.dtype.kind != "U" else ""
    assert same_bits(total.to_array(), before)


OPTIONS = [
    {},
    {"channel_axis": -1},
    {"data_format": "NHWC"},
    {"channel_axis": (1, 3)},
    {"nodata": 0},
    {"nodata": [1, np.nan, 3, 0]},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_through_a_file(tmp_path, options):
    x = rng("file").random((3, 4, 5, 6))
    empty, full = Moments(**options), Moments(**options).update(x)
    for total in (empty, full):
        np.savez(tmp_path / "state.npz", **total.state_dict())
        with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
            again = Moments.from_state(state)
        assert repr(again) == repr(total)
        again.update(np.round(x))
    assert same(again, full.update(np.round(x)))


def test_an_axis_that_was_not_said_stays_so():
    def picture(i):
        return np.full((20, 30, 3), i, np.uint8)

    for again in (Moments.from_state(Moments().state_dict()), Moments.from_array(Moments().to_array())):
        with pytest.raises(ValueError, match="expected to be told its channels"):
            dataset_moments(range(2), read=picture, moments=again)


def test_flat_states_are_merged_as_accumulators_are():
    x = batches(6, mean=1e4)
    parts = moments_of(x)
    flat = [m.to_array() for m in parts]
    want = Moments.merged(parts)
    assert same(Moments.merged(flat), want) and same(Moments.merged([*parts[:3], *flat[3:]]), want)

    def two(a, b):
        return Moments.merged([a, b]).to_array()

    for seed in range(4):
        random.Random(seed).shuffle(flat)
        assert same(Moments.from_array(functools.reduce(two, flat)), want)
        assert same(functools.reduce(operator.add, map(Moments.from_array, flat)), want)
        assert same(Moments.from_array(functools.reduce(two, flat, Moments().to_array())), want)


def test_the_flat_state_of_another_byte_order():
    total = merged(batches(3, mean=1e4))
    flat = total.to_array()
    for order in "<>":
        sent = flat.astype(flat.dtype.newbyteorder(order)).tobytes()
        assert same(Moments.from_array(np.frombuffer(sent, order + "f8")), total)
        other = {"<": ">", ">": "<"}[order]
        with pytest.raises(ValueError, match=r"in the other order: pass array.view\(array.dtype"):
            Moments.from_array(np.frombuffer(sent, other + "f8"))
        wrong = np.frombuffer(sent, other + "f8")
        assert same(Moments.from_array(wrong.view(wrong.dtype.newbyteorder())), total)


def test_the_flat_state_begins_with_version_and_channels():
    total = Moments(channel_axis=(1, -1)).update(rng("flat").random((5, 3, 2, 4)))
    flat = total.to_array()
    assert flat[:7].tolist() == [1, 12, 2, 1, -1, 3, 4] and flat.shape == (3 + 4 + 9 * 12,)
    assert Moments().to_array().tolist() == [1, 0, 1, 1, 0]


# What `Moments.state_dict` of version 0.1 gave, of an NLC accumulator, and of an empty one.
OF_0_1 = [
    {
        "axis": np.array(-1), "data_format": np.array("NLC"), "count": np.array([6.0, 0.0, 0.0]),
        "sum": np.array([[1.033333333333333, 9999994.3], [0.0, -3.4924596548080444e-10], [0.0, 0.0]]),
        "sum_sq": np.array([
            [11.361111111111107, 21999992200049.914], [9.952532625195292e-16, -0.0017807589983576278],
            [4.930380657631324e-32, 1.0842021724855044e-19],
        ]),
    },
    {
        "axis": np.array(1), "data_format": np.array(""), "count": np.zeros(3), "sum": np.zeros((3, 0)),
        "sum_sq": np.zeros((3, 0)),
    },
]  # fmt: skip


def test_states_of_version_0_1_are_read(tmp_path):
    x = np.array([[[0.1, 1e6 + 0.3], [0.7, 1e6]], [[1 / 3, 1e6 - 7], [-2.5, 1e6 + 0.1]]])
    np.savez(tmp_path / "old.npz", **OF_0_1[0])
    with np.load(tmp_path / "old.npz") as state:
        old = Moments.from_state(state)
    assert repr(old) == "Moments(data_format='NLC', channels=2, count=6)"
    assert old.var.tolist() == [1.8638580246913576, 888890755562.9716]
    new = Moments(data_format="NLC").update(x).update(x[:1] * 3)
    assert same(old, new) and same(old.update(x), new.update(x))
    assert repr(Moments.from_state(OF_0_1[1])) == "Moments(channel_axis=1, channels=None, count=0)"


# ---- errors ------------------------------------------------------------------------------------------------


def flat(*header, count=2.0, square=1.0, size=None):
    """Flat state of a header, with count, sum and sum of squares of each channel."""
    c = int(header[1]) if size is None else size
    return np.concatenate([header, np.repeat([count, 0, 0, 1, 0, 0, square, 0, 0], c)])


GIVES = r"array begins with .*, expected what Moments.to_array\(\) gives"
GOOD = 1, 3, 1, 1, 3
BAD_ARRAYS = [
    ([1.0, 3], TypeError, "array is of type list, expected an array of float64"),
    (flat(*GOOD).astype(np.float32), TypeError, "array is float32"),
    (flat(2, 3, 1, 1, 3), ValueError,
     r"array begins with \[2.0, 3.0, 1.0, 1.0, 3.0\], expected .* in version 1: it is of another release"),
    (flat(*GOOD)[:-1], ValueError, "gives; it has 31 values, and begins as one of 32$"),
    (flat(*GOOD)[:2], ValueError, r"gives; it has shape \(2,\)$"),
    *((array, ValueError, GIVES) for array in (
        flat(*GOOD)[None], np.ones(2), flat(1, 3, 1, 1, 4), flat(1, 4, 1, 1, 3),
        flat(1, 3, 0), flat(1, 3, -2, 1, 3), flat(1, 1, 1e300, 1, 1), flat(1, 1, 2, 1, 2, -1, -1),
        flat(1, np.nan, 1, 1, 3, size=3), flat(np.inf, 3, 1, 1, 3), flat(1, 3, 2, 0, 1, 1, 3),
        np.full(30, 1e300), flat(1, 3, 1, 1e300, 3),
        flat(*GOOD, count=-1), flat(*GOOD, square=-1), flat(*GOOD, count=np.nan), flat(*GOOD, count=0),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("array", "error", "words"), BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_bad_arrays(array, error, words):
    with pytest.raises(error, match=words):
        Moments.from_array(array)


def changed(old=False, **entries):
    state = dict(OF_0_1[0]) if old else Moments().update(np.ones((4, 3, 2), np.float32)).state_dict()
    return {name: value for name, value in (state | entries).items() if value is not None}


BAD_STATES = [
    (7, TypeError, r"state is 7 \(int\), expected a mapping"),
    (changed(moments=None), ValueError,
     r"state has data_format, nodata, expected moments, data_format, nodata"),
    (changed(total=np.ones(3)), ValueError, "state has .*total, expected moments"),
    (changed(old=True, count=None), ValueError, "state has .*, expected axis, data_format, count"),
    (changed(moments=[1.0]), TypeError, "array is of type list"),
    (changed(moments=np.ones(5)), ValueError, GIVES),
    (changed(data_format=np.array("NCX")), ValueError, "data_format is 'NCX'"),
    (changed(nodata=np.array(["x"])), TypeError, "nodata is"),
    (changed(old=True, count=np.ones(2)), ValueError, GIVES),
    (changed(old=True, sum=np.ones(3)), ValueError, GIVES),
    (changed(old=True, sum_sq=np.full((3, 2), -2.0)), ValueError, GIVES),
    (changed(old=True, count=np.zeros(3)), ValueError, GIVES),
]  # fmt: skip


@pytest.mark.parametrize(("state", "error", "words"), BAD_STATES, ids=range(len(BAD_STATES)))
def test_bad_states(state, error, words):
    with pytest.raises(error, match=words):
        Moments.from_state(state)


BAD_CALLS = [
    (lambda m: m.update([[1.0]]), TypeError, "x is of type list"),
    (lambda m: m.update(np.ones((2, 4, 5))), ValueError,
     r"channels of shape \(4,\), expected \(3,\) as before"),
    (lambda m: m.update(np.empty((0, 4))), ValueError, r"channels of shape \(4,\), expected \(3,\)"),
    (lambda m: m.update(np.ones((2, 3)), mask=np.ones(3, bool)), ValueError, r"mask has shape \(3,\)"),
    (lambda m: m.update(np.ones((2, 3)), nodata=0), TypeError, "nodata"),
    (lambda m: m.merge(3), TypeError, r"other is 3 \(int\), expected a Moments"),
    (lambda m: m.merge(Moments().update(np.ones((2, 4)))), ValueError,
     r"shape \(4,\), expected \(3,\) as before"),
    (lambda m: m.merge(Moments(channel_axis=(1, 2)).update(np.ones((2, 1, 3)))), ValueError,
     r"shape \(1, 3\)"),
    (lambda m: m + Moments().update(np.ones((2, 4))), ValueError, r"shape \(4,\)"),
    (lambda m: m + 1, TypeError, "unsupported operand"),
    (lambda m: Moments.merged([m, 2]), TypeError, r"other is 2 \(int\), expected a Moments"),
    (lambda m: Moments.merged([np.ones(5), m]), ValueError, "array begins with .* Moments.to_array"),
    (lambda m: Moments.merged([m, [1.0]]), TypeError, "other is of type list, expected a Moments"),
    (lambda m: Moments.merged([]), ValueError, "accumulators is empty"),
    (lambda m: m.variance(-1), ValueError, "ddof is -1, expected an int >= 0"),
    (lambda m: m.variance(8), ValueError, "ddof is 8, expected less than 8"),
    (lambda m: Moments(channel_axis=1, data_format="NHWC"), TypeError, "they say the same thing"),
    (lambda m: Moments(channel_axis=(0, 2, 3)), ValueError, "leave out as channel_axis="),
    (lambda m: Moments(data_format="NCX"), ValueError, "data_format is 'NCX'"),
    (lambda m: Moments(axis=-1), TypeError, r"Moments\(\) has no argument 'axis'.*channel_axis=-1"),
    (lambda m: Moments(data_format="NCL").update(np.ones((2, 3))), ValueError, "'NCL', which needs 3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_errors_change_nothing(call, error, words):
    total = Moments().update(np.ones((4, 3, 2), np.float32))
    before = total.to_array()
    with pytest.raises(error, match=words):
        call(total)
    assert same_bits(total.to_array(), before)
    assert repr(total) == "Moments(channel_axis=1, channels=3, count=8)"


def test_sums_of_another_length_are_refused_by_the_core():
    good = _core.moment_sums(np.ones((2, 3)))
    assert good.shape == (27,)
    for bad in (good[:-1], good[:0], good[:3]):
        with pytest.raises(ValueError, match="expected moment_sums_size"):
            _core.moments_from_sums(bad)
        with pytest.raises(ValueError, match="expected moment_sums_size"):
            _core.merged_moment_sums(good, bad)
