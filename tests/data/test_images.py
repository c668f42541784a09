"""Integer images: `batch_norm` with floating output and change of layout, and `normalize_images`.

`batch_norm` is held to its own result for float64 input, rounded: without tolerance.
"""

from __future__ import annotations

import functools
import itertools
import re
from fractions import Fraction

import batchnorm
import numpy as np
import pytest

from support.checks import same_bits
from support.exact import SOME
from support.problem import BFLOAT16, DTYPES, rng

FLOAT32, FLOAT64 = DTYPES[:2]
INTEGERS = [np.dtype(t) for t in ("uint8", "int16", "uint16")]
dtypes = pytest.mark.parametrize("dtype", INTEGERS, ids=str)
results = pytest.mark.parametrize("result", DTYPES, ids=str)
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pixels(shape, dtype=np.uint8):
    """Values of the whole range, and both ends of it in every channel where there is room."""
    info = np.iinfo(dtype)
    values = rng(str(shape), str(np.dtype(dtype))).integers(info.min, info.max, shape, endpoint=True)
    values.flat[: values.size // 3 : 5], values.flat[1 : values.size // 3 : 7] = info.min, info.max
    return values.astype(dtype)


def vectors(channels):
    """mean, var, gamma, beta of some images."""
    generator = rng("vectors", channels)
    return (
        generator.uniform(0, 255, channels), generator.uniform(1, 5000, channels),
        generator.standard_normal(channels), generator.standard_normal(channels).astype(np.float32),
    )  # fmt: skip


def through_float64(x, *statistics, result=FLOAT32, **options):
    """float64 to a result's type as documented: to 16 bits by way of float32."""
    y = batchnorm.batch_norm(x.astype(np.float64), *statistics, **options)
    with np.errstate(over="ignore"):
        return y.astype(result) if result in (FLOAT32, FLOAT64) else y.astype(np.float32).astype(result)


def plane_first(x, *statistics, **options):
    """batch_norm from channels last to channels first."""
    return batchnorm.batch_norm(x, *statistics, channel_axis=-1, out_format="channels_first", **options)


# ---- batch_norm --------------------------------------------------------------------------------------------


@pytest.mark.quick
@dtypes
@results
def test_same_layout(dtype, result, isa):
    for shape in SOME:
        x = shape.array(pixels(shape[:3], dtype))
        y = batchnorm.batch_norm(x, *vectors(shape.channels), dtype=result)
        assert y.dtype == result and y.shape == x.shape
        assert y.strides == np.empty_like(x, dtype=result).strides
        assert same_bits(y, through_float64(x, *vectors(shape.channels), result=result)), shape


@dtypes
@results
def test_channels_last_to_first(dtype, result, isa):
    for channels in (1, 2, 3, 4, 5, 17, 65):
        for n, h, w in ((2, 5, 7), (3, 16, 16), (1, 37, 33), (4, 1, 1), (2, 1, 15)):
            x = pixels((n, h, w, channels), dtype)
            y = plane_first(x, *vectors(channels), dtype=result)
            assert y.dtype == result and y.shape == (n, channels, h, w) and y.flags.c_contiguous
            want = through_float64(x, *vectors(channels), channel_axis=-1, result=result)
            assert same_bits(y, np.moveaxis(want, -1, 1)), x.shape


def test_channels_first_to_last_and_every_rank():
    x = pixels((3, 4, 9, 11))
    for name in ("channels_last", "NHWC"):
        y = batchnorm.batch_norm(x, *vectors(4), out_format=name)
        assert y.shape == (3, 9, 11, 4) and y.flags.c_contiguous
        assert same_bits(y, np.moveaxis(through_float64(x, *vectors(4)), 1, -1))
    for shape in ((7, 3), (5, 6, 3), (2, 5, 6, 3), (2, 3, 4, 5, 3)):
        x = pixels(shape)
        want = through_float64(x, *vectors(3), channel_axis=-1)
        assert same_bits(plane_first(x, *vectors(3)), np.moveaxis(want, -1, 1))
        middle = np.moveaxis(x, -1, 0)
        y = batchnorm.batch_norm(middle, *vectors(3), channel_axis=0, out_format="channels_last")
        assert same_bits(y, np.moveaxis(through_float64(middle, *vectors(3), channel_axis=0), 0, -1))
    assert plane_first(np.empty((0, 5, 6, 3), np.uint8), *vectors(3)).shape == (0, 3, 5, 6)


@pytest.mark.parametrize("out_format", ["channels_first", "channels_last"])
def test_threads_and_stores_past_the_caches(out_format, threads, set_tuning):
    axis = 1 if out_format == "channels_first" else -1
    for shape in ((5, 83, 71, 3), (5, 83, 71, 4), (2, 128, 128, 3), (2, 130, 130, 6)):
        x, statistics = pixels(shape), vectors(shape[-1])
        options = {"channel_axis": -1, "out_format": out_format}
        want = np.ascontiguousarray(np.moveaxis(through_float64(x, *statistics, channel_axis=-1), -1, axis))
        for tuning in ("parallel_elements=0", "parallel_elements=0,cached_bytes=0"):
            set_tuning(tuning)
            assert same_bits(batchnorm.batch_norm(x, *statistics, **options), want)
            memory = np.empty(want.size + 16, np.float32)
            for offset in (0, 1, 5):  # planes that begin on cache lines, and such that do not
                out = memory[offset : offset + want.size].reshape(want.shape)
                assert batchnorm.batch_norm(x, *statistics, out=out, **options) is out
                assert same_bits(out, want)


@results
@pytest.mark.parametrize("out_format", [None, "channels_first"])
def test_out_with_gaps(result, out_format):
    # What lies between the written elements stays: whole images, columns, and channels of more.
    x = pixels((2, 9, 8, 3), np.int16)
    options = {"channel_axis": -1, "out_format": out_format}
    want = batchnorm.batch_norm(x, *vectors(3), dtype=result, **options)
    for make in (
        lambda s: (np.zeros((2 * s[0], *s[1:]), result), lambda m: m[::2]),
        lambda s: (np.zeros((*s[:3], s[3] + 1), result), lambda m: m[..., :-1]),
        lambda s: (np.zeros((s[0], s[1] + 2, *s[2:]), result), lambda m: m[:, 1:-1]),
        lambda s: (np.zeros((*s[:2], s[2] + 2, s[3]), result), lambda m: m[:, :, 2:]),
    ):
        memory, view = make(want.shape)
        out = view(memory)
        try:
            assert batchnorm.batch_norm(x, *vectors(3), out=out, **options) is out
        except ValueError as error:  # that cannot be written in one pass
            assert "out has strides" in str(error) and not memory.astype(np.float32).any()
            continue
        assert same_bits(out.copy(), want)
        out[...] = 0
        assert not memory.astype(np.float32).any()


def test_crops_and_channels_of_more(tmp_path):
    np.save(tmp_path / "photos.npy", pixels((3, 40, 50, 4)))
    photos = np.load(tmp_path / "photos.npy", mmap_mode="r")
    crops = {
        "batch": photos[:, 5:33, 7:40], "one": photos[1:2, 5:33, 7:40], "rgb": photos[..., :3],
        "bgr": photos[..., 2::-1], "mirrored": photos[:, :, ::-1], "turned": photos.transpose(0, 2, 1, 3),
        "sparse": photos[:, ::2, ::3], "broadcast": np.broadcast_to(photos[:1], photos.shape),
    }  # fmt: skip
    for name, x in crops.items():
        statistics = vectors(x.shape[-1])
        for out_format, axis in (("channels_first", 1), ("channels_last", -1)):
            y = batchnorm.batch_norm(x, *statistics, channel_axis=-1, out_format=out_format)
            want = np.moveaxis(through_float64(np.array(x), *statistics, channel_axis=-1), -1, axis)
            assert y.flags.c_contiguous or out_format == "channels_last"
            assert same_bits(y.copy(), np.array(want)), (name, out_format)


@dtypes
def test_images_with_masks_and_affines_of_their_own(dtype):
    # Integers take what floats take, and give what the same values as float64 give, rounded.
    x, (mean, var, gamma, beta) = pixels((4, 6, 5, 3), dtype), vectors(3)
    rows = rng("rows").standard_normal((4, 3))
    for options in (
        {"mask": rng("m").random((4, 6, 5)) < 0.6},
        {"mask": rng("m").random((4, 6, 5, 3)) < 0.6},
        {"lengths": np.array([6, 0, 2, 5]), "lengths_axis": 1},
        {"gamma": rows, "beta": rows[::-1].copy()},
        {"gamma": rows, "mask": np.array([True, False, True, True])},
    ):
        options = {"gamma": gamma, "beta": beta, "channel_axis": -1} | options
        y = batchnorm.batch_norm(x, mean, var, **options)
        assert same_bits(y, through_float64(x, mean, var, **options)), options.keys()


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 5, 1, 1), (2, 5), (1, 5, 3)], ids=str)
def test_residuals_of_any_strides(shape):
    axis = shape.index(5)
    x, residual = pixels(shape, np.int16), rng("r").standard_normal(shape).astype(np.float32)
    mean, var, _, _ = vectors(5)
    want = batchnorm.batch_norm(x, mean, var, residual=residual, channel_axis=axis)

    def views(a):
        wide = np.zeros((*a.shape, 3), a.dtype)
        wide[..., 1] = a
        return a, wide[..., 1], np.asfortranarray(a), np.flip(np.flip(a, axis).copy(), axis)

    for image, added in itertools.product(views(x), views(residual)):
        y = batchnorm.batch_norm(image, mean, var, residual=added, channel_axis=axis)
        assert same_bits(np.array(y), want), (image.strides, added.strides)


