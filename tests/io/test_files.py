"""Model files of every kind: there and back, and against the libraries that they are of."""

from __future__ import annotations

import json
import os
import pathlib
import struct
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from batchnorm import BatchNorm, formats
from batchnorm.formats import Norm, from_layer, read, to_layer, write

from support.models import C, images, library, same_function, trained
from support.refusals import MOST_SECONDS

pytestmark = pytest.mark.quick

STATES = sorted((pathlib.Path(__file__).parent.parent / "data" / "states").glob("format*.npz"))
NEEDS = {"safetensors": "safetensors", "pt": "torch", "weights.h5": "h5py", "onnx": "onnx",
         "caffemodel": "google.protobuf", "npz": "numpy"}  # fmt: skip
HOLDS_OPTIONS = ("safetensors", "weights.h5", "npz")


def layers(**options):
    return {name: trained(name, seed=i, **options) for i, name in enumerate(("a.bn1", "a.bn2", "b"))}


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", NEEDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back(tmp_path, ending, dtype):
    library(NEEDS[ending])
    ddof = 0 if ending in ("weights.h5", "onnx") else 1
    given = layers(decay=0.875, eps=2e-4, running_ddof=ddof, dtype=dtype)
    if ending == "npz":
        given = {"b": given["b"]}
    path = tmp_path / f"model.{ending}"
    notes = write(path, given)
    found = read(path)
    assert list(found) == list(given)
    for name, norm in found.items():
        layer = given[name]
        if norm.eps is None:
            assert norm.missing == ("eps", "decay") and any("eps=0.0002" in note for note in notes)
            norm = norm.said(eps=2e-4, decay=0.875)
        again = to_layer(norm, channel_axis=1)
        assert again.dtype == dtype and again.name == name and (again.eps, again.decay) == (2e-4, 0.875)
        exact = ending != "caffemodel"  # whose blobs are multiplied by a sum of weights
        assert same_function(layer, again, 0 if exact else 1e-6)
        assert np.array_equal(layer(images(50, dtype=dtype)), again(images(50, dtype=dtype)))
        for statistic in ("running_mean", "running_var"):  # training goes on
            tolerance = 0 if exact else 1e-6
            np.testing.assert_allclose(getattr(layer, statistic), getattr(again, statistic), rtol=tolerance)


@pytest.mark.parametrize("ending", NEEDS)
@pytest.mark.parametrize(
    "absent", [{"scale": False}, {"center": False}, {"scale": False, "center": False}], ids=str
)
def test_absent_gamma_or_beta(tmp_path, ending, absent):
    library(NEEDS[ending])
    layer = trained(**absent)
    write(tmp_path / f"model.{ending}", layer)
    (norm,) = read(tmp_path / f"model.{ending}").values()
    assert same_function(layer, to_layer(norm.said(eps=1e-5)), 1e-6 if ending == "caffemodel" else 0)


@pytest.mark.parametrize("ending", HOLDS_OPTIONS)
def test_options_that_these_files_hold(tmp_path, ending):
    library(NEEDS[ending])
    layer = trained(eps=0.3, decay=0.5, running_ddof=0, channel_axis=-1)
    notes = [n for n in write(tmp_path / f"x.{ending}", layer) if "num_updates" not in n]
    others = {"safetensors": "pytorch", "weights.h5": "keras"}.get(ending)  # who pass over what is for us
    assert all(f" where {others} reads it (" in note for note in notes) and bool(notes) == bool(others)
    (norm,) = read(tmp_path / f"x.{ending}").values()
    assert (norm.eps, norm.decay, norm.running_ddof, norm.channel_axis, norm.missing) == (0.3, 0.5, 0, -1, ())


@pytest.mark.parametrize("options", [{"activation": "leaky_relu", "slope": 0.3}, {"decay": None}], ids=str)
def test_an_npz_file_holds_everything(tmp_path, options):
    layer = trained("bn", **options)
    assert write(tmp_path / "x.npz", layer) == ()
    again = to_layer(read(tmp_path / "x.npz")["bn"])
    assert all(getattr(again, name) == value for name, value in options.items())
    assert write(tmp_path / "x.safetensors", layer) != ()


