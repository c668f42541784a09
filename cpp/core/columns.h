// Numbers per channel, taken several channels at a time. A column holds one number of each of up to kColumn channels, in an array of its
// own on the stack: per-channel work goes from columns to columns, by loops over the formulas of coeffs.h that the compiler vectorises,
// as it sees that columns do not overlap. Used by the drivers; knows no operation.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "workspace.h"

namespace batchnorm {

// Channels of a column: a dozen columns stay in L1.
inline constexpr int64_t kColumn = 128;

// f(i) for the n entries of columns. Of few channels one by one: vectors are read a moment after their halves were written, and wait for
// that longer than they save.
template <class F>
__attribute__((always_inline)) inline void for_entries(int64_t n, const F& f) {
    if (n < 1) __builtin_unreachable();  // g++ 12 would warn that columns may stay empty
    if (n < 8) {
        for (int64_t i = 0; i < n; ++i) {
            asm volatile("");  // the compiler leaves this loop as it is
            f(i);
        }
    } else {
        for (int64_t i = 0; i < n; ++i) f(i);
    }
}

template <class T>
struct Column {
    alignas(64) T value[kColumn];  // NOLINT: uninitialized

    Column() = default;
    Column(const T* from, int64_t n) {
        for_entries(n, [&](int64_t i) { value[i] = from[i]; });
    }
    // n channels from c on; where the argument is absent, `otherwise`.
    template <bool writable>
    Column(const AnyChannels<writable>& from, int64_t c, int64_t n, T otherwise = 0) {
        if (!from) {
            for_entries(n, [&](int64_t i) { value[i] = otherwise; });
        } else if (from.is_double) {
            take(static_cast<const double*>(from.data) + c * from.stride, from.stride, n);
        } else {
            take(static_cast<const float*>(from.data) + c * from.stride, from.stride, n);
        }
    }
    void put(const Channels& to, int64_t c, int64_t n) const {
        if (!to) return;
        if (to.is_double) {
            give(static_cast<double*>(to.data) + c * to.stride, to.stride, n);
        } else {
            give(static_cast<float*>(to.data) + c * to.stride, to.stride, n);
        }
    }
    void put(T* to, int64_t n) const {
        for_entries(n, [&](int64_t i) { to[i] = value[i]; });
    }
    T& operator[](int64_t i) { return value[i]; }
    const T& operator[](int64_t i) const { return value[i]; }

private:
    template <class S>
    void take(const S* from, int64_t stride, int64_t n) {
        if (stride == 1) {
            for_entries(n, [&](int64_t i) { value[i] = static_cast<T>(from[i]); });
        } else {
            for_entries(n, [&](int64_t i) { value[i] = static_cast<T>(from[i * stride]); });
        }
    }
    template <class S>
    void give(S* to, int64_t stride, int64_t n) const {
        if (stride == 1) {
            for_entries(n, [&](int64_t i) { to[i] = static_cast<S>(value[i]); });
        } else {
            for_entries(n, [&](int64_t i) { to[i * stride] = static_cast<S>(value[i]); });
        }
    }
};

// What a column of numbers per group and channel stands for: n channels of one group, or n groups of one channel (`down`), which is how few
// channels of many groups fill a column.
struct Cells {
    int64_t group, channel, n;
    bool down;

