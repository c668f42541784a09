"""Batch norms of a model file folded into the layers before them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..fold import fold
from ..settings import kind
from ..typing import Array
from .files import read, writing
from .library import library
from .norms import Norm, plain
from .npz import failing_as, path_text
from .onnx import IN_FUNCTION, Constants, attributes, graphs, in_functions, is_norm, load, norm_of
from .tensors import numpy_of, rewrite

__all__ = ["Folded", "Pair", "fold_onnx", "fold_tensors"]

_LARGEST = 2**31 - 2**20  # bytes of an .onnx file
_FREE = {0: 2}  # what a free dimension of an input is in a check: samples; others are _SIZE
_SIZE = 32
_CLOSE = {"tensor(float16)": 2e-2, "tensor(float)": 1e-4, "tensor(double)": 1e-10}


class Folded(NamedTuple):
    """What has been folded.

    Attributes
    ----------
    folded : tuple of str
        The names of batch norms that are gone.
    left : dict of str to str
        Those that are left, with the reason.
    error : float or None
        The largest difference of the outputs on random input, by the largest output; None if unchecked.
    """

    folded: tuple[str, ...]
    left: dict[str, str]
    error: float | None = None


class Pair(NamedTuple):
    """A layer and the batch norm behind it.

    Attributes
    ----------
    layer, norm : str
        Their names: those of their weights without ".weight".
    out_axis : int
        The axis of the layer's weight that holds its outputs: 1 of a transposed convolution, else 0.
    groups : int
        Of a grouped transposed convolution.
    """

    layer: str
    norm: str
    out_axis: int = 0
    groups: int = 1


# ---- dictionaries of tensors -------------------------------------------------------------------------------


def fold_tensors(
    source: str, target: str, kinds: tuple[str, str], pairs: Sequence[Pair], eps: float | None
) -> Folded:
    """Fold pairs of a .safetensors or .pt file. The batch norms' tensors go, biases come."""
    norms = read(source, kinds[0]).norms
    folded: list[str] = []

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        new = dict(tensors)
        for pair in pairs:
            name = pair.norm if pair.norm in norms else plain(pair.norm)
            if name not in norms or name in folded:
                known = ", ".join(norms) or "none"
                raise ValueError(
                    f"pairs names the batch norm {pair.norm!r}, expected one of {known}, each once"
                )
            key = _weight_of(pair.layer, tensors)
            norm = _with_known_eps(norms[name], eps)
            place = key.removesuffix("weight") + "bias"
            bias = new.get(place)
            weight, offset = numpy_of(new[key]), None if bias is None else numpy_of(bias)
            with failing_as(f"folding {pair.norm!r} into {pair.layer!r}"):
                new[key], new[place] = _fold(weight, offset, norm, pair.out_axis, pair.groups)
            for gone in norm.keys.values():
                new.pop(gone)
            folded.append(name)
        altered = {_place(v): key for key, v in tensors.items() if new.get(key) is not v}
        for key, v in tensors.items():
            if new.get(key) is v and (other := altered.get(_place(v))):
                remedy = "name both in pairs, or save copies: {k: v.clone() for k, v in state_dict.items()}"
                raise ValueError(f"{other} and {key} are one tensor, and pairs names one of them: {remedy}")
        return new

    with failing_as(f"cannot fold {source!r}"):
        rewrite(source, kinds, lambda write: writing(target, write), change)
    return Folded(tuple(folded), {name: "no pair names it" for name in norms if name not in folded})


def _place(value: Any) -> Any:
    """Where a tensor lies, which is the same of a module with two names."""
    return (value.data_ptr(), value.shape) if hasattr(value, "data_ptr") and value.numel() else id(value)


def _weight_of(layer: str, tensors: Mapping[str, Any]) -> str:
    """The key of a layer's weight: as it is named, or the only one with what wrappers add."""
    if f"{layer}.weight" in tensors:
        return f"{layer}.weight"
    wanted, got = f"{plain(layer)}.weight", f"pairs names the layer {layer!r}"
    found = [key for key in tensors if plain(key) == wanted]
    if len(found) > 1:
        raise ValueError(f"{got}, which may be {' or '.join(found)}: name it as it is in the file")
    if not found:
        raise ValueError(f"{got}, expected one whose {wanted} is in the file")
    return found[0]


