"""`residual=`, added before the activation, its gradient, and the mask of where the activation was on.

An activation_mask is one bit per element, from the lowest bit of the first byte on. Each run of a channel
(direction ncs) and each row of channels (nsc) starts at a whole byte, but rows of fewer than 64 channels
follow one another bit by bit; 4 bytes at the end are spare. `Bits` below reads it in NumPy, from this
description alone.
"""

from __future__ import annotations

import copy
import pickle

import batchnorm
import numpy as np
import pytest

import reference
from cases import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    LAYOUTS,
    SAME_DIRECTION,
    THREADS,
    Shape,
    at_offset,
    gradient_of,
    normal,
    outside_is_untouched,
    parameters,
    place,
    residual_of,
    rng,
    same_bits,
    subsets,
)
from checks import assert_forward, assert_gradients, precision

SHAPES = [
    Shape("ncs", 1, 3, 17), Shape("ncs", 3, 2, 4100), Shape("ncs", 5, 20, 49), Shape("ncs", 4, 65, 7),
    Shape("ncs", 40, 20, 1), Shape("ncs", 2, 2, 17000), Shape("ncs", 3, 33, 700), Shape("ncs", 7, 1, 130),
    Shape("nsc", 37, 3, 1), Shape("nsc", 245, 20, 1), Shape("nsc", 4097, 1, 1), Shape("nsc", 33, 63, 1),
    Shape("nsc", 33, 64, 1), Shape("nsc", 17, 65, 1), Shape("nsc", 7, 2051, 1), Shape("nsc", 5, 3000, 1),
    Shape("nsc", 9, 16, 49), Shape("nsc", 3500, 20, 1), Shape("nsc", 1100, 64, 1),
]  # fmt: skip
FEW_SHAPES = [
    Shape("ncs", 3, 4, 300), Shape("ncs", 5, 20, 49), Shape("nsc", 245, 20, 1), Shape("nsc", 33, 65, 1),
    Shape("nsc", 5, 2051, 1),
]  # fmt: skip

# How work is laid out: as it comes; shared among threads, stored past the caches; in the smallest pieces, by
# several threads and by one.
WORK = {
    "default": "",
    "streamed": "cached_bytes=0,stream_run_bytes=0,parallel_elements=0",
    "shared pieces": "l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=0",
    "serial pieces": "l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=1000000000",
}
NEEDS = ("dx", "dgamma", "dbeta", "dresidual")


@pytest.fixture(params=WORK)
def work(request, set_tuning):
    set_tuning(WORK[request.param])
    return request.param


