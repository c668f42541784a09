"""Which statistics a call uses, whether it updates them, what it keeps: switches, freezing, residuals."""

from __future__ import annotations

import copy
import pickle

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm

C = 4
RNG = np.random.default_rng(3)
X, DY, Z = RNG.normal(1, 2, (3, 6, C, 5)).astype(np.float32)


def trained(**options):
    layer = BatchNorm(C, **{"zero_debias": True, **options})
    layer(RNG.normal(size=(9, C, 5)).astype(np.float32))
    if layer.scale:
        layer.gamma = np.arange(1, C + 1, dtype=np.float32)
    layer.beta = np.arange(C, dtype=np.float32) - 1
    return layer


def held(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


def by_batch(layer, x=X, **more):
    return batchnorm.batch_norm_train(x, layer.gamma, layer.beta, activation=layer.activation, **more)


def by_running(layer, x=X, **more):
    stats = layer.running_mean, layer.running_var
    return batchnorm.batch_norm(x, *stats, layer.gamma, layer.beta, activation=layer.activation, **more)


# ---- stats= and update= ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [None, True, False])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("stats", [None, "batch", "running"])
@pytest.mark.parametrize("update", [None, True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_statistics_and_update_are_independent(stats, update, training, mode, activation):
    layer = trained(activation=activation).train(mode)
    before, moved = held(layer), copy.deepcopy(layer)
    moved(X, training=True)
    learning = mode if training is None else training
    batch = learning if stats is None else stats == "batch"
    expected = by_batch(layer).y if batch else by_running(layer)  # the statistics before the update
    y = layer(X, training=training, stats=stats, update=update)
    assert y.tobytes() == expected.tobytes()
    assert held(layer) == (held(moved) if (learning if update is None else update) else before)
    assert layer.training is mode


@pytest.mark.parametrize(
    ("option", "value", "error", "match"),
    [
        *(("update", v, TypeError, "update is .*, expected True or False") for v in (1, 0, "no", np.True_)),
        *(("keep", v, TypeError, "keep is .*, expected True or False") for v in (1, "yes", np.False_)),
        *(("stats", v, TypeError, "stats is .*, expected 'batch' or 'running'") for v in (True, 1, b"batch")),
        *(("stats", v, ValueError, "stats is .*, expected 'batch' or 'running'") for v in ("Batch", "")),
        ("residual", X[:3], ValueError, "residual"),
        ("residual", X.astype(np.float64), TypeError, "residual"),
        ("residual", [1.0], TypeError, "residual"),
        ("statistics", "batch", TypeError, "statistics"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_arguments_of_a_call_change_nothing(option, value, error, match, training):
    layer = trained()
    layer(X)
    before = held(layer)
    with pytest.raises(error, match=match):
        layer(X, **{option: value, "training": training})
    assert held(layer) == before
    assert layer.backward(DY).shape == X.shape


def test_running_statistics_of_one_value_cannot_be_updated():
    layer = trained()
    before = held(layer)
    for how in ({}, {"stats": "running", "update": True}):
        with pytest.raises(ValueError, match=r"1 value|one value|count is 1"):
            layer(X[:1, :, :1], **how)
    assert held(layer) == before
    biased = trained(running_ddof=0)
    biased(X[:1, :, :1], stats="running", update=True)  # a mean can be learned from one value
    assert biased.num_updates == 2


def test_an_empty_batch_updates_nothing_whatever_is_asked_for():
    for options in ({"zero_debias": True}, {"zero_debias": False, "decay": None}):
        layer = trained(**options)
        before = held(layer)
        for how in ({}, {"stats": "running", "update": True}, {"stats": "batch", "update": True}):
            assert layer(X[:0], **how).shape == (0, C, 5)
        assert held(layer) == before


def test_a_lazy_layer_learns_its_channels_on_the_long_way_too():
    layer = BatchNorm(zero_debias=True, initial={"gamma": 2.0})
    with pytest.raises(ValueError, match="residual"):
        layer(X, residual=Z[:2])
    assert layer.num_features is None
    layer(X, residual=Z)
    assert layer.num_features == C and (layer.gamma == 2).all()


# ---- freezing ----------------------------------------------------------------------------------------------


def test_a_frozen_layer_survives_train():
    layer = trained(activation="relu")
    before = held(layer)
    assert layer.freeze() is layer and layer.frozen
    for call in (
        lambda: layer(X),
        lambda: layer.train()(X),
        lambda: layer(X, training=True),
        lambda: layer.eval()(X),
        lambda: layer.train(True)(X, update=False),
    ):
        assert call().tobytes() == by_running(layer).tobytes()
        assert held(layer) == before
    assert layer(X, stats="batch").tobytes() == by_batch(layer).y.tobytes()  # the call has its way
    assert held(layer) == before
    with pytest.raises(ValueError, match=r"update is True, but the layer is frozen: .* unfreeze\(\)"):
        layer(X, update=True)
    assert "frozen=statistics)" in repr(layer)
    assert layer.unfreeze() is layer and not layer.frozen
    assert layer(X).tobytes() == by_batch(layer).y.tobytes()
    assert layer.num_updates == 2


def test_a_frozen_layer_can_be_trained_around():
    layer = trained().freeze()
    layer(X)
    inv_std = 1 / np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    expected = batchnorm.batch_norm_backward(
        DY, X, layer.running_mean, inv_std, layer.gamma, layer.beta, stats="fixed"
    )
    assert layer.backward(DY).tobytes() == expected.dx.tobytes()
    assert layer.dgamma.tobytes() == expected.dgamma.tobytes()
    assert [p.name for p in layer.parameters()] == ["gamma", "beta"]


def test_parameters_can_be_frozen_too():
    layer = trained().freeze(parameters=True)
    layer(X)
    dx = layer.backward(DY)
    assert (layer.dgamma, layer.dbeta, layer.parameters()) == (None, None, [])
    assert "frozen=statistics and parameters" in repr(layer)
    other = trained().load_state_dict(layer.state_dict()).freeze()
    other(X)
    assert other.backward(DY).tobytes() == dx.tobytes()
    layer.unfreeze()(X)
    layer.backward(DY)
    assert layer.dgamma is not None and len(layer.parameters()) == 2
    with pytest.raises(TypeError, match="parameters is 1"):
        layer.freeze(parameters=1)
    assert not layer.frozen


def test_a_frozen_layer_stays_frozen_in_copies_but_not_in_a_state():
    layer = trained().freeze(parameters=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.clone()):
        assert other.frozen and other.parameters() == [] and repr(other) == repr(layer)
    assert not BatchNorm(C).load_state_dict(layer.state_dict()).frozen


# ---- backward ----------------------------------------------------------------------------------------------


def test_backward_takes_the_statistics_that_the_forward_used():
    """Also if the same call, or a later one, has moved them."""
    layer, still = trained(), trained().freeze()
    still.load_state_dict(layer.state_dict())
    still(X)
    expected = still.backward(DY)
    layer(X, stats="running", update=True)
    assert layer.num_updates == 2
    layer.running_mean += 1
    assert layer.backward(DY).tobytes() == expected.tobytes()


@pytest.mark.parametrize("how", [{}, {"training": False, "keep": True}], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("scale", [True, False])
def test_a_residual_goes_through_the_layer(how, activation, scale):
    layer = trained(activation=activation, scale=scale)
    fixed = "training" in how
    if fixed:
        mask = np.zeros(batchnorm.activation_mask_bytes(X), np.uint8)
        y = by_running(layer, residual=Z, activation_mask=mask if activation else None)
        mean = layer.running_mean
        inv_std = 1 / np.sqrt(layer.running_var.astype(np.float64) + layer.eps)
    else:
        y, mean, inv_std = result = by_batch(layer, residual=Z)
        mask = getattr(result, "activation_mask", None)
    expected = batchnorm.batch_norm_backward(
        DY, X, mean, inv_std, layer.gamma, layer.beta, stats="fixed" if fixed else "batch",
        activation=activation, activation_mask=mask if activation else None,
        needs=("dx", "dgamma", "dbeta", "dresidual"),
    )  # fmt: skip
    assert layer(X, residual=Z, **how).tobytes() == y.tobytes()
    assert layer.backward(DY).tobytes() == expected.dx.tobytes()
    assert layer.dresidual.tobytes() == expected.dresidual.tobytes()
    assert layer.dbeta.tobytes() == expected.dbeta.tobytes()
    assert layer.dgamma is None if not scale else layer.dgamma.tobytes() == expected.dgamma.tobytes()
    layer(X)
    layer.backward(DY)
    assert layer.dresidual is None


def test_a_residual_in_place():
    layer = trained(activation="relu")
    other = copy.deepcopy(layer)
    expected, z = layer(X, residual=Z), Z.copy()
    assert other(X, residual=z, out=z) is z
    assert z.tobytes() == expected.tobytes()
    assert other.backward(DY).tobytes() == layer.backward(DY).tobytes()
    x = X.copy()
    assert layer(x, residual=Z, out=x) is x
    with pytest.raises(RuntimeError, match="overwritten"):
        layer.backward(DY)


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
    assert layer.beta.tobytes() == np.linspace(0, 1, C).astype(dtype).tobytes()
    assert layer.running_mean.tobytes() == array.astype(dtype).tobytes()
    layer.running_mean += 1
    assert array[0] == 0  # copied
    assert BatchNorm(C, initial={"gamma": lambda n: n / 2}).gamma[0] == C / 2
    pickle.dumps(layer)  # the functions are gone once they have been called


@pytest.mark.parametrize(
    ("initial", "error", "match"),
    [
        (3, TypeError, "initial is 3 .*, expected a mapping such as"),
        ({"weight": 1}, ValueError, "initial names 'weight', expected names among gamma, beta, running_mean"),
        ({"gamma": "ones"}, TypeError, r"initial gamma is 'ones' \(str\), expected a number, an array of"),
        ({"gamma": None}, TypeError, "initial gamma is None, expected a number"),
        ({"gamma": [1.0] * C}, TypeError, "initial gamma is of type list, expected a number, an array of"),
        ({"beta": np.ones(C + 1)}, ValueError, r"initial beta has shape \(5,\), expected \(4,\)"),
        ({"beta": np.ones(C, int)}, TypeError, "initial beta has dtype int64, expected float32 or float64"),
        ({"beta": np.nan}, ValueError, "initial beta is nan at channel 0, expected finite"),
        ({"running_var": -1.0}, ValueError, "initial running_var is -1.0 at channel 0, .*>= 0"),
        ({"gamma": lambda n: np.ones(n + 1)}, ValueError, r"initial gamma has shape \(5,\)"),
    ],
)
def test_bad_initial_values(initial, error, match):
    with pytest.raises(error, match=match):
        BatchNorm(C, initial=initial)
    if error is ValueError and "names" not in match:
        layer = BatchNorm(initial=initial)
        with pytest.raises(error, match=match):
            layer(X)
        assert layer.num_features is None
    with pytest.raises(ValueError, match="initial names 'gamma', expected names among beta, running_mean"):
        BatchNorm(C, scale=False, initial={"gamma": 1.0})


def test_a_lazy_layer_with_an_initial_array_waits_for_its_channel_count():
    layer = BatchNorm(initial={"gamma": np.ones(C + 2)})
    with pytest.raises(ValueError, match="initial gamma has shape"):
        layer(X)
    layer(np.ones((3, C + 2), np.float32))
    assert layer.num_features == C + 2


# ---- weight decay ------------------------------------------------------------------------------------------


def test_weight_decay_groups():
    layer, weight = BatchNorm(C), ("weight", X, DY)
    decayed, rest = batchnorm.weight_decay_groups(iter([*layer.parameters(), weight]))
    assert decayed == [weight]
    assert [p.name for p in rest] == ["gamma", "beta"] and not any(p.weight_decay for p in rest)
    assert rest[0].value is layer.gamma
    with pytest.raises(TypeError, match=r"parameters is 3 .*, expected an iterable"):
        batchnorm.weight_decay_groups(3)
