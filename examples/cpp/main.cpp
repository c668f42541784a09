// Quick start: batch normalization of small images, in NCHW and then in NHWC: training, inference, gradients. Every result is
// compared with a plain loop in double; the exit code is 1 if anything is off.
#include <algorithm>
#include <batchnorm/batchnorm.hpp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

using batchnorm::View;

namespace {

constexpr std::int64_t N = 8, C = 3, H = 16, W = 16, S = H * W, kElements = N * C * S;
constexpr double kEps = 1e-5;

// Images in NCHW whose channels differ in mean (0, 10, 20) and standard deviation (1, 2, 3).
std::vector<float> random_images(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(kElements);
    for (std::int64_t i = 0; i < kElements; ++i) {
        const auto c = static_cast<float>(i / S % C);
        x[i] = 10 * c + (c + 1) * normal(random);
    }
    return x;
}

template <class T>
std::vector<T> to_nhwc(const std::vector<T>& nchw) {
    std::vector<T> nhwc(nchw.size());
    for (std::int64_t n = 0; n < N; ++n) {
        for (std::int64_t c = 0; c < C; ++c) {
            for (std::int64_t s = 0; s < S; ++s) nhwc[(n * S + s) * C + c] = nchw[(n * C + c) * S + s];
        }
    }
    return nhwc;
}

// What the library computes, as plainly as possible; NCHW.
struct Reference {
    std::vector<double> mean, y, y_running, dx, dgamma, dbeta;

