"""Ghost batches: each part exactly as the plain functions have it, in one array."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import reference
from cases import (
    BFLOAT16,
    DTYPES,
    FLOAT32,
    LAYOUTS,
    Shape,
    gradient_of,
    normal,
    parameters,
    place,
    residual_of,
    rng,
    same_bits,
)
from checks import assert_forward, precision

SHAPES = [Shape("ncs", 6, 20, 49), Shape("ncs", 12, 3, 1500), Shape("nsc", 12, 65, 9), Shape("nsc", 18, 3, 1)]


def parts(n, size):
    return [slice(i, i + size) for i in range(0, n, size)]


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_that_of_each_part(shape, dtype, size):
    x, (gamma, beta) = normal(shape, dtype), parameters(shape.channels)
    running, want_running = [
        (np.zeros(shape.channels, np.float32), np.ones(shape.channels)) for _ in range(2)
    ]
    options = dict(decay=0.75, running_ddof=0, eps=1e-3, activation="relu")
    got = batchnorm.ghost_batch_norm_train(
        x, gamma, beta, virtual_batch_size=size, running_mean=running[0], running_var=running[1], **options
    )
    assert got.mean.shape == got.inv_std.shape == (shape.outer // size, shape.channels)
    assert got.y.dtype == dtype and got.y.strides == np.empty_like(x).strides
    for i, part in enumerate(parts(shape.outer, size)):
        want = batchnorm.batch_norm_train(
            x[part], gamma, beta, running_mean=want_running[0], running_var=want_running[1], **options
        )
        assert np.array_equal(got.y[part], want.y)
        assert same_bits(got.mean[i], want.mean) and same_bits(got.inv_std[i], want.inv_std)
        kind = precision(dtype)
        assert_forward(
            got.y[part], x[part],
            reference.train(x[part], gamma, beta, eps=1e-3, activation="relu", dtype=kind), gamma, beta,
        )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(running, want_running, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, threads):
    values = rng(layout).standard_normal((4, 5, 6, 7)).astype(np.float32)
    dy = place(layout, rng("dy", layout).standard_normal(values.shape).astype(np.float32)).view
    x = place(layout, values).view
    got = batchnorm.ghost_batch_norm_train(x, virtual_batch_size=2)
    back = batchnorm.ghost_batch_norm_backward(dy, x, got.mean, got.inv_std, virtual_batch_size=2)
    for i, part in enumerate(parts(4, 2)):
        y, mean, inv_std = batchnorm.batch_norm_train(x[part])
        assert np.array_equal(got.y[part], y) and same_bits(got.mean[i], mean)
        want = batchnorm.batch_norm_backward(dy[part], x[part], mean, inv_std)
        assert np.array_equal(back.dx[part], want.dx)
    again = place(layout, values).view
    assert batchnorm.ghost_batch_norm_train(again, virtual_batch_size=2, out=again).y is again
    assert np.array_equal(again, got.y)
    assert batchnorm.ghost_batch_norm_backward(
        dy, x, got.mean, got.inv_std, virtual_batch_size=2, out=dy
    ).dx is dy  # fmt: skip
    assert np.array_equal(dy, back.dx)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_that_of_each_part(shape, with_residual):
    x, dy, (gamma, beta) = normal(shape, FLOAT32), gradient_of(shape, FLOAT32), parameters(shape.channels)
    z = residual_of(shape, FLOAT32) if with_residual else None
    forward = batchnorm.ghost_batch_norm_train(
        x, gamma, beta, virtual_batch_size=3, activation="relu", residual=z
    )
    mask = forward.activation_mask if with_residual else None
    options = dict(
        activation="relu", needs=("dx", "dgamma", "dbeta", *(["dresidual"] if with_residual else []))
    )
    got = batchnorm.ghost_batch_norm_backward(
        dy,
        x,
        forward.mean,
        forward.inv_std,
        gamma,
        beta,
        virtual_batch_size=3,
        activation_mask=mask,
        **options,
    )
    sums = np.zeros((2, shape.channels))
    for i, part in enumerate(parts(shape.outer, 3)):
        want = batchnorm.batch_norm_backward(
            dy[part], x[part], forward.mean[i], forward.inv_std[i], gamma.astype(float), beta.astype(float),
            activation_mask=None if mask is None else mask[i], **options,
        )  # fmt: skip
        sums += [want.dgamma, want.dbeta]
        assert np.array_equal(got.dx[part], want.dx)
        if with_residual:
            assert np.array_equal(got.dresidual[part], want.dresidual)
    assert same_bits(got.dgamma, sums[0].astype(np.float32))
    assert same_bits(got.dbeta, sums[1].astype(np.float32))


def test_selective():
    x, dy = normal(SHAPES[0], FLOAT32), gradient_of(SHAPES[0], FLOAT32)
    f = batchnorm.ghost_batch_norm_train(x, virtual_batch_size=3)
    full = batchnorm.ghost_batch_norm_backward(dy, x, f.mean, f.inv_std, virtual_batch_size=3)
    assert full.dgamma.dtype == np.float32
    for name in full._fields:
        one = batchnorm.ghost_batch_norm_backward(
            dy, x, f.mean, f.inv_std, virtual_batch_size=3, needs=(name,)
        )
        assert [n for n in full._fields if getattr(one, n) is not None] == [name]
        assert same_bits(getattr(one, name), getattr(full, name))


def test_no_samples_and_other_axes():
    running = np.zeros(3), np.ones(3)
    x = np.zeros((0, 3, 5), np.float32)
    f = batchnorm.ghost_batch_norm_train(
        x, virtual_batch_size=8, running_mean=running[0], running_var=running[1]
    )
    assert f.y.shape == x.shape and f.mean.shape == (0, 3) and running[1].tolist() == [1.0] * 3
    g = batchnorm.ghost_batch_norm_backward(x, x, f.mean, f.inv_std, virtual_batch_size=8)
    assert g.dx.shape == x.shape and g.dgamma.tolist() == g.dbeta.tolist() == [0.0] * 3
    y = batchnorm.ghost_batch_norm_train(
        np.ones((4, 5, 3), np.float32), virtual_batch_size=2, data_format="NLC"
    )
    assert y.mean.shape == (2, 3)


@pytest.mark.skipif(BFLOAT16 is None, reason="ml_dtypes is not installed")
def test_bfloat16_first():
    x = np.ones((4, 3, 5), BFLOAT16)
    assert batchnorm.ghost_batch_norm_train(x, virtual_batch_size=2).y.dtype == BFLOAT16


def v(n=6):
    return np.ones(n, np.float32)


ERRORS = {
    "not a divisor": (
        {"virtual_batch_size": 5}, ValueError,
        r"virtual_batch_size is 5, which does not divide the 12 samples.*such as 4 or 6",
    ),
    "too large": ({"virtual_batch_size": 24}, ValueError, "divide the 12 samples.*such as 12"),
    "zero": ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size is 0, expected an int >= 1"),
    "float": ({"virtual_batch_size": 2.0}, TypeError, "virtual_batch_size is 2.0"),
    "axis": ({"axis": 0}, ValueError, "axis is 0, the axis of the samples"),
    "momentum": ({"momentum": 0.1}, TypeError, r"ghost_batch_norm_train\(\) has no argument 'momentum'"),
    "one running": ({"running_mean": v()}, ValueError, "running_var is None but running_mean is given"),
    "gamma": ({"gamma": v(5)}, ValueError, r"gamma has shape \(5,\)"),
    "residual": ({"residual": np.ones((2, 6, 4), np.float32)}, ValueError, "residual has shape"),
    "decay": ({"running_mean": v(), "running_var": v(), "decay": 2.0}, ValueError, "decay is 2.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_change_nothing(name):
    change, error, match = ERRORS[name]
    x = np.arange(288, dtype=np.float32).reshape(12, 6, 4)
    out = np.zeros_like(x)
    with pytest.raises(error, match=match):
        batchnorm.ghost_batch_norm_train(x, out=out, **{"virtual_batch_size": 4} | change)
    assert np.all(out == 0) and all(np.all(a == 1) for a in change.values() if isinstance(a, np.ndarray))


def test_overlaps_are_seen_across_parts():
    memory = np.zeros((8, 3, 4), np.float32)
    x, out = memory[:6], memory[2:]
    with pytest.raises(ValueError, match="out overlaps x"):
        batchnorm.ghost_batch_norm_train(x, virtual_batch_size=2, out=out)
    both = np.zeros(12, np.float32)
    with pytest.raises(ValueError, match="running_mean shares memory with gamma"):
        batchnorm.ghost_batch_norm_train(
            x, both[:3], virtual_batch_size=2, running_mean=both[:3], running_var=both[3:6]
        )
    m = np.ones((3, 3))
    with pytest.raises(ValueError, match="out overlaps x"):
        batchnorm.ghost_batch_norm_backward(x.copy(), x, m, m, virtual_batch_size=2, out=out)
    dy = x.copy()
    with pytest.raises(ValueError, match="out and out_residual overlap"):
        batchnorm.ghost_batch_norm_backward(
            dy, x, m, m, virtual_batch_size=2, needs=("dx", "dresidual"), out=dy, out_residual=dy
        )


def test_one_value_and_backward_errors():
    with pytest.raises(
        ValueError, match=r"virtual_batch_size is 1, with which a part of x.*one value per channel"
    ):
        batchnorm.ghost_batch_norm_train(np.ones((4, 3), np.float32), virtual_batch_size=1)
    x, m = np.ones((4, 3, 5), np.float32), np.ones((2, 3))
    call = batchnorm.ghost_batch_norm_backward
    with pytest.raises(
        ValueError, match=r"mean has shape \(3,\), expected a float32 or float64 array of shape \(2, 3\)"
    ):
        call(x, x, m[0], m, virtual_batch_size=2)
    with pytest.raises(TypeError, match="inv_std has dtype int64"):
        call(x, x, m, m.astype(np.int64), virtual_batch_size=2)
    with pytest.raises(ValueError, match="activation_mask has no 2 rows"):
        call(x, x, m, m, virtual_batch_size=2, activation="relu", activation_mask=np.zeros(9, np.uint8))
    with pytest.raises(ValueError, match="out is given but needs does not contain 'dx'"):
        call(x, x, m, m, virtual_batch_size=2, needs=("dbeta",), out=np.ones_like(x))
    with pytest.raises(TypeError, match="has no argument 'stats'"):
        call(x, x, m, m, virtual_batch_size=2, stats="fixed")
