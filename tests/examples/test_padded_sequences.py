"""The example with padded sequences, in a short form: with lengths, padding moves nothing."""

from __future__ import annotations

import pytest


def test_padding_moves_only_the_network_without_lengths(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "TEST_LINES", 60)
    picture = tmp_path / "lines.png"
    results = example.main(["--lines", "320", "--epochs", "3", "--seeds", "1", "--out", str(picture)])
    (with_lengths,), (without,) = results.values()
    assert with_lengths.alone == with_lengths.padded
    assert with_lengths.alone[-1] > 0.6
    assert picture.stat().st_size > 20_000
    text = capsys.readouterr().out
    assert "is padding" in text and "with lengths" in text and "mean of 1 runs" in text
    data = example.load_digits(0, digit_size=example.SIDE, border=0)
    lines = example.make_lines(data.test_images, data.test_labels, 40, 3)
    moves = []
    for run in (with_lengths, without):
        alone, padded = (example.scores(run.network, lines, n) for n in (0, example.PADDED_TO))
        moves.append(abs(alone - padded).max())
    assert moves[0] < 1e-4 < 1e-2 < moves[1]


def test_bad_options(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])
    assert "expected >= 1, >= 1 and >= 16" in capsys.readouterr().err


@pytest.mark.slow
def test_lengths_are_needed(example, tmp_path):
    """The whole job: the mean over the runs is clearly better with lengths."""
    results = example.main(["--out", str(tmp_path / "lines.png")])
    good, bad = (sum(run.alone[-1] for run in runs) / len(runs) for runs in results.values())
    assert good > bad + 0.02
