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
constexpr int kSetHandler = 304, kGetHandler = 305, kDefaultHandler = 306;

PyObject* (*set_handler)(PyObject*) = nullptr;  // returns the one that was in force
PyObject* (*get_handler)() = nullptr;
PyObject* default_handler = nullptr;
PyObject* our_handler = nullptr;
PyObject* empty_like_function = nullptr;  // numpy.empty_like

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

std::size_t elements_of(py::handle x) {
    const std::optional<Array> a = as_array(x, Kinds::any);
    if (!a) return 0;
    std::int64_t n = 1;
    for (int i = 0; i < a->ndim; ++i) n *= a->shape[i];
    return static_cast<std::size_t>(n);
}

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
PyObject* new_array(std::size_t bytes, Make make) {
    if (bytes < memory::kSmallest || memory::info().limit == 0 || !is_default_handler()) return make();
    // The handler in force is a context variable, so no other thread sees ours.
    PyObject* const before = set_handler(our_handler);
    if (before == nullptr) return nullptr;
    PyObject* const result = make();
    const py::error_scope keep_error;
    PyObject* const ours = set_handler(before);
    if (ours == nullptr) PyErr_Clear();  // no memory for that: then ours stays, which serves any array
    Py_XDECREF(ours);
    Py_DECREF(before);
    return result;
}

}  // namespace

PyObject* new_like(py::handle x) {
    const std::optional<Array> a = as_array(x);
    const std::size_t size = a ? static_cast<std::size_t>(a->element_size()) : 0;
    return new_array(elements_of(x) * size, [&] { return PyObject_CallOneArg(empty_like_function, x.ptr()); });
}

PyObject* new_like(py::handle x, py::handle dtype, const char* order, py::handle shape) {
    const auto size = static_cast<std::size_t>(py::reinterpret_borrow<py::dtype>(dtype).itemsize());
    return new_array(elements_of(x) * size, [&]() -> PyObject* {
        const py::tuple arguments = py::make_tuple(x, dtype, order, false, shape);
        return PyObject_CallObject(empty_like_function, arguments.ptr());
    });
}

void start_outputs() {
    const py::object table = py::detail::import_numpy_core_submodule("multiarray").attr("_ARRAY_API");
    void** const functions = static_cast<void**>(PyCapsule_GetPointer(table.ptr(), nullptr));
    set_handler = reinterpret_cast<PyObject* (*)(PyObject*)>(functions[kSetHandler]);
    get_handler = reinterpret_cast<PyObject* (*)()>(functions[kGetHandler]);
    default_handler = *static_cast<PyObject**>(functions[kDefaultHandler]);
    our_handler = py::capsule(&handler, "mem_handler").release().ptr();
    empty_like_function = py::object(py::module_::import("numpy").attr("empty_like")).release().ptr();
}

}  // namespace batchnorm::bind
