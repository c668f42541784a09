"""Mean and variance per channel: of one array, and of batches that are added up and merged.

A `Moments` holds count, sum x and sum x^2 of each channel, each as three float64 that add up to it. The core
makes these sums and merges them. Here is what surrounds that: which values count, results, state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import _core, _hints
from ._arrays import as_array, dask_of, is_masked, on_gpu, per_task
from .distributed import reduced, telling
from .functional import batch_norm
from .progress import idle
from .settings import Settings, UnsaidAxis, flag, integer, kind, real
from .typing import Array, ChannelAxis, DataFormatName, Group, Mask, Vector

__all__ = ["MeanVar", "Moments", "moments"]

FIRST_AXIS = UnsaidAxis(1)
_PARTS = 3  # float64 per sum
_filled = tuple.__new__  # makes a MeanVar of a pair without the detour of its own constructor
_VERSION = 1  # of `Moments.to_array`


class MeanVar(NamedTuple):
    """Mean and variance, what :func:`moments` returns.

    Attributes
    ----------
    mean, var : array of float64, shape (C,)
    """

    mean: Vector
    var: Vector


@_core.entrance
def moments(
    x: Array, *, channel_axis: ChannelAxis = FIRST_AXIS, data_format: DataFormatName | None = None,
    ddof: int = 0, keepdims: bool = False, mask: Mask | None = None, lengths: Array | None = None,
    lengths_axis: int | None = None, weights: Array | None = None,
    nodata: float | Sequence[float] | Array | None = None, group: Group | None = None,
    num_threads: int | None = None,
) -> MeanVar:  # fmt: skip
    """Mean and variance of each channel of ``x``.

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Any strides. Or an image of uint8, int16 or uint16. Or a masked array of these (``numpy.ma``): what it
        masks does not count. Or a Dask array of these, computed now, a task for each block, and then the
        arrays below may be Dask's as well.
    channel_axis : int or tuple of int, default 1
        The axis that holds the channels, as in :func:`batch_norm`. All other axes are reduced.
    data_format : str, optional
        Another way to say it, as there.
    ddof : int
        The variance divides by ``n - ddof``.
    keepdims : bool
        Keep the reduced axes with length 1, so that the results broadcast against ``x``.
    mask : bool array, optional
        Which values count, as in :func:`batch_norm_train`: True where a value counts; those of ``numpy.ma``
        are the other way round.
    lengths : int array of shape (N,), optional
        The same for padded sequences, as there.
    lengths_axis : int, optional
        The axis of the steps, as there.
    weights : array of floats or ints, optional
        How often each value counts, as there. ``n`` is their sum, of each channel its own if ``mask`` has x's
        shape.
    nodata : float, or one per channel, optional
        Values equal to it do not count. It is rounded to x's dtype before it is compared. NaN matches NaN;
        one of several, it says of integers that this channel has none.
    group : Group, optional
        Other processes that hold parts of the batch, as in :func:`batch_norm_train`: the moments are those of
        the whole batch, the same on all. To merge what each has seen by itself, :meth:`Moments.allreduce`.
    num_threads : int, optional
        As in :func:`batch_norm`; with Dask of each task, where absent means 1.

    Returns
    -------
    MeanVar
        ``mean`` and ``var``, float64 of shape (C,), of the channel axes' lengths if there are several, or of
        x's rank with ``keepdims``. A channel with ``n <= ddof`` has NaN.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`. Also ``ddof`` that no channel has more values than, or ``nodata`` that x's
        dtype cannot hold.

    Warns
    -----
    UserWarning
        ``nodata`` matched nothing in a channel that holds the least value of the dtype.

    Notes
    -----
    ``mean = K + sum(x - K) / n`` and ``var = (sum((x - K)^2) - sum(x - K)^2 / n) / (n - ddof)`` in float64,
    where the squares of float32 are exact. K is 0, or for float64 the mean of the channel's first 16 values;
    if the mean turns out so far from it that digits were lost (128 standard deviations, 2 for float64), once
    more with K the mean [1]_. The sums of integers are exact, and their mean and variance the correctly
    rounded ones.

    .. [1] T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", The American
       Statistician 37 (1983).

    Examples
    --------
    >>> import numpy as np, batchnorm
    >>> x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    >>> mean, var = batchnorm.moments(x)
    >>> mean.shape, mean.tolist()
    ((3,), [7.5, 11.5, 15.5])

    Two bands of a raster, in which -9999 stands for no data:

    >>> bands = np.array([[1, 3, -9999], [5, 5, 8]], np.float32)
    >>> batchnorm.moments(bands, channel_axis=0, nodata=-9999).mean.tolist()
    [2.0, 6.0]
    """
    if type(x) is np.ndarray and keepdims is False and nodata is None and data_format is None:
        pair = _core.moments(
            x, channel_axis=channel_axis, ddof=ddof, mask=mask, lengths=lengths, lengths_axis=lengths_axis,
            weights=weights, group=group, num_threads=num_threads,
        )  # fmt: skip
        return _filled(MeanVar, pair)
    where: dict[str, Any] = {} if channel_axis is FIRST_AXIS else {"channel_axis": channel_axis}
    where |= {} if data_format is None else {"data_format": data_format}
    if (blocks := dask_of(x)) is not None:
        from .dask import blocks_of, channels_of

        channels_of(blocks_of("x", blocks), where)
        delta, keep = integer("ddof", ddof, 0, 2**53, "an int >= 0"), flag("keepdims", keepdims)
        total = Moments(channel_axis=channel_axis, data_format=data_format, nodata=nodata).update(
            x, mask=mask, lengths=lengths, lengths_axis=lengths_axis, weights=weights, num_threads=num_threads
        )
        return _of_total(total if group is None else total.allreduce(group), x, delta, keep)
    if on_gpu(x) and nodata is not None:
        raise ValueError(f"nodata is {kind(nodata)}, which is not served on a GPU; pass mask=x != nodata")
    with telling(group):
        keep = flag("keepdims", keepdims)
        positions = {"mask": mask, "lengths": lengths, "lengths_axis": lengths_axis}
        if not on_gpu(x):
            x, positions = _counting(x, where, _nodata(nodata), positions, num_threads)
    pair = _core.moments(
        x, **where, **positions, ddof=ddof, weights=weights, group=group, num_threads=num_threads
    )
    if not keep:
        return MeanVar(*pair)
    others = reduced_axes(len(x.shape), Settings(**where).channel_axis)
    kept = tuple(1 if axis in others else size for axis, size in enumerate(x.shape))
    return MeanVar(*(values.reshape(kept) for values in pair))


class Moments:
    """Mean and variance per channel of any number of batches, in any order, mergeable.

    Parameters
    ----------
    channel_axis : int or tuple of int, default 1
        The channel axis of the batches. Their other axes are reduced and may differ in number and size.
    data_format : str, optional
        Alias of ``channel_axis``, as in :func:`batch_norm`.
    nodata : float, or one per channel, optional
        Values of the batches that do not count, as in :func:`moments`.

    Raises
    ------
    TypeError, ValueError
        For a ``channel_axis``, ``data_format`` or ``nodata`` that is none; both of the first two together.

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
    Moments(channel_axis=1, channels=3, count=32)
    >>> total.mean.shape, total.mean.tolist(), bool((total.var == x.var(axis=(0, 2))).all())
    ((3,), [43.5, 47.5, 51.5], True)
    """

    __slots__ = ("_channel_axis", "_nodata", "_shape", "_sums", "_where")

    @_core.entrance
    def __init__(
        self, *, channel_axis: ChannelAxis = FIRST_AXIS, data_format: DataFormatName | None = None,
        nodata: float | Sequence[float] | Array | None = None,
    ) -> None:  # fmt: skip
        settings = Settings(channel_axis=channel_axis, data_format=data_format)
        self._channel_axis, self._where = settings.channel_axis, settings.where
        self._nodata = _nodata(nodata)
        # Of moment_sums, and the channels' shape. Neither is ever written, so that copies may share them.
        self._sums: Vector | None = None
        self._shape: tuple[int, ...] = ()

    # ---- filling -------------------------------------------------------------------------------------------

    @_core.entrance
    def update(
        self, x: Array, *, mask: Mask | None = None, lengths: Array | None = None,
        lengths_axis: int | None = None, weights: Array | None = None, num_threads: int | None = None,
    ) -> Moments:  # fmt: skip
        """Take in a batch.

        Parameters
        ----------
        x : array, at least 2 dimensions
            As :func:`moments` takes it, a Dask array too. Sums of integers are exact: however such data is
            cut into batches, the result is the same. A batch without values changes nothing.
        mask : bool array, optional
            Which values count, as in :func:`moments`.
        lengths : int array of shape (N,), optional
            As there.
        lengths_axis : int, optional
            As there.
        weights : array of floats or ints, optional
            How often each value counts, as there. ``counts`` grow by their sum.
        num_threads : int, optional
            As in :func:`batch_norm`.

        Returns
        -------
        Moments
            This accumulator.

        Raises
        ------
        TypeError, ValueError
            As :func:`moments`; also other channels than before. Nothing is changed then, nor by Ctrl-C.
        """
        positions: dict[str, Any] = {"mask": mask, "lengths": lengths, "lengths_axis": lengths_axis}
        if (blocks := dask_of(x)) is not None:
            from .dask import blocks_of

            take = partial(Moments.update, lengths_axis=lengths_axis, num_threads=per_task(num_threads))
            return update_of_dask(self, blocks_of("x", blocks), take, positions | {"weights": weights})
        x, positions = _counting(x, self._where, self._nodata, positions, num_threads)
        sums = _core.moment_sums(x, **self._where, **positions, weights=weights, num_threads=num_threads)
        return self._add("x", sums, _core.channel_shape(x, **self._where))

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
            ``other`` is no Moments, or has other channels. Nothing is changed then.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other is {kind(other)}, expected a Moments")
        return self if other._sums is None else self._add("other", other._sums, other._shape)

    def __add__(self, other: Moments) -> Moments:
        return self.copy().merge(other) if isinstance(other, Moments) else NotImplemented

    @staticmethod
    def merged(accumulators: Iterable[Moments | Vector]) -> Moments:
        """A new accumulator of everything that some others have seen.

        Parameters
        ----------
        accumulators : iterable of Moments, or of what their :meth:`to_array` gives
            At least one; they stay as they are.

        Returns
        -------
        Moments
            With the first one's axis and ``nodata``.

        Raises
        ------
        TypeError, ValueError
            As :meth:`merge`; also if there are none.
        """
        total: Moments | None = None
        for one in accumulators:
            one = Moments.from_array(one) if isinstance(one, np.ndarray) else one
            first = total is None and isinstance(one, Moments)
            total = one.copy() if first else (total or Moments()).merge(one)
        if total is None:
            raise ValueError("accumulators is empty, expected at least one Moments")
        return total

    def allreduce(self, group: Group) -> Moments:
        """A new accumulator of everything that all processes of a group have seen.

        Parameters
        ----------
        group : Group
            Every process of it must call this. An mpi4py communicator reduces by an operation of its own, in
            as many steps as the logarithm of the number of processes; from another group each process
            receives the sums of all.

        Returns
        -------
        Moments
            The same on every process, with this one's axis and ``nodata``.

        Raises
        ------
        TypeError
            ``group`` is none.
        ValueError
            The processes have seen different channels, or values whose squares exceed a float64.
        RuntimeError
            A process of the group has failed.

        Examples
        --------
        >>> import numpy as np, batchnorm
        >>> from batchnorm.distributed import LocalGroup
        >>> x = np.arange(48, dtype=np.float32).reshape(8, 2, 3)
        >>> def total(rank):
        ...     mine = batchnorm.Moments().update(x[rank.rank :: 3])
        ...     return mine.allreduce(rank)
        >>> LocalGroup(3).run(total)[0].mean.tolist()
        [22.0, 25.0]
        """
        total = self.copy()
        shapes = [tuple(map(int, each)) for each in _core.gather(group, np.array(self._shape, np.float64))]
        known = {shape for shape in shapes if shape}
        if len(known) > 1:
            raise ValueError(f"processes have seen channels of shapes {shapes}, expected the same on all")
        if known:
            (total._shape,) = known
            mine = np.zeros(3 * _PARTS * math.prod(total._shape)) if self._sums is None else self._sums
            total._sums = reduced(group, mine, _core.merged_moment_sums)
        return total

    def copy(self) -> Moments:
        """An accumulator of the same state that goes its own way.

        Returns
        -------
        Moments
        """
        return copy.copy(self)

    def _check_channels(self, name: str, shape: tuple[int, ...]) -> None:
        if self._sums is not None and shape != self._shape:
            raise ValueError(f"{name} has channels of shape {shape}, expected {self._shape} as before")

    def _add(self, name: str, sums: Vector, shape: tuple[int, ...]) -> Moments:
        self._check_channels(name, shape)
        if sums[: math.prod(shape)].any():  # the counts; a batch without values brings no channels either
            self._sums = sums if self._sums is None else _core.merged_moment_sums(self._sums, sums)
            self._shape = shape
        return self

    @staticmethod
    def _side_by_side(parts: Any, lengths: Sequence[tuple[int, ...]]) -> Moments:
        """Accumulators of different channels as one; `parts` has an axis for each of the channels'."""
        total: Moments = next((p for p in parts.flat if p.channels is not None), parts.flat[0])
        if parts.size == 1 or total.channels is None:
            return total
        total = total.copy()
        sums = np.empty(parts.shape, object)
        for place in np.ndindex(parts.shape):
            own, shape = parts[place]._sums, [n[i] for n, i in zip(lengths, place, strict=True)]
            own = np.zeros(3 * _PARTS * math.prod(shape)) if own is None else own
            sums[place] = own.reshape(3 * _PARTS, *shape)
        whole = np.block(sums.tolist())
        total._sums, total._shape = whole.ravel(), whole.shape[1:]
        return total

    # ---- reading -------------------------------------------------------------------------------------------

    @property
    def channel_axis(self) -> ChannelAxis:
        """The channel axis of the batches; -1 with a ``data_format`` whose channels are last."""
        return self._channel_axis

    @property
    def channels(self) -> int | None:
        """Number of channels, of all channel axes together; None before the first batch with values."""
        return None if self._sums is None else math.prod(self._shape)

    @property
    def counts(self) -> Vector:
        """Number of values of each channel seen so far, or their sum of weights, float64 of shape (C,).

        Shape (0,) before the first batch with values.
        """
        return np.zeros(0) if self._sums is None else self._moments()[0]

    @property
    def count(self) -> int | float:
        """What :attr:`counts` is in every channel: an int, or a float if weights made it fractional.

        Raises
        ------
        ValueError
            The channels have seen different numbers of values.
        """
        return common_count(self.counts)

    @property
    def mean(self) -> Vector:
        """Mean per channel, float64 of shape (C,). NaN without values; before any a ValueError, as below."""
        return self._moments()[1]

    @property
    def var(self) -> Vector:
        """Population variance per channel, ``m2 / counts``, float64 of shape (C,)."""
        return self.variance()

    @property
    def std(self) -> Vector:
        """Square root of ``var``."""
        return np.sqrt(self.var)

    @property
    def m2(self) -> Vector:
        """Sum of squared deviations from the mean per channel, float64 of shape (C,)."""
        return self._moments()[2]

    @_core.entrance
    def variance(self, ddof: int = 0) -> Vector:
        """Variance per channel, ``m2 / (counts - ddof)``.

        Parameters
        ----------
        ddof : int
            0 for the population's variance, 1 for the unbiased estimate from a sample.

        Returns
        -------
        array of float64, shape (C,)
            NaN for channels with ``counts <= ddof``.

        Raises
        ------
        TypeError, ValueError
            ``ddof`` is no int, negative, or not less than any of ``counts``.
        """
        delta = integer("ddof", ddof, 0, 2**53, "an int >= 0")
        counts, _, m2 = self._moments()
        if not (counts > delta).any():
            raise ValueError(f"ddof is {delta}, expected less than {counts.max():.16g}, the number of values")
        return np.divide(m2, counts - delta, out=np.full_like(m2, np.nan), where=counts > delta)

    def _moments(self) -> tuple[Vector, ...]:
        if self._sums is None:
            raise ValueError("this Moments has seen no values, so it has no moments; call update first")
        return tuple(v.reshape(self._shape) for v in _core.moments_from_sums(self._sums))

    def __repr__(self) -> str:
        options = self._where | ({} if self._nodata is None else {"nodata": self._nodata.tolist()})
        counts = np.unique(self.counts)
        count = f"counts={counts[0]:.16g} to {counts[-1]:.16g}" if counts.size > 1 else f"count={self.count}"
        shown = [f"{name}={value!r}" for name, value in options.items()]
        return f"Moments({', '.join(shown)}, channels={self.channels}, {count})"

    # ---- state ---------------------------------------------------------------------------------------------

    def to_array(self) -> Vector:
        """The sums as one flat array, to send to another process.

        Returns
        -------
        array of float64, shape (3 + 2 k + 9 C,)
            The version, 1; C, 0 before the first value; the number k of channel axes; these axes and their
            lengths; count, sum x and sum x^2, each as three times C values that add up to it. ``data_format``
            is kept as its axis; ``nodata`` is not in it.

        See Also
        --------
        allreduce : Merge what several processes have seen.

        Examples
        --------
        >>> import numpy as np, batchnorm
        >>> mine = batchnorm.Moments().update(np.ones((8, 64, 4, 4), np.float32))
        >>> mine.to_array().shape
        (581,)
        >>> batchnorm.Moments.from_array(mine.to_array())
        Moments(channel_axis=1, channels=64, count=128)
        """
        axes = np.atleast_1d(self._channel_axis)
        header = [_VERSION, self.channels or 0, axes.size, *axes, *(self._shape or [0] * axes.size)]
        return np.concatenate([header, np.zeros(0) if self._sums is None else self._sums])

    @classmethod
    def from_array(cls, array: Vector) -> Moments:
        """The accumulator whose :meth:`to_array` this is; going on with it gives the same bits.

        Parameters
        ----------
        array : array of float64, 1 dimension
            In any order of bytes. Copied.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            No such array: its kind, dtype, version or length is wrong, or no accumulator has such values.
        """
        if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("=") != np.float64:
            raise TypeError(f"array is {getattr(array, 'dtype', kind(array))}, expected an array of float64")
        array = array.astype(np.float64)  # of another machine's order of bytes, too
        try:
            version, channels, k = map(int, array[:3])
            with np.errstate(invalid="ignore"):  # a number that no int can be is none of an accumulator's
                axes, shape = array[3 : 3 + 2 * k].astype(int).reshape(2, k).tolist()
            sums = array[3 + 2 * k :]
            count, _, squares = sums.reshape(3, _PARTS, channels)
            good = version == _VERSION and min(shape) >= 0 and channels == math.prod(shape)
            good = good and bool(np.isfinite(count).all()) and count.any() == (channels > 0)
            good = good and not ((count[0] < 0) | (squares[0] < 0)).any()
            new = cls(channel_axis=FIRST_AXIS if axes == [1] and not channels else tuple(axes))
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            first = array.ravel()[:5].tolist()
            what = f"array begins with {first}, expected what Moments.to_array() gives"
            raise ValueError(what + _difference(array))
        if channels:
            new._sums, new._shape = sums, tuple(shape)
        return new

    def state_dict(self) -> dict[str, Array]:
        """The state as plain arrays, for ``numpy.savez`` and :meth:`from_state`.

        Returns
        -------
        dict
            ``moments`` (:meth:`to_array`), ``data_format`` (str, empty if there is none), ``nodata``
            (float64, of shape (0,) if there is none). New arrays.

        Examples
        --------
        >>> import numpy as np, batchnorm
        >>> state = batchnorm.Moments(nodata=0).update(np.ones((8, 64, 4, 4), np.float32)).state_dict()
        >>> state["moments"].shape, state["nodata"].tolist()
        ((581,), 0.0)
        >>> batchnorm.Moments.from_state(state)
        Moments(channel_axis=1, nodata=0.0, channels=64, count=128)
        """
        return {
            "moments": self.to_array(),
            "data_format": np.array(self._where.get("data_format", "")),
            "nodata": np.zeros(0) if self._nodata is None else self._nodata.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Moments:
        """The accumulator whose :meth:`state_dict` this is; going on with it gives the same bits.

        Parameters
        ----------
        state : mapping of str to array
            As :meth:`state_dict` returns it, also that of version 0.1. What ``numpy.load`` makes of an .npz
            of it will do. Copied.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            Missing or unexpected names, wrong kinds, dtypes or shapes, values that no accumulator can have.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is {kind(state)}, expected a mapping, as Moments.state_dict() gives it")
        names = _FORMAT_1 if "axis" in state else _FORMAT_2
        if set(state) != set(names):
            raise ValueError(f"state has {', '.join(map(str, state))}, expected {', '.join(names)}")
        found = cls.from_array(_flat(state) if names is _FORMAT_1 else state["moments"])
        nodata = np.asarray(state.get("nodata", []))
        data_format: Any = str(state["data_format"]) or None
        axis: Any = FIRST_AXIS if data_format else found._channel_axis
        new = cls(channel_axis=axis, data_format=data_format, nodata=nodata if nodata.size else None)
        new._sums, new._shape = found._sums, found._shape
        return new


# ---- Dask ------------------------------------------------------------------------------------------------


def update_of_dask(
    total: Moments, x: Any, take: Callable[..., object], positions: Mapping[str, Any], *, of: str = "x",
    flat: bool = False, check: bool = True, advance: Callable[[int], object] = idle,
) -> Moments:  # fmt: skip
    """`total`, which takes in all blocks of a Dask array or elements of a bag, the argument `of`.

    Each goes into an accumulator of a task's own by ``take(accumulator, block, mask=, ...)``. `flat` blocks
    are of the same channels wherever they are.
    """
    from .dask import channels_of, is_bag, merged_blocks, merged_partitions, positions_of

    new = total.copy()
    new._sums, new._shape = None, ()
    if is_bag(x):
        found = merged_partitions(x, partial(_moments_of_elements, new, take), Moments.merged, advance)
    else:
        nodata = new._nodata
        channels = () if flat else channels_of(x, new._where, of)
        shape = tuple(x.shape[a] for a in channels)
        operands = positions_of(x, channels, of, **positions)
        if channels:
            total._check_channels(of, shape)
        if nodata is not None and nodata.ndim and channels:
            _check_nodata(nodata, shape)
            new._nodata = np.asarray(np.nan) if np.isnan(nodata).all() else nodata
            operands |= {"nodata": (nodata, channels)} if new._nodata is nodata else {}
        how: dict[str, Any] = {"empty": new, "of": of, "check": check, "advance": advance}
        one = partial(_moments_of_block, new, take)
        parts = merged_blocks(x, channels, one, Moments.merged, operands, **how)
        found = Moments._side_by_side(parts, [x.chunks[a] for a in channels])
    return total if found._sums is None else total._add(of, found._sums, found._shape)


def _of_total(total: Moments, x: Any, ddof: int, keepdims: bool) -> MeanVar:
    """What `moments` returns of a Dask array."""
    others = reduced_axes(x.ndim, total.channel_axis)
    none = np.full([int(n) for a, n in enumerate(x.shape) if a not in others], np.nan)
    pair = (none, none.copy()) if total.channels is None else (total.mean, total.variance(ddof))
    return MeanVar(*(np.expand_dims(values, others if keepdims else ()) for values in pair))


def _moments_of_block(
    new: Moments, take: Callable[..., object], x: Array, *, nodata: Vector | None = None, **positions: Any
) -> Moments:
    total = new.copy()
    if nodata is not None:  # of this block's channels; NaN says of integers that they have none
        total._nodata = None if x.dtype.kind in "iu" and np.isnan(nodata).all() else nodata
    with _hints.muted():  # what is true of a block may not be of the whole
        take(total, x, **positions)
    return total


def _moments_of_elements(new: Moments, take: Callable[..., object], elements: Iterable[Any]) -> Moments:
    total = new.copy()
    for element in elements:
        take(total, element)
    return total


# ---- arguments ---------------------------------------------------------------------------------------------


def unit(max_value: object, dtype: np.dtype[Any] | None = None) -> float:
    """`max_value`, checked: what becomes 1, of data of a dtype if that is known."""
    top = real("max_value", max_value, 1e-300, 1e300, "a finite number > 0, the value that becomes 1")
    if top < 1 and dtype is not None and dtype.kind in "iu":
        got = f"max_value is {top:.6g}, expected the value of {dtype} that becomes 1, so at least 1"
        raise ValueError(f"{got}; to multiply by {top:.6g} pass max_value={1 / top:.6g}")
    return top


def array_of(value: Any) -> Any:
    """The array that something says it can be made, as a picture of Pillow does; other things as they are."""
    makes = any(hasattr(type(value), name) for name in ("__array__", "__array_interface__"))
    if isinstance(value, np.ndarray | np.generic) or not makes:
        return value
    if getattr(value, "mode", None) in ("P", "PA"):
        got = f"a picture has mode {value.mode!r}, numbers of colours in its palette, expected colours"
        raise ValueError(f"{got}; use picture.convert('RGB')")
    return as_array("x", value, False)


def refuse_group(group: object) -> None:
    """Data sets are gone through by each process by itself; what they have seen is merged then."""
    if group is not None:
        remedy = "merge what each process has seen: dataset_moments(batches).moments.allreduce(group)"
        raise ValueError(f"group is {kind(group)}, expected None; {remedy}")


def common_count(counts: Vector) -> int | float:
    """The number that all counts are, 0 of none; an error if they differ."""
    least, most = float(counts.min(initial=np.inf)), float(counts.max(initial=0))
    if least < most:
        got = f"the channels have seen different numbers of values, {least:.16g} to {most:.16g}"
        raise ValueError(f"{got}; use counts, one per channel")
    return int(most) if most.is_integer() else most


def reduced_axes(ndim: int, axis: ChannelAxis) -> tuple[int, ...]:
    """The axes that are not the channels', in increasing order, of an array that has those."""
    channels = {a % ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
    return tuple(a for a in range(ndim) if a not in channels)


def _nodata(nodata: object) -> Vector | None:
    """A number, or one per channel, as float64."""
    if nodata is None:
        return None
    values = np.asanyarray(nodata)
    if is_masked(values):
        got = "nodata is a masked array, whose mask would be ignored"
        raise TypeError(f"{got}, expected a number, or one per channel; use nodata.data")
    if values.dtype.kind not in "iuf" or not values.size:
        raise TypeError(f"nodata is {kind(nodata)}, expected a number, or one per channel")
    return np.array(values, np.float64)


def _counting(
    x: Any, where: dict[str, Any], nodata: Vector | None, positions: dict[str, Any], num_threads: int | None
) -> tuple[Array, dict[str, Any]]:
    """x without a mask of its own, and the positions that count of it."""
    if not isinstance(x, np.ndarray):
        x = as_array("x", x, False)
    if nodata is None and not is_masked(x):
        return x, positions
    counted: Any = ~np.ma.getmaskarray(x)
    x = np.ma.getdata(x) if is_masked(x) else x
    shape = _core.channel_shape(x, **where)
    if nodata is not None:
        counted = counted & ~_matches(x, nodata, reduced_axes(x.ndim, Settings(**where).channel_axis), shape)
    if counted.all():
        return x, positions
    if any(value is not None for value in positions.values()):
        ones = np.ones(x.shape, np.float32)  # the identity gives 0 where nothing counts
        how = {"eps": 0, "num_threads": num_threads, **where, **positions}
        counted &= batch_norm(ones, np.zeros(shape), np.ones(shape), **how) != 0
    return x, {"mask": counted}


def _check_nodata(nodata: Vector, shape: tuple[int, ...]) -> None:
    if nodata.ndim and nodata.shape != shape:
        raise ValueError(f"nodata has shape {nodata.shape}, expected a number, or {shape}, one per channel")


def _matches(x: Array, nodata: Vector, others: tuple[int, ...], shape: tuple[int, ...]) -> Mask:
    """Where x holds what stands for no data; `others` are the axes that are not the channels'."""
    _check_nodata(nodata, shape)
    whole, none = x.dtype.kind in "iu", np.isnan(nodata)
    with np.errstate(over="ignore", invalid="ignore"):
        value = nodata.astype(x.dtype)
    held = (value == nodata) | (none & ~none.all()) if whole else np.isfinite(value) | ~np.isfinite(nodata)
    if not held.all():
        got = f"nodata is {nodata[~held][0]:.9g}, expected a value that {x.dtype} can hold"
        raise ValueError(f"{got}; drop it, or pass what stands for no data in x")
    value, none = (np.expand_dims(v, others) if nodata.ndim else v for v in (value, none))
    match: Mask = (x == value) & ~none
    if none.any():
        match |= (x != x) & none
    found = match.any(axis=others)
    if x.dtype.kind != "u" and not found.all():
        lowest = np.iinfo(x.dtype).min if whole else np.nextafter(x.dtype.type(-np.inf), x.dtype.type(0))
        least = x.dtype.type(max(float(lowest), float(np.finfo(np.float32).min)))
        low = x <= least
        suspect = low.any(axis=others) & ~found & ~(whole & np.isnan(nodata))  # integers that are all data
        if suspect.any():
            got = f"nodata={nodata.tolist()} matched nothing in {suspect.sum()} of {found.size} channels"
            hint = f"{float(x[low].min()):.9g}, the end of a range: is that what stands for no data?"
            _hints.warn(f"{got}, which hold {hint}")
    return match


def _difference(array: Vector) -> str:
    """What is wrong with a flat state, as far as its head tells."""
    if array.ndim != 1 or array.size < 5:
        return f"; it has shape {array.shape}"
    version, channels, axes = array[:3].tolist()
    if array[:1].byteswap().item() == _VERSION:
        return "; its bytes are in the other order: pass array.view(array.dtype.newbyteorder())"
    if version != _VERSION:
        return f" in version {_VERSION}: it is of another release, or no such array"
    size = 3 + 2 * axes + 3 * _PARTS * channels
    return f"; it has {array.size} values, and begins as one of {size:.16g}" if size != array.size else ""


_FORMAT_1 = ("axis", "data_format", "count", "sum", "sum_sq")
_FORMAT_2 = ("moments", "data_format", "nodata")


def _flat(state: Mapping[str, Array]) -> Vector:
    """What version 0.1 stored, one count for all channels, as `Moments.to_array` gives it."""
    axis, count, total, squares = (np.asarray(state[n]) for n in _FORMAT_1 if n != "data_format")
    channels = total.size // _PARTS
    header = [_VERSION, channels, 1, axis.item(), channels]
    return np.concatenate([header, np.repeat(count, channels), total.ravel(), squares.ravel()])
