// Blocks of 16 lanes in float (F32) and double (F64), and their loads and stores for each storage type. The only file that
// knows an instruction set: everything above it is generic. Included by isa_body.h alone, inside one translation unit per ISA;
// BATCHNORM_ISA names the namespace, BATCHNORM_VECTOR_BYTES the native width.
//
// A block is a balanced tree of native vectors (Pair), so that a float block and a double block have equal lanes, arithmetic is
// written once, and no loop or array stands between the compiler and the registers.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef BATCHNORM_ONE_LANE  // else one_lane.h, which came before, is in this file's place

#define BATCHNORM_INLINE inline __attribute__((always_inline))
#define BATCHNORM_OUT_OF_LINE __attribute__((noinline))

#include "scalar.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

inline constexpr int kVectorBytes = BATCHNORM_VECTOR_BYTES;

typedef float VF __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef double VD __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef uint32_t VU __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef int32_t VI __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef int64_t VL __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef uint64_t VQ __attribute__((vector_size(BATCHNORM_VECTOR_BYTES)));
typedef uint16_t VH __attribute__((vector_size(BATCHNORM_VECTOR_BYTES / 2)));

// ---- trees of vectors -------------------------------------------------------------------------------------------------

template <class V>
struct Pair {
    V lo, hi;
};

template <class V>
struct LanesOf;
template <>
struct LanesOf<VF> {
    static constexpr int value = kVectorBytes / 4;
};
template <>
struct LanesOf<VD> {
    static constexpr int value = kVectorBytes / 8;
};
template <>
struct LanesOf<VI> {
    static constexpr int value = kVectorBytes / 4;
};
template <class V>
struct LanesOf<Pair<V>> {
    static constexpr int value = 2 * LanesOf<V>::value;
};

template <class V, int lanes, bool done = (LanesOf<V>::value == lanes)>
struct Tree {
    using type = typename Tree<Pair<V>, lanes>::type;
};
template <class V, int lanes>
struct Tree<V, lanes, true> {
    using type = V;
};

using F32 = Tree<VF, kernels::kLanes>::type;
using F64 = Tree<VD, kernels::kLanes>::type;
using I32 = Tree<VI, kernels::kLanes>::type;

template <class V>
BATCHNORM_INLINE Pair<V> operator+(Pair<V> a, Pair<V> b) {
    return {a.lo + b.lo, a.hi + b.hi};
}
template <class V>
BATCHNORM_INLINE Pair<V> operator-(Pair<V> a, Pair<V> b) {
    return {a.lo - b.lo, a.hi - b.hi};
}
template <class V>
BATCHNORM_INLINE Pair<V> operator*(Pair<V> a, Pair<V> b) {
    return {a.lo * b.lo, a.hi * b.hi};
}

// ---- plain loads and stores of Compute values, broadcast -----------------------------------------------------------------

template <class V>
struct Leaf;
template <>
struct Leaf<VF> {
    using scalar = float;
};
template <>
struct Leaf<VD> {
    using scalar = double;
};

template <class V>
struct Ops {
    using scalar = typename Leaf<V>::scalar;
    static BATCHNORM_INLINE V load(const scalar* p) {
        V v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static BATCHNORM_INLINE void store(scalar* p, V v) { memcpy(p, &v, sizeof v); }
    static BATCHNORM_INLINE V broadcast(scalar s) { return s - V{}; }  // V{} + s would lose the sign of -0
};
template <class V>
struct Ops<Pair<V>> {
    using scalar = typename Ops<V>::scalar;
    static constexpr int half = LanesOf<V>::value;
    static BATCHNORM_INLINE Pair<V> load(const scalar* p) { return {Ops<V>::load(p), Ops<V>::load(p + half)}; }
    static BATCHNORM_INLINE void store(scalar* p, Pair<V> v) {
        Ops<V>::store(p, v.lo);
        Ops<V>::store(p + half, v.hi);
    }
    static BATCHNORM_INLINE Pair<V> broadcast(scalar s) {
        V v = Ops<V>::broadcast(s);
        return {v, v};
    }
};

// ---- leaf operations that want an instruction ------------------------------------------------------------------------------

// sum + a * b, of which a * b must be exact, so that an instruction that rounds once gives the same as two that round twice. (Of two
// floats the product has at most 48 bits.)

#if BATCHNORM_VECTOR_BYTES == 64

BATCHNORM_INLINE VD add_product(VD sum, VD a, VD b) { return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum); }

