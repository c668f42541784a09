"""Which positions count: mask, lengths and weights equal dropping and repeating, in forward, statistics and
backward; what does not count is not read, and 0 in every output."""

from __future__ import annotations

import itertools
import re

import batchnorm
import numpy as np
import pytest

from cases import (
    DTYPES,
    EDGE_SHAPES,
    FLOAT32,
    FLOAT64,
    SHARED_SHAPES,
    SOME_SHAPES,
    Shape,
    exact,
    gradient_of,
    normal,
    parameters,
    residual_of,
    rng,
    same_bits,
)

MASKED_SHAPES = [s for s in EDGE_SHAPES if s.count > 2 and s.count * s.channels < 100_000]
ACTIVATIONS = [None, "relu", "leaky_relu", "silu"]


def position_mask(shape, seed=0, share=0.6):
    """A mask (outer, inner): at least two positions count, at least one does not."""
    keep = rng("mask", str(shape), seed).random((shape.outer, shape.inner)) < share
    keep.flat[[0, -1]], keep.flat[shape.count // 2] = True, False
    return keep


def dropped(x, keep):
    """The positions that count, as a batch (n, C) of their own, in x's order."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), 1, 2)[keep])


def spoiled(x, keep):
    """x with NaN where nothing may look."""
    bad = x.copy(order="K")
    np.moveaxis(bad, 1, 2)[~keep] = np.nan
    assert np.isnan(bad.astype(np.float32)).any()
    return bad


def is_zero(a, keep):
    return not np.moveaxis(np.asarray(a), 1, 2)[~keep].astype(np.float64).any()


def close(a, b, bound):
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= bound * np.maximum(1, np.abs(b))))


# ---- mask: as if the positions were not there --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MASKED_SHAPES, ids=str)
def test_exact_statistics_are_those_of_the_rest(shape, dtype):
    x, keep = exact(shape, dtype).x, position_mask(shape)
    got, want = batchnorm.moments(spoiled(x, keep), mask=keep), batchnorm.moments(dropped(x, keep))
    assert same_bits(got.mean, want.mean)
    assert close(got.var / np.maximum(want.var, 1e-300), want.var / np.maximum(want.var, 1e-300), 4e-16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_training_is_that_of_the_rest(shape, dtype, activation, isa):
    keep, (gamma, beta) = position_mask(shape), parameters(shape.channels)
    x, dy, z = normal(shape, dtype), gradient_of(shape, dtype), residual_of(shape, dtype)
    options = {"activation": activation}
    running, rest_running = (
        [np.zeros(shape.channels), np.ones(shape.channels)],
        [np.zeros(shape.channels), np.ones(shape.channels)],
    )
    got = batchnorm.batch_norm_train(
        spoiled(x, keep), gamma, beta, running_mean=running[0], running_var=running[1], mask=keep,
        residual=spoiled(z, keep), **options,
    )  # fmt: skip
    want = batchnorm.batch_norm_train(
        dropped(x, keep), gamma, beta, running_mean=rest_running[0], running_var=rest_running[1],
        residual=dropped(z, keep), **options,
    )  # fmt: skip
    for a, b in zip((got.mean, got.inv_std, *running), (want.mean, want.inv_std, *rest_running), strict=True):
        assert close(a, b, 1e-12)
    wide = np.finfo(np.float64).eps if dtype == FLOAT64 else np.finfo(np.float32).eps
    storage = max(wide, float(2.0**-8 if dtype.name == "bfloat16" else np.finfo(dtype).eps))
    assert is_zero(got.y, keep) and close(dropped(got.y, keep), want.y, 8 * storage)

    # With the very same statistics gradients agree to the rounding of the sums.
    mask = getattr(got, "activation_mask", None)
    rest_mask = getattr(want, "activation_mask", None)
    needs = ("dx", "dgamma", "dbeta", "dresidual")
    smooth = activation == "silu"  # asks for the residual
    got = batchnorm.batch_norm_backward(
        spoiled(dy, keep), spoiled(x, keep), want.mean, want.inv_std, gamma, beta, mask=keep,
        activation_mask=mask, needs=needs, residual=spoiled(z, keep) if smooth else None, **options,
    )  # fmt: skip
    want = batchnorm.batch_norm_backward(
        dropped(dy, keep), dropped(x, keep), want.mean, want.inv_std, gamma, beta,
        activation_mask=rest_mask, needs=needs, residual=dropped(z, keep) if smooth else None, **options,
    )  # fmt: skip
    size = np.abs(dropped(dy, keep).astype(np.float64)).sum(axis=0).max() * 3
    flips = 0 if mask is None else None  # y may round to either side of 0
    if flips == 0 or dtype == FLOAT64:
        assert close(got.dgamma, want.dgamma, 1e-6 * size) and close(got.dbeta, want.dbeta, 1e-6 * size)
        assert close(dropped(got.dx, keep), want.dx, 64 * storage)
    assert is_zero(got.dx, keep) and is_zero(got.dresidual, keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_inference_is_that_of_the_rest(shape, dtype, isa):
    x, keep, (gamma, beta) = normal(shape, dtype), position_mask(shape), parameters(shape.channels)
    mean, var = np.linspace(-1, 1, shape.channels), np.linspace(0.5, 2, shape.channels)
    options = {"activation": "relu"}
    got = batchnorm.batch_norm(spoiled(x, keep), mean, var, gamma, beta, mask=keep, **options)
    want = batchnorm.batch_norm(x, mean, var, gamma, beta, **options)
    assert is_zero(got, keep) and same_bits(dropped(got, keep), dropped(want, keep))
    dy, inv_std = gradient_of(shape, dtype), 1 / np.sqrt(var + 1e-5)
    got = batchnorm.batch_norm_backward(
        spoiled(dy, keep), spoiled(x, keep), mean, inv_std, gamma, beta, stats="fixed", mask=keep, **options
    )
    want = batchnorm.batch_norm_backward(dy, x, mean, inv_std, gamma, beta, stats="fixed", **options)
    assert is_zero(got.dx, keep) and same_bits(dropped(got.dx, keep), dropped(want.dx, keep))


@pytest.mark.parametrize("shape", SHARED_SHAPES, ids=str)
def test_in_place_and_streamed(shape, set_tuning):
    x, keep, dy = normal(shape, FLOAT32), position_mask(shape), gradient_of(shape, FLOAT32)
    want = batchnorm.batch_norm_train(x, mask=keep)
    dx = batchnorm.batch_norm_backward(dy, x, want.mean, want.inv_std, mask=keep).dx
    for settings in ("", "cached_bytes=0,stream_run_bytes=0", "map_bytes=1,group_bytes=1"):
        set_tuning(settings)
        y, g = x.copy(order="K"), dy.copy(order="K")
        got = batchnorm.batch_norm_train(y, mask=keep, out=y)
        assert got.y is y and same_bits(y, want.y) and same_bits(got.mean, want.mean)
        batchnorm.batch_norm_backward(g, x, want.mean, want.inv_std, mask=keep, out=g)
        assert same_bits(g, dx)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("shape", SHARED_SHAPES, ids=str)
def test_same_bits_for_any_threads_and_level(shape, dtype):
    x, keep, dy = normal(shape, dtype), position_mask(shape), gradient_of(shape, dtype)
    weights = rng("weights", str(shape)).random((shape.outer, shape.inner)) * 3
    results = []
    before = batchnorm.get_isa()
    try:
        for isa, threads in itertools.product(batchnorm.isa_levels(), (1, 3)):
            batchnorm.set_isa(isa)
            for options in ({"mask": keep}, {"weights": weights}, {"mask": keep, "weights": weights}):
                a = batchnorm.batch_norm_train(x, num_threads=threads, **options)
                b = batchnorm.batch_norm_backward(
                    dy, x, a.mean, a.inv_std, num_threads=threads, activation="relu", **options
                )
                results.append([v.tobytes() for v in (*a, *b)])
    finally:
        batchnorm.set_isa(before)
    for i in range(3, len(results)):
        assert results[i] == results[i % 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_all_true_and_all_one_change_no_bit(shape, dtype):
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    plain = batchnorm.batch_norm_train(x)
    gradients = batchnorm.batch_norm_backward(dy, x, plain.mean, plain.inv_std)
    ones = np.ones((shape.outer, shape.inner))
    for options in ({"mask": ones > 0}, {"weights": ones}, {"weights": np.ones(shape.outer, int)}):
        got = batchnorm.batch_norm_train(x, **options)
        assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True)), options
        got = batchnorm.batch_norm_backward(dy, x, plain.mean, plain.inv_std, **options)
        assert all(same_bits(a, b) for a, b in zip(got, gradients, strict=True)), options


# ---- weights: as if repeated -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_integer_weights_repeat(shape, dtype, isa):
    x = exact(shape, dtype).x
    weights = rng("integers", str(shape)).integers(0, 4, (shape.outer, shape.inner))
    weights.flat[0] = 3
    rows = np.repeat(np.moveaxis(x, 1, 2).reshape(shape.count, -1), weights.reshape(-1), axis=0)
    want = batchnorm.moments(np.ascontiguousarray(rows))
    for w in (weights, weights.astype(np.float32), weights * 2.0**-700):
        got = batchnorm.moments(spoiled(x, weights > 0), weights=w)
        # Double data is summed about the mean of its first values, which are others in the repeated batch.
        assert same_bits(got.mean, want.mean) or (dtype == FLOAT64 and close(got.mean, want.mean, 1e-15))
        assert np.all(np.abs(got.var - want.var) <= 4e-16 * want.var)
    assert same_bits(
        batchnorm.moments(x, weights=weights, mask=weights > 1).mean,
        batchnorm.moments(x, weights=weights * (weights > 1)).mean,
    )


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_weighted_training(shape, dtype, per_sample, isa):
    generator = rng("weights", str(shape))
    weights = generator.random(shape.outer if per_sample else (shape.outer, shape.inner)) + 0.1
    w = np.broadcast_to(weights[:, None] if per_sample else weights, (shape.outer, shape.inner))[:, None, :]
    x, dy, (gamma, beta) = normal(shape, dtype), gradient_of(shape, dtype), parameters(shape.channels)
    running = np.zeros(shape.channels), np.ones(shape.channels)
    got = batchnorm.batch_norm_train(
        x, gamma, beta, weights=weights, running_mean=running[0], running_var=running[1], running_ddof=0
    )
    wide, n = x.astype(np.float64), w.sum()
    mean = (w * wide).sum(axis=(0, 2)) / n
    centred = wide - mean[:, None]
    var = (w * centred * centred).sum(axis=(0, 2)) / n
    assert close(got.mean, mean, 1e-12) and close(got.inv_std**-2 - 1e-5, var, 1e-11)
    assert close(running[0], 0.1 * mean, 1e-12) and close(running[1], 0.9 + 0.1 * var, 1e-11)
    out = x.copy(order="K")
    assert batchnorm.batch_norm_train(out, gamma, beta, weights=weights, out=out).y is out
    assert same_bits(out, got.y)

    grads = batchnorm.batch_norm_backward(dy, x, got.mean, got.inv_std, gamma, beta, weights=weights)
    x_hat, g = centred * got.inv_std[:, None], dy.astype(np.float64)
    dbeta, dgamma = g.sum(axis=(0, 2)), (g * x_hat).sum(axis=(0, 2))
    pulled = w / n * dbeta[:, None] + w / n * x_hat * dgamma[:, None]
    scale = (gamma * got.inv_std)[:, None]
    dx = scale * (g - pulled)
    size = np.abs(scale) * (np.abs(g) + np.abs(pulled)).max()
    eps = 2.0**-8 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)
    assert np.all(np.abs(grads.dx.astype(np.float64) - dx) <= 8 * max(eps, 2**-50) * (size + 1e-3))
    sums = np.abs(g).sum(axis=(0, 2)) * (1 + np.abs(x_hat).max())
    assert np.all(np.abs(grads.dbeta - dbeta) <= 1e-6 * sums)
    assert np.all(np.abs(grads.dgamma - dgamma) <= 1e-6 * sums)


def test_weighted_gradient_is_the_derivative():
    shape = Shape("ncs", 3, 2, 5)
    x, dy = normal(shape, FLOAT64), gradient_of(shape, FLOAT64)
    weights, keep = rng("w").random((3, 5)) * 2, position_mask(shape)

    def loss(at):
        return (dy * batchnorm.batch_norm_train(at, weights=weights, mask=keep).y).sum()

    result = batchnorm.batch_norm_train(x, weights=weights, mask=keep)
    dx = batchnorm.batch_norm_backward(dy, x, result.mean, result.inv_std, weights=weights, mask=keep).dx
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        assert abs((loss(x + step) - loss(x - step)) / 2e-6 - dx[index]) < 1e-7


def test_weights_of_what_does_not_count_are_not_read():
    x, keep = normal(Shape("ncs", 4, 3, 6), FLOAT32), np.ones((4, 6), bool)
    keep[1], keep[2, 3:] = False, False
    weights = rng("some").random((4, 6))
    want = batchnorm.batch_norm_train(x, mask=keep, weights=weights)
    weights[1], weights[2, 3:] = np.nan, -np.inf
    got = batchnorm.batch_norm_train(x, mask=keep, weights=weights)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_running_variance_divides_by_the_sum_of_weights():
    x, weights = np.array([[1.0], [2.0], [4.0]]), np.array([0.5, 1.0, 2.0])
    running = np.zeros(1), np.zeros(1)
    batchnorm.batch_norm_train(x, weights=weights, running_mean=running[0], running_var=running[1], decay=0)
    mean = (weights @ x)[0] / 3.5
    var = (weights @ (x - mean) ** 2)[0]
    assert running[0][0] == pytest.approx(mean, rel=1e-15)
    assert running[1][0] == pytest.approx(var / 2.5, rel=1e-15)
    assert batchnorm.moments(x, weights=weights, ddof=2).var[0] == pytest.approx(var / 1.5, rel=1e-15)


# ---- lengths, shapes and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 2])
def test_lengths_are_a_mask(axis):
    x = rng("lengths").standard_normal((4, 6, 7)).astype(np.float32)
    steps = x.shape[3 - axis]
    lengths = np.array([steps, 0, 1, 3], np.int16)
    mask = np.arange(steps) < lengths[:, None]
    got, want = (
        batchnorm.batch_norm_train(x, axis=axis, **o) for o in ({"lengths": lengths}, {"mask": mask})
    )
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    again = batchnorm.batch_norm_train(x, axis=axis, lengths=lengths, lengths_axis=3 - axis)
    assert same_bits(again.y, want.y)


def test_lengths_of_other_axes():
    x = rng("video").standard_normal((3, 4, 5, 6)).astype(np.float32)
    for axis, steps in ((2, 5), (-1, 6)):
        lengths = np.array([steps, 1, 2])
        mask = np.arange(steps) < lengths[:, None]
        mask = mask[:, :, None] if steps == 5 else mask[:, None, :]
        got = batchnorm.moments(x, lengths=lengths, lengths_axis=axis)
        assert same_bits(got.mean, batchnorm.moments(x, mask=mask).mean)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_any_memory_order(order):
    x = rng("order").standard_normal((3, 4, 5, 6)).transpose(order).copy().transpose(np.argsort(order))
    generator = rng("order", order)
    for axis in range(4):
        shape = tuple(n for i, n in enumerate(x.shape) if i != axis)
        keep, weights = generator.random(shape) < 0.7, generator.random(shape)
        rows = np.moveaxis(x, axis, -1)[keep]
        assert close(batchnorm.moments(x, axis=axis, mask=keep).mean, rows.mean(axis=0), 1e-13)
        got = batchnorm.batch_norm_train(x, axis=axis, mask=keep, weights=weights)
        mean = (rows * weights[keep][:, None]).sum(axis=0) / weights[keep].sum()
        assert close(got.mean, mean, 1e-13) and not np.moveaxis(got.y, axis, -1)[~keep].any()
        for part in ((shape[0],), (shape[0], 1, 1), (1, shape[1], 1), (1, shape[2]), (shape[0], 1, shape[2])):
            some = generator.random(part) + 0.1
            full = np.broadcast_to(some[:, None, None] if len(part) == 1 else some, shape)
            a, b = (batchnorm.moments(x, axis=axis, weights=w) for w in (some, full.copy()))
            assert close(a.mean, b.mean, 1e-14) and close(a.var, b.var, 1e-14)  # the sum of weights rounds
            a, b = (batchnorm.moments(x, axis=axis, mask=w > 0.5) for w in (some, full))
            assert same_bits(a.mean, b.mean) and same_bits(a.var, b.var)


def test_views_and_several_axes():
    base = rng("views").standard_normal((6, 8, 10, 12)).astype(np.float32)
    x, keep = base[::-2, 1:5, ::3, 2:], rng("keep").random((3, 4, 10)) < 0.5
    got = batchnorm.batch_norm_train(x, mask=keep)
    want = batchnorm.batch_norm_train(np.ascontiguousarray(x), mask=keep)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    lengths = np.array([10, 1, 4])
    got = batchnorm.batch_norm_train(x, axis=(1, 2), lengths=lengths, lengths_axis=3)
    merged = batchnorm.batch_norm_train(np.ascontiguousarray(x).reshape(3, 16, 10), lengths=lengths)
    assert same_bits(got.y.reshape(3, 16, 10), merged.y) and got.mean.shape == (4, 4)


# ---- nothing counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["ncs", "nsc"])
def test_nothing_counts(direction):
    x = normal(Shape(direction, 3, 5, 4), FLOAT32)
    nothing = np.zeros((3, 4), bool)
    for options in ({"mask": nothing}, {"lengths": np.zeros(3, int)}, {"weights": np.zeros(3)}):
        running = np.full(5, 2.0), np.full(5, 3.0)
        result = batchnorm.batch_norm_train(
            x * np.nan, running_mean=running[0], running_var=running[1], **options
        )
        assert not result.y.any() and np.isnan(result.mean).all() and np.isnan(result.inv_std).all()
        assert (running[0] == 2).all() and (running[1] == 3).all()
        grads = batchnorm.batch_norm_backward(x, x, result.mean, result.inv_std, **options)
        assert not any(g.any() for g in grads)
        assert np.isnan(batchnorm.moments(x, ddof=1, **options).var).all()
    y = batchnorm.batch_norm(x, np.zeros(5), np.ones(5), np.ones(5), np.ones(5), mask=nothing)
    assert not y.any()
    empty = np.empty((0, 5, 4), np.float32)
    assert batchnorm.batch_norm_train(empty, mask=np.empty((0, 4), bool)).y.shape == (0, 5, 4)


# ---- moments' other options --------------------------------------------------------------------------------


def test_shift_has_no_influence():
    x = normal(Shape("ncs", 3, 5, 4), FLOAT32)
    want = batchnorm.moments(x)
    for shift in (0, 1.5, np.float32(3), np.array(2.0), np.ones(5), want.mean):
        got = batchnorm.moments(x, shift=shift, keepdims=True)
        assert got.mean.shape == (1, 5, 1) and same_bits(got.mean.reshape(5), want.mean)


# ---- errors ------------------------------------------------------------------------------------------------

X = np.ones((4, 3, 5), np.float32)
STATISTICS = np.zeros(3), np.ones(3)
KEEP = np.ones((4, 5), bool)


def train(**options):
    return batchnorm.batch_norm_train(X, **options)


ERRORS = [
    (TypeError, "mask is of type list, expected a bool array", {"mask": [[True]]}),
    (TypeError, "mask has dtype uint8, expected a bool array", {"mask": KEEP.astype(np.uint8)}),
    (TypeError, "or activation_mask= for what a forward returned", {"mask": KEEP.astype(np.uint8)}),
    (TypeError, "mask has dtype float32, expected", {"mask": KEEP.astype(np.float32)}),
    (ValueError, "mask has shape (4, 6), expected (4,) or one that broadcasts to (4, 5), the shape of x",
     {"mask": np.ones((4, 6), bool)}),
    (ValueError, "mask has shape (4, 3, 5), expected", {"mask": np.ones((4, 3, 5), bool)}),
    (ValueError, "it has x's shape, but all channels of a position", {"mask": np.ones((4, 3, 5), bool)}),
    (ValueError, "for one value per index of another axis than the first use mask[None, ...]",
     {"mask": np.ones(5, bool)}),
    (ValueError, "mask and lengths are both given", {"mask": KEEP, "lengths": np.ones(4, int)}),
    (ValueError, "lengths_axis is given without lengths", {"lengths_axis": 2}),
    (TypeError, "lengths is of type list, expected an int array of shape (4,)", {"lengths": [1, 2, 3, 4]}),
    (TypeError, "lengths has dtype float64, expected an int array", {"lengths": np.ones(4)}),
    (TypeError, "lengths has dtype bool, expected an int array", {"lengths": np.ones(4, bool)}),
    (ValueError, "lengths has shape (3,), expected an int array of shape (4,)", {"lengths": np.ones(3, int)}),
    (ValueError, "lengths is 6 at sample 1, expected 0 to 5, the length of axis 2",
     {"lengths": np.array([1, 6, 1, 1])}),
    (ValueError, "lengths is -1 at sample 0, expected 0 to 5", {"lengths": np.array([-1, 6, 1, 1])}),
    (ValueError, "lengths is given with the channels on axis 0", {"lengths": np.ones(4, int), "axis": 0}),
    (TypeError, "lengths_axis is 2.0 (float), expected an int",
     {"lengths": np.ones(4, int), "lengths_axis": 2.0}),
    (ValueError, "lengths_axis is 3, expected -3 <= lengths_axis < 3",
     {"lengths": np.ones(4, int), "lengths_axis": 3}),
    (ValueError, "lengths_axis is -3, the axis of the samples",
     {"lengths": np.ones(4, int), "lengths_axis": -3}),
    (ValueError, "lengths_axis is 1, the axis of the channels",
     {"lengths": np.ones(4, int), "lengths_axis": 1}),
    (TypeError, "weights is of type list, expected a float or int array", {"weights": [1.0]}),
    (TypeError, "weights has dtype bool, expected a float or int array", {"weights": KEEP}),
    (TypeError, "a bool array is a mask=", {"weights": KEEP}),
    (TypeError, "weights has dtype complex128, expected", {"weights": KEEP * 1j}),
    (ValueError, "weights has shape (3,), expected (4,) or one that broadcasts", {"weights": np.ones(3)}),
    (ValueError, "weights holds -1.0 at (2, 0), expected finite values >= 0",
     {"weights": np.array([0.0, 1, -1, 1])}),
    (ValueError, "weights holds nan at (0, 0), expected finite", {"weights": np.full((4, 5), np.nan)}),
    (ValueError, "weights holds inf at (0, 0), expected finite", {"weights": np.full((4, 5), np.inf)}),
    (ValueError, "weights sum to inf, expected a sum that a float64 holds", {"weights": np.full(4, 1e308)}),
    (ValueError, "x has shape (4, 3, 5) with one value per channel that counts (axis 1)",
     {"lengths": np.array([0, 1, 0, 0])}),
    (ValueError, "weights sum to 0.625, expected more than running_ddof = 1 for the running variance",
     {"weights": np.full((4, 5), 2.0**-5), "running_mean": np.zeros(3), "running_var": np.ones(3)}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(("error", "message", "options"), ERRORS, ids=[e[1][:60] for e in ERRORS])
def test_errors(error, message, options):
    with pytest.raises(error, match=re.escape(message)):
        train(**options)
    if "running_mean" in options:
        assert not options["running_mean"].any()
        train(**options | {"running_ddof": 0})


def test_errors_of_other_functions():
    lengths = np.ones(4, int)
    with pytest.raises(ValueError, match="lengths_axis is None, expected the axis along which lengths count"):
        batchnorm.moments(X[..., None], lengths=lengths)
    with pytest.raises(ValueError, match="weights is given with stats='fixed', where no statistics"):
        batchnorm.batch_norm_backward(X, X, *STATISTICS, stats="fixed", weights=np.ones(4))
    with pytest.raises(ValueError, match=r"with one value per channel that counts .*stats='batch'"):
        batchnorm.batch_norm_backward(X, X, *STATISTICS, lengths=np.array([1, 0, 0, 0]))
    with pytest.raises(
        ValueError, match="ddof is 4, expected less than the 4 values per channel that counts of x"
    ):
        batchnorm.moments(X, lengths=lengths, ddof=4)
    with pytest.raises(ValueError, match=re.escape("ddof is 2, expected less than the 2.0 that the weights")):
        batchnorm.moments(X, weights=np.full(4, 0.1), ddof=2)
    integers = X.astype(np.uint8)
    with pytest.raises(TypeError, match="mask is given with x of dtype uint8, of which all positions count"):
        batchnorm.batch_norm(integers, *STATISTICS, mask=KEEP)
    with pytest.raises(TypeError, match="lengths is given with x of dtype uint8"):
        batchnorm.moments(integers, lengths=lengths)
    with pytest.raises(TypeError, match="weights is given with x of dtype uint8"):
        batchnorm.moments(integers, weights=np.ones(4))
    with pytest.raises(TypeError, match="has no argument 'weights'"):
        batchnorm.batch_norm(X, *STATISTICS, weights=np.ones(4))
    with pytest.raises(TypeError, match=r"shift is 'a' .*expected a number, or an array of one per channel"):
        batchnorm.moments(X, shift="a")
    with pytest.raises(ValueError, match="shift is nan, expected finite values"):
        batchnorm.moments(X, shift=np.nan)
    with pytest.raises(ValueError, match=re.escape("shift has shape (2,), expected (3,)")):
        batchnorm.moments(X, shift=np.ones(2))


def test_outputs_overlap_no_mask():
    memory = np.zeros(240, np.uint8)
    out, mask = memory.view(np.float32).reshape(4, 3, 5), memory[:20].view(bool).reshape(4, 5)
    with pytest.raises(ValueError, match="out overlaps mask, expected separate arrays"):
        batchnorm.batch_norm(X, *STATISTICS, mask=mask, out=out)
    out, weights = np.zeros((4, 3, 5)), None
    weights = out[0, 0, :4]
    with pytest.raises(ValueError, match="out overlaps weights, expected separate arrays"):
        batchnorm.batch_norm_train(X.astype(np.float64), weights=weights, out=out)
