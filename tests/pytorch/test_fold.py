"""batchnorm.torch.fold: the same outputs without batch norms, whatever is before them; proven, or refused."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")

import batchnorm.torch  # noqa: E402
from pytorch.models import C, held, images, small, trained  # noqa: E402
from torch import nn  # noqa: E402

LINEAR = r"folded into nn.Linear, which is right only for its inputs \(N, C\); pass example="


def fold(model, example=None):
    """What the package does; without an example it warns of batch norms behind nn.Linear alone."""
    warns = example is None and any(type(m) is nn.Linear for m in model.modules())
    with pytest.warns(UserWarning, match=LINEAR) if warns else contextlib.nullcontext():
        return batchnorm.torch.fold(model, example)


def lived(model):
    """Every batch norm with statistics, gamma and beta that are nobody's initial values."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor, 0.3)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.1, 9)
    return model


def kinds(model):
    return [type(m).__name__ for m in model.modules() if not [*m.children()]]


def same(model, folded, x, tolerance=1e-5):
    with torch.no_grad():
        want, got = model.eval()(x), folded(x)
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


LAYERS = {
    "conv1d": (nn.Conv1d(6, 8, 3, padding=1, stride=2), nn.BatchNorm1d(8), (5, 6, 20)),
    "conv2d": (nn.Conv2d(6, 8, (3, 1), bias=False, dilation=2), nn.BatchNorm2d(8), (5, 6, 9, 9)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), (5, 6, 9, 9)),
    "depthwise": (
        nn.Conv2d(6, 12, 3, groups=6, padding_mode="reflect", padding=1),
        nn.BatchNorm2d(12),
        (2, 6, 9, 9),
    ),
    "square": (nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), (5, 6, 3, 3)),
    "padded": (nn.Conv2d(6, 8, 1, padding=3, padding_mode="reflect"), nn.BatchNorm2d(8), (5, 6, 5, 5)),
    "same": (nn.Conv2d(6, 8, 3, padding="same"), nn.BatchNorm2d(8), (5, 6, 5, 5)),
    "conv3d": (nn.Conv3d(4, 4, 2), nn.BatchNorm3d(4), (2, 4, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), (5, 6, 5, 5)),
    "transposed padded": (nn.ConvTranspose2d(6, 8, 1, padding=2), nn.BatchNorm2d(8), (5, 6, 7, 7)),
    "transposed square": (nn.ConvTranspose2d(6, 6, 3), nn.BatchNorm2d(6), (5, 6, 5, 5)),
    "transposed grouped": (nn.ConvTranspose2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), (5, 6, 5, 5)),
    "transposed depthwise": (nn.ConvTranspose1d(6, 6, 3, groups=6), nn.BatchNorm1d(6), (5, 6, 5)),
    "linear": (nn.Linear(6, 8), nn.BatchNorm1d(8), (5, 6)),
    "sync": (nn.Conv2d(6, 8, 3), nn.SyncBatchNorm(8), (5, 6, 9, 9)),
    "no affine": (nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, affine=False, eps=0.1), (5, 6, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_layer(name, dtype):
    layer, norm, shape = LAYERS[name]
    model = lived(nn.Sequential(layer, norm)).to(dtype)
    before = held(model)
    folded = fold(model)
    assert held(model) == before and kinds(folded) == [type(layer).__name__, "Identity"]
    assert folded[0].weight.dtype == folded[0].bias.dtype == dtype and not folded.training
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    assert same(model.double(), folded.double(), x, 8 * torch.finfo(dtype).eps)
    model.float()


@pytest.mark.parametrize("example", [None, images(4)], ids=["alone", "with example"])
def test_a_module_tree(example):
    model = trained(small())
    folded = fold(model, example)
    assert "BatchNorm" not in str(folded) and str(model).count("BatchNorm") == 5
    assert [n for n, _ in folded.named_modules()] == [n for n, _ in model.named_modules()]
    assert same(model, folded, images(9, seed=7))
    assert same(model, fold(torch.compile(model, backend="eager")), images(9, seed=7))


class Branching(nn.Module):
    """What fx cannot trace: a branch on data. Its block can be traced, but not who uses what is in it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.block = nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C))

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.block(x) if x.sum() != 0 else x


class Optional(nn.Module):
    """What is done depends on whether there is a mask, which to fx there always is."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.masked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x, mask=None, *, sizes=(1, 2)):
        y = self.conv(x)
        z = self.bn(y)
        if mask is None:
            return self.relu(z) + y + z
        return self.relu(z) + self.masked(mask)


def test_a_branch_on_an_argument_with_a_default():
    """A pair counts if it is one with the default, too; one that is not called with it is."""
    model = lived(Optional())
    folded = fold(model)
    assert isinstance(folded.bn, nn.BatchNorm2d) and isinstance(folded.masked[1], nn.Identity)
    assert same(model, folded, images(2))
    fused = batchnorm.torch.convert(copy.deepcopy(model), fuse=True)
    assert not fused.bn.rectified_by and same(model, fused.eval(), images(2))


def test_what_cannot_be_traced_wants_an_example():
    model = lived(Branching())
    untraced = r"no batch norm that can be folded: torch.fx cannot trace the model: .*; pass example="
    with pytest.raises(ValueError, match=untraced):
        fold(model)
    whole = fold(model, images(3))
    assert "BatchNorm" not in str(whole) and same(model, whole, images(5, seed=8))
    with pytest.raises(ValueError, match=untraced):
        fold(lived(Only()))
    assert "BatchNorm" not in str(fold(lived(Only()), {"x": images(3)}))


class Only(Branching):
    def __init__(self):
        super().__init__()
        self.block = nn.Conv2d(C, C, 3)


class Twice(nn.Module):
    """The convolution's output is used beside the batch norm."""

    def __init__(self, branch):
        super().__init__()
        self.conv, self.bn, self.branch = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), branch
        self.good = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C))

    def forward(self, x):
        y = self.conv(x)
        if self.branch and y.sum() == 0:
            return x
        return self.bn(y) + y + self.good(x)


