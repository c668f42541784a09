"""The picture that lenet.py draws: learning curves, running statistics, feature maps around a batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from lenet import History, Images, StatisticsLog

# Okabe and Ito's palette: tells apart for all kinds of colour vision.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
DARK, GREY = "#262626", "#6B6B6B"
RUNS = (BLUE, ORANGE)  # with and without batch norm
CHANNELS = ((DARK, "-"), (GREEN, "--"), (PURPLE, "-."))  # of one layer: other colours than the runs
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
CHANNELS_SHOWN = 6
STEPS_SHOWN = 120
DIP = 0.02  # a fall of the test accuracy that calls for a note


def draw(histories: Sequence[History], images: Images, watched: tuple[str, str], path: str | Path) -> None:
    """Write the picture of the runs `histories` (the first one with batch norm) to `path`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 13), dpi=110, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
        results = ", ".join(f"{history.test_accuracy[-1]:.1%} {history.title}" for history in histories)
        figure.suptitle(f"LeNet on {images.data.name}: {results}", fontsize=15, fontweight="bold")
        curves, statistics, maps = figure.subfigures(3, 1, height_ratios=(1.05, 1, 1.05))
        draw_learning_curves(curves, histories)
        draw_statistics(statistics, histories[0].statistics, watched[1])
        draw_feature_maps(maps, histories[0], images)
        figure.savefig(path)


# --- learning curves ----------------------------------------------------------------------------------------


def draw_learning_curves(figure: SubFigure, histories: Sequence[History]) -> None:
    loss, accuracy, upper_end = figure.subplots(1, 3)
    draw_loss(loss, histories)
    draw_accuracy(accuracy, histories)
    draw_accuracy(upper_end, histories)
    best = max(max(history.test_accuracy) for history in histories)
    upper_end.set(title="Its upper end, enlarged", ylim=(best - 0.1, best + 0.005))
    mark_dip(upper_end, histories[0])
    accuracy.axhline(0.1, color=GREY, linestyle=":", label="guessing")
    figure.legend(handles=accuracy.lines, loc="outside upper center", ncols=3, fontsize=11)


