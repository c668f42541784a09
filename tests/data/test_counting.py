"""What does not count: `nodata`, NumPy's masked arrays, and either together with the other positions."""

from __future__ import annotations

import warnings

import batchnorm
import numpy as np
import pytest
from batchnorm import Moments, dataset_moments

from support.checks import same_bits
from support.problem import BFLOAT16, rng

LOWEST = float(np.finfo(np.float32).min)


def bands(dtype=np.float32):
    """A raster (bands, rows, columns), and where it has data."""
    x = rng("bands").normal(300, 20, (3, 16, 16)).astype(dtype)
    has = rng("has").random(x.shape) < [[[0.9]], [[0.5]], [[1.0]]]
    return x, has


def ways(x, **options):
    """Mean and variance by each of the functions that take `options`."""
    where = {"channel_axis": 0}
    moments = batchnorm.moments(x, **where, **options)
    total = Moments(**where, nodata=options.get("nodata"))
    total.update(x, **{k: v for k, v in options.items() if k != "nodata"})
    assert same_bits(moments.mean, total.mean)
    np.testing.assert_allclose(moments.var, total.var, rtol=1e-11)
    return moments


def expected(x, has):
    kept = [x[c][has[c]].astype(np.float64) for c in range(len(x))]
    return np.array([k.mean() for k in kept]), np.array([k.var() for k in kept])


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint16])
@pytest.mark.parametrize("nodata", [0, -9999, LOWEST, np.nan])
def test_nodata(dtype, nodata):
    x, has = bands(dtype)
    if np.dtype(dtype).kind in "iu" and not np.iinfo(dtype).min <= nodata <= np.iinfo(dtype).max:
        return  # an error: see below
    dirty = np.where(has, x, np.array(nodata, dtype))
    got = ways(dirty, nodata=nodata)
    np.testing.assert_allclose(got, expected(x, has), rtol=1e-11)
    assert Moments(channel_axis=0, nodata=nodata).update(dirty).counts.tolist() == has.sum((1, 2)).tolist()
    assert same_bits(got.mean, ways(np.ma.array(x, mask=~has)).mean)
    assert same_bits(got.mean, ways(dirty, mask=has).mean)


def test_nodata_is_rounded_to_the_dtype_first():
    # -3.4028234663852886e38 is float32's lowest; shorter texts of it are nearest to the same float32.
    x, has = bands()
    dirty = np.where(has, x, np.float32(LOWEST))
    for nodata in (LOWEST, -3.4028235e38, np.float32(LOWEST), np.longdouble(LOWEST)):
        np.testing.assert_allclose(ways(dirty, nodata=nodata), expected(x, has), rtol=1e-11)
    dirty = np.where(has, x, np.float32(0.1))
    np.testing.assert_allclose(ways(dirty, nodata=0.1), expected(x, has), rtol=1e-11)
    if BFLOAT16 is not None:
        x = np.array([[1, 2, 0.1], [4, 4, 4]]).astype(BFLOAT16)
        assert batchnorm.moments(x, channel_axis=0, nodata=0.1).mean.tolist() == [1.5, 4]


@pytest.mark.parametrize("nodata", [[-9999, np.nan, 7], (-9999, np.nan, 7), np.array([-9999, np.nan, 7])])
def test_nodata_of_each_channel(nodata):
    x, has = bands()
    for band, value in enumerate((-9999, np.nan, 7)):
        x[band][~has[band]] = value
    x[0, 0, 0], has[0, 0, 0] = 7, True  # band 2's is a value in band 0
    np.testing.assert_allclose(ways(x, nodata=nodata), expected(x, has), rtol=1e-11)
    last = np.moveaxis(x, 0, -1)
    assert same_bits(
        batchnorm.moments(last, channel_axis=-1, nodata=nodata).mean, ways(x, nodata=nodata).mean
    )
    whole = np.round(np.where(np.isnan(x), 3, x)).astype(np.int16)
    whole[1].flat[0] = 0  # as which NaN is stored in an integer, where the conversion does not fail
    assert Moments(channel_axis=0, nodata=nodata).update(whole).counts[1] == 256, "that band has none"


def test_nodata_of_several_channel_axes():
    x = np.arange(24.0).reshape(4, 2, 3)
    nodata = x[1].copy()
    got = Moments(channel_axis=(1, 2), nodata=nodata).update(x)
    assert got.counts.tolist() == [[3, 3, 3], [3, 3, 3]] and np.array_equal(got.mean, x[[0, 2, 3]].mean(0))


