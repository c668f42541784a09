"""Backward of a layer: whose gradient it is, when it is used up, when gradients add; and parameters."""

from __future__ import annotations

import copy
import re

import batchnorm
import numpy as np
import pytest
from batchnorm import BatchNorm, batch_norm_backward, batch_norm_train, weight_decay_groups
from batchnorm.parameter import Parameter

from support.checks import same_bits
from support.layers import C, everything, images, randomized, trained

pytestmark = pytest.mark.quick

X, DY, Z = images("x"), images("dy"), images("z")
XA, XB, DA, DB = (images(name) for name in ("xa", "xb", "da", "db"))
TWICE = r"y, saved = bn\(x, return_saved=True\)"


def alone(layer, x, dy, **options):
    """Gradients of one training forward by the functions."""
    return batch_norm_backward(dy, batch_norm_train(x, layer.gamma, layer.beta, **options).saved)


# ---- one forward, one backward -----------------------------------------------------------------------------


def test_before_any_forward():
    for layer in (BatchNorm(), BatchNorm(C)):
        with pytest.raises(RuntimeError, match=r"^backward before any forward: call y = bn\(x\) first"):
            layer.backward(DY)
        assert (layer.dgamma, layer.dbeta) == (None, None)


def test_a_forward_is_used_up():
    layer = trained()
    layer(X)
    dx, gradients = layer.backward(DY), (layer.dgamma, layer.dbeta)
    with pytest.raises(
        RuntimeError, match=f"backward came twice after one forward.*{TWICE}.*accumulate=True"
    ):
        layer.backward(DY)
    assert (layer.dgamma, layer.dbeta) == gradients
    layer(X)
    assert same_bits(layer.backward(DY), dx) and layer.dgamma is not gradients[0]


def test_after_an_eval_call_there_is_nothing_left():
    for last in ({"training": False}, {"training": False, "stats": "batch"}):
        layer = trained()
        layer(XA)  # that of an earlier forward would be the wrong gradient
        layer(X, **last)
        with pytest.raises(RuntimeError, match=rf"eval mode, which keeps nothing: .*{TWICE}.*freeze\(\)"):
            layer.backward(DY)


def test_after_a_call_that_returned_saved_it_must_be_passed():
    layer = trained()
    layer(XA)
    _, saved = layer(X, return_saved=True)
    with pytest.raises(
        RuntimeError, match=r"last call returned what backward needs: pass it, bn.backward\(dy, saved\)"
    ):
        layer.backward(DY)
    assert same_bits(layer.backward(DY, saved), alone(layer, X, DY).dx)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("scale", [True, False])
def test_in_eval_mode_the_statistics_are_constants(activation, scale):
    layer = trained(activation=activation, scale=scale).eval()
    given = {"mean": layer.running_mean, "var": layer.running_var, "activation": activation, "residual": Z}
    want = alone(layer, X, DY, **given)
    y, saved = layer(X, residual=Z, return_saved=True)
    assert same_bits(y, layer(X, residual=Z))
    assert same_bits(layer.backward(DY, saved), want.dx)
    assert same_bits(layer.dresidual, want.dresidual) and same_bits(layer.dbeta, want.dbeta)
    assert layer.dgamma is None if not scale else same_bits(layer.dgamma, want.dgamma)
    y, saved = layer(X, return_saved=True)
    layer.backward(DY, saved)
    assert layer.dresidual is None


def test_backward_takes_what_the_forward_had():
    """Statistics, gamma, beta, eps: whatever has become of them since."""
    layer, still = trained(), trained()
    expected = still.freeze()(X) is not None and still.backward(DY)
    layer(X, stats="running", update=True)
    layer.running_mean += 1
    layer.gamma *= 2
    layer.eps = 1.0
    assert same_bits(layer.backward(DY), expected)


@pytest.mark.parametrize("keep", ["x", "y"])
def test_what_was_overwritten_is_noticed(keep):
    layer = trained(keep=keep)
    x = images()
    y = layer(x)
    (x if keep == "x" else y)[...] += 1
    with pytest.raises(RuntimeError, match="overwritten"):
        layer.backward(DY)


