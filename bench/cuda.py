"""Batch normalization on a GPU against PyTorch's, and against the copy of the same run.

    python bench/cuda.py                      ResNet-50's layers at batch 128, float32 and bfloat16
    python bench/cuda.py --small              small shapes, where launches decide
    python bench/cuda.py --json report.json   keep it

Every call is captured into a CUDA graph over several sets of arrays, together larger than the caches (or
256 sets), and replayed: what is measured is the GPU's time, not Python's. All contestants are replayed in
turn, several rounds, and the median counts. ``torch`` is what ``torch.nn.functional.batch_norm`` chooses
(cuDNN where it can), ``native`` is the same with cuDNN switched off; that it is off is checked by the names
of the kernels. Read the ratios (theirs / ours; above 1 we are faster) and the share of the copy's speed:
bytes that must move, at the speed at which this run copied as many, over our time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import batchnorm
import torch
from rich.console import Console
from rich.table import Table

from shapes import Shape, shapes_of

OPS = ("forward", "backward", "inference")
# Tensors that each operation reads or writes at least, and with a second reading of what is summed.
MINIMAL = {"forward": 2, "backward": 3, "inference": 2}
REAL = {"forward": 3, "backward": 5, "inference": 2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = [
    Shape(1, 1, 256, (14, 14)), Shape(1, 8, 256, (14, 14)), Shape(1, 32, 64, (8, 8)),
    Shape(1, 64, 512, (4, 4)), Shape(1, 256, 16, (8, 8)), Shape(1, 64, 512, ()),
]  # fmt: skip
FLUSH = 400 << 20  # bytes of a set of sets: several times what a GPU's cache holds


class Arrays(NamedTuple):
    """What one call reads and writes."""

    x: torch.Tensor
    dy: torch.Tensor
    out: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


def arrays(shape: Shape, layout: str, dtype: torch.dtype) -> Arrays:
    def tensor() -> torch.Tensor:
        t = torch.randn(shape.dims("nchw"), device="cuda", dtype=dtype)
        if layout == "nhwc" and t.ndim == 4:
            t = t.to(memory_format=torch.channels_last)
        return t

    def vector(low: float) -> torch.Tensor:
        return torch.rand(shape.channels, device="cuda") + low

    x = tensor()
    return Arrays(x, tensor(), torch.empty_like(x), vector(0.5), vector(0), vector(0), vector(0.5))


# ---- contestants: a call that prepares, then the one that is measured -------------------------------------


def ours(op: str, a: Arrays, activation: str | None) -> Callable[[], Any]:
    act = {"activation": activation}
    if op == "inference":
        return lambda: batchnorm.batch_norm(a.x, a.mean, a.var, a.gamma, a.beta, out=a.out, **act)
    if op == "forward":
        return lambda: batchnorm.batch_norm_train(a.x, a.gamma, a.beta, out=a.out, **act)
    _, saved = batchnorm.batch_norm_train(a.x, a.gamma, a.beta, **act)
    return lambda: batchnorm.batch_norm_backward(a.dy, saved, out=a.out)


def torchs(op: str, a: Arrays, activation: str | None) -> Callable[[], Any]:
    def forward() -> tuple[Any, ...]:
        return torch._batch_norm_impl_index(
            a.x, a.gamma, a.beta, None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled
        )

    def bent(y: torch.Tensor) -> torch.Tensor:
        return torch.relu_(y) if activation else y

    if op == "inference":
        return lambda: bent(torch.nn.functional.batch_norm(a.x, a.mean, a.var, a.gamma, a.beta))
    if op == "forward":
        return lambda: bent(forward()[0])
    y, save_mean, save_var, reserve, index = forward()
    y = bent(y)
    mask = [True, True, True]

    def backward() -> Any:
        dy = torch.ops.aten.threshold_backward(a.dy, y, 0) if activation else a.dy
        return torch.ops.aten._batch_norm_impl_index_backward(
            index, a.x, dy, a.gamma, None, None, save_mean, save_var, True, 1e-5, mask, reserve
        )

    return backward


def copying(op: str, a: Arrays, activation: str | None) -> Callable[[], Any]:
    del op, activation
    return lambda: a.out.copy_(a.x)


CONTESTANTS = {"ours": ours, "torch": torchs, "native": torchs, "copy": copying}


def uses_cudnn(call: Callable[[], Any]) -> bool:
    """Whether a kernel of cuDNN ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return any("cudnn" in event.key.lower() for event in profile.key_averages())


