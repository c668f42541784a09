"""What run.py and a contestant say to each other. run.py writes one line of words, the contestant answers
with one line of JSON:

    case op=forward dims=32,64,56,56 axis=1 dtype=float32 activation=relu outputs=reused
                                             -> {"ok": true} or {"unsupported": "the reason"}
    time warm=1 repeat=3 inner=20            -> {"seconds": [per call, ...]}   (repeat values)
    sample count=16                          -> {"sample": [...]}   values of the results, to compare
    drop                                     -> {"ok": true}   the arrays are freed

The first line of a contestant, unasked, is {"version": "..."} or {"absent": "the reason"}. Requests are words
and not JSON because contestants in C++ read them too; nothing in them needs quoting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
EPS = 1e-5
DECAY = 0.9
ITEM = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
OPS = ("forward", "backward", "inference")
ACTIVATIONS = ("none", "relu", "residual_relu")
LAYOUTS = ("nchw", "nhwc")
OUTPUTS = ("reused", "returned")


class Unsupported(Exception):
    """This contestant cannot do the case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One thing to measure. `outputs` is "reused" (written to the same memory by every call, where the
    contestant's interface allows) or "returned" (the call that people write, with its allocations)."""

    op: str
    dims: tuple[int, ...]
    axis: int
    dtype: str = "float32"
    activation: str = "none"
    outputs: str = "reused"

    @property
    def channels(self) -> int:
        return self.dims[self.axis]

    @property
    def outer(self) -> int:
        return math.prod(self.dims[: self.axis])

    @property
    def inner(self) -> int:
        return math.prod(self.dims[self.axis + 1 :])

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of one tensor."""
        return self.elements * ITEM[self.dtype]

    @property
    def relu(self) -> bool:
        return self.activation != "none"

    @property
    def residual(self) -> bool:
        return self.activation == "residual_relu"

    def words(self) -> str:
        """The request line."""
        dims = ",".join(map(str, self.dims))
        return (
            f"case op={self.op} dims={dims} axis={self.axis} dtype={self.dtype} "
            f"activation={self.activation} outputs={self.outputs}"
        )

    @classmethod
    def parse(cls, words: dict[str, str]) -> Case:
        """The inverse of `words`."""
        dims = tuple(int(d) for d in words["dims"].split(","))
        return cls(
            words["op"], dims, int(words["axis"]), words["dtype"], words["activation"], words["outputs"]
        )


@dataclass(frozen=True)
class Work:
    """A case made ready: `call` is what is timed; `results` says what it computed, in the case's layout:
    [y], or [dx, dgamma, dbeta] and the gradient of the residual if there is one."""

    call: Callable[[], object]
    results: Callable[[], list[Array]]


def uniform(count: int, seed: int) -> Array:
    """float32 values in [-1, 1) that every contestant, in any language, computes alike: a hash of indices."""
    values = np.empty(count, np.float32)
    for start in range(0, count, 1 << 20):  # chunks bound the temporaries
        stop = min(count, start + (1 << 20))
        h = np.arange(start, stop, dtype=np.uint64).astype(np.uint32)
        h += np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
        for multiplier, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13)):
            h *= np.uint32(multiplier)
            h ^= h >> np.uint32(shift)
        values[start:stop] = (h >> np.uint32(8)) * np.float32(2**-23) - np.float32(1)
    return values


def storage(dtype: str) -> np.dtype[Any]:
    """NumPy's dtype of that name."""
    if dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise Unsupported("bfloat16 needs the package ml_dtypes in this interpreter") from None
        dtype = ml_dtypes.bfloat16
    kind: np.dtype[Any] = np.dtype(dtype)
    return kind


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case. Per-channel values are float64 for float64 data, float32 for the rest."""

    x: Array
    dy: Array | None
    residual: Array | None
    gamma: Array
    beta: Array
    mean: Array
    var: Array


def inputs(case: Case) -> Inputs:
    """What every contestant is given."""
    kind = storage(case.dtype)

    def tensor(seed: int) -> Array:
        values = uniform(case.elements, seed).reshape(case.dims)
        values *= np.float32(1.5)
        values += np.float32(0.5)
        return values.astype(kind, copy=False)

    def channel(seed: int, offset: float) -> Array:
        parameter = np.float64 if case.dtype == "float64" else np.float32
        return (0.5 * uniform(case.channels, seed) + np.float32(offset)).astype(parameter)

    return Inputs(
        tensor(1),
        tensor(2) if case.op == "backward" else None,
        tensor(3) if case.residual else None,
        channel(4, 1),
        channel(5, 0),
        channel(6, 0),
        channel(7, 1),
    )


def empty(case: Case) -> Array:
    """An output whose pages exist already."""
    out = np.empty(case.dims, storage(case.dtype))
    out.view(np.uint8)[...] = 0
    return out


def as_rows(case: Case, a: Array) -> Array:
    """The array as (outer, channels, inner), no copy."""
    return a.reshape(case.outer, case.channels, case.inner)


def sample(arrays: list[Array], count: int) -> list[float]:
    """`count` values of each array, evenly spread over its memory order."""
    picked: list[float] = []
    for a in arrays:
        flat = a.reshape(-1)
        positions = [i * (flat.size - 1) // max(1, count - 1) for i in range(count)]
        picked += [float(flat[p]) for p in positions]
    return picked
