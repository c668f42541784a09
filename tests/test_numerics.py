"""The numerics contract: ill-conditioned data, constants, NaN and Inf, subnormals, extremes, identities."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import reference
import tolerances
from cases import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    SOME_SHAPES,
    Shape,
    gradient_of,
    needs_bfloat16,
    normal,
    parameters,
    rng,
    same_bits,
)
from checks import assert_forward, assert_gradients, precision

RATIOS = (0, 1, 10, 1e2, 1e3, 1e4, 1e5, 1e6)
CONDITION_SHAPES = [
    Shape("ncs", 1, 3, 2), Shape("ncs", 2, 5, 7), Shape("ncs", 8, 6, 49), Shape("ncs", 3, 3, 4097),
    Shape("ncs", 1, 2, 40001), Shape("nsc", 3, 5, 1), Shape("nsc", 64, 17, 1), Shape("nsc", 400, 64, 1),
    Shape("nsc", 9001, 3, 1), Shape("nsc", 700, 100, 1),
]  # fmt: skip
WIDE = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)


def ill_conditioned(shape, dtype, ratio):
    """Values with |mean| / std = ratio (before rounding to dtype); channels differ in sign and scale."""
    generator = rng("ill", str(shape), ratio)
    z = generator.standard_normal((shape.outer, shape.channels, shape.inner))
    std = 2.0 ** generator.uniform(-8, 8, (shape.channels, 1))
    sign = generator.choice([-1, 1], (shape.channels, 1))
    return shape.array(((z + sign * ratio) * std).astype(dtype))


# ---- mean and variance ---------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", CONDITION_SHAPES, ids=str)
def test_variance_of_float32_within_one_ulp(shape, ratio):
    x = ill_conditioned(shape, FLOAT32, ratio)
    mean, var = reference.moments(x, dtype=np.longdouble)
    got = batchnorm.moments(x)
    assert np.all(tolerances.ulp_distance(got.var, var) <= 1)
    assert np.all(np.abs(got.mean - mean) <= tolerances.mean_error(FLOAT32, mean, np.sqrt(var)))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", CONDITION_SHAPES, ids=str)
def test_variance_of_float64_within_1e_14(shape, ratio):
    x = ill_conditioned(shape, FLOAT64, ratio)
    mean, var = reference.moments(x, dtype=np.longdouble)
    got = batchnorm.moments(x)
    assert np.all(np.abs(got.var - var) <= 1e-14 * var)
    assert np.all(np.abs(got.mean - mean) <= tolerances.mean_error(FLOAT64, mean, np.sqrt(var)))


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("distribution", ["standard_normal", "standard_exponential", "random"])
@pytest.mark.parametrize(
    "shape",
    [
        *(
            Shape("nsc", *size, 1)
            for size in ((250, 64), (500, 64), (511, 127), (512, 300), (8191, 9), (16385, 33))
        ),
        *(Shape("ncs", 1, 64, 16383), Shape("ncs", 64, 16, 255)),
    ],
    ids=str,
)
def test_variance_of_float64_where_additions_are_many(shape, distribution, offset):
    # The longest chains of additions between two merges, in many channels: rounding must stay below 1e-14.
    generator = rng("chains", str(shape), distribution)
    for _ in range(3):
        x = getattr(generator, distribution)((shape.outer, shape.channels, shape.inner)) + offset
        _, var = reference.moments(x, dtype=np.longdouble)
        got = batchnorm.moments(shape.array(x)).var
        assert np.all(np.abs(got - var) <= 1e-14 * var)


# Sums are taken about some value of the channel; these put that value where it hurts.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [3, 30, 1e3, 1e4])
@pytest.mark.parametrize("where", [0, 1, -1])
@pytest.mark.parametrize(
    "shape", [Shape("ncs", 2, 3, 10001), Shape("ncs", 30, 3, 49), Shape("nsc", 20002, 3, 1)], ids=str
)
def test_one_value_far_off(shape, where, distance, dtype):
    x = normal(shape, dtype)
    row, column = (where, 0) if shape.inner == 1 else (0 if where >= 0 else -1, where)
    x[row, 1:, column] = distance * np.array([1, -1])
    mean, var = reference.moments(x, dtype=np.longdouble)
    got = batchnorm.moments(x)
    assert np.all(np.abs(got.var - var) <= tolerances.var_error(dtype) * var)
    assert np.all(np.abs(got.mean - mean) <= tolerances.mean_error(dtype, mean, np.sqrt(var)))


@WIDE
@pytest.mark.parametrize("shape", [Shape("ncs", 4, 3, 5001), Shape("nsc", 20004, 3, 1)], ids=str)
def test_drifting_mean(shape, dtype):
    # A mean that wanders by 1000 standard deviations along the channel: tiles, rows and images all have
    # different ones.
    x = normal(shape, dtype)
    drift = np.linspace(0, 4000, shape.count).reshape(shape.outer, 1, shape.inner)
    x = shape.array((x + drift).astype(dtype))
    mean, var = reference.moments(x, dtype=np.longdouble)
    got = batchnorm.moments(x)
    assert np.all(np.abs(got.var - var) <= tolerances.var_error(dtype) * var)
    assert np.all(np.abs(got.mean - mean) <= tolerances.mean_error(dtype, mean, np.sqrt(var)))


@pytest.mark.parametrize("shape", [Shape("ncs", 64, 3, 3136), Shape("nsc", 100_000, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT16, pytest.param(BFLOAT16, marks=needs_bfloat16)], ids=str)
def test_sums_of_narrow_types_do_not_overflow(shape, dtype):
    # Sums reach 6e9 and 4e14, far beyond float16's 65504, and stop growing at 256 and 2048 if added up in 8
    # or 11 bits.
    x = shape.like((shape.outer, shape.channels, shape.inner), dtype, dtype.type(60000))
    x[::2] = dtype.type(50000)
    mean, var = reference.moments(x, dtype=np.longdouble)
    got = batchnorm.batch_norm_train(x)
    assert np.all(np.abs(got.mean - mean) <= tolerances.mean_error(dtype, mean, np.sqrt(var)))
    np.testing.assert_allclose(got.inv_std, 1 / np.sqrt(var.astype(np.float64) + 1e-5), rtol=1e-11)
    assert_forward(got.y, x, reference.train(x))
    dy = shape.like((shape.outer, shape.channels, shape.inner), dtype, dtype.type(50000))
    gradients = batchnorm.batch_norm_backward(dy, x, got.mean, got.inv_std)
    np.testing.assert_array_equal(
        gradients.dbeta, np.full(3, np.float32(dy[0, 0, 0]) * np.float32(shape.count))
    )


# ---- y and dx ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", CONDITION_SHAPES, ids=str)
def test_normalised_value_within_contract(shape, ratio):
    x = ill_conditioned(shape, FLOAT32, ratio)
    for eps in (0, 1e-5):
        want = reference.train(x, eps=eps, dtype=np.longdouble)
        got = batchnorm.batch_norm_train(x, eps=eps)
        error = np.abs(got.y - want.y)
        assert np.all(error <= tolerances.NORMALIZED_FLOAT32 * np.maximum(1, np.abs(want.y)))
        y = batchnorm.batch_norm(x, want.mean.astype(np.float64), want.var.astype(np.float64), eps=eps)
        error = np.abs(y - want.y)
        assert np.all(error <= tolerances.NORMALIZED_FLOAT32 * np.maximum(1, np.abs(want.y)))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CONDITION_SHAPES, ids=str)
def test_forward_and_backward_of_ill_conditioned_data(shape, dtype, ratio):
    if dtype == FLOAT16 and ratio > 100:
        ratio = 100  # beyond, float16 overflows or holds constants
    x, dy = ill_conditioned(shape, dtype, ratio), gradient_of(shape, dtype)
    gamma, beta = parameters(shape.channels)
    got = batchnorm.batch_norm_train(x, gamma, beta)
    want = reference.train(x, gamma, beta, dtype=np.longdouble)
    assert_forward(got.y, x, want, gamma, beta)
    gradients = batchnorm.batch_norm_backward(dy, x, got.mean, got.inv_std, gamma, beta)
    assert_gradients(gradients, dy, x, got.mean, got.inv_std, gamma)


@pytest.mark.parametrize("ratio", RATIOS)
def test_float32_statistics_serve_inference_on_ill_conditioned_data(ratio):
    # Given statistics are taken at their word: with a rounded mean y is that of the rounded mean, to the same
    # few half-ulps.
    shape = Shape("ncs", 8, 6, 49)
    x = ill_conditioned(shape, FLOAT32, ratio)
    mean, var = (v.astype(np.float32) for v in reference.moments(x))
    want = reference.normalize(x, mean, var, dtype=np.longdouble)
    assert_forward(batchnorm.batch_norm(x, mean, var), x, want, exact_mean=True)


# ---- constants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SOME_SHAPES, *CONDITION_SHAPES], ids=str)
def test_constant_channel_gives_beta_exactly(shape, dtype, eps):
    generator = rng("constant", str(shape))
    constants = (
        generator.standard_normal(shape.channels) * 10.0 ** generator.uniform(-4, 4, shape.channels)
    ).astype(dtype)
    x = shape.like((shape.outer, shape.channels, shape.inner), dtype, constants[:, None])
    gamma, beta = parameters(shape.channels)
    got = batchnorm.batch_norm_train(x, gamma, beta, eps=eps)
    want = np.broadcast_to(beta.astype(dtype)[:, None], x.shape)
    np.testing.assert_array_equal(got.y, want)
    np.testing.assert_array_equal(got.mean, constants.astype(np.float64))
    assert same_bits(batchnorm.batch_norm_train(x, gamma, eps=eps).y, np.zeros_like(x))
    # dx is finite and what the formula says: dy without its mean.
    dy = gradient_of(shape, dtype)
    gradients = batchnorm.batch_norm_backward(dy, x, got.mean, got.inv_std, gamma, beta)
    # sum of dy * x - mean * sum of dy: the terms cancel to a few roundings in double; to nothing in float64
    # data, and where the float next to the mean was subtracted first.
    terms = np.abs(dy.astype(np.float64)).sum((0, 2)) * np.abs(got.mean * got.inv_std)
    roundings = 0 if dtype == np.float64 else np.where(np.abs(got.mean * got.inv_std) > 128, 0, 16)
    assert (np.abs(gradients.dgamma) <= roundings * 2.0**-53 * terms).all()
    if dtype != FLOAT16:
        assert_gradients(gradients, dy, x, got.mean, got.inv_std, gamma)


# ---- NaN and Inf ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SOME_SHAPES, Shape("nsc", 40, 9, 1), Shape("ncs", 3, 40, 5)], ids=str)
def test_non_finite_values_stay_in_their_channel(shape, dtype, value):
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    gamma, beta = parameters(shape.channels)
    clean = batchnorm.batch_norm_train(x, gamma, beta)
    clean_gradients = batchnorm.batch_norm_backward(dy, x, clean.mean, clean.inv_std, gamma, beta)
    hit = shape.channels // 2
    for row, column in ((0, 0), (-1, -1), (shape.outer // 2, shape.inner // 2)):
        dirty_x = x.copy(order="K")
        dirty_x[row, hit, column] = value
        dirty = batchnorm.batch_norm_train(dirty_x, gamma, beta)
        assert not np.isfinite(dirty.mean[hit]) and not dirty.inv_std[hit] > 0
        assert np.isnan(dirty.y[:, hit].astype(np.float64)).all()
        gradients = batchnorm.batch_norm_backward(dy, dirty_x, dirty.mean, dirty.inv_std, gamma, beta)
        assert np.isnan(gradients.dx[:, hit].astype(np.float64)).all() and np.isnan(gradients.dgamma[hit])
        dirty_dy = dy.copy(order="K")
        dirty_dy[row, hit, column] = value
        from_dy = batchnorm.batch_norm_backward(dirty_dy, x, clean.mean, clean.inv_std, gamma, beta)
        assert not np.isfinite(from_dy.dbeta[hit])
        pairs = [*zip(clean, dirty, strict=True), *zip(clean_gradients, gradients, strict=True)]
        pairs += zip(clean_gradients, from_dy, strict=True)
        for a, b in pairs:
            axis = 1 if a.ndim > 1 else 0
            assert same_bits(np.delete(a, hit, axis), np.delete(b, hit, axis))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_passes_inf_and_nan_on(dtype, value):
    x = normal(Shape("ncs", 2, 3, 21), dtype)
    x[0, 1, 20], x[1, 2, 5] = value, np.nan
    y = batchnorm.batch_norm(x, np.zeros(3), np.ones(3), np.float32([1, 2, 3])).astype(np.float64)
    assert y[0, 1, 20] == value and np.isnan(y[1, 2, 5])
    assert np.isfinite(y).sum() == y.size - 2


# ---- extremes of the number formats --------------------------------------------------------------


SMALLEST = {"float64": 5e-324, "float32": 1.4e-45, "float16": 6e-8, "bfloat16": 9.2e-41}


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_are_kept(dtype, isa):
    smallest = np.float64(SMALLEST[dtype.name]).astype(dtype)
    steps = np.arange(-60, 60, dtype=np.float64).reshape(2, 3, 20)
    x = (steps * smallest.astype(np.float64)).astype(dtype)
    assert (x != 0).sum() == x.size - 1
    # With mean 0, var 1 and eps 0, batch_norm is the identity; with fixed statistics so is its gradient.
    assert same_bits(
        batchnorm.batch_norm(x, np.zeros(3), np.ones(3), eps=0) + dtype.type(0), x + dtype.type(0)
    )
    dx = batchnorm.batch_norm_backward(x, x, np.zeros(3), np.ones(3), stats="fixed", needs=("dx",)).dx
    assert same_bits(dx, x)
    np.testing.assert_allclose(
        batchnorm.moments(x).mean / smallest.astype(np.float64), steps.mean(axis=(0, 2)), rtol=0, atol=0.5
    )


@pytest.mark.parametrize("shape", [Shape("ncs", 4, 3, 501), Shape("nsc", 2004, 3, 1)], ids=str)
@pytest.mark.parametrize("spread", [1e10, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, pytest.param(BFLOAT16, marks=needs_bfloat16)], ids=str)
def test_large_spread_stays_finite(dtype, spread, shape):
    x = shape.array((normal(shape, FLOAT64) * (spread / 4)).astype(dtype))
    want = reference.train(x, dtype=precision(dtype))
    got = batchnorm.batch_norm_train(x)
    assert np.isfinite(got.y.astype(np.float64)).all() and np.isfinite(got.inv_std).all()
    assert_forward(got.y, x, want)


@pytest.mark.parametrize("shape", [Shape("ncs", 4, 3, 501), Shape("nsc", 2004, 3, 1)], ids=str)
@pytest.mark.parametrize("spread", [1e-12, 1e-20, 1e-30])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, pytest.param(BFLOAT16, marks=needs_bfloat16)], ids=str)
def test_tiny_spread_without_eps(dtype, spread, shape):
    x = shape.array((normal(shape, FLOAT64) * spread).astype(dtype))
    assert_forward(
        batchnorm.batch_norm_train(x, eps=0).y, x, reference.train(x, eps=0, dtype=precision(dtype))
    )


@pytest.mark.parametrize("shape", [Shape("ncs", 4, 3, 501), Shape("nsc", 2004, 3, 1)], ids=str)
@pytest.mark.parametrize("spread", [1e-30, 1e-20, 1e-12, 1e-6, 1e6, 1e12, 1e20, 1e30])
@pytest.mark.parametrize("dy_follows", [False, True], ids=["dy about 1", "dx about 1"])
@WIDE
def test_gradient_at_any_spread(dtype, dy_follows, spread, shape):
    x = shape.array((normal(shape, FLOAT64) * spread).astype(dtype))
    # dy correlated with x, so that each part of the gradient matters.
    dy = (normal(shape, FLOAT64) + gradient_of(shape, FLOAT64)) * (spread if dy_follows else 1)
    dy = shape.array(dy.astype(dtype))
    forward = batchnorm.batch_norm_train(x, eps=0)
    gradients = batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std)
    assert_gradients(gradients, dy, x, forward.mean, forward.inv_std)


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-20, -3, -1, 1, 4, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_scaling_by_a_power_of_two_is_exact(shape, dtype, power):
    if dtype == FLOAT16:
        power = int(np.sign(power)) * min(abs(power), 4)  # stay clear of its subnormals and overflow
    factor = 2.0**power
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    if dtype == FLOAT16:
        x[np.abs(x) < 0.01] = dtype.type(0.01)
    gamma, beta = parameters(shape.channels)
    scaled = shape.array((x.astype(np.float64) * factor).astype(dtype))
    want = batchnorm.batch_norm_train(x, gamma, beta, eps=2.0**-10)
    got = batchnorm.batch_norm_train(scaled, gamma, beta, eps=2.0**-10 * factor**2)
    assert same_bits(got.y, want.y)
    assert same_bits(got.mean, want.mean * factor) and same_bits(got.inv_std, want.inv_std / factor)
    want_gradients = batchnorm.batch_norm_backward(dy, x, want.mean, want.inv_std, gamma, beta)
    gradients = batchnorm.batch_norm_backward(dy, scaled, got.mean, got.inv_std, gamma, beta)
    assert same_bits(gradients.dgamma, want_gradients.dgamma) and same_bits(
        gradients.dbeta, want_gradients.dbeta
    )
    if dtype != FLOAT16:
        assert same_bits(gradients.dx.astype(np.float64), want_gradients.dx.astype(np.float64) / factor)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_gradient_is_linear_in_dy(shape, dtype, stats, activation):
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    gamma, beta = parameters(shape.channels)
    forward = batchnorm.batch_norm_train(x, gamma, beta)
    one, two = (
        batchnorm.batch_norm_backward(
            g, x, forward.mean, forward.inv_std, gamma, beta, stats=stats, activation=activation
        )
        for g in (dy, dy + dy)
    )
    normal_numbers = np.abs(one.dx.astype(np.float64)) > 2.0**-14  # float16 rounds otherwise below
    assert same_bits((one.dx + one.dx)[normal_numbers], two.dx[normal_numbers])
    assert same_bits(one.dgamma * 2, two.dgamma) and same_bits(one.dbeta * 2, two.dbeta)


@WIDE
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", [shape for shape in CONDITION_SHAPES if shape.count > 3], ids=str)
def test_dx_has_no_mean_and_no_component_along_x_hat(shape, ratio, dtype):
    # Shifting or (without eps) scaling a channel does not change y, so the gradient along those directions is
    # zero.
    x, dy = ill_conditioned(shape, dtype, ratio), gradient_of(shape, dtype)
    forward = batchnorm.batch_norm_train(x, eps=0)
    dx = batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std).dx.astype(np.longdouble)
    x_hat = reference.train(x, eps=0, dtype=np.longdouble).x_hat
    want = reference.backward(dy, x, forward.mean, forward.inv_std, dtype=np.longdouble)
    # Each element's own bound, added up; see dx_error for its terms.
    mean, inv_std = (reference.spread(v, x, 1) for v in (forward.mean, forward.inv_std))
    sums = (reference.spread(v, x, 1) for v in (want.dgamma, want.dbeta))
    wide_dy = reference.widen(dy, np.longdouble)
    inside = (
        2
        * (shape.count + 4)
        * tolerances.U64
        * np.abs(wide_dy).mean(axis=(0, 2), keepdims=True)
        * (1 + np.abs(x_hat)) ** 2
    )
    bound = tolerances.dx_error(
        dtype, want.dx, wide_dy, x_hat, mean, inv_std, *sums, shape.count, sums_error=inside
    )
    assert np.all(np.abs(dx.sum(axis=(0, 2))) <= bound.sum(axis=(0, 2)))
    assert np.all(np.abs((dx * x_hat).sum(axis=(0, 2))) <= (bound * (np.abs(x_hat) + 1e-12)).sum(axis=(0, 2)))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_inference_after_decay_zero_equals_training(shape, dtype, activation):
    x = normal(shape, dtype)
    gamma, beta = parameters(shape.channels)
    running_mean, running_var = np.full(shape.channels, 7.0), np.full(shape.channels, 7.0)
    trained = batchnorm.batch_norm_train(
        x,
        gamma,
        beta,
        running_mean=running_mean,
        running_var=running_var,
        decay=0,
        running_ddof=0,
        activation=activation,
    )
    inferred = batchnorm.batch_norm(x, running_mean, running_var, gamma, beta, activation=activation)
    assert same_bits(trained.y, inferred)
