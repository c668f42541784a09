"""Small batches: what batch renormalisation does for a network that reads digits.

    python examples/small_batches.py             # under a minute; draws small_batches.png

Normalised by the statistics of two images, a value is -1 or 1: nothing is left but which image had the larger
one. In evaluation the running statistics take over, and the network sees values that it never saw in
training. Batch renormalisation (`renorm=`) normalises a batch almost as evaluation will. Its limits are
loosened after the first epoch, when the running statistics are worth something.

The picture shows each size of batch with and without it. Two images a batch need it. With four the gain is
about as large as the spread of the runs. A large batch has good statistics without it.

Needs the extra `demo` of batchnorm: scikit-learn (the digits) and matplotlib (the picture).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from good_train_bad_test import Digits, accuracy, build, norms, spread, train
from matplotlib.figure import Figure
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

SIZES = (2, 4, 128)
TIGHT = {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}  # r = 1, d = 0: the plain layer
LOOSE = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}  # the limits of the paper
Results = dict[tuple[int, bool], list[float]]  # (images per batch, with renorm) -> test accuracies


def accuracy_of(digits: Digits, batch: int, renorm: bool, epochs: int, seed: int) -> float:
    """Train one network; return the share of test images that it gets right."""
    options: dict[str, Any] = {"renorm": TIGHT} if renorm else {}
    decay = max(0.5, 1 - batch / 500)  # statistics of about 500 images, whatever the batch
    network = build(digits.train[0].size, seed, decay=decay, zero_debias=True, **options)
    rate = 0.005 * (batch / 128) ** 0.5
    for epoch in range(epochs):
        train(network, digits, 1, 1000 * seed + epoch, batch=batch, rate=rate)
        if renorm:
            for layer in norms(network).values():
                layer.renorm = LOOSE
    return accuracy(network, digits.test, digits.test_labels)


def run(epochs: int, seeds: Sequence[int], sizes: Sequence[int], out: Path) -> Results:
    """Train each kind of network from each seed; return the test accuracies."""
    digits = Digits.load()
    results: Results = {}
    for batch in sizes:
        for renorm in (False, True):
            values = [accuracy_of(digits, batch, renorm, epochs, seed) for seed in seeds]
            results[batch, renorm] = values
            each = ", ".join(f"{value:.1%}" for value in values)
            print(f"{_title(batch, renorm):20s} test accuracy {spread(values)}  ({each})")
        gains = _gains(results, batch)
        print(f"{'':20s} renorm adds {gains.mean():+.1f} points in the mean, {gains.min():+.1f} at least")
    draw(results, out)
    print(f"picture: {out}")
    return results


def _gains(results: Results, batch: int) -> NDArray[np.float64]:
    """What renorm adds to the test accuracy, in points, from each seed."""
    return 100 * np.subtract(results[batch, True], results[batch, False])


def _title(batch: int, renorm: bool) -> str:
    return f"batch {batch}, renorm" if renorm else f"batch {batch}"


def draw(results: Results, path: Path) -> None:
    """Each run as a dot, their mean as a line across, their mean and spread in words at the right."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    for row, ((_, renorm), values) in enumerate(reversed(results.items())):
        shares, colour = 100 * np.array(values), "#0072B2" if renorm else "0.5"
        axis.plot(shares, [row] * len(shares), "o", color=colour, alpha=0.6)
        axis.plot([shares.mean()] * 2, [row - 0.35, row + 0.35], color=colour, linewidth=2.5)
        axis.text(1.01, row, spread(values), transform=axis.get_yaxis_transform(), va="center", color=colour)
    axis.set_yticks(range(len(results)), [_title(*key) for key in reversed(results)])
    for boundary in range(2, len(results), 2):
        axis.axhline(boundary - 0.5, color="0.85", linewidth=0.8)
    axis.set_xlabel(
        f"test images classified correctly (%); dots: runs from {len(values)} seeds, line: their mean"
    )
    gains = (f"{_gains(results, batch).mean():+.1f} at batch {batch}" for batch, on in results if on)
    axis.set_title(f"Points that renorm adds: {', '.join(gains)}", fontsize=11)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=SIZES, help="sizes (default: 2 4 128)")
    parser.add_argument("--out", type=Path, default=Path("small_batches.png"), help="the picture")
    options = parser.parse_args(arguments)
    with threadpool_limits(1, user_api="blas"):  # matrix products this small gain nothing from more threads
        return run(options.epochs, range(options.seeds), options.batch, options.out)


if __name__ == "__main__":
    main()
