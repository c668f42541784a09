"""Mean and variance of more data than fits memory: the accumulator `Moments`, and `dataset_moments`, which
reads arrays, files or batches piece by piece into one.

An accumulator holds the count and, per channel, the sums of x and x^2, each as three float64 that add up to
it (cpp/core/moment_sums.h); the core makes them of a batch and merges them. Here is what surrounds that: in
which pieces a data set is read, checks, progress.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import _args, _core, _positions
from ._functional import MeanVar
from ._state import _failing_as

Array = NDArray[Any]
Vector = NDArray[np.float64]

_PARTS = 3  # doubles per sum
_CHUNK_BYTES = 64 << 20


class Moments:
    """Mean and variance per channel of any number of batches, in any order, mergeable.

    Parameters
    ----------
    axis : int
        The channel axis of the batches. Their other axes are reduced and may differ in number and size.
    data_format : str, optional
        Alias of ``axis``, as in :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        For an ``axis`` or ``data_format`` that is none; both together.

    Notes
    -----
    Every batch has its own sums taken as :func:`moments` takes them, in float64, about 0 or about a value K
    near the batch's mean. They are made sums about 0 without rounding, ``sum x^2 = sum (x - K)^2 + 2 K sum (x
    - K) + n K^2`` with Dekker's exact products [2]_, and added up in three float64 each by Knuth's TwoSum
    [3]_, 159 bits, where merging by the formula of Chan, Golub and LeVeque [1]_ would round at every step. So
    the order and the grouping in which batches are merged do not matter: the result is the same to the last
    bit as long as a channel's sums fit 159 bits, and they do but for values many orders of magnitude apart;
    beyond that, within one unit in the last place. What matters is how the data was cut into batches, as each
    batch's own sums round, no worse than those of :func:`moments`. Values up to 1e150 in magnitude.

    NaN and infinite values stay in their channel. One accumulator serves one thread at a time; for several,
    use one each and merge them.

    .. [1] T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", The American
       Statistician 37 (1983).
    .. [2] T. Dekker, "A floating-point technique for extending the available precision", Numerische
       Mathematik 18 (1971).
    .. [3] D. Knuth, "The Art of Computer Programming", vol. 2, 4.2.2, theorem B.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.arange(96, dtype=np.float32).reshape(8, 3, 4)
    >>> first, rest = batchnorm.Moments().update(x[:5]), batchnorm.Moments().update(x[5:])
    >>> total = first + rest
    >>> total
    Moments(axis=1, channels=3, count=32)
    >>> total.mean.shape, total.mean.tolist(), bool((total.var == x.var(axis=(0, 2))).all())
    ((3,), [43.5, 47.5, 51.5], True)
    """

    __slots__ = ("_axis", "_data_format", "_sums")

    def __init__(
        self,
        *,
        axis: int = _args.DEFAULT_AXIS,
        data_format: _args.DataFormatName | None = None,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            _args.reject_keywords(Moments.__init__, unknown)
        self._axis = _args.resolve_axis_argument(axis, data_format)
        self._data_format = data_format
        # Of moment_sums; never written, so that copies may share it and an error leaves it as it was.
        self._sums: Vector | None = None

    # ---- filling -------------------------------------------------------------------------------------------

    def update(
        self,
        x: Array,
        *,
        weights: Array | None = None,
        mask: NDArray[np.bool_] | None = None,
        lengths: NDArray[Any] | None = None,
        lengths_axis: int | None = None,
        num_threads: int | None = None,
    ) -> Moments:
        """Take in a batch.

        Parameters
        ----------
        x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
            Or of uint8, int16 or uint16, whose sums are exact: however such data is cut into batches, the
            result is the same. Without values it changes nothing.
        weights, mask, lengths, lengths_axis
            Which positions count, and how often, as in :func:`moments`, not for integers; ``count`` grows by
            the sum of weights.
        num_threads : int, optional
            As in :func:`batch_norm`.

        Returns
        -------
        Moments
            This accumulator.

        Raises
        ------
        TypeError, ValueError
            As :func:`moments`; also another number of channels than before. Nothing is changed then, nor by
            Ctrl-C.
        """
        sums = None
        positions = _positions.asked(mask, lengths, lengths_axis, weights)
        if positions is None and self._data_format is None and self._may_take(x):
            sums = _core.moment_sums(x, self._axis, num_threads, None, False)
        if sums is None:
            axis = _args.DEFAULT_AXIS if self._data_format else self._axis
            x, axis, _, threads, counted, _ = _args.statistics(
                x, axis, self._data_format, 0, num_threads, positions
            )
            if self._sums is not None and x.shape[axis] != self.channels:
                raise ValueError(
                    f"x has shape {x.shape} with {x.shape[axis]} channels on axis {axis}, expected "
                    f"{self.channels} as the batches before"
                )
            sums = _core.moment_sums(x, axis, threads, counted, True)
            assert sums is not None
        self._add(sums)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in what another accumulator has seen, which stays as it is.

        Parameters
        ----------
        other : Moments
            Of as many channels; on which axis of its batches they were does not matter.

        Returns
        -------
        Moments
            This accumulator.

        Raises
        ------
        TypeError, ValueError
            ``other`` is no Moments, or has another number of channels. Nothing is changed then.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other is {_args._kind(other)}, expected a Moments")
        if None not in (self.channels, other.channels) and self.channels != other.channels:
            raise ValueError(
                f"other has {other.channels} channels, expected {self.channels} as this accumulator has"
            )
        if other._sums is not None:
            self._add(other._sums)
        return self

    def __add__(self, other: Moments) -> Moments:
        return self.copy().merge(other) if isinstance(other, Moments) else NotImplemented

    @staticmethod
    def merged(accumulators: Iterable[Moments]) -> Moments:
        """A new accumulator of everything that some others have seen.

        Parameters
        ----------
        accumulators : iterable of Moments
            At least one; they stay as they are.

        Returns
        -------
        Moments
            With the first one's axis.

        Raises
        ------
        TypeError, ValueError
            As :meth:`merge`; also if there are none.
        """
        total: Moments | None = None
        for i, one in enumerate(accumulators):
            if not isinstance(one, Moments):
                raise TypeError(f"accumulators[{i}] is {_args._kind(one)}, expected a Moments")
            total = one.copy() if total is None else total.merge(one)
        if total is None:
            raise ValueError("accumulators is empty, expected at least one Moments")
        return total

    def copy(self) -> Moments:
        """An accumulator of the same state that goes its own way."""
        new = Moments.__new__(Moments)
        new._axis, new._data_format, new._sums = self._axis, self._data_format, self._sums
        return new

    def _may_take(self, x: object) -> bool:
        """Whether nothing speaks against x as far as this accumulator is concerned."""
        return self._sums is None or (
            isinstance(x, np.ndarray)
            and -x.ndim <= self._axis < x.ndim
            and x.shape[self._axis] == self.channels
        )

    def _add(self, sums: Vector) -> None:
        if sums[0] == 0:
            return
        self._sums = sums if self._sums is None else _core.merged_moment_sums(self._sums, sums)

    # ---- reading -------------------------------------------------------------------------------------------

    @property
    def channels(self) -> int | None:
        """Number of channels; None before the first batch with values."""
        return None if self._sums is None else self._sums.size // (2 * _PARTS)

    @property
    def count(self) -> int | float:
        """Number of values per channel seen so far: an int, or a float if weights made it fractional."""
        parts = [] if self._sums is None else self._sums[:_PARTS].tolist()
        return sum(map(int, parts)) if all(p.is_integer() for p in parts) else math.fsum(parts)

    @property
    def mean(self) -> Vector:
        """Mean per channel, float64 of shape (C,). Before the first value a ValueError, as all below."""
        return self._mean_m2()[0]

    @property
    def var(self) -> Vector:
        """Population variance per channel, ``m2 / count``, float64 of shape (C,)."""
        return self.variance()

    @property
    def std(self) -> Vector:
        """Square root of ``var``."""
        return np.sqrt(self.var)

    @property
    def m2(self) -> Vector:
        """Sum of squared deviations from the mean per channel, float64 of shape (C,)."""
        return self._mean_m2()[1]

    def variance(self, ddof: int = 0) -> Vector:
        """Variance per channel, ``m2 / (count - ddof)``.

        Parameters
        ----------
        ddof : int
            0 for the population's variance, 1 for the unbiased estimate from a sample.

        Returns
        -------
        array of float64, shape (C,)

        Raises
        ------
        TypeError, ValueError
            ``ddof`` is no int, negative, or not less than ``count``.
        """
        delta = _check_ddof(ddof)
        m2 = self.m2
        if self.count <= delta:
            raise ValueError(f"ddof is {delta}, expected less than the {self.count} values per channel")
        return m2 / (self.count - delta)

    def _mean_m2(self) -> tuple[Vector, Vector]:
        if self._sums is None:
            raise ValueError(
                "this Moments has seen no values, so it has no mean or variance; call update first"
            )
        return _core.moments_from_sums(self._sums)

    def __repr__(self) -> str:
        where = f"axis={self._axis}" if self._data_format is None else f"data_format={self._data_format!r}"
        return f"Moments({where}, channels={self.channels}, count={self.count})"

    # ---- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Array]:
        """The state as plain arrays, for ``numpy.savez`` and :meth:`from_state`.

        Returns
        -------
        dict
            ``axis`` (int64), ``data_format`` (str, empty if there is none), ``count`` (float64 of shape
            (3,)), ``sum`` and ``sum_sq`` (float64 of shape (3, C), C = 0 before the first value): count and
            sums of x and x^2, as three rows that add up to them. New arrays.

        Examples
        --------
        >>> import numpy as np, batchnorm
        >>> state = batchnorm.Moments().update(np.ones((8, 64, 4, 4), np.float32)).state_dict()
        >>> state["sum"].shape, state["count"].tolist()
        ((3, 64), [128.0, 0.0, 0.0])
        >>> batchnorm.Moments.from_state(state)
        Moments(axis=1, channels=64, count=128)
        """
        sums = np.zeros(_PARTS) if self._sums is None else self._sums
        sum_, sum_sq = sums[_PARTS:].reshape(2, _PARTS, -1)
        return {
            "axis": np.array(self._axis, np.int64),
            "data_format": np.array(self._data_format or ""),
            "count": sums[:_PARTS].copy(),
            "sum": sum_.copy(),
            "sum_sq": sum_sq.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Moments:
        """The accumulator whose :meth:`state_dict` this is; going on with it gives the same bits.

        Parameters
        ----------
        state : mapping of str to array
            As :meth:`state_dict` returns it; what ``numpy.load`` makes of an .npz of it will do. Copied.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            Missing or unexpected names, wrong kinds, dtypes or shapes, values that no accumulator can have.
        """
        return _from_state(state)


def _check_ddof(ddof: object) -> int:
    delta = _args.check_int(ddof, "ddof", "an int >= 0")
    if delta < 0:
        raise ValueError(f"ddof is {delta}, expected an int >= 0")
    return delta


def _from_state(state: Mapping[str, Array]) -> Moments:
    names = ("axis", "data_format", "count", "sum", "sum_sq")
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state is {_args._kind(state)}, expected a mapping, as Moments.state_dict() gives it"
        )
    missing, extra = [n for n in names if n not in state], [str(n) for n in state if n not in names]
    if missing or extra:
        raise ValueError(
            f"state lacks {', '.join(missing) or 'nothing'} and has unexpected "
            f"{', '.join(extra) or 'nothing'}, expected exactly {', '.join(names)}"
        )
    entries = {name: state[name] for name in names}
    for name, kind in (("axis", "i"), ("data_format", "U"), ("count", "f"), ("sum", "f"), ("sum_sq", "f")):
        expected = {"i": "int64", "U": "str", "f": "float64"}[kind]
        value = entries[name]
        if not isinstance(value, np.ndarray):
            raise TypeError(f"state[{name!r}] is {_args._kind(value)}, expected an array of {expected}")
        if value.dtype.kind != kind or (kind != "U" and value.dtype != np.dtype(expected)):
            raise TypeError(f"state[{name!r}] has dtype {value.dtype}, expected {expected}")
    channels = entries["sum"].shape[-1] if entries["sum"].ndim == 2 else 0
    shapes = {"axis": (), "data_format": (), "count": (_PARTS,)}
    for name in names:
        shape = shapes.get(name, (_PARTS, channels))
        if entries[name].shape != shape:
            raise ValueError(f"state[{name!r}] has shape {entries[name].shape}, expected {shape}")
    data_format = str(entries["data_format"]) or None
    moments = Moments(data_format=data_format) if data_format else Moments(axis=int(entries["axis"]))  # type: ignore[arg-type]
    if moments._axis != entries["axis"]:
        raise ValueError(
            f"state has axis {entries['axis']} and data_format {data_format!r}, which is {moments._axis}"
        )
    count, sum_sq = entries["count"], entries["sum_sq"]
    if not np.isfinite(count).all() or count[0] < 0 or (count[0] == 0) != (channels == 0):
        raise ValueError(
            f"state['count'] is {count.tolist()} with {channels} channels, expected finite parts of a number "
            f"> 0, or 0 without channels"
        )
    if (sum_sq[0] < 0).any():
        channel = int(np.flatnonzero(sum_sq[0] < 0)[0])
        raise ValueError(
            f"state['sum_sq'] is {sum_sq[0, channel]} at channel {channel}, expected values >= 0"
        )
    if channels:
        moments._sums = np.concatenate([count, entries["sum"].ravel(), sum_sq.ravel()]).astype(np.float64)
    return moments


# ---- a data set --------------------------------------------------------------------------------------------


class DatasetMoments(MeanVar):
    """A MeanVar, two values to unpack, that also holds ``count``, the number of values per channel, and
    ``moments``, the accumulator."""

    count: int | float  # type: ignore[assignment]  # of a tuple's methods nobody misses this one
    moments: Moments


def dataset_moments(
    batches: object,
    *,
    axis: int = _args.DEFAULT_AXIS,
    data_format: _args.DataFormatName | None = None,
    ddof: int = 0,
    transform: Callable[[Any], Array] | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
    moments: Moments | None = None,
    progress: bool | None = None,
    num_threads: int | None = None,
    **unknown: NoReturn,
) -> DatasetMoments:
    """Mean and variance of each channel of a data set, read once, piece by piece.

    Parameters
    ----------
    batches : array, path of an .npy file, or iterable of these
        An array may be larger than memory: ``numpy.memmap``, or anything with ``shape``, ``dtype`` and
        slices, such as a dataset of h5py or zarr or an array of dask. Files are memory-mapped, never
        unpickled. An iterable, a generator for example, is gone through once.
    axis, data_format
        The channel axis of the arrays, as in :func:`batch_norm`.
    ddof : int
        The variance divides by ``count - ddof``.
    transform : callable, optional
        Applied to each piece before it is taken in; returns an array that :meth:`Moments.update` takes.
        Elements of an iterable that are neither arrays nor paths go to it as they are, so
        ``lambda b: b[0]`` picks the images from pairs.
    chunk_bytes : int
        Arrays larger than this are read in pieces of at most so many bytes, cut along the axis outermost in
        memory that is not the channels'. One row of it may be more and is then cut further.
    moments : Moments, optional
        An accumulator to go on with, changed in place; ``axis`` is then its own. After Ctrl-C or an error it
        holds the pieces finished so far.
    progress : None or bool
        Show a progress bar on stderr; needs the package rich. None: if that is there and stderr is a
        terminal.
    num_threads : int, optional
        As in :func:`batch_norm`.

    Returns
    -------
    DatasetMoments
        ``mean`` and ``var``, float64 of shape (C,), to unpack; ``count``, the values per channel;
        ``moments``, the accumulator, to merge or to go on with.

    Raises
    ------
    TypeError, ValueError
        As :func:`moments`; also elements of other kinds, arrays with different numbers of channels, files
        that are no .npy, no values at all.
    OSError
        A file cannot be opened.
    ImportError
        ``progress=True`` without rich.

    Notes
    -----
    See :class:`Moments`: neither the order of the batches nor how they are shared among workers matters.

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.arange(960, dtype=np.float32).reshape(80, 3, 4)
    >>> mean, var = batchnorm.dataset_moments(x, chunk_bytes=512)
    >>> mean.shape, mean.tolist()
    ((3,), [475.5, 479.5, 483.5])

    Images as a generator of uint8 arrays, channels last; of pixels scaled to [0, 1] the mean is that over
    255:

    >>> images = (np.full((4, 32, 32, 3), i, np.uint8) for i in range(10))
    >>> result = batchnorm.dataset_moments(images, data_format="NHWC")
    >>> result.mean.shape, result.mean.tolist(), result.count
    ((3,), [4.5, 4.5, 4.5], 40960)
    """
    if unknown:
        _args.reject_keywords(dataset_moments, unknown)
    total = _accumulator(moments, axis, data_format)
    delta, chunk = _check_ddof(ddof), _args.check_int(chunk_bytes, "chunk_bytes", "an int >= 1")
    if chunk < 1:
        raise ValueError(f"chunk_bytes is {chunk}, expected an int >= 1")
    if transform is not None and not callable(transform):
        raise TypeError(f"transform is {_args._kind(transform)}, expected a function of a batch, or None")
    if num_threads is not None:
        _args.thread_count(num_threads)
    show = progress if progress is None else _args.check_flag(progress, "progress")
    elements = _elements(batches)
    with _bar(show, _bytes_of(batches)) as advance:
        for element in elements:
            for piece in _pieces_of(element, total._axis, chunk, transform is not None):
                total.update(piece if transform is None else transform(piece), num_threads=num_threads)
                advance(getattr(piece, "nbytes", 0))
    if total.count == 0:
        raise ValueError(
            "batches holds no values, expected at least one per channel; a generator that was gone through "
            "before is empty"
        )
    result = DatasetMoments(total.mean, total.variance(delta))
    result.count, result.moments = total.count, total
    return result


def _accumulator(moments: object, axis: int, data_format: _args.DataFormatName | None) -> Moments:
    if moments is None:
        return Moments(axis=axis, data_format=data_format)
    if not isinstance(moments, Moments):
        raise TypeError(f"moments is {_args._kind(moments)}, expected a Moments to go on with, or None")
    if axis is not _args.DEFAULT_AXIS or data_format is not None:
        given = "data_format" if data_format is not None else "axis"
        raise TypeError(f"{given} and moments are given, and {moments!r} has its own axis; drop {given}")
    return moments


def _is_array(value: object) -> bool:
    """Something to take slices of; not a NumPy scalar."""
    return isinstance(value, np.ndarray) or (
        all(hasattr(value, name) for name in ("shape", "dtype", "ndim", "__getitem__"))
        and not isinstance(value, np.generic)
    )


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _elements(batches: object) -> Iterable[object]:
    if _is_array(batches) or _is_path(batches):
        return (batches,)
    expected = "an array, a path of an .npy file, or an iterable of these"
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches is {_args._kind(batches)}, a mapping; pass its values(), expected {expected}"
        )
    if not isinstance(batches, Iterable) or isinstance(batches, bytes | bytearray):
        raise TypeError(f"batches is {_args._kind(batches)}, expected {expected}")
    return batches


def _nbytes(array: Any) -> int:
    return int(math.prod(array.shape) * array.dtype.itemsize)


def _bytes_of(batches: object) -> int | None:
    """How much there is to read, where that can be told beforehand."""
    if _is_array(batches):
        return _nbytes(batches)
    if _is_path(batches):
        with contextlib.suppress(OSError):
            return os.path.getsize(batches)  # type: ignore[arg-type]
        return None
    if not isinstance(batches, list | tuple):
        return None
    sizes = [_bytes_of(b) if _is_array(b) or _is_path(b) else None for b in batches]
    return None if None in sizes else sum(s for s in sizes if s is not None)


def _pieces_of(element: object, axis: int, chunk: int, any_kind: bool) -> Iterator[Any]:
    """What an element of the data set is taken in as."""
    if _is_path(element):
        element = _open_npy(element)  # type: ignore[arg-type]
    if _is_array(element):
        for piece in _pieces(element, axis, chunk):
            yield np.asarray(piece) if not isinstance(piece, np.ndarray) else piece
    elif any_kind:
        yield element
    else:
        raise TypeError(
            f"batches contains something {_args._kind(element)}, expected arrays or paths of .npy files; "
            f"pass transform= to make arrays of other things"
        )


def _pieces(x: Any, axis: int, chunk: int) -> Iterator[Any]:
    """Views of x, at most `chunk` bytes each, cut along the axis that is outermost in memory."""
    size = _nbytes(x)
    axes = [a for a in range(x.ndim) if a != axis % x.ndim and x.shape[a] > 1]
    if size <= chunk or not axes or not -x.ndim <= axis < x.ndim:
        yield x
        return
    cut = max(axes, key=lambda a: (abs(x.strides[a]), -a)) if isinstance(x, np.ndarray) else axes[0]
    row = size // x.shape[cut]
    step = max(1, chunk // max(row, 1))
    for start in range(0, x.shape[cut], step):
        piece = x[(slice(None),) * cut + (slice(start, start + step),)]
        if row > chunk:
            yield from _pieces(piece, axis, chunk)
        else:
            yield piece


def _open_npy(path: str | os.PathLike[str]) -> Array:
    """The array of an .npy file, memory-mapped for reading."""
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"batches contains the path {name!r}, expected str or os.PathLike of str")
    mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        remedy = f"this is a folder; pass sorted(pathlib.Path({name!r}).glob('*.npy'))"
        raise IsADirectoryError(errno.EISDIR, f"expected an .npy file, {remedy}", name)
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise ValueError(f"{name!r} is not a regular file, expected an .npy file")
    with _failing_as(f"cannot read {name!r} as an .npy file"):
        return np.lib.format.open_memmap(name, mode="r")


@contextlib.contextmanager
def _bar(show: bool | None, total: int | None) -> Iterator[Callable[[int], object]]:
    """A function that is told the bytes read, and shows them."""
    progress = _make_bar(show)
    if progress is None:
        yield lambda n: None
        return
    with progress:
        task = progress.add_task("moments", total=total)
        yield lambda n: progress.advance(task, n)
        done = progress.tasks[0].completed
        progress.update(task, total=done, completed=done)  # known at last


def _make_bar(show: bool | None) -> Any:
    if show is False or (show is None and not sys.stderr.isatty()):
        return None
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        if show is None:
            return None
        raise ImportError(
            "progress=True needs the package rich: pip install 'batchnorm[progress]', or pass progress=False"
        ) from None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
