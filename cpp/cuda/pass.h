// Kernels that go through all elements: forward and backward of a call. A thread takes a unit of them at a time, which follow one another
// in memory: a vector of 16 bytes, or 8 elements where they share a byte of the activation's bits.
#pragma once

#include "numbers.h"

namespace batchnorm::cuda {

// More numbers per channel than 8 elements' would not stay in registers.
template <class T, Gate gate>
inline constexpr int kUnitOf = gate == kernels::masked || gate == kernels::curve || sizeof(T) == 2 ? 8 : 4;

// N elements from number `first` on, or what is left of them.
template <int N>
struct Unit {
    int64_t first;
    int n;
    Place place;  // of the first

    BATCHNORM_HOST_DEVICE Unit(const Shape& s, int64_t number) : first(number) {
        const int64_t left = s.elements() - number;
        n = left < N ? static_cast<int>(left) : N;
        const int64_t fast = s.runs() ? s.inner : s.channels, middle = s.runs() ? s.channels : s.inner;
        int64_t row, at, outer, of_row;
        if (number < (int64_t{1} << 32) && fast < (int64_t{1} << 32) && middle < (int64_t{1} << 32)) {  // short divisions
            const auto small = static_cast<std::uint32_t>(number), by_fast = static_cast<std::uint32_t>(fast);
            const auto by_middle = static_cast<std::uint32_t>(middle);
            row = small / by_fast;
            at = small % by_fast;
            outer = static_cast<std::uint32_t>(row) / by_middle;
            of_row = static_cast<std::uint32_t>(row) % by_middle;
        } else {
            row = number / fast;
            at = number % fast;
            outer = row / middle;
            of_row = row % middle;
        }
        place = s.runs() ? Place{outer, of_row, at} : Place{outer, at, of_row};
    }
    // A single element.
    BATCHNORM_HOST_DEVICE Unit(const Shape& s, const Place& p) : first(s.number(p.outer, p.channel, p.inner)), n(1), place(p) {}
    // Calls f(k, place) for each of them.
    template <class F>
    BATCHNORM_HOST_DEVICE void each(const Shape& s, const F& f) const {
        Place p = place;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (k >= n) return;
            f(k, p);
            int64_t& fast = s.runs() ? p.inner : p.channel;
            int64_t& middle = s.runs() ? p.channel : p.inner;
            if (++fast < (s.runs() ? s.inner : s.channels)) continue;
            fast = 0;
            if (++middle < (s.runs() ? s.channels : s.inner)) continue;
            middle = 0;
            ++p.outer;
        }
    }
    // Whether all are of one run.
    BATCHNORM_HOST_DEVICE bool in_one_run(const Shape& s) const { return s.runs() && n == N && place.inner + N <= s.inner; }
};

// 16 bytes at a time, in arrays that follow one another and are aligned to that.
struct alignas(16) Vector {
    std::uint32_t word[4];
};
template <class T, int N>
BATCHNORM_INLINE void load_unit(T (&v)[N], const Array<const T>& from, const Unit<N>& unit, const Shape& s, bool vectors) {
    if (vectors && unit.n == N) {
        constexpr int kVectors = N * static_cast<int>(sizeof(T)) / 16;
        Vector all[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) all[j] = reinterpret_cast<const Vector*>(from.data + unit.first)[j];
        memcpy(v, all, sizeof v);
    } else {
        unit.each(s, [&](int k, const Place& p) { v[k] = *from.at(p); });
    }
}
template <class T, int N>
BATCHNORM_INLINE void store_unit(const T (&v)[N], const Array<T>& to, const Unit<N>& unit, const Shape& s, bool vectors) {
    if (vectors && unit.n == N) {
        constexpr int kVectors = N * static_cast<int>(sizeof(T)) / 16;
        Vector all[kVectors];
        memcpy(all, v, sizeof v);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) reinterpret_cast<Vector*>(to.data + unit.first)[j] = all[j];
    } else {
        unit.each(s, [&](int k, const Place& p) { *to.at(p) = v[k]; });
    }
}

// Whether an array is one of vectors, or absent.
template <class T>
bool has_vectors(const Array<T>& v, const Shape& s) {
    return !v || (v.dense(s) && reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0);
}