class Replay:
    """A contestant's call over several sets of arrays, captured."""

    def __init__(
        self, name: str, op: str, sets: list[Arrays], activation: str | None, look: bool = False
    ) -> None:
        self.sets = len(sets)
        with torch.backends.cudnn.flags(enabled=name != "native"):
            calls = [CONTESTANTS[name](op, a, activation) for a in sets]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for call in calls[:2] * 2:
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            self.cudnn = uses_cudnn(calls[0]) if look and name in ("torch", "native") else None
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = [call() for call in calls]

    def seconds(self, repeats: int) -> float:
        """Of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats / self.sets


def measure(
    op: str, shape: Shape, layout: str, dtype: str, activation: str | None, rounds: int, look: bool
) -> dict[str, Any]:
    """Medians in seconds by contestant; if `look`, whether torch's were cuDNN's."""
    nbytes = shape.elements * DTYPES[dtype].itemsize
    n = max(1, min(256, math.ceil(FLUSH / (3 * nbytes))))
    sets = [arrays(shape, layout, DTYPES[dtype]) for _ in range(n)]
    replays = {name: Replay(name, op, sets, activation, look) for name in CONTESTANTS}
    if replays["native"].cudnn:
        raise RuntimeError("cuDNN ran although torch.backends.cudnn.flags(enabled=False) was set")
    times: dict[str, list[float]] = {name: [] for name in replays}
    repeats = max(1, min(50, int(2e-3 / max(replays["copy"].seconds(1) * n, 1e-6))))
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(replay.seconds(repeats))
    result: dict[str, Any] = {name: statistics.median(t) for name, t in times.items()}
    result["torch_is_cudnn"] = replays["torch"].cudnn
    return result


def cases(args: argparse.Namespace) -> Iterator[tuple[str, str, str, str | None]]:
    for dtype in args.dtype:
        for layout in args.layout:
            for op in args.op:
                for activation in args.activation:
                    yield op, layout, dtype, None if activation == "none" else activation


def geometric(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(op: str, rows: list[tuple[Shape, dict[str, Any]]]) -> dict[str, float]:
    """Weighted totals of a group, its worst layer, and shares of the copy's speed."""
    total = {n: sum(s.weight * r[n] for s, r in rows) for n in CONTESTANTS}
    ratios = [min(r["torch"], r["native"]) / r["ours"] for _, r in rows]
    return {
        "ms": total["ours"] * 1e3,
        "torch": total["torch"] / total["ours"],
        "native": total["native"] / total["ours"],
        "geometric": geometric(ratios),
        "worst": min(ratios),
        "share": total["copy"] * MINIMAL[op] / 2 / total["ours"],
        "real": total["copy"] * REAL[op] / 2 / total["ours"],
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="small shapes instead of ResNet-50's")
    p.add_argument("--batch", type=int, default=128, metavar="N", help="of ResNet-50 (default: 128)")
    p.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    p.add_argument("--layout", nargs="+", choices=("nchw", "nhwc"), default=["nchw", "nhwc"])
    p.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32", "bfloat16"])
    p.add_argument("--activation", nargs="+", choices=("none", "relu"), default=["none", "relu"])
    p.add_argument("--rounds", type=int, default=5, metavar="N")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    return p


def shapes(args: argparse.Namespace) -> list[Shape]:
    if args.small:
        return SMALL
    return [s._replace(batch=args.batch) for s in shapes_of("r50")]


def main() -> int:
    """Command line."""
    args = parser().parse_args()
    console = Console(width=None if sys.stdout.isatty() else 130)
    if not torch.cuda.is_available():
        console.print("PyTorch sees no GPU")
        return 1
    properties = torch.cuda.get_device_properties(0)
    about = f"{properties.name}, {properties.multi_processor_count} SMs, torch {torch.__version__}"
    console.print(about, highlight=False)
    results: list[dict[str, Any]] = []
    table = Table("case", "ms", "torch / ours", "native", "geo. mean", "worst", "share", "real")
    for op, layout, dtype, activation in cases(args):
        rows = []
        for shape in shapes(args):
            measured = measure(op, shape, layout, dtype, activation, args.rounds, look=not rows)
            rows.append((shape, measured))
            case = {"op": op, "layout": layout, "dtype": dtype, "activation": activation}
            results.append({**case, "shape": str(shape), "weight": shape.weight, **measured})
            torch.cuda.empty_cache()
        s = summary(op, rows)
        name = f"{layout} {dtype} {op}" + (f" + {activation}" if activation else "")
        table.add_row(name, f"{s['ms']:.3f}", *(f"{s[k]:.2f}" for k in list(s)[1:]))
        console.print(name, *(f"{k} {v:.3f}" for k, v in s.items()), highlight=False)
        if args.json:  # each time, as a machine may be lent for less than it takes
            args.json.write_text(json.dumps({"machine": about, "results": results}, indent=1))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
