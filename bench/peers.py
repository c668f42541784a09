"""The contestants. Each runs in a process of its own: ``python bench/peers.py NAME`` reads one JSON request
a line and answers each with one JSON line, so that all are alive at once and can be asked in turn, and no
two thread pools share a process.

A request names operation, dims, channel axis, dtype, activation and how often to run; the answer holds the
seconds of each run. Outputs are reused: no contestant allocates inside the measured call where its
interface allows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Call = Callable[[], object]
EPS = 1e-5


def data(dims: tuple[int, ...], dtype: str, seed: int) -> np.ndarray[Any, Any]:
    """Normal data of the named dtype, the same for every contestant."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(dims, np.float32)
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)


class Copy:
    """numpy.copyto, each thread its share of the array: a yardstick that shares no code with the library."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self.version = f"numpy.copyto by {threads} threads"

    def call(self, op: str, dims: tuple[int, ...], axis: int, dtype: str, activation: str | None) -> Call:
        x = data(dims, dtype, 1).reshape(-1)
        y = np.empty_like(x)
        y[...] = 0
        to, source = np.array_split(y, self._threads), np.array_split(x, self._threads)
        shares = list(zip(to, source, strict=True))

        def copy() -> None:
            others = [self._pool.submit(np.copyto, *share) for share in shares[1:]]
            np.copyto(*shares[0])
            for other in others:
                other.result()

        return copy


class Batchnorm:
    """This library."""

    def __init__(self, threads: int) -> None:
        import batchnorm

        batchnorm.set_num_threads(threads)
        self._batchnorm = batchnorm
        self.version = f"{batchnorm.__version__} ({batchnorm.get_isa()})"

    def call(self, op: str, dims: tuple[int, ...], axis: int, dtype: str, activation: str | None) -> Call:
        bn = self._batchnorm
        x, out = data(dims, dtype, 1), np.empty(dims, data((1,), dtype, 1).dtype)
        out[...] = 0
        channels = dims[axis]
        kind = np.float64 if dtype == "float64" else np.float32
        gamma, beta = np.ones(channels, kind), np.zeros(channels, kind)
        mean, var = np.zeros(channels, kind), np.ones(channels, kind)
        if op == "inference":
            return lambda: bn.batch_norm(x, mean, var, gamma, beta, axis=axis, activation=activation, out=out)
        if op == "forward":
            return lambda: bn.batch_norm_train(
                x, gamma, beta, running_mean=mean, running_var=var, axis=axis, activation=activation, out=out
            )
        dy = data(dims, dtype, 2)
        saved = bn.batch_norm_train(x, gamma, beta, axis=axis)
        return lambda: bn.batch_norm_backward(
            dy, x, saved.mean, saved.inv_std, gamma, beta, axis=axis, activation=activation, out=out
        )


class Torch:
    """PyTorch's native_batch_norm and native_batch_norm_backward with out=."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self.version = torch.__version__

    def call(self, op: str, dims: tuple[int, ...], axis: int, dtype: str, activation: str | None) -> Call:
        torch = self._torch
        kind = getattr(torch, dtype)

        def tensor(seed: int) -> Any:
            t = torch.from_numpy(data(dims, "float32" if dtype == "bfloat16" else dtype, seed)).to(kind)
            return t.movedim(-1, 1) if axis != 1 else t  # channels_last in memory, NCHW in name

        x = tensor(1)
        channels = dims[axis]
        parameter = kind if dtype == "float64" else torch.float32
        gamma, beta = torch.ones(channels, dtype=parameter), torch.zeros(channels, dtype=parameter)
        mean, var = torch.zeros(channels, dtype=parameter), torch.ones(channels, dtype=parameter)
        y = torch.empty_like(x)
        y.fill_(0)
        saved_mean, saved_inv_std = (
            torch.empty(channels, dtype=parameter),
            torch.empty(channels, dtype=parameter),
        )
        bn = torch.ops.aten.native_batch_norm.out
        relu = activation == "relu"
        if op in ("inference", "forward"):
            training = op == "forward"

            def forward() -> None:
                bn(
                    x,
                    gamma,
                    beta,
                    mean,
                    var,
                    training,
                    0.1,
                    EPS,
                    out=y,
                    save_mean=saved_mean,
                    save_invstd=saved_inv_std,
                )
                if relu:
                    torch.relu_(y)

            return forward
        dy = tensor(2)
        bn(x, gamma, beta, mean, var, True, 0.1, EPS, out=y, save_mean=saved_mean, save_invstd=saved_inv_std)
        dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
        dx.fill_(0)
        masked = torch.empty_like(dy)
        backward = torch.ops.aten.native_batch_norm_backward.out
        threshold = torch.ops.aten.threshold_backward.grad_input

        def back() -> None:
            g = dy
            if relu:
                threshold(dy, y, 0, grad_input=masked)
                g = masked
            backward(
                g, x, gamma, mean, var, saved_mean, saved_inv_std, True, EPS, [True, True, True],
                out0=dx, out1=dgamma, out2=dbeta,
            )  # fmt: skip

        return back


