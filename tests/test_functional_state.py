"""apply(): state in, new state out, nothing changed."""

from __future__ import annotations

import numpy as np
import pytest
from batchnorm import BatchNorm

pytestmark = pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")

C = 4
OPTIONS = [{}, {"decay": None}, {"zero_debias": True, "activation": "relu"}, {"warmup": True, "scale": False}]


def images(seed):
    return np.random.default_rng(seed).normal(1, 2, (6, C, 5)).astype(np.float32)


def held(state):
    return {name: value.tobytes() for name, value in state.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_chain_of_states_is_what_a_layer_goes_through(options):
    layer, still = BatchNorm(C, **options), BatchNorm(C, **options)
    state, before = still.state_dict(), held(still.state_dict())
    for step in range(4):
        given = held(state)
        result = still.apply(state, images(step))
        y, new = result
        assert held(state) == given and held(still.state_dict()) == before
        assert y.tobytes() == layer(images(step)).tobytes()
        assert held(new) == held(layer.state_dict())
        dx, dgamma, dbeta = result.backward(images(9))
        assert dx.tobytes() == layer.backward(images(9)).tobytes()
        assert dbeta.tobytes() == layer.dbeta.tobytes()
        assert dgamma is None if layer.dgamma is None else dgamma.tobytes() == layer.dgamma.tobytes()
        state = new
    assert (still.dgamma, still.dbeta, still._saved) == (None, None, None)
    y, new = still.apply(state, images(7), stats="running", update=False, residual=images(8))
    assert held(new) == held(state)
    assert y.tobytes() == layer(images(7), stats="running", update=False, residual=images(8)).tobytes()


def test_it_can_be_called_again_with_the_same_result():
    layer = BatchNorm(C, zero_debias=True)
    state = layer.state_dict()
    one, two = layer.apply(state, images(0)), layer.apply(state, images(0))
    assert one.y.tobytes() == two.y.tobytes() and held(one.state) == held(two.state)
    one.state["gamma"][:] = 7
    assert (two.state["gamma"] == 1).all() and (layer.gamma == 1).all()
    assert one.backward(images(1)).dx.tobytes() == two.backward(images(1)).dx.tobytes()


def test_the_mode_is_that_of_the_layer():
    layer = BatchNorm(C, zero_debias=True)
    layer(images(0))
    state = layer.state_dict()
    y, new = layer.eval().apply(state, images(1))
    assert held(new) == held(state) and y.tobytes() == layer(images(1)).tobytes()
    y, new = layer.train().freeze().apply(state, images(1))
    assert held(new) == held(state)
    lazy = BatchNorm(zero_debias=True)
    assert held(lazy.apply(state, images(1)).state) == held(layer.unfreeze().apply(state, images(1)).state)
    assert lazy.num_features is None


def test_errors_change_nothing():
    layer = BatchNorm(C)
    state, before = layer.state_dict(), held(layer.state_dict())
    for arguments, options, error, match in (
        (({}, images(0)), {}, ValueError, "missing gamma"),
        ((state, images(0)[:, :2]), {}, ValueError, "x has 2 channels"),
        ((state, images(0)), {"training": False}, RuntimeError, "initial"),
        ((state, images(0)), {"out": images(1)}, TypeError, r"apply\(\) has no argument 'out'"),
        ((state, images(0)), {"updates": True}, TypeError, "updates"),
    ):
        with pytest.raises(error, match=match):
            layer.apply(*arguments, **options)
    assert held(layer.state_dict()) == before
