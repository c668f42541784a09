"""Axes, strides and views: right values from any layout of any argument, results in x's memory order, written
arrays not copied, and nothing touched beside them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_double_backward as double_backward
from batchnorm import batch_norm_train as train

from support.checks import all_same_bits, differing, gradients, same_bits
from support.layouts import ORDERS, at_offset, place
from support.problem import DTYPES, Problem, rng

FLOAT32 = DTYPES[0]
PLAIN = Problem(4, 7, (5, 6), residual=True, activation="silu")
# Layouts that walk memory in the order of a plain one, with gaps or backwards.
GAPS = [
    "step 0",
    "reverse 0",
    "crop 1",
    "step 1",
    "reverse 1",
    "crop 2",
    "crop 2, crop 3",
    "step 3",
    "reverse 3",
]
SERVED = [
    "C", *(f"C, {gap}" for gap in GAPS[:6]), "channels first", "channels last", "channels last, step 0",
    "channels last, reverse 0", "channels last, crop 1", "channels last, crop 2",
]  # fmt: skip
# Written arrays need one contiguous run of the axes inside the channel's in memory, or contiguous channels,
# and at most two strides for the rest. Parts, and rows of gamma for each sample, need samples slowest.
ONE_PART = ["F", "batch last"]
REFUSED = [
    "C, step 3", "C, reverse 3", "C, crop 2, crop 3", "channels last, step 1",
    "channels last, crop 2, crop 3",
]  # fmt: skip
LAYOUTS = [*SERVED, *ONE_PART, *REFUSED, "channels first, step 0"]
OPTIONS = {
    "plain": {"residual": False, "activation": None},
    "smooth": {},
    "parts and mask": {"activation": "relu", "size": 3, "positions": "mask"},
    "mask per channel": {"positions": "mask per channel", "affine": "NC"},
    "from y": {"residual": False, "activation": "leaky_relu", "keep": "y"},
}


def values(dtype=FLOAT32, seed=0, shape=(4, 7, 5, 6)):
    return rng("values", shape, seed).standard_normal(shape).astype(dtype)


# ---- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_right_from_any_layout(layout, dtype):
    for options in OPTIONS.values():
        p = replace(PLAIN, layout=layout, dtype=dtype, **options)
        made = p.results()
        assert not (found := p.failures(made)), found
        assert made["y"].strides == made["dx"].strides == np.empty_like(p.x).strides


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "p",
    [replace(PLAIN, last=last, inner=(9, 17), channels=c) for last in (False, True) for c in (20, 66, 1)],
    ids=str,
)
def test_gaps_change_no_bit(p, dtype):
    for order, options in itertools.product(ORDERS, OPTIONS.values()):
        plain = replace(p, layout=order, dtype=dtype, **options)
        want = plain.results()
        for gap in GAPS:
            got = replace(plain, layout=f"{order}, {gap}").results()
            assert not (found := differing(got, want)), (order, gap, found)


def arrangements(a):
    """The same values in other memory: orders, reversed axes, steps."""
    yield np.asfortranarray(a)
    for axis in range(a.ndim):
        yield np.flip(np.flip(a, axis).copy(), axis)
        yield np.repeat(a, 2, axis)[tuple(slice(None, None, 2 if i == axis else 1) for i in range(a.ndim))]


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (4, 3, 2, 1), (4, 3, 5, 2), (3, 1, 4, 2)], ids=str)
@pytest.mark.parametrize("name", ["dy", "residual", "mask", "element mask", "weights", "gamma", "both"])
def test_a_second_operand_may_lie_unlike_x(shape, name):
    """Each other argument in any memory, beside x in any memory: the bits are those of all in x's order."""
    base, base_dy, base_z = (values(FLOAT32, seed, shape) for seed in range(3))
    given = {
        "gamma": values(FLOAT32, 3, shape[:2]), "element mask": values(FLOAT32, 6, shape) < 0.7,
        "weights": np.abs(values(FLOAT32, 4, (shape[0], *shape[2:]))),
        "mask": values(FLOAT32, 5, (shape[0], *shape[2:])) < 0.7,
    }  # fmt: skip

    def results(x, dy, residual, gamma, **positions):
        y, saved = train(x, gamma, residual=residual, activation="relu", **positions)
        return [np.asarray(a, order="C") for a in (y, *gradients(backward(dy, saved)))]

    option = {"element mask": "mask", "both": "residual"}.get(name, name)
    for x in (base, *arrangements(base)):
        arguments = {"dy": base_dy, "residual": base_z, "gamma": given["gamma"]}
        if option in ("mask", "weights"):
            arguments[option] = given[name]
        want = results(x, **arguments)
        for other in arrangements(arguments[option]):
            changed = {option: other} | ({"dy": np.asfortranarray(base_dy)} if name == "both" else {})
            assert all_same_bits(results(x, **(arguments | changed)), want), (x.strides, other.strides)


