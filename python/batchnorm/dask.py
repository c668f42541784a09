"""Dask: statistics and inference of arrays in blocks, one task a block, on any scheduler.

:func:`batchnorm.moments`, :func:`batchnorm.dataset_moments` and :func:`batchnorm.normalize_images` take
Dask's arrays as they are, and xarray's that hold one. This module serves them, and has ``batch_norm``.

>>> import dask.array as da, batchnorm.dask
>>> x = da.random.default_rng(0).normal(5, 2, (8, 3, 32, 32), chunks=(2, 3, 32, 32))
>>> mean, var = batchnorm.moments(x)
>>> batchnorm.dask.batch_norm(x, mean, var).chunksize
(2, 3, 32, 32)
"""

from __future__ import annotations

import contextlib
import numbers
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from . import _core, functional
from ._arrays import as_array, dask_of, is_masked, per_task
from .progress import idle
from .settings import Settings, UnsaidAxis, kind
from .typing import ActivationName, Array, ChannelAxis, DataFormatName, Mask

try:
    import dask
    import dask.array as da
    from dask.callbacks import Callback
except ImportError as error:
    raise ImportError('batchnorm.dask needs Dask: pip install "batchnorm[dask]"') from error

__all__ = ["batch_norm"]

_FIRST = UnsaidAxis(1)
# A value with axes that are some of x's, and these.
Operand = tuple[Any, tuple[int, ...]]
_Blocks = Any  # da.Array: its module may be another one


# ---- arguments ---------------------------------------------------------------------------------------------


def blocks_of(name: str, value: Any) -> _Blocks:
    """The dask array that `value` is, or holds."""
    found = dask_of(value)
    if isinstance(found, da.Array):
        return found
    remedies = {
        "DataFrame": f"; use {name}.to_dask_array()", "Delayed": "; use dask.array.from_delayed",
        "Bag": "; dataset_moments takes bags",
    }  # fmt: skip
    raise TypeError(f"{name} is {kind(value)}, expected a dask array{remedies.get(type(found).__name__, '')}")


def is_bag(value: Any) -> bool:
    bags = sys.modules.get("dask.bag")
    return bags is not None and isinstance(value, bags.Bag)


def channels_of(x: _Blocks, where: Mapping[str, Any], of: str = "x") -> tuple[int, ...]:
    """The channel axes of a dask array, in increasing order; an error if `where` does not fit it."""
    known = [1 if np.isnan(n) else n for n in x.shape]
    _core.channel_shape(np.broadcast_to(_native(np.zeros((), x.dtype)), known), **where)
    axis = Settings(**where).channel_axis
    channels = tuple(sorted(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))))
    for a in channels:
        if np.isnan(x.shape[a]):
            got = f"{of} has blocks of unknown length along axis {a}, its channels"
            raise ValueError(f"{got}, expected known ones; call {of}.compute_chunk_sizes() first")
    return channels


def positions_of(
    x: _Blocks, channels: tuple[int, ...], of: str = "x", *, mask: Any = None, weights: Any = None,
    lengths: Any = None, lengths_axis: int | None = None,
) -> dict[str, Operand]:  # fmt: skip
    """What says which positions count, each with the axes of x that it covers, by its rank."""
    rest = tuple(a for a in range(x.ndim) if a not in channels)
    by_rank: dict[int, tuple[int, ...]] = {1: (0,)} if 0 not in channels else {}
    by_rank |= {len(rest): rest, x.ndim: tuple(range(x.ndim))}
    found: dict[str, Operand] = {}
    for name, value in (("mask", mask), ("weights", weights), ("lengths", lengths)):
        if value is None:
            continue
        value = _array(f"a bool or number array over the positions of {of}", name, value, name != "mask")
        if name == "mask" and value.dtype != bool:
            got = f"mask has dtype {value.dtype}, expected a bool array over the positions of {of}"
            raise TypeError(f"{got}, True where they count; use mask.astype(bool)")
        if value.ndim not in by_rank:
            shapes = [str(tuple(x.shape[a] for a in axes)) for axes in by_rank.values()]
            raise ValueError(f"{name} has shape {value.shape}, expected {' or '.join(dict.fromkeys(shapes))}")
        found[name] = value, by_rank[value.ndim]
    a = rest[1] if lengths_axis is None and len(rest) == 2 else lengths_axis  # else an error of the core's
    if lengths is not None and isinstance(a, numbers.Integral) and not isinstance(a, bool):
        if -x.ndim <= a < x.ndim and len(x.chunks[a]) > 1:
            got = f"{of} has {len(x.chunks[a])} blocks along axis {a}, whose steps lengths counts"
            raise ValueError(f"{got}, expected one; use {of}.rechunk({{{a}: -1}}), or pass mask=")
    return found


