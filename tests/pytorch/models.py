"""Models that tests share, and what may not change in them."""

from __future__ import annotations

import torch
from torch import nn

C = 6


class Block(nn.Module):
    """A residual block with a shortcut that is normalised as well."""

    def __init__(self, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.down = nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.down(x))


def small(momentum=0.1, seed=0, drop=0.0):
    """Convolution, batch norm, block, dropout, a 1d batch norm; gamma and beta are not 1 and 0."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), Block(C), nn.Dropout(drop),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * C, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
            nn.init.normal_(module.weight, 0.8, 0.2)
            nn.init.normal_(module.bias, 0.5, 0.3)
    return model


def images(n=64, seed=0, shift=5.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 12, 12, generator=g) * 3 + shift


def trained(model, steps=60, **options):
    model.train()
    with torch.no_grad():
        for step in range(steps):
            model(images(seed=step, **options))
    return model


def held(model):
    """All that may not change: state, which tensors it is in, modes, hooks, gradients, random numbers."""
    state = {
        n: (id(t), t.dtype, t.detach().clone().view(-1)) for n, t in model.state_dict(keep_vars=True).items()
    }
    bytes_ = {n: (i, d, t.view(torch.uint8).numpy(force=True).tobytes()) for n, (i, d, t) in state.items()}
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), m.__dict__.keys()) for m in model.modules()]
    grads = [p.grad is None for p in model.parameters()]
    versions = [b._version for b in model.buffers()]
    rest = torch.is_grad_enabled(), torch.get_rng_state().numpy().tobytes()
    return bytes_, modes, [(a, b, *sorted(k)) for a, b, k in hooks], grads, versions, rest
