// How a call's plan is carried out: per-channel arrays as the kernels read them, sums over tiles in a fixed order, and the shape of
// every call with statistics, `sums_then_map`. Used by the drivers in batchnorm.cpp; knows plans and threads, no operation.
#pragma once

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
inline void for_each(int64_t n, const Plan& plan, parallel::Body body) {
    if (!parallel::for_each(n, plan.parallel, body)) check::interrupted();
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

// Two sums of one tile of one block of channels, folded rows added up in order. Kernel: void(const Where&, double*, double*), writing
// fold * channels sums.
template <class Kernel>
void tile_sums(const Plan& plan, int64_t tile, int64_t block, const Kernel& kernel, double* first, double* second) {
    alignas(64) double a[kMaxChannelBlock], b[kMaxChannelBlock];
    const Where where = plan.tile(tile, block);
    kernel(where, a, b);
    const int64_t channels = where.box.channel_end - where.box.channel_begin;
    for (int64_t c = 0; c < channels; ++c) {
        double s = a[c], t = b[c];
        for (int64_t j = 1; j < plan.fold; ++j) {
            s += a[j * channels + c];
            t += b[j * channels + c];
        }
        first[c] = s;
        second[c] = t;
    }
}

// Adds tile after tile, in index order, for one block of n channels.
class BlockSums {
public:
    explicit BlockSums(int64_t n) : n_(n) {
        for (int64_t c = 0; c < n; ++c) first_[c] = second_[c] = {0, 0};
    }
    void add(const double* a, const double* b) {
        for (int64_t c = 0; c < n_; ++c) first_[c].add(a[c]);
        for (int64_t c = 0; c < n_; ++c) second_[c].add(b[c]);
    }
    void totals(double* first, double* second) const {
        for (int64_t c = 0; c < n_; ++c) {
            first[c] = first_[c].total();
            second[c] = second_[c].total();
        }
    }

private:
    int64_t n_;
    coeffs::Sum first_[kMaxChannelBlock], second_[kMaxChannelBlock];
};

// All sums of one block: its tiles one after another.
template <class Kernel>
void block_sums(const Plan& plan, int64_t block, const Kernel& kernel, double* first, double* second) {
    const Where where = plan.block_of_channels(block);
    const int64_t c0 = where.box.channel_begin, n = where.box.channel_end - c0;
    if (plan.tiles() == 1) return tile_sums(plan, 0, block, kernel, first + c0, second + c0);
    double a[kMaxChannelBlock], b[kMaxChannelBlock];
    BlockSums sums(n);
    for (int64_t t = 0; t < plan.tiles(); ++t) {
        tile_sums(plan, t, block, kernel, a, b);
        sums.add(a, b);
    }
    sums.totals(first + c0, second + c0);
}

// All sums of all blocks: every tile is an item, then each block's tiles are added as block_sums would.
template <class Kernel>
void all_sums(const Plan& plan, const Kernel& kernel, double* first, double* second) {
    const int64_t tiles = plan.tiles(), channels = plan.channels;
    Workspace partial;
    double* const a = partial.take<double>(tiles * channels);
    double* const b = partial.take<double>(tiles * channels);
    for_each(tiles * plan.blocks(), plan, [&](int64_t item) {
        const int64_t tile = item / plan.blocks(), block = item % plan.blocks();
        const int64_t at = tile * channels + block * plan.channel_block;
        tile_sums(plan, tile, block, kernel, a + at, b + at);
    });
    for_each(plan.blocks(), plan, [&](int64_t block) {
        const Where where = plan.block_of_channels(block);
        const int64_t c0 = where.box.channel_begin, n = where.box.channel_end - c0;
        BlockSums sums(n);
        for (int64_t t = 0; t < tiles; ++t) sums.add(a + t * channels + c0, b + t * channels + c0);
        sums.totals(first + c0, second + c0);
    });
}

// The shape of every call with statistics: sums, then `finish` per block of channels, then `map` over all elements. finish(c0, c1,
// again) turns sums into what map needs and returns false if it wants the sums of this block once more; the second time it must
// be content. Map is void(const Where&).
template <class Kernel, class Finish, class Map>
void sums_then_map(const Plan& plan, const Kernel& kernel, double* first, double* second, const Finish& finish, const Map* map) {
    if (plan.by_channel) {
        for_each(plan.blocks(), plan, [&](int64_t block) {
            const Where where = plan.block_of_channels(block);
            const int64_t c0 = where.box.channel_begin, c1 = where.box.channel_end;
            block_sums(plan, block, kernel, first, second);
            if (!finish(c0, c1, false)) {
                block_sums(plan, block, kernel, first, second);
                finish(c0, c1, true);
            }
            if (map != nullptr) (*map)(where);
        });
        return;
    }
    all_sums(plan, kernel, first, second);
    const auto finish_all = [&](bool again) {
        std::atomic<bool> content{true};
        for_each(plan.blocks(), plan, [&](int64_t block) {
            const Where where = plan.block_of_channels(block);
            if (!finish(where.box.channel_begin, where.box.channel_end, again)) content = false;
        });
        return content.load();
    };
    if (!finish_all(false)) {
        all_sums(plan, kernel, first, second);
        finish_all(true);
    }
    if (map != nullptr) for_each(plan.map_items(), plan, [&](int64_t i) { (*map)(plan.map_item(i)); });
}

}  // namespace batchnorm
