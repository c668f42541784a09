"""Padded sequences: a small network over handwritten lines of different lengths, with and without `lengths`.

    python examples/padded_sequences.py

A line is one to 24 handwritten digits of one class side by side (scikit-learn's images, paper 1 and ink 0): a
sequence of 8 to 192 columns of 8 pixels. Most lines are short, a few are long, and a batch is padded with
zeros to its longest one. The task is to name the digit.

The same network is trained twice from the same weights on the same batches, from several seeds. One gives
the batch-norm layers the lengths: padding is not read into the statistics, gets no gradient and stays 0. The
other treats padding as data, as a layer that knows of no lengths must. Where one long line pads a whole
batch, most of what that batch is normalised by is padding; the next batch has hardly any. So training without
lengths sees other statistics in every batch, and is several points behind after each of these epochs; more of
them bring it closer. Then both see the test lines alone, without any padding, and padded to 384 columns: with
lengths a line's scores are its own, without they depend on the lines that share its batch.

Needs the extra `demo` of batchnorm: scikit-learn (digits), rich (the table), matplotlib (the picture).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from image_data import CLASSES, load_digits
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from numpy_layers import Adam, Array, Dense, Parameters, Weighted, cross_entropy

try:
    from batchnorm import BatchNorm
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install '.[demo]'") from error

SIDE = 8  # of one digit's image, and so the channels of a line and the columns per digit
LONGEST = 24  # digits of a line
LONG = 0.06  # share of lines that are so long
PADDED_TO = 2 * SIDE * LONGEST
BATCH = 16
TEST_LINES = 600


# --- data ---------------------------------------------------------------------------------------------------


@dataclass
class Lines:
    """Lines of one split: `columns[i]` is float32 [8, L_i], `labels[i]` the digit."""

    columns: list[Array]
    labels: NDArray[np.int64]

    def padded(self, chosen: Sequence[int] | NDArray[np.int64], length: int = 0) -> tuple[Array, Array]:
        """The chosen lines as x [N, 8, L], zeros behind each, and their lengths [N]."""
        lengths = np.array([self.columns[i].shape[1] for i in chosen])
        x = np.zeros((len(lengths), SIDE, max(length, int(lengths.max()))), np.float32)
        for row, i in zip(x, chosen, strict=True):
            row[:, : self.columns[i].shape[1]] = self.columns[i]
        return x, lengths

    def batches(self, rng: np.random.Generator) -> Iterator[tuple[Array, Array, NDArray[np.int64]]]:
        order = rng.permutation(len(self.labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield *self.padded(chosen), self.labels[chosen]


def make_lines(images: NDArray[np.uint8], labels: NDArray[np.int64], count: int, seed: int) -> Lines:
    """`count` lines of 1 to 24 images of one class; most are short, so that most of a batch is padding."""
    rng = np.random.default_rng(seed)
    columns, digits = [], rng.integers(0, CLASSES, count)
    by_class = [1 - images[labels == digit, 0].astype(np.float32) / 255 for digit in range(CLASSES)]
    for digit in digits:
        n = LONGEST if rng.random() < LONG else min(int(rng.geometric(0.8)), LONGEST)
        columns.append(np.concatenate(list(rng.choice(by_class[digit], n)), axis=1))
    return Lines(columns, digits)


# --- network ------------------------------------------------------------------------------------------------


class Conv1D(Weighted):
    """Convolution over columns, zeros beyond both ends: x [N, inputs, L] -> y [N, outputs, L]."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, *, size: int) -> None:
        self.weight = self.draw((outputs, inputs * size), (inputs + outputs) * size, rng)
        self.bias, self.size = None, size

    def __call__(self, x: Array) -> Array:
        half = self.size // 2
        windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (half, half))), self.size, axis=2)
        self.columns = windows.transpose(0, 1, 3, 2).reshape(len(x), -1, x.shape[2])
        return self.weight @ self.columns

    def backward(self, dy: Array) -> Array:
        n, _, length = dy.shape
        half = self.size // 2
        self.dweight = (dy @ self.columns.swapaxes(1, 2)).sum(axis=0)
        dwindows = (self.weight.T @ dy).reshape(n, -1, self.size, length)
        dx = np.zeros((n, dwindows.shape[1], length + 2 * half), dy.dtype)
        for i in range(self.size):
            dx[:, :, i : i + length] += dwindows[:, :, i]
        return dx[:, :, half : half + length]


