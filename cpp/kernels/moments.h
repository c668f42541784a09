// Kernel `moments`: sums of (x - shift) and (x - shift)^2 per channel over one box, in double.
//
// The shift is a value near the channel's data (the driver takes the first element), so the squares do not cancel; with double
// sums of float data what remains is far below one float ulp. Multiply and add round separately: SSE2 has no fma, and the bits
// must not depend on the ISA.
#pragma once

#include "walk.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::MomentsArgs;

template <class T>
BATCHNORM_INLINE void moments_run(const T* x, int64_t n, F64 shift, F64& sum, F64& sum_sq) {
    int64_t e = 0;
    for (; e + kLanes <= n; e += kLanes) {
        prefetch_ahead(x + e);
        const F64 d = load_double(x + e) - shift;
        sum = sum + d;
        sum_sq = sum_sq + d * d;
    }
    if (e < n) {
        const F64 d = keep_first(to_double(load_part(x + e, n - e)) - shift, n - e);
        sum = sum + d;
        sum_sq = sum_sq + d * d;
    }
}

template <class T>
void moments_ncs(const MomentsArgs& a) noexcept {
    const Box& b = a.where.box;
    const Runs<const T> x(a.x, b);
    const int64_t channels = b.channel_end - b.channel_begin, run = b.inner_end - b.inner_begin;
    alignas(64) double lanes[kernels::kMaxGroup][2][kLanes];
    for (int64_t c0 = 0; c0 < channels; c0 += kernels::kMaxGroup) {
        const int64_t group = channels - c0 < kernels::kMaxGroup ? channels - c0 : kernels::kMaxGroup;
        memset(lanes, 0, (size_t)group * sizeof lanes[0]);
        for (int64_t n = b.outer_begin; n < b.outer_end; ++n) {
            for (int64_t c = 0; c < group; ++c) {
                F64 sum = Ops<F64>::load(lanes[c][0]), sum_sq = Ops<F64>::load(lanes[c][1]);
                moments_run(x.at(n, c0 + c), run, Ops<F64>::broadcast(a.shift[c0 + c]), sum, sum_sq);
                Ops<F64>::store(lanes[c][0], sum);
                Ops<F64>::store(lanes[c][1], sum_sq);
            }
        }
        for (int64_t c = 0; c < group; ++c) {
            a.sum[c0 + c] = sum_lanes(lanes[c][0]);
            a.sum_sq[c0 + c] = sum_lanes(lanes[c][1]);
        }
    }
}

// R rows at a time keep a block's sums in registers for R elements of each channel; the order of the additions is that of R = 1.
template <int R, class T>
BATCHNORM_INLINE void moments_rows(const T* const (&x)[R], int64_t width, const MomentsArgs& a) {
    int64_t e = 0;
    for (; e + kLanes <= width; e += kLanes) {
        const F64 shift = Ops<F64>::load(a.shift + e);
        F64 sum = Ops<F64>::load(a.sum + e), sum_sq = Ops<F64>::load(a.sum_sq + e);
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) {
            prefetch_ahead(x[j] + e);
            const F64 d = load_double(x[j] + e) - shift;
            sum = sum + d;
            sum_sq = sum_sq + d * d;
        }
        Ops<F64>::store(a.sum + e, sum);
        Ops<F64>::store(a.sum_sq + e, sum_sq);
    }
    if (e < width) {
        const F64 shift = Ops<F64>::load(a.shift + e);
        F64 sum = Ops<F64>::load(a.sum + e), sum_sq = Ops<F64>::load(a.sum_sq + e);
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) {
            const F64 d = keep_first(to_double(load_part(x[j] + e, width - e)) - shift, width - e);
            sum = sum + d;
            sum_sq = sum_sq + d * d;
        }
        Ops<F64>::store(a.sum + e, sum);
        Ops<F64>::store(a.sum_sq + e, sum_sq);
    }
}

template <class T>
void moments_nsc(const MomentsArgs& a) noexcept {
    const Box& b = a.where.box;
    const FoldedRows<T> x(a.x, a.where);
    const int64_t fold = a.where.fold, width = fold * x.channels;
    memset(a.sum, 0, (size_t)round_up(width) * sizeof(double));
    memset(a.sum_sq, 0, (size_t)round_up(width) * sizeof(double));
    T buffer[kMaxFoldedWidth];
    int64_t r = b.outer_begin;
    for (; !x.gather && r + 4 * fold <= b.outer_end; r += 4 * fold) {
        const T* const rows[4] = {x.rows.at(r), x.rows.at(r + fold), x.rows.at(r + 2 * fold), x.rows.at(r + 3 * fold)};
        moments_rows(rows, width, a);
    }
    for (; r < b.outer_end; r += fold) {
        const int64_t n_rows = b.outer_end - r < fold ? b.outer_end - r : fold;
        const T* const rows[1] = {x.at(r, n_rows, buffer)};
        moments_rows(rows, n_rows * x.channels, a);
    }
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
