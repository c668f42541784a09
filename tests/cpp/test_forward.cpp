// Forward calls by what each option means: images, edges, running statistics. All options together: test_combinations.cpp.
#include "example.h"
#include "problem.h"

namespace test {
namespace {

// ---- images ----

// What batch_norm of the values as doubles gives, rounded to float, and from there to 16 bits; also from rows to runs, and with gaps.
void test_images(Dtype dtype, const Shape& s, Random& random) {
    Vector values, mean, var, gamma;
    std::vector<std::uint8_t> mask;
    const int64_t low = dtype == Dtype::int16 ? -15000 : 0, n = dtype == Dtype::uint8 ? 256 : 30000;
    for (int64_t i = 0; i < s.elements(); ++i) values.push_back(static_cast<double>(low + random.below(n)));
    for (int64_t c = 0; c < s.channels; ++c)
        mean.push_back(random.next(Dtype::float64) * 9), var.push_back(random.next(Dtype::float64) * 90 + 800);
    for (int64_t i = 0; i < s.outer * s.channels; ++i) gamma.push_back(random.next(Dtype::float32));
    for (int64_t i = 0; i < s.count(); ++i) mask.push_back(i % 4 != 1);
    for (int bits = 0; bits < 16; ++bits) {
        Forward f{.mean = mean, .var = var, .slope = 0.5};
        f.gamma = ConstRows(ConstChannels(gamma.data(), true, s.channels, 1), bits & 1 ? s.outer : 0, s.channels);
        if (bits & 2) f.positions.mask = mask;
        if (bits & 4) f.activation = Activation::leaky_relu;
        const Array doubles(Dtype::float64, kRuns[0], s, values);
        Array wanted(Dtype::float64, kRuns[0], s);
        f.x = doubles, f.y = wanted;
        batch_norm(f);
        const Vector want = wanted.values();
        const Layout from = kRows[bits & 8 ? 1 : 2], ways[] = {kRuns[0], kRuns[1], kRuns[3], kRows[1], kRows[2]};
        for (int way = 0; way < 6; ++way) {
            const Layout &x_layout = way < 5 ? from : kRuns[bits & 8 ? 0 : 1], &y_layout = ways[way < 5 ? way : 1];
            for (const Dtype out : kFloating) {
                context = std::string(format(dtype).name) + " to " + format(out).name + " " + text(s) + " " + x_layout.name + ", " +
                          y_layout.name;
                const Array x(dtype, x_layout, s, values);
                Array y(out, y_layout, s);
                f.x = x, f.y = y;
                batch_norm(f);
                Vector rounded_want = want;
                for (double& v : rounded_want) v = out == Dtype::float64 ? v : rounded(out, rounded(Dtype::float32, v));
                CHECK(y.finish() == rounded_want);
            }
        }
    }
}

TEST(images) {
    Random random(22);
    const std::string best = isa();
    for (const std::string& level : isa_levels()) {
        if (quick && level != best) continue;
        set_isa(level);
        for (const Dtype dtype : {Dtype::uint8, Dtype::int16, Dtype::uint16}) {
            for (const Shape& s : {Shape{3, 3, 37}, Shape{2, 3, 4}, Shape{2, 70, 9}, Shape{65, 1, 1}, Shape{1, 2, 65}, Shape{2, 2, 2500}})
                test_images(dtype, s, random);
        }
    }
    // A residual has y's type.
    std::vector<std::uint8_t> x{1, 2, 3, 4};
    Floats y(4), z{0.5f, -9, 1, 2};
    const Vector zero(1), one(1, 1);
    batch_norm(
        {.x = rows(x, 1), .y = rows(y, 1), .residual = rows(z, 1), .mean = zero, .var = one, .eps = 0, .activation = Activation::relu});
    CHECK(y == (Floats{1.5f, 0, 4, 6}));
}

// ---- edges ----

TEST(no_values) {
    for (const Shape s : {Shape{0, 3, 5}, Shape{4, 3, 0}, Shape{0, 3, 1}}) {
        for (const int64_t part_outer : {0, 1, 2}) {
            context = text(s);
            const auto empty = View<float>::ncs(nullptr, s.outer, s.channels, s.inner);
            Example e;
            Forward f{.x = empty, .y = empty, .gamma = e.gamma, .part_outer = part_outer, .saved = &e.saved};
            f.running = {.mean = e.running_mean, .var = e.running_var};
            batch_norm_train(f);
            CHECK(!e.saved.empty() && std::isnan(e.saved.mean()[2]) && std::isnan(e.saved.inv_std()[0]) && e.saved.count()[0] == 0);
            CHECK(e.running_mean == (Floats{1, 2, 3}) && e.running_var == (Floats{1, 2, 3}) && !e.saved.updated());
            Backward b{.dy = empty, .kept = empty, .saved = &e.saved, .dx = empty, .dgamma = e.dgamma, .dbeta = e.dbeta};
            batch_norm_backward(b);
            CHECK(e.dgamma == Floats(3) && e.dbeta == Floats(3));
            f.running = {}, f.mean = e.mean, f.var = e.var;
            batch_norm(f);
            f.keep = Keep::y, f.renorm = {.enabled = true, .mean = e.own_mean, .std = e.own_std};
            batch_norm_train(f);
            e.dgamma = e.dbeta = {7, 8, 9};
            batch_norm_backward(b);
            CHECK(e.dgamma == Floats(3) && e.dbeta == Floats(3));
            e.dgamma = {7, 8, 9};
            batch_norm_double_backward({.dy = empty, .kept = empty, .saved = &e.saved, .ddx = empty, .dx = empty, .dgamma = e.dgamma});
            CHECK(e.dgamma == Floats(3));
        }
    }
}

TEST(nothing_counts) {
    const std::vector<std::uint8_t> none(60);
    const Vector zeros(20);
    for (const Positions& positions : {Positions{{none.data(), 20}, {}}, Positions{{}, zeros}, Positions{{}, {}, runs(none)}}) {
        Example e;
        Forward f = e.train();
        f.activation = Activation::sigmoid, f.positions = positions, f.running.on_nonfinite = OnNonfinite::raise, f.saved = &e.saved;
        batch_norm_train(f);
        CHECK(std::isnan(e.saved.mean()[0]) && std::isnan(e.saved.var()[2]) && e.saved.count()[1] == 0 && !e.saved.updated());
        CHECK(e.running_mean == (Floats{1, 2, 3}) && e.running_var == e.running_mean);
        Backward b = e.back();
        b.dresidual = runs(e.dz);
        batch_norm_backward(b);
        Floats zero_then_7(120, 7);
        std::fill_n(zero_then_7.begin(), 60, 0.0f);
        CHECK(e.y == zero_then_7 && e.dx == zero_then_7 && e.dz == zero_then_7 && e.dgamma == Floats(3) && e.dbeta == Floats(3));
    }
}

// Of a single value x_hat is 0; neither it nor a channel without any enters running statistics.
TEST(single_values) {
    Floats x{1, 5, 7, 2, 6, 8}, y(6), dx(6, 9), mean{0, 0, 0}, var{1, 1, 1}, dgamma(3), dbeta(3), dy(6, 1.0f);
    const Floats gamma{2, 3, 4}, beta{-1, 1, 0.5f};
    std::vector<std::uint8_t> elements{1, 1, 0, 1, 0, 0};  // two values of channel 0, one of 1, none of 2
    Saved saved;
    for (const double eps : {0.0, 1e-5}) {
        Forward f{.x = rows(x, 3), .y = rows(y, 3), .gamma = gamma, .beta = beta, .eps = eps, .saved = &saved};
        f.positions.element_mask = rows(elements, 3), f.running = {.mean = mean, .var = var, .decay = eps == 0 ? 0.5 : 1};
        batch_norm_train(f);
        CHECK(near(y[0], -3, 1e-4) && near(y[3], 1, 1e-4) && y[1] == 1 && y[4] == 0 && y[2] == 0 && y[5] == 0);
        CHECK(mean == (Floats{0.75f, 0, 0}) && var == (Floats{0.75f, 1, 1}) && saved.updated());
        CHECK(saved.count()[0] == 2 && saved.count()[1] == 1 && saved.count()[2] == 0 && saved.var()[1] == 0 &&
              std::isnan(saved.mean()[2]));
        batch_norm_backward({.dy = rows(dy, 3), .kept = rows(x, 3), .saved = &saved, .dx = rows(dx, 3), .dgamma = dgamma, .dbeta = dbeta});
        CHECK(dx == Floats(6) && dgamma == Floats(3) && dbeta == (Floats{2, 1, 0}));
    }
    // Beside values of weight 0 too: part 0 has one value that counts, part 1 two.
    Floats column{1, 2, 3, 4}, out(4), gradient(4), sum(1), ones(4, 1.0f);
    const Vector weights{1, 0, 1, 1};
    const Floats offset(1, 0.25f);
    Forward f{.x = rows(column, 1), .y = rows(out, 1), .beta = offset, .activation = Activation::sigmoid, .saved = &saved};
    f.positions.weights = weights, f.part_outer = 2;
    batch_norm_train(f);
    batch_norm_backward({.dy = rows(ones, 1), .kept = rows(column, 1), .saved = &saved, .dx = rows(gradient, 1), .dbeta = sum});
    const double y0 = 1 / (1 + std::exp(-0.25));
    CHECK(near(out[0], y0, 1e-7) && out[1] == out[0] && gradient[0] == 0 && gradient[1] == 0 && sum[0] > 2 * y0 * (1 - y0));
}

// NaN and Inf stay in their channel, and are refused in arguments per channel unless check_values is off.
TEST(values_that_are_not_finite) {
    for (const float bad : {kInff, -kInff, kNaNf}) {
        for (const Activation a : {Activation::none, Activation::relu, Activation::tanh}) {
            Example e, clean;
            e.x[5] = bad;  // of channel 1
            Forward f = e.plain(), g = clean.plain();
            f.activation = g.activation = a, f.saved = &e.saved;
            batch_norm_train(f);
            batch_norm_train(g);
            CHECK(std::isnan(e.saved.inv_std()[1]) || e.saved.inv_std()[1] == 0);
            for (size_t i = 0; i < 60; ++i) CHECK(i / 5 % 3 == 1 || e.y[i] == clean.y[i]);
            CHECK(std::isnan(e.y[5]));
        }
    }
    Example e;
    e.mean = {0, kNaNf, 0}, e.var = {1, 1, -1};
    batch_norm({.x = runs(e.x), .y = runs(e.y), .mean = e.mean, .var = e.var, .eps = 0, .execution = {.check_values = false}});
    CHECK(e.y[0] == e.x[0] && std::isnan(e.y[5]) && std::isnan(e.y[10]));
    // A spread of 0 without eps, unchecked: beta.
    Floats x{-1, 1, 0, 2}, y(4);
    const Floats zero(1), one(1, 1.0f);
    batch_norm({.x = rows(x, 1), .y = rows(y, 1), .mean = zero, .var = zero, .beta = one, .eps = 0, .execution = {.check_values = false}});
    CHECK(y == Floats(4, 1.0f));
    // leaky_relu with a slope that is 0 in float, at -Inf.
    x = {-kInff, -1, 1, kInff};
    batch_norm(
        {.x = rows(x, 1), .y = rows(y, 1), .mean = zero, .var = one, .eps = 0, .activation = Activation::leaky_relu, .slope = 1e-50});
    CHECK(y == (Floats{0, 0, 1, kInff}));
}

// ---- running statistics ----

TEST(not_finite_statistics) {
    for (const bool parts : {false, true}) {
        for (const OnNonfinite what : {OnNonfinite::propagate, OnNonfinite::raise, OnNonfinite::skip}) {
            context = "on_nonfinite " + std::to_string(static_cast<int>(what)) + (parts ? " of parts" : "");
            Example e;
            const Example before;
            e.x[59] = kInff;
            Forward f = parts ? e.renorm() : e.train();
            f.part_outer = parts ? 2 : 0, f.running.on_nonfinite = what, f.saved = &e.saved;
            if (what == OnNonfinite::raise) {
                REFUSED(value, "x holds NaN, Inf or values whose mean or variance the running", batch_norm_train(f));
                CHECK(e.y == before.y);
            } else {
                batch_norm_train(f);
                CHECK(e.y != before.y && e.saved.updated() == (what == OnNonfinite::propagate));
            }
            if (what == OnNonfinite::propagate) {
                CHECK(e.running_mean[2] == kInff && std::isnan(e.running_var[2]) && e.running_mean[0] != 1 && e.running_var[1] < 99);
                CHECK(!parts || (e.own_mean[2] == kInff && e.own_std[0] != 1));
            } else {
                CHECK(e.running_mean == before.mean && e.running_var == before.var && e.own_mean == before.mean && e.own_std == before.var);
            }
        }
    }
    // What the arrays' type cannot hold is not finite either.
    Vector x{1e200, -1e200, 5, 7}, y(4), double_mean(1), double_var(1);
    Floats mean(1), var(1);
    Forward f{.x = rows(x, 1), .y = rows(y, 1), .running = {.mean = mean, .var = var, .on_nonfinite = OnNonfinite::raise}};
    REFUSED(value, "x holds", batch_norm_train(f));
    x = {1e100, -1e100, 5, 7};
    REFUSED(value, "x holds", batch_norm_train(f));
    f.running.mean = double_mean, f.running.var = double_var;
    batch_norm_train(f);
    CHECK(double_var[0] > 1e198);
}

// However the decay is given, and whatever else is, equal numbers give equal results.
TEST(ways_to_update_agree) {
    for (const Shape& s : {Shape{6, 3, 5}, Shape{4, 300, 1}, Shape{40, 17, 3}}) {
        context = text(s);
        const auto channels = static_cast<size_t>(s.channels);
        const Data d({.shape = s});
        const Vector decays(channels, 0.75), seen(channels, static_cast<double>(3 * s.count()));  // 3 n / (3 n + n)
        const std::vector<std::uint8_t> all(d.x.size(), 9);
        const auto updated = [&](const Running& how, const Positions& positions = {}, int64_t part_outer = 0) {
            const Array x(Dtype::float32, kRuns[0], s, d.x), y(Dtype::float32, kRuns[0], s);
            Floats mean(channels, 0.5f), var(channels, 2.0f);
            Forward f{.x = x, .y = y, .positions = positions, .part_outer = part_outer, .running = how};
            f.running.mean = mean, f.running.var = var;
            batch_norm_train(f);
            mean.insert(mean.end(), var.begin(), var.end());
            return mean;
        };
        const Floats want = updated({.decay = 0.75});
        const View<const std::uint8_t> elements = View<const std::uint8_t>::ncs(all.data(), s.outer, s.channels, s.inner);
        CHECK(updated({.decays = decays}) == want && updated({.seen = seen}) == want);
        CHECK(updated({.decay = 0.75}, {{all.data(), 1}, {}}) == want && updated({.decay = 0.75}, {{}, {}, elements}) == want);
        CHECK(updated({.decay = 0.75}, {}, s.outer) == want && updated({.decay = 0.75}, {}, s.outer + 5) == want);
        for (const OnNonfinite what : {OnNonfinite::skip, OnNonfinite::raise})
            CHECK(updated({.decay = 0.75, .on_nonfinite = what}) == want);
    }
    // decay 0 forgets, even NaN; 1 keeps, even from Inf.
    Floats x{1, 3}, y(2), mean{kNaNf}, var = mean;
    Forward f{.x = rows(x, 1), .y = rows(y, 1), .running = {.mean = mean, .var = var, .decay = 0}};
    batch_norm_train(f);
    CHECK(mean[0] == 2 && var[0] == 2);
    x[0] = kInff, f.running.decay = 1;
    batch_norm_train(f);
    CHECK(mean[0] == 2 && var[0] == 2);
    // Strides that run backwards.
    Example e;
    Vector columns{3, 3, 2, 2, 1, 1};
    Forward g = e.plain();
    g.running = {.mean = Channels(columns.data() + 4, true, 3, -2), .var = Channels(columns.data() + 5, true, 3, -2)};
    batch_norm_train(g);
    g.running = {.mean = e.running_mean, .var = e.running_var};
    batch_norm_train(g);
    for (size_t c = 0; c < 3; ++c) CHECK(e.running_mean[c] == static_cast<float>(columns[4 - 2 * c]));
    for (size_t c = 0; c < 3; ++c) CHECK(e.running_var[c] == static_cast<float>(columns[5 - 2 * c]));
}

}  // namespace
}  // namespace test
