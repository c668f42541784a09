"""The example pytorch_repair.py: a stock model is bad in testing, is diagnosed, repaired, folded."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the example needs torch (extra torch)")


def test_a_stock_model_is_diagnosed_and_repaired(example, tmp_path, capsys):
    found = example.main(["--epochs", "3", "--out", str(tmp_path / "picture.png")])
    assert found["training"] > 0.95 and found["testing"] < 0.5
    assert found["before"].count("cold") == 4 and found["after"] == ("fine",)
    assert found["repaired"] == found["folded"] > 0.95
    printed = capsys.readouterr().out
    assert "momentum=0.001" in printed and "initial values still weigh" in " ".join(printed.split())
    assert "instead of" in printed
    assert (tmp_path / "picture.png").stat().st_size > 10_000
