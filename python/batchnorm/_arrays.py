"""Arrays of other libraries as NumPy's: what is only read may come from anywhere, mostly without a copy.

The extension asks for it where an argument is no ndarray. What is written to, ``out`` and running
statistics, is never converted. Arrays of a GPU are left to the extension that serves them, if it was built.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np

from ._hints import kind

_CPU = (1, 3)  # DLDeviceType: kDLCPU, kDLCUDAHost
_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 14: "oneAPI"}


@functools.cache
def gpu_extension() -> ModuleType | None:
    """``batchnorm._cuda``, or None in a build without."""
    try:
        return importlib.import_module("batchnorm._cuda")
    except ModuleNotFoundError:
        return None


def on_gpu(value: Any) -> bool:
    """Whether it is an array of a GPU that this build serves."""
    if gpu_extension() is None or isinstance(value, np.ndarray):
        return False
    if not hasattr(value, "__dlpack_device__"):
        return hasattr(value, "__cuda_array_interface__")
    try:
        return value.__dlpack_device__()[0] in _CUDA
    except (ValueError, RuntimeError):  # torch's device "meta"
        return False


def taken_in(name: str, value: Any, is_vector: bool) -> Any:
    """`value` as an ndarray, as `as_array`; NotImplemented for one of a GPU."""
    return NotImplemented if on_gpu(value) else as_array(name, value, is_vector)


def refuse_gradient(name: str, value: Any) -> None:
    """Raise for a tensor that wants a gradient, which the functions would not give it."""
    if getattr(value, "requires_grad", False):
        got = f"{name} is {kind(value)} that requires a gradient, which ends here"
        raise TypeError(f"{got}, expected an array without; use {name}.detach(), or batchnorm.torch")


def as_array(name: str, value: Any, is_vector: bool) -> Any:
    """`value` as an ndarray; itself where that is not how it is meant, for an error of who asks.

    By ``__dlpack__``, or by what ``numpy.asarray`` knows: buffers, ``__array_interface__``, ``__array__``.
    Lists and tuples of numbers only where `is_vector`, for one value per channel or position. Masked arrays
    stay such.
    """
    if isinstance(value, np.ndarray | np.generic | str | bytes | bool | int | float):
        return value
    if is_vector and isinstance(value, list | tuple):
        return _of_sequence(name, value)
    readable = "an array of float32, float64, float16 or bfloat16"
    if not is_vector and dask_of(value) is not None:
        got = f"{name} is {kind(value)}, which is lazy, expected {readable}; use {name}.compute(), or"
        raise TypeError(f"{got} moments, dataset_moments and batchnorm.dask.batch_norm, which take Dask's")
    if hasattr(value, "__dlpack_device__"):
        try:
            device = int(value.__dlpack_device__()[0])
        except (ValueError, RuntimeError) as error:  # torch's device "meta"
            raise TypeError(
                f"{name} is {kind(value)} without values ({error}), expected {readable}"
            ) from error
        if device not in _CPU:
            where = f"{name} is {kind(value)} on a device of {_DEVICES.get(device, f'type {device}')}"
            wants = "" if device in _CUDA and gpu_extension() else ", which wants the CUDA build"
            remedy = "" if wants else "; batch_norm_train and the modules of batchnorm.torch take it there"
            raise TypeError(f"{where}{wants}, expected an array on the CPU{remedy}")
        refuse_gradient(name, value)
        if hasattr(value, "resolve_neg"):  # torch's sign of a view, which DLPack does not carry
            value = value.resolve_neg()
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError):  # bfloat16, which DLPack knows and NumPy does not
            if not hasattr(value, "__array__"):
                return value
    elif not (hasattr(value, "__array__") or hasattr(value, "__array_interface__") or _has_buffer(value)):
        return value
    try:
        array = np.asanyarray(value)
        return array if is_masked(array) else np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:
        use = f"; use {name}.float()" * ("bfloat16" in str(error).lower())
        got = f"{name} is {kind(value)}, which NumPy cannot read ({error})"
        raise TypeError(f"{got}, expected {readable}{use}") from error


def is_masked(value: Any) -> bool:
    """Whether it is a masked array, without importing ``numpy.ma``: who has made one, has it."""
    return "numpy.ma" in sys.modules and isinstance(value, np.ma.MaskedArray)


def dask_of(value: Any) -> Any:
    """The Dask collection that a value is, or that an array of xarray holds; None of other things."""
    if type(value) is np.ndarray or not hasattr(type(value), "__dask_graph__"):
        return None
    libraries = {of.__module__.partition(".")[0] for of in type(value).__mro__}
    if "xarray" in libraries and isinstance(getattr(value, "chunks", None), tuple):
        return dask_of(value.data)
    return value if "dask" in libraries else None


def per_task(num_threads: int | None) -> int:
    """Threads of a task: one if nobody says more, as Dask's scheduler shares out the processors."""
    return 1 if num_threads is None else num_threads


def _has_buffer(value: Any) -> bool:
    try:
        memoryview(value).release()
    except TypeError:
        return False
    return True


def _of_sequence(name: str, value: Any) -> Any:
    try:
        array = np.asarray(value)
    except ValueError:  # of several lengths
        return value
    if array.dtype.kind not in "biuf" or array.dtype == np.longdouble:
        return value
    return array.astype(np.float64) if array.dtype.kind in "iu" and name != "lengths" else array
