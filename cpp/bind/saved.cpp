#include "bind/saved.h"

#include <pybind11/critical_section.h>
#include <structmember.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace batchnorm::bind {
namespace {

PyTypeObject* saved_type = nullptr;

SavedObject& self(PyObject* o) { return *static_cast<SavedObject*>(reinterpret_cast<SavedHead*>(o)); }

constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::min();

// Where an element that counts, near this one, stands: its offset in bytes, or kNone.
std::int64_t counting_element(const Array& a, const PositionArguments& positions, std::int64_t element) {
    std::array<py::ssize_t, kMaxDims> index;
    for (int i = a.ndim - 1; i >= 0; element /= a.shape[i], --i) index[i] = element % a.shape[i];
    if (positions.exclude() && !positions.find_counting(index.data())) return kNone;
    std::int64_t offset = 0;
    for (int i = 0; i < a.ndim; ++i) offset += index[i] * a.strides[i];
    return offset;
}

// The values of rows, one after the other.
template <class T>
void copy_rows(const ConstRows& from, std::int64_t* to) {
    const auto* const data = static_cast<const T*>(from.values.data);
    T* out = reinterpret_cast<T*>(to);
    for (std::int64_t r = 0; r < std::max<std::int64_t>(from.rows, 1); ++r) {
        for (std::int64_t c = 0; c < from.values.size; ++c) *out++ = data[r * from.row_stride + c * from.values.stride];
    }
}

std::size_t words_of(const ConstRows& rows) {
    if (!rows || kGpu) return 0;  // a GPU's are in its memory
    const std::int64_t n = rows.values.size * std::max<std::int64_t>(rows.rows, 1) * (rows.values.is_double ? 8 : 4);
    return static_cast<std::size_t>((n + 7) / 8);
}

}  // namespace

void Fingerprint::take(const Array& a, const PositionArguments& positions) {
    if constexpr (kGpu) {
        const auto mark = change_mark(a.object);
        n_ = mark.size();
        std::copy(mark.begin(), mark.end(), bytes_.begin());
        return;
    }
    const auto elements = static_cast<std::uint64_t>(a.size());
    n_ = 0;
    size_ = a.element_size();
    if (elements == 0) return;
    const bool plain = a.contiguous && !positions.exclude();
    for (std::uint64_t k = 0; k < kSamples; ++k) {
        // Multiples of the golden ratio modulo 1 (Weyl 1916) lie evenly in any number of elements, whatever its divisors.
        const std::uint64_t fraction = k * 0x9e3779b97f4a7c15;
        const auto element = static_cast<std::int64_t>(static_cast<unsigned __int128>(fraction) * elements >> 64);
        const std::int64_t offset = plain ? element * size_ : counting_element(a, positions, element);
        if (offset == kNone) continue;
        offsets_[n_] = offset;
        bytes_[n_] = 0;
        std::memcpy(&bytes_[n_], static_cast<const char*>(a.data) + offset, static_cast<std::size_t>(size_));
        ++n_;
    }
}

bool Fingerprint::matches(const Array& a) const {
    if constexpr (kGpu) {
        const auto now = change_mark(a.object);
        return n_ == 0 || std::equal(now.begin(), now.end(), bytes_.begin());
    }
    const auto same = [&]<class T>(T) {
        for (std::uint64_t k = 0; k < n_; ++k) {
            T now;
            std::memcpy(&now, static_cast<const char*>(a.data) + offsets_[k], sizeof now);
            if (now != static_cast<T>(bytes_[k])) return false;
        }
        return true;
    };
    return size_ == 4 ? same(std::uint32_t{}) : size_ == 8 ? same(std::uint64_t{}) : same(std::uint16_t{});
}

