// Memory that runs out in the middle of a call, in whatever thread: std::bad_alloc in the caller's, and nothing of the caller's changed
// but outputs.
#if defined(__clang__)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define BATCHNORM_SANITIZER_HAS_NEW  // they are linked with an operator new of their own
#endif
#endif
#ifndef BATCHNORM_SANITIZER_HAS_NEW

#include <atomic>
#include <cstdlib>
#include <new>

#include "example.h"

namespace {

std::atomic<int64_t> left{-1};  // allocations until one fails; below 0: none does

void* allocated(std::size_t size, std::size_t alignment) {
    if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
    void* const p = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment + alignment);
    if (p == nullptr) throw std::bad_alloc();
    return p;
}

}  // namespace

void* operator new(std::size_t size) { return allocated(size, 16); }
void* operator new[](std::size_t size) { return allocated(size, 16); }
void* operator new(std::size_t size, std::align_val_t alignment) { return allocated(size, static_cast<std::size_t>(alignment)); }
void* operator new[](std::size_t size, std::align_val_t alignment) { return allocated(size, static_cast<std::size_t>(alignment)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace test {
namespace {

// How often `call` failed before it came through, one allocation later each time.
template <class Call, class Unchanged>
int64_t failures(const Call& call, const Unchanged& unchanged) {
    for (int64_t n = 0;; ++n) {
        left = n;
        try {
            call();
            left = -1;
            return n;
        } catch (const std::bad_alloc&) {
            left = -1;
            CHECK(unchanged());
        }
    }
}

TEST(memory_runs_out_in_any_thread) {
    set_tuning("parallel_elements=0");
    const int64_t channels = 1500;
    std::vector<double> x(static_cast<size_t>(8 * channels)), y(x.size()), dx(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(i * i % 101);
    x[7] = 1e200;  // a third round of sums
    const Vector zero(static_cast<size_t>(channels)), one(zero.size(), 1.0);
    int64_t most = 0;
    for (const bool runs : {true, false}) {
        const auto view = [&](auto& v) {
            return runs ? View<double>::ncs(v.data(), 2, channels, 4) : View<double>::nsc(v.data(), 8, channels);
        };
        for (const int64_t part_outer : {int64_t{0}, int64_t{1}}) {
            if (!runs && part_outer == 1) continue;  // a single value
            for (const int threads : {1, 3}) {
                Vector mean = zero, var = one, dgamma = zero, dbeta = zero;
                Saved saved;
                Forward f{.x = view(x), .y = view(y), .part_outer = part_outer, .saved = &saved, .execution = {.num_threads = threads}};
                f.running.mean = mean, f.running.var = var;
                most = std::max(most, failures([&] { batch_norm_train(f); }, [&] { return mean == zero && var == one && saved.empty(); }));
                CHECK(mean != zero && !saved.empty());
                Backward b{.dy = view(x), .kept = view(x), .saved = &saved, .dx = view(dx), .dgamma = dgamma, .dbeta = dbeta};
                b.execution.num_threads = threads;
                most = std::max(most, failures([&] { batch_norm_backward(b); }, [&] { return dgamma == zero && dbeta == zero; }));
                Vector m(zero.size(), 7), v = m;
                failures([&] { moments(view(x), m, v, 0, threads); }, [&] { return m == Vector(zero.size(), 7) && v == m; });
            }
        }
    }
    CHECK(most > 10);
    set_tuning("");
}

}  // namespace
}  // namespace test

#endif