# ---- normalize_images --------------------------------------------------------------------------------------


def straight(x, mean, std, top):
    """The formula in float64, channels last."""
    return (x.astype(np.float64) / top - np.asarray(mean, np.float64)) / np.asarray(std, np.float64)


@pytest.mark.quick
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
    by_way = 2.0**-24 if result.itemsize == 2 else 0
    bound = np.abs(want) * (ulp / 2 + by_way) + 4e-16 * 1.5 / 0.224 + tiny / 2
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
    x = pixels((2, 13, 17, 3)[4 - rank :])
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
    x = pixels((2, 4, 5, 3))
    want = batchnorm.normalize_images(x, *IMAGENET)
    for kind in (tuple, np.array, lambda s: [np.float64(v) for v in s]):
        assert same_bits(batchnorm.normalize_images(x, *map(kind, IMAGENET)), want)
    grey = batchnorm.normalize_images(x[..., :1], [0], (np.float64(0.5),))
    np.testing.assert_array_equal(grey[:, 0], (x[..., 0] / 127.5).astype(np.float32))


def test_max_value():
    x = np.array([0, 2048, 4095], np.uint16).reshape(1, 3, 1)
    y = batchnorm.normalize_images(x, [0.5], [0.25], max_value=4095)
    np.testing.assert_allclose(y.ravel(), (np.array([0, 2048 / 4095, 1]) - 0.5) * 4, rtol=1e-7)
    for dtype in INTEGERS:
        top = np.full((1, 1, 1), np.iinfo(dtype).max, dtype)
        assert batchnorm.normalize_images(top, [0], [0.5]).item() == 2


