"""`dataset_moments`: pieces, files, readers, units, accumulators to go on with, progress."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import signal
import sys

import batchnorm
import numpy as np
import pytest
from batchnorm import DatasetMoments, Moments, dataset_moments

from support import processes
from support.checks import same_bits
from support.problem import rng


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
    rest = tuple(a for a in range(x.ndim) if a not in np.atleast_1d(axis) % x.ndim)
    count, wide = np.prod([x.shape[a] for a in rest]), x.astype(np.longdouble)
    assert type(result) is DatasetMoments and result._fields == ("mean", "var") and len(result) == 2
    assert result.moments.count == result.count == count and (result.counts == count).all()
    np.testing.assert_allclose(result.mean, wide.mean(rest).astype(float), rtol=1e-12)
    np.testing.assert_allclose(result.var, wide.var(rest).astype(float), rtol=1e-12)
    assert same_bits(result.std, np.sqrt(result.var)) and result.counts.shape == result.mean.shape


def same(a, b):
    return all(same_bits(getattr(a, name), getattr(b, name)) for name in ("counts", "mean", "m2"))


def merged(parts):
    return Moments.merged(Moments().update(part) for part in parts)


# ---- pieces ------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_an_array_larger_than_chunk_bytes(tmp_path):
    x = data_set()
    for chunk in (1, 100, 420, 4000, 1 << 20):
        assert_whole(dataset_moments(x, chunk_bytes=chunk), x)
        assert_whole(dataset_moments(x, chunk_bytes=chunk, channel_axis=(1, 3)), x, (1, 3))
    mapped = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=x.shape)
    mapped[...] = x
    assert_whole(dataset_moments(mapped, chunk_bytes=2000), x)


PIECES = [
    ((50, 3, 7, 5), 1, 4200, [(10, 3, 7, 5)] * 5),
    ((50, 3, 7, 5), 1, 4199, [(9, 3, 7, 5)] * 5 + [(5, 3, 7, 5)]),
    ((3, 50, 35), 0, 4200, [(3, 10, 35)] * 5),
    ((1, 3, 50, 35), 1, 4200, [(1, 3, 10, 35)] * 5),
    ((2, 3, 7, 5), -1, 60, [(1, 1, 3, 5)] * 2 * 3 * 2 + [(1, 1, 1, 5)] * 6),
    ((4, 3, 2, 5), (1, -1), 60, [(1, 3, 1, 5)] * 8),
    ((2, 3), 1, 1, [(1, 3)] * 2),
    ((0, 3), 1, 1, [(0, 3)]),
]


@pytest.mark.parametrize(("shape", "axis", "chunk", "pieces"), PIECES)
def test_pieces(shape, axis, chunk, pieces):
    x, read = data_set(shape=shape), []
    if x.size:
        assert_whole(dataset_moments(Slices(x, read), channel_axis=axis, chunk_bytes=chunk), x, axis)
    else:
        assert dataset_moments([np.ones((1, 3)), Slices(x, read)]).count == 1
    assert sorted(read) == sorted(pieces)


@pytest.mark.parametrize("order", "CF")
def test_pieces_are_views_cut_along_the_outermost_axis_in_memory(order):
    x, seen = np.asarray(data_set(), order=order), []

    def see(piece):
        seen.append((piece.shape, np.shares_memory(piece, x)))
        return np.ones(piece.shape, bool)

    dataset_moments(x, chunk_bytes=4200, mask=see)
    assert seen == [((10, 3, 7, 5) if order == "C" else (50, 3, 7, 1), True)] * 5


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda a: dict(enumerate(a)).values()])
def test_iterables(kind):
    x = data_set()
    parts = [x[:7], x[7:8], x[8:8], x[8:40], x[40:]]
    result = dataset_moments(kind(parts))
    assert_whole(result, x)
    assert same(result.moments, merged(parts))


# ---- files and readers -------------------------------------------------------------------------------------


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


def test_read_gets_every_path(tmp_path):
    # As pictures: files of a format that only the reader knows, some of them by names that look like .npy.
    photos = rng("photos").integers(0, 256, (6, 8, 9, 3)).astype(np.uint8)
    names = [tmp_path / name for name in ("a.ppm", "b.png", "c.npy", "d", "e.npy", "f.jpg")]
    for name, photo in zip(names, photos, strict=True):
        name.write_bytes(photo.tobytes())

    def read(path):
        return np.frombuffer(path.read_bytes(), np.uint8).reshape(8, 9, 3)

    def of(batches, **options):
        return dataset_moments(batches, channel_axis=-1, **options).moments

    want = of(photos)
    assert same(of(names, read=read), want)
    assert same(of(names[0], read=read), of(photos[0]))
    assert same(of([*names[:3], *photos[3:]], read=read), want), "arrays need no reader"
    assert same(of(names, read=read, transform=lambda a: a[2:6, 3:]), of(photos[:, 2:6, 3:].copy()))
    assert same(of(zip(names, range(6), strict=True), read=lambda pair: read(pair[0])), want)
    large, seen = {"read": lambda i: np.ones((50, 3, 7)), "chunk_bytes": 1000}, []
    assert dataset_moments(range(2), **large, mask=lambda b: seen.append(1) or b > 0).count == 700
    assert len(seen) > 2, "what a reader returns is cut into pieces as well"
    with pytest.raises(ValueError, match=r"cannot read '.*a\.ppm' as an \.npy file.*pass read="):
        of(names)
    with pytest.raises(TypeError, match=r"what read returned is None, expected an array; use numpy\.asarray"):
        of(names, read=lambda path: None)


class Picture:
    """What readers return that is no array: it makes one, or says where its memory is."""

    def __init__(self, pixels, mode="RGB"):
        self.pixels, self.mode = pixels, mode


class ByArray(Picture):
    def __array__(self, dtype=None, copy=None):
        return np.array(self.pixels, dtype)


class ByInterface(Picture):
    @property
    def __array_interface__(self):
        return self.pixels.__array_interface__


@pytest.mark.parametrize("kind", [ByArray, ByInterface])
def test_what_makes_an_array_is_taken_as_one(kind):
    photos = rng("photos").integers(0, 256, (6, 8, 9, 3)).astype(np.uint8)
    pictures = [kind(photo) for photo in photos]
    want = dataset_moments(photos, channel_axis=-1).moments
    for batches, options in (
        (pictures, {}),
        (range(6), {"read": lambda i: pictures[i]}),
        (range(6), {"transform": lambda i: pictures[i]}),
        (range(6), {"read": lambda i: pictures[i], "transform": lambda p: p.pixels}),
    ):
        assert same(dataset_moments(batches, channel_axis=-1, **options).moments, want)
    for mode in ("P", "PA"):
        with pytest.raises(ValueError, match=rf"mode '{mode}'.*palette.*use picture\.convert\('RGB'\)"):
            dataset_moments([kind(photos[0, ..., 0], mode)], data_format="NHWC")
    with pytest.raises(TypeError, match=r"an element of batches is np\.float32\(3"):
        dataset_moments([np.float32(3)])


def test_pictures_of_pillow(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    photos = rng("photos").integers(0, 256, (4, 8, 9, 3)).astype(np.uint8)
    for mode in ("RGB", "RGBA", "L", "P"):
        for i, photo in enumerate(photos):
            image.fromarray(photo).convert(mode).save(tmp_path / f"{mode}{i}.png")

    def of(mode, **options):
        return dataset_moments(sorted(tmp_path.glob(f"{mode}?.png")), **options)

    for read in (image.open, lambda path: np.asarray(image.open(path))):
        for where in ({"channel_axis": -1}, {"data_format": "NHWC"}):
            assert same(of("RGB", read=read, **where).moments, dataset_moments(photos, **where).moments)
            assert of("RGBA", read=read, **where).mean[3] == 255
        assert of("L", read=read, data_format="NHWC", max_value=255).mean.shape == (1,)
    with pytest.raises(ValueError, match=r"use picture\.convert\('RGB'\)"):
        of("P", read=lambda path: image.open(path).copy(), data_format="NHWC")
    assert of("P", read=lambda path: image.open(path).convert("RGB"), channel_axis=-1).count == 4 * 72
    with pytest.raises(ValueError, match=r"pass read=.* such as PIL\.Image\.open"):
        of("RGB")


class Source:
    """A raster file as rasterio opens it: bands first, and -9999 where there is no data."""

    nodata = -9999

    def __init__(self, bands):
        self.bands = bands

    def read(self, band=None, masked=False):
        bands = self.bands if band is None else self.bands[band - 1]
        return np.ma.masked_equal(bands, self.nodata) if masked else bands


def test_rasters():
    bands = rng("bands").normal(300, 20, (4, 3, 10, 12)).astype(np.float32)
    bands[:, 1, :4] = -9999
    files, valid = [Source(b) for b in bands], bands[:, 1, 4:].astype(np.float64)
    for options in (
        {"read": lambda f: f.read(masked=True)},
        {"read": Source.read, "nodata": Source.nodata},
        {"read": Source.read, "nodata": [0, Source.nodata, 0]},
        {"read": Source.read, "mask": lambda x: x != Source.nodata},
    ):
        for chunk in (1 << 20, 64):
            got = dataset_moments(files, channel_axis=0, chunk_bytes=chunk, **options)
            assert got.counts.tolist() == [480, 288, 480]
            np.testing.assert_allclose(got.mean[1], valid.mean(), rtol=1e-12)
    one = dataset_moments(files, read=lambda f: f.read(2, masked=True), data_format="NHWC")
    assert one.count == 288 and one.mean[0] == got.mean[1]


# What read makes, and the options of the error that are right for it.
UNTOLD = {
    "picture": ((20, 30, 3), {}, "data_format='NHWC'", (3,)),
    "grey": ((20, 30), {}, "data_format='NHWC'", (1,)),
    "grey, last": ((20, 30), {"channel_axis": -1}, "data_format='NHWC'", (1,)),
    "pictures": ((4, 20, 30, 3), {}, "data_format='NHWC'", (3,)),
    "raster": ((3, 20, 30), {}, "channel_axis=0", (3,)),
    "signals": ((4, 20, 30), {}, "channel_axis=1", (20,)),
    "table": ((4, 20), {}, "channel_axis=1", (20,)),
    "table, last": ((4, 20), {"channel_axis": -1}, "channel_axis=1", (20,)),
}


@pytest.mark.parametrize(("shape", "options", "remedy", "channels"), UNTOLD.values(), ids=UNTOLD)
def test_read_and_transform_need_a_word_on_what_may_be_pictures(shape, options, remedy, channels):
    for how in ("read", "transform"):
        make, total = {how: lambda i: np.full(shape, i, np.uint8)}, Moments(**options)
        for more in (options, {"moments": total}):
            with pytest.raises(ValueError, match=re.escape(remedy)) as caught:
                dataset_moments(range(3), **make, **more)
            assert "expected to be told its channels" in str(caught.value) and str(shape) in str(caught.value)
            assert ("channel_axis=0" in str(caught.value)) == (len(shape) > 2)
        name, value = remedy.split("=")
        said = {name: int(value) if value.isdigit() else "NHWC"}
        for more in (said, {"moments": Moments(**said)}):
            assert dataset_moments(range(3), **make, **more).mean.shape == channels
    first = dataset_moments([np.zeros((2, 20, 3))]).moments
    assert dataset_moments([1], read=lambda i: np.ones((2, 20, 3)), moments=first).count == 12, "was told"


def test_one_image_of_a_format():
    photo = rng("photo").integers(0, 256, (8, 9, 3)).astype(np.uint8)
    for data_format, image, grey, mask in (
        ("NHWC", photo, "x[..., None]", (1, 8, 9, 3)),
        ("NCHW", photo.transpose(2, 0, 1), "x[..., None, :, :]", (1, 3, 8, 9)),
    ):
        where, seen = {"data_format": data_format}, []
        want = dataset_moments(image[None], **where).moments
        for chunk in (1 << 20, 30):
            assert same(dataset_moments([image], chunk_bytes=chunk, **where).moments, want)
            assert same(dataset_moments(image, chunk_bytes=chunk, moments=Moments(**where)).moments, want)
            one = dataset_moments(photo[..., 0], chunk_bytes=chunk, **where)
            assert one.mean.tolist() == [photo[..., 0].mean()] and one.count == 72
        dataset_moments(image, mask=lambda x, seen=seen: seen.append(x.shape) or x > 3, **where)
        assert seen == [mask]
        # Nine grey images, or one of so many channels.
        many = rng("many").integers(0, 256, (9, 8, 9)).astype(np.uint8)
        with pytest.raises(ValueError, match="expected 4 dimensions; pass transform") as caught:
            dataset_moments(many, **where)
        found = re.findall(r"transform=lambda x: (x\[.*?\]) for", str(caught.value))
        assert found == ["x[None]", grey]
        for code, count in zip(found, (72, 648), strict=True):
            got = dataset_moments(many, transform=eval(f"lambda x: {code}"), chunk_bytes=100, **where)
            assert got.count == count


def test_transform_makes_arrays_of_anything():
    x = data_set()
    pairs = [(part, i) for i, part in enumerate(np.split(x, 5))]
    assert_whole(dataset_moments(pairs, transform=lambda pair: pair[0]), x)
    assert_whole(dataset_moments(pairs, read=lambda pair: pair, transform=lambda pair: pair[0]), x)


@pytest.mark.parametrize(
    ("shape", "turn", "cut"),
    [
        ((6, 40, 5), lambda x: x[None], 0), ((6, 40, 5), lambda x: np.moveaxis(x, 0, 1), 0),
        ((16, 12), np.transpose, 0), ((8, 30), lambda x: x.reshape(2, -1, 3), 0),
        ((3, 40, 5), lambda x: np.moveaxis(x, 1, 0), 0),
        ((9, 4, 4, 3), lambda x: x.transpose(0, 3, 1, 2), None),
        *(((*n,), lambda x: x.reshape(-1, 3, 4, 4), None) for n in ((9, 48), (9 * 48,))),
    ],
)  # fmt: skip
def test_transform_makes_all_channels_of_each_piece(shape, turn, cut):
    x = rng("turned").standard_normal(shape)
    whole = dataset_moments(x, transform=turn)
    for chunk in (48 * 8, 96 * 8):  # also where pieces are of one length
        if cut is None:
            assert_whole(dataset_moments(x, transform=turn, chunk_bytes=chunk), turn(x))
            continue
        with pytest.raises(
            ValueError, match=rf"cut along axis {cut}, expected all; use a larger chunk_bytes"
        ):
            dataset_moments(x, transform=turn, chunk_bytes=chunk)
    assert_whole(whole, turn(x))


@pytest.mark.parametrize(
    ("shape", "make", "rows"),
    [((10, 3, 8, 8), (1, -1, 8, 8), 1), ((10, 3, 8, 8), (1, -1, 8, 8), 2), ((18, 30), (2, -1, 3), 6)],
)
def test_some_of_the_channels_that_are_as_many_as_those_of_the_piece(shape, make, rows):
    x = rng("as many").standard_normal(shape)
    with pytest.raises(ValueError, match="cut along axis 0, expected all"):
        dataset_moments(x, transform=lambda b: b.reshape(make), chunk_bytes=x[:rows].nbytes)


def test_transform_is_called_once_more_where_data_is_cut():
    x, calls = data_set(), []
    got = dataset_moments(
        [x[:20], x[20:]], transform=lambda b: calls.append(len(b)) or b.transpose(0, 1, 3, 2),
        chunk_bytes=x[:10].nbytes,
    )  # fmt: skip
    assert_whole(got, x)
    assert calls == [10, 1, 10, 10, 10, 10]


def test_transform_sees_whole_samples():
    photo, crop = rng("photo").integers(0, 256, (90, 70, 3)).astype(np.uint8), lambda a: a[10:30, 10:50]
    last, large = {"data_format": "NHWC"}, {"chunk_bytes": 2000}
    want = dataset_moments(crop(photo), **last).moments
    assert same(dataset_moments([0], read=lambda i: photo, transform=crop, **last, **large).moments, want)
    got = dataset_moments([0], read=lambda i: photo, transform=crop, channel_axis=-1, **large)
    assert same(got.moments, want), "what read returned, of any form"
    assert same(dataset_moments(photo, transform=crop, **last, **large).moments, want)
    x = np.asfortranarray(data_set(shape=(10, 3, 8, 8)))
    for chunk in (1, 600, 2000):
        got = dataset_moments(x, transform=lambda a: a.mean((2, 3), np.float64), chunk_bytes=chunk)
        assert_whole(got, x.mean((2, 3), np.float64))
    assert dataset_moments(x[:1], transform=lambda a: a[..., ::8, ::8], **large).count == 1


@pytest.mark.parametrize("moments", [None, Moments(channel_axis=-1)])
def test_statistics_in_units_of_max_value(moments):
    images = np.arange(256, dtype=np.uint8).repeat(6).reshape(-1, 2, 3)
    where = {"channel_axis": -1} if moments is None else {"moments": moments}
    pixels = dataset_moments(images, channel_axis=-1, ddof=1)
    scaled = dataset_moments(images, **where, ddof=1, max_value=255, chunk_bytes=100)
    np.testing.assert_allclose(scaled.mean, np.full(3, 0.5), rtol=1e-15)
    np.testing.assert_allclose(scaled.var, (images / 255).reshape(-1, 3).var(axis=0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(scaled.std, np.sqrt(pixels.var) / 255, rtol=1e-15)
    assert same(scaled.moments, pixels.moments) and scaled.count == pixels.count == 512
    y = batchnorm.normalize_images(images.reshape(1, 512, 1, 3), scaled.mean, scaled.std)
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-7)


@pytest.mark.parametrize(("scale", "top"), [(1e100, 1e160), (1e-100, 1e-160), (1e-100, 1e-200)])
def test_units_whose_square_is_no_float(scale, top):
    got = dataset_moments(np.array([[1.0], [3.0]]) * scale, max_value=top)
    np.testing.assert_allclose(got, [[2 * scale / top], [(scale / top) ** 2]], rtol=1e-14)


def test_mask_of_each_piece():
    x = data_set()
    seen = []
    got = dataset_moments(x, mask=lambda b: seen.append(b.shape) or b > 0, chunk_bytes=4200)
    assert seen == [(10, 3, 7, 5)] * 5 and got.counts.tolist() == (x > 0).sum((0, 2, 3)).tolist()
    np.testing.assert_allclose(got.mean, np.mean(x, (0, 2, 3), np.float64, where=x > 0), rtol=1e-13)
    with pytest.raises(ValueError, match="use counts"):
        _ = got.count
    got = dataset_moments(x, transform=lambda b: b + 1, mask=lambda b: (b > 1)[:, 0])
    want = (x + 1).transpose(1, 0, 2, 3)[:, x[:, 0] > 0].mean(1, np.float64)
    np.testing.assert_allclose(got.mean, want, rtol=1e-12)


def test_a_channel_without_values_has_nan():
    x = np.ma.masked_greater(np.array([[1.0, 9], [3, 9]]), 5)
    got = dataset_moments([x, x])
    np.testing.assert_array_equal(got.mean, [2, np.nan])
    np.testing.assert_array_equal(got.var, [1, np.nan])
    assert got.counts.tolist() == [4, 0]


def test_tables_of_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    x = data_set(shape=(30, 6))
    assert_whole(dataset_moments(pandas.DataFrame(x, columns=list("abcdef")), chunk_bytes=100), x)


def test_tensors_of_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = data_set(shape=(30, 3))
    assert_whole(dataset_moments([torch.from_numpy(x)], chunk_bytes=100), x)
    wide, kept = torch.ones(4, 3).bfloat16(), torch.ones(4, 3, requires_grad=True)
    for tensor, remedy in ((wide, "use x.float"), (kept, "use x.detach")):
        for batches, options in (([tensor], {}), ([(tensor, 0)], {"transform": lambda pair: pair[0]})):
            with pytest.raises(TypeError, match=remedy):
                dataset_moments(batches, **options)


# ---- going on ----------------------------------------------------------------------------------------------


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
    assert same(total, merged(parts[:6]))
    assert same(dataset_moments(parts[6:], moments=total).moments, merged(parts))


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
    assert rest == 0 and (copies == 0 or same(total, Moments.merged([one] * copies)))


# ---- errors ------------------------------------------------------------------------------------------------

BAD_DATA_SETS = [
    (3, {}, TypeError, r"batches is 3 \(int\), expected an array, a path of an .npy file, or an iterable"),
    (b"x.npy", {}, TypeError, "batches is of type bytes, expected an array"),
    ({"a": np.ones((2, 3))}, {}, TypeError, r"batches is of type dict, a mapping; pass its values\(\)"),
    ([[1.0, 2.0]], {}, TypeError,
     "an element of batches is of type list, expected arrays or paths.*read= or transform="),
    ([np.ones((2, 3)), None], {}, TypeError, "an element of batches is None, expected arrays"),
    ([np.ones((2, 3)), np.ones((2, 4))], {}, ValueError, r"channels of shape \(4,\), expected \(3,\)"),
    (np.ones((2, 3), int), {}, TypeError, "x has dtype int64"),
    (np.ones(3), {}, ValueError, "at least 2 dimensions"),
    (np.ones((2, 3)), {"channel_axis": 2}, ValueError, "channel_axis is 2"),
    ([], {}, ValueError, "batches holds no values.*gone through"),
    (np.ones((2, 3)), {"nodata": 1}, ValueError, "batches holds no values.*all is masked or nodata"),
    (np.ones((0, 3)), {}, ValueError, "batches holds no values"),
    (np.ones((2, 3)), {"ddof": 2}, ValueError, "ddof is 2, expected less than 2"),
    ([], {"chunk_bytes": 0}, ValueError, "chunk_bytes is 0, expected an int >= 1"),
    ([], {"chunk_bytes": 1e6}, TypeError, "chunk_bytes is 1000000.0"),
    ([], {"read": 3}, TypeError, r"read is 3 \(int\), expected a function, or None"),
    ([], {"mask": np.ones(3, bool)}, TypeError,
     "mask is of type numpy.ndarray, expected a function, or None"),
    (np.ones((2, 3)), {"transform": lambda b: list(b)}, TypeError, "x is of type list"),
    (np.ones((2, 3)), {"mask": lambda b: ["yes", "no"]}, TypeError, "mask is"),
    ([], {"max_value": 0}, ValueError, "max_value is 0.*, expected a finite number > 0"),
    (np.ones((2, 3), np.uint8), {"max_value": 1 / 255}, ValueError, "value of uint8.*pass max_value=255$"),
    ([], {"moments": 3}, TypeError, r"moments is 3 \(int\), expected a Moments to go on with"),
    ([], {"moments": Moments(), "channel_axis": 1}, TypeError, "has its own; drop channel_axis"),
    ([], {"moments": Moments(), "nodata": 0}, TypeError, "has its own; drop nodata"),
    ([], {"progress": 1}, TypeError, r"progress is 1 \(int\), expected True or False"),
    ([], {"group": object()}, ValueError, "group is .*moments.allreduce"),
    (np.ones((2, 3)), {"num_threads": 0}, ValueError, "num_threads is 0"),
    ([], {"scale": 1 / 255}, TypeError, "max_value=255"),
    ([], {"chunksize": 7}, TypeError, r"dataset_moments\(\) has no argument 'chunksize'"),
]  # fmt: skip


@pytest.mark.parametrize(("batches", "options", "error", "words"), BAD_DATA_SETS)
def test_bad_data_sets(batches, options, error, words):
    with pytest.raises(error, match=words):
        dataset_moments(batches, **options)


class BytesPath:
    def __fspath__(self):
        return b"x"


def test_bad_files(tmp_path):
    np.save(tmp_path / "good.npy", np.ones((2, 3)))
    good = (tmp_path / "good.npy").read_bytes()
    np.savez(tmp_path / "archive.npz", np.ones((2, 3)))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    huge = good.replace(b"(2, 3)", b"(2, 300000000000)").replace(b" " * 12, b" ", 1)
    for name, content in (
        ("archive.npz", None), ("objects.npy", None), ("short.npy", good[:-1]), ("huge.npy", huge),
        ("empty.npy", b""), ("pickle.npy", pickle.dumps([1])),
    ):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read '.*{name}' as an .npy file.*pass read="):
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


# ---- progress ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "files", "list", "generator", "read"])
def test_progress_is_shown_on_stderr(tmp_path, capsys, kind):
    x = data_set()
    np.save(tmp_path / "x.npy", x)
    path, options = tmp_path / "x.npy", {"read": np.load} if kind == "read" else {}
    data = {"array": x, "files": [path], "list": [x[:9], x[9:]], "generator": iter([x]), "read": [path]}[kind]
    assert_whole(dataset_moments(data, progress=True, **options), x)
    out, err = capsys.readouterr()
    assert out == "" and "moments" in err and "21.0" in err


def test_progress_only_where_it_is_seen(capsys, monkeypatch):
    for progress in (None, False):
        dataset_moments(data_set(), progress=progress)
        assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    dataset_moments(data_set())
    assert "moments" in capsys.readouterr().err


def test_without_rich(monkeypatch, capsys):
    for name in [n for n in sys.modules if n == "rich" or n.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    words = r"needs the package rich: pip install 'batchnorm\[progress\]'.*False"
    with pytest.raises(ImportError, match=words):
        dataset_moments(data_set(), progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    dataset_moments(data_set())
    assert capsys.readouterr() == ("", "")


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
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
        masked = batchnorm.dataset_moments(x, chunk_bytes=16 << 20, nodata=7)
        print(whole.count, every_second.count, masked.count, whole.var.tolist())
        try:
            np.empty(200 << 20, np.uint8)
        except MemoryError:
            print("the limit holds")
        """
    assert processes.output(code, OMP_NUM_THREADS="2").split("\n") == [
        f"{2**26} {2**25} {2**26} [0.0, 0.0, 0.0, 0.0]",
        "the limit holds",
    ]
