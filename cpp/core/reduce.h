// How a call's plan is carried out: sums over tiles in a fixed order, and the shape of every call with statistics, `sums_then_map`. Used by
// the drivers in batchnorm.cpp; knows plans and threads, no operation.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "check.h"
#include "coeffs.h"
#include "columns.h"
#include "parallel.h"

namespace batchnorm {

using kernels::Where;

// Runs items, or throws if the user interrupted.
inline void for_each(int64_t n, const Plan& plan, parallel::Body body, bool backwards = false) {
    if (!parallel::for_each(n, {.worth_it = plan.parallel, .backwards = backwards}, body)) check::interrupted();
}

// Runs f(c0, c1) over stretches of channels, on several threads where that is many; not to be interrupted, so it may write what the
// caller sees.
template <class F>
void for_channels(const Plan& plan, const F& f) {
    constexpr int64_t kStretch = 1024;  // 5 to 10 us of work
    const int64_t n = (plan.channels + kStretch - 1) / kStretch;
    const auto stretch = [&](int64_t i) { f(i * kStretch, std::min((i + 1) * kStretch, plan.channels)); };
    (void)parallel::for_each(n, {.worth_it = plan.parallel && n > 1, .interruptible = false}, stretch);
}

// The same by columns: f(c, n).
template <class F>
void for_columns(const Plan& plan, const F& f) {
    for_channels(plan, [&](int64_t c0, int64_t c1) { by_columns(c0, c1, f); });
}

// The two sums of every channel, as the tiles added so far make them, with the rounding errors carried along (coeffs::Sum), in arrays
// that a loop over channels takes several at a time.
class ChannelSums {
public:
    ChannelSums(Workspace& ws, int64_t channels) {
        for (auto* s : {&first_, &second_}) *s = {ws.take<double>(channels), ws.take<double>(channels)};
    }
    void clear(int64_t c0, int64_t c1) {
        for (const auto* s : {&first_, &second_}) {
            std::fill(s->value + c0, s->value + c1, 0.0);
            std::fill(s->error + c0, s->error + c1, 0.0);
        }
    }
    // Adds a tile's sums of the channels from c on.
    void add(int64_t c, int64_t channels, const double* a, const double* b) {
        add(first_, c, channels, a);
        add(second_, c, channels, b);
    }
    coeffs::Sum first_sum(int64_t c) const { return {first_.value[c], first_.error[c]}; }
    coeffs::Sum second_sum(int64_t c) const { return {second_.value[c], second_.error[c]}; }
    Column<double> first(int64_t c, int64_t n) const { return totals(first_, c, n); }
    Column<double> second(int64_t c, int64_t n) const { return totals(second_, c, n); }

private:
    struct Sums {
        double *value, *error;
    };
    static Column<double> totals(const Sums& s, int64_t c, int64_t n) {
        Column<double> total;
        for_entries(n, [&](int64_t i) { total[i] = coeffs::Sum{s.value[c + i], s.error[c + i]}.total(); });
        return total;
    }
    static void add(const Sums& s, int64_t c0, int64_t channels, const double* x) {
        double* const value = s.value + c0;
        double* const error = s.error + c0;
        for (int64_t c = 0; c < channels; ++c) {
            coeffs::Sum sum{value[c], error[c]};
            sum.add(x[c]);
            value[c] = sum.value;
            error[c] = sum.error;
        }
    }
    Sums first_, second_;
};

// Two sums of one tile of one block of channels, folded rows added up in order: take(c0, channels, a, b). Kernel: void(const Where&, bool
// again, double*, double*), writing fold * channels sums, rounded up to whole blocks.
template <class Kernel, class Take>
void tile_sums(const Plan& plan, int64_t tile, int64_t block, const Kernel& kernel, bool again, const Take& take) {
    alignas(64) double a[kMaxChannelBlock], b[kMaxChannelBlock];
    const Where where = plan.tile(tile, block);
    kernel(where, again, a, b);
    const int64_t c0 = where.box.channel_begin, channels = where.box.channel_end - c0;
    for (int64_t j = 1; j < plan.fold; ++j) {
        for (int64_t c = 0; c < channels; ++c) {
            a[c] += a[j * channels + c];
            b[c] += b[j * channels + c];
        }
    }
    take(c0, channels, a, b);
}

// All sums of one block: its tiles one after another.
template <class Kernel>
void block_sums(const Plan& plan, int64_t block, const Kernel& kernel, bool again, ChannelSums& sums) {
    const Where where = plan.block_of_channels(block);
    sums.clear(where.box.channel_begin, where.box.channel_end);
    for (int64_t t = 0; t < plan.tiles(); ++t) {
        tile_sums(plan, t, block, kernel, again,
                  [&](int64_t c, int64_t channels, const double* a, const double* b) { sums.add(c, channels, a, b); });
    }
}

// All sums of all blocks: every tile is an item, then each channel's tiles are added as block_sums would, and finish(c0, c1, again)
// takes the result. Whether that was content everywhere.
template <class Kernel, class Finish>
bool all_sums(const Plan& plan, const Kernel& kernel, bool again, ChannelSums& sums, const Finish& finish) {
    const int64_t tiles = plan.tiles(), channels = plan.channels;
    Workspace partial;
    double* const first = partial.take<double>(tiles * channels);
    double* const second = partial.take<double>(tiles * channels);
    for_each(tiles * plan.blocks(), plan, [&](int64_t item) {
        const int64_t tile = item / plan.blocks(), block = item % plan.blocks();
        tile_sums(plan, tile, block, kernel, again, [&](int64_t c, int64_t n, const double* a, const double* b) {
            std::copy(a, a + n, first + tile * channels + c);
            std::copy(b, b + n, second + tile * channels + c);
        });
    });
    std::atomic<bool> content{true};
    for_channels(plan, [&](int64_t c0, int64_t c1) {
        sums.clear(c0, c1);
        for (int64_t t = 0; t < tiles; ++t) sums.add(c0, c1 - c0, first + t * channels + c0, second + t * channels + c0);
        if (!finish(c0, c1, again)) content = false;
    });
    return content;
}

struct NothingToPrepare {
    void operator()(int64_t, int64_t) const {}
};

// The shape of every call with statistics: `prepare` per channel, sums, then `finish` per channel, then `map` over all elements.
// prepare(c0, c1) makes what the sums need. finish(c0, c1, again) turns sums into what map needs and returns false if it wants the sums of
// these channels once more; the second time it must be content. Map is void(const Where&).
template <class Prepare, class Kernel, class Finish, class Map>
void sums_then_map(const Plan& plan, const Prepare& prepare, const Kernel& kernel, ChannelSums& sums, const Finish& finish,
                   const Map* map) {
    if (plan.by_channel) {
        for_each(plan.blocks(), plan, [&](int64_t block) {
            const Where where = plan.block_of_channels(block);
            const int64_t c0 = where.box.channel_begin, c1 = where.box.channel_end;
            prepare(c0, c1);
            block_sums(plan, block, kernel, false, sums);
            if (!finish(c0, c1, false)) {
                block_sums(plan, block, kernel, true, sums);
                finish(c0, c1, true);
            }
            if (map == nullptr) return;
            if (!plan.map_backwards) return (*map)(where);
            for (int64_t end = plan.outer; end > 0; end -= plan.piece_outer) {
                Where part = where;
                part.box.outer_begin = std::max<int64_t>(0, end - plan.piece_outer);
                part.box.outer_end = end;
                (*map)(part);
            }
        });
        return;
    }
    if constexpr (!std::is_same_v<Prepare, NothingToPrepare>) for_channels(plan, prepare);
    if (!all_sums(plan, kernel, false, sums, finish)) all_sums(plan, kernel, true, sums, finish);
    if (map != nullptr) {
        const auto item = [&](int64_t i) { (*map)(plan.map_item(i)); };
        for_each(plan.map_items(), plan, item, plan.map_backwards);
    }
}

}  // namespace batchnorm
