"""Train LeNet with and without batch normalization, in NumPy with `batchnorm.BatchNorm`; draw what happened.

    python examples/lenet.py                      # the handwritten digits that ship inside scikit-learn
    python examples/lenet.py --data FOLDER        # MNIST, Fashion-MNIST or CIFAR-10 files in FOLDER
    python examples/lenet.py --optimizer sgd      # without batch norm, this hardly gets off the ground

Both networks start from the same weights and see the same batches, from several seeds; batch normalization
stands after every convolution and every dense layer but the last. With it an epoch takes longer. The test
accuracy is above 90 % after two epochs, without it after five, and ends higher. The learning rate is the
best one without batch norm: 0.005 ends lower, and with 0.02 most runs learn nothing.

Start reading at `build_lenet` and `Training`. The other layers are in numpy_layers.py; image_data.py reads
the files and lenet_picture.py draws.

Needs the extra `demo` of batchnorm: scikit-learn (digits), rich (progress bars), matplotlib (the picture).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from image_data import CLASSES, ImageData, Labels, load_digits, load_folder
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from numpy_layers import (
    SGD,
    Adam,
    Array,
    AvgPool,
    Conv2D,
    Dense,
    Flatten,
    Layer,
    Sequential,
    Sigmoid,
    cross_entropy,
)

try:
    from batchnorm import BatchNorm, moments
    from lenet_picture import draw, spread
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install '.[demo]'") from error

OPTIMIZERS = {"adam": Adam, "sgd": SGD}
LEARNING_RATES = {"adam": 0.01, "sgd": 0.1}
RATE_DECAY = 0.85  # the learning rate shrinks by this factor per epoch, a little at every step
MAX_SHIFT = 1  # training images are moved by up to this many pixels
WATCHED = ("conv2", "bn2")  # the layer whose statistics are drawn, after the one that feeds it


# --- network ------------------------------------------------------------------------------------------------


def build_lenet(image_shape: tuple[int, ...], seed: int, *, batch_norm: bool) -> Sequential:
    """Return LeNet for images [C, S, S]; its start weights depend on `seed` only, not on batch norm."""
    channels, height, width = image_shape
    if height != width or height < 16 or height % 4:
        raise ValueError(f"images are {height} x {width}, expected squares of side 16, 20, 24, 28, 32, ...")
    rng = np.random.default_rng(seed)
    side = ((height - 4) // 2 - 4) // 2  # after two convolutions of 5 x 5 and two poolings
    bias = not batch_norm  # the beta of a BatchNorm does the work of the bias before it

    def norm(features: int, name: str) -> BatchNorm | None:
        # zero_debias: the running statistics are right from the first batch on.
        return BatchNorm(features, name=name, zero_debias=True) if batch_norm else None

    layers: dict[str, Layer | None] = {
        "conv1": Conv2D(channels, 6, rng, size=5, bias=bias),
        "bn1": norm(6, "bn1"),
        "sigmoid1": Sigmoid(),
        "pool1": AvgPool(),
        "conv2": Conv2D(6, 16, rng, size=5, bias=bias),
        "bn2": norm(16, "bn2"),
        "sigmoid2": Sigmoid(),
        "pool2": AvgPool(),
        "flatten": Flatten(),
        "dense3": Dense(16 * side * side, 120, rng, bias=bias),
        "bn3": norm(120, "bn3"),
        "sigmoid3": Sigmoid(),
        "dense4": Dense(120, 84, rng, bias=bias),
        "bn4": norm(84, "bn4"),
        "sigmoid4": Sigmoid(),
        "dense5": Dense(84, CLASSES, rng),
    }
    return Sequential({name: layer for name, layer in layers.items() if layer is not None})


# --- data ---------------------------------------------------------------------------------------------------


class Images:
    """The images of a data set as the network wants them: float32, standardised, in batches."""

    def __init__(self, data: ImageData) -> None:
        self.data = data
        sample = data.train_images[:5000]
        self.mean = sample.mean(axis=(0, 2, 3), dtype=np.float32)[:, None, None]
        self.std = np.maximum(sample.std(axis=(0, 2, 3), dtype=np.float32), 1)[:, None, None]

    def standardised(self, images: NDArray[np.uint8]) -> Array:
        return (images - self.mean) / self.std

    def training_batches(self, batch: int, rng: np.random.Generator) -> Iterator[tuple[Array, Labels]]:
        """Yield the training images in random order, a little shifted; a last, smaller batch is left out."""
        order = rng.permutation(len(self.data.train_images))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            images = shifted(self.data.train_images[chosen], MAX_SHIFT, rng)
            yield self.standardised(images), self.data.train_labels[chosen]

    def test_batches(self, batch: int = 256) -> Iterator[tuple[Array, Labels]]:
        for start in range(0, len(self.data.test_images), batch):
            part = slice(start, start + batch)
            yield self.standardised(self.data.test_images[part]), self.data.test_labels[part]


def shifted(images: NDArray[np.uint8], limit: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Move each image by up to `limit` pixels up or down and left or right; the edge pixels fill the gap."""
    n, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (limit, limit), (limit, limit)), mode="edge")
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    rows, columns = rng.integers(0, 2 * limit + 1, (2, n))
    return windows[np.arange(n), :, rows, columns]


