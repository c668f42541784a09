"""For Keras 3 models: find out why one tests badly, mend its statistics, fold its batch norms.

- ``diagnose``: what is wrong with the batch norms of any model
- ``recalibrate``: their moving statistics replaced by those of data, exactly
- ``fold``: a clone for inference without batch norms, compared before it returns

Needs Keras 3 and one of its backends: ``pip install "batchnorm[keras]"``.

>>> import numpy as np, keras, batchnorm.keras
>>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
>>> batchnorm.keras.diagnose(model, [np.ones((64, 3), np.float32)]).codes
('never_updated', 'constant_channels')
"""

from __future__ import annotations

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    raise ImportError(f'batchnorm.keras needs Keras 3: pip install "batchnorm[keras]" ({error})') from error

from .fold import fold
from .statistics import diagnose, recalibrate

__all__ = ["diagnose", "fold", "recalibrate"]
