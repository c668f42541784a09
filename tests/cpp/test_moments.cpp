// moments, the sums that are merged, and update_running.
#include "example.h"
#include "problem.h"

namespace test {
namespace {

// Sums of multiples of 1/8 are exact in double, and so are mean and variance if the channel's values are base + deviations whose sum is 0:
// no tolerance at all.
TEST(exact_statistics) {
    for (const Dtype dtype : kFloating) {
        for (const Shape& s : kShapes) {
            if (s.count() % 2 != 0) continue;
            Vector values(static_cast<size_t>(s.elements())), mean, var;
            for (int64_t c = 0; c < s.channels; ++c)
                mean.push_back(static_cast<double>(c % 7 * 16)), var.push_back(static_cast<double>((1 + c % 4) * (1 + c % 4)));
            for (size_t i = 0; i < values.size(); ++i) {
                const int64_t c = s.channel(i), o = static_cast<int64_t>(i) / s.inner / s.channels,
                              at = o * s.inner + static_cast<int64_t>(i) % s.inner;
                values[i] = mean[static_cast<size_t>(c)] + static_cast<double>(at % 2 == 0 ? 1 + c % 4 : -1 - c % 4);
            }
            for (const Layout& layout : {kRuns[0], kRows[0]}) {
                context = std::string(format(dtype).name) + " " + text(s) + " " + layout.name;
                const Array x(dtype, layout, s, values);
                Vector got_mean(mean.size()), got_var(mean.size());
                for (const double weight : {0.0, 2.0, 0x1p-1000, 0x1p900}) {  // of all values; 0: none
                    moments(x, got_mean, got_var, 0, 0, {{}, Vector(weight > 0 ? 1 : 0, weight)});
                    CHECK(got_mean == mean && got_var == var);
                }
                if (s.count() != 2) continue;
                moments(x, got_mean, got_var, 1);
                CHECK(got_var[0] == 2 * var[0]);
            }
        }
    }
}

// A channel that is constant has variance 0 and, normalised, is beta.
TEST(constant_channels) {
    for (const Dtype dtype : kFloating) {
        for (const Layout& layout : {kRuns[0], kRows[0]}) {
            context = format(dtype).name;
            const Shape s{6, 3, 50};
            const double value = rounded(dtype, 6.7);
            const Array x(dtype, layout, s, Vector(900, value));
            Array y(dtype, layout, s);
            const Vector beta{1, -0.3, 4.4};
            Vector want(900), uneven;
            for (size_t i = 0; i < 900; ++i) want[i] = rounded(dtype, beta[static_cast<size_t>(s.channel(i))]);
            for (int i = 0; i < 300; ++i) uneven.push_back(0.1 * (1 + i % 7));
            for (const Vector& weights : {Vector(), uneven}) {
                Saved saved;
                batch_norm_train({.x = x, .y = y, .beta = beta, .positions = {{}, weights}, .saved = &saved});
                CHECK(vector(saved.var()) == Vector(3, 0.0) && y.values() == want);
                CHECK(!weights.empty() || vector(saved.mean()) == Vector(3, value));
            }
        }
    }
}

// Fewer values than positions stand for as many positions each, and a channel stride of 0 for all channels.
TEST(values_for_several_positions) {
    const Shape s{4, 5, 6};
    const Data d({.shape = s});
    for (const Layout& layout : {kRuns[0], kRows[1], kRuns[2], kRows[3]}) {
        const Array x(Dtype::float32, layout, s, d.x);
        const auto results = [&](const Positions& positions) {
            Vector all(5), var(5);
            moments(x, all, var, 0, 0, positions);
            Array y(Dtype::float32, layout, s);
            Saved saved;
            batch_norm_train({.x = x, .y = y, .positions = positions, .part_outer = 2, .saved = &saved});
            for (const Vector& v : {var, vector(saved.mean()), vector(saved.var()), y.values()}) all.insert(all.end(), v.begin(), v.end());
            return all;
        };
        for (const size_t n : {1u, 2u, 4u, 8u, 12u}) {
            context = std::string(layout.name) + ", " + std::to_string(n) + " values";
            std::vector<std::uint8_t> mask, full_mask(24), elements(120);
            Vector weights, full_weights(24), spoilt(24);
            for (size_t i = 0; i < n; ++i)
                mask.push_back(i % 3 != 1 ? static_cast<std::uint8_t>(7 + i) : 0), weights.push_back(0.5 + static_cast<double>(i));
            for (size_t p = 0; p < 24; ++p) {
                full_mask[p] = mask[p / (24 / n)], full_weights[p] = weights[p / (24 / n)];
                spoilt[p] = full_mask[p] != 0 ? full_weights[p] : p % 2 == 0 ? kNaN : -1;  // where a mask excludes
                for (size_t c = 0; c < 5; ++c) elements[p / 6 * 30 + c * 6 + p % 6] = full_mask[p];
            }
            CHECK(same(results({mask, {}}), results({full_mask, {}})) && same(results({{}, weights}), results({{}, full_weights})));
            CHECK(same(results({mask, weights}), results({full_mask, full_weights})) &&
                  same(results({full_mask, weights}), results({mask, full_weights})));
            CHECK(same(results({mask, spoilt}), results({mask, full_weights})) &&
                  same(results({{}, Vector(n, 8.0)}), results({{}, Vector(24, 0.5)})));
            const View<std::uint8_t> repeated{full_mask.data(), 4, 5, 6, 6, 0, 1};
            CHECK(same(results({{}, {}, View<std::uint8_t>::ncs(elements.data(), 4, 5, 6)}), results({{}, {}, repeated})));
            const Vector a = results({{}, {}, repeated}), b = results({mask, {}});
            CHECK(std::equal(a.begin(), a.end(), b.begin(), [](double v, double w) { return near(v, w, 1e-6 * (1 + std::abs(w))); }));
        }
    }
}

// 1e6 rows far from 0: the error of the variance stays near roundoff.
TEST(float64_at_scale) {
    const int64_t n = quick ? 1 << 17 : 1 << 20;
    Random random(12);
    for (const Layout& layout : {kRuns[0], kRows[0]}) {
        for (const double far : {0.0, 1000.0, 1e8}) {
            context = std::string(layout.name) + " " + std::to_string(far);
            Vector x;
            for (int64_t i = 0; i < n; ++i)
                x.push_back(far + (i < 16 ? 1.7 : (random.next(Dtype::float64) + random.next(Dtype::float64)) / 6.5));
            long double sum = 0, squares = 0;
            for (const double v : x) sum += v - far;
            const long double mean = sum / n;
            for (const double v : x) squares += (v - far - mean) * (v - far - mean);
            const double want_mean = static_cast<double>(far + mean), want = static_cast<double>(squares / n);
            const Array tensor(Dtype::float64, layout, {n, 1, 1}, x);
            Vector got_mean(1), got(1), sums(9), count(1), m2(1);
            moments(tensor, got_mean, got);
            CHECK(near(got_mean[0], want_mean, 1e-15 + 2e-16 * far) && near(got[0], want, 4e-15 * want));
            moment_sums(tensor, sums);
            moments_from_sums(sums, count, got_mean, m2);
            CHECK(near(got_mean[0], want_mean, 1e-15 + 2e-16 * far) && near(m2[0] / static_cast<double>(n), want, 2e-15 * want));
        }
    }
    // Values near the largest.
    Vector huge(40, 4e306), mean(1), var(1);
    for (size_t i = 0; i < 40; i += 2) huge[i] = 2e306;
    moments(rows(huge, 1), mean, var);
    CHECK(near(mean[0], 3e306, 1e291) && !std::isfinite(var[0]));
}

TEST(sums_merge_in_any_order) {
    for (const Dtype dtype : kFloating) {
        for (const Shape& s : kShapes) {
            if (s.outer < 2 || s.outer > 3000) continue;
            context = std::string(format(dtype).name) + " " + text(s);
            const Data d({.dtype = dtype, .shape = s});
            const Array x(dtype, kRuns[0], s, d.x);
            const size_t size = static_cast<size_t>(moment_sums_size(s.channels)), channels = static_cast<size_t>(s.channels);
            Vector forwards(size), backwards(size), batch(size), count(channels), mean(channels), m2(channels), other_mean(channels),
                other_m2(channels), var(channels);
            for (int64_t n = 0; n < s.outer; ++n) {
                for (Vector* const sums : {&forwards, &backwards}) {
                    ConstTensor one = x;
                    one.data = static_cast<const char*>(one.data) +
                               (sums == &forwards ? n : s.outer - 1 - n) * one.outer_stride * static_cast<int64_t>(format(dtype).size);
                    one.outer = 1;
                    moment_sums(one, batch);
                    merge_moment_sums(*sums, batch);
                }
            }
            moments_from_sums(backwards, count, other_mean, other_m2);
            moments_from_sums(forwards, count, mean, m2);
            CHECK(same(mean, other_mean) && same(m2, other_m2) && count == Vector(channels, static_cast<double>(s.count())));
            moments(x, other_mean, var);
            bool close = true;
            for (size_t c = 0; c < channels; ++c) {
                close &= near(mean[c], other_mean[c], 1e-13 * (std::abs(mean[c]) + std::sqrt(var[c])));
                close &= near(m2[c] / static_cast<double>(s.count()), var[c], 1e-11 * var[c]);
            }
            CHECK(close);
            merge_moment_sums(forwards, forwards);
            moments_from_sums(forwards, count, other_mean, other_m2);
            CHECK(same(mean, other_mean) && other_m2[0] == 2 * m2[0] && count[0] == static_cast<double>(2 * s.count()));
        }
    }
}

TEST(sums_of_elements_and_of_nothing) {
    Vector sums(27, 7.0), count(3), mean(3), m2(3), var(3);
    moment_sums(View<float>::ncs(nullptr, 0, 3, 5), sums);
    CHECK(sums == Vector(27, 0.0));
    moments_from_sums(sums, count, mean, m2);
    CHECK(count == Vector(3, 0.0) && std::isnan(mean[0]) && std::isnan(m2[2]));
    moments(View<float>::ncs(nullptr, 4, 3, 0), mean, var, 2);
    CHECK(std::isnan(mean[1]) && std::isnan(var[2]));
    // Each channel has a count of its own.
    Floats x{1, 10, kNaNf, 3, 30, 300, 5, 50, 500};
    std::vector<std::uint8_t> elements{1, 0, 0, 1, 1, 0, 1, 0, 0}, pixels{1, 2, 3, 4};
    const Positions some{{}, {}, rows(elements, 3)};
    moment_sums(rows(x, 3), sums, 0, some);
    moments_from_sums(sums, count, mean, m2);
    CHECK(count == (Vector{3, 1, 0}) && mean[0] == 3 && m2[0] == 8 && mean[1] == 30 && m2[1] == 0 && std::isnan(mean[2]));
    moments(rows(x, 3), mean, var, 1, 0, some);
    CHECK(mean[0] == 3 && var[0] == 4 && mean[1] == 30 && std::isnan(var[1]) && std::isnan(mean[2]) && std::isnan(var[2]));
    moments(rows(x, 3), mean, var, 2, 0, some);
    CHECK(var[0] == 8 && std::isnan(var[1]) && std::isnan(var[2]));
    // Of a type without fractions.
    const std::span<double> one(mean.data(), 1), other(var.data(), 1);
    moments(rows(pixels, 1), one, other, 0, 0, {{}, Vector{1, 0, 0, 3}});
    CHECK(mean[0] == 3.25 && var[0] == 1.6875);
    moments(rows(pixels, 1), one, other, 1, 0, {std::vector<std::uint8_t>{1, 0, 0, 1}, {}});
    CHECK(mean[0] == 2.5 && var[0] == 4.5);
}

TEST(moments_of_integers_are_exact) {
    for (const Dtype dtype : {Dtype::uint8, Dtype::int16, Dtype::uint16}) {
        for (const Shape& s : {Shape{3, 3, 37}, Shape{700, 65, 1}, Shape{2, 2, 9000}, Shape{13000, 3, 1}}) {
            Vector values;
            for (int64_t i = 0; i < s.elements(); ++i) {
                const int64_t low = dtype == Dtype::int16 ? -32768 : 0, most = dtype == Dtype::uint8 ? 255 : low + 65535;
                values.push_back(static_cast<double>(i % 11 == 0 ? low : i % 13 == 0 ? most : low + i * 37 % 251));
            }
            for (const Layout& layout : {kRuns[0], kRuns[1], kRows[0], kRows[2]}) {
                context = std::string(format(dtype).name) + " " + text(s) + " " + layout.name;
                const Array x(dtype, layout, s, values);
                Vector mean(static_cast<size_t>(s.channels)), var = mean;
                moments(x, mean, var);
                bool good = true;
                for (int64_t c = 0; c < s.channels; ++c) {
                    int64_t total = 0, squares = 0;
                    for (int64_t p = 0; p < s.count(); ++p) {
                        const auto v = static_cast<int64_t>(values[s.at(p / s.inner, c, p % s.inner)]);
                        total += v, squares += v * v;
                    }
                    const long double n = static_cast<long double>(s.count());
                    const int64_t m2 = squares * s.count() - total * total;  // below 2^63
                    good &= mean[static_cast<size_t>(c)] == static_cast<double>(static_cast<long double>(total) / n);
                    good &= var[static_cast<size_t>(c)] == static_cast<double>(static_cast<long double>(m2) / (n * n));
                }
                CHECK(good);
            }
        }
    }
}

TEST(update_running_by_itself) {
    Vector mean{10, 20}, var{1, 2}, batch_mean{2, 4}, batch_var{8, 16}, count{5, 5};
    const Vector seen{15, 0}, decays{1, 0.5};
    UpdateRunningArgs a{.running = {.mean = mean, .var = var, .decay = 0.75}, .mean = batch_mean, .var = batch_var, .count = count};
    const auto updated = [&](const Vector& want_mean, const Vector& want_var) {
        update_running(a);
        return mean == want_mean && var == want_var;
    };
    CHECK(updated({8, 16}, {0.75 + 0.25 * 10, 1.5 + 0.25 * 20}));
    a.running.ddof = 0, a.running.decay = 0;
    CHECK(updated(batch_mean, batch_var));
    a.running.decay = 1, batch_mean = {kNaN, 0};
    CHECK(updated({2, 4}, batch_var));
    // Each channel by its own count, decay or number of values seen; what has fewer than two values stays.
    a.running.seen = seen, batch_mean = {6, 7};
    CHECK(updated({3, 7}, batch_var));
    a.running.seen = {}, a.running.decays = decays, mean = {1, 1}, count = {5, 2};
    CHECK(updated({1, 4}, batch_var));
    a.running.ddof = 1, a.running.decays = {}, a.running.decay = 0.5, mean = var = {1, 1}, count = {1, 2}, batch_var = {3, 3};
    CHECK(updated({1, 4}, {1, 0.5 + 0.5 * 6}));
    // Two columns of one array, and strides that run backwards.
    Floats table{10, 1, 20, 2}, batch{4, 2};
    count = {5, 5};
    a.running.mean = Channels(table.data(), false, 2, 2), a.running.var = Channels(table.data() + 1, false, 2, 2);
    a.mean = ConstChannels(batch.data() + 1, false, 2, -1), a.var = batch;
    update_running(a);
    CHECK(table == (Floats{6, 3, 12, 2.25}));
}

}  // namespace
}  // namespace test
