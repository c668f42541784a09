"""A layer inside a network: what looks at it disturbs nothing, and its name is in every word about it."""

from __future__ import annotations

import warnings

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm

from support.checks import same_bits
from support.layers import C, images

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")]

X, DY = images("x"), images("dy")


def network_calls():
    other = X + np.float32(3)
    yield "diagnose", lambda bn: batchnorm.diagnose([bn], bn, [other])
    yield "recalibrate", lambda bn: batchnorm.recalibrate([bn], bn, [other])
    yield "one by one", lambda bn: batchnorm.recalibrate([bn], bn, [other], one_by_one=True)

    def inside(bn):
        with bn.recalibrating():
            bn(other)

    yield "recalibrating", inside
    yield "its own diagnosis", lambda bn: bn.diagnose(other)
    yield "its own recalibration", lambda bn: bn.recalibrate([other])


@pytest.mark.parametrize("call", [pytest.param(c, id=name) for name, c in network_calls()])
def test_what_runs_between_forward_and_backward_changes_no_gradient(call):
    layer, alone = BatchNorm(C), BatchNorm(C)
    for each in (layer, alone):
        each(X)
    call(layer)
    assert same_bits(layer.backward(DY), alone.backward(DY)) and same_bits(layer.dgamma, alone.dgamma)


def test_an_error_inside_a_network_leaves_a_lazy_layer_lazy():
    wrong = np.ascontiguousarray(np.moveaxis(np.repeat(X, 3, axis=0), 1, -1))

    def forward(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lazy(x)
        raise KeyError("later")

    for call in (batchnorm.recalibrate, batchnorm.diagnose):
        lazy = BatchNorm(initial={"gamma": 0.5})
        with pytest.raises(KeyError):
            call([lazy], forward, [wrong])
        assert lazy.num_features is None
        lazy(X)
        assert lazy.num_features == C and (lazy.gamma == 0.5).all()


def twice(bn):
    with bn.using("batch"):
        bn.using("batch")


BAD_CALLS = {
    "gamma": lambda bn: setattr(bn, "gamma", np.ones(C + 1, np.float32)),
    "eps": lambda bn: setattr(bn, "eps", -1),
    "renorm": lambda bn: setattr(bn, "renorm", 7),
    "load_state_dict": lambda bn: bn.load_state_dict({}),
    "rollback": lambda bn: bn.rollback(None),
    "clone": lambda bn: bn.clone(share="all"),
    "apply": lambda bn: bn.apply({}, X),
    "diagnose": lambda bn: bn.diagnose(X[:, :2]),
    "recalibrate": lambda bn: bn.recalibrate([X[:, :2]]),
    "fold": lambda bn: bn.fold(np.ones((C, 2)), out_axis=1),
    "call": lambda bn: bn(X[:, :2]),
    "using": lambda bn: twice(bn),
    "history": lambda bn: bn.plot_statistics("x.png"),
    **{
        name: lambda bn, name=name: getattr(BatchNorm(name="conv1.bn"), name)()
        for name in ("parameters", "buffers", "scale_shift", "state_dict", "snapshot")
    },
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_every_error_of_a_layer_says_its_name(call):
    layer = BatchNorm(C, name="conv1.bn")
    layer(X)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"^conv1\.bn: (?!conv1)"):
        call(layer)


def test_a_network_gives_names_to_layers_that_have_none():
    first = BatchNorm(C)
    for call in (batchnorm.recalibrate, batchnorm.diagnose):
        with pytest.raises(ValueError, match=r"^stem: x has 2 channels on axis 1"):
            call({"stem": first}, lambda x: first(x[:, :2]), [X])
        assert first.name is None
        with pytest.raises(ValueError, match=r"^layers\[0\]: "):
            call([first], lambda x: first(x[:, :2]), [X])


def test_scale_and_shift_of_statistics_that_are_none():
    for name, value, match in (
        ("running_var", -1.0, "running_var is -1 in channel 1: calls in eval mode are an error"),
        ("running_mean", np.nan, "running_mean is nan in channel 1"),
    ):
        layer = BatchNorm(C, name="stem", allow_initial_statistics=True)
        getattr(layer, name)[1] = value
        for call in (layer.scale_shift, lambda: layer.fold(np.ones((C, 2)), out_axis=0)):  # noqa: B023
            with pytest.raises(ValueError, match=rf"^stem: {match}"):
                call()
    layer = BatchNorm(C, eps=0, allow_initial_statistics=True)
    layer.running_var[2] = 0
    with pytest.raises(ValueError, match=r"var \+ eps is 0"):
        layer.scale_shift()


def test_a_frozen_layer_is_told_to_unfreeze():
    layer = BatchNorm(C, name="stem").freeze()
    with pytest.raises(RuntimeError, match=r"stem: .*calls of a frozen layer .* Call unfreeze\(\) and train"):
        layer(X)
    layer.unfreeze()(X)
    layer.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(X)


def test_recalibration_says_what_channel_count_it_learned():
    images = np.random.default_rng(0).random((4, 16, 16, 3)).astype(np.float32)
    layer = BatchNorm(name="stem")
    with pytest.warns(UserWarning, match="stem has learned 16 channels on axis 1 of x") as caught:
        layer.recalibrate([images])
    assert caught[0].filename == __file__


def test_recalibration_names_a_channel_by_all_its_axes():
    x = np.random.default_rng(0).random((6, 3, 4)).astype(np.float32)
    x[2, 2, 1] = np.nan
    with pytest.raises(ValueError, match=r"mean is nan at channel 2, 1, expected finite"):
        BatchNorm((3, 4), channel_axis=(1, 2)).recalibrate([x])
