// Kernel `grad_apply`: dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0 per channel, g being dy behind the gate; with fixed
// statistics dx = g * k_dy. dz = g, the residual's gradient, on the way.
#pragma once

#include "grad_sums.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::GradApplyArgs;

template <class PerChannel>
struct GradCoefficients {
    PerChannel center, scale, offset, k_dy, x_scale, k_x, k_0;
};

template <class T>
struct GradPointers {
    const T *dy, *x;
    T *dx, *dz;  // dz may be null
    const uint8_t* mask;
    int64_t first_bit;
};

template <Gate gate, bool fixed, bool with_dz, bool with_stream, class T, class PerChannel>
BATCHNORM_INLINE void grad_apply_run(const GradPointers<T>& p, int64_t n, int64_t period, const GradCoefficients<PerChannel>& c) {
    const auto through = [&](Block<T> g, Block<T> v, int64_t e, int64_t k) {
        return through_gate<gate>(g, v, c.center, c.scale, c.offset, k, p.mask, p.first_bit + e);
    };
    const auto value = [&](Block<T> g, Block<T> v, int64_t k) {
        if constexpr (fixed) {
            return g * c.k_dy.at(k);
        } else {
            return (g * c.k_dy.at(k) + ((v - c.center.at(k)) * c.x_scale.at(k)) * c.k_x.at(k)) + c.k_0.at(k);
        }
    };
    constexpr bool read_x = gate == kernels::relu || !fixed;
    const auto whole = [&](int64_t e, int64_t k, auto put, auto put_dz) {
        prefetch_ahead(p.dy + e);
        if constexpr (read_x) prefetch_ahead(p.x + e);
        const Block<T> v = read_x ? load(p.x + e) : Block<T>{};
        const Block<T> g = through(load(p.dy + e), v, e, k);
        if constexpr (with_dz) put_dz(p.dz + e, g);
        put(p.dx + e, value(g, v, k));
    };
    const auto part = [&](int64_t e, int64_t k, int64_t m) {
        const Block<T> v = read_x ? load_part(p.x + e, m) : Block<T>{};
        const Block<T> g = through(load_part(p.dy + e, m), v, e, k);
        if constexpr (with_dz) store_part(p.dz + e, m, g);
        store_part(p.dx + e, m, value(g, v, k));
    };
    const int64_t head = with_stream || n >= kWorthAligning ? elements_to_alignment(p.dx) : -1;
    const bool stream_dz = with_stream && with_dz && elements_to_alignment(p.dz) == head;  // both start on a line together
    const auto put = [](T* to, Block<T> v) { store(to, v); };
    const auto put_dx = [](T* to, Block<T> v) { with_stream ? store_stream(to, v) : store(to, v); };
    const auto put_dz = [stream_dz](T* to, Block<T> v) { stream_dz ? store_stream(to, v) : store(to, v); };
    if (head >= 0) {
        for_blocks(head, n, period, [&](int64_t e, int64_t k) { whole(e, k, put_dx, put_dz); }, part);
    } else {
        for_blocks(0, n, period, [&](int64_t e, int64_t k) { whole(e, k, put, put); }, part);
    }
}

template <Gate gate, bool fixed, bool with_dz, bool with_stream, class T>
BATCHNORM_INLINE void grad_apply_ncs_as(const GradApplyArgs& a) {
    const Box& b = a.where.box;
    const Runs<const T> dy(a.dy, b), x(a.x, b);
    const Runs<T> dx(a.dx, b), dz(with_dz ? a.dz : a.dx, b);
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
            const int64_t bit = n * a.mask.outer_stride + (b.channel_begin + c) * a.mask.channel_stride + b.inner_begin;
            const GradPointers<T> p{dy.at(n, c), x.at(n, c), dx.at(n, c), dz.at(n, c), a.mask.bits, bit};
            grad_apply_run<gate, fixed, with_dz, with_stream>(p, run, kNoPeriod, k);
        }
    }
}

template <Gate gate, bool fixed, bool with_dz, bool with_stream, class T>
BATCHNORM_INLINE void grad_apply_nsc_as(const GradApplyArgs& a) {
    const Box& b = a.where.box;
    const Rows<const T> dy(a.dy, a.where), x(a.x, a.where);
    const Rows<T> dx(a.dx, a.where), dz(with_dz ? a.dz : a.dx, a.where);
    const int64_t channels = b.channel_end - b.channel_begin;
    using PerChannel = PerElement<Compute<T>>;
    const GradCoefficients<PerChannel> k{
        PerChannel(a.affine.center), PerChannel(a.affine.scale), PerChannel(a.affine.offset), PerChannel(a.k_dy), PerChannel(a.x_scale),
        PerChannel(a.k_x),           PerChannel(a.k_0)};
    const auto rows = [&](int64_t r, int64_t n, int64_t period) {
        const int64_t bit = r * a.mask.outer_stride + b.channel_begin;
        const GradPointers<T> p{dy.at(r), x.at(r), dx.at(r), dz.at(r), a.mask.bits, bit};
        grad_apply_run<gate, fixed, with_dz, with_stream>(p, n, period, k);
    };
    if (dy.dense(channels) && x.dense(channels) && dx.dense(channels) && dz.dense(channels) &&
        (gate != kernels::masked || a.mask.outer_stride == channels)) {
        return rows(b.outer_begin, (b.outer_end - b.outer_begin) * channels, a.where.fold * channels);
    }
    for (int64_t r = b.outer_begin; r < b.outer_end; ++r) rows(r, channels, kNoPeriod);
}

// Runs `as` with the four choices as constants. dz exists with a mask alone.
template <class As>
BATCHNORM_INLINE void grad_apply_flags(const GradApplyArgs& a, As as) {
    with_gate(a.gate, [&](auto gate) {
        with_flag(a.fixed, [&](auto fixed) {
            with_flag(a.stream, [&](auto stream) {
                if constexpr (decltype(gate)::value == kernels::masked) {
                    with_flag(a.dz.data != nullptr, [&](auto dz) { as(gate, fixed, dz, stream); });
                } else {
                    as(gate, fixed, Flag<false>{}, stream);
                }
            });
        });
    });
    if (a.stream) stream_fence();
}

template <class T>
void grad_apply_ncs(const GradApplyArgs& a) noexcept {
    grad_apply_flags(a, [&](auto gate, auto fixed, auto dz, auto stream) {
        grad_apply_ncs_as<decltype(gate)::value, decltype(fixed)::value, decltype(dz)::value, decltype(stream)::value, T>(a);
    });
}

template <class T>
void grad_apply_nsc(const GradApplyArgs& a) noexcept {
    grad_apply_flags(a, [&](auto gate, auto fixed, auto dz, auto stream) {
        grad_apply_nsc_as<decltype(gate)::value, decltype(fixed)::value, decltype(dz)::value, decltype(stream)::value, T>(a);
    });
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
