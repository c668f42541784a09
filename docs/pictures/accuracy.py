"""Largest error of the normalised output, float32, against extended precision, as the data moves away from
zero. NumPy's lines compute in float32. The dotted line is one unit in the last place of numbers near 1.

    python docs/pictures/accuracy.py --out accuracy.png

PyTorch is drawn if it is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from batchnorm import batch_norm_train
from matplotlib.figure import Figure

RATIOS = 10.0 ** np.arange(0, 6.5, 0.5)
SHAPE = (32, 4, 28, 28)
AXES = (0, 2, 3)
EPS = 1e-5


def exact(x: Any) -> Any:
    """The formula in the widest type that NumPy has."""
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean(AXES, keepdims=True)
    return centred / np.sqrt((centred**2).mean(AXES, keepdims=True) + np.longdouble(EPS))


def two_passes(x: Any) -> Any:
    """NumPy in float32, with the mean subtracted before squaring."""
    return (x - x.mean(AXES, keepdims=True)) / np.sqrt(x.var(AXES, keepdims=True) + np.float32(EPS))


def one_pass(x: Any) -> Any:
    """NumPy in float32, with the variance as E[x^2] - E[x]^2."""
    mean, square = x.mean(AXES, keepdims=True), (x * x).mean(AXES, keepdims=True)
    return (x - mean) / np.sqrt(np.maximum(square - mean * mean, 0) + np.float32(EPS))


def contestants() -> dict[str, Callable[[Any], Any]]:
    found: dict[str, Callable[[Any], Any]] = {
        "E[x²] - E[x]², NumPy": one_pass,
        "two passes, NumPy": two_passes,
    }
    try:
        import torch
    except ImportError:
        pass
    else:
        version = torch.__version__.split("+")[0]
        found[f"PyTorch {version}, CPU"] = lambda x: torch.nn.functional.batch_norm(
            torch.from_numpy(x), None, None, training=True, eps=EPS
        ).numpy()
    return found | {"batchnorm": lambda x: batch_norm_train(x, eps=EPS).y}


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default="accuracy.png", help="the picture (default: %(default)s)")
    options = parser.parse_args()
    errors: dict[str, list[float]] = {name: [] for name in contestants()}
    for ratio in RATIOS:
        x = (np.random.default_rng(0).standard_normal(SHAPE) + ratio).astype(np.float32)
        truth = exact(x)
        for name, normalise in contestants().items():
            errors[name].append(float((abs(normalise(x) - truth) / np.maximum(1, abs(truth))).max()))
    draw(errors, options.out)


def draw(errors: dict[str, list[float]], path: str) -> None:
    """One line each, with its name at its end."""
    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(reversed(errors), ("#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"), strict=False))
    for name, values in errors.items():
        ours = name == "batchnorm"
        size = {"linewidth": 2.6, "markersize": 5} if ours else {"linewidth": 1.4, "markersize": 3.5}
        axes.loglog(RATIOS, values, "o-", color=colours[name], **size)
    ends = {name: values[-1] for name, values in errors.items()}
    last = 0.0
    for name in sorted(ends, key=lambda name: ends[name]):
        height = max(ends[name], last * 5)  # names do not overlap
        last = height
        axes.annotate(name, (RATIOS[-1], height), (8, 0), textcoords="offset points", color=colours[name],
                      va="center", fontsize=9, annotation_clip=False)  # fmt: skip
    axes.axhline(2.0**-23, color="0.6", linestyle=":", linewidth=1)
    axes.set_xlabel("|mean| / standard deviation of the data")
    axes.set_ylabel("largest error of y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_xlim(0.8, 1.2e6)
    figure.savefig(path)


if __name__ == "__main__":
    main()
