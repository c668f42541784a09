"""How many digits survive: error of the normalised output for data far from zero.

    python bench/accuracy.py

For each |mean| / std, float32 data of 32 x 8 x 56 x 56 is normalised in training mode; the error is the
largest |y - exact| / max(1, |exact|) over all values, the exact result being the formula in extended
precision. PyTorch is shown if it is installed.
"""

from __future__ import annotations

import batchnorm
import numpy as np
from rich.console import Console
from rich.table import Table


def exact(x: np.ndarray) -> np.ndarray:
    """The formula in the widest type NumPy has."""
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean((0, 2, 3), keepdims=True)
    return centred / np.sqrt((centred**2).mean((0, 2, 3), keepdims=True) + np.longdouble(1e-5))


def main() -> None:
    """Print the table."""
    contestants = {"batchnorm": lambda x: batchnorm.batch_norm_train(x).y}
    try:
        import torch
    except ImportError:
        pass
    else:
        contestants[f"torch {torch.__version__}"] = lambda x: torch.nn.functional.batch_norm(
            torch.from_numpy(x), None, None, training=True, eps=1e-5
        ).numpy()
    table = Table("|mean| / std", *contestants, title="largest error of y, float32")
    for ratio in (0, 1e2, 1e4, 1e5, 1e6):
        x = (np.random.default_rng(0).standard_normal((32, 8, 56, 56)) + ratio).astype(np.float32)
        truth = exact(x)
        errors = [float((abs(f(x) - truth) / np.maximum(1, abs(truth))).max()) for f in contestants.values()]
        table.add_row(f"{ratio:g}", *(f"{e:.1e}" for e in errors))
    Console().print(table)


if __name__ == "__main__":
    main()
