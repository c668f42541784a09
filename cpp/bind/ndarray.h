// NumPy arrays as the core's views, without copying: what does not fit is refused (false or nullopt), and Python's _args.py then either
// explains why or makes the copy. Called by module.cpp; knows no operation.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <span>
#include <type_traits>

#include "batchnorm/batchnorm.hpp"

namespace batchnorm::bind {

namespace py = pybind11;

// NumPy's limit on dimensions.
inline constexpr int kMaxDims = 64;

// The most tensors of one operation: dy, x, residual, dx and dresidual.
inline constexpr std::size_t kMaxTogether = 5;

// The type number NumPy gave ml_dtypes.bfloat16 in this process; -1 until Python has seen such an array.
inline std::atomic<int> bfloat16_type_num{-1};

// An ndarray that can be used as it is: native byte order, aligned, a storage type.
struct Array {
    void* data;
    int ndim;
    const py::ssize_t *shape, *strides;  // strides in bytes
    Dtype dtype;
    bool writable;

    std::int64_t element_size() const { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : dtype == Dtype::uint8 ? 1 : 2; }
};

// Integers are taken where they are asked for.
enum class Kinds { floating, any };

inline std::optional<Array> as_array(py::handle h, Kinds kinds = Kinds::floating) {
    namespace d = py::detail;
    if (reinterpret_cast<PyObject*>(Py_TYPE(h.ptr())) != reinterpret_cast<PyObject*>(d::npy_api::get().PyArray_Type_)) return std::nullopt;
    const auto* const a = d::array_proxy(h.ptr());
    if ((a->flags & d::npy_api::NPY_ARRAY_ALIGNED_) == 0) return std::nullopt;
    const auto* const descr = d::array_descriptor_proxy(a->descr);
    if (descr->byteorder != '=' && descr->byteorder != '|') return std::nullopt;
    Array r{a->data, a->nd, a->dimensions, a->strides, Dtype::float32, (a->flags & d::npy_api::NPY_ARRAY_WRITEABLE_) != 0};
    switch (descr->type_num) {
        case d::npy_api::NPY_FLOAT_:
            break;
        case d::npy_api::NPY_DOUBLE_:
            r.dtype = Dtype::float64;
            break;
        case 23:  // NPY_HALF
            r.dtype = Dtype::float16;
            break;
        case d::npy_api::NPY_UBYTE_:
            r.dtype = Dtype::uint8;
            break;
        case d::npy_api::NPY_SHORT_:
            r.dtype = Dtype::int16;
            break;
        case d::npy_api::NPY_USHORT_:
            r.dtype = Dtype::uint16;
            break;
        default:
            if (descr->type_num != bfloat16_type_num) return std::nullopt;
            r.dtype = Dtype::bfloat16;
    }
    if (is_integer(r.dtype) && kinds == Kinds::floating) return std::nullopt;
    for (int i = 0; i < r.ndim; ++i) {
        if (r.strides[i] % r.element_size() != 0) return std::nullopt;
    }
    return r;
}

// One value per channel.
template <bool writable>
bool as_channels(py::handle h, AnyChannels<writable>& out) {
    if (h.is_none()) {
        out = {};
        return true;
    }
    const std::optional<Array> a = as_array(h);
    if (!a || a->ndim != 1 || (a->dtype != Dtype::float32 && a->dtype != Dtype::float64) || (writable && !a->writable)) return false;
    out = {a->data, a->dtype == Dtype::float64, a->shape[0], a->strides[0] / a->element_size()};
    return true;
}

// A mask: contiguous bytes. None is an empty one.
template <class Byte>
bool as_mask(py::handle h, std::span<Byte>& out) {
    namespace d = py::detail;
    out = {};
    if (h.is_none()) return true;
    if (reinterpret_cast<PyObject*>(Py_TYPE(h.ptr())) != reinterpret_cast<PyObject*>(d::npy_api::get().PyArray_Type_)) return false;
    const auto* const a = d::array_proxy(h.ptr());
    if (d::array_descriptor_proxy(a->descr)->type_num != d::npy_api::NPY_UBYTE_ || a->nd != 1 || a->strides[0] != 1) return false;
    if (!std::is_const_v<Byte> && (a->flags & d::npy_api::NPY_ARRAY_WRITEABLE_) == 0) return false;
    out = {reinterpret_cast<Byte*>(a->data), static_cast<std::size_t>(a->dimensions[0])};
    return a->dimensions[0] > 0;
}

// Which positions count: a tuple of contiguous bytes and of contiguous doubles, each or both None.
inline bool as_positions(py::handle h, Positions& out) {
    if (h.is_none()) return true;
    if (!PyTuple_CheckExact(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) != 2) return false;
    const py::handle mask = PyTuple_GET_ITEM(h.ptr(), 0), weights = PyTuple_GET_ITEM(h.ptr(), 1);
    ConstChannels w;
    if (!as_mask(mask, out.mask) || !as_channels(weights, w)) return false;
    if (!w) return true;
    out.weights = {static_cast<const double*>(w.data), static_cast<std::size_t>(w.size)};
    return w.is_double && w.stride == 1 && w.size > 0;
}

// An image x and its result y are of different types, and if x has rows, y may have runs in their place.
enum class Views { alike, image };

// The common view of arrays of one shape, the channel axis being `axis`. In the order of the first array's memory, the axes before the
// channels are `outer` and those behind them `inner`; each must be one axis in every array (rows, if there is no inner, may take two:
// a crop of whole rows). So an array's view, and with it the order of its sums, follows from shape and memory order, not from the
// gaps between its elements. Takes up to kMaxTogether arrays. Fails if the arrays differ in shape or type or do not have such a view. An
// array may be given twice.
inline bool as_views(std::span<const Array* const> arrays, std::int64_t axis, std::span<Tensor> views, Views kind = Views::alike) {
    const std::size_t n = arrays.size();
    const Array& first = *arrays[0];
    const int ndim = first.ndim;
    if (ndim < 2 || ndim > kMaxDims || axis < -ndim || axis >= ndim) return false;
    const int channel_axis = static_cast<int>(axis < 0 ? axis + ndim : axis);
    for (const Array* a : arrays) {
        if (a->ndim != ndim || (a->dtype != first.dtype && kind == Views::alike)) return false;
        if (!std::equal(a->shape, a->shape + ndim, first.shape)) return false;
    }
    const std::int64_t channels = first.shape[channel_axis];
    const auto stride = [&](std::size_t j, int i) { return arrays[j]->strides[i] / arrays[j]->element_size(); };  // in elements

    std::int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= i == channel_axis ? 1 : first.shape[i];
    const auto fill = [&](std::size_t j, std::int64_t outer, std::int64_t inner, std::int64_t outer_stride, std::int64_t channel_stride,
                          std::int64_t inner_stride) {
        Tensor& v = views[j];
        v.data = arrays[j]->data;
        v.dtype = arrays[j]->dtype;
        v.outer = outer;
        v.channels = channels;
        v.inner = inner;
        v.outer_stride = outer_stride;
        v.channel_stride = channel_stride;
        v.inner_stride = inner_stride;
    };
    if (count == 0 || channels == 0) {
        for (std::size_t j = 0; j < n; ++j) fill(j, 0, 1, 0, 1, 1);
        return true;
    }

    // Axes on one side of the channels, merged where every array allows it; strides in elements.
    struct Group {
        std::int64_t size;
        std::array<std::int64_t, kMaxTogether> stride;
    };
    struct Side {
        Group groups[kMaxDims];
        int n_groups = 0;
    } outer, inner;

    const auto step = [&](int i) { return std::abs(first.strides[i]); };
    int axes[kMaxDims];
    int n_axes = 0;
    for (int i = 0; i < ndim; ++i) {
        if (first.shape[i] == 1) continue;
        if (first.strides[i] == 0) return false;  // one element many times: its place in the order is anybody's guess
        if (i != channel_axis) axes[n_axes++] = i;
    }
    std::stable_sort(axes, axes + n_axes, [&](int a, int b) { return step(a) > step(b); });
    // The stride of a single channel says nothing; then inner is what lies behind its axis both by index and in memory.
    int n_outer = n_axes;
    while (n_outer > 0 && (channels == 1 ? axes[n_outer - 1] > channel_axis : step(axes[n_outer - 1]) < step(channel_axis))) --n_outer;
    for (int k = 0; k < n_axes; ++k) {
        const int i = axes[k];
        Side& side = k < n_outer ? outer : inner;
        bool merge = side.n_groups > 0;
        for (std::size_t j = 0; merge && j < n; ++j) {
            merge = side.groups[side.n_groups - 1].stride[j] == stride(j, i) * first.shape[i];
        }
        Group& g = merge ? side.groups[side.n_groups - 1] : side.groups[side.n_groups++];
        g.size = (merge ? g.size : 1) * first.shape[i];
        for (std::size_t j = 0; j < n; ++j) g.stride[j] = stride(j, i);
    }

    const bool ncs = inner.n_groups > 0;
    const Group one{1, {}};
    if (kind == Views::image && !ncs && channels > 1 && stride(1, channel_axis) != 1 && outer.n_groups > 0 && outer.n_groups <= 2) {
        const Group &slow = outer.n_groups == 2 ? outer.groups[0] : one, &fast = outer.groups[outer.n_groups - 1];
        if (stride(0, channel_axis) != 1 || fast.stride[1] != 1) return false;
        for (std::size_t j = 0; j < n; ++j) fill(j, slow.size, fast.size, slow.stride[j], stride(j, channel_axis), fast.stride[j]);
        return true;
    }
    // With one channel, two groups of rows could as well be runs: such a view has no direction of its own.
    if (ncs ? inner.n_groups > 1 || outer.n_groups > 1 : outer.n_groups > (channels == 1 ? 1 : 2)) return false;
    for (std::size_t j = 0; j < n; ++j) {
        const std::int64_t c = channels == 1 ? 1 : stride(j, channel_axis);
        if (ncs ? inner.groups[0].stride[j] != 1 : n_axes > 0 && c != 1) return false;
        const Group &slow = outer.n_groups > 0 ? outer.groups[0] : one, &fast = ncs ? inner.groups[0] : outer.groups[1];
        const bool has_fast = ncs || outer.n_groups == 2;
        fill(j, slow.size, has_fast ? fast.size : 1, slow.stride[j], c, has_fast ? fast.stride[j] : 1);
    }
    return true;
}

}  // namespace batchnorm::bind
