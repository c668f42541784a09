"""How a tensor's values lie in memory: any order of axes, with steps, gaps and reversed axes, anywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# Axes from the slowest to the fastest in memory, of axes (samples, channels, rest).
ORDERS = {
    "C": lambda axes: axes,
    "F": lambda axes: axes[::-1],
    "channels last": lambda axes: [axes[0], *axes[2:], axes[1]],
    "batch last": lambda axes: [*axes[1:], axes[0]],
    "channels first": lambda axes: [axes[1], axes[0], *axes[2:]],
    "rest first": lambda axes: [*axes[2:], *axes[:2]],
}
# What follows the order: every second index of an axis, the axis backwards, or a window in a longer axis.
CHANGES = {
    "step": (lambda n: 2 * n, slice(None, None, 2)),
    "reverse": (lambda n: n, slice(None, None, -1)),
    "crop": (lambda n: n + 3, slice(1, -2)),
}


class Placed(NamedTuple):
    view: Array
    base: Array

    def outside_is_untouched(self) -> bool:
        """Whether all that the view leaves out of its base is as `place` made it. Overwrites the view."""
        fill = _fill(self.base.dtype)
        self.view[...] = fill
        return bool(np.isnan(self.base).all() if fill != fill else (self.base == fill).all())


def _fill(dtype: Any) -> Any:
    """What stands where nothing may look: NaN, or the largest integer."""
    return True if dtype.kind == "b" else np.iinfo(dtype).max if dtype.kind in "iu" else np.nan


def place(values: Array, layout: str) -> Placed:
    """`values` in a layout such as "C", "F, reverse 0" or "channels last, crop 1, step 2"."""
    order, *changes = layout.split(", ")
    axes = ORDERS[order](list(range(values.ndim)))
    sizes, index = list(values.shape), [slice(None)] * values.ndim
    for change in changes:
        name, axis = change.split()
        a = int(axis) % values.ndim
        size, index[a] = CHANGES[name]
        sizes[a] = size(sizes[a])
    base = np.full([sizes[a] for a in axes], _fill(values.dtype), values.dtype)
    view = base.transpose(np.argsort(axes))[tuple(index)]
    assert view.shape == values.shape and np.shares_memory(view, base) | (view.size == 0)
    view[...] = values
    return Placed(view, base)


def at_offset(values: Array, offset: int) -> Array:
    """A copy of `values`, in their memory order and without gaps, `offset` bytes past a multiple of 64."""
    order = np.argsort([-abs(s) for s in values.strides], kind="stable")
    raw = np.zeros(values.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    shape = [values.shape[a] for a in order]
    copy = np.ndarray(shape, values.dtype, raw, start).transpose(np.argsort(order))
    copy[...] = values
    return copy
