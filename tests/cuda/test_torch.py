"""PyTorch's tensors on a GPU, rehearsed with tensors on the CPU that pass for a GPU's: functions and modules
have the CPU's bits, and autograd learns what is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from batchnorm import _arrays

from support.gpu import crossed, differing, needs_rehearsal, results
from support.problem import BFLOAT16

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from batchnorm.torch import function  # noqa: E402

pytestmark = needs_rehearsal


@pytest.fixture
def gpu(monkeypatch):
    """Tensors are on a GPU."""
    monkeypatch.setattr(_arrays, "_CUDA", (1, 2, 13))
    monkeypatch.setattr(function, "_on_gpu", lambda tensor: True)


def send(values: Any) -> Any:
    """A tensor with the strides of an array."""
    if values.dtype == BFLOAT16:
        return send(values.view(np.int16)).view(torch.bfloat16)
    strides = [stride // values.itemsize for stride in values.strides]
    held = torch.from_numpy(np.array(values))
    tensor = torch.empty_strided(values.shape, strides, dtype=held.dtype)
    return tensor.copy_(held)


def fetch(tensor: Any) -> Any:
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def test_every_option_has_the_bits_of_the_cpu(gpu):
    for p in crossed(300, 2):
        made = results(p, send)
        assert all(isinstance(a, torch.Tensor) for a in made.values())
        found = differing(p, made, fetch)
        assert not found, f"{p}: {found}"
