"""What a layer is told: every option checked, shown, changed where it may be, translated where not ours."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

import numpy as np
import pytest
from batchnorm import BatchNorm, batch_norm_train
from batchnorm.settings import Settings
from batchnorm.typing import CallOptions

from support.layers import C, held, images, trained
from support.refusals import refused

pytestmark = pytest.mark.quick
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def test_the_constructor_has_the_options_of_the_table_and_their_defaults():
    signature = inspect.signature(BatchNorm.__init__).parameters
    for name, field in FIELDS.items():
        assert signature[name].default == field.default
        assert signature[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert getattr(BatchNorm(C), name) == getattr(BatchNorm(C).settings, name) == field.default
    others = set(signature) - set(FIELDS)
    assert others == {"self", "num_features", "name", "group", "initial", "history", "dtype"}
    with pytest.raises(
        TypeError, match=r"takes by position num_features, .* by name: name=, decay=, warmup="
    ):
        BatchNorm(C, 1e-5, 0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "float64", np.dtype("f4"), float])
def test_a_new_layer_is_the_identity_transform(dtype):
    layer = BatchNorm(C, dtype=dtype)
    for array, value in ((layer.gamma, 1), (layer.beta, 0), (layer.running_mean, 0), (layer.running_var, 1)):
        assert array.dtype == np.dtype(dtype) == layer.dtype
        np.testing.assert_array_equal(array, np.full(C, value))
    assert (layer.num_features, layer.name, layer.training, layer.frozen, layer.history) == (
        C,
        None,
        True,
        False,
        None,
    )
    assert (layer.dgamma, layer.dbeta, layer.dresidual, layer.renorm_mean, layer.renorm_std) == (None,) * 5
    assert (layer.running.num_updates, layer.running.num_skipped) == (0, 0)
    for name, value in (("num_values", 0), ("initial_weight", 1), ("missed_updates", 0), ("updates", 0)):
        np.testing.assert_array_equal(getattr(layer.running, name), np.full(C, value))


GOOD = {
    "decay": (0.5, 0, 1, None, np.float32(0.5)), "warmup": (True, np.True_), "zero_debias": (True,),
    "eps": (0, 1e-3, np.float64(1)), "channel_axis": (-1, 0, np.int64(2)),
    "data_format": ("NC", "NLC", "NCHW", "NHWC", "NDHWC", "channels_last"), "scale": (False,),
    "center": (False,),
    "running_ddof": (0, 1), "activation": ("relu", "silu", None),
    "renorm": (True, None, {"rmax": 2}, {"decay": 0.5}),
    "virtual_batch_size": (1, 32, None), "keep": ("x", "y"), "on_nonfinite": ("raise", "skip"),
    "allow_initial_statistics": (True,),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values], ids=str)
def test_good_options(name, value):
    layer = BatchNorm(**{name: value})
    got = getattr(layer, name)
    if name == "renorm":
        assert got is None if value is None else set(got) == {"rmin", "rmax", "dmax", "decay"}
    else:
        assert got == value and (got is None or type(got).__module__ in ("builtins", "batchnorm.settings"))
    assert dataclasses.replace(layer.settings) == layer.settings
    assert pickle.loads(pickle.dumps(layer.settings)) == layer.settings


NUMBERS_ARE_NO_FLAGS = (1, 0, "True", None, 1.0, np.array(True))
BAD = {
    "num_features": ((2.5, True, np.True_, "3", [3], np.array([3])), (0, -1, 2**31 + 1, 2**70),
        "an int from 1 to"),
    "name": ((1, b"bn", ["bn"]), ("",), "a str that is not empty"),
    "decay": (("0.9", True, 1j, [0.9], np.array([0.9])), (-0.1, 1.1, np.nan, np.inf, 10**400),
        "the weight of the old value"),
    "eps": (("1e-5", False, None, [1e-5]), (-1e-5, np.nan, np.inf), "a finite number >= 0"),
    "channel_axis": ((1.0, True, None, "1", (1, 2.0)), ((), (1, 1), (0, 2, 3)), "the channels|the samples"),
    "data_format": ((1, b"NCHW"), ("nchw", "HWC", ""), "'NCHW'"),
    "running_ddof": ((1.0, True, "1", None), (-1, 2), "divide by n"),
    "activation": ((1, True, b"relu"), ("RELU", "gelu", "", "swish"), "'silu'"),
    "slope": (("0.1", True), (np.nan, np.inf), "leaky_relu's factor"),
    "renorm": ((3, "yes", [1]), ({"rmix": 1}, {"rmax": 0.5}, {"rmin": 2}, {"dmax": -1}, {"decay": 2}),
        "expected"),
    "virtual_batch_size": ((2.0, True, "2"), (0, -1), "an int >= 1"),
    "keep": ((True, None, 1), ("z", "xy", ""), "'x' or 'y'"),
    "on_nonfinite": ((None, True, 1), ("stop", "RAISE"), "'propagate', 'raise' or 'skip'"),
    "initial": ((3, ["gamma"]), ({"weight": 1},), "a mapping such as|names among gamma, beta, running_mean"),
    "history": ((1.5, True, "many"), (0, 1), "the number of updates to keep"),
    "dtype": ((np.float16, np.int32, "half", None, ">f4", object, "S4", 64, [("a", "f4")]), (),
        "numpy.float64"),
    **{flag: (NUMBERS_ARE_NO_FLAGS, (), "True or False") for flag in ("warmup", "zero_debias", "scale",
        "center")},
    "allow_initial_statistics": (NUMBERS_ARE_NO_FLAGS, (), "True or False"),
}  # fmt: skip
CASES = [
    (name, value, error, words)
    for name, (kinds, values, words) in BAD.items()
    for error, given in ((TypeError, kinds), (ValueError, values))
    for value in given
]


@pytest.mark.parametrize(("name", "value", "error", "words"), CASES, ids=lambda v: str(v)[:25])
def test_bad_options_are_named_with_what_is_expected(name, value, error, words):
    more = {"activation": "leaky_relu"} if name == "slope" else {}
    options = {"num_features": C, name: value, **more}
    message = refused(lambda: BatchNorm(**options), error, words, lambda: options)
    subject = (
        next(iter(value), name)
        if name == "renorm" and isinstance(value, dict) and "rmix" not in value
        else name
    )
    assert message.startswith(f"{subject} ")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"channel_axis": -1, "data_format": "NHWC"}, TypeError, "say the same thing, give one of them"),
        (
            {"channel_axis": 1, "data_format": "NHWC"},
            TypeError,
            "channel_axis is 1 and data_format is 'NHWC'",
        ),
        ({"warmup": True, "zero_debias": True}, ValueError, "both True.*: drop one of them"),
        (
            {"warmup": True, "decay": None},
            ValueError,
            "warmup is True and decay is None: .*; drop warmup, or give",
        ),
        ({"zero_debias": True, "decay": None}, ValueError, "zero_debias is True and decay is None"),
        ({"slope": 0.1}, ValueError, "slope is given with activation=None, which has none; drop it"),
        ({"slope": 0.1, "activation": "relu"}, ValueError, "slope is given with activation='relu'"),
        ({"keep": "y", "activation": "relu"}, ValueError, "keep is 'y' and activation is 'relu'"),
        (
            {"keep": "y", "activation": "leaky_relu", "slope": 0},
            ValueError,
            "slope is 0, expected a number from",
        ),
        ({"name": "a\0"}, ValueError, "name is 'a.x00', expected what a file can hold"),
        ({"name": "\ud800"}, ValueError, "name is '.ud800', expected what a file can hold"),
        (
            {"num_features": (3, 4)},
            ValueError,
            r"num_features is \(3, 4\), expected an int for each channel_axis, 1",
        ),
        (
            {"num_features": 3, "channel_axis": (1, 2)},
            ValueError,
            "num_features is 3, expected an int for each",
        ),
        ({"activation": "swish"}, ValueError, "did you mean 'silu'"),
        ({"activation": "ReLU"}, ValueError, "did you mean 'relu'"),
        ({"activation": "linear"}, ValueError, "did you mean None"),
        ({"data_format": "nhwc"}, ValueError, "did you mean 'NHWC'"),
        (
            {"channel_axis": (0, 2, 3)},
            ValueError,
            "if these are axes to reduce, as NumPy's axis=, pass those that they leave out as channel_axis=",
        ),
        ({"data_format": "NWC"}, ValueError, "did you mean 'NLC'"),
        ({"data_format": "NCW"}, ValueError, "did you mean 'NCL'"),
        ({"data_format": "HWC"}, ValueError, r"for one image pass x\[None\] with 'NHWC'"),
        ({"renorm": {"r_max": 3}}, ValueError, "did you mean 'rmax'"),
        ({"renorm": {"momentum": 0.1}}, ValueError, "decay is the weight of the old value: 1 - momentum"),
        (
            {"group": "world"},
            TypeError,
            r"group is 'world' \(str\), expected None or an object with allgather",
        ),
        (
            {"scale": False, "initial": {"gamma": 1.0}},
            ValueError,
            "names among beta, running_mean, running_var",
        ),
    ],
)
def test_options_that_exclude_each_other(options, error, words):
    refused(lambda: BatchNorm(**options), error, words, lambda: options)


def test_what_follows_from_options():
    assert BatchNorm(activation="leaky_relu").slope == 0.01
    assert BatchNorm(activation="leaky_relu", slope=0).slope == 0
    for data_format, axis in (("NCHW", 1), ("NHWC", -1), ("NC", 1), ("NLC", -1), ("channels_last", -1)):
        assert BatchNorm(data_format=data_format).channel_axis == axis
    assert (
        BatchNorm(channel_axis=[1, 2]).channel_axis == (1, 2)
        and BatchNorm(channel_axis=(1,)).channel_axis == 1
    )
    limits = {"rmin": 0.0, "rmax": np.inf, "dmax": np.inf, "decay": None}
    assert BatchNorm(renorm=True).renorm == limits and BatchNorm(renorm={"rmax": 3}).renorm == {
        **limits,
        "rmax": 3,
    }
    layer = BatchNorm(C, renorm=True)
    layer.renorm["rmax"] = 0.1  # of a copy
    assert layer.renorm == limits


# ---- changing them -----------------------------------------------------------------------------------------


CHANGES = {
    "decay": (0.5, 2.0), "eps": (1e-3, -1.0), "renorm": ({"rmax": 2.0}, {"rmax": 0.1}), "keep": ("y", "both"),
    "virtual_batch_size": (2, 0), "on_nonfinite": ("skip", "stop"), "allow_initial_statistics": (True, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_what_may_be_changed_is_checked_and_the_rest_is_fixed(name):
    layer = BatchNorm(C)
    before = layer.settings
    if name not in CHANGES:
        with pytest.raises(AttributeError, match=f"{name} of a BatchNorm is read-only"):
            setattr(layer, name, getattr(layer, name))
        assert layer.settings is before
        return
    good, bad = CHANGES[name]
    setattr(layer, name, good)
    after = layer.settings
    assert after is not before and getattr(before, name) == FIELDS[name].default
    with pytest.raises((TypeError, ValueError), match=name if name != "renorm" else "rmax"):
        setattr(layer, name, bad)
    assert layer.settings is after
    if name != "renorm":
        assert getattr(layer, name) == good


@pytest.mark.parametrize("name", ["settings", "running", "dtype", "history", "num_features", "frozen"])
def test_other_attributes_are_read_only(name):
    layer = BatchNorm(C)
    with pytest.raises(AttributeError):
        setattr(layer, name, getattr(layer, name))


def test_changes_take_effect():
    layer, x = trained(), images(9)
    y = layer(x, update=False)
    layer.eps = 4.0
    assert abs(layer(x, update=False)).max() < abs(y).max()
    layer.eps, layer.decay, before = 1e-5, 1.0, layer.running_mean.copy()
    layer.on_nonfinite = "skip"
    layer(np.full_like(x, np.nan))
    assert layer.running.num_skipped == 1 and (layer.running_mean == before).all()
    layer.virtual_batch_size = 2
    assert layer(x, return_saved=True)[1].mean.shape == (3, C)
    with pytest.raises(ValueError, match="zero_debias is True and decay is None"):
        layer.decay = None
    plain = BatchNorm(C)
    plain.decay = None
    plain(x)
    np.testing.assert_allclose(plain.running_mean, x.mean(axis=(0, 2)), rtol=1e-6)


def test_whether_renorm_has_a_reference_of_its_own_stays():
    with pytest.raises(ValueError, match="decided when the layer is built; leave decay away"):
        BatchNorm(C, renorm=True).renorm = {"decay": 0.5}
    with pytest.raises(ValueError, match="decided when the layer is built; give decay among the limits"):
        BatchNorm(C, renorm={"decay": 0.5}).renorm = True
    layer = BatchNorm(C, renorm={"decay": 0.5})
    layer.renorm = {"decay": 0.25, "rmax": 3.0}
    assert (layer.renorm["decay"], layer.renorm["rmax"]) == (0.25, 3.0)


def test_the_mode_and_the_name_may_be_assigned():
    layer = BatchNorm(C, name="a")
    layer.training, layer.name = np.False_, "conv1.bn"
    assert (layer.training, layer.name) == (False, "conv1.bn")
    for name, value, error in (
        ("training", 1, TypeError),
        ("name", "", ValueError),
        ("group", 3, TypeError),
    ):
        with pytest.raises(error, match=name):
            setattr(layer, name, value)
    assert (layer.training, layer.name, layer.group) == (False, "conv1.bn", None)


# ---- words of other libraries ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("momentum", 0.1, r"momentum[\s\S]*decay=0.9[\s\S]*decay=0.1"), ("epsilon", 1e-3, "it is called eps"),
        ("axis", -1, "channel_axis=-1"), ("centre", True, "called center"),
        ("running_dof", 1, "'running_ddof'"),
        ("save_memory", True, "keep='y'"), ("renorm_clipping", {}, "renorm={'rmin'"),
        ("num_channels", 3, "it is called num_features"), ("affine", False, "scale=False, center=False"),
        ("activation_fn", "relu", "it is called activation"), ("num_dims", 2, "any rank from 2"),
        ("gamma_initializer", 1, r"pass initial={'gamma': \.\.\.}"),
        ("weight", 1, r"pass initial={'gamma': \.\.\.}"), ("bias", 1, r"pass initial={'beta': \.\.\.}"),
        ("mean", 1, r"pass initial={'running_mean'"), ("moving_mean", 1, r"pass initial={'running_mean'"),
        ("running_var", 1, r"pass initial={'running_var'"), ("use_bias", True, "it is called center"),
        ("fused", True, "drop it"), ("process_group", 1, "pass group=batchnorm.distributed.torch_group"),
        ("where", 1, r"BatchNorm.__call__\(\) takes it: it is called mask there"),
        ("residual", 1, r"BatchNorm.__call__\(\) takes it$"), ("samples", 1, "it has num_features, name"),
    ],
)  # fmt: skip
def test_keywords_of_other_libraries_are_translated(keyword, value, words):
    with pytest.raises(TypeError, match=words) as caught:
        BatchNorm(**{keyword: value})
    assert str(caught.value).startswith(f"BatchNorm() has no argument '{keyword}'")


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("is_training", True, "it is called training here"), ("phase", True, "it is called training here"),
        ("batch_weights", 1, "it is called weights here"), ("where", 1, "it is called mask here"),
        ("key_padding_mask", 1, "mask=~key_padding_mask"), ("momentum", 0.1, "momentum"),
        ("keep", "x", r"BatchNorm\(\) takes it$"),
        ("save_memory", True, r"BatchNorm\(\) takes it: pass keep='y'"),
        ("epsilon", 1e-3, r"BatchNorm\(\) takes it: it is called eps there"),
        ("decay", 0.5, r"BatchNorm\(\) takes it$"), ("virtual_batch_size", 2, r"BatchNorm\(\) takes it$"),
        ("axis", -1, r"BatchNorm\(\) takes it: it means opposite things.* pass channel_axis=-1;"),
        ("renorm_clipping", {}, r"BatchNorm\(\) takes it: pass renorm={'rmin'"),
        ("reduction_axes", (0, 2), r"BatchNorm\(\) takes it: pass channel_axis=1, what it leaves out"),
        ("affine", False, r"BatchNorm\(\) takes it: pass scale=False, center=False"),
        ("use_running_average", True, "pass stats='running' for True"),
        ("wieghts", 1, "did you mean 'weights'"),
    ],
)  # fmt: skip
def test_so_are_keywords_of_a_call(keyword, value, words):
    layer = trained()
    before = held(layer)
    for call in (layer, lambda x, **options: layer.apply(layer.state_dict(), x, **options)):
        with pytest.raises(TypeError, match=words):
            call(images(), **{keyword: value})
    assert held(layer) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weight", "it is called gamma here"), ("bias", "it is called beta here"),
        ("forward", r"y = bn\(x\)"),
        ("moving_mean", "it is called running_mean here"), ("momentum", "decay"),
        ("zero_grad", "accumulate=True"),
        ("num_updates", "it is running.num_updates here"),
        ("initial_weight", "it is running.initial_weight here"),
        ("num_batches_tracked", "running.num_updates"), ("save_memory", "it is called keep"),
        ("mean_", "it is called running_mean here"), ("var_", "it is called running_var here"),
        ("n_samples_seen_", "it is running.num_values here"), ("partial_fit", r"recalibrate\(batches\)"),
        ("transform", r"bn.eval\(\)\(x\)"), ("reset_parameters", r"BatchNorm\(num_features\)"),
        ("half", r"BatchNorm\(num_features, dtype=\.\.\.\)"), ("is_training", "it is called training here"),
        ("saved", r"y, saved = bn\(x, return_saved=True\)"), ("epsilon", "it is called eps here"),
    ],
)  # fmt: skip
def test_attributes_of_other_libraries_are_translated(name, words):
    layer = BatchNorm(C)
    for attempt in (lambda: getattr(layer, name), lambda: setattr(layer, name, np.ones(C))):
        with pytest.raises(AttributeError, match=f"{name}.*{words}"):
            attempt()
    assert not hasattr(layer, name)


def test_a_subclass_takes_no_foreign_attribute_that_it_does_not_define():
    class Plain(BatchNorm):
        pass

    class Own(BatchNorm):
        weight = None

    layer = Plain(C)
    for name, words in {"weight": "gamma", "momentum": "decay", "epsilon": "eps"}.items():
        with pytest.raises(AttributeError, match=f"Plain has no attribute '{name}': .*{words}"):
            setattr(layer, name, 0.5)
    layer.anything = Own(C)
    layer.anything.weight = 3
    assert layer.anything.weight == 3


METHODS = {
    "fold": ({"epsilon": 1}, r"BatchNorm\(\) takes it: it is called eps there"),
    "backward": ({"grad_output": 1}, "it is called dy here"), "train": ({"training": True}, "it has mode"),
    "freeze": ({"device": 1}, "the arrays say where"), "clone": ({"device": 1}, "the arrays say where"),
    "load_state_dict": ({"assign": True}, "it has state, strict"),
    "recalibrate": ({"where": 1}, r"Moments.update\(\) takes it: it is called mask there"),
    "diagnose": ({"sample_weight": 1}, "it is called weights here"),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods_translate_too(method):
    keywords, words = METHODS[method]
    with pytest.raises(TypeError, match=rf"^bn: BatchNorm\.{method}\(\) has no argument .*; .*{words}"):
        getattr(trained(name="bn"), method)(**keywords)


def test_what_is_an_option_is_not_taken_by_position():
    layer, x = trained(name="bn"), images()
    with pytest.raises(TypeError, match=r"^bn: .* takes by position x, .* by name: training=, stats="):
        layer(x, True)
    layer(x, training=True)
    with pytest.raises(TypeError, match=r"takes by position dy, saved, .* by name: accumulate="):
        layer.backward(x, None, True)
    layer.backward(x, None, accumulate=True)


@pytest.mark.parametrize("name", ["gelu", "elu", "mish", "hardswish", "prelu", "Softplus"])
def test_activations_that_are_none_of_ours_are_applied_outside(name):
    for call in (lambda: BatchNorm(activation=name), lambda: batch_norm_train(images(), activation=name)):
        with pytest.raises(ValueError, match=r"'silu'; apply it outside, and multiply dy by its derivative"):
            call()


def test_values_of_several_channel_axes_have_their_order_in_x():
    x = images(shape=(8, 3, 5, 2))
    for axes in ((2, 1), [2, 1]):
        layer = BatchNorm((3, 5), channel_axis=axes)
        assert layer.channel_axis == (1, 2) and layer(x).shape == x.shape
    with pytest.raises(ValueError, match=r"x has 3 x 5 channels on axis \(1, 2\) of .*, expected 5 x 3"):
        BatchNorm((5, 3), channel_axis=(2, 1))(x)
    assert BatchNorm(channel_axis=(-1, -2)).channel_axis == (-2, -1)


def test_an_initial_value_of_another_dtype_is_told_in_python():
    value = np.ones(C, int)
    with pytest.raises(TypeError, match=r"^initial gamma has dtype int64, .*; use (.*)$") as caught:
        BatchNorm(C, initial={"gamma": value})
    advice = str(caught.value).rpartition("; use ")[2]
    mended = eval(advice, {"numpy": np, "initial": {"gamma": value}})
    assert (BatchNorm(C, initial={"gamma": mended}).gamma == 1).all()


def test_unknown_attributes_are_errors():
    layer = BatchNorm(C)
    for name in ("trainning", "_private", "__wrapped__"):
        with pytest.raises(AttributeError, match=name):
            getattr(layer, name)
    with pytest.raises(AttributeError, match="trainning"):
        layer.trainning = False


# ---- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "options", "state"),
    [
        (
            BatchNorm(64),
            "64, decay=0.9, eps=1e-05, channel_axis=1, activation=None",
            "num_updates=0, training=True",
        ),
        (
            BatchNorm(channel_axis=-1, activation="leaky_relu", name="bn").eval().freeze(),
            "None, name='bn', decay=0.9, eps=1e-05, channel_axis=-1, activation='leaky_relu', slope=0.01",
            "num_updates=0, training=False, frozen=statistics",
        ),
        (
            trained(scale=False, center=False, running_ddof=0, dtype=np.float64, decay=1, eps=0, keep="y"),
            "4, decay=1.0, zero_debias=True, eps=0.0, channel_axis=1, scale=False, center=False, "
            "running_ddof=0, activation=None, keep='y', dtype=float64",
            "num_updates=3, training=True",
        ),
        (
            BatchNorm((3, 4), channel_axis=(1, 2), renorm={"rmax": 3}).freeze(parameters=True),
            "(3, 4), decay=0.9, eps=1e-05, channel_axis=(1, 2), activation=None, "
            "renorm={'rmin': 0.0, 'rmax': 3.0, 'dmax': inf, 'decay': None}",
            "num_updates=0, training=True, frozen=statistics and parameters",
        ),
        (
            BatchNorm(data_format="NHWC"),
            "None, decay=0.9, eps=1e-05, data_format='NHWC', activation=None",
            "num_updates=0, training=True",
        ),
    ],
    ids=range(5),
)
def test_repr(layer, options, state):
    assert repr(layer) == f"BatchNorm({options}, {state})"


def test_help_shows_the_keywords_of_a_call():
    shown = inspect.signature(BatchNorm.__call__).parameters
    assert inspect.signature(BatchNorm(C)).parameters == dict(list(shown.items())[1:])
    *most, last = CallOptions.__annotations__
    assert list(shown) == ["self", "x", *most, "return_saved", last]
    assert all(p.default is None for name, p in shown.items() if name not in ("self", "x", "return_saved"))
    assert "return_saved" in inspect.getdoc(BatchNorm.__call__)


def test_everything_public_is_documented():
    for name in dir(BatchNorm):
        if not name.startswith("_"):
            assert inspect.getdoc(inspect.getattr_static(BatchNorm, name)), name
            assert (
                name in BatchNorm.__doc__
                or callable(getattr(BatchNorm, name))
                or name in ("frozen", "num_features")
            )
