"""inspect and convert: what is in a file, what looks wrong there, and what another cannot hold."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from batchnorm import formats
from batchnorm.formats import Norm, convert, inspect, read, to_layer, write

from support.command import command, error, output
from support.models import C, library, same_function, trained

G, B, M, V = np.random.default_rng(0).uniform(0.5, 2, (4, C)).astype(np.float32)


def changed(vector, where, value):
    new = vector.copy()
    new[where] = value
    return new


BAD = ("invalid_statistics",)
# What is wrong, the codes of what is found, words of it.
CASES = {
    "fine": (Norm("bn", M, V, G, B, num_updates=500), (), ""),
    "negative": (Norm("bn", M, changed(V, 3, -1), G, B), BAD, "_var is -1 in channel 3"),
    "nan": (Norm("bn", changed(M, 1, np.nan), V, G, B), BAD, "_mean is nan in channel 1"),
    "inf": (Norm("bn", M, changed(V, 0, np.inf), G, B), BAD, "_var is inf in channel 0"),
    "never": (Norm("bn", M * 0, V * 0 + 1, G, B), ("never_updated",), "never updated"),
    "counted": (Norm("bn", M * 0, V * 0 + 1, G, B, num_updates=0), ("never_updated",), "never updated"),
    "cold": (Norm("bn", M, V, G, B, num_updates=9), ("cold",), "9 updates with decay=0.9"),
    "tiny": (Norm("bn", M, changed(V, 2, 1e-9), G, B), ("eps_dominates",), "below eps=1e-05 in channel 2"),
    "tiny, not for this eps": (Norm("bn", M, changed(V, 2, 1e-9), G, B, eps=1e-12), (), ""),
    "dead": (Norm("bn", M, changed(V, 2, 0), G, B), ("dead_channels",), "is 0 in channel 2, gamma in 0 of"),
    "no gamma": (Norm("bn", M, V, changed(G, [1, 4], 0), B), ("dead_channels",), r"\(1, 4\), gamma in 2 of"),
    "huge": (Norm("bn", M, V, changed(G, 4, -1e4), B), ("huge_gamma",), "channel 4, 1e.04 at the most"),
    "gamma nan": (Norm("bn", M, V, changed(G, 4, np.nan), B), ("huge_gamma",), "100 in channel 4, nan"),
    "shifted": (Norm("bn", M, changed(V, 0, -9e-6), G, B), ("shifted_var",), "-9e-06 at the least, not bel"),
    "both": (Norm("bn", M, changed(V, 0, 0), changed(G, 1, 300), B), ("dead_channels", "huge_gamma"), ""),
    "look-alike": (Norm("bn", M, V), ("unsure",), "may be an instance norm"),
    "by its name": (Norm("instance_norm1", M, V, G, B), ("unsure",), "its own name says so"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_findings(tmp_path, case):
    norm, codes, words = CASES[case]
    save = library("safetensors.numpy").save_file
    arrays = formats.arrays_of(norm, "pytorch")
    arrays = {k: v for k, v in arrays.items() if norm.num_updates is not None or not k.endswith("tracked")}
    said = json.dumps({norm.name: {"eps": norm.eps}} if norm.eps else {})
    save(arrays, tmp_path / "x.safetensors", metadata={"batchnorm": said})
    found = inspect(tmp_path / "x.safetensors")
    assert found.codes == codes and [finding.layer for finding in found] == [norm.name] * len(codes)
    assert re.search(words, str(found))
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["kind"] == "safetensors"


@pytest.mark.quick
def test_the_table(tmp_path):
    library("safetensors")
    layers = [trained("first", eps=1e-3, decay=0.99), trained("second", scale=False, channel_axis=-1)]
    write(tmp_path / "x.safetensors", layers)
    assert (
        str(inspect(tmp_path / "x.safetensors"))
        == """\
