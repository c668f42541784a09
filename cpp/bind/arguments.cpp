#include "bind/arguments.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <set>

namespace batchnorm::bind {
namespace {

// clang-format off
constexpr const char* kWords[kNames] = {
    "x", "dy", "saved", "running_mean", "running_var", "mean", "var", "inv_std", "gamma", "beta", "stats", "needs", "decay", "seen",
    "running_ddof", "count", "ddof", "eps", "channel_axis", "data_format", "activation", "slope", "residual", "ddx", "ddgamma", "ddbeta",
    "ddresidual", "mask", "lengths", "lengths_axis", "weights", "renorm", "virtual_batch_size", "keep", "group", "all_reduce",
    "on_nonfinite", "dtype", "out_format", "num_threads", "out", "out_residual"};
// clang-format on
static_assert(kWords[kNames - 1] != nullptr);

std::array<PyObject*, kNames> interned;  // the words as Python's compiler makes them: equal words are one object

constexpr std::size_t index(Name name) { return static_cast<std::size_t>(name); }

// A function of the module that has the words of messages.
py::object hints(const char* name) { return py::module_::import("batchnorm._hints").attr(name); }

}  // namespace

const char* word(Name name) { return kWords[index(name)]; }

void start_keywords() {
    for (std::size_t i = 0; i < kNames; ++i) interned[i] = PyUnicode_InternFromString(kWords[i]);
}

std::string refusal(py::handle function, PyObject* const* arguments, Py_ssize_t n, PyObject* keywords) {
    py::tuple given(n);
    py::dict named;
    for (Py_ssize_t i = 0; i < n; ++i) given[static_cast<std::size_t>(i)] = py::handle(arguments[i]);
    const Py_ssize_t n_keywords = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
    for (Py_ssize_t i = 0; i < n_keywords; ++i) named[py::handle(PyTuple_GET_ITEM(keywords, i))] = py::handle(arguments[n + i]);
    return py::str(hints("refusal")(function, given, named));
}

// ---- keywords

Signature::Signature(const Operation& operation) : operation_(&operation) {
    defaults_.fill(Py_None);
    defaults_[index(operation.names[0])] = nullptr;
    defaults_[index(Name::channel_axis)] = PyLong_FromLong(1);
    defaults_[index(Name::ddof)] = PyLong_FromLong(0);
    set_required();
}

Signature::Signature(const Operation& operation, py::object stub) : operation_(&operation), stub_(std::move(stub)) {
    const py::handle code = stub_.attr("__code__");
    const auto positional = code.attr("co_argcount").cast<std::size_t>();
    const std::size_t n = positional + code.attr("co_kwonlyargcount").cast<std::size_t>();
    const py::tuple names = code.attr("co_varnames");
    bool same = n == operation.names.size() && positional == static_cast<std::size_t>(operation.positional);
    for (std::size_t i = 0; same && i < n; ++i) same = std::string(py::str(names[i])) == word(operation.names[i]);
    if (!same) {
        std::string known;
        for (const Name name : operation.names) known += (known.empty() ? "" : ", ") + std::string(word(name));
        throw py::type_error(say(operation.name, "() has other parameters than in the extension: ", known));
    }
    defaults_.fill(Py_None);
    for (const Name name : operation.names) defaults_[index(name)] = nullptr;
    const auto set = [&](Name name, py::handle value) {
        defaults_[index(name)] = py::object(py::reinterpret_borrow<py::object>(value)).release().ptr();
    };
    if (const py::object values = stub_.attr("__defaults__"); !values.is_none()) {
        const auto tuple = values.cast<py::tuple>();
        for (std::size_t i = 0; i < tuple.size(); ++i) set(operation.names[positional - tuple.size() + i], tuple[i]);
    }
    if (const py::object values = stub_.attr("__kwdefaults__"); !values.is_none()) {
        const auto dict = values.cast<py::dict>();
        for (std::size_t i = positional; i < n; ++i) {
            if (dict.contains(names[i])) set(operation.names[i], dict[names[i]]);
        }
    }
    set_required();
}

void Signature::set_required() {
    for (const Name name : operation_->names) {
        if (defaults_[index(name)] == nullptr) required_ |= std::uint64_t{1} << index(name);
    }
}

Name Signature::find(PyObject* keyword, std::size_t& from) const {
    const std::span<const Name> names = operation_->names;
    // Callers keep to the order of the signature more often than not.
    for (std::size_t k = 0; k < names.size(); ++k) {
        const std::size_t i = from + k < names.size() ? from + k : from + k - names.size();
        if (interned[index(names[i])] == keyword) return from = i + 1, names[i];
    }
    for (const Name name : names) {
        if (PyUnicode_CompareWithASCIIString(keyword, word(name)) == 0) return name;
    }
    return Name::none;
}

void Signature::refuse(PyObject* const* arguments, Py_ssize_t n, PyObject* keywords) const {
    const std::string text = say(operation_->name, "() got arguments that it does not take, or lacks one");
    type_error("", stub_ ? refusal(stub_, arguments, n, keywords) : text);
}

bool Signature::parse(Arguments& to, PyObject* const* arguments, Py_ssize_t n, PyObject* keywords) const {
    to.values_ = defaults_;
    if (n > operation_->positional) refuse(arguments, n, keywords);
    PyTypeObject* const array_type = py::detail::npy_api::get().PyArray_Type_;
    const auto set = [&](Name name, PyObject* value) {
        const std::uint64_t bit = std::uint64_t{1} << index(name);
        to.values_[index(name)] = value;
        to.given_ |= bit;
        if (Py_TYPE(value) != array_type) to.foreign_ |= bit;
    };
    for (Py_ssize_t i = 0; i < n; ++i) set(operation_->names[i], arguments[i]);
    const Py_ssize_t n_keywords = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
    std::size_t from = static_cast<std::size_t>(n);
    for (Py_ssize_t i = 0; i < n_keywords; ++i) {
        const Name name = find(PyTuple_GET_ITEM(keywords, i), from);
        if (name == Name::none || to.given(name)) refuse(arguments, n, keywords);
        set(name, arguments[n + i]);
    }
    if ((required_ & ~to.given_) != 0) refuse(arguments, n, keywords);
    to.foreign_ &= kTensors | kVectors;
    return to.foreign_ == 0 || take_in(to);
}

bool Signature::take_in(Arguments& of) const {
    for (const Name name : operation_->names) {
        const std::uint64_t bit = std::uint64_t{1} << index(name);
        PyObject*& value = of.values_[index(name)];
        if ((of.foreign_ & bit) == 0 || value == Py_None || is_ndarray(value)) continue;
        if (kGpu && name != Name::lengths) {
            type_error(word(name), say(word(name), " is ", kind_of(value), ", expected an array of the GPU, as the others are"));
        }
        const py::object taken = py::module_::import("batchnorm._arrays").attr("taken_in");
        py::object made = taken(word(name), py::handle(value), (bit & kVectors) != 0);
        if (made.ptr() == Py_NotImplemented) return false;
        of.made_.push_back(std::move(made));
        value = of.made_.back().ptr();
    }
    return true;
}

// The whole call with the arguments that were given.
py::object Signature::elsewhere(const Arguments& a) const {
    py::dict given;
    for (const Name name : operation_->names) {
        if (a.given(name)) given[word(name)] = py::handle(a[name]);
    }
    return py::module_::import("batchnorm._gpu").attr("call")(operation_->name, given);
}

PyObject* Signature::call(PyObject* const* arguments, Py_ssize_t n, PyObject* keywords) const noexcept {
    return guarded([&] {
        Arguments a;
        return parse(a, arguments, n, keywords) ? operation_->run(a) : elsewhere(a);
    });
}

// ---- messages

void type_error(const char* argument, const std::string& message) { throw Error(Error::type, argument, message); }
void value_error(const char* argument, const std::string& message) { throw Error(Error::value, argument, message); }

std::string kind_of(PyObject* value) { return py::str(hints("kind")(py::handle(value))); }

std::string shape_text(std::span<const py::ssize_t> sizes) {
    std::string s = "(";
    for (std::size_t i = 0; i < sizes.size(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
    return s += sizes.size() == 1 ? ",)" : ")";
}

std::string shape_text(const Array& a) { return shape_text({a.shape, static_cast<std::size_t>(a.ndim)}); }

// With the byte order, if that is a foreign one.
std::string dtype_text(PyObject* array) {
    const py::object dtype = py::handle(array).attr("dtype");
    return dtype.attr("isnative").cast<bool>() ? py::str(dtype) : py::str(dtype.attr("str"));
}

std::string suggestion(py::handle word, std::span<const std::string_view> known) {
    py::list words;
    for (const std::string_view w : known) words.append(py::str(w.data(), w.size()));
    return py::str(hints("suggestion")(word, words));
}

std::string listed(std::span<const std::string_view> words, const char* last) {
    std::string s;
    for (std::size_t i = 0; i < words.size(); ++i) {
        s += i == 0 ? "'" : i + 1 == words.size() ? say(" ", last, " '") : ", '";
        s.append(words[i]) += "'";
    }
    return s;
}

// ---- numbers, names, flags

double real(PyObject* value, const char* name, const char* expected) {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    const bool number = !PyBool_Check(value) &&
                        (PyLong_Check(value) || PyFloat_Check(value) || py::isinstance(value, py::module_::import("numbers").attr("Real")));
    if (!number) type_error(name, say(name, " is ", kind_of(value), ", expected ", expected));
    const double result = PyFloat_AsDouble(value);
    if (result == -1 && PyErr_Occurred() != nullptr) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError) == 0) throw py::error_already_set();
        PyErr_Clear();
        value_error(name, say(name, " is too large for a float, expected ", expected));
    }
    return result;
}

