// Forward and moments on a GPU, of one storage type: the CPU's order of sums, numbers and pass (core/forward.cpp), as kernels one behind
// the other on a stream.
#pragma once

#include "driver.h"
#include "small.h"

namespace batchnorm::cuda {

template <class T>
struct Fill {
    static constexpr int kThreads = 256;
    using Shared = NoShared;
    T* to;
    int64_t n;
    T value;

    int64_t blocks() const { return to == nullptr ? 0 : blocks_for(n, kThreads); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.index() * kThreads + thread;
            if (at < n) to[at] = value;
        });
    }
};

// Memory for statistics by rounds.
struct StatisticsMemory {
    SumsMemory sums;
    Statistics of{};

    void lay_out(Cutter& cut, const Shape& shape, const Tiling& tiling) {
        const int64_t n = shape.parts.count * shape.channels;
        sums.lay_out(cut, shape, tiling);
        of.shift = cut.take<double>(n);
        of.again = cut.take<std::uint8_t>(kRounds * n);
        of.any = cut.take<std::uint8_t>(kRounds);
    }
};

template <class T, class Then>
void find_statistics(const Launcher& launch, const ConstTensor& x, const Shape& shape, const Counted& counted, const Tiling& tiling,
                     const StatisticsMemory& memory, double eps, const Then& then) {
    if constexpr (is_double<T>) start(launch, FindShift<T>{Array<const T>(x), shape, counted, memory.of.shift});
    for (int round = 0; round < (is_double<T> ? kRounds : 2); ++round) {
        MomentsOp<T> op = in_round(MomentsOp<T>{Array<const T>(x), shape, counted}, memory.of, round);
        op.any = round == 0 ? nullptr : memory.of.any + round;
        op.none = round == 0 ? memory.of.any : nullptr;
        sum_tiles(launch, op, shape, tiling, memory.sums.tiles, round > 0);
        start(launch, FinishStatistics<Then>{memory.sums.merge(shape, tiling), shape, counted, memory.of, is_double<T>, eps, round, then});
    }
}

inline Options options_of(const Forward& f) {
    return {PerChannel(f.gamma, 1),
            PerChannel(f.beta, 0),
            PerChannel(f.mean),
            PerChannel(f.var),
            PerChannel(f.running.mean),
            PerChannel(f.running.var),
            PerChannel(f.running.decays),
            PerChannel(f.running.seen),
            f.running.decay,
            f.running.ddof,
            f.running.on_nonfinite == OnNonfinite::skip,
            f.renorm.enabled,
            PerChannel(f.renorm.mean),
            PerChannel(f.renorm.std),
            f.renorm.rmin,
            f.renorm.rmax,
            f.renorm.dmax,
            f.renorm.decay,
            f.eps};
}

// What a forward needs beside its arguments and Saved.
template <class C>
struct ForwardMemory {
    Counting counting;
    StatisticsMemory statistics;
    AffineNumbers<C> affine{};
    double *mean = nullptr, *var = nullptr;  // of running statistics, where others are given
    std::uint8_t* spoils = nullptr;          // whether running statistics would not stay finite

    void lay_out(Cutter& cut, const Shape& shape, const Tiling* tiling, bool counts, bool apart) {
        const int64_t n = shape.parts.count * shape.channels, cells = shape.cells() * shape.channels;
        counting.lay_out(cut, counts);
        if (tiling != nullptr) statistics.lay_out(cut, shape, *tiling);
        affine = {cut.take<C>(cells), cut.take<C>(cells), cut.take<C>(cells)};
        mean = cut.take<double>(apart ? n : 0);
        var = cut.take<double>(apart ? n : 0);
        spoils = cut.take<std::uint8_t>(1);
    }
};

inline void copy_positions(const Launcher& launch, const Forward& f, const Saved::Impl& s) {
    start(launch,
          CopyValues<std::uint8_t>{f.positions.mask.data(), const_cast<std::uint8_t*>(s.mask.data()), static_cast<int64_t>(s.mask.size())});
    start(launch,
          CopyValues<double>{f.positions.weights.data(), const_cast<double*>(s.weights.data()), static_cast<int64_t>(s.weights.size())});
}

