"""Many layers at once: how they are given, what they are called in messages, and what passes through them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import _core
from ..moments import Moments, reduced_axes
from ..settings import kind
from ..typing import Array, Examined, Group, LayerLike

__all__ = ["freeze", "no_update"]

Layers = Iterable[LayerLike] | Mapping[str, LayerLike]


def named(layers: Layers) -> dict[str, LayerLike]:
    """The layers by the names that messages give them: a mapping's keys, or ``layer.name``, or layers[i]."""
    expected = "expected an iterable of BatchNorm layers, or a mapping of names to them"
    if _is_layer(layers) or not isinstance(layers, Iterable):
        hint = "; use [layer]" if _is_layer(layers) else "; layers come before forward and batches"
        raise TypeError(f"layers is {kind(layers)}, {expected}{hint}")
    found: dict[str, LayerLike] = {}
    pairs: Any = layers.items() if isinstance(layers, Mapping) else ((None, layer) for layer in layers)
    for i, (key, layer) in enumerate(pairs):
        name = getattr(layer, "name", None) if key is None else key
        if not _is_layer(layer):
            raise TypeError(f"layers holds {kind(layer)}, {expected}")
        if any(layer is other for other in found.values()):
            raise ValueError(f"layers holds a layer twice, again at {i}, {expected}, each once")
        found[f"layers[{i}]" if name is None or str(name) in found else str(name)] = layer
    if not found:
        raise ValueError(f"layers is empty, {expected}")
    return found


def _is_layer(value: object) -> bool:
    return callable(getattr(type(value), "using", None))


def run(forward: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Call `forward` with each batch."""
    if not callable(forward):
        raise TypeError(f"forward is {kind(forward)}, expected a function of one batch")
    for batch in iterable(batches, "batches, such as [x]"):
        forward(batch)


def iterable(batches: Any, what: str) -> Iterable[Any]:
    """Batches, of which a single array is none."""
    if isinstance(batches, np.ndarray) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is {kind(batches)}, expected an iterable of {what}")
    return batches


@contextlib.contextmanager
def watching(layers: Mapping[str, LayerLike]) -> Iterator[dict[str, Collector]]:
    """Inside, calls of the layers normalise by the batch, update nothing, and are collected.

    Layers that share their statistics have one collector.
    """
    shared = {id(layer.running): Collector(layer) for layer in layers.values()}
    collectors = {name: shared[id(layer.running)] for name, layer in layers.items()}
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.using("batch", collectors[name], name))
        yield collectors


@contextlib.contextmanager
@_core.entrance
def no_update(layers: Layers) -> Iterator[None]:
    """Inside this context no call of the layers updates running statistics, in training either.

    For forwards that are repeated (gradient checkpointing) or only looked at.

    Parameters
    ----------
    layers : iterable of BatchNorm, or mapping of names to them
        The batch normalisation layers of a network.

    Raises
    ------
    TypeError, ValueError
        `layers` holds something else, nothing, or a layer twice.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm, no_update
    >>> first, second = BatchNorm(3), BatchNorm(3)
    >>> with no_update([first, second]):
    ...     y = second(first(np.ones((4, 3), np.float32)))
    >>> first.running.num_updates
    0
    """
    with contextlib.ExitStack() as stack:
        for layer in named(layers).values():
            stack.enter_context(layer.no_update())
        yield


@_core.entrance
def freeze(layers: Layers) -> None:
    """Let the layers use their running statistics and update nothing, in training mode too.

    ``layer.unfreeze()`` ends that for one layer.

    Parameters
    ----------
    layers : iterable of BatchNorm, or mapping of names to them
        The batch normalisation layers of a network.

    Raises
    ------
    TypeError, ValueError
        As :func:`no_update`. No layer is frozen then.

    Examples
    --------
    >>> from batchnorm import BatchNorm, freeze
    >>> layers = {"conv1.bn": BatchNorm(3), "conv2.bn": BatchNorm(3)}
    >>> freeze(layers)
    >>> layers["conv2.bn"].frozen
    True
    """
    for layer in named(layers).values():
        layer.freeze()


class Collector:
    """What has passed through a layer: the observer of ``layer.using``."""

    def __init__(self, layer: Examined) -> None:
        self._where = layer.settings.where
        self._layer = layer
        self.moments = Moments(**self._where)
        self.counts: Any = 0  # values per channel, whatever they weigh
        self.batches = self.samples = 0  # that had values
        self.shape: tuple[int, ...] = ()  # of the first of them

    def __call__(self, x: Array, *, weights: Array | None = None, **positions: Any) -> Callable[[], None]:
        """Measure one input; what is returned adds it."""
        values = Moments(**self._where).update(x, **positions)
        part = values if weights is None else Moments(**self._where).update(x, weights=weights, **positions)
        if part.channels is None:
            return lambda: None
        axis = f" on axis {self._layer.settings.channel_axis}"
        check_channels(self._layer, part, f"x has shape {x.shape} with", axis, self.moments)

        def add() -> None:
            self.moments.merge(part)
            self.counts = self.counts + values.counts
            self.shape = self.shape or x.shape
            self.batches += 1
            others = reduced_axes(x.ndim, self._layer.settings.channel_axis)
            self.samples += x.shape[others[0]]

        return add

    def allreduce(self, group: Group | None) -> Collector:
        """What has passed through the layer in all processes of a group."""
        if group is not None:
            self.moments = self.moments.allreduce(group)
            self.batches = int(np.sum(_core.gather(group, np.array([float(self.batches)]))))
        return self


def check_channels(
    layer: Examined, part: Moments, what: str, where: str = "", before: Moments | None = None
) -> None:
    """Raise if these are not moments of the layer's channels, or, while it knows none, of those before."""
    own, shape = layer.running.mean, part.counts.shape
    if own is None and before is not None and before.channels is not None:
        own = before.counts
    if own is not None and own.shape != shape:
        got, expected = (" x ".join(map(str, each)) for each in (shape, own.shape))
        whose = f"expected {expected}, the num_features of this layer"
        raise ValueError(f"{what} {got} channels{where}, {whose}")
