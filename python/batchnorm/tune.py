"""Thresholds measured on this machine: what ``BATCHNORM_TUNING`` suits it. No result depends on them.

Each threshold says from which size on a way of working is used: stores that go past the caches, fetching
ahead, several threads. Both ways are timed by turns at sizes in steps of two, and the threshold is put where
the one starts to win.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ._openmp import _core
from .functional import batch_norm, batch_norm_backward, batch_norm_train

__all__ = ["CALLS", "Line", "recommended", "tune"]

_NEVER = 1 << 50
_MIB = 1 << 20
CALLS = ("forward", "backward", "inference")
# Least and largest size, and how much of it is an element of x in each call. A size is bytes read and
# written, or elements that are gone through.
_THRESHOLDS = {
    "cached_bytes": (4 * _MIB, 512 * _MIB, {"forward": 8, "backward": 12, "inference": 8}),
    "fetch_bytes": (4 * _MIB, 512 * _MIB, {"forward": 8, "backward": 12, "inference": 8}),
    "parallel_elements": (1 << 12, 1 << 19, {"inference": 1}),
}
_LONG = 0.01  # seconds of a measurement, at least one call


class Line(NamedTuple):
    """One size: how many times as fast a call is beyond the threshold as below it, for each call."""

    name: str
    size: int
    gains: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Of all calls together, the geometric mean."""
        return math.prod(self.gains) ** (1 / len(self.gains))


def _call(name: str, elements: int) -> Callable[[], object]:
    """A call on float32 in runs of 3136 values, as large images have them."""
    channels = max(1, min(64, elements // 3136))
    shape = (max(2, elements // channels // 3136), channels, min(3136, max(2, elements // 2)))
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    y, dx, (mean, var) = np.empty_like(x), np.empty_like(x), np.ones((2, channels))
    saved = batch_norm_train(x).saved
    ways = (
        lambda: batch_norm_train(x, out=y),
        lambda: batch_norm_backward(y, saved, out=dx),
        lambda: batch_norm(x, mean, var, out=y),
    )
    return ways[CALLS.index(name)]


def _seconds(call: Callable[[], object]) -> float:
    """Time of a call: the best of some, as neighbours only add to it."""
    best, begin = math.inf, time.perf_counter()
    while (now := time.perf_counter()) - begin < _LONG or best == math.inf:
        call()
        best = min(best, time.perf_counter() - now)
    return best


def _gain(name: str, call: Callable[[], object], rounds: int) -> float:
    """Time of a call as if it were below the threshold, over that as if beyond: the median of some rounds."""
    ratios = []
    for _ in range(rounds):
        times = []
        for value in (_NEVER, 0):
            _core.set_tuning(f"{name}={value}")
            times.append(_seconds(call))
        ratios.append(times[0] / times[1])
    return float(np.median(ratios))


def tune(most: int | None = None, rounds: int = 5) -> Iterator[Line]:
    """Measure each threshold at each size; the settings are afterwards as before.

    Parameters
    ----------
    most : int, optional
        Sizes up to this one only.
    rounds : int
        Times that each way has its turn at each size.

    Yields
    ------
    Line
        As soon as it is measured.
    """
    before = _core.tuning()
    try:
        for name, (least, largest, units) in _THRESHOLDS.items():
            size = least
            while size <= min(largest, most or largest):
                yield Line(
                    name, size, tuple(_gain(name, _call(c, size // u), rounds) for c, u in units.items())
                )
                size *= 2
    finally:
        _core.set_tuning(before)


def recommended(lines: Iterable[Line]) -> str:
    """The value of ``BATCHNORM_TUNING`` that measurements speak for.

    A threshold lies just below the least size from which on every gain is above 1; where there is none, below
    twice the largest size.
    """
    found: dict[str, int] = {}
    for line in lines:
        found[line.name] = 2 * line.size if line.gain < 1 else found.get(line.name, line.size)
    return ",".join(f"{name}={size - 1}" for name, size in found.items())