def draw_loss(axes: Axes, histories: Sequence[History]) -> None:
    """Draw the loss of each step (thin) and the mean over each epoch, at the middle of the epoch."""
    for history, colour in zip(histories, RUNS, strict=False):
        epochs = np.arange(1, len(history.loss) + 1)
        steps = np.arange(1, len(history.step_loss) + 1) * (len(epochs) / len(history.step_loss))
        axes.plot(steps, history.step_loss, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(epochs - 0.5, history.loss, color=colour, marker="o", markersize=4)
    axes.set(title="Training loss (thin: each step)", yscale="log")
    axes.set(xlabel="epoch", ylabel="cross-entropy", xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_accuracy(axes: Axes, histories: Sequence[History]) -> None:
    for history, colour in zip(histories, RUNS, strict=False):
        epochs = np.arange(1, len(history.test_accuracy) + 1)
        axes.plot(epochs, history.test_accuracy, color=colour, marker="o", markersize=4, label=history.title)
    axes.set(title="Test accuracy", xlabel="epoch", ylabel="share of test images right")
    axes.set(xlim=(0, None), ylim=(0, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def mark_dip(axes: Axes, history: History) -> None:
    """Ring the deepest fall of the accuracy with batch norm if the panel shows it, and say a possible cause.

    In the default run the note is true: 92% at epoch 10 become 97% when the same weights are evaluated with
    the statistics of each test batch, or with running statistics taken anew while the weights stand still.
    """
    accuracy = np.array(history.test_accuracy)
    falls = np.maximum.accumulate(accuracy) - accuracy
    falls[accuracy < axes.get_ylim()[0]] = 0
    epoch = int(falls.argmax())
    if falls[epoch] < DIP:
        return
    axes.plot(epoch + 1, accuracy[epoch], "o", markersize=13, markerfacecolor="none", markeredgecolor=GREY)
    axes.set_xlabel("epoch\nring: a dip; running statistics can lag\nbehind quickly moving weights")


# --- running statistics -------------------------------------------------------------------------------------


def draw_statistics(figure: SubFigure, log: StatisticsLog, layer: str) -> None:
    """Draw batch statistics (dots) and running statistics (lines) of three channels over the first steps."""
    total = len(log.batch_mean)
    steps = np.arange(1, total + 1)[:STEPS_SHOWN]
    shown = f"first {STEPS_SHOWN} of {total} steps" if total > STEPS_SHOWN else f"all {total} steps"
    order = np.argsort(np.mean(log.batch_mean[:STEPS_SHOWN], axis=0))
    channels = order[[-1, len(order) // 2, 0]]
    mean, variance = figure.subplots(1, 2)
    for axes, name, batch, running in (
        (mean, "mean", log.batch_mean, log.running_mean),
        (variance, "variance", log.batch_var, log.running_var),
    ):
        for channel, (colour, style) in zip(channels, CHANNELS, strict=True):
            dots, line = np.stack([batch[:STEPS_SHOWN], running[:STEPS_SHOWN]])[:, :, channel]
            axes.plot(steps, dots, ".", color=colour, alpha=0.5, markersize=5)
            label = f"channel {channel} of {layer}"
            axes.plot(steps, line, style, color=colour, linewidth=2, label=label)
        axes.set(title=f"{name.capitalize()} at {layer}, {shown}")
        axes.set(xlabel="training step", ylabel=name, xlim=(0, None))
    figure.legend(
        handles=mean.lines[1::2], loc="outside upper center", ncols=3, fontsize=11, handlelength=3,
        title="dots: statistics of each batch; lines: running statistics", title_fontsize=11,
    )  # fmt: skip


# --- feature maps -------------------------------------------------------------------------------------------


def draw_feature_maps(figure: SubFigure, history: History, images: Images) -> None:
    """Draw the first test image, and six channels of it before and after bn1, all in one colour scale."""
    x, _ = next(images.test_batches())
    history.network.eval()(x)
    before, after = history.network.outputs["conv1"], history.network.outputs["bn1"]
    limit = float(np.quantile(np.abs(np.stack([before[0], after[0]])), 0.99))
    grid = figure.add_gridspec(2, CHANNELS_SHOWN + 1, width_ratios=(1.5, *[1] * CHANNELS_SHOWN))
    picture = figure.add_subplot(grid[:, 0])
    picture.imshow(np.moveaxis(images.data.test_images[0], 0, -1), cmap="gray_r", vmin=0, vmax=255)
    picture.set_title("input", loc="center")
    axes = [picture]
    for row, (name, maps) in enumerate((("conv1", before), ("bn1", after))):
        for channel in range(CHANNELS_SHOWN):
            cell = figure.add_subplot(grid[row, channel + 1])
            shown = cell.imshow(maps[0, channel], cmap="PuOr_r", vmin=-limit, vmax=limit)
            values = maps[:, channel]
            label = f"{values.mean():+.2f} ± {values.std():.2f}".replace("-", "\N{MINUS SIGN}")
            heading = label if row else f"channel {channel}\n{label}"
            cell.set_title(heading, loc="center", fontweight="normal", fontsize=10)
            if channel == 0:
                cell.set_ylabel(f"{'after' if row else 'before'}: {name}")
            axes.append(cell)
    for cell in axes:
        cell.set(xticks=[], yticks=[])
        cell.grid(False)
        cell.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, shrink=0.8, label="value", extend="both")
    figure.suptitle(
        f"Feature maps of a test image around bn1 (numbers: mean ± std over {len(x)} test images)",
        x=0.01, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    figure.supxlabel(
        "after: bn1 uses the running statistics and the learned gamma and beta, so not exactly 0 ± 1",
        fontsize=10,
    )
