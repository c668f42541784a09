"""Tables of what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from measure import Measured, geometric_mean, spread
from shapes import Shape
from traffic import Traffic

EXPLAINED = """GB/s: minimal bytes / median time. spread: interquartile range over rounds / median. roof: GB/s
of the fastest of copy and triad. min, real: share of the roof if the minimal, or the real, bytes move.
Peers: their time / ours. *: over those shapes that the peer did."""


@dataclass(frozen=True)
class Row:
    """One shape of a group."""

    shape: Shape
    traffic: Traffic
    measured: Measured


@dataclass(frozen=True)
class Group:
    """The shapes of one operation, layout, type, activation and kind of outputs: they are summed up."""

    op: str
    layout: str
    dtype: str
    activation: str
    outputs: str
    rows: list[Row]

    def title(self) -> str:
        words = [self.layout.upper(), self.dtype]
        words += [self.activation.replace("_", " + ")] if self.activation != "none" else []
        return " ".join([*words, "returned"] if self.outputs == "returned" else words)


def fastest(row: Row, peers: list[str]) -> str | None:
    """The peer with the smallest ratio."""
    there = [p for p in peers if p in row.measured.seconds]
    return min(there, key=row.measured.ratio) if there else None


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def cells(row: Row, peers: list[str]) -> list[str]:
    """A shape's line of the table."""
    m = row.measured
    if "batchnorm" not in m.seconds:
        return [str(row.shape), "-"]
    seconds = m.time("batchnorm")
    kernel, roof = m.roof()
    shares = [f"{moved / seconds / 1e9 / roof:.0%}" for moved in row.traffic]
    best = fastest(row, peers)
    return [
        str(row.shape),
        time_text(seconds),
        f"{spread(m.seconds['batchnorm']):.0%}",
        f"{row.traffic.minimal / seconds / 1e9:.1f}",
        f"{roof:.1f} {kernel}",
        *shares,
        *(f"{m.ratio(p):.2f}" if p in m.seconds else "-" for p in peers),
        f"{m.ratio(best):.2f} {best}" if best else "-",
    ]


def totals(group: Group, peers: list[str]) -> list[list[str]]:
    """The group's two lines: sums by weight, and geometric means of the shapes' ratios. A peer that lacks
    some shapes is compared over the others and marked with an asterisk."""
    rows = [r for r in group.rows if "batchnorm" in r.measured.seconds]
    if not rows:
        return [["total", "-"]]
    seconds = sum(r.shape.weight * r.measured.time("batchnorm") for r in rows)
    moved = sum(r.shape.weight * r.traffic.minimal for r in rows)
    at_roof = [
        sum(r.shape.weight * r.traffic[k] / r.measured.roof()[1] / 1e9 for r in rows) for k in range(2)
    ]

    def compared(names: list[str | None]) -> tuple[str, str]:
        """Against one peer per row, None where there is none."""
        done = [(r, n) for r, n in zip(rows, names, strict=True) if n is not None]
        if not done:
            return "-", "-"
        theirs = sum(r.shape.weight * r.measured.time(n) for r, n in done)
        ours = sum(r.shape.weight * r.measured.time("batchnorm") for r, _ in done)
        mark = "*" if len(done) < len(rows) else ""
        mean = geometric_mean([r.measured.ratio(n) for r, n in done])
        return f"{theirs / ours:.2f}{mark}", f"{mean:.2f}{mark}"

    columns = [compared([p if p in r.measured.seconds else None for r in rows]) for p in peers]
    columns.append(compared([fastest(r, peers) for r in rows]))
    sums = [
        "total",
        time_text(seconds),
        "",
        f"{moved / seconds / 1e9:.1f}",
        f"{moved / at_roof[0] / 1e9:.1f}",
    ]
    sums += [f"{t / seconds:.0%}" for t in at_roof]
    return [sums + [c[0] for c in columns], ["geometric mean", *[""] * 6, *(c[1] for c in columns)]]


def show(console: Console, groups: list[Group], peers: list[str], totals_only: bool) -> None:
    """A table per operation, with the reasons for its empty cells below."""
    for op in dict.fromkeys(g.op for g in groups):
        table = Table(title=f"{op}: batchnorm, and how much longer the others take", title_justify="left")
        table.add_column("shape", no_wrap=True)
        for head in ("time", "spread", "GB/s", "roof", "min", "real", *peers, "fastest peer"):
            table.add_column(head.replace("-", "\n"), justify="right", no_wrap=True)
        mine = [g for g in groups if g.op == op]
        for group in mine:
            table.add_row(group.title(), style="italic")
            for row in [] if totals_only else group.rows:
                table.add_row(*cells(row, peers))
            for summed in totals(group, peers):
                table.add_row(*summed, style="bold")
            table.add_section()
        console.print(table)
        for line in reasons(mine):
            console.print(line, style="yellow", markup=False, highlight=False)
    console.print(EXPLAINED, markup=False, highlight=False)


def reasons(groups: list[Group]) -> list[str]:
    """Why cells are empty: one line per contestant and reason, with how many cells."""
    counted: dict[tuple[str, str], int] = {}
    for group in groups:
        for row in group.rows:
            for name, reason in row.measured.reasons.items():
                counted[name, reason] = counted.get((name, reason), 0) + 1
    cells_of = {1: "1 cell"}
    return [f"-  {name}, {cells_of.get(n, f'{n} cells')}: {why}" for (name, why), n in counted.items()]


def headline(groups: list[Group], peers: list[str]) -> float:
    """The geometric mean of the ratios to the fastest peer over everything, NaN without peers."""
    ratios = []
    for group in groups:
        for row in group.rows:
            best = fastest(row, peers) if "batchnorm" in row.measured.seconds else None
            ratios += [row.measured.ratio(best)] if best else []
    return geometric_mean(ratios) if ratios else math.nan
