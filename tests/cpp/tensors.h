// Tensors for tests: any storage type and layout, filled from and read as doubles, which hold the values of every storage type.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>

#include "check.h"

namespace test {

using Vector = std::vector<double>;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

// Bits of the fraction, the smallest exponent, bytes. Integers have the fraction that holds them all.
struct Format {
    const char* name;
    int fraction, low;
    size_t size;
};
constexpr Format kFormats[] = {{"float32", 23, -126, 4}, {"float64", 52, -1022, 8}, {"float16", 10, -14, 2}, {"bfloat16", 7, -126, 2},
                               {"uint8", 7, 0, 1},       {"int16", 14, 0, 2},       {"uint16", 15, 0, 2}};
inline const Format& format(Dtype t) { return kFormats[static_cast<size_t>(t)]; }
constexpr Dtype kFloating[] = {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16};

inline double load(Dtype t, const void* p) {
    const auto as = [&]<class S>(S value) {
        std::memcpy(&value, p, sizeof value);
        return value;
    };
    if (t == Dtype::float32) return as(float{});
    if (t == Dtype::float64) return as(double{});
    if (t == Dtype::uint8) return as(std::uint8_t{});
    if (t == Dtype::int16) return as(std::int16_t{});
    const std::uint16_t bits = as(std::uint16_t{});
    if (t == Dtype::uint16) return bits;
    const Format& f = format(t);
    const int most = (1 << (15 - f.fraction)) - 1, exponent = bits >> f.fraction & most;
    const double fraction = bits & ((1 << f.fraction) - 1), sign = bits >> 15 ? -1 : 1;
    if (exponent == most) return fraction == 0 ? sign * kInf : kNaN;
    return sign * std::ldexp(exponent == 0 ? fraction : fraction + (1 << f.fraction), std::max(exponent, 1) - 1 + f.low - f.fraction);
}
// Rounds to nearest even.
inline void store(Dtype t, void* p, double v) {
    const auto put = [&](auto value) { std::memcpy(p, &value, sizeof value); };
    if (t == Dtype::float32) return put(static_cast<float>(v));
    if (t == Dtype::float64) return put(v);
    if (t == Dtype::uint8) return put(static_cast<std::uint8_t>(v));
    if (t == Dtype::int16) return put(static_cast<std::int16_t>(v));
    if (t == Dtype::uint16) return put(static_cast<std::uint16_t>(v));
    const Format& f = format(t);
    const int sign = std::signbit(v) ? 0x8000 : 0, infinite = ((1 << (15 - f.fraction)) - 1) << f.fraction;
    if (!std::isfinite(v)) return put(static_cast<std::uint16_t>(sign | infinite | (std::isnan(v) ? 1 << (f.fraction - 1) : 0)));
    int exponent = 0;
    std::frexp(v, &exponent);
    const int step = std::max(v == 0 ? f.low : exponent - 1, f.low) - f.fraction;  // exponent of the last place
    const auto steps = static_cast<int64_t>(std::nearbyint(std::ldexp(std::abs(v), -step)));
    // A carry out of the fraction lands in the exponent, as it must.
    const int64_t bits = (static_cast<int64_t>(step + f.fraction - f.low) << f.fraction) + steps;
    put(static_cast<std::uint16_t>(std::min<int64_t>(bits, infinite) | sign));
}
inline double rounded(Dtype t, double v) {
    double memory = 0;
    store(t, &memory, v);
    return load(t, &memory);
}

// The tensors of a test are (outer, channels, inner), and so is the order of their values.
struct Shape {
    int64_t outer = 0, channels = 0, inner = 1;
    int64_t count() const { return outer * inner; }
    int64_t elements() const { return count() * channels; }
    size_t at(int64_t o, int64_t c, int64_t i) const { return static_cast<size_t>((o * channels + c) * inner + i); }
    int64_t channel(size_t element) const { return static_cast<int64_t>(element) / inner % channels; }
};
inline std::string text(const Shape& s) {
    return "(" + std::to_string(s.outer) + ", " + std::to_string(s.channels) + ", " + std::to_string(s.inner) + ")";
}

// How a tensor lies in memory.
struct Layout {
    const char* name;
    bool channels_last;     // channels contiguous, else inner
    bool rows = false;      // outer and inner as one
    int64_t gap = 0;        // unused elements after each run, and after each group of runs
    bool reversed = false;  // negative strides, but for the contiguous dimension
    int64_t every = 1;      // stride of the contiguous dimension
};
constexpr Layout kRuns[] = {{"ncs", false},
                            {"ncs with gaps", false, false, 3},
                            {"ncs reversed", false, false, 0, true},
                            {"ncs reversed with gaps", false, false, 1, true}};
constexpr Layout kRows[] = {{"nsc", true, true},
                            {"nsc of two levels", true},
                            {"nsc with gaps", true, false, 5},
                            {"nsc reversed", true, false, 0, true},
                            {"nsc rows with gaps", true, true, 3}};
constexpr Layout kColumns{"every other column", true, true, 0, false, 2};  // runs of one element

// Another way to lie, of the same direction and sizes of a view.
inline Layout unlike(const Layout& l, std::uint64_t seed) {
    if (l.every != 1) return l;
    return !l.channels_last ? kRuns[seed % 4] : l.rows ? kRows[seed % 2 * 4] : kRows[1 + seed % 3];
}

// Memory and a view of it.
class Array {
public:
    Array(Dtype dtype, const Layout& layout, const Shape& s) : shape_(s), size_(format(dtype).size) {
        const Shape v = layout.rows ? Shape{s.count(), s.channels, 1} : s;
        const int64_t short_n = layout.channels_last ? v.channels : v.inner, middle_n = layout.channels_last ? v.inner : v.channels;
        const int64_t middle = short_n * layout.every + layout.gap, outer = middle_n * middle + layout.gap, sign = layout.reversed ? -1 : 1;
        memory_.assign((static_cast<size_t>(v.outer * outer) * size_ + 7) / 8 + (v.outer == 0), std::bit_cast<double>(kUntouched));
        const int64_t first = layout.reversed ? (v.outer - 1) * outer + (middle_n - 1) * middle : 0;
        view_.data = bytes() + static_cast<size_t>(first) * size_;
        view_.dtype = dtype;
        view_.outer = v.outer, view_.channels = v.channels, view_.inner = v.inner;
        view_.outer_stride = sign * outer, view_.channel_stride = sign * middle, view_.inner_stride = layout.every;
        if (layout.channels_last) std::swap(view_.channel_stride, view_.inner_stride);
    }
    Array(Dtype dtype, const Layout& layout, const Shape& s, const Vector& values) : Array(dtype, layout, s) {
        each([&](void* element, size_t i) { store(view_.dtype, element, values[i]); });
    }
    Array(Array&&) = default;  // moved memory stays where it is; a copy's view would point to the original

