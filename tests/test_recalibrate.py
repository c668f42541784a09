"""Population statistics: those of one giant batch, whatever the batches; an error changes nothing."""

from __future__ import annotations

import itertools

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm, recalibrate

C = 3


def exact_data(n=96, dtype=np.float32):
    """Integers: sums of them and of their squares are exact in any order."""
    return np.random.default_rng(0).integers(-40, 41, (n, C, 4)).astype(dtype)


def cut(x, sizes):
    edges = np.cumsum([0, *sizes])
    assert edges[-1] == len(x)
    return [x[a:b] for a, b in itertools.pairwise(edges)]


def held(layer):
    return (
        {name: value.tobytes() for name, value in layer.state_dict().items()} if layer.num_features else None
    )


def trained(**options):
    layer = BatchNorm(C, **options)
    layer(exact_data(8))
    return layer


CUTS = [[96], [1] * 96, [50, 1, 45], [7, 89], [32] * 3]


@pytest.mark.parametrize("sizes", CUTS, ids=lambda s: f"{len(s)} batches")
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [lambda **o: BatchNorm(C, **o), lambda **o: BatchNorm(**o), trained])
def test_the_statistics_are_those_of_one_giant_batch(make, dtype, ddof, sizes):
    x = exact_data()
    layer = make(running_ddof=ddof, dtype=dtype)
    assert layer.recalibrate(iter(cut(x, sizes))) is layer
    n = x.size // C
    mean = x.sum(axis=(0, 2), dtype=np.float64) / n
    deviations = (x.astype(np.float64) ** 2).sum(axis=(0, 2)) - n * mean**2
    np.testing.assert_allclose(layer.running_mean, mean, rtol=2e-16 if dtype == np.float64 else 6e-8)
    np.testing.assert_allclose(
        layer.running_var, deviations / (n - ddof), rtol=1e-14 if dtype == np.float64 else 6e-8
    )
    assert (layer.num_updates, layer.num_samples, layer.initial_weight) == (len(sizes), n, 0.0)
    giant = make(running_ddof=ddof, dtype=dtype).recalibrate([x])
    assert layer.running_mean.tobytes() == giant.running_mean.tobytes()
    assert layer.running_var.tobytes() == giant.running_var.tobytes()
    y = layer.eval()(x)  # neither cold nor unknown
    assert y.shape == x.shape


@pytest.mark.parametrize("options", [{"axis": -1}, {"axis": 0}, {"data_format": "NLC"}], ids=str)
def test_any_layout(options):
    x = exact_data()
    layer = BatchNorm(C, **options)
    axis = layer.axis
    layer.recalibrate([np.moveaxis(part, 1, axis) for part in cut(x, [50, 46])])
    plain = BatchNorm(C).recalibrate([x])
    assert layer.running_var.tobytes() == plain.running_var.tobytes()


def test_training_goes_on_from_there():
    cumulative, alone = BatchNorm(C, decay=None), BatchNorm(C, decay=None)
    x = exact_data()
    cumulative.recalibrate([x[:64]])(x[64:])
    alone(x[:64])
    alone(x[64:])
    np.testing.assert_allclose(cumulative.running_mean, alone.running_mean, rtol=1e-6)
    assert cumulative.num_samples == alone.num_samples
    debiased = BatchNorm(C, zero_debias=True, decay=0.5).recalibrate([x[:64]])
    before = debiased.running_mean.copy()
    debiased(x[64:])  # one batch before: weights 1/3 and 2/3
    expected = before / 3 + 2 / 3 * x[64:].mean(axis=(0, 2))
    np.testing.assert_allclose(debiased.running_mean, expected, rtol=1e-5)


BAD = [
    (None, TypeError, "batches is None, expected an iterable"),
    (3, TypeError, "batches is 3"),
    (exact_data(), TypeError, r"batches is an array, .*; use recalibrate\(\[x\]\)"),
    ([], ValueError, "batches hold no values, expected at least one batch; the statistics are unchanged"),
    ([np.ones((0, C), np.float32)], ValueError, "batches hold no values"),
    ([np.ones((1, C), np.float32)], ValueError, "batches hold 1 value per channel, .*expected at least 2"),
    ([exact_data(), [1.0]], TypeError, "x is of type list"),
    ([exact_data(), np.ones((4, C + 1), np.float32)], ValueError, "4 channels"),
    ([exact_data(), exact_data() * np.float32(np.nan)], ValueError, "cannot be used: .* nan .*unchanged"),
    ([exact_data() * np.float32(1e25)], ValueError, "cannot be used: .*huge values"),
]


@pytest.mark.parametrize(("batches", "error", "match"), BAD, ids=[m[:30] for _, _, m in BAD])
def test_an_error_changes_nothing(batches, error, match):
    for layer in (trained(), BatchNorm()):
        before = held(layer), repr(layer)
        with pytest.raises(error, match=match):
            layer.recalibrate(batches)
        assert (held(layer), repr(layer)) == before
        if isinstance(batches, list):
            with pytest.raises(error), layer.recalibrating():
                for x in batches:
                    layer(x)
            if layer.num_features:
                assert held(trained()) == held(layer) or layer.num_updates == 0


def test_an_error_of_the_batches_changes_nothing():
    def failing():
        yield exact_data()
        raise ZeroDivisionError

    layer = trained()
    before = held(layer)
    with pytest.raises(ZeroDivisionError):
        layer.recalibrate(failing())
    assert held(layer) == before


