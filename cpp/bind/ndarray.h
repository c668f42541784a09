// NumPy arrays as the core's views, without copying: what an ndarray is, and how several of one shape are seen as (outer, channels, inner)
// at once. What does not fit is refused (false or nullopt); arguments.cpp then makes a copy or says why. Knows no operation.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <optional>
#include <span>

#include "batchnorm/batchnorm.hpp"

namespace batchnorm::bind {

namespace py = pybind11;

// NumPy's limit on dimensions.
inline constexpr int kMaxDims = 64;

// The most tensors of one operation: double backward reads five and writes three.
inline constexpr std::size_t kMaxTogether = 8;

// The type number NumPy gave ml_dtypes.bfloat16 in this process; -1 until such an array has been seen.
inline std::atomic<int> bfloat16_type_num{-1};

inline std::int64_t element_size(Dtype t) { return t == Dtype::float64 ? 8 : t == Dtype::float32 ? 4 : t == Dtype::uint8 ? 1 : 2; }

// An ndarray of a storage type in native byte order.
struct Array {
    PyObject* object;  // borrowed
    void* data;
    int ndim;
    const py::ssize_t *shape, *strides;  // strides in bytes
    Dtype dtype;
    bool writable, contiguous;
    bool direct;  // aligned, and strides are whole elements: has a view
    bool loose;   // a mask: it follows the others, with any strides

    std::int64_t element_size() const { return bind::element_size(dtype); }
    std::int64_t size() const {
        std::int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= shape[i];
        return n;
    }
};

// Integers are taken where they are asked for.
enum class Kinds { floating, any };

inline bool is_ndarray(PyObject* o) { return PyObject_TypeCheck(o, py::detail::npy_api::get().PyArray_Type_) != 0; }

// Subclasses that only add behaviour (memmap, matrix) are arrays; a masked array would lose its mask.
inline bool is_masked(PyObject* o) {
    if (Py_TYPE(o) == py::detail::npy_api::get().PyArray_Type_) return false;
    const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("numpy.ma").ptr()));
    return module && is_ndarray(o) && py::isinstance(o, module.attr("MaskedArray"));
}

inline std::optional<Dtype> storage_type(int type_num) {
    using N = py::detail::npy_api;
    switch (type_num) {
        case N::NPY_FLOAT_:
            return Dtype::float32;
        case N::NPY_DOUBLE_:
            return Dtype::float64;
        case 23:  // NPY_HALF
            return Dtype::float16;
        case N::NPY_UBYTE_:
            return Dtype::uint8;
        case N::NPY_SHORT_:
            return Dtype::int16;
        case N::NPY_USHORT_:
            return Dtype::uint16;
        default:
            if (type_num >= 0 && type_num == bfloat16_type_num.load(std::memory_order_relaxed)) return Dtype::bfloat16;
            return std::nullopt;
    }
}

inline int type_num(PyObject* array) { return py::detail::array_descriptor_proxy(py::detail::array_proxy(array)->descr)->type_num; }

// The type number of elements of a storage type.
inline int type_num(Dtype t) {
    using N = py::detail::npy_api;
    constexpr int kNumbers[] = {N::NPY_FLOAT_, N::NPY_DOUBLE_, 23, -1, N::NPY_UBYTE_, N::NPY_SHORT_, N::NPY_USHORT_};
    return t == Dtype::bfloat16 ? bfloat16_type_num.load() : kNumbers[static_cast<int>(t)];
}

inline bool is_native(PyObject* array) {
    const char order = py::detail::array_descriptor_proxy(py::detail::array_proxy(array)->descr)->byteorder;
    // NumPy says '=' of its own dtypes; others may name the order that it is.
    return order == '=' || order == '|' || order == (std::endian::native == std::endian::little ? '<' : '>');
}

// What all ndarrays have; `dtype` and `direct` are left to the caller.
inline Array shape_of(PyObject* o) {
    using N = py::detail::npy_api;
    const auto* const a = py::detail::array_proxy(o);
    const auto has = [&](int flag) { return (a->flags & flag) != 0; };
    return {o,
            a->data,
            a->nd,
            a->dimensions,
            a->strides,
            Dtype::float32,
            has(N::NPY_ARRAY_WRITEABLE_),
            has(N::NPY_ARRAY_C_CONTIGUOUS_),
            has(N::NPY_ARRAY_ALIGNED_),
            false};
}

inline std::optional<Array> as_array(PyObject* o, Kinds kinds = Kinds::floating) {
    if (Py_TYPE(o) != py::detail::npy_api::get().PyArray_Type_ && (!is_ndarray(o) || is_masked(o))) return std::nullopt;
    const std::optional<Dtype> dtype = storage_type(type_num(o));
    if (!dtype || (kinds == Kinds::floating && is_integer(*dtype)) || !is_native(o)) return std::nullopt;
    Array r = shape_of(o);
    r.dtype = *dtype;
    if (r.contiguous) return r;
    for (int i = 0; i < r.ndim; ++i) r.direct &= r.strides[i] % r.element_size() == 0;
    return r;
}

