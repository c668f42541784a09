"""What type checkers see: the stub is the extension's, and a user's program is clean under mypy --strict."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import batchnorm
import pytest
from batchnorm import _core

needs_mypy = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed (extra dev)"
)

USER = '''
"""A user's program: everyday calls, each result used as what it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import batchnorm
from batchnorm import BatchNorm, Saved, batch_norm, batch_norm_backward, batch_norm_train
from batchnorm.typing import ActivationName, CallOptions, Group, RenormOptions

Image = NDArray[np.float32]


def block(x: Image, z: Image, dy: Image) -> tuple[Image, Image, Image]:
    """The end of a residual block, forward and backward."""
    gamma, beta = np.ones(4, np.float32), np.zeros(4, np.float32)
    activation: ActivationName = "relu"
    y, saved = batch_norm_train(x, gamma, beta, residual=z, activation=activation)
    g = batch_norm_backward(dy, saved)
    dx, dgamma, dbeta = g
    gamma -= dgamma
    beta -= dbeta
    return y, dx, g.dresidual


def statistics(saved: Saved) -> float:
    mean: NDArray[np.float64] = saved.mean
    return float((mean * saved.inv_std).sum()) + saved.nbytes


def layer(x: Image, dy: Image) -> Image:
    limits: RenormOptions = {"rmax": 3.0, "dmax": 5.0}
    bn = BatchNorm(4, name="conv1.bn", renorm=limits, activation="silu")
    parameters = bn.parameters()
    options: CallOptions = {"stats": "batch", "update": False}
    y = bn(x)
    dx = bn.backward(dy)
    for p in parameters:
        p.value -= 0.1 * p.grad
    z, saved = bn(x, return_saved=True)
    bn.backward(dy, saved, accumulate=True)
    bn.eval()
    total: Image = y + z + dx + bn(x, **options)
    return total


def inference(x: Image) -> Image:
    mean, var = batchnorm.moments(x)
    return batch_norm(x, mean, var, eps=1e-3, channel_axis=-1)


def whole(paths: list[str]) -> float:
    found = batchnorm.dataset_moments(paths, max_value=255, channel_axis=-1)
    merged = found.moments + batchnorm.Moments(channel_axis=-1)
    return float(found.std[0]) + float(merged.counts[0])


class Ranks:
    def allgather(self, a: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        return [a]


group: Group = Ranks()
'''

WRONG = """
import numpy as np
from batchnorm import BatchNorm, batch_norm_train

x = np.ones((2, 3), np.float32)
batch_norm_train(x, momentum=0.1)
batch_norm_train(x, activation="swish")
y, mean, inv_std = batch_norm_train(x)
BatchNorm(3, axis=-1)
"""


def mypy(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={folder}", program]
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False)


@needs_mypy
def test_a_users_program_is_clean(tmp_path: Path) -> None:
    done = mypy(tmp_path, USER)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_mypy
def test_a_users_mistakes_are_seen(tmp_path: Path) -> None:
    done = mypy(tmp_path, WRONG)
    found = [line.split(":")[1] for line in done.stdout.splitlines() if "error:" in line]
    assert sorted(set(found)) == ["6", "7", "8", "9"], done.stdout


@needs_mypy
def test_the_stub_is_the_extensions() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "batchnorm._core", "--mypy-config-file="]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


OPERATIONS = [
    batchnorm.batch_norm,
    batchnorm.batch_norm_train,
    batchnorm.batch_norm_backward,
    batchnorm.batch_norm_double_backward,
    batchnorm.Saved.of,
    batchnorm.update_running,
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.__qualname__)
def test_signatures_are_those_that_the_core_parses(operation: object) -> None:
    """Names of a signature are the words of the C++ keyword table, which an unknown keyword's error lists."""
    names = tuple(inspect.signature(operation).parameters)  # type: ignore[arg-type]
    assert operation.keywords == names  # type: ignore[attr-defined]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.__qualname__)
def test_operations_look_like_functions(operation: object) -> None:
    assert inspect.isroutine(operation) and callable(operation)
    assert isinstance(operation, _core.Operation)
    assert operation.__module__ == "batchnorm" and inspect.getdoc(operation)
    assert inspect.unwrap(operation).__doc__ == operation.__doc__
