// What the kernels of one call know of it: sizes, which values count, arrays of values per channel. Plain structs that are copied to the
// GPU with each launch.
#pragma once

#include "core/call.h"
#include "core/plan.h"
#include "kernels/host_device.h"

namespace batchnorm::cuda {

// Sizes, and what belongs together. A cell is rows of outer with numbers of their own: a group, or a part. Elements are numbered in the
// order of memory: (outer, channels, inner), or (outer, inner, channels) where channels are side by side.
struct Shape {
    kernels::Direction direction;
    int64_t outer, channels, inner;
    Parts parts;
    int64_t group_outer;

    explicit Shape(const Call& call)
        : direction(call.geometry.direction),
          outer(call.geometry.outer),
          channels(call.geometry.channels),
          inner(call.geometry.inner),
          parts(call.parts),
          group_outer(call.group_outer) {}
    BATCHNORM_HOST_DEVICE bool runs() const { return direction == kernels::ncs; }
    BATCHNORM_HOST_DEVICE int64_t positions() const { return outer * inner; }
    BATCHNORM_HOST_DEVICE int64_t elements() const { return positions() * channels; }
    BATCHNORM_HOST_DEVICE int64_t number(int64_t o, int64_t c, int64_t i) const {
        return runs() ? (o * channels + c) * inner + i : (o * inner + i) * channels + c;
    }
    BATCHNORM_HOST_DEVICE int64_t part_of(int64_t o) const {
        const int64_t part = parts.count == 1 ? 0 : o / parts.rows;
        return part < parts.count ? part : parts.count - 1;
    }
    BATCHNORM_HOST_DEVICE int64_t cells() const { return group_outer == 0 ? parts.count : outer / group_outer; }
    BATCHNORM_HOST_DEVICE int64_t cell_of(int64_t o) const { return group_outer == 0 ? part_of(o) : o / group_outer; }
    BATCHNORM_HOST_DEVICE int64_t part_of_cell(int64_t cell) const { return group_outer == 0 ? cell : part_of(cell * group_outer); }
    // Of a part, which are many where it has groups.
    BATCHNORM_HOST_DEVICE int64_t first_cell(int64_t part) const { return group_outer == 0 ? part : parts.begin(part) / group_outer; }
    BATCHNORM_HOST_DEVICE int64_t cells_of(int64_t part) const { return group_outer == 0 ? 1 : parts.size(part) / group_outer; }
};

// Values per channel of the caller's, in rows or one for all; absent ones are `otherwise`.
struct PerChannel {
    void* data;
    int64_t stride, row_stride;
    bool is_double;
    double otherwise;

    template <bool writable>
    explicit PerChannel(const AnyRows<writable>& v, double absent = 0)
        : data(v ? const_cast<void*>(static_cast<const void*>(v.values.data)) : nullptr),
          stride(v.values.stride),
          row_stride(v.rows == 0 ? 0 : v.row_stride),
          is_double(v.values.is_double),
          otherwise(absent) {}
    template <bool writable>
    explicit PerChannel(const AnyChannels<writable>& v, double absent = 0) : PerChannel(AnyRows<writable>(v), absent) {}
    BATCHNORM_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
    BATCHNORM_HOST_DEVICE double at(int64_t row, int64_t c) const {
        if (data == nullptr) return otherwise;
        const int64_t i = row * row_stride + c * stride;
        return is_double ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
    }
    BATCHNORM_HOST_DEVICE void put(int64_t row, int64_t c, double value) const {
        const int64_t i = row * row_stride + c * stride;
        if (is_double) {
            static_cast<double*>(data)[i] = value;
        } else {
            static_cast<float*>(data)[i] = static_cast<float>(value);
        }
    }
};

// Which values count and how often, as batchnorm.hpp's Positions say; and n of each part and channel.
struct Counted {
    const std::uint8_t* mask;  // a value for mask_each positions
    int64_t mask_each;
    const double* weights;
    int64_t weights_each;
    const std::uint8_t* bits;  // one for each element, by its number
    const double* scale;       // a power of two that brings the largest weight to about 1
    // parts * channels: n, and how many count whatever their weights; null: all count once.
    const double *count, *values;

    BATCHNORM_HOST_DEVICE bool every() const { return mask == nullptr && weights == nullptr && bits == nullptr; }
    BATCHNORM_HOST_DEVICE bool kept(int64_t position) const { return mask == nullptr || mask[position / mask_each] != 0; }
    BATCHNORM_HOST_DEVICE bool kept(int64_t position, int64_t element) const {
        return kept(position) && (bits == nullptr || (bits[element >> 3] >> (element & 7) & 1) != 0);
    }
    // Of a position, whichever of its elements count.
    BATCHNORM_HOST_DEVICE double weight(int64_t position) const {
        if (weights == nullptr) return kept(position) ? 1 : 0;
        const double w = weights[position / weights_each] * *scale;
        return kept(position) && std::isfinite(w) ? w : 0;
    }
    BATCHNORM_HOST_DEVICE double scaled() const { return weights == nullptr ? 1 : *scale; }
    BATCHNORM_HOST_DEVICE double n(const Shape& s, int64_t part, int64_t c) const {
        return count == nullptr ? static_cast<double>(s.parts.size(part) * s.inner) : count[part * s.channels + c];
    }
    BATCHNORM_HOST_DEVICE double n_values(const Shape& s, int64_t part, int64_t c) const {
        return values == nullptr ? static_cast<double>(s.parts.size(part) * s.inner) : values[part * s.channels + c];
    }
};

// An element's place.
struct Place {
    int64_t outer, channel, inner;
};

// A tensor in the GPU's memory; T is its storage.
template <class T>
struct Array {
    T* data;
    int64_t outer_stride, channel_stride, inner_stride;

    explicit Array(const ConstTensor& v)
        : data(static_cast<T*>(const_cast<void*>(v ? v.data : nullptr))),
          outer_stride(v.outer_stride),
          channel_stride(v.channel_stride),
          inner_stride(v.inner_stride) {}
    BATCHNORM_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
    BATCHNORM_HOST_DEVICE T* at(const Place& p) const {
        return data + (p.outer * outer_stride + p.channel * channel_stride + p.inner * inner_stride);
    }
    // Whether elements follow one another without a gap, in the order of their numbers.
    bool dense(const Shape& s) const {
        const auto is = [](int64_t n, int64_t stride, int64_t wanted) { return n == 1 || stride == wanted; };
        if (s.runs()) {
            return is(s.inner, inner_stride, 1) && is(s.channels, channel_stride, s.inner) &&
                   is(s.outer, outer_stride, s.channels * s.inner);
        }
        return is(s.channels, channel_stride, 1) && is(s.inner, inner_stride, s.channels) &&
               is(s.outer, outer_stride, s.channels * s.inner);
    }
};

}  // namespace batchnorm::cuda