def _array(expected: str, name: str, value: Any, is_vector: bool = False) -> Any:
    """A dask array as it is, other things as an ndarray."""
    value = as_array(name, value, is_vector) if dask_of(value) is None else blocks_of(name, value)
    if is_masked(getattr(value, "_meta", value)):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored, expected {expected}")
    if not isinstance(value, np.ndarray | da.Array):
        raise TypeError(f"{name} is {kind(value)}, expected {expected}")
    return value


def _is_cut(name: str, value: Any, axis: int, x: _Blocks, a: int, of: str) -> bool:
    """Whether an operand is cut along an axis as x is along `a`; else it has length 1, for all of it."""
    size, n, here = value.shape[axis], x.shape[a], f"along axis {a} of {of}"
    if size == n or size == 1:
        return bool(size == n)
    if not np.isnan(size):
        expected = f"{n}, or 1"
        if np.isnan(n):
            expected = f"blocks of unknown length as {of} has; call {of}.compute_chunk_sizes() first"
        got = f"{name} has shape {value.shape}, and length {size} {here}"
        raise ValueError(f"{got}, expected {expected}")
    got, blocks = f"{name} has {value.numblocks[axis]} blocks of unknown length {here}", x.numblocks[a]
    if not np.isnan(n):
        raise ValueError(f"{got}, expected length {n}; call {name}.compute_chunk_sizes() first")
    if value.numblocks[axis] != blocks:
        use = f"call {of}.compute_chunk_sizes() and {name}.compute_chunk_sizes() first"
        raise ValueError(f"{got}, expected {blocks} as {of} has; {use}")
    return True


def _aligned(name: str, operand: Operand, x: _Blocks, of: str) -> tuple[_Blocks, tuple[int, ...]]:
    """An operand as a dask array of x's rank, and the axes along which it is in x's blocks.

    Along the others its length is 1.
    """
    value, axes = operand
    if value.ndim != len(axes):
        expected = tuple(x.shape[a] for a in axes)
        raise ValueError(f"{name} has shape {value.shape}, expected {expected} to match {of} {x.shape}")
    cut = tuple(a for axis, a in enumerate(axes) if _is_cut(name, value, axis, x, a, of))
    order = np.argsort(axes).tolist()
    value = value.transpose(order)[tuple(slice(None) if a in axes else None for a in range(x.ndim))]
    chunks = {a: x.chunks[a] if a in cut else (1,) for a in range(x.ndim)}
    if not isinstance(value, da.Array):
        return da.from_array(value, chunks=tuple(chunks.values())), cut
    known = {a: sizes for a, sizes in chunks.items() if not np.isnan(value.shape[a])}
    return value.rechunk(known), cut


def _example(x: _Blocks, value: Any, axes: tuple[int, ...], empty: int) -> Array:
    """An ndarray like an operand, or x itself, without values: of length 0 along axis `empty` of x."""
    known = [0 if np.isnan(n) else int(n) for n in value.shape]
    whole = [a == empty and n in (0, x.shape[a]) for a, n in zip(axes, known, strict=True)]
    shape = [0 if none else n for none, n in zip(whole, known, strict=True)]
    if isinstance(value, np.ndarray):
        return value[tuple(slice(0, n) for n in shape)]
    return _native(np.zeros(shape, value.dtype))


