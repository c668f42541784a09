"""LeNet on several processes: three of MPI with uneven shares learn what one does, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.mpi import mpirun, needs_mpi

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "lenet_processes.py"
SHORT = ("--epochs", "1", "--limit", "96")


def test_one_process(example, capsys):
    digest = example.main(SHORT)
    line = capsys.readouterr().out
    assert line.startswith("1 processes: test accuracy ") and line.endswith(f"learned {digest}\n")
    with pytest.raises(SystemExit):
        example.main(["--batch", "0"])
    assert "--batch is 0, too few for 1 processes" in capsys.readouterr().err


@needs_mpi
def test_three_processes_learn_the_same_bits(example):
    (line,) = filter(None, mpirun(3, PROGRAM, *SHORT))
    assert line.startswith("3 processes: ") and line.endswith(f"learned {example.main(SHORT)}")
