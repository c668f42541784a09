// The operations as Python calls them. Used by module.cpp.
#pragma once

#include <span>

#include "bind/arguments.h"

namespace batchnorm::bind {

std::span<const Operation> operations();      // those that a stub in Python describes
std::span<const Operation> raw_operations();  // for the package's own use

// The named tuples of batch_norm_train, batch_norm_backward and batch_norm_double_backward.
void use_results(PyTypeObject* train, PyTypeObject* backward, PyTypeObject* double_backward);

}  // namespace batchnorm::bind
