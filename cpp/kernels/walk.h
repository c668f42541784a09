// How kernels walk a box: addresses of runs (ncs) and of rows (nsc), and the per-channel values an element meets. Used by the
// four kernels; knows no operation.
#pragma once

#include "vec.h"

namespace batchnorm::BATCHNORM_ISA {
namespace {

using kernels::Box;
using kernels::kLanes;
using kernels::kMaxFoldedWidth;
using kernels::Operand;
using kernels::Where;

BATCHNORM_INLINE int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Direction ncs: the run of channel c (counted from the box's first) at outer index n.
template <class T>
struct Runs {
    T* base;
    int64_t outer_stride, channel_stride;

    BATCHNORM_INLINE Runs(const Operand& o, const Box& b)
        : base((T*)o.data + b.channel_begin * o.channel_stride + b.inner_begin),
          outer_stride(o.outer_stride),
          channel_stride(o.channel_stride) {}
    BATCHNORM_INLINE T* at(int64_t n, int64_t c) const { return base + n * outer_stride + c * channel_stride; }
};

// Direction nsc: row r, its first element being the box's first channel.
template <class T>
struct Rows {
    T* base;
    int64_t outer_stride, inner_stride, split;

    BATCHNORM_INLINE Rows(const Operand& o, const Where& w)
        : base((T*)o.data + w.box.channel_begin), outer_stride(o.outer_stride), inner_stride(o.inner_stride), split(w.row_split) {}
    BATCHNORM_INLINE T* at(int64_t r) const {
        return split == 1 ? base + r * outer_stride : base + r / split * outer_stride + r % split * inner_stride;
    }
    // Consecutive rows follow one another in memory without a gap.
    BATCHNORM_INLINE bool dense(int64_t channels) const { return split == 1 && outer_stride == channels; }
};

// Direction nsc, for reading: `fold` rows as one. Rows that do not lie side by side are gathered into a buffer first, so that
// the lanes, and with them the bits of every sum, are those of a dense array.
template <class T>
struct FoldedRows {
    Rows<const T> rows;
    int64_t channels;
    bool gather;

    BATCHNORM_INLINE FoldedRows(const Operand& o, const Where& w)
        : rows(o, w), channels(w.box.channel_end - w.box.channel_begin), gather(w.fold > 1 && !rows.dense(channels)) {}
    BATCHNORM_INLINE const T* at(int64_t first_row, int64_t n_rows, T* buffer) const {
        if (!gather) return rows.at(first_row);
        for (int64_t j = 0; j < n_rows; ++j) {
            memcpy(buffer + j * channels, rows.at(first_row + j), (size_t)channels * sizeof(T));
        }
        return buffer;
    }
};

// Per-channel Compute values as an element meets them: one value for a whole run, or one per element of a row.
template <class C>
struct Broadcast {
    typename BlockOf<C>::type value;
    BATCHNORM_INLINE Broadcast(const void* values, int64_t c) : value(Ops<typename BlockOf<C>::type>::broadcast(((const C*)values)[c])) {}
    BATCHNORM_INLINE typename BlockOf<C>::type at(int64_t) const { return value; }
};
template <class C>
struct PerElement {
    const C* values;
    BATCHNORM_INLINE PerElement(const void* v) : values((const C*)v) {}
    BATCHNORM_INLINE typename BlockOf<C>::type at(int64_t k) const { return Ops<typename BlockOf<C>::type>::load(values + k); }
};

// From so many elements on, stores of whole cache lines are worth a head: a store across two lines reads both before it writes.
inline constexpr int64_t kWorthAligning = 512;

// Covers n elements by a head up to alignment, full blocks and a tail: full(e, k) for 16 elements from e,
// part(e, k, m) for m < 16, the same expression on fewer lanes. k is where the element's per-channel values start: e modulo `period`, for
// rows that follow one another without a gap; a single run or row has no period. A block may reach 15 values past the period, where
// the per-channel arrays repeat their start.
inline constexpr int64_t kNoPeriod = INT64_MAX;
template <class Full, class Part>
BATCHNORM_INLINE void for_blocks(int64_t head, int64_t n, int64_t period, Full full, Part part) {
    int64_t e = 0, k = 0, m = head < n ? head : n;
    for (;;) {  // at most twice, so that the code of `part` is there once
        if (m > 0) part(e, k, m);
        e += m;
        k += m;
        while (e + kLanes <= n) {
            const int64_t last = n - kLanes - e < period - 1 - k ? n - kLanes : e + (period - 1 - k);
            for (; e <= last; e += kLanes, k += kLanes) full(e, k);
            if (k >= period) k -= period;
        }
        m = n - e;
        if (m == 0) return;
    }
}

// The same for sums, which need no alignment and no period: full(e), part(e, m).
template <class Full, class Part>
BATCHNORM_INLINE void for_run(int64_t n, Full full, Part part) {
    int64_t e = 0;
    for (; e + kLanes <= n; e += kLanes) full(e);
    if (e < n) part(e, n - e);
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "masks are read by words");

// The 16 bits of a mask from number `first` on, in the lowest places; those above are anything.
BATCHNORM_INLINE uint32_t mask_bits(const uint8_t* bits, int64_t first) {
    uint32_t word;
    memcpy(&word, bits + (first >> 3), sizeof word);
    return word >> (first & 7);
}

// Two sums of each channel of a group, from their lanes. Out of line: inlined it is vectorised over the channels, to more code than the
// loop it ends.
__attribute__((noinline)) void sum_group(const double (*lanes)[2][kLanes], int64_t group, double* first, double* second) {
    for (int64_t c = 0; c < group; ++c) {
        first[c] = sum_lanes(lanes[c][0]);
        second[c] = sum_lanes(lanes[c][1]);
    }
}

// Writes a stretch of a mask from bit `first` on, 16 bits or fewer at a time; finish() ends it. Bits before and behind stay.
template <bool wanted>
class MaskWriter {
public:
    BATCHNORM_INLINE MaskWriter(uint8_t* bits, int64_t first)
        : p_(bits + (first >> 3)), fill_(first & 7), pending_(fill_ == 0 ? 0 : *p_ & ((1u << fill_) - 1)) {}
    BATCHNORM_INLINE void put(uint32_t bits) {
        pending_ |= bits << fill_;
        flush();
    }
    BATCHNORM_INLINE void put(uint32_t bits, int64_t n) {
        pending_ |= (bits & ((1u << n) - 1)) << fill_;
        fill_ += n;
        if (fill_ >= 16) {
            flush();
            fill_ -= 16;
        }
    }
    BATCHNORM_INLINE void finish() {
        if (fill_ >= 8) {
            *p_++ = (uint8_t)pending_;
            pending_ >>= 8;
            fill_ -= 8;
        }
        if (fill_ > 0) *p_ = (uint8_t)((*p_ & ~((1u << fill_) - 1)) | pending_);
    }

private:
    BATCHNORM_INLINE void flush() {
        const uint16_t full = (uint16_t)pending_;
        memcpy(p_, &full, sizeof full);
        p_ += sizeof full;
        pending_ >>= 16;
    }
    uint8_t* p_;
    int64_t fill_;      // bits not yet written, below 16
    uint32_t pending_;  // these bits
};
template <>
class MaskWriter<false> {
public:
    BATCHNORM_INLINE MaskWriter(uint8_t*, int64_t) {}
    BATCHNORM_INLINE void put(uint32_t) {}
    BATCHNORM_INLINE void put(uint32_t, int64_t) {}
    BATCHNORM_INLINE void finish() {}
};

// A gate as a constant: calls f(GateIs<gate>{}).
template <kernels::Gate g>
struct GateIs {
    static constexpr kernels::Gate value = g;
};
template <class F>
BATCHNORM_INLINE void with_gate(kernels::Gate gate, F f) {
    switch (gate) {
        case kernels::open:
            return f(GateIs<kernels::open>{});
        case kernels::relu:
            return f(GateIs<kernels::relu>{});
        case kernels::masked:
            return f(GateIs<kernels::masked>{});
        case kernels::curve:
            return f(GateIs<kernels::curve>{});
    }
}

// Gate curve, whose work per block is large, asks as it runs what the other gates have as constants: a variant for each answer would
// cost more size than it saves time.
template <kernels::Gate gate>
inline constexpr bool asks = gate == kernels::curve;

// A run-time flag as a constant: calls f(Flag<true>{}) or f(Flag<false>{}).
template <bool b>
struct Flag {
    static constexpr bool value = b;
};
template <class F>
BATCHNORM_INLINE void with_flag(bool flag, F f) {
    flag ? f(Flag<true>{}) : f(Flag<false>{});
}

}  // namespace
}  // namespace batchnorm::BATCHNORM_ISA
