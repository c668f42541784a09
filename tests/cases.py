"""What the tests run on: sizes around every lane, block and tile edge, data of known moments, memory layouts.

A kernel works on blocks of 16 lanes; a channel is cut into tiles of at most 16384 values if its values are
contiguous (direction ncs), and into tiles of rows if the channels are (direction nsc), from 512 rows on into
multiples of 16 tiles. Fewer than 64 channels are folded, several rows to one; more than 2048 are divided.
49152 elements and more (24576 of runs that are summed first, 65536 of rows) are shared among threads, or any
number where the tuning parallel_elements is 0, as with the fixture `threads`. The lists below step over those
edges by one on either side.
"""

from __future__ import annotations

import csv
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

try:
    import ml_dtypes

    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    BFLOAT16 = None

needs_bfloat16 = pytest.mark.skipif(BFLOAT16 is None, reason="ml_dtypes is not installed")
FLOAT32, FLOAT64, FLOAT16 = (np.dtype(name) for name in ("float32", "float64", "float16"))
DTYPES = [
    *(pytest.param(dtype, id=dtype.name) for dtype in (FLOAT32, FLOAT64, FLOAT16)),
    pytest.param(BFLOAT16, id="bfloat16", marks=needs_bfloat16),
]
AVAILABLE_DTYPES = [dtype for dtype in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16) if dtype is not None]

THREADS = (1, 2, 3, 7)


def around(*sizes):
    """Each size, one less and one more."""
    return [n + step for n in sizes for step in (-1, 0, 1)]


LENGTHS = (1, 2, *around(16, 32, 64, 128, 512, 4096, 8192))
LONG = around(16384, 32768)
CHANNELS = (*range(1, 21), *around(32, 64, 2048), 100, 128, 1000, 4097)


# ---- shapes --------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A tensor (outer, channels, inner). In memory, nsc has its channels contiguous, ncs its inner axis."""

    direction: str
    outer: int
    channels: int
    inner: int

    def __str__(self):
        return f"{self.direction}-{self.outer}x{self.channels}x{self.inner}"

    @property
    def count(self):
        return self.outer * self.inner

    def array(self, values):
        """`values`, indexed (outer, channels, inner), in this shape's memory order."""
        return self.like(values.shape, values.dtype, values)

    def like(self, shape, dtype, values=0):
        n, c, s = shape
        x = (
            np.empty((n, c, s), dtype)
            if self.direction == "ncs"
            else np.empty((n, s, c), dtype).transpose(0, 2, 1)
        )
        x[...] = values
        return x


def _edge_shapes():
    for length in LENGTHS:
        yield Shape("ncs", 1, 3, length)
        yield Shape("ncs", 3, 2, length)
        for channels in (1, 3, 16, 20, 64, 65):
            yield Shape("nsc", length, channels, 1)
    for length in LONG:
        yield Shape("ncs", 2, 2, length)
        yield Shape("nsc", length, 1, 1)
        yield Shape("nsc", length, 3, 1)
    for channels in CHANNELS:
        yield Shape("ncs", 2, channels, 5)
        yield Shape("ncs", 3, channels, 33)
        yield Shape("nsc", 5, channels, 1)
        yield Shape("nsc", 37, channels, 1)
        yield Shape("nsc", 3, channels, 43)
    yield from (
        Shape("ncs", 300, 2, 7),
        Shape("ncs", 1025, 4, 4),
        Shape("ncs", 33, 5, 128),
        Shape("ncs", 17, 64, 35),
    )
    yield from (
        Shape("nsc", 1025, 100, 1),
        Shape("nsc", 130, 1000, 1),
        Shape("nsc", 9, 7, 121),
        Shape("nsc", 15, 64, 35),
    )


EDGE_SHAPES = list(dict.fromkeys(_edge_shapes()))
TRAIN_SHAPES = [shape for shape in EDGE_SHAPES if shape.count > 1]
# One shape for each kind of edge, for tests that multiply shapes by much else.
SOME_SHAPES = [
    Shape("ncs", 1, 3, 17), Shape("ncs", 3, 2, 4097), Shape("ncs", 5, 20, 49), Shape("ncs", 2, 65, 33),
    Shape("ncs", 300, 2, 7), Shape("nsc", 17, 3, 1), Shape("nsc", 4097, 3, 1), Shape("nsc", 245, 20, 1),
    Shape("nsc", 33, 65, 1), Shape("nsc", 9, 16, 49), Shape("nsc", 37, 1000, 1),
]  # fmt: skip
# Enough elements for a few threads, in every way of cutting them: by channel, by tile, by rows.
SHARED_SHAPES = [
    Shape("ncs", 2, 2, 16385), Shape("ncs", 1, 1, 40001), Shape("ncs", 17, 64, 35), Shape("ncs", 3, 33, 529),
    Shape("ncs", 1500, 3, 9), Shape("nsc", 40001, 1, 1), Shape("nsc", 16385, 3, 1), Shape("nsc", 90, 20, 49),
    Shape("nsc", 1025, 100, 1), Shape("nsc", 131, 1000, 1), Shape("nsc", 20, 2049, 1),
]  # fmt: skip


