"""Population statistics: those of one giant batch, whatever the batches; an error changes nothing."""

from __future__ import annotations

import itertools

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm, Moments, freeze, no_update, recalibrate

pytestmark = pytest.mark.quick

C = 3


def exact_data(n=96, dtype=np.float32):
    """Integers: sums of them and of their squares are exact in any order."""
    return np.random.default_rng(0).integers(-40, 41, (n, C, 4)).astype(dtype)


def cut(x, sizes):
    edges = np.cumsum([0, *sizes])
    assert edges[-1] == len(x)
    return [x[a:b] for a, b in itertools.pairwise(edges)]


def held(layer):
    """The state as bytes."""
    known = layer.num_features is not None
    return {name: value.tobytes() for name, value in layer.state_dict().items()} if known else None


def vectors(layer):
    return layer.running_mean.tobytes(), layer.running_var.tobytes()


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
    running = layer.running
    assert running.num_updates == len(sizes) and running.num_values.tolist() == [n] * C
    assert running.initial_weight.tolist() == [0] * C
    giant = make(running_ddof=ddof, dtype=dtype).recalibrate([x])
    assert vectors(layer) == vectors(giant)
    y = layer.eval()(x)  # neither cold nor unknown
    assert y.shape == x.shape


@pytest.mark.parametrize(
    "options", [{"channel_axis": -1}, {"channel_axis": 0}, {"data_format": "NLC"}], ids=str
)
def test_any_layout(options):
    x = exact_data()
    layer = BatchNorm(C, **options)
    axis = layer.channel_axis
    layer.recalibrate([np.moveaxis(part, 1, axis) for part in cut(x, [50, 46])])
    assert vectors(layer) == vectors(BatchNorm(C).recalibrate([x]))


def test_several_channel_axes_and_integers():
    x = exact_data()
    several = BatchNorm(channel_axis=(1, 2)).recalibrate(cut(x, [50, 46]))
    assert several.num_features == (C, 4)
    np.testing.assert_allclose(several.running_mean, x.mean(axis=0), rtol=1e-6)
    pixels = (x + 40).astype(np.uint8)
    assert vectors(BatchNorm(C).recalibrate([pixels])) == vectors(BatchNorm(C).recalibrate([x + 40]))


def test_a_moments_is_as_good_as_its_batches():
    x, mask = exact_data(), np.random.default_rng(1).random((96, C, 4)) < 0.7
    total = Moments()
    for part, counting in zip(cut(x, [50, 46]), cut(mask, [50, 46]), strict=True):
        total.update(part, mask=counting)
    for layer in (BatchNorm(C), BatchNorm(), trained()):
        assert layer.recalibrate(total) is layer
        assert layer.running.num_values.tolist() == mask.sum(axis=(0, 2)).tolist()
        assert layer.running.num_updates == 1
    values = [x[:, c][mask[:, c]] for c in range(C)]
    np.testing.assert_allclose(layer.running_mean, [v.mean() for v in values], rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, [v.var(ddof=1) for v in values], rtol=1e-6)
    assert total.counts.sum() == mask.sum()  # it stays as it is


def test_channels_without_values_keep_what_they_had():
    x = exact_data()
    few = Moments().update(x, mask=np.arange(C).reshape(1, C, 1) != 1)
    layer, new = trained(), BatchNorm(C).recalibrate(few)
    before = layer.running_mean[1], layer.running_var[1]
    layer.recalibrate(few)
    assert (layer.running_mean[1], layer.running_var[1]) == before
    assert layer.running.initial_weight.tolist() == [0, 0.9, 0]
    assert layer.running.num_values.tolist() == [384, 32, 384]
    assert new.running.untouched().tolist() == [False, True, False]
    with pytest.raises(RuntimeError, match="never updated in channel 1"):
        new.eval()(x)
    state = layer.state_dict()
    assert held(BatchNorm(C).load_state_dict(state)) == held(layer)


def test_two_values_are_enough():
    x = exact_data()[:2, :, 0]
    layer = BatchNorm(C).recalibrate([x])
    np.testing.assert_allclose(layer.running_mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, x.var(0, ddof=1), rtol=1e-6)


