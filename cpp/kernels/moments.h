// Kernel `moments`: sums of (x - shift) and (x - shift)^2 per channel over one box, in double.
//
// A shift near the channel's data keeps the squares from cancelling later. Without one the squares of float data are exact, so the loop
// needs 6 vector instructions per 16 elements instead of 10; the driver asks for a shift where the sums turn out to need it. For double
// data squares are not exact, and multiply and add round separately: SSE2 has no fma, and the bits must not depend on the ISA. Integers
// without weights need no shift: all their sums are exact.
#pragma once

#include "walk.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::MomentsArgs;

// What a sum takes: every value, the kept ones, or each times its weight.
enum Count : int { every, kept, weighted };

template <bool shifted, Count count, class T>
BATCHNORM_INLINE void moments_ncs_as(const MomentsArgs& a) {
    const Box& b = a.where.box;
    const Runs<const T> x(a.x, b);
    const int64_t channels = b.channel_end - b.channel_begin, run = b.inner_end - b.inner_begin;
    const int64_t ahead = a.where.ahead;
    const F64 scale = Ops<F64>::broadcast(a.scale);
    alignas(64) double lanes[kernels::kMaxGroup][2][kLanes];
    for (int64_t c0 = 0; c0 < channels; c0 += kernels::kMaxGroup) {
        const int64_t group = channels - c0 < kernels::kMaxGroup ? channels - c0 : kernels::kMaxGroup;
        memset(lanes, 0, (size_t)group * sizeof lanes[0]);
        for (int64_t n = b.outer_begin; n < b.outer_end; ++n) {
            for (int64_t c = 0; c < group; ++c) {
                Moments<shifted> m{Ops<F64>::load(lanes[c][0]), Ops<F64>::load(lanes[c][1])};
                const F64 shift = Ops<F64>::broadcast(shifted ? a.shift[c0 + c] : 0);
                const T* const x_run = x.at(n, c0 + c);
                const KeptRun keep(a.kept, b, n, c0 + c);
                const RunWeights<double> w(a.weights, b, n);
                for_run(
                    run,
                    [&](int64_t e) {
                        prefetch_ahead(x_run + e, ahead);
                        const uint32_t bits = count == every ? kAllKept : keep.at(e);
                        if constexpr (count == weighted) {
                            m.add_weighted(load_double(x_run + e), shift, where_kept(bits, w.at(e)), scale);
                        } else if (bits == kAllKept) {
                            m.add(load_double(x_run + e), shift);
                        } else {
                            m.add_kept(load_double(x_run + e), shift, bits);
                        }
                    },
                    [&](int64_t e, int64_t k) {
                        const F64 v = to_double(load_part(x_run + e, k));
                        if constexpr (count == every) {
                            m.add_first(v, shift, k);
                        } else if constexpr (count == kept) {
                            m.add_kept(v, shift, keep.at(e) & ((1u << k) - 1));
                        } else {
                            m.add_weighted_first(v, shift, where_kept(keep.at(e), w.at(e)), scale, k);
                        }
                    });
                Ops<F64>::store(lanes[c][0], m.sum);
                Ops<F64>::store(lanes[c][1], m.sum_sq);
            }
        }
        sum_group(lanes, group, a.sum + c0, a.sum_sq + c0);
    }
}

// Weights of a (folded) row's elements, if sums have any.
struct NoWeight {
    static constexpr bool given = false, some = false;
};
// Those of a (folded) row whose bit is set.
struct KeptBits {
    static constexpr bool given = false, some = true;
    const uint8_t* bits;
    int64_t first;
    BATCHNORM_INLINE uint32_t at(int64_t e) const { return mask_bits(bits, first + e); }
};
struct OneWeight {
    static constexpr bool given = true, some = false;
    double value;
    BATCHNORM_INLINE F64 at(int64_t) const { return Ops<F64>::broadcast(value); }
};
struct FoldedWeights {
    static constexpr bool given = true, some = false;
    const double* data;
    BATCHNORM_INLINE F64 at(int64_t e) const { return Ops<F64>::load(data + e); }
};

