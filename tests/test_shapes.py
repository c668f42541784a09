"""Every shape of data/bnorm_shapes.csv in both memory directions: forward, backward, inference."""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import reference
from cases import listed_shapes, parameters, rng
from checks import assert_forward, assert_gradients

SHAPES = [pytest.param(sizes, id=name) for name, sizes in listed_shapes()]


def test_the_list_is_complete():
    assert len(SHAPES) == 200


@pytest.mark.parametrize("direction", ["ncs", "nsc"])
@pytest.mark.parametrize("sizes", SHAPES)
def test_shape(sizes, direction):
    batch, channels, *space = sizes
    axis = 1 if direction == "ncs" else -1
    shape = (batch, channels, *space) if direction == "ncs" else (batch, *space, channels)
    generator = rng(sizes)
    x = generator.standard_normal(shape, np.float32) + np.float32(0.5)
    gamma, beta = parameters(channels)
    if x.size == channels:  # the list has one such shape; training refuses it
        with pytest.raises(ValueError, match="one value per channel"):
            batchnorm.batch_norm_train(x, gamma, beta, axis=axis)
        return

    want = reference.train(x, gamma, beta, axis=axis)
    got = batchnorm.batch_norm_train(x, gamma, beta, axis=axis)
    assert_forward(got.y, x, want, gamma, beta, axis)

    inference = batchnorm.batch_norm(x, got.mean, batchnorm.moments(x, axis=axis).var, gamma, beta, axis=axis)
    assert np.array_equal(inference, got.y)

    dy = generator.standard_normal(shape, np.float32)
    gradients = batchnorm.batch_norm_backward(dy, x, got.mean, got.inv_std, gamma, beta, axis=axis)
    assert_gradients(gradients, dy, x, got.mean, got.inv_std, gamma, axis)
