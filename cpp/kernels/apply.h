// Kernel `apply`: y = (x - center) * scale + offset per channel, optionally + z, optionally max(y, 0) with a mask of where that kept
// the value, or another activation, in one pass.
#pragma once

#include "walk.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::ApplyArgs;

template <class T>
struct ApplyPointers {
    const T *x, *z;  // z is read only if there is a residual
    T* y;
    uint8_t* mask;  // written only with gate masked, and with gate curve unless null
    int64_t first_bit;
    bool stream;
    int64_t ahead;
};

// With gate curve, with_z and with_stream say what may be.
template <Gate gate, bool with_z, bool with_stream, class T, class PerChannel, class Keep>
BATCHNORM_INLINE void apply_run(const ApplyPointers<T>& p, int64_t n, int64_t period, PerChannel center, PerChannel scale,
                                PerChannel offset, const Curve& curve, Keep keep) {
    const bool add_z = with_z && (!asks<gate> || p.z != nullptr);
    const bool put_bits = gate == kernels::masked || (asks<gate> && p.mask != nullptr);
    MaskWriter<gate == kernels::masked || asks<gate>> mask(p.mask, put_bits ? p.first_bit : 0);
    const auto value = [&](Block<T> v, Block<T> z, int64_t k) {
        v = affine(v, center.at(k), scale.at(k), offset.at(k));
        return add_z ? v + z : v;
    };
    const auto whole = [&](int64_t e, int64_t k) {
        prefetch_ahead(p.x + e, p.ahead);
        if (add_z) prefetch_ahead(p.z + e, p.ahead);
        const Block<T> v = value(load(p.x + e), add_z ? load(p.z + e) : Block<T>{}, k);
        if (put_bits) mask.put(gate_bits<gate>(v, curve));
        return where_kept(keep.at(e), gated<gate>(v, curve));
    };
    const auto part = [&](int64_t e, int64_t k, int64_t m) {
        const Block<T> v = value(load_part(p.x + e, m), add_z ? load_part(p.z + e, m) : Block<T>{}, k);
        if (put_bits) mask.put(gate_bits<gate>(v, curve), m);
        store_part(p.y + e, m, where_kept(keep.at(e), gated<gate>(v, curve)));
    };
    const bool stream = with_stream && (!asks<gate> || p.stream);
    const int64_t head = stream || n >= kWorthAligning ? elements_to_alignment(p.y) : 0;
    for_blocks(
        head, n, period, [&](int64_t e, int64_t k) { stream ? store_stream(p.y + e, whole(e, k)) : store(p.y + e, whole(e, k)); }, part);
    mask.finish();
}

template <Gate gate, bool with_z, bool with_stream, class T>
BATCHNORM_INLINE void apply_ncs_as(const ApplyArgs& a, bool put_together) {
    const Box& b = a.where.box;
    const bool add_z = with_z && (!asks<gate> || a.z.data != nullptr);
    const Runs<const T> x(a.x, b), z(add_z ? a.z : a.x, b);
    const Runs<T> y(a.y, b);
    const int64_t channels = b.channel_end - b.channel_begin, run = b.inner_end - b.inner_begin;
    const bool staged = (!with_stream || asks<gate>) && put_together, stream = a.stream && !staged;
    Stage stage;
    using PerChannel = Broadcast<Compute<T>>;
    for (int64_t n = b.outer_begin; n < b.outer_end; ++n) {
        for (int64_t c = 0; c < channels; ++c) {
            T* const y_run = staged ? stage.place(y.at(n, c), run) : y.at(n, c);
            const int64_t bit = n * a.mask.outer_stride + (b.channel_begin + c) * a.mask.channel_stride + b.inner_begin;
            apply_run<gate, with_z, with_stream>(
                ApplyPointers<T>{x.at(n, c), add_z ? z.at(n, c) : nullptr, y_run, a.mask.bits, bit, stream, a.where.ahead}, run, kNoPeriod,
                PerChannel(a.affine.center, c), PerChannel(a.affine.scale, c), PerChannel(a.affine.offset, c), a.curve,
                KeptRun(a.kept, b, n, c));
        }
    }
    if (staged) stage.finish();
}

template <Gate gate, bool with_z, bool with_stream, class T>
BATCHNORM_INLINE void apply_nsc_as(const ApplyArgs& a) {
    const Box& b = a.where.box;
    const bool add_z = with_z && (!asks<gate> || a.z.data != nullptr);
    const Rows<const T> x(a.x, a.where), z(add_z ? a.z : a.x, a.where);
    const Rows<T> y(a.y, a.where);
    const int64_t channels = b.channel_end - b.channel_begin;
    using PerChannel = PerElement<Compute<T>>;
    const PerChannel center(a.affine.center), scale(a.affine.scale), offset(a.affine.offset);
    // Rows without gaps are one stretch of memory, whatever their length.
    const kernels::Kept kept = kept_elements(a.kept);
    const bool dense = x.dense(channels) && y.dense(channels) && z.dense(channels) &&
                       (kept.data == nullptr || kept.outer_stride == channels) &&
                       (gate == kernels::open || gate == kernels::relu || a.mask.bits == nullptr || a.mask.outer_stride == channels);
    const auto rows = [&](int64_t r, int64_t n_rows) {
        const int64_t bit = r * a.mask.outer_stride + b.channel_begin;
        apply_run<gate, with_z, with_stream>(
            ApplyPointers<T>{x.at(r), add_z ? z.at(r) : nullptr, y.at(r), a.mask.bits, bit, a.stream, a.where.ahead}, n_rows * channels,
            a.where.fold * channels, center, scale, offset, a.curve, KeptRun(kept, b, r, 0));
    };
    const Compute<T>* const no_weights = nullptr;
    for_stretches(a.where, dense, kept_rows(a.kept), no_weights, rows, [&](int64_t r) { clear(y.at(r), channels); });
}

// Runs `as` with gate, residual or not, streamed (by blocks) or not as constants.
template <class As>
BATCHNORM_INLINE void apply_flags(const ApplyArgs& a, bool stream_blocks, As as) {
    with_gate(a.gate, [&](auto gate) {
        if constexpr (asks<decltype(gate)::value>) {
            as(gate, Flag<true>{}, Flag<true>{});
        } else {
            with_flag(a.z.data != nullptr, [&](auto z) { with_flag(stream_blocks, [&](auto stream) { as(gate, z, stream); }); });
        }
    });
    if (a.stream) stream_fence();
}

template <class T>
void apply_ncs(const ApplyArgs& a) noexcept {
    const bool staged = a.stream && Stage::wanted<T>(a.y, a.where.box);
    apply_flags(a, a.stream && !staged, [&](auto gate, auto z, auto stream) {
        apply_ncs_as<decltype(gate)::value, decltype(z)::value, decltype(stream)::value, T>(a, staged);
    });
}

template <class T>
void apply_nsc(const ApplyArgs& a) noexcept {
    apply_flags(a, a.stream, [&](auto gate, auto z, auto stream) {
        apply_nsc_as<decltype(gate)::value, decltype(z)::value, decltype(stream)::value, T>(a);
    });
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
