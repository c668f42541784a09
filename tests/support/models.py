"""Batch norms with the marks of training, for files of other libraries; optional libraries, or a skip."""

from __future__ import annotations

import importlib
import os
import warnings

import numpy as np
import pytest
from batchnorm import BatchNorm

C = 5
INSTALL = {
    "torch": "torch",
    "keras": "keras",
    "cv2": "'opencv-python-headless<5'",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "jax": "flax",
    "flax": "flax",
    "haiku": "dm-haiku",
}


def library(name):
    """An optional library, or a skip that says what is missing."""
    if name == "keras":
        library("torch")
        os.environ["KERAS_BACKEND"] = "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
        except ImportError:
            package = name.partition(".")[0]
            pytest.skip(
                f"{package} is not installed: pip install {INSTALL.get(package, 'batchnorm[formats]')}"
            )
    if name == "keras":
        module.utils.clear_session()  # it numbers layers without a name through
    if name == "cv2" and not hasattr(module.dnn, "readNetFromCaffe"):
        pytest.skip("OpenCV 5 reads no Caffe models: pip install 'opencv-python-headless<5'")
    return module


def images(seed=0, channels=C, axis=1, dtype=np.float32):
    x = 3 + 2 * np.random.default_rng(seed).standard_normal((6, channels, 4, 3))
    return np.ascontiguousarray(np.moveaxis(x, 1, axis)).astype(dtype)


def trained(name="bn1", steps=200, seed=0, **options):
    """A layer whose four vectors are all different from where they began."""
    layer = BatchNorm(C, name=name, **options)
    generator = np.random.default_rng(seed)
    for step in range(steps):
        layer(images(step % 5, axis=layer.channel_axis, dtype=layer.dtype))
    for vector, low in ((layer.gamma, 0.5), (layer.beta, -1)):
        if vector is not None:
            vector[...] = generator.uniform(low, 2, C)
    return layer


def same_function(a, b, rtol=1e-6):
    """Whether two layers do the same in eval mode."""
    y, z = (
        np.moveaxis(bn(images(9, axis=bn.channel_axis), training=False), bn.channel_axis, 1) for bn in (a, b)
    )
    return np.allclose(y, z, rtol=rtol, atol=rtol)