py::object new_saved(const Subject& s, const Forward& call) {
    const std::size_t ndim = static_cast<std::size_t>(s.x.ndim), gamma_words = words_of(call.gamma), beta_words = words_of(call.beta);
    PyObject* const made = saved_type->tp_alloc(saved_type, static_cast<Py_ssize_t>(ndim + gamma_words + beta_words));
    if (made == nullptr) throw py::error_already_set();
    SavedObject& o = self(made);
    if constexpr (kGpu) o.memory = memory_for_saved();
    new (&o.saved) batchnorm::Saved(kGpu ? o.memory.get() : std::pmr::get_default_resource());
    auto result = py::reinterpret_steal<py::object>(made);
    o.where = s.where;
    o.dtype = s.x.dtype;
    o.ndim = s.x.ndim;
    o.activation = call.activation;
    o.slope = call.slope;
    o.eps = call.eps;
    o.has_residual = static_cast<bool>(call.residual);
    std::copy_n(s.x.shape, ndim, o.words());
    const auto keep = [&](const ConstRows& rows, Parameter& parameter, std::size_t word) {
        parameter = {static_cast<bool>(rows), rows.values.is_double, rows.rows == 0 ? -1 : s.x.shape[0], word};
        if (rows && !kGpu) rows.values.is_double ? copy_rows<double>(rows, o.words() + word) : copy_rows<float>(rows, o.words() + word);
    };
    keep(call.gamma, o.gamma, ndim);
    keep(call.beta, o.beta, ndim + gamma_words);
    return result;
}

SavedObject& saved_of(PyObject* value, const char* function) {
    if (Py_TYPE(value) == saved_type) return self(value);
    const std::string expected = ", expected what batch_norm_train returned beside y: y, saved = batch_norm_train(x, ...)";
    std::string hint;
    if (is_ndarray(value)) {
        hint = say("; with statistics of your own: saved = Saved.of(x, mean, inv_std, gamma, ...), then ", function, "(dy, saved)");
    } else if (std::string_view(Py_TYPE(value)->tp_name) == saved_type->tp_name) {
        type_error("saved", "saved is that of a forward on a GPU and dy is on the CPU, expected both in one place");
    } else if (PyTuple_Check(value) && PyTuple_GET_SIZE(value) == 2 && Py_TYPE(PyTuple_GET_ITEM(value, 1)) == saved_type) {
        hint = "; pass its second value, result.saved";
    }
    type_error("saved", say("saved is ", is_ndarray(value) ? "an array" : kind_of(value), expected, hint));
}

namespace {

py::object reference(SavedObject& s, PyObject* SavedObject::* member) {
    const py::scoped_critical_section alone(reinterpret_cast<PyObject*>(&s));
    return py::reinterpret_borrow<py::object>(s.*member);
}

void drop(SavedObject& s, PyObject* SavedObject::* member, const char* SavedObject::* reason, const char* why) {
    const py::scoped_critical_section alone(reinterpret_cast<PyObject*>(&s));
    s.*reason = why;
    Py_CLEAR(s.*member);
}

}  // namespace

py::object kept_tensor(SavedObject& s) { return reference(s, &SavedObject::tensor); }
py::object kept_residual(SavedObject& s) { return reference(s, &SavedObject::residual); }
void lose_tensor(SavedObject& s, const char* why) { drop(s, &SavedObject::tensor, &SavedObject::lost, why); }
void lose_residual(SavedObject& s, const char* why) { drop(s, &SavedObject::residual, &SavedObject::lost_residual, why); }

// ---- the type

