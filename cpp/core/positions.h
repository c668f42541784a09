// Which values of a call count and how often: counted for check.cpp, and brought from the caller's form to what the kernels read: bits
// for runs (ncs), a byte per row (nsc), a bit per element, weights of about 1. N*S values once per call, while the tensors have C times as
// many. Knows no kernel.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "coeffs.h"
#include "columns.h"
#include "moment_sums.h"
#include "parallel.h"
#include "types.h"
#include "workspace.h"

namespace batchnorm {

// One value per position of what may hold fewer.
template <class T>
class PerPosition {
public:
    PerPosition(std::span<const T> values, int64_t count)
        : data_(values.data()), each_(values.empty() ? 1 : count / static_cast<int64_t>(values.size())) {}
    T operator[](int64_t p) const { return each_ == 1 ? data_[p] : data_[p / each_]; }
    // Consecutive positions with one value.
    int64_t each() const { return each_; }

private:
    const T* data_;
    int64_t each_;
};

// A byte per element, by position and channel.
class PerElement {
public:
    explicit PerElement(const ConstTensor& v) : v_(v), data_(static_cast<const std::uint8_t*>(v.data)) {}
    const std::uint8_t* pointer(int64_t outer, int64_t c, int64_t inner) const {
        return data_ + outer * v_.outer_stride + c * v_.channel_stride + inner * v_.inner_stride;
    }
    std::uint8_t at(int64_t outer, int64_t c, int64_t inner) const { return *pointer(outer, c, inner); }
    bool runs() const { return v_.inner_stride == 1; }
    bool channels_side_by_side() const { return v_.channel_stride == 1; }

private:
    const ConstTensor& v_;
    const std::uint8_t* data_;
};

// Of eight bytes, each 1 unless it is 0.
inline std::uint64_t ones_of_bytes(const std::uint8_t* from) {
    std::uint64_t v;
    std::memcpy(&v, from, sizeof v);
    return ((((v & 0x7f7f7f7f7f7f7f7f) + 0x7f7f7f7f7f7f7f7f) | v) >> 7) & 0x0101010101010101;
}
// Eight bytes to as many bits, set unless a byte is 0: the product brings bit 8 i to bit 56 + i.
inline std::uint8_t bits_of_bytes(const std::uint8_t* from) {
    return static_cast<std::uint8_t>(ones_of_bytes(from) * 0x0102040810204080 >> 56);
}
// n bytes, `step` apart, as bits from number `first` on, which are 0 so far.
inline void pack(const std::uint8_t* from, int64_t step, int64_t n, std::uint8_t* bits, int64_t first) {
    int64_t i = 0;
    const auto one = [&] {
        bits[(first + i) >> 3] |= static_cast<std::uint8_t>((from[i * step] != 0) << ((first + i) & 7));
        ++i;
    };
    while (i < n && ((first + i) & 7) != 0) one();
    for (; step == 1 && i + 8 <= n; i += 8) bits[(first + i) >> 3] = bits_of_bytes(from + i);
    while (i < n) one();
}

// The n rows of outer of a mask of elements, shared out to threads: f(piece, begin, end). Pieces begin at multiples of `unit`.
inline constexpr int64_t kMostPieces = 16;
template <class F>
void in_pieces(const Geometry& g, int64_t n, int64_t unit, const F& f) {
    const int64_t rows = std::max<int64_t>((n + kMostPieces - 1) / kMostPieces + unit - 1, unit) / unit * unit;
    const bool worth_it = n * g.channels * g.inner >= 1 << 16;
    const auto piece = [&](int64_t i) { f(i, i * rows, std::min((i + 1) * rows, n)); };
    (void)parallel::for_each((n + rows - 1) / rows, {.worth_it = worth_it, .interruptible = false}, piece);
}

// How many values count, and the sum of their weights, of each part and channel.
class Counts {
public:
    Counts() = default;
    Counts(const Geometry& g, const Parts& parts) : inner_(g.inner), parts_(parts) {}