def _with_known_eps(norm: Norm, eps: float | None) -> Norm:
    if norm.eps is None and eps is None:
        default = (
            f"{norm.option('eps'):g}, the default of {norm.format}, unless the model was built with another"
        )
        raise ValueError(f"eps of {norm.name!r} is not in the file: pass eps={default}")
    return norm.said(eps=eps) if norm.eps is None else norm


def _fold(weight: Array, bias: Array | None, norm: Norm, out_axis: int, groups: int) -> tuple[Array, Array]:
    """Weight and bias of a layer, of the weight's dtype."""
    norm.check()
    norm = norm.with_eps()
    wide = None if bias is None else bias.astype(np.float64)
    vectors, eps = (norm.mean, norm.var, norm.gamma, norm.beta), float(norm.option("eps"))
    new, offset = fold(weight, wide, *vectors, eps=eps, out_axis=out_axis, groups=groups)
    with np.errstate(over="ignore"):
        narrow = offset.astype(weight.dtype if bias is None else bias.dtype)
    if not np.isfinite(narrow).all():
        where = int(np.argmin(np.isfinite(narrow)))
        got = f"the folded bias is {offset[where]:g} at channel {where}"
        raise ValueError(f"{got}, too large for {narrow.dtype}: fold a model of float32")
    return new, narrow


# ---- ONNX --------------------------------------------------------------------------------------------------


def fold_onnx(source: str, target: str, check: bool) -> Folded:
    """Fold each BatchNormalization behind a Conv, ConvTranspose or Gemm."""
    name = path_text(source)
    if check:
        library("onnxruntime", "comparing the folded model with the original")
    with failing_as(f"cannot fold {name!r}"):
        with open(name, "rb"):  # there is no folder
            model = load(name)
        folder = os.path.dirname(os.path.realpath(name))
        onnx, graph, constants = library("onnx", "folding"), model.graph, Constants(model.graph, folder)
        constants.old = model.ir_version < 4
        folded: dict[str, Norm] = {}
        left: dict[str, str] = {}
        for node in [each for each in graph.node if is_norm(each)]:
            norm = norm_of(node, constants, {*folded, *left})
            try:
                _fold_node(node, norm, graph, constants, onnx)
                folded[norm.name] = norm
            except _Left as why:
                left[norm.name] = str(why)
        for inner, _ in [*graphs(graph)][1:]:
            left |= {n.name or n.output[0]: "it is in a subgraph" for n in inner.node if is_norm(n)}
        left |= dict.fromkeys(in_functions(model), IN_FUNCTION)
        _drop_unused(graph)
        constants.embed(model)
        if model.ByteSize() > _LARGEST:
            raise ValueError(
                f"the folded model has {model.ByteSize()} bytes, an .onnx file has at most {_LARGEST}"
            )
        error: list[float] = []

        def write(path: str) -> None:
            onnx.save(model, path)
            if check:
                error.append(_compare(name, path))

        writing(target, write)
    return Folded(tuple(folded), left, error[0] if error else None)


class _Left(Exception):
    """Why a batch norm is left as it is."""


def _uses(graph: Any) -> Counter[str]:
    """How often each name is used, by nodes here and within, and as an output."""
    every = [each for each, _ in graphs(graph)]
    used = Counter(name for each in every for node in each.node for name in node.input)
    return used + Counter(out.name for each in every for out in each.output)


