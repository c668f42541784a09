// Integer images: the drivers' part for x of type uint8, int16 or uint16, whose arguments have been checked. Called by batchnorm.cpp.
#pragma once

#include "types.h"

namespace batchnorm {

// moments() of x with at least one value per channel.
void integer_moments(const Geometry& g, const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof);

// batch_norm() of at least one value per channel.
void integer_batch_norm(const Geometry& g, const BatchNormArgs& a);

}  // namespace batchnorm