std::int64_t integer(PyObject* value, const char* name, const char* expected) {
    const auto wrong_kind = [&] { type_error(name, say(name, " is ", kind_of(value), ", expected ", expected)); };
    if (PyBool_Check(value)) wrong_kind();
    py::object index_value;
    if (!PyLong_Check(value)) {
        index_value = py::reinterpret_steal<py::object>(PyNumber_Index(value));
        if (!index_value) PyErr_Clear();
        if (!index_value) wrong_kind();
        value = index_value.ptr();
    }
    int overflow = 0;
    const long long result = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) {
        const double size = PyLong_AsDouble(value);
        if (PyErr_Occurred() != nullptr) PyErr_Clear();
        char text[32];
        std::snprintf(text, sizeof text, "%.6g", size == -1 ? overflow * HUGE_VAL : size);
        value_error(name, say(name, " is ", text, ", expected ", expected));
    }
    return result;
}

// Anything else that is merely truthy would choose a mode nobody asked for.
bool flag(PyObject* value, const char* name) {
    if (!PyBool_Check(value)) type_error(name, say(name, " is ", kind_of(value), ", expected True or False"));
    return value == Py_True;
}

int ddof_of(PyObject* value, const char* name) {
    constexpr const char* kExpected = "0 or 1: divide by n, or by n - 1";
    const std::int64_t ddof = integer(value, name, kExpected);
    if (ddof != 0 && ddof != 1) value_error(name, say(name, " is ", ddof, ", expected ", kExpected));
    return static_cast<int>(ddof);
}

