// Which positions of a call count and how often, from the caller's spans to what the kernels read: bits for runs (ncs), a byte per row
// (nsc), weights brought to about 1. Used by check.cpp (counts) and the drivers; N*S values once per call, while the tensors have C times
// as many. Knows no kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "coeffs.h"
#include "plan.h"
#include "workspace.h"

namespace batchnorm {

// One value per position of what may hold fewer.
template <class T>
class PerPosition {
public:
    PerPosition(std::span<const T> values, std::int64_t count)
        : data_(values.data()), each_(values.empty() ? 1 : count / static_cast<std::int64_t>(values.size())) {}
    T operator[](std::int64_t p) const { return each_ == 1 ? data_[p] : data_[p / each_]; }
    // Consecutive positions with one value.
    std::int64_t each() const { return each_; }

private:
    const T* data_;
    std::int64_t each_;
};

struct Counted {
    std::int64_t positions = 0;
    double weight = 0, most = 0;  // the weights' sum, and the largest
    std::int64_t bad = -1;        // a weight that is not finite or negative
};

inline Counted count_positions(const Positions& p, std::int64_t count) {
    Counted c;
    coeffs::Sum sum{0, 0};  // as exact as the sums of x that it divides
    const auto weight = [&](std::int64_t i, std::int64_t times) {
        const double w = p.weights[static_cast<std::size_t>(i)];
        if (!(w >= 0) || std::isinf(w)) c.bad = i;
        c.positions += w > 0 ? times : 0;
        sum.add(w * static_cast<double>(times));
        c.most = std::max(c.most, w);
    };
    if (p.weights.empty()) {
        for (const std::uint8_t kept : p.mask) c.positions += kept != 0;
        c.positions *= count / static_cast<std::int64_t>(p.mask.size());
        c.weight = static_cast<double>(c.positions);
    } else if (p.mask.empty()) {
        const std::int64_t each = PerPosition(p.weights, count).each();
        for (std::int64_t i = 0; i < static_cast<std::int64_t>(p.weights.size()); ++i) weight(i, each);
    } else {
        const PerPosition mask(p.mask, count);
        const std::int64_t each = PerPosition(p.weights, count).each();
        for (std::int64_t i = 0; i < count; ++i) {
            if (mask[i] != 0) weight(i / each, 1);
        }
    }
    if (!p.weights.empty()) c.weight = sum.total();
    return c;
}

// What the kernels of one call get.
class Counting {
public:
    Counting(Workspace& ws, const Geometry& g, const Positions& p) : geometry_(g), positions_(p), n_(g.weight) {
        if (!p.mask.empty()) kept_ = g.direction == kernels::ncs ? bits(ws) : rows(ws);
        if (p.weights.empty()) return;
        // By a power of two, which changes no digit: the largest lands in [1, 2), so that nothing under- or overflows, in float either.
        const double most = count_positions(p, g.count()).most;
        scale_ = most > 0 ? std::ldexp(1, std::clamp(-std::ilogb(most), -1000, 1000)) : 1;
        n_ *= scale_;
    }

