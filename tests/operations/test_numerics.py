"""The numerics contract: ill-conditioned data, constants, NaN and Inf, extremes of formats, identities."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import batchnorm
import numpy as np
import pytest

from support import reference, tolerances
from support.checks import all_same_bits, excess, gradients, same_bits
from support.problem import DTYPES, Problem, rng

FLOAT32, FLOAT64, FLOAT16 = DTYPES[:3]
RATIOS = (0, 1, 10, 1e2, 1e3, 1e4, 1e5, 1e6)
SHAPES = [
    Problem(2, 3, (1,)), Problem(2, 5, (7,)), Problem(8, 6, (49,)), Problem(3, 3, (4097,)), Problem(3, 5),
    Problem(1, 2, (40001,)), Problem(64, 17), Problem(400, 64), Problem(9001, 3), Problem(700, 100),
    Problem(9, 16, (7, 7), last=True),
]  # fmt: skip
CHAINS = [
    (250, 64, 1), (500, 64, 1), (511, 127, 1), (512, 300, 1), (8191, 9, 1), (16385, 33, 1), (1, 64, 16383),
    (64, 16, 255),
]  # fmt: skip
LONG = [Problem(4, 3, (501,)), Problem(2004, 3), Problem(39, 65, (3,))]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
not_float16 = pytest.mark.parametrize("dtype", [d for d in DTYPES if d != FLOAT16], ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


# ---- data --------------------------------------------------------------------------------------------------


def ill(d, generator, ratio):
    """|mean| / std = ratio (before rounding to dtype); channels differ in sign and scale."""
    channels = d.x.shape[1]
    std = 2.0 ** generator.uniform(-8, 8, (channels, 1))
    sign = generator.choice([-1, 1], (channels, 1))
    return {"x": (generator.standard_normal(d.x.shape) + sign * ratio) * std}


def constant(d, generator, eps):
    channels = d.x.shape[1]
    values = generator.standard_normal((channels, 1)) * 10.0 ** generator.uniform(-4, 4, (channels, 1))
    return {"x": np.broadcast_to(values, d.x.shape)}


def spread(d, generator, size):
    return {"x": d.x.astype(np.float64) * size}


def dx_about_1(d, generator, size):
    """dy correlated with x, so that each part of the gradient matters."""
    return {"x": d.x.astype(np.float64) * size, "dy": (d.x.astype(np.float64) + d.dy) * size}


def dy_about_1(d, generator, size):
    return dx_about_1(d, generator, size) | {"dy": d.x.astype(np.float64) + d.dy}


def drift(d, generator, size):
    """A mean that wanders along the channel: tiles, rows and images all have different ones."""
    n, _, s = d.x.shape
    return {"x": d.x.astype(np.float64) + np.linspace(0, size, n * s).reshape(n, 1, s)}


def narrow(d, generator, size):
    """Sums far beyond float16's 65504, which stop growing at 256 and 2048 if added up in 8 or 11 bits."""
    x = np.full(d.x.shape, float(size))
    x[::2] *= 5 / 6
    return {"x": x, "dy": np.full(d.x.shape, 50000.0)}


MAKERS = {f.__name__: f for f in (ill, constant, spread, dx_about_1, dy_about_1, drift, narrow)}


@dataclass(frozen=True)
class Made(Problem):
    """A problem with data of one of the makers, `number` being its number."""

    make: str = "ill"
    number: float = 0.0

    @property
    def data(self):
        return _made(self.n, self.channels, self.inner, self.dtype, self.seed, self.make, self.number)


@functools.lru_cache(maxsize=8)
def _made(n, channels, inner, dtype, seed, make, number):
    d = Problem(n, channels, inner, dtype=dtype, seed=seed).data
    made = MAKERS[make](d, rng(make, n, channels, inner, number), number)
    return SimpleNamespace(**vars(d) | {name: a.astype(dtype) for name, a in made.items()})


def made(shape, make, number, **options):
    return Made(
        shape.n, shape.channels, shape.inner, shape.last, **{"make": make, "number": number} | options
    )


def wide_moments(x):
    rows = x.transpose(1, 0, 2).reshape(x.shape[1], -1).astype(np.float64).astype(np.longdouble)
    return rows.mean(axis=1), rows.var(axis=1)