int threads(PyObject* value) {
    if (value == Py_None) return 0;
    constexpr const char* kExpected = "an int from 1 to 65536";
    const std::int64_t n = integer(value, "num_threads", kExpected);
    if (n < 1 || n > 65536) value_error("num_threads", say("num_threads is ", n, ", expected ", kExpected));
    return static_cast<int>(n);
}

std::size_t one_of(PyObject* value, const char* name, std::span<const std::string_view> words, bool or_none) {
    if (PyUnicode_Check(value)) {
        for (std::size_t i = 0; i < words.size(); ++i) {
            if (PyUnicode_CompareWithASCIIString(value, words[i].data()) == 0) return i;
        }
    }
    std::string expected = (or_none ? "None, " : "") + listed(words, "or");
    if (!PyUnicode_Check(value) && !or_none) expected.insert(0, "a str, one of ");
    if (!PyUnicode_Check(value)) type_error(name, say(name, " is ", kind_of(value), ", expected ", expected));
    value_error(name, say(name, " is ", std::string(py::repr(value)), ", expected ", expected, suggestion(value, words)));
}

namespace {

constexpr std::string_view kActivations[] = {"relu", "leaky_relu", "relu6", "sigmoid", "tanh", "silu"};  // Activation, from 1

constexpr double kTooLargeForFloat = 0x1p128 - 0x1p103;  // rounds to infinity from here on

}  // namespace

