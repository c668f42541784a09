"""Measure batch normalization against its peers.

    python bench/run.py                                        every operation, ResNet-50, all peers there are
    python bench/run.py --set small --op backward --peers torch numba --activation none relu
    python bench/run.py --json report.json --picture pictures  keep it, draw it

Every contestant lives in a process of its own, threads pinned. Each case is run by all in turn, several
rounds, so that a noisy neighbour meets them alike; reported is the median over rounds. The roof is the best
of copy and triad (bench/cpp/bandwidth.cpp) in the same rounds on arrays of the same size. Absolute times mean
nothing on a shared machine: read the ratios (peer's time / ours; above 1 we are faster) and the share of the
roof. README.md beside this file explains both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import machine
import options
import picture
import report
from contestants import Field, Setting
from measure import Measured, measure
from peers import PEERS
from peers.protocol import ACTIVATIONS, ITEM, LAYOUTS, OPS, OUTPUTS, Case
from shapes import NAMES, Shape, shapes_of, thinned
from traffic import traffic, usable_cache

SCHEMA = 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--set", choices=NAMES, default="r50",
        help="r50: ResNet-50's layers at batch 32; r50-1: at batch 1; small; tiny: call overhead; "
        "shapes: those of tests/data/bnorm_shapes.csv (use --limit)",
    )  # fmt: skip
    p.add_argument(
        "--limit", type=options.at_least(1), metavar="N", help="N shapes of the set, evenly spread by size"
    )
    p.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="operations")
    p.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="memory orders")
    options.add_dtype(p)
    p.add_argument(
        "--activation", nargs="+", choices=ACTIVATIONS, default=["none"], help="what follows in the same call"
    )
    p.add_argument(
        "--outputs", nargs="+", choices=OUTPUTS, default=["reused"],
        help="reused: out= and a heap that keeps its memory; returned: new arrays, as users call it",
    )  # fmt: skip
    everybody = len(machine.cpus())
    p.add_argument(
        "--threads",
        type=options.threads,
        default=everybody,
        metavar="N",
        help=f"pinned to as many CPUs (default: {everybody})",
    )
    options.add_contestants(p, list(PEERS))
    p.add_argument(
        "--rounds",
        type=options.at_least(1),
        default=7,
        metavar="N",
        help="times everybody's turn comes (default: 7)",
    )
    p.add_argument(
        "--cache", type=options.size, metavar="SIZE",
        help="last-level cache for the real traffic, e.g. 32M (default: what the system says, in a VM at "
        "most 16M a thread)",
    )  # fmt: skip
    p.add_argument(
        "--json", type=options.new_file, metavar="FILE", help="write everything measured to this file"
    )
    p.add_argument(
        "--picture",
        type=options.folder,
        metavar="FOLDER",
        help="draw forward.png, backward.png, inference.png there",
    )
    p.add_argument("--totals", action="store_true", help="only the weighted totals, not every shape")
    return p


def case_of(op: str, layout: str, dtype: str, activation: str, outputs: str, shape: Shape) -> Case:
    dims = shape.dims(layout)
    return Case(op, dims, 1 if layout == "nchw" else len(dims) - 1, dtype, activation, outputs)


def fitting(shapes: list[Shape], args: argparse.Namespace, console: Console) -> list[Shape]:
    """The shapes whose arrays fit the free memory with everybody alive; the others are named."""
    item = max(ITEM[d] for d in args.dtype)
    # x, y and a temporary; dy and dx; the residual and its gradient.
    tensors = 3 + 2 * ("backward" in args.op) + 2 * ("residual_relu" in args.activation)
    most = machine.free_memory() // ((len(args.peers) + 2) * tensors * item)
    left_out = [str(s) for s in shapes if s.elements > most]
    if left_out:
        console.print(
            f"[yellow]left out, too large for this machine's memory: {', '.join(left_out)}[/yellow]"
        )
    return [s for s in shapes if s.elements <= most]


def announce(console: Console, field: Field, args: argparse.Namespace, outputs: str) -> None:
    """Who takes part and who does not."""
    console.print(f"[bold]outputs {outputs}, {args.threads} threads[/bold]", highlight=False)
    for c in field.contestants:
        console.print(f"  {c.name} {c.version}", markup=False, highlight=False)
    for name, reason in field.absent.items():
        instead = "; numpy.copyto is the roof, a weak one" if name == "bandwidth" else "; left out"
        console.print(
            f"  {name} is missing{instead}: {reason}", style="yellow", markup=False, highlight=False
        )


def run(args: argparse.Namespace, console: Console) -> tuple[list[report.Group], dict[str, Any]]:
    """Everything measured, as groups for the table and as the JSON file's content."""
    about = machine.describe()
    cache = args.cache or usable_cache(about, args.threads)
    wanted = shapes_of(args.set)
    groups: list[report.Group] = []
    results: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        "schema": SCHEMA, "kind": "run", "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": about, "cache": cache, "library": machine.library(), "versions": {}, "absent": {},
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "results": results,
    }  # fmt: skip
    for outputs in args.outputs:
        setting = Setting(args.threads, outputs, dict(args.python), args.onednn)
        with Field.start(args.peers, setting) as field:
            announce(console, field, args, outputs)
            content["versions"] |= field.versions()
            content["absent"] |= field.absent
            shapes = thinned(fitting(wanted, args, console), args.limit)
            kinds = list(itertools.product(args.op, args.activation, args.dtype, args.layout))
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=console, transient=True) as progress:
                task = progress.add_task("measuring", total=len(kinds) * len(shapes))
                for op, activation, dtype, layout in kinds:
                    group = report.Group(op, layout, dtype, activation, outputs, [])
                    groups.append(group)
                    for shape in shapes:
                        progress.update(task, description=f"{op} {layout} {shape}")
                        case = case_of(op, layout, dtype, activation, outputs, shape)
                        moved = traffic(case, cache, args.threads)
                        measured = measure(field, case, args.rounds)
                        group.rows.append(report.Row(shape, moved, measured))
                        results.append(entry(case, layout, shape, moved.minimal, moved.real, measured))
                        progress.advance(task)
    return groups, content


def entry(
    case: Case, layout: str, shape: Shape, minimal: float, real: float, measured: Measured
) -> dict[str, Any]:
    """A case in the JSON file."""
    return {
        "op": case.op, "layout": layout, "dtype": case.dtype, "activation": case.activation,
        "outputs": case.outputs, "shape": str(shape), "dims": case.dims, "weight": shape.weight,
        "minimal": minimal, "real": real,
        **measured.to_json(),
    }  # fmt: skip


def main() -> int:
    """Command line."""
    args = parser().parse_args()
    console = Console(width=None if sys.stdout.isatty() else 100 + 14 * len(args.peers))
    try:
        groups, content = run(args, console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is written")
        return 130
    used = [p for p in args.peers if p in content["versions"]]
    report.show(console, groups, used, args.totals)
    if used:
        console.print(
            f"fastest peer / ours, geometric mean over all cells: {report.headline(groups, used):.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(content, indent=1))
        console.print(f"wrote {args.json}", highlight=False)
    if args.picture:
        for path in picture.draw(content, args.picture):
            console.print(f"wrote {path}", highlight=False)
    return 0 if any("batchnorm" in r["seconds"] for r in content["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
