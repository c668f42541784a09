"""Properties that hold for any shape, axis, memory order and data; hypothesis looks for the exception."""

from __future__ import annotations

from typing import NamedTuple

import batchnorm
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
import tolerances
from cases import AVAILABLE_DTYPES, FLOAT16, FLOAT32, FLOAT64, rng, same_bits
from checks import assert_forward, assert_gradients, precision
from reference import widen


class Problem(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    axis: int
    gamma: np.ndarray | None
    beta: np.ndarray | None
    eps: float
    seed: int

    def __repr__(self):
        """What it takes to see the case; the values follow from the seed."""
        about = (
            f"{name} {a.dtype} {a.shape} strides {a.strides}" for name, a in (("x", self.x), ("dy", self.dy))
        )
        given = [name for name, a in (("gamma", self.gamma), ("beta", self.beta)) if a is not None]
        return f"Problem({', '.join(about)}, axis={self.axis}, {given}, eps={self.eps}, seed={self.seed})"

    def forward(self, x=None, **options):
        x = self.x if x is None else x
        return batchnorm.batch_norm_train(
            x, self.gamma, self.beta, **{"axis": self.axis, "eps": self.eps, **options}
        )

    def residual(self):
        """A residual in another memory order than x's, or of its own order."""
        z = rng("residual", self.seed).standard_normal(self.x.shape).astype(self.x.dtype)
        return z if self.seed % 2 else in_memory_order(z, range(z.ndim)[::-1], ())

    def backward(self, forward, dy=None, x=None, **options):
        dy, x = self.dy if dy is None else dy, self.x if x is None else x
        return batchnorm.batch_norm_backward(
            dy, x, forward.mean, forward.inv_std, self.gamma, self.beta, **{"axis": self.axis, **options}
        )

    def channel(self, a, c):
        return np.take(a, c, axis=self.axis)


def in_memory_order(values, order, reverse):
    """The same values with the axes in another order in memory, some of them backwards."""
    base = np.ascontiguousarray(values.transpose(order))
    for axis in reverse:
        base = np.flip(np.ascontiguousarray(np.flip(base, axis)), axis)
    view = base.transpose(np.argsort(order))
    assert np.array_equal(view, values, equal_nan=True)
    return view


@st.composite
def problems(draw, dtypes=tuple(AVAILABLE_DTYPES)):
    """Normal data of any offset and scale; two values per channel at least."""
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=ndim, max_size=ndim)))
    if draw(st.booleans()):  # one long axis, over several blocks
        longest = draw(st.integers(0, ndim - 1))
        shape = (*shape[:longest], draw(st.integers(10, 300)), *shape[longest + 1 :])
    axis = draw(st.integers(-ndim, ndim - 1))
    assume(np.prod(shape) // shape[axis] > 1)
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**32))
    generator = rng(seed)
    most = 2 if dtype == FLOAT16 else 6
    scale, ratio = 10.0 ** draw(st.floats(-most / 2, most)), draw(st.sampled_from((0, 1, 10, 100, 1e4)))
    if dtype == FLOAT16:
        scale, ratio = min(scale, 10.0), min(ratio, 100)
    x = ((generator.standard_normal(shape) + ratio) * scale).astype(dtype)
    dy = generator.standard_normal(shape).astype(dtype)
    order = draw(st.permutations(range(ndim)))
    reverse = draw(st.sets(st.integers(0, ndim - 1), max_size=1))
    x, dy = (in_memory_order(a, order, reverse) for a in (x, dy))
    channels = x.shape[axis]
    kind = draw(st.sampled_from((FLOAT32, FLOAT64)))
    gamma = (generator.uniform(0.5, 2, channels) * generator.choice([-1, 1], channels)).astype(kind)
    beta = generator.standard_normal(channels).astype(kind)
    gamma, beta = draw(st.sampled_from((gamma, None))), draw(st.sampled_from((beta, None)))
    return Problem(x, dy, axis, gamma, beta, draw(st.sampled_from((0, 1e-5, 1.0))), seed)


