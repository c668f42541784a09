"""Loops by numba, as a user who knows it writes them: parallel over channels where a channel's values lie
together (NCHW: the second pass finds them in the cache), over blocks of rows where they do not (NHWC).

fastmath=True, because without it LLVM does not vectorise a sum; float32 sums run over at most a row of one
image (NCHW) or ROWS rows (NHWC) and are then added in float64. The sums are of x - x0, so that a large
mean does not cancel.
"""

# No annotations in the kernels: numba infers the types, and specialises for each.
from __future__ import annotations

import os
from typing import Any

import numpy as np

from .protocol import DECAY, EPS, Case, Unsupported, Work, as_rows, empty, inputs

ROWS = 64  # rows summed in float32 before their sums go to float64


class Peer:
    """numba with OpenMP threads, which are pinned like everybody's."""

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")
        import numba

        numba.set_num_threads(threads)
        self._threads = threads
        self._kernels = kernels(numba)
        self.version = f"{numba.__version__} (fastmath, float64 block sums)"

    def prepare(self, case: Case) -> Work:
        if case.dtype in ("float16", "bfloat16"):
            raise Unsupported(f"numba has no {case.dtype} on CPUs")
        given = inputs(case)
        k = self._kernels["ncs" if case.inner > 1 else "nsc"]

        def rows(a: Any) -> Any:
            if a is None:
                return none
            return as_rows(case, a) if case.inner > 1 else a.reshape(case.outer, case.channels)

        none = np.zeros((1, 1, 1) if case.inner > 1 else (1, 1), given.x.dtype)
        x, dy, z = rows(given.x), rows(given.dy), rows(given.residual)
        reused = [rows(empty(case)) for _ in range(2)] if case.outputs == "reused" else None
        relu, add, threads = case.relu, case.residual, self._threads
        gamma, beta, mean, var = given.gamma, given.beta, given.mean, given.var

        def output(i: int) -> Any:
            return reused[i] if reused else np.empty_like(x)

        if case.op == "inference":

            def infer() -> Any:
                y = output(0)
                k["inference"](x, z, mean, var, gamma, beta, EPS, relu, add, threads, y)
                return y

            return Work(infer, lambda: [infer()])

        saved = np.empty((2, case.channels))

        def train() -> Any:
            y = output(0)
            k["forward"](x, z, gamma, beta, mean, var, DECAY, EPS, relu, add, threads, y, saved)
            return y

        if case.op == "forward":
            return Work(train, lambda: [train()])
        y = train().copy()  # fills `saved`; the values are read where they are the mask
        y = y if add else none
        dgamma, dbeta = np.empty_like(gamma), np.empty_like(gamma)

        def back() -> list[Any]:
            dx = output(0)
            dz = output(1) if add else none
            k["backward"](dy, x, y, saved, gamma, beta, relu, add, threads, dx, dgamma, dbeta, dz)
            return [dx, dgamma, dbeta] + ([dz] if add else [])

        return Work(back, back)


def kernels(numba: Any) -> dict[str, dict[str, Any]]:
    """The compiled loops, by memory order and operation."""
    jit = numba.njit(parallel=True, fastmath=True)
    return {
        "ncs": {name: jit(f) for name, f in channel_loops(numba.prange).items()},
        "nsc": {name: jit(f) for name, f in row_loops(numba.prange).items()},
    }


