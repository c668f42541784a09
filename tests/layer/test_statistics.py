"""Running statistics of a layer: schedules, channels left out, cold and unknown ones, NaN and Inf."""

from __future__ import annotations

import itertools
import warnings

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm, ColdStatisticsWarning, effective_decay
from batchnorm.running import RunningStatistics, updates_until

from support.checks import same_bits
from support.layers import C, held, images, trained

pytestmark = pytest.mark.quick

SCHEDULES = {
    "plain": {"decay": 0.75},
    "cumulative": {"decay": None},
    "warmup": {"decay": 0.5, "warmup": True},
    "zero_debias": {"decay": 0.75, "zero_debias": True},
    "zero_debias 1": {"decay": 1.0, "zero_debias": True},
    "zero_debias 0": {"decay": 0.0, "zero_debias": True},
    "zero_debias near 1": {"decay": 1 - 1e-9, "zero_debias": True},
}
ALL = pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
STEPS = 30
X = images("x")


def batches(dtype=np.float64, sizes=(4, 7, 2, 16)):
    """Batches of several sizes, whose channels differ."""
    rng = np.random.default_rng(5)
    for step in range(STEPS):
        yield (rng.normal(size=(sizes[step % len(sizes)], C, 3)) * [[1], [2], [3], [4]] + step % 5).astype(
            dtype
        )


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


