"""Puts each fault of faults.txt into a copy of the sources and looks whether the tests notice it.

    python tests/mutation/run.py [--only 3 17 40-60] [--short] [--again] [--folder build/mutation]

In C++ one build has all faults, and the environment variable MUTATION_FAULTS switches on the one that is
tried; in Python the text of the copy is changed. A fault is noticed if a test fails, crashes or does not end
that passes without it. First come the tests nearest to the fault. What they do not notice is put in together,
and every file of tests runs: those of its tests that fail then run with each fault alone. Results stay in the
folder: what has been run is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401
import numpy as np  # noqa: F401
import pytest
from faults import DEFINED_IN, DEFINITION, ROOT, Fault, faulty, read, switched

# Which tests come first, by the beginning of the fault's file; then come all others.
FIRST = {
    "cpp/kernels/image": "cpp data/test_images.py data/test_counting.py",
    "cpp/kernels/activation": "cpp operations/test_activations.py operations/test_double_backward.py",
    "cpp/kernels": "operations/test_golden.py cpp operations/test_layouts.py data/test_counting.py"
    " data/test_images.py",
    "cpp/core/second": "operations/test_double_backward.py",
    "cpp/core/memory": "cpp operations/test_process.py",
    "cpp/core/limits": "operations/test_process.py",
    "cpp/core/parallel": "cpp operations/test_process.py",
    "cpp/core/check": "operations/test_errors.py cpp operations/test_inplace.py layer/test_errors.py",
    "cpp/core/running": "cpp operations/test_running.py layer/test_statistics.py",
    "cpp/core": "operations/test_golden.py cpp operations/test_running.py operations/test_saved.py"
    " data/test_counting.py operations/test_moments.py",
    "cpp/bind": "operations/test_errors.py operations/test_saved.py operations/test_arrays.py"
    " data/test_counting.py operations/test_layouts.py operations/test_inplace.py",
    "python/batchnorm/torch": "pytorch",
    "python/batchnorm/keras": "keras3",
    "python/batchnorm/io": "io",
    "python/batchnorm/fold": "operations/test_fold.py io/test_folding.py",
    "python/batchnorm/images": "data/test_images.py",
    "python/batchnorm/dataset": "data",
    "python/batchnorm/moments": "data operations/test_moments.py",
    "python/batchnorm/running": "layer operations/test_running.py",
    "python/batchnorm": "layer",
}
# Tests that build the library themselves, or look at what is no function of it, see no fault.
NEVER = ("tests/cpp", "tests/project/test_structure.py", "tests/project/test_site.py", "tests/bench",
         "tests/project/test_release.py", "tests/project/test_instructions.py", "tests/mutation",
         "tests/project/test_mutation.py")  # fmt: skip
# Takes the place of what an editable installation puts before everything else, also in tests' own processes.
SITE = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
PLUGIN = """
import json, os
from pathlib import Path
FOLDER = Path(os.environ["MUTATION_FOLDER"])
failed, seconds = set(), {}

def pytest_collection_modifyitems(items):
    if "MUTATION_FAULTS" in os.environ:
        bad = set(json.loads((FOLDER / "baseline.json").read_text())["failed"])
        items[:] = [item for item in items if item.nodeid not in bad]

def pytest_runtest_logreport(report):
    file = report.nodeid.partition("::")[0]
    seconds[file] = seconds.get(file, 0) + report.duration
    if report.failed:
        failed.add(report.nodeid)

def pytest_sessionfinish():
    (FOLDER / "last.json").write_text(json.dumps({"failed": sorted(failed), "seconds": seconds}))