@pytest.mark.parametrize("training", [True, False])
def test_in_place(training):
    layer, x, dy = trained(), images(), DY.copy()
    y, saved = layer(x, training=training, out=x, return_saved=True)
    assert y is x
    with pytest.raises(RuntimeError, match="keep='y'"):
        layer.backward(DY, saved)
    y, saved = layer(X, training=training, return_saved=True)
    expected = layer.backward(DY, saved)
    gradients = layer.dgamma, layer.dbeta
    assert layer.backward(dy, saved, out=dy, accumulate=False) is dy and same_bits(dy, expected)
    assert same_bits(layer.dgamma, gradients[0]) and same_bits(layer.dbeta, gradients[1])
    x = images("x")
    _, saved = layer(x, training=training, return_saved=True)
    assert layer.backward(DY, saved, out=x) is x and same_bits(x, expected)


@pytest.mark.parametrize("options", [{}, {"activation": "leaky_relu", "slope": 0.25}], ids=str)
@pytest.mark.parametrize("guard", ["propagate", "raise"])
def test_with_keep_y_a_layer_works_in_place(options, guard):
    layer, plain = trained(keep="y", on_nonfinite=guard, **options), trained(**options)
    for step in range(2):
        x, dy = images(step), DY.copy()
        expected = plain(x.copy())
        assert layer(x, out=x) is x and same_bits(x, expected)
        assert layer.backward(dy, out=dy) is dy
        np.testing.assert_allclose(dy, plain.backward(DY), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.dgamma, plain.dgamma, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(layer.dbeta, plain.dbeta, rtol=1e-4, atol=1e-4)
    assert same_bits(layer.running_var, plain.running_var)
    with pytest.raises(ValueError, match="residual"):
        layer(X, residual=Z)


def test_a_residual_goes_through_the_layer():
    layer, out = trained(activation="relu"), np.empty_like(X)
    want = alone(layer, X, DY, residual=Z, activation="relu")
    layer(X, residual=Z)
    assert same_bits(layer.backward(DY, out_residual=out), want.dx)
    assert layer.dresidual is out and same_bits(out, want.dresidual)


# ---- a layer used several times ----------------------------------------------------------------------------


def test_one_layer_two_inputs():
    layer = randomized(BatchNorm(C))
    for _ in range(2):  # the next step overwrites without being asked
        (_, sa), (_, sb) = layer(XA, return_saved=True), layer(XB, return_saved=True)
        a, b = alone(layer, XA, DA), alone(layer, XB, DB)
        assert same_bits(layer.backward(DB, sb), b.dx)
        with pytest.raises(
            RuntimeError,
            match=r"came before the last backward .*: say accumulate=True to add .*=False to replace",
        ):
            layer.backward(DA, sa)
        assert same_bits(layer.dgamma, b.dgamma)
        assert same_bits(layer.backward(DA, sa, accumulate=True), a.dx)
        assert same_bits(layer.dgamma, b.dgamma + a.dgamma) and same_bits(layer.dbeta, b.dbeta + a.dbeta)
    layer.backward(DA, sa, accumulate=False)
    assert same_bits(layer.dgamma, a.dgamma)


def test_a_forward_that_is_kept_and_one_that_is_returned():
    """The order of forwards decides, whichever way they are kept."""
    layer = trained()
    _, first = layer(XA, return_saved=True)
    layer(XB)
    layer.backward(DA, first)
    with pytest.raises(RuntimeError, match="came before the last backward"):
        layer.backward(DB)
    layer.backward(DB, accumulate=np.True_)
    np.testing.assert_array_equal(layer.dbeta, alone(layer, XA, DA).dbeta + alone(layer, XB, DB).dbeta)


def test_gradient_accumulation():
    layer, total = randomized(BatchNorm(C)), None
    for i in range(4):
        layer(images(i))
        layer.backward(images(i + 9), accumulate=i > 0)
        each = alone(layer, images(i), images(i + 9)).dgamma
        total = each if total is None else total + each
        held, before = layer.dgamma, layer.dgamma.copy()
    assert same_bits(layer.dgamma, total)
    layer(X)
    layer.backward(DY)
    assert same_bits(held, before)  # earlier gradients stay what they were


def test_accumulate_begins_with_nothing():
    layer = BatchNorm(C)
    layer(X)
    layer.backward(DY, accumulate=True)
    assert same_bits(layer.dgamma, alone(layer, X, DY).dgamma)
    layer.dgamma = layer.dbeta = None  # what an optimiser's zero_grad() does
    _, saved = layer(X, return_saved=True)
    layer.backward(DY, saved)
    layer.dgamma = layer.dbeta = None
    layer.backward(DY, saved)  # nothing is lost by it
    assert same_bits(layer.dgamma, alone(layer, X, DY).dgamma)


def test_without_parameters_nothing_can_be_lost():
    layer = BatchNorm(C, scale=False, center=False)
    _, saved = layer(X, return_saved=True)
    assert same_bits(layer.backward(DY, saved), layer.backward(DY, saved))


def test_gradients_of_other_shapes_do_not_add():
    layer = BatchNorm(C, scale=False)
    layer(X, gamma=np.ones(C))
    layer.backward(DY)
    layer(X, gamma=np.ones((6, C)))
    before = layer.dgamma
    with pytest.raises(
        ValueError, match=r"dgamma has shape \(4,\) of the last backward and \(6, 4\) of this one"
    ):
        layer.backward(DY, accumulate=True)
    assert layer.dgamma is before
    layer.backward(DY)
    assert layer.dgamma.shape == (6, C)


@pytest.mark.parametrize("value", [1, 0, "yes", np.array(True)])
def test_accumulate_is_a_bool(value):
    layer = trained()
    layer(X)
    with pytest.raises(TypeError, match=r"accumulate is .*, expected True or False"):
        layer.backward(DY, accumulate=value)
    layer.backward(DY)


def test_whose_saved_it_is():
    layer, other = trained(), trained()
    _, theirs = other(X, return_saved=True)
    ours = batch_norm_train(X).saved
    for saved, error, match in (
        (theirs, ValueError, "saved is another layer's, expected one of this layer"),
        (ours, ValueError, "saved is a function's, expected one of this layer"),
        (X, TypeError, r"saved is of type numpy.ndarray, expected what bn\(x, return_saved=True\) returned"),
        ((X, theirs), TypeError, "saved is of type tuple"),
    ):
        with pytest.raises(error, match=match):
            layer.backward(DY, saved)
    assert layer.dgamma is None
    _, mine = layer(X, return_saved=True)
    for copied in (copy.deepcopy(layer), layer.clone()):
        with pytest.raises(ValueError, match="another layer's"):
            copied.backward(DY, mine)
    assert same_bits(batch_norm_backward(DY, mine).dx, layer.backward(DY, mine))  # a function takes any


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"dy": DY[:2]}, ValueError), ({"dy": DY.astype(np.float64)}, TypeError),
        ({"dy": DY.tolist()}, TypeError),
        ({"dy": None}, TypeError), ({"out": np.empty((2, C, 5), np.float32)}, ValueError),
        ({"out": np.empty(X.shape)}, TypeError), ({"accumulate": "yes"}, TypeError),
        ({"out_residual": np.empty((2, C, 5), np.float32)}, ValueError), ({"all_reduce": "yes"}, TypeError),
    ],
)  # fmt: skip
def test_a_failed_backward_changes_nothing(arguments, error, training):
    layer = trained()
    _, saved = layer(X, training=training, residual=Z, return_saved=True)
    layer.backward(DY, saved)
    before = everything(layer)
    layer(XA, training=True, residual=Z, update=False)
    for given in (saved, None):
        with pytest.raises(error, match=r"dy|out|accumulate|all_reduce"):
            layer.backward(**{"dy": DY, "saved": given, "accumulate": True, **arguments})
        assert everything(layer) == before
    assert same_bits(layer.backward(DA), alone(layer, XA, DA, residual=Z).dx)  # not used up


