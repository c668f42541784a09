"""Programs on several processes of MPI, on one machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None,
    reason="MPI is not installed: apt install openmpi-bin, pip install 'batchnorm[mpi]'",
)


def mpirun(ranks: int, program: Path, *arguments: object, expect: int = 0) -> Sequence[str]:
    """What a Python program prints on so many processes, line by line."""
    of_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = ["mpirun", *of_root, "--oversubscribe", "-n", str(ranks), sys.executable, str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout.split("\n")
