// Backward at its edges, and double backward. All options together: test_combinations.cpp.
#include "example.h"
#include "reference.h"

namespace test {
namespace {

// A residual of zeros changes nothing: the bits that the forward left say what x says.
TEST(bits_say_what_x_says) {
    Random random(31);
    for (int i = 0; i < (quick ? 30 : 300); ++i) {
        Problem p = random_problem(random, kFloating[i % 4], kShapes[i % 20]);
        p.activation = static_cast<Activation>(i % 4), p.residual = false, p.keep = Keep::x;
        Data d(p);
        const Layout& layout = i % 3 == 0 ? kRuns[1] : kRows[i % 5];
        const Outcome a = run(p, d, layout);
        p.residual = true;
        for (double& v : d.z) v = std::isnan(v) ? v : 0;
        const Outcome b = run(p, d, layout);
        context = text(p);
        for (const char* const name : {"y", "dx", "dgamma", "dbeta"}) CHECK(a.of(name) == b.of(name) || same(a.of(name), b.of(name)));
    }
}

TEST(gradients_that_are_large_or_not_finite) {
    Saved saved;
    Vector wide{0, 0, 1, 1, 2, 2, 3, 5}, wide_dy{kInf, 1, 1, 1, 1, 1, 1, 1}, out(8), dgamma(2), dbeta(2);
    const auto both = [&]<class T>(std::vector<T>& x, std::vector<T>& dy, std::vector<T>& dx, const Vector& weights, double eps) {
        std::vector<T> y(8);
        batch_norm_train({.x = rows(x, 2), .y = rows(y, 2), .eps = eps, .positions = {{}, weights}, .saved = &saved});
        batch_norm_backward({.dy = rows(dy, 2), .kept = rows(x, 2), .saved = &saved, .dx = rows(dx, 2), .dgamma = dgamma, .dbeta = dbeta});
        return dx;
    };
    both(wide, wide_dy, out, {}, 1e-5);
    CHECK(dgamma[0] == -kInf && dbeta[0] == kInf && !std::isfinite(out[0]) && dbeta[1] == 4 && std::isfinite(out[1]) &&
          std::isfinite(dgamma[1]));
    wide_dy = {1e301, 1, -3e301, 2, 5e301, 3, 2e301, 4};
    both(wide, wide_dy, out, {}, 1e-5);
    CHECK(near(dbeta[0], 5e301, 1e287) && std::all_of(out.begin(), out.end(), [](double v) { return std::isfinite(v); }));
    // Weights of any size: only their ratios count.
    Floats x{1, 5, 2, 7, 4, 4, 3, 9}, dy{1, 2, 3, -4, 5, 6, 7, 8}, dx(8);
    const Floats want = both(x, dy, dx, {1, 2, 3, 4}, 1e-5);
    for (const double size : {1e-300, 1e300, 0x1p-1070}) {
        const Floats got = both(x, dy, dx, {1 * size, 2 * size, 3 * size, 4 * size}, 1e-5);
        CHECK(std::equal(got.begin(), got.end(), want.begin(), [](float a, float b) { return near(a, b, 1e-5); }));
    }
    // A spread of 1e-25: inv_std^2 does not fit a float.
    for (float& v : x) v *= 1e-25f;
    both(x, dy, dx, {}, 0);
    CHECK(std::all_of(dx.begin(), dx.end(), [](float v) { return std::isfinite(v) && v != 0; }));
}

// ---- double backward: against differences of the reference's backward, r and d being constants ----

double dot(const Vector& a, const Vector& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] == 0 || b[i] == 0 ? 0 : a[i] * b[i];
    return sum;
}

void test_double_backward(Problem p, const Layout& layout, Random& random) {
    const Data d(p);
    const Outcome first = run(p, d, layout);
    context = text(p) + " " + layout.name;
    p.keep = Keep::x;  // the reference's: what y tells is x
    const auto loss = [&](const Data& data) {
        const Outcome o = reference(p, data, first);
        return dot(d.ddx, o.of("dx")) + (p.residual ? dot(d.ddz, o.of("dz")) : 0) + dot(d.ddgamma, o.of("dgamma")) +
               dot(d.ddbeta, o.of("dbeta"));
    };
    const auto agrees = [&](const char* name, Vector Data::* values) {
        const Vector& got = first.of(name);
        Vector direction = d.*values;
        double size = 1, want = 0;
        for (size_t i = 0; i < got.size(); ++i) {
            if (std::isnan(direction[i])) continue;
            direction[i] = random.next(Dtype::bfloat16) / 4;
            size += std::abs(got[i] * direction[i]);
        }
        const double have = dot(got, direction);
        bool good = false;
        for (const double step : {1e-5, 1e-6}) {  // a bend lies in one of the two at most
            Data ahead = d, behind = d;
            for (size_t i = 0; i < direction.size(); ++i)
                (ahead.*values)[i] += step * direction[i], (behind.*values)[i] -= step * direction[i];
            want = (loss(ahead) - loss(behind)) / (2 * step);
            good = good || near(have, want, (1e-5 + (p.dtype == Dtype::float64 ? 0 : std::ldexp(1, -format(p.dtype).fraction))) * size);
        }
        if (!CHECK(good)) std::printf("%s: %.9g, differences say %.9g\n", name, have, want);
    };
    agrees("ddy", &Data::dy), agrees("second dx", &Data::x);
    if (p.gamma) agrees("second dgamma", &Data::gamma);
    if (p.beta) agrees("second dbeta", &Data::beta);
    if (p.residual) agrees("second dz", &Data::z);
}

TEST(double_backward_is_the_derivative_of_backward) {
    Random random(33);
    for (const Shape& s : {Shape{6, 3, 2}, Shape{7, 3, 1}, Shape{4, 18, 5}, Shape{12, 5, 9}, Shape{3, 70, 4}}) {
        for (int i = 0; i < (quick ? 10 : 240); ++i) {
            Problem p = random_problem(random, kFloating[i % 3 == 0 ? i / 3 % 4 : 1], s);
            if (p.dtype != Dtype::float64) p.keep = Keep::x;  // y rounded tells another x
            if (p.eps < 1) p.eps = 0.05;                      // curved little enough for differences
            test_double_backward(p, i % 2 == 0 && s.inner > 1 ? kRuns[i / 2 % 4] : kRows[i / 2 % 5], random);
        }
    }
}

}  // namespace
}  // namespace test
