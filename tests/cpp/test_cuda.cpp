// What a GPU makes of a call has the CPU's bits. Built twice: as a rehearsal, where the kernels run on the CPU, and by nvcc for a GPU;
// there all memory of this program is such that both reach it.
#include "batchnorm/cuda.hpp"
#include "problem.h"

#ifdef BATCHNORM_ON_GPU
#include <cuda_runtime.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <new>

// All memory of this program: a block that CPU and GPU reach at one address, cut into powers of 2, those given back kept in lists. With
// BATCHNORM_APART set each array is an allocation of its own, so that compute-sanitizer sees what is written beyond it.
namespace {
class Arena {
public:
    void* take(std::size_t bytes) {
        const std::scoped_lock lock(mutex_);
        if (apart_) {
            std::byte* alone = nullptr;
            if (cudaHostAlloc(reinterpret_cast<void**>(&alone), kHead + bytes, cudaHostAllocMapped) != cudaSuccess) throw std::bad_alloc();
            return alone + kHead;
        }
        const auto list = static_cast<std::size_t>(std::bit_width(std::max<std::size_t>(bytes, 1) - 1));
        if (free_[list] == nullptr) {
            if (next_ == nullptr && cudaHostAlloc(reinterpret_cast<void**>(&next_), kBytes, cudaHostAllocMapped) != cudaSuccess)
                std::abort();
            const std::size_t size = kHead + std::max(kHead, std::size_t{1} << list);
            if (used_ + size > kBytes) throw std::bad_alloc();
            free_[list] = next_ + used_;
            used_ += size;
            std::memset(free_[list], 0, kHead);
        }
        std::byte* const p = free_[list];
        std::memcpy(&free_[list], p, sizeof p);
        std::memcpy(p, &list, sizeof list);
        return p + kHead;
    }
    void give_back(void* data) {
        if (data == nullptr) return;
        const std::scoped_lock lock(mutex_);
        std::byte* const p = static_cast<std::byte*>(data) - kHead;
        if (apart_) return void(cudaFreeHost(p));
        std::size_t list;
        std::memcpy(&list, p, sizeof list);
        std::memcpy(p, &free_[list], sizeof p);
        free_[list] = p;
    }

private:
    static constexpr std::size_t kBytes = std::size_t{1} << 30, kHead = 256;
    const bool apart_ = std::getenv("BATCHNORM_APART") != nullptr;
    std::mutex mutex_;
    std::array<std::byte*, 64> free_{};
    std::byte* next_ = nullptr;
    std::size_t used_ = 0;
};
Arena& arena() {
    alignas(Arena) static std::byte memory[sizeof(Arena)];
    static Arena* const a = new (memory) Arena;
    return *a;
}
}  // namespace
void* operator new(std::size_t bytes) { return arena().take(bytes); }
void* operator new(std::size_t bytes, std::align_val_t) { return arena().take(bytes); }
void operator delete(void* p) noexcept { arena().give_back(p); }
void operator delete(void* p, std::size_t) noexcept { arena().give_back(p); }
void operator delete(void* p, std::align_val_t) noexcept { arena().give_back(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { arena().give_back(p); }
#endif

namespace test {
namespace {

void wait() {
#ifdef BATCHNORM_ON_GPU
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
#endif
}
void train(const Forward& f) {
    cuda::batch_norm_train(f, {});
    wait();
}
void backward(const Backward& b) {
    cuda::batch_norm_backward(b, {});
    wait();
}
constexpr Machine kGpu{train, backward};

// Sign and payload of NaN are nobody's.
bool same_but_nan(const Vector& a, const Vector& b) {
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](double v, double w) {
               return (std::isnan(v) && std::isnan(w)) || std::bit_cast<std::uint64_t>(v) == std::bit_cast<std::uint64_t>(w);
           });
}

void compare_machines(const Problem& p, const Layout& layout, Place place) {
    context = text(p) + " " + layout.name;
    const Data d(p);
    const Outcome want = run(p, d, layout, place), got = run(p, d, layout, place, kGpu);
    for (const auto& [name, values] : want) {
        if (name == "ddy" || name.starts_with("second ")) continue;  // which a GPU does not make
        const bool equal = same_but_nan(values, got.of(name));
        if (!equal) context = text(p) + " " + layout.name + " place " + std::to_string(static_cast<int>(place)) + ": " + name;
        CHECK(equal);
    }
}

TEST(a_gpu_has_the_cpus_bits_on_every_shape) {
    Random random(11);
    for (const Shape& shape : kShapes) {
        for (const Dtype dtype : kFloating) {
            for (int64_t i = 0; i < (quick ? 2 : shape.elements() < 5000 ? 60 : 12); ++i) {
                const Layout layout = random.below(2) == 0 && shape.inner > 1 ? kRuns[random.below(4)] : kRows[random.below(5)];
                Problem p = random_problem(random, dtype, shape);
                p.keep = Keep::x;
                set_tuning(random.below(2) == 0 ? "gpu_block_values=0" : "");
                compare_machines(p, layout, static_cast<Place>(random.below(3)));
            }
        }
    }
}

// Statistics of one call by both, and y and dx.
void compare_data(Dtype dtype, const Shape& shape, const Layout& layout, const Vector& values, double eps = 1e-5) {
    const auto tensor = [&](const Vector& v) { return Array(dtype, layout, shape, v); };
    Vector dy(static_cast<size_t>(shape.elements()));
    Random random(3);
    for (double& v : dy) v = rounded(dtype, random.next(dtype));
    std::vector<Vector> results[2];
    for (const bool gpu : {false, true}) {
        const Array x = tensor(values), g = tensor(dy);
        Array y(dtype, layout, shape), dx(dtype, layout, shape);
        const auto channels = static_cast<size_t>(shape.channels);
        Vector running_mean(channels, 0.5), running_var(channels, 2), dgamma(channels), dbeta(channels), mean(channels), var(channels);
        Saved saved;
        Forward f{.x = x, .y = y, .eps = eps, .saved = &saved};
        f.running.mean = running_mean, f.running.var = running_var;
        (gpu ? train : batch_norm_train)(f);
        const Backward b{.dy = g, .kept = x, .saved = &saved, .dx = dx, .dgamma = dgamma, .dbeta = dbeta};
        (gpu ? backward : batch_norm_backward)(b);
        gpu ? cuda::moments(x, mean, var, 1, {}) : moments(x, mean, var, 1);
        wait();
        results[gpu] = {vector(saved.mean()),
                        vector(saved.var()),
                        vector(saved.inv_std()),
                        y.finish(),
                        dx.finish(),
                        dgamma,
                        dbeta,
                        running_mean,
                        running_var,
                        mean,
                        var};
    }
    for (size_t i = 0; i < results[0].size(); ++i) {
        const bool equal = same_but_nan(results[0][i], results[1][i]);
        if (!equal) context += ": result " + std::to_string(i);
        CHECK(equal);
    }
}

// Means far from 0, constants, and of double data squares that overflow and underflow, in one channel each beside plain ones.
TEST(a_gpu_takes_every_round_as_the_cpu_does) {
    const Shape shape{40, 7, 9};
    for (const char* tuning : {"", "gpu_block_values=0"}) {
        set_tuning(tuning);
        for (const Dtype dtype : kFloating) {
            const bool wide = dtype == Dtype::float64;
            const double far[] = {0, 1e4, -3e4, 5, 0, 2, 7}, spread[] = {1, 0.1, 1, 0, 1e-4, wide ? 1e300 : 1e4, wide ? 1e-300 : 1e-3};
            Random random(5);
            Vector values(static_cast<size_t>(shape.elements()));
            for (size_t i = 0; i < values.size(); ++i) {
                const auto c = static_cast<size_t>(shape.channel(i));
                values[i] = rounded(dtype, far[c] * (c < 5 ? 1 : 0) + spread[c] * random.next(dtype));
            }
            for (const Layout& layout : {kRuns[0], kRows[0]}) {
                for (const double eps : {1e-5, 0.0}) {
                    context = std::string(format(dtype).name) + " " + layout.name + " eps " + std::to_string(eps) + " " + tuning;
                    compare_data(dtype, shape, layout, values, eps);
                }
            }
        }
    }
}

// NaN and Inf stay in their channel.
TEST(a_gpu_passes_nan_and_inf_on) {
    const Shape shape{6, 5, 30};
    for (const Dtype dtype : kFloating) {
        for (const double bad : {kNaN, kInf, -kInf}) {
            Random random(9);
            Vector values(static_cast<size_t>(shape.elements()));
            for (double& v : values) v = rounded(dtype, random.next(dtype));
            values[shape.at(2, 1, 17)] = values[shape.at(5, 3, 0)] = values[shape.at(5, 3, 29)] = bad;
            for (const Layout& layout : {kRuns[0], kRows[0]}) {
                context = std::string(format(dtype).name) + " " + layout.name + " " + std::to_string(bad);
                compare_data(dtype, shape, layout, values);
            }
        }
    }
}

TEST(a_gpu_serves_empty_batches) {
    for (const Shape& shape : {Shape{0, 3, 4}, Shape{4, 3, 0}}) {
        context = text(shape);
        compare_data(Dtype::float32, shape, kRuns[0], {});
    }
}

TEST(a_gpu_says_what_it_does_not_serve) {
    const Shape shape{4, 3, 2};
    const Array x(Dtype::float32, kRuns[0], shape, Vector(24, 1)), integers(Dtype::uint8, kRuns[0], shape, Vector(24, 1));
    Array y(Dtype::float32, kRuns[0], shape);
    Saved saved;
    const Vector three(3, 1);
    const auto fails = [&](Forward f, const char* argument) {
        f.y = y;
        try {
            cuda::batch_norm_train(f, {});
        } catch (const Error& e) {
            CHECK(e.argument == argument);
            return;
        }
        CHECK(false);
    };
    fails({.x = integers}, "x");
    fails({.x = x, .keep = Keep::y, .saved = &saved}, "keep");
    Forward f{.x = x};
    f.running.on_nonfinite = OnNonfinite::raise;
    fails(f, "on_nonfinite");
    f = {.x = x};
    f.gamma = Vector(2, 1).empty() ? ConstRows() : ConstRows(std::span<const double>(three.data(), 2));
    fails(f, "gamma");
    CHECK(saved.empty());
    CHECK(!cuda::runtime().empty());
    // Neither side takes what the other has left.
    train({.x = x, .y = y, .saved = &saved});
    Array dx(Dtype::float32, kRuns[0], shape);
    const auto misused = [&](void (*call)(const Backward&)) {
        try {
            call({.dy = x, .kept = x, .saved = &saved, .dx = dx});
        } catch (const Misuse&) {
            return true;
        }
        return false;
    };
    CHECK(misused(batch_norm_backward) && !misused(backward));
    batch_norm_train({.x = x, .y = y, .saved = &saved});
    CHECK(misused(backward) && !misused(batch_norm_backward));
}

}  // namespace
}  // namespace test
