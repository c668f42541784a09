// Arguments of Python calls: keywords to slots, objects to numbers, names and views. Messages about an argument's kind, dtype, shape or
// memory are made here, in tensors.cpp and positions.cpp; those about the options of one operation and what they exclude in operations.cpp;
// values and overlaps are the core's to check. Errors are the core's Error, thrown before anything is written.
// Used by operations.cpp; knows no operation.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bind/backend.h"
#include "bind/ndarray.h"
#include "bind/output.h"

namespace batchnorm::bind {

// ---- keywords

// Every parameter of every operation.
// clang-format off
enum class Name : std::uint8_t {
    x, dy, saved, running_mean, running_var, mean, var, inv_std, gamma, beta, stats, needs, decay, seen, running_ddof, count, ddof,
    eps, channel_axis, data_format, activation, slope, residual, ddx, ddgamma, ddbeta, ddresidual, mask, lengths, lengths_axis, weights,
    renorm, virtual_batch_size, keep, group, all_reduce, on_nonfinite, dtype, out_format, num_threads, out, out_residual, none
};
// clang-format on
inline constexpr std::size_t kNames = static_cast<std::size_t>(Name::out_residual) + 1;
const char* word(Name name);

class Arguments;

// Those that are arrays and only read: of other libraries too.
constexpr std::uint64_t names_of(std::initializer_list<Name> names) {
    std::uint64_t set = 0;
    for (const Name name : names) set |= std::uint64_t{1} << static_cast<int>(name);
    return set;
}
inline constexpr std::uint64_t kTensors = names_of({Name::x, Name::dy, Name::residual, Name::ddx, Name::ddresidual});
inline constexpr std::uint64_t kVectors = names_of(
    {Name::mean, Name::var, Name::inv_std, Name::gamma, Name::beta, Name::ddgamma, Name::ddbeta, Name::mask, Name::lengths, Name::weights});

// A function as Python calls it.
struct Operation {
    const char* name;
    int positional;  // how many parameters may be given by position
    std::span<const Name> names;
    py::object (*run)(const Arguments&);
};

// An operation and the defaults of its parameters.
class Signature {
public:
    // Defaults of a stub, a Python function of the operation's parameters; TypeError if it has others.
    Signature(const Operation& operation, py::object stub);
    explicit Signature(const Operation& operation);  // channel_axis 1, ddof 0, None; the first is required

    // Parses and runs a call as CPython makes it; nullptr with Python's error set.
    PyObject* call(PyObject* const* arguments, Py_ssize_t n, PyObject* keywords) const noexcept;
    const Operation& operation() const { return *operation_; }

private:
    // False if an argument is an array of a GPU, which another extension serves.
    bool parse(Arguments& to, PyObject* const* arguments, Py_ssize_t n, PyObject* keywords) const;
    Name find(PyObject* keyword, std::size_t& from) const;  // none: there is no such parameter
    bool take_in(Arguments& of) const;                      // arrays of other libraries as NumPy's
    py::object elsewhere(const Arguments& a) const;
    [[noreturn]] void refuse(PyObject* const* arguments, Py_ssize_t n, PyObject* keywords) const;

    void set_required();

