"""CuPy's arrays, rehearsed with what the package asks of CuPy, whose own needs a GPU: the CPU's bits."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train

from support.gpu import EXTENSION, crossed, differing, needs_rehearsal, results, same_but_nan
from support.problem import Problem

pytestmark = needs_rehearsal

P = Problem(6, 3, (4, 5))


class Memory:
    """cupy.cuda.MemoryPointer"""

    def __init__(self, held: Any, offset: int = 0) -> None:
        self.held, self.offset, self.ptr = held, offset, held.ctypes.data + offset

    def __add__(self, offset: int) -> Memory:
        return Memory(self.held, self.offset + offset)


class Ndarray:
    """cupy.ndarray"""

    def __init__(self, shape: Any, dtype: Any, memptr: Memory, strides: Any = None) -> None:
        self.values = np.ndarray(shape, dtype, memptr.held, memptr.offset, strides)
        self.data, self.device = memptr, SimpleNamespace(id=0)
        self.shape, self.strides, self.dtype = self.values.shape, self.values.strides, self.values.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __getitem__(self, index: Any) -> Ndarray:
        return of(self.values[index])

    def __gt__(self, other: Ndarray) -> Ndarray:
        return of(self.values > other.values)

    def astype(self, dtype: Any, order: str) -> Ndarray:
        return of(self.values.astype(dtype, order=order))


def of(values: Any) -> Ndarray:
    """An array like these values, with their strides."""
    size = sum((n - 1) * stride for n, stride in zip(values.shape, values.strides, strict=True))
    made = Ndarray(
        values.shape, values.dtype, Memory(np.zeros(size + values.itemsize, np.uint8)), values.strides
    )
    made.values[...] = values
    return made


def as_strided(a: Ndarray, shape: Any, strides: Any) -> Ndarray:
    return Ndarray(shape, a.dtype, a.data, strides)


CUPY = SimpleNamespace(
    ndarray=Ndarray, asarray=of, lib=SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=as_strided)),
    full=lambda shape, value, dtype: of(np.full(shape, value, dtype)), arange=lambda n: of(np.arange(n)),
    copyto=lambda to, values: np.copyto(to.values, values.values),
    cuda=SimpleNamespace(
        alloc=lambda size: Memory(np.empty(max(size, 1), np.uint8)),
        Device=lambda index: contextlib.nullcontext(), get_current_stream=lambda: SimpleNamespace(ptr=5),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", CUPY)


def test_every_option_has_the_bits_of_the_cpu():
    for p in crossed(200, 3):
        made = results(p, of)
        assert all(isinstance(a, Ndarray) for a in made.values())
        found = differing(p, made, lambda a: a.values)
        assert not found, f"{p}: {found}"


def test_lengths_and_seen_values_there(monkeypatch):
    streams, run = [], EXTENSION.run
    monkeypatch.setattr(
        EXTENSION, "run", lambda place, *of: (streams.append(place.stream), run(place, *of))[1]
    )
    lengths, mean, var = np.array([4, 3, 2, 1, 0, 4]), np.zeros(3), np.ones(3)
    options = {"lengths_axis": 2, "decay": None, "seen": 5.0}
    there = of(mean), of(var)
    y, saved = train(of(P.x), lengths=of(lengths), running_mean=there[0], running_var=there[1], **options)
    want, kept = train(P.x, lengths=lengths, running_mean=mean, running_var=var, **options)
    assert same_but_nan(y.values, want) and same_but_nan(there[1].values, var)
    assert same_but_nan(backward(of(P.dy), saved).dx.values, backward(P.dy, kept).dx)
    assert streams == [5, 5]


def test_what_is_refused():
    with pytest.raises(
        TypeError, match=r"gamma is .* on the CPU .*; use cupy.asarray\(gamma\), with x.device"
    ):
        train(of(P.x), np.ones(3))
    other = of(np.ones(3))
    other.device = SimpleNamespace(id=1)
    with pytest.raises(ValueError, match=r"gamma is .* on cuda:1 and x is on cuda:0, expected arrays on one"):
        train(of(P.x), other)
