// A training loop and a server, as users write them: one Saved per layer that every step uses again, and any number of threads that
// read one const Layer. Run by test_cpp.py; exits with 1 if a result is off.
#include <batchnorm/batchnorm.hpp>
#include <cmath>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

using namespace batchnorm;

static_assert(std::is_nothrow_move_constructible_v<Saved> && !std::is_copy_constructible_v<Saved>);
static_assert(std::is_default_constructible_v<Backward> && std::is_default_constructible_v<Forward>);

namespace {

struct Layer {
    std::vector<float> gamma, beta, mean, var, dgamma, dbeta;
    Saved saved;
    explicit Layer(std::size_t c) : gamma(c, 1), beta(c), mean(c), var(c, 1), dgamma(c), dbeta(c) {}
};

void step(Layer& l, const std::vector<float>& x, std::vector<float>& y, std::vector<float>& dy, std::int64_t n, std::int64_t c,
          std::int64_t s) {
    batch_norm_train({.x = View<const float>::ncs(x.data(), n, c, s),
                      .y = View<float>::ncs(y.data(), n, c, s),
                      .gamma = l.gamma,
                      .beta = l.beta,
                      .activation = Activation::relu,
                      .running = {.mean = l.mean, .var = l.var},
                      .saved = &l.saved,
                      .execution = {.num_threads = 1}});
    batch_norm_backward({.dy = View<const float>::ncs(dy.data(), n, c, s),
                         .kept = View<const float>::ncs(x.data(), n, c, s),
                         .saved = &l.saved,
                         .dx = View<float>::ncs(dy.data(), n, c, s),
                         .dgamma = l.dgamma,
                         .dbeta = l.dbeta,
                         .execution = {.num_threads = 1}});
}

void serve(const Layer& l, const std::vector<float>& x, std::vector<float>& y, std::int64_t rows, std::int64_t c) {
    batch_norm({.x = View<const float>::nsc(x.data(), rows, c),
                .y = View<float>::nsc(y.data(), rows, c),
                .mean = l.mean,
                .var = l.var,
                .gamma = l.gamma,
                .beta = l.beta,
                .execution = {.num_threads = 1}});
}

}  // namespace

int main() {
    constexpr std::int64_t n = 4, c = 3, s = 5;
    std::vector<float> x(n * c * s), y(x.size()), dy(x.size());
    std::vector<Layer> layers;
    layers.emplace_back(c);
    layers.emplace_back(c);
    std::vector<Layer> moved = std::move(layers);
    Layer& layer = moved.front();
    std::size_t held = 0;
    for (int i = 0; i < 3; ++i) {
        for (std::size_t k = 0; k < x.size(); ++k) x[k] = std::sin(static_cast<float>(k + 1) * static_cast<float>(i + 1));
        dy.assign(dy.size(), 1.0f);
        step(layer, x, y, dy, n, c, s);
        if (i > 0 && layer.saved.bytes() != held) return 1;  // the memory is used again
        held = layer.saved.bytes();
    }
    if (layer.saved.empty() || layer.saved.parts() != 1 || layer.saved.count()[0] != n * s || !layer.saved.updated()) return 1;

    std::vector<std::vector<float>> results(4, std::vector<float>(x.size()));
    std::vector<std::thread> threads;
    for (auto& result : results) threads.emplace_back([&] { serve(layer, x, result, n * s, c); });
    for (auto& thread : threads) thread.join();
    for (const auto& result : results)
        if (result != results.front()) return 1;

    try {
        batch_norm({.x = View<const float>::nsc(x.data(), n * s, c), .y = View<float>::nsc(y.data(), n * s, c)});
        return 1;  // a server that forgot the statistics
    } catch (const Error& e) {
        if (e.argument != "mean") return 1;
    }
    try {
        Saved nothing;
        batch_norm_backward({.dy = View<const float>::nsc(x.data(), n * s, c), .saved = &nothing});
        return 1;
    } catch (const Misuse&) {
    }
    return 0;
}
