"""In place, forward and backward; and the two ways to lose x, which backward notices."""

from typing import Any

import numpy as np
from batchnorm import batch_norm_backward, batch_norm_train

rng = np.random.default_rng(0)
x0, dy0 = rng.normal(size=(2, 8, 4, 6))
gamma, beta = rng.normal(size=(2, 4))
leaky: dict[str, Any] = {"activation": "leaky_relu", "slope": 0.1}
want = batch_norm_backward(dy0, batch_norm_train(x0, gamma, beta, **leaky).saved)
x, dy = x0.copy(), dy0.copy()
y, saved = batch_norm_train(x, gamma, beta, **leaky, keep="y", out=x)
dx, dgamma, dbeta = batch_norm_backward(dy, saved, out=dy)
assert y is x and dx is dy
np.testing.assert_allclose(dx, want.dx, atol=1e-12)
np.testing.assert_allclose(dgamma, want.dgamma, atol=1e-12)

x = x0.copy()
_, lost = batch_norm_train(x, gamma, beta, out=x)
y, changed = batch_norm_train(x0, gamma, beta, keep="y")
y += 1.0
for saved, words in ((lost, "keep="), (changed, "overwritten")):
    try:
        batch_norm_backward(dy, saved)
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise SystemExit("a gradient of something else")
