// The extension module batchnorm._cuda: the operations on arrays of a GPU. It runs a call that python/batchnorm/_gpu.py has prepared at a
// `place`, an object of that file which knows the arrays' library: its device and stream, and how it makes, copies and shows arrays.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "batchnorm/cuda.hpp"
#include "bind/backend.h"
#include "bind/dlpack.h"
#include "bind/operations.h"
#include "bind/saved.h"
#include "core/saved.h"
#ifndef BATCHNORM_REHEARSAL
#include <cuda_runtime_api.h>
#endif

namespace batchnorm::bind {
namespace {

// ---- CUDA, or the CPU in its place

#ifdef BATCHNORM_REHEARSAL

struct OnDevice {
    explicit OnDevice(int) {}
};
void upload(std::uintptr_t to, const std::string& bytes, std::uintptr_t) {
    std::memcpy(reinterpret_cast<void*>(to), bytes.data(), bytes.size());
}
void wait_for(std::uintptr_t, std::uintptr_t) {}
void wait_for_all() {}
std::vector<std::pair<std::string, int>> devices() { return {}; }
int device_of(std::uintptr_t) { return 0; }

#else

void good(cudaError_t error, const char* call) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // it is told by the exception
    throw cuda::Failure(say(call, ": ", cudaGetErrorString(error)));
}

// The current device for as long as this lives.
class OnDevice {
public:
    explicit OnDevice(int device) {
        good(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) good(cudaSetDevice(device), "cudaSetDevice");
        changed_ = device != before_;
    }
    OnDevice(const OnDevice&) = delete;
    ~OnDevice() {
        if (changed_) (void)cudaSetDevice(before_);
    }

private:
    int before_ = 0;
    bool changed_ = false;
};

void upload(std::uintptr_t to, const std::string& bytes, std::uintptr_t stream) {
    good(cudaMemcpyAsync(reinterpret_cast<void*>(to), bytes.data(), bytes.size(), cudaMemcpyHostToDevice,
                         reinterpret_cast<cudaStream_t>(stream)),
         "cudaMemcpyAsync");
}

// Work of `stream` begins when what `other` has to do now is done.
void wait_for(std::uintptr_t stream, std::uintptr_t other) {
    cudaEvent_t event;
    good(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    const cudaError_t recorded = cudaEventRecord(event, reinterpret_cast<cudaStream_t>(other));
    const cudaError_t waits = recorded != cudaSuccess ? recorded : cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(stream), event);
    (void)cudaEventDestroy(event);
    good(waits, "cudaStreamWaitEvent");
}

void wait_for_all() { good(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

// The device that an address belongs to.
int device_of(std::uintptr_t pointer) {
    cudaPointerAttributes attributes;
    good(cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(pointer)), "cudaPointerGetAttributes");
    return attributes.device;
}

// Name and number of multiprocessors of each.
std::vector<std::pair<std::string, int>> devices() {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) return {};
    std::vector<std::pair<std::string, int>> found;
    for (int i = 0; i < n; ++i) {
        cudaDeviceProp properties;
        good(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
        found.emplace_back(properties.name, properties.multiProcessorCount);
    }
    return found;
}

#endif

// ---- the place of a call

PyTypeObject* shadow_type = nullptr;

py::tuple tuple_of(std::span<const py::ssize_t> values) {
    py::tuple t(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) t[i] = values[i];
    return t;
}

py::object as_shadow(py::object array) {
    if (!is_shadow(array.ptr())) throw py::type_error("a place gave no shadow");
    return array;
}

// Memory that a library allocates, as objects of its own.
class LibraryMemory : public std::pmr::memory_resource {
public:
    explicit LibraryMemory(py::object place) : place_(std::move(place)) {}

    const py::object& place() const { return place_; }
    // The block that holds an address, and where it begins; or a null object.
    std::pair<py::object, std::uintptr_t> block_of(const void* p) const {
        const auto address = reinterpret_cast<std::uintptr_t>(p);
        const auto next = blocks_.upper_bound(address);
        if (next == blocks_.begin()) return {};
        return {std::prev(next)->second, std::prev(next)->first};
    }

private:
    // Calls come without the GIL.
    void* do_allocate(std::size_t bytes, std::size_t) override {
        const py::gil_scoped_acquire acquire;
        const auto [block, address] = place_.attr("block")(bytes).cast<std::pair<py::object, std::uintptr_t>>();
        blocks_[address] = block;
        return reinterpret_cast<void*>(address);
    }
    void do_deallocate(void* p, std::size_t, std::size_t) override {
        const py::gil_scoped_acquire acquire;
        blocks_.erase(reinterpret_cast<std::uintptr_t>(p));
    }
    bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

    py::object place_;
    std::map<std::uintptr_t, py::object> blocks_;
};

struct PlaceOfCall {
    LibraryMemory scratch;
    int device;
    void* stream;

    explicit PlaceOfCall(const py::object& place)
        : scratch(place),
          device(place.attr("device").cast<int>()),
          stream(reinterpret_cast<void*>(place.attr("stream").cast<std::uintptr_t>())) {}
};
thread_local PlaceOfCall* here = nullptr;

const py::object& place() { return here->scratch.place(); }

// In a rehearsal: called before and after the library works, so that tests can keep the "GPU's" memory from everybody else.
PyObject *opens = nullptr, *closes = nullptr;

struct Opened {
    static void call(PyObject* f) {
        if (f == nullptr) return;
        const py::gil_scoped_acquire acquire;
        py::reinterpret_borrow<py::object>(f)();
    }
    Opened() { call(opens); }
    Opened(const Opened&) = delete;
    ~Opened() { call(closes); }
};

template <class F>
void on_gpu(const F& f) {
    const OnDevice device(here->device);
    const Opened opened;
    f(cuda::Stream{here->stream, &here->scratch});
}

[[noreturn]] void not_served(const char* call, const std::string& instead) {
    value_error("", say(call, "() is not served on a GPU, expected arrays on the CPU", instead));
}

}  // namespace

// ---- backend.h

namespace library {

void batch_norm(const Forward& call) {
    on_gpu([&](const cuda::Stream& stream) { cuda::batch_norm(call, stream); });
}
void batch_norm_train(const Forward& call) {
    on_gpu([&](const cuda::Stream& stream) { cuda::batch_norm_train(call, stream); });
}
void batch_norm_backward(const Backward& call) {
    on_gpu([&](const cuda::Stream& stream) { cuda::batch_norm_backward(call, stream); });
}
void moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof, int, const Positions& positions,
             Group*, std::int64_t) {
    on_gpu([&](const cuda::Stream& stream) { cuda::moments(x, mean, var, ddof, stream, positions); });
}
void batch_norm_double_backward(const DoubleBackward&) { not_served("batch_norm_double_backward", ""); }
void save(const Forward&, const ConstChannels&, bool) {
    not_served("Saved.of", "; of batch_norm_train(x, ..., mean=mean, var=var) a Saved may be had there too");
}
void moment_sums(const ConstTensor&, std::span<double>, int, const Positions&) { not_served("Moments.update", "; moments(x) is served"); }
void update_running(const UpdateRunningArgs&) {
    not_served("update_running", "; batch_norm_train(x, running_mean=..., running_var=...) does it there too");
}

}  // namespace library

