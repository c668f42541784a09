"""`num_threads=` of a call: the same bits, no thread beyond it, and nothing left of it afterwards."""

from __future__ import annotations

import os
import threading

import batchnorm
import numpy as np
import pytest

from cases import DTYPES, FLOAT32, THREADS, Shape, gradient_of, normal, parameters, residual_of
from processes import output

SHAPES = [
    Shape("ncs", 3, 33, 700), Shape("ncs", 2, 2, 17000), Shape("nsc", 3500, 20, 1), Shape("nsc", 1100, 64, 1),
    Shape("nsc", 40, 2051, 1), Shape("ncs", 2, 3, 5),
]  # fmt: skip
SHARED = "parallel_elements=0"


def everything(shape, dtype, **options):
    """The bytes of what every function that takes num_threads makes of data of this shape."""
    x, dy, z = (make(shape, dtype) for make in (normal, gradient_of, residual_of))
    gamma, beta = parameters(shape.channels)
    mean, var = batchnorm.moments(x, **options)
    activation_mask = np.zeros(batchnorm.activation_mask_bytes(x), np.uint8)
    activated = {"activation": "relu", **options}
    y = batchnorm.batch_norm(
        x, mean, var, gamma, beta, residual=z, activation_mask=activation_mask, **activated
    )
    forward = batchnorm.batch_norm_train(x, gamma, beta, residual=z, **activated)
    gradients = batchnorm.batch_norm_backward(
        dy, x, forward.mean, forward.inv_std, gamma, beta, activation_mask=forward.activation_mask,
        needs=("dx", "dgamma", "dbeta", "dresidual"), **activated,
    )  # fmt: skip
    results = (
        mean,
        var,
        y,
        activation_mask,
        *forward,
        forward.activation_mask,
        *gradients,
        gradients.dresidual,
    )
    return [np.ascontiguousarray(a).tobytes() for a in results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits(shape, dtype, threads, set_tuning):
    want = everything(shape, dtype, num_threads=None)
    for tuning in ("", SHARED):
        set_tuning(tuning)
        for n in (*THREADS, 65536, np.int64(2)):
            assert everything(shape, dtype, num_threads=n) == want, n
            assert batchnorm.get_num_threads() == threads


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 8, 8, 3)], ids=str)
def test_with_arrays_that_are_copied_first(shape, set_tuning):
    # A crop, which takes another way through the checks than an array that can be used as it is.
    set_tuning(SHARED)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)[:, :, 1:-1, 1:-1]
    want = batchnorm.batch_norm_train(x, residual=x, activation="relu")
    got = batchnorm.batch_norm_train(x, residual=x, activation="relu", num_threads=3)
    assert np.array_equal(got.y, want.y) and np.array_equal(got.activation_mask, want.activation_mask)
    assert np.array_equal(batchnorm.moments(x, num_threads=3), batchnorm.moments(x))
    kept = batchnorm.moments(x, num_threads=3, keepdims=True)
    assert kept.mean.shape == (1, x.shape[1], 1, 1)


@pytest.mark.parametrize("default", [1, 3])
def test_several_threads_of_python_with_a_number_each(default, set_tuning):
    shape = SHAPES[0]
    set_tuning(SHARED)
    want = everything(shape, FLOAT32)
    before = batchnorm.get_num_threads()
    wrong = []

    def work(n):
        for _ in range(10):
            if everything(shape, FLOAT32, num_threads=n) != want or batchnorm.get_num_threads() != default:
                wrong.append(n)

    try:
        batchnorm.set_num_threads(default)
        workers = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, None)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong
    finally:
        batchnorm.set_num_threads(before)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system lists no threads in /proc")
def test_how_many_threads_there_are():
    # OpenMP starts its threads when they are first needed, and keeps them.
    code = """
        import os, numpy as np, batchnorm as b
        x = np.random.default_rng(0).standard_normal((8, 32, 40, 40)).astype(np.float32)
        f = b.batch_norm_train(x, num_threads=1)
        calls = (
            lambda n: b.moments(x, num_threads=n),
            lambda n: b.batch_norm(x, f.mean, f.inv_std, num_threads=n),
            lambda n: b.batch_norm_train(x, num_threads=n),
            lambda n: b.batch_norm_backward(x, x, f.mean, f.inv_std, num_threads=n),
        )
        def started():
            return len(os.listdir("/proc/self/task")) - before
        b.set_num_threads(8)
        before = len(os.listdir("/proc/self/task"))
        for call in calls:
            call(1)
            print(started(), end=" ")
        for n, call in enumerate(calls, start=2):
            call(n)
            print(started(), end=" ")
        calls[0](None)
        print(started())
    """
    assert output(code) == "0 0 0 0 1 2 3 4 7"