def test_gradients_that_cannot_be_added_up_are_an_error_before_anything_is_written():
    layer = BatchNorm(C, scale=False)
    layer(X, gamma=np.ones(C, np.float32))
    layer.backward(DY)
    layer(X, gamma=np.ones((len(X), C), np.float32))
    before, dy = everything(layer), DY.copy()
    with pytest.raises(ValueError, match="accumulate is True and dgamma has shape"):
        layer.backward(dy, accumulate=True, out=dy)
    assert everything(layer) == before and same_bits(dy, DY)


# ---- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_parameters_are_what_the_layer_has(scale, center):
    layer = BatchNorm(C, scale=scale, center=center)
    expected = ["gamma"] * scale + ["beta"] * center
    parameters = layer.parameters()
    assert [p.name for p in parameters] == expected
    assert all(p.grad is None and p.value is getattr(layer, p.name) for p in parameters)
    for step in range(3):  # one list serves the whole training
        layer(images(step))
        layer.backward(DY)
        assert all(p.grad is getattr(layer, "d" + p.name) and p.grad.shape == (C,) for p in parameters)
    assert {"gamma", "beta"} - set(expected) == {
        n for n in ("gamma", "beta") if getattr(layer, "d" + n) is None
    }
    assert list(layer.buffers()) == ["running_mean", "running_var"]
    assert all(value is getattr(layer, name) for name, value in layer.buffers().items())


