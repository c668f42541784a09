"""The modules in PyTorch's machinery: where they compute, where its own operator does, what is kept."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")

import batchnorm.torch as ours  # noqa: E402
import numpy as np  # noqa: E402
from batchnorm.distributed import torch_group  # noqa: E402
from batchnorm.torch.sync import synchronised  # noqa: E402
from pytorch.models import images, small  # noqa: E402
from pytorch.workers import on_ranks  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from support.refusals import refused  # noqa: E402


def is_ours(y):
    return y.grad_fn is not None and "Normalise" in y.grad_fn.name()


def pair(**options):
    """Theirs and ours with the same state."""
    torch.manual_seed(0)
    theirs, own = nn.BatchNorm2d(3, **options), ours.BatchNorm2d(3, **options)
    for tensor in theirs.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(3) + 0.5)
    own.load_state_dict(theirs.state_dict())
    return theirs, own


def image(seed=1, **options):
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).to(**options)


def assert_same_step(theirs, own, x):
    """Output and state after a call, or the same error."""
    try:
        want = theirs(x)
    except Exception as error:
        with pytest.raises(type(error)) as caught:
            own(x)
        assert str(caught.value) == str(error)
        return
    torch.testing.assert_close(own(x), want, equal_nan=True)
    for (name, a), b in zip(theirs.named_buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(b, a, equal_nan=True, msg=name)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0, -1.0, 1.5])
def test_any_momentum(momentum):
    theirs, own = pair(momentum=momentum)
    for seed in range(3):
        assert_same_step(theirs, own, image(seed))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_values_that_the_functions_refuse(name, value, training):
    theirs, own = pair()
    for module in (theirs, own):
        module.train(training).state_dict()[name][1] = value
    assert_same_step(theirs, own, image())


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda c: c(3, eps=0.0), image()),
        (lambda c: c(3), image()[0]),
        (lambda c: c(3), image()[:, :2]),
        (lambda c: c(3), image()[:1, :, :1, :1]),
        (lambda c: c(3), image()[:0]),
        (lambda c: c(3), image().double()),
        (lambda c: c(3), image().long()),
        (lambda c: c(3), image() * float("nan")),
        (lambda c: c(3).double(), image()),
        (lambda c: c(3), image().to_sparse()),
        (lambda c: c(3, track_running_stats=False), image()),
        (lambda c: c(3, affine=False).eval(), image()),
        (lambda c: c(3), image().transpose(2, 3)[:, :, ::2]),
        (lambda c: c(3), image().to("meta")),
    ],
)
def test_calls_and_errors_are_pytorchs(make, x):
    if x.is_meta:
        assert ours.BatchNorm2d(3, device="meta")(x).is_meta
    else:
        assert_same_step(make(nn.BatchNorm2d), make(ours.BatchNorm2d), x)


BAD_CALLS = {
    "list": (lambda: [[1.0]], (TypeError, AttributeError), "."),
    "None": (lambda: None, (TypeError, AttributeError), "."),
    "an array": (lambda: image().numpy(), (TypeError, AttributeError), "."),
    "3-D": (lambda: image()[0], ValueError, "expected 4D input"),
    "2-D": (lambda: image()[0, 0], ValueError, "expected 4D input"),
    "channels": (lambda: image()[:, :2], RuntimeError, "."),
    "one value": (lambda: image()[:1, :, :1, :1], ValueError, "more than 1 value per channel"),
    "int64": (lambda: image().long(), NotImplementedError, "not implemented for 'Long'"),
    "bool": (lambda: image() > 0, NotImplementedError, "not implemented for 'Bool'"),
    "complex64": (lambda: image().to(torch.complex64), NotImplementedError, "for 'ComplexFloat'"),
    "sparse": (lambda: image().to_sparse(), NotImplementedError, "'SparseCPU' backend"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_changes_nothing(case, training):
    make, error, match = BAD_CALLS[case]
    if case == "one value" and not training:
        return  # PyTorch takes it there
    own, x = pair()[1].train(training), make()
    refused(lambda: own(x), error, match, lambda: (own.state_dict(), x))


BAD_MODULES = {
    "activation": (lambda: ours.BatchNormAct2d(3, activation="swish"), ValueError, "activation is 'swish'"),
    "activation kind": (lambda: ours.BatchNormAct2d(3, activation=3), TypeError, "activation is 3"),
    "keyword": (lambda: ours.BatchNorm2d(3, offset=1), TypeError, "unexpected keyword argument 'offset'"),
    "channels": (lambda: ours.BatchNorm2d(-3), RuntimeError, "."),
    "channels kind": (lambda: ours.BatchNorm2d("3"), TypeError, "."),
    "convert": (lambda: ours.convert(3), TypeError, r"expected a torch\.nn\.Module"),
    "revert": (lambda: ours.revert(None), TypeError, r"expected a torch\.nn\.Module"),
    "nothing to convert": (lambda: ours.convert(nn.Linear(3, 3)), ValueError, "no batch norm"),
    "fuse": (lambda: ours.convert(small(), fuse=1), TypeError, r"fuse is 1 \(int\), expected True or False"),
    "fold": (lambda: ours.fold(None), TypeError, r"model is None, expected a torch\.nn\.Module"),
    "nothing to fold": (lambda: ours.fold(nn.Linear(3, 3)), ValueError, "has no batch norm"),
}


@pytest.mark.parametrize("case", BAD_MODULES)
def test_errors_of_modules(case):
    refused(*BAD_MODULES[case])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_of_16_bits_are_updated(dtype):
    own = ours.BatchNorm2d(3).to(dtype)
    x = (image() + 5).to(dtype)
    own(x)
    assert own.running_mean.dtype == dtype
    want = 0.1 * x.double().mean((0, 2, 3))
    torch.testing.assert_close(own.running_mean.double(), want, rtol=1e-2, atol=0)


def test_autocast():
    theirs, own = pair()
    stacks = [nn.Sequential(nn.Conv2d(3, 3, 1), each) for each in (theirs, own)]
    stacks[1][0].load_state_dict(stacks[0][0].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (stack(image()) for stack in stacks)
    assert got.dtype == want.dtype == torch.bfloat16 and is_ours(got)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(own.running_var, theirs.running_var)


# ---- compilers, tracers, transforms ------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return torch.relu(self.norm(x))


def test_under_compile_and_export_it_is_pytorchs_operator():
    theirs, own = pair()
    want = torch.relu(theirs.eval()(image()))
    block = Block(own.eval())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.testing.assert_close(torch.compile(block, backend=backend, fullgraph=True)(image()), want)
    assert "batch_norm" in graphs[0]
    exported = torch.export.export(block, (image(),))
    assert any("batch_norm" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(image()), want)
    traced = torch.fx.symbolic_trace(block)
    torch.testing.assert_close(traced(image()), want)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = torch.jit.trace(block, image(), check_trace=False)
    assert "batch_norm" in str(script.inlined_graph)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [ours.BatchNorm2d, ours.BatchNormAddAct2d, ours.SyncBatchNorm])
def test_in_a_graph_of_fx_it_stays_a_module(kind):
    """So that the graph follows train() and eval() and counts updates, as that of torch.nn's does."""
    norm = kind(3)
    graph = torch.fx.symbolic_trace(nn.Sequential(norm, nn.ReLU()))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert norm.num_batches_tracked == 0
    for mode in (True, False):
        torch.testing.assert_close(graph.train(mode)(image()), norm.train(mode)(image()).relu())
    assert norm.num_batches_tracked == 2
    if kind is ours.BatchNormAddAct2d:

        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = norm

            def forward(self, x, z):
                return self.norm(x, z)

        graph = torch.fx.symbolic_trace(Residual())
        torch.testing.assert_close(graph(image(1), image(2)), norm(image(1), image(2)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_function_transforms():
    theirs, own = (module.double().eval() for module in pair())
    x = image(dtype=torch.float64)

    def loss(module):
        return lambda x: (module(x) ** 3).sum()

    grads = [torch.func.grad(loss(m))(x) for m in (theirs, own)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(*(torch.func.jvp(m, (x,), (x.cos(),))[1] for m in (theirs, own)))
    torch.testing.assert_close(*(torch.vmap(m)(x.expand(2, *x.shape)) for m in (theirs, own)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        torch.testing.assert_close(
            *(torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (theirs, own))
        )


# ---- memory ------------------------------------------------------------------------------------------------


def test_nothing_is_copied():
    own = ours.BatchNorm2d(3)
    before = own.running_mean.data_ptr(), own.running_mean.detach().clone(), own.running_mean._version
    variance = own.running_var._version
    x = image().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = own(x)
    assert is_ours(y) and y.is_contiguous(memory_format=torch.channels_last)
    assert own.running_mean.data_ptr() == before[0] and not torch.equal(own.running_mean, before[1])
    assert own.running_mean._version == before[2] + 1 and own.running_var._version == variance + 1
    own.weight.data = torch.full((3,), 2.0)  # another tensor, which the next call must see
    own.running_mean = torch.full((3,), 9.0)
    torch.testing.assert_close(own(x), 2 * y)
    torch.testing.assert_close(own.running_mean, 8.1 + 0.1 * x.detach().mean((0, 2, 3)))


def test_it_keeps_the_input_as_pytorch_does():
    """So that hooks can offload it, checkpoints recompute it, and a change of it is an error."""
    theirs, own = pair()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        own(image().requires_grad_())
    assert packed[0] == (4, 3, 5, 5) and len(packed) == 3
    results = []
    for module in (theirs, own):
        x = image().requires_grad_()
        stack = nn.Sequential(nn.Conv2d(3, 3, 3), module, nn.ReLU())
        torch.manual_seed(0)
        nn.init.normal_(stack[0].weight)
        with torch.autograd.graph.save_on_cpu():
            checkpoint(stack, x, use_reentrant=False).square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)
    x = image().requires_grad_() * 1
    y = own(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    z = image().requires_grad_() * 1
    gone = weakref.ref(z)
    y = own(z)
    del z, y
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_that_stops_early(momentum):
    """Behind the last tensor that is kept nothing is run again; yet an update there is a whole one."""
    theirs, own = pair(momentum=momentum)
    for seed in range(2):
        for module in (theirs, own):
            checkpoint(module, image(seed).requires_grad_(), use_reentrant=False).sum().backward()
    for (name, a), b in zip(theirs.named_buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)
    assert int(own.num_batches_tracked) == 4


def test_modes_that_record_operators():
    theirs, own = pair()
    graph = make_fx(own.eval())(image())
    torch.testing.assert_close(graph(image(2)), theirs.eval()(image(2)))
    with FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True):
        assert own(image()).shape == image().shape


def test_batches_of_gradients_are_refused():
    _, own = pair()
    x = image().requires_grad_()
    match = r"a batch of gradients reaches .*; pass vectorize=False or is_grads_batched=False, or revert"
    with pytest.raises(RuntimeError, match=match):
        torch.autograd.functional.jacobian(lambda x: own(x).sum((0, 2, 3)), x, vectorize=True)
    with pytest.raises(RuntimeError, match=match):
        torch.autograd.functional.hessian(lambda x: own(x).pow(3).sum(), x[:1], vectorize=True)
    assert torch.autograd.functional.jacobian(lambda x: own(x).sum((0, 2, 3)), x).shape == (3, *x.shape)


def test_the_names_of_arguments_are_pytorchs():
    for kind in (ours.BatchNorm2d, ours.BatchNormAddAct2d, ours.SyncBatchNorm):
        torch.testing.assert_close(kind(3)(input=image()), kind(3)(image()))
    y = ours.convert(bn_relu(), fuse=True)[1](input=image())
    torch.testing.assert_close(y, image().relu())
    assert ours.SyncBatchNorm(3, bias=False).bias is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'offset'"):
        ours.SyncBatchNorm(3, offset=False)


def test_copies_and_files():
    _, own = pair()
    own(image())
    copies = [copy.deepcopy(own), pickle.loads(pickle.dumps(own))]
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    with torch.no_grad():
        for other in copies:
            assert type(other) is ours.BatchNorm2d
            other.weight.mul_(3)
            torch.testing.assert_close(
                other(image()) - other.bias.view(1, 3, 1, 1), 3 * (own(image()) - own.bias.view(1, 3, 1, 1))
            )
            own.running_mean.copy_(other.running_mean)


def test_a_parameter_that_becomes_another_view():
    """Of the same address, size and class."""
    theirs, own = pair()
    base = torch.rand(12)
    for view in (base[::4], base[:3], base.view(torch.float64)[:3]):
        for module in (theirs, own):
            module.to(view.dtype).weight.data = view
        torch.testing.assert_close(own(image().to(view.dtype)), theirs(image().to(view.dtype)))


def test_parametrized_and_pruned_parameters():
    class Absolute(nn.Module):
        def forward(self, weight):
            return weight.abs()

    theirs, own = pair()
    for module in (theirs, own):
        parametrize.register_parametrization(module, "weight", Absolute())
        prune.l1_unstructured(module, "bias", 1)
    assert_same_step(theirs, own, image())
    assert is_ours(own(image()))


# ---- activations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu", None])
def test_fused_activations(name, training):
    theirs, _ = pair()
    module = ours.BatchNormAddAct2d(3, activation=name)
    module.load_state_dict(theirs.state_dict())
    results = []
    for function in (
        module,
        lambda x, z: getattr(functional, name or "identity", lambda v: v)(theirs(x) + z),
    ):
        for each in (module, theirs):
            each.train(training)
        x, z = image(1).requires_grad_(), image(2).requires_grad_()
        y = function(x, z)
        y.backward(image(3))
        results.append([y, x.grad, z.grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert is_ours(results[0][0])
    # Where shapes broadcast, or tensors are not the CPU's, it is PyTorch's.
    want = module.activation and getattr(functional, name)(theirs(x) + z[:1])
    torch.testing.assert_close(module(x, z[:1]), theirs(x) + z[:1] if name is None else want)
    assert f"activation={name!r}" in repr(module)


def test_a_wrong_activation():
    with pytest.raises(ValueError, match="activation is 'swish', expected None, 'relu'"):
        ours.BatchNormAct2d(3, activation="swish")
    with pytest.raises(TypeError, match="activation is 3"):
        ours.BatchNormAct2d(3, activation=3)


# ---- whole models ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """One ReLU module that is called in three places, as in many ResNets; one output used twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
        )
        self.conv2, self.bn2, self.bn3 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = self.relu(y + x)
        z = self.bn3(y)
        return self.relu(z * 1) - z


@pytest.mark.parametrize("make", [small, Residual], ids=["small", "residual"])
def test_convert_and_revert(make):
    torch.manual_seed(0)
    model = make()
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    names, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
    plain = copy.deepcopy(model)
    assert ours.convert(model, fuse=True) is model
    assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == ids
    fused = [n for n, m in model.named_modules() if getattr(m, "rectified_by", ())]
    assert fused == (["bn1"] if make is Residual else ["1"])
    results = []
    for each in (plain, model):
        x = images(8).requires_grad_()
        y = each(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in each.parameters()), *each.buffers()])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        torch.compile(model.eval(), backend="eager")(images(4)), plain.eval()(images(4))
    )
    torch._dynamo.reset()
    assert ours.diagnose(model, [images(64)]).codes
    if make is small:
        folded = ours.fold(model, images(4))
        torch.testing.assert_close(folded(images(4)), plain(images(4)), rtol=1e-3, atol=1e-4)
    saved = pickle.loads(pickle.dumps(model))
    for each in (model, saved):
        assert ours.revert(each) is each
        assert {n: type(m) for n, m in each.named_modules()} == {n: t for n, (_, t) in before.items()}
        torch.testing.assert_close(each(images(4)), plain(images(4)))
    assert {n: id(m) for n, m in model.named_modules()} == {n: i for n, (i, _) in before.items()}


def test_what_cannot_be_converted():
    class Own(nn.BatchNorm2d):
        pass

    for model in (nn.Linear(3, 3), nn.Sequential(Own(3)), ours.BatchNormAct2d(3)):
        with pytest.raises(ValueError, match="no batch norm"):
            ours.convert(model)
    for function in (ours.convert, ours.revert):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            function(3)
    with pytest.raises(TypeError, match=r"fuse is 1 \(int\), expected True or False"):
        ours.convert(nn.Sequential(nn.BatchNorm2d(3)), 1)


def bn_relu():
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())


def fused(y):
    """Whether the batch norm before a ReLU has rectified."""
    return float(y.detach().min()) >= 0


def test_a_converted_model_may_be_converted():
    model = ours.convert(ours.convert(bn_relu()))
    assert fused(ours.convert(model, fuse=True)[0](image()))
    assert fused(ours.convert(model, fuse=True)[0](image()))
    assert not fused(ours.convert(model)[0](image()))
    assert vars(ours.revert(model)[0]).keys() == vars(bn_relu()[0]).keys()


def test_a_model_that_keeps_activations():
    model = bn_relu()
    model.kept = model(image())
    for call in (lambda: ours.convert(model, fuse=True), lambda: ours.fold(model)):
        with pytest.raises(ValueError, match=r"^model, .*, cannot be copied: .*; detach\(\) or delete what"):
            call()


def test_fusion_is_asked_for():
    model = ours.convert(bn_relu())
    assert not fused(model[:1](image())) and type(model[1]) is nn.ReLU
    assert fused(ours.convert(model := bn_relu(), fuse=True)[:1](image())) and type(model[1]) is not nn.ReLU


@pytest.mark.parametrize("which", [0, 1], ids=["batch norm", "relu"])
@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_see_what_they_saw_before(which, kind):
    """Also one that is registered after the conversion."""
    model, plain = ours.convert(bn_relu(), fuse=True), bn_relu()
    seen = [], []
    for each, notes in zip((model, plain), seen, strict=True):
        hook = getattr(each[which], f"register_{kind}_hook")(lambda m, *v, n=notes: n.extend(v))
        each(image().requires_grad_()).square().sum().backward()
        hook.remove()
    for got, want in zip(*seen, strict=True):
        torch.testing.assert_close(got, want)
    assert seen[0] and fused(model[0](image()))


def test_a_mark_does_not_outlive_the_value():
    model = ours.convert(bn_relu(), fuse=True)
    with torch.no_grad():
        y = model[0](image()).sub_(1)
        torch.testing.assert_close(model[1](y), torch.relu(y))
    with torch.inference_mode():
        torch.testing.assert_close(model(image()), bn_relu()(image()))


class Modes(nn.Module):
    """In one of the modes the output of the batch norm is used beside the ReLU."""

    def __init__(self, mode):
        super().__init__()
        self.norm, self.relu, self.mode = nn.BatchNorm2d(3), nn.ReLU(), mode

    def forward(self, x):
        y = self.norm(x)
        return self.relu(y) + y if self.training is self.mode else self.relu(y)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = bn_relu()

    def forward(self, x):
        return self.body(x) + self.body[0](x) if x.sum() > 0 else self.body(x)


@pytest.mark.parametrize("mode", [True, False])
def test_a_fused_relu_is_the_only_user_in_both_modes(mode):
    model, plain = ours.convert(Modes(mode), fuse=True), Modes(mode)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(image()), plain.train(training)(image()))
    assert not fused(model.norm(image()))