// One number per channel for each element of a unit, as the formulas of kernels/elements.h take them.
template <class C, int N>
struct PerElement {
    C value[N];
    BATCHNORM_INLINE C at(int64_t k) const { return value[k]; }
};

// Loads those of some arrays [cell][channel], and again only where the next unit has others.
class NumbersOfUnit {
public:
    template <int N, class F>
    BATCHNORM_INLINE void find(const Shape& s, const Unit<N>& unit, const F& load) {
        const bool one = unit.in_one_run(s);
        const int64_t key = s.cells() > 1 || (s.runs() && !one) ? -1 : unit.place.channel;
        if (key >= 0 && key == key_) return;
        key_ = key;
        const int64_t cell = s.cell_of(unit.place.outer) * s.channels;
        if (one) return load(0, cell + unit.place.channel, true);
        unit.each(s, [&](int k, const Place& p) { load(k, (s.cells() == 1 ? 0 : s.cell_of(p.outer) * s.channels) + p.channel, false); });
    }
    // Puts a number where `load` of find is asked to.
    template <class C, int N>
    static BATCHNORM_INLINE void put(PerElement<C, N>& to, int k, bool all, C value) {
        to.value[k] = value;
#pragma unroll
        for (int j = 1; j < N; ++j) {
            if (all) to.value[j] = value;
        }
    }

private:
    int64_t key_ = -1;
};

template <class Op>
struct ForElements {
    static constexpr int kThreads = 256;
    using Shared = NoShared;
    static constexpr int64_t kAtOnce = kThreads * Op::kUnit;
    Op op;
    Shape shape;
    int64_t units_of_thread;

    ForElements(const Op& o, const Shape& s) : op(o), shape(s) {
        units_of_thread = blocks_for(shape.elements(), kAtOnce) > kManyBlocks ? 4 : 1;
    }
    int64_t blocks() const { return blocks_for(shape.elements(), kAtOnce * units_of_thread); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            typename Op::Numbers numbers;
            NumbersOfUnit found;
            for (int64_t j = 0; j < units_of_thread; ++j) {
                const int64_t first = (block.index() * units_of_thread + j) * kAtOnce + thread * Op::kUnit;
                if (first >= shape.elements()) return;
                op(typename Op::Elements(shape, first), numbers, found);
            }
        });
    }
};

// y = act((x - center) * scale + offset + z), 0 where nothing counts.
template <class T, Gate gate>
struct ApplyOp {
    static constexpr int kUnit = kUnitOf<T, gate>;
    using C = Compute<T>;
    using Elements = Unit<kUnit>;
    struct Numbers {
        PerElement<C, kUnit> center, scale, offset;
    };
    Array<const T> x, z;  // z may be absent
    Array<T> y;
    Shape shape;
    Counted counted;
    AffineNumbers<C> affine_of;
    std::uint8_t* bits;  // out: where a piecewise linear activation is on; may be null
    bool clears;         // channels without values get 0
    Curve curve;
    bool vectors;

    BATCHNORM_INLINE void operator()(const Elements& unit, Numbers& k, NumbersOfUnit& found) const {
        T in[kUnit], add[kUnit], out[kUnit];
        load_unit(in, x, unit, shape, vectors);
        if (z) load_unit(add, z, unit, shape, vectors);
        found.find(shape, unit, [&](int j, int64_t at, bool all) {
            NumbersOfUnit::put(k.center, j, all, affine_of.center[at]);
            NumbersOfUnit::put(k.scale, j, all, affine_of.scale[at]);
            NumbersOfUnit::put(k.offset, j, all, affine_of.offset[at]);
        });
        unsigned byte = 0;
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
            if (j >= unit.n) break;
            C v = affine(value_of(in[j]), k.center.at(j), k.scale.at(j), k.offset.at(j));
            if (z) v = v + value_of(add[j]);
            if (gate == kernels::masked || gate == kernels::curve) byte |= gate_bits<gate>(v, curve) << j;
            put(&out[j], gated<gate>(v, curve));
        }
        if (!counted.every() || clears) drop(unit, out);
        store_unit(out, y, unit, shape, vectors);
        if (bits != nullptr) bits[unit.first / kUnit] = static_cast<std::uint8_t>(byte);
    }

