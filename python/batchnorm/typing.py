"""Types of this package's arguments and results, for annotations of your own.

>>> from batchnorm.typing import ActivationName, RenormOptions
>>> limits: RenormOptions = {"rmax": 3.0, "dmax": 5.0}
>>> sorted(limits)
['dmax', 'rmax']
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ActivationName", "Array", "CallOptions", "ChannelAxis", "DataFormatName", "Examined", "GradientName",
    "Group", "KeepName", "LayerLike", "Mask", "Observe", "OnNonfinite", "RenormOptions", "RunningLike",
    "StatsName", "Vector",
]  # fmt: skip

# A tensor, or one value per channel, of any dtype the function takes.
Array = NDArray[Any]
# Statistics: always float64.
Vector = NDArray[np.float64]
# True where a value counts.
Mask = NDArray[np.bool_]

ActivationName = Literal["relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"]
DataFormatName = Literal[
    "NC", "NCL", "NLC", "NCHW", "NHWC", "NCDHW", "NDHWC", "channels_first", "channels_last"
]
# The axis that holds the channels, or several of them: then each activation has statistics of its own.
ChannelAxis = int | tuple[int, ...]
# The tensor that a forward keeps for backward; None keeps none.
KeepName = Literal["x", "y"] | None
# What NaN or Inf that would enter the running statistics does.
OnNonfinite = Literal["propagate", "raise", "skip"]
# Which statistics a layer's call normalises with.
StatsName = Literal["batch", "running"]
GradientName = Literal["dx", "dgamma", "dbeta", "dresidual"]
# Called with a layer's input and positions before the call; what it returns is called once that succeeded.
Observe = Callable[..., Callable[[], None]]


class RenormOptions(TypedDict, total=False):
    """Batch renormalisation, ``renorm=``; see :func:`batchnorm.batch_norm_train`.

    A layer takes the four numbers. ``mean`` and ``std`` are the functions' reference of their own.
    """

    mean: Array
    std: Array
    decay: float | None
    rmin: float
    rmax: float
    dmax: float


class CallOptions(TypedDict, total=False):
    """Keywords of a layer's call, :class:`batchnorm.BatchNorm`, but for ``return_saved``."""

    training: bool | np.bool_ | None
    stats: StatsName | None
    update: bool | None
    gamma: Array | None
    beta: Array | None
    residual: Array | None
    mask: Mask | None
    lengths: Array | None
    lengths_axis: int | None
    weights: Array | None
    out: Array | None


@runtime_checkable
class Group(Protocol):
    """Processes that hold parts of one batch: an mpi4py communicator, or anything with ``allgather``.

    ``allgather(array)`` sends a float64 array and returns those of all processes, in the order of their
    ranks. Every process of the group must call it, the same number of times.
    """

    def allgather(self, array: Any, /) -> Sequence[Any]: ...


class RunningLike(Protocol):
    """What functions on whole networks use of a layer's running statistics, ``layer.running``."""

    mean: Array | Any
    var: Array | Any
    renorm_mean: Array | Any
    renorm_std: Array | Any
    num_updates: int
    num_skipped: int
    num_values: Vector
    initial_weight: Vector
    missed_updates: NDArray[np.int64]

    def untouched(self) -> Mask: ...
    def untouched_names(self) -> tuple[str, ...]: ...
    def replace(
        self, mean: Array, var: Array, std: Array, num_values: Array, num_updates: int, known: Mask
    ) -> None: ...


class Examined(Protocol):
    """What a diagnosis uses of a layer, ours or another library's."""

    name: str | None
    settings: Any
    dtype: np.dtype[Any]

    @property
    def running(self) -> RunningLike: ...
    @property
    def frozen(self) -> bool: ...


class LayerLike(Examined, Protocol):
    """What functions on whole networks use of a layer: :class:`batchnorm.BatchNorm` has it all."""

    gamma: Array | Any
    beta: Array | Any

    def snapshot(self) -> Any: ...
    def rollback(self, snapshot: Any, /) -> Any: ...
    def using(
        self, stats: StatsName, observe: Observe | None = None, name: str | None = None
    ) -> AbstractContextManager[Any]: ...
    def no_update(self) -> AbstractContextManager[Any]: ...
    def freeze(self) -> Any: ...
