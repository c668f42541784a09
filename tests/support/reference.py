"""Batch normalization in NumPy, written straight from the equations; the tests compare the library with it.

Ioffe and Szegedy 2015 (arXiv:1502.03167) for training, inference and gradients, Ioffe 2017
(arXiv:1702.03275) for r and d. Tensors are (N, C, S): samples, channels, the rest. A part is a run of samples
that are a batch of their own. Arithmetic is that of `Call.kind`: float64, or longdouble where float64 itself
is under test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


def activate(v: Array, activation: str | None, slope: float = 0.01) -> tuple[Array, Array, Array]:
    """act(v), act'(v) and act''(v), by formulas that do not overflow."""
    e, e2 = np.exp(-np.abs(v)), np.exp(-2 * np.abs(v))
    s, t = (np.where(side, 1, e) / (1 + e) for side in (v > 0, v <= 0))  # sigmoid(v), 1 - sigmoid(v)
    zero, one = np.zeros_like(v), np.ones_like(v)
    match activation:
        case "relu":
            return np.where(v < 0, 0, v), np.where(v > 0, one, 0), zero
        case "leaky_relu":
            return np.where(v > 0, v, v * slope), np.where(v > 0, one, slope), zero
        case "relu6":
            return np.where(v < 0, 0, np.where(v > 6, 6, v)), np.where((v > 0) & (v < 6), one, 0), zero
        case "sigmoid":
            return s, s * t, s * t * (t - s)
        case "tanh":
            slant = 4 * e2 / (1 + e2) ** 2
            return np.tanh(v), slant, -2 * np.tanh(v) * slant
        case "silu":
            return v * s, s * (1 + v * t), s * t * (2 + v * (t - s))
    return v, one, zero


@dataclass
class Call:
    """A forward call. gamma and beta are (1 or N, C), mask and weights (N, 1 or C, S).

    `starts` is the first sample of each part. Given statistics and renorm's vectors are (C,).
    """

    x: Array
    gamma: Array | None = None
    beta: Array | None = None
    mean: Array | None = None
    var: Array | None = None
    residual: Array | None = None
    mask: Array | None = None
    weights: Array | None = None
    starts: tuple[int, ...] = (0,)
    renorm: Mapping[str, Any] | None = None
    eps: float = 1e-5
    activation: str | None = None
    slope: float = 0.01
    kind: Any = np.float64

    def wide(self, a: Any, default: float = 0.0) -> Array:
        """`a` in the arithmetic's type; bfloat16 goes by way of float64, having no cast to longdouble."""
        a = np.asarray(default if a is None else a)
        return (a if a.dtype == np.longdouble else a.astype(np.float64)).astype(self.kind)

    def rows(self, values: Array) -> Array:
        """(P, C) values as (N, C, 1), or (1 or N, C) ones."""
        sizes = np.diff([*self.starts, len(self.x)])
        return (np.repeat(values, sizes, axis=0) if len(values) == len(sizes) else values)[:, :, None]

    def affine(self) -> tuple[Array, Array]:
        """gamma and beta as (1 or N, C, 1)."""
        none = np.zeros((1, self.x.shape[1]))
        pair = none + 1 if self.gamma is None else self.gamma, none if self.beta is None else self.beta
        return tuple(self.wide(v)[:, :, None] for v in pair)

    def sums(self, t: Array) -> Array:
        """(P, C): over each part."""
        return np.add.reduceat(t.sum(axis=2), self.starts, axis=0)


class Forward(NamedTuple):
    """y, v = what the activation is of, x_hat, counts, w: (N, C, S); the rest (P, C)."""

    y: Array
    v: Array
    x_hat: Array
    mean: Array
    var: Array
    inv_std: Array
    r: Array
    d: Array
    n: Array
    values: Array
    batch_mean: Array
    batch_var: Array
    counts: Array
    w: Array


@np.errstate(all="ignore")
def forward(c: Call) -> Forward:
    counts = np.broadcast_to(True if c.mask is None else c.mask, c.x.shape)
    w = np.where(counts, c.wide(c.weights, 1.0), 0)
    x = np.where(counts, c.wide(c.x), 0)
    n, values = c.sums(w), c.sums((w > 0).astype(int))
    batch_mean = c.sums(w * x) / n
    batch_var = c.sums(w * (x - c.rows(batch_mean)) ** 2) / n
    mean, var = batch_mean, batch_var
    if c.mean is not None:
        mean, var = (np.broadcast_to(c.wide(a), n.shape) for a in (c.mean, c.var))
    else:  # without any value nothing counts
        counts = counts & (c.rows(values) > 0)
    inv_std = 1 / np.sqrt(var + c.kind(c.eps))
    x_hat = np.where(counts, (x - c.rows(mean)) * c.rows(inv_std), 0)
    if c.mean is None:
        x_hat = np.where(c.rows(values) == 1, 0, x_hat)
    r, d = np.ones_like(n), np.zeros_like(n)
    if c.renorm is not None:
        std = c.wide(c.renorm["std"])
        r = np.clip(1 / inv_std / std, c.renorm.get("rmin", 0), c.renorm.get("rmax", np.inf))
        most = c.renorm.get("dmax", np.inf)
        d = np.clip((mean - c.wide(c.renorm["mean"])) / std, -most, most)
    gamma, beta = c.affine()
    v = x_hat * (gamma * c.rows(r)) + (beta + gamma * c.rows(d)) + np.where(counts, c.wide(c.residual), 0)
    y = np.where(counts, activate(v, c.activation, c.kind(c.slope))[0], 0)
    return Forward(y, v, x_hat, mean, var, inv_std, r, d, n, values, batch_mean, batch_var, counts, w)


