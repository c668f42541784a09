"""An autograd function: x goes through PyTorch's own save_for_backward, which sees every change of it."""

# needs torch
import numpy as np
import torch
from batchnorm import batch_norm_backward, batch_norm_train


class BatchNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta):
        arrays = (t.detach().numpy() for t in (x, gamma, beta))
        y, ctx.saved = batch_norm_train(*arrays, activation="silu", keep=None)
        ctx.save_for_backward(x)
        return torch.from_numpy(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        found = batch_norm_backward(dy.contiguous().numpy(), ctx.saved, x=x.detach().numpy())
        return tuple(torch.from_numpy(np.asarray(g)) for g in found)


torch.manual_seed(0)
x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
gamma = torch.randn(3, dtype=torch.float64, requires_grad=True)
beta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(BatchNormSilu.apply, (x, gamma, beta))
h = x * 1
y = BatchNormSilu.apply(h, gamma, beta)
with torch.no_grad():
    h[0, 0, 1] = 9.0
try:
    y.sum().backward()
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
else:
    raise SystemExit("a changed x was not seen")
