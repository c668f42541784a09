// The extension module batchnorm._core: signatures, the GIL, exceptions. No arithmetic and no argument messages.
//
// Each operation takes its arguments by position and a last flag `prepared`. Without it, arguments that are not exactly what the core
// can use give None, and nothing has happened: the caller asks _args.py, which raises the right error or prepares the arguments
// (copies what is only read, resolves names), and calls again with prepared = True. So a good call is checked once, here.
#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <atomic>
#include <cmath>

#include "bind/ndarray.h"
#include "bind/output.h"
#include "core/limits.h"
#include "core/memory.h"

namespace batchnorm::bind {
namespace {

// Below this many elements a call is over before another thread could use the GIL.
constexpr std::int64_t kKeepGil = 4096;

// Python before 3.14 ends a daemon thread that wants the GIL while the interpreter exits by pthread_exit. Its unwinding would destroy
// Python objects without the GIL and meet noexcept code; so the thread sleeps until the process is gone, as 3.14 lets it.
void restore_gil(PyThreadState* state) {
    try {
        PyEval_RestoreThread(state);
    } catch (abi::__forced_unwind&) {
        for (;;) pause();
    }
}

template <class F>
void without_gil(std::int64_t elements, F f) {
    if (elements < kKeepGil) return f();
    PyThreadState* const state = PyEval_SaveThread();
    try {
        f();
    } catch (...) {
        restore_gil(state);
        throw;
    }
    restore_gil(state);
}

// Signals are handled on the main thread only. Its identity, from import and anew in the child of a fork.
std::atomic<unsigned long> main_thread{0};

// Runs on the thread that made the call, which has given up the GIL.
bool poll_signals() {
    if (PyThread_get_thread_ident() != main_thread) return false;
    py::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
}

bool as_double(py::handle h, double& out) {
    if (PyFloat_CheckExact(h.ptr())) {
        out = PyFloat_AS_DOUBLE(h.ptr());
        return true;
    }
    if (!PyLong_CheckExact(h.ptr())) return false;
    out = PyLong_AsDouble(h.ptr());
    if (out == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return true;
}

bool as_int(py::handle h, std::int64_t& out) {
    if (!PyLong_Check(h.ptr()) || PyBool_Check(h.ptr())) return false;
    int overflow = 0;
    out = PyLong_AsLongLongAndOverflow(h.ptr(), &overflow);
    return overflow == 0;
}

bool as_activation(py::handle h, Activation& out) {
    if (h.is_none()) {
        out = Activation::none;
        return true;
    }
    if (!PyUnicode_CheckExact(h.ptr()) || PyUnicode_CompareWithASCIIString(h.ptr(), "relu") != 0) return false;
    out = Activation::relu;
    return true;
}

// An array of x's kind and memory order.
py::object empty_like(py::handle x) {
    PyObject* const result = new_like(x);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

std::int64_t elements(const Tensor& v) { return v.outer * v.channels * v.inner; }

std::span<double> span(py::array_t<double>& a) { return {a.mutable_data(), static_cast<std::size_t>(a.size())}; }

// Runs one operation as described at the top: `op` returns the result, or a null object to refuse.
template <class Op>
py::object attempt(bool prepared, Op op) {
    try {
        if (py::object result = op()) return result;
        if (!prepared) return py::none();
        throw std::invalid_argument("these arguments cannot be used as they are");
    } catch (const Interrupted&) {
        throw py::error_already_set();  // set by the signal handler
    } catch (const std::invalid_argument&) {
        if (!prepared) return py::none();
        throw;
    }
}

py::object batch_norm(py::handle x, py::handle mean, py::handle var, py::handle gamma, py::handle beta, py::handle eps, py::handle axis,
                      py::handle activation, py::handle out, bool disjoint, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        BatchNormArgs a;
        std::int64_t channel_axis;
        const std::optional<Array> x_array = as_array(x);
        if (!x_array || !as_int(axis, channel_axis) || !as_double(eps, a.eps) || !as_activation(activation, a.activation) ||
            !as_channels(mean, a.mean) || !as_channels(var, a.var) || !as_channels(gamma, a.gamma) || !as_channels(beta, a.beta)) {
            return {};
        }
        py::object y = out.is_none() ? empty_like(x) : py::reinterpret_borrow<py::object>(out);
        const std::optional<Array> y_array = as_array(y);
        std::array<Tensor, 2> views;
        if (!y_array || !y_array->writable || !as_views<2>({&*x_array, &*y_array}, channel_axis, views)) return {};
        a.x = views[0];
        a.y = views[1];
        a.disjoint = disjoint;
        without_gil(elements(a.y), [&] { batchnorm::batch_norm(a); });
        return y;
    });
}

py::object batch_norm_train(py::handle x, py::handle gamma, py::handle beta, py::handle running_mean, py::handle running_var,
                            py::handle decay, py::handle running_ddof, py::handle eps, py::handle axis, py::handle activation,
                            py::handle out, bool disjoint, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        BatchNormTrainArgs a;
        std::int64_t channel_axis, ddof;
        const std::optional<Array> x_array = as_array(x);
        if (!x_array || !as_int(axis, channel_axis) || !as_double(eps, a.eps) || !as_double(decay, a.decay) ||
            !as_int(running_ddof, ddof) || ddof < 0 || ddof > 1 || !as_activation(activation, a.activation) ||
            !as_channels(gamma, a.gamma) || !as_channels(beta, a.beta) || !as_channels(running_mean, a.running_mean) ||
            !as_channels(running_var, a.running_var)) {
            return {};
        }
        a.running_ddof = static_cast<int>(ddof);
        py::object y = out.is_none() ? empty_like(x) : py::reinterpret_borrow<py::object>(out);
        const std::optional<Array> y_array = as_array(y);
        std::array<Tensor, 2> views;
        if (!y_array || !y_array->writable || !as_views<2>({&*x_array, &*y_array}, channel_axis, views)) return {};
        a.x = views[0];
        a.y = views[1];
        a.disjoint = disjoint;
        py::array_t<double> mean(a.x.channels), inv_std(a.x.channels);
        a.mean = span(mean);
        a.inv_std = span(inv_std);
        without_gil(elements(a.y), [&] { batchnorm::batch_norm_train(a); });
        return py::make_tuple(std::move(y), std::move(mean), std::move(inv_std));
    });
}

