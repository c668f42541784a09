"""Error bounds as docs/numerics.md has them: data of any |mean| / std from 1 to 1e7, channels of 2 to 2^27
values, every dtype, both directions of memory, forward and backward, against extended precision."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import batchnorm
import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "accuracy.py"
pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="bench/accuracy.py is not beside the tests")

SHORT = (2, 3, 17, 1000, 4097, 2**16 + 3)
LONG = (*SHORT, 2**20, 2**24 + 1, 2**27)
ONE_SIZE = (1, 1e2, 1e4, 1e7)  # ratios of the largest channels, which take minutes
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 0.0, "float64": 0.0, "float16": 2.0**-25, "bfloat16": 2.0**-134}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_accuracy", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bounds(dtype: str, far: float) -> tuple[float, float, float]:
    """Of y over max(1, |y|), of dx over the size of its terms, of var relative to itself; far is |mean| /
    std. Rounding to storage of 16 bits is apart."""
    if dtype == "float64":  # x - mean has the mean's own rounding, for which there is no wider type
        return 2.0**-53 * (6 + 2 * far), 2.0**-53 * (64 + 8 * far), 1e-14
    return 3e-7, 3e-7, 2.0**-23


@pytest.mark.parametrize("rows", [False, True], ids=["runs", "rows"])
@pytest.mark.parametrize("dtype", UNIT)
def test_bounds(bench, dtype, rows, long, record_property):
    tried = 0
    for n in LONG if long else SHORT:
        for ratio in bench.RATIOS if n < 2**22 else ONE_SIZE:
            x, dy = bench.data(dtype, ratio, n)
            exact = bench.Exact(x, dy)
            shape = (n, 1) if rows else (1, 1, n)
            y, saved = batchnorm.batch_norm_train(x.reshape(shape), np.ones(1), np.zeros(1), eps=bench.EPS)
            got = batchnorm.batch_norm_backward(dy.reshape(shape), saved)
            of_y, of_dx, of_var = bounds(dtype, float(abs(exact.mean) * exact.inv_std))
            stored = 0.0 if dtype in ("float32", "float64") else UNIT[dtype]
            case = f"{dtype}, {n} values, |mean| / std = {ratio:g}"
            scale = lambda want, a=of_y, b=stored: a * np.maximum(1, abs(want)) + b * abs(want) + TINY[dtype]  # noqa: E731
            assert exact.error_of_y(y.reshape(-1), scale) <= 1, case
            assert exact.error_of_dx(got.dx.reshape(-1), stored, TINY[dtype]) <= of_dx, case
            assert abs(saved.var[0] - exact.var) <= of_var * exact.var, case
            assert abs(saved.mean[0] - exact.mean) <= 2.0**-52 * abs(exact.mean) + 1e-13 * exact.var**0.5, (
                case
            )
            tried += 4
    record_property("tried", tried)


def test_what_readme_says_of_float32(bench):
    for ratio in bench.RATIOS:
        for n in (*SHORT, 32 * 56 * 56):  # the last is that of the table there
            x, dy = bench.data("float32", ratio, n)
            assert bench.Exact(x, dy).error_of_y(bench.ours(x, dy)[0]) <= 2e-7
