"""A picture per operation: by shape, the speed of batchnorm and of its peers under the roof.

    python bench/picture.py report.json pictures/

draws again what run.py --picture drew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import options

# Okabe and Ito's colours, which those who confuse red and green can tell apart; ours is the strongest.
COLOURS = {
    "batchnorm": "#D55E00", "torch": "#0072B2", "onednn": "#009E73", "onednn-blocked": "#7FCDB3",
    "numba": "#E69F00", "onnxruntime": "#56B4E9", "jax": "#CC79A7", "tensorflow": "#8C6BB1",
    "numpy": "#999999",
}  # fmt: skip
SHAPES_PER_PANEL = 24
ROOF = "roof: best of copy and triad"
BOX = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}  # behind the numbers


def name_of(group: tuple[str, str, str, str]) -> str:
    """The title of a panel."""
    layout, dtype, activation, outputs = group
    extra = [activation.replace("_", " + ")] if activation != "none" else []
    extra += ["returned outputs"] if outputs == "returned" else []
    return f"{layout.upper()} {dtype}" + (f"\n{', '.join(extra)}" if extra else "")


def panels(results: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Results by layout, type, activation and outputs, in pieces of a readable width."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for r in results:
        key = (r["layout"], r["dtype"], r["activation"], r["outputs"])
        groups.setdefault(key, []).append(r)
    pieces = []
    for key, rows in groups.items():
        for start in range(0, len(rows), SHAPES_PER_PANEL):
            pieces.append((name_of(key), rows[start : start + SHAPES_PER_PANEL]))
    return pieces


def roof(result: dict[str, Any]) -> float:
    """GB/s."""
    return max(float(statistics.median(v)) for v in result["bandwidth"].values())


def draw_panel(ax: Any, title: str, rows: list[dict[str, Any]], names: list[str]) -> None:
    """Bars of GB/s by the minimal bytes, grouped by shape; the roof as a line over each group."""
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        there = [(x, r) for x, r in enumerate(rows) if name in r["seconds"]]
        if not there:
            continue
        speeds = [r["minimal"] / statistics.median(r["seconds"][name]) / 1e9 for _, r in there]
        places = [x - 0.42 + (i + 0.5) * width for x, _ in there]
        bars = ax.bar(places, speeds, width, label=name, color=COLOURS[name], zorder=2)
        if name == "batchnorm" and len(rows) * len(names) <= 80:
            ax.bar_label(bars, fmt="%.3g", fontsize=7, padding=1, zorder=4, bbox=BOX)
    for x, r in enumerate(rows):
        label = ROOF if x == 0 else None
        ax.hlines(roof(r), x - 0.46, x + 0.46, color="black", linewidth=1.6, zorder=3, label=label)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xticks(range(len(rows)), [r["shape"] for r in rows], rotation=35, ha="right", fontsize=8)
    ax.set_xlim(-0.6, len(rows) - 0.4)
    ax.set_ylabel("GB/s (minimal bytes)")
    ax.grid(axis="y", color="#dddddd", zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylim(bottom=0)


def canvas(panels: int, shapes: int, bars: int) -> tuple[Any, list[Any]]:
    """A figure with room for that many panels of so many shapes with so many bars each; narrow ones stand
    side by side."""
    from matplotlib import pyplot as plt

    width = max(3.2, 0.8 + shapes * max(0.35, 0.13 * bars))
    columns = 2 if width < 7 and panels > 1 else 1
    lines = -(-panels // columns)
    size = (max(7.5, min(width * columns + 2, 26)), 3.6 * lines + 0.6)
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[panels:]:
        ax.axis("off")
    return fig, list(axes.flat[:panels])


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """The files written, one per operation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    written = []
    for op in dict.fromkeys(r["op"] for r in report["results"]):
        results = [r for r in report["results"] if r["op"] == op and r["seconds"] and r["bandwidth"]]
        if not results:
            continue
        names = [n for n in COLOURS if any(n in r["seconds"] for r in results)]
        pieces = panels(results)
        fig, axes = canvas(len(pieces), max(len(rows) for _, rows in pieces), len(names))
        handles: dict[str, Any] = {}
        for ax, (title, rows) in zip(axes, pieces, strict=True):
            draw_panel(ax, title, rows, names)
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        handles = {n: handles[n] for n in (*names, ROOF) if n in handles}
        fig.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9, frameon=False)
        threads = report["options"]["threads"]
        fig.suptitle(
            f"{op}, {threads} thread{'s' * (threads > 1)}, {report['machine']['cpu']}",
            fontsize=11,
            x=0.01,
            ha="left",
        )
        path = folder / f"{op}.png"
        fig.savefig(path, dpi=130)
        plt.close(fig)
        written.append(path)
    return written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="what run.py --json wrote")
    parser.add_argument("folder", type=options.folder, help="where the pictures go")
    args = parser.parse_args()
    try:
        report = json.loads(args.report.read_text())
    except (OSError, ValueError) as e:
        parser.error(f"{args.report} cannot be read: {e}")
    if not isinstance(report, dict) or report.get("kind") != "run":
        parser.error(f"{args.report} is not a file of run.py --json")
    for path in draw(report, args.folder):
        print(path)


if __name__ == "__main__":
    main()
