// The extension module batchnorm._core: the type of the operations, the functions about the library, signals.
#include <pybind11/stl.h>
#include <structmember.h>

#include <atomic>

#include "bind/group.h"
#include "bind/operations.h"
#include "bind/saved.h"
#include "core/limits.h"
#include "core/memory.h"

namespace batchnorm::bind {
namespace {

// ---- signals

// They are handled on the main thread only. Its identity, from import and anew in the child of a fork.
std::atomic<unsigned long> main_thread{0};

// Runs on the thread that made the call, which has given up the GIL.
bool poll_signals() {
    if (PyThread_get_thread_ident() != main_thread) return false;
    py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

// ---- _core.Operation: what NumPy's functions are too, an object that is called without a frame. Name, docstring and signature are those
// of a stub in Python, found through __wrapped__.

struct OperationObject {
    PyObject_HEAD vectorcallfunc vectorcall;
    PyObject *dict, *weakrefs;
    const Signature* signature;  // nullptr: an entrance, which calls
    PyObject* function;
};

PyTypeObject* operation_type = nullptr;

OperationObject& self(PyObject* o) { return *reinterpret_cast<OperationObject*>(o); }

PyObject* vectorcall(PyObject* o, PyObject* const* arguments, std::size_t n, PyObject* keywords) {
    return self(o).signature->call(arguments, PyVectorcall_NARGS(n), keywords);
}

// Calls a Python function. What its binding refuses, before it has a frame for a traceback, is told in the words of the hints.
PyObject* enter(PyObject* o, PyObject* const* arguments, std::size_t n, PyObject* keywords) {
    PyObject* const function = self(o).function;
    PyObject* const result = PyObject_Vectorcall(function, arguments, n, keywords);
    if (result != nullptr || PyErr_ExceptionMatches(PyExc_TypeError) == 0) return result;
    return guarded([&]() -> py::object {
        py::error_already_set e;
        if (e.trace()) throw e;
        type_error("", refusal(function, arguments, PyVectorcall_NARGS(n), keywords));
    });
}

// As an attribute of a class it binds, as functions do; inspect takes it for a routine for having this.
PyObject* bind(PyObject* o, PyObject* instance, PyObject*) {
    return instance == nullptr || instance == Py_None ? Py_NewRef(o) : PyMethod_New(o, instance);
}

PyObject* repr(PyObject* o) {
    return guarded([&] {
        const py::handle h(o);
        return py::object(py::str("<function {}.{}>").format(h.attr("__module__"), h.attr("__qualname__")));
    });
}

// Pickled, and copied, by name.
PyObject* reduce(PyObject* o, PyObject*) { return PyObject_GetAttrString(o, "__qualname__"); }

PyObject* keywords(PyObject* o, void*) {
    if (self(o).signature == nullptr) return PyErr_SetString(PyExc_AttributeError, "keywords"), nullptr;
    return guarded([&] {
        const std::span<const Name> names = self(o).signature->operation().names;
        py::tuple words(names.size());
        for (std::size_t i = 0; i < names.size(); ++i) words[i] = py::str(word(names[i]));
        return py::object(words);
    });
}

void dealloc(PyObject* o) {
    if (self(o).weakrefs != nullptr) PyObject_ClearWeakRefs(o);
    Py_CLEAR(self(o).dict);
    Py_CLEAR(self(o).function);
    PyTypeObject* const type = Py_TYPE(o);
    type->tp_free(o);
    Py_DECREF(type);
}

PyObject* make_operation_type() {
    static PyMethodDef methods[] = {{"__reduce__", &reduce, METH_NOARGS, nullptr}, {}};
    static PyGetSetDef attributes[] = {{"__dict__", &PyObject_GenericGetDict, &PyObject_GenericSetDict, nullptr, nullptr},
                                       {"keywords", &keywords, nullptr, "Names of the parameters, in order.", nullptr},
                                       {}};
    static PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(OperationObject, vectorcall), READONLY, nullptr},
                                    {"__dictoffset__", T_PYSSIZET, offsetof(OperationObject, dict), READONLY, nullptr},
                                    {"__weaklistoffset__", T_PYSSIZET, offsetof(OperationObject, weakrefs), READONLY, nullptr},
                                    {}};
    const auto slot = [](int id, auto* f) { return PyType_Slot{id, reinterpret_cast<void*>(f)}; };
    PyType_Slot slots[] = {slot(Py_tp_call, &PyVectorcall_Call),
                           slot(Py_tp_descr_get, &bind),
                           slot(Py_tp_repr, &repr),
                           slot(Py_tp_dealloc, &dealloc),
                           {Py_tp_methods, methods},
                           {Py_tp_getset, attributes},
                           {Py_tp_members, members},
                           {0, nullptr}};
    PyType_Spec spec{"batchnorm._core.Operation", static_cast<int>(sizeof(OperationObject)), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR | Py_TPFLAGS_DISALLOW_INSTANTIATION |
                         Py_TPFLAGS_IMMUTABLETYPE,
                     slots};
    operation_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    if (operation_type == nullptr) throw py::error_already_set();
    return reinterpret_cast<PyObject*>(operation_type);
}

py::object new_operation(const Signature* signature, py::handle function = {}) {
    auto made = py::reinterpret_steal<py::object>(operation_type->tp_alloc(operation_type, 0));
    if (!made) throw py::error_already_set();
    self(made.ptr()).vectorcall = signature == nullptr ? &enter : &vectorcall;
    self(made.ptr()).signature = signature;
    self(made.ptr()).function = function.inc_ref().ptr();
    return made;
}

// The decorator of a Python function that users call.
py::object entrance(const py::object& function) {
    py::object made = new_operation(nullptr, function);
    py::module_::import("functools").attr("update_wrapper")(made, function);
    return made;
}

// The decorator: a Python function without a body becomes the operation of its name.
py::object operation(const py::object& stub) {
    const std::string name = py::str(stub.attr("__name__"));
    for (const Operation& known : operations()) {
        if (name != known.name) continue;
        if (name == "saved_of") {
            stub.attr("__name__") = "of";
            stub.attr("__qualname__") = "Saved.of";
        }
        py::object made = new_operation(new Signature(known, stub));
        py::module_::import("functools").attr("update_wrapper")(made, stub);
        made.attr("__module__") = "batchnorm";
        if (name == "saved_of") {
            const auto static_method = py::reinterpret_steal<py::object>(PyStaticMethod_New(made.ptr()));
            py::module_::import("batchnorm._core").attr("Saved").attr("of") = static_method;
        }
        return made;
    }
    throw py::type_error("the extension has no operation " + name);
}

// ---- sums of moments, as moment_sums made them, in this process or before

using SumsVector = py::array_t<double, py::array::c_style>;
std::span<const double> sums_of(const SumsVector& v) { return {v.data(), static_cast<std::size_t>(v.size())}; }

py::object merged_moment_sums(const SumsVector& a, const SumsVector& b) {
    py::array_t<double> sums(a.size());
    std::copy_n(a.data(), a.size(), sums.mutable_data());
    merge_moment_sums({sums.mutable_data(), static_cast<std::size_t>(sums.size())}, sums_of(b));
    return sums;
}

py::tuple moments_of_sums(const SumsVector& sums) {
    const py::ssize_t channels = sums.size() / moment_sums_size(1);
    py::array_t<double> count(channels), mean(channels), m2(channels);
    const auto values = [&](py::array_t<double>& v) { return std::span(v.mutable_data(), static_cast<std::size_t>(channels)); };
    moments_from_sums(sums_of(sums), values(count), values(mean), values(m2));
    return py::make_tuple(std::move(count), std::move(mean), std::move(m2));
}

// ---- the module

void add_library_functions(py::module_& m) {
    m.def("tuning", &tuning);
    m.def("set_tuning", [](const std::string& settings) { set_tuning(settings); });
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads);
    m.def("isa", &isa);
    m.def("set_isa", [](const std::string& name) { set_isa(name); });
    m.def("isa_levels", &isa_levels);
    m.def("isa_built", &isa_built);
    m.def("isa_reason", &isa_reason);
    m.def("cache_info", [] {
        const memory::Info i = memory::info();
        return py::make_tuple(i.limit, i.held, i.in_use, i.buffers, i.hits, i.misses);
    });
    m.def("set_cache_limit", &memory::set_limit);
    m.def("empty_cache", &memory::empty);
    m.def("container_limits", [](const std::string& root, const std::string& groups) {
        const limits::Container c = limits::container(root, groups);
        return py::make_tuple(c.cpus, c.bytes);
    });
    m.def("openmp_runtime", &openmp_runtime);
    m.def("compiler", &compiler);
    m.def("version", &version);
    m.def("set_main_thread", [](unsigned long ident) { main_thread = ident; });
}

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.doc() = "Batch normalization kernels; use the functions of the package instead.";
    start_outputs();
    start_keywords();
    set_interrupt_poll(&poll_signals);
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const Error& e) {
            PyErr_SetString(e.kind == Error::type ? PyExc_TypeError : PyExc_ValueError, e.what());
        }
    });
    m.add_object("Saved", py::reinterpret_borrow<py::object>(make_saved_type()));
    m.add_object("Operation", py::reinterpret_borrow<py::object>(make_operation_type()));
    for (const Operation& raw : raw_operations()) {
        py::object made = new_operation(new Signature(raw));
        for (const char* name : {"__name__", "__qualname__"}) made.attr(name) = raw.name;
        m.add_object(raw.name, made);
    }
    m.def("operation", &operation);
    m.def("entrance", &entrance);
    m.def("use_results", [](const py::type& train, const py::type& backward, const py::type& double_backward) {
        const auto type = [](const py::type& t) { return reinterpret_cast<PyTypeObject*>(t.ptr()); };
        use_results(type(train), type(backward), type(double_backward));
    });
    m.def("check_group", [](const py::object& group) { PythonGroup(group.ptr()); });
    m.def("gather", [](const py::object& group, const SumsVector& mine) {
        PythonGroup of(group.ptr());
        py::list all;
        for (const std::vector<double>& values : gather(of, sums_of(mine))) {
            all.append(py::array_t<double>(static_cast<py::ssize_t>(values.size()), values.data()));
        }
        return all;
    });
    m.def("fail_group", [](const py::object& group, const std::string& message) { PythonGroup(group.ptr()).tell(message); });
    m.def("merged_moment_sums", &merged_moment_sums);
    m.def("moments_from_sums", &moments_of_sums);
    add_library_functions(m);
}

}  // namespace
}  // namespace batchnorm::bind
