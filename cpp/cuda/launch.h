// How kernels are started and what they run on. A kernel is an object: its members are its arguments, and
//     operator()(const ThreadBlock&, Shared&) const
// is what a block of kThreads threads does, in phases: block.each(f) calls f(thread) for all of them and waits until all are done.
// Nothing but Shared and the arrays that members point to lives from one phase to the next.
//
// nvcc makes GPU code of that. A host compiler makes loops: the rehearsal, which runs the same kernels, phase by phase, on the CPU and in
// the CPU's memory, so that all but speed and races is tested without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>

#include "batchnorm/cuda.hpp"
#include "kernels/host_device.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define BATCHNORM_KERNEL_BODY __device__
#else
#define BATCHNORM_KERNEL_BODY
#endif

namespace batchnorm::cuda {

using std::int64_t;

struct NoShared {};

// How many blocks work on a pass over elements; some more than fit at once, so that all stay busy.
inline constexpr int64_t kManyBlocks = 2048;

#ifdef __CUDACC__

[[noreturn]] void failed(const char* call, cudaError_t error);

class ThreadBlock {
public:
    __device__ int64_t index() const { return blockIdx.x; }
    __device__ int64_t count() const { return gridDim.x; }
    template <class F>
    __device__ void each(const F& f) const {
        f(static_cast<int>(threadIdx.x));
        __syncthreads();
    }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run(const __grid_constant__ Kernel kernel) {
    __shared__ typename Kernel::Shared shared;
    kernel(ThreadBlock(), shared);
}

#else

class ThreadBlock {
public:
    ThreadBlock(int64_t index, int64_t count, int threads) : index_(index), count_(count), threads_(threads) {}
    int64_t index() const { return index_; }
    int64_t count() const { return count_; }
    template <class F>
    void each(const F& f) const {
        for (int thread = 0; thread < threads_; ++thread) f(thread);
    }

private:
    int64_t index_, count_;
    int threads_;
};

#endif

// The stream of a call, memory for as long as its kernels run, and the name that errors carry.
class Launcher {
public:
    Launcher(const Stream& stream, const char* call) : stream_(stream), call_(call) {}
    Launcher(const Launcher&) = delete;
    Launcher& operator=(const Launcher&) = delete;
    ~Launcher() {
        if (scratch_ != nullptr) memory()->deallocate(scratch_, bytes_, kAlignment);
    }

    // Called once. What is freed behind the last kernel is used again behind it, in the order of the stream.
    std::byte* scratch(std::size_t bytes) {
        bytes_ = bytes;
        scratch_ = bytes == 0 ? nullptr : static_cast<std::byte*>(memory()->allocate(bytes, kAlignment));
        return scratch_;
    }
    std::pmr::memory_resource* memory() const { return stream_.memory != nullptr ? stream_.memory : device_memory(stream_.handle); }

    template <class Kernel>
    void operator()(const Kernel& kernel, int64_t blocks) const {
        static_assert(sizeof(Kernel) <= 4096, "arguments of a kernel");
        if (blocks <= 0) return;
#ifdef __CUDACC__
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(Kernel::kThreads);
        config.stream = static_cast<cudaStream_t>(stream_.handle);
        if (const cudaError_t error = cudaLaunchKernelEx(&config, run<Kernel>, kernel); error != cudaSuccess) failed(call_, error);
#else
        typename Kernel::Shared shared;
        for (int64_t index = 0; index < blocks; ++index) kernel(ThreadBlock(index, blocks, Kernel::kThreads), shared);
#endif
    }

private:
    static constexpr std::size_t kAlignment = 256;
    Stream stream_;
    [[maybe_unused]] const char* call_;  // not in the rehearsal, where no launch fails
    std::byte* scratch_ = nullptr;
    std::size_t bytes_ = 0;
};

inline int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

}  // namespace batchnorm::cuda
