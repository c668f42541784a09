// The operations: their parameters, and each as a fill-in of the core's description of a call.
#include "bind/operations.h"

#include <cxxabi.h>
#include <unistd.h>

#include <cmath>
#include <limits>

#include "bind/group.h"
#include "bind/positions.h"
#include "bind/saved.h"

namespace batchnorm::bind {
namespace {

// ---- the GIL

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
void without_gil(const ConstTensor& x, F f) {
    if (x.outer * x.channels * x.inner < kKeepGil) return f();
    PyThreadState* const state = PyEval_SaveThread();
    try {
        f();
    } catch (...) {
        restore_gil(state);
        throw;
    }
    restore_gil(state);
}

// ---- the core's errors in the caller's terms

constexpr std::string_view kChannel = "at channel ", kPosition = "position ", kOneValue = "x has one value per channel";

// The number that follows `words` in a text, and where it stands; -1 if they are not there.
std::int64_t number_after(const std::string& text, std::string_view words, std::size_t& begin, std::size_t& end) {
    begin = text.find(words);
    if (begin == std::string::npos) return -1;
    begin += words.size();
    end = text.find_first_not_of("0123456789", begin);
    return end == begin ? -1 : std::stoll(text.substr(begin, end - begin));
}

// The core knows neither shapes nor several channel axes, nor how positions lie in an array.
// `part`: samples of a part, where x has several.
Error retold(const Error& e, const Subject& s, const PositionArguments* positions, std::int64_t part) {
    std::string text = e.what();
    std::size_t begin, end;
    if (text.starts_with(kOneValue)) {
        const std::string x = part == 0 ? "x has shape " + shape_text(s.x) + " with"
                                        : say("virtual_batch_size is ", part, " and a part of x ", shape_text(s.x), " has");
        text.replace(0, kOneValue.size(), x + " one value per channel");
        if (part != 0) text.replace(text.find("use a larger batch"), std::string::npos, "use a larger virtual_batch_size, or drop it");
        const std::size_t counts = text.find(" that counts");
        if (counts != std::string::npos) text.insert(counts + 12, " by mask, lengths or weights");
    }
    if (const std::int64_t channel = number_after(text, kChannel, begin, end); channel >= 0 && s.where.n > 1) {
        std::vector<py::ssize_t> index(s.shape().size());
        std::int64_t rest = channel;
        for (std::size_t i = index.size(); i-- > 0; rest /= s.sizes[i]) index[i] = rest % s.sizes[i];
        text.replace(begin, end - begin, shape_text(index));
    }
    if (const std::int64_t position = number_after(text, kPosition, begin, end); position >= 0 && positions != nullptr) {
        text.replace(begin - kPosition.size(), end - begin + kPosition.size(), positions->weights_index(position));
    }
    return {e.kind, e.argument, text};
}

template <class F>
void run(const ConstTensor& x, const Subject& s, F f, const PositionArguments* positions = nullptr, std::int64_t part = 0) {
    try {
        without_gil(x, f);
    } catch (const Error& e) {
        throw retold(e, s, positions, part);
    }
}

// ---- results

PyTypeObject *train_result = nullptr, *gradients = nullptr, *double_gradients = nullptr;

// A named tuple without its Python constructor.
template <class... Values>
py::object named(PyTypeObject* type, Values... values) {
    constexpr Py_ssize_t kSize = sizeof...(Values);
    auto result = py::reinterpret_steal<py::object>(type == nullptr ? PyTuple_New(kSize) : type->tp_alloc(type, kSize));
    if (!result) throw py::error_already_set();
    Py_ssize_t i = 0;
    (PyTuple_SET_ITEM(result.ptr(), i++, values.release().ptr()), ...);
    return result;
}

template <class T>
T* values_of(const py::object& array) {
    return reinterpret_cast<T*>(py::detail::array_proxy(array.ptr())->data);
}

// A new array of one value per channel and its values.
template <class T>
std::pair<py::object, std::span<T>> new_vector(const Subject& s) {
    py::object array = new_array(s.shape(), vector_dtype(std::is_same_v<T, double>));
    T* const data = values_of<T>(array);
    return {std::move(array), {data, static_cast<std::size_t>(s.channels)}};
}

// ---- forward

constexpr std::string_view kKeep[] = {"x", "y"}, kNonfinite[] = {"propagate", "raise", "skip"}, kStats[] = {"batch", "fixed"};

// Numbers in the place of vectors.
struct Numbers {
    double decay, seen, count;
};

// The arguments of a forward call, and what must live as long as it.
struct ForwardCall {
    const Arguments& a;
    const Subject s;
    Forward f;
    Tensors tensors;
    PositionArguments positions;
    Owned owned;
    Numbers numbers;
    py::object dtype;  // of an image's result
    bool has_parts = false;
    std::int64_t part = 0;  // its samples, if there are several