@pytest.mark.parametrize("branch", [False, True])
def test_what_would_change_the_output_is_left(branch):
    model = lived(Twice(branch))
    for example in (images(3), None) if not branch else (images(3),):
        folded = fold(model, example)
        assert isinstance(folded.bn, nn.BatchNorm2d) and isinstance(folded.good[1], nn.Identity)
        assert same(model, folded, images(5, seed=8))


class Elsewhere(nn.Module):
    """The convolution's weight is used beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)


def shared():
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda m, x, y: y * 2)
    return model


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    "make",
    [
        shared, hooked, Elsewhere, parametrized, lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ],
)  # fmt: skip
def test_what_is_not_folded(make):
    for example in (None, images(3)):
        with pytest.raises(ValueError, match=r"none follows a convolution or nn\.Linear, alone and at once"):
            fold(lived(make()), example)


def test_a_linear_layer_along_another_axis():
    """As many steps as outputs: the shapes fit, and an example shows that folding would be wrong."""
    model, x = lived(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))), torch.randn(6, 4, 5)
    with pytest.raises(ValueError, match="none follows"):
        fold(model, x)


def test_bad_statistics_and_bad_input():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].running_var[1] = -1
    with pytest.raises(ValueError, match=r"1, behind 0: var is -1\.0 at channel 1, expected var >= 0"):
        fold(model)
    model[1].running_var[1] = 1e-30
    model[1].eps = 0
    model[0].half()
    with pytest.raises(ValueError, match="1, behind 0: folded weight and bias are not finite in float16"):
        fold(model)
    with pytest.raises(ValueError, match="has no batch norm"):
        batchnorm.torch.fold(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="a batch has a tensor on meta, the model is on cpu"):
        fold(small(), images(2).to("meta"))
    with pytest.raises(TypeError, match=r"model is None, expected a torch\.nn\.Module"):
        batchnorm.torch.fold(None)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.calls = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), 0

    def forward(self, x):
        Noisy.count = getattr(Noisy, "count", 0) + 1
        return self.body(x) * Noisy.count


def test_a_model_that_is_never_the_same():
    with pytest.raises(ValueError, match="outputs on example differ each time; is it random in eval mode"):
        fold(lived(Noisy()), images(2))


class Reads(nn.Module):
    """What the convolution makes is read beside the batch norm, in a way that hardly shows in the output."""

    def __init__(self, how, small=1e-12):
        super().__init__()
        self.conv, self.bn, self.how, self.small = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), how, small
        self.good = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        if x.sum() == 0:  # for fx
            return x
        y = self.conv(x)
        return self.bn(y) + self.good(x) + self.small * self.how(y)


@pytest.mark.parametrize(
    "how",
    [
        lambda y: y, lambda y: torch.cat([y, y])[:3], lambda y: y.data.mean(), lambda y: float(y.mean()),
        lambda y: y.view(-1)[0], lambda y: nn.functional.relu(input=y), lambda y: y.argmax().double(),
    ],
)  # fmt: skip
def test_whatever_else_reads_the_output_is_seen(how):
    folded = fold(lived(Reads(how)), images(3))
    assert isinstance(folded.bn, nn.BatchNorm2d) and isinstance(folded.good[1], nn.Identity)


def test_what_only_looks_at_the_shape_is_no_use():
    assert isinstance(fold(lived(Reads(lambda y: y.shape[0] + y.dim())), images(3)).bn, nn.Identity)


@dataclass
class Answer:
    scores: object
    features: object


class Answers(nn.Module):
    """A convolution's output that is returned in an object, and read nowhere."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.bn, self.make = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), make
        self.good = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.conv(x)
        return self.make(self.bn(y) + self.good(x), y)


