"""Libraries that read other formats: optional, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["library"]

# Everything else is in the extra `formats`; PyTorch is too large for an extra.
_INSTALL = {"torch": "pip install torch", "onnxruntime": "pip install onnxruntime"}


def library(name: str, why: str) -> Any:
    """An optional library's module; without it ModuleNotFoundError says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        remedy = _INSTALL.get(package, "pip install 'batchnorm[formats]'")
        what = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not work ({error})"
        raise ModuleNotFoundError(f"{why} needs {package}, which {what}: {remedy}", name=package) from error
