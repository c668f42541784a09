"""The history of a layer's statistics: what it holds, in bounded memory, and the picture of it."""

from __future__ import annotations

import builtins
import copy
import pickle

import numpy as np
import pytest
from batchnorm import BatchNorm, History, moments

C = 5


def images(seed):
    return np.random.default_rng(seed).normal(1, 2, (6, C, 5)).astype(np.float32)


def test_it_holds_what_has_happened():
    layer = BatchNorm(C, history=100, zero_debias=True)
    expected = []
    for step in range(20):
        layer(images(step), **({"stats": "running", "update": True} if step == 7 else {}))
        batch = moments(images(step), ddof=1)
        expected.append([batch.mean, batch.var, layer.running_mean.copy(), layer.running_var.copy()])
        layer(images(90), update=False)
    layer(images(0)[:0])
    history = layer.history
    series = [history.batch_mean, history.batch_var, history.running_mean, history.running_var]
    np.testing.assert_allclose(np.stack(series, axis=1), np.array(expected), rtol=1e-6)
    assert history.steps.tolist() == list(range(1, 21)) and len(history) == 20
    assert series[0].dtype == np.float32
    assert repr(history) == "History(20 of 20 updates, limit=100)"


def test_what_of_a_batch_enters_the_running_statistics():
    """Only what counts, per channel; of parts their average; with several axes every activation."""
    x, mask = images(0), np.ones((6, C, 5), bool)
    mask[1:, 2], mask[:, 3] = False, False
    mask[0, 3, 0] = True
    layer = BatchNorm(C, history=10, decay=0)
    layer(x, mask=mask)
    batch = moments(x, mask=mask, ddof=1)
    np.testing.assert_allclose(
        layer.history.batch_mean[0], np.where(np.arange(C) == 3, x[0, 3, 0], batch.mean), rtol=1e-5
    )
    assert np.isnan(layer.history.batch_var[0, 3]) and layer.history.running_var[0, 3] == 1
    layer = BatchNorm(C, history=10, decay=0, virtual_batch_size=3)
    layer(x)
    np.testing.assert_allclose(layer.history.batch_mean, layer.history.running_mean, rtol=1e-6)
    np.testing.assert_allclose(layer.history.batch_var, layer.history.running_var, rtol=1e-6)
    layer = BatchNorm((C, 5), channel_axis=(1, 2), history=10, decay=0)
    layer(x)
    assert layer.history.batch_var.shape == (1, 5 * C)
    np.testing.assert_allclose(layer.history.batch_var[0], x.var(axis=0, ddof=1).ravel(), rtol=1e-5)


@pytest.mark.parametrize("first", [[0.4, 0.4, 0.4], [3, 0, 0]], ids=str)
@pytest.mark.parametrize("stats", ["batch", "running"])
def test_parts_that_do_not_enter(first, stats):
    layer = BatchNorm(C, history=10, decay=0, virtual_batch_size=3)
    layer(images(0))
    layer(images(1), weights=np.repeat([[*first, 1, 1, 1]], 5, 0).T, stats=stats, update=True)
    np.testing.assert_allclose(layer.history.batch_mean, layer.history.running_mean, rtol=1e-5)
    np.testing.assert_allclose(layer.history.batch_var, layer.history.running_var, rtol=1e-5)


@pytest.mark.parametrize("updates", [1, 7, 8, 9, 16, 17, 100, 1000])
def test_memory_is_bounded_and_the_whole_of_training_stays_in_view(updates):
    layer = BatchNorm(C, history=8)
    x = images(0)
    for step in range(1, updates + 1):
        layer(x - x.mean(axis=(0, 2), keepdims=True) + np.float32(step))
    steps = layer.history.steps
    assert len(steps) <= 8 and len(layer.history.batch_mean) == len(steps)
    assert len(steps) >= min(updates, 8) // 2
    np.testing.assert_allclose(layer.history.batch_mean[:, 0], steps, rtol=1e-5)
    stride = steps[0]
    assert (np.diff(steps) == stride).all() and steps[-1] > updates - stride


def test_recording_changes_no_bit_and_is_no_part_of_the_state():
    plain, recorded = BatchNorm(C), BatchNorm(C).record_history(10)
    for step in range(3):
        assert plain(images(step)).tobytes() == recorded(images(step)).tobytes()
    assert {k: v.tobytes() for k, v in plain.state_dict().items()} == {
        k: v.tobytes() for k, v in recorded.state_dict().items()
    }
    assert len(pickle.loads(pickle.dumps(recorded)).history) == 3
    other = copy.deepcopy(recorded)
    other(images(3))
    assert (len(other.history), len(recorded.history), len(recorded.clone().history)) == (4, 3, 0)
    assert recorded.record_history(None).history is None
    assert plain.history is None and len(BatchNorm(history=3).history.batch_mean) == 0


