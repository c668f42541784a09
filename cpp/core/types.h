// Internal vocabulary between check, plan and the drivers: what the tensors of a call have in common, and how kernels address them.
#pragma once

#include <cstdint>

#include "batchnorm/batchnorm.hpp"
#include "kernels/host_device.h"
#include "kernels/kernels.h"

namespace batchnorm {

using std::int64_t;

static_assert(static_cast<int>(Dtype::float32) == kernels::float32 && static_cast<int>(Dtype::float64) == kernels::float64 &&
              static_cast<int>(Dtype::float16) == kernels::float16 && static_cast<int>(Dtype::bfloat16) == kernels::bfloat16 &&
              static_cast<int>(Dtype::uint8) == kernels::uint8 && static_cast<int>(Dtype::int16) == kernels::int16 &&
              static_cast<int>(Dtype::uint16) == kernels::uint16);

static_assert(static_cast<int>(Activation::leaky_relu) - 1 == static_cast<int>(kernels::CurveKind::leaky_relu) &&
              static_cast<int>(Activation::silu) - 1 == static_cast<int>(kernels::CurveKind::silu));

inline kernels::Dtype to_kernel(Dtype t) { return static_cast<kernels::Dtype>(t); }

inline int64_t element_size(Dtype t) { return t == Dtype::float64 ? 8 : t == Dtype::float32 ? 4 : t == Dtype::uint8 ? 1 : 2; }

inline std::size_t index(int64_t i) { return static_cast<std::size_t>(i); }

// What the tensors of one call have in common. outer and inner are as in the views; a plan flattens them to rows for nsc.
struct Geometry {
    kernels::Direction direction = kernels::ncs;
    int64_t outer = 0, channels = 0, inner = 0;
    Dtype dtype = Dtype::float32;

    int64_t count() const { return outer * inner; }  // values per channel
    int64_t elements() const { return count() * channels; }
    Geometry rows(int64_t n) const {  // n rows of outer
        Geometry g = *this;
        g.outer = n;
        return g;
    }
};

// Stretches of outer that are a batch of their own. All have `rows` rows but the last one, which has what is left.
struct Parts {
    int64_t outer = 0, rows = 0, count = 1;

    BATCHNORM_HOST_DEVICE int64_t begin(int64_t p) const { return p * rows; }
    BATCHNORM_HOST_DEVICE int64_t size(int64_t p) const { return p + 1 == count ? outer - begin(p) : rows; }
};

// One bit per element as the kernels address it, part by part. Threads share no byte: runs (ncs), rows (nsc) and parts start at whole
// bytes, unless rows are folded, and then 16 bits or a multiple belong together.
class BitLayout {
public:
    BitLayout(const Geometry& g, const Parts& parts) : parts_(parts) {
        const auto whole_bytes = [](int64_t n) { return (n + 7) / 8 * 8; };
        if (g.direction == kernels::ncs) {
            channel_stride_ = whole_bytes(g.inner);
            outer_stride_ = g.channels * channel_stride_;
            per_outer_ = outer_stride_;
        } else {
            outer_stride_ = g.channels < kernels::kFoldBelow ? g.channels : whole_bytes(g.channels);
            per_outer_ = outer_stride_ * g.inner;
        }
    }
    int64_t bytes() const { return begin(parts_.count - 1) + part_bytes(parts_.size(parts_.count - 1)) + kernels::kMaskSlack; }
    int64_t begin(int64_t p) const { return p * part_bytes(parts_.rows); }
    int64_t outer_stride() const { return outer_stride_; }
    int64_t channel_stride() const { return channel_stride_; }
    kernels::Mask mask(std::uint8_t* bits, int64_t p) const {
        if (bits == nullptr) return {};
        return {bits + begin(p), outer_stride_, channel_stride_};
    }

private:
    int64_t part_bytes(int64_t rows) const { return (rows * per_outer_ + 7) / 8; }

    Parts parts_;
    int64_t outer_stride_ = 0, channel_stride_ = 1, per_outer_ = 0;  // per_outer_: bits of one index of outer, all of its rows
};

// A checked view as the kernels address it, from row `outer` of it on. For nsc with inner > 1, a row's address is outer_stride and
// inner_stride apart.
inline kernels::Operand to_operand(const ConstTensor& v, int64_t outer = 0) {
    if (!v) return {};
    auto* const data = static_cast<const std::byte*>(v.data) + outer * v.outer_stride * element_size(v.dtype);
    return {const_cast<std::byte*>(data), v.outer_stride, v.channel_stride, v.inner_stride};
}

template <bool writable>
double at(const AnyChannels<writable>& v, int64_t c) {
    return v.is_double ? static_cast<const double*>(v.data)[c * v.stride] : static_cast<const float*>(v.data)[c * v.stride];
}
inline void set(const Channels& v, int64_t c, double value) {
    if (v.is_double) {
        static_cast<double*>(v.data)[c * v.stride] = value;
    } else {
        static_cast<float*>(v.data)[c * v.stride] = static_cast<float>(value);
    }
}

// Row r of rows per sample, or the one row there is.
template <bool writable>
AnyChannels<writable> row_of(const AnyRows<writable>& v, int64_t r) {
    AnyChannels<writable> row = v.values;
    if (!v || v.rows == 0) return row;
    using Byte = std::conditional_t<writable, std::byte, const std::byte>;
    row.data = static_cast<Byte*>(row.data) + r * v.row_stride * (row.is_double ? 8 : 4);
    return row;
}

// Lets a driver be written once and run with C = float or double, the type the elementwise kernels compute in.
template <class F>
void with_compute(Dtype dtype, F f) {
    if (dtype == Dtype::float64) {
        f.template operator()<double>();
    } else {
        f.template operator()<float>();
    }
}

}  // namespace batchnorm