IMPOSSIBLE = [
    ({"mean": [127.5], "std": [127.5]}, "mean is 127.5 at channel 0, expected 0 to 1, as uint8 over 255"),
    ({"mean": [0.5], "std": [127.5]}, "std is 127.5 at channel 0, expected more than 0, up to 0.707"),
    ({"mean": [0.5], "std": [0.71]}, "std is 0.71 at channel 0"),
    ({"mean": [1.01], "std": [0.2]}, "mean is 1.01 at channel 0"),
    ({"mean": [300], "std": [50], "max_value": 1}, "mean is 300 at channel 0, expected 0 to 255"),
    ({"dtype": np.int16, "mean": [1.5], "std": [0.5]}, "mean is 1.5 at channel 0, expected -1.0"),
    ({"dtype": np.int16, "mean": [0], "std": [1.5]}, "std is 1.5 at channel 0"),
    ({"dtype": np.uint16, "mean": [30000], "std": [0.2]}, "mean is 30000 at channel 0, expected 0 to 1"),
    ({"dtype": np.uint16, "mean": [2000], "std": [0.2], "max_value": 4095}, "mean is 2000"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), IMPOSSIBLE, ids=[words for _, words in IMPOSSIBLE])
def test_statistics_that_no_image_has_are_refused(arguments, words):
    x = np.ones((1, 2, 2, 1), arguments.pop("dtype", np.uint8))
    out = np.full((1, 1, 2, 2), 7, np.float32)
    with pytest.raises(ValueError, match=rf"{re.escape(words)}.*dataset_moments.*max_value=1") as caught:
        batchnorm.normalize_images(x, **arguments, out=out)
    assert (out == 7).all() and "max_value" in str(caught.value)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_statistics_of_two_pixels(dtype):
    info = np.iinfo(dtype)
    x = np.array([info.min, info.max], dtype).reshape(1, 2, 1)
    found = batchnorm.dataset_moments([x], data_format="NHWC", ddof=1, max_value=info.max)
    y = batchnorm.normalize_images(x, found.mean, found.std)
    np.testing.assert_allclose(y.ravel(), [-(0.5**0.5), 0.5**0.5], rtol=1e-6)


