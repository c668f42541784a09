"""batchnorm.keras: a stock Keras model diagnosed, recalibrated and folded, on backends that are installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

# Keras reads it once; its own default is TensorFlow, which may be missing.
_BACKENDS = [name for name in ("torch", "jax", "tensorflow") if importlib.util.find_spec(name)]
if _BACKENDS:
    os.environ.setdefault("KERAS_BACKEND", _BACKENDS[0])
    keras = pytest.importorskip("keras", reason="keras is not installed (extra keras)")
else:
    pytest.skip("no backend of Keras is installed (torch, jax or tensorflow)", allow_module_level=True)

import batchnorm.keras  # noqa: E402
from keras import layers as k  # noqa: E402

diagnose, recalibrate, fold = batchnorm.keras.diagnose, batchnorm.keras.recalibrate, batchnorm.keras.fold
# Keras makes arrays of PyTorch's tensors in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
NAMES = ["first", "up", "deep", "last"]


def small(momentum=0.9, **options):
    """Branches, a depthwise and a transposed convolution, a dense layer; gamma and beta are not 1 and 0."""
    keras.utils.set_random_seed(0)

    def norm(name):
        start = keras.initializers.RandomUniform(0.5, 1.5, seed=len(name))
        return k.BatchNormalization(
            momentum=momentum, name=name, gamma_initializer=start, beta_initializer=start, **options
        )

    i = keras.Input((12, 12, 3))
    x = k.ReLU()(norm("first")(k.Conv2D(6, 3, name="conv", use_bias=False)(i)))
    y = norm("deep")(k.DepthwiseConv2D(3, depth_multiplier=2)(x))
    z = k.Cropping2D(2)(norm("up")(k.Conv2DTranspose(12, 3)(x)))
    x = k.GlobalAveragePooling2D()(k.Add()([y, z]))
    return keras.Model(i, norm("last")(k.Dense(5)(x)))


def images(n=200, seed=0, shift=5):
    return np.random.default_rng(seed).normal(shift, 3, (n, 12, 12, 3)).astype(np.float32)


def norms(model):
    return {layer.name: layer for layer in model.layers if isinstance(layer, k.BatchNormalization)}


def held(model):
    weights = [np.asarray(keras.ops.convert_to_numpy(w)).tobytes() for w in model.weights]
    return weights, ["call" in vars(layer) for layer in model.layers], [x.trainable for x in model.layers]


def output(model, x):
    return np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))


def met(model, batches):
    """Mean and variance of what reaches each batch norm in inference."""
    found = {}
    for name, layer in norms(model).items():
        part = keras.Model(model.inputs[0], layer.input)
        x = np.concatenate([output(part, b) for b in batches]).astype(np.float64)
        x = x.reshape(-1, x.shape[-1])
        found[name] = x.mean(axis=0), x.var(axis=0)
    return found


def test_a_model_is_diagnosed_and_nothing_changes():
    model = small()
    before = held(model)
    found = diagnose(model, [images()])
    assert [(f.layer, f.code) for f in found] == [(name, "never_updated") for name in NAMES]
    assert "batchnorm.keras.recalibrate(model, batches)" in str(found) and "decay" not in str(found)
    assert held(model) == before and [each.layer for each in found.compared] == NAMES


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (
            lambda b: b.moving_variance.assign([-1.0, *[1.0] * 11]),
            "invalid_statistics",
            "running_var is -1 in",
        ),
        (lambda b: b.moving_mean.assign([9.0, *[0.0] * 11]), "mismatched", "channel 0: mean off by"),
        (lambda b: setattr(b, "trainable", False), "frozen", "trainable=False in a model that trains"),
    ],
)
def test_each_fault_is_told_with_its_layer(fault, code, words):
    model = small()
    recalibrate(model, [images()])
    fault(norms(model)["deep"])
    before = held(model)
    found = [f for f in diagnose(model, [images(seed=9)]) if f.layer == "deep"]
    assert held(model) == before and code in [f.code for f in found] and words in str(found[0])
    assert {f.code for f in diagnose(model, [images(seed=9)]) if f.layer != "deep"} <= {"fine"}


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_trained_for_a_few_steps_is_cold():
    """Of a trained model `optimizer.iterations` tells how much the initial values still weigh."""
    model = small(momentum=0.999)
    model.compile("sgd", "mse", jit_compile=False)
    model.optimizer.learning_rate = 0.0
    x = images(64)
    for _ in range(20):
        model.train_on_batch(x, np.zeros((64, 5), np.float32))
    found = diagnose(model, [x])
    assert [f.code for f in found if f.layer == "first"] == ["cold"]
    assert "after 20 updates with momentum=0.999 the initial values still weigh 98 %" in str(found)
    recalibrate(model, [x])
    assert diagnose(model, [x]).ok


def test_each_layer_has_exactly_what_it_meets():
    model, batches = small(), [images(101)[i : i + 16] + np.float32(i / 20) for i in range(0, 101, 16)]
    before = held(model)
    recalibrate(model, batches)
    assert held(model)[1:] == before[1:]
    for name, (mean, var) in met(model, batches).items():
        layer = norms(model)[name]
        moving = (
            np.asarray(keras.ops.convert_to_numpy(v)) for v in (layer.moving_mean, layer.moving_variance)
        )
        for got, want, scale in zip(moving, (mean, var), (np.sqrt(var), var), strict=True):
            assert (np.abs(got - want) / scale).max() < 1e-4, name
    assert diagnose(model, [np.concatenate(batches)]).ok
    one_pass = small()
    recalibrate(one_pass, iter(batches), one_by_one=False)
    off = [
        np.abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(one_pass.get_weights(), model.get_weights(), strict=True)
    ]
    assert max(off) > 1e-3


def test_a_layer_that_the_first_batch_does_not_reach():
    """Batches of one side go through one more layer before the last one."""
    i, last, side = keras.Input((3,)), k.BatchNormalization(), k.BatchNormalization()
    model, x = keras.Model(i, [last(i), side(i)]), np.random.default_rng(0).normal(size=(90, 3))
    batches = [each.astype(np.float32) for each in (x, x + 1, x * 2 + 9, x + 11)]

    def before(x):
        return output(side, x) ** 3 if x.mean() > 5 else x

    recalibrate(model, batches, forward=lambda x: last(before(x), training=False))
    met = np.concatenate([before(batch) for batch in batches])
    for variable, want in zip(last.weights[2:], (met.mean(axis=0), met.var(axis=0)), strict=True):
        np.testing.assert_allclose(np.asarray(keras.ops.convert_to_numpy(variable)), want, rtol=1e-4)


def test_statistics_beyond_the_range_of_float16_change_nothing():
    model = keras.Sequential([keras.Input((3,)), k.BatchNormalization(dtype="float16", name="bn")])
    before, x = held(model), np.random.default_rng(0).normal(0, 1e3, (99, 3)).astype(np.float16)
    with pytest.raises(ValueError, match=r"bn: moving_variance does not fit float16, .* in float32, a layer"):
        recalibrate(model, [x])
    assert held(model) == before


def test_masked_steps_do_not_count():
    i = keras.Input((7, 2))
    model = keras.Model(i, k.BatchNormalization(name="bn")(k.Masking(0.0)(i)))
    x = np.random.default_rng(0).normal(3, 1, (50, 7, 2)).astype(np.float32)
    x[:, 4:] = 0
    recalibrate(model, [x])
    got = np.asarray(keras.ops.convert_to_numpy(norms(model)["bn"].moving_mean))
    np.testing.assert_allclose(got, x[:, :4].mean(axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize("example", [None, images(3)], ids=["random", "example"])
def test_fold(example):
    model = small()
    recalibrate(model, [images()])
    before = held(model)
    folded = fold(model, example)
    assert held(model) == before
    kinds = [type(layer).__name__ for layer in folded.layers]
    assert kinds.count("Identity") == 4 and "BatchNormalization" not in kinds
    want, got = output(model, images(5)), output(folded, images(5))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_fold_of_a_sequential_model():
    model = keras.Sequential(
        [
            keras.Input((None, 4)),
            k.Conv1D(4, 3, groups=2),
            k.BatchNormalization(scale=False),
            k.Activation("tanh"),
        ]
    )
    model.layers[1].moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    folded = fold(model)
    x = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    np.testing.assert_allclose(output(folded, x), output(model, x), atol=1e-5)
    assert type(folded.layers[1]) is k.Identity


def test_fold_with_channels_first():
    layers = [k.Conv2D(8, 3, data_format="channels_first"), k.BatchNormalization(axis=1), k.ReLU()]
    model = keras.Sequential([keras.Input((3, 9, 7)), *layers])
    rng = np.random.default_rng(0)
    layers[1].set_weights([rng.uniform(0.5, 1.5, 8).astype(np.float32) for _ in range(4)])
    folded = fold(model)
    assert type(folded.layers[1]) is k.Identity
    x = rng.normal(size=(4, 3, 9, 7)).astype(np.float32)
    np.testing.assert_allclose(output(folded, x), output(model, x), atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "mixed_float16", "float16", "float64"])
@pytest.mark.parametrize("bias", [True, False])
def test_fold_in_other_dtypes(policy, bias):
    options = {"dtype": policy}
    layers = [k.Conv2D(8, 3, use_bias=bias, **options), k.BatchNormalization(**options), k.ReLU(**options)]
    model = keras.Sequential([keras.Input((9, 9, 3), dtype=layers[0].compute_dtype), *layers])
    rng = np.random.default_rng(0)
    layers[1].set_weights([rng.uniform(0.5, 1.5, 8).astype(np.float32) for _ in range(4)])
    folded = fold(model)
    assert type(folded.layers[1]) is k.Identity
    x = keras.ops.cast(rng.normal(size=(4, 9, 9, 3)), layers[0].compute_dtype)
    want, got = (keras.ops.convert_to_numpy(keras.ops.cast(m(x), "float32")) for m in (model, folded))
    narrow = {"float64": 1e-6, "mixed_float16": 5e-3, "float16": 5e-3}
    assert np.abs(got - want).max() <= narrow.get(policy, 4e-2) * np.abs(want).max()


def test_a_wrong_fold_in_a_narrow_dtype_is_not_returned(monkeypatch):
    layers = [k.Dense(4, dtype="mixed_bfloat16"), k.BatchNormalization(dtype="mixed_bfloat16")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    wrong = [np.ones((3, 4), np.float32), np.ones(4, np.float32)]
    monkeypatch.setattr(
        sys.modules["batchnorm.keras.fold"], "folded_weights", lambda *arguments, **options: wrong
    )
    with pytest.raises(ValueError, match="folding changes the output by"):
        fold(model)


def test_a_layer_that_is_called_twice():
    """It has the statistics of both calls, those behind it exactly what they meet; the words say so."""
    i, shared = keras.Input((4,)), k.BatchNormalization(name="shared")
    x = k.Rescaling(3.0)(k.ReLU()(shared(i)))
    model = keras.Model(i, k.BatchNormalization(name="behind")(k.Rescaling(5.0)(shared(x))))
    batch = np.random.default_rng(0).normal(5, 3, (400, 4)).astype(np.float32)
    recalibrate(model, [batch])
    layer = norms(model)["behind"]
    met = output(keras.Model(i, layer.input), batch)
    mean, var = (
        np.asarray(keras.ops.convert_to_numpy(v)) for v in (layer.moving_mean, layer.moving_variance)
    )
    np.testing.assert_allclose(mean, met.mean(axis=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(var, met.var(axis=0), rtol=1e-3)
    assert {f.layer for f in diagnose(model, [batch]) if f.code == "mismatched"} <= {"shared", "behind"}
    assert "called several times" in " ".join((recalibrate.__doc__ or "").split())


def not_alone():
    i = keras.Input((4,))
    x = k.Dense(4)(i)
    return keras.Model(i, k.Add()([k.BatchNormalization()(x), x]))


def activated():
    return keras.Sequential([keras.Input((4,)), k.Dense(4, activation="relu"), k.BatchNormalization()])


def an_output():
    i = keras.Input((4,))
    x = k.Dense(4)(i)
    return keras.Model(i, [k.BatchNormalization()(x), x])


def wrong_axis():
    return keras.Sequential([keras.Input((4, 4)), k.Dense(4), k.BatchNormalization(axis=1)])


def shared():
    i, dense = keras.Input((4,)), k.Dense(4)
    return keras.Model(i, k.Add()([k.BatchNormalization()(dense(i)), k.ReLU()(dense(k.ReLU()(i)))]))


def adapted():
    model = keras.Sequential([keras.Input((4,)), k.Dense(4), k.BatchNormalization()])
    model.layers[0].enable_lora(2)
    return model


def quantized():
    model = keras.Sequential([keras.Input((4,)), k.Dense(4), k.BatchNormalization()])
    model.layers[0].quantize("int8")
    return model


@pytest.mark.parametrize("make", [not_alone, activated, an_output, wrong_axis, shared, adapted, quantized])
def test_what_is_not_folded(make):
    with pytest.raises(ValueError, match="none follows a convolution or Dense without activation"):
        fold(make())


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense, self.bn = k.Dense(3), k.BatchNormalization(name="bn")

    def call(self, x):
        return self.bn(self.dense(x))


def test_a_model_of_ones_own_class():
    model = Own()
    with pytest.raises(ValueError, match="is not built and does not know its channels"):
        diagnose(model, [np.ones((9, 4), np.float32)])
    x = np.random.default_rng(0).normal(size=(99, 4)).astype(np.float32)
    model(x)
    recalibrate(model, [(x, "labels")])
    assert diagnose(model, [{"x": x}], forward=lambda b: model(b["x"])).ok
    with pytest.raises(ValueError, match="model is a Own, whose graph is not known"):
        fold(model)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": 3}, TypeError, r"model is 3 \(int\), expected a keras.Model"),
        (
            {"model": keras.Sequential([keras.Input((3,)), k.Dense(3)])},
            ValueError,
            "has no batch norm; expected keras",
        ),
        ({"batches": images()}, TypeError, r"such as \[x\]"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": iter([])}, TypeError, "gone through only once, expected a list.*one_by_one=False"),
        ({"batches": [images() * np.nan]}, ValueError, "first: mean is nan at channel 0.*unchanged"),
        ({"forward": lambda x: x}, ValueError, "first: no batch reached this layer.*forward="),
        ({"forward": 3}, TypeError, "forward is 3"),
        ({"one_by_one": 1}, TypeError, "one_by_one is 1"),
    ],
)
def test_bad_input_changes_nothing(arguments, error, match):
    model = small()
    before = held(model)
    with pytest.raises(error, match=match):
        recalibrate(**{"model": model, "batches": [images()], **arguments})
    assert held(model) == before


def test_bad_statistics_are_not_folded():
    model = small()
    norms(model)["deep"].moving_variance.assign([-1.0] * 12)
    with pytest.raises(ValueError, match=r"deep, behind depthwise_conv2d.*: var is -1\.0 at channel 0"):
        fold(model)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow", "numpy"])
def test_on_each_backend(backend):
    needed = "jax" if backend == "numpy" else backend  # whose convolutions it takes
    pytest.importorskip(needed, reason=f"{needed} is not installed")
    chosen = "test_each_layer or test_a_model_is or test_fold or test_masked"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
