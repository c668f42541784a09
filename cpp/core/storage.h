// Elements of any floating storage type as doubles, one by one: for what is not worth a kernel.
#pragma once

#include <bit>
#include <cmath>

#include "types.h"

namespace batchnorm {

inline float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact, denormals too
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}
inline std::uint16_t float_to_half(float f) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {  // denormal: the addition rounds to the multiple of 2^-24 that is in the lowest places
        const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(rounded) - 0x3f000000u));
    }
    const std::uint32_t even = magnitude >> 13 & 1;
    return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + even) >> 13));
}
inline std::uint16_t float_to_bfloat(float f) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
    if (std::isnan(f)) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline double load(const ConstTensor& v, int64_t at) {
    switch (v.dtype) {
        case Dtype::float64:
            return static_cast<const double*>(v.data)[at];
        case Dtype::float16:
            return half_to_float(static_cast<const std::uint16_t*>(v.data)[at]);
        case Dtype::bfloat16:
            return std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(v.data)[at]) << 16);
        default:
            return static_cast<const float*>(v.data)[at];
    }
}
inline void store(const Tensor& v, int64_t at, double value) {
    switch (v.dtype) {
        case Dtype::float64:
            static_cast<double*>(v.data)[at] = value;
            break;
        case Dtype::float16:
            static_cast<std::uint16_t*>(v.data)[at] = float_to_half(static_cast<float>(value));
            break;
        case Dtype::bfloat16:
            static_cast<std::uint16_t*>(v.data)[at] = float_to_bfloat(static_cast<float>(value));
            break;
        default:
            static_cast<float*>(v.data)[at] = static_cast<float>(value);
    }
}

}  // namespace batchnorm
