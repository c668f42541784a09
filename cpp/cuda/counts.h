// Kernels that count what counts, as core/positions.h does on the CPU: weights are added exactly, so in stretches, then the stretches.
#pragma once

#include <cmath>

#include "core/expansion.h"
#include "launch.h"
#include "pass.h"

namespace batchnorm::cuda {

// A mask of elements as bits, by their numbers.
struct ElementsToBits {
    static constexpr int kThreads = 256;
    using Shared = NoShared;
    Array<const std::uint8_t> mask;
    Shape shape;
    std::uint8_t* bits;

    int64_t blocks() const { return blocks_for(blocks_for(shape.elements(), 8), kThreads); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t byte = block.index() * kThreads + thread;
            if (byte * 8 >= shape.elements()) return;
            unsigned all = 0;
            Unit<8>(shape, byte * 8).each(shape, [&](int k, const Place& place) {
                all |= static_cast<unsigned>(*mask.at(place) != 0) << k;
            });
            bits[byte] = static_cast<std::uint8_t>(all);
        });
    }
};

// Terms of a stretch, which a thread adds.
inline constexpr int64_t kCountTerms = 512;

// What a stretch of a part's positions counts to, in one channel or in all alike.
struct Stretch {
    double positions;
    Expansion<3> weight;
    double heaviest;
};

struct CountStretches {
    static constexpr int kThreads = 128;
    using Shared = NoShared;
    Shape shape;
    Counted counted;  // whose count, values and scale are not there yet
    bool by_element;  // else all channels count alike
    Stretch* out;     // [stretch of the whole call][channel]

    // Terms are positions, or stretches of them that share a weight.
    BATCHNORM_HOST_DEVICE int64_t step(int64_t part) const {
        const int64_t begin = shape.parts.begin(part) * shape.inner, end = begin + shape.parts.size(part) * shape.inner;
        const bool alone = counted.mask == nullptr && !by_element && counted.weights != nullptr;
        return alone && begin % counted.weights_each == 0 && end % counted.weights_each == 0 ? counted.weights_each : 1;
    }
    BATCHNORM_HOST_DEVICE int64_t channels() const { return by_element ? shape.channels : 1; }
    BATCHNORM_HOST_DEVICE int64_t stretches(int64_t part) const {
        const int64_t of_one = step(part) * kCountTerms;
        return (shape.parts.size(part) * shape.inner + of_one - 1) / of_one;
    }
    // Parts but the last have as many at most; their places are the same number apart.
    BATCHNORM_HOST_DEVICE int64_t places() const {
        const int64_t first = (shape.parts.size(0) * shape.inner + kCountTerms - 1) / kCountTerms;
        const int64_t last = (shape.parts.size(shape.parts.count - 1) * shape.inner + kCountTerms - 1) / kCountTerms;
        return first > last ? first : last;
    }
    BATCHNORM_HOST_DEVICE int64_t size() const { return shape.parts.count * places() * channels(); }
    int64_t blocks() const { return blocks_for(size(), kThreads); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.index() * kThreads + thread;
            if (at >= size()) return;
            const int64_t channel = at % channels(), part = at / channels() / places(), number = at / channels() % places();
            out[at] = stretch(part, number, channel);
        });
    }

private:
    BATCHNORM_HOST_DEVICE Stretch stretch(int64_t part, int64_t number, int64_t channel) const {
        Stretch s{0, {}, 0};
        const int64_t by = step(part), begin = shape.parts.begin(part) * shape.inner, end = begin + shape.parts.size(part) * shape.inner;
        for (int64_t k = 0; k < kCountTerms; ++k) {
            const int64_t p = begin + (number * kCountTerms + k) * by;
            if (p >= end) break;
            if (!counted.kept(p, shape.number(p / shape.inner, channel, p % shape.inner))) continue;
            const double w = counted.weights == nullptr ? 1 : counted.weights[p / counted.weights_each];
            s.positions += w > 0 ? static_cast<double>(by) : 0;
            if (counted.weights == nullptr) continue;
            s.weight.add(w * static_cast<double>(by));
            if (std::isfinite(w) && w > s.heaviest) s.heaviest = w;
        }
        return s;
    }
};

// Its results for each part and channel.
struct CountParts {
    static constexpr int kThreads = 128;
    using Shared = NoShared;
    CountStretches of;
    double *count, *values;  // out, parts * channels; may be one array

    int64_t blocks() const { return blocks_for(of.shape.parts.count * of.shape.channels, kThreads); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.index() * kThreads + thread, channels = of.channels();
            if (at >= of.shape.parts.count * of.shape.channels) return;
            const int64_t part = at / of.shape.channels, channel = channels == 1 ? 0 : at % of.shape.channels;
            double positions = 0;
            Expansion<3> weight{};
            for (int64_t s = 0; s < of.stretches(part); ++s) {
                const Stretch& one = of.out[(part * of.places() + s) * channels + channel];
                positions += one.positions;
                weight.add(one.weight);
            }
            values[at] = positions;
            count[at] = of.counted.weights == nullptr ? positions : weight.total();
        });
    }
};

// The power of two that brings the largest weight into [1, 2).
struct FindScale {
    static constexpr int kThreads = 256;
    struct Shared {
        double heaviest[kThreads];
    };
    CountStretches of;
    double* scale;

    int64_t blocks() const { return of.counted.weights == nullptr ? 0 : 1; }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared& shared) const {
        block.each([&](int thread) {
            double most = 0;
            for (int64_t i = thread; i < of.size(); i += kThreads) most = of.out[i].heaviest > most ? of.out[i].heaviest : most;
            shared.heaviest[thread] = most;
        });
        block.each([&](int thread) {
            if (thread != 0) return;
            double most = 0;
            for (const double one : shared.heaviest) most = one > most ? one : most;
            const int exponent = most > 0 ? -std::ilogb(most) : 0;
            *scale = std::ldexp(1.0, exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent);
        });
    }
};

}  // namespace batchnorm::cuda