def assert_moments(p):
    got, (mean, var) = batchnorm.moments(p.x, channel_axis=p.channel_axis), wide_moments(p.data.x)
    assert excess(got.mean, mean, tolerances.mean_error(p.dtype, mean, np.sqrt(var))) <= 1, p
    assert_variance(p, got.var, var)


def assert_variance(p, got, var):
    """Within 1e-14 for float64 data, one unit in the last place of float32 for others.

    Sums of narrow data may be taken about 0 up to |mean| / std = 128, which costs 128^2 of their rounding.
    """
    if p.dtype == FLOAT64:
        assert excess(got, var, tolerances.VAR_FLOAT64 * var) <= 1, p
    else:
        assert np.all(tolerances.ulp_distance(got, var) <= 1), p


def check(p):
    """As `p.check`, with the variance by `assert_variance`."""
    made = p.results()
    assert_variance(p, made["var"], reference.forward(p.call()).var[0])
    found = [
        f for f in p.failures(made) if p.dtype == FLOAT64 or not f.startswith(("var has", "inv_std has"))
    ]
    assert not found, f"{p}: {'; '.join(found)}"


# ---- mean and variance -------------------------------------------------------------------------------------


@pytest.mark.quick
@shapes
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_variance_of_ill_conditioned_data(shape, dtype):
    for ratio in RATIOS:
        assert_moments(made(shape, "ill", ratio, dtype=dtype))


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("distribution", ["standard_normal", "standard_exponential", "random"])
@pytest.mark.parametrize("size", CHAINS)
def test_variance_of_float64_where_additions_are_many(size, distribution, offset):
    # The longest chains of additions between two merges, in many channels: rounding must stay below 1e-14.
    generator = rng("chains", size, distribution)
    for _ in range(3):
        x = getattr(generator, distribution)(size) + offset
        _, var = wide_moments(x)
        assert excess(batchnorm.moments(x).var, var, 1e-14 * var) <= 1


# Sums are taken about some value of the channel; these put that value where it hurts.
FAR = [Problem(2, 3, (10001,)), Problem(30, 3, (49,)), Problem(20002, 3)]


@dtypes
@pytest.mark.parametrize("shape", FAR, ids=str)
def test_one_value_far_off(shape, dtype):
    for distance in (3, 30, 1e3, 1e4):
        for where in (0, 1, -1):
            x = replace(shape, dtype=dtype).data.x.copy()
            row, column = (where, 0) if x.shape[2] == 1 else (min(where, 0), where)
            x[row, 1:, column] = distance * np.array([1, -1])
            got, (mean, var) = batchnorm.moments(x), wide_moments(x)
            assert excess(got.var, var, tolerances.var_error(dtype) * var) <= 1, (distance, where)
            bound = tolerances.mean_error(dtype, mean, np.sqrt(var))
            assert excess(got.mean, mean, bound) <= 1, (distance, where)


