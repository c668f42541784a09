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
#include <cstring>

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

// An activation's name, and the slope, which leaky_relu alone may have; None leaves its default.
bool as_activation(py::handle name, py::handle slope, Activation& out, double& out_slope) {
    if (name.is_none()) {
        out = Activation::none;
        return slope.is_none();
    }
    if (!PyUnicode_CheckExact(name.ptr())) return false;
    constexpr std::pair<const char*, Activation> names[] = {{"relu", Activation::relu},   {"leaky_relu", Activation::leaky_relu},
                                                            {"relu6", Activation::relu6}, {"sigmoid", Activation::sigmoid},
                                                            {"tanh", Activation::tanh},   {"silu", Activation::silu}};
    for (const auto& [known, activation] : names) {
        if (PyUnicode_CompareWithASCIIString(name.ptr(), known) != 0) continue;
        out = activation;
        return slope.is_none() || (activation == Activation::leaky_relu && as_double(slope, out_slope));
    }
    return false;
}

// Whether the forward keeps a mask after a residual; of the smooth ones backward needs more than a bit.
bool has_mask(Activation a) { return a == Activation::relu || a == Activation::leaky_relu || a == Activation::relu6; }

// An array of x's kind and memory order.
py::object empty_like(py::handle x) {
    PyObject* const result = new_like(x);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

// A new vector of n values. (py::array_t's constructor takes three times the instructions.)
template <class T>
struct Vector {
    py::object array;
    std::span<T> values;

    explicit Vector(std::int64_t n) {
        const auto& numpy = py::detail::npy_api::get();
        Py_intptr_t length = n;
        PyObject* const made =
            numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, py::dtype::of<T>().release().ptr(), 1, &length, nullptr, nullptr, 0, nullptr);
        if (made == nullptr) throw py::error_already_set();
        array = py::reinterpret_steal<py::object>(made);
        values = {reinterpret_cast<T*>(py::detail::array_proxy(made)->data), static_cast<std::size_t>(n)};
    }
};

template <bool writable>
std::int64_t elements(const AnyView<writable>& v) {
    return v.outer * v.channels * v.inner;
}

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

// None means the default, 0 in the core.
bool as_thread_count(py::handle h, int& out) {
    std::int64_t n = 0;
    if (!h.is_none() && (!as_int(h, n) || n < 1 || n > 65536)) return false;
    out = static_cast<int>(n);
    return true;
}

// The arrays that an operation takes together, x first, and their views.
class Together {
public:
    // Adds an array that is read, or written, and says where its view goes.
    bool read(py::handle h, ConstTensor& to, Kinds kinds = Kinds::floating) { return add(h, false, &to, nullptr, kinds); }
    bool write(py::handle h, Tensor& to) { return add(h, true, nullptr, &to); }
    bool look(std::int64_t axis) {
        const Array* pointers[kMaxTogether];
        for (std::size_t i = 0; i < n_; ++i) pointers[i] = &*arrays_[i];
        Tensor views[kMaxTogether];
        if (!as_views(std::span(pointers, n_), axis, std::span(views, n_))) return false;
        for (std::size_t i = 0; i < n_; ++i) {
            if (read_[i] != nullptr) *read_[i] = views[i];
            if (written_[i] != nullptr) *written_[i] = views[i];
        }
        return true;
    }
    Dtype dtype() const { return arrays_[0]->dtype; }

private:
    bool add(py::handle h, bool writable, ConstTensor* read, Tensor* written, Kinds kinds = Kinds::floating) {
        arrays_[n_] = as_array(h, kinds);
        if (!arrays_[n_] || (writable && !arrays_[n_]->writable)) return false;
        read_[n_] = read;
        written_[n_++] = written;
        return true;
    }
    std::optional<Array> arrays_[kMaxTogether];
    ConstTensor* read_[kMaxTogether];
    Tensor* written_[kMaxTogether];
    std::size_t n_ = 0;
};