    ForwardCall(const Arguments& arguments, Kinds kinds)
        : a(arguments), s(subject(arguments, kinds)), tensors(s, "x", f.x), positions(arguments, s) {}

    void set_affine();
    void set_result();
    void set_running();
    void set_renorm();
    void set_renorm_option(const std::string& name, PyObject* value);
    std::int64_t part_size();
    void see(PythonGroup* group = nullptr);
    py::object saved(Keeps keeps);
    void keep(SavedObject& o, Keeps keeps, const py::object& y) const;
};

void ForwardCall::set_affine() {
    if (a.has(Name::mean)) f.mean = vector(a[Name::mean], "mean", s, owned);
    if (a.has(Name::gamma)) f.gamma = rows(a[Name::gamma], "gamma", s, owned);
    if (a.has(Name::beta)) f.beta = rows(a[Name::beta], "beta", s, owned);
    f.activation = activation(a, s.x.dtype, f.slope);
    f.execution.num_threads = threads(a[Name::num_threads]);
}

// What an image's result may be: another type, another layout. Of other x they may only say what is so anyway.
void ForwardCall::set_result() {
    const bool image = is_integer(s.x.dtype);
    if (a.has(Name::dtype)) dtype = floating_dtype(a[Name::dtype]);
    const int from = s.where.first();
    int to = from;
    if (a.has(Name::out_format)) {
        if (s.where.n > 1) {
            value_error("out_format", say("out_format is given and channel_axis names several axes, ", s.axes(), "; drop out_format="));
        }
        to = format_axis(a[Name::out_format], "out_format", s.x);
    }
    if (image) {
        const std::optional<Array> out = known_array(a[Name::out]);
        if (!dtype) dtype = py::reinterpret_borrow<py::object>(dtype_of(out ? out->dtype : Dtype::float32));
        return tensors.image(dtype.ptr(), to);
    }
    if (dtype && !dtype.equal(py::handle(a[Name::x]).attr("dtype"))) {
        value_error("dtype", say("dtype is ", std::string(py::str(dtype)), " and x has dtype ", dtype_text(a[Name::x]),
                                 ", expected None or x's own: only integers change their type; drop dtype= and convert the result"));
    }
    if (to != from) {
        value_error(
            "out_format",
            say("out_format is ", std::string(py::repr(a[Name::out_format])), " and the channels of x ", shape_text(s.x), " are on ",
                s.axes(), ", expected None or x's own: only integers change their layout; drop out_format= and use numpy.moveaxis"));
    }
}

// The weight of the old running value: a number, one per channel, or what follows from the values seen.
void set_decay(const Arguments& a, const Subject& s, Running& running, Numbers& numbers, Owned& owned) {
    constexpr const char* kExpected = "a number in [0, 1], the weight of the old value, or one per channel";
    if (a.has(Name::decay)) {
        if (a.has(Name::seen)) {
            value_error("seen", say("seen is given and decay is ", kind_of(a[Name::decay]),
                                    "; values seen decide the weight only with decay=None: drop one of them"));
        }
        const ConstChannels decays = vector_or_number(a[Name::decay], "decay", kExpected, s, numbers.decay, owned);
        if (decays.data == &numbers.decay) {
            running.decay = numbers.decay;
        } else {
            running.decays = decays;
        }
        return;
    }
    if (!a.has(Name::seen)) {
        value_error("decay",
                    say("decay is None, expected ", kExpected, "; for a cumulative average give seen= too, the values seen before"));
    }
    running.seen =
        vector_or_number(a[Name::seen], "seen", "a finite number >= 0, values seen before, or one per channel", s, numbers.seen, owned);
    if constexpr (kGpu) {
        if (running.seen.data != &numbers.seen) return;
        owned.push_back(number_on_gpu(numbers.seen));
        running.seen.data = values_of<double>(owned.back());
    }
}

void both_or_neither(const Arguments& a, Name one, Name other) {
    if (a.has(one) == a.has(other)) return;
    const bool first = a.has(one);
    value_error(word(first ? other : one),
                say(word(first ? other : one), " is None but ", word(first ? one : other), " is given, expected both or neither"));
}

void ForwardCall::set_running() {
    Running& running = f.running;
    both_or_neither(a, Name::running_mean, Name::running_var);
    if (a.has(Name::running_mean)) running.mean = written(a[Name::running_mean], "running_mean", s);
    if (a.has(Name::running_var)) running.var = written(a[Name::running_var], "running_var", s);
    if (running.mean || a.has(Name::decay) || a.has(Name::seen)) set_decay(a, s, running, numbers, owned);
    running.ddof = ddof_of(a[Name::running_ddof], "running_ddof");
    running.on_nonfinite = static_cast<OnNonfinite>(one_of(a[Name::on_nonfinite], "on_nonfinite", kNonfinite));
}

void ForwardCall::set_renorm_option(const std::string& name, PyObject* value) {
    constexpr std::string_view kOptions[] = {"mean", "std", "decay", "rmin", "rmax", "dmax"};
    const std::string full = "renorm " + name;
    Renorm& r = f.renorm;
    double* const numbers_of[] = {nullptr, nullptr, &r.decay, &r.rmin, &r.rmax, &r.dmax};
    const auto option = std::find(std::begin(kOptions), std::end(kOptions), name);
    if (option == std::end(kOptions)) {
        value_error("renorm", say("renorm has no option '", name, "', expected mean, std, decay, rmin, rmax, dmax",
                                  suggestion(py::str(name), kOptions)));
    }
    if (double* const number = numbers_of[option - std::begin(kOptions)]) {
        if (number == &r.decay && value == Py_None) return;
        *number = real(value, full.c_str(), "a number");
        // A negative one stands for none in the core.
        if (number == &r.decay && !(r.decay >= 0 && r.decay <= 1)) {
            value_error("renorm", say(full, " is ", std::string(py::repr(value)), ", expected a number in [0, 1]"));
        }
        return;
    }
    if (value == Py_None) return;
    Channels& to = name == "mean" ? r.mean : r.std;
    const ConstChannels v = vector(value, full.c_str(), s, owned);
    to = {const_cast<void*>(v.data), v.is_double, v.size, v.stride};
}

void ForwardCall::set_renorm() {
    PyObject* const value = a[Name::renorm];
    if (value == Py_None || value == Py_False) return;
    Renorm& r = f.renorm;
    r.enabled = true;
    py::dict options;
    if (value != Py_True) {
        const bool mapping = PyMapping_Check(value) != 0 && PyObject_HasAttrString(value, "keys") != 0;
        if (!mapping) {
            type_error("renorm", say("renorm is ", kind_of(value),
                                     ", expected True, or a mapping with 'mean', 'std', 'decay', 'rmin', 'rmax', 'dmax'"));
        }
        if (PyDict_Update(options.ptr(), value) != 0) throw py::error_already_set();
    }
    for (const auto& [name, option] : options) set_renorm_option(py::str(name), option.ptr());
    if (r.decay >= 0) {  // then the reference is written
        if (!r.mean || !r.std) {
            value_error("renorm", "renorm decay is given without mean and std, which alone it moves; drop it, or give them");
        }
        r.mean = written(options["mean"].ptr(), "renorm mean", s);
        r.std = written(options["std"].ptr(), "renorm std", s);
    }
    if (static_cast<bool>(r.mean) != static_cast<bool>(r.std)) {
        value_error("renorm", say("renorm ", r.mean ? "std" : "mean", " is absent but ", r.mean ? "mean" : "std",
                                  " is given, expected both or neither"));
    }
    if (!r.mean && !f.running.mean) {
        value_error("renorm",
                    "renorm is given without running_mean and running_var, expected them, or mean and std in renorm: it needs a reference");
    }
}

// Samples of a part; 0 without parts.
std::int64_t ForwardCall::part_size() {
    if (!a.has(Name::virtual_batch_size)) return 0;
    has_parts = true;
    const std::int64_t n = integer(a[Name::virtual_batch_size], "virtual_batch_size", "an int, at least 1: samples per part");
    if (n < 1) value_error("virtual_batch_size", say("virtual_batch_size is ", n, ", expected an int, at least 1: samples per part"));
    if (s.where.hold(0)) {
        value_error("virtual_batch_size",
                    "virtual_batch_size is given with the channels on axis 0, where the samples are expected; drop it");
    }
    return n;
}

// With a group the batch is cut along the samples.
void sample_axis(const Subject& s) {
    if (!s.where.hold(0)) return;
    value_error("group",
                "group is given with the channels on axis 0, expected the samples there, along which processes share a batch; "
                "move the axes, or merge Moments");
}
std::int64_t sample_rows(const ConstTensor& x, std::int64_t samples) {
    return samples == 0 ? 1 : std::max<std::int64_t>(x.outer / samples, 1);
}

// Adds the residual and finds the view of all tensors.
void ForwardCall::see(PythonGroup* group) {
    if (a.has(Name::residual)) tensors.read("residual", a[Name::residual], f.residual);
    positions.add_to(tensors, f.positions);
    const std::int64_t size = part_size(), samples = s.x.shape[0];
    if (group != nullptr) {
        if (has_parts) {
            value_error("virtual_batch_size",
                        "virtual_batch_size is given with group, expected one of them: a part has statistics of its own, of which no other "
                        "process has values; drop one");
        }
        sample_axis(s);
        f.execution.group = group;
    }
    tensors.see(has_parts || group != nullptr || f.gamma.rows != 0 || f.beta.rows != 0, nullptr, group != nullptr);
    positions.flatten(tensors.layout(), f.positions);
    part = size < samples ? size : 0;
    if (group != nullptr) f.execution.sample_outer = sample_rows(f.x, samples);
    if (has_parts && samples > 0) f.part_outer = std::min(size, samples) * (f.x.outer / samples);
}

// The empty Saved of this call, which the core fills.
py::object ForwardCall::saved(Keeps keeps) {
    py::object made = new_saved(s, f);
    SavedObject& o = saved_of(made.ptr(), "");
    o.layout = tensors.layout();
    o.has_parts = has_parts;
    o.keeps = keeps;
    f.saved = &o.saved;
    return made;
}

// Whether the same forward takes keep='y'; eps is not known of Saved.of, which has no keep.
bool takes_y(const SavedObject& o) {
    if (kGpu) return false;
    const bool told = o.activation == Activation::none || (o.activation == Activation::leaky_relu && o.slope > 0);
    return told && !o.has_residual && !std::isnan(o.eps);
}

// After the call: refers to what backward reads.
void ForwardCall::keep(SavedObject& o, Keeps keeps, const py::object& y) const {
    if (keeps == Keeps::nothing) return;
    const auto refer = [&](PyObject*& to, Fingerprint& mark, PyObject* object) {
        to = Py_NewRef(object);
        mark.take(*as_array(object), positions);
    };
    const bool any = f.x.outer != 0;
    if (keeps == Keeps::x && any && f.y.data == f.x.data) {
        o.lost = takes_y(o) ? "out= of the forward was x itself; use keep='y', or another out"
                            : "out= of the forward was x itself; use another out";
    } else {
        refer(o.tensor, o.mark, keeps == Keeps::x ? a[Name::x] : y.ptr());
    }
    if (!o.saved.reads_residual()) return;
    if (any && f.y.data == f.residual.data) {
        o.lost_residual = "out= of the forward was the residual itself; use another out";
    } else {
        refer(o.residual, o.residual_mark, a[Name::residual]);
    }
}

py::object batch_norm(const Arguments& a) {
    ForwardCall c(a, Kinds::any);
    Forward& f = c.f;
    c.set_result();
    f.mean = vector(a[Name::mean], "mean", c.s, c.owned);
    f.var = vector(a[Name::var], "var", c.s, c.owned);
    c.set_affine();
    f.eps = real(a[Name::eps], "eps", "a finite number >= 0");
    c.tensors.write("out", a[Name::out], f.y);
    c.see();
    run(f.x, c.s, [&] { library::batch_norm(f); });
    return c.tensors.result(1);
}

// f(group), null without one; the other processes learn of what it throws.
template <class F>
py::object with_group(PyObject* object, const F& f) {
    if (object == Py_None) return f(static_cast<PythonGroup*>(nullptr));
    if (kGpu)
        type_error("group", say("group is ", kind_of(object),
                                ", which is not served on a GPU, expected None; use batchnorm.torch.SyncBatchNorm, or arrays on the CPU"));
    PythonGroup group(object);
    return group.told([&] { return f(&group); });
}

Keeps keep_of(const Arguments& a, const Forward& f) {
    if (!a.has(Name::keep)) return Keeps::nothing;
    const auto keeps = static_cast<Keeps>(one_of(a[Name::keep], "keep", kKeep, true) + 1);
    const bool told = f.activation == Activation::none || f.activation == Activation::leaky_relu;
    if (keeps == Keeps::y && (a.has(Name::residual) || !told)) {
        const std::string with = a.has(Name::residual) ? "a residual" : say("activation='", word(f.activation), "'");
        value_error("keep", say("keep is 'y' with ", with,
                                ", behind which y does not tell x, expected no residual and no activation or "
                                "'leaky_relu'; use keep='x', or apply them outside"));
    }
    return keeps;
}

// Whether processes have anything to tell each other in a forward, as the core decides it, of arguments that may be wrong.
bool exchanges(const Arguments& a) {
    if (!a.has(Name::mean) || a.has(Name::running_mean)) return true;
    PyObject* const renorm = a[Name::renorm];
    return PyDict_Check(renorm) != 0 && !py::reinterpret_borrow<py::dict>(renorm).attr("get")("decay").is_none();
}

py::object batch_norm_train(const Arguments& a, PythonGroup* group) {
    if (group != nullptr) group->expect(exchanges(a));
    ForwardCall c(a, Kinds::floating);
    Forward& f = c.f;
    both_or_neither(a, Name::mean, Name::var);
    c.set_affine();
    if (a.has(Name::var)) f.var = vector(a[Name::var], "var", c.s, c.owned);
    f.eps = real(a[Name::eps], "eps", "a finite number >= 0");
    c.set_running();
    c.set_renorm();
    const Keeps keeps = keep_of(a, f);
    f.keep = keeps == Keeps::y ? Keep::y : Keep::x;
    c.tensors.write("out", a[Name::out], f.y);
    c.see(group);
    py::object saved = c.saved(keeps);
    if (group != nullptr) {
        SavedObject& o = saved_of(saved.ptr(), "");
        o.group = Py_NewRef(a[Name::group]);
        o.shares = !f.mean;
        group->enter();
    }
    run(f.x, c.s, [&] { library::batch_norm_train(f); }, &c.positions, c.part);
    py::object y = c.tensors.result(1);
    c.keep(saved_of(saved.ptr(), ""), keeps, y);
    return named(train_result, std::move(y), std::move(saved));
}

py::object batch_norm_train(const Arguments& a) {
    return with_group(a[Name::group], [&](PythonGroup* group) { return batch_norm_train(a, group); });
}

// Saved.of
py::object saved_from(const Arguments& a) {
    ForwardCall c(a, Kinds::floating);
    Forward& f = c.f;
    f.mean = vector(a[Name::mean], "mean", c.s, c.owned);
    const ConstChannels inv_std = vector(a[Name::inv_std], "inv_std", c.s, c.owned);
    c.set_affine();
    const bool batch = one_of(a[Name::stats], "stats", kStats) == 0;
    c.see();
    f.eps = std::numeric_limits<double>::quiet_NaN();  // nobody's: it is in inv_std
    py::object made = c.saved(Keeps::x);
    run(f.x, c.s, [&] { library::save(f, inv_std, batch); }, &c.positions);
    c.keep(saved_of(made.ptr(), ""), Keeps::x, py::none());
    return made;
}

// ---- backward

struct Needs {
    bool dx = true, dgamma, dbeta, dresidual;
};

// None: what the forward had.
Needs needs_of(const Arguments& a, const SavedObject& o) {
    if (!a.has(Name::needs)) return {true, o.gamma.present, o.beta.present, o.has_residual};
    constexpr std::string_view kNeeds[] = {"dx", "dgamma", "dbeta", "dresidual"};
    constexpr const char* kExpected = "a tuple of 'dx', 'dgamma', 'dbeta', 'dresidual'";
    PyObject* const value = a[Name::needs];
    if (PyUnicode_Check(value)) {
        type_error("needs",
                   say("needs is ", kind_of(value), ", expected ", kExpected, ", for example (", std::string(py::repr(value)), ",)"));
    }
    if (!PyTuple_Check(value) && !PyList_Check(value) && !PyAnySet_Check(value)) {
        type_error("needs", say("needs is ", kind_of(value), ", expected ", kExpected));
    }
    bool wanted[std::size(kNeeds)] = {};
    for (const py::handle name : py::reinterpret_borrow<py::iterable>(value)) {
        const auto* const end = std::end(kNeeds);
        const auto* const found = std::find_if(std::begin(kNeeds), end, [&](std::string_view known) {
            return PyUnicode_Check(name.ptr()) && PyUnicode_CompareWithASCIIString(name.ptr(), known.data()) == 0;
        });
        if (!PyUnicode_Check(name.ptr())) type_error("needs", say("needs contains ", kind_of(name.ptr()), ", expected ", kExpected));
        if (found == end) value_error("needs", say("needs contains ", std::string(py::repr(name)), ", expected ", kExpected));
        wanted[found - std::begin(kNeeds)] = true;
    }
    if (wanted[3] && !o.has_residual) value_error("needs", "needs contains 'dresidual', but the forward had no residual; drop it");
    return {wanted[0], wanted[1], wanted[2], wanted[3]};
}

// The tensor that backward reads, and where its channels are. `held`: it is the Saved's own, whose overwriting would be noticed.
struct Kept {
    py::object object;
    Subject s;
    bool held;
    const char* name;