class Bits:
    """The layout of an activation_mask for an x (outer, channels, inner)."""

    def __init__(self, shape):
        whole_bytes = lambda n: -(-n // 8) * 8  # noqa: E731
        self.shape = shape
        self.runs = shape.inner > 1 and (shape.direction == "ncs" or shape.channels == 1)
        if self.runs:
            self.length = whole_bytes(shape.inner)
            n_bits = shape.outer * shape.channels * self.length
        else:
            self.length = shape.channels if shape.channels < 64 else whole_bytes(shape.channels)
            n_bits = shape.count * self.length
        self.bytes = -(-n_bits // 8) + 4
        self.n_bits = n_bits

    def split(self, activation_mask):
        """Where the activation was on, as bools (outer, channels, inner), and all bits that say nothing."""
        assert activation_mask.dtype == np.uint8 and activation_mask.shape == (self.bytes,)
        outer, channels, inner = self.shape.outer, self.shape.channels, self.shape.inner
        bits = np.unpackbits(activation_mask, bitorder="little")
        if self.runs:
            table = bits[: self.n_bits].reshape(outer, channels, self.length)
            on, unused = table[..., :inner], table[..., inner:]
        else:
            table = bits[: self.n_bits].reshape(outer, inner, self.length)
            on, unused = table[..., :channels].transpose(0, 2, 1), table[..., channels:]
        return on.astype(bool), np.concatenate([unused.ravel(), bits[self.n_bits :]])


class Problem:
    """All arguments for one shape."""

    def __init__(self, shape, dtype, activation="relu", seed=0):
        self.shape, self.activation = shape, activation
        self.x, self.dy = normal(shape, dtype, seed), gradient_of(shape, dtype, seed)
        self.z = residual_of(shape, dtype, seed)
        kind = np.float64 if dtype == FLOAT64 else np.float32
        self.gamma, self.beta = parameters(shape.channels, kind, seed)

    def forward(self, **options):
        options = {"residual": self.z, "activation": self.activation, **options}
        return batchnorm.batch_norm_train(self.x, self.gamma, self.beta, **options)

    def backward(self, forward, dy=None, **options):
        options = {
            "activation": self.activation,
            "activation_mask": getattr(forward, "activation_mask", None),
            **options,
        }
        dy = self.dy if dy is None else dy
        return batchnorm.batch_norm_backward(
            dy, self.x, forward.mean, forward.inv_std, self.gamma, self.beta, **{"needs": NEEDS, **options}
        )

    def gated(self, on):
        """dy where the forward let through, else 0, in x's memory order."""
        dy = np.empty_like(self.x)
        dy[...] = np.where(on, self.dy, self.x.dtype.type(0))
        return dy


def positive(y):
    """y > 0 as plain bools; NaN is not, and warns of nothing."""
    return y.astype(np.float64) > 0


def in_one_order(a, b):
    """Equal strides, where they matter."""
    return all(s == t for n, s, t in zip(a.shape, a.strides, b.strides, strict=True) if n > 1)


def assert_same(got, want):
    for name in NEEDS:
        a, b = getattr(got, name, None), getattr(want, name, None)
        assert (a is None) == (b is None) and (a is None or same_bits(a, b)), name


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, dtype, activation, work):
    p = Problem(shape, dtype, activation)
    got, plain = p.forward(), p.forward(residual=None)
    want = reference.train(p.x, p.gamma, p.beta, activation=activation, dtype=precision(dtype), residual=p.z)
    assert_forward(got.y, p.x, want, p.gamma, p.beta, with_residual=True)
    assert in_one_order(got.y, p.x)
    assert same_bits(got.mean, plain.mean) and same_bits(got.inv_std, plain.inv_std)
    assert type(plain) is batchnorm.TrainResult
    assert type(got) is (batchnorm.ResidualTrainResult if activation else batchnorm.TrainResult)

    mean, var = batchnorm.moments(p.x)
    given = batchnorm.batch_norm(p.x, mean, var, p.gamma, p.beta, activation=activation, residual=p.z)
    assert same_bits(given, got.y), "the same statistics, given"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask(shape, dtype, work):
    p = Problem(shape, dtype)
    layout = Bits(shape)
    forward = p.forward()
    assert batchnorm.activation_mask_bytes(p.x) == layout.bytes
    on, unused = layout.split(forward.activation_mask)
    assert np.array_equal(on, positive(forward.y)) and on.any() and not on.all()
    assert not unused.any()

    # A activation_mask of one's own, anywhere in memory: what lies beside the bits keeps its value.
    mean, var = batchnorm.moments(p.x)
    guarded = np.full(layout.bytes + 26, 0xA5, np.uint8)
    activation_mask = guarded[13:-13]
    activation_mask[:] = 0xFF
    y = batchnorm.batch_norm(
        p.x, mean, var, p.gamma, p.beta, activation="relu", residual=p.z, activation_mask=activation_mask
    )
    assert same_bits(y, forward.y)
    given, unused = layout.split(activation_mask)
    assert np.array_equal(given, on) and unused.all()
    assert (guarded[:13] == 0xA5).all() and (guarded[-13:] == 0xA5).all()


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, dtype, stats, work):
    p = Problem(shape, dtype)
    forward = p.forward()
    got = p.backward(forward, stats=stats)
    gated = p.gated(positive(forward.y))
    assert type(got) is batchnorm.ResidualGradients
    assert same_bits(got.dresidual, gated) and in_one_order(got.dresidual, p.x)
    assert_gradients(got, gated, p.x, forward.mean, forward.inv_std, p.gamma, stats=stats)
    assert_same(got, p.backward(forward, got.dresidual, stats=stats, activation=None, activation_mask=None))


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_without_activation(shape, dtype, stats, work):
    p = Problem(shape, dtype, activation=None)
    forward = p.forward()
    assert not hasattr(forward, "activation_mask")
    got = p.backward(forward, stats=stats)
    assert same_bits(got.dresidual, p.dy)
    assert got.dresidual is not p.dy and not np.shares_memory(got.dresidual, p.dy)
    plain = p.backward(forward, stats=stats, needs=NEEDS[:3])
    assert type(plain) is batchnorm.Gradients
    assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_says_what_x_says_where_there_was_no_residual(shape, dtype, stats, work):
    p = Problem(shape, dtype)
    mean, var = batchnorm.moments(p.x)
    activation_mask = np.zeros(batchnorm.activation_mask_bytes(p.x), np.uint8)
    y = batchnorm.batch_norm(
        p.x, mean, var, p.gamma, p.beta, activation="relu", activation_mask=activation_mask
    )
    forward = p.forward(residual=None)
    assert same_bits(y, forward.y)
    assert np.array_equal(Bits(shape).split(activation_mask)[0], positive(y))
    needs = NEEDS[:3]
    read = p.backward(forward, stats=stats, activation_mask=activation_mask, needs=needs)
    assert_same(read, p.backward(forward, stats=stats, activation_mask=None, needs=needs))


