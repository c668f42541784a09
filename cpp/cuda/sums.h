// Kernels that sum: two sums of each channel in each tile of the plan's grid, by the lanes that the CPU's kernels have. A thread is a
// lane. What is summed is an operation's:
//     void begin(block)                            what is done before all else
//     bool anything()                              whether any channel is summed
//     bool wanted(part, channel)                   whether the channel is
//     Sums at(where)                               a lane of one channel that has seen nothing yet, with
//         Value load(place)                        what an element is made of
//         void add(value)                          the next element of the lane
//         double first(), second()                 its sums
//     bool compacts()                              whether rows that do not count are as if they were not there (else they add 0)
#pragma once

#include "calls.h"
#include "launch.h"
#include "shape.h"
// Behind one_lane.h, which calls.h includes.
#include "kernels/elements.h"

namespace batchnorm::cuda {

using kernels::kLanes;

// The tiles of a call: those of its parts one after another, of a part those of its sets.
struct Tiling {
    Plan most, last;
    int64_t parts;

    Tiling(const PartPlans& plans, int64_t n) : most(plans.of(0)), last(plans.of(n - 1)), parts(n) {}
    static BATCHNORM_HOST_DEVICE int64_t of_plan(const Plan& p) { return p.sets * p.tiles(); }
    BATCHNORM_HOST_DEVICE const Plan& plan(int64_t part) const { return part + 1 == parts ? last : most; }
    BATCHNORM_HOST_DEVICE int64_t before(int64_t part) const { return part * of_plan(most); }
    BATCHNORM_HOST_DEVICE int64_t total() const { return before(parts - 1) + of_plan(last); }
};

// One of them. Its box counts rows of outer (for nsc: rows of channels) from the part's first.
struct Tile {
    int64_t part, set;
    const Plan* plan;
    kernels::Box box;

    BATCHNORM_HOST_DEVICE Tile(const Tiling& tiling, int64_t number) {
        const int64_t of_most = Tiling::of_plan(tiling.most);
        part = tiling.parts == 1 ? 0 : number / of_most;
        part = part < tiling.parts ? part : tiling.parts - 1;
        plan = &tiling.plan(part);
        const int64_t rest = number - tiling.before(part), tiles = plan->tiles();
        set = rest / tiles;
        box = plan->tile(set, rest % tiles, 0).box;
    }
};

// The elements of a lane, in order. ncs: every 16th of each run; the lanes of a run take as many steps, the last of which may find nothing
// there, so that they stay together. nsc: of every fold-th row; `flat`: rows have one index.
class RunWalk {
public:
    static constexpr bool kAlwaysThere = false;
    BATCHNORM_HOST_DEVICE RunWalk(const Shape& s, const Tile& t, int64_t channel, int64_t lane)
        : place_{s.parts.begin(t.part) + t.box.outer_begin, channel, t.box.inner_begin + lane},
          first_(place_.inner),
          end_(t.box.inner_end),
          last_(t.box.inner_begin + (t.box.inner_end - t.box.inner_begin + kLanes - 1) / kLanes * kLanes) {
        steps_ = (t.box.outer_end - t.box.outer_begin) * ((last_ - t.box.inner_begin) / kLanes);
    }
    BATCHNORM_HOST_DEVICE int64_t steps() const { return steps_; }
    BATCHNORM_HOST_DEVICE bool there() const { return place_.inner < end_; }
    BATCHNORM_HOST_DEVICE const Place& place() const { return place_; }
    BATCHNORM_HOST_DEVICE void next() {
        place_.inner += kLanes;
        if (place_.inner < last_) return;
        place_.inner = first_;
        ++place_.outer;
    }

private:
    Place place_;
    int64_t first_, end_, last_, steps_;
};
template <bool flat>
class RowWalk {
public:
    static constexpr bool kAlwaysThere = true;
    BATCHNORM_HOST_DEVICE RowWalk(const Shape& s, const Tile& t, int64_t channel, int64_t lane)
        : split_(t.plan->row_split), fold_(t.plan->fold), row_(s.parts.begin(t.part) * split_ + t.box.outer_begin + lane) {
        const int64_t rows = t.box.outer_end - t.box.outer_begin - lane;
        steps_ = rows > 0 ? (rows + fold_ - 1) / fold_ : 0;
        place_.channel = channel;
        find();
    }
    BATCHNORM_HOST_DEVICE int64_t steps() const { return steps_; }
    BATCHNORM_HOST_DEVICE bool there() const { return true; }
    BATCHNORM_HOST_DEVICE const Place& place() const { return place_; }
    BATCHNORM_HOST_DEVICE void next() {
        row_ += fold_;
        find();
    }

private:
    BATCHNORM_HOST_DEVICE void find() {
        place_.outer = flat ? row_ : row_ / split_;
        place_.inner = flat ? 0 : row_ % split_;
    }
    int64_t split_, fold_, row_, steps_ = 0;
    Place place_{};
};

// Adds a lane's elements. So many are on their way at a time: a lane adds one after another, and what it waits for is memory.
template <class Sums, class Walk>
BATCHNORM_INLINE void add_lane(Sums& sums, Walk walk) {
    constexpr int kAhead = Sums::kAhead;
    static_assert(kAhead <= 32);
    decltype(sums.load(walk.place())) value[kAhead]{};
    std::uint32_t there = 0;  // a bit for each value
    const int64_t steps = walk.steps();
    const auto next = [&](int u) {
        const bool is = Walk::kAlwaysThere || walk.there();
        if (is) value[u] = sums.load(walk.place());
        if (!Walk::kAlwaysThere) there = (there & ~(1u << u)) | (is ? 1u << u : 0);
        walk.next();
    };
    const auto add = [&](int u) {
        if (Walk::kAlwaysThere || (there >> u & 1) != 0) sums.add(value[u]);
    };
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
        if (u < steps) next(u);
    }
    int64_t done = 0;
    for (; done + 2 * kAhead <= steps; done += kAhead) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            add(u);
            next(u);
        }
    }
    for (; done < steps; done += kAhead) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            if (done + u < steps) add(u);
            if (done + u + kAhead < steps) next(u);
        }
    }
}

