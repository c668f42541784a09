// Kernel `moments`: sums of (x - shift) and (x - shift)^2 per channel over one box, in double.
//
// A shift near the channel's data keeps the squares from cancelling later. Without one the squares of float data are exact, so the loop
// needs 6 vector instructions per 16 elements instead of 10; the driver asks for a shift where the sums turn out to need it. For double
// data squares are not exact, and multiply and add round separately: SSE2 has no fma, and the bits must not depend on the ISA. Integers
// need no shift: all their sums are exact.
#pragma once

#include "walk.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::MomentsArgs;

template <bool shifted>
struct Moments {
    F64 sum, sum_sq;
    BATCHNORM_INLINE void add(F64 x, F64 shift) {
        if constexpr (shifted) {
            const F64 d = x - shift;
            sum = sum + d;
            sum_sq = sum_sq + d * d;
        } else {
            sum = sum + x;
            sum_sq = add_product(sum_sq, x, x);
        }
    }
    // The first n lanes alone; of x the others are 0.
    BATCHNORM_INLINE void add_first(F64 x, F64 shift, int64_t n) {
        if constexpr (shifted) {
            const F64 d = keep_first(x - shift, n);
            sum = sum + d;
            sum_sq = sum_sq + d * d;
        } else {
            add(x, shift);
        }
    }
};

template <bool shifted, class T>
BATCHNORM_INLINE void moments_ncs_as(const MomentsArgs& a) {
    const Box& b = a.where.box;
    const Runs<const T> x(a.x, b);
    const int64_t channels = b.channel_end - b.channel_begin, run = b.inner_end - b.inner_begin;
    alignas(64) double lanes[kernels::kMaxGroup][2][kLanes];
    for (int64_t c0 = 0; c0 < channels; c0 += kernels::kMaxGroup) {
        const int64_t group = channels - c0 < kernels::kMaxGroup ? channels - c0 : kernels::kMaxGroup;
        memset(lanes, 0, (size_t)group * sizeof lanes[0]);
        for (int64_t n = b.outer_begin; n < b.outer_end; ++n) {
            for (int64_t c = 0; c < group; ++c) {
                Moments<shifted> m{Ops<F64>::load(lanes[c][0]), Ops<F64>::load(lanes[c][1])};
                const F64 shift = Ops<F64>::broadcast(shifted ? a.shift[c0 + c] : 0);
                const T* const x_run = x.at(n, c0 + c);
                for_run(
                    run,
                    [&](int64_t e) {
                        prefetch_ahead(x_run + e);
                        m.add(load_double(x_run + e), shift);
                    },
                    [&](int64_t e, int64_t k) { m.add_first(to_double(load_part(x_run + e, k)), shift, k); });
                Ops<F64>::store(lanes[c][0], m.sum);
                Ops<F64>::store(lanes[c][1], m.sum_sq);
            }
        }
        sum_group(lanes, group, a.sum + c0, a.sum_sq + c0);
    }
}

// R rows at a time keep a block's sums in registers for R elements of each channel; the order of the additions is that of R = 1.
template <bool shifted, int R, class T>
BATCHNORM_INLINE void moments_rows(const T* const (&x)[R], int64_t width, const MomentsArgs& a) {
    const auto rows = [&](int64_t e, auto add) {
        Moments<shifted> m{Ops<F64>::load(a.sum + e), Ops<F64>::load(a.sum_sq + e)};
        const F64 shift = shifted ? Ops<F64>::load(a.shift + e) : F64{};
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) add(m, x[j] + e, shift);
        Ops<F64>::store(a.sum + e, m.sum);
        Ops<F64>::store(a.sum_sq + e, m.sum_sq);
    };
    for_run(
        width,
        [&](int64_t e) {
            rows(e, [](Moments<shifted>& m, const T* p, F64 shift) {
                prefetch_ahead(p);
                m.add(load_double(p), shift);
            });
        },
        [&](int64_t e, int64_t n) {
            rows(e, [n](Moments<shifted>& m, const T* p, F64 shift) { m.add_first(to_double(load_part(p, n)), shift, n); });
        });
}

template <bool shifted, class T>
BATCHNORM_INLINE void moments_nsc_as(const MomentsArgs& a) {
    const Box& b = a.where.box;
    const FoldedRows<T> x(a.x, a.where);
    const int64_t fold = a.where.fold, width = fold * x.channels;
    memset(a.sum, 0, (size_t)round_up(width) * sizeof(double));
    memset(a.sum_sq, 0, (size_t)round_up(width) * sizeof(double));
    T buffer[kMaxFoldedWidth];
    int64_t r = b.outer_begin;
    for (; !x.gather && r + 4 * fold <= b.outer_end; r += 4 * fold) {
        const T* const rows[4] = {x.rows.at(r), x.rows.at(r + fold), x.rows.at(r + 2 * fold), x.rows.at(r + 3 * fold)};
        moments_rows<shifted>(rows, width, a);
    }
    for (; r < b.outer_end; r += fold) {
        const int64_t n_rows = b.outer_end - r < fold ? b.outer_end - r : fold;
        const T* const rows[1] = {x.at(r, n_rows, buffer)};
        moments_rows<shifted>(rows, n_rows * x.channels, a);
    }
}

template <class T>
void moments_ncs(const MomentsArgs& a) noexcept {
    if constexpr (!is_double<T>) {
        if (is_integer<T> || a.shift == nullptr) return moments_ncs_as<false, T>(a);
    }
    if constexpr (!is_integer<T>) moments_ncs_as<true, T>(a);
}

template <class T>
void moments_nsc(const MomentsArgs& a) noexcept {
    if constexpr (!is_double<T>) {
        if (is_integer<T> || a.shift == nullptr) return moments_nsc_as<false, T>(a);
    }
    if constexpr (!is_integer<T>) moments_nsc_as<true, T>(a);
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
