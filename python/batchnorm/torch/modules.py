"""``torch.nn``'s batch norms computed by this package: the same signatures, attributes, state and results."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import distributed, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import telling, torch_group
from ..settings import word
from .function import Views, native, normalise, operator
from .model import has_hooks
from .sync import synchronised

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct2d", "BatchNormAddAct2d", "SyncBatchNorm",
    "version",
]  # fmt: skip

version = attrgetter("_version")  # of a tensor: how often it was changed in place
_ACTIVATION = word("relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu", none=True)


class Normalising:
    """What all of them do: PyTorch's forward, by :func:`normalise` where tensors are ordinary ones."""

    activation: str | None = None
    rectified_by: tuple[Any, ...] = ()  # ReLUs that `convert` has found behind it; they leave alone a mark
    training: bool
    track_running_stats: bool
    weight: Any
    bias: Any
    momentum: float | None
    eps: float

    def forward(self, input: Any) -> Any:
        """The output."""
        return self.normalised(input)

    def normalised(self, x: Any, residual: Any = None) -> Any:
        """The output, after the residual and the activation if there are any."""
        here = native(x)
        if isinstance(x, fx.Proxy):  # in a graph it stays a module, whose mode and counter live on
            inputs = (x,) if residual is None else (x, residual)
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), inputs, {})
        if here or isinstance(x, torch.Tensor):
            self._check_input_dim(x)  # type: ignore[attr-defined]
        own = vars(self)
        buffers, parameters = own["_buffers"], own["_parameters"]
        mean, var, updates = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        try:  # not `self.weight`, which takes 10 times as long
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # parametrized, or pruned
            weight, bias = self.weight, self.bias
        factor = 0.0 if self.momentum is None else self.momentum
        counts = self.training and self.track_running_stats and updates is not None
        if self.training and not self.track_running_stats:
            mean = var = None
        elif counts and self.momentum is None:
            factor = 1.0 / (float(updates) + 1.0)
        by_batch = self.training or (mean is None and var is None)
        rectifies = here and self.rectified_by and not any(map(has_hooks, (self, *self.rectified_by)))
        activation = "relu" if rectifies else self.activation
        given = x, weight, bias, mean, var, by_batch, factor, self.eps, activation, residual
        views = own.get("views")
        if views is None and here:
            views = own["views"] = Views()
        if counts:  # first, as in PyTorch: checkpointing may stop it after the update
            updates.add_(1)
        try:
            y = normalise(*given, views) if here else operator(*given)
        except (ValueError, TypeError, RuntimeError, AttributeError):  # what it cannot take changes nothing
            if counts:
                updates.sub_(1)
            raise
        if rectifies and not y.is_inference():
            y.is_rectified = version(y)
        return y


class BatchNorm1d(Normalising, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` computed by this package, on the CPU and, in a build with CUDA, on GPUs.

    Arguments, attributes, ``state_dict`` and results are those of :class:`torch.nn.BatchNorm1d`. Statistics
    are summed in float64, and results do not depend on the number of threads. Tensors of other devices and
    layouts, ``torch.compile``, ``torch.export``, ``torch.func`` and forward-mode derivatives get PyTorch's
    own operator; so does whatever this package refuses, such as a momentum outside [0, 1]. In a graph of
    ``torch.fx`` it stays a module. ``torch.jit.script`` cannot read it: :func:`revert` first.

    Examples
    --------
    >>> import torch, batchnorm.torch
    >>> bn = batchnorm.torch.BatchNorm1d(3)
    >>> bn(torch.randn(8, 3, 5)).shape, bn.num_batches_tracked
    (torch.Size([8, 3, 5]), tensor(1))
    """


class BatchNorm2d(Normalising, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` computed by this package; see :class:`BatchNorm1d`."""


class BatchNorm3d(Normalising, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` computed by this package; see :class:`BatchNorm1d`."""


class BatchNormAct2d(BatchNorm2d):
    """``BatchNorm2d`` and the activation after it in one pass, as ``timm`` names it.

    Parameters
    ----------
    num_features : int
        As for ``torch.nn.BatchNorm2d``, and so are all others.
    activation : {"relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu", None}, default "relu"
        The activation, that of ``torch.nn.functional`` with its own defaults.
    """

    def __init__(
        self, num_features: int, *arguments: Any, activation: str | None = "relu", **named: Any
    ) -> None:
        super().__init__(num_features, *arguments, **named)
        self.activation = _ACTIVATION("activation", activation)

    def extra_repr(self) -> str:
        """Torch's own, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


class BatchNormAddAct2d(BatchNormAct2d):
    """``activation(bn(x) + residual)`` in one pass, the end of a residual block; see :class:`BatchNormAct2d`.

    Between forward and backward it keeps x and a bit per element, where PyTorch keeps x and two outputs.
    """

    def forward(self, input: Any, residual: Any = None) -> Any:
        """The output; without a residual as :class:`BatchNormAct2d`."""
        return self.normalised(input, residual)


class SyncBatchNorm(Normalising, _BatchNorm):
    """``torch.nn.SyncBatchNorm`` on the CPU, over gloo; on GPUs it is PyTorch's own.

    In training with several processes, statistics are those of the batches of all of them, whose parts may be
    of any sizes, also empty. Sums are exchanged in a form in which no rounding depends on how the batch is
    cut. Weight and bias get this process's own gradients, as PyTorch's do. Use
    ``nn.SyncBatchNorm.convert_sync_batchnorm(model)``, then :func:`convert`. It is no subclass of PyTorch's,
    which DistributedDataParallel refuses on the CPU. There is no double backward, as with PyTorch's.

    Parameters
    ----------
    num_features : int
        As for ``torch.nn.SyncBatchNorm``, and so are ``eps``, ``momentum``, ``affine``,
        ``track_running_stats`` and, where that has it, ``bias``.
    process_group : torch.distributed.ProcessGroup, optional
        The processes; all of them if absent.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, process_group: Any = None, device: Any = None, dtype: Any = None,
        **named: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **named)
        self.process_group = process_group

    def _check_input_dim(self, x: Any) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")

    def _check_non_zero_input_channels(self, x: Any) -> None:
        nn.SyncBatchNorm._check_non_zero_input_channels(self, x)

    def forward(self, input: Any) -> Any:
        """The output."""
        x, group = input, self.process_group
        alone = not (self.training and distributed.is_available() and distributed.is_initialized())
        if isinstance(x, fx.Proxy) or alone or distributed.get_world_size(group) == 1:
            return self.normalised(x)
        if not native(x) or x.is_cuda:
            return nn.SyncBatchNorm.forward(self, x)
        processes = torch_group(group)
        with telling(processes):
            self._check_input_dim(x)
            own = next((v for v in (self.weight, self.bias, self.running_mean) if v is not None), None)
            if own is not None and x.shape[1] != len(own):
                raise ValueError(
                    f"x has {x.shape[1]} channels on axis 1, {tuple(x.shape)}, expected {len(own)}"
                )
        mean, var, updates = self.running_mean, self.running_var, self.num_batches_tracked
        factor = 0.0 if self.momentum is None else self.momentum
        tracked = self.track_running_stats and mean is not None
        if tracked and updates is not None and self.momentum is None:
            factor = 1.0 / (float(updates) + 1.0)
        running = (mean, var, factor) if tracked else None
        y = synchronised(x, self.weight, self.bias, running, self.eps, processes)
        if tracked and updates is not None:
            updates.add_(1)
        return y
