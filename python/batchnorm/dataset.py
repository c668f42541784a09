"""Mean and variance of a data set that need not fit memory: arrays, files, batches, read piece by piece."""

from __future__ import annotations

import copy
import errno
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import _core
from ._arrays import as_array, dask_of, per_task
from .images import CHANNEL_AXES, GREY
from .moments import (
    FIRST_AXIS,
    MeanVar,
    Moments,
    array_of,
    common_count,
    reduced_axes,
    refuse_group,
    unit,
    update_of_dask,
)
from .progress import bar, idle
from .settings import UnsaidAxis, integer, kind
from .typing import Array, ChannelAxis, DataFormatName, Group, Mask, Vector

__all__ = ["DatasetMoments", "dataset_moments"]

_CHUNK_BYTES = 64 << 20
_FEW = 4  # channels of grey pictures and colours, with alpha


class DatasetMoments(MeanVar):
    """What :func:`dataset_moments` returns: ``mean`` and ``var`` to unpack, and more.

    Attributes
    ----------
    mean, var, std : array of float64, shape (C,)
        In units of ``max_value``, if it was given. ``std`` is the square root of ``var``.
    counts : array of float64, shape (C,)
        Number of values per channel.
    count : int or float
        What ``counts`` is in every channel; a ValueError where channels differ.
    moments : Moments
        The accumulator, in the data's own units, to merge or to go on with.
    """

    counts: Vector
    moments: Moments

    @property
    def std(self) -> Vector:
        return np.sqrt(self.var)

    @property
    def count(self) -> int | float:  # type: ignore[override]  # of a tuple's methods nobody misses this one
        return common_count(self.counts)


