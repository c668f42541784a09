// New arrays for results. Called by module.cpp; knows no operation.
#pragma once

#include <pybind11/pybind11.h>

namespace batchnorm::bind {

// numpy.empty_like(x) of an ndarray: an array of x's kind and memory order that owns its data. Large ones get it from core/memory.h and
// return it there when they die, unless the program has a NumPy memory handler of its own in force, which is then used. nullptr with
// Python's error set if there is no memory.
PyObject* new_like(pybind11::handle x);
// numpy.empty_like(x, dtype, order, shape=shape).
PyObject* new_like(pybind11::handle x, pybind11::handle dtype, const char* order, pybind11::handle shape);

// Once, at import.
void start_outputs();

}  // namespace batchnorm::bind
