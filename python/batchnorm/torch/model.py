"""A PyTorch model as a diagnosis and a recalibration see it: its batch norms by module path, run on batches
so that afterwards everything is as it was.

While batches run, all modules are in eval mode. A batch norm whose buffers are taken away then normalises by
the batch, as PyTorch defines it, and has nothing that it could update. So no forward is replaced: subclasses
that add an activation work as they are.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook

from ..diagnose.findings import Words
from ..diagnose.network import Collector
from ..running import RunningStatistics
from ..settings import Settings, kind
from ..typing import Array

__all__ = ["Layer", "array_of", "layers_of", "passed", "quiet", "unwrapped"]

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
STATISTICS = ("running_mean", "running_var")
_RECALIBRATE = "batchnorm.torch.recalibrate(model, batches)"


# ---- finding the layers ------------------------------------------------------------------------------------


def unwrapped(model: Any) -> Any:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {kind(model)}, expected a torch.nn.Module")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    inner = dict(model.named_children()).get("_orig_mod")
    return model if inner is None else unwrapped(inner)


def copied(model: Any) -> Any:
    """A deep copy."""
    try:
        return copy.deepcopy(model)
    except Exception as error:  # such as of a tensor with a graph
        remedy = "detach() or delete what its forward keeps, such as activations"
        raise ValueError(f"model, {kind(model)}, cannot be copied: {error}; {remedy}") from error


def layers_of(model: Any) -> dict[str, Any]:
    """The batch norms of an unwrapped model by their module path, in its order."""
    found = {name or "model": m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not found:
        expected = "expected nn.BatchNorm1d, 2d, 3d, SyncBatchNorm or a subclass among its modules"
        raise ValueError(f"model, {kind(model)}, has no batch norm; {expected}")
    for name, module in found.items():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(f"{name} is lazy and does not know its channels; run the model on a batch first")
    return found


# ---- a layer as diagnose/ looks at it ----------------------------------------------------------------------


class Layer:
    """What ``batchnorm.diagnose`` wants to know of a layer, read from a torch module; it changes nothing."""

    words = Words(
        recalibrate=_RECALIBRATE,
        average="momentum={new:g}",
        longer="use momentum={new:g} or more for so many updates",
        unbiased="use momentum=None, the average of all batches",
        short="momentum weighs the batch in PyTorch, the old value in Keras: use momentum={new:g}",
        broken="the output in eval mode is no number",
        keep_out="",
        assign="fill running_mean and running_var",
        initial="",
        unfreeze="Call train() on it and train",
        calls="Check that the model calls it in eval mode (auxiliary heads often run in training alone)",
        renorm=", or nn.SyncBatchNorm over several processes",
        own="give this data statistics of its own: recalibrate a copy.deepcopy(model) on it",
    )

    def __init__(self, name: str, module: Any, training: bool = False) -> None:
        self.name: str | None = name
        self.frozen, self.momentum = training and not module.training, module.momentum
        decay = None if self.momentum is None else round(1 - self.momentum, 12)
        decay = decay if decay is None or 0 <= decay <= 1 else None
        mean, var, updates = module.running_mean, module.running_var, module.num_batches_tracked
        self.tracked = mean is not None and var is not None
        self.settings = Settings(
            decay=decay, eps=module.eps, allow_initial_statistics=not self.tracked
        )  # without statistics there are none to call initial
        self.dtype = np.dtype(np.float64 if self.tracked and mean.dtype == torch.float64 else np.float32)
        self.running = RunningStatistics()
        if not self.tracked:
            return
        own_mean, own_var = (array_of(values).astype(self.dtype) for values in (mean, var))
        self.running.allocate(own_mean, own_var, False)
        count = 0 if updates is None else int(updates)
        weight = 0.0 if decay is None or self.momentum == 0 else decay**count
        if count:
            self.running.restore(num_updates=count, initial_weight=weight)
        elif not self.running.untouched().all():  # a state without its counter
            self.running.mark_assigned(*STATISTICS)


def array_of(tensor: Any) -> Array:
    """A tensor of any device as an array: its own memory on the CPU, a copy elsewhere and of bfloat16."""
    tensor = tensor.detach()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)
    return array


# ---- running it --------------------------------------------------------------------------------------------


def eagerly() -> Any:
    """A context in which nothing compiled runs; it spares the compiler's import where nothing is compiled."""
    there = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if there else contextlib.nullcontext()