"""
CPP_TESTS = "test_batchnorm"  # the executable, beside the files of pytest
ENDLESS = 1000  # in place of an exit status


class Tree:
    """A copy of the sources with the faults of C++ in it, and its build."""

    def __init__(self, folder: Path, faults: list[Fault], prefix: list[str]) -> None:
        self.folder, self.faults, self.prefix = folder, faults, prefix
        self.sources, self.build = folder / "tree", folder / "build"
        self.written = int(time.time())

    # ---- making it ---------------------------------------------------------------------------------------

    def make(self) -> None:
        """Copies what git knows or would know, puts the faults of C++ in, and builds."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in {name for name in names.split("\0") if name and (ROOT / name).is_file()}:
            data = (ROOT / name).read_bytes()
            if own := [f for f in self.faults if f.file == name and not f.is_python]:
                data = switched(own, data.decode()).encode()
            if name == DEFINED_IN:
                data = switched(own, (ROOT / name).read_text()).encode() + DEFINITION.encode()
            if name == "cpp/CMakeLists.txt":  # the same bits in half the time
                data = data.replace(b"-O3", b"-O2")
            self._put(name, data)
        site = self.folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE)
        (site / "mutation_plugin.py").write_text(PLUGIN)
        where = [sys.executable, "-m", "pybind11", "--cmakedir"]
        pybind11 = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
        options = ["-DBATCHNORM_PYTHON=ON", "-DBATCHNORM_TESTS=ON", f"-Dpybind11_DIR={pybind11}",
                   f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
        if shutil.which("ccache"):
            options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        self._do("cmake", "-G", "Ninja", "-S", self.sources, "-B", self.build, *options)
        self._do("cmake", "--build", self.build)
        self._do("cmake", "--install", self.build, "--prefix", self.sources / "python" / "batchnorm")

    def _put(self, name: str, data: bytes) -> None:
        target = self.sources / name
        if target.is_file() and target.read_bytes() == data:
            return  # its time stays, so that the next build compiles what has changed
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod((ROOT / name).stat().st_mode)

    def _do(self, *command: object) -> None:
        done = subprocess.run([*self.prefix, *map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit((done.stdout + done.stderr)[-8000:])

    # ---- running tests -----------------------------------------------------------------------------------

    def run(self, tests: Sequence[str], faults: Sequence[Fault] | None, all_of_them: bool = False) -> str:
        """Who notices these faults, put in together, among some files of tests or tests: "" is nobody.
        `last.json` has what failed, unless the process ended.
        """
        environment = {"OMP_WAIT_POLICY": "passive", "MUTATION_FOLDER": str(self.folder)}
        if faults is not None:
            environment["MUTATION_FAULTS"] = " ".join(str(fault.number) for fault in faults)
        (self.folder / "last.json").unlink(missing_ok=True)
        for of_cpp, some in itertools.groupby(tests, CPP_TESTS.__eq__):
            some = [*some]
            limit = 180 + 10 * self.seconds(some)
            with self._changed(faults or ()):
                run = self._run_cpp if of_cpp else self._run_pytest
                code, output = run(some, environment, limit, all_of_them)
            if code not in (0, 5):  # 5: no tests
                return f"{CPP_TESTS}: " * of_cpp + who(code, output)
        return ""

    def _run_cpp(self, _: Any, environment: Any, limit: float, all_of_them: bool) -> tuple[int, str]:
        command = [*self.prefix, str(self.build / CPP_TESTS), *["--quick"] * (not all_of_them)]
        try:
            done = subprocess.run(
                command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", check=False, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return ENDLESS, ""
        return done.returncode, done.stdout

    def _run_pytest(
        self, tests: list[str], environment: Any, limit: float, all_of_them: bool
    ) -> tuple[int, str]:
        """In a fork of this process, which has imported what takes long, and not batchnorm."""
        subprocess.run([*self.prefix, "true"], check=True)  # what the prefix waits for
        output = self.folder / "output.txt"
        child = os.fork()
        if child == 0:
            os.setsid()
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(self.sources)
            paths = [str(self.folder / "site"), str(self.sources / "python")]
            os.environ.update(environment, PYTHONPATH=os.pathsep.join(paths))
            sys.path[:0] = paths  # the folder of this file stays: processes that tests start import it, too
            sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
            options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "mutation_plugin",
                       "-W", "ignore::pytest.PytestAssertRewriteWarning", "-m", "not slow",
                       *["-x"] * (not all_of_them)]  # fmt: skip
            code = pytest.main([*options, *tests])
            sys.stdout.flush()
            os._exit(code)
        end = time.monotonic() + limit
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return ENDLESS, ""
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(done[1]), output.read_text(errors="replace")

    @contextlib.contextmanager
    def _changed(self, faults: Iterable[Fault]) -> Iterator[None]:
        before: dict[Path, str] = {}
        try:
            for fault in (fault for fault in faults if fault.is_python):
                path = self.sources / fault.file
                before.setdefault(path, path.read_text())
                self._write(path, faulty(fault, path.read_text()))
            yield
        finally:
            for path, text in before.items():
                self._write(path, text)

    def _write(self, path: Path, text: str) -> None:
        """A time of its own for each text: Python compiles a module again if its second differs."""
        path.write_text(text)
        self.written += 1
        os.utime(path, (self.written, self.written))

    # ---- what there is to run ----------------------------------------------------------------------------

    def baseline(self) -> None:
        """What fails, and how long each file takes, without a fault."""
        paths = self.sources.glob("tests/**/test_*.py")
        found = sorted(path.relative_to(self.sources).as_posix() for path in paths)
        failed: set[str] = set()
        seconds: dict[str, float] = {}
        for name in (name for name in found if not name.startswith(NEVER)):
            noticed, last = self.run([name], None, True), self._last()
            if noticed and not last["failed"]:
                raise SystemExit(f"{name} without a fault: {noticed}")
            failed.update(last["failed"])
            seconds[name] = sum(last["seconds"].values())
            print(f"{seconds[name]:6.1f} s  {name}", flush=True)
        if noticed := self.run([CPP_TESTS], None, True):
            raise SystemExit(f"without a fault: {noticed}")
        result = {"failed": sorted(failed), "seconds": {**seconds, CPP_TESTS: 40}}
        (self.folder / "baseline.json").write_text(json.dumps(result, indent=1))
        for name in sorted(failed):
            print(f"left out, as it fails without a fault: {name}")

    def _last(self) -> dict[str, Any]:
        file = self.folder / "last.json"
        return dict(json.loads(file.read_text())) if file.exists() else {"failed": [], "seconds": {}}

    def _known(self) -> dict[str, float]:
        file = self.folder / "baseline.json"
        return dict(json.loads(file.read_text())["seconds"]) if file.exists() else {}

    def seconds(self, tests: Iterable[str]) -> int:
        known = self._known()
        return 1 + round(sum(known.get(name.partition("::")[0], 60) for name in tests))

    def near(self, fault: Fault) -> str:
        """Who notices a fault among the tests nearest to it."""
        prefix = next(each for each in FIRST if fault.file.startswith(each))
        places = [CPP_TESTS if place == "cpp" else f"tests/{place}" for place in FIRST[prefix].split()]
        return self.run(
            [name for place in places for name in self._known() if name.startswith(place)], [fault]
        )

    def far(self, faults: list[Fault]) -> Iterator[tuple[Fault, str]]:
        """Who else notices some faults: all are put in together, and taken out where they are noticed."""
        known, left = self._known(), list(faults)
        for name in sorted(known, key=known.__getitem__):
            while left and (seen := self.run([name], left, True)):
                failed = self._last()["failed"]
                print(f"{name} notices some: {seen} and {len(failed)} in all", flush=True)
                tests = failed[:: max(len(failed) // 30, 1)] or [name]
                found = {}
                for fault in left:
                    if noticed := self.run(tests, [fault], all_of_them=name == CPP_TESTS):
                        found[fault] = noticed
                yield from found.items()
                left = [fault for fault in left if fault not in found]
                if not found or len(tests) >= len(failed):
                    break


def who(code: int, output: str) -> str:
    """The test that failed, from pytest's or the C++ tests' output."""
    if code == ENDLESS:
        return "does not end"
    lines = [line for line in output.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:] or [""]
    if code != 1 and (inside := re.search(r'(tests/[\w/]+\.py)", line \d+ in (test_\w+)', output)):
        return f"{inside[1]}::{inside[2]} ends the process ({code})"
    return failed[0].removeprefix("FAILED ").removeprefix("ERROR ").partition(" - ")[0][:160]


def numbers(ranges: list[str]) -> set[int]:
    chosen: set[int] = set()
    for each in ranges:
        first, _, last = each.partition("-")
        chosen.update(range(int(first), int(last or first) + 1))
    return chosen


def report(faults: list[Fault], results: dict[str, Any]) -> None:
    tried, noticed, missed = Counter[str](), Counter[str](), list[Fault]()
    for fault in (f for f in faults if str(f.number) in results and not f.equal):
        area = "Python" if fault.is_python else fault.file.split("/")[1]
        tried[area] += 1
        noticed[area] += bool(results[str(fault.number)]["noticed"])
        missed += [] if results[str(fault.number)]["noticed"] else [fault]
    print(f"\n{'':8} faults  noticed")
    for name in ("kernels", "core", "bind", "Python"):
        print(f"{name:8} {tried[name]:6}  {noticed[name]:7}")
    share = 100 * noticed.total() / max(tried.total(), 1)
    print(f"{'all':8} {tried.total():6}  {noticed.total():7}  {share:.1f} %")
    for fault in missed:
        print(f"not noticed: {fault}: {fault.text!r} -> {fault.instead!r}")
    for fault in (f for f in faults if f.equal):
        print(f"changes nothing: {fault}: {fault.equal}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="numbers of faults, or ranges of them")
    parser.add_argument("--short", action="store_true", help="the tests nearest to each fault alone")
    parser.add_argument("--again", action="store_true", help="also what has been run and was not noticed")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutation")
    parser.add_argument("--prefix", default="", help="a command that runs others, such as 'nice -n 19'")
    parser.add_argument("--report", action="store_true", help="nothing is run: the results there are")
    options = parser.parse_args()
    faults, chosen, folder = read(), numbers(options.only), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if options.report:
        report(faults, results)
        return 0

    def note(fault: Fault, noticed: str, everywhere: bool) -> None:
        print(f"{fault}: {noticed or 'not noticed'} ({time.monotonic() - began:.0f} s)", flush=True)
        results[str(fault.number)] = {"noticed": noticed, "everywhere": everywhere}
        file.write_text(json.dumps(results, indent=1))

    began = time.monotonic()
    tree = Tree(folder, faults, shlex.split(options.prefix))
    tree.make()
    if not (folder / "baseline.json").exists():
        tree.baseline()
    mine = [fault for fault in faults if not fault.equal and (not chosen or fault.number in chosen)]
    for fault in mine:
        known = results.get(str(fault.number))
        if known is None or (options.again and not known["noticed"]):
            note(fault, tree.near(fault), False)
    left = [fault for fault in mine if results[str(fault.number)] == {"noticed": "", "everywhere": False}]
    if left and not options.short:
        for fault, noticed in tree.far(left):
            note(fault, noticed, True)
        for fault in left:
            if not results[str(fault.number)]["noticed"]:
                note(fault, "", True)
    report(faults, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