def _fold_node(node: Any, norm: Norm, graph: Any, constants: Constants, onnx: Any) -> None:
    """Fold one node into the one before it, or raise _Left and change nothing."""
    if norm.fault:
        raise _Left(norm.fault)
    if attributes(node).get("training_mode", 0) or any(node.output[1:]):
        raise _Left("it is there for training")
    layer = constants.nodes.get(node.input[0])
    if layer is None or layer.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        raise _Left(
            f"it follows {'an input' if layer is None else layer.op_type}, not Conv, ConvTranspose or Gemm"
        )
    if _uses(graph)[node.input[0]] != 1:
        raise _Left(f"what {layer.op_type} gives is used elsewhere, too")
    names = [*layer.input[1:3], ""][:2]
    weight = None if constants.find(names[0])[1] else constants.array(names[0])  # not of one number
    bias = constants.array(names[1], norm.mean.size) if names[1] else None
    if weight is None or (names[1] and bias is None):
        raise _Left(f"weight or bias of {layer.op_type} are computed, not constant")
    norm = replace(norm, eps=float(np.float32(norm.option("eps"))))  # its shortest form is for layers
    own, axis, groups = attributes(layer), 0, 1
    if layer.op_type == "ConvTranspose":
        axis, groups = 1, own.get("group", 1)
    try:
        if layer.op_type == "Gemm":
            axis = 0 if own.get("transB", 0) else 1
            if bias is not None:
                bias = np.broadcast_to(bias, (1, norm.mean.size)).ravel() * own.get("beta", 1.0)
            weight = (weight.astype(np.float64) * own.get("alpha", 1.0)).astype(weight.dtype)
        new, offset = _fold(weight, bias, norm, axis, groups)
    except ValueError as error:
        raise _Left(str(error)) from error
    for attribute in [a for a in layer.attribute if layer.op_type == "Gemm" and a.name in ("alpha", "beta")]:
        layer.attribute.remove(attribute)
    made = [constants.add(graph, f"{norm.name}.folded_{what}", onnx, value)
            for what, value in (("weight", new), ("bias", offset))]  # fmt: skip
    layer.input[:] = [layer.input[0], *made]
    for info in [each for each in graph.value_info if each.name == layer.output[0]]:
        graph.value_info.remove(info)
    layer.output[0] = node.output[0]
    constants.nodes[node.output[0]] = layer
    graph.node.remove(node)


def _drop_unused(graph: Any) -> None:
    """Take out constants, and inputs with values, that nothing uses any more."""
    while True:
        used = _uses(graph)
        held = {each.name for each in graph.initializer}
        for each in [t for t in graph.initializer if not used[t.name]]:
            graph.initializer.remove(each)
        for each in [i for i in graph.input if not used[i.name] and i.name in held]:
            graph.input.remove(each)
        idle = [n for n in graph.node if n.op_type in ("Constant", "Identity")
                and not any(used[o] for o in n.output)]  # fmt: skip
        if not idle:
            return
        for node in idle:
            graph.node.remove(node)


def _compare(source: str, target: str) -> float:
    """The largest difference of two models' outputs on random input, by the largest output."""
    runtime = library("onnxruntime", "comparing the folded model with the original")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    before, after = (runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                     for path in (source, target))  # fmt: skip
    generator, feeds, sizes = np.random.default_rng(0), {}, dict[Any, int]()
    for each in before.get_inputs():
        free = [n or (each.name, i) for i, n in enumerate(each.shape)]  # by name, or by place
        shape = [n if isinstance(n, int) and n > 0 else sizes.setdefault(n, _FREE.get(i, _SIZE))
                 for i, n in enumerate(free)]  # fmt: skip
        feeds[each.name] = _random(generator, each.type, shape)
    worst = 0.0
    for info, old, new in zip(
        before.get_outputs(), before.run(None, feeds), after.run(None, feeds), strict=True
    ):
        a, b = (np.asarray(value, np.float64) for value in (old, new))
        error = float(np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1e-30))
        if not error <= _CLOSE.get(info.type, 0.0):
            raise ValueError(
                f"output {info.name!r} of the folded model differs by {error:.2g} of its largest value"
            )
        worst = max(worst, error)
    return worst


def _random(generator: np.random.Generator, what: str, shape: Sequence[int]) -> Array:
    names = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}
    if what in names:
        return generator.standard_normal(shape).astype(names[what])
    if what == "tensor(bool)":
        return generator.random(shape) < 0.5
    if what in ("tensor(int64)", "tensor(int32)", "tensor(uint8)", "tensor(int8)"):
        return generator.integers(0, 2, shape).astype(what[7:-1])
    raise ValueError(f"an input is {what}, of which no random one is made: fold it without check")


def pairs_of(pairs: Mapping[str, str] | Sequence[Any]) -> list[Pair]:
    """Pairs as they may be given: layer to batch norm, or tuples."""
    expected = "expected pairs of a layer's name and that of the batch norm behind it, or Pair"
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs is {kind(pairs)}, {expected}")
    items = [*(pairs.items() if isinstance(pairs, Mapping) else pairs)]
    for each in items:
        if not isinstance(each, tuple | list) or not 2 <= len(each) <= 4 or {*map(type, each[:2])} != {str}:
            raise TypeError(f"pairs holds {kind(each)}, {expected}")
    return [Pair(*each) for each in items]
