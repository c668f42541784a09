"""The example of a data set's statistics: the whole job, small."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest


def assert_report(report):
    assert np.array_equal(report.one_pass.moments.mean, report.merged.mean)
    assert np.array_equal(report.one_pass.moments.var, report.merged.var)
    np.testing.assert_allclose(report.one_pass.mean, report.numpy_mean, rtol=1e-9)
    np.testing.assert_allclose(report.one_pass.var, report.numpy_var, rtol=1e-9)


def test_short_run(example, capsys, monkeypatch):
    # The processes of the workers import the example.
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(example.__file__))
    monkeypatch.setattr(example, "CROPS", 20)
    report = example.main(["--files", "3"])
    assert_report(report)
    assert report.one_pass.count == 3 * 20 * example.SIDE**2
    assert report.normalised.shape == (1, example.SIDE, example.SIDE, 3)
    printed = capsys.readouterr().out
    for words in (
        "3 files",
        "one pass",
        "2 processes: the same bits",
        "starting them",
        "first image normalised",
    ):
        assert words in printed


def test_a_folder_of_ones_own(example, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(example.__file__))
    rng = np.random.default_rng(0)
    images = [rng.random((n, 5, 4, 2)).astype(np.float32) for n in (3, 1, 4)]
    for i, x in enumerate(images):
        np.save(tmp_path / f"{i}.npy", x)
    report = example.main(["--data", str(tmp_path)])
    assert_report(report)
    assert report.one_pass.count == 8 * 20
    x, m = images[0][:1], report.one_pass
    np.testing.assert_allclose(report.normalised, (x - m.mean) / m.std, rtol=1e-5, atol=1e-6)


def test_a_folder_of_pictures(example, tmp_path, monkeypatch):
    """Its claim to be exact, too: of integers, only the last operation rounds."""
    image = pytest.importorskip("PIL.Image", reason="the example needs Pillow for pictures")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(example.__file__))
    pixels = [np.random.default_rng(i).integers(0, 256, (5 + i, 4, 3), dtype=np.uint8) for i in range(3)]
    for i, x in enumerate(pixels):
        image.fromarray(x).save(tmp_path / f"{i}.png")
    report = example.main(["--data", str(tmp_path)])
    assert_report(report)
    for channel in range(3):
        values = [Fraction(int(v)) for x in pixels for v in x[..., channel].flat]
        mean = sum(values) / len(values)
        assert report.merged.mean[channel] == float(mean)
        assert report.merged.var[channel] == float(sum((v - mean) ** 2 for v in values) / len(values))
    assert report.one_pass.count == (5 + 6 + 7) * 4 and 0 < report.one_pass.mean.min() < 1
    assert report.normalised.shape == (1, 5, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--files", "0"], "--files is 0, expected at least 1"),
        (["--data", "."], "no .npy, .png, .jpg"),
    ],
)
def test_bad_options(example, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        example.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err