class NumPy:
    """The formula in NumPy, one temporary at a time into reused arrays; one thread."""

    def __init__(self, threads: int) -> None:
        self.version = f"{np.__version__} (1 thread)"

    def call(self, op: str, dims: tuple[int, ...], axis: int, dtype: str, activation: str | None) -> Call:
        x = data(dims, dtype, 1)
        out, t = np.empty_like(x), np.empty_like(x)
        axes = tuple(i for i in range(len(dims)) if i != axis % len(dims))
        shape = [1] * len(dims)
        shape[axis] = dims[axis]
        mean, var = np.zeros(shape, dtype), np.ones(shape, dtype)
        n = x.size // dims[axis]

        def normalise(m: Any, v: Any) -> None:
            np.subtract(x, m, out=out)
            np.multiply(out, 1 / np.sqrt(v + EPS), out=out)
            if activation == "relu":
                np.maximum(out, 0, out=out)

        if op == "inference":
            return lambda: normalise(mean, var)

        def forward() -> None:
            m = x.mean(axes, keepdims=True)
            np.subtract(x, m, out=t)
            normalise(m, np.square(t, out=t).mean(axes, keepdims=True))

        if op == "forward":
            return forward
        dy = data(dims, dtype, 2)
        m = x.mean(axes, keepdims=True)
        s = 1 / np.sqrt(x.var(axes, keepdims=True) + EPS)

        def backward() -> None:
            np.subtract(x, m, out=t)
            np.multiply(t, s, out=t)
            g = np.multiply(dy, t > 0, out=out) if activation == "relu" else dy
            dbeta = g.sum(axes, keepdims=True)
            dgamma = np.einsum(g, range(len(dims)), t, range(len(dims)), [axis % len(dims)]).reshape(shape)
            np.multiply(t, dgamma / n, out=t)
            np.add(t, dbeta / n, out=t)
            np.subtract(g, t, out=out)
            np.multiply(out, s, out=out)

        return backward


PEERS: dict[str, type[Any]] = {"copy": Copy, "batchnorm": Batchnorm, "torch": Torch, "numpy": NumPy}


def serve(name: str, threads: int) -> None:
    """Answer requests on standard input until it ends."""
    peer = PEERS[name](threads)
    print(json.dumps({"version": peer.version}), flush=True)
    key, call = None, None
    for line in sys.stdin:
        request = json.loads(line)
        case = request["case"]
        if case != key:
            call = None  # free the last case's arrays first
            call = peer.call(case["op"], tuple(case["dims"]), case["axis"], case["dtype"], case["activation"])
            key = case
        assert call is not None
        seconds = []
        for _ in range(request["warm"]):
            call()
        for _ in range(request["repeat"]):
            start = time.perf_counter()
            for _ in range(request["inner"]):
                call()
            seconds.append((time.perf_counter() - start) / request["inner"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