private:
    BATCHNORM_INLINE void drop(const Elements& unit, T (&out)[kUnit]) const {
        unit.each(shape, [&](int j, const Place& p) {
            const bool kept = counted.kept(p.outer * shape.inner + p.inner, unit.first + j);
            if (!kept || (clears && counted.n_values(shape, shape.part_of(p.outer), p.channel) == 0)) put(&out[j], C{0});
        });
    }
};

// dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0, with fixed statistics g * k_dy; dz = g; 0 where nothing counts.
template <class T, Gate gate>
struct GradApplyOp {
    static constexpr int kUnit = kUnitOf<T, gate>;
    using C = Compute<T>;
    using Elements = Unit<kUnit>;
    using Numbers = GradCoefficients<PerElement<C, kUnit>>;
    Array<const T> dy, x, z;  // z may be absent
    Array<T> dx, dz;          // may be absent
    Shape shape;
    Counted counted;
    GradientNumbers<C> numbers_of;
    const std::uint8_t* bits;
    bool fixed, weighted, clears;
    Curve curve;
    bool vectors;

    struct Weight {
        const void* data;  // null: none
        C value;
        BATCHNORM_INLINE C at(int64_t) const { return value; }
    };
    BATCHNORM_INLINE void operator()(const Elements& unit, Numbers& k, NumbersOfUnit& found) const {
        constexpr bool gated_by_x = gate == kernels::relu || gate == kernels::curve;
        T in[kUnit]{}, gradient_in[kUnit], add[kUnit]{}, out[kUnit], of_z[kUnit];
        load_unit(gradient_in, dy, unit, shape, vectors);
        if (gated_by_x || !fixed) load_unit(in, x, unit, shape, vectors);
        if (gate == kernels::curve && z) load_unit(add, z, unit, shape, vectors);
        found.find(shape, unit, [&](int j, int64_t at, bool all) {
            NumbersOfUnit::put(k.center, j, all, numbers_of.affine.center[at]);
            if (gated_by_x) {
                NumbersOfUnit::put(k.scale, j, all, numbers_of.affine.scale[at]);
                NumbersOfUnit::put(k.offset, j, all, numbers_of.affine.offset[at]);
            }
            NumbersOfUnit::put(k.k_dy, j, all, numbers_of.k_dy[at]);
            NumbersOfUnit::put(k.x_scale, j, all, numbers_of.x_scale[at]);
            NumbersOfUnit::put(k.k_x, j, all, numbers_of.k_x[at]);
            NumbersOfUnit::put(k.k_0, j, all, numbers_of.k_0[at]);
        });
        C weight[kUnit];
        if (weighted) {
            unit.each(shape, [&](int j, const Place& p) { weight[j] = static_cast<C>(counted.weight(p.outer * shape.inner + p.inner)); });
        }
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
            if (j >= unit.n) break;
            const C v = value_of(in[j]);
            const C g = through_gate<gate>(value_of(gradient_in[j]), v, value_of(add[j]), k.center, k.scale, k.offset, j, bits,
                                           unit.first + j, curve);
            put(&of_z[j], g);
            put(&out[j], fixed ? g * k.k_dy.at(j) : gradient(g, v, k, j, Weight{weighted ? &k : nullptr, weighted ? weight[j] : C{1}}, 0));
        }
        if (!counted.every() || clears) {
            drop(unit, out);
            drop(unit, of_z);
        }
        if (dz) store_unit(of_z, dz, unit, shape, vectors);
        if (dx) store_unit(out, dx, unit, shape, vectors);
    }

private:
    BATCHNORM_INLINE void drop(const Elements& unit, T (&out)[kUnit]) const {
        unit.each(shape, [&](int j, const Place& p) {
            const bool kept = counted.kept(p.outer * shape.inner + p.inner, unit.first + j);
            if (!kept || (clears && counted.n_values(shape, shape.part_of(p.outer), p.channel) == 0)) put(&out[j], C{0});
        });
    }
};

}  // namespace batchnorm::cuda
