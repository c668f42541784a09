"""State files: what save writes, load reads bit for bit; all else is refused, with a reason."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import pickle
import stat
import struct
import threading
import time
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from batchnorm import BatchNorm, _state
from hypothesis import given
from hypothesis import strategies as st

# What cold statistics are, and that using them warns, is tested in test_running_schedules.py.
pytestmark = pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")

C = 5
VECTORS = ("gamma", "beta", "running_mean", "running_var")


def images(seed=0, shape=(4, C, 3, 2), dtype=np.float32):
    return (3 + 2 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def trained(*, steps=3, **options):
    layer = BatchNorm(C, **options)
    for step in range(steps):
        layer(images(step))
        layer.backward(images(step + 100))
        for parameter in layer.parameters():
            parameter.value -= 0.01 * parameter.grad
    return layer


def bits(layer):
    """The whole state as bytes, and the settings."""
    return {name: (v.dtype.str, v.shape, v.tobytes()) for name, v in layer.state_dict().items()}, repr(layer)


def same_arrays(a, b):
    return list(a) == list(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def saved(folder, **options):
    path = folder / "layer.npz"
    trained(**options).save(path)
    return path


# ---- the bad files are made of these -----------------------------------------------------------------------


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
    """The members of a good file, by name; a change is bytes, an array, or None for no member."""
    contents = {f"{name}.npy": npy(value) for name, value in trained().state_dict().items()}
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


def refused(path, match, error=ValueError):
    """Loading fails soon, with the reason and the file's name."""
    start = time.process_time()
    with pytest.raises(error, match=match) as caught:
        BatchNorm.load(path)
    assert time.process_time() - start < 0.05
    assert os.path.basename(path) in str(caught.value)


# ---- what save writes --------------------------------------------------------------------------------------


