"""PyTorch's tensors of arrays, and what modules make of them."""

from __future__ import annotations

from typing import Any

import batchnorm.torch as modules
import numpy as np
import torch

from .problem import BFLOAT16


def send(values: Any, device: str = "cpu") -> Any:
    """A tensor with the strides of an array."""
    if values.dtype == BFLOAT16:
        return send(values.view(np.int16), device).view(torch.bfloat16)
    strides = [stride // values.itemsize for stride in values.strides]
    held = torch.from_numpy(np.array(values))
    return torch.empty_strided(values.shape, strides, dtype=held.dtype, device=device).copy_(held)


def fetch(tensor: Any) -> Any:
    """An array of a tensor's values."""
    tensor = tensor.cpu()
    return (
        tensor.view(torch.int16).numpy().view(BFLOAT16) if tensor.dtype is torch.bfloat16 else tensor.numpy()
    )


def steps(module: Any, x: Any, dy: Any, residual: Any) -> list[Any]:
    """Two steps of training, one of testing: outputs, gradients, buffers."""
    made = []
    for training in (True, True, False):
        module.train(training)
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        given = leaves if isinstance(module, modules.BatchNormAddAct2d) else leaves[:1]
        y = module(*given)
        y.backward(dy)
        made += [y.detach(), *(t.grad for t in given)]
    return [*made, *(p.grad for p in module.parameters()), *module.buffers()]
