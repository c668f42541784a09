// What a GPU makes of a call has the CPU's bits. Built twice: as a rehearsal, where the kernels run on the CPU, and by nvcc for a GPU; there
// all memory of this program is managed, so that both sides reach it.
#include "batchnorm/cuda.hpp"
#include "problem.h"

#ifdef BATCHNORM_ON_GPU
#include <cuda_runtime.h>

#include <cstdlib>
#include <new>

namespace {
void* managed(std::size_t bytes) {
    void* p = nullptr;
    if (cudaMallocManaged(&p, bytes == 0 ? 1 : bytes) != cudaSuccess) throw std::bad_alloc();
    return p;
}
}  // namespace
void* operator new(std::size_t bytes) { return managed(bytes); }
void* operator new(std::size_t bytes, std::align_val_t) { return managed(bytes); }
void operator delete(void* p) noexcept { (void)cudaFree(p); }
void operator delete(void* p, std::size_t) noexcept { (void)cudaFree(p); }
void operator delete(void* p, std::align_val_t) noexcept { (void)cudaFree(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { (void)cudaFree(p); }
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
                compare_machines(p, layout, static_cast<Place>(random.below(3)));
            }
        }
    }
}

}  // namespace
}  // namespace test