LAYERS = [
    {},
    {"dtype": np.float64},
    {"scale": False},
    {"center": False, "dtype": np.float64},
    {"scale": False, "center": False},
    {"decay": None},
    {"decay": 0.99, "warmup": True, "on_nonfinite": "skip"},
    {"decay": 0.999, "zero_debias": True, "on_nonfinite": "raise", "dtype": np.float64},
    {"renorm": {"rmax": 3.0, "dmax": 5.0}},
    {"renorm": {"decay": 0.75}, "zero_debias": True, "activation": "relu"},
    {"virtual_batch_size": 2, "decay": None},
    {"save_memory": True},
    {"decay": 1 / 3, "eps": 1e-3, "running_ddof": 0, "activation": "relu"},
    {"data_format": "NCHW"},
    {"data_format": "channels_first"},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_save_load_continue_is_bitwise_equal(tmp_path, options):
    path = tmp_path / "layer.npz"
    layer = trained(**options)
    assert layer.save(path) is None
    others = [
        BatchNorm.load(path),
        layer.load(path),  # a new one, too
        trained(steps=1, **options).load_state_dict(BatchNorm.load(path).state_dict()),
    ]
    assert others[1] is not layer
    for step in range(10, 15):
        x, dy = images(step, dtype=layer.dtype), images(step + 100, dtype=layer.dtype)
        for each in (layer, *others):
            y, dx = each(x), each.backward(dy)
            for parameter in each.parameters():
                parameter.value -= 0.1 * parameter.grad
            if each is layer:
                expected = y.tobytes(), dx.tobytes()
            assert (y.tobytes(), dx.tobytes()) == expected
    for other in others:
        assert bits(other) == bits(layer)[:2]
        assert other.eval()(images(3)).tobytes() == layer(images(3), training=False).tobytes()


def test_a_new_layer_has_the_settings_of_the_saved_one(tmp_path):
    layer = trained(
        decay=0.5, eps=0, axis=1, center=False, running_ddof=0, activation="relu", dtype=np.float64
    )
    layer.eval().save(tmp_path / "a")
    loaded = BatchNorm.load(tmp_path / "a")
    assert repr(loaded) == repr(layer).replace("training=False", "training=True")

    assert BatchNorm.load(tmp_path / "a").data_format is None

    class Mine(BatchNorm):
        pass

    assert type(Mine.load(tmp_path / "a")) is Mine


@pytest.mark.parametrize("data_format", ["NC", "NLC", "NCHW", "NHWC", "channels_last"])
def test_the_data_format_is_restored(tmp_path, data_format):
    layer = BatchNorm(C, data_format=data_format)
    layer.save(tmp_path / "layer")
    loaded = BatchNorm.load(tmp_path / "layer")
    assert (loaded.data_format, loaded.axis) == (data_format, layer.axis)
    assert bits(loaded) == bits(layer)
    with pytest.raises(ValueError, match=r"dimensions|num_features"):
        loaded(np.ones((2, 3, 4, 5, 6, 7), np.float32))


def test_the_bytes_depend_on_the_state_alone(tmp_path):
    layer = trained()
    layer.save(tmp_path / "one")
    layer.backward(images(9))
    other = BatchNorm.load(tmp_path / "one").eval()
    os.utime(tmp_path / "one", (0, 0))
    other.save(tmp_path / "two.npz")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_the_format_stays(tmp_path):
    """The digest of a fixed state: it changes with format_version, and with nothing else."""
    layer = BatchNorm(3, decay=0.5, eps=1e-3, axis=-1, activation="relu", dtype=np.float64)
    layer.gamma = np.array([1.0, 2.0, 3.0])
    layer.save(tmp_path / "fixed")
    digest = hashlib.sha256()
    with np.load(tmp_path / "fixed", allow_pickle=False) as file:
        for name, value in file.items():
            digest.update(f"{name} {value.dtype.str} {value.shape} ".encode() + value.tobytes())
    assert digest.hexdigest() == ("3f89abd15ed6ecb67398a9e576579f3a666ba4c1417140cd5ed917ce50ef92c2")


def format_1(layer):
    """The state as it was before schedules: without what they need."""
    names = (*VECTORS, "format_version", "num_updates", "eps", "decay", "axis", "running_ddof")
    state = {name: layer.state_dict()[name] for name in (*names, "activation", "data_format")}
    return {**state, "format_version": np.array(1)}


def test_files_of_format_1_load_and_continue(tmp_path):
    layer = trained(steps=60)
    _state.write_state(tmp_path / "old", format_1(layer))
    loaded = BatchNorm.load(tmp_path / "old")
    assert loaded.initial_weight == 0.9**60 and loaded.num_samples == 0  # it did not know them
    for step in range(3):
        assert loaded(images(step)).tobytes() == layer(images(step)).tobytes()
    for name in VECTORS:
        assert getattr(loaded, name).tobytes() == getattr(layer, name).tobytes()
    assert loaded(images(9), training=False).tobytes() == layer(images(9), training=False).tobytes()
    assert int(loaded.state_dict()["format_version"]) == 2
    damaged = format_1(layer) | {"warmup": np.array(0)}
    _state.write_state(tmp_path / "mixed", damaged)
    refused(tmp_path / "mixed", "unexpected warmup; expected gamma, .*, data_format$")


def test_what_format_1_says_of_statistics_that_were_never_updated(tmp_path):
    new, known = BatchNorm(C), BatchNorm(C)
    known.running_mean, known.running_var = np.full(C, 3, "f4"), np.full(C, 4, "f4")
    for name, layer in (("new", new), ("known", known)):
        _state.write_state(tmp_path / name, format_1(layer))
    with pytest.raises(RuntimeError, match="still the initial ones"):
        BatchNorm.load(tmp_path / "new").eval()(images())
    BatchNorm.load(tmp_path / "known").eval()(images())
    trained_before = trained(steps=60).load_state_dict(format_1(new))
    with pytest.raises(RuntimeError, match="still the initial ones"):
        trained_before.eval()(images())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_other_tools_can_read_the_file(tmp_path, dtype):
    layer = trained(dtype=dtype)
    layer.save(tmp_path / "layer.npz")
    with np.load(tmp_path / "layer.npz", allow_pickle=False) as file:
        assert same_arrays(dict(file), layer.state_dict())
    with zipfile.ZipFile(tmp_path / "layer.npz") as file:
        assert file.testzip() is None
        assert file.namelist() == [f"{name}.npy" for name in layer.state_dict()]


def test_files_of_numpy_and_zipfile_can_be_loaded(tmp_path):
    layer = trained()
    np.savez(tmp_path / "numpy.npz", **layer.state_dict())
    np.savez_compressed(tmp_path / "compressed.npz", **layer.state_dict())
    archive(tmp_path / "zip.npz", members())
    large = {"zeros": np.zeros(2**20), "noise": images(1, (1000, 700))}
    np.savez_compressed(tmp_path / "large.npz", **large)
    for name in ("numpy.npz", "compressed.npz", "zip.npz"):
        assert bits(BatchNorm.load(tmp_path / name)) == bits(layer)
    assert same_arrays(_state.read_state(tmp_path / "large.npz"), large)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = trained()
    for path in ("plain", pathlib.Path("with.npz"), "tüpfel ☃.npz", str(tmp_path / ("n" * 255))):
        layer.save(path)
        assert bits(BatchNorm.load(path)) == bits(layer)[:2]
    for path in (b"bytes", 3, None, ["list"]):
        for call in (layer.save, BatchNorm.load):
            with pytest.raises(TypeError, match=r"path is .+, expected str or os.PathLike"):
                call(path)


def test_permissions_are_those_of_any_new_file(tmp_path):
    path = saved(tmp_path)
    (tmp_path / "other").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    trained().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert bits(BatchNorm.load(tmp_path / "deep" / "file")) == bits(trained())[:2]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = saved(tmp_path)
    old, before = path.read_bytes(), os.listdir(tmp_path)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(_state.os, step, fail)
        with pytest.raises(type(error)):
            trained(steps=9).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == before  # no temporary file is left


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    path = saved(tmp_path)
    layers = [trained(steps=steps) for steps in (1, 2)]
    expected = [bits(layer)[0] for layer in (trained(), *layers)]
    done = threading.Event()

    def write():
        for i in range(25):
            layers[i % 2].save(path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(bits(BatchNorm.load(path))[0])
    writer.join()
    assert all(entries in expected for entries in seen)


def test_where_a_file_cannot_be(tmp_path):
    layer = trained()
    with pytest.raises(IsADirectoryError, match="expected the name of a state file, this is a folder"):
        layer.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing.layer'$"):
        layer.save(tmp_path / "missing" / "layer")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"file.layer'$"):
        layer.save(tmp_path / "file" / "layer")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe' is not a regular file"):
        layer.save(tmp_path / "pipe")
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    path = saved(tmp_path)
    old = path.read_bytes()
    layer = trained()
    layer.running_var[2] = np.nan
    with pytest.raises(
        ValueError, match="running_var is nan at channel 2, expected finite float32 values >= 0"
    ):
        layer.save(path)
    with pytest.raises(RuntimeError, match=r"^save\(\) needs the channel count, which is not known yet"):
        BatchNorm().save(path)
    assert path.read_bytes() == old


def test_only_arrays_that_can_be_read_are_written(tmp_path):
    for value in (np.ones(2, object), np.ones(2, complex), np.ones(2, bool), np.array(["b"], "S1")):
        with pytest.raises(TypeError, match=r"gamma has dtype .*, a state file holds real numbers and str"):
            _state.write_state(tmp_path / "bad", {"gamma": value})
    with pytest.raises(ValueError, match="larger than the 2146435072 bytes"):
        _state.write_state(tmp_path / "bad", {"gamma": np.broadcast_to(np.float32(0), 2**29)})
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
    _state.write_state(tmp_path / "any", entries)
    expected = {name: value.astype(value.dtype.newbyteorder("=")) for name, value in entries.items()}
    got = _state.read_state(tmp_path / "any")
    assert same_arrays(got, expected)
    assert all(value.flags.writeable and value.flags.c_contiguous for value in got.values())


# ---- what load refuses: other things than states -----------------------------------------------------------


def test_a_missing_file_and_a_folder(tmp_path):
    refused(tmp_path / "nowhere.npz", "No such file", FileNotFoundError)
    refused(tmp_path / "no" / "where.npz", "No such file", FileNotFoundError)
    refused(tmp_path, "expected the name of a state file, this is a folder", IsADirectoryError)
    saved(tmp_path)
    refused(tmp_path / "layer.npz" / "deeper", "Not a directory", NotADirectoryError)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a regular file")


OTHER_FILES = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"P", "it is not an .npz state"),
    "text": (b"gamma = 1.0\nbeta = 0.0\n" * 100, r"it is not an .npz state \(it starts with b'gamma = '\)"),
    "json": (b'{"gamma": [1.0]}', "it is not an .npz state"),
    "zeros": (bytes(4096), "it is not an .npz state"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(2000), r"it is not an .npz state \(it starts with b'.x89HDF"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(100), "it is not an .npz state"),
    "one array": (npy(np.ones(C, np.float32)), "a single .npy array, not an .npz of named arrays"),
    "zip start": (b"PK\x03\x04", "truncated or damaged: it does not end with a zip end record"),
    "zip start and more": (b"PK\x03\x04" + bytes(5000), "truncated or damaged"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "does not fit the layer: missing "),
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


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_read(tmp_path, protocol):
    canary, path = tmp_path / "canary", tmp_path / "state.npz"
    path.write_bytes(pickle.dumps(Canary(canary), protocol))
    refused(path, "it looks like a pickle" if protocol > 1 else "it is not an .npz state")
    assert not canary.exists()
    pickle.loads(path.read_bytes()).close()
    assert canary.exists()  # the bait was real


