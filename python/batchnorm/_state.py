"""State files: a few named arrays in an .npz, written atomically and read without trust.

The layer calls ``write_state`` and ``read_state``; this module knows files and arrays and nothing of what the
names mean. ``zipfile`` and ``numpy.lib.format`` read and write the bytes. What is added here: every size is
checked against the real file before memory is taken for it, nothing is ever unpickled, and whatever is wrong
with a file is a ValueError that names it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import secrets
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from . import _args

# A zip without comment ends with this record (APPNOTE 4.3.16): signature, disk, disk, members, members,
# directory size, directory offset, comment size. Before it there may be a zip64 locator.
_END = struct.Struct("<4s4H2IH")
_LOCATOR_BYTES = 20

_MAX_MEMBERS = 64  # a layer has about a dozen
_MAX_DIRECTORY = 256 * _MAX_MEMBERS  # an entry is 46 bytes, its name and an extra field of 20 bytes
_MAX_INFLATED = 2**26  # in a compressed file, beyond the size of the file: four vectors of 2^22 float32
_MAX_BYTES = 2**31 - 2**20  # what a zip without zip64 holds, less headers
_MAX_HEADER = 512  # numpy writes 128 bytes
_CHUNK = 2**20

_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\.npy")
_KINDS = "fiuU"  # dtype kinds that occur: real numbers and short str
_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def write_state(path: str | os.PathLike[str], entries: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays to `path`; an old file stays whole until the new one is complete.

    Equal arrays give equal bytes: members are stored uncompressed, little-endian, dated 1980.
    """
    name = _path_text(path)
    for key, value in entries.items():
        if value.dtype.kind not in _KINDS:
            raise TypeError(f"{key} has dtype {value.dtype}, a state file holds real numbers and str")
    if sum(value.nbytes for value in entries.values()) > _MAX_BYTES:
        raise ValueError(f"the state is larger than the {_MAX_BYTES} bytes a state file may have")
    target = os.path.realpath(name)  # a symbolic link keeps pointing, its target is replaced
    temporary = os.path.join(os.path.dirname(target), f".batchnorm-{secrets.token_hex(8)}.tmp")
    try:
        file = open(temporary, "xb")
    except OSError as error:
        error.filename = name
        raise
    try:
        with file:
            with zipfile.ZipFile(file, "w", allowZip64=False) as archive:
                for key, value in entries.items():
                    info = zipfile.ZipInfo(f"{key}.npy")  # the date of a new ZipInfo is 1980-01-01
                    info.create_system = 3  # Unix, wherever this runs
                    with archive.open(info, "w") as member:
                        little = value.astype(value.dtype.newbyteorder("<"), order="C")
                        npy.write_array(member, little, version=(1, 0), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_state(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read the named arrays of `path`, in C order and the machine's byte order.

    Raises FileNotFoundError, IsADirectoryError, or ValueError for every kind of bad content.
    """
    name = _path_text(path)
    with open(name, "rb") as file, _failing_as(f"cannot read {name!r}"):
        size = os.fstat(file.fileno()).st_size
        count = _check_ends(file, size)
        with zipfile.ZipFile(file) as archive:
            _check_members(archive.infolist(), count, size)
            return {info.filename[: -len(".npy")]: _read(archive, info) for info in archive.infolist()}


def _path_text(path: str | os.PathLike[str]) -> str:
    """`path` as text, if a state may be there: not a folder, a pipe or a device."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"path is {_args._kind(path)}, expected str or os.PathLike of str")
    if os.path.isdir(text):
        raise IsADirectoryError(errno.EISDIR, "expected the name of a state file, this is a folder", text)
    if os.path.exists(text) and not os.path.isfile(text):  # opening a pipe would wait for ever
        raise ValueError(f"{text!r} is not a regular file")
    return text


@contextlib.contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Make a ValueError of whatever bad content raises: zipfile, zlib and ast have a dozen types."""
    try:
        yield
    except (MemoryError, OSError):  # the machine's fault, not the file's
        raise
    except Exception as error:
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error


def _check_ends(file: IO[bytes], size: int) -> int:
    """Check the first and the last bytes, before zipfile reads the directory; return the member count."""
    if size == 0:
        raise ValueError("the file is empty")
    start = file.read(8)
    if start.startswith(b"\x80"):
        raise ValueError("it looks like a pickle, and pickles are never read")
    if start.startswith(npy.MAGIC_PREFIX):
        raise ValueError("it is a single .npy array, not an .npz of named arrays")
    if not start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise ValueError(f"it is not an .npz state (it starts with {start!r})")
    file.seek(max(0, size - _END.size - _LOCATOR_BYTES))
    tail = file.read()
    record = tail[-_END.size :].rjust(_END.size, b"\0")
    signature, *_, count, length, offset, comment = _END.unpack(record)
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("the file is truncated or damaged: it does not end with a zip end record")
    if count > _MAX_MEMBERS:
        raise ValueError(f"it has {count} members, a state has at most {_MAX_MEMBERS}")
    zip64 = tail.startswith(b"PK\x06\x07")  # would tell zipfile to trust another record
    if zip64 or length > _MAX_DIRECTORY or offset + length + _END.size != size:
        raise ValueError("the file is truncated or damaged: its end record does not fit the file")
    return int(count)


def _check_members(members: list[zipfile.ZipInfo], count: int, size: int) -> None:
    """Check what the directory says of all members together, before any of them is read."""
    if len(members) != count:
        raise ValueError(f"the file is damaged: its directory has {len(members)} members, not {count}")
    names = [info.orig_filename for info in members]  # zipfile cuts `filename` at a NUL
    for name, info in zip(names, members, strict=True):
        if not _MEMBER.fullmatch(name):
            raise ValueError(f"member name {name[:80]!r} is not allowed, expected one like 'gamma.npy'")
        if names.count(name) > 1:
            raise ValueError(f"member {name!r} occurs twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"member {name!r} has compression {info.compress_type}, expected 0 or 8 (deflate)"
            )
    packed = sum(info.compress_size for info in members)
    if packed > size or any(info.header_offset > size for info in members):
        raise ValueError(f"the file is damaged: members of {packed} bytes do not fit its {size} bytes")
    total = sum(info.file_size for info in members)
    if total > size + _MAX_INFLATED:
        raise ValueError(f"it claims {total} bytes in a file of {size}, too many to unpack")


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """Read one member to its end, where zipfile checks the CRC; memory grows with what is really there."""
    with _failing_as(f"member {info.filename!r}"), archive.open(info) as stream:
        head = io.BytesIO(stream.read(_MAX_HEADER))  # a header that claims more ends here
        version = npy.read_magic(head)
        if version not in _HEADER_READERS:
            raise ValueError(f"it has .npy format {version}, expected (1, 0) or (2, 0)")
        shape, fortran_order, dtype = _HEADER_READERS[version](head, max_header_size=_MAX_HEADER)
        if dtype.hasobject:
            raise ValueError("it is an object array (a pickle), and pickles are never read")
        if dtype.kind not in _KINDS:
            raise ValueError(f"it has dtype {dtype}, expected real numbers or str")
        claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - head.tell()
        if claimed != held or any(n < 0 for n in shape):
            raise ValueError(f"it claims shape {shape} of {dtype}, {claimed} bytes, but holds {held} bytes")
        data = bytearray(head.read())
        while chunk := stream.read(_CHUNK):
            data += chunk
        if dtype.kind == "U":  # CPython raises SystemError for a character beyond Unicode
            data.decode("utf-32-be" if dtype.byteorder == ">" else "utf-32-le")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
        return np.array(array, dtype.newbyteorder("="), order="C")
