"""The layer: modes, counters, gradients and state. Its values are those of the functions, bit for bit."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import pickle
import re
import threading
import weakref

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm

import reference

# What cold statistics are, and that using them warns, is tested in test_running_schedules.py.
pytestmark = pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")

C = 5
FLOATS = [np.float32, np.float64]


def images(seed=0, shape=(4, C, 3, 2), dtype=np.float32, spread=2.0, centre=3.0):
    return (centre + spread * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def randomized(layer, seed=1):
    """The layer with parameters that are not 1 and 0."""
    rng = np.random.default_rng(seed)
    for parameter in layer.parameters():
        parameter.value[:] = rng.normal(size=parameter.value.shape)
    return layer


def trained(*, steps=3, **options):
    layer = randomized(BatchNorm(C, **options))
    for step in range(steps):
        layer(images(step))
    return layer


def everything(layer):
    """All that a layer holds, as bytes and plain values, to tell whether anything has changed."""
    known = layer.num_features is not None
    saved = layer._saved
    return {
        "state": {name: (v.dtype.str, v.tobytes()) for name, v in layer.state_dict().items()}
        if known
        else None,
        "arrays": [id(layer.gamma), id(layer.beta), id(layer.running_mean), id(layer.running_var)],
        "num_features": layer.num_features,
        "gradients": [None if g is None else (id(g), g.tobytes()) for g in (layer.dgamma, layer.dbeta)],
        "training": layer.training,
        "saved": [(id(a), a.tobytes()) if isinstance(a, np.ndarray) else a for a in saved or ()],
        "repr": repr(layer),
    }


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


# ---- construction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, "float64", np.dtype("f4"), float])
def test_a_new_layer_is_the_identity_transform(dtype):
    layer = BatchNorm(C, dtype=dtype)
    for array, value in ((layer.gamma, 1), (layer.beta, 0), (layer.running_mean, 0), (layer.running_var, 1)):
        assert array.dtype == np.dtype(dtype) == layer.dtype
        np.testing.assert_array_equal(array, np.full(C, value))
    assert (layer.num_features, layer.num_updates, layer.training) == (C, 0, True)
    assert (layer.dgamma, layer.dbeta) == (None, None)
    assert (layer.decay, layer.eps, layer.axis, layer.running_ddof) == (0.9, 1e-5, 1, 1)
    assert (layer.activation, layer.data_format, layer.scale, layer.center) == (None, None, True, True)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        BatchNorm(C, 0.9)


@pytest.mark.parametrize("value", [2.5, 3.0, True, np.True_, "3", [3], np.array([3])])
def test_num_features_of_another_kind(value):
    with pytest.raises(TypeError, match=r"num_features is .*, expected an int from 1 to"):
        BatchNorm(value)


@pytest.mark.parametrize("value", [0, -1, 2**62, 2**31 + 1, 2**70])
def test_num_features_out_of_range(value):
    with pytest.raises(ValueError, match=rf"num_features is .*, expected an int from 1 to {2**31}, or None"):
        BatchNorm(value)


@pytest.mark.parametrize(
    "value", [np.float16, np.int32, "half", None, ">f4", object, "S4", 64, [("a", "f4")]]
)
def test_dtype_must_be_float32_or_float64(value):
    with pytest.raises(TypeError, match=r"dtype is .*, expected numpy.float32 or numpy.float64"):
        BatchNorm(C, dtype=value)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        *(("decay", value, TypeError) for value in ("0.9", True, 1j, [0.9])),
        *(("decay", value, ValueError) for value in (-0.1, 1.1, np.nan, np.inf)),
        *(("eps", value, TypeError) for value in ("1e-5", False, 1j, None, [1e-5])),
        *(("eps", value, ValueError) for value in (-1e-5, np.nan, np.inf)),
        *(("axis", value, TypeError) for value in (1.0, True, None, "1")),
        *(("data_format", value, (TypeError, ValueError)) for value in ("nchw", "HWC", "", 1)),
        *(
            (name, value, TypeError)
            for name in ("scale", "center")
            for value in (1, 0, "True", None, np.True_)
        ),
        *(("running_ddof", value, TypeError) for value in (1.0, True, "1", None)),
        *(("running_ddof", value, ValueError) for value in (-1, 2)),
        *(("activation", value, (TypeError, ValueError)) for value in ("RELU", "gelu", "", 1, True)),
    ],
)
def test_bad_options_are_named(option, value, error):
    with pytest.raises(error, match=option):
        BatchNorm(C, **{option: value})


def test_axis_and_data_format_exclude_each_other():
    with pytest.raises((TypeError, ValueError), match="data_format"):
        BatchNorm(C, axis=-1, data_format="NHWC")


def test_momentum_is_translated():
    with pytest.raises(TypeError, match=r"momentum[\s\S]*decay"):
        BatchNorm(C, momentum=0.1)


@pytest.mark.parametrize(("wrong", "right"), [("centre", "center"), ("running_dof", "running_ddof")])
def test_unknown_options_name_the_close_match(wrong, right):
    with pytest.raises(TypeError, match=rf"{wrong}.*{right}"):
        BatchNorm(C, **{wrong: True})


@pytest.mark.parametrize(
    ("name", "good", "bad"), [("decay", 0.5, 2.0), ("eps", 1e-3, -1.0), ("training", False, 1)]
)
def test_settings_that_may_change_are_checked(name, good, bad):
    layer = BatchNorm(C)
    setattr(layer, name, good)
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(layer, name, bad)
    assert getattr(layer, name) == good


@pytest.mark.parametrize(
    "name",
    ["num_features", "num_updates", "axis", "dtype", "activation", "scale", "data_format", "trainning"],
)
def test_other_settings_are_fixed(name):
    with pytest.raises(AttributeError):
        setattr(BatchNorm(C), name, 1)


# ---- train and eval ----------------------------------------------------------------------------------------


OPTIONS = [
    {},
    {"scale": False},
    {"center": False},
    {"scale": False, "center": False},
    {"decay": 0.5, "eps": 1e-3, "running_ddof": 0, "activation": "relu"},
    {"axis": -1},
    {"axis": 0},
    {"data_format": "NHWC"},
    {"data_format": "NCHW"},
    {"data_format": "channels_last"},
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_is_that_of_the_functions(options, dtype):
    layer = randomized(BatchNorm(C, dtype=dtype, **options))
    mean, var = np.zeros(C, dtype), np.ones(C, dtype)
    where = {name: options[name] for name in ("axis", "data_format") if name in options}
    common = {"eps": layer.eps, "activation": layer.activation, **where}
    for step in range(3):
        shape = [4, 3, 2, 6]
        shape[layer.axis] = C
        x = images(step, shape, dtype)
        y, *_ = batchnorm.batch_norm_train(
            x, layer.gamma, layer.beta, running_mean=mean, running_var=var, decay=layer.decay,
            running_ddof=layer.running_ddof, **common,
        )  # fmt: skip
        assert_same_bits(layer(x), y)
        assert_same_bits(layer.running_mean, mean)
        assert_same_bits(layer.running_var, var)
        assert layer.num_updates == step + 1
        expected = batchnorm.batch_norm(x, mean, var, layer.gamma, layer.beta, **common)
        assert_same_bits(layer(x, training=False), expected)
        assert layer.num_updates == step + 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_x_may_have_another_dtype_than_the_layer(dtype):
    for own in FLOATS:
        layer = BatchNorm(C, dtype=own)
        y = layer(images(dtype=dtype))
        assert y.dtype == dtype and layer.running_mean.dtype == own
        assert layer.backward(y).dtype == dtype
        assert layer.dgamma.dtype == own


def test_the_mode_decides_what_a_call_does():
    layer, x = BatchNorm(C, allow_initial_statistics=True), images()
    assert layer.eval() is layer and layer.training is False
    assert_same_bits(
        layer(x), batchnorm.batch_norm(x, np.zeros(C, "f4"), np.ones(C, "f4"), layer.gamma, layer.beta)
    )
    assert layer.num_updates == 0
    y = layer(x, training=True)  # for this call only
    assert layer.training is False and layer.num_updates == 1
    assert layer.train() is layer and layer.training is True
    assert_same_bits(layer(x), y)
    assert layer.num_updates == 2
    layer(x, training=False)
    assert layer.training is True and layer.num_updates == 2
    assert layer.train(False).training is False
    assert layer.train(True).training is True


@pytest.mark.parametrize(
    "flag", [1, 0, "False", "train", np.True_, np.bool_(False), 1.0, [True], np.array(True)]
)
def test_flags_are_plain_bools(flag):
    layer = trained()
    before = everything(layer)
    for call in (lambda: layer(images(), training=flag), lambda: setattr(layer, "training", flag)):
        with pytest.raises(TypeError, match="training"):
            call()
    with pytest.raises(TypeError, match="mode"):
        layer.train(flag)
    assert everything(layer) == before


def test_mode_of_train_is_not_none():
    with pytest.raises(TypeError, match="mode"):
        BatchNorm(C).train(None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_eval_never_writes(dtype, activation):
    layer = trained(dtype=dtype, activation=activation).eval()
    for array in (*layer.buffers().values(), layer.gamma, layer.beta):
        array.flags.writeable = False  # a write would be an error, too
    state, gradients = everything(layer)["state"], (layer.dgamma, layer.dbeta)
    nan = images()
    nan[0, 0] = np.nan
    for x in (images(7), images(8, (1, C)), np.zeros((0, C), "f4"), images(9, (3, C, 4), np.float64), nan):
        y = layer(x)
        layer(x, out=y)
        layer(x, training=False)
        assert everything(layer)["state"] == state
    layer(images(9), keep=True)
    layer.backward(images(10), out=images(11))
    assert everything(layer)["state"] == state
    assert gradients == (None, None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((37, C), 1), ((9, C, 7), 1), ((6, C, 5, 3), 1), ((6, 5, 3, C), -1)]
)
def test_a_row_in_eval_does_not_depend_on_its_batch(shape, axis, dtype):
    layer = trained(axis=1)
    layer = BatchNorm(C, axis=axis).load_state_dict({**layer.state_dict(), "axis": np.array(axis)}).eval()
    x = images(3, shape, dtype)
    y = layer(x)
    for i in range(len(x)):
        assert_same_bits(layer(x[i : i + 1])[0], y[i])
        assert_same_bits(layer(x[i:])[0], y[i])
    assert_same_bits(layer(x[::-1])[::-1], y)


def test_running_statistics_approach_those_of_the_data():
    layer = BatchNorm(C, dtype=np.float64)
    for step in range(200):
        layer(images(step, (64, C), np.float64, spread=3.0, centre=-7.0))
    # The average of at least 10 batches of 64: standard errors 3/sqrt(640) and 9*sqrt(2/640); five of them.
    np.testing.assert_allclose(layer.running_mean, -7.0, atol=5 * 3 / 640**0.5)
    np.testing.assert_allclose(layer.running_var, 9.0, atol=5 * 9 * (2 / 640) ** 0.5)


@pytest.mark.parametrize("training", [True, False])
def test_out_receives_the_result(training):
    layer, x = trained(), images()
    expected = copy.deepcopy(layer)(x, training=training)
    out = np.empty_like(x)
    assert layer(x, training=training, out=out) is out
    assert_same_bits(out, expected)


def test_one_value_per_channel_cannot_train():
    layer = trained()
    before = everything(layer)
    with pytest.raises(ValueError, match=r"one value per channel|1 value per channel"):
        layer(images(0, (1, C)))
    assert everything(layer) == before
    layer(images(0, (1, C)), training=False)


@pytest.mark.parametrize("shape", [(0, C), (0, C, 3), (4, C, 0)])
def test_an_empty_batch_counts_for_nothing(shape):
    layer = trained()
    before = everything(layer)["state"]
    x = np.empty(shape, np.float32)
    for training in (True, False):
        assert layer(x, training=training, keep=True).shape == shape
        assert layer.backward(x).shape == shape
        np.testing.assert_array_equal(layer.dgamma, np.zeros(C))
        np.testing.assert_array_equal(layer.dbeta, np.zeros(C))
    assert everything(layer)["state"] == before


# ---- the channel count -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_lazy_layer_is_as_one_with_a_count(options, training):
    options = {**options, "allow_initial_statistics": not training}
    lazy, known = BatchNorm(**options), BatchNorm(C, **options)
    assert lazy.num_features is None
    assert (lazy.gamma, lazy.beta, lazy.running_mean, lazy.running_var) == (None,) * 4
    shape = [4, 3, 2, 6]
    shape[lazy.axis] = C
    x = images(0, shape)
    assert_same_bits(lazy(x, training=training), known(x, training=training))
    assert lazy.num_features == C
    assert everything(lazy)["state"] == everything(known)["state"]


def test_an_empty_batch_tells_the_channel_count():
    layer = BatchNorm()
    layer(np.empty((0, C), np.float32))
    assert (layer.num_features, layer.num_updates) == (C, 0)


BAD_INPUTS = [
    ([[1.0, 2.0]], TypeError, "x"),
    (None, TypeError, "x"),
    ("x", TypeError, "x"),
    (np.ones((4, C), np.int64), TypeError, "x has dtype"),
    (np.ones((4, C), object), TypeError, "x has dtype"),
    (np.float32(1), TypeError, "x"),
    (np.array(1.0, np.float32), ValueError, "x"),
    (np.ones(C, np.float32), ValueError, "x"),
    (np.ones((4, 0), np.float32), ValueError, "channel"),
    (np.ones((1, C), np.float32), ValueError, "value per channel"),
]


@pytest.mark.parametrize(("x", "error", "match"), BAD_INPUTS, ids=lambda v: str(v)[:30])
def test_a_failed_first_call_leaves_the_layer_lazy(x, error, match):
    layer = BatchNorm()
    before = everything(layer)
    with pytest.raises(error, match=match):
        layer(x)
    assert everything(layer) == before
    layer(images(0, (3, C + 2)))  # another count than that of the bad input
    assert layer.num_features == C + 2


@pytest.mark.parametrize("axis", [0, -1, 2, 5])
def test_a_lazy_layer_with_an_axis_that_x_does_not_have(axis):
    layer = BatchNorm(axis=axis)
    with pytest.raises(ValueError, match=r"axis|x has shape|dimension"):
        layer(np.ones(C, np.float32))
    assert layer.num_features is None


def test_a_lazy_layer_says_what_it_needs():
    layer = BatchNorm()
    for call in (layer.parameters, layer.buffers, layer.state_dict):
        with pytest.raises(
            RuntimeError, match=rf"{call.__name__}\(\) needs the channel count.*call the layer once"
        ):
            call()
    for name in ("gamma", "running_var"):
        with pytest.raises(ValueError, match=f"{name} cannot be assigned.*channel count is not known"):
            setattr(layer, name, np.ones(C, np.float32))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"scale": False, "center": False}, {"data_format": "NCHW"}], ids=str)
def test_another_channel_count_is_told_of_x(options, training):
    layer = BatchNorm(C, **options)
    with pytest.raises(
        ValueError, match=rf"x has 7 channels on axis 1 of its shape \(4, 7, 2, 2\), expected {C}, "
    ):
        layer(np.ones((4, 7, 2, 2), np.float32), training=training)


@pytest.mark.parametrize(
    ("shape", "options", "hint"),
    [
        ((4, 7, 2, 2), {}, ""),
        ((4, 7, 2, C), {}, "; axis -1 has 5: build the layer with axis=-1"),
        ((4, 7, 2, C), {"data_format": "NCHW"}, "; axis -1 has 5: build the layer with axis=-1"),
        ((4, C, 2, 7), {"axis": -1}, ""),
        ((C, 7, 7), {}, "; a single image needs a batch axis, x[None]"),
        ((C, 7, 7, 2), {}, ""),
        ((C, 7, 7), {"axis": -1}, ""),
        ((C, 7), {}, ""),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_where_the_channels_are_is_hinted(shape, options, hint, training):
    with pytest.raises(ValueError, match=f"expected {C}, the num_features of this layer") as caught:
        BatchNorm(C, **options)(np.ones(shape, np.float32), training=training)
    assert str(caught.value).endswith("the num_features of this layer" + hint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("running_mean", np.nan),
        ("running_mean", -np.inf),
        *(("running_var", v) for v in (np.nan, np.inf, -1.0)),
    ],
)
def test_bad_statistics_are_named_in_eval(name, value):
    layer = trained().eval()
    getattr(layer, name)[3] = value
    before = everything(layer)
    with pytest.raises(ValueError, match=f"{name} is {value} at channel 3, expected finite") as caught:
        layer(images())
    assert f"a training batch held NaN, Inf or huge values, or the layer's {name} was set" in str(
        caught.value
    )
    with pytest.raises(ValueError, match="x has 7 channels"):
        layer(np.ones((4, 7), np.float32))
    with pytest.raises(TypeError, match="x is of type list"):
        layer([[1.0] * C])
    assert everything(layer) == before
    getattr(layer, name)[3] = 1
    layer(images())


def test_statistics_of_a_bad_batch_are_explained():
    layer, x = BatchNorm(C), images()
    x[0, 2] = np.nan
    layer(x)
    with pytest.raises(ValueError, match=r"running_mean is nan at channel 2.*assign finite statistics"):
        layer.eval()(images())
    layer.train()(images())  # in training they propagate


@pytest.mark.parametrize("layer", [BatchNorm(C, data_format="NHWC"), BatchNorm(data_format="NHWC")])
def test_data_format_fixes_the_rank(layer):
    with pytest.raises(ValueError, match="NHWC"):
        layer(np.ones((2, 3, 4, 5, C), np.float32))


# ---- an error changes nothing ------------------------------------------------------------------------------


BAD_CALLS = [
    *(pytest.param({"x": x}, error, id=str(x)[:30]) for x, error, _ in BAD_INPUTS[:-1]),
    pytest.param({"x": np.ones((4, C + 1), np.float32)}, ValueError, id="channels"),
    pytest.param({"training": "yes"}, TypeError, id="training"),
    pytest.param({"out": np.empty((4, C), np.float64)}, TypeError, id="out dtype"),
    pytest.param({"out": np.empty((5, C), np.float32)}, ValueError, id="out shape"),
    pytest.param({"out": [1.0]}, TypeError, id="out list"),
    pytest.param({"momentum": 0.1}, TypeError, id="keyword"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("arguments", "error"), BAD_CALLS)
def test_a_failed_forward_changes_nothing(arguments, error, training):
    layer = trained()
    dy = images(5)
    expected = copy.deepcopy(layer)
    layer(images(2))
    expected(images(2))
    before = everything(layer)
    arguments = {"x": images(4, (4, C)), "training": training, **arguments}
    with pytest.raises(error):
        layer(**arguments)
    assert everything(layer) == before
    assert_same_bits(layer.backward(dy), expected.backward(dy))  # that of the forward that succeeded


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"dy": images()[:2]}, ValueError),
        ({"dy": images(dtype=np.float64)}, TypeError),
        ({"dy": images().tolist()}, TypeError),
        ({"dy": None}, TypeError),
        ({"out": np.empty((2, C, 3, 2), np.float32)}, ValueError),
        ({"out": np.empty((4, C, 3, 2), np.float64)}, TypeError),
    ],
    ids=["shape", "dtype", "list", "None", "out shape", "out dtype"],
)
def test_a_failed_backward_changes_nothing(arguments, error, training):
    layer = trained()
    layer(images(4), training=training, keep=True)
    layer.backward(images(5))
    before = everything(layer)
    with pytest.raises(error, match=r"dy|out"):
        layer.backward(**{"dy": images(6), **arguments})
    assert everything(layer) == before


# ---- backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backward_is_that_of_the_functions(options, dtype):
    layer = randomized(BatchNorm(C, dtype=dtype, **options))
    where = {name: options[name] for name in ("axis", "data_format") if name in options}
    common = {"activation": layer.activation, **where}
    shape = [4, 3, 2, 6]
    shape[layer.axis] = C
    x, dy = images(0, shape, dtype), images(1, shape, dtype)
    forward = batchnorm.batch_norm_train(x, layer.gamma, layer.beta, eps=layer.eps, **common)
    layer(x)
    expected = batchnorm.batch_norm_backward(
        dy, x, forward.mean, forward.inv_std, layer.gamma, layer.beta, **common
    )
    assert_same_bits(layer.backward(dy), expected.dx)
    for got, wanted, present in (
        (layer.dgamma, expected.dgamma, layer.scale),
        (layer.dbeta, expected.dbeta, layer.center),
    ):
        assert got is None if not present else got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_in_eval_mode_takes_the_statistics_as_constants(activation):
    layer = trained(dtype=np.float64, activation=activation).eval()
    x, dy = images(4, dtype=np.float64), images(5, dtype=np.float64, centre=0)
    before = everything(layer)["state"]
    layer(x, keep=True)
    dx = layer.backward(dy)
    assert everything(layer)["state"] == before
    forward = reference.normalize(
        x, layer.running_mean, layer.running_var, layer.gamma, layer.beta, eps=layer.eps
    )
    masked = dy * (forward.y > 0) if activation == "relu" else dy
    expected = reference.backward(masked, x, layer.running_mean, forward.inv_std, layer.gamma, stats="fixed")
    # 24 terms per sum, each a few roundings of 2^-53.
    np.testing.assert_allclose(dx, expected.dx, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(layer.dgamma, expected.dgamma, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.dbeta, expected.dbeta, rtol=1e-12, atol=1e-12)


def test_backward_belongs_to_the_last_forward_and_overwrites_the_gradients():
    layer = trained(steps=1)
    layer(images(7))
    first_dx = layer.backward(images(5))
    first, second_forward = layer.dgamma.copy(), images(8)
    kept = layer.dgamma
    assert_same_bits(layer.backward(images(5)), first_dx)  # again, with the same result
    assert_same_bits(layer.dgamma, first)
    layer(second_forward)
    layer.backward(images(5))
    assert not np.array_equal(layer.dgamma, first)
    assert_same_bits(kept, first)  # earlier gradients stay what they were


def test_backward_before_any_forward():
    for layer in (BatchNorm(), BatchNorm(C)):
        with pytest.raises(RuntimeError, match=r"backward before any forward: call y = bn\(x\) first"):
            layer.backward(images())
        assert (layer.dgamma, layer.dbeta) == (None, None)


@pytest.mark.parametrize("training", [True, False])
def test_no_backward_after_a_forward_in_place(training):
    layer, x = trained(), images()
    assert layer(x, training=training, out=x) is x
    with pytest.raises(RuntimeError, match=r"input of the last forward has been overwritten.*another out"):
        layer.backward(images())
    view = images()
    layer(view, training=training, out=view[...])  # another object, the same memory
    with pytest.raises(RuntimeError, match="overwritten"):
        layer.backward(images())
    layer(images(), training=training, keep=True)
    layer.backward(images())


@pytest.mark.parametrize("training", [True, False])
def test_backward_in_place_of_dy(training):
    layer = trained()
    layer(images(), training=training, keep=True)
    dy = images(5)
    expected = layer.backward(dy)
    gradients = layer.dgamma.copy(), layer.dbeta.copy()
    assert layer.backward(dy, out=dy) is dy
    assert_same_bits(dy, expected)
    assert_same_bits(layer.dgamma, gradients[0])
    assert_same_bits(layer.dbeta, gradients[1])


@pytest.mark.parametrize("training", [True, False])
def test_backward_in_place_of_x_can_be_had_once(training):
    layer, x, dy = trained(), images(), images(5)
    layer(x, training=training, keep=True)
    expected = layer.backward(dy)
    assert layer.backward(dy, out=x) is x
    assert_same_bits(x, expected)
    with pytest.raises(RuntimeError, match="overwritten"):
        layer.backward(dy)


@pytest.mark.parametrize("how", [{}, {"training": False, "keep": True}], ids=str)
def test_only_the_last_input_is_kept_alive(how):
    layer, x = trained(), images()
    layer(x, **how)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is not None
    layer(images(1))
    gc.collect()
    assert gone() is None


def test_an_eval_call_keeps_nothing_alive_and_backward_after_it_says_so():
    for last in ({"training": False}, {"keep": False}):
        layer, x = trained(), images()
        layer(images(1))  # that of an earlier forward would be the wrong gradient
        layer(x, **last)
        gone = weakref.ref(x)
        del x
        gc.collect()
        assert gone() is None
        with pytest.raises(RuntimeError, match=r"eval call, which keeps nothing: .*keep=True.*freeze\(\)"):
            layer.backward(images())


# ---- parameters and buffers --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_parameters_are_what_the_layer_has(scale, center):
    layer = BatchNorm(C, scale=scale, center=center)
    expected = ["gamma"] * scale + ["beta"] * center
    assert [name for name, _, _ in layer.parameters()] == expected
    assert all(p.grad is None and p.value is getattr(layer, p.name) for p in layer.parameters())
    layer(images())
    layer.backward(images(1))
    assert all(p.grad is getattr(layer, "d" + p.name) and p.grad.shape == (C,) for p in layer.parameters())
    assert {"gamma", "beta"} - {p.name for p in layer.parameters()} == {
        name for name in ("gamma", "beta") if getattr(layer, "d" + name) is None
    }
    assert list(layer.buffers()) == ["running_mean", "running_var"]
    assert all(value is getattr(layer, name) for name, value in layer.buffers().items())


def test_gradient_descent_through_parameters():
    layer, x = BatchNorm(C, dtype=np.float64), images(0, (64, C), np.float64)
    target = 2 * (x - x.mean(axis=0)) / x.std(axis=0) - 1  # gamma 2 and beta -1
    for _ in range(100):
        y = layer(x)
        layer.backward((y - target) / len(x))
        for parameter in layer.parameters():
            parameter.value -= 0.5 * parameter.grad
    np.testing.assert_allclose(layer.gamma, 2, atol=1e-4)  # eps takes 1e-5 / (2 * 4) of it
    np.testing.assert_allclose(layer.beta, -1, atol=1e-12)


def test_the_array_of_a_parameter_cannot_be_replaced():
    layer = BatchNorm(C)
    parameter = layer.parameters()[0]
    name, value, grad = parameter
    assert (name, grad) == ("gamma", None) and value is parameter.value is layer.gamma
    assert repr(parameter) == f"Parameter('gamma', {value!r}, None)"
    with pytest.raises(AttributeError, match=r"value of gamma cannot be replaced; .* value\[:\] = "):
        parameter.value = value.copy()
    with pytest.raises(AttributeError, match="velocity"):
        parameter.velocity = 0
    parameter.value -= 0.5
    assert parameter.value is layer.gamma and layer.gamma[0] == 0.5


GRADIENTS = ("dgamma", "dbeta", "dresidual")

SCRIPT = """
import numpy as np
from batchnorm import BatchNorm, batch_norm
bn = BatchNorm(3, axis=-1, activation="relu")
x = np.ones((2, 3), np.float32)
bn.backward(bn(x))
for p in bn.parameters():
    p.value -= 0.1 * p.grad
