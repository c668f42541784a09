"""`moments`: exact data without tolerance, general data and positions against longdouble, axes, options."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import batchnorm
import numpy as np
import pytest

from support import reference, tolerances
from support.checks import excess, same_bits
from support.exact import EDGES, SOME, Shape, exact
from support.problem import DTYPES, POSITIONS, Problem, rng

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INTEGERS = [np.dtype(t) for t in ("uint8", "int16", "uint16")]


def wide_moments(x, channel_axis=1):
    """Mean and population variance in longdouble."""
    rows = np.moveaxis(x, channel_axis, 0).reshape(x.shape[channel_axis], -1)
    rows = rows.astype(np.float64).astype(np.longdouble)
    return rows.mean(axis=1), rows.var(axis=1)


def assert_close(got, x, mean, var):
    assert excess(got.mean, mean, tolerances.mean_error(x.dtype, mean, np.sqrt(var))) <= 1
    assert excess(got.var, var, tolerances.var_error(x.dtype) * var) <= 1


# ---- floats ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@dtypes
def test_exact_data_has_exact_moments(dtype, isa):
    for shape in EDGES:
        x, mean, var = exact(shape, dtype)
        got = batchnorm.moments(x)
        assert np.array_equal(got.mean, mean) and np.array_equal(got.var, var), shape


@dtypes
@pytest.mark.parametrize("shape", SOME, ids=str)
def test_training_reports_the_same_moments(shape, dtype):
    x, mean, var = exact(shape, dtype)
    saved = batchnorm.batch_norm_train(x, eps=1e-5).saved
    assert np.array_equal(saved.mean, mean) and np.array_equal(saved.var, var)
    # One addition, one square root, one division: within 2 units of roundoff of the exact value.
    np.testing.assert_allclose(saved.inv_std, 1 / np.sqrt(var + 1e-5), rtol=4 * tolerances.U64, atol=0)


@dtypes
def test_general_data_at_every_edge(dtype):
    for shape in EDGES:
        generator = rng("general", *shape)
        offset, scale = (
            generator.uniform(-3, 3, (shape.channels, 1)),
            2.0 ** generator.uniform(-2, 2, (shape.channels, 1)),
        )
        x = shape.array((generator.standard_normal(shape[:3]) * scale + offset).astype(dtype))
        assert_close(batchnorm.moments(x), x, *wide_moments(x))


def test_tiles_with_different_means():
    # Halves around 1 and around 3: tiles of a power of two values whose means differ, and exactly.
    x = np.empty((1, 2, 32768), np.float32)
    x[..., :16384:2], x[..., 1:16384:2] = -1, 3
    x[..., 16384::2], x[..., 16385::2] = 1, 5
    for array, axis in ((x, 1), (np.ascontiguousarray(x.transpose(0, 2, 1)), 2)):
        got = batchnorm.moments(array, channel_axis=axis)
        assert got.mean.tolist() == [2, 2] and got.var.tolist() == [5, 5]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_what_is_left_where_tiles_cancel(last, dtype, threads):
    """2^60, 1 and -2^60 in tiles that are added one after another: what each addition rounds away is kept."""
    x = np.zeros((1, 4, 34 * 16384), dtype)  # more tiles than are added in one group
    for channel, tiles in enumerate(((5, 6, 7), (1, 20, 30), (30, 32, 33), (2, 3, 33))):
        for tile, value in zip(tiles, (2.0**60, 1, -(2.0**60)), strict=True):
            x[0, channel, tile * 16384 + 8000] = value
    got = batchnorm.moments(
        np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x, channel_axis=-1 if last else 1
    )
    np.testing.assert_allclose(got.mean, 1 / x[0, 0].size, rtol=1e-15)


@dtypes
def test_one_value_none_and_constants(dtype):
    one = batchnorm.moments(np.arange(5, dtype=np.float32).astype(dtype)[None, :])
    assert one.mean.tolist() == [0, 1, 2, 3, 4] and one.var.tolist() == [0] * 5
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0)):
        none = batchnorm.moments(np.empty(shape, dtype))
        assert np.isnan(none.mean).all() and np.isnan(none.var).all() and none.mean.shape == (3,)
    for shape in SOME:
        constants = np.linspace(-3.7, 1234.567, shape.channels)[None, :, None].astype(dtype)
        got = batchnorm.moments(shape.array(np.broadcast_to(constants, shape[:3])))
        assert np.array_equal(got.mean, constants[0, :, 0].astype(np.float64)) and not got.var.any(), shape


def test_large_float64_data():
    # Far from zero, and more values than one tile's chain of sums: each loses digits in sums about 0.
    for x in (
        1000 + rng("large").standard_normal((2**20, 1)),
        1e3 + rng("large").standard_normal((1, 1, 2**20 + 5)),
    ):
        x.ravel()[:16] = 1001.7
        assert_close(batchnorm.moments(x), x, *wide_moments(x))


@pytest.mark.parametrize("power", [150, 153, 154, 160, 200, 250, 300])
def test_values_up_to_1e300(power):
    # The squares of float64 beyond 1e154 overflow, those that `Moments` adds up beyond 1e150.
    for x in (
        np.array([[1.0], [-1.0], [2.0], [0.5]]),
        np.array([[1e3, 1.0]] * 5 + [[1.0, 1.0]]),
        rng(power).random((40, 3, 7)),
    ):
        x = x * 10.0**power / 4e3
        scale = np.longdouble(10) ** power
        mean, var = wide_moments(x / 10.0**power)
        with np.errstate(over="ignore"):  # a variance that float64 does not hold is infinite
            wanted = (mean * scale).astype(float), (var * scale**2).astype(float)
        total = batchnorm.Moments()
        results = [batchnorm.moments(x)]
        if power <= 150:
            results.append((total.update(x).mean, total.var))
        else:
            with pytest.raises(
                ValueError, match=r"x holds values at channel 0 .* use x \* 2\.0\*\*-512|x holds"
            ):
                total.update(x * 1e10 if power < 160 else x)
            assert total.channels is None
            total.update(x * 2.0**-512)  # as the error advises
            results.append((total.mean * 2.0**512, None))
            np.testing.assert_allclose(
                total.std * 2.0**512, np.sqrt(var).astype(float) * 10.0**power, rtol=1e-12
            )
        for got in results:
            np.testing.assert_allclose(got[0], wanted[0], rtol=1e-13, atol=1e-13 * 10.0**power)
            if got[1] is not None:
                np.testing.assert_allclose(got[1], wanted[1], rtol=1e-12)


def test_merged_sums_that_overflow_are_an_error():
    x = np.full((4, 2), 6e153)
    x[:, 1] = 1
    one, sums = batchnorm.Moments().update(x[:, :]), []
    with pytest.raises(
        ValueError, match="others holds values at channel 0 whose squares add up to more than"
    ):
        for _ in range(9):
            sums.append(one.to_array().tolist())
            one.merge(batchnorm.Moments().update(x))
    assert one.to_array().tolist() == sums[-1]


@pytest.mark.parametrize(
    "shape", [(600, 37), (9000, 17), (3, 5, 2100), (2, 3, 4090), (700, 1, 9), (4, 300, 16)], ids=str
)
@pytest.mark.parametrize("axis", [1, -1])
def test_counts_of_a_mask_for_single_elements(shape, axis):
    x, mask = rng("counts").random(shape), rng("mask").random(shape) < 0.9
    total = batchnorm.Moments(channel_axis=axis).update(x, mask=mask)
    others = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    assert np.array_equal(total.counts, mask.sum(axis=others))
    assert np.array_equal(batchnorm.Moments(channel_axis=axis).update(x, mask=np.ones_like(mask)).counts,
                          np.full(shape[axis], x.size // shape[axis]))  # fmt: skip
    assert np.allclose(total.mean, np.where(mask, x, 0).sum(axis=others) / total.counts, rtol=1e-13)


@pytest.mark.parametrize("channels", [1, 8, 64])
def test_squares_that_round_alike(channels):
    """Equal squares round in one direction: what a lane adds up is bounded, so that 1e-14 holds."""
    n = 2**16
    x = np.where(np.arange(n) % 7 < 3, 0.7, -0.7)[:, None].repeat(channels, 1)
    positive = int((x[:, 0] > 0).sum())
    mean = Fraction(0.7) * (2 * positive - n) / n
    for var in batchnorm.moments(x).var:
        assert abs(float(Fraction(float(var)) / (Fraction(0.7) ** 2 - mean**2) - 1)) <= 1e-14


def test_channels_of_many_tiles():
    x = rng("tiles").standard_normal((1, 8, 600_000), np.float32)
    assert_close(batchnorm.moments(x), x, *wide_moments(x))


# ---- which values count ------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions(positions, dtype):
    layouts = (
        "C",
        "F",
        "channels last",
        "batch last",
        "C, reverse 0",
        "C, step -1",
        "C, crop 1",
        "channels last, crop -1",
    )
    shapes = (
        Problem(5, 20, (7, 7)),
        Problem(3, 5, (131,)),
        Problem(38, 65, (3,)),
        Problem(3, 64),
        Problem(39, 130),
    )
    for i, p in enumerate(replace(p, last=last) for p in shapes for last in (False, True)):
        p = replace(p, dtype=dtype, positions=positions, layout=layouts[i % len(layouts)])
        if p.forbidden():
            continue
        got = batchnorm.moments(p.x, channel_axis=p.channel_axis, **p.position_arguments())
        c = replace(p.call(), kind=np.longdouble)
        f = reference.forward(c)
        mean, var = f.batch_mean[0], f.batch_var[0]
        assert excess(got.mean, mean, tolerances.mean_error(dtype, mean, np.sqrt(var))) <= 1, p
        assert excess(got.var, var, tolerances.var_error(dtype) * var + tolerances.U64 * mean**2) <= 1, p


def test_a_mask_that_lies_unlike_x():
    x = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)[::-1]
    mask = rng("mask").random((2, 4, 5)) < 0.6
    for m in (mask, np.asfortranarray(mask), mask[::-1].copy()[::-1], np.repeat(mask, 2, axis=2)[..., ::2]):
        for array in (x, x.copy(), np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, 3, 1, 2)):
            got = batchnorm.moments(array, mask=m)
            want = [array[:, c][mask].astype(np.float64) for c in range(3)]
            np.testing.assert_allclose(got.mean, [w.mean() for w in want], rtol=1e-14)
            np.testing.assert_allclose(got.var, [w.var() for w in want], rtol=1e-13)


def test_rows_left_over_keep_their_weights():
    # Rows of 64 channels and more are taken four at a time.
    for rows in range(1, 12):
        x = np.arange(rows * 64, dtype=np.float32).reshape(rows, 64)
        weights = 2.0 ** np.arange(rows)
        got = batchnorm.moments(x, weights=weights)
        mean = (x.T @ weights) / weights.sum()
        np.testing.assert_allclose(got.mean, mean, rtol=1e-14)
        np.testing.assert_allclose(
            got.var, ((x.T - mean[:, None]) ** 2 @ weights) / weights.sum(), rtol=1e-13
        )
    got = batchnorm.moments(np.arange(192, dtype="f4").reshape(3, 64), weights=np.array([1, 2, 4]))
    assert round(got.mean[0], 2) == 91.43


def test_extreme_weights():
    x = np.array([[1, 5], [3, 7], [4, 4], [9, 1]], np.float32)
    want = batchnorm.moments(x, weights=np.array([1.0, 2, 3, 4]))
    for scale in (1e-300, 1e-150, 1e150, 1e300):
        got = batchnorm.moments(x, weights=np.array([1.0, 2, 3, 4]) * scale)
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-14)
        np.testing.assert_allclose(got.var, want.var, rtol=1e-13)
    assert batchnorm.moments(x[:2], weights=np.array([0.0, 3.0])).mean.tolist() == [3, 7]
    # Weights that sum to no more than ddof leave no variance.
    with pytest.raises(ValueError, match="ddof is 1"):
        batchnorm.moments(x, weights=np.full(4, 0.25), ddof=1)


def test_channels_with_too_few_values_have_nan():
    x = np.array([[1.0, 4, 8], [3, 6, 8], [5, 0, 8]])
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], bool)
    got = batchnorm.moments(x, mask=mask)
    np.testing.assert_array_equal(got.mean, [3, 4, np.nan])
    np.testing.assert_array_equal(got.var, [8 / 3, 0, np.nan])
    got = batchnorm.moments(x, mask=mask, ddof=1)
    np.testing.assert_array_equal(got.mean, [3, 4, np.nan])
    np.testing.assert_array_equal(got.var, [4, np.nan, np.nan])
    with pytest.raises(ValueError, match="ddof is 3"):
        batchnorm.moments(x, mask=mask, ddof=3)
    assert np.isnan(batchnorm.moments(x, mask=np.zeros_like(mask), ddof=3).var).all()


# ---- integers ----------------------------------------------------------------------------------------------


def exact_moments(rows, ddof=0):
    """Integer sums of each row's values, and one rounding of each result."""
    found = []
    for row in rows:
        n, total, squares = len(row), sum(map(int, row)), sum(int(v) ** 2 for v in row)
        found.append((float(Fraction(total, n)), float(Fraction(n * squares - total**2, n * (n - ddof)))))
    return tuple(np.array(v) for v in zip(*found, strict=True))


