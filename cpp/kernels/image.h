// Kernel `image`: y = (x - center) * scale + offset of integers, in double. y in the direction of x, or its runs made of x's rows: pixels
// whose channels lie side by side become one plane per channel.
#pragma once

#include "walk.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::ImageArgs;

// n < 16 values. Out of line, as copies of it in every loop would be half of the kernels' size.
__attribute__((noinline)) void put_tail(void* y, kernels::Dtype dtype, int64_t n, F64 v) {
    switch (dtype) {
        case kernels::float32:
            return store_part((float*)y, n, narrow(v));
        case kernels::float64:
            return store_part((double*)y, n, v);
        case kernels::float16:
            return store_part((Float16*)y, n, narrow(v));
        default:
            return store_part((Bfloat16*)y, n, narrow(v));
    }
}

// A stretch of y. Its storage type is known at run time alone: that costs a branch per block, four copies of each loop would cost more.
struct ImageOutput {
    void* y;
    kernels::Dtype dtype;
    bool stream;

    BATCHNORM_INLINE void put(int64_t e, F64 v) const {
        switch (dtype) {
            case kernels::float32:
                return stream ? store_stream((float*)y + e, narrow(v)) : store((float*)y + e, narrow(v));
            case kernels::float64:
                return store((double*)y + e, v);
            case kernels::float16:
                return store((Float16*)y + e, narrow(v));
            default:
                return store((Bfloat16*)y + e, narrow(v));
        }
    }
    BATCHNORM_INLINE void put_part(int64_t e, int64_t n, F64 v) const { put_tail((char*)y + e * size(), dtype, n, v); }
    BATCHNORM_INLINE int64_t size() const { return dtype == kernels::float64 ? 8 : dtype == kernels::float32 ? 4 : 2; }
    // Elements up to the first whole cache line, where stores are worth starting on one.
    BATCHNORM_INLINE int64_t head(int64_t n) const {
        return dtype == kernels::float32 && (stream || n >= kWorthAligning) ? elements_to_alignment((float*)y) : -1;
    }
};

BATCHNORM_INLINE ImageOutput image_output(const ImageArgs& a, int64_t element) {
    ImageOutput y{a.y.data, a.y_dtype, a.stream && a.y_dtype == kernels::float32};
    y.y = (char*)y.y + element * y.size();
    return y;
}

template <class T, class PerChannel>
BATCHNORM_INLINE void image_run(const T* x, ImageOutput y, int64_t n, int64_t period, PerChannel center, PerChannel scale,
                                PerChannel offset, int64_t ahead) {
    const auto value = [=](F64 v, int64_t k) { return (v - center.at(k)) * scale.at(k) + offset.at(k); };
    const int64_t head = y.head(n);
    y.stream = y.stream && head >= 0;
    for_blocks(
        head, n, period,
        [=](int64_t e, int64_t k) {
            prefetch_ahead(x + e, ahead);
            y.put(e, value(load_double(x + e), k));
        },
        [=](int64_t e, int64_t k, int64_t m) { y.put_part(e, m, value(to_double(load_part(x + e, m)), k)); });
}

template <class T>
void image_ncs(const ImageArgs& a) noexcept {
    const Box& b = a.where.box;
    const Runs<const T> x(a.x, b);
    using PerChannel = Broadcast<double>;
    for (int64_t n = b.outer_begin; n < b.outer_end; ++n) {
        for (int64_t c = b.channel_begin; c < b.channel_end; ++c) {
            const int64_t k = c - b.channel_begin;
            image_run(x.at(n, k), image_output(a, n * a.y.outer_stride + c * a.y.channel_stride + b.inner_begin),
                      b.inner_end - b.inner_begin, kNoPeriod, PerChannel(a.affine.center, k), PerChannel(a.affine.scale, k),
                      PerChannel(a.affine.offset, k), a.where.ahead);
        }
    }
    if (a.stream) stream_fence();
}

