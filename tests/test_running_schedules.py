"""Schedules of the running statistics: how much each batch weighs, cold statistics, NaN and Inf."""

from __future__ import annotations

import copy
import warnings

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm, ColdStatisticsWarning, effective_decay

C = 3
SCHEDULES = {
    "plain": {"decay": 0.75},
    "cumulative": {"decay": None},
    "warmup": {"decay": 0.5, "warmup": True},
    "zero_debias": {"decay": 0.75, "zero_debias": True},
    "zero_debias 1": {"decay": 1.0, "zero_debias": True},
    "zero_debias 0": {"decay": 0.0, "zero_debias": True},
    "zero_debias near 1": {"decay": 1 - 1e-9, "zero_debias": True},
}
STEPS = 30


def batches(dtype=np.float64, sizes=(4, 7, 2, 16)):
    """Batches of several sizes, whose channels differ."""
    rng = np.random.default_rng(5)
    for step in range(STEPS):
        yield (rng.normal(size=(sizes[step % len(sizes)], C, 3)) * [[1], [2], [3]] + step % 5).astype(dtype)


def weights(options, counts):
    """What each batch weighs in the end, and the initial value: from the definitions."""
    decay = options["decay"]
    if decay is None:
        return np.array(counts) / sum(counts), 0.0
    if options.get("zero_debias"):
        weight = np.array([float(decay) ** (len(counts) - 1 - i) for i in range(len(counts))])
        return weight / weight.sum(), 0.0
    steps = [min(decay, (1 + t) / (10 + t)) if options.get("warmup") else decay for t in range(len(counts))]
    weight = [(1 - d) * np.prod(steps[t + 1 :]) for t, d in enumerate(steps)]
    return np.array(weight), np.prod(steps)


