"""Groups: what ``group=`` takes, for batches and data that several processes hold parts of.

- an mpi4py communicator is a group as it is
- ``torch_group``: the processes of torch.distributed
- ``LocalGroup``: threads of this process, for tests and for trying out
- ``Group``: the protocol, an object with ``allgather(array)``

>>> import numpy as np, batchnorm
>>> from batchnorm.distributed import LocalGroup
>>> x = np.random.default_rng(0).normal(size=(7, 3, 5)).astype(np.float32)
>>> parts = [x[:2], x[2:]]
>>> ranks = LocalGroup(2).run(lambda rank: batchnorm.moments(parts[rank.rank], group=rank).mean)
>>> (ranks[0] == ranks[1]).all(), np.abs(ranks[0] - x.mean(axis=(0, 2))).max() < 1e-7
(np.True_, np.True_)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from . import _core
from .typing import Group, Vector

__all__ = ["Group", "LocalGroup", "LocalRank", "torch_group"]

_T = TypeVar("_T")
_FIRST = 1024  # values that torch_group sends before it knows how many there are


def tell(group: Group | None, error: BaseException) -> None:
    """Make what has failed here fail in the processes that wait for this one, if there are any."""
    if group is not None:
        _core.fail_group(group, str(error) or type(error).__name__)


@contextmanager
def telling(group: Group | None) -> Iterator[None]:
    """What raises here, before this process comes to an exchange, raises in those that wait for it too."""
    try:
        yield
    except BaseException as error:
        tell(group, error)
        raise


def reduced(group: Group, mine: Vector, merge: Callable[[Vector, Vector], Vector]) -> Vector:
    """What merging the arrays of all processes gives, one by one or, of an mpi4py communicator, in a tree."""
    if not type(group).__module__.startswith("mpi4py"):
        return functools.reduce(merge, _core.gather(group, mine))
    from mpi4py import MPI

    def operation(a: Any, b: Any, datatype: Any) -> None:
        theirs, into = np.frombuffer(a, np.float64), np.frombuffer(b, np.float64)
        try:
            into[:] = merge(theirs, into)
        except ValueError:  # which must not leave MPI: all will see it in the result
            into[:] = np.nan

    total = np.empty_like(mine)
    # One element of all values, which MPI hands on whole.
    whole = MPI.DOUBLE.Create_contiguous(mine.size).Commit()
    reduction = MPI.Op.Create(operation, commute=True)
    try:
        group.Allreduce([mine, 1, whole], [total, 1, whole], reduction)  # type: ignore[attr-defined]
    finally:
        reduction.Free()
        whole.Free()
    if np.isnan(total).all():
        raise ValueError("squares of the processes' values add up to more than 1.8e308, expected less")
    return total


class LocalRank:
    """One rank of a :class:`LocalGroup`: a group, for one thread.

    Attributes
    ----------
    rank, size : int
        Its number, from 0, and how many there are.
    """

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self.rank, self.size, self._group = rank, len(group), group

    def allgather(self, array: Vector, /) -> list[Vector]:
        """Every rank's array. Waits until each thread has come.

        Parameters
        ----------
        array : ndarray
            This rank's, float64.

        Returns
        -------
        list of ndarray
            In the order of ranks.
        """
        return self._group.exchange(self.rank, array)

    def __repr__(self) -> str:
        return f"LocalRank({self.rank} of {self.size})"

    def __reduce__(self) -> Any:
        raise TypeError("a LocalRank is one thread's, so it is neither copied nor pickled; make a LocalGroup")


class LocalGroup:
    """Threads of this process as the ranks of a group.

    For tests, and to see what a program will do on several processes. One thread per rank; a group of one
    rank needs none: ``LocalGroup(1)[0]`` is a group whose batch is the call's own, with the sums that any
    number of ranks would have.

    Parameters
    ----------
    size : int, at least 1
        Number of ranks.

    Raises
    ------
    TypeError, ValueError
        ``size`` is no int, or less than 1.
    """

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"size is {type(size).__name__}, expected an int >= 1, a number of ranks")
        if size < 1:
            raise ValueError(f"size is {size}, expected an int >= 1, a number of ranks")
        self._size = int(size)
        self._arrays: dict[int, Vector] = {}  # of the exchange that is under way
        self._changed = threading.Condition()
        self._ended = False  # whether a rank has, without which no exchange comes to an end

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, rank: int) -> LocalRank:
        return LocalRank(self, range(len(self))[rank])

    def exchange(self, rank: int, array: Vector) -> list[Vector]:
        """What ``allgather`` of a rank does.

        Raises
        ------
        RuntimeError
            Another rank's thread ended without coming here.
        """
        with self._changed:
            arrays = self._arrays
            arrays[rank] = array
            if len(arrays) == self._size:
                self._arrays = {}
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or len(arrays) == self._size)
            if len(arrays) < self._size:
                raise RuntimeError(f"rank {rank} waited for one whose thread has ended")
        return [arrays[each] for each in range(self._size)]

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def run(self, function: Callable[[LocalRank], _T]) -> list[_T]:
        """Call ``function(rank)`` for each rank, in a thread of its own.

        Parameters
        ----------
        function : callable
            Takes a :class:`LocalRank`, which is a group.

        Returns
        -------
        list
            What the calls returned, in the order of ranks.

        Raises
        ------
        Exception
            The first one that was raised. A rank whose function returns while others wait for it makes theirs
            raise RuntimeError.

        Examples
        --------
        >>> from batchnorm.distributed import LocalGroup
        >>> LocalGroup(3).run(lambda rank: rank.rank * 10)
        [0, 10, 20]
        """
        results: list[Any] = [None] * len(self)
        raised: list[BaseException] = []
        self._arrays, self._ended = {}, False

        def one(rank: LocalRank) -> None:
            try:
                results[rank.rank] = function(rank)
            except BaseException as error:
                raised.append(error)
            finally:
                self._end()

        threads = [threading.Thread(target=one, args=(self[rank],)) for rank in range(len(self))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C
            self._end()
            raise
        if raised:
            raise raised[0]
        return results


class _TorchGroup:
    def __init__(self, distributed: Any, group: Any) -> None:
        self._distributed, self._group = distributed, group

    def allgather(self, array: Vector, /) -> list[Vector]:
        """Every process's array, in the order of ranks."""
        first = np.zeros(1 + _FIRST)
        first[0] = array.size
        first[1 : 1 + array.size] = array[:_FIRST]
        rows = self._rows(first)
        sizes = [int(row[0]) for row in rows]
        parts = [row[1 : 1 + size] for row, size in zip(rows, sizes, strict=True)]
        if max(sizes) <= _FIRST:
            return parts
        rest = np.zeros(max(sizes) - _FIRST)
        rest[: max(array.size - _FIRST, 0)] = array[_FIRST:]
        more = self._rows(rest)
        return [
            np.concatenate([part, row[: max(size - _FIRST, 0)]])
            for part, row, size in zip(parts, more, sizes, strict=True)
        ]

    def _rows(self, values: Vector) -> list[Vector]:
        import torch

        mine = torch.tensor(values)  # not NumPy's memory, which a thread of gloo may free at exit
        rows = [torch.empty_like(mine) for _ in range(self._distributed.get_world_size(self._group))]
        self._distributed.all_gather(rows, mine, group=self._group)
        return [row.numpy() for row in rows]

    def __reduce__(self) -> Any:
        raise TypeError(
            "a group of torch.distributed is one process's, so it is neither copied nor pickled; call "
            "torch_group() where it is used"
        )


