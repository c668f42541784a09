"""For PyTorch models: find out why one tests badly, mend its statistics, fold its batch norms.

- ``diagnose``: what is wrong with the batch norms of any model, nothing converted
- ``recalibrate``: their running statistics replaced by those of data, exactly
- ``fold``: a copy for inference without batch norms, proven on random input
- ``BatchNorm1d``, ``2d``, ``3d``, ``BatchNormAct2d``, ``BatchNormAddAct2d``, ``SyncBatchNorm``: modules of
  ``torch.nn`` computed by this package; ``convert`` and ``revert`` for whole models

Needs PyTorch: ``pip install "batchnorm[torch]"``.

>>> import torch, batchnorm.torch
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
>>> batchnorm.torch.diagnose(model, [torch.randn(64, 3)]).codes
('never_updated',)
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(f'batchnorm.torch needs PyTorch: pip install "batchnorm[torch]" ({error})') from error

from .convert import convert, revert
from .diagnose import diagnose
from .fold import fold
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct2d, BatchNormAddAct2d, SyncBatchNorm
from .recalibrate import recalibrate

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct2d", "BatchNormAddAct2d", "SyncBatchNorm",
    "convert", "diagnose", "fold", "recalibrate", "revert",
]  # fmt: skip