// R rows at a time keep a block's sums in registers for R elements of each channel; the order of the additions is that of R = 1.
template <bool shifted, int R, class T, class Weight>
BATCHNORM_INLINE void moments_rows(const T* const (&x)[R], const Weight (&w)[R], int64_t width, const MomentsArgs& a) {
    const int64_t ahead = a.where.ahead;
    const F64 scale = Ops<F64>::broadcast(a.scale);
    const auto rows = [&](int64_t e, auto add) {
        Moments<shifted> m{Ops<F64>::load(a.sum + e), Ops<F64>::load(a.sum_sq + e)};
        const F64 shift = shifted ? Ops<F64>::load(a.shift + e) : F64{};
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) add(m, x[j] + e, w[j], shift);
        Ops<F64>::store(a.sum + e, m.sum);
        Ops<F64>::store(a.sum_sq + e, m.sum_sq);
    };
    for_run(
        width,
        [&](int64_t e) {
            rows(e, [=](Moments<shifted>& m, const T* p, const Weight& weight, F64 shift) {
                prefetch_ahead(p, ahead);
                if constexpr (Weight::given) {
                    m.add_weighted(load_double(p), shift, weight.at(e), scale);
                } else if constexpr (Weight::some) {
                    m.add_kept(load_double(p), shift, weight.at(e));
                } else {
                    m.add(load_double(p), shift);
                }
            });
        },
        [&](int64_t e, int64_t n) {
            rows(e, [=](Moments<shifted>& m, const T* p, const Weight& weight, F64 shift) {
                const F64 v = to_double(load_part(p, n));
                if constexpr (Weight::given) {
                    m.add_weighted_first(v, shift, weight.at(e), scale, n);
                } else if constexpr (Weight::some) {
                    m.add_kept(v, shift, weight.at(e) & ((1u << n) - 1));
                } else {
                    m.add_first(v, shift, n);
                }
            });
        });
}

template <bool shifted, class T>
BATCHNORM_INLINE void moments_every_row(const FoldedRows<T>& x, const MomentsArgs& a, int64_t width) {
    const Box& b = a.where.box;
    const int64_t fold = a.where.fold;
    T buffer[kMaxFoldedWidth];
    int64_t r = b.outer_begin;
    for (; !x.gather && r + 4 * fold <= b.outer_end; r += 4 * fold) {
        const T* const rows[4] = {x.rows.at(r), x.rows.at(r + fold), x.rows.at(r + 2 * fold), x.rows.at(r + 3 * fold)};
        moments_rows<shifted>(rows, {NoWeight{}, NoWeight{}, NoWeight{}, NoWeight{}}, width, a);
    }
    for (; r < b.outer_end; r += fold) {
        const int64_t n_rows = b.outer_end - r < fold ? b.outer_end - r : fold;
        const T* const rows[1] = {x.at(r, n_rows, buffer)};
        moments_rows<shifted>(rows, {NoWeight{}}, n_rows * x.channels, a);
    }
}

// The rows that count, as if the others were not there: where all do, lanes and bits are those of moments_every_row. counts(r) tells,
// weight(r) is a OneWeight, or NoWeight.
template <bool shifted, class T, class Counts, class Weight>
BATCHNORM_INLINE void moments_some_rows(const FoldedRows<T>& x, const MomentsArgs& a, Counts counts, Weight weight) {
    const Box& b = a.where.box;
    using One = decltype(weight(0));
    const T* rows[4];
    One w[4];
    int n = 0;
    for (int64_t r = b.outer_begin; r < b.outer_end; ++r) {
        if (!counts(r)) continue;
        rows[n] = x.rows.at(r);
        w[n] = weight(r);
        if (++n < 4) continue;
        moments_rows<shifted, 4, T, One>(rows, w, x.channels, a);
        n = 0;
    }
    for (int j = 0; j < n; ++j) moments_rows<shifted, 1, T, One>({rows[j]}, {w[j]}, x.channels, a);
}

// The same with folded rows, gathered.
template <bool shifted, class T, class Counts, class Weight>
BATCHNORM_INLINE void moments_some_folded_rows(const FoldedRows<T>& x, const MomentsArgs& a, Counts counts, Weight weight) {
    constexpr bool given = decltype(weight(0))::given;
    const Box& b = a.where.box;
    T buffer[kMaxFoldedWidth];
    double weights[given ? kMaxFoldedWidth : 1];
    int64_t n = 0;
    const auto sum = [&] {
        if constexpr (given) {
            moments_rows<shifted, 1, T, FoldedWeights>({buffer}, {{weights}}, n * x.channels, a);
        } else {
            moments_rows<shifted, 1, T, NoWeight>({buffer}, {{}}, n * x.channels, a);
        }
    };
    for (int64_t r = b.outer_begin; r < b.outer_end; ++r) {
        if (!counts(r)) continue;
        x.copy(r, buffer + n * x.channels);
        if constexpr (given) {
            for (int64_t c = 0; c < x.channels; ++c) weights[n * x.channels + c] = weight(r).value;
        }
        if (++n < a.where.fold) continue;
        sum();
        n = 0;
    }
    if (n > 0) sum();
}