    bool same() const { return !per_channel_; }  // in all channels
    // The sum of the weights, exactly.
    BatchSum exact_weight(int64_t p, int64_t c) const {
        return weights_.empty() ? BatchSum{{weight(p, c), 0, 0}} : weights_[place(p, c)].exact;
    }
    // One part's, of each channel, from elsewhere.
    Counts(const Parts& parts, std::vector<int64_t> positions, const std::vector<double>& weights)
        : channels_(static_cast<int64_t>(positions.size())), parts_(parts), per_channel_(true), positions_(std::move(positions)) {
        for (const double weight : weights) weights_.push_back({weight, {}});
    }
    int64_t positions(int64_t p, int64_t c) const { return plain() ? parts_.size(p) * inner_ : positions_[place(p, c)]; }
    double weight(int64_t p, int64_t c) const {
        return weights_.empty() ? static_cast<double>(positions(p, c)) : weights_[place(p, c)].total;
    }
    Column<double> weights(int64_t p, int64_t c, int64_t n) const {
        Column<double> w;
        if (per_channel_) {
            for_entries(n, [&](int64_t i) { w[i] = weight(p, c + i); });
        } else {
            const double all = weight(p, 0);
            for_entries(n, [&](int64_t i) { w[i] = all; });
        }
        return w;
    }
    // f(positions, weight) for each part and, where they differ, channel.
    template <class F>
    void each(const F& f) const {
        const int64_t channels = per_channel_ ? channels_ : 1;
        for (int64_t p = 0; p < parts_.count; ++p) {
            for (int64_t c = 0; c < channels; ++c) f(positions(p, c), weight(p, c));
        }
    }
    int64_t most() const {
        int64_t n = 0;
        each([&](int64_t positions, double) { n = std::max(n, positions); });
        return n;
    }

    // Counts what `p` says. Returns the number of a weight that is not finite or negative, or -1.
    int64_t count(const Geometry& g, const Positions& p) {
        channels_ = g.channels;
        per_channel_ = static_cast<bool>(p.element_mask);
        const std::size_t n = index(parts_.count * (per_channel_ ? channels_ : 1));
        positions_.assign(n, 0);
        if (!p.weights.empty()) weights_.assign(n, {});
        if (!per_channel_ && p.weights.empty() && parts_.count == 1) {  // by far the most frequent: a mask alone
            for (const std::uint8_t kept : p.mask) positions_[0] += kept != 0;
            positions_[0] *= g.count() / static_cast<int64_t>(p.mask.size());
            return -1;
        }
        if (per_channel_ && p.weights.empty()) {
            count_elements(g, PerElement(p.element_mask));
            return -1;
        }
        const PerPosition mask(p.mask, g.count());
        const PerPosition weights(p.weights, g.count());
        const PerElement elements(p.element_mask);
        int64_t bad = -1;
        const auto add = [&](std::size_t to, int64_t position, int64_t times) {
            if (p.weights.empty()) {
                positions_[to] += times;
                return;
            }
            const double w = weights[position];
            if (!(w >= 0) || std::isinf(w)) bad = position / weights.each();
            positions_[to] += w > 0 ? times : 0;
            weights_[to].exact.add(w * static_cast<double>(times));
        };
        for (int64_t part = 0; part < parts_.count; ++part) {
            const int64_t begin = parts_.begin(part) * inner_, end = begin + parts_.size(part) * inner_;
            const bool alone = p.mask.empty() && !per_channel_ && begin % weights.each() == 0 && end % weights.each() == 0;
            const int64_t step = alone ? weights.each() : 1;
            for (int64_t position = begin; position < end; position += step) {
                if (!per_channel_) {
                    if (p.mask.empty() || mask[position] != 0) add(index(part), position, step);
                    continue;
                }
                for (int64_t c = 0; c < channels_; ++c) {
                    if (elements.at(position / inner_, c, position % inner_) != 0) add(index(part * channels_ + c), position, 1);
                }
            }
        }
        for (Weight& weight : weights_) weight.total = weight.exact.total();
        return bad;
    }

private:
    void count_elements(const Geometry& g, const PerElement& elements) {
        const auto counted = [](const std::uint8_t* run, int64_t n) {
            int64_t kept = 0, i = 0;
            while (i + 8 <= n) {
                std::uint64_t ones = 0;  // of eight places of up to 255 words
                for (const int64_t end = std::min(n - 7, i + 255 * 8); i < end; i += 8) ones += ones_of_bytes(run + i);
                constexpr std::uint64_t kEven = 0x00ff00ff00ff00ff;
                kept += static_cast<int64_t>(((ones & kEven) + (ones >> 8 & kEven)) * 0x0001000100010001 >> 48);
            }
            for (; i < n; ++i) kept += run[i] != 0;
            return kept;
        };
        const bool by_runs = g.direction == kernels::ncs && elements.runs();
        for (int64_t p = 0; p < parts_.count; ++p) {
            std::vector<int64_t> found(index(std::min(kMostPieces, parts_.size(p)) * channels_));
            in_pieces(g, parts_.size(p), 1, [&](int64_t piece, int64_t first, int64_t last) {
                const int64_t begin = parts_.begin(p) + first, end = parts_.begin(p) + last;
                int64_t* const to = found.data() + piece * channels_;
                for (int64_t o = begin; by_runs && o < end; ++o) {
                    for (int64_t c = 0; c < channels_; ++c) to[c] += counted(elements.pointer(o, c, 0), g.inner);
                }
                if (!by_runs) count_rows(g, elements, begin * g.inner, end * g.inner, to);
            });
            for (std::size_t i = 0; i < found.size(); ++i) positions_[index(p * channels_) + i % index(channels_)] += found[i];
        }
    }
    // By rows: of eight channels side by side, so many rows at a time that a byte holds each count.
    void count_rows(const Geometry& g, const PerElement& elements, int64_t begin, int64_t end, int64_t* to) const {
        const int64_t by_eight = elements.channels_side_by_side() ? channels_ / 8 * 8 : 0;
        std::vector<std::uint64_t> counts(index(by_eight / 8));
        for (int64_t r = begin; r < end; ++r) {
            for (int64_t c = 0; c < by_eight; c += 8) counts[index(c / 8)] += ones_of_bytes(elements.pointer(r / g.inner, c, r % g.inner));
            for (int64_t c = by_eight; c < channels_; ++c) to[c] += elements.at(r / g.inner, c, r % g.inner) != 0;
            if ((r - begin) % 255 != 254 && r + 1 < end) continue;
            for (int64_t c = 0; c < by_eight; ++c) to[c] += static_cast<int64_t>(counts[index(c / 8)] >> c % 8 * 8 & 255);
            std::fill(counts.begin(), counts.end(), 0);
        }
    }
    bool plain() const { return positions_.empty(); }
    std::size_t place(int64_t p, int64_t c) const { return index(per_channel_ ? p * channels_ + c : p); }

