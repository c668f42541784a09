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
        int64_t outer = place.outer, middle = s.runs() ? place.channel : place.inner, fast = s.runs() ? place.inner : place.channel;
        const int64_t fast_end = s.runs() ? s.inner : s.channels, middle_end = s.runs() ? s.channels : s.inner;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (k >= n) return;
            f(k, s.runs() ? Place{outer, middle, fast} : Place{outer, fast, middle});
            ++fast;
            const bool row_ends = fast == fast_end;
            middle += row_ends ? 1 : 0;
            fast = row_ends ? 0 : fast;
            const bool outer_ends = middle == middle_end;
            outer += outer_ends ? 1 : 0;
            middle = outer_ends ? 0 : middle;
        }
    }
};

// 16 bytes at a time, in arrays that follow one another and are aligned to that.
struct alignas(16) Vector {
    std::uint32_t word[4];
};
template <class T, int N>
BATCHNORM_INLINE void load_vectors(T (&v)[N], const T* from) {
    constexpr int kVectors = N * static_cast<int>(sizeof(T)) / 16;
    Vector all[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) all[j] = reinterpret_cast<const Vector*>(from)[j];
    memcpy(v, all, sizeof v);
}
template <class T, int N>
BATCHNORM_INLINE void load_unit(T (&v)[N], const Array<const T>& from, const Unit<N>& unit, const Shape& s, bool vectors) {
    if (vectors && unit.n == N) {
        load_vectors(v, from.data + unit.first);
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

// How a unit's numbers lie in an array [cell][channel]: they are those of the unit before, all one, side by side, or anywhere.
enum class Lie { as_before, one, side_by_side, anywhere };
class NumbersOfUnit {
public:
    template <int N>
    BATCHNORM_INLINE Lie find(const Shape& s, const Unit<N>& unit) {
        const bool one = s.runs() && (unit.n == 1 || (unit.n == N && unit.place.inner + N <= s.inner));
        const bool side_by_side = !s.runs() && unit.n == N && s.channels % N == 0;
        const bool same_from_channel = one || unit.n == 1 || (!s.runs() && unit.n == N);
        const int64_t key = s.cells() == 1 && same_from_channel ? unit.place.channel : -1;
        if (key >= 0 && key == key_) return Lie::as_before;
        key_ = key;
        return one ? Lie::one : side_by_side ? Lie::side_by_side : Lie::anywhere;
    }
    template <class C, int N>
    static BATCHNORM_INLINE void load(PerElement<C, N>& to, const C* from, Lie lie, const Shape& s, const Unit<N>& unit) {
        const int64_t first = (s.cells() == 1 ? 0 : s.cell_of(unit.place.outer) * s.channels) + unit.place.channel;
        if (lie == Lie::one) {
            const C value = from[first];
#pragma unroll
            for (int k = 0; k < N; ++k) to.value[k] = value;
        } else if (lie == Lie::side_by_side) {
            load_vectors(to.value, from + first);
        } else {
            unit.each(
                s, [&](int k, const Place& p) { to.value[k] = from[(s.cells() == 1 ? 0 : s.cell_of(p.outer) * s.channels) + p.channel]; });
        }
    }

private:
    int64_t key_ = -1;
};

// 0 where nothing counts, or where `clears`, in channels without values.
template <class T, int N>
BATCHNORM_INLINE void drop_uncounted(const Unit<N>& unit, const Shape& s, const Counted& counted, bool clears, T (&out)[N]) {
    unit.each(s, [&](int k, const Place& p) {
        const bool kept = counted.kept(p.outer * s.inner + p.inner, unit.first + k);
        if (!kept || (clears && counted.n_values(s, s.part_of(p.outer), p.channel) == 0)) put(&out[k], Compute<T>{0});
    });
}

// All elements. Of an operation's units `load` reads what it needs before `put` writes anything.
template <class Op>
struct ForElements {
    static constexpr int kThreads = 256;
    using Shared = NoShared;
    static constexpr int64_t kAtOnce = kThreads * Op::kUnit;
    // Units of a thread that are on their way together.
    static constexpr int kTogether = 2;
    Op op;
    int64_t units_of_thread;

    explicit ForElements(const Op& o) : op(o) {
        units_of_thread = blocks_for(op.shape.elements(), kAtOnce) > kManyBlocks ? 2 * kTogether : 1;
    }
    int64_t blocks() const { return blocks_for(op.shape.elements(), kAtOnce * units_of_thread); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            typename Op::Numbers numbers;
            NumbersOfUnit found;
            const int64_t begin = block.index() * units_of_thread * kAtOnce + thread * Op::kUnit, n = op.shape.elements();
            for (int64_t j = 0; j < units_of_thread && begin + j * kAtOnce < n; j += kTogether) {
                typename Op::Input input[kTogether];
#pragma unroll
                for (int k = 0; k < kTogether; ++k) {
                    const int64_t first = begin + (j + k) * kAtOnce;
                    if (j + k < units_of_thread && first < n) op.load(typename Op::Elements(op.shape, first), input[k]);
                }
#pragma unroll
                for (int k = 0; k < kTogether; ++k) {
                    const int64_t first = begin + (j + k) * kAtOnce;
                    if (j + k < units_of_thread && first < n) op.put(typename Op::Elements(op.shape, first), input[k], numbers, found);
                }
            }
        });
    }
};

