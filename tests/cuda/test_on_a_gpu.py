"""On a GPU: the functions and modules on PyTorch's tensors, and CuPy's and JAX's arrays, have the CPU's bits,
on any stream and in a captured graph."""

from __future__ import annotations

import copy
from typing import Any

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_train as train

from support.gpu import EXTENSION, crossed, differing, results, same_but_nan
from support.problem import Problem

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import batchnorm.torch as modules  # noqa: E402

from support.tensors import fetch, send, steps  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        EXTENSION is None or EXTENSION.runtime() == "rehearsal",
        reason="batchnorm._cuda is not built for GPUs: install with BATCHNORM_CUDA=ON",
    ),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

P = Problem(6, 3, (4, 5), residual=True)
LARGE = Problem(16, 96, (14, 14), last=True)


def there(values: Any) -> Any:
    return send(values, "cuda")


def alike(tensors: Any, arrays: Any) -> bool:
    return all(same_but_nan(fetch(a), b) for a, b in zip(tensors, arrays, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_every_option_has_the_bits_of_the_cpu(seed):
    for p in crossed(300, seed):
        made = results(p, there)
        assert all(a.device.type == "cuda" for a in made.values())
        found = differing(p, made, fetch)
        assert not found, f"{p}: {found}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("module", [
    modules.BatchNorm2d(96), modules.BatchNormAct2d(96), modules.BatchNormAddAct2d(96, activation="silu"),
], ids=lambda module: type(module).__name__)  # fmt: skip
def test_modules_have_the_bits_of_the_cpu(module, form, dtype):
    given = [torch.randn(16, 96, 14, 14).to(dtype).contiguous(memory_format=form) for _ in range(3)]
    module = copy.deepcopy(module).to(torch.float64 if dtype is torch.float64 else torch.float32)
    got = steps(copy.deepcopy(module).cuda(), *(t.cuda() for t in given))
    want = steps(module, *given)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def test_work_goes_to_the_current_stream():
    x, dy = there(LARGE.x), there(LARGE.dy)
    stream, ran, run = torch.cuda.Stream(), [], EXTENSION.run
    torch.cuda.synchronize()
    with pytest.MonkeyPatch.context() as patch, torch.cuda.stream(stream):
        patch.setattr(
            EXTENSION, "run", lambda place, *given: (ran.append(place.stream), run(place, *given))[1]
        )
        for _ in range(50):  # were it another stream's, these would overtake one another
            x.add_(1)
            y, saved = train(x, channel_axis=-1)
            dx = backward(dy, saved).dx
            x.copy_(y)
    stream.synchronize()
    assert set(ran) == {stream.cuda_stream}
    want, last = LARGE.x, None
    for _ in range(50):
        want = want + np.float32(1)
        y, saved = train(want, channel_axis=-1)
        last = backward(LARGE.dy, saved).dx
        want = y
    assert alike([x, dx], [want, last])


def test_calls_replay_in_a_captured_graph():
    x, dy, gamma, beta = (there(a) for a in (LARGE.x, LARGE.dy, *LARGE.parameters))
    running = [torch.zeros(96, device="cuda"), torch.ones(96, device="cuda")]

    def step() -> Any:
        y, saved = train(
            x,
            gamma,
            beta,
            channel_axis=-1,
            activation="relu",
            running_mean=running[0],
            running_var=running[1],
        )
        return y, saved, backward(dy, saved)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    running[0].zero_(), running[1].fill_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, saved, gradients = step()
    mean, var = np.zeros(96, np.float32), np.ones(96, np.float32)
    for seed in range(3):
        new = np.random.default_rng(seed).normal(seed, 2, LARGE.x.shape).astype(np.float32)
        x.copy_(torch.from_numpy(new))
        graph.replay()
        torch.cuda.synchronize()
        want, kept = train(
            new, *LARGE.parameters, channel_axis=-1, activation="relu", running_mean=mean, running_var=var
        )
        assert alike([y, saved.mean, *running], [want, kept.mean, mean, var])
        assert alike(gradients, backward(LARGE.dy, kept))


def test_a_module_trains_in_a_captured_graph():
    module, plain = modules.BatchNorm2d(96).cuda(), modules.BatchNorm2d(96)
    x = there(np.moveaxis(LARGE.x, -1, 1))

    def step() -> Any:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(module(leaf).square().sum(), leaf)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    module.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(2):
        graph.replay()
        plain(torch.from_numpy(np.moveaxis(LARGE.x, -1, 1).copy()))
    torch.cuda.synchronize()
    assert torch.equal(module.running_var.cpu(), plain.running_var)


def test_the_memory_of_a_call_is_the_allocator_s():
    x = there(LARGE.x)
    train(x, channel_axis=-1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        y, saved = train(x, channel_axis=-1)
        backward(y, saved)
    del y, saved
    assert torch.cuda.memory_allocated() == before


def test_a_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = send(P.x, "cuda:1")
    y, saved = train(x)
    assert y.device == x.device == saved.mean.device and torch.cuda.current_device() == 0
    assert alike([y, backward(x, saved).dx], [train(P.x).y, backward(P.x, train(P.x).saved).dx])
    with pytest.raises(ValueError, match=r"gamma is .* on cuda:0 and x is on cuda:1"):
        train(x, torch.ones(3, device="cuda:0"))


def test_an_array_of_the_cpu_among_those_of_the_gpu():
    with pytest.raises(
        TypeError, match=r"gamma is .* on the CPU and x is on cuda:0.*torch.as_tensor\(gamma, dev"
    ):
        train(there(P.x), torch.ones(3))
    with pytest.raises(TypeError, match=r"x is on the CPU and gamma, torch.Tensor, on a GPU.*gamma.cpu\(\)"):
        train(P.x, torch.ones(3, device="cuda"))


@pytest.mark.parametrize("library", ["cupy", "jax.numpy"])
def test_arrays_of(library):
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    x, dy, gamma = (module.asarray(a) for a in (P.x, P.dy, P.parameters[0]))
    if not batchnorm._arrays.on_gpu(x):
        pytest.skip(f"{library} makes no arrays on a GPU")
    y, saved = train(x, gamma)
    dx, dgamma, _ = backward(dy, saved)
    want, kept = train(P.x, P.parameters[0])
    expected = (want, *backward(P.dy, kept)[:2])
    assert type(y) is type(x)
    fetched = [a.get() if hasattr(a, "get") else np.asarray(a) for a in (y, dx, dgamma)]
    assert all(same_but_nan(a, b) for a, b in zip(fetched, expected, strict=True))


def test_the_configuration_tells():
    assert batchnorm.config()["cuda"].startswith(f"{EXTENSION.runtime()}; ")
