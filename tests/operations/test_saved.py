"""`Saved`: what a forward leaves for its backward, what it copies, what it refers to, and what it notices."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import tracemalloc
import weakref
from dataclasses import replace

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_double_backward as double_backward
from batchnorm import batch_norm_train as train

from support.checks import all_same_bits, gradients, same_bits
from support.layouts import place
from support.problem import ACTIVATIONS, DTYPES, Problem, rng

pytestmark = pytest.mark.quick
FLOAT32, FLOAT64, FLOAT16 = DTYPES[:3]


def problem(**options):
    return Problem(6, 4, (5,), **options)


# ---- what it says ----------------------------------------------------------------------------------------


def test_results_are_a_pair():
    result = problem().train()
    y, saved = result
    assert type(result) is batchnorm.TrainResult and result.y is y and result.saved is saved
    assert isinstance(saved, batchnorm.Saved)


@pytest.mark.parametrize("size", [None, 6, 3, 4])
@pytest.mark.parametrize("stats", ["batch", "given", "renorm"])
def test_statistics_have_rows_if_parts_were_asked_for(stats, size):
    p = problem(stats=stats, size=size)
    _, saved = p.train()
    shape = (4,) if size is None else (len(p.starts), 4)
    names = ["mean", "var", "inv_std", "count", *(["r", "d"] if stats == "renorm" else [])]
    for name in names:
        a = getattr(saved, name)
        assert a.shape == shape and a.dtype == np.float64, name
        with pytest.raises(ValueError, match="read-only"):
            a[...] = 0
    assert saved.parts == len(p.starts)
    kept = saved.mean
    del saved
    gc.collect()
    assert np.isfinite(kept).all(), "a view outlives its Saved"


def test_it_says_what_the_call_was():
    p = problem(activation="leaky_relu", last=True, keep="y", eps=1e-3)
    _, saved = p.train()
    assert (saved.shape, saved.dtype, saved.channel_axis % 3, saved.keeps) == ((6, 5, 4), FLOAT32, 2, "y")
    assert (saved.activation, saved.slope, saved.eps) == ("leaky_relu", 0.125, 1e-3)
    assert all_same_bits((saved.gamma, saved.beta), p.parameters)
    assert saved.kept_channels.tolist() == [] and saved.nbytes > 0 and not saved.updated
    assert "(6, 5, 4)" in repr(saved) and "'y'" in repr(saved)
    _, saved = train(p.x)
    assert saved.gamma is None and saved.beta is None and saved.activation is None and saved.keeps == "x"
    assert saved.channel_axis == 1 and not saved.has_residual
    _, saved = train(np.ones((4, 2, 3, 2)) * np.arange(4)[:, None, None, None], channel_axis=(3, 1))
    assert saved.channel_axis in ((1, 3), (3, 1)) and saved.mean.shape == (2, 2)


def test_copies_are_itself_and_pickling_is_refused():
    _, saved = problem().train()
    assert copy.copy(saved) is saved and copy.deepcopy([saved])[0] is saved
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(saved)
    saved.note = "mine"
    assert saved.note == "mine"
    with pytest.raises(TypeError):
        batchnorm.Saved()


# ---- what it copies and what it refers to ----------------------------------------------------------------


@pytest.mark.parametrize("positions", ["mask", "lengths", "mask and weights", "mask per channel"])
def test_an_optimiser_step_in_between_changes_nothing(positions):
    p = problem(positions=positions, affine="NC", activation="relu", residual=True, stats="renorm")
    options = {name: a.copy() if isinstance(a, np.ndarray) else a for name, a in p.options().items()}
    gamma, beta = (a.copy() for a in p.parameters)
    want = gradients(backward(p.dy, p.train()[1]))
    _, saved = train(p.x, gamma, beta, **options)
    for a in (gamma, beta, options["renorm"]["mean"], options["renorm"]["std"], options["residual"]):
        a[...] = 7
    for name in ("mask", "lengths", "weights"):
        if name in options:
            options[name][...] = 1
    assert all_same_bits(gradients(backward(p.dy, saved)), want)


def alive(keep, activation=None, residual=False):
    """Which of x, y and residual a Saved holds."""
    p = problem(keep=keep, activation=activation, residual=residual)
    x, z = p.x.copy(), p.z.copy()
    y, saved = train(x, *p.parameters, **p.options(**({"residual": z} if residual else {})))
    references = [weakref.ref(a) for a in (x, y, z)]
    del x, y, z
    gc.collect()
    assert saved.keeps == keep
    return [name for name, r in zip("xyz", references, strict=True) if r() is not None]


def test_what_it_keeps_alive():
    assert alive("x") == ["x"] and alive("y") == ["y"] and alive(None) == []
    assert alive("x", "relu", True) == ["x"], "bits tell where the activation was on"
    assert alive("x", "silu", True) == ["x", "z"] and alive(None, "silu", True) == []
    assert alive("x", None, True) == ["x"]


def test_bytes():
    x = np.ones((8, 64, 32, 32), np.float32) * np.arange(8, dtype=np.float32)[:, None, None, None]
    plain = train(x).saved.nbytes
    bits = train(x, residual=x, activation="relu").saved.nbytes
    assert plain < 8192 and x.size // 8 <= bits - plain <= x.size // 8 + 4096
    mask = train(x, mask=x < 7).saved.nbytes
    assert mask - plain <= x.size // 8 + 4096, "a mask of x's shape is a bit per element"
    gamma = np.ones(64, np.float32)
    gamma[:3] = 0
    saved = train(x, gamma, keep="y").saved
    assert saved.kept_channels.tolist() == [0, 1, 2] and saved.nbytes - plain >= x.nbytes * 3 / 64


def test_memory_of_training_in_place():
    """With y and gradients in place there is no array beyond some vectors and the channels kept: 2 of 64."""
    x, dy = (np.ones((16, 64, 40, 40), np.float32) for _ in range(2))
    x[::2] = 3
    gamma = np.full(64, -2, np.float32)
    gamma[:2] = 0
    for activation in (None, "leaky_relu"):
        batchnorm.empty_cache()
        tracemalloc.start()
        try:
            _, saved = train(x, gamma, activation=activation, keep="y", out=x)
            backward(dy, saved, out=dy)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < x.nbytes * 3 / 64 + 100_000


def test_it_is_not_used_up_and_serves_threads():
    p = Problem(16, 20, (49,), activation="silu", residual=True)
    _, saved = p.train()
    want, found = gradients(backward(p.dy, saved)), []
    dy = p.dy

    def work():
        for _ in range(20):
            found.append(all_same_bits(gradients(backward(dy, saved)), want))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 80 and all(found)


# ---- keep=None, keep="y" ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_x_may_come_with_backward(activation, residual):
    p = problem(activation=activation, residual=residual, positions="mask", size=4)
    want = gradients(backward(p.dy, p.train()[1]))
    _, saved = p.train(keep=None)
    given = {"x": p.x} | ({"residual": p.z} if activation in ("sigmoid", "tanh", "silu") and residual else {})
    assert all_same_bits(gradients(backward(p.dy, saved, **given)), want)
    with pytest.raises(RuntimeError, match=r"keep=None.*x="):
        backward(p.dy, saved)
    if "residual" in given:
        with pytest.raises((RuntimeError, ValueError), match="residual"):
            backward(p.dy, saved, x=p.x)
    with pytest.raises(ValueError, match="x has shape"):
        backward(p.dy, saved, **(given | {"x": p.x[1:]}))
    with pytest.raises(TypeError, match="x has dtype float64"):
        backward(p.dy, saved, **(given | {"x": p.x.astype(FLOAT64)}))


def test_x_is_refused_where_it_is_there():
    p = problem(residual=True, activation="silu")
    for name in ("x", "residual"):
        with pytest.raises(ValueError, match=name):
            backward(p.dy, p.train()[1], **{name: p.x})


@pytest.mark.parametrize("rows", [(), (6,)], ids=["of all samples", "of each sample"])
def test_it_says_gamma_and_beta_whatever_their_strides(rows):
    p = problem()
    wide = rng("wide").standard_normal((2, *rows, 4, 3))
    gamma, beta = np.asfortranarray(wide[0, ..., 0]), wide[1, ..., 1]
    _, saved = train(p.x, gamma, beta)
    assert np.array_equal(saved.gamma, gamma) and np.array_equal(saved.beta, beta)


def test_dtypes_of_gradients_of_absent_parameters():
    """That of the other parameter, if it is there; else float64 for float64 data and float32 for the rest."""
    for x, gamma, want in (
        (FLOAT64, FLOAT32, FLOAT32), (FLOAT32, FLOAT64, FLOAT64), (FLOAT64, None, FLOAT64),
        (FLOAT16, None, FLOAT32),
    ):  # fmt: skip
        data = rng("dtypes").standard_normal((6, 4)).astype(x)
        _, saved = train(data, None if gamma is None else np.ones(4, gamma))
        got = backward(data, saved, needs=("dgamma", "dbeta"))
        assert got.dgamma.dtype == got.dbeta.dtype == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_y_is_kept_as_long_as_it_tells_x(dtype):
    """Around the threshold |gamma| / |beta|: just above it y has lost less than a third of the digits, just
    below x is kept. gamma may have any sign, and be 0."""
    u = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype.name]
    limit = u ** (1 / 3) / (1 - u ** (1 / 3))
    p = Problem(8, 5, (100,), dtype=dtype)
    gamma, beta = np.array([1.01, 0.99, -1.01, -0.99, 0]) * limit, np.array([1.0, 1.0, -1.0, 1.0, 1])
    saved = train(p.x, gamma, beta, keep="y").saved
    assert saved.kept_channels.tolist() == [1, 3, 4]
    got = backward(p.dy, saved)
    want = backward(p.dy.astype(FLOAT64), train(p.x.astype(FLOAT64), gamma, beta).saved)
    scale = np.abs(want.dx).max(axis=(0, 2), keepdims=True) + 1e-300
    off = np.abs(got.dx.astype(FLOAT64) - want.dx) / scale
    assert off[:, [1, 3]].max() < 64 * u and off[:, [0, 2]].max() < 64 * u ** (2 / 3)


def test_r_and_d_count_as_gamma_and_beta():
    """y = gamma r x_hat + (beta + gamma d): a large d hides x as a large beta does, and so does a small r."""
    p = Problem(8, 4, (100,))
    mean, std = np.array([0, 1e6, 0, 0]), np.array([1, 1, 1e6, 1e-6])
    call = {"gamma": np.full(4, 0.5), "beta": np.ones(4), "renorm": {"mean": mean, "std": std}}
    saved = train(p.x, keep="y", **call).saved
    assert saved.kept_channels.tolist() == [1, 2]
    want, got = backward(p.dy, train(p.x, **call).saved), backward(p.dy, saved)
    scale = np.abs(want.dx).max(axis=(0, 2), keepdims=True)
    assert (np.abs(got.dx - want.dx) / scale).max() < 1e-4
    assert np.allclose(got.dgamma, want.dgamma, rtol=1e-3)


def test_outputs_at_the_ends_of_float16():
    p = Problem(4, 4, (100,), dtype=FLOAT16)
    saved = train(p.x, np.array([1.0, 4000.0, 1e-6, 1e-3]), keep="y").saved
    assert saved.kept_channels.tolist() == [
        1,
        2,
    ]  # y may overflow; y holds a few units of the smallest number


@pytest.mark.parametrize("slope", [2.0**-60, 0.01, 2.0, 2.0**60])
def test_slopes_that_y_can_be_had_back_through(slope):
    p = Problem(6, 4, (9,), dtype=FLOAT64, activation="leaky_relu", slope=slope, keep="y")
    p.check()
    for bad in (0.0, -0.1, slope * 2.0 ** (-61 if slope < 1 else 61)):
        with pytest.raises(ValueError, match=r"slope.*keep|keep.*slope|slope.*2\*\*-60"):
            p.train(slope=bad)


@pytest.mark.parametrize("layout", ["C", "channels last", "C, reverse 1", "batch last", "C, crop 1", "F"])
def test_kept_channels_in_any_layout(layout):
    p = Problem(4, 20, (5, 7), keep="y", layout=layout)
    gamma, beta = (a.copy() for a in p.parameters)
    gamma[[0, 7]] = 0
    saved = train(p.x, gamma, beta, keep="y").saved
    assert saved.kept_channels.tolist() == [0, 7]
    want = backward(p.dy, train(p.x, gamma, beta).saved)
    got = backward(p.dy, saved)
    assert np.allclose(got.dx, want.dx, atol=1e-5) and np.allclose(got.dgamma, want.dgamma, rtol=1e-4)
    assert not got.dx[:, [0, 7]].any()


# ---- what it notices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["x", "y"])
@pytest.mark.parametrize("change", ["double", "add", "refill", "nan"])
def test_an_overwritten_tensor_is_noticed(keep, change):
    p = Problem(8, 4, (16,), keep=keep)
    x = p.x
    y, saved = train(x, *p.parameters, keep=keep)
    tensor = x if keep == "x" else y
    want, before = gradients(backward(p.dy, saved)), tensor.copy()
    tensor[...] = {"double": 2 * before, "add": before + 1, "refill": p.z, "nan": before * np.nan}[change]
    with pytest.raises(RuntimeError, match=f"{keep}.*overwritten"):
        backward(p.dy, saved)
    tensor[...] = before
    assert all_same_bits(gradients(backward(p.dy, saved)), want)


def test_nan_and_refilled_padding_are_no_change():
    x = rng("nan").standard_normal((6, 4, 5))
    x[:, 1] = np.nan
    backward(x, train(x).saved)
    lengths = np.array([5, 3, 1, 2, 1, 1])
    saved = train(x, lengths=lengths).saved
    want = backward(np.ones_like(x), saved).dx
    for i, n in enumerate(lengths):
        x[i, :, n:] = 1e30
    assert same_bits(backward(np.ones_like(x), saved).dx, want)


def test_a_smooth_activations_residual_is_watched():
    p = Problem(8, 4, (16,), residual=True, activation="silu")
    z = p.z
    saved = p.train(residual=z)[1]
    z *= 2
    with pytest.raises(RuntimeError, match=r"residual.*overwritten"):
        backward(p.dy, saved)
    z = p.z
    saved = p.train(residual=z, out=z)[1]
    with pytest.raises(RuntimeError, match="residual"):
        backward(p.dy, saved)


@pytest.mark.parametrize("gaps", ["C", "C, step 0"])
def test_out_over_x_wants_keep_y(gaps):
    p = problem(activation="leaky_relu", layout=gaps)
    x = p.x
    y, saved = train(x, *p.parameters, **p.options(out=x))
    assert y is x and same_bits(y, p.train()[0]), "whitening needs no backward"
    with pytest.raises(RuntimeError, match=r"""keep=["']y["']"""):
        backward(p.dy, saved)
    x = p.x
    y, saved = train(x, *p.parameters, **p.options(out=x, keep="y"))
    got, want = backward(p.dy, saved), backward(p.dy, p.train()[1])
    assert np.allclose(got.dx, want.dx, atol=1e-5)


@pytest.mark.parametrize("keep", ["x", "y"])
def test_gradients_over_the_kept_tensor(keep):
    p = problem(keep=keep)
    x = p.x
    y, saved = train(x, *p.parameters, keep=keep)
    want = gradients(backward(p.dy, saved))
    kept = x if keep == "x" else y
    got = backward(p.dy, saved, out=kept)
    assert got.dx is kept and all_same_bits(gradients(got), want)
    with pytest.raises(RuntimeError, match=f"{keep}|overwritten"):
        backward(p.dy, saved)


# ---- Saved.of --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", ["all", "mask", "lengths", "mask and weights", "mask per channel"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_it_can_be_made_of_stored_statistics(activation, positions, dtype):
    for stats, affine, residual in (("batch", "C", True), ("given", "NC", False), ("batch", None, False)):
        p = problem(
            stats=stats,
            affine=affine,
            activation=activation,
            residual=residual,
            positions=positions,
            dtype=dtype,
        )
        saved = p.train()[1]
        left_out = ("eps", "keep", "mean", "var")
        options = {name: a for name, a in p.options().items() if name not in left_out}
        kind = {"batch": "batch", "given": "fixed"}[stats]
        again = batchnorm.Saved.of(p.x, saved.mean, saved.inv_std, *p.parameters, stats=kind, **options)
        assert all_same_bits(gradients(backward(p.dy, again)), gradients(backward(p.dy, saved)))
        got, want = (double_backward(p.dy, s, ddx=p.dy) for s in (again, saved))
        assert all(a is b is None or same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_float32_statistics_are_taken_for_what_they_are():
    p = problem(dtype=FLOAT64)
    saved = p.train()[1]
    narrow = saved.mean.astype(np.float32), saved.inv_std.astype(np.float32)
    results = [
        gradients(backward(p.dy, batchnorm.Saved.of(p.x, *s)))
        for s in (narrow, [a.astype(FLOAT64) for a in narrow])
    ]
    assert all_same_bits(*results)


def test_the_long_form_is_an_error_that_spells_the_new_line():
    p = problem()
    saved = p.train()[1]
    for rest in ((p.x, saved.mean, saved.inv_std), (p.x, saved.mean, saved.inv_std, *p.parameters), (p.x,)):
        with pytest.raises(TypeError, match=r"Saved\.of\(x, mean, inv_std, gamma"):
            backward(p.dy, *rest)


def test_parts_and_saved_of_any_view():
    """A Saved of a call on views serves gradients in any other memory."""
    p = Problem(4, 6, (5, 8), size=3, residual=True, activation="tanh", layout="channels last, crop 1")
    _, saved = p.train()
    want = backward(p.dy, saved)
    for layout in ("C", "F", "C, reverse 2"):
        got = backward(place(p.user(p.data.dy), layout).view, saved)
        assert got.dx.strides == want.dx.strides and all_same_bits(gradients(got), gradients(want))
    assert replace(p, layout="C").failures() == []
