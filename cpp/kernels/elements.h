// What is done to a block of elements, of whatever lanes: the terms of the sums, the normalisation, gates and their derivatives. Every
// level takes it from here, and so do threads of a GPU, whose blocks are one element; knows no tensor.
#pragma once

#include "activation.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::Gate;

// Which of 16 values count, a bit each.
inline constexpr uint32_t kAllKept = 0xffff;
// v where it counts, else 0.
template <class V>
BATCHNORM_INLINE V where_kept(uint32_t bits, V v) {
    return bits == kAllKept ? v : where_bits(bits, v);
}

// ---- terms of the sums -----------------------------------------------------------------------------------------------------------------

template <bool shifted>
struct Moments {
    F64 sum, sum_sq;
    BATCHNORM_INLINE void add(F64 x, F64 shift) {
        if constexpr (shifted) {
            const F64 d = x - shift;
            sum = sum + d;
            sum_sq = sum_sq + d * d;
        } else {
            sum = sum + x;
            sum_sq = add_product(sum_sq, x, x);
        }
    }
    // The first n lanes alone; of x the others are 0.
    BATCHNORM_INLINE void add_first(F64 x, F64 shift, int64_t n) {
        if constexpr (shifted) {
            const F64 d = keep_first(x - shift, n);
            sum = sum + d;
            sum_sq = sum_sq + d * d;
        } else {
            add(x, shift);
        }
    }
    // The lanes whose bit is set alone, whatever the others hold.
    BATCHNORM_INLINE void add_kept(F64 x, F64 shift, uint32_t bits) {
        if constexpr (shifted) {
            const F64 d = where_bits(bits, x - shift);
            sum = sum + d;
            sum_sq = sum_sq + d * d;
        } else {
            add(where_bits(bits, x), shift);
        }
    }
    // Each lane w times; where that is 0 whatever the lane holds.
    BATCHNORM_INLINE void add_weighted(F64 x, F64 shift, F64 w, F64 scale) {
        const F64 d = where_positive(w, (x - shift) * scale), w_d = w * d;
        sum = sum + w_d;
        sum_sq = sum_sq + w_d * d;
    }
    BATCHNORM_INLINE void add_weighted_first(F64 x, F64 shift, F64 w, F64 scale, int64_t n) {
        add_weighted(x, shift, keep_first(w, n), scale);
    }
};

// Likewise: without a shift the products of float data are exact and can be fused with the sum.
template <bool shifted>
struct GradSums {
    F64 dy, dy_x;
    BATCHNORM_INLINE void add(F64 g, F64 x, F64 shift) {
        dy = dy + g;
        if constexpr (shifted) {
            dy_x = dy_x + g * (x - shift);
        } else {
            dy_x = add_product(dy_x, g, x);
        }
    }
    // The first n lanes alone; of g and x the others are 0.
    BATCHNORM_INLINE void add_first(F64 g, F64 x, F64 shift, int64_t n) {
        if constexpr (shifted) {
            dy = dy + g;
            dy_x = dy_x + g * keep_first(x - shift, n);
        } else {
            add(g, x, shift);
        }
    }
};

// ---- forward and backward ------------------------------------------------------------------------------------------

// The one expression that makes y of x. The backward kernels use it to tell where the activation was on: same bits, same answer.
template <class V>
BATCHNORM_INLINE V affine(V x, V center, V scale, V offset) {
    return (x - center) * scale + offset;
}

// Gate curve, whose work per block is large, asks as it runs what the other gates have as constants: a variant for each answer would
// cost more size than it saves time.
template <kernels::Gate gate>
inline constexpr bool asks = gate == kernels::curve;

// y of v, and where the gate was open, a bit per lane.
template <Gate gate, class V>
BATCHNORM_INLINE V gated(V v, const Curve& curve) {
    if constexpr (gate == kernels::curve) {
        return curved(v, curve);
    } else {
        return gate == kernels::open ? v : relu(v);
    }
}
template <Gate gate, class V>
BATCHNORM_INLINE uint32_t gate_bits(V v, const Curve& curve) {
    return gate == kernels::curve ? curve_bits(v, curve) : positive_bits(v);
}

// The normalisation's input, of what may be its output behind leaky_relu.
template <Gate gate, class V>
BATCHNORM_INLINE V input(V x, const Curve& curve) {
    if constexpr (asks<gate>) {
        if (curve.of_y) return unbent(x, curve.slope);
    }
    return x;
}

// Bits of a mask in memory, or none: from number `first` on.
struct MaskBits {
    const uint8_t* bits;
    int64_t first;
    BATCHNORM_INLINE bool given() const { return bits != nullptr; }
    BATCHNORM_INLINE uint32_t get() const { return mask_bits(bits, first); }
};

// dy as it reaches the normalisation. center, scale and offset are read only with gates relu and curve, bits of the mask only with gate
// masked or, if there is a mask, curve; z (zeros: none) only with gate curve.
template <Gate gate, class V, class PerChannel, class Bits>
BATCHNORM_INLINE V through_gate(V dy, V x, V z, const PerChannel& center, const PerChannel& scale, const PerChannel& offset, int64_t k,
                                const Bits& bits, const Curve& curve) {
    if constexpr (gate == kernels::relu) {
        return where_positive(affine(x, center.at(k), scale.at(k), offset.at(k)), dy);
    } else if constexpr (gate == kernels::masked) {
        return where_bits(bits.get(), dy);
    } else if constexpr (gate == kernels::curve) {
        if (bits.given()) return by_bit(bits.get(), dy, dy * slope_of<V>(curve));
        if (curve.of_y) return by_sign(x, dy, dy * slope_of<V>(curve));
        return curved_gradient(dy, affine(x, center.at(k), scale.at(k), offset.at(k)) + z, curve);
    } else {
        return dy;
    }
}

template <class PerChannel>
struct GradCoefficients {
    PerChannel center, scale, offset, k_dy, x_scale, k_x, k_0;
};

// dx of g, with statistics that follow x. Weighted positions have a weight `at(e)`.
template <class V, class PerChannel, class Weight>
BATCHNORM_INLINE V gradient(V g, V x, const GradCoefficients<PerChannel>& c, int64_t k, const Weight& weight, int64_t e) {
    V x_term = ((x - c.center.at(k)) * c.x_scale.at(k)) * c.k_x.at(k), rest = c.k_0.at(k);
    if (weight.data != nullptr) {
        const V w = weight.at(e);
        x_term = x_term * w;
        rest = rest * w;
    }
    return (g * c.k_dy.at(k) + x_term) + rest;
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
