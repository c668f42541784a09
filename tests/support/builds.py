"""Builds of the C++ library and programs of the system, for the tests that need them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]

# Several processes and threads at once: who waits must not spin.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive"}


@functools.cache
def find_program(name: str) -> str | None:
    """The program beside this Python (where pip puts it), or else on PATH, if it works."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    works = found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
    return found if works else None


def program(name: str) -> str:
    found = find_program(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: object, deadline: float = 3600, **environment: str) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run(
        [str(c) for c in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=deadline,
        env=ENVIRONMENT | environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


def configure(source: Path, build: Path, *options: str) -> None:
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}")
    run(program("cmake"), *generator, "-S", source, "-B", build, *options)