// What is not needed is None in the result; dx goes into `out` if that is given.
py::object batch_norm_backward(py::handle dy, py::handle x, py::handle mean, py::handle inv_std, py::handle gamma, py::handle beta,
                               py::handle axis, bool fixed, py::handle activation, bool need_dx, bool need_dgamma, bool need_dbeta,
                               py::handle out, bool disjoint, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        BatchNormBackwardArgs a;
        a.stats = fixed ? Stats::fixed : Stats::batch;
        std::int64_t channel_axis;
        const std::optional<Array> x_array = as_array(x), dy_array = as_array(dy);
        if (!x_array || !dy_array || !as_int(axis, channel_axis) || !as_activation(activation, a.activation) ||
            !as_channels(mean, a.mean) || !as_channels(inv_std, a.inv_std) || !as_channels(gamma, a.gamma) || !as_channels(beta, a.beta)) {
            return {};
        }
        py::object dx = py::none();
        std::array<Tensor, 3> views;
        if (need_dx) {
            dx = out.is_none() ? empty_like(x) : py::reinterpret_borrow<py::object>(out);
            const std::optional<Array> dx_array = as_array(dx);
            if (!dx_array || !dx_array->writable || !as_views<3>({&*x_array, &*dy_array, &*dx_array}, channel_axis, views)) return {};
            a.dx = views[2];
        } else {
            std::array<Tensor, 2> two;
            if (!out.is_none() || !as_views<2>({&*x_array, &*dy_array}, channel_axis, two)) return {};
            views[0] = two[0];
            views[1] = two[1];
        }
        a.x = views[0];
        a.dy = views[1];
        a.disjoint = disjoint;
        // A gradient has its parameter's type, or the other parameter's; without any, float64 for float64 data and float32 for the rest.
        const auto gradient = [&](bool needed, const ConstChannels& parameter, const ConstChannels& other,
                                  Channels& destination) -> py::object {
            if (!needed) return py::none();
            const bool is_double = parameter ? parameter.is_double : other ? other.is_double : x_array->dtype == Dtype::float64;
            py::array g = is_double ? py::array(py::array_t<double>(a.x.channels)) : py::array(py::array_t<float>(a.x.channels));
            destination = Channels(g.mutable_data(), is_double, a.x.channels, 1);
            return g;
        };
        py::object dgamma = gradient(need_dgamma, a.gamma, a.beta, a.dgamma), dbeta = gradient(need_dbeta, a.beta, a.gamma, a.dbeta);
        without_gil(elements(views[0]), [&] { batchnorm::batch_norm_backward(a); });
        return py::make_tuple(std::move(dx), std::move(dgamma), std::move(dbeta));
    });
}

