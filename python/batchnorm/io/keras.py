"""Keras' files: .keras, .weights.h5, and the whole models of Keras 2 in .h5; read and written by h5py.

The variables of a layer are called "0" to "3". Only the configuration in a .keras file tells whether the
first one is gamma or beta, and which eps and axis a layer has.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..settings import kind
from ..typing import Array
from .library import library
from .norms import NOTHING, Norm, find, vectors_of

__all__ = ["read_keras", "write_keras"]

_INFLATED = 2**26  # bytes that may be more than the file has
_OBJECTS, _DEPTH = 200_000, 50
_SAID = {"eps": "epsilon", "decay": "momentum", "channel_axis": "axis"}
# An attribute of our own beside a layer's variables: its configuration, as far as known.
_ENTRY = "batchnorm"
_KERAS = {"scale": True, "center": True, "renorm": False}
_MATTERS = (*_SAID.values(), "scale", "center", "renorm")
_LAYER = re.compile(r"(?:^|[_/])(?:batch_?norm(?:alization)?|bn)(?:_?\d+)?(?:$|/)", re.I)


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Lazy:
    """A dataset whose values are read when they are asked for, if they are in this file."""

    def __init__(self, dataset: Any, room: int) -> None:
        self._dataset, self._room = dataset, room
        self.shape = tuple(dataset.shape or ())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        data = self._dataset
        if data.external or data.is_virtual:
            raise ValueError(f"{data.name} lies in another file, and other files are never read")
        bfloat16 = data.dtype == "V2"  # as Keras writes them
        if (data.dtype.kind != "f" and not bfloat16) or data.size * data.dtype.itemsize > self._room:
            got = f"{data.name} has shape {self.shape} of {data.dtype}"
            raise ValueError(f"{got}, expected floating numbers that fit the file")
        array: Array = np.asarray(data[()])
        if bfloat16:
            array = array.view(library("ml_dtypes", f"reading {data.name}").bfloat16)
        return array if dtype is None else array.astype(dtype)


def read_keras(path: str) -> tuple[dict[str, Norm], int]:
    """The batch norms of a file, and how many variables are not theirs."""
    size = os.path.getsize(path)
    h5py = library("h5py", "reading a file of Keras")
    with open(path, "rb") as file:
        start = file.read(8)
        if start.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(file) as archive:
                config = json.loads(_member(archive, "config.json", size).read())
                content: Any = _member(archive, "model.weights.h5", size)
        elif start == b"\x89HDF\r\n\x1a\n":
            config, content = None, file
        else:
            raise ValueError(f"it is no file of Keras (it starts with {start!r})")
        try:
            with h5py.File(content, "r") as store:
                strings = functools.partial(_strings_of, h5py, content)
                return _read(store, h5py, config, strings, size + _INFLATED)
        except OSError as error:
            raise ValueError(f"HDF5: {error}") from error


def _member(archive: zipfile.ZipFile, name: str, size: int) -> Any:
    """A member as a file: of what is stored as it is, a part of the archive's file."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"it has no {name}, expected a .keras file of Keras 3") from None
    if info.file_size > size + _INFLATED or info.compress_size > size:
        raise ValueError(f"{name} claims {info.file_size} bytes in a file of {size}, too many to unpack")
    with archive.open(info) as member:
        if info.compress_type == zipfile.ZIP_STORED and name != "config.json":
            file: Any = archive.fp
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            return _Part(file, start, info.file_size)
        return io.BytesIO(member.read(size + _INFLATED))


