"""Small calls keep their price: instructions by callgrind, which repeat on any machine, however busy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "instructions.py"

# Instructions per call on float32 [2, 3, 4, 4] of version 0.2, CPython 3.11, g++ 12.
BAR = {
    "batch_norm": 8_700,
    "batch_norm_train": 16_300,
    "batch_norm_backward": 13_500,
    "BatchNorm forward and backward": 53_000,
}
MARGIN = 1.03

pytestmark = [
    pytest.mark.skipif(not PROGRAM.exists(), reason="bench/ is not beside the tests"),
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the bar was measured with CPython 3.11"),
]


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--calls", "50"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(.+?) +(\d+) instructions per call$", done.stdout, re.MULTILINE)
    return {name: int(number) for name, number in found}


@pytest.mark.parametrize("call", BAR)
def test_a_small_call_takes_no_more_instructions(counts: dict[str, int], call: str) -> None:
    assert counts[call] <= MARGIN * BAR[call], counts