BATCHNORM_INLINE Pair<VD> widen(VF v) {
    return {(VD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)), (VD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
}
// Straight from memory: saves the shuffle that a register needs.
BATCHNORM_INLINE Pair<VD> load_wide(const float* p) {
    return {(VD)_mm512_cvtps_pd(_mm256_loadu_ps(p)), (VD)_mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
}
// x < 0 ? 0 : x, so that NaN stays NaN: max returns its second operand when they do not compare.
BATCHNORM_INLINE VF relu(VF v) { return (VF)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v); }
BATCHNORM_INLINE VD relu(VD v) { return (VD)_mm512_max_pd(_mm512_setzero_pd(), (__m512d)v); }
BATCHNORM_INLINE VF where_positive(VF y, VF v) {
    return (VF)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)y, _mm512_setzero_ps(), _CMP_GT_OQ), (__m512)v);
}
BATCHNORM_INLINE VD where_positive(VD y, VD v) {
    return (VD)_mm512_maskz_mov_pd(_mm512_cmp_pd_mask((__m512d)y, _mm512_setzero_pd(), _CMP_GT_OQ), (__m512d)v);
}
BATCHNORM_INLINE uint32_t positive_bits(VF y) { return _mm512_cmp_ps_mask((__m512)y, _mm512_setzero_ps(), _CMP_GT_OQ); }
BATCHNORM_INLINE uint32_t positive_bits(VD y) { return _mm512_cmp_pd_mask((__m512d)y, _mm512_setzero_pd(), _CMP_GT_OQ); }
BATCHNORM_INLINE VF where_bits(uint32_t bits, VF v) { return (VF)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v); }
BATCHNORM_INLINE VD where_bits(uint32_t bits, VD v) { return (VD)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)v); }
BATCHNORM_INLINE void stream(float* p, VF v) { _mm512_stream_ps(p, (__m512)v); }
BATCHNORM_INLINE void stream(double* p, VD v) { _mm512_stream_pd(p, (__m512d)v); }
BATCHNORM_INLINE void stream(void* p, VH v) { _mm256_stream_si256((__m256i*)p, (__m256i)v); }
BATCHNORM_INLINE VF half_to_float(VH v) { return (VF)_mm512_cvtph_ps((__m256i)v); }
BATCHNORM_INLINE VH float_to_half(VF v) { return (VH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BATCHNORM_INLINE VI load_ints(const uint8_t* p) { return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
BATCHNORM_INLINE VI load_ints(const int16_t* p) { return (VI)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
BATCHNORM_INLINE VI load_ints(const uint16_t* p) { return (VI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
BATCHNORM_INLINE Pair<VD> widen(VI v) {
    return {(VD)_mm512_cvtepi32_pd(_mm512_castsi512_si256((__m512i)v)), (VD)_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64((__m512i)v, 1))};
}
BATCHNORM_INLINE VF narrow(Pair<VD> v) {
    return (VF)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)v.lo)), _mm512_cvtpd_ps((__m512d)v.hi), 1);
}

#elif BATCHNORM_VECTOR_BYTES == 32

BATCHNORM_INLINE VD add_product(VD sum, VD a, VD b) { return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum); }

