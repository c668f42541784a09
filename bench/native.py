"""Builds the programs of bench/cpp into build/bench of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"


class BuildFailed(Exception):
    """The message says what is missing or what the compiler said."""


def tool(name: str) -> str | None:
    """A program beside this Python (in its virtual environment, activated or not), or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def build(dnnl_prefix: Path) -> Path:
    """The folder with the programs, up to date."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        raise BuildFailed("cmake is missing (pip install cmake ninja)")
    configure = [cmake, "-S", str(HERE / "cpp"), "-B", str(BUILD), "-DBENCH_MICRO=OFF"]
    configure.append(f"-DDNNL_PREFIX={dnnl_prefix}")
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        made = _attempt(configure, [cmake, "--build", str(BUILD)])
    except BuildFailed:
        # A folder that another interpreter's cmake configured remembers paths that may be gone.
        shutil.rmtree(BUILD, ignore_errors=True)
        made = _attempt(configure, [cmake, "--build", str(BUILD)])
    return made


def _attempt(*commands: list[str]) -> Path:
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as e:
            raise BuildFailed(f"{command[0]}: {e}") from None
        if done.returncode:
            last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-12:]
            raise BuildFailed("\n".join(last))
    return BUILD


def opencl_driver(prefix: Path) -> str | None:
    """The CPU driver of oneDNN's SYCL build, which finds no device without its name."""
    found = sorted((prefix / "lib").glob("libintelocl.so*"), key=lambda p: len(p.name))
    return str(found[0]) if found else None