class LineNetwork:
    """Two convolutions, each with batch norm and ReLU; the mean over a line's own columns; a dense layer."""

    def __init__(self, seed: int, *, use_lengths: bool) -> None:
        rng = np.random.default_rng(seed)
        self.use_lengths = use_lengths
        self.conv = [Conv1D(SIDE, 24, rng, size=5), Conv1D(24, 32, rng, size=5)]
        self.norm = [BatchNorm(channels, activation="relu", zero_debias=True) for channels in (24, 32)]
        self.dense = Dense(32, CLASSES, rng)

    def __call__(self, x: Array, lengths: Array) -> Array:
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = conv(x)
            x = norm(x, lengths=lengths) if self.use_lengths else norm(x)
        # Both networks leave padding out of the mean: that much is usually thought of.
        self.inside = (np.arange(x.shape[2]) < lengths[:, None])[:, None, :]
        self.lengths = lengths[:, None].astype(np.float32)
        return self.dense((x * self.inside).sum(axis=2) / self.lengths)

    def backward(self, dscores: Array) -> None:
        dx: Any = (self.dense.backward(dscores) / self.lengths)[:, :, None] * self.inside
        for conv, norm in zip(reversed(self.conv), reversed(self.norm), strict=True):
            dx = conv.backward(norm.backward(dx.astype(np.float32)))

    def parameters(self) -> Parameters:
        layers = (*self.conv, *self.norm, self.dense)
        return [parameter for layer in layers for parameter in layer.parameters()]

    def train(self, mode: bool) -> None:
        for norm in self.norm:
            norm.train(mode)


# --- training and evaluation --------------------------------------------------------------------------------


@dataclass
class Run:
    """One network: the test accuracy after each epoch, and its last scores of the test lines, two ways."""

    network: LineNetwork
    accuracy: list[float] = field(default_factory=list)
    alone: Array = field(default_factory=lambda: np.empty(0))
    padded: Array = field(default_factory=lambda: np.empty(0))


Results = dict[str, list[Run]]  # with lengths and without, a run for each seed


def train(lines: Lines, test: Lines, epochs: int, seed: int, *, use_lengths: bool) -> Run:
    run = Run(LineNetwork(seed, use_lengths=use_lengths))
    optimizer, rng = Adam(), np.random.default_rng(seed)
    for epoch in range(epochs):
        run.network.train(True)
        for x, lengths, labels in lines.batches(rng):
            _, gradient = cross_entropy(run.network(x, lengths), labels)
            run.network.backward(gradient)
            optimizer.step(run.network.parameters(), 0.004 * 0.8**epoch)
        run.alone = scores(run.network, test, padded_to=0)
        run.accuracy.append(float((run.alone.argmax(axis=1) == test.labels).mean()))
    run.padded = scores(run.network, test, padded_to=PADDED_TO)
    return run


def scores(network: LineNetwork, lines: Lines, padded_to: int) -> Array:
    """Scores [lines, 10] in evaluation mode, every line by itself: as long as it is, or padded."""
    network.train(False)
    return np.concatenate([network(*lines.padded([i], padded_to)) for i in range(len(lines.labels))])


# --- reports ------------------------------------------------------------------------------------------------