namespace {

int traverse(PyObject* o, visitproc visit, void* arg) {
    SavedObject& s = self(o);
    Py_VISIT(Py_TYPE(o));
    Py_VISIT(s.dict);
    Py_VISIT(s.owner);
    Py_VISIT(s.tensor);
    Py_VISIT(s.residual);
    Py_VISIT(s.group);
    return 0;
}

int clear(PyObject* o) {
    SavedObject& s = self(o);
    Py_CLEAR(s.dict);
    Py_CLEAR(s.owner);
    Py_CLEAR(s.tensor);
    Py_CLEAR(s.residual);
    Py_CLEAR(s.group);
    return 0;
}

void dealloc(PyObject* o) {
    PyObject_GC_UnTrack(o);
    if (self(o).weakrefs != nullptr) PyObject_ClearWeakRefs(o);
    clear(o);
    std::destroy_at(&self(o).saved);
    std::destroy_at(&self(o).memory);
    PyTypeObject* const type = Py_TYPE(o);
    type->tp_free(o);
    Py_DECREF(type);
}

// Rows of one value per channel, in the shape of the channel axes.
py::object channels_view(SavedObject& s, const void* data, std::int64_t rows, bool is_double) {
    std::array<py::ssize_t, kMaxDims + 1> sizes;
    std::size_t n = 0;
    if (rows >= 0) sizes[n++] = rows;
    for (int k = 0; k < s.where.n; ++k) sizes[n++] = s.shape()[s.where.axes[k]];
    return view_of(data, {sizes.data(), n}, vector_dtype(is_double), reinterpret_cast<PyObject*>(&s));
}

py::object statistics(SavedObject& s, std::span<const double> values) {
    if (values.empty()) return py::none();
    return channels_view(s, values.data(), s.has_parts ? s.saved.parts() : -1, true);
}

py::object parameter(SavedObject& s, const Parameter& p) {
    if (!p.present) return py::none();
    if constexpr (kGpu) return channels_view(s, saved_parameter(s.saved, &p == &s.gamma), p.rows, true);
    return channels_view(s, s.words() + p.word, p.rows, p.is_double);
}

py::object shape_tuple(SavedObject& s) {
    py::tuple shape(s.shape().size());
    for (std::size_t i = 0; i < shape.size(); ++i) shape[i] = s.shape()[i];
    return shape;
}

py::object channel_axis(SavedObject& s) {
    if (!s.where.tuple) return py::int_(s.where.first());
    py::tuple axes(static_cast<std::size_t>(s.where.n));
    for (std::size_t i = 0; i < axes.size(); ++i) axes[i] = static_cast<int>(s.where.axes[i]);
    return axes;
}

py::object keeps(SavedObject& s) {
    if (!kept_tensor(s)) return py::none();
    return py::str(s.keeps == Keeps::x ? "x" : "y");
}

std::size_t bytes(SavedObject& s) { return s.saved.bytes() + static_cast<std::size_t>(Py_SIZE(&s)) * sizeof(std::int64_t); }

py::object kept_channels(SavedObject& s) {
    const auto channels = s.saved.kept_channels();
    const py::ssize_t n = static_cast<py::ssize_t>(channels.size());
    return view_of(channels.data(), {&n, 1}, py::dtype::of<std::int64_t>().ptr(), reinterpret_cast<PyObject*>(&s));
}

py::object activation_name(SavedObject& s) {
    return s.activation == Activation::none ? py::object(py::none()) : py::str(word(s.activation));
}

py::object borrowed(PyObject* o) { return py::reinterpret_borrow<py::object>(o); }

using Get = py::object (*)(SavedObject&);
PyObject* get(PyObject* o, void* closure) {
    return guarded([&] { return (*static_cast<const Get*>(closure))(self(o)); });
}

struct Attribute {
    const char *name, *doc;
    Get get;
};
constexpr Attribute kAttributes[] = {
    {"mean", "Mean that normalised, float64; (C,), or (P, C) with virtual_batch_size.",
     [](SavedObject& s) { return statistics(s, s.saved.mean()); }},
    {"var", "Population variance that normalised, like mean.", [](SavedObject& s) { return statistics(s, s.saved.var()); }},
    {"inv_std", "1 / sqrt(var + eps), like mean.", [](SavedObject& s) { return statistics(s, s.saved.inv_std()); }},
    {"count", "Values that counted, or the sum of their weights, like mean; of given statistics those of this process.",
     [](SavedObject& s) { return statistics(s, s.saved.count()); }},
    {"_values", "How many values counted, whatever their weights, like mean.",
     [](SavedObject& s) { return statistics(s, s.saved.values()); }},
    {"r", "Factor of batch renormalisation, like mean, or None.", [](SavedObject& s) { return statistics(s, s.saved.r()); }},
    {"d", "Shift of batch renormalisation, like mean, or None.", [](SavedObject& s) { return statistics(s, s.saved.d()); }},
    {"gamma", "A copy of gamma, or None.", [](SavedObject& s) { return parameter(s, s.gamma); }},
    {"beta", "A copy of beta, or None.", [](SavedObject& s) { return parameter(s, s.beta); }},
    {"eps", "eps; None from Saved.of.", [](SavedObject& s) { return std::isnan(s.eps) ? py::object(py::none()) : py::float_(s.eps); }},
    {"shape", "Shape of x.", &shape_tuple},
    {"dtype", "Dtype of x.", [](SavedObject& s) { return borrowed(dtype_of(s.dtype)); }},
    {"channel_axis", "The channel axis, or a tuple of them.", &channel_axis},
    {"activation", "Name of the activation, or None.", &activation_name},
    {"slope", "leaky_relu's slope, or None.",
     [](SavedObject& s) { return s.activation == Activation::leaky_relu ? py::object(py::float_(s.slope)) : py::none(); }},
    {"keeps", "Which tensor is held: 'x', 'y' or None.", &keeps},
    {"kept_channels", "Channels of which x is stored, with keep='y'.", &kept_channels},
    {"nbytes", "Bytes held besides the tensor that was passed in or out.", [](SavedObject& s) { return py::object(py::int_(bytes(s))); }},
    {"parts", "Number of parts with statistics of their own.", [](SavedObject& s) { return py::object(py::int_(s.saved.parts())); }},
    {"updated", "Whether running statistics took the batch.", [](SavedObject& s) { return py::object(py::bool_(s.saved.updated())); }},
    {"group", "The forward's group, or None.",
     [](SavedObject& s) { return s.group == nullptr ? py::object(py::none()) : borrowed(s.group); }},
    {"has_residual", "Whether there was a residual.", [](SavedObject& s) { return py::object(py::bool_(s.has_residual)); }}};

PyObject* repr(PyObject* o) {
    return guarded([&] {
        SavedObject& s = self(o);
        std::string held = "keeps nothing";
        if (kept_tensor(s)) held = s.keeps == Keeps::x ? "keeps 'x'" : "keeps 'y'";
        if (s.lost != nullptr) held += say(" (", s.lost, ")");
        const std::string dtype = py::str(dtype_of(s.dtype));
        return py::object(py::str(say("Saved(x ", shape_text(s.shape()), " ", dtype, ", ", held, ", ", bytes(s), " bytes)")));
    });
}

PyObject* itself(PyObject* o, PyObject*) { return Py_NewRef(o); }

PyObject* refuse_pickle(PyObject*, PyObject*) {
    PyErr_SetString(PyExc_TypeError, "a Saved is not pickled; pickle x and the layer, and call the forward again");
    return nullptr;
}

PyMethodDef methods[] = {{"__copy__", &itself, METH_NOARGS, nullptr},
                         {"__deepcopy__", &itself, METH_O, nullptr},
                         {"__reduce__", &refuse_pickle, METH_NOARGS, nullptr},
                         {"__reduce_ex__", &refuse_pickle, METH_O, nullptr},
                         {}};

PyMemberDef members[] = {{"_owner", T_OBJECT, offsetof(SavedHead, owner), 0, nullptr},
                         {"_serial", T_LONGLONG, offsetof(SavedHead, serial), 0, nullptr},
                         {"_shares", T_BOOL, offsetof(SavedHead, shares), READONLY, nullptr},
                         {"__dictoffset__", T_PYSSIZET, offsetof(SavedHead, dict), READONLY, nullptr},
                         {"__weaklistoffset__", T_PYSSIZET, offsetof(SavedHead, weakrefs), READONLY, nullptr},
                         {}};

constexpr const char* kDoc =
    "What batch_norm_train leaves for batch_norm_backward.\n\n"
    "Statistics, options, copies of gamma, beta and positions, and, unless keep is None, a reference to x or y. It does not change, "
    "except\n"
    "that an out= of backward may take the tensor's place. Reading it is safe from any thread. copy and deepcopy return it itself; it\n"
    "cannot be pickled.";

}  // namespace

