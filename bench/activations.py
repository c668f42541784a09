"""Smooth activations against PyTorch: its native_batch_norm and its activation, by turns with ours.

    python bench/activations.py
    python bench/activations.py --shape 8 64 14 14 --dtype float32 --rounds 9

A number is PyTorch's time divided by ours, the median of each round's own ratio; outputs are returned. Both
live in one process and share its OpenMP threads. 16-bit types differ in what they keep: PyTorch rounds the
activation's gradient before it is summed, here it is not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import batchnorm as bn
import numpy as np
from rich.console import Console
from rich.table import Table

import machine
import options
from peers.protocol import LAYOUTS

ACTIVATIONS = ("silu", "sigmoid", "tanh")
DTYPES = ("float32", "float64", "bfloat16", "float16")
Calls = dict[str, Callable[[], Any]]


def ours(x: np.ndarray, dy: np.ndarray, axis: int, activation: str) -> Calls:
    """Forward and backward of this library."""
    parameter = np.float64 if x.dtype == np.float64 else np.float32
    gamma, beta = np.ones(x.shape[axis], parameter), np.zeros(x.shape[axis], parameter)
    given: dict[str, Any] = {"channel_axis": axis, "activation": activation}
    saved = bn.batch_norm_train(x, gamma, beta, **given).saved
    return {
        "forward": lambda: bn.batch_norm_train(x, gamma, beta, **given),
        "backward": lambda: bn.batch_norm_backward(dy, saved),
    }


def theirs(torch: Any, x: np.ndarray, dy: np.ndarray, axis: int, activation: str) -> Calls:
    """The same by PyTorch's operators, on the same memory."""
    aten = torch.ops.aten

    def tensor(a: np.ndarray) -> Any:
        bits = a.dtype.name == "bfloat16"
        t = torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(a)
        return t if axis == 1 else t.movedim(-1, 1)

    values, gradient = tensor(x), tensor(dy)
    kind = torch.float64 if x.dtype == np.float64 else torch.float32
    gamma, beta = torch.ones(x.shape[axis], dtype=kind), torch.zeros(x.shape[axis], dtype=kind)
    act, back = getattr(aten, activation), getattr(aten, f"{activation}_backward")

    def forward() -> Any:
        h, mean, inv_std = aten.native_batch_norm(values, gamma, beta, None, None, True, 0.1, 1e-5)
        return h, act(h), mean, inv_std

    h, y, *saved = forward()
    kept = h if activation == "silu" else y

    def backward() -> Any:
        g = back(gradient, kept)
        return aten.native_batch_norm_backward(
            g, values, gamma, None, None, *saved, True, 1e-5, [True, True, True]
        )

    return {"forward": forward, "backward": backward}


def seconds(call: Callable[[], Any]) -> float:
    """The mean of calls that take 20 ms together, after one."""
    call()
    begin, n = time.perf_counter(), 0
    while (now := time.perf_counter()) - begin < 0.02 or n == 0:
        call()
        n += 1
    return (now - begin) / n


def ratio(a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> float:
    """Time of a over that of b."""
    return statistics.median(seconds(a) / seconds(b) for _ in range(rounds))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", nargs=4, type=options.at_least(1), default=[32, 256, 28, 28], metavar="N")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--rounds", type=options.at_least(1), default=5)
    p.add_argument("--threads", type=options.threads, default=len(machine.cpus()), metavar="N")
    args = p.parse_args()
    try:
        import torch
    except ImportError:
        p.exit(2, "activations.py: PyTorch is not installed: pip install torch\n")
    import ml_dtypes

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    bn.set_num_threads(args.threads)
    table = Table("", *ACTIVATIONS, title=f"PyTorch {torch.__version__} / ours, forward / backward")
    generator = np.random.default_rng(0)
    for dtype in args.dtype:
        for layout in LAYOUTS:
            n, c, h, w = args.shape
            dims, axis = ((n, c, h, w), 1) if layout == "nchw" else ((n, h, w, c), -1)
            kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
            x, dy = (generator.standard_normal(dims, np.float32).astype(kind) for _ in range(2))
            cells = []
            for activation in ACTIVATIONS:
                mine, other = ours(x, dy, axis, activation), theirs(torch, x, dy, axis, activation)
                cells.append(" / ".join(f"{ratio(other[op], mine[op], args.rounds):.2f}" for op in mine))
            table.add_row(f"{dtype} {layout.upper()}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