def test_mask_tells_what_storage_loses():
    # The activation is on for a value that float16 then rounds to 0.
    x = np.float16([[1, 2], [3, 5]])
    z = np.zeros_like(x)
    activation_mask = np.zeros(batchnorm.activation_mask_bytes(x), np.uint8)
    given = np.zeros(2), np.ones(2), np.full(2, 1e-9)
    y = batchnorm.batch_norm(x, *given, eps=0, activation="relu", residual=z, activation_mask=activation_mask)
    assert not y.any() and activation_mask[0] == 0b1111


# ---- memory --------------------------------------------------------------------------------------

IMAGES = [(4, 7, 5, 6), (3, 20, 9, 17), (2, 66, 3, 11)]


def images(shape, dtype):
    return (rng(seed, shape).standard_normal(shape).astype(dtype) for seed in ("x", "z", "dy"))


def image_results(x, z, dy, **out):
    """y, and gradients in the order of NEEDS."""
    gamma, beta = parameters(x.shape[1])
    y, *saved = forward = batchnorm.batch_norm_train(
        x, gamma, beta, activation="relu", residual=z, out=out.get("y")
    )
    got = batchnorm.batch_norm_backward(
        dy, x, *saved, gamma, beta, activation="relu", activation_mask=forward.activation_mask, needs=NEEDS,
        out=out.get("dx"), out_residual=out.get("dresidual"),
    )  # fmt: skip
    return y, *got, got.dresidual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_x_in_any_layout(shape, layout, dtype):
    x, z, dy = images(shape, dtype)
    gamma, beta = parameters(shape[1])
    strided = place(layout, x).view
    forward = batchnorm.batch_norm_train(strided, gamma, beta, activation="relu", residual=z)
    want = reference.train(x, gamma, beta, activation="relu", dtype=precision(dtype), residual=z)
    assert_forward(forward.y, x, want, gamma, beta, with_residual=True)
    gradients = image_results(strided, z, dy)[1:]
    assert np.array_equal(gradients[3], np.where(positive(forward.y), dy, dtype.type(0)))
    assert len(forward.activation_mask) == batchnorm.activation_mask_bytes(strided)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ["contiguous", "nhwc"])