name    C  names of  gamma  beta  eps    decay  running_ddof  channel_axis  updates
first   5  pytorch   yes    yes   0.001  0.99   1             1             200
second  5  pytorch   -      yes   1e-05  0.9    1             -1            200
2 batch norms, 0 other tensors
cold: first: the running statistics are cold: after 200 updates with decay=0.99 the initial values still \
weigh 13 %, 259 more updates bring that to 1 %. Train longer, or use decay=0.977 or less for so many \
updates, or build the layer with zero_debias=True or decay=None. To mend the statistics now call \
batchnorm.recalibrate(layers, forward, batches) in a network, bn.recalibrate(inputs) of one layer."""
    )


@pytest.mark.quick
def test_alike_findings_are_said_once(tmp_path):
    library("safetensors")
    norms = {f"n{i}": Norm("", M, V, G, B, num_updates=9) for i in range(4)}
    write(tmp_path / "x.safetensors", norms)
    text = str(inspect(tmp_path / "x.safetensors"))
    assert text.count("cold") == 2 and "cold: n0, n1, n2, n3: the running" in text


@pytest.mark.quick
def test_a_file_without_batch_norms(tmp_path):
    library("safetensors.numpy").save_file({"fc.weight": np.ones((2, 3))}, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert str(found) == "0 batch norms, 1 other tensor" and found.codes == () and found.norms == {}


# ---- convert -----------------------------------------------------------------------------------------------

ENDINGS = {"safetensors": "safetensors", "pt": "torch", "weights.h5": "h5py", "onnx": "onnx",
           "caffemodel": "google.protobuf", "npz": "numpy"}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("source", ENDINGS)
@pytest.mark.parametrize("target", ENDINGS)
def test_from_every_kind_to_every_other(tmp_path, source, target):
    for name in (ENDINGS[source], ENDINGS[target]):
        library(name)
    layer = trained("bn", running_ddof=0 if source in ("weights.h5", "onnx") else 1, decay=0.8)
    write(tmp_path / f"x.{source}", layer)
    notes = convert(tmp_path / f"x.{source}", tmp_path / f"y.{target}")
    (norm,) = read(tmp_path / f"y.{target}").values()
    assert norm.name == "bn" and same_function(layer, to_layer(norm, eps=layer.eps, channel_axis=1), 1e-6)
    said = any("decay=0.8" in note and "where" not in note for note in notes)
    assert said == (target == "pt" != source)
    said = any("decay=0.8 where" in note for note in notes)  # whose readers know nothing of our metadata
    assert said == (source != "pt" and target in ("safetensors", "weights.h5"))
    said = any("not in the source" in note for note in notes)
    assert said == (source == "pt" and target not in ("pt", "safetensors"))


@pytest.mark.quick
def test_what_is_not_carried_is_said(tmp_path):
    save = library("safetensors.numpy").save_file
    library("onnx")
    arrays = formats.arrays_of(Norm("a", M, V, G, B, 3), "pytorch") | formats.arrays_of(
        Norm("b", M, V, G, B), "keras"
    )
    save({**arrays, "fc.weight": np.ones((2, 3))}, tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors", tmp_path / "x.onnx") == (
        "running_ddof=1 (onnx: 0 unless told) of a", "num_updates=3 of a",
        "eps: not in the source; 1e-05, the default of pytorch, taken for a",
        "eps: not in the source; 0.001, the default of keras, taken for b",
        "decay, channel_axis: not in the source, of a, b; defaults stand where needed",
        "1 tensor that belongs to none of these batch norms",
    )  # fmt: skip
    assert convert(tmp_path / "x.safetensors", tmp_path / "y.onnx", only=["b"])[-1].startswith(
        "6 tensors that belong"
    )
    assert list(read(tmp_path / "y.onnx")) == ["b"]


@pytest.mark.quick
def test_another_eps_in_the_target(tmp_path):
    library("onnx"), library("safetensors")
    layer = trained("bn", eps=1e-3)
    write(tmp_path / "x.onnx", layer)
    convert(tmp_path / "x.onnx", tmp_path / "x.safetensors", names="pytorch", eps=1e-5)
    norm = read(tmp_path / "x.safetensors")["bn"]
    np.testing.assert_allclose(norm.var, layer.running_var + 1e-3 - 1e-5, rtol=1e-6)
    assert norm.eps == 1e-5


@pytest.mark.quick
def test_an_eps_that_the_source_does_not_say(tmp_path):
    """It is the source library's; the target's is another, so that variances change or a note tells."""
    library("safetensors"), library("h5py")
    norm = Norm("bn", M, V, G, B)
    write(tmp_path / "x.safetensors", norm)
    taken = "eps: not in the source; 1e-05, the default of pytorch, taken for bn"

    def converted(**options):
        notes = convert(tmp_path / "x.safetensors", tmp_path / "x.weights.h5", **options)
        return notes, read(tmp_path / "x.weights.h5")["bn"]

    notes, back = converted()
    assert notes[0] == "eps=1e-05 where keras reads it (0.001 unless told) of bn" and taken in notes
    assert back.eps == 1e-5 and np.array_equal(back.var, V)
    notes, back = converted(eps=1e-3)
    assert taken in notes and not any("eps=" in note for note in notes)
    np.testing.assert_allclose(back.var + np.float64(1e-3), V + np.float64(1e-5), rtol=1e-7)
    notes, back = converted(eps=1e-3, source_eps=1e-2)
    assert not any("eps" in note for note in notes)
    np.testing.assert_allclose(back.var + np.float64(1e-3), V + np.float64(1e-2), rtol=1e-7)
    notes, back = converted(source_eps=1e-2)
    assert back.eps == 1e-2 and notes[0].startswith("eps=0.01 where keras reads it")
    with pytest.raises(ValueError, match=r"source_eps is 0.1, but the source says eps itself: drop it"):
        convert(tmp_path / "x.weights.h5", tmp_path / "y.safetensors", source_eps=0.1)


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras
def test_libraries_that_read_no_metadata_are_told(tmp_path):
    """With --eps the target library gives the same, without it the note says the eps that does."""
    keras, torch = library("keras"), library("torch")
    model = keras.Sequential([keras.Input((C,)), keras.layers.BatchNormalization(name="bn", epsilon=0.1)])
    model.layers[0].set_weights([G, B, M, V])
    model.save(tmp_path / "x.keras")
    x = np.random.default_rng(1).standard_normal((7, C)).astype(np.float32)
    want = model(x).detach().numpy()
    for options, eps in (({}, 0.1), ({"eps": 1e-5}, 1e-5)):
        notes = convert(tmp_path / "x.keras", tmp_path / "x.safetensors", **options)
        assert any(n.startswith("eps=0.1 where pytorch reads it (1e-05") for n in notes) == (not options)
        theirs = torch.nn.BatchNorm1d(C, eps=eps).eval()
        state = library("safetensors.torch").load_file(tmp_path / "x.safetensors")
        theirs.load_state_dict({key.removeprefix("bn."): value for key, value in state.items()})
        np.testing.assert_allclose(theirs(torch.from_numpy(x)).detach().numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_all_tensors_go_between_safetensors_and_pt(tmp_path):
    torch, save = library("torch"), library("safetensors.torch").save_file
    library("ml_dtypes")
    state = {"a.weight": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16) / 3,
             "bn.running_mean": torch.ones(3), "bn.running_var": torch.ones(3),
             "n": torch.tensor(3)}  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    assert convert(tmp_path / "x.pt", tmp_path / "x.safetensors") == ()
    assert convert(tmp_path / "x.safetensors", tmp_path / "y.pt") == ()
    theirs, back = (
        library("safetensors.torch").load_file(tmp_path / "x.safetensors"),
        torch.load(tmp_path / "y.pt"),
    )
    for name, tensor in state.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(back[name], tensor)
        assert theirs[name].dtype == back[name].dtype == tensor.dtype
    save(theirs, tmp_path / "z.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "z.safetensors", tmp_path / "w.safetensors")
    with library("safetensors").safe_open(tmp_path / "w.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.quick
def test_errors_of_convert(tmp_path):
    library("safetensors"), library("onnx")
    write(tmp_path / "x.safetensors", trained("bn"))
    library("safetensors.numpy").save_file({"a": G}, tmp_path / "none.safetensors")
    library("safetensors.numpy").save_file(
        formats.arrays_of(Norm("a", M, -V), "pytorch"), tmp_path / "neg.safetensors"
    )
    before = sorted(os.listdir(tmp_path))
    for match, call in {
        r"only names 'c', expected names of batch norms in .*: bn$": lambda: convert(
            tmp_path / "x.safetensors", tmp_path / "y.onnx", only=["c"]),
        r"none.safetensors' has no batch norms, expected at least one": lambda: convert(
            tmp_path / "none.safetensors", tmp_path / "y.onnx"),
        r"a.running_var is -.* at channel \d, expected at least -1e-05, -eps": lambda: convert(
            tmp_path / "neg.safetensors", tmp_path / "y.onnx"),
        r"names is 'flux'": lambda: convert(
            tmp_path / "x.safetensors", tmp_path / "y.safetensors", names="flux"),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
    assert sorted(os.listdir(tmp_path)) == before


# ---- the command line --------------------------------------------------------------------------------------


def test_the_commands(tmp_path):
    library("safetensors"), library("onnx"), library("h5py")
    write(tmp_path / "x.safetensors", [trained("a"), trained("b")])
    done = command(tmp_path, "inspect", "x.safetensors")
    assert output(done) == str(inspect(tmp_path / "x.safetensors")) + "\n"
    found = json.loads(output(command(tmp_path, "inspect", "x.safetensors", "--json")))
    assert found["batch_norms"]["a"]["channels"] == C and found["findings"] == []
    assert output(command(tmp_path, "convert", "x.safetensors", "x.onnx", "--only", "a")).splitlines() == [
        "not in OUT: running_ddof=1 (onnx: 0 unless told) of a", "not in OUT: num_updates=200 of a",
        "not in OUT: 5 tensors that belong to none of these batch norms",
    ]  # fmt: skip
    lost = json.loads(output(command(tmp_path, "convert", "x.onnx", "x.weights.h5", "--json")))
    assert [note.split(" where keras")[0] for note in lost["lost"]] == [
        "eps=1e-05",
        "decay=0.9",
        "channel_axis=1",
    ] and list(read(tmp_path / "x.weights.h5")) == ["a"]
    noted = output(command(tmp_path, "convert", "x.safetensors", "y.safetensors", "--names=flax"))
    assert noted.startswith("not in OUT: decay=0.9 where flax reads it (0.99 unless told) of a, b\n")
    save = library("safetensors.numpy").save_file
    save(formats.arrays_of(Norm("a", M, V), "pytorch"), tmp_path / "z.safetensors")
    line = ["convert", "z.safetensors", "z.weights.h5", "--eps=1e-3"]
    assert "\neps: not in the source; 1e-05, the default of" in output(command(tmp_path, *line))
    assert "eps" not in output(command(tmp_path, *line, "--from-eps=1e-5"))
    os.rename(tmp_path / "x.onnx", tmp_path / "model")
    assert "1 batch norm, 0" in output(command(tmp_path, "inspect", "model", "--kind", "onnx"))
    assert output(command(tmp_path, "convert", "model", "copy", "--from", "onnx", "--to", "npz")) == ""
    assert list(read(tmp_path / "copy", "npz")) == ["a"]


def test_the_exit_status_of_inspect(tmp_path):
    library("safetensors")
    write(tmp_path / "x.safetensors", Norm("a", M, changed(V, 1, 0), G, B))
    done = command(tmp_path, "inspect", "x.safetensors")
    assert done.returncode == 3 and "dead_channels: a: " in done.stdout and done.stderr == ""
    assert json.loads(command(tmp_path, "inspect", "x.safetensors", "--json").stdout)["findings"][0][
        "channels"
    ] == [1]
    assert "dead" not in output(
        command(tmp_path, "inspect", "x.safetensors", "--ignore", "cold,dead_channels")
    )


def test_errors_of_the_commands(tmp_path):
    library("safetensors"), library("onnx")
    write(tmp_path / "x.safetensors", trained("a"))
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    for line, words in {
        "inspect no.onnx": "[Errno 2] No such file or directory: 'no.onnx'",
        "inspect bad.safetensors": "cannot read 'bad.safetensors': Error while deserializing header",
        "inspect x.what": "path is 'x.what', expected a name that ends in .safetensors, .pt",
        "convert x.safetensors y.onnx --only b": "--only names 'b', expected names of batch norms in",
        "convert x.safetensors y.keras": "path is 'y.keras', expected .weights.h5",
        "convert x.safetensors y.onnx --from-eps 1": "--from-eps is 1.0, but the source says eps itself",
        "convert x.safetensors y.npz --names keras": "--names is 'keras', but a file of npz has its own",
    }.items():
        assert error(command(tmp_path, *line.split()), line.split()[0]).startswith(words)
    done = command(tmp_path, "inspect", "x.safetensors", code="import sys; sys.modules['safetensors'] = None")
    assert error(done, "inspect").endswith("is not installed: pip install 'batchnorm[formats]'")
    assert sorted(os.listdir(tmp_path)) == ["bad.safetensors", "x.safetensors"]
