// Kernel `grad_apply`: dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0 per channel, g being dy behind the gate; with fixed
// statistics dx = g * k_dy. dz = g, the residual's gradient, on the way.
#pragma once

#include "grad_sums.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::GradApplyArgs;

template <class T>
struct GradPointers {
    const T *dy, *x;
    T *dx, *dz;  // dz may be null
    const uint8_t* mask;
    int64_t first_bit;
    const T* z;  // may be null; read only with gate curve
    bool fixed, stream;
    int64_t ahead;
};

// With gate curve, with_dz and with_stream say what may be, and `fixed` nothing.
template <Gate gate, bool fixed, bool with_dz, bool with_stream, class T, class PerChannel, class Keep, class Weight>
BATCHNORM_INLINE void grad_apply_run(const GradPointers<T>& p, int64_t n, int64_t period, const GradCoefficients<PerChannel>& c,
                                     const Curve& curve, Keep keep, Weight weight) {
    const bool add_z = asks<gate> && p.z != nullptr, put_z = with_dz && (!asks<gate> || p.dz != nullptr);
    const bool just_scale = asks<gate> ? p.fixed : fixed;
    const auto through = [&](Block<T> g, Block<T> v, Block<T> z, int64_t e, int64_t k) {
        return through_gate<gate>(g, v, z, c.center, c.scale, c.offset, k, MaskBits{p.mask, p.first_bit + e}, curve);
    };
    const auto value = [&](Block<T> g, Block<T> v, int64_t e, int64_t k) {
        return just_scale ? g * c.k_dy.at(k) : gradient(g, v, c, k, weight, e);
    };
    constexpr bool read_x = gate == kernels::relu || gate == kernels::curve || !fixed;
    const bool stream = with_stream && (!asks<gate> || p.stream);
    const int64_t head = stream || n >= kWorthAligning ? elements_to_alignment(p.dx) : 0;
    const bool stream_dz = stream && put_z && elements_to_alignment(p.dz) == head;  // both start on a line together
    const auto whole = [&](int64_t e, int64_t k) {
        prefetch_ahead(p.dy + e, p.ahead);
        if constexpr (read_x) prefetch_ahead(p.x + e, p.ahead);
        if (add_z) prefetch_ahead(p.z + e, p.ahead);
        const Block<T> v = read_x ? input<gate>(load(p.x + e), curve) : Block<T>{};
        const Block<T> g = through(load(p.dy + e), v, add_z ? load(p.z + e) : Block<T>{}, e, k);
        const uint32_t bits = keep.at(e);
        if (put_z) stream_dz ? store_stream(p.dz + e, where_kept(bits, g)) : store(p.dz + e, where_kept(bits, g));
        const Block<T> dx = where_kept(bits, value(g, v, e, k));
        stream ? store_stream(p.dx + e, dx) : store(p.dx + e, dx);
    };
    const auto part = [&](int64_t e, int64_t k, int64_t m) {
        const Block<T> v = read_x ? input<gate>(load_part(p.x + e, m), curve) : Block<T>{};
        const Block<T> g = through(load_part(p.dy + e, m), v, add_z ? load_part(p.z + e, m) : Block<T>{}, e, k);
        const uint32_t bits = keep.at(e);
        if (put_z) store_part(p.dz + e, m, where_kept(bits, g));
        store_part(p.dx + e, m, where_kept(bits, value(g, v, e, k)));
    };
    for_blocks(head, n, period, whole, part);
}

template <Gate gate, bool fixed, bool with_dz, bool with_stream, class T>
BATCHNORM_INLINE void grad_apply_ncs_as(const GradApplyArgs& a, bool put_together) {
    const Box& b = a.where.box;
    const bool add_z = asks<gate> && a.z.data != nullptr, put_z = with_dz && a.dz.data != nullptr;
    const Runs<const T> dy(a.dy, b), x(a.x, b), z(add_z ? a.z : a.x, b);
    const Runs<T> dx(a.dx, b), dz(put_z ? a.dz : a.dx, b);
    const int64_t channels = b.channel_end - b.channel_begin, run = b.inner_end - b.inner_begin;
    const bool staged = (!with_stream || asks<gate>) && put_together, stream = a.stream && !staged;
    Stage stage, stage_dz;
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
            T *dx_run = dx.at(n, c), *dz_run = put_z ? dz.at(n, c) : nullptr;
            if (staged) {
                dx_run = stage.place(dx_run, run);
                if (put_z) dz_run = stage_dz.place(dz_run, run);
            }
            const GradPointers<T> p{dy.at(n, c), x.at(n, c), dx_run,       dz_run, a.mask.bits, bit, add_z ? z.at(n, c) : nullptr,
                                    a.fixed,     stream,     a.where.ahead};
            grad_apply_run<gate, fixed, with_dz, with_stream>(p, run, kNoPeriod, k, a.curve, KeptRun(a.kept, b, n, c),
                                                              RunWeights<Compute<T>>(a.weights, b, n));
        }
    }
    if (staged) {
        stage.finish();
        stage_dz.finish();
    }
}

