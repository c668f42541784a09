"""Calls of a layer are those of the functions, bit for bit, whatever its options, modes and arguments."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm, batch_norm, batch_norm_backward, batch_norm_train

from support.checks import all_same_bits, same_bits
from support.layers import C, everything, held, images, randomized, shaped, trained

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")]

X, DY, Z = images("x"), images("dy"), images("z")
RNG = np.random.default_rng(7)
POSITIONS = {
    "all": {},
    "mask": {"mask": RNG.random((6, 5)) < 0.7},
    "mask per channel": {"mask": RNG.random(X.shape) < 0.7},
    "lengths": {"lengths": np.array([5, 3, 1, 0, 4, 2])},
    "lengths along": {"lengths": np.array([5, 3, 1, 0, 4, 2]), "lengths_axis": 2},
    "weights": {"weights": np.array([1.5, 0.25, 2, 0, 1, 3])},
    "mask and weights": {"mask": RNG.random((6, 5)) < 0.7, "weights": np.array([1, 2, 0, 3, 1, 1])},
}
OPTIONS = [
    {}, {"scale": False}, {"center": False}, {"scale": False, "center": False}, {"channel_axis": -1},
    {"decay": 0.5, "eps": 1e-3, "running_ddof": 0, "activation": "relu"}, {"channel_axis": 0},
    {"data_format": "NHWC"}, {"data_format": "NCHW"}, {"data_format": "channels_last"},
    {"activation": "leaky_relu", "slope": 0.25, "keep": "y"}, {"virtual_batch_size": 2},
    {"on_nonfinite": "raise"},
]  # fmt: skip


def where_of(options):
    return {name: options[name] for name in ("channel_axis", "data_format") if name in options}


class ByHand:
    """What a layer does, said with the functions: settings, arrays and counters of its own."""

    def __init__(self, layer: BatchNorm) -> None:
        s = layer.settings
        self.layer, self.s = layer, s
        self.mean, self.var = layer.running_mean.copy(), layer.running_var.copy()
        self.reference = None
        if s.renorm and s.renorm["decay"] is not None:
            self.reference = np.zeros_like(self.mean), np.ones_like(self.var)
        self.updates, self.seen = 0, np.zeros(C)

    def __call__(self, x, **call):
        """y, saved of a training call."""
        s, layer = self.s, self.layer
        where = {"channel_axis": s.channel_axis} if s.data_format is None else {"data_format": s.data_format}
        decay = s.decay
        if s.warmup or s.zero_debias:
            decay = batchnorm.effective_decay(
                s.decay, updates=self.updates, warmup=s.warmup, zero_debias=s.zero_debias
            )
        options = {"decay": decay, "running_ddof": s.running_ddof, "on_nonfinite": s.on_nonfinite}
        if decay is None:
            options["seen"] = self.seen
        renorm = None
        if s.renorm is not None:
            renorm = {name: s.renorm[name] for name in ("rmin", "rmax", "dmax")}
            if self.reference is not None:
                if not self.updates:  # plainly: this batch becomes the reference
                    renorm = {"rmin": 1.0, "rmax": 1.0, "dmax": 0.0}
                renorm |= {"mean": self.reference[0], "std": self.reference[1]}
                renorm["decay"] = s.renorm["decay"] if self.updates else 0.0
            elif not self.updates:
                renorm = None
        y, saved = batch_norm_train(
            x, layer.gamma, layer.beta, running_mean=self.mean, running_var=self.var, eps=s.eps,
            renorm=renorm,
            activation=s.activation, slope=s.slope, virtual_batch_size=s.virtual_batch_size, keep=s.keep,
            **where, **options, **call,
        )  # fmt: skip
        self.updates += 1
        least = s.running_ddof if "weights" in call else 1
        self.seen = self.seen + np.where(saved.count > least, saved.count, 0).reshape(-1, C).sum(axis=0)
        return y, saved

    def agrees(self) -> bool:
        own = (self.mean, self.var, *(self.reference or ()))
        names = ("running_mean", "running_var", "renorm_mean", "renorm_std")
        return all_same_bits(own, [getattr(self.layer, name) for name in names[: len(own)]])


# ---- the functions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_and_eval_are_those_of_the_functions(options, dtype):
    layer = randomized(BatchNorm(C, dtype=dtype, **options))
    hand, s = ByHand(layer), layer.settings
    for step in range(3):
        x, dy = (
            images(step, shaped(layer.channel_axis), dtype),
            images(step + 9, shaped(layer.channel_axis), dtype),
        )
        y, saved = hand(x)
        assert same_bits(layer(x), y) and hand.agrees()
        assert same_bits(layer(x, training=False), batch_norm(
            x, hand.mean, hand.var, layer.gamma, layer.beta, eps=s.eps, activation=s.activation,
            slope=s.slope,
            **where_of(options),
        ))  # fmt: skip
        assert layer.running.num_updates == step + 1
        layer(x, update=False)
        want = batch_norm_backward(dy, saved)
        got = layer.backward(dy), layer.dgamma, layer.dbeta
        for mine, its in zip(got, want, strict=True):
            assert mine is None if its is None else same_bits(mine, its)
        assert (layer.dgamma is not None, layer.dbeta is not None) == (layer.scale, layer.center)


SCHEDULES = [{}, {"decay": None}, {"warmup": True}, {"zero_debias": True, "decay": 0.75}]
WAYS = [
    {}, {"renorm": {"rmin": 0.5, "rmax": 2.0, "dmax": 0.75}}, {"renorm": {"rmax": 2.0, "decay": 0.5}},
    {"virtual_batch_size": 4}, {"virtual_batch_size": 2, "renorm": {"rmax": 2.0, "decay": 0.5}},
    {"keep": "y"}, {"keep": "y", "virtual_batch_size": 3, "renorm": True},
]  # fmt: skip
TAILS = [
    {},
    {"activation": "relu"},
    {"activation": "silu", "residual": Z},
    {"activation": "leaky_relu"},
    {"residual": Z},
]


@pytest.mark.parametrize("guard", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_everything_together_is_that_of_the_functions(positions, way, guard):
    given = POSITIONS[positions]
    for schedule, tail in itertools.product(SCHEDULES, TAILS):
        residual = tail.get("residual")
        if way.get("keep") == "y" and (
            residual is not None or tail.get("activation") not in (None, "leaky_relu")
        ):
            continue  # y does not tell x there
        options = {**schedule, **way, "on_nonfinite": guard, "activation": tail.get("activation")}
        layer = randomized(BatchNorm(C, **options))
        hand = ByHand(layer)
        for step in range(3):
            x, out = images(step), np.empty_like(X)
            y, saved = hand(x, residual=residual, **given)
            assert layer(x, residual=residual, out=out, **given) is out and same_bits(out, y), options
            want = batch_norm_backward(DY, saved)
            assert same_bits(layer.backward(DY), want.dx), options
            assert same_bits(layer.dgamma, want.dgamma) and same_bits(layer.dbeta, want.dbeta)
            assert layer.dresidual is None if residual is None else same_bits(layer.dresidual, want.dresidual)
            assert hand.agrees(), options
        np.testing.assert_array_equal(layer.running.num_values, hand.seen)
        assert layer.running.num_updates == 3 and (layer.running.missed_updates == 0).all()


@pytest.mark.parametrize("own", [{}, {"decay": 0.5}], ids=["running pair", "own reference"])
def test_renorm_without_an_update_changes_nothing(own):
    layer = randomized(BatchNorm(C, zero_debias=True, renorm={"rmin": 0.5, "rmax": 2.0, "dmax": 0.75, **own}))
    layer(images(0))
    before, other = held(layer), layer.clone()
    y = layer(images(1), update=False)
    assert held(layer) == before and same_bits(y, other(images(1)))
    assert not same_bits(y, batch_norm_train(images(1), layer.gamma, layer.beta).y)
    layer(images(1), stats="running", update=True)  # normalises plainly, but the reference moves as well
    assert held(layer) == held(other)


def test_unlimited_renorm_is_inference():
    layer = randomized(BatchNorm(C, renorm=True, zero_debias=True))
    for step in range(3):
        layer(images(step))
    expected = layer(images(3), training=False)
    np.testing.assert_allclose(layer(images(3)), expected, rtol=1e-4, atol=1e-5)
    layer.renorm = {"rmin": 1, "rmax": 1, "dmax": 0}
    plain = batch_norm_train(images(4), layer.gamma, layer.beta).y
    np.testing.assert_allclose(layer(images(4)), plain, rtol=1e-6, atol=1e-6)


def test_several_channel_axes():
    x, dy = images(0, (6, 3, 2, 5)), images(1, (6, 3, 2, 5))
    options = {"channel_axis": (1, 2), "activation": "relu"}
    layer, lazy = randomized(BatchNorm((3, 2), **options)), BatchNorm(**options)
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    y, saved = batch_norm_train(x, layer.gamma, layer.beta, running_mean=mean, running_var=var, **options)
    assert same_bits(layer(x), y) and same_bits(layer.running_var, var) and mean.shape == (3, 2)
    want = batch_norm_backward(dy, saved)
    assert same_bits(layer.backward(dy), want.dx) and same_bits(layer.dgamma, want.dgamma)
    lazy(x)
    assert lazy.num_features == (3, 2) == lazy.gamma.shape and lazy.running.num_values.shape == (3, 2)
    assert same_bits(lazy.running_mean, layer.running_mean)
    with pytest.raises(ValueError, match=r"x has 3 x 5 channels on axis \(1, 2\) .* expected 3 x 2"):
        layer(images(0, (6, 3, 5, 2)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_x_may_have_another_dtype_than_the_layer(dtype):
    for own in (np.float32, np.float64):
        layer = BatchNorm(C, dtype=own)
        y = layer(images(dtype=dtype))
        assert y.dtype == dtype and layer.running_mean.dtype == own
        assert layer.backward(y).dtype == dtype and layer.dgamma.dtype == own


def test_images_of_integers_in_eval():
    x = np.random.default_rng(0).integers(0, 256, (5, C, 3, 3)).astype(np.uint8)
    layer = BatchNorm(C).recalibrate([x]).eval()
    want = batch_norm(x, layer.running_mean, layer.running_var, layer.gamma, layer.beta)
    assert same_bits(layer(x), want) and want.dtype == np.float32
    with pytest.raises(TypeError, match="x has dtype uint8"):
        layer.train()(x)


def test_scale_shift_and_fold_are_the_call_in_eval_mode():
    weight, bias = images("weight", (C, 3), np.float64), images("bias", (C,), np.float64)
    x = images("rows", (9, 3), np.float64)
    h = x @ weight.T + bias
    layer = randomized(BatchNorm(C, dtype=np.float64, activation="relu", name="bn")).recalibrate([h]).eval()
    scale, shift = layer.scale_shift()
    assert scale.dtype == shift.dtype == np.float64 and scale.shape == (C,)
    np.testing.assert_allclose(np.maximum(h * scale + shift, 0), layer(h), rtol=1e-12, atol=1e-12)
    folded, offset = layer.fold(weight, bias, out_axis=0, activation="relu")
    np.testing.assert_allclose(np.maximum(x @ folded.T + offset, 0), layer(h), rtol=1e-12, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"activation is None, expected that of this layer, 'relu': it says that"
    ):
        layer.fold(weight, bias, out_axis=0)
    with pytest.raises(RuntimeError, match="never updated"):
        BatchNorm(C).fold(weight, bias, out_axis=0)
    for missing in (
        BatchNorm(C, scale=False),
        BatchNorm(C, center=False),
        BatchNorm(C, scale=False, center=False),
    ):
        missing.recalibrate([X]).eval()
        scale, shift = missing.scale_shift()
        np.testing.assert_allclose(X * scale[:, None] + shift[:, None], missing(X), rtol=1e-5, atol=1e-5)


# ---- which statistics, and whether they are updated --------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("stats", [None, "batch", "running"])
@pytest.mark.parametrize("update", [None, True, False, np.True_])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"virtual_batch_size": 2}], ids=str)
def test_statistics_and_update_are_independent(stats, update, mode, options):
    for training, positions in itertools.product((None, True, np.False_), POSITIONS.values()):
        layer = trained(**options).train(mode)
        before, moved = held(layer), layer.clone()
        learning = mode if training is None else bool(training)
        batch = learning if stats is None else stats == "batch"
        counting = {name: value for name, value in positions.items() if name != "weights"}
        running, common = (layer.running_mean, layer.running_var), {"activation": layer.activation}
        parameters = layer.gamma, layer.beta
        if batch:
            parts = {"virtual_batch_size": layer.virtual_batch_size}
            want = batch_norm_train(X, *parameters, **common, **parts, **positions).y
        else:  # the statistics before the update
            want = batch_norm(X, *(v.copy() for v in running), *parameters, **common, **counting)
        moved(X, training=True, **positions)
        assert same_bits(layer(X, training=training, stats=stats, update=update, **positions), want)
        assert held(layer) == (held(moved) if (learning if update is None else update) else before)
        assert layer.training is mode


def test_the_mode_decides_what_a_call_does():
    layer, x = BatchNorm(C, allow_initial_statistics=True), images()
    assert layer.eval() is layer and layer.training is False
    assert same_bits(layer(x), batch_norm(x, np.zeros(C, "f4"), np.ones(C, "f4"), layer.gamma, layer.beta))
    assert layer.running.num_updates == 0
    y = layer(x, training=True)  # for this call only
    assert layer.training is False and layer.running.num_updates == 1
    assert layer.train() is layer and layer.training is True
    assert same_bits(layer(x), y) and layer.running.num_updates == 2
    layer(x, training=np.False_)
    assert layer.running.num_updates == 2
    assert layer.train(False).training is False and layer.train(np.True_).training is True


@pytest.mark.parametrize("value", [1, 0, "False", "train", 1.0, [True], np.array(True)])
def test_flags_are_bools(value):
    layer = trained()
    before = everything(layer)
    for name in ("training", "update"):
        with pytest.raises(TypeError, match=f"{name} is .*, expected True or False"):
            layer(X, **{name: value})
    with pytest.raises(TypeError, match=r"mode is .*, expected True or False"):
        layer.train(value)
    with pytest.raises(TypeError, match=r"parameters is .*, expected True or False"):
        layer.freeze(parameters=value)
    assert everything(layer) == before


@pytest.mark.parametrize("value", ["Batch", "", "eval", True, 1, b"batch"])
def test_stats_is_one_of_two_words(value):
    with pytest.raises(
        ValueError if isinstance(value, str) else TypeError, match=r"stats is .*, expected 'batch' or 'run"
    ):
        trained()(X, stats=value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_eval_never_writes(dtype, activation):
    layer = trained(dtype=dtype, activation=activation).eval()
    for array in (*layer.buffers().values(), layer.gamma, layer.beta):
        array.flags.writeable = False  # a write would be an error, too
    before, nan = everything(layer), images()
    nan[0, 0] = np.nan
    for x in (images(7), images(8, (1, C)), np.zeros((0, C), "f4"), images(9, (3, C, 4, 2), np.float64), nan):
        y = layer(x)
        layer(x, out=y, training=False)
        layer(x, return_saved=True)
        assert everything(layer) == before
    y, saved = layer(X, return_saved=True)
    layer.backward(DY, saved)
    assert held(layer) == before["state"]


@pytest.mark.parametrize(
    ("shape", "axis"), [((37, C), 1), ((9, C, 7), 1), ((6, C, 5, 3), 1), ((6, 5, 3, C), -1)]
)
def test_a_row_in_eval_does_not_depend_on_its_batch(shape, axis):
    layer = trained().eval()
    layer = BatchNorm(C, channel_axis=axis, zero_debias=True).load_state_dict(layer.state_dict()).eval()
    x = images(3, shape)
    y = layer(x)
    for i in range(len(x)):
        assert same_bits(layer(x[i : i + 1])[0], y[i]) and same_bits(layer(x[i:])[0], y[i])
    assert same_bits(layer(x[::-1])[::-1], y)


@pytest.mark.parametrize("shape", [(0, C), (0, C, 3), (4, C, 0)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_an_empty_batch_counts_for_nothing(shape, schedule):
    layer = trained(**{"zero_debias": False, **schedule})
    before = held(layer)
    x = np.empty(shape, np.float32)
    for how in ({}, {"training": False}, {"stats": "running", "update": True}):
        y, saved = layer(x, return_saved=True, **how)
        assert y.shape == layer.backward(x, saved, accumulate=False).shape == shape
        assert not layer.dgamma.any() and not layer.dbeta.any() and layer.dgamma.shape == (C,)
    assert held(layer) == before


def test_nothing_counts():
    layer = BatchNorm(C, on_nonfinite="raise")
    before = held(layer)
    assert not layer(X, mask=np.zeros((6, 5), bool)).any() and held(layer) == before
    assert not layer.backward(DY).any() and not layer.dgamma.any()


def test_one_value_per_channel():
    layer = trained()
    before = everything(layer)
    with pytest.raises(ValueError, match="one value per channel"):
        layer(images(0, (1, C)))
    assert everything(layer) == before
    layer(images(0, (1, C)), training=False)
    layer(images(0, (1, C)), stats="running", update=True)  # nothing to learn from one value
    assert held(layer) == before["state"]


@pytest.mark.parametrize("training", [True, False])
def test_out_receives_the_result(training):
    layer, x, z = trained(), images(), Z.copy()
    expected, out = layer.clone()(x, training=training), np.empty_like(x)
    assert layer.clone()(x, training=training, out=out) is out and same_bits(out, expected)
    expected = layer.clone()(x, training=training, residual=Z)
    assert layer.clone()(x, training=training, residual=z, out=z) is z and same_bits(z, expected)
    expected = layer.clone()(x.copy(), training=training)
    assert layer.clone()(x, training=training, out=x) is x and same_bits(x, expected)


# ---- gamma and beta of the call ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(), (6,)], ids=["C", "NC"])
@pytest.mark.parametrize(
    "options", [{}, {"renorm": True}, {"virtual_batch_size": 2, "activation": "relu"}], ids=str
)
def test_scale_and_shift_may_come_with_the_call(options, rows):
    layer = BatchNorm(C, scale=False, center=False, zero_debias=True, **options)
    rng = np.random.default_rng(0)
    gamma, beta = rng.normal(1, 0.5, (*rows, C)), rng.normal(size=(*rows, C)).astype(np.float32)
    hand = ByHand(layer)
    for step in range(3):
        x = images(step)
        batch, keywords = hand.mean.copy(), {}
        hand.layer = type("Given", (), {"gamma": gamma, "beta": beta, "running_mean": None})
        y, saved = hand(x)
        hand.layer = layer
        assert (
            same_bits(layer(x, gamma=gamma, beta=beta), y)
            and hand.agrees()
            and not same_bits(batch, hand.mean)
        )
        want = batch_norm_backward(DY, saved)
        assert same_bits(layer.backward(DY), want.dx)
        assert same_bits(layer.dgamma, want.dgamma) and layer.dgamma.shape == gamma.shape
        assert same_bits(layer.dbeta, want.dbeta) and layer.dbeta.dtype == np.float32
        want = batch_norm(X, hand.mean, hand.var, gamma, beta, activation=layer.activation)
        assert same_bits(layer(X, training=False, gamma=gamma, beta=beta), want)
    assert layer.parameters() == [] and "gamma" not in layer.state_dict() and not keywords


def test_one_of_them_alone():
    layer = trained(scale=False)
    gamma = np.full(C, 2.0)
    want = batch_norm_train(X, gamma, layer.beta)
    assert same_bits(layer(X, gamma=gamma), want.y)
    layer.backward(DY)
    assert same_bits(layer.dgamma, batch_norm_backward(DY, want.saved).dgamma) and layer.dbeta is not None


@pytest.mark.parametrize(("name", "option"), [("gamma", "scale"), ("beta", "center")])
def test_a_layer_that_has_its_own_takes_none(name, option):
    layer = trained()
    before = everything(layer)
    with pytest.raises(
        ValueError, match=f"{name} is given and the layer has its own: build it with {option}=False"
    ):
        layer(X, **{name: np.ones(C)})
    assert everything(layer) == before


# ---- freezing and contexts ---------------------------------------------------------------------------------


def test_a_frozen_layer_survives_train():
    layer = trained(activation="relu")
    before, running = held(layer), (layer.running_mean, layer.running_var)
    want = batch_norm(X, *running, layer.gamma, layer.beta, activation="relu")
    assert layer.freeze() is layer and layer.frozen
    for call in (
        lambda: layer(X), lambda: layer.train()(X), lambda: layer(X, training=True), lambda: layer.eval()(X),
        lambda: layer.train(True)(X, update=False),
    ):  # fmt: skip
        assert same_bits(call(), want) and held(layer) == before
    by_batch = batch_norm_train(X, layer.gamma, layer.beta, activation="relu")
    assert same_bits(layer(X, stats="batch"), by_batch.y) and held(layer) == before  # the call has its way
    with pytest.raises(ValueError, match=r"update is True and the layer is frozen: .* unfreeze\(\)"):
        layer(X, update=True)
    assert layer.unfreeze() is layer and not layer.frozen
    assert same_bits(layer(X), by_batch.y) and layer.running.num_updates == 4


def test_a_frozen_layer_can_be_trained_around():
    layer = trained(virtual_batch_size=2, renorm=True).freeze()  # neither parts nor renorm then
    y, saved = batch_norm_train(X, layer.gamma, layer.beta, mean=layer.running_mean, var=layer.running_var)
    assert same_bits(layer(X), y)
    want = batch_norm_backward(DY, saved)
    assert same_bits(layer.backward(DY), want.dx) and same_bits(layer.dgamma, want.dgamma)
    assert [p.name for p in layer.parameters()] == ["gamma", "beta"]


def test_parameters_can_be_frozen_too():
    layer, other = trained().freeze(parameters=True), trained().freeze()
    layer(X)
    other(X)
    assert same_bits(layer.backward(DY), other.backward(DY))
    assert (layer.dgamma, layer.dbeta, layer.parameters()) == (None, None, [])
    layer(X, residual=Z)
    layer.backward(DY)
    assert layer.dresidual is not None and layer.dgamma is None
    layer.unfreeze()(X)
    layer.backward(DY)
    assert layer.dgamma is not None and len(layer.parameters()) == 2
    mixed = trained(scale=False).freeze(parameters=True)  # gamma is none of its own
    mixed(X, gamma=np.full(C, 2.0))
    mixed.backward(DY)
    assert mixed.dgamma is not None and mixed.dbeta is None
    assert trained().freeze(parameters=True).freeze().parameters() != []


def test_a_frozen_layer_stays_frozen_in_copies_but_not_in_a_state():
    layer = trained().freeze(parameters=True)
    for other in (copy.deepcopy(layer), layer.clone()):
        assert other.frozen and other.parameters() == [] and repr(other) == repr(layer)
    assert not BatchNorm(C).load_state_dict(layer.state_dict()).frozen


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_no_update(schedule):
    options = {"zero_debias": False, **schedule}
    layer, same = trained(**options), trained(**options)
    before = held(layer)
    with layer.no_update() as inside:
        assert inside is layer
        y = layer(X)
        dx = layer.backward(DY)
        with layer.no_update():
            layer(images(6))
        layer(images(6), stats="running")
        with pytest.raises(ValueError, match=r"update is True inside no_update\(\): drop one"):
            layer(X, update=True)
        for other in (copy.deepcopy(layer), layer.clone()):  # not inside
            other(X)
            assert other.running.num_updates == 4
    assert held(layer) == before
    assert same_bits(y, same(X)) and same_bits(dx, same.backward(DY))
    layer(X)
    assert held(layer) == held(same)
    with pytest.raises(ZeroDivisionError), layer.no_update():
        raise ZeroDivisionError
    layer(X)
    assert layer.running.num_updates == 5


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("stats", ["batch", "running"])
def test_using_overrides_modes_and_arguments(stats, mode):
    layer = trained(renorm={"rmax": 2.0}).train(mode)
    before, seen = held(layer), []

    def observe(x, **positions):
        seen.append((x.copy(), positions))
        return lambda: seen.append("done")

    if stats == "batch":
        want = batch_norm_train(X, layer.gamma, layer.beta).y  # plainly, though the layer has renorm
    else:
        want = batch_norm(X, layer.running_mean, layer.running_var, layer.gamma, layer.beta)
    with layer.using(stats, observe) as inside:
        assert inside is layer
        for how in ({}, {"training": not mode}, {"stats": "batch"}, {"stats": "running"}, {"update": False}):
            x = X.copy()
            assert same_bits(layer(x, out=x, **how), want)  # observed before it is overwritten
            (observed, positions), done = seen
            assert same_bits(observed, X) and done == "done"
            assert positions == {"mask": None, "lengths": None, "lengths_axis": None, "weights": None}
            seen.clear()
        with pytest.raises(ValueError, match=r"update is True inside recalibrating\(\)"):
            layer(X, update=True)
        with pytest.raises(RuntimeError, match="inside another one of the same layer"):
            layer.using("batch")
        with pytest.raises(ValueError, match="residual"):
            layer(X, residual=Z[:2])
        assert "done" not in seen  # a failed call is not counted
        assert layer.clone().running is not layer.running
        layer.clone()(X)
        layer(X, mask=POSITIONS["mask"]["mask"])
        assert seen[-2][1]["mask"] is POSITIONS["mask"]["mask"]
    assert held(layer) == before and layer.training is mode
    with pytest.raises(ValueError, match="stats is 'eval'"):
        layer.using("eval")
    with BatchNorm(C).using("running"):  # neither error nor warning: they are taken as they are
        pass
    with (new := BatchNorm(C)).using("running"):
        assert same_bits(new(X), batch_norm(X, np.zeros(C), np.ones(C)))


# ---- what a call keeps alive -------------------------------------------------------------------------------


def gone(reference):
    gc.collect()
    return reference() is None


@pytest.mark.parametrize("how", [{}, {"stats": "running"}], ids=str)
def test_only_the_last_input_is_kept_alive_until_its_backward(how):
    layer, x = trained(), images()
    layer(x, **how)
    reference = weakref.ref(x)
    del x
    assert not gone(reference)
    layer(images(1))
    assert gone(reference)
    x = images(2)
    reference = weakref.ref(x)
    layer(x)
    del x
    layer.backward(DY)
    assert gone(reference)


def test_nothing_is_kept_alive_by_eval_calls_and_by_a_layer_that_is_gone():
    for how in ({"training": False}, {"training": False, "stats": "batch"}):
        layer, x = trained(), images()
        layer(images(1))
        layer(x, **how)
        reference = weakref.ref(x)
        del x
        assert gone(reference)
    gc.disable()
    try:
        x = images()
        reference = weakref.ref(x)
        layer(x)
        del x, layer
        assert reference() is None  # without the cyclic collector
    finally:
        gc.enable()


def test_many_threads_may_share_a_layer_in_eval_mode():
    layer = trained().eval()
    inputs = [images(seed, (3 + seed % 5, C, 4)) for seed in range(8)]
    expected = [layer(x).tobytes() for x in inputs]
    before, wrong = held(layer), []

    def work(index):
        for _ in range(100):
            if layer(inputs[index]).tobytes() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and held(layer) == before
