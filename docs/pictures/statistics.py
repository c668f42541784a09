"""Batch statistics as dots, running statistics as lines, of a layer whose data drifts: the running mean lags
behind by some thirty batches, which is 1 / (1 - decay).

    python docs/pictures/statistics.py --out statistics.png
"""

from __future__ import annotations

import argparse

import numpy as np
from batchnorm import BatchNorm


def main() -> None:
    """Train on data whose mean falls, and draw what the layer remembers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default="statistics.png", help="the picture (default: %(default)s)")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    bn = BatchNorm(6, decay=0.97, history=500)
    means = np.linspace(4, 14, 6)
    for step in range(400):
        drift = 4 * np.sin(step / 60)
        bn(rng.normal(means + drift, 1.5, (32, 6)).astype(np.float32))
    bn.plot_statistics(options.out, channels=(0, 3, 5))


if __name__ == "__main__":
    main()