@_core.entrance
def dataset_moments(
    batches: object, *, channel_axis: ChannelAxis = FIRST_AXIS, data_format: DataFormatName | None = None,
    ddof: int = 0, read: Callable[[Any], Any] | None = None, transform: Callable[[Any], Array] | None = None,
    mask: Callable[[Array], Mask] | None = None, nodata: float | Sequence[float] | Array | None = None,
    max_value: float | None = None, chunk_bytes: int = _CHUNK_BYTES, moments: Moments | None = None,
    group: Group | None = None, progress: bool | None = None, num_threads: int | None = None,
) -> DatasetMoments:  # fmt: skip
    """Mean and variance of each channel of a data set, read once, piece by piece.

    Parameters
    ----------
    batches : array, path of an .npy file, or iterable of these
        An array may be larger than memory: ``numpy.memmap``, or anything with ``shape``, ``dtype`` and
        slices, such as a dataset of h5py or zarr. Files are memory-mapped, never unpickled. An iterable, a
        generator for example, is gone through once. With ``read`` or ``transform`` it may hold anything. A
        Dask array is read by its blocks, a Dask bag of such elements by its partitions, a task for each.
    channel_axis : int or tuple of int, default 1
        The axis that holds the channels of the arrays, as in :func:`batch_norm`.
    data_format : str, optional
        Another way to say it, as there. With "NHWC" and "NCHW" also single images of at most 4 channels, and
        grey ones (H, W). Arrays that ``read`` or ``transform`` made of something else and that may be
        pictures or tables need one of the two.
    ddof : int
        The variance divides by ``count - ddof``.
    read : callable, optional
        Makes an array of a path, or of another element of ``batches`` that is no array: ``read=imread`` or
        ``read=PIL.Image.open`` with paths of pictures. What it returns is an array, also a masked one
        (``numpy.ma``), or makes one by ``__array__`` or ``__array_interface__``, as pictures do. Pillow's
        pictures with a palette need ``.convert("RGB")``. A large array is cut into pieces if there is no
        ``transform``.
    transform : callable, optional
        Applied to each piece before it is taken in; returns an array that :meth:`Moments.update` takes.
        Elements that are neither arrays nor paths go to it as they are, so ``lambda b: b[0]`` picks the
        images from pairs. It gets whole what ``read`` returned, single images of a ``data_format``, and
        blocks of Dask, which are not cut along ``channel_axis``. Other large arrays are cut along their
        first axis that is not the channels', the samples, and no further. Of a piece it makes all channels,
        or that is an error: to see it, transform is called once more with one row of the first piece that
        is cut, or with two, for each axis that is; with Dask maybe in several tasks.
    mask : callable, optional
        Called with each piece as it is taken in, a single image with a batch axis; returns a ``mask`` for it
        as in :func:`moments`, True where a value counts. Of a Dask array also an array, NumPy's or Dask's; a
        function wants blocks that hold all channels.
    nodata : float, or one per channel, optional
        Values equal to it do not count, as in :func:`moments`.
    max_value : float, optional
        Gives the statistics of the data over ``max_value``: with 255 those of pixels scaled to [0, 1], as
        :func:`normalize_images` wants them. The accumulator keeps the data's own units.
    chunk_bytes : int
        Arrays larger than this are read in pieces of at most so many bytes, cut along the axis outermost in
        memory that is not the channels'. One row of it may be more and is then cut further. Blocks of Dask
        are cut, too, along the first such axis. With ``transform`` fewer cuts are made, see there.
    moments : Moments, optional
        An accumulator to go on with, changed in place; ``channel_axis`` and ``nodata`` are then its own.
        After Ctrl-C or an error it holds the pieces finished so far, but none of a Dask array or bag.
    group : None
        Statistics over processes: ``moments.allreduce(group)`` of the result, :meth:`Moments.allreduce`.
    progress : None or bool
        Show a progress bar on stderr; needs the package rich. None: if that is there and stderr is a
        terminal.
    num_threads : int, optional
        As in :func:`batch_norm`; with Dask of each task, where absent means 1.

    Returns
    -------
    DatasetMoments
        ``mean`` and ``var``, float64 of shape (C,), to unpack; also ``std``, ``counts``, ``count`` and
        ``moments``, the accumulator, to merge or to go on with.

    Raises
    ------
    TypeError, ValueError
        As :func:`moments`; also elements of other kinds, arrays with different numbers of channels, or whose
        channels cannot be told, files that are no .npy without ``read``, no values at all, and a
        ``max_value`` below 1 for integers.
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

    Pictures as a generator of uint8 arrays, channels last, in units of [0, 1]:

    >>> images = (np.full((4, 32, 32, 3), 51 * i, np.uint8) for i in range(6))
    >>> result = batchnorm.dataset_moments(images, data_format="NHWC", max_value=255)
    >>> result.mean.shape, result.mean.tolist(), result.count
    ((3,), [0.5, 0.5, 0.5], 24576)
    """
    refuse_group(group)
    total = Moments(channel_axis=channel_axis, data_format=data_format, nodata=nodata)
    if moments is not None:
        if not isinstance(moments, Moments):
            raise TypeError(f"moments is {kind(moments)}, expected a Moments to go on with, or None")
        axis = None if channel_axis is FIRST_AXIS else channel_axis
        given = {"channel_axis": axis, "data_format": data_format, "nodata": nodata}
        for name in (name for name, value in given.items() if value is not None):
            raise TypeError(f"{name} and moments are given, and {moments!r} has its own; drop {name}")
        total = moments
    delta = integer("ddof", ddof, 0, 2**53, "an int >= 0")
    chunk = integer("chunk_bytes", chunk_bytes, 1, 2**63 - 1, "an int >= 1")
    blocks = dask_of(batches)
    values = mask if hasattr(blocks, "chunks") and not callable(mask) else None  # as an array
    for name, function in (("read", read), ("transform", transform), ("mask", mask)):
        if function is not None and not callable(function) and function is not values:
            raise TypeError(f"{name} is {kind(function)}, expected a function, or None")
    top = unit(1 if max_value is None else max_value)
    if values is not None and transform is not None:
        got = "mask is an array and transform is given, which may change what it is of"
        raise ValueError(f"{got}; pass a function as mask, or map_blocks(transform) of batches")
    how = _Reading(total, chunk, read, transform, mask if values is None else None, top, num_threads)
    elements = (batches,) if blocks is not None else _elements(batches)
    size = None if read is not None else _bytes_of(batches)
    size = size if blocks is None else getattr(blocks, "npartitions", None)
    with bar(progress, "moments", size, of_bytes=blocks is None) as advance:
        for element in elements:
            if (parts := dask_of(element)) is not None:
                how.take_dask(total, parts, values, idle if blocks is None else advance)
            else:
                how.take(total, element, advance)
    if total.channels is None:
        hint = "all is masked or nodata, or a generator was gone through before"
        raise ValueError(f"batches holds no values that count, expected at least one; {hint}")
    result = DatasetMoments(total.mean / top, total.variance(delta) / top / top)
    result.counts, result.moments = total.counts, total
    return result


