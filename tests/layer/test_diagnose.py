"""report() and diagnose(): every fault is told from the others, with its layer, channels and numbers."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm, ColdStatisticsWarning, Finding, diagnose, recalibrate

pytestmark = pytest.mark.quick

C = 6


def data(n=400, seed=0, shift=0.0, scale=1.0, dtype=np.float32):
    x = np.random.default_rng(seed).normal(size=(n, C)) * np.arange(1, C + 1) + np.arange(C)
    return (x * scale + shift).astype(dtype)


def fitted(**options):
    layer = BatchNorm(C, **{"decay": None, **options})
    for seed in range(1, 6):
        layer(data(seed=seed))
    return layer


def held(layer):
    return {name: value.tobytes() for name, value in layer.state_dict().items()}


def diagnosed(layer, x=None, kind=None, **positions):
    """The diagnosis, after which nothing may have changed; and the finding of this kind."""
    known = layer.num_features is not None
    before = held(layer) if known else repr(layer)
    given = None if x is None else x.copy()
    found = layer.report() if x is None else layer.diagnose(x, **positions)
    assert (held(layer) if known else repr(layer)) == before
    assert x is None or x.tobytes() == given.tobytes()
    assert [f.code for f in found] == list(found.codes) and len(found) >= 1
    for finding in found:
        assert f"{finding.code}: {finding}" in str(found)
        assert bool(finding.remedy) == (finding.code != "fine")
        assert finding.layer == (layer.name or "") and str(finding).startswith(layer.name or finding.text)
        assert "such as nan" not in str(finding) and ".." not in str(finding).replace("...", "")
        assert "(layers, forward, batches)" in finding.remedy or "recalibrate" not in finding.remedy
    return found if kind is None else next(f for f in found if f.code == kind)


def test_statistics_that_are_in_order():
    layer = fitted()
    for found in (diagnosed(layer), diagnosed(layer, data(seed=9)), diagnosed(layer, data(40, seed=9))):
        assert found.ok and found.codes == ("fine",)
        assert repr(found) == "Diagnosis(fine)"
    assert "(5 updates)" in str(diagnosed(layer))
    assigned = BatchNorm(C)
    assigned.running_mean, assigned.running_var = np.ones(C), np.ones(C)
    assert "(assigned or loaded)" in str(diagnosed(assigned))


def test_fine_is_not_luck():
    """5 standard errors: none of 200 batches of the right data is called a mismatch."""
    layer = fitted()
    assert all(layer.diagnose(data(seed=100 + i, n=32 + i)).ok for i in range(200))


@pytest.mark.parametrize("layer", [BatchNorm(), BatchNorm(C, name="conv1.bn")], ids=["lazy", "known"])
def test_never_updated(layer):
    for found in (diagnosed(layer), diagnosed(layer, data())):
        assert found.codes == ("never_updated",)
        text = str(found)
        for words in ("load a state", "running_mean and running_var never updated", "recalibrate(layers, "):
            assert words in text
    assert "which are allowed" in str(diagnosed(BatchNorm(C, allow_initial_statistics=True)))
    assert diagnosed(BatchNorm(C, allow_initial_statistics=True)).ok
    half = BatchNorm(C)
    half.running_mean = np.ones(C)
    assert "running_var never updated" in diagnosed(half).findings[0].text


def test_single_channels_that_were_never_updated_or_are_cold():
    layer, mask = BatchNorm(C, decay=0.5), np.ones((400, C), bool)
    mask[:, 2], x = False, data()
    for step in range(12):
        mask[:, [1, 4]] = step < 3
        layer(x, mask=mask)
    for found in (diagnosed(layer), diagnosed(layer, x)):
        never, cold = found
        assert never.code == "never_updated" and never.channels == (2,)
        assert "never updated in channel 2: " in never.text
        assert cold.code == "cold" and cold.channels == (1, 4) and cold.numbers["initial_weight"] == 1
        assert "cold in 2 channels (1, 4): after 3 updates with decay=0.5" in cold.text
        assert "12 %, 4 more updates bring that to 1 %" in cold.text
    with pytest.raises(RuntimeError, match="never updated in channel 2: "):
        layer.eval()(x)


def test_cold_statistics_are_not_called_mismatched():
    """They differ wildly from the batch, but only because the initial values weigh so much."""
    layer = BatchNorm(C, decay=0.99, name="bn1")
    for seed in range(50):
        layer(data(seed=seed, shift=50))
    x = data(seed=99, shift=50)
    for found in (diagnosed(layer), diagnosed(layer, x)):
        assert found.codes == ("cold",)
        numbers = found.findings[0].numbers
        assert numbers["num_updates"] == 50 and numbers["updates_missing"] == 409
        assert numbers["recommended_decay"] == 0.912  # just below 0.01 ** (1 / 50)
        assert numbers["initial_weight"] == pytest.approx(0.99**50)
        assert "61 %" in str(found) and "409 more updates" in str(found) and "decay=0.912" in str(found)
    with pytest.warns(
        ColdStatisticsWarning, match=r"^bn1: the running statistics are cold: after 50 updates"
    ):
        layer(x, training=False)
    assert diagnosed(layer.recalibrate([x]), x).ok
    recommended = BatchNorm(C, decay=numbers["recommended_decay"])
    for seed in range(50):
        recommended(data(seed=seed))
    assert diagnosed(recommended, data(seed=99)).ok


@pytest.mark.parametrize("updates", [1, 5, 20, 43])
def test_a_small_decay_is_never_advised(updates):
    """One that forgets the initial values within so few updates would average hardly any batches."""
    layer = BatchNorm(C, decay=0.99)
    for seed in range(updates):
        layer(data(seed=seed))
    finding = diagnosed(layer, kind="cold")
    assert "recommended_decay" not in finding.numbers and "or less" not in str(finding)
    assert "zero_debias=True or decay=None" in finding.remedy
    mended = BatchNorm(C, zero_debias=True, decay=0.99)
    for seed in range(updates):
        mended(data(seed=seed))
    assert diagnosed(mended, data(seed=99)).ok
    warm = BatchNorm(C, decay=0.99, warmup=True)
    warm(data())
    assert "zero_debias" not in diagnosed(warm, kind="cold").remedy


def test_means_far_from_zero_show_less_than_one_percent():
    """Of an initial weight of 0.8 %, a mean of 100 standard deviations makes 0.8 of them."""
    layer = BatchNorm(C)
    for seed in range(46):
        layer(data(seed=seed, shift=100))
    assert diagnosed(layer).ok
    finding = diagnosed(layer, data(seed=99, shift=100), "cold")
    assert "still weigh 0.79 %, 44 more updates bring that to 0.0079 %" in finding.text
    for seed in range(44):
        layer(data(seed=seed, shift=100))
    assert diagnosed(layer, data(seed=99, shift=100)).ok


def test_cold_and_mismatched():
    layer = BatchNorm(C, decay=0.99)
    for seed in range(20):
        layer(data(seed=seed))
    found = diagnosed(layer, data(seed=99, shift=50))
    assert found.codes == ("cold", "mismatched")
    assert "more than the initial values in them explain" in str(found)
    hopeless = BatchNorm(C, decay=1)
    hopeless(data())
    assert diagnosed(hopeless, data()).codes == ("cold",)
    assert "no update changes that" in str(diagnosed(hopeless))
    assert "train longer" not in str(diagnosed(hopeless)).lower()


def test_mismatched_names_the_channels_worst_first():
    layer, x = fitted(name="conv1.bn"), data(seed=9)
    x[:, 4] += 5 * 5  # 5 standard deviations
    x[:, 1] += 2 * 2
    x[:, 2] = (x[:, 2] - 2) * 10 + 2  # variance 100 times as large
    finding = diagnosed(layer, x, "mismatched")
    assert finding.channels == (2, 4, 1)
    assert finding.numbers["channels"] == 3
    assert finding.numbers["ratio"] == pytest.approx(100, rel=0.3)
    assert finding.numbers["distance"] < 1
    assert "3 of 6 channels" in finding.text and "channel 4: mean off by" in finding.text
    assert layer.recalibrate([x]).diagnose(x).ok
    smaller = diagnosed(fitted(), data(seed=9) * np.float32(0.1), "mismatched")
    assert "times as small" in smaller.text


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("running_mean", {3: np.nan}, "running_mean is nan in channel 3: calls in eval mode"),
        ("running_mean", {1: np.nan, 3: -np.inf}, "running_mean is nan, -inf in 2 channels (1, 3)"),
        ("running_var", {1: -1, 3: np.inf}, "running_var is -1, inf in 2 channels (1, 3)"),
    ],
)
def test_invalid_statistics(name, values, words):
    layer = fitted()
    for channel, value in values.items():
        getattr(layer, name)[channel] = value
    for found in (diagnosed(layer), diagnosed(layer, data(seed=9))):
        assert found.codes == ("invalid_statistics",)
        assert found.findings[0].channels == tuple(values) and words in str(found)


@pytest.mark.parametrize(("decay", "advised"), [(0.01, 0.99), (0.1, 0.9), (0.3, 0.9)])
def test_a_decay_that_is_a_momentum(decay, advised):
    layer = fitted(decay=decay)
    for found in (diagnosed(layer), diagnosed(layer, data(seed=9))):
        assert found.codes == ("short_average",) and found.findings[0].numbers == {"decay": decay}
        assert f"with decay={decay} the last batch weighs {100 - 100 * decay:g} %" in str(found)
        assert f"1 - momentum of PyTorch: use decay={advised:g}." in str(found)
    assert diagnosed(fitted(decay=0.9), data(seed=9)).codes[0] == "cold"


def test_a_batch_with_nan():
    x = data(seed=9)
    x[3, 2] = np.nan
    found = diagnosed(fitted(), x)
    assert found.codes == ("invalid_batch",) and found.findings[0].channels == (2,)
    assert "NaN or Inf in channel 2" in str(found)
    assert diagnosed(fitted(), x, mask=~np.isnan(x)).ok


def test_batches_left_out():
    layer = fitted(on_nonfinite="skip")
    layer(np.full((3, C), np.nan, np.float32))
    for found in (diagnosed(layer), diagnosed(layer, data(seed=9))):
        assert found.codes == ("skipped_batches",) and "1 batch with NaN or Inf left out" in str(found)
        assert found.findings[0].numbers == {"num_skipped": 1, "num_updates": 5}
    only = BatchNorm(C, on_nonfinite="skip")
    only(np.full((3, C), np.nan, np.float32))
    assert diagnosed(only).codes == ("never_updated",)
    assert "1 batch with NaN or Inf left out" in str(diagnosed(only))


def test_a_small_batch():
    finding = diagnosed(fitted(), data(9, seed=3), "small_batch")
    assert finding.numbers == {"count": 9, "mean_error": 1 / 3, "var_error": 0.5} and finding.channels == ()
    assert "9 values per channel: " in finding.text
    assert "0.33 of a standard deviation" in finding.text and "50 %" in finding.text
    assert "batch renormalisation" in finding.remedy
    assert "renormalisation" not in diagnosed(fitted(renorm=True), data(9, seed=3), "small_batch").remedy
    assert diagnosed(fitted(), data(1)).codes == ("small_batch",)
    parts = diagnosed(fitted(virtual_batch_size=8), data(seed=3), "small_batch")
    assert "a part of 8 samples has 8 values per channel" in parts.text


def test_the_values_of_each_channel_are_counted_apart():
    mask = np.ones((400, C), bool)
    mask[9:, 3], mask[20:, 5] = False, False
    finding = diagnosed(fitted(), data(seed=3), "small_batch", mask=mask)
    assert finding.channels == (3, 5) and finding.numbers["count"] == 9
    assert "has 9 values per channel in 2 channels (3, 5): " in finding.text
    mask[:, 3] = False  # no values tell nothing
    assert diagnosed(fitted(), data(seed=3), "small_batch", mask=mask).channels == (5,)
    weights = np.full(400, 1 / 400)  # what values weigh is not how many there are
    assert diagnosed(fitted(), data(seed=3), weights=weights).ok


def test_constant_and_dead_channels():
    x = data(seed=9)
    x[:, 1], x[:, 5] = 7, 0
    layer = BatchNorm(C, decay=None)
    layer(x)
    finding = diagnosed(layer, x, "constant_channels")
    assert finding.channels == (1, 5) and finding.numbers == {"channels": 2, "zero": 1}
    assert "2 channels (1, 5), 1 of them 0 everywhere" in finding.text


def test_eps_dominates():
    layer = BatchNorm(C, decay=None)
    x = data()
    x[:, 2] *= 1e-4  # variance 9e-8
    layer(x)
    for found in (diagnosed(layer), diagnosed(layer, x)):
        (finding,) = found
        assert finding.code == "eps_dominates" and finding.channels == (2,)
        assert finding.numbers["smallest_var"] == pytest.approx(9e-8, rel=0.2)
        out = np.sqrt(finding.numbers["smallest_var"] / (finding.numbers["smallest_var"] + 1e-5))
        assert f"standard deviation of {out:.3g} instead of 1" in finding.text
    y = layer(x, training=False)
    assert y[:, 2].std() == pytest.approx(out, rel=1e-2)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((40, C, 5), {}),
        ((40, 5, 5, C), {"channel_axis": -1}),
        ((C, 40), {"channel_axis": 0}),
        ((40, 5, C), {"data_format": "NLC"}),
    ],
)
def test_any_layout(shape, options):
    layer = BatchNorm(decay=None, **options)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    layer(x)
    assert diagnosed(layer, x).ok
    moved = np.moveaxis(x.copy(), layer.channel_axis, 0)
    moved[2] += 100
    bad = np.ascontiguousarray(np.moveaxis(moved, 0, layer.channel_axis))
    assert diagnosed(layer, bad, "mismatched").channels == (2,)


def test_several_channel_axes_are_counted_through():
    layer = BatchNorm((2, 3), channel_axis=(1, 2), decay=None)
    x = np.random.default_rng(0).normal(size=(400, 2, 3)).astype(np.float32)
    layer(x)
    x[:, 1, 0] += 100
    assert diagnosed(layer, x, "mismatched").channels == (3,)
    layer.running_var[1, 1] = -1
    assert diagnosed(layer, kind="invalid_statistics").channels == (4,)


@pytest.mark.parametrize("axis", [1, -1, 0])
def test_few_samples_of_many_values_prove_little(axis):
    """Neighbours are alike: two images may differ from the average by much."""
    layer, rng = BatchNorm(C, decay=None, channel_axis=axis), np.random.default_rng(1)
    layer(np.moveaxis(np.random.default_rng(0).normal(size=(400, C, 9)).astype(np.float32), 1, axis))
    x = (1.5 + rng.normal(size=(2, C, 1000))).astype(np.float32)
    assert diagnosed(layer, np.moveaxis(x, 1, axis)).ok
    many = np.moveaxis(np.repeat(x, 50, axis=0), 1, axis)
    assert diagnosed(layer, many).codes == ("mismatched",)


def test_inputs_that_cannot_be_diagnosed():
    layer = fitted()
    for x, error, match in (
        (np.ones((4, 7), np.float32), ValueError, "x has shape .* with 7 channels on axis 1, expected 6"),
        ([1.0], TypeError, "x is of type list"),
        (np.ones((0, C), np.float32), ValueError, r"x has shape \(0, 6\) and no values that count"),
        (np.ones((4, C), int), TypeError, "x has dtype int64"),
    ):
        with pytest.raises(error, match=match):
            layer.diagnose(x)


def test_findings_are_plain_data():
    finding = Finding("cold", "text", "Remedy", (1,), {"a": 1.0})
    assert finding == batchnorm.Finding("cold", "text", "Remedy", (1,), {"a": 1.0})
    assert str(finding) == "text. Remedy."
    assert str(Finding("fine", "text", layer="bn1")) == "bn1: text."


# ---- a network ---------------------------------------------------------------------------------------------


def network(**options):
    layers = {name: BatchNorm(C, name=f"own {name}", decay=None, **options) for name in ("bn1", "bn2", "bn3")}

    def forward(x):
        for layer in layers.values():
            x = np.maximum(layer(x), np.float32(-1))
        return x

    return layers, forward


def test_every_layer_of_a_network_is_looked_at():
    layers, forward = network()
    for seed in range(5):
        forward(data(seed=seed))
    batches, before = [data(n, seed=n) for n in (300, 100, 250)], [held(each) for each in layers.values()]
    found = diagnose(layers, forward, batches)
    assert found.ok and "the running statistics of 3 layers fit these batches" in str(found)
    assert diagnose(iter(layers.values()), forward, iter(batches)).ok
    assert [held(each) for each in layers.values()] == before
    layers["bn2"].running_mean += 3
    layers["bn3"].running_var[2] = np.nan
    found = diagnose(layers, forward, batches)
    assert [(f.layer, f.code) for f in found] == [("bn2", "mismatched"), ("bn3", "invalid_statistics")]
    assert sorted(found.findings[0].channels) == list(range(C))
    assert "bn2: the running statistics are not those" in str(found)
    assert [f.layer for f in diagnose(layers.values(), forward, batches)] == ["own bn2", "own bn3"]
    assert {layer.training for layer in layers.values()} == {True}
    recalibrate(layers, forward, batches)
    assert diagnose(layers, forward, batches).ok


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_a_fault_of_one_layer_is_not_that_of_those_behind_it(mode):
    layers, forward = network()
    for seed in range(5):
        forward(data(seed=seed))
    layers["bn1"].running_mean += 20
    for layer in layers.values():
        layer.train(mode != "eval")
        if mode == "frozen":
            layer.freeze()
    found = diagnose(layers, forward, [data(seed=9)])
    assert [(f.layer, f.code) for f in found] == [("bn1", "mismatched")]


def test_a_network_that_was_never_trained_and_a_layer_that_is_not_reached():
    layers, forward = network()
    spare = fitted()
    found = diagnose({**layers, "spare": spare}, forward, [data()])
    assert [(f.layer, f.code) for f in found] == [
        ("bn1", "never_updated"),
        ("bn2", "never_updated"),
        ("bn3", "never_updated"),
        ("spare", "not_reached"),
    ]
    assert all(layer.running.num_updates == 0 for layer in layers.values())
    assert diagnose([spare], forward, []).codes == ("not_reached",)


def test_batches_of_a_network_are_judged_by_their_size_not_their_number():
    layers, forward = network()
    for seed in range(5):
        forward(data(seed=seed))
    found = diagnose(layers, forward, [data(8, seed=seed) for seed in range(100)])
    assert set(found.codes) == {"small_batch"} and found.findings[0].numbers["count"] == 8


def test_a_failing_network_leaves_the_layers_as_they_were():
    layers, forward = network()
    forward(data())
    before = [held(layer) for layer in layers.values()]
    for bad in (lambda x: 1 / 0, 3):
        with pytest.raises((ZeroDivisionError, TypeError)):
            diagnose(layers, bad, [data()])
    with pytest.raises(TypeError, match=r"batches is of type numpy.ndarray"):
        diagnose(layers, forward, data())
    with pytest.raises(TypeError, match="layers come before forward and batches"):
        diagnose(forward, [data()], layers)
    assert [held(layer) for layer in layers.values()] == before
    forward(data())
    assert all(layer.running.num_updates == 2 for layer in layers.values())