@pytest.mark.parametrize("names", [("gamma",), ("beta",), ("gamma", "beta")], ids="-".join)
def test_parameters_of_each_sample_beside_an_x_of_any_memory(names):
    base, rows = values(FLOAT32, 0, (4, 3, 5, 2)), values(FLOAT32, 1, (4, 3))
    options = dict.fromkeys(names, rows)
    want, infer = train(base, **options).y, batchnorm.batch_norm(base, np.zeros(3), np.ones(3), **options)
    for x in arrangements(base):
        np.testing.assert_allclose(train(x, **options).y, want, rtol=1e-5, atol=1e-6)
        assert same_bits(np.array(batchnorm.batch_norm(x, np.zeros(3), np.ones(3), **options)), infer)


def test_a_mask_beside_a_reversed_x():
    x = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)[::-1]
    mask = rng("mask").random((2, 4, 5)) < 0.6
    want = np.moveaxis(x, 1, -1)[mask].astype(np.float64).mean(axis=0)
    assert np.allclose(batchnorm.moments(x, mask=mask).mean, want, rtol=1e-12)
    assert np.allclose(train(x, mask=mask).saved.mean, want, rtol=1e-12)


@pytest.mark.parametrize("leftover", [1, 2, 3])
@pytest.mark.parametrize("channels", [64, 65, 130])
def test_rows_left_over_from_groups_of_four(channels, leftover):
    """Weights and masks of the last rows are their own."""
    n = 40 + leftover
    x = np.arange(n * channels, dtype=np.float32).reshape(n, channels)
    weights = np.arange(1.0, n + 1)
    for some, these in ((slice(None), weights), (slice(-leftover, None), weights[:leftover] ** 2)):
        part = x[some] if len(these) < n else x
        want = (these[:, None] * part).sum(axis=0) / these.sum()
        assert np.allclose(batchnorm.moments(part, weights=these).mean, want, rtol=1e-12)
        mask = np.arange(len(part)) % 3 != 1
        got = train(part, mask=mask, weights=these) if mask.sum() > 1 else None
        if got is not None:
            want = (these[mask, None] * part[mask]).sum(axis=0) / these[mask].sum()
            assert np.allclose(got.saved.mean, want, rtol=1e-12)
            assert not got.y[~mask].any()


# ---- axes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ndim", [2, 3, 4, 5, 6])
def test_every_axis(ndim, dtype):
    """Of the same memory, with the channels named where they are or moved to axis 1."""
    x, dy, z = (values(dtype, seed, (3, 4, 2, 5, 2, 3)[:ndim]) for seed in range(3))
    for axis in range(-ndim, ndim):
        gamma, beta = rng("affine", axis).standard_normal((2, x.shape[axis])).astype(np.float32)
        results = []
        for there, back, where in ((lambda a: a, lambda a: a, np.int64(axis)), (
            lambda a, axis=axis: np.moveaxis(a, axis, 1), lambda a, axis=axis: np.moveaxis(a, 1, axis), 1,
        )):  # fmt: skip
            y, saved = train(there(x), gamma, beta, residual=there(z), activation="tanh", channel_axis=where)
            g = backward(there(dy), saved)
            results.append([back(y), saved.mean, back(g.dx), g.dgamma, g.dbeta, back(g.dresidual)])
        assert all_same_bits(*results), axis


