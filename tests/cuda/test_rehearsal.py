"""The functions on arrays of a GPU, rehearsed: every option gives the CPU's bits, in arrays of x's kind, and
nothing but the kernels touches the arrays' memory."""

from __future__ import annotations

import pickle
from typing import Any

import batchnorm
import numpy as np
import pytest
from batchnorm import MeanVar, batch_norm, moments
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train
from batchnorm._arrays import gpu_extension

from support.gpu import (
    EXTENSION,
    ByDlpack,
    ByInterface,
    Taken,
    crossed,
    differing,
    needs_rehearsal,
    on_cpu,
    powered,
    results,
    same_but_nan,
    sent,
)
from support.problem import Problem

pytestmark = [pytest.mark.quick, needs_rehearsal]

if gpu_extension() is not None:
    from batchnorm._gpu import GpuArray


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with powered(monkeypatch):
        yield


@pytest.mark.parametrize("kind", [ByInterface, ByDlpack])
def test_every_option_has_the_bits_of_the_cpu(kind):
    served = 0
    for p in crossed(300, kind is ByDlpack):
        if p.dtype.name == "bfloat16" and kind is ByInterface:  # which has no name for it
            continue
        try:
            made = results(p, kind)
        except TypeError as error:
            assert "would have to be copied first" in str(error), f"{p}: {error}"
            assert p.layout != "C" or p.positions not in ("all", "lengths"), p
            continue
        found = differing(p, made, on_cpu)
        assert not found, f"{p}: {found}"
        assert type(made["y"]) is type(made["mean"]) is {ByInterface: GpuArray, ByDlpack: Taken}[kind]
        served += 1
    assert served > 150


# ---- what the crossing leaves out --------------------------------------------------------------------------

P = Problem(6, 3, (4, 5), residual=True)
BOTH = pytest.mark.parametrize("kind", [ByInterface, ByDlpack])


def alike(made: Any, want: Any) -> bool:
    """Arrays of a GPU, and those that the CPU has made."""
    return all(same_but_nan(on_cpu(a), b) for a, b in zip(made, want, strict=True))


@BOTH
def test_inference(kind):
    x, z, (gamma, beta), d = P.x, P.z, P.parameters, P.data
    options = {"activation": "silu", "eps": 0.5}
    want = batch_norm(x, d.mean, d.var, gamma, beta, residual=z, **options)
    parameters = [kind(a) for a in (d.mean, d.var, gamma, beta)]
    there, out = kind(x), kind(np.empty_like(x))
    assert alike([batch_norm(there, *parameters, residual=kind(z), **options)], [want])
    assert batch_norm(there, *parameters, residual=kind(z), **options, out=out) is out
    assert batch_norm(there, *parameters, residual=kind(z), **options, out=there) is there
    assert alike([out, there], [want, want])


@BOTH
def test_statistics(kind):
    x, mask, weights = P.x, P.short(P.data.mask), np.arange(6.0)
    for options in ({}, {"ddof": 1, "mask": mask}, {"weights": weights, "channel_axis": (2, 3)}):
        got = moments(kind(x), **sent(options, kind))
        assert alike(got, moments(x, **options)) and type(got) is MeanVar
    assert alike(moments(kind(x), data_format="NCHW"), moments(x))
    by_steps = {"lengths": [4, 3, 2, 1, 0, 4], "lengths_axis": 2, "channel_axis": -1}
    assert alike(moments(kind(x), **by_steps), moments(x, **by_steps))


def test_statistics_with_the_axes_of_x():
    got = moments(ByInterface(P.x), keepdims=True)
    assert got.mean.shape == (1, 3, 1, 1) and alike(got, moments(P.x, keepdims=True))


@BOTH
@pytest.mark.parametrize("option", [
    {"decay": None, "seen": 40.0}, {"decay": None, "seen": np.array([0.0, 10, 99])}, {"decay": 1},
    {"decay": np.array([0.0, 0.5, 0.75])}, {"on_nonfinite": "skip"}, {"running_ddof": 0},
], ids=repr)  # fmt: skip
def test_running_statistics(kind, option):
    running = {"running_mean": np.array([1.0, 2, 3]), "running_var": np.ones(3, np.float32)}
    there, want = sent(running, kind), {name: a.copy() for name, a in running.items()}
    train(kind(P.x), **there, **sent(option, kind))
    train(P.x, **want, **option)
    assert alike(there.values(), want.values())
    assert train(kind(P.x), **there, renorm=True).saved.updated