def test_training_goes_on_from_there():
    cumulative, alone = BatchNorm(C, decay=None), BatchNorm(C, decay=None)
    x = exact_data()
    cumulative.recalibrate([x[:64]])(x[64:])
    alone(x[:64])
    alone(x[64:])
    np.testing.assert_allclose(cumulative.running_mean, alone.running_mean, rtol=1e-6)
    assert cumulative.running.num_values.tolist() == alone.running.num_values.tolist()
    debiased = BatchNorm(C, zero_debias=True, decay=0.5).recalibrate([x[:64]])
    before = debiased.running_mean.copy()
    debiased(x[64:])  # one batch before: weights 1/3 and 2/3
    expected = before / 3 + 2 / 3 * x[64:].mean(axis=(0, 2))
    np.testing.assert_allclose(debiased.running_mean, expected, rtol=1e-5)


def test_the_reference_of_renorm_is_replaced_too():
    x = exact_data()
    layer = trained(renorm={"decay": 0.5}, eps=1e-3).recalibrate([x])
    np.testing.assert_allclose(layer.renorm_mean, x.mean(axis=(0, 2)), rtol=1e-6)
    np.testing.assert_allclose(layer.renorm_std, np.sqrt(x.var(axis=(0, 2)) + 1e-3), rtol=1e-6)


BAD = [
    (None, TypeError, "batches is None, expected an iterable"),
    (3, TypeError, "batches is 3"),
    (exact_data(), TypeError, r"batches is of type numpy.ndarray, expected .*, such as \[x\], or a Moments"),
    ([], ValueError, "batches hold no values, expected at least one batch; the statistics are unchanged"),
    ([np.ones((0, C), np.float32)], ValueError, "batches hold no values"),
    ([np.ones((1, C), np.float32)], ValueError, "batches hold 1 values per channel, .*expected at least 2"),
    ([exact_data(), [1.0]], TypeError, "x is of type list"),
    (
        [exact_data(), np.ones((4, 5), np.float32)],
        ValueError,
        r"x has shape \(4, 5\) with 5 channels on axis 1",
    ),
    ([exact_data(), exact_data() * np.float32(np.nan)], ValueError, "mean is nan at channel 0, .*unchanged"),
    ([exact_data() * np.float32(1e25)], ValueError, "variance is inf at channel 0, .*huge values"),
]


@pytest.mark.parametrize(("batches", "error", "match"), BAD, ids=[m[:30] for _, _, m in BAD])
def test_an_error_changes_nothing(batches, error, match):
    for layer in (trained(name="bn1"), BatchNorm()):
        before = held(layer), repr(layer)
        with pytest.raises(error, match=match):
            layer.recalibrate(batches)
        assert (held(layer), repr(layer)) == before
        if isinstance(batches, list) and layer.num_features:
            with pytest.raises(error), layer.recalibrating():
                for x in batches:
                    layer(x)
            assert (held(layer), repr(layer)) == before


def test_moments_that_do_not_fit_change_nothing():
    layer = trained(name="bn1")
    before = held(layer)
    for moments, match in (
        (Moments(), "bn1: batches hold no values"),
        (
            Moments().update(exact_data()[:, :2]),
            r"bn1: the Moments has 2 channels, expected 3, the num_",
        ),
        (Moments().update(exact_data()[:1, :, :1]), "bn1: batches hold 1 values"),
    ):
        with pytest.raises(ValueError, match=match):
            layer.recalibrate(moments)
    with pytest.raises(TypeError, match=r"group is of type object, expected None or .*allgather"):
        layer.recalibrate([exact_data()], group=object())
    assert held(layer) == before


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
        assert layer.running.num_updates == 0
        with pytest.raises(ValueError, match=r"update is True inside"):
            layer(x, update=True)
        with pytest.raises(RuntimeError, match=r"inside"):
            with layer.recalibrating():
                pass
        with pytest.raises(ValueError, match="residual"):  # a failed call is not counted
            layer(x, residual=x[:2])
    assert vectors(layer) == vectors(BatchNorm(C).recalibrate([x]))
    assert layer.running.num_updates == 2 and layer.training is mode
    with layer.recalibrating():  # x is measured before it is overwritten
        layer(in_place, out=in_place)
    assert vectors(layer) == vectors(BatchNorm(C).recalibrate([x[50:]]))


