"""PyTorch's own cases for batch norm, ModuleInfo and OpInfo of its wheel, run on this package's modules."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")
pytest.importorskip("expecttest", reason="expecttest, which torch.testing needs, is not installed")

import batchnorm.torch  # noqa: E402
from batchnorm.torch.function import normalise  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

OURS = {
    nn.BatchNorm1d: batchnorm.torch.BatchNorm1d,
    nn.BatchNorm2d: batchnorm.torch.BatchNorm2d,
    nn.BatchNorm3d: batchnorm.torch.BatchNorm3d,
}
MODULES = [info for info in module_db if info.module_cls in OURS]
# One entry with cuDNN and one without; the samples are the same.
OP = next(info for info in op_db if info.name == "nn.functional.batch_norm")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = {nn.BatchNorm1d: (5, 4, 3), nn.BatchNorm2d: (5, 4, 3, 2), nn.BatchNorm3d: (3, 4, 2, 3, 2)}


def cases(info, dtype, training):
    """(arguments of the constructor, input), each PyTorch's and then one of memory in channels last."""
    for case in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training):
        made = case.constructor_input
        x = case.forward_input.args[0]
        for format in {4: [None, torch.channels_last], 5: [None, torch.channels_last_3d]}.get(
            x.dim(), [None]
        ):
            y = x.detach() if format is None else x.detach().contiguous(memory_format=format)
            yield made.args, made.kwargs, y


def randomised(module):
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 * (name != "running_mean"))
    return module


def run(module, x, dy):
    """Output, gradients and state after a step, in float64."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    y.backward(dy)
    found = {
        "y": y,
        "dx": x.grad,
        **{n: p.grad for n, p in module.named_parameters()},
        **dict(module.named_buffers()),
    }
    return y, {name: t.detach().double() for name, t in found.items()}


def assert_close(got, want, dtype):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape
        if value.numel():
            error = (got[name] - value).abs().max()
            assert error <= 32 * torch.finfo(dtype).eps * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda i: i.name)
def test_module_info(info, dtype, training):
    """Outputs, gradients and buffers of every case are torch.nn's in float64, and strides are torch.nn's."""
    count = 0
    for args, kwargs, x in cases(info, dtype, training):
        wide = randomised(info.module_cls(*args, **kwargs).double()).train(training)
        theirs, ours = (
            randomised(c(*args, **kwargs).to(dtype)).train(training)
            for c in (info.module_cls, OURS[info.module_cls])
        )
        wide.load_state_dict(
            {
                n: t.to(t.dtype if t.dtype == torch.int64 else torch.float64)
                for n, t in theirs.state_dict().items()
            }
        )
        assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(count)).to(dtype)
        like, _ = run(theirs, x, dy)
        y, got = run(ours, x, dy)
        _, want = run(wide, x.double(), dy.double())
        assert y.dtype == dtype and y.stride() == like.stride()
        assert "Normalise" in y.grad_fn.name() or kwargs.get("eps", 1) == 0 or not x.numel()
        assert_close(got, want, dtype)
        count += 1
    assert count >= 8


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=lambda i: i.name)
def test_gradcheck_and_gradgradcheck(info, training):
    torch.manual_seed(0)
    for kwargs in ({}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}):
        module = randomised(OURS[info.module_cls](4, **kwargs).double()).train(training)
        x = torch.randn(SHAPES[info.module_cls], dtype=torch.float64, requires_grad=True)
        parameters = tuple(module.parameters())

        def function(x, *parameters, module=module):
            return torch.func.functional_call(module, dict(zip(("weight", "bias"), parameters)), (x,))  # noqa: B905

        assert "Normalise" in function(x, *parameters).grad_fn.name()
        assert torch.autograd.gradcheck(function, (x, *parameters))
        assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize("name", ["relu", "silu", "leaky_relu"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_gradients_behind_an_activation(name, residual):
    torch.manual_seed(3)
    module = randomised(batchnorm.torch.BatchNormAddAct2d(4, activation=name).double())
    x, z = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in ([x, z] if residual else [x])]

    def function(x, z=None):
        return module(x, z)

    plain = nn.BatchNorm2d(4).double()
    plain.load_state_dict(module.state_dict())
    want = getattr(nn.functional, name)(plain(x) + (z if residual else 0))
    torch.testing.assert_close(function(*inputs), want)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_info(dtype):
    """Outputs, gradients and buffers of every sample of nn.functional.batch_norm, momentum -1 among them."""
    count = 0
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
        results = []
        for wide, function in ((False, normalise), (True, nn.functional.batch_norm)):
            to = torch.float64 if wide else dtype
            x, mean, var, *affine = (
                None if t is None else t.detach().to(to, copy=True) for t in _five(sample)
            )
            leaves = [t.requires_grad_() for t in (x, *affine) if t is not None]
            options = {"training": False, "momentum": 0.1, "eps": 1e-5, **sample.kwargs}
            rest = options["training"], options["momentum"], options["eps"]
            given = (x, *affine, mean, var) if function is normalise else (x, mean, var, *affine)
            y = function(*given, *rest)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(to)
            grads = torch.autograd.grad(y, leaves, dy)
            results.append(
                {str(i): t.detach().double() for i, t in enumerate((y, *grads, mean, var)) if t is not None}
            )
        assert_close(*results, dtype)
        count += 1
    assert count == len(list(OP.sample_inputs("cpu", dtype))) >= 10


def _five(sample):
    """x, mean, var, weight, bias of a sample, wherever they stand in it."""
    args = [*sample.args, None, None, None, None][:4]
    named = dict(zip(("running_mean", "running_var", "weight", "bias"), args, strict=True))
    named |= {n: t for n, t in sample.kwargs.items() if n in named}
    return sample.input, *named.values()


def test_copies_are_apart():
    ours = batchnorm.torch.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2)
    ours(x)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.weight.fill_(5)
        other.weight.data = torch.full((3,), 7.0)
    torch.testing.assert_close(other(x) / 7, ours(x))