bool is_shadow(PyObject* array) { return Py_TYPE(array) == shadow_type; }

std::unique_ptr<std::pmr::memory_resource> memory_for_saved() { return std::make_unique<LibraryMemory>(place()); }

std::array<std::uint64_t, 2> change_mark(PyObject* array) {
    const py::object of = place().attr("mark")(py::handle(array));
    return of.cast<std::array<std::uint64_t, 2>>();
}

py::object number_on_gpu(double value) { return as_shadow(place().attr("number")(value)); }

py::object steps_on_gpu(PyObject* lengths, std::int64_t steps) { return as_shadow(place().attr("steps")(py::handle(lengths), steps)); }

py::object packed(PyObject* from, std::span<const py::ssize_t> shape, std::span<const py::ssize_t> steps, PyObject* dtype) {
    const py::object type = dtype == nullptr ? py::handle(from).attr("dtype") : py::reinterpret_borrow<py::object>(dtype);
    return as_shadow(place().attr("packed")(py::handle(from), tuple_of(shape), tuple_of(steps), type));
}

const double* saved_parameter(const Saved& saved, bool is_gamma) {
    const Saved::Impl& s = *saved.get();
    return is_gamma ? s.gamma.data : s.beta.data;
}

// ---- output.h

namespace {

// Strides without gaps of axes that lie in memory as those of x.
std::vector<py::ssize_t> strides_like(const Array& x, py::ssize_t size) {
    std::vector<int> order(static_cast<std::size_t>(x.ndim));
    for (int i = 0; i < x.ndim; ++i) order[static_cast<std::size_t>(i)] = i;
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return std::abs(x.strides[i]) > std::abs(x.strides[j]); });
    std::vector<py::ssize_t> strides(order.size());
    for (auto axis = order.rbegin(); axis != order.rend(); size *= std::max<py::ssize_t>(x.shape[*axis], 1), ++axis) {
        strides[static_cast<std::size_t>(*axis)] = size;
    }
    return strides;
}