def remedy(words, **names):
    """The value of the expression that an error names behind "use"."""
    return eval(
        re.search(r"(?:use|pass) (batch_norm\(.*\)|x\[.*\])", words)[1],
        {**vars(batchnorm), "numpy": np},
        names,
    )


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("out_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", ["float32", "float16", "longdouble", ">f4", "bfloat16"])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("max_value", [None, 200])
def test_the_remedy_for_floating_images(data_format, out_format, kind, rank, max_value):
    dtype = BFLOAT16 if kind == "bfloat16" else np.dtype(kind)
    if dtype is None:
        pytest.skip("ml_dtypes is not installed")
    whole, options = pixels((2, 5, 6, 3)[4 - rank :]), {"data_format": data_format, "out_format": out_format}
    whole = whole if data_format == "NHWC" else np.moveaxis(whole, -1, -3)
    want = batchnorm.normalize_images(whole, *IMAGENET, max_value=max_value or 1, **options)
    mean, std = IMAGENET
    x = whole.astype(dtype)
    with pytest.raises(TypeError, match=r"x has dtype .*; use batch_norm") as caught:
        batchnorm.normalize_images(x, mean, std, max_value=max_value, **options)
    y = remedy(str(caught.value), x=x, mean=mean, std=std)
    np.testing.assert_allclose(y.astype(float), want, rtol=1e-2 if x.dtype.itemsize == 2 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("out_format", ["NHWC", "NCHW"])
def test_the_remedy_for_masked_images(rank, out_format):
    data, hidden = pixels((2, 5, 6, 3)[4 - rank :]), rng("hidden").random((2, 5, 6, 3)[4 - rank :]) < 0.3
    x, options = np.ma.array(data, mask=hidden), {"out_format": out_format}
    with pytest.raises(TypeError, match=r"x is .*MaskedArray.*pass x\.data for y, and then set") as caught:
        batchnorm.normalize_images(x, *IMAGENET, **options)
    y = batchnorm.normalize_images(x.data, *IMAGENET, **options)
    exec(re.search(r"set (y.*)$", str(caught.value))[1], {"numpy": np}, {"x": x, "y": y})
    to, (mean, std) = (-1, -3)[out_format == "NCHW"], np.array(IMAGENET) * 255
    want = batchnorm.batch_norm(
        np.moveaxis(data, -1, to), mean, std**2, eps=0, channel_axis=to,
        mask=np.moveaxis(~hidden, -1, to),
    )  # fmt: skip
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_the_remedies_for_grey_images(data_format):
    images = pixels((4, 6, 5))
    want = straight(images, 0.5, 0.25, 255)[:, None]
    for x, words in (
        (images[0], r"x has shape \(6, 5\)"),
        (images, r"mean has shape \(1,\).*for grey images"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            batchnorm.normalize_images(x, [0.5], [0.25], data_format=data_format)
        grey = remedy(str(caught.value), x=x)
        y = batchnorm.normalize_images(grey, [0.5], [0.25], data_format=data_format)
        np.testing.assert_allclose(y, want[: len(y)] if x is images else want[0], rtol=1e-6)


def test_pictures_of_pillow():
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    picture, x = image.fromarray(pixels((6, 5, 3))), pixels((6, 5, 3))
    want = batchnorm.normalize_images(x, *IMAGENET)
    assert same_bits(batchnorm.normalize_images(picture, *IMAGENET), want)
    palette = picture.quantize(64)
    with pytest.raises(ValueError, match=r"picture has mode 'P'.*use picture\.convert\('RGB'\)"):
        batchnorm.normalize_images(palette, *IMAGENET)
    assert batchnorm.normalize_images(palette.convert("RGB"), *IMAGENET).shape == want.shape


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_the_remedy_for_a_factor_in_place_of_max_value(dtype):
    x, top = pixels((2, 4, 5, 3), dtype), int(np.iinfo(dtype).max)
    with pytest.raises(ValueError, match=rf"value of {dtype} that becomes 1, so at least 1") as caught:
        batchnorm.normalize_images(x, *IMAGENET, max_value=1 / top)
    value = float(re.search(r"pass max_value=(\S+)$", str(caught.value))[1])
    assert value == top
    want = batchnorm.normalize_images(x, *IMAGENET)
    assert same_bits(batchnorm.normalize_images(x, *IMAGENET, max_value=value), want)


# ---- errors ------------------------------------------------------------------------------------------------

X = pixels((2, 6, 5, 3))
ONE = np.ones((2, 6, 5, 3), np.float32)
PLANES = np.ones((3, 6, 5), np.float32)
T, V = TypeError, ValueError
WRONG = {
    "x float": ({"x": ONE}, T, ["x has dtype float32, expected uint8, int16 or uint16", "batch_norm"]),
    "x bool": ({"x": X > 3}, T, ["x has dtype bool", "pass x.astype of one that holds", "max_value"]),
    "x int64": ({"x": X.astype(int)}, T, ["x has dtype int64", "pass x.astype of one that holds"]),
    "x list": ({"x": [[1]]}, T, ["x is .*list"]),
    "x masked": ({"x": np.ma.array(X)}, T, ["x is .*MaskedArray"]),
    "x grey": ({"x": X[0, :, :, 0]}, V, [r"x has shape \(6, 5\)", r"x\[..., None\]"]),
    "channels first": ({"x": X.transpose(0, 3, 1, 2)}, V, [r"expected \(5,\), .* \(2, 3, 6, 5\) in NHWC"]),
    "x video": ({"x": X[None]}, V, ["expected 4 dimensions, or 3"]),
    "no channels": ({"x": X[..., :0]}, V, ["0 channels"]),
    "mean number": ({"mean": 0.5}, T, [r"mean is 0.5 \(float\)", "a sequence of 3 floats"]),
    "mean number, grey": ({"x": X[..., :1], "mean": 0.5}, T, [r"use \[0.5\]"]),
    "mean of strings": ({"mean": ["a", "b", "c"]}, T, ["mean is 'a'"]),
    "mean bool array": ({"mean": np.ones(3, bool)}, T, ["mean is of dtype bool"]),
    "mean short": ({"mean": [0.5, 0.5]}, V, [r"mean has shape \(2,\), expected \(3,\)"]),
    "mean NaN": ({"mean": [0, 0, np.nan]}, V, ["mean is nan"]),
    "mean huge": ({"mean": [0, 1e308, 0]}, V, ["mean is 1e.308 at channel 1"]),
    "std zero": ({"std": [0.1, 0, 0.1]}, V, ["std is 0 at channel 1, expected more than 0"]),
    "std tiny": ({"std": [0.1, 0.1, 5e-324]}, V, ["std is 4.9.*e-324 at channel 2"]),
    "max_value": ({"max_value": 0}, V, ["max_value is 0", "> 0"]),
    "max_value kind": ({"max_value": "255"}, T, ["max_value is '255'"]),
    "format": ({"data_format": "nhwc"}, V, ["data_format is 'nhwc'", "did you mean 'NHWC'"]),
    "format unknown": ({"out_format": "channels_first"}, V, ["out_format", "'NHWC' or 'NCHW'"]),
    "format number": ({"out_format": 1}, T, ["out_format is 1"]),
    "dtype": ({"dtype": "uint8"}, T, ["dtype is uint8, expected float32"]),
    "std zero, huge unit": ({"std": [0] * 3, "mean": [0] * 3, "max_value": 1e300}, V, ["std is 0 at"]),
    "out shape": ({"out": ONE}, V, [r"out has shape \(2, 6, 5, 3\), expected \(2, 3, 6, 5\)"]),
    "out of one": ({"x": X[0], "out": ONE}, V, [r"shape \(2, 6, 5, 3\), expected \(3, 6, 5\)"]),
    "out list": ({"x": X[0], "out": [1]}, T, [r"out is .*list, expected .* ndarray of shape \(3, 6, 5\)"]),
    "out masked": ({"x": X[0], "out": np.ma.array(PLANES)}, T, [r"a masked array, .* shape \(3, 6, 5\)"]),
    "out read-only": ({"x": X[0], "out": np.broadcast_to(np.float32(1), (3, 6, 5))}, V,
     [r"out is read-only, .* shape \(3, 6, 5\)"]),
    "unknown": ({"scale": 1 / 255}, T, [r"normalize_images\(\) has no argument 'scale'"]),
}  # fmt: skip


def refuse(call, error, words, **arguments):
    with pytest.raises(error) as caught:
        call(**arguments)
    for pattern in words:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"


@pytest.mark.parametrize(("change", "error", "words"), WRONG.values(), ids=WRONG)
def test_normalize_images_refuses(change, error, words):
    arguments = {"x": X, "mean": IMAGENET[0], "std": IMAGENET[1]} | change
    refuse(batchnorm.normalize_images, error, words, **arguments)


M, VAR = np.full(3, 100.0), np.full(3, 50.0)
OPTIONS = {
    "dtype int": ({"dtype": np.int32}, T, ["dtype is int32, expected float32, float64, float16 or bfloat16"]),
    "dtype no type": ({"dtype": "floot"}, T, ["dtype is 'floot'", "float32"]),
    "format unknown": ({"out_format": "channel_first"}, V, ["out_format", "did you mean 'channels_first'"]),
    "format number": ({"out_format": 1}, T, ["out_format is 1"]),
    "format rank": ({"out_format": "NCL"}, V, ["out_format is 'NCL'", "3 dimensions"]),
    "axes and format": ({"channel_axis": (1, 2, 3), "out_format": "NHWC", "mean": X[0] * 1.0,
     "var": X[0] * 1.0}, V, ["drop out_format"]),
    "out int": ({"out": X.copy()}, T, ["out has dtype uint8, expected"]),
    "out and dtype": ({"out": ONE, "dtype": "float16"}, T, ["out has dtype float32", "float16"]),
    "out moved": ({"out": ONE, "out_format": "NCHW"}, V, [r"expected \(2, 3, 6, 5\)"]),
    "int32": ({"x": X.astype(np.int32)}, T, ["x has dtype int32", r"astype\(numpy.float64\)"]),
    "float16 of float32": ({"x": ONE, "dtype": "float16"}, V, ["dtype is float16", "float32"]),
    "planes of float32": ({"x": ONE, "out_format": "NCHW"}, V, ["out_format"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), OPTIONS.values(), ids=OPTIONS)
def test_batch_norm_refuses(change, error, words):
    refuse(batchnorm.batch_norm, error, words, **{"x": X, "mean": M, "var": VAR, "channel_axis": -1} | change)
    assert (ONE == 1).all()


def test_out_overlaps_the_image():
    memory = np.zeros(4 * X.size, np.uint8)
    x, out = memory[: X.size].reshape(X.shape), memory.view(np.float32).reshape(X.shape)
    with pytest.raises(ValueError, match=r"out .*x"):
        batchnorm.batch_norm(x, M, VAR, channel_axis=-1, out=out)


@dtypes
def test_training_on_integers(dtype):
    for call in (functools.partial(batchnorm.batch_norm_train, channel_axis=-1), batchnorm.BatchNorm(3)):
        with pytest.raises(TypeError, match=rf"x has dtype {dtype}.*normalize_images"):
            call(X.astype(dtype))
