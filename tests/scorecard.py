"""The scorecard of reliability: how many bad inputs and faults were tried, and how many were held.

    python tests/scorecard.py [--short]

A bad input is held if it is the right error, with a message that names argument, got, expected and a remedy,
and if nothing has changed. A fault (a refused thread, another floating-point mode, Ctrl-C, a fork, a damaged
file) is held if the process goes on with right results or a Python exception. Every case is a test of the
suite, so what holds is what the tests assert; here they are counted by kind. ``--short`` leaves out random
and long ones. The exit code is 1 if any case was not held.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

# Tests by kind: patterns of "folder/file.py::test[case]".
KINDS = {
    "arguments of functions": (
        "operations/test_errors.py::*", "operations/*::test_errors*", "operations/*refused*",
        "operations/*::test_other_shapes_of_masks_are_errors*",
    ),
    "arguments of layers and networks": (
        "layer/test_errors.py::*", "layer/test_in_a_network.py::*", "layer/*::test_bad_*",
        "layer/*::test_unknown_attributes*", "layer/test_recalibrate.py::*error*",
    ),
    "images, data sets, no-data": ("data/*::test_bad_*", "data/*refuse*", "data/*::*errors*"),
    "states and files": (
        "io/*::test_states_that_do_not_fit*", "io/*another_library*", "io/*no_name_of_ours*",
        "io/test_npz.py::*",
    ),
    "model files": (
        "io/test_hostile.py::*", "io/test_norms.py::test_errors*", "io/test_files.py::*errors*",
        "io/test_files.py::*missing_library*", "io/test_folding.py::*errors*",
        "io/test_inspection.py::*errors*",
    ),
    "range: Inf, NaN, 1e300, var = eps = 0": (
        "operations/test_numerics.py::*1e300*", "operations/test_numerics.py::*non_finite*",
        "operations/*var_and_eps_zero*", "operations/test_moments.py::*1e300*", "operations/*overflow*",
        "layer/*spoil_the_statistics*",
    ),
    "threads, stacks, floating-point modes": (
        "operations/test_process.py::*thread*", "operations/test_process.py::*stack*",
        "operations/test_process.py::*system*", "operations/test_process.py::*floating_point*",
    ),
    "signals, forks, memory, environment": (
        "operations/test_process.py::*ctrl_c*", "operations/test_process.py::*fork*",
        "operations/test_process.py::*exit*", "operations/test_process.py::*memory*",
        "operations/test_process.py::*environment*", "operations/test_process.py::*limits_of_groups*",
    ),
}  # fmt: skip
TESTS = Path(__file__).resolve().parent


def kind_of(case: str) -> str | None:
    """The first kind whose patterns match a test."""
    case = case.replace("[", "<").replace("]", ">")  # which would be a set of letters in a pattern
    return next((kind for kind, many in KINDS.items() if any(fnmatch.fnmatch(case, p) for p in many)), None)


class Counting:
    """A plugin of pytest that runs only tests of some kind, and counts them."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.lost: list[tuple[str, str]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if kind_of(self.case(item.nodeid)) is not None]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kind = kind_of(self.case(report.nodeid))
        if kind is None or report.skipped:
            return
        if report.when == "call":
            self.tried[kind] += 1
        if report.failed:
            self.lost.append((kind, self.case(report.nodeid)))

    @staticmethod
    def case(nodeid: str) -> str:
        return nodeid.removeprefix("tests/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--short", action="store_true", help="60 random examples for each property, not 5,000"
    )
    os.environ["HYPOTHESIS_PROFILE"] = "quick" if parser.parse_args().short else "thorough"
    counting = Counting()
    folders = [str(TESTS / name) for name in ("operations", "layer", "data", "io")]
    options = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    code = pytest.main([*options, *folders], plugins=[counting])
    lost = Counter(kind for kind, _ in counting.lost)
    width = max(map(len, KINDS))
    print(f"\n{'kind':{width}}   tried    held")
    for kind in KINDS:
        print(f"{kind:{width}}   {counting.tried[kind]:5}   {counting.tried[kind] - lost[kind]:5}")
    tried = counting.tried.total()
    print(f"{'all':{width}}   {tried:5}   {tried - lost.total():5}")
    for _, case in counting.lost:
        print(f"not held: {case}")
    return 0 if code == 0 and all(counting.tried[kind] for kind in KINDS) else 1


if __name__ == "__main__":
    sys.exit(main())
