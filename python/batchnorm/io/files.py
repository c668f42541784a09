"""Model files of any kind: which reader takes one, what is wrong with it, in one step or not at all.

A file's kind follows from its name. Whatever is wrong with a file is a ValueError that names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..settings import word
from .caffe import read_caffe, write_caffe
from .keras import read_keras, write_keras
from .layer_state import reading, save, upgraded
from .norms import FORMATS, AsLayer, Norm, find
from .npz import failing_as, path_text, replacing
from .onnx import read_onnx, write_onnx
from .tensors import read_safetensors, read_torch, write_safetensors, write_torch

__all__ = ["KINDS", "Content", "Kind", "kind_of", "read", "writing"]


class Content(NamedTuple):
    """What is in a file: its batch norms by name, and the number of tensors that are not theirs."""

    kind: str
    norms: dict[str, Norm]
    others: int


class Kind(NamedTuple):
    """A kind of files."""

    endings: tuple[str, ...]
    read: Callable[[str], tuple[dict[str, Norm], int]]
    write: Callable[[str, Mapping[str, Norm], str], None]
    names: str  # the format of its names; empty: any
    holds: str  # beside the vectors, if only for this package; empty: what that format holds


def _read_npz(path: str) -> tuple[dict[str, Norm], int]:
    with reading(path) as state:
        norms = find(upgraded(state), "batchnorm")
        if not norms:
            raise ValueError("it is not the state of a layer, as BatchNorm.save writes it")
        name = str(state.get("name", ""))
        return {name: norms.popitem()[1].said(name=name)}, 0


def _write_npz(path: str, norms: Mapping[str, Norm], names: str) -> None:
    if len(norms) != 1:
        raise ValueError(f"an .npz file holds one layer, and there are {len(norms)}: choose one by its name")
    save(AsLayer(*norms.values()), path)


_ALL = FORMATS["batchnorm"].holds
_KERAS = "eps decay channel_axis"  # in attributes that Keras passes over
KINDS = {
    "safetensors": Kind((".safetensors",), read_safetensors, write_safetensors, "", _ALL),
    "torch": Kind((".pt", ".pth", ".bin", ".ckpt"), read_torch, write_torch, "", ""),
    "keras": Kind((".weights.h5", ".keras", ".h5", ".hdf5"), read_keras, write_keras, "keras", _KERAS),
    "onnx": Kind((".onnx",), read_onnx, write_onnx, "onnx", ""),
    "caffe": Kind((".caffemodel",), read_caffe, write_caffe, "caffe", ""),
    "npz": Kind((".npz",), _read_npz, _write_npz, "batchnorm", f"{_ALL} other"),
}
_kinds = word(*KINDS, none=True)


def kind_of(path: str | os.PathLike[str], kind: str | None = None) -> str:
    """The kind of a file, by its name or as it is said."""
    name = path_text(path)
    if (said := _kinds("kind", kind)) is not None:
        return str(said)
    for each, row in KINDS.items():
        if name.lower().endswith(row.endings):
            return each
    endings = ", ".join(ending for row in KINDS.values() for ending in row.endings)
    raise ValueError(f"path is {name!r}, expected a name that ends in {endings}; or say its kind")


def read(path: str | os.PathLike[str], kind: str | None = None) -> Content:
    """The batch norms of a model file; see :func:`batchnorm.formats.read`."""
    name, chosen = path_text(path), kind_of(path, kind)
    with open(name, "rb") as file, failing_as(f"cannot read {name!r}"):  # no folders, pipes, surprises
        if not file.read(1):
            raise ValueError("the file is empty")
        norms, others = KINDS[chosen].read(name)
    return Content(chosen, norms, others)


def writing(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Call `write` with the name of a file that becomes `path` when all went well."""
    with replacing(path) as temporary:
        write(temporary)
