"""A layer's state: saved, loaded and continued bit for bit; of older formats, and none that does not fit."""

from __future__ import annotations

import hashlib
import pathlib

import numpy as np
import pytest
from batchnorm import BatchNorm, Moments
from batchnorm.io.npz import read_arrays, write_arrays

from support import refusals
from support.archives import same_arrays

# What cold statistics are, and that using them warns, is tested with the layer.
pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning"),
]

C = 5
VECTORS = ("gamma", "beta", "running_mean", "running_var")
STORED = pathlib.Path(__file__).parent.parent / "data" / "states"


def images(seed=0, shape=(4, C, 3, 2), dtype=np.float32):
    return (3 + 2 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def trained(*, steps=3, **options):
    layer = BatchNorm(C, **options)
    for step in range(steps):
        layer(images(step, dtype=layer.dtype))
        layer.backward(images(step + 100, dtype=layer.dtype))
        for parameter in layer.parameters():
            parameter.value -= 0.01 * parameter.grad
    return layer


def bits(layer):
    """The whole state as bytes, and the settings."""
    return {name: (v.dtype.str, v.shape, v.tobytes()) for name, v in layer.state_dict().items()}, repr(layer)


def refused(path, match):
    message = refusals.refused(lambda: BatchNorm.load(path), ValueError, match, lambda: path.read_bytes())
    assert f"cannot load {str(path)!r}: " in message
    return message


# ---- what save writes --------------------------------------------------------------------------------------


LAYERS = [
    {}, {"dtype": np.float64}, {"scale": False}, {"center": False, "dtype": np.float64},
    {"scale": False, "center": False}, {"decay": None},
    {"decay": 0.99, "warmup": True, "on_nonfinite": "skip"},
    {"decay": 0.999, "zero_debias": True, "on_nonfinite": "raise", "dtype": np.float64},
    {"renorm": {"rmax": 3.0, "dmax": 5.0}}, {"renorm": True, "virtual_batch_size": 2},
    {"renorm": {"decay": 0.75}, "zero_debias": True, "activation": "relu"},
    {"virtual_batch_size": 2, "decay": None}, {"keep": "y", "activation": "leaky_relu"},
    {"keep": "y", "activation": "leaky_relu", "slope": 0.25},
    {"decay": 1 / 3, "eps": 1e-3, "running_ddof": 0, "activation": "relu"},
    {"decay": 1, "eps": 1, "allow_initial_statistics": True}, {"data_format": "NCHW", "name": "conv1.bn"},
    {"data_format": "channels_first", "name": "none"},
]  # fmt: skip


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
        assert bits(other) == bits(layer)
        x = images(3, dtype=layer.dtype)
        assert other.eval()(x).tobytes() == layer(x, training=False).tobytes()


def test_channels_that_were_masked_continue_as_well(tmp_path):
    """Counts, weights and missed updates are per channel, in the state too."""
    mask = np.ones((4, C, 3, 2), bool)
    mask[:, 1], mask[:3, 2] = False, False
    for options in ({"zero_debias": True}, {"decay": None}, {"warmup": True}, {}):
        layer = BatchNorm(C, **options)
        for step in range(3):
            layer(images(step), mask=mask if step else None)
        layer.save(tmp_path / "masked")
        state, loaded = layer.state_dict(), BatchNorm.load(tmp_path / "masked")
        assert state["num_values"].tolist() == [72, 24, 36, 72, 72]
        assert state["missed_updates"].tolist() == [0, 2, 0, 0, 0]
        for step in range(3):
            assert loaded(images(step)).tobytes() == layer(images(step)).tobytes()
        assert bits(loaded) == bits(layer)


def test_several_channel_axes(tmp_path):
    layer = BatchNorm((C, 3), channel_axis=(1, 2), name="per activation")
    layer(images())
    layer.save(tmp_path / "several")
    loaded = BatchNorm.load(tmp_path / "several")
    assert bits(loaded) == bits(layer) and loaded.num_features == (C, 3) and loaded.channel_axis == (1, 2)
    lazy = BatchNorm(channel_axis=(1, 2)).load_state_dict(layer.state_dict())
    assert lazy.num_features == (C, 3) and lazy.running_mean.shape == (C, 3)
    with pytest.raises(ValueError, match=r"gamma has shape \(5, 3\), expected \(5, 2\)"):
        BatchNorm((C, 2), channel_axis=(1, 2)).load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    "place", [{"data_format": "NHWC"}, {"data_format": "NC"}, {"channel_axis": -1}], ids=str
)
def test_a_new_layer_has_the_settings_of_the_saved_one(tmp_path, place):
    options = {"decay": 0.5, "eps": 0, "center": False, "running_ddof": 0, "activation": "relu", **place}
    layer = BatchNorm(C, dtype=np.float64, **options).eval()
    layer.save(tmp_path / "a")
    loaded = BatchNorm.load(tmp_path / "a")
    assert repr(loaded) == repr(layer).replace("training=False", "training=True")
    assert loaded.settings == layer.settings and bits(loaded)[0] == bits(layer)[0]