BATCHNORM_INLINE Pair<VD> widen(VF v) {
    return {(VD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)), (VD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
}
BATCHNORM_INLINE Pair<VD> load_wide(const float* p) {
    return {(VD)_mm256_cvtps_pd(_mm_loadu_ps(p)), (VD)_mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}
BATCHNORM_INLINE VF relu(VF v) { return (VF)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v); }
BATCHNORM_INLINE VD relu(VD v) { return (VD)_mm256_max_pd(_mm256_setzero_pd(), (__m256d)v); }
BATCHNORM_INLINE VF where_positive(VF y, VF v) {
    return (VF)_mm256_and_ps(_mm256_cmp_ps((__m256)y, _mm256_setzero_ps(), _CMP_GT_OQ), (__m256)v);
}
BATCHNORM_INLINE VD where_positive(VD y, VD v) {
    return (VD)_mm256_and_pd(_mm256_cmp_pd((__m256d)y, _mm256_setzero_pd(), _CMP_GT_OQ), (__m256d)v);
}
BATCHNORM_INLINE uint32_t positive_bits(VF y) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)y, _mm256_setzero_ps(), _CMP_GT_OQ));
}
BATCHNORM_INLINE uint32_t positive_bits(VD y) {
    return (uint32_t)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)y, _mm256_setzero_pd(), _CMP_GT_OQ));
}
BATCHNORM_INLINE void stream(float* p, VF v) { _mm256_stream_ps(p, (__m256)v); }
BATCHNORM_INLINE void stream(double* p, VD v) { _mm256_stream_pd(p, (__m256d)v); }
BATCHNORM_INLINE void stream(void* p, VH v) { _mm_stream_si128((__m128i*)p, (__m128i)v); }
BATCHNORM_INLINE VF half_to_float(VH v) { return (VF)_mm256_cvtph_ps((__m128i)v); }
BATCHNORM_INLINE VH float_to_half(VF v) { return (VH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
BATCHNORM_INLINE VI load_ints(const uint8_t* p) { return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
BATCHNORM_INLINE VI load_ints(const int16_t* p) { return (VI)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)); }
BATCHNORM_INLINE VI load_ints(const uint16_t* p) { return (VI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
BATCHNORM_INLINE Pair<VD> widen(VI v) {
    return {(VD)_mm256_cvtepi32_pd(_mm256_castsi256_si128((__m256i)v)), (VD)_mm256_cvtepi32_pd(_mm256_extracti128_si256((__m256i)v, 1))};
}
BATCHNORM_INLINE VF narrow(Pair<VD> v) {
    return (VF)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)v.lo)), _mm256_cvtpd_ps((__m256d)v.hi), 1);
}

#elif defined(__x86_64__)  // SSE2, which every x86-64 has

BATCHNORM_INLINE Pair<VD> widen(VF v) { return {(VD)_mm_cvtps_pd((__m128)v), (VD)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v))}; }
BATCHNORM_INLINE Pair<VD> load_wide(const float* p) { return widen(Ops<VF>::load(p)); }
BATCHNORM_INLINE VF relu(VF v) { return (VF)_mm_max_ps(_mm_setzero_ps(), (__m128)v); }
BATCHNORM_INLINE VD relu(VD v) { return (VD)_mm_max_pd(_mm_setzero_pd(), (__m128d)v); }
BATCHNORM_INLINE VF where_positive(VF y, VF v) { return (VF)_mm_and_ps(_mm_cmpgt_ps((__m128)y, _mm_setzero_ps()), (__m128)v); }
BATCHNORM_INLINE VD where_positive(VD y, VD v) { return (VD)_mm_and_pd(_mm_cmpgt_pd((__m128d)y, _mm_setzero_pd()), (__m128d)v); }
BATCHNORM_INLINE uint32_t positive_bits(VF y) { return (uint32_t)_mm_movemask_ps(_mm_cmpgt_ps((__m128)y, _mm_setzero_ps())); }
BATCHNORM_INLINE uint32_t positive_bits(VD y) { return (uint32_t)_mm_movemask_pd(_mm_cmpgt_pd((__m128d)y, _mm_setzero_pd())); }
BATCHNORM_INLINE void stream(float* p, VF v) { _mm_stream_ps(p, (__m128)v); }
BATCHNORM_INLINE void stream(double* p, VD v) { _mm_stream_pd(p, (__m128d)v); }
BATCHNORM_INLINE void stream(void* p, VH v) { memcpy(p, &v, sizeof v); }
BATCHNORM_INLINE VI load_ints(const uint8_t* p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    const __m128i zero = _mm_setzero_si128();
    return (VI)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero);
}
BATCHNORM_INLINE VI load_ints(const int16_t* p) {
    const __m128i four = _mm_loadl_epi64((const __m128i*)p);
    return (VI)_mm_srai_epi32(_mm_unpacklo_epi16(four, four), 16);
}
BATCHNORM_INLINE VI load_ints(const uint16_t* p) { return (VI)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128()); }
BATCHNORM_INLINE Pair<VD> widen(VI v) {
    return {(VD)_mm_cvtepi32_pd((__m128i)v), (VD)_mm_cvtepi32_pd(_mm_unpackhi_epi64((__m128i)v, (__m128i)v))};
}
BATCHNORM_INLINE VF narrow(Pair<VD> v) { return (VF)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)v.lo), _mm_cvtpd_ps((__m128d)v.hi)); }

