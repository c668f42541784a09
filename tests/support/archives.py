"""Arrays as a state has them, and what bad files are made of: members, archives, directory fields."""

from __future__ import annotations

import struct
import warnings
import zipfile

import numpy as np

C = 5
STATE = {
    "gamma": np.arange(C, dtype=np.float32),
    "beta": np.linspace(-1, 1, C, dtype=np.float32),
    "num_values": np.full(C, 72.0),
    "num_updates": np.array(3),
    "eps": np.array(1e-5),
    "activation": np.array("none"),
}


def same_arrays(a, b):
    """Whether two states are equal to the last bit, in the same order."""
    return list(a) == list(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def npy(value=None, *, descr="<f4", order=False, shape=None, data=None, header=None, version=(1, 0)):
    """A .npy file, of an array or of any claims."""
    if value is not None:
        descr, shape, data = value.dtype.str, value.shape, value.tobytes()
    if header is None:
        header = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape!r}, }}"
    if isinstance(header, str):
        header = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header)) + header + (data or b"")


def members(**changes):
    """The members of a good file of STATE, by name; a change is bytes, an array, or None for no member."""
    contents = {f"{name}.npy": npy(value) for name, value in STATE.items()}
    for name, value in changes.items():
        contents[f"{name}.npy"] = npy(value) if isinstance(value, np.ndarray) else value
    return {name: data for name, data in contents.items() if data is not None}


def archive(path, contents, method=zipfile.ZIP_STORED):
    """A zip by the standard library; contents is a dict or, for repeated names, a list of pairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Duplicate name"
        with zipfile.ZipFile(path, "w", method) as file:
            for name, data in contents.items() if isinstance(contents, dict) else contents:
                file.writestr(name, data)
    return path


def in_directory(path, name, offset, form, *values):
    """Overwrite fields of a member's entry in the directory."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, content.rindex(name.encode()) - 46 + offset, *values)
    path.write_bytes(content)