// The rows that count, dealt out to `fold` lanes as if the others were not there: those of one lane.
template <class Sums>
BATCHNORM_INLINE void add_counted_rows(Sums& sums, const Shape& s, const Counted& counted, const Tile& t, int64_t channel, int64_t lane) {
    const int64_t split = t.plan->row_split, first = s.parts.begin(t.part) * split, fold = t.plan->fold;
    int64_t turn = 0;
    for (int64_t row = first + t.box.outer_begin; row < first + t.box.outer_end; ++row) {
        if (!(counted.weight(row) > 0)) continue;
        if (turn == lane) sums.add(sums.load({row / split, channel, row % split}));
        turn = turn + 1 == fold ? 0 : turn + 1;
    }
}

// Rounds of sums that statistics may take (FinishStatistics).
inline constexpr int kRounds = 4;

// Where the sums of tiles go: [tile][channel] of the whole call.
struct TileSums {
    double *first, *second;
};

// Tiles and channels that a kernel or a block sums.
struct Range {
    int64_t tile, tiles, channel, channels;
};

// Direction ncs. A block takes some pairs of a tile and a channel at a time, neighbours in memory, of 16 lanes each. Blocks are small where
// they are kernels of their own, so that there are many.
template <class Op, int threads = 64>
struct SumRuns {
    static constexpr int kThreads = threads;
    static constexpr int kPairs = kThreads / static_cast<int>(kLanes);
    struct Shared {
        double lanes[2][kThreads];
    };
    Op op;
    Shape shape;
    Tiling tiling;
    TileSums out;

