"""The scorecard of reliability: what was tried, how often, and how often it was held.

    python -m pytest --scorecard        the suite, once, and the table at its end: the short form
    python tests/scorecard.py           the tests of the table alone, with the long ones: hours
    python tests/scorecard.py --short   the same without the long ones

A bad input is held if it is the right error within 50 ms, with a message that names argument, got, expected
and a remedy, and if nothing has changed. A fault (a refused thread, another floating-point mode, Ctrl-C, a
fork, a damaged file) is held if the process goes on with right results or a Python exception. Every case is a
test of the suite, so what holds is what the tests assert; here they are counted by kind. A test that tries
more than one thing says how many by ``record_property("tried", n)``.

A test that is marked ``long`` runs with ``--long`` alone. The exit status is 1 if anything was not held, or
if a row had nothing to try.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# Tests by chapter and kind: patterns of "folder/file.py::test[case]". A test counts in the first row that
# has it.
ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "Bad input": {
        "arguments of functions": (
            "operations/test_errors.py::*", "operations/*::test_errors*", "operations/*refused*",
            "operations/*::test_other_shapes_of_masks_are_errors*",
            "operations/test_process.py::test_wrong_values*",
        ),
        "arguments of layers and networks": (
            "layer/test_errors.py::*", "layer/test_in_a_network.py::*", "layer/*::test_bad_*",
            "layer/*::test_unknown_attributes*", "layer/test_recalibrate.py::*error*",
            "layer/*::test_options_that_exclude*", "layer/*_translate*",
        ),
        "images, data sets, no-data": ("data/*::test_bad_*", "data/*refuse*", "data/*::*errors*"),
        "states and state files": (
            "io/*::test_states_that_do_not_fit*", "io/*another_library*", "io/*no_name_of_ours*",
            "io/test_npz.py::*",
        ),
        "model files": (
            "io/test_hostile.py::*", "io/test_norms.py::test_errors*", "io/test_files.py::*errors*",
            "io/test_files.py::*missing_library*", "io/test_folding.py::*errors*",
            "io/test_inspection.py::*errors*",
        ),
        "modules and models of PyTorch": ("pytorch/*error*", "pytorch/*refuse*", "pytorch/*bad*"),
        "models of Keras": ("keras3/*error*", "keras3/*refuse*", "keras3/*not_folded*"),
        "the command line": (
            "project/test_command_line.py::*error*", "project/test_command_line.py::*wrong*",
        ),
        "the C++ interface": ("cpp/test_cpp.py::test_errors_of_the_cpp_interface*",),
    },
    "Faults": {
        "range: Inf, NaN, 1e300, var = eps = 0": (
            "operations/test_numerics.py::*1e300*", "operations/test_numerics.py::*non_finite*",
            "operations/*var_and_eps_zero*", "operations/test_moments.py::*1e300*", "operations/*overflow*",
            "layer/*spoil_the_statistics*",
        ),
        "threads, stacks, floating-point modes": (
            "operations/test_process.py::*thread*", "operations/test_process.py::*stack*",
            "operations/test_process.py::*system*", "operations/test_process.py::*floating_point*",
            "reliability/test_faults.py::*thread*", "reliability/test_faults.py::*flush*",
            "reliability/test_faults.py::*affinity*", "reliability/test_faults.py::*openmp*",
        ),
        "signals, forks, memory, environment": (
            "operations/test_process.py::*ctrl_c*", "operations/test_process.py::*fork*",
            "operations/test_process.py::*exit*", "operations/test_process.py::*memory*",
            "operations/test_process.py::*environment*", "operations/test_process.py::*limits_of_groups*",
            "operations/test_process.py::*cache*", "operations/test_process.py::*openmp*",
            "reliability/test_faults.py::*",
        ),
        "processes of a group": ("group/*", "cpp/*group*", "pytorch/*synchronised*"),
    },
    "Load": {
        "soak: calls, refused ones among them": ("reliability/test_load.py::test_soak*",),
        "beyond 2^31 elements, and in one channel": ("reliability/test_load.py::test_beyond*",),
        "odd sizes": ("reliability/test_load.py::test_odd_sizes*",),
        "threads at once, memory under pressure": ("reliability/test_load.py::*",),
    },
    "The same bytes": {
        "runs, threads, ISA levels, alignments": (
            "operations/test_determinism.py::*", "operations/test_process.py::*same_bytes*",
            "operations/test_process.py::*setting*",
        ),
        "in place": ("operations/test_inplace.py::*",),
        "processes, shared and static library": ("cpp/test_cpp.py::test_same_bits*", "cpp/*old_cpu*"),
        "compilers, optimisation, aarch64": ("reliability/test_compilers.py::*",),
    },
    "Numerics": {
        "error bounds by dtype, mean / std, N": ("reliability/test_accuracy.py::*",),
        "the contract": ("operations/test_numerics.py::*", "operations/test_gradients.py::*"),
        "properties of any call": ("operations/test_properties.py::*",),
    },
    "Tools": {
        "C++ calls of any sizes and pointers": ("cpp/test_cpp.py::test_calls_of_any*",),
        "AddressSanitizer, UBSan": ("reliability/test_sanitizers.py::*address*",),
        "ThreadSanitizer": ("reliability/test_sanitizers.py::*thread*",),
        "libFuzzer": ("reliability/test_sanitizers.py::*fuzz*",),
    },
    "Supply chain": {
        "no pickle, pinned inputs, no known holes": ("reliability/test_supply.py::*",),
    },
}  # fmt: skip
TESTS = Path(__file__).resolve().parent


def kind_of(nodeid: str) -> str | None:
    """The first row whose patterns match a test."""
    # Brackets would be a set of letters in a pattern.
    case = nodeid.removeprefix("tests/").replace("[", "<").replace("]", ">")
    return next(
        (
            kind
            for rows in ROWS.values()
            for kind, many in rows.items()
            if any(fnmatch.fnmatch(case, p) for p in many)
        ),
        None,
    )


class Scorecard:
    """A plugin of pytest that counts tests by kind, and prints the table at the end."""

    def __init__(self, long: bool, only: bool) -> None:
        self.long, self.only = long, only
        self.tried: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.later: Counter[str] = Counter()  # those of the long form

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.only:
            items[:] = [item for item in items if kind_of(item.nodeid) is not None]

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.later.update(kind for i in items if i.get_closest_marker("long") and (kind := kind_of(i.nodeid)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kind = kind_of(report.nodeid)
        if kind is None:
            return
        if report.skipped:
            self.skipped[kind] += 1
        elif report.when == "call" or report.failed:
            tried = int(dict(report.user_properties).get("tried", 1))
            self.tried[kind] += tried
            self.lost[kind] += tried * report.failed

    def empty(self) -> list[str]:
        """Rows that tried nothing, though they should have."""
        kinds = [kind for rows in ROWS.values() for kind in rows]
        return [k for k in kinds if not self.tried[k] and not self.later[k]]

    def lines(self) -> list[str]:
        """The table, in Markdown."""
        width = max(len(kind) for rows in ROWS.values() for kind in rows)

        def line(name: str, *cells: object) -> str:
            return " | ".join((f"| {name:{width}}", *(f"{cell!s:>7}" for cell in cells))) + " |"

        made = [line("", "tried", "held", "skipped"), f"|{'-' * (width + 2)}|{'--------:|' * 3}"]
        for chapter, rows in ROWS.items():
            made.append(line(f"**{chapter}**", "", "", ""))
            for kind in rows:
                tried, lost, skipped = self.tried[kind], self.lost[kind], self.skipped[kind] or ""
                waits = not tried and self.later[kind]
                made.append(line(kind, "long" if waits else tried, "" if waits else tried - lost, skipped))
        tried, lost, skipped = (sum(c.values()) for c in (self.tried, self.lost, self.skipped))
        return [*made, line("all", tried, tried - lost, skipped or "")]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("scorecard")
        terminalreporter.line("\n".join(self.lines()))
        for kind in self.empty():
            terminalreporter.line(f"nothing was tried: {kind}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == 0 and self.empty():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="without the long tests")
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--scorecard=only"]
    options += [f"--rootdir={TESTS.parent}", str(TESTS)]
    return int(pytest.main([*options, *([] if parser.parse_args().short else ["--long"])]))


if __name__ == "__main__":
    sys.exit(main())
