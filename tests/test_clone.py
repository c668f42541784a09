"""Copies of a layer that share parameters or statistics, and statistics that go back."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from batchnorm import BatchNorm

C = 4
SCHEDULES = [{}, {"decay": None}, {"zero_debias": True}, {"warmup": True, "on_nonfinite": "skip"}]
VECTORS = ("gamma", "beta", "running_mean", "running_var")


def images(seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(1, 2, (6, C, 5)).astype(dtype)


def trained(steps=3, **options):
    layer = BatchNorm(C, **options)
    for step in range(steps):
        layer(images(step))
    return layer


def held(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
@pytest.mark.parametrize("share", [None, "params", "stats"])
def test_what_is_shared_is_the_same_array_and_the_rest_is_apart(share, options):
    layer = trained(**options)
    layer.backward(images(9))
    other = layer.clone(share=share)
    assert held(other) == held(layer) and repr(other) == repr(layer)
    shared = {None: (), "params": VECTORS[:2], "stats": VECTORS[2:]}[share]
    for name in VECTORS:
        assert np.shares_memory(getattr(layer, name), getattr(other, name)) == (name in shared)
    assert (other.dgamma, other.dbeta) == (None, None)
    with pytest.raises(RuntimeError, match="before any forward"):
        other.backward(images(0))
    before = held(layer)
    other(images(7))
    assert held(layer) == (held(other) if share == "stats" else before)
    reference = trained(4, **options)  # three batches, and one more: with shared statistics through any layer
    if share == "stats":
        last = trained(3, **options)
        last(images(7))
        assert last.running_mean.tobytes() == layer.running_mean.tobytes()
        assert (layer.num_updates, layer.num_samples) == (reference.num_updates, reference.num_samples)


def test_shared_statistics_are_known_to_both():
    layer = BatchNorm(C, zero_debias=True)
    other = layer.clone(share="stats")
    other(images(0))
    assert layer.eval()(images(1)).tobytes() == other.eval()(images(1)).tobytes()
    layer.load_state_dict(BatchNorm(C, zero_debias=True).state_dict())
    with pytest.raises(RuntimeError, match="initial"):
        other(images(1))


def test_two_sets_of_statistics_on_shared_parameters():
    """Each set is what a layer of its own would have; gradients add up."""
    clean = BatchNorm(C, decay=None)
    noisy = clean.clone(share="params")
    alone = BatchNorm(C, decay=None)
    for step in range(3):
        clean(images(step))
        noisy(images(step) * 5)
        alone(images(step) * 5)
    assert noisy.running_var.tobytes() == alone.running_var.tobytes()
    assert not np.array_equal(noisy.running_var, clean.running_var)
    both = [layer.backward(images(5)) is not None and layer.dgamma for layer in (clean, noisy)]
    clean.gamma -= sum(both)
    assert noisy.gamma is clean.gamma


@pytest.mark.parametrize("share", ["params", "stats"])
def test_sharing_survives_copies_of_both_together(share):
    layer = trained()
    pair = [layer, layer.clone(share=share)]
    name, counter = ("gamma", 0) if share == "params" else ("running_mean", 1)
    for one, two in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert getattr(one, name) is getattr(two, name) is not getattr(layer, name)
        two(images(3))
        assert one.num_updates == 3 + counter


def test_what_share_may_be():
    for value, error in (("all", ValueError), ("", ValueError), (True, TypeError), (1, TypeError)):
        with pytest.raises(error, match=r"share is .*, expected None, 'params' or 'stats'"):
            trained().clone(share=value)
    lazy = BatchNorm(decay=0.5)
    assert repr(lazy.clone()) == repr(lazy)
    for share in ("params", "stats"):
        with pytest.raises(RuntimeError, match=r"clone\(share='\w+'\) needs the channel count"):
            lazy.clone(share=share)


def test_a_subclass_is_cloned_with_its_attributes():
    class Named(BatchNorm):
        pass

    layer = Named(C)
    layer.name = "first"
    other = layer.clone(share="params")
    assert type(other) is Named and other.name == "first" and other.gamma is layer.gamma


# ---- snapshots ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_a_rejected_step_has_not_counted(options):
    layer = trained(**options)
    before, arrays = held(layer), [id(layer.running_mean), id(layer.running_var)]
    snapshot = layer.snapshot()
    for _ in range(2):  # a snapshot can be used again
        layer(images(8))
        layer(images(9))
        assert held(layer) != before
        assert layer.rollback(snapshot) is layer
        assert held(layer) == before
    assert [id(layer.running_mean), id(layer.running_var)] == arrays
    layer(images(3))
    assert held(layer) == held(trained(4, **options))
    assert repr(snapshot) == "Snapshot(4 channels, num_updates=3)"


def test_a_rollback_to_the_beginning_is_the_beginning():
    layer = BatchNorm(C)
    snapshot = layer.snapshot()
    for step in range(60):
        layer(images(step))
    layer(images(0), training=False)
    layer.rollback(snapshot)
    with pytest.raises(RuntimeError, match="initial"):
        layer(images(0), training=False)


def test_a_rollback_leaves_parameters_and_backward_alone():
    layer = trained()
    snapshot = layer.snapshot()
    layer(images(8))
    layer.gamma += 1
    expected = layer.backward(images(9))
    layer.rollback(snapshot)
    assert (layer.gamma == 2).all()
    assert layer.backward(images(9)).tobytes() == expected.tobytes()


def test_snapshots_that_do_not_fit():
    layer = trained()
    before = held(layer)
    for value in (None, {}, layer):
        with pytest.raises(TypeError, match=r"snapshot is .*, expected the result of bn.snapshot\(\)"):
            layer.rollback(value)
    for other in (BatchNorm(C + 1), BatchNorm(C, dtype=np.float64)):
        with pytest.raises(ValueError, match="expected running_mean, running_var of 4 of float32: it is"):
            layer.rollback(other.snapshot())
    assert held(layer) == before
    for call in (BatchNorm().snapshot, lambda: BatchNorm().rollback(layer.snapshot())):
        with pytest.raises(RuntimeError, match="needs the channel count"):
            call()


# ---- forwards that do not count ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_no_update(options):
    layer, same = trained(**options), trained(**options)
    before = held(layer)
    with layer.no_update() as inside:
        assert inside is layer
        y = layer(images(4))
        dx = layer.backward(images(5))
        with layer.no_update():
            layer(images(6))
        layer(images(6))
        with pytest.raises(ValueError, match=r"update is True inside no_update\(\): drop one"):
            layer(images(4), update=True)
        for other in (copy.deepcopy(layer), layer.clone()):  # not inside
            other(images(4))
            assert other.num_updates == 4
    assert held(layer) == before
    assert y.tobytes() == same(images(4)).tobytes() and dx.tobytes() == same.backward(images(5)).tobytes()
    layer(images(4))
    assert held(layer) == held(same)


def test_no_update_ends_with_an_error():
    layer = trained()
    with pytest.raises(ZeroDivisionError), layer.no_update():
        raise ZeroDivisionError
    layer(images(4))
    assert layer.num_updates == 4
