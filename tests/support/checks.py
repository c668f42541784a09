"""Comparisons that tests share."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import batchnorm
import numpy as np
from batchnorm import _core

Array = np.ndarray[Any, Any]


def same_bits(a: Any, b: Any) -> bool:
    """Equal bytes, element by element, whatever the strides; the sign of zero and NaN's payload count."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def all_same_bits(these: Iterable[Any], those: Iterable[Any]) -> bool:
    return all(same_bits(a, b) for a, b in zip(these, those, strict=True))


def gradients(got: Any) -> list[Array]:
    """Those of a result that are there."""
    four = (got.dx, got.dgamma, got.dbeta, got.dresidual)
    return [g for g in four if g is not None]


@np.errstate(all="ignore")
def excess(got: Any, want: Any, bound: Any) -> float:
    """The largest error over its bound; NaN and infinities must be where they are wanted."""
    got = np.asarray(got)
    wide = got if got.dtype == np.longdouble else got.astype(np.float64).astype(np.asarray(want).dtype)
    same = (wide == want) | (np.isnan(wide) & np.isnan(want))
    ratio = np.where(same, 0, np.abs(wide - want) / bound)
    return float(np.where(np.isnan(ratio), np.inf, ratio).max(initial=0))


@contextlib.contextmanager
def running_on(
    isa: str | None = None, threads: int | None = None, tuning: str | None = None
) -> Iterator[None]:
    """This instruction set, so many threads, work laid out like this; as before afterwards."""
    before = batchnorm.get_isa(), batchnorm.get_num_threads(), _core.tuning()
    try:
        if isa is not None:
            batchnorm.set_isa(isa)
        if threads is not None:
            batchnorm.set_num_threads(threads)
        if tuning is not None:
            _core.set_tuning(tuning)
        yield
    finally:
        batchnorm.set_isa(before[0])
        batchnorm.set_num_threads(before[1])
        _core.set_tuning(before[2])


THREADS = (1, 2, 3, 7)


def environments() -> list[tuple[str, int]]:
    """Every instruction set of this machine, with every number of threads."""
    return list(itertools.product(batchnorm.isa_levels(), THREADS))


def differing(these: Mapping[str, Any], those: Mapping[str, Any]) -> list[str]:
    """Names of results whose bits differ."""
    assert these.keys() == those.keys()
    return [name for name, a in these.items() if not same_bits(a, those[name])]
