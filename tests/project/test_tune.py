"""Thresholds that are measured: the way there, and that nothing is left changed."""

from __future__ import annotations

import math

import pytest
from batchnorm import _core, tune
from batchnorm.tune import Line


def test_each_size_is_measured_and_nothing_stays_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    ways = iter([2.0, 1.0, 1.0, 1.0] * 1000)  # below the threshold, beyond it

    def seconds(call: object) -> float:
        call()  # type: ignore[operator]
        used.append(_core.tuning())
        return next(ways)

    monkeypatch.setattr(tune, "_seconds", seconds)
    _core.set_tuning("map_bytes=77")
    try:
        before = _core.tuning()
        lines = list(tune.tune(8 << 20, rounds=2))
        assert _core.tuning() == before
    finally:
        _core.set_tuning("")
    names = [line.name for line in lines]
    assert names[:4] == ["cached_bytes", "cached_bytes", "fetch_bytes", "fetch_bytes"]
    assert names[4:] == ["parallel_elements"] * 8 and [line.size for line in lines[:2]] == [4 << 20, 8 << 20]
    assert all(gain == 1.5 for line in lines for gain in line.gains)  # the median of 2 and 1
    assert {len(line.gains) for line in lines} == {3, 1}
    for setting in used[:4]:
        assert "map_bytes=77," in setting
    assert [f"cached_bytes={value}," in used[i] for i, value in enumerate((1 << 50, 0))] == [True, True]


def test_a_measurement_that_is_broken_off_leaves_nothing_changed() -> None:
    before = _core.tuning()
    lines = tune.tune(4 << 20, rounds=1)
    assert next(lines).gain > 0
    lines.close()  # type: ignore[attr-defined]
    assert _core.tuning() == before


@pytest.mark.parametrize(
    ("gains", "threshold"),
    [
        ([0.5, 0.9, 1.1, 1.2], 16),  # always from 16 on
        ([0.5, 1.1, 0.9, 1.2], 32),  # not from 8 on
        ([1.1, 1.2, 1.3, 1.4], 4),
        ([0.5, 0.6, 0.7, 0.8], 64),  # never
        ([1.1, 1.0, 1.0, 0.9], 64),
    ],
)
def test_the_threshold_lies_where_the_other_way_starts_to_win(gains: list[float], threshold: int) -> None:
    lines = [Line("cached_bytes", 4 << i, (gain, gain)) for i, gain in enumerate(gains)]
    text = tune.recommended([*lines, Line("fetch_bytes", 8, (4.0, 1.0))])
    assert text == f"cached_bytes={threshold - 1},fetch_bytes=7"
    assert math.isclose(Line("fetch_bytes", 8, (4.0, 1.0)).gain, 2)
    _core.set_tuning(text)
    _core.set_tuning("")
