// Small calls in one launch: a block does all for some channels of a part, in the phases that are kernels of their own elsewhere, while
// the data is in its caches. What the phases are made of is the same, and so are the bits.
#pragma once

#include <algorithm>

#include "core/tuning.h"
#include "pass.h"

namespace batchnorm::cuda {

// Channels of a block: as many as share a sector of memory where channels are side by side, and otherwise as few as give its 16 pairs of a
// tile and a channel something to do; unless the block's elements get too many.
inline int64_t channels_of_block(const Shape& s, const Tiling& tiling) {
    const int64_t most = tune::get(tune::gpu_block_values), of_channel = s.parts.rows * s.inner;
    int64_t width = s.runs() ? 1 : Merge::kChannels;
    while (s.runs() && width < Merge::kChannels && 2 * width * of_channel <= most / 4 && 2 * width * tiling.most.tiles() <= 16) width *= 2;
    while (width > 1 && (width * of_channel > most || width / 2 >= s.channels)) width /= 2;
    return width;
}

// Whether blocks that do all for their channels are small enough, and so few that they run at once. Rows that are folded go with all their
// channels, and bits by eight elements, whatever their channels.
inline bool is_small(const Shape& s, const Tiling& tiling, bool bits) {
    constexpr int64_t kMostBlocks = 528;
    const int64_t width = channels_of_block(s, tiling), blocks = s.parts.count * blocks_for(s.channels, width);
    const bool apart = s.runs() || tiling.last.fold == 1;
    return apart && !bits && s.group_outer == 0 && width * s.parts.rows * s.inner <= tune::get(tune::gpu_block_values) &&
           blocks <= kMostBlocks;
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
    typename SumRuns<Op, 256>::Shared runs;
    typename SumRows<Op>::Shared rows;
};
template <class Op>
BATCHNORM_KERNEL_BODY void sum_share(const ThreadBlock& block, SharedSums<Op>& shared, const Op& op, const Merge& merge,
                                     const Share& share) {
    const Range range{merge.tiling.before(share.part), Tiling::of_plan(merge.tiling.plan(share.part)), share.begin,
                      share.end - share.begin};
    if (merge.shape.runs()) {
        SumRuns<Op, 256>::sum(block, shared.runs, op, merge.shape, merge.tiling, merge.tiles, range, 0, 1);
    } else {
        SumRows<Op>::sum(block, shared.rows, op, merge.shape, merge.tiling, merge.tiles, range, 0, 1);
    }
}

// The elements of a share, one by one: neighbours go to neighbouring threads, a few of each on their way together.
template <class Op>
BATCHNORM_KERNEL_BODY void pass_over(const ThreadBlock& block, const Share& share, int threads, const Op& op) {
    constexpr int kTogether = 4;
    const Shape& s = op.shape;
    block.each([&](int thread) {
        const auto width = static_cast<std::uint32_t>(share.end - share.begin), inner = static_cast<std::uint32_t>(s.inner);
        const auto n = static_cast<std::uint32_t>(s.parts.size(share.part) * s.inner) * width, step = static_cast<std::uint32_t>(threads);
        const int64_t first = s.parts.begin(share.part);
        const auto unit = [&](std::uint32_t e) {
            const Place place = s.runs() ? Place{first + e / inner / width, share.begin + e / inner % width, e % inner}
                                         : Place{first + e / width / inner, share.begin + e % width, e / width % inner};
            return typename Op::Elements(s, place);
        };
        typename Op::Numbers numbers;
        NumbersOfUnit found;
        for (auto e = static_cast<std::uint32_t>(thread); e < n; e += kTogether * step) {
            typename Op::Input input[kTogether];
#pragma unroll
            for (std::uint32_t k = 0; k < kTogether; ++k) {
                if (e + k * step < n) op.load(unit(e + k * step), input[k]);
            }
#pragma unroll
            for (std::uint32_t k = 0; k < kTogether; ++k) {
                if (e + k * step < n) op.put(unit(e + k * step), input[k], numbers, found);
            }
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
    ApplyOp<T, gate, false> apply;
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
        pass_over(block, share, kThreads, apply);
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
    GradApplyOp<T, gate, false> apply;
    int64_t width;

    int64_t blocks() const { return Share::blocks(apply.shape, width); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared& shared) const {
        const Shape& shape = apply.shape;
        const Share share(shape, width, block.index());
        if (finish.summed) sum_share(block, shared, sums, finish.merge, share);
        finish.finish(block, share.part, share.begin, share.end);
        if (apply.dx || apply.dz) pass_over(block, share, kThreads, apply);
    }
};

}  // namespace batchnorm::cuda
