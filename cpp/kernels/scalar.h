// What is done to single values, on every level that needs it. Included by vec.h and one_lane.h, which say how functions are marked.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace batchnorm::BATCHNORM_ISA {
// Storage types: the two 16-bit formats are their bits. All arithmetic on them is conversion.
struct Float16 {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};

namespace {

#if BATCHNORM_VECTOR_BYTES <= 16
// IEEE binary16 without an instruction for it; the same bits as vcvtph2ps and vcvtps2ph with round-to-nearest-even, quiet NaN
// payloads included. Out of line: 16 copies in every loop would make most of the library's size.
BATCHNORM_OUT_OF_LINE float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    uint32_t bits;
    if (magnitude >= 0x7c00u) {  // Inf, or NaN made quiet
        bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u);
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + (112u << 23));  // rebias the exponent from 15 to 127
    } else {                                               // subnormal or zero: magnitude * 2^-24 is exact in float
        const float value = (float)magnitude * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
BATCHNORM_OUT_OF_LINE uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and above round to Inf
    if (magnitude < 0x38800000u) {                                    // below 2^-14: adding 2^-1 aligns the last place of float to 2^-24
        float value;
        memcpy(&value, &magnitude, 4);
        value += 0.5f;
        uint32_t sum;
        memcpy(&sum, &value, 4);
        return (uint16_t)(sign | (sum - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (rounded - (112u << 23)) >> 13);
}
#endif

// Sum of the 16 lanes, always by halves: (i, i+8), (i, i+4), (i, i+2), (i, i+1).
BATCHNORM_INLINE double sum_lanes(const double* lanes) {
    double a[kernels::kLanes / 2];
    for (int i = 0; i < 8; ++i) a[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; ++i) a[i] += a[i + 4];
    return (a[0] + a[2]) + (a[1] + a[3]);
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
