"""Training goes well, testing terribly: reproduce the complaint, diagnose it, repair it.

    python examples/good_train_bad_test.py                # a few seconds; draws good_train_bad_test.png

A network with batch normalization learns handwritten digits. In training mode it is right nearly always; in
evaluation mode it guesses, for either of two reasons that look the same from outside:

1. Cold statistics. After three epochs with decay 0.999 most of the running statistics still is the
   values they began with.
2. Mismatched statistics. The test images come from another scanner: darker, and with less contrast.

`diagnose` tells the two apart, and `recalibrate` mends them without training and without labels.

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
RATE = 0.005


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
    """Print what `diagnose` says of the first BatchNorm that is not in order."""
    found = diagnose(norms(network), network, [images])
    for finding in found:
        if finding.layer == found.findings[0].layer:
            print(textwrap.indent(textwrap.fill(f"{finding.code}: {finding}", 104), "      "))
    others = {finding.layer for finding in found} - {found.findings[0].layer}
    if others:
        print(f"      (likewise {', '.join(sorted(others))})")


def run(
    epochs: int = 3, seed: int = 0, out: Path | None = Path("good_train_bad_test.png")
) -> dict[str, float]:
    """Both cases; return the accuracies by name."""
    digits = Digits.load()
    results: dict[str, float] = {}
    network = build(digits.train[0].size, seed, decay=DECAY)
    results["training mode"] = train(network, digits, epochs, seed)

    print(f"1. decay {DECAY}, epochs {epochs}: {results['training mode']:.1%} right in training mode")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ColdStatisticsWarning)  # it says what the diagnosis says
        results["cold"] = accuracy(network, digits.test, digits.test_labels)
        print(f"   test images in evaluation mode: {results['cold']:.1%}. Why?")
        show_diagnosis(network, digits.test)
    history = norms(network)["bn1"].history
    batches = [digits.train[i : i + 256] for i in range(0, len(digits.train), 256)]
    recalibrate(norms(network), network, batches, one_by_one=True)
    results["recalibrated"] = accuracy(network, digits.test, digits.test_labels)
    print(f"   after recalibrate(): {results['recalibrated']:.1%}")
    right = build(digits.train[0].size, seed, decay=DECAY, zero_debias=True)
    train(right, digits, epochs, seed)
    results["zero_debias"] = accuracy(right, digits.test, digits.test_labels)
    print(f"   or, trained with zero_debias=True from the start: {results['zero_debias']:.1%}\n")

    print("2. the same network, images of another scanner")
    scanned = other_scanner(digits.test)
    results["other scanner"] = accuracy(network, scanned, digits.test_labels)
    print(f"   in evaluation mode: {results['other scanner']:.1%}. Why?")
    show_diagnosis(network, scanned)
    half = len(scanned) // 2  # its statistics come from images that are not tested on, and need no labels
    recalibrate(norms(network), network, [scanned[:half]], one_by_one=True)
    results["adapted"] = accuracy(network, scanned[half:], digits.test_labels[half:])
    print(f"   after recalibrate() with {half} of its images, on the others: {results['adapted']:.1%}")
    if out is not None:
        draw(results, history, norms(right)["bn1"].history, out)
        print(f"picture: {out}")
    return results


def draw(results: dict[str, float], cold: object, debiased: object, path: Path) -> None:
    """The accuracies, and how one channel's running mean lags behind its batches."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 4))
    colours = {"cold": "C3", "other scanner": "C3", "training mode": "0.6"}
    names = list(results)[::-1]
    drawn = bars.barh(names, [100 * results[n] for n in names], color=[colours.get(n, "C2") for n in names])
    bars.bar_label(drawn, fmt="%.0f %%", padding=3)
    bars.set_xlim(0, 112)
    bars.set_xlabel("images classified correctly (%)")
    bars.set_title("Good in training, bad in testing, and repaired", fontsize=11)
    channel = int(np.abs(cold.batch_mean).mean(axis=0).argmax())  # type: ignore[attr-defined]
    lines.plot(cold.steps, cold.batch_mean[:, channel], ".", color="0.6", label="each batch")  # type: ignore[attr-defined]
    for history, label, colour in (
        (cold, f"running, decay={DECAY}", "C3"),
        (debiased, f"running, decay={DECAY}, zero_debias=True", "C2"),
    ):
        lines.plot(history.steps, history.running_mean[:, channel], color=colour, label=label)  # type: ignore[attr-defined]
    lines.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    lines.set_xlabel("update")
    lines.set_ylabel("mean")
    lines.set_title(f"bn1, channel {channel}", fontsize=11)
    figure.legend(*lines.get_legend_handles_labels(), fontsize=9, loc="outside lower right", ncols=3)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("good_train_bad_test.png"), help="the picture")
    options = parser.parse_args(arguments)
    with threadpool_limits(1, user_api="blas"):  # matrix products this small gain nothing from more threads
        return run(options.epochs, options.seed, options.out)


if __name__ == "__main__":
    main()
