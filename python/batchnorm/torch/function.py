"""Batch norm of PyTorch tensors by this package's functions, on the CPU with gradients of both orders, and on
GPUs in a build that serves them.

Tensors are not copied: their memory is what the functions read and write. What the functions refuse, such as
a NaN in gamma or a momentum outside [0, 1], PyTorch's own operator does, or raises its own error.
"""

from __future__ import annotations

from itertools import product
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._C import _functorch, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad

from .._arrays import gpu_extension
from ..functional import batch_norm, batch_norm_backward, batch_norm_double_backward, batch_norm_train
from ..typing import Array

__all__ = ["Views", "array", "native", "normalise", "operator", "tensor_of", "vector"]

try:
    import ml_dtypes

    _BFLOAT16: Any = np.dtype(ml_dtypes.bfloat16)
except ImportError:  # then PyTorch's own operator does it
    _BFLOAT16 = None

_WIDE = torch.float32, torch.float64
_NARROW = (torch.float16,) if _BFLOAT16 is None else (torch.float16, torch.bfloat16)
_TENSORS = torch.Tensor, nn.Parameter
_extension: Any = gpu_extension()
_DEVICES = ("cpu", "cuda") if _extension and _extension.runtime() != "rehearsal" else ("cpu",)
_on_gpu = attrgetter("is_cuda")  # those that the functions take as they are
_SMOOTH = "silu", "sigmoid", "tanh"
_GRADIENTS = "dx", "dgamma", "dbeta", "dresidual"
# What to compute by which of x, weight, bias and residual want a gradient.
_NEEDS: dict[Any, Any] = {
    wanted: tuple(name for name, on in zip(_GRADIENTS, wanted, strict=True) if on)
    for wanted in product((False, True), repeat=4)
}

_is_compiling = torch.compiler.is_compiling
_peek, _levels = _functorch.peek_interpreter_stack, vars(forward_ad)
_modes = _len_torch_dispatch_stack  # such as one that records operators


def native(x: Any) -> bool:
    """Whether x is an ordinary tensor of a device that is served, outside of compilers, tracers, function
    transforms and dispatch modes."""
    return (
        type(x) in _TENSORS
        and (x.dtype in _WIDE or x.dtype in _NARROW)
        and x.layout is torch.strided
        and x.device.type in _DEVICES
        and not (_is_compiling() or _is_tracing() or _modes())
        and _peek() is None
        and _levels["_current_level"] < 0
    )


# ---- tensors and arrays ------------------------------------------------------------------------------------


def array(tensor: Any) -> Array:
    """A tensor's own memory; on a GPU the tensor."""
    if _functorch.is_legacy_batchedtensor(tensor):
        got = "a batch of gradients reaches a batch norm of batchnorm.torch, expected one at a time"
        raise RuntimeError(f"{got}; pass vectorize=False or is_grads_batched=False, or revert(model)")
    if _on_gpu(tensor):
        return tensor.detach()
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy(force=True)
        return bits.view(_BFLOAT16)
    return tensor.numpy(force=True)


def vector(tensor: Any) -> Any:
    """One value per channel: its memory, or, of 16 bits, float32 copies."""
    if tensor is None:
        return None
    wide = tensor if tensor.dtype in _WIDE else tensor.float()
    return wide.detach() if _on_gpu(wide) else wide.numpy(force=True)


class Views:
    """A module's parameters and buffers as arrays, made once: as long as an array is there, no other tensor
    can have its address."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, int, Any, Any]] = {}

    def __call__(self, name: str, tensor: Any) -> Any:
        if tensor is None or tensor.dtype not in _WIDE or _on_gpu(tensor) or not tensor.is_contiguous():
            return vector(tensor)
        address, size, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype
        held = self._held.get(name)
        if held is None or held[0] != address or held[1] != size or held[2] is not dtype:
            held = self._held[name] = address, size, dtype, vector(tensor)
        return held[3]

    def __reduce__(self) -> Any:
        return Views, ()  # copies of the module have other tensors


def tensor_of(values: Any, like: Any = None) -> Any:
    """The array's own memory as a tensor, or of the dtype of another one."""
    if values is None:
        return None
    on_gpu = isinstance(values, torch.Tensor)
    if not on_gpu and values.dtype == _BFLOAT16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    tensor = values if on_gpu else torch.from_numpy(values)
    return tensor if like is None or tensor.dtype is like.dtype else tensor.to(like.dtype)


def _in_order(x: Any) -> Any:
    """x as PyTorch's operator would have it, contiguous or channels last."""
    if x.is_contiguous():
        return x
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x if last is not None and x.is_contiguous(memory_format=last) else x.contiguous()


# ---- autograd ----------------------------------------------------------------------------------------------