@pytest.mark.parametrize("shape", [Problem(4, 3, (5001,)), Problem(20004, 3)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_drifting_mean(shape, dtype):
    assert_moments(made(shape, "drift", 4000, dtype=dtype))


@pytest.mark.parametrize("shape", [Problem(64, 3, (3136,)), Problem(100_000, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_sums_of_narrow_types_do_not_overflow(shape, dtype):
    p = made(shape, "narrow", 60000, dtype=dtype, affine=None)
    p.check()
    assert_moments(p)


# ---- y and dx ----------------------------------------------------------------------------------------------


@shapes
def test_normalised_value_within_contract(shape):
    for ratio in RATIOS:
        for eps in (0, 1e-5):
            p = made(shape, "ill", ratio, affine=None, eps=eps)
            want = reference.forward(replace(p.call(), kind=np.longdouble))
            bound = tolerances.NORMALIZED_FLOAT32 * np.maximum(1, np.abs(want.y))
            assert excess(p.plain(p.train().y), want.y, bound) <= 1, p
            mean, var = want.mean[0].astype(np.float64), want.var[0].astype(np.float64)
            y = batchnorm.batch_norm(p.x, mean, var, eps=eps, channel_axis=p.channel_axis)
            assert excess(p.plain(y), want.y, bound) <= 1, p


@dtypes
@shapes
def test_forward_and_backward_of_ill_conditioned_data(shape, dtype):
    for ratio in RATIOS:
        if dtype != FLOAT16 or ratio <= 100:  # beyond, float16 overflows or holds constants
            check(made(shape, "ill", ratio, dtype=dtype))


# ---- constants ---------------------------------------------------------------------------------------------


@dtypes
@shapes
def test_constant_channel_gives_beta_exactly(shape, dtype):
    for eps in (1e-12, 1e-5, 1e-3):
        p = made(shape, "constant", eps, dtype=dtype, eps=eps)
        gamma, beta = p.parameters
        y, saved = p.train()
        assert np.array_equal(p.plain(y), np.broadcast_to(beta.astype(dtype)[:, None], p.data.x.shape))
        assert np.array_equal(saved.mean, p.data.x[0, :, 0].astype(np.float64)) and not saved.var.any()
        plain = batchnorm.batch_norm_train(p.x, gamma, channel_axis=p.channel_axis, eps=eps).y
        assert same_bits(plain, np.zeros_like(p.x))
        # dx is finite and what the formula says: dy without its mean. Of dgamma, the terms of sum of dy * x -
        # mean * sum of dy cancel to a few roundings in double; to nothing in float64 data, and where the
        # float next to the mean was subtracted first.
        got = batchnorm.batch_norm_backward(p.dy, saved)
        far = np.abs(saved.mean * saved.inv_std)
        terms = np.abs(p.data.dy.astype(np.float64)).sum((0, 2)) * far
        roundings = 0 if dtype == FLOAT64 else np.where(far > 128, 0, 16)
        assert (np.abs(got.dgamma) <= roundings * 2.0**-53 * terms).all()
        if dtype != FLOAT16:
            assert np.isfinite(got.dx.astype(np.float64)).all()
            p.check()


# ---- NaN and Inf -------------------------------------------------------------------------------------------


def without(results, channel, axis):
    """Results without one channel."""
    return [np.delete(a, channel, axis % a.ndim if a.ndim > 1 else 0) for a in results]


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_in_their_channel(value, dtype):
    for shape in (*SHAPES[1:3], *SHAPES[5:7], Problem(40, 9), Problem(3, 40, (5,)), Problem(38, 65)):
        p = replace(shape, dtype=dtype)
        hit, axis = p.channels // 2, p.channel_axis
        y, saved = p.train()
        clean = [y, saved.mean, saved.inv_std, *gradients(batchnorm.batch_norm_backward(p.dy, saved))]
        for row, column in ((0, 0), (-1, -1), (p.n // 2, p.spread // 2)):
            x, dy = p.data.x.copy(), p.data.dy.copy()
            x[row, hit, column] = dy[row, hit, column] = value
            options = {"channel_axis": axis}
            y, of_x = batchnorm.batch_norm_train(p.user(x), *p.parameters, **options)
            got = batchnorm.batch_norm_backward(p.dy, of_x)
            assert not np.isfinite(of_x.mean[hit]) and not of_x.inv_std[hit] > 0
            assert np.isnan(p.plain(y)[:, hit].astype(float)).all()
            assert np.isnan(p.plain(got.dx)[:, hit].astype(float)).all() and np.isnan(got.dgamma[hit])
            dirty = [y, of_x.mean, of_x.inv_std, *gradients(got)]
            assert all_same_bits(without(dirty, hit, axis), without(clean, hit, axis)), p
            of_dy = batchnorm.batch_norm_backward(p.user(dy), saved)
            assert not np.isfinite(of_dy.dbeta[hit])
            assert all_same_bits(without(gradients(of_dy), hit, axis), without(clean[3:], hit, axis)), p


@dtypes
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_inference_passes_inf_and_nan_on(dtype, value):
    x = np.array(Problem(2, 3, (21,), dtype=dtype).data.x)
    x[0, 1, 20], x[1, 2, 5] = value, np.nan
    y = batchnorm.batch_norm(x, np.zeros(3), np.ones(3), np.float32([1, 2, 3])).astype(np.float64)
    assert y[0, 1, 20] == value and np.isnan(y[1, 2, 5])
    assert np.isfinite(y).sum() == y.size - 2


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_infinite_gradients_are_infinite(dtype):
    # x and the mean lie on different sides of 0, so that nothing infinite is subtracted.
    for x, want in (([-1, 3, 2, 4], -np.inf), ([1, -3, -2, -4], np.inf)):
        x = np.array([x, [1, 2, 3, 5]], dtype).T
        _, saved = batchnorm.batch_norm_train(x, np.ones(2, dtype), np.zeros(2, dtype))
        dy = np.ones_like(x)
        dy[0, 0] = np.inf
        got = batchnorm.batch_norm_backward(dy, saved)
        assert got.dgamma[0] == want and got.dbeta[0] == np.inf and np.isfinite(got.dx[:, 1]).all()


@dtypes
def test_a_slope_next_to_nothing(dtype):
    # slope * inf is inf, but a slope that the compute type rounds to 0 gives 0, not 0 * inf = NaN.
    x = np.array([[-np.inf, -1, 1, np.inf]], dtype).T
    for slope, want in ((1e-50, -np.inf if dtype == FLOAT64 else 0.0), (0.0, 0.0), (0.5, -np.inf)):
        y = batchnorm.batch_norm(x, np.zeros(1), np.ones(1), activation="leaky_relu", slope=slope, eps=0)
        assert y[0, 0] == want and y[3, 0] == np.inf, slope


def test_weights_next_to_nothing():
    x, weights = rng("w").standard_normal((4, 2)).astype(np.float32), np.array([1.0, 2, 3, 4])
    want = batchnorm.batch_norm_train(x, weights=weights)
    dx = batchnorm.batch_norm_backward(x, want.saved).dx
    for scale in (1e-300, 1e300):
        got = batchnorm.batch_norm_train(x, weights=weights * scale)
        np.testing.assert_allclose(got.y, want.y, rtol=3e-7)
        np.testing.assert_allclose(batchnorm.batch_norm_backward(x, got.saved).dx, dx, rtol=1e-5, atol=1e-6)


# ---- extremes of the number formats ------------------------------------------------------------------------

SMALLEST = {"float64": 5e-324, "float32": 1.4e-45, "float16": 6e-8, "bfloat16": 9.2e-41}


@dtypes
def test_subnormal_numbers_are_kept(dtype, isa):
    smallest = np.float64(SMALLEST[dtype.name]).astype(dtype)
    steps = np.arange(-60, 60, dtype=np.float64).reshape(2, 3, 20)
    x = (steps * smallest.astype(np.float64)).astype(dtype)
    assert (x != 0).sum() == x.size - 1
    # With mean 0, var 1 and eps 0, batch_norm is the identity, and so is its gradient.
    y, saved = batchnorm.batch_norm_train(x, mean=np.zeros(3), var=np.ones(3), eps=0)
    assert same_bits(y + dtype.type(0), x + dtype.type(0))
    assert same_bits(batchnorm.batch_norm_backward(x, saved, needs=("dx",)).dx, x)
    got = batchnorm.moments(x).mean / smallest.astype(np.float64)
    np.testing.assert_allclose(got, steps.mean(axis=(0, 2)), rtol=0, atol=0.5)


@pytest.mark.parametrize("make", ["dy_about_1", "dx_about_1", "spread"])
@not_float16
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_any_spread(dtype, make, shape):
    for size in (1e-30, 1e-20, 1e-12, 1e-6, 1e6, 1e12, 1e20, 1e30):
        made(shape, make, size, dtype=dtype, eps=0).check()


FAR = [
    Problem(6, 3, (5,)), Problem(6, 3, (5,), last=True), Problem(40, 9), Problem(64, 70), Problem(2004, 3),
    Problem(3, 2, (4097,)),
]  # fmt: skip
FAR_OPTIONS = [
    {}, {"virtual_batch_size": 3}, {"keep": "y"}, {"mask": True}, {"weights": True}, {"elements": True},
    {"running": True},
]  # fmt: skip


def far(p, options, size):
    """y, dx, dgamma, dbeta of a problem's data times `size`, and the statistics, in units of it."""
    x, c = p.plain(p.x), p.channels
    chosen = rng("far").random((x.shape[0], 1, *x.shape[2:])) > 0.3
    call = {k: v for k, v in options.items() if k in ("virtual_batch_size", "keep")}
    if "mask" in options:
        call["mask"] = chosen
    if "weights" in options:
        call["weights"] = np.where(chosen, 10.0 ** rng("w").uniform(-30, 0, chosen.shape), 0.0)
    if "elements" in options:
        call["mask"] = rng("e").random(x.shape) > 0.3
    if "running" in options:
        call |= {"running_mean": np.zeros(c), "running_var": np.ones(c), "decay": 0.0}
    x = np.moveaxis(x * size, 1, p.channel_axis)
    x = np.moveaxis(np.ascontiguousarray(x), p.channel_axis, 1) if p.channel_axis != 1 else x
    y, saved = batchnorm.batch_norm_train(x, np.full(c, 2.0), np.full(c, 0.5), eps=0, **call)
    got = batchnorm.batch_norm_backward(p.plain(p.dy), saved)
    if "running" in options:
        np.testing.assert_allclose(call["running_mean"], saved.mean, rtol=1e-15)
        with np.errstate(over="ignore"):
            unbiased = saved.var * (saved.count / (saved.count - 1))
        np.testing.assert_allclose(call["running_var"], unbiased, rtol=1e-15)
    return y, got.dx * size, got.dgamma, got.dbeta, saved.mean / size, saved.inv_std * size, saved


@pytest.mark.parametrize("options", FAR_OPTIONS, ids=str)
@pytest.mark.parametrize("power", [-990, -700, -540, -500, -470, 450, 509, 512, 540, 700, 900, 990])
def test_float64_from_1e_300_to_1e300(power, options):
    # Squares overflow from 2^512 on, and lose digits below 2^-480. In units of a power of two all is what it
    # is about 1; only a variance that float64 does not hold is 0 or infinite.
    for p in FAR:
        p = replace(p, dtype=FLOAT64, affine=None, activation=None)
        if "virtual_batch_size" in options and p.n % 3 == 1:
            continue
        small, large = far(p, options, 1.0), far(p, options, 2.0**power)
        for a, b in zip(small[:-1], large[:-1], strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-12)
        with np.errstate(over="ignore"):
            want = small[-1].var * 2.0**power * 2.0**power
        np.testing.assert_allclose(large[-1].var, want, rtol=1e-13)


def test_channels_of_any_size_do_not_disturb_each_other():
    # Those that are summed once more because of another's squares have the bits that they have alone.
    z = rng("sizes").standard_normal((64, 9, 31))
    sizes = np.array([1, 1e-300, 1e300, 3e200, 1e150, 1e-160, 1e155, 1e3, 0])[:, None]
    x = z * sizes
    x[:, 7] += 1e9  # far from its first values' mean, so summed about a better shift
    x[0, 7] = 0
    for v in (x, np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)):
        y, saved = batchnorm.batch_norm_train(v, eps=0)
        for c in range(len(sizes)):
            alone = batchnorm.batch_norm_train(v[:, c : c + 1], eps=0)
            np.testing.assert_allclose(y[:, c], alone.y[:, 0], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(saved.inv_std[c], alone.saved.inv_std[0], rtol=1e-12)
        assert np.isfinite(y).all() and (y[:, 8] == 0).all()


@pytest.mark.parametrize("light", [1.0, 1e-8, 1e-20, 1e-100])
def test_far_values_of_little_weight(light):
    # They weigh what they weigh, however much larger the others' weights are.
    x = np.array([[1, 1], [2, 2], [3, 1e200], [4, 3e200]])
    mask, weights = np.array([[1, 0], [1, 0], [1, 1], [1, 1]], bool), np.array([1, 1, light, light])
    y, saved = batchnorm.batch_norm_train(x, eps=0, mask=mask, weights=weights)
    np.testing.assert_allclose(y[2:, 1], [-1, 1], rtol=1e-14)
    np.testing.assert_allclose([saved.mean[1], saved.inv_std[1]], [2e200, 1e-200], rtol=1e-14)
    x = np.array([1e160, 2e160, 1e300, -1e300, 3e160])[:, None]
    weights = np.array([1, 1, light, light, 1])
    _, saved = batchnorm.batch_norm_train(x, eps=0, weights=weights)
    wide, w = x[:, 0].astype(np.longdouble), weights.astype(np.longdouble)
    mean = (w * wide).sum() / w.sum()
    std = np.sqrt((w * (wide - mean) ** 2).sum() / w.sum())
    np.testing.assert_allclose(float(saved.inv_std[0] * std), 1, rtol=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_not_taken_for_far_ones(bad):
    x = rng("bad").standard_normal((8, 4, 9))
    x[3, 1, 2], x[5, 2, 0] = bad, 1e200
    y, saved = batchnorm.batch_norm_train(x)
    assert not np.isfinite(saved.mean[1]) and np.isnan(saved.var[1]) and np.isnan(y[:, 1]).any()
    assert np.isfinite(y[:, [0, 2, 3]]).all()


def test_var_and_eps_zero():
    # A constant channel has x_hat = 0, whatever eps is: y is beta, and no gradient passes. Of given
    # statistics that is an error, as x need not be their mean.
    x = np.array([[1.0, 2, 3], [-1, 2, 3], [4, 2, 3]])
    for keep, renorm in itertools.product(("x", "y"), (None, {"mean": np.ones(3), "std": np.ones(3)})):
        call = {"keep": keep, "renorm": renorm, "eps": 0}
        y, saved = batchnorm.batch_norm_train(x, np.full(3, 2.0), np.full(3, 0.5), **call)
        moved = 0 if renorm is None else 2 * np.array([1.0, 2])  # gamma d, and r is 0
        assert (y[:, 1:] == 0.5 + moved).all() and (saved.inv_std[1:] == 0).all() and np.isfinite(y).all()
        got = batchnorm.batch_norm_backward(x, saved)
        assert (got.dx[:, 1:] == 0).all() and np.isfinite(got.dgamma).all() and np.isfinite(got.dx).all()
        second = batchnorm.batch_norm_double_backward(x, saved, ddx=x)
        assert all(np.isfinite(a).all() for a in second if a is not None)
    zero, one = np.zeros(3), np.ones(3)
    bn = batchnorm.BatchNorm(3, eps=0, dtype=np.float64, decay=0.0)
    assert (bn(x)[:, 1:] == 0).all()
    for call in (
        lambda: batchnorm.batch_norm(x, one, zero, eps=0),
        lambda: batchnorm.batch_norm(x.astype(np.uint8), one, zero, eps=0),
        lambda: batchnorm.batch_norm_train(x, mean=one, var=zero, eps=0),
        lambda: bn(x, training=False),
    ):
        with pytest.raises(ValueError, match=r"eps is 0 and var is 0 at channel [01], expected more"):
            call()
    with pytest.raises(ValueError, match="eps is 0 and running_var is 0 at channel 2"):
        running = {"running_mean": one, "running_var": np.array([1.0, 1, 0])}
        batchnorm.batch_norm_train(x, eps=0, renorm=True, **running)


# ---- identities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.n * s.spread > 3], ids=str)
def test_dx_has_no_mean_and_no_component_along_x_hat(shape, dtype):
    # Shifting or (without eps) scaling a channel does not change y, so the gradient along those directions is
    # zero, within what its elements may be off.
    for ratio in RATIOS:
        p = made(shape, "ill", ratio, dtype=dtype, affine=None, eps=0)
        c = replace(p.call(), kind=np.longdouble)
        f = reference.forward(c)
        want = reference.backward(c, f, p.data.dy)
        bound = tolerances.backward(c, f, p.data.dy, want, dtype, tolerances.forward(c, f, dtype)).dx
        dx = p.plain(batchnorm.batch_norm_backward(p.dy, p.train().saved).dx).astype(np.longdouble)
        assert np.all(np.abs(dx.sum(axis=(0, 2))) <= bound.sum(axis=(0, 2))), p
        along = (bound * (np.abs(f.x_hat) + 1e-12)).sum(axis=(0, 2))
        assert np.all(np.abs((dx * f.x_hat).sum(axis=(0, 2))) <= along), p


@dtypes
@shapes
def test_training_gives_what_inference_gives(shape, dtype):
    # With the running statistics that an update of decay 0 leaves.
    for activation in (None, "relu", "tanh"):
        p = replace(shape, dtype=dtype, activation=activation)
        running = {"running_mean": np.full(p.channels, 7.0), "running_var": np.full(p.channels, 7.0)}
        trained = p.train(**running, decay=0, running_ddof=0).y
        options = {"channel_axis": p.channel_axis, "activation": activation}
        assert same_bits(trained, batchnorm.batch_norm(p.x, *running.values(), *p.parameters, **options))
