// From a call's geometry to its work items: which boxes are summed, in what grid, which channels go together, and whether stores
// bypass the caches. Sees shapes, element sizes and tuning.h's numbers, never a thread count or data. What decides bits, the grid of the
// tiles, follows from the shape alone.
#pragma once

#include <algorithm>

#include "types.h"

namespace batchnorm {

using kernels::kMaxChannelBlock;

// Tiles are added in groups of so many, then the groups: shorter chains, and work to share out (D35).
inline constexpr std::int64_t kTileGroup = 32;

// How the work on one part is laid out.
struct Plan {
    kernels::Direction direction = kernels::ncs;
    std::int64_t outer = 0, channels = 0, inner = 0;  // nsc: outer counts rows, inner is 1
    std::int64_t row_split = 1, fold = 1;

    // Sums: a channel's values are cut into tiles_outer x tiles_inner tiles (the last ones may be shorter), each summed by itself, the
    // results added in index order, by groups of kTileGroup.
    std::int64_t tile_outer = 1, tile_inner = 1, tiles_outer = 1, tiles_inner = 1;

    // Sums are taken apart of each of so many sets of set_outer rows; tiles are those of one set.
    std::int64_t sets = 1, set_outer = 0;

    // Channels of one work item.
    std::int64_t channel_block = 1;

    // One item does everything for its channels: all tiles, then the elementwise pass, which finds the data in cache. Otherwise all
    // tiles of all channels come first, then the elementwise pass over the map grid.
    bool by_channel = true;

    // Elementwise pass on its own: items of map_outer x map_channels x map_inner, in memory order.
    std::int64_t map_outer = 1, map_channels = 1, map_inner = 1;

    // Elementwise pass after sums: starting with what they read last, which is the likeliest to be in cache still. By channel it then goes
    // in pieces of piece_outer.
    bool map_backwards = false;
    std::int64_t piece_outer = 1;

    bool parallel = false;   // enough work to wake other threads
    bool stream = false;     // the output will not stay in any cache
    std::int64_t ahead = 0;  // bytes by which kernels fetch what they read next

    BATCHNORM_HOST_DEVICE std::int64_t tiles() const { return tiles_outer * tiles_inner; }
    BATCHNORM_HOST_DEVICE std::int64_t tile_groups() const { return (tiles() + kTileGroup - 1) / kTileGroup; }
    BATCHNORM_HOST_DEVICE std::int64_t blocks() const { return (channels + channel_block - 1) / channel_block; }
    std::int64_t width() const { return channels * fold; }  // values of a folded row

    // All values of one block's channels.
    BATCHNORM_HOST_DEVICE kernels::Where block_of_channels(std::int64_t block) const {
        const std::int64_t first = block * channel_block;
        return {{0, outer, first, std::min(first + channel_block, channels), 0, inner}, row_split, fold, ahead};
    }
    BATCHNORM_HOST_DEVICE kernels::Where tile(std::int64_t set, std::int64_t index, std::int64_t block) const {
        kernels::Where w = block_of_channels(block);
        const std::int64_t o = index / tiles_inner * tile_outer, i = index % tiles_inner * tile_inner;
        w.box.outer_begin = set * set_outer + o;
        w.box.outer_end = set * set_outer + std::min(o + tile_outer, set_outer);
        w.box.inner_begin = i;
        w.box.inner_end = std::min(i + tile_inner, inner);
        return w;
    }
    std::int64_t map_items() const;
    kernels::Where map_item(std::int64_t index) const;
};

// What a call does to its tensors: how many of this geometry it reads and writes (no reads: what is read hardly counts, an image), whether
// it sums over them first, and how many numbers per channel its elementwise pass takes.
struct Traffic {
    int reads, writes;
    bool sums;
    int numbers = 3;
};
Plan make_plan(const Geometry& g, const Traffic& traffic);

// The plans of a call's parts: of all but the last, and of that one if it has another size.
class PartPlans {
public:
    // set_rows: rows of outer of a set of sums, or 0 where a part is one.
    PartPlans(const Geometry& g, const Parts& parts, const Traffic& traffic, std::int64_t set_rows = 0);
    const Plan& of(std::int64_t part) const { return part + 1 == count_ ? last_ : most_; }
    // Whether parts are worth sharing out to threads that none of them is worth waking alone.
    bool together() const { return together_; }

private:
    std::int64_t count_;
    Plan most_, last_;
    bool together_ = false;
};

}  // namespace batchnorm
