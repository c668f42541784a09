"""batchnorm.torch.recalibrate: each layer has exactly the statistics that it meets, or nothing changes."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra torch)")

import batchnorm.torch  # noqa: E402
import numpy as np  # noqa: E402
from pytorch.models import held, images, small, trained  # noqa: E402
from pytorch.workers import on_ranks  # noqa: E402
from torch import nn  # noqa: E402

recalibrate = batchnorm.torch.recalibrate


def data(n=101):
    """Sorted by brightness, in batches of which the last is short: what trips a plain average."""
    x = images(n) + torch.arange(n).view(-1, 1, 1, 1) / 5
    return list(x.split(16))


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def met(model, batches):
    """Mean and variance of what reaches each batch norm in eval mode, by NumPy in float64."""
    model, seen = copy.deepcopy(model).double().eval(), {}
    for name, module in norms(model).items():
        module.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0]))
    with torch.no_grad():
        for x in batches:
            model(x.double())
    rows = {n: torch.cat(x).movedim(1, 0).flatten(1).numpy() for n, x in seen.items()}
    return {n: (x.mean(axis=1), x.var(axis=1, ddof=1)) for n, x in rows.items()}


def off(model, batches):
    """How far each layer is from what it meets: in standard deviations, and of the variance relatively."""
    found = {}
    for name, (mean, var) in met(model, batches).items():
        own = norms(model)[name]
        away = np.abs(own.running_mean.numpy() - mean) / np.sqrt(var)
        found[name] = float(away.max()), float(np.abs(own.running_var.numpy() / var - 1).max())
    return found


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_each_layer_has_exactly_what_it_meets(mode):
    model = small(drop=0.5).train(mode)
    before = held(model)
    recalibrate(model, data())
    after = held(model)
    assert after[1:4] == before[1:4] and after[5] == before[5]
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, (which, dtype, value) in before[0].items():
        now = after[0][name]
        assert now[:2] == (which, dtype) and (now[2] == value) != name.endswith(statistics), name
    assert all(mean < 1e-5 and var < 1e-5 for mean, var in off(model, data()).values())
    assert all(int(m.num_batches_tracked) == 7 for m in norms(model).values())
    assert batchnorm.torch.diagnose(model, [torch.cat(data())]).ok


def test_one_pass_and_update_bn_are_not_exact():
    """One pass is exact for the layers that no other comes before; torch's average for none."""
    ours, theirs = small(), small()
    recalibrate(ours, iter(data()), one_by_one=False)
    torch.optim.swa_utils.update_bn(data(), theirs.train())
    one_pass, average = off(ours, data()), off(theirs, data())
    assert max(one_pass["1"]) < 1e-6 and max(average["1"]) > 0.1
    assert 1e-3 < max(one_pass["3.bn2"]) < max(average["3.bn2"])


def test_how_the_data_is_cut_does_not_matter():
    models = [small() for _ in range(3)]
    for model, size in zip(models, (101, 16, 33), strict=True):
        recalibrate(model, list(torch.cat(data()).split(size)))
    for name, module in norms(models[0]).items():
        for other in models[1:]:
            own = norms(other)[name]
            torch.testing.assert_close(own.running_mean, module.running_mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own.running_var, module.running_var, rtol=1e-5, atol=0)


def test_the_passes_are_as_few_as_they_can_be(monkeypatch):
    """Layers that do not depend on each other are measured together: 4 passes for 5 layers."""
    model, calls = small(), []
    model.register_forward_hook(lambda m, x, y: calls.append(len(x[0])))
    recalibrate(model, data(32))
    assert calls.count(16) == 6 + 4 * 2  # the first batch plainly and once per layer, then the passes


def test_a_layer_called_twice_and_one_out_of_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.shared, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.last(self.shared(torch.relu(self.shared(self.first(x))) ** 2))

    model, x = Net(), torch.randn(200, 3) * 3 + 1
    recalibrate(model, x.split(50))
    found = off(model, [x])
    assert max(found["first"]) < 1e-5 and max(found["last"]) < 1e-5
    assert int(model.shared.num_batches_tracked) == 8


