"""The example small_batches.py, in short: batch renormalisation helps where batches are tiny."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

for _module in ("sklearn", "matplotlib"):
    pytest.importorskip(_module, reason=f"the example needs {_module} (extra demo)")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("small_batches")
    for name in ("small_batches", "good_train_bad_test"):
        sys.modules.pop(name)


def test_renorm_helps_tiny_batches(example, monkeypatch, tmp_path, capsys):
    short = ("batch 2", "batch 2, renorm", "batch 128, ghosts of 16")
    monkeypatch.setattr(example, "RUNS", {name: example.RUNS[name] for name in short})
    results = example.main(["--epochs", "2", "--seeds", "1", "--out", str(tmp_path / "picture.png")])
    text = capsys.readouterr().out
    assert all(f"{name:24s} test accuracy" in text for name in short)
    assert results["batch 2, renorm"][0] > results["batch 2"][0] + 0.03
    assert (tmp_path / "picture.png").stat().st_size > 5_000
