"""Models whose batch norms compute by this package, and back: the same modules, parameters and paths."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..settings import kind
from .graph import traced
from .model import has_hooks, layers_of, unwrapped
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

__all__ = ["convert", "revert"]

_OURS = {
    nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}  # fmt: skip
_THEIRS: dict[Any, Any] = {ours: theirs for theirs, ours in _OURS.items()}


class ReLU(nn.ReLU):
    """``nn.ReLU`` that leaves alone what a batch norm before it has rectified already.

    It looks at each tensor: a rectified one bears a mark. So one module may follow batch norms and other
    things, and if a mark is lost the result is the same, as relu(relu(x)) is relu(x).
    """

    def forward(self, x: Any) -> Any:
        """The output."""
        ordinary = type(x) is torch.Tensor and not torch.compiler.is_compiling()
        return x if ordinary and getattr(x, "is_rectified", False) else super().forward(x)


_THEIRS[ReLU] = nn.ReLU


def convert(model: Any) -> Any:
    """Let a model's batch norms compute by this package, and the ReLU after one with it.

    Parameters
    ----------
    model : torch.nn.Module
        Its ``nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` change their class, in place; subclasses
        of them stay. Parameters, buffers, hooks, paths and ``state_dict`` stay as they are, so optimizers do,
        too.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError, ValueError
        No model, or none of these in it.

    Notes
    -----
    Where ``torch.fx`` shows that a batch norm's output goes to an ``nn.ReLU`` alone, both become one pass,
    which keeps x and a bit per element for backward. ``functional.relu`` is not found. A residual between the
    two is fused by :class:`BatchNormAddAct2d`, which a model has to be written with.

    Examples
    --------
    >>> import torch, batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> type(batchnorm.torch.convert(model)[1])
    <class 'batchnorm.torch.modules.BatchNorm2d'>
    >>> type(batchnorm.torch.revert(model)[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    plain = unwrapped(model)
    found = {name: m for name, m in layers_of(plain).items() if type(m) in _OURS}
    if not found:
        expected = "expected nn.BatchNorm1d, 2d, 3d or SyncBatchNorm, not subclasses"
        raise ValueError(f"model, {kind(model)}, has no batch norm to convert; {expected}")
    fused = _rectified(plain, found) if any(type(m) is nn.ReLU for m in plain.modules()) else set()
    for name, module in found.items():
        module.__class__ = _OURS[type(module)]
        if name in fused:
            module.rectifies = True
    if fused:
        for module in plain.modules():
            if type(module) is nn.ReLU:
                module.__class__ = ReLU
    return model


def _rectified(model: Any, norms: dict[str, Any]) -> set[str]:
    """Those batch norms of which every output goes to a ReLU alone."""
    takers: dict[str, list[str | None]] = {}
    for name, taker in traced(copy.deepcopy(model))[0]:
        takers.setdefault(name, []).append(taker)

    def is_relu(taker: str | None) -> bool:
        return taker is not None and type(model.get_submodule(taker)) is nn.ReLU

    sync = nn.SyncBatchNorm
    return {
        name
        for name, module in norms.items()
        if takers.get(name) and all(map(is_relu, takers[name])) and not has_hooks(module)
        if type(module) is not sync
    }


def revert(model: Any) -> Any:
    """Undo :func:`convert`: the modules are ``torch.nn``'s again.

    Parameters
    ----------
    model : torch.nn.Module
        A model, converted or not. :class:`BatchNormAct2d` and :class:`BatchNormAddAct2d` stay, since
        ``torch.nn`` has nothing in their place.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        No model.
    """
    for module in unwrapped(model).modules():
        if type(module) in _THEIRS:
            module.__class__ = _THEIRS[type(module)]
            for name in ("rectifies", "views"):
                vars(module).pop(name, None)
    return model