def test_half_precision_and_layers_without_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).bfloat16()
    recalibrate(model, [images(200).bfloat16()])
    assert model[0].running_mean.dtype == torch.bfloat16
    assert model[0].running_mean.float().numpy() == pytest.approx(5, rel=0.02)
    assert model[1].running_mean is None
    huge, x = nn.BatchNorm1d(2).half(), torch.randn(99, 2).half() * 3000
    before = held(huge)
    with pytest.raises(
        ValueError, match=r"model: running_var does not fit torch.float16.*, model\.float\(\)$"
    ):
        recalibrate(huge, [x])
    assert held(huge) == before
    with pytest.raises(ValueError, match=r"0: .*float32, model\.get_submodule\('0'\)\.float\(\)$"):
        recalibrate(nn.Sequential(huge), [x])


def test_a_compiled_model():
    model, plain = small(), small()
    recalibrate(torch.compile(model, backend="eager"), data())
    recalibrate(plain, data())
    assert {n: v[2] for n, v in held(model)[0].items()} == {n: v[2] for n, v in held(plain)[0].items()}


def test_progress(capsys):
    pytest.importorskip("rich", reason="rich is not installed (extra progress)")
    recalibrate(small(), data(32), progress=True)
    assert "recalibrate" in (text := capsys.readouterr().err) and "8/8" in text
    recalibrate(small(), data(32), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batches": iter(data())}, TypeError, "gone through only once, expected a list.*one_by_one=False"),
        ({"batches": iter([]), "one_by_one": False}, ValueError, "batches is empty.*gone through before"),
        ({"batches": []}, ValueError, "batches is empty"),
        (
            {"batches": [images(), images() * float("nan")]},
            ValueError,
            r"1: mean is nan at channel 0.*unchanged",
        ),
        ({"forward": lambda x: x}, ValueError, "1: no batch reached this layer, .*auxiliary.*forward="),
        ({"batches": [images().to("meta")]}, ValueError, "on meta, the model is on cpu"),
        ({"batches": images()}, TypeError, r"batches is .*, expected an iterable of batches, such as \[x\]"),
        ({"batches": {"x": images()}}, TypeError, r"batches is .*, expected an iterable of batches"),
        ({"batches": "ab"}, TypeError, "batches is 'ab'.*, expected an iterable of batches"),
        (
            {"model": nn.BatchNorm1d(3), "batches": [torch.ones(3)]},
            ValueError,
            r"model: a batch .* \(3,\) there",
        ),
        ({"batches": [{"y": images()}]}, TypeError, "argument 'y'; pass forward= if the model is called in"),
        ({"one_by_one": 1}, TypeError, "one_by_one is 1"),
        ({"progress": 1}, TypeError, "progress is 1"),
        ({"group": "gloo"}, TypeError, r"group is 'gloo'.*expected a torch.distributed.ProcessGroup: torch"),
        ({"model": nn.Linear(3, 3)}, ValueError, "has no batch norm"),
        (
            {"model": nn.BatchNorm1d(3, track_running_stats=False)},
            ValueError,
            "none of the model's batch norms",
        ),
    ],
)
def test_bad_input_changes_nothing(arguments, error, match):
    model = trained(small())
    before = held(model)
    with pytest.raises(error, match=match):
        recalibrate(**{"model": model, "batches": data(), **arguments})
    assert held(model) == before


class Training(nn.Module):
    """Its forward calls train(), and one of its layers updates whatever statistics it finds."""

    def __init__(self, switch):
        super().__init__()
        self.body, self.switch = small(), switch

    def forward(self, x):
        if self.switch:
            self.train()
        return self.body(x)