FORMATS = {
    "NC": (2, 1),
    "NCL": (3, 1),
    "NLC": (3, -1),
    "NCHW": (4, 1),
    "NHWC": (4, -1),
    "NCDHW": (5, 1),
    "NDHWC": (5, -1),
}


@pytest.mark.parametrize("name", [*FORMATS, "channels_first", "channels_last"])
def test_data_format_is_an_alias_of_channel_axis(name):
    ndim, axis = FORMATS.get(name, (4, 1 if name == "channels_first" else -1))
    x = values(FLOAT32, 0, (3, 4, 2, 5, 2)[:ndim])
    for options in ({}, {"mask": np.abs(x) < 1}):
        results = []
        for how in ({"channel_axis": axis}, {"data_format": name}):
            y, saved = train(x, **how, **options)
            results.append([y, *gradients(backward(x, saved)), *batchnorm.moments(x, **how)])
        assert all_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("order", ["C", "F", "channels last"])
@pytest.mark.parametrize("axes", [(1, 2, 3), (1,), (2, 3), (1, 3), (-1, 1), (3, 2)], ids=str)
def test_several_channel_axes_are_one(axes, order, dtype):
    """Moved together and merged they are a call with one channel axis; all options come along."""
    x, dy, z, ddx = (place(values(dtype, seed, (5, 3, 4, 6)), order).view for seed in range(4))
    there = sorted(a % 4 for a in axes)
    rest = [a for a in range(4) if a not in there]
    shape, moved = tuple(x.shape[a] for a in there), [rest[0], *there, *rest[1:]]
    merge = lambda a: a.transpose(moved).reshape(5, int(np.prod(shape)), -1)  # noqa: E731
    apart = lambda a: a.reshape([x.shape[a] for a in moved]).transpose(np.argsort(moved))  # noqa: E731
    mask = values(FLOAT32, 5, tuple(x.shape[a] for a in rest)) < 0.8
    eps = np.finfo(dtype).eps
    close = lambda a, b, unit=64: np.allclose(a, b, rtol=unit * eps, atol=unit * eps)  # noqa: E731
    for rows, positions, more in itertools.product(
        ((), (5,)), ({}, {"mask": mask}, {"mask": x < 1.5}),
        ({}, {"virtual_batch_size": 2}, {"activation": "silu", "residual": z},
         {"keep": "y", "activation": "leaky_relu"}),
    ):  # fmt: skip
        gamma, beta = (values(dtype, seed, (*rows, *shape)) for seed in (7, 8))
        merged = {name: merge(a) if np.shape(a) == x.shape else a for name, a in (positions | more).items()}
        if positions.get("mask") is mask:
            merged["mask"] = mask.reshape(5, -1)
        running = [np.zeros(shape), np.ones(shape)]
        flat_running = [a.reshape(-1).copy() for a in running]
        names = ("running_mean", "running_var")
        got, saved = train(
            x, gamma, beta, channel_axis=axes, **positions, **more, **dict(zip(names, running, strict=True))
        )
        want, flat_saved = train(
            merge(x), *(a.reshape(*rows, -1) for a in (gamma, beta)), **merged,
            **dict(zip(names, flat_running, strict=True)),
        )  # fmt: skip
        assert got.strides == np.empty_like(x).strides and close(got, apart(want))
        assert saved.mean.shape[-len(shape) :] == shape and close(
            saved.mean.reshape(flat_saved.mean.shape), flat_saved.mean
        )
        assert all(close(a.reshape(-1), b) for a, b in zip(running, flat_running, strict=True))
        g, flat_g = (backward(dy, saved), backward(merge(dy), flat_saved))
        assert g.dgamma.shape == gamma.shape
        assert close(g.dx, apart(flat_g.dx), 1e4) and close(
            g.dgamma.reshape(flat_g.dgamma.shape), flat_g.dgamma, 1e4
        )
        if "keep" not in more:
            h = double_backward(dy, saved, ddx=ddx)
            flat_h = double_backward(merge(dy), flat_saved, ddx=merge(ddx))
            assert close(h.dx, apart(flat_h.dx), 1e5) and close(h.ddy, apart(flat_h.ddy), 1e5)