def _read(store: Any, h5py: Any, config: Any, strings: Any, room: int) -> tuple[dict[str, Norm], int]:
    """The norms of an open file, of Keras 3 or of Keras 2."""
    datasets = dict(_datasets(store, h5py, ""))
    if config is None and (text := strings(store).get("model_config")):
        config = json.loads(text)
    known: dict[str, Mapping[str, Any]] = {}
    ambiguous, configurations = set[str](), Counter[str]()
    for name, each in _configurations(config):
        configurations[name] += 1
        if {k: each.get(k) for k in _MATTERS} != {k: known.get(name, each).get(k) for k in _MATTERS}:
            ambiguous.add(name)
        known[name] = each
    groups: dict[str, dict[str, Any]] = {}
    for path, dataset in datasets.items():
        place, _, last = path.rpartition("/")
        if last.isdecimal() and place.endswith("vars") and not place.startswith("optimizer"):
            groups.setdefault(place, {})[last] = _Lazy(dataset, room)
    norms: dict[str, Norm] = {}
    whose: dict[str, list[str]] = {}
    for place, variables in groups.items():
        path = place.removesuffix("/vars")
        own = strings(store[place])
        name = own.get("name", path)
        configured = json.loads(own[_ENTRY]) if config is None and _ENTRY in own else known.get(name)
        if configured is not None and not isinstance(configured, Mapping):
            raise ValueError(f"{place}: attribute {_ENTRY!r} is {kind(configured)}, expected a mapping")
        if norm := _of_variables(name if name not in norms else path, path, variables, configured):
            norms[norm.name] = norm
            whose.setdefault(name, []).append(norm.name)
    if not groups:  # Keras 2
        lazy = {path: _Lazy(d, room) for path, d in datasets.items() if not path.startswith("optimizer")}
        for path, norm in find(lazy, "keras").items():
            name = path.rpartition("/")[2]
            title = path if name in norms else name
            norms[title] = _with(norm, title, known.get(name))
            whose.setdefault(name, []).append(title)
    for name, titles in whose.items():
        if name in ambiguous or len(titles) > configurations[name] > 0:  # some are in layers that say nothing
            fault = f"{name!r} is the name of several batch norms with other options"
            norms |= {title: replace(norms[title], fault=fault) for title in titles}
    return norms, len(datasets) - sum(len(norm.keys) for norm in norms.values())


