"""Named sets of layer shapes: (weight, N, C, spatial...). Weights say how often a layer occurs in the
network."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

LISTED = Path(__file__).resolve().parents[1] / "tests" / "data" / "bnorm_shapes.csv"


class Shape(NamedTuple):
    """One layer: how often it occurs, and N, C and the spatial sizes (none for a matrix)."""

    weight: int
    batch: int
    channels: int
    spatial: tuple[int, ...]

    def dims(self, layout: str) -> tuple[int, ...]:
        """The array's shape in layout "nchw" or "nhwc" (whatever the rank)."""
        if layout == "nchw":
            return (self.batch, self.channels, *self.spatial)
        return (self.batch, *self.spatial, self.channels)

    @property
    def elements(self) -> int:
        return math.prod((self.batch, self.channels, *self.spatial))

    def __str__(self) -> str:
        return "x".join(map(str, (self.batch, self.channels, *self.spatial)))


def _r50(batch: int) -> list[Shape]:
    # The 53 batch-norm layers of ResNet-50 (He et al. 2015, arXiv:1512.03385, table 1), by channels and
    # side length.
    layers = [
        (1, 64, 112), (6, 64, 56), (4, 256, 56), (1, 128, 56), (7, 128, 28), (5, 512, 28),
        (1, 256, 28), (11, 256, 14), (7, 1024, 14), (1, 512, 14), (5, 512, 7), (4, 2048, 7),
    ]  # fmt: skip
    return [Shape(weight, batch, channels, (side, side)) for weight, channels, side in layers]


def _listed() -> list[Shape]:
    """The distinct shapes of bnorm_shapes.csv; "a*18&b" is a layer that occurs 18 times and once more."""
    weights: dict[tuple[int, ...], int] = {}
    with LISTED.open(newline="") as file:
        for row in csv.DictReader(file):
            sizes = tuple(int(row[key]) for key in ("mb", "ic", "id", "ih", "iw"))
            counts = [int(name.partition("*")[2] or 1) for name in row["name"].split("&")]
            weights[sizes] = weights.get(sizes, 0) + sum(counts)
    shapes = []
    for (batch, channels, *space), weight in weights.items():
        while space and space[0] == 1:  # a 2-D layer is written with depth 1, a matrix with 1x1x1
            space = space[1:]
        shapes.append(Shape(weight, batch, channels, tuple(space)))
    return shapes


def shapes_of(name: str) -> list[Shape]:
    """A set."""
    return SETS[name] if name in SETS else _listed()


def thinned(shapes: list[Shape], limit: int | None) -> list[Shape]:
    """`limit` of the shapes, evenly spread from the smallest to the largest; all without a limit."""
    if limit is None or limit >= len(shapes):
        return shapes
    ordered = sorted(shapes, key=lambda s: s.elements)
    if limit == 1:
        return [ordered[len(ordered) // 2]]
    return [ordered[i * (len(ordered) - 1) // (limit - 1)] for i in range(limit)]


SETS: dict[str, list[Shape]] = {
    "r50": _r50(32),
    "r50-1": _r50(1),
    "small": [
        Shape(1, 256, 6, (24, 24)),
        Shape(1, 256, 16, (8, 8)),
        Shape(1, 256, 120, ()),
        Shape(1, 256, 84, ()),
        Shape(1, 128, 64, (24, 24)),
        Shape(1, 1024, 1024, ()),
        Shape(1, 8192, 4096, ()),
        Shape(1, 2, 32, (64, 64, 64)),
        Shape(1, 16, 64, (4096,)),
    ],
    "tiny": [Shape(1, 2, 3, (4, 4))],
}

NAMES = (*SETS, "shapes")
