"""Integer images: exact moments, batch_norm with floating output and change of layout, normalize_images.

`moments` is held to integer arithmetic, `batch_norm` to its own result for float64 input, rounded: both
without tolerance.
"""

from __future__ import annotations

import re
from fractions import Fraction

import batchnorm
import numpy as np
import pytest

from cases import (
    BFLOAT16,
    EDGE_SHAPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    SHARED_SHAPES,
    SOME_SHAPES,
    needs_bfloat16,
    rng,
    same_bits,
)  # fmt: skip

INTEGERS = [np.uint8, np.int16, np.uint16]
RESULTS = [
    *(pytest.param(dtype, id=dtype.name) for dtype in (FLOAT32, FLOAT64, FLOAT16)),
    pytest.param(BFLOAT16, id="bfloat16", marks=needs_bfloat16),
]
dtypes = pytest.mark.parametrize("dtype", INTEGERS, ids=lambda d: d.__name__)
results = pytest.mark.parametrize("result", RESULTS)
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pixels(shape, dtype, seed=0):
    """Values of the whole range, and both ends of it in every channel where there is room."""
    info = np.iinfo(dtype)
    values = rng(str(shape), str(dtype), seed).integers(info.min, info.max, shape, endpoint=True)
    values.flat[: values.size // 3 : 5], values.flat[1 : values.size // 3 : 7] = info.min, info.max
    return values.astype(dtype)


def image(shape, dtype, seed=0):
    """Pixels (outer, channels, inner) in the memory order of a Shape of cases.py."""
    return shape.array(pixels((shape.outer, shape.channels, shape.inner), dtype, seed))


def vectors(channels):
    """mean, var, gamma, beta of some images."""
    generator = rng("vectors", channels)
    return (
        generator.uniform(0, 255, channels), generator.uniform(1, 5000, channels),
        generator.standard_normal(channels), generator.standard_normal(channels).astype(np.float32),
    )  # fmt: skip


def rounded(y, result):
    """float64 to a result's type as documented: to 16 bits by way of float32."""
    with np.errstate(over="ignore"):
        return y.astype(result) if result in (FLOAT32, FLOAT64) else y.astype(np.float32).astype(result)


def through_float64(x, *statistics, result=FLOAT32, **options):
    return rounded(batchnorm.batch_norm(x.astype(np.float64), *statistics, **options), result)


# ---- moments -------------------------------------------------------------------------------------


def exact_moments(x, axis=1, ddof=0):
    """Integer sums, and one rounding of each result."""
    rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(object)
    means, variances = [], []
    for row in rows:
        n, total, squares = len(row), int(row.sum()), int((row * row).sum())
        means.append(float(Fraction(total, n)))
        variances.append(float(Fraction(n * squares - total * total, n * (n - ddof))))
    return np.array(means), np.array(variances)


@dtypes
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_moments_are_correctly_rounded(shape, dtype, isa):
    x = image(shape, dtype)
    for ddof in (0, 1):
        got, (mean, var) = batchnorm.moments(x, ddof=ddof), exact_moments(x, ddof=ddof)
        assert got.mean.dtype == got.var.dtype == np.float64
        assert same_bits(got.mean, mean) and same_bits(got.var, var)


@pytest.mark.parametrize("shape", EDGE_SHAPES, ids=str)
def test_moments_at_every_edge(shape):
    x = image(shape, np.uint8)
    sums = x.astype(np.int64).sum((0, 2)), (x.astype(np.int64) ** 2).sum((0, 2))
    n = shape.count
    got = batchnorm.moments(x)
    assert same_bits(got.mean, sums[0] / n)  # one division of exact numbers
    want = [float(Fraction(n * int(q) - int(s) ** 2, n * n)) for s, q in zip(*sums, strict=True)]
    assert same_bits(got.var, np.array(want))


@dtypes
@pytest.mark.parametrize("shape", SHARED_SHAPES, ids=str)
def test_moments_by_any_number_of_threads(shape, dtype, threads):
    x = image(shape, dtype)
    got = batchnorm.moments(x)
    mean, var = x.astype(np.int64).sum((0, 2)) / shape.count, x.astype(np.longdouble).var((0, 2))
    assert same_bits(got.mean, mean)
    np.testing.assert_allclose(got.var, var.astype(np.float64), rtol=1e-15)


@dtypes
@pytest.mark.parametrize("direction", ["ncs", "nsc"])
def test_moments_of_nearly_constant_images(dtype, direction):
    # The variance is 1 / n - 1 / n^2 beside squares of 2^32, whose sum passes 2^53: in double it is lost.
    n = 3_000_017
    x = np.full((n, 2), np.iinfo(dtype).max, dtype)
    x[n // 2, 0] -= 1
    x = np.asfortranarray(x) if direction == "ncs" else x
    got, top = batchnorm.moments(x), int(np.iinfo(dtype).max)
    assert got.mean.tolist() == [float(Fraction(top * n - 1, n)), top]
    assert got.var.tolist() == [float(Fraction(n - 1, n * n)), 0]


def test_a_mean_next_to_a_tie():
    # total / n is a tie between two doubles, of which the lower one is even, and 2^-53 / n more.
    def tie(n):
        return (n + pow(2**53, -1, n)) * 2**53 // n

    sizes = [n for n in range(4099, 4399, 2) if tie(n) % 4 == 1]
    assert len(sizes) > 50
    for n in sizes:
        x = np.ones((n, 1), np.uint8)
        x[: pow(2**53, -1, n)] = 2
        assert batchnorm.moments(x).mean[0] == float(Fraction(int(x.sum(dtype=np.int64)), n))


@dtypes
def test_moments_of_strided_and_read_only_images(dtype):
    x = pixels((3, 20, 24, 5), dtype)
    want = batchnorm.moments(x[:, 3:15, ::-2, 1:4].copy(), axis=-1)
    x.flags.writeable = False
    got = batchnorm.moments(x[:, 3:15, ::-2, 1:4], axis=-1)
    assert same_bits(got.mean, want.mean) and same_bits(got.var, want.var)


@dtypes
def test_accumulated_moments(dtype):
    x = pixels((40, 9, 11, 3), dtype)
    x[..., 1] = np.iinfo(dtype).max
    x[0, 0, 0, 1] -= 1
    total = batchnorm.Moments(data_format="NHWC")
    for batch in np.array_split(x, 7):
        total.update(batch)
    whole = batchnorm.moments(x, axis=-1)
    assert total.count == 40 * 9 * 11 and same_bits(total.mean, whole.mean)
    np.testing.assert_allclose(total.variance(), whole.var, rtol=2.0**-52)


def test_moments_options():
    x = pixels((4, 5, 6, 3), np.uint8)
    kept = batchnorm.moments(x, data_format="NHWC", keepdims=True)
    assert kept.mean.shape == kept.var.shape == (1, 1, 1, 3)
    picture = batchnorm.moments(x, axis=(1, 2, 3))  # the mean image
    np.testing.assert_array_equal(picture.mean, x.mean(0))
    assert np.isnan(batchnorm.moments(x[:0], axis=-1).var).all()
    with pytest.raises(ValueError, match=r"ddof is 120, expected less than the 120 values"):
        batchnorm.moments(x, axis=-1, ddof=120)


# ---- batch_norm ----------------------------------------------------------------------------------


@dtypes
@results
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_same_layout(shape, dtype, result, isa):
    x = image(shape, dtype)
    y = batchnorm.batch_norm(x, *vectors(shape.channels), dtype=result)
    assert y.dtype == result and y.shape == x.shape
    assert y.strides == np.empty_like(x, dtype=result).strides
    assert same_bits(y, through_float64(x, *vectors(shape.channels), result=result))


@dtypes
@results
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 17, 65])
def test_channels_last_to_first(channels, dtype, result, isa):
    for n, h, w in ((2, 5, 7), (3, 16, 16), (1, 37, 33), (4, 1, 1), (2, 1, 15)):
        x = pixels((n, h, w, channels), dtype)
        y = batchnorm.batch_norm(x, *vectors(channels), axis=-1, dtype=result, out_format="channels_first")
        assert y.dtype == result and y.shape == (n, channels, h, w) and y.flags.c_contiguous
        want = through_float64(x, *vectors(channels), axis=-1, result=result)
        assert same_bits(y, np.moveaxis(want, -1, 1))


