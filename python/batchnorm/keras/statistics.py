"""Why a Keras model is good in training and bad in testing, and its moving statistics made those of data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import numpy as np

from ..diagnose.findings import Diagnosis, Finding, of_network, settle
from ..diagnose.network import Collector
from ..diagnose.recalibrate import population
from ..progress import bar
from ..settings import flag, kind
from .model import STATISTICS, Layer, array_of, layers_of, passed, restored, watched

__all__ = ["diagnose", "recalibrate"]


def diagnose(model: Any, batches: Iterable[Any], *, forward: Callable[[Any], Any] | None = None) -> Diagnosis:
    """Why is a model good in training and bad in testing? Look at its batch norms while data runs through.

    Parameters
    ----------
    model : keras.Model
        Any built model with ``keras.layers.BatchNormalization``, on any backend. It is not changed.
    batches : iterable
        Best many and large ones of the data that tests badly. Of a tuple or list the model gets the first.
    forward : callable, optional
        ``forward(batch)`` runs the model, where it wants to be called in another way; eagerly.

    Returns
    -------
    batchnorm.Diagnosis
        To ``print``, as a ``table()``, to ``plot()``, ``to_json()``, or to ask for its ``codes``. Each
        finding names its layer by its path.

    Raises
    ------
    TypeError, ValueError
        No model, no batch norm in it, one that is not built, no batches; or whatever the model raises.
        Nothing is changed then either.

    Notes
    -----
    The model runs with ``training=False``, but batch norms normalise with each batch's own statistics, so
    that one layer with wrong statistics does not make those behind it look wrong. Keras does not count
    updates. What the initial values still weigh is worked out from ``model.optimizer.iterations`` and
    ``momentum``, and believed if the batches agree.

    Examples
    --------
    >>> import numpy as np, keras, batchnorm.keras
    >>> layers = [keras.Input((3,)), keras.layers.BatchNormalization(name="bn")]
    >>> model = keras.Sequential(layers, name="net")
    >>> found = batchnorm.keras.diagnose(model, [np.random.default_rng(0).normal(size=(64, 3))])
    >>> [(finding.layer, finding.code) for finding in found]
    [('net/bn', 'never_updated')]
    """
    chosen = layers_of(model)
    layers = {name: Layer(name, layer, model) for name, layer in chosen.items()}
    collectors = {name: Collector(layer) for name, layer in layers.items()}
    with watched(chosen, lambda name: True, collectors):
        deque(passed(model, batches, forward), 0)
    for name, layer in layers.items():
        settle(layer, collectors[name])
    return of_network(layers, collectors, _frozen)


def _frozen(layer: Layer) -> list[Finding]:
    text = "its statistics are frozen, trainable=False in a model that trains: training does not change them"
    return [Finding("frozen", text, "If that is not meant, set trainable to True")] if layer.frozen else []


def recalibrate(
    model: Any, batches: Iterable[Any], *, forward: Callable[[Any], Any] | None = None,
    one_by_one: bool = True, progress: bool | None = None,
) -> None:  # fmt: skip
    """Replace the moving statistics of all batch norms of a model by those of data.

    Parameters
    ----------
    model : keras.Model
        As for :func:`batchnorm.keras.diagnose`. Its ``moving_mean`` and ``moving_variance`` are assigned.
    batches : iterable
        As there, of any sizes; no labels are needed. With ``one_by_one`` it is gone through once per layer,
        so it must be a list or the like, not a generator.
    forward : callable, optional
        As there.
    one_by_one : bool, default True
        True: a pass per layer, in the order in which the model calls them, in which those before it already
        use their new statistics. Each layer that is called once gets exactly the statistics that it will meet
        in inference: those of one giant batch. False: one pass, in which each normalises with each batch's
        own statistics.
    progress : bool, optional
        Show a progress bar on stderr; needs the package rich. None: on a terminal, if rich is there.

    Raises
    ------
    TypeError, ValueError
        As ``diagnose``; also a layer that no batch reached, NaN or Inf in what reaches one. Nothing is
        changed then.

    Notes
    -----
    The variance is the population's, as in Keras. Positions that a mask leaves out do not count. A layer that
    is called several times has the statistics of all its calls, in which it normalises by the batch; so
    itself is not exact, those behind it are. ``diagnose``, where all layers normalise by the batch, may call
    either ``mismatched``.

    Examples
    --------
    >>> import numpy as np, keras, batchnorm.keras
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    >>> batches = [np.random.default_rng(i).normal(size=(64, 3)) for i in range(3)]
    >>> batchnorm.keras.recalibrate(model, batches)
    >>> batchnorm.keras.diagnose(model, batches).codes
    ('fine',)
    """
    exact = flag("one_by_one", one_by_one)
    if exact and isinstance(batches, Iterator):
        why = "gone through only once, expected a list; or pass one_by_one=False for one pass"
        raise TypeError(f"batches is {kind(batches)}, which can be {why}")
    chosen = layers_of(model)
    layers = {name: Layer(name, layer, model) for name, layer in chosen.items()}
    passes = [list(chosen)]
    if exact and len(chosen) > 1:
        passes = [[name] for name in _in_order(model, chosen, batches, forward)]
    new: dict[str, tuple[Any, Any]] = {}
    total = len(passes) * len(batches) if isinstance(batches, Sized) else None
    with restored(chosen), bar(progress, "recalibrate", total) as advance:
        for names in passes:
            collectors = {name: Collector(layers[name]) for name in names}
            with watched(chosen, lambda name: name not in new, collectors):
                for _ in passed(model, batches, forward):
                    advance(1)
            for name in names:
                if not collectors[name].batches:
                    got = f"{name}: no batch reached this layer, the statistics are unchanged"
                    raise ValueError(f"{got}; pass forward=, a function that calls it")
                found = population(layers[name], collectors[name], name)
                new[name] = found.mean, found.var
                for each, value in zip(STATISTICS, new[name], strict=True):
                    variable = getattr(chosen[name], each)
                    variable.assign(value)
                    if not np.isfinite(array_of(variable)).all():
                        got = f"{name}: {each} does not fit {variable.dtype}, the statistics are unchanged"
                        raise ValueError(f"{got}; keep them in float32, a layer with dtype='mixed_float16'")
    for name, values in new.items():
        for each, value in zip(STATISTICS, values, strict=True):
            getattr(chosen[name], each).assign(value)


def _in_order(model: Any, chosen: Any, batches: Any, forward: Any) -> list[str]:
    """The layers in the order in which batches reach them, from the first until all are; then the others."""
    order: list[str] = []
    reached: dict[str, None] = {}

    def note(name: str) -> bool:
        reached[name] = None
        return True

    with watched(chosen, note, {}):
        for _ in passed(model, batches, forward):
            at = 0
            for name in reached:  # a new one goes behind those that this batch has reached before it
                if name not in order:
                    order.insert(at, name)
                at = order.index(name) + 1
            reached.clear()
            if len(order) == len(chosen):
                break
    return list(dict.fromkeys([*order, *chosen]))
