"""State files: what is written is read bit for bit; all else is refused, with a reason."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import stat
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from batchnorm.io import npz
from batchnorm.io.npz import read_arrays, write_arrays
from hypothesis import given
from hypothesis import strategies as st

from support.archives import STATE, C, archive, in_directory, members, npy, same_arrays
from support.refusals import MOST_SECONDS


def saved(folder, state=STATE):
    path = folder / "state.npz"
    write_arrays(path, state)
    return path


def refused(path, match, error=ValueError):
    """Reading fails soon, with the reason and the file's name."""
    start = time.process_time()
    with pytest.raises(error, match=match) as caught:
        read_arrays(path)
    assert time.process_time() - start < MOST_SECONDS
    assert os.path.basename(path) in str(caught.value)


# ---- what is written ---------------------------------------------------------------------------------------


def test_other_tools_can_read_the_file(tmp_path):
    with np.load(saved(tmp_path), allow_pickle=False) as file:
        assert same_arrays(dict(file), STATE)
    with zipfile.ZipFile(tmp_path / "state.npz") as file:
        assert file.testzip() is None
        assert file.namelist() == [f"{name}.npy" for name in STATE]


def test_files_of_numpy_and_zipfile_can_be_read(tmp_path):
    np.savez(tmp_path / "numpy.npz", **STATE)
    np.savez_compressed(tmp_path / "compressed.npz", **STATE)
    archive(tmp_path / "zip.npz", members())
    noise = np.random.default_rng(0).normal(size=(1000, 700)).astype(np.float32)
    large = {"zeros": np.zeros(2**20), "noise": noise}
    np.savez_compressed(tmp_path / "large.npz", **large)
    for name in ("numpy.npz", "compressed.npz", "zip.npz"):
        assert same_arrays(read_arrays(tmp_path / name), STATE)
    assert same_arrays(read_arrays(tmp_path / "large.npz"), large)


def test_the_bytes_depend_on_the_arrays_alone(tmp_path):
    first = saved(tmp_path).read_bytes()
    os.utime(tmp_path / "state.npz", (0, 0))
    write_arrays(tmp_path / "again", read_arrays(tmp_path / "state.npz"))
    assert (tmp_path / "again").read_bytes() == first


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("plain", pathlib.Path("with.npz"), "tüpfel ☃.npz", str(tmp_path / ("n" * 255))):
        write_arrays(path, STATE)
        assert same_arrays(read_arrays(path), STATE)
    for path in (b"bytes", 3, None, ["list"]):
        for call in (lambda p: write_arrays(p, STATE), read_arrays):
            with pytest.raises(TypeError, match=r"path is .+, expected str or os.PathLike"):
                call(path)


def test_permissions_are_those_of_any_new_file(tmp_path):
    path = saved(tmp_path)
    (tmp_path / "other").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    write_arrays(tmp_path / "link", STATE)
    assert (tmp_path / "link").is_symlink()
    assert same_arrays(read_arrays(tmp_path / "deep" / "file"), STATE)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = saved(tmp_path)
    old, before = path.read_bytes(), os.listdir(tmp_path)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(npz.os, step, fail)
        with pytest.raises(type(error)):
            write_arrays(path, {"other": np.ones(3)})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == before  # no temporary file is left


def test_where_a_file_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name, error, match in (
        (".", IsADirectoryError, "expected the name of a file, this is a folder"),
        ("missing/layer", FileNotFoundError, "No such file.*missing.layer'$"),
        ("file/layer", NotADirectoryError, "Not a directory.*file.layer'$"),
        ("pipe", ValueError, "pipe' is not a regular file"),
    ):
        with pytest.raises(error, match=match):
            write_arrays(tmp_path / name, STATE)
        refused(tmp_path / name, match, error)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_only_arrays_that_can_be_read_are_written(tmp_path):
    for value in (np.ones(2, object), np.ones(2, complex), np.ones(2, bool), np.array(["b"], "S1")):
        with pytest.raises(TypeError, match=r"gamma has dtype .*, a state file holds real numbers and str"):
            write_arrays(tmp_path / "bad", {"gamma": value})
    with pytest.raises(ValueError, match="larger than the 2146435072 bytes"):
        write_arrays(tmp_path / "bad", {"gamma": np.broadcast_to(np.float32(0), 2**29)})
    assert os.listdir(tmp_path) == []


