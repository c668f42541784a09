"""A Siamese network: one layer, two inputs, gradients that add up, and an error where that was not said."""

import numpy as np
from batchnorm import BatchNorm, batch_norm_backward, batch_norm_train

xa, xb, da, db = np.random.default_rng(0).normal(size=(4, 8, 3, 5)).astype(np.float32)
bn = BatchNorm(3)
ya, sa = bn(xa, return_saved=True)
yb, sb = bn(xb, return_saved=True)
dxb = bn.backward(db, sb)
try:
    bn.backward(da, sa)
except RuntimeError as error:
    assert "accumulate" in str(error)
else:
    raise SystemExit("a gradient was lost silently")
dxa = bn.backward(da, sa, accumulate=True)
want = sum(
    batch_norm_backward(d, batch_norm_train(x, bn.gamma, bn.beta).saved).dgamma
    for x, d in ((xa, da), (xb, db))
)
np.testing.assert_allclose(bn.dgamma, want, atol=1e-5)
ya, sa = bn(xa, return_saved=True)
bn.backward(da, sa)  # the next step overwrites without being asked