const char* word(Activation activation) { return kActivations[static_cast<std::size_t>(activation) - 1].data(); }

Activation activation(const Arguments& a, Dtype dtype, double& slope) {
    const auto known = a.has(Name::activation) ? static_cast<Activation>(one_of(a[Name::activation], "activation", kActivations, true) + 1)
                                               : Activation::none;
    if (!a.has(Name::slope)) return known;
    constexpr const char* kExpected = "a finite number, leaky_relu's factor for values below 0";
    slope = real(a[Name::slope], "slope", kExpected);
    if (known != Activation::leaky_relu) {
        value_error("slope", say("slope is given with activation=", std::string(py::repr(a[Name::activation])),
                                 ", which has none; drop it, or use activation='leaky_relu'"));
    }
    const bool fits = std::isfinite(slope) && (dtype == Dtype::float64 || std::abs(slope) < kTooLargeForFloat);
    if (!fits) {
        value_error("slope", say("slope is ", std::string(py::repr(a[Name::slope])), ", expected ", kExpected,
                                 std::isfinite(slope) ? ", within the range of float32 unless x is float64" : ""));
    }
    return known;
}

// ---- x and its channel axes

namespace {

struct Format {
    int rank, axis;  // rank 0: any
};
constexpr std::string_view kFormats[] = {"NC", "NCL", "NLC", "NCHW", "NHWC", "NCDHW", "NDHWC", "channels_first", "channels_last"};
constexpr Format kFormatAxes[] = {{2, 1}, {3, 1}, {3, -1}, {4, 1}, {4, -1}, {5, 1}, {5, -1}, {0, 1}, {0, -1}};

// "(0, 2, 3)", or of one axis "1".
std::string axes_text(std::span<const std::int8_t> axes) {
    if (axes.size() == 1) return std::to_string(axes[0]);
    std::vector<py::ssize_t> wide(axes.begin(), axes.end());
    return shape_text(wide);
}

int checked_axis(PyObject* value, PyObject* whole, const Array& x) {
    const std::int64_t axis = integer(value, "channel_axis", "an int, the axis of x that holds the channels, or a tuple of ints");
    if (axis < -x.ndim || axis >= x.ndim) {
        value_error("channel_axis", say("channel_axis is ", std::string(py::repr(whole)), ", expected -", x.ndim, " <= channel_axis < ",
                                        x.ndim, " for x of shape ", shape_text(x)));
    }
    return static_cast<int>(axis < 0 ? axis + x.ndim : axis);
}

void set_tuple(PyObject* tuple, Subject& s) {
    const std::string got = say("channel_axis is ", std::string(py::repr(tuple)));
    const std::string expected = say(", expected one or more different axes of x ", shape_text(s.x));
    s.where.tuple = true;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
        const int axis = checked_axis(PyTuple_GET_ITEM(tuple, i), tuple, s.x);
        if (s.where.hold(axis)) value_error("channel_axis", say(got, ", which names an axis twice", expected));
        s.where.axes[s.where.n++] = static_cast<std::int8_t>(axis);
    }
    std::sort(s.where.axes.begin(), s.where.axes.begin() + s.where.n);
    if (s.where.n == 0) value_error("channel_axis", got + expected);
    if (s.where.n == s.x.ndim) {
        value_error("channel_axis", say(got, ", all axes of x ", shape_text(s.x), ", expected at least one other, the batch"));
    }
    if (s.where.n == 1 || !s.where.hold(0)) return;
    std::vector<std::int8_t> others;
    for (int i = 0; i < s.x.ndim; ++i) {
        if (!s.where.hold(i)) others.push_back(static_cast<std::int8_t>(i));
    }
    value_error("channel_axis",
                say(got, ", among them axis 0, the samples, expected the axes that hold the channels; axes to reduce, as NumPy's axis=",
                    std::string(py::repr(tuple)), ", are channel_axis=", axes_text(others),
                    " here; for statistics of each sample pass x[i : i + 1] and channel_axis=",
                    axes_text({s.where.axes.data() + 1, static_cast<std::size_t>(s.where.n - 1)})));
}

}  // namespace

