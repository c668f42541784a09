"""A Keras model without the batch norms that can be part of the convolution or dense layer before them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import layers as k

from ..fold import fold as folded_weights
from .model import array_of, every_layer, layers_of

__all__ = ["fold"]

# Where each layer has its outputs in the kernel.
_BEFORE: dict[Any, int | tuple[int, int]] = {
    k.Dense: -1, k.Conv1D: -1, k.Conv2D: -1, k.Conv3D: -1, k.Conv1DTranspose: -2, k.Conv2DTranspose: -2,
    k.Conv3DTranspose: -2, k.DepthwiseConv1D: (-2, -1), k.DepthwiseConv2D: (-2, -1),
}  # fmt: skip
# Of the largest output, by what layers compute in: what they make of the rounding of new weights.
_APART = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
_SIZE = 33  # of an axis whose size the model leaves open

Pairs = dict[str, tuple[Any, Any]]  # name of the batch norm or of the layer before it: (layer, batch norm)


def fold(model: Any, example: Any = None) -> Any:
    """A copy of a model for inference, with batch norms folded into the layers before them.

    Parameters
    ----------
    model : keras.Model
        A Functional or Sequential model. Not changed.
    example : array, or what the model takes, optional
        A batch to compare outputs on; random numbers if absent.

    Returns
    -------
    keras.Model
        A clone. Each batch norm that was folded is an Identity of its name; kernel and bias of the layer
        before it are new.

    Raises
    ------
    TypeError, ValueError
        No model, no batch norm in it, none that can be folded; NaN or a negative variance in one; a model
        of another kind; or, so that nothing wrong is returned, outputs that differ.

    Notes
    -----
    Folded are batch norms behind Dense, Conv1D to 3D, their transposed ones and DepthwiseConv1D and 2D
    without an activation, LoRA or quantization, if nothing else uses that layer's output and neither is
    called twice. Models inside the model stay as they are; fold them by themselves. The outputs of both
    models are compared before the new one is returned; in float32 they must agree within 1e-3 of the largest,
    in float16 within 0.1 and in bfloat16 within 0.3.

    Examples
    --------
    >>> import keras, batchnorm.keras
    >>> layers = [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()]
    >>> folded = batchnorm.keras.fold(keras.Sequential(layers))
    >>> [type(layer).__name__ for layer in folded.layers]
    ['Conv2D', 'Identity']
    """
    names = layers_of(model)
    if not isinstance(model, keras.Sequential) and type(model).__name__ != "Functional":
        got = f"model is a {type(model).__name__}, whose graph is not known"
        raise ValueError(f"{got}, expected a Functional or Sequential model")
    pairs: Pairs = {}
    for norm in names.values():
        if norm in model.layers and (before := _before(model, norm)) is not None:
            pairs |= {norm.name: (before, norm), before.name: (before, norm)}
    if not pairs:
        what = "none follows a convolution or Dense without activation, alone and at once"
        raise ValueError(f"model has no batch norm that can be folded: {what}")

    def clone(layer: Any) -> Any:
        if layer.name not in pairs:
            return layer.__class__.from_config(layer.get_config())
        if layer is pairs[layer.name][1]:
            return k.Identity(name=layer.name)
        return layer.__class__.from_config({**layer.get_config(), "use_bias": True})

    options: dict[str, Any] = {} if isinstance(model, keras.Sequential) else {"call_function": _called}
    result = keras.models.clone_model(model, clone_function=clone, **options)
    new = {layer.name: layer for layer in result.layers}
    for layer in model.layers:
        if layer.name not in pairs:
            if layer.weights:
                new[layer.name].set_weights([array_of(weight) for weight in layer.weights])
        elif layer is pairs[layer.name][0]:
            new[layer.name].set_weights(_weights(*pairs[layer.name]))
    _check(model, result, example)
    return result


def _called(layer: Any, *arguments: Any, **named: Any) -> Any:
    """A layer's call in the clone; an Identity takes no mask."""
    return layer(*arguments) if type(layer) is k.Identity else layer(*arguments, **named)


def _calls(layer: Any) -> list[Any]:
    """What is known of a layer's symbolic calls: nodes with input and output tensors."""
    return list(vars(layer)["_inbound_nodes"])


def _before(model: Any, norm: Any) -> Any:
    """The layer whose output goes into the batch norm alone, if it is of a known class."""
    calls = [(layer, node) for layer in every_layer(model) for node in _calls(layer)]
    own = _calls(norm)
    if len(own) != 1 or len(own[0].input_tensors) != 1:
        return None
    tensor = own[0].input_tensors[0]
    made = [layer for layer, node in calls if any(each is tensor for each in node.output_tensors)]
    users = sum(each is tensor for _, node in calls for each in node.input_tensors)
    if len(made) != 1 or type(made[0]) not in _BEFORE or users != 1 or len(_calls(made[0])) != 1:
        return None
    layer = made[0]
    linear = keras.activations.serialize(layer.activation) == "linear"
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    channels = len(tensor.shape) - 1 if last else 1
    tuned = getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None)
    is_output = any(each is tensor for each in model.outputs)
    good = linear and not tuned and norm.axis % len(tensor.shape) == channels and not is_output
    return layer if good else None


def _weights(layer: Any, norm: Any) -> list[Any]:
    kernel, *rest = map(array_of, layer.weights)
    values = (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
    vectors: list[Any] = [None if v is None else array_of(v) for v in (*rest[:1], *values)]
    vectors = [v if v is None or v.dtype == np.float64 else v.astype(np.float32) for v in vectors]
    vectors = vectors if rest else [None, *vectors]
    try:
        folded = folded_weights(kernel, *vectors, eps=norm.epsilon, out_axis=_BEFORE[type(layer)])
    except ValueError as error:
        raise ValueError(f"{norm.path}, behind {layer.path}: {error}") from error
    return list(folded)


def _check(model: Any, result: Any, example: Any) -> None:
    """Raise if the outputs differ on the example, or on random numbers of the model's shape."""
    if example is None:
        rng = np.random.default_rng(0)
        shapes = [[2, *(_SIZE if n is None else n for n in each.shape[1:])] for each in model.inputs]
        given = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
        example = given[0] if len(given) == 1 else given
    tolerance = max(_APART.get(layer.compute_dtype, 0.3) for layer in every_layer(model))
    for want, got in zip(*(list(_leaves(m(example, training=False))) for m in (model, result)), strict=True):
        apart = float(np.abs(got.astype(np.float64) - want).max(initial=0))
        if not apart <= tolerance * max(float(np.abs(want).max(initial=0)), math.ulp(0)):
            raise ValueError(f"folding changes the output by {apart:.3g}, so nothing is returned")


def _leaves(value: Any) -> Iterator[Any]:
    for each in keras.tree.flatten(value):
        yield array_of(each)