def pixels(shape, dtype, *seed):
    """Values of the whole range, and both ends of it in every channel where there is room."""
    info = np.iinfo(dtype)
    values = rng(str(shape), str(dtype), *seed).integers(info.min, info.max, shape, endpoint=True)
    values.flat[: values.size // 3 : 5], values.flat[1 : values.size // 3 : 7] = info.min, info.max
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_moments_of_integers_are_correctly_rounded(dtype, isa):
    for shape in SOME:
        x = shape.array(pixels(shape[:3], dtype))
        for ddof in (0, 1):
            got, want = (
                batchnorm.moments(x, ddof=ddof),
                exact_moments(x.transpose(1, 0, 2).reshape(shape.channels, -1), ddof),
            )
            assert same_bits(got.mean, want[0]) and same_bits(got.var, want[1]), shape


def test_moments_of_integers_at_every_edge():
    for shape in EDGES:
        x = shape.array(pixels(shape[:3], np.uint8))
        n, sums, squares = shape.count, x.astype(np.int64).sum((0, 2)), (x.astype(np.int64) ** 2).sum((0, 2))
        got = batchnorm.moments(x)
        var = [float(Fraction(n * int(q) - int(s) ** 2, n * n)) for s, q in zip(sums, squares, strict=True)]
        assert same_bits(got.mean, sums / n) and same_bits(got.var, np.array(var)), shape


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_masked_integers_are_correctly_rounded(dtype):
    for shape in (Shape(5, 3, 49), Shape(38, 65, last=True), Shape(9, 20, 33, last=True)):
        x = shape.array(pixels(shape[:3], dtype))
        for mask in (
            rng("position").random((shape.outer, 1, shape.inner)) < 0.6,
            rng("element").random(x.shape) < 0.6,
        ):
            got = batchnorm.moments(x, mask=mask)
            wide = np.broadcast_to(mask, x.shape)
            mean, var = exact_moments([x[:, c][wide[:, c]] for c in range(shape.channels)])
            assert same_bits(got.mean, mean) and same_bits(got.var, var), shape
    x = np.array([[[7, 7, 9, 0]]], dtype)
    mean, var = batchnorm.moments(x, mask=np.array([[1, 1, 1, 0]], bool))
    assert mean[0] == 23 / 3 and var[0] == 8 / 9
    mean, var = batchnorm.moments(x, weights=np.array([[2.0, 0, 1, 0]]))
    np.testing.assert_allclose([mean[0], var[0]], [23 / 3, 8 / 9], rtol=1e-14)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_nearly_constant_integers(dtype, last):
    # The variance is 1 / n - 1 / n^2 beside squares of 2^32, whose sum passes 2^53: in double it is lost.
    n, top = 3_000_017, int(np.iinfo(dtype).max)
    x = np.full((n, 2), top, dtype)
    x[n // 2, 0] -= 1
    got = batchnorm.moments(x if last else np.asfortranarray(x))
    assert got.mean.tolist() == [float(Fraction(top * n - 1, n)), top]
    assert got.var.tolist() == [float(Fraction(n - 1, n * n)), 0]


def test_a_mean_next_to_a_tie():
    # total / n is a tie between two doubles, of which the lower one is even, and 2^-53 / n more.
    sizes = [n for n in range(4099, 4399, 2) if (n + pow(2**53, -1, n)) * 2**53 // n % 4 == 1]
    assert len(sizes) > 50
    for n in sizes:
        x = np.ones((n, 1), np.uint8)
        x[: pow(2**53, -1, n)] = 2
        assert batchnorm.moments(x).mean[0] == float(Fraction(int(x.sum(dtype=np.int64)), n))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_strided_and_read_only_integers(dtype):
    x = pixels((3, 20, 24, 5), dtype)
    want = batchnorm.moments(x[:, 3:15, ::-2, 1:4].copy(), channel_axis=-1)
    x.flags.writeable = False
    got = batchnorm.moments(x[:, 3:15, ::-2, 1:4], channel_axis=-1)
    assert same_bits(got.mean, want.mean) and same_bits(got.var, want.var)


# ---- axes and options --------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    "shape", [(2, 3), (4, 5, 6), (2, 3, 4, 5), (2, 3, 2, 3, 2), (2, 3, 2, 1, 2, 2)], ids=str
)
def test_every_axis(shape, dtype):
    x = rng(*shape).standard_normal(shape).astype(dtype)
    for axis in range(-len(shape), len(shape)):
        got = batchnorm.moments(x, channel_axis=axis)
        assert got.mean.shape == got.var.shape == (shape[axis],)
        assert_close(got, x, *wide_moments(x, axis))


@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (-1, -2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_several_channel_axes(axes, kind):
    x = rng(axes).integers(0, 256, (6, 3, 4, 5)).astype(kind)
    rest = tuple(a for a in range(4) if a not in [a % 4 for a in axes])
    got = batchnorm.moments(x, channel_axis=axes)
    np.testing.assert_allclose(got.mean, x.mean(rest, np.float64), rtol=1e-14)
    np.testing.assert_allclose(got.var, x.var(rest, np.float64), rtol=1e-13)
    kept = batchnorm.moments(x, channel_axis=axes, keepdims=True)
    assert kept.mean.shape == x.mean(rest, keepdims=True).shape and same_bits(
        kept.var.ravel(), got.var.ravel()
    )
    mask = rng("mask").random(x.shape) < 0.7
    got = batchnorm.moments(x, channel_axis=axes, mask=mask)
    np.testing.assert_allclose(got.mean, np.mean(x, rest, np.float64, where=mask), rtol=1e-14)


def test_result():
    x = rng("result").standard_normal((3, 4, 5, 6))
    got = batchnorm.moments(x)
    assert type(got) is batchnorm.MeanVar and got._fields == ("mean", "var")
    assert got.mean.dtype == got.var.dtype == np.float64
    for axis, shape in ((0, (3, 1, 1, 1)), (1, (1, 4, 1, 1)), (-1, (1, 1, 1, 6))):
        kept, plain = (batchnorm.moments(x, channel_axis=axis, keepdims=k) for k in (True, False))
        assert kept.mean.shape == kept.var.shape == shape
        assert same_bits(kept.mean.ravel(), plain.mean) and same_bits(kept.var.ravel(), plain.var)
    assert batchnorm.moments(x, data_format="NHWC", keepdims=True).mean.shape == (1, 1, 1, 6)
    x.flags.writeable = False
    assert same_bits(batchnorm.moments(x).mean, got.mean)


def test_ddof_divides_by_count_less_ddof():
    x = rng("ddof").standard_normal((3, 4, 5))
    _, var = wide_moments(x)
    for ddof in (0, 1, 2, 5, np.int64(1)):
        got = batchnorm.moments(x, ddof=ddof)
        assert same_bits(got.mean, batchnorm.moments(x).mean)
        np.testing.assert_allclose(
            got.var, (var * 15 / (15 - ddof)).astype(float), rtol=tolerances.VAR_FLOAT64
        )


OTHER_HABITS = [
    ({"axis": 0}, r"channel_axis=0.*channel_axis=\(1, 2\)"),
    ({"axis": (0, 2)}, r"NumPy.*channel_axis=1"),
    ({"axes": [0, 1]}, r"NumPy.*channel_axis=2"),
    ({"where": True}, "mask"),
    ({"shift": 0.5}, "drop it"),
    ({"sample_weight": 1}, "weights"),
    ({"correction": 1}, "ddof"),
    ({"keep_dims": True}, "keepdims"),
    ({"num_thread": 1}, "did you mean 'num_threads'"),
]


@pytest.mark.parametrize(("keywords", "words"), OTHER_HABITS, ids=str)
def test_keywords_of_other_libraries_are_translated(keywords, words):
    with pytest.raises(TypeError, match=rf"moments\(\) has no argument '{next(iter(keywords))}'.*{words}"):
        batchnorm.moments(np.ones((2, 3, 4)), **keywords)


def test_options_that_are_none():
    x = np.ones((2, 3, 4))
    with pytest.raises(TypeError, match=r"keepdims is 1 \(int\), expected True or False"):
        batchnorm.moments(x, keepdims=1)
    with pytest.raises(
        TypeError, match=r"group is of type object, expected None or an object with allgather"
    ):
        batchnorm.moments(x, group=object())
    with pytest.raises(TypeError, match=r"channel_axis.*data_format"):
        batchnorm.moments(x, channel_axis=1, data_format="NCL")
    with pytest.raises(ValueError, match="channel_axis=1"):
        batchnorm.moments(x, channel_axis=(0, 2))