def test_a_model_that_cannot_be_traced_is_not_fused():
    model = Untraceable()
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace the model: .*; pass fuse=False"):
        ours.convert(model, fuse=True)
    assert type(model.body[0]) is nn.BatchNorm2d
    torch.testing.assert_close(ours.convert(model)(image() + 1), Untraceable()(image() + 1))


def test_threads_follow_pytorch_and_change_no_bit():
    _, own = pair()
    x, before, results = torch.randn(8, 3, 64, 64), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x.grad = None
            y = own(x.requires_grad_())
            y.square().sum().backward()
            results.append((y.detach().numpy().tobytes(), x.grad.numpy().tobytes()))
    finally:
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0] == results[2][0]


# ---- several processes -------------------------------------------------------------------------------------


def whole(dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(2, 24, 6, 7, 5, generator=g, dtype=torch.float64) * 2 + 3).to(dtype)
    module = ours.SyncBatchNorm(6).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.rand(6, generator=g) + 0.5)
        module.bias.copy_(torch.rand(6, generator=g))
    return module, x, dy


def _step(rank, cuts, dtype):
    module, x, dy = whole(dtype)
    x, dy = x[cuts[rank] : cuts[rank + 1]].requires_grad_(), dy[cuts[rank] : cuts[rank + 1]]
    y = module(x)
    y.backward(dy)
    found = {"y": y, "dx": x.grad, "dw": module.weight.grad, "db": module.bias.grad}
    return {n: t.detach() for n, t in found.items()} | {n: b.clone() for n, b in module.named_buffers()}


