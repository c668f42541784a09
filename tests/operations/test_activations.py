"""Activations: their values and derivatives, and that a fused one has the very bits of two calls.

An activation is applied to v, what the call would give without it. So its accuracy is measured where v is x
itself: mean 0, variance 1, eps 0.
"""

from __future__ import annotations

from dataclasses import replace

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train

from support import tolerances
from support.checks import all_same_bits, excess, gradients, same_bits
from support.problem import ACTIVATIONS, BFLOAT16, DTYPES, PIECEWISE, SMOOTH, Problem, rng
from support.reference import Call, activate

FLOAT32, FLOAT64 = DTYPES[:2]
ONE, ZERO = np.ones(1), np.zeros(1)
SHAPES = [
    Problem(3, 2, (4097,)), Problem(5, 20, (49,)), Problem(2, 65, (33,)), Problem(40, 20), Problem(17, 3),
    Problem(33, 65), Problem(9, 16, (7, 7), last=True), Problem(7, 2051), Problem(130, 64),
]  # fmt: skip


def column(values, dtype):
    return np.asarray(values, np.float64).astype(dtype)[:, None]


def apply(x, activation, **options):
    """act(x) by the library: a mean of 0 and a variance of 1 leave x as it is."""
    return batchnorm.batch_norm(x, ZERO, ONE, eps=0.0, activation=activation, **options)


def slope_at(x, dy, activation, **options):
    """dy act'(x)."""
    saved = batchnorm.Saved.of(x, ZERO, ONE, stats="fixed", activation=activation, **options)
    return backward(dy, saved, needs=("dx",)).dx


def many_values(dtype):
    """From near 0 to where every activation has ended, and around each bend."""
    least = {"float64": 760, "float16": 30}.get(dtype.name, 110)
    generator = rng(5)
    tiny = 2.0 ** -{"float64": 1070, "float16": 22}.get(dtype.name, 130)
    sizes = np.exp(generator.uniform(np.log(tiny), 0, 3000))
    bends = [
        sign * size * (1 + step) for sign in (1, -1) for size in (6, 9, 88, 104) for step in (-1e-7, 0, 1e-7)
    ]
    near = generator.normal(size=9000) * 3
    return column([*near, *generator.uniform(-least, least, 9000), *sizes, *-sizes, *bends], dtype)


def wide(a):
    return Call(a, kind=np.longdouble).wide(a)


# ---- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_derivatives(dtype, activation, isa):
    x = many_values(dtype)
    slope = float(np.float32(0.01)) if dtype != FLOAT64 else 0.01
    value, slant, _ = activate(wide(x), activation, slope)
    bound = tolerances.activation_error(dtype, value, activation)
    assert excess(wide(apply(x, activation)), value, bound) <= 1
    want = 1.5 * slant
    bound = tolerances.activation_gradient_error(dtype, wide(x), 1.5, want, activation)
    assert excess(wide(slope_at(x, np.full_like(x, 1.5), activation)), want, bound) <= 1


# Units in the last place that 1,000,000 values are off at most, and the bound, which leaves less than half a
# unit: value and derivative. silu's derivative has a root, next to which a unit is nothing.
ULPS = {
    (FLOAT32, "sigmoid"): (2.45, 4.1), (FLOAT32, "tanh"): (2.7, 4.1), (FLOAT32, "silu"): (3.55, None),
    (FLOAT64, "sigmoid"): (2.35, 4.0), (FLOAT64, "tanh"): (2.7, 4.2), (FLOAT64, "silu"): (3.2, None),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "activation"), ULPS, ids=str)
def test_within_a_few_units_in_the_last_place(dtype, activation):
    generator = rng("ulps")
    sizes = np.exp(generator.uniform(np.log(1e-6), 0, 50_000))
    x = column(
        np.concatenate(
            [generator.normal(size=100_000) * 3, generator.uniform(-30, 30, 100_000), sizes, -sizes]
        ),
        dtype,
    )
    value, slant, _ = activate(wide(x), activation)
    for got, want, most in zip(
        (apply(x, activation), slope_at(x, np.ones_like(x), activation)),
        (value, slant),
        ULPS[dtype, activation],
        strict=True,
    ):
        if most is not None:
            units = np.abs(wide(got) - want) / np.spacing(np.abs(want).astype(dtype))
            assert units.max() <= most, (float(units.max()), x[units.argmax()])