std::vector<py::ssize_t> plain_strides(std::span<const py::ssize_t> shape, py::ssize_t size) {
    std::vector<py::ssize_t> strides(shape.size());
    for (std::size_t i = shape.size(); i-- > 0; size *= std::max<py::ssize_t>(shape[i], 1)) strides[i] = size;
    return strides;
}

py::object new_shadow(std::span<const py::ssize_t> shape, py::handle dtype, std::span<const py::ssize_t> strides) {
    return as_shadow(place().attr("empty")(tuple_of(shape), dtype, tuple_of(strides)));
}

py::ssize_t size_of(PyObject* dtype) { return py::reinterpret_borrow<py::dtype>(dtype).itemsize(); }

PyObject* dtypes[7] = {};

}  // namespace

py::object new_like(const Array& x, PyObject* dtype) {
    PyObject* const type = dtype != nullptr ? dtype : dtype_of(x.dtype);
    return new_shadow({x.shape, static_cast<std::size_t>(x.ndim)}, type, strides_like(x, size_of(type)));
}

py::object new_array(std::span<const py::ssize_t> shape, PyObject* dtype, const py::ssize_t* strides) {
    if (strides != nullptr) return new_shadow(shape, dtype, {strides, shape.size()});
    return new_shadow(shape, dtype, plain_strides(shape, size_of(dtype)));
}

void copy_into(const py::object& to, PyObject* from) { place().attr("copy")(to, py::handle(from)); }

py::object view_of(const void* data, std::span<const py::ssize_t> shape, PyObject* dtype, PyObject* owner) {
    const auto& memory = static_cast<const LibraryMemory&>(*saved_of(owner, "").memory);
    const auto [block, begin] = memory.block_of(data);
    if (!block) {
        const auto strides = plain_strides(shape, size_of(dtype));
        return memory.place().attr("empty")(tuple_of(shape), py::handle(dtype), tuple_of(strides)).attr("base");
    }
    return memory.place().attr("view")(block, reinterpret_cast<std::uintptr_t>(data) - begin, tuple_of(shape), py::handle(dtype));
}

PyObject* dtype_of(Dtype type) {
    PyObject*& dtype = dtypes[static_cast<int>(type)];
    if (dtype == nullptr) dtype = py::detail::npy_api::get().PyArray_DescrFromType_(type_num(type));
    if (dtype == nullptr) throw py::error_already_set();
    return dtype;
}

PyObject* vector_dtype(bool is_double) { return dtype_of(is_double ? Dtype::float64 : Dtype::float32); }

// ---- the module