def test_positions_of_the_calls_count():
    x, lengths = exact_data(), np.random.default_rng(0).integers(1, 5, 96)
    weights = np.random.default_rng(1).random(96)
    layer = trained()
    with layer.recalibrating():
        layer(x, lengths=lengths)
    assert vectors(layer) == vectors(BatchNorm(C).recalibrate(Moments().update(x, lengths=lengths)))
    with layer.recalibrating():
        layer(x, weights=weights)
    assert vectors(layer) == vectors(BatchNorm(C).recalibrate(Moments().update(x, weights=weights)))
    np.testing.assert_allclose(layer.running.num_values, 4 * weights.sum())


def test_a_frozen_layer_is_recalibrated_and_stays_frozen():
    layer = trained().freeze()
    with layer.recalibrating():
        layer(exact_data())
    assert layer.frozen and layer.running.num_updates == 1
    assert vectors(layer) == vectors(BatchNorm(C).recalibrate([exact_data()]))


def network(count=3, **options):
    layers = [BatchNorm(C, activation="relu", **options) for _ in range(count)]
    for i, layer in enumerate(layers):
        layer.gamma = np.arange(1, C + 1, dtype=np.float32) + i

    def forward(x):
        for layer in layers:
            x = layer(x)
        return x

    return layers, forward


@pytest.mark.parametrize(
    "options", [{}, {"renorm": True}, {"renorm": {"decay": 0.5}}, {"virtual_batch_size": 7}], ids=str
)
def test_one_by_one_gives_the_statistics_that_eval_meets(options):
    x = np.random.default_rng(2).normal(size=(64, C, 4)).astype(np.float32)
    layers, forward = network(**options)
    layers[1].freeze()
    layers[2].eval()
    recalibrate(layers, forward, cut(x, [10, 50, 4]), one_by_one=True)
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
    recalibrate(
        {"first": layers[0], "second": layers[1], "third": layers[2]}, forward, iter(cut(x, [50, 46]))
    )
    assert vectors(layers[0]) == vectors(BatchNorm(C).recalibrate([x]))
    assert [layer.running.num_updates for layer in layers] == [2, 2, 2]
    once, _ = network()
    recalibrate(iter(once), lambda x: [layer(x) for layer in once], [x])
    assert all(layer.running.num_values.tolist() == [x.size // C] * C for layer in once)
    lazy = [BatchNorm(), BatchNorm()]
    recalibrate(lazy, lambda x: lazy[1](lazy[0](x)), [x])
    assert vectors(lazy[0]) == vectors(layers[0])


@pytest.mark.parametrize("one_by_one", [True, False])
def test_layers_that_share_statistics_get_those_of_all_their_inputs(one_by_one):
    x = exact_data()
    first = BatchNorm(C)
    second = first.clone(share="stats")
    recalibrate([first, second], lambda x: (first(x), second(x + 8)), cut(x, [50, 46]), one_by_one=one_by_one)
    expected = BatchNorm(C).recalibrate([x, x + 8])
    assert vectors(first) == vectors(second) == vectors(expected)
    assert second.running is first.running


def test_a_lazy_layer_stays_lazy_after_an_error():
    lazy, x = BatchNorm(), exact_data()
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="a batch holds NaN"):
        recalibrate([lazy], lazy, [x])
    assert lazy.num_features is None


@pytest.mark.parametrize("one_by_one", [True, False])
def test_an_error_in_the_network_changes_no_layer(one_by_one):
    x = exact_data()
    for fail_at in (1, 3, 5):
        layers, forward = network()
        for layer in layers:
            layer(x)
        before, calls = [held(layer) for layer in layers], iter(range(1, 100))

        def failing(part, forward=forward, calls=calls, fail_at=fail_at):
            if next(calls) == fail_at:
                raise ZeroDivisionError
            forward(part)

        if fail_at < 3 or one_by_one:
            with pytest.raises(ZeroDivisionError):
                recalibrate(layers, failing, cut(x, [50, 46]), one_by_one=one_by_one)
            assert [held(layer) for layer in layers] == before
            layers[0](x)  # updates again
            assert layers[0].running.num_updates == 2
    layers, forward = network()
    with pytest.raises(ValueError, match=r"layers\[1\]: batches hold no values"):  # it was never reached
        recalibrate(layers, lambda x: layers[0](x), [x], one_by_one=one_by_one)
    with pytest.raises(ValueError, match=r"conv2: batches hold no values"):
        recalibrate(dict(zip(("conv1", "conv2", "conv3"), layers, strict=True)), layers[0], [x])
    assert [layer.running.num_updates for layer in layers] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"forward": 3}, TypeError, "forward is 3 .*, expected a function of one batch"),
        ({"batches": 3}, TypeError, "batches is 3 .*, expected an iterable of batches"),
        ({"batches": exact_data()}, TypeError, r"batches is of type numpy.ndarray, .*such as \[x\]"),
        ({"layers": [3]}, TypeError, "layers holds 3 .*, expected an iterable of BatchNorm layers"),
        ({"layers": []}, ValueError, "layers is empty, expected an iterable of BatchNorm layers"),
        ({"layers": BatchNorm(C)}, TypeError, r"layers is of type batchnorm.BatchNorm, .*; use \[layer\]"),
        ({"layers": len}, TypeError, "layers is .*; layers come before forward and batches"),
        ({"layers": [BatchNorm]}, TypeError, "layers holds of type type"),
        ({"one_by_one": 1}, TypeError, "one_by_one is 1"),
        ({"batches": iter([]), "one_by_one": True}, TypeError, "batches is an iterator, .*a pass for each"),
        ({"group": object()}, TypeError, "group is of type object, expected None or"),
        ({"layers": [BatchNorm()], "one_by_one": True}, RuntimeError, "needs the channel count"),
    ],
)
def test_bad_arguments(arguments, error, match):
    layers, forward = network(1)
    good = {"forward": forward, "batches": [exact_data()], "layers": layers}
    with pytest.raises(error, match=match):
        recalibrate(**{**good, **arguments})
    assert layers[0].running.num_updates == 0


