"""The example good_train_bad_test.py: from every seed the fault is there, is told apart, and is repaired."""

from __future__ import annotations


def test_the_complaint_is_reproduced_and_repaired(example, tmp_path, capsys):
    results = example.main(["--out", str(tmp_path / "picture.png")])
    cold, mismatched = capsys.readouterr().out.split("2. Recalibrated")
    assert "      cold: bn1: " in cold and "126 updates" in cold and "cold: bn2, cold: bn3" in cold
    assert "      mismatched: bn1: " in mismatched and "cold: " not in mismatched
    assert all(len(values) == 5 and example.spread(values) in mismatched for values in results.values())
    repaired = [results[name] for name in ("recalibrated", "zero_debias", "adapted")]
    assert max(results["cold"]) < 0.5 and max(results["other scanner"]) < 0.7
    assert min(map(min, repaired)) > 0.9 and min(results["training mode"]) > 0.9
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_one_seed(example, tmp_path, capsys):
    example.main(["--epochs", "1", "--seed", "3", "--seeds", "1", "--out", str(tmp_path / "picture.png")])
    assert "±" not in capsys.readouterr().out.split("each seed")[1]
