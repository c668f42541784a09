"""Population statistics: the running statistics replaced by those of much data, exactly.

Accumulators (`Moments`) take the place of the moving average: the result is that of one giant batch, however
the data was cut. A layer by itself is given its inputs; in a network, its calls collect what passes through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _args
from ._layer_base import LayerBase, checked_vector
from ._moments import Moments

if TYPE_CHECKING:
    from ._layer import BatchNorm

__all__ = ["recalibrate"]

Array = NDArray[Any]


class Collector:
    """What has passed through one layer."""

    def __init__(self) -> None:
        self.total: Moments | None = None
        self.batches = 0

    def measure(self, x: Array, where: dict[str, Any], positions: dict[str, Any] | None = None) -> Moments:
        """The sums of one batch, not yet added."""
        positions = positions or {}
        if "weights" in positions:
            raise ValueError(
                "weights is given inside recalibrating(), where every value weighs the same: drop it"
            )
        return Moments(**where).update(x, **positions)

    def add(self, part: Moments) -> None:
        """Add what `measure` returned."""
        if part.count:
            self.total = part if self.total is None else self.total.merge(part)
            self.batches += 1


def population(layer: LayerBase, collector: Collector) -> tuple[Array, Array]:
    """Mean and variance as the layer's running arrays will have them, or the error that they cannot be."""
    total = collector.total
    if total is None:
        raise ValueError("batches hold no values, expected at least one batch; the statistics are unchanged")
    if total.count <= layer._running_ddof:
        raise ValueError(
            f"batches hold {total.count} value per channel, from which no variance can be had, expected at "
            f"least 2; the statistics are unchanged"
        )
    count, dtype = layer._num_features, layer._dtype
    try:
        mean = checked_vector("running_mean", total.mean, count, dtype, cast=True)
        var = checked_vector("running_var", total.variance(layer._running_ddof), count, dtype, cast=True)
    except ValueError as error:
        raise ValueError(
            f"the batches' statistics cannot be used: {error}; a batch holds NaN, Inf or huge values. The "
            f"statistics are unchanged"
        ) from None
    return mean, var


def commit(layer: LayerBase, collector: Collector, mean: Array, var: Array) -> None:
    """Replace the running statistics; cannot fail."""
    np.copyto(layer._running_mean, mean)
    np.copyto(layer._running_var, var)
    assert collector.total is not None
    if layer._renorm_mean is not None:  # what batch renormalisation goes by is replaced with them
        np.copyto(layer._renorm_mean, collector.total.mean, casting="same_kind")
        std = np.sqrt(collector.total.var + layer._eps)
        np.copyto(layer._renorm_std, std, casting="same_kind")
    layer._counters.know(collector.batches, collector.total.count * len(mean))


@contextlib.contextmanager
def recalibrating(layers: Sequence[LayerBase]) -> Iterator[None]:
    """Inside, calls of the layers collect; at the end all of them are updated, or, on an error, none."""
    for layer in layers:
        if layer._collector is not None:
            raise RuntimeError("recalibrating() inside recalibrating() of the same layer: drop one of them")
    collectors = [Collector() for _ in layers]
    for layer, collector in zip(layers, collectors, strict=True):
        layer._collector = collector
        layer._refresh()
    try:
        yield
        new = [population(layer, c) for layer, c in zip(layers, collectors, strict=True)]
    finally:
        for layer in layers:
            layer._collector = None
            layer._refresh()
    for layer, collector, (mean, var) in zip(layers, collectors, new, strict=True):
        commit(layer, collector, mean, var)


def recalibrate(
    forward: Callable[[Any], Any],
    batches: Iterable[Any],
    layers: Iterable[BatchNorm],
    *,
    one_by_one: bool = False,
) -> None:
    """Replace the running statistics of a network's layers by those of the data.

    Parameters
    ----------
    forward : callable
        ``forward(batch)`` runs the network; what it returns is ignored.
    batches : iterable
        What `forward` takes, of any sizes. With ``one_by_one`` it is gone through once per layer, so it must
        be a list or another object that starts anew, not a generator.
    layers : iterable of BatchNorm
        The layers to recalibrate, with ``one_by_one`` in the order in which data reaches them.
    one_by_one : bool, default False
        False: one pass; every layer normalises with each batch's own statistics meanwhile, as in training.
        True: a pass per layer, in which the layers before it already use their new statistics, so each one
        gets exactly the statistics it will meet in eval mode.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Arguments of the wrong kind, no values, NaN or Inf, layers that no data reached; or whatever
        `forward` raises. No layer is changed then.

    Notes
    -----
    The statistics are those of one giant batch, every value weighing the same, by :class:`Moments`;
    `num_updates` and `num_samples` then count what is in them. ``BatchNorm.recalibrate`` does it for one
    layer that is given its inputs.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm, recalibrate
    >>> first, second = BatchNorm(3), BatchNorm(3)
    >>> batches = [np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32) for i in range(4)]
    >>> recalibrate(lambda x: second(np.abs(first(x))), batches, [first, second], one_by_one=True)
    >>> second.num_samples, second.running_mean.shape
    (32, (3,))
    """
    if not callable(forward):
        raise TypeError(f"forward is {_args._kind(forward)}, expected a function of one batch")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is {_args._kind(batches)}, expected an iterable of batches")
    _args.check_flag(one_by_one, "one_by_one")
    if isinstance(layers, LayerBase):
        raise TypeError("layers is a BatchNorm, expected an iterable of layers; use [layer]")
    chosen = list(layers)
    if not chosen:
        raise ValueError("layers holds no layer, expected those to recalibrate")
    if len({id(layer) for layer in chosen}) < len(chosen):
        raise ValueError("layers holds a layer twice, expected different ones")
    for layer in chosen:
        if not isinstance(layer, LayerBase):
            raise TypeError(f"layers holds {_args._kind(layer)}, expected BatchNorm layers")
    if not one_by_one:
        with recalibrating(chosen):
            for batch in batches:
                forward(batch)
        return
    if iter(batches) is batches:
        raise TypeError(
            "batches is an iterator, which can be gone through only once, expected a list or the like, as "
            "one_by_one takes a pass for each layer"
        )
    _one_by_one(forward, batches, chosen)


def _one_by_one(forward: Callable[[Any], Any], batches: Iterable[Any], layers: list[BatchNorm]) -> None:
    modes = [(layer._training, layer._frozen) for layer in layers]
    before = [layer.snapshot() for layer in layers]
    try:
        with contextlib.ExitStack() as stack:
            for layer in layers:  # those behind the one in turn normalise by the batch
                stack.enter_context(layer.no_update())
                layer.unfreeze().train()
            for layer in layers:
                with recalibrating([layer]):
                    for batch in batches:
                        forward(batch)
                layer.eval()
    except BaseException:
        for layer, snapshot in zip(layers, before, strict=True):
            layer.rollback(snapshot)
        raise
    finally:
        for layer, (training, frozen) in zip(layers, modes, strict=True):
            layer._training, layer._frozen = training, frozen
            layer._refresh()
