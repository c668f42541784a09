"""Small batches: what batch renormalisation and ghost batches do for a network that reads digits.

    python examples/small_batches.py             # under a minute; draws small_batches.png

Batches of 2 or 4 give noisy statistics: what a network sees in training is not what it will see in
evaluation, where the running statistics take over. Batch renormalisation (`renorm=`) normalises a batch
almost as evaluation will; its limits are loosened after the first epoch, when the running statistics are
worth something. It gains much here: about 13 points at 2 images a batch, 3 points at 4.

Ghost batches (`virtual_batch_size=`) go the other way: parts of a large batch are normalised apart, which
brings back the noise of small batches. That is for large networks that large batches fit too well; this one
does not, and loses 3 points.

Needs the extra `demo` of batchnorm: scikit-learn (the digits) and matplotlib (the picture).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from good_train_bad_test import Digits, accuracy, build, norms, train
from matplotlib.figure import Figure

PLAIN: dict[str, Any] = {}
RENORM: dict[str, Any] = {"renorm": {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}}
LOOSE = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}  # the limits of the paper
# name: (images per batch, options of BatchNorm)
RUNS = {
    "batch 2": (2, PLAIN),
    "batch 2, renorm": (2, RENORM),
    "batch 4": (4, PLAIN),
    "batch 4, renorm": (4, RENORM),
    "batch 128": (128, PLAIN),
    "batch 128, ghosts of 16": (128, {"virtual_batch_size": 16}),
}


def run(epochs: int, seeds: Sequence[int], out: Path | None) -> dict[str, list[float]]:
    """Train each network from each seed; return the test accuracies by name."""
    digits = Digits.load()
    results: dict[str, list[float]] = {}
    for name, (batch, options) in RUNS.items():
        results[name] = []
        for seed in seeds:
            network = build(digits.train[0].size, seed, decay=0.99, zero_debias=True, **options)
            rate = 0.01 * (batch / 128) ** 0.5
            for epoch in range(epochs):
                train(network, digits, 1, 1000 * seed + epoch, batch=batch, rate=rate)
                for layer in norms(network).values():
                    if layer.renorm is not None:
                        layer.renorm = LOOSE
            results[name].append(accuracy(network, digits.test, digits.test_labels))
        print(f"{name:24s} test accuracy {np.mean(results[name]):.1%}  ({_listed(results[name])})")
    if out is not None:
        draw(results, out)
        print(f"picture: {out}")
    return results


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.1%}" for value in values)


def draw(results: dict[str, list[float]], path: Path) -> None:
    """Each run as a dot, their mean as a bar."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    names = list(results)[::-1]
    means = [100 * float(np.mean(results[name])) for name in names]
    colours = ["C2" if "," in name else "0.6" for name in names]
    axis.barh(names, means, color=colours)
    for row, name in enumerate(names):
        axis.plot([100 * value for value in results[name]], [row] * len(results[name]), "k.", markersize=5)
        axis.text(means[row] / 2, row, f"{means[row]:.1f} %", ha="center", va="center", color="white")
    axis.set_xlabel("test images classified correctly (%); dots: single runs")
    axis.set_title("Small batches with and without renorm; a large one in parts", fontsize=11)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("small_batches.png"), help="the picture")
    options = parser.parse_args(arguments)
    return run(options.epochs, range(options.seeds), options.out)


if __name__ == "__main__":
    main()
