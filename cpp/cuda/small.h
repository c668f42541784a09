// Small calls in one launch: a block does all for some channels of a part, in the phases that are kernels of their own elsewhere, while
// the data is in its caches. What the phases are made of is the same, and so are the bits.
#pragma once

#include <algorithm>

#include "core/tuning.h"
#include "pass.h"

namespace batchnorm::cuda {

// Channels of a block: one where a channel's values lie together, else as many as share a sector of memory.
inline int64_t channels_of_block(const Shape& s) { return s.runs() ? 1 : std::min<int64_t>(Merge::kChannels, s.channels); }

// Whether a channel of a part is small enough for one block, and the call for all of them to run at once. Rows that are folded go with all
// their channels, and bits by eight elements, whatever their channels.
inline bool is_small(const Shape& s, const Tiling& tiling, bool bits) {
    constexpr int64_t kMostElements = int64_t{1} << 22;
    const bool apart = s.runs() || tiling.last.fold == 1;
    return apart && !bits && s.group_outer == 0 && s.parts.rows * s.inner <= tune::get(tune::gpu_block_values) &&
           s.elements() <= kMostElements;
}

// What one block does.
struct Share {
    int64_t part, begin, end;

    BATCHNORM_HOST_DEVICE Share(const Shape& s, int64_t width, int64_t block) {
        const int64_t columns = (s.channels + width - 1) / width;
        part = block / columns;
        begin = block % columns * width;
        end = begin + width < s.channels ? begin + width : s.channels;
    }
    static int64_t blocks(const Shape& s, int64_t width) { return s.parts.count * blocks_for(s.channels, width); }
};

template <class Op>
union SharedSums {
    typename SumRuns<Op>::Shared runs;
    typename SumRows<Op>::Shared rows;
};
template <class Op>
BATCHNORM_KERNEL_BODY void sum_share(const ThreadBlock& block, SharedSums<Op>& shared, const Op& op, const Merge& merge,
                                     const Share& share) {
    const Range range{merge.tiling.before(share.part), Tiling::of_plan(merge.tiling.plan(share.part)), share.begin,
                      share.end - share.begin};
    if (merge.shape.runs()) {
        SumRuns<Op>::sum(block, shared.runs, op, merge.shape, merge.tiling, merge.tiles, range, 0, 1);
    } else {
        SumRows<Op>::sum(block, shared.rows, op, merge.shape, merge.tiling, merge.tiles, range, 0, 1);
    }
}

// The elements of a share, one by one: neighbours go to neighbouring threads.
template <class Op>
BATCHNORM_KERNEL_BODY void pass_over(const ThreadBlock& block, const Shape& s, const Share& share, int threads, const Op& op) {
    block.each([&](int thread) {
        const auto width = static_cast<std::uint32_t>(share.end - share.begin), inner = static_cast<std::uint32_t>(s.inner);
        const auto n = static_cast<std::uint32_t>(s.parts.size(share.part) * s.inner) * width;
        const int64_t first = s.parts.begin(share.part);
        typename Op::Numbers numbers;
        NumbersOfUnit found;
        for (auto e = static_cast<std::uint32_t>(thread); e < n; e += static_cast<std::uint32_t>(threads)) {
            const Place place = s.runs() ? Place{first + e / inner / width, share.begin + e / inner % width, e % inner}
                                         : Place{first + e / width / inner, share.begin + e % width, e / width % inner};
            op(typename Op::Elements(s, place), numbers, found);
        }
    });
}

template <class T, Gate gate>
struct SmallForward {
    static constexpr int kThreads = 256;
    using Shared = SharedSums<MomentsOp<T>>;
    bool measures;  // else statistics are given
    FindShift<T> find_shift;
    MomentsOp<T> moments;
    FinishStatistics<Settle<Compute<T>>> finish;
    ApplyOp<T, gate> apply;
    int64_t width;

    int64_t blocks() const { return Share::blocks(apply.shape, width); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared& shared) const {
        const Shape& shape = apply.shape;
        const Share share(shape, width, block.index());
        if (measures) {
            if (is_double<T>) {
                block.each([&](int thread) {
                    if (share.begin + thread < share.end) find_shift.find(share.part, share.begin + thread);
                });
            }
            for (int round = 0; round < (is_double<T> ? kRounds : 2); ++round) {
                if (round > 0 && !wanted(share, round)) continue;
                sum_share(block, shared, in_round(moments, finish.to, round), finish.merge, share);
                finish.finish(block, round, share.part, share.begin, share.end);
            }
        } else {
            block.each([&](int thread) {
                if (share.begin + thread < share.end) finish.then(share.part, share.begin + thread);
            });
        }
        pass_over(block, shape, share, kThreads, apply);
    }

private:
    BATCHNORM_KERNEL_BODY bool wanted(const Share& share, int round) const {
        const int64_t channels = apply.shape.channels, n = apply.shape.parts.count * channels;
        bool any = false;
        for (int64_t c = share.begin; c < share.end; ++c) any |= finish.to.again[round * n + share.part * channels + c] != 0;
        return any;
    }
};

template <class T, Gate gate>
struct SmallBackward {
    static constexpr int kThreads = 256;
    using Shared = SharedSums<GradSumsOp<T, gate>>;
    GradSumsOp<T, gate> sums;
    FinishGradients<Compute<T>> finish;
    GradApplyOp<T, gate> apply;
    int64_t width;

    int64_t blocks() const { return Share::blocks(apply.shape, width); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared& shared) const {
        const Shape& shape = apply.shape;
        const Share share(shape, width, block.index());
        if (finish.summed) sum_share(block, shared, sums, finish.merge, share);
        finish.finish(block, share.part, share.begin, share.end);
        if (apply.dx || apply.dz) pass_over(block, shape, share, kThreads, apply);
    }
};

}  // namespace batchnorm::cuda