@pytest.mark.parametrize(
    "make", [Answer, lambda a, b: SimpleNamespace(a=a, inner=Answer(b, None)), lambda a, b: (a, {"b": [b]})]
)
def test_all_that_a_model_returns_is_compared(make):
    folded = fold(lived(Answers(make)), images(3))
    assert isinstance(folded.bn, nn.BatchNorm2d) and isinstance(folded.good[1], nn.Identity)


@pytest.mark.parametrize("make", [lambda a, b: None, lambda a, b: a.argmax(1), lambda a, b: [3.0, "text"]])
def test_an_answer_with_nothing_to_compare(make):
    with pytest.raises(ValueError, match="output on example has no floating tensor that could be compared"):
        fold(lived(Answers(make)), images(3))


def test_integers_are_compared_and_each_tensor_with_its_own_size():
    integers = fold(lived(Answers(lambda a, b: (a, (b * 100).long()))), images(3))
    small = fold(lived(Answers(lambda a, b: (a * 1e9, (b,)))), images(3))
    assert all(isinstance(each.bn, nn.BatchNorm2d) for each in (integers, small))
    assert all(isinstance(each.good[1], nn.Identity) for each in (integers, small))


class OwnDtype(Answers):
    """Its code wants float32, and says so in its own way."""

    def forward(self, x):
        assert x.dtype == torch.float32
        return self.good(x)


def test_a_model_that_refuses_float64_is_compared_in_its_own_dtype():
    model = lived(OwnDtype(None))
    assert isinstance(fold(model, images(3)).good[1], nn.Identity)


def test_the_channels_are_on_axis_1():
    """Layers without a batch axis: what fits by its shape would be normalised along another axis."""
    fits = [
        (nn.Conv1d(3, 4, 1), nn.BatchNorm1d(9), (3, 9)), (nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), (3, 4)),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4), (3, 4, 6)),
        (nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), (3, 4, 6)),
        (nn.Linear(5, 4), nn.BatchNorm2d(4), (2, 4, 3, 5)), (nn.Linear(5, 4), nn.SyncBatchNorm(4), (6, 4, 5)),
    ]  # fmt: skip
    for layer, norm, shape in fits:
        with pytest.raises(ValueError, match="none follows"):
            fold(lived(nn.Sequential(layer, norm)), torch.randn(shape))
    for layer, norm, _ in (fits[2], fits[4]):
        with pytest.raises(ValueError, match="none follows"):
            batchnorm.torch.fold(nn.Sequential(layer, norm))


def test_one_layer_for_all_steps_of_a_loop():
    """Each call of the batch norm takes what the same layer made, so both may be folded."""

    class Loop(nn.Module):
        def __init__(self, extra):
            super().__init__()
            self.conv, self.bn, self.extra = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), extra

        def forward(self, x):
            x = self.bn(self.conv(x))
            x = self.bn(input=self.conv(x))
            return x + 1e-12 * self.conv(x) if self.extra else x

    assert isinstance(fold(lived(Loop(False)), images(3)).bn, nn.Identity)
    with pytest.raises(ValueError, match="none follows"):
        fold(lived(Loop(True)), images(3))