#else  // any machine with 16-byte vectors, by the compiler's own vector types (aarch64: NEON)

BATCHNORM_INLINE Pair<VD> widen(VF v) { return {VD{v[0], v[1]}, VD{v[2], v[3]}}; }
BATCHNORM_INLINE Pair<VD> load_wide(const float* p) { return widen(Ops<VF>::load(p)); }
BATCHNORM_INLINE VF relu(VF v) { return v < 0 ? VF{} : v; }
BATCHNORM_INLINE VD relu(VD v) { return v < 0 ? VD{} : v; }
BATCHNORM_INLINE VF where_positive(VF y, VF v) { return y > 0 ? v : VF{}; }
BATCHNORM_INLINE VD where_positive(VD y, VD v) { return y > 0 ? v : VD{}; }
BATCHNORM_INLINE uint32_t positive_bits(VF y) {
    return (uint32_t)(y[0] > 0) | (uint32_t)(y[1] > 0) << 1 | (uint32_t)(y[2] > 0) << 2 | (uint32_t)(y[3] > 0) << 3;
}
BATCHNORM_INLINE uint32_t positive_bits(VD y) { return (uint32_t)(y[0] > 0) | (uint32_t)(y[1] > 0) << 1; }
BATCHNORM_INLINE void stream(float* p, VF v) { memcpy(p, &v, sizeof v); }
BATCHNORM_INLINE void stream(double* p, VD v) { memcpy(p, &v, sizeof v); }
BATCHNORM_INLINE void stream(void* p, VH v) { memcpy(p, &v, sizeof v); }
template <class T>
BATCHNORM_INLINE VI load_ints(const T* p) {
    return VI{p[0], p[1], p[2], p[3]};
}
BATCHNORM_INLINE Pair<VD> widen(VI v) { return {VD{(double)v[0], (double)v[1]}, VD{(double)v[2], (double)v[3]}}; }
BATCHNORM_INLINE VF narrow(Pair<VD> v) { return VF{(float)v.lo[0], (float)v.lo[1], (float)v.hi[0], (float)v.hi[1]}; }

#endif

#if BATCHNORM_VECTOR_BYTES == 16
BATCHNORM_INLINE VD add_product(VD sum, VD a, VD b) { return sum + a * b; }
#endif

#if BATCHNORM_VECTOR_BYTES < 64
// Lane i's bit, compared in every lane at once.
BATCHNORM_INLINE VF where_bits(uint32_t bits, VF v) {
    VU lane, kept;
    for (int i = 0; i < LanesOf<VF>::value; ++i) lane[i] = 1u << i;
    memcpy(&kept, &v, sizeof kept);
    kept &= (VU)(((VU{} + bits) & lane) != 0);
    memcpy(&v, &kept, sizeof v);
    return v;
}
BATCHNORM_INLINE VD where_bits(uint32_t bits, VD v) {
    VL lane, kept;
    for (int i = 0; i < LanesOf<VD>::value; ++i) lane[i] = 1 << i;
    memcpy(&kept, &v, sizeof kept);
    kept &= ((VL{} + (int64_t)bits) & lane) != 0;
    memcpy(&v, &kept, sizeof v);
    return v;
}
#endif

#if BATCHNORM_VECTOR_BYTES == 16
BATCHNORM_INLINE VF half_to_float(VH v) { return VF{half_to_float(v[0]), half_to_float(v[1]), half_to_float(v[2]), half_to_float(v[3])}; }
BATCHNORM_INLINE VH float_to_half(VF v) { return VH{float_to_half(v[0]), float_to_half(v[1]), float_to_half(v[2]), float_to_half(v[3])}; }
#endif

