"""A layer's statistics over time, in bounded memory, and their picture."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..running import entered
from ..settings import integer, kind
from ..typing import Array, RunningLike

__all__ = ["History"]


def _series(index: int, doc: str) -> property:
    def get(history: History) -> Array:
        return np.stack([row[index] for row in history._rows] or [np.zeros(0, np.float32)])[: len(history)]

    return property(get, doc=doc)


class History:
    """Batch and running statistics at up to `limit` updates, evenly spread over all of them.

    When `limit` updates are held, every second one is dropped. From then on only every second one is taken,
    then every fourth, and so on. So memory stays below ``16 * limit * C`` bytes, and the whole of training
    stays in view.

    Parameters
    ----------
    limit : int
        How many updates are held at most; at least 2.

    Attributes
    ----------
    steps : ndarray of int64, shape (T,)
        The updates that are held, counted from 1.
    batch_mean, batch_var, running_mean, running_var : ndarray of float32, shape (T, C)
        Statistics of these batches, and the running ones after them. `batch_var` is the estimate that the
        running variance receives (see ``running_ddof``). NaN where a batch had no values of a channel.

    Raises
    ------
    TypeError, ValueError
        `limit` is no int, or less than 2.
    """

    def __init__(self, limit: int) -> None:
        expected = "an int >= 2, the number of updates to keep, or None"
        self.limit = integer("history", limit, 2, 2**31, expected)
        self._rows: list[Array] = []  # each (4, C) float32
        self._steps: list[int] = []  # the layer's number of each update
        self._places: list[int] = []  # and that among those noted
        self._stride, self._seen = 1, 0

    def add(self, running: RunningLike, saved: Any, ddof: int) -> None:
        """Note an update that has just happened.

        `saved` has the statistics of its batch: of the shape of the running ones, or with one more axis in
        front, of the parts that were normalised apart.
        """
        self._seen += 1
        if self._seen % self._stride == 0 and len(self._rows) == self.limit:
            self._rows, self._steps, self._places = self._rows[1::2], self._steps[1::2], self._places[1::2]
            self._stride *= 2
        if self._seen % self._stride:
            return
        mean, count = saved.mean, saved.count
        with np.errstate(all="ignore"):
            var = np.maximum(saved.var, 0) * (count / (count - ddof))
            if mean.ndim > running.mean.ndim:  # what the running ones received is the average of the parts
                weight = entered(saved, ddof)
                parts = np.where(weight > 0, np.stack([mean, var]) * weight, 0)
                mean, var = parts.sum(axis=1) / weight.sum(axis=0)
            row = np.stack([mean, var, running.mean, running.var])
            self._rows.append(row.reshape(4, -1).astype(np.float32))
        self._steps.append(running.num_updates)
        self._places.append(self._seen)

    def forget_after(self, seen: int) -> None:
        """Drop all but the first `seen` updates that were noted: they have been taken back."""
        kept = sum(place <= seen for place in self._places)
        self._rows, self._steps, self._places = self._rows[:kept], self._steps[:kept], self._places[:kept]
        self._seen = min(self._seen, seen)

    @property
    def seen(self) -> int:
        """How many updates were noted, held or not."""
        return self._seen

    @property
    def steps(self) -> NDArray[np.int64]:
        """The updates that are held."""
        return np.array(self._steps, np.int64)

    batch_mean = _series(0, "Means of the batches.")
    batch_var = _series(1, "Variances of the batches.")
    running_mean = _series(2, "Running means after the updates.")
    running_var = _series(3, "Running variances after the updates.")

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        return f"History({len(self)} of {self._seen} updates, limit={self.limit})"


# ---- the picture -------------------------------------------------------------------------------------------


def plot(
    history: History | None, *, eps: float, name: str | None = None, channels: Any = None,
    path: str | os.PathLike[str] | None = None, title: str | None = None,
) -> Any:  # fmt: skip
    """Draw the history, a matplotlib Figure; see ``BatchNorm.plot_statistics``."""
    if history is None or not len(history):
        remedy = "build the layer with history=500, or call record_history(500), and train"
        raise RuntimeError(f"plot_statistics() has nothing to draw: {remedy}")
    chosen = _checked_channels(channels, history.batch_mean.shape[1])
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        remedy = "pip install matplotlib (bn.history has the numbers)"
        raise ModuleNotFoundError(f"plot_statistics() needs matplotlib: {remedy}", name=error.name) from error
    figure: Any = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex="col", width_ratios=(3, 2))
    of, steps = f" of {name}" if name else "", history.steps
    figure.suptitle(title or f"Batch and running statistics{of}: {len(steps)} of {steps[-1]} updates")
    for (left, right), which, word in zip(axes, ("mean", "var"), ("mean", "variance"), strict=True):
        batch, running = getattr(history, f"batch_{which}"), getattr(history, f"running_{which}")
        _draw_channels(left, steps, batch[:, chosen], running[:, chosen], chosen, word)
        with np.errstate(all="ignore"):
            apart, ratio = np.abs(batch - running), (batch + eps) / (running + eps)
            if which == "mean":
                apart = apart / np.sqrt(history.running_var + eps)
            else:
                apart = np.maximum(ratio, 1 / ratio)
        _draw_distance(right, steps, np.where(np.isfinite(apart), apart, np.nan), word)
    for axis in axes[1]:
        axis.set_xlabel("update")
    for axis, place in zip(axes[0], ("outside lower left", "outside lower right"), strict=True):
        figure.legend(*axis.get_legend_handles_labels(), loc=place, fontsize=9, ncols=3)
    if path is not None:
        figure.savefig(os.fspath(path), dpi=120)
    return figure


def _checked_channels(channels: Any, count: int) -> list[int]:
    if channels is None:
        return sorted({round(i * (count - 1) / 5) for i in range(6)}) if count > 6 else list(range(count))
    expected = f"channel numbers, ints from 0 to {count - 1}"
    if isinstance(channels, str) or not hasattr(channels, "__iter__"):
        raise TypeError(f"channels is {kind(channels)}, expected {expected}, or None for a choice")
    chosen = [integer("channels", channel, 0, count - 1, expected) for channel in channels]
    if not chosen:
        raise ValueError(f"channels is empty, expected {expected}")
    return chosen


def _draw_channels(
    axis: Any, steps: Array, batch: Array, running: Array, chosen: list[int], word: str
) -> None:
    """Single channels: each batch as a faint dot, the running value as a line."""
    for i, channel in enumerate(chosen):
        axis.plot(steps, batch[:, i], ".", color=f"C{i % 10}", alpha=0.3, markersize=3)
        axis.plot(steps, running[:, i], "-", color=f"C{i % 10}", linewidth=1.5, label=f"channel {channel}")
    axis.set_title("each batch (dots) and running (lines)", fontsize=10)
    axis.set_ylabel(word)
    values = np.concatenate([batch[np.isfinite(batch)], running[np.isfinite(running)]])
    if word == "variance" and values.size and 0 < 50 * values.min() < values.max():
        axis.set_yscale("log")
    axis.grid(alpha=0.25)


def _draw_distance(axis: Any, steps: Array, apart: Array, word: str) -> None:
    """All channels: how far the running value is from the batch's, as quantiles over the channels."""
    axis.set_title(f"batch against running, {apart.shape[1]} channels", fontsize=10)
    axis.set_ylabel("distance in running std" if word == "mean" else "larger variance / smaller")
    axis.grid(alpha=0.25, which="both")
    there = ~np.isnan(apart).all(axis=1)  # a batch of NaN alone has no quantiles
    if there.any():
        low, middle, high = np.nanquantile(apart[there], (0.1, 0.5, 0.9), axis=1)
        axis.fill_between(steps[there], low, high, color="0.8", label="10 to 90 % of the channels")
        axis.plot(steps[there], middle, color="0.35", linewidth=1.2, label="median channel")
        axis.plot(steps[there], np.nanmax(apart[there], 1), color="C3", linewidth=0.8, label="worst channel")
        if word != "mean":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            if np.nanmax(apart[there]) < 10:  # most ticks are between powers of ten
                axis.yaxis.set_minor_formatter("{x:g}")
