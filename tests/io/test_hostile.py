"""Damaged and hostile model files, of every kind: a ValueError soon, with the file's name, in little memory.

``data/models`` holds inputs that once made trouble, and damage that a fuzzer has found to be worth keeping.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import random
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from batchnorm import formats
from batchnorm.formats import inspect, read, write

from support.models import C, library, trained
from support.refusals import MOST_SECONDS

NEEDS = {"safetensors": "safetensors", "pt": "torch", "weights.h5": "h5py", "onnx": "onnx",
         "caffemodel": "google.protobuf"}  # fmt: skip
pytestmark = pytest.mark.quick
CORPUS = sorted((pathlib.Path(__file__).parent.parent / "data" / "models").glob("*"))


@pytest.fixture(params=NEEDS)
def good(request, tmp_path):
    """A good file of each kind, which has been read once: whatever is imported, is."""
    library(NEEDS[request.param])
    path = tmp_path / f"x.{request.param}"
    write(path, [trained("a"), trained("b")])
    read(path)
    return path


def refused(path, match="cannot read", error=ValueError, memory=2**22):
    """Reading fails soon, with reason and file name, and takes little memory."""
    seconds: list[float] = []

    def attempt():
        start, found = time.process_time(), []
        with pytest.raises(error, match=match) as caught:
            found += read(path).values()
            for norm in found:  # what is wrong with one alone is said when that is used
                norm.check()
        seconds.append(time.process_time() - start)
        assert found or path.name in str(caught.value)
        return str(caught.value)

    before = resident()
    while not seconds or (min(seconds) >= MOST_SECONDS and len(seconds) < 4):  # the machine may be busy
        attempt()
    assert min(seconds) < MOST_SECONDS
    tracemalloc.start()  # which takes its time
    said = attempt()
    grown, peak = resident() - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory and grown < 2**23
    return said


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- what is none of these ---------------------------------------------------------------------------------


def test_empty_text_and_noise(good):
    for content in (
        b"",
        b"hello, world\n",
        b"\0" * 4096,
        b"\xff" * 4096,
        bytes(range(256)) * 8,
        b"{}",
        b"PK\x03\x04",
    ):
        good.write_bytes(content)
        refused(good)


def test_files_of_other_kinds(good, tmp_path):
    np.savez(tmp_path / "y.npz", a=np.ones(3))
    for other in [p for p in tmp_path.iterdir() if p != good]:
        good.write_bytes(other.read_bytes())
        refused(good)


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_never_read(good, tmp_path):
    canary = tmp_path / "canary"
    bait = pickle.dumps({"bn.running_mean": Canary(canary)})
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("x/data.pkl", bait)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    for content in (bait, zipped.getvalue(), pickle.dumps(Canary(canary), protocol=0)):
        good.write_bytes(content)
        refused(good)
    assert not canary.exists()
    pickle.loads(bait)["bn.running_mean"].close()
    assert canary.exists()  # the bait was real


def test_where_no_file_is(good, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    kind = inspect(good).kind
    for name, error in (("folder", IsADirectoryError), ("pipe", ValueError), ("none", FileNotFoundError)):
        with pytest.raises(error, match=name):
            read(tmp_path / name, kind)


# ---- damage ------------------------------------------------------------------------------------------------


def try_to_read(path):
    """Read what may be good or bad: names and numbers, or a ValueError that names the file."""
    start = time.process_time()
    try:
        found = inspect(path)
        json.dumps(found.as_dict(), allow_nan=False)
        assert len(str(found)) < 2**20
    except ValueError as error:
        assert path.name in str(error) and len(str(error)) < 2000
    assert time.process_time() - start < 0.5


def test_every_truncation(good, record_property):
    content = good.read_bytes()
    lengths = range(len(content) - 1, 0, -max(1, len(content) // 400))
    record_property("tried", len(lengths) + 1)
    for length in lengths:
        os.truncate(good, length)
        try_to_read(good)
    good.write_bytes(content[: len(content) // 2])
    refused(good)


def test_flipped_bits_and_other_damage(good, long, record_property):
    content, generator = good.read_bytes(), random.Random(0)
    record_property("tried", rounds := 20_000 if long else 300)
    for _ in range(rounds):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 8))):
            at = generator.randrange(len(damaged))
            if generator.random() < 0.6:
                damaged[at] ^= 1 << generator.randrange(8)
            else:
                damaged[at : at + generator.randrange(9)] = generator.randbytes(generator.randrange(9))
        good.write_bytes(damaged)
        try_to_read(good)


@pytest.mark.parametrize("path", CORPUS, ids=lambda p: p.name)
def test_the_corpus(path):
    library(NEEDS.get(path.name.partition(".")[2], "h5py"))
    try_to_read(path)


def test_the_corpus_is_there():
    assert len(CORPUS) >= 5


# ---- headers that lie --------------------------------------------------------------------------------------


def safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, size, start=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}


LIES = {
    "a length beyond the file": struct.pack("<Q", 2**40) + b"{}",
    "a length beyond all": b"\xff" * 8 + b"{}",
    "1e12 elements": {"bn.running_mean": entry([10**12], 4 * 10**12)},
    "overflow": {"bn.running_mean": entry([2**62, 2**62], 16)},
    "negative": {"bn.running_mean": entry([-4], 16)},
    "overlap": {"bn.running_mean": entry([4], 16), "bn.running_var": entry([4], 16)},
    "deep": b'{"a":' * 100_000,
    "no dtype": {"bn.running_mean": entry([4], 16, dtype="F33")},
    "a hole": {"bn.running_mean": entry([4], 16, 16)},
    "twice": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":3}',
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(tmp_path, lie):
    library("safetensors")
    content = LIES[lie]
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes) and not content.startswith(b"{"):
        path.write_bytes(content)
    else:
        safetensors(path, content, bytes(16))
    refused(path)


@pytest.mark.parametrize(
    ("said", "match"),
    [("[1", "Expecting"), ('{"bn": {"eps": -1}}', "eps is -1, expected"),
     ('{"bn": {"eps": "big"}}', "eps is 'big'"), ('{"bn": 3}', "options of batch norms are no mapping"),
     ('{"bn": {"num_updates": -3}}', "num_updates is -3, expected"), ("3", "batch norms are no mapping"),
     ('{"bn": {"channel_axis": [1, 2]}}', "channel_axis is of type list"), ("[" * 100_000, "recursion")],
)  # fmt: skip
def test_metadata_that_make_no_sense(tmp_path, said, match):
    save = library("safetensors.numpy").save_file
    path = tmp_path / "x.safetensors"
    arrays = {f"bn.{name}": np.ones(3, np.float32) for name in ("running_mean", "running_var", "weight")}
    save(arrays, path, metadata={"batchnorm": said})
    refused(path, match)


def test_keras_archives_that_lie(tmp_path):
    library("h5py")
    write(tmp_path / "x.weights.h5", trained("a"))
    weights = (tmp_path / "x.weights.h5").read_bytes()
    config = json.dumps(
        {"class_name": "BatchNormalization", "config": {"name": "a", "epsilon": 0.5}}
    ).encode()

    def archive(members, method=zipfile.ZIP_STORED):
        path = tmp_path / "x.keras"
        with zipfile.ZipFile(path, "w", method) as file:
            for name, data in members.items():
                file.writestr(name, data)
        return path

    (norm,) = read(archive({"config.json": config, "model.weights.h5": weights})).values()
    assert norm.mean.size == C
    assert list(
        read(archive({"config.json": config, "model.weights.h5": weights}, zipfile.ZIP_DEFLATED))
    ) == ["a"]
    refused(
        archive({"model.weights.h5": weights}), "it has no config.json, expected a .keras file of Keras 3"
    )
    refused(archive({"config.json": config}), "it has no model.weights.h5")
    refused(archive({"config.json": b"{", "model.weights.h5": weights}))
    refused(archive({"config.json": b"[" * 10**5, "model.weights.h5": weights}), "recursion")
    refused(archive({"config.json": config, "model.weights.h5": weights[:4000]}), "HDF5: .*truncated")
    bomb = archive({"config.json": config, "model.weights.h5": bytes(2**27)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**18
    refused(bomb, r"model.weights.h5 claims 134217728 bytes in a file of \d+, too many to unpack")
    refused(
        archive({"config.json": b" " * 2**27, "model.weights.h5": weights}, zipfile.ZIP_DEFLATED),
        "config.json cl",
    )
    wrong = json.dumps(
        {"class_name": "BatchNormalization", "config": {"name": "a", "epsilon": 0.5, "scale": False}}
    )
    refused(
        archive({"config.json": wrong.encode(), "model.weights.h5": weights}), "has 4 variables, expected 3"
    )


def hdf5(path, build):
    with library("h5py").File(path, "w") as file:
        group = file.create_group("layers/batch_normalization/vars")
        for i in range(4):
            if i != 2:
                group.create_dataset(str(i), data=np.ones(3, np.float32))
        build(library("h5py"), file, group)
    return path


HDF5 = {
    "a huge dataset": (lambda h, f, g: g.create_dataset("2", (10**12,), "f4", chunks=(2**20,)), None),
    "all huge": (
        lambda h, f, g: [g.__delitem__(k) for k in list(g)] + [
            g.create_dataset(str(i), (10**12,), "f4", chunks=(2**20,)) for i in range(4)
        ], r"vars/0 has shape \(1000000000000,\) of float32, expected floating numbers that fit the file",
    ),
    "a link outside": (lambda h, f, g: g.__setitem__("2", h.ExternalLink("/etc/hosts", "/")), "a link"),
    "a link by name": (lambda h, f, g: g.__setitem__("2", h.SoftLink("/layers")), "is a link, and other"),
    "values in another file": (
        lambda h, f, g: g.create_dataset("2", (3,), "f4", external=[("/etc/hostname", 0, 12)]),
        "lies in another file, and other files are never read",
    ),
    "a circle": (lambda h, f, g: (f["layers"].__setitem__("again", f["layers"]),
                                  g.create_dataset("2", data=np.ones(3, np.float32))), "50 levels"),
    "integers": (lambda h, f, g: g.create_dataset("2", data=np.ones(3, int)), "of int64, expected floating"),
    "text": (lambda h, f, g: g.create_dataset("2", data=["a", "b", "c"]), "of object, expected float"),
    "no mapping": (lambda h, f, g: (g.create_dataset("2", data=np.ones(3, np.float32)),
                                    g.attrs.__setitem__("batchnorm", "3")), "is 3 .int., expected a mapping"),
    "an attribute": (lambda h, f, g: (g.create_dataset("2", data=np.ones(3, np.float32)),
                                      g.attrs.__setitem__("batchnorm", "[")), "Expecting value"),
}  # fmt: skip


@pytest.mark.parametrize("case", HDF5)
def test_hdf5_that_lies(tmp_path, case):
    library("h5py")
    build, match = HDF5[case]
    path = hdf5(tmp_path / "x.weights.h5", build)
    if match is None:  # of another shape than the rest: no batch norm
        assert read(path) == {}
    else:
        refused(path, match)


def test_virtual_datasets(tmp_path):
    h5py = library("h5py")

    def build(h, f, g):
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource("/etc/hostname", "x", (3,))
        g.create_virtual_dataset("2", layout)

    refused(hdf5(tmp_path / "x.weights.h5", build), "lies in another file, and other files are never read")


def onnx_model(path, change):
    onnx = library("onnx")
    write(path, trained("a"))
    model = onnx.load(path)
    change(onnx, model, model.graph.initializer[3])
    onnx.save(model, path)
    return path


def outside(location, **place):
    def change(onnx, model, tensor):
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, **place}.items():
            tensor.external_data.add(key=key, value=value)

    return change


ONNX = {
    "1e12 elements": (lambda o, m, t: t.dims.__setitem__(0, 10**12), r"claims shape \(10{12},\), but"),
    "too many": (lambda o, m, t: t.dims.__setitem__(0, C + 1), r"claims shape \(6,\), but holds 20 bytes"),
    "negative": (lambda o, m, t: t.dims.__setitem__(0, -C), "claims shape"),
    "no type": (lambda o, m, t: setattr(t, "data_type", 99), "cannot read"),
    "text": (lambda o, m, t: (setattr(t, "data_type", 8), t.ClearField("raw_data"),
                              t.string_data.extend([b"a"] * C)), "cannot read"),
    "four inputs": (lambda o, m, t: m.graph.node[0].input.__delitem__(4), "has 4 inputs, expected X, sc"),
    "above the folder": (outside("../../etc/passwd"), "lies in '../../etc/passwd', expected a file be"),
    "absolute": (outside("/etc/passwd"), "lies in '/etc/passwd', expected a file beside the model"),
    "nowhere": (outside(""), "lies in '', expected a file beside"),
    "missing": (outside("other.bin"), "lies in 'other.bin', which is missing or too short"),
    "itself, too short": (outside("x.onnx", offset="999999"), "missing or too short"),
    "a negative place": (outside("x.onnx", offset="-5"), "missing or too short"),
    "a huge length": (outside("x.onnx", length="99999999999"), "missing or too short"),
    "no number": (outside("x.onnx", offset="here"), "invalid literal"),
}  # fmt: skip


@pytest.mark.parametrize("case", ONNX)
def test_onnx_models_that_lie(tmp_path, case):
    change, match = ONNX[case]
    refused(onnx_model(tmp_path / "x.onnx", change), match)


def test_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(100))
    (tmp_path / "in" / "data").symlink_to(tmp_path / "secret")
    refused(onnx_model(tmp_path / "in" / "x.onnx", outside("data")), "expected a file beside the model")


def test_onnx_circles_end(tmp_path):
    def change(onnx, model, tensor):
        model.graph.initializer.remove(tensor)
        model.graph.node.add(op_type="Identity", input=["loop"], output=[tensor.name])
        model.graph.node.add(op_type="Identity", input=[tensor.name], output=["loop"])

    (norm,) = read(onnx_model(tmp_path / "x.onnx", change)).values()
    assert "are computed, expected constants" in norm.fault
    with pytest.raises(ValueError, match="are computed"):
        formats.to_layer(norm)


def test_caffe_blobs_that_lie(tmp_path):
    net = library("google.protobuf") and formats.read.__globals__["files"].read_caffe.__globals__["_net"]
    path = tmp_path / "x.caffemodel"

    def of(change):
        write(path, trained("a"))
        model = net()()
        model.ParseFromString(path.read_bytes())
        change(model.layer[0])
        path.write_bytes(model.SerializeToString())
        return path

    refused(
        of(lambda layer: layer.blobs[0].shape.dim.__setitem__(0, 10**12)),
        r"blob 0 has shape \(1000000000000,\)",
    )
    refused(
        of(lambda layer: layer.blobs[0].data.append(1)),
        r"a, blob 0 has shape \(5,\) and 6 values, expected one",
    )
    refused(of(lambda layer: layer.blobs[1].ClearField("data")), "a, blob 1 has shape .* and 0 values")
    refused(of(lambda layer: layer.blobs[2].data.__setitem__(0, float("nan"))), "a factor of nan")
    refused(
        of(lambda layer: setattr(layer.batch_norm_param, "eps", -1)), "eps is -1.0, expected a finite number"
    )
    path.write_bytes(net()(layers=[b"\x0a\x01a"]).SerializeToString())
    refused(path, "layers of before 2014: upgrade_net_proto_binary of Caffe renews it")


def test_torch_archives_that_lie(tmp_path):
    torch = library("torch")
    path = tmp_path / "x.pt"
    torch.save({"bn.running_mean": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def packed(method=zipfile.ZIP_STORED, **changes):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in {**members, **changes}.items():
                archive.writestr(name, data)
        return path

    refused(packed(zipfile.ZIP_DEFLATED), "it is not a file of torch.save: it is compressed")
    program = {"x/constants.pkl": b"", "x/code/__torch__.py": b""}
    refused(packed(**program), r"a program of TorchScript, .*: torch.save.torch.jit.load.path..state_dict")
    torch.save(torch.nn.Linear(2, 2), path)
    refused(
        path, r"holds a torch.nn.modules.linear.Linear; only tensors are read: use torch.save", memory=2**22
    )
    torch.save([torch.ones(3)], path)
    refused(path, "it holds of type list, expected a state_dict")
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    refused(path, "it is a pickle, and pickles are never read: save it anew by PyTorch 1.6 or later")
    name = next(n for n in members if n.endswith("data.pkl"))
    members.pop(name)
    refused(packed(), "it is not a file of torch.save: no data.pkl")