py::object given_or_like(py::handle out, py::handle x) { return out.is_none() ? empty_like(x) : py::reinterpret_borrow<py::object>(out); }

py::object batch_norm(py::handle x, py::handle mean, py::handle var, py::handle gamma, py::handle beta, py::handle eps, py::handle axis,
                      py::handle activation, py::handle slope, py::handle residual, py::handle mask, py::handle num_threads, py::handle out,
                      py::handle positions, bool disjoint, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        BatchNormArgs a;
        std::int64_t channel_axis;
        Together together;
        if (!together.read(x, a.x) || !as_int(axis, channel_axis) || !as_double(eps, a.eps) ||
            !as_activation(activation, slope, a.activation, a.slope) || !as_channels(mean, a.mean) || !as_channels(var, a.var) ||
            !as_channels(gamma, a.gamma) || !as_channels(beta, a.beta) || !as_mask(mask, a.activation_mask) ||
            !as_thread_count(num_threads, a.num_threads) || !as_positions(positions, a.positions)) {
            return {};
        }
        py::object y = given_or_like(out, x);
        if (!together.write(y, a.y) || (!residual.is_none() && !together.read(residual, a.residual)) || !together.look(channel_axis)) {
            return {};
        }
        a.disjoint = disjoint;
        without_gil(elements(a.y), [&] { batchnorm::batch_norm(a); });
        return y;
    });
}

// Axis `i` of x in a result whose channels are moved from axis `from` to axis `to`, as numpy.moveaxis does.
int moved_axis(int i, int from, int to) {
    if (i == from) return to;
    const int other = i < from ? i : i - 1;
    return other < to ? other : other + 1;
}

// An array with the channels at `to` seen in the order of axes it would have with the channels at `from`.
struct Moved {
    py::ssize_t shape[kMaxDims], strides[kMaxDims];
    Array array;
    Moved(const Array& a, int from, int to) : array(a) {
        for (int i = 0; i < a.ndim; ++i) {
            shape[i] = a.shape[moved_axis(i, from, to)];
            strides[i] = a.strides[moved_axis(i, from, to)];
        }
        array.shape = shape;
        array.strides = strides;
    }
    Moved(const Moved&) = delete;
};

// batch_norm for x of integers, the result's dtype (a numpy.dtype) and channel axis given; both axes are >= 0. Nothing else than these.
py::object batch_norm_integers(py::handle x, py::handle mean, py::handle var, py::handle gamma, py::handle beta, py::handle eps,
                               py::handle axis, py::handle out_axis, py::handle dtype, py::handle num_threads, py::handle out,
                               bool disjoint, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        BatchNormArgs a;
        std::int64_t from, to;
        const std::optional<Array> in = as_array(x, Kinds::any);
        if (!in || !is_integer(in->dtype) || in->ndim > kMaxDims || !as_int(axis, from) || !as_int(out_axis, to) || from < 0 ||
            from >= in->ndim || to < 0 || to >= in->ndim || !as_double(eps, a.eps) || !as_channels(mean, a.mean) ||
            !as_channels(var, a.var) || !as_channels(gamma, a.gamma) || !as_channels(beta, a.beta) ||
            !as_thread_count(num_threads, a.num_threads)) {
            return {};
        }
        const int x_axis = static_cast<int>(from), y_axis = static_cast<int>(to);
        py::object y = py::reinterpret_borrow<py::object>(out);
        if (y.is_none()) {
            py::tuple shape(in->ndim);
            for (int i = 0; i < in->ndim; ++i) shape[static_cast<std::size_t>(moved_axis(i, x_axis, y_axis))] = in->shape[i];
            PyObject* const made = new_like(x, dtype, from == to ? "K" : "C", shape);
            if (made == nullptr) throw py::error_already_set();
            y = py::reinterpret_steal<py::object>(made);
        }
        const std::optional<Array> result = as_array(y);
        if (!result || !result->writable || result->ndim != in->ndim) return {};
        const Moved moved(*result, x_axis, y_axis);
        const Array* const arrays[2] = {&*in, &moved.array};
        Tensor views[2];
        if (!as_views(arrays, from, views, Views::image)) return {};
        a.x = views[0];
        a.y = views[1];
        a.disjoint = disjoint;
        without_gil(elements(a.y), [&] { batchnorm::batch_norm(a); });
        return y;
    });
}

