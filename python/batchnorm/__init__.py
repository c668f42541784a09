"""Batch normalization for NumPy: functions on arrays, and a layer that holds their state.

- ``BatchNorm``: the layer; parameters, running statistics, train and eval, backward, save and load
- ``batch_norm_train``: normalise with the batch's own statistics, update running ones
- ``batch_norm``: normalise with given statistics (inference)
- ``batch_norm_backward``: gradients of either
- ``batch_renorm_train``, ``batch_renorm_backward``: batch renormalisation
- ``batch_norm_train_saving``, ``batch_norm_backward_from_output``: training that keeps y and not x
- ``ghost_batch_norm_train``, ``ghost_batch_norm_backward``: statistics of parts of the batch
- ``normalize_images``: image preprocessing, uint8 pixels to float planes in one pass
- ``moments``, ``update_running``: the parts
- ``Moments``, ``dataset_moments``: mean and variance of more data than fits memory
- ``show_config``, ``set_num_threads``, ``set_isa``: this build, threads, instruction set
- ``cache_info``, ``set_cache_limit``, ``empty_cache``: the memory kept warm for results
- ``get_cmake_dir``, ``get_include``: the C++ library inside this package

>>> import numpy as np, batchnorm
>>> bn = batchnorm.BatchNorm(64)
>>> bn(np.ones((8, 64, 32, 32), np.float32)).shape
(8, 64, 32, 32)
"""

import os as _os
import threading as _threading

# isort: off
from ._openmp import _core  # first: it decides how OpenMP waits

# isort: on
from ._diagnosis import Diagnosis, Finding
from ._double_backward import DoubleGradients, batch_norm_double_backward
from ._forward import ColdStatisticsWarning
from ._from_output import (
    SavedForBackward,
    SavingTrainResult,
    batch_norm_backward_from_output,
    batch_norm_train_saving,
)
from ._functional import (
    Gradients,
    MeanVar,
    ResidualGradients,
    ResidualTrainResult,
    TrainResult,
    activation_mask_bytes,
    batch_norm,
    batch_norm_backward,
    batch_norm_train,
    moments,
)
from ._ghost import ghost_batch_norm_backward, ghost_batch_norm_train
from ._history import History
from ._images import normalize_images
from ._info import (
    config,
    get_cmake_dir,
    get_include,
    get_isa,
    get_num_threads,
    isa_levels,
    set_isa,
    set_num_threads,
    show_config,
)
from ._layer import BatchNorm
from ._memory import CacheInfo, cache_info, empty_cache, set_cache_limit
from ._moments import DatasetMoments, Moments, dataset_moments
from ._parameter import Parameter, weight_decay_groups
from ._recalibrate import recalibrate
from ._renorm import RenormTrainResult, batch_renorm_backward, batch_renorm_train
from ._running import effective_decay, update_running
from ._version import __version__

__all__ = [
    "BatchNorm",
    "CacheInfo",
    "ColdStatisticsWarning",
    "DatasetMoments",
    "Diagnosis",
    "DoubleGradients",
    "Finding",
    "Gradients",
    "History",
    "MeanVar",
    "Moments",
    "Parameter",
    "RenormTrainResult",
    "ResidualGradients",
    "ResidualTrainResult",
    "SavedForBackward",
    "SavingTrainResult",
    "TrainResult",
    "__version__",
    "activation_mask_bytes",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_from_output",
    "batch_norm_double_backward",
    "batch_norm_train",
    "batch_norm_train_saving",
    "batch_renorm_backward",
    "batch_renorm_train",
    "cache_info",
    "config",
    "dataset_moments",
    "effective_decay",
    "empty_cache",
    "get_cmake_dir",
    "get_include",
    "get_isa",
    "get_num_threads",
    "ghost_batch_norm_backward",
    "ghost_batch_norm_train",
    "isa_levels",
    "moments",
    "normalize_images",
    "recalibrate",
    "set_cache_limit",
    "set_isa",
    "set_num_threads",
    "show_config",
    "update_running",
    "weight_decay_groups",
]

# Long calls look for Ctrl-C on the main thread, which in the child of a fork is the one that forked.
_core.set_main_thread(_threading.main_thread().ident or 0)
if hasattr(_os, "register_at_fork"):
    _os.register_at_fork(after_in_child=lambda: _core.set_main_thread(_threading.get_ident()))

# A BATCHNORM_ISA, BATCHNORM_TUNING or BATCHNORM_CACHE_LIMIT of no use fails here, not in the middle of
# somebody's program.
_core.isa()
_core.cache_info()