BATCHNORM_INLINE VF brain_to_float(VH v) {
#if BATCHNORM_VECTOR_BYTES == 64  // one instruction, which g++ 12 does not find: it halves and joins
    const VU bits = (VU)_mm512_cvtepu16_epi32((__m256i)v) << 16;
#elif BATCHNORM_VECTOR_BYTES == 32
    const VU bits = (VU)_mm256_cvtepu16_epi32((__m128i)v) << 16;
#else
    const VU bits = __builtin_convertvector(v, VU) << 16;
#endif
    VF f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
// Round to nearest even by adding half of the last kept place, less one if that place is even; NaN becomes quiet.
#if BATCHNORM_VECTOR_BYTES == 64
BATCHNORM_INLINE VH float_to_brain(VF v) {  // half the instructions of the generic one
    const __m512i bits = _mm512_castps_si512((__m512)v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    const __m512i upper = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return (VH)_mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16));
}
#else
BATCHNORM_INLINE VH float_to_brain(VF v) {
    VU bits;
    memcpy(&bits, &v, sizeof bits);
    const VI magnitude = (VI)(bits & 0x7fffffffu);
    const VU rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const VU nan = bits >> 16 | 0x40u;
    const VU is_nan = (VU)(magnitude > 0x7f800000);
    return __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), VH);
}
#endif

template <class V>
BATCHNORM_INLINE Pair<V> relu(Pair<V> v) {
    return {relu(v.lo), relu(v.hi)};
}
template <class V>
BATCHNORM_INLINE Pair<V> where_positive(Pair<V> y, Pair<V> v) {
    return {where_positive(y.lo, v.lo), where_positive(y.hi, v.hi)};
}
template <class V>
BATCHNORM_INLINE Pair<V> add_product(Pair<V> sum, Pair<V> a, Pair<V> b) {
    return {add_product(sum.lo, a.lo, b.lo), add_product(sum.hi, a.hi, b.hi)};
}
// Bit i tells whether lane i is above 0; and lanes of v where their bit is set, else 0 (bits past the lanes do not matter).
template <class V>
BATCHNORM_INLINE uint32_t positive_bits(Pair<V> y) {
    return positive_bits(y.lo) | positive_bits(y.hi) << LanesOf<V>::value;
}
template <class V>
BATCHNORM_INLINE Pair<V> where_bits(uint32_t bits, Pair<V> v) {
    return {where_bits(bits, v.lo), where_bits(bits >> LanesOf<V>::value, v.hi)};
}
template <class V>
BATCHNORM_INLINE auto widen(Pair<V> v) -> Pair<decltype(widen(v.lo))> {
    return {widen(v.lo), widen(v.hi)};
}
// Doubles to floats, rounded to nearest.
template <class V>
BATCHNORM_INLINE auto narrow(Pair<Pair<V>> v) -> Pair<decltype(narrow(v.lo))> {
    return {narrow(v.lo), narrow(v.hi)};
}

// ---- storage types ---------------------------------------------------------------------------------------------------------

template <class T>
inline constexpr bool is_integer = false;
template <>
inline constexpr bool is_integer<uint8_t> = true;
template <>
inline constexpr bool is_integer<int16_t> = true;
template <>
inline constexpr bool is_integer<uint16_t> = true;

// Block of Compute values from 16 (load) or n < 16 (load_part, the rest 0) stored elements, and back.
template <class V, class T>
struct Memory;  // one leaf vector of V's lanes

template <>
struct Memory<VF, float> {
    static BATCHNORM_INLINE VF load(const float* p) { return Ops<VF>::load(p); }
    static BATCHNORM_INLINE void store(float* p, VF v) { Ops<VF>::store(p, v); }
    static BATCHNORM_INLINE void store_stream(float* p, VF v) { stream(p, v); }
};
template <>
struct Memory<VD, double> {
    static BATCHNORM_INLINE VD load(const double* p) { return Ops<VD>::load(p); }
    static BATCHNORM_INLINE void store(double* p, VD v) { Ops<VD>::store(p, v); }
    static BATCHNORM_INLINE void store_stream(double* p, VD v) { stream(p, v); }
};
template <>
struct Memory<VF, Float16> {
    static BATCHNORM_INLINE VF load(const Float16* p) {
        VH h;
        memcpy(&h, p, sizeof h);
        return half_to_float(h);
    }
    static BATCHNORM_INLINE void store(Float16* p, VF v) {
        const VH h = float_to_half(v);
        memcpy(p, &h, sizeof h);
    }
    static BATCHNORM_INLINE void store_stream(Float16* p, VF v) { stream(p, float_to_half(v)); }
};
template <>
struct Memory<VF, Bfloat16> {
    static BATCHNORM_INLINE VF load(const Bfloat16* p) {
        VH h;
        memcpy(&h, p, sizeof h);
        return brain_to_float(h);
    }
    static BATCHNORM_INLINE void store(Bfloat16* p, VF v) {
        const VH h = float_to_brain(v);
        memcpy(p, &h, sizeof h);
    }
    static BATCHNORM_INLINE void store_stream(Bfloat16* p, VF v) { stream(p, float_to_brain(v)); }
};
template <class T>
    requires is_integer<T>
