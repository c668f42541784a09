"""fold_file: folded models give what the originals give; what cannot be folded stays, with the reason."""

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import pytest
from batchnorm import formats
from batchnorm.formats import Pair, fold_file, read

from support.command import command, error, output
from support.models import library

RANDOM = np.random.default_rng


# ---- ONNX graphs, made as converters make them -------------------------------------------------------------


class Graph:
    """An ONNX graph in the making: nodes in a row, constants as initializers or as Constant nodes."""

    def __init__(self, shape, dtype="float32", constants="initializer"):
        self.onnx, self.random = library("onnx"), RANDOM(0)
        self.helper, self.dtype, self.constants = self.onnx.helper, np.dtype(dtype), constants
        self.kind = self.helper.np_dtype_to_tensor_dtype(self.dtype)
        self.nodes, self.tensors, self.shape, self.last = [], [], shape, "x"

    def constant(self, value, name):
        tensor = self.onnx.numpy_helper.from_array(np.asarray(value, self.dtype), name)
        if self.constants == "initializer":
            self.tensors.append(tensor)
        else:
            self.nodes.append(self.helper.make_node("Constant", [], [name], value=tensor))
        if self.constants != "identity":
            return name
        self.nodes.append(self.helper.make_node("Identity", [name], [f"{name}_same"]))
        return f"{name}_same"

    def add(self, kind, *shapes, inputs=(), **attributes):
        name = f"{kind}{len(self.nodes)}"
        given = [
            self.constant(self.random.uniform(0.3, 1.5, shape), f"{name}_{i}")
            for i, shape in enumerate(shapes)
        ]
        node = self.helper.make_node(
            kind, [self.last, *inputs, *given], [f"{name}_y"], name=name, **attributes
        )
        self.nodes.append(node)
        self.last = f"{name}_y"
        return self

    def norm(self, channels, **attributes):
        return self.add("BatchNormalization", *[(channels,)] * 4, **attributes)

    def save(self, path, outputs=(), rank=None, opset=17, ir=8, inputs=(), functions=()):
        make = self.helper.make_tensor_value_info
        y = make(self.last, self.kind, [None] * (rank or len(self.shape)))
        graph = self.helper.make_graph(
            self.nodes, "g", [make("x", self.kind, self.shape), *inputs],
            [y, *(make(n, self.kind, [None] * len(self.shape)) for n in outputs)], self.tensors,
        )  # fmt: skip
        opsets = [self.helper.make_opsetid(name, opset) for name in ("", *(["own"] if functions else []))]
        model = self.helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=functions)
        self.onnx.save(model, path)
        return path


IMAGE = ["N", 4, 7, 6]
# Input, layers before the batch norm, its channels.
LAYERS = {
    "Conv": (IMAGE, lambda g: g.add("Conv", (8, 4, 3, 3), (8,)), 8),
    "Conv without bias": (IMAGE, lambda g: g.add("Conv", (8, 4, 3, 3), pads=[1, 1, 1, 1]), 8),
    "square Conv": (IMAGE, lambda g: g.add("Conv", (4, 4, 3, 3), (4,)), 4),
    "grouped Conv": (IMAGE, lambda g: g.add("Conv", (8, 2, 3, 3), (8,), group=2), 8),
    "depthwise Conv": (IMAGE, lambda g: g.add("Conv", (4, 1, 3, 3), (4,), group=4), 4),
    "Conv of one axis": (["N", 4, 9], lambda g: g.add("Conv", (8, 4, 3), (8,)), 8),
    "Conv of three axes": (["N", 4, 5, 5, 5], lambda g: g.add("Conv", (8, 4, 2, 2, 2), (8,)), 8),
    "ConvTranspose": (IMAGE, lambda g: g.add("ConvTranspose", (4, 8, 3, 3), (8,), strides=[2, 2]), 8),
    "square ConvTranspose": (IMAGE, lambda g: g.add("ConvTranspose", (4, 4, 3, 3), (4,)), 4),
    "grouped ConvTranspose": (IMAGE, lambda g: g.add("ConvTranspose", (4, 3, 3, 3), (6,), group=2), 6),
    "depthwise ConvTranspose": (IMAGE, lambda g: g.add("ConvTranspose", (4, 1, 3, 3), group=4), 4),
    "Gemm": (["N", 4], lambda g: g.add("Gemm", (4, 5), (5,)), 5),
    "Gemm of PyTorch": (["N", 4], lambda g: g.add("Gemm", (5, 4), (5,), transB=1), 5),
    "square Gemm": (["N", 4], lambda g: g.add("Gemm", (4, 4), transB=1), 4),
    "Gemm with alpha and beta": (["N", 4], lambda g: g.add("Gemm", (4, 5), (1, 5), alpha=0.5, beta=3.0), 5),
    "Gemm with one bias": (["N", 4], lambda g: g.add("Gemm", (4, 5), (), alpha=2.0), 5),
}


