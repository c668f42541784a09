"""Arrays of other libraries, and whatever NumPy can read: taken where they are only read, without a copy."""

from __future__ import annotations

import array
import importlib
import tracemalloc

import batchnorm
import numpy as np
import pytest
from batchnorm import _arrays, batch_norm, moments
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train
from batchnorm._arrays import as_array

from support.checks import all_same_bits, gradients, same_bits
from support.problem import Problem

P = Problem(6, 3, (4, 5), residual=True)


class ByDlpack:
    """A tensor of a library that knows DLPack alone."""

    def __init__(self, values, device=1):
        self._values, self._device = values, device

    def __dlpack_device__(self):
        return self._device, 0

    def __dlpack__(self, **options):
        return self._values.__dlpack__(**options)


class ByInterface:
    def __init__(self, values):
        self._values = values
        self.__array_interface__ = values.__array_interface__


class ByArray:
    def __init__(self, values):
        self._values = values

    def __array__(self, dtype=None, copy=None):
        return self._values


KINDS = [ByDlpack, ByInterface, ByArray, memoryview]


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_that_is_read_may_be_foreign(kind):
    x, dy, z, (gamma, beta) = P.x, P.dy, P.z, P.parameters
    mask, weights, steps = np.arange(6) > 0, np.linspace(0, 1, 6), np.full(6, 4)
    plain = {"residual": z, "mask": mask, "weights": weights}
    y, saved = train(x, gamma, beta, **plain, activation="relu")
    foreign = {name: kind(value) for name, value in plain.items()}
    got, held = train(kind(x), kind(gamma), kind(beta), **foreign, activation="relu")
    assert type(got) is np.ndarray and same_bits(got, y)
    assert all_same_bits(gradients(backward(kind(dy), held)), gradients(backward(dy, saved)))
    mean, var = moments(kind(x), lengths=kind(steps), lengths_axis=2)
    assert all_same_bits((mean, var), moments(x, lengths=steps, lengths_axis=2))
    assert same_bits(batch_norm(kind(x), kind(mean), kind(var)), batch_norm(x, mean, var))
    assert same_bits(batchnorm.Moments(nodata=9).update(kind(x)).mean, moments(x).mean)
    layer, other = batchnorm.BatchNorm(), batchnorm.BatchNorm()
    assert same_bits(layer(kind(x)), other(x)) and same_bits(layer.backward(kind(dy)), other.backward(dy))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_copy(kind):
    x = P.x
    assert np.shares_memory(as_array("x", kind(x), False), x)


def test_sequences_of_numbers_are_values_per_channel_and_position():
    x, mean, var, beta = P.x, np.arange(3.0), np.array([1.0, 2, 4]), np.full(3, 0.5)
    y = batch_norm(x, [0, 1, 2], (1.0, 2.0, 4.0), array.array("f", [1, 2, 3]), [0.5] * 3)
    assert same_bits(y, batch_norm(x, mean, var, np.array([1.0, 2, 3]), beta))
    kept = [True] * 5 + [False]
    assert same_bits(train(x, mask=kept).y, train(x, mask=np.array(kept)).y)
    assert same_bits(train(x, lengths=[4] * 6, lengths_axis=2).y, train(x).y)
    assert same_bits(train(x, weights=[1, 2] * 3).y, train(x, weights=np.array([1.0, 2] * 3)).y)


@pytest.mark.parametrize("library, make", [
    ("torch", lambda torch, x: torch.from_numpy(x)),
    ("jax.numpy", lambda jnp, x: jnp.asarray(x)),
    ("pandas", lambda pandas, x: pandas.DataFrame(x)),
])  # fmt: skip
def test_arrays_of(library, make):
    try:
        module = importlib.import_module(library)
    except ImportError:
        pytest.skip(f"{library} is not installed")
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    assert same_bits(train(make(module, x)).y, train(x).y)


def test_tensors_whose_sign_is_said_aside():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = np.random.default_rng(0).standard_normal((8, 3)) + 5
    tensor = torch.complex(torch.zeros(8, 3).double(), torch.from_numpy(x)).conj().imag
    assert tensor.is_neg()
    assert same_bits(moments(tensor).mean, moments(-x).mean) and same_bits(train(tensor).y, train(-x).y)


