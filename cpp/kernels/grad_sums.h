// Kernel `grad_sums`: the two sums backward needs, sum of dy and sum of dy * (x - shift) per channel over one box, in double. With
// ReLU, dy counts only where the forward value was positive: recomputed by the same expression, or read from the forward's mask. Other
// activations multiply it by their derivative there.
#pragma once

#include "apply.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::GradSumsArgs;

// Whether g may be left in a tensor: exactly, so that who reads it there sees what was summed.
template <Gate gate, class T>
inline constexpr bool may_leave = asks<gate> && sizeof(T) == sizeof(Compute<T>);

template <Gate gate, bool shifted, class T>
BATCHNORM_INLINE void grad_sums_ncs_as(const GradSumsArgs& a) {
    const Box& b = a.where.box;
    const bool add_z = asks<gate> && a.z.data != nullptr, leave = may_leave<gate, T> && a.g.data != nullptr;
    const Runs<const T> dy(a.dy, b), x(a.x, b), z(add_z ? a.z : a.x, b);
    const Runs<T> left(leave ? a.g : a.x, b);
    const int64_t ahead = a.where.ahead;  // not read again after each store
    const int64_t channels = b.channel_end - b.channel_begin, run = b.inner_end - b.inner_begin;
    using PerChannel = Broadcast<Compute<T>>;
    alignas(64) double lanes[kernels::kMaxGroup][2][kLanes];
    for (int64_t c0 = 0; c0 < channels; c0 += kernels::kMaxGroup) {
        const int64_t group = channels - c0 < kernels::kMaxGroup ? channels - c0 : kernels::kMaxGroup;
        memset(lanes, 0, (size_t)group * sizeof lanes[0]);
        for (int64_t n = b.outer_begin; n < b.outer_end; ++n) {
            for (int64_t c = 0; c < group; ++c) {
                GradSums<shifted> sums{Ops<F64>::load(lanes[c][0]), Ops<F64>::load(lanes[c][1])};
                const F64 shift = Ops<F64>::broadcast(shifted ? a.shift[c0 + c] : 0);
                const T* const dy_run = dy.at(n, c0 + c);
                const T* const x_run = x.at(n, c0 + c);
                const T* const z_run = z.at(n, c0 + c);
                T* const left_run = left.at(n, c0 + c);
                const KeptRun keep(a.kept, b, n, c0 + c);
                const auto fetch = [&](int64_t e) {
                    prefetch_ahead(dy_run + e, ahead);
                    prefetch_ahead(x_run + e, ahead);
                    if (add_z) prefetch_ahead(z_run + e, ahead);
                };
                if constexpr (gate != kernels::open) {
                    const PerChannel center(a.affine.center, c0 + c), scale(a.affine.scale, c0 + c), offset(a.affine.offset, c0 + c);
                    const int64_t bit = n * a.mask.outer_stride + (b.channel_begin + c0 + c) * a.mask.channel_stride + b.inner_begin;
                    const auto gated = [&](Block<T> g, Block<T> v, Block<T> residual, int64_t e) {
                        return where_kept(keep.at(e), through_gate<gate>(g, v, residual, center, scale, offset, 0,
                                                                         MaskBits{a.mask.bits, bit + e}, a.curve));
                    };
                    for_run(
                        run,
                        [&](int64_t e) {
                            fetch(e);
                            const Block<T> v = input<gate>(load(x_run + e), a.curve);
                            const Block<T> g = gated(load(dy_run + e), v, add_z ? load(z_run + e) : Block<T>{}, e);
                            if (leave) store(left_run + e, g);
                            sums.add(to_double(g), to_double(where_kept(keep.at(e), v)), shift);
                        },
                        [&](int64_t e, int64_t m) {
                            const Block<T> v = input<gate>(load_part(x_run + e, m), a.curve);
                            const Block<T> residual = add_z ? load_part(z_run + e, m) : Block<T>{};
                            const Block<T> g = gated(load_part(dy_run + e, m), v, residual, e);
                            if (leave) store_part(left_run + e, m, g);
                            sums.add_first(to_double(g), to_double(where_kept(keep.at(e), v)), shift, m);
                        });
                } else {
                    for_run(
                        run,
                        [&](int64_t e) {
                            fetch(e);
                            const uint32_t bits = keep.at(e);
                            sums.add(where_kept(bits, load_double(dy_run + e)), where_kept(bits, load_double(x_run + e)), shift);
                        },
                        [&](int64_t e, int64_t m) {
                            const uint32_t bits = keep.at(e);
                            sums.add_first(where_kept(bits, to_double(load_part(dy_run + e, m))),
                                           where_kept(bits, to_double(load_part(x_run + e, m))), shift, m);
                        });
                }
                Ops<F64>::store(lanes[c][0], sums.dy);
                Ops<F64>::store(lanes[c][1], sums.dy_x);
            }
        }
        sum_group(lanes, group, a.sum_dy + c0, a.sum_dy_x + c0);
    }
}

