"""Which positions count, and how often: the arguments ``mask``, ``lengths`` and ``weights``.

A position is an index of x without its channel axis. Here the arguments are checked and brought into the form
the extension takes: one value per position in the order of x's memory, or fewer, each for as many consecutive
positions. No tensor is looked at.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _args

Array = NDArray[Any]


def asked(mask: object, lengths: object, lengths_axis: object, weights: object = None) -> Positions | None:
    """The arguments as one, or None if none was given."""
    if mask is None and lengths is None and lengths_axis is None and weights is None:
        return None
    return Positions(mask, lengths, lengths_axis, weights)


def checked(x: Array, where: dict[str, Any], given: dict[str, Any]) -> Positions:
    """What some of the arguments by name come to for `x`; `where` is axis or data_format."""
    x, axis = _args._input(x, where.get("axis", _args.DEFAULT_AXIS), where.get("data_format"))
    names = ("mask", "lengths", "lengths_axis", "weights")
    positions = Positions(*(given.get(name) for name in names))
    positions.check(x, axis)
    return positions


def refuse_integers(x: Array, mask: object, lengths: object, weights: object = None) -> None:
    """Images of integers count as a whole."""
    for name, value in (("mask", mask), ("lengths", lengths), ("weights", weights)):
        if value is not None:
            raise TypeError(
                f"{name} is given with x of dtype {x.dtype}, of which all positions count; use "
                f"x.astype(numpy.float32), or drop {name}"
            )


class Positions:
    """The arguments of one call; after `check`, what they come to."""

    counting: int  # positions that count
    n: float  # the sum of their weights

    def __init__(self, mask: object, lengths: object, lengths_axis: object, weights: object) -> None:
        self._mask, self._lengths, self._axis, self._weights = mask, lengths, lengths_axis, weights
        self.weighted = weights is not None

    def check(self, x: Array, axis: int) -> None:
        """Raise the error that explains, or work out what counts."""
        if x.dtype.kind in "iu":
            refuse_integers(x, self._mask, self._lengths, self._weights)
        axis %= x.ndim
        self._x_shape = x.shape
        self._axes = [a for a in range(x.ndim) if a != axis]
        self.shape = tuple(x.shape[a] for a in self._axes)
        if self._mask is not None and self._lengths is not None:
            raise ValueError("mask and lengths are both given, which say the same thing: drop one of them")
        if self._lengths is None and self._axis is not None:
            raise ValueError("lengths_axis is given without lengths: give lengths, or drop lengths_axis")
        self.mask = self.weights = None
        if self._mask is not None:
            self.mask = self._checked_mask(self._mask)
        elif self._lengths is not None:
            self.mask = self._from_lengths(self._lengths, axis)
        if self._weights is not None:
            self.weights = self._checked_weights(self._weights)
        self._count()

    def vectors(self) -> dict[str, Array | None]:
        """The arrays given, which no output may overlap."""
        given = {"mask": self._mask, "weights": self._weights}
        return {name: v if isinstance(v, np.ndarray) else None for name, v in given.items()}

    def in_order_of(self, x: Array) -> tuple[Array | None, Array | None] | None:
        """Mask (uint8) and weights (float64) as the extension takes them for `x` as it lies in memory."""
        if not x.size:
            return None
        order = sorted(range(len(self._axes)), key=lambda i: -abs(x.strides[self._axes[i]]))
        mask = None if self.mask is None else self._flat(self.mask, order).view(np.uint8)
        return mask, None if self.weights is None else self._flat(self.weights, order)

    def _flat(self, values: Array, order: list[int]) -> Array:
        values = values.transpose(order)
        sizes = tuple([self.shape[i] for i in order])
        if values.shape == sizes:
            return np.ascontiguousarray(values).reshape(-1)
        n = max((i + 1 for i, size in enumerate(values.shape) if size != 1), default=0)
        values = values.reshape(values.shape[:n])  # behind these, each value stands for many positions
        return np.ascontiguousarray(np.broadcast_to(values, sizes[:n])).reshape(-1)

    def _broadcastable(self, values: Array, name: str) -> Array:
        """`values` with as many axes as the positions, each of length 1 or theirs."""
        shape = values.shape
        if shape == self.shape:
            return values
        if values.ndim == 1 and shape[0] in (1, self.shape[0]):
            return values.reshape(-1, *[1] * (len(self.shape) - 1))
        fits = values.ndim != 1 and values.ndim <= len(self.shape)
        padded = (1,) * (len(self.shape) - values.ndim) + shape
        if not fits or any(a not in (1, b) for a, b in zip(padded, self.shape, strict=True)):
            hint = ""
            if shape == self._x_shape:
                hint = "; it has x's shape, but all channels of a position count or none does"
            elif len(shape) == 1 and shape[0] in self.shape[1:]:
                hint = f"; for one value per index of another axis than the first use {name}[None, ...]"
            raise ValueError(
                f"{name} has shape {shape}, expected ({self.shape[0]},) or one that broadcasts to "
                f"{self.shape}, the shape of x {self._x_shape} without its channel axis{hint}"
            )
        return values.reshape(padded)

    def _checked_mask(self, value: object) -> Array:
        expected = "a bool array over the positions of x, True where they count"
        mask = _args._ndarray(value, "mask", expected)
        if mask.dtype != np.bool_:
            bits = ", or activation_mask= for what a forward returned" if mask.dtype == np.uint8 else ""
            raise TypeError(f"mask has dtype {mask.dtype}, expected {expected}; use mask.astype(bool){bits}")
        return self._broadcastable(mask, "mask")

    def _from_lengths(self, value: object, axis: int) -> Array:
        sequence = self._sequence_axis(axis)
        expected = f"an int array of shape ({self._x_shape[0]},), the number of steps of each sample"
        lengths = _args._ndarray(value, "lengths", expected)
        if lengths.dtype.kind not in "iu":
            raise TypeError(f"lengths has dtype {lengths.dtype}, expected {expected}")
        if lengths.shape != (self._x_shape[0],):
            raise ValueError(f"lengths has shape {lengths.shape}, expected {expected}")
        steps = self._x_shape[sequence]
        bad = np.flatnonzero((lengths < 0) | (lengths > steps))
        if bad.size:
            raise ValueError(
                f"lengths is {lengths[bad[0]]} at sample {bad[0]}, expected 0 to {steps}, the length of axis "
                f"{sequence} of x {self._x_shape}"
            )
        place = [1] * len(self.shape)
        place[self._axes.index(sequence)] = steps
        ends = lengths.reshape(-1, *[1] * (len(self.shape) - 1))
        return np.less(np.arange(steps).reshape(place), ends)

    def _sequence_axis(self, axis: int) -> int:
        """The axis along which lengths count, of x."""
        ndim = len(self._x_shape)
        if axis == 0:
            raise ValueError(
                "lengths is given with the channels on axis 0, where the samples are expected; use mask"
            )
        if self._axis is None:
            if ndim != 3:
                raise ValueError(
                    f"lengths_axis is None, expected the axis along which lengths count, as x has shape "
                    f"{self._x_shape}; with 3 axes it follows"
                )
            return 3 - axis
        sequence = _args.check_int(self._axis, "lengths_axis", "an int, the axis along which lengths count")
        if not -ndim <= sequence < ndim:
            raise ValueError(
                f"lengths_axis is {sequence}, expected -{ndim} <= lengths_axis < {ndim} for x of shape "
                f"{self._x_shape}"
            )
        sequence %= ndim
        if sequence in (0, axis):
            what = "samples" if sequence == 0 else "channels"
            raise ValueError(f"lengths_axis is {self._axis}, the axis of the {what}, expected another one")
        return sequence

    def _checked_weights(self, value: object) -> Array:
        expected = "a float or int array over the positions of x, or one weight per sample"
        weights = _args._ndarray(value, "weights", expected)
        if weights.dtype.kind == "b":
            raise TypeError(f"weights has dtype bool, expected {expected}; a bool array is a mask=")
        plain = weights.dtype.kind in "iu" or (weights.dtype.kind == "f" and weights.dtype.itemsize <= 8)
        if not plain and not _args._is_bfloat16(weights.dtype):
            raise TypeError(f"weights has dtype {weights.dtype}, expected {expected}")
        wide = self._broadcastable(weights, "weights").astype(np.float64, copy=False)
        if self.mask is not None:
            wide = np.where(self.mask, wide, 0.0)  # what does not count may have any weight
        if wide.size and not (wide.min() >= 0 and wide.max() < math.inf):  # NaN is the least and the most
            index = tuple(int(i) for i in np.argwhere(~(np.isfinite(wide) & (wide >= 0)))[0])
            raise ValueError(f"weights holds {wide[index]} at {index}, expected finite values >= 0")
        return wide

    def _count(self) -> None:
        values = self.mask if self.weights is None else self.weights
        each = math.prod(self.shape) // values.size if values is not None and values.size else 0
        self.counting = each * (0 if values is None else int(np.count_nonzero(values)))
        self.n = self.counting
        if self.weights is not None:
            self.n = each * float(self.weights.sum())
            if not math.isfinite(self.n):
                raise ValueError(f"weights sum to {self.n}, expected a sum that a float64 holds")
