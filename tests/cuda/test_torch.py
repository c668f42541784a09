"""PyTorch's tensors on a GPU, rehearsed with tensors on the CPU that pass for a GPU's: functions and modules
have the CPU's bits, and autograd learns what is written."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from batchnorm import _arrays, moments
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train

from support.gpu import EXTENSION, crossed, differing, needs_rehearsal, results, same_but_nan
from support.problem import Problem

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import batchnorm.torch as modules  # noqa: E402
from batchnorm.torch import function  # noqa: E402

from support.tensors import fetch, send, steps  # noqa: E402

pytestmark = needs_rehearsal

if EXTENSION is not None:
    from batchnorm import _gpu

P = Problem(6, 3, (4, 5), residual=True)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"


@pytest.fixture
def gpu(monkeypatch):
    """Tensors are on a GPU."""
    monkeypatch.setattr(_arrays, "_CUDA", (1, 2, 13))
    monkeypatch.setattr(function, "_on_gpu", lambda tensor: True)


def test_every_option_has_the_bits_of_the_cpu(gpu):
    for p in crossed(300, 2):
        made = results(p, send)
        assert all(isinstance(a, torch.Tensor) for a in made.values())
        found = differing(p, made, fetch)
        assert not found, f"{p}: {found}"
        assert made["y"].stride() == made["dx"].stride()


@pytest.mark.parametrize("option", [
    {"lengths": torch.tensor([4, 3, 2, 1, 0, 4]), "lengths_axis": 2}, {"weights": torch.arange(6)},
    {"weights": torch.rand(6, 4, 5)[:, :, ::2].repeat_interleave(2, 2)[:, :, :5]},
    {"mask": torch.ones(3, 6, dtype=torch.bool).T[:, :, None, None]},
    {"gamma": torch.ones(3, 6)[:, 0]}, {"decay": None, "seen": 7}, {"channel_axis": (1, 3)},
], ids=lambda option: next(iter(option)))  # fmt: skip
def test_what_is_converted_there(option, gpu, monkeypatch):
    x = send(P.x)[:, :, :, 1:]  # which has no view either
    if option.get("weights") is not None and option["weights"].ndim == 3:
        option = {"weights": option["weights"][:, :, 1:]}
    running = [torch.zeros(3 if "channel_axis" not in option else (3, 4)) for _ in range(2)]
    y, saved = train(x, **option, running_mean=running[0], running_var=running[1])
    dx = backward(x, saved).dx
    monkeypatch.undo()
    here = {name: a.numpy() if isinstance(a, torch.Tensor) else a for name, a in option.items()}
    mean, var = np.zeros_like(running[0]), np.zeros_like(running[1])
    want, kept = train(x.numpy(), **here, running_mean=mean, running_var=var)
    pairs = (y, want), (dx, backward(x.numpy(), kept).dx), (running[0], mean), (running[1], var)
    assert all(same_but_nan(fetch(a), b) for a, b in pairs)


def test_statistics(gpu):
    x = send(P.x)
    mean, var = moments(x, keepdims=True, ddof=1, mask=x[:, 0, 0, 0] > 0)
    want = moments(P.x, keepdims=True, ddof=1, mask=P.x[:, 0, 0, 0] > 0)
    assert same_but_nan(mean.numpy(), want.mean) and same_but_nan(var.numpy(), want.var)


# ---- autograd and what it knows ----------------------------------------------------------------------------


def test_autograd_learns_what_is_written(gpu):
    x, out, mean, var = send(P.x), send(P.x), torch.zeros(3), torch.ones(3)
    renorm = {"mean": torch.zeros(3), "std": torch.ones(3), "decay": 0.5}
    train(x, running_mean=mean, running_var=var, renorm=renorm, out=out)
    written = out, mean, var, renorm["mean"], renorm["std"]
    assert [t._version for t in written] == [2, 1, 1, 1, 1] and x._version == 1


def test_overwriting_is_noticed_exactly(gpu):
    for change in (lambda t: t[0, 0, 0, 0].add_(1), lambda t: t.mul_(1), lambda t: train(t, out=t)):
        x = send(P.x)
        saved = train(x).saved
        change(x)
        with pytest.raises(
            RuntimeError, match="x has been overwritten since the forward, expected it unchanged"
        ):
            backward(x, saved)
    x = send(P.x)
    saved = train(x).saved
    x.data = send(P.dy)
    with pytest.raises(RuntimeError, match="x has been overwritten"):
        backward(x, saved)


def test_without_versions(gpu):
    with torch.inference_mode():
        x, running = send(P.x), [torch.zeros(3), torch.ones(3)]
        y, saved = train(x, running_mean=running[0], running_var=running[1])
        assert same_but_nan(y.numpy(), train(P.x).y) and backward(x, saved).dx.shape == x.shape


ERRORS = [
    (lambda x: train(x.requires_grad_()), TypeError, r"x is .* requires a gradient.*use x.detach\(\)"),
    (lambda x: train(x, torch.ones(3).requires_grad_()), TypeError, "gamma is .* requires a gradient"),
    (lambda x: train(x.to_sparse()), TypeError, "x is a tensor of layout torch.sparse_coo"),
    (lambda x: train(x.to(torch.float8_e5m2)), TypeError, r"x has dtype float8_e5m2.*use x.float\(\)"),
    (lambda x: train(x, np.ones(3)), TypeError, r"use torch.as_tensor\(gamma, device=x.device\)"),
    (lambda x: train(x, torch.ones(3, device="meta")), TypeError, "gamma is .* on the CPU and x is"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, words", ERRORS, ids=[words[:30] for _, _, words in ERRORS])
def test_what_is_refused(call, error, words, gpu):
    with pytest.raises(error, match=words):
        call(send(P.x))


def test_a_rehearsal_takes_no_tensor_of_a_real_gpu():
    real = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    with pytest.raises(
        TypeError, match="rehearses GPUs on the CPU and cannot reach one; build it with BATCHNORM"
    ):
        _gpu.Torch(torch, real)


# ---- modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", [
    modules.BatchNorm2d(3), modules.BatchNormAct2d(3, activation="silu"), modules.BatchNormAddAct2d(3),
    modules.BatchNorm2d(3, affine=False, momentum=None),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_modules_have_the_bits_of_the_cpu(dtype, module, gpu, monkeypatch):
    x, dy, z = (send(a).to(dtype).contiguous(memory_format=torch.channels_last) for a in (P.x, P.dy, P.z))
    module = copy.deepcopy(module).to(torch.float64 if dtype is torch.float64 else torch.float32)
    ran, run = [], EXTENSION.run
    monkeypatch.setattr(
        EXTENSION, "run", lambda place, name, given: (ran.append(name), run(place, name, given))[1]
    )
    got = steps(copy.deepcopy(module), x, dy, z)
    both = ["batch_norm_train", "batch_norm_backward"]
    assert ran == both * 3
    monkeypatch.undo()
    want = steps(copy.deepcopy(module), x, dy, z)
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_modules_with_statistics_of_16_bits(gpu, monkeypatch):
    module, x = modules.BatchNorm2d(3).half(), send(P.x).half()
    got = steps(copy.deepcopy(module), x, x, x)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(got, steps(module, x, x, x), strict=True))


def test_gradients_of_gradients_say_that_there_are_none(gpu):
    x = send(P.x).requires_grad_()
    (dx,) = torch.autograd.grad(modules.BatchNorm2d(3)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no gradients of gradients on a GPU; revert\(model\)"):
        dx.sum().backward()


# ---- the page ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not beside the tests")
def test_the_page_s_python_runs(gpu):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names = {}
    exec(code.replace(', device="cuda"', ""), names)
    assert names["y"].shape == names["dx"].shape and names["exact"].dtype is torch.float64
    assert names["bn"].weight.grad is not None
