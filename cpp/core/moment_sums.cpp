// Merging the sums of batches, and their mean and sum of squared deviations. A channel at a time, in doubles; no tensors, no threads.
#include "moment_sums.h"

#include <limits>

#include "check.h"
#include "float_mode.h"

namespace batchnorm {

// Everything is taken about the mean rounded to a double, m, before it is rounded: M2 = sum (x - m)^2 - (sum (x - m))^2 / n, where the
// second term is the square of the mean's own rounding. So nothing is left to cancel, and a constant channel gives exactly 0.
MeanM2 mean_m2(const BatchSum& count, const BatchSum& sum, const BatchSum& sum_sq) {
    const double n = count.total(), first = sum.part[0];
    if (!std::isfinite(first)) return {first / n, std::numeric_limits<double>::quiet_NaN()};
    const auto sum_about = [&](double m) {
        Expansion<4> s{};
        s.add(sum);
        for (const double part : count.part) s.add_product(-part, m);
        return s.total();
    };
    double m = sum.total() / n;
    m += sum_about(m) / n;
    const double rest = sum_about(m);
    Expansion<4> about_m{};
    about_m.add(sum_sq);
    for (const double part : sum.part) about_m.add_product(-2 * m, part);
    for (const double part : count.part) about_m.add_product(part, m, m);
    const double m2 = about_m.total() - rest * (rest / n);
    return {m, m2 < 0 ? 0 : m2};
}

inline namespace v0_2 {

void merge_moment_sums(std::span<double> sums, std::span<const double> others) {
    const FloatMode mode;
    const std::int64_t channels = check::merged_sums(sums, others);
    const SumsArray<double> into(sums.data(), channels);
    const SumsArray<const double> from(others.data(), channels);
    const auto merged = [](BatchSum a, const BatchSum& b) {
        a.add(b);
        return a;
    };
    for (std::int64_t c = 0; c < channels; ++c) {
        const double a = into.sum_sq(c).part[0], b = from.sum_sq(c).part[0];
        if (std::isfinite(a) && std::isfinite(b) && !std::isfinite(a + b)) check::squares_overflow("others", c);
    }
    for (std::int64_t c = 0; c < channels; ++c) {
        into.set_count(c, merged(into.count(c), from.count(c)));
        into.set_sum(c, merged(into.sum(c), from.sum(c)));
        into.set_sum_sq(c, merged(into.sum_sq(c), from.sum_sq(c)));
    }
}

void moments_from_sums(std::span<const double> sums, std::span<double> count, std::span<double> mean, std::span<double> m2) {
    const FloatMode mode;
    const std::int64_t channels = check::sums_to_moments(sums, count, mean, m2);
    const SumsArray<const double> from(sums.data(), channels);
    for (std::int64_t c = 0; c < channels; ++c) {
        const MeanM2 moments = mean_m2(from.count(c), from.sum(c), from.sum_sq(c));
        count[index(c)] = from.count(c).total();
        mean[index(c)] = moments.mean;
        m2[index(c)] = moments.m2;
    }
}

}  // namespace v0_2

}  // namespace batchnorm