inline bool same_shape(const Array& a, const Array& b) { return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape); }

// The channel axes of an array, counted from 0, in increasing order; taken together they are one.
struct ChannelAxes {
    int n = 0;
    bool tuple = false;  // the caller gave a tuple
    std::array<std::int8_t, kMaxDims> axes;

    int first() const { return axes[0]; }
    int last() const { return axes[n - 1]; }
    bool hold(int axis) const { return std::find(axes.begin(), axes.begin() + n, axis) != axes.begin() + n; }
};

// How the axes of an array lie in memory: those besides the channels that have more than one index, slowest first; the first `outer` of
// them lie before the channels.
struct Layout {
    int n = 0, outer = 0;
    std::array<std::int8_t, kMaxDims> axes;
    bool single_row = false;  // one position, its channels side by side

    void add(int axis) { axes[n++] = static_cast<std::int8_t>(axis); }
    // Whether an array that lies like this can be read as one that lay like `before`.
    bool like(const Layout& before) const {
        return n == before.n && outer == before.outer && std::equal(axes.begin(), axes.begin() + n, before.axes.begin()) &&
               (single_row || !before.single_row);
    }
    // Whether the samples, axis 0, are the slowest of the axes before the channels.
    bool samples_first(const Array& x) const { return x.shape[0] <= 1 || (outer > 0 && axes[0] == 0); }
};

// Where the view of an array goes.
struct Place {
    ConstTensor* read;
    Tensor* written;
};

// An image x and its result y are of different types, and if x has rows, y may have runs in their place.
enum class Views { alike, image };

// Arrays of one shape and their common view. In the order of the first array's memory, the axes before the channels are `outer` and those
// behind them `inner`; each must be one axis in every array (rows, if there is no inner, may take two: a crop of whole rows), and so must
// the channel axes. So an array's view, and with it the order of its sums, follows from shape and memory order, not from the gaps between
// its elements. An array may be there twice.
class CommonView {
public:
    CommonView(std::span<const Array* const> arrays, std::span<const Place> places, const ChannelAxes& where)
        : arrays_(arrays), places_(places), where_(where), x_(*arrays[0]) {}

    // False if the arrays do not have such a view.
    bool find(Layout& layout, Views kind = Views::alike) {
        layout.n = layout.outer = 0;
        result_ = kind == Views::image && arrays_.size() > 1 ? 1 : 0;
        channels_ = count_ = 1;
        for (int i = 0; i < x_.ndim; ++i) (where_.hold(i) ? channels_ : count_) *= x_.shape[i];
        if (count_ == 0 || channels_ == 0) {
            for (std::size_t j = 0; j < arrays_.size(); ++j) fill(j, 0, 1, 0, 1, 1);
            return true;
        }
        const bool adjacent = where_.last() - where_.first() == where_.n - 1;
        if (adjacent && std::all_of(arrays_.begin(), arrays_.end(), [](const Array* a) { return a->contiguous; })) {
            contiguous(layout);
            return true;
        }
        return channel_strides() && sort_axes(layout) && group_axes(layout) && (to_runs() ? runs() : alike(layout));
    }

private:
    // Axes on one side of the channels, merged where every array allows it; strides in elements.
    struct Group {
        std::int64_t size;
        std::array<std::int64_t, kMaxTogether> stride;
    };
    struct Side {
        std::array<Group, 3> groups;  // more than two are too many
        std::size_t n = 0;
    };
    static constexpr Group kOne{1, {}};

    std::int64_t stride(std::size_t j, int i) const { return arrays_[j]->strides[i] / arrays_[j]->element_size(); }

    void fill(std::size_t j, std::int64_t outer, std::int64_t inner, std::int64_t outer_stride, std::int64_t channel_stride,
              std::int64_t inner_stride) {
        const auto set = [&](auto& view) {
            view.data = arrays_[j]->data;
            view.dtype = arrays_[j]->dtype;
            view.outer = outer;
            view.channels = channels_;
            view.inner = inner;
            view.outer_stride = outer_stride;
            view.channel_stride = channel_stride;
            view.inner_stride = inner_stride;
        };
        if (places_[j].read != nullptr) set(*places_[j].read);
        if (places_[j].written != nullptr) set(*places_[j].written);
    }

    // What the general case comes to where all arrays are C-contiguous and the channel axes lie behind each other.
    void contiguous(Layout& layout) {
        std::int64_t inner = 1;
        for (int i = 0; i < x_.ndim; ++i) {
            if (i == where_.first()) layout.outer = layout.n;
            if (x_.shape[i] == 1 || where_.hold(i)) continue;
            layout.add(i);
            if (i > where_.last()) inner *= x_.shape[i];
        }
        layout.single_row = layout.n == 0;
        for (std::size_t j = 0; j < arrays_.size(); ++j) fill(j, count_ / inner, inner, channels_ * inner, inner, 1);
    }

