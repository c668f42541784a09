"""Loads the extension, and with it the OpenMP runtime, with a wait policy that stands a busy machine and with
stacks that are large enough, or says what the machine lacks.

Import this before anything that imports ``_core``.
"""

from __future__ import annotations

import os

# libgomp's threads wait for work, and for each other, by spinning about 300,000 rounds (16 ms) before they
# sleep. On a machine that has other work too, a spinning thread uses up its time slice, is descheduled, and
# the next call waits for it: cpp/DESIGN.md, D9, has the numbers. 10,000 rounds are enough to stay awake from
# one layer to the next. libgomp reads the variable once, when it is loaded; whoever sets a policy keeps it.
_SPIN = "GOMP_SPINCOUNT"

# A call needs 192 KiB of stack; where OpenMP's threads have less, it runs on one. They have 128 KiB by musl's
# default, and what `ulimit -s` says by glibc's.
_STACK = "OMP_STACKSIZE"


def _stacks_are_small() -> bool:
    """By default, and no runtime is there yet, which would not read the variable again."""
    try:
        import ctypes

        system, attributes, size = ctypes.CDLL(None), ctypes.create_string_buffer(256), ctypes.c_size_t()
        system.pthread_getattr_default_np(attributes)
        system.pthread_attr_getstacksize(attributes, ctypes.byref(size))
        with open("/proc/self/maps", "rb") as file:
            loaded = file.read()
    except (ImportError, TypeError, AttributeError, OSError):  # this is not Linux
        return False
    return size.value < 192 << 10 and not any(name in loaded for name in (b"libgomp", b"libomp", b"libiomp"))


# What a slim container lacks, with the packages of Debian and Ubuntu, Fedora and Red Hat, Alpine.
_PACKAGES = {
    "libgomp": ("libgomp1", "libgomp", "libgomp"),
    "libomp": ("libomp5", "libomp", "libomp"),
    "libstdc++": ("libstdc++6", "libstdc++", "libstdc++"),
    "libgcc_s": ("libgcc-s1", "libgcc", "libgcc"),
}

_ours = {}
if _SPIN not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
    _ours[_SPIN] = "10000"
if _STACK not in os.environ and f"G{_STACK}" not in os.environ and _stacks_are_small():
    _ours[_STACK] = "256K"
os.environ.update(_ours)
try:
    from . import _core
except ImportError as error:
    for library, (apt, dnf, apk) in _PACKAGES.items():
        if library in str(error):
            raise ImportError(f"{error}: apt install {apt}, dnf install {dnf}, or apk add {apk}") from None
    raise
finally:
    for _name in _ours:
        del os.environ[_name]

__all__ = ["_core"]
