"""Conditional batch norm: the statistics are the layer's, scale and shift come with the call."""

import numpy as np
from batchnorm import BatchNorm

rng = np.random.default_rng(0)
x, dy = rng.normal(size=(2, 6, 4, 5, 5))
scales, shifts = rng.normal(1, 0.1, (10, 4)), np.zeros((10, 4))
label = np.array([3, 1, 3, 0, 9, 1])
bn = BatchNorm(4, scale=False, center=False)
y = bn(x, gamma=scales[label], beta=shifts[label])
dx = bn.backward(dy)
assert bn.dgamma.shape == (6, 4)
dscales = np.zeros_like(scales)
np.add.at(dscales, label, bn.dgamma)
assert dscales[3].any() and not dscales[2].any()
try:
    BatchNorm(4)(x, gamma=scales[label])
except ValueError as error:
    assert "scale=False" in str(error)
else:
    raise SystemExit("a layer with a gamma took another")
