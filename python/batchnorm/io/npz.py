"""Named arrays in an .npz file: written in one step, read without trust.

``layer_state`` calls `write_arrays` and `read_arrays`. This module knows files and arrays. It does not know
what the names mean. ``zipfile`` and ``numpy.lib.format`` handle the bytes. Three things are added here:

- Every size is checked against the real file before memory is taken for it.
- Nothing is ever unpickled.
- Whatever is wrong with a file is a ValueError that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..settings import kind

if TYPE_CHECKING:
    import zipfile

__all__ = ["failing_as", "path_text", "read_arrays", "replacing", "write_arrays"]

# The record at the end of a zip without comment (APPNOTE 4.3.16): signature, disk, disk, members, members,
# directory size, directory offset, comment size. A zip64 locator may stand before it.
_END = struct.Struct("<4s4H2IH")
_LOCATOR_BYTES = 20

_MAX_MEMBERS = 64  # a layer has about 30
_MAX_DIRECTORY = 256 * _MAX_MEMBERS  # an entry is 46 bytes, its name and an extra field of 20 bytes
_MAX_INFLATED = 2**26  # bytes beyond the size of a compressed file: four vectors of 2^22 float32
_MAX_BYTES = 2**31 - 2**20  # what a zip without zip64 holds, less headers
_MAX_HEADER = 512  # numpy writes 128 bytes
_CHUNK = 2**20

_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\.npy")
_KINDS = "fiuU"  # the dtype kinds that occur: real numbers and short str


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays to `path`. An old file stays whole until the new one is complete.

    Equal arrays give equal bytes: members are stored uncompressed, little-endian, dated 1980.
    """
    for key, value in arrays.items():
        if value.dtype.kind not in _KINDS:
            raise TypeError(f"{key} has dtype {value.dtype}, a state file holds real numbers and str")
    if sum(value.nbytes for value in arrays.values()) > _MAX_BYTES:
        raise ValueError(f"the state is larger than the {_MAX_BYTES} bytes a state file may have")
    import zipfile  # of what the package imports it would take a tenth of the time

    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=False) as archive:
        for key, value in arrays.items():
            info = zipfile.ZipInfo(f"{key}.npy")  # the date of a new ZipInfo is 1980-01-01
            info.create_system = 3  # Unix, wherever this runs
            with archive.open(info, "w") as member:
                little = value.astype(value.dtype.newbyteorder("<"), order="C")
                npy.write_array(member, little, version=(1, 0), allow_pickle=False)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of a new file to write, which becomes `path` at the end, in one step, or goes."""
    name = path_text(path)
    target = os.path.realpath(name)  # a symbolic link keeps pointing, its target is replaced
    temporary = os.path.join(os.path.dirname(target), f".batchnorm-{os.urandom(8).hex()}.tmp")
    try:
        open(temporary, "xb").close()
        mode = os.stat(target if os.path.exists(target) else temporary).st_mode & 0o777
    except OSError as error:
        error.filename = name
        raise
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # that of the old file, whatever a library made of it
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read the named arrays of `path`, in C order and the machine's byte order.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        There is no such file.
    ValueError
        The content is damaged, hostile or something else.
    """
    import zipfile

    name = path_text(path)
    with open(name, "rb") as file, failing_as(f"cannot read {name!r}"):
        size = os.fstat(file.fileno()).st_size
        count = _check_ends(file, size)
        with zipfile.ZipFile(file) as archive:
            _check_members(archive.infolist(), count, size)
            return {info.filename[: -len(".npy")]: _read(archive, info) for info in archive.infolist()}


def path_text(path: object) -> str:
    """`path` as text, if a state may be there: not a folder, a pipe or a device."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"path is {kind(path)}, expected str or os.PathLike of str")
    if os.path.isdir(text):
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file, this is a folder", text)
    # Opening a pipe would wait for ever.
    _require(os.path.isfile(text) or not os.path.exists(text), f"{text!r} is not a regular file")
    return text


def _require(good: bool, otherwise: str) -> None:
    if not good:
        raise ValueError(otherwise)


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Make a ValueError of whatever bad content raises: zipfile, zlib and ast have a dozen types."""
    try:
        yield
    except (MemoryError, OSError, ImportError):  # the machine's fault, not the file's
        raise
    except Exception as error:
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error