int format_axis(PyObject* value, const char* name, const Array& x) {
    const std::size_t format = one_of(value, name, kFormats);
    const auto [rank, axis] = kFormatAxes[format];
    if (rank != 0 && rank != x.ndim) {
        value_error(name, say(name, " is '", kFormats[format], "', which needs ", rank, " dimensions, but x has shape ", shape_text(x)));
    }
    return axis < 0 ? axis + x.ndim : axis;
}

std::string Subject::axes() const {
    return say(where.n == 1 ? "axis " : "axes ", axes_text({where.axes.data(), static_cast<std::size_t>(where.n)}));
}

std::string Subject::match() const {
    return by_running_mean ? "as running_mean has" : say("to match channel ", axes(), " of x ", shape_text(x));
}

void Subject::set_channels() {
    channels = 1;
    for (std::size_t i = 0; i < static_cast<std::size_t>(where.n); ++i) channels *= sizes[i] = x.shape[where.axes[i]];
    if (channels == 0 && !by_running_mean) {
        value_error("x", say("x has shape ", shape_text(x), " with 0 channels on ", axes(), ", expected at least 1"));
    }
}

Subject subject(const Arguments& a, Kinds kinds) {
    Subject s;
    s.x = tensor(a[Name::x], "x", kinds);
    if (s.x.ndim < 2) {
        value_error("x", say("x has shape ", shape_text(s.x), ", expected at least 2 dimensions, one of them the channels"));
    }
    PyObject* const axis = a[Name::channel_axis];
    if (a.has(Name::data_format)) {
        if (a.given(Name::channel_axis)) {
            type_error("channel_axis", say("channel_axis is ", std::string(py::repr(axis)), " and data_format is ",
                                           std::string(py::repr(a[Name::data_format])), "; they say the same thing, give one of them"));
        }
        s.where.axes[0] = static_cast<std::int8_t>(format_axis(a[Name::data_format], "data_format", s.x));
        s.where.n = 1;
    } else if (PyTuple_Check(axis)) {
        set_tuple(axis, s);
    } else {
        s.where.axes[0] = static_cast<std::int8_t>(checked_axis(axis, axis, s.x));
        s.where.n = 1;
    }
    s.set_channels();
    return s;
}

// ---- arrays