@pytest.mark.parametrize("shape", [(), (1,), (C,)])
def test_an_object_array_is_never_read(tmp_path, shape):
    canary, path = tmp_path / "canary", tmp_path / "state.npz"
    bait = np.full(shape, None, object)
    bait[...] = Canary(canary)
    content = io.BytesIO()
    np.save(content, bait, allow_pickle=True)
    for name in ("gamma", "num_updates", "extra"):
        archive(path, members(**{name: content.getvalue()}))
        refused(path, rf"member '{name}.npy': it is an object array \(a pickle\), and pickles are never read")
    assert not canary.exists()
    with np.load(path, allow_pickle=True) as file:
        np.atleast_1d(file["extra"])[0].close()
    assert canary.exists()


def test_a_zip_with_a_pickle_is_never_read(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "checkpoint.npz"
    archive(path, {"archive/data.pkl": pickle.dumps(Canary(canary)), "archive/version": b"3\n"})
    refused(path, r"member name 'archive/data.pkl' is not allowed, expected one like 'gamma.npy'")
    archive(path, members(gamma=pickle.dumps(Canary(canary))))
    refused(path, "member 'gamma.npy': the magic string is not correct")
    assert not canary.exists()


# ---- damage ------------------------------------------------------------------------------------------------


def test_every_truncation_is_refused(tmp_path):
    path = saved(tmp_path)
    size = path.stat().st_size
    for length in (1, 4, 21, 22, 100, size // 2, size - 22, size - 1):
        path = saved(tmp_path)
        os.truncate(path, length)
        refused(path, r"truncated or damaged|it is not an .npz state")
    path = saved(tmp_path)
    for length in range(size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=r"truncated|damaged|not an .npz state|empty"):
            _state.read_state(path)


@pytest.mark.parametrize("writer", ["save", "savez", "savez_compressed"])
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, writer):
    """Harmless is what says nothing of the arrays, such as dates; every byte of a stored array is checked."""
    path, state = saved(tmp_path), trained().state_dict()
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
                assert same_arrays(_state.read_state(path), state)
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
    state = trained().state_dict()
    _state.write_state(path, state)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 40))
        content[start : start + length] = data.draw(st.binary(max_size=40))
    path.write_bytes(content)
    try:
        assert same_arrays(_state.read_state(path), state)
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
            BatchNorm.load(path)

    refused(path, match)
    assert peak_memory(load) < bound


