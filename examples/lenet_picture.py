"""The picture that lenet.py draws: learning curves, running statistics, feature maps around a batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from lenet import History, Images, Results, StatisticsLog

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


def draw(results: Results, images: Images, watched: tuple[str, str], path: str | Path) -> None:
    """Write the picture of `results` (the runs with batch norm first) to `path`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 13), dpi=110, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
        accuracies = ", ".join(f"{spread(runs)} {runs[0].title}" for runs in results)
        title = f"Test accuracy of LeNet on {images.data.name}:\n{accuracies}"
        figure.suptitle(title, fontsize=15, fontweight="bold")
        curves, statistics, maps = figure.subfigures(3, 1, height_ratios=(1.05, 1, 1.05))
        draw_learning_curves(curves, results, len(images.data.test_images))
        draw_statistics(statistics, results[0][0].statistics, watched[1])
        draw_feature_maps(maps, results[0][0], images)
        figure.savefig(path)


def spread(runs: Sequence[History]) -> str:
    """Mean and standard deviation of the test accuracy over the runs, after the last epoch."""
    last = [100 * run.test_accuracy[-1] for run in runs]
    return f"{np.mean(last):.1f}%" + (f" ± {np.std(last, ddof=1):.1f}" if len(last) > 1 else "")


# --- learning curves ----------------------------------------------------------------------------------------


def draw_learning_curves(figure: SubFigure, results: Results, tested: int) -> None:
    """Draw loss and test error of each run (thin) and their means (dots), on axes that hold every point."""
    loss, error = figure.subplots(1, 2)
    for runs, colour in zip(results, RUNS, strict=True):
        epochs = np.arange(1, len(runs[0].loss) + 1)
        losses = np.array([run.loss for run in runs])
        wrong = 1 - np.array([run.test_accuracy for run in runs])
        wrong = np.maximum(wrong, 0.5 / tested)  # a logarithmic axis has no 0
        for axes, values in ((loss, losses), (error, wrong)):
            axes.plot(epochs, values.T, color=colour, alpha=0.4, linewidth=1)
            style = {"color": colour, "marker": "o", "markersize": 4, "label": runs[0].title}
            axes.plot(epochs, values.mean(axis=0), **style)
    error.axhline(0.9, color=GREY, linestyle=":", label="guessing")
    loss.set(title="Training loss, mean over each epoch", ylabel="cross-entropy")
    error.set(title=f"Share of the {tested} test images named wrongly", ylabel="test error")
    for axes in (loss, error):
        axes.set(xlabel="epoch", yscale="log", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    loss.yaxis.set_major_formatter("{x:g}")
    error.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    figure.legend(
        handles=[line for line in error.lines if not line.get_label().startswith("_")],
        loc="outside upper center", ncols=3, fontsize=11,
        title=f"dots: mean of the runs ({len(results[0])}); thin: each run", title_fontsize=11,
    )  # fmt: skip


# --- running statistics -------------------------------------------------------------------------------------


def draw_statistics(figure: SubFigure, log: StatisticsLog, layer: str) -> None:
    """Draw batch statistics (dots) and running statistics (lines) of three channels over the first steps."""
    total = len(log.batch_mean)
    steps = np.arange(1, total + 1)[:STEPS_SHOWN]
    shown = f"the first {STEPS_SHOWN} of {total}" if total > STEPS_SHOWN else f"all {total}"
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
            label = f"channel {channel} of {layer}'s input"
            axes.plot(steps, line, style, color=colour, linewidth=2, label=label)
        axes.set(title=f"The running {name} follows the batches")
        axes.set(xlabel=f"training step ({shown})", ylabel=f"{name} of the channel", xlim=(0, None))
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
        f"bn1 brings the channels to similar scales (numbers: mean ± std over {len(x)} test images)",
        x=0.01, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    figure.supxlabel(
        "after: bn1 uses the running statistics and the learned gamma and beta, so not exactly 0 ± 1",
        fontsize=10,
    )