@pytest.mark.parametrize("run", [recalibrate, batchnorm.torch.diagnose])
def test_modes_are_not_to_be_changed_meanwhile(run):
    plain = small()
    for model, forward in ((plain, lambda x: plain.train()(x)), (Training(True), None)):
        before = held(model)
        with pytest.raises(
            ValueError, match=r"1 is in training mode while .*do not call train\(\) in forward="
        ):
            run(model, data(), forward=forward)
        assert held(model) == before


class Updates(nn.BatchNorm2d):
    """Updates its statistics in eval mode as well."""

    def forward(self, x):
        y = super().forward(x)
        if self.running_mean is not None:
            self.running_mean.add_(1)
        return y


def test_what_a_forward_does_to_statistics_is_not_kept():
    model = nn.Sequential(Updates(3), nn.BatchNorm2d(3))
    recalibrate(model, data())
    want = torch.cat(data()).mean((0, 2, 3))
    torch.testing.assert_close(model[0].running_mean, want, rtol=1e-4, atol=1e-4)


class Graph(nn.Module):
    """Buffers that PyTorch does not compare, one of them changed by each forward."""

    def __init__(self):
        super().__init__()
        self.first, self.body = nn.BatchNorm2d(3), small()
        for name, layout in (("sparse", torch.sparse_coo), ("csr", torch.sparse_csr)):
            self.register_buffer(name, torch.eye(4).to_sparse(layout=layout))
        self.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
        self.register_buffer("meta", torch.ones(3, device="meta"))
        self.register_buffer("last", torch.ones(3))

    def forward(self, x):
        self.sparse.mul_(2)
        self.last.add_(1)
        return self.body(self.first(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("run", [recalibrate, batchnorm.torch.diagnose])
def test_buffers_that_cannot_be_compared(run):
    model = Graph()
    before, versions = dict(model.named_buffers()), {n: b._version for n, b in model.named_buffers()}
    run(model, data(32))
    assert all(b is before[n] for n, b in model.named_buffers())
    assert torch.equal(model.sparse.to_dense(), torch.eye(4)) and torch.equal(model.last, torch.ones(3))
    assert all(before[n]._version == versions[n] for n in ("csr", "nested", "meta"))


class Routed(nn.Module):
    """Batches of one side go through one more layer before the last one."""

    def __init__(self):
        super().__init__()
        self.last, self.side = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.last(self.side(x) ** 3 if x.mean() > 5 else x)


def test_a_layer_that_the_first_batch_does_not_reach():
    model, x = Routed(), torch.randn(90, 3)
    batches = [x, x + 1, x * 2 + 9, x + 11]
    recalibrate(model, batches)
    assert all(max(found) < 1e-5 for found in off(model, batches).values())


# ---- several processes -------------------------------------------------------------------------------------


def _part(rank, cuts):
    """Each process with its share of the batches, sizes uneven, one of them without any."""
    batches, found = data(), {}
    own = batches[cuts[rank] : cuts[rank + 1]]
    world = torch.distributed.group.WORLD
    for name, model in (("plain", small()), ("ddp", nn.parallel.DistributedDataParallel(small()))):
        recalibrate(model, own, group=world if name == "plain" else None)
        inner = getattr(model, "module", model)
        found[name] = {n: t.numpy().tobytes() for n, t in inner.named_buffers()}
    model = small()
    before = held(model)
    try:
        recalibrate(model, [images(9) * float("nan")] if rank else [images(), torch.ones(1)], group=world)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    assert held(model) == before
    return found


def test_several_processes_have_the_statistics_of_all():
    parts = on_ranks(3, _part, (0, 4, 4, 7))
    whole = small()
    recalibrate(whole, data())
    want = {n: t.numpy().tobytes() for n, t in whole.named_buffers()}
    for part in parts:
        assert part["plain"] == part["ddp"] == want
    assert "process 0 of the group failed, nothing is changed here" in parts[1]["error"]
    assert parts[1]["error"] == parts[2]["error"] and "process" not in parts[0]["error"]
