"""Workers: a tree of Moments, and functions that pickle."""

import functools
import operator
import pickle

import numpy as np
from batchnorm import Moments, batch_norm, batch_norm_backward, batch_norm_train, update_running

blocks = np.random.default_rng(0).normal(size=(6, 4, 3, 5))
m = functools.reduce(operator.add, [Moments().update(block) for block in blocks])
f = pickle.loads(pickle.dumps(functools.partial(batch_norm, mean=m.mean, var=m.var)))
assert f(blocks[0]).shape == (4, 3, 5)
for operation in (batch_norm, batch_norm_train, batch_norm_backward, update_running):
    assert pickle.loads(pickle.dumps(operation)) is operation