@pytest.mark.parametrize("on_nonfinite", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_the_running_statistics_are_the_weighted_average_of_the_batches(options, ddof, on_nonfinite):
    initial = {"running_mean": 100.0, "running_var": 50.0}
    layer = BatchNorm(
        C, dtype=np.float64, initial=initial, running_ddof=ddof, on_nonfinite=on_nonfinite, **options
    )
    seen = list(batches())
    for x in seen:
        layer(x)
    weight, rest = weights(options, [x.size // C for x in seen])
    mean = np.tensordot(weight, [x.mean(axis=(0, 2)) for x in seen], 1)
    var = np.tensordot(weight, [x.var(axis=(0, 2), ddof=ddof) for x in seen], 1)
    # 30 steps, each a few roundings of values below 200.
    np.testing.assert_allclose(layer.running_mean, mean + rest * 100, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, var + rest * 50, rtol=1e-12)
    assert (layer.num_updates, layer.num_samples) == (STEPS, sum(x.size // C for x in seen))
    assert type(layer.num_samples) is int
    # given initial values count as known, though they weigh in the average
    assert layer.initial_weight == 0


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_the_initial_weight_is_what_the_initial_values_weigh(options):
    layer = BatchNorm(C, dtype=np.float64, **options)
    other = BatchNorm(C, dtype=np.float64, initial={"running_mean": 1.0}, **options)
    for x in batches():
        layer(x)
        other(x)
    np.testing.assert_allclose(other.running_mean - layer.running_mean, layer.initial_weight, atol=1e-12)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_functions_give_the_same_bits_as_the_layer(options):
    layer = BatchNorm(C, **options)
    mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
    seen = 0
    for step, x in enumerate(batches(np.float32)):
        layer(x)
        count = x.size // C
        counts = {"samples": seen, "count": count} if options["decay"] is None else {}
        decay = effective_decay(**options, updates=step, **counts)
        batchnorm.update_running(mean, var, *batchnorm.moments(x), decay=decay, count=count)
        seen += count
        assert mean.tobytes() == layer.running_mean.tobytes()
        assert var.tobytes() == layer.running_var.tobytes()


def test_update_running_keeps_a_cumulative_average():
    x = np.random.default_rng(0).normal(size=(60, C))
    mean, var = np.full(C, 9.0), np.full(C, 9.0)
    parts, seen = (x[:10], x[10:45], x[45:]), 0
    for part in parts:
        batch = batchnorm.moments(part)
        batchnorm.update_running(mean, var, *batch, decay=None, samples=seen, count=len(part), ddof=0)
        seen += len(part)
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-14, atol=1e-15)
    within = sum(len(part) * part.var(axis=0) for part in parts) / 60
    np.testing.assert_allclose(var, within, rtol=1e-14)


def test_effective_decays():
    assert [effective_decay(0.9, updates=t) for t in (0, 5)] == [0.9, 0.9]
    assert [effective_decay(0.9, updates=t, warmup=True) for t in (0, 1, 8, 1000)] == [0.1, 2 / 11, 0.5, 0.9]
    assert [effective_decay(1, updates=t, zero_debias=True) for t in (0, 1, 3)] == [0.0, 0.5, 0.75]
    assert effective_decay(None, samples=0, count=4) == 0.0
    assert effective_decay(None, samples=2.5, count=2.5) == 0.5
    for t in (1, 10, 10**6):  # near decay 1: as at 1, within what 1 - 1e-12 changes, and no cancellation
        near = effective_decay(1 - 1e-12, updates=t, zero_debias=True)
        np.testing.assert_allclose(near, t / (t + 1), rtol=1e-6)
    assert effective_decay(0.5, updates=10**6, zero_debias=True) == 0.5
    assert effective_decay(np.float32(0.5), updates=np.int64(3)) == 0.5


BAD = [
    ({"decay": "0.9"}, TypeError, r"decay is '0.9' \(str\), expected a number in \[0, 1\]"),
    ({"decay": 1.5}, ValueError, "decay is 1.5, expected a number in"),
    ({"decay": 0.9, "updates": -1}, ValueError, "updates is -1, expected an int >= 0, the updates before"),
    ({"decay": 0.9, "updates": 1.5}, TypeError, r"updates is 1.5 \(float\), expected an int >= 0"),
    ({"decay": 0.9, "warmup": 1}, TypeError, r"warmup is 1 \(int\), expected True or False"),
    ({"decay": 0.9, "zero_debias": np.True_}, TypeError, "zero_debias is .*, expected True or False"),
    ({"decay": 0.9, "warmup": True, "zero_debias": True}, ValueError, "both True.*: drop one of them"),
    ({"decay": None, "warmup": True}, ValueError, "warmup is True and decay is None: .*; drop warmup, or"),
    ({"decay": None, "zero_debias": True}, ValueError, "zero_debias is True and decay is None"),
    ({"decay": None}, TypeError, "samples is None, expected a finite number >= 0, values per channel"),
    ({"decay": None, "samples": 3}, TypeError, "count is None, expected a finite number > 0"),
    ({"decay": None, "samples": -1, "count": 1}, ValueError, "samples is -1, expected a finite number >= 0"),
    ({"decay": None, "samples": 1, "count": 0}, ValueError, "count is 0, expected a finite number > 0"),
    ({"decay": None, "samples": 1, "count": np.nan}, ValueError, "count is nan, expected"),
    ({"decay": None, "samples": "1", "count": 1}, TypeError, r"samples is '1' \(str\), expected"),
    ({"decay": 0.9, "samples": 3}, ValueError, r"samples is 3 \(int\) and decay is a number.*drop one"),
    ({"decay": 0.9, "count": 3}, ValueError, r"count is 3 \(int\) and decay is a number"),
    ({"decay": 0.9, "zero_debais": True}, TypeError, "did you mean 'zero_debias'"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=str)
def test_bad_arguments_of_a_schedule(options, error, match):
    with pytest.raises(error, match=match):
        effective_decay(**options)


@pytest.mark.parametrize(
    ("options", "error", "match"), [b for b in BAD if not {"updates", "samples", "count"} & set(b[0])][:7]
)
def test_the_layer_refuses_the_same(options, error, match):
    if options != {"decay": None}:
        with pytest.raises(error, match=match):
            BatchNorm(C, **options)


def test_update_running_wants_a_decay_or_samples():
    mean, var, one = np.zeros(C), np.ones(C), np.ones(C)
    with pytest.raises(
        TypeError, match=r"decay is None, expected .* for a cumulative average, give samples="
    ):
        batchnorm.update_running(mean, var, one, one, count=5)
    with pytest.raises(ValueError, match=r"samples is 4 \(int\) and decay is a number.*drop one of them"):
        batchnorm.update_running(mean, var, one, one, count=5, decay=0.5, samples=4)
    with pytest.raises(ValueError, match="samples is -4, expected a finite number >= 0"):
        batchnorm.update_running(mean, var, one, one, count=5, samples=-4)
    assert (mean == 0).all() and (var == 1).all()


@pytest.mark.parametrize("value", ["stop", "RAISE", None, True, 1])
def test_on_nonfinite_is_one_of_three_words(value):
    error = ValueError if isinstance(value, str) else TypeError
    with pytest.raises(error, match=r"on_nonfinite is .*, expected 'propagate', 'raise' or 'skip'"):
        BatchNorm(C, on_nonfinite=value)
    layer = BatchNorm(C)
    with pytest.raises(error, match="on_nonfinite"):
        layer.on_nonfinite = value
    layer.on_nonfinite = "skip"
    assert layer.on_nonfinite == "skip"


def test_the_decay_may_be_changed_within_what_the_schedule_allows():
    layer = BatchNorm(C, zero_debias=True)
    layer.decay = 0.5
    with pytest.raises(ValueError, match="zero_debias is True and decay is None"):
        layer.decay = None
    assert layer.decay == 0.5
    plain = BatchNorm(C)
    plain.decay = None
    x = next(batches())
    plain(x)
    assert plain.initial_weight == 0
    np.testing.assert_allclose(plain.running_mean, x.mean(axis=(0, 2)), rtol=1e-6)
    with pytest.raises(AttributeError, match="warmup of a BatchNorm is read-only"):
        plain.warmup = True


# ---- statistics that are still the initial ones ------------------------------------------------------------


X = np.random.default_rng(1).normal(size=(8, C, 2)).astype(np.float32)
EVALS = [{"training": False}, {"stats": "running"}, {"stats": "running", "update": True}]


@pytest.mark.parametrize("how", EVALS, ids=str)
@pytest.mark.parametrize("layer", [BatchNorm(C), BatchNorm()], ids=["known", "lazy"])
def test_statistics_that_were_never_updated_are_an_error(layer, how):
    before = repr(layer)
    with pytest.raises(RuntimeError) as caught:
        layer(X, **how)
    for remedy in ("Train first", "recalibrate", "load a state", "assign", "allow_initial_statistics=True"):
        assert remedy in str(caught.value)
    assert repr(layer) == before
    with pytest.raises(TypeError, match="x is of type list"):  # what is wrong with x comes first
        layer([1.0], **how)
    with pytest.raises(ValueError, match="x has shape"):
        layer(X[0, 0], **how)


def known_layers():
    """Layers whose statistics are known, though none has been trained."""
    stats = {"running_mean": np.full(C, 2, "f4"), "running_var": np.full(C, 3, "f4")}
    assigned, written = BatchNorm(C), BatchNorm(C)
    for name, value in stats.items():
        setattr(assigned, name, value)
        written.buffers()[name][:] = value
    yield assigned
    yield written
    yield BatchNorm(initial=stats)
    yield BatchNorm(C).load_state_dict(assigned.state_dict())
    yield BatchNorm(C).load_state_dict(written.state_dict())
    yield BatchNorm(C).load_state_dict(stats, strict=False)
    yield copy.deepcopy(assigned)
    yield assigned.clone()


def test_statistics_that_were_given_count_as_known():
    for layer in list(known_layers()):
        expected = batchnorm.batch_norm(X, np.full(C, 2.0), np.full(C, 3.0))
        np.testing.assert_allclose(layer.eval()(X), expected, rtol=1e-6, atol=1e-6)
        layer.train()(X)
        layer(X, training=False)  # and are not cold after an update


def test_half_of_the_statistics_is_not_enough():
    layer = BatchNorm(C)
    layer.running_mean = np.zeros(C)  # as it is, but somebody said so
    with pytest.raises(RuntimeError, match="running_var has been neither updated nor assigned"):
        layer(X, training=False)
    layer.running_var = np.ones(C)
    layer(X, training=False)


def test_initial_statistics_may_be_meant():
    layer = BatchNorm(C, allow_initial_statistics=True)
    assert layer(X, training=False).tobytes() == batchnorm.batch_norm(X, np.zeros(C), np.ones(C)).tobytes()
    layer(X)
    layer(X, training=False)  # no warning either
    other = BatchNorm(C)
    other.allow_initial_statistics = True
    other(X, training=False)
    with pytest.raises(TypeError, match="allow_initial_statistics is 1"):
        BatchNorm(C, allow_initial_statistics=1)


def test_a_state_that_was_never_updated_stays_so():
    state = BatchNorm(C).state_dict()
    for layer in (BatchNorm(C), BatchNorm(), BatchNorm(C, decay=None)):
        for _ in range(50):
            layer(X)
        layer(X, training=False)
        layer.load_state_dict(state)
        with pytest.raises(RuntimeError, match="no training forward has updated them"):
            layer(X, training=False)


def test_cold_statistics_warn_once_with_numbers():
    layer = BatchNorm(C, decay=0.99)
    for _ in range(20):
        layer(X)
    with pytest.warns(ColdStatisticsWarning) as caught:
        layer(X, training=False)
    text = str(caught[0].message)
    # 0.99^20 = 0.818; 0.99^459 = 0.00992, 0.99^458 = 0.01002; 0.01^(1/20) = 0.794
    assert "after 20 updates with decay=0.99 the initial values still weigh 82 %" in text
    assert "439 more updates bring that to 1 %" in text and "decay=0.794 or less" in text
    assert caught[0].filename == __file__
    layer(X, training=False)
    layer(X)
    layer(X, training=False)
    layer.load_state_dict(layer.state_dict())  # a new state warns anew
    with pytest.warns(ColdStatisticsWarning, match="after 21 updates") as caught:
        layer(X, training=False, keep=True)  # on the long way
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("updates", "cold"), [(43, True), (44, False)])  # 0.9^43 = 0.0108, 0.9^44 = 0.0097
def test_where_cold_ends(updates, cold):
    layer = BatchNorm(C)
    for _ in range(updates):
        layer(X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(X, training=False)
    assert bool(caught) == cold


@pytest.mark.parametrize("options", [{"decay": None}, {"zero_debias": True}, {"decay": 0.0}], ids=str)
def test_statistics_that_hold_nothing_of_the_initial_values_are_never_cold(options):
    layer = BatchNorm(C, **options)
    layer(X)
    layer(X, training=False)
    assert layer.initial_weight == 0


def test_a_decay_of_one_never_warms_up():
    layer = BatchNorm(C, decay=1)
    layer(X)
    with pytest.warns(ColdStatisticsWarning, match="weigh 100 %; no update changes that"):
        layer(X, training=False)


# ---- NaN and Inf -------------------------------------------------------------------------------------------


def bad_batch(value=np.nan):
    x = X.copy()
    x[3, 1] = value
    return x


def held(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("how", [{}, {"stats": "running", "update": True}], ids=["batch", "running"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])  # the last one overflows the variance
@pytest.mark.parametrize("in_place", [False, True])
def test_raise_changes_nothing(value, in_place, how):
    layer = BatchNorm(C, zero_debias=True, on_nonfinite="raise")
    layer(X)
    before, x = held(layer), bad_batch(value)
    given = x.copy()
    with pytest.raises(ValueError, match=r"running (mean|variance) would become \S+ at channel 1: .*'skip'"):
        layer(x, out=x if in_place else None, **how)
    assert held(layer) == before
    assert x.tobytes() == given.tobytes()
    layer.backward(X)  # that of the forward that succeeded
    y = layer(X, out=np.empty_like(X), **how)
    assert np.isfinite(y).all() and layer.num_updates == 2


@pytest.mark.parametrize("how", [{}, {"stats": "running", "update": True}], ids=["batch", "running"])
def test_skip_leaves_the_batch_out_and_counts_it(how):
    layer = BatchNorm(C, zero_debias=True, on_nonfinite="skip")
    layer(X)
    before = held(layer)
    y = layer(bad_batch(), **how)
    assert np.isnan(y[3, 1]).all() and np.isfinite(y[:, [0, 2]]).all()
    after = held(layer)
    assert layer.num_skipped == 1
    assert {name for name in after if after[name] != before[name]} == {"num_skipped"}
    assert np.isfinite(layer.backward(X)[:, [0, 2]]).all()
    layer(X)
    assert (layer.num_updates, layer.num_skipped) == (2, 1)


def test_a_layer_that_only_skipped_says_so():
    layer = BatchNorm(C, on_nonfinite="skip")
    layer(bad_batch())
    with pytest.raises(RuntimeError, match=r"all training batches so far \(1\) held NaN or Inf, and"):
        layer(X, training=False)


def test_propagate_is_the_default_and_stays_in_the_channel():
    layer = BatchNorm(C)
    layer(bad_batch())
    assert np.isnan(layer.running_mean[1]) and np.isfinite(layer.running_mean[[0, 2]]).all()


@pytest.mark.parametrize("guard", ["raise", "skip"])
def test_the_guard_does_not_change_a_bit(guard):
    plain, guarded = BatchNorm(C), BatchNorm(C, on_nonfinite=guard)
    for x in batches(np.float32):
        y = plain(x)
        out = np.empty_like(x)
        assert guarded(x, out=out).tobytes() == y.tobytes()
        assert guarded.backward(x).tobytes() == plain.backward(x).tobytes()
    assert guarded.running_var.tobytes() == plain.running_var.tobytes()
    assert guarded.running_mean.tobytes() == plain.running_mean.tobytes()