def test_residual_and_dy_in_any_layout(order, layout, dtype):
    # x alone leads: what else is read may lie in any order.
    for shape in IMAGES:
        x, z, dy = (place(order, a).view for a in images(shape, dtype))
        want = image_results(x, z, dy)
        others = (place(layout, a).view for a in (z, dy))
        assert all(same_bits(a, b) for a, b in zip(image_results(x, *others), want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("plain", "strided"), [(plain, other) for plain, others in SAME_DIRECTION.items() for other in others]
)
def test_strided_as_contiguous(plain, strided, dtype):
    for shape in IMAGES:
        want = image_results(*(place(plain, a).view for a in images(shape, dtype)))
        got = image_results(*(place(strided, a).view for a in images(shape, dtype)))
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", ["contiguous", "batch step", "channel slice", "row crop", "nhwc channel slice"]
)
def test_nothing_beside_the_outputs_is_written(layout, dtype, set_tuning):
    shape = (3, 20, 9, 17)
    for tuning in WORK.values():
        set_tuning(tuning)
        x, z, dy = (place(layout, a).view for a in images(shape, dtype))
        want = image_results(x, z, dy)
        out = {name: place(layout, np.zeros(shape, dtype)) for name in ("y", "dx", "dresidual")}
        got = image_results(x, z, dy, **{name: placed.view for name, placed in out.items()})
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        assert all(outside_is_untouched(placed) for placed in out.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_in_place(shape, dtype, work):
    p = Problem(shape, dtype)
    want = p.forward()
    gradients = p.backward(want)

    def once(name):
        """Fresh arguments and this one of them, to be written over."""
        fresh = Problem(shape, dtype)
        return fresh, getattr(fresh, name)

    for name in ("x", "z"):
        q, out = once(name)
        got = q.forward(out=out)
        assert got.y is out and all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        assert same_bits(got.activation_mask, want.activation_mask)
    q, out = once("x")
    q.z = q.x
    separate = p.forward(residual=p.x)
    assert same_bits(q.forward(out=out).y, separate.y), "x is the residual and the output"

    for first, second in (("dy", None), (None, "dy"), ("x", "dy"), ("x", None)):
        q = Problem(shape, dtype)
        out = None if first is None else getattr(q, first)
        out_residual = None if second is None else getattr(q, second)
        got = q.backward(want, out=out, out_residual=out_residual)
        assert out is None or got.dx is out
        assert out_residual is None or got.dresidual is out_residual
        assert_same(got, gradients)
    q, out = once("dy")
    got = q.backward(want, out_residual=out, needs=("dresidual",))
    assert got.dresidual is out and same_bits(out, gradients.dresidual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [Shape("ncs", 4, 5, 23), Shape("nsc", 33, 65, 1)], ids=str)
def test_arrays_that_are_read(shape, dtype):
    p = Problem(shape, dtype)
    want = p.forward()
    gradients = p.backward(want)
    arrays = [p.x, p.z, p.dy, p.gamma, p.beta, want.mean, want.inv_std, want.activation_mask]
    before = [a.tobytes() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    assert same_bits(p.forward().y, want.y)
    assert_same(p.backward(want), gradients)
    assert [a.tobytes() for a in arrays] == before

    odd = [np.zeros(p.x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(p.x.shape) for _ in range(2)]
    odd[0][...], odd[1][...] = p.z, p.dy
    assert not odd[0].flags.aligned
    assert same_bits(p.forward(residual=odd[0]).y, want.y), "unaligned"
    assert_same(p.backward(want, odd[1]), gradients)
    assert same_bits(p.forward(residual=p.z.view(np.memmap)).y, want.y), "a subclass"
    assert_same(p.backward(want, activation_mask=want.activation_mask.view(np.memmap)), gradients)

    for axis in (0, 1, 2):  # one value for all along an axis
        z = np.broadcast_to(np.take(p.z, [0], axis), p.z.shape)
        assert same_bits(p.forward(residual=z).y, p.forward(residual=z.copy()).y)


# ---- which results -------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("needs", subsets(NEEDS), ids="+".join)
def test_needs(needs, activation, stats, work):
    for shape in FEW_SHAPES[1:4]:
        p = Problem(shape, FLOAT32, activation)
        forward = p.forward()
        full = p.backward(forward, stats=stats)
        for container in (tuple, list, frozenset):
            got = p.backward(forward, stats=stats, needs=container(needs))
            kind = batchnorm.ResidualGradients if "dresidual" in needs else batchnorm.Gradients
            assert type(got) is kind
            for name in NEEDS:
                value = getattr(got, name, None)
                assert same_bits(value, getattr(full, name)) if name in needs else value is None, name
    assert p.backward(forward, needs=()) == (None, None, None)


def test_results_are_tuples_of_three():
    p = Problem(Shape("ncs", 4, 5, 23), FLOAT32)
    forward = p.forward()
    y, mean, inv_std = forward
    assert y is forward.y and mean is forward.mean and inv_std is forward.inv_std
    assert isinstance(forward, batchnorm.TrainResult) and len(forward) == 3
    got = p.backward(forward)
    dx, dgamma, dbeta = got
    assert dx is got.dx and dgamma is got.dgamma and dbeta is got.dbeta
    assert isinstance(got, batchnorm.Gradients) and len(got) == 3


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_results_are_pickled_whole(protocol):
    p = Problem(Shape("ncs", 4, 5, 23), FLOAT32)
    forward = p.forward()
    for result, name in ((forward, "activation_mask"), (p.backward(forward), "dresidual")):
        for duplicate in (
            pickle.loads(pickle.dumps(result, protocol)),
            copy.copy(result),
            copy.deepcopy(result),
        ):
            assert type(duplicate) is type(result)
            assert all(same_bits(a, b) for a, b in zip(duplicate, result, strict=True))
            assert same_bits(getattr(duplicate, name), getattr(result, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_empty_batch(shape, stats, dtype):
    x = np.empty(shape, dtype)
    forward = batchnorm.batch_norm_train(x, activation="relu", residual=x.copy())
    assert forward.y.shape == shape and np.isnan(forward.mean).all()
    assert forward.activation_mask.shape == (batchnorm.activation_mask_bytes(x),) == (4,)
    got = batchnorm.batch_norm_backward(
        x.copy(), x, forward.mean, forward.inv_std, np.ones(3), stats=stats, activation="relu",
        activation_mask=forward.activation_mask, needs=NEEDS,
    )  # fmt: skip
    assert got.dx.shape == got.dresidual.shape == shape and got.dresidual.dtype == dtype
    np.testing.assert_array_equal(got.dgamma, np.zeros(3))
    np.testing.assert_array_equal(got.dbeta, np.zeros(3))
    assert type(batchnorm.batch_norm_train(x, residual=x.copy())) is batchnorm.TrainResult
    y = batchnorm.batch_norm(
        x,
        np.zeros(3),
        np.ones(3),
        activation="relu",
        residual=x.copy(),
        activation_mask=np.zeros(4, np.uint8),
    )
    assert y.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_per_channel_with_given_statistics(dtype):
    x, z, dy = np.array([[[3, -1, 2]], [[-4, 3, 1]], [[1, 2, 3]]], dtype)
    activation_mask = np.zeros(batchnorm.activation_mask_bytes(x), np.uint8)
    mean, var = np.zeros(3), np.ones(3)
    y = batchnorm.batch_norm(
        x, mean, var, eps=0, activation="relu", residual=z, activation_mask=activation_mask
    )
    np.testing.assert_array_equal(y, np.array([[0, 2, 3]], dtype))
    got = batchnorm.batch_norm_backward(
        dy,
        x,
        mean,
        var,
        np.full(3, 2.0),
        stats="fixed",
        activation="relu",
        activation_mask=activation_mask,
        needs=NEEDS,
    )
    np.testing.assert_array_equal(got.dresidual, np.array([[0, 2, 3]], dtype))
    np.testing.assert_array_equal(got.dx, np.array([[0, 4, 6]], dtype))
    np.testing.assert_array_equal(got.dgamma, [0, -2, 6])
    np.testing.assert_array_equal(got.dbeta, [0, 2, 3])


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3])
def test_every_axis(axis):
    x, z, dy = images((3, 4, 5, 6), FLOAT32)
    gamma, beta = parameters(x.shape[axis])
    forward = batchnorm.batch_norm_train(x, gamma, beta, axis=axis, activation="relu", residual=z)
    want = reference.train(x, gamma, beta, axis=axis, activation="relu", residual=z)
    assert_forward(forward.y, x, want, gamma, beta, axis, with_residual=True)
    assert len(forward.activation_mask) == batchnorm.activation_mask_bytes(x, axis=axis)
    saved = forward.mean, forward.inv_std
    got = batchnorm.batch_norm_backward(
        dy,
        x,
        *saved,
        gamma,
        beta,
        axis=axis,
        activation="relu",
        activation_mask=forward.activation_mask,
        needs=NEEDS,
    )
    gated = np.where(positive(forward.y), dy, np.float32(0))
    assert np.array_equal(got.dresidual, gated)
    assert_gradients(got, gated, x, *saved, gamma, axis)


def test_data_format():
    x, z, dy = images((2, 3, 4, 5), FLOAT32)
    options = {"data_format": "NHWC", "activation": "relu"}
    forward = batchnorm.batch_norm_train(x, residual=z, **options)
    same = batchnorm.batch_norm_train(x, residual=z, axis=-1, activation="relu")
    assert same_bits(forward.y, same.y) and same_bits(forward.activation_mask, same.activation_mask)
    assert len(forward.activation_mask) == batchnorm.activation_mask_bytes(x, data_format="NHWC")
    saved = forward.mean, forward.inv_std
    got = batchnorm.batch_norm_backward(
        dy, x, *saved, activation_mask=forward.activation_mask, needs=NEEDS, **options
    )
    assert np.array_equal(got.dresidual, np.where(positive(forward.y), dy, np.float32(0)))


def test_running_statistics_do_not_see_the_residual():
    p = Problem(Shape("ncs", 4, 5, 23), FLOAT32)
    vectors = [(np.zeros(5), np.ones(5)) for _ in range(2)]
    for (mean, var), z in zip(vectors, (p.z, None), strict=True):
        p.forward(residual=z, running_mean=mean, running_var=var)
    assert same_bits(*(mean for mean, _ in vectors)) and same_bits(*(var for _, var in vectors))
    assert vectors[0][0].any()


# ---- NaN and infinity ----------------------------------------------------------------------------


def without(a, channel):
    return np.delete(a, channel, 1 if a.ndim > 1 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_non_finite_residual_stays_where_it_is(shape, value, dtype):
    p = Problem(shape, dtype)
    clean = p.forward()
    where = (shape.outer - 1, shape.channels // 2, shape.inner // 2)
    p.z[where] = value
    dirty = p.forward()
    elsewhere = np.ones(p.x.shape, bool)
    elsewhere[where] = False
    assert same_bits(dirty.y[elsewhere], clean.y[elsewhere])
    assert same_bits(dirty.mean, clean.mean) and same_bits(dirty.inv_std, clean.inv_std)
    got = float(dirty.y[where])
    assert np.isnan(got) if np.isnan(value) else got == max(value, 0)
    on = Bits(shape).split(dirty.activation_mask)[0]
    assert on[where] == (value == np.inf), "what is not above 0, NaN too, lets nothing through"
    assert np.array_equal(on, positive(dirty.y))
    gradients = p.backward(dirty)
    assert same_bits(gradients.dresidual, p.gated(on))
    assert all(np.isfinite(g.astype(np.float64)).all() for g in (*gradients, gradients.dresidual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_non_finite_x_stays_in_its_channel(shape, value, dtype):
    p = Problem(shape, dtype)
    clean = p.forward()
    gradients = p.backward(clean)
    channel = shape.channels // 2
    where = (shape.outer - 1, channel, shape.inner // 2)
    p.x[where] = value
    dirty = p.forward()
    assert np.isnan(dirty.y[:, channel].astype(np.float64)).all()
    assert all(same_bits(without(a, channel), without(b, channel)) for a, b in zip(dirty, clean, strict=True))
    assert not Bits(shape).split(dirty.activation_mask)[0][:, channel].any()
    got = p.backward(dirty)
    assert not got.dresidual[:, channel].any()
    for name in NEEDS:
        assert same_bits(without(getattr(got, name), channel), without(getattr(gradients, name), channel))

    # With given statistics it stays in its element.
    mean, var = np.zeros(shape.channels), np.ones(shape.channels)
    activation_mask = np.zeros(batchnorm.activation_mask_bytes(p.x), np.uint8)
    y = batchnorm.batch_norm(p.x, mean, var, activation="relu", residual=p.z, activation_mask=activation_mask)
    on = Bits(shape).split(activation_mask)[0]
    assert np.isfinite(np.delete(y.astype(np.float64).ravel(), np.ravel_multi_index(where, y.shape))).all()
    assert np.array_equal(on, positive(y)) and on[where] == (value == np.inf)
    p.z[where] = -value
    y = batchnorm.batch_norm(p.x, mean, var, activation="relu", residual=p.z, activation_mask=activation_mask)
    assert np.isnan(y[where]) and not Bits(shape).split(activation_mask)[0][where], "inf - inf"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_non_finite_dy_counts_where_the_activation_was_on(shape, value, dtype):
    p = Problem(shape, dtype)
    forward = p.forward()
    clean = p.backward(forward)
    on = positive(forward.y)
    p.dy[~on] = value
    assert_same(p.backward(forward), clean)
    where = tuple(np.argwhere(on)[-1])
    p.dy[where] = value
    got = p.backward(forward)
    assert [tuple(i) for i in np.argwhere(~np.isfinite(got.dresidual.astype(np.float64)))] == [where]
    channel = where[1]
    assert not np.isfinite(got.dbeta[channel])
    assert not np.isfinite(got.dx[:, channel].astype(np.float64)).any()
    for name in NEEDS:
        assert same_bits(without(getattr(got, name), channel), without(getattr(clean, name), channel))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_residual_is_dy_bit_for_bit(dtype):
    # Signed zeros, subnormals and the largest numbers pass as they are, with dx and alone.
    bits = np.dtype(f"u{dtype.itemsize}")
    patterns = rng("patterns", dtype).integers(0, 2 ** (8 * dtype.itemsize), 60 * 33, bits, endpoint=False)
    dy = patterns.view(dtype).reshape(60, 33)
    with np.errstate(invalid="ignore"):  # of NaN with a signal
        dy = np.where(np.isfinite(dy), dy, dtype.type(-0.0))
    x = rng("x").standard_normal(dy.shape).astype(dtype)
    forward = batchnorm.batch_norm_train(x, activation="relu", residual=x)
    want = np.where(positive(forward.y), dy, dtype.type(0))
    options = {"activation": "relu", "activation_mask": forward.activation_mask}
    for needs in (NEEDS, ("dresidual",), ("dx", "dresidual"), ("dgamma", "dresidual")):
        got = batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std, needs=needs, **options)
        assert same_bits(got.dresidual, want), needs


# ---- the same bits -------------------------------------------------------------------------------


def everything(p, like=lambda a: a):
    """The bytes of all results. `like(a)` gives an array of a's shape and values to use in its place."""
    out = lambda a: like(np.zeros_like(a))  # noqa: E731
    q = copy.copy(p)
    q.x, q.z, q.dy = like(p.x), like(p.z), like(p.dy)
    forward = q.forward(out=out(p.x))
    results = [*forward, forward.activation_mask]
    for stats in ("batch", "fixed"):
        got = q.backward(forward, stats=stats, out=out(p.x), out_residual=out(p.x))
        results += [*got, got.dresidual]
    results.append(q.backward(forward, needs=("dresidual",), out_residual=out(p.x)).dresidual)
    plain = q.forward(activation=None, out=out(p.x))
    got = q.backward(plain, activation=None, activation_mask=None, out=out(p.x), out_residual=out(p.x))
    results += [*plain, *got, got.dresidual]
    return [np.ascontiguousarray(a).tobytes() for a in results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*FEW_SHAPES, Shape("ncs", 2, 2, 17000), Shape("nsc", 3500, 20, 1)], ids=str
)
def test_levels_and_threads(shape, dtype, set_tuning):
    p = Problem(shape, dtype)
    before = batchnorm.get_isa(), batchnorm.get_num_threads()
    want = None
    try:
        for isa in batchnorm.isa_levels():
            batchnorm.set_isa(isa)
            for tuning in WORK.values():
                set_tuning(tuning)
                for threads in THREADS:
                    batchnorm.set_num_threads(threads)
                    got = everything(p)
                    want = want or got
                    assert got == want, (isa, tuning, threads)
    finally:
        batchnorm.set_isa(before[0])
        batchnorm.set_num_threads(before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [Shape("ncs", 3, 5, 131), Shape("nsc", 67, 5, 1), Shape("nsc", 45, 130, 1)], ids=str
)
def test_alignment(shape, dtype, isa, set_tuning):
    p = Problem(shape, dtype)
    want = everything(p)

    def shifted(offset):
        """Copies in x's memory order, each at another offset."""
        count = 0

        def like(a):
            nonlocal count
            count += 1
            place = (offset + count * 3 * dtype.itemsize) % 64
            if shape.direction == "ncs":
                return at_offset(a, place)
            return at_offset(np.ascontiguousarray(a.transpose(0, 2, 1)), place).transpose(0, 2, 1)

        return like

    for tuning in (WORK["default"], WORK["streamed"]):
        set_tuning(tuning)
        for offset in range(0, 64, dtype.itemsize):
            assert everything(p, shifted(offset)) == want, offset
        aligned = lambda a: shifted(-3 * dtype.itemsize)(a)  # noqa: E731
        assert everything(p, aligned) == want, "all at one alignment"


def test_stored_past_the_caches_by_default():
    # 3 x 24 MB of reads and writes: more than any plan keeps in caches.
    block = Problem(Shape("ncs", 1, 8, 120_011), FLOAT32)
    x, z, dy = (np.broadcast_to(a, (6, *a.shape[1:])).copy() for a in (block.x, block.z, block.dy))
    mean, var = np.full(8, 0.3), np.full(8, 1.7)
    activation_mask, small = (np.zeros(batchnorm.activation_mask_bytes(a), np.uint8) for a in (x, block.x))
    options = {"activation": "relu"}
    y = batchnorm.batch_norm(x, mean, var, residual=z, activation_mask=activation_mask, **options)
    part = batchnorm.batch_norm(block.x, mean, var, residual=block.z, activation_mask=small, **options)
    assert np.array_equal(y, np.broadcast_to(part, x.shape))
    assert np.array_equal(
        activation_mask[:-4].reshape(6, -1), np.broadcast_to(small[:-4], (6, small.size - 4))
    )
    options |= {"stats": "fixed", "needs": ("dx", "dresidual")}
    got = batchnorm.batch_norm_backward(dy, x, mean, var, activation_mask=activation_mask, **options)
    part = batchnorm.batch_norm_backward(block.dy, block.x, mean, var, activation_mask=small, **options)
    assert np.array_equal(got.dx, np.broadcast_to(part.dx, x.shape))
    assert np.array_equal(got.dresidual, np.broadcast_to(part.dresidual, x.shape))