// R rows at a time, z's read if there is one, g left unless `left` is null; the mask's bits of row j start at bit[j].
template <Gate gate, bool shifted, int R, class T>
BATCHNORM_INLINE void grad_sums_rows(const T* const (&dy)[R], const T* const (&x)[R], const T* const (&z)[R], T* left, int64_t width,
                                     const int64_t (&bit)[R], const GradSumsArgs& a) {
    const bool add_z = asks<gate> && a.z.data != nullptr;
    using PerChannel = PerElement<Compute<T>>;
    const PerChannel center(a.affine.center), scale(a.affine.scale), offset(a.affine.offset);
    const int64_t ahead = a.where.ahead;
    const auto rows = [&](int64_t e, auto load_double_at, auto load_at, auto store_at) {
        const F64 shift = shifted ? Ops<F64>::load(a.shift + e) : F64{};
        GradSums<shifted> sums{Ops<F64>::load(a.sum_dy + e), Ops<F64>::load(a.sum_dy_x + e)};
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) {
            prefetch_ahead(dy[j] + e, ahead);
            prefetch_ahead(x[j] + e, ahead);
            if (add_z) prefetch_ahead(z[j] + e, ahead);
            if constexpr (gate != kernels::open) {
                const Block<T> v = input<gate>(load_at(x[j] + e), a.curve);
                const Block<T> residual = add_z ? load_at(z[j] + e) : Block<T>{};
                const Block<T> g = through_gate<gate>(load_at(dy[j] + e), v, residual, center, scale, offset, e,
                                                      MaskBits{a.mask.bits, bit[j] + e}, a.curve);
                if (may_leave<gate, T> && left != nullptr) store_at(left + e, g);
                sums.add(to_double(g), to_double(v), shift);
            } else {
                sums.add(load_double_at(dy[j] + e), load_double_at(x[j] + e), shift);
            }
        }
        Ops<F64>::store(a.sum_dy + e, sums.dy);
        Ops<F64>::store(a.sum_dy_x + e, sums.dy_x);
    };
    // Lanes past the width meet dy = x = 0 (load_part) and the shift of their own channel: they add 0, or NaN to a channel whose mean is.
    for_run(
        width,
        [&](int64_t e) {
            rows(e, [](const T* p) { return load_double(p); }, [](const T* p) { return load(p); }, [](T* p, Block<T> g) { store(p, g); });
        },
        [&](int64_t e, int64_t m) {
            rows(
                e, [m](const T* p) { return to_double(load_part(p, m)); }, [m](const T* p) { return load_part(p, m); },
                [m](T* p, Block<T> g) { store_part(p, m, g); });
        });
}

inline constexpr int64_t kLongRow = 1024;

template <Gate gate, bool shifted, class T>
BATCHNORM_INLINE void grad_sums_nsc_as(const GradSumsArgs& a) {
    const Box& b = a.where.box;
    const bool add_z = asks<gate> && a.z.data != nullptr;
    const uint8_t* const kept = kept_rows(a.kept);
    const FoldedRows<T> dy(a.dy, a.where, a.kept), x(a.x, a.where, a.kept), z(add_z ? a.z : a.x, a.where, a.kept);
    const bool leave = may_leave<gate, T> && a.g.data != nullptr;
    const Rows<T> left(leave ? a.g : a.x, a.where);
    const int64_t fold = a.where.fold, width = fold * x.channels;
    memset(a.sum_dy, 0, (size_t)round_up(width) * sizeof(double));
    memset(a.sum_dy_x, 0, (size_t)round_up(width) * sizeof(double));
    T dy_buffer[kMaxRow], x_buffer[kMaxRow], z_buffer[asks<gate> ? kMaxRow : 1];
    const auto bit = [&](int64_t row) { return row * a.mask.outer_stride + b.channel_begin; };
    // Several rows at a time, their sums in registers: not where the gate's call would spill them, which code of that size is not worth,
    // and not of long rows, whose memory is then read in too many places at once (D13).
    const bool four = !asks<gate> && !dy.gather && !x.gather && width < kLongRow;
    RowsThatCount rows(a.where, kept);
    int64_t r[4];
    while (const int n = rows.next(r, four)) {
        if (n == 4) {
            if constexpr (!asks<gate>) {
                const T* const dy_rows[4] = {dy.rows.at(r[0]), dy.rows.at(r[1]), dy.rows.at(r[2]), dy.rows.at(r[3])};
                const T* const x_rows[4] = {x.rows.at(r[0]), x.rows.at(r[1]), x.rows.at(r[2]), x.rows.at(r[3])};
                grad_sums_rows<gate, shifted>(dy_rows, x_rows, x_rows, (T*)nullptr, width, {bit(r[0]), bit(r[1]), bit(r[2]), bit(r[3])}, a);
            }
        } else {
            const int64_t n_rows = b.outer_end - r[0] < fold ? b.outer_end - r[0] : fold;
            const T* const dy_rows[1] = {dy.at(r[0], n_rows, dy_buffer)};
            const T* const x_rows[1] = {x.at(r[0], n_rows, x_buffer)};
            const T* const z_rows[1] = {add_z ? z.at(r[0], n_rows, z_buffer) : x_rows[0]};
            T* const left_row = leave ? left.at(r[0]) : nullptr;
            grad_sums_rows<gate, shifted>(dy_rows, x_rows, z_rows, left_row, n_rows * x.channels, {bit(r[0])}, a);
        }
    }
}

// Runs `as` with the two choices as constants.
template <class T, class As>
BATCHNORM_INLINE void grad_sums_flags(const GradSumsArgs& a, As as) {
    with_gate(a.gate, [&](auto gate) {
        if constexpr (is_double<T> || asks<decltype(gate)::value>) {
            as(gate, Flag<true>{});
        } else {
            with_flag(a.shift != nullptr, [&](auto shifted) { as(gate, shifted); });
        }
    });
}

template <class T>
void grad_sums_ncs(const GradSumsArgs& a) noexcept {
    grad_sums_flags<T>(a, [&](auto gate, auto shifted) { grad_sums_ncs_as<decltype(gate)::value, decltype(shifted)::value, T>(a); });
}

template <class T>
void grad_sums_nsc(const GradSumsArgs& a) noexcept {
    grad_sums_flags<T>(a, [&](auto gate, auto shifted) { grad_sums_nsc_as<decltype(gate)::value, decltype(shifted)::value, T>(a); });
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
