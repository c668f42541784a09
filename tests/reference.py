"""Batch normalization in NumPy, written straight from the equations; the tests compare the library with it.

The equations are those of Ioffe and Szegedy, "Batch Normalization", 2015: algorithm 1 (training), algorithm 2
(inference) and section 3 (gradients). `dtype` is the type of all arithmetic: np.float64, or np.longdouble
where float64 itself is under test. Results have that type; arrays the size of x have x's shape.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

Forward = namedtuple("Forward", "y x_hat mean var inv_std")
Backward = namedtuple("Backward", "dx dgamma dbeta")


def widen(a, dtype=np.float64):
    """`a` as `dtype`; bfloat16 goes by way of float64, having no cast to longdouble."""
    a = np.asarray(a)
    return (a if a.dtype == np.longdouble else a.astype(np.float64)).astype(dtype)


def spread(values, x, axis):
    """A per-channel vector, shaped to broadcast against x."""
    shape = [1] * np.ndim(x)
    shape[axis] = -1
    return np.reshape(values, shape)


def others(x, axis):
    """Every axis of x but the channel axis."""
    return tuple(i for i in range(np.ndim(x)) if i != axis % np.ndim(x))


def moments(x, axis=1, dtype=np.float64):
    x = widen(x, dtype)
    n = x.size // x.shape[axis]
    mean = x.sum(axis=others(x, axis)) / n
    deviation = x - spread(mean, x, axis)
    return mean, (deviation * deviation).sum(axis=others(x, axis)) / n


def normalize(
    x, mean, var, gamma=None, beta=None, eps=1e-5, axis=1, activation=None, dtype=np.float64, residual=None
):
    x, mean, var = widen(x, dtype), widen(mean, dtype), widen(var, dtype)
    inv_std = 1 / np.sqrt(var + dtype(eps))
    x_hat = (x - spread(mean, x, axis)) * spread(inv_std, x, axis)
    y = x_hat if gamma is None else x_hat * spread(widen(gamma, dtype), x, axis)
    y = y if beta is None else y + spread(widen(beta, dtype), x, axis)
    y = y if residual is None else y + widen(residual, dtype)
    return Forward(np.maximum(y, 0) if activation == "relu" else y, x_hat, mean, var, inv_std)


def train(x, gamma=None, beta=None, eps=1e-5, axis=1, activation=None, dtype=np.float64, residual=None):
    mean, var = moments(x, axis, dtype)
    return normalize(x, mean, var, gamma, beta, eps, axis, activation, dtype, residual)


def backward(dy, x, mean, inv_std, gamma=None, axis=1, stats="batch", dtype=np.float64):
    """Gradients without activation; for relu the caller masks dy, which is then the residual's gradient."""
    dy, x, mean, inv_std = (widen(a, dtype) for a in (dy, x, mean, inv_std))
    n = x.size // x.shape[axis]
    x_hat = (x - spread(mean, x, axis)) * spread(inv_std, x, axis)
    dbeta = dy.sum(axis=others(x, axis))
    dgamma = (dy * x_hat).sum(axis=others(x, axis))
    scale = inv_std if gamma is None else inv_std * widen(gamma, dtype)
    centred = dy
    if stats == "batch":
        centred = dy - spread(dbeta / n, x, axis) - x_hat * spread(dgamma / n, x, axis)
    return Backward(spread(scale, x, axis) * centred, dgamma, dbeta)


def update_running(running_mean, running_var, mean, var, decay, count, ddof=1):
    unbiased = widen(var) * count / (count - ddof)
    pairs = (running_mean, mean), (running_var, unbiased)
    return tuple(decay * widen(old) + (1 - decay) * widen(new) for old, new in pairs)