struct Memory<VF, T> {
    static BATCHNORM_INLINE VF load(const T* p) { return __builtin_convertvector(load_ints(p), VF); }
};
template <class T>
    requires is_integer<T>
struct Memory<VI, T> {
    static BATCHNORM_INLINE VI load(const T* p) { return load_ints(p); }
};
template <class V, class T>
struct Memory<Pair<V>, T> {
    static constexpr int half = LanesOf<V>::value;
    static BATCHNORM_INLINE Pair<V> load(const T* p) { return {Memory<V, T>::load(p), Memory<V, T>::load(p + half)}; }
    static BATCHNORM_INLINE void store(T* p, Pair<V> v) {
        Memory<V, T>::store(p, v.lo);
        Memory<V, T>::store(p + half, v.hi);
    }
    static BATCHNORM_INLINE void store_stream(T* p, Pair<V> v) {
        Memory<V, T>::store_stream(p, v.lo);
        Memory<V, T>::store_stream(p + half, v.hi);
    }
};

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
inline constexpr bool is_double = sizeof(Compute<T>) == sizeof(double);

template <class C>
struct BlockOf;
template <>
struct BlockOf<float> {
    using type = F32;
};
template <>
struct BlockOf<double> {
    using type = F64;
};
template <class T>
using Block = typename BlockOf<Compute<T>>::type;

template <class T>
BATCHNORM_INLINE Block<T> load(const T* p) {
    return Memory<Block<T>, T>::load(p);
}
template <class T>
BATCHNORM_INLINE void store(T* p, Block<T> v) {
    Memory<Block<T>, T>::store(p, v);
}
template <class T>
BATCHNORM_INLINE void store_stream(T* p, Block<T> v) {
    Memory<Block<T>, T>::store_stream(p, v);
}

// Tails go through a block on the stack, so nothing past the end is touched; n in 1..15. Masked instructions where the machine
// has them.
template <class T>
BATCHNORM_INLINE Block<T> load_part(const T* p, int64_t n) {
    T buffer[kernels::kLanes] = {};
    memcpy(buffer, p, (size_t)n * sizeof(T));
    return load(buffer);
}
template <class T>
BATCHNORM_INLINE void store_part(T* p, int64_t n, Block<T> v) {
    T buffer[kernels::kLanes];
    store(buffer, v);
    memcpy(p, buffer, (size_t)n * sizeof(T));
}
#if BATCHNORM_VECTOR_BYTES == 64
BATCHNORM_INLINE F32 load_part(const float* p, int64_t n) { return (F32)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
BATCHNORM_INLINE void store_part(float* p, int64_t n, F32 v) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
BATCHNORM_INLINE F64 load_part(const double* p, int64_t n) {
    const unsigned mask = (1u << n) - 1;
    return {(VD)_mm512_maskz_loadu_pd((__mmask8)mask, p), (VD)_mm512_maskz_loadu_pd((__mmask8)(mask >> 8), p + 8)};
}
BATCHNORM_INLINE void store_part(double* p, int64_t n, F64 v) {
    const unsigned mask = (1u << n) - 1;
    _mm512_mask_storeu_pd(p, (__mmask8)mask, (__m512d)v.lo);
    _mm512_mask_storeu_pd(p + 8, (__mmask8)(mask >> 8), (__m512d)v.hi);
}
BATCHNORM_INLINE VH load_part_bits(const void* p, int64_t n) { return (VH)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p); }
BATCHNORM_INLINE void store_part_bits(void* p, int64_t n, VH h) { _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)h); }
BATCHNORM_INLINE F32 load_part(const Float16* p, int64_t n) { return half_to_float(load_part_bits(p, n)); }
BATCHNORM_INLINE void store_part(Float16* p, int64_t n, F32 v) { store_part_bits(p, n, float_to_half(v)); }
BATCHNORM_INLINE F32 load_part(const Bfloat16* p, int64_t n) { return brain_to_float(load_part_bits(p, n)); }
BATCHNORM_INLINE void store_part(Bfloat16* p, int64_t n, F32 v) { store_part_bits(p, n, float_to_brain(v)); }
#endif