def channel_loops(prange: Any) -> dict[str, Any]:
    """x is (outer, channels, inner)."""

    def inference(x, z, mean, var, gamma, beta, eps, relu, add, threads, y):  # type: ignore[no-untyped-def]
        outer, channels, inner = x.shape
        for nc in prange(outer * channels):
            n, c = nc // channels, nc % channels
            scale = x.dtype.type(gamma[c] / np.sqrt(var[c] + eps))
            shift = x.dtype.type(beta[c] - mean[c] * scale)
            xs, ys, zs = x[n, c], y[n, c], z[n % z.shape[0], c % z.shape[1]]
            for i in range(inner):
                v = xs[i] * scale + shift
                if add:
                    v += zs[i]
                ys[i] = max(v, x.dtype.type(0)) if relu else v

    def forward(x, z, gamma, beta, running_mean, running_var, decay, eps, relu, add, threads, y, saved):  # type: ignore[no-untyped-def]
        outer, channels, inner = x.shape
        count = outer * inner
        for c in prange(channels):
            x0 = x[0, c, 0]
            total, squares = 0.0, 0.0
            for n in range(outer):
                xs = x[n, c]
                s, q = x.dtype.type(0), x.dtype.type(0)
                for i in range(inner):
                    d = xs[i] - x0
                    s += d
                    q += d * d
                total += s
                squares += q
            delta = total / count
            mean, var = x0 + delta, squares / count - delta * delta
            saved[0, c], saved[1, c] = mean, 1 / np.sqrt(var + eps)
            running_mean[c] = decay * running_mean[c] + (1 - decay) * mean
            running_var[c] = decay * running_var[c] + (1 - decay) * var * count / (count - 1)
            scale = x.dtype.type(gamma[c] * saved[1, c])
            shift = x.dtype.type(beta[c] - mean * gamma[c] * saved[1, c])
            for n in range(outer):
                xs, ys, zs = x[n, c], y[n, c], z[n % z.shape[0], c % z.shape[1]]
                for i in range(inner):
                    v = xs[i] * scale + shift
                    if add:
                        v += zs[i]
                    ys[i] = max(v, x.dtype.type(0)) if relu else v

    def backward(dy, x, y, saved, gamma, beta, relu, add, threads, dx, dgamma, dbeta, dz):  # type: ignore[no-untyped-def]
        outer, channels, inner = x.shape
        count = outer * inner
        zero = x.dtype.type(0)
        for c in prange(channels):
            mean, inv_std = x.dtype.type(saved[0, c]), saved[1, c]
            scale = x.dtype.type(gamma[c] * inv_std)
            shift = x.dtype.type(beta[c] - saved[0, c] * gamma[c] * inv_std)
            sum_dy, sum_xdy = 0.0, 0.0
            for n in range(outer):
                xs, ds = x[n, c], dy[n, c]
                ys, zs = y[n % y.shape[0], c % y.shape[1]], dz[n % dz.shape[0], c % dz.shape[1]]
                s, q = zero, zero
                for i in range(inner):
                    g = ds[i]
                    if add:
                        g = g if ys[i] > zero else zero
                        zs[i] = g
                    elif relu:
                        g = g if xs[i] * scale + shift > zero else zero
                    s += g
                    q += g * (xs[i] - mean)
                sum_dy += s
                sum_xdy += q
            dbeta[c], dgamma[c] = sum_dy, sum_xdy * inv_std
            k = x.dtype.type(-gamma[c] * inv_std * inv_std * inv_std * sum_xdy / count)
            k0 = x.dtype.type(-gamma[c] * inv_std * sum_dy / count)
            for n in range(outer):
                xs, out = x[n, c], dx[n, c]
                ds = dz[n % dz.shape[0], c % dz.shape[1]] if add else dy[n, c]
                for i in range(inner):
                    g = ds[i]
                    if relu and not add:
                        g = g if xs[i] * scale + shift > zero else zero
                    out[i] = g * scale + (xs[i] - mean) * k + k0

    return {"inference": inference, "forward": forward, "backward": backward}


