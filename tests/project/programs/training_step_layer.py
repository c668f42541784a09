"""A training step by the layer: parameters made before the first backward, and one backward too many."""

import numpy as np
from batchnorm import BatchNorm

x, dy = np.random.default_rng(0).normal(3, 2, (2, 32, 8, 6, 6)).astype(np.float32)
bn = BatchNorm(8, name="conv1.bn")
parameters = bn.parameters()
for _ in range(3):
    y = bn(x)
    dx = bn.backward(dy)
    for p in parameters:
        p.value -= 0.1 * p.grad
assert np.array_equal(parameters[0].grad, bn.dgamma)
try:
    bn.backward(dy)
except RuntimeError as error:
    assert "return_saved=True" in str(error) and "conv1.bn" in str(error)
else:
    raise SystemExit("a second backward was silent")
