// How kernels walk a box: addresses of runs (ncs) and of rows (nsc), and the per-channel values an element meets. Used by the
// kernels; knows no operation.
#pragma once

#include "elements.h"

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

// Direction ncs: an output whose stores go past the caches, in runs that share cache lines. They are put together here, and leave as whole
// lines: one that was stored in two parts would be written to memory twice (D16).
class Stage {
public:
    // In runs of more bytes few lines are shared.
    static constexpr int64_t kMostRun = 1024;
    template <class T>
    static BATCHNORM_INLINE bool wanted(const Operand& out, const Box& b) {
        const int64_t run = (b.inner_end - b.inner_begin) * (int64_t)sizeof(T);
        return run <= kMostRun && (((uintptr_t)Runs<T>(out, b).base | (uintptr_t)run) & (kLine - 1)) != 0;
    }
    // Where n elements are made that belong to `out`. Those before are ready.
    template <class T>
    BATCHNORM_INLINE T* place(T* out, int64_t n) {
        if ((uintptr_t)out != line_ + (uintptr_t)end_) {
            finish();
            begin_ = end_ = (int64_t)((uintptr_t)out & (kLine - 1));
            line_ = (uintptr_t)out - (uintptr_t)end_;
        } else if (end_ + kMostRun > kBytes) {
            leave();
        }
        T* const here = (T*)(void*)(bytes_ + end_);
        end_ += n * (int64_t)sizeof(T);
        return here;
    }
    __attribute__((noinline)) void finish() {
        leave();
        if (end_ > begin_) memcpy((char*)line_ + begin_, bytes_ + begin_, (size_t)(end_ - begin_));
        begin_ = end_;
    }

private:
    static constexpr uintptr_t kLine = 64;
    static constexpr int64_t kBytes = 8192;

    // All whole lines leave; what is behind them comes to the front.
    __attribute__((noinline)) void leave() {
        const int64_t whole = end_ / (int64_t)kLine * (int64_t)kLine;
        if (whole == 0) return;
        char* const to = (char*)line_;
        int64_t at = 0;
        if (begin_ > 0) {
            at = (int64_t)kLine;
            memcpy(to + begin_, bytes_ + begin_, (size_t)(at - begin_));
        }
        for (; at < whole; at += (int64_t)kLine) store_stream((float*)(void*)(to + at), load((const float*)(const void*)(bytes_ + at)));
        memcpy(bytes_, bytes_ + whole, (size_t)kLine);
        line_ += (uintptr_t)whole;
        begin_ = 0;
        end_ -= whole;
    }

    alignas(64) char bytes_[kBytes + kLine];
    uintptr_t line_ = 0;           // of the output, where bytes_ begins
    int64_t begin_ = 0, end_ = 0;  // what is in bytes_
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

// n elements become 0.
template <class T>
BATCHNORM_INLINE void clear(T* p, int64_t n) {
    memset((void*)p, 0, (size_t)n * sizeof(T));
}

// Direction nsc: which rows count, a byte each, and which elements do, bits of a row that starts at bit r * stride. One of them, or none.
BATCHNORM_INLINE const uint8_t* kept_rows(const kernels::Kept& k) { return k.channel_stride == 0 ? k.data : nullptr; }
BATCHNORM_INLINE kernels::Kept kept_elements(const kernels::Kept& k) { return k.channel_stride == 0 ? kernels::Kept{} : k; }
struct KeptElements {
    const uint8_t* bits;  // null: all count
    int64_t stride, channel_begin;

    BATCHNORM_INLINE KeptElements(const kernels::Kept& k, const Box& b)
        : bits(k.channel_stride == 0 ? nullptr : k.data), stride(k.outer_stride), channel_begin(b.channel_begin) {}
    // Of the block of a row at element e, in the lowest 16 bits.
    BATCHNORM_INLINE uint32_t at(int64_t row, int64_t e) const { return mask_bits(bits, row * stride + channel_begin + e) & kAllKept; }
    // n elements of a row, of which those that do not count become 0.
    template <class T>
    BATCHNORM_INLINE void clear_others(int64_t row, int64_t n, T* v) const {
        int64_t e = 0;
        for (; e + kLanes <= n; e += kLanes) store(v + e, where_kept(at(row, e), load(v + e)));
        if (e < n) store_part(v + e, n - e, where_kept(at(row, e), load_part(v + e, n - e)));
    }
};

// The most values of a (folded) row.
inline constexpr int64_t kMaxRow = kernels::kMaxChannelBlock;
static_assert(kMaxRow >= kMaxFoldedWidth);

// Direction nsc, for reading: `fold` rows as one. Rows that do not lie side by side, or of which single elements count, are gathered into a
// buffer of kMaxRow values first, so that the lanes, and with them the bits of every sum, are those of a dense array. There what does not
// count is 0.
template <class T>
struct FoldedRows {
    Rows<const T> rows;
    int64_t channels;
    const uint8_t* kept;
    KeptElements elements;
    bool gather;

