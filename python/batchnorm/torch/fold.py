"""A PyTorch model without the batch norms that can be part of the convolution or linear layer before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _hints
from ..fold import fold as folded_weights
from .graph import Call, traced
from .model import STATISTICS, array_of, called, copied, eagerly, has_hooks, hooked, layers_of, unwrapped
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

__all__ = ["fold"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# The axes of a batch that each makes, and those that each takes: only so are channels on axis 1 in both.
_BEFORE: dict[Any, int] = {
    nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5,
    nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5,
}  # fmt: skip
_NORMS: dict[Any, tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,), nn.SyncBatchNorm: (2, 3, 4, 5),
    BatchNorm1d: (2, 3), BatchNorm2d: (4,), BatchNorm3d: (5,), SyncBatchNorm: (2, 3, 4, 5),
}  # fmt: skip
# How far each output of a whole model may be apart, relative to its largest value: in float64, or else what
# layers make of the rounding of their new weights. A wrong layer folded makes about 1.
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
        are folded as well, and each tensor of the whole model's output is compared before and after.

    Returns
    -------
    torch.nn.Module
        A deep copy in eval mode, of the same classes and module paths. Each batch norm that was folded is an
        ``nn.Identity``; weight and bias of the layer before it are new.

    Raises
    ------
    TypeError, ValueError
        No model, no batch norm in it, none that can be folded; NaN or a negative variance in one; weights
        beyond the range of their dtype; an ``example`` on another device, or for which the model's answer
        has nothing to compare.

    Warns
    -----
    UserWarning
        A batch norm behind ``nn.Linear`` was folded without an ``example``. That is right for its inputs
        (N, C), and wrong where it works along the last of more axes.

    See Also
    --------
    batchnorm.fold : The same of arrays.

    Notes
    -----
    Folded are ``nn.BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` behind ``nn.Conv1d`` to ``3d`` and
    ``nn.ConvTranspose1d`` to ``3d`` of as many axes, with any ``groups`` and for inputs with a batch axis,
    and ``nn.BatchNorm1d`` and ``SyncBatchNorm`` behind ``nn.Linear`` for inputs (N, C). Nothing else may use
    that layer's output, and neither may have hooks or a parametrization. That it is so, a trace of the whole
    model by ``torch.fx`` shows, in which each is called once; and a second one with the defaults of arguments
    behind the first, if there are any. A trace does not see what depends on the class of an argument, or on
    what an earlier call has left: pass an ``example`` for such models. With it that is found by running it:
    where a batch norm's input is the very output of such a layer, and no other operation reads that, folding
    is tried, and kept if the model's output stays the same. So a folded model is for the same way of calling.

    Each pair is then run on random input: in float64 the folded layer must agree with the pair within the
    rounding of its new weights. Outputs of the whole model are compared on the example and on random numbers
    like it: floating ones in float64 within 1e-9 of each one's largest value, or, where the model's code
    wants its own dtype, within 1e-3 for float32; others must be equal.

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
    layers_of(plain)  # raises if there is none
    why = "none follows a convolution or nn.Linear, alone and at once"
    evaluated = _evaluated(plain)
    if example is None:
        try:
            found = _agreed(traced(evaluated))
        except ValueError as error:
            found, why = {}, f"{error}; pass example=, a batch, to find out by running it"
    else:
        found = _seen(evaluated, example)
    pairs = {norm: before for norm, before in found.items() if _foldable(plain, norm, before)}
    if example is not None:
        pairs = _proven(plain, pairs, example)
    if not pairs:
        raise ValueError(f"model has no batch norm that can be folded: {why}")
    result = _folded(plain, pairs)
    for norm, before in pairs.items():
        _check_pair(plain, result, norm, before)
    linear = [norm for norm, before in pairs.items() if type(plain.get_submodule(before)) is nn.Linear]
    if linear and example is None:
        what = f"{', '.join(linear)}: folded into nn.Linear, which is right only for its inputs (N, C)"
        _hints.warn(f"{what}; pass example=, a batch, to find out by running it")
    return result


def _evaluated(model: Any) -> Any:
    result = copied(model)
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


def _agreed(traces: list[list[Call]]) -> Pairs:
    """Pairs of a trace that all others have as well, unless they call neither of the two."""
    each = [(_followed(calls), {call.name for call in calls}) for calls in traces]
    pairs = dict.fromkeys(pair for found, _ in each for pair in found.items())
    return {n: b for n, b in pairs if all(f.get(n) == b or not {n, b} & names for f, names in each)}


def _foldable(model: Any, norm: str, before: str) -> bool:
    """Whether these are modules of the known classes, each at one place, and no hook comes between."""
    modules = [model.get_submodule(name) for name in (norm, before)]
    everywhere = [module for _, module in model.named_modules(remove_duplicate=False)]
    once = all(sum(other is module for other in everywhere) == 1 for module in modules)
    plain = not any(has_hooks(module) for module in modules)
    known = _BEFORE.get(type(modules[1])) in _NORMS.get(type(modules[0]), ())
    tracked = known and all(getattr(modules[0], each) is not None for each in STATISTICS)
    return once and plain and tracked


class _Uses(TorchDispatchMode):
    """Which convolution's output goes where: what each batch norm gets, and what else reads such memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, str]] = []  # keeps the tensors alive, so that none is taken for another
        self.fed: dict[str, list[int | None]] = {}  # for each call of a batch norm, the place in `made`
        self.elsewhere: set[str] = set()
        self._inside = False

    def _at(self, tensor: Any) -> list[int]:
        where = tensor.untyped_storage().data_ptr()
        return [i for i, (made, _) in enumerate(self.made) if made.untyped_storage().data_ptr() == where]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            for tensor in _leaves([args, kwargs or {}]):
                self.elsewhere.update(self.made[i][1] for i in self._at(tensor))
        return func(*args, **(kwargs or {}))

    def after(self, name: str) -> Callable[..., None]:
        """A hook of a layer."""
        return lambda module, inputs, output: self.made.append((output, name))

    def entered(self, name: str) -> Callable[..., None]:
        """A hook of a batch norm."""

        def note(module: Any, inputs: tuple[Any, ...], named: Any) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            same = [i for i, (made, _) in enumerate(self.made) if made is x]
            self.fed.setdefault(name, []).append(same[-1] if same else None)
            self._inside = True

        return note

    def left(self, *_: Any) -> None:
        """A hook of a batch norm."""
        self._inside = False


