"""A table with NaN: each column has its own count, and one with a single value stops nothing."""

import numpy as np
from batchnorm import batch_norm_backward, batch_norm_train

rng = np.random.default_rng(0)
table = rng.normal([1, 50, 1e3], [1, 5, 10], size=(64, 3))
table[rng.random(table.shape) < 0.2] = np.nan
table[:, 2] = np.nan
table[5, 2] = 7.0
mean, var = np.zeros(3), np.ones(3)
y, saved = batch_norm_train(table, mask=~np.isnan(table), running_mean=mean, running_var=var)
dx = batch_norm_backward(np.ones_like(table), saved).dx
assert np.isfinite(y).all() and np.isfinite(dx).all() and saved.count[2] == 1
assert y[5, 2] == 0 and mean[2] == 0 and var[2] == 1