def test_what_layers_are_called():
    layer = BatchNorm(C, name="bn")
    with pytest.raises(ValueError, match=r"layers holds a layer twice, again at 2"):
        freeze([layer, BatchNorm(C), layer])
    same = [BatchNorm(C, name="bn"), BatchNorm(C, name="bn")]
    with pytest.raises(ValueError, match=r"^layers\[1\]: batches hold no values"):
        recalibrate(same, same[0], [exact_data()])


def test_a_layer_by_itself_needs_no_name():
    for layer, who in ((BatchNorm(C), ""), (BatchNorm(C, name="bn"), "bn: ")):
        for call in (lambda layer=layer: layer.recalibrate([]), lambda layer=layer: nothing(layer)):
            with pytest.raises(ValueError, match=f"^{who}batches hold no values"):
                call()


def nothing(layer):
    with layer.recalibrating():
        pass


def test_no_update_and_freeze_of_a_network():
    x = exact_data()
    layers, forward = network()
    with no_update(layers):
        forward(x)
        with pytest.raises(ValueError, match=r"no_update\(\)"):
            layers[1](x, update=True)
    assert [layer.running.num_updates for layer in layers] == [0, 0, 0]
    forward(x)
    with pytest.raises(ZeroDivisionError), no_update({"a": layers[0], "b": layers[1]}):
        raise ZeroDivisionError
    forward(x)
    assert [layer.running.num_updates for layer in layers] == [2, 2, 2]
    assert freeze(layers) is None and all(layer.frozen for layer in layers)
    with pytest.raises(TypeError, match="layers holds 3"):
        freeze([BatchNorm(C), 3])
    with pytest.raises(TypeError, match="layers holds 3"), no_update([layers[0], 3]):
        pass
