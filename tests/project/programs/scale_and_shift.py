"""What a frozen batch norm does, as a factor and a summand per channel."""

import numpy as np
from batchnorm import BatchNorm

x = np.random.default_rng(0).normal(3, 2, size=(50, 8))
bn = BatchNorm(8, dtype=np.float64).recalibrate([x]).eval()
scale, shift = bn.scale_shift()
np.testing.assert_allclose(x * scale + shift, bn(x), atol=1e-12)
