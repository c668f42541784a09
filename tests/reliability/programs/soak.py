"""So many calls, forward and backward, of functions and layers, one in seven of them refused: memory, threads
and descriptors stay as they are, and so do the results.

python soak.py CALLS
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from collections.abc import Callable
from typing import Any

import batchnorm
import numpy as np
from batchnorm import BatchNorm, batch_norm_backward, batch_norm_train

Array = np.ndarray[Any, Any]
LAP = 10_000


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def counts() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def problems() -> list[tuple[Array, int, BatchNorm]]:
    generator = np.random.default_rng(0)
    made = []
    for dtype in (np.float32, np.float64, np.float16):
        for shape, axis in (((4, 8, 30), 1), ((60, 12), -1), ((2, 300, 200), 1)):
            x = generator.standard_normal(shape).astype(dtype)
            made.append((x, axis, BatchNorm(shape[axis], channel_axis=axis, decay=0.0)))
    return made


PROBLEMS = problems()
REFUSED: list[Callable[[Array, int, Any], Any]] = [
    lambda x, axis, saved: batch_norm_train(x, channel_axis=axis, eps=-1.0),
    lambda x, axis, saved: batch_norm_train(x, channel_axis=7),
    lambda x, axis, saved: batch_norm_train(x, np.ones(1), channel_axis=axis),
    lambda x, axis, saved: batch_norm_train(x.astype(int)),
    lambda x, axis, saved: batch_norm_backward(x[:1], saved),
    lambda x, axis, saved: batch_norm_backward(x, None),  # type: ignore[arg-type]
    lambda x, axis, saved: batch_norm_train(x, channel_axis=axis, out=x[::-1]),
]
PERIOD = 3 * 7 * len(PROBLEMS)


def step(i: int, digest: Any) -> None:
    """A forward and a backward of functions or of a layer; every seventh is followed by a refused call."""
    x, axis, layer = PROBLEMS[i % len(PROBLEMS)]
    activation = ("relu", None, "silu")[i % 3]
    keep = "y" if activation is None else "x"
    y, saved = batch_norm_train(x, channel_axis=axis, activation=activation, keep=keep)  # type: ignore[arg-type]
    if i % 2:
        dx = batch_norm_backward(x, saved).dx
    else:
        layer(x)
        dx = layer.backward(x)
    if i % 7 == 0:
        try:
            REFUSED[i // 7 % len(REFUSED)](x, axis, saved)
        except (TypeError, ValueError):
            pass
        else:
            raise AssertionError(f"call {i} was not refused")
    if digest is not None:
        for a in (y, dx, layer.running_var):
            digest.update(np.ascontiguousarray(a).tobytes())


def lap(n: int) -> str:
    """A hash of results of the first ones of n steps."""
    digest = hashlib.sha256()
    for i in range(n):
        step(i, digest if i < PERIOD else None)
    gc.collect()
    batchnorm.empty_cache()
    return digest.hexdigest()


def main() -> None:
    calls = int(sys.argv[1])
    for _ in range(3):
        want = lap(3 * PERIOD)
    before, threads, grown = resident(), counts(), 0
    for done in range(0, calls, LAP):
        assert lap(min(LAP, calls - done)) == want, "other results than at first"
        assert counts() == threads, f"threads and descriptors were {threads}, are {counts()}"
        grown = max(grown, resident() - before)
    print(grown / 2**20)


if __name__ == "__main__":
    main()