// Where single elements count: those whose bit is set, or each with a weight of its own, its row's or 0.
template <class T>
__attribute__((noinline)) void moments_elements(const FoldedRows<T>& x, const MomentsArgs& a) {
    const Box& b = a.where.box;
    const int64_t fold = a.where.fold;
    const KeptElements kept(a.kept, b);
    const double* const row_weights = (const double*)a.weights.data;
    T buffer[kMaxRow];
    double weights[kMaxRow];
    int64_t r = b.outer_begin;
    const auto bits = [&](int64_t row) { return KeptBits{kept.bits, row * kept.stride + kept.channel_begin}; };
    for (; row_weights == nullptr && !x.gather && r + 4 * fold <= b.outer_end; r += 4 * fold) {
        const T* const rows[4] = {x.rows.at(r), x.rows.at(r + fold), x.rows.at(r + 2 * fold), x.rows.at(r + 3 * fold)};
        moments_rows<true>(rows, {bits(r), bits(r + fold), bits(r + 2 * fold), bits(r + 3 * fold)}, fold * x.channels, a);
    }
    for (; r < b.outer_end; r += fold) {
        const int64_t n_rows = b.outer_end - r < fold ? b.outer_end - r : fold, width = n_rows * x.channels;
        const T* const rows[1] = {x.at(r, n_rows, buffer)};
        if (row_weights == nullptr) {
            moments_rows<true>(rows, {bits(r)}, width, a);
            continue;
        }
        for (int64_t j = 0; j < n_rows; ++j) {
            for (int64_t c = 0; c < x.channels; ++c) {
                const int64_t e = j * x.channels + c;
                weights[e] = (kept.at(r, e) & 1) != 0 ? row_weights[r + j] : 0;
            }
        }
        moments_rows<true, 1, T, FoldedWeights>(rows, {{weights}}, width, a);
    }
}

template <bool shifted, Count count, class T>
BATCHNORM_INLINE void moments_nsc_as(const MomentsArgs& a) {
    const FoldedRows<T> x(a.x, a.where);
    const int64_t fold = a.where.fold, width = fold * x.channels;
    memset(a.sum, 0, (size_t)round_up(width) * sizeof(double));
    memset(a.sum_sq, 0, (size_t)round_up(width) * sizeof(double));
    if constexpr (count == every) {
        moments_every_row<shifted>(x, a, width);
    } else {
        const uint8_t* const kept_rows = a.kept.data;
        const double* const weights = (const double*)a.weights.data;
        const auto counts = [=](int64_t r) { return count == kept ? kept_rows[r] != 0 : weights[r] > 0; };
        const auto weight = [=](int64_t r) {
            if constexpr (count == kept) {
                return NoWeight{};
            } else {
                return OneWeight{weights[r]};
            }
        };
        fold == 1 ? moments_some_rows<shifted>(x, a, counts, weight) : moments_some_folded_rows<shifted>(x, a, counts, weight);
    }
}

// A Count as a constant.
template <Count c>
struct CountIs {
    static constexpr Count value = c;
};

// Runs `as` with the two choices as constants.
template <class T, class As>
BATCHNORM_INLINE void moments_flags(const MomentsArgs& a, As as) {
    if (a.weights.data != nullptr) return as(Flag<true>{}, CountIs<weighted>{});
    const auto counted = [&](auto shifted) { a.kept.data == nullptr ? as(shifted, CountIs<every>{}) : as(shifted, CountIs<kept>{}); };
    if constexpr (is_double<T>) {
        counted(Flag<true>{});
    } else if constexpr (is_integer<T>) {
        counted(Flag<false>{});
    } else {
        with_flag(a.shift != nullptr, counted);
    }
}

template <class T>
void moments_ncs(const MomentsArgs& a) noexcept {
    moments_flags<T>(a, [&](auto shifted, auto count) { moments_ncs_as<decltype(shifted)::value, decltype(count)::value, T>(a); });
}

template <class T>
void moments_nsc(const MomentsArgs& a) noexcept {
    if (a.kept.channel_stride != 0) {
        const FoldedRows<T> x(a.x, a.where);
        memset(a.sum, 0, (size_t)round_up(a.where.fold * x.channels) * sizeof(double));
        memset(a.sum_sq, 0, (size_t)round_up(a.where.fold * x.channels) * sizeof(double));
        return moments_elements(x, a);
    }
    moments_flags<T>(a, [&](auto shifted, auto count) { moments_nsc_as<decltype(shifted)::value, decltype(count)::value, T>(a); });
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
