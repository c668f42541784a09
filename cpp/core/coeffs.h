// Everything per channel, in double: from sums to statistics, from statistics to the numbers the elementwise kernels use, running
// statistics. Plain scalar functions of one channel; no tensors, no kernels, no threads. Without branches or calls in what every call
// needs: loops over channels (columns.h) are vectorised, and results chosen between are computed both.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/host_device.h"

namespace batchnorm::coeffs {

// A sum that carries its rounding error along (Knuth's TwoSum), so that the number of tiles does not matter.
struct Sum {
    double value, error;

    BATCHNORM_HOST_DEVICE void add(double x) {
        const double s = value + x, b = s - value;
        error += (value - (s - b)) + (x - b);
        value = s;
    }
    // Once the sum is not finite its error is NaN and says nothing.
    BATCHNORM_HOST_DEVICE double kept_error() const { return std::isfinite(value) ? error : 0; }
    BATCHNORM_HOST_DEVICE double total() const { return value + kept_error(); }
};

// Statistics of n values from the sums of (x - shift) and (x - shift)^2.
struct Moments {
    double mean, var;  // population variance, never negative
    bool trusted;      // false: take the sums again, about `better_shift`
    double better_shift;
};

// With d = mean - shift, the variance is the mean square less d^2, and the rounding of the squares' sum is amplified by
// 1 + d^2/var; `most_amplification` says how much is still fine. Where it is more, one more pass about the mean mends it.
BATCHNORM_HOST_DEVICE inline Moments from_sums(double sum, double sum_sq, double shift, double n, double most_amplification) {
    const double d = sum / n;
    const double mean = shift + d;
    const double sq = sum * d;  // n d^2
    const double m2 = sum_sq - sq;
    const bool finite = std::isfinite(shift);
    // After an Inf first value: about 0, Inf stays Inf in the mean instead of turning NaN.
    return {mean, (m2 < 0 ? 0 : m2) / n, finite && (!std::isfinite(mean) || sq <= most_amplification * m2), finite ? mean : 0};
}

// numerator / denominator, to the nearest double; the denominator is below 2^95.
__extension__ typedef unsigned __int128 Uint128;
inline double rounded_ratio(Uint128 numerator, Uint128 denominator) {
    Uint128 quotient = numerator / denominator, rest = numerator % denominator;
    int exponent = 0;
    // More bits than a double has, until the last one is sure to lie below those that decide on the rounding.
    for (; rest != 0 && quotient >> 64 == 0; exponent -= 32) {
        rest <<= 32;
        quotient = quotient << 32 | rest / denominator;
        rest %= denominator;
    }
    return std::ldexp(static_cast<double>(rest == 0 ? quotient : quotient | 1), exponent);
}

// Mean and variance of n integers of at most 16 bits, from their sums: correctly rounded, as the sums are exact and n < 2^47 keeps all
// below in 128 bits. m2 = n sum x^2 - (sum x)^2 is n^2 times the population variance.
struct IntegerMoments {
    double mean, var;
};
inline IntegerMoments from_integer_sums(const Sum& sum, const Sum& sum_sq, std::int64_t n, std::int64_t ddof) {
    const auto exact = [](double x) { return static_cast<std::int64_t>(x); };
    const std::int64_t total = exact(sum.value) + exact(sum.error);
    const Uint128 size = static_cast<Uint128>(total < 0 ? -total : total), count = static_cast<Uint128>(n);
    const Uint128 squares = static_cast<Uint128>(sum_sq.value) + static_cast<Uint128>(exact(sum_sq.error));
    const double mean = rounded_ratio(size, count);
    return {total < 0 ? -mean : mean, rounded_ratio(count * squares - size * size, count * static_cast<Uint128>(n - ddof))};
}

// The same where squares overflow or underflow, of sums of s (x - shift) and (s (x - shift))^2: s is a power of two, so that is exact, and
// leaves room for |x - shift| from 2^497 to 2^1010, or from 2^-1000 to 2^-480. `var` is s^2 times the variance, which a double may not
// hold.
struct Scale {
    double s, square;
};
inline constexpr Scale kFar{0x1p-510, 0x1p-1020}, kNear{0x1p500, 0x1p1000};
inline constexpr double kNearest = 0x1p-960;  // a variance below it has lost digits
BATCHNORM_HOST_DEVICE inline Moments from_scaled_sums(double sum, double sum_sq, double shift, double n, const Scale& scale) {
    const double d = sum / n, m2 = sum_sq - sum * d;
    return {shift + d / scale.s, (m2 < 0 ? 0 : m2) / n, true, 0};
}

// 0 where the variance is 0 and nothing is added to it: x_hat of a constant is 0, whatever eps is.
BATCHNORM_HOST_DEVICE inline double inv_std(double var, double eps) {
    const double root = std::sqrt(var + eps);
    return root == 0 ? 0 : 1 / root;
}
BATCHNORM_HOST_DEVICE inline double inv_std(double scaled_var, double eps, const Scale& scale) {
    return inv_std(scaled_var, eps * scale.square) * scale.s;
}

// Numbers of the kernels' y = (x - center) * scale + offset. In C = float the mean does not fit: its rest, times the slope, goes into
// the offset, which keeps y's error at a few half-ulps whatever |mean| / std is.
template <class C>
struct Affine {
    C center, scale, offset;
};
template <class C>
BATCHNORM_HOST_DEVICE Affine<C> affine(double mean, double inv_std, double gamma, double beta) {
    const C center = static_cast<C>(mean);
    // Not the rest of an infinite mean, which would be NaN for the wrong reason; x - center is NaN or infinite by itself.
    const double rest = std::isfinite(mean) ? mean - static_cast<double>(center) : 0;
    const double slope = gamma * inv_std, moved = beta - rest * slope;
    // A zero rest adds nothing, even where the slope is infinite.
    return {center, static_cast<C>(slope), static_cast<C>(rest == 0 ? beta : moved)};
}

// What batch renormalisation multiplies x_hat by and adds to it (Ioffe 2017, algorithm 1), from the batch's mean and inv_std and the
// reference's mean and std. NaN stays NaN.
struct Renorm {
    double r, d;
};
BATCHNORM_HOST_DEVICE inline Renorm renorm(double mean, double inv_std, double reference_mean, double reference_std, double rmin,
                                           double rmax, double dmax) {
    return {inv_std == 0 ? rmin : std::clamp(1 / (inv_std * reference_std), rmin, rmax),
            std::clamp((mean - reference_mean) / reference_std, -dmax, dmax)};
}

// The value about which x is taken in the sum of dy * x: the mean of double data, whose digits are all needed. Of float data the products
// are exact in double and 0 does, as the sum about the mean follows from it, with an error of |mean| / std roundings; where that ratio is
// large the float nearest to the mean, which a constant channel equals. (The sum of a constant below that ratio is a few roundings of 0.)
BATCHNORM_HOST_DEVICE inline double gradient_shift(double mean, double inv_std, bool is_double) {
    if (is_double) return mean;
    return std::abs(mean * inv_std) > 128 ? static_cast<double>(static_cast<float>(mean)) : 0;
}
BATCHNORM_HOST_DEVICE inline double about_mean(double sum_dy, double sum_dy_x, double mean, double shift) {
    const double rest = mean - shift, moved = sum_dy_x - rest * sum_dy;
    return rest == 0 ? sum_dy_x : moved;
}

// |v| rounded down to a power of two; 1 unless v is normal.
BATCHNORM_HOST_DEVICE inline double power_of_2(double v) {
    const double size = std::abs(v);
    const double rounded = std::bit_cast<double>(std::bit_cast<std::uint64_t>(size) & 0x7ff0000000000000);
    return size >= std::numeric_limits<double>::min() && size <= std::numeric_limits<double>::max() ? rounded : 1;
}

// Numbers of the kernels' dx = dy * k_dy + ((x - center) * x_scale) * k_x + k_0.
template <class C>
struct Gradient {
    C k_dy, x_scale, k_x, k_0;
};
// dx = slope dy - through (sum_dy / n + (x - mean) inv_std^2 sum_dy_xc / n), Ioffe and Szegedy 2015, section 3, collected by powers, for a
// tensor u instead of x of which x_hat = (u - center) * u_inv_std: x itself, or y. slope is gamma r inv_std. So is `through`, unless the
// sums have gamma r in them already, being those of several groups; then it is inv_std. x_scale is u_inv_std rounded down to a power of
// two: multiplying by it is exact, and what is left of inv_std^2 fits C.
struct Slopes {
    double slope, through, inv_std, center, u_inv_std;
};
template <class C>
BATCHNORM_HOST_DEVICE Gradient<C> gradient(const Slopes& s, double sum_dy, double sum_dy_xc, double n) {
    const double scale = power_of_2(s.u_inv_std);
    const double k_x = -s.through * ((s.u_inv_std / scale) * (s.inv_std * (sum_dy_xc / n)));
    const double rest = s.center - static_cast<double>(static_cast<C>(s.center));
    return {static_cast<C>(s.slope), static_cast<C>(scale), static_cast<C>(k_x),
            static_cast<C>(-s.through * (sum_dy / n) - k_x * (scale * rest))};
}

// decay is the weight of the old value. At 0 the old value is gone and at 1 the new one, even if they are NaN.
BATCHNORM_HOST_DEVICE inline double running(double old, double batch, double decay) {
    return decay == 0 ? batch : decay == 1 ? old : decay * old + (1 - decay) * batch;
}

// Variance with n - ddof in the denominator, from the population variance.
BATCHNORM_HOST_DEVICE inline double with_ddof(double var, double n, double ddof) { return ddof == 0 ? var : var * (n / (n - ddof)); }

}  // namespace batchnorm::coeffs
