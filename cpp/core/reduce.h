// How a call's plan is carried out: sums over tiles in a fixed order, and the shape of every call with statistics, `for_parts`. Used by
// the drivers; knows plans and threads, no operation.
//
// What a driver does with one part is a pass: an object made for a part and a range of its channels, with
//     void prepare(c0, c1)              makes what the sums need
//     void sums(where, round, a, b)     two sums of one box, fold * channels each, rounded up to whole blocks
//     bool finish(c0, c1, round)        turns sums into what map needs; false if it wants those of these channels once more
//     void begin(round)                 before the sums of a second or third round
//     void map(where)                   the elementwise pass over one box
//     bool maps() const                 whether there is one
//     ChannelSums& channel_sums()       where the sums go
// Boxes count rows of outer from the part's first.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "check.h"
#include "coeffs.h"
#include "columns.h"
#include "parallel.h"

namespace batchnorm {

using kernels::Where;

// Runs items, or throws if the user interrupted.
inline void for_each(int64_t n, bool worth_it, parallel::Body body, bool backwards = false) {
    if (!parallel::for_each(n, {.worth_it = worth_it, .backwards = backwards}, body)) check::interrupted();
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

// The two sums of channels from c0 to c1 in each of some sets, as the tiles added so far make them, with the rounding errors carried along
// (coeffs::Sum), in arrays that a loop over channels takes several at a time.
class ChannelSums {
public:
    ChannelSums(Workspace& ws, int64_t sets, int64_t c0, int64_t c1) : c0_(c0), width_(c1 - c0), sets_(sets) {
        for (auto* s : {&first_, &second_}) *s = {ws.take<double>(sets * width_), ws.take<double>(sets * width_)};
    }
    void clear(int64_t c0, int64_t c1) {
        for (int64_t set = 0; set < sets_; ++set) clear(set, c0, c1);
    }
    void clear(int64_t set, int64_t c0, int64_t c1) {
        for (const auto* s : {&first_, &second_}) {
            std::fill(s->value + at(set, c0), s->value + at(set, c1), 0.0);
            std::fill(s->error + at(set, c0), s->error + at(set, c1), 0.0);
        }
    }
    // Adds a tile's sums of the channels from c on.
    void add(int64_t set, int64_t c, int64_t channels, const double* a, const double* b) {
        add(first_, at(set, c), channels, a);
        add(second_, at(set, c), channels, b);
    }
    // Adds the sums of a group of tiles, which are set number `from` of others.
    void add(int64_t set, int64_t c0, int64_t c1, const ChannelSums& others, int64_t from) {
        for (const auto& [to, of] : {std::pair{&first_, &others.first_}, {&second_, &others.second_}}) {
            add(*to, at(set, c0), c1 - c0, of->value + others.at(from, c0));
            for (int64_t c = c0; c < c1; ++c) to->error[at(set, c)] += of->error[others.at(from, c)];
        }
    }
    // Sums of one set from elsewhere.
    void set(int64_t c, const coeffs::Sum& a, const coeffs::Sum& b) {
        first_.value[at(0, c)] = a.value;
        first_.error[at(0, c)] = a.error;
        second_.value[at(0, c)] = b.value;
        second_.error[at(0, c)] = b.error;
    }
    coeffs::Sum first_sum(int64_t c) const { return {first_.value[at(0, c)], first_.error[at(0, c)]}; }
    coeffs::Sum second_sum(int64_t c) const { return {second_.value[at(0, c)], second_.error[at(0, c)]}; }
    // Of the sets that are groups.
    Column<double> first(const Cells& k) const { return totals(first_, k); }
    Column<double> second(const Cells& k) const { return totals(second_, k); }

private:
    struct Sums {
        double *value, *error;
    };
    int64_t at(int64_t set, int64_t c) const { return set * width_ + c - c0_; }
    Column<double> totals(const Sums& s, const Cells& k) const {
        const int64_t begin = at(k.group, k.channel);
        Column<double> total;
        if (k.down) {
            for_entries(k.n, [&](int64_t i) { total[i] = coeffs::Sum{s.value[begin + i * width_], s.error[begin + i * width_]}.total(); });
        } else {
            for_entries(k.n, [&](int64_t i) { total[i] = coeffs::Sum{s.value[begin + i], s.error[begin + i]}.total(); });
        }
        return total;
    }
    static void add(const Sums& s, int64_t at, int64_t channels, const double* x) {
        double* const value = s.value + at;
        double* const error = s.error + at;
        for (int64_t c = 0; c < channels; ++c) {
            coeffs::Sum sum{value[c], error[c]};
            sum.add(x[c]);
            value[c] = sum.value;
            error[c] = sum.error;
        }
    }
    Sums first_, second_;
    int64_t c0_, width_, sets_;
};

// Two sums of one tile of one block of channels, folded rows added up in order: take(c0, channels, a, b).
template <class Pass, class Take>
void tile_sums(const Plan& plan, int64_t set, int64_t tile, int64_t block, Pass& pass, int round, const Take& take) {
    alignas(64) double a[kMaxChannelBlock], b[kMaxChannelBlock];
    const Where where = plan.tile(set, tile, block);
    pass.sums(where, round, a, b);
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
template <class Pass>
void block_sums(const Plan& plan, int64_t block, Pass& pass, int round) {
    ChannelSums& sums = pass.channel_sums();
    const Where where = plan.block_of_channels(block);
    const int64_t c0 = where.box.channel_begin, c1 = where.box.channel_end;
    const auto add_group = [&](int64_t set, int64_t group, ChannelSums& to, int64_t to_set) {
        for (int64_t t = group * kTileGroup; t < std::min((group + 1) * kTileGroup, plan.tiles()); ++t) {
            tile_sums(plan, set, t, block, pass, round,
                      [&](int64_t c, int64_t channels, const double* a, const double* b) { to.add(to_set, c, channels, a, b); });
        }
    };
    sums.clear(c0, c1);
    if (plan.tile_groups() == 1) {
        for (int64_t set = 0; set < plan.sets; ++set) add_group(set, 0, sums, set);
        return;
    }
    Workspace ws;
    ChannelSums of_group(ws, 1, c0, c1);
    for (int64_t i = 0; i < plan.sets * plan.tile_groups(); ++i) {
        const int64_t set = i / plan.tile_groups();
        of_group.clear(c0, c1);
        add_group(set, i % plan.tile_groups(), of_group, 0);
        sums.add(set, c0, c1, of_group, 0);
    }
}

// All sums of all blocks: every tile is an item, then each channel's tiles are added as block_sums would, and finish(c0, c1, round)
// takes the result. Whether that was content everywhere.
template <class Pass>
bool all_sums(const Plan& plan, Pass& pass, int round) {
    const int64_t tiles = plan.tiles(), channels = plan.channels;
    Workspace partial;
    double* const first = partial.take<double>(plan.sets * tiles * channels);
    double* const second = partial.take<double>(plan.sets * tiles * channels);
    for_each(plan.sets * tiles * plan.blocks(), plan.parallel, [&](int64_t item) {
        const int64_t tile = item / plan.blocks(), block = item % plan.blocks();
        tile_sums(plan, tile / tiles, tile % tiles, block, pass, round, [&](int64_t c, int64_t n, const double* a, const double* b) {
            std::copy(a, a + n, first + tile * channels + c);
            std::copy(b, b + n, second + tile * channels + c);
        });
    });
    const int64_t groups = plan.tile_groups();
    const auto add_group = [&](int64_t group, ChannelSums& to, int64_t to_set, int64_t c0, int64_t c1) {
        const int64_t before = group / groups * tiles, begin = before + group % groups * kTileGroup;
        for (int64_t t = begin; t < std::min(begin + kTileGroup, before + tiles); ++t) {
            to.add(to_set, c0, c1 - c0, first + t * channels + c0, second + t * channels + c0);
        }
    };
    ChannelSums by_group(partial, groups == 1 ? 0 : plan.sets * groups, 0, channels);
    if (groups > 1) {
        for_each(plan.sets * groups, plan.parallel, [&](int64_t group) {
            by_group.clear(group, 0, channels);
            add_group(group, by_group, group, 0, channels);
        });
    }
    std::atomic<bool> content{true};
    for_channels(plan, [&](int64_t c0, int64_t c1) {
        ChannelSums& sums = pass.channel_sums();
        sums.clear(c0, c1);
        for (int64_t group = 0; group < plan.sets * groups; ++group) {
            const int64_t set = group / groups;
            groups == 1 ? add_group(group, sums, set, c0, c1) : sums.add(set, c0, c1, by_group, group);
        }
        if (!pass.finish(c0, c1, round)) content = false;
    });
    return content;
}

// The elementwise pass by itself, of a part.
template <class Pass>
void map_part(const Plan& plan, Pass& pass, bool backwards = false) {
    const auto item = [&](int64_t i) { pass.map(plan.map_item(i)); };
    for_each(plan.map_items(), plan.parallel, item, backwards);
}

// Everything for one block of a part's channels.
template <class Pass>
void run_block(const Plan& plan, int64_t block, Pass& pass) {
    const Where where = plan.block_of_channels(block);
    const int64_t c0 = where.box.channel_begin, c1 = where.box.channel_end;
    pass.prepare(c0, c1);
    block_sums(plan, block, pass, 0);
    for (int round = 1; !pass.finish(c0, c1, round - 1); ++round) {
        pass.begin(round);
        block_sums(plan, block, pass, round);
    }
    if (!pass.maps()) return;
    if (!plan.map_backwards) return pass.map(where);
    for (int64_t end = plan.outer; end > 0; end -= plan.piece_outer) {
        Where piece = where;
        piece.box.outer_begin = std::max<int64_t>(0, end - plan.piece_outer);
        piece.box.outer_end = end;
        pass.map(piece);
    }
}

// Everything for one part, all of whose tiles come before its elementwise pass.
template <class Pass>
void run_tiles(const Plan& plan, Pass& pass) {
    for_channels(plan, [&](int64_t c0, int64_t c1) { pass.prepare(c0, c1); });
    for (int round = 0; !all_sums(plan, pass, round);) pass.begin(++round);
    if (pass.maps()) map_part(plan, pass, plan.map_backwards);
}

// The shape of every call with statistics. make(ws, plan, part, c0, c1) makes a pass. Parts that are small are work items with their
// blocks of channels; of a part that is large its tiles are.
template <class Make>
void for_parts(const PartPlans& plans, int64_t parts, const Make& make) {
    const Plan &most = plans.of(0), &last = plans.of(parts - 1);
    const int64_t before_last = most.by_channel ? (parts - 1) * most.blocks() : 0, of_last = last.by_channel ? last.blocks() : 0;
    for_each(before_last + of_last, last.parallel || plans.together(), [&](int64_t item) {
        const bool is_last = item >= before_last;
        const int64_t part = is_last ? parts - 1 : item / most.blocks();
        const int64_t block = is_last ? item - before_last : item % most.blocks();
        const Plan& plan = plans.of(part);
        const Where where = plan.block_of_channels(block);
        Workspace ws;
        auto pass = make(ws, plan, part, where.box.channel_begin, where.box.channel_end);
        run_block(plan, block, pass);
    });
    for (int64_t part = 0; part < parts; ++part) {
        const Plan& plan = plans.of(part);
        if (plan.by_channel) continue;
        Workspace ws;
        auto pass = make(ws, plan, part, 0, plan.channels);
        run_tiles(plan, pass);
    }
}

}  // namespace batchnorm