def _datasets(group: Any, h5py: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """All datasets by their path; links to other files are refused, links in circles end."""
    todo, seen = [(prefix, group, 0)], 0
    while todo:
        prefix, group, depth = todo.pop(0)
        for key in sorted(group, key=lambda key: (len(key), key)):
            seen += 1
            path = f"{prefix}{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise ValueError(f"{path[:80]} is a link, and other files are never read")
            if seen > _OBJECTS or depth > _DEPTH:
                raise ValueError(f"it has more than {_OBJECTS} objects, or {_DEPTH} levels of them")
            item = group[key]
            if isinstance(item, h5py.Dataset):
                yield path, item
            elif isinstance(item, h5py.Group):
                todo.append((f"{path}/", item, depth + 1))


# ---- attributes --------------------------------------------------------------------------------------------

# HDF5 takes as much memory as the length of a string claims, up to 4 GB, before it looks for the string. So
# strings are read here, of object headers of version 1, which h5py writes unless it is asked for others. The
# numbers are those of the HDF5 File Format Specification, version 3, sections III.E, IV.A.1.a, IV.A.2.m, q.
_MESSAGES, _HEADER = 1000, 2**16
_CONTINUATION, _ATTRIBUTE, _VLEN = 16, 12, 9


def _strings_of(h5py: Any, file: Any, item: Any) -> dict[str, str]:
    return _strings(file, h5py.h5o.get_info(item.id).addr)


def _strings(file: Any, address: int) -> dict[str, str]:
    """The attributes of an object that are strings of any length, by name."""
    found: dict[str, str] = {}
    version, *_, size = struct.unpack("<BxHIL", _bytes_at(file, address, 12))
    blocks, count = [(address + 16, size)] if version == 1 else [], 0
    while blocks:
        start, size = blocks.pop()
        block, at = _bytes_at(file, start, min(size, _HEADER)), 0
        while at + 8 <= len(block) and count < _MESSAGES:
            kind, length = struct.unpack_from("<HH", block, at)
            data = block[at + 8 : at + 8 + length]
            at, count = at + 8 + length, count + 1
            if kind == _CONTINUATION:
                blocks.append(struct.unpack_from("<QQ", data))
            elif kind == _ATTRIBUTE and (entry := _attribute(file, data)):
                found[entry[0]] = entry[1]
    return found


def _attribute(file: Any, data: bytes) -> tuple[str, str] | None:
    """Name and value of an attribute message, if that is one string of any length."""
    version, *sizes = struct.unpack_from("<BxHHH", data)
    at, parts = 9 if version == 3 else 8, []
    for size in sizes:
        parts.append(data[at : at + size])
        at += size if version > 1 else -(-size // 8) * 8
    name, kind, _ = parts
    if not kind or kind[0] & 15 != _VLEN or len(data) < at + 16:
        return None
    length, heap, index = struct.unpack_from("<LQL", data, at)
    return name.rstrip(b"\0").decode(), _heap_object(file, heap, index, length)


def _heap_object(file: Any, heap: int, index: int, length: int) -> str:
    """A string of a global heap: a row of objects, each after its index and size."""
    signature, size = struct.unpack("<4s4xQ", _bytes_at(file, heap, 16))
    at, end = heap + 16, heap + size
    for _ in range(_MESSAGES * 10):
        if signature != b"GCOL" or at + 16 > end:
            break
        number, held = struct.unpack("<H6xQ", _bytes_at(file, at, 16))
        if number == index:
            return _bytes_at(file, at + 16, min(length, held)).decode()
        at += 16 + -(-held // 8) * 8
    raise ValueError("an attribute is damaged: its string is not where it says")


def _bytes_at(file: Any, start: int, size: int) -> bytes:
    if start + size > file.seek(0, os.SEEK_END):  # before memory is taken
        raise ValueError("an attribute is damaged: it lies beyond the end of the file")
    file.seek(start)
    data: bytes = file.read(size)
    return data


# ---- layers ------------------------------------------------------------------------------------------------


def _configurations(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration of each batch norm by its layer's name, however deep in models and wrappers."""
    todo = [config]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            own = item.get("config")
            named = str(item.get("class_name", "")).endswith("BatchNormalization")
            if isinstance(own, Mapping) and (named or "moving_variance_initializer" in own):
                yield str(own.get("name")), own
            todo += item.values()
        elif isinstance(item, list):
            todo += item


def _of_variables(name: str, path: str, variables: dict[str, Any], known: Any) -> Norm | None:
    """The batch norm that a layer's numbered variables are, if they are one.

    A .keras file says nothing of layers that a layer or a model of other classes has made for itself.
    """
    values = [variables[key] for key in sorted(variables, key=int)]
    alike = len({value.shape for value in values}) == 1 and len(values[0].shape) == 1
    named = bool(_LAYER.search(name) or _LAYER.search(path))
    if not alike or (known is None and not (named or len(values) in (3, 4))):
        return None
    count = len(values) - (3 if len(values) > 4 else 0)  # renormalisation has three more
    guess = {"scale": count > 2, "center": count > 3, "renorm": len(values) > 4}
    own = guess if known is None else {**_KERAS, **known}
    scale, center, renorm = (bool(own[name]) for name in guess)
    names = ["gamma"] * scale + ["beta"] * center + ["mean", "var"]
    if len(values) != len(names) + 3 * renorm:
        got = f"{path} has {len(values)} variables"
        fault = f"{got}, expected {len(names) + 3 * renorm}, as its configuration says"
        return Norm(name, **NOTHING, format="keras", fault=fault)
    keys = {n: f"{path}/vars/{i}" for i, n in enumerate(names)}
    vectors, fault = vectors_of({n: (keys[n], values[i]) for i, n in enumerate(names)})
    if known is None and count == 3:
        vectors = {role: v for role, v in vectors.items() if role != "gamma"}
        what = "one variable beside mean and variance, gamma or beta"
        fault = fault or f"{path} has {what}, which its configuration tells, and that is not here"
    unsure = "" if known is not None or named else "vectors of one length are all that is known of it"
    other = {"renorm": True} if renorm else {}
    return _with(Norm(name, **vectors, format="keras", keys=keys, unsure=unsure, fault=fault, other=other,
                      running_ddof=0), name, known)  # fmt: skip


def _with(norm: Norm, name: str, known: Any) -> Norm:
    """A norm with what the configuration says."""
    options = {n: known[theirs] for n, theirs in _SAID.items() if theirs in (known or {})}
    return norm.said(name=name, running_ddof=0, **options)


def write_keras(path: str, norms: Mapping[str, Norm], names: str) -> None:
    """The norms as the weights of a model of batch norms, in this order: `model.load_weights` takes them."""
    h5py = library("h5py", "writing a .weights.h5 file")
    with h5py.File(path, "w") as store:
        store.create_group("vars").attrs["name"] = "model"
        for i, (name, norm) in enumerate(norms.items()):
            group = store.create_group(f"layers/batch_normalization{f'_{i}' if i else ''}/vars")
            group.attrs["name"] = name or "batch_normalization"
            own = {n: v for n in ("gamma", "beta") if (v := getattr(norm, n)) is not None}
            said = {ours: getattr(norm, n) for n, ours in _SAID.items() if getattr(norm, n) is not None}
            group.attrs[_ENTRY] = json.dumps({"scale": "gamma" in own, "center": "beta" in own, **said})
            for j, value in enumerate([*own.values(), norm.mean, norm.var]):
                group.create_dataset(str(j), data=value)
