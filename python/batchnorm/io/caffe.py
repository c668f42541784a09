"""Caffe's .caffemodel: BatchNorm layers and the Scale layers behind them, read by protobuf.

The messages below are the part of Caffe's that is needed; whatever else is in a file is passed over. Blobs
hold sums: mean and variance times the third blob, which is the sum of the weights of all batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..typing import Array
from .library import library
from .norms import Norm

__all__ = ["read_caffe", "write_caffe"]

# Message: fields as "name number type", "+" for repeated ones. Types by descriptor.proto, or messages.
_MESSAGES = {
    "BlobShape": "dim 1 int64+",
    "BlobProto": "num 1 int64, channels 2 int64, height 3 int64, width 4 int64, data 5 float+, "
    "shape 7 BlobShape, double_data 8 double+",
    "BatchNormParameter": "moving_average_fraction 2 float, eps 3 float",
    "ScaleParameter": "axis 1 int32, bias_term 4 bool",
    "LayerParameter": "name 1 string, type 2 string, bottom 3 string+, top 4 string+, blobs 7 BlobProto+,"
    "batch_norm_param 139 BatchNormParameter, scale_param 142 ScaleParameter",
    "NetParameter": "name 1 string, layers 2 bytes+, layer 100 LayerParameter+",
}
_TYPES = {"double": 1, "float": 2, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12}
_DECAY, _EPS = 0.999, 1e-5  # Caffe's defaults


@functools.cache
def _net() -> Any:
    """The class NetParameter."""
    why = "reading and writing a .caffemodel file"
    pb2, pool = (library(f"google.protobuf.{name}", why) for name in ("descriptor_pb2", "descriptor_pool"))
    file = pb2.FileDescriptorProto(name="batchnorm/caffe.proto", package="batchnorm_caffe", syntax="proto2")
    for name, rows in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for row in rows.split(","):
            title, number, kind = row.split()
            many, kind = kind.endswith("+"), kind.rstrip("+")
            field = message.field.add(name=title, number=int(number), label=3 if many else 1)
            field.type = _TYPES.get(kind, 11)
            field.options.packed = many and kind in ("float", "double", "int64")
            if kind not in _TYPES:
                field.type_name = f".batchnorm_caffe.{kind}"
    pools = pool.DescriptorPool()
    pools.Add(file)
    factory = library("google.protobuf.message_factory", why)
    return factory.GetMessageClass(pools.FindMessageTypeByName("batchnorm_caffe.NetParameter"))


def read_caffe(path: str) -> tuple[dict[str, Norm], int]:
    """The batch norms of a file, and how many blobs are not theirs."""
    net = _net()()
    with open(path, "rb") as file:
        net.ParseFromString(file.read())
    if not net.layer:
        old = "it has layers of before 2014: upgrade_net_proto_binary of Caffe renews it" if net.layers else \
            "it is not a .caffemodel: it has no layers"  # fmt: skip
        raise ValueError(old)
    norms: dict[str, Norm] = {}
    used = 0
    for i, layer in enumerate(net.layer):
        if not isinstance(layer.name, str):  # which protobuf lets pass
            raise ValueError(f"layer {i} is called {layer.name!r:.40}, expected text in UTF-8")
        if layer.type == "BatchNorm" and len(layer.blobs) >= 2:
            scale = _scale_after(net.layer, i)
            name = layer.name if layer.name and layer.name not in norms else f"{layer.name}[{i}]"
            norms[name] = _norm(name, layer, scale)
            used += len(layer.blobs) + (0 if scale is None else len(scale.blobs))
    return norms, sum(len(layer.blobs) for layer in net.layer) - used


def _scale_after(layers: Any, i: int) -> Any:
    """The Scale layer that takes what layer i gives, before another layer overwrites or uses that."""
    top = layers[i].top[0] if layers[i].top else None
    for layer in layers[i + 1 :]:
        if top in layer.bottom:
            scales = layer.type == "Scale" and len(layer.bottom) == 1 and len(layer.blobs) >= 1
            return layer if scales and layer.scale_param.axis in (0, 1) else None
    return None


def _norm(name: str, layer: Any, scale: Any) -> Norm:
    mean, var = (_vector(f"{name}, blob {j}", layer.blobs[j]) for j in (0, 1))
    total = float(_vector(f"{name}, blob 2", layer.blobs[2])[0]) if len(layer.blobs) > 2 else 1.0
    if mean.shape != var.shape or not math.isfinite(total):
        raise ValueError(f"{name} has {mean.size} means, {var.size} variances and a factor of {total:g}")
    factor = 0.0 if total == 0 else 1 / total
    own = layer.batch_norm_param
    decay = _shortest(own.moving_average_fraction, _DECAY, own.HasField("moving_average_fraction"))
    vectors: dict[str, Any] = {"mean": mean * factor, "var": var * factor}
    if scale is not None:
        vectors |= {role: _vector(f"{scale.name}, blob {j}", blob) for j, (role, blob) in
                    enumerate(zip(("gamma", "beta"), scale.blobs, strict=False))}  # fmt: skip
        if any(value.shape != mean.shape for value in vectors.values()):
            raise ValueError(f"{scale.name} behind {name} has other shapes, expected {mean.shape}")
    wide = any(blob.double_data for blob in layer.blobs[:2])
    with np.errstate(over="ignore"):
        vectors = {role: value.astype(np.float64 if wide else np.float32) for role, value in vectors.items()}
    eps = _shortest(own.eps, _EPS, own.HasField("eps"))
    updates = _updates(total, decay) if len(layer.blobs) > 2 else None
    norm = Norm(name, **vectors, num_updates=updates, format="caffe", zero_debias=True)
    return norm.said(eps=eps, decay=decay, running_ddof=1, channel_axis=1)


def _shortest(value: float, default: float, there: bool) -> float:
    return float(str(np.float32(value))) if there else default


def _updates(total: float, decay: float) -> int | None:
    """After how many batches the sum of their weights is `total`; None if it is no such sum."""
    if not 0 < decay < 1 or total < 0:
        return None
    left = 1 - total * (1 - decay)
    most = 2**31  # the sum of many weights no longer tells how many
    return most if left <= 1e-7 else round(math.log(left) / math.log(decay))


def _vector(what: str, blob: Any) -> Array:
    data = np.array(blob.double_data or blob.data, np.float64)
    shape = blob.shape.dim or [n for n in (blob.num, blob.channels, blob.height, blob.width) if n]
    if (
        not data.size
        or (shape and math.prod(shape) != data.size)
        or max(shape, default=data.size) != data.size
    ):
        raise ValueError(f"{what} has shape {tuple(shape)} and {data.size} values, expected one per channel")
    return data


def write_caffe(path: str, norms: Mapping[str, Norm], names: str) -> None:
    """The norms as BatchNorm and Scale layers, each with a bottom of its own."""
    net = _net()(name="batch norms")
    for name, norm in norms.items():
        decay = float(norm.option("decay"))
        early = norm.num_updates if norm.zero_debias else None  # else as after infinitely many batches
        total = 1.0 if decay in (0, 1) else (1 - (decay**early if early else 0)) / (1 - decay)
        first = net.layer.add(name=name, type="BatchNorm")
        second = net.layer.add(name=f"{name}/scale", type="Scale")
        first.bottom[:], first.top[:] = [f"{name}/x"], [f"{name}/normalized"]
        second.bottom[:], second.top[:] = first.top, [f"{name}/y"]
        first.batch_norm_param.eps, first.batch_norm_param.moving_average_fraction = norm.option("eps"), decay
        second.scale_param.bias_term = norm.beta is not None
        gamma = np.ones_like(norm.mean) if norm.gamma is None else norm.gamma
        wide = norm.mean.dtype == np.float64
        sums = [v.astype(np.float64) * total for v in (norm.mean, norm.var)]
        for layer, vectors in ((first, [*sums, np.array([total])]), (second, [gamma, norm.beta])):
            for vector in vectors:
                if vector is not None:
                    blob = layer.blobs.add()
                    blob.shape.dim[:] = vector.shape
                    (blob.double_data if wide else blob.data).extend(vector.tolist())
    with open(path, "wb") as file:
        file.write(net.SerializeToString(deterministic=True))
