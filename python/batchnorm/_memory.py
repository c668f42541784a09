"""The cache of warm memory for results: what it holds, and how much it may."""

from __future__ import annotations

from typing import NamedTuple

from . import _args, _core

__all__ = ["CacheInfo", "cache_info", "empty_cache", "set_cache_limit"]


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
    >>> x = np.ones((8, 64, 32, 32), np.float32)
    >>> y = batchnorm.batch_norm_train(x).y
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
    _core.set_cache_limit(_args.cache_limit(limit))


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
