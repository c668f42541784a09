"""Statistics of a Dask array: moments against Dask's own mean and var, and the price of summing by samples.

    python bench/blocks.py
    python bench/blocks.py --workers 8 --rounds 15

Arrays of float32 in 16 blocks, on threads. The contestants run in turn; a ratio is the median over rounds of
their time over ours.

- `dask`: ``dask.compute(x.mean(...), x.var(...))``, which reads x once, in float32
- `dask float64`: the same of ``x.astype(float64)``
- `by samples`: ``dataset_moments(x, chunk_bytes=x[:1].nbytes)``, whose bits depend on no cut along samples;
  `by 16` with pieces of 16 samples

The error is the largest of a channel's variance, relative to that in long double.
"""

from __future__ import annotations

import argparse
import statistics
import time

import batchnorm
import dask
import dask.array as da
import numpy as np
from rich.console import Console
from rich.table import Table

SHAPES = [(256, 64, 56, 56), (1024, 256, 14, 14), (512, 2048, 7, 7), (16000, 256)]
TINY = [(32, 3, 8, 8)]


def measured(shape: tuple[int, ...], rounds: int) -> list[str]:
    values = np.random.default_rng(0).normal(100, 1, shape).astype(np.float32)
    x = da.from_array(values, chunks=(shape[0] // 16, *shape[1:]))
    rest = tuple(a for a in range(x.ndim) if a != 1)
    wide, one = x.astype(np.float64), values[:1].nbytes
    calls = {
        "ours": lambda: batchnorm.moments(x)[1],
        "dask": lambda: dask.compute(x.mean(rest), x.var(rest))[1],
        "dask float64": lambda: dask.compute(wide.mean(rest), wide.var(rest))[1],
        "by samples": lambda: batchnorm.dataset_moments(x, chunk_bytes=one, progress=False).var,
        "by 16": lambda: batchnorm.dataset_moments(x, chunk_bytes=16 * one, progress=False).var,
    }
    exact = np.stack([values[:, c].astype(np.longdouble).var() for c in range(shape[1])])
    errors = {name: float(abs(call() / exact - 1).max()) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    ours = times.pop("ours")
    ratios = [statistics.median(t / o for t, o in zip(own, ours, strict=True)) for own in times.values()]
    return [
        " x ".join(map(str, shape)), f"{statistics.median(ours) * 1e3:.1f} ms",
        *(f"{ratio:.1f}" for ratio in ratios), f"{errors['ours']:.0e}", f"{errors['dask']:.0e}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="one small array")
    options = parser.parse_args()
    table = Table(title=f"Dask {dask.__version__}, {options.workers} threads")
    for name in ("x", "ours", "dask", "dask float64", "by samples", "by 16", "error", "of dask"):
        table.add_column(name, justify="right", no_wrap=True)
    with dask.config.set(scheduler="threads", num_workers=options.workers):
        for shape in TINY if options.tiny else SHAPES:
            table.add_row(*measured(shape, options.rounds))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