// The same 16 (or n) elements as doubles, for sums.
BATCHNORM_INLINE F64 to_double(F64 v) { return v; }
BATCHNORM_INLINE F64 to_double(F32 v) { return widen(v); }
template <class V>
struct LoadWide {
    static BATCHNORM_INLINE V load(const float* p) {
        return {LoadWide<decltype(V::lo)>::load(p), LoadWide<decltype(V::lo)>::load(p + LanesOf<V>::value / 2)};
    }
};
template <>
struct LoadWide<Pair<VD>> {
    static BATCHNORM_INLINE Pair<VD> load(const float* p) { return load_wide(p); }
};
template <class T>
BATCHNORM_INLINE F64 load_double(const T* p) {
    if constexpr (is_integer<T>) {
        return widen(Memory<I32, T>::load(p));
    } else {
        return to_double(load(p));
    }
}
BATCHNORM_INLINE F64 load_double(const float* p) { return LoadWide<F64>::load(p); }

// Lanes n and above become 0; n in 1..15.
template <class V>
struct KeepFirst;
template <>
struct KeepFirst<VD> {
    static BATCHNORM_INLINE VD run(VD v, int64_t n) {
        VL index;
        for (int i = 0; i < LanesOf<VD>::value; ++i) index[i] = i;
        VL bits;
        memcpy(&bits, &v, sizeof bits);
        bits &= index < n;
        memcpy(&v, &bits, sizeof v);
        return v;
    }
};
template <class V>
struct KeepFirst<Pair<V>> {
    static BATCHNORM_INLINE Pair<V> run(Pair<V> v, int64_t n) {
        return {KeepFirst<V>::run(v.lo, n), KeepFirst<V>::run(v.hi, n - LanesOf<V>::value)};
    }
};
BATCHNORM_INLINE F64 keep_first(F64 v, int64_t n) { return KeepFirst<F64>::run(v, n); }

// The 16 bits of a mask from number `first` on, in the lowest places; those above are anything.
BATCHNORM_INLINE uint32_t mask_bits(const uint8_t* bits, int64_t first) {
    uint32_t word;
    memcpy(&word, bits + (first >> 3), sizeof word);
    return word >> (first & 7);
}

