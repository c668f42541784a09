// The programs of the C++ guide, docs/cpp.md, which shows the parts between the marks. Exits with 1 if a result is off.
#include <batchnorm/batchnorm.hpp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

using batchnorm::View;

namespace {

constexpr std::int64_t N = 8, C = 3, H = 4, W = 4;

// [train]
struct Layer {
    std::vector<float> gamma, beta, mean, var, dgamma, dbeta;
    batchnorm::Saved saved;
    explicit Layer(std::size_t c) : gamma(c, 1), beta(c), mean(c), var(c, 1), dgamma(c), dbeta(c) {}

    void forward(View<const float> x, View<float> y) {
        batchnorm::batch_norm_train({.x = x,
                                     .y = y,
                                     .gamma = gamma,
                                     .beta = beta,
                                     .activation = batchnorm::Activation::relu,
                                     .running = {.mean = mean, .var = var, .decay = 0.9},
                                     .saved = &saved});
    }
    void backward(View<const float> dy, View<const float> x, View<float> dx) {
        batchnorm::batch_norm_backward({.dy = dy, .kept = x, .saved = &saved, .dx = dx, .dgamma = dgamma, .dbeta = dbeta});
    }
};
// [end]

// [serve]
void serve(const Layer& layer, View<const float> x, View<float> y) {
    batchnorm::batch_norm({.x = x,
                           .y = y,
                           .mean = layer.mean,
                           .var = layer.var,
                           .gamma = layer.gamma,
                           .beta = layer.beta,
                           .activation = batchnorm::Activation::relu});
}
// [end]

int run() {
    // [views]
    std::vector<float> x(N * C * H * W), y(x.size());
    const auto images = View<const float>::ncs(x.data(), N, C, H * W);  // N, C, H, W
    const auto result = View<float>::ncs(y.data(), N, C, H * W);
    // [end]
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i + 1));

    Layer layer(C);
    for (int step = 0; step < 50; ++step) layer.forward(images, result);
    std::vector<float> dy(y), dx(y.size());
    layer.backward(View<const float>::ncs(dy.data(), N, C, H * W), images, View<float>::ncs(dx.data(), N, C, H * W));
    std::vector<float> served(x.size());
    serve(layer, images, View<float>::ncs(served.data(), N, C, H * W));
    for (std::size_t i = 0; i < x.size(); ++i)
        if (!(std::abs(served[i] - y[i]) < 0.1f)) return 1;
    if (layer.dgamma[0] <= 0 || layer.saved.count()[0] != N * H * W) return 1;

    const std::vector<float> mean(C), var(C, 1.0f);
    // [errors]
    const std::vector<float> gamma(C - 1);
    try {
        batchnorm::batch_norm({.x = images, .y = result, .mean = mean, .var = var, .gamma = gamma});
    } catch (const batchnorm::Error& error) {
        std::printf("%s: %s\n", error.argument.c_str(), error.what());  // gamma: gamma has 2 values, expected 3 ...
    }
    // [end]

    // [threads]
    batchnorm::set_num_threads(4);  // of calls to come, in this process

    // of this call
    batchnorm::batch_norm_train({.x = images, .y = result, .execution = {.num_threads = 1}});
    // [end]
    return 0;
}

}  // namespace

int main() { return run(); }
