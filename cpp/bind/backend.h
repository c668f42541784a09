// Whose arrays the bindings serve: NumPy's, as the extension batchnorm._core, or a GPU's, as batchnorm._cuda, for which the same files are
// compiled once more with BATCHNORM_BIND_GPU. There an array is a shadow: an ndarray with the address, shape and strides of an array of the
// GPU, whose values nobody here may touch. What that takes is below, in gpu.cpp, and where files ask for kGpu.
#pragma once

#include <memory>
#include <memory_resource>

#include "bind/ndarray.h"

namespace batchnorm::bind {

// The library's calls.
#ifdef BATCHNORM_BIND_GPU

inline constexpr bool kGpu = true;

namespace library {
void batch_norm(const Forward& call);
void batch_norm_train(const Forward& call);
void batch_norm_backward(const Backward& call);
void moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof, int num_threads,
             const Positions& positions, Group* group, std::int64_t sample_outer);
// Those that are not served, an error.
void batch_norm_double_backward(const DoubleBackward& call);
void save(const Forward& call, const ConstChannels& inv_std, bool batch_statistics);
void moment_sums(const ConstTensor& x, std::span<double> sums, int num_threads, const Positions& positions);
void update_running(const UpdateRunningArgs& args);
}  // namespace library

#else

inline constexpr bool kGpu = false;
namespace library = batchnorm;

#endif

// ---- of a GPU alone

// Whether it is a GPU's array, not one on the CPU.
bool is_shadow(PyObject* array);
// Memory of the array's library for a Saved of this call.
std::unique_ptr<std::pmr::memory_resource> memory_for_saved();
// What changes when a library notes that the array was overwritten, or when it gets other memory; zeros where it notes nothing.
std::array<std::uint64_t, 2> change_mark(PyObject* array);
// One double of the GPU.
py::object number_on_gpu(double value);
// Which of so many steps count, a bool for each sample and step, of lengths on either side.
py::object steps_on_gpu(PyObject* lengths, std::int64_t steps);
// Elements of `from`, of this shape and with these steps in bytes, as an array without gaps; of another dtype if one is given.
py::object packed(PyObject* from, std::span<const py::ssize_t> shape, std::span<const py::ssize_t> steps, PyObject* dtype);
// gamma or beta as a Saved has them.
const double* saved_parameter(const Saved& saved, bool is_gamma);

}  // namespace batchnorm::bind