@dtypes
def test_channels_first_to_last(dtype):
    x = pixels((3, 4, 9, 11), dtype)
    for name in ("channels_last", "NHWC"):
        y = batchnorm.batch_norm(x, *vectors(4), out_format=name)
        assert y.shape == (3, 9, 11, 4) and y.flags.c_contiguous
        assert same_bits(y, np.moveaxis(through_float64(x, *vectors(4)), 1, -1))


@pytest.mark.parametrize("shape", [(7, 3), (5, 6, 3), (2, 5, 6, 3), (2, 3, 4, 5, 3)], ids=str)
def test_every_rank(shape):
    x = pixels(shape, np.uint8)
    y = batchnorm.batch_norm(x, *vectors(3), axis=-1, out_format="channels_first")
    assert same_bits(y, np.moveaxis(through_float64(x, *vectors(3), axis=-1), -1, 1))
    middle = np.moveaxis(x, -1, 0)
    y = batchnorm.batch_norm(middle, *vectors(3), axis=0, out_format="channels_last")
    assert same_bits(y, np.moveaxis(through_float64(middle, *vectors(3), axis=0), 0, -1))


@pytest.mark.parametrize("channels", [3, 4, 6])
@pytest.mark.parametrize("out_format", ["channels_first", "channels_last"])
def test_any_number_of_threads(channels, out_format, threads):
    x = pixels((5, 83, 71, channels), np.uint8)
    y = batchnorm.batch_norm(x, *vectors(channels), axis=-1, out_format=out_format)
    axis = 1 if out_format == "channels_first" else -1
    assert same_bits(y, np.moveaxis(through_float64(x, *vectors(channels), axis=-1), -1, axis))


