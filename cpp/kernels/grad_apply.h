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
BATCHNORM_INLINE void grad_apply_run(const T* dy, const T* x, T* dx, int64_t n, int64_t period, const GradCoefficients<PerChannel>& c) {
    const auto value = [&](Block<T> g, Block<T> v, int64_t k) {
        g = through_activation<with_relu>(g, v, c.center, c.scale, c.offset, k);
        if constexpr (fixed) {
            return g * c.k_dy.at(k);
        } else {
            return (g * c.k_dy.at(k) + ((v - c.center.at(k)) * c.x_scale.at(k)) * c.k_x.at(k)) + c.k_0.at(k);
        }
    };
    constexpr bool read_x = with_relu || !fixed;
    const auto x_at = [&](int64_t e) { return read_x ? load(x + e) : Block<T>{}; };
    const auto part = [&](int64_t e, int64_t k, int64_t m) {
        store_part(dx + e, m, value(load_part(dy + e, m), read_x ? load_part(x + e, m) : Block<T>{}, k));
    };
    const int64_t head = with_stream ? elements_to_alignment(dx) : 0;
    if (with_stream && head >= 0) {
        for_blocks(head, n, period, [&](int64_t e, int64_t k) { store_stream(dx + e, value(load(dy + e), x_at(e), k)); }, part);
    } else {
        for_blocks(0, n, period, [&](int64_t e, int64_t k) { store(dx + e, value(load(dy + e), x_at(e), k)); }, part);
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
            const GradCoefficients<PerChannel> k{PerChannel(a.affine.center, c),
                                                 PerChannel(a.affine.scale, c),
                                                 PerChannel(a.affine.offset, c),
                                                 PerChannel(a.k_dy, c),
                                                 PerChannel(a.x_scale, c),
                                                 PerChannel(a.k_x, c),
                                                 PerChannel(a.k_0, c)};
            grad_apply_run<with_relu, fixed, with_stream>(dy.at(n, c), x.at(n, c), dx.at(n, c), run, kNoPeriod, k);
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
    const GradCoefficients<PerChannel> k{
        PerChannel(a.affine.center), PerChannel(a.affine.scale), PerChannel(a.affine.offset), PerChannel(a.k_dy), PerChannel(a.x_scale),
        PerChannel(a.k_x),           PerChannel(a.k_0)};
    if (dy.dense(channels) && x.dense(channels) && dx.dense(channels)) {
        const int64_t r = b.outer_begin, n = (b.outer_end - r) * channels;
        grad_apply_run<with_relu, fixed, with_stream>(dy.at(r), x.at(r), dx.at(r), n, a.where.fold * channels, k);
    } else {
        for (int64_t r = b.outer_begin; r < b.outer_end; ++r) {
            grad_apply_run<with_relu, fixed, with_stream>(dy.at(r), x.at(r), dx.at(r), channels, kNoPeriod, k);
        }
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
