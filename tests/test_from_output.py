"""Training whose backward pass recovers x from y: as accurate as promised, for gamma of any sign and
size, and without a second tensor."""

from __future__ import annotations

import tracemalloc

import batchnorm
import numpy as np
import pytest

import reference
import tolerances
from cases import (
    DTYPES,
    FLOAT32,
    LAYOUTS,
    Shape,
    gradient_of,
    normal,
    parameters,
    place,
    rng,
    same_bits,
)
from checks import precision
from reference import others, spread, widen

SHAPES = [
    Shape("ncs", 6, 20, 49),
    Shape("ncs", 3, 5, 4097),
    Shape("nsc", 245, 20, 1),
    Shape("nsc", 33, 65, 1),
]
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "float16": 2.0**-24, "bfloat16": 2.0**-133}
ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def assert_gradients(got, dy, x, forward, gamma, beta, axis=1, slope=None):
    """Each gradient within its bound of the reference from x. x_hat is off by y's error over |gamma|, and by
    some roundings of its own and of beta; the rest as in tolerances.dx_error, with beta / gamma in the place
    of mean * inv_std. Behind leaky_relu, its input and its gradient have a rounding more, and the smallest
    number counts 1 / slope times."""
    if slope is not None:
        with_slope(got, dy, x, forward, gamma, beta, axis, slope)
        return
    within(got, widen(dy, precision(x.dtype)), x, forward, gamma, beta, axis)


def with_slope(got, dy, x, forward, gamma, beta, axis, slope):
    kind = precision(x.dtype)
    v = reference.train(x, gamma, beta, axis=axis, dtype=kind).y
    dv = widen(dy, kind) * np.where(v > 0, 1, kind(slope))
    within(got, dv, x, forward, gamma, beta, axis, SMALLEST[x.dtype.name] / min(slope, 1))


def within(got, dy, x, forward, gamma, beta, axis, coarse=None):
    kind = precision(x.dtype)
    mean, inv_std, g, b = (
        spread(widen(v, kind), x, axis) for v in (forward.mean, forward.inv_std, gamma, beta)
    )
    wide, n, rows = dy, x.size // x.shape[axis], others(x, axis)
    want = reference.backward(dy, x, forward.mean, forward.inv_std, gamma, axis, dtype=kind)
    x_hat = (widen(x, kind) - mean) * inv_std
    kept = np.isin(np.arange(x.shape[axis]), forward.saved.kept_channels)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = tolerances.u_compute(x.dtype)
        off = tolerances.y_error(x.dtype, g * x_hat + b, x_hat, mean, inv_std, g, b) / np.abs(g)
        off = np.where(spread(kept, x, axis), 0, off + 8 * u * (np.abs(x_hat) + np.abs(b / g)))
        if coarse is not None:
            off = np.where(spread(kept, x, axis), 0, 3 * off + coarse / np.abs(g))
    sums = n * 2.0**-50 * np.abs(wide).sum(axis=rows)
    dy_off = 0 * wide if coarse is None else ROUNDOFF[x.dtype.name] * np.abs(wide)
    sums = sums + dy_off.sum(axis=rows)
    dgamma_off = (
        (dy_off * np.abs(x_hat)).sum(axis=rows)
        + (np.abs(wide) * off).sum(axis=rows)
        + sums * (1 + np.abs(forward.mean * forward.inv_std))
    )
    for value, right, bound in ((got.dbeta, want.dbeta, sums), (got.dgamma, want.dgamma, dgamma_off)):
        assert np.all(np.abs(value - right) <= bound + tolerances.u_compute(value.dtype) * np.abs(right))
    mean_off = spread(sums / n, x, axis) + np.abs(x_hat) * spread(dgamma_off / n, x, axis)
    mean_off = mean_off + off * spread(np.abs(want.dgamma) / n, x, axis) + dy_off
    bound = tolerances.dx_error(
        x.dtype, want.dx, wide, x_hat, mean, inv_std, spread(want.dgamma, x, axis),
        spread(want.dbeta, x, axis), n, g, sums_error=mean_off,
    )  # fmt: skip
    error = np.abs(widen(got.dx, kind) - want.dx)
    assert np.all(error <= bound), f"dx: worst error is {np.nanmax(error / bound):.3g} of its bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, dtype, isa):
    """gamma of either sign, one channel of 0, one of the size of beta's roundoff."""
    x, dy, (gamma, beta) = normal(shape, dtype), gradient_of(shape, dtype), parameters(shape.channels)
    gamma[1], gamma[2] = 0, 1e-8 * beta[2]
    plain = batchnorm.batch_norm_train(x, gamma, beta)
    forward = batchnorm.batch_norm_train_saving(x, gamma, beta)
    assert all(same_bits(a, b) for a, b in zip(forward, plain, strict=True))
    assert {1} <= set(forward.saved.kept_channels) and (
        dtype.name == "float64" or 2 in forward.saved.kept_channels
    )
    got = batchnorm.batch_norm_backward_from_output(dy, forward.y, forward.saved)
    assert got.dx.dtype == dtype and got.dgamma.dtype == got.dbeta.dtype == np.float32
    assert_gradients(got, dy, x, forward, gamma, beta)


