"""What this build is and how it runs here: instruction set, threads, cache, where the C++ library lies."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import _core
from ._arrays import gpu_extension
from ._version import __version__
from .settings import integer, kind

__all__ = [
    "CacheInfo", "cache_info", "config", "empty_cache", "get_cmake_dir", "get_include", "get_isa",
    "get_num_threads", "isa_levels", "set_cache_limit", "set_isa", "set_num_threads", "show_config",
]  # fmt: skip


# ---- threads and instruction set ---------------------------------------------------------------------------


def get_num_threads() -> int:
    """Threads that a call may use.

    Returns
    -------
    int

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.get_num_threads() >= 1
    True
    """
    return _core.num_threads()


def set_num_threads(num_threads: int) -> None:
    """Set the number of threads that a call may use, for the whole process. No result depends on it.

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
    _core.set_num_threads(integer("num_threads", num_threads, 1, 65536, "an int from 1 to 65536"))


def isa_levels() -> list[str]:
    """Instruction-set levels of this build that this CPU can run, best last.

    Returns
    -------
    list of str

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.isa_levels()[0]
    'baseline'
    """
    return _core.isa_levels()


def get_isa() -> str:
    """The instruction-set level in use.

    Returns
    -------
    str

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
    if not isinstance(isa, str):
        raise TypeError(f"isa is {kind(isa)}, expected a str, one of {', '.join(map(repr, isa_levels()))}")
    _core.set_isa(isa)


# ---- the memory kept warm for results ----------------------------------------------------------------------


class CacheInfo(NamedTuple):
    """What :func:`cache_info` returns; sizes in bytes.

    Attributes
    ----------
    limit : int
        Most bytes that free buffers may take.
    held : int
        Bytes of the free buffers kept now, at most ``limit``.
    in_use : int
        Bytes of the buffers that live arrays own, and that calls use as scratch memory.
    buffers : int
        Number of free buffers kept now.
    hits, misses : int
        Requests since the start of the process that a kept buffer served, and that needed fresh memory.
    """

    limit: int
    held: int
    in_use: int
    buffers: int
    hits: int
    misses: int


def cache_info() -> CacheInfo:
    """What the cache of memory for results holds.

    Returns
    -------
    CacheInfo
        ``limit``, ``held``, ``in_use`` in bytes; ``buffers``, ``hits``, ``misses``.

    Notes
    -----
    The first touch of fresh memory takes longer than normalising it. So ``y`` and ``dx`` of 128 KiB or more
    come from buffers that go back to the cache, still mapped, when the array and every view of it are gone.
    Such an array owns its data as any other. Buffers are kept up to the limit, and the least recently
    released are given back first.

    Arrays passed as ``out=`` are never touched. A NumPy memory handler of your own (NEP 49) is respected:
    while one is in force, results come from it. The child of a fork starts with no free buffers.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> y = batchnorm.batch_norm_train(np.ones((8, 64, 32, 32), np.float32)).y
    >>> batchnorm.cache_info().in_use >= y.nbytes
    True
    """
    return CacheInfo(*_core.cache_info())


def set_cache_limit(limit: int) -> None:
    """Set how much memory the cache may keep for results to come, for the whole process.

    Parameters
    ----------
    limit : int
        Bytes of free buffers, >= 0. 0 switches the cache off: results are then ordinary NumPy memory. What
        is kept beyond a new limit is given back at once. The default is the environment variable
        BATCHNORM_CACHE_LIMIT, or else 2 GiB, but no more than an eighth of the memory that the machine, its
        container or the resource limit on address space leaves this process.

    Raises
    ------
    TypeError, ValueError
        Not an int, negative, or beyond 64 bits.

    Examples
    --------
    >>> import batchnorm
    >>> before = batchnorm.cache_info().limit
    >>> batchnorm.set_cache_limit(64 * 2**20)
    >>> batchnorm.cache_info().limit
    67108864
    >>> batchnorm.set_cache_limit(before)
    """
    _core.set_cache_limit(integer("limit", limit, 0, 2**63 - 1, "an int >= 0, in bytes"))


def empty_cache() -> int:
    """Give all memory that is kept for results to come back to the system.

    Live arrays keep theirs; the limit stays.

    Returns
    -------
    int
        Bytes given back.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> y = batchnorm.batch_norm_train(np.ones((8, 64, 32, 32), np.float32)).y
    >>> size = y.nbytes
    >>> del y
    >>> batchnorm.empty_cache() >= size
    True
    >>> batchnorm.cache_info().held
    0
    """
    return _core.empty_cache()


# ---- the build ---------------------------------------------------------------------------------------------


def _folder_of_cpp(*parts: str) -> str:
    folder = Path(_core.__file__).parent.joinpath(*parts)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"this package has no C++ library ({folder} is not there), as it came as a wheel; "
            "`pip install --no-binary batchnorm batchnorm` builds it with one"
        )
    return str(folder)


def get_include() -> str:
    """Folder of the C++ header, for ``#include <batchnorm/batchnorm.hpp>``.

    The header alone does not link: the library is found by CMake with :func:`get_cmake_dir`.

    Returns
    -------
    str

    Raises
    ------
    FileNotFoundError
        This is a published wheel, which comes without the C++ library.

    Examples
    --------
    >>> import batchnorm, pathlib
    >>> (pathlib.Path(batchnorm.get_include()) / "batchnorm" / "batchnorm.hpp").exists()
    True
    """
    return _folder_of_cpp("include")


def get_cmake_dir() -> str:
    """Folder of the CMake package, for ``cmake -Dbatchnorm_DIR=...`` and ``find_package(batchnorm CONFIG)``.

    Returns
    -------
    str

    Raises
    ------
    FileNotFoundError
        This is a published wheel, which comes without the C++ library.

    Examples
    --------
    >>> import batchnorm, os
    >>> os.path.basename(batchnorm.get_cmake_dir())
    'batchnorm'
    """
    return _folder_of_cpp("lib", "cmake", "batchnorm")


def _cuda() -> str | bool:
    """What serves arrays of GPUs; False in a build without."""
    extension = gpu_extension()
    if extension is None:
        return False
    if extension.runtime() == "rehearsal":
        return "rehearsal, for tests: the kernels run on the CPU"
    found = [f"{name}, {sms} SMs" for name, sms in extension.devices()]
    return "; ".join([extension.runtime(), *(found or ["no GPU found"])])


def config() -> dict[str, Any]:
    """The build and run-time configuration as a dict; :func:`show_config` prints it.

    Returns
    -------
    dict of str to object

    Examples
    --------
    >>> import batchnorm
    >>> batchnorm.config()["isa"] in batchnorm.config()["isa_supported"]
    True
    """
    cache = cache_info()
    return {
        "version": __version__,
        "compiler": _core.compiler(),
        "isa_built": _core.isa_built(),
        "isa_supported": _core.isa_levels(),
        "isa": _core.isa(),
        "isa_reason": _core.isa_reason(),
        "openmp": _core.openmp_runtime(),
        "threads": _core.num_threads(),
        "cache_limit": cache.limit,
        "cache_held": cache.held,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda": _cuda(),
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
    print(f"  CUDA         {c['cuda'] or 'no'}")
    print(f"  Python       {c['python']}, NumPy {c['numpy']}, {c['machine']}")
