"""Properties that hold for any sizes, memory, options and data; hypothesis looks for the exception."""

from __future__ import annotations

from dataclasses import replace

import batchnorm
import numpy as np
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from support import reference, tolerances
from support.checks import all_same_bits, excess, gradients, same_bits
from support.problem import ACTIVATIONS, AFFINES, DTYPES, POSITIONS, STATS, Problem, rng

FLOAT32, FLOAT64 = DTYPES[:2]
LAYOUTS = (
    "C",
    "F",
    "channels last",
    "batch last",
    "channels first",
    "C, step 0",
    "C, reverse 1",
    "C, crop -1",
    "channels last, reverse 0",
)


@st.composite
def problems(draw, dtypes=tuple(DTYPES), **fixed):
    """Any sizes and options that are served; two values per channel at least."""
    inner = tuple(draw(st.lists(st.integers(1, 7), max_size=2)))
    if draw(st.booleans()):  # one long axis, over several blocks
        inner = (*inner, draw(st.integers(10, 300)))[-2:]
    options = dict(
        n=draw(st.integers(1, 12)), channels=draw(st.integers(1, 40)), inner=inner, last=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)), stats=draw(st.sampled_from(STATS)),
        size=draw(st.none() | st.integers(1, 12)),
        positions=draw(st.sampled_from(POSITIONS)), affine=draw(st.sampled_from(AFFINES)),
        activation=draw(st.sampled_from(ACTIVATIONS)), slope=draw(st.sampled_from((0.125, 0.01, -0.5, 3.0))),
        residual=draw(st.booleans()), keep=draw(st.sampled_from("xy")), running=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)), eps=draw(st.sampled_from((1e-5, 1.0))),
        seed=draw(st.integers(0, 2**32)),
    )  # fmt: skip
    p = Problem(**(options | fixed))
    assume(p.forbidden() is None and not (p.keep == "y" and p.slope < 0 and p.activation == "leaky_relu"))
    assume((reference.forward(p.call()).values > 1).any())
    return p


def plain(**fixed):
    return problems(
        **({"stats": "batch", "positions": "all", "size": None, "keep": "x", "residual": False} | fixed)
    )


@given(problems())
def test_oracle(p):
    p.check()


LARGEST = float(np.float32(1e30))
FLOATS = st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=True)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 40)),
        elements=FLOATS,
        fill=FLOATS,
    )
)
def test_oracle_on_any_numbers(x):
    c = reference.Call(x, kind=np.longdouble)
    f = reference.forward(c)
    for last in (False, True):
        y = train(np.ascontiguousarray(np.moveaxis(x, 1, 2)) if last else x, channel_axis=-1 if last else 1).y
        assert np.isfinite(y).all()
        assert excess(np.moveaxis(y, 2, 1) if last else y, f.y, tolerances.forward(c, f, FLOAT32).y) <= 1


@given(plain(), st.data())
def test_constant_channel_gives_beta(p, data):
    c = data.draw(st.integers(0, p.channels - 1))
    x = p.x
    np.moveaxis(x, p.channel_axis, 0)[c] = x.flat[0]
    beta = p.parameters[1]
    rows = 0 * p.data.beta[:, c] if beta is None else np.broadcast_to(beta[..., c], (p.n,))
    y = train(x, *p.parameters, **p.options(activation=None, slope=None)).y
    want = np.broadcast_to(rows.reshape(-1, *[1] * len(p.inner)), (p.n, *p.inner)).astype(p.dtype)
    assert np.array_equal(np.take(y, c, p.channel_axis), want)


@given(plain(dtypes=(FLOAT32, FLOAT64)), st.integers(-12, 12))
def test_scaling_by_a_power_of_two_is_exact(p, power):
    x = p.x
    one = train(x, *p.parameters, **p.options())
    other = train(x * p.dtype.type(2.0**power), *p.parameters, **p.options(eps=p.eps * 4.0**power))
    assert same_bits(one.y, other.y) and same_bits(one.saved.mean * 2.0**power, other.saved.mean)
    assert same_bits(one.saved.inv_std * 2.0**-power, other.saved.inv_std)


@given(problems(activation="relu", keep="x"))
def test_gradient_is_linear(p):
    _, saved = p.train()
    one, two = (backward(dy, saved) for dy in (p.dy, p.dy + p.dy))
    for a, b in zip(gradients(one), gradients(two), strict=True):
        normal = np.abs(a.astype(FLOAT64)) > 2.0**-14  # below, float16 rounds to other steps
        assert same_bits((a + a)[normal], b[normal])


@given(
    problems(
        stats="batch",
        positions="all",
        size=None,
        affine="C",
        activation=None,
        residual=False,
        dtypes=(FLOAT64,),
    )
)
def test_gradients_of_x_sum_to_nothing(p):
    _, saved = p.train()
    dx = p.plain(backward(p.dy, saved).dx)
    x_hat = (p.data.x - saved.mean[:, None]) * saved.inv_std[:, None]
    size = (
        np.abs(p.parameters[0] * saved.inv_std)
        * np.abs(p.data.dy).sum(axis=(0, 2))
        * (1 + np.abs(x_hat).max()) ** 2
    )
    assert np.all(np.abs(dx.sum(axis=(0, 2))) <= 1e-11 * (1 + size))


