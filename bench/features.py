"""What the features cost: each call beside its plain one, in turn.

    python bench/features.py                        all of them
    python bench/features.py --set small --feature renorm --layout nhwc --rounds 31

A number is the feature's time divided by the plain call's: 1.05 means 5 % more. It is the median of each
round's own ratio, so that a noisy neighbour meets both. Outputs are reused.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import batchnorm as bn
import numpy as np
from rich.console import Console
from rich.table import Table

import machine
import options
from peers.protocol import LAYOUTS
from shapes import NAMES, Shape, shapes_of, thinned

Call = Callable[[], Any]


class Layer:
    """One layer's arrays and its plain calls."""

    def __init__(self, shape: Shape, layout: str) -> None:
        dims = shape.dims(layout)
        self.where = {"channel_axis": 1 if layout == "nchw" else -1}
        generator = np.random.default_rng(0)
        self.x, self.dy = (generator.standard_normal(dims, dtype=np.float32) for _ in range(2))
        self.y, self.dx = np.ones_like(self.x), np.ones_like(self.x)
        c = shape.channels
        self.affine = np.full(c, 1.5, np.float32), np.full(c, 0.5, np.float32)
        self.running = {"running_mean": np.zeros(c, np.float32), "running_var": np.ones(c, np.float32)}
        self.plain = self.calls()

    def calls(self, affine: tuple[np.ndarray, np.ndarray] | None = None, **feature: Any) -> tuple[Call, Call]:
        """Forward and backward of a call with `feature`, a keyword of batch_norm_train."""
        gamma, beta = affine or self.affine
        saved = bn.batch_norm_train(self.x, gamma, beta, **self.where, **feature).saved

        def forward() -> Any:
            return bn.batch_norm_train(
                self.x, gamma, beta, **self.running, **self.where, **feature, out=self.y
            )

        def backward() -> Any:
            return bn.batch_norm_backward(self.dy, saved, out=self.dx)

        return forward, backward


def renorm(layer: Layer) -> tuple[Call, Call]:
    """A reference near the batch's own statistics, limits as in the paper."""
    c = len(layer.affine[0])
    reference = {"mean": np.zeros(c, np.float32), "std": np.ones(c, np.float32)}
    return layer.calls(renorm={"rmax": 3.0, "dmax": 5.0, **reference})


def ghost(layer: Layer) -> tuple[Call, Call]:
    """A quarter of the batch at a time: 8 of 32."""
    return layer.calls(virtual_batch_size=max(len(layer.x) // 4, 1))


def per_sample(layer: Layer) -> tuple[Call, Call]:
    """gamma and beta of each sample's own, shape (N, C)."""
    n = len(layer.x)
    gamma, beta = (np.repeat(a[None], n, axis=0) for a in layer.affine)
    return layer.calls((gamma, beta))


def from_output(layer: Layer) -> tuple[Call, Call]:
    """Backward from y; no channel whose x has to be kept."""
    return layer.calls(keep="y")


def _positions(layer: Layer) -> tuple[int, ...]:
    axis = layer.where["channel_axis"] % layer.x.ndim
    return tuple(n for i, n in enumerate(layer.x.shape) if i != axis)


def padding(layer: Layer) -> tuple[Call, Call]:
    """Sizes between half of the image and all of it, the rest padding at the bottom."""
    samples, height, width = _positions(layer)
    heights = np.random.default_rng(1).integers((height + 1) // 2, height + 1, (samples, 1, 1))
    rows = np.arange(height)[:, None] < heights
    return layer.calls(mask=np.ascontiguousarray(np.broadcast_to(rows, (samples, height, width))))


def mask(layer: Layer) -> tuple[Call, Call]:
    """Three positions of four, scattered."""
    return layer.calls(mask=np.random.default_rng(1).random(_positions(layer)) < 0.75)


def channel_mask(layer: Layer) -> tuple[Call, Call]:
    """Three elements of four, scattered: each channel has positions of its own."""
    return layer.calls(mask=np.random.default_rng(1).random(layer.x.shape) < 0.75)


def weights(layer: Layer) -> tuple[Call, Call]:
    """A weight per sample."""
    return layer.calls(weights=np.random.default_rng(1).random(len(layer.x)) + 0.5)


def all_weights(layer: Layer) -> tuple[Call, Call]:
    """A weight per position, float64."""
    return layer.calls(weights=np.random.default_rng(1).random(_positions(layer)) + 0.5)


FEATURES = {
    "renorm": renorm, "ghost": ghost, "per_sample": per_sample, "from_output": from_output,
    "padding": padding, "mask": mask, "channel_mask": channel_mask, "weights": weights,
    "all_weights": all_weights,
}  # fmt: skip


def ratio(plain: Call, feature: Call, rounds: int) -> tuple[float, float]:
    """Median seconds of the plain call, and median of the rounds' ratios; the first round is to warm up."""
    seconds = []
    for i in range(rounds + 1):
        taken = {}
        for call in (plain, feature) if i % 2 else (feature, plain):
            start = time.perf_counter()
            call()
            taken[call] = time.perf_counter() - start
        seconds.append((taken[plain], taken[feature] / taken[plain]))
    return statistics.median(s for s, _ in seconds[1:]), statistics.median(r for _, r in seconds[1:])


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--set", choices=NAMES, default="r50", help="as in run.py (default: r50)")
    p.add_argument("--limit", type=options.at_least(1), metavar="N", help="N shapes of the set")
    p.add_argument("--feature", nargs="+", choices=FEATURES, default=list(FEATURES), help="which")
    p.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="memory orders")
    p.add_argument("--threads", type=options.threads, default=len(machine.cpus()), metavar="N")
    p.add_argument("--rounds", type=options.at_least(1), default=11, metavar="N", help="(default: 11)")
    return p


def main() -> int:
    """Command line."""
    args = parser().parse_args()
    bn.set_num_threads(args.threads)
    console = Console(width=110)
    for name in args.feature:
        table = Table(title=f"{name} / plain, {args.threads} threads, float32", title_justify="left")
        for heading in ("layout", "shape", "plain forward, ms", "forward", "plain backward, ms", "backward"):
            table.add_column(heading, justify="right")
        for layout in args.layout:
            weighted = np.zeros((2, 2))
            for shape in thinned(shapes_of(args.set), args.limit):
                layer = Layer(shape, layout)
                pairs = zip(layer.plain, FEATURES[name](layer), strict=True)
                cells = [ratio(*pair, args.rounds) for pair in pairs]
                weighted += [[shape.weight * s, shape.weight * s * r] for s, r in cells]
                table.add_row(
                    layout, str(shape), *(t for s, r in cells for t in (f"{s * 1e3:.3f}", f"{r:.2f}"))
                )
            table.add_row(
                layout, "total", *(t for s, r in weighted for t in (f"{s * 1e3:.1f}", f"{r / s:.2f}"))
            )
        console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