    int64_t blocks() const { return blocks_for(tiling.total() * shape.channels, kPairs); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared& shared) const {
        op.begin(block);
        const Range all{0, tiling.total(), 0, shape.channels};
        if (op.anything()) sum(block, shared, op, shape, tiling, out, all, block.index(), block.count());
    }
    // Every n-th kPairs pairs of a range. Without an object, which would be a copy in each thread's memory.
    static BATCHNORM_KERNEL_BODY void sum(const ThreadBlock& block, Shared& shared, const Op& op, const Shape& shape, const Tiling& tiling,
                                          const TileSums& out, const Range& range, int64_t first, int64_t n) {
        const int64_t pairs = range.tiles * range.channels;
        const auto tile_of = [&](int64_t pair) { return range.tile + pair / range.channels; };
        const auto channel_of = [&](int64_t pair) { return range.channel + pair % range.channels; };
        for (int64_t base = first * kPairs; base < pairs; base += n * kPairs) {
            block.each([&](int thread) {
                const int64_t pair = base + thread / kLanes;
                if (pair >= pairs) return;
                const Tile tile(tiling, tile_of(pair));
                const int64_t channel = channel_of(pair);
                if (!op.wanted(tile.part, channel)) return;
                op.with_sums(tile.part, shape.first_cell(tile.part) + tile.set, channel, [&](auto sums) {
                    add_lane(sums, RunWalk(shape, tile, channel, thread % kLanes));
                    shared.lanes[0][thread] = sums.first();
                    shared.lanes[1][thread] = sums.second();
                });
            });
            block.each([&](int thread) {
                const int64_t pair = base + thread / 2;
                if (thread >= 2 * kPairs || pair >= pairs) return;
                if (!op.wanted(Tile(tiling, tile_of(pair)).part, channel_of(pair))) return;
                double* const to = thread % 2 == 0 ? out.first : out.second;
                to[tile_of(pair) * shape.channels + channel_of(pair)] = sum_lanes(shared.lanes[thread % 2] + thread / 2 * kLanes);
            });
        }
    }
};

// Direction nsc. A lane is a channel of every fold-th row; where rows are folded, a block has all lanes of some tiles, which are then
// added.
template <class Op>
struct SumRows {
    static constexpr int kThreads = 256;
    struct Shared {
        double lanes[2][kernels::kMaxFoldedWidth];
    };
    Op op;
    Shape shape;
    Tiling tiling;
    TileSums out;

    static BATCHNORM_HOST_DEVICE int64_t lanes_of_block(const Shape& shape, int64_t fold) {
        const int64_t width = fold * shape.channels;
        return fold == 1 ? kThreads : (width < kThreads ? kThreads / width : 1) * width;
    }
    int64_t blocks() const {
        return blocks_for(tiling.total() * tiling.last.fold * shape.channels, lanes_of_block(shape, tiling.last.fold));
    }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared& shared) const {
        op.begin(block);
        const Range all{0, tiling.total(), 0, shape.channels};
        if (op.anything()) sum(block, shared, op, shape, tiling, out, all, block.index(), block.count());
    }
    // Every n-th lanes_of_block() lanes of a range; where rows are folded it has all channels.
    static BATCHNORM_KERNEL_BODY void sum(const ThreadBlock& block, Shared& shared, const Op& op, const Shape& shape, const Tiling& tiling,
                                          const TileSums& out, const Range& range, int64_t first, int64_t n) {
        const int64_t fold = tiling.last.fold, at_once = lanes_of_block(shape, fold), channels = range.channels;
        const int64_t of_tile = fold * channels, all = range.tiles * of_tile;
        for (int64_t base = first * at_once; base < all; base += n * at_once) {
            block.each([&](int thread) {
                for (int64_t k = thread; k < at_once && base + k < all; k += kThreads) {
                    const int64_t number = range.tile + (base + k) / of_tile, lane = (base + k) % of_tile;
                    const int64_t channel = range.channel + lane % channels, row = lane / channels;
                    const Tile tile(tiling, number);
                    if (!op.wanted(tile.part, channel)) continue;
                    op.with_sums(tile.part, shape.first_cell(tile.part) + tile.set, channel, [&](auto sums) {
                        if (op.compacts()) {
                            add_counted_rows(sums, shape, op.counted, tile, channel, row);
                        } else if (tile.plan->row_split == 1) {
                            add_lane(sums, RowWalk<true>(shape, tile, channel, row));
                        } else {
                            add_lane(sums, RowWalk<false>(shape, tile, channel, row));
                        }
                        const int64_t at = number * shape.channels + channel;
                        (fold > 1 ? shared.lanes[0] + k : out.first + at)[0] = sums.first();
                        (fold > 1 ? shared.lanes[1] + k : out.second + at)[0] = sums.second();
                    });
                }
            });
            if (fold == 1) continue;
            block.each([&](int thread) {
                for (int64_t k = thread; k < 2 * (at_once / fold); k += kThreads) {
                    const int64_t in_block = k / 2 / channels, tile = range.tile + base / of_tile + in_block, channel = k / 2 % channels;
                    if (tile >= range.tile + range.tiles || !op.wanted(Tile(tiling, tile).part, channel)) continue;
                    const double* const lane = shared.lanes[k % 2] + in_block * of_tile + channel;
                    double sum = lane[0];
                    for (int64_t j = 1; j < fold; ++j) sum += lane[j * channels];
                    (k % 2 == 0 ? out.first : out.second)[tile * channels + channel] = sum;
                }
            });
        }
    }
};

