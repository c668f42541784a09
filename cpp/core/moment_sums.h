// The sums of batches that are merged, sum x and sum x^2 about 0, as the caller's array holds them. Made by the driver moment_sums
// from the sums of one call, merged and turned into moments in moment_sums.cpp.
#pragma once

#include <cstdint>

#include "coeffs.h"
#include "expansion.h"

namespace batchnorm {

// Three doubles: for |mean| / std = 1e6 the squares' sum loses 40 of its bits when the mean's square comes off, so 106 would do for the
// variance; with 159 the result is the same in any order, and a constant double channel, whose n x^2 takes that many, has variance 0.
using BatchSum = Expansion<3>;

// The caller's array: of each channel's counts all first parts, all second, all third; then the sums, then those of squares. T: double or
// const double.
template <class T>
class SumsArray {
public:
    SumsArray(T* data, std::int64_t channels) : data_(data), channels_(channels) {}
    BatchSum count(std::int64_t c) const { return get(0, c); }
    BatchSum sum(std::int64_t c) const { return get(1, c); }
    BatchSum sum_sq(std::int64_t c) const { return get(2, c); }
    void set_count(std::int64_t c, const BatchSum& n) const { set(0, c, n); }
    void set_sum(std::int64_t c, const BatchSum& s) const { set(1, c, s); }
    void set_sum_sq(std::int64_t c, const BatchSum& s) const { set(2, c, s); }

private:
    T* at(std::int64_t which, std::int64_t c) const { return data_ + 3 * which * channels_ + c; }
    BatchSum get(std::int64_t which, std::int64_t c) const {
        const T* const p = at(which, c);
        return {{p[0], p[channels_], p[2 * channels_]}};
    }
    void set(std::int64_t which, std::int64_t c, const BatchSum& s) const {
        for (std::int64_t i = 0; i < 3; ++i) at(which, c)[i * channels_] = s.part[i];
    }
    T* data_;
    std::int64_t channels_;
};

// One batch's sums about 0, from those about `shift`: sum x = s + n K, sum x^2 = q + 2 K s + n K^2, exactly.
inline BatchSum sum_about_0(const coeffs::Sum& s, double shift, double n) {
    BatchSum result{};
    result.add(s.value);
    result.add(s.kept_error());
    if (shift != 0) result.add_product(n, shift);
    return result;
}
inline BatchSum sum_sq_about_0(const coeffs::Sum& s, const coeffs::Sum& q, double shift, double n) {
    BatchSum result{};
    result.add(q.value);
    result.add(q.kept_error());
    if (shift == 0) return result;
    result.add_product(2 * shift, s.value);
    result.add_product(2 * shift, s.kept_error());
    result.add_product(n, shift, shift);
    return result;
}

// Mean and sum of squared deviations from it.
struct MeanM2 {
    double mean, m2;
};
MeanM2 mean_m2(const BatchSum& count, const BatchSum& sum, const BatchSum& sum_sq);

}  // namespace batchnorm