    Kept(SavedObject& o, const Arguments& a);
};

[[noreturn]] void overwritten(const char* name, const SavedObject& o) {
    const bool x = std::string_view(name) == "x";
    throw Misuse(say(
        name, " has been overwritten since the forward, expected it unchanged until backward; leave it alone, or call the forward with ",
        o.keeps == Keeps::y ? "keep='x'" : "a copy", x && takes_y(o) ? ", or with keep='y'" : ""));
}

Kept::Kept(SavedObject& o, const Arguments& a) : held(o.keeps != Keeps::nothing), name(o.keeps == Keeps::y ? "y" : "x") {
    if (o.saved.empty()) throw Misuse("saved is empty: its forward did not come to an end");
    if (held) {
        if (a.has(Name::x)) value_error("x", say("x is given and saved holds its own ", name, ", expected None; drop x="));
        object = kept_tensor(o);
        if (!object) throw Misuse(say("saved holds no ", name, ": ", o.lost));
    } else {
        if (!a.has(Name::x)) throw Misuse("saved holds no tensor, as the forward had keep=None: pass x=, the forward's");
        object = py::reinterpret_borrow<py::object>(a[Name::x]);
    }
    s.x = tensor(object.ptr(), name);
    s.where = o.where;
    const auto shape = o.shape();
    const bool same_type = s.x.dtype == o.dtype, same = std::equal(shape.begin(), shape.end(), s.x.shape, s.x.shape + s.x.ndim);
    if (!same_type || !same) {
        const std::string got = same_type ? "shape " + shape_text(s.x) : "dtype " + dtype_text(object.ptr());
        const std::string expected = same_type ? shape_text(shape) : std::string(py::str(dtype_of(o.dtype)));
        const std::string what = say(name, " has ", got, ", expected ", expected, " as in the forward");
        if (held) throw Misuse(what);
        throw Error(same_type ? Error::value : Error::type, "x", what);
    }
    s.set_channels();
    if (!o.mark.matches(s.x)) overwritten(name, o);
}

// Adds the forward's residual if it is read; the object that holds it.
py::object add_residual(Tensors& tensors, SavedObject& o, const Arguments& a, ConstTensor& view) {
    py::object residual = kept_residual(o);
    if (a.has(Name::residual)) {
        if (o.keeps != Keeps::nothing) {
            value_error("residual", "residual is given and saved holds what it needs of its own, expected None; drop residual=");
        }
        residual = py::reinterpret_borrow<py::object>(a[Name::residual]);
    }
    if (!o.saved.reads_residual()) return residual;
    if (!residual) {
        throw Misuse(say("saved holds no residual: ", o.lost_residual != nullptr ? o.lost_residual : "pass residual=, the forward's"));
    }
    tensors.read("residual", residual.ptr(), view);
    if (!o.residual_mark.matches(shape_of(residual.ptr()))) overwritten("residual", o);
    return residual;
}

// A gradient like gamma or beta: of the parameter's type, or the other parameter's; without any, float64 for float64 data and float32 for
// the rest.
py::object gradient(const Subject& s, const Parameter& own, const Parameter& other, Rows& to, Owned& owned) {
    const bool is_double = own.present ? own.is_double : other.present ? other.is_double : s.x.dtype == Dtype::float64;
    const bool by_sample = own.rows >= 0;
    std::array<py::ssize_t, kMaxDims + 1> sizes;
    sizes[0] = own.rows;
    std::copy(s.shape().begin(), s.shape().end(), sizes.begin() + by_sample);
    const std::span<const py::ssize_t> shape(sizes.data(), s.shape().size() + by_sample);
    py::object array = new_array(shape, vector_dtype(is_double)), target = array;
    if (own.rows == 0) {  // no sample: the core still writes a row
        sizes[0] = 1;
        owned.push_back(target = new_array(shape, vector_dtype(is_double)));
    }
    to.values = {py::detail::array_proxy(target.ptr())->data, is_double, s.channels, 1};
    to.rows = own.rows < 0 ? 0 : std::max<std::int64_t>(own.rows, 1);
    to.row_stride = s.channels;
    return array;
}

void refuse_unneeded(const Arguments& a, Name out, bool needed, const char* name) {
    if (needed || !a.has(out)) return;
    if (!a.has(Name::needs)) value_error(word(out), say(word(out), " is given and the forward had no residual; drop it"));
    value_error(word(out), say(word(out), " is given but needs does not contain '", name, "', which it would receive; drop one of them"));
}

// Notes what an output was written over.
void note_losses(SavedObject& o, const Kept& kept, const Backward& b) {
    if (b.kept.outer == 0) return;
    const bool y = o.keeps == Keeps::y;
    if (kept.held && b.dx && b.dx.data == b.kept.data) {
        lose_tensor(o, y ? "out= of backward was y itself" : "out= of backward was x itself");
    }
    if (!b.residual) return;
    if ((b.dx && b.dx.data == b.residual.data) || (b.dresidual && b.dresidual.data == b.residual.data)) {
        lose_residual(o, "an output of backward was the residual itself");
    }
}

py::object batch_norm_backward(const Arguments& a, SavedObject& o, PythonGroup* group) {
    if (group != nullptr) group->expect(o.shares != 0);
    const Needs needs = needs_of(a, o);
    Backward b;
    b.all_reduce = flag(a[Name::all_reduce], "all_reduce");
    if (group != nullptr) group->expect((needs.dx && o.shares != 0) || (b.all_reduce && (needs.dgamma || needs.dbeta)));
    const Kept kept(o, a);
    b.saved = &o.saved;
    Owned owned;
    Tensors tensors(kept.s, kept.name, b.kept);
    refuse_unneeded(a, Name::out, needs.dx, "dx");
    refuse_unneeded(a, Name::out_residual, needs.dresidual, "dresidual");
    if (b.all_reduce && group == nullptr) {
        value_error("all_reduce", "all_reduce is True and the forward had no group, expected False; drop it");
    }
    b.execution.num_threads = threads(a[Name::num_threads]);
    b.execution.group = group;
    if (needs.dx) tensors.write("out", a[Name::out], b.dx);
    if (needs.dresidual) tensors.write("out_residual", a[Name::out_residual], b.dresidual);
    tensors.read("dy", a[Name::dy], b.dy);
    const py::object residual = add_residual(tensors, o, a, b.residual);
    tensors.see(false, &o.layout);
    py::object dgamma = py::none(), dbeta = py::none();
    if (needs.dgamma) dgamma = gradient(kept.s, o.gamma, o.beta, b.dgamma, owned);
    if (needs.dbeta) dbeta = gradient(kept.s, o.beta, o.gamma, b.dbeta, owned);
    if (group != nullptr) group->enter();
    run(b.kept, kept.s, [&] { library::batch_norm_backward(b); });
    note_losses(o, kept, b);
    py::object dx = needs.dx ? tensors.result(1) : py::none(), dresidual;
    if (needs.dresidual) dresidual = tensors.result(needs.dx ? 2 : 1);
    py::object result = named(gradients, std::move(dx), std::move(dgamma), std::move(dbeta));
    if (dresidual) result.attr("dresidual") = dresidual;
    return result;
}

py::object batch_norm_backward(const Arguments& a) {
    SavedObject& o = saved_of(a[Name::saved], "batch_norm_backward");
    if (o.group == nullptr) return batch_norm_backward(a, o, nullptr);
    return with_group(o.group, [&](PythonGroup* group) { return batch_norm_backward(a, o, group); });
}

void refuse_absent(const Arguments& a, Name gradient, bool present, const char* name) {
    if (present || !a.has(gradient)) return;
    value_error(word(gradient), say(word(gradient), " is given and the forward had no ", name, ", expected None; drop it"));
}

py::object batch_norm_double_backward(const Arguments& a) {
    SavedObject& o = saved_of(a[Name::saved], "batch_norm_double_backward");
    if (o.group != nullptr) {
        value_error("saved",
                    "saved is of a forward with a group, expected one of a single process: the double backward is not served for a group");
    }
    const Kept kept(o, a);
    if (!a.has(Name::ddx) && !a.has(Name::ddgamma) && !a.has(Name::ddbeta) && !a.has(Name::ddresidual)) {
        value_error("ddx", "ddx, ddgamma, ddbeta and ddresidual are all None, expected at least one of them");
    }
    refuse_absent(a, Name::ddgamma, o.gamma.present, "gamma");
    refuse_absent(a, Name::ddbeta, o.beta.present, "beta");
    refuse_absent(a, Name::ddresidual, o.has_residual, "residual");
    DoubleBackward b;
    b.saved = &o.saved;
    Owned owned;
    Tensors tensors(kept.s, kept.name, b.kept);
    b.execution.num_threads = threads(a[Name::num_threads]);
    if (a.has(Name::ddgamma)) b.ddgamma = rows(a[Name::ddgamma], "ddgamma", kept.s, owned);
    if (a.has(Name::ddbeta)) b.ddbeta = rows(a[Name::ddbeta], "ddbeta", kept.s, owned);
    tensors.write("ddy", Py_None, b.ddy);
    tensors.write("dx", Py_None, b.dx);
    if (o.has_residual) tensors.write("dresidual", Py_None, b.dresidual);
    tensors.read("dy", a[Name::dy], b.dy);
    if (a.has(Name::ddx)) tensors.read("ddx", a[Name::ddx], b.ddx);
    if (a.has(Name::ddresidual)) tensors.read("ddresidual", a[Name::ddresidual], b.ddresidual);
    const py::object residual = add_residual(tensors, o, a, b.residual);
    tensors.see(false, &o.layout);
    py::object dgamma = py::none(), dbeta = py::none(), dresidual = py::none();
    if (o.gamma.present) dgamma = gradient(kept.s, o.gamma, o.beta, b.dgamma, owned);
    if (o.beta.present) dbeta = gradient(kept.s, o.beta, o.gamma, b.dbeta, owned);
    run(b.kept, kept.s, [&] { library::batch_norm_double_backward(b); });
    if (o.has_residual) dresidual = tensors.result(3);
    return named(double_gradients, tensors.result(1), tensors.result(2), std::move(dgamma), std::move(dbeta), std::move(dresidual));
}

// ---- statistics

// The arguments of a call that reads x alone.
struct StatisticsCall {
    const Subject s;
    ConstTensor x;
    Tensors tensors;
    PositionArguments arguments;
    Positions positions;
    int num_threads;

