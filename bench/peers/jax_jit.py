"""JAX: the formulas jit-compiled. XLA returns new arrays; "reused" rests on a heap that keeps its memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from .protocol import DECAY, EPS, Case, Work, as_rows, inputs

AXES = (0, 2)


class Peer:
    """jax on the CPU; as many threads as CPUs it is pinned to."""

    def __init__(self, threads: int) -> None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)  # for float64; the other types are not affected
        self._jax: Any = jax
        self.version = jax.__version__

    def prepare(self, case: Case) -> Work:
        jax = self._jax
        given = inputs(case)
        data = {
            name: None if a is None else jax.numpy.asarray(as_rows(case, a))
            for name, a in (("x", given.x), ("dy", given.dy), ("z", given.residual))
        }
        channel = [jax.numpy.asarray(a) for a in (given.gamma, given.beta, given.mean, given.var)]
        function, arguments = formulas(jax, case, data, *channel)
        compiled = jax.jit(function)

        def call() -> Any:
            return jax.block_until_ready(compiled(*arguments))

        def results() -> list[Any]:
            got = [np.asarray(a) for a in call()]
            return got[:1] if case.op != "backward" else got

        return Work(call, results)


def formulas(
    jax: Any, case: Case, data: dict[str, Any], gamma: Any, beta: Any, mean: Any, var: Any
) -> tuple[Any, tuple[Any, ...]]:
    """The function to compile and its arguments. 16-bit data is computed in float32."""
    jnp = jax.numpy
    wide = jnp.float64 if case.dtype == "float64" else jnp.float32
    x, dy, z = data["x"], data["dy"], data["z"]

    def normalise(x: Any, z: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
        scale = gamma * jax.lax.rsqrt(var + EPS)
        y = (x.astype(wide) - mean[:, None]) * scale[:, None] + beta[:, None]
        y = y if z is None else y + z
        return (jax.nn.relu(y) if case.relu else y).astype(x.dtype)

    def infer(x: Any, z: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
        return (normalise(x, z, gamma, beta, mean, var),)

    def train(x: Any, z: Any, gamma: Any, beta: Any, running_mean: Any, running_var: Any) -> Any:
        m = x.mean(AXES, dtype=wide)
        v = x.var(AXES, dtype=wide)
        updated = [DECAY * r + (1 - DECAY) * b for r, b in ((running_mean, m), (running_var, v))]
        return normalise(x, z, gamma, beta, m, v), m, jax.lax.rsqrt(v + EPS), *updated

    def back(dy: Any, x: Any, y: Any, mean: Any, inv_std: Any, gamma: Any) -> Any:
        n = case.outer * case.inner
        x_hat = (x.astype(wide) - mean[:, None]) * inv_std[:, None]
        g = jnp.where(y > 0, dy, 0) if case.relu else dy
        wide_g = g.astype(wide)
        dbeta, dgamma = wide_g.sum(AXES), (wide_g * x_hat).sum(AXES)
        dx = (gamma * inv_std)[:, None] * (wide_g - (dbeta / n)[:, None] - x_hat * (dgamma / n)[:, None])
        return dx.astype(x.dtype), dgamma, dbeta, *((g,) if case.residual else ())

    if case.op == "inference":
        return infer, (x, z, gamma, beta, mean, var)
    if case.op == "forward":
        return train, (x, z, gamma, beta, mean, var)
    y, m, inv_std, *_ = jax.jit(train)(x, z, gamma, beta, mean, var)
    return back, (dy, x, y if case.relu else None, m, inv_std, gamma)