def test_values_in_one_band_of_files(tmp_path):
    x, has = bands()
    dirty = np.where(has, x, np.float32(LOWEST))
    for i, rows in enumerate(np.array_split(dirty, 4, axis=1)):
        np.save(tmp_path / f"{i}.npy", rows)
    files = sorted(tmp_path.glob("*.npy"))
    for options in (
        {"nodata": LOWEST},
        {"mask": lambda a: a != np.float32(LOWEST)},
        {"transform": lambda a: np.ma.masked_equal(a, np.float32(LOWEST))},
        {"read": lambda path: np.ma.masked_equal(np.load(path), np.float32(LOWEST))},
    ):
        got = dataset_moments(files, channel_axis=0, **options)
        np.testing.assert_allclose(got, expected(x, has), rtol=1e-11)
        assert got.counts.tolist() == has.sum((1, 2)).tolist()


def test_with_mask_lengths_and_weights():
    x = rng("all").standard_normal((6, 3, 10))
    has = rng("which").random(x.shape) < 0.7
    lengths = np.array([0, 10, 3, 7, 9, 10])
    steps = np.arange(10) < lengths[:, None]
    dirty, masked = np.where(has, x, np.nan), np.ma.array(x, mask=~has)
    want = batchnorm.moments(x, mask=has & steps[:, None])
    for data, options in ((dirty, {"nodata": np.nan}), (masked, {})):
        for positions in (
            {"lengths": lengths}, {"lengths": lengths, "lengths_axis": -1}, {"mask": steps},
            {"mask": steps[:, None]}, {"mask": np.broadcast_to(steps[:, None], x.shape)},
        ):  # fmt: skip
            got = batchnorm.moments(data, **options, **positions)
            assert same_bits(got.mean, want.mean) and same_bits(got.var, want.var), positions
        few = np.array([True, False, True, True, True, False])
        got = batchnorm.moments(data, **options, mask=few)
        assert same_bits(got.mean, batchnorm.moments(x, mask=has & few[:, None, None]).mean)
        weights = rng("w").random((6, 10))
        got = batchnorm.moments(data, **options, weights=weights, mask=steps)
        want_weighted = batchnorm.moments(x, weights=weights, mask=has & steps[:, None])
        assert same_bits(got.mean, want_weighted.mean) and same_bits(got.var, want_weighted.var)
    # The values that a masked array hides may also stand for no data.
    got = batchnorm.moments(np.ma.array(dirty, mask=~steps[:, None] & np.ones_like(has)), nodata=np.nan)
    assert same_bits(got.mean, want.mean)
    for positions, words in (
        ({"mask": np.ones((5, 3), bool)}, r"mask has shape \(5, 3\)"),
        ({"mask": np.ones((6, 10))}, "mask has dtype float64"),
        ({"lengths": np.full(6, 11)}, "lengths is 11"),
        ({"mask": steps, "lengths": lengths}, "mask and lengths"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            batchnorm.moments(dirty, nodata=np.nan, **positions)


def test_nothing_hidden_and_all_hidden():
    x, _ = bands()
    want = batchnorm.moments(x, channel_axis=0)
    for data in (np.ma.array(x), np.ma.array(x, mask=np.zeros_like(x, bool)), np.ma.array(x, mask=False)):
        assert same_bits(ways(data).var, want.var)
    assert same_bits(ways(x, nodata=-1).var, want.var)
    hidden = np.ma.array(x, mask=True)
    assert np.isnan(batchnorm.moments(hidden, channel_axis=0).mean).all()
    total = Moments(channel_axis=0).update(hidden)
    assert total.count == 0 and total.channels is None
    with pytest.raises(ValueError, match="no values that count"):
        dataset_moments(hidden, channel_axis=0)


def test_a_mean_per_column_with_nan():
    x = np.array([[1, 5], [3, -9999]], np.float32)
    for got in (
        batchnorm.moments(x, mask=np.array([[1, 1], [1, 0]], bool)),
        batchnorm.moments(x, nodata=-9999),
        batchnorm.moments(x, nodata=[0, -9999]),
        batchnorm.moments(np.where(x < 0, np.nan, x), nodata=np.nan),
        batchnorm.moments(np.ma.masked_less(x, 0)),
    ):
        assert got.mean.tolist() == [2, 5] and got.var.tolist() == [1, 0]


def test_the_lowest_value_that_nodata_misses_gets_a_warning():
    x, has = bands()
    for dtype, lowest in (
        (np.float32, LOWEST),
        (np.float64, LOWEST),
        (np.float64, np.finfo(float).min),
        (np.int16, -32768),
        (np.float16, -65504),
        (np.float16, -np.inf),  # what a wider no-data value became
        *([(BFLOAT16, -3.3895314e38)] if BFLOAT16 is not None else []),
    ):
        dirty = np.where(has, x.astype(dtype), np.array(lowest, dtype))
        with pytest.warns(
            UserWarning, match=r"nodata=-9999.0 matched nothing in 2 of 3 channels, which hold -[136i]"
        ) as caught:
            batchnorm.moments(dirty, channel_axis=0, nodata=-9999)
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match="matched nothing in 1 of 3"):
            Moments(channel_axis=0, nodata=[lowest, 5, 5]).update(dirty)
        with pytest.warns(UserWarning, match="matched nothing in 2 of 3") as caught:
            dataset_moments(dirty, channel_axis=0, nodata=-9999)
        assert caught[0].filename == __file__
        batchnorm.moments(dirty, channel_axis=0, nodata=lowest)  # what the warning asks for
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batchnorm.moments(x, channel_axis=0, nodata=-9999)
        batchnorm.moments(np.zeros((2, 3), np.uint8), nodata=255)  # 0 is the lowest, and black
        low = np.array([[5, -32768], [6, 7]], np.int16)
        batchnorm.moments(low, nodata=[5, np.nan])  # of integers NaN says that all are data


NOT_HELD = [
    (np.uint8, 256), (np.uint16, -1), (np.int16, np.nan), (np.int16, 0.5), (np.int16, -32769),
    (np.uint8, LOWEST), (np.int16, np.inf), (np.uint8, [0, 0, 300]), (np.uint8, [np.nan] * 3),
    (np.float16, 1e6), (np.float16, LOWEST), (np.float32, 1e39), (BFLOAT16 or np.float32, [0, -3.5e38, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "nodata"), NOT_HELD)
def test_nodata_that_the_dtype_cannot_hold(dtype, nodata):
    # Rounded, it would be another value, or match infinities that were measured.
    x, total = np.ones((3, 2, 2), dtype), Moments(channel_axis=0, nodata=nodata)
    for call in (
        lambda: batchnorm.moments(x, channel_axis=0, nodata=nodata),
        lambda: total.update(x),
        lambda: dataset_moments(x, channel_axis=0, nodata=nodata),
    ):
        with pytest.raises(
            ValueError, match=rf"nodata is .*expected a value that {x.dtype} can hold; drop it"
        ):
            call()
    assert total.channels is None
    batchnorm.moments(x, channel_axis=0)


def test_infinities_of_16_bits_are_values_or_nodata_as_said():
    for dtype in (np.float16, BFLOAT16 or np.float16):
        x = np.array([[1, 3, np.inf], [2, 4, 6]], dtype)
        assert batchnorm.moments(x, channel_axis=0).mean.tolist() == [np.inf, 4]
        assert batchnorm.moments(x, channel_axis=0, nodata=4).mean.tolist() == [np.inf, 4]
        assert batchnorm.moments(x, channel_axis=0, nodata=np.inf).mean.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("nodata", "error", "words"),
    [
        ("-9999", TypeError, r"nodata is '-9999' \(str\), expected a number, or one per channel"),
        (True, TypeError, "nodata is True"),
        ([], TypeError, "nodata is of type list"),
        (1j, TypeError, "nodata is 1j"),
        (np.ma.masked_equal([1, 2, 3], 2), TypeError, r"nodata is a masked array.*use nodata\.data"),
        ([1, 2], ValueError, r"nodata has shape \(2,\), expected a number, or \(3,\), one per channel"),
        (np.ones((3, 1, 1)), ValueError, r"nodata has shape \(3, 1, 1\)"),
    ],
)
def test_bad_nodata(nodata, error, words):
    x, _ = bands()
    calls = (
        lambda: batchnorm.moments(x, channel_axis=0, nodata=nodata),
        lambda: Moments(channel_axis=0, nodata=nodata).update(x),
        lambda: dataset_moments(x, channel_axis=0, nodata=nodata),
    )
    for call in calls:
        with pytest.raises(error, match=words):
            call()
