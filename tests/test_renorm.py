"""Batch renormalisation (Ioffe 2017, arXiv:1702.03275, algorithm 1) against that algorithm in NumPy."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import reference
from cases import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    Shape,
    gradient_of,
    normal,
    parameters,
    residual_of,
    rng,
    same_bits,
)
from checks import assert_forward, assert_gradients, precision
from reference import spread, widen

SHAPES = [
    Shape("ncs", 3, 20, 49),
    Shape("ncs", 2, 3, 4097),
    Shape("nsc", 245, 20, 1),
    Shape("nsc", 33, 65, 1),
]
LIMITS = [{}, {"rmin": 0.5, "rmax": 2.0, "dmax": 0.25}, {"rmax": 1.5}, {"dmax": 0.0}]
EPS = 1e-3


def reference_statistics(shape, dtype=np.float64):
    """A mean and a variance off those of cases.normal, some by little, some by much."""
    generator = rng("reference", str(shape))
    mean, var = generator.uniform(-3, 3, shape.channels), generator.uniform(0.05, 9, shape.channels)
    return mean.astype(dtype), var.astype(dtype)


def corrections(x, mean, std, rmin=0.0, rmax=np.inf, dmax=np.inf):
    """The paper's r and d."""
    batch = reference.train(x, eps=EPS, dtype=precision(x.dtype))
    r = np.clip(1 / batch.inv_std / std, rmin, rmax)
    return r, np.clip((batch.mean - mean) / std, -dmax, dmax)