def _more(rank):
    """DDP over a converted model, NaN on one process, evaluation, errors."""
    found = {}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = ours.convert(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    parallel = nn.parallel.DistributedDataParallel(model)
    x = images(8)
    y = parallel(x[rank * 3 : 3 + rank * 5])
    (y.square().sum() / 8 * 2).backward()  # DDP averages over 2
    found["grad"] = [p.grad.clone() for p in model.parameters()]
    module, x, _ = whole(torch.float32)
    if rank:
        x[0, 2] = float("nan")
    y = module(x.requires_grad_())
    y.sum().backward()
    found["nan"] = (
        y.isnan().all(0).flatten(1).all(1).tolist(),
        x.grad.isnan().flatten(2).all(2).all(0).tolist(),
    )
    found["buffer"] = module.running_mean.isnan().tolist()
    module.eval()
    found["eval"] = bool(torch.isfinite(module(x.detach()[1:])).any())
    try:
        ours.SyncBatchNorm(6)(torch.ones(1 - rank, 6))
    except ValueError as error:
        found["error"] = str(error)
    try:
        ours.SyncBatchNorm(6)(torch.ones(3, 6 - rank))
    except (ValueError, RuntimeError) as error:
        found["channels"] = str(error)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_synchronised_statistics_are_those_of_the_whole_batch(dtype):
    """Uneven parts, one of them empty: outputs and gradients of one process with all of it, in float64."""
    parts = on_ranks(3, _step, (0, 7, 7, 24), dtype)
    module, x, dy = whole(dtype)
    plain = nn.BatchNorm2d(6).double()
    plain.load_state_dict(module.double().state_dict())
    x = x.double().requires_grad_()
    y = plain(x)
    y.backward(dy.double())
    tolerance = 64 * torch.finfo(dtype).eps
    for name, want in (("y", y), ("dx", x.grad)):
        got = torch.cat([part[name] for part in parts]).double()
        assert (got - want).abs().max() <= tolerance * want.abs().max(), name
    for name, want in (("dw", plain.weight.grad), ("db", plain.bias.grad)):
        got = sum(part[name].double() for part in parts)
        assert (got - want).abs().max() <= 8 * tolerance * want.abs().max(), name
    for name, want in plain.named_buffers():
        values = [part[name].numpy() for part in parts]
        assert all((v == values[0]).all() for v in values)
        np.testing.assert_allclose(values[0], want.numpy(), rtol=float(tolerance))


def test_synchronised_bits_do_not_depend_on_the_cut():
    one, two = (
        on_ranks(3, _step, (0, 7, 7, 24), torch.float32),
        on_ranks(2, _step, (0, 20, 24), torch.float32),
    )
    for name in ("y", "dx"):
        assert torch.equal(
            torch.cat([part[name] for part in one]), torch.cat([part[name] for part in two])
        ), name
    for name in ("running_mean", "running_var"):
        assert all(torch.equal(part[name], one[0][name]) for part in (*one, *two)), name


def test_ddp_and_faults_of_one_process():
    parts = on_ranks(2, _more)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    (model(images(8)).square().sum() / 8).backward()
    for part in parts:
        for got, parameter in zip(part["grad"], model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-4)
        only = [i == 2 for i in range(6)]
        assert part["nan"] == (only, only) and part["buffer"] == only and part["eval"]
        assert "one value per channel in all ranks, from which no variance can be had" in part["error"]
        assert "x has 5 channels on axis 1, (3, 5), expected 6" in part["channels"]
    assert parts[0]["channels"].startswith("rank 1 of the group failed: ")


def test_what_is_sent_is_memory_of_torch(monkeypatch):
    """NumPy's would be freed by a thread of gloo's, which may outlive the interpreter."""
    sent = []

    def all_gather(parts, mine, group):
        sent.append(mine.untyped_storage().resizable())
        parts[0].copy_(mine)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    x = image().requires_grad_()
    synchronised(x, None, None, None, 1e-5, torch_group()).sum().backward()
    assert sent == [True, True] and not torch.from_numpy(np.ones(3)).untyped_storage().resizable()


def test_alone_it_is_a_batch_norm_of_any_rank():
    module, x, _ = whole()
    assert is_ours(module(x)) and is_ours(module(x.flatten(1).view(24 * 35, 6)))
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        module(torch.ones(6))