@BOTH
def test_renorm_moves_its_own_reference(kind):
    renorm = {"mean": np.zeros(3), "std": np.ones(3), "decay": 0.5, "rmax": 3.0}
    there, here = (
        sent(renorm, kind),
        {n: np.array(a) if n in ("mean", "std") else a for n, a in renorm.items()},
    )
    made, want = train(kind(P.x), renorm=there).saved, train(P.x, renorm=here).saved
    assert alike([made.r, made.d, there["mean"], there["std"]], [want.r, want.d, here["mean"], here["std"]])


@BOTH
def test_backward_into_given_arrays(kind):
    x, dy, z, (gamma, beta) = P.x, P.dy, P.z, P.parameters
    options = {"residual": z, "activation": "relu", "keep": None}
    want = backward(dy, train(x, gamma, beta, **options).saved, x=x)
    saved = train(kind(x), kind(gamma), kind(beta), **sent(options, kind)).saved
    assert saved.keeps is None
    here, out, out_residual = kind(dy), kind(np.empty_like(x)), kind(np.empty_like(x))
    got = backward(here, saved, x=kind(x), out=out, out_residual=out_residual)
    assert got.dx is out and got.dresidual is out_residual
    assert alike((*got, got.dresidual), (*want, want.dresidual))
    assert backward(here, saved, x=kind(x), needs=("dgamma", "dresidual"), out_residual=here).dx is None
    assert alike([here], [want.dresidual])


@BOTH
def test_what_saved_tells(kind):
    gamma, beta = P.parameters
    saved = train(kind(P.x), kind(gamma), kind(beta), residual=kind(P.z), activation="leaky_relu").saved
    want = train(P.x, gamma, beta, residual=P.z, activation="leaky_relu").saved
    plain = "shape", "dtype", "channel_axis", "activation", "slope", "eps", "keeps", "parts", "updated"
    assert [getattr(saved, name) for name in plain] == [getattr(want, name) for name in plain]
    assert (
        saved.has_residual
        and saved.nbytes > 0
        and saved.r is None
        and repr(saved).startswith("Saved(x (6, 3")
    )
    assert alike([saved.mean, saved.gamma, saved.beta], [want.mean, gamma.astype(float), beta.astype(float)])
    assert on_cpu(saved.kept_channels).size == 0
    with pytest.raises(TypeError, match="a Saved is not pickled"):
        pickle.dumps(saved)


@BOTH
def test_nothing_to_normalise(kind):
    empty = np.empty((0, 3, 4), np.float32)
    y, saved = train(kind(empty), virtual_batch_size=2)
    assert on_cpu(y).shape == (0, 3, 4) and np.isnan(on_cpu(saved.mean)).all()
    dx, dgamma, _ = backward(kind(empty), saved, needs=("dx", "dgamma"))
    assert on_cpu(dx).shape == (0, 3, 4) and not on_cpu(dgamma).any()


def test_values_are_not_checked():
    gamma = np.array([1, np.nan, np.inf], np.float32)
    y = on_cpu(train(ByInterface(P.x), ByInterface(gamma)).y)
    assert np.isnan(y[:, 1]).all() and not np.isnan(y[:, 0]).any()


def test_parameters_may_have_gaps():
    x, gamma = P.x, np.arange(1, 7, dtype=np.float32)[::2]
    assert alike([train(ByInterface(x), ByInterface(gamma)).y], [train(x, gamma).y])


# ---- streams -----------------------------------------------------------------------------------------------


