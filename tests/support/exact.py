"""Data whose mean and variance come out without rounding in any order of summation (benchdnn's idea), and the
sizes at which kernels change what they do.

A kernel works on blocks of 16 lanes. A channel is cut into tiles of at most 16384 values if these are
contiguous, and into tiles of rows if the channels are, from 512 rows on into multiples of 16 tiles. Fewer
than 64 channels are folded, several rows to one; more than 2048 are divided. EDGES steps over those sizes by
one on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .problem import BFLOAT16, rng

Array = np.ndarray[Any, Any]


class Shape(NamedTuple):
    """A tensor (outer, channels, inner); `last`: channels are contiguous in memory, else inner is."""

    outer: int
    channels: int
    inner: int = 1
    last: bool = False

    @property
    def count(self) -> int:
        return self.outer * self.inner

    def array(self, values: Array) -> Array:
        """`values`, indexed (outer, channels, inner), in this shape's memory order."""
        order = (0, 2, 1) if self.last else (0, 1, 2)
        return np.ascontiguousarray(values.transpose(order)).transpose(order)


class Exact(NamedTuple):
    x: Array
    mean: Array
    var: Array


def exact(shape: Shape, dtype: Any) -> Exact:
    """Data, and its mean and population variance as float64.

    Channel c holds (m + d) * 2^p: an integer m, small integers d in +- pairs side by side in memory, and 0
    where one is left over, so that any even stretch has mean m exactly; p differs by channel. Every sum of d,
    d^2 or x is then an integer below 2^53 times a power of two. The variance, sum d^2 / n, is one correctly
    rounded division.
    """
    generator = rng("exact", *shape)
    outer, channels, inner, last = shape
    runs, length = (1, outer * inner) if last else (outer, inner)
    pairs = generator.integers(-8, 9, (runs, channels, length // 2))
    d = np.zeros((runs, channels, length), np.int64)
    d[..., 0 : length // 2 * 2 : 2], d[..., 1::2] = pairs, -pairs
    largest = 64 if dtype == BFLOAT16 else 1000
    m = generator.integers(-largest, largest + 1, (channels, 1))
    power = generator.integers(-6, 7, (channels, 1))
    x = np.ldexp((m + d).astype(np.float64), power)
    if last:
        x = x.reshape(channels, outer, inner).transpose(1, 0, 2)
    mean = np.ldexp(m.astype(np.float64), power)[:, 0]
    var = np.ldexp(((d * d).sum(axis=(0, 2)) / shape.count), 2 * power[:, 0])
    stored = shape.array(x.astype(dtype))
    assert np.array_equal(stored.astype(np.float64), x), "exact data must be representable"
    return Exact(stored, mean, var)


def around(*sizes: int) -> list[int]:
    """Each size, one less and one more."""
    return [n + step for n in sizes for step in (-1, 0, 1)]


def _edges() -> Iterator[Shape]:
    for length in (1, 2, *around(16, 32, 64, 128, 512, 4096, 8192)):
        yield from (Shape(1, 3, length), Shape(3, 2, length))
        yield from (Shape(length, channels, last=True) for channels in (1, 3, 16, 20, 64, 65))
    for length in around(16384, 32768):
        yield from (Shape(2, 2, length), Shape(length, 1, last=True), Shape(length, 3, last=True))
    for channels in (*range(1, 21), *around(32, 64, 2048), 100, 128, 1000, 4097):
        yield from (Shape(2, channels, 5), Shape(3, channels, 33), Shape(5, channels, last=True))
        # Rows are taken four at a time: 37, 38 and 39 leave one, two and three over.
        yield from (Shape(rows, channels, last=True) for rows in (37, 38, 39))
        yield Shape(3, channels, 43, last=True)
    yield from (Shape(300, 2, 7), Shape(1025, 4, 4), Shape(33, 5, 128), Shape(17, 64, 35))
    yield from (Shape(1025, 100, last=True), Shape(130, 1000, last=True))
    yield from (Shape(9, 7, 121, last=True), Shape(15, 64, 35, last=True))


EDGES = list(dict.fromkeys(_edges()))
# One shape for each kind of edge, for tests that multiply shapes by much else.
SOME = [
    Shape(1, 3, 17), Shape(3, 2, 4097), Shape(5, 20, 49), Shape(2, 65, 33), Shape(300, 2, 7),
    Shape(17, 3, last=True), Shape(4097, 3, last=True), Shape(245, 20, last=True), Shape(33, 65, last=True),
    Shape(9, 16, 49, last=True), Shape(38, 1000, last=True),
]  # fmt: skip