// (mean, std, rmin, rmax, dmax), or None.
bool as_renorm(py::handle h, Renorm& out) {
    if (h.is_none()) return true;
    if (!PyTuple_CheckExact(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) != 5) return false;
    const auto item = [&](Py_ssize_t i) { return py::handle(PyTuple_GET_ITEM(h.ptr(), i)); };
    return as_channels(item(0), out.mean) && as_channels(item(1), out.std) && as_double(item(2), out.rmin) &&
           as_double(item(3), out.rmax) && as_double(item(4), out.dmax);
}

// The call of batch_norm_train with renorm, whose other arguments are there.
py::object renormalised(BatchNormTrainArgs& a, py::object y, py::object mean, py::object inv_std) {
    Vector<double> r(a.x.channels), d(a.x.channels);
    a.renorm.r = r.values;
    a.renorm.d = d.values;
    py::object mask = py::none();
    if (a.residual && has_mask(a.activation)) {
        Vector<std::uint8_t> bits(activation_mask_bytes(a.x));
        std::memset(bits.values.data(), 0, bits.values.size());
        a.activation_mask = bits.values;
        mask = std::move(bits.array);
    }
    without_gil(elements(a.y), [&] { batchnorm::batch_norm_train(a); });
    return py::make_tuple(std::move(y), std::move(mean), std::move(inv_std), std::move(mask), std::move(r.array), std::move(d.array));
}

// With a residual and an activation that has a mask, that is the result's fourth. With renorm, the fourth is the mask or None, then follow
// r and d.
py::object batch_norm_train(py::handle x, py::handle gamma, py::handle beta, py::handle running_mean, py::handle running_var,
                            py::handle decay, py::handle running_ddof, py::handle eps, py::handle axis, py::handle activation,
                            py::handle slope, py::handle residual, py::handle num_threads, py::handle out, py::handle positions,
                            py::handle renorm, bool disjoint, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        BatchNormTrainArgs a;
        std::int64_t channel_axis, ddof;
        Together together;
        if (!together.read(x, a.x) || !as_int(axis, channel_axis) || !as_double(eps, a.eps) || !as_double(decay, a.decay) ||
            !as_int(running_ddof, ddof) || ddof < 0 || ddof > 1 || !as_activation(activation, slope, a.activation, a.slope) ||
            !as_channels(gamma, a.gamma) || !as_channels(beta, a.beta) || !as_channels(running_mean, a.running_mean) ||
            !as_channels(running_var, a.running_var) || !as_thread_count(num_threads, a.num_threads) ||
            !as_positions(positions, a.positions) || !as_renorm(renorm, a.renorm)) {
            return {};
        }
        a.running_ddof = static_cast<int>(ddof);
        py::object y = given_or_like(out, x);
        if (!together.write(y, a.y) || (!residual.is_none() && !together.read(residual, a.residual)) || !together.look(channel_axis)) {
            return {};
        }
        a.disjoint = disjoint;
        Vector<double> mean(a.x.channels), inv_std(a.x.channels);
        a.mean = mean.values;
        a.inv_std = inv_std.values;
        if (!renorm.is_none()) return renormalised(a, std::move(y), std::move(mean.array), std::move(inv_std.array));
        if (residual.is_none() || !has_mask(a.activation)) {
            without_gil(elements(a.y), [&] { batchnorm::batch_norm_train(a); });
            return py::make_tuple(std::move(y), std::move(mean.array), std::move(inv_std.array));
        }
        Vector<std::uint8_t> mask(activation_mask_bytes(a.x));
        std::memset(mask.values.data(), 0, mask.values.size());  // the bits between runs
        a.activation_mask = mask.values;
        without_gil(elements(a.y), [&] { batchnorm::batch_norm_train(a); });
        return py::make_tuple(std::move(y), std::move(mean.array), std::move(inv_std.array), std::move(mask.array));
    });
}

