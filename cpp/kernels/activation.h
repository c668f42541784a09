// The activations that gate `curve` applies, and what they do to a gradient, for a block of values; which one is known at run time.
// Used by apply.h and grad_sums.h; knows no tensor.
//
// exp is made of +, *, comparisons and whole numbers alone, in one order, so that its bits are the same on every ISA: exp(t) = 2^n exp(r)
// with n = round(t / ln 2) and |r| <= ln 2 / 2 (r = t - n ln 2 with ln 2 in two parts: Cody and Waite, Software Manual for the Elementary
// Functions, 1980, chapter 6), and Taylor's polynomial for exp(r) - 1, whose first omitted term is below 2^-54 (double) or 2^-25
// (float) of it. Functions of v take exp(-|v|), which does not overflow, and lose no digits near 0 or far out: a few ulp everywhere.
#pragma once

#include "vec.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::Curve;
using kernels::CurveKind;

// What the functions below need to know of a native vector's elements.
template <class V>
struct Real;
template <>
struct Real<VF> {
    using Bits = VU;
    static constexpr int kMantissa = 23, kDegree = 7;
    static constexpr uint32_t kBias = 127, kSign = 1u << 31;
    static constexpr float kPerLn2 = 0x1.715476p+0f;
    static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // 15 bits: n times it is exact
    static constexpr float kRound = 0x1.8p23f;                                  // added, it leaves whole numbers in the lowest places
    static constexpr float kLeast = -110;                                       // |t| exp(t) is less than half the least denormal
};
template <>
struct Real<VD> {
    using Bits = VQ;
    static constexpr int kMantissa = 52, kDegree = 13;
    static constexpr uint64_t kBias = 1023, kSign = 1ull << 63;
    static constexpr double kPerLn2 = 0x1.71547652b82fep+0;
    static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;  // 32 bits
    static constexpr double kRound = 0x1.8p52;
    static constexpr double kLeast = -760;
};