template <class T, Gate gate>
SmallForward<T, gate> small_forward(const Forward& f, bool measures, const Tiling& tiling, const StatisticsMemory& memory,
                                    const Settle<Compute<T>>& settle, const ApplyOp<T, gate, false>& apply) {
    const Shape& shape = apply.shape;
    return {measures,
            {Array<const T>(f.x), shape, apply.counted, memory.of.shift},
            {Array<const T>(f.x), shape, apply.counted},
            {memory.sums.merge(shape, tiling), shape, apply.counted, memory.of, is_double<T>, f.eps, 0, settle},
            apply,
            channels_of_block(shape, tiling)};
}

template <class T>
void forward(const Forward& f, const Call& call, const Stream& stream, const char* name) {
    using C = Compute<T>;
    Launcher launch(stream, name);
    const Shape shape(call);
    const bool given = static_cast<bool>(f.mean), saves = f.saved != nullptr, empty = call.geometry.count() == 0;
    const bool learns = (static_cast<bool>(f.running.mean) || f.renorm.decay >= 0) && !empty;
    const bool measures = (!given || learns) && !empty, keeps = saves || !given || f.renorm.enabled;
    Saved::Impl local(std::pmr::null_memory_resource());
    Saved::Impl& s = saves ? prepared(*f.saved) : local;
    Cutter size(nullptr);
    lay_out(size, f, call, saves, s);
    const std::size_t kept_bytes = size.used();
    if (saves) {
        Cutter cut(s.block.take(kept_bytes));
        lay_out(cut, f, call, saves, s);
    }
    std::optional<Tiling> tiling;
    if (!empty) tiling.emplace(PartPlans(call.geometry, call.parts, {.reads = 1, .writes = 1, .sums = true}), call.parts.count);
    const auto place = [&](Cutter& cut) {
        if (!saves) {
            Cutter own(cut.take<std::byte>(static_cast<int64_t>(kept_bytes)));
            lay_out(own, f, call, saves, s);
        }
        ForwardMemory<C> m{Counting(shape, f.positions.mask, f.positions.weights, static_cast<bool>(f.positions.element_mask)), {}, {}};
        m.lay_out(cut, shape, measures ? &*tiling : nullptr, measures || saves, given && learns);
        return m;
    };
    Cutter needed(nullptr);
    place(needed);
    Cutter cut(launch.scratch(needed.used()));
    ForwardMemory<C> memory = place(cut);
    if (s.element_bits != nullptr && !empty) {
        start(launch, ElementsToBits{Array<const std::uint8_t>(f.positions.element_mask), shape, s.element_bits});
    }
    if (saves) {
        copy_positions(launch, f, s);
        describe(f, call, s);
    }
    const int64_t n = shape.parts.count * shape.channels;
    if (empty) {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        for (double* v : {s.mean, s.var, s.inv_std}) start(launch, Fill<double>{keeps && !given ? v : nullptr, n, nan});
        for (double* v : {s.r, s.d}) start(launch, Fill<double>{keeps ? v : nullptr, n, nan});
        for (double* v : {s.count, s.values}) start(launch, Fill<double>{keeps ? v : nullptr, n, 0});
    }
    const Counted counted = empty ? Counted{} : memory.counting.run(launch, s.element_bits);
    const Options options = options_of(f);
    Statistics& found = memory.statistics.of;
    found.mean = given ? memory.mean : s.mean;
    found.var = given ? memory.var : s.var;
    found.inv_std = given ? nullptr : s.inv_std;
    const auto kept = [&](double* v) { return keeps ? v : nullptr; };
    // Of several parts the step takes all, and what may be skipped is looked at as a whole first.
    const bool step_apart = learns && (shape.parts.count > 1 || options.skip);
    const Settle<C> settle{shape, counted,       options,       found,          saves ? s.mean : nullptr,
                           s.var, s.inv_std,     kept(s.count), kept(s.values), s.r,
                           s.d,   memory.affine, s.gamma.data,  s.beta.data,    learns && !step_apart};
    const Act act = act_of(f.activation, f.slope, f.x.dtype, s.bits != nullptr);
    const Array<const T> x(f.x), z(f.residual);
    const Array<T> y(f.y);
    const bool vectors = has_vectors(x, shape) && has_vectors(z, shape) && has_vectors(y, shape);
    const bool clears = counted.weights != nullptr && !given;
    const bool small = !empty && is_small(shape, *tiling, s.bits != nullptr);
    with_gate(act.gate, [&]<Gate gate>() {
        const ApplyOp<T, gate, false> apply{x, z, y, shape, counted, memory.affine, s.bits, clears, act.curve, vectors};
        if (small) return start(launch, small_forward<T, gate>(f, measures, *tiling, memory.statistics, settle, apply));
        if (measures) {
            find_statistics<T>(launch, f.x, shape, counted, *tiling, memory.statistics, f.eps, settle);
        } else if (given && (!empty || saves)) {
            start(launch, SettleGiven<C>{settle});
        }
        if (!empty) pass_over_all(launch, apply);
    });
    if (step_apart) {
        Learn learn{{shape, counted, options, found.mean, found.var, nullptr}, nullptr};
        if (options.skip) {
            start(launch, Fill<std::uint8_t>{memory.spoils, 1, 0});
            learn.step.spoils = memory.spoils;
            start(launch, learn);
            learn.step.spoils = nullptr;
            learn.spoilt = memory.spoils;
        }
        start(launch, learn);
    }
    s.updated = learns;
    s.full = saves;
}

