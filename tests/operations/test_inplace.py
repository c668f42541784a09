"""Outputs over inputs: in place where that is allowed, an error for any other overlap, whatever its geometry.
Calls that end early leave running statistics alone."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from batchnorm import batch_norm
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train

from support.checks import all_same_bits, gradients, running_on, same_bits
from support.problem import ACTIVATIONS, DTYPES, Problem, rng

SHAPES = [
    Problem(5, 20, (49,)),
    Problem(2, 65, (33,)),
    Problem(17, 3),
    Problem(9, 16, (49,), last=True),
    Problem(37, 1000),
]

# ---- allowed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place(shape, activation, dtype, isa):
    p = replace(shape, dtype=dtype, activation=activation, residual=True)
    y, saved = p.train()
    want = gradients(backward(p.dy, saved))
    for name in ("x", "z"):
        x, z = p.x, p.z
        out = x if name == "x" else z
        got = train(x, *p.parameters, **p.options(residual=z, out=out)).y
        assert got is out and same_bits(got, y)
    for pair in (
        ("dy", None),
        ("dy", "new"),
        ("new", "dy"),
        ("x", "dy"),
        ("dy", "z"),
        ("z", "dy"),
        ("x", "z"),
        (None, "z"),
    ):
        x, z = p.x, p.z
        saved = train(x, *p.parameters, **p.options(residual=z)).saved
        arrays = {"dy": p.dy, "new": np.zeros_like(x), "x": x, "z": z, None: None}
        out, out_residual = (arrays[name] for name in pair)
        got = backward(arrays["dy"], saved, out=out, out_residual=out_residual)
        assert all_same_bits(gradients(got), want), pair
        assert out is None or got.dx is out
        assert out_residual is None or got.dresidual is out_residual


@pytest.mark.parametrize("options", [
    {"positions": "mask"}, {"positions": "mask per channel"}, {"positions": "weights"}, {"affine": "NC"},
    {"size": 2}, {"stats": "renorm"}, {"stats": "given"}, {"keep": "y"},
    {"keep": "y", "activation": "leaky_relu", "size": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_with_every_option(shape, options):
    p = replace(shape, **options)
    for tuning in ("", "cached_bytes=0,stream_run_bytes=0", "map_bytes=1,group_bytes=1"):
        y, saved = p.train()
        want = backward(p.dy, saved)
        x, dy = p.x, p.dy
        got = train(x, *p.parameters, **p.options(out=x))
        assert got.y is x and same_bits(x, y) and same_bits(got.saved.mean, saved.mean), tuning
        after = backward(dy, got.saved if p.keep == "y" else saved, out=dy)
        assert after.dx is dy and all_same_bits(gradients(after), gradients(want)), tuning


# ---- not allowed -----------------------------------------------------------------------------------------


def windows(buffer, shape, seed):
    """Views of this shape into a larger buffer: shifts, steps, reversed axes."""
    g = rng("windows", seed)
    for _ in range(60):
        index = []
        for n, room in zip(shape, buffer.shape, strict=True):
            step = int(g.choice([1, 1, 1, 2, -1]))
            span = (n - 1) * abs(step) + 1
            if span > room:
                step, span = 1, n
            start = int(g.integers(0, room - span + 1))
            part = buffer_slice(start, n, step)
            index.append(part)
        yield buffer[tuple(index)]


def buffer_slice(start, n, step):
    if step > 0:
        return slice(start, start + (n - 1) * step + 1, step)
    last = start - 1
    return slice(start + n - 1, last if last >= 0 else None, -1)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": "NC"}, {"size": 2}, {"positions": "mask"}, {"residual": True, "activation": "relu"}],
    ids=str,
)
def test_any_geometry_of_overlap(options, last):
    """Of two windows into one buffer: an error that changes nothing, or the right result, and what it leaves
    for backward serves or says that it does not."""
    p = Problem(3, 4, (6,), last=last, **options)
    buffer = np.zeros((6, 11, 8) if last else (6, 8, 11), np.float32)
    errors = served = backwards = 0
    for x, out in itertools.product(
        list(windows(buffer, p.x.shape, "x"))[:20], windows(buffer, p.x.shape, "out")
    ):
        buffer[...] = rng("buffer").standard_normal(buffer.shape)
        before, plain = buffer.copy(), x.copy()
        want, saved = train(plain, *p.parameters, **p.options())
        dx = backward(p.dy, saved).dx
        try:
            saved = train(x, *p.parameters, **p.options(out=out)).saved
        except ValueError as error:
            assert "out" in str(error)
            assert same_bits(buffer, before)
            errors += 1
            continue
        served += 1
        assert np.allclose(out, want, rtol=1e-5, atol=1e-5), (x.strides, out.strides)
        with contextlib.suppress(RuntimeError):  # x is overwritten
            found = backward(p.dy, saved).dx
            backwards += 1
            assert np.allclose(found, dx, rtol=1e-4, atol=1e-4), (x.strides, out.strides)
    assert errors > 100 and served > 20 and backwards > 0


NAMES = ("x", "dy", "residual", "out", "out_residual")


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize(
    ("first", "second"), [(a, b) for a, b in itertools.combinations(NAMES, 2) if b.startswith("out")]
)
def test_outputs_shifted_against_other_tensors(first, second, size):
    """By an element, a row, a sample, a part; and backwards."""
    p = Problem(6, 4, (5,), residual=True, activation="silu", size=size)
    for shift in (1, 5, 20, 40, 119, "backwards"):
        base = np.zeros(300, np.float32)
        start = 0 if shift == "backwards" else shift
        arrays = {
            "x": p.x,
            "dy": p.dy,
            "residual": p.z,
            "out": np.zeros_like(p.x),
            "out_residual": np.zeros_like(p.x),
        }
        below, above = base[:120].reshape(6, 4, 5), base[start : start + 120].reshape(6, 4, 5)
        above = above[::-1] if shift == "backwards" else above
        below[...] = arrays[first]
        arrays[first], arrays[second] = below, above
        saved = train(arrays["x"], *p.parameters, **p.options(residual=arrays["residual"])).saved
        before = base.copy()
        with pytest.raises(ValueError, match=f"{second}|{first}"):
            backward(arrays["dy"], saved, out=arrays["out"], out_residual=arrays["out_residual"])
        assert same_bits(base, before)


@pytest.mark.parametrize("size", [None, 2])
def test_running_statistics_inside_a_tensor(size):
    """Of x, the residual, out, gamma, the other one, or given statistics."""
    p = Problem(6, 4, (5,), residual=True)
    x, z, out, vectors = p.x, p.z, np.zeros_like(p.x), np.ones((3, 4), np.float32)
    good = {"running_mean": np.zeros(4, np.float32), "running_var": np.ones(4, np.float32)}
    inside = {
        "x": x.reshape(-1)[20:24], "residual": z.reshape(-1)[::-7][:4], "out": out.reshape(-1)[3:7],
        "gamma": vectors[0], "beta": vectors[1], "other": good["running_var"][:],
    }  # fmt: skip
    arrays = [x, z, out, vectors, *good.values()]
    before = [a.copy() for a in arrays]
    for name, part in inside.items():
        with pytest.raises(ValueError, match=r"running_mean|running_var"):
            train(
                x,
                vectors[0],
                vectors[1],
                residual=z,
                out=out,
                virtual_batch_size=size,
                **(good | {"running_mean": part}),
            )
        assert all_same_bits(arrays, before), name


def test_positions_inside_an_output():
    x = rng("inside").standard_normal((6, 4, 5))
    for name, kind in (("mask", bool), ("weights", np.float64)):
        out = np.ones_like(x)
        values = out.view(kind).reshape(-1)[:30].reshape(6, 5)
        if kind is bool:
            values[...] = True
        with pytest.raises(ValueError, match=f"out overlaps {name}"):
            train(x, out=out, **{name: values})


# ---- calls that end early --------------------------------------------------------------------------------


def test_an_output_over_an_operand_of_another_order_says_what_is_wrong():
    """Not that it overlaps itself: it cannot be written in x's order."""
    x, other = np.zeros((3, 4, 2)), np.zeros((3, 4, 2), order="F")
    _, saved = train(x + np.arange(2))
    for call in (lambda: backward(other, saved, out=other), lambda: train(x, residual=other, out=other)):
        with pytest.raises(
            ValueError, match=r"out has strides .*, or leave out= away and assign, out\[\.\.\.\]"
        ):
            call()
    image, statistics = np.zeros((2, 3, 4, 5), np.uint8), (np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match=r"use numpy.empty\(\(2, 3, 4, 5\), 'float32'\), or") as error:
        batch_norm(image, *statistics, out=np.zeros((2, 3, 4, 10), np.float32)[..., ::2])
    assert batch_norm(image, *statistics, out=np.empty((2, 3, 4, 5), "float32")) is not None, error


@pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 4}, {"virtual_batch_size": 4, "renorm": True}], ids=str
)
def test_an_interrupt_in_the_middle_leaves_running_statistics_alone(options):
    if threading.current_thread() is not threading.main_thread():
        pytest.fail("Ctrl-C reaches the main thread only")
    x = np.ones((64, 16, 200, 100), np.float16) * np.arange(64, dtype=np.float16)[:, None, None, None]
    out = np.empty_like(x)
    before = np.full(16, 0.25), np.full(16, 4.0)
    came = []

    def interrupt(*_):
        came.append(True)
        raise KeyboardInterrupt

    handler, inside = signal.signal(signal.SIGINT, interrupt), 0
    try:
        for delay in np.linspace(0.002, 0.06, 30):
            running, done = [a.copy() for a in before], False
            came.clear()
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                arrays = {"running_mean": running[0], "running_var": running[1], "out": out}
                with running_on(isa="baseline"):  # long enough
                    train(x, activation="tanh", num_threads=1, **arrays, **options)
                done = True
                while not came:
                    time.sleep(0.001)
            except KeyboardInterrupt:
                timer.join()
            changed = [not same_bits(a, b) for a, b in zip(running, before, strict=True)]
            assert all(changed) if done else not any(changed) or all(changed), "one of the two"
            inside += not any(changed)
        assert inside, "no interrupt came in time"
    finally:
        signal.signal(signal.SIGINT, handler)
