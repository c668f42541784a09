"""The channel count: learned, given, wrong; initial values; and what a layer says about it."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from batchnorm import BatchNorm

from support.checks import same_bits
from support.layers import C, everything, held, images, shaped, trained

pytestmark = pytest.mark.quick

X = images()
LAYOUTS = [
    {}, {"channel_axis": -1}, {"channel_axis": 0}, {"data_format": "NHWC"}, {"data_format": "NCHW"},
    {"scale": False, "center": False}, {"zero_debias": True}, {"renorm": {"decay": 0.5}},
    {"virtual_batch_size": 2},
]  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"training": False}, {"stats": "running", "update": True}], ids=str)
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_a_lazy_layer_is_as_one_with_a_count(options, how):
    options = {**options, "allow_initial_statistics": True}
    lazy, known = BatchNorm(**options), BatchNorm(C, **options)
    assert lazy.num_features is None
    assert (lazy.gamma, lazy.beta, lazy.running_mean, lazy.running_var, lazy.renorm_std) == (None,) * 5
    x = images(0, shaped(lazy.channel_axis))
    assert same_bits(lazy(x, **how), known(x, **how))
    assert lazy.num_features == C and held(lazy) == held(known) and repr(lazy) == repr(known)


def test_an_empty_batch_tells_the_channel_count():
    layer = BatchNorm()
    layer(np.empty((0, C), np.float32))
    assert (layer.num_features, layer.running.num_updates) == (C, 0)


BAD_INPUTS = [
    ([[1.0, 2.0]], TypeError, "x"), (None, TypeError, "x"), ("x", TypeError, "x"),
    (np.ones((4, C), np.int64), TypeError, "x has dtype"),
    (np.ones((4, C), object), TypeError, "x has dtype"),
    (np.float32(1), TypeError, "x"), (np.array(1.0, np.float32), ValueError, "x"),
    (np.ones(C, np.float32), ValueError, "x"), (np.ones((4, 0), np.float32), ValueError, "channel"),
    (np.ones((1, C), np.float32), ValueError, "value per channel"),
]  # fmt: skip


@pytest.mark.parametrize(("x", "error", "match"), BAD_INPUTS, ids=lambda v: str(v)[:20])
def test_a_failed_first_call_leaves_the_layer_lazy(x, error, match):
    layer = BatchNorm(initial={"gamma": lambda n: np.full(n, 2.0)})
    before, running = everything(layer), layer.running
    with pytest.raises(error, match=match):
        layer(x)
    assert everything(layer) == before and layer.running is running
    layer(images(0, (3, C + 2)))  # another count than that of the bad input
    assert layer.num_features == C + 2 and (layer.gamma == 2).all() and layer.running is running


def test_arguments_are_checked_before_the_count_is_learned():
    for arguments, match in (
        ({"residual": X[:2]}, "residual"), ({"training": "yes"}, "training"),
        ({"gamma": np.ones(C)}, "gamma"),
        ({"stats": "running"}, "never updated"), ({"mask": np.ones((2, 2), bool)}, "mask"),
        ({"phase": 1}, "phase"),
    ):  # fmt: skip
        layer = BatchNorm()
        with pytest.raises((TypeError, ValueError, RuntimeError), match=match):
            layer(X, **arguments)
        assert layer.num_features is None


@pytest.mark.parametrize("axis", [0, -1, 2, 5])
def test_a_lazy_layer_with_an_axis_that_x_does_not_have(axis):
    layer = BatchNorm(channel_axis=axis)
    with pytest.raises(ValueError, match=r"axis|x has shape|dimension"):
        layer(np.ones(C, np.float32))
    assert layer.num_features is None


def test_a_lazy_layer_says_what_it_needs():
    layer = BatchNorm()
    for name in ("parameters", "buffers", "state_dict", "snapshot", "scale_shift"):
        with pytest.raises(RuntimeError, match=rf"{name}\(\) needs the channel count.*call the layer once"):
            getattr(layer, name)()
    with pytest.raises(RuntimeError, match=r"save\(\) needs the channel count"):
        layer.save("nowhere")
    assert layer.running.num_values.shape == (1,) and layer.running.untouched().all()


# ---- where the channels seem to be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(2, 32, 32, 3), (4, 14, 14, 256), (2, 24, 32, 3), (2, 10, 40, 1), (1, 8, 8, 8, 16), (2, 4, 4, 8)],
)
def test_channels_that_seem_to_be_last_are_asked_about(shape):
    expected = (
        rf"has learned {shape[1]} channels on axis 1 of x .*channel_axis=-1 .*BatchNorm\({shape[1]}\) says"
    )
    with pytest.warns(UserWarning, match=expected) as caught:
        BatchNorm(name="conv1.bn")(np.zeros(shape, np.float32), update=False)
    assert caught[0].filename == __file__ and str(caught[0].message).startswith("conv1.bn has learned")
    for sure in (
        BatchNorm(shape[1]), BatchNorm(channel_axis=1), BatchNorm(channel_axis=-1),
        BatchNorm(data_format="channels_last"),
        BatchNorm(data_format="channels_first"),
    ):  # fmt: skip
        sure(np.zeros(shape, np.float32), update=False)
    layer = BatchNorm()
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        layer(np.zeros(shape, np.float32))
    assert layer.num_features is None


@pytest.mark.parametrize(
    "shape",
    [(8, 3, 32, 32), (8, 64, 56, 56), (8, 512, 7, 7), (8, 512, 2, 2), (8, 512, 1, 1), (2, 16, 16, 16),
        (9, 6), (9, 6, 3),
     (4, 3, 24, 32), (6, 5, 3, 2), (2, 3, 8, 8, 8), (4, 64, 5, 3)],
)  # fmt: skip
def test_channels_that_seem_to_be_on_axis_1_are_taken(shape):
    layer = BatchNorm()
    layer(np.zeros(shape, np.float32), update=False)
    assert layer.num_features == shape[1]


# ---- another channel count ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "hint"),
    [
        ((6, 7, 2, 2), {}, ""), ((6, 7, 2, C), {}, "; axis -1 has 4: build it with channel_axis=-1"),
        ((6, 7, 2, C), {"data_format": "NCHW"}, "; axis -1 has 4: build it with channel_axis=-1"),
        ((6, C, 2, 7), {"channel_axis": -1}, ""),
        ((C, 7, 7), {}, "; a single image needs a batch axis, x[None]"),
        ((C, 7, 7, 2), {}, ""), ((C, 7, 7), {"channel_axis": -1}, ""), ((C, 7), {}, ""),
        ((6, 7, 2, 2), {"scale": False, "center": False}, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", [{}, {"training": False}, {"stats": "running", "update": True}], ids=str)
def test_another_channel_count_is_told_of_x(shape, options, hint, how):
    layer = trained_or_known = BatchNorm(C, allow_initial_statistics=True, name="bn", **options)
    before = everything(layer)
    with pytest.raises(ValueError, match=r"^bn: x has 7 channels on axis -?1 of its shape \(") as caught:
        trained_or_known(np.ones(shape, np.float32), **how)
    assert str(caught.value).endswith(f"expected {C}, the num_features of this layer{hint}")
    assert everything(layer) == before


@pytest.mark.parametrize("layer", [BatchNorm(C, data_format="NHWC"), BatchNorm(data_format="NHWC")], ids=repr)
def test_data_format_fixes_the_rank(layer):
    for training in (True, False):
        with pytest.raises(ValueError, match="NHWC"):
            layer(np.ones((2, 3, 4, 5, C), np.float32), training=training)


# ---- initial values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_initial_values(lazy, dtype):
    array = np.arange(C, dtype=np.float64)
    initial = {"gamma": 0, "beta": lambda n: np.linspace(0, 1, n), "running_mean": array}
    layer = BatchNorm(None if lazy else C, initial=initial, dtype=dtype)
    if lazy:
        layer(X, update=False)
    assert (layer.gamma == 0).all() and (layer.running_var == 1).all()
    assert same_bits(layer.beta, np.linspace(0, 1, C).astype(dtype))
    assert same_bits(layer.running_mean, array.astype(dtype))
    layer.running_mean += 1
    assert array[0] == 0  # copied
    assert BatchNorm(C, initial={"gamma": lambda n: n / 2}).gamma[0] == C / 2
    shapes = []
    BatchNorm((3, C), channel_axis=(1, 2), initial={"beta": lambda n: shapes.append(n) or np.zeros(n)})
    assert shapes == [(3, C)]
    pickle.dumps(layer)  # the functions are gone once they have been called


@pytest.mark.parametrize(
    ("initial", "error", "match"),
    [
        ({"gamma": "ones"}, TypeError, r"initial gamma is 'ones' \(str\), expected a number, an array of"),
        ({"gamma": None}, TypeError, "initial gamma is None, expected a number"),
        ({"gamma": [1.0] * C}, TypeError, "initial gamma is of type list, expected a number, an array of"),
        ({"beta": np.ones(C + 1)}, ValueError, r"initial beta has shape \(5,\), expected \(4,\)"),
        ({"beta": np.ones(C, int)}, TypeError, "initial beta has dtype int64, expected an array of float32"),
        ({"beta": np.inf}, ValueError, "initial beta is inf at channel 0, expected finite"),
        ({"running_var": -1.0}, ValueError, "initial running_var is -1.0 at channel 0, .*>= 0"),
        ({"gamma": lambda n: np.ones(n + 1)}, ValueError, r"initial gamma has shape \(5,\)"),
    ],
)
def test_bad_initial_values(initial, error, match):
    with pytest.raises(error, match=match):
        BatchNorm(C, initial=initial)
    layer = BatchNorm(initial=initial)
    for _ in range(2):
        with pytest.raises(error, match=match):
            layer(X)
        assert layer.num_features is None


def test_a_lazy_layer_with_an_initial_array_waits_for_its_channel_count():
    layer = BatchNorm(initial={"gamma": np.ones(C + 2)})
    with pytest.raises(ValueError, match="initial gamma has shape"):
        layer(X)
    layer(np.ones((3, C + 2), np.float32))
    assert layer.num_features == C + 2


def test_learning_the_count_in_other_ways():
    source = trained()
    assert BatchNorm(zero_debias=True).load_state_dict(source.state_dict()).num_features == C
    assert BatchNorm().recalibrate([X]).num_features == C
    layer = BatchNorm()
    with layer.recalibrating():
        layer(X)
    assert layer.num_features == C and layer.running.num_updates == 1
    assert same_bits(layer.running_mean, BatchNorm().recalibrate([X]).running_mean)