def test_what_makes_a_masked_array_is_taken_as_one():
    x = np.ma.masked_greater(P.x, 1)
    assert all_same_bits(moments(ByArray(x)), moments(x))
    for call in (train, lambda a: batch_norm(a, np.zeros(3), np.ones(3)), batchnorm.BatchNorm(3)):
        with pytest.raises(TypeError, match="x is a masked array, whose mask would be ignored"):
            call(ByArray(x))


def requires_grad(x):
    tensor = ByDlpack(x)
    tensor.requires_grad = True
    return tensor


@pytest.mark.parametrize("value, words", [
    (lambda x: ByDlpack(x, 2), "on a device of CUDA, which wants the CUDA build, expected an array on"),
    (lambda x: ByDlpack(x, 99), "on a device of type 99, which wants the CUDA build"),
    (requires_grad, r"that requires a gradient.*; use x.detach\(\), or batchnorm.torch"),
    (lambda x: x.tolist(), "x is of type list, expected a numpy.ndarray of float32"),
    (lambda x: "x", r"x is 'x' \(str\), expected a numpy.ndarray"),
    (lambda x: np.float32(1), "x is .*numpy.float32.*, expected a numpy.ndarray"),
    (lambda x: ByArray([1, "a", {}]), "which NumPy cannot read"),
    (lambda x: ByArray(np.array(["a"])), "x has dtype <U1, expected float32"),
])  # fmt: skip
def test_what_is_refused(value, words, monkeypatch):
    monkeypatch.setattr(_arrays, "gpu_extension", lambda: None)  # as published
    with pytest.raises(TypeError, match=words):
        train(value(P.x))


@pytest.mark.parametrize("gamma", [[1, 2, "a"], [[1, 2], [3]], 3, True])
def test_lists_of_something_else_are_refused(gamma):
    with pytest.raises(TypeError, match=r"gamma is .*, expected a float32 or float64 array of shape"):
        train(P.x, gamma)


def test_what_is_written_is_never_converted():
    x = P.x
    vector = ByDlpack(np.zeros(3))
    with pytest.raises(TypeError, match=r"out is .*ByDlpack"):
        train(x, out=ByDlpack(np.zeros_like(x)))
    with pytest.raises(TypeError, match=r"running_mean is .*ByDlpack"):
        train(x, running_mean=vector, running_var=np.ones(3))


# ---- what is copied ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [0, 1, (0, 1)], ids=str)
def test_nothing_is_copied_of_an_x_that_runs_backwards(axes):
    x = np.flip(np.zeros((4, 8, 5000), np.float32), axes)
    out, statistics = np.empty(x.shape, x.dtype), (np.zeros(8), np.ones(8))
    tracemalloc.start()
    try:
        batch_norm(x, *statistics, out=out)
        moments(x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 4


def test_vectors_need_no_alignment():
    x, (mean, var, gamma, beta) = P.x, (np.arange(3.0) + i for i in range(1, 5))
    want = batch_norm(x, mean, var, gamma, beta)

    def moved(a):
        memory = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype)
        memory[:] = a
        return memory

    assert same_bits(batch_norm(x, *map(moved, (mean, var, gamma, beta))), want)


def test_running_statistics_beside_an_axis_of_length_one():
    x = P.x[..., 0, :1]
    mean, var = np.zeros((3, 3))[:, :1], np.ones((3, 3))[:, :1]  # whose stride on that axis says nothing
    train(x, running_mean=mean, running_var=var, channel_axis=(1, 2), decay=0)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, x.var(0, ddof=1), rtol=1e-6)


def test_an_operand_that_is_copied_may_not_overlap_an_output():
    memory = np.zeros(300, np.float32)
    x, out = np.ones((4, 3, 5, 4), np.float32), memory[:240].reshape(4, 3, 5, 4)
    residual = memory[60:].reshape(4, 3, 4, 5).swapaxes(2, 3)
    with pytest.raises(ValueError, match="out overlaps residual"):
        batch_norm(x, np.zeros(3), np.ones(3), residual=residual, out=out)
    assert not memory.any()
