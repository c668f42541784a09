"""Batch renormalisation, ghost batches and y kept instead of x, as options of the layer."""

from __future__ import annotations

import copy
import math

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm

pytestmark = pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")

C = 4
LIMITS = {"rmin": 0.5, "rmax": 2.0, "dmax": 0.75}
WAYS = [
    {"renorm": LIMITS},
    {"renorm": {**LIMITS, "decay": 0.5}},
    {"virtual_batch_size": 3},
    {"save_memory": True},
]


def images(seed, n=6, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, C, 5)) * rng.uniform(0.5, 2, (1, C, 1)) + rng.normal(size=(1, C, 1))).astype(
        dtype
    )


DY = images(99)


def built(**options):
    layer = BatchNorm(C, **options)
    layer.gamma = np.array([1, -2, 0.5, 3], np.float32)
    layer.beta = np.array([0, 1, -1, 0.5], np.float32)
    return layer


def held(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


# ---- renorm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [None, images(50)], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("schedule", [{}, {"zero_debias": True}, {"on_nonfinite": "raise"}], ids=str)
@pytest.mark.parametrize("own", [{}, {"decay": 0.5}], ids=["running", "own"])
def test_renorm_is_that_of_the_function(own, schedule, activation, residual):
    layer = built(renorm={**LIMITS, **own}, activation=activation, **schedule)
    stats = {"running_mean": np.zeros(C, "f4"), "running_var": np.ones(C, "f4")}
    reference = {"renorm_mean": np.zeros(C, "f4"), "renorm_std": np.ones(C, "f4")} if own else {}
    for step in range(4):
        x = images(step)
        decay = batchnorm.effective_decay(0.9, updates=step, zero_debias="zero_debias" in schedule)
        common = {"decay": decay, "activation": activation, "residual": residual, **stats}
        y = layer(x, residual=residual)
        dx = layer.backward(DY)
        if not step:  # no reference yet: a plain step, whose batch becomes the reference
            first = batchnorm.batch_norm_train(x, layer.gamma, layer.beta, **common)
            assert y.tobytes() == first.y.tobytes()
            if own:
                reference = {
                    "renorm_mean": first.mean.astype("f4"),
                    "renorm_std": (1 / first.inv_std).astype("f4"),
                }
            continue
        more = {"renorm_decay": 0.5, **reference} if own else {}
        result = batchnorm.batch_renorm_train(x, layer.gamma, layer.beta, **common, **more, **LIMITS)
        expected = batchnorm.batch_renorm_backward(
            DY, x, result.mean, result.inv_std, result.r, result.d, layer.gamma, layer.beta,
            activation=activation, activation_mask=result.activation_mask,
            needs=("dx", "dgamma", "dbeta", "dresidual")[: 3 + (residual is not None)],
        )  # fmt: skip
        assert y.tobytes() == result.y.tobytes() and dx.tobytes() == expected.dx.tobytes()
        assert layer.dgamma.tobytes() == expected.dgamma.tobytes()
        if residual is not None:
            assert layer.dresidual.tobytes() == expected.dresidual.tobytes()
        for name, value in {**stats, **reference}.items():
            assert getattr(layer, name).tobytes() == value.tobytes()
        assert np.any(result.r != 1)
    assert layer.num_updates == 4


def test_unlimited_renorm_is_inference():
    layer = built(renorm=True, zero_debias=True)
    for step in range(3):
        layer(images(step))
    expected = layer(images(3), training=False)
    np.testing.assert_allclose(layer(images(3)), expected, rtol=1e-4, atol=1e-5)
    assert layer.renorm == {"rmin": 0.0, "rmax": math.inf, "dmax": math.inf, "decay": None}


def test_the_limits_may_change_and_1_1_0_is_plain():
    layer, plain = built(renorm=True), built()
    layer.renorm = {"rmin": 1, "rmax": 1, "dmax": 0}
    for step in range(3):
        np.testing.assert_allclose(layer(images(step)), plain(images(step)), rtol=1e-6, atol=1e-6)
    layer.renorm = None
    assert layer(images(3)).tobytes() == plain(images(3)).tobytes()
    with pytest.raises(ValueError, match="decided when the layer is built; leave decay away"):
        layer.renorm = {"decay": 0.5}
    with pytest.raises(ValueError, match="decided when the layer is built; give decay among the limits"):
        built(renorm={"decay": 0.5}).renorm = True


@pytest.mark.parametrize("own", [{}, {"decay": 0.5}], ids=["running", "own"])
def test_renorm_without_an_update_changes_nothing(own):
    layer = built(renorm={**LIMITS, **own})
    layer(images(0))
    before, other = held(layer), copy.deepcopy(layer)
    y = layer(images(1), update=False)
    assert held(layer) == before
    assert y.tobytes() == other(images(1)).tobytes()
    other(images(2), stats="running", update=True)
    assert other.num_updates == 3
    if own:
        batch = batchnorm.moments(images(2))
        expected = layer.renorm_mean.copy(), layer.renorm_std.copy()
        for x in (images(1), images(2)):
            batch = batchnorm.moments(x)
            std = np.sqrt(batch.var + layer.eps)
            expected = [0.5 * e + 0.5 * b for e, b in zip(expected, (batch.mean, std), strict=True)]
        np.testing.assert_allclose(other.renorm_mean, expected[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(other.renorm_std, expected[1], rtol=1e-6)


def test_a_reference_of_its_own_is_part_of_the_state():
    layer = built(renorm={"decay": 0.5})
    layer(images(0))
    snapshot, before = layer.snapshot(), held(layer)
    assert {"renorm_mean", "renorm_std"} < set(layer.state_dict())
    layer(images(1))
    assert held(layer.rollback(snapshot)) == before
    with pytest.raises(ValueError, match="snapshot has running_mean, running_var of 4 channels"):
        layer.rollback(built().snapshot())
    with pytest.raises(ValueError, match="unexpected renorm_mean, renorm_std"):
        built().load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="expected both or neither: build the layer as the saved one was"):
        built().load_state_dict(layer.state_dict(), strict=False)
    shared = layer.clone(share="stats")
    shared(images(1))
    assert shared.renorm_mean is layer.renorm_mean and held(shared)["renorm_std"] == held(layer)["renorm_std"]


# ---- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [None, images(50)], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("guard", ["propagate", "raise", "skip"])
def test_parts_are_normalised_apart_and_averaged(guard, ddof, activation, residual):
    layer = built(
        virtual_batch_size=2, activation=activation, zero_debias=True, running_ddof=ddof, on_nonfinite=guard
    )
    x = images(0)
    common = {"virtual_batch_size": 2, "activation": activation}
    result = batchnorm.ghost_batch_norm_train(x, layer.gamma, layer.beta, residual=residual, **common)
    expected = batchnorm.ghost_batch_norm_backward(
        DY, x, result.mean, result.inv_std, layer.gamma, layer.beta,
        activation_mask=getattr(result, "activation_mask", None),
        needs=("dx", "dgamma", "dbeta", "dresidual")[: 3 + (residual is not None)], **common,
    )  # fmt: skip
    out = np.empty_like(x)
    assert layer(x, residual=residual, out=out) is out
    assert out.tobytes() == result.y.tobytes()
    assert layer.backward(DY).tobytes() == expected.dx.tobytes()
    assert layer.dgamma.tobytes() == expected.dgamma.tobytes()
    parts = x.reshape(3, 2, C, 5).astype(np.float64)
    np.testing.assert_allclose(layer.running_mean, parts.mean(axis=(0, 1, 3)), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, parts.var(axis=(1, 3), ddof=ddof).mean(axis=0), rtol=1e-6)
    assert (layer.num_updates, layer.num_samples) == (1, 30)
    assert layer(x[:5], training=False).shape == (5, C, 5)  # no parts in evaluation
    before = held(layer)
    with pytest.raises(ValueError, match="virtual_batch_size is 2, which does not divide the 5 samples"):
        layer(x[:5])
    assert layer(x[:0]).shape == (0, C, 5)
    layer(x, update=False)
    assert held(layer) == before


# ---- keeping y ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [{}, {"activation": "leaky_relu", "slope": 0.25}], ids=str)
@pytest.mark.parametrize("guard", ["propagate", "raise"])
def test_backward_from_y_in_place(guard, activation):
    layer = built(save_memory=True, on_nonfinite=guard, **activation)
    plain = built(on_nonfinite=guard, **activation)
    for step in range(2):
        x = images(step)
        expected = plain(x.copy())
        assert layer(x, out=x) is x
        assert x.tobytes() == expected.tobytes()
        np.testing.assert_allclose(layer.backward(DY), plain.backward(DY), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.dgamma, plain.dgamma, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(layer.dbeta, plain.dbeta, rtol=1e-4, atol=1e-4)
    assert layer.running_var.tobytes() == plain.running_var.tobytes() and layer.num_updates == 2
    y = layer(images(3))
    plain(images(3))
    dy = DY.copy()
    assert layer.backward(dy, out=dy) is dy
    again = layer.backward(DY, out=y)
    assert again is y
    with pytest.raises(RuntimeError, match="overwritten"):
        layer.backward(DY)
    layer.eval()(images(3), keep=True)
    plain.eval()(images(3), keep=True)
    assert layer.backward(DY).tobytes() == plain.backward(DY).tobytes()  # from x, in evaluation
    with pytest.raises(ValueError, match="residual is given and save_memory is True"):
        layer.train()(images(3), residual=images(4))


# ---- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_bad_batches_are_guarded_in_every_way(options, in_place):
    bad = images(2)
    bad[3, 1] = np.nan
    for guard in ("raise", "skip"):
        layer = built(on_nonfinite=guard, **options)
        layer(images(0))
        layer(images(1))
        before, x = held(layer), bad.copy()
        if guard == "raise":
            with pytest.raises(ValueError, match="would become nan at channel 1"):
                layer(x, out=x if in_place else None)
            assert x.tobytes() == bad.tobytes() and held(layer) == before
        else:
            layer(x, out=x if in_place else None)
            after = held(layer)
            assert {name for name in after if after[name] != before[name]} == {"num_skipped"}


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_inference_lazy_layers_and_history_are_the_same(options):
    layer, plain = built(history=10, **options), built()
    x = images(0)
    layer.recalibrate([x])
    plain.recalibrate([x])
    assert layer.eval()(x).tobytes() == plain.eval()(x).tobytes()
    layer.train()(images(1))
    assert len(layer.history) == 1 and np.isfinite(layer.history.batch_var).all()
    lazy = BatchNorm(**options)
    lazy(x)
    assert lazy.num_features == C
    other = copy.deepcopy(lazy)
    assert repr(other) == repr(lazy) and held(other) == held(lazy)
    assert other(images(1)).tobytes() == lazy(images(1)).tobytes()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"renorm": 3}, TypeError, "renorm is 3 .*, expected True, None, or a mapping such as"),
        (
            {"renorm": {"rmix": 1}},
            ValueError,
            "renorm names 'rmix', expected names among rmin, rmax, dmax, d",
        ),
        ({"renorm": {"rmax": 0.5}}, ValueError, "rmax is 0.5, expected a number >= 1"),
        ({"renorm": {"dmax": "a"}}, TypeError, "dmax is 'a'"),
        ({"renorm": {"decay": 2}}, ValueError, "decay is 2.0, expected a number in"),
        ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size is 0, expected an int >= 1, or None"),
        ({"virtual_batch_size": 2.0}, TypeError, r"virtual_batch_size is 2.0 \(float\), expected an int"),
        ({"save_memory": 1}, TypeError, "save_memory is 1 .*, expected True or False"),
        (
            {"save_memory": True, "activation": "relu"},
            ValueError,
            "save_memory is True and activation is 'relu'",
        ),
        (
            {"renorm": True, "virtual_batch_size": 2},
            ValueError,
            "renorm and virtual_batch_size are given, which",
        ),
        ({"virtual_batch_size": 2, "save_memory": True}, ValueError, "exclude each other: drop one"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        BatchNorm(C, **options)