@pytest.mark.parametrize("names", ["keras", "tensorflow", "mxnet", "gluon", "haiku", "flax", "batchnorm"])
def test_safetensors_by_other_names(tmp_path, names):
    library("safetensors")
    given = layers()
    notes = write(tmp_path / "x.safetensors", given, names=names)
    row = formats.FORMATS[names]
    assert [note.split("=")[0] for note in notes if f" where {names} reads it" in note] == [
        name for name, own in {"eps": 1e-5, "decay": 0.9, "running_ddof": 1, "channel_axis": 1}.items()
        if own != getattr(row, name)
    ] and len(notes) <= 4  # fmt: skip
    found = read(tmp_path / "x.safetensors")
    assert {norm.format for norm in found.values()} == {names} and list(found) == sorted(given)
    assert all(
        norm.num_updates == 200 and same_function(given[n], to_layer(norm)) for n, norm in found.items()
    )


@pytest.mark.parametrize("names", ["pytorch", "flax", "mxnet"])
@pytest.mark.parametrize("name", ["module.bn", "params/bn", "bn_", "a._orig_mod.bn"])
def test_options_of_names_that_reading_shortens(tmp_path, names, name):
    library("safetensors")
    layer = trained(name, eps=0.3, decay=0.5, running_ddof=0)
    write(tmp_path / "x.safetensors", layer, names=names)
    (norm,) = read(tmp_path / "x.safetensors").values()
    assert (norm.eps, norm.decay, norm.num_updates) == (0.3, 0.5, 200) and len(norm.name) < len(name)
    assert same_function(layer, to_layer(norm, channel_axis=1))


def test_a_view_is_written_as_it_looks(tmp_path):
    # Of an array that is not contiguous safetensors writes the wrong values, without a word.
    library("safetensors")
    table = np.arange(4 * C, dtype=np.float32).reshape(C, 4) + 1
    norm = Norm("bn", *table.T)
    write(tmp_path / "x.safetensors", norm)
    (back,) = read(tmp_path / "x.safetensors").values()
    assert np.array_equal([back.mean, back.var, back.gamma, back.beta], table.T)


@pytest.mark.parametrize("ending", NEEDS)
def test_equal_layers_give_equal_bytes(tmp_path, ending):
    library(NEEDS[ending])
    for name in ("one", "two"):
        write(tmp_path / f"{name}.{ending}", trained())
        time.sleep(0.01)
    one, two = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("one", "two"))
    assert len(one) == len(two) and (ending == "pt" or one == two)  # torch writes the name of the file


def test_numbers_that_need_a_smaller_eps(tmp_path):
    library("onnx")
    norm = Norm("bn", np.zeros(C), np.linspace(-9e-6, 1, C), eps=1e-5)
    write(tmp_path / "x.onnx", norm)
    (back,) = read(tmp_path / "x.onnx").values()
    assert back.var.min() == 0
    np.testing.assert_allclose(back.var + back.eps, norm.var + 1e-5, rtol=1e-6)
    library("safetensors")
    write(tmp_path / "x.safetensors", norm, names="pytorch")
    assert read(tmp_path / "x.safetensors")["bn"].with_eps().eps == pytest.approx(1e-6)


# ---- PyTorch -----------------------------------------------------------------------------------------------


