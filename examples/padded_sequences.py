"""Padded sequences: a small network over handwritten lines of different lengths, with and without `lengths`.

    python examples/padded_sequences.py

A line is one to 24 handwritten digits of one class side by side (scikit-learn's images): a sequence of 8 to
192 columns of 8 pixels. Most lines are short, a few are long, and a batch is padded with zeros to its longest
one. The task is to name the digit.

The same network is trained twice from the same weights on the same batches. One gives the batch-norm layers
the lengths: padding is not read into the statistics, gets no gradient and stays 0. The other treats padding
as data, as a layer that knows of no lengths must. Then both see the test lines alone, without any padding,
and padded to 384 columns: with lengths a line's scores are its own, without they depend on the lines that
share its batch. (In the end both learn this easy task; the one with lengths gets there in fewer steps.)

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
    import matplotlib.pyplot as plt
    from batchnorm import BatchNorm
    from rich.console import Console
    from rich.table import Table
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
    by_class = [images[labels == digit, 0].astype(np.float32) / 255 for digit in range(CLASSES)]
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
    """One network, and what it got right of the test lines after each epoch: alone, and padded."""

    title: str
    network: LineNetwork
    loss: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    padded: list[float] = field(default_factory=list)


def train(run: Run, lines: Lines, test: Lines, epochs: int, seed: int) -> None:
    optimizer, rng = Adam(), np.random.default_rng(seed)
    for epoch in range(epochs):
        run.network.train(True)
        losses = []
        for x, lengths, labels in lines.batches(rng):
            loss, gradient = cross_entropy(run.network(x, lengths), labels)
            run.network.backward(gradient)
            optimizer.step(run.network.parameters(), 0.004 * 0.8**epoch)
            losses.append(loss)
        run.loss.append(float(np.mean(losses)))
        run.alone.append(accuracy(scores(run.network, test, padded_to=0), test))
        run.padded.append(accuracy(scores(run.network, test, padded_to=PADDED_TO), test))


def scores(network: LineNetwork, lines: Lines, padded_to: int) -> Array:
    """Scores [lines, 10] in evaluation mode, every line by itself: as long as it is, or padded."""
    network.train(False)
    return np.concatenate([network(*lines.padded([i], padded_to)) for i in range(len(lines.labels))])


def accuracy(values: Array, lines: Lines) -> float:
    return float((values.argmax(axis=1) == lines.labels).mean())


# --- reports ------------------------------------------------------------------------------------------------


def report(runs: Sequence[Run], test: Lines, console: Console) -> list[Array]:
    """Print the table; return how far each test line's scores move when it is padded, per run."""
    table = Table(title=f"{len(test.labels)} test lines, each by itself")
    for heading in ("", "loss", "alone", "padded", "padding moves the scores by"):
        table.add_column(heading, justify="right" if heading else "left")
    moves = []
    for run in runs:
        alone, padded = (scores(run.network, test, n) for n in (0, PADDED_TO))
        moves.append(np.abs(alone - padded).max(axis=1))
        moved = f"up to {moves[-1].max():.2g}"
        table.add_row(
            run.title, f"{run.loss[-1]:.4f}", f"{run.alone[-1]:.1%}", f"{run.padded[-1]:.1%}", moved
        )
    console.print(table)
    return moves


def draw(runs: Sequence[Run], moves: Sequence[Array], test: Lines, path: Path) -> None:
    colors = ("#0072B2", "#D55E00")
    figure, (curves, moved, maps) = plt.subplots(
        3, 1, figsize=(9, 10), layout="constrained", height_ratios=(1.2, 1, 1)
    )
    for run, color in zip(runs, colors, strict=True):
        epochs = np.arange(1, len(run.alone) + 1)
        curves.plot(epochs, run.alone, color=color, marker="o", label=f"{run.title}, lines alone")
        curves.plot(
            epochs, run.padded, color=color, ls="--", marker="s", mfc="none", label=f"{run.title}, padded"
        )
    curves.set(title="Test accuracy", xlabel="epoch", xticks=epochs)
    curves.yaxis.set_major_formatter("{x:.0%}")
    curves.legend(frameon=False)
    for run, values, color in zip(runs, moves, colors, strict=True):
        order = np.array([c.shape[1] for c in test.columns])
        moved.scatter(order + np.linspace(-2, 2, len(order)), values, s=8, color=color, label=run.title)
    moved.set(
        title="How far padding moves a line's scores", xlabel="columns of the line", ylabel="largest change"
    )
    moved.set_yscale("symlog", linthresh=1e-7)
    moved.legend(frameon=False)
    shown = next(i for i, columns in enumerate(test.columns) if columns.shape[1] >= 3 * SIDE)
    x, lengths = test.padded([shown], 12 * SIDE)
    rows = [x[0]]
    for run in runs:
        layer = run.network.norm[0]
        options: dict[str, Any] = {"lengths": lengths} if run.network.use_lengths else {}
        rows.append(layer(run.network.conv[0](x), training=False, **options)[0, :8])
    gap = np.full((1, x.shape[2]), np.nan)
    stack = [part / np.nanmax(part) for part in rows]
    maps.imshow(np.concatenate([stack[0], gap, stack[1], gap, stack[2]]), aspect="auto", cmap="magma")
    maps.axvline(lengths[0] - 0.5, color="white", ls=":")
    labels = ("a padded line", *(f"{run.title}:\n8 channels" for run in runs))
    maps.set_yticks([3.5, 12.5, 21.5], labels)
    maps.set(title="After the first batch norm and ReLU; behind the dots is padding", xlabel="column")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Train both networks, print the table, write the picture; return the runs, with lengths first."""
    parser = argparse.ArgumentParser(
        description="Batch norm over padded sequences, with and without lengths."
    )
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--lines", type=int, default=800, help="training lines (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for all that is random (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("padded_sequences.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.lines < BATCH:
        parser.error(
            f"--epochs and --lines are {options.epochs} and {options.lines}, expected >= 1 and >= {BATCH}"
        )
    data = load_digits(options.seed, digit_size=SIDE, border=0)
    lines = make_lines(data.train_images, data.train_labels, options.lines, options.seed)
    test = make_lines(data.test_images, data.test_labels, TEST_LINES, options.seed + 1)
    runs = [
        Run(title, LineNetwork(options.seed, use_lengths=use))
        for title, use in (("with lengths", True), ("without", False))
    ]
    console = Console(highlight=False)
    padding = np.mean([1 - n.mean() / x.shape[2] for x, n, _ in lines.batches(np.random.default_rng(0))])
    console.print(
        f"{len(lines.labels)} lines of 8 to 192 columns; {padding:.0%} of a training batch is padding"
    )
    for run in runs:
        train(run, lines, test, options.epochs, options.seed)
    draw(runs, report(runs, test, console), test, options.out)
    console.print(f"picture: [bold]{options.out}[/bold]")
    return runs


if __name__ == "__main__":
    main()