def test_work_goes_to_the_stream_of_x_and_waits_for_the_others(monkeypatch):
    ran, waits = [], []
    run = EXTENSION.run
    monkeypatch.setattr(
        EXTENSION, "run", lambda place, *given: (ran.append(place.stream), run(place, *given))[1]
    )
    monkeypatch.setattr(EXTENSION, "wait_for", lambda stream, other: waits.append((stream, other)))
    x, gamma = ByInterface(P.x), ByInterface(P.parameters[0])
    y = train(x, gamma).y
    assert ran == [1] and not waits and y.__cuda_array_interface__["stream"] == 1
    x.stream, gamma.stream = 7, 9
    y = train(x, gamma).y
    assert ran == [1, 7] and waits == [(7, 9)] and y.__cuda_array_interface__["stream"] == 7
    for asked in (-1, 7, 8, None):
        y.__dlpack__(stream=asked)
    assert waits == [(7, 9), (8, 7), (1, 7)]


def test_an_array_by_dlpack_is_made_ready_on_the_stream():
    asked = []

    class Asking(ByDlpack):
        def __dlpack__(self, *, stream=None, **options):
            asked.append(stream)
            return super().__dlpack__(stream=stream, **options)

    train(Asking(P.x), Asking(P.parameters[0]))
    assert asked == [1, 1]


# ---- errors ------------------------------------------------------------------------------------------------

OTHER_DEVICE = ByDlpack(np.ones(3, np.float32), device=1)
THERE = {"x": ByDlpack(P.x)}


def read_only(values):
    made = ByInterface(values)
    made.read_only = True
    return made


ERRORS = [
    ({"gamma": np.ones(3)}, TypeError, "gamma is .* on the CPU and x is on cuda:0, expected an arr"),
    ({"gamma": [1.0, 2, 3]}, TypeError, "gamma is of type list, expected an array of the GPU, as"),
    ({"gamma": 1.0}, TypeError, r"gamma is 1.0 \(float\), expected an array of the GPU"),
    ({"gamma": OTHER_DEVICE}, ValueError, "gamma is .* on cuda:1 and x is on cuda:0, expected array"),
    ({"gamma": ByDlpack(np.ones(4, np.float32))}, ValueError, r"gamma has shape \(4,\), expected \(3,\)"),
    ({"gamma": ByDlpack(np.ones(3, np.int32))}, TypeError, "gamma has dtype int32, expected float32 or flo"),
    ({"mask": np.ones(6, bool)}, TypeError, "mask is .*ndarray on the CPU and x is on cuda:0"),
    ({"mask": ByDlpack(np.ones(6))}, TypeError, "mask has dtype float64, expected a bool array"),
    ({"residual": ByDlpack(P.z.astype(float))}, TypeError, "residual has dtype float64, expected float32"),
    ({"lengths": [9] * 6, "lengths_axis": 2}, ValueError, "lengths is 9 at sample 0, expected 0 to 4"),
    ({"lengths": ByDlpack(np.ones(6, int)), "lengths_axis": 2}, TypeError, "expected ints on the CPU"),
    ({"running_mean": np.ones(3), "running_var": np.ones(3)}, TypeError, "running_mean is .* on the"),
    ({"running_mean": read_only(np.ones(3)), "running_var": ByInterface(np.ones(3))}, ValueError,
     "running_mean is read-only, expected a writable"),
    ({"out": np.empty_like(P.x)}, TypeError, "out is .* on the CPU and x is on cuda:0"),
    ({"renorm": {"mean": np.ones(3), "std": np.ones(3)}}, TypeError, "renorm mean is .* on the CPU and x"),
    ({"decay": np.ones(3)}, TypeError, "decay is .* on the CPU"),
    ({"keep": "y"}, ValueError, "keep is y, which is not served on a GPU, expected x"),
    ({"on_nonfinite": "raise"}, ValueError, "on_nonfinite is 'raise', which is not served on a GPU"),
    ({"group": object()}, TypeError, "group is .*, expected None"),
    ({"momentum": 0.9}, TypeError, "momentum"),
    ({"eps": ByDlpack(np.ones(()))}, TypeError, "eps is .*, expected a finite number"),
    ({"x": ByDlpack(np.ones((2, 3), np.uint8))}, TypeError, "x has dtype uint8, expected float32"),
    ({"x": ByDlpack(np.ones(3, np.float32))}, ValueError, "expected at least 2 dimensions"),
    ({"x": ByDlpack(np.ones((1, 3), np.float32))}, ValueError, "with one value per channel"),
    ({"x": P.x, "gamma": ByDlpack(np.ones(3))}, TypeError, "x is on the CPU and gamma, .*, on a GPU"),
    ({"x": ByDlpack(P.x[:, :, 1:-1, 1:-1])}, TypeError, "x has .* copied first"),
    ({"weights": ByDlpack(np.ones(6, int))}, TypeError, "weights has dtype int64 .* and of float64; pass"),
]  # fmt: skip


