"""The end of a residual block: nothing is repeated in backward, and dresidual is there."""

import numpy as np
from batchnorm import batch_norm_backward, batch_norm_train

x, z, dy = np.random.default_rng(0).normal(size=(3, 8, 4, 5, 5)).astype(np.float32)
gamma, beta = np.ones(4, np.float32), np.zeros(4, np.float32)
y, saved = batch_norm_train(x, gamma, beta, residual=z, activation="relu")
g = batch_norm_backward(dy, saved)
assert g.dresidual.shape == z.shape
np.testing.assert_allclose(g.dresidual, dy * (y > 0))
dx, dgamma, dbeta = g