def spreads(p):
    """Every channel has two different values, so that eps = 0 divides by something."""
    values = np.moveaxis(p.x, p.axis, 0).reshape(p.x.shape[p.axis], -1).astype(np.float64)
    return bool((values.max(axis=1) > values.min(axis=1)).all())


@given(problems())
def test_oracle(p):
    assume(p.eps > 0 or spreads(p))
    forward = p.forward()
    want = reference.train(p.x, p.gamma, p.beta, p.eps, p.axis, dtype=np.longdouble)
    assert_forward(forward.y, p.x, want, p.gamma, p.beta, p.axis)
    assert_gradients(p.backward(forward), p.dy, p.x, forward.mean, forward.inv_std, p.gamma, p.axis)
    fixed = p.backward(forward, stats="fixed")
    assert_gradients(fixed, p.dy, p.x, forward.mean, forward.inv_std, p.gamma, p.axis, "fixed")


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
    forward = batchnorm.batch_norm_train(x)
    want = reference.train(x, dtype=np.longdouble)
    assert np.isfinite(forward.y).all()
    assert_forward(forward.y, x, want)
    nsc = np.ascontiguousarray(x.transpose(0, 2, 1))
    assert_forward(batchnorm.batch_norm_train(nsc, axis=2).y.transpose(0, 2, 1), x, want)


@given(problems(), st.data())
def test_constant_channel_gives_beta(p, data):
    assume(p.eps > 0)
    c = data.draw(st.integers(0, p.x.shape[p.axis] - 1))
    index = [slice(None)] * p.x.ndim
    index[p.axis] = c
    x = p.x.copy(order="K")
    x[tuple(index)] = x.flat[0]
    y = p.forward(x).y
    beta = np.float32(0) if p.beta is None else p.beta[c]
    assert np.all(p.channel(y, c) == beta.astype(p.x.dtype))


@given(problems(dtypes=(FLOAT32, FLOAT64)), st.integers(-12, 12))
def test_scaling_by_a_power_of_two_is_exact(p, power):
    assume(p.eps > 0 or spreads(p))
    factor = p.x.dtype.type(2.0**power)
    plain, scaled = p.forward(), p.forward(p.x * factor, eps=p.eps * 4.0**power)
    assert same_bits(scaled.y, plain.y)
    assert same_bits(scaled.mean, plain.mean * 2.0**power)
    assert same_bits(scaled.inv_std, plain.inv_std * 2.0**-power)


@given(problems())
def test_gradient_is_linear(p):
    assume(p.eps > 0 or spreads(p))
    forward = p.forward()
    for stats in ("batch", "fixed"):
        one, two = (p.backward(forward, dy, stats=stats, activation="relu") for dy in (p.dy, p.dy + p.dy))
        assert same_bits(one.dgamma + one.dgamma, two.dgamma) and same_bits(one.dbeta + one.dbeta, two.dbeta)
        normal = np.abs(one.dx.astype(np.float64)) > 2.0**-14  # below, float16 rounds to other steps
        assert same_bits((one.dx + one.dx)[normal], two.dx[normal])


@given(problems(), st.data())
def test_non_finite_values_stay_in_their_channel(p, data):
    assume(p.eps > 0 or spreads(p))
    flat = data.draw(st.integers(0, p.x.size - 1))
    index = np.unravel_index(flat, p.x.shape)
    x = p.x.copy(order="K")
    x[index] = data.draw(st.sampled_from((np.nan, np.inf, -np.inf)))
    clean, dirty = p.forward(), p.forward(x)
    hit = index[p.axis]
    assert np.isnan(p.channel(dirty.y, hit).astype(np.float64)).all()
    assert not np.isfinite(dirty.mean[hit])
    assert same_bits(np.delete(clean.y, hit, p.axis), np.delete(dirty.y, hit, p.axis))
    clean_gradients, gradients = p.backward(clean), p.backward(dirty, x=x)
    assert same_bits(np.delete(clean_gradients.dx, hit, p.axis), np.delete(gradients.dx, hit, p.axis))
    assert same_bits(np.delete(clean_gradients.dgamma, hit), np.delete(gradients.dgamma, hit))