def report(results: Results, tested: int, console: Console) -> None:
    table = Table(title=f"{tested} test lines, each by itself")
    for heading in ("", "right, mean ± std", "each seed", "answers that padding changes"):
        table.add_column(heading, justify="right" if heading else "left")
    for title, runs in results.items():
        each = " ".join(f"{run.accuracy[-1]:.0%}" for run in runs)
        changed = sum(int((run.alone.argmax(axis=1) != run.padded.argmax(axis=1)).sum()) for run in runs)
        table.add_row(title, spread(runs), each, f"{changed} of {tested * len(runs)}")
    console.print(table)


def spread(runs: Sequence[Run]) -> str:
    """Mean and standard deviation of the test accuracy over the runs, after the last epoch."""
    last = [100 * run.accuracy[-1] for run in runs]
    return f"{np.mean(last):.1f}%" + (f" ± {np.std(last, ddof=1):.1f}" if len(last) > 1 else "")


def draw(results: Results, test: Lines, path: Path) -> None:
    """Draw the test accuracy of every run, and how far padding moves the scores of each test line."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    curves, moved = figure.subplots(2, 1)
    lengths = np.array([columns.shape[1] for columns in test.columns])
    for (title, runs), colour in zip(results.items(), ("#0072B2", "#D55E00"), strict=True):
        accuracy = np.array([run.accuracy for run in runs])
        epochs = np.arange(1, accuracy.shape[1] + 1)
        curves.plot(epochs, accuracy.T, color=colour, alpha=0.4, linewidth=1)
        curves.plot(epochs, accuracy.mean(axis=0), "o-", color=colour, linewidth=2.5, label=title)
        moves = np.abs(runs[0].alone - runs[0].padded).max(axis=1)
        moved.scatter(lengths + np.linspace(-2, 2, len(lengths)), moves, s=8, color=colour)
    last = ", ".join(f"{spread(runs)} {title}" for title, runs in results.items())
    curves.set(
        title=f"Test lines named correctly after the last epoch: {last}", xlabel="epoch", xticks=epochs
    )
    curves.set_ylabel("test accuracy (thin: each seed)")
    curves.yaxis.set_major_formatter("{x:.0%}")
    moved.set(
        title="Padding moves the scores of a line without lengths, and with them by rounding only",
        xlabel="columns of the test line; a dot is a line",
        ylabel="largest change of a score (log scale)",
    )
    moved.set_yscale("symlog", linthresh=1e-7)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> Results:
    """Train the networks, print the table, write the picture; return the runs of each kind, by seed."""
    parser = argparse.ArgumentParser(
        description="Batch norm over padded sequences, with and without lengths."
    )
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--lines", type=int, default=800, help="training lines (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("padded_sequences.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.seeds < 1 or options.lines < BATCH:
        parser.error(
            f"--epochs, --seeds and --lines are {options.epochs}, {options.seeds} and {options.lines}, "
            f"expected >= 1, >= 1 and >= {BATCH}"
        )
    data = load_digits(0, digit_size=SIDE, border=0)
    test = make_lines(data.test_images, data.test_labels, TEST_LINES, 1000)
    console = Console(highlight=False)
    results: Results = {"with lengths": [], "without": []}
    with threadpool_limits(1, user_api="blas"):  # matrix products this small gain nothing from more threads
        for seed in range(options.seeds):
            lines = make_lines(data.train_images, data.train_labels, options.lines, seed)
            if seed == 0:
                tell(lines, console)
            for runs, use in zip(results.values(), (True, False), strict=True):
                runs.append(train(lines, test, options.epochs, seed, use_lengths=use))
    report(results, len(test.labels), console)
    draw(results, test, options.out)
    console.print(f"picture: [bold]{options.out}[/bold]")
    return results


def tell(lines: Lines, console: Console) -> None:
    """Say how much of a batch is padding."""
    shares = [1 - n.mean() / x.shape[2] for x, n, _ in lines.batches(np.random.default_rng(0))]
    console.print(
        f"{len(lines.labels)} lines of 8 to 192 columns; of a training batch {min(shares):.0%} to "
        f"{max(shares):.0%} is padding, {np.mean(shares):.0%} in the mean"
    )


if __name__ == "__main__":
    main()
