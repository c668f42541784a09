"""The example with padded sequences, in a short form: with lengths, padding moves nothing."""

from __future__ import annotations

import pytest


def test_padding_moves_only_the_network_without_lengths(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "TEST_LINES", 60)
    picture = tmp_path / "lines.png"
    results = example.main(["--lines", "320", "--epochs", "3", "--seeds", "1", "--out", str(picture)])
    (with_lengths,), (without,) = results.values()
    assert with_lengths.accuracy[-1] > 0.6
    moves = [abs(run.alone - run.padded).max() for run in (with_lengths, without)]
    assert moves[0] < 1e-4 < 1e-2 < moves[1]
    assert picture.stat().st_size > 20_000
    text = capsys.readouterr().out
    assert "is padding" in text and "with lengths" in text and "0 of 60" in text


def test_bad_options(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])
    assert "expected >= 1, >= 1 and >= 16" in capsys.readouterr().err


@pytest.mark.slow
def test_lengths_are_needed(example, tmp_path):
    """The whole job: the worst run with lengths beats the best without, and padding changes no answer."""
    good, bad = example.main(["--out", str(tmp_path / "lines.png")]).values()
    assert len(good) == len(bad) == 5
    assert min(run.accuracy[-1] for run in good) > max(run.accuracy[-1] for run in bad) + 0.01
    changed = [
        sum((run.alone.argmax(1) != run.padded.argmax(1)).sum() for run in runs) for runs in (good, bad)
    ]
    assert changed[0] == 0 < changed[1]
