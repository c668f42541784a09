"""A layer pickled between forward and backward, and a Saved that is not pickled at all."""

import copy
import pickle

import numpy as np
from batchnorm import BatchNorm, batch_norm_train

x = np.random.default_rng(0).normal(size=(8, 3, 5))
bn = BatchNorm(3)
y = bn(x)
other = pickle.loads(pickle.dumps(bn))
try:
    other.backward(y)
except RuntimeError as error:
    assert "forward" in str(error) or "call" in str(error)
else:
    raise SystemExit("a copy went back through another layer's forward")
bn.backward(y)
_, saved = batch_norm_train(x)
assert copy.deepcopy(saved) is saved and copy.copy(saved) is saved
try:
    pickle.dumps(saved)
except TypeError as error:
    assert "pickle" in str(error)
else:
    raise SystemExit("a Saved was pickled")