namespace {

// An ndarray that stands for an array of a GPU: `strides` in elements, or in bytes with a unit of 1.
py::object shadow(const py::object& owner, std::uintptr_t pointer, const std::vector<py::ssize_t>& shape, std::vector<py::ssize_t> strides,
                  py::ssize_t unit, const py::dtype& dtype, bool writable) {
    using N = py::detail::npy_api;
    if (pointer == 0) pointer = 256;  // without elements; NumPy would allocate some
    for (py::ssize_t& stride : strides) stride *= unit;
    auto made = py::reinterpret_steal<py::object>(
        N::get().PyArray_NewFromDescr_(shadow_type, py::dtype(dtype).release().ptr(), static_cast<int>(shape.size()), shape.data(),
                                       strides.data(), reinterpret_cast<void*>(pointer), writable ? N::NPY_ARRAY_WRITEABLE_ : 0, nullptr));
    if (!made) throw py::error_already_set();
    if (N::get().PyArray_SetBaseObject_(made.ptr(), py::object(owner).release().ptr()) != 0) throw py::error_already_set();
    return made;
}

std::map<std::string, Signature>& signatures() {
    static auto* const all = new std::map<std::string, Signature>;
    return *all;
}

// An operation, by its stub.
void serve(const std::string& name, const py::object& stub) {
    for (const Operation& known : operations()) {
        if (name == known.name) signatures().insert_or_assign(name, Signature(known, stub));
    }
}

// Runs an operation on shadows.
py::object run(const py::object& place, const std::string& operation, const py::dict& arguments) {
    const auto found = signatures().find(operation);
    if (found == signatures().end()) throw py::key_error(operation);
    std::vector<PyObject*> values;
    py::tuple keywords(arguments.size());
    for (const auto& [word, value] : arguments) {
        keywords[values.size()] = word;
        values.push_back(value.ptr());
    }
    PlaceOfCall now(place);
    PlaceOfCall* const before = std::exchange(here, &now);
    PyObject* const result = found->second.call(values.data(), 0, keywords.ptr());
    here = before;
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

// Memory of the library of kernels, for arrays of no library that could make some.
class Block {
public:
    Block(std::size_t bytes, int device, std::uintptr_t stream) : device_(device), bytes_(std::max<std::size_t>(bytes, 1)) {
        const OnDevice on(device);
        memory_ = cuda::device_memory(reinterpret_cast<void*>(stream));
        data_ = memory_->allocate(bytes_, 256);
    }
    Block(const Block&) = delete;
    ~Block() {
        try {
            const OnDevice on(device_);
            if (shared) {
                wait_for_all();
                memory_ = cuda::device_memory(nullptr);  // the other stream may be gone
            }
            memory_->deallocate(data_, bytes_, 256);
        } catch (const std::exception&) {
            // The process ends, and CUDA has ended before.
        }
    }
    std::uintptr_t pointer() const { return reinterpret_cast<std::uintptr_t>(data_); }
    bool shared = false;  // other libraries have it, and may still be at work on any stream when they let go of it

private:
    int device_;
    std::size_t bytes_;
    std::pmr::memory_resource* memory_;
    void* data_;
};

py::object place_of(const py::object& saved) {
    return static_cast<const LibraryMemory&>(*saved_of(saved.ptr(), "batch_norm_backward").memory).place();
}

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
    m.doc() = "Batch normalization on a GPU; use the functions of the package instead.";
    start_keywords();
    const py::object ndarray = py::module_::import("numpy").attr("ndarray");
    py::dict members;
    members["__module__"] = "batchnorm._cuda";
    members["__array_ufunc__"] = py::none();
    py::object type = py::module_::import("builtins").attr("type")("Shadow", py::make_tuple(ndarray), members);
    m.attr("Shadow") = type;
    shadow_type = reinterpret_cast<PyTypeObject*>(type.release().ptr());
    m.add_object("Saved", py::reinterpret_borrow<py::object>(make_saved_type()));
    for (const Operation& raw : raw_operations()) signatures().emplace(raw.name, Signature(raw));
    py::class_<Block>(m, "Block", py::module_local())
        .def(py::init<std::size_t, int, std::uintptr_t>())
        .def_readwrite("shared", &Block::shared)
        .def_property_readonly("pointer", &Block::pointer);
    m.def("serve", &serve);
    m.def("run", &run);
    m.def("shadow", &shadow);
    m.def("place_of", &place_of);
    m.def("upload", [](std::uintptr_t to, const std::string& bytes, std::uintptr_t stream) {
        const Opened opened;
        upload(to, bytes, stream);
    });
    m.def("wait_for", &wait_for);
    m.def("device_of", &device_of);
    m.def("devices", &devices);
    m.def("runtime", &cuda::runtime);
    m.def("read_capsule", &read_capsule);
    m.def("make_capsule", &make_capsule);
    m.def("watch", [](py::object before, py::object after) {
        opens = before.is_none() ? nullptr : before.release().ptr();
        closes = after.is_none() ? nullptr : after.release().ptr();
    });
    m.def("use_results", [](const py::type& train, const py::type& backward, const py::type& double_backward) {
        const auto result = [](const py::type& t) { return reinterpret_cast<PyTypeObject*>(t.ptr()); };
        use_results(result(train), result(backward), result(double_backward));
    });
}

}  // namespace
}  // namespace batchnorm::bind
