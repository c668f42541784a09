"""ONNX models: their BatchNormalization nodes, read and written by onnx.

Numbers are initializers or Constant nodes, in this file or in one beside it. epsilon and momentum are
float32; momentum weighs the old value, the variance is the population's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from ..typing import Array
from .library import library
from .norms import NOTHING, Norm, filled, vector_of

__all__ = ["IN_FUNCTION", "Constants", "attributes", "graphs", "in_functions", "is_norm", "load", "norm_of",
           "read_onnx", "write_onnx"]  # fmt: skip

_HOPS = 16  # Identity nodes between an initializer and its user


def load(path: str) -> Any:
    """A model, without what lies in other files."""
    onnx = library("onnx", "reading an .onnx file")
    model = onnx.load(path, load_external_data=False)
    if not model.ir_version or not (model.graph.node or model.graph.initializer):
        raise ValueError("it is not an ONNX model: it has no version or no graph")
    return model


def attributes(node: Any) -> dict[str, Any]:
    """The attributes of a node that are single numbers, as Python numbers: float32 in their shortest form."""
    found: dict[str, Any] = {}
    for each in node.attribute:
        if each.type == 1:
            found[each.name] = float(str(np.float32(each.f)))
        elif each.type == 2:
            found[each.name] = each.i
    return found


def is_norm(node: Any) -> bool:
    """Whether a node is ONNX's own batch norm."""
    return node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx")


