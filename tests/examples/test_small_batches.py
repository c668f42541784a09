"""The example small_batches.py: batch renormalisation helps tiny batches, and is not needed by large ones."""

from __future__ import annotations

import numpy as np
import pytest


def test_renorm_helps_tiny_batches(example, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    results = example.main(["--epochs", "2", "--seeds", "1", "--batch", "2", "32", "--out", str(picture)])
    text = capsys.readouterr().out
    assert all(f"{name:20s} test accuracy" in text for name in ("batch 2", "batch 2, renorm", "batch 32"))
    assert results[2, True][0] > results[2, False][0] + 0.03
    assert picture.stat().st_size > 5_000


@pytest.mark.slow
def test_what_the_picture_shows(example, tmp_path):
    """The whole job: two images a batch gain more than the spread, four gain something, 128 need nothing."""
    results = example.main(["--out", str(tmp_path / "picture.png")])
    gain = {batch: np.mean(results[batch, True]) - np.mean(results[batch, False]) for batch in (2, 4, 128)}
    assert min(results[2, True]) > max(results[2, False]) and gain[2] > 0.08
    assert 0 < gain[4] < gain[2] / 2
    assert abs(gain[128]) < np.std(results[128, True], ddof=1)
