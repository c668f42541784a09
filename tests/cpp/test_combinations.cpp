// Every option of a call with every other, forward and backward, against the formulas.
#include "reference.h"

namespace test {
namespace {

void test_problem(const Problem& p, const Layout& layout, Place place) {
    context = text(p) + " " + layout.name;
    const Data d(p);
    const Outcome got = run(p, d, layout, place);
    compare(p, got, reference(p, d, got));
}

// All combinations on shapes where parts are equal, ragged, or the last one joins; of float32, in both directions.
TEST(all_options_combine) {
    int64_t n = 0;
    Problem p;
    for (const bool joins : {false, true}) {
        p.shape = joins ? Shape{7, 3, 1} : Shape{6, 3, 2};
        for (p.part_outer = 0; p.part_outer <= 4; ++p.part_outer) {
            for (p.rows = 0; p.rows <= p.shape.outer; ++p.rows) {
                for (int bits = 0; bits < 1 << 6; ++bits) {
                    p.mask = bits & 1, p.weights = bits & 2, p.elements = bits & 4;
                    p.residual = bits & 8, p.given = bits & 16, p.keep = bits & 32 ? Keep::y : Keep::x;
                    for (int choice = 0; choice < 4 * 7; ++choice) {
                        p.renorm = static_cast<Problem::Reference>(choice % 4), p.activation = static_cast<Activation>(choice / 4);
                        if (!p.possible() || (quick && ++n % 29 != 0)) continue;
                        const auto k = static_cast<std::uint64_t>(n += !quick);
                        p.seed = k % 97, p.decay = static_cast<Problem::Decay>(k % 4), p.eps = k % 5 == 0 ? 3 : 1e-5;
                        for (const Layout* layout : {&kRuns[k % 4], &kRows[k % 5]}) {
                            test_problem(p, joins && !layout->channels_last ? kColumns : *layout, static_cast<Place>(k % 3));
                        }
                    }
                }
            }
        }
    }
}

// Options drawn at random, of every storage type, on shapes at the edges of how work is cut.
TEST(options_combine_on_every_shape) {
    Random random(7);
    const std::vector<std::string> levels = isa_levels();
    for (const Shape& shape : kShapes) {
        for (const Dtype dtype : kFloating) {
            for (int64_t i = 0; i < (quick ? 1 : shape.elements() < 5000 ? 60 : 12); ++i) {
                const Layout layout = random.below(2) == 0 && shape.inner > 1 ? kRuns[random.below(4)] : kRows[random.below(5)];
                set_isa(levels[static_cast<size_t>(random.below(static_cast<int64_t>(levels.size())))]);
                set_num_threads(random.below(3) == 0 ? 3 : 1);
                test_problem(random_problem(random, dtype, shape), layout, static_cast<Place>(random.below(3)));
            }
        }
    }
}

}  // namespace
}  // namespace test
