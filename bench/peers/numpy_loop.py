"""The formulas in NumPy, one whole-array operation at a time into reused arrays; one thread."""

from __future__ import annotations

from typing import Any

import numpy as np

from .protocol import DECAY, EPS, Case, Unsupported, Work, as_rows, empty, inputs

AXES = (0, 2)


class Peer:
    """What somebody with NumPy alone would write."""

    def __init__(self, threads: int) -> None:
        self.version = f"{np.__version__} (1 thread)"

    def prepare(self, case: Case) -> Work:
        if case.dtype in ("float16", "bfloat16"):
            # The same lines run, but sum in 16 bits (float16) or raise (bfloat16): another computation.
            raise Unsupported("NumPy's sums of 16-bit types are too coarse to compare")
        return backward(case) if case.op == "backward" else forward(case)


def per_channel(a: Any) -> Any:
    """(C,) against (outer, C, inner)."""
    return a[:, None]


def forward(case: Case) -> Work:
    """Training or inference."""
    given = inputs(case)
    x, gamma, beta = as_rows(case, given.x), per_channel(given.gamma), per_channel(given.beta)
    z = as_rows(case, given.residual) if given.residual is not None else None
    reused = (empty(case), empty(case)) if case.outputs == "reused" else None

    def normalise(mean: Any, var: Any, out: Any) -> Any:
        scale = gamma / np.sqrt(var + EPS)
        np.subtract(x, mean, out=out)
        np.multiply(out, scale, out=out)
        np.add(out, beta, out=out)
        if z is not None:
            np.add(out, z, out=out)
        if case.relu:
            np.maximum(out, 0, out=out)
        return out

    def buffers() -> tuple[Any, Any]:
        out, t = reused or (np.empty_like(given.x), np.empty_like(given.x))
        return as_rows(case, out), as_rows(case, t)

    def infer() -> Any:
        return normalise(per_channel(given.mean), per_channel(given.var), buffers()[0])

    def train() -> Any:
        out, t = buffers()
        mean = x.mean(AXES, keepdims=True)
        np.subtract(x, mean, out=t)
        var = np.square(t, out=t).mean(AXES, keepdims=True)
        for running, batch in ((given.mean, mean), (given.var, var)):
            running *= DECAY
            running += (1 - DECAY) * batch[0, :, 0]
        return normalise(mean, var, out)

    call = train if case.op == "forward" else infer
    return Work(call, lambda: [call()])


def backward(case: Case) -> Work:
    """dx, dgamma, dbeta, and the residual's gradient."""
    given = inputs(case)
    assert given.dy is not None
    x, dy, gamma = as_rows(case, given.x), as_rows(case, given.dy), per_channel(given.gamma)
    n = case.outer * case.inner
    mean = x.mean(AXES, keepdims=True)
    inv_std = 1 / np.sqrt(x.var(AXES, keepdims=True) + EPS)
    y = (x - mean) * inv_std * gamma + per_channel(given.beta)
    if given.residual is not None:
        y += as_rows(case, given.residual)
    active = y > 0 if case.relu else None
    del y
    reused = [as_rows(case, empty(case)) for _ in range(3)] if case.outputs == "reused" else None

    def back() -> list[Any]:
        t, dx, masked = reused or [np.empty_like(x) for _ in range(3)]
        np.subtract(x, mean, out=t)
        np.multiply(t, inv_std, out=t)
        g = np.multiply(dy, active, out=masked) if active is not None else dy
        dbeta = g.sum(AXES)
        dgamma = np.einsum("ncs,ncs->c", g, t)
        np.multiply(t, per_channel(dgamma / n), out=t)
        np.add(t, per_channel(dbeta / n), out=t)
        np.subtract(g, t, out=dx)
        np.multiply(dx, inv_std * gamma, out=dx)
        return [dx, dgamma, dbeta] + ([g] if case.residual else [])

    return Work(back, back)
