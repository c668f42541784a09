"""The ONNX backend's own BatchNormalization cases, from the onnx package, run on the functions.

ONNX's attributes in this library's terms: `momentum` weighs the old running value, which is `decay`; the
running variance takes the population variance, which is `running_ddof=0`; the channel axis is 1.
"""

from __future__ import annotations

import warnings

import batchnorm
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

NAMES = (
    "test_batchnorm_epsilon",
    "test_batchnorm_epsilon_training_mode",
    "test_batchnorm_example",
    "test_batchnorm_example_training_mode",
)


@pytest.fixture(scope="module")
def backend_cases():
    """The backend's node cases by name. Making them runs all operators' examples, with their warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case import node

        found = {case.name: case for case in node.collect_testcases("BatchNormalization")}
    return {name: case for name, case in found.items() if "_expanded" not in name}


def run(node, x, scale, bias, mean, var):
    """One BatchNormalization node on the functions: y, or y and the new running statistics."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    eps = attributes.get("epsilon", 1e-5)
    if not attributes.get("training_mode", 0):
        return [batchnorm.batch_norm(x, mean, var, scale, bias, eps=eps)]
    mean, var = mean.copy(), var.copy()
    result = batchnorm.batch_norm_train(
        x,
        scale,
        bias,
        running_mean=mean,
        running_var=var,
        decay=attributes.get("momentum", 0.9),
        running_ddof=0,
        eps=eps,
    )
    return [result.y, mean, var]


def test_all_cases_are_known(backend_cases):
    assert sorted(backend_cases) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_case(name, backend_cases):
    case = backend_cases[name]
    (node,) = case.model.graph.node
    assert node.op_type == "BatchNormalization"
    for inputs, outputs in case.data_sets:
        results = run(node, *inputs)
        assert len(results) == len(outputs)
        for got, want in zip(results, outputs, strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=case.rtol, atol=case.atol)
            # Far closer than the backend asks: a few roundings of float32, and of the case's own float32
            # reference.
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_expanded_function_agrees():
    # ONNX's reference evaluator on a node made here: opset 15, other momentum, rank 3.
    from onnx.reference import ReferenceEvaluator

    generator = np.random.default_rng(15)
    inputs = dict(
        x=generator.standard_normal((5, 4, 9), np.float32),
        scale=generator.standard_normal(4, np.float32),
        bias=generator.standard_normal(4, np.float32),
        mean=generator.standard_normal(4, np.float32),
        var=generator.uniform(0.5, 2, 4).astype(np.float32),
    )
    node = onnx.helper.make_node(
        "BatchNormalization",
        list(inputs),
        ["y", "new_mean", "new_var"],
        epsilon=1e-3,
        momentum=0.7,
        training_mode=1,
    )
    infos = [
        onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v.shape) for k, v in inputs.items()
    ]
    results = [onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, None) for k in node.output]
    graph = onnx.helper.make_graph([node], "one", infos, results)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)
    for got, want in zip(
        run(node, *inputs.values()), ReferenceEvaluator(model).run(None, inputs), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
