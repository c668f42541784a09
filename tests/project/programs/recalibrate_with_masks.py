"""Recalibrate from a Moments, whatever made it, and from batches."""

import numpy as np
from batchnorm import BatchNorm, Moments

rng = np.random.default_rng(0)
batches = [rng.normal(i, 1, (n, 3, 5)).astype(np.float32) for i, n in enumerate((8, 3, 5))]
m = Moments()
for x in batches:
    m.update(x, mask=np.arange(5) < rng.integers(2, 6, (len(x), 1)))
bn = BatchNorm(3).recalibrate(m)
np.testing.assert_allclose(bn.running_mean, m.mean, rtol=1e-6)
bn.recalibrate(batches)
whole = np.concatenate(batches).astype(np.float64)
np.testing.assert_allclose(bn.running_var, whole.var((0, 2), ddof=1), rtol=1e-6)
