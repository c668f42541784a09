"""A Keras model as a diagnosis and a recalibration see it: its batch norms, run on batches so that afterwards
everything is as it was.

While a batch runs, each layer's ``call`` is watched. To normalise by the batch, a layer's moving statistics
are those of the batch for the time of that call. So no call is replaced by another computation, on any
backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import methodcaller
from typing import Any

import keras
import numpy as np

from ..diagnose.findings import Words
from ..diagnose.network import Collector
from ..moments import Moments
from ..running import RunningStatistics
from ..settings import Settings, kind
from ..typing import Array

__all__ = ["Layer", "array_of", "every_layer", "layers_of", "passed", "restored", "watched"]

STATISTICS = ("moving_mean", "moving_variance")


def every_layer(model: Any) -> list[Any]:
    """All layers of a model, those inside others as well, each once."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model is {kind(model)}, expected a keras.Model")
    found = {id(layer): layer for layer in methodcaller("_flatten_layers")(model)}
    return list(found.values())


def layers_of(model: Any) -> dict[str, Any]:
    """The batch norms of a model by their path, in its order."""
    found: dict[str, Any] = {}
    for layer in every_layer(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            name = layer.path or layer.name
            if not layer.built:
                raise ValueError(f"{name} is not built and does not know its channels; call the model first")
            found[f"{name}:{len(found)}" if name in found else name] = layer
    if not found:
        expected = "expected keras.layers.BatchNormalization among its layers"
        raise ValueError(f"model, {kind(model)}, has no batch norm; {expected}")
    return found


def array_of(tensor: Any) -> Array:
    """A tensor of the backend as an array, which may be its own memory; of bfloat16 as float32."""
    value = getattr(tensor, "value", tensor)
    if keras.backend.backend() == "torch" and hasattr(value, "detach"):  # Keras' own way makes NumPy 2 warn
        narrow = keras.backend.standardize_dtype(value.dtype) == "bfloat16"
        array: Array = (value.float() if narrow else value).numpy(force=True)
    else:
        array = np.asarray(keras.ops.convert_to_numpy(value))
    return array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float32)


class Layer:
    """What ``batchnorm.diagnose`` wants to know of a layer, read from a Keras layer; it changes nothing."""

    words = Words(
        recalibrate="batchnorm.keras.recalibrate(model, batches)",
        average="momentum={old:g}",
        longer="use momentum={old:g} or less for so many updates",
        unbiased="",
        short="momentum weighs the old value in Keras, the batch in PyTorch: use momentum={old:g}",
        broken="the output in inference is no number",
        keep_out="",
        assign="assign moving_mean and moving_variance",
        initial="",
        unfreeze="Set trainable to True and train",
        calls="Check that the model calls it",
        renorm="",
        own="give this data statistics of its own: recalibrate a keras.models.clone_model with its weights",
    )

    def __init__(self, name: str, layer: Any, model: Any) -> None:
        self.name: str | None = name
        self.frozen = bool(model.trainable and not layer.trainable)
        mean, var = (array_of(getattr(layer, each)) for each in STATISTICS)
        self.dtype = np.dtype(np.float64 if mean.dtype == np.float64 else np.float32)
        decay = float(layer.momentum) if 0 <= layer.momentum <= 1 else None
        self.settings = Settings(
            decay=decay, eps=float(layer.epsilon), channel_axis=int(layer.axis), running_ddof=0
        )
        self.running = RunningStatistics()
        self.running.allocate(mean.astype(self.dtype), var.astype(self.dtype), False)
        optimizer = getattr(model, "optimizer", None)
        steps = int(optimizer.iterations) if optimizer is not None else 0
        if not self.running.untouched().all():
            if steps and decay is not None and not self.frozen:
                self.running.restore(num_updates=steps, initial_weight=decay**steps)
            else:
                self.running.mark_assigned("running_mean", "running_var")


# ---- running it --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def restored(layers: Mapping[str, Any]) -> Iterator[None]:
    """Afterwards the layers have the statistics of before."""
    variables = [getattr(layer, each) for layer in layers.values() for each in STATISTICS]
    before = [array_of(variable).copy() for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


@contextlib.contextmanager
def watched(
    layers: Mapping[str, Any], by_batch: Callable[[str], bool], collectors: Mapping[str, Collector]
) -> Iterator[None]:
    """Inside, inputs of layers are collected, and those layers normalise by the batch that shall do so."""
    try:
        for name, layer in layers.items():
            vars(layer)["call"] = _call(layer, name, by_batch, collectors.get(name))
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("call", None)


def _call(layer: Any, name: str, by_batch: Callable[[str], bool], collector: Collector | None) -> Any:
    original = layer.call

    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        positions: Any = {} if mask is None else {"mask": array_of(mask).astype(bool)}
        x = array_of(inputs)
        if collector is not None:
            collector(x, **positions)()
        if not by_batch(name):
            return original(inputs, training=False, mask=mask)
        own = Moments(channel_axis=int(layer.axis)).update(x, **positions)
        with restored({name: layer}):
            if own.channels is not None:
                layer.moving_mean.assign(own.mean)
                layer.moving_variance.assign(own.var)
            return original(inputs, training=False, mask=mask)

    return call


def passed(model: Any, batches: Any, forward: Callable[[Any], Any] | None) -> Iterator[int]:
    """Run the model on each batch; yields after each, and raises if there is none."""
    if forward is not None and not callable(forward):
        raise TypeError(f"forward is {kind(forward)}, expected a function of one batch, or None")
    single = isinstance(batches, np.ndarray | Mapping) or keras.ops.is_tensor(batches)
    if single or not isinstance(batches, Iterable):
        raise TypeError(f"batches is {kind(batches)}, expected an iterable of batches, such as [x]")
    count = 0
    for count, batch in enumerate(batches, 1):
        if forward is None:
            model(batch[0] if isinstance(batch, list | tuple) else batch, training=False)
        else:
            forward(batch)
        yield count
    if not count:
        why = "an iterator that was gone through before is empty: pass a list"
        raise ValueError(f"batches is empty, expected at least one batch; {why}")
