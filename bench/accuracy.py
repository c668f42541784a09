"""How many digits survive: errors of y and dx for data far from zero, beside other libraries.

    python bench/accuracy.py                            a table: |mean| / std from 1 to 1e7
    python bench/accuracy.py --values 2 4096 16777216   so many values per channel
    python bench/accuracy.py --picture accuracy.png     the same drawn, for every number of values

Normal data is rounded to its storage type, and normalised in training mode. The exact result is the formula
in extended precision, of the values as they are stored. The error of y is the largest |y - exact| / max(1,
|exact|); that of dx the largest |dx - exact| in units of inv_std * (|dy| + |mean of dy| + |x_hat| |mean of dy
x_hat|), the size of what is added up. Other libraries are shown where they are installed: torch, jax and
tensorflow; JAX and TensorFlow by the formula, as their users write it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import batchnorm
import numpy as np

Array = np.ndarray[Any, Any]
EPS = 1e-5
CHUNK = 1 << 20
DTYPES = ("float32", "float64", "float16", "bfloat16")
RATIOS = (1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7)
VALUES = (2, 64, 4096, 1 << 18)


def dtype_of(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def data(dtype: str, ratio: float, values: int, seed: int = 0) -> tuple[Array, Array]:
    """x and dy of a channel, as stored; float16 ends at 65504, so its values are small ones."""
    generator = np.random.default_rng(seed)
    std = 2.0**-12 if dtype == "float16" and ratio > 1e3 else 1.0
    x = (generator.standard_normal(values) + ratio) * std
    return x.astype(dtype_of(dtype)), generator.standard_normal(values).astype(dtype_of(dtype))


# ---- exact -------------------------------------------------------------------------------------------------


def chunks(*arrays: Array) -> Iterator[tuple[Any, ...]]:
    """Stretches of arrays in extended precision, so that any number of values fits into memory."""
    for start in range(0, arrays[0].size, CHUNK):
        parts = (a[start : start + CHUNK] for a in arrays)
        yield start, *(p.astype(np.float64).astype(np.longdouble) for p in parts)


class Exact:
    """Statistics and sums of a channel in extended precision."""

    def __init__(self, x: Array, dy: Array) -> None:
        self.x, self.dy, n = x, dy, x.size
        self.mean = sum((x.sum() for _, x in chunks(self.x)), np.longdouble(0)) / n
        squares = sum((((x - self.mean) ** 2).sum() for _, x in chunks(self.x)), np.longdouble(0))
        self.var = squares / n
        self.inv_std = 1 / np.sqrt(self.var + np.longdouble(EPS))
        self.g = self.gx = np.longdouble(0)
        for _, x, g in chunks(self.x, self.dy):
            product = g * (x - self.mean) * self.inv_std
            self.g, self.gx = self.g + g.sum(), self.gx + product.sum()

    def error_of_y(self, y: Array, scale: Callable[[Any], Any] | None = None) -> float:
        """The largest error of y over max(1, |exact|), or over what `scale` makes of the exact values."""
        worst = 0.0
        for _, x, got in chunks(self.x, y):
            want = (x - self.mean) * self.inv_std
            size = np.maximum(1, abs(want)) if scale is None else scale(want)
            worst = max(worst, float((abs(got - want) / size).max()))
        return worst

    def error_of_dx(self, dx: Array, rounding: float = 0.0, tiny: float = 0.0) -> float:
        """The same of dx; `rounding` is how much of dx itself its storage may take, which does not count."""
        n, worst = self.x.size, 0.0
        for _, x, g, got in chunks(self.x, self.dy, dx):
            x_hat = (x - self.mean) * self.inv_std
            want = self.inv_std * (g - self.g / n - x_hat * self.gx / n)
            size = self.inv_std * (abs(g) + abs(self.g / n) + abs(x_hat * self.gx / n))
            off = np.maximum(abs(got - want) - rounding * abs(want) - tiny, 0)
            worst = max(worst, float((off / np.where(size == 0, 1, size)).max()))
        return worst


# ---- contestants: x, dy -> y, dx ---------------------------------------------------------------------------

Pair = tuple[Array, Array]


def ours(x: Array, dy: Array) -> Pair:
    y, saved = batchnorm.batch_norm_train(x[None, None], eps=EPS)
    return y[0, 0], batchnorm.batch_norm_backward(dy[None, None], saved).dx[0, 0]


def torch_native() -> tuple[str, Callable[[Array, Array], Pair]]:
    import torch

    def tensor(a: Array) -> Any:
        if a.dtype.name != "bfloat16":
            return torch.from_numpy(a.copy())[None, None]
        return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)[None, None]

    def back(t: Any) -> Array:
        return np.asarray(t.double().numpy()[0, 0])

    def call(x: Array, dy: Array) -> Pair:
        leaf = tensor(x).requires_grad_()
        y = torch.nn.functional.batch_norm(leaf, None, None, training=True, eps=EPS)
        y.backward(tensor(dy))
        return back(y.detach()), back(leaf.grad)

    return f"torch {torch.__version__.partition('+')[0]}", call


def jax_formula() -> tuple[str, Callable[[Array, Array], Pair]]:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # for float64; the other types are not affected

    def normalise(x: Any) -> Any:
        wide = x if x.dtype.itemsize > 2 else x.astype("float32")
        return ((wide - wide.mean()) * jax.lax.rsqrt(wide.var() + EPS)).astype(x.dtype)

    @jax.jit
    def both(x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(normalise, x)
        return y, *pull(dy)

    return f"jax {jax.__version__}", lambda x, dy: tuple(np.asarray(a) for a in both(x, dy))


def tensorflow_formula() -> tuple[str, Callable[[Array, Array], Pair]]:
    import tensorflow as tf

    def call(x: Array, dy: Array) -> Pair:
        leaf = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(leaf)
            wide = leaf if leaf.dtype.size > 2 else tf.cast(leaf, tf.float32)
            mean, var = tf.nn.moments(wide, [0])
            y = tf.cast(tf.nn.batch_normalization(wide, mean, var, None, None, EPS), leaf.dtype)
        return y.numpy(), tape.gradient(y, leaf, tf.constant(dy)).numpy()

    return f"tensorflow {tf.__version__}", call


def contestants() -> dict[str, Callable[[Array, Array], Pair]]:
    found: dict[str, Callable[[Array, Array], Pair]] = {"batchnorm": ours}
    for make in (torch_native, jax_formula, tensorflow_formula):
        try:
            name, call = make()
        except ImportError:
            continue
        found[name] = call
    return found


# ---- table and picture -------------------------------------------------------------------------------------

Errors = dict[tuple[str, str, int, float], tuple[float, float]]  # of name, dtype, values, ratio: y and dx


def measured(dtypes: list[str], values: list[int]) -> Errors:
    errors: Errors = {}
    for dtype in dtypes:
        for n in values:
            for ratio in RATIOS:
                x, dy = data(dtype, ratio, n)
                exact = Exact(x, dy)
                for name, call in contestants().items():
                    y, dx = call(x, dy)
                    errors[name, dtype, n, ratio] = exact.error_of_y(y), exact.error_of_dx(dx)
    return errors


def table(errors: Errors, dtypes: list[str], values: list[int]) -> str:
    """In Markdown: the worst over all numbers of values, y / dx."""
    names = list(dict.fromkeys(name for name, *_ in errors))
    head = ["", *(f"{ratio:.0e}".replace("e+0", "e") for ratio in RATIOS)]
    lines = [head, ["---", *["--:"] * len(RATIOS)]]
    for dtype in dtypes:
        for name in names:
            cells = []
            for ratio in RATIOS:
                worst = [max(errors[name, dtype, n, ratio][i] for n in values) for i in (0, 1)]
                cells.append(" / ".join(f"{w:.1e}" for w in worst))
            lines.append([f"{dtype}, {name}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(errors: Errors, dtypes: list[str], values: list[int], path: str) -> None:
    """A panel for each dtype, y above and dx below: for each library the worst over all numbers of values."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, *_ in errors))
    figure = Figure(figsize=(3.2 * len(dtypes), 6), dpi=130, layout="constrained")
    panels = figure.subplots(2, len(dtypes), sharex=True, squeeze=False)
    colours = dict(zip(names, ("#0072B2", "#D55E00", "#CC79A7", "#009E73"), strict=False))
    for column, dtype in enumerate(dtypes):
        for row, what in enumerate(("y", "dx")):
            axes = panels[row][column]
            for name in reversed(names):  # ours on top
                most = np.array([max(errors[name, dtype, n, r][row] for n in values) for r in RATIOS])
                most[most == 0] = np.nan  # values that storage made equal
                size = 2.4 if name == "batchnorm" else 1.4
                axes.loglog(RATIOS, most, "o-", color=colours[name], label=name, linewidth=size, markersize=3)
            axes.set_title(f"{dtype}: {what}", fontsize=10)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.supxlabel("|mean| / standard deviation of the data", fontsize=10)
    figure.supylabel("largest error", fontsize=10)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--values", nargs="+", type=int, default=list(VALUES), help="per channel")
    parser.add_argument("--picture", help="where to draw it")
    options = parser.parse_args()
    errors = measured(options.dtypes, options.values)
    print(f"largest error of y / dx; values per channel: {', '.join(map(str, options.values))}\n")
    print(table(errors, options.dtypes, options.values))
    if options.picture:
        draw(errors, options.dtypes, options.values, options.picture)


if __name__ == "__main__":
    main()
