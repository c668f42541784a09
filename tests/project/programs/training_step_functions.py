"""A training step by functions, and inference with what it has learnt."""

import numpy as np
from batchnorm import batch_norm, batch_norm_backward, batch_norm_train

x, dy = np.random.default_rng(0).normal(3, 2, (2, 32, 8, 6, 6)).astype(np.float32)
gamma, beta = np.ones(8, np.float32), np.zeros(8, np.float32)
running_mean, running_var = np.zeros(8, np.float32), np.ones(8, np.float32)
for _ in range(3):
    y, saved = batch_norm_train(x, gamma, beta, running_mean=running_mean, running_var=running_var)
    dx, dgamma, dbeta = batch_norm_backward(dy, saved)
    gamma -= 0.1 * dgamma
    beta -= 0.1 * dbeta
z = batch_norm(x[:1], running_mean, running_var, gamma, beta)
assert dx.shape == x.shape and z.shape == (1, 8, 6, 6)
