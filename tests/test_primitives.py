"""The two passes of backward by themselves, `channel_sums` and `combine`, as the extension has them; their
checks are those of the C++ library and tested with it."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest
from batchnorm import _core

import tolerances
from cases import (
    BFLOAT16,
    DTYPES,
    FLOAT32,
    FLOAT64,
    LAYOUTS,
    Shape,
    at_offset,
    gradient_of,
    normal,
    place,
    rng,
    same_bits,
)
from checks import precision
from reference import others, spread, widen

SHAPES = [
    Shape("ncs", 3, 20, 49), Shape("ncs", 2, 3, 16385), Shape("ncs", 1, 1, 17), Shape("nsc", 245, 20, 1),
    Shape("nsc", 4097, 3, 1), Shape("nsc", 33, 65, 1), Shape("nsc", 5, 2051, 1),
]  # fmt: skip


if BFLOAT16 is not None:  # the package's functions tell the extension of the type when they first meet it
    batchnorm.moments(np.zeros((2, 1), BFLOAT16))


def numbers(channels, *names, kind=np.float64):
    generator = rng("numbers", channels)
    return [generator.standard_normal(channels).astype(kind) for _ in names]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_sums(shape, dtype, isa):
    a, b = gradient_of(shape, dtype), normal(shape, dtype)
    (shift,) = numbers(shape.channels, "shift", kind=np.float32)
    wide_a, wide_b = (widen(v, np.longdouble) for v in (a, b))
    for about in (None, shift, shift.astype(np.float64)):
        got = _core.channel_sums(a, b, 1, about, None)
        terms = wide_a * (wide_b - (0 if about is None else spread(about, b, 1)))
        for value, of in zip(got, (wide_a, terms), strict=True):
            want, size = of.sum(axis=others(a, 1)), np.abs(of).sum(axis=others(a, 1))
            bound = tolerances.sum_error(shape.count, size, want, np.float64)
            assert value.dtype == np.float64 and np.all(np.abs(value - want) <= bound)


def combination(a, b, k_a, center, k_b, k_0, kind):
    """The reference, and the sum of the magnitudes it is made of."""
    a, b = widen(a, kind), widen(b, kind)
    k_a, center, k_b, k_0 = (spread(widen(k, kind), a, 1) for k in (k_a, center, k_b, k_0))
    parts = a * k_a, (b - center) * k_b, k_0
    return sum(parts), sum(np.abs(p) for p in parts) + np.abs(center * k_b)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(shape, dtype, gated, isa):
    a, b = gradient_of(shape, dtype), normal(shape, dtype)
    k_a, center, k_b, k_0, inv_std, gamma, beta = numbers(shape.channels, *"abcdefg")
    kind = precision(dtype)
    got = _core.combine(
        a, b, k_a, center, k_b, k_0, 1, ("relu", inv_std, gamma, beta) if gated else None, None, None
    )
    on = True
    if gated:
        v = (widen(b, kind) - spread(center, b, 1)) * spread(inv_std * gamma, b, 1) + spread(beta, b, 1)
        on, clear = v > 0, np.abs(v) > 1e-4
    want, size = combination(np.where(on, widen(a, kind), 0), b, k_a, center, k_b, k_0, kind)
    # Five roundings on the way of any part.
    bound = tolerances.stored(dtype, want, 5 * tolerances.u_compute(dtype) * size)
    right = np.abs(widen(got, kind) - want) <= bound
    assert got.dtype == dtype and (right | ~clear if gated else right).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_place_and_threads(layout, threads):
    shape = (4, 20, 5, 7)
    a, b = (rng(layout, i).standard_normal(shape).astype(np.float32) for i in range(2))
    k = numbers(20, *"abcd")
    placed_a, placed_b = place(layout, a), place(layout, b)
    if not _core.has_view([placed_a.view, placed_b.view], 1):
        with pytest.raises(ValueError, match="cannot be used as they are"):
            _core.combine(placed_a.view, placed_b.view, *k, 1, None, None, None)
        return
    want, size = combination(a, b, *k, np.float64)
    into = _core.combine(placed_a.view, placed_b.view, *k, 1, None, None, None)
    assert np.all(np.abs(into - want) <= 6 * 2.0**-24 * size)
    for out in (placed_a.view, placed_b.view):
        kept_a, kept_b = place(layout, a).view, place(layout, b).view
        given = kept_a if out is placed_a.view else kept_b
        assert _core.combine(kept_a, kept_b, *k, 1, None, 2, given) is given
        assert np.array_equal(given, into)


def test_bits_depend_on_nothing_else(set_tuning):
    shape = Shape("nsc", 1025, 100, 1)
    a, b, k = gradient_of(shape, FLOAT32), normal(shape, FLOAT32), numbers(100, *"abcd")
    sums, y = _core.channel_sums(a, b, 1, k[1], 1), _core.combine(a, b, *k, 1, None, 1, None)
    set_tuning("parallel_elements=0,cached_bytes=0,stream_run_bytes=0")
    for offset, n in ((4, 2), (12, 3), (60, 7)):
        p, q = at_offset(a, offset), at_offset(b, offset)
        again = _core.channel_sums(p, q, 1, k[1], n)
        assert same_bits(again[0], sums[0]) and same_bits(again[1], sums[1])
        assert same_bits(_core.combine(p, q, *k, 1, None, n, None), y)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_numbers_of_any_size(size):
    """The product with k_b neither overflows nor vanishes on the way."""
    a, b = np.zeros((2, 3, 40), np.float32), np.full((2, 3, 40), size, np.float32)
    k_b = np.full(3, 1 / np.float64(np.float32(size)))
    assert np.allclose(_core.combine(a, b, None, None, k_b, None, 1, None, None, None), 1, rtol=1e-6)
    assert np.allclose(_core.combine(a, b, None, None, k_b * 1e8, None, 1, None, None, None), 1e8, rtol=1e-6)


def test_a_center_that_float32_cannot_hold():
    """Its rest goes into k_0: a large center costs no more than a small one."""
    b = (1e6 + np.arange(64).reshape(2, 1, 32) / 16).astype(np.float32)
    center = np.array([1e6 + 1 / 3])
    got = _core.combine(b, b, np.zeros(1), center, np.ones(1), None, 1, None, None, None)
    assert np.all(np.abs(got - (b - center.reshape(1, 1, 1))) <= 2e-6)


def test_what_is_not_asked_for_is_not_read():
    a, nan = gradient_of(SHAPES[0], FLOAT64), np.full((3, 20, 49), np.nan)
    assert same_bits(_core.combine(a, nan, None, None, None, None, 1, None, None, None), a)


def test_no_values():
    a = np.zeros((0, 3, 5), np.float32)
    assert [v.tolist() for v in _core.channel_sums(a, a, 1, None, None)] == [[0.0] * 3] * 2
    assert _core.combine(a, a, None, None, None, None, 1, None, None, None).shape == (0, 3, 5)


def test_refuses():
    a = np.zeros((2, 3, 5), np.float32)
    for wrong in (None, [1.0], a[:, :2], a.astype(np.float64)):
        with pytest.raises(ValueError, match="cannot be used as they are"):
            _core.channel_sums(a, wrong, 1, None, None)
        with pytest.raises(ValueError, match="cannot be used as they are"):
            _core.combine(a, wrong, None, None, None, None, 1, None, None, None)
    with pytest.raises(ValueError, match="shift has 2 values"):
        _core.channel_sums(a, a, 1, np.zeros(2), None)
    for gate in ("relu", ("relu",), ("elu", None, None, None)):
        with pytest.raises(ValueError, match="cannot be used as they are"):
            _core.combine(a, a, None, None, None, None, 1, gate, None, None)
