"""Padded speech with batch renormalisation; and masks that are read by rank, not by size."""

import numpy as np
from batchnorm import BatchNorm, batch_norm_train

rng = np.random.default_rng(0)
x, dy = rng.normal(size=(2, 6, 40, 50)).astype(np.float32)
lengths = np.array([50, 31, 20, 44, 9, 50])
x[1, :, 31:] = 1e3
bn = BatchNorm(40, renorm={"rmax": 3.0, "dmax": 5.0}, activation="relu")
for _ in range(2):
    y = bn(x, lengths=lengths)
    dx = bn.backward(dy)
assert (y[1, :, 31:] == 0).all() and (dx[1, :, 31:] == 0).all() and abs(bn.running_mean).max() < 1
valid = np.arange(50) < lengths[:, None]  # (N, T), what Keras' masks look like
saved = batch_norm_train(x, mask=valid).saved
assert (np.broadcast_to(saved.count, 40) == lengths.sum()).all()
# Here T == C == 40: it is (N, T) all the same, never (N, C).
saved = batch_norm_train(x[:, :, :40], mask=valid[:, :40]).saved
assert (np.broadcast_to(saved.count, 40) == np.minimum(lengths, 40).sum()).all()