NAN, INF = np.nan, np.inf
AT_SPECIAL = {  # value and derivative at NaN, inf, -inf, 0, 6 and -1; None: not exact
    "relu": ([NAN, INF, 0, 0, 6, 0], [0, 1, 0, 0, 1, 0]),
    "leaky_relu": ([NAN, INF, -INF, 0, 6, -0.25], [0.25, 1, 0.25, 0.25, 1, 0.25]),
    "relu6": ([NAN, 6, 0, 0, 6, 0], [0, 0, 0, 0, 0, 0]),
    "sigmoid": ([NAN, 1, 0, 0.5, None, None], [NAN, 0, 0, 0.25, None, None]),
    "tanh": ([NAN, 1, -1, 0, None, None], [NAN, 0, 0, 1, None, None]),
    "silu": ([NAN, INF, -0.0, 0, None, None], [NAN, 1, -0.0, 0.5, None, None]),
}


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, activation, isa):
    slope = {"slope": 0.25} if activation == "leaky_relu" else {}
    for copies in (1, 5):  # in the tail, and in whole blocks as well
        x = column([NAN, INF, -INF, 0, 6, -1] * copies, dtype)
        y, dx = apply(x, activation, **slope), slope_at(x, np.ones_like(x), activation, **slope)
        for got, want in zip((y, dx), AT_SPECIAL[activation], strict=True):
            known = [w is not None for w in want] * copies
            value, wanted = got[known, 0].astype(np.float64), np.array(want * copies, float)[known]
            assert np.array_equal(value, wanted, equal_nan=True), (value, wanted)
        for residual in (np.zeros_like(x), None):  # by bits, if it is a piecewise linear one, or by x
            call = {"mean": ZERO, "var": ONE, "eps": 0.0, "activation": activation, "residual": residual}
            z, saved = train(x, **call, **slope)
            assert np.array_equal(z, y, equal_nan=True)
            assert np.array_equal(backward(np.ones_like(x), saved).dx, dx, equal_nan=True)
    if activation == "silu":
        assert np.signbit(y[2, 0]), "the limit from below"


@pytest.mark.parametrize("slope", [0.0, -0.0, -0.5, 1.0, 3, 1e-45, 1e-50, -1e-300, 5e-324, -1e38])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_slopes(dtype, slope):
    x = column([-np.inf, -3.0, -0.5, -0.0, 0.0, 0.5, 3.0, np.inf], dtype)
    factor = dtype.type(slope)  # 0 where the type has no number so small
    y = apply(x, "leaky_relu", slope=slope)
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.where(x > 0, x, x * factor)
    want[(factor == 0) & (x <= 0)] = 0
    assert np.array_equal(y, want)
    dy = np.nan_to_num(x[::-1], posinf=9, neginf=-9)
    dx = slope_at(x, dy, "leaky_relu", slope=slope)
    with np.errstate(over="ignore"):
        assert np.array_equal(dx, np.where(x > 0, dy, dy * factor))
    if factor == 0:
        assert np.array_equal(y, apply(x, "relu")) and np.array_equal(dx, slope_at(x, dy, "relu"))
    assert same_bits(apply(x, "leaky_relu"), apply(x, "leaky_relu", slope=0.01)), "the default"


def test_slopes_that_are_numbers():
    x = column([-1.0, 2.0, 3.0], FLOAT64)
    want = apply(x, "leaky_relu", slope=2.0)
    for slope in (2, np.float32(2), np.int64(2)):
        assert same_bits(apply(x, "leaky_relu", slope=slope), want)
    assert apply(x, "leaky_relu", slope=1e39)[0] == -1e39


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.skipif(BFLOAT16 is None, reason="ml_dtypes is not installed")
def test_bfloat16_is_rounded_once_and_to_even(activation):
    """float32 is so much wider that rounding its result is rounding the exact one, almost everywhere."""
    bits = np.arange(2**16, dtype=np.uint16)
    x = bits[(bits & 0x7F80) != 0x7F80].view(BFLOAT16)[:, None]  # all finite ones
    want = activate(x.astype(np.float64), activation)[0].astype(BFLOAT16)
    assert np.mean(apply(x, activation) == want) > 0.999
    # Halfway between two numbers: x / 2 + x / 256 for x of 8 digits, by a gamma that float32 holds.
    x = bits[(bits >> 7) == 130].view(BFLOAT16)[:, None]
    gamma = np.float32([0.5 + 2.0**-9])
    want = (x.astype(np.float64) * float(gamma[0])).astype(BFLOAT16)
    assert np.array_equal(batchnorm.batch_norm(x, ZERO, ONE, gamma, eps=0.0), want)