namespace {

// Whether this is ml_dtypes.bfloat16, whose type number is noted then.
bool learn_bfloat16(py::handle dtype) {
    const std::string dtype_name = py::str(dtype.attr("name")), module = py::str(dtype.attr("type").attr("__module__"));
    if (dtype_name != "bfloat16" || module != "ml_dtypes") return false;
    bfloat16_type_num = dtype.attr("num").cast<int>();
    return true;
}

// The type that holds every value of an array, of those that are taken: float32 loses digits of 32- and 64-bit integers.
const char* wide_enough(py::handle dtype) {
    const std::string kind = py::str(dtype.attr("kind"));
    const auto size = dtype.attr("itemsize").cast<int>();
    if (learn_bfloat16(dtype)) return "numpy.float32";
    if (kind == "f") return size > 4 ? "numpy.float64" : "numpy.float32";
    if (kind == "b" || kind == "i" || kind == "u") return size >= 4 ? "numpy.float64" : "numpy.float32";
    return nullptr;
}

// Python for what a message calls "renorm mean".
std::string expression(const std::string& name) {
    const std::size_t space = name.find(' ');
    return space == std::string::npos ? name : say(name.substr(0, space), "['", name.substr(space + 1), "']");
}

std::string conversion(const char* name, PyObject* array) {
    const py::object dtype = py::handle(array).attr("dtype");
    const char* const to = wide_enough(dtype);
    if (to == nullptr) return "";
    const bool rounds = std::string_view(name) == "x" && dtype.attr("itemsize").cast<int>() >= 8;
    return say("; use ", expression(name), ".astype(", to, ")",
               rounds ? ", exact up to 2**53: of larger values first subtract an offset, which the mean then lacks" : "");
}

// Tells why this is not a tensor that can be used.
[[noreturn]] void explain_tensor(PyObject* value, const char* name, Kinds kinds) {
    const std::string types =
        say("float32, float64, float16 or bfloat16", kinds == Kinds::any ? ", or uint8, int16 or uint16 of images" : "");
    refuse_others(value, name, "a numpy.ndarray of " + types);
    if (!is_native(value) && storage_type(type_num(value))) {
        const std::string plain = py::str(py::handle(value).attr("dtype").attr("name"));
        type_error(name, say(name, " has dtype ", dtype_text(value), " of foreign byte order, expected the machine's own; use ", name,
                             ".astype('", plain, "')"));
    }
    std::string hint = conversion(name, value);
    if (const auto a = as_array(value, Kinds::any); a && is_integer(a->dtype) && std::string_view(name) == "x") {
        hint = ": integers have no gradients; normalise images before (normalize_images), or use x.astype(numpy.float32)";
    }
    type_error(name, say(name, " has dtype ", dtype_text(value), ", expected ", types, hint));
}

}  // namespace

void refuse_others(PyObject* value, const char* name, std::string_view expected) {
    if (!is_ndarray(value)) type_error(name, say(name, " is ", kind_of(value), ", expected ", expected));
    if (!is_masked(value)) return;
    const bool x = std::string_view(name) == "x";
    type_error(name, say(name, " is a masked array, whose mask would be ignored, expected ", expected,
                         x ? "; pass x.data, mask=~numpy.ma.getmaskarray(x)" : ""));
}

std::optional<Array> known_array(PyObject* value, Kinds kinds) {
    std::optional<Array> found = as_array(value, kinds);
    if (!found && is_ndarray(value) && !is_masked(value) && learn_bfloat16(py::handle(value).attr("dtype"))) found = as_array(value, kinds);
    return found;
}

Array tensor(PyObject* value, const char* name, Kinds kinds) {
    const std::optional<Array> found = known_array(value, kinds);
    if (!found) explain_tensor(value, name, kinds);
    return *found;
}

py::object floating_dtype(PyObject* value) {
    constexpr const char* kExpected = "float32, float64, float16 or bfloat16";
    py::object dtype;
    try {
        dtype = py::dtype::from_args(py::reinterpret_borrow<py::object>(value));
    } catch (py::error_already_set& e) {
        if (!e.matches(PyExc_TypeError)) throw;
        type_error("dtype", say("dtype is ", kind_of(value), ", expected ", kExpected));
    }
    if (!learn_bfloat16(dtype)) {
        const std::optional<Dtype> type = storage_type(py::detail::array_descriptor_proxy(dtype.ptr())->type_num);
        if (!type || is_integer(*type) || !dtype.attr("isnative").cast<bool>()) {
            type_error("dtype", say("dtype is ", std::string(py::str(dtype)), ", expected ", kExpected));
        }
    }
    return dtype;
}

