"""Batch normalization for NumPy: functions on arrays, and a layer that holds their state.

- ``BatchNorm``: the layer; parameters, running statistics, train and eval, backward, save and load
- ``batch_norm_train``: normalise with the batch's own statistics, update running ones: ``y, saved``
- ``batch_norm_backward``, ``batch_norm_double_backward``: gradients, from ``saved``
- ``batch_norm``: normalise with given statistics (inference)
- ``moments``, ``Moments``, ``dataset_moments``: mean and variance, also of more data than fits memory
- ``normalize_images``: image preprocessing, uint8 pixels to float planes in one pass
- ``update_running``, ``effective_decay``: moving averages by themselves
- ``fold``: a normalisation into the weights before it
- ``diagnose``, ``recalibrate``, ``no_update``, ``freeze``: for all layers of a network at once
- ``show_config``, ``set_num_threads``, ``set_isa``: this build, threads, instruction set
- ``cache_info``, ``set_cache_limit``, ``empty_cache``: the memory kept warm for results
- ``get_cmake_dir``, ``get_include``: the C++ library inside this package
- ``batchnorm.typing``: names for annotations

>>> import numpy as np, batchnorm
>>> x = np.random.default_rng(0).normal(size=(8, 64, 32, 32)).astype(np.float32)
>>> y, saved = batchnorm.batch_norm_train(x)
>>> dx = batchnorm.batch_norm_backward(np.ones_like(y), saved).dx
>>> bn = batchnorm.BatchNorm(64)
>>> bn(x).shape, dx.shape
((8, 64, 32, 32), (8, 64, 32, 32))
"""

import os as _os
import threading as _threading

# isort: off
from ._openmp import _core  # first: it decides how OpenMP waits

# isort: on
from ._version import __version__
from .dataset import DatasetMoments, dataset_moments
from .diagnose import Compared, Diagnosis, Finding, History, diagnose, freeze, no_update, recalibrate
from .fold import fold
from .functional import (
    DoubleGradients,
    Gradients,
    Saved,
    TrainResult,
    batch_norm,
    batch_norm_backward,
    batch_norm_double_backward,
    batch_norm_train,
)
from .images import normalize_images
from .layer import BatchNorm
from .moments import MeanVar, Moments, moments
from .parameter import Parameter, weight_decay_groups
from .running import ColdStatisticsWarning, effective_decay, update_running
from .runtime import (
    CacheInfo,
    cache_info,
    config,
    empty_cache,
    get_cmake_dir,
    get_include,
    get_isa,
    get_num_threads,
    isa_levels,
    set_cache_limit,
    set_isa,
    set_num_threads,
    show_config,
)

__all__ = [
    "BatchNorm",
    "CacheInfo",
    "ColdStatisticsWarning",
    "Compared",
    "DatasetMoments",
    "Diagnosis",
    "DoubleGradients",
    "Finding",
    "Gradients",
    "History",
    "MeanVar",
    "Moments",
    "Parameter",
    "Saved",
    "TrainResult",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_train",
    "cache_info",
    "config",
    "dataset_moments",
    "diagnose",
    "effective_decay",
    "empty_cache",
    "fold",
    "freeze",
    "get_cmake_dir",
    "get_include",
    "get_isa",
    "get_num_threads",
    "isa_levels",
    "moments",
    "no_update",
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