@pytest.mark.quick
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("constants", ["initializer", "node", "identity"])
def test_every_layer(tmp_path, layer, constants):
    library("onnxruntime")
    shape, before, channels = LAYERS[layer]
    graph = before(Graph(shape, constants=constants)).norm(channels, epsilon=1e-3).add("Relu")
    path = graph.save(tmp_path / "x.onnx")
    found = fold_file(path, tmp_path / "y.onnx", check=True)
    assert len(found.folded) == 1 and found.left == {} and 0 <= found.error < 3e-6
    model = graph.onnx.load(tmp_path / "y.onnx")
    assert [node.op_type for node in model.graph.node] == [layer.split()[layer.split()[0] in (
        "square", "grouped", "depthwise")], "Relu"]  # fmt: skip
    assert len(model.graph.initializer) == 2
    graph.onnx.checker.check_model(model, full_check=True)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types(tmp_path, dtype):
    library("onnxruntime")
    graph = Graph(["N", 4], dtype).add("Gemm", (4, 5), (5,)).norm(5)
    if dtype == "float64":  # of which ONNX Runtime has no Conv on CPUs
        graph.save(tmp_path / "x.onnx")
    else:
        Graph(IMAGE, dtype).add("Conv", (8, 4, 3, 3), (8,)).norm(8).save(tmp_path / "x.onnx")
    found = fold_file(tmp_path / "x.onnx", tmp_path / "y.onnx", check=True)
    assert len(found.folded) == 1 and found.error < {"float16": 1e-2, "float64": 1e-12}[dtype]


@pytest.mark.quick
def test_a_chain_of_them(tmp_path):
    """Two batch norms in a row, and one that follows what was folded already."""
    library("onnxruntime")
    graph = (
        Graph(IMAGE).add("Conv", (8, 4, 3, 3)).norm(8).norm(8).add("Relu").add("Conv", (8, 8, 1, 1)).norm(8)
    )
    found = fold_file(graph.save(tmp_path / "x.onnx"), tmp_path / "y.onnx", check=True)
    assert len(found.folded) == 3 and found.error < 1e-5 and read(tmp_path / "y.onnx") == {}


@pytest.mark.quick
def test_a_graph_as_tf2onnx_makes_it(tmp_path):
    """NHWC around the convolution, names of TensorFlow, constants shared by all batch norms."""
    library("onnxruntime")
    graph = (
        Graph(["N", 7, 6, 4]).add("Transpose", perm=[0, 3, 1, 2]).add("Conv", (4, 4, 3, 3), pads=[1, 1, 1, 1])
    )
    ones, zeros = graph.constant(np.ones(4), "const_ones"), graph.constant(np.zeros(4), "const_zeros")
    for i in range(2):
        graph.add("BatchNormalization", inputs=(ones, zeros), epsilon=1e-3)
        own = [
            graph.constant(RANDOM(i).uniform(0.5, 2, 4), f"model/bn{i}/moving_{n}") for n in ("mean", "var")
        ]
        graph.nodes[-1].input.extend(own)
        graph.nodes[-1].name = f"model/bn{i}/FusedBatchNormV3"
        graph.add("Relu")
        if i == 0:
            graph.add("Conv", (4, 4, 1, 1), (4,))
    path = graph.add("Transpose", perm=[0, 2, 3, 1]).save(tmp_path / "x.onnx", opset=13)
    norms = read(path)
    assert [(name, norm.eps) for name, norm in norms.items()] == [
        (f"model/bn{i}/FusedBatchNormV3", 1e-3) for i in range(2)
    ]
    found = fold_file(path, tmp_path / "y.onnx", check=True)
    assert len(found.folded) == 2 and found.error < 3e-6 and read(tmp_path / "y.onnx") == {}
    assert len(graph.onnx.load(tmp_path / "y.onnx").graph.initializer) == 4