    // The stride of the channel axes taken together, of each array; in increasing order of their index they must lie behind each other.
    bool channel_strides() {
        for (std::size_t j = 0; j < arrays_.size(); ++j) {
            channel_stride_[j] = 1;
            std::int64_t size = 0;  // of the faster channel axes; 0 before the first
            for (int k = where_.n - 1; k >= 0; --k) {
                const int i = where_.axes[k];
                if (x_.shape[i] == 1) continue;
                if (size == 0) channel_stride_[j] = stride(j, i);
                if (size != 0 && stride(j, i) != channel_stride_[j] * size) return false;
                size = std::max<std::int64_t>(size, 1) * x_.shape[i];
            }
        }
        return true;
    }

    // x's axes in the order of its memory.
    bool sort_axes(Layout& layout) {
        for (int i = 0; i < x_.ndim; ++i) {
            if (x_.shape[i] == 1) continue;
            if (x_.strides[i] == 0) return false;  // one element many times: its place in the order is anybody's guess
            if (!where_.hold(i)) layout.add(i);
        }
        const auto step = [&](int i) { return std::abs(stride(0, i)); };
        std::stable_sort(layout.axes.begin(), layout.axes.begin() + layout.n, [&](int a, int b) { return step(a) > step(b); });
        // The stride of a single channel says nothing; then inner is what lies behind its axis both by index and in memory.
        const auto behind = [&](int i) { return channels_ == 1 ? i > where_.last() : step(i) < std::abs(channel_stride_[0]); };
        layout.outer = layout.n;
        while (layout.outer > 0 && behind(layout.axes[layout.outer - 1])) --layout.outer;
        return true;
    }

    bool group_axes(const Layout& layout) {
        for (int k = 0; k < layout.n; ++k) {
            const int i = layout.axes[k];
            Side& side = k < layout.outer ? outer_ : inner_;
            bool merge = side.n > 0;
            for (std::size_t j = 0; merge && j < arrays_.size(); ++j) {
                merge = side.groups[side.n - 1].stride[j] == stride(j, i) * x_.shape[i];
            }
            if (!merge && side.n == side.groups.size() - 1) return false;
            if (!merge) side.groups[side.n++].size = 1;
            Group& g = side.groups[side.n - 1];
            g.size *= x_.shape[i];
            for (std::size_t j = 0; j < arrays_.size(); ++j) g.stride[j] = stride(j, i);
        }
        return true;
    }

    bool alike(Layout& layout) {
        // A single position is a row of channels, unless x has them apart.
        layout.single_row = layout.n == 0 && channel_stride_[0] == 1;
        const bool ncs = inner_.n > 0, rows = outer_.n > 0 ? !ncs : layout.single_row;
        // With one channel, two groups of rows could as well be runs: such a view has no direction of its own.
        if (ncs ? inner_.n > 1 || outer_.n > 1 : outer_.n > (channels_ == 1 ? 1 : 2)) return false;
        const Group& slow = outer_.n > 0 ? outer_.groups[0] : kOne;
        const Group* const fast = ncs ? &inner_.groups[0] : outer_.n == 2 ? &outer_.groups[1] : nullptr;
        for (std::size_t j = 0; j < arrays_.size(); ++j) {
            const std::int64_t c = channels_ == 1 ? 1 : channel_stride_[j];
            const bool row = rows || (layout.n == 0 && j > result_ && channel_stride_[result_] == 1);  // as x or an image's result is one
            if (!arrays_[j]->loose && ((ncs && fast->stride[j] != 1) || (row && c != 1))) return false;
            fill(j, slow.size, fast != nullptr ? fast->size : 1, slow.stride[j], c, fast != nullptr ? fast->stride[j] : 1);
        }
        return true;
    }

    // Whether an image is to become planes: x has rows, and its result, the second array, has runs of pixels in their place.
    bool to_runs() const { return result_ == 1 && inner_.n == 0 && outer_.n > 0 && channels_ > 1 && channel_stride_[1] != 1; }

    bool runs() {
        if (channel_stride_[0] != 1) return false;
        const Group &slow = outer_.n == 2 ? outer_.groups[0] : kOne, &fast = outer_.groups[outer_.n - 1];
        for (std::size_t j = 0; j < arrays_.size(); ++j) {
            if (j > 0 && !arrays_[j]->loose && fast.stride[j] != 1) return false;
            fill(j, slow.size, fast.size, slow.stride[j], channel_stride_[j], fast.stride[j]);
        }
        return true;
    }

    std::span<const Array* const> arrays_;
    std::span<const Place> places_;
    const ChannelAxes& where_;
    const Array& x_;
    std::size_t result_ = 0;  // of an image, if it is there; else x
    std::int64_t channels_ = 1, count_ = 1;
    std::array<std::int64_t, kMaxTogether> channel_stride_;
    Side outer_, inner_;
};

}  // namespace batchnorm::bind
