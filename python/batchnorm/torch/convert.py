"""Models whose batch norms compute by this package, and back: the same modules, parameters and paths."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from ..settings import flag, kind
from .graph import traced
from .model import copied, layers_of, unwrapped
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, version

__all__ = ["convert", "revert"]

_OURS = {
    nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}  # fmt: skip
_THEIRS: dict[Any, Any] = {ours: theirs for theirs, ours in _OURS.items()}


class ReLU(nn.ReLU):
    """``nn.ReLU`` that leaves alone what a batch norm before it has rectified already.

    It looks at each tensor: a rectified one bears the version that it had then. So one module may follow
    batch norms and other things, and if a mark is lost the result is the same, as relu(relu(x)) is relu(x).
    """

    def forward(self, input: Any) -> Any:
        """The output."""
        ordinary = type(input) is torch.Tensor and not torch.compiler.is_compiling()
        rectified = getattr(input, "is_rectified", None) if ordinary else None
        return input if rectified is not None and rectified == version(input) else super().forward(input)


_THEIRS[ReLU] = nn.ReLU


def convert(model: Any, fuse: bool = False) -> Any:
    """Let a model's batch norms compute by this package and, if you want it, the ReLU after one with it.

    Parameters
    ----------
    model : torch.nn.Module
        Its ``nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` change their class, in place; subclasses
        of them stay, and so do converted ones. Parameters, buffers, hooks, paths and ``state_dict`` stay as
        they are, so optimizers do, too.
    fuse : bool, default False
        Where ``torch.fx`` shows that a batch norm's output goes to an ``nn.ReLU`` alone, in training and in
        eval mode, both become one pass, which keeps x and a bit per element for backward. A fused model is
        used as a whole: :func:`revert` it before you take it apart or change it.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError, ValueError
        No model, or none of these in it; a model to fuse that ``torch.fx`` cannot trace.

    Notes
    -----
    A fused batch norm's own output is rectified: a part of the model, such as ``model[:2]``, and an extractor
    of features would give that. While it or its ReLU has a hook, each computes by itself.
    ``functional.relu`` is not found. A residual between the two is fused by :class:`BatchNormAddAct2d`, which
    a model has to be written with.

    Examples
    --------
    >>> import torch, batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> type(batchnorm.torch.convert(model, fuse=True)[1])
    <class 'batchnorm.torch.modules.BatchNorm2d'>
    >>> type(batchnorm.torch.revert(model)[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    plain = unwrapped(model)
    found = {name: m for name, m in layers_of(plain).items() if type(m) in _OURS or type(m) in _THEIRS}
    if not found:
        expected = "expected nn.BatchNorm1d, 2d, 3d or SyncBatchNorm, not subclasses"
        raise ValueError(f"model, {kind(model)}, has no batch norm to convert; {expected}")
    fused = _rectified(plain, found) if flag("fuse", fuse) else {}
    for name, module in found.items():
        module.__class__ = _OURS.get(type(module), type(module))
        module.rectified_by = fused.get(name, ())
        for relu in module.rectified_by:
            relu.__class__ = ReLU
    return model


def _rectified(model: Any, norms: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Those batch norms of which every output goes to a ReLU alone, in both modes; and these ReLUs."""
    takers: dict[str, set[str | None]] = {}
    for mode in (True, False):
        try:
            traces = traced(revert(copied(model)).train(mode))
        except ValueError as error:
            raise ValueError(f"{error}; pass fuse=False") from error
        for name, taker in chain.from_iterable(traces):
            takers.setdefault(name, set()).add(taker)
    found = {
        name: tuple(taker and model.get_submodule(taker) for taker in takers.get(name, {None}))
        for name, module in norms.items()
        if type(module) not in (nn.SyncBatchNorm, SyncBatchNorm)
    }
    return {name: those for name, those in found.items() if all(type(m) in (nn.ReLU, ReLU) for m in those)}


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
            for name in ("rectified_by", "views"):
                vars(module).pop(name, None)
    return model
