"""Folding: a normalisation by fixed statistics becomes part of the weights of the layer before it."""

from __future__ import annotations

import math
import sys

import numpy as np

from . import _core
from ._arrays import is_masked
from .settings import checked_vector, integer, kind, real
from .typing import Array

__all__ = ["fold"]

_FLOATS = ("float16", "float32", "float64", "bfloat16")
# Where layers have their outputs, for the error about an axis that has others. The first two may be dense.
_LAYERS: dict[int | tuple[int, ...], str] = {
    0: "a layer (outputs, inputs, ...)",
    -1: "a layer (..., inputs, outputs)",
    1: "a transposed convolution (inputs, outputs / groups, ...)",
    -2: "a transposed convolution (..., outputs, inputs)",
    (-2, -1): "a depthwise convolution (..., inputs, multiplier)",
}


@_core.entrance
def fold(
    weight: Array, bias: Array | None, mean: Array, var: Array, gamma: Array | None = None,
    beta: Array | None = None, *, eps: float, out_axis: int | tuple[int, ...], groups: int = 1,
) -> tuple[Array, Array]:  # fmt: skip
    """Weights and bias that do what a dense layer or convolution and the normalisation after it do.

    Parameters
    ----------
    weight : array of float16, float32, float64 or bfloat16
        Of a dense layer or convolution of any layout. Not changed.
    bias : array of float32 or float64, shape (C,), or None
        Its bias; None means 0.
    mean, var : array of float32 or float64, shape (C,)
        The normalisation's statistics. Finite; ``var >= 0``.
    gamma, beta : array of float32 or float64, shape (C,), optional
        Its scale and shift; absent means 1 and 0.
    eps : float
        The normalisation's, 1e-5 in PyTorch and here, 1e-3 in Keras. It has no default.
    out_axis : int or tuple of int
        The axis of ``weight`` that holds the C output channels, or several, of which the first one varies
        slowest. With a square weight the wrong axis has the right shape, so it has no default:

        ======================================= ==============
        weight                                   out_axis
        ======================================= ==============
        PyTorch Linear, Conv; ONNX Conv          0
        PyTorch and ONNX ConvTranspose           1
        Keras and Flax Dense, Conv               -1
        Keras Conv2DTranspose                    -2
        Keras DepthwiseConv2D (H, W, inputs, M)  (2, 3)
        ======================================= ==============
    groups : int, default 1
        Of a grouped transposed convolution, whose weight has shape (inputs, C / groups, ...) and out_axis=1.
        The weights of other grouped layers hold all outputs on one axis.

    Returns
    -------
    weight, bias : array
        New arrays, the weight like ``weight``, the bias of shape (C,) like ``bias``, or without one float64
        for a float64 weight and float32 otherwise.

    Raises
    ------
    TypeError, ValueError
        Wrong kinds, dtypes or shapes; a negative ``var``; ``var + eps`` that is 0; ``out_axis`` and
        ``groups`` that do not make as many outputs as ``mean`` has; results beyond the range of their dtype.

    See Also
    --------
    BatchNorm.fold : The same of a layer.

    Notes
    -----
    ``weight * a`` and ``(bias - mean) * a + beta`` with ``a = gamma / sqrt(var + eps)`` [1]_, in float64. A
    normalisation *before* a convolution cannot be folded exactly where that pads with zeros.

    .. [1] B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
       Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877, equation 14.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> weight, mean, var = np.ones((64, 16, 3, 3), np.float32), np.zeros(64), np.ones(64)
    >>> weight, bias = batchnorm.fold(weight, None, mean, var, eps=1e-5, out_axis=0)
    >>> weight.shape, bias.shape
    ((64, 16, 3, 3), (64,))
    """
    plain = isinstance(weight, np.ndarray) and not is_masked(weight)
    if not plain or weight.dtype.name not in _FLOATS:
        got = f"has dtype {weight.dtype}" if plain else f"is {kind(weight)}"
        raise TypeError(f"weight {got}, expected an array of float16, float32, float64 or bfloat16")
    wide = np.dtype(np.float64)
    channels = checked_vector("mean", mean, None, wide, cast=True).size
    vectors = {"mean": mean, "var": var, "gamma": gamma, "beta": beta, "bias": bias}
    m, v, g, b, c = (
        np.full(channels, name == "gamma", wide)
        if value is None and name in ("gamma", "beta", "bias")
        else checked_vector(name, value, (channels,), wide, cast=True).astype(wide)
        for name, value in vectors.items()
    )
    delta = real("eps", eps, 0, sys.float_info.max, "a finite number >= 0")
    for name, values, bad in (("var", v, v < 0), ("var + eps", v + delta, v + delta == 0)):
        if bad.any():
            got = f"{name} is {values[bad][0]} at channel {bad.argmax()}"
            raise ValueError(f"{got}, expected var >= 0 and var + eps > 0")
    scale = g / np.sqrt(v + delta)
    like = bias.dtype if bias is not None else wide if weight.dtype == wide else np.dtype(np.float32)
    spread = _spread(scale, weight.shape, out_axis, groups)
    with np.errstate(over="ignore"):
        folded = (weight * spread).astype(weight.dtype), ((c - m) * scale + b).astype(like)
    if not all(np.isfinite(result).all() for result in folded):
        what = f"folded weight and bias are not finite in {weight.dtype} and {like}, expected finite numbers"
        raise ValueError(f"{what}; pass finite ones, of float64 where these are too large")
    return folded


def _spread(scale: Array, shape: tuple[int, ...], out_axis: object, groups: int) -> Array:
    """One number per output channel as an array that broadcasts to a weight of this shape."""
    expected = f"an axis of weight {shape}, or several"
    given = out_axis if isinstance(out_axis, tuple) else (out_axis,)
    rank, count = len(shape), integer("groups", groups, 1, 2**31, "an int >= 1")
    axes = [integer("out_axis", axis, -rank, rank - 1, expected) % rank for axis in given]
    if not axes or len(set(axes)) != len(axes):
        raise ValueError(f"out_axis is {out_axis}, expected {expected}")
    lengths, parts = [shape[axis] for axis in axes], count if axes == [1] else 1
    if math.prod(lengths) * parts != scale.size or scale.size % count or shape[0] % parts:
        got = f"out_axis is {out_axis} and groups is {count} with weight {shape}"
        remedy = _fitting(shape, scale.size) or "weight and mean are not of the same layer"
        raise ValueError(f"{got}, expected what makes the {scale.size} channels of mean: {remedy}")
    if parts > 1:
        rows = np.repeat(scale.reshape(parts, lengths[0]), shape[0] // parts, axis=0)
        return rows.reshape(*rows.shape, *[1] * (rank - 2))
    place = [shape[axis] if axis in axes else 1 for axis in range(rank)]
    return scale.reshape(lengths).transpose(np.argsort(axes)).reshape(place)


def _fitting(shape: tuple[int, ...], channels: int) -> str:
    """What to pass for each layer with so many outputs that could have a weight of this shape."""
    found = []
    for axes, layer in list(_LAYERS.items())[: None if len(shape) > 2 else 2]:
        length = int(np.prod(np.take(shape, axes)))
        groups = channels // length if axes == 1 and length else 1
        if length * groups == channels and shape[0] % groups == 0:
            found.append(f"out_axis={axes}, groups={groups} for {layer}")
    return ", or ".join(found)