# ---- fused is unfused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("p", SHAPES, ids=str)
def test_fused_has_the_bits_of_two_calls(p, dtype, activation, residual, set_tuning):
    """Calls without an activation around calls of nothing but one. The derivative may be had from the sums'
    pass or again: both are the same."""
    slope = {"slope": 0.125} if activation == "leaky_relu" else {}
    for stats in ("batch", "given"):
        p = replace(p, dtype=dtype, activation=activation, residual=residual, stats=stats)
        v, plain = replace(p, activation=None).train()
        flat, dy = v.reshape(-1, 1), p.dy.reshape(-1, 1)
        gated = slope_at(flat, dy, activation, **slope).reshape(v.shape)
        want = backward(gated, plain)
        y, saved = p.train()
        assert same_bits(y, apply(flat, activation, **slope).reshape(v.shape))
        assert same_bits(saved.mean, plain.mean) and same_bits(saved.inv_std, plain.inv_std)
        needs = ("dx", "dgamma", "dbeta", *(["dresidual"] if residual else []))
        got = backward(p.dy, saved)
        assert all_same_bits(got, want)
        assert not residual or same_bits(got.dresidual, gated)
        for n in range(1, len(needs)):  # each with fewer others
            for some in (needs[:n], needs[-n:]):
                part = backward(p.dy, saved, needs=some)
                for name in needs:
                    assert (
                        same_bits(getattr(part, name), getattr(got, name))
                        if name in some
                        else getattr(part, name) is None
                    )
        set_tuning(
            "cached_bytes=0,stream_run_bytes=0,l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=0"
        )
        assert all_same_bits(gradients(backward(p.dy, saved)), gradients(got))
        x = p.x
        wide = np.zeros((2 * p.n, *x.shape[1:]), dtype)[::2]
        outs = {"out": wide} | ({"out_residual": p.dy} if residual else {})
        assert all_same_bits(gradients(backward(p.dy, saved, **outs)), gradients(got))
        set_tuning("")


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_narrow_types_compute_in_float32(dtype, activation):
    """v is not rounded to 16 bits before the activation sees it."""
    p = replace(SHAPES[1], dtype=dtype, activation=activation)
    options = p.options()
    y, saved = train(p.x, *p.parameters, **options)
    wide_y, wide_saved = train(p.x.astype(np.float32), *p.parameters, **options)
    assert same_bits(y, wide_y.astype(dtype))
    got = backward(p.dy, saved)
    want = backward(p.dy.astype(np.float32), wide_saved)
    assert same_bits(got.dx, want.dx.astype(dtype)) and same_bits(got.dgamma, want.dgamma)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_residual_is_dy_bit_for_bit(dtype):
    # Signed zeros, subnormals and the largest numbers pass as they are, with dx and alone.
    patterns = rng("patterns").integers(
        0, 2 ** (8 * dtype.itemsize), 60 * 33, f"u{dtype.itemsize}", endpoint=False
    )
    dy = patterns.view(dtype).reshape(60, 33)
    with np.errstate(invalid="ignore"):  # of NaN with a signal
        dy = np.where(np.isfinite(dy), dy, dtype.type(-0.0))
    x = rng("x").standard_normal(dy.shape).astype(dtype)
    y, saved = train(x, activation="relu", residual=x)
    want = np.where(y > 0, dy, dtype.type(0))
    for needs in (None, ("dresidual",), ("dx", "dresidual"), ("dgamma", "dresidual")):
        assert same_bits(backward(dy, saved, needs=needs).dresidual, want), needs


# ---- NaN and infinity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "relu6", *SMOOTH])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("p", SHAPES[1:7], ids=str)
def test_a_non_finite_residual_stays_where_it_is(p, value, activation):
    p = replace(p, activation=activation, residual=True)
    clean, saved = p.train()
    z = p.z
    where = tuple(n // 2 for n in z.shape)
    z[where] = value
    dirty, dirty_saved = p.train(residual=z)
    elsewhere = np.ones(z.shape, bool)
    elsewhere[where] = False
    assert same_bits(dirty[elsewhere], clean[elsewhere]) and same_bits(dirty_saved.mean, saved.mean)
    expected = activate(np.float64(value), activation)[0] if np.isfinite(value) else (
        {np.inf: {"relu6": 6, "sigmoid": 1, "tanh": 1}.get(activation, np.inf),
         -np.inf: {None: -np.inf, "tanh": -1}.get(activation, 0)}.get(value, np.nan))  # fmt: skip
    assert np.array_equal(dirty[where], expected, equal_nan=True)
    if activation in PIECEWISE:
        got = backward(p.dy, dirty_saved)
        assert all(np.isfinite(g).all() for g in gradients(got)), (
            "what is not in the open part lets nothing through"
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("p", SHAPES[1:7], ids=str)
def test_a_non_finite_dy_counts_where_the_activation_was_on(p, value):
    p = replace(p, activation="relu", residual=True)
    y, saved = p.train()
    clean = backward(p.dy, saved)
    dy, off = p.dy, y <= 0
    dy[off] = value
    assert all_same_bits(gradients(backward(dy, saved)), gradients(clean))
    where = tuple(np.argwhere(~off)[-1])
    dy[where] = value
    got = backward(dy, saved)
    assert np.argwhere(~np.isfinite(got.dresidual)).tolist() == [list(where)]
    hit = where[p.channel_axis]
    assert not np.isfinite(got.dbeta[hit]) and not np.isfinite(np.take(got.dx, hit, p.channel_axis)).any()
    assert same_bits(np.delete(got.dx, hit, p.channel_axis), np.delete(clean.dx, hit, p.channel_axis))
    assert same_bits(np.delete(got.dgamma, hit), np.delete(clean.dgamma, hit))
