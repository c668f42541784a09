"""A GPU for tests of the rehearsal: memory that nobody but the kernels can touch, and arrays of made-up
libraries in it.

What reads it at any other time, as code for a real GPU must not, ends the process.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import batchnorm
import numpy as np
import pytest
from batchnorm._arrays import gpu_extension

from .checks import same_bits
from .problem import ACTIVATIONS, AFFINES, DTYPES, POSITIONS, STATS, Problem

Array = np.ndarray[Any, Any]

EXTENSION: Any = gpu_extension()
REHEARSAL = EXTENSION is not None and EXTENSION.runtime() == "rehearsal"
needs_rehearsal = pytest.mark.skipif(
    not REHEARSAL, reason="batchnorm._cuda is not a rehearsal: install with BATCHNORM_CUDA=REHEARSAL"
)

_protect = ctypes.CDLL(None, use_errno=True).mprotect
_protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NOBODY, _ALL = 0, mmap.PROT_READ | mmap.PROT_WRITE
_blocks: weakref.WeakSet[Block] = weakref.WeakSet()
_depth = 0


class Block:
    """So many bytes of the GPU's memory; in the place of the extension's own."""

    def __init__(self, size: int, device: int = 0, stream: int = 0) -> None:
        pages = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory, self.pages = mmap.mmap(-1, pages), pages
        self.pointer = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.protect(_ALL if _depth else _NOBODY)
        _blocks.add(self)

    def protect(self, access: int) -> None:
        assert _protect(self.pointer, self.pages, access) == 0


def _open() -> None:
    global _depth
    _depth += 1
    for block in list(_blocks):
        block.protect(_ALL)


def _close() -> None:
    global _depth
    _depth -= 1
    for block in list(_blocks) if _depth == 0 else ():
        block.protect(_NOBODY)


@contextmanager
def opened() -> Iterator[None]:
    """In which all may touch the memory."""
    _open()
    try:
        yield
    finally:
        _close()


@contextmanager
def powered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With this memory as the GPU's."""
    monkeypatch.setattr(EXTENSION, "Block", Block)
    EXTENSION.watch(_open, _close)
    try:
        yield
    finally:
        EXTENSION.watch(None, None)


class _OnGpu:
    """A copy of an array in the GPU's memory, gaps included."""

    def __init__(self, values: Array, device: int = 0) -> None:
        low = high = 0
        for n, stride in zip(values.shape, values.strides, strict=True):
            low, high = low + min(stride * (n - 1), 0), high + max(stride * (n - 1), 0)
        empty = values.size == 0
        self.block, self.device = Block(1 if empty else high - low + values.itemsize), device
        self.pointer = self.block.pointer - (0 if empty else low)
        self.shape, self.strides, self.dtype = values.shape, values.strides, values.dtype
        if not empty:
            with opened():
                self._view()[...] = values

    def _view(self) -> Array:
        data = (ctypes.c_char * 1).from_address(self.pointer)
        typestr = "|u1" if self.dtype.itemsize == 1 else f"<u{self.dtype.itemsize}"

        place = {"data": (ctypes.addressof(data), False), "version": 3, "typestr": typestr}
        interface = SimpleNamespace(
            __array_interface__={**place, "shape": self.shape, "strides": self.strides}
        )
        return np.asarray(interface).view(self.dtype)


class ByInterface(_OnGpu):
    """An array with ``__cuda_array_interface__``, as Numba's."""

    read_only = False
    stream: int | None = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        of = {"shape": self.shape, "strides": self.strides, "typestr": self.dtype.str, "version": 3}
        return {**of, "data": (self.pointer, self.read_only), "stream": self.stream}