@given(problems(), st.sampled_from((None, "relu")))
def test_inference_after_decay_zero_equals_training(p, activation):
    assume(p.eps > 0 or spreads(p))
    channels = p.x.shape[p.axis]
    mean, var = np.zeros(channels), np.ones(channels)
    trained = p.forward(running_mean=mean, running_var=var, decay=0, running_ddof=0, activation=activation)
    inferred = batchnorm.batch_norm(
        p.x, mean, var, p.gamma, p.beta, eps=p.eps, axis=p.axis, activation=activation
    )
    assert same_bits(trained.y, inferred)


@given(problems(), st.data())
def test_order_of_axes_does_not_matter(p, data):
    assume(p.x.shape[p.axis] > 1 and (p.eps > 0 or spreads(p)))
    order = data.draw(st.permutations(range(p.x.ndim)))
    axis = order.index(p.axis % p.x.ndim)
    plain, moved = p.forward(), p.forward(p.x.transpose(order), axis=axis)
    assert same_bits(moved.y, plain.y.transpose(order))
    assert same_bits(moved.mean, plain.mean) and same_bits(moved.inv_std, plain.inv_std)


@given(problems())
def test_relu_is_the_maximum_with_zero(p):
    assume(p.eps > 0 or spreads(p))
    assert np.array_equal(p.forward(activation="relu").y, np.maximum(p.forward().y, p.x.dtype.type(0)))


@given(problems())
def test_in_place_is_the_same(p):
    assume(p.eps > 0 or spreads(p))
    want = p.forward()
    x = p.x.copy(order="K")
    got = p.forward(x, out=x)
    assert got.y is x and same_bits(x, want.y)
    dy = p.dy.copy(order="K")
    want_gradients = p.backward(want)
    gradients = p.backward(want, dy, out=dy)
    assert gradients.dx is dy and all(same_bits(a, b) for a, b in zip(gradients, want_gradients, strict=True))


@given(problems(), st.sampled_from(("batch", "fixed")))
def test_gradient_of_the_residual_is_dy_where_the_forward_let_through(p, stats):
    assume(p.eps > 0 or spreads(p))
    forward = p.forward(activation="relu", residual=p.residual())
    assert len(forward.activation_mask) == batchnorm.activation_mask_bytes(p.x, axis=p.axis)
    needs = ("dx", "dgamma", "dbeta", "dresidual")
    got = p.backward(
        forward, activation="relu", activation_mask=forward.activation_mask, needs=needs, stats=stats
    )
    assert same_bits(got.dresidual, np.where(forward.y > 0, p.dy, p.dy.dtype.type(0)))
    plain = p.backward(forward, got.dresidual, stats=stats)
    assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True))


@given(problems())
def test_a_residual_is_added(p):
    assume(p.eps > 0 or spreads(p))
    z, plain = p.residual(), p.forward()
    got = p.forward(residual=z)
    assert same_bits(got.mean, plain.mean) and same_bits(got.inv_std, plain.inv_std)
    y = widen(plain.y, np.longdouble)
    total = y + widen(z, np.longdouble)
    # One rounding of the sum, and that of the plain y, which was stored before z came to it.
    error = tolerances.u_compute(p.x.dtype) * np.abs(total) + tolerances.stored(p.x.dtype, y, 0.0)
    assert np.all(np.abs(widen(got.y, np.longdouble) - total) <= tolerances.stored(p.x.dtype, total, error))
    zero = p.forward(residual=np.zeros_like(p.x))
    assert np.array_equal(zero.y, plain.y)


@given(problems())
def test_inference_matches_the_reference(p):
    channels = p.x.shape[p.axis]
    generator = rng("inference", p.x.shape)
    mean, var = generator.standard_normal(channels), generator.uniform(0.5, 2, channels)
    want = reference.normalize(p.x, mean, var, p.gamma, p.beta, p.eps, p.axis, dtype=precision(p.x.dtype))
    got = batchnorm.batch_norm(p.x, mean, var, p.gamma, p.beta, eps=p.eps, axis=p.axis)
    if p.x.dtype == FLOAT16:
        assume(np.abs(want.y).max() < 60000)
    assert_forward(got, p.x, want, p.gamma, p.beta, p.axis, exact_mean=True)
