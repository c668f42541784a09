#include "bind/positions.h"

#include <cmath>
#include <cstring>

namespace batchnorm::bind {
namespace {

using N = py::detail::npy_api;

// Calls f with the address offsets of all indices over some axes, slowest first; the last axis as a run of n elements, `step` apart.
template <class F>
void walk(std::span<const std::int8_t> axes, const py::ssize_t* shape, const py::ssize_t* steps, py::ssize_t offset, F&& f) {
    if (axes.empty()) return f(offset, py::ssize_t{1}, py::ssize_t{0});
    const auto axis = static_cast<std::size_t>(axes[0]);
    if (axes.size() == 1) return f(offset, shape[axis], steps[axis]);
    for (py::ssize_t i = 0; i < shape[axis]; ++i) walk(axes.subspan(1), shape, steps, offset + i * steps[axis], f);
}

std::int64_t product(std::span<const std::int8_t> axes, const py::ssize_t* shape) {
    std::int64_t n = 1;
    for (const int axis : axes) n *= shape[axis];
    return n;
}

}  // namespace

template <class T>
T* PositionArguments::Buffer<T>::of(std::int64_t n) {
    if (n <= static_cast<std::int64_t>(small.size())) return small.data();
    large = std::make_unique_for_overwrite<T[]>(static_cast<std::size_t>(n));
    return large.get();
}

PositionArguments::PositionArguments(const Arguments& a, const Subject& s) : subject_(s) {
    mask_.array.object = weights_.array.object = nullptr;
    if (a.has(Name::mask)) {
        if (a.has(Name::lengths)) value_error("mask", "mask and lengths are both given, which say the same thing: drop one of them");
        set_mask(a[Name::mask]);
    }
    if (a.has(Name::lengths)) {
        set_lengths(a[Name::lengths], a[Name::lengths_axis]);
    } else if (a.has(Name::lengths_axis)) {
        value_error("lengths_axis", "lengths_axis is given without lengths: give lengths, or drop lengths_axis");
    }
    if (a.has(Name::weights)) set_weights(a[Name::weights]);
}

// ---- shapes

void PositionArguments::spread(Spread& to, const Array& given, const char* name) {
    const Array& x = subject_.x;
    const ChannelAxes& where = subject_.where;
    const bool full = given.ndim == x.ndim, rest = given.ndim == x.ndim - where.n;
    const bool samples = !rest && given.ndim == 1 && !where.hold(0);
    if (!full && !rest && !samples) explain_shape(given, name);
    to.array = given;
    to.by_channel = false;
    int from = 0;  // the next axis of what is given
    for (int i = 0; i < x.ndim; ++i) {
        py::ssize_t& step = to.steps[i];
        step = 0;
        if (!full && (where.hold(i) || (samples && i > 0))) continue;
        const py::ssize_t size = given.shape[from];
        if (size != 1 && size != x.shape[i]) explain_shape(given, name);
        if (size != 1) step = given.strides[from];
        to.by_channel |= size != 1 && where.hold(i);
        ++from;
    }
}

void PositionArguments::explain_shape(const Array& given, const char* name) const {
    const Array& x = subject_.x;
    const ChannelAxes& where = subject_.where;
    std::vector<py::ssize_t> rest;
    for (int i = 0; i < x.ndim; ++i) {
        if (!where.hold(i)) rest.push_back(x.shape[i]);
    }
    const bool by_position = std::string_view(name) == "weights";  // in every channel
    std::vector<py::ssize_t> full(x.shape, x.shape + x.ndim);
    for (int i = 0; i < x.ndim; ++i) {
        if (by_position && where.hold(i)) full[static_cast<std::size_t>(i)] = 1;
    }
    std::string expected = shape_text(rest) + " or " + shape_text(full);
    if (rest.size() > 1 && !where.hold(0)) expected.insert(0, shape_text({x.shape, 1}) + ", ");
    // What fits x's last axes, or one of its axes alone, as NumPy would broadcast it.
    std::string hint;
    std::vector<py::ssize_t> wide(static_cast<std::size_t>(x.ndim), 1);
    if (given.ndim > 0 && given.ndim < x.ndim) {
        for (int shift = x.ndim - given.ndim; shift >= 0 && hint.empty(); --shift) {
            bool fits = true;
            for (int i = 0; i < given.ndim; ++i) fits &= given.shape[i] == 1 || given.shape[i] == full[static_cast<std::size_t>(shift + i)];
            if (!fits) continue;
            std::copy(given.shape, given.shape + given.ndim, wide.begin() + shift);
            hint = say("; for axes from ", shift, " on use ", name, ".reshape", shape_text(wide));
        }
    }
    value_error(name, say(name, " has shape ", shape_text(given), ", expected ", expected, ", with 1 for any axis, to match x ",
                          shape_text(x), " (channel ", subject_.axes(), ")", hint));
}

// ---- mask and weights

void PositionArguments::set_mask(PyObject* value) {
    constexpr const char* kExpected = "a bool array over the positions of x, True where they count";
    refuse_others(value, "mask", kExpected);
    if (type_num(value) != N::NPY_BOOL_) {
        type_error("mask", say("mask has dtype ", dtype_text(value), ", expected ", kExpected, "; use mask.astype(bool)"));
    }
    Array a = shape_of(value);
    a.dtype = Dtype::uint8;
    spread(mask_, a, "mask");
}

void PositionArguments::set_weights(PyObject* value) {
    constexpr const char* kExpected = "a float or int array over the positions of x, or one weight per sample";
    refuse_others(value, "weights", kExpected);
    std::optional<Array> a = as_array(value, Kinds::any);
    if (!a || !a->direct || (a->dtype != Dtype::float64 && a->dtype != Dtype::float32)) {
        const std::string kind = py::str(py::handle(value).attr("dtype").attr("kind"));
        const bool plain = kind == "i" || kind == "u" || (kind == "f" && type_num(value) != N::NPY_LONGDOUBLE_);
        const std::string dtype = py::str(py::handle(value).attr("dtype").attr("name"));
        if (!plain && dtype != "bfloat16") {
            type_error("weights", say("weights has dtype ", dtype_text(value), ", expected ", kExpected,
                                      kind == "b"   ? "; a bool array is a mask="
                                      : kind == "f" ? "; use weights.astype(numpy.float64)"
                                                    : ""));
        }
        if constexpr (kGpu) {
            const Array given = shape_of(value);
            const auto n = static_cast<std::size_t>(given.ndim);
            owned_.push_back(packed(value, {given.shape, n}, {given.strides, n}, vector_dtype(true)));
        } else {
            owned_.push_back(py::handle(value).attr("astype")(py::handle(vector_dtype(true))));
        }
        a = as_array(owned_.back().ptr());
    }
    spread(weights_, *a, "weights");
    if (weights_.by_channel) {
        value_error("weights", say("weights has shape ", shape_text(*a), ", expected 1 for channel ", subject_.axes(),
                                   ": a weight is that of a position in every channel"));
    }
}

// ---- lengths

int PositionArguments::steps_axis(PyObject* axis) const {
    const Array& x = subject_.x;
    if (subject_.where.hold(0)) {
        value_error("lengths", "lengths is given with the channels on axis 0, where the samples are expected; use mask");
    }
    if (axis == Py_None) {
        std::vector<int> others;
        for (int i = 1; i < x.ndim; ++i) {
            if (!subject_.where.hold(i)) others.push_back(i);
        }
        if (others.size() == 1) return others[0];
        value_error("lengths_axis", say("lengths_axis is None, expected the axis along which lengths count, as x has shape ", shape_text(x),
                                        "; it follows where a single axis is neither that of the samples nor a channel axis"));
    }
    const std::int64_t n = integer(axis, "lengths_axis", "an int, the axis along which lengths count");
    if (n < -x.ndim || n >= x.ndim) {
        value_error("lengths_axis",
                    say("lengths_axis is ", n, ", expected -", x.ndim, " <= lengths_axis < ", x.ndim, " for x of shape ", shape_text(x)));
    }
    const int result = static_cast<int>(n < 0 ? n + x.ndim : n);
    if (result == 0 || subject_.where.hold(result)) {
        value_error("lengths_axis",
                    say("lengths_axis is ", n, ", the axis of the ", result == 0 ? "samples" : "channels", ", expected another one"));
    }
    return result;
}

void PositionArguments::set_lengths(PyObject* value, PyObject* axis) {
    const Array& x = subject_.x;
    const int steps = steps_axis(axis);
    const std::string expected = say("an int array of shape ", shape_text({x.shape, 1}), ", the number of steps of each sample");
    refuse_others(value, "lengths", expected);
    const int type = type_num(value);
    if (type < N::NPY_BYTE_ || type > N::NPY_ULONGLONG_) {
        type_error("lengths", say("lengths has dtype ", dtype_text(value), ", expected ", expected));
    }
    Array a = shape_of(value);
    if (a.ndim != 1 || a.shape[0] != x.shape[0]) value_error("lengths", say("lengths has shape ", shape_text(a), ", expected ", expected));
    if constexpr (kGpu) {
        if (is_shadow(value)) return set_steps(value, steps);
    }
    if (type != N::NPY_INT64_ || !is_native(value) || !a.direct) {
        owned_.push_back(py::handle(value).attr("astype")(py::dtype("=i8")));
        a = shape_of(owned_.back().ptr());
    }
    std::int64_t* const lengths = lengths_.of(x.shape[0]);
    for (py::ssize_t i = 0; i < x.shape[0]; ++i) {
        std::memcpy(&lengths[i], static_cast<const char*>(a.data) + i * a.strides[0], sizeof lengths[i]);
        if (lengths[i] >= 0 && lengths[i] <= x.shape[steps]) continue;
        const std::string got = py::str(py::handle(value)[py::int_(i)]);
        value_error("lengths", say("lengths is ", got, " at sample ", i, ", expected 0 to ", x.shape[steps], ", the length of axis ", steps,
                                   " of x ", shape_text(x)));
    }
    if constexpr (kGpu) return set_steps(value, steps);
    steps_axis_ = steps;
}

// The same as a mask of the GPU.
void PositionArguments::set_steps(PyObject* lengths, int axis) {
    if constexpr (kGpu) {
        owned_.push_back(steps_on_gpu(lengths, subject_.x.shape[axis]));
        mask_.array = shape_of(owned_.back().ptr());
        mask_.steps.fill(0);
        if (subject_.x.shape[0] != 1) mask_.steps[0] = mask_.array.strides[0];
        if (subject_.x.shape[axis] != 1) mask_.steps[axis] = mask_.array.strides[1];
        mask_.by_channel = false;
    }
}

bool PositionArguments::find_counting(py::ssize_t* index) const {
    constexpr int kMostSteps = 4096;
    const py::ssize_t* const shape = subject_.x.shape;
    const int ndim = subject_.x.ndim;
    for (int steps = 0; steps < kMostSteps; ++steps) {
        if (steps_axis_ >= 0) {
            const std::int64_t length = lengths_.data()[index[0]];
            if (length > 0) return index[steps_axis_] %= length, true;
            if (++index[0] == shape[0]) index[0] = 0;
        } else {
            const auto* value = static_cast<const char*>(mask_.array.data);
            for (int i = 0; i < ndim; ++i) value += index[i] * mask_.steps[i];
            if (*value != 0) return true;
            for (int i = ndim - 1; i >= 0 && ++index[i] == shape[i]; --i) index[i] = 0;
        }
    }
    return false;
}

// ---- as the core takes them

void PositionArguments::add_to(Tensors& tensors, Positions& to) const {
    if (!mask_ || !mask_.by_channel) return;
    Array elements = mask_.array;
    elements.ndim = subject_.x.ndim;
    elements.shape = subject_.x.shape;
    elements.strides = mask_.steps.data();
    elements.contiguous &= same_shape(mask_.array, subject_.x);
    elements.loose = true;
    tensors.mask(elements, to.element_mask);
}

template <class Varies>
std::span<const std::int8_t> PositionArguments::leading(const Layout& layout, Varies varies) const {
    int n = layout.n;
    while (n > 0 && !varies(layout.axes[n - 1])) --n;
    return {layout.axes.data(), static_cast<std::size_t>(n)};
}

template <class T, class From>
std::span<const T> PositionArguments::flat(const Spread& values, const Layout& layout, Buffer<T>& buffer) {
    const py::ssize_t* const shape = subject_.x.shape;
    const auto axes = leading(layout, [&](int axis) { return values.steps[axis] != 0; });
    const std::int64_t n = product(axes, shape);
    bool as_it_is = std::is_same_v<T, From>;
    py::ssize_t step = sizeof(From);
    for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
        as_it_is &= values.steps[*axis] == step;
        step *= shape[*axis];
    }
    const auto* const data = static_cast<const char*>(values.array.data);
    if (as_it_is) return {reinterpret_cast<const T*>(data), static_cast<std::size_t>(n)};
    if constexpr (kGpu) {
        std::vector<py::ssize_t> sizes, steps;
        for (const int axis : axes) sizes.push_back(shape[axis]), steps.push_back(values.steps[axis]);
        owned_.push_back(packed(values.array.object, sizes, steps, std::is_same_v<T, From> ? nullptr : vector_dtype(true)));
        return {static_cast<const T*>(shape_of(owned_.back().ptr()).data), static_cast<std::size_t>(n)};
    }
    T* const first = buffer.of(n);
    T* to = first;
    walk(axes, shape, values.steps.data(), 0, [&](py::ssize_t offset, py::ssize_t run, py::ssize_t each) {
        for (py::ssize_t i = 0; i < run; ++i) *to++ = static_cast<T>(*reinterpret_cast<const From*>(data + offset + i * each));
    });
    return {first, static_cast<std::size_t>(n)};
}