    BATCHNORM_INLINE FoldedRows(const Operand& o, const Where& w, const kernels::Kept& k = {})
        : rows(o, w),
          channels(w.box.channel_end - w.box.channel_begin),
          kept(kept_rows(k)),
          elements(k, w.box),
          gather(elements.bits != nullptr || (w.fold > 1 && (kept != nullptr || !rows.dense(channels)))) {}
    BATCHNORM_INLINE const T* at(int64_t first_row, int64_t n_rows, T* buffer) const {
        if (!gather) return rows.at(first_row);
        for (int64_t j = 0; j < n_rows; ++j) {
            T* const to = buffer + j * channels;
            kept == nullptr || kept[first_row + j] != 0 ? copy(first_row + j, to) : clear(to, channels);
        }
        return buffer;
    }
    __attribute__((noinline)) void copy(int64_t row, T* to) const {
        memcpy(to, rows.at(row), (size_t)channels * sizeof(T));
        if constexpr (!is_integer<T>) {
            if (elements.bits != nullptr) elements.clear_others(row, channels, to);
        }
    }
};

// Direction nsc: the rows of a box that count, 4 at a time as long as there are so many (and `four`), then 1; in the end 0. Of folded rows
// all count: FoldedRows clears those that do not.
class RowsThatCount {
public:
    BATCHNORM_INLINE RowsThatCount(const Where& w, const uint8_t* kept)
        : r_(w.box.outer_begin), end_(w.box.outer_end), step_(w.fold), kept_(w.fold == 1 ? kept : nullptr) {}
    BATCHNORM_INLINE int next(int64_t (&row)[4], bool four) {
        if (four && kept_ == nullptr && r_ + 4 * step_ <= end_) {
            for (int j = 0; j < 4; ++j) row[j] = r_ + j * step_;
            r_ += 4 * step_;
            return 4;
        }
        const int most = four && kept_ != nullptr ? 4 : 1;
        int n = 0;
        for (int64_t r = r_; r < end_ && n < most; r += step_) {
            if (kept_ == nullptr || kept_[r] != 0) row[n++] = r;
        }
        n = n == 4 ? 4 : n > 0 ? 1 : 0;
        r_ = n == 0 ? end_ : row[n - 1] + step_;
        return n;
    }

private:
    int64_t r_, end_, step_;
    const uint8_t* kept_;
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
    int64_t e = 0, k = 0, m = head <= 0 ? 0 : head < n ? head : n;
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

// Which elements count of a run (n, c) of the box, or of rows from n on (c = 0): those from element e on.
struct KeptRun {
    const uint8_t* bits;  // null: all
    int64_t first;

    BATCHNORM_INLINE KeptRun(const kernels::Kept& k, const Box& b, int64_t n, int64_t c)
        : bits(k.data), first(n * k.outer_stride + (b.channel_begin + c) * k.channel_stride + b.inner_begin) {}
    BATCHNORM_INLINE uint32_t at(int64_t e) const { return bits == nullptr ? kAllKept : mask_bits(bits, first + e) & kAllKept; }
};

// Direction ncs: 16 weights from element e of the run at outer index n on.
template <class C>
struct RunWeights {
    const C* data;  // null: none
    int64_t step;

    BATCHNORM_INLINE RunWeights(const kernels::Weights& w, const Box& b, int64_t n)
        : data(w.data == nullptr ? nullptr : (const C*)w.data + n * w.outer_stride + b.inner_begin * w.inner_step), step(w.inner_step) {}
    BATCHNORM_INLINE typename BlockOf<C>::type at(int64_t e) const { return Ops<typename BlockOf<C>::type>::load(data + e * step); }
};
// Direction nsc: the weight of all elements of a row.
template <class C>
struct RowWeight {
    const C* data;  // null: none

    BATCHNORM_INLINE RowWeight(const kernels::Weights& w, int64_t r) : data(w.data == nullptr ? nullptr : (const C*)w.data + r) {}
    BATCHNORM_INLINE typename BlockOf<C>::type at(int64_t) const { return Ops<typename BlockOf<C>::type>::broadcast(*data); }
};

// The end of a stretch of rows from r on that count and have one weight.
template <class C>
__attribute__((noinline)) int64_t stretch_end(int64_t r, int64_t last, const uint8_t* kept, const C* weights) {
    if (kept == nullptr && weights == nullptr) return last;
    int64_t end = r + 1;
    while (end < last && (kept == nullptr || kept[end] != 0) && (weights == nullptr || weights[end] == weights[r])) ++end;
    return end;
}
// Direction nsc: calls f(r, n) for each stretch of n rows, from r on, that count and have one weight, then drop(r) for the rows that do
// not count. A stretch is one row unless rows follow one another without a gap (`dense`). Folded rows are too short for stretches that end
// at each row that does not count: f takes those too, and drop comes after.
template <class C, class F, class Drop>
BATCHNORM_INLINE void for_stretches(const Where& w, bool dense, const uint8_t* kept, const C* weights, F f, Drop drop) {
    const int64_t last = w.box.outer_end;
    const bool drop_after = w.fold > 1 && dense;
    const uint8_t* const first_kept = drop_after ? nullptr : kept;
    for (int64_t r = w.box.outer_begin; r < last;) {
        const int64_t begin = r++;
        if (first_kept != nullptr && first_kept[begin] == 0) {
            drop(begin);
        } else {
            if (dense) r = stretch_end(begin, last, first_kept, weights);
            f(begin, r - begin);
        }
    }
    if (!drop_after || kept == nullptr) return;
    for (int64_t r = w.box.outer_begin; r < last; ++r) {
        if (kept[r] == 0) drop(r);
    }
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
