"""Results depend on the inputs only: same bits for any ISA level, thread count, alignment and stride."""

from __future__ import annotations

import functools
import itertools

import batchnorm
import numpy as np
import pytest

from cases import (
    DTYPES,
    EDGE_SHAPES,
    FLOAT32,
    SAME_DIRECTION,
    SHARED_SHAPES,
    SOME_SHAPES,
    THREADS,
    Shape,
    at_offset,
    gradient_of,
    normal,
    parameters,
    place,
    rng,
    same_bits,
)


def everything(x, dy, axis=1, make_out=None):
    """The bytes of all that the functions make of x and dy. `make_out(a)` gives an array to write to."""
    out = (lambda a: None) if make_out is None else make_out
    channels = x.shape[axis]
    gamma, beta = parameters(channels)
    running_mean, running_var = np.zeros(channels, np.float32), np.ones(channels)
    mean, var = batchnorm.moments(x, axis=axis)
    results = [mean, var, batchnorm.batch_norm(x, mean, var, gamma, beta, axis=axis, out=out(x))]
    if x.size > channels:
        y, mean, inv_std = batchnorm.batch_norm_train(
            x, gamma, beta, running_mean=running_mean, running_var=running_var, axis=axis, out=out(x)
        )
        fused = batchnorm.batch_norm_train(x, gamma, beta, activation="relu", axis=axis, out=out(x)).y
        results += [y, mean, inv_std, fused, running_mean, running_var]
        for activation in (None, "relu"):
            results += batchnorm.batch_norm_backward(
                dy, x, mean, inv_std, gamma, beta, axis=axis, activation=activation, out=out(x)
            )
    return [np.ascontiguousarray(a).tobytes() for a in results]


@functools.cache
def expected(shape, dtype):
    """`everything` on the lowest ISA level and one thread."""
    before = batchnorm.get_isa(), batchnorm.get_num_threads()
    batchnorm.set_isa(batchnorm.isa_levels()[0])
    batchnorm.set_num_threads(1)
    try:
        return everything(normal(shape, dtype), gradient_of(shape, dtype))
    finally:
        batchnorm.set_isa(before[0])
        batchnorm.set_num_threads(before[1])


def test_levels_start_with_baseline():
    levels = batchnorm.isa_levels()
    assert levels[0] == "baseline" and batchnorm.get_isa() in levels
    assert len(set(levels)) == len(levels)


def test_setting_level_and_threads(isa, threads):
    assert batchnorm.get_isa() == isa and batchnorm.get_num_threads() == threads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SOME_SHAPES, *SHARED_SHAPES], ids=str)
def test_isa_and_threads(shape, dtype, isa, threads):
    assert everything(normal(shape, dtype), gradient_of(shape, dtype)) == expected(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EDGE_SHAPES, ids=str)
def test_isa_at_every_edge(shape, dtype, isa):
    assert everything(normal(shape, dtype), gradient_of(shape, dtype)) == expected(shape, dtype)


@pytest.mark.parametrize("n_threads", [16, 64])
@pytest.mark.parametrize("shape", SHARED_SHAPES, ids=str)
def test_more_threads_than_cores(shape, n_threads, set_tuning):
    set_tuning("parallel_elements=0")
    before = batchnorm.get_num_threads()
    batchnorm.set_num_threads(n_threads)
    try:
        assert everything(normal(shape, FLOAT32), gradient_of(shape, FLOAT32)) == expected(shape, FLOAT32)
    finally:
        batchnorm.set_num_threads(before)


@pytest.mark.parametrize(
    "shape", [Shape("ncs", 3, 33, 529), Shape("nsc", 1025, 100, 1), Shape("nsc", 16385, 3, 1)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_runs(shape, dtype, set_tuning):
    set_tuning("parallel_elements=0")
    x, dy = normal(shape, dtype), gradient_of(shape, dtype)
    before = batchnorm.get_num_threads()
    try:
        for run in range(100):
            batchnorm.set_num_threads(THREADS[run % len(THREADS)])
            assert everything(x, dy) == expected(shape, dtype), f"run {run}"
    finally:
        batchnorm.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 131), (67, 5), (45, 130)], ids=str)
def test_alignment_of_input(shape, dtype, isa):
    x, dy = (rng(seed, shape).standard_normal(shape).astype(dtype) for seed in ("x", "dy"))
    want = everything(x, dy)
    for offset in range(64):
        assert everything(at_offset(x, offset), at_offset(dy, (offset * 7) % 64)) == want, f"offset {offset}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 131), (67, 5), (45, 130)], ids=str)
