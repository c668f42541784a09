// Batches that several ranks hold: the same bits for any number of them and any cut, the formulas' results, and failures that all learn of.
#include <barrier>
#include <thread>
#include <tuple>

#include "example.h"
#include "reference.h"

namespace test {
namespace {

// Threads as ranks.
class Threads {
public:
    explicit Threads(int64_t n) : arrays_(static_cast<size_t>(n)), barrier_(n) {}
    int64_t size() const { return static_cast<int64_t>(arrays_.size()); }
    // f(group, rank) on each.
    template <class F>
    void run(const F& f) {
        std::vector<std::thread> threads;
        for (int64_t rank = 0; rank < size(); ++rank) {
            threads.emplace_back([&, rank] {
                Rank group(*this, static_cast<size_t>(rank));
                try {
                    f(group, rank);
                } catch (const std::exception& e) {
                    FAIL(e.what());
                }
            });
        }
        for (std::thread& t : threads) t.join();
    }

private:
    struct Rank : Group {
        Rank(Threads& t, size_t r) : threads(t), rank(r) {}
        std::vector<Vector> allgather(std::span<const double> mine) override {
            threads.arrays_[rank] = vector(mine);
            threads.barrier_.arrive_and_wait();
            std::vector<Vector> all = threads.arrays_;
            threads.barrier_.arrive_and_wait();
            return all;
        }
        Threads& threads;
        size_t rank;
    };
    std::vector<Vector> arrays_;
    std::barrier<> barrier_;
};

// Rows of outer from `begin` to `end` of a problem.
std::pair<Problem, Data> cut(Problem p, const Data& d, int64_t begin, int64_t end) {
    const Shape all = p.shape;
    const int64_t group = p.rows == 0 ? 1 : all.outer / p.rows;
    p.rows = p.rows == 0 ? 0 : std::max<int64_t>((end - begin) / group, 1);
    p.shape.outer = end - begin;
    Data part(p);
    const auto take = [&](Vector Data::* v, int64_t each, int64_t first, int64_t last) {
        if (!(d.*v).empty()) (part.*v).assign((d.*v).begin() + first * each, (d.*v).begin() + last * each);
    };
    for (Vector Data::* v : {&Data::x, &Data::dy, &Data::z, &Data::elements}) take(v, all.channels * all.inner, begin, end);
    take(&Data::weights, all.inner, begin, end);
    if (p.mask) part.mask.assign(d.mask.begin() + begin * all.inner, d.mask.begin() + end * all.inner);
    for (Vector Data::* v : {&Data::gamma, &Data::beta}) {
        const int64_t first = std::min(begin / group, std::max<int64_t>(all.outer / group - 1, 0));
        p.rows == 0 ? take(v, all.channels, 0, 1) : take(v, all.channels, first, first + p.rows);
    }
    for (Vector Data::* v : {&Data::given_mean, &Data::given_var, &Data::running_mean, &Data::running_var, &Data::decays, &Data::seen,
                             &Data::own_mean, &Data::own_std}) {
        part.*v = d.*v;
    }
    return {p, std::move(part)};
}

// What ranks that have these rows of outer make of a problem, put together.
Outcome together(const Problem& p, const Data& d, const Layout& layout, const std::vector<int64_t>& ends) {
    const int64_t group = p.rows == 0 ? 1 : p.shape.outer / p.rows;
    Threads threads(static_cast<int64_t>(ends.size()));
    std::vector<Outcome> outcomes(ends.size());
    threads.run([&](Group& g, int64_t rank) {
        const auto r = static_cast<size_t>(rank);
        const auto [part, data] = cut(p, d, r == 0 ? 0 : ends[r - 1], ends[r]);
        outcomes[r] = run(part, data, layout, Place::apart, {.group = &g, .sample_outer = group * (layout.rows ? p.shape.inner : 1)});
    });
    Outcome all = outcomes[0];
    if (ends.size() > 1 && p.given && !p.has_running() &&
        p.renorm != Problem::moving) {  // then ranks tell each other nothing, and some have no values
        for (const char* const name : {"count", "r", "d"}) all.erase(name);
    }
    for (size_t r = 1; r < outcomes.size(); ++r) {
        for (const auto& [name, values] : outcomes[r]) {
            const bool by_sample = name == "y" || name == "dx" || name == "dz" || (p.rows != 0 && (name == "dgamma" || name == "dbeta"));
            if (!by_sample && all.contains(name)) CHECK(same(values, outcomes[0].of(name)));
            if (by_sample && (name[0] != 'd' || name == "dx" || name == "dz" || ends[r] != ends[r - 1])) {
                all[name].insert(all[name].end(), values.begin(), values.end());
            }
        }
    }
    return all;
}

constexpr Shape kGroupShapes[] = {{6, 3, 1}, {8, 2, 3}, {12, 17, 1}, {9, 5, 15}, {10, 70, 1}, {7, 65, 33}, {24, 33, 4}, {4, 2, 9000}};

TEST(any_number_of_ranks_gives_the_same_bits) {
    Random random(5);
    for (const Shape& shape : kGroupShapes) {
        for (const Dtype dtype : kFloating) {
            for (int64_t i = 0; i < (quick ? 1 : 12); ++i) {
                Problem p;
                do {
                    p = random_problem(random, dtype, shape);
                } while (p.part_outer != 0 || (p.keeps_y() && p.rows != 0));
                const Layout layout = random.below(2) == 0 && shape.inner > 1 ? kRuns[random.below(4)] : kRows[random.below(5)];
                context = text(p) + " " + layout.name;
                const Data d(p);
                const Outcome one = together(p, d, layout, {shape.outer});
                compare(p, one, reference(p, d, one));
                const int64_t group = p.rows == 0 ? 1 : shape.outer / p.rows;
                for (const size_t ranks : {2u, 3u, 5u}) {
                    std::vector<int64_t> ends;
                    // With rows of gamma the first rank has some, which are then the first.
                    const int64_t least = p.rows != 0 ? group : 0;
                    for (size_t r = 1; r < ranks; ++r) ends.push_back(std::max(least, random.below(shape.outer / group + 1) * group));
                    ends.push_back(shape.outer);
                    std::sort(ends.begin(), ends.end());
                    CHECK(together(p, d, layout, ends).same_bits(one));
                }
            }
        }
    }
}

TEST(moments_of_a_group) {
    for (const bool weighted : {false, true}) {
        std::vector<std::uint8_t> x(24);
        Vector w(24);
        for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint8_t>(i * i % 97), w[i] = static_cast<double>(i % 3);
        Vector mean(2), var(2);
        moments(View<const std::uint8_t>::ncs(x.data(), 4, 2, 3), mean, var, 1, 0,
                {.weights = weighted ? std::span(w).first(12) : std::span(w).first(0)});
        Threads(3).run([&](Group& g, int64_t rank) {
            const int64_t n = rank == 0 ? 3 : rank == 1 ? 1 : 0, first = rank == 0 ? 0 : 3;
            Vector m(2), v(2);
            const Positions positions{.weights = weighted ? std::span(w).subspan(static_cast<size_t>(first * 3), static_cast<size_t>(n * 3))
                                                          : std::span(w).first(0)};
            moments(View<const std::uint8_t>::ncs(x.data() + first * 6, n, 2, 3), m, v, 1, 0, positions, &g);
            if (!weighted) CHECK(same(m, mean) && same(v, var));  // of integers both are the correctly rounded ones
            for (size_t c = 0; c < 2; ++c) CHECK(near(m[c], mean[c], 1e-13) && near(v[c], var[c], 1e-12));
        });
    }
}

// Rank 1 of three makes the call that `spoil` spoils; the others must throw E, and nothing may be changed.
template <class E, class Spoil>
void all_fail(const std::string& message, const Spoil& spoil) {
    context = message;
    Threads(3).run([&](Group& g, int64_t rank) {
        Example e;
        Forward f = e.train();
        f.saved = &e.saved;
        f.execution.group = &g;
        if (rank == 1) spoil(e, f);
        const auto written = [&] { return std::tuple(e.y, e.running_mean, e.running_var); };
        const auto before = written();
        if (rank == 1) {
            try {
                batch_norm_train(f);
                FAIL("no exception");
            } catch (const std::exception&) {
            }
        } else {
            THROWS(E, message, batch_norm_train(f));
        }
        CHECK(written() == before && e.saved.empty());
    });
}

TEST(a_rank_that_fails_fails_all) {
    all_fail<RankFailed>("rank 1 of the group failed: eps is nan, expected a finite number >= 0",
                         [](Example&, Forward& f) { f.eps = kNaN; });
    all_fail<RankFailed>("rank 1 of the group failed: gamma has 2 values, expected 3, one per channel",
                         [](Example& e, Forward& f) { f.gamma = e.two; });
    all_fail<Error>("group has other options on rank 1 than on rank 0, expected the same call with the same options on all ranks",
                    [](Example&, Forward& f) { f.eps = 1; });
    all_fail<Error>("group has another number of channels on rank 1", [](Example& e, Forward& f) {
        f = {.x = rows(e.x, 2), .y = rows(e.y, 2), .saved = &e.saved, .execution = f.execution};
    });
    const std::string text = std::string(999, 'x') + "\u00e4";  // cut within a character
    Threads(2).run([&](Group& g, int64_t rank) {
        if (rank == 0) return fail(g, text);
        Example e;
        Forward f = e.train();
        f.execution.group = &g;
        THROWS(RankFailed, "rank 0 of the group failed: " + text.substr(0, 999), batch_norm_train(f));
    });
}

TEST(values_of_ones_own) {
    Threads(3).run([&](Group& g, int64_t rank) {
        CHECK(gather(g, Vector(static_cast<size_t>(rank), 0.5)) == std::vector<Vector>{{}, {0.5}, {0.5, 0.5}});
        if (rank == 2) return fail(g, "no");
        THROWS(RankFailed, "rank 2 of the group failed: no", gather(g, {}));
    });
}

// Others' arrays alone, as an intercommunicator gives.
struct OtherSide : Group {
    std::vector<Vector> allgather(std::span<const double> mine) override { return {Vector(mine.size(), 0)}; }
};

TEST(a_group_that_this_rank_is_not_in) {
    OtherSide group;
    Example e;
    Forward f = e.train();
    f.execution.group = &group;
    REFUSED(type, "group has gathered no array that equals this rank's own, expected that of each rank, this one too", batch_norm_train(f));
    REFUSED(type, "group has gathered no array that equals this rank's own", gather(group, Vector{1}));
}

TEST(a_failure_where_nothing_is_exchanged_is_ones_own) {
    Threads(2).run([&](Group& g, int64_t rank) {
        Floats x{1, 2, 3, 4, 5, 6}, y(6);
        Vector mean{0, 0, 0}, var{1, 1, 1};
        Forward f{.x = View<float>::ncs(x.data(), 2, 3, 1), .y = View<float>::ncs(y.data(), 2, 3, 1), .execution = {.group = &g}};
        f.mean = mean;
        f.var = var;
        if (rank == 1) f.eps = -1;
        if (rank == 1) REFUSED(value, "eps is -1, expected a finite number >= 0", batch_norm_train(f));
        if (rank == 0) batch_norm_train(f);
    });
}

// Weights that sum to less than two, of ranks of which one has no rows and no weights.
TEST(a_rank_without_weights) {
    const Floats x{1, 2, 4, 8, 16, 32}, dy{1, -1, 2, 5, 0, 3};
    const Vector weights{0.1, 0.2, 0.3};
    Floats gradients[2];
    Threads(2).run([&](Group& g, int64_t rank) {
        const int64_t n = rank == 0 ? 3 : 0;
        Floats y(6), dgamma(2);
        Saved saved;
        Forward f{.x = View<const float>::ncs(x.data(), n, 2, 1), .y = View<float>::ncs(y.data(), n, 2, 1), .saved = &saved};
        if (rank == 0) f.positions.weights = weights;
        f.execution.group = &g;
        batch_norm_train(f);
        Backward b{.dy = View<const float>::ncs(dy.data(), n, 2, 1), .kept = f.x, .saved = &saved, .all_reduce = true};
        b.dgamma = Rows(Channels(dgamma));
        b.execution.group = &g;
        batch_norm_backward(b);
        gradients[rank] = dgamma;
    });
    CHECK(gradients[0] == gradients[1] && std::isfinite(gradients[0][0]) && gradients[0][0] != 0 && gradients[0][1] != 0);
}

TEST(one_value_per_channel_in_all_ranks) {
    for (const bool two : {false, true}) {
        Threads(3).run([&](Group& g, int64_t rank) {
            Floats x{1, 2, 3}, y(3, 7);
            const int64_t n = rank == 1 || (two && rank == 2) ? 1 : 0;
            const Forward f{.x = View<float>::ncs(x.data(), n, 3, 1), .y = View<float>::ncs(y.data(), n, 3, 1), .execution = {.group = &g}};
            if (two) {
                batch_norm_train(f);
                CHECK(y == (n == 0 ? Floats{7, 7, 7} : Floats{0, 0, 0}));
            } else {
                // Once: who tries again, as REFUSED does on a busy machine, would wait for the others.
                THROWS(Error, "x has one value per channel in all ranks, from which no variance can be had, expected at least 2",
                       batch_norm_train(f));
            }
        });
    }
}

}  // namespace
}  // namespace test