namespace {

bool is_vector_type(Dtype t) { return t == Dtype::float32 || t == Dtype::float64; }

[[noreturn]] void explain_vector(PyObject* value, const char* name, const Subject& s, bool is_written) {
    const std::string expected = say(is_written ? "a writable float32 or float64 array of shape " : "a float32 or float64 array of shape ",
                                     shape_text(s.shape()), is_written ? ", updated in place" : "");
    refuse_others(value, name, expected);
    const std::string hint = is_written ? "" : conversion(name, value);
    type_error(name, say(name, " has dtype ", dtype_text(value), ", expected float32 or float64", hint));
}

// What makes a vector of this shape one of another; nothing if that would have to guess the order of its values.
std::string reshaping(std::span<const py::ssize_t> from, std::span<const py::ssize_t> to) {
    const auto without_ones = [](std::span<const py::ssize_t> shape) {
        std::vector<py::ssize_t> rest;
        std::copy_if(shape.begin(), shape.end(), std::back_inserter(rest), [](py::ssize_t n) { return n != 1; });
        return rest;
    };
    const auto place = [&](py::ssize_t n) { return std::find(from.begin(), from.end(), n) - from.begin(); };
    if (from.size() == 1 || without_ones(from) == without_ones(to)) return ".reshape" + (to.size() == 1 ? "(-1)" : shape_text(to));
    const std::set<py::ssize_t> lengths(from.begin(), from.end());
    if (lengths.size() < from.size() || lengths != std::set<py::ssize_t>(to.begin(), to.end())) return "";
    std::vector<py::ssize_t> axes;
    for (const py::ssize_t n : to) axes.push_back(place(n));
    return ".transpose" + shape_text(axes);
}

[[noreturn]] void explain_shape(const Array& v, const char* name, const Subject& s, bool with_rows, bool is_written = false) {
    std::string expected = shape_text(s.shape());
    if (with_rows && !s.where.hold(0)) {
        std::vector<py::ssize_t> wide(s.shape().begin(), s.shape().end());
        wide.insert(wide.begin(), s.x.shape[0]);
        expected += " or " + shape_text(wide);
    }
    const bool fits = v.size() == s.channels && v.ndim > 0;
    std::string hint = fits ? reshaping({v.shape, static_cast<std::size_t>(v.ndim)}, s.shape()) : "";
    const bool copied = is_written && hint.starts_with(".transpose");
    if (!hint.empty()) hint = say("; use ", expression(name), hint, copied ? ".copy() and keep it" : "");
    value_error(name, say(name, " has shape ", shape_text(v), ", expected ", expected, " ", s.match(), hint));
}

Array vector_array(PyObject* value, const char* name, const Subject& s, bool is_written = false) {
    const std::optional<Array> v = as_array(value);
    if (!v || !is_vector_type(v->dtype)) explain_vector(value, name, s, is_written);
    return *v;
}

bool has_shape(const Array& v, int skip, const Subject& s) {
    return v.ndim - skip == s.where.n && std::equal(v.shape + skip, v.shape + v.ndim, s.sizes.begin());
}

// The one stride, in elements, of the axes from `skip` on; nullopt if there is none.
std::optional<std::int64_t> merged_stride(const Array& v, int skip) {
    std::int64_t step = v.element_size(), size = 0;
    for (int i = v.ndim - 1; i >= skip; --i) {
        if (v.shape[i] == 1) continue;
        if (size == 0) step = v.strides[i];
        if (size != 0 && v.strides[i] != step * size) return std::nullopt;
        size = std::max<std::int64_t>(size, 1) * v.shape[i];
    }
    return step / v.element_size();
}

// One value per channel on one axis, as nearly all are.
bool is_plain(const Array& v, const Subject& s) { return v.ndim == 1 && s.where.n == 1 && v.shape[0] == s.sizes[0] && v.direct; }
ConstChannels plain(const Array& v) { return {v.data, v.dtype == Dtype::float64, v.shape[0], v.strides[0] / v.element_size()}; }

// v, or a copy whose channels have one stride.
Array readable(const Array& v, int skip, Owned& owned) {
    if (v.direct && merged_stride(v, skip)) return v;
    owned.push_back(new_array({v.shape, static_cast<std::size_t>(v.ndim)}, dtype_of(v.dtype)));
    copy_into(owned.back(), v.object);
    return *as_array(owned.back().ptr());
}

}  // namespace