def in_directory(path, name, offset, form, *values):
    """Overwrite fields of a member's entry in the directory."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, content.rindex(name.encode()) - 46 + offset, *values)
    path.write_bytes(content)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, method):
    path = archive(tmp_path / "bz.npz", members(gamma=npy(shape=(2**18,), data=bytes(2**20))), method)
    refused_without_memory(path, rf"'gamma.npy' has compression {method}, expected 0 or 8 \(deflate\)")


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb = npy(shape=(2**24 + 2**20,), data=bytes(2**26 + 2**22))
    path = archive(tmp_path / "bomb.npz", members(gamma=bomb), zipfile.ZIP_DEFLATED)
    refused_without_memory(path, r"claims \d{8} bytes in a file of \d{5}, too many to unpack")


def test_a_bomb_with_a_lying_directory_is_not_unpacked(tmp_path):
    """Only what the directory claims is ever unpacked, and memory only taken for what is there."""
    bomb = npy(shape=(2**22,), data=bytes(2**24))
    path = archive(tmp_path / "bomb.npz", members(gamma=bomb), zipfile.ZIP_DEFLATED)
    in_directory(path, "gamma.npy", 24, "<I", 128 + 4 * C)
    refused_without_memory(path, "member 'gamma.npy': Bad CRC-32")
    small = npy(shape=(2**22,), data=bytes(64))
    path = archive(tmp_path / "claim.npz", members(gamma=small), zipfile.ZIP_DEFLATED)
    in_directory(path, "gamma.npy", 24, "<I", 128 + 2**24)
    refused_without_memory(path, "member 'gamma.npy': ")


def test_a_small_file_that_claims_gigabytes(tmp_path):
    content = members(gamma=npy(shape=(2**29,), data=bytes(64)))
    path = archive(tmp_path / "claim.npz", content)
    refused_without_memory(
        path, r"it claims shape \(536870912,\) of float32, 2147483648 bytes, but holds 64 bytes"
    )
    in_directory(path, "gamma.npy", 24, "<I", 128 + 2**31)
    refused_without_memory(path, r"claims \d{10} bytes in a file of \d{4}, too many to unpack")
    in_directory(path, "gamma.npy", 20, "<I", 128 + 2**31)
    refused_without_memory(path, r"members of \d{10} bytes do not fit its \d{4} bytes")


def test_a_member_whose_two_sizes_differ(tmp_path):
    for size in (0, 100, 127, 128, 147, 149, 10**6):  # 148 is right
        path = archive(tmp_path / "sizes.npz", members())
        in_directory(path, "gamma.npy", 24, "<I", size)
        refused_without_memory(path, "member 'gamma.npy': ")


def test_members_that_share_their_data(tmp_path):
    """The overlapping kind of bomb: many directory entries for one piece of data."""
    path = archive(tmp_path / "overlap.npz", members())
    in_directory(path, "beta.npy", 42, "<I", 0)
    refused(path, "member 'beta.npy': File name in directory 'beta.npy' and header b'gamma.npy' differ")
    in_directory(path, "beta.npy", 20, "<I", path.stat().st_size)
    refused(path, "bytes do not fit")
    path = archive(tmp_path / "beyond.npz", members())
    in_directory(path, "beta.npy", 42, "<I", 2**32 - 2)
    refused(path, "bytes do not fit")


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


@pytest.mark.parametrize(
    ("offset", "form", "value", "match"),
    [
        (8, "<H", 1, "'gamma.npy'.* is encrypted"),
        (8, "<H", 1 << 5, "patched data"),
        (8, "<H", 1 << 6, "encryption"),
        (6, "<H", 99, "zip file version 9.9"),
        (10, "<H", 8, "member 'gamma.npy': "),  # stored data that claims to be deflated
        (10, "<H", 99, "'gamma.npy' has compression 99, expected 0 or 8"),
        (16, "<I", 0, "Bad CRC-32"),
        (28, "<H", 8, "damaged|magic number|not allowed"),
        (30, "<H", 55, "damaged|extra|magic number"),
        (32, "<H", 54, "its directory has 24 members, not 25"),  # the comment swallows beta
        (46, "<B", 0, "not allowed"),
        (46, "<B", ord("h"), "File name in directory 'hamma.npy' and header b'gamma.npy' differ"),
    ],
)
def test_encrypted_and_otherwise_odd_members(tmp_path, offset, form, value, match):
    path = archive(tmp_path / "odd.npz", members())
    in_directory(path, "gamma.npy", offset, form, value)
    refused(path, match)


# ---- hostile arrays ----------------------------------------------------------------------------------------


def claim(shape):
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"


VECTOR = bytes(4 * C)
PLAIN = claim("(5,)").ljust(117) + "\n"
VECTOR = bytes(4 * C)
BAD_ARRAYS = {
    "1e12 elements": (npy(shape=(10**12,), data=VECTOR), r"claims shape \(1000000000000,\) of float32, 4000"),
    "2**80 elements": (npy(shape=(2**40, 2**40), data=VECTOR), "claims shape .* bytes, but holds 20 bytes"),
    "too few": (npy(shape=(C,), data=VECTOR[:-1]), r"shape \(5,\) of float32, 20 bytes, but holds 19 bytes"),
    "too many": (npy(shape=(C,), data=VECTOR + b"1"), "20 bytes, but holds 21 bytes"),
    "no data": (npy(shape=(C,)), "20 bytes, but holds 0 bytes"),
    "empty member": (b"", "EOF: reading magic string"),
    "short member": (b"\x93NUMPY", "EOF: reading magic string"),
    "text member": (b"1.0, 2.0, 3.0", "the magic string is not correct"),
    "version 3": (npy(shape=(C,), data=VECTOR, version=(3, 0)), r"it has .npy format \(3, 0\), expected"),
    "version 9": (npy(shape=(C,), data=VECTOR, version=(9, 9)), r"it has .npy format \(9, 9\)"),
    "negative length": (npy(shape=(-C,), data=VECTOR), r"claims shape \(-5,\)"),
    "negative lengths": (npy(shape=(-C, -1), data=VECTOR), r"claims shape \(-5, -1\)"),
    "float length": (npy(header=claim("(5.0,)"), data=VECTOR), "shape is not valid"),
    "100 digits": (npy(shape=(10**99,), data=VECTOR), r"claims shape \(1000"),
    "400 digits": (npy(shape=(10**399,), data=VECTOR), "'gamma.npy': "),
    "99 axes": (npy(shape=(1,) * 99, data=VECTOR[:4]), "'gamma.npy': "),
    "empty and huge": (npy(shape=(0, 2**62, 2**62)), "'gamma.npy': |gamma has shape"),
    "no tuple": (npy(shape=C, data=VECTOR), "shape is not valid"),
    "odd commas": (npy(header=claim("(5,,)"), data=VECTOR), "Cannot parse header"),
    "no keys": (npy(header="{}", data=VECTOR), "Header does not contain the correct keys"),
    "odd keys": (npy(header="{1: 2, 'a': 3}", data=VECTOR), "'gamma.npy': "),
    "list key": (npy(header="{[]: 2}", data=VECTOR), "'gamma.npy': "),
    "no dict": (npy(header="5", data=VECTOR), "Header is not a dictionary"),
    "code": (npy(header="__import__('os').system('touch canary')", data=VECTOR), "'gamma.npy': malformed"),
    "deep": (npy(header="(" * 450, data=VECTOR), "'gamma.npy': "),
    "deep and closed": (npy(header="[" * 199 + "]" * 199, data=VECTOR), "Header is not a dictionary"),
    "deep signs": (npy(header="-" * 450 + "1", data=VECTOR), "'gamma.npy': "),
    "long header": (npy(header=b" " * 5000 + b"\n", data=VECTOR), "EOF: reading array header, expected 5001"),
    "very long header": (
        b"\x93NUMPY\2\0\0\0\0\x40" + bytes(2**16), "EOF: reading array header, expected 1073741824"
    ),
    "header beyond": (b"\x93NUMPY\x01\x00\xff\x0f{'descr'", "EOF: reading array header, expected 4095"),
    "binary header": (npy(header=bytes(range(128, 256)) + b"\n", data=VECTOR), "'gamma.npy': "),
    "object": (npy(descr="|O", shape=(C,), data=VECTOR), "'gamma.npy': it is an object array"),
    "object field": (npy(descr=[("a", "|O")], shape=(C,), data=VECTOR), "'gamma.npy': it is an object array"),
    "structured": (npy(descr=[("a", "<f4")], shape=(C,), data=VECTOR), r"has dtype \[\('a', '<f4'\)\]"),
    "subarray": (npy(descr=("<f4", (5,)), shape=(), data=VECTOR), "it has dtype .*, expected real numbers"),
    "no dtype": (npy(descr="no dtype", shape=(C,), data=VECTOR), "'gamma.npy': descr is not a valid dtype"),
    "dtype number": (npy(descr=5, shape=(C,), data=VECTOR), "'gamma.npy': descr is not a valid dtype"),
    **{
        kind: (npy(descr=kind, shape=(4 * C // width,), data=VECTOR), "has dtype .*, expected real numbers")
        for kind, width in {"|b1": 1, "<c8": 8, "|S4": 4, "|V4": 4, "<M8[s]": 8, "<m8[s]": 8}.items()
    },
    **{
        kind: (npy(np.ones(C, kind)), "gamma has dtype .*, expected float32, the dtype of this layer")
        for kind in "<f2 <f8 >f8 <i4 |u1 <f16 <U1".split()
    },
    "no width": (npy(descr="<U0", shape=(C,)), "'gamma.npy': "),
}  # fmt: skip


def test_an_array_of_any_order_is_as_good(tmp_path):
    layer = trained()
    for content in (
        npy(layer.gamma.astype(">f4")),
        npy(order=True, shape=(C,), data=layer.gamma.tobytes()),
        npy(header=PLAIN, data=layer.gamma.tobytes()),
        b"\x93NUMPY\2\0" + struct.pack("<I", len(PLAIN)) + PLAIN.encode() + layer.gamma.tobytes(),
    ):
        path = archive(tmp_path / "order.npz", members(gamma=content))
        assert bits(BatchNorm.load(path)) == bits(layer)
    path = archive(tmp_path / "fortran.npz", {"m.npy": npy(order=True, shape=(2, 3), data=bytes(range(24)))})
    expected = np.frombuffer(bytes(range(24)), "<f4").reshape(3, 2).T
    np.testing.assert_array_equal(_state.read_state(path)["m"], expected)


@pytest.mark.parametrize(("content", "match"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_are_not_what_they_claim(tmp_path, monkeypatch, content, match):
    monkeypatch.chdir(tmp_path)
    refused_without_memory(archive(tmp_path / "array.npz", members(gamma=content)), match)
    assert os.listdir(tmp_path) == ["array.npz"]


# ---- states that do not fit --------------------------------------------------------------------------------


BAD_STATES = {
    "nan": ({"running_mean": np.array([0, 0, 0, np.nan, 0], "f4")}, "running_mean is nan at channel 3, exp"),
    "inf": ({"beta": np.full(C, np.inf, "f4")}, "beta is inf at channel 0, expected finite"),
    "negative": ({"running_var": np.array([1, 1, -1, 1, 1], "f4")}, "running_var is -1.0 at channel 2.*>= 0"),
    "missing": ({"running_var": None, "eps": None}, "missing running_var, eps"),
    "unexpected": ({"means": np.ones(C)}, r"unexpected means; expected gamma, .*, renorm_decay$"),
    "foreign": ({"moving_mean": np.ones(C)}, "moving_mean is called running_mean here"),
    "no layout": ({"data_format": None}, "missing data_format"),
    "layout": ({"data_format": np.array("nhwc")}, "data_format is 'nhwc', expected one of"),
    "layout kind": ({"data_format": np.array(1)}, r"data_format is 1 \(int\), expected a str"),
    "two layouts": ({"data_format": np.array("NHWC")}, "axis is 1 but data_format is 'NHWC'"),
    "both": ({"running_mean": None, "mean": np.ones(C)}, "missing running_mean; unexpected mean"),
    "length": ({"beta": np.ones(C + 1, "f4")}, r"beta has shape \(6,\), expected \(5,\), one value"),
    "rank": ({"beta": np.ones((1, C), "f4")}, r"beta has shape \(1, 5\)"),
    "no channels": (dict.fromkeys(VECTORS, np.ones(0, "f4")), r"gamma has shape \(0,\), expected"),
    "dtype": ({"beta": np.ones(C)}, "beta has dtype float64, expected float32"),
    "integers": ({"beta": np.ones(C, np.int64)}, "beta has dtype int64, expected float32"),
    "version": ({"format_version": np.array(3)}, "format_version is 3, expected 1 or 2, which"),
    "no version": ({"format_version": None}, "missing format_version"),
    "eps": ({"eps": np.array(-1.0)}, "eps"),
    "eps text": ({"eps": np.array("small")}, r"eps is 'small' \(str\), expected a finite number"),
    "eps shape": ({"eps": np.ones(2)}, r"eps has shape \(2,\), expected a single value"),
    "decay": ({"decay": np.array(2.0)}, "decay"),
    "decay nan": ({"decay": np.array(np.nan)}, "decay"),
    "updates": ({"num_updates": np.array(-3)}, "num_updates is -3, expected an int >= 0"),
    "updates float": ({"num_updates": np.array(3.0)}, r"num_updates is 3.0 \(float\), expected an int"),
    "amount": ({"num_values": np.array(-1)}, "num_values is -1, expected a finite number >= 0, values per"),
    "skipped": ({"num_skipped": np.array(-1)}, "num_skipped is -1, expected an int >= 0"),
    "weight": ({"initial_weight": np.array(1.5)}, r"initial_weight is 1.5, expected a number in \[0, 1\]"),
    "weight kind": ({"initial_weight": np.array("a")}, "initial_weight is 'a'"),
    "parts": ({"virtual_batch_size": np.array(0)}, "virtual_batch_size is 0, expected an int >= 1, or None"),
    "limit": ({"renorm_rmin": np.array(0), "renorm_rmax": np.array(0.5)}, "rmax is 0.5, expected a number"),
    "limit kind": ({"renorm_dmax": np.array("a")}, "renorm_dmax is 'a'"),
    "no reference": ({"renorm_rmin": np.array(0), "renorm_decay": np.array(0.5)}, "missing renorm_mean, re"),
    "two ways of it": (
        {"save_memory": np.array(1), "virtual_batch_size": np.array(2)},
        "virtual_batch_size and save_memory are given, which exclude each other",
    ),
    "flag": ({"warmup": np.array(2)}, "warmup is 2, expected 0 or 1"),
    "flag kind": ({"zero_debias": np.array(1.0)}, r"zero_debias is 1.0 \(float\), expected 0 or 1"),
    "guard": ({"on_nonfinite": np.array("stop")}, "on_nonfinite is 'stop', expected 'propagate', 'raise' or"),
    "schedule": ({"decay": np.array("none"), "warmup": np.array(1)}, "warmup is True and decay is None"),
    "two ways": ({"zero_debias": np.array(1), "warmup": np.array(1)}, "warmup and zero_debias are both True"),
    "ddof": ({"running_ddof": np.array(7)}, "running_ddof"),
    "axis float": ({"axis": np.array(1.0)}, r"axis is 1.0 \(float\), expected an int"),
    "activation": ({"activation": np.array("gelu")}, "activation"),
    "text": ({"gamma": np.array(["a"] * C)}, "gamma has dtype <U1, expected float32"),
    "no text": ({"activation": npy(descr="<U1", shape=(), data=b"\xff" * 4)}, "can't decode"),
    "activation number": ({"activation": np.array(1)}, r"activation is 1 \(int\), expected None, "),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_files_whose_entries_do_not_fit(tmp_path, changes, match):
    refused(archive(tmp_path / "entries.npz", members(**changes)), match)


def test_a_file_of_another_library_is_explained(tmp_path):
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    np.savez(tmp_path / "torch.npz", **dict.fromkeys(names, np.ones(C, np.float32)))
    np.savez(tmp_path / "other.npz", **dict.fromkeys("ab", np.ones(C, np.float32)))
    for name, match in (
        ("torch", "weight is called gamma here.*bn.gamma = "),
        ("other", "unexpected a, b; "),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            BatchNorm.load(tmp_path / f"{name}.npz")
        assert "strict" not in str(caught.value)


def test_the_class_cannot_read_what_no_layer_can_be(tmp_path):
    for dtype in (np.float64, np.float32):
        path = archive(tmp_path / "good.npz", members(**dict.fromkeys(VECTORS, np.ones(C, dtype))))
        assert BatchNorm.load(path).dtype == dtype
    path = archive(tmp_path / "ints.npz", members(**dict.fromkeys(VECTORS, np.ones(C, np.int64))))
    with pytest.raises(ValueError, match=r"ints.npz': dtype is dtype\('int64'\), expected numpy.float32 or"):
        BatchNorm.load(path)