def test_a_subclass_loads_whatever_its_constructor_takes(tmp_path):
    class Mine(BatchNorm):
        def __init__(self, width, depth):
            super().__init__(width * depth, decay=0.5)

    trained(decay=0.75, name="mine").save(tmp_path / "a")
    loaded = Mine.load(tmp_path / "a")
    assert type(loaded) is Mine and loaded.decay == 0.75 and loaded.name == "mine"
    assert type(Mine(1, C).load_state_dict(loaded.state_dict())) is Mine


def test_a_layer_keeps_its_own_place_in_the_network():
    state = trained(name="old").state_dict()
    layer = BatchNorm(C, name="new", channel_axis=-1).load_state_dict(state)
    assert layer.name == "new" and layer.channel_axis == -1
    assert BatchNorm(data_format="NHWC").load_state_dict(state).channel_axis == -1


def test_the_format_stays(tmp_path):
    """The digest of a fixed state: it changes with format_version, and with nothing else."""
    layer = BatchNorm(3, decay=0.5, eps=1e-3, channel_axis=-1, activation="relu", dtype=np.float64, name="bn")
    layer.gamma = np.array([1.0, 2.0, 3.0])
    layer.save(tmp_path / "fixed")
    digest = hashlib.sha256()
    with np.load(tmp_path / "fixed", allow_pickle=False) as file:
        for name, value in file.items():
            digest.update(f"{name} {value.dtype.str} {value.shape} ".encode() + value.tobytes())
    assert digest.hexdigest() == "e32299f7eb46333fd01743215f2c3881de9fa7c980f7ea3ee53d54bfe25d4125"


def test_a_state_is_a_copy_and_so_is_what_is_loaded():
    layer = trained()
    state = layer.state_dict()
    before = {name: value.copy() for name, value in state.items()}
    layer(images(9))
    assert same_arrays(state, before)
    other = trained(steps=1).load_state_dict(state)
    for value in state.values():
        value[...] = value.dtype.type(0) if value.dtype.kind != "U" else ""
    assert bits(other)[0] == {n: (v.dtype.str, v.shape, v.tobytes()) for n, v in before.items()}
    gamma = other.gamma
    other.load_state_dict(before)
    assert other.gamma is gamma  # an optimiser may hold it