def test_gradient_descent_through_parameters():
    layer, x = BatchNorm(C, dtype=np.float64, name="bn1"), images(0, (64, C), np.float64)
    target = 2 * (x - x.mean(axis=0)) / x.std(axis=0) - 1  # gamma 2 and beta -1
    parameters = layer.parameters()
    for _ in range(100):
        layer.backward((layer(x) - target) / len(x))
        for parameter in parameters:
            parameter.value -= 0.5 * parameter.grad
    np.testing.assert_allclose(layer.gamma, 2, atol=1e-4)  # eps takes 1e-5 / (2 * 4) of it
    np.testing.assert_allclose(layer.beta, -1, atol=1e-12)


def test_a_parameter_is_a_view():
    layer = BatchNorm(C)
    parameter = layer.parameters()[0]
    name, value, grad = parameter
    assert (name, grad, len(parameter)) == ("gamma", None, 3) and value is parameter.value is layer.gamma
    assert parameter[0] == "gamma" and parameter[1] is value and parameter[-1] is None
    assert repr(parameter) == f"Parameter('gamma', {value!r}, None)"
    layer.name = "conv1.bn"
    assert parameter.name == "conv1.bn.gamma" and [p.name for p in layer.parameters()][1] == "conv1.bn.beta"
    with pytest.raises(
        AttributeError,
        match=re.escape("value of conv1.bn.gamma cannot be replaced; change it in place, value[:] ="),
    ):
        parameter.value = value.copy()
    with pytest.raises(AttributeError):
        parameter.velocity = 0
    with pytest.raises(IndexError):
        parameter[3]
    parameter.value -= 0.5
    assert parameter.value is layer.gamma and layer.gamma[0] == 0.5
    layer(X)
    layer.backward(DY)
    parameter.grad *= 2
    assert parameter.grad is layer.dgamma
    parameter.grad = None
    assert layer.dgamma is None


def test_views_of_the_same_array_are_equal():
    layer, other = BatchNorm(C), BatchNorm(C)
    momentum = {p: np.zeros(C) for p in layer.parameters()}
    assert list(momentum) == layer.parameters() and all(p in momentum for p in layer.parameters())
    assert layer.parameters()[0] != layer.parameters()[1] and layer.parameters()[0] not in other.parameters()
    assert layer.parameters()[0] != "gamma"


