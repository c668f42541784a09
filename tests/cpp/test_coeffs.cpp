// core/coeffs.h and core/expansion.h: the numbers of one channel.
#include "core/coeffs.h"
#include "core/expansion.h"
#include "tensors.h"

namespace test {
namespace {

TEST(sums_carry_their_error) {
    coeffs::Sum s{0, 0};
    for (int i = 0; i < 1000; ++i) s.add(1), s.add(0x1p-60);
    CHECK(s.value == 1000 && s.total() == 1000 && s.kept_error() == 1000 * 0x1p-60);
    s.add(-1000);
    CHECK(s.total() == 1000 * 0x1p-60);
    for (const double v : {kInf, -kInf, kNaN}) {
        coeffs::Sum not_finite{1, 0};
        not_finite.add(v), not_finite.add(1);
        CHECK(near(not_finite.total(), v, 0) && not_finite.kept_error() == 0);
    }
}

TEST(moments_of_sums) {
    const coeffs::Moments m = coeffs::from_sums(6, 14, 10, 3, 4);  // of 11, 12, 13
    CHECK(m.mean == 12 && near(m.var, 2.0 / 3, 1e-15) && !m.trusted && m.better_shift == 12);
    CHECK(coeffs::from_sums(6, 14, 10, 3, 6).trusted);
    CHECK(coeffs::from_sums(3, 3 - 1e-9, 1, 3, 1e9).var == 0);  // rounding below 0
    const coeffs::Moments inf = coeffs::from_sums(kNaN, kNaN, kInf, 3, 4);
    CHECK(!inf.trusted && inf.better_shift == 0);
    CHECK(coeffs::from_sums(kInf, kInf, 0, 3, 4).trusted);
}

TEST(moments_of_sums_beyond_the_range) {
    for (const auto& [scale, unit] : {std::pair{coeffs::kFar, 0x1p990}, {coeffs::kNear, 0x1p-990}}) {
        const double scaled = unit * scale.s;  // of 11, 12, 13 units about 10
        const coeffs::Moments m = coeffs::from_scaled_sums(6 * scaled, 14 * scaled * scaled, 10 * unit, 3, scale);
        CHECK(m.mean == 12 * unit && m.trusted && near(m.var, 2.0 / 3 * scaled * scaled, 1e-15));
        CHECK(near(coeffs::inv_std(m.var, 0, scale), std::sqrt(1.5) / unit, 1e-15) && scale.s * scale.s == scale.square);
    }
    CHECK(near(coeffs::inv_std(4 * coeffs::kFar.square, 12, coeffs::kFar), 0.25, 1e-15));  // eps is scaled alike
}

TEST(nothing_is_divided_by_0) {
    CHECK(coeffs::inv_std(0, 0) == 0 && coeffs::inv_std(0, 4) == 0.5 && coeffs::inv_std(5e-324, 0) > 1e161);
    const coeffs::Renorm k = coeffs::renorm(3, 0, 1, 2, 0.25, 4, 5);
    CHECK(k.r == 0.25 && k.d == 1);
}

TEST(ratios_of_integers_are_correctly_rounded) {
    using Wide = coeffs::Uint128;
    Random random(1);
    bool good = true;
    for (int i = 0; i < 20'000; ++i) {
        const auto bits = [&](int64_t n) {
            const Wide high = static_cast<Wide>(random.below(int64_t{1} << std::min<int64_t>(n, 30))),
                       low = static_cast<Wide>(random.below(1 << 20));
            return high << std::max<int64_t>(n - 30, 0) | low;
        };
        const Wide a = bits(1 + random.below(100)), b = bits(1 + random.below(90)) + 1;
        const double got = coeffs::rounded_ratio(a, b);
        // No neighbour is nearer.
        const double below = std::nextafter(got, 0), above = std::nextafter(got, kInf);
        const long double exact = static_cast<long double>(a) / static_cast<long double>(b),
                          error = std::abs(exact - static_cast<long double>(got));
        const long double slack = exact * 0x1p-62L;
        good &= error <= std::abs(exact - static_cast<long double>(below)) + slack &&
                error <= std::abs(exact - static_cast<long double>(above)) + slack;
    }
    CHECK(good);
    // Halfway between two doubles, and a little beyond.
    const Wide one = 1;
    CHECK(coeffs::rounded_ratio((one << 54) + 2, 2) == 0x1p53 && coeffs::rounded_ratio((one << 54) + 6, 2) == 0x1p53 + 4);
    CHECK(coeffs::rounded_ratio(((one << 54) + 2) * 3 + 1, 6) == 0x1p53 + 2 &&
          coeffs::rounded_ratio(((one << 54) + 2) * 3 - 1, 6) == 0x1p53);
    CHECK(coeffs::rounded_ratio(0, 7) == 0 && coeffs::rounded_ratio(1, 3) == 1.0 / 3);
    const coeffs::IntegerMoments m = coeffs::from_integer_sums({-6, 0}, {14, 0}, 3, 1);
    CHECK(m.mean == -2 && m.var == 1);
    // What does not fit the doubles is in their errors: 2^53 + 1 is 3 * 3002399751580331.
    for (const double sign : {1.0, -1.0}) {
        CHECK(coeffs::from_integer_sums({sign * 0x1p53, sign}, {0x1p106, 0}, 3, 0).mean == sign * 3002399751580331.0);
    }
    CHECK(coeffs::from_integer_sums({-6, 0}, {14, 1}, 3, 0).var == 1);
}

TEST(affine_numbers) {
    const double mean = 1000.0001, inv_std = 0.5, gamma = 3, beta = -7;
    const auto f = coeffs::affine<float>(mean, inv_std, gamma, beta);
    CHECK(f.center == static_cast<float>(mean) && f.scale == 1.5f);
    CHECK(near(f.offset, beta - (mean - static_cast<double>(f.center)) * 1.5, 1e-6) && f.offset != static_cast<float>(beta));
    const auto d = coeffs::affine<double>(mean, inv_std, gamma, beta);
    CHECK(d.center == mean && d.scale == 1.5 && d.offset == beta);
    CHECK(coeffs::affine<float>(kInf, 1, 1, 2).offset == 2 && coeffs::affine<double>(0, kInf, 1, 2).offset == 2);
}

TEST(renorm_is_clipped) {
    const coeffs::Renorm k = coeffs::renorm(3, 0.5, 1, 4, 0, kInf, kInf);
    CHECK(k.r == 0.5 && k.d == 0.5);
    const coeffs::Renorm low = coeffs::renorm(-9, 0.5, 1, 4, 0.75, 2, 1), high = coeffs::renorm(9, 0.1, 1, 4, 0.75, 2, 1);
    CHECK(low.r == 0.75 && low.d == -1 && high.r == 2 && high.d == 1);
    const coeffs::Renorm nan = coeffs::renorm(kNaN, kNaN, 1, 4, 0.75, 2, 1);
    CHECK(std::isnan(nan.r) && std::isnan(nan.d));
}

TEST(gradient_numbers) {
    CHECK(coeffs::gradient_shift(5, 1, true) == 5 && coeffs::gradient_shift(5, 1, false) == 0);
    CHECK(coeffs::gradient_shift(1000.00001, 1, false) == static_cast<double>(1000.00001f));
    CHECK(coeffs::about_mean(2, 7, 3, 3) == 7 && coeffs::about_mean(2, 7, 3, 1) == 3 && coeffs::about_mean(kInf, 7, 3, 3) == 7);
    for (const double v : {1.0, 1.5, 3.0, 0x1p-700, 6.02e23}) {
        const double p = coeffs::power_of_2(-v);
        CHECK(p <= v && v < 2 * p && std::exp2(std::log2(p)) == p);
    }
    for (const double v : {0.0, kInf, kNaN, 0x1p-1060}) CHECK(coeffs::power_of_2(v) == 1);
    // dx = dy k_dy + ((x - center) x_scale) k_x + k_0 is slope (g - sum g / n - x_hat sum g x_hat / n).
    const double inv_std = 0.3, mean = 1.7, gamma = 2, n = 5, g = 0.5, x = 3, sum = 1.25, sum_xc = -4;
    const auto k = coeffs::gradient<double>({gamma * inv_std, gamma * inv_std, inv_std, mean, inv_std}, sum, sum_xc, n);
    const double want = gamma * inv_std * (g - sum / n - (x - mean) * inv_std * inv_std * sum_xc / n);
    CHECK(k.x_scale == 0.25 && near(g * k.k_dy + (x - mean) * k.x_scale * k.k_x + k.k_0, want, 1e-15));
    // A spread of 1e-25 in float: inv_std^2 would not fit, k_x does.
    CHECK(std::isfinite(coeffs::gradient<float>({1e20, 1e20, 1e20, 0, 1e20}, 1, 1e-20, 4).k_x));
}

TEST(running_steps) {
    CHECK(coeffs::running(8, 4, 0.75) == 7 && coeffs::running(kNaN, 4, 0) == 4 && coeffs::running(8, kNaN, 1) == 8);
    CHECK(coeffs::with_ddof(3, 4, 1) == 4 && coeffs::with_ddof(3, 4, 0) == 3 && std::isnan(coeffs::with_ddof(kNaN, 0, 0)));
}

TEST(expansions_are_exact) {
    Expansion<3> e{};
    for (const double v : {0x1p100, 1.0, 0x1p-50, -0x1p100, 0x1p-100}) e.add(v);
    CHECK(e.total() == 1 + 0x1p-50);
    e.add(-1), e.add(-0x1p-50);
    CHECK(e.total() == 0x1p-100);
    // In any order.
    Random random(2);
    Vector values;
    for (int i = 0; i < 50; ++i) values.push_back(std::ldexp(random.next(Dtype::float64), static_cast<int>(random.below(90)) - 45));
    Expansion<3> forwards{}, backwards{}, twice{};
    for (size_t i = 0; i < values.size(); ++i) forwards.add(values[i]), backwards.add(values[values.size() - 1 - i]);
    CHECK(forwards.total() == backwards.total());
    twice.add(forwards), twice.add(backwards);
    CHECK(twice.total() == 2 * forwards.total() && forwards.scaled(0x1p-10).total() == forwards.total() * 0x1p-10);
    Expansion<3> product{};
    product.add_product(1 + 0x1p-52, 1 - 0x1p-52), product.add(-1);
    CHECK(product.total() == -0x1p-104);
    product = {};
    product.add_product(3, 1 + 0x1p-50, 1 - 0x1p-50), product.add(-3);
    CHECK(product.total() == -3 * 0x1p-100);
    for (const double v : {kInf, -kInf, kNaN}) {
        Expansion<3> bad{};
        bad.add(1), bad.add(v), bad.add(2);
        CHECK(near(bad.total(), v, 0) && std::isfinite(bad.part[1]));
    }
}

}  // namespace
}  // namespace test