# ---- inside a network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
def test_calls_collect_and_normalise_by_the_batch(mode):
    layer, x = BatchNorm(C).train(mode), exact_data()
    with layer.recalibrating() as inside:
        assert inside is layer
        for part in cut(x, [50, 46]):
            y = layer(part.copy(), out=None, training=mode)
            assert y.tobytes() == batchnorm.batch_norm_train(part, layer.gamma, layer.beta).y.tobytes()
            in_place = part.copy()
        assert layer.num_updates == 0
        with pytest.raises(ValueError, match=r"update is True inside recalibrating\(\)"):
            layer(x, update=True)
        with pytest.raises(RuntimeError, match=r"recalibrating\(\) inside recalibrating\(\)"):
            with layer.recalibrating():
                pass
        with pytest.raises(ValueError, match="residual"):  # a failed call is not counted
            layer(x, residual=x[:2])
    assert held(layer)["running_var"] == held(BatchNorm(C).recalibrate([x]))["running_var"]
    assert layer.num_updates == 2 and layer.training is mode
    with layer.recalibrating():  # x is measured before it is overwritten
        layer(in_place, out=in_place)
    assert held(layer)["running_var"] == held(BatchNorm(C).recalibrate([x[50:]]))["running_var"]


def test_a_frozen_layer_is_recalibrated_and_stays_frozen():
    layer = trained().freeze()
    with layer.recalibrating():
        layer(exact_data())
    assert layer.frozen and layer.num_updates == 1
    assert held(layer)["running_mean"] == held(BatchNorm(C).recalibrate([exact_data()]))["running_mean"]


def network(count=3):
    layers = [BatchNorm(C, activation="relu") for _ in range(count)]
    for i, layer in enumerate(layers):
        layer.gamma = np.arange(1, C + 1, dtype=np.float32) + i

    def forward(x):
        for layer in layers:
            x = layer(x)
        return x

    return layers, forward


def test_one_by_one_gives_the_statistics_that_eval_meets():
    x = np.random.default_rng(2).normal(size=(64, C, 4)).astype(np.float32)
    layers, forward = network()
    layers[1].freeze()
    layers[2].eval()
    recalibrate(forward, cut(x, [10, 50, 4]), layers, one_by_one=True)
    assert [(layer.training, layer.frozen) for layer in layers] == [
        (True, False),
        (True, True),
        (False, False),
    ]
    y = x
    for layer in layers:
        expected = BatchNorm(C).recalibrate(cut(y, [10, 50, 4]))
        np.testing.assert_allclose(layer.running_mean, expected.running_mean, rtol=1e-6)
        np.testing.assert_allclose(layer.running_var, expected.running_var, rtol=1e-6)
        y = layer(y, training=False)


def test_all_at_once_is_exact_for_the_first_layer():
    x = exact_data()
    layers, forward = network()
    recalibrate(forward, iter(cut(x, [50, 46])), layers)
    assert held(layers[0])["running_var"] == held(BatchNorm(C).recalibrate([x]))["running_var"]
    assert [layer.num_updates for layer in layers] == [2, 2, 2]
    once, _ = network()
    forward_once = lambda x: [layer(x) for layer in once]  # noqa: E731
    recalibrate(forward_once, [x], once)
    assert all(layer.num_samples == x.size // C for layer in once)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_an_error_in_the_network_changes_no_layer(one_by_one):
    x = exact_data()
    calls = 0
    for fail_at in (1, 3, 5):
        layers, forward = network()
        for layer in layers:
            layer(x)
        before, calls = [held(layer) for layer in layers], 0

        def failing(part):
            nonlocal calls
            calls += 1
            if calls == fail_at:  # noqa: B023
                raise ZeroDivisionError
            forward(part)  # noqa: B023

        if fail_at < 3 or one_by_one:
            with pytest.raises(ZeroDivisionError):
                recalibrate(failing, cut(x, [50, 46]), layers, one_by_one=one_by_one)
            assert [held(layer) for layer in layers] == before
            assert not any(layer._collector for layer in layers) and all(layer.training for layer in layers)
            layers[0](x)
            assert layers[0].num_updates == 2
    layers, forward = network()
    with pytest.raises(ValueError, match="batches hold no values"):  # one layer was never reached
        recalibrate(lambda x: layers[0](x), [x], layers, one_by_one=one_by_one)
    assert [layer.num_updates for layer in layers] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"forward": 3}, TypeError, "forward is 3 .*, expected a function of one batch"),
        ({"batches": 3}, TypeError, "batches is 3 .*, expected an iterable of batches"),
        ({"layers": [3]}, TypeError, "layers holds 3 .*, expected BatchNorm layers"),
        ({"one_by_one": 1}, TypeError, "one_by_one is 1"),
        ({"batches": iter([]), "one_by_one": True}, TypeError, "batches is an iterator, .*a pass for each"),
        ({"layers": [BatchNorm()], "one_by_one": True}, RuntimeError, "needs the channel count"),
    ],
)
def test_bad_arguments(arguments, error, match):
    layers, forward = network(1)
    good = {"forward": forward, "batches": [exact_data()], "layers": layers}
    with pytest.raises(error, match=match):
        recalibrate(**{**good, **arguments})
