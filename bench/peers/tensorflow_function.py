"""TensorFlow: its fused kernels inside tf.function. "Reused" rests on a heap that keeps its memory."""

from __future__ import annotations

import os
from typing import Any

from .protocol import DECAY, EPS, Case, Unsupported, Work, inputs


class Peer:
    """tensorflow-cpu; wants an interpreter of its own (run.py --python tensorflow=...)."""

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self._tf: Any = tf
        self.version = tf.__version__

    def prepare(self, case: Case) -> Work:
        tf = self._tf
        if case.dtype == "float64":
            raise Unsupported("TensorFlow's fused batch norm has no float64")
        if case.axis == 1 and case.inner > 1:
            raise Unsupported("TensorFlow's fused batch norm on CPUs is NHWC alone")
        given = inputs(case)
        data = {
            name: None if a is None else tf.constant(a.reshape(1, case.outer, 1, case.channels))
            for name, a in (("x", given.x), ("dy", given.dy), ("z", given.residual))
        }
        channel = [tf.constant(a) for a in (given.gamma, given.beta, given.mean, given.var)]
        make = self._backward if case.op == "backward" else self._forward
        return make(case, data, *channel)

    def _forward(self, case: Case, data: dict[str, Any], gamma: Any, beta: Any, mean: Any, var: Any) -> Work:
        tf, x, z = self._tf, data["x"], data["z"]
        training = case.op == "forward"

        @tf.function
        def normalise(x: Any, z: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
            y, *statistics = tf.raw_ops.FusedBatchNormV3(
                x=x, scale=gamma, offset=beta, mean=mean, variance=var, epsilon=EPS,
                exponential_avg_factor=1 - DECAY if training else 1.0, data_format="NHWC",
                is_training=training,
            )  # fmt: skip
            y = y if z is None else y + z
            return tf.nn.relu(y) if case.relu else y, statistics

        # Traced once: otherwise every call looks for the trace that fits its arguments.
        arguments = (x, z, gamma, beta, mean, var)
        traced = normalise.get_concrete_function(*arguments)
        tensors = [a for a in arguments if a is not None]

        def call() -> Any:
            return traced(*tensors)

        return Work(call, lambda: [call()[0].numpy()])

    def _backward(self, case: Case, data: dict[str, Any], gamma: Any, beta: Any, mean: Any, var: Any) -> Work:
        tf, x, z, dy = self._tf, data["x"], data["z"], data["dy"]
        forward = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=gamma, offset=beta, mean=mean, variance=var, epsilon=EPS,
            exponential_avg_factor=1 - DECAY, data_format="NHWC", is_training=True,
        )  # fmt: skip
        y = forward.y if z is None else forward.y + z
        y = tf.nn.relu(y) if case.relu else None
        reserved = forward[3:6]
        del forward

        @tf.function
        def gradients(dy: Any, x: Any, y: Any, gamma: Any, reserved: Any) -> Any:
            g = dy if y is None else tf.raw_ops.ReluGrad(gradients=dy, features=y)
            dx, dgamma, dbeta, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=g, x=x, scale=gamma, epsilon=EPS, data_format="NHWC", is_training=True,
                **{f"reserve_space_{i + 1}": r for i, r in enumerate(reserved)},
            )  # fmt: skip
            return dx, dgamma, dbeta, *((g,) if case.residual else ())

        arguments = (dy, x, y, gamma, reserved)
        traced = gradients.get_concrete_function(*arguments)
        tensors = [a for a in (dy, x, y, gamma, *reserved) if a is not None]

        def call() -> Any:
            return traced(*tensors)

        return Work(call, lambda: [t.numpy() for t in call()])