    // The sum of the weights as the kernels get them.
    double n() const { return n_; }
    kernels::Kept kept() const { return kept_; }
    // For a kernel that reads weights of type C: 0 where a position does not count.
    template <class C>
    kernels::Weights weights(Workspace& ws) const {
        if (positions_.weights.empty()) return {};
        const std::int64_t count = geometry_.count(), inner = geometry_.inner;
        const PerPosition weights(positions_.weights, count);
        const PerPosition mask(positions_.mask, count);
        const bool masked = !positions_.mask.empty();
        const auto value = [&](std::int64_t p) { return masked && mask[p] == 0 ? C{0} : static_cast<C>(weights[p] * scale_); };
        if (geometry_.direction == kernels::ncs && !masked && weights.each() % inner == 0) {
            C* const w = ws.take<C>(geometry_.outer * kernels::kLanes);
            for (std::int64_t o = 0; o < geometry_.outer; ++o) std::fill_n(w + o * kernels::kLanes, kernels::kLanes, value(o * inner));
            return {w, kernels::kLanes, 0};
        }
        C* const w = ws.take<C>(count + kernels::kLanes);
        const std::int64_t each = masked ? 1 : weights.each();
        for (std::int64_t p = 0; p < count; p += each) std::fill_n(w + p, each, value(p));
        std::fill_n(w + count, kernels::kLanes, C{0});
        return {w, inner, 1};
    }
    // The first positions that count, at most `most` of them.
    std::int64_t first(std::int64_t* positions, std::int64_t most) const {
        const std::int64_t count = geometry_.count();
        const PerPosition mask(positions_.mask, count);
        const PerPosition weights(positions_.weights, count);
        std::int64_t n = 0;
        for (std::int64_t p = 0; p < count && n < most; ++p) {
            const bool counts = (positions_.mask.empty() || mask[p] != 0) && (positions_.weights.empty() || weights[p] > 0);
            if (counts) positions[n++] = p;
        }
        return n;
    }

private:
    // A bit per position, each run starting with a whole byte.
    kernels::Kept bits(Workspace& ws) const {
        const std::int64_t inner = geometry_.inner, stride = (inner + 7) / 8;
        auto* const to = ws.take<std::uint8_t>(geometry_.outer * stride + kernels::kMaskSlack);
        const PerPosition mask(positions_.mask, geometry_.count());
        for (std::int64_t o = 0; o < geometry_.outer; ++o) {
            std::uint8_t* const run = to + o * stride;
            if (mask.each() % inner == 0) {
                std::memset(run, mask[o * inner] != 0 ? 0xff : 0, static_cast<std::size_t>(stride));
                continue;
            }
            for (std::int64_t b = 0; b < stride; ++b) run[b] = byte(mask, o * inner + b * 8, std::min<std::int64_t>(8, inner - b * 8));
        }
        std::memset(to + geometry_.outer * stride, 0, kernels::kMaskSlack);
        return {to, stride * 8};
    }
    std::uint8_t byte(const PerPosition<std::uint8_t>& mask, std::int64_t first, std::int64_t n) const {
        if (n == 8 && mask.each() == 1) {
            std::uint64_t v;
            std::memcpy(&v, positions_.mask.data() + first, sizeof v);
            // Each byte to its lowest bit, set unless it is 0; then the product brings bit 8 i to bit 56 + i.
            v = ((((v & 0x7f7f7f7f7f7f7f7f) + 0x7f7f7f7f7f7f7f7f) | v) >> 7) & 0x0101010101010101;
            return static_cast<std::uint8_t>(v * 0x0102040810204080 >> 56);
        }
        unsigned bits = 0;
        for (std::int64_t i = 0; i < n; ++i) bits |= static_cast<unsigned>(mask[first + i] != 0) << i;
        return static_cast<std::uint8_t>(bits);
    }
    // A byte per row: the caller's, if there are so many.
    kernels::Kept rows(Workspace& ws) const {
        const PerPosition mask(positions_.mask, geometry_.count());
        if (mask.each() == 1) return {positions_.mask.data(), 0};
        auto* const to = ws.take<std::uint8_t>(geometry_.count());
        for (std::int64_t p = 0; p < geometry_.count(); p += mask.each()) std::fill_n(to + p, mask.each(), mask[p]);
        return {to, 0};
    }

    const Geometry& geometry_;
    const Positions& positions_;
    double n_;
    double scale_ = 1;
    kernels::Kept kept_{};
};

// Zeros in all of a tensor.
inline void clear(const Tensor& v) {
    const std::int64_t size = element_size(v.dtype);
    for (std::int64_t o = 0; o < v.outer; ++o) {
        for (std::int64_t c = 0; c < v.channels; ++c) {
            auto* const run = static_cast<std::byte*>(v.data) + (o * v.outer_stride + c * v.channel_stride) * size;
            for (std::int64_t i = 0; i < v.inner; ++i) std::memset(run + i * v.inner_stride * size, 0, static_cast<std::size_t>(size));
        }
    }
}

}  // namespace batchnorm
