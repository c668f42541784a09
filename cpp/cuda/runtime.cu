// Memory in the order of a stream, and what the build is.
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "launch.h"

namespace batchnorm::cuda {
namespace {

class StreamMemory : public std::pmr::memory_resource {
public:
    explicit StreamMemory(void* stream) : stream_(stream) {}

private:
#ifdef __CUDACC__
    void* do_allocate(std::size_t bytes, std::size_t) override {
        void* p = nullptr;
        const cudaError_t error = cudaMallocAsync(&p, bytes, static_cast<cudaStream_t>(stream_));
        if (error == cudaErrorMemoryAllocation) {
            (void)cudaGetLastError();  // it is told by the exception
            throw std::bad_alloc();
        }
        if (error != cudaSuccess) failed("memory", error);
        return p;
    }
    void do_deallocate(void* p, std::size_t, std::size_t) override { (void)cudaFreeAsync(p, static_cast<cudaStream_t>(stream_)); }
#else
    void* do_allocate(std::size_t bytes, std::size_t alignment) override { return ::operator new(bytes, std::align_val_t(alignment)); }
    void do_deallocate(void* p, std::size_t, std::size_t alignment) override { ::operator delete(p, std::align_val_t(alignment)); }
#endif
    bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
    [[maybe_unused]] void* stream_;
};

}  // namespace

#ifdef __CUDACC__
void failed(const char* call, cudaError_t error) {
    (void)cudaGetLastError();  // it is told here
    throw Failure(std::string(call) + ": " + cudaGetErrorString(error));
}
#endif

inline namespace v0_2 {

std::pmr::memory_resource* device_memory(void* stream) {
    static std::mutex mutex;
    static std::map<void*, std::unique_ptr<StreamMemory>> memories;
    const std::scoped_lock lock(mutex);
    std::unique_ptr<StreamMemory>& memory = memories[stream];
    if (memory == nullptr) memory = std::make_unique<StreamMemory>(stream);
    return memory.get();
}

std::string runtime() {
#ifdef __CUDACC__
    return "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
    return "rehearsal";
#endif
}

}  // namespace v0_2

}  // namespace batchnorm::cuda
