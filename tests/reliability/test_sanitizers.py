"""Sanitizers and fuzzers: the C++ tests, the Python tests and programs with threads, built to notice what a
plain build gets away with. Each test is a build of its own, of minutes."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support.builds import ENVIRONMENT, SOURCE, configure, program, run

pytestmark = pytest.mark.long

CORPUS = SOURCE / "tests" / "data" / "calls"
UNDEFINED = "-fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
IGNORED = f"-fsanitize-ignorelist={SOURCE / 'tests' / 'cpp' / 'undefined.ignore'}"
ADDRESS = f"-fsanitize=address,undefined {UNDEFINED}"
# Leaks: Python frees little at exit, and what is missing in C++ the soak test would see. Use after return:
# the stacks of its own that it wants g++ 12 aligns to 32 bytes (GCC PR 110027), and AVX-512 needs 64.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


# The baseline alone, a third of the time to compile: for what does not depend on the instruction set.
ONE_LEVEL = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=any")


def built(
    folder: Path, compiler: str, flags: str, *targets: str, openmp: str, levels: tuple[str, ...] = ()
) -> Path:
    options = (
        *levels,
        f"-DCMAKE_CXX_COMPILER={program(compiler)}", f"-DCMAKE_CXX_FLAGS={flags}", "-DBATCHNORM_TESTS=ON",
        "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1", f"-DBATCHNORM_OPENMP={openmp}",
    )  # fmt: skip
    configure(SOURCE, folder, *options)
    run(program("cmake"), "--build", folder, "--target", *targets)
    return folder


def passed(output: str) -> int:
    found = re.search(r"(\d+) passed, 0 failed\n$", output)
    assert found, output[-4000:]
    return int(found[1])


# ---- AddressSanitizer and UndefinedBehaviorSanitizer -------------------------------------------------------


@pytest.mark.parametrize("openmp", ["ON", "OFF"])
def test_address_and_undefined_in_the_cpp_tests(tmp_path, openmp, record_property):
    folder = built(tmp_path, "g++", ADDRESS, "test_batchnorm", "train_and_serve", openmp=openmp)
    quick = () if openmp == "ON" else ("--quick",)  # what differs is who makes the threads
    leaks = OPTIONS | {"ASAN_OPTIONS": OPTIONS["ASAN_OPTIONS"].replace("detect_leaks=0", "detect_leaks=1")}
    record_property("tried", passed(run(folder / "test_batchnorm", *quick, **leaks)))
    run(folder / "train_and_serve", **leaks)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A folder with the package, whose extension is instrumented."""
    folder = tmp_path_factory.mktemp("sanitized")
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-C",
        f"build-dir={folder / 'build'}", "-C", f"cmake.define.CMAKE_CXX_FLAGS={ADDRESS}", "-C",
        "cmake.build-type=Debug", "-C", "cmake.define.CMAKE_CXX_FLAGS_DEBUG=-O1", "-C",
        "install.components=python", "--target", folder / "site", SOURCE,
    )  # fmt: skip
    return folder / "site"


def python_environment(site: Path) -> dict[str, str]:
    """With the runtimes of the sanitizers in place before Python, and the instrumented package first."""
    runtimes = [run(program("g++"), f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    others = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    path = os.pathsep.join([str(site), *dict.fromkeys(others)])
    return {"LD_PRELOAD": " ".join(runtimes), "PYTHONMALLOC": "malloc", "PYTHONPATH": path, "SLOWER": "10",
            **OPTIONS}  # fmt: skip


SUITES = {
    "operations": ["tests/operations", "--ignore=tests/operations/test_process.py"],
    "layer, data, files": ["tests/layer", "tests/data", "tests/io"],
}


@pytest.mark.parametrize("suite", SUITES)
def test_address_and_undefined_in_the_python_tests(sanitized, suite, record_property):

    environment = python_environment(sanitized)
    where = run(sys.executable, "-S", "-c", "import batchnorm._core as c; print(c.__file__)", **environment)
    assert where.startswith(str(sanitized)), where
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "--rootdir", str(SOURCE), *SUITES[suite]]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pytest", *arguments], cwd=SOURCE, env=ENVIRONMENT | environment,
        capture_output=True, text=True, check=False, timeout=4 * 3600,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    record_property("tried", int(re.search(r"(\d+) passed", last)[1]))


# ---- ThreadSanitizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("openmp", ["ON", "OFF"])
def test_threads_under_thread_sanitizer(tmp_path, openmp, record_property):
    # libomp is not instrumented: archer tells the sanitizer what its barriers mean.
    folder = built(
        tmp_path, "clang++", "-fsanitize=thread -g1", "test_batchnorm", "train_and_serve", openmp=openmp,
        levels=ONE_LEVEL,
    )  # fmt: skip
    environment = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1", "OMP_NUM_THREADS": "4"}
    if openmp == "ON":
        archers = sorted(glob.glob("/usr/lib/llvm-*/lib/libarcher.so"))
        if not archers:
            pytest.skip("libarcher.so is not installed (libomp-dev)")
        environment |= {"OMP_TOOL_LIBRARIES": archers[-1], "ARCHER_OPTIONS": "verbose=1"}
    fixed = ("setarch", "-R") if shutil.which("setarch") else ()  # addresses where the sanitizer expects them
    output = run(*fixed, folder / "test_batchnorm", "--quick", **environment)
    assert openmp == "OFF" or "Archer detected OpenMP application with TSan" in output, output[:2000]
    record_property("tried", passed(output))
    run(*fixed, folder / "train_and_serve", **environment)


# ---- libFuzzer ---------------------------------------------------------------------------------------------


def test_fuzz_calls(tmp_path, record_property):
    # What was worth keeping lies in tests/data/calls; new finds stay in the temporary folder.
    flags = f"-fsanitize=fuzzer-no-link,address,undefined {IGNORED} {UNDEFINED}"
    folder = built(tmp_path / "build", "clang++", flags, "fuzz_calls", openmp="OFF", levels=ONE_LEVEL)
    (tmp_path / "found").mkdir()
    seconds = int(os.environ.get("FUZZ_SECONDS", "600"))
    output = run(
        folder / "fuzz_calls", f"-max_total_time={seconds}", "-max_len=260", "-print_final_stats=1",
        f"-artifact_prefix={tmp_path}/", tmp_path / "found", CORPUS, **OPTIONS,
    )  # fmt: skip
    tried = re.search(r"stat::number_of_executed_units:\s+(\d+)", output)
    assert tried, output[-3000:]
    record_property("tried", int(tried[1]))