class ByDlpack(_OnGpu):
    """An array that speaks DLPack alone; its library takes results over by ``from_dlpack``."""

    def __array_namespace__(self) -> Any:
        return Library

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        codes = {"b": 6, "i": 0, "u": 1, "f": 2}
        code = 4 if self.dtype.name == "bfloat16" else codes[self.dtype.kind]
        steps = [stride // self.dtype.itemsize for stride in self.strides]
        dtype = code, self.dtype.itemsize * 8
        return EXTENSION.make_capsule(self, self.pointer, self.shape, steps, dtype, (2, self.device))


class Taken(ByDlpack):
    """What its library made of a result."""

    def __init__(self, result: Any) -> None:
        self.of, (_, self.device) = result, result.__dlpack_device__()
        read = EXTENSION.read_capsule(result.__dlpack__(stream=1))
        self.keeper, self.pointer, self.shape = read[0], read[1], tuple(read[2])
        self.strides, self.dtype = result.strides, result.dtype


class Library:
    """The namespace of `ByDlpack`."""

    from_dlpack = Taken


def on_cpu(value: Any) -> Any:
    """A copy of an array of the GPU, or of each in a result; anything else as it is."""
    if isinstance(value, _OnGpu):
        with opened():
            return value._view().copy(order="K")
    if hasattr(value, "__cuda_array_interface__"):
        of = value.__cuda_array_interface__
        seen = ByInterface.__new__(ByInterface)
        seen.pointer, seen.shape, seen.strides = of["data"][0], of["shape"], of["strides"]
        seen.dtype = value.dtype
        return on_cpu(seen)
    return value


def same_but_nan(a: Array, b: Array) -> bool:
    """The same bits, and NaN where the other has any NaN."""
    if a.dtype.kind in "biu":
        return same_bits(a, b)
    nan = np.isnan(a.astype(np.float64)), np.isnan(b.astype(np.float64))
    if a.shape != b.shape or a.dtype != b.dtype or not np.array_equal(*nan):
        return False
    return same_bits(np.where(nan[0], a.dtype.type(0), a), np.where(nan[1], a.dtype.type(0), b))


# ---- calls there -------------------------------------------------------------------------------------------

LAYOUTS = ("C", "channels last", "batch last", "C, step 0", "channels last, crop 0")
CROSSED: dict[str, Any] = {
    "shape": [(6, 3, (5,)), (6, 4, ()), (4, 17, (3,)), (8, 2, (2, 2)), (2, 70, (3, 9)), (1, 1, (33,))],
    "last": [False, True], "dtype": DTYPES, "stats": STATS, "size": [None, 2, 3], "positions": POSITIONS,
    "affine": AFFINES, "activation": ACTIVATIONS, "residual": [False, True], "running": [False, True],
    "layout": LAYOUTS,
}  # fmt: skip


def crossed(n: int, seed: int) -> Iterator[Problem]:
    """Combinations, the same every time, in which every value of every option occurs about equally often."""
    choose = random.Random(seed)
    columns = {name: list(itertools.islice(itertools.cycle(v), n)) for name, v in CROSSED.items()}
    for column in columns.values():
        choose.shuffle(column)
    for row in zip(*columns.values(), strict=True):
        chosen = dict(zip(columns, row, strict=True))
        p = Problem(*chosen.pop("shape"), **chosen)
        if p.forbidden() is None:
            yield p


def sent(value: Any, send: Callable[[Array], Any]) -> Any:
    """Arguments with their arrays on the GPU, but for lengths."""
    if isinstance(value, dict):
        return {name: a if name == "lengths" else sent(a, send) for name, a in value.items()}
    return send(value) if isinstance(value, np.ndarray) else value


def results(p: Problem, send: Callable[[Array], Any]) -> dict[str, Any]:
    """As `Problem.results`, by arrays on the GPU, which stay there."""
    options = sent(p.options(), send)
    parameters = [sent(a, send) for a in p.parameters]
    y, saved = batchnorm.batch_norm_train(send(p.x), *parameters, **options)
    made = {"y": y, **{name: getattr(saved, name) for name in ("mean", "var", "inv_std", "count")}}
    made |= {name: options[name] for name in ("running_mean", "running_var") if p.running}
    if "renorm" in p.stats:
        made |= {"r": saved.r, "d": saved.d}
    got = batchnorm.batch_norm_backward(send(p.dy), saved)
    made |= {name: getattr(got, name) for name in ("dx", "dgamma", "dbeta", "dresidual")}
    return {name: a for name, a in made.items() if a is not None}


def differing(p: Problem, made: dict[str, Any], fetch: Callable[[Any], Array]) -> list[str]:
    """Names of results that are not the CPU's."""
    want = p.results()
    assert want.keys() == made.keys(), p
    return [name for name, a in want.items() if not same_but_nan(a, fetch(made[name]))]