# ---- positions, by rank ----------------------------------------------------------------------------------


def test_masks_and_weights_are_read_by_rank():
    """x (4, 4, 4): sizes tell nothing, ranks do."""
    x = values(FLOAT32, 0, (4, 4, 4)).astype(np.float64)
    g = rng("rank")
    for shape in (
        (4,),
        (4, 4),
        (4, 1),
        (1, 4),
        (4, 1, 4),
        (1, 1, 4),
        (4, 1, 1),
        (4, 4, 4),
        (4, 4, 1),
        (1, 4, 4),
        (1, 4, 1),
    ):
        mask = g.random(shape) < 0.75
        full = {1: lambda m: m[:, None, None], 2: lambda m: m[:, None, :], 3: lambda m: m}[mask.ndim](mask)
        full = np.broadcast_to(full, x.shape)
        y, saved = train(x, mask=mask)
        n = full.sum(axis=(0, 2))
        assert np.array_equal(saved.count, n), shape
        with np.errstate(invalid="ignore"):
            assert np.allclose(saved.mean, np.where(full, x, 0).sum(axis=(0, 2)) / n, equal_nan=True), shape
        assert not y[~full].any()
        assert same_bits(batchnorm.batch_norm(x, np.zeros(4), np.ones(4), mask=mask) != 0, full)
        weights = mask * g.uniform(0.5, 2, shape)
        if full.shape[1] > 1 and mask.ndim == 3 and shape[1] > 1:
            with pytest.raises(ValueError, match="weights"):
                train(x, weights=weights)
            continue
        wide = np.broadcast_to(
            weights[:, None, None] if mask.ndim == 1 else weights[:, None] if mask.ndim == 2 else weights,
            x.shape,
        )
        got = batchnorm.moments(x, weights=weights)
        assert np.allclose(got.mean, (x * wide).sum(axis=(0, 2)) / wide.sum(axis=(0, 2)), rtol=1e-12), shape


@pytest.mark.parametrize("shape", [(3,), (5, 4), (4, 5, 1), (2, 4, 4), (4, 4, 4, 1), ()], ids=str)
def test_other_shapes_of_masks_are_errors(shape):
    x = values(FLOAT32, 0, (4, 4, 4))
    for name, a in (("mask", np.ones(shape, bool)), ("weights", np.ones(shape))):
        with pytest.raises(ValueError, match=f"{name}.*shape|{name}.*expected"):
            train(x, **{name: a})


@pytest.mark.parametrize("axis", [1, 2])
def test_lengths_are_a_mask(axis):
    x = values(FLOAT32, 0, (4, 6, 7))
    steps = x.shape[3 - axis]
    lengths = np.array([steps, 0, 1, 3], np.int16)
    mask = np.arange(steps) < lengths[:, None]
    results = []
    for options in ({"lengths": lengths}, {"mask": mask}, {"lengths": lengths, "lengths_axis": 3 - axis}):
        y, saved = train(x, channel_axis=axis, activation="relu", **options)
        results.append([y, saved.mean, *gradients(backward(x, saved))])
    assert all_same_bits(results[0], results[1]) and all_same_bits(results[0], results[2])


def test_lengths_of_other_axes():
    x = values(FLOAT32, 0, (3, 4, 5, 6))
    for axis, steps in ((2, 5), (-1, 6)):
        lengths = np.array([steps, 1, 2])
        mask = np.arange(steps) < lengths[:, None]
        mask = mask[:, :, None] if steps == 5 else mask[:, None, :]
        got = batchnorm.moments(x, lengths=lengths, lengths_axis=axis)
        assert same_bits(got.mean, batchnorm.moments(x, mask=mask).mean)


