"""Loads the extension, and with it the OpenMP runtime, with a wait policy that stands a busy machine.

Import this before anything that imports ``_core``.
"""

from __future__ import annotations

import os

# libgomp's threads wait for work, and for each other, by spinning about 300,000 rounds (16 ms) before they
# sleep. On a machine that has other work too, a spinning thread uses up its time slice, is descheduled, and
# the next call waits for it: cpp/DESIGN.md, D9, has the numbers. 10,000 rounds are enough to stay awake from
# one layer to the next. libgomp reads the variable once, when it is loaded; whoever sets a policy keeps it.
_SPIN = "GOMP_SPINCOUNT"

if _SPIN in os.environ or "OMP_WAIT_POLICY" in os.environ:
    from . import _core
else:
    os.environ[_SPIN] = "10000"
    try:
        from . import _core
    finally:
        del os.environ[_SPIN]

__all__ = ["_core"]
