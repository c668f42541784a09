"""Training goes well, testing terribly: reproduce the complaint, diagnose it, repair it.

    python examples/good_train_bad_test.py                # a few seconds; draws good_train_bad_test.png

A network with batch normalization learns handwritten digits. In training mode it is right nearly always; in
evaluation mode it is mostly wrong, for either of two reasons that look the same from outside:

1. Cold statistics. After three epochs with decay 0.999 most of the running statistics still is the
   values they began with. The little that was added comes from weights that have changed since, so
   `diagnose` reports bn1 as mismatched, too.
2. Mismatched statistics. The test images come from another scanner: darker, and with less contrast.

`diagnose` tells the two apart: only the first is "cold". `recalibrate` mends both, without training and
without labels. `zero_debias=True` in training prevents the first. It ends a little below `recalibrate`,
because decay 0.999 averages over the batches of all weights so far. Table and picture show several seeds.

Needs the extra `demo` of batchnorm: scikit-learn (the digits) and matplotlib (the picture).
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from image_data import CLASSES, Labels, load_digits
from numpy_layers import Adam, Array, Dense, Flatten, Sequential, Sigmoid, cross_entropy

try:
    from batchnorm import BatchNorm, ColdStatisticsWarning, diagnose, recalibrate
    from matplotlib.figure import Figure
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install '.[demo]'") from error

UNITS = (96, 64, 48)
DECAY = 0.999
BATCH = 32
RATE = 0.002
FAILS, REPAIRED = "#D55E00", "#0072B2"
# What is measured, its words and its colour.
CASES = {
    "training mode": ("training mode", "0.6"),
    "cold": ("1. cold statistics", FAILS),
    "recalibrated": ("1. after recalibrate()", REPAIRED),
    "zero_debias": ("1. with zero_debias=True", REPAIRED),
    "other scanner": ("2. other scanner", FAILS),
    "adapted": ("2. after recalibrate()", REPAIRED),
}
Results = dict[str, list[float]]  # accuracies by case, one for each seed


@dataclass
class Digits:
    """Images [N, 1, H, W], pixels from 0 to 1, and labels [N]."""

    train: Array
    train_labels: Labels
    test: Array
    test_labels: Labels

    @classmethod
    def load(cls) -> Digits:
        data = load_digits(0)
        train, test = (images.astype(np.float32) / 255 for images in (data.train_images, data.test_images))
        return cls(train, data.train_labels, test, data.test_labels)

    def batches(self, rng: np.random.Generator, size: int) -> list[Array]:
        """The numbers of the training images, in random order, in batches."""
        order = rng.permutation(len(self.train))
        return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def build(pixels: int, seed: int, **options: object) -> Sequential:
    """Three hidden layers, each with batch normalization; `options` are those of BatchNorm."""
    rng = np.random.default_rng(seed)
    sizes = (pixels, *UNITS)
    layers: dict[str, object] = {"flatten": Flatten()}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes), 1):
        layers[f"dense{i}"] = Dense(inputs, outputs, rng, bias=False)
        layers[f"bn{i}"] = BatchNorm(outputs, name=f"bn{i}", history=200, **options)  # type: ignore[arg-type]
        layers[f"sigmoid{i}"] = Sigmoid()
    layers["scores"] = Dense(UNITS[-1], CLASSES, rng)
    return Sequential(layers)  # type: ignore[arg-type]


def norms(network: Sequential) -> dict[str, BatchNorm]:
    """The BatchNorm layers of a network, by name, in order."""
    return {name: layer for name, layer in network.layers.items() if isinstance(layer, BatchNorm)}


def train(
    network: Sequential, digits: Digits, epochs: int, seed: int, *, batch: int = BATCH, rate: float = RATE
) -> float:
    """Train; return the share of images that the network got right in its last epoch, in training mode."""
    rng, optimizer = np.random.default_rng(seed), Adam()
    network.train()
    for _ in range(epochs):
        hits = seen = 0
        for chosen in digits.batches(rng, batch):
            scores = network(digits.train[chosen])
            _, gradient = cross_entropy(scores, digits.train_labels[chosen])
            network.backward(gradient)
            optimizer.step(network.parameters(), rate)
            hits += int((scores.argmax(axis=1) == digits.train_labels[chosen]).sum())
            seen += len(chosen)
    return hits / seen


def accuracy(network: Sequential, images: Array, labels: Labels) -> float:
    """The share of images that the network gets right in evaluation mode."""
    network.eval()
    return float((network(images).argmax(axis=1) == labels).mean())


def other_scanner(images: Array) -> Array:
    """The same digits, darker and with less contrast."""
    return 0.3 * images + 0.1


def show_diagnosis(network: Sequential, images: Array) -> None:
    """Print the first finding of `diagnose` in full, and of the others code and layer."""
    findings = list(diagnose(norms(network), network, [images]))
    for first in findings[:1]:
        print(textwrap.indent(textwrap.fill(f"{first.code}: {first}", 104), "      "))
    if others := [f"{other.code}: {other.layer}" for other in findings[1:]]:
        print(f"      (further findings: {', '.join(others)})")


def run(digits: Digits, epochs: int, seed: int, *, tell: bool) -> tuple[dict[str, float], Any, Any]:
    """Both cases from one seed; return the accuracies by name, and the statistics of bn1 in two trainings."""
    results: dict[str, float] = {}
    network = build(digits.train[0].size, seed, decay=DECAY)
    results["training mode"] = train(network, digits, epochs, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ColdStatisticsWarning)  # it says what the diagnosis says
        results["cold"] = accuracy(network, digits.test, digits.test_labels)
        if tell:
            trained, tested = results["training mode"], results["cold"]
            print(f"1. {trained:.1%} right in training mode, {tested:.1%} in evaluation mode. Why?")
            show_diagnosis(network, digits.test)
    cold = norms(network)["bn1"].history
    batches = [digits.train[i : i + 256] for i in range(0, len(digits.train), 256)]
    recalibrate(norms(network), network, batches, one_by_one=True)
    results["recalibrated"] = accuracy(network, digits.test, digits.test_labels)
    right = build(digits.train[0].size, seed, decay=DECAY, zero_debias=True)
    train(right, digits, epochs, seed)
    results["zero_debias"] = accuracy(right, digits.test, digits.test_labels)

    scanned = other_scanner(digits.test)
    half = len(scanned) // 2  # to recalibrate with, without labels; the others are tested on
    results["other scanner"] = accuracy(network, scanned[half:], digits.test_labels[half:])
    if tell:
        print(f"2. Recalibrated, but images of another scanner: {results['other scanner']:.1%}. Why?")
        show_diagnosis(network, scanned)
    recalibrate(norms(network), network, [scanned[:half]], one_by_one=True)
    results["adapted"] = accuracy(network, scanned[half:], digits.test_labels[half:])
    return results, cold, norms(right)["bn1"].history


def report(results: Results) -> None:
    """Print the accuracies of each seed, their mean and standard deviation."""
    print(f"\nimages classified correctly{'mean ± std':>16}     each seed")
    for name, values in results.items():
        print(f"{CASES[name][0]:30}{spread(values):>13}     {'  '.join(f'{value:.1%}' for value in values)}")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of some shares."""
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation} %"


