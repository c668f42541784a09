"""What a PyTorch model gains: one layer, training steps of whole networks, statistics after recalibration.

    python bench/models.py layer|steps|recalibrate

`layer`: forward and backward of one batch norm through autograd, ours and torch's in turn, of tensors from a
few values to ResNet-50's largest. `steps`: SGD steps of a ResNet-18 and a MobileNetV2 on random images before
and after `batchnorm.torch.convert` with `fuse=True`, with peak memory, and inference before and after `fold`.
Each network runs in a process of its own, in which the variants take turns. `recalibrate`: how far running
statistics are from what each layer meets in eval mode, by `torch.optim.swa_utils.update_bn`, in one pass, and
one by one.
"""

from __future__ import annotations

import argparse
import copy
import functools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import batchnorm.torch as ours
import torch
from torch import nn

# ---- networks, after their papers --------------------------------------------------------------------------


class Basic(nn.Module):
    """A block of ResNet-18 (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int, fused: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2: Any = ours.BatchNormAddAct2d(outputs) if fused else nn.BatchNorm2d(outputs)
        self.down, self.fused = nn.Sequential(), fused
        if stride > 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.bn2(y, self.down(x)) if self.fused else self.relu(self.bn2(y) + self.down(x))


def resnet18(fused: bool = False) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
    ]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Basic(inputs, outputs, stride, fused), Basic(outputs, outputs, 1, fused)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Inverted(nn.Module):
    """A block of MobileNetV2 (arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        wide, layers = inputs * factor, []
        if factor > 1:
            layers += [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)]
        layers += [nn.ReLU(inplace=True), nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers, self.adds = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenetv2(fused: bool = False) -> nn.Module:
    """With ReLU for ReLU6."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
    ]
    inputs = 32
    rows = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for factor, outputs, count, stride in rows:
        for i in range(count):
            layers.append(Inverted(inputs, outputs, stride if i == 0 else 1, factor))
            inputs = outputs
    layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"ResNet-18": resnet18, "MobileNetV2": mobilenetv2}


# ---- measuring ---------------------------------------------------------------------------------------------


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int, repeat: int = 1) -> dict[str, float]:
    """Seconds of each, the median of rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            times[name] += [(time.perf_counter() - start) / repeat] * (i > 1)
    return {name: statistics.median(each) for name, each in times.items()}


def layer(rounds: int) -> None:
    cases = [
        ((2, 3, 4, 4), None),
        ((32, 64, 56, 56), None),
        ((32, 256, 56, 56), None),
        ((32, 512, 28, 28), None),
    ]
    cases += [((32, 256, 56, 56), torch.channels_last)]
    print(f"{'one layer, forward and backward':40} {'torch':>10} {'ours':>10}   torch / ours")
    for dtype in (torch.float32, torch.bfloat16):
        for shape, memory in cases:
            x = torch.randn(shape).to(dtype, memory_format=memory or torch.contiguous_format).requires_grad_()
            dy, calls = torch.randn_like(x), {}
            for name, module in (("torch", nn.BatchNorm2d), ("ours", ours.BatchNorm2d)):

                def call(bn: Any, x: Any = x, dy: Any = dy) -> None:
                    x.grad = None
                    bn(x).backward(dy)

                calls[name] = functools.partial(call, module(shape[1]))
            times = in_turn(calls, rounds, 2000 if x.numel() < 1000 else 1)
            label = f"{str(dtype)[6:]} {list(shape)}{' channels_last' if memory else ''}"
            theirs, own = (1e6 * times[name] for name in ("torch", "ours"))
            print(f"{label:40} {theirs:7.1f} us {own:7.1f} us   {theirs / own:.2f}", flush=True)


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    optimizer, labels = torch.optim.SGD(model.parameters(), 1e-3), torch.arange(len(x))

    def call() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return call


def steps_of(name: str, batch: int, size: int, rounds: int) -> None:
    torch.manual_seed(0)
    x, made = torch.randn(batch, 3, size, size), NETWORKS[name]
    theirs, converted = made(), ours.convert(made(), fuse=True)
    variants = {"torch": theirs, "convert": converted}
    if name == "ResNet-18":
        variants["convert, BatchNormAddAct2d"] = ours.convert(made(fused=True), fuse=True)
    times = in_turn({label: step(model.train(), x) for label, model in variants.items()}, rounds)
    for label, seconds in times.items():
        print(f"  step, {label:34} {1e3 * seconds:8.1f} ms   {times['torch'] / seconds:.2f}", flush=True)
    with torch.no_grad():
        models = {"torch": theirs.eval(), "fold": ours.fold(theirs)}
        times = in_turn({label: lambda m=m: m(x) for label, m in models.items()}, rounds)  # type: ignore[misc]
    for label, seconds in times.items():
        print(f"  inference, {label:29} {1e3 * seconds:8.1f} ms   {times['torch'] / seconds:.2f}", flush=True)


def peak_of(name: str, batch: int, size: int, variant: str) -> None:
    """Peak memory of three steps above that of the model alone, in a process of its own."""
    torch.manual_seed(0)
    made, x = NETWORKS[name], torch.randn(batch, 3, size, size)
    model = made(fused=True) if "Add" in variant else made()
    model = ours.convert(model, fuse=True) if "convert" in variant else model
    call, before = step(model.train(), x), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  peak, {variant:34} {(peak - before) / 1024:8.0f} MiB", flush=True)


def steps(batch: int, size: int, rounds: int) -> None:
    for name in NETWORKS:
        print(f"{name}, {batch} images of {size} x {size}, {torch.get_num_threads()} threads", flush=True)
        line = [sys.executable, __file__, "--batch", str(batch), "--size", str(size), "--rounds", str(rounds)]
        subprocess.run([*line, "--network", name, "steps"], check=True)
        for variant in ("torch", "convert", *["convert, BatchNormAddAct2d"] * (name == "ResNet-18")):
            subprocess.run([*line, "--network", name, "--variant", variant, "steps"], check=True)


# ---- recalibration -----------------------------------------------------------------------------------------


def off(model: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """The worst channel of all layers: mean off in standard deviations, variance off relatively."""
    found: list[tuple[float, float]] = []

    def before(module: Any, inputs: tuple[torch.Tensor]) -> None:
        rows = inputs[0].double().movedim(1, 0).flatten(1)
        mean, var = rows.mean(1), rows.var(1)
        away = (module.running_mean - mean).abs() / var.sqrt()
        found.append((float(away.max()), float((module.running_var / var - 1).abs().max())))

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [m.register_forward_pre_hook(before) for m in norms]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return max(a for a, _ in found), max(b for _, b in found)


def recalibrate() -> None:
    torch.manual_seed(0)
    x = torch.randn(101, 3, 64, 64) + torch.linspace(0, 3, 101).view(-1, 1, 1, 1)
    plain = resnet18()
    shuffled = x[torch.randperm(101)]
    print("ResNet-18, 101 images in batches of 16: worst channel of all 20 layers")
    print(f"{'':34} {'mean off by':>14} {'variance off by':>16} {'seconds':>8}")
    for order, data in (("sorted", x), ("shuffled", shuffled)):
        for name, method in (
            ("torch update_bn", lambda m, b: torch.optim.swa_utils.update_bn(b, m.train())),
            ("recalibrate, one pass", lambda m, b: ours.recalibrate(m, b, one_by_one=False)),
            ("recalibrate", ours.recalibrate),
        ):
            model, start = copy.deepcopy(plain), time.perf_counter()
            method(model, list(data.split(16)))
            seconds = time.perf_counter() - start
            mean, var = off(model, data)
            print(f"{order + ', ' + name:34} {mean:10.1e} std {100 * var:14.2g} % {seconds:8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("layer", "steps", "recalibrate"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network", choices=NETWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "layer":
        layer(given.rounds)
    elif given.what == "recalibrate":
        recalibrate()
    elif given.network is None:
        steps(given.batch, given.size, given.rounds)
    elif given.variant is None:
        steps_of(given.network, given.batch, given.size, given.rounds)
    else:
        peak_of(given.network, given.batch, given.size, given.variant)


if __name__ == "__main__":
    main()
