// core/overlap.h: whether strided blocks share an element, against marking every byte.
#include <bitset>

#include "core/overlap.h"
#include "tensors.h"

namespace test {
namespace {

constexpr std::uintptr_t kBase = 4096;

std::bitset<2048> bytes_of(const Block& b) {
    std::bitset<2048> bytes;
    for (int64_t i = 0; i < b.axes[0].size; ++i) {
        for (int64_t j = 0; j < b.axes[1].size; ++j) {
            for (int64_t k = 0; k < b.axes[2].size; ++k) {
                const int64_t at = i * b.axes[0].stride + j * b.axes[1].stride + k * b.axes[2].stride;
                for (int64_t n = 0; n < b.item; ++n) bytes.set(static_cast<size_t>(static_cast<int64_t>(b.first - kBase) + at + n + 900));
            }
        }
    }
    return bytes;
}

Block random_block(Random& random) {
    Block b{kBase + static_cast<std::uintptr_t>(random.below(120)), int64_t{1} << random.below(4), {}};
    const int64_t unit = random.below(2) == 0 ? b.item : 1, reach = random.below(2) == 0 ? 6 : 40;
    for (Block::Axis& a : b.axes) {
        a.size = random.below(12) == 0 ? 0 : 1 + random.below(5);
        a.stride = (random.below(2 * reach + 1) - reach) * unit;
        if (std::abs(a.stride) * std::max<int64_t>(a.size - 1, 0) > 250) a.stride = 1;
    }
    return b;
}

TEST(shared_elements_are_found) {
    Random random(3);
    int64_t shared = 0, wrong = 0;
    for (int64_t i = 0; i < (quick ? 20'000 : 400'000); ++i) {
        const Block a = random_block(random), b = random_block(random);
        const bool want = (bytes_of(a) & bytes_of(b)).any();
        shared += want;
        if (share_element(a, b) != want || share_element(b, a) != want) ++wrong;
        CHECK(i % 100 != 0 || (share_element(a, a) == a.range().meets(a.range()) && same_elements(a, a)));
    }
    CHECK(wrong == 0);
    CHECK(shared > 1000);
}

TEST(blocks_side_by_side_share_nothing_at_any_size) {
    // Bases far apart from one another, sizes as of images and matrices; nothing is read.
    const auto block = [](int64_t first, int64_t o, int64_t os, int64_t c, int64_t cs, int64_t i, int64_t is, int64_t item = 4) {
        return Block{
            static_cast<std::uintptr_t>((int64_t{1} << 40) + first * item), item, {{{o, os * item}, {c, cs * item}, {i, is * item}}}};
    };
    const int64_t n = 64, c = 96, hw = 112 * 112;
    const auto apart = [&](const Block& a, const Block& b) { CHECK(!share_element(a, b) && !share_element(b, a)); };
    const auto touch = [&](const Block& a, const Block& b) { CHECK(share_element(a, b) && share_element(b, a)); };
    // Halves of the channels, first and last; then one channel too many.
    apart(block(0, n, 2 * c * hw, c, hw, hw, 1), block(c * hw, n, 2 * c * hw, c, hw, hw, 1));
    touch(block(0, n, 2 * c * hw, c + 1, hw, hw, 1), block(c * hw, n, 2 * c * hw, c, hw, hw, 1));
    apart(block(0, n, 2 * c * hw, c, 1, hw, 2 * c), block(c, n, 2 * c * hw, c, 1, hw, 2 * c));
    touch(block(0, n, 2 * c * hw, c + 1, 1, hw, 2 * c), block(c, n, 2 * c * hw, c, 1, hw, 2 * c));
    // Even and odd channels, rows, columns; the same reversed.
    apart(block(0, n, 2 * c * hw, c, 2, hw, 2 * c), block(1, n, 2 * c * hw, c, 2, hw, 2 * c));
    apart(block(0, n * hw, 2 * c, c, 1, 1, 1), block(c * (2 * n * hw - 1), n * hw, -2 * c, c, 1, 1, 1));
    touch(block(0, n * hw, 2 * c, c, 1, 1, 1), block(c * (2 * n * hw - 2), n * hw, -2 * c, c, 1, 1, 1));
    // Left and right halves of images, in runs, and gamma in the gap between two rows.
    apart(block(0, n * c, 224 * 224, 224, 224, 112, 1), block(112, n * c, 224 * 224, 224, 224, 112, 1));
    touch(block(0, n * c, 224 * 224, 224, 224, 113, 1), block(112, n * c, 224 * 224, 224, 224, 112, 1));
    apart(block(0, n * hw, c + 8, c, 1, 1, 1), block(c, 1, 0, 8, 1, 1, 1));
    touch(block(0, n * hw, c + 8, c, 1, 1, 1), block(c + 1, 1, 0, 8, 1, 1, 1));
}

TEST(same_elements_are_in_place) {
    std::vector<float> v(60);
    const ConstTensor x = View<float>::ncs(v.data(), 4, 3, 5);
    ConstTensor other = x;
    other.outer_stride = 16;
    CHECK(same_elements(block_of(x), block_of(x)) && !same_elements(block_of(x), block_of(other)));
    ConstTensor one = x, one_too = x;
    one.outer = one_too.outer = 1, one_too.outer_stride = 99;  // the stride of a single row is nobody's
    CHECK(same_elements(block_of(one), block_of(one_too)));
    CHECK(!share_element(block_of(ConstTensor()), block_of(x)) && !block_of(ConstRows()).range().meets(block_of(x).range()));
    // The quick way to a range is that of the block.
    for (const int64_t stride : {-3, -1, 0, 1, 2}) {
        for (const bool is_double : {false, true}) {
            const ConstChannels c(v.data() + 30, is_double, 4, stride);
            const Range quick_one = range_of(c), full = block_of(c).range();
            CHECK(quick_one.low == full.low && quick_one.high == full.high);
        }
    }
}

}  // namespace
}  // namespace test