// Sums of (x - shift) and (x - shift)^2, or, scaled, of s (x - shift).
template <class T>
struct MomentsOp {
    Array<const T> x;
    Shape shape;
    Counted counted;
    const double* shift = nullptr;        // parts * channels; null: 0
    const std::uint8_t* again = nullptr;  // parts * channels: which are summed; null: all
    const std::uint8_t* any = nullptr;    // whether any of them is; null: yes
    std::uint8_t* none = nullptr;         // the rounds that nobody has asked for yet; null: not this round's business
    double scale = 0;                     // times which a scaled round takes x - shift; 0: the round is no scaled one

    // `weighted`: each value times its weight, and scaled; `shifted`: about a shift that is not 0.
    template <bool shifted, bool weighted, bool some>
    struct Sums {
        static constexpr int kAhead = some ? 4 : is_double<T> ? 16 : 32;
        const MomentsOp& op;
        double about, scale;
        Moments<shifted> m{0, 0};
        struct Value {
            Compute<T> x;
            double w;  // of some
        };
        BATCHNORM_INLINE Value load(const Place& p) const {
            double w = 1;
            if constexpr (some) {
                const int64_t position = p.outer * op.shape.inner + p.inner;
                const bool kept = op.counted.kept(position, op.shape.number(p.outer, p.channel, p.inner));
                w = !kept ? 0 : weighted ? op.counted.weight(position) : 1;
            }
            return {value_of(*op.x.at(p)), w};
        }
        BATCHNORM_INLINE void add(const Value& v) {
            if constexpr (weighted) {
                m.add_weighted(to_double(v.x), about, v.w, scale);
            } else if constexpr (some) {
                m.add_kept(to_double(v.x), about, v.w > 0 ? 1 : 0);
            } else {
                m.add(to_double(v.x), about);
            }
        }
        BATCHNORM_INLINE double first() const { return m.sum; }
        BATCHNORM_INLINE double second() const { return m.sum_sq; }
    };
    BATCHNORM_KERNEL_BODY void begin(const ThreadBlock& block) const {
        if (none == nullptr || block.index() != 0) return;
        block.each([&](int thread) {
            if (thread < kRounds) none[thread] = 0;
        });
    }
    BATCHNORM_INLINE bool anything() const { return any == nullptr || *any != 0; }
    BATCHNORM_INLINE bool wanted(int64_t part, int64_t channel) const {
        return again == nullptr || again[part * shape.channels + channel] != 0;
    }
    // Where rows count or do not, as a whole, and are folded.
    BATCHNORM_INLINE bool compacts() const { return (counted.mask != nullptr || counted.weights != nullptr) && counted.bits == nullptr; }
    template <class F>
    BATCHNORM_INLINE void with_sums(int64_t part, int64_t, int64_t channel, const F& f) const {
        const double about = shift == nullptr ? 0 : shift[part * shape.channels + channel];
        if (counted.weights != nullptr || scale != 0) return f(Sums<true, true, true>{*this, about, scale == 0 ? 1 : scale});
        if (!counted.every()) return f(Sums<true, false, true>{*this, about, 1});
        if (is_double<T> || about != 0) return f(Sums<true, false, false>{*this, about, 1});
        f(Sums<false, false, false>{*this, 0, 1});
    }
};

}  // namespace batchnorm::cuda