// 16 bytes of integers, which every machine interleaves in one instruction.
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(16)));
template <size_t size>
struct SixteenOf {
    using type = Bytes;
};
template <>
struct SixteenOf<2> {
    using type = Words;
};
BATCHNORM_INLINE Bytes interleave_low(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
BATCHNORM_INLINE Bytes interleave_high(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
BATCHNORM_INLINE Bytes high_half(Bytes a) {
    return __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
}
BATCHNORM_INLINE Words interleave_low(Words a, Words b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
BATCHNORM_INLINE Words interleave_high(Words a, Words b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
BATCHNORM_INLINE Words high_half(Words a) { return __builtin_shufflevector(a, a, 4, 5, 6, 7, 4, 5, 6, 7); }

// The sequence that three or four vectors hold, its halves interleaved: of C * lanes elements, number i becomes number 2 i modulo C * lanes
// - 1.
template <class V>
BATCHNORM_INLINE void interleave_halves(V (&t)[3]) {
    const V a = interleave_low(t[0], high_half(t[1])), b = interleave_low(high_half(t[0]), t[2]), c = interleave_low(t[1], high_half(t[2]));
    t[0] = a, t[1] = b, t[2] = c;
}
template <class V>
BATCHNORM_INLINE void interleave_halves(V (&t)[4]) {
    const V a = interleave_low(t[0], t[2]), b = interleave_high(t[0], t[2]), c = interleave_low(t[1], t[3]),
            d = interleave_high(t[1], t[3]);
    t[0] = a, t[1] = b, t[2] = c, t[3] = d;
}

// 16 pixels of C integers each, side by side: v[c] are the values of channel c. Doubling its number until that is times `lanes` brings
// element C j + c to lanes C j + lanes c = j + lanes c.
template <int C, class T>
BATCHNORM_INLINE void load_pixels(const T* p, I32 (&v)[C]) {
    constexpr int lanes = 16 / sizeof(T);
    T plane[C][kernels::kLanes];
    for (int first = 0; first < kernels::kLanes; first += lanes) {
        typename SixteenOf<sizeof(T)>::type t[C];
        memcpy(t, p + C * first, sizeof t);
        for (int times = 1; times < lanes; times *= 2) interleave_halves(t);
        for (int c = 0; c < C; ++c) memcpy(plane[c] + first, &t[c], sizeof t[c]);
    }
    for (int c = 0; c < C; ++c) v[c] = Memory<I32, T>::load(plane[c]);
}
#if BATCHNORM_VECTOR_BYTES == 64
// Four pixels in each quarter, then one shuffle per channel that also widens: its byte 4 j + c, and three zeros.
template <int C>
    requires(C == 3 || C == 4)
BATCHNORM_INLINE void load_pixels(const uint8_t* p, I32 (&v)[C]) {
    __m512i quarters;
    if constexpr (C == 3) {
        const __m512i from = _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
        quarters = _mm512_permutexvar_epi32(from, _mm512_maskz_loadu_epi8((1ull << 48) - 1, p));
    } else {
        quarters = _mm512_loadu_si512(p);
    }
    for (int c = 0; c < C; ++c) {
        const int zeros = (int)0x80808000;
        const __m512i bytes = _mm512_set4_epi32(zeros + 3 * C + c, zeros + 2 * C + c, zeros + C + c, zeros + c);
        v[c] = (VI)_mm512_shuffle_epi8(quarters, bytes);
    }
}
#elif BATCHNORM_VECTOR_BYTES == 32
template <int C>
    requires(C == 3 || C == 4)
BATCHNORM_INLINE void load_pixels(const uint8_t* p, I32 (&v)[C]) {
    // Of the upper half the last 16 bytes are taken, so that nothing is read past the end.
    constexpr int kUpper = 8 * C - 16, kSkip = 4 * C - kUpper;
    const auto halves = [](const uint8_t* q) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)q)),
                                       _mm_loadu_si128((const __m128i*)(q + kUpper)), 1);
    };
    const __m256i first = halves(p), second = halves(p + 8 * C);
    for (int c = 0; c < C; ++c) {
        const int zeros = (int)0x80808000, upper = zeros + kSkip;
        const __m256i bytes = _mm256_setr_epi32(zeros + c, zeros + C + c, zeros + 2 * C + c, zeros + 3 * C + c, upper + c, upper + C + c,
                                                upper + 2 * C + c, upper + 3 * C + c);
        v[c] = {(VI)_mm256_shuffle_epi8(first, bytes), (VI)_mm256_shuffle_epi8(second, bytes)};
    }
}
#endif

// Elements to step before p, which is aligned to its type, is so for `store_stream` of whole blocks.
template <class T>
BATCHNORM_INLINE int64_t elements_to_alignment(const T* p) {
    constexpr uintptr_t alignment = kernels::kLanes * sizeof(T) < 64 ? kernels::kLanes * sizeof(T) : 64;
    return (int64_t)((alignment - (uintptr_t)p % alignment) % alignment / sizeof(T));
}

// Asks for the block `ahead` bytes behind p, into the first-level cache; past the end of an array it asks in vain. A core by itself
// keeps too few lines on their way to use the memory's bandwidth (D13). With 0 it asks for what is being read, which costs
// less than a branch.
template <class T>
BATCHNORM_INLINE void prefetch_ahead(const T* p, int64_t ahead) {
    __builtin_prefetch((const char*)p + ahead, 0, 3);
    if (sizeof(T) * kernels::kLanes > 64) __builtin_prefetch((const char*)p + ahead + 64, 0, 3);
}

// Makes streamed stores visible before whoever waits for this kernel goes on.
BATCHNORM_INLINE void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA

#endif
