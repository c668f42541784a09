"""The examples as modules, for the tests that run them in short."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example(request):
    """The example that the test file is named after: test_lenet.py tests lenet.py."""
    for needed in ("sklearn", "matplotlib", "rich", "threadpoolctl"):
        pytest.importorskip(needed, reason=f"the example needs {needed} (extra demo)")
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module(request.path.stem.removeprefix("test_"))
    sys.path.remove(str(EXAMPLES))
