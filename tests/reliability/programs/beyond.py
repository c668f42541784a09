"""More than 2^31 elements, or as many in one channel, both directions, in 9 GiB.

python beyond.py float16|uint8 CHANNELS

x is a period of values, repeated, so that its exact statistics follow from those of the period. Any piece of
the result must have the bits that its values give in a small call with the same statistics.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import Any

import numpy as np
from batchnorm import Saved, batch_norm, batch_norm_backward, batch_norm_train, moments

Array = np.ndarray[Any, Any]
MOST = 2**31
EPS = 1e-5


def repeated(period: Array, rows: int) -> Array:
    """`rows` rows of values that begin anew with each period."""
    whole = -(-rows // len(period))
    x = np.empty((whole * len(period), period.shape[1]), period.dtype)
    x.reshape(whole, *period.shape)[...] = period
    return x[:rows]


def places(rows: int, period: int) -> list[int]:
    """Rows at which periods begin: at the start, about 2^31 elements and values of a channel, at the end."""
    last = rows // period
    return [k * period for k in {0, 1, last // 2, last - 1, last}]


def training(channels: int) -> None:
    """float16: y over x, dx over dy, and the backward from y."""
    rows = MOST // channels + 5 * 4099 + 3
    period = np.random.default_rng(0).normal(3, 40, (4099, channels)).astype(np.float16)
    slopes = (np.random.default_rng(1).integers(-3, 5, period.shape)).astype(np.float16)
    x = repeated(period, rows)
    mean, var = np.zeros(channels), np.zeros(channels)
    running: Any = {"running_mean": mean, "running_var": var, "decay": 0.0, "running_ddof": 0}
    y, saved = batch_norm_train(x, out=x, keep="y", eps=EPS, **running)
    assert y is x and x.size > MOST and (saved.count == rows).all()
    weights = np.full(4099, rows // 4099) + (np.arange(4099) < rows % 4099)  # how often each row occurs
    values, w = period.astype(np.longdouble), weights[:, None].astype(np.longdouble)
    exact = (w * values).sum(0) / rows
    assert np.allclose(mean, exact.astype(float), rtol=1e-14, atol=1e-14)
    assert np.allclose(var, ((w * (values - exact) ** 2).sum(0) / rows).astype(float), rtol=1e-14)
    expected = batch_norm(period, mean, var, eps=EPS)
    for start in places(rows, 4099):
        piece = y[start : start + 4099]
        assert piece.tobytes() == expected[: len(piece)].tobytes(), f"y from row {start} on"

    dy = repeated(slopes, rows)
    got = batch_norm_backward(dy, saved, out=dy)
    # Weighted, the period alone has the same gradients, to the last digits of float16.
    y_period, of_period = batch_norm_train(period, weights=weights.astype(float), keep="x", eps=EPS)
    small = batch_norm_backward(slopes, of_period)
    assert y_period.tobytes() == expected.tobytes() and isinstance(of_period, Saved)
    counted = slopes.astype(np.longdouble)
    x_hat = (values - exact) / np.sqrt((w * (values - exact) ** 2).sum(0) / rows + np.longdouble(EPS))
    g_mean, g_x = (w * counted).sum(0) / rows, (w * counted * x_hat).sum(0) / rows
    want = (counted - g_mean - x_hat * g_x) / np.sqrt(var + EPS)
    assert small.dx.shape == want.shape
    for start in places(rows, 4099):
        piece = got.dx[start : start + 4099].astype(np.longdouble)
        assert np.abs(piece - want[: len(piece)]).max() < 4e-3 * np.abs(want).max(), f"dx from row {start} on"


def images(channels: int) -> None:
    """uint8: exact statistics, and y in float16."""
    rows = MOST // channels + 5 * 4099 + 3
    period = np.random.default_rng(0).integers(0, 256, (4099, channels)).astype(np.uint8)
    x = repeated(period, rows)
    assert x.size > MOST
    mean, var = moments(x)
    weights = [rows // 4099 + (i < rows % 4099) for i in range(4099)]
    for c in range(channels):
        values = [int(v) for v in period[:, c]]
        exact = Fraction(sum(w * v for w, v in zip(weights, values, strict=True)), rows)
        squares = Fraction(sum(w * v * v for w, v in zip(weights, values, strict=True)), rows)
        assert mean[c] == float(exact) and var[c] == float(squares - exact**2), c
    y = batch_norm(x, mean, var, dtype=np.float16)
    expected = batch_norm(period, mean, var, dtype=np.float16)
    for start in places(rows, 4099):
        piece = y[start : start + 4099]
        assert piece.tobytes() == expected[: len(piece)].tobytes(), f"y from row {start} on"


if __name__ == "__main__":
    {"float16": training, "uint8": images}[sys.argv[1]](int(sys.argv[2]))
    print("done")
