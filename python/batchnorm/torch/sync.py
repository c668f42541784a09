"""Batch norm whose statistics are those of all processes of a group, and its gradients: ``group=`` of this
package's functions, for tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..functional import batch_norm_backward, batch_norm_train
from .function import array, tensor_of

__all__ = ["synchronised"]


class _Synchronised(torch.autograd.Function):
    """x, weight, bias; `gamma` and `beta` are these in float64, `bad` the channels that are no numbers."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, vectors: Any, bad: Any, options: Any) -> Any:
        ctx.save_for_backward(x, weight, bias)
        y, ctx.state = batch_norm_train(array(x), *vectors, keep=None, **options)
        options["saved"], ctx.bad = ctx.state, bad
        result = tensor_of(y)
        result[:, bad] = torch.nan
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        g = batch_norm_backward(array(dy), ctx.state, x=array(x), num_threads=torch.get_num_threads())
        dx, dw, db = map(tensor_of, (g.dx, g.dgamma, g.dbeta))
        dx[:, ctx.bad], dw[ctx.bad], db[ctx.bad] = torch.nan, torch.nan, torch.nan
        dw, db = (None if p is None else t.to(p.dtype) for p, t in ((weight, dw), (bias, db)))
        return dx, dw, db, None, None, None


def synchronised(x: Any, weight: Any, bias: Any, running: Any, eps: float, group: Any) -> Any:
    """The output of a training step. `running` is mean, variance and momentum to update, or None."""
    gamma, beta = np.ones(x.shape[1]), np.zeros(x.shape[1])
    for own, parameter in ((gamma, weight), (beta, bias)):
        if parameter is not None:
            own[:] = parameter.detach().double().numpy()
    bad = ~(np.isfinite(gamma) & np.isfinite(beta))
    gamma, beta = np.where(bad, 1, gamma), np.where(bad, 0, beta)
    options = {"eps": eps, "group": group, "num_threads": torch.get_num_threads()}
    x = x if x.is_contiguous() else x.contiguous(memory_format=torch.preserve_format)
    y = _Synchronised.apply(x, weight, bias, (gamma, beta), torch.from_numpy(bad), options)
    saved: Any = options["saved"]
    if running is not None and (count := saved.count.max()) > 1:
        with torch.no_grad():
            new = saved.mean, saved.var * (count / (count - 1))
            for old, values in zip(running[:2], new, strict=True):
                old.copy_(old.double() * (1 - running[2]) + torch.from_numpy(values.copy()) * running[2])
    return y
