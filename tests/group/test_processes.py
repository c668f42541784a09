"""Processes of MPI and of torch.distributed: one hash over ranks, cuts and orders, and failures that all
learn of."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batchnorm.distributed import LocalGroup
from group import ranks as program

from support.mpi import mpirun, needs_mpi

PROGRAM = Path(__file__).with_name("ranks.py")
FAILURE = "x is 'x' (str), expected a numpy.ndarray of float32, float64, float16 or bfloat16"


@pytest.fixture(scope="module")
def alone() -> str:
    """The hash that one rank gives, in this process."""
    made = program.results(LocalGroup(1)[0], 0, 1, 0)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a, np.float64).tobytes() for a in made)).hexdigest()[
        :16
    ]


def check(lines: list[str], ranks: int, alone: str) -> None:
    line = f"{alone} {'overflows' if ranks > 1 else 'fits'}"
    expected = [f"{line} TypeError: {FAILURE}"]
    expected += [f"{line} RuntimeError: rank {ranks - 1} of the group failed: {FAILURE}"] * (ranks - 1)
    assert sorted(filter(None, lines)) == sorted(expected)


@needs_mpi
@pytest.mark.parametrize(("ranks", "seed"), [(1, 1), (2, 2), (3, 3), (3, 4), (5, 5)])
def test_mpi(ranks: int, seed: int, alone: str) -> None:
    check(list(mpirun(ranks, PROGRAM, "mpi", seed)), ranks, alone)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize(("ranks", "seed"), [(1, 1), (3, 3)])
def test_torch_distributed(ranks: int, seed: int, alone: str, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "gloo", str(seed), str(tmp_path)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(ranks)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    lines = []
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        lines += output.split("\n")
    check(lines, ranks, alone)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_threads(ranks: int, alone: str) -> None:
    def one(rank):
        made = program.results(rank, rank.rank, ranks, ranks)
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(a, np.float64).tobytes() for a in made)
        ).hexdigest()[:16]

    assert LocalGroup(ranks).run(one) == [alone] * ranks