    explicit StatisticsCall(const Arguments& a, const PythonGroup* group = nullptr)
        : s(subject(a, Kinds::any)), tensors(s, "x", x), arguments(a, s), num_threads(threads(a[Name::num_threads])) {
        arguments.add_to(tensors, positions);
        if (group != nullptr) sample_axis(s);
        tensors.see(group != nullptr, nullptr, group != nullptr);
        arguments.flatten(tensors.layout(), positions);
    }
};

py::object moments(const Arguments& a, PythonGroup* group) {
    if (group != nullptr) group->expect(true);
    const StatisticsCall c(a, group);
    const std::int64_t ddof = integer(a[Name::ddof], "ddof", "an int >= 0");
    const auto [mean, mean_values] = new_vector<double>(c.s);
    const auto [var, var_values] = new_vector<double>(c.s);
    const auto measure = [&, m = mean_values, v = var_values] {
        library::moments(c.x, m, v, ddof, c.num_threads, c.positions, group, sample_rows(c.x, c.s.x.shape[0]));
    };
    if (group != nullptr) group->enter();
    run(c.x, c.s, measure, &c.arguments);
    return named(nullptr, py::object(mean), py::object(var));
}

py::object moments(const Arguments& a) {
    return with_group(a[Name::group], [&](PythonGroup* group) { return moments(a, group); });
}

py::object moment_sums(const Arguments& a) {
    const StatisticsCall c(a);
    const py::ssize_t n = moment_sums_size(c.s.channels);
    py::object sums = new_array({&n, 1}, vector_dtype(true));
    const std::span<double> values(values_of<double>(sums), static_cast<std::size_t>(n));
    run(c.x, c.s, [&] { library::moment_sums(c.x, values, c.num_threads, c.positions); }, &c.arguments);
    return sums;
}

py::object channel_shape(const Arguments& a) {
    const Subject s = subject(a, Kinds::any);
    py::tuple shape(s.shape().size());
    for (std::size_t i = 0; i < shape.size(); ++i) shape[i] = s.shape()[i];
    return shape;
}

py::object update_running(const Arguments& a) {
    const Subject s = channels_of(a[Name::running_mean]);
    UpdateRunningArgs u;
    Numbers numbers;
    Owned owned;
    u.running.mean = written(a[Name::running_mean], "running_mean", s);
    u.running.var = written(a[Name::running_var], "running_var", s);
    u.mean = vector(a[Name::mean], "mean", s, owned);
    u.var = vector(a[Name::var], "var", s, owned);
    set_decay(a, s, u.running, numbers, owned);
    u.count =
        vector_or_number(a[Name::count], "count", "a finite number >= 0, values per channel, or one per channel", s, numbers.count, owned);
    u.running.ddof = ddof_of(a[Name::ddof], "ddof");
    run({}, s, [&] { library::update_running(u); });
    return py::none();
}

// ---- parameters, in the order of the signatures

using enum Name;
// clang-format off
constexpr Name kBatchNorm[] = {x, mean, var, gamma, beta, eps, channel_axis, data_format, Name::activation, slope, residual, mask, lengths,
                               lengths_axis, dtype, out_format, num_threads, out};
constexpr Name kTrain[] = {x, gamma, beta, mean, var, running_mean, running_var, decay, seen, running_ddof, eps, channel_axis, data_format,
                           Name::activation, slope, residual, mask, lengths, lengths_axis, weights, renorm, virtual_batch_size, keep, group,
                           on_nonfinite, num_threads, out};
constexpr Name kBackward[] = {dy, saved, x, residual, needs, all_reduce, num_threads, out, out_residual};
constexpr Name kDoubleBackward[] = {dy, saved, ddx, ddgamma, ddbeta, ddresidual, x, residual, num_threads};
constexpr Name kSavedOf[] = {x, mean, inv_std, gamma, beta, stats, channel_axis, data_format, Name::activation, slope, residual, mask,
                             lengths, lengths_axis, weights};
constexpr Name kUpdateRunning[] = {running_mean, running_var, mean, var, decay, count, seen, ddof};
constexpr Name kMoments[] = {x, channel_axis, data_format, ddof, mask, lengths, lengths_axis, weights, group, num_threads};
constexpr Name kMomentSums[] = {x, channel_axis, data_format, mask, lengths, lengths_axis, weights, num_threads};
constexpr Name kChannelShape[] = {x, channel_axis, data_format};
// clang-format on

constexpr Operation kOperations[] = {{"batch_norm", 5, kBatchNorm, &batch_norm},
                                     {"batch_norm_train", 3, kTrain, &batch_norm_train},
                                     {"batch_norm_backward", 2, kBackward, &batch_norm_backward},
                                     {"batch_norm_double_backward", 2, kDoubleBackward, &batch_norm_double_backward},
                                     {"saved_of", 5, kSavedOf, &saved_from},
                                     {"update_running", 4, kUpdateRunning, &update_running}};
constexpr Operation kRaw[] = {
    {"moments", 1, kMoments, &moments}, {"moment_sums", 1, kMomentSums, &moment_sums}, {"channel_shape", 3, kChannelShape, &channel_shape}};

}  // namespace

std::span<const Operation> operations() { return kOperations; }
std::span<const Operation> raw_operations() { return kRaw; }

void use_results(PyTypeObject* train, PyTypeObject* backward, PyTypeObject* double_backward) {
    Py_INCREF(train);
    Py_INCREF(backward);
    Py_INCREF(double_backward);
    train_result = train;
    gradients = backward;
    double_gradients = double_backward;
}

}  // namespace batchnorm::bind
