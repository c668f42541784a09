"""Layers for tests: data, trained ones, and everything that one holds, to tell whether it has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
from batchnorm import BatchNorm

from .problem import rng

Array = np.ndarray[Any, Any]

C = 4


def images(seed: object = 0, shape: tuple[int, ...] = (6, C, 5), dtype: Any = np.float32) -> Array:
    """Values about 1 with standard deviation 2."""
    return rng("images", seed).normal(1, 2, shape).astype(dtype)


def shaped(axis: int | tuple[int, ...], rank: int = 4) -> tuple[int, ...]:
    """A shape with C channels on an axis, and different lengths on the others."""
    shape = [6, 3, 2, 5][:rank]
    shape[axis] = C
    return tuple(shape)


def randomized(layer: BatchNorm, seed: int = 1) -> BatchNorm:
    """The layer with parameters that are not 1 and 0, of either sign."""
    generator = rng("parameters", seed)
    for parameter in layer.parameters():
        parameter.value[:] = generator.normal(size=parameter.value.shape) + 0.25
    return layer


def trained(steps: int = 3, **options: Any) -> BatchNorm:
    """A layer after some updates, not cold unless `options` make it so."""
    layer = randomized(BatchNorm(C, **{"zero_debias": True, **options}))
    for step in range(steps):
        layer(images(step))
    return layer


def held(layer: BatchNorm) -> dict[str, bytes]:
    """The state of a layer as bytes."""
    return {name: value.dtype.str.encode() + value.tobytes() for name, value in layer.state_dict().items()}


def everything(layer: BatchNorm) -> dict[str, Any]:
    """All that a layer holds, with the identity of its arrays."""
    arrays = (
        "gamma",
        "beta",
        "running_mean",
        "running_var",
        "renorm_mean",
        "renorm_std",
        "dgamma",
        "dbeta",
        "dresidual",
    )
    values = {name: getattr(layer, name) for name in arrays}
    return {
        "state": held(layer) if layer.num_features else None,
        "settings": layer.settings,
        "repr": repr(layer),
        "modes": (layer.training, layer.frozen, layer.name, layer.num_features),
        "running": (id(layer.running), layer.running.num_updates, layer.running.num_skipped),
        **{name: None if value is None else (id(value), value.tobytes()) for name, value in values.items()},
    }