# ---- older formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["format1", "format2", "format2_save_memory", "format2_renorm"])
def test_files_of_version_0_1_load_and_continue(tmp_path, name):
    """Files as 0.1 wrote them, with what its layers then gave."""
    loaded, x = BatchNorm.load(STORED / f"{name}.npz"), images(500, (4, C, 3))
    with np.load(STORED / "expected.npz") as file:
        expected = {key.removeprefix(f"{name}_"): value for key, value in file.items()}
    if name == "format2_save_memory":
        x = images(500, (4, 3, C), np.float64)
        assert (loaded.keep, loaded.data_format, loaded.slope) == ("y", "NLC", 0.2)
    elif name == "format2_renorm":
        assert loaded.settings.has_reference and loaded.channel_axis == -2 and not loaded.center
    assert loaded.running.num_updates == 60
    assert loaded.running.num_values.tolist() == [0 if name == "format1" else 60 * 12] * C
    np.testing.assert_allclose(loaded(x, training=False), expected["eval"], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(loaded(x), expected["train"], rtol=2e-6, atol=2e-6)
    for vector in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(loaded, vector), expected[vector], rtol=1e-6)
    loaded.save(tmp_path / "new")
    assert int(read_arrays(tmp_path / "new")["format_version"]) == 3
    assert bits(BatchNorm.load(tmp_path / "new")) == bits(loaded)
    assert loaded.save(tmp_path / "renamed") is None


def format_1(**changes):
    return {**read_arrays(STORED / "format1.npz"), **changes}


def test_what_format_1_says_of_statistics_that_were_never_updated():
    zero, one = np.zeros(C, np.float32), np.ones(C, np.float32)
    new = format_1(num_updates=np.array(0), running_mean=zero, running_var=one)
    known = format_1(num_updates=np.array(0))
    layer = BatchNorm(C, activation="relu")
    assert layer.load_state_dict(known).running.initial_weight.tolist() == [0] * C
    layer.eval()(images())
    assert layer.load_state_dict(new).running.untouched().all()
    with pytest.raises(RuntimeError, match="never updated"):
        layer(images())
    assert layer.load_state_dict(format_1()).running.initial_weight[0] == 0.9**60
    assert layer.load_state_dict(format_1(decay=np.array("none"))).running.initial_weight[0] == 0


@pytest.mark.parametrize("name", ["format1", "format2"])
def test_older_formats_are_as_strict(name, tmp_path):
    state = read_arrays(STORED / f"{name}.npz")
    for entry in state:
        if entry not in ("gamma", "beta"):  # without them it is the state of a layer without them
            write_arrays(tmp_path / "less", {n: v for n, v in state.items() if n != entry})
            new = {"axis": "channel_axis", "save_memory": "keep"}.get(entry, entry)
            if entry != "format_version":
                refused(tmp_path / "less", f"missing {new} ")
            else:
                refused(tmp_path / "less", "missing |unexpected ")
    write_arrays(tmp_path / "more", {**state, "axes": np.array(1)})
    refused(tmp_path / "more", r"unexpected axes \(strict")
    changes = {
        "format_version is 4, expected 1 to 3": {"format_version": np.array(4)},
        "num_updates is -1, int64 of shape": {"num_updates": np.array(-1)},
        "channel_axis is -1 but data_format": {"axis": np.array(-1), "data_format": np.array("NCHW")},
        "dtype float(32|64), expected an array of float": {"running_mean": np.ones(C)},
    }
    for match, change in changes.items():
        write_arrays(tmp_path / "other", {**state, **change})
        refused(tmp_path / "other", match)
    if name == "format2":
        for entry, value in (("num_values", -1), ("initial_weight", 1.5), ("save_memory", 2), ("warmup", 2)):
            write_arrays(tmp_path / "other", {**state, entry: np.array(value)})
            refused(tmp_path / "other", f"{entry} is {value}")


# ---- states that do not fit --------------------------------------------------------------------------------


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    layer = trained()
    layer.save(tmp_path / "layer")
    old = (tmp_path / "layer").read_bytes()
    layer.running_var[2] = np.nan
    with pytest.raises(
        ValueError, match="running_var is nan at channel 2, expected finite float32 values >= 0"
    ):
        layer.save(tmp_path / "layer")
    with pytest.raises(RuntimeError, match=r"^save\(\) needs the channel count, which is not known yet"):
        BatchNorm().save(tmp_path / "layer")
    assert (tmp_path / "layer").read_bytes() == old


