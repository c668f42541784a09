"""Ghost batches: parts of 4, 4 and 2; a last part of one sample joins; shapes follow from the option."""

import numpy as np
from batchnorm import batch_norm_train

rng = np.random.default_rng(0)
x = rng.normal(size=(10, 3, 5)).astype(np.float32)
y, saved = batch_norm_train(x, virtual_batch_size=4)
assert saved.mean.shape == (3, 3) and saved.count[:, 0].tolist() == [20, 20, 10]
rows = rng.normal(size=(9, 3)).astype(np.float32)
assert batch_norm_train(rows, virtual_batch_size=4).saved.mean.shape == (2, 3)  # 4 and 5
assert batch_norm_train(rows, virtual_batch_size=64).saved.mean.shape == (1, 3)
