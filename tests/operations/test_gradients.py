"""Gradients: the reference against differences of itself, the library against differences of its own forward,
and what holds of any gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_double_backward as double_backward
from batchnorm import batch_norm_train as train

from support import reference
from support.checks import all_same_bits, gradients, same_bits
from support.problem import ACTIVATIONS, DTYPES, STATS, Problem, rng

FLOAT32, FLOAT64 = DTYPES[:2]
NEEDS = ("dx", "dgamma", "dbeta", "dresidual")

# ---- the reference is right ------------------------------------------------------------------------------


def frozen(c: reference.Call, first: reference.Forward) -> reference.Forward:
    """The forward with r and d as they were: gradients take them for constants."""
    f = reference.forward(replace(c, renorm=None))
    gamma, beta = c.affine()
    v = (
        f.x_hat * gamma * c.rows(first.r)
        + beta
        + gamma * c.rows(first.d)
        + np.where(f.counts, c.wide(c.residual), 0)
    )
    y = np.where(f.counts, reference.activate(v, c.activation, c.kind(c.slope))[0], 0)
    return f._replace(v=v, y=y, r=first.r, d=first.d)


STEP = np.longdouble(1e-6)


def slopes(loss, a, step=STEP):
    """Central differences of loss with respect to each element of a."""
    made = np.zeros(a.shape, np.longdouble)
    for i in np.ndindex(a.shape):
        up, down = a.copy(), a.copy()
        up[i] += step
        down[i] -= step
        made[i] = (loss(up) - loss(down)) / (2 * step)
    return made


REFERENCE = [
    dict(
        stats=stats,
        size=size,
        positions=positions,
        affine=affine,
        activation=ACTIVATIONS[i % 7],
        residual=i % 3 == 0,
    )
    for i, (stats, size, positions, affine) in enumerate(
        itertools.product(
            STATS, (None, 3), ("all", "mask", "mask and weights", "mask per channel"), ("C", "NC")
        )
    )
]


@pytest.mark.parametrize("options", REFERENCE, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_the_reference_differentiates_itself(options):
    """First and second order in extended precision: nothing else checks what all other tests rely on."""
    p = Problem(5, 3, (2,), dtype=FLOAT64, **options)
    c, g = p.call(), rng("cotangents")
    c = replace(
        c,
        **{n: c.wide(getattr(c, n)) for n in ("x", "gamma", "beta", "residual") if getattr(c, n) is not None},
    )
    f, dy = reference.forward(c), c.wide(p.data.dy)
    ddx, ddz, ddgamma, ddbeta = (
        c.wide(g.standard_normal(s)) for s in (dy.shape, dy.shape, c.gamma.shape, c.gamma.shape)
    )
    ddz = ddz if p.residual else None
    np.testing.assert_allclose(frozen(c, f).y, f.y, rtol=1e-15)
    first = reference.backward(c, f, dy)
    second = reference.double_backward(c, f, dy, ddx, ddgamma, ddbeta, ddz)

    def forward_loss(**change):
        return (frozen(replace(c, **change), f).y * dy).sum()

    def backward_loss(dy=dy, **change):
        d = replace(c, **change)
        b = reference.backward(d, frozen(d, f), dy)
        total = (b.dx * ddx).sum() + (b.dgamma * ddgamma).sum() + (b.dbeta * ddbeta).sum()
        return total + (0 if ddz is None else (b.dresidual * ddz).sum())

    for name in ("x", "gamma", "beta", *(["residual"] if p.residual else [])):
        for loss, got in ((forward_loss, first), (backward_loss, second)):
            want = slopes(lambda a, loss=loss, name=name: loss(**{name: a}), getattr(c, name))
            value = getattr(got, "d" + name)
            np.testing.assert_allclose(
                value, want, rtol=1e-7, atol=1e-7 * (1 + np.abs(want).max()), err_msg=name
            )
    np.testing.assert_allclose(second.ddy, slopes(lambda a: backward_loss(dy=a), dy), rtol=1e-7, atol=1e-8)


def test_the_reference_has_the_textbook_numbers():
    """x = 0, 1, 2, 3 in one channel: mean 1.5, variance 1.25; by hand."""
    c = reference.Call(
        np.arange(4.0).reshape(4, 1, 1), gamma=np.array([[2.0]]), beta=np.array([[1.0]]), eps=0
    )
    f = reference.forward(c)
    s = 1 / np.sqrt(1.25)
    assert (f.mean, f.var, f.n, f.values) == (1.5, 1.25, 4, 4)
    np.testing.assert_allclose(f.y.ravel(), 1 + 2 * s * np.array([-1.5, -0.5, 0.5, 1.5]), rtol=1e-15)
    b = reference.backward(c, f, np.array([1.0, 0, 0, 0]).reshape(4, 1, 1))
    assert b.dbeta == 1 and np.isclose(b.dgamma, -1.5 * s)
    np.testing.assert_allclose(
        b.dx.ravel(),
        2 * s * (np.array([1, 0, 0, 0]) - 0.25 + 1.5 * np.array([-1.5, -0.5, 0.5, 1.5]) / 5),
        atol=1e-15,
    )
    mean, var = reference.running(c, f, np.zeros(1), np.ones(1), 0.9)
    assert np.isclose(mean, 0.15) and np.isclose(var, 0.9 + 0.1 * 5 / 3)


SHAPES = [
    Problem(6, 4), Problem(3, 4, (5,)), Problem(3, 4, (5,), last=True), Problem(2, 3, (3, 2)), Problem(5, 19),
    Problem(2, 17, (2,)), Problem(19, 5),
]  # fmt: skip


# ---- what holds of any gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"residual": True, "activation": "relu"}, {"stats": "given"}, {"affine": "NC", "size": 2}],
    ids=str,
)
def test_needs_selects_without_changing_bits(options, dtype):
    p = Problem(4, 5, (23,), dtype=dtype, **options)
    _, saved = p.train()
    full = backward(p.dy, saved)
    there = NEEDS if p.residual else NEEDS[:3]
    for count in range(len(there) + 1):
        for needs in itertools.combinations(there, count):
            for kind in (tuple, list, set):
                got = backward(p.dy, saved, needs=kind(needs))
                for name in NEEDS:
                    value = getattr(got, name)
                    assert same_bits(value, getattr(full, name)) if name in needs else value is None, (
                        needs,
                        name,
                    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, (7,)), (12, 3, (7,)), (9, 7, ()), (9, 70, (2,))], ids=str)
def test_one_parameter_of_each_sample_beside_one_of_all(shape, last):
    """The bits are those of the latter repeated for each sample, and its gradient is the sum of theirs."""
    for activation, which in itertools.product((None, "relu", "leaky_relu", "silu"), (0, 1)):
        for keep in ("x", "y") if activation in (None, "leaky_relu") else ("x",):
            p = Problem(*shape, last=last and bool(shape[2]), activation=activation, affine="NC", keep=keep)
            rows = [a.copy() for a in p.parameters]
            rows[1 - which][:] = rows[1 - which][0]
            mixed = [a if i == which else a[0].copy() for i, a in enumerate(rows)]
            call = {"channel_axis": p.channel_axis, "activation": activation, "keep": keep}
            y, saved = train(p.x, *mixed, **call)
            want_y, want_saved = train(p.x, *rows, **call)
            assert same_bits(y, want_y)
            got, want = backward(p.dy, saved), backward(p.dy, want_saved)
            assert same_bits(got.dx, want.dx) and same_bits(got[1 + which], want[1 + which])
            summed = want[2 - which].sum(axis=0, dtype=np.float64)
            size = np.abs(want[2 - which]).sum(axis=0)
            assert (np.abs(got[2 - which] - summed) <= 2e-6 * size).all()
            second, plain = (
                double_backward(p.dy, s, ddx=p.x, ddgamma=g[0], ddbeta=g[1])
                for s, g in ((saved, mixed), (want_saved, rows))
            )
            assert same_bits(second.ddy, plain.ddy) and same_bits(second.dx, plain.dx)


@pytest.mark.parametrize("beta_dtype", [None, FLOAT32, FLOAT64], ids=lambda t: f"beta {t}")
@pytest.mark.parametrize("gamma_dtype", [None, FLOAT32, FLOAT64], ids=lambda t: f"gamma {t}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_types_of_their_parameters(dtype, gamma_dtype, beta_dtype):
    p = Problem(4, 5, (23,), dtype=dtype)
    gamma, beta = (
        None if t is None else v.astype(t)
        for v, t in zip(p.parameters, (gamma_dtype, beta_dtype), strict=True)
    )
    y, saved = train(p.x, gamma, beta)
    got = backward(p.dy, saved)
    assert type(got) is batchnorm.Gradients and len(got) == 3 and got.dresidual is None
    assert got.dx.dtype == dtype and got.dx.shape == p.x.shape and y.dtype == dtype
    for value, kind in ((got.dgamma, gamma_dtype), (got.dbeta, beta_dtype)):
        assert value is None if kind is None else value.dtype == kind and value.shape == (5,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stats", ["batch", "given"])
@pytest.mark.parametrize("sizes", [(0, 3, ()), (0, 3, (4,)), (2, 3, (0,)), (0, 3, (0,))], ids=str)
def test_empty_batch(sizes, stats, dtype):
    for options in ({}, {"residual": True, "activation": "relu"}, {"activation": "silu"}):
        p = Problem(*sizes, dtype=dtype, stats=stats, running=True, **options)
        running = p.options()
        y, saved = train(p.x, *p.parameters, **running)
        assert y.shape == p.x.shape and y.dtype == dtype
        assert np.isnan(saved.mean).all() or stats == "given"
        assert same_bits(running["running_mean"], p.data.running_mean) and not saved.updated
        got = backward(p.dy, saved)
        assert got.dx.shape == p.x.shape and got.dx.dtype == dtype
        assert not got.dgamma.any() and not got.dbeta.any() and got.dgamma.shape == (3,)
        assert got.dresidual is None or got.dresidual.shape == p.x.shape


def test_parts_of_an_empty_batch():
    x = np.empty((0, 3, 5), np.float32)
    y, saved = train(x, np.ones(3), virtual_batch_size=4)
    assert y.shape == x.shape and saved.mean.ndim == 2
    assert not backward(x, saved).dgamma.any()


@pytest.mark.parametrize("keep", ["x", "y"])
def test_gradients_of_a_channel_of_zero_gamma(keep):
    """Zero-initialised residual branches: dgamma is there, dx is 0."""
    p = Problem(6, 3, (5,), keep=keep)
    gamma = np.float32([0, 1, -0.0])
    y, saved = train(p.x, gamma, np.float32([1, 2, 3]), keep=keep)
    got = backward(p.dy, saved)
    want = backward(p.dy, train(p.x).saved, needs=("dx", "dgamma"))
    assert not got.dx[:, ::2].any() and np.allclose(got.dgamma, want.dgamma, rtol=1e-5)
    assert (y[:, 0] == 1).all() and (y[:, 2] == 3).all()


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150, 1e290])
def test_extreme_weights_leave_gradients_finite(scale):
    for dtype in DTYPES[:2]:
        x = rng("weights").standard_normal((4, 2)).astype(dtype)
        weights = np.array([1.0, 2, 3, 4])
        want = train(x, weights=weights)
        got = train(x, weights=weights * scale)
        dx, wanted = (backward(x[::-1], f.saved).dx for f in (got, want))
        assert np.allclose(got.y, want.y, rtol=1e-6) and np.allclose(got.saved.mean, want.saved.mean)
        assert np.allclose(dx, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_infinite_and_extreme_values_of_dy(dtype):
    x = (rng("dy").standard_normal((8, 3)) - 0.5).astype(dtype)
    x[0] = 2
    gamma = np.ones(3, np.float32)
    saved = train(x, gamma, gamma).saved
    for value in (np.inf, -np.inf):
        dy = np.ones_like(x)
        dy[0, 0] = value
        got = backward(dy, saved)
        assert got.dgamma[0] == value and got.dbeta[0] == value
        assert np.isfinite(got.dx[:, 1:]).all() and np.isfinite(got.dgamma[1:]).all()
    size = dtype.type(1e300 if dtype == FLOAT64 else 3e37)
    big, small = (backward(x / 8 * factor, saved).dx for factor in (size, 1))
    assert np.isfinite(big).all() and np.allclose(big / size, small, rtol=1e-3, atol=1e-5)


def test_gradients_leave_arguments_alone():
    p = Problem(4, 5, (23,), residual=True, activation="silu")
    arrays = [p.x, p.z, p.dy, *p.parameters]
    copies = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    x, z, dy, gamma, beta = arrays
    y, saved = train(x, gamma, beta, residual=z, activation="silu")
    got = backward(dy, saved)
    double_backward(dy, saved, ddx=dy)
    assert all_same_bits(arrays, copies)
    assert all(a.flags.writeable for a in (y, *gradients(got)))
