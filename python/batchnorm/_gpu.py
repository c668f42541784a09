"""The operations on arrays of a GPU, by the extension ``_cuda``: PyTorch's, CuPy's, and those of any library
that speaks DLPack or has ``__cuda_array_interface__``.

``_core`` hands over a call in which it meets such an array. A `Place` is where the call works: a device, a
stream, and the library that makes the results. The extension sees each array as a shadow, an ndarray with its
address, shape and strides whose ``base`` is the array.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, NoReturn

import numpy as np

from ._arrays import gpu_extension, on_gpu, refuse_gradient
from ._hints import kind
from .functional import (
    DoubleGradients,
    Gradients,
    Saved,
    TrainResult,
    batch_norm,
    batch_norm_backward,
    batch_norm_double_backward,
    batch_norm_train,
)
from .running import update_running

_cuda: Any = gpu_extension()
if _cuda is None:
    raise ImportError("this build of batchnorm has no GPU extension; build it with BATCHNORM_CUDA=ON")

_cuda.use_results(TrainResult, Gradients, DoubleGradients)
_OPERATIONS: dict[str, Any] = {
    "batch_norm": batch_norm, "batch_norm_train": batch_norm_train, "saved_of": Saved.of,
    "batch_norm_backward": batch_norm_backward, "batch_norm_double_backward": batch_norm_double_backward,
    "update_running": update_running,
}  # fmt: skip
for _name, _operation in _OPERATIONS.items():
    _cuda.serve(_name, _operation.__wrapped__)

_WRITTEN = "out", "out_residual", "running_mean", "running_var"
_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16",
           "float32", "float64", "bfloat16")  # fmt: skip
_numpy_dtypes: dict[Any, Any] = {}  # of PyTorch's, as they are met; and back
_torch_dtypes: dict[Any, Any] = {}
_PLAIN = str, int, float, tuple
_version = attrgetter("_version")  # of a tensor: how often it was changed in place
_LEGACY_STREAM = 1  # CUDA's name for the default stream


def call(operation: str, given: dict[str, Any]) -> Any:
    """An operation of ``_core`` with these arguments, some of which are a GPU's."""
    (name, first), *_ = given.items()
    if not on_gpu(first):
        other, value = next((n, v) for n, v in given.items() if on_gpu(v))
        where, use = f"{name} is on the CPU and {other}, {kind(value)}, on a GPU", f"; use {other}.cpu()"
        raise TypeError(f"{where}, expected all arrays in one place{use if hasattr(value, 'cpu') else ''}")
    place = _place(name, first)
    shadows = {word: place.taken_in(word, value, name) for word, value in given.items()}
    with place.current():
        result = _cuda.run(place, operation, shadows)
        place.written(_written(given))
        return _unwrapped(place, result)


def _written(given: dict[str, Any]) -> Iterator[Any]:
    """The caller's arrays that a call has written to."""
    for name in _WRITTEN:
        if given.get(name) is not None:
            yield given[name]
    renorm = given.get("renorm")
    if renorm not in (None, False, True) and renorm.get("decay") is not None:
        yield from (renorm["mean"], renorm["std"])


def _unwrapped(place: Place, result: Any) -> Any:
    if isinstance(result, _cuda.Shadow):
        return place.result(result.base)
    if not isinstance(result, tuple):
        return result
    values = [_unwrapped(place, value) for value in result]
    if not hasattr(result, "_fields"):
        return tuple(values)
    named = type(result)(*values)
    if (dresidual := vars(result).get("dresidual") if hasattr(result, "__dict__") else None) is not None:
        named.dresidual = place.result(dresidual.base)  # type: ignore[attr-defined]
    return named


def _place(name: str, first: Any) -> Place:
    """Where a call of this first argument works."""
    for library, of in (("torch", Torch), ("cupy", Cupy)):
        module = sys.modules.get(library)
        if module is not None and isinstance(first, of.kind(module)):
            return of(module, first)
    return Other(name, first)