def listed_shapes(limit=2_000_000):
    """The networks' shapes of data/bnorm_shapes.csv up to `limit` elements: (name, (mb, ic, id, ih, iw))."""
    with open(Path(__file__).parent / "data" / "bnorm_shapes.csv", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            sizes = tuple(int(row[key]) for key in ("mb", "ic", "id", "ih", "iw"))
            if np.prod(sizes) <= limit:
                yield f"{line}-" + "x".join(map(str, sizes)), sizes


# ---- data ----------------------------------------------------------------------------------------


def rng(*seed):
    """A generator that depends on nothing but its arguments."""
    return np.random.default_rng([zlib.crc32(repr(part).encode()) for part in seed])


def normal(shape, dtype, seed=0):
    """Values (outer, channels, inner), each channel with its own offset within 3 and scale in [0.25, 4]."""
    generator = rng(str(shape), seed)
    x = generator.standard_normal((shape.outer, shape.channels, shape.inner))
    offset = generator.uniform(-3, 3, (shape.channels, 1))
    scale = 2.0 ** generator.uniform(-2, 2, (shape.channels, 1))
    return shape.array((x * scale + offset).astype(dtype))


def gradient_of(shape, dtype, seed=0):
    """A dy for x of this shape."""
    dy = rng("dy", str(shape), seed).standard_normal((shape.outer, shape.channels, shape.inner)) + 0.25
    return shape.array(dy.astype(dtype))


def residual_of(shape, dtype, seed=0):
    """A residual for x of this shape."""
    z = rng("residual", str(shape), seed).standard_normal((shape.outer, shape.channels, shape.inner)) * 2
    return shape.array(z.astype(dtype))


def parameters(channels, dtype=np.float32, seed=0):
    """gamma of either sign and beta, both of size about 1."""
    generator = rng("parameters", channels, seed)
    gamma = generator.uniform(0.5, 2, channels) * generator.choice([-1, 1], channels)
    return gamma.astype(dtype), generator.standard_normal(channels).astype(dtype)


class Exact(NamedTuple):
    x: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def exact(shape, dtype, seed=0):
    """Data whose mean and variance come out without rounding in any order of summation (benchdnn's idea).

    Channel c holds (m + d) * 2^p: an integer m, small integers d in +- pairs side by side in memory, and 0
    where one is left over, so that any even stretch has mean m exactly; p differs by channel. Every sum of d,
    d^2 or x is then an integer below 2^53 times a power of two. The variance, sum d^2 / n, is one correctly
    rounded division; returned as float64.
    """
    generator = rng("exact", str(shape), seed)
    outer, channels, inner = (shape.outer, shape.channels, shape.inner)
    runs, length = (outer, inner) if shape.direction == "ncs" else (1, outer * inner)
    pairs = generator.integers(-8, 9, (runs, channels, length // 2))
    d = np.zeros((runs, channels, length), np.int64)
    d[..., 0 : length // 2 * 2 : 2], d[..., 1::2] = pairs, -pairs
    largest = 64 if dtype == BFLOAT16 else 1000
    m = generator.integers(-largest, largest + 1, (channels, 1))
    power = generator.integers(-6, 7, (channels, 1))
    x = np.ldexp((m + d).astype(np.float64), power)
    if shape.direction == "nsc":
        x = x.reshape(channels, outer, inner).transpose(1, 0, 2)
    mean = np.ldexp(m.astype(np.float64), power)[:, 0]
    var = np.ldexp(((d * d).sum(axis=(0, 2)) / shape.count), 2 * power[:, 0])
    stored = shape.array(x.astype(dtype))
    assert np.array_equal(stored.astype(np.float64), x), "exact data must be representable"
    return Exact(stored, mean, var)


# ---- memory layouts ------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How an image batch (n, c, h, w) lies in memory: a C-contiguous base array, and the view of it."""

    base_shape: Callable[[int, int, int, int], tuple[int, ...]]
    view: Callable[[np.ndarray], np.ndarray]


def _nhwc(base):
    return base.transpose(0, 3, 1, 2)


LAYOUTS = {
    # inner axis contiguous
    "contiguous": Layout(lambda n, c, h, w: (n, c, h, w), lambda b: b),
    "batch step": Layout(lambda n, c, h, w: (2 * n, c, h, w), lambda b: b[::2]),
    "batch reversed": Layout(lambda n, c, h, w: (n, c, h, w), lambda b: b[::-1]),
    "channel slice": Layout(lambda n, c, h, w: (n, c + 5, h, w), lambda b: b[:, 2:-3]),
    "channel step": Layout(lambda n, c, h, w: (n, 2 * c, h, w), lambda b: b[:, ::2]),
    "channel reversed": Layout(lambda n, c, h, w: (n, c, h, w), lambda b: b[:, ::-1]),
    "row crop": Layout(lambda n, c, h, w: (n, c, h + 3, w), lambda b: b[:, :, 1:-2]),
    "crop": Layout(lambda n, c, h, w: (n, c, h + 3, w + 4), lambda b: b[:, :, 1:-2, 3:-1]),
    "column step": Layout(lambda n, c, h, w: (n, c, h, 2 * w), lambda b: b[..., ::2]),
    "column reversed": Layout(lambda n, c, h, w: (n, c, h, w), lambda b: b[..., ::-1]),
    "transposed image": Layout(lambda n, c, h, w: (n, c, w, h), lambda b: b.transpose(0, 1, 3, 2)),
    "channel first": Layout(lambda n, c, h, w: (c, n, h, w), lambda b: b.transpose(1, 0, 2, 3)),
    "channel first batch step": Layout(
        lambda n, c, h, w: (c, 2 * n, h, w), lambda b: b[:, ::2].transpose(1, 0, 2, 3)
    ),
    "fortran": Layout(lambda n, c, h, w: (w, h, c, n), lambda b: b.transpose(3, 2, 1, 0)),
    "batch last": Layout(lambda n, c, h, w: (c, h, w, n), lambda b: b.transpose(3, 0, 1, 2)),
    # channels contiguous
    "nhwc": Layout(lambda n, c, h, w: (n, h, w, c), _nhwc),
    "nhwc batch step": Layout(lambda n, c, h, w: (2 * n, h, w, c), lambda b: _nhwc(b)[::2]),
    "nhwc batch reversed": Layout(lambda n, c, h, w: (n, h, w, c), lambda b: _nhwc(b)[::-1]),
    "nhwc channel slice": Layout(lambda n, c, h, w: (n, h, w, c + 5), lambda b: _nhwc(b)[:, 2:-3]),
    "nhwc channel step": Layout(lambda n, c, h, w: (n, h, w, 2 * c), lambda b: _nhwc(b)[:, ::2]),
    "nhwc row crop": Layout(lambda n, c, h, w: (n, h + 3, w, c), lambda b: _nhwc(b)[:, :, 1:-2]),
    "nhwc crop": Layout(lambda n, c, h, w: (n, h + 3, w + 4, c), lambda b: _nhwc(b)[:, :, 1:-2, 3:-1]),
}
# Layouts that walk memory in the order of a plain one, with gaps or backwards: same bits as that one.
SAME_DIRECTION = {
    "contiguous": (
        *("batch step", "batch reversed", "channel slice", "channel step", "channel reversed"),
        *("row crop", "crop", "column step", "column reversed"),
    ),
    "channel first": ("channel first batch step",),
    "nhwc": (
        *("nhwc batch step", "nhwc batch reversed", "nhwc channel slice", "nhwc channel step"),
        *("nhwc row crop", "nhwc crop"),
    ),
}


class Placed(NamedTuple):
    view: np.ndarray
    base: np.ndarray


def place(layout, values):
    """`values` (n, c, h, w) in the layout; what the view leaves out of the base is NaN: reading it shows."""
    base = np.full(LAYOUTS[layout].base_shape(*values.shape), np.nan, values.dtype)
    view = LAYOUTS[layout].view(base)
    assert view.shape == values.shape and np.shares_memory(view, base)
    view[...] = values
    return Placed(view, base)


def outside_is_untouched(placed):
    """Everything the view leaves out of its base is still NaN. Overwrites the view."""
    placed.view[...] = np.nan
    return bool(np.isnan(placed.base).all())


def at_offset(values, offset):
    """A C-contiguous copy of `values` that starts `offset` bytes past a multiple of 64."""
    raw = np.zeros(values.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    copy = np.ndarray(values.shape, values.dtype, buffer=raw, offset=start)
    copy[...] = values
    assert copy.ctypes.data % 64 == offset % 64
    return copy


def same_bits(a, b):
    """Equal bytes, element by element, whatever the strides; the sign of zero and NaN's payload count."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def subsets(names):
    return [chosen for size in range(1, len(names) + 1) for chosen in itertools.combinations(names, size)]