LEFT = {
    "an input": (lambda g: g.norm(4), "it follows an input, not Conv"),
    "Relu": (lambda g: g.add("Relu").norm(4), "it follows Relu, not Conv, ConvTranspose or Gemm"),
    "training": (lambda g: g.add("Conv", (4, 4, 1, 1)).norm(4, training_mode=1), "it is there for training"),
    "computed weights": (
        lambda g: g.add("Conv", inputs=("x",)).norm(4), "weight or bias of Conv are computed, not constant",
    ),
    "negative variance": (
        lambda g: g.add("Conv", (4, 4, 1, 1)).norm(4), "is -1 at channel 2, expected at least -1e-05, -eps",
    ),
    "other channels": (lambda g: g.add("Conv", (8, 4, 1, 1)).norm(4), "out_axis is 0 and groups is 1"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_as_it_is(tmp_path, case):
    build, reason = LEFT[case]
    graph = build(Graph(IMAGE))
    if case == "negative variance":
        graph.tensors[-1].CopyFrom(
            graph.onnx.numpy_helper.from_array(np.float32([1, 1, -1, 1]), graph.tensors[-1].name)
        )
    path = graph.save(tmp_path / "x.onnx")
    found = fold_file(path, tmp_path / "y.onnx")
    assert found.folded == () and reason in "".join(found.left.values()) and len(found.left) == 1
    before, after = (graph.onnx.load(p) for p in (path, tmp_path / "y.onnx"))
    assert before.graph.node == after.graph.node and before.graph.initializer == after.graph.initializer


@pytest.mark.quick
def test_what_is_used_elsewhere_too(tmp_path):
    graph = Graph(IMAGE).add("Conv", (4, 4, 1, 1))
    conv = graph.last
    path = graph.norm(4).add("Add", inputs=(conv,)).save(tmp_path / "x.onnx")
    assert "used elsewhere" in str(fold_file(path, tmp_path / "y.onnx").left)
    graph = Graph(IMAGE).add("Conv", (4, 4, 1, 1))
    path = graph.norm(4).save(tmp_path / "x.onnx", outputs=["Conv0_y"])
    assert "used elsewhere" in str(fold_file(path, tmp_path / "y.onnx").left)


@pytest.mark.quick
def test_weights_that_two_layers_share(tmp_path):
    library("onnxruntime")
    graph = Graph(IMAGE).add("Conv", (4, 4, 1, 1))
    shared = graph.nodes[-1].input[1]
    graph.norm(4).add("Relu").add("Conv", inputs=(shared,)).norm(4).add("Conv", inputs=(shared,))
    found = fold_file(graph.save(tmp_path / "x.onnx"), tmp_path / "y.onnx", check=True)
    assert len(found.folded) == 2 and found.error < 1e-5
    assert shared in [t.name for t in graph.onnx.load(tmp_path / "y.onnx").graph.initializer]


@pytest.mark.quick
def test_subgraphs(tmp_path):
    """A batch norm in a branch is found and left; what a branch uses is not folded away."""
    library("onnxruntime")
    graph = Graph(IMAGE).add("Conv", (4, 4, 1, 1))
    helper, conv = graph.helper, graph.last
    graph.norm(4)
    normed, names = graph.last, [f"inner_{i}" for i in range(4)]
    tensors = [graph.onnx.numpy_helper.from_array(np.ones(4, np.float32), name) for name in names]
    info = helper.make_tensor_value_info("z", graph.kind, [None] * 4)
    inner = helper.make_node("BatchNormalization", [conv, *names], ["z"], name="inner")
    other = helper.make_node("Identity", [normed], ["z"])
    branches = [helper.make_graph([node], "b", [], [info], t) for node, t in ((inner, tensors), (other, []))]
    graph.nodes.append(helper.make_node("Constant", [], ["yes"], value=graph.onnx.numpy_helper.from_array(
        np.array(True), "yes")))  # fmt: skip
    graph.nodes.append(
        helper.make_node("If", ["yes"], ["out"], then_branch=branches[0], else_branch=branches[1])
    )
    graph.last = "out"
    path = graph.save(tmp_path / "x.onnx")
    assert sorted(read(path)) == ["BatchNormalization1", "inner"]
    found = fold_file(path, tmp_path / "y.onnx", check=True)
    assert found.left == {"BatchNormalization1": "what Conv gives is used elsewhere, too",
                          "inner": "it is in a subgraph"}  # fmt: skip


@pytest.mark.quick
def test_values_beside_the_model(tmp_path):
    library("onnxruntime")
    onnx = library("onnx")
    graph = Graph(IMAGE).add("Conv", (8, 4, 3, 3), (8,)).norm(8)
    model = onnx.load(graph.save(tmp_path / "plain.onnx"))
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    assert np.array_equal(*(next(iter(read(tmp_path / n).values())).var for n in ("x.onnx", "plain.onnx")))
    found = fold_file(tmp_path / "x.onnx", tmp_path / "y.onnx", check=True)
    os.remove(tmp_path / "x.data")
    assert len(found.folded) == 1 and "y.onnx" in os.listdir(tmp_path)
    library("onnxruntime").InferenceSession(tmp_path / "y.onnx")  # which stands alone
    with pytest.raises(ValueError, match=r"cannot fold .*lies in 'x.data', which is missing or too short"):
        fold_file(tmp_path / "x.onnx", tmp_path / "z.onnx")


@pytest.mark.quick
def test_a_fold_that_would_be_wrong_is_not_written(tmp_path, monkeypatch):
    library("onnxruntime")
    path = Graph(IMAGE).add("Conv", (4, 4, 1, 1)).norm(4).save(tmp_path / "x.onnx")
    module = fold_file.__globals__["folding"]
    monkeypatch.setattr(module, "fold", lambda weight, bias, mean, *a, **k: (weight * 2, mean))
    with pytest.raises(ValueError, match=r"cannot fold .*: output '.*' of the folded model differs by"):
        fold_file(path, tmp_path / "y.onnx", check=True)
    assert os.listdir(tmp_path) == ["x.onnx"]


@pytest.mark.quick
def test_a_weight_of_one_number_is_left(tmp_path):
    library("onnxruntime")
    graph = Graph(IMAGE)
    one = graph.constant(np.full((1, 1, 1, 1), 0.3), "one")
    shape = graph.onnx.numpy_helper.from_array(np.array([4, 1, 3, 3]), "shape")
    graph.tensors.append(shape)
    graph.nodes.append(graph.helper.make_node("Expand", [one, "shape"], ["w"]))
    graph.add("Conv", inputs=("w",), group=4).norm(4)
    found = fold_file(graph.save(tmp_path / "x.onnx"), tmp_path / "y.onnx", check=True)
    assert "are computed, not constant" in "".join(found.left.values()) and found.folded == ()


@pytest.mark.quick
def test_a_check_of_sizes_without_names(tmp_path):
    """Each free size of an input is one of its own: samples are few, images are not."""
    library("onnxruntime")
    graph = Graph([None, 4, None, None]).add("Conv", (8, 4, 7, 7)).norm(8)
    assert 0 <= fold_file(graph.save(tmp_path / "x.onnx"), tmp_path / "y.onnx", check=True).error < 1e-5


@pytest.mark.quick
def test_a_check_of_float64_with_small_variances(tmp_path):
    library("onnxruntime")
    graph = Graph(["N", 4], "float64").add("Gemm", (4, 5), (5,)).norm(5, epsilon=0.1)
    graph.tensors[-1].CopyFrom(graph.onnx.numpy_helper.from_array(np.full(5, 1e-9), graph.tensors[-1].name))
    found = fold_file(graph.save(tmp_path / "x.onnx"), tmp_path / "y.onnx", check=True)
    assert len(found.folded) == 1 and found.error < 1e-12
    assert next(iter(read(tmp_path / "x.onnx").values())).eps == 0.1


@pytest.mark.quick
def test_a_bias_that_float16_cannot_hold(tmp_path):
    torch = library("torch")
    state = {"c.weight": torch.ones(1, 1), "bn.running_mean": torch.full((1,), 6e4),
             "bn.running_var": torch.full((1,), 1e-2)}  # fmt: skip
    for more in ({}, {"c.bias": torch.zeros(1)}):
        torch.save({key: value.half() for key, value in (state | more).items()}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"folded bias is -.* at channel 0, too large for float16"):
            fold_file(tmp_path / "x.pt", tmp_path / "y.pt", pairs={"c": "bn"}, eps=1e-5)
    assert os.listdir(tmp_path) == ["x.pt"]
    graph = Graph(IMAGE, "float16").add("Conv", (4, 4, 1, 1)).norm(4)
    for i, value in ((-2, 6e4), (-1, 1e-2)):
        new = graph.onnx.numpy_helper.from_array(np.full(4, value, np.float16), graph.tensors[i].name)
        graph.tensors[i].CopyFrom(new)
    found = fold_file(graph.save(tmp_path / "x.onnx"), tmp_path / "y.onnx")
    assert found.folded == () and "too large for float16" in "".join(found.left.values())


@pytest.mark.quick
@pytest.mark.parametrize("ir", [3, 8])
def test_names_and_inputs_of_old_models(tmp_path, ir):
    """Before version 4 each initializer is an input, too; new names are no input's."""
    runtime, graph = library("onnxruntime"), Graph(IMAGE).add("Conv", (8, 4, 3, 3)).norm(8)
    graph.last = graph.add("Add", inputs=(f"{graph.nodes[-1].name}.folded_weight",)).last
    make = graph.helper.make_tensor_value_info
    inputs = [make(graph.nodes[-1].input[1], graph.kind, [1])]
    inputs += [make(t.name, t.data_type, t.dims) for t in graph.tensors] if ir < 4 else []
    path = graph.save(tmp_path / "x.onnx", ir=ir, opset=8, inputs=inputs)
    found = fold_file(path, tmp_path / "y.onnx", check=True)
    assert len(found.folded) == 1 and found.error < 3e-6
    model = graph.onnx.load(tmp_path / "y.onnx")
    graph.onnx.checker.check_model(model, full_check=True)
    assert len(model.graph.input) == (4 if ir < 4 else 2)
    assert len(runtime.InferenceSession(tmp_path / "y.onnx").get_inputs()) == 2


@pytest.mark.quick
def test_functions_of_a_model(tmp_path):
    """Their batch norms are named, with what makes them readable."""
    library("onnxruntime")
    graph = Graph(IMAGE)
    helper, names = graph.helper, ["x", "s", "b", "m", "v"]
    node = helper.make_node("BatchNormalization", names, ["y"], name="bn")
    function = helper.make_function("own", "Block", names, ["y"], [node], [helper.make_opsetid("", 17)])
    graph.add("Conv", (4, 4, 1, 1)).add("Block", (4,), (4,), (4,), (4,), domain="own")
    path = graph.save(tmp_path / "x.onnx", functions=[function])
    ((name, norm),) = read(path).items()
    assert name == "Block/bn" and "inline_local_functions" in norm.fault
    found = fold_file(path, tmp_path / "y.onnx", check=True)
    assert found.folded == () and list(found.left) == ["Block/bn"] and found.left["Block/bn"] in norm.fault
    inliner = __import__("onnx.inliner").inliner
    graph.onnx.save(inliner.inline_local_functions(graph.onnx.load(path)), path)
    assert len(fold_file(path, tmp_path / "y.onnx", check=True).folded) == 1


# ---- of exporters ------------------------------------------------------------------------------------------


def network(torch):
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8, eps=1e-3), nn.ReLU6(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False), nn.Flatten(), nn.Linear(384, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    for _ in range(5):
        net(torch.randn(8, 3, 8, 8) * 2 + 1)
    for each in net:
        if getattr(each, "affine", False):
            nn.init.uniform_(each.weight, 0.5, 2)
            nn.init.normal_(each.bias)
    return net.eval()


# Options, and how many of the five are in the file, and of these are folded. Exporters fold most themselves;
# without that, the new one asks for the shape of what is before a batch norm without gamma and beta.
EXPORTS = {
    "script, training": (dict(dynamo=False, training="TRAINING", do_constant_folding=False), 5, 5),
    "script": (dict(dynamo=False), 3, 3),
    "dynamo": (dict(dynamo=True), 0, 0),
    "dynamo, not optimized": (dict(dynamo=True, optimize=False), 5, 4),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_exports_of_pytorch(tmp_path, export):
    torch, runtime = library("torch"), library("onnxruntime")
    options, present, folded = EXPORTS[export]
    if options["dynamo"]:
        library("onnxscript")
    if "training" in options:
        options = {**options, "training": torch.onnx.TrainingMode.PRESERVE}
    net, x = network(torch), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), tmp_path / "x.onnx", verbose=False, **options)
    norms = read(tmp_path / "x.onnx")
    found = fold_file(tmp_path / "x.onnx", tmp_path / "y.onnx", check=True)
    assert (len(norms), len(found.folded), len(found.left)) == (present, folded, present - folded)
    assert found.error < 1e-5
    if len(norms) == 5:
        assert [norm.eps for norm in norms.values()] == [1e-5, 1e-3, 1e-5, 1e-5, 1e-5]
        assert np.array_equal(norms["1"].var, net[1].running_var.numpy())
    session = runtime.InferenceSession(tmp_path / "y.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, net(x).detach().numpy(), rtol=1e-4, atol=1e-4)


# ---- dictionaries of tensors -------------------------------------------------------------------------------

PAIRS = [("0", "1"), ("3", "4"), Pair("6", "7", 1, 2), ("10", "11")]


@pytest.mark.quick
@pytest.mark.parametrize("source", ["pt", "safetensors"])
@pytest.mark.parametrize("target", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_state_dicts(tmp_path, source, target, prefix):
    torch = library("torch")
    net = network(torch)
    net[4].eps = 1e-5
    state = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    safe = library("safetensors.torch")
    (torch.save if source == "pt" else safe.save_file)(state, tmp_path / f"x.{source}")
    found = fold_file(tmp_path / f"x.{source}", tmp_path / f"y.{target}", pairs=PAIRS, eps=1e-5)
    assert found == (("1", "4", "7", "11"), {"8": "no pair names it"}, None)
    folded = network(torch)
    for i in (1, 4, 7, 11):
        folded[i] = torch.nn.Identity()
    folded[0] = torch.nn.Conv2d(3, 8, 3)
    load = torch.load if target == "pt" else safe.load_file
    folded.load_state_dict(
        {k.removeprefix(prefix): v for k, v in load(tmp_path / f"y.{target}").items()}
    )  # strict
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(folded.eval()(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_16_bit_weights(tmp_path):
    torch, safe = library("torch"), library("safetensors.torch")
    library("ml_dtypes")
    for dtype in (torch.bfloat16, torch.float16):
        state = network(torch).to(dtype).state_dict()
        safe.save_file(state, tmp_path / "x.safetensors")
        fold_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors", pairs={"0": "1"}, eps=1e-5)
        new = safe.load_file(tmp_path / "y.safetensors")
        assert new["0.weight"].dtype == new["0.bias"].dtype == new["3.weight"].dtype == dtype
        scale = state["1.weight"].double() / (state["1.running_var"].double() + 1e-5).sqrt()
        want = (state["0.weight"].double() * scale[:, None, None, None]).to(dtype)
        assert torch.equal(new["0.weight"], want)


@pytest.mark.quick
@pytest.mark.parametrize("first", ["", "module."])
def test_wrapped_twins(tmp_path, first):
    """Of a file with a model and its wrapped copy, that is changed which is named."""
    torch = library("torch")
    own = network(torch).state_dict()
    prefixes = [first, "module." if not first else ""]
    state = {f"{p}{k}": v * (1 + len(p)) for p in prefixes for k, v in own.items()}
    torch.save(state, tmp_path / "x.pt")
    for p in prefixes:
        found = fold_file(tmp_path / "x.pt", tmp_path / "y.pt", pairs={f"{p}0": f"{p}1"}, eps=1e-5)
        new = torch.load(tmp_path / "y.pt")
        assert found.folded == (f"{p}1",) and {*new} - {*state} == {f"{p}0.bias"}
        assert [k for k in state if k in new and not torch.equal(new[k], state[k])] == [f"{p}0.weight"]
        assert {k.rpartition(".")[0] for k in {*state} - {*new}} == {f"{p}1"}
    state = {k: v for k, v in state.items() if k != "0.weight"} | {"_orig_mod.0.weight": own["0.weight"]}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"'0', which may be .*module.0.weight.*: name it as it is in the"):
        fold_file(tmp_path / "x.pt", tmp_path / "y.pt", pairs={"0": "1"}, eps=1e-5)


@pytest.mark.quick
def test_modules_with_two_names(tmp_path):
    """One tensor that is folded by one name is not left as it was by the other."""
    torch = library("torch")
    nn, net = torch.nn, network(torch)
    both = nn.ModuleDict({"conv": net[0], "bn": net[1], "block": nn.Sequential(net[0], net[1])}).eval()
    torch.save(both.state_dict(), tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"conv.weight and block.0.weight are one tensor, and pairs names on"
    ):
        fold_file(tmp_path / "x.pt", tmp_path / "y.pt", pairs={"conv": "bn"}, eps=1e-5)
    pairs = {"conv": "bn", "block.0": "block.1"}
    assert len(fold_file(tmp_path / "x.pt", tmp_path / "y.pt", pairs=pairs, eps=1e-5).folded) == 2
    new = torch.load(tmp_path / "y.pt")
    assert torch.equal(new["conv.weight"], new["block.0.weight"]) and "block.0.bias" in new and len(new) == 4
    torch.save({k: v.clone() for k, v in both.state_dict().items()}, tmp_path / "x.pt")
    assert fold_file(tmp_path / "x.pt", tmp_path / "y.pt", pairs={"conv": "bn"}, eps=1e-5).folded == ("bn",)


@pytest.mark.quick
def test_eps_from_the_metadata(tmp_path):
    save = library("safetensors.numpy").save_file
    arrays = formats.arrays_of(formats.Norm("bn", *RANDOM(0).uniform(1, 2, (2, 3))), "pytorch")
    save({**arrays, "fc.weight": np.ones((3, 2))}, tmp_path / "x.safetensors",
         metadata={"batchnorm": json.dumps({"bn": {"eps": 0.5}}), "made": "by hand"})  # fmt: skip
    fold_file(tmp_path / "x.safetensors", tmp_path / "y.safetensors", pairs={"fc": "bn"})
    with library("safetensors").safe_open(tmp_path / "y.safetensors", "np") as file:
        assert file.metadata() == {"made": "by hand"} and set(file.keys()) == {"fc.weight", "fc.bias"}
        want = 1 / np.sqrt(arrays["bn.running_var"] + 0.5)
        np.testing.assert_allclose(file.get_tensor("fc.weight")[:, 0], want, rtol=1e-12)


WRONG = [
    (dict(pairs={"0": "1"}), "eps of '1' is not in the file: pass eps=1e-05, the default of pytorch, unless"),
    (dict(), "pairs is None, expected layers and the batch norms behind them, such as {'conv1': 'bn1'}"),
    (
        dict(pairs={"0": "x"}, eps=0.1),
        "pairs names the batch norm 'x', expected one of 1, 4, 7, 8, 11, each once",
    ),
    (dict(pairs=[("0", "1"), ("0", "1")], eps=0.1), "pairs names the batch norm '1', expected one of"),
    (
        dict(pairs={"z": "1"}, eps=0.1),
        "pairs names the layer 'z', expected one whose z.weight is in the file",
    ),
    (dict(pairs={"6": "7"}, eps=0.1), "folding '7' into '6': out_axis is 0 .*out_axis=1, groups=2"),
    (dict(pairs={"0": "1"}, eps=0.1, check=True), "check is True, but only .onnx files can be run"),
    (dict(pairs={"0": "1"}, eps=-1), "eps is -1, expected a finite number >= 0"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("options", "match"), WRONG, ids=range(len(WRONG)))
def test_errors(tmp_path, options, match):
    torch = library("torch")
    torch.save(network(torch).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=match):
        fold_file(tmp_path / "x.pt", tmp_path / "y.pt", **options)
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.quick
@pytest.mark.parametrize("pairs", ["0:1", 3, [("0", 3)], [("0",)], ["01"], [("0", "1", 0, 1, 2)]], ids=str)
def test_pairs_that_are_none(tmp_path, pairs):
    torch = library("torch")
    torch.save(network(torch).state_dict(), tmp_path / "x.pt")
    match = (
        r"pairs (is|holds) .*, expected pairs of a layer's name and that of the batch norm behind it, or P"
    )
    with pytest.raises(TypeError, match=match):
        fold_file(tmp_path / "x.pt", tmp_path / "y.pt", pairs=pairs, eps=1e-5)


@pytest.mark.quick
def test_remedies_work(tmp_path):
    """What a message says to do is done."""
    torch = library("torch")
    net = network(torch)
    checkpoint = {"epoch": 3, "options": {"lr": 0.1}, "net": net.state_dict()}
    torch.save(checkpoint, tmp_path / "x.model")
    with pytest.raises(ValueError, match=r"expected a name that ends in .*; or say its kind"):
        fold_file(tmp_path / "x.model", tmp_path / "y.pt", pairs={"0": "1"}, eps=1e-5)
    with pytest.raises(ValueError, match=r"it holds 'epoch', .*: torch.save\((.*)\)$") as caught:
        fold_file(tmp_path / "x.model", tmp_path / "y.pt", pairs={"0": "net/1"}, eps=1e-5,
                  kinds=("torch", None))  # fmt: skip
    remedy = str(caught.value).rpartition("alone: ")[2]
    eval(remedy, {"torch": torch, "path": tmp_path / "x.model", "other_path": tmp_path / "z.pt"})
    assert fold_file(tmp_path / "z.pt", tmp_path / "y.pt", pairs={"0": "1"}, eps=1e-5).folded == ("1",)


@pytest.mark.quick
def test_errors_of_kinds(tmp_path):
    path = Graph(IMAGE).norm(4).save(tmp_path / "x.onnx")
    for names, match in {
        ("x.keras", "y.onnx"): "source is of kind 'keras', expected onnx, safetensors or torch",
        ("x.onnx", "y.pt"): "target is of kind 'torch', expected onnx, as source is onnx",
        ("x.pt", "y.onnx"): "target is of kind 'onnx', expected safetensors or torch, as source is torch",
    }.items():
        with pytest.raises(ValueError, match=match):
            fold_file(*(tmp_path / name for name in names))
    with pytest.raises(ValueError, match=r"pairs and eps are for .safetensors and .pt files"):
        fold_file(path, tmp_path / "y.onnx", eps=1e-3)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ValueError, match=r"cannot fold '.*text.onnx': "):
        fold_file(tmp_path / "text.onnx", tmp_path / "y.onnx")
    with pytest.raises(FileNotFoundError):
        fold_file(tmp_path / "no.onnx", tmp_path / "y.onnx")
    assert sorted(os.listdir(tmp_path)) == ["text.onnx", "x.onnx"]


def test_the_command(tmp_path):
    library("onnxruntime")
    Graph(IMAGE).add("Conv", (4, 4, 1, 1)).norm(4).add("Relu").norm(4).save(tmp_path / "x.onnx")
    lines = output(command(tmp_path, "fold", "x.onnx", "y.onnx", "--check")).splitlines()
    assert lines[:2] == [
        "folded: BatchNormalization1",
        "left: BatchNormalization3: it follows Relu, not Conv, ConvTranspose or Gemm",
    ] and lines[2].startswith("largest difference of the outputs: ")  # fmt: skip
    found = json.loads(output(command(tmp_path, "fold", "x.onnx", "y.onnx", "--json")))
    assert found["folded"] == ["BatchNormalization1"] and found["error"] is None
    torch = library("torch")
    torch.save(network(torch).state_dict(), tmp_path / "x.pt")
    arguments = ["fold", "x.pt", "y.pt", "--pair", "0:1", "--pair=6:7:1:2", "--eps=1e-5"]
    assert "folded: 1\nfolded: 7\nleft: 4: no pair" in output(command(tmp_path, *arguments))
    assert error(command(tmp_path, *arguments[:-1]), "fold").startswith(
        "cannot fold 'x.pt': eps of '1' is not in"
    )
    for line, words in {
        "x.pt y.pt --eps=1e-5": "--pair is None, expected layers and the batch norms behind them, su",
        "x.pt y.pt --pair=0:1": "cannot fold 'x.pt': eps of '1' is not in the file: pass --eps=1e-05, the ",
        "x.pt y.pt --pair=0:x --eps=1": "cannot fold 'x.pt': --pair names the batch norm 'x'",
        "x.onnx y.onnx --eps=1": "--pair and --eps are for .safetensors and .pt",
        "x.pt y --from torch --to torch --pair=0:1 --eps=1 --check": "--check is True, but only",
    }.items():
        assert error(command(tmp_path, "fold", *line.split()), "fold").startswith(words)
    assert "invalid pair value" in command(tmp_path, "fold", "x.pt", "y.pt", "--pair", "0").stderr
    done = command(
        tmp_path, "fold", "x.onnx", "z.onnx", "--check", code="import sys; sys.modules['onnxruntime'] = None"
    )
    assert error(done, "fold").endswith("needs onnxruntime, which is not installed: pip install onnxruntime")
