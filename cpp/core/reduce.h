// How a call's plan is carried out: per-channel arrays as the kernels read them, sums over tiles in a fixed order, and the shape of
// every call with statistics, `sums_then_map`. Used by the drivers in batchnorm.cpp; knows plans and threads, no operation.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "check.h"
#include "coeffs.h"
#include "parallel.h"
#include "plan.h"
#include "workspace.h"

namespace batchnorm {

using kernels::Where;
using std::int64_t;

// Runs items, or throws if the user interrupted.
inline void for_each(int64_t n, const Plan& plan, parallel::Body body, bool backwards = false) {
    if (!parallel::for_each(n, plan.parallel, body, backwards)) check::interrupted();
}

// A per-channel array as the kernels read it: each value `fold` times over, then the first ones again, padded to whole blocks.
template <class T>
class Row {
public:
    Row() = default;
    Row(Workspace& ws, const Plan& plan) : data_(ws.take<T>(plan.padded_width())), channels_(plan.channels), fold_(plan.fold) {}
    void set(int64_t c, T value) {
        for (int64_t i = c; i < fold_ * channels_; i += channels_) {
            data_[i] = value;
            if (i < kernels::kLanes) data_[fold_ * channels_ + i] = value;
        }
    }
    T* from(int64_t c) const { return data_ == nullptr ? nullptr : data_ + c; }
    double operator[](int64_t c) const { return data_[c]; }

private:
    T* data_ = nullptr;
    int64_t channels_ = 0, fold_ = 1;
};

// The two sums of every channel, as the tiles added so far make them.
class ChannelSums {
public:
    ChannelSums(Workspace& ws, int64_t channels) : first_(ws.take<coeffs::Sum>(channels)), second_(ws.take<coeffs::Sum>(channels)) {}
    void clear(int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) first_[c] = second_[c] = {0, 0};
    }
    void add(int64_t c, double a, double b) {
        first_[c].add(a);
        second_[c].add(b);
    }
    double first(int64_t c) const { return first_[c].total(); }
    double second(int64_t c) const { return second_[c].total(); }

private:
    coeffs::Sum *first_, *second_;
};

// Two sums of one tile of one block of channels, folded rows added up in order: take(c, a, b) per channel. Kernel: void(const Where&,
// double*, double*), writing fold * channels sums.
template <class Kernel, class Take>
void tile_sums(const Plan& plan, int64_t tile, int64_t block, const Kernel& kernel, const Take& take) {
    alignas(64) double a[kMaxChannelBlock], b[kMaxChannelBlock];
    const Where where = plan.tile(tile, block);
    kernel(where, a, b);
    const int64_t c0 = where.box.channel_begin, channels = where.box.channel_end - c0;
    for (int64_t c = 0; c < channels; ++c) {
        double s = a[c], t = b[c];
        for (int64_t j = 1; j < plan.fold; ++j) {
            s += a[j * channels + c];
            t += b[j * channels + c];
        }
        take(c0 + c, s, t);
    }
}

// All sums of one block: its tiles one after another.
template <class Kernel>
void block_sums(const Plan& plan, int64_t block, const Kernel& kernel, ChannelSums& sums) {
    const Where where = plan.block_of_channels(block);
    sums.clear(where.box.channel_begin, where.box.channel_end);
    for (int64_t t = 0; t < plan.tiles(); ++t) {
        tile_sums(plan, t, block, kernel, [&](int64_t c, double a, double b) { sums.add(c, a, b); });
    }
}

// All sums of all blocks: every tile is an item, then each block's tiles are added as block_sums would.
template <class Kernel>
void all_sums(const Plan& plan, const Kernel& kernel, ChannelSums& sums) {
    const int64_t tiles = plan.tiles(), channels = plan.channels;
    Workspace partial;
    double* const first = partial.take<double>(tiles * channels);
    double* const second = partial.take<double>(tiles * channels);
    for_each(tiles * plan.blocks(), plan, [&](int64_t item) {
        const int64_t tile = item / plan.blocks(), block = item % plan.blocks();
        tile_sums(plan, tile, block, kernel, [&](int64_t c, double a, double b) {
            first[tile * channels + c] = a;
            second[tile * channels + c] = b;
        });
    });
    for_each(plan.blocks(), plan, [&](int64_t block) {
        const Where where = plan.block_of_channels(block);
        sums.clear(where.box.channel_begin, where.box.channel_end);
        for (int64_t t = 0; t < tiles; ++t) {
            for (int64_t c = where.box.channel_begin; c < where.box.channel_end; ++c) {
                sums.add(c, first[t * channels + c], second[t * channels + c]);
            }
        }
    });
}

// The shape of every call with statistics: sums, then `finish` per block of channels, then `map` over all elements. finish(c0, c1,
// again) turns sums into what map needs and returns false if it wants the sums of this block once more; the second time it must
// be content. Map is void(const Where&).
template <class Kernel, class Finish, class Map>
void sums_then_map(const Plan& plan, const Kernel& kernel, ChannelSums& sums, const Finish& finish, const Map* map) {
    if (plan.by_channel) {
        for_each(plan.blocks(), plan, [&](int64_t block) {
            const Where where = plan.block_of_channels(block);
            const int64_t c0 = where.box.channel_begin, c1 = where.box.channel_end;
            block_sums(plan, block, kernel, sums);
            if (!finish(c0, c1, false)) {
                block_sums(plan, block, kernel, sums);
                finish(c0, c1, true);
            }
            if (map == nullptr) return;
            if (!plan.map_backwards) return (*map)(where);
            for (int64_t end = plan.outer; end > 0; end -= plan.part_outer) {
                Where part = where;
                part.box.outer_begin = std::max<int64_t>(0, end - plan.part_outer);
                part.box.outer_end = end;
                (*map)(part);
            }
        });
        return;
    }
    all_sums(plan, kernel, sums);
    const auto finish_all = [&](bool again) {
        std::atomic<bool> content{true};
        for_each(plan.blocks(), plan, [&](int64_t block) {
            const Where where = plan.block_of_channels(block);
            if (!finish(where.box.channel_begin, where.box.channel_end, again)) content = false;
        });
        return content.load();
    };
    if (!finish_all(false)) {
        all_sums(plan, kernel, sums);
        finish_all(true);
    }
    if (map != nullptr) {
        const auto item = [&](int64_t i) { (*map)(plan.map_item(i)); };
        for_each(plan.map_items(), plan, item, plan.map_backwards);
    }
}

}  // namespace batchnorm