    int64_t inner_ = 0, channels_ = 0;
    Parts parts_{};
    bool per_channel_ = false;
    std::vector<int64_t> positions_;
    struct Weight {
        double total;
        BatchSum exact;
    };
    std::vector<Weight> weights_;
};

// The elements of a mask as bits, in the layout of the kernels.
inline void elements_to_bits(const Geometry& g, const Parts& parts, const ConstTensor& elements, std::uint8_t* bits) {
    const BitLayout layout(g, parts);
    const PerElement at(elements);
    const bool runs = g.direction == kernels::ncs;
    std::memset(bits + layout.bytes() - kernels::kMaskSlack, 0, kernels::kMaskSlack);
    for (int64_t p = 0; p < parts.count; ++p) {
        std::uint8_t* const to = layout.mask(bits, p).bits;
        const int64_t per_outer = layout.outer_stride() * (runs ? 1 : g.inner);
        in_pieces(g, parts.size(p), 8, [&](int64_t, int64_t begin, int64_t end) {
            std::memset(to + begin * per_outer / 8, 0, index((end * per_outer + 7) / 8 - begin * per_outer / 8));
            for (int64_t o = begin; o < end; ++o) {
                const int64_t row = parts.begin(p) + o;
                for (int64_t c = 0; runs && c < g.channels; ++c) {
                    pack(at.pointer(row, c, 0), elements.inner_stride, g.inner, to,
                         o * layout.outer_stride() + c * layout.channel_stride());
                }
                for (int64_t i = 0; !runs && i < g.inner; ++i) {
                    pack(at.pointer(row, 0, i), elements.channel_stride, g.channels, to, (o * g.inner + i) * layout.outer_stride());
                }
            }
        });
    }
}

// What the kernels of one call get. `elements` are bits as elements_to_bits makes them, or null.
class Counting {
public:
    Counting(Workspace& ws, const Geometry& g, const Parts& parts, std::span<const std::uint8_t> mask, std::span<const double> weights,
             const std::uint8_t* elements, double scale = 0)
        : geometry_(g), parts_(parts), mask_(mask), weights_(weights), elements_(elements) {
        if (!mask.empty()) kept_ = g.direction == kernels::ncs ? bits(ws) : rows(ws);
        if (weights.empty()) return;
        if (scale != 0) {
            scale_ = agreed_ = scale;
            return;
        }
        // By a power of two, which changes no digit: the largest lands in [1, 2), so that nothing under- or overflows, in float either.
        double most = 0;
        for (int64_t i = 0; i < static_cast<int64_t>(weights.size()); ++i) {
            if (std::isfinite(weights[index(i)]) && weights[index(i)] > most && is_used(i)) most = weights[index(i)];
        }
        scale_ = agreed_ = most > 0 ? std::ldexp(1, std::clamp(-std::ilogb(most), -1000, 1000)) : 1;
    }

