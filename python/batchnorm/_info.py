"""What this build is and how it runs here: versions, instruction set, threads, where the C++ library lies."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from . import _args, _core
from ._version import __version__

__all__ = [
    "config",
    "get_cmake_dir",
    "get_include",
    "get_isa",
    "get_num_threads",
    "isa_levels",
    "set_isa",
    "set_num_threads",
    "show_config",
]


def get_num_threads() -> int:
    """Threads a call may use.

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.get_num_threads() >= 1
    True
    """
    return _core.num_threads()


def set_num_threads(num_threads: int) -> None:
    """Set the number of threads a call may use, for the whole process. No result depends on it.

    Parameters
    ----------
    num_threads : int
        1 to 65536. The default is OMP_NUM_THREADS, or else the CPUs this process may run on, but no more than
        a container's CPU quota.

    Raises
    ------
    TypeError, ValueError
        Not an int, or out of range.

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.set_num_threads(2)
    >>> batchnorm.get_num_threads()
    2
    """
    _core.set_num_threads(_args.thread_count(num_threads))


def isa_levels() -> list[str]:
    """Instruction-set levels of this build that this CPU can run, best last.

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.isa_levels()[0]
    'baseline'
    """
    return _core.isa_levels()


def get_isa() -> str:
    """The instruction-set level in use.

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.get_isa() in batchnorm.isa_levels()
    True
    """
    return _core.isa()


def set_isa(isa: str) -> None:
    """Use an instruction-set level, for the whole process. No result depends on it.

    The environment variable BATCHNORM_ISA does the same.

    Parameters
    ----------
    isa : str
        One of :func:`isa_levels`.

    Raises
    ------
    TypeError, ValueError
        Not a str, or a level that this build or CPU does not have.

    Examples
    --------
    >>> import batchnorm
    >>> before = batchnorm.get_isa()
    >>> batchnorm.set_isa("baseline")
    >>> batchnorm.set_isa(before)
    """
    _core.set_isa(_args.isa_name(isa))


def get_include() -> str:
    """Folder of the C++ header, for ``#include <batchnorm/batchnorm.hpp>``.

    The header alone does not link: the library is found by CMake with :func:`get_cmake_dir`.

    Examples
    --------
    >>> import batchnorm, pathlib
    >>> (pathlib.Path(batchnorm.get_include()) / "batchnorm" / "batchnorm.hpp").exists()
    True
    """
    return str(Path(__file__).parent / "include")


def get_cmake_dir() -> str:
    """Folder of the CMake package, for ``cmake -Dbatchnorm_DIR=...`` and ``find_package(batchnorm CONFIG)``.

    Examples
    --------
    >>> import batchnorm, os
    >>> os.path.basename(batchnorm.get_cmake_dir())
    'batchnorm'
    """
    return str(Path(__file__).parent / "lib" / "cmake" / "batchnorm")


def config() -> dict[str, Any]:
    """The build and run-time configuration as a dict; :func:`show_config` prints it.

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.config()["isa"] in batchnorm.config()["isa_supported"]
    True
    """
    return {
        "version": __version__,
        "compiler": _core.compiler(),
        "isa_built": _core.isa_built(),
        "isa_supported": _core.isa_levels(),
        "isa": _core.isa(),
        "isa_reason": _core.isa_reason(),
        "openmp": _core.openmp_runtime(),
        "threads": _core.num_threads(),
        "cache_limit": _core.cache_info()[0],
        "cache_held": _core.cache_info()[1],
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda": False,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def show_config() -> None:
    """Print version, compiler, instruction-set levels, OpenMP runtime, threads, output cache, CUDA or not."""
    c = config()
    print(f"batchnorm {c['version']}")
    print(f"  compiler     {c['compiler']}")
    print(f"  ISA built    {', '.join(c['isa_built'])}")
    print(f"  ISA in use   {c['isa']} ({c['isa_reason']})")
    print(f"  OpenMP       {c['openmp']}")
    print(f"  threads      {c['threads']} of {c['cpus']} CPUs")
    print(f"  cache        {c['cache_held'] / 2**20:.0f} of {c['cache_limit'] / 2**20:.0f} MiB held")
    print(f"  CUDA         {'yes' if c['cuda'] else 'no'}")
    print(f"  Python       {c['python']}, NumPy {c['numpy']}, {c['machine']}")
