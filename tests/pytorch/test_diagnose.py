"""batchnorm.torch.diagnose: stock models, each fault told by its module path, nothing changed."""

from __future__ import annotations

import copy
import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")

import batchnorm  # noqa: E402
import batchnorm.torch  # noqa: E402
from pytorch.models import C, held, images, small, trained  # noqa: E402
from torch import nn  # noqa: E402

from support.refusals import refused  # noqa: E402

diagnose = batchnorm.torch.diagnose
PATHS = ["1", "3.bn1", "3.bn2", "3.down.1", "8"]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_good_model_is_fine_and_nothing_changes(mode):
    model = trained(small()).train(mode)
    before = held(model)
    found = diagnose(model, [images(256, seed=99)])
    assert found.ok and "5 layers" in str(found)
    assert held(model) == before
    assert [each.layer for each in found.compared] == PATHS
    assert max(each.distance.max() for each in found.compared) < 0.5


def test_what_it_finds_is_the_layers_own():
    """Of the same faults, this and our layer say the same but for the library's words."""
    model = trained(small(momentum=0.001), 30)
    conv, norm = model[0], model[1]
    with torch.no_grad():
        x = conv(images(256, seed=99))
        ours = batchnorm.BatchNorm(C, decay=0.999, name="1")
        for step in range(30):
            ours(conv(images(seed=step)).numpy())
    theirs = next(f for f in diagnose(nn.Sequential(conv, norm), [images(256, seed=99)]) if f.layer == "1")
    own = ours.diagnose(x.numpy()).findings[0]
    assert (own.code, own.layer, own.channels) == (theirs.code, theirs.layer, theirs.channels)
    assert own.numbers == pytest.approx(theirs.numbers)
    assert own.text.replace("decay=0.999", "momentum=0.001") == theirs.text
    assert "momentum=None" in theirs.remedy and "batchnorm.torch.recalibrate(model, batches)" in theirs.remedy
    assert "decay" not in str(theirs) and "zero_debias" not in str(theirs) and "bn." not in theirs.remedy


def never(model):
    model[3].bn2.reset_running_stats()


def negative(model):
    model[3].bn2.running_var[2] = -1


def no_number(model):
    model[3].bn2.running_mean[4] = float("nan")


def moved(model):
    model[3].bn2.running_mean[1] += 9 * model[3].bn2.running_var[1].sqrt()


def keras(model):
    model[3].bn2.momentum = 0.99


def outside(model):
    model[3].bn2.momentum = 1.5


def frozen(model):
    model[3].bn2.eval()


def no_momentum(model):
    model[3].bn2.momentum = 0.0


def dead(model):
    nn.init.zeros_(model[3].conv2.weight)


def one_dead(model):
    nn.init.zeros_(model[3].conv2.weight[3])
    model[3].bn2.running_mean[3] = 0
    model[3].bn2.running_var[3] = 0


@pytest.mark.parametrize(
    ("fault", "code", "words", "channels"),
    [
        (never, "never_updated", "running_mean and running_var never updated", ()),
        (negative, "invalid_statistics", "running_var is -1 in channel 2: the output in eval mode", (2,)),
        (no_number, "invalid_statistics", "running_mean is nan in channel 4", (4,)),
        (moved, "mismatched", "channel 1: mean off by ", (1,)),
        (keras, "short_average", "the old value in Keras: use momentum=0.01", ()),
        (outside, "short_average", "momentum=1.5 is outside [0, 1]", ()),
        (frozen, "frozen", "it is in eval mode while the model is in training mode", ()),
        (no_momentum, "frozen", "momentum=0", ()),
        (one_dead, "constant_channels", "constant in channel 3, 1 of them 0", (3,)),
    ],
)
def test_each_fault_is_told_with_its_layer(fault, code, words, channels):
    model = trained(small())
    with torch.no_grad():
        fault(model)
    model.training = True
    before = held(model)
    found = [f for f in diagnose(model, [images(256, seed=99)]) if f.layer == "3.bn2"]
    assert held(model) == before
    assert code in [f.code for f in found]
    finding = next(f for f in found if f.code == code)
    assert words in str(finding) and finding.channels == channels
    others = [f for f in diagnose(model, [images(256, seed=99)]) if f.layer != "3.bn2"]
    assert {f.code for f in others} <= {"fine"}, others


def test_dead_layers_and_small_batches():
    model = trained(small())
    with torch.no_grad():
        dead(model)
    assert "constant_channels" in [f.code for f in diagnose(model, [images(99)]) if f.layer == "3.bn2"]
    (finding,) = (f for f in diagnose(trained(small()), [images(9)] * 3) if f.code == "small_batch")
    assert finding.layer == "8" and "9 values per channel" in finding.text
    assert "SyncBatchNorm" in finding.remedy


def test_dropout_shifts_the_variance():
    """What reaches the layer behind dropout has another variance in testing (arXiv:1801.05134)."""
    found = diagnose(trained(small(drop=0.5)), [images(999, seed=99)])
    assert {f.layer for f in found} == {"8"} and "mismatched" in found.codes
    assert "times as small" in str(found)


def test_no_running_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    found = diagnose(model, [torch.randn(99, 3)])
    assert found.codes == ("untracked",) and found.compared[0].count == 99
    assert "track_running_stats=True" in str(found)


