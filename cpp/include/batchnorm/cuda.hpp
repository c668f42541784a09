// batchnorm on a GPU: the calls of batchnorm.hpp on arrays in its memory, on a stream, with the same bits. Built with BATCHNORM_CUDA=ON.
//
// Every pointer of a call but `saved` is of the GPU's memory: tensors, values per channel, masks and weights. Sizes, types and overlaps are
// checked as on the CPU; values are not, as nothing waits for the GPU: NaN flows. A call leaves its work on the stream and returns: it
// allocates nothing but from `memory`, waits for nothing, and can be captured into a graph. The GPU's results have the CPU's bits, but
// for sign and payload of NaN.
#ifndef BATCHNORM_CUDA_HPP
#define BATCHNORM_CUDA_HPP

#include <memory_resource>

#include "batchnorm.hpp"

namespace batchnorm::cuda {
inline namespace v0_2 {

// Where a call's work goes. The stream's GPU must be the current one.
struct Stream {
    void* handle = nullptr;                       // a cudaStream_t
    std::pmr::memory_resource* memory = nullptr;  // for scratch memory, given back before the work is done, so in the stream's order; null:
                                                  // that of device_memory(handle)
};

// A launch that failed: the call's name and what CUDA says. Outputs may be partly written.
struct BATCHNORM_API Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Memory of the current GPU, allocated and freed in the order of a stream, which must outlive it. For a Saved too:
// Saved(device_memory(stream)). Fill that once, with the largest call there will be, before a graph captures calls that use it: what grows
// while a graph is captured would be the graph's. On another stream than the forward's backward waits for an event, as with any array.
BATCHNORM_API std::pmr::memory_resource* device_memory(void* stream);

// As those of batchnorm.hpp; what is not served is an error: integers, Keep::y, OnNonfinite::raise, a group. A Saved must have memory of
// the GPU; what its functions return is there too. Execution's num_threads and check_values are not read.
BATCHNORM_API void batch_norm(const Forward& call, const Stream& stream);
BATCHNORM_API void batch_norm_train(const Forward& call, const Stream& stream);
BATCHNORM_API void batch_norm_backward(const Backward& call, const Stream& stream);
// mean and var: arrays of the GPU.
BATCHNORM_API void moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof, const Stream& stream,
                           const Positions& positions = {});

// "CUDA 13.0", or "rehearsal" where the kernels run on the CPU, for tests.
BATCHNORM_API std::string runtime();

}  // namespace v0_2
}  // namespace batchnorm::cuda

#endif
