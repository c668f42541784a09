"""Files that are dictionaries of tensors: .safetensors and PyTorch's .pt.

Reading looks at names and shapes first, and at the values of batch norms alone. Whatever else is in the file
is carried over by `rewrite`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..settings import kind
from ..typing import Array
from .library import library
from .norms import OPTIONS, Norm, arrays_of, find, leaves
from .npz import failing_as

__all__ = ["read_safetensors", "read_torch", "rewrite", "write_safetensors", "write_torch"]

# Options of our layers by name, as JSON in the metadata of a .safetensors file, which others pass over.
_ENTRY = "batchnorm"
_OPTIONS = (*OPTIONS, "zero_debias", "num_updates")


# ---- safetensors -------------------------------------------------------------------------------------------


class _Lazy:
    """A tensor of an open file: its shape is known, its values are read when they are asked for."""

    def __init__(self, file: Any, key: str) -> None:
        self._file, self._key = file, key
        self._slice = file.get_slice(key)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._slice.get_shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if self._slice.get_dtype() == "BF16":  # NumPy gets it from ml_dtypes
            library("ml_dtypes", f"reading {self._key}")
        with failing_as(self._key):  # of 8 bits, which safetensors gives to PyTorch alone
            array: Array = np.asarray(self._file.get_tensor(self._key), dtype)
        return array


def _opened(path: str) -> Any:
    return library("safetensors", "reading a .safetensors file").safe_open(path, framework="numpy")


def read_safetensors(path: str) -> tuple[dict[str, Norm], int]:
    """The batch norms of a file, and how many tensors are not theirs."""
    with _opened(path) as file:
        arrays = {key: _Lazy(file, key) for key in file.keys()}
        norms, said = find(arrays), (file.metadata() or {}).get(_ENTRY)
    options = json.loads(said) if said else {}
    if not isinstance(options, dict) or not all(isinstance(each, dict) for each in options.values()):
        raise ValueError(f"its metadata {_ENTRY!r} is wrong: the options of batch norms are no mapping")
    for name in {*norms} & {*options}:
        own = options[name]
        norms[name] = norms[name].said(**{key: own[key] for key in _OPTIONS if key in own})
    return norms, _others(arrays, norms)


def _others(arrays: Mapping[str, Any], norms: Mapping[str, Norm]) -> int:
    tensors = sum(hasattr(value, "shape") for _, value in leaves(arrays))
    return tensors - sum(len(norm.keys) for norm in norms.values())


def write_safetensors(path: str, norms: Mapping[str, Norm], names: str) -> None:
    """The norms alone, by the names of a format, with their options in the metadata."""
    arrays, whose = dict[str, Array](), dict[str, Norm]()
    for norm in norms.values():
        own = arrays_of(norm, names)
        arrays |= own
        whose |= dict.fromkeys(own, norm)
    found = find(arrays)  # by the names that reading will give them
    _save(path, arrays, {name: whose[norm.keys["mean"]] for name, norm in found.items()})


def _save(path: str, arrays: Mapping[str, Array], norms: Mapping[str, Norm], metadata: Any = None) -> None:
    save_file = library("safetensors.numpy", "writing a .safetensors file").save_file
    known = {
        name: {key: getattr(norm, key) for key in _OPTIONS if getattr(norm, key) is not None}
        for name, norm in norms.items()
    }
    text = {**(metadata or {}), _ENTRY: json.dumps(known)} if norms else metadata
    dense = {key: np.array(value, order="C") for key, value in arrays.items()}  # views are written wrong
    save_file(dense, path, metadata=text or None)


# ---- PyTorch -----------------------------------------------------------------------------------------------


def _loaded(path: str) -> dict[str, Any]:
    """The tensors of a .pt file by their names, mapped into memory, not read."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        raise ValueError("it is a pickle, and pickles are never read: save it anew by PyTorch 1.6 or later")
    if start != b"PK\x03\x04":
        raise ValueError(f"it is not a file of torch.save (it starts with {start!r})")
    with zipfile.ZipFile(path) as archive:  # before torch is asked
        ends = [each.filename.rpartition("/")[2] for each in archive.infolist()]
        packed = any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist())
    if "constants.pkl" in ends:
        remedy = "torch.save(torch.jit.load(path).state_dict(), path)"
        raise ValueError(f"it is a program of TorchScript, expected a state_dict: {remedy}")
    if packed or ends.count("data.pkl") != 1:
        raise ValueError(f"it is not a file of torch.save: {'it is compressed' if packed else 'no data.pkl'}")
    torch = library("torch", "reading a .pt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f"it holds a {what[1]}" if what else "it is damaged, or no file of torch.save"
        remedy = "only tensors are read: use torch.save(model.state_dict(), path)"
        raise ValueError(f"torch.load(weights_only=True) refuses it: {holds}; {remedy}") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"it holds {kind(content)}, expected a state_dict: torch.save(model.state_dict(), path)"
        )
    return dict(content)