PyObject* make_saved_type() {
    static PyGetSetDef attributes[std::size(kAttributes) + 2] = {
        {"__dict__", &PyObject_GenericGetDict, &PyObject_GenericSetDict, nullptr, nullptr}};
    for (std::size_t i = 0; i < std::size(kAttributes); ++i) {
        const Attribute& a = kAttributes[i];
        attributes[i + 1] = {a.name, &get, nullptr, a.doc, const_cast<Get*>(&a.get)};
    }
    const auto slot = [](int id, auto* f) { return PyType_Slot{id, reinterpret_cast<void*>(f)}; };
    PyType_Slot slots[] = {slot(Py_tp_dealloc, &dealloc),
                           slot(Py_tp_traverse, &traverse),
                           slot(Py_tp_clear, &clear),
                           slot(Py_tp_repr, &repr),
                           {Py_tp_methods, methods},
                           {Py_tp_members, members},
                           {Py_tp_getset, attributes},
                           {Py_tp_doc, const_cast<char*>(kDoc)},
                           {0, nullptr}};
    PyType_Spec spec{"batchnorm.Saved", static_cast<int>(sizeof(SavedObject)), static_cast<int>(sizeof(std::int64_t)),
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    saved_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    if (saved_type == nullptr) throw py::error_already_set();
    return reinterpret_cast<PyObject*>(saved_type);
}

}  // namespace batchnorm::bind