def draw(results: Results, cold: Any, debiased: Any, path: Path) -> None:
    """The accuracies, and how one channel's running mean lags behind its batches."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    for row, (name, values) in enumerate(reversed(results.items())):
        shares = 100 * np.array(values)
        bars.barh(row, shares.mean(), color=CASES[name][1])
        bars.plot(shares, [row] * len(shares), "k.", markersize=5)
        bars.text(104, row, spread(values), va="center")
    bars.set_yticks(range(len(results)), [CASES[name][0] for name in reversed(results)])
    bars.set(xlim=(0, 142), xticks=range(0, 101, 20))
    bars.set_xlabel(f"images classified correctly (%): mean ± std of {len(values)} seeds, dots: each seed")
    bars.set_title("Right in training, wrong in testing, then repaired", fontsize=11)
    channel = int(np.abs(cold.batch_mean).mean(axis=0).argmax())
    lines.plot(cold.steps, cold.batch_mean[:, channel], ".", color="0.6", label="each batch")
    for history, label, colour in (
        (cold, f"running, decay={DECAY}", FAILS),
        (debiased, f"running, decay={DECAY}, zero_debias=True", REPAIRED),
    ):
        lines.plot(history.steps, history.running_mean[:, channel], color=colour, label=label)
    lines.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    lines.set(xlabel="training step", ylabel=f"mean of channel {channel} at bn1")
    lines.set_title("Cold: the running mean creeps away from 0, where it began", fontsize=11)
    figure.legend(*lines.get_legend_handles_labels(), fontsize=9, loc="outside lower right", ncols=3)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("good_train_bad_test.png"), help="the picture")
    options = parser.parse_args(arguments)
    digits = Digits.load()
    with threadpool_limits(1, user_api="blas"):  # matrix products this small gain nothing from more threads
        seeds = range(options.seed, options.seed + options.seeds)
        runs = [run(digits, options.epochs, seed, tell=seed == options.seed) for seed in seeds]
    results = {name: [accuracies[name] for accuracies, *_ in runs] for name in CASES}
    report(results)
    draw(results, *runs[0][1:], options.out)
    print(f"picture: {options.out}")
    return results


if __name__ == "__main__":
    main()
