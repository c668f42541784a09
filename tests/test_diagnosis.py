"""report() and diagnose(): every fault is told from the others, with its channels and numbers."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm

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


def diagnosed(layer, x=None, kind=None):
    """The diagnosis, after which nothing may have changed; and the finding of this kind."""
    known = layer.num_features is not None
    before = held(layer) if known else repr(layer)
    given = None if x is None else x.copy()
    found = layer.report() if x is None else layer.diagnose(x)
    assert (held(layer) if known else repr(layer)) == before
    assert x is None or x.tobytes() == given.tobytes()
    assert [f.code for f in found] == list(found.codes) and len(found) >= 1
    for finding in found:
        assert f"{finding.code}: {finding.text}. " in str(found) + " " or finding.code == "fine"
        assert bool(finding.remedy) == (finding.code != "fine")
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


@pytest.mark.parametrize("layer", [BatchNorm(), BatchNorm(C)], ids=["lazy", "known"])
def test_never_updated(layer):
    for found in (diagnosed(layer), diagnosed(layer, data())):
        assert found.codes == ("never_updated",)
        text = str(found)
        for remedy in ("recalibrate(batches)", "load a state", "running_mean and running_var never updated"):
            assert remedy in text
    assert diagnosed(BatchNorm(C, allow_initial_statistics=True)).ok


def test_cold_statistics_are_not_called_mismatched():
    """They differ wildly from the batch, but only because the initial values weigh so much."""
    layer = BatchNorm(C, decay=0.99)
    for seed in range(20):
        layer(data(seed=seed, shift=50))
    x = data(seed=99, shift=50)
    for found in (diagnosed(layer), diagnosed(layer, x)):
        assert found.codes == ("cold",)
        numbers = found.findings[0].numbers
        assert numbers["num_updates"] == 20 and numbers["updates_missing"] == 439
        assert numbers["recommended_decay"] == pytest.approx(0.01 ** (1 / 20))
        assert numbers["initial_weight"] == pytest.approx(0.99**20)
        assert "82 %" in str(found) and "439 more updates" in str(found) and "decay=0.794" in str(found)
    assert diagnosed(layer.recalibrate([x]), x).ok
    recommended = BatchNorm(C, decay=numbers["recommended_decay"])
    for seed in range(20):
        recommended(data(seed=seed))
    assert diagnosed(recommended, data(seed=99)).ok


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


def test_mismatched_names_the_channels_worst_first():
    layer, x = fitted(), data(seed=9)
    x[:, 4] += 5 * 5  # 5 standard deviations
    x[:, 1] += 2 * 2
    x[:, 2] = (x[:, 2] - 2) * 10 + 2  # variance 100 times as large
    finding = diagnosed(layer, x, "mismatched")
    assert finding.channels == (2, 4, 1)
    assert finding.numbers["channels"] == 3
    assert finding.numbers["ratio"] == pytest.approx(100, rel=0.3)
    assert finding.numbers["distance_max"] == pytest.approx(5, rel=0.1)
    assert "3 of 6 channels" in finding.text and "channel 4: mean off by" in finding.text
    assert "recalibrate(batches)" in finding.remedy
    assert layer.recalibrate([x]).diagnose(x).ok
    smaller = diagnosed(fitted(), data(seed=9) * np.float32(0.1), "mismatched")
    assert "times as small" in smaller.text


@pytest.mark.parametrize(
    ("name", "value"), [("running_mean", np.nan), ("running_var", -1), ("running_var", np.inf)]
)
def test_invalid_statistics(name, value):
    layer = fitted()
    getattr(layer, name)[[1, 3]] = value
    for found in (diagnosed(layer), diagnosed(layer, data(seed=9))):
        assert found.codes == ("invalid_statistics",)
        assert found.findings[0].channels == (1, 3)
        assert name in str(found) and "2 channels (1, 3)" in str(found) and f"{value:g}" in str(found)


def test_a_batch_with_nan():
    x = data(seed=9)
    x[3, 2] = np.nan
    found = diagnosed(fitted(), x)
    assert found.codes == ("invalid_batch",) and found.findings[0].channels == (2,)
    assert "NaN or Inf in channel 2" in str(found)


def test_batches_left_out():
    layer = fitted(on_nonfinite="skip")
    layer(np.full((3, C), np.nan, np.float32))
    for found in (diagnosed(layer), diagnosed(layer, data(seed=9))):
        assert found.codes == ("skipped_batches",) and "1 batch with NaN or Inf" in str(found)
        assert found.findings[0].numbers == {"num_skipped": 1, "num_updates": 5}
    only = BatchNorm(C, on_nonfinite="skip")
    only(np.full((3, C), np.nan, np.float32))
    assert diagnosed(only).codes == ("never_updated",)
    assert "1 batch with NaN or Inf were left out" in str(diagnosed(only))


def test_a_small_batch():
    finding = diagnosed(fitted(), data(9, seed=3), "small_batch")
    assert finding.numbers == {"count": 9, "mean_error": 1 / 3, "var_error": 0.5}
    assert "0.33 standard deviations" in finding.text and "50 %" in finding.text
    assert "batch renormalisation" in finding.remedy
    assert diagnosed(fitted(), data(1)).codes == ("small_batch",)


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
        ((40, 5, 5, C), {"axis": -1}),
        ((C, 40), {"axis": 0}),
        ((40, 5, C), {"data_format": "NLC"}),
    ],
)
def test_any_layout(shape, options):
    layer = BatchNorm(decay=None, **options)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    layer(x)
    assert diagnosed(layer, x).ok
    moved = np.moveaxis(x.copy(), layer.axis, 0)
    moved[2] += 100
    bad = np.ascontiguousarray(np.moveaxis(moved, 0, layer.axis))
    assert diagnosed(layer, bad, "mismatched").channels == (2,)


def test_few_samples_of_many_values_prove_little():
    """Neighbours are alike: two images may differ from the average by much."""
    layer = BatchNorm(C, decay=None)
    layer(np.random.default_rng(0).normal(size=(400, C, 9)).astype(np.float32))
    x = np.full((2, C, 1000), 1.5, np.float32) + np.random.default_rng(1).normal(size=(2, C, 1000)).astype(
        "f4"
    )
    assert diagnosed(layer, x).ok
    assert diagnosed(layer, np.repeat(x, 50, axis=0)).codes == ("mismatched",)


def test_inputs_that_cannot_be_diagnosed():
    layer = fitted()
    for x, error, match in (
        (np.ones((4, 7), np.float32), ValueError, "x has 7 channels on axis 1"),
        ([1.0], TypeError, "x is of type list"),
        (np.ones((0, C), np.float32), ValueError, r"x has shape \(0, 6\), which holds no values"),
        (np.ones((4, C), int), TypeError, "x has dtype int64"),
    ):
        with pytest.raises(error, match=match):
            layer.diagnose(x)


def test_findings_are_plain_data():
    finding = batchnorm.Finding("cold", "text", "remedy", (1,), {"a": 1.0})
    assert finding == batchnorm.Finding("cold", "text", "remedy", (1,), {"a": 1.0})
    assert str(finding) == "text. remedy."
    assert str(batchnorm.Finding("fine", "text")) == "text."
