"""A frozen batch norm folded into the dense layer before it; a square weight does not tell its axis."""

import numpy as np
from batchnorm import BatchNorm

rng = np.random.default_rng(0)
weight, bias = rng.normal(size=(8, 8)), rng.normal(size=8)
x = rng.normal(size=(5, 8))
bn = BatchNorm(8, dtype=np.float64).recalibrate([x @ weight.T + bias]).eval()
folded, shifted = bn.fold(weight, bias, out_axis=0)
np.testing.assert_allclose(x @ folded.T + shifted, bn(x @ weight.T + bias), atol=1e-12)
wrong, _ = bn.fold(weight, bias, out_axis=1)
assert wrong.shape == folded.shape and not np.allclose(wrong, folded)