// y = act((x - center) * scale + offset + z), 0 where nothing counts. `plain`: tensors are vectors, everything counts.
template <class T, Gate gate, bool plain>
struct ApplyOp {
    static constexpr int kUnit = kUnitOf<T, gate>;
    using C = Compute<T>;
    using Elements = Unit<kUnit>;
    struct Numbers {
        PerElement<C, kUnit> center, scale, offset;
    };
    struct Input {
        T x[kUnit], z[kUnit];
    };
    using Plain = ApplyOp<T, gate, true>;
    Array<const T> x, z;  // z may be absent
    Array<T> y;
    Shape shape;
    Counted counted;
    AffineNumbers<C> affine_of;
    std::uint8_t* bits;  // out: where a piecewise linear activation is on; may be null
    bool clears;         // channels without values get 0
    Curve curve;
    bool vectors;

    bool is_plain() const { return vectors && counted.every() && !clears; }
    Plain as_plain() const { return {x, z, y, shape, counted, affine_of, bits, clears, curve, vectors}; }
    BATCHNORM_INLINE void load(const Elements& unit, Input& in) const {
        load_unit(in.x, x, unit, shape, plain || vectors);
        if (z) load_unit(in.z, z, unit, shape, plain || vectors);
    }
    BATCHNORM_INLINE void put(const Elements& unit, const Input& in, Numbers& k, NumbersOfUnit& found) const {
        if (const Lie lie = found.find(shape, unit); lie != Lie::as_before) {
            NumbersOfUnit::load(k.center, affine_of.center, lie, shape, unit);
            NumbersOfUnit::load(k.scale, affine_of.scale, lie, shape, unit);
            NumbersOfUnit::load(k.offset, affine_of.offset, lie, shape, unit);
        }
        T out[kUnit]{};
        unsigned byte = 0;
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
            if (j >= unit.n) break;
            C v = affine(value_of(in.x[j]), k.center.at(j), k.scale.at(j), k.offset.at(j));
            if (z) v = v + value_of(in.z[j]);
            if (gate == kernels::masked || gate == kernels::curve) byte |= gate_bits<gate>(v, curve) << j;
            one_lane::put(&out[j], gated<gate>(v, curve));
        }
        if (!plain && (!counted.every() || clears)) drop_uncounted(unit, shape, counted, clears, out);
        store_unit(out, y, unit, shape, plain || vectors);
        if (bits != nullptr) bits[unit.first / kUnit] = static_cast<std::uint8_t>(byte);
    }
};

// dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0, with fixed statistics g * k_dy; dz = g; 0 where nothing counts.
template <class T, Gate gate, bool plain>
struct GradApplyOp {
    static constexpr int kUnit = kUnitOf<T, gate>;
    static constexpr bool kGatedByX = gate == kernels::relu || gate == kernels::curve;
    using C = Compute<T>;
    using Elements = Unit<kUnit>;
    using Numbers = GradCoefficients<PerElement<C, kUnit>>;
    struct Input {
        T dy[kUnit], x[kUnit], z[kUnit];
    };
    using Plain = GradApplyOp<T, gate, true>;
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
    bool is_plain() const { return vectors && counted.every() && !clears && !weighted; }
    Plain as_plain() const { return {dy, x, z, dx, dz, shape, counted, numbers_of, bits, fixed, weighted, clears, curve, vectors}; }
    BATCHNORM_INLINE void load(const Elements& unit, Input& in) const {
        load_unit(in.dy, dy, unit, shape, plain || vectors);
        if (kGatedByX || !fixed) load_unit(in.x, x, unit, shape, plain || vectors);
        if (gate == kernels::curve && z) load_unit(in.z, z, unit, shape, plain || vectors);
    }
    BATCHNORM_INLINE void put(const Elements& unit, const Input& in, Numbers& k, NumbersOfUnit& found) const {
        if (const Lie lie = found.find(shape, unit); lie != Lie::as_before) {
            NumbersOfUnit::load(k.center, numbers_of.affine.center, lie, shape, unit);
            if (kGatedByX) {
                NumbersOfUnit::load(k.scale, numbers_of.affine.scale, lie, shape, unit);
                NumbersOfUnit::load(k.offset, numbers_of.affine.offset, lie, shape, unit);
            }
            NumbersOfUnit::load(k.k_dy, numbers_of.k_dy, lie, shape, unit);
            NumbersOfUnit::load(k.x_scale, numbers_of.x_scale, lie, shape, unit);
            NumbersOfUnit::load(k.k_x, numbers_of.k_x, lie, shape, unit);
            NumbersOfUnit::load(k.k_0, numbers_of.k_0, lie, shape, unit);
        }
        C weight[kUnit];
        if (!plain && weighted) {
            unit.each(shape, [&](int j, const Place& p) { weight[j] = static_cast<C>(counted.weight(p.outer * shape.inner + p.inner)); });
        }
        T out[kUnit]{}, of_z[kUnit]{};
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
            if (j >= unit.n) break;
            const C v = kGatedByX || !fixed ? value_of(in.x[j]) : C{0}, add = gate == kernels::curve && z ? value_of(in.z[j]) : C{0};
            const C g =
                through_gate<gate>(value_of(in.dy[j]), v, add, k.center, k.scale, k.offset, j, MaskBits{bits, unit.first + j}, curve);
            one_lane::put(&of_z[j], g);
            const bool by_weight = !plain && weighted;
            one_lane::put(&out[j], fixed ? g * k.k_dy.at(j)
                                         : gradient(g, v, k, j, Weight{by_weight ? &k : nullptr, by_weight ? weight[j] : C{1}}, 0));
        }
        if (!plain && (!counted.every() || clears)) {
            drop_uncounted(unit, shape, counted, clears, out);
            drop_uncounted(unit, shape, counted, clears, of_z);
        }
        if (dz) store_unit(of_z, dz, unit, shape, plain || vectors);
        if (dx) store_unit(out, dx, unit, shape, plain || vectors);
    }
};

// The whole pass.
template <class Launch, class Op>
void pass_over_all(const Launch& launch, const Op& op) {
    const auto start = [&](const auto& kernel) { launch(kernel, kernel.blocks()); };
    if (op.is_plain()) {
        start(ForElements<typename Op::Plain>(op.as_plain()));
    } else {
        start(ForElements<Op>(op));
    }
}

}  // namespace batchnorm::cuda
