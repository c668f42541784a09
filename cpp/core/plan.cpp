#include "plan.h"

#include <algorithm>
#include <cassert>
#include <numeric>

#include "tuning.h"

namespace batchnorm {
namespace {

using std::int64_t;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A tile's sums run over at most this many values of a channel (ncs): 1024 per lane, so that rounding in double stays near 1e-15
// relative, while the work per tile hides what a call costs. A quarter where runs are short: a GPU has a thread for each lane of each
// tile, and layers with short runs have few of them (D39).
constexpr int64_t kTileValues = 16384, kTileValuesOfShortRuns = 4096, kShortRun = 1024;

// Tensors smaller than this are not cut into tiles for the sake of threads.
constexpr int64_t kCutElements = 16384;

// Elements of a tile of rows (nsc), and the fewest rows: sums of 2 doubles per channel are written per tile.
constexpr int64_t kTileElements = 65536;
constexpr int64_t kMinTileRows = 256;
// Of so few rows all tiles of a block of channels are one item.
constexpr int64_t kFewRows = 64;
// Where an elementwise pass takes more than so many bytes of numbers, it goes by so many channels: these then stay in L1 from row to row
// (D10).
constexpr int64_t kNumberBytes = 32 << 10;
constexpr int64_t kMapChannels = 1024;
// Of double data one lane adds at most so many (folded) rows: that keeps its rounding within the contract's 1e-14.
constexpr int64_t kMostDoubleRows = 128;

// Below, a tensor is shared out in half as many items of channels.
constexpr int64_t kSmallElements = 1 << 18;

// How far kernels fetch ahead, where they do (D13).
constexpr int64_t kFetchAhead = 4096, kFetchRowsAhead = 8192;

// A channel larger than this is no work item by itself: an interrupt must not wait for it, nor other threads.
constexpr int64_t kLargestChannelBytes = 16 << 20;

// Rows folded into one so that few channels fill whole blocks: fold * channels is a multiple of 16 and at least 64.
int64_t fold_for(int64_t channels) {
    if (channels >= kernels::kFoldBelow) return 1;
    const int64_t step = kernels::kLanes / std::gcd(channels, kernels::kLanes);
    return round_up(ceil_div(kernels::kFoldBelow, channels), step);
}

// Bytes of an elementwise item: few enough for 16 items, so that threads share evenly, unless these get too small to be worth a call.
int64_t item_bytes(const Plan& p, int64_t element_bytes) {
    const int64_t total = p.outer * p.channels * p.inner * element_bytes;
    return std::clamp<int64_t>(tune::get(tune::map_bytes), 1, std::max<int64_t>(ceil_div(total, 16), 16 << 10));
}

void plan_ncs(Plan& p, int64_t channel_bytes, int64_t run_bytes) {
    if (p.inner >= kTileValues) {
        p.tiles_inner = ceil_div(p.inner, kTileValues);
        p.tile_inner = round_up(ceil_div(p.inner, p.tiles_inner), kernels::kLanes);
        p.tiles_inner = ceil_div(p.inner, p.tile_inner);
        p.tile_outer = 1;
    } else {
        p.tile_inner = p.inner;
        p.tile_outer = std::min(p.outer, (p.inner < kShortRun ? kTileValuesOfShortRuns : kTileValues) / p.inner);
    }
    p.tiles_outer = ceil_div(p.outer, p.tile_outer);

    const int64_t group = std::clamp<int64_t>(tune::get(tune::group_bytes) / std::max<int64_t>(channel_bytes, 1), 1, kernels::kMaxGroup);
    // At least 16 items to share out, 8 of small tensors; by one thread alone as few as can be: each waits for divisions and roots.
    const int64_t items = !p.parallel ? 1 : p.outer * p.channels * p.inner < kSmallElements ? 8 : 16;
    p.channel_block = std::min(group, std::max<int64_t>(1, p.channels / items));
    p.by_channel = !p.parallel || (p.blocks() >= 8 && channel_bytes <= kLargestChannelBytes);

    const int64_t map_bytes = item_bytes(p, ceil_div(run_bytes, p.inner));
    // Whole blocks, so that two items share no byte of a mask.
    p.map_inner = std::min(p.inner, round_up(std::max<int64_t>(map_bytes / std::max<int64_t>(run_bytes / p.inner, 1), 1), kernels::kLanes));
    p.map_channels = std::clamp<int64_t>(map_bytes / std::max<int64_t>(run_bytes, 1), 1, p.channels);
    p.map_outer = std::clamp<int64_t>(map_bytes / std::max<int64_t>(run_bytes * p.channels, 1), 1, p.outer);
    if (p.by_channel) {
        p.piece_outer = std::clamp<int64_t>(map_bytes / std::max<int64_t>(run_bytes * p.channel_block, 1), 1, p.outer);
        p.map_backwards = channel_bytes * p.channel_block > tune::get(tune::l2_bytes) / 2;
    }
}

void plan_nsc(Plan& p, const Traffic& traffic, int64_t element_bytes, bool is_double) {
    p.fold = fold_for(p.channels);
    assert(p.fold == 1 || p.width() <= kernels::kMaxFoldedWidth);
    p.channel_block = std::min(p.channels, kMaxChannelBlock);
    // With enough blocks of channels to share out, rows need not be cut finely; the sums of a tile cost memory.
    const int64_t rows = p.blocks() >= 16 ? 1024 : std::max(kMinTileRows, kTileElements / p.channels);
    int64_t tiles = ceil_div(p.outer, is_double ? std::min(rows, kMostDoubleRows * p.fold) : rows);
    // Multiples of 16 share out evenly.
    if (p.blocks() < 16 && p.outer >= 16 * 32) tiles = round_up(tiles, 16);
    // Of few rows, tiles are small, so that there are some: at 24 rows their sums take a sixth of the memory of the data.
    if (p.outer < 16 * 32 && p.outer * p.channels >= kCutElements) tiles = std::max(tiles, std::min<int64_t>(16, p.outer / 24));
    // A bound for the memory of their sums. It binds beyond 2^28 values of one channel, where a lane then adds up to 2^15 of them (2^33
    // values): rounding near 3e-15 in the mean of many runs, 4e-12 at worst.
    // Of integers a tile's sums stay exact up to 2^21 values.
    tiles = std::min<int64_t>(tiles, std::max<int64_t>(4096, ceil_div(p.outer, int64_t{1} << 20)));
    p.tile_outer = round_up(ceil_div(p.outer, tiles), p.fold);
    p.tiles_outer = ceil_div(p.outer, p.tile_outer);
    p.by_channel = !p.parallel;
    const int64_t numbers = p.channels * traffic.numbers * (is_double ? 8 : 4);
    p.map_channels = numbers <= kNumberBytes || p.channels < 2 * kMapChannels ? p.channels : kMapChannels;
    p.map_outer = std::min(p.outer, round_up(ceil_div(item_bytes(p, element_bytes), p.map_channels * element_bytes), p.fold));
    if ((p.tiles_outer == 1 || p.outer <= kFewRows) && p.fold == 1 && p.parallel) {
        // Few rows of many channels: all is done by blocks of channels, at least 16 of them if that leaves whole cache lines.
        p.by_channel = true;
        p.channel_block = std::min(p.channel_block, round_up(ceil_div(p.channels, 16), 128));
    }
    p.map_backwards = !p.by_channel && !p.stream;
}

// Sums of rows wake threads several times in a call, all else once.
bool worth_threads(const Geometry& g, const Traffic& traffic) {
    const bool rows = g.direction == kernels::nsc && traffic.sums;
    const int64_t passes = (traffic.sums ? 1 : 0) + (traffic.writes > 0 ? 1 : 0);
    return g.elements() * (rows ? 3 : passes * 4) >= tune::get(tune::parallel_elements) * 4;
}

// `all`: elements of the whole call, of which g may be a part; whether stores bypass the caches follows from it.
Plan plan_part(const Geometry& g, const Traffic& traffic, int64_t all, bool parallel) {
    Plan p;
    p.direction = g.direction;
    p.outer = g.outer;
    p.channels = g.channels;
    p.inner = g.inner;
    if (g.direction == kernels::nsc) {
        p.outer = g.count();
        p.inner = 1;
        p.row_split = g.inner;
    }
    const int64_t bytes = element_size(g.dtype);
    const int64_t tensors = traffic.reads + traffic.writes, total = all * bytes * tensors;
    p.parallel = parallel;
    p.ahead = total <= tune::get(tune::fetch_bytes) ? 0 : g.direction == kernels::nsc ? kFetchRowsAhead : kFetchAhead;
    // What an image turns into is all that the call moves, and its lines would be read before they are written: from twice L2 on the caches
    // do not make up for that (1.15 to 1.26, and 1.06 to 1.16 with someone who reads it next).
    const int64_t cached = tune::get(tune::cached_bytes);
    const int64_t kept = traffic.reads == 0 ? std::min(cached, 2 * tune::get(tune::l2_bytes)) : cached;
    p.stream = total > kept;
    if (g.direction == kernels::nsc) {
        plan_nsc(p, traffic, bytes * tensors, g.dtype == Dtype::float64);
    } else {
        plan_ncs(p, g.count() * bytes * traffic.reads, g.inner * bytes * tensors);
        // Runs leave for memory by whole lines, put together where they are short, which costs most where they are shortest (D16).
        const int64_t together = p.inner * (traffic.sums && p.by_channel ? p.channel_block : p.map_channels);
        p.stream = p.stream && std::min(together, 4 * p.inner) * bytes >= tune::get(tune::stream_run_bytes);
    }
    p.set_outer = p.outer;
    return p;
}

// The grid of the sums becomes that of a plan for `rows` rows of outer alone.
void cut_into_sets(Plan& p, const Geometry& g, const Traffic& traffic, int64_t rows) {
    if (rows == 0 || rows == g.outer) return;
    const Plan set = plan_part(g.rows(rows), traffic, g.elements(), p.parallel);
    p.tile_outer = set.tile_outer;
    p.tiles_outer = set.tiles_outer;
    p.sets = g.outer / rows;
    p.set_outer = set.outer;
}

}  // namespace

Plan make_plan(const Geometry& g, const Traffic& traffic) { return plan_part(g, traffic, g.elements(), worth_threads(g, traffic)); }

PartPlans::PartPlans(const Geometry& g, const Parts& parts, const Traffic& traffic, int64_t set_rows) : count_(parts.count) {
    const Geometry most = g.rows(parts.rows), last = g.rows(parts.size(count_ - 1));
    const bool parallel = worth_threads(most, traffic);
    together_ = count_ > 1 && !parallel && worth_threads(g, traffic);
    last_ = plan_part(last, traffic, g.elements(), parallel);
    cut_into_sets(last_, last, traffic, set_rows);
    if (count_ == 1) return;
    most_ = plan_part(most, traffic, g.elements(), parallel);
    cut_into_sets(most_, most, traffic, set_rows);
}

int64_t Plan::map_items() const { return ceil_div(outer, map_outer) * ceil_div(channels, map_channels) * ceil_div(inner, map_inner); }

kernels::Where Plan::map_item(int64_t index) const {
    const int64_t n_inner = ceil_div(inner, map_inner), n_channels = ceil_div(channels, map_channels);
    const int64_t i = index % n_inner * map_inner, c = index / n_inner % n_channels * map_channels,
                  o = index / n_inner / n_channels * map_outer;
    return {{o, std::min(o + map_outer, outer), c, std::min(c + map_channels, channels), i, std::min(i + map_inner, inner)},
            row_split,
            fold,
            ahead};
}

}  // namespace batchnorm
