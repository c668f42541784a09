"""Fine-tuning with frozen statistics: a layer, the functions, and a gradient in eval mode."""

import numpy as np
from batchnorm import BatchNorm, batch_norm_backward, batch_norm_train

x, dy = np.random.default_rng(0).normal(size=(2, 8, 3, 5)).astype(np.float32)
bn = BatchNorm(3, zero_debias=True)
bn(x * 2 + 1)
bn.freeze()
before = bn.running_mean.copy()
y = bn.train()(x)
dx = bn.backward(dy)
assert np.array_equal(bn.running_mean, before)
y2, saved = batch_norm_train(x, bn.gamma, bn.beta, mean=bn.running_mean, var=bn.running_var)
np.testing.assert_array_equal(dx, batch_norm_backward(dy, saved).dx)
other = BatchNorm(3).recalibrate([x])
y, saved = other.eval()(x, return_saved=True)
other.backward(dy, saved)