// What is not needed is None in the result; dx and dresidual go into `out` and `out_residual` if those are given. The result has
// dresidual as its fourth if that is needed.
py::object batch_norm_backward(py::handle dy, py::handle x, py::handle mean, py::handle inv_std, py::handle gamma, py::handle beta,
                               py::handle axis, bool fixed, py::handle activation, py::handle slope, py::handle mask, py::handle residual,
                               bool need_dx, bool need_dgamma, bool need_dbeta, bool need_dresidual, py::handle num_threads, py::handle out,
                               py::handle out_residual, py::handle positions, bool disjoint, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        BatchNormBackwardArgs a;
        a.stats = fixed ? Stats::fixed : Stats::batch;
        std::int64_t channel_axis;
        Together together;
        if (!together.read(x, a.x) || !together.read(dy, a.dy) || !as_int(axis, channel_axis) ||
            !as_activation(activation, slope, a.activation, a.slope) || !as_channels(mean, a.mean) || !as_channels(inv_std, a.inv_std) ||
            !as_channels(gamma, a.gamma) || !as_channels(beta, a.beta) || !as_mask(mask, a.activation_mask) ||
            !as_thread_count(num_threads, a.num_threads) || (!need_dx && !out.is_none()) || (!need_dresidual && !out_residual.is_none()) ||
            (!residual.is_none() && !together.read(residual, a.residual)) || !as_positions(positions, a.positions)) {
            return {};
        }
        py::object dx = py::none(), dresidual = py::none();
        if (need_dx) {
            dx = given_or_like(out, x);
            if (!together.write(dx, a.dx)) return {};
        }
        if (need_dresidual) {
            dresidual = given_or_like(out_residual, x);
            if (!together.write(dresidual, a.dresidual)) return {};
        }
        if (!together.look(channel_axis)) return {};
        a.disjoint = disjoint;
        // A gradient has its parameter's type, or the other parameter's; without any, float64 for float64 data and float32 for the rest.
        const auto gradient = [&](bool needed, const ConstChannels& parameter, const ConstChannels& other,
                                  Channels& destination) -> py::object {
            if (!needed) return py::none();
            const bool is_double = parameter ? parameter.is_double : other ? other.is_double : together.dtype() == Dtype::float64;
            const auto make = [&](auto vector) {
                destination = vector.values;
                return std::move(vector.array);
            };
            return is_double ? make(Vector<double>(a.x.channels)) : make(Vector<float>(a.x.channels));
        };
        py::object dgamma = gradient(need_dgamma, a.gamma, a.beta, a.dgamma), dbeta = gradient(need_dbeta, a.beta, a.gamma, a.dbeta);
        without_gil(elements(a.x), [&] { batchnorm::batch_norm_backward(a); });
        if (!need_dresidual) return py::make_tuple(std::move(dx), std::move(dgamma), std::move(dbeta));
        return py::make_tuple(std::move(dx), std::move(dgamma), std::move(dbeta), std::move(dresidual));
    });
}

py::object moments(py::handle x, py::handle axis, py::handle ddof, py::handle num_threads, py::handle positions, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        std::int64_t channel_axis, delta;
        int threads;
        ConstTensor view;
        Together together;
        Positions counting;
        if (!together.read(x, view, Kinds::any) || !as_int(axis, channel_axis) || !as_int(ddof, delta) ||
            !as_thread_count(num_threads, threads) || !as_positions(positions, counting) || !together.look(channel_axis)) {
            return {};
        }
        Vector<double> mean(view.channels), var(view.channels);
        without_gil(elements(view), [&] { batchnorm::moments(view, mean.values, var.values, delta, threads, counting); });
        return py::make_tuple(std::move(mean.array), std::move(var.array));
    });
}

