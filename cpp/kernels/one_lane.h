// What vec.h is to an instruction set, for a thread of a GPU: a block of elements is one element. Included before elements.h, it takes the
// place of vec.h; the formulas above it are the CPU's, and so are their bits. A host compiler takes it too, for the rehearsal of
// cpp/cuda/launch.h.
#pragma once

#define BATCHNORM_ONE_LANE
#define BATCHNORM_ISA one_lane
#define BATCHNORM_VECTOR_BYTES 0

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "host_device.h"
#include "kernels.h"

#define BATCHNORM_INLINE BATCHNORM_HOST_DEVICE inline __attribute__((always_inline))
#define BATCHNORM_OUT_OF_LINE BATCHNORM_HOST_DEVICE inline

#include "scalar.h"
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace batchnorm::BATCHNORM_ISA {

using VF = float;
using VD = double;
using VU = uint32_t;
using VQ = uint64_t;
using F32 = float;
using F64 = double;

// There are no trees of vectors; the overloads for them are never chosen.
template <class V>
struct Pair {
    V lo, hi;
};
template <class V>
struct LanesOf {
    static constexpr int value = 1;
};

template <class V>
struct Leaf {
    using scalar = V;
};
template <class V>
struct Ops {
    using scalar = V;
    static BATCHNORM_INLINE V load(const V* p) { return *p; }
    static BATCHNORM_INLINE void store(V* p, V v) { *p = v; }
    static BATCHNORM_INLINE V broadcast(V v) { return v; }
};

// sum + a * b with one rounding: a * b is exact.
BATCHNORM_INLINE double add_product(double sum, double a, double b) { return fma(a, b, sum); }

BATCHNORM_INLINE float relu(float v) { return v < 0 ? 0 : v; }
BATCHNORM_INLINE double relu(double v) { return v < 0 ? 0 : v; }
BATCHNORM_INLINE float where_positive(float y, float v) { return y > 0 ? v : 0; }
BATCHNORM_INLINE double where_positive(double y, double v) { return y > 0 ? v : 0; }
BATCHNORM_INLINE uint32_t positive_bits(float y) { return y > 0; }
BATCHNORM_INLINE uint32_t positive_bits(double y) { return y > 0; }
BATCHNORM_INLINE float where_bits(uint32_t bits, float v) { return (bits & 1) != 0 ? v : 0; }
BATCHNORM_INLINE double where_bits(uint32_t bits, double v) { return (bits & 1) != 0 ? v : 0; }
BATCHNORM_INLINE double keep_first(double v, int64_t n) { return n > 0 ? v : 0; }
BATCHNORM_INLINE uint32_t mask_bits(const uint8_t* bits, int64_t first) { return (uint32_t)(bits[first >> 3] >> (first & 7)); }

BATCHNORM_INLINE double to_double(double v) { return v; }
BATCHNORM_INLINE double to_double(float v) { return v; }

template <class T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;
template <class T>
using Block = Compute<T>;
template <class T>
inline constexpr bool is_double = sizeof(Compute<T>) == sizeof(double);

// The compute value of a stored one, and back, to the nearest and ties to even.
BATCHNORM_INLINE float value_of(float v) { return v; }
BATCHNORM_INLINE double value_of(double v) { return v; }
BATCHNORM_INLINE float value_of(Bfloat16 v) {
    const uint32_t bits = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
BATCHNORM_INLINE float value_of(Float16 v) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(v.bits));
#else
    return half_to_float(v.bits);
#endif
}
BATCHNORM_INLINE void put(float* p, float v) { *p = v; }
BATCHNORM_INLINE void put(double* p, double v) { *p = v; }
BATCHNORM_INLINE void put(Bfloat16* p, float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p->bits = (uint16_t)(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
BATCHNORM_INLINE void put(Float16* p, float v) {
#ifdef __CUDA_ARCH__
    p->bits = __half_as_ushort(__float2half_rn(v));
#else
    p->bits = float_to_half(v);
#endif
}

}  // namespace batchnorm::BATCHNORM_ISA