@pytest.mark.parametrize("slope", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_behind_leaky_relu(shape, dtype, slope):
    x, dy, (gamma, beta) = normal(shape, dtype), gradient_of(shape, dtype), parameters(shape.channels)
    gamma[1] = 0
    plain = batchnorm.batch_norm_train(x, gamma, beta, activation="leaky_relu", slope=slope)
    forward = batchnorm.batch_norm_train_saving(x, gamma, beta, activation="leaky_relu", slope=slope)
    assert all(same_bits(a, b) for a, b in zip(forward, plain, strict=True))
    assert 1 in forward.saved.kept_channels
    y = forward.y.copy()
    got = batchnorm.batch_norm_backward_from_output(dy, forward.y, forward.saved)
    assert np.array_equal(forward.y, y)
    assert_gradients(got, dy, x, forward, gamma, beta, slope=slope)
    for name in got._fields:
        one = batchnorm.batch_norm_backward_from_output(dy, y, forward.saved, needs=(name,))
        assert same_bits(getattr(one, name), getattr(got, name))
    for out in (dy.copy(), y, np.ones_like(x)):
        given = out if same_bits(out, dy) else dy
        again = batchnorm.batch_norm_backward_from_output(given, y, forward.saved, out=out)
        assert again.dx is out and same_bits(out, got.dx) and same_bits(again.dgamma, got.dgamma)
        y = forward.y.copy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_is_what_y_has_lost(dtype):
    """Around the threshold: just above it, x_hat from y is as good as promised; just below, x is kept."""
    u = ROUNDOFF[dtype.name]
    limit = u ** (1 / 3) / (1 - u ** (1 / 3))  # of |gamma| / |beta|
    shape = Shape("ncs", 8, 4, 100)
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    gamma, beta = np.array([1.01, 0.99, -1.01, -0.99]) * limit, np.array([1.0, 1.0, -1.0, 1.0])
    forward = batchnorm.batch_norm_train_saving(x, gamma, beta)
    assert forward.saved.kept_channels.tolist() == [1, 3]
    kind = precision(dtype)
    x_hat = reference.train(x, dtype=kind).x_hat
    recovered = (widen(forward.y, kind) - spread(beta, x, 1)) / spread(gamma, x, 1)
    off = np.abs(recovered - x_hat)[:, ::2].max()
    assert 0.1 * u ** (2 / 3) < off < 4 * u ** (2 / 3)
    got = batchnorm.batch_norm_backward_from_output(dy, forward.y, forward.saved)
    assert_gradients(got, dy, x, forward, gamma, beta)


def test_outputs_at_the_ends_of_float16():
    shape = Shape("ncs", 4, 4, 100)
    x = normal(shape, np.dtype(np.float16))
    gamma = np.array([1.0, 4000.0, 1e-6, 1e-3])
    kept = batchnorm.batch_norm_train_saving(x, gamma).saved.kept_channels
    assert kept.tolist() == [1, 2]  # y may overflow; y holds a few units of the smallest number


@pytest.mark.parametrize("gamma_beta", [(False, False), (True, False), (False, True)], ids=str)
def test_without_gamma_or_beta(gamma_beta):
    x, dy = normal(SHAPES[0], FLOAT32), gradient_of(SHAPES[0], FLOAT32)
    given = [p if wanted else None for p, wanted in zip(parameters(20, np.float64), gamma_beta, strict=True)]
    forward = batchnorm.batch_norm_train_saving(x, *given)
    got = batchnorm.batch_norm_backward_from_output(dy, forward.y, forward.saved)
    kind = np.float64 if any(gamma_beta) else np.float32
    assert got.dgamma.dtype == got.dbeta.dtype == kind
    gamma, beta = (np.full(20, float(i)) if p is None else p for i, p in ((1, given[0]), (0, given[1])))
    assert_gradients(got, dy, x, forward, gamma, beta)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_place(layout, threads):
    values, dy_values = (rng(layout, i).standard_normal((4, 20, 5, 7)).astype(np.float32) for i in range(2))
    gamma, beta = parameters(20)
    gamma[[0, 7]] = 0
    x = place(layout, values).view
    want = batchnorm.batch_norm_train_saving(x, gamma, beta)
    want_back = batchnorm.batch_norm_backward_from_output(dy_values, want.y, want.saved)
    assert np.array_equal(x, values) and want.saved.kept_channels.tolist() == [0, 7]
    assert_gradients(want_back, dy_values, values, want, gamma, beta)
    if layout not in ("contiguous", "nhwc", "channel reversed", "batch last"):
        return
    forward = batchnorm.batch_norm_train_saving(x, gamma, beta, out=x)
    assert forward.y is x and np.array_equal(x, want.y)
    gamma[:], beta[:] = 5, 5  # an optimiser's step in between changes nothing
    for out in (None, place(layout, dy_values).view, x):
        dy = place(layout, dy_values).view if out is x or out is None else out
        got = batchnorm.batch_norm_backward_from_output(dy, x, forward.saved, out=out)
        assert out is None or got.dx is out
        assert np.array_equal(got.dx, want_back.dx) and same_bits(got.dgamma, want_back.dgamma)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_memory(activation):
    """In place no array beyond some vectors and the channels that are kept: 2 of 64 here. Backward through
    leaky_relu takes one tensor for the time of the call."""
    x, dy = np.ones((16, 64, 40, 40), np.float32), np.ones((16, 64, 40, 40), np.float32)
    x[::2] = 3
    gamma = np.full(64, -2, np.float32)
    gamma[[3, 9]] = 0
    batchnorm.batch_norm_train(x)  # whatever is made once
    tracemalloc.start()
    forward = batchnorm.batch_norm_train_saving(x, gamma, activation=activation, out=x)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    batchnorm.batch_norm_backward_from_output(dy, forward.y, forward.saved, out=dy)
    back_held, back_peak = (m - held for m in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    kept = x.nbytes * 2 // 64
    assert kept <= forward.saved.nbytes <= held <= kept + 20_000 and peak <= kept + 20_000
    assert back_peak <= (x.nbytes if activation else 0) + 3 * kept + 60_000 and back_held <= 20_000
    assert repr(forward.saved) == f"SavedForBackward(x of 2 of 64 channels, {forward.saved.nbytes} bytes)"


def test_running_statistics_and_needs():
    x, dy = normal(SHAPES[2], FLOAT32), gradient_of(SHAPES[2], FLOAT32)
    gamma, beta = parameters(20)
    gamma[4] = 0
    running = [(np.zeros(20), np.ones(20)) for _ in range(2)]
    for function, (m, v) in zip(
        (batchnorm.batch_norm_train_saving, batchnorm.batch_norm_train), running, strict=True
    ):
        result = function(x, gamma, running_mean=m, running_var=v, decay=0.5, running_ddof=0, eps=0.1)
    assert same_bits(running[0][0], running[1][0]) and same_bits(running[0][1], running[1][1])
    result = batchnorm.batch_norm_train_saving(x, gamma, beta)
    full = batchnorm.batch_norm_backward_from_output(dy, result.y, result.saved)
    for name in full._fields:
        one = batchnorm.batch_norm_backward_from_output(dy, result.y, result.saved, needs=(name,))
        assert [n for n in full._fields if getattr(one, n) is not None] == [name]
        assert same_bits(getattr(one, name), getattr(full, name))


def test_nan_stays_in_its_channel_and_no_values():
    x = normal(SHAPES[0], FLOAT32)
    x[0, 3, 5] = np.nan
    forward = batchnorm.batch_norm_train_saving(x, *parameters(20))
    got = batchnorm.batch_norm_backward_from_output(x, forward.y, forward.saved)
    assert np.isnan(got.dx[:, 3]).all() and np.isfinite(np.delete(got.dx, 3, axis=1)).all()
    assert np.isnan(got.dgamma[3]) and np.isfinite(np.delete(got.dgamma, 3)).all()
    empty = batchnorm.batch_norm_train_saving(x[:0], np.zeros(20))
    got = batchnorm.batch_norm_backward_from_output(x[:0], empty.y, empty.saved)
    assert got.dx.shape == (0, 20, 49) and not got.dgamma.any() and not got.dbeta.any()


def test_errors():
    x = np.arange(48, dtype=np.float32).reshape(2, 6, 4)
    train, back = batchnorm.batch_norm_train_saving, batchnorm.batch_norm_backward_from_output
    before = x.copy()
    with pytest.raises(
        ValueError, match=r"activation is 'relu', from whose output.*'leaky_relu'; use batch_norm_train"
    ):
        train(x, activation="relu", out=x)
    for slope in (0, -0.1, 1e-30):
        with pytest.raises(ValueError, match=r"slope is .*, expected a number from 2\*\*-60 to 2\*\*60"):
            train(x, activation="leaky_relu", slope=slope, out=x)
    with pytest.raises(TypeError, match=r"no argument 'residual': y would not tell x.*drop it"):
        train(x, residual=x, out=x)
    with pytest.raises(TypeError, match=r"batch_norm_train_saving\(\) has no argument 'momentum'"):
        train(x, momentum=0.1)
    with pytest.raises(ValueError, match=r"gamma has shape \(5,\)"):
        train(x, np.ones(5), out=x)
    with pytest.raises(ValueError, match="running_var is None"):
        train(x, running_mean=np.zeros(6), out=x)
    assert np.array_equal(x, before)
    forward = train(x)
    dy = x.copy()
    with pytest.raises(
        TypeError, match="saved is None, expected the saved of batch_norm_train_saving's result"
    ):
        back(dy, forward.y, None)
    with pytest.raises(ValueError, match=r"y has shape \(1, 6, 4\) and dtype float32, expected \(2, 6, 4\)"):
        back(dy[:1], forward.y[:1], forward.saved)
    with pytest.raises(ValueError, match=r"y has shape .* and dtype float64, expected .* and float32"):
        back(dy, forward.y.astype(np.float64), forward.saved)
    with pytest.raises(TypeError, match="dy has dtype float64"):
        back(dy.astype(np.float64), forward.y, forward.saved)
    with pytest.raises(
        ValueError, match="needs contains 'dresidual', but there is no residual here; drop it"
    ):
        back(dy, forward.y, forward.saved, needs=("dx", "dresidual"))
    with pytest.raises(ValueError, match="out is given but needs does not contain 'dx'"):
        back(dy, forward.y, forward.saved, needs=("dgamma",), out=dy)
    with pytest.raises(ValueError, match="out overlaps y"):
        both = np.zeros((3, 6, 4), np.float32)
        back(dy, both[:2], forward.saved, out=both[1:])
    with pytest.raises(TypeError, match="has no argument 'gamma'"):
        back(dy, forward.y, forward.saved, gamma=np.ones(6))
    assert np.array_equal(dy, before)