for name, value, grad in bn.parameters():
    value -= 0.1 * grad
bn.gamma -= 0.1 * bn.dgamma
bn.beta -= 0.1 * bn.dbeta.astype(np.float32)
mean, var = bn.running_mean.copy(), bn.running_var.copy()
batch_norm(x, mean, var, bn.gamma, bn.beta, activation=bn.activation, data_format=bn.data_format)
"""
MISTAKES = [
    "BatchNorm(3, momentum=0.1)",
    "BatchNorm(3, data_format='nhwc')",
    "BatchNorm(3, activation='gelu')",
    "bn.gamma = [1.0, 1.0, 1.0]",
]


def test_a_users_program_is_typed(tmp_path):
    api = pytest.importorskip("mypy.api")
    path = tmp_path / "user.py"
    path.write_text(SCRIPT + "\n".join(MISTAKES))
    package = os.path.dirname(os.path.dirname(batchnorm.__file__))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # no configuration file
        if "site-packages" not in package:
            patch.setenv("MYPYPATH", package)
        text, errors, _ = api.run(["--strict", "--no-color-output", f"--cache-dir={tmp_path}", "user.py"])
    assert not errors
    first = SCRIPT.count("\n") + 1
    lines = [int(line.split(":")[1]) for line in text.splitlines() if re.match(r"user.py:\d+: error", line)]
    assert lines == [first + i for i in range(len(MISTAKES))], text
    names = {}
    exec(SCRIPT, names)
    assert names["bn"].num_updates == 1


def test_assigning_copies_into_the_array_that_optimisers_hold():
    layer = BatchNorm(C)
    held = layer.gamma
    layer.gamma = np.arange(C, dtype=np.float32)
    layer.gamma -= 1
    layer.gamma *= np.float32(2)
    assert layer.gamma is held
    np.testing.assert_array_equal(held, 2 * np.arange(C) - 2)
    layer.running_mean, layer.running_var = np.zeros(C, np.float32), np.full(C, 4, np.float32)
    x = np.full((2, C), 2, np.float32)
    layer.beta = held  # another vector of the layer: copied, not shared
    assert layer.beta is not held
    layer.gamma[:] = 1
    np.testing.assert_allclose(layer.eval()(x), 1 + np.tile(layer.beta, (2, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("gamma", None, TypeError, "gamma is None, expected a one-dimensional float32 or float64 array"),
        ("gamma", 1, TypeError, r"gamma is 1 \(int\), expected a one-dimensional float32 or float64 array"),
        (
            "gamma",
            [1.0] * C,
            TypeError,
            r"gamma is of type list, expected an array of float32; use numpy.array\(gamma, numpy.float32\)",
        ),
        (
            "beta",
            np.ones(C, int),
            TypeError,
            r"beta has dtype int64, expected float32 or float64; use beta.astype",
        ),
        ("beta", np.ones(C, ">f4"), TypeError, "beta has dtype >f4, expected float32"),
        ("beta", np.ma.ones(C), TypeError, "beta is a masked array"),
        (
            "beta",
            np.array([0, 0, 0, -1e300, 0]),
            ValueError,
            r"beta is -1e\+300 at channel 3, expected finite float32 values$",
        ),
        (
            "running_mean",
            np.ones(C + 1, np.float32),
            ValueError,
            rf"running_mean has shape \(6,\), expected \({C},\)",
        ),
        ("running_mean", np.ones((1, C), np.float32), ValueError, r"has shape \(1, 5\)"),
        (
            "gamma",
            np.array([1, 1, np.nan, 1, 1], "f4"),
            ValueError,
            "gamma is nan at channel 2, expected finite",
        ),
        (
            "running_var",
            np.array([1, -2, 1, 1, 1], "f4"),
            ValueError,
            r"running_var is -2.0 at channel 1.*>= 0",
        ),
        ("running_var", np.array([1, 1, 1, 1, np.inf], "f4"), ValueError, "running_var is inf at channel 4"),
    ],
)
def test_what_is_assigned_is_checked(name, value, error, match):
    layer = trained()
    before = everything(layer)
    with pytest.raises(error, match=match):
        setattr(layer, name, value)
    assert everything(layer) == before


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_float32_and_float64_can_be_assigned_to_any_layer(name, dtype):
    value = 1 / np.arange(3, C + 3)
    for given in (value, value.astype("f4"), np.repeat(value, 2)[::2]):
        layer = BatchNorm(C, dtype=dtype)
        held = getattr(layer, name)
        setattr(layer, name, given)
        assert getattr(layer, name) is held
        assert_same_bits(held, given.astype(dtype))
    setattr(layer, name, np.full(C, 1e-300))  # below float32: zero, no warning
    assert_same_bits(held, np.full(C, 1e-300).astype(dtype))


def test_a_vector_the_layer_was_built_without_cannot_be_assigned():
    with pytest.raises(ValueError, match="gamma cannot be assigned, the layer has none"):
        BatchNorm(C, scale=False).gamma = np.ones(C, np.float32)


# ---- state -------------------------------------------------------------------------------------------------


NAMES = [
    "gamma", "beta", "running_mean", "running_var",
    "format_version", "num_updates", "eps", "decay", "axis", "running_ddof", "activation", "data_format",
    "num_values", "num_skipped", "initial_weight", "warmup", "zero_debias", "on_nonfinite",
    "allow_initial_statistics", "virtual_batch_size", "save_memory", "renorm_rmin", "renorm_rmax",
    "renorm_dmax", "renorm_decay",
]  # fmt: skip


def test_state_dict_holds_copies_of_everything():
    layer = trained(decay=0.75, eps=1e-3, running_ddof=0, activation="relu", dtype=np.float64)
    state = layer.state_dict()
    assert list(state) == NAMES
    assert all(isinstance(value, np.ndarray) for value in state.values())
    for name in NAMES[:4]:
        assert_same_bits(state[name], getattr(layer, name))
        assert not np.shares_memory(state[name], getattr(layer, name))
    scalars = {name: state[name].item() for name in NAMES[4:]}
    assert scalars == {
        "num_updates": 3, "eps": 1e-3, "decay": 0.75, "axis": 1, "running_ddof": 0, "activation": "relu",
        "format_version": 2, "data_format": "none", "num_values": 3 * images().size, "num_skipped": 0,
        "initial_weight": 0.75**3, "warmup": 0, "zero_debias": 0, "on_nonfinite": "propagate",
        "allow_initial_statistics": 0, "virtual_batch_size": "none", "save_memory": 0, "renorm_rmin": "none",
        "renorm_rmax": "none", "renorm_dmax": "none", "renorm_decay": "none",
    }  # fmt: skip
    assert list(BatchNorm(C, scale=False, center=False).state_dict()) == NAMES[2:]
    assert BatchNorm(C).state_dict()["activation"].item() == "none"
    assert BatchNorm(C, data_format="NHWC").state_dict()["data_format"].item() == "NHWC"


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_loaded_layer_continues_bit_for_bit(dtype):
    layer = trained(dtype=dtype, decay=0.75, eps=1e-3, running_ddof=0)
    others = [
        BatchNorm(C, dtype=dtype).load_state_dict(layer.state_dict()),
        BatchNorm(dtype=dtype).load_state_dict(layer.state_dict()),
        trained(dtype=dtype, steps=1).load_state_dict(layer.state_dict()),
    ]
    for step in range(10, 13):
        x, dy = images(step, dtype=dtype), images(step + 10, dtype=dtype)
        y, dx = layer(x), layer.backward(dy)
        layer.gamma -= 0.1 * layer.dgamma
        for other in others:
            assert_same_bits(other(x), y)
            assert_same_bits(other.backward(dy), dx)
            other.gamma -= 0.1 * other.dgamma
            assert everything(other)["state"] == everything(layer)["state"]
            assert repr(other) == repr(layer)


def test_loading_copies_into_the_layer_and_drops_what_belongs_to_the_past():
    source, layer = trained(), trained(steps=1)
    layer.backward(images())
    arrays = everything(layer)["arrays"]
    state = source.state_dict()
    layer.load_state_dict(state)
    assert everything(layer)["arrays"] == arrays
    assert (layer.dgamma, layer.dbeta) == (None, None)
    with pytest.raises(RuntimeError, match="backward before any forward"):
        layer.backward(images())
    state["gamma"][:] = 77
    assert 77 not in layer.gamma
    lazy = BatchNorm().load_state_dict(state)
    state["gamma"][:] = 78
    assert 77 in lazy.gamma


def test_a_state_may_hold_the_layers_own_arrays_and_python_numbers():
    layer = trained()
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    state = layer.state_dict() | {"running_mean": layer.running_var, "running_var": np.abs(mean)[::-1]}
    state |= {"eps": 0, "decay": np.float64(0.5), "num_updates": 12, "activation": "none"}
    layer.load_state_dict(state)
    assert_same_bits(layer.running_mean, var)
    assert_same_bits(layer.running_var, np.abs(mean)[::-1])
    assert (layer.eps, layer.decay, layer.num_updates) == (0.0, 0.5, 12)
    assert type(layer.eps) is float


def without(*names):
    return {name: value for name, value in trained().state_dict().items() if name not in names}


def having(**entries):
    return trained().state_dict() | entries


BAD_STATES = {
    "no mapping": ([1], TypeError, "state is of type list, expected a mapping"),
    "none": (None, TypeError, "state is None, expected a mapping"),
    "empty": ({}, ValueError, "missing gamma, beta, running_mean"),
    "missing": (without("beta", "eps"), ValueError, "missing beta, eps; expected gamma, beta"),
    "unexpected": (
        having(v=np.ones(C), w=1),
        ValueError,
        r"unexpected v, w; expected gamma.*strict=False loads",
    ),
    "both": (without("gamma") | {"weight": 1}, ValueError, "missing gamma; unexpected weight; expected"),
    "odd names": (having() | {3: 1, None: 2}, ValueError, "unexpected 3, None"),
    "version": (
        having(format_version=np.array(3)),
        ValueError,
        "format_version is 3, expected 1 or 2, which",
    ),
    "version kind": (
        having(format_version="1"),
        TypeError,
        r"format_version is '1' \(str\), expected 1 or 2, which",
    ),
    "shape": (
        having(beta=np.ones(C + 1, "f4")),
        ValueError,
        r"beta has shape \(6,\), expected \(5,\), one value",
    ),
    "rank": (having(beta=np.ones((C, 1), "f4")), ValueError, r"beta has shape \(5, 1\)"),
    "scalar": (having(beta=np.float32(1)), TypeError, r"beta is .*float32.*, expected a one-dimensional"),
    "list": (
        having(running_mean=[0.0] * C),
        TypeError,
        r"running_mean is of type list, expected an array of float32; use numpy.array\(running_mean, ",
    ),
    "dtype": (having(running_var=np.ones(C)), TypeError, "running_var has dtype float64, expected float32"),
    "integers": (having(running_var=np.ones(C, int)), TypeError, "running_var has dtype int64"),
    "endian": (having(running_var=np.ones(C, ">f4")), TypeError, "running_var has dtype >f4"),
    "nan": (having(running_mean=np.full(C, np.nan, "f4")), ValueError, "running_mean is nan at channel 0"),
    "inf": (having(gamma=np.array([1, np.inf, 1, 1, 1], "f4")), ValueError, "gamma is inf at channel 1"),
    "negative": (
        having(running_var=np.full(C, -1e-5, "f4")),
        ValueError,
        "running_var is -.* at channel 0, expected finite",
    ),
    "eps": (having(eps=np.array(-1.0)), ValueError, "eps"),
    "eps nan": (having(eps=np.array(np.nan)), ValueError, "eps"),
    "eps kind": (having(eps=np.array("1e-5")), TypeError, r"eps is '1e-5' \(str\), expected a finite number"),
    "eps bool": (having(eps=np.array(True)), TypeError, r"eps is True \(bool\), expected a finite number"),
    "eps shape": (having(eps=np.ones(1)), ValueError, r"eps has shape \(1,\), expected a single value"),
    "eps object": (having(eps=np.array(None)), TypeError, "eps is None, expected a finite number"),
    "eps huge": (having(eps=10**400), ValueError, "eps is too large for a float"),
    "updates huge": (having(num_updates=2**70), ValueError, "num_updates is .*, expected an int >= 0"),
    "decay": (having(decay=np.array(1.5)), ValueError, "decay"),
    "ddof": (having(running_ddof=np.array(2)), ValueError, "running_ddof"),
    "updates": (having(num_updates=np.array(-1)), ValueError, "num_updates is -1, expected an int >= 0"),
    "updates kind": (
        having(num_updates=np.array(1.0)),
        TypeError,
        r"num_updates is 1.0 \(float\), expected an int >= 0",
    ),
    "axis": (having(axis=np.array(1.5)), TypeError, r"axis is 1.5 \(float\), expected an int"),
    "activation": (
        having(activation="relu"),
        ValueError,
        "activation is 'relu' in the state, expected None as in this layer: build",
    ),
}


@pytest.mark.parametrize(("state", "error", "match"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_bad_state_changes_nothing(state, error, match):
    for layer in (trained(steps=2), BatchNorm()):
        before = everything(layer)
        with pytest.raises(error, match=match):
            layer.load_state_dict(state)
        assert everything(layer) == before


def test_a_state_for_a_layer_with_other_vectors():
    with pytest.raises(ValueError, match="unexpected gamma; expected beta"):
        BatchNorm(C, scale=False).load_state_dict(trained().state_dict())
    with pytest.raises(ValueError, match="missing gamma; expected gamma"):
        BatchNorm(C).load_state_dict(trained(scale=False).state_dict())


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (
            np.ones((2, 2), "f4"),
            ValueError,
            r"gamma has shape \(2, 2\), expected a one-dimensional .* array, one value per channel",
        ),
        (np.ones(0, "f4"), ValueError, r"gamma has shape \(0,\), expected \(C,\)"),
        (np.array(1, "f4"), ValueError, r"gamma has shape \(\), expected a one-dimensional"),
        (np.float32(1), TypeError, "gamma is .*float32.*, expected a one-dimensional"),
        ([1.0], TypeError, "gamma is of type list, expected an array"),
    ],
)
def test_a_lazy_layer_needs_a_vector_to_learn_from(value, error, match):
    layer = BatchNorm()
    with pytest.raises(error, match=match):
        layer.load_state_dict(having(gamma=value))
    assert layer.num_features is None


@pytest.mark.parametrize("options", [{"axis": -1}, {"data_format": "NHWC"}, {"data_format": "NC"}], ids=str)
def test_a_state_does_not_depend_on_the_layout(options):
    source, layer = trained(), BatchNorm(C, **options)
    layout = layer.axis, layer.data_format
    layer.load_state_dict(source.state_dict())
    assert (layer.axis, layer.data_format) == layout
    for name in NAMES[:4]:
        assert_same_bits(getattr(layer, name), getattr(source, name))
    source.load_state_dict(layer.state_dict())
    assert (source.axis, source.data_format) == (1, None)


TORCH = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
KERAS = ("gamma", "beta", "moving_mean", "moving_variance")
HAIKU = ("scale", "offset")
OWN = {
    "weight": "gamma", "scale": "gamma", "bias": "beta", "offset": "beta", "moving_mean": "running_mean",
    "moving_variance": "running_var", "num_batches_tracked": "num_updates",
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("names", [TORCH, KERAS, HAIKU, *((name,) for name in OWN)], ids=str)
def test_names_of_other_libraries_are_translated_and_never_dropped(names, strict):
    layer = trained()
    before = everything(layer)
    with pytest.raises(ValueError, match=r"unexpected \w+.*assign arrays of PyTorch.*bn.gamma = ") as caught:
        layer.load_state_dict({name: np.ones(C, np.float32) for name in names}, strict=strict)
    assert "strict=False" not in str(caught.value)
    for name in set(names) & set(OWN):
        assert f"{name} is called {OWN[name]} here" in str(caught.value)
    assert everything(layer) == before


def test_a_read_only_vector_stops_the_load_before_it_begins():
    layer = trained(steps=1)
    layer.running_var.flags.writeable = False
    before = everything(layer)
    with pytest.raises(ValueError, match="running_var of this layer has been made read-only"):
        layer.load_state_dict(trained().state_dict())
    assert everything(layer) == before


def test_not_strict_loads_what_fits():
    layer, source = trained(steps=1), trained(decay=0.5)
    gamma = layer.gamma.copy()
    state = source.state_dict()
    del state["gamma"], state["eps"], state["axis"]
    layer.load_state_dict({**state, "surplus": "anything"}, strict=False)
    assert_same_bits(layer.gamma, gamma)
    assert_same_bits(layer.running_var, source.running_var)
    assert (layer.decay, layer.num_updates) == (0.5, 3)
    with pytest.raises(ValueError, match="running_var has shape"):
        layer.load_state_dict({"running_var": np.ones(C + 1, np.float32)}, strict=False)
    with pytest.raises(TypeError, match="strict"):
        layer.load_state_dict(state, strict=0)
    lazy = BatchNorm().load_state_dict({"beta": np.full(3, 2, np.float32)}, strict=False)
    assert lazy.num_features == 3
    np.testing.assert_array_equal(lazy.gamma, np.ones(3))
    assert BatchNorm().load_state_dict({}, strict=False).num_features is None


# ---- copies, text, threads ---------------------------------------------------------------------------------


def copies(layer):
    yield copy.deepcopy(layer)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(layer, protocol))


@pytest.mark.parametrize(
    "options", [{}, *OPTIONS[4:7], {"data_format": "NHWC", "dtype": np.float64}], ids=str
)
def test_copies_are_whole_and_apart(options):
    layer = randomized(BatchNorm(C, **options))
    shape = [4, 3, 2, 6]
    shape[layer.axis] = C
    layer(images(0, shape))
    layer.backward(images(1, shape))
    for other in copies(layer.eval()):
        assert repr(other) == repr(layer)
        assert everything(other)["state"] == everything(layer)["state"]
        assert other.data_format == layer.data_format and other.training is False
        assert_same_bits(other.dgamma, layer.dgamma)
        for mine, its in zip(layer.parameters(), other.parameters(), strict=True):
            assert not np.shares_memory(mine.value, its.value)
        with pytest.raises(RuntimeError, match="backward before any forward"):
            other.backward(images(1, shape))
        before = everything(layer)
        assert_same_bits(other(images(2, shape)), copy.deepcopy(layer)(images(2, shape)))
        other.train()(images(2, shape))
        assert everything(layer) == before


def test_copies_of_a_lazy_layer_are_lazy():
    for other in copies(BatchNorm(decay=0.5)):
        assert repr(other) == repr(BatchNorm(decay=0.5))
        other(images())
        assert other.num_features == C


class Named(BatchNorm):
    """A layer of a user."""

    def __init__(self, name, *arguments, **options):
        super().__init__(*arguments, **options)
        self.name = name

    def __call__(self, x, **options):
        self.calls = getattr(self, "calls", 0) + 1
        return super().__call__(x, **options)


def test_subclasses_keep_their_own_attributes():
    layer = Named("first", activation="relu")
    layer(images())
    assert layer.calls == 1
    assert repr(layer).startswith("Named(5, decay=0.9, ")
    for other in copies(layer):
        assert (type(other), other.name, other.num_updates) == (Named, "first", 1)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (
            BatchNorm(64),
            "BatchNorm(64, decay=0.9, eps=1e-05, axis=1, activation=None, num_updates=0, training=True)",
        ),
        (
            BatchNorm(axis=-1, activation="relu").eval(),
            "BatchNorm(None, decay=0.9, eps=1e-05, axis=-1, activation='relu', num_updates=0, "
            "training=False)",
        ),
        (
            trained(scale=False, center=False, running_ddof=0, dtype=np.float64, decay=1, eps=0),
            "BatchNorm(5, decay=1.0, eps=0.0, axis=1, activation=None, scale=False, center=False, "
            "running_ddof=0, dtype=float64, num_updates=3, training=True)",
        ),
    ],
)
def test_repr(layer, expected):
    assert repr(layer) == expected


def test_many_threads_may_share_a_layer_in_eval_mode():
    layer = trained().eval()
    inputs = [images(seed, (3 + seed % 5, C, 4)) for seed in range(8)]
    expected = [layer(x) for x in inputs]
    before = everything(layer)["state"]
    wrong = []

    def work(index):
        for _ in range(200):
            if layer(inputs[index]).tobytes() != expected[index].tobytes():
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert everything(layer)["state"] == before


def test_everything_public_is_documented():
    for name, member in inspect.getmembers(BatchNorm):
        assert name.startswith("_") or name in GRADIENTS or inspect.getdoc(member), name