// The variance with ddof, of what was found.
struct PutVariance {
    Shape shape;
    Counted counted;
    const double* found;
    double* var;
    double ddof;

    BATCHNORM_HOST_DEVICE void operator()(int64_t, int64_t c) const {
        const double n = counted.n(shape, 0, c);
        var[c] = n <= ddof ? std::numeric_limits<double>::quiet_NaN() : coeffs::with_ddof(found[c], n, ddof);
    }
};

template <class T>
void moments(const ConstTensor& x, const Call& call, std::span<double> mean, std::span<double> var, int64_t ddof, const Stream& stream,
             const Positions& positions) {
    Launcher launch(stream, "moments");
    const Shape shape(call);
    if (call.geometry.count() == 0) {
        for (double* v : {mean.data(), var.data()})
            start(launch, Fill<double>{v, shape.channels, std::numeric_limits<double>::quiet_NaN()});
        return;
    }
    const Tiling tiling(PartPlans(call.geometry, call.parts, {.reads = 1, .writes = 0, .sums = true}), 1);
    StatisticsMemory memory;
    std::uint8_t* bits = nullptr;
    const auto place = [&](Cutter& cut) {
        bits = cut.take<std::uint8_t>(positions.element_mask ? BitLayout(call.geometry, call.parts).bytes() : 0);
        Counting counting(shape, positions.mask, positions.weights, static_cast<bool>(positions.element_mask));
        counting.lay_out(cut, true);
        memory.lay_out(cut, shape, tiling);
        memory.of.var = cut.take<double>(shape.channels);
        return counting;
    };
    Cutter needed(nullptr);
    place(needed);
    Cutter cut(launch.scratch(needed.used()));
    Counting counting = place(cut);
    if (positions.element_mask) start(launch, ElementsToBits{Array<const std::uint8_t>(positions.element_mask), shape, bits});
    const Counted counted = counting.run(launch, bits);
    memory.of.mean = mean.data();
    const PutVariance put{shape, counted, memory.of.var, var.data(), static_cast<double>(ddof)};
    find_statistics<T>(launch, x, shape, counted, tiling, memory, 0, put);
}

}  // namespace batchnorm::cuda