// For the package's own use: arguments that fit, or an exception.
void fits(bool all) {
    if (!all) throw std::invalid_argument("these arguments cannot be used as they are");
}

template <class F>
void uninterrupted(F f) {
    try {
        f();
    } catch (const Interrupted&) {
        throw py::error_already_set();  // set by the signal handler
    }
}

// sum a and sum a * (b - shift) per channel.
py::tuple channel_sums(py::handle a, py::handle b, std::int64_t axis, py::handle shift, py::handle num_threads) {
    ChannelSumsArgs args;
    Together together;
    fits(together.read(a, args.a) && together.read(b, args.b) && as_channels(shift, args.shift) &&
         as_thread_count(num_threads, args.num_threads) && together.look(axis));
    Vector<double> sum_a(args.a.channels), sum_ab(args.a.channels);
    args.sum_a = sum_a.values;
    args.sum_ab = sum_ab.values;
    uninterrupted([&] { without_gil(elements(args.a), [&] { batchnorm::channel_sums(args); }); });
    return py::make_tuple(std::move(sum_a.array), std::move(sum_ab.array));
}

// a * k_a + (b - center) * k_b + k_0 per channel. `gate` is None or (activation, inv_std, gamma, beta), then perhaps the slope; out may be
// None.
py::object combine(py::handle a, py::handle b, py::handle k_a, py::handle center, py::handle k_b, py::handle k_0, std::int64_t axis,
                   py::handle gate, py::handle num_threads, py::handle out) {
    CombineArgs args;
    Together together;
    fits(together.read(a, args.a) && together.read(b, args.b) && as_channels(k_a, args.k_a) && as_channels(center, args.center) &&
         as_channels(k_b, args.k_b) && as_channels(k_0, args.k_0) && as_thread_count(num_threads, args.num_threads));
    if (!gate.is_none()) {
        fits(PyTuple_CheckExact(gate.ptr()) && (PyTuple_GET_SIZE(gate.ptr()) == 4 || PyTuple_GET_SIZE(gate.ptr()) == 5));
        const auto item = [&](Py_ssize_t i) { return py::handle(PyTuple_GET_ITEM(gate.ptr(), i)); };
        const py::handle slope = PyTuple_GET_SIZE(gate.ptr()) == 5 ? item(4) : py::handle(Py_None);
        fits(as_activation(item(0), slope, args.activation, args.slope) && as_channels(item(1), args.inv_std) &&
             as_channels(item(2), args.gamma) && as_channels(item(3), args.beta));
    }
    py::object result = given_or_like(out, a);
    fits(together.write(result, args.out) && together.look(axis));
    args.disjoint = true;  // by the caller's care: address ranges of interleaved samples overlap
    uninterrupted([&] { without_gil(elements(args.a), [&] { batchnorm::combine(args); }); });
    return result;
}

// The sums of one batch, for merge_moment_sums and moments_from_sums.
py::object moment_sums(py::handle x, py::handle axis, py::handle num_threads, py::handle positions, bool prepared) {
    return attempt(prepared, [&]() -> py::object {
        std::int64_t channel_axis;
        int threads;
        ConstTensor view;
        Together together;
        Positions counting;
        if (!together.read(x, view, Kinds::any) || !as_int(axis, channel_axis) || !as_thread_count(num_threads, threads) ||
            !as_positions(positions, counting) || !together.look(channel_axis)) {
            return {};
        }
        Vector<double> sums(moment_sums_size(view.channels));
        without_gil(elements(view), [&] { batchnorm::moment_sums(view, sums.values, threads, counting); });
        return std::move(sums.array);
    });
}

