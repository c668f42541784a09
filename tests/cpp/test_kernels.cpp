// The kernels of every level through the public interface: the same bits whatever the level, the threads, the strides, the tuning; rounding
// to 16 bits; accuracy of the activations.
#include "problem.h"

namespace test {
namespace {

constexpr Shape kBitShapes[] = {{3, 5, 7}, {2, 17, 33}, {3, 40, 300}, {2, 3, 20000}, {9, 70, 64}, {1300, 3, 9}, {39, 4, 13}};

// Problems that between them reach every kernel.
std::vector<Problem> problems(Dtype dtype, const Shape& shape, int64_t n) {
    Random random(shape.elements() + static_cast<int>(dtype));
    std::vector<Problem> all{
        {.dtype = dtype, .shape = shape, .activation = Activation::relu},
        {.dtype = dtype, .shape = shape, .activation = Activation::relu, .residual = true},
        {.dtype = dtype, .shape = shape, .mask = true, .weights = true, .activation = Activation::silu, .residual = true}};
    all.resize(static_cast<size_t>(std::min<int64_t>(n, 3)));
    while (static_cast<int64_t>(all.size()) < n) all.push_back(random_problem(random, dtype, shape));
    return all;
}

template <class Layouts>
void test_same_bits(const Problem& p, const Layouts& layouts, const std::string& best) {
    const Data d(p);
    const auto bits = [&](const Layout& layout, Place place, const std::string& how) {
        context = text(p) + " " + layout.name + " " + how;
        return run(p, d, layout, place);
    };
    set_isa(best);
    set_tuning("");
    set_num_threads(1);
    const Outcome want = bits(layouts[0], Place::apart, "");
    for (const Layout& layout : layouts) {
        for (const Place place : {Place::apart, Place::first, Place::second}) CHECK(bits(layout, place, "").same_bits(want));
    }
    for (const std::string& level : isa_levels()) {
        for (const int threads : {1, 2, 3, 7}) {
            set_isa(level);
            set_num_threads(threads);
            CHECK(bits(layouts[0], Place::apart, level + ", " + std::to_string(threads) + " threads").same_bits(want));
        }
    }
    for (const char* const settings : kTunings) {
        for (const int threads : {1, 3}) {
            set_tuning(settings);
            set_num_threads(threads);
            CHECK(bits(layouts[threads == 1 ? 0 : 1], threads == 3 ? Place::second : Place::apart, settings).same_bits(want));
        }
    }
}

TEST(same_bits_always) {
    const std::string best = isa();
    for (const Dtype dtype : kFloating) {
        for (const Shape& shape : kBitShapes) {
            if (quick && shape.elements() > 2000) continue;
            for (const Problem& p : problems(dtype, shape, quick ? 2 : shape.elements() > 20000 ? 4 : 8)) {
                test_same_bits(p, kRuns, best);
                test_same_bits(p, kRows, best);
            }
        }
    }
}

// Runs of one element, neither dimension contiguous: slow, but served, and the same numbers as of rows.
TEST(every_other_column) {
    for (const Dtype dtype : kFloating) {
        for (const Problem& p : problems(dtype, {21, 5, 1}, 12)) {
            context = text(p);
            const Data d(p);
            const Outcome a = run(p, d, kColumns), b = run(p, d, kRows[0]);
            const auto close = [](double v, double w) { return near(v, w, 1e-5 * std::abs(w) + 1e-5); };
            for (const char* const name : {"y", "dx"}) CHECK(std::equal(a.of(name).begin(), a.of(name).end(), b.of(name).begin(), close));
        }
    }
}

// Integers of 10 bits and more, between two values of a 16-bit type: to the nearest, halfway cases to even.
TEST(rounding_to_16_bits) {
    std::vector<std::uint16_t> x(65536);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(i);
    const Vector zero(1), one(1, 1);
    for (const std::string& level : isa_levels()) {
        set_isa(level);
        for (const Dtype dtype : {Dtype::float16, Dtype::bfloat16}) {
            context = level + " " + format(dtype).name;
            const Shape s{1, 1, 65536};
            Array y(dtype, kRuns[0], s), again(dtype, kRuns[0], s), half(dtype, kRuns[0], s, Vector(65536, 0.5));
            batch_norm({.x = View<const std::uint16_t>::ncs(x.data(), 1, 1, 65536), .y = y, .mean = zero, .var = one, .eps = 0});
            Vector want(65536);
            for (size_t i = 0; i < want.size(); ++i) want[i] = rounded(dtype, static_cast<double>(i));
            CHECK(y.values() == want);
            // The same by the kernels of floating tensors: y + 1/2 lies between two values from 1024 (128) on.
            batch_norm({.x = y, .y = again, .residual = half, .mean = zero, .var = one, .eps = 0});
            for (double& v : want) v = rounded(dtype, v + 0.5);
            CHECK(again.values() == want);
        }
    }
}

// act(v), act'(v).
std::pair<long double, long double> exact(Activation a, long double v) {
    const long double e = std::exp(-std::abs(v)), s = (v < 0 ? e : 1) / (1 + e), slope = e / ((1 + e) * (1 + e)), e2 = e * e;
    if (a == Activation::sigmoid) return {s, slope};
    if (a == Activation::tanh) return {std::tanh(v), 4 * e2 / ((1 + e2) * (1 + e2))};
    return {v * s, s + v * slope};
}
double ulps(Dtype t, double got, long double want, long double size) {
    int exponent = 0;
    std::frexp(static_cast<double>(size), &exponent);
    return static_cast<double>(std::abs(got - want)) / std::ldexp(1, std::max(exponent - 1, format(t).low) - format(t).fraction);
}

// Errors of an activation and of its derivative in units of the last place, over all that matters.
void test_accuracy(Dtype dtype, Activation a, double bound, double slope_bound) {
    const int64_t n = quick ? 20'000 : 400'000;
    const double sizes[] = {1.0 / 8, 1.0, dtype == Dtype::float64 ? 80.0 : 11.0};
    Vector xs;
    Random random(11);
    for (int64_t i = 0; i < n; ++i) xs.push_back(rounded(dtype, random.next(dtype) * sizes[i % 3]));
    const Array x(dtype, kRuns[0], {1, 1, n}, xs), dy(dtype, kRuns[0], {1, 1, n}, Vector(xs.size(), 1.0));
    Array y(dtype, kRuns[0], {1, 1, n}), dx(dtype, kRuns[0], {1, 1, n});
    const Vector zero(1), one(1, 1);
    Saved saved;
    batch_norm({.x = x, .y = y, .mean = zero, .var = one, .eps = 0, .activation = a, .saved = &saved});
    batch_norm_backward({.dy = dy, .kept = x, .saved = &saved, .dx = dx});
    double worst = 0, worst_slope = 0;
    const Vector ys = y.finish(), dxs = dx.finish();
    for (size_t i = 0; i < xs.size(); ++i) {
        const auto [value, slope] = exact(a, xs[i]);
        worst = std::max(worst, ulps(dtype, ys[i], value, value));
        // The slope of silu goes through 0: what it is made of counts.
        const long double made_of = a == Activation::silu ? std::max(exact(Activation::sigmoid, xs[i]).first, std::abs(slope)) : slope;
        worst_slope = std::max(worst_slope, ulps(dtype, dxs[i], slope, made_of));
    }
    context = std::string(format(dtype).name) + " activation " + std::to_string(static_cast<int>(a)) + ": " + std::to_string(worst) +
              " ulp, of the slope " + std::to_string(worst_slope);
    CHECK(worst <= bound && worst_slope <= slope_bound);
}

TEST(accuracy_of_activations) {
    for (const Dtype dtype : {Dtype::float32, Dtype::float64}) {
        test_accuracy(dtype, Activation::sigmoid, 2.5, 4.25);
        test_accuracy(dtype, Activation::tanh, 2.75, 4.25);
        test_accuracy(dtype, Activation::silu, 3, 5.75);
    }
}

}  // namespace

std::uint64_t hash_of_results() {
    std::uint64_t hash = 14695981039346656037u;  // FNV-1a
    const auto add = [&](double v) {
        if (std::isnan(v)) v = kNaN;  // its sign is the processor's
        for (int shift = 0; shift < 64; shift += 8) hash = (hash ^ (std::bit_cast<std::uint64_t>(v) >> shift & 0xff)) * 1099511628211u;
    };
    for (const Dtype dtype : kFloating) {
        for (const Shape& shape : kShapes) {
            for (const Problem& p : problems(dtype, shape, 4)) {
                const Data d(p);
                for (const Layout& layout : {kRuns[1], kRows[0]}) {
                    for (const auto& [name, values] : run(p, d, layout)) std::for_each(values.begin(), values.end(), add);
                }
            }
        }
    }
    return hash;
}

}  // namespace test