# ---- reading -----------------------------------------------------------------------------------------------


class _Reading:
    """How elements of a data set are taken in."""

    def __init__(
        self, like: Moments, chunk: int, read: Callable[[Any], Any] | None,
        transform: Callable[[Any], Array] | None, mask: Callable[[Array], Mask] | None, top: float,
        num_threads: int | None,
    ) -> None:  # fmt: skip
        self.form = str(like.state_dict()["data_format"])
        self.axis = CHANNEL_AXES.get(self.form, like.channel_axis)  # also of single images
        known = like.channels is not None or self.form or not isinstance(like.channel_axis, UnsaidAxis)
        self.said = like.channel_axis if known else None
        self.chunk, self.read, self.transform, self.mask = chunk, read, transform, mask
        self.top, self.num_threads = top, num_threads
        self.is_block = False  # what is taken is a block of Dask
        self.blocks: tuple[int, ...] = ()  # axes along which there are several of these
        self.probed: set[tuple[int, int]] = set()  # ranks and axes of which `transform` makes all channels

    def take(self, total: Moments, element: Any, advance: Callable[[int], object] = idle) -> None:
        made = not _is_array(element) and (self.read is not None or not _is_path(element))
        for piece, cut in self.pieces(element):
            x = piece if self.transform is None else self.transformed(piece, self.transform, cut)
            if isinstance(x, np.ndarray):
                unit(self.top, x.dtype)
                x = _batch(x, self.form, self.said, made)
            mask = None if self.mask is None else self.mask(x)
            total.update(x, mask=mask, num_threads=self.num_threads)
            advance(getattr(piece, "nbytes", 0))

    def pieces(self, element: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
        """What an element of the data set is taken in as, and along which axes it was cut."""
        expected = "arrays or paths of .npy files; pass read= or transform= to make arrays of other things"
        what = "an element of batches"
        read = None if _is_array(element) else self.read
        if read is not None:
            element, what, expected = read(element), "what read returned", "an array"
            expected += "; use numpy.asarray there"
        elif _is_path(element):
            element = _open_npy(element)
        _refuse_lazy(what, element)
        if self.transform is None and not _is_array(element):
            element = array_of(element)
        if _is_array(element):
            axes = self.axes_to_cut(element, read is not None)
            for piece, cut in _pieces(element, axes, self.chunk, not self.is_block):
                yield np.asanyarray(as_array("x", piece, False)), self.blocks + cut
        elif self.transform is not None:
            yield element, ()
        else:
            raise TypeError(f"{what} is {kind(element)}, expected {expected}")

    def axes_to_cut(self, x: Any, read: bool) -> tuple[int, ...]:
        """Along which an array may be cut: for `transform` samples from each other, if there are several."""
        axes = reduced_axes(x.ndim, self.axis) if x.ndim else ()
        if self.transform is None:
            return axes
        whole = read or self.is_block or (self.form in CHANNEL_AXES and x.ndim <= 3)
        return () if whole else axes[:1]

    def transformed(self, x: Any, transform: Callable[[Any], Any], cut: tuple[int, ...]) -> Any:
        """What `transform` makes of a piece; an error if that holds some of the channels alone."""
        y = transform(x)
        _refuse_lazy("what transform returned", y)
        y = array_of(y)
        axes: list[int] = np.atleast_1d(self.axis).tolist()

        def channels(array: Any) -> list[int]:
            return [array.shape[a] for a in axes if -array.ndim <= a < array.ndim]

        for a in cut if isinstance(y, np.ndarray) else ():
            if (x.ndim, a) in self.probed:
                continue
            try:  # what a piece of other length says
                other = array_of(transform(np.take(x, [0] * (1 if x.shape[a] > 1 else 2), axis=a)))
            except Exception:  # who takes no other length
                other = y
            if channels(other) != channels(y):
                got = f"transform made shape {y.shape} of {x.shape}, some of the channels"
                got += f", as batches is cut along axis {a}"
                whole = f"batches.rechunk({{{a}: -1}})" if self.blocks else "a larger chunk_bytes"
                use = f"use {whole}, or batches.transpose(...) in place of transform"
                raise ValueError(f"{got}, expected all; {use}")
            self.probed.add((x.ndim, a))
        return y

    def take_element(self, total: Moments, element: Any) -> None:
        """The same of an element of a Dask bag."""
        from .dask import naming

        shown = repr(os.fspath(element)) if _is_path(element) else kind(element)
        with naming(f"element {shown} of batches"):
            self.take(total, element)

    def take_block(self, total: Moments, x: Array, mask: Mask | None = None) -> None:
        """The same of a block of a Dask array and an array that masks it."""
        if mask is not None:
            rest = reduced_axes(x.ndim, self.axis)
            axes = range(x.ndim) if mask.ndim == x.ndim else rest[: mask.ndim]
            mask = np.expand_dims(mask, [a for a in range(x.ndim) if a not in axes])
            x = np.ma.masked_array(x, np.broadcast_to(~mask, x.shape))
        self.take(total, x)

    def take_dask(self, total: Moments, x: Any, mask: Any, advance: Callable[[int], object]) -> None:
        """The same of a Dask array or bag, each block or partition read by a task."""
        from .dask import blocks_of, is_bag

        how = copy.copy(self)
        how.num_threads = per_task(self.num_threads)
        if is_bag(x):
            update_of_dask(total, x, how.take_element, {}, of="batches", advance=advance)
            return
        x = blocks_of("batches", x)
        x = _batch(x, self.form, self.said, False) if self.transform is None else x
        if self.transform is not None or self.mask is not None:
            self.check_whole(x)
        how.is_block, how.blocks = True, tuple(a for a, n in enumerate(x.numblocks) if n > 1)
        options: dict[str, Any] = {"of": "batches", "flat": self.transform is not None, "advance": advance}
        options["check"] = self.transform is None and self.mask is None  # these want to see values
        update_of_dask(total, x, how.take_block, {"mask": mask}, **options)

    def check_whole(self, x: Any) -> None:
        """An error if blocks, which `transform` or `mask` is called with, are cut along the channels."""
        name, of, use = "mask", "its channels", "pass what it makes of the Dask array: mask=f(batches)"
        if self.transform is not None:
            name, of = "transform", "where what transform makes has its channels"
            use = "if it keeps the shape batches.map_blocks(transform)"
        for a in np.atleast_1d(self.axis).tolist():
            if -x.ndim <= a < x.ndim and len(x.chunks[a]) > 1:
                got = f"batches has {len(x.chunks[a])} blocks along axis {a}, {of}, expected one"
                rechunk = f"use batches.rechunk({{{a}: -1}})"
                raise ValueError(f"{got}, as {name} is called with each block; {rechunk}, or {use}")


# ---- pieces ------------------------------------------------------------------------------------------------


def _is_array(value: object) -> bool:
    """Something to take slices of; not a NumPy scalar."""
    there = all(hasattr(value, name) for name in ("shape", "dtype", "ndim", "__getitem__"))
    return there and not isinstance(value, np.generic)


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _elements(batches: object) -> Iterable[object]:
    if _is_array(batches) or _is_path(batches):
        return (batches,)
    if all(hasattr(batches, name) for name in ("__array__", "shape", "ndim")):  # a DataFrame of pandas
        return (array_of(batches),)
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | bytes | bytearray):
        mapping = ", a mapping; pass its values()" * isinstance(batches, Mapping)
        expected = "an array, a path of an .npy file, or an iterable of these"
        raise TypeError(f"batches is {kind(batches)}{mapping}, expected {expected}")
    return batches