std::span<const std::uint8_t> PositionArguments::flat_lengths(const Layout& layout) {
    const py::ssize_t* const shape = subject_.x.shape;
    const auto axes = leading(layout, [&](int axis) { return axis == 0 || axis == steps_axis_; });
    const std::int64_t n = product(axes, shape), n_steps = shape[steps_axis_];
    const std::int64_t* const lengths = lengths_.data();
    std::array<py::ssize_t, kMaxDims> both{};  // sample and step as one number, sample * n_steps + step
    both[0] = n_steps;
    both[steps_axis_] = 1;
    std::uint8_t* const first = bytes_.of(n);
    std::uint8_t* to = first;
    const bool by_steps = !axes.empty() && axes.back() == steps_axis_, by_samples = !axes.empty() && axes.back() == 0;
    walk(axes, shape, both.data(), 0, [&](py::ssize_t offset, py::ssize_t run, py::ssize_t) {
        const py::ssize_t sample = offset / n_steps, step = offset % n_steps;
        for (py::ssize_t i = 0; i < run; ++i) *to++ = step + (by_steps ? i : 0) < lengths[sample + (by_samples ? i : 0)];
    });
    return {first, static_cast<std::size_t>(n)};
}

std::string PositionArguments::weights_index(std::int64_t i) const {
    const Array& x = subject_.x;
    const auto axes = leading(layout_, [&](int axis) { return weights_.steps[axis] != 0; });
    std::array<py::ssize_t, kMaxDims> of_x{};
    for (auto axis = axes.rbegin(); axis != axes.rend(); i /= x.shape[*axis], ++axis) of_x[*axis] = i % x.shape[*axis];
    std::vector<py::ssize_t> index;
    for (int axis = 0; axis < x.ndim; ++axis) {
        if (weights_.array.ndim < x.ndim && subject_.where.hold(axis)) continue;
        index.push_back(weights_.steps[axis] == 0 ? 0 : of_x[axis]);
    }
    index.resize(static_cast<std::size_t>(weights_.array.ndim));  // of the samples alone
    return shape_text(index);
}

void PositionArguments::flatten(const Layout& layout, Positions& to) {
    if (subject_.x.size() == 0) {
        to = {};
        return;
    }
    if (mask_ && !mask_.by_channel) to.mask = flat<std::uint8_t, std::uint8_t>(mask_, layout, bytes_);
    if (steps_axis_ >= 0) to.mask = flat_lengths(layout);
    if (!weights_) return;
    layout_ = layout;
    to.weights = weights_.array.dtype == Dtype::float64 ? flat<double, double>(weights_, layout, doubles_)
                                                        : flat<double, float>(weights_, layout, doubles_);
}

}  // namespace batchnorm::bind
