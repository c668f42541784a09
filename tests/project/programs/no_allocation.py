"""A loop that allocates no tensor."""

import numpy as np
from batchnorm import batch_norm_backward, batch_norm_train

x = np.random.default_rng(0).normal(size=(8, 4, 6))
y, dx = np.empty_like(x), np.empty_like(x)
for _ in range(3):
    result, saved = batch_norm_train(x, out=y)
    assert result is y
    assert batch_norm_backward(y, saved, needs=("dx",), out=dx).dx is dx