class Place:
    """A device and a stream, and arrays of one library there. ``_cuda`` calls all but the first methods."""

    device: int
    stream: int

    def current(self) -> AbstractContextManager[Any]:
        """In which the library's own calls go to the device."""
        return nullcontext()

    def taken_in(self, name: str, value: Any, first: str) -> Any:
        """An argument as the extension takes it: a shadow of an array, anything else as it is."""
        if value is None or isinstance(value, _PLAIN):
            return value
        if self.has(value):
            refuse_gradient(name, value)
            return self.shadow(name, value)
        if name == "renorm" and hasattr(value, "items"):
            return {key: self.taken_in(f"renorm {key}", v, first) for key, v in value.items()}
        if name == "saved":
            return self._checked_saved(value, first)
        if on_gpu(value):
            self._refuse(name, value, first)
        of_cpu = isinstance(value, np.ndarray) or hasattr(value, "__dlpack__") or hasattr(value, "__array__")
        if of_cpu and not isinstance(value, np.generic) and name not in ("lengths", "dtype"):
            got = f"{name} is {kind(value)} on the CPU and {first} is on {self}"
            raise TypeError(f"{got}, expected an array there; use {self.remedy(name, first)}")
        return value

    def _refuse(self, name: str, value: Any, first: str) -> NoReturn:
        """Raise for an array of another device or library."""
        got = f"{name} is {kind(value)}"
        if (other := _place(name, value)).library != self.library:
            raise TypeError(f"{got} and {first} is {self.library}'s, expected arrays of one library")
        got = f"{got} on {other} and {first} is on {self}"
        raise ValueError(f"{got}, expected arrays on one device; use {self.remedy(name, first)}")

    def _checked_saved(self, saved: Any, first: str) -> Any:
        if isinstance(saved, Saved):
            got = f"saved is that of a forward on the CPU and {first} is on {self}"
            raise TypeError(f"{got}, expected the Saved of a forward there")
        if isinstance(saved, _cuda.Saved):
            of = _cuda.place_of(saved)
            if type(of) is not type(self) or of.device != self.device:
                got = f"saved is that of a forward with arrays of {of.library} on {of}"
                raise ValueError(f"{got}, expected one of {self.library} on {self}, as {first} is")
        return saved

    def __str__(self) -> str:
        return f"cuda:{self.device}"

    @property
    def library(self) -> str:
        """Its name."""
        return type(self).__name__.lower()

    def remedy(self, name: str, first: str) -> str:
        """What makes an array one of this place."""
        raise NotImplementedError

    def has(self, value: Any) -> bool:
        """Whether it is an array of the library on the device."""
        raise NotImplementedError

    def shadow(self, name: str, value: Any) -> Any:
        """The array as the extension sees it."""
        raise NotImplementedError

    def result(self, array: Any) -> Any:
        """What the caller gets for an array."""
        return array

    def written(self, arrays: Iterator[Any]) -> None:
        """Notes that arrays were written to."""

    def mark(self, shadow: Any) -> tuple[int, int]:
        """What changes when the array is overwritten by its library, or moved."""
        return 0, 0


def bfloat16() -> Any:
    """NumPy's dtype of it."""
    try:
        import ml_dtypes
    except ImportError:
        needs = 'bfloat16 needs ml_dtypes: pip install "batchnorm[bf16]"'
        raise ImportError(needs) from None
    return np.dtype(ml_dtypes.bfloat16)


