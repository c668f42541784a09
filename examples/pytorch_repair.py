"""A PyTorch model that is good in training and bad in testing: diagnose it, repair it, fold it, in ten lines.

    python examples/pytorch_repair.py                # half a minute; draws pytorch_repair.png

A stock `torch.nn` network learns handwritten digits. Its batch norms have `momentum=0.001`, as a model ported
from Keras' 0.999 has. In training mode it is right nearly always; in evaluation mode it guesses.
`batchnorm.torch.diagnose` says why, layer by layer, without converting anything. `recalibrate` repairs it
from images alone, without labels and without training. `fold` makes it faster for inference.

The picture is the diagnosis: how far the running statistics of every channel are from those of test images.

Needs the extras `demo` and `torch` of batchnorm.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from image_data import CLASSES, load_digits

try:
    import batchnorm.torch
    import torch
    from torch import nn
except ModuleNotFoundError as error:
    raise SystemExit(f"this example needs {error.name}: pip install '.[demo,torch]'") from error

BATCH = 32
MOMENTUM = 0.001


def block(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs, momentum=MOMENTUM), nn.ReLU()]


def build() -> nn.Module:
    """Nothing of this package is in it."""
    return nn.Sequential(
        *block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> float:
    """Train; return the share of images that it got right in its last epoch, in training mode."""
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    model.train()
    for _ in range(epochs):
        hits = 0
        for chosen in torch.randperm(len(images)).split(BATCH):
            scores = model(images[chosen])
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, labels[chosen]).backward()
            optimizer.step()
            hits += int((scores.argmax(1) == labels[chosen]).sum())
    return hits / len(images)


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images that it gets right in evaluation mode."""
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def milliseconds(model: nn.Module, images: torch.Tensor) -> float:
    """Of one call in evaluation mode, the best of 20."""
    times = []
    with torch.no_grad():
        for _ in range(20):
            start = time.perf_counter()
            model.eval()(images)
            times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])  # type: ignore[union-attr]
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("pytorch_repair.png"), help="the picture")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    data = load_digits(0)
    images, tests = (torch.from_numpy(x).float() / 255 for x in (data.train_images, data.test_images))
    labels, wanted = (torch.from_numpy(t) for t in (data.train_labels, data.test_labels))

    model = build()
    found: dict[str, Any] = {"training": train(model, images, labels, options.epochs)}
    found["testing"] = accuracy(model, tests, wanted)
    print(
        f"{found['training']:.1%} right in training mode, {found['testing']:.1%} in evaluation mode. Why?\n"
    )

    diagnosis = batchnorm.torch.diagnose(model, [tests])
    print(diagnosis.table())
    print(f"\n{textwrap.fill(str(diagnosis.findings[0]), 84)}\n")
    batchnorm.torch.recalibrate(model, images.split(256))
    after = batchnorm.torch.diagnose(model, [tests])
    folded = batchnorm.torch.fold(model)

    found |= {"repaired": accuracy(model, tests, wanted), "folded": accuracy(folded, tests, wanted)}
    found |= {"before": diagnosis.codes, "after": after.codes}
    print(f"{found['repaired']:.1%} right after recalibrate(); diagnose() says {after.codes}")
    times = milliseconds(model, tests[:64]), milliseconds(folded, tests[:64])
    print(f"{found['folded']:.1%} after fold(); 64 images in {times[1]:.2f} ms instead of {times[0]:.2f}")
    diagnosis.plot(options.out)
    print(f"picture: {options.out}")
    return found


if __name__ == "__main__":
    main()
