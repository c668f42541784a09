"""Gradients against finite differences of the library's own forward pass, in float64."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import tolerances
from cases import rng

STEP = 1e-4
# Shape, channel axis: both memory directions, folded rows, and more than one block of lanes.
SHAPES = [
    ((6, 4), 1),
    ((3, 4, 5), 1),
    ((3, 5, 4), -1),
    ((2, 3, 3, 2), 1),
    ((2, 2, 3, 3), 3),
    ((19, 5), 0),
    ((5, 19), 1),
    ((2, 17, 2), 1),
]


def problem(shape, axis, activation, stats):
    """x, dy, gamma, beta, mean, var.

    For relu, beta puts the kink into the widest gap among each channel's middle values: every channel is
    partly on, and nothing comes within 50 steps of the kink.
    """
    channels = shape[axis]
    generator = rng("gradients", shape, axis)
    x, dy = generator.standard_normal(shape) + 0.5, generator.standard_normal(shape)
    gamma = generator.uniform(0.5, 1.5, channels) * generator.choice([-1, 1], channels)
    beta, mean = generator.standard_normal(channels), generator.standard_normal(channels)
    var = generator.uniform(0.5, 2, channels)
    if activation == "relu":
        y = forward(x, gamma, None, mean, var, axis, stats, None)
        for c, values in enumerate(np.sort(np.moveaxis(y, axis, 0).reshape(channels, -1))):
            middle = values[len(values) // 4 : -(len(values) // 4) or None]
            widest = np.argmax(np.diff(middle))
            beta[c] = -(middle[widest] + middle[widest + 1]) / 2
        assert np.abs(forward(x, gamma, beta, mean, var, axis, stats, None)).min() > 50 * STEP
    return x, dy, gamma, beta, mean, var


def forward(x, gamma, beta, mean, var, axis, stats, activation):
    if stats == "batch":
        return batchnorm.batch_norm_train(x, gamma, beta, axis=axis, activation=activation).y
    return batchnorm.batch_norm(x, mean, var, gamma, beta, axis=axis, activation=activation)


def differences(function, values):
    """Central differences of a scalar function with respect to every element of `values`."""
    gradient = np.empty_like(values)
    for index in np.ndindex(values.shape):
        up, down = values.copy(), values.copy()
        up[index] += STEP
        down[index] -= STEP
        gradient[index] = (function(up) - function(down)) / (2 * STEP)
    return gradient


def size_and_curvature(x, dy, gamma, inv_std, axis):
    """Of the loss sum(dy * y): the sum of its terms' magnitudes, and a bound of its third derivatives.

    y is gamma * x_hat with |x_hat| <= sqrt(n); only the perturbed channel moves, and each derivative of x_hat
    with respect to an x brings a factor inv_std and a constant of at most 2.
    """
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    channel = np.abs(dy).sum(axis=axes)
    root_n = np.sqrt(x.size / x.shape[axis])
    return channel.sum() * 3 * root_n, (channel * np.abs(gamma) * np.maximum(1, 2 * inv_std) ** 3).max()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_gradients(shape, axis, stats, activation):
    x, dy, gamma, beta, mean, var = problem(shape, axis, activation, stats)

    def loss(x=x, gamma=gamma, beta=beta):
        return (dy * forward(x, gamma, beta, mean, var, axis, stats, activation)).sum()

    if stats == "batch":
        _, saved_mean, inv_std = batchnorm.batch_norm_train(x, gamma, beta, axis=axis)
    else:
        saved_mean, inv_std = mean, 1 / np.sqrt(var + 1e-5)
    got = batchnorm.batch_norm_backward(
        dy, x, saved_mean, inv_std, gamma, beta, axis=axis, stats=stats, activation=activation
    )
    bound = tolerances.difference_error(*size_and_curvature(x, dy, gamma, inv_std, axis), STEP)
    assert bound < 1e-4
    np.testing.assert_allclose(got.dx, differences(lambda v: loss(x=v), x), rtol=0, atol=bound)
    np.testing.assert_allclose(got.dgamma, differences(lambda v: loss(gamma=v), gamma), rtol=0, atol=bound)
    np.testing.assert_allclose(got.dbeta, differences(lambda v: loss(beta=v), beta), rtol=0, atol=bound)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES[:4], ids=str)
def test_two_layers_in_a_row(shape, axis, activation):
    # The chain rule through two normalisations: dx of one is dy of the other.
    x, dy, gamma, beta, mean, var = problem(shape, axis, activation, "batch")

    def loss(x):
        hidden = forward(x, gamma, beta, mean, var, axis, "batch", activation)
        return (dy * np.tanh(forward(hidden, beta, gamma, mean, var, axis, "batch", None))).sum()

    first = batchnorm.batch_norm_train(x, gamma, beta, axis=axis, activation=activation)
    second = batchnorm.batch_norm_train(first.y, beta, gamma, axis=axis)
    upstream = dy * (1 - np.tanh(second.y) ** 2)
    middle = batchnorm.batch_norm_backward(
        upstream, first.y, second.mean, second.inv_std, beta, gamma, axis=axis
    ).dx
    got = batchnorm.batch_norm_backward(
        middle, x, first.mean, first.inv_std, gamma, beta, axis=axis, activation=activation
    ).dx
    size, curvature = size_and_curvature(x, dy, beta, first.inv_std * second.inv_std.max(), axis)
    bound = tolerances.difference_error(
        size, 10 * curvature, STEP
    )  # tanh and the inner layer add terms of the same kind
    assert bound < 1e-3
    np.testing.assert_allclose(got, differences(loss, x), rtol=0, atol=bound)