// Sums as moment_sums made them, in this process or before.
using SumsVector = py::array_t<double, py::array::c_style>;
std::span<const double> sums_of(const SumsVector& v) { return {v.data(), static_cast<std::size_t>(v.size())}; }

py::object merged_moment_sums(const SumsVector& a, const SumsVector& b) {
    Vector<double> sums(a.size());
    std::copy_n(a.data(), a.size(), sums.values.data());
    merge_moment_sums(sums.values, sums_of(b));
    return std::move(sums.array);
}

py::tuple moments_from_sums_of(const SumsVector& sums) {
    const std::int64_t channels = (sums.size() - moment_sums_size(0)) / (moment_sums_size(1) - moment_sums_size(0));
    Vector<double> mean(channels), m2(channels);
    moments_from_sums(sums_of(sums), mean.values, m2.values);
    return py::make_tuple(std::move(mean.array), std::move(m2.array));
}

// Bytes of a mask for x, which has a view.
std::int64_t activation_mask_bytes_of(py::handle x, std::int64_t axis) {
    ConstTensor view;
    Together together;
    if (!together.read(x, view) || !together.look(axis)) throw std::invalid_argument("x cannot be used as it is");
    return activation_mask_bytes(view);
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

// Whether some arrays, at most kMaxTogether, have the common view (see as_views) that an operation on them would need.
bool has_view(const std::vector<py::object>& objects, std::int64_t axis) {
    ConstTensor unused;
    Together together;
    for (const py::object& o : objects) {
        if (!together.read(o, unused, Kinds::any)) return false;
    }
    return together.look(axis);
}

// A function of Python objects and bools as CPython calls it fastest: pybind11's own dispatch costs as much as all the rest of a small
// call. Exceptions become Python's here, as pybind11 would translate them.
template <auto f>
struct Direct;
template <class... A, py::object (*f)(A...)>
struct Direct<f> {
    template <class T>
    static T as(PyObject* o) {
        if constexpr (std::is_same_v<T, bool>) {
            return o == Py_True;
        } else {
            return T(o);
        }
    }
    template <std::size_t... i>
    static py::object spread(PyObject* const* arguments, std::index_sequence<i...>) {
        return f(as<A>(arguments[i])...);
    }
    static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t n) noexcept {
        constexpr Py_ssize_t expected = sizeof...(A);
        if (n != expected) return PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", expected, n);
        try {
            return spread(arguments, std::index_sequence_for<A...>()).release().ptr();
        } catch (py::error_already_set& e) {
            e.restore();
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
        } catch (const std::invalid_argument& e) {
            PyErr_SetString(PyExc_ValueError, e.what());
        } catch (const std::exception& e) {
            PyErr_SetString(PyExc_RuntimeError, e.what());
        }
        return nullptr;
    }
};
template <auto f>
PyMethodDef direct(const char* name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Direct<f>::call)), METH_FASTCALL, nullptr};
}

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.doc() = "Batch normalization kernels; use the functions of the package instead.";
    static PyMethodDef functions[] = {direct<&batch_norm>("batch_norm"),
                                      direct<&batch_norm_integers>("batch_norm_integers"),
                                      direct<&batch_norm_train>("batch_norm_train"),
                                      direct<&batch_norm_backward>("batch_norm_backward"),
                                      direct<&moments>("moments"),
                                      direct<&moment_sums>("moment_sums"),
                                      {}};
    if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
    m.def("merged_moment_sums", &merged_moment_sums);
    m.def("moments_from_sums", &moments_from_sums_of);
    m.def("update_running", &update_running);
    m.def("channel_sums", &channel_sums);
    m.def("combine", &combine);
    m.def("has_view", &has_view);
    m.def("new_like", [](const py::object& x) { return empty_like(x); });
    m.def("activation_mask_bytes", &activation_mask_bytes_of);
    m.def("tuning", &tuning);
    m.def("set_tuning", [](const std::string& settings) { set_tuning(settings); });
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
