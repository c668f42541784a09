// Micro-benchmarks of the C++ library with Google Benchmark: every public function on a tiny array (what a call costs), one that
// stays in L2, and one that does not fit a cache, in both memory directions, at every ISA level of this machine. For the times of a
// change to a kernel; for comparisons with peers there is ../run.py.
//
//     micro --benchmark_filter='batch_norm_train.*ncs.*avx512' --benchmark_repetitions=5
#include <benchmark/benchmark.h>

#include <batchnorm/batchnorm.hpp>
#include <cstdint>
#include <exception>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

namespace {

namespace bn = batchnorm;

struct Size {
    const char* name;
    std::int64_t outer, channels, inner;
};
// 384 B; 802 KB (backward touches three of them: 2.4 MB); 103 MB.
constexpr Size kSizes[] = {{"tiny", 2, 3, 16}, {"L2", 4, 64, 784}, {"big", 32, 256, 3136}};

// The arrays of a benchmark. ncs: (outer, channels, inner); nsc: the same values as rows of channels.
struct Arrays {
    Size size;
    bool ncs;
    std::vector<float> x, dy, out, gamma, beta, running_mean, running_var, dgamma, dbeta;
    std::vector<double> mean, var;
    bn::Saved saved;

    Arrays(const Size& s, bool is_ncs)
        : size(s),
          ncs(is_ncs),
          x(count()),
          dy(count()),
          out(count()),
          gamma(channels(), 1.0f),
          beta(channels()),
          running_mean(channels()),
          running_var(channels(), 1.0f),
          dgamma(channels()),
          dbeta(channels()),
          mean(channels()),
          var(channels()) {
        std::uint32_t state = 1;
        for (std::size_t i = 0; i < x.size(); ++i) {
            state = state * 1664525u + 1013904223u;
            x[i] = static_cast<float>(state >> 8) * 0x1p-24f;
            dy[i] = 0.5f - x[i];
        }
        bn::batch_norm_train(train());  // what backward reads
    }
    std::size_t channels() const { return static_cast<std::size_t>(size.channels); }
    std::size_t count() const { return static_cast<std::size_t>(size.outer * size.channels * size.inner); }

    template <class T>
    bn::View<T> view(T* data) const {
        return ncs ? bn::View<T>::ncs(data, size.outer, size.channels, size.inner)
                   : bn::View<T>::nsc(data, size.outer * size.inner, size.channels);
    }
    bn::Forward forward() {
        bn::Forward call;
        call.x = view<const float>(x.data());
        call.y = view(out.data());
        call.gamma = gamma;
        call.beta = beta;
        return call;
    }
    bn::Forward train() {
        bn::Forward call = forward();
        call.running.mean = running_mean;
        call.running.var = running_var;
        call.saved = &saved;
        return call;
    }
    bn::Forward infer() {
        bn::Forward call = forward();
        call.mean = running_mean;
        call.var = running_var;
        return call;
    }
    bn::Backward backward() {
        bn::Backward call;
        call.dy = view<const float>(dy.data());
        call.kept = view<const float>(x.data());
        call.saved = &saved;
        call.dx = view(out.data());
        call.dgamma = dgamma;
        call.dbeta = dbeta;
        return call;
    }
};

struct Function {
    const char* name;
    int tensors;  // read or written at least
    std::function<void(Arrays&)> call;
};

const std::vector<Function>& functions() {
    static const std::vector<Function> all = {
        {"batch_norm", 2, [](Arrays& a) { bn::batch_norm(a.infer()); }},
        {"batch_norm_train", 2, [](Arrays& a) { bn::batch_norm_train(a.train()); }},
        {"batch_norm_backward", 3, [](Arrays& a) { bn::batch_norm_backward(a.backward()); }},
        {"moments", 1, [](Arrays& a) { bn::moments(a.view<const float>(a.x.data()), a.mean, a.var); }},
    };
    return all;
}

void run(benchmark::State& state, const Function& function, const Size& size, bool ncs, const std::string& isa) {
    bn::set_isa(isa);
    Arrays arrays(size, ncs);
    function.call(arrays);
    for (auto _ : state) {
        function.call(arrays);
        benchmark::ClobberMemory();
    }
    const auto bytes = static_cast<std::int64_t>(arrays.count() * sizeof(float)) * function.tensors;
    state.SetBytesProcessed(state.iterations() * bytes);
}

void register_all() {
    for (const std::string& isa : bn::isa_levels())
        for (const Function& function : functions())
            for (const bool ncs : {true, false})
                for (const Size& size : kSizes) {
                    const std::string name = std::string(function.name) + "/" + (ncs ? "ncs" : "nsc") + "/" + size.name + "/" + isa;
                    benchmark::RegisterBenchmark(name.c_str(), [&function, &size, ncs, isa](benchmark::State& state) {
                        run(state, function, size, ncs, isa);
                    })->UseRealTime();
                }
}

}  // namespace

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
    benchmark::AddCustomContext("batchnorm", bn::version() + ", " + bn::compiler() + ", " + std::to_string(bn::num_threads()) + " threads");
    try {
        register_all();
        benchmark::RunSpecifiedBenchmarks();
    } catch (const std::exception& e) {
        std::cerr << e.what() << '\n';
        return 1;
    }
    benchmark::Shutdown();
    return 0;
}