    int64_t channel_of(int64_t i) const { return down ? channel : channel + i; }
    // Of numbers per channel, and of the column of channels from `first` on.
    Column<double> of(const double* channels) const { return spread(channels + channel); }
    Column<double> of(const Column<double>& channels, int64_t first) const { return spread(channels.value + (channel - first)); }
    // Of rows of which one belongs to each group, that of the first being number `row`; where they are absent, `otherwise`.
    Column<double> of(const ConstRows& rows, int64_t row, double otherwise) const {
        ConstChannels of_row = row_of(rows, row);
        if (!rows || !down) return {of_row, channel, n, otherwise};
        of_row.data = static_cast<const std::byte*>(of_row.data) + channel * of_row.stride * (of_row.is_double ? 8 : 4);
        of_row.stride = rows.rows == 0 ? 0 : rows.row_stride;
        return {of_row, 0, n, otherwise};
    }
    // To a matrix of groups by channels.
    void put(const Column<double>& column, double* matrix, int64_t channels) const {
        double* const to = matrix + group * channels + channel;
        if (!down) return column.put(to, n);
        for (int64_t i = 0; i < n; ++i) to[i * channels] = column[i];
    }

private:
    Column<double> spread(const double* of_first) const {
        if (!down) return {of_first, n};
        Column<double> same;
        for_entries(n, [&](int64_t i) { same[i] = *of_first; });
        return same;
    }
};
// f(cells) for n channels from c on in each of some groups.
template <class F>
void for_cells(int64_t groups, bool down, int64_t c, int64_t n, const F& f) {
    constexpr int64_t kFew = 8;
    down = down && n < kFew && groups >= kFew;
    for (int64_t i = 0; down && i < n; ++i) {
        for (int64_t q = 0; q < groups; q += kColumn) f(Cells{q, c + i, std::min(kColumn, groups - q), true});
    }
    for (int64_t q = 0; !down && q < groups; ++q) f(Cells{q, c, n, false});
}

// f(c, n) for columns of n channels from c on that make up those from c0 to c1.
template <class F>
void by_columns(int64_t c0, int64_t c1, const F& f) {
    for (int64_t c = c0; c < c1; c += kColumn) f(c, std::min(kColumn, c1 - c));
}

// A per-channel array of channels from c0 to c1 as the kernels read it: each value `fold` times over, then the first ones again, padded to
// whole blocks. (By blocks of channels, the last block's unused lanes read the repeated start while the first block's thread may write it;
// nobody uses them.) Blocks start on the output's cache lines, so the first of them starts at value number `lead` of the row: that lies on
// a cache line as well (D16).
template <class T>
class Row {
public:
    // Inlined wherever a pass makes a dozen of them: small calls would feel it.
    __attribute__((always_inline)) Row(Workspace& ws, const Plan& plan, int64_t c0, int64_t c1, int64_t lead = 0)
        : c0_(c0), channels_(c1 - c0), fold_(plan.fold), by_vectors_(plan.direction == kernels::nsc) {
        constexpr int64_t kLine = 64 / sizeof(T);
        const int64_t width = channels_ * fold_, padded = (width + 2 * kernels::kLanes - 1) / kernels::kLanes * kernels::kLanes;
        const int64_t before = by_vectors_ && channels_ == plan.channels ? (kLine - lead % kLine) % kLine : 0;
        data_ = ws.take<T>(before + padded) + before;
        if (by_vectors_) std::fill(data_ + width, data_ + padded, T{0});
    }
    void fill(T value) { std::fill(data_, data_ + channels_ * fold_ + kernels::kLanes, value); }
    void put(int64_t c, int64_t n, const Column<T>& column) {
        if (fold_ > 1) return put_folded(column);
        c -= c0_;
        column.put(data_ + c, n);
        if (by_vectors_ && c < kernels::kLanes) column.put(data_ + channels_ + c, std::min(n, kernels::kLanes - c));
    }
    using Columns = Column<T>;
    void set(int64_t c, const Column<T>& column, int64_t i) { data_[c - c0_] = column[i]; }
    T* from(int64_t c) const { return data_ + (c - c0_); }
    Column<T> column(int64_t c, int64_t n) const { return {data_ + (c - c0_), n}; }
    double operator[](int64_t c) const { return data_[c - c0_]; }

private:
    // Folded rows have few channels, which are always taken together.
    void put_folded(const Column<T>& column) {
        column.put(data_, channels_);
        const int64_t size = fold_ * channels_ + kernels::kLanes;
        for (int64_t filled = channels_; filled < size; filled *= 2) std::copy_n(data_, std::min(filled, size - filled), data_ + filled);
    }
    T* data_ = nullptr;
    int64_t c0_ = 0, channels_ = 0, fold_ = 1;
    bool by_vectors_ = true;  // else (ncs) one value at a time is read
};

}  // namespace batchnorm
