"""Folding: a normalisation by fixed statistics becomes part of the weights of the layer before it."""

from __future__ import annotations

import math

import numpy as np

from .settings import checked_vector, integer, kind, real
from .typing import Array

__all__ = ["fold"]

_FLOATS = ("float16", "float32", "float64", "bfloat16")


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
        The axis of ``weight`` that holds the C output channels. With a square weight the wrong axis has the
        right shape, so it has no default:

        ======================================= ==============
        weight                                   out_axis
        ======================================= ==============
        PyTorch Linear, Conv; ONNX Conv          0
        PyTorch and ONNX ConvTranspose           1
        Keras and Flax Dense, Conv               -1
        Keras Conv2DTranspose                    -2
        Keras DepthwiseConv2D (H, W, C, M)       (2, 3)
        ======================================= ==============
    groups : int, default 1
        Of a grouped transposed convolution, whose weight has shape (inputs, C / groups, ...).

    Returns
    -------
    weight, bias : array
        New arrays, the weight like ``weight``, the bias of shape (C,) like ``bias``, or without one float64
        for a float64 weight and float32 otherwise.

    Raises
    ------
    TypeError, ValueError
        Wrong kinds, dtypes or shapes; ``var + eps`` that is 0 or negative; ``out_axis`` whose length is not
        that of ``mean``.

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
    if not isinstance(weight, np.ndarray) or weight.dtype.name not in _FLOATS:
        got = f"has dtype {weight.dtype}" if isinstance(weight, np.ndarray) else f"is {kind(weight)}"
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
    v += real("eps", eps, 0, math.inf, "a finite number >= 0")
    if not (v > 0).all():
        channel = int((v > 0).argmin())
        raise ValueError(f"var + eps is {v[channel]} at channel {channel}, expected more than 0")
    scale = g / np.sqrt(v)
    folded = (weight * _spread(scale, weight.shape, out_axis, groups)).astype(weight.dtype)
    like = bias.dtype if bias is not None else wide if weight.dtype == wide else np.dtype(np.float32)
    return folded, ((c - m) * scale + b).astype(like)


def _spread(scale: Array, shape: tuple[int, ...], out_axis: object, groups: int) -> Array:
    """One number per output channel as an array that broadcasts to a weight of this shape."""
    expected = f"an axis of weight {shape}, or several"
    given = out_axis if isinstance(out_axis, tuple) else (out_axis,)
    rank, count = len(shape), integer("groups", groups, 1, 2**31, "an int >= 1")
    axes = [integer("out_axis", axis, -rank, rank - 1, expected) % rank for axis in given]
    if not axes or len(set(axes)) != len(axes):
        raise ValueError(f"out_axis is {out_axis}, expected {expected}")
    lengths = [shape[axis] for axis in axes]
    if math.prod(lengths) == scale.size:
        place = [shape[axis] if axis in axes else 1 for axis in range(rank)]
        return scale.reshape(lengths).transpose(np.argsort(axes)).reshape(place)
    if count > 1 and axes == [1] and lengths[0] * count == scale.size and shape[0] % count == 0:
        rows = np.repeat(scale.reshape(count, lengths[0]), shape[0] // count, axis=0)
        return rows.reshape(*rows.shape, *[1] * (rank - 2))
    hint = "" if count == 1 else f"; with groups={count} it may be 1 of (inputs, {scale.size / count:g}, ...)"
    raise ValueError(
        f"out_axis is {out_axis}, of length {math.prod(lengths)} in weight {shape}, expected the axis of the "
        f"{scale.size} channels of mean{hint}"
    )
