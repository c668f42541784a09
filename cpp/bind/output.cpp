#include "bind/output.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "bind/ndarray.h"
#include "core/memory.h"

namespace batchnorm::bind {
namespace {

// ---- NumPy's side: NEP 49, "data allocation strategies". pybind11 declares none of this.

struct Allocator {
    void* context;
    void* (*malloc)(void* context, std::size_t size);
    void* (*calloc)(void* context, std::size_t count, std::size_t size);
    void* (*realloc)(void* context, void* p, std::size_t size);
    void (*free)(void* context, void* p, std::size_t size);
};

struct Handler {  // PyDataMem_Handler, version 1
    char name[127];
    std::uint8_t version;
    Allocator allocator;
};

// Places in NumPy's table of functions, which never change.
constexpr int kNewLikeArray = 277, kSetHandler = 304, kGetHandler = 305, kDefaultHandler = 306;
constexpr int kKeepOrder = 2;

PyObject* (*set_handler)(PyObject*) = nullptr;  // returns the one that was in force
PyObject* (*get_handler)() = nullptr;
PyObject* default_handler = nullptr;
PyObject* our_handler = nullptr;
PyObject* (*like_array)(PyObject* prototype, int order, PyObject* dtype, int subclass) = nullptr;  // takes over the dtype

// ---- Our side. What the cache cannot serve comes from malloc, as with NumPy's own handler; free() tells the two by asking the cache,
// not by the size it is given: an array that has been resized, or whose dtype was replaced, may give another one.

void* allocate(void*, std::size_t size) {
    void* const p = size < memory::kSmallest ? nullptr : memory::acquire(size);
    return p != nullptr ? p : std::malloc(std::max<std::size_t>(size, 1));
}

void* allocate_zeros(void*, std::size_t count, std::size_t size) {
    return std::calloc(std::max<std::size_t>(count, 1), std::max<std::size_t>(size, 1));
}

void release(void*, void* p, std::size_t) {
    if (!memory::release(p)) std::free(p);
}

// ndarray.resize()
void* reallocate(void*, void* p, std::size_t size) {
    const std::size_t before = memory::size(p);
    if (before == 0) return std::realloc(p, std::max<std::size_t>(size, 1));
    if (size <= before && before - size <= size / 8) return p;
    void* const moved = allocate(nullptr, size);
    if (moved == nullptr) return nullptr;
    std::memcpy(moved, p, std::min(before, size));
    memory::release(p);
    return moved;
}

Handler handler{"batchnorm", 1, {nullptr, &allocate, &allocate_zeros, &reallocate, &release}};

// Whether NumPy's own handler is in force. Who set another wants it for the memory of his arrays; so it is used.
bool is_default_handler() {
    PyObject* const current = get_handler();
    const bool result = current == default_handler;
    if (current == nullptr) PyErr_Clear();
    Py_XDECREF(current);
    return result;
}

// An array of `bytes` that `make` makes.
template <class Make>
py::object owning(std::size_t bytes, Make make) {
    const auto checked = [&] {
        PyObject* const result = make();
        if (result == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    };
    if (bytes < memory::kSmallest || memory::info().limit == 0 || !is_default_handler()) return checked();
    // The handler in force is a context variable, so no other thread sees ours.
    const auto before = py::reinterpret_steal<py::object>(set_handler(our_handler));
    if (!before) throw py::error_already_set();
    PyObject* const result = make();
    {
        const py::error_scope keep_error;
        PyObject* const ours = set_handler(before.ptr());
        if (ours == nullptr) PyErr_Clear();  // no memory for that: then ours stays, which serves any array
        Py_XDECREF(ours);
    }
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

PyObject* dtypes[7] = {};  // by storage type; bfloat16 when it is first asked for

}  // namespace

py::object new_like(const Array& x, PyObject* dtype) {
    const auto size = dtype == nullptr ? x.element_size() : py::reinterpret_borrow<py::dtype>(dtype).itemsize();
    return owning(static_cast<std::size_t>(x.size() * size), [&] {
        Py_XINCREF(dtype);
        return like_array(x.object, kKeepOrder, dtype, 0);
    });
}

py::object new_array(std::span<const py::ssize_t> shape, PyObject* dtype, const py::ssize_t* strides) {
    const auto& numpy = py::detail::npy_api::get();
    // Vectors, which every call makes, are small whatever their type.
    std::size_t bytes =
        shape.size() == 1 && shape[0] < 1024 ? 0 : static_cast<std::size_t>(py::reinterpret_borrow<py::dtype>(dtype).itemsize());
    for (const py::ssize_t n : shape) bytes *= static_cast<std::size_t>(n);
    return owning(bytes, [&] {
        Py_INCREF(dtype);
        return numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, dtype, static_cast<int>(shape.size()), shape.data(), strides, nullptr, 0,
                                           nullptr);
    });
}

void copy_into(const py::object& to, PyObject* from) {
    if (py::detail::npy_api::get().PyArray_CopyInto_(to.ptr(), from) != 0) throw py::error_already_set();
}

py::object view_of(const void* data, std::span<const py::ssize_t> shape, PyObject* dtype, PyObject* owner) {
    const auto& numpy = py::detail::npy_api::get();
    Py_INCREF(dtype);
    // Without the flag for writing, which is the last argument but one.
    auto view = py::reinterpret_steal<py::object>(numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, dtype, static_cast<int>(shape.size()),
                                                                              shape.data(), nullptr, const_cast<void*>(data), 0, nullptr));
    if (!view) throw py::error_already_set();
    Py_INCREF(owner);
    if (numpy.PyArray_SetBaseObject_(view.ptr(), owner) != 0) throw py::error_already_set();
    return view;
}

PyObject* dtype_of(Dtype type) {
    PyObject*& dtype = dtypes[static_cast<int>(type)];
    if (dtype == nullptr) dtype = py::detail::npy_api::get().PyArray_DescrFromType_(type_num(type));
    if (dtype == nullptr) throw py::error_already_set();
    return dtype;
}

PyObject* vector_dtype(bool is_double) { return dtypes[static_cast<int>(is_double ? Dtype::float64 : Dtype::float32)]; }

void start_outputs() {
    const py::object table = py::detail::import_numpy_core_submodule("multiarray").attr("_ARRAY_API");
    void** const functions = static_cast<void**>(PyCapsule_GetPointer(table.ptr(), nullptr));
    like_array = reinterpret_cast<PyObject* (*)(PyObject*, int, PyObject*, int)>(functions[kNewLikeArray]);
    set_handler = reinterpret_cast<PyObject* (*)(PyObject*)>(functions[kSetHandler]);
    get_handler = reinterpret_cast<PyObject* (*)()>(functions[kGetHandler]);
    default_handler = *static_cast<PyObject**>(functions[kDefaultHandler]);
    our_handler = py::capsule(&handler, "mem_handler").release().ptr();
    for (const Dtype type : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::uint8, Dtype::int16, Dtype::uint16}) dtype_of(type);
}

}  // namespace batchnorm::bind
