"""How the cost grows: with the size of the array, and with the number of threads.

    python bench/scaling.py sizes --max-bytes 4G --picture sizes.png --json sizes.json
    python bench/scaling.py threads --picture threads.png --json threads.json

sizes: nanoseconds per element from 1 KB on, in steps of four, against the copy's and torch's. threads:
speed-up over one thread and share of the roof of as many threads, each number in processes of its own.
As in run.py all contestants are alive at once and asked in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import machine
import options
from contestants import Field, Setting
from measure import Measured, measure, measure_fields
from peers.protocol import ITEM, LAYOUTS, OPS, Case
from shapes import SETS, Shape
from traffic import traffic, usable_cache

SCHEMA = 1
# Tensors alive at once, per contestant: x, dy, dx, and y while backward is made ready.
TENSORS = 4
# Of ResNet-50: the two largest tensors, one with few large channels, and one of many small channels.
BIG = [s for s in SETS["r50"] if (s.channels, s.spatial[0]) in ((256, 56), (64, 112), (1024, 14))]


def shape_of(elements: int) -> Shape:
    """That many elements, a power of two: up to 64 channels and a batch of up to 32, the rest space."""
    channels = min(64, max(4, elements // 64))
    batch = min(32, max(2, elements // channels // 32))
    return Shape(1, batch, channels, (elements // (channels * batch), 1))


def sizes(most: int, item: int) -> list[int]:
    """Elements: 1 KB, 4 KB, ... up to `most` bytes."""
    counts = []
    size = 1 << 10
    while size <= most:
        counts.append(size // item)
        size *= 4
    return counts


def bounded(args: argparse.Namespace, contestants: int, console: Console) -> int:
    """The largest tensor that fits the free memory in everybody's hands."""
    free = machine.free_memory() // (contestants * TENSORS + 1)  # and some air
    if args.max_bytes <= free:
        return int(args.max_bytes)
    console.print(
        f"the free memory allows {contestants} contestants tensors of {free >> 20} MB, less than --max-bytes",
        style="yellow", highlight=False,
    )  # fmt: skip
    return free


def case_of(op: str, layout: str, shape: Shape, dtype: str) -> Case:
    dims = shape.dims(layout)
    return Case(op, dims, 1 if layout == "nchw" else len(dims) - 1, dtype)