def test_alignment_of_output(shape, dtype, isa):
    x, dy = (rng(seed, shape).standard_normal(shape).astype(dtype) for seed in ("x", "dy"))
    want = everything(x, dy)
    for offset in range(0, 64, dtype.itemsize):
        got = everything(x, dy, make_out=lambda a, offset=offset: at_offset(np.zeros_like(a), offset))
        assert got == want, f"offset {offset}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_in_place(shape, dtype, isa):
    gamma, beta = parameters(shape.channels)
    for activation in (None, "relu"):
        x, dy = normal(shape, dtype), gradient_of(shape, dtype)
        want = batchnorm.batch_norm_train(x, gamma, beta, activation=activation)
        how = {"activation": activation, "stats": "batch"}
        want_gradients = batchnorm.batch_norm_backward(dy, x, want.mean, want.inv_std, gamma, beta, **how)
        got_gradients = batchnorm.batch_norm_backward(
            dy, x, want.mean, want.inv_std, gamma, beta, out=dy, **how
        )
        assert got_gradients.dx is dy
        got = batchnorm.batch_norm_train(x, gamma, beta, activation=activation, out=x)
        assert got.y is x
        assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))
        assert all(same_bits(a, b) for a, b in zip(want_gradients, got_gradients, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("plain", "strided"), [(plain, other) for plain, others in SAME_DIRECTION.items() for other in others]
)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 7, 5, 6),
        (3, 20, 9, 17),
        (5, 66, 3, 11),
        (2, 3, 70, 121),
        (7, 1, 70, 121),
        (3, 1, 5, 7),
        (37, 1, 1, 1),
    ],
    ids=str,
)
def test_strided_as_contiguous(shape, plain, strided, dtype, isa):
    x, dy = (rng(seed, shape).standard_normal(shape).astype(dtype) for seed in ("x", "dy"))
    want = everything(place(plain, x).view, place(plain, dy).view)
    assert everything(place(strided, x).view, place(strided, dy).view) == want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(60, 1, 300), (60, 2, 300), (1, 7, 43), (60, 7, 1)], ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_gaps_do_not_matter_in_any_order_of_axes(order, shape, dtype):
    base, dy = (rng(seed, shape).standard_normal(shape).astype(dtype) for seed in ("x", "dy"))

    def in_order(a, wider, step):
        """`a` with its axes in this order in memory, one of them wider or walked in steps."""
        sizes = [a.shape[i] for i in order]
        sizes[wider] = sizes[wider] * abs(step) + 4
        index = tuple(slice(None) if i != wider else slice(None, None, step) for i in range(3))
        window = tuple(slice(0, a.shape[i]) for i in range(3))
        view = np.zeros(sizes, a.dtype)[index].transpose(np.argsort(order))[window]
        view[...] = a
        return view

    plain = [np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order)) for a in (base, dy)]
    want = everything(*plain)
    for wider in range(3):
        for step in (1, 2, -1, -2):
            assert everything(in_order(base, wider, step), in_order(dy, wider, step)) == want
            assert everything(in_order(base, wider, step), plain[1]) == want
            assert everything(plain[0], in_order(dy, wider, step)) == want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_inference_treats_each_element_by_itself(shape, dtype):
    # What a row comes out as depends neither on the batch it came in nor on its place in it.
    x = normal(shape, dtype)
    gamma, beta = parameters(shape.channels)
    mean, var = np.full(shape.channels, 0.3), np.full(shape.channels, 1.7)
    y = batchnorm.batch_norm(x, mean, var, gamma, beta)
    for row in {0, shape.outer // 2, shape.outer - 1}:
        assert same_bits(y[row], batchnorm.batch_norm(x[row : row + 1], mean, var, gamma, beta)[0])
    reversed_y = batchnorm.batch_norm(np.ascontiguousarray(x[::-1]), mean, var, gamma, beta)
    assert same_bits(reversed_y[::-1], y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME_SHAPES, ids=str)
def test_channels_do_not_see_each_other(shape, dtype):
    # Any channel, taken out with a neighbour changed, gives the same bits.
    x = normal(shape, dtype)
    before = batchnorm.batch_norm_train(x)
    changed = shape.channels // 2
    x[:, changed] = x[:, changed] * dtype.type(3) + dtype.type(1)
    after = batchnorm.batch_norm_train(x)
    for a, b in zip(before, after, strict=True):
        axis = 1 if a.ndim > 1 else 0
        assert same_bits(np.delete(a, changed, axis), np.delete(b, changed, axis))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["ncs", "nsc"])
def test_output_beyond_the_caches(direction, dtype, isa):
    # From 40 MiB of input and output on, stores go past the caches by other instructions. Element by element
    # the work is the same, so a part of the result must be what the part alone gives. The output starts off
    # alignment.
    channels, inner = 24, 1001
    outer = (44 << 20) // (2 * dtype.itemsize * channels * inner) + 1
    block = rng("stream").standard_normal((1, channels, inner)).astype(dtype)
    shape = Shape(direction, outer, channels, inner)
    x = shape.like((outer, channels, inner), dtype, block)
    raw = np.zeros(x.size + 8, dtype)
    out = raw[3 : 3 + x.size].reshape(x.shape if direction == "ncs" else (outer, inner, channels))
    out = out if direction == "ncs" else out.transpose(0, 2, 1)
    mean, var = np.full(channels, 0.3), np.full(channels, 1.7)
    batchnorm.batch_norm(x, mean, var, out=out)
    bits = np.dtype(f"u{dtype.itemsize}")
    want = batchnorm.batch_norm(block, mean, var).view(bits)
    assert np.array_equal(out.view(bits), np.broadcast_to(want, x.shape))
    assert not raw[:3].any() and not raw[3 + x.size :].any()
