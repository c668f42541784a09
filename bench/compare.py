"""What got slower between two files of run.py --json.

    python bench/compare.py old.json new.json [--threshold 0.05] [--by roof|PEER|seconds]

Absolute times do not compare between runs: the machine's bandwidth moves with what its neighbours do. So a
case's cost is its time multiplied by the roof of its own round (bytes per second of the best of copy and
triad; --by roof, the default where both files have it), or divided by the time of a peer that both files
hold (--by torch, say; better for cases too small to be limited by memory), or the bare time (--by seconds).

A case is slower if its median cost grew by more than the threshold and the middle halves (between the
quartiles) of the rounds of both runs do not overlap. Exit code 1 if any is, 0 if none, 2 for files that
cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from measure import quartiles

KEY = ("op", "layout", "dtype", "activation", "outputs", "shape")
MACHINE = ("cpu", "cpus", "caches", "huge_pages", "kernel")
OPTIONS = ("threads",)
Key = tuple[str, ...]


class NotComparable(Exception):
    """The message says which file and why."""


def load(path: Path) -> dict[str, Any]:
    """A file of run.py."""
    try:
        report = json.loads(path.read_text())
    except OSError as e:
        raise NotComparable(f"{path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise NotComparable(f"{path} is not JSON: {e}") from None
    if not isinstance(report, dict) or report.get("kind") != "run":
        raise NotComparable(f"{path} is not a file of run.py --json")
    if report.get("schema") != 1:
        raise NotComparable(f"{path} has schema {report.get('schema')!r}, this program reads 1")
    return report


def cases(report: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The cases that batchnorm did."""
    done = (r for r in report["results"] if "batchnorm" in r["seconds"])
    return {tuple(r[k] for k in KEY): r for r in done}


def costs(result: dict[str, Any], by: str) -> list[float] | None:
    """A value per round, None if the case lacks what it is measured by."""
    ours = result["seconds"]["batchnorm"]
    if by == "seconds":
        return list(ours)
    if by == "roof":
        bandwidth = result["bandwidth"]
        if not bandwidth:
            return None
        # The kernel that is fastest over all rounds, so that no round's luck chooses.
        best = max(bandwidth.values(), key=statistics.median)
        return [t * b for t, b in zip(ours, best, strict=True)]
    theirs = result["seconds"].get(by)
    return None if theirs is None else [t / p for t, p in zip(ours, theirs, strict=True)]


def verdict(old: list[float], new: list[float], threshold: float) -> tuple[float, str]:
    """New median / old median, and "slower", "faster" or "same"."""
    (old_low, old_mid, old_high), (new_low, new_mid, new_high) = quartiles(old), quartiles(new)
    ratio = new_mid / old_mid
    if ratio > 1 + threshold and new_low > old_high:
        return ratio, "slower"
    if ratio < 1 / (1 + threshold) and new_high < old_low:
        return ratio, "faster"
    return ratio, "same"


def warnings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the runs but is not the library."""
    found = []
    for part, names in (("machine", MACHINE), ("options", OPTIONS)):
        for name in names:
            was, now = old[part].get(name), new[part].get(name)
            if was != now:
                found.append(f"another {part}: {name} was {was}, is {now}")
    return found


def default_measure(old: dict[Key, Any], new: dict[Key, Any]) -> str:
    """The roof if all cases in common have one; else a peer that they all have; else the time."""
    both = [r for key in old.keys() & new.keys() for r in (old[key], new[key])]
    if both and all(r["bandwidth"] for r in both):
        return "roof"
    peers = set.intersection(*(set(r["seconds"]) for r in both)) - {"batchnorm"} if both else set()
    return min(peers) if peers else "seconds"


def options() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("--threshold", type=share, default=0.05, help="growth that is let pass (default: 0.05)")
    p.add_argument("--by", help="roof, a peer's name, or seconds (default: roof where there is one)")
    return p


def share(text: str) -> float:
    """A number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a share such as 0.05")
    return value


def main() -> int:
    """Command line."""
    parser = options()
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        old_report, new_report = load(args.old), load(args.new)
    except NotComparable as e:
        parser.error(str(e))
    old, new = cases(old_report), cases(new_report)
    common = [key for key in old if key in new]
    if not common:
        parser.error("the two files have no case in common")
    by = args.by or default_measure(old, new)
    for line in warnings(old_report, new_report):
        console.print(f"warning: {line}", style="yellow", markup=False, highlight=False)
    for name, only in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        if only:
            console.print(f"{len(only)} cases are in the {name} file alone", style="yellow")

    counts = {"slower": 0, "faster": 0, "same": 0}
    table = Table(
        "case", "new / old", "old spread", "new spread", title=f"slower, by {by}", title_justify="left"
    )
    for key in common:
        before, after = costs(old[key], by), costs(new[key], by)
        if before is None or after is None:
            parser.error(f"{' '.join(key)} has no {by} in both files; there is --by seconds")
        ratio, word = verdict(before, after, args.threshold)
        counts[word] += 1
        if word == "slower":
            table.add_row(" ".join(key), f"{ratio:.2f}", *map(interval, (before, after)))
    if counts["slower"]:
        console.print(table)
    console.print(", ".join(f"{n} {word}" for word, n in counts.items()), f"of {len(common)} cases, by {by}")
    return 1 if counts["slower"] else 0


def interval(values: list[float]) -> str:
    """The quartiles relative to the median."""
    low, middle, high = quartiles(values)
    return f"{low / middle - 1:+.0%} {high / middle - 1:+.0%}"


if __name__ == "__main__":
    sys.exit(main())
