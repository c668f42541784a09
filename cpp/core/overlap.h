// Whether two strided blocks of memory have an element in common: exact, where address ranges overlap without that. Used by check.cpp
// alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>

#include "types.h"

namespace batchnorm {

// Addresses [low, high), from the first byte that is touched to the last.
struct Range {
    std::uintptr_t low = 0, high = 0;
    bool meets(const Range& o) const { return low < o.high && o.low < high; }
};

// The bytes of elements at first + sum of index * stride.
struct Block {
    std::uintptr_t first = 0;
    int64_t item = 1;  // bytes of an element
    struct Axis {
        int64_t size = 1, stride = 0;  // in bytes
    };
    // Of a stride in elements; that of one alone may be any, up to what cannot be multiplied.
    static Axis axis(int64_t size, int64_t stride, int64_t item) { return {size, size > 1 ? stride * item : 0}; }
    std::array<Axis, 3> axes{};

    Range range() const {
        int64_t low = 0, high = item;
        for (const Axis& a : axes) {
            if (a.size == 0 || first == 0) return {};
            (a.stride < 0 ? low : high) += (a.size - 1) * a.stride;
        }
        return {first + static_cast<std::uintptr_t>(low), first + static_cast<std::uintptr_t>(high)};
    }
};

template <bool writable>
Block block_of(const AnyView<writable>& v) {
    if (!v || v.outer == 0 || v.channels == 0 || v.inner == 0) return {};  // whose strides are anybody's, too
    const int64_t size = element_size(v.dtype);
    return {reinterpret_cast<std::uintptr_t>(v.data),
            size,
            {{Block::axis(v.outer, v.outer_stride, size), Block::axis(v.channels, v.channel_stride, size),
              Block::axis(v.inner, v.inner_stride, size)}}};
}
template <bool writable>
Block block_of(const AnyRows<writable>& v) {
    if (!v || v.values.size == 0) return {};
    const int64_t size = v.values.is_double ? 8 : 4;
    return {reinterpret_cast<std::uintptr_t>(v.values.data),
            size,
            {{Block::axis(std::max<int64_t>(v.rows, 1), v.row_stride, size), Block::axis(v.values.size, v.values.stride, size), {1, 0}}}};
}
template <bool writable>
Block block_of(const AnyChannels<writable>& v) {
    return block_of(AnyRows<writable>(v, 0, 0));
}
template <class T>
Block block_of(std::span<T> v) {
    return {reinterpret_cast<std::uintptr_t>(v.data()),
            static_cast<int64_t>(sizeof(T)),
            {{{static_cast<int64_t>(v.size()), static_cast<int64_t>(sizeof(T))}, {1, 0}, {1, 0}}}};
}

inline Block block_of(const Block& b) { return b; }

// The ranges alone, for the usual case that they tell enough.
template <class V>
Range range_of(const V& v) {
    return block_of(v).range();
}
template <bool writable>
Range range_of(const AnyView<writable>& v) {
    if (!v || v.outer == 0 || v.channels == 0 || v.inner == 0) return {};
    const auto first = reinterpret_cast<std::uintptr_t>(v.data);
    const int64_t item = element_size(v.dtype);
    int64_t low = 0, high = 1;  // in elements
    const auto reach = [&](int64_t n, int64_t stride) { (stride < 0 ? low : high) += (n - 1) * stride; };
    reach(v.outer, v.outer_stride), reach(v.channels, v.channel_stride), reach(v.inner, v.inner_stride);
    return {first + static_cast<std::uintptr_t>(low * item), first + static_cast<std::uintptr_t>(high * item)};
}
template <bool writable>
Range range_of(const AnyChannels<writable>& v) {
    if (v.size <= 0) return {};
    const auto first = reinterpret_cast<std::uintptr_t>(v.data);
    const int64_t item = v.is_double ? 8 : 4, extent = (v.size - 1) * v.stride * item;
    return {first + static_cast<std::uintptr_t>(std::min<int64_t>(extent, 0)),
            first + static_cast<std::uintptr_t>(std::max<int64_t>(extent, 0) + item)};
}

// Whether a sum of i_k * step_k with 0 <= i_k <= most_k can lie in [low, high]: a search from the largest step down, which the greatest
// common divisor of the steps that are left cuts short.
class StepSums {
public:
    void add(int64_t step, int64_t most) {
        if (most == 0) return;
        for (int i = 0; i < n_; ++i) {
            if (terms_[index(i)].step == step) return void(terms_[index(i)].most += most);
        }
        int i = n_++;  // the largest step first
        for (; i > 0 && terms_[index(i - 1)].step < step; --i) terms_[index(i)] = terms_[index(i - 1)];
        terms_[index(i)] = {step, most, 0, 0};
    }
    bool reach(int64_t low, int64_t high) {
        int64_t rest = 0, divisor = 0;
        for (int i = n_ - 1; i >= 0; --i) {
            rest += terms_[index(i)].step * terms_[index(i)].most;
            divisor = std::gcd(divisor, terms_[index(i)].step);
            terms_[index(i)].reach = rest;
            terms_[index(i)].divisor = divisor;
        }
        return search(0, low, high);
    }

private:
    struct Term {
        int64_t step, most, reach, divisor;  // reach, divisor: of this and the smaller steps
    };
    bool search(int i, int64_t low, int64_t high) {
        if (high < 0) return false;
        if (i == n_) return low <= 0;
        const Term& t = terms_[index(i)];
        if (low > t.reach) return false;
        if (std::max<int64_t>(low, 0) > high / t.divisor * t.divisor) return false;
        const int64_t rest = t.reach - t.step * t.most;
        const int64_t from = low <= rest ? 0 : (low - rest + t.step - 1) / t.step, to = std::min(t.most, high / t.step);
        for (int64_t k = from; k <= to; ++k) {
            if (--work_ < 0) return true;  // undecided counts as yes
            if (search(i + 1, low - k * t.step, high - k * t.step)) return true;
        }
        return false;
    }
    std::array<Term, 6> terms_{};
    int n_ = 0;
    int64_t work_ = 100'000;
};

inline bool share_element(const Block& a, const Block& b) {
    const Range of_a = a.range(), of_b = b.range();
    if (!of_a.meets(of_b)) return false;
    StepSums sums;
    for (const Block::Axis& axis : a.axes) sums.add(std::abs(axis.stride), axis.stride == 0 ? 0 : axis.size - 1);
    for (const Block::Axis& axis : b.axes) sums.add(std::abs(axis.stride), axis.stride == 0 ? 0 : axis.size - 1);
    // An element of a at its low + s, one of b at its high - item - t, with s and t sums of steps: they overlap if s + t is within an
    // element.
    const auto distance = static_cast<int64_t>(of_b.high - of_a.low) - b.item;
    return sums.reach(distance - a.item + 1, distance + b.item - 1);
}

// The same elements in the same order.
inline bool same_elements(const Block& a, const Block& b) {
    if (a.first != b.first || a.item != b.item) return false;
    return std::equal(a.axes.begin(), a.axes.end(), b.axes.begin(),
                      [](const Block::Axis& s, const Block::Axis& t) { return s.size == t.size && (s.size <= 1 || s.stride == t.stride); });
}

}  // namespace batchnorm