@pytest.mark.parametrize("side", [128, 130])  # planes that begin on cache lines, and such that do not
@pytest.mark.parametrize("out_format", ["channels_first", "channels_last"])
def test_past_the_caches(side, out_format, set_tuning):
    x = pixels((2, side, side, 3), np.uint8)
    want = batchnorm.batch_norm(x, *vectors(3), axis=-1, out_format=out_format)
    set_tuning("cached_bytes=0")
    assert same_bits(batchnorm.batch_norm(x, *vectors(3), axis=-1, out_format=out_format), want)
    memory = np.empty(want.size + 16, np.float32)
    for offset in (0, 1, 5):
        out = memory[offset : offset + want.size].reshape(want.shape)
        assert batchnorm.batch_norm(x, *vectors(3), axis=-1, out_format=out_format, out=out) is out
        assert same_bits(out, want)


@results
@pytest.mark.parametrize("out_format", [None, "channels_first"])
def test_out(result, out_format):
    x = pixels((2, 9, 8, 3), np.int16)
    want = batchnorm.batch_norm(x, *vectors(3), axis=-1, dtype=result, out_format=out_format)
    memory = np.zeros((2 * len(want), *want.shape[1:]), result)
    out = memory[::2]
    assert batchnorm.batch_norm(x, *vectors(3), axis=-1, out_format=out_format, out=out) is out
    assert same_bits(out.copy(), want) and not memory[1::2].astype(np.float32).any()


def test_crops_and_channels_of_more(tmp_path):
    np.save(tmp_path / "photos.npy", pixels((3, 40, 50, 4), np.uint8))
    photos = np.load(tmp_path / "photos.npy", mmap_mode="r")
    crops = {
        "batch": photos[:, 5:33, 7:40],
        "one": photos[1:2, 5:33, 7:40],
        "rgb": photos[..., :3],
        "bgr": photos[..., 2::-1],
        "mirrored": photos[:, :, ::-1],
        "turned": photos.transpose(0, 2, 1, 3),
        "sparse": photos[:, ::2, ::3],
        "broadcast": np.broadcast_to(photos[:1], photos.shape),
    }
    for name, x in crops.items():
        c = x.shape[-1]
        for out_format, axis in (("channels_first", 1), ("channels_last", -1)):
            y = batchnorm.batch_norm(x, *vectors(c), axis=-1, out_format=out_format)
            want = np.moveaxis(through_float64(np.array(x), *vectors(c), axis=-1), -1, axis)
            assert y.flags.c_contiguous or out_format == "channels_last"
            assert same_bits(y.copy(), np.array(want)), (name, out_format)