def network(torch, affine=True):
    nn = torch.nn
    torch.manual_seed(0)
    first = nn.BatchNorm2d(C, eps=1e-3, momentum=0.2, affine=affine)
    net = nn.Sequential(nn.Conv2d(C, C, 1), first, nn.ReLU(), nn.BatchNorm2d(C, affine=affine))
    for step in range(30):
        net(torch.from_numpy(images(step % 4)))
    if affine:
        for norm in (net[1], net[3]):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    return net


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("affine", [True, False])
def test_pytorch_and_here_do_the_same_and_train_alike(tmp_path, ending, affine):
    torch = library("torch")
    net = network(torch, affine)
    path = tmp_path / f"net.{ending}"
    save = torch.save if ending == "pt" else library("safetensors.torch").save_file
    save(net.state_dict(), path)
    found = read(path)
    assert list(found) == ["1", "3"] and found["1"].num_updates == 30
    layer, theirs = to_layer(found["1"], eps=1e-3, decay=0.8), net[1]
    x = images(60)
    for mode in (False, True):
        theirs.train(mode)
        want = theirs(torch.from_numpy(x)).detach().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # after 30 updates statistics are cold
            np.testing.assert_allclose(layer(x, training=mode), want, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(layer.running_mean, theirs.running_mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, theirs.running_var.numpy(), rtol=1e-6)
    assert layer.running.num_updates == theirs.num_batches_tracked == 31

    write(path, {"1": layer})
    load = torch.load if ending == "pt" else library("safetensors.torch").load_file
    state = {key.partition(".")[2]: value for key, value in load(path).items()}
    fresh = torch.nn.BatchNorm2d(C, eps=1e-3, momentum=0.2, affine=affine)
    fresh.load_state_dict(state)  # strict
    want = fresh.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(layer(x, training=False), want, rtol=1e-6, atol=2e-6)
    fresh.train()(torch.from_numpy(images(61)))
    layer(images(61))
    np.testing.assert_allclose(layer.running_var, fresh.running_var.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_16_bit_statistics(tmp_path, kind, ending):
    torch = library("torch")
    library("ml_dtypes")
    net = network(torch).to(getattr(torch, kind))
    path = tmp_path / f"net.{ending}"
    (torch.save if ending == "pt" else library("safetensors.torch").save_file)(net.state_dict(), path)
    norm = read(path)["3"]
    assert norm.mean.dtype == np.float32
    assert np.array_equal(norm.var, net[3].running_var.float().numpy())


def test_wrapped_models(tmp_path):
    torch, save_file = library("torch"), library("safetensors.torch").save_file
    net = network(torch)
    plain = {
        name: norm.mean for name, norm in read(_saved(save_file, net, tmp_path / "a.safetensors")).items()
    }
    ddp = {f"module.{key}": value for key, value in net.state_dict().items()}
    save_file(ddp, tmp_path / "b.safetensors")
    compiled = torch.compile(net, backend="eager")
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")
    _saved(save_file, compiled, tmp_path / "c.safetensors")
    save_file({f"module.{k}": v for k, v in compiled.state_dict().items()}, tmp_path / "d.safetensors")
    for letter in "bcd":
        found = read(tmp_path / f"{letter}.safetensors")
        assert list(found) == list(plain) and all(np.array_equal(found[n].mean, plain[n]) for n in plain)


def _saved(save_file, net, path):
    save_file(net.state_dict(), path)
    return path


def test_a_checkpoint_of_mappings(tmp_path):
    torch = library("torch")
    net = network(torch)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    torch.save(
        {"epoch": 3, "state_dict": net.state_dict(), "opt": optimizer.state_dict()}, tmp_path / "x.ckpt"
    )
    found = formats.inspect(tmp_path / "x.ckpt")
    assert list(found.norms) == ["state_dict/1", "state_dict/3"] and found.others == 2


def test_pt_files_are_not_read_without_torch(tmp_path, monkeypatch):
    torch = library("torch")
    torch.save(network(torch).state_dict(), tmp_path / "x.pt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"reading a .pt file needs torch, .*: pip install torch$"):
        read(tmp_path / "x.pt")


# ---- safetensors: large files ------------------------------------------------------------------------------


def sparse_model(path, size=2**30):
    """A file of that size with one batch norm, most of which takes no room on the disk."""
    names = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    header, at = {"big.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, size
    for name in names:
        header[name] = {"dtype": "F32", "shape": [C], "data_offsets": [at, at + 4 * C]}
        at += 4 * C
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(size, os.SEEK_CUR)
        file.write(np.linspace(1, 2, 4 * C, dtype=np.float32).tobytes())


def test_a_gigabyte_is_not_read(tmp_path):
    library("safetensors")
    path = tmp_path / "large.safetensors"
    sparse_model(path)
    read(path)  # which imports
    tracemalloc.start()
    start, before = time.process_time(), resident()
    found = formats.inspect(path)
    took, grown, peak = time.process_time() - start, resident() - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.norms["bn"].mean.size == C and found.others == 1
    assert took < MOST_SECONDS and grown < 2**23 and peak < 2**20


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- Keras -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras_model():
    keras = library("keras")
    layers = keras.layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras.utils.set_random_seed(0)
        model = keras.Sequential([
            keras.Input((4, 3, C)), layers.Conv2D(C, 1),
            layers.BatchNormalization(name="first", momentum=0.9),
            layers.BatchNormalization(scale=False, epsilon=1e-4),
            layers.BatchNormalization(axis=1, center=False, momentum=0.5),
            layers.BatchNormalization(scale=False, center=False),
            keras.Sequential([layers.BatchNormalization(name="inner")], name="sub"),
            layers.TimeDistributed(layers.BatchNormalization(name="wrapped")),
        ])  # fmt: skip
        model.compile("sgd", "mse")
        x = np.concatenate([images(seed, axis=-1) for seed in range(20)])
        model.fit(x, x, verbose=0, epochs=2)
    return model


of_keras = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras
NORMS = {"first": ("gamma", "beta"), "batch_normalization": ("beta",), "batch_normalization_1": ("gamma",),
         "batch_normalization_2": (), "inner": ("gamma", "beta"), "wrapped": ("gamma", "beta")}  # fmt: skip


def keras_layers(model):
    found = {layer.name: layer for layer in model.layers}
    found |= {"inner": found["sub"].layers[-1], "wrapped": found["time_distributed"].layer}
    return {name: found[name] for name in NORMS}


@pytest.fixture
def saved_keras(keras_model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("m.keras", "m.h5"):
            keras_model.save(tmp_path / name)
        keras_model.save_weights(tmp_path / "m.weights.h5")
    return tmp_path


@of_keras
@pytest.mark.parametrize("file", ["m.keras", "m.h5"])
def test_models_of_keras(keras_model, saved_keras, file):
    found, theirs = read(saved_keras / file), keras_layers(keras_model)
    assert set(found) == set(theirs)
    for name, norm in found.items():
        layer = theirs[name]
        assert norm.missing == () and not norm.fault
        assert (norm.eps, norm.decay, norm.channel_axis) == (layer.epsilon, layer.momentum, layer.axis)
        assert tuple(role for role in ("gamma", "beta") if getattr(norm, role) is not None) == NORMS[name]
        weights = [v for v in (norm.gamma, norm.beta, norm.mean, norm.var) if v is not None]
        assert all(np.array_equal(a, b) for a, b in zip(weights, layer.get_weights(), strict=True))


@of_keras
def test_keras_and_here_do_the_same_and_train_alike(keras_model, saved_keras):
    norm, theirs = read(saved_keras / "m.keras")["first"], keras_layers(keras_model)["first"]
    layer, x = to_layer(norm), images(70, axis=-1)
    np.testing.assert_allclose(
        layer(x, training=False), _array(theirs(x, training=False)), rtol=1e-6, atol=2e-6
    )
    before = theirs.get_weights()
    try:
        np.testing.assert_allclose(layer(x), _array(theirs(x, training=True)), rtol=1e-6, atol=2e-6)
        after = theirs.get_weights()
        np.testing.assert_allclose(layer.running_mean, after[2], rtol=1e-6)
        np.testing.assert_allclose(layer.running_var, after[3], rtol=1e-6)
    finally:
        theirs.set_weights(before)


def _array(value):
    return value.detach().numpy()


def test_weights_alone_do_not_tell_gamma_from_beta(saved_keras):
    found = read(saved_keras / "m.weights.h5")
    assert set(found) == set(NORMS)
    faults = {name for name, norm in found.items() if norm.fault}
    assert faults == {"batch_normalization", "batch_normalization_1"}
    with pytest.raises(
        ValueError, match=r"one variable beside mean and variance, gamma or beta, which its conf"
    ):
        to_layer(found["batch_normalization"])
    assert found["first"].missing == ("eps", "decay", "channel_axis")


@of_keras
def test_batch_norms_that_no_configuration_names(tmp_path):
    """Inside of a layer, of a model of its own class; and a class of another name."""
    keras = library("keras")
    layers = keras.layers

    class Block(layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.bn, self.second = layers.BatchNormalization(), layers.BatchNormalization(name="twin")
            self.third = layers.BatchNormalization(name="third", scale=False)

        def build(self, shape):
            for each in (self.bn, self.second, self.third):
                each.build(shape)

        def call(self, x):
            return self.third(self.second(self.bn(x)))

    class Own(layers.BatchNormalization):
        pass

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def call(self, x):
            return self.block(x)

    x = keras.Input((C,))
    y = layers.BatchNormalization(name="third", epsilon=0.2)(
        layers.BatchNormalization(name="twin")(Block()(x))
    )
    keras.Model(x, Own(name="mine", epsilon=0.5)(y)).save(tmp_path / "x.keras")
    found = read(tmp_path / "x.keras")
    assert len(found) == 6 and found["mine"].eps == 0.5 and found["batch_normalization"].eps is None
    faults = [n.fault for n in found.values() if n.fault]  # whose options are whose is said nowhere
    assert len(faults) == 4 and all("is the name of several batch norms" in fault for fault in faults)
    model = Model()
    model(np.ones((2, C), np.float32))
    model.block.bn.gamma.assign(np.arange(C))
    model.save(tmp_path / "x.keras")
    found = read(tmp_path / "x.keras")
    assert len(found) == 3 and np.array_equal(next(iter(found.values())).gamma, np.arange(C))
    assert [norm.eps for norm in found.values()] == [None] * 3


@of_keras
def test_bfloat16_of_keras(tmp_path):
    keras = library("keras")
    library("ml_dtypes")
    norms = [keras.layers.BatchNormalization(dtype=dtype) for dtype in ("bfloat16", "float32")]
    model = keras.Sequential([keras.Input((C,)), *norms])
    norms[0].moving_mean.assign(np.arange(C) / 4)
    model.save(tmp_path / "x.keras")
    first, second = read(tmp_path / "x.keras").values()
    assert np.array_equal(first.mean, np.arange(C) / 4) and not first.fault and not second.fault


@of_keras
def test_two_layers_of_one_name(tmp_path):
    """Their options are told apart by nothing in the file; alike ones need not be."""
    keras = library("keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for eps, faults in ((1e-3, 0), (1e-4, 2)):
            norms = [keras.layers.BatchNormalization(name="bn", epsilon=e) for e in (1e-3, eps)]
            parts = [keras.Sequential([norm], name=f"part{i}") for i, norm in enumerate(norms)]
            model = keras.Sequential([keras.Input((4, 3, C)), *parts])
            model.save(tmp_path / "x.keras")
            found = read(tmp_path / "x.keras")
            assert len(found) == 2 and sum("several batch norms" in n.fault for n in found.values()) == faults


@of_keras
def test_two_layers_of_one_name_in_a_file_of_keras_2(tmp_path):
    keras = library("keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for eps, faults in ((1e-3, 0), (1e-4, 2)):
            x = y = keras.Input((4, 3, C))
            for i, each in enumerate((1e-3, eps)):
                norm = keras.layers.BatchNormalization(name="bn", epsilon=each)
                y = keras.Sequential([norm], name=f"part{i}")(y)
            keras.Model(x, y).save(tmp_path / "x.h5")
            found = read(tmp_path / "x.h5")
            assert len(found) == 2 and sum("several batch norms" in n.fault for n in found.values()) == faults


@of_keras
def test_variables_of_keras_by_their_paths(keras_model):
    found = formats.find({variable.path: variable for variable in keras_model.variables})
    assert {path.rpartition("/")[2] for path in found} == set(NORMS)


@of_keras
def test_keras_takes_the_weights_written_here(tmp_path):
    keras = library("keras")
    given = [trained("a", eps=1e-3, channel_axis=-1, running_ddof=0),
             trained("b", scale=False, channel_axis=-1, running_ddof=0)]  # fmt: skip
    write(tmp_path / "x.weights.h5", given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norms = [keras.layers.BatchNormalization(epsilon=bn.eps, scale=bn.scale) for bn in given]
        model = keras.Sequential([keras.Input((4, 3, C)), *norms])
        model.load_weights(tmp_path / "x.weights.h5")
    x = images(71, axis=-1)
    for layer, norm in zip(given, norms, strict=True):
        np.testing.assert_allclose(
            layer(x, training=False), _array(norm(x, training=False)), rtol=1e-6, atol=2e-6
        )


# ---- ONNX --------------------------------------------------------------------------------------------------


def test_onnx_runtime_does_the_same(tmp_path):
    runtime = library("onnxruntime")
    given = layers(eps=2e-4) | {"c": trained("c", scale=False, center=False)}
    write(tmp_path / "x.onnx", given)
    session = runtime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    feeds = {f"{name}.x": images(i) for i, name in enumerate(given)}
    for (name, layer), y in zip(given.items(), session.run(None, feeds), strict=True):
        np.testing.assert_allclose(layer(feeds[f"{name}.x"], training=False), y, rtol=1e-6, atol=2e-6)


def test_onnx_checks_what_is_written_here(tmp_path):
    onnx = library("onnx")
    write(tmp_path / "x.onnx", layers(dtype=np.float64))
    onnx.checker.check_model(str(tmp_path / "x.onnx"), full_check=True)


# ---- Caffe -------------------------------------------------------------------------------------------------


def caffe_net(layers):
    """A .caffemodel of (name, type, bottom, top, blobs, parameters) in protobuf's wire format, by hand."""

    def field(number, data):
        if isinstance(data, bytes):
            return varint(number << 3 | 2) + varint(len(data)) + data
        return varint(number << 3 | 5) + struct.pack("<f", data) if isinstance(data, float) else (
            varint(number << 3) + varint(int(data)))  # fmt: skip

    def varint(n):
        return bytes([n & 127 | (128 if n > 127 else 0)]) + (varint(n >> 7) if n > 127 else b"")

    def blob(values):
        data = np.asarray(values, "<f4").ravel()
        shape = b"".join(varint(n) for n in np.shape(values))
        return field(5, data.tobytes()) + field(7, field(1, shape))

    out = b""
    for name, kind, bottom, top, blobs, parameters in layers:
        layer = field(1, name.encode()) + field(2, kind.encode())
        layer += b"".join(field(3, each.encode()) for each in bottom.split()) + field(4, top.encode())
        layer += b"".join(field(7, blob(values)) for values in blobs) + parameters(field)
        out += field(100, layer)
    return field(1, b"net") + out


def no_parameters(field):
    return b""


MEAN, VAR, GAMMA, BETA = np.random.default_rng(4).uniform(0.5, 2, (4, C))


def of_caffe(tmp_path, *layers):
    library("google.protobuf")
    (tmp_path / "x.caffemodel").write_bytes(caffe_net(layers))
    return read(tmp_path / "x.caffemodel")


def batch_norm(*blobs, bottom="conv", top="conv", parameters=no_parameters):
    return ("bn", "BatchNorm", bottom, top, blobs, parameters)


def scale(*blobs, bottom="conv", top="conv", parameters=lambda field: field(142, field(4, True))):
    return ("scale", "Scale", bottom, top, blobs, parameters)


def test_a_caffemodel_made_by_hand(tmp_path):
    own = lambda field: field(139, field(2, 0.9) + field(3, 0.25))  # noqa: E731
    norms = of_caffe(
        tmp_path, ("conv", "Convolution", "data", "conv", [np.ones((2, 3, 1, 1))], no_parameters),
        batch_norm(MEAN * 4, VAR * 4, [4.0], parameters=own), scale(GAMMA, BETA),
        ("relu", "ReLU", "conv", "conv", [], no_parameters),
    )  # fmt: skip
    norm = norms.pop("bn")
    assert not norms and (norm.eps, norm.decay, norm.running_ddof, norm.channel_axis) == (0.25, 0.9, 1, 1)
    for got, want in zip((norm.gamma, norm.beta, norm.mean, norm.var), (GAMMA, BETA, MEAN, VAR), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("factor", "mean"), [([[0.0]], 0), ([], 1), ([[2.0]], 0.5), ([[999.98236]], 1 / 999.98236)]
)
def test_the_third_blob(tmp_path, factor, mean):
    norm = of_caffe(tmp_path, batch_norm(MEAN, VAR, *factor))["bn"]
    np.testing.assert_allclose(norm.mean, MEAN * mean, rtol=1e-6)
    assert norm.eps == 1e-5 and norm.decay == 0.999 and norm.gamma is None and norm.beta is None


def test_training_goes_on_as_in_caffe(tmp_path):
    """Caffe's own step on its blobs, as batch_norm_layer.cpp describes it, beside the layer's."""
    blobs, decay = [np.zeros(C), np.zeros(C), 0.0], 0.75
    own = lambda field: field(139, field(2, decay) + field(3, 1e-5))  # noqa: E731

    def step(x):
        n = x.size / C
        for i, value in enumerate((x.mean((0, 2, 3)), x.var((0, 2, 3)) * n / (n - 1))):
            blobs[i] = decay * blobs[i] + value
        blobs[2] = decay * blobs[2] + 1

    for seed in range(4):
        step(images(seed, dtype=np.float64))
    norm = of_caffe(tmp_path, batch_norm(blobs[0], blobs[1], [blobs[2]], parameters=own))["bn"]
    assert norm.num_updates == 4 and norm.zero_debias
    layer = to_layer(norm)
    for seed in range(4, 8):
        step(images(seed, dtype=np.float64))
        layer(images(seed))
    np.testing.assert_allclose(layer.running_mean, blobs[0] / blobs[2], rtol=1e-5)
    np.testing.assert_allclose(layer.running_var, blobs[1] / blobs[2], rtol=1e-5)
    write(tmp_path / "again.caffemodel", layer)
    assert read(tmp_path / "again.caffemodel")["bn"].num_updates == 8
    layer = BatchNorm(C, decay=0.75)  # whose blobs say so many batches that the oldest no longer count
    for seed in range(3):
        layer(images(seed))
    write(tmp_path / "plain.caffemodel", {"bn": layer})
    (norm,) = read(tmp_path / "plain.caffemodel").values()
    again, x = to_layer(norm), images(12)
    again(x), layer(x)
    np.testing.assert_allclose(again.running_mean, layer.running_mean, rtol=1e-6)


def test_a_name_that_is_no_text(tmp_path):
    library("google.protobuf")
    data = caffe_net([batch_norm(MEAN, VAR, [1.0])]).replace(b"bn", b"b\xff")
    (tmp_path / "x.caffemodel").write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read '.*x.caffemodel': .*(UTF-8|utf-8|parsing)"):
        formats.inspect(tmp_path / "x.caffemodel")


def test_which_scale_belongs_to_a_batch_norm(tmp_path):
    bn, relu = (
        batch_norm(MEAN, VAR, [1.0], bottom="a", top="b"),
        ("relu", "ReLU", "b", "b", [], no_parameters),
    )
    behind = scale(GAMMA, bottom="b", top="c", parameters=no_parameters)
    assert np.allclose(of_caffe(tmp_path, bn, behind)["bn"].gamma, GAMMA)
    assert of_caffe(tmp_path, bn, behind)["bn"].beta is None
    assert of_caffe(tmp_path, bn, relu, behind)["bn"].gamma is None
    assert of_caffe(tmp_path, bn, scale(GAMMA, bottom="x"))["bn"].gamma is None
    assert of_caffe(tmp_path, bn, scale(GAMMA, bottom="b x"))["bn"].gamma is None  # by another layer's output
    with pytest.raises(ValueError, match=r"scale behind bn has other shapes, expected \(5,\)"):
        of_caffe(tmp_path, bn, scale(GAMMA[:3], bottom="b"))


def test_opencv_does_the_same(tmp_path):
    cv2 = library("cv2")
    layer = trained(eps=1e-3)
    write(tmp_path / "x.caffemodel", layer)
    text = f"""input: "bn1/x" input_dim: 6 input_dim: {C} input_dim: 4 input_dim: 3
    layer {{ name: "bn1" type: "BatchNorm" bottom: "bn1/x" top: "n" batch_norm_param {{ eps: 1e-3 }} }}
    layer {{ name: "bn1/scale" type: "Scale" bottom: "n" top: "y" scale_param {{ bias_term: true }} }}
    """
    (tmp_path / "x.prototxt").write_text(text)
    net = cv2.dnn.readNetFromCaffe(str(tmp_path / "x.prototxt"), str(tmp_path / "x.caffemodel"))
    net.setInput(images(3))
    np.testing.assert_allclose(net.forward(), layer(images(3), training=False), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("path", STATES, ids=lambda p: p.name)
def test_states_of_older_versions(path):
    layer, (norm,) = BatchNorm.load(path), read(path).values()
    again = to_layer(norm)
    assert (
        np.array_equal(layer.scale_shift(), again.scale_shift()) and layer.channel_axis == again.channel_axis
    )
    assert (layer.eps, layer.decay, str(layer.renorm)) == (again.eps, again.decay, str(again.renorm))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("ending", NEEDS)
def test_the_mode_of_a_file(tmp_path, ending):
    """A new file has that of other new ones, one that is replaced keeps its own."""
    library(NEEDS[ending])
    path, other = tmp_path / f"x.{ending}", tmp_path / "other"
    write(path, trained())
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    write(path, trained())
    assert path.stat().st_mode & 0o777 == 0o640


def test_lists_in_a_checkpoint(tmp_path):
    torch = library("torch")
    state = network(torch).state_dict()
    torch.save({"nets": [state, state], "sizes": (1, 2), "more": [torch.ones(2)]}, tmp_path / "x.pt")
    found = formats.inspect(tmp_path / "x.pt")
    assert list(found.norms) == ["nets/0/1", "nets/0/3", "nets/1/1", "nets/1/3"] and found.others == 5


@pytest.mark.parametrize("source", ["pt", "safetensors"])
def test_float8_is_named(tmp_path, source):
    torch = library("torch")
    state = {**network(torch).state_dict(), "half": torch.zeros(2).to(torch.float8_e5m2)}
    save = torch.save if source == "pt" else library("safetensors.torch").save_file
    save(state, tmp_path / f"x.{source}")
    assert list(read(tmp_path / f"x.{source}")) == ["1", "3"]  # which needs no other tensor
    with pytest.raises(ValueError, match=r"cannot convert '.*': half: "):
        formats.convert(tmp_path / f"x.{source}", tmp_path / "y.safetensors")


# ---- errors ------------------------------------------------------------------------------------------------

LAYER, G = from_layer(BatchNorm(3, name="a")), np.ones(3)
WRONG = [
    (lambda p: write(p / "x.bin2", LAYER), ValueError, "a name that ends in .safetensors, .pt, .*; or say"),
    (lambda p: write(p / "x", LAYER, kind="torchy"), ValueError, "kind is 'torchy', expected None, 's"),
    (lambda p: write(3, LAYER), TypeError, r"path is 3 \(int\), expected str or os.PathLike"),
    (lambda p: write(p / "x.keras", LAYER), ValueError, "expected .weights.h5: Keras alone writes"),
    (lambda p: write(p / "x.onnx", LAYER, names="keras"), ValueError, "'keras', but a file of onnx has its"),
    (lambda p: write(p / "x.safetensors", LAYER, names="kera"), ValueError, "names is 'kera'.*mean 'keras'"),
    (lambda p: write(p / "x.safetensors", LAYER, names="onnx"), ValueError, "'onnx', expected .*x'$"),
    (lambda p: write(p / "x.npz", [LAYER, BatchNorm(3, name="b")]), ValueError, "one layer, and there are 2"),
    (lambda p: write(p / "x.onnx", []), ValueError, "layers is empty, expected BatchNorm layers"),
    (lambda p: write(p / "x.onnx", "bn"), TypeError, r"layers is 'bn' \(str\), expected BatchNorm"),
    (lambda p: write(p / "x.onnx", 3), TypeError, r"layers is 3 \(int\), expected BatchNorm layers"),
    (lambda p: write(p / "x.onnx", [np.ones(3)]), TypeError, "layers holds .*ndarray, expected Batch"),
    (lambda p: write(p / "x.onnx", [LAYER, LAYER]), ValueError, "two of the name 'a', expected a name"),
    (lambda p: write(p / "x.onnx", Norm("a", np.full(3, np.nan), G)), ValueError, "mean of 'a' is nan"),
    (lambda p: write(p / "no" / "x.onnx", LAYER), FileNotFoundError, "No such file.*x.onnx'"),
    (lambda p: read(p / "no.safetensors"), FileNotFoundError, "no.safetensors"),
    (lambda p: read(p, kind="onnx"), IsADirectoryError, "name of a file, this is a folder"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), WRONG, ids=range(len(WRONG)))
def test_errors(tmp_path, call, error, match):
    for name in ("onnx", "safetensors"):
        library(name)
    with pytest.raises(error, match=match):
        call(tmp_path)
    assert os.listdir(tmp_path) == []


MODULES = {"safetensors": "safetensors", "weights.h5": "h5py", "onnx": "onnx", "caffemodel": "google"}


@pytest.mark.parametrize("ending", MODULES)
def test_a_missing_library_is_named(tmp_path, monkeypatch, ending):
    library(NEEDS[ending])
    write(tmp_path / f"x.{ending}", trained())
    import sys

    for name in [n for n in sys.modules if n.partition(".")[0] == MODULES[ending]]:
        monkeypatch.setitem(sys.modules, name, None)
    formats.read.__globals__["files"].read_caffe.__globals__["_net"].cache_clear()
    for call in (lambda: read(tmp_path / f"x.{ending}"), lambda: write(tmp_path / f"y.{ending}", trained())):
        with pytest.raises(ModuleNotFoundError, match=rf"needs {MODULES[ending]}.*'batchnorm\[formats\]'"):
            call()
    assert os.listdir(tmp_path) == [f"x.{ending}"]


def test_the_package_needs_none_of_them():
    from support.processes import output

    code = """
    import sys, batchnorm.formats, batchnorm.__main__
    print(sorted({"safetensors", "h5py", "onnx", "google.protobuf", "torch", "keras"} & set(sys.modules)))
    """
    assert output(code) == "[]"


@pytest.mark.parametrize("ending", NEEDS)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, ending):
    library(NEEDS[ending])
    path = tmp_path / f"x.{ending}"
    write(path, trained())
    old = path.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", fail)
        write(path, trained(seed=3))
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]
