"""Instance normalisation is ghost batches of one sample."""

import numpy as np
from batchnorm import batch_norm_train

x = np.random.default_rng(0).normal(size=(4, 3, 8, 8))
y, saved = batch_norm_train(x, virtual_batch_size=1)
assert saved.mean.shape == (4, 3)
want = (x - x.mean((2, 3), keepdims=True)) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-5)
np.testing.assert_allclose(y, want, atol=1e-12)