def test_out_of_another_order():
    x = pixels((3, 8, 9, 4), np.uint8)
    want = batchnorm.batch_norm(x, *vectors(4), axis=-1, out_format="channels_first")
    out = np.empty((3, 8, 9, 4), np.float32).transpose(0, 3, 1, 2)
    batchnorm.batch_norm(x, *vectors(4), axis=-1, out_format="channels_first", out=out)
    assert same_bits(out.copy(order="C"), want)


def test_a_constant_channel_gives_beta():
    x = np.broadcast_to(np.array([0, 77, 255], np.uint8), (4, 5, 6, 3)).copy()
    mean, var = batchnorm.moments(x, axis=-1)
    beta = np.array([0.1, -3.7, 1e-9])
    y = batchnorm.batch_norm(x, mean, var, None, beta, axis=-1)
    assert (y == beta.astype(np.float32)).all()


def test_no_images():
    y = batchnorm.batch_norm(
        np.empty((0, 5, 6, 3), np.uint8), *vectors(3), axis=-1, out_format="channels_first"
    )
    assert y.shape == (0, 3, 5, 6) and y.dtype == np.float32


def test_several_channel_axes():
    x = pixels((6, 4, 5, 3), np.uint8)
    mean, var = batchnorm.moments(x, axis=(1, 2, 3))
    y = batchnorm.batch_norm(x, mean, var, axis=(1, 2, 3), dtype=np.float64)
    np.testing.assert_array_equal(y, batchnorm.batch_norm(x.astype(np.float64), mean, var, axis=(1, 2, 3)))


def test_float_input_keeps_type_and_layout():
    x = np.ones((2, 3, 4, 5), np.float32)
    want = batchnorm.batch_norm(x, *vectors(3))
    for options in ({"dtype": "float32"}, {"out_format": "NCHW"}, {"out_format": "channels_first"}):
        assert same_bits(batchnorm.batch_norm(x, *vectors(3), **options), want)


def test_the_layer_trains_on_floats_alone():
    with pytest.raises(TypeError, match=r"x has dtype uint8.*integers have no gradients"):
        batchnorm.BatchNorm()(pixels((4, 3, 5, 5), np.uint8))


# ---- normalize_images ----------------------------------------------------------------------------


def straight(x, mean, std, top):
    """The formula in float64, channels last."""
    return (x.astype(np.float64) / top - np.asarray(mean, np.float64)) / np.asarray(std, np.float64)


@dtypes
@results
def test_formula(dtype, result, isa):
    x = pixels((3, 19, 23, 3), dtype)
    want = np.moveaxis(straight(x, *IMAGENET, np.iinfo(dtype).max), -1, 1)
    y = batchnorm.normalize_images(x, *IMAGENET, dtype=result)
    assert y.shape == (3, 3, 19, 23) and y.dtype == result and y.flags.c_contiguous
    ulp = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}[result.name]
    tiny = {"float16": 2.0**-24}.get(result.name, 0)
    # Half a unit in the last place, float64's own errors, and for 16 bits the step by way of float32.
    bound = (
        np.abs(want) * (ulp / 2 + (2.0**-24 if result.itemsize == 2 else 0)) + 4e-16 * 1.5 / 0.224 + tiny / 2
    )
    assert (np.abs(y.astype(np.float64) - want) <= bound).all()


