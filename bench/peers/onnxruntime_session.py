"""ONNX Runtime: a graph of BatchNormalization, Add and Relu, outputs bound to our memory. Inference alone."""

from __future__ import annotations

from typing import Any

from .protocol import EPS, Case, Unsupported, Work, as_rows, empty, inputs


class Peer:
    """onnxruntime's CPU provider; the package onnx writes the graph."""

    def __init__(self, threads: int) -> None:
        import onnx
        import onnxruntime

        self._onnx: Any = onnx
        self._runtime: Any = onnxruntime
        self._threads = threads
        self.version = onnxruntime.__version__

    def prepare(self, case: Case) -> Work:
        if case.op != "inference":
            raise Unsupported("ONNX Runtime does inference alone")
        if case.axis != 1:
            raise Unsupported("ONNX's BatchNormalization is NCHW alone")
        if case.dtype in ("float16", "bfloat16"):
            raise Unsupported(f"ONNX Runtime has no {case.dtype} BatchNormalization on CPUs")
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        session = self._runtime.InferenceSession(
            self._graph(case), options, providers=["CPUExecutionProvider"]
        )
        given = inputs(case)
        feeds = {"x": as_rows(case, given.x)}
        feeds |= {k: getattr(given, k) for k in ("gamma", "beta", "mean", "var")}
        if given.residual is not None:
            feeds["z"] = as_rows(case, given.residual)
        if case.outputs == "returned":
            return Work(lambda: session.run(None, feeds), lambda: session.run(None, feeds))
        y = empty(case)
        binding = session.io_binding()
        for name, a in feeds.items():
            binding.bind_cpu_input(name, a)
        binding.bind_output("y", "cpu", 0, y.dtype, as_rows(case, y).shape, y.ctypes.data)

        def results() -> list[Any]:
            session.run_with_iobinding(binding)
            return [y]

        return Work(lambda: session.run_with_iobinding(binding), results)

    def _graph(self, case: Case) -> bytes:
        """y = act(bn(x) [+ z]) on (outer, channels, inner)."""
        helper, kinds = self._onnx.helper, self._onnx.TensorProto
        kind = kinds.DOUBLE if case.dtype == "float64" else kinds.FLOAT
        rows = (case.outer, case.channels, case.inner)
        values = [helper.make_tensor_value_info("x", kind, rows)]
        values += [
            helper.make_tensor_value_info(n, kind, [case.channels]) for n in ("gamma", "beta", "mean", "var")
        ]
        steps = [("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], {"epsilon": EPS})]
        if case.residual:
            steps.append(("Add", ["t0", "z"], {}))
            values.append(helper.make_tensor_value_info("z", kind, rows))
        if case.relu:
            steps.append(("Relu", [f"t{len(steps) - 1}"], {}))
        nodes = [
            helper.make_node(op, names, ["y" if i == len(steps) - 1 else f"t{i}"], **attributes)
            for i, (op, names, attributes) in enumerate(steps)
        ]
        graph = helper.make_graph(nodes, "bn", values, [helper.make_tensor_value_info("y", kind, rows)])
        opset = [helper.make_opsetid("", 15)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        return bytes(model.SerializeToString())
