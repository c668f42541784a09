"""A small neural network toolkit in NumPy: the layers, the loss and the optimisers that lenet.py is made of.

A layer is called with x and returns y; `backward(dy)` returns dx and keeps the gradients of the parameters;
`parameters()` lists (name, value, gradient), `buffers()` what is kept but not trained. `batchnorm.BatchNorm`
has the same interface, so they mix freely.
Shapes: N images in a batch, C channels, height H and width W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]
Parameters = Sequence[tuple[str, Array, Array]]  # (name, value, gradient); optimisers change value in place


# --- layers -------------------------------------------------------------------------------------------------


class Layer(Protocol):
    """What `BatchNorm` offers and the layers below imitate."""

    def __call__(self, x: Array) -> Array: ...
    def backward(self, dy: Array) -> Array: ...
    def parameters(self) -> Parameters: ...
    def buffers(self) -> Mapping[str, Array]: ...
    def train(self, mode: bool = True) -> object: ...


class Plain:
    """A layer without parameters that does the same in training and in evaluation."""

    def parameters(self) -> Parameters:
        return []

    def buffers(self) -> Mapping[str, Array]:
        return {}

    def train(self, mode: bool = True) -> Plain:
        return self


class Weighted(Plain):
    """A layer with a weight, started as in Glorot and Bengio (2010), and perhaps a bias, started at 0."""

    weight: Array
    dweight: Array
    bias: Array | None
    dbias: Array

    def draw(self, shape: tuple[int, int], fan: int, rng: np.random.Generator) -> Array:
        bound = math.sqrt(6 / fan)  # fan: inputs and outputs that one weight connects
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    def parameters(self) -> Parameters:
        weight = ("weight", self.weight, self.dweight)
        return [weight] if self.bias is None else [weight, ("bias", self.bias, self.dbias)]


class Dense(Weighted):
    """Fully connected: x [N, inputs] -> y [N, outputs]."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, *, bias: bool = True) -> None:
        self.weight = self.draw((inputs, outputs), inputs + outputs, rng)
        self.bias = np.zeros(outputs, np.float32) if bias else None

    def __call__(self, x: Array) -> Array:
        self.x = x
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array) -> Array:
        self.dweight, self.dbias = self.x.T @ dy, dy.sum(axis=0)
        return dy @ self.weight.T


class Conv2D(Weighted):
    """Convolution without padding: x [N, inputs, H, W] -> y [N, outputs, H-size+1, W-size+1].

    Every patch of x becomes a column, and the convolution one matrix product per image ("im2col").
    """

    def __init__(
        self, inputs: int, outputs: int, rng: np.random.Generator, *, size: int, bias: bool = True
    ) -> None:
        self.weight = self.draw((outputs, inputs * size * size), (inputs + outputs) * size * size, rng)
        self.bias = np.zeros(outputs, np.float32) if bias else None
        self.size = size

    def __call__(self, x: Array) -> Array:
        patches = sliding_window_view(x, (self.size, self.size), axis=(2, 3))  # [N, C, H', W', size, size]
        n, _, height, width = patches.shape[:4]
        self.x_shape = x.shape
        self.columns = patches.transpose(0, 1, 4, 5, 2, 3).reshape(n, -1, height * width)
        y = self.weight @ self.columns
        if self.bias is not None:
            y += self.bias[:, None]
        return y.reshape(n, -1, height, width)

    def backward(self, dy: Array) -> Array:
        n, outputs, height, width = dy.shape
        dy = dy.reshape(n, outputs, height * width)
        self.dweight = (dy @ self.columns.swapaxes(1, 2)).sum(axis=0)
        self.dbias = dy.sum(axis=(0, 2))
        dpatches = (self.weight.T @ dy).reshape(n, -1, self.size, self.size, height, width)
        dx = np.zeros(self.x_shape, dy.dtype)
        for i, j in np.ndindex(self.size, self.size):
            dx[:, :, i : i + height, j : j + width] += dpatches[:, :, i, j]
        return dx


class AvgPool(Plain):
    """Mean over tiles of 2 x 2: x [N, C, H, W] -> y [N, C, H/2, W/2], for even H and W."""

    def __call__(self, x: Array) -> Array:
        return (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 4

    def backward(self, dy: Array) -> Array:
        return (dy / 4).repeat(2, axis=2).repeat(2, axis=3)


class Sigmoid(Plain):
    """y = 1 / (1 + exp(-x)), written with tanh because that cannot overflow."""

    def __call__(self, x: Array) -> Array:
        self.y = 0.5 + 0.5 * np.tanh(0.5 * x)
        return self.y

    def backward(self, dy: Array) -> Array:
        return dy * self.y * (1 - self.y)


class Flatten(Plain):
    """x [N, C, H, W] -> y [N, C*H*W]."""

    def __call__(self, x: Array) -> Array:
        self.x_shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self.x_shape)


class Sequential:
    """Named layers, one after the other. `outputs` keeps what each of them returned last."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self.outputs: dict[str, Array] = {}

    def __call__(self, x: Array) -> Array:
        for name, layer in self.layers.items():
            x = self.outputs[name] = layer(x)
        return x

    def backward(self, dy: Array) -> Array:
        for layer in reversed(self.layers.values()):
            dy = layer.backward(dy)
        return dy

    def parameters(self) -> Parameters:
        return [parameter for layer in self.layers.values() for parameter in layer.parameters()]

    def buffers(self) -> list[Array]:
        return [buffer for layer in self.layers.values() for buffer in layer.buffers().values()]

    def train(self, mode: bool = True) -> Sequential:
        for layer in self.layers.values():
            layer.train(mode)
        return self

    def eval(self) -> Sequential:
        return self.train(False)


# --- loss and optimisers ------------------------------------------------------------------------------------


def cross_entropy(scores: Array, labels: NDArray[np.int64]) -> tuple[float, Array]:
    """Return the mean loss of softmax(scores) [N, classes] and its gradient with respect to scores."""
    rows = np.arange(len(labels))
    log_probability = scores - scores.max(axis=1, keepdims=True)
    log_probability -= np.log(np.exp(log_probability).sum(axis=1, keepdims=True))
    gradient = np.exp(log_probability)
    gradient[rows, labels] -= 1
    return -float(log_probability[rows, labels].mean()), gradient / len(labels)


class SGD:
    """Stochastic gradient descent with momentum."""

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.velocity: list[Array] = []

    def step(self, parameters: Parameters, rate: float) -> None:
        self.velocity = self.velocity or [np.zeros_like(value) for _, value, _ in parameters]
        for (_, value, gradient), velocity in zip(parameters, self.velocity, strict=True):
            velocity *= self.momentum
            velocity -= rate * gradient
            value += velocity


class Adam:
    """Adam (Kingma and Ba, 2014, algorithm 1): steps scaled by running moments of the gradient."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.steps = 0
        self.moments: list[tuple[Array, Array]] = []

    def step(self, parameters: Parameters, rate: float) -> None:
        self.moments = self.moments or [(np.zeros_like(v), np.zeros_like(v)) for _, v, _ in parameters]
        self.steps += 1
        rate *= math.sqrt(1 - self.beta2**self.steps) / (1 - self.beta1**self.steps)
        for (_, value, gradient), (first, second) in zip(parameters, self.moments, strict=True):
            first += (1 - self.beta1) * (gradient - first)
            second += (1 - self.beta2) * (gradient * gradient - second)
            value -= rate * first / (np.sqrt(second) + self.eps)