def test_every_byte_is_correctly_rounded():
    x = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    exact = [
        [float((Fraction(k, 255) - Fraction(m)) / Fraction(s)) for m, s in zip(*IMAGENET, strict=True)]
        for k in range(256)
    ]
    y = batchnorm.normalize_images(x, *IMAGENET)
    np.testing.assert_array_equal(y, np.array(exact).astype(np.float32).reshape(16, 16, 3).transpose(2, 0, 1))


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("out_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("rank", [3, 4])
def test_formats(data_format, out_format, rank):
    x = pixels((2, 13, 17, 3)[4 - rank :], np.uint8)
    want = straight(x, *IMAGENET, 255).astype(np.float32)
    given = x if data_format == "NHWC" else np.ascontiguousarray(np.moveaxis(x, -1, -3))
    want = want if out_format == "NHWC" else np.moveaxis(want, -1, -3)
    options = {"data_format": data_format, "out_format": out_format}
    y = batchnorm.normalize_images(given, *IMAGENET, **options)
    np.testing.assert_allclose(y, want, rtol=2.0**-23, atol=1e-15)
    assert y.flags.c_contiguous
    out = np.empty_like(y)
    assert batchnorm.normalize_images(given, *IMAGENET, out=out, **options) is out
    assert same_bits(out, y)


def test_statistics_may_be_lists_tuples_and_arrays():
    x = pixels((2, 4, 5, 3), np.uint8)
    want = batchnorm.normalize_images(x, *IMAGENET)
    for kind in (tuple, np.array):
        assert same_bits(batchnorm.normalize_images(x, *map(kind, IMAGENET)), want)
    grey = batchnorm.normalize_images(x[..., :1], [0], (np.float64(1),))
    np.testing.assert_array_equal(grey[:, 0], (x[..., 0] / 255.0).astype(np.float32))


def test_max_value():
    x = np.array([0, 2048, 4095], np.uint16).reshape(1, 3, 1)
    y = batchnorm.normalize_images(x, [0.5], [0.25], max_value=4095)
    np.testing.assert_allclose(y.ravel(), (np.array([0, 2048 / 4095, 1]) - 0.5) * 4, rtol=1e-7)
    for dtype in INTEGERS:
        top = np.full((1, 1, 1), np.iinfo(dtype).max, dtype)
        assert batchnorm.normalize_images(top, [0], [1]).item() == 1


def test_num_threads_and_moments_belong_together():
    x = pixels((4, 32, 32, 3), np.uint8)
    mean, var = batchnorm.moments(x, axis=-1)
    y = batchnorm.normalize_images(x, mean / 255, np.sqrt(var) / 255, num_threads=2)
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(y.std((0, 2, 3)), 1, rtol=1e-6)


# ---- errors --------------------------------------------------------------------------------------

X = pixels((2, 6, 5, 3), np.uint8)
M, V = np.full(3, 100.0), np.full(3, 50.0)
ONE = np.ones((2, 6, 5, 3), np.float32)


def refuses(call, error, *match):
    before = X.copy()
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for pattern in match:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"
    assert same_bits(X, before)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint32, np.int32, np.int64, np.uint64, bool], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("function", ["batch_norm", "moments", "normalize_images"])
def test_other_integers_are_errors(function, dtype):
    calls = {
        "batch_norm": lambda x: batchnorm.batch_norm(x, M, V, axis=-1),
        "moments": lambda x: batchnorm.moments(x, axis=-1),
        "normalize_images": lambda x: batchnorm.normalize_images(x, *IMAGENET),
    }
    expected = "expected float32, .*uint8, int16 or uint16 of images; use x.astype"
    refuses(lambda: calls[function](X.astype(dtype)), TypeError, rf"^x has dtype {np.dtype(dtype)}", expected)


def test_foreign_byte_order():
    x = X.astype(np.dtype(np.uint16).newbyteorder())
    for call in (lambda: batchnorm.moments(x), lambda: batchnorm.batch_norm(x, M, V, axis=-1)):
        refuses(call, TypeError, r"x has dtype .u2 of foreign byte order", r"x.astype\('uint16'\)")


@dtypes
def test_training_on_integers(dtype):
    x, y = X.astype(dtype), np.ones(X.shape, np.float32)
    for call in (
        lambda: batchnorm.batch_norm_train(x, axis=-1),
        lambda: batchnorm.batch_norm_backward(y, x, M, V, axis=-1),
        lambda: batchnorm.activation_mask_bytes(x, axis=-1),
    ):
        refuses(
            call, TypeError, rf"x has dtype {np.dtype(dtype)}", "no gradients", "normalize_images", "astype"
        )