def _tried(
    function: Callable[..., Any], x: _Blocks, channels: tuple[int, ...], operands: Mapping[str, Operand]
) -> Any:
    """`function` of x and its operands without values: what is wrong with them is wrong with all blocks."""
    empty = next(a for a in range(x.ndim) if a not in channels)
    like = {name: _example(x, *operand, empty) for name, operand in operands.items()}
    none = _example(x, x, tuple(range(x.ndim)), empty)
    try:
        return function(none, **like)
    except (TypeError, ValueError) as error:
        text = str(error).replace(str(none.shape), str(x.shape))
        for name, (value, _) in operands.items():
            text = text.replace(str(like[name].shape), str(value.shape))
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from None


# ---- blocks ------------------------------------------------------------------------------------------------


def _blockwise(
    function: Callable[..., Any], x: _Blocks, channels: tuple[int, ...], operands: Mapping[str, Operand],
    aligned: Mapping[str, tuple[_Blocks, tuple[int, ...]]], of: str, **how: Any,
) -> _Blocks:  # fmt: skip
    """`function` of each block and of the operands' parts for it."""
    axes = {name: (operands[name][1], cut) for name, (_, cut) in aligned.items()}
    arrays = [array for array, _ in aligned.values()]
    call = partial(_call_with_parts, function, {a: x.chunks[a] for a in channels}, axes, of)
    return da.map_blocks(call, x, *arrays, token="batchnorm", **how)


def _call_with_parts(
    function: Callable[..., Any], chunks: Mapping[int, tuple[int, ...]],
    axes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], of: str, x: Any, *operands: Any,
    block_id: Any,
) -> Any:  # fmt: skip
    with naming(f"block {block_id} of {of}, of shape {x.shape}"):
        for a, sizes in chunks.items():
            if x.ndim <= a or x.shape[a] != sizes[block_id[a]]:
                use = "pass chunks= to the map_blocks that made it"
                raise ValueError(f"expected {sizes[block_id[a]]} along axis {a} as its chunks say; {use}")
        parts = {}
        for (name, (covered, cut)), value in zip(axes.items(), operands, strict=True):
            for a in cut:
                if value.shape[a] != x.shape[a]:
                    got = f"{name} has length {value.shape[a]} along axis {a} there"
                    raise ValueError(f"{got}, expected {x.shape[a]}, as {of} has")
            if x.size:
                value = value[tuple(slice(None) if a in covered else 0 for a in range(x.ndim))]
                parts[name] = value.transpose(np.argsort(np.argsort(covered)))
        return function(_native(x), **parts)


