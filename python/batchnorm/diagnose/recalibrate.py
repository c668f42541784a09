"""Population statistics: the running statistics replaced by those of much data, exactly.

Accumulators (`Moments`) take the place of the moving average. The result is that of one giant batch, however
the data was cut. A layer by itself is given its inputs. In a network, its calls collect what passes through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from ..distributed import telling
from ..moments import Moments
from ..settings import flag
from ..typing import Array, Examined, Group, LayerLike, Mask, StatsName, Vector
from .network import Collector, Layers, check_channels, iterable, named, run, watching

__all__ = ["recalibrate"]


class New(NamedTuple):
    """New running statistics, checked: the arguments of ``layer.running.replace``."""

    mean: Array
    var: Array
    std: Array
    num_values: Vector
    num_updates: int
    known: Mask


def collected(layer: LayerLike, data: Iterable[Array] | Moments, group: Group | None = None) -> Collector:
    """What a layer's own ``recalibrate`` is given: batches or a Moments, of all processes of a group."""
    collector = Collector(layer)
    with telling(group):
        if isinstance(data, Moments):
            collector.moments.merge(data)
            collector.batches = 1
        else:
            for x in iterable(data, "arrays, such as [x], or a Moments"):
                collector(x)()
    return collector.allreduce(group)


def population(layer: Examined, collector: Collector, name: str | None = None) -> New:
    """The statistics of what was collected as the layer will have them, or the error that they cannot be.

    Channels with fewer than 2 values keep what they had.
    """
    name, total = name or layer.name, collector.moments
    who, unchanged = f"{name}: " if name else "", "the statistics are unchanged"
    if total.channels is None:
        raise ValueError(f"{who}batches hold no values, expected at least one batch; {unchanged}")
    check_channels(layer, total, f"{who}the Moments has")
    counts, known = total.counts, total.counts >= 2
    if not known.any():
        most = f"{counts.max():g} values per channel, from which no variance can be had"
        raise ValueError(f"{who}batches hold {most}, expected at least 2; {unchanged}")
    with np.errstate(all="ignore"):
        mean = total.mean.astype(layer.dtype)
        var = total.variance(layer.settings.running_ddof).astype(layer.dtype)
        std = np.sqrt(total.var + layer.settings.eps)
    for word, values in (("mean", mean), ("variance", var)):
        for bad in map(tuple, np.argwhere(known & ~np.isfinite(values))[:1]):
            at = ", ".join(map(str, bad))
            got = f"{word} is {values[bad]} at channel {at}, expected finite {layer.dtype} values"
            raise ValueError(f"{who}{got}: a batch holds NaN, Inf or huge values; {unchanged}")
    return New(mean, var, std, counts, collector.batches, known)


@contextlib.contextmanager
def recalibrating(layers: Layers, group: Group | None = None) -> Iterator[None]:
    """Inside, calls of the layers collect; at the end all of them are updated, or, on an error, none."""
    with contextlib.ExitStack() as watch:
        with telling(group):
            layers = named(layers)
            collectors = watch.enter_context(watching(layers))
            yield
        new = [population(each, collectors[name].allreduce(group), name) for name, each in layers.items()]
    for layer, statistics in zip(layers.values(), new, strict=True):
        layer.running.replace(*statistics)


@_core.entrance
def recalibrate(
    layers: Layers, forward: Callable[[Any], Any], batches: Iterable[Any], *, one_by_one: bool = False,
    group: Group | None = None,
) -> None:  # fmt: skip
    """Replace the running statistics of a network's layers by those of the data.

    Parameters
    ----------
    layers : iterable of BatchNorm, or mapping of names to them
        The layers to recalibrate, with ``one_by_one`` in the order in which data reaches them.
    forward : callable
        ``forward(batch)`` runs the network. What it returns is ignored.
    batches : iterable
        What `forward` takes, of any sizes. With ``one_by_one`` it is gone through once per layer, so it must
        be a list or another object that starts anew, not a generator.
    one_by_one : bool, default False
        False: one pass. Every layer normalises with each batch's own statistics meanwhile, as in training.
        True: a pass per layer, in which the layers before it already use their new statistics. Each one gets
        exactly the statistics that it will meet in eval mode.
    group : Group, optional
        Other processes that run the same network on other batches: the statistics are those of all batches,
        the same bits on every process and however the batches are shared out. Every process calls this, with
        any number of batches. The layers' own groups play no part.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Arguments of the wrong kind; no values, NaN or Inf; layers that no data reached; or whatever `forward`
        raises. No layer is changed then.

    Notes
    -----
    The statistics are those of one giant batch, every value weighing the same, by :class:`Moments`. Positions
    that a call leaves out (``mask``, ``lengths``) are left out here, and ``weights`` weigh. A channel with
    fewer than 2 values keeps the statistics that it had. Mode and freeze of the layers do not matter and stay
    as they are. ``BatchNorm.recalibrate`` does it for one layer that is given its inputs.

    Examples
    --------
    >>> import numpy as np
    >>> from batchnorm import BatchNorm, recalibrate
    >>> first, second = BatchNorm(3), BatchNorm(3)
    >>> batches = [np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32) for i in range(4)]
    >>> recalibrate([first, second], lambda x: second(np.abs(first(x))), batches, one_by_one=True)
    >>> second.running.num_values.tolist(), second.running_mean.shape
    ([32.0, 32.0, 32.0], (3,))
    """
    with telling(group):
        chosen = named(layers)
        by_one = flag("one_by_one", one_by_one)
        if by_one and isinstance(batches, Iterator):
            why = "only once, expected a list or the like, as one_by_one takes a pass for each layer"
            raise TypeError(f"batches is an iterator, which can be gone through {why}")
        before = {name: layer.snapshot() for name, layer in chosen.items()} if by_one else {}
    if not by_one:
        with recalibrating(chosen, group):
            run(forward, batches)
        return
    done: set[int] = set()  # of statistics, which layers may share
    try:
        for name, layer in chosen.items():
            if id(layer.running) not in done:
                collector = Collector(layer)
                with telling(group), contextlib.ExitStack() as stack:
                    for own, each in chosen.items():
                        stats: StatsName = "running" if id(each.running) in done else "batch"
                        observe = collector if each.running is layer.running else None
                        stack.enter_context(each.using(stats, observe, own))
                    run(forward, batches)
                layer.running.replace(*population(layer, collector.allreduce(group), name))
                done.add(id(layer.running))
    except BaseException:
        for name, layer in chosen.items():
            layer.rollback(before[name])
        raise
