"""The example small_batches.py, in short: batch renormalisation helps where batches are tiny."""

from __future__ import annotations


def test_renorm_helps_tiny_batches(example, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    results = example.main(["--epochs", "2", "--seeds", "1", "--batch", "2", "32", "--out", str(picture)])
    text = capsys.readouterr().out
    assert all(f"{name:20s} test accuracy" in text for name in ("batch 2", "batch 2, renorm", "batch 32"))
    assert results[2, True][0] > results[2, False][0] + 0.03
    assert picture.stat().st_size > 5_000