def _native(x: Array) -> Array:
    """x, of a dtype that says "=" of the machine's byte order; zarr 3 makes those that say "<" or ">"."""
    return x.view(x.dtype.newbyteorder("=")) if x.dtype.isnative and x.dtype.byteorder in "<>" else x


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors say of what part of the data they are."""
    try:
        yield
    except Exception as error:
        of = type(error)
        plain = of.__module__ == "builtins" and issubclass(of, OSError)
        if plain or of in (TypeError, ValueError, MemoryError):
            raise of(f"{what}: {error}") from error
        if isinstance(error, OSError):
            raise OSError(f"{what}: {of.__name__}: {error}") from error
        raise RuntimeError(f"{what}: {of.__name__}: {error}") from error


def merged_blocks(
    x: _Blocks, channels: tuple[int, ...], of_block: Callable[..., Any],
    merged: Callable[[Iterable[Any]], Any], operands: Mapping[str, Operand], *, empty: Any, of: str,
    check: bool, advance: Callable[[int], object] = idle,
) -> Any:  # fmt: skip
    """What `of_block` makes of each block, merged in a tree over all but the channel axes.

    An array of objects, one for each block of channels. `empty` is of a block without values. With `check`,
    `of_block` is first called without values, for errors before anything is computed.
    """
    aligned = {name: _aligned(name, operand, x, of) for name, operand in operands.items()}
    if check:
        _tried(of_block, x, channels, operands)
    ones = tuple((1,) * n for n in x.numblocks)
    meta = np.empty((0,) * x.ndim, object)
    how = {"dtype": object, "meta": meta, "chunks": ones}
    cells = _blockwise(partial(_cell, of_block, empty), x, channels, operands, aligned, of, **how)
    others = tuple(a for a in range(x.ndim) if a not in channels)
    merge = partial(_merged_cells, merged)
    with _watched(cells, x.npartitions, advance) as cells:
        tree = da.reduction(
            cells, _same, merge, combine=merge, axis=others, dtype=object, concatenate=True,
            meta=np.empty((0,) * len(channels), object), name="batchnorm-moments",
        )  # fmt: skip
        return np.asarray(tree.compute(), object)


def _cell(of_block: Callable[..., Any], empty: Any, x: Any, **operands: Any) -> Any:
    cell = np.empty((1,) * x.ndim, object)
    cell[(0,) * x.ndim] = of_block(x, **operands) if x.size else empty
    return cell


def _same(cells: Any, axis: Any, keepdims: bool) -> Any:
    return cells


def _merged_cells(merged: Callable[[Iterable[Any]], Any], cells: Any, axis: Any, keepdims: bool) -> Any:
    kept = [a for a in range(cells.ndim) if a not in axis]
    rows = cells.transpose(*kept, *axis).reshape(*(cells.shape[a] for a in kept), -1)
    found = np.empty(rows.shape[:-1], object)
    for place in np.ndindex(found.shape):
        found[place] = merged(rows[place])
    return np.expand_dims(found, tuple(axis)) if keepdims else found


def merged_partitions(
    bag: Any, of_elements: Callable[[Iterable[Any]], Any], merged: Callable[[Iterable[Any]], Any],
    advance: Callable[[int], object],
) -> Any:  # fmt: skip
    """What `of_elements` makes of each partition of a dask bag, merged in a tree."""
    with _watched(bag.map_partitions(partial(_partition, of_elements)), bag.npartitions, advance) as parts:
        return parts.reduction(_only, merged).compute()


def _partition(of_elements: Callable[[Iterable[Any]], Any], elements: Iterable[Any]) -> list[Any]:
    return [of_elements(elements)]


def _only(partition: Iterable[Any]) -> Any:
    return next(iter(partition))


@contextlib.contextmanager
def _watched(parts: Any, n: int, advance: Callable[[int], object]) -> Iterator[Any]:
    """`parts`, a dask collection, to compute with, while `advance` is told of n parts as they are done."""
    get = getattr(dask.base.get_scheduler(collections=[parts]), "__self__", None)
    distributed = sys.modules.get("distributed")
    if advance is idle:
        yield parts
    elif distributed is not None and isinstance(get, distributed.Client):
        parts = parts.persist()
        for future in distributed.futures_of(parts):
            future.add_done_callback(lambda _: advance(1))
        yield parts
    else:
        done, total, told = 0, 1, 0

        def start(_: Any, state: Any) -> None:
            nonlocal total
            total = len(state["waiting"]) + len(state["ready"])

        def step(*_: Any) -> None:
            nonlocal done, told
            done += 1
            due = done * n // total
            advance(due - told)
            told = due

        with Callback(start_state=start, posttask=step):
            yield parts


# ---- functions of each block -------------------------------------------------------------------------------


def mapped(
    x: _Blocks, channels: tuple[int, ...], function: Callable[..., Array], operands: Mapping[str, Operand],
    order: tuple[int, ...],
) -> _Blocks:  # fmt: skip
    """`function` of each block, lazily; axis i of the result is axis ``order[i]`` of x."""
    aligned = {name: _aligned(name, operand, x, "x") for name, operand in operands.items()}
    dtype = _tried(function, x, channels, operands).dtype
    back = tuple(np.argsort(order).tolist())
    how = {"dtype": dtype, "chunks": x.chunks, "meta": np.empty((0,) * x.ndim, dtype)}
    turned = partial(_turned, function, dtype, back)
    return _blockwise(turned, x, channels, operands, aligned, "x", **how).transpose(order)


def _turned(
    function: Callable[..., Array], dtype: Any, order: tuple[int, ...], x: Array, **operands: Any
) -> Array:
    return function(x, **operands).transpose(order) if x.size else np.empty(x.shape, dtype)


@_core.entrance
def batch_norm(
    x: Any, mean: Array, var: Array, gamma: Array | None = None, beta: Array | None = None, *,
    eps: float = 1e-5, channel_axis: ChannelAxis = _FIRST, data_format: DataFormatName | None = None,
    activation: ActivationName | None = None, slope: float | None = None, residual: Any = None,
    mask: Mask | None = None, lengths: Array | None = None, lengths_axis: int | None = None,
    dtype: DTypeLike | None = None, out_format: DataFormatName | None = None, num_threads: int | None = None,
) -> Any:  # fmt: skip
    """Inference of a Dask array, lazily: :func:`batchnorm.batch_norm` of each block.

    Parameters
    ----------
    x : dask array of float32, float64, float16 or bfloat16, at least 2 dimensions
        Blocks of any shape, of unknown lengths too, but not along the channels. Or images of uint8, int16 or
        uint16. Or an array of xarray that holds a dask array.
    mean, var : array of float32 or float64, shape (C,)
        Statistics per channel, such as :func:`batchnorm.moments` returns them. Finite; ``var >= 0``.
    gamma, beta : array of float32 or float64, shape (C,) or (N, C), optional
        Scale and shift.
    eps : float, default 1e-5
        As in :func:`batchnorm.batch_norm`, and so are the others.
    channel_axis : int or tuple of int, default 1
        As there.
    data_format : str, optional
        As there.
    activation : {None, "relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"}
        As there.
    slope : float, optional
        As there.
    residual : dask array like the result, optional
        Added before the activation.
    mask, lengths : array or dask array, optional
        As there. With ``lengths`` the steps are in one block.
    lengths_axis : int, optional
        As there.
    dtype : dtype, optional
        As there.
    out_format : str, optional
        As there.
    num_threads : int, optional
        Threads of each task; absent means 1, as the scheduler shares out the processors.

    Returns
    -------
    dask array of x's dtype, shape and blocks
        Of integer ``x``, of ``dtype`` and ``out_format``. The values are the same bits as those of
        :func:`batchnorm.batch_norm`, whatever the blocks.

    Raises
    ------
    TypeError, ValueError
        As there, at once where shapes, dtypes or values per channel are wrong. What is wrong with values of a
        mask or lengths is said by the task, with its block.

    Examples
    --------
    >>> import dask.array as da, numpy as np, batchnorm.dask
    >>> x = da.ones((8, 64, 32, 32), chunks=(2, 32, 32, 32), dtype=np.float32)
    >>> y = batchnorm.dask.batch_norm(x, np.zeros(64), np.ones(64), activation="relu")
    >>> y.shape, y.dtype, y.numblocks
    ((8, 64, 32, 32), dtype('float32'), (4, 2, 1, 1))
    """
    x = blocks_of("x", x)
    where = Settings(channel_axis=channel_axis, data_format=data_format).where
    channels = channels_of(x, where)
    operands: dict[str, Operand] = {}
    for name, value in (("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta)):
        if value is not None:
            value = _array("an array of float32 or float64, one value per channel", name, value, True)
            value = value.copy() if isinstance(value, np.ndarray) else value  # it is read later
            each = name in ("gamma", "beta") and value.ndim == len(channels) + 1 and 0 not in channels
            axes = (0, *channels) if each else channels
            if value.ndim != len(axes):
                shape = tuple(x.shape[a] for a in channels)
                raise ValueError(f"{name} has shape {value.shape}, expected {shape}, one value per channel")
            operands[name] = value, axes
    order = tuple(range(x.ndim))
    if out_format is not None:
        last = Settings(data_format=out_format).channel_axis == -1
        rest = [a for a in order if a not in channels]
        order = (*rest, *channels) if last else (rest[0], *channels, *rest[1:])
    if residual is not None:
        operands["residual"] = _array("a dask array like the result", "residual", residual), order
    operands |= positions_of(x, channels, mask=mask, lengths=lengths, lengths_axis=lengths_axis)
    options: dict[str, Any] = {"activation": activation, "slope": slope, "lengths_axis": lengths_axis}
    options |= {"eps": eps, "dtype": dtype, "out_format": out_format}
    options |= {"num_threads": per_task(num_threads)}
    given = {name: value for name, value in options.items() if value is not None}
    return mapped(x, channels, partial(functional.batch_norm, **where, **given), operands, order)
