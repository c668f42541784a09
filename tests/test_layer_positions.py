"""mask, lengths and weights in calls of the layer."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm

C = 4
RNG = np.random.default_rng(0)
X, DY = RNG.normal(1, 2, (2, 6, C, 5)).astype(np.float32)
MASK = RNG.random((6, 5)) < 0.7
LENGTHS = np.array([5, 3, 1, 0, 4, 2])
WEIGHTS = np.array([1.5, 0.25, 2, 0, 1, 3])
SCHEDULES = [{}, {"decay": None}, {"zero_debias": True, "activation": "relu"}]
GIVEN = [
    {"mask": MASK},
    {"lengths": LENGTHS},
    {"lengths": LENGTHS, "lengths_axis": 2},
    {"weights": WEIGHTS},
    {"weights": np.array([1, 2, 0, 3, 1, 1]), "mask": MASK},
]


def held(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("guard", ["propagate", "raise"])
@pytest.mark.parametrize(
    "options", [{}, {"decay": None}, {"zero_debias": True, "activation": "relu"}], ids=str
)
@pytest.mark.parametrize("given", GIVEN, ids=lambda g: " ".join(g))
def test_training_is_that_of_the_functions(given, options, guard):
    layer = BatchNorm(C, on_nonfinite=guard, **options)
    mean, var = np.zeros(C, "f4"), np.ones(C, "f4")
    seen = 0.0
    count = np.broadcast_to(given.get("weights", np.ones(6))[:, None], (6, 5))
    count = count * given.get("mask", True) * (np.arange(5) < given.get("lengths", np.full(6, 5))[:, None])
    for step in range(3):
        decay = 0.9
        if options:
            decay = (
                seen / (seen + count.sum())
                if "decay" in options
                else batchnorm.effective_decay(0.9, updates=step, zero_debias=True)
            )
        seen += count.sum()
        result = batchnorm.batch_norm_train(
            X, layer.gamma, layer.beta, running_mean=mean, running_var=var, decay=decay,
            activation=layer.activation, **given,
        )  # fmt: skip
        out = np.empty_like(X)
        assert layer(X, out=out, **given) is out
        assert out.tobytes() == result.y.tobytes()
        expected = batchnorm.batch_norm_backward(
            DY, X, result.mean, result.inv_std, layer.gamma, layer.beta, activation=layer.activation, **given
        )
        assert layer.backward(DY).tobytes() == expected.dx.tobytes()
        assert layer.dgamma.tobytes() == expected.dgamma.tobytes()
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-6)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-6)
    assert layer.num_samples == pytest.approx(seen) and layer.num_updates == 3
    assert isinstance(layer.num_samples, int) == ("weights" not in given)
    loaded = (
        BatchNorm(C).load_state_dict(layer.state_dict()) if not options.get("activation") else layer.clone()
    )
    assert held(loaded) == held(layer)


@pytest.mark.parametrize("given", GIVEN, ids=lambda g: " ".join(g))
@pytest.mark.parametrize("update", [False, True])
def test_running_statistics_with_positions(given, update):
    layer = BatchNorm(C, zero_debias=True)
    layer(X)
    running = layer.running_mean.copy(), layer.running_var.copy()
    counting = {name: value for name, value in given.items() if name != "weights"}
    y = layer(X, stats="running", update=update, **given)
    assert y.tobytes() == batchnorm.batch_norm(X, *running, layer.gamma, layer.beta, **counting).tobytes()
    inv_std = 1 / np.sqrt(running[1].astype(np.float64) + layer.eps)
    expected = batchnorm.batch_norm_backward(
        DY, X, running[0], inv_std, layer.gamma, layer.beta, stats="fixed", **counting
    )
    assert layer.backward(DY).tobytes() == expected.dx.tobytes()
    other = BatchNorm(C, zero_debias=True)
    other(X)
    other(X, **given)
    if update:
        np.testing.assert_allclose(layer.running_var, other.running_var, rtol=1e-6)
        np.testing.assert_allclose(layer.running_mean, other.running_mean, rtol=1e-6)
    else:
        assert layer.running_var.tobytes() == running[1].tobytes()


def test_nothing_counts():
    layer = BatchNorm(C, on_nonfinite="raise")
    before = held(layer)
    y = layer(X, mask=np.zeros((6, 5), bool))
    assert not y.any() and held(layer) == before
    assert not layer.backward(DY).any() and not layer.dgamma.any()


@pytest.mark.parametrize("given", GIVEN[:3], ids=lambda g: " ".join(g))
def test_recalibrating_with_positions(given):
    layer, other = BatchNorm(C), BatchNorm(C)
    with layer.recalibrating():
        layer(X, **given)
    mask = given.get("mask", np.arange(5) < LENGTHS[:, None])
    other.recalibrate([np.moveaxis(X, 1, -1)[mask]])
    assert held(layer) == held(other)
    with pytest.raises(ValueError, match="weights is given inside recalibrating"), layer.recalibrating():
        layer(X, weights=WEIGHTS)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"mask": MASK, "lengths": LENGTHS}, ValueError, "mask and lengths are both given"),
        ({"mask": MASK.astype(int)}, TypeError, "mask has dtype int64"),
        ({"weights": -WEIGHTS}, ValueError, "weights holds -"),
        ({"lengths_axis": 2}, ValueError, "lengths_axis is given without lengths"),
    ],
)
@pytest.mark.parametrize("lazy", [True, False])
def test_bad_positions_change_nothing(given, error, match, lazy):
    layer = BatchNorm(None if lazy else C)
    before = repr(layer)
    with pytest.raises(error, match=match):
        layer(X, **given)
    assert repr(layer) == before
    with pytest.raises(TypeError, match="x is of type list"):
        layer([1.0], mask=MASK)


@pytest.mark.parametrize(
    "options", [{"renorm": True}, {"virtual_batch_size": 2}, {"save_memory": True}], ids=str
)
def test_ways_that_cannot_leave_positions_out(options):
    layer = BatchNorm(C, **options)
    with pytest.raises(ValueError, match=r"mask is given and the layer has .*: drop one of them"):
        layer(X, mask=MASK)
    assert layer.num_updates == 0
