// Kernel `apply`: y = (x - center) * scale + offset per channel, optionally max(y, 0), in one pass.
#pragma once

#include "walk.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::ApplyArgs;

// The one expression that makes y of x. The backward kernels use it to tell where the activation was on: same bits, same answer.
template <class V>
BATCHNORM_INLINE V affine(V x, V center, V scale, V offset) {
    return (x - center) * scale + offset;
}

template <bool with_relu, bool with_stream, class T, class PerChannel>
BATCHNORM_INLINE void apply_run(const T* x, T* y, int64_t n, int64_t period, PerChannel center, PerChannel scale, PerChannel offset) {
    const auto value = [&](Block<T> v, int64_t k) {
        v = affine(v, center.at(k), scale.at(k), offset.at(k));
        return with_relu ? relu(v) : v;
    };
    const auto part = [&](int64_t e, int64_t k, int64_t m) { store_part(y + e, m, value(load_part(x + e, m), k)); };
    const int64_t head = with_stream ? elements_to_alignment(y) : 0;
    if (with_stream && head >= 0) {
        for_blocks(head, n, period, [&](int64_t e, int64_t k) { store_stream(y + e, value(load(x + e), k)); }, part);
    } else {
        for_blocks(0, n, period, [&](int64_t e, int64_t k) { store(y + e, value(load(x + e), k)); }, part);
    }
}

template <bool with_relu, bool with_stream, class T>
BATCHNORM_INLINE void apply_ncs_as(const ApplyArgs& a) {
    const Box& b = a.where.box;
    const Runs<const T> x(a.x, b);
    const Runs<T> y(a.y, b);
    const int64_t channels = b.channel_end - b.channel_begin, run = b.inner_end - b.inner_begin;
    using PerChannel = Broadcast<Compute<T>>;
    for (int64_t n = b.outer_begin; n < b.outer_end; ++n) {
        for (int64_t c = 0; c < channels; ++c) {
            apply_run<with_relu, with_stream>(x.at(n, c), y.at(n, c), run, kNoPeriod, PerChannel(a.affine.center, c),
                                              PerChannel(a.affine.scale, c), PerChannel(a.affine.offset, c));
        }
    }
}

template <bool with_relu, bool with_stream, class T>
BATCHNORM_INLINE void apply_nsc_as(const ApplyArgs& a) {
    const Box& b = a.where.box;
    const Rows<const T> x(a.x, a.where);
    const Rows<T> y(a.y, a.where);
    const int64_t channels = b.channel_end - b.channel_begin;
    using PerChannel = PerElement<Compute<T>>;
    const PerChannel center(a.affine.center), scale(a.affine.scale), offset(a.affine.offset);
    if (x.dense(channels) && y.dense(channels)) {
        // All rows are one stretch of memory, whatever their length.
        const int64_t n = (b.outer_end - b.outer_begin) * channels;
        return apply_run<with_relu, with_stream>(x.at(b.outer_begin), y.at(b.outer_begin), n, a.where.fold * channels, center, scale,
                                                 offset);
    }
    for (int64_t r = b.outer_begin; r < b.outer_end; ++r) {
        apply_run<with_relu, with_stream>(x.at(r), y.at(r), channels, kNoPeriod, center, scale, offset);
    }
}

template <bool with_relu, bool with_stream, class T>
BATCHNORM_INLINE void apply_as(const ApplyArgs& a, kernels::Direction direction) {
    direction == kernels::ncs ? apply_ncs_as<with_relu, with_stream, T>(a) : apply_nsc_as<with_relu, with_stream, T>(a);
    if (with_stream) stream_fence();
}

template <class T>
void apply_ncs(const ApplyArgs& a) noexcept {
    with_flag(a.relu, [&](auto relu) {
        with_flag(a.stream, [&](auto stream) { apply_as<decltype(relu)::value, decltype(stream)::value, T>(a, kernels::ncs); });
    });
}

template <class T>
void apply_nsc(const ApplyArgs& a) noexcept {
    with_flag(a.relu, [&](auto relu) {
        with_flag(a.stream, [&](auto stream) { apply_as<decltype(relu)::value, decltype(stream)::value, T>(a, kernels::nsc); });
    });
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
