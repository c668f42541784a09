// Kernel `grad_apply`: dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0 per channel, g being dy behind the activation; with fixed
// statistics dx = g * k_dy.
#pragma once

#include "grad_sums.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::GradApplyArgs;

template <class PerChannel>
struct GradCoefficients {
    PerChannel center, scale, offset, k_dy, x_scale, k_x, k_0;
};

template <bool with_relu, bool fixed, bool with_stream, class T, class PerChannel>
BATCHNORM_INLINE void grad_apply_run(const T* dy, const T* x, T* dx, int64_t n, const GradCoefficients<PerChannel>& k) {
    const auto value = [&](Block<T> g, Block<T> v, int64_t e) {
        g = through_activation<with_relu>(g, v, k.center, k.scale, k.offset, e);
        if constexpr (fixed) {
            return g * k.k_dy.at(e);
        } else {
            return (g * k.k_dy.at(e) + ((v - k.center.at(e)) * k.x_scale.at(e)) * k.k_x.at(e)) + k.k_0.at(e);
        }
    };
    constexpr bool read_x = with_relu || !fixed;
    const auto x_at = [&](int64_t e) { return read_x ? load(x + e) : Block<T>{}; };
    const auto x_part = [&](int64_t e, int64_t m) { return read_x ? load_part(x + e, m) : Block<T>{}; };
    const int64_t head = with_stream ? elements_to_alignment(dx) : 0;
    if (with_stream && head >= 0) {
        for_blocks(
            head, n, [&](int64_t e) { Memory<Block<T>, T>::store_stream(dx + e, value(load(dy + e), x_at(e), e)); },
            [&](int64_t e, int64_t m) { store_part(dx + e, m, value(load_part(dy + e, m), x_part(e, m), e)); });
    } else {
        for_blocks(
            0, n, [&](int64_t e) { store(dx + e, value(load(dy + e), x_at(e), e)); },
            [&](int64_t e, int64_t m) { store_part(dx + e, m, value(load_part(dy + e, m), x_part(e, m), e)); });
    }
}

template <bool with_relu, bool fixed, bool with_stream, class T>
BATCHNORM_INLINE void grad_apply_ncs_as(const GradApplyArgs& a) {
    const Box& b = a.where.box;
    const Runs<const T> dy(a.dy, b), x(a.x, b);
    const Runs<T> dx(a.dx, b);
    const int64_t channels = b.channel_end - b.channel_begin, run = b.inner_end - b.inner_begin;
    using PerChannel = Broadcast<Compute<T>>;
    for (int64_t n = b.outer_begin; n < b.outer_end; ++n) {
        for (int64_t c = 0; c < channels; ++c) {
            const GradCoefficients<PerChannel> k{PerChannel(a.affine.center, c), PerChannel(a.affine.scale, c), PerChannel(a.affine.offset, c),
                                                 PerChannel(a.k_dy, c), PerChannel(a.x_scale, c), PerChannel(a.k_x, c), PerChannel(a.k_0, c)};
            grad_apply_run<with_relu, fixed, with_stream>(dy.at(n, c), x.at(n, c), dx.at(n, c), run, k);
        }
    }
    if (with_stream) stream_fence();
}

template <bool with_relu, bool fixed, bool with_stream, class T>
BATCHNORM_INLINE void grad_apply_nsc_as(const GradApplyArgs& a) {
    const Box& b = a.where.box;
    const Rows<const T> dy(a.dy, a.where), x(a.x, a.where);
    const Rows<T> dx(a.dx, a.where);
    const int64_t channels = b.channel_end - b.channel_begin;
    using PerChannel = PerElement<Compute<T>>;
    const GradCoefficients<PerChannel> k{PerChannel(a.affine.center), PerChannel(a.affine.scale), PerChannel(a.affine.offset),
                                         PerChannel(a.k_dy), PerChannel(a.x_scale), PerChannel(a.k_x), PerChannel(a.k_0)};
    const int64_t fold = a.where.fold > 1 && dy.dense(channels) && x.dense(channels) && dx.dense(channels) ? a.where.fold : 1;
    for (int64_t r = b.outer_begin; r < b.outer_end; r += fold) {
        const int64_t n_rows = b.outer_end - r < fold ? b.outer_end - r : fold;
        grad_apply_run<with_relu, fixed, with_stream>(dy.at(r), x.at(r), dx.at(r), n_rows * channels, k);
    }
    if (with_stream) stream_fence();
}

// Runs `as` with the three flags as constants.
template <class As>
BATCHNORM_INLINE void grad_apply_flags(const GradApplyArgs& a, As as) {
    with_flag(a.relu, [&](auto relu) {
        with_flag(a.fixed, [&](auto fixed) { with_flag(a.stream, [&](auto stream) { as(relu, fixed, stream); }); });
    });
}

template <class T>
void grad_apply_ncs(const GradApplyArgs& a) noexcept {
    grad_apply_flags(a, [&](auto relu, auto fixed, auto stream) {
        grad_apply_ncs_as<decltype(relu)::value, decltype(fixed)::value, decltype(stream)::value, T>(a);
    });
}

template <class T>
void grad_apply_nsc(const GradApplyArgs& a) noexcept {
    grad_apply_flags(a, [&](auto relu, auto fixed, auto stream) {
        grad_apply_nsc_as<decltype(relu)::value, decltype(fixed)::value, decltype(stream)::value, T>(a);
    });
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
