"""Measure batch normalization against its peers.

    python bench/run.py --set r50 --op forward backward inference --layout nchw nhwc --peers torch numpy

Every contestant lives in a process of its own (see peers.py), threads pinned, outputs reused. Each case is
run by all in turn, several rounds, so that a noisy neighbour meets them alike; reported is the median over
rounds. Absolute times mean nothing on a shared machine: read the ratios (peer's time / ours; above 1 we are
faster) and the share of the copy bandwidth measured in the same rounds on the same number of bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shapes import SETS, Shape

HERE = Path(__file__).resolve().parent
# Fewest passes over memory, in units of the tensor: forward reads x and writes y, backward reads dy and x
# and writes dx.
TRAFFIC = {"forward": 2, "backward": 3, "inference": 2}
ITEM = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


class Contestant:
    """One peer's process."""

    def __init__(self, name: str, threads: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        env = dict(os.environ)
        env |= {
            "OMP_NUM_THREADS": str(threads),
            "OMP_PROC_BIND": "close",
            "OMP_PLACES": ",".join(f"{{{c}}}" for c in cpus),
            "MKL_NUM_THREADS": str(threads),
            # Outputs of peers without out= come back from the heap warm instead of as fresh pages.
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": "100000000000",
            "MALLOC_TOP_PAD_": "1000000000",
        }
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peers.py"), name, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self.version = self._answer()["version"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"peer {self.name} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, case: dict[str, Any], inner: int, repeat: int, warm: int) -> list[float]:
        """Seconds of `repeat` measurements of `inner` calls each."""
        assert self._process.stdin is not None
        print(
            json.dumps({"case": case, "inner": inner, "repeat": repeat, "warm": warm}),
            file=self._process.stdin,
            flush=True,
        )
        seconds: list[float] = self._answer()["seconds"]
        return seconds

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(contestants: list[Contestant], case: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Median seconds per round and contestant."""
    inner = {}
    for c in contestants:
        once = min(c.run(case, 1, 2, 1))
        inner[c.name] = max(1, min(20_000, int(0.02 / max(once, 1e-7))))
    times: dict[str, list[float]] = {c.name: [] for c in contestants}
    for _ in range(rounds):
        for c in contestants:
            times[c.name].append(statistics.median(c.run(case, inner[c.name], 3, 1)))
    return times


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios."""
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=SETS, default="r50", help="shapes (shapes.py)")
    parser.add_argument("--op", nargs="+", choices=TRAFFIC, default=list(TRAFFIC), help="operations")
    parser.add_argument("--layout", nargs="+", choices=("nchw", "nhwc"), default=["nchw", "nhwc"])
    parser.add_argument("--dtype", choices=ITEM, default="float32")
    parser.add_argument("--activation", choices=("relu",), default=None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", nargs="*", choices=("torch", "numpy"), default=["torch"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--totals", action="store_true", help="only the weighted totals, not every shape")
    args = parser.parse_args()

    console = Console(width=120 if not sys.stdout.isatty() else None)
    contestants = []
    for name in ["copy", "batchnorm", *args.peers]:
        try:
            contestants.append(Contestant(name, args.threads))
        except RuntimeError:
            console.print(f"[yellow]peer {name} is not installed or does not start; left out[/yellow]")
    peers = [c.name for c in contestants if c.name not in ("copy", "batchnorm")]
    console.print(
        ", ".join(f"{c.name} {c.version}" for c in contestants if c.name != "copy"),
        f"{args.threads} threads",
        sep="; ",
    )

    shapes: list[Shape] = SETS[args.set]
    results = []
    table = Table("op", "layout", "shape", "GB/s", "of copy", *(f"{p} / ours" for p in peers))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(args.op) * len(args.layout) * len(shapes))
        for op in args.op:
            for layout in args.layout:
                totals = dict.fromkeys((c.name for c in contestants), 0.0)
                ratios: dict[str, list[float]] = {p: [] for p in peers}
                moved = 0.0
                for shape in shapes:
                    dims = shape.dims(layout)
                    axis = 1 if layout == "nchw" else len(dims) - 1
                    case = {
                        "op": op,
                        "dims": dims,
                        "axis": axis,
                        "dtype": args.dtype,
                        "activation": args.activation,
                    }
                    times = measure(contestants, case, args.rounds)
                    # What a shared machine does to one contestant in one round is noise; the median over
                    # rounds is not.
                    seconds = {name: statistics.median(t) for name, t in times.items()}
                    size = math.prod(dims) * ITEM[args.dtype]
                    traffic = size * TRAFFIC[op]
                    share = (seconds["copy"] / (2 * size)) / (seconds["batchnorm"] / traffic)
                    results.append(
                        {
                            "op": op,
                            "layout": layout,
                            "shape": str(shape),
                            "weight": shape.weight,
                            "seconds": times,
                        }
                    )
                    for name in totals:
                        totals[name] += shape.weight * seconds[name]
                    moved += shape.weight * traffic
                    for p in peers:
                        ratios[p].append(seconds[p] / seconds["batchnorm"])
                    if not args.totals:
                        table.add_row(
                            op, layout, str(shape), f"{traffic / seconds['batchnorm'] / 1e9:.1f}",
                            f"{share:.0%}",
                            *(f"{seconds[p] / seconds['batchnorm']:.2f}" for p in peers),
                        )  # fmt: skip
                    progress.advance(task)
                copied = totals["copy"] * TRAFFIC[op] / 2
                table.add_row(
                    op, layout, f"{args.set} total", f"{moved / totals['batchnorm'] / 1e9:.1f}",
                    f"{copied / totals['batchnorm']:.0%}",
                    *(
                        f"{totals[p] / totals['batchnorm']:.2f} (g.m. {geometric_mean(ratios[p]):.2f})"
                        for p in peers
                    ),
                    style="bold", end_section=True,
                )  # fmt: skip
    console.print(table)
    for c in contestants:
        c.close()
    if args.json:
        machine = {"cpu": cpu_name(), "platform": platform.platform(), "python": platform.python_version()}
        versions = {c.name: c.version for c in contestants}
        options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.json.write_text(
            json.dumps(
                {"machine": machine, "versions": versions, "options": options, "results": results}, indent=1
            )
        )


def cpu_name() -> str:
    """The CPU as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