# ---- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("ddof", [0, 1])
@ALL
def test_the_running_statistics_are_the_weighted_average_of_the_batches(options, ddof, guard):
    initial = {"running_mean": 100.0, "running_var": 50.0}
    layer = BatchNorm(C, dtype=np.float64, initial=initial, running_ddof=ddof, on_nonfinite=guard, **options)
    seen = list(batches())
    for x in seen:
        layer(x)
    weight, rest = weights(options, [x.size // C for x in seen])
    mean = np.tensordot(weight, [x.mean(axis=(0, 2)) for x in seen], 1)
    var = np.tensordot(weight, [x.var(axis=(0, 2), ddof=ddof) for x in seen], 1)
    # 30 steps, each a few roundings of values below 200.
    np.testing.assert_allclose(layer.running_mean, mean + rest * 100, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, var + rest * 50, rtol=1e-12)
    assert layer.running.num_updates == STEPS and (layer.running.updates == STEPS).all()
    np.testing.assert_array_equal(layer.running.num_values, np.full(C, sum(x.size // C for x in seen)))
    assert not layer.running.initial_weight.any()  # given initial values count as known, though they weigh


@ALL
def test_the_initial_weight_is_what_the_initial_values_weigh(options):
    layer = BatchNorm(C, dtype=np.float64, **options)
    other = BatchNorm(C, dtype=np.float64, initial={"running_mean": 1.0}, **options)
    for x in batches():
        layer(x)
        other(x)
    difference = other.running_mean - layer.running_mean
    np.testing.assert_allclose(difference, layer.running.initial_weight, atol=1e-12)


@ALL
def test_functions_give_the_same_bits_as_the_layer(options):
    layer = BatchNorm(C, **options)
    mean, var, seen = np.zeros(C, np.float32), np.ones(C, np.float32), 0
    for step, x in enumerate(batches(np.float32)):
        layer(x)
        count = x.size // C
        counts = {"seen": seen, "count": count} if options["decay"] is None else {}
        decay = effective_decay(**options, updates=step, **counts)
        batchnorm.update_running(mean, var, *batchnorm.moments(x), decay=decay, count=count)
        seen += count
        assert same_bits(mean, layer.running_mean) and same_bits(var, layer.running_var)


def test_a_guard_does_not_change_a_bit():
    for guard in ("raise", "skip"):
        plain, guarded = BatchNorm(C), BatchNorm(C, on_nonfinite=guard)
        for x in batches(np.float32):
            assert same_bits(guarded(x, out=np.empty_like(x)), plain(x))
            assert same_bits(guarded.backward(x), plain.backward(x))
        assert held(guarded)["running_var"] == held(plain)["running_var"]
        assert held(guarded)["running_mean"] == held(plain)["running_mean"]


def test_decays_of_single_steps():
    assert [effective_decay(0.9, updates=t) for t in (0, 5)] == [0.9, 0.9]
    assert [effective_decay(0.9, updates=t, warmup=True) for t in (0, 1, 8, 1000)] == [0.1, 2 / 11, 0.5, 0.9]
    assert [effective_decay(1, updates=t, zero_debias=True) for t in (0, 1, 3)] == [0.0, 0.5, 0.75]
    assert effective_decay(None, seen=0, count=4) == 0.0 and effective_decay(None, seen=2.5, count=2.5) == 0.5
    for t in (1, 10, 10**6):  # near decay 1: as at 1, within what 1 - 1e-12 changes, and no cancellation
        near = effective_decay(1 - 1e-12, updates=t, zero_debias=True)
        np.testing.assert_allclose(near, t / (t + 1), rtol=1e-6)
    assert effective_decay(0.5, updates=10**6, zero_debias=True) == 0.5
    assert effective_decay(np.float32(0.5), updates=np.int64(3)) == 0.5


@pytest.mark.parametrize("schedule", [{}, {"warmup": True}, {"zero_debias": True}], ids=str)
def test_decays_per_channel_are_those_of_each_channel(schedule):
    updates = np.array([0, 3, 3, 7, 0])
    got = effective_decay(0.75, updates=updates, **schedule)
    assert isinstance(got, np.ndarray) and got.dtype == np.float64
    assert got.tolist() == [effective_decay(0.75, updates=int(t), **schedule) for t in updates]
    seen, count = np.array([0.0, 3]), np.array([4.0, 1])
    assert effective_decay(None, seen=seen, count=count).tolist() == [0.0, 0.75]
    assert effective_decay(None, seen=3, count=np.array([1, 3])).tolist() == [0.75, 0.5]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"decay": "0.9"}, TypeError, r"decay is '0.9' \(str\), expected a number in \[0, 1\]"),
        ({"decay": 1.5}, ValueError, "decay is 1.5, expected a number in"),
        (
            {"decay": None, "seen": np.ones(3), "count": np.ones(2)},
            ValueError,
            r"seen has shape \(3,\) and count",
        ),
        (
            {"decay": 0.9, "updates": -1},
            ValueError,
            "updates is -1, expected an int >= 0, the updates before",
        ),
        ({"decay": 0.9, "updates": np.array([1, -1])}, ValueError, "updates is -1, expected an int >= 0"),
        ({"decay": 0.9, "updates": 1.5}, TypeError, r"updates is 1.5 \(float\), expected an int >= 0"),
        ({"decay": 0.9, "updates": np.ones(2)}, TypeError, "updates is .*1.0.*, expected an int >= 0"),
        ({"decay": 0.9, "warmup": 1}, TypeError, r"warmup is 1 \(int\), expected True or False"),
        ({"decay": 0.9, "warmup": True, "zero_debias": True}, ValueError, "both True.*: drop one of them"),
        (
            {"decay": None, "warmup": True},
            ValueError,
            "warmup is True and decay is None: .*; drop warmup, or",
        ),
        ({"decay": None}, TypeError, "seen is None, expected a finite number >= 0, values per channel"),
        ({"decay": None, "seen": 3}, TypeError, "count is None, expected a finite number > 0"),
        ({"decay": None, "seen": -1, "count": 1}, ValueError, "seen is -1, expected a finite number >= 0"),
        ({"decay": None, "seen": np.array([1, -1]), "count": 1}, ValueError, "seen is -1, expected"),
        ({"decay": None, "seen": np.array(["a"]), "count": 1}, TypeError, "seen has dtype <U1, expected"),
        ({"decay": None, "seen": 1, "count": 0}, ValueError, "count is 0, expected a finite number > 0"),
        ({"decay": None, "seen": 1, "count": np.nan}, ValueError, "count is nan, expected"),
        ({"decay": None, "seen": "1", "count": 1}, TypeError, r"seen is '1' \(str\), expected"),
        ({"decay": 0.9, "seen": 3}, ValueError, r"seen is 3 \(int\) and decay is a number.*drop one"),
        ({"decay": 0.9, "count": 3}, ValueError, r"count is 3 \(int\) and decay is a number"),
        ({"decay": 0.9, "zero_debais": True}, TypeError, "did you mean 'zero_debias'"),
        ({"decay": 0.9, "samples": 3}, TypeError, "it is called seen here"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_schedule(options, error, match):
    with pytest.raises(error, match=match):
        effective_decay(**options)


@pytest.mark.parametrize(
    ("weight", "decay", "warmup", "updates"),
    [
        (0.01, 0.9, False, 0),
        (0.5, 0.99, False, 7),
        (0.01, 0.9, True, 0),
        (0.3, 0.999, True, 5),
        (0.01, 0.0, False, 3),
    ],
)
def test_updates_until(weight, decay, warmup, updates):
    left, more = 1.0, 0
    while left > weight:
        left *= effective_decay(decay, warmup=warmup, updates=updates + more)
        more += 1
    assert updates_until(weight, decay, warmup, updates) == more
    assert updates_until(0.5, 1.0) == np.inf


def test_updates_until_a_power_of_the_decay():
    for decay in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999):
        for n in range(1, 60):
            assert updates_until(decay**n, decay) == n


# ---- channels that batches leave out -----------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("parts", [None, 2], ids=["whole", "parts"])
@ALL
def test_a_channel_has_the_statistics_of_the_batches_that_it_was_in(options, parts, ddof):
    """However often a mask leaves it out, all of it or all but one value."""
    layer = BatchNorm(C, dtype=np.float64, running_ddof=ddof, virtual_batch_size=parts, **options)
    alone = [
        BatchNorm(1, dtype=np.float64, running_ddof=ddof, virtual_batch_size=parts, **options)
        for _ in range(C)
    ]
    rng = np.random.default_rng(3)
    for step, x in enumerate(itertools.islice(batches(sizes=(4, 8)), 12)):
        mask = rng.random(x.shape) < 0.8
        mask[:, 1] &= step % 3 > 0  # absent from batches 0, 3, ...
        mask[:, 2] &= step > 4  # absent at first
        if step % 2:
            mask[:, 3] = False
            mask[0, 3, 0] = True  # one value is not enough
        layer(x, mask=mask)
        for c, single in enumerate(alone):
            part = mask[:, c : c + 1]
            if part.sum() > 1:
                single(x[:, c : c + 1], mask=part)
    running = layer.running
    assert running.num_updates == 12
    for c, single in enumerate(alone):
        np.testing.assert_allclose(layer.running_mean[c], single.running_mean[0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(layer.running_var[c], single.running_var[0], rtol=1e-12)
        assert running.updates[c] == single.running.num_updates == 12 - running.missed_updates[c]
        assert running.num_values[c] == single.running.num_values[0]
        np.testing.assert_allclose(running.initial_weight[c], single.running.initial_weight[0], rtol=1e-12)
    assert running.missed_updates.tolist() == [0, 4, 5, 6]


def test_absent_at_first_means_no_share_of_the_initial_value():
    """Channel 1 is absent from batch 1; its true mean is 5."""
    x = np.full((8, 2), 5.0) + np.random.default_rng(0).normal(size=(8, 2)) * 1e-3
    first = np.ones(x.shape, bool)
    first[:, 1] = False
    for options in ({"zero_debias": True}, {"decay": None}):
        layer = BatchNorm(2, dtype=np.float64, **options)
        layer(x, mask=first)
        assert layer.running_mean[1] == 0
        layer(x)
        layer(x)
        np.testing.assert_allclose(layer.running_mean, 5, atol=1e-3)


def test_channels_that_agree_again_are_counted_with_one_number():
    """So that the everyday call is cheap again."""
    layer = BatchNorm(2, decay=0.5)
    x, mask = images(0, (6, 2)), np.ones((6, 2), bool)
    mask[:, 1] = False
    layer(x, mask=mask)
    assert layer.running.initial_weight.tolist() == [0.5, 1.0]
    layer(x, mask=mask[:, ::-1])
    assert layer.running.initial_weight.tolist() == [0.5, 0.5] and layer.running.missed_updates.tolist() == [
        1,
        1,
    ]
    again = BatchNorm(2, decay=0.5).load_state_dict(layer.state_dict())
    for each in (layer, again):
        assert all(np.ndim(getattr(each.running, name)) == 0 for name in ("_values", "_weight", "_missed"))


@pytest.mark.parametrize("own", [{}, {"decay": 0.5}], ids=["running pair", "own reference"])
def test_renorm_waits_for_a_reference_in_every_channel(own):
    layer, plain = (BatchNorm(C, zero_debias=True, renorm=r) for r in ({"rmax": 3.0, **own}, None))
    mask = np.ones(X.shape, bool)
    mask[:, 2] = False
    for step in range(3):
        assert same_bits(layer(images(step), mask=mask), plain(images(step), mask=mask))
    assert same_bits(
        layer(images(3)), plain(images(3))
    )  # has the first values of channel 2, for the next one
    assert not same_bits(layer(images(4)), plain(images(4)))
    if own:
        np.testing.assert_allclose(layer.renorm_mean.mean(), images(4).mean(), atol=0.5)


@pytest.mark.parametrize("own", [{}, {"decay": 0.5}], ids=["running pair", "own reference"])
def test_renorm_waits_again_after_the_statistics_went_back(own):
    layer, plain = (BatchNorm(C, zero_debias=True, renorm=r) for r in ({"rmax": 3.0, **own}, None))
    snapshot, state = layer.snapshot(), layer.state_dict()
    for again in (lambda: layer.rollback(snapshot), lambda: layer.load_state_dict(state)):
        layer(images(0))
        assert not same_bits(layer(images(1)), plain(images(1)))
        again()
        assert same_bits(layer(images(1)), plain(images(1), update=False))


def test_a_reference_stays_an_average_where_another_channel_has_none():
    layer = BatchNorm(C, dtype=np.float64, renorm={"decay": 0.9})
    mask = np.arange(C).reshape(1, C, 1) != 1
    reference = images(0).mean((0, 2), np.float64)
    for step in range(4):
        layer(images(step), mask=np.broadcast_to(mask, X.shape))
        reference = 0.9 * reference + 0.1 * images(step).mean((0, 2), np.float64)
    assert (layer.renorm_mean[1], layer.renorm_std[1]) == (0, 1)
    np.testing.assert_allclose(np.delete(layer.renorm_mean, 1), np.delete(reference, 1), rtol=1e-6)


def test_a_reference_that_is_assigned_is_one_whatever_its_values():
    layer = BatchNorm(C, dtype=np.float64, renorm={"decay": 0.75})
    layer.renorm_mean, layer.renorm_std = np.zeros(C), np.ones(C)
    layer(X)
    np.testing.assert_allclose(layer.renorm_mean, X.mean((0, 2), np.float64) / 4, rtol=1e-6)


def test_a_single_position_of_any_weight_is_no_batch():
    """What the running statistics do not take is not counted, in channels and in parts."""
    layer, mask = BatchNorm(2, dtype=np.float64, zero_debias=True), np.ones((4, 2), bool)
    mask[1:, 1] = False
    x = np.random.default_rng(0).normal(5, 2, (4, 2))
    layer(x, weights=np.array([3.0, 1, 1, 1]), mask=mask)
    assert layer.running.updates.tolist() == [1, 0] and "never_updated" in layer.report().codes
    with pytest.raises(RuntimeError, match="never updated in channel 1"):
        layer.eval()(x)
    parts = BatchNorm(2, decay=None, virtual_batch_size=4)
    parts(np.ones((8, 2), np.float32), weights=np.array([3.0, 0, 0, 0, 1, 1, 1, 1]))
    assert parts.running.num_values.tolist() == [4, 4]


def test_weights_count_as_their_sum():
    layer = BatchNorm(C, decay=None)
    layer(X, weights=np.array([0.5, 0.25, 0, 2, 1, 1]))
    layer(X, weights=np.array([0.05, 0.25, 0, 0, 0, 0]))  # 1.5 values: enough
    np.testing.assert_allclose(layer.running.num_values, np.full(C, 4.75 * 5 + 1.5))
    assert layer.running.num_updates == 2
    for ddof, taken in ((0, 1), (1, 0)):  # half a value: enough to divide by it, not by it less 1
        layer, before = BatchNorm(C, decay=0.75, running_ddof=ddof), np.zeros(C, np.float32)
        others = np.zeros(X.shape[::2])
        others[:2] = 1  # another channel's worth would do, so that the call is no error
        mask = np.ones(X.shape, bool)
        mask[2:, 0] = mask[:, 0, 1:] = False
        layer(X, mask=mask, weights=np.where(others.any(axis=1), 0.25, 1.0))
        assert layer.running.num_updates == 1 and (layer.running_mean[0] != before[0]) == bool(taken)
        assert layer.running.num_values[0] == 0.5 * taken
        assert layer.running.initial_weight.tolist() == [0.75 if taken else 1.0, 0.75, 0.75, 0.75]


@pytest.mark.parametrize("name", ["mean", "var"])
def test_how_much_history_costs_nothing_to_the_statistics(name):
    layer, plain = BatchNorm(C, history=5, zero_debias=True), BatchNorm(C, zero_debias=True)
    for x in itertools.islice(batches(np.float32), 8):
        layer(x)
        plain(x)
        layer(x, stats="running", update=True, out=x.copy(), weights=np.arange(len(x)) + 1.0)
        plain(x, stats="running", update=True, weights=np.arange(len(x)) + 1.0)
    assert held(layer) == held(plain) and len(layer.history) <= 5
    batch = getattr(layer.history, f"batch_{name}")
    assert batch.shape == (len(layer.history), C) and np.isfinite(batch).all()


def test_the_history_has_the_batch_s_statistics_whatever_normalised():
    layer, mask = trained(history=10), X > 0
    layer.record_history(10)
    layer(X, stats="running", update=True, mask=mask, out=X.copy())
    layer(X, mask=mask)
    layer(X, update=False)
    assert len(layer.history) == 2
    np.testing.assert_allclose(layer.history.batch_mean[0], layer.history.batch_mean[1], rtol=1e-6)
    np.testing.assert_allclose(layer.history.batch_var[0], layer.history.batch_var[1], rtol=1e-6)
    np.testing.assert_allclose(
        layer.history.batch_mean[0], np.where(mask, X, 0).sum((0, 2)) / mask.sum((0, 2)), rtol=1e-5
    )
    assert layer.record_history(None).history is None


# ---- statistics that are still the initial ones ------------------------------------------------------------


EVALS = [
    {"training": False},
    {"stats": "running"},
    {"stats": "running", "update": True},
    {"training": False, "return_saved": True},
]


@pytest.mark.parametrize("how", EVALS, ids=str)
@pytest.mark.parametrize("layer", [BatchNorm(C, name="bn7"), BatchNorm(name="bn7")], ids=["known", "lazy"])
def test_statistics_that_were_never_updated_are_an_error(layer, how):
    before = repr(layer)
    with pytest.raises(RuntimeError, match=r"^bn7: running_mean and running_var .*never updated") as caught:
        layer(X, **how)
    for remedy in (
        "rain in training mode",
        "recalibrate",
        "load a state",
        "assign",
        "allow_initial_statistics=True",
    ):
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
    yield assigned.clone()


def test_statistics_that_were_given_count_as_known():
    for layer in list(known_layers()):
        expected = batchnorm.batch_norm(X, np.full(C, 2.0), np.full(C, 3.0))
        np.testing.assert_allclose(layer.eval()(X), expected, rtol=1e-6, atol=1e-6)
        scale, shift = layer.scale_shift()
        np.testing.assert_allclose(X * scale[:, None] + shift[:, None], expected, rtol=1e-5, atol=1e-5)
    first = next(known_layers())
    first(X)
    first(X, training=False)  # and are not cold after an update


def test_half_of_the_statistics_is_not_enough():
    layer = BatchNorm(C)
    layer.running_mean = np.zeros(C)  # as it is, but somebody said so
    assert layer.running.untouched_names() == ("running_var",)
    with pytest.raises(RuntimeError, match=r"^running_var .*never updated"):
        layer(X, training=False)
    layer.running_var = np.ones(C)
    layer(X, training=False)
    assert layer.running.untouched_names() == ()


def test_initial_statistics_may_be_meant():
    layer = BatchNorm(C, allow_initial_statistics=True)
    assert same_bits(layer(X, training=False), batchnorm.batch_norm(X, np.zeros(C), np.ones(C)))
    layer(X)
    layer(X, training=False)  # no warning either
    layer.scale_shift()
    layer.allow_initial_statistics = False
    with pytest.warns(ColdStatisticsWarning):
        layer(X, training=False)


def test_a_channel_that_never_had_values_is_named():
    layer, mask = BatchNorm(C, zero_debias=True), np.ones(X.shape, bool)
    mask[:, 2] = False
    for _ in range(3):
        layer(X, mask=mask)
    assert layer.running.untouched().tolist() == [False, False, True, False]
    with pytest.raises(RuntimeError, match=r"never updated in channel 2"):
        layer(X, training=False)
    layer(X)
    layer(X, training=False)


def test_a_state_that_was_never_updated_stays_so():
    state = BatchNorm(C).state_dict()
    for layer in (BatchNorm(C), BatchNorm(), BatchNorm(C, decay=None)):
        for _ in range(50):
            layer(X)
        layer(X, training=False)
        layer.load_state_dict(state)
        with pytest.raises(RuntimeError, match="never updated"):
            layer(X, training=False)


# ---- cold statistics ---------------------------------------------------------------------------------------


def test_cold_statistics_warn_once_with_numbers_and_the_name():
    layer = BatchNorm(C, decay=0.99, name="encoder.bn1")
    for _ in range(20):
        layer(X)
    with pytest.warns(ColdStatisticsWarning) as caught:
        layer(X, training=False)
    text = str(caught[0].message)
    # 0.99^20 = 0.818; 0.99^459 = 0.00992, 0.99^458 = 0.01002
    assert text.startswith("encoder.bn1: the running statistics are cold: after 20 updates with decay=0.99")
    assert "weigh 82 %" in text and "439 more updates" in text and "batchnorm.recalibrate(layers" in text
    assert caught[0].filename == __file__
    layer(X, training=False)
    layer(X)
    layer(X, training=False)
    layer.load_state_dict(layer.state_dict())  # a new state warns anew
    for how in ({"return_saved": True, "training": False}, {"stats": "running"}):
        with pytest.warns(ColdStatisticsWarning, match="after 21 updates") as caught:
            layer(X, **how)
        assert caught[0].filename == __file__
        layer.running.trusted = False
    with pytest.warns(ColdStatisticsWarning, match="after 22 updates"):
        layer(X, training=False)
    layer.running_mean = layer.running_mean + 1  # so does half of one
    with pytest.warns(ColdStatisticsWarning, match="after 22 updates"):
        layer(X, training=False)


def test_the_first_update_advises_nothing_harmful():
    layer = BatchNorm(C)
    layer(X)
    with pytest.warns(ColdStatisticsWarning) as caught:
        layer(X, training=False)
    assert "zero_debias=True" in str(caught[0].message) and "decay=0.0" not in str(caught[0].message)


def test_each_layer_warns_for_itself():
    layers = [BatchNorm(C, name=f"bn{i}") for i in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # which shows a text once per line of the program
        for layer in layers:
            layer(X)
            layer(X, training=False)
    assert [str(w.message)[:4] for w in caught] == ["bn0:", "bn1:", "bn2:"]


@pytest.mark.parametrize(("updates", "cold"), [(43, True), (44, False)])  # 0.9^43 = 0.0108, 0.9^44 = 0.0097
def test_where_cold_ends(updates, cold):
    layer = BatchNorm(C)
    for _ in range(updates):
        layer(X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(X, training=False)
        layer.scale_shift()
    assert bool(caught) == cold


def test_cold_channels_are_named():
    layer, mask = BatchNorm(C, decay=0.5), np.ones(X.shape, bool)
    mask[:, 2] = False
    layer(X)
    for _ in range(9):
        layer(X, mask=mask)
    with pytest.warns(ColdStatisticsWarning, match="cold in channel 2: after 1 update"):
        layer(X, training=False)


@pytest.mark.parametrize("options", [{"decay": None}, {"zero_debias": True}, {"decay": 0.0}], ids=str)
def test_statistics_that_hold_nothing_of_the_initial_values_are_never_cold(options):
    layer = BatchNorm(C, **options)
    layer(X)
    layer(X, training=False)
    assert not layer.running.initial_weight.any()


# ---- NaN and Inf -------------------------------------------------------------------------------------------


def bad_batch(value=np.nan):
    x = X.copy()
    x[3, 1] = value
    return x


@pytest.mark.parametrize("how", [{}, {"stats": "running", "update": True}], ids=["batch", "running"])
@pytest.mark.parametrize(
    "options", [{}, {"renorm": {"decay": 0.5}}, {"virtual_batch_size": 2}, {"keep": "y"}], ids=str
)
@pytest.mark.parametrize("given", [{}, {"mask": np.ones((6, 5), bool)}], ids=["all", "mask"])
def test_skip_leaves_the_batch_out_and_counts_it(given, options, how):
    layer = trained(on_nonfinite="skip", history=9, **options)
    before, length = held(layer), len(layer.history)
    y = layer(bad_batch(), **how, **given)
    assert np.isnan(y[3, 1]).all() and np.isfinite(y[:, [0, 2, 3]]).all()
    after = held(layer)
    assert layer.running.num_skipped == 1 and len(layer.history) == length
    assert {name for name in after if after[name] != before[name]} == {"num_skipped"}
    assert np.isfinite(layer.backward(X)[:, [0, 2, 3]]).all()
    layer(X, **given)
    layer(X[:0])
    layer(X[:1, :, :1], stats="running", update=True)
    assert (layer.running.num_updates, layer.running.num_skipped) == (4, 1)


def test_a_layer_that_only_skipped_says_so():
    layer = BatchNorm(C, on_nonfinite="skip")
    layer(bad_batch())
    with pytest.raises(RuntimeError, match="1 batch with NaN or Inf"):
        layer(X, training=False)


def test_propagate_is_the_default_and_stays_in_the_channel():
    layer = BatchNorm(C)
    layer(bad_batch())
    assert np.isnan(layer.running_mean[1]) and np.isfinite(layer.running_mean[[0, 2, 3]]).all()


# ---- the object --------------------------------------------------------------------------------------------


def test_the_object_of_a_layer_that_knows_nothing():
    running = RunningStatistics()
    assert repr(running) == "RunningStatistics(unknown channels, num_updates=0)"
    assert (running.mean, running.var, running.renorm_mean, running.renorm_std) == (None,) * 4
    for name in ("num_values", "initial_weight", "missed_updates", "updates"):
        assert getattr(running, name).shape == (1,)
    assert running.untouched().all() and running.untouched_names() == ("running_mean", "running_var")
    assert (
        repr(BatchNorm((2, 3), channel_axis=(1, 2)).running)
        == "RunningStatistics(2 x 3 channels, num_updates=0)"
    )


def test_its_arrays_cannot_be_exchanged():
    running = BatchNorm(C).running
    for name in (
        "mean",
        "var",
        "renorm_mean",
        "renorm_std",
        "num_values",
        "initial_weight",
        "missed_updates",
    ):
        with pytest.raises(AttributeError):
            setattr(running, name, np.ones(C))


def test_replace_takes_the_channels_that_are_known():
    layer = trained(renorm={"decay": 0.5})
    running, before = layer.running, layer.running.copy()
    known = np.array([True, False, True, True])
    new = np.arange(C) + 10.0
    running.replace(new, new + 1, new + 2, new * 3, 7, known)
    for name, value in (
        ("mean", new),
        ("var", new + 1),
        ("renorm_mean", new),
        ("renorm_std", new + 2),
        ("num_values", new * 3),
    ):
        np.testing.assert_array_equal(getattr(running, name), np.where(known, value, getattr(before, name)))
    assert running.num_updates == 7 and running.updates.tolist() == [7, 3, 7, 7]
    assert not running.initial_weight.any() and not running.untouched().any()
    running.replace(new, new, new, new, 2, np.ones(C, bool))
    assert running.updates.tolist() == [2] * C and not running.missed_updates.any()