ConstChannels vector(PyObject* value, const char* name, const Subject& s, Owned& owned) {
    const Array given = vector_array(value, name, s);
    if (is_plain(given, s)) return plain(given);
    if (!has_shape(given, 0, s)) explain_shape(given, name, s, false);
    const Array v = readable(given, 0, owned);
    return {v.data, v.dtype == Dtype::float64, s.channels, *merged_stride(v, 0)};
}

ConstRows rows(PyObject* value, const char* name, const Subject& s, Owned& owned) {
    const Array given = vector_array(value, name, s);
    if (is_plain(given, s)) return plain(given);
    const int skip = given.ndim == s.where.n + 1 ? 1 : 0;
    const bool fits = has_shape(given, skip, s) && (skip == 0 || (!s.where.hold(0) && given.shape[0] == s.x.shape[0]));
    if (!fits) explain_shape(given, name, s, true);
    Array v = readable(given, skip, owned);
    if (skip == 1 && v.shape[0] == 0) {  // no sample: any row will do, of which the core looks at one
        std::vector<py::ssize_t> one(v.shape, v.shape + v.ndim);
        one[0] = 1;
        owned.push_back(new_array(one, dtype_of(v.dtype)));
        v = *as_array(owned.back().ptr());
        if constexpr (!kGpu) std::memset(v.data, 0, static_cast<std::size_t>(v.size() * v.element_size()));
    }
    const ConstChannels row{v.data, v.dtype == Dtype::float64, s.channels, *merged_stride(v, skip)};
    if (skip == 0) return row;
    return {row, v.shape[0], v.strides[0] / v.element_size()};
}

Subject channels_of(PyObject* running_mean) {
    constexpr const char* kName = "running_mean";
    const std::optional<Array> found = as_array(running_mean);
    if (!found || !is_vector_type(found->dtype)) {
        refuse_others(running_mean, kName, "a writable float32 or float64 array, updated in place");
        type_error(kName, say(kName, " has dtype ", dtype_text(running_mean), ", expected float32 or float64"));
    }
    Subject s;
    s.x = *found;
    s.by_running_mean = true;
    if (s.x.ndim == 0) value_error(kName, "running_mean has shape (), expected a one-dimensional array, or the shape of the channel axes");
    for (; s.where.n < s.x.ndim; ++s.where.n) s.where.axes[s.where.n] = static_cast<std::int8_t>(s.where.n);
    s.set_channels();
    return s;
}

Channels written(PyObject* value, const char* name, const Subject& s) {
    constexpr const char* kExpected = "a writable float32 or float64 array, updated in place";
    const Array v = vector_array(value, name, s, true);
    if (!has_shape(v, 0, s)) explain_shape(v, name, s, false, true);
    if (!v.writable)
        value_error(name, say(name, " is read-only, expected ", kExpected, "; pass ", expression(name), ".copy() and keep it"));
    const std::optional<std::int64_t> stride = merged_stride(v, 0);
    if (!stride) {
        value_error(name,
                    say(name, " has strides ", shape_text({v.strides, static_cast<std::size_t>(v.ndim)}), " for shape ", shape_text(v),
                        ", expected a contiguous array, updated in place; pass ", expression(name), ".copy() and keep it"));
    }
    if (!v.direct) {
        value_error(name, say(name, " is not aligned to its element size, expected an aligned array; use ", expression(name), ".copy()"));
    }
    return {v.data, v.dtype == Dtype::float64, s.channels, *stride};
}

ConstChannels vector_or_number(PyObject* value, const char* name, const char* expected, const Subject& s, double& number, Owned& owned) {
    if (is_ndarray(value) && shape_of(value).ndim > 0) return vector(value, name, s, owned);
    number = real(value, name, expected);
    if (!(number >= 0) || std::isinf(number)) {
        value_error(name, say(name, " is ", std::string(py::str(py::float_(number))), ", expected ", expected));
    }
    return {&number, true, s.channels, 0};
}

}  // namespace batchnorm::bind
