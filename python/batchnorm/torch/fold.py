"""A PyTorch model without the batch norms that can be part of the convolution or linear layer before them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import _hints
from ..fold import fold as folded_weights
from .graph import Call, traced
from .model import (
    STATISTICS,
    array_of,
    called,
    check_device,
    eagerly,
    has_hooks,
    hooked,
    layers_of,
    unwrapped,
)
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

__all__ = ["fold"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BEFORE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
_THEIRS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (*_THEIRS, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
# How far the outputs of a whole model may be apart, relative to the largest: what its layers make of the
# rounding of their new weights. A wrong layer folded makes about 1.
_APART = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
# Roundings of a folded layer's output, in units of its dtype times the sum of magnitudes that it adds up: one
# of weight and bias, and in float64 a few more.
_ROUNDINGS = 8

Pairs = dict[str, str]  # batch norm: the layer before it


def fold(model: Any, example: Any = None) -> Any:
    """A copy of a model for inference, with batch norms folded into the layers before them.

    Parameters
    ----------
    model : torch.nn.Module
        Any model, in any mode. Not changed.
    example : optional
        A batch, as :func:`batchnorm.torch.diagnose` takes it. With it, models that ``torch.fx`` cannot trace
        are folded as well, and the whole model's output is compared before and after.

    Returns
    -------
    torch.nn.Module
        A deep copy in eval mode, of the same classes and module paths. Each batch norm that was folded is an
        ``nn.Identity``; weight and bias of the layer before it are new.

    Raises
    ------
    TypeError, ValueError
        No model, no batch norm in it, none that can be folded; NaN or a negative variance in one; weights
        beyond the range of their dtype; an ``example`` on another device.

    Warns
    -----
    UserWarning
        Parts of the model cannot be traced, so batch norms in them were left as they are for want of an
        ``example``.

    See Also
    --------
    batchnorm.fold : The same of arrays.

    Notes
    -----
    Folded are ``nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` behind ``nn.Conv1d`` to ``3d``,
    ``nn.ConvTranspose1d`` to ``3d`` with any ``groups``, and ``nn.Linear`` for inputs (N, C), if nothing else
    uses that layer's output and neither is used twice, has hooks or a parametrization. That it is so, a trace
    by ``torch.fx`` shows: of the whole model or, where it cannot be traced, of its parts. With an ``example``
    the rest is found by running it: where a batch norm's input is the very output of such a layer, folding is
    tried, and kept if the model's output stays the same.

    Each pair is then run on random input: in float64 the folded layer must agree with the pair within the
    rounding of its new weights. Outputs of the whole model are compared on the example and on random numbers
    like it.

    Examples
    --------
    >>> import torch, batchnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> batchnorm.torch.fold(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    plain = unwrapped(model)
    norms = layers_of(plain)
    calls, shown = traced(_evaluated(plain))
    pairs = {n: before for n, before in _followed(calls).items() if _foldable(plain, n, before)}
    if example is not None:
        check_device(plain, example)
        found = _seen(_evaluated(plain), example)
        pairs = _proven(plain, {n: b for n, b in found.items() if _foldable(plain, n, b)} | pairs, example)
    result = _folded(plain, pairs)
    for norm, before in pairs.items():
        _check_pair(plain, result, norm, before)
    unknown = [name for name in norms if name not in shown and norms[name] is not plain]
    unknown = unknown if example is None else []
    untraced = f"{', '.join(unknown)}: torch.fx cannot trace what they are in"
    remedy = "pass example=, a batch, to find out by running it"
    if not pairs:
        why = (
            f"{untraced}; {remedy}"
            if unknown
            else "none follows a convolution or nn.Linear, alone and at once"
        )
        raise ValueError(f"model has no batch norm that can be folded: {why}")
    if unknown:
        _hints.warn(f"not folded: {untraced}; {remedy}")
    return result


def _evaluated(model: Any) -> Any:
    result = copy.deepcopy(model)
    for module in result.modules():
        module.training = False
    return result


def _folded(model: Any, pairs: Pairs) -> Any:
    result = _evaluated(model)
    for norm, before in pairs.items():
        _fold_pair(result, norm, before)
    return result


# ---- which pairs there are ---------------------------------------------------------------------------------


def _followed(calls: list[Call]) -> Pairs:
    """Modules that alone take what another makes, of those that are called once."""
    names = [call.name for call in calls]
    once = [call for call in calls if call.taker and names.count(call.name) == names.count(call.taker) == 1]
    return {str(call.taker): call.name for call in once}


def _foldable(model: Any, norm: str, before: str) -> bool:
    """Whether these are modules of the known classes, each at one place, and no hook comes between."""
    modules = [model.get_submodule(name) for name in (norm, before)]
    everywhere = [module for _, module in model.named_modules(remove_duplicate=False)]
    once = all(sum(other is module for other in everywhere) == 1 for module in modules)
    plain = not any(has_hooks(module) for module in modules)
    known = type(modules[0]) in _NORMS and type(modules[1]) in _BEFORE
    tracked = known and all(getattr(modules[0], each) is not None for each in STATISTICS)
    return once and plain and tracked


def _seen(model: Any, example: Any) -> Pairs:
    """Pairs in which a batch norm's input is the very tensor that a layer made, in every call."""
    made: list[tuple[Any, str]] = []  # keeps the tensors alive, so that none is taken for another
    found: dict[str, set[str]] = {}

    def after(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: made.append((output, name))

    def before(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Any, ...]) -> None:
            whose = [each for tensor, each in made if inputs and tensor is inputs[0]]
            found.setdefault(name, set()).add(whose[-1] if whose else "")

        return note

    handles = []
    for name, module in model.named_modules():
        if type(module) in _BEFORE:
            handles.append(module.register_forward_hook(after(name)))
        elif type(module) in _NORMS:
            handles.append(module.register_forward_pre_hook(before(name)))
    with hooked(handles):
        _answers(model, [example])
    once = {name: whose.pop() for name, whose in found.items() if len(whose) == 1}
    return {norm: layer for norm, layer in once.items() if layer and [*once.values()].count(layer) == 1}


# ---- proof -------------------------------------------------------------------------------------------------


def _proven(model: Any, pairs: Pairs, example: Any) -> Pairs:
    """Those pairs after whose folding the model's output is the same."""
    batches = [example, _random_like(example)]
    want, wide = _wide_answers(model, batches)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def same(pairs: Pairs) -> bool:
        tried = _folded(model, pairs)
        got = _answers(tried.double(), [_doubled(b) for b in batches]) if wide else _answers(tried, batches)
        return [*map(_close, got, want, repeat(_APART.get(dtype, 0.3)))] == [True] * len(want)

    if same(pairs):
        return pairs
    if not same({}):
        raise ValueError("the model's outputs on example differ each time; is it random in eval mode?")
    good = Pairs()
    for norm, before in pairs.items():
        if same(good | {norm: before}):
            good[norm] = before
    return good


def _wide_answers(model: Any, batches: list[Any]) -> tuple[list[Any], bool]:
    """The model's answers in float64, or, if it has numbers of other dtypes in its code, in its own."""
    try:
        return _answers(_evaluated(model).double(), [_doubled(batch) for batch in batches]), True
    except RuntimeError:
        return _answers(_evaluated(model), batches), False


def _answers(model: Any, batches: Iterable[Any]) -> list[Any]:
    """All floating tensors of the model's answers."""
    with torch.no_grad(), torch.random.fork_rng([]), eagerly():
        torch.manual_seed(0)
        found = [t for batch in batches for t in _leaves(called(model, batch))]
    return [t for t in found if t.is_floating_point()]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(each)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A batch with `function` applied to its floating tensors."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _mapped(each, function) for key, each in value.items()}
    return [_mapped(each, function) for each in value] if isinstance(value, list | tuple) else value


def _doubled(batch: Any) -> Any:
    return _mapped(batch, lambda t: t.double())


def _random_like(batch: Any) -> Any:
    g = torch.Generator().manual_seed(0)

    def like(t: Any) -> Any:
        wide = t.double()
        noise = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.device)
        return (wide.mean() + (wide.std(unbiased=False) + 1e-3) * noise).to(t.dtype)

    return _mapped(batch, like)


def _close(got: Any, want: Any, tolerance: float) -> bool:
    if got.shape != want.shape or not want.numel():
        return got.shape == want.shape
    apart = (got.double() - want.double()).abs().max()
    return bool(apart <= tolerance * want.double().abs().max())


# ---- folding -----------------------------------------------------------------------------------------------


def _fold_pair(model: Any, norm: str, before: str) -> None:
    """Give the layer its new weights, and put an Identity in the batch norm's place."""
    bn, layer = model.get_submodule(norm), model.get_submodule(before)
    transposed = isinstance(layer, _TRANSPOSED)
    given = (layer.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    vectors: list[Any] = [None if t is None else array_of(t) for t in given]
    vectors = [v if v is None or v.dtype == np.float64 else v.astype(np.float32) for v in vectors]
    where: Any = {"out_axis": int(transposed), "groups": layer.groups if transposed else 1}
    try:
        weight, bias = folded_weights(array_of(layer.weight), *vectors, eps=bn.eps, **where)
    except ValueError as error:
        raise ValueError(f"{norm}, behind {before}: {error}") from error
    learns = layer.weight.requires_grad
    for name, value in (("weight", weight), ("bias", bias)):
        tensor = torch.from_numpy(value).to(layer.weight)
        setattr(layer, name, nn.Parameter(tensor, requires_grad=learns))
    parent, _, name = norm.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())


def _check_pair(model: Any, result: Any, norm: str, before: str) -> None:
    """Raise unless the folded layer does what the pair does, on random input."""
    layer, bn, new = (
        _evaluated(each).double().cpu()
        for each in (model.get_submodule(before), model.get_submodule(norm), result.get_submodule(before))
    )
    dtype = result.get_submodule(before).weight.dtype
    g = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape = [8, layer.in_features]
    else:
        sizes = zip(layer.kernel_size, layer.dilation, strict=True)
        shape = [2, layer.in_channels, *((k - 1) * d + 3 for k, d in sizes)]
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    eps = bn.eps
    with torch.no_grad():
        numbers = [bn.running_mean, bn.running_var, bn.weight, bn.bias]
        want, got = nn.functional.batch_norm(layer(x), *numbers, eps=eps), new(x)
        for parameter in [*new.parameters(), *layer.parameters()]:
            parameter.abs_()
        numbers = [n if n is None else n.abs() for n in numbers]
        # What is added up, without cancellation: by the new layer, whose weights are rounded, and here.
        added = nn.functional.batch_norm(layer(x.abs()), -numbers[0], *numbers[1:], eps=eps)
        bound = torch.finfo(dtype).eps * new(x.abs()) + torch.finfo(torch.float64).eps * added
    bad = (got - want).abs() > _ROUNDINGS * bound
    if bad.any() or not want.isfinite().all():
        at = int(bad.any(0).flatten(1).any(1).nonzero()[0]) if bad.dim() > 2 and bad.any() else 0
        raise ValueError(f"{norm}, behind {before}: folding changes the output, first in channel {at}")