def _seen(model: Any, example: Any) -> Pairs:
    """Pairs in which a batch norm alone takes all that a layer made, with the channels on axis 1."""
    uses, handles = _Uses(), []
    for name, module in model.named_modules():
        if type(module) in _BEFORE:
            handles.append(module.register_forward_hook(uses.after(name)))
        elif type(module) in _NORMS:
            handles.append(module.register_forward_pre_hook(uses.entered(name), with_kwargs=True))
            handles.append(module.register_forward_hook(uses.left))
    with hooked(handles), uses:
        _answers(model, [example])
    found = Pairs()
    for norm, places in uses.fed.items():
        layer = uses.made[places[0]][1] if places[0] is not None else ""
        made = [i for i, (_, name) in enumerate(uses.made) if name == layer]
        dims = _BEFORE.get(type(model.get_submodule(layer)), 0) or 2
        placed = all(uses.made[i][0].dim() == dims for i in made)
        others = [i for name, those in uses.fed.items() if name != norm for i in those]
        alone = layer not in uses.elsewhere and not {*made} & {*others}
        if layer and alone and placed and places == made:
            found[norm] = layer
    return found


# ---- proof -------------------------------------------------------------------------------------------------


def _proven(model: Any, pairs: Pairs, example: Any) -> Pairs:
    """Those pairs after whose folding the model's output is the same."""
    batches = [example, _random_like(example)]
    try:
        model, batches, want = _wide(model, batches)
    except Exception:  # whatever its code does when it meets float64: then in its own dtypes
        want = _answers(_evaluated(model), batches)
    if not any(t.is_floating_point() and t.numel() for t in want):
        raise ValueError("the model's output on example has no floating tensor that could be compared")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def same(pairs: Pairs) -> bool:
        got, tolerance = _answers(_folded(model, pairs), batches), _APART.get(dtype, 0.3)
        return len(got) == len(want) and all(_close(*each, tolerance) for each in zip(got, want, strict=True))

    if same(pairs):
        return pairs
    if not same({}):
        raise ValueError("the model's outputs on example differ each time; is it random in eval mode?")
    good = Pairs()
    for norm, before in pairs.items():
        if same(good | {norm: before}):
            good[norm] = before
    return good


def _wide(model: Any, batches: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    """Model, batches and answers in float64."""
    model = _evaluated(model).double()
    batches = [_mapped(batch, lambda t: t.double()) for batch in batches]
    return model, batches, _answers(model, batches)


def _answers(model: Any, batches: Iterable[Any]) -> list[Any]:
    """All tensors of the model's answers."""
    with torch.no_grad(), torch.random.fork_rng([]), eagerly():
        torch.manual_seed(0)
        return [t for batch in batches for t in _leaves(called(model, batch))]


def _leaves(value: Any, depth: int = 9) -> Iterator[Any]:
    """Tensors in containers and in attributes of objects, such as dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    inside = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple):
        inside = vars(value).values() if hasattr(value, "__dict__") else ()
    for each in inside if depth and not isinstance(value, type | nn.Module) else ():
        yield from _leaves(each, depth - 1)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A batch with `function` applied to its floating tensors."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _mapped(each, function) for key, each in value.items()}
    return [_mapped(each, function) for each in value] if isinstance(value, list | tuple) else value


def _random_like(batch: Any) -> Any:
    g = torch.Generator().manual_seed(0)

    def like(t: Any) -> Any:
        wide = t.double()
        noise = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.device)
        return (wide.mean() + (wide.std(unbiased=False) + 1e-3) * noise).to(t.dtype)

    return _mapped(batch, like)


def _close(got: Any, want: Any, tolerance: float) -> bool:
    if got.shape != want.shape or not want.numel() or not want.is_floating_point():
        return torch.equal(got, want)
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
        padding = (0,) * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
        sizes = zip(layer.kernel_size, layer.dilation, padding, strict=True)
        shape = [2, layer.in_channels, *(max((k - 1) * d, 2 * p) + 3 for k, d, p in sizes)]
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