@contextlib.contextmanager
def quiet(model: Any, layers: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the model is in eval mode, its batch norms normalise by the batch, nothing is compiled and
    nothing has a gradient. Afterwards modes, buffers and random numbers are those of before."""
    modes = [(module, module.training) for module in model.modules()]
    guards = (module.register_forward_pre_hook(_in_eval_mode(name)) for name, module in layers.items())
    own = [(m, name, getattr(m, name)) for m in layers.values() for name in STATISTICS]
    buffers = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False)]
    values = [(b, b.clone(), _version(b)) for _, _, b in buffers]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad(), eagerly(), hooked(guards):
        try:
            for module, _ in modes:
                module.training = False
            for module, name, _ in own:
                setattr(module, name, None)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, buffer in buffers:
                setattr(module, name, buffer)
            for buffer, before, version in values:
                if not _same(buffer, before, version):
                    buffer.copy_(before)


def _in_eval_mode(name: str) -> Callable[..., None]:
    """A hook: in training mode a layer would normalise by the batch, and dropout before it would be on."""

    def check(module: Any, inputs: Any) -> None:
        if module.training:
            got = f"{name} is in training mode while batches run, expected eval mode"
            raise ValueError(f"{got}; do not call train() in forward= or in the model's own forward")

    return check


def _version(tensor: Any) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _same(buffer: Any, before: Any, version: int | None) -> bool:
    """Whether a buffer has the values of before, NaN or not; or was not changed, if none can be compared."""
    try:
        if torch.equal(buffer, before):
            return True
        return bool(((buffer == before) | ((buffer != buffer) & (before != before))).all())
    except Exception:  # sparse, nested, meta, or of anybody's class
        return _version(buffer) == version


def has_hooks(module: Any) -> bool:
    """Whether something looks at what enters or leaves a module, or at the gradients of that."""
    return any(vars(module)[each] for each in _HOOKS) or _has_any_global_hook()


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Inside, these hooks are there."""
    found: list[Any] = []
    try:
        found.extend(handles)
        yield
    finally:
        for handle in found:
            handle.remove()


def collecting(layers: Mapping[str, Any], collectors: Mapping[str, Collector]) -> Any:
    """A context in which what reaches the modules is collected."""

    def watch(name: str, module: Any) -> Any:
        def before(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            if x.dim() < 2:
                got = f"{name}: a batch has shape {tuple(x.shape)} there"
                raise ValueError(f"{got}, expected (N, C) or (N, C, ...); batches are a list, such as [x]")
            if x.numel() == x.shape[1] and module.running_mean is None:
                got = f"{name}: a batch has shape {tuple(x.shape)} there, one value per channel"
                raise ValueError(f"{got}, expected at least 2; use larger batches")
            collectors[name](array_of(x))()

        return module.register_forward_pre_hook(before, with_kwargs=True)

    return hooked(watch(name, module) for name, module in layers.items() if name in collectors)


def check(batches: Any) -> None:
    """Raise unless it can be gone through, batch by batch."""
    single = isinstance(batches, torch.Tensor | np.ndarray | Mapping | str | bytes)
    if single or not isinstance(batches, Iterable):
        raise TypeError(f"batches is {kind(batches)}, expected an iterable of batches, such as [x]")


def passed(
    model: Any, batches: Any, forward: Callable[[Any], Any] | None = None, least: int = 1
) -> Iterator[int]:
    """Run the model on each batch; yields after each, and raises if there are fewer than `least`."""
    if forward is not None and not callable(forward):
        raise TypeError(f"forward is {kind(forward)}, expected a function of one batch, or None")
    count = 0
    for count, batch in enumerate(batches, 1):
        if forward is None:
            try:
                called(model, batch)
            except TypeError as error:
                raise TypeError(f"{error}; pass forward= if the model is called in another way") from error
        else:
            forward(batch)
        yield count
    if count < least:
        why = "an iterator that was gone through before is empty: pass a list or a DataLoader"
        raise ValueError(f"batches is empty, expected at least one batch; {why}")


def _check_device(model: Any, batch: Any) -> None:
    """Raise if the model is on one device, and what it gets of a batch on another."""
    places = {p.device for p in model.parameters()}
    for tensor in _tensors(batch):
        if len(places) == 1 and tensor.device not in places:
            got = f"a batch has a tensor on {tensor.device}, the model is on {places.pop()}"
            raise ValueError(f"{got}; move one of them, model.to({str(tensor.device)!r})")


def called(model: Any, batch: Any) -> Any:
    """The model's answer to a batch: by keywords to a mapping, to the first of a tuple or list."""
    _check_device(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def _tensors(batch: Any) -> list[Any]:
    """Those that `called` gives to the model."""
    first = list(batch.values()) if isinstance(batch, Mapping) else batch
    first = first if isinstance(first, list | tuple) else [first]
    return [t for t in (first if isinstance(batch, Mapping) else first[:1]) if isinstance(t, torch.Tensor)]