def header(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """What every file says first."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "measure"}
    return {
        "schema": SCHEMA, "kind": kind, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine.describe(), "library": machine.library(), "options": given, "results": [],
    }  # fmt: skip


def measure_sizes(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Cost per element by size."""
    content = header("sizes", args)
    setting = Setting(args.threads, "reused", dict(args.python), args.onednn)
    with Field.start(args.peers, setting) as field:
        tell(console, field)
        content["versions"], content["absent"] = field.versions(), field.absent
        counts = sizes(bounded(args, len(field.contestants), console), ITEM[args.dtype])
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("sizes", total=len(counts) * len(args.op) * len(args.layout))
            for count in counts:
                for op in args.op:
                    for layout in args.layout:
                        case = case_of(op, layout, shape_of(count), args.dtype)
                        m = measure(field, case, args.rounds)
                        cache = usable_cache(content["machine"], args.threads)
                        moved = traffic(case, cache, args.threads)
                        content["results"].append(size_entry(case, layout, moved.minimal, m))
                        progress.advance(task)
    return content


def size_entry(case: Case, layout: str, minimal: float, m: Measured) -> dict[str, Any]:
    """Nanoseconds per element; the roof's are those that the minimal bytes take at its speed."""
    per = 1e9 / case.elements
    nanoseconds = {name: m.time(name) * per for name in m.seconds}
    nanoseconds["roof"] = minimal / m.roof()[1] / case.elements
    return {
        "op": case.op, "layout": layout, "dims": case.dims, "bytes": case.bytes, "nanoseconds": nanoseconds,
        **m.to_json(),
    }  # fmt: skip


def thread_counts(most: int) -> list[int]:
    """All up to 8, then powers of two and the last."""
    return sorted({*range(1, min(most, 8) + 1), *(2**i for i in range(3, most.bit_length())), most})


def measure_threads(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Seconds and roof by number of threads, all numbers interleaved."""
    content = header("threads", args)
    counts = sorted(set(args.threads)) if args.threads else thread_counts(len(machine.cpus()))
    fields: dict[int, Field] = {}
    shapes = [Shape(1, args.batch, s.channels, s.spatial) for s in BIG]
    shapes = [
        s for s in shapes if s.elements * ITEM[args.dtype] * TENSORS * 2 * len(counts) < machine.free_memory()
    ]
    if not shapes:
        raise SystemExit("the free memory holds none of the shapes; a smaller --batch may fit")
    content["threads"] = counts
    try:
        for n in counts:
            fields[n] = Field.start([], Setting(n))
        tell(console, fields[counts[0]])
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("threads", total=len(shapes) * len(args.op) * len(args.layout))
            for shape in shapes:
                for op in args.op:
                    for layout in args.layout:
                        case = case_of(op, layout, shape, args.dtype)
                        content["results"].append(thread_entry(case, layout, shape, fields, args.rounds))
                        progress.advance(task)
    finally:
        for field in fields.values():
            field.close()
    return content


def thread_entry(
    case: Case, layout: str, shape: Shape, fields: dict[int, Field], rounds: int
) -> dict[str, Any]:
    """One case by every number of threads; all numbers take turns, so that they meet the same neighbours."""
    measured = dict(zip(fields, measure_fields(list(fields.values()), case, rounds), strict=True))
    seconds = {n: m.seconds["batchnorm"] for n, m in measured.items()}
    roofs = {n: m.bandwidth[m.roof()[0]] for n, m in measured.items()}
    cache = usable_cache(machine.describe(), max(fields))
    moved = {n: traffic(case, cache, n) for n in fields}
    share = {
        n: statistics.median(
            moved[n].minimal / s / 1e9 / r for s, r in zip(seconds[n], roofs[n], strict=True)
        )
        for n in fields
    }
    first = min(fields)
    speed_up = {
        n: statistics.median(a / b for a, b in zip(seconds[first], seconds[n], strict=True)) for n in fields
    }
    return {
        "op": case.op, "layout": layout, "shape": str(shape), "dims": case.dims, "seconds": seconds,
        "roof": roofs, "share": share, "speed_up": speed_up,
    }  # fmt: skip


def tell(console: Console, field: Field) -> None:
    """Who takes part."""
    for c in field.contestants:
        console.print(f"  {c.name} {c.version}", markup=False, highlight=False)
    for name, reason in field.absent.items():
        console.print(f"  {name} is missing: {reason}", style="yellow", markup=False, highlight=False)


def show(console: Console, content: dict[str, Any]) -> None:
    """The numbers as a table."""
    if content["kind"] == "sizes":
        names = list(dict.fromkeys(n for r in content["results"] for n in r["nanoseconds"]))
        table = Table("op", "layout", "bytes", *names, title="nanoseconds per element", title_justify="left")
        for r in sorted(content["results"], key=lambda r: (r["op"], r["layout"], r["bytes"])):
            values = [f"{r['nanoseconds'][n]:.3g}" if n in r["nanoseconds"] else "-" for n in names]
            table.add_row(r["op"], r["layout"], str(r["bytes"]), *values)
    else:
        counts = content["threads"]
        heads = [f"{n} thread{'s' * (n > 1)}" for n in counts]
        table = Table(
            "op", "layout", "shape", *heads, title="speed-up, share of the roof", title_justify="left"
        )
        for r in content["results"]:
            values = [f"{r['speed_up'][n]:.2f}  {r['share'][n]:.0%}" for n in counts]
            table.add_row(r["op"], r["layout"], r["shape"], *values)
    console.print(table)


def axes(rows: int, columns: int, height: float) -> tuple[Any, Any]:
    """A grid of diagrams."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (4.2 * columns + 1.6, height * rows + 0.5)
    fig, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharey="row")
    for ax in grid.flat:
        ax.grid(color="#dddddd", zorder=0)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, grid


def finish(fig: Any, ax: Any, content: dict[str, Any], title: str, path: Path) -> None:
    """Legend, title, file."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    fig.suptitle(f"{title}, {content['machine']['cpu']}", fontsize=11, x=0.01, ha="left")
    fig.savefig(path, dpi=130)


def draw_sizes(content: dict[str, Any], path: Path) -> None:
    """Nanoseconds per element over bytes, a diagram per operation and layout."""
    from picture import COLOURS

    ops, layouts = content["options"]["op"], content["options"]["layout"]
    fig, grid = axes(len(layouts), len(ops), 3.0)
    for row, layout in zip(grid, layouts, strict=True):
        for ax, op in zip(row, ops, strict=True):
            results = [r for r in content["results"] if (r["op"], r["layout"]) == (op, layout)]
            names = dict.fromkeys(n for r in content["results"] for n in r["nanoseconds"])
            for name in names:
                points = [(r["bytes"], r["nanoseconds"][name]) for r in results if name in r["nanoseconds"]]
                style = {"color": "black", "linestyle": "--"} if name == "roof" else {"color": COLOURS[name]}
                label = "roof (minimal bytes)" if name == "roof" else name
                ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, **style)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_title(f"{op}, {layout.upper()}", loc="left", fontsize=10)
            ticks = sorted({r["bytes"] for r in results})[::2]
            ax.set_xticks(ticks, [byte_text(t) for t in ticks])
    for ax in grid[:, 0]:
        ax.set_ylabel("ns per element")
    for ax in grid[-1]:
        ax.set_xlabel("bytes of one tensor")
    threads = content["options"]["threads"]
    finish(fig, grid[0, 0], content, f"cost per element, {threads} thread{'s' * (threads > 1)}", path)


def byte_text(count: int) -> str:
    """1K, 256M, 4G."""
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if count >= 1 << shift:
            return f"{count >> shift}{unit}"
    return str(count)


def draw_threads(content: dict[str, Any], path: Path) -> None:
    """Speed-up (above) and share of the roof (below) over threads, a column per operation."""
    ops = content["options"]["op"]
    fig, grid = axes(2, len(ops), 3.0)
    counts = content["threads"]
    kinds = list(dict.fromkeys((r["layout"], r["shape"]) for r in content["results"]))
    for column, op in enumerate(ops):
        above, below = grid[0, column], grid[1, column]
        above.plot(counts, [n / counts[0] for n in counts], color="black", linestyle="--", label="ideal")
        below.axhline(100, color="black", linestyle="--")
        for i, (layout, shape) in enumerate(kinds):
            (r,) = (
                r for r in content["results"] if (r["op"], r["layout"], r["shape"]) == (op, layout, shape)
            )
            style = {"color": f"C{i}", "marker": "o" if layout == "nchw" else "s", "markersize": 4}
            above.plot(counts, [r["speed_up"][n] for n in counts], label=f"{layout.upper()} {shape}", **style)
            below.plot(counts, [100 * r["share"][n] for n in counts], **style)
        above.set_title(op, loc="left", fontsize=10)
        below.set_xlabel("threads")
        above.set_xticks(counts)
        below.set_xticks(counts)
    for ax in grid.flat:
        ax.set_ylim(bottom=0)  # when all is drawn: rows share their axis
    grid[0, 0].set_ylabel(f"speed-up over {counts[0]} thread{'s' * (counts[0] > 1)}")
    grid[1, 0].set_ylabel("% of as many threads' roof")
    finish(fig, grid[0, 0], content, "scaling with threads", path)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="sizes|threads")
    by_size = commands.add_parser("sizes", help="cost per element over sizes")
    by_size.add_argument(
        "--max-bytes", type=options.size, default=256 << 20, metavar="SIZE",
        help="the largest tensor, e.g. 4G (default: 256M; bounded by the free memory)",
    )  # fmt: skip
    everybody = len(machine.cpus())
    by_size.add_argument("--threads", type=options.threads, default=everybody, metavar="N")
    options.add_contestants(by_size, ["torch"])
    by_size.set_defaults(measure=measure_sizes)
    by_threads = commands.add_parser("threads", help="speed-up and share of the roof over threads")
    by_threads.add_argument(
        "--threads", type=options.threads, nargs="+", metavar="N",
        help="numbers of threads (default: 1 to 8, then powers of two, and all CPUs)",
    )  # fmt: skip
    by_threads.add_argument(
        "--batch", type=options.at_least(1), default=32, metavar="N", help="of the ResNet-50 shapes"
    )
    by_threads.set_defaults(measure=measure_threads)
    for command in (by_size, by_threads):
        command.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
        command.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
        command.add_argument("--dtype", choices=ITEM, default="float32")
        command.add_argument("--rounds", type=options.at_least(1), default=5, metavar="N")
        command.add_argument("--json", type=options.new_file, metavar="FILE", help="write what was measured")
        command.add_argument(
            "--picture", type=options.new_file, metavar="FILE", help="draw it (.png, .svg, .pdf)"
        )
    return p


def main() -> int:
    """Command line."""
    args = parser().parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        content = args.measure(args, console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is written")
        return 130
    show(console, content)
    if args.json:
        args.json.write_text(json.dumps(content, indent=1))
        console.print(f"wrote {args.json}", highlight=False)
    if args.picture:
        (draw_sizes if content["kind"] == "sizes" else draw_threads)(content, args.picture)
        console.print(f"wrote {args.picture}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