def test_arrays_of_any_form_come_back(tmp_path):
    entries = {
        "zero": np.empty(0, np.float32),
        "scalar": np.array(1.5),
        "strided": np.arange(10, dtype=np.float64)[::-3],
        "matrix": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "swapped": np.arange(3, dtype=">f4"),
        "half": np.ones(3, np.float16),
        "text": np.array("relu"),
        "texts": np.array(["a", "ä☃"], ">U2"),
    }
    write_arrays(tmp_path / "any", entries)
    expected = {name: value.astype(value.dtype.newbyteorder("=")) for name, value in entries.items()}
    got = read_arrays(tmp_path / "any")
    assert same_arrays(got, expected)
    assert all(value.flags.writeable and value.flags.c_contiguous for value in got.values())


# ---- what is refused: other things than states -------------------------------------------------------------


OTHER_FILES = {
    "empty": (b"", "the file is empty"),
    "text": (b"gamma = 1.0\nbeta = 0.0\n" * 100, r"it is not an .npz state \(it starts with b'gamma = '\)"),
    "zeros": (bytes(4096), "it is not an .npz state"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(2000), r"it is not an .npz state \(it starts with b'.x89HDF"),
    "one array": (npy(np.ones(C, np.float32)), "a single .npy array, not an .npz of named arrays"),
    "zip start": (b"PK\x03\x04", "truncated or damaged"),
    "zip end": (b"PK\x05\x06" + bytes(5), "truncated or damaged"),
}


@pytest.mark.parametrize(("content", "match"), OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_files_of_another_kind(tmp_path, content, match):
    (tmp_path / "other.npz").write_bytes(content)
    refused(tmp_path / "other.npz", match)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def object_array(bait, shape):
    content, array = io.BytesIO(), np.full(shape, None, object)
    array[...] = bait
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def dumps(bait, protocol=None):
    return pickle.dumps(bait, protocol)


OBJECTS = r"it is an object array \(a pickle\), and pickles are never read"
# What has bait in it: a file's bytes, or an archive's members.
PICKLES = {
    **{f"protocol {n}": (lambda b, n=n: dumps(b, n), "looks like a pickle" if n > 1 else "is not an .npz")
       for n in range(pickle.HIGHEST_PROTOCOL + 1)},
    **{f"{name} {shape}": (lambda b, name=name, shape=shape: members(**{name: object_array(b, shape)}),
                           f"member '{name}.npy': {OBJECTS}")
       for name, shape in (("gamma", (C,)), ("num_updates", ()), ("extra", (1,)))},
    "torch": (lambda b: {"archive/data.pkl": dumps(b), "archive/version": b"3\n"},
              "member name 'archive/data.pkl' is not allowed, expected one like 'gamma.npy'"),
    "member": (lambda b: members(gamma=dumps(b)), "member 'gamma.npy': the magic string is not correct"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "match"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_is_never_read(tmp_path, make, match):
    canary, path = tmp_path / "canary", tmp_path / "state.npz"
    content = make(Canary(canary))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        archive(path, content)
    refused(path, match)
    assert not canary.exists()
    pickle.loads(dumps(Canary(canary))).close()
    assert canary.exists()  # the bait was real


# ---- damage ------------------------------------------------------------------------------------------------


def test_every_truncation_is_refused(tmp_path):
    path = saved(tmp_path)
    size = path.stat().st_size
    for length in range(size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=r"truncated|damaged|not an .npz state|empty"):
            read_arrays(path)


@pytest.mark.parametrize("writer", ["save", "savez", "savez_compressed"])
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, writer):
    """Harmless is what says nothing of the arrays, such as dates; every byte of a stored array is checked."""
    path, state = saved(tmp_path), STATE
    if writer != "save":
        getattr(np, writer)(path, **state)
    good = path.read_bytes()
    arrays = set()  # the positions of their bytes
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            start = info.header_offset + 30 + sum(struct.unpack_from("<2H", good, info.header_offset + 26))
            arrays |= set(range(start, start + info.compress_size))
    with open(path, "r+b", buffering=0) as file:
        for position in range(0, len(good), 1 if writer == "save" else 3):
            flip = 0xFF if position % 9 == 0 else 1 << position % 9 - 1
            os.pwrite(file.fileno(), bytes([good[position] ^ flip]), position)
            try:
                assert same_arrays(read_arrays(path), state)
                assert position not in arrays or writer == "savez_compressed"  # deflate has spare bits
            except ValueError as error:
                assert str(error).startswith(f"cannot read {str(path)!r}: ")
            os.pwrite(file.fileno(), good[position : position + 1], position)
    assert path.read_bytes() == good


def test_surplus_bytes_are_refused(tmp_path):
    path = saved(tmp_path)
    good = path.read_bytes()
    for content in (good + b"\0", good + good, b"PK\x03\x04" + good, b"#!/bin/sh\n" + good):
        path.write_bytes(content)
        refused(path, r"damaged|not an .npz state|contradicts")


@given(data=st.data())
def test_any_damage_is_a_value_error_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.npz"
    state = STATE
    write_arrays(path, state)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 40))
        content[start : start + length] = data.draw(st.binary(max_size=40))
    path.write_bytes(content)
    try:
        assert same_arrays(read_arrays(path), state)
    except ValueError as error:
        assert "fuzz.npz" in str(error)