template <class T>
BATCHNORM_INLINE void image_rows(const ImageArgs& a) {
    const Box& b = a.where.box;
    const int64_t channels = b.channel_end - b.channel_begin, split = a.where.row_split;
    const Rows<const T> x(a.x, a.where);
    using PerChannel = PerElement<double>;
    const auto rows = [&](int64_t r, int64_t n, int64_t period) {
        const int64_t first = r / split * a.y.outer_stride + r % split * a.y.inner_stride + b.channel_begin;
        image_run(x.at(r), image_output(a, first), n, period, PerChannel(a.affine.center), PerChannel(a.affine.scale),
                  PerChannel(a.affine.offset), a.where.ahead);
    };
    if (x.dense(channels) && a.y.outer_stride == channels) {
        return rows(b.outer_begin, (b.outer_end - b.outer_begin) * channels, a.where.fold * channels);
    }
    for (int64_t r = b.outer_begin; r < b.outer_end; ++r) rows(r, channels, kNoPeriod);
}

// n pixels without gaps, all C channels of each, to C planes.
template <int C, class T>
BATCHNORM_INLINE void image_pixels(const ImageArgs& a, const T* x, int64_t y, int64_t n) {
    const double *const center = (const double*)a.affine.center, *const scale = (const double*)a.affine.scale,
                        *const offset = (const double*)a.affine.offset;
    const auto value = [=](I32 v, int c) {
        const auto one = [c](const double* values) { return Ops<F64>::broadcast(values[c]); };
        return (widen(v) - one(center)) * one(scale) + one(offset);
    };
    ImageOutput out[C];
    int64_t head = -1;
    bool together = true;  // all planes reach whole cache lines at once
    for (int c = 0; c < C; ++c) {
        out[c] = image_output(a, y + c * a.y.channel_stride);
        const int64_t own = out[c].head(n);
        together = together && (c == 0 || own == head);
        head = own;
    }
    if (!together) head = -1;
    const int64_t ahead = a.where.ahead;
    for (int c = 0; c < C; ++c) out[c].stream = out[c].stream && head >= 0;
    for_blocks(
        head, n, kNoPeriod,
        [=](int64_t e, int64_t) {
            I32 v[C];
            prefetch_ahead(x + C * e, ahead);
            load_pixels<C>(x + C * e, v);
            for (int c = 0; c < C; ++c) out[c].put(e, value(v[c], c));
        },
        [=](int64_t e, int64_t, int64_t m) {
            T pixels[C * kLanes] = {};
            I32 v[C];
            memcpy(pixels, x + C * e, (size_t)(C * m) * sizeof(T));
            load_pixels<C>(pixels, v);
            for (int c = 0; c < C; ++c) out[c].put_part(e, m, value(v[c], c));
        });
}

// n rows, `step` elements apart, of one channel. Gathered in stretches, as a block could not be loaded while its values are being stored.
template <class T>
BATCHNORM_INLINE void image_column(const ImageArgs& a, const T* x, int64_t step, int64_t y, int64_t n, int64_t channel) {
    constexpr int64_t kStretch = 1024;
    T values[kStretch];
    using PerChannel = Broadcast<double>;
    for (int64_t first = 0; first < n; first += kStretch) {
        const int64_t m = n - first < kStretch ? n - first : kStretch;
        for (int64_t i = 0; i < m; ++i) values[i] = x[(first + i) * step];
        image_run(values, image_output(a, y + first), m, kNoPeriod, PerChannel(a.affine.center, channel),
                  PerChannel(a.affine.scale, channel), PerChannel(a.affine.offset, channel), 0);
    }
}

template <class T>
BATCHNORM_INLINE void image_to_runs(const ImageArgs& a) {
    const Box& b = a.where.box;
    const int64_t channels = b.channel_end - b.channel_begin, split = a.where.row_split;
    const Rows<const T> x(a.x, a.where);
    for (int64_t r = b.outer_begin, n; r < b.outer_end; r += n) {
        const int64_t left_in_run = split - r % split;
        n = b.outer_end - r < left_in_run ? b.outer_end - r : left_in_run;
        const int64_t y = r / split * a.y.outer_stride + r % split + b.channel_begin * a.y.channel_stride;
        const bool dense = a.x.inner_stride == channels;
        if (dense && channels == 3) {
            image_pixels<3>(a, x.at(r), y, n);
        } else if (dense && channels == 4) {
            image_pixels<4>(a, x.at(r), y, n);
        } else {
            for (int64_t c = 0; c < channels; ++c) image_column(a, x.at(r) + c, a.x.inner_stride, y + c * a.y.channel_stride, n, c);
        }
    }
}

template <class T>
void image_nsc(const ImageArgs& a) noexcept {
    a.to_runs ? image_to_runs<T>(a) : image_rows<T>(a);
    if (a.stream) stream_fence();
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
