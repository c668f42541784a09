"""The image preprocessing example: one call against NumPy's lines, on real photos, with a picture."""

from __future__ import annotations

import numpy as np
import pytest


def test_whole_example(example, tmp_path, capsys):
    result = example.main(["--rounds", "3", "--out", str(tmp_path / "picture.png")])
    assert result.planes.shape == (2, 3, 427, 640) and result.planes.flags.c_contiguous
    assert result.equal > 0.999
    np.testing.assert_allclose(result.planes.mean((0, 2, 3), dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(result.planes.std((0, 2, 3), dtype=np.float64), 1, rtol=1e-6)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in ("2 photos", "equal to float64 arithmetic", "times as long", "picture.png"):
        assert words in printed


def test_faster_than_numpy(example, tmp_path):
    assert example.main(["--rounds", "9", "--out", str(tmp_path / "picture.png")]).ratio > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--out", "picture.txt"], "expected a name that ends in .png, .pdf or .svg"),
        (["--out", "nowhere/picture.png"], "folder nowhere does not exist"),
    ],
)
def test_bad_options(example, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        example.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
