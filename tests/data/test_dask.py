"""Dask arrays and bags: statistics block by block, functions of each block, schedulers, errors."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import runpy
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import batchnorm
import hypothesis
import numpy as np
import pytest
from batchnorm import Moments, batch_norm, dataset_moments, moments, normalize_images
from hypothesis import strategies as st

from support import dask_workers
from support.checks import same_bits
from support.problem import DTYPES, rng

dask = pytest.importorskip("dask", reason="dask is not installed (extra dask)")
da = pytest.importorskip("dask.array", reason="dask is not installed (extra dask)")
db = pytest.importorskip("dask.bag", reason="dask is not installed (extra dask)")
import batchnorm.dask  # noqa: E402

INTEGERS = [np.dtype(t) for t in ("uint8", "int16", "uint16")]


@pytest.fixture(autouse=True)
def _in_this_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def data(shape, dtype=np.float32, seed=0):
    x = rng("dask", shape, str(dtype), seed).normal(20, 7, shape)
    return np.abs(x).astype(dtype) if np.dtype(dtype).kind in "iu" else x.astype(dtype)


def blocks(x):
    """The blocks of a dask array, in the order of their place."""
    return [x.blocks[place].compute() for place in np.ndindex(x.numblocks)]


def by_hand(x, where):
    """What merging the blocks of each channel block gives, side by side."""
    axes = [a % x.ndim for a in np.atleast_1d(Moments(**where).channel_axis)]
    found = {name: np.empty([x.numblocks[a] for a in axes], object) for name in ("counts", "mean", "m2")}
    for place in np.ndindex(found["mean"].shape):
        key = tuple(place[axes.index(a)] if a in axes else slice(None) for a in range(x.ndim))
        part = Moments.merged(Moments(**where).update(b) for b in blocks(x.blocks[key]))
        for name, values in found.items():
            values[place] = getattr(part, name)
    return SimpleNamespace(**{name: np.block(values.tolist()) for name, values in found.items()})


def same(a, b):
    return all(same_bits(getattr(a, name), getattr(b, name)) for name in ("counts", "mean", "m2"))


def bits(*arrays):
    return b"".join(np.asarray(a).tobytes() for a in arrays)


# ---- statistics --------------------------------------------------------------------------------------------


WHERE = [
    ({}, (10, 6, 8, 5), (3, 6, 8, 5)), ({}, (10, 6, 8, 5), (3, 4, 8, 2)), ({}, (11, 6), (4, 5)),
    ({"channel_axis": -1}, (10, 8, 6), (4, 3, 2)), ({"channel_axis": 0}, (6, 9), (5, 2)),
    ({"data_format": "NHWC"}, (6, 8, 5, 4), (5, 8, 5, 3)),
    ({"channel_axis": (1, 3)}, (10, 6, 8, 5), (3, 4, 5, 2)),
    ({"channel_axis": (-1, -2)}, (10, 6, 5), (3, 4, 2)), ({}, (1, 1), (1, 1)),
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("where", "shape", "chunks"), WHERE, ids=str)
def test_blocks_are_merged_as_batches_are(where, shape, chunks):
    x = data(shape)
    lazy = da.from_array(x, chunks=chunks)
    got, whole = Moments(**where).update(lazy), Moments(**where).update(x)
    assert same(got, by_hand(lazy, where)) and repr(got) == repr(whole)
    np.testing.assert_allclose(got.mean, whole.mean, rtol=1e-14)
    pair = moments(lazy, **where)
    assert type(pair) is batchnorm.MeanVar and type(pair.mean) is np.ndarray
    assert same_bits(pair.mean, got.mean) and same_bits(pair.var, got.var)
    result = dataset_moments(lazy, **where)
    assert type(result) is batchnorm.DatasetMoments and same(result.moments, got)
    assert got.update(x).count == 2 * whole.count


@pytest.mark.parametrize("dtype", [*DTYPES, *INTEGERS], ids=str)
def test_dtypes(dtype):
    x = data((9, 4, 6), dtype)
    for chunks in ((2, 4, 6), (9, 3, 2)):
        got = moments(da.from_array(x, chunks=chunks))
        np.testing.assert_allclose(got, moments(x), rtol=1e-13)


@hypothesis.given(st.data())
def test_any_blocks_are_as_the_whole(draw):
    shape = draw.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    axis = draw.draw(st.sampled_from([a for a in range(-len(shape), len(shape)) if a]))
    chunks = [draw.draw(st.integers(1, n)) for n in shape]
    x = data(shape, draw.draw(st.sampled_from([*DTYPES, *INTEGERS])))
    lazy, channel = da.from_array(x, chunks=chunks), axis % len(shape)
    options, generator = {"channel_axis": axis}, rng("any", *shape)
    if draw.draw(st.booleans()):
        covered = [n if draw.draw(st.booleans()) else 1 for n in shape]
        options["mask"] = generator.random(covered) < 0.6
    if draw.draw(st.booleans()):
        options["weights"] = generator.random([n for a, n in enumerate(shape) if a != channel])
    nodata = float(x.flat[0]) if draw.draw(st.booleans()) else None
    own = {n: da.from_array(v, chunks=2) if n != "channel_axis" else v for n, v in options.items()}
    want = moments(x, nodata=nodata, **options)
    for kind in (options, own):
        got = moments(lazy, nodata=nodata, **kind)
        np.testing.assert_allclose(got.mean, want.mean, rtol=1e-12)
        np.testing.assert_allclose(got.var, want.var, rtol=1e-12, atol=1e-12)
    mean, var = generator.random((2, shape[channel]))
    options.pop("weights", None)
    y = batchnorm.dask.batch_norm(lazy, mean, var, **options).compute()
    assert same_bits(y, batch_norm(x, mean, var, **options))


def test_ddof_and_keepdims():
    x = data((9, 4, 6))
    lazy = da.from_array(x, chunks=(2, 3, 6))
    got = moments(lazy, ddof=1, keepdims=True)
    assert got.mean.shape == got.var.shape == (1, 4, 1)
    np.testing.assert_allclose(got.var, x.var((0, 2), ddof=1, keepdims=True, dtype=float), rtol=1e-12)
    assert same_bits(dataset_moments(lazy, ddof=1).var, got.var.ravel())
    assert moments(lazy, channel_axis=(1, 2), keepdims=True).mean.shape == (1, 4, 6)


@pytest.mark.quick
def test_masked_values_of_any_kind():
    x, generator = data((9, 4, 6)), rng("masks")
    lazy = da.from_array(x, chunks=(2, 3, 4))
    for shape in ((9, 4, 6), (9, 1, 6), (1, 4, 1), (9, 6), (9,), (1, 6)):
        mask = generator.random(shape) < 0.7
        want = Moments().update(x, mask=mask)
        for given in (mask, da.from_array(mask, chunks=2)):
            got = moments(lazy, mask=given)
            np.testing.assert_allclose(got, (want.mean, want.var), rtol=1e-12)
            assert same_bits(dataset_moments(lazy, mask=given).counts, want.counts)
        if len(shape) < 3 or shape[1] == 1:
            weights = generator.random(shape).astype(np.float32)
            want = Moments().update(x, weights=weights)
            got = Moments().update(lazy, weights=da.from_array(weights, chunks=3))
            np.testing.assert_allclose((got.counts, got.var), (want.counts, want.var), rtol=1e-6)
    masked = da.map_blocks(lambda b: np.ma.masked_less(b, 15), lazy, dtype=x.dtype)
    want = Moments().update(np.ma.masked_less(x, 15))
    assert same_bits(Moments().update(masked).counts, want.counts)
    np.testing.assert_allclose(dataset_moments(masked).var, want.var, rtol=1e-12)


def test_lengths():
    x, lengths = data((9, 4, 6)), np.array([6, 0, 3, 1, 5, 6, 2, 2, 4])
    want = Moments().update(x, lengths=lengths)
    lazy = da.from_array(x, chunks=(2, 3, 6))
    for given, axis in itertools.product(
        (lengths, da.from_array(lengths, chunks=4), lengths.tolist()), (2, -1, np.int64(2), None)
    ):
        got = Moments().update(lazy, lengths=given, lengths_axis=axis)
        assert same_bits(got.counts, want.counts)
        np.testing.assert_allclose(got.var, want.var, rtol=1e-12)


NODATA = [
    (-1, np.float32),
    (np.nan, np.float64),
    ([0, -1, np.nan, 3], np.float32),
    ([1, np.nan, np.nan, 2], np.int16),
]


@pytest.mark.parametrize(("nodata", "dtype"), NODATA, ids=str)
def test_nodata(nodata, dtype):
    x = rng("nodata").integers(-1, 4, (9, 4, 6)).astype(dtype)
    if np.dtype(dtype).kind == "f":
        x[::2, :, 1] = np.nan
        x[:, 3] = 1
    want = Moments(nodata=nodata).update(x)
    for chunks in ((2, 4, 6), (2, 1, 6), (9, 2, 3)):
        lazy = da.from_array(x, chunks=chunks)
        for got in (Moments(nodata=nodata).update(lazy), dataset_moments(lazy, nodata=nodata).moments):
            assert same_bits(got.counts, want.counts) and repr(got) == repr(want)
            np.testing.assert_allclose(got.mean, want.mean, rtol=1e-13)


def test_no_hint_of_nodata_is_given_of_blocks():
    x = np.ones((4, 2), np.float32)
    x[0], x[3] = -9999, np.finfo(np.float32).min
    lazy = da.from_array(x, chunks=2)
    with pytest.warns(UserWarning, match="nodata=-9999.0 matched nothing in 2 of 2 channels"):
        moments(x[2:], nodata=-9999)
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):  # warnings are errors
            moments(lazy, nodata=-9999)
            dataset_moments(lazy, nodata=-9999, mask=lambda b: b < 3)


def test_blocks_of_unknown_length():
    x = data((9, 4, 6))
    keep = x[:, 0, 0] > 18
    lazy = da.from_array(x, chunks=(2, 3, 6))
    some = lazy[lazy[:, 0, 0] > 18]
    assert np.isnan(some.shape[0])
    want = Moments.merged(Moments().update(b) for b in blocks(some.rechunk({1: -1})))
    assert same(Moments().update(some), want) and want.counts[0] == keep.sum() * 6
    mask = some > 20
    assert same_bits(Moments().update(some, mask=mask).counts, (x[keep] > 20).sum((0, 2)).astype(float))
    y = batchnorm.dask.batch_norm(some, want.mean, want.var)
    assert same_bits(y.compute(), batch_norm(x[keep], want.mean, want.var))


def test_operands_of_unknown_length_are_cut_as_x_is():
    x = da.from_array(np.arange(24.0).reshape(6, 4), chunks=(3, 4))
    every, ends = (da.from_array(np.array(m, bool), chunks=3) for m in ([1] * 6, [1, 0, 0, 0, 0, 1]))
    mask = da.from_array(np.array([0, 1, 1, 1, 1, 1], bool), chunks=3)
    want = Moments().update(x.compute(), mask=mask.compute())
    for channels in ((4,), (2, 2), (1, 3)):
        some = x.rechunk({1: channels})[every]
        assert same(Moments().update(some, mask=mask[every]), want)
        assert Moments().update(some, mask=(x > 3)[every].rechunk({1: (3, 1)})).counts.tolist() == [5] * 4
    some = x[every]
    for bad in ({"mask": mask[ends]}, {"mask": (x > 3)[ends]}, {"weights": mask[ends].astype(float)}):
        (name,) = bad
        with pytest.raises(ValueError, match=rf"^block \((0|1), 0\) .*: {name} has length 1 along axis 0"):
            Moments().update(some, **bad)
    for bad in ({"mask": mask[ends]}, {"gamma": x[ends]}, {"residual": x[ends]}):
        with pytest.raises(ValueError, match=rf"^block .*: {next(iter(bad))} has length 1 along axis 0"):
            batchnorm.dask.batch_norm(some, np.zeros(4), np.ones(4), **bad).compute()
    with pytest.raises(ValueError, match=r"^mask has 3 blocks of unknown length along axis 0 of x"):
        moments(some, mask=mask.rechunk(2)[da.ones(6, chunks=2, dtype=bool)])
    other = mask[every]
    with pytest.raises(ValueError, match=r"expected length 6; call mask\.compute_chunk_sizes"):
        moments(x, mask=other)
    assert same(Moments().update(x, mask=other.compute_chunk_sizes()), want)
    with pytest.raises(ValueError, match=r"mask has shape .6,., and length 6 along axis 0 of x"):
        moments(some, mask=mask)
    some.compute_chunk_sizes()
    assert same(Moments().update(some, mask=mask), want)


def test_blocks_that_are_not_as_their_chunks_say():
    x = da.from_array(data((4, 8, 8, 3)), chunks=(2, 8, 8, 1))
    bad = x.map_blocks(lambda b: b.transpose(0, 3, 1, 2), dtype=x.dtype, meta=x._meta)
    with pytest.raises(
        ValueError, match=r"^block .* of shape \(2, 1, 8, 8\): expected 8 along axis 1 as its"
    ):
        moments(bad)
    doubled = da.from_array(data((8, 4)), chunks=(4, 2)).map_blocks(np.repeat, 2, axis=1, dtype=x.dtype)
    with pytest.raises(ValueError, match="chunks say; pass chunks= to the map_blocks"):
        batchnorm.dask.batch_norm(doubled, np.zeros(4), np.ones(4)).compute()


def test_empty_blocks_and_nothing_that_counts():
    x = data((9, 4))
    lazy = da.from_array(x, chunks=((0, 4, 0, 5), (2, 2)))
    assert 0 in lazy.chunks[0]
    np.testing.assert_allclose(moments(lazy), moments(x), rtol=1e-13)
    for none in (da.zeros((0, 4)), da.zeros((5, 4), chunks=(2, 3))):
        got = moments(none, mask=np.zeros(len(none), bool), keepdims=True)
        assert got.mean.shape == (1, 4) and np.isnan(got).all()
        with pytest.raises(ValueError, match="batches holds no values that count"):
            dataset_moments(none, mask=np.zeros(len(none), bool))
    empty = da.from_array(x, chunks=((9,), (0, 3, 0, 1)))
    assert same(Moments().update(empty), Moments().update(da.from_array(x, chunks=((9,), (3, 1)))))
    assert same(dataset_moments(empty, nodata=[1, 2, 3, 4]).moments, Moments().update(x[:, :]))
    y = batchnorm.dask.batch_norm(empty, np.zeros(4), np.ones(4))
    assert same_bits(y.compute(), batch_norm(x, np.zeros(4), np.ones(4)))
    one = x[:1, :, None]
    lazy = da.from_array(one, chunks=((0, 1, 0), (3, 1), (1,)))
    options = {"gamma": one[:, :, 0], "residual": one, "mask": np.ones(1, bool)}
    y = batchnorm.dask.batch_norm(lazy, np.zeros(4), np.ones(4), **options)
    assert same_bits(y.compute(), batch_norm(one, np.zeros(4), np.ones(4), **options))
    assert same(Moments().update(lazy, weights=np.full(1, 2)), Moments().update(one, weights=np.full(1, 2)))
    half = np.repeat([[True, True, False, False]], 9, axis=0)  # all of a block of channels
    got = Moments().update(da.from_array(x, chunks=(4, 2)), mask=half)
    assert got.counts.tolist() == [9, 9, 0, 0]
    np.testing.assert_array_equal(np.isnan(got.mean), [False, False, True, True])


# ---- the same bits -----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_bits_depend_on_neither_scheduler_nor_order_nor_tree():
    x = data((48, 5, 16), seed=1) + np.float32(1e4)
    lazy = da.from_array(x, chunks=(4, 3, 16))
    want = Moments().update(lazy)
    for scheduler, workers, fan in itertools.product(("threads", "synchronous"), (1, 2, 5), (2, 16)):
        with dask.config.set(scheduler=scheduler, num_workers=workers, split_every=fan):
            assert same(Moments().update(lazy), want)
            assert same(dataset_moments(lazy).moments, want)
    for seed in range(5):
        order = rng("order", seed).permutation(12)
        assert same(Moments().update(da.concatenate([lazy.blocks[i] for i in order])), want)
    assert same(dataset_moments([lazy[20:], lazy[:20]]).moments, want)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_have_the_same_bits_however_they_are_cut(dtype):
    x = data((30, 4, 9, 5), dtype)
    want = Moments().update(x)
    for chunks in ((30, 4, 9, 5), (7, 4, 9, 5), (11, 1, 4, 2), (1, 3, 9, 5)):
        assert same(Moments().update(da.from_array(x, chunks=chunks)), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_a_sample_have_the_same_bits_however_samples_are_cut(dtype):
    x = data((30, 4, 9, 5), dtype)
    one = x[0].nbytes
    want = dataset_moments(x, chunk_bytes=one).moments
    three = dataset_moments(x, chunk_bytes=3 * one).moments
    for n in (30, 7, (1, 12, 17), 1, 15, 3):
        lazy = da.from_array(x, chunks=(n, 4, 9, 5))
        assert same(dataset_moments(lazy, chunk_bytes=one).moments, want)
        if all(size % 3 == 0 for size in lazy.chunks[0]):
            assert same(dataset_moments(lazy, chunk_bytes=3 * one).moments, three)


@pytest.mark.parametrize("n", [1, 2, 8, 24])
def test_pieces_are_samples_wherever_these_are_in_memory(n):
    x = data((3, 2, 1, 24), np.float64, seed=0) / 3 + 1e4
    whole = dataset_moments(da.from_array(x, chunks=(3, 2, 1, 24)).transpose(3, 2, 0, 1), chunk_bytes=48)
    cut = dataset_moments(da.from_array(x, chunks=(3, 2, 1, n)).transpose(3, 2, 0, 1), chunk_bytes=48)
    seen = []
    lazy = da.from_array(x, chunks=(3, 2, 1, n)).transpose(3, 2, 0, 1)
    dataset_moments(lazy, chunk_bytes=48, mask=lambda b: seen.append(b.shape))
    assert seen == [(1, 1, 3, 2)] * 24 and same(cut.moments, whole.moments)


@pytest.mark.slow
def test_the_page_has_the_hashes_that_the_program_prints(capsys):
    root = Path(__file__).resolve().parents[2]
    if not (root / "docs" / "dask.md").exists():
        pytest.skip("the source tree (docs/) is not here")
    runpy.run_path(str(root / "tests" / "project" / "programs" / "bits_of_dask.py"))
    printed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 4
    assert printed == re.findall(r"`([0-9a-f]{12})` \|$", (root / "docs" / "dask.md").read_text(), re.M)


def test_blocks_are_cut_into_pieces():
    x, seen = data((8, 3, 5)), []
    dataset_moments(da.from_array(x, chunks=(4, 3, 5)), chunk_bytes=120, mask=lambda b: seen.append(b.shape))
    assert seen == [(2, 3, 5)] * 4


# ---- graphs ------------------------------------------------------------------------------------------------


class Source:
    """Something to slice that keeps account of what is read, and of what is alive."""

    def __init__(self, x):
        self.x, self.read, self.alive, self.most = x, [], 0, 0
        self.shape, self.dtype, self.ndim = x.shape, x.dtype, x.ndim
        self.lock = threading.Lock()

    def __getitem__(self, key):
        piece = self.x[key].copy()
        if not piece.size:  # asked for when the graph is built
            return piece
        with self.lock:
            self.read.append(tuple(s.start or 0 for s in key))
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(piece, self.gone)
        return piece

    def gone(self):
        with self.lock:
            self.alive -= 1


CALLS = [
    moments, Moments().update, dataset_moments, lambda x: dataset_moments(x, progress=True),
    lambda x: dataset_moments(x, transform=np.negative), lambda x: dataset_moments(x, max_value=3),
    lambda x: moments(x, mask=np.ones(40, bool), nodata=[1, 2, 3]),
    lambda x: batchnorm.dask.batch_norm(x, np.zeros(3), np.ones(3)).compute(),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_each_block_is_read_once_and_soon_let_go(call):
    source = Source(data((40, 3, 6)))
    lazy = da.from_array(source, chunks=(4, 3, 6), asarray=False, lock=False)
    with dask.config.set(scheduler="threads", num_workers=2):
        call(lazy)
    assert sorted(source.read) == [(i, 0, 0) for i in range(0, 40, 4)]
    assert source.most <= 4 or call is CALLS[-1], "more blocks than two workers have at hand"


def test_one_task_reads_a_block_and_takes_its_sums():
    source = Source(data((40, 3, 6)))
    lazy = da.from_array(source, chunks=(4, 3, 6), asarray=False) * 2
    done = []
    with dask.callbacks.Callback(posttask=lambda key, *_: done.append(key)):
        moments(lazy)
    assert len([k for k in done if "array" in str(k)]) <= 1  # the source itself
    assert len(done) < 3 * 10


@pytest.mark.parametrize("threads", [None, 3], ids=str)
def test_threads_of_a_task(monkeypatch, threads):
    seen = []
    core = batchnorm._core.moment_sums

    def spy(*arguments, num_threads=None, **options):
        seen.append(num_threads)
        return core(*arguments, num_threads=num_threads, **options)

    monkeypatch.setattr(batchnorm._core, "moment_sums", spy)
    room = sys.modules[Moments.__module__]
    identity = room.batch_norm
    monkeypatch.setattr(
        room, "batch_norm", lambda *a, num_threads=None, **k: seen.append(num_threads) or identity(*a, **k)
    )
    lazy = da.from_array(data((8, 3)), chunks=(2, 3))
    some = np.arange(8) % 3 > 0
    moments(lazy, num_threads=threads, mask=some, nodata=float(lazy[1, 1]))
    dataset_moments(da.ma.masked_less(lazy, 18), num_threads=threads, mask=lambda x: np.ma.getdata(x) < 22)
    assert len(seen) > 8, "both functions"
    moments(lazy, num_threads=threads)
    dataset_moments(lazy, num_threads=threads)
    dataset_moments(db.from_sequence([data((8, 3))]), num_threads=threads)
    assert set(seen) == {threads or 1}
    Moments().update(data((8, 3)), num_threads=threads)
    assert seen[-1] == threads


@pytest.mark.parametrize("kind", ["array", "bag", "list"])
def test_progress_is_shown_on_stderr(capsys, kind):
    pytest.importorskip("rich", reason="rich is not installed (extra progress)")
    x = data((40, 3, 6))
    lazy = da.from_array(x, chunks=(4, 3, 6))
    given = {"array": lazy, "bag": db.from_sequence([x[:7], x[7:]], npartitions=2), "list": [lazy, x]}[kind]
    dataset_moments(given, progress=True)
    shown = capsys.readouterr().err
    assert "moments" in shown and ("10/10" if kind == "array" else "2/2" if kind == "bag" else "") in shown
    dataset_moments(given, progress=None)
    assert capsys.readouterr() == ("", "")


# ---- data sets ---------------------------------------------------------------------------------------------


def test_a_bag_of_files(tmp_path):
    x = data((40, 3, 6))
    paths = []
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", x[8 * i : 8 * i + 8])
        paths.append(tmp_path / f"{i}.npy")
    want = dataset_moments(paths)
    for partitions in (1, 2, 5):
        assert same(dataset_moments(db.from_sequence(paths, npartitions=partitions)).moments, want.moments)
    calls = []
    got = dataset_moments(
        db.from_sequence(paths, npartitions=2), read=lambda p: calls.append(p) or np.load(p) / 2,
        transform=lambda x: x * 2, mask=lambda x: x > 10, max_value=4,
    )  # fmt: skip
    assert sorted(calls) == paths
    np.testing.assert_allclose(got.mean, Moments().update(x, mask=x > 10).mean / 4, rtol=1e-12)


def test_options_of_dataset_moments():
    x = data((12, 8, 9, 3), np.uint8)
    lazy, samples = (da.from_array(x, chunks=(5, 8, n, 3)) for n in (4, 9))
    got = dataset_moments(lazy, data_format="NHWC", max_value=255)
    want = dataset_moments(x, data_format="NHWC", max_value=255)
    assert same(got.moments, want.moments) and same_bits(got.std, want.std)
    total = Moments(data_format="NHWC").update(x[:2])
    again = dataset_moments(lazy, moments=total)
    assert again.moments is total and total.count == 14 * 8 * 9
    tables = dataset_moments(samples, transform=lambda b: b.reshape(-1, 3).astype(np.float32))
    np.testing.assert_allclose(tables.mean, want.mean * 255, rtol=1e-12)
    for single in (lazy[0], lazy[0, ..., 1]):
        picture = dataset_moments(single, data_format="NHWC")
        assert same(picture.moments, dataset_moments(single.compute(), data_format="NHWC").moments)
    masked = dataset_moments(lazy, data_format="NHWC", mask=lambda b: b > 20)
    assert same_bits(masked.counts, (x > 20).sum((0, 1, 2)).astype(float))


@pytest.mark.quick
def test_functions_see_all_channels():
    raster = data((3, 8, 8))
    raster[1, :4] = -9999
    valid = lambda b: (b != -9999).all(axis=0)  # noqa: E731
    want = dataset_moments(raster, channel_axis=0, mask=valid).counts
    whole = da.from_array(raster, chunks=(3, 4, 4))
    cut = da.from_array(raster, chunks=(1, 4, 4))
    assert want.tolist() == [32] * 3
    assert same_bits(dataset_moments(whole, channel_axis=0, mask=valid).counts, want)
    with pytest.raises(ValueError, match=r"batches has 3 blocks along axis 0, its channels.*mask is called"):
        dataset_moments(cut, channel_axis=0, mask=valid)
    for remedy in ({"batches": cut.rechunk({0: -1}), "mask": valid}, {"batches": cut, "mask": valid(cut)}):
        assert same_bits(dataset_moments(channel_axis=0, **remedy).counts, want)


PLANES = (0, 3, 1, 2)
TURNED = [  # x, blocks, what moves its channels, the axis that is refused, or None
    ((4, 8, 8, 3), (2, 8, 8, 1), PLANES, 3), ((4, 8, 8, 16), (2, 8, 8, 8), PLANES, 3),
    ((4, 1, 8, 3), (2, 1, 8, 1), PLANES, 3), ((4, 8, 8, 3), (2, 4, 8, 3), PLANES, 1),
    ((4, 8, 8, 3), (2, 8, 8, 3), PLANES, None), ((9, 8, 8, 3), (3, 8, 8, 3), PLANES, None),
    ((3, 8, 8, 1), (1, 8, 8, 1), PLANES, None), ((4, 6), (2, 6), (1, 0), 0), ((4, 6), (1, 6), (1, 0), 0),
    ((4, 8, 8, 3), (2, 8, 4, 3), (0, 1, 2, 3), None), ((8, 8, 8, 3), (2, 8, 8, 2), (0, 1, 2, 3), None),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "chunks", "order", "refused"), TURNED, ids=str)
def test_transform_makes_all_channels_of_each_block(shape, chunks, order, refused):
    x = data(shape)
    lazy, turn = da.from_array(x, chunks=chunks), lambda b: b.transpose(order)
    want = moments(turn(x))
    if refused is None:
        np.testing.assert_allclose(dataset_moments(lazy, transform=turn), want, rtol=1e-12)
        return
    with pytest.raises(ValueError, match=rf"(blocks|cut) along axis {refused}") as error:
        dataset_moments(lazy, transform=turn)
    again = lazy.rechunk({refused: -1})
    np.testing.assert_allclose(dataset_moments(again, transform=turn), want, rtol=1e-12)
    assert f"use batches.rechunk({{{refused}: -1}}), or " in str(error.value)
    np.testing.assert_allclose(dataset_moments(lazy.transpose(order)), want, rtol=1e-12)


def test_some_of_the_channels_that_are_as_many_as_those_of_the_block():
    x = da.from_array(data((10, 3, 8, 8)), chunks=(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"cut along axis 0, .*use batches.rechunk\({0: -1}\)"):
        dataset_moments(x, transform=lambda b: b.reshape(1, -1, 8, 8))


def test_transform_sees_whole_blocks_and_is_called_once_more():
    x, seen = data((8, 3, 6)), []
    lazy = da.from_array(x, chunks=(4, 3, 6))
    with dask.config.set(scheduler="synchronous"):
        got = dataset_moments(lazy, transform=lambda b: seen.append(b.shape) or b, chunk_bytes=1)
    assert same(got.moments, Moments().update(lazy)) and sorted(seen) == [(1, 3, 6), *[(4, 3, 6)] * 2]


def test_transform_of_blocks_cut_along_the_channels():
    x = da.from_array(data((4, 8, 3)), chunks=(2, 8, 1))
    with pytest.raises(ValueError, match=r"or if it keeps the shape batches.map_blocks\(transform\)$"):
        dataset_moments(x, transform=np.negative, channel_axis=-1)
    got = dataset_moments(x.map_blocks(np.negative), channel_axis=-1)
    np.testing.assert_allclose(got.mean, -x.compute().mean((0, 1), dtype=float), rtol=1e-12)


def test_functions_that_return_dask_arrays():
    x = data((12, 3, 6))
    lazy = da.from_array(x, chunks=(4, 3, 6))
    want = dataset_moments([lazy]).moments
    for call in (
        lambda: dataset_moments(["a"], read=lambda p: lazy, channel_axis=1),
        lambda: dataset_moments([(lazy, 0)], transform=lambda b: b[0], channel_axis=1),
        lambda: dataset_moments(db.from_sequence(["a"]), read=lambda p: lazy, channel_axis=1),
        lambda: dataset_moments(db.from_sequence([0]).map(lambda i: lazy)),
    ):
        with pytest.raises(TypeError, match=r"is lazy, .*use .compute\(\) there, or pass batches=\[\.\.\.\]"):
            call()
    got = dataset_moments(["a"], read=lambda p: lazy.compute(), channel_axis=1, chunk_bytes=x[:4].nbytes)
    assert same(got.moments, want)


def test_arrays_of_xarray_and_zarr(tmp_path):
    xarray = pytest.importorskip("xarray", reason="xarray is not installed (extra test)")
    zarr = pytest.importorskip("zarr", reason="zarr is not installed (extra test)")
    x = data((12, 3, 6))
    want = Moments().update(da.from_array(x, chunks=(5, 3, 6)))
    labelled = xarray.DataArray(x, dims=("time", "band", "x"))
    lazy = labelled.chunk({"time": 5})
    stored = zarr.create_array(str(tmp_path / "x.zarr"), shape=x.shape, chunks=(5, 3, 6), dtype=x.dtype)
    stored[...] = x
    for given in (lazy, da.from_zarr(str(tmp_path / "x.zarr"))):
        assert same(Moments().update(given), want) and same(dataset_moments(given).moments, want)
        assert same_bits(moments(given, keepdims=True).var.ravel(), want.var)
        y = batchnorm.dask.batch_norm(given, want.mean, want.var)
        assert same_bits(y.compute(), batch_norm(x, want.mean, want.var))
    assert same(Moments().update(labelled), Moments().update(x))


def test_what_knows_dask_and_holds_none_of_it_is_an_ordinary_array():
    class Quantity:
        def __init__(self, x):
            self.x = x

        def __dask_graph__(self):
            return None

        def __array__(self, dtype=None, copy=None):
            return self.x

    x = data((12, 3, 6))
    assert same_bits(moments(Quantity(x)).var, moments(x).var)
    assert same_bits(batch_norm(Quantity(x), np.zeros(3), np.ones(3)), batch_norm(x, np.zeros(3), np.ones(3)))


# ---- functions of each block -------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [None, np.float64])
@pytest.mark.parametrize(("data_format", "out_format"), [*itertools.product(("NHWC", "NCHW"), repeat=2)])
def test_normalize_images(data_format, out_format, dtype):
    shape = (7, 8, 9, 3) if data_format == "NHWC" else (7, 3, 8, 9)
    x, mean, std = data(shape, np.uint8), [0.1, 0.2, 0.3], np.array([0.3, 0.2, 0.1])
    options = {"data_format": data_format, "out_format": out_format, "dtype": dtype}
    want = normalize_images(x, mean, std, **options)
    for chunks in ((3, 5, 4, 2), (7, -1, -1, -1)):
        lazy = da.from_array(x, chunks=chunks)
        for given, full in ((lazy, want), (lazy[2], want[2])):
            y = normalize_images(given, mean, std, **options)
            assert y.shape == full.shape and y.dtype == full.dtype == y._meta.dtype
            assert same_bits(y.compute(), full)


@pytest.mark.parametrize("samples", [7, 1])
def test_batch_norm(samples):
    x = data((samples, 4, 8, 9))
    mean, var, gamma, beta = rng("vectors").uniform(0.5, 2, (4, 4))
    each = rng("each").uniform(0.5, 2, (samples, 4)).astype(np.float32)
    residual, lengths = data(x.shape, seed=1), np.array([8, 0, 3, 1, 5, 8, 2])[:samples]
    options = [
        {}, {"gamma": gamma, "beta": beta}, {"gamma": each, "beta": beta, "eps": 0.5},
        {"residual": residual, "activation": "relu"}, {"activation": "leaky_relu", "slope": 0.3},
        {"mask": residual > 20}, {"mask": residual[:, 0] > 20}, {"mask": lengths > 2},
        {"lengths": lengths, "lengths_axis": 2},
    ]  # fmt: skip
    lazy = da.from_array(x, chunks=(3, 3, 8, 5))
    for given in options:
        want = batch_norm(x, mean, var, **given)
        other = {n: da.from_array(v) if isinstance(v, np.ndarray) else v for n, v in given.items()}
        for own in (given, other):
            y = batchnorm.dask.batch_norm(lazy, mean, var, **own)
            assert y.chunks == lazy.chunks and y.dtype == x.dtype and same_bits(y.compute(), want)
    lazy = da.from_array(x, chunks=(3, 4, 5, 9))
    mean, var = rng("vectors").uniform(0.5, 2, (2, 4, 9))
    y = batchnorm.dask.batch_norm(lazy, mean, var, channel_axis=(1, 3))
    assert same_bits(y.compute(), batch_norm(x, mean, var, channel_axis=(1, 3)))
    lists = batchnorm.dask.batch_norm(lazy, [0.0] * 4, [1.0] * 4, data_format="NCHW")
    assert same_bits(lists.compute(), batch_norm(x, np.zeros(4), np.ones(4)))


def test_what_is_lazy_keeps_its_own_numbers():
    x, pixels = da.from_array(data((4, 3))), da.from_array(data((4, 5, 5, 3), np.uint8))
    given = {"mean": np.zeros(3), "var": np.ones(3), "gamma": np.ones(3), "beta": np.zeros(3)}
    images = {"mean": np.full(3, 0.1), "std": np.full(3, 0.2)}
    y, z = batchnorm.dask.batch_norm(x, **given), normalize_images(pixels, **images)
    want = y.compute(), z.compute()
    for value in (*given.values(), *images.values()):
        value += 1
    assert same_bits(y.compute(), want[0]) and same_bits(z.compute(), want[1])


@pytest.mark.parametrize("out_format", ["NHWC", "channels_first", None])
@pytest.mark.parametrize("axis", [1, -1])
def test_batch_norm_of_integers(axis, out_format):
    x, mean, var = data((7, 4, 5, 6), np.uint8), np.arange(1.0, 1 + (4, 6)[axis == -1]), None
    var = mean + 1
    want = batch_norm(x, mean, var, channel_axis=axis, out_format=out_format, dtype=np.float64)
    residual = data(want.shape, np.float64)
    lazy = da.from_array(x, chunks=(3, 3, 4, 4))
    for options in ({}, {"residual": residual}):
        options |= {"channel_axis": axis, "out_format": out_format, "dtype": np.float64}
        y = batchnorm.dask.batch_norm(lazy, mean, var, **options)
        want = batch_norm(x, mean, var, **options)
        assert y.shape == want.shape and same_bits(y.compute(), want)


# ---- errors ------------------------------------------------------------------------------------------------

X = da.from_array(data((8, 3, 6)), chunks=(4, 2, 3))
WHOLE = X.rechunk((4, 3, 6))
SOME = X[X[:, 0, 0] > 18]
PIXELS = da.zeros((4, 8, 8, 3), dtype=np.uint8, chunks=(2, 8, 8, 3))
ZEROS, ONES = np.zeros(3), np.ones(3)
normalised = batchnorm.dask.batch_norm


class Unreadable(OSError):
    def __init__(self, number):
        super().__init__("not a picture")


def refuse_file():
    raise Unreadable(3)


ERRORS = [
    (lambda: batchnorm.batch_norm_train(X), TypeError,
     r"^x is of type dask.array.Array, which is lazy, expected .*x.compute\(\), or moments, dataset_m"),
    (lambda: batch_norm(X, ZEROS, ONES), TypeError, "and batchnorm.dask.batch_norm, which take Dask's"),
    (lambda: batchnorm.BatchNorm(3)(X), TypeError, "^x is of type dask.array.Array, which is lazy"),
    (lambda: moments(X.compute(), mask=(X > 1).to_delayed()[0, 0, 0]), TypeError, "^mask is of type"),
    (lambda: moments(dask.delayed(np.ones)((3, 2))), TypeError, "dask array; use dask.array.from_delayed"),
    (lambda: dataset_moments(dask.delayed(np.ones)((3, 2))), TypeError, "^batches is .*from_delayed"),
    (lambda: moments(db.from_sequence([1])), TypeError,
     "^x is of type dask.bag.Bag, expected a dask array; dataset_moments takes bags$"),
    (lambda: moments(X, channel_axis=3), ValueError, "channel_axis is 3"),
    (lambda: moments(X, data_format="NCHW"), ValueError, "NCHW"),
    (lambda: moments(X, axis=1), TypeError, r"moments\(\) has no argument 'axis'"),
    (lambda: moments(X, ddof=-1), ValueError, "ddof is -1"),
    (lambda: moments(X, ddof=48), ValueError, "ddof is 48, expected less than 48"),
    (lambda: moments(X, num_threads=0), ValueError, "num_threads is 0"),
    (lambda: moments(X.astype(int)), TypeError, "^x has dtype int64, expected float32"),
    (lambda: moments(X, nodata=[1, 2]), ValueError, r"nodata has shape \(2,\), expected a number, or \(3,\)"),
    (lambda: moments(PIXELS, nodata=np.nan), ValueError, "nodata is nan, expected a value that uint8"),
    (lambda: moments(PIXELS, channel_axis=-1, nodata=[np.nan] * 3), ValueError, "nodata is nan"),
    (lambda: moments(X, mask=np.ones((8, 3, 5), bool)), ValueError,
     r"mask has shape \(8, 3, 5\), and length 5 along axis 2 of x, expected 6, or 1"),
    (lambda: moments(X, mask=np.ones((1,) * 4, bool)), ValueError,
     r"mask has shape \(1, 1, 1, 1\), expected \(8,\) or \(8, 6\) or \(8, 3, 6\)"),
    (lambda: moments(X, mask=np.ones(8)), TypeError, "mask has dtype float64.*use mask.astype"),
    (lambda: dataset_moments(X, mask=np.ones(8)), TypeError, "mask has dtype float64.*use mask.astype"),
    (lambda: moments(X, mask=[True] * 8), TypeError, "^mask is of type list, expected a bool"),
    (lambda: dataset_moments(X, mask=3), TypeError, r"^mask is 3 \(int\), expected a"),
    (lambda: dataset_moments(X.compute(), mask=np.ones(8, bool)), TypeError, "^mask is .* a function"),
    (lambda: moments(X, weights=np.ones((8, 3, 6))), ValueError, "^weights has shape"),
    (lambda: moments(X, mask=np.ones(8, bool), lengths=np.ones(8, int)), ValueError, "axis 2, whose steps"),
    (lambda: moments(WHOLE, mask=np.ones(8, bool), lengths=np.ones(8, int)), ValueError, "both given"),
    (lambda: moments(X, lengths=np.ones(8, int)), ValueError,
     r"x has 2 blocks along axis 2, whose steps lengths counts, expected one; use x.rechunk\({2: -1}\), or"),
    (lambda: moments(WHOLE, lengths=np.full(8, 7)), ValueError,
     r"^block \((0|1), 0, 0\) of x, of shape \(4, 3, 6\): lengths"),
    (lambda: moments(WHOLE, lengths=np.ones(8, int), lengths_axis="w"), TypeError, "lengths_axis is 'w'"),
    (lambda: moments(X, lengths=np.ones(8, int), lengths_axis=True), TypeError, "lengths_axis is True"),
    (lambda: moments(X, lengths=np.ones(8, int), lengths_axis=np.int64(2)), ValueError,
     r"x has 2 blocks along axis 2, whose steps lengths counts, expected one; use x.rechunk\({2: -1}\), or"),
    (lambda: normalised(X, ZEROS, ONES, lengths=np.ones(8, int), lengths_axis=np.int8(-1)), ValueError,
     r"x has 2 blocks along axis -1, whose steps lengths counts, expected one; use x.rechunk\({-1: -1}\)"),
    (lambda: moments(PIXELS.rechunk(2), lengths=np.ones(4, int)), ValueError,
     "^lengths_axis is None, expect"),
    (lambda: moments(WHOLE, lengths=np.ones(8)), TypeError, r"expected an int array of shape \(8,\)"),
    (lambda: moments(X[..., 0], channel_axis=(0, 1)), ValueError,
     r"^channel_axis is \(0, 1\), all axes of x \(8, 3\)"),
    (lambda: moments(X, channel_axis=0, mask=np.ones(8, bool)), ValueError, r"expected \(3, 6\) or \(8, 3"),
    (lambda: normalised(X[..., 0], np.zeros(8), np.ones(8), np.ones((3, 8)), channel_axis=0), ValueError,
     r"^gamma has shape \(3, 8\), expected \(8,\), one value per channel"),
    (lambda: dataset_moments(WHOLE, mask=np.full((8, 3, 5), True)), ValueError, "along axis 2 of batches"),
    (lambda: dataset_moments(SOME, channel_axis=0), ValueError, "^batches has.*batches.compute_chunk"),
    (lambda: dataset_moments(WHOLE, moments=Moments().update(np.ones((2, 5)))), ValueError,
     r"^batches has channels of shape \(3,\), expected \(5,\) as before"),
    (lambda: dataset_moments(WHOLE, transform=np.abs, moments=Moments().update(np.ones((2, 5)))), ValueError,
     r"^batches has channels of shape \(3,\), expected \(5,\) as before"),
    (lambda: moments(X, mask=np.ma.array(np.ones(8, bool))), TypeError, "mask is a masked array, whose mask"),
    (lambda: dataset_moments(X, mask=da.ma.masked_less(X > 3, 1)), TypeError, "mask is a masked array"),
    (lambda: moments(SOME, mask=np.ones(8, bool)), ValueError,
     r"length 8 along axis 0 of x, expected blocks of unknown length as.*x.compute_chunk_sizes\(\) first"),
    (lambda: moments(SOME, channel_axis=0), ValueError,
     r"x has blocks of unknown length along axis 0, its channels.*call x.compute_chunk_sizes\(\) first"),
    (lambda: dataset_moments(X, transform=abs), ValueError,
     r"batches has 2 blocks along axis 1, where what transform makes has its channels.*batches.rechunk\({1"),
    (lambda: dataset_moments(X, transform=abs, mask=np.ones(8, bool)), ValueError,
     "mask is an array and transform is given"),
    (lambda: dataset_moments(WHOLE, transform=lambda x: 1 / 0), RuntimeError,
     r"^block \((0|1), 0, 0\) of batches, of shape \(4, 3, 6\): ZeroDivisionError: division by zero"),
    (lambda: dataset_moments(db.from_sequence(["no.npy"])), FileNotFoundError,
     "^element 'no.npy' of batches: .*No such file"),
    (lambda: dataset_moments(db.from_sequence(["x"]), read=lambda p: refuse_file()), OSError,
     "^element 'x' of batches: Unreadable: not a picture"),
    (lambda: dataset_moments(WHOLE, transform=lambda x: b"\xff".decode()), RuntimeError,
     r"^block .*: UnicodeDecodeError: "),
    (lambda: dataset_moments(db.from_sequence([3])), TypeError, r"^element 3 \(int\) of batches: an element"),
    (lambda: dataset_moments(X, max_value=-1), ValueError, "max_value is -1"),
    (lambda: dataset_moments(PIXELS, channel_axis=-1, max_value=0.5), ValueError, "max_value is 0.5"),
    (lambda: normalize_images(PIXELS, [1, 2], [1, 2]), ValueError, r"mean has shape \(2,\)"),
    (lambda: normalize_images(PIXELS, [127.0] * 3, [1.0] * 3), ValueError, "mean is 127 at channel 0"),
    (lambda: normalize_images(X, [0.1] * 3, [0.1] * 3), TypeError,
     r"x has dtype float32.*use batchnorm\.dask\.batch_norm\(numpy\.moveaxis\(x"),
    (lambda: normalize_images(PIXELS[..., da.ones(3, chunks=3) > 0], ZEROS, ONES / 3), ValueError,
     r"blocks of unknown length along axis 3.*call x\.compute_chunk_sizes\(\) first"),
    (lambda: normalize_images(PIXELS[0, 0], [0.1] * 3, [0.1] * 3), ValueError, "expected 4 dimensions, or 3"),
    (lambda: normalize_images(PIXELS, ZEROS, ONES / 3, out=np.ones(3)), TypeError, "out is given and x"),
    (lambda: normalize_images(db.from_sequence([1]), ZEROS, ONES), TypeError, "expected a dask array"),
    (lambda: normalised(np.ones((2, 3)), ZEROS, ONES), TypeError, "x is of type numpy.ndarray, expected"),
    (lambda: normalised(X, ZEROS, -ONES), ValueError, "var is -1"),
    (lambda: normalised(X, np.zeros(4), np.ones(4)), ValueError, r"mean has shape \(4,\), and length 4"),
    (lambda: normalised(X, np.zeros((3, 1)), ONES), ValueError, r"mean has shape \(3, 1\), expected \(3"),
    (lambda: normalised(X, ZEROS, ONES, "x"), TypeError, "gamma is 'x'"),
    (lambda: normalised(X, ZEROS, ONES, axis=1), TypeError, r"batch_norm\(\) has no argument 'axis'"),
    (lambda: normalised(X, ZEROS, ONES, activation="gelu"), ValueError, "activation is 'gelu'"),
    (lambda: normalised(X, ZEROS, ONES, residual=X[:4]), ValueError, r"residual has shape \(4, 3, 6\)"),
    (lambda: normalised(X, ZEROS, ONES, residual=X[0]), ValueError, r"residual has shape \(3, 6\), expected"),
    (lambda: normalised(X, ZEROS, ONES, out_format="NHWC"), ValueError, "out_format"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), ERRORS, ids=range(len(ERRORS)))
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_errors_come_before_anything_is_computed():
    def never(block):
        raise AssertionError("computed")

    lazy = da.map_blocks(never, X, dtype=X.dtype, meta=np.empty((0, 0, 0), X.dtype))
    huge = da.map_blocks(never, da.zeros((1, 3, 10**9), chunks=(1, 3, 10**9)), dtype=float, meta=np.empty(0))
    for call, words in (
        (lambda: moments(huge, nodata=[1, 2]), "nodata"),
        (lambda: moments(huge, mask=np.ones((1, 1, 2), bool)), "mask"),
        (lambda: moments(huge, num_threads=-1), "num_threads"),
        (lambda: moments(lazy, nodata=[1, 2]), "nodata"),
        (lambda: moments(lazy, channel_axis=7), "channel_axis"),
        (lambda: moments(lazy, mask=np.ones((2, 2), bool)), "mask"),
        (lambda: normalised(lazy, ZEROS, -ONES), "var"),
        (lambda: moments(lazy, num_threads=-1), "num_threads"),
        (lambda: moments(lazy, ddof=-1), "ddof"),
        (lambda: Moments().update(np.ones((2, 5))).update(lazy), "^x has channels of shape"),
        (lambda: dataset_moments(lazy, moments=Moments().update(np.ones((2, 5)))), "^batches has channels"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    total = Moments().update(data((4, 3)))
    before = total.to_array()
    with pytest.raises(AssertionError):
        total.update(lazy)
    assert same_bits(total.to_array(), before)


def test_what_is_sent_to_workers_can_be_pickled():
    for function in (batchnorm.dask.batch_norm, moments, dataset_moments, normalize_images, batch_norm):
        assert pickle.loads(pickle.dumps(function)) is function


# ---- processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_have_the_same_bits():
    x = data((48, 5, 16), seed=1) + np.float32(1e4)
    lazy = da.from_array(x, chunks=(4, 3, 16))
    want, pixels = Moments().update(lazy), da.from_array(data((6, 8, 8, 3), np.uint8), chunks=(2, 8, 8, 3))
    y = normalize_images(pixels, [0.1] * 3, [0.1] * 3)
    with dask.config.set(scheduler="processes", num_workers=2):
        assert same(Moments().update(lazy), want)
        whole = lazy.rechunk({1: -1})
        masked = dataset_moments(whole, mask=dask_workers.positive, progress=False).moments
        assert same(masked, Moments().update(whole))
        assert same_bits(
            y.compute(), normalize_images(pixels.compute(scheduler="sync"), [0.1] * 3, [0.1] * 3)
        )
        with pytest.raises(ValueError, match=r"^block \(\d+, 0, 0\) of batches, of shape"):
            dataset_moments(lazy.rechunk({1: -1}), transform=dask_workers.refuse)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed", reason="distributed is not installed (extra dask)")
    quiet = {"distributed.scheduler.allowed-failures": 20, "distributed.logging.distributed": "critical"}
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with dask.config.set(quiet):
        with distributed.LocalCluster(**options, silence_logs=50) as cluster:
            with distributed.Client(cluster) as client:
                yield client


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_cluster_has_the_same_bits_also_when_workers_die(cluster, tmp_path, capsys):
    x = data((48, 5, 16), seed=1) + np.float32(1e4)
    lazy = da.from_array(x, chunks=(4, 3, 16))
    with dask.config.set(scheduler="synchronous"):
        want = Moments().update(lazy)
    with dask.config.set(scheduler="distributed"):
        assert same(Moments().update(lazy), want)
        assert same(dataset_moments(lazy.persist()).moments, want)
        shown = dataset_moments(lazy, progress=True)
        assert same(shown.moments, want) and "moments" in capsys.readouterr().err
        paths = [str(tmp_path / f"{i}.npy") for i in range(12)]
        for i, path in enumerate(paths):
            np.save(path, x[4 * i : 4 * i + 4])
        bag = dataset_moments(
            db.from_sequence(paths, npartitions=6), read=dask_workers.load, channel_axis=1, progress=True
        )
        assert same(bag.moments, dataset_moments(x, chunk_bytes=x[:4].nbytes).moments)
        mortal = lazy.map_blocks(
            dask_workers.die_once, str(tmp_path / "died"), dtype=x.dtype, meta=lazy._meta
        )
        assert same(dataset_moments(mortal).moments, want)
        assert int((tmp_path / "died").read_text()) != os.getpid()
        with pytest.raises(ValueError, match=r"^block \(\d+, 0, 0\) of batches, of .*: not today"):
            dataset_moments(lazy.rechunk({1: -1}), transform=dask_workers.refuse)