# ---- writing ---------------------------------------------------------------------------------------------

CALLS = {
    "batch_norm": lambda x, **o: batchnorm.batch_norm(x, np.zeros(7), np.ones(7), activation="relu", **o),
    "batch_norm_train": lambda x, **o: train(x, **o).y,
    "per sample": lambda x, **o: train(x, np.ones((4, 7)) * 2, **o).y,
    "masked": lambda x, **o: train(x, mask=values() < 0.5, **o).y,
    "parts": lambda x, **o: train(x, virtual_batch_size=3, **o).y,
}
call_by_call = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", SERVED + ONE_PART)
@pytest.mark.parametrize("name", CALLS)
def test_out_receives_y(name, layout, dtype):
    call, x = CALLS[name], place(values(dtype), layout)
    if layout in ONE_PART and name in ("per sample", "parts"):
        with pytest.raises(ValueError, match=r"out.*samples.*numpy\.empty\(x\.shape, x\.dtype\)"):
            call(x.view, out=x.view)
        out = np.empty((4, 7, 5, 6), dtype)
        assert same_bits(call(x.view, out=out), call(x.view)), "the advice works"
        return
    want = call(x.view)
    out = place(np.zeros((4, 7, 5, 6), dtype), layout)
    assert call(x.view, out=out.view) is out.view and same_bits(out.view, want)
    assert out.outside_is_untouched()
    assert call(x.view, out=x.view) is x.view and same_bits(x.view, want)
    assert x.outside_is_untouched()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", SERVED)
def test_out_receives_gradients(layout, dtype):
    for options in ({}, {"affine": "NC", "stats": "given"}, {"size": 3, "activation": "relu"}):
        p = replace(PLAIN, layout=layout, dtype=dtype, **options)
        _, saved = p.train()
        want = gradients(backward(p.dy, saved))
        out, dz, dy = place(p.data.dy.reshape(4, 7, 5, 6), layout), place(values(dtype), layout), p.dy
        for given in ({"out": out.view, "out_residual": dz.view}, {"out": dy, "out_residual": dz.view}):
            got = backward(dy, saved, **given)
            assert got.dx is given["out"] and got.dresidual is dz.view and all_same_bits(gradients(got), want)
        assert out.outside_is_untouched() and dz.outside_is_untouched()


# x and out may differ in strides as long as they walk memory in the same direction.
@pytest.mark.parametrize(
    ("layout", "out_layout"),
    [
        ("C", "C, crop 1"), ("C, crop 1", "C"), ("C, step 0", "C, step 1"), ("C, crop 2, crop 3", "C"),
        ("C, step 3", "C, crop 2"), ("C, reverse 3", "C"), ("C, reverse 0", "C, reverse 1"),
        ("channels last", "channels last, crop 1"), ("channels last, crop 1", "channels last"),
        ("channels last, crop 2, crop 3", "channels last"),
        ("channels last, crop 2", "channels last, step 0"),
        ("channels last, step 1", "channels last, crop 2"),
    ],
)  # fmt: skip
@call_by_call
def test_out_with_other_strides(call, layout, out_layout):
    x = place(values(), layout).view
    out = place(np.zeros((4, 7, 5, 6), np.float32), out_layout)
    assert call(x, out=out.view) is out.view
    assert same_bits(out.view, call(x)) and out.outside_is_untouched()


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(("x", "residual", "out", "dy"), 2)))
def test_tensors_that_share_a_layout_by_pairs_only(first, second):
    """Two operands in gaps, two without: the bits of all without."""
    p = Problem(4, 6, (5, 8), activation="silu", residual=True)
    want = p.results()
    for gaps in ("C, crop 2", "C, crop 1, reverse 0", "C, step 0"):
        there = {name: gaps if name in (first, second) else "C" for name in ("x", "residual", "out", "dy")}
        at = lambda a, name, there=there: place(p.user(a), there[name])  # noqa: E731
        out = at(p.data.x, "out")
        y, saved = train(
            at(p.data.x, "x").view,
            *p.parameters,
            **p.options(residual=at(p.data.z, "residual").view, out=out.view),
        )
        assert same_bits(y, want["y"])
        got = backward(at(p.data.dy, "dy").view, saved, out=out.view)
        assert (
            same_bits(got.dx, want["dx"])
            and same_bits(got.dgamma, want["dgamma"])
            and out.outside_is_untouched()
        )