@pytest.mark.parametrize("given, error, words", ERRORS, ids=[words[:40] for _, _, words in ERRORS])
def test_what_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        train(**THERE | given)


def test_what_is_not_served_says_so():
    x, vector = ByDlpack(P.x), ByDlpack(np.ones(3))
    saved = train(x, vector).saved
    with pytest.raises(
        ValueError, match=r"batch_norm_double_backward\(\) is not served on a GPU, expected arrays"
    ):
        batchnorm.batch_norm_double_backward(x, saved, ddx=x)
    with pytest.raises(ValueError, match=r"Saved.of\(\) is not served on a GPU"):
        batchnorm.Saved.of(x, vector, vector)
    with pytest.raises(ValueError, match=r"update_running\(\) is not served on a GPU"):
        batchnorm.update_running(vector, vector, vector, vector, decay=0.5, count=3)
    with pytest.raises(ValueError, match="x has an integer storage type, which is not served on a GPU"):
        batch_norm(ByDlpack(np.ones((2, 3), np.uint8)), vector, vector)
    with pytest.raises(ValueError, match="x has an integer storage type, which is not served on a GPU"):
        moments(ByDlpack(np.ones((2, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"nodata is .*, which is not served on a GPU; pass mask="):
        moments(x, nodata=0)
    for call in (batchnorm.Moments().update, batchnorm.BatchNorm(3)):
        with pytest.raises(
            TypeError, match=r"x is .*ByDlpack on a device of CUDA, expected an array on the CPU; ba"
        ):
            call(x)


def test_a_saved_goes_with_its_place():
    there, here = train(ByDlpack(P.x)).saved, train(P.x).saved
    with pytest.raises(TypeError, match="saved is that of a forward on the CPU and dy is on cuda:0"):
        backward(ByDlpack(P.dy), here)
    with pytest.raises(TypeError, match="saved is that of a forward on a GPU and dy is on the CPU"):
        backward(P.dy, there)
    with pytest.raises(
        ValueError, match=r"saved is that of a forward with arrays of .* on cuda:0, expected .* on cuda:1"
    ):
        backward(ByDlpack(P.dy, device=1), there)
    with pytest.raises(TypeError, match="saved is 3"):
        backward(ByDlpack(P.dy), 3)
    x = ByDlpack(P.x)
    lost = train(x, out=x).saved
    with pytest.raises(
        RuntimeError, match="saved holds no x: out= of the forward was x itself; use another out"
    ):
        backward(ByDlpack(P.dy), lost)


def test_an_error_changes_nothing_and_the_next_call_works():
    running = ByDlpack(np.zeros(3)), ByDlpack(np.ones(3))
    with pytest.raises(ValueError, match="decay"):
        train(ByDlpack(P.x), running_mean=running[0], running_var=running[1], decay=2.0)
    assert not on_cpu(running[0]).any()
    assert alike([train(ByDlpack(P.x)).y], [train(P.x).y])


def test_a_failing_allocation_comes_through(monkeypatch):
    class Full:
        def __init__(self, *given):
            raise MemoryError("the GPU is full")

    x = ByDlpack(P.x)
    with monkeypatch.context() as patch:
        patch.setattr(EXTENSION, "Block", Full)
        with pytest.raises(MemoryError, match="the GPU is full"):
            train(x)
    assert alike([train(x).y], [train(P.x).y])


def test_the_configuration_tells(capsys):
    assert batchnorm.config()["cuda"] == "rehearsal, for tests: the kernels run on the CPU"
    batchnorm.show_config()
    assert "CUDA         rehearsal" in capsys.readouterr().out
