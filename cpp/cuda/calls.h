// What the kernels of one storage type do of a call that has been checked. Each type is a translation unit, storage_<type>.cu, so that they
// are compiled side by side.
#pragma once

#include "batchnorm/cuda.hpp"
#include "core/saved.h"
#include "kernels/one_lane.h"

namespace batchnorm::cuda {

using namespace one_lane;  // NOLINT: the one level that GPU code has

template <class T>
void forward(const Forward& f, const Call& call, const Stream& stream, const char* name);
template <class T>
void backward(const Backward& b, const Saved::Impl& s, const Stream& stream);
template <class T>
void moments(const ConstTensor& x, const Call& call, std::span<double> mean, std::span<double> var, int64_t ddof, const Stream& stream,
             const Positions& positions);

}  // namespace batchnorm::cuda