    const Operation* operation_;
    py::object stub_;
    std::uint64_t required_ = 0;
    std::array<PyObject*, kNames> defaults_;  // nullptr: required; None for parameters that the operation does not have
};

// The values of one call.
class Arguments {
public:
    PyObject* operator[](Name name) const { return values_[static_cast<int>(name)]; }
    bool has(Name name) const { return (*this)[name] != Py_None; }
    bool given(Name name) const { return (given_ >> static_cast<int>(name) & 1) != 0; }

private:
    friend class Signature;
    std::array<PyObject*, kNames> values_;
    std::uint64_t given_ = 0;
    std::uint64_t foreign_ = 0;  // arrays that are not NumPy's own
    std::vector<py::object> made_;
};

void start_keywords();  // once, at import
// Why Python cannot bind these arguments to a function's parameters, and what to write instead.
std::string refusal(py::handle function, PyObject* const* arguments, Py_ssize_t n, PyObject* keywords);

// ---- messages

[[noreturn]] void type_error(const char* argument, const std::string& message);
[[noreturn]] void value_error(const char* argument, const std::string& message);
// What a value is, for a message: its type, and for short plain values the value.
std::string kind_of(PyObject* value);
std::string shape_text(std::span<const py::ssize_t> sizes);
std::string shape_text(const Array& a);
std::string dtype_text(PyObject* array);
// "; did you mean 'relu'?", or nothing.
std::string suggestion(py::handle word, std::span<const std::string_view> known);
std::string listed(std::span<const std::string_view> words, const char* last);  // 'a', 'b' or 'c'

template <class... Parts>
std::string say(const Parts&... parts) {
    std::string s;
    const auto add = [&](const auto& part) {
        if constexpr (std::is_integral_v<std::remove_cvref_t<decltype(part)>>) {
            s += std::to_string(part);
        } else {
            s += part;
        }
    };
    (add(parts), ...);
    return s;
}

// What Python gets for a result, or for an exception.
template <class F>
PyObject* guarded(F f) noexcept {
    try {
        return f().release().ptr();
    } catch (py::error_already_set& e) {
        e.restore();
    } catch (const Interrupted&) {
        // The signal handler's exception is set.
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const Error& e) {
        PyErr_SetString(e.kind == Error::type ? PyExc_TypeError : PyExc_ValueError, e.what());
    } catch (const std::invalid_argument& e) {
        PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const std::exception& e) {
        PyErr_SetString(PyExc_RuntimeError, e.what());
    }
    return nullptr;
}

// ---- numbers, names, flags

double real(PyObject* value, const char* name, const char* expected);
std::int64_t integer(PyObject* value, const char* name, const char* expected);
bool flag(PyObject* value, const char* name);
int ddof_of(PyObject* value, const char* name);
int threads(PyObject* value);  // None: 0, the default
// Which of some words a str is; TypeError for another kind, ValueError for another word.
std::size_t one_of(PyObject* value, const char* name, std::span<const std::string_view> words, bool or_none = false);
Activation activation(const Arguments& a, Dtype dtype, double& slope);
const char* word(Activation activation);

// ---- arrays

// What a call made for its own duration.
using Owned = std::vector<py::object>;

// x, or the tensor in its place: dy of a Saved is measured against the kept one. And where its channels are.
struct Subject {
    Array x;
    ChannelAxes where;
    std::array<py::ssize_t, kMaxDims> sizes;  // of the channel axes
    std::int64_t channels = 1;
    bool by_running_mean = false;  // there is no x: its shape is that of running_mean, and all axes are channels

    std::span<const py::ssize_t> shape() const { return {sizes.data(), static_cast<std::size_t>(where.n)}; }
    void set_channels();
    std::string match() const;  // "to match channel axis 1 of x (8, 64, 32, 32)"
    std::string axes() const;   // "axis 1", "axes (1, 2)"
};

// x with its channel axis; data_format is its alias.
Subject subject(const Arguments& a, Kinds kinds = Kinds::floating);
// update_running's channels are those of running_mean.
Subject channels_of(PyObject* running_mean);
// The channel axis that a format's name stands for, for an array of this rank, from 0.
int format_axis(PyObject* value, const char* name, const Array& x);

// TypeError for what is no ndarray, or a masked one.
void refuse_others(PyObject* value, const char* name, std::string_view expected);
// as_array, which has not seen bfloat16 before the first one comes.
std::optional<Array> known_array(PyObject* value, Kinds kinds = Kinds::floating);
// A tensor that is read.
Array tensor(PyObject* value, const char* name, Kinds kinds = Kinds::floating);

// A dtype= argument: a numpy.dtype of a floating storage type.
py::object floating_dtype(PyObject* value);

// Per-channel arrays. Those that are read are copied where their memory needs it; those that are written never.
ConstChannels vector(PyObject* value, const char* name, const Subject& s, Owned& owned);
ConstRows rows(PyObject* value, const char* name, const Subject& s, Owned& owned);  // also (N, ...): a row for each sample
Channels written(PyObject* value, const char* name, const Subject& s);
// An array, or a finite number >= 0 for all channels, which stays in `number`.
ConstChannels vector_or_number(PyObject* value, const char* name, const char* expected, const Subject& s, double& number, Owned& owned);

}  // namespace batchnorm::bind