class Torch(Place):
    """PyTorch's tensors."""

    @staticmethod
    def kind(torch: Any) -> Any:
        """Its type of arrays."""
        return torch.Tensor

    def __init__(self, torch: Any, x: Any) -> None:
        if x.is_cuda and _cuda.runtime() == "rehearsal":
            got = "this build of batchnorm rehearses GPUs on the CPU and cannot reach one"
            raise TypeError(f"{got}; build it with BATCHNORM_CUDA=ON, or use x.cpu()")
        self.torch, self.where = torch, x.device
        self.device = x.device.index or 0
        self.stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0

    def remedy(self, name: str, first: str) -> str:
        """Torch's own way."""
        return f"torch.as_tensor({name}, device={first}.device)"

    def has(self, value: Any) -> bool:
        """Whether it is a tensor on the device."""
        return isinstance(value, self.torch.Tensor) and value.device == self.where

    def shadow(self, name: str, value: Any) -> Any:
        """The tensor's memory."""
        if value.layout is not self.torch.strided:
            raise TypeError(f"{name} is a tensor of layout {value.layout}, expected torch.strided")
        return self._shadow(value, _numpy_dtypes.get(value.dtype) or self._numpy_dtype(name, value))

    def _shadow(self, tensor: Any, dtype: Any) -> Any:
        stride = tensor.stride()
        return _cuda.shadow(tensor, tensor.data_ptr(), tensor.shape, stride, dtype.itemsize, dtype, True)

    def _numpy_dtype(self, name: str, tensor: Any) -> Any:
        word = str(tensor.dtype).removeprefix("torch.")
        if word in _DTYPES:
            dtype = bfloat16() if word == "bfloat16" else np.dtype(word)
            _numpy_dtypes[tensor.dtype], _torch_dtypes[dtype] = dtype, tensor.dtype
            return dtype
        expected = "float32, float64, float16 or bfloat16"
        raise TypeError(f"{name} has dtype {word}, expected {expected}; use {name}.float()")

    def _dtype(self, dtype: Any) -> Any:
        return _torch_dtypes.get(dtype) or getattr(self.torch, dtype.name)

    def empty(self, shape: Any, dtype: Any, strides: Any) -> Any:
        """A new array with these strides in bytes."""
        steps = [stride // dtype.itemsize for stride in strides]
        made = self.torch.empty_strided(shape, steps, dtype=self._dtype(dtype), device=self.where)
        return self._shadow(made, dtype)

    def block(self, size: int) -> tuple[Any, int]:
        """So many bytes, and their address."""
        made = self.torch.empty(size, dtype=self.torch.uint8, device=self.where)
        return made, made.data_ptr()

    def view(self, block: Any, offset: int, shape: Any, dtype: Any) -> Any:
        """An array in a block."""
        return block[offset : offset + math.prod(shape) * dtype.itemsize].view(self._dtype(dtype)).view(shape)

    def copy(self, to: Any, values: Any) -> None:
        """numpy.copyto"""
        to.base.copy_(values.base)

    def packed(self, values: Any, shape: Any, steps: Any, dtype: Any) -> Any:
        """Elements `steps` bytes apart, side by side."""
        tensor = values.base
        steps = [step // tensor.element_size() for step in steps]
        seen = tensor.as_strided(shape, steps, tensor.storage_offset())
        return self._shadow(seen.to(self._dtype(dtype)).contiguous(), dtype)

    def number(self, value: float) -> Any:
        """One float64."""
        made = self.torch.full((1,), value, dtype=self.torch.float64, device=self.where)
        return self._shadow(made, np.dtype(np.float64))

    def steps(self, lengths: Any, steps: int) -> Any:
        """Which of so many steps count."""
        if isinstance(lengths, _cuda.Shadow):
            made = self.torch.arange(steps, device=self.where) < lengths.base[:, None]
        else:
            made = self.torch.from_numpy(np.arange(steps) < lengths[:, None]).to(self.where)
        return self._shadow(made, np.dtype(np.bool_))

    def written(self, arrays: Iterator[Any]) -> None:
        """For autograd."""
        for tensor in arrays:
            if not tensor.is_inference():
                self.torch.autograd.graph.increment_version(tensor)

    def mark(self, shadow: Any) -> tuple[int, int]:
        """Version and address."""
        tensor = shadow.base
        return 0 if tensor.is_inference() else _version(tensor), tensor.data_ptr()


class Cupy(Place):
    """CuPy's arrays."""

    @staticmethod
    def kind(cupy: Any) -> Any:
        """Its type of arrays."""
        return cupy.ndarray

    def __init__(self, cupy: Any, x: Any) -> None:
        self.cupy, self.device = cupy, x.device.id
        with self.current():
            self.stream = cupy.cuda.get_current_stream().ptr

    def current(self) -> AbstractContextManager[Any]:
        """CuPy allocates on the current device."""
        return self.cupy.cuda.Device(self.device)  # type: ignore[no-any-return]

    def remedy(self, name: str, first: str) -> str:
        """CuPy's own way."""
        return f"cupy.asarray({name}), with {first}.device current"

    def has(self, value: Any) -> bool:
        """Whether it is CuPy's and on the device."""
        return isinstance(value, self.cupy.ndarray) and value.device.id == self.device

    def shadow(self, name: str, value: Any) -> Any:
        """The array's memory."""
        return _cuda.shadow(value, value.data.ptr, value.shape, value.strides, 1, value.dtype, True)

    def empty(self, shape: Any, dtype: Any, strides: Any) -> Any:
        """A new array with these strides."""
        memory = self.cupy.cuda.alloc(math.prod(shape) * dtype.itemsize)
        return self.shadow("", self.cupy.ndarray(shape, dtype, memory, strides))

    def block(self, size: int) -> tuple[Any, int]:
        """So many bytes, and their address."""
        made = self.cupy.cuda.alloc(size)
        return made, made.ptr

    def view(self, block: Any, offset: int, shape: Any, dtype: Any) -> Any:
        """An array in a block."""
        return self.cupy.ndarray(shape, dtype, block + offset)

    def copy(self, to: Any, values: Any) -> None:
        """numpy.copyto"""
        self.cupy.copyto(to.base, values.base)

    def packed(self, values: Any, shape: Any, steps: Any, dtype: Any) -> Any:
        """Elements `steps` bytes apart, side by side."""
        seen = self.cupy.lib.stride_tricks.as_strided(values.base, shape, steps)
        return self.shadow("", seen.astype(dtype, order="C"))

    def number(self, value: float) -> Any:
        """One float64."""
        return self.shadow("", self.cupy.full(1, value, np.float64))

    def steps(self, lengths: Any, steps: int) -> Any:
        """Which of so many steps count."""
        if isinstance(lengths, _cuda.Shadow):
            return self.shadow("", self.cupy.arange(steps) < lengths.base[:, None])
        return self.shadow("", self.cupy.asarray(np.arange(steps) < lengths[:, None]))


# ---- whatever speaks a protocol ----------------------------------------------------------------------------

_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}  # DLDataTypeCode
_BFLOAT16 = 4


def _strides(shape: Any, dtype: Any) -> list[int]:
    """Strides in bytes of an array without gaps."""
    return [dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]


class GpuArray:
    """A result for a library that cannot take one over: by either protocol another library can.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    strides : tuple of int
        In bytes.
    """

    uploaded: Any

    def __init__(self, block: Any, offset: int, shape: Any, dtype: Any, strides: Any, place: Other) -> None:
        self._block, self._offset, self._place = block, offset, place
        self._pointer = block.pointer + offset
        self.shape, self.dtype, self.strides = tuple(shape), dtype, tuple(strides)

    def reshape(self, shape: Any) -> GpuArray:
        """The same values in another shape; of arrays without gaps."""
        return GpuArray(
            self._block, self._offset, shape, self.dtype, _strides(shape, self.dtype), self._place
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self._block.shared = True
        typestr = "<V2" if self.dtype.name == "bfloat16" else self.dtype.str
        stream = {"stream": self._place.stream or _LEGACY_STREAM}
        data = {"data": (self._pointer, False), "strides": self.strides, "version": 3}
        return {"shape": self.shape, "typestr": typestr, **data, **stream}

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._place.device

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        self._block.shared = True
        if stream != -1 and (stream or _LEGACY_STREAM) != (self._place.stream or _LEGACY_STREAM):
            _cuda.wait_for(stream or _LEGACY_STREAM, self._place.stream)
        code = _BFLOAT16 if self.dtype.name == "bfloat16" else _CODES[self.dtype.kind]
        dtype, size = (code, self.dtype.itemsize * 8), self.dtype.itemsize
        strides = [stride // size for stride in self.strides]
        return _cuda.make_capsule(self, self._pointer, self.shape, strides, dtype, (2, self._place.device))


class _Seen:
    """Another library's array, what keeps its memory, and the argument that it is."""

    def __init__(self, array: Any, keeper: Any, name: str) -> None:
        self.array, self.keeper, self.name = array, keeper, name


class Other(Place):
    """Arrays of any other library."""

    def __init__(self, name: str, x: Any) -> None:
        interface = None if hasattr(x, "__dlpack__") else x.__cuda_array_interface__
        self.stream = (interface or {}).get("stream") or _LEGACY_STREAM
        self.device = self.device_of(x)
        space = getattr(x, "__array_namespace__", None)
        self._namespace = None if space is None else space()
        self._name = type(x).__module__.split(".")[0]
        self._mutable = self._name not in ("jax", "jaxlib")

    @property
    def library(self) -> str:
        """Its name."""
        return self._name

    def remedy(self, name: str, first: str) -> str:
        """Theirs is not known here."""
        return f"a copy of {name} made there"

    def has(self, value: Any) -> bool:
        """Whether it speaks a protocol and is on the device."""
        return on_gpu(value) and self.device_of(value) == self.device

    def device_of(self, value: Any) -> int:
        """The index of its device."""
        if hasattr(value, "__dlpack_device__"):
            return int(value.__dlpack_device__()[1])
        return int(_cuda.device_of(value.__cuda_array_interface__["data"][0]))

    def shadow(self, name: str, value: Any) -> Any:
        """The array's memory, once its library has made it."""
        if not self._mutable and name.split()[0] in (*_WRITTEN, "renorm"):
            raise TypeError(f"{name} is {kind(value)}, which is not changed in place, expected no {name}")
        if hasattr(value, "__dlpack__"):
            capsule = value.__dlpack__(stream=self.stream)
            keeper, pointer, shape, strides, (code, bits), _ = _cuda.read_capsule(capsule)
            word = {v: k for k, v in _CODES.items()}.get(code, "V")
            dtype = bfloat16() if code == _BFLOAT16 else np.dtype(f"{word}{bits // 8}")
            seen = _Seen(value, keeper, name)
            return _cuda.shadow(seen, pointer, shape, strides, dtype.itemsize, dtype, self._mutable)
        of = value.__cuda_array_interface__
        if of.get("stream") not in (None, self.stream):
            _cuda.wait_for(self.stream, of["stream"])
        pointer, read_only = of["data"]
        dtype, shape = np.dtype(of["typestr"]), of["shape"]
        strides = of.get("strides") or _strides(shape, dtype)
        return _cuda.shadow(_Seen(value, None, name), pointer, shape, strides, 1, dtype, not read_only)

    def result(self, array: Any) -> Any:
        """The caller's own, or a new one of its kind."""
        if isinstance(array, _Seen):
            return array.array
        return array if self._namespace is None else self._namespace.from_dlpack(array)

    def _shadow(self, array: GpuArray) -> Any:
        return _cuda.shadow(array, array._pointer, array.shape, array.strides, 1, array.dtype, True)

    def _new(self, shape: Any, dtype: Any, strides: Any) -> GpuArray:
        block = _cuda.Block(math.prod(shape) * dtype.itemsize, self.device, self.stream)
        return GpuArray(block, 0, shape, dtype, strides, self)

    def empty(self, shape: Any, dtype: Any, strides: Any) -> Any:
        """A new array with these strides."""
        return self._shadow(self._new(shape, dtype, strides))

    def block(self, size: int) -> tuple[Any, int]:
        """So many bytes, and their address."""
        made = _cuda.Block(size, self.device, self.stream)
        return made, made.pointer

    def view(self, block: Any, offset: int, shape: Any, dtype: Any) -> Any:
        """An array in a block."""
        return self.result(GpuArray(block, offset, shape, dtype, _strides(shape, dtype), self))

    def _uploaded(self, values: Any) -> Any:
        made = self._new(values.shape, values.dtype, values.strides)
        made.uploaded = values
        _cuda.upload(made._pointer, values.tobytes(), self.stream)
        return self._shadow(made)

    def copy(self, to: Any, values: Any) -> None:
        """That is not known of this library."""
        name = values.base.name
        got = (
            f"{name} has dtype {values.dtype} and strides {values.strides}, and would have to be copied first"
        )
        expected = "which is done for PyTorch and CuPy alone, expected an array in the memory order of x"
        dtype = " and of float64" if name == "weights" else ""
        raise TypeError(f"{got}, {expected}, without gaps{dtype}; pass a contiguous one")

    def packed(self, values: Any, shape: Any, steps: Any, dtype: Any) -> Any:
        """Of what has come from the CPU; nothing else is known of this library."""
        if isinstance(values.base, _Seen):
            self.copy(shape, values)
        seen = np.lib.stride_tricks.as_strided(values.base.uploaded, shape, steps)
        return self._uploaded(np.ascontiguousarray(seen, dtype))

    def number(self, value: float) -> Any:
        """One float64."""
        return self._uploaded(np.array([value]))

    def steps(self, lengths: Any, steps: int) -> Any:
        """Which of so many steps count."""
        if isinstance(lengths, _cuda.Shadow):
            raise TypeError(f"lengths is {kind(lengths.base.array)} on {self}, expected ints on the CPU")
        return self._uploaded(np.arange(steps) < lengths[:, None])