def _check_ends(file: IO[bytes], size: int) -> int:
    """Check the first and the last bytes before zipfile reads the directory; return the member count."""
    start = file.read(8)
    _require(size > 0, "the file is empty")
    _require(not start.startswith(b"\x80"), "it looks like a pickle, and pickles are never read")
    _require(not start.startswith(npy.MAGIC_PREFIX), "it is a single .npy array, not an .npz of named arrays")
    zipped = start.startswith((b"PK\x03\x04", b"PK\x05\x06"))
    _require(zipped, f"it is not an .npz state (it starts with {start!r})")
    file.seek(max(0, size - _END.size - _LOCATOR_BYTES))
    tail = file.read()
    record = tail[-_END.size :].rjust(_END.size, b"\0")
    signature, *_, count, length, offset, comment = _END.unpack(record)
    damaged = "the file is truncated or damaged: its end record does not fit the file"
    _require(signature == b"PK\x05\x06" and not comment, damaged)
    _require(count <= _MAX_MEMBERS, f"it has {count} members, a state has at most {_MAX_MEMBERS}")
    zip64 = tail.startswith(b"PK\x06\x07")  # would tell zipfile to trust another record
    _require(not zip64 and length <= _MAX_DIRECTORY and offset + length + _END.size == size, damaged)
    return int(count)


def _check_members(members: list[zipfile.ZipInfo], count: int, size: int) -> None:
    """Check what the directory says of all members together, before any of them is read."""
    held = len(members)
    _require(held == count, f"the file is damaged: its directory has {held} members, not {count}")
    names = [info.orig_filename for info in members]  # zipfile cuts `filename` at a NUL
    for name, info in zip(names, members, strict=True):
        allowed = _MEMBER.fullmatch(name) is not None
        _require(allowed, f"member name {name[:80]!r} is not allowed, expected one like 'gamma.npy'")
        _require(names.count(name) == 1, f"member {name!r} occurs twice")
        known = info.compress_type in (0, 8)  # stored, deflated
        _require(known, f"member {name!r} has compression {info.compress_type}, expected 0 or 8 (deflate)")
    packed, total = (sum(getattr(info, n) for info in members) for n in ("compress_size", "file_size"))
    fits = packed <= size and all(info.header_offset <= size for info in members)
    _require(fits, f"the file is damaged: members of {packed} bytes do not fit its {size} bytes")
    inflated = f"it claims {total} bytes in a file of {size}, too many to unpack"
    _require(total <= size + _MAX_INFLATED, inflated)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """Read one member to its end, where zipfile checks the CRC; memory grows with what is really there."""
    with failing_as(f"member {info.filename!r}"), archive.open(info) as stream:
        head = io.BytesIO(stream.read(_MAX_HEADER))  # a header that claims more ends here
        version = npy.read_magic(head)
        _require(version == (1, 0), f"it has .npy format {version}, expected (1, 0)")
        shape, fortran_order, dtype = npy.read_array_header_1_0(head, max_header_size=_MAX_HEADER)
        _require(not dtype.hasobject, "it is an object array (a pickle), and pickles are never read")
        _require(dtype.kind in _KINDS, f"it has dtype {dtype}, expected real numbers or str")
        claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - head.tell()
        fits = claimed == held and all(n >= 0 for n in shape)
        _require(fits, f"it claims shape {shape} of {dtype}, {claimed} bytes, but holds {held} bytes")
        data = bytearray(head.read())
        while chunk := stream.read(_CHUNK):
            data += chunk
        if dtype.kind == "U":  # CPython raises SystemError for a character beyond Unicode
            data.decode("utf-32-be" if dtype.byteorder == ">" else "utf-32-le")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
        return np.array(array, dtype.newbyteorder("="), order="C")