def _refuse_lazy(what: str, value: object) -> None:
    """Of a Dask collection each slice would compute its blocks again."""
    if dask_of(value) is not None:
        got = f"{what} is {kind(value)}, which is lazy, expected an array"
        raise TypeError(f"{got}; use .compute() there, or pass batches=[...] of Dask arrays")


def _batch(x: Array, form: str, axis: ChannelAxis | None, made: bool) -> Array:
    """x as an accumulator takes it, an image with a batch axis; an error if its channels cannot be told."""
    if form in CHANNEL_AXES and x.ndim in (2, 3):
        of = CHANNEL_AXES[form]
        if x.ndim == 2 or x.shape[of] <= _FEW:
            return np.expand_dims(x, (0, of) if x.ndim == 2 else 0)
        got = f"data_format is {form!r} and an array has shape {x.shape}, expected 4 dimensions"
        remedy = f"pass transform=lambda x: x[None] for one image of {x.shape[of]} channels"
        raise ValueError(f"{got}; {remedy}, transform=lambda x: {GREY[form]} for grey images")
    vague = axis is None or (axis == -1 and x.ndim == 2)
    if made and vague and x.ndim > 1 and x.shape[1] > _FEW and (x.ndim < 4 or x.shape[-1] <= _FEW):
        got = f"channel_axis is {'not given' if axis is None else axis} and an array has shape {x.shape}"
        remedy = "pass (to Moments, if given) data_format='NHWC' for images"
        palette = " (.convert('RGB') in read those with a palette)"
        remedy += palette if x.ndim == 2 else ", channel_axis=0 for rasters (bands, rows, columns)"
        raise ValueError(f"{got}, expected to be told its channels; {remedy}, channel_axis=1 for (N, C, ...)")
    return x