class Gradients(NamedTuple):
    """dx, dresidual (N, C, S); dgamma, dbeta as gamma and beta, (1, C) where those are absent."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array


def per_row(c: Call, values: Array, parameter: Array | None) -> Array:
    """(N, C, S) summed to the rows of a parameter."""
    rows = values.sum(axis=2)
    return rows if parameter is not None and len(parameter) > 1 else rows.sum(axis=0, keepdims=True)


def backward(c: Call, f: Forward, dy: Array) -> Gradients:
    slant = activate(f.v, c.activation, c.kind(c.slope))[1]
    return through(c, f, np.where(f.counts, c.wide(dy) * slant, 0))


@np.errstate(all="ignore")
def through(c: Call, f: Forward, g: Array) -> Gradients:
    """Gradients of sum g v with respect to all that v is made of; r and d are constants."""
    gamma, _ = c.affine()
    dx_hat = g * gamma * c.rows(f.r)
    dgamma = per_row(c, np.where(f.counts, g * (f.x_hat * c.rows(f.r) + c.rows(f.d)), 0), c.gamma)
    return Gradients(normalized(c, f, dx_hat), dgamma, per_row(c, g, c.beta), g)


def normalized(c: Call, f: Forward, e: Array) -> Array:
    """The gradient of sum e x_hat with respect to x."""
    return centred(c, f, e, np.ones_like(e), f.w)


def adjoint(c: Call, f: Forward, u: Array) -> Array:
    """How x_hat moves when x moves along u."""
    return centred(c, f, u, f.w, np.ones_like(u))


def centred(c: Call, f: Forward, t: Array, inside: Array, outside: Array) -> Array:
    s = c.rows(f.inv_std)
    if c.mean is not None:
        return np.where(f.counts, s * t, 0)
    mean, along = (c.rows(c.sums(inside * b) / f.n) for b in (t, t * f.x_hat))
    return np.where(f.counts & (c.rows(f.values) > 1), s * (t - outside * (mean + f.x_hat * along)), 0)


class DoubleGradients(NamedTuple):
    ddy: Array
    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array


@np.errstate(all="ignore")
def double_backward(
    c: Call, f: Forward, dy: Array, ddx: Any, ddgamma: Any, ddbeta: Any, ddresidual: Any
) -> DoubleGradients:
    """Gradients of L = <ddx, dx> + <ddgamma, dgamma> + <ddbeta, dbeta> + <ddresidual, dresidual>.

    L = sum g G, with G = dL/dg below; so dL/ddy = act' G, and through act' comes dy act'' G. What is left is
    L at fixed g as a function of gamma, x_hat and inv_std.
    """
    _, slant, bend = activate(f.v, c.activation, c.kind(c.slope))
    p, q = (c.wide(0) if t is None else np.atleast_2d(c.wide(t))[:, :, None] for t in (ddgamma, ddbeta))
    u, p, q, z = (np.where(f.counts, t, 0) for t in (c.wide(ddx), p, q, c.wide(ddresidual)))
    gamma, _ = c.affine()
    s, r, d = c.rows(f.inv_std), c.rows(f.r), c.rows(f.d)
    g = np.where(f.counts, c.wide(dy) * slant, 0)
    along = adjoint(c, f, u)
    total = np.where(f.counts, along * gamma * r + p * (f.x_hat * r + d) + q + z, 0)
    again = through(c, f, np.where(f.counts, c.wide(dy) * bend * total, 0))
    dgamma = again.dgamma + per_row(c, np.where(f.counts, g * r * along, 0), c.gamma)
    dx, e = np.zeros_like(g), g * p * r
    if c.mean is None:
        big = g * gamma * r
        of_g, of_u = (c.rows(c.sums(t * f.x_hat) / f.n) for t in (big, f.w * u))
        e = e - s * (f.w * u * of_g + big * of_u)
        dx = -c.rows(c.sums(big * along) / f.n) * s * f.w * f.x_hat
    dx = np.where(f.counts & (c.rows(f.values) > 1) | (c.mean is not None), dx, 0) + normalized(c, f, e)
    return DoubleGradients(
        np.where(f.counts, slant * total, 0), again.dx + dx, dgamma, again.dbeta, again.dresidual
    )


def running(
    c: Call, f: Forward, mean: Array, var: Array, decay: Any = 0.9, seen: Any = None, ddof: int = 1
) -> tuple[Array, Array]:
    """Running statistics after the call: one step by the parts' average, weighted by n.

    A channel of a part with fewer than two values, or not more than ddof, stays out.
    """
    enters = (f.values > 1) & (f.n > ddof)
    n = np.where(enters, f.n, 0)
    total = n.sum(axis=0)
    with np.errstate(all="ignore"):
        batch = (f.batch_mean, f.batch_var * f.n / (f.n - ddof))
        new = (np.where(enters, n * b, 0).sum(axis=0) / total for b in batch)
        decay = c.wide(decay) if seen is None else c.wide(seen) / (c.wide(seen) + total)
        return tuple(
            np.where(total > 0, decay * c.wide(old) + (1 - decay) * b, c.wide(old))
            for old, b in zip((mean, var), new, strict=True)
        )
