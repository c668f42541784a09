"""A gradient penalty behind silu: the loss is sum(dx**2), and dbeta is not 0."""

import numpy as np
from batchnorm import batch_norm_backward, batch_norm_double_backward, batch_norm_train

rng = np.random.default_rng(0)
x, dy = rng.normal(size=(2, 4, 2, 3))
gamma, beta = rng.normal(1, 0.1, 2), np.zeros(2)


def penalty(beta: np.ndarray) -> float:
    saved = batch_norm_train(x, gamma, beta, activation="silu").saved
    return float((batch_norm_backward(dy, saved).dx ** 2).sum())


saved = batch_norm_train(x, gamma, beta, activation="silu").saved
dx = batch_norm_backward(dy, saved).dx
second = batch_norm_double_backward(dy, saved, ddx=2 * dx)
assert second.ddy.shape == x.shape and second.dresidual is None
for c in range(2):
    step = np.zeros(2)
    step[c] = 1e-5
    slope = (penalty(beta + step) - penalty(beta - step)) / 2e-5
    np.testing.assert_allclose(second.dbeta[c], slope, rtol=1e-6, atol=1e-8)
