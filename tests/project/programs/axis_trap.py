"""NumPy's habit, axes to reduce, is refused with both translations; so are NumPy's other words."""

import numpy as np
from batchnorm import batch_norm_train, moments

rows = np.random.default_rng(0).normal(size=(6, 3))
x = np.random.default_rng(0).normal(size=(8, 3, 5, 5))
calls = {
    "channel_axis": (
        lambda: moments(rows, axis=0),
        lambda: moments(x, axis=(0, 2, 3)),
        lambda: moments(x, channel_axis=(0, 2, 3)),
        lambda: batch_norm_train(rows, axes=0),
    ),
    "mask": (
        lambda: batch_norm_train(x, where=x > 0),
        lambda: batch_norm_train(x, mask=np.ones((5, 5), bool)),
        lambda: batch_norm_train(np.ma.masked_less(x, 0)),
    ),
}
for words, wrong in calls.items():
    for call in wrong:
        try:
            call()
        except (TypeError, ValueError) as error:
            assert words in str(error), error
        else:
            raise SystemExit("silent")