@pytest.mark.parametrize("out_format", [None, "channels_last", "channels_first"])
def test_images_into_an_out_with_gaps(out_format):
    x = rng("image").integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    mean, var = np.full(3, 100.0), np.full(3, 400.0)
    options = {"channel_axis": -1, "out_format": out_format}
    want = batchnorm.batch_norm(x, mean, var, **options)
    for layout in (
        "C, crop 0",
        "C, crop 1",
        "C, step 0",
        "C, crop 3" if out_format != "channels_first" else "C, crop 2",
        "C, crop 2, crop 3" if out_format != "channels_first" else "C, crop 1",
    ):
        out = place(np.zeros(want.shape, np.float32), layout)
        assert batchnorm.batch_norm(x, mean, var, out=out.view, **options) is out.view
        assert same_bits(out.view, want) and out.outside_is_untouched()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("channels", [5, 70])
def test_rows_with_gaps_in_one_tensor_alone(channels, activation):
    shape = (3, 11, channels)
    tensors = {name: values(FLOAT32, seed, shape) for seed, name in enumerate(("x", "dy", "residual"))}

    def results(x, dy, residual, out=None, dx=None, dz=None):
        y, saved = train(x, residual=residual, channel_axis=-1, activation=activation, out=out)
        got = backward(dy, saved, out=dx, out_residual=dz)
        return y, got.dx, got.dresidual, saved.mean, saved.var

    want = results(**tensors)
    for name in (*tensors, "out", "dx", "dz"):
        placed = place(tensors.get(name, np.zeros(shape, np.float32)), "C, crop 2")
        assert all_same_bits(results(**(tensors | {name: placed.view})), want), name
        assert placed.outside_is_untouched()


@pytest.mark.parametrize("layout", REFUSED)
@call_by_call
def test_writing_where_a_copy_would_be_needed_is_refused(call, layout):
    x, out = place(values(), layout), place(np.zeros((4, 7, 5, 6), np.float32), layout)
    before = x.base.copy(), out.base.copy()
    for target in (out.view, x.view):
        with pytest.raises(ValueError, match=r"\bout\b.*stride.*numpy\.empty"):
            call(x.view, out=target)
    assert same_bits(x.base, before[0]) and same_bits(out.base, before[1])


@pytest.mark.parametrize(
    ("layout", "out_layout"),
    [
        ("C", "channels last"),
        ("channels last", "C"),
        ("C", "F"),
        ("C, crop 2", "channels last"),
        ("channels last", "channels first"),
    ],
)
@call_by_call
def test_out_in_another_memory_order_is_refused(call, layout, out_layout):
    x, out = place(values(), layout).view, place(np.zeros((4, 7, 5, 6), np.float32), out_layout).view
    with pytest.raises(ValueError, match=r"\bout\b.*stride.*empty_like"):
        call(x, out=out)
    assert not out.any()


def test_misaligned_out_is_refused():
    out = at_offset(np.zeros((4, 7, 5, 6), np.float32), 2)
    with pytest.raises(ValueError, match=r"\bout\b.*align"):
        train(values(), out=out)
    assert not out.any()


def test_results_own_their_memory():
    first = train(values()).y
    kept = first.copy()
    for seed in range(5):
        train(values(seed=seed))
    assert same_bits(first, kept) and first.flags.owndata