def test_weight_decay_groups():
    layer, weight = BatchNorm(C, name="bn"), ("weight", X, DY)
    decayed, rest = weight_decay_groups(iter([*layer.parameters(), weight]))
    assert decayed == [weight]
    assert [p.name for p in rest] == ["bn.gamma", "bn.beta"] and not any(p.weight_decay for p in rest)
    assert all(isinstance(p, Parameter) for p in rest) and rest[0].value is layer.gamma
    with pytest.raises(TypeError, match=r"parameters is 3 .*, expected an iterable"):
        weight_decay_groups(3)


def test_assigning_copies_into_the_array_that_optimisers_hold():
    layer = BatchNorm(C)
    held = layer.gamma
    layer.gamma = np.arange(C, dtype=np.float32)
    layer.gamma -= 1
    layer.gamma *= np.float32(2)
    assert layer.gamma is held
    np.testing.assert_array_equal(held, 2 * np.arange(C) - 2)
    layer.running_mean, layer.running_var = np.zeros(C, np.float32), np.full(C, 4, np.float32)
    x = np.full((2, C), 2, np.float32)
    layer.beta = held  # another vector of the layer: copied, not shared
    assert layer.beta is not held
    layer.gamma[:] = 1
    np.testing.assert_allclose(layer.eval()(x), 1 + np.tile(layer.beta, (2, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_float32_and_float64_can_be_assigned_to_any_layer(name, dtype):
    value = 1 / np.arange(3, C + 3)
    for given in (value, value.astype("f4"), np.repeat(value, 2)[::2]):
        layer = BatchNorm(C, dtype=dtype)
        held = getattr(layer, name)
        setattr(layer, name, given)
        assert getattr(layer, name) is held and same_bits(held, given.astype(dtype))
    setattr(layer, name, np.full(C, 1e-300))  # below float32: zero, no warning
    assert same_bits(held, np.full(C, 1e-300).astype(dtype))


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("gamma", None, TypeError,
            "gamma is None, expected an array of float32 or float64, one value per channel"),
        ("gamma", 1, TypeError, r"gamma is 1 \(int\), expected an array"),
        ("gamma", [1.0] * C, TypeError,
            r"gamma is of type list, .*; use numpy.array\(gamma, numpy.float32\)"),
        ("beta", np.ones(C, int), TypeError,
            r"beta has dtype int64, expected an array of float32 or float64.*; use beta.ast"),
        ("beta", np.ones(C, ">f4"), TypeError, "beta has dtype >f4, expected an array of float32"),
        ("beta", np.ma.ones(C), TypeError, "beta is of type numpy.ma.MaskedArray, expected an array"),
        ("beta", np.array([0, 0, -1e300, 0]), ValueError,
            r"beta is -1e\+300 at channel 2, expected finite float32 values$"),
        ("running_mean", np.ones(C + 1), ValueError, rf"running_mean has shape \(5,\), expected \({C},\)"),
        ("running_mean", np.ones((1, C)), ValueError, r"running_mean has shape \(1, 4\)"),
        ("gamma", np.array([1, np.nan, 1, 1]), ValueError, "gamma is nan at channel 1, expected finite"),
        ("running_var", np.array([1, -2.0, 1, 1]), ValueError, r"running_var is -2.0 at channel 1, .*>= 0"),
        ("running_var", np.array([1, 1, 1, np.inf]), ValueError, "running_var is inf at channel 3"),
        ("renorm_std", np.ones(C), ValueError,
            r"renorm_std cannot be assigned, the layer has none \(it was built so\)"),
    ],
)  # fmt: skip
def test_what_is_assigned_is_checked(name, value, error, match):
    layer = trained()
    before = everything(layer)
    with pytest.raises(error, match=match):
        setattr(layer, name, value)
    assert everything(layer) == before


def test_a_vector_that_the_layer_does_not_have():
    with pytest.raises(ValueError, match="gamma cannot be assigned, the layer has none"):
        BatchNorm(C, scale=False).gamma = np.ones(C)
    with pytest.raises(ValueError, match=r"beta cannot be assigned, .*channel count is not known yet"):
        BatchNorm().beta = np.ones(C)
    assert batchnorm.BatchNorm(C, renorm={"decay": 0.5}).renorm_std.tolist() == [1.0] * C
