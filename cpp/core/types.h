// Internal vocabulary between check, plan and the drivers: a call's tensors after checking, all in one memory direction.
#pragma once

#include <cstdint>

#include "batchnorm/batchnorm.hpp"
#include "kernels/kernels.h"

namespace batchnorm {

static_assert(static_cast<int>(Dtype::float32) == kernels::float32 && static_cast<int>(Dtype::float64) == kernels::float64 &&
              static_cast<int>(Dtype::float16) == kernels::float16 && static_cast<int>(Dtype::bfloat16) == kernels::bfloat16 &&
              static_cast<int>(Dtype::uint8) == kernels::uint8 && static_cast<int>(Dtype::int16) == kernels::int16 &&
              static_cast<int>(Dtype::uint16) == kernels::uint16);

static_assert(static_cast<int>(Activation::leaky_relu) - 1 == static_cast<int>(kernels::CurveKind::leaky_relu) &&
              static_cast<int>(Activation::silu) - 1 == static_cast<int>(kernels::CurveKind::silu));

inline kernels::Dtype to_kernel(Dtype t) { return static_cast<kernels::Dtype>(t); }

inline std::int64_t element_size(Dtype t) { return t == Dtype::float64 ? 8 : t == Dtype::float32 ? 4 : t == Dtype::uint8 ? 1 : 2; }

// What the tensors of one call have in common. outer and inner are as in the views; a plan flattens them to rows for nsc.
struct Geometry {
    kernels::Direction direction = kernels::ncs;
    std::int64_t outer = 0, channels = 0, inner = 0;
    Dtype dtype = Dtype::float32;
    std::int64_t counting = 0;  // positions that count
    double weight = 0;          // the sum of their weights: n

    std::int64_t count() const { return outer * inner; }  // values per channel
    std::int64_t elements() const { return count() * channels; }
};

// A mask as the kernels address it. Threads share no byte of it: runs (ncs) and rows (nsc) start at whole bytes, unless rows are folded,
// and then 16 bits or a multiple belong together.
inline kernels::Mask to_mask(const Geometry& g, std::uint8_t* bits) {
    const auto whole_bytes = [](std::int64_t n) { return (n + 7) / 8 * 8; };
    if (g.direction == kernels::ncs) return {bits, g.channels * whole_bytes(g.inner), whole_bytes(g.inner)};
    return {bits, g.channels < kernels::kFoldBelow ? g.channels : whole_bytes(g.channels), 1};
}
inline std::int64_t mask_bytes(const Geometry& g) {
    const std::int64_t n = g.direction == kernels::ncs ? g.outer : g.count();
    return (n * to_mask(g, nullptr).outer_stride + 7) / 8 + kernels::kMaskSlack;
}

// A checked view as the kernels address it. For nsc with inner > 1, a row's address is outer_stride and inner_stride apart.
inline kernels::Operand to_operand(const ConstTensor& v) {
    return {const_cast<void*>(v.data), v.outer_stride, v.channel_stride, v.inner_stride};
}
inline kernels::Operand to_operand(const Tensor& v) { return {v.data, v.outer_stride, v.channel_stride, v.inner_stride}; }

inline double at(const ConstChannels& v, std::int64_t c) {
    return v.is_double ? static_cast<const double*>(v.data)[c * v.stride] : static_cast<const float*>(v.data)[c * v.stride];
}
inline double at(const Channels& v, std::int64_t c) {
    return v.is_double ? static_cast<const double*>(v.data)[c * v.stride] : static_cast<const float*>(v.data)[c * v.stride];
}
inline void set(const Channels& v, std::int64_t c, double value) {
    if (v.is_double) {
        static_cast<double*>(v.data)[c * v.stride] = value;
    } else {
        static_cast<float*>(v.data)[c * v.stride] = static_cast<float>(value);
    }
}

}  // namespace batchnorm
