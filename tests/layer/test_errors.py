"""An error changes nothing, says the layer's name, and what the layer knows better than the function."""

from __future__ import annotations

import numpy as np
import pytest
from batchnorm import BatchNorm

from support.checks import same_bits
from support.layers import C, everything, images, trained
from support.refusals import refused

pytestmark = pytest.mark.quick

X, DY = images("x"), images("dy")
MASK = np.ones((6, 5), bool)
BAD_CALLS = {
    "x list": ({"x": [[1.0, 2.0]]}, TypeError, "x"),
    "x None": ({"x": None}, TypeError, "x"),
    "x int64": ({"x": np.ones((4, C), np.int64)}, TypeError, "x has dtype int64"),
    "x object": ({"x": np.ones((4, C), object)}, TypeError, "x has dtype object"),
    "x rank 1": ({"x": np.ones(C, np.float32)}, ValueError, "x"),
    "x channels": ({"x": np.ones((4, C + 1), np.float32)}, ValueError, "x has 5 channels"),
    "training": ({"training": "yes"}, TypeError, "training"),
    "stats": ({"stats": "Batch"}, ValueError, "stats"),
    "update": ({"update": 1}, TypeError, "update"),
    "out dtype": ({"out": np.empty(X.shape)}, TypeError, "out"),
    "out shape": ({"out": np.empty((5, C, 5), np.float32)}, ValueError, "out"),
    "out list": ({"out": [1.0]}, TypeError, "out"),
    "residual shape": ({"residual": X[:3]}, ValueError, "residual"),
    "residual dtype": ({"residual": X.astype(np.float64)}, TypeError, "residual"),
    "residual list": ({"residual": [1.0]}, TypeError, "residual"),
    "mask dtype": ({"mask": MASK.astype(int)}, TypeError, "mask has dtype int64"),
    "mask shape": ({"mask": np.ones((4, 4), bool)}, ValueError, "mask"),
    "mask and lengths": ({"mask": MASK, "lengths": np.full(6, 5)}, ValueError, "mask and lengths"),
    "lengths shape": ({"lengths": np.full(5, 5)}, ValueError, "lengths"),
    "lengths_axis": ({"lengths_axis": 2}, ValueError, "lengths_axis"),
    "gamma": ({"gamma": np.ones(C)}, ValueError, "gamma is given and the layer has its own"),
    "keyword": ({"momentum": 0.1}, TypeError, "momentum"),
    "return_saved": ({"return_saved": "yes"}, TypeError, "return_saved is 'yes'"),
}


@pytest.mark.filterwarnings("ignore::batchnorm.ColdStatisticsWarning")
@pytest.mark.parametrize(
    "options", [{"name": None}, {"name": "conv1.bn"}, {"zero_debias": False, "name": "conv1.bn"}], ids=str
)
@pytest.mark.parametrize("how", [{}, {"training": False}, {"stats": "running", "update": True}], ids=str)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_failed_forward_changes_nothing(case, how, options):
    arguments, error, match = BAD_CALLS[case]
    layer, same = trained(**options), trained(**options)
    layer(X)
    same(X)
    call = {"x": X, **how, **arguments}
    message = refused(lambda: layer(**call), error, match, lambda: (everything(layer), call))
    assert message.startswith("conv1.bn: ") == (options["name"] is not None)
    assert same_bits(layer.backward(DY), same.backward(DY))  # that of the forward that succeeded


@pytest.mark.parametrize(
    "options",
    [{"renorm": True}, {"virtual_batch_size": 2}, {"keep": "y"}, {"renorm": {"decay": 0.5}}],
    ids=str,
)
@pytest.mark.parametrize(
    "arguments", [{"mask": MASK.astype(int)}, {"out": np.empty(X.shape)}], ids=lambda a: next(iter(a))
)
def test_nor_does_it_with_other_options(options, arguments):
    layer = trained(**options)
    before = everything(layer)
    with pytest.raises(TypeError):
        layer(X, **arguments)
    assert everything(layer) == before


