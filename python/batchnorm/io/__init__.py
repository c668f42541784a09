"""States of layers in files. ``BatchNorm.save`` and ``BatchNorm.load`` are the way in.

``npz`` knows files, ``layer_state`` knows what is in them. A reader of another library's format is a module
of its own in this package.
"""

from __future__ import annotations

__all__: list[str] = []