def torch_group(process_group: Any = None) -> Group:
    """The processes of torch.distributed as a group.

    Parameters
    ----------
    process_group : torch.distributed.ProcessGroup, optional
        Of a backend with tensors on the CPU, such as gloo. All processes if absent.

    Returns
    -------
    Group
        To be passed as ``group=``. It sends up to 8 KiB by one ``all_gather``, more by two.

    Raises
    ------
    ImportError
        PyTorch is not installed, or without torch.distributed.
    RuntimeError
        ``torch.distributed.init_process_group`` has not been called.
    TypeError
        Not a process group.

    Examples
    --------
    >>> import batchnorm
    >>> from torch import distributed  # doctest: +SKIP
    >>> distributed.init_process_group("gloo")  # doctest: +SKIP
    >>> bn = batchnorm.BatchNorm(64, group=batchnorm.distributed.torch_group())  # doctest: +SKIP
    """
    try:
        from torch import distributed
    except ImportError as error:
        what = f'torch_group needs PyTorch: pip install "batchnorm[torch]" ({error})'
        raise ImportError(what) from error
    if not distributed.is_available():
        raise ImportError("torch_group needs torch.distributed, which this PyTorch was built without")
    if not distributed.is_initialized():
        remedy = "call torch.distributed.init_process_group('gloo') first"
        raise RuntimeError(f"torch.distributed has no processes, expected to be initialised; {remedy}")
    if process_group is not None and not isinstance(process_group, distributed.ProcessGroup):
        got = f"process_group is {type(process_group).__name__}"
        raise TypeError(f"{got}, expected a torch.distributed.ProcessGroup, or None for all processes")
    return _TorchGroup(distributed, process_group)
