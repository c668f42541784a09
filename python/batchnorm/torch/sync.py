"""Batch norm whose statistics are those of all processes of a group, and its gradients.

Each process's sums travel as those of a `Moments`, which is merged without rounding. So all have the same
statistics to the last bit. The sums of the gradients travel in float64 and are added in the order of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import distributed

from ..functional import batch_norm, batch_norm_backward, batch_norm_train
from ..moments import Moments
from ..typing import Vector
from .function import array, tensor_of

__all__ = ["synchronised"]

_HEADER = 5  # of `Moments.to_array` with one channel axis; of an empty one all there is


def _gathered(values: Vector, group: Any) -> Any:
    """Arrays of one length from every process, a row each."""
    mine = torch.tensor(values)  # not NumPy's memory, which a thread of gloo may free at exit
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, mine, group=group)
    return np.stack([part.numpy() for part in parts])


def _total(x: Any, group: Any) -> Moments:
    """The moments of the whole batch, the same bits on every process."""
    mine = Moments().update(array(x)).to_array()
    padded = np.zeros(_HEADER + 9 * x.shape[1])
    padded[: mine.size] = mine
    rows = _gathered(padded, group)
    return Moments.merged(Moments.from_array(row if row[1] else row[:_HEADER]) for row in rows)


class _Synchronised(torch.autograd.Function):
    """x, weight, bias; `gamma` and `beta` are these in float64, `bad` the channels that are no numbers."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, options: Any, numbers: Any, group: Any) -> Any:
        gamma, beta, count, bad = numbers
        threads = torch.get_num_threads()
        y, ctx.state = batch_norm_train(array(x), gamma, beta, keep=None, num_threads=threads, **options)
        ctx.save_for_backward(x, weight, bias)
        ctx.rest = options, gamma, count, bad, group
        result = tensor_of(y)
        result[:, bad] = torch.nan
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        options, gamma, count, bad, group = ctx.rest
        values, threads = array(x), torch.get_num_threads()
        g = batch_norm_backward(array(dy), ctx.state, x=values, num_threads=threads)
        sum_g, sum_gx = _gathered(np.concatenate([g.dbeta, g.dgamma]), group).sum(axis=0).reshape(2, -1)
        # What reaches x through the statistics is affine in x_hat, as a batch norm is.
        scale = gamma * ctx.state.inv_std / count
        affine = np.stack([-scale * sum_gx, -scale * sum_g])
        lost = ~np.isfinite(affine).all(axis=0)
        affine[:, lost], bad = 0, bad | torch.from_numpy(lost)
        dx = batch_norm(
            values, gamma=affine[0], beta=affine[1], residual=g.dx, num_threads=threads, **options
        )
        made = tensor_of(dx), tensor_of(g.dgamma), tensor_of(g.dbeta)
        for gradient in made:
            gradient[(..., bad) if gradient.dim() == 1 else (slice(None), bad)] = torch.nan
        dw, db = (None if p is None else t.to(p.dtype) for p, t in zip((weight, bias), made[1:], strict=True))
        return made[0], dw, db, None, None, None


def synchronised(x: Any, weight: Any, bias: Any, running: Any, eps: float, group: Any) -> Any:
    """The output of a training step. `running` is mean, variance and momentum to update, or None."""
    total = _total(x, group)
    if total.channels is None:
        return x.clone()  # nobody has any values
    count = float(total.counts.max())
    if count < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {count:.0f} in all processes"
        )
    mean, var = total.mean, total.var
    if running is not None:
        with torch.no_grad():
            for old, new in zip(running[:2], (mean, var * (count / (count - 1))), strict=True):
                wide = old.double() * (1 - running[2]) + torch.from_numpy(new) * running[2]
                old.copy_(wide)
    gamma, beta = np.ones_like(mean), np.zeros_like(mean)
    for own, parameter in ((gamma, weight), (beta, bias)):
        if parameter is not None:
            own[:] = parameter.detach().double().numpy()
    bad = ~(np.isfinite(mean) & np.isfinite(var) & np.isfinite(gamma) & np.isfinite(beta))
    mean, var, gamma, beta = (np.where(bad, 1.0, values) for values in (mean, var, gamma, beta))
    options = {"mean": mean, "var": var, "eps": eps}
    x = x if x.is_contiguous() else x.contiguous(memory_format=torch.preserve_format)
    return _Synchronised.apply(x, weight, bias, options, (gamma, beta, count, torch.from_numpy(bad)), group)