# ---- hostile zip archives ----------------------------------------------------------------------------------


def peak_memory(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused_without_memory(path, match, bound=2**20):
    def load():
        with pytest.raises(ValueError, match=match):
            read_arrays(path)

    refused(path, match)
    assert peak_memory(load) < bound


def zeros(n, there=None):
    """A .npy member that claims n float32, of which so many bytes are there."""
    return npy(shape=(n,), data=bytes(4 * n if there is None else there))


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
GAMMA, BETA = "gamma.npy", "beta.npy"
PACKED, SIZE, START = 20, 24, 42  # where a directory entry has the member's sizes, and where it begins
TOO_MANY = r"claims \d{8,10} bytes in a file of \d{4,5}, too many to unpack"
# A member, its compression, what is then written into the directory, and why that is refused. Only what the
# directory claims is ever unpacked, and memory is only taken for what is there.
LIES = [
    *((zeros(2**18), method, [], rf"'gamma.npy' has compression {method}, expected 0 or 8 \(deflate\)")
      for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    (zeros(2**24 + 2**20), DEFLATED, [], TOO_MANY),
    (zeros(2**22), DEFLATED, [(GAMMA, SIZE, "<I", 128 + 4 * C)], "member 'gamma.npy': Bad CRC-32"),
    (zeros(2**22, 64), DEFLATED, [(GAMMA, SIZE, "<I", 128 + 2**24)], "member 'gamma.npy': "),
    (zeros(2**29, 64), STORED, [], r"shape \(536870912,\) of float32, 2147483648 bytes, but holds 64 "),
    (zeros(2**29, 64), STORED, [(GAMMA, SIZE, "<I", 128 + 2**31)], TOO_MANY),
    (zeros(2**29, 64), STORED, [(GAMMA, PACKED, "<I", 128 + 2**31)], r"\d{10} bytes do not fit its \d{4} "),
    *((STATE["gamma"], STORED, [(GAMMA, SIZE, "<I", size)], "member 'gamma.npy': ")
      for size in (0, 100, 127, 128, 147, 149, 10**6)),  # 148 is right
    # The overlapping kind of bomb: many directory entries for one piece of data.
    (STATE["gamma"], STORED, [(BETA, START, "<I", 0)], "directory 'beta.npy' and header b'gamma.npy' differ"),
    (STATE["gamma"], STORED, [(BETA, START, "<I", 0), (BETA, PACKED, "<I", 5000)], "bytes do not fit"),
    (STATE["gamma"], STORED, [(BETA, START, "<I", 2**32 - 2)], "bytes do not fit"),
    *((STATE["gamma"], STORED, [(GAMMA, *change)], match) for *change, match in (
        (8, "<H", 1, "'gamma.npy'.* is encrypted"),
        (8, "<H", 1 << 5, "patched data"),
        (8, "<H", 1 << 6, "encryption"),
        (6, "<H", 99, "zip file version 9.9"),
        (10, "<H", 8, "member 'gamma.npy': "),  # stored data that claims to be deflated
        (10, "<H", 99, "'gamma.npy' has compression 99, expected 0 or 8"),
        (16, "<I", 0, "Bad CRC-32"),
        (28, "<H", 8, "damaged|magic number|not allowed"),
        (30, "<H", 55, "damaged|extra|magic number"),
        (32, "<H", 54, "its directory has 5 members, not 6"),  # the comment swallows beta
        (46, "<B", 0, "not allowed"),
        (46, "<B", ord("h"), "File name in directory 'hamma.npy' and header b'gamma.npy' differ"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("gamma", "method", "changes", "match"), LIES, ids=range(len(LIES)))
def test_an_archive_that_lies(tmp_path, gamma, method, changes, match):
    path = archive(tmp_path / "lies.npz", members(gamma=gamma), method)
    for change in changes:
        in_directory(path, *change)
    refused_without_memory(path, match)


@pytest.mark.parametrize("count", [65, 5000, 65535])
def test_thousands_of_members(tmp_path, count):
    path = archive(tmp_path / "many.npz", {f"m{i}.npy": b"" for i in range(min(count, 5000))})
    with open(path, "r+b") as file:  # the counts in the end record
        file.seek(-22 + 8, os.SEEK_END)
        file.write(struct.pack("<HH", count, count))
    refused_without_memory(path, rf"it has {count} members, a state has at most 64")
    with open(path, "r+b") as file:
        file.seek(-22 + 8, os.SEEK_END)
        file.write(struct.pack("<HH", 11, 11))
    refused_without_memory(path, r"end record does not fit the file|directory has 65 members, not 11")


def test_a_second_directory_in_zip64_form(tmp_path):
    """A zip64 locator would make zipfile read a directory other than the one that is checked."""
    path = archive(tmp_path / "many.npz", {f"m{i}.npy": b"" for i in range(5000)})
    content = path.read_bytes()
    count, length, offset = struct.unpack("<HII", content[-12:-2])
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(content) - 22, 1)
    there = len(content) - 22 + len(end64) + len(locator)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0, 0, 0, there, 0)
    path.write_bytes(content[:-22] + end64 + locator + end)
    with zipfile.ZipFile(path) as file:
        assert len(file.infolist()) == 5000
    refused_without_memory(path, "end record does not fit the file")


@pytest.mark.parametrize("name", ["gamma.npy", "extra.npy", "num_updates.npy"])
def test_duplicate_members(tmp_path, name):
    content = [*members(extra=np.ones(1)).items(), (name, npy(np.ones(C, np.float32)))]
    refused(archive(tmp_path / "twice.npz", content), f"member '{name}' occurs twice")


@pytest.mark.parametrize(
    "name",
    ["../gamma.npy", "/etc/gamma.npy", "..\\gamma.npy", "C:gamma.npy", "a/gamma.npy", "gamma",
     "gamma.npy.exe", ".npy", "gamma.npy ", "gam ma.npy", "gämma.npy", "-rf.npy", "x" * 65 + ".npy",
     "\n.npy", "gamma.npy/"],
)  # fmt: skip
def test_names_that_are_no_plain_names(tmp_path, name):
    path = archive(tmp_path / "names.npz", {**members(gamma=None), name: npy(np.ones(C, np.float32))})
    refused(path, r"member name '.*' is not allowed, expected one like 'gamma.npy'")
    assert os.listdir(tmp_path) == ["names.npz"]


# ---- hostile arrays ----------------------------------------------------------------------------------------


def claim(shape):
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"


PLAIN = claim("(5,)").ljust(117) + "\n"
VECTOR = bytes(4 * C)
BAD_ARRAYS = {
    "1e12 elements": (npy(shape=(10**12,), data=VECTOR), r"claims shape \(1000000000000,\) of float32, 4000"),
    "too few": (npy(shape=(C,), data=VECTOR[:-1]), r"shape \(5,\) of float32, 20 bytes, but holds 19 bytes"),
    "empty member": (b"", "EOF: reading magic string"),
    "text member": (b"1.0, 2.0, 3.0", "the magic string is not correct"),
    "version 3": (npy(shape=(C,), data=VECTOR, version=(3, 0)), r"it has .npy format \(3, 0\), expected"),
    "negative length": (npy(shape=(-C,), data=VECTOR), r"claims shape \(-5,\)"),
    "float length": (npy(header=claim("(5.0,)"), data=VECTOR), "shape is not valid"),
    "400 digits": (npy(shape=(10**399,), data=VECTOR), "'gamma.npy': "),
    "99 axes": (npy(shape=(1,) * 99, data=VECTOR[:4]), "'gamma.npy': "),
    "empty and huge": (npy(shape=(0, 2**62, 2**62)), "'gamma.npy': "),
    "no tuple": (npy(shape=C, data=VECTOR), "shape is not valid"),
    "odd commas": (npy(header=claim("(5,,)"), data=VECTOR), "Cannot parse header"),
    "no keys": (npy(header="{}", data=VECTOR), "Header does not contain the correct keys"),
    "list key": (npy(header="{[]: 2}", data=VECTOR), "'gamma.npy': "),
    "no dict": (npy(header="5", data=VECTOR), "Header is not a dictionary"),
    "code": (npy(header="__import__('os').system('touch canary')", data=VECTOR), "'gamma.npy': malformed"),
    "deep": (npy(header="(" * 450, data=VECTOR), "'gamma.npy': "),
    "deep signs": (npy(header="-" * 450 + "1", data=VECTOR), "'gamma.npy': "),
    "long header": (npy(header=b" " * 5000 + b"\n", data=VECTOR), "EOF: reading array header, expected 5001"),
    "header beyond": (b"\x93NUMPY\x01\x00\xff\x0f{'descr'", "EOF: reading array header, expected 4095"),
    "binary header": (npy(header=bytes(range(128, 256)) + b"\n", data=VECTOR), "'gamma.npy': "),
    "object": (npy(descr="|O", shape=(C,), data=VECTOR), "'gamma.npy': it is an object array"),
    "structured": (npy(descr=[("a", "<f4")], shape=(C,), data=VECTOR), r"has dtype \[\('a', '<f4'\)\]"),
    "subarray": (npy(descr=("<f4", (5,)), shape=(), data=VECTOR), "it has dtype .*, expected real numbers"),
    "no dtype": (npy(descr="no dtype", shape=(C,), data=VECTOR), "'gamma.npy': descr is not a valid dtype"),
    **{
        kind: (npy(descr=kind, shape=(4 * C // width,), data=VECTOR), "has dtype .*, expected real numbers")
        for kind, width in {"|b1": 1, "<c8": 8, "|S4": 4, "|V4": 4, "<M8[s]": 8, "<m8[s]": 8}.items()
    },
    "no width": (npy(descr="<U0", shape=(C,)), "'gamma.npy': "),
}  # fmt: skip


def test_an_array_of_any_order_is_as_good(tmp_path):
    gamma = STATE["gamma"]
    for content in (
        npy(gamma.astype(">f4")),
        npy(order=True, shape=(C,), data=gamma.tobytes()),
        npy(header=PLAIN, data=gamma.tobytes()),
    ):
        path = archive(tmp_path / "order.npz", members(gamma=content))
        assert same_arrays(read_arrays(path), STATE)
    path = archive(tmp_path / "fortran.npz", {"m.npy": npy(order=True, shape=(2, 3), data=bytes(range(24)))})
    expected = np.frombuffer(bytes(range(24)), "<f4").reshape(3, 2).T
    np.testing.assert_array_equal(read_arrays(path)["m"], expected)


@pytest.mark.parametrize(("content", "match"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_are_not_what_they_claim(tmp_path, monkeypatch, content, match):
    monkeypatch.chdir(tmp_path)
    refused_without_memory(archive(tmp_path / "array.npz", members(gamma=content)), match)
    assert os.listdir(tmp_path) == ["array.npz"]