def test_cold_is_believed_if_the_batches_agree():
    """num_batches_tracked and momentum alone would call these cold."""
    model = trained(small(momentum=None))
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = 0.0001
    assert diagnose(model, [images(256, seed=99)]).ok
    # ... and what differs is then mismatched, not cold.
    assert "cold" not in [f.code for f in diagnose(model, [images(256, seed=99, shift=30)]) if f.layer == "1"]


def test_a_state_without_its_counter():
    model = trained(small())
    for module in model.modules():
        if hasattr(module, "num_batches_tracked"):
            module.num_batches_tracked = None
    assert diagnose(model, [images(256, seed=99)]).ok


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


def test_any_batch_norm_and_any_dtype():
    model = nn.Sequential(nn.SyncBatchNorm(3), Activated(3), nn.BatchNorm2d(3)).to(torch.bfloat16)
    codes = diagnose(model, [images().bfloat16()]).codes
    assert codes == ("never_updated",) * 3
    double = nn.BatchNorm3d(2).double()
    assert diagnose(double, [torch.randn(9, 2, 3, 4, 4).double()]).findings[0].layer == "model"


def test_wrappers():
    model = trained(small()).eval()
    compiled = torch.compile(model, backend="eager")
    part = copy.deepcopy(model)
    part[3] = torch.compile(part[3], backend="eager")
    part[0].compile(backend="eager")
    for each in (compiled, nn.DataParallel(model), part, torch.optim.swa_utils.AveragedModel(model).eval()):
        assert diagnose(each, [images(256, seed=99)]).ok


def test_ways_to_call_a_model():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, a, b=None):
            return self.bn(a if b is None else a + b)

    model, x = Two(), torch.randn(50, 2)
    for batch in (x, (x, "label"), [x], {"a": x, "b": x}):
        assert diagnose(model, [batch]).compared[0].count == 50
    assert diagnose(model, [[x, x]], forward=lambda pair: model(*pair)).compared[0].count == 50
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=20, shuffle=True)
    before = torch.get_rng_state()
    assert diagnose(model, loader).compared[0].count == pytest.approx(50 / 3)
    assert torch.equal(torch.get_rng_state(), before)


class Counter(nn.Module):
    """It has a buffer that changes in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor([0.0, float("nan")]))

    def forward(self, x):
        self.calls[0] += 1
        self.calls = self.calls * 2 + torch.rand(2)
        return x


def test_other_buffers_are_restored():
    model = nn.Sequential(Counter(), nn.BatchNorm1d(2))
    before = held(model)[0]
    diagnose(model, [torch.randn(40, 2)] * 2)
    assert held(model)[0] == before


def test_numbers_for_people_and_programs(tmp_path):
    model = trained(small())
    with torch.no_grad():
        moved(model)
    model[8].reset_running_stats()
    found = diagnose(model, [images(256, seed=99)])
    lines = found.table().splitlines()
    assert lines[0].split()[:3] == ["layer", "channels", "values"] and len(lines) == 1 + len(PATHS)
    assert lines[3].split()[:2] == ["3.bn2", "6"] and lines[3].endswith("mismatched")
    assert lines[1].endswith("fine") and lines[5].endswith("never_updated")
    data = json.loads(found.to_json())
    assert not data["ok"] and data["layers"][2]["layer"] == "3.bn2" and data["layers"][2]["distance"][1] > 5
    assert data["findings"][0]["code"] == "mismatched" and data["layers"][4]["ratio"] == [None] * 5
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra demo)")
    figure = found.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == ["1", "3.bn1", "3.bn2: mismatched", "3.down.1", "8: never_updated"]
    with pytest.raises(RuntimeError, match=r"nothing to draw: batchnorm\.diagnose"):
        batchnorm.BatchNorm(3).report().plot()


@pytest.mark.parametrize(
    ("model", "batches", "error", "match"),
    [
        (lambda: 3, lambda: [], TypeError, r"model is 3 \(int\), expected a torch.nn.Module"),
        (lambda: nn.Linear(3, 3), lambda: [], ValueError, "has no batch norm; expected nn.BatchNorm1d"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), lambda: [], ValueError, "0 is lazy and does not know"),
        (small, images, TypeError, r"such as \[x\]"),
        (small, lambda: 7, TypeError, "expected an iterable of batches"),
        (small, lambda: iter([]), ValueError, "batches is empty.*gone through before"),
        (
            small,
            lambda: [images().to("meta")],
            ValueError,
            r"on meta, the model is on cpu; .*model.to\('meta'\)",
        ),
        (small, lambda: [{"input": images().to("meta")}], ValueError, "on meta, the model is on cpu"),
        (small, lambda: [images(), images(1)], ValueError, r"8: a batch has shape \(1, 5\) there, one value"),
        (small, lambda: [torch.ones(2, 5)], RuntimeError, "."),
    ],
)
def test_bad_input_changes_nothing(model, batches, error, match):
    model, batches = model(), batches()
    known = isinstance(model, nn.Module) and "Lazy" not in str(model)
    held_now = lambda: held(model) if known else None  # noqa: E731
    refused(lambda: diagnose(model, batches), error, match, held_now, most_seconds=1)  # some run the model
    with pytest.raises(TypeError, match=r"forward is 5 \(int\), expected a function"):
        diagnose(small(), [images()], forward=5)


def test_a_layer_never_reached():
    model = trained(small())
    found = diagnose(model, [images(99)], forward=lambda x: model[:2](x))
    assert [f.code for f in found] == ["not_reached"] * 4
    assert "auxiliary heads" in str(found) and found.compared[-1].count == 0
