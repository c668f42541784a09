// Memory in the order of a stream, and what the build is.
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "launch.h"

namespace batchnorm::cuda {
namespace {

#ifdef __CUDACC__
int current_device() {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) failed("device", error);
    return device;
}
// A pool of the library's own, which keeps what it has: the default one gives all back to the system whenever somebody waits.
cudaMemPool_t pool_of(int device) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, device};
    cudaMemPool_t pool = nullptr;
    if (const cudaError_t error = cudaMemPoolCreate(&pool, &properties); error != cudaSuccess) failed("memory", error);
    std::uint64_t all = UINT64_MAX;
    if (const cudaError_t error = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all); error != cudaSuccess) {
        failed("memory", error);
    }
    return pool;
}
#else
int current_device() { return 0; }
#endif

class StreamMemory : public std::pmr::memory_resource {
public:
#ifdef __CUDACC__
    StreamMemory(void* stream, cudaMemPool_t pool) : stream_(static_cast<cudaStream_t>(stream)), pool_(pool) {}
#endif

private:
#ifdef __CUDACC__
    void* do_allocate(std::size_t bytes, std::size_t) override {
        void* p = nullptr;
        const cudaError_t error = cudaMallocFromPoolAsync(&p, bytes, pool_, stream_);
        if (error == cudaErrorMemoryAllocation) {
            (void)cudaGetLastError();  // it is told by the exception
            throw std::bad_alloc();
        }
        if (error != cudaSuccess) failed("memory", error);
        return p;
    }
    void do_deallocate(void* p, std::size_t, std::size_t) override { (void)cudaFreeAsync(p, stream_); }
    cudaStream_t stream_;
    cudaMemPool_t pool_;
#else
    void* do_allocate(std::size_t bytes, std::size_t alignment) override { return ::operator new(bytes, std::align_val_t(alignment)); }
    void do_deallocate(void* p, std::size_t, std::size_t alignment) override { ::operator delete(p, std::align_val_t(alignment)); }
#endif
    bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
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
    static std::map<std::pair<int, void*>, std::unique_ptr<StreamMemory>> memories;
    const int device = current_device();  // each has a stream that is null
    const std::scoped_lock lock(mutex);
    std::unique_ptr<StreamMemory>& memory = memories[{device, stream}];
    if (memory != nullptr) return memory.get();
#ifdef __CUDACC__
    static std::map<int, cudaMemPool_t> pools;
    cudaMemPool_t& pool = pools[device];
    if (pool == nullptr) pool = pool_of(device);
    memory = std::make_unique<StreamMemory>(stream, pool);
#else
    memory = std::make_unique<StreamMemory>();
#endif
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