class _Normalise(torch.autograd.Function):
    """x, gamma, beta, residual; the rest has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, residual: Any, vectors: Any, options: Any) -> Any:
        if residual is not None:
            options["residual"] = array(residual)
        y, ctx.state = batch_norm_train(array(x), *vectors, keep=None, **options)
        if residual is not None and options.get("activation") in _SMOOTH:
            ctx.save_for_backward(x, weight, bias, residual)
        else:
            ctx.save_for_backward(x, weight, bias)
        return tensor_of(y)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            residual = saved[3] if len(saved) > 3 else None
            given = (dy, *saved[:3], residual, ctx.state, ctx.needs_input_grad)
            return *_Gradients.apply(*given), None, None
        dx, dw, db, dr = _gradients(dy, *saved, state=ctx.state, wanted=ctx.needs_input_grad)
        return dx, dw, db, dr, None, None


_apply = super(torch.autograd.Function, _Normalise).apply  # its own looks for what `native` has looked for


def _any_grad(*tensors: Any) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _gradients(
    dy: Any, x: Any, weight: Any, bias: Any, residual: Any = None, *, state: Any, wanted: tuple[bool, ...]
) -> tuple[Any, Any, Any, Any]:
    """Tensors of those gradients that are wanted."""
    needs, threads = _NEEDS[wanted[:4]], torch.get_num_threads()
    if residual is not None:
        residual = array(residual)
    g = batch_norm_backward(array(dy), state, x=array(x), residual=residual, needs=needs, num_threads=threads)
    dx, dgamma, dbeta = g
    return tensor_of(dx), tensor_of(dgamma, weight), tensor_of(dbeta, bias), tensor_of(g.dresidual)


class _Gradients(torch.autograd.Function):
    """The backward pass as an operation that has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, dy: Any, x: Any, weight: Any, bias: Any, residual: Any, state: Any, wanted: Any
    ) -> Any:
        ctx.save_for_backward(dy, x, weight, bias, residual)
        ctx.state = state
        ctx.set_materialize_grads(False)
        return _gradients(dy, x, weight, bias, residual, state=state, wanted=wanted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, ddx: Any, ddw: Any, ddb: Any, ddr: Any) -> Any:
        dy, x, weight, bias, residual = ctx.saved_tensors
        if ddx is None and ddw is None and ddb is None and ddr is None:
            return (None,) * 7
        if _on_gpu(dy):
            got = "batchnorm.torch has no gradients of gradients on a GPU"
            raise RuntimeError(f"{got}; revert(model) for PyTorch's own, or move it to the CPU")
        given: dict[str, Any] = {"ddx": ddx, "ddresidual": ddr, "residual": residual}
        given = {name: array(t) for name, t in given.items() if t is not None}
        given |= {n: vector(t) for n, t in (("ddgamma", ddw), ("ddbeta", ddb)) if t is not None}
        g = batch_norm_double_backward(array(dy), ctx.state, x=array(x), **given)
        dw = None if weight is None else tensor_of(g.dgamma, weight)
        db = None if bias is None else tensor_of(g.dbeta, bias)
        return (
            tensor_of(g.ddy),
            tensor_of(g.dx),
            dw,
            db,
            None if residual is None else tensor_of(g.dresidual),
            None,
            None,
        )


# ---- the operator ------------------------------------------------------------------------------------------


def operator(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, by_batch: bool, momentum: float, eps: float,
    activation: str | None = None, residual: Any = None,
) -> Any:  # fmt: skip
    """PyTorch's own operator, and what is fused with it here."""
    y = nn.functional.batch_norm(x, mean, var, weight, bias, by_batch, momentum, eps)
    y = y if residual is None else y + residual
    return y if activation is None else getattr(nn.functional, activation)(y)


def _suits(x: Any, weight: Any, bias: Any, mean: Any, var: Any, residual: Any) -> bool:
    """Whether there are values, and PyTorch takes these dtypes together: x's, or of 16 bits also float32."""
    dtype = x.dtype
    for t in (weight, mean, bias, var):
        if t is not None and t.dtype is not dtype and (dtype in _WIDE or t.dtype is not torch.float32):
            return False
    if residual is None:
        return bool(x.numel())
    alike = residual.dtype is dtype and residual.shape == x.shape and native(residual)
    return alike and bool(x.numel())


def normalise(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, by_batch: bool, momentum: float, eps: float,
    activation: str | None = None, residual: Any = None, views: Any = lambda name, tensor: vector(tensor),
) -> Any:  # fmt: skip
    """As ``torch.nn.functional.batch_norm``, by this package's functions where they can."""
    given = x, weight, bias, mean, var, by_batch, momentum, eps, activation, residual
    if not (_suits(x, weight, bias, mean, var, residual) and eps > 0 and 0 <= momentum <= 1):
        return operator(*given)
    if not x.is_contiguous():
        x = _in_order(x)
    options: dict[str, Any] = {"eps": eps, "num_threads": torch.get_num_threads()}
    if activation is not None:
        options["activation"] = activation
    tracked = mean is not None
    if tracked and by_batch:
        statistics = views("mean", mean), views("var", var)
        options["running_mean"], options["running_var"] = statistics
        options["decay"] = 1 - momentum
    elif tracked:
        options["mean"], options["var"] = views("mean", mean), views("var", var)
    vectors = views("weight", weight), views("bias", bias)
    try:
        if torch.is_grad_enabled() and (x.requires_grad or _any_grad(weight, bias, residual)):
            y = _apply(x, weight, bias, residual, vectors, options)
        else:
            y = _without_gradients(x, vectors, residual, by_batch, options)
    except (ValueError, TypeError):  # nothing has been changed
        return operator(*given)
    if tracked and by_batch:
        if mean.dtype in _WIDE:
            torch.autograd.graph.increment_version(mean)
            torch.autograd.graph.increment_version(var)
        else:
            mean.copy_(tensor_of(statistics[0]))
            var.copy_(tensor_of(statistics[1]))
    return y


def _without_gradients(x: Any, vectors: Any, residual: Any, by_batch: bool, options: Any) -> Any:
    if residual is not None:
        options["residual"] = array(residual)
    if by_batch:
        return tensor_of(batch_norm_train(array(x), *vectors, keep=None, **options)[0])
    mean, var = options.pop("mean"), options.pop("var")
    return tensor_of(batch_norm(array(x), mean, var, *vectors, **options))
