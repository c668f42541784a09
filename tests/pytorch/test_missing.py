"""Without PyTorch, Keras or Dask their rooms say what to install; the package asks for none of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.quick


ROOMS = [("torch", "PyTorch"), ("keras", "Keras 3"), ("dask", "Dask")]


@pytest.mark.parametrize(("room", "name"), ROOMS)
def test_what_is_missing_is_said(room: str, name: str) -> None:
    program = f"import sys; sys.modules['{room}'] = None; import batchnorm.{room}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    expected = f'ImportError: batchnorm.{room} needs {name}: pip install "batchnorm[{room}]"'
    assert expected in done.stderr.splitlines()[-1]


def test_the_package_imports_none() -> None:
    program = "import sys, batchnorm; print([n for n in ('torch', 'keras', 'dask') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