template <class V>
BATCHNORM_INLINE typename Real<V>::Bits bits_of(V v) {
    typename Real<V>::Bits bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
template <class V>
BATCHNORM_INLINE V from_bits(typename Real<V>::Bits bits) {
    V v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
template <class V>
BATCHNORM_INLINE V minus_abs(V v) {
    return from_bits<V>(bits_of(v) | Real<V>::kSign);
}
// NaN stays NaN.
template <class V>
BATCHNORM_INLINE V at_least(V v, typename Leaf<V>::scalar least) {
    return v < least ? V{} + least : v;
}

constexpr double inverse_factorial(int k) {
    double product = 1;
    for (int i = 2; i <= k; ++i) product *= i;
    return 1 / product;
}

// exp(t) = 2^n (1 + q). exponent is n as a whole number.
template <class V>
struct Reduced {
    V q;
    typename Real<V>::Bits exponent;
};
template <class V>
BATCHNORM_INLINE Reduced<V> reduce(V t) {
    using R = Real<V>;
    using C = typename Leaf<V>::scalar;
    const V rounded = t * R::kPerLn2 + R::kRound, n = rounded - R::kRound;
    const V r = (t - n * R::kLn2High) - n * R::kLn2Low;
    V p = V{} + (C)inverse_factorial(R::kDegree);
#pragma GCC unroll 16
    for (int k = R::kDegree - 1; k >= 2; --k) p = p * r + (C)inverse_factorial(k);
    return {r + (r * r) * p, bits_of(rounded) - bits_of(V{} + R::kRound)};
}
template <class V>
BATCHNORM_INLINE V power_of_2(typename Real<V>::Bits biased) {
    return from_bits<V>(biased << Real<V>::kMantissa);
}

// exp(t) = close * rest for kLeast <= t <= 0. close is 2^-80 (2^-550) at least, rest a power of two: where the product is denormal, who
// multiplies by rest last rounds once.
template <class V>
struct Exp {
    V close, rest;
    BATCHNORM_INLINE V whole() const { return close * rest; }
};
template <class V>
BATCHNORM_INLINE Exp<V> exp_of(V t) {
    const Reduced<V> e = reduce(at_least(t, Real<V>::kLeast));
    const auto twice = e.exponent + 2 * Real<V>::kBias;
    const auto half = twice >> 1;
    return {(1 + e.q) * power_of_2<V>(half), power_of_2<V>(twice - half)};
}

// y = act(v), and act'(v), by which dy is multiplied.
struct Sigmoid {
    template <class V>
    static BATCHNORM_INLINE V value(V v) {  // 1 / (1 + e), for v < 0 e / (1 + e)
        const Exp<V> e = exp_of(minus_abs(v));
        const V one = V{} + 1;
        return (v < 0 ? e.close : one) / (1 + e.whole()) * (v < 0 ? e.rest : one);
    }
    template <class V>
    static BATCHNORM_INLINE V derivative(V v) {  // e / (1 + e)^2
        const Exp<V> e = exp_of(minus_abs(v));
        const V d = 1 + e.whole();
        return e.close / (d * d) * e.rest;
    }
};
struct Tanh {
    template <class V>
    static BATCHNORM_INLINE V value(V v) {  // -m / (2 + m) with m = exp(-2 |v|) - 1
        // Beyond 40 that is 1 in either type, and 2^n is a normal number.
        const Reduced<V> e = reduce(at_least(2 * minus_abs(v), -40));
        const V power = power_of_2<V>(e.exponent + Real<V>::kBias);
        const V m = (power - 1) + power * e.q;
        return from_bits<V>(bits_of(minus_abs(m) / (2 + m)) ^ (~bits_of(v) & Real<V>::kSign));
    }
    template <class V>
    static BATCHNORM_INLINE V derivative(V v) {  // 4 e / (1 + e)^2 with e = exp(-2 |v|)
        return 4 * Sigmoid::derivative(2 * v);
    }
};
struct Silu {
    template <class V>
    static BATCHNORM_INLINE V value(V v) {  // v sigmoid(v)
        const Exp<V> e = exp_of(minus_abs(v));
        const V one = V{} + 1;
        return at_least(v, Real<V>::kLeast) * (v < 0 ? e.close : one) / (1 + e.whole()) * (v < 0 ? e.rest : one);
    }
    template <class V>
    static BATCHNORM_INLINE V derivative(V v) {  // s (1 + v (1 - s)) with s = sigmoid(v)
        const Exp<V> e = exp_of(minus_abs(v));
        const V one = V{} + 1, per_d = 1 / (1 + e.whole());
        const V near = -at_least(-at_least(v, Real<V>::kLeast), Real<V>::kLeast);  // finite: inf * 0 is not 0
        const V bracket = 1 + near * (v < 0 ? one : e.whole()) * per_d;
        return (v < 0 ? e.close : one) * bracket * per_d * (v < 0 ? e.rest : one);
    }
};

template <class Act, class V>
BATCHNORM_INLINE V value_of(V v) {
    return Act::value(v);
}
template <class Act, class V>
BATCHNORM_INLINE Pair<V> value_of(Pair<V> v) {
    return {value_of<Act>(v.lo), value_of<Act>(v.hi)};
}
template <class Act, class V>
BATCHNORM_INLINE V derivative_of(V v) {
    return Act::derivative(v);
}
template <class Act, class V>
BATCHNORM_INLINE Pair<V> derivative_of(Pair<V> v) {
    return {derivative_of<Act>(v.lo), derivative_of<Act>(v.hi)};
}

// v > 0 ? a : b, lane by lane; 0 < v < 6 ? a : 0; and v between 0 and 6 (NaN stays NaN).
template <class V>
BATCHNORM_INLINE V by_sign(V v, V a, V b) {
    return v > 0 ? a : b;
}
template <class V>
BATCHNORM_INLINE Pair<V> by_sign(Pair<V> v, Pair<V> a, Pair<V> b) {
    return {by_sign(v.lo, a.lo, b.lo), by_sign(v.hi, a.hi, b.hi)};
}
template <class V>
BATCHNORM_INLINE V below_6(V v, V a) {
    return v < 6 ? a : V{};
}
template <class V>
BATCHNORM_INLINE Pair<V> below_6(Pair<V> v, Pair<V> a) {
    return {below_6(v.lo, a.lo), below_6(v.hi, a.hi)};
}
template <class V>
BATCHNORM_INLINE V at_most_6(V v) {
    return v > 6 ? V{} + 6 : v;
}
template <class V>
BATCHNORM_INLINE Pair<V> at_most_6(Pair<V> v) {
    return {at_most_6(v.lo), at_most_6(v.hi)};
}
// Lane i of a where bit i is set, else of b.
template <class V>
BATCHNORM_INLINE V by_bit(uint32_t bits, V a, V b) {
    return from_bits<V>(bits_of(where_bits(bits, a)) | bits_of(where_bits(~bits, b)));
}
template <class V>
BATCHNORM_INLINE Pair<V> by_bit(uint32_t bits, Pair<V> a, Pair<V> b) {
    return {by_bit(bits, a.lo, b.lo), by_bit(bits >> LanesOf<V>::value, a.hi, b.hi)};
}

template <class V>
BATCHNORM_INLINE V slope_of(const Curve& c) {
    return Ops<V>::broadcast((typename Ops<V>::scalar)c.slope);
}

// leaky_relu's v of its y.
template <class V>
BATCHNORM_INLINE V unbent(V y, double slope) {
    return y > 0 ? y : y / (typename Leaf<V>::scalar)slope;
}
template <class V>
BATCHNORM_INLINE Pair<V> unbent(Pair<V> y, double slope) {
    return {unbent(y.lo, slope), unbent(y.hi, slope)};
}

// y = act(v). Out of line, as are those below: a call per block costs little, and copies in every loop would add half to the library's
// size.
template <class V>
BATCHNORM_OUT_OF_LINE V curved(V v, const Curve& c) {
    switch (c.kind) {
        case CurveKind::relu:
            return relu(v);
        case CurveKind::leaky_relu:
            return by_sign(v, v, v * slope_of<V>(c));
        case CurveKind::relu6:
            return at_most_6(relu(v));
        case CurveKind::sigmoid:
            return value_of<Sigmoid>(v);
        case CurveKind::tanh:
            return value_of<Tanh>(v);
        case CurveKind::silu:
            return value_of<Silu>(v);
    }
    return v;
}

// The bits that tell backward enough of v, for the piecewise linear ones.
template <class V>
BATCHNORM_OUT_OF_LINE uint32_t curve_bits(V v, const Curve& c) {
    return positive_bits(c.kind == CurveKind::relu6 ? below_6(v, v) : v);
}

// dy act'(v).
template <class V>
BATCHNORM_OUT_OF_LINE V curved_gradient(V dy, V v, const Curve& c) {
    switch (c.kind) {
        case CurveKind::relu:
            return where_positive(v, dy);
        case CurveKind::leaky_relu:
            return by_sign(v, dy, dy * slope_of<V>(c));
        case CurveKind::relu6:
            return below_6(v, where_positive(v, dy));
        case CurveKind::sigmoid:
            return dy * derivative_of<Sigmoid>(v);
        case CurveKind::tanh:
            return dy * derivative_of<Tanh>(v);
        case CurveKind::silu:
            return dy * derivative_of<Silu>(v);
    }
    return dy;
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
