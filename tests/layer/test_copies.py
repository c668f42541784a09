"""Copies of a layer that share or do not, statistics that go back, states, calls that change nothing."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
from batchnorm import BatchNorm, batch_norm_backward
from batchnorm.layer import Applied
from batchnorm.running import RunningStatistics

from support.checks import same_bits
from support.layers import C, everything, held, images, randomized, shaped, trained

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")]

OPTIONS = [
    {}, {"decay": None}, {"zero_debias": True, "activation": "relu"},
    {"warmup": True, "on_nonfinite": "skip"},
    {"renorm": {"rmax": 2.0, "decay": 0.5}}, {"virtual_batch_size": 2, "scale": False},
    {"keep": "y", "dtype": np.float64},
    {"name": "conv1.bn", "center": False, "eps": 1e-3},
]  # fmt: skip
EACH = pytest.mark.parametrize("options", OPTIONS, ids=str)
PARAMETERS, STATISTICS = ("gamma", "beta"), ("running_mean", "running_var", "renorm_mean", "renorm_std")
X, DY = images("x"), images("dy")


def built(steps=3, **options):
    return trained(steps, **{"zero_debias": False, **options})


def shared_arrays(one, two):
    names = (*PARAMETERS, *STATISTICS)
    pairs = ((n, getattr(one, n), getattr(two, n)) for n in names if getattr(one, n) is not None)
    return {name for name, a, b in pairs if np.shares_memory(a, b)}


# ---- clone -------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("share", [None, "params", "stats", ("params",), ("stats", "params"), ()])
def test_what_is_shared_is_the_same_array_and_the_rest_is_apart(share, options):
    layer = built(**options)
    layer.backward(images(9))
    other = layer.clone(share=share)
    assert held(other) == held(layer) and repr(other) == repr(layer) and other.settings == layer.settings
    params, stats = ("params" in (share or ())), ("stats" in (share or ()))
    there = {n for n in (*PARAMETERS, *STATISTICS) if getattr(layer, n) is not None}
    expected = {n for n in there if (n in PARAMETERS and params) or (n in STATISTICS and stats)}
    assert shared_arrays(layer, other) == expected and (other.running is layer.running) == stats
    assert (other.dgamma, other.dbeta) == (None, None)
    with pytest.raises(RuntimeError, match="before any forward"):
        other.backward(DY)
    before = held(layer)
    other(images(7))
    if stats:
        assert layer.running.num_updates == 4 and layer.running_mean.tobytes() == other.running_mean.tobytes()
    else:
        assert held(layer) == before
    same = built(4, **options) if share is None else None
    if same is not None:
        again = built(3, **options).clone()
        again(images(3))
        assert held(again) == held(same)


def test_the_gradient_of_a_residual_stays_with_its_layer():
    layer = built()
    layer(X, residual=DY)
    layer.backward(DY)
    assert layer.dresidual is not None and layer.clone().dresidual is None


def test_shared_statistics_are_known_to_both():
    layer = BatchNorm(C, zero_debias=True)
    other = layer.clone(share="stats")
    other(images(0))
    assert same_bits(layer.eval()(X), other.eval()(X))
    layer.load_state_dict(BatchNorm(C, zero_debias=True).state_dict())
    with pytest.raises(RuntimeError, match="never updated"):
        other(X)
    both = layer.clone(share=("params", "stats"))
    both.train()(X)
    assert layer(X).shape == X.shape and both.gamma is layer.gamma


def test_each_layer_has_its_own_settings_on_shared_statistics():
    layer = BatchNorm(C)
    other = layer.clone(share="stats")
    other.decay = 0.0
    other(X)
    np.testing.assert_allclose(layer.running_mean, X.mean((0, 2)), rtol=1e-6, atol=1e-6)
    layer(images(1))
    np.testing.assert_allclose(
        layer.running_mean, 0.9 * X.mean((0, 2)) + 0.1 * images(1).mean((0, 2)), rtol=1e-6, atol=1e-6
    )


def test_two_sets_of_statistics_on_shared_parameters():
    """Each set is what a layer of its own would have; gradients add up."""
    clean = BatchNorm(C, decay=None)
    noisy, alone = clean.clone(share="params"), BatchNorm(C, decay=None)
    for step in range(3):
        clean(images(step))
        noisy(images(step) * 5)
        alone(images(step) * 5)
    assert same_bits(noisy.running_var, alone.running_var) and not same_bits(
        noisy.running_var, clean.running_var
    )
    both = [layer.backward(images(5)) is not None and layer.dgamma for layer in (clean, noisy)]
    clean.gamma -= sum(both)
    assert noisy.gamma is clean.gamma


def test_what_share_may_be():
    for value, error in (
        ("all", ValueError),
        ("", ValueError),
        (True, TypeError),
        (1, TypeError),
        (("params", 1), TypeError),
    ):
        with pytest.raises(error, match=r"share is .*, expected None, 'params', 'stats' or a tuple of both"):
            trained().clone(share=value)
    lazy = BatchNorm(decay=0.5)
    assert repr(lazy.clone()) == repr(lazy)
    for share in ("params", "stats", ("params", "stats")):
        with pytest.raises(RuntimeError, match=r"clone\(share=.*\) needs the channel count"):
            lazy.clone(share=share)


def test_a_clone_records_its_own_history():
    layer = built(history=5)
    other = layer.clone()
    assert len(layer.history) == 3 and len(other.history) == 0 and other.history.limit == 5


# ---- pickle and copy ---------------------------------------------------------------------------------------


def copies(value):
    yield copy.deepcopy(value)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(value, protocol))


@EACH
def test_copies_are_whole_and_apart(options):
    layer = built(**options)
    layer(X)
    layer.backward(DY)
    for other in copies(layer.eval()):
        assert everything(other)["repr"] == repr(layer) and held(other) == held(layer)
        assert other.settings == layer.settings and other.training is False and other.name == layer.name
        for name in ("dgamma", "dbeta"):
            assert getattr(layer, name) is None or same_bits(getattr(other, name), getattr(layer, name))
        assert not shared_arrays(layer, other)
        before = everything(layer)
        assert same_bits(other(images(2)), copy.deepcopy(layer)(images(2)))
        other.train()(images(2))
        other.backward(DY)
        assert everything(layer) == before


def test_in_the_middle_of_a_step():
    layer = built()
    layer(X)
    with layer.no_update(), layer.using("batch"):
        for other in copies(layer):  # outside of both
            with pytest.raises(RuntimeError, match="before any forward"):
                other.backward(DY)
            other(X)
            assert other.running.num_updates == 5
    layer.backward(DY)


@pytest.mark.parametrize("axis", [-1, 0, (1, 2)])
def test_the_layout_survives(axis):
    x = images(0, shaped(axis) if isinstance(axis, int) else (6, 3, 2, 5))
    layer = BatchNorm(channel_axis=axis, zero_debias=True)
    layer(x)
    for other in copies(layer):
        assert same_bits(other(x), copy.deepcopy(layer)(x)) and other.channel_axis == axis


def test_copies_of_a_lazy_layer_are_lazy():
    for other in copies(BatchNorm(decay=0.5)):
        assert repr(other) == repr(BatchNorm(decay=0.5))
        other(X)
        assert other.num_features == C


@pytest.mark.parametrize("share", ["params", "stats"])
def test_sharing_survives_copies_of_both_together(share):
    layer = built()
    pair = [layer, layer.clone(share=share)]
    name, counter = ("gamma", 0) if share == "params" else ("running_mean", 1)
    for one, two in itertools.islice(copies(pair), 3):
        assert getattr(one, name) is getattr(two, name) is not getattr(layer, name)
        two(images(3))
        assert one.running.num_updates == 3 + counter
        one(images(3))
        assert one.running.num_updates == 4 + counter


class Named(BatchNorm):
    """A layer of a user, with a constructor of its own."""

    def __init__(self, block, *arguments, **options):
        super().__init__(*arguments, **options)
        self.block = block

    def __call__(self, x, **options):
        self.calls = getattr(self, "calls", 0) + 1
        return super().__call__(x, **options)


def test_subclasses_keep_their_own_attributes(tmp_path):
    layer = Named("first", activation="relu")
    layer(X)
    assert layer.calls == 1 and repr(layer).startswith("Named(4, decay=0.9, ")
    for other in itertools.chain(copies(layer), [layer.clone(), layer.clone(share="params")]):
        assert (type(other), other.block, other.running.num_updates) == (Named, "first", 1)
    layer.save(tmp_path / "layer")
    loaded = Named.load(tmp_path / "layer")  # whatever arguments the constructor takes
    assert type(loaded) is Named and held(loaded) == held(layer)
    with pytest.raises(AttributeError, match="has no attribute 'weight': it is called gamma here"):
        layer.weight  # noqa: B018


# ---- snapshots ---------------------------------------------------------------------------------------------


@EACH
def test_a_rejected_step_has_not_counted(options):
    layer = built(**options)
    before, arrays = held(layer), [id(layer.running_mean), id(layer.running_var), id(layer.renorm_std)]
    snapshot = layer.snapshot()
    assert type(snapshot) is RunningStatistics and snapshot is not layer.running
    for _ in range(2):  # a snapshot can be used again
        layer(images(8))
        layer(images(9), mask=images(9) > 1)
        assert held(layer) != before
        assert layer.rollback(snapshot) is layer and held(layer) == before
    assert [id(layer.running_mean), id(layer.running_var), id(layer.renorm_std)] == arrays
    layer(images(3))
    assert held(layer) == held(built(4, **options))
    assert repr(snapshot) == "RunningStatistics(4 channels, num_updates=3)"


def test_a_rollback_to_the_beginning_is_the_beginning():
    layer = BatchNorm(C)
    snapshot = layer.snapshot()
    for step in range(60):
        layer(images(step))
    layer(X, training=False)
    layer.rollback(snapshot)
    with pytest.raises(RuntimeError, match="never updated"):
        layer(X, training=False)


def test_a_rollback_leaves_parameters_and_backward_alone():
    layer, same = built(history=9), built()
    snapshot = layer.snapshot()
    layer(images(8))
    same(images(8))
    layer.rollback(snapshot)
    layer.gamma += 1
    assert same_bits(layer.backward(DY), same.backward(DY))
    layer(images(9))
    assert layer.history.steps.tolist() == [1, 2, 3, 4]


def test_snapshots_that_do_not_fit():
    layer = built()
    before = held(layer)
    for value in (None, {}, layer):
        with pytest.raises(TypeError, match=r"snapshot is .*, expected the result of bn.snapshot\(\)"):
            layer.rollback(value)
    for other in (BatchNorm(C + 1), BatchNorm(C, dtype=np.float64), BatchNorm(C, renorm={"decay": 0.5})):
        with pytest.raises(
            ValueError, match=r"snapshot has statistics of .*, expected statistics of shape \(4,\) of float32"
        ):
            layer.rollback(other.snapshot())
    with pytest.raises(ValueError, match="snapshot has statistics of an unknown channel count"):
        layer.rollback(RunningStatistics())
    assert held(layer) == before
    with pytest.raises(RuntimeError, match=r"rollback\(\) needs the channel count"):
        BatchNorm().rollback(layer.snapshot())


# ---- states ------------------------------------------------------------------------------------------------


@EACH
def test_a_loaded_layer_continues_bit_for_bit(options):
    layer, plain = (
        built(**options),
        {n: v for n, v in options.items() if n in ("activation", "scale", "center", "dtype")},
    )
    plain |= {"renorm": {"decay": 0.1}} if "renorm" in options else {}
    others = [
        make(**plain).load_state_dict(layer.state_dict())
        for make in (lambda **o: BatchNorm(C, **o), BatchNorm, built)
    ]
    for step in range(10, 13):
        x, dy = images(step), images(step + 10)
        y, dx = layer(x, mask=x > 0), layer.backward(dy)
        for parameter in layer.parameters():
            parameter.value -= 0.1 * parameter.grad
        for other in others:
            assert same_bits(other(x, mask=x > 0), y) and same_bits(other.backward(dy), dx)
            for parameter in other.parameters():
                parameter.value -= 0.1 * parameter.grad
            assert {**held(other), "name": 0} == {**held(layer), "name": 0}


def test_loading_drops_what_belongs_to_the_past():
    layer = built()
    _, saved = layer(X, return_saved=True)
    layer.backward(DY, saved)
    layer(X)
    arrays = [id(a) for a in (layer.gamma, layer.beta, layer.running_mean, layer.running_var, layer.running)]
    layer.load_state_dict(built(1).state_dict())
    assert [
        id(a) for a in (layer.gamma, layer.beta, layer.running_mean, layer.running_var, layer.running)
    ] == arrays
    assert (layer.dgamma, layer.dbeta, layer.running.num_updates) == (None, None, 1)
    with pytest.raises(RuntimeError, match="backward before any forward"):
        layer.backward(DY)


def test_a_state_may_hold_the_layers_own_arrays():
    layer = built()
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    layer.load_state_dict(
        layer.state_dict() | {"running_mean": layer.running_var, "running_var": np.abs(layer.running_mean)}
    )
    assert same_bits(layer.running_mean, var) and same_bits(layer.running_var, np.abs(mean))


# ---- apply: state in, new state out ------------------------------------------------------------------------


def bytes_of(state):
    return {name: value.tobytes() for name, value in state.items()}


@EACH
def test_a_chain_of_states_is_what_a_layer_goes_through(options):
    layer, still = (BatchNorm(C, **options) for _ in range(2))
    state, before = still.state_dict(), everything(still)
    for step in range(4):
        given = bytes_of(state)
        result = still.apply(state, images(step), mask=images(step) > 0)
        y, new = result
        assert type(result) is Applied and bytes_of(state) == given and everything(still) == before
        assert same_bits(y, layer(images(step), mask=images(step) > 0)) and bytes_of(new) == held_values(
            layer
        )
        dx, dgamma, dbeta = batch_norm_backward(DY, result.saved)
        assert same_bits(dx, layer.backward(DY))
        for got, want in ((dgamma, layer.dgamma), (dbeta, layer.dbeta)):
            assert got is None if want is None else same_bits(got, want)
        state = new
    y, new = still.apply(state, images(7), stats="running", update=False)
    assert bytes_of(new) == bytes_of(state) and same_bits(y, layer(images(7), stats="running", update=False))


def held_values(layer):
    return bytes_of(layer.state_dict())


def test_it_can_be_called_again_with_the_same_result():
    layer = BatchNorm(C, zero_debias=True)
    state = layer.state_dict()
    one, two = layer.apply(state, X), layer.apply(state, X)
    assert same_bits(one.y, two.y) and bytes_of(one.state) == bytes_of(two.state)
    one.state["gamma"][:] = 7
    assert (two.state["gamma"] == 1).all() and (layer.gamma == 1).all()
    assert same_bits(batch_norm_backward(DY, one.saved).dx, batch_norm_backward(DY, two.saved).dx)


def test_the_mode_is_that_of_the_layer():
    layer = BatchNorm(C, zero_debias=True)
    layer(images(0))
    state = layer.state_dict()
    y, new = layer.eval().apply(state, X)
    assert bytes_of(new) == bytes_of(state) and same_bits(y, layer(X))
    y, new = layer.train().freeze().apply(state, X)
    assert bytes_of(new) == bytes_of(state)
    lazy = BatchNorm(zero_debias=True)
    assert bytes_of(lazy.apply(state, X).state) == bytes_of(layer.unfreeze().apply(state, X).state)
    assert lazy.num_features is None


def test_errors_of_apply_change_nothing():
    layer = randomized(BatchNorm(C))
    state, before = layer.state_dict(), everything(layer)
    for arguments, options, error, match in (
        (({}, X), {}, ValueError, "the state has no names"),
        ((state, X[:, :2]), {}, ValueError, "x has 2 channels"),
        ((state, X), {"training": False}, RuntimeError, "never updated"),
        ((state, X), {"out": X.copy()}, TypeError, r"apply\(\) has no argument 'out'"),
        ((state, X), {"return_saved": True}, TypeError, r"apply\(\) has no argument 'return_saved'"),
        ((state, X), {"updates": True}, TypeError, "updates"),
    ):
        with pytest.raises(error, match=match):
            layer.apply(*arguments, **options)
    assert everything(layer) == before


# ---- new statistics: by way of diagnose --------------------------------------------------------------------


def test_recalibrate_takes_batches_and_moments():
    from batchnorm import Moments

    mask = X > 0
    layer = built(name="bn", renorm={"decay": 0.5})
    assert layer.recalibrate(Moments().update(X, mask=mask)) is layer
    want = np.where(mask, X, 0).sum((0, 2), dtype=np.float64) / mask.sum((0, 2))
    np.testing.assert_allclose(layer.running_mean, want, rtol=1e-6)
    np.testing.assert_allclose(layer.renorm_mean, want, rtol=1e-6)
    np.testing.assert_array_equal(layer.running.num_values, mask.sum((0, 2)))
    assert not layer.running.initial_weight.any() and layer.running.num_updates == 1
    with layer.recalibrating() as inside:
        assert inside is layer
        layer(X, mask=mask, training=False)
    np.testing.assert_allclose(layer.running_mean, want, rtol=1e-6)
    before = everything(layer)
    with pytest.raises(ValueError, match="bn: batches hold no values"), layer.recalibrating():
        pass
    for bad in ([X * np.float32(np.nan)], [X[:, :2]], 3, X):
        with pytest.raises((TypeError, ValueError)):
            layer.recalibrate(bad)
    with pytest.raises(TypeError, match="group is 3"):
        layer.recalibrate([X], group=3)
    assert everything(layer) == before


def test_report_and_diagnose_are_there():
    layer = built(zero_debias=True, name="bn")
    assert layer.report().codes == ("fine",) and BatchNorm().report().codes == ("never_updated",)
    found = layer.diagnose(X + 100, mask=X > 0)
    assert "mismatched" in found.codes and found.findings[0].layer == "bn"
