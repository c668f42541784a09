// What the drivers of forward and backward share.
#pragma once

#include <optional>

#include "calls.h"
#include "core/gate.h"
#include "core/saved.h"
#include "counts.h"
#include "pass.h"

namespace batchnorm::cuda {

template <class Kernel>
void start(const Launcher& launch, const Kernel& kernel) {
    launch(kernel, kernel.blocks());
}

// Positions of a call, and how to count them.
class Counting {
public:
    Counting(const Shape& shape, std::span<const std::uint8_t> mask, std::span<const double> weights, bool by_element)
        : of_{shape, counted(shape, mask, weights), by_element, nullptr} {}
    // Only what `counts` asks for: how many there are, or just the scale of the weights.
    void lay_out(Cutter& cut, bool counts) {
        const bool weighted = of_.counted.weights != nullptr, some = of_.counted.mask != nullptr || weighted || of_.by_element;
        counts_ = counts && some;
        of_.out = cut.take<Stretch>(counts_ || weighted ? of_.size() : 0);
        count_ = cut.take<double>(counts_ ? of_.shape.parts.count * of_.shape.channels : 0);
        values_ = cut.take<double>(counts_ ? of_.shape.parts.count * of_.shape.channels : 0);
        scale_ = cut.take<double>(1);
    }
    Counted run(const Launcher& launch, const std::uint8_t* bits) {
        Counted& c = of_.counted;
        c.bits = of_.by_element ? bits : nullptr;
        if (!counts_ && c.weights == nullptr) return c;
        start(launch, of_);
        if (counts_) {
            start(launch, CountParts{of_, count_, values_});
            c.count = count_;
            c.values = values_;
        }
        start(launch, FindScale{of_, scale_});
        c.scale = scale_;
        return c;
    }

private:
    static Counted counted(const Shape& s, std::span<const std::uint8_t> mask, std::span<const double> weights) {
        const auto each = [&](std::size_t n) { return n == 0 ? 1 : s.positions() / static_cast<int64_t>(n); };
        Counted c{};
        c.mask = mask.empty() ? nullptr : mask.data();
        c.mask_each = each(mask.size());
        c.weights = weights.empty() ? nullptr : weights.data();
        c.weights_each = each(weights.size());
        return c;
    }
    CountStretches of_;
    double *count_ = nullptr, *values_ = nullptr, *scale_ = nullptr;
    bool counts_ = false;
};

// Sums of tiles, then of sets, in scratch memory.
struct SumsMemory {
    TileSums tiles{};
    coeffs::Sum *first = nullptr, *second = nullptr, *groups = nullptr;

    void lay_out(Cutter& cut, const Shape& shape, const Tiling& tiling) {
        const int64_t n = tiling.total() * shape.channels;
        tiles = {cut.take<double>(n), cut.take<double>(n)};
        const Merge sizes = merge(shape, tiling);
        first = cut.take<coeffs::Sum>(sizes.sets() * shape.channels);
        second = cut.take<coeffs::Sum>(sizes.sets() * shape.channels);
        groups = cut.take<coeffs::Sum>(sizes.group_sums());
    }
    Merge merge(const Shape& shape, const Tiling& tiling) const { return {shape, tiling, tiles, first, second, groups}; }
};

// Rounds after the first are rare: few blocks look whether anybody asks for one.
template <class Op>
void sum_tiles(const Launcher& launch, const Op& op, const Shape& shape, const Tiling& tiling, const TileSums& out, bool rare = false) {
    const auto start = [&](const auto& kernel) {
        launch(kernel, rare ? std::min<int64_t>(kernel.blocks(), kManyBlocks / 4) : kernel.blocks());
    };
    if (shape.runs()) {
        start(SumRuns<Op>{op, shape, tiling, out});
    } else {
        start(SumRows<Op>{op, shape, tiling, out});
    }
}

template <class F>
void with_gate(Gate gate, const F& f) {
    switch (gate) {
        case kernels::open:
            return f.template operator()<kernels::open>();
        case kernels::relu:
            return f.template operator()<kernels::relu>();
        case kernels::masked:
            return f.template operator()<kernels::masked>();
        case kernels::curve:
            return f.template operator()<kernels::curve>();
    }
}

}  // namespace batchnorm::cuda