GUARDED = """
import ctypes, mmap
import numpy as np
import batchnorm

# Arrays that end, or begin, exactly at a page that may not be touched: one element too far and the process
# dies.
page = mmap.PAGESIZE
size = 8 * page
memory = [mmap.mmap(-1, size + 2 * page) for _ in range(3)]
libc = ctypes.CDLL(None, use_errno=True)
for m in memory:
    address = ctypes.addressof(ctypes.c_char.from_buffer(m))
    for guard in (address, address + page + size):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0

def guarded(i, shape, dtype, at_end):
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, memory[i], page + (size - n if at_end else 0))

OPTIONS = ({}, {"activation": "relu", "residual": True}, {"activation": "silu", "residual": True},
           {"keep": "y"}, {"virtual_batch_size": 2}, {"mask": True})
for isa in batchnorm.isa_levels():
    batchnorm.set_isa(isa)
    for dtype in ("float32", "float64", "float16"):
        for shape in [(2, 3, s) for s in (1, 2, 7, 15, 16, 17, 31, 33, 100)] + [
            (n, c) for n in (2, 3, 17, 40) for c in (1, 3, 5, 16, 17, 63, 64, 65)
        ]:
            for at_end, options in ((e, o) for e in (True, False) for o in OPTIONS):
                x, z, dy = (guarded(i, shape, dtype, at_end) for i in range(3))
                for i, a in enumerate((x, z, dy)):
                    a[...] = np.random.default_rng(i).standard_normal(shape)
                given = dict(options)
                if "residual" in given:
                    given["residual"] = z
                if "mask" in given:
                    given["mask"] = x < 0.9
                    given["mask"][:2] = True
                y, saved = batchnorm.batch_norm_train(x, **given)
                batchnorm.moments(x)
                batchnorm.batch_norm_backward(dy, saved)
                if "keep" not in given:
                    batchnorm.batch_norm_double_backward(dy, saved, ddx=dy)
                batchnorm.batch_norm_backward(dy, saved, out=dy)
                batchnorm.batch_norm_train(x, out=x, **given)
print("survived")
"""


def test_nothing_beyond_the_array_is_touched():
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "survived", f"exit status {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [1, 3, 15, 16, 17, 49, 64, 196, 250, 256, 300, 513])
def test_short_runs_past_the_caches(run, dtype, isa, set_tuning):
    """Runs that share cache lines are put together first; nothing beside them is written."""
    x, dy, z = (rng(seed).standard_normal((5, 37, run)).astype(dtype) for seed in range(3))
    options = {"residual": z, "activation": "relu"}
    set_tuning("")
    y, saved = train(x, **options)
    want = backward(dy, saved)
    past = "cached_bytes=0,stream_run_bytes=0"
    for tuning in (past, f"{past},group_bytes=1,map_bytes=1"):
        for offset, gap in itertools.product((0, 1, 13), (1, 2) if run > 1 else (1,)):
            room = np.zeros((3, offset + x.size * gap + 99), dtype)
            y_out, dx_out, dz_out = (
                row[offset : offset + x.size * gap].reshape(5, 37 * gap, run)[:, ::gap] for row in room
            )
            set_tuning(tuning)
            got = train(x, **options, out=y_out)
            gradients = backward(dy, got.saved, out=dx_out, out_residual=dz_out)
            for a, b in ((got.y, y), (gradients.dx, want.dx), (gradients.dresidual, want.dresidual)):
                assert same_bits(np.ascontiguousarray(a), b)
                a[...] = 0
            assert not room.view(np.uint8).any(), (offset, gap)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u2"])
def test_a_byte_order_may_be_named_if_it_is_the_machines(dtype):
    order = "<" if sys.byteorder == "little" else ">"
    named = np.dtype(dtype).newbyteorder(order)
    assert named.byteorder == order
    x = (100 * rng(3).random((5, 3))).astype(dtype)
    assert all_same_bits(batchnorm.moments(x.astype(named).view(named)), batchnorm.moments(x))