def row_loops(prange: Any) -> dict[str, Any]:
    """x is (rows, channels)."""

    def inference(x, z, mean, var, gamma, beta, eps, relu, add, threads, y):  # type: ignore[no-untyped-def]
        rows, channels = x.shape
        zero = x.dtype.type(0)
        scale = (gamma / np.sqrt(var + eps)).astype(x.dtype)
        shift = (beta - mean * scale).astype(x.dtype)
        for t in prange(threads):
            for r in range(rows * t // threads, rows * (t + 1) // threads):
                xs, ys, zs = x[r], y[r], z[r % z.shape[0]]
                for c in range(channels):
                    v = xs[c] * scale[c] + shift[c]
                    if add:
                        v += zs[c]
                    ys[c] = max(v, zero) if relu else v

    def forward(x, z, gamma, beta, running_mean, running_var, decay, eps, relu, add, threads, y, saved):  # type: ignore[no-untyped-def]
        rows, channels = x.shape
        zero = x.dtype.type(0)
        x0 = x[0].copy()
        parts = np.zeros((threads, 2, channels))
        for t in prange(threads):
            stop = rows * (t + 1) // threads
            s, q = np.zeros(channels, x.dtype), np.zeros(channels, x.dtype)
            for start in range(rows * t // threads, stop, ROWS):
                s[:] = zero
                q[:] = zero
                for r in range(start, min(start + ROWS, stop)):
                    xs = x[r]
                    for c in range(channels):
                        d = xs[c] - x0[c]
                        s[c] += d
                        q[c] += d * d
                for c in range(channels):
                    parts[t, 0, c] += s[c]
                    parts[t, 1, c] += q[c]
        scale, shift = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
        for c in range(channels):
            delta, var = 0.0, 0.0
            for t in range(threads):
                delta += parts[t, 0, c]
                var += parts[t, 1, c]
            delta /= rows
            var = var / rows - delta * delta
            mean, inv_std = x0[c] + delta, 1 / np.sqrt(var + eps)
            saved[0, c], saved[1, c] = mean, inv_std
            running_mean[c] = decay * running_mean[c] + (1 - decay) * mean
            running_var[c] = decay * running_var[c] + (1 - decay) * var * rows / (rows - 1)
            scale[c], shift[c] = gamma[c] * inv_std, beta[c] - mean * gamma[c] * inv_std
        for t in prange(threads):
            for r in range(rows * t // threads, rows * (t + 1) // threads):
                xs, ys, zs = x[r], y[r], z[r % z.shape[0]]
                for c in range(channels):
                    v = xs[c] * scale[c] + shift[c]
                    if add:
                        v += zs[c]
                    ys[c] = max(v, zero) if relu else v

    def backward(dy, x, y, saved, gamma, beta, relu, add, threads, dx, dgamma, dbeta, dz):  # type: ignore[no-untyped-def]
        rows, channels = x.shape
        zero = x.dtype.type(0)
        mean, inv_std = saved[0].astype(x.dtype), saved[1]
        scale = (gamma * inv_std).astype(x.dtype)
        shift = (beta - saved[0] * gamma * inv_std).astype(x.dtype)
        parts = np.zeros((threads, 2, channels))
        for t in prange(threads):
            stop = rows * (t + 1) // threads
            s, q = np.zeros(channels, x.dtype), np.zeros(channels, x.dtype)
            for start in range(rows * t // threads, stop, ROWS):
                s[:] = zero
                q[:] = zero
                for r in range(start, min(start + ROWS, stop)):
                    xs, ds, ys, zs = x[r], dy[r], y[r % y.shape[0]], dz[r % dz.shape[0]]
                    for c in range(channels):
                        g = ds[c]
                        if add:
                            g = g if ys[c] > zero else zero
                            zs[c] = g
                        elif relu:
                            g = g if xs[c] * scale[c] + shift[c] > zero else zero
                        s[c] += g
                        q[c] += g * (xs[c] - mean[c])
                for c in range(channels):
                    parts[t, 0, c] += s[c]
                    parts[t, 1, c] += q[c]
        k, k0 = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
        for c in range(channels):
            sum_dy, sum_xdy = 0.0, 0.0
            for t in range(threads):
                sum_dy += parts[t, 0, c]
                sum_xdy += parts[t, 1, c]
            dbeta[c], dgamma[c] = sum_dy, sum_xdy * inv_std[c]
            k[c] = -gamma[c] * inv_std[c] * inv_std[c] * inv_std[c] * sum_xdy / rows
            k0[c] = -gamma[c] * inv_std[c] * sum_dy / rows
        for t in prange(threads):
            for r in range(rows * t // threads, rows * (t + 1) // threads):
                xs, out = x[r], dx[r]
                ds = dz[r] if add else dy[r]
                for c in range(channels):
                    g = ds[c]
                    if relu and not add:
                        g = g if xs[c] * scale[c] + shift[c] > zero else zero
                    out[c] = g * scale[c] + (xs[c] - mean[c]) * k[c] + k0[c]

    return {"inference": inference, "forward": forward, "backward": backward}
