"""Results depend on the inputs only: the same bits on every instruction set, with any number of threads, at
any address, however the work is laid out and wherever outputs are written.

test_combinations.py crosses all options with instruction sets and threads on edge shapes. Here are the sizes
at which work is shared, the numbers that lay it out, large outputs, many runs, and what must not depend on
what.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train

from support.checks import THREADS, all_same_bits, differing, environments, gradients, running_on, same_bits
from support.layouts import at_offset
from support.problem import DTYPES, Problem, rng

FLOAT32, FLOAT64, FLOAT16 = DTYPES[:3]

# Enough elements for a few threads, in every way of cutting them: by channel, by tile, by rows; and 49 and 33
# rows, which leave one over groups of four, as well as two and three.
SHARED = [
    Problem(2, 2, (16385,)), Problem(1, 1, (40001,)), Problem(17, 64, (35,)), Problem(3, 33, (529,)),
    Problem(1500, 3, (9,)), Problem(40001, 1), Problem(16385, 3), Problem(90, 20, (49,), last=True),
    Problem(1025, 100), Problem(131, 1000), Problem(20, 2049), Problem(62, 64, last=True), Problem(63, 128),
]  # fmt: skip
SMALL = [
    Problem(3, 5, (131,)),
    Problem(67, 5),
    Problem(45, 130),
    Problem(5, 20, (49,)),
    Problem(7, 17, (3, 3), last=True),
]
# Every kind of work that a call can be: each option that has code of its own.
VARIANTS = {
    "plain": {"running": True},
    "relu": {"activation": "relu"},
    "residual and relu6": {"activation": "relu6", "residual": True},
    "residual and silu": {"activation": "silu", "residual": True, "affine": "NC"},
    "given": {"stats": "given", "activation": "tanh"},
    "renorm and parts": {"stats": "renorm", "size": 2, "running": True},
    "mask and weights": {"positions": "mask and weights", "activation": "leaky_relu", "residual": True},
    "mask per channel": {"positions": "mask per channel", "affine": "NC"},
    "from y": {"keep": "y", "activation": "leaky_relu", "affine": "NC"},
    "lengths and parts": {"positions": "lengths", "size": 3, "affine": None},
}
# How work is laid out: shared among threads; stored past the caches; in the smallest pieces, by several
# threads and by one; in pieces of another size; all at once.
LAID_OUT = [
    "parallel_elements=0",
    "cached_bytes=0,stream_run_bytes=0,parallel_elements=0",
    "l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=0",
    "l2_bytes=0,group_bytes=0,map_bytes=0,parallel_elements=1000000000",
    "group_bytes=5000,map_bytes=5000,cached_bytes=0,stream_run_bytes=0,parallel_elements=0",
    ",".join(f"{name}={2**50}" for name in ("l2_bytes", "cached_bytes", "group_bytes", "map_bytes")),
]


def variants(p: Problem) -> dict[str, Problem]:
    made = {name: replace(p, **options) for name, options in VARIANTS.items()}
    return {name: q for name, q in made.items() if q.forbidden() is None and (q.size is None or q.n < 2000)}


@functools.lru_cache(maxsize=16)
def expected(p: Problem):
    """Results on the lowest level with one thread."""
    with running_on(batchnorm.isa_levels()[0], 1):
        return p.results()


def test_levels_start_with_baseline():
    levels = batchnorm.isa_levels()
    assert levels[0] == "baseline" and batchnorm.get_isa() in levels
    assert len(set(levels)) == len(levels)


def test_setting_level_and_threads(isa, threads):
    assert batchnorm.get_isa() == isa and batchnorm.get_num_threads() == threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHARED, ids=str)
def test_levels_and_threads(shape, dtype):
    for name, p in variants(replace(shape, dtype=dtype)).items():
        for isa, threads in environments():
            with running_on(isa, threads, "parallel_elements=0"):
                assert not (found := differing(p.results(), expected(p))), (name, isa, threads, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHARED[2:5], *SHARED[7:10], *SMALL], ids=str)
def test_how_work_is_laid_out(shape, dtype):
    for (name, p), tuning, threads in itertools.product(
        variants(replace(shape, dtype=dtype)).items(), LAID_OUT, (1, 3)
    ):
        with running_on(threads=threads, tuning=tuning):
            assert not (found := differing(p.results(), expected(p))), (name, tuning, threads, found)


@pytest.mark.parametrize("n_threads", [16, 64])
def test_more_threads_than_cores(n_threads):
    with running_on(threads=n_threads, tuning="parallel_elements=0"):
        for shape in SHARED[::2]:
            for name, p in variants(shape).items():
                assert not (found := differing(p.results(), expected(p))), (str(shape), name, found)


@pytest.mark.parametrize("p", [SHARED[3], SHARED[8], replace(SHARED[6], activation="relu")], ids=str)
def test_a_hundred_runs(p):
    # Bits of an activation behind a residual would share bytes among threads if runs did not start at whole
    # bytes.
    p = replace(p, residual=True, activation=p.activation or "leaky_relu")
    for run in range(100):
        with running_on(threads=THREADS[run % len(THREADS)], tuning="parallel_elements=0,map_bytes=0"):
            assert not (found := differing(p.results(), expected(p))), (run, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL[:3], ids=str)
def test_address_of_input(shape, dtype, isa):
    for p in (replace(shape, dtype=dtype), replace(shape, dtype=dtype, residual=True, activation="relu")):
        for offset in range(1, 64, 1 if p.activation is None else 5):
            assert not differing(replace(p, offset=offset).results(), expected(p)), offset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_address_of_output(shape, dtype, isa):
    p = replace(shape, dtype=dtype, residual=True, activation="silu")
    y, saved = p.train()
    want = gradients(backward(p.dy, saved))
    for offset, tuning in itertools.product(range(0, 64, dtype.itemsize), ("", LAID_OUT[1])):
        outs = [at_offset(np.zeros_like(p.x), place % 64) for place in (offset, 3 * offset, offset + 16)]
        with running_on(tuning=tuning):
            assert same_bits(p.train(out=outs[0])[0], y), offset
            got = backward(p.dy, saved, out=outs[1], out_residual=outs[2])
        assert got.dx is outs[1] and got.dresidual is outs[2]
        assert all_same_bits(gradients(got), want), offset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, SHARED[0]], ids=str)
def test_inference_treats_each_element_by_itself(shape, dtype):
    # What a row comes out as depends neither on the batch it came in nor on its place in it.
    p = replace(shape, dtype=dtype, activation="silu")
    x, d = p.x, p.data
    options = {"channel_axis": p.channel_axis, "activation": "silu"}
    infer = lambda rows: batchnorm.batch_norm(rows, d.mean, d.var, *p.parameters, **options)  # noqa: E731
    y = infer(x)
    for row in {0, p.n // 2, p.n - 1}:
        assert same_bits(y[row], infer(x[row : row + 1])[0])
    assert same_bits(infer(np.ascontiguousarray(x[::-1]))[::-1], y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_channels_do_not_see_each_other(shape, dtype):
    # Any channel, taken out with a neighbour changed, gives the same bits.
    x, axis = replace(shape, dtype=dtype).x, shape.channel_axis
    before = train(x, channel_axis=axis)
    changed = shape.channels // 2
    other = np.moveaxis(x, axis, 0)
    other[changed] = other[changed] * dtype.type(3) + dtype.type(1)
    after = train(x, channel_axis=axis)
    assert same_bits(np.delete(before.y, changed, axis), np.delete(after.y, changed, axis))
    assert same_bits(np.delete(before.saved.mean, changed), np.delete(after.saved.mean, changed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [Problem(12, 20, (49,)), Problem(12, 65), Problem(10, 3, (7, 9), last=True)], ids=str
)
def test_a_part_has_the_bits_of_a_call_on_it_alone(shape, dtype):
    p = replace(shape, dtype=dtype, size=4, activation="relu", residual=True)
    y, saved = p.train()
    got = backward(p.dy, saved)
    alone = {
        name: value for name, value in p.options().items() if name not in ("virtual_batch_size", "residual")
    }
    for i, start in enumerate(range(0, p.n, 4)):
        part = slice(start, start + 4)
        y_alone, saved_alone = train(p.x[part], *p.parameters, residual=p.z[part], **alone)
        want = backward(p.dy[part], saved_alone)
        assert same_bits(y[part], y_alone) and same_bits(saved.mean[i], saved_alone.mean)
        assert same_bits(got.dx[part], want.dx) and same_bits(got.dresidual[part], want.dresidual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_options_that_say_nothing_change_no_bit(shape, dtype):
    p = replace(shape, dtype=dtype, activation="relu")
    rest = (p.n, *p.inner)
    want = p.results()
    for more in (
        {"mask": np.ones(rest, bool)}, {"mask": np.ones(p.x.shape, bool)}, {"weights": np.ones(rest)},
        {"weights": np.ones(p.n, int)},
        {"renorm": {"mean": p.data.mean, "std": p.data.std, "rmin": 1, "rmax": 1, "dmax": 0}},
    ):  # fmt: skip
        got = p.results(**more)
        assert not [name for name in differing(got, want) if name not in ("dgamma", "dbeta")], more.keys()
        # A sum over channels of their own, or of renorm's formula, may round once more before it is stored.
        assert all(np.allclose(got[name], want[name], rtol=4e-7) for name in ("dgamma", "dbeta"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_output_beyond_the_caches(last, dtype, isa):
    # From 40 MiB of input and output on, stores go past the caches by other instructions. Element by element
    # the work is the same, so a part of the result must be what the part alone gives. The output starts off
    # alignment.
    n = (44 << 20) // (2 * dtype.itemsize * 24 * 1001) + 1
    block = rng("stream").standard_normal((1, 1001, 24) if last else (1, 24, 1001)).astype(dtype)
    x = np.broadcast_to(block, (n, *block.shape[1:])).copy()
    raw = np.zeros(x.size + 8, dtype)
    out = raw[3 : 3 + x.size].reshape(x.shape)
    mean, var, bits = np.full(24, 0.3), np.full(24, 1.7), np.dtype(f"u{dtype.itemsize}")
    options = {"channel_axis": -1 if last else 1, "activation": "relu"}
    batchnorm.batch_norm(x, mean, var, out=out, **options)
    want = batchnorm.batch_norm(block, mean, var, **options)
    assert np.array_equal(out.view(bits), np.broadcast_to(want.view(bits), x.shape))
    saved = train(x, mean=mean, var=var, residual=x, **options).saved
    out[...] = 0
    backward(x, saved, out=out)
    saved = train(block, mean=mean, var=var, residual=block, **options).saved
    want = backward(block, saved).dx
    assert np.array_equal(out.view(bits), np.broadcast_to(want.view(bits), x.shape))
    assert not raw[:3].any() and not raw[3 + x.size :].any()


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "last"), [(3, True), (100, True), (257, True), (7, False), (64, False)])
def test_training_beyond_the_caches_at_any_address(channels, last):
    n = 12_000_000 // channels // 8
    x = rng("large", channels).standard_normal((8, n, channels) if last else (8, channels, n), np.float32)
    results = []
    for offset in (0, 4, 60):
        y, dx = (at_offset(np.zeros_like(x), offset) for _ in range(2))
        saved = train(x, channel_axis=-1 if last else 1, out=y).saved
        backward(x[::-1], saved, out=dx)
        results.append((y.tobytes(), dx.tobytes()))
    assert results[0] == results[1] == results[2]
