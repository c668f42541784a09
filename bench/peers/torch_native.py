"""PyTorch: native_batch_norm and native_batch_norm_backward with out=, or the calls that users write."""

from __future__ import annotations

from typing import Any

import numpy as np

from .protocol import DECAY, EPS, Case, Work, empty, inputs


class Peer:
    """torch on the CPU."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch: Any = torch
        self.version = torch.__version__

    def _tensor(self, case: Case, a: Any) -> Any:
        """The array's memory as a tensor whose channels are axis 1; channels_last if they come last."""
        torch = self._torch
        t = torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if case.dtype == "bfloat16" else None
        t = torch.from_numpy(a) if t is None else t
        if case.axis == 1:
            return t
        if t.dim() == 3:
            t = t.unsqueeze(2)  # channels_last exists for 4 and 5 axes; with 3 torch would copy
        return t.movedim(-1, 1)

    def prepare(self, case: Case) -> Work:
        given = inputs(case)
        tensors = {
            name: None if a is None else self._tensor(case, a)
            for name, a in (("x", given.x), ("dy", given.dy), ("z", given.residual))
        }
        tensors["y"] = self._tensor(case, empty(case))
        channel = [self._torch.from_numpy(a) for a in (given.gamma, given.beta, given.mean, given.var)]
        make = self._backward if case.op == "backward" else self._forward
        return make(case, tensors, *channel)

    def _array(self, case: Case, t: Any) -> Any:
        """Back to an array in the case's layout."""
        t = t.movedim(1, -1) if case.axis != 1 else t
        return t.float().numpy() if case.dtype == "bfloat16" else t.numpy()

    def _forward(self, case: Case, t: dict[str, Any], gamma: Any, beta: Any, mean: Any, var: Any) -> Work:
        torch, x, z, y = self._torch, t["x"], t["z"], t["y"]
        training = case.op == "forward"
        saved = torch.empty_like(gamma), torch.empty_like(gamma)
        into = torch.ops.aten.native_batch_norm.out
        functional = torch.nn.functional.batch_norm

        def activate(out: Any) -> Any:
            if z is not None:
                out += z
            return torch.relu_(out) if case.relu else out

        def reused() -> Any:
            into(
                x, gamma, beta, mean, var, training, 1 - DECAY, EPS,
                out=y, save_mean=saved[0], save_invstd=saved[1],
            )  # fmt: skip
            return activate(y)

        def returned() -> Any:
            return activate(functional(x, mean, var, gamma, beta, training, 1 - DECAY, EPS))

        call = reused if case.outputs == "reused" else returned
        return Work(call, lambda: [self._array(case, call())])

    def _backward(self, case: Case, t: dict[str, Any], gamma: Any, beta: Any, mean: Any, var: Any) -> Work:
        torch, x, z, dy, y = self._torch, t["x"], t["z"], t["dy"], t["y"]
        aten = torch.ops.aten
        _, saved_mean, saved_inv_std = aten.native_batch_norm.out(
            x, gamma, beta, mean, var, True, 1 - DECAY, EPS,
            out=y, save_mean=torch.empty_like(gamma), save_invstd=torch.empty_like(gamma),
        )  # fmt: skip
        if z is not None:
            y += z
        outs = {"out1": torch.empty_like(gamma), "out2": torch.empty_like(gamma)}
        outs["out0"] = self._tensor(case, empty(case))
        masked = self._tensor(case, empty(case)) if case.relu else None
        tail = (x, gamma, mean, var, saved_mean, saved_inv_std, True, EPS, [True, True, True])

        def reused() -> Any:
            g = aten.threshold_backward.grad_input(dy, y, 0, grad_input=masked) if case.relu else dy
            return *aten.native_batch_norm_backward.out(g, *tail, **outs), g

        def returned() -> Any:
            g = aten.threshold_backward(dy, y, 0) if case.relu else dy
            return *aten.native_batch_norm_backward(g, *tail), g

        call = reused if case.outputs == "reused" else returned

        def results() -> list[Any]:
            dx, dgamma, dbeta, g = call()
            dz = [self._array(case, g)] if case.residual else []
            return [self._array(case, dx), dgamma.numpy(), dbeta.numpy(), *dz]

        return Work(call, results)