def test_keep_y_takes_no_residual():
    layer = trained(keep="y")
    before = everything(layer)
    with pytest.raises(ValueError, match="residual"):
        layer(X, residual=DY)
    assert everything(layer) == before
    layer(X, residual=DY, training=False)  # nothing is kept there


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])  # the last one overflows the variance
@pytest.mark.parametrize("how", [{}, {"stats": "running", "update": True}], ids=["batch", "running"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"renorm": {"decay": 0.5}}, {"virtual_batch_size": 2}, {"keep": "y"}], ids=str
)
def test_a_batch_that_would_spoil_the_statistics_changes_nothing(options, in_place, how, value):
    layer, bad = trained(on_nonfinite="raise", name="bn", **options), X.copy()
    bad[3, 1] = value
    before, given = everything(layer), bad.copy()
    with pytest.raises(ValueError, match=r"^bn: .*channel 1.*skip"):
        layer(bad, out=bad if in_place else None, **how)
    assert everything(layer) == before and same_bits(bad, given)
    assert np.isfinite(layer(X, out=np.empty_like(X), **how)).all() and layer.running.num_updates == 4


@pytest.mark.parametrize("name", [None, "bn"])
@pytest.mark.parametrize(
    ("vector", "value"),
    [("running_mean", np.nan), ("running_mean", -np.inf),
        *(("running_var", v) for v in (np.nan, np.inf, -1.0))],
)  # fmt: skip
def test_bad_statistics_are_named_where_they_are_used(vector, value, name):
    layer = trained(name=name).eval()
    getattr(layer, vector)[3] = value
    before = everything(layer)
    with pytest.raises(ValueError, match=f"{vector} is .*channel 3.*") as caught:
        layer(X)
    assert str(caught.value).startswith("bn: ") == bool(name) and "ecalibrate" in str(caught.value)
    with pytest.raises(ValueError, match="x has 7 channels"):
        layer(np.ones((4, 7), np.float32))
    with pytest.raises(TypeError, match="x is of type list"):
        layer([[1.0] * C])
    assert everything(layer) == before
    getattr(layer, vector)[3] = 1
    layer(X)


def test_statistics_of_a_bad_batch_are_explained():
    for options, how in (({}, {"training": False}), ({"renorm": True}, {})):
        layer, bad = BatchNorm(C, zero_debias=True, **options), X.copy()
        bad[0, 2] = np.nan
        layer(bad)
        with pytest.raises(
            ValueError, match=r"running_mean is .*channel 2.*on_nonfinite='raise'.* or 'skip'"
        ):
            layer(X, **how)
    plain = BatchNorm(C)
    plain(bad)
    plain(X)  # in training they propagate
    assert np.isnan(plain.running_mean[2]) and np.isfinite(plain.running_mean[[0, 1, 3]]).all()


@pytest.mark.parametrize("zero_debias", [True, False])
def test_nor_does_a_failed_call_in_eval_mode(zero_debias):
    layer = BatchNorm(C, zero_debias=zero_debias, name="bn").recalibrate([X]).eval()
    layer(X)
    before = everything(layer)
    for x, error in (
        ([1.0], TypeError),
        (np.ones((4, C), int), TypeError),
        (np.ones((4, C + 1), np.float32), ValueError),
    ):
        with pytest.raises(error, match=r"^bn: x "):
            layer(x)
    layer.running_mean[1] = np.nan
    with pytest.raises(ValueError, match=r"^bn: running_mean is .*channel 1"):
        layer(X)
    layer.running_mean[1] = X[:, 1].mean()
    layer(X)
    assert everything(layer)["settings"] == before["settings"] and layer.running.num_updates == 1


def test_errors_of_other_methods_say_the_name_too():
    layer = trained(name="bn")
    layer(X)
    layer.backward(DY)
    with pytest.raises(RuntimeError, match=r"^bn: backward came twice"):
        layer.backward(DY)
    with pytest.raises(RuntimeError, match=r"^bn: running_mean and running_var .*never updated"):
        BatchNorm(C, name="bn")(X, training=False)
