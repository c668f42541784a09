"""Axes, strides and views: right values from any layout, y in x's memory order, written arrays not copied."""

from __future__ import annotations

import itertools
import subprocess
import sys

import batchnorm
import numpy as np
import pytest

import reference
from cases import (
    DTYPES,
    FLOAT32,
    LAYOUTS,
    at_offset,
    outside_is_untouched,
    parameters,
    place,
    rng,
    same_bits,
)
from checks import assert_forward, assert_gradients, precision

SHAPE = (4, 7, 5, 6)
# Written arrays need one contiguous run of the axes inside the channel's in memory, or contiguous channels,
# and at most two strides for the rest. Other layouts would need a copy, so writing to them is refused.
REFUSED = (
    "crop",
    "column step",
    "column reversed",
    "channel first batch step",
    "nhwc channel step",
    "nhwc crop",
)
SERVED = [name for name in LAYOUTS if name not in REFUSED]


def values(dtype, seed=0, shape=SHAPE):
    return (rng("layout", seed, shape).standard_normal(shape) * 1.5 + 0.75).astype(dtype)


def call_train(x, out=None):
    return batchnorm.batch_norm_train(x, *parameters(x.shape[1]), out=out).y


def call_inference(x, out=None):
    channels = x.shape[1]
    return batchnorm.batch_norm(
        x, np.full(channels, 0.7), np.full(channels, 2.0), *parameters(channels), out=out
    )


def call_relu(x, out=None):
    return batchnorm.batch_norm_train(x, *parameters(x.shape[1]), activation="relu", out=out).y


CALLS = pytest.mark.parametrize("call", [call_train, call_inference, call_relu], ids=lambda f: f.__name__[5:])


def strides(a):
    """Strides of the axes that have any."""
    return [stride for stride, size in zip(a.strides, a.shape, strict=True) if size > 1]


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [SHAPE, (1, 7, 5, 6), (4, 1, 5, 6), (4, 7, 1, 1), (4, 7, 1, 6), (1, 3, 1, 17)], ids=str
)
def test_every_layout(shape, layout, dtype):
    placed = place(layout, values(dtype, shape=shape))
    x, before = placed.view, placed.base.copy()
    channels = shape[1]
    gamma, beta = parameters(channels)

    forward = batchnorm.batch_norm_train(x, gamma, beta)
    want = reference.train(x, gamma, beta, dtype=precision(dtype))
    assert_forward(forward.y, x, want, gamma, beta)
    assert strides(forward.y) == strides(np.empty_like(x))

    mean, var = batchnorm.moments(x)
    assert same_bits(mean, forward.mean)
    y = batchnorm.batch_norm(x, mean, var, gamma, beta)
    assert same_bits(y, forward.y) and strides(y) == strides(np.empty_like(x))

    dy = place(layout, values(dtype, seed=1, shape=shape)).view
    gradients = batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std, gamma, beta)
    assert_gradients(gradients, dy, x, forward.mean, forward.inv_std, gamma)
    assert strides(gradients.dx) == strides(np.empty_like(x))
    assert same_bits(placed.base, before), "x must not be written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_permuted_view_is_its_base_with_another_axis(ndim, dtype):
    # Memory decides the work, not the order of the axes: the bits are those of the contiguous base.
    base, dy = (values(dtype, seed, (4, 7, 5, 6)[:ndim]) for seed in (0, 1))
    for axis in range(ndim):
        gamma, beta = parameters(base.shape[axis])
        want = batchnorm.batch_norm_train(base, gamma, beta, axis=axis)
        want_gradients = batchnorm.batch_norm_backward(
            dy, base, want.mean, want.inv_std, gamma, beta, axis=axis
        )
        for order in itertools.permutations(range(ndim)):
            view, view_axis = base.transpose(order), order.index(axis)
            got = batchnorm.batch_norm_train(view, gamma, beta, axis=view_axis)
            assert same_bits(got.y.transpose(np.argsort(order)), want.y)
            assert same_bits(got.mean, want.mean) and same_bits(got.inv_std, want.inv_std)
            assert strides(got.y) == strides(view)
            gradients = batchnorm.batch_norm_backward(
                dy.transpose(order), view, got.mean, got.inv_std, gamma, beta, axis=view_axis
            )
            assert same_bits(gradients.dx.transpose(np.argsort(order)), want_gradients.dx)
            assert same_bits(gradients.dgamma, want_gradients.dgamma)


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "nhwc", "crop", "fortran", "nhwc channel slice"])
def test_dy_may_lie_otherwise_than_x(layout, dy_layout):
    x = place(layout, values(FLOAT32)).view
    same, other = (place(name, values(FLOAT32, seed=1)).view for name in (layout, dy_layout))
    gamma, beta = parameters(7)
    forward = batchnorm.batch_norm_train(x, gamma, beta, activation="relu")
    want, got = (
        batchnorm.batch_norm_backward(
            dy, x, forward.mean, forward.inv_std, gamma, beta, activation="relu", stats="batch"
        )
        for dy in (same, other)
    )
    assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))
    assert strides(got.dx) == strides(np.empty_like(x))