    Reference(const std::vector<float>& x, const std::vector<float>& dy, const std::vector<float>& gamma, const std::vector<float>& beta,
              const std::vector<float>& running_mean, const std::vector<float>& running_var)
        : mean(C), y(kElements), y_running(kElements), dx(kElements), dgamma(C), dbeta(C) {
        for (std::int64_t c = 0; c < C; ++c) {
            const double n = N * S;
            const auto each = [&](auto f) {
                for (std::int64_t i = 0; i < kElements; ++i) {
                    if (i / S % C == c) f(i);
                }
            };
            double var = 0;
            each([&](std::int64_t i) { mean[c] += x[i] / n; });
            each([&](std::int64_t i) { var += (x[i] - mean[c]) * (x[i] - mean[c]) / n; });
            const double inv_std = 1 / std::sqrt(var + kEps), inv_running_std = 1 / std::sqrt(running_var[c] + kEps);
            const auto x_hat = [&](std::int64_t i) { return (x[i] - mean[c]) * inv_std; };
            each([&](std::int64_t i) { y[i] = x_hat(i) * gamma[c] + beta[c]; });
            each([&](std::int64_t i) { y_running[i] = std::max(0.0, (x[i] - running_mean[c]) * inv_running_std * gamma[c] + beta[c]); });
            each([&](std::int64_t i) { dbeta[c] += dy[i]; });
            each([&](std::int64_t i) { dgamma[c] += dy[i] * x_hat(i); });
            each([&](std::int64_t i) { dx[i] = gamma[c] * inv_std * (dy[i] - dbeta[c] / n - x_hat(i) * dgamma[c] / n); });
        }
    }
};

bool all_good = true;

template <class T>
void expect_near(const char* what, const std::vector<T>& got, const std::vector<double>& want) {
    double worst = 0;
    bool good = got.size() == want.size();
    for (std::size_t i = 0; good && i < want.size(); ++i) {
        const double error = std::abs(got[i] - want[i]) / std::max(1.0, std::abs(want[i]));
        worst = std::max(worst, error);
        good = error < 2e-6;  // false for NaN, too
    }
    all_good = all_good && good;
    std::printf("  %-9s of %5zu values: largest error %.1e %s\n", what, got.size(), worst, good ? "ok" : "WRONG");
}

// `view` makes the library's view of a vector, `in_layout` brings a vector from NCHW into its order.
template <class MakeView, class InLayout>
void train_and_infer(MakeView view, InLayout in_layout) {
    // Parameters and running statistics: one value per channel, float or double.
    std::vector<float> gamma{1.0f, 0.5f, 2.0f}, beta{0.0f, 1.0f, -1.0f}, running_mean(C, 0.0f), running_var(C, 1.0f);
    std::vector<float> x, y(kElements);
    // What the forward pass keeps for backward. Its memory is used again in the next step.
    batchnorm::Saved saved;

    // Training: each batch is normalised with its own statistics, of which a running average is kept.
    for (unsigned step = 0; step < 50; ++step) {
        x = in_layout(random_images(step));
        batchnorm::batch_norm_train({.x = view(x),
                                     .y = view(y),
                                     .gamma = gamma,
                                     .beta = beta,
                                     .eps = kEps,
                                     .running = {.mean = running_mean, .var = running_var, .decay = 0.9},
                                     .saved = &saved});
    }
    std::printf("  running mean %5.2f %5.2f %5.2f, of data with mean 0 10 20\n", running_mean[0], running_mean[1], running_mean[2]);
    std::printf("  running var  %5.2f %5.2f %5.2f, of data with var  1  4  9\n", running_var[0], running_var[1], running_var[2]);

    // Backward: gradients of x, gamma and beta from the gradient of y. The options are the forward's, out of `saved`.
    std::vector<float> dy = in_layout(random_images(1000)), dx(kElements), dgamma(C), dbeta(C);
    batchnorm::batch_norm_backward({.dy = view(dy), .kept = view(x), .saved = &saved, .dx = view(dx), .dgamma = dgamma, .dbeta = dbeta});
    const std::vector<double> mean(saved.mean().begin(), saved.mean().end());

    // Inference: the running statistics; here in place, and with ReLU in the same pass.
    batchnorm::batch_norm({.x = view(x),
                           .y = view(x),
                           .mean = running_mean,
                           .var = running_var,
                           .gamma = gamma,
                           .beta = beta,
                           .eps = kEps,
                           .activation = batchnorm::Activation::relu});

    const Reference want(random_images(49), random_images(1000), gamma, beta, running_mean, running_var);
    expect_near("mean", mean, want.mean);
    expect_near("y", y, in_layout(want.y));
    expect_near("dx", dx, in_layout(want.dx));
    expect_near("dgamma", dgamma, want.dgamma);
    expect_near("dbeta", dbeta, want.dbeta);
    expect_near("inference", x, in_layout(want.y_running));
}

// Bad arguments throw before anything is written, and the message names the argument.
void make_a_mistake() {
    std::vector<float> x = random_images(0), mean(C), var(C), gamma(C - 1);
    const auto view = View<float>::ncs(x.data(), N, C, S);
    try {
        batchnorm::batch_norm({.x = view, .y = view, .mean = mean, .var = var, .gamma = gamma});
        all_good = false;
    } catch (const batchnorm::Error& e) {  // a std::invalid_argument
        std::printf("batchnorm::Error: %s\n", e.what());
        all_good = all_good && e.argument == "gamma" && x == random_images(0);
    }
}

}  // namespace

int main() {
    try {
        std::printf("batchnorm %s, %s, %d threads\n", batchnorm::version().c_str(), batchnorm::isa().c_str(), batchnorm::num_threads());
        std::printf("NCHW (8, 3, 16, 16): (outer, channels, inner) = (8, 3, 256), inner contiguous\n");
        train_and_infer([](auto& v) { return View<float>::ncs(v.data(), N, C, S); }, [](const auto& v) { return v; });
        std::printf("NHWC (8, 16, 16, 3): 2048 rows of 3 channels\n");
        train_and_infer([](auto& v) { return View<float>::nsc(v.data(), N * S, C); }, [](const auto& v) { return to_nhwc(v); });
        make_a_mistake();
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    return all_good ? 0 : 1;
}