    // By which the weights that the kernels get are multiplied.
    double own_scale() const { return scale_; }
    // By which sums and weights are multiplied where they meet: the same, or what the ranks of a group agreed on.
    double scale() const { return agreed_; }
    bool weighted() const { return !weights_.empty(); }
    bool any_weighted() const { return any_weighted_ || weighted(); }
    void agree(double scale, bool any_weighted) {
        agreed_ = scale;
        any_weighted_ = any_weighted;
        if (weighted()) scale_ = scale;
    }
    bool by_element() const { return elements_ != nullptr; }
    bool every() const { return kept_.data == nullptr && elements_ == nullptr; }

    // What part p's kernels get.
    kernels::Kept kept(int64_t p) const {
        if (elements_ != nullptr) {
            const BitLayout layout(geometry_, parts_);
            return {elements_ + layout.begin(p), layout.outer_stride(), layout.channel_stride()};
        }
        if (kept_.data == nullptr) return {};
        const int64_t step = geometry_.direction == kernels::ncs ? kept_.outer_stride / 8 : geometry_.inner;
        return {kept_.data + parts_.begin(p) * step, kept_.outer_stride};
    }
    template <class C>
    kernels::Weights weights(const kernels::Weights& all, int64_t p) const {
        if (all.data == nullptr) return {};
        const int64_t step = geometry_.direction == kernels::ncs ? all.outer_stride : geometry_.inner;
        return {static_cast<const C*>(all.data) + parts_.begin(p) * step, all.outer_stride, all.inner_step};
    }
    // For kernels that read weights of type C, of all parts: 0 where a position does not count.
    template <class C>
    kernels::Weights all_weights(Workspace& ws) const {
        return weights_.empty() ? kernels::Weights{} : weights_of<C>(ws, 0, geometry_.outer);
    }
    // Of n rows of outer from `first` on; without weights each counts once.
    template <class C>
    kernels::Weights weights_of(Workspace& ws, int64_t first, int64_t n) const {
        static constexpr double one = 1;
        const int64_t inner = geometry_.inner, begin = first * inner, end = begin + n * inner;
        const PerPosition weights(weights_.empty() ? std::span(&one, 1) : weights_, geometry_.count());
        const PerPosition mask(mask_, geometry_.count());
        const bool masked = !mask_.empty();
        const auto value = [&](int64_t p) { return masked && mask[p] == 0 ? C{0} : static_cast<C>(weights[p] * scale_); };
        if (geometry_.direction == kernels::ncs && !masked && weights.each() % inner == 0) {
            C* const w = ws.take<C>(n * kernels::kLanes);
            for (int64_t o = 0; o < n; ++o) std::fill_n(w + o * kernels::kLanes, kernels::kLanes, value(begin + o * inner));
            return {w, kernels::kLanes, 0};
        }
        C* const w = ws.take<C>(end - begin + kernels::kLanes);
        for (int64_t p = begin; p < end; ++p) w[p - begin] = value(p);
        std::fill_n(w + (end - begin), kernels::kLanes, C{0});
        return {w, inner, 1};
    }
    // The first positions of part p that count for channel c, at most `most` of them, counted from the part's first.
    int64_t first(int64_t p, int64_t c, int64_t* positions, int64_t most) const {
        const int64_t begin = parts_.begin(p) * geometry_.inner, end = begin + parts_.size(p) * geometry_.inner;
        const PerPosition mask(mask_, geometry_.count());
        const PerPosition weights(weights_, geometry_.count());
        int64_t n = 0;
        for (int64_t i = begin; i < end && n < most; ++i) {
            const bool counts = (mask_.empty() || mask[i] != 0) && (weights_.empty() || weights[i] > 0);
            if (counts && (elements_ == nullptr || element(p, i - begin, c))) positions[n++] = i - begin;
        }
        return n;
    }

private:
    // Whether anything counts where weight number i stands.
    bool is_used(int64_t i) const {
        const int64_t each = PerPosition(weights_, geometry_.count()).each();
        const PerPosition mask(mask_, geometry_.count());
        for (int64_t position = i * each; position < (i + 1) * each; ++position) {
            if (elements_ == nullptr && (mask_.empty() || mask[position] != 0)) return true;
            const int64_t p = std::min(position / geometry_.inner / parts_.rows, parts_.count - 1);
            for (int64_t c = 0; elements_ != nullptr && c < geometry_.channels; ++c) {
                if (element(p, position - parts_.begin(p) * geometry_.inner, c)) return true;
            }
        }
        return false;
    }
    bool element(int64_t p, int64_t position, int64_t c) const {
        const kernels::Kept k = kept(p);
        const int64_t inner = geometry_.inner;
        const int64_t bit = geometry_.direction == kernels::ncs
                                ? position / inner * k.outer_stride + c * k.channel_stride + position % inner
                                : position * k.outer_stride + c;
        return (k.data[bit >> 3] >> (bit & 7) & 1) != 0;
    }
    // A bit per position, each run starting with a whole byte.
    kernels::Kept bits(Workspace& ws) const {
        const int64_t inner = geometry_.inner, stride = (inner + 7) / 8;
        auto* const to = ws.take<std::uint8_t>(geometry_.outer * stride + kernels::kMaskSlack);
        const PerPosition mask(mask_, geometry_.count());
        for (int64_t o = 0; o < geometry_.outer; ++o) {
            std::uint8_t* const run = to + o * stride;
            if (mask.each() % inner == 0) {
                std::memset(run, mask[o * inner] != 0 ? 0xff : 0, index(stride));
                continue;
            }
            for (int64_t b = 0; b < stride; ++b) run[b] = byte(mask, o * inner + b * 8, std::min<int64_t>(8, inner - b * 8));
        }
        std::memset(to + geometry_.outer * stride, 0, kernels::kMaskSlack);
        return {to, stride * 8};
    }
    std::uint8_t byte(const PerPosition<std::uint8_t>& mask, int64_t first, int64_t n) const {
        if (n == 8 && mask.each() == 1) return bits_of_bytes(mask_.data() + first);
        unsigned bits = 0;
        for (int64_t i = 0; i < n; ++i) bits |= static_cast<unsigned>(mask[first + i] != 0) << i;
        return static_cast<std::uint8_t>(bits);
    }
    // A byte per row: the caller's, if there are so many.
    kernels::Kept rows(Workspace& ws) const {
        const PerPosition mask(mask_, geometry_.count());
        if (mask.each() == 1) return {mask_.data(), 0};
        auto* const to = ws.take<std::uint8_t>(geometry_.count());
        for (int64_t p = 0; p < geometry_.count(); p += mask.each()) std::fill_n(to + p, mask.each(), mask[p]);
        return {to, 0};
    }

