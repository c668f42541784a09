"""What the layer's tools do where options meet: schedules, recalibration and renorm, history."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm, ColdStatisticsWarning, recalibrate

C = 3


@pytest.fixture
def data():
    return np.random.default_rng(5).normal(50, 5, (64, C)).astype(np.float32)


def test_cold_words_of_a_cumulative_average(data):
    layer = BatchNorm(C)
    layer(data)
    layer.decay = None
    with pytest.warns(ColdStatisticsWarning, match=r"decay=None .* 90 %; 5696 more values per channel"):
        layer(data, training=False)
    (finding,) = layer.report()
    assert finding.code == "cold" and finding.numbers["values_missing"] == pytest.approx(5696)
    assert "decay" not in finding.remedy and "zero_debias" not in finding.remedy


def test_cold_words_of_a_warm_up_say_how_many_updates_it_takes(data):
    layer = BatchNorm(C, decay=0.999, warmup=True)
    layer(data)
    (finding,) = layer.report()
    assert "zero_debias" not in finding.remedy and "None" not in finding.remedy
    for _ in range(int(finding.numbers["updates_missing"]) - 1):
        layer(data)
    assert layer.initial_weight > 0.01
    layer(data)
    assert layer.initial_weight <= 0.01


def test_a_decay_of_one_is_not_told_to_train_longer(data):
    layer = BatchNorm(C, decay=1.0)
    layer(data)
    assert "rain longer" not in str(layer.report()) and "no update changes that" in str(layer.report())


@pytest.mark.parametrize("options", [{}, {"decay": 0.99}])
def test_recalibrating_behind_renorm_is_by_the_batch(data, options):
    first = BatchNorm(C, decay=None, renorm={"rmax": 3.0, "dmax": 5.0, **options})
    second = BatchNorm(C)
    for _ in range(5):
        second(first(data * np.float32(0.02)))  # statistics that are about to be replaced
    recalibrate(lambda x: second(first(x)), [data], [first, second])
    z = first(data, training=False)
    np.testing.assert_allclose(second.running_mean, z.mean(axis=0), atol=1e-4)
    if options:
        np.testing.assert_allclose(first.renorm_mean, data.mean(axis=0, dtype=np.float64), rtol=1e-6)
        want = np.sqrt(data.var(axis=0, dtype=np.float64) + first.eps)
        np.testing.assert_allclose(first.renorm_std, want, rtol=1e-6)
    y = first(data, update=False)
    np.testing.assert_allclose(y, z, atol=0.05)  # training goes by the new ones too, with n for n - 1


def test_recalibrate_says_what_is_wrong_with_layers(data):
    layer = BatchNorm(C)
    for layers, error, match in (
        (layer, TypeError, r"layers is a BatchNorm, .* use \[layer\]"),
        ([], ValueError, "layers holds no layer"),
        ([layer, layer], ValueError, "a layer twice"),
    ):
        with pytest.raises(error, match=match):
            recalibrate(layer, [data], layers)
    assert layer.num_updates == 0


def test_a_bad_batch_of_a_renorm_layer_is_explained(data):
    layer = BatchNorm(C, renorm=True)
    bad = data.copy()
    bad[0, 1] = np.nan
    layer(bad)
    with pytest.raises(ValueError, match=r"running_mean is nan at channel 1.*recalibrate"):
        layer(data)


def test_an_applied_residual_has_its_gradient(data):
    layer, z = BatchNorm(C, activation="relu"), np.ones_like(data)
    result = layer.apply(layer.state_dict(), data, residual=z)
    gradients = result.backward(z)
    assert np.array_equal(gradients.dresidual, z * (result.y > 0))
    assert type(layer.apply(layer.state_dict(), data).backward(z)) is batchnorm.Gradients


def test_initial_statistics_are_allowed_only_while_the_setting_says_so(data):
    layer = BatchNorm(C, allow_initial_statistics=True)
    layer(data, training=False)
    assert "allowed" in str(layer.report())
    layer.allow_initial_statistics = False
    with pytest.raises(RuntimeError, match="still the initial ones"):
        layer(data, training=False)


def test_diagnose_looks_at_what_counts():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (40, 9, C)).astype(np.float32)
    lengths = rng.integers(1, 10, 40)
    x[np.arange(9) >= lengths[:, None]] = np.nan
    layer = BatchNorm(C, zero_debias=True, axis=-1)
    layer(x, lengths=lengths)
    found = layer.diagnose(x, lengths=lengths)
    assert found.codes == ("fine",) and found.findings[0].numbers["count"] == lengths.sum()
    assert "invalid_batch" in layer.diagnose(x).codes
    with pytest.raises(ValueError, match="drop one of them"):
        layer.diagnose(x, lengths=lengths, mask=np.ones((40, 9), bool))


def test_a_rollback_takes_its_updates_out_of_the_history(data):
    layer = BatchNorm(C, history=10)
    layer(data)
    before = layer.snapshot()
    layer(data * np.float32(1e6))
    layer.rollback(before)
    layer(data)
    assert layer.history.steps.tolist() == [1, 2]
    assert layer.history.batch_mean.max() < 100


def test_the_history_of_parts_has_the_variance_that_was_taken(data):
    layer = BatchNorm(C, virtual_batch_size=4, history=5, decay=0.0)
    layer(data)
    np.testing.assert_allclose(layer.history.batch_var, layer.history.running_var, rtol=1e-6)


def test_a_state_that_says_a_part_of_renorm_keeps_the_rest():
    layer = BatchNorm(C, renorm={"rmin": 0.5, "rmax": 3.0})
    layer.load_state_dict({"renorm_rmax": 2.0}, strict=False)
    assert (layer.renorm["rmin"], layer.renorm["rmax"]) == (0.5, 2.0)


def test_the_sum_of_weights_is_as_exact_as_the_sums_it_divides():
    x = np.random.default_rng(0).standard_normal((200_000, 1))
    even, plain = batchnorm.moments(x, weights=np.full(len(x), 0.1)), batchnorm.moments(x)
    np.testing.assert_allclose(even.var, plain.var, rtol=2e-14)
