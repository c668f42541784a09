"""Image preprocessing: one call against the steps people write in NumPy and in torch.

    python bench/images.py
    python bench/images.py --threads 1 --rounds 9 --isa avx2

uint8 photos [N, H, W, 3] become float32 planes [N, 3, H, W], ``(x / 255 - mean) / std``. The contestants run
in turn, on the same array, with the same number of threads; a ratio is the median over rounds of their time
over ours.

- `numpy`: float32 arithmetic, then the copy into planes, as tutorials write it; NumPy knows one thread
- `torchvision`: what its ToTensor and Normalize do for arrays, written in torch: permute, contiguous, to
  float, div 255; then sub_ and div_ in place
- `returned`: our call as people write it, without ``out=``

GB/s counts one byte read and four written per value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import batchnorm
import numpy as np
from rich.console import Console
from rich.table import Table

SIZES = {
    "1 x 224 x 224": (1, 224, 224),
    "32 x 224 x 224": (32, 224, 224),
    "1 x 1080 x 1920": (1, 1080, 1920),
    "128 x 224 x 224": (128, 224, 224),
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TARGET = 0.05  # seconds of one stretch
Call = Callable[[], object]


def contestants(x: np.ndarray, threads: int) -> dict[str, Call]:
    """Our call first, each returning planes."""
    out = np.empty((x.shape[0], 3, *x.shape[1:3]), np.float32)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)

    def with_numpy() -> np.ndarray:
        y = x.astype(np.float32)
        y /= 255
        y -= mean
        y /= std
        return np.ascontiguousarray(y.transpose(0, 3, 1, 2))

    calls: dict[str, Call] = {
        "batchnorm": lambda: batchnorm.normalize_images(x, MEAN, STD, num_threads=threads, out=out),
        "returned": lambda: batchnorm.normalize_images(x, MEAN, STD, num_threads=threads),
        "numpy": with_numpy,
    }
    try:
        import torch
    except ImportError:
        return calls
    torch.set_num_threads(threads)
    image = torch.from_numpy(x)
    torch_mean, torch_std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def with_torch() -> torch.Tensor:
        y = image.permute(0, 3, 1, 2).contiguous().to(torch.float32).div(255)
        return y.sub_(torch_mean).div_(torch_std)

    calls[f"torchvision, torch {torch.__version__}"] = with_torch
    return calls


def seconds(call: Call) -> float:
    """Time of one call, the mean of a stretch, after one that warms up."""
    call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    n = max(1, int(TARGET / once))
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=batchnorm.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", choices=batchnorm.isa_levels(), default=batchnorm.get_isa())
    options = parser.parse_args()
    batchnorm.set_isa(options.isa)
    table = Table(
        "size", "time", "GB/s", title=f"uint8 to float32 planes, {options.threads} threads, {options.isa}"
    )
    for size, (n, h, w) in SIZES.items():
        x = np.random.default_rng(0).integers(0, 256, (n, h, w, 3), dtype=np.uint8)
        calls = contestants(x, options.threads)
        ours, *others = calls
        for name in others:
            np.testing.assert_allclose(np.asarray(calls[name]()), calls[ours](), rtol=1e-5, atol=1e-6)
        rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(options.rounds)]
        if not table.rows:
            for name in others:
                table.add_column(name, justify="right")
        best = statistics.median(r[ours] for r in rounds)
        ratios = [statistics.median(r[name] / r[ours] for r in rounds) for name in others]
        table.add_row(
            size, f"{best * 1e3:.3g} ms", f"{5 * x.size / best / 1e9:.1f}", *(f"{r:.3g}" for r in ratios)
        )
    Console().print(table)


if __name__ == "__main__":
    main()
