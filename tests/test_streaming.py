"""Arrays so large that stores go past the caches, at every alignment: the same bits as in small pieces."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

ELEMENTS = 12_000_000  # 48 MB of float32: beyond what any plan keeps in caches, with input and output


def at_offset(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy of ``array`` that starts ``offset`` bytes after a 64-byte boundary."""
    raw = np.zeros(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


# Odd and even channel counts, folded rows (C < 64), rows without tails; runs of odd and even length.
@pytest.mark.parametrize(
    "channels, axis", [(3, -1), (6, -1), (64, -1), (100, -1), (257, -1), (7, 1), (64, 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_streamed_elementwise_passes(channels, axis, dtype, activation):
    rng = np.random.default_rng(channels)
    batch = 8
    per_item = ELEMENTS * 4 // np.dtype(dtype).itemsize // channels // batch
    if dtype == np.float16:
        per_item //= 4
    shape = (batch, per_item, channels) if axis == -1 else (batch, channels, per_item)
    if dtype == np.float16:
        shape = (shape[0] * 4, *shape[1:])
    x = rng.standard_normal(shape, np.float32).astype(dtype)
    dy = x[::-1].copy()
    mean, var, gamma, beta = rng.standard_normal((4, channels))
    var = var**2
    inv_std = 1 / np.sqrt(var + 1e-5)

    offset = 3 * x.itemsize
    y = at_offset(np.zeros_like(x), offset)
    options = {"axis": axis, "activation": activation}
    batchnorm.batch_norm(x, mean, var, gamma, beta, out=y, **options)
    pieces = [batchnorm.batch_norm(part, mean, var, gamma, beta, **options) for part in np.array_split(x, 8)]
    assert np.array_equal(y, np.concatenate(pieces))

    dx = at_offset(np.zeros_like(x), offset)
    backward = {"stats": "fixed", "needs": ("dx",), **options}
    batchnorm.batch_norm_backward(dy, x, mean, inv_std, gamma, beta, out=dx, **backward)
    pieces = [
        batchnorm.batch_norm_backward(g, part, mean, inv_std, gamma, beta, **backward).dx
        for g, part in zip(np.array_split(dy, 8), np.array_split(x, 8), strict=True)
    ]
    assert np.array_equal(dx, np.concatenate(pieces))


@pytest.mark.parametrize("channels, axis", [(6, -1), (100, -1), (64, 1)])
def test_streamed_training_and_backward_at_any_alignment(channels, axis):
    rng = np.random.default_rng(channels)
    n = ELEMENTS // channels // 8
    x = rng.standard_normal((8, n, channels) if axis == -1 else (8, channels, n), np.float32)
    dy = x[::-1].copy()
    results = []
    for offset in (0, 4, 60):
        y, dx = at_offset(np.zeros_like(x), offset), at_offset(np.zeros_like(x), offset)
        forward = batchnorm.batch_norm_train(x, axis=axis, out=y)
        batchnorm.batch_norm_backward(dy, x, forward.mean, forward.inv_std, axis=axis, out=dx)
        results.append((y.tobytes(), dx.tobytes()))
    assert results[0] == results[1] == results[2]
