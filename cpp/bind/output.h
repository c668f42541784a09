// New arrays: results, copies, and views of vectors that a Saved holds. Knows no operation.
#pragma once

#include "bind/ndarray.h"

namespace batchnorm::bind {

// All of these give plain ndarrays that own their data. Large ones get it from core/memory.h and return it there when they die, unless the
// program has a NumPy memory handler of its own in force, which is then used. They throw Python's error if there is no memory.

// numpy.empty_like(x), in another dtype if one is given (borrowed).
py::object new_like(const Array& x, PyObject* dtype = nullptr);
// numpy.empty(shape, dtype), or with these strides in bytes, which reach every element once.
py::object new_array(std::span<const py::ssize_t> shape, PyObject* dtype, const py::ssize_t* strides = nullptr);
// numpy.copyto(to, from)
void copy_into(const py::object& to, PyObject* from);

// A read-only array of memory that `owner` holds.
py::object view_of(const void* data, std::span<const py::ssize_t> shape, PyObject* dtype, PyObject* owner);

// The numpy.dtype of elements of a storage type; borrowed.
PyObject* dtype_of(Dtype type);
// The same of float32 or float64.
PyObject* vector_dtype(bool is_double);

// Once, at import.
void start_outputs();

}  // namespace batchnorm::bind
