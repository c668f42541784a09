"""This library, by its public functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .protocol import DECAY, EPS, Case, Work, empty, inputs


class Peer:
    """batch_norm_train, batch_norm_backward, batch_norm."""

    def __init__(self, threads: int) -> None:
        import batchnorm

        batchnorm.set_num_threads(threads)
        self._bn: Any = batchnorm
        self.version = f"{batchnorm.__version__} ({batchnorm.get_isa()})"

    def prepare(self, case: Case) -> Work:
        bn = self._bn
        given = inputs(case)
        act: dict[str, Any] = {"channel_axis": case.axis, "activation": "relu" if case.relu else None}
        add = {"residual": given.residual} if case.residual else {}
        into = {"out": empty(case)} if case.outputs == "reused" else {}
        x, gamma, beta = given.x, given.gamma, given.beta
        mean, var = given.mean, given.var

        if case.op == "inference":

            def infer() -> Any:
                return bn.batch_norm(x, mean, var, gamma, beta, eps=EPS, **act, **add, **into)

            return Work(infer, lambda: [infer()])
        if case.op == "forward":

            def train() -> Any:
                return bn.batch_norm_train(
                    x, gamma, beta, running_mean=mean, running_var=var, decay=DECAY, eps=EPS,
                    **act, **add, **into,
                )  # fmt: skip

            return Work(train, lambda: [train().y])

        saved = bn.batch_norm_train(x, gamma, beta, eps=EPS, **act, **add).saved  # y is not kept
        if case.residual and into:
            into["out_residual"] = empty(case)
        dy = given.dy

        def back() -> Any:
            return bn.batch_norm_backward(dy, saved, **into)

        def results() -> list[np.ndarray[Any, Any]]:
            got = back()
            return [got.dx, got.dgamma, got.dbeta] + ([got.dresidual] if case.residual else [])

        return Work(back, results)