def test_broadcast_x():
    row = values(FLOAT32, shape=(1, 7, 5, 6))
    x = np.broadcast_to(row, SHAPE)
    gamma, beta = parameters(7)
    got = batchnorm.batch_norm_train(x, gamma, beta)
    assert_forward(got.y, x, reference.train(x, gamma, beta), gamma, beta)
    assert got.y.flags.writeable and 0 not in got.y.strides


def test_memory_mapped_x(tmp_path):
    x = values(FLOAT32)
    x.tofile(tmp_path / "x.bin")
    mapped = np.memmap(tmp_path / "x.bin", np.float32, "r", shape=SHAPE)
    assert same_bits(call_train(mapped), call_train(x))


def test_strides_of_size_one_axes_do_not_matter():
    x = values(FLOAT32, shape=(1, 7, 1, 30))
    strange = np.lib.stride_tricks.as_strided(x, x.shape, (12, x.strides[1], 4000, x.strides[3]))
    assert same_bits(call_train(strange), call_train(x))
    assert same_bits(call_inference(strange, out=np.empty_like(x)), call_inference(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 5, 64, 300, 1800, 99_999, -1, 0])
@pytest.mark.parametrize("order", ["C", "F"])
def test_stride_of_a_single_channel_does_not_matter(order, stride, dtype):
    x, dy = (np.array(values(dtype, seed, (6, 300)), order=order) for seed in (0, 1))
    rows, columns = x.strides
    plain, strange, strange_dy = (
        np.lib.stride_tricks.as_strided(a, (6, 1, 300), (rows, channel, columns))
        for a, channel in ((x, columns), (x, stride * dtype.itemsize), (dy, stride * dtype.itemsize))
    )
    want, got = batchnorm.batch_norm_train(plain), batchnorm.batch_norm_train(strange)
    assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))
    plain_dy = np.lib.stride_tricks.as_strided(dy, (6, 1, 300), plain.strides)
    want_gradients = batchnorm.batch_norm_backward(plain_dy, plain, want.mean, want.inv_std)
    for backward in (strange_dy, plain_dy):
        gradients = batchnorm.batch_norm_backward(backward, strange, want.mean, want.inv_std)
        assert all(same_bits(a, b) for a, b in zip(gradients, want_gradients, strict=True))


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (4, 3, 2, 1), (4, 3, 5, 2), (3, 1, 4, 2)], ids=str)
def test_any_dy_goes_with_any_x(shape):
    base, base_dy = values(FLOAT32, 0, shape), values(FLOAT32, 1, shape)

    def arrangements(a):
        yield a
        yield np.asfortranarray(a)
        for axis in range(a.ndim):
            yield np.flip(np.flip(a, axis).copy(), axis)
            yield np.repeat(a, 2, axis)[
                tuple(slice(None, None, 2 if i == axis else 1) for i in range(a.ndim))
            ]

    for axis in range(len(shape)):
        if base.size == shape[axis]:
            continue
        for x in arrangements(base):
            forward = batchnorm.batch_norm_train(x, axis=axis)
            want = batchnorm.batch_norm_backward(
                x.copy(order="K") * 0 + base_dy, x, forward.mean, forward.inv_std, axis=axis
            )
            for dy in arrangements(base_dy):
                got = batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std, axis=axis)
                assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SERVED)