    const Tensor& view() const { return view_; }
    operator const Tensor&() const { return view_; }
    operator ConstTensor() const { return view_; }
    // As rows of values per channel: shape (rows, C, 1).
    template <class Rows>
    Rows rows(int64_t n) const {
        return {{view_.data, view_.dtype == Dtype::float64, view_.channels, view_.channel_stride}, n, view_.outer_stride};
    }
    Vector values() const {
        Vector v(static_cast<size_t>(shape_.elements()));
        each([&](const void* element, size_t i) { v[i] = load(view_.dtype, element); });
        return v;
    }
    // The values, once nothing writes any more; nothing but the view's elements may have been written.
    Vector finish() {
        Vector v = values();
        each([&](void* element, size_t) { std::memset(element, 0x5a, size_); });
        bool untouched = true;
        for (const double d : memory_) untouched &= std::bit_cast<std::uint64_t>(d) == kUntouched;
        CHECK(untouched);
        return v;
    }

private:
    static constexpr std::uint64_t kUntouched = 0x5a5a5a5a5a5a5a5a;
    unsigned char* bytes() const { return reinterpret_cast<unsigned char*>(const_cast<double*>(memory_.data())); }

    // f(element, index)
    template <class F>
    void each(const F& f) const {
        const bool rows = view_.inner != shape_.inner;  // outer and inner as one
        const int64_t outer = rows ? shape_.inner * view_.outer_stride : view_.outer_stride,
                      inner = rows ? view_.outer_stride : view_.inner_stride;
        auto* const data = static_cast<unsigned char*>(view_.data);
        for (int64_t o = 0; o < shape_.outer; ++o) {
            for (int64_t c = 0; c < shape_.channels; ++c) {
                for (int64_t i = 0; i < shape_.inner; ++i) {
                    f(data + (o * outer + c * view_.channel_stride + i * inner) * static_cast<int64_t>(size_), shape_.at(o, c, i));
                }
            }
        }
    }

    Shape shape_;
    size_t size_;
    Vector memory_;
    Tensor view_;
};

// Numbers in [-8, 8) with all the significant bits that a type has, so that every sum rounds; the same on every machine.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
    double next(Dtype t) {
        const int bits = format(t).fraction + 2;  // one is the sign
        const auto integer = static_cast<int64_t>(word() >> (64 - bits)) - (int64_t{1} << (bits - 1));
        return std::ldexp(static_cast<double>(integer), 4 - bits);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>((word() >> 33) % static_cast<std::uint64_t>(n)); }

private:
    std::uint64_t word() { return state_ = state_ * 6364136223846793005u + 1442695040888963407u; }
    std::uint64_t state_;
};

inline bool near(double got, double want, double bound) {
    return (std::isnan(want) && std::isnan(got)) || got == want || std::abs(got - want) <= bound;
}

// The same bytes.
inline bool same(const Vector& a, const Vector& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
}

}  // namespace test