def close(a, b, relative=1e-12):
    return np.all(np.abs(a - b) <= relative * (1 + np.abs(b)))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, dtype, limits, isa):
    x, (gamma, beta) = normal(shape, dtype), parameters(shape.channels)
    running = reference_statistics(shape)
    before = [v.copy() for v in running]
    got = batchnorm.batch_renorm_train(
        x, gamma, beta, running_mean=running[0], running_var=running[1], decay=0.75, eps=EPS, **limits
    )
    r, d = corrections(x, before[0], np.sqrt(before[1] + EPS), **limits)
    assert close(got.r, r) and close(got.d, d) and got.activation_mask is None
    kind = precision(dtype)
    want = reference.train(x, gamma * r, beta + gamma * d, eps=EPS, dtype=kind)
    assert_forward(got.y, x, want, gamma * r, beta + gamma * d)
    plain_running = [v.copy() for v in before]
    plain = batchnorm.batch_norm_train(
        x, running_mean=plain_running[0], running_var=plain_running[1], decay=0.75, eps=EPS
    )
    assert same_bits(got.mean, plain.mean) and same_bits(got.inv_std, plain.inv_std)
    assert same_bits(running[0], plain_running[0]) and same_bits(running[1], plain_running[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_limits_it_is_inference(dtype):
    shape = Shape("ncs", 4, 20, 50)
    x, (gamma, beta) = normal(shape, dtype), parameters(20)
    mean, var = reference_statistics(shape)
    want = reference.normalize(x, mean, var, gamma, beta, EPS, dtype=precision(dtype))
    got = batchnorm.batch_renorm_train(x, gamma, beta, running_mean=mean, running_var=var, eps=EPS)
    tolerance = {"float64": 1e-13, "float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}[dtype.name]
    assert np.all(np.abs(widen(got.y, want.y.dtype.type) - want.y) <= tolerance * (1 + np.abs(want.y)))


def test_limits_of_one_make_it_plain_training(threads):
    x, (gamma, beta) = normal(SHAPES[0], FLOAT32), parameters(20)
    mean, var = reference_statistics(SHAPES[0])
    got = batchnorm.batch_renorm_train(
        x, gamma, beta, running_mean=mean, running_var=var, rmin=1, rmax=1, dmax=0
    )
    want = batchnorm.batch_norm_train(x, gamma, beta)
    assert same_bits(got.y, want.y) and np.all(got.r == 1) and np.all(got.d == 0)


def test_a_reference_of_its_own():
    x = normal(SHAPES[2], FLOAT32)
    n = x.size // 20
    running = reference_statistics(SHAPES[2])
    mean, std = np.full(20, 0.5, np.float32), np.full(20, 2.0)
    plain = batchnorm.batch_norm_train(x)
    _, d = corrections(x, 0.5, 2.0)
    got = batchnorm.batch_renorm_train(
        x, renorm_mean=mean, renorm_std=std, renorm_decay=0.5, running_mean=running[0], running_var=running[1]
    )
    assert close(got.r, 1 / plain.inv_std / 2) and close(got.d, d, 1e-6)
    assert same_bits(mean, (0.5 * 0.5 + 0.5 * plain.mean).astype(np.float32))
    assert close(std, 0.5 * 2 + 0.5 / plain.inv_std)
    want = reference.update_running(*reference_statistics(SHAPES[2]), *reference.moments(x), 0.9, n)
    assert close(running[0], want[0]) and close(running[1], want[1])
    # Without running statistics, and with the decay of both.
    alone = np.full(20, 0.5), np.full(20, 2.0)
    batchnorm.batch_renorm_train(x, renorm_mean=alone[0], renorm_std=alone[1], decay=0.75)
    assert close(alone[0], 0.75 * 0.5 + 0.25 * plain.mean)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_backward(dtype, with_residual, activation):
    shape = SHAPES[1]
    x, dy, (gamma, beta) = normal(shape, dtype), gradient_of(shape, dtype), parameters(shape.channels)
    z = residual_of(shape, dtype) if with_residual else None
    mean, var = reference_statistics(shape)
    forward = batchnorm.batch_renorm_train(
        x,
        gamma,
        beta,
        running_mean=mean,
        running_var=var,
        rmax=1.5,
        dmax=1.0,
        activation=activation,
        residual=z,
    )
    masked = with_residual and activation is not None
    assert (forward.activation_mask is not None) == masked
    needs = ("dx", "dgamma", "dbeta", *(["dresidual"] if with_residual else []))
    got = batchnorm.batch_renorm_backward(
        dy, x, forward.mean, forward.inv_std, forward.r, forward.d, gamma, beta,
        activation=activation, activation_mask=forward.activation_mask, needs=needs,
    )  # fmt: skip
    g = dy * (forward.y > 0) if activation else dy
    if with_residual:
        assert np.array_equal(got.dresidual, g)
    plain = batchnorm.batch_norm_backward(g, x, forward.mean, forward.inv_std, np.ones(shape.channels))
    assert_gradients(
        got._replace(dgamma=plain.dgamma, dbeta=plain.dbeta), g, x, forward.mean, forward.inv_std,
        gamma * forward.r,
    )  # fmt: skip
    wide = widen(g, np.longdouble)
    x_hat = (widen(x, np.longdouble) - spread(forward.mean, x, 1)) * spread(forward.inv_std, x, 1)
    dgamma = (wide * (x_hat * spread(forward.r, x, 1) + spread(forward.d, x, 1))).sum(axis=(0, 2))
    assert got.dgamma.dtype == got.dbeta.dtype == np.float32
    assert np.all(np.abs(got.dgamma - dgamma) <= 2e-7 * np.abs(dgamma) + 1e-9 * shape.count)
    assert np.all(np.abs(got.dbeta - wide.sum(axis=(0, 2))) <= 1e-6 * (1 + np.abs(got.dbeta)))


def test_selective_backward_and_types():
    x, dy = normal(SHAPES[0], FLOAT32), gradient_of(SHAPES[0], FLOAT32)
    f = batchnorm.batch_renorm_train(x, running_mean=np.zeros(20), running_var=np.ones(20))
    all_three = batchnorm.batch_renorm_backward(dy, x, f.mean, f.inv_std, f.r, f.d)
    assert all_three.dgamma.dtype == np.float32
    for name in ("dx", "dgamma", "dbeta"):
        one = batchnorm.batch_renorm_backward(dy, x, f.mean, f.inv_std, f.r, f.d, needs=(name,))
        assert same_bits(getattr(one, name), getattr(all_three, name))
        assert [n for n in ("dx", "dgamma", "dbeta") if getattr(one, n) is not None] == [name]
    wide = batchnorm.batch_renorm_backward(
        dy, x, f.mean, f.inv_std, f.r, f.d, np.ones(20), np.zeros(20, np.float32)
    )
    assert (wide.dgamma.dtype, wide.dbeta.dtype) == (np.float64, np.float32)


def test_nan_stays_in_its_channel_and_an_empty_batch_changes_nothing():
    x = normal(SHAPES[0], FLOAT32)
    x[0, 3, 5] = np.nan
    running = np.zeros(20), np.ones(20)
    f = batchnorm.batch_renorm_train(x, running_mean=running[0], running_var=running[1])
    assert np.isnan(f.y[:, 3]).all() and np.isfinite(np.delete(f.y, 3, axis=1)).all()
    got = batchnorm.batch_renorm_backward(x, x, f.mean, f.inv_std, f.r, f.d)
    assert np.isnan(got.dx[:, 3]).all() and np.isnan(got.dgamma[3])
    assert np.isfinite(np.delete(got.dx, 3, axis=1)).all()
    own = np.zeros(20), np.ones(20)
    empty = batchnorm.batch_renorm_train(x[:0], renorm_mean=own[0], renorm_std=own[1])
    assert empty.y.shape == (0, 20, 49) and np.isnan(empty.r).all() and np.isnan(empty.d).all()
    assert np.all(own[0] == 0) and np.all(own[1] == 1)


def ones(n=6):
    return np.ones(n, np.float32)


ERRORS = {
    "no reference": ({}, ValueError, "running_mean and running_var are None.*batch_norm_train"),
    "half a reference": ({"renorm_mean": ones()}, ValueError, "renorm_std is None.*both or neither"),
    "other half": ({"renorm_std": ones()}, ValueError, "renorm_mean is None.*both or neither"),
    "rmin": ({"rmin": 1.5}, ValueError, r"rmin is 1.5, expected a number in \[0, 1\]"),
    "rmin nan": ({"rmin": np.nan}, ValueError, "rmin is nan"),
    "rmin text": ({"rmin": "0"}, TypeError, "rmin is '0'"),
    "rmax": ({"rmax": 0.5}, ValueError, "rmax is 0.5, expected a number >= 1; math.inf"),
    "dmax": ({"dmax": -1.0}, ValueError, "dmax is -1.0, expected a number >= 0; math.inf"),
    "decay alone": (
        {"running_mean": ones(), "running_var": ones(), "renorm_decay": 0.5}, ValueError,
        "renorm_decay is given without renorm_mean.*drop it",
    ),
    "decay": (
        {"renorm_mean": ones(), "renorm_std": ones(), "renorm_decay": 2.0}, ValueError, "renorm_decay is 2.0",
    ),
    "short": ({"renorm_mean": ones(5), "renorm_std": ones()}, ValueError, r"renorm_mean has shape \(5,\)"),
    "list": ({"renorm_mean": [1.0] * 6, "renorm_std": ones()}, TypeError, "renorm_mean is of type list"),
    "std 0": (
        {"renorm_mean": ones(), "renorm_std": 0 * ones()}, ValueError,
        "renorm_mean and renorm_std give a reference standard deviation of 0.0 at channel 0",
    ),
    "var negative": (
        {"running_mean": ones(), "running_var": -ones()}, ValueError,
        "running_mean and running_var give a reference standard deviation of -",
    ),
    "mean inf": (
        {"running_mean": np.inf * ones(), "running_var": ones()}, ValueError, "reference mean of inf",
    ),
    "momentum": ({"momentum": 0.1}, TypeError, r"batch_renorm_train\(\) has no argument 'momentum'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_change_nothing(name):
    change, error, match = ERRORS[name]
    arrays = {k: v.copy() for k, v in change.items() if isinstance(v, np.ndarray)}
    x = np.arange(48, dtype=np.float32).reshape(2, 6, 4)
    out = np.zeros_like(x)
    with pytest.raises(error, match=match):
        batchnorm.batch_renorm_train(x, out=out, **change)
    assert np.all(out == 0) and all(same_bits(change[k], v) for k, v in arrays.items())


def test_a_reference_that_is_something_else_too():
    x, running = normal(SHAPES[0], FLOAT32), (np.zeros(20), np.ones(20))
    both = np.ones(20)
    with pytest.raises(ValueError, match="renorm_mean shares memory with renorm_std"):
        batchnorm.batch_renorm_train(x, renorm_mean=both, renorm_std=both)
    with pytest.raises(ValueError, match="renorm_std shares memory with running_var"):
        batchnorm.batch_renorm_train(
            x, running_mean=running[0], running_var=running[1], renorm_mean=both, renorm_std=running[1]
        )


def test_backward_refuses():
    x = normal(SHAPES[0], FLOAT32)
    v = np.ones(20)
    with pytest.raises(TypeError, match=r"no argument 'stats'.*drop it"):
        batchnorm.batch_renorm_backward(x, x, v, v, v, v, stats="fixed")
    with pytest.raises(ValueError, match=r"d has shape \(3,\)"):
        batchnorm.batch_renorm_backward(x, x, v, v, v, v[:3])
    with pytest.raises(TypeError, match="r is None"):
        batchnorm.batch_renorm_backward(x, x, v, v, None, v)
