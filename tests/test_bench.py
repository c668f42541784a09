"""The benchmark runs, and its contestants compute the same thing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"

pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="bench/ is not beside the tests")


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers", BENCH / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def captured(call):
    """The output array that a contestant's call writes: the one named out in its closure, at any depth."""
    seen, pending = set(), [call]
    while pending:
        function = pending.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name == "out":
                return cell.cell_contents
            if callable(cell.cell_contents) and hasattr(cell.cell_contents, "__code__"):
                pending.append(cell.cell_contents)
    raise AssertionError("no output found")


@pytest.mark.parametrize("op", ["forward", "backward", "inference"])
@pytest.mark.parametrize("dims, axis", [((4, 5, 6, 7), 1), ((4, 6, 7, 5), 3), ((30, 5), 1)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_contestants_agree(peers, op, dims, axis, activation):
    results = []
    for name in ("batchnorm", "numpy"):
        call = peers.PEERS[name](1).call(op, dims, axis, "float32", activation)
        call()
        results.append(captured(call).copy())
    assert np.abs(results[0]).max() > 0.5
    np.testing.assert_allclose(results[0], results[1], atol=2e-5)


def test_run(tmp_path):
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            sys.executable,
            "run.py",
            "--set",
            "tiny",
            "--peers",
            "numpy",
            "--rounds",
            "1",
            "--json",
            str(report),
        ],
        cwd=BENCH,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny total" in done.stdout
    results = json.loads(report.read_text())["results"]
    assert len(results) == 6
    assert all(min(times) > 0 for result in results for times in result["seconds"].values())


def test_unknown_options_are_errors():
    done = subprocess.run(
        [sys.executable, "run.py", "--set", "r51"], cwd=BENCH, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "r51" in done.stderr