@CALLS
def test_out_receives_y(call, layout, dtype):
    x = place(layout, values(dtype)).view
    out = place(layout, np.zeros(SHAPE, dtype))
    assert call(x, out=out.view) is out.view
    assert same_bits(out.view, call(x))
    assert outside_is_untouched(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SERVED)
@CALLS
def test_in_place(call, layout, dtype):
    want = call(place(layout, values(dtype)).view)
    placed = place(layout, values(dtype))
    assert call(placed.view, out=placed.view) is placed.view
    assert same_bits(placed.view, want)
    assert outside_is_untouched(placed)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SERVED)
def test_out_receives_dx(layout, dtype, stats, activation):
    x = place(layout, values(dtype)).view
    gamma, beta = parameters(7)
    forward = batchnorm.batch_norm_train(x, gamma, beta)

    def backward(dy, out=None):
        return batchnorm.batch_norm_backward(
            dy, x, forward.mean, forward.inv_std, gamma, beta, stats=stats, activation=activation, out=out
        )

    dy = place(layout, values(dtype, seed=1))
    want = backward(dy.view)
    out = place(layout, np.zeros(SHAPE, dtype))
    got = backward(dy.view, out.view)
    assert got.dx is out.view
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    assert outside_is_untouched(out)

    in_place = backward(dy.view, dy.view)
    assert in_place.dx is dy.view
    assert all(same_bits(a, b) for a, b in zip(in_place, want, strict=True))
    assert outside_is_untouched(dy)


# x and out may differ in strides as long as they walk memory in the same direction.
@pytest.mark.parametrize(
    ("layout", "out_layout"),
    [
        ("contiguous", "channel slice"),
        ("channel slice", "contiguous"),
        ("batch step", "channel step"),
        ("crop", "contiguous"),
        ("column step", "row crop"),
        ("column reversed", "contiguous"),
        ("nhwc", "nhwc channel slice"),
        ("nhwc channel slice", "nhwc"),
        ("nhwc crop", "nhwc"),
        ("nhwc channel step", "nhwc row crop"),
        ("nhwc row crop", "nhwc batch step"),
    ],
)
@CALLS
def test_out_with_other_strides(call, layout, out_layout):
    x = place(layout, values(FLOAT32)).view
    out = place(out_layout, np.zeros(SHAPE, np.float32))
    assert call(x, out=out.view) is out.view
    assert same_bits(out.view, call(x))
    assert outside_is_untouched(out)


@pytest.mark.parametrize("shape", [(7, 5, 30, 31), (7, 1, 70, 121), (37, 3, 2, 1)], ids=str)
@pytest.mark.parametrize(
    ("layout", "other"),
    [
        ("contiguous", "batch step"),
        ("contiguous", "channel slice"),
        ("contiguous", "row crop"),
        ("channel first", "channel first batch step"),
        ("nhwc", "nhwc batch step"),
        ("nhwc", "nhwc row crop"),
    ],
)
def test_strides_of_out_and_dy_do_not_change_bits(layout, other, shape):
    x, dy = (values(FLOAT32, seed, shape) for seed in (0, 1))
    plain_x, plain_dy = place(layout, x).view, place(layout, dy).view
    want = batchnorm.batch_norm_train(plain_x)
    want_gradients = batchnorm.batch_norm_backward(plain_dy, plain_x, want.mean, want.inv_std)
    for x_layout, out_layout in ((layout, other), (other, layout), (other, other)):
        view = place(x_layout, x).view
        out = place(out_layout, np.zeros_like(x)).view if out_layout in SERVED else None
        got = batchnorm.batch_norm_train(view, out=out)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        gradients = batchnorm.batch_norm_backward(place(out_layout, dy).view, view, got.mean, got.inv_std)
        assert all(same_bits(a, b) for a, b in zip(gradients, want_gradients, strict=True))


