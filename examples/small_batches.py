"""Small batches: what batch renormalisation does for a network that reads digits.

    python examples/small_batches.py             # under a minute; draws small_batches.png

Batches of 2 or 4 give noisy statistics: what a network sees in training is not what it will see in
evaluation, where the running statistics take over. Batch renormalisation (`renorm=`) normalises a batch
almost as evaluation will. Its limits are loosened after the first epoch, when the running statistics are
worth something. The picture shows each size of batch with and without it: every dot is one run from its own
seed, every bar their mean. Two images a batch gain most. A large batch has good statistics without it.

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
from threadpoolctl import threadpool_limits

SIZES = (2, 4, 128)
TIGHT = {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}  # r = 1, d = 0: the plain layer
LOOSE = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}  # the limits of the paper
Results = dict[tuple[int, bool], list[float]]  # (images per batch, with renorm) -> test accuracies


def accuracy_of(digits: Digits, batch: int, renorm: bool, epochs: int, seed: int) -> float:
    """Train one network; return the share of test images that it gets right."""
    options: dict[str, Any] = {"renorm": TIGHT} if renorm else {}
    network = build(digits.train[0].size, seed, decay=0.99, zero_debias=True, **options)
    rate = 0.01 * (batch / 128) ** 0.5
    for epoch in range(epochs):
        train(network, digits, 1, 1000 * seed + epoch, batch=batch, rate=rate)
        if renorm:
            for layer in norms(network).values():
                layer.renorm = LOOSE
    return accuracy(network, digits.test, digits.test_labels)


def run(epochs: int, seeds: Sequence[int], sizes: Sequence[int], out: Path | None) -> Results:
    """Train each kind of network from each seed; return the test accuracies."""
    digits = Digits.load()
    results: Results = {}
    for batch in sizes:
        for renorm in (False, True):
            values = [accuracy_of(digits, batch, renorm, epochs, seed) for seed in seeds]
            results[batch, renorm] = values
            each = ", ".join(f"{value:.1%}" for value in values)
            print(f"{_title(batch, renorm):20s} test accuracy {np.mean(values):.1%}  ({each})")
    if out is not None:
        draw(results, out)
        print(f"picture: {out}")
    return results


def _title(batch: int, renorm: bool) -> str:
    return f"batch {batch}, renorm" if renorm else f"batch {batch}"


def draw(results: Results, path: Path) -> None:
    """Each run as a dot, their mean as a bar."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for row, ((_, renorm), values) in enumerate(reversed(results.items())):
        shares = 100 * np.array(values)
        axis.barh(row, shares.mean(), color="C2" if renorm else "0.6")
        axis.plot(shares, [row] * len(shares), "k.", markersize=5)
        axis.text(30, row, f"{shares.mean():.1f} %", ha="center", va="center", color="white")
    axis.set_yticks(range(len(results)), [_title(*key) for key in reversed(results)])
    axis.set_xlabel("test images classified correctly (%); dots: single runs")
    axis.set_title("Small batches with and without batch renormalisation", fontsize=11)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=SIZES, help="sizes (default: 2 4 128)")
    parser.add_argument("--out", type=Path, default=Path("small_batches.png"), help="the picture")
    options = parser.parse_args(arguments)
    with threadpool_limits(1, user_api="blas"):  # matrix products this small gain nothing from more threads
        return run(options.epochs, range(options.seeds), options.batch, options.out)


if __name__ == "__main__":
    main()
