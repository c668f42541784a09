// core/plan.h, core/types.h: the boxes of a plan make up the tensor, suit the kernels, and what decides bits follows from the shape alone.
#include "core/plan.h"
#include "problem.h"

namespace test {
namespace {

Geometry random_geometry(Random& random) {
    Geometry g;
    g.direction = random.below(2) == 0 ? kernels::ncs : kernels::nsc;
    const auto size = [&](int64_t most) { return 1 + random.below(int64_t{1} << (1 + random.below(most))); };
    g.channels = size(12), g.outer = size(12), g.inner = size(14);
    while (g.elements() > int64_t{1} << 25) g.outer = (g.outer + 1) / 2, g.inner = (g.inner + 2) / 3;
    g.dtype = kFloating[random.below(4)];
    return g;
}
std::string text(const Geometry& g) {
    return test::text(Shape{g.outer, g.channels, g.inner}) + (g.direction == kernels::ncs ? " ncs" : " nsc");
}
Traffic random_traffic(Random& random) {
    return {static_cast<int>(1 + random.below(3)), static_cast<int>(random.below(3)), random.below(2) == 0};
}

// Boxes add up to all of it, and none reaches outside; that they are disjoint follows from their volumes.
class Cover {
public:
    explicit Cover(const Plan& p, int64_t first_row = 0, int64_t rows = -1)
        : p_(p), begin_(first_row), end_(first_row + (rows < 0 ? p.outer : rows)) {}
    void add(const kernels::Where& w) {
        const kernels::Box& b = w.box;
        inside_ &= b.outer_begin >= begin_ && b.outer_begin < b.outer_end && b.outer_end <= end_ && b.channel_begin >= 0 &&
                   b.channel_begin < b.channel_end && b.channel_end <= p_.channels && b.inner_begin >= 0 && b.inner_begin < b.inner_end &&
                   b.inner_end <= p_.inner;
        suits_ &= w.row_split == p_.row_split && w.fold == p_.fold && (b.outer_begin - begin_) % p_.fold == 0 &&
                  (p_.fold == 1 || b.channel_end - b.channel_begin == p_.channels);
        volume_ += (b.outer_end - b.outer_begin) * (b.channel_end - b.channel_begin) * (b.inner_end - b.inner_begin);
    }
    bool good() const { return inside_ && suits_ && volume_ == (end_ - begin_) * p_.channels * p_.inner; }

private:
    const Plan& p_;
    int64_t begin_, end_, volume_ = 0;
    bool inside_ = true, suits_ = true;
};

bool suits_kernels(const Plan& p, const Geometry& g) {
    if (g.direction == kernels::ncs) {
        // No two items of the map share a byte of bits: inner is cut at whole blocks.
        return p.fold == 1 && p.row_split == 1 && p.channel_block <= kernels::kMaxGroup &&
               (p.map_inner == p.inner || p.map_inner % kernels::kLanes == 0) &&
               (p.tile_inner == p.inner || p.tile_inner % kernels::kLanes == 0);
    }
    const bool folds = g.channels < kernels::kFoldBelow;
    const bool folded = p.width() % kernels::kLanes == 0 && p.width() >= kernels::kFoldBelow && p.width() <= kernels::kMaxFoldedWidth;
    return p.inner == 1 && p.row_split == g.inner && p.outer == g.count() && p.channel_block <= kernels::kMaxChannelBlock &&
           (folds ? folded && p.tile_outer % p.fold == 0 && (p.map_outer == p.outer || p.map_outer % p.fold == 0) : p.fold == 1);
}

TEST(plans_cover_the_tensor) {
    Random random(4);
    for (int i = 0; i < (quick ? 100 : 1500); ++i) {
        const Geometry g = random_geometry(random);
        set_tuning(i % 3 == 0 ? "" : kTunings[random.below(5)]);
        const Plan p = make_plan(g, random_traffic(random));
        context = "plan of " + text(g) + ", " + tuning();
        CHECK(suits_kernels(p, g));
        Cover tiles(p), blocks(p), items(p);
        for (int64_t b = 0; b < p.blocks(); ++b) {
            blocks.add(p.block_of_channels(b));
            for (int64_t t = 0; t < p.tiles(); ++t) tiles.add(p.tile(0, t, b));
        }
        for (int64_t k = 0; k < p.map_items(); ++k) items.add(p.map_item(k));
        CHECK(tiles.good() && blocks.good() && items.good());
    }
}

TEST(the_grid_of_sums_follows_from_the_shape) {
    Random random(6);
    for (int i = 0; i < (quick ? 100 : 1500); ++i) {
        const Geometry g = random_geometry(random);
        context = "grid of " + text(g);
        set_tuning("");
        const Plan a = make_plan(g, random_traffic(random));
        set_tuning(kTunings[random.below(5)]);
        const Plan b = make_plan(g, random_traffic(random));
        CHECK(a.tile_outer == b.tile_outer && a.tile_inner == b.tile_inner && a.tiles_outer == b.tiles_outer &&
              a.tiles_inner == b.tiles_inner);
        CHECK(a.fold == b.fold && a.row_split == b.row_split);
        // Rounding stays near 1e-15: no more than 1024 values a lane of runs, 1024 rows unless memory would burst.
        CHECK(g.direction == kernels::nsc || a.tile_outer * a.tile_inner <= 16384);
    }
}

TEST(sets_are_summed_by_themselves) {
    Random random(8);
    for (int i = 0; i < (quick ? 50 : 500); ++i) {
        Geometry g = random_geometry(random);
        const int64_t rows = 1 + random.below(9), sets = 1 + random.below(5), left = random.below(sets) * rows, most = sets * rows;
        g.outer = left == 0 ? most : 3 * most + left;
        const Parts parts{g.outer, left == 0 ? g.outer : most, left == 0 ? 1 : 4};
        context = "sets of " + std::to_string(rows) + " in " + text(g);
        const PartPlans plans(g, parts, random_traffic(random), rows);
        for (const int64_t part : {int64_t{0}, parts.count - 1}) {
            const Plan& p = plans.of(part);
            CHECK(p.sets == parts.size(part) / rows && p.set_outer * p.sets == p.outer);
            for (int64_t set = 0; set < p.sets; ++set) {
                Cover tiles(p, set * p.set_outer, p.set_outer);
                for (int64_t b = 0; b < p.blocks(); ++b) {
                    for (int64_t t = 0; t < p.tiles(); ++t) tiles.add(p.tile(set, t, b));
                }
                CHECK(tiles.good());
            }
        }
    }
}

TEST(bits_of_parts_share_no_byte) {
    Random random(9);
    for (int i = 0; i < 300; ++i) {
        const Geometry g = random_geometry(random);
        const int64_t rows = 1 + random.below(g.outer), count = (g.outer + rows - 1) / rows;
        const Parts parts{g.outer, rows, count};
        const BitLayout layout(g, parts);
        bool apart = true;
        for (int64_t p = 0; p < count; ++p) {
            const bool runs = g.direction == kernels::ncs;
            const int64_t last_row = runs ? parts.size(p) - 1 : parts.size(p) * g.inner - 1;
            const int64_t last = last_row * layout.outer_stride() + (g.channels - 1) * layout.channel_stride() + (runs ? g.inner - 1 : 0);
            const int64_t end = layout.begin(p) + last / 8 + 1;
            apart &= end <= (p + 1 < count ? layout.begin(p + 1) : layout.bytes() - kernels::kMaskSlack);
        }
        CHECK(apart);
        CHECK(g.direction == kernels::ncs ? layout.channel_stride() % 8 == 0
                                          : g.channels < kernels::kFoldBelow || layout.outer_stride() % 8 == 0);
    }
}

}  // namespace
}  // namespace test