@given(plain(), st.data())
def test_non_finite_values_stay_in_their_channel(p, data):
    x = p.x
    index = np.unravel_index(data.draw(st.integers(0, x.size - 1)), x.shape)
    clean = p.train()
    before = backward(p.dy, clean.saved)
    x[index] = data.draw(st.sampled_from((np.nan, np.inf, -np.inf)))
    dirty = train(x, *p.parameters, **p.options())
    hit, axis = index[p.channel_axis], p.channel_axis
    assert np.isnan(np.take(dirty.y, hit, axis).astype(FLOAT64)).all() and not np.isfinite(
        dirty.saved.mean[hit]
    )
    after = backward(p.dy, dirty.saved)
    for a, b in ((clean.y, dirty.y), (before.dx, after.dx)):
        assert same_bits(np.delete(a, hit, axis), np.delete(b, hit, axis))
    if p.affine is not None:
        assert same_bits(np.delete(before.dgamma, hit, -1), np.delete(after.dgamma, hit, -1))


@given(problems(running=False))
def test_what_does_not_count_is_not_read(p):
    assume("mask" in p.positions or p.positions == "lengths")
    counts = p.user(np.broadcast_to(p.call().mask, p.data.x.shape))
    want = p.results()
    spoiled = [p.x, p.z, p.dy]
    for a, value in zip(spoiled, (np.nan, np.inf, np.nan), strict=True):
        a[~counts] = value
    y, saved = train(
        spoiled[0], *p.parameters, **p.options(**({"residual": spoiled[1]} if p.residual else {}))
    )
    got = backward(spoiled[2], saved)
    assert (
        same_bits(y, want["y"])
        and same_bits(got.dx, want["dx"])
        and not y[~counts].any()
        and not got.dx[~counts].any()
    )
    assert all_same_bits(gradients(got)[1:], [want[n] for n in ("dgamma", "dbeta", "dresidual") if n in want])


@given(plain(positions="all", affine="C", layout="C"), st.data())
def test_weights_repeat_and_masks_leave_out(p, data):
    """Integer weights are copies, a mask is a shorter batch: the same gradients to rounding."""
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=p.n, max_size=p.n)))
    assume(times.sum() * p.spread > 1 and (times > 0).sum() * p.spread > 1)
    p = replace(p, dtype=FLOAT64)
    x = np.repeat(p.x, times, axis=0)
    want, f = train(x, *p.parameters, **p.options(residual=None))
    got, g = train(p.x, *p.parameters, **p.options(weights=times))
    near = dict(rtol=1e-9, atol=1e-9)
    assert np.allclose(np.repeat(got, times, axis=0), want, **near) and np.allclose(g.mean, f.mean, **near)
    masked, h = train(p.x, *p.parameters, **p.options(mask=times > 0))
    rest, r = train(p.x[times > 0], *p.parameters, **p.options())
    assert np.allclose(masked[times > 0], rest, **near) and not masked[times == 0].any()
    assert np.allclose(backward(p.dy, h).dx[times > 0], backward(p.dy[times > 0], r).dx, rtol=1e-7, atol=1e-7)


@given(plain(), st.data())
def test_order_of_axes_does_not_matter(p, data):
    x = p.x
    assume(p.affine != "NC" and p.channels > 1)  # a single channel is a row or a column
    order = data.draw(st.permutations(range(x.ndim)))
    moved = train(
        x.transpose(order), *p.parameters, **p.options(channel_axis=order.index(p.channel_axis % x.ndim))
    )
    y, saved = p.train()
    assert same_bits(moved.y, y.transpose(order)) and same_bits(moved.saved.mean, saved.mean)


@given(problems(keep="x"))
def test_in_place_is_the_same(p):
    y, saved = p.train()
    want = gradients(backward(p.dy, saved))
    x, dy = (a.copy(order="K") for a in (p.x, p.dy))
    try:
        got = train(x, *p.parameters, **p.options(out=x)).y
        dx = backward(dy, saved, out=dy)
    except (
        ValueError
    ) as error:  # samples are not the slowest axis in memory: rows or parts of them need a copy
        assert "numpy.empty" in str(error) and (p.affine == "NC" or p.size is not None)
        return
    assert got is x and same_bits(x, y) and all_same_bits(gradients(dx), want)


@given(problems(stats="given", size=None, running=False))
def test_inference_is_training_with_given_statistics(p):
    options = {name: a for name, a in p.options().items() if name not in ("mean", "var", "keep", "weights")}
    assert same_bits(
        batchnorm.batch_norm(p.x, p.data.mean, p.data.var, *p.parameters, **options), p.train()[0]
    )


@given(
    st.integers(1, 6),
    st.integers(2, 50),
    st.sampled_from((1e-100, 1.0, 1e150)),
    st.integers(0, 99),
)
def test_float64_of_any_magnitude_is_right(channels, n, size, seed):
    x = rng("range", seed).standard_normal((n, channels)) * size
    y, saved = train(x, eps=0.0)
    dx = backward(np.ones_like(x) + x / size, saved).dx
    want, one = train(x / size, eps=0.0)
    scale = 1e-9 * (1 + np.abs(one.inv_std).max() ** 2)
    assert np.allclose(y, want, rtol=1e-9, atol=scale)
    assert np.allclose(dx * size, backward(np.ones_like(x) + x / size, one).dx, rtol=1e-6, atol=100 * scale)