    const Geometry& geometry_;
    const Parts& parts_;
    std::span<const std::uint8_t> mask_;
    std::span<const double> weights_;
    const std::uint8_t* elements_;
    double scale_ = 1, agreed_ = 1;
    bool any_weighted_ = false;
    kernels::Kept kept_{};
};

// Rows n of outer from `first` on.
inline Tensor rows_of(Tensor v, int64_t first, int64_t n) {
    v.data = static_cast<std::byte*>(v.data) + first * v.outer_stride * element_size(v.dtype);
    v.outer = n;
    return v;
}
inline Tensor channel_of(Tensor v, int64_t c) {
    v.data = static_cast<std::byte*>(v.data) + c * v.channel_stride * element_size(v.dtype);
    v.channels = 1;
    return v;
}

// Zeros in all of a tensor.
inline void clear(const Tensor& v) {
    const int64_t size = element_size(v.dtype);
    for (int64_t o = 0; o < v.outer; ++o) {
        for (int64_t c = 0; c < v.channels; ++c) {
            auto* const run = static_cast<std::byte*>(v.data) + (o * v.outer_stride + c * v.channel_stride) * size;
            for (int64_t i = 0; i < v.inner; ++i) std::memset(run + i * v.inner_stride * size, 0, index(size));
        }
    }
}

// Zeros in channel c of part p where empty(p, c).
template <class Empty>
void clear_where(const Geometry& g, const Parts& parts, const Tensor& v, const Empty& empty) {
    for (int64_t p = 0; v && p < parts.count; ++p) {
        for (int64_t c = 0; c < g.channels; ++c) {
            if (empty(p, c)) clear(channel_of(rows_of(v, parts.begin(p), parts.size(p)), c));
        }
    }
}

}  // namespace batchnorm