BAD_STATES = {
    "nan": ({"running_mean": np.array([0, 0, 0, np.nan, 0], "f4")}, "running_mean is nan at channel 3, exp"),
    "inf": ({"beta": np.full(C, np.inf, "f4")}, "beta is inf at channel 0, expected finite"),
    "negative": ({"running_var": np.array([1, 1, -1, 1, 1], "f4")}, "running_var is -1.0 at channel 2.*>= 0"),
    "missing": ({"running_var": None, "eps": None}, "missing running_var, eps"),
    "unexpected": ({"means": np.ones(C)}, r"fit the layer: unexpected means \(strict=False loads what fits"),
    "no layout": ({"data_format": None}, "missing data_format"),
    "layout": ({"data_format": np.array("nhwc")}, "data_format is 'nhwc', expected"),
    "two layouts": ({"data_format": np.array("NHWC")}, "channel_axis is 1 but data_format is 'NHWC'"),
    "both": ({"running_mean": None, "mean": np.ones(C)}, "mean is called running_mean here"),
    "length": ({"beta": np.ones(C + 1, "f4")}, r"beta has shape \(6,\), expected \(5,\), one value"),
    "no channels": (dict.fromkeys(VECTORS, np.ones(0, "f4")), r"gamma has shape \(0,\), expected"),
    "dtype": ({"beta": np.ones(C)}, "beta has dtype float64, expected an array of float32"),
    "dtypes": ({"running_mean": np.ones(C)}, "gamma has dtype float32, expected an array of float64"),
    "no dtype": ({"running_mean": np.ones(C, np.int64)}, r"dtype is dtype\('int64'\), expected numpy"),
    "version": ({"format_version": np.array(4)}, "format_version is 4, expected 1 to 3, which"),
    "version text": ({"format_version": np.array("3")}, r"format_version is '3' \(str\), expected 1 to 3"),
    "no version": ({"format_version": None}, "missing format_version"),
    "eps": ({"eps": np.array(-1.0)}, "eps is -1.0, expected"),
    "eps shape": ({"eps": np.ones(2)}, r"eps has shape \(2,\), expected a single value"),
    "decay": ({"decay": np.array(2.0)}, "decay is 2.0, expected"),
    "updates": ({"num_updates": np.array(-3)}, "num_updates is -3, int64 of shape .*expected an int from 0"),
    "updates float": ({"num_updates": np.array(3.0)}, r"num_updates is 3., float64 of .*, expected an int"),
    "many updates": ({"num_updates": np.full(C, 3)}, r"num_updates is \[3 3 3 3 3\], int64 of shape \(5,\)"),
    "amounts": ({"num_values": np.ones(C + 1)}, r"num_values is .*shape \(6,\), .* of them of shape \(5,\)"),
    "skipped": ({"num_skipped": np.array(-1)}, "num_skipped is -1.*, expected an int from 0"),
    "missed": ({"missed_updates": np.ones(C)}, "missed_updates is .*, expected an int from"),
    "weight": ({"initial_weight": np.full(C, 1.5)}, "initial_weight is .*, expected a number from 0 to 1"),
    "weight kind": ({"initial_weight": np.array("a")}, "initial_weight is 'a', <U1 of shape"),
    "parts": ({"virtual_batch_size": np.array(0)}, "virtual_batch_size is 0, expected an int >= 1, or None"),
    "limit": ({"renorm_rmin": np.array(0), "renorm_rmax": np.array(0.5)}, "rmax is 0.5, expected a number"),
    "limit kind": (
        {"renorm_rmin": np.array(0), "renorm_rmax": np.array(2), "renorm_dmax": np.array("a")},
        r"dmax is 'a' \(str\)"
    ),
    "no reference": (
        {"renorm_rmin": np.array(0.0), "renorm_rmax": np.array(2.0), "renorm_dmax": np.array(2.0),
         "renorm_decay": np.array(0.5)}, "missing renorm_mean, renorm_std"
    ),
    "kept": ({"keep": np.array("z")}, "keep is 'z', expected 'x' or 'y'"),
    "kept relu": ({"keep": np.array("y"), "activation": np.array("relu")}, "keep is 'y' and activation"),
    "flag": ({"warmup": np.array(2)}, "warmup is 2, expected 0 or 1"),
    "guard": ({"on_nonfinite": np.array("stop")}, "on_nonfinite is 'stop', expected 'propagate', 'raise' or"),
    "two ways": ({"zero_debias": np.array(1), "warmup": np.array(1)}, "warmup and zero_debias are both True"),
    "ddof": ({"running_ddof": np.array(7)}, "running_ddof is 7, expected"),
    "axis float": ({"channel_axis": np.array(1.0)}, r"channel_axis is 1.0 \(float\), expected an int"),
    "axes": ({"channel_axis": np.ones((1, 1), int)}, r"channel_axis has shape \(1, 1\)"),
    "activation": ({"activation": np.array("gelu")}, "activation is 'gelu', expected"),
    "slope": ({"slope": np.array(0.5)}, "slope is given with activation=None"),
    "name": ({"name": np.array(3)}, r"name is 3 \(int\), expected"),
    "no scale": ({"scale": np.array(0)}, "unexpected gamma"),
    "nothing": ({name: None for name in trained().state_dict()}, "the state has no names, expected some of"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_states_that_do_not_fit(tmp_path, changes, match):
    state = {**trained().state_dict(), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    write_arrays(tmp_path / "entries.npz", state)
    assert len(refused(tmp_path / "entries.npz", match)) < 600
    layer = trained(steps=1)
    before = bits(layer)
    decided_by_the_layer = ("data_format", "channel_axis", "scale", "name")
    if not any(name in changes for name in decided_by_the_layer) or "missing" in match:
        errors = (TypeError, ValueError)
        refusals.refused(lambda: layer.load_state_dict(state), errors, (), lambda: (bits(layer), state))
    assert bits(layer) == before


def test_what_the_network_decides_must_agree():
    layer = trained(activation="leaky_relu")
    before = bits(layer)
    leaky = {"activation": "leaky_relu"}
    for options, match in (
        ({"activation": "relu"}, "activation is 'relu' in the state, expected 'leaky_relu' as in this layer"),
        (leaky | {"slope": 0.5}, "slope is 0.5 in the state, expected 0.01 as in this layer"),
        (leaky | {"renorm": {"decay": 0.5}}, "renorm has a decay of its own, .* either in the state or in"),
        (leaky | {"scale": False}, "missing gamma"),
    ):
        with pytest.raises(ValueError, match=match):
            layer.load_state_dict(trained(**options).state_dict())
    layer.gamma.flags.writeable = False
    with pytest.raises(ValueError, match="gamma of this layer has been made read-only"):
        layer.load_state_dict(layer.state_dict())
    assert bits(layer) == before


def test_not_strict_takes_what_there_is():
    layer, state = trained(steps=1), trained().state_dict()
    some = {name: state[name] for name in ("running_mean", "running_var", "eps")} | {"comment": np.array("a")}
    with pytest.raises(ValueError, match=r"missing gamma, beta, .*unexpected comment"):
        layer.load_state_dict(some)
    gamma = layer.gamma.copy()
    layer.load_state_dict(some, strict=False)
    assert layer.gamma.tobytes() == gamma.tobytes()
    assert layer.running_mean.tobytes() == state["running_mean"].tobytes()
    assert (layer.running.initial_weight == 0).all()  # given as by hand, so they are known
    cold, some["num_updates"] = BatchNorm(C).state_dict(), np.array(5)
    layer.load_state_dict(cold).load_state_dict(some, strict=False)
    assert (layer.running.initial_weight == 0).all() and layer.running.num_updates == 5
    with pytest.raises(ValueError, match=r"running_var is nan"):
        layer.load_state_dict({"running_var": np.full(C, np.nan, np.float32)}, strict=False)
    plain = {**state, "eps": 1e-3, "decay": None, "warmup": False, "num_updates": 7, "on_nonfinite": "skip"}
    loaded = BatchNorm().load_state_dict(plain)
    assert (loaded.eps, loaded.decay, loaded.running.num_updates) == (1e-3, None, 7)
    for strict in (1, "yes", None):
        with pytest.raises(TypeError, match=r"strict is .*, expected True or False"):
            layer.load_state_dict(state, strict=strict)
    for bad in ([1], None, "state"):
        with pytest.raises(TypeError, match=r"state is .*, expected a mapping of names to arrays"):
            layer.load_state_dict(bad)


OF_OTHERS = [
    (["weight", "bias", "running_mean", "running_var", "num_batches_tracked"], "weight is called gamma here"),
    (["layer1.0.bn1.weight", "layer1.0.bn1.running_mean"], "weight is called gamma here"),
    (["gamma", "beta", "moving_mean", "moving_variance"], "moving_mean is called running_mean here"),
    (["bn/gamma:0", "bn/moving_variance:0"], "moving_variance is called running_var here"),
    (["scale", "bias", "mean", "var"], "scale is called gamma here, bias is called beta here"),
    (["mean", "var"], "mean is called running_mean here, var is called running_var here"),  # Flax
    (["mean_", "var_", "n_samples_seen_"], "mean_ is called running_mean here"),  # scikit-learn
    (["bn_gamma", "bn_beta", "bn_moving_mean", "bn_moving_var"], "moving_mean is called running_mean here"),
]


@pytest.mark.parametrize(("names", "match"), OF_OTHERS)
def test_a_state_of_another_library_is_explained_first(tmp_path, names, match):
    state = dict.fromkeys(names, np.ones(C, np.float32))
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"^the state is that of another library: .*{match}") as caught:
            BatchNorm(C).load_state_dict(state, strict=strict)
        text = str(caught.value)
        assert "bn.gamma = ..., bn.beta = ..." in text and "1e-3 in Keras" in text
        assert "missing" not in text and len(text) < 500
    if all(name.isidentifier() for name in names):
        write_arrays(tmp_path / "theirs.npz", state)
        refused(tmp_path / "theirs.npz", match)


def test_a_state_of_no_name_of_ours_is_an_error_even_if_not_strict():
    # strict=False would load nothing of it, without a word.
    state = trained().state_dict()
    network = {f"{layer}.{name}": value for layer in ("bn1", "bn2") for name, value in state.items()}
    one = {k: v for k, v in network.items() if k.startswith("bn1.")}
    vectors = {"gamma": state["gamma"]}
    for bad, match in (
        (network, r"they are those of 2 layers: pass \{k.removeprefix\(p\): .*\} with p = 'bn1\.'"),
        (one, r"they are a layer's with a prefix: pass .* with p = 'bn1\.'"),
        ({"params": vectors, "batch_stats": vectors}, "its values are mappings: take the arrays out"),
        (
            {"runing_mean": state["running_mean"]},
            "the state has the names 'runing_mean', expected some of gamma",
        ),
        ({"0": state["gamma"], "1": state["beta"]}, r"pass what state_dict\(\) of a BatchNorm gives"),
        (
            Moments().update(np.ones((4, C))).state_dict(),
            "has the names 'channel_axis'|the state has the names",
        ),
        ({}, "the state has no names"),
    ):
        for strict in (True, False):
            with pytest.raises(ValueError, match=match):
                BatchNorm(C).load_state_dict(bad, strict=strict)
    p = "bn1."  # as advised
    stripped = {k.removeprefix(p): v for k, v in network.items() if k.startswith(p)}
    loaded = BatchNorm(C).load_state_dict(stripped)
    assert loaded.running_mean.tobytes() == state["running_mean"].tobytes()