def read_torch(path: str) -> tuple[dict[str, Norm], int]:
    """The batch norms of a file, and how many tensors are not theirs."""
    content = _loaded(path)
    norms = find(content)
    return norms, _others(content, norms)


def write_torch(path: str, norms: Mapping[str, Norm], names: str) -> None:
    """The norms alone, by the names of a format."""
    torch = library("torch", "writing a .pt file")
    arrays = (arrays_of(norm, names) for norm in norms.values())
    torch.save({key: torch.from_numpy(value) for each in arrays for key, value in each.items()}, path)


# ---- whole files -------------------------------------------------------------------------------------------


def rewrite(
    source: str, kinds: tuple[str, str], write: Any, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """All tensors of one file in another, after a change of some; `kinds` are "safetensors" or "torch".

    `change` takes and returns a mapping whose values `numpy_of` makes arrays of, and which may hold arrays.
    `write` is called with a function that writes to a path.
    """
    if kinds[0] == "torch":
        tensors, metadata = _loaded(source), {"format": "pt"}  # which some readers insist on
        norms: dict[str, Norm] = {}
        if nested := [key for key, value in tensors.items() if not hasattr(value, "detach")]:
            inner = {len(v): k for k in nested if isinstance(v := tensors[k], Mapping)}
            what = f"torch.load(path)[{inner[max(inner)]!r}]" if inner else "model.state_dict()"
            got = f"it holds {nested[0]!r}, which is {kind(tensors[nested[0]])}"
            raise ValueError(f"{got}, expected tensors alone: torch.save({what}, other_path)")
    else:
        with _opened(source) as file:
            lazy = {key: _Lazy(file, key) for key in file.keys()}
            tensors, metadata = {key: np.asarray(value) for key, value in lazy.items()}, file.metadata()
        norms = read_safetensors(source)[0] if metadata and _ENTRY in metadata else {}
    changed = change(tensors)
    if kinds[1] == "torch":
        torch = library("torch", "writing a .pt file")
        ready = {key: _torch_of(value, torch) for key, value in changed.items()}
        write(lambda path: torch.save(ready, path))
    else:
        left = {name: norm for name, norm in norms.items() if {*norm.keys.values()} <= {*changed}}
        kept = {key: value for key, value in (metadata or {}).items() if key != _ENTRY}
        arrays = {}
        for key, value in changed.items():
            with failing_as(key):
                arrays[key] = numpy_of(value)
        write(lambda path: _save(path, arrays, left, kept))


def numpy_of(value: Any) -> Array:
    """A tensor as an array of its own dtype."""
    if not hasattr(value, "detach"):
        array: Array = np.asarray(value)
        return array
    value = value.detach()
    if str(value.dtype) == "torch.bfloat16":
        bfloat16 = library("ml_dtypes", "bfloat16").bfloat16
        wide: Array = value.float().numpy().astype(bfloat16)
        return wide
    plain: Array = value.numpy()
    return plain


def _torch_of(value: Any, torch: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(value, order="C"))