def _nbytes(array: Any) -> int:
    return int(math.prod(array.shape) * array.dtype.itemsize)


def _bytes_of(batches: object) -> int | None:
    """How much there is to read, where that can be told beforehand."""
    if dask_of(batches) is not None:
        return None
    if _is_array(batches):
        return _nbytes(batches)
    if _is_path(batches):
        return os.path.getsize(batches) if os.path.isfile(batches) else None  # type: ignore[arg-type]
    sizes = [_bytes_of(b) for b in batches] if isinstance(batches, list | tuple) else [None]
    return None if None in sizes else sum(sizes)  # type: ignore[arg-type]


def _pieces(
    x: Any, axes: tuple[int, ...], chunk: int, by_strides: bool, already: tuple[int, ...] = ()
) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Views of x, at most `chunk` bytes each if `axes` will do, cut along that outermost in memory, or along
    the first; and the axes along which x is cut."""
    size = _nbytes(x)
    axes = tuple(a for a in axes if x.shape[a] > 1)
    if size <= chunk or not axes:
        yield x, already
        return
    cut = axes[0]
    if by_strides and isinstance(x, np.ndarray):
        cut = max(axes, key=lambda a: (abs(x.strides[a]), -a))
    row = size // x.shape[cut]
    step = max(1, chunk // max(row, 1))
    for start in range(0, x.shape[cut], step):
        piece = x[(slice(None),) * cut + (slice(start, start + step),)]
        if row > chunk:
            yield from _pieces(piece, axes, chunk, by_strides, (*already, cut))
        else:
            yield piece, (*already, cut)


def _open_npy(path: str | os.PathLike[str]) -> Array:
    """The array of an .npy file, memory-mapped for reading."""
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"batches contains the path {name!r}, expected str or os.PathLike of str")
    mode = os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        remedy = f"pass sorted(pathlib.Path({name!r}).glob('*.npy'))"
        raise IsADirectoryError(errno.EISDIR, f"expected an .npy file, this is a folder; {remedy}", name)
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise ValueError(f"{name!r} is not a regular file, expected an .npy file")
    try:
        return np.lib.format.open_memmap(name, mode="r")
    except (OSError, MemoryError):
        raise
    except Exception as error:
        what = f"cannot read {name!r} as an .npy file: {str(error) or type(error).__name__}"
        remedy = "pass read=, a function that makes an array of a path, such as PIL.Image.open"
        raise ValueError(f"{what}; {remedy}") from error
