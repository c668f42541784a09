"""Loads the extension, and with it the OpenMP runtime, with a wait policy that stands a busy machine, or says
what the machine lacks.

Import this before anything that imports ``_core``.
"""

from __future__ import annotations

import os

# libgomp's threads wait for work, and for each other, by spinning about 300,000 rounds (16 ms) before they
# sleep. On a machine that has other work too, a spinning thread uses up its time slice, is descheduled, and
# the next call waits for it: cpp/DESIGN.md, D9, has the numbers. 10,000 rounds are enough to stay awake from
# one layer to the next. libgomp reads the variable once, when it is loaded; whoever sets a policy keeps it.
_SPIN = "GOMP_SPINCOUNT"

# What a slim container lacks, with the packages of Debian and Ubuntu, Fedora and Red Hat, Alpine.
_PACKAGES = {
    "libgomp": ("libgomp1", "libgomp", "libgomp"),
    "libomp": ("libomp5", "libomp", "libomp"),
    "libstdc++": ("libstdc++6", "libstdc++", "libstdc++"),
    "libgcc_s": ("libgcc-s1", "libgcc", "libgcc"),
}

_given = _SPIN in os.environ or "OMP_WAIT_POLICY" in os.environ
if not _given:
    os.environ[_SPIN] = "10000"
try:
    from . import _core
except ImportError as error:
    for library, (apt, dnf, apk) in _PACKAGES.items():
        if library in str(error):
            raise ImportError(f"{error}: apt install {apt}, dnf install {dnf}, or apk add {apk}") from None
    raise
finally:
    if not _given:
        del os.environ[_SPIN]

__all__ = ["_core"]