py::object moments(py::handle x, py::handle axis, py::handle ddof, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        std::int64_t channel_axis, delta;
        const std::optional<Array> x_array = as_array(x);
        std::array<Tensor, 1> views;
        if (!x_array || !as_int(axis, channel_axis) || !as_int(ddof, delta) || !as_views<1>({&*x_array}, channel_axis, views)) return {};
        py::array_t<double> mean(views[0].channels), var(views[0].channels);
        const std::span<double> mean_values = span(mean), var_values = span(var);
        without_gil(elements(views[0]), [&] { batchnorm::moments(views[0], mean_values, var_values, delta); });
        return py::make_tuple(std::move(mean), std::move(var));
    });
}

py::object update_running(py::handle running_mean, py::handle running_var, py::handle mean, py::handle var, double decay,
                          std::int64_t count, int ddof) {
    UpdateRunningArgs a;
    if (!as_channels(running_mean, a.running_mean) || !as_channels(running_var, a.running_var) || !as_channels(mean, a.mean) ||
        !as_channels(var, a.var)) {
        throw std::invalid_argument("these arguments cannot be used as they are");
    }
    a.decay = decay;
    a.count = count;
    a.ddof = ddof;
    batchnorm::update_running(a);
    return py::none();
}

template <std::size_t n>
bool have_view(const std::array<std::optional<Array>, 3>& arrays, std::int64_t axis) {
    std::array<const Array*, n> pointers;
    for (std::size_t i = 0; i < n; ++i) {
        if (!arrays[i]) return false;
        pointers[i] = &*arrays[i];
    }
    std::array<Tensor, n> views;
    return as_views<n>(pointers, axis, views);
}

// Whether up to three arrays have the common view (see as_views) that an operation on them would need.
bool has_view(const std::vector<py::object>& objects, std::int64_t axis) {
    std::array<std::optional<Array>, 3> arrays;
    for (std::size_t i = 0; i < objects.size() && i < 3; ++i) arrays[i] = as_array(objects[i]);
    return objects.size() == 1 ? have_view<1>(arrays, axis) : objects.size() == 2 ? have_view<2>(arrays, axis) : have_view<3>(arrays, axis);
}

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.doc() = "Batch normalization kernels; use the functions of the package instead.";
    m.def("batch_norm", &batch_norm);
    m.def("batch_norm_train", &batch_norm_train);
    m.def("batch_norm_backward", &batch_norm_backward);
    m.def("moments", &moments);
    m.def("update_running", &update_running);
    m.def("has_view", &has_view);
    m.def("set_bfloat16_type_num", [](int n) { bfloat16_type_num = n; });
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
    start_outputs();
    set_interrupt_poll(&poll_signals);
}

}  // namespace
}  // namespace batchnorm::bind