ERRORS = {
    "relu": (
        {"activation": "relu"},
        ValueError,
        ["activation is given and x has dtype uint8", "drop it or use"],
    ),
    "slope": ({"slope": 0.1}, ValueError, ["slope is given", "drop it"]),
    "residual": ({"residual": ONE}, ValueError, ["residual is given", "expected None"]),
    "mask": ({"activation_mask": np.zeros(9, np.uint8)}, ValueError, ["activation_mask is given"]),
    "dtype int": (
        {"dtype": np.int32},
        TypeError,
        ["dtype is int32, expected float32, float64, float16 or bfloat16"],
    ),
    "dtype complex": ({"dtype": "complex64"}, TypeError, ["dtype is complex64"]),
    "dtype big-endian": ({"dtype": ">f4"}, TypeError, ["dtype is >f4"]),
    "dtype no type": ({"dtype": "floot"}, TypeError, ["dtype is 'floot'", "float32"]),
    "dtype number": ({"dtype": 3}, TypeError, ["dtype is 3"]),
    "format unknown": (
        {"out_format": "channel_first"},
        ValueError,
        ["out_format", "did you mean 'channels_first'"],
    ),
    "format number": ({"out_format": 1}, TypeError, ["out_format is 1", "None or one of NC"]),
    "format rank": (
        {"out_format": "NCL"},
        ValueError,
        ["out_format is 'NCL'", "3 dimensions", r"\(2, 6, 5, 3\)"],
    ),
    "axes and format": (
        {"axis": (1, 2, 3), "out_format": "NHWC"},
        ValueError,
        ["several axes", "drop out_format"],
    ),
    "out list": ({"out": [1.0]}, TypeError, ["out is .*list", "writable float32 array"]),
    "out int": ({"out": X.copy()}, TypeError, ["out has dtype uint8, expected float32"]),
    "out and dtype": (
        {"out": ONE, "dtype": "float16"},
        TypeError,
        ["out has dtype float32 and dtype is float16", "drop"],
    ),
    "out shape": (
        {"out": ONE[:1]},
        ValueError,
        [r"out has shape \(1, 6, 5, 3\), expected \(2, 6, 5, 3\) as x has"],
    ),
    "out moved": (
        {"out": ONE, "out_format": "NCHW"},
        ValueError,
        [r"expected \(2, 3, 6, 5\)", "channels on axis 1"],
    ),
    "out strides": (
        {"out": np.ones((4, 12, 10, 3), np.float32)[::2, ::2, ::2]},
        ValueError,
        ["out has strides", "contiguous array"],
    ),
    "mean missing": ({"mean": None}, TypeError, ["mean is None"]),
    "mean short": ({"mean": M[:2]}, ValueError, [r"mean has shape \(2,\), expected \(3,\)"]),
    "mean NaN": ({"mean": np.array([0, np.nan, 0])}, ValueError, ["mean is nan at channel 1"]),
    "var negative": ({"var": -V}, ValueError, ["var is -50.0 at channel 0, expected values >= 0"]),
    "gamma list": ({"gamma": [1, 2, 3]}, TypeError, ["gamma is .*list"]),
    "eps": ({"eps": -1.0}, ValueError, ["eps is -1.0"]),
    "threads": ({"num_threads": 0}, ValueError, ["num_threads is 0"]),
    "axis": ({"axis": 4}, ValueError, ["axis is 4"]),
    "axis and format": ({"data_format": "NHWC"}, TypeError, ["axis", "data_format", "same thing"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_batch_norm_refuses(name):
    change, error, match = ERRORS[name]
    arguments = {"x": X, "mean": M, "var": V, "axis": -1} | change
    before = ONE.copy()
    refuses(lambda: batchnorm.batch_norm(**arguments), error, *match)
    assert same_bits(ONE, before)


def test_out_overlaps_the_image():
    memory = np.zeros(4 * X.size, np.uint8)
    x, out = memory[: X.size].reshape(X.shape), memory.view(np.float32).reshape(X.shape)
    refuses(lambda: batchnorm.batch_norm(x, M, V, axis=-1, out=out), ValueError, "out overlaps x", "separate")


def test_floats_change_neither_type_nor_layout():
    call = batchnorm.batch_norm
    refuses(
        lambda: call(ONE, M, V, axis=-1, dtype="float16"),
        ValueError,
        "dtype is float16",
        "float32",
        "drop dtype=",
    )
    refuses(
        lambda: call(ONE, M, V, axis=-1, out_format="NCHW"),
        ValueError,
        "out_format",
        "axis -1",
        "drop out_format=",
    )
    refuses(lambda: call(ONE, M, V, axis=-1, dtype="floot"), TypeError, "dtype is 'floot'")


IMAGE_ERRORS = {
    "x float": (
        {"x": ONE},
        TypeError,
        ["x has dtype float32, expected uint8, int16 or uint16", "batch_norm"],
    ),
    "x list": ({"x": [[1]]}, TypeError, ["x is .*list"]),
    "x grey": ({"x": X[0, :, :, 0]}, ValueError, [r"x has shape \(6, 5\)", r"x\[..., None\]"]),
    "x video": ({"x": X[None]}, ValueError, ["expected 4 dimensions, or 3"]),
    "no channels": ({"x": X[..., :0]}, ValueError, ["0 channels"]),
    "mean number": ({"mean": 0.5}, TypeError, ["mean is 0.5", "a sequence of 3 floats"]),
    "mean number, grey": ({"x": X[..., :1], "mean": 0.5}, TypeError, [r"use \[0.5\]"]),
    "mean of strings": ({"mean": ["a", "b", "c"]}, TypeError, ["mean is 'a'", "3 floats"]),
    "mean of bools": ({"mean": [True, False, True]}, TypeError, ["mean is True"]),
    "mean short": ({"mean": [0.5, 0.5]}, ValueError, [r"mean has shape \(2,\), expected \(3,\)"]),
    "mean integers": ({"mean": np.arange(3)}, TypeError, ["mean has dtype int64"]),
    "mean NaN": ({"mean": [0, 0, np.nan]}, ValueError, ["mean is nan at channel 2"]),
    "mean huge": ({"mean": [0, 1e308, 0]}, ValueError, ["mean is 1e.308 at channel 1", "float64"]),
    "std zero": ({"std": [1, 0, 1]}, ValueError, ["std is 0.0 at channel 1, expected values > 0"]),
    "std tiny": ({"std": [1, 1, 5e-324]}, ValueError, ["std is 5e-324 at channel 2", "float64"]),
    "max_value": ({"max_value": 0}, ValueError, ["max_value is 0.0", "> 0"]),
    "max_value kind": ({"max_value": "255"}, TypeError, ["max_value is '255'"]),
    "format": ({"data_format": "nhwc"}, ValueError, ["data_format is 'nhwc'", "did you mean 'NHWC'"]),
    "format unknown": ({"out_format": "channels_first"}, ValueError, ["out_format", "'NHWC' or 'NCHW'"]),
    "format number": ({"out_format": 1}, TypeError, ["out_format is 1"]),
    "dtype": ({"dtype": "uint8"}, TypeError, ["dtype is uint8, expected float32"]),
    "out shape": (
        {"out": ONE},
        ValueError,
        [r"out has shape \(2, 6, 5, 3\), expected \(2, 3, 6, 5\), NCHW of x"],
    ),
    "out list": ({"out": [0]}, TypeError, ["out is .*list"]),
    "threads": ({"num_threads": 1.5}, TypeError, ["num_threads is 1.5"]),
    "unknown": ({"scale": 1 / 255}, TypeError, [r"normalize_images\(\) has no argument 'scale'"]),
}


@pytest.mark.parametrize("name", IMAGE_ERRORS)
def test_normalize_images_refuses(name):
    change, error, match = IMAGE_ERRORS[name]
    arguments = {"x": X, "mean": IMAGENET[0], "std": IMAGENET[1]} | change
    refuses(lambda: batchnorm.normalize_images(**arguments), error, *match)