@pytest.mark.parametrize("layout", REFUSED)
@CALLS
def test_writing_where_a_copy_would_be_needed_is_refused(call, layout):
    x = place(layout, values(FLOAT32))
    out = place(layout, np.zeros(SHAPE, np.float32))
    before = x.base.copy(), out.base.copy()
    for target in (out.view, x.view):
        with pytest.raises(ValueError, match=r"\bout\b.*stride.*empty_like"):
            call(x.view, out=target)
    assert same_bits(x.base, before[0]) and same_bits(out.base, before[1])


@pytest.mark.parametrize(
    ("layout", "out_layout"),
    [
        ("contiguous", "nhwc"),
        ("nhwc", "contiguous"),
        ("contiguous", "fortran"),
        ("crop", "nhwc"),
        ("nhwc", "channel first"),
    ],
)
@CALLS
def test_out_in_another_memory_order_is_refused(call, layout, out_layout):
    x = place(layout, values(FLOAT32)).view
    out = place(out_layout, np.zeros(SHAPE, np.float32)).view
    with pytest.raises(ValueError, match=r"\bout\b.*stride.*empty_like"):
        call(x, out=out)
    assert not out.any()


def test_misaligned_out_is_refused():
    x = values(FLOAT32)
    out = at_offset(np.zeros(SHAPE, np.float32), 2)
    with pytest.raises(ValueError, match=r"\bout\b.*align"):
        call_train(x, out=out)
    assert not out.any()


def test_results_own_their_memory():
    x = values(FLOAT32)
    first = call_train(x)
    kept = first.copy()
    for seed in range(5):
        call_train(values(FLOAT32, seed))
    assert same_bits(first, kept)
    assert not np.shares_memory(first, call_train(x))


GUARDED = """
import ctypes, mmap
import numpy as np
import batchnorm

# Arrays that end, or begin, exactly at a page that may not be touched: one element too far and the process
# dies.
page = mmap.PAGESIZE
size = 8 * page
memory = mmap.mmap(-1, size + 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
for guard in (address, address + page + size):
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0

def guarded(shape, dtype, at_end):
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, memory, page + (size - n if at_end else 0))

for isa in batchnorm.isa_levels():
    batchnorm.set_isa(isa)
    for dtype in ("float32", "float64", "float16"):
        for shape, axis in [((2, 3, s), 1) for s in (1, 2, 7, 15, 16, 17, 31, 33, 100)] + [
            ((n, c), 1) for n in (2, 3, 17, 40) for c in (1, 3, 5, 16, 17, 63, 64, 65)
        ]:
            for at_end in (True, False):
                x = guarded(shape, dtype, at_end)
                x[...] = np.random.default_rng(0).standard_normal(shape)
                dy = x.copy()
                got = batchnorm.batch_norm_train(x, axis=axis)
                batchnorm.moments(x, axis=axis)
                for how in ({}, {"activation": "relu"}):
                    batchnorm.batch_norm_backward(dy, x, got.mean, got.inv_std, axis=axis, **how)
                    batchnorm.batch_norm_backward(x, dy, got.mean, got.inv_std, axis=axis, out=x, **how)
                    batchnorm.batch_norm_train(x, axis=axis, out=x, **how)
print("survived")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_nothing_beyond_the_array_is_touched():
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "survived", f"exit status {done.returncode}: {done.stderr[-2000:]}"
