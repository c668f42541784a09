"""Without PyTorch or Keras their rooms say what to install, and the package does not ask for either."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("room", "name"), [("torch", "PyTorch"), ("keras", "Keras 3")])
def test_what_is_missing_is_said(room: str, name: str) -> None:
    program = f"import sys; sys.modules['{room}'] = None; import batchnorm.{room}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    expected = f'ImportError: batchnorm.{room} needs {name}: pip install "batchnorm[{room}]"'
    assert expected in done.stderr.splitlines()[-1]


def test_the_package_imports_neither() -> None:
    program = "import sys, batchnorm; print([n for n in ('torch', 'keras') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