# --- training -----------------------------------------------------------------------------------------------


@dataclass
class StatisticsLog:
    """Statistics [steps][channels] at one BatchNorm layer: of each batch, and the running ones after it."""

    batch_mean: list[Array] = field(default_factory=list)
    batch_var: list[Array] = field(default_factory=list)
    running_mean: list[Array] = field(default_factory=list)
    running_var: list[Array] = field(default_factory=list)

    def record(self, x: Array, layer: BatchNorm) -> None:
        batch = moments(x, ddof=1)  # ddof=1 as in the running variance
        self.batch_mean.append(batch.mean)
        self.batch_var.append(batch.var)
        self.running_mean.append(layer.running_mean.copy())
        self.running_var.append(layer.running_var.copy())


@dataclass
class History:
    """What a training run leaves behind: the network, and numbers per epoch (losses also per step)."""

    title: str
    network: Sequential
    step_loss: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    statistics: StatisticsLog = field(default_factory=StatisticsLog)
    seconds: float = 0.0

    def epochs_to(self, accuracy: float) -> int | None:
        """Return the first epoch, counted from 1, that reached this test accuracy."""
        return next((i for i, value in enumerate(self.test_accuracy, 1) if value >= accuracy), None)


class Training:
    """One training run of LeNet: `run()` trains it, reports every epoch and returns the history."""

    def __init__(
        self, images: Images, options: argparse.Namespace, console: Console, seed: int, *, batch_norm: bool
    ) -> None:
        self.images, self.options, self.console, self.seed = images, options, console, seed
        self.network = build_lenet(images.data.train_images.shape[1:], seed, batch_norm=batch_norm)
        self.history = History("with batch norm" if batch_norm else "without batch norm", self.network)
        self.optimizer = OPTIMIZERS[options.optimizer]()
        self.rng = np.random.default_rng(seed + 1)

    def run(self) -> History:
        start, epochs = time.perf_counter(), self.options.epochs
        total = epochs * (len(self.images.data.train_images) // self.options.batch)
        # errstate: a FloatingPointError when training diverges
        with np.errstate(over="raise", invalid="raise"), progress_bar(self.console) as bar:
            task = bar.add_task(f"seed {self.seed}, {self.history.title:18}", total=total, report="")
            for epoch in range(epochs):
                self.train_epoch(epoch, lambda: bar.advance(task))
                report = f"loss {self.history.loss[-1]:.4f}  test {self.history.test_accuracy[-1]:6.1%}"
                bar.update(task, report=report)
        self.history.seconds = time.perf_counter() - start
        return self.history

    def train_epoch(self, epoch: int, advance: Callable[[], None]) -> None:
        """Show the network every training image once, then evaluate it on the test images."""
        batch, history = self.options.batch, self.history
        steps = len(self.images.data.train_images) // batch
        self.network.train()
        for step, (x, labels) in enumerate(self.images.training_batches(batch, self.rng)):
            rate = self.options.lr * RATE_DECAY ** (epoch + step / steps)
            history.step_loss.append(self.train_step(x, labels, rate))
            advance()
        history.loss.append(float(np.mean(history.step_loss[-steps:])))
        history.test_accuracy.append(self.evaluate())

    def train_step(self, x: Array, labels: Labels, rate: float) -> float:
        """Take one step of the optimiser; return the loss."""
        scores = self.network(x)
        loss, gradient = cross_entropy(scores, labels)
        self.network.backward(gradient)
        self.optimizer.step(self.network.parameters(), rate)
        before, watched = WATCHED
        if watched in self.network.layers:
            self.history.statistics.record(self.network.outputs[before], self.network.layers[watched])
        return loss

    def evaluate(self) -> float:
        """Return the share of test images that the network gets right in evaluation mode."""
        if not all(np.isfinite(value).all() for value in self.network.buffers()):
            raise FloatingPointError("overflow encountered in running statistics")
        self.network.eval()
        hits = sum(int((self.network(x).argmax(axis=1) == y).sum()) for x, y in self.images.test_batches())
        return hits / len(self.images.data.test_images)


Results = list[list[History]]  # the runs with batch norm and those without, a run for each seed


# --- reports ------------------------------------------------------------------------------------------------


def progress_bar(console: Console) -> Progress:
    text, report = TextColumn("{task.description}"), TextColumn("{task.fields[report]}")
    return Progress(text, BarColumn(bar_width=20), MofNCompleteColumn(), report, console=console)


def print_setting(images: Images, options: argparse.Namespace, console: Console) -> None:
    train, test = images.data.train_images, images.data.test_images
    shape = " x ".join(map(str, train.shape[1:]))
    console.print(f"[bold]{images.data.name}[/bold]: {len(train)} training, {len(test)} test images, {shape}")
    rate = f"{options.lr:g} x {RATE_DECAY}^epoch"
    console.print(f"{options.optimizer}, batches of {options.batch}, learning rate {rate}")


def print_summary(results: Results, images: Images, console: Console) -> None:
    table = Table(title=f"Test accuracy on {images.data.name} after epoch {len(results[0][0].loss)}")
    for heading in ("", "mean ± std", "90% in epoch", "time per epoch"):
        table.add_column(heading, justify="right" if heading else "left")
    for runs in results:
        epochs = (run.epochs_to(0.9) for run in runs)
        table.add_row(
            runs[0].title,
            f"[bold]{spread(runs)}[/bold]",
            " ".join("-" if epoch is None else str(epoch) for epoch in epochs),
            f"{np.mean([run.seconds / len(run.loss) for run in runs]):.2f} s",
        )
    console.print(table)


# --- command line -------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    parser = argparse.ArgumentParser(description="Train LeNet with and without batch normalization.")
    add = parser.add_argument
    add("--data", metavar="FOLDER", type=Path, help="where MNIST, Fashion-MNIST or CIFAR-10 files are")
    add("--dataset", choices=("digits", "mnist", "cifar10"), help="default: what FOLDER holds, or digits")
    add("--epochs", metavar="N", type=whole_number(1), help="default: 20 for digits, else 3")
    add("--batch", metavar="N", type=whole_number(2), default=32, help="images per step (default: 32)")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adam", help="default: %(default)s")
    add("--lr", metavar="RATE", type=positive_number, help=f"first learning rate (default: {rates})")
    add(
        "--seed",
        metavar="N",
        type=whole_number(0),
        default=0,
        help="the first seed, also of the test set (default: 0)",
    )
    add("--seeds", metavar="N", type=whole_number(1), help="how many seeds (default: 3 for digits, else 1)")
    add("--limit", metavar="N", type=whole_number(20), help="take at most N training and N test images")
    add("--out", metavar="PATH", type=Path, default=Path("lenet.png"), help="default: %(default)s")
    return parser


def whole_number(minimum: int) -> Callable[[str], int]:
    """Return a converter for argparse: a whole number that is not below `minimum`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return convert


def positive_number(text: str) -> float:
    """Convert for argparse: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def complete(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other options; raise ValueError for what does not go together."""
    if options.data is None and options.dataset in ("mnist", "cifar10"):
        raise ValueError(f"--dataset {options.dataset} needs --data FOLDER, the folder with its files")
    if options.data is not None and options.dataset == "digits":
        raise ValueError("the digits ship inside scikit-learn: --dataset digits goes without --data")
    if not os.access(options.out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out: the folder {options.out.parent} does not exist or cannot be written to")
    if options.out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out is {options.out}, expected a name that ends in .png, .pdf or .svg")
    options.epochs = options.epochs or (20 if options.data is None else 3)
    options.seeds = options.seeds or (3 if options.data is None else 1)
    options.lr = options.lr or LEARNING_RATES[options.optimizer]


def load_images(options: argparse.Namespace) -> Images:
    data = load_digits(options.seed) if options.data is None else load_folder(options.data, options.dataset)
    if len(data.train_labels) < 2:
        raise ValueError("one training image, expected at least 2: batch norm needs a batch")
    build_lenet(data.train_images.shape[1:], options.seed, batch_norm=False)  # or a ValueError on their shape
    return Images(ImageData(data.name, *(array[: options.limit] for array in data[1:])))


def main(arguments: Sequence[str] | None = None) -> Results:
    """Train both networks from each seed, print a table, write the picture; return the histories."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        complete(options)
        images = load_images(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.batch = min(options.batch, len(images.data.train_images))
    console = Console(highlight=False)
    print_setting(images, options, console)
    try:
        # Matrix products this small gain nothing from more threads, which on a busy machine mostly wait.
        with threadpool_limits(1, user_api="blas"):
            results: Results = [[], []]
            for seed in range(options.seed, options.seed + options.seeds):
                for on, runs in zip((True, False), results, strict=True):
                    runs.append(Training(images, options, console, seed, batch_norm=on).run())
    except FloatingPointError as error:
        raise SystemExit(f"training diverged ({error}): try a --lr below {options.lr:g}") from error
    print_summary(results, images, console)
    draw(results, images, WATCHED, options.out)
    console.print(f"picture: [bold]{options.out}[/bold]")
    return results


if __name__ == "__main__":
    main()
