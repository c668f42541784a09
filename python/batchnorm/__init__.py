"""Batch normalization for NumPy: functions on arrays, and a layer that holds their state.

>>> import numpy as np, batchnorm
>>> bn = batchnorm.BatchNorm(64)
>>> bn(np.ones((8, 64, 32, 32), np.float32)).shape
(8, 64, 32, 32)
"""

# isort: off
from ._openmp import _core  # first: it decides how OpenMP waits

# isort: on
from ._functional import (
    Gradients,
    MeanVar,
    TrainResult,
    batch_norm,
    batch_norm_backward,
    batch_norm_train,
    moments,
    update_running,
)
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
from ._layer import BatchNorm, Parameter
from ._version import __version__

__all__ = [
    "BatchNorm",
    "Gradients",
    "MeanVar",
    "Parameter",
    "TrainResult",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_train",
    "config",
    "get_cmake_dir",
    "get_include",
    "get_isa",
    "get_num_threads",
    "isa_levels",
    "moments",
    "set_isa",
    "set_num_threads",
    "show_config",
    "update_running",
]

# A BATCHNORM_ISA that names no usable level fails here, not in the middle of somebody's program.
_core.isa()
