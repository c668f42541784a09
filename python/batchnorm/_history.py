"""A layer's statistics over time, in bounded memory, and their picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _args

if TYPE_CHECKING:
    from ._layer_base import LayerBase

__all__ = ["History"]

Array = NDArray[Any]

_SERIES = ("batch_mean", "batch_var", "running_mean", "running_var")


class History:
    """Batch and running statistics at up to `limit` updates, evenly spread over all of them.

    When `limit` updates are held, every second one is dropped, and from then on only every second one taken,
    then every fourth, and so on. So memory stays bounded, at ``4 * 4 * limit * C`` bytes, and the whole of
    training stays in view.

    Attributes
    ----------
    limit : int
        How many updates are held at most.
    steps : ndarray of int64, shape (T,)
        The updates that are held, counted from 1.
    batch_mean, batch_var, running_mean, running_var : ndarray of float32, shape (T, C)
        Statistics of these batches, and the running ones after them. `batch_var` is the estimate that the
        running variance receives (see ``running_ddof``).
    """

    __slots__ = ("_rows", "_seen", "_steps", "_stride", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._rows: list[Array] = []  # each [4, C] float32
        self._steps: list[int] = []
        self._stride = 1
        self._seen = 0

    def add(self, layer: LayerBase, mean: Array, var: Array, count: float) -> None:
        """Note an update that has just happened: mean and population variance of `count` values."""
        self._seen += 1
        if self._seen % self._stride:
            return
        if len(self._rows) == self.limit:
            self._rows, self._steps = self._rows[1::2], self._steps[1::2]
            self._stride *= 2
            if self._seen % self._stride:
                return
        with np.errstate(all="ignore"):
            scale = count / (count - layer._running_ddof)
            row = np.stack([mean, np.maximum(var, 0) * scale, layer._running_mean, layer._running_var])
            self._rows.append(row.astype(np.float32))
        self._steps.append(layer._counters.num_updates)

    def forget_after(self, step: int) -> None:
        """Drop updates that have been taken back."""
        kept = sum(s <= step for s in self._steps)
        self._seen -= sum(s > step for s in self._steps) * self._stride
        self._rows, self._steps = self._rows[:kept], self._steps[:kept]

    def emptied(self) -> History:
        """A new one with the same limit."""
        return History(self.limit)

    @property
    def steps(self) -> NDArray[np.int64]:
        """The updates that are held."""
        return np.array(self._steps, np.int64)

    def _series(self, index: int) -> Array:
        if not self._rows:
            return np.zeros((0, 0), np.float32)
        return np.stack([row[index] for row in self._rows])

    @property
    def batch_mean(self) -> Array:
        """Means of the batches."""
        return self._series(0)

    @property
    def batch_var(self) -> Array:
        """Variances of the batches."""
        return self._series(1)

    @property
    def running_mean(self) -> Array:
        """Running means after the updates."""
        return self._series(2)

    @property
    def running_var(self) -> Array:
        """Running variances after the updates."""
        return self._series(3)

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        return f"History({len(self)} of {self._seen} updates, limit={self.limit})"


def checked_limit(value: object) -> int:
    """How many updates to keep: an int >= 2."""
    limit = _args.check_int(value, "history", "an int >= 2, the number of updates to keep, or None")
    if limit < 2:
        raise ValueError(f"history is {limit}, expected an int >= 2, the number of updates to keep, or None")
    return limit


# ---- the picture -------------------------------------------------------------------------------------------


def plot(
    layer: LayerBase, channels: Any, path: str | os.PathLike[str] | None, title: str | None
) -> Any:  # a matplotlib Figure
    """Draw the history; see BatchNorm.plot_statistics."""
    history = layer._history
    if history is None or not len(history):
        raise RuntimeError(
            "plot_statistics() has nothing to draw: build the layer with history=500, or call "
            "record_history(500), and train"
        )
    chosen = _checked_channels(channels, history.batch_mean.shape[1])
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_statistics() needs matplotlib: pip install matplotlib (bn.history has the numbers)",
            name=error.name,
        ) from error
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex="col", width_ratios=(3, 2))
    figure.suptitle(title or f"Batch and running statistics, {len(history)} of {history._seen} updates")
    for row, name in enumerate(("mean", "var")):
        batch, running = (getattr(history, f"{kind}_{name}") for kind in ("batch", "running"))
        _draw_channels(axes[row, 0], history.steps, batch[:, chosen], running[:, chosen], chosen, name)
        _draw_distance(axes[row, 1], history, layer._eps, name)
    figure.legend(*_legend(chosen), loc="outside lower left", fontsize=9, ncols=4)
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower right", fontsize=9, ncols=2)
    for axis in axes[1]:
        axis.set_xlabel("update")
    if path is not None:
        figure.savefig(os.fspath(path), dpi=120)
    return figure


def _checked_channels(channels: Any, count: int) -> list[int]:
    if channels is None:
        return sorted({round(i * (count - 1) / 5) for i in range(6)}) if count > 6 else list(range(count))
    expected = f"channel numbers, ints from 0 to {count - 1}"
    if isinstance(channels, str) or not hasattr(channels, "__iter__"):
        raise TypeError(f"channels is {_args._kind(channels)}, expected {expected}, or None for a choice")
    chosen = [_args.check_int(c, "channels", expected) for c in channels]
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"channels is {chosen}, expected {expected}")
    return chosen


def _draw_channels(
    axis: Any, steps: Array, batch: Array, running: Array, chosen: list[int], name: str
) -> None:
    """Single channels: each batch as a faint dot, the running value as a line."""
    for i, channel in enumerate(chosen):
        colour = f"C{i % 10}"
        axis.plot(steps, batch[:, i], ".", color=colour, alpha=0.3, markersize=3)
        axis.plot(steps, running[:, i], "-", color=colour, linewidth=1.5, label=str(channel))
    word = {"mean": "mean", "var": "variance"}[name]
    axis.set_title(f"{word} of {_listed(chosen)}", fontsize=10)
    axis.set_ylabel(word)
    values = np.concatenate([batch[np.isfinite(batch)], running[np.isfinite(running)]])
    if name == "var" and values.size and values.min() > 0 and values.max() > 50 * values.min():
        axis.set_yscale("log")
    axis.grid(alpha=0.25)


def _draw_distance(axis: Any, history: History, eps: float, name: str) -> None:
    """All channels: how far the running value is from the batch's, as quantiles over the channels."""
    with np.errstate(all="ignore"):
        if name == "mean":
            values = np.abs(history.batch_mean - history.running_mean) / np.sqrt(history.running_var + eps)
        else:
            ratio = (history.batch_var + eps) / (history.running_var + eps)
            values = np.maximum(ratio, 1 / ratio)
    values = np.where(np.isfinite(values), values, np.nan)
    if np.isnan(values).all():
        return
    low, middle, high = np.nanquantile(values, (0.1, 0.5, 0.9), axis=1)
    axis.fill_between(history.steps, low, high, color="0.8", label="10 to 90 % of the channels")
    axis.plot(history.steps, middle, color="0.35", linewidth=1.2, label="median channel")
    axis.plot(history.steps, np.nanmax(values, axis=1), color="C3", linewidth=0.8, label="worst channel")
    if name == "mean":
        axis.set_title(f"all {values.shape[1]} channels: batch against running mean", fontsize=10)
        axis.set_ylabel("distance in running std")
        axis.set_ylim(bottom=0)
    else:
        axis.set_title(f"all {values.shape[1]} channels: batch against running variance", fontsize=10)
        axis.set_ylabel("ratio, the larger to the smaller")
        axis.set_yscale("log")
    axis.grid(alpha=0.25, which="both")


def _legend(chosen: list[int]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=f"C{i % 10}") for i in range(len(chosen))]
    kinds = [
        Line2D([], [], color="0.3", marker=".", linestyle="", alpha=0.5),
        Line2D([], [], color="0.3", linewidth=1.5),
    ]
    return [*kinds, *handles], ["each batch", "running", *(f"channel {c}" for c in chosen)]


def _listed(chosen: list[int]) -> str:
    if len(chosen) == 1:
        return f"channel {chosen[0]}"
    return f"channels {', '.join(map(str, chosen))}" if len(chosen) <= 8 else f"{len(chosen)} channels"