class Constants:
    """The constant tensors of a graph by name."""

    def __init__(self, graph: Any, folder: str, outer: Constants | None = None) -> None:
        self._folder, self._outer = folder, outer
        self.old = False  # before IR version 4, where each initializer is an input, too
        self.tensors = {each.name: each for each in graph.initializer}
        self.nodes = {output: node for node in graph.node for output in node.output}

    def find(self, name: str) -> tuple[Any, bool]:
        """The TensorProto or Constant node behind a name, or None; and whether it has to be a single number.

        Such a one is expanded to an array, as exporters write the gamma of ``affine=False``.
        """
        one = False
        for _ in range(_HOPS):
            if name in self.tensors:
                return self.tensors[name], one
            node = self.nodes.get(name)
            if node is None:
                return self._outer.find(name) if self._outer else (None, one)
            if node.op_type == "Constant":
                return next((a.t for a in node.attribute if a.name == "value"), node), one
            if node.op_type not in ("Identity", "Expand", "CastLike"):
                break
            one = one or node.op_type != "Identity"
            name = node.input[0]
        return None, one

    def add(self, graph: Any, name: str, onnx: Any, value: Array) -> str:
        """Put a new initializer into the graph; its name."""
        while name in self.tensors or name in self.nodes or any(each.name == name for each in graph.input):
            name += "_"
        tensor = onnx.numpy_helper.from_array(np.array(value, order="C"), name)
        graph.initializer.append(tensor)
        if self.old:
            info = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            graph.input.append(info)
        self.tensors[name] = tensor
        return name

    def embed(self, model: Any) -> None:
        """Take what lies in files beside the model into it."""
        for graph, _ in graphs(model.graph, self, self._folder):
            values = (a.t for node in graph.node for a in node.attribute if a.type == 4)
            for tensor in [*graph.initializer, *values]:
                if tensor.data_location == 1:
                    self._load(tensor)

    def array(self, name: str, channels: int = 1) -> Array | None:
        """The array behind a name; None if that is no constant. One number may stand for all channels."""
        tensor, one = self.find(name)
        if tensor is None:
            return None
        found: Array
        if hasattr(tensor, "dims"):
            found = self._values(name, tensor)
        else:
            lists = [a.floats or [a.f] for a in tensor.attribute if a.name in ("value_floats", "value_float")]
            found = np.array(lists[0] if lists else [], np.float32)
        if one:
            return np.full(channels, found.ravel()[0]) if found.size == 1 else None
        return found

    def _values(self, name: str, tensor: Any) -> Array:
        onnx = library("onnx", "reading an .onnx file")
        if tensor.data_location == 1:
            other = onnx.TensorProto()
            other.CopyFrom(tensor)
            tensor = self._load(other)
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        held = max(len(tensor.raw_data), 8 * max(len(getattr(tensor, field)) for field in _FIELDS))
        if not 0 <= math.prod(tensor.dims) * width <= held:
            raise ValueError(f"{name} claims shape {tuple(tensor.dims)}, but holds {held} bytes")
        array: Array = onnx.numpy_helper.to_array(tensor)
        return array

    def _load(self, tensor: Any) -> Any:
        """Read what lies in a plain file beside the model, as long as it is as long as it claims."""
        onnx = library("onnx", "reading an .onnx file")
        place = {each.key: each.value for each in tensor.external_data}
        location, offset = place.get("location", ""), int(place.get("offset", 0))
        path = os.path.join(self._folder, location)
        inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(self._folder), ""))
        if not location or os.path.isabs(location) or not inside:
            raise ValueError(f"{tensor.name} lies in {location[:80]!r}, expected a file beside the model")
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = int(place.get("length", math.prod(tensor.dims) * width))
        if not os.path.isfile(path) or offset < 0 or size < 0 or os.path.getsize(path) < offset + size:
            raise ValueError(f"{tensor.name} lies in {location[:80]!r}, which is missing or too short")
        with open(path, "rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(size)
        tensor.data_location = 0
        del tensor.external_data[:]
        return tensor


_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data")


def read_onnx(path: str) -> tuple[dict[str, Norm], int]:
    """The batch norms of a model and of its subgraphs, and how many initializers are not theirs."""
    model, folder = load(path), os.path.dirname(os.path.realpath(path))
    norms: dict[str, Norm] = {}
    tensors = 0
    for graph, constants in graphs(model.graph, Constants(model.graph, folder), folder):
        tensors += len(graph.initializer)
        for node in graph.node:
            if is_norm(node):
                norm = norm_of(node, constants, norms)
                norms[norm.name] = norm
    for name in in_functions(model):
        norms[name] = Norm(name, **NOTHING, format="onnx", fault=f"{name!r}: {IN_FUNCTION}")
    theirs = {key for norm in norms.values() for key in norm.keys.values()}
    return norms, max(0, tensors - len(theirs))


IN_FUNCTION = "it is in a function of the model: onnx.inliner.inline_local_functions() takes it out of there"


def in_functions(model: Any) -> list[str]:
    """Names for the batch norms in a model's own functions, whose arrays are those of their callers."""
    return [f"{f.name}/{n.name or n.output[0]}" for f in model.functions for n in f.node if is_norm(n)]


def graphs(graph: Any, constants: Any = None, folder: str = "") -> Iterator[tuple[Any, Any]]:
    """A graph and all within its nodes, of If, Loop and Scan, each with its Constants."""
    yield graph, constants
    for node in graph.node:
        for each in node.attribute:
            for inner in [*([each.g] if each.type == 5 else []), *each.graphs]:
                yield from graphs(inner, Constants(inner, folder, constants), folder)


def norm_of(node: Any, constants: Constants, taken: Container[str]) -> Norm:
    """The batch norm of a node."""
    name = _name(node, taken)
    if len(node.input) < 5:
        raise ValueError(f"node {name!r} has {len(node.input)} inputs, expected X, scale, B, mean and var")
    keys = dict(zip(("gamma", "beta", "mean", "var"), node.input[1:5], strict=True))
    channels = max((v.size for key in keys.values() if (v := constants.array(key)) is not None), default=1)
    found = {role: constants.array(key, channels) for role, key in keys.items()}
    own, fault = attributes(node), ""
    if absent := [keys[role] for role, value in found.items() if value is None]:
        fault = f"{', '.join(absent)} of node {name!r} are computed, expected constants"
    shapes = {None if value is None else value.shape for value in found.values()}
    if not fault and (len(shapes) > 1 or len(next(iter(shapes)) or ()) != 1):
        fault = f"node {name!r} has scale, B, mean and var of shapes {shapes}, expected one shape (C,)"
    if not own.get("spatial", 1):
        fault = f"node {name!r} has spatial=0: statistics of each activation, which are not read"
    vectors: dict[str, Any] = {
        role: None if v is None else vector_of(keys[role], v) for role, v in found.items()
    }
    if fault:
        vectors |= NOTHING
    before = constants.nodes.get(node.input[0])
    reshaped = "its input is reshaped first: may be an instance norm, as exporters write it"
    unsure = reshaped if before is not None and before.op_type == "Reshape" else ""
    norm = Norm(name, **vectors, format="onnx", keys=keys, fault=fault, unsure=unsure)
    return norm.said(
        eps=own.get("epsilon", 1e-5), decay=own.get("momentum", 0.9), running_ddof=0, channel_axis=1
    )


def _name(node: Any, taken: Container[str]) -> str:
    """What the exporter's source called it, if the names of its arrays tell; else the node's name."""
    arrays = [
        name.removesuffix(".running_mean") for name in node.input[3:4] if name.endswith(".running_mean")
    ]
    names = [*arrays, node.name, *node.output[:1]]
    return next((n for n in names if n and n not in taken), f"{node.output[0]}_")


def write_onnx(path: str, norms: Mapping[str, Norm], names: str) -> None:
    """The norms as a model of BatchNormalization nodes of images, one beside the other."""
    onnx = library("onnx", "writing an .onnx file")
    helper, nodes, inputs, outputs, tensors = onnx.helper, [], [], [], []
    for name, norm in norms.items():
        values = {**filled(norm), "mean": norm.mean, "var": norm.var}
        kind = helper.np_dtype_to_tensor_dtype(norm.mean.dtype)
        own = [f"{name}.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
        tensors += [onnx.numpy_helper.from_array(v, n) for n, v in zip(own, values.values(), strict=True)]
        ends, shape = (f"{name}.x", f"{name}.y"), ["N", norm.mean.size, "H", "W"]
        options = {"epsilon": norm.option("eps"), "momentum": norm.option("decay")}
        nodes.append(helper.make_node("BatchNormalization", [ends[0], *own], ends[1:], name=name, **options))
        inputs.append(helper.make_tensor_value_info(ends[0], kind, shape))
        outputs.append(helper.make_tensor_value_info(ends[1], kind, shape))
    graph = helper.make_graph(nodes, "batch norms", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, path)
