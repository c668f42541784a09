"""The example good_train_bad_test.py, in short: the fault is there, is told apart, and is repaired."""

from __future__ import annotations


def test_the_complaint_is_reproduced_and_repaired(example, tmp_path, capsys):
    results = example.main(["--epochs", "2", "--out", str(tmp_path / "picture.png")])
    text = capsys.readouterr().out
    cold, mismatched = text.split("2. the same network")
    assert "cold: bn1: " in cold and "84 updates" in cold and "likewise bn2, bn3" in cold
    assert "mismatched: bn1: " in mismatched and "cold: " not in mismatched
    assert results["training mode"] > 0.85
    assert results["cold"] < results["recalibrated"] - 0.05
    assert results["other scanner"] < 0.5 < 0.8 < results["adapted"]
    assert min(results["recalibrated"], results["zero_debias"]) > 0.8
    assert (tmp_path / "picture.png").stat().st_size > 10_000