def test_updates_that_are_taken_back_are_forgotten():
    layer = BatchNorm(C, history=10)
    layer(images(0))
    before = layer.snapshot()
    for step in range(1, 4):
        layer(images(step))
    layer.rollback(before)
    assert layer.history.steps.tolist() == [1]
    layer(images(5))
    assert layer.history.steps.tolist() == [1, 2] and repr(layer.history).startswith("History(2 of 2 updates")


def test_only_what_is_taken_back_is_forgotten():
    """Also where numbers of updates began anew, or another layer's are among them."""
    layer = BatchNorm(C, history=50)
    for step in range(5):
        layer(images(step))
    layer.recalibrate([images(0)])
    before, other = layer.snapshot(), layer.clone(share="stats")
    other(images(1))
    layer(images(2))
    layer.rollback(before)
    assert layer.history.steps.tolist() == [1, 2, 3, 4, 5]
    assert repr(layer.history).startswith("History(5 of 5 updates")


def test_a_thinned_history_counts_what_was_taken_back():
    layer = BatchNorm(C, history=4)
    for step in range(8):
        layer(images(step))
    before = layer.snapshot()
    for _ in range(5):
        layer(images(9))
        layer.rollback(before)
    layer(images(10))
    assert layer.running.num_updates == 9
    assert repr(layer.history).startswith("History(4 of 9 updates")
    assert layer.history.steps.tolist() == [2, 4, 6, 8]


@pytest.mark.parametrize("limit", [1, 0, -5, 2.5, True, "10"])
def test_bad_limits(limit):
    for call in (
        lambda: BatchNorm(C, history=limit),
        lambda: BatchNorm(C).record_history(limit),
        lambda: History(limit),
    ):
        with pytest.raises((TypeError, ValueError), match=r"history is .*, expected an int >= 2"):
            call()


# ---- the picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 256])
def test_the_picture(tmp_path, channels):
    pytest.importorskip("matplotlib")
    layer = BatchNorm(channels, history=50, name="conv1.bn")
    rng, scale = np.random.default_rng(0), np.arange(1, channels + 1, dtype=np.float32)
    for _ in range(60):
        layer(rng.normal(size=(8, channels)).astype(np.float32) * scale)
    figure = layer.plot_statistics(tmp_path / "statistics.png", title="A layer")
    assert (tmp_path / "statistics.png").stat().st_size > 10_000
    assert len(figure.axes) == 4 and figure.get_suptitle() == "A layer"
    assert {axis.get_xlabel() for axis in figure.axes} == {"", "update"}
    assert all(axis.get_ylabel() and axis.get_title() for axis in figure.axes)
    lines = figure.axes[0].get_lines()
    assert len(lines) == 2 * min(channels, 6)
    np.testing.assert_array_equal(lines[1].get_ydata(), layer.history.running_mean[:, 0])
    one = layer.plot_statistics(channels=[channels - 1])
    assert one.axes[0].get_lines()[1].get_label() == f"channel {channels - 1}"
    assert one.get_suptitle() == "Batch and running statistics of conv1.bn: 30 of 60 updates"


def test_a_picture_of_statistics_with_nan():
    pytest.importorskip("matplotlib")
    layer = BatchNorm(2, history=50)
    x = np.full((4, 2), np.nan, np.float32)
    layer(x)
    assert layer.plot_statistics().axes
    x[:, 0] = np.arange(4)
    layer(x)
    assert layer.plot_statistics().axes


def test_pictures_that_cannot_be_drawn(monkeypatch):
    for layer in (BatchNorm(C), BatchNorm(C, history=5)):
        with pytest.raises(RuntimeError, match=r"nothing to draw: .*history=500.*record_history\(500\)"):
            layer.plot_statistics()
    layer = BatchNorm(C, history=5)
    layer(images(0))
    for channels, error in (
        ("all", TypeError),
        (3, TypeError),
        ([1.5], TypeError),
        ([], ValueError),
        ([C], ValueError),
        ([-1], ValueError),
    ):
        with pytest.raises(error, match=r"channels is .*, expected channel numbers, ints from 0 to 4"):
            layer.plot_statistics(channels=channels)
    real = builtins.__import__

    def without_matplotlib(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ModuleNotFoundError, match="needs matplotlib: pip install matplotlib"):
        layer.plot_statistics()
