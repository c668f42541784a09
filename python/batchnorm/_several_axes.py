"""Several channel axes: ``axis=(1, 2, 3)`` gives every activation statistics, scale and shift of its own.

The channel axes are taken together as one, and the function is called again with that one axis. Where memory
allows it that is a view; arrays that are only read are copied where it does not. Per-channel arrays have the
shape of the channel axes, in increasing order. Called by the functions of ``_functional`` for a tuple.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _args

Array = NDArray[Any]

# What the arguments of the functions are, by name.
_TENSORS = ("x", "dy", "ddx", "residual")
_OUTPUTS = ("out", "out_residual")
_VECTORS = ("mean", "var", "inv_std", "gamma", "beta", "ddgamma", "ddbeta", "shift")
_WRITTEN = ("running_mean", "running_var")


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """`function` of its `arguments` by name, among them ``axis``, a tuple; results shaped back."""
    known = inspect.signature(function).parameters
    options = {name: value for name, value in arguments.items() if name in known and name != "unknown"}
    if options.pop("data_format", None) is not None:
        _args.resolve_axis_argument(
            options["axis"], arguments["data_format"]
        )  # raises: one of them is enough
    if options.get("out_format") is not None:
        raise ValueError(
            f"out_format is {options['out_format']!r} and axis is {options['axis']}, several axes, which "
            f"have no other format; drop out_format="
        )
    merged = _Merged(options["x"], options["axis"])
    keepdims = options.pop("keepdims", False)
    if options.get("lengths_axis") is not None:
        options["lengths_axis"] = merged.axis_of(options["lengths_axis"])
    x = options["x"]
    for name, value in options.items():
        if value is None:
            continue
        if name in _TENSORS:
            options[name] = merged.read(value, name)
        elif name in _OUTPUTS:
            options[name] = merged.written(value, name)
        elif name in _VECTORS or name in _WRITTEN:
            options[name] = merged.vector(value, name, written=name in _WRITTEN)
    options["axis"] = merged.axis
    result = function(**options)
    given = {id(options.get(name)): arguments[name] for name in _OUTPUTS if options.get(name) is not None}

    def back(value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype == np.uint8 != x.dtype:
            return value  # None, or an activation_mask
        if id(value) in given:
            return given[id(value)]
        return merged.vector_back(value, keepdims) if value.ndim == 1 else merged.tensor_back(value, x)

    if not isinstance(result, tuple):
        return back(result)
    shaped: Any = tuple.__new__(type(result), [back(value) for value in result])
    for name, value in getattr(result, "__dict__", {}).items():
        setattr(shaped, name, back(value))
    return shaped


class _Merged:
    """How x's channel axes become one axis: moved together behind each other, then taken as one."""

    def __init__(self, x: Any, axis: tuple[Any, ...]) -> None:
        x = _args._tensor(x, "x", integers=True)
        self.axes = _checked_axes(axis, x)
        self.shape = tuple(x.shape[a] for a in self.axes)
        self.x_shape = x.shape
        self.axis = self.axes[0]
        others = [a for a in range(x.ndim) if a not in self.axes]
        self.order = (*others[: self.axis], *self.axes, *others[self.axis :])
        self.channels = int(np.prod(self.shape))
        if self.channels == 0:
            raise ValueError(f"x has shape {x.shape} with 0 channels on axes {self.axes}, expected some")

    def axis_of(self, axis: Any) -> int:
        """The number that one of the other axes of x has afterwards."""
        number = _args.check_int(axis, "lengths_axis", "an int, an axis of x")
        rank = len(self.x_shape)
        if not -rank <= number < rank or number % rank in self.axes:
            raise ValueError(
                f"lengths_axis is {number}, expected an axis of x {self.x_shape} other than its channel axes "
                f"{self.axes}"
            )
        place = self.order.index(number % rank)
        return place if place < self.axis else place - len(self.axes) + 1

    def _taken_together(self, a: Array) -> Array:
        moved = a.transpose(self.order)
        shape = moved.shape
        return moved.reshape(*shape[: self.axis], self.channels, *shape[self.axis + len(self.axes) :])

    def read(self, a: Any, name: str) -> Array:
        a = _args._tensor(a, name, integers=name == "x")
        if a.shape != self.x_shape:
            raise ValueError(f"{name} has shape {a.shape}, expected {self.x_shape} as x has")
        return self._taken_together(a)

    def written(self, a: Any, name: str) -> Array:
        view = self.read(a, name)
        if view.size and not np.may_share_memory(view, a):
            raise ValueError(
                f"{name} has strides {a.strides} for shape {a.shape}, in which the channel axes {self.axes} "
                f"do not lie side by side in memory; leave {name}= away and assign, {name}[...] = result"
            )
        return view

    def vector(self, v: Any, name: str, *, written: bool) -> Array:
        expected = f"a float32 or float64 array of shape {self.shape}, the channel axes {self.axes} of x"
        vector = _args._ndarray(v, name, expected)
        if vector.shape != self.shape:
            raise ValueError(f"{name} has shape {vector.shape}, expected {expected}")
        flat = vector.reshape(-1)
        if written and not np.may_share_memory(flat, vector):
            raise ValueError(
                f"{name} has strides {vector.strides} for shape {vector.shape}, expected a contiguous array, "
                f"updated in place"
            )
        return flat

    def vector_back(self, v: Array, keepdims: bool) -> Array:
        if not keepdims:
            return v.reshape(self.shape)
        return v.reshape([n if a in self.axes else 1 for a, n in enumerate(self.x_shape)])

    def tensor_back(self, y: Array, x: Array) -> Array:
        moved = y.reshape([self.x_shape[a] for a in self.order]).transpose(np.argsort(self.order))
        if moved.strides == x.strides or moved.strides == np.empty_like(x, dtype=y.dtype).strides:
            return moved
        result = np.empty_like(x, dtype=y.dtype)  # in the memory order of x
        np.copyto(result, moved)
        return result


def _checked_axes(axis: tuple[Any, ...], x: Array) -> tuple[int, ...]:
    """The channel axes, counted from 0, in increasing order."""
    expected = f"one or more different axes of x {x.shape}"
    if not axis:
        raise ValueError(f"axis is (), expected {expected}")
    axes = []
    for a in axis:
        number = _args.check_int(a, "axis", expected)
        if not -x.ndim <= number < x.ndim:
            raise ValueError(
                f"axis is {axis}, expected -{x.ndim} <= axis < {x.ndim} for x of shape {x.shape}"
            )
        axes.append(number % x.ndim)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis is {axis}, which names an axis twice, expected {expected}")
    if len(axes) == x.ndim:
        raise ValueError(f"axis is {axis}, all axes of x {x.shape}, expected at least one other, the batch")
    return tuple(sorted(axes))