template <Gate gate, bool fixed, bool with_dz, bool with_stream, class T>
BATCHNORM_INLINE void grad_apply_nsc_as(const GradApplyArgs& a) {
    const Box& b = a.where.box;
    const bool add_z = asks<gate> && a.z.data != nullptr, put_z = with_dz && a.dz.data != nullptr;
    const Rows<const T> dy(a.dy, a.where), x(a.x, a.where), z(add_z ? a.z : a.x, a.where);
    const Rows<T> dx(a.dx, a.where), dz(put_z ? a.dz : a.dx, a.where);
    const int64_t channels = b.channel_end - b.channel_begin;
    using PerChannel = PerElement<Compute<T>>;
    const GradCoefficients<PerChannel> k{
        PerChannel(a.affine.center), PerChannel(a.affine.scale), PerChannel(a.affine.offset), PerChannel(a.k_dy), PerChannel(a.x_scale),
        PerChannel(a.k_x),           PerChannel(a.k_0)};
    const kernels::Kept kept = kept_elements(a.kept);
    const bool dense = dy.dense(channels) && x.dense(channels) && dx.dense(channels) && dz.dense(channels) && z.dense(channels) &&
                       (kept.data == nullptr || kept.outer_stride == channels) &&
                       (gate == kernels::open || gate == kernels::relu || a.mask.bits == nullptr || a.mask.outer_stride == channels);
    const auto rows = [&](int64_t r, int64_t n_rows) {
        const int64_t bit = r * a.mask.outer_stride + b.channel_begin;
        const GradPointers<T> p{dy.at(r), x.at(r),  dx.at(r),     put_z ? dz.at(r) : nullptr, a.mask.bits, bit, add_z ? z.at(r) : nullptr,
                                a.fixed,  a.stream, a.where.ahead};
        grad_apply_run<gate, fixed, with_dz, with_stream>(p, n_rows * channels, a.where.fold * channels, k, a.curve, KeptRun(kept, b, r, 0),
                                                          RowWeight<Compute<T>>(a.weights, r));
    };
    for_stretches(a.where, dense, kept_rows(a.kept), (const Compute<T>*)a.weights.data, rows, [&](int64_t r) {
        clear(dx.at(r), channels);
        if (put_z) clear(dz.at(r), channels);
    });
}

// Runs `as` with the four choices, of stores that they are streamed (by blocks) or not, as constants. dz exists with a mask or a curve
// alone.
template <class As>
BATCHNORM_INLINE void grad_apply_flags(const GradApplyArgs& a, bool stream_blocks, As as) {
    with_gate(a.gate, [&](auto gate) {
        if constexpr (asks<decltype(gate)::value>) return as(gate, Flag<false>{}, Flag<true>{}, Flag<true>{});
        with_flag(a.fixed, [&](auto fixed) {
            with_flag(stream_blocks, [&](auto stream) {
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
    const bool staged = a.stream && Stage::wanted<T>(a.dx, a.where.box);
    grad_apply_flags(a, a.stream && !staged, [&](auto gate, auto fixed, auto dz, auto stream) {
        grad_apply_ncs_as<decltype(gate)::value, decltype(fixed)::value, decltype(dz)::value, decltype(stream)::value, T>(a, staged);
    });
}

template <class T>
void grad_apply_nsc(const GradApplyArgs& a) noexcept {
    grad_apply_flags(a, a.stream, [&](auto gate, auto fixed, auto dz, auto stream) {
        grad_apply_nsc_as<decltype(gate)::value, decltype(fixed)::value, decltype(dz)::value, decltype(stream)::value, T>(a);
    });
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
