"""Comparison of results with the reference, element by element, within the bounds of tolerances.py."""

from __future__ import annotations

import numpy as np

import reference
import tolerances
from cases import FLOAT64
from reference import others, spread, widen


def precision(dtype):
    """The reference's arithmetic: it must be wider than the library's."""
    return np.longdouble if dtype == FLOAT64 else np.float64


def assert_forward(got, x, want, gamma=None, beta=None, axis=1, exact_mean=False, with_residual=False):
    """Every element of `got` within its bound of the reference `want`, which contains any residual."""
    per_channel = (want.mean, want.inv_std, 1.0 if gamma is None else gamma, 0.0 if beta is None else beta)
    mean, inv_std, gamma, beta = (
        v if np.ndim(v) == 0 else spread(widen(v, want.mean.dtype.type), x, axis) for v in per_channel
    )
    bound = tolerances.y_error(
        x.dtype, want.y, want.x_hat, mean, inv_std, gamma, beta, exact_mean, with_residual
    )
    error = np.abs(widen(got, want.y.dtype.type) - want.y)
    assert got.shape == x.shape and got.dtype == x.dtype
    assert np.all(error <= bound), f"worst error is {(error / bound).max():.3g} of its bound"


def assert_gradients(got, dy, x, mean, inv_std, gamma=None, axis=1, stats="batch"):
    """Each gradient within its bound of the reference. `dy` is already masked if there is an activation."""
    kind = precision(x.dtype)
    want = reference.backward(dy, x, mean, inv_std, gamma, axis, stats, kind)
    n = x.size // x.shape[axis]
    rows = others(x, axis)
    wide_dy, wide_mean, wide_inv = widen(dy, kind), widen(mean, kind), widen(inv_std, kind)
    x_hat = (widen(x, kind) - spread(wide_mean, x, axis)) * spread(wide_inv, x, axis)
    abs_dy, abs_dy_x_hat = np.abs(wide_dy).sum(axis=rows), np.abs(wide_dy * x_hat).sum(axis=rows)

    sums = {
        "dbeta": (got.dbeta, want.dbeta, lambda t: tolerances.sum_error(n, abs_dy, want.dbeta, t)),
        "dgamma": (
            got.dgamma,
            want.dgamma,
            lambda t: tolerances.dgamma_error(n, abs_dy_x_hat, want.dgamma, t, wide_mean, wide_inv, abs_dy),
        ),
    }
    for name, (value, wanted, bound) in sums.items():
        error = np.abs(widen(value, kind) - wanted)
        assert np.all(error <= bound(value.dtype)), (
            f"{name}: worst error is {(error / bound(value.dtype)).max():.3g} of its bound"
        )

    inside = (
        sums["dbeta"][2]("float64"),
        sums["dgamma"][2]("float64"),
    )  # errors of the sums before they are stored
    sums_error = spread(inside[0] / n, x, axis) + np.abs(x_hat) * spread(inside[1] / n, x, axis)
    per_channel = (spread(v, x, axis) for v in (wide_mean, wide_inv, want.dgamma, want.dbeta))
    scale = 1.0 if gamma is None else spread(widen(gamma, kind), x, axis)
    bound = tolerances.dx_error(x.dtype, want.dx, wide_dy, x_hat, *per_channel, n, scale, stats, sums_error)
    error = np.abs(widen(got.dx, kind) - want.dx)
    assert got.dx.shape == x.shape and got.dx.dtype == x.dtype
    assert np.all(error <= bound), f"dx: worst error is {(error / bound).max():.3g} of its bound"
