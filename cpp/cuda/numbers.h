// Numbers per channel, a thread for each channel of a part or a cell: sums of tiles to sums of parts or cells, these to statistics, to what
// the elementwise kernels take, to gradients of parameters and to running statistics. The formulas are those of core/coeffs.h.
#pragma once

#include "core/coeffs.h"
#include "core/running.h"
#include "sums.h"

namespace batchnorm::cuda {

// ---- sums of tiles -------------------------------------------------------------------------------------------------

// Adds the tiles of each set of a part in the plan's order: by groups of kTileGroup, then the groups.
struct Merge {
    static constexpr int kChannels = 8, kGroups = 32, kThreads = kChannels * kGroups;
    Shape shape;
    Tiling tiling;
    TileSums tiles;
    coeffs::Sum *first, *second;  // out, [set of the whole call][channel]
    coeffs::Sum* groups;          // scratch, for both sums [group of the whole call][channel]; null where no set has several groups

    BATCHNORM_HOST_DEVICE int64_t groups_before(int64_t part) const { return part * tiling.most.sets * tiling.most.tile_groups(); }
    BATCHNORM_HOST_DEVICE int64_t groups_of_all() const {
        return groups_before(tiling.parts - 1) + tiling.last.sets * tiling.last.tile_groups();
    }
    int64_t group_sums() const {
        return tiling.most.tile_groups() == 1 && tiling.last.tile_groups() == 1 ? 0 : 2 * groups_of_all() * shape.channels;
    }
    BATCHNORM_HOST_DEVICE int64_t columns() const { return (shape.channels + kChannels - 1) / kChannels; }
    BATCHNORM_HOST_DEVICE int64_t end_of(int64_t begin) const {
        return begin + kChannels < shape.channels ? begin + kChannels : shape.channels;
    }
    BATCHNORM_HOST_DEVICE int64_t sets_before(int64_t part) const { return part * tiling.most.sets; }
    int64_t sets() const { return sets_before(tiling.parts - 1) + tiling.last.sets; }

    // Sums of the sets of one part and at most kChannels channels.
    BATCHNORM_KERNEL_BODY void add(const ThreadBlock& block, int64_t part, int64_t begin, int64_t end) const {
        const Plan& plan = tiling.plan(part);
        const int64_t n_groups = plan.tile_groups(), n_tiles = plan.tiles();
        block.each([&](int thread) {
            const int64_t channel = begin + thread % kChannels;
            if (channel >= end) return;
            for (int64_t item = thread / kChannels; item < plan.sets * n_groups; item += kGroups) {
                const int64_t set = item / n_groups, from = item % n_groups * kTileGroup;
                const int64_t to = from + kTileGroup < n_tiles ? from + kTileGroup : n_tiles;
                coeffs::Sum a{0, 0}, b{0, 0};
                for (int64_t tile = from; tile < to; ++tile) {
                    const int64_t at = (tiling.before(part) + set * n_tiles + tile) * shape.channels + channel;
                    a.add(tiles.first[at]);
                    b.add(tiles.second[at]);
                }
                const int64_t all = groups_of_all() * shape.channels, at = (groups_before(part) + item) * shape.channels + channel;
                (n_groups == 1 ? first[(sets_before(part) + set) * shape.channels + channel] : groups[at]) = a;
                (n_groups == 1 ? second[(sets_before(part) + set) * shape.channels + channel] : groups[all + at]) = b;
            }
        });
        if (n_groups == 1) return;
        block.each([&](int thread) {
            const int64_t channel = begin + thread % kChannels;
            if (channel >= end) return;
            for (int64_t set = thread / kChannels; set < plan.sets; set += kGroups) {
                const int64_t to = (sets_before(part) + set) * shape.channels + channel;
                const int64_t all = groups_of_all() * shape.channels;
                const int64_t from = (groups_before(part) + set * n_groups) * shape.channels + channel;
                first[to] = added(groups + from, n_groups);
                second[to] = added(groups + all + from, n_groups);
            }
        });
    }

private:
    BATCHNORM_HOST_DEVICE coeffs::Sum added(const coeffs::Sum* from, int64_t n) const {
        coeffs::Sum sum{0, 0};
        for (int64_t g = 0; g < n; ++g) {
            const coeffs::Sum& group = from[g * shape.channels];
            sum.add(group.value);
            sum.error += group.error;
        }
        return sum;
    }
};

// ---- statistics ----------------------------------------------------------------------------------------------------

// Where each part's statistics stand, parts * channels.
struct Statistics {
    double *mean, *var, *inv_std;  // inv_std may be null
    double* shift;                 // of the next round's sums
    std::uint8_t *again, *any;     // which channels want another round, and whether any does: [round] each
};

BATCHNORM_HOST_DEVICE inline coeffs::Scale scale_of(int round) {
    constexpr coeffs::Scale far = coeffs::kFar, near = coeffs::kNear;
    return round == 2 ? far : near;
}

// The sums of a round.
template <class T>
BATCHNORM_HOST_DEVICE MomentsOp<T> in_round(MomentsOp<T> op, const Statistics& to, int round) {
    op.shift = round == 0 && !is_double<T> ? nullptr : to.shift;
    op.again = round == 0 ? nullptr : to.again + round * op.shape.parts.count * op.shape.channels;
    op.scale = round < 2 ? 0 : scale_of(round).s;
    return op;
}

// Round by round as core/statistics.h: 0 about 0 (of double data a value near), 1 about a better shift where that lay too far off, 2 scaled
// where squares overflowed, 3 where they underflowed. then(part, channel) takes statistics that are final.
template <class Then>
struct FinishStatistics {
    static constexpr int kThreads = Merge::kThreads;
    using Shared = NoShared;
    Merge merge;
    Shape shape;
    Counted counted;
    Statistics to;
    bool is_double;
    double eps;
    int round;
    Then then;

    int64_t blocks() const { return shape.parts.count * merge.columns(); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        const int64_t begin = block.index() % merge.columns() * Merge::kChannels;
        if (round == 0 || to.any[round] != 0) finish(block, round, block.index() / merge.columns(), begin, merge.end_of(begin));
    }
    BATCHNORM_KERNEL_BODY void finish(const ThreadBlock& block, int of_round, int64_t part, int64_t begin, int64_t end) const {
        merge.add(block, part, begin, end);
        block.each([&](int thread) {
            const int64_t channel = begin + thread, at = part * shape.channels + channel, n = shape.parts.count * shape.channels;
            if (channel >= end || (of_round > 0 && to.again[of_round * n + at] == 0)) return;
            for (int later = 1; of_round == 0 && later < kRounds; ++later) to.again[later * n + at] = 0;
            const int64_t set = merge.sets_before(part) * shape.channels + channel;
            const double sum = merge.first[set].total(), sum_sq = merge.second[set].total();
            const double count = counted.n(shape, part, channel) * counted.scaled();
            const int next =
                of_round < 2 ? from_sums(of_round, at, sum, sum_sq, count) : from_scaled_sums(of_round, at, sum, sum_sq, count);
            if (next == 0) return then(part, channel);
            to.again[next * n + at] = 1;
            to.any[next] = 1;
        });
    }

private:
    BATCHNORM_HOST_DEVICE bool is_near(double var) const {
        return is_double && to.inv_std != nullptr && eps < coeffs::kNearest && var < coeffs::kNearest;
    }
    BATCHNORM_HOST_DEVICE void put(int64_t at, double mean, double var, double inv_std) const {
        to.mean[at] = mean;
        to.var[at] = var;
        if (to.inv_std != nullptr) to.inv_std[at] = inv_std;
    }
    // The round that the channel wants besides; 0: none.
    BATCHNORM_HOST_DEVICE int from_sums(int of_round, int64_t at, double sum, double sum_sq, double count) const {
        const double shift = is_double || of_round > 0 ? to.shift[at] : 0;
        const coeffs::Moments m = coeffs::from_sums(sum, sum_sq, shift, count, is_double ? 4 : 16384);
        const double var = std::isnan(m.mean) ? m.mean : m.var;
        put(at, m.mean, var, coeffs::inv_std(var, eps));
        const bool far = is_double && !(std::isfinite(var) || std::isnan(sum) || sum_sq == 0), near = is_near(var);
        if (of_round == 1) return far ? 2 : near ? 3 : 0;
        if (m.trusted && !far && !near) return 0;
        double better = m.trusted ? shift : m.better_shift;
        if (far && !std::isfinite(m.mean) && std::isfinite(shift)) better = shift;
        // A float for float data: then a constant differs from it by exactly 0.
        to.shift[at] = is_double ? better : static_cast<double>(static_cast<float>(better));
        return 1;
    }
    BATCHNORM_HOST_DEVICE int from_scaled_sums(int of_round, int64_t at, double sum, double sum_sq, double count) const {
        const coeffs::Scale scale = scale_of(of_round);
        const coeffs::Moments m = coeffs::from_scaled_sums(sum, sum_sq, to.shift[at], count, scale);
        const double var = m.var / scale.square;
        put(at, m.mean, var, coeffs::inv_std(m.var, eps, scale));
        return of_round == 2 && is_near(var) ? 3 : 0;
    }
};
// The value about which a channel of double data is summed at first: the mean of its first 16 values that count, or 8, 4, 2.
template <class T>
struct FindShift {
    static constexpr int kThreads = 128;
    using Shared = NoShared;
    Array<const T> x;
    Shape shape;
    Counted counted;
    double* shift;

    int64_t blocks() const { return blocks_for(shape.parts.count * shape.channels, kThreads); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.index() * kThreads + thread;
            if (at < shape.parts.count * shape.channels) find(at / shape.channels, at % shape.channels);
        });
    }
    BATCHNORM_HOST_DEVICE void find(int64_t part, int64_t channel) const {
        const int64_t begin = shape.parts.begin(part) * shape.inner, end = begin + shape.parts.size(part) * shape.inner;
        double values[16];
        int n = 0;
        for (int64_t p = begin; p < end && n < 16; ++p) {
            const Place place{p / shape.inner, channel, p % shape.inner};
            const bool some = counted.weights == nullptr || counted.weights[p / counted.weights_each] > 0;
            if (some && counted.kept(p, shape.number(place.outer, channel, place.inner))) values[n++] = value_of(*x.at(place));
        }
        int half = n >= 16 ? 8 : n >= 8 ? 4 : n >= 4 ? 2 : n >= 2 ? 1 : 0;
        for (; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) values[i] = (values[i] + values[i + half]) * 0.5;
        }
        shift[part * shape.channels + channel] = n == 0 ? 0 : values[0];
    }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// Numbers of y = (x - center) * scale + offset, cells * channels each.
template <class C>
struct AffineNumbers {
    C *center, *scale, *offset;
};

// What the caller's options make of statistics.
struct Options {
    PerChannel gamma, beta;
    PerChannel mean, var;  // given ones
    PerChannel running_mean, running_var, decays, seen;
    double decay;
    int ddof;
    bool skip;  // what is not finite
    bool renorm;
    PerChannel reference_mean, reference_std;  // absent: the running pair
    double rmin, rmax, dmax, renorm_decay;
    double eps;
};

// The step of running statistics, and of renormalisation's own reference: core/running.h.
struct Learning {
    Shape shape;
    Counted counted;
    Options options;
    const double *mean, *var;  // parts * channels
    std::uint8_t* spoils;      // where to note what would not stay finite, instead of the step; null: the step is taken

    BATCHNORM_HOST_DEVICE void learn(int64_t c) const {
        const auto n = [&](int64_t part) { return counted.n(shape, part, c); };
        const auto n_values = [&](int64_t part) { return counted.n_values(shape, part, c); };
        const RunningBatch b = running_batch(shape.parts.count, shape.channels, c, options.ddof, mean, var, n, n_values);
        if (b.n == 0) return;
        if (options.running_mean) {
            double decay = options.decays ? options.decays.at(0, c) : options.decay;
            if (options.seen) decay = options.seen.at(0, c) / (options.seen.at(0, c) + b.n);
            take(options.running_mean, c, b.mean, decay);
            take(options.running_var, c, b.unbiased, decay);
        }
        if (options.renorm_decay >= 0) {
            take(options.reference_mean, c, b.mean, options.renorm_decay);
            take(options.reference_std, c, std::sqrt(b.var + options.eps), options.renorm_decay);
        }
    }

private:
    BATCHNORM_HOST_DEVICE void take(const PerChannel& array, int64_t c, double batch, double decay) const {
        const double value = coeffs::running(array.at(0, c), batch, decay);
        if (spoils == nullptr) return array.put(0, c, value);
        if (!(array.is_double ? std::isfinite(value) : std::isfinite(static_cast<float>(value)))) *spoils = 1;
    }
};
struct Learn {
    static constexpr int kThreads = 128;
    using Shared = NoShared;
    Learning step;
    const std::uint8_t* spoilt;  // whether the step is left out; null: it is not

    int64_t blocks() const { return blocks_for(step.shape.channels, kThreads); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        if (spoilt != nullptr && *spoilt != 0) return;
        block.each([&](int thread) {
            const int64_t c = block.index() * kThreads + thread;
            if (c < step.shape.channels) step.learn(c);
        });
    }
};

// From statistics to the numbers of a part's cells and what Saved keeps, and, if that is all there is to it, to running statistics.
template <class C>
struct Settle {
    Shape shape;
    Counted counted;
    Options options;
    Statistics of;                                          // inv_std null: of the given ones
    double *mean, *var, *inv_std, *count, *values, *r, *d;  // what Saved keeps, parts * channels; null: nothing
    AffineNumbers<C> to;
    double *gamma, *beta;  // copies for backward, in as many rows as the caller's; null: none
    bool learns;

    BATCHNORM_HOST_DEVICE void operator()(int64_t part, int64_t c) const {
        const int64_t at = part * shape.channels + c;
        const bool given = static_cast<bool>(options.mean);
        const double mu = given ? options.mean.at(0, c) : of.mean[at];
        double inverse = given ? coeffs::inv_std(options.var.at(0, c), options.eps) : of.inv_std[at];
        if (count != nullptr) {
            count[at] = counted.n(shape, part, c);
            values[at] = counted.n_values(shape, part, c);
        }
        if (given && mean != nullptr) {
            mean[at] = mu;
            var[at] = options.var.at(0, c);
            inv_std[at] = inverse;
        }
        coeffs::Renorm k{1, 0};
        if (options.renorm) {
            k = coeffs::renorm(mu, inverse, reference_mean(c), reference_std(c), options.rmin, options.rmax, options.dmax);
            r[at] = k.r;
            d[at] = k.d;
        }
        // Of a single value x_hat is 0, whatever eps is.
        if (!given && counted.n_values(shape, part, c) < 2) inverse = 0;
        for (int64_t cell = shape.first_cell(part); cell < shape.first_cell(part) + shape.cells_of(part); ++cell) {
            numbers(cell, c, mu, inverse, k);
        }
        if (learns) Learning{shape, counted, options, of.mean, of.var, nullptr}.learn(c);
    }

private:
    BATCHNORM_HOST_DEVICE void numbers(int64_t cell, int64_t c, double mu, double inverse, const coeffs::Renorm& by) const {
        const int64_t row = shape.group_outer == 0 ? 0 : cell, at = cell * shape.channels + c;
        double scale = options.gamma.at(row, c), offset = options.beta.at(row, c);
        copy(options.gamma, gamma, cell, c, scale);
        copy(options.beta, beta, cell, c, offset);
        if (options.renorm) {
            offset += scale * by.d;
            scale *= by.r;
        }
        const coeffs::Affine<C> k = coeffs::affine<C>(mu, inverse, scale, offset);
        to.center[at] = k.center;
        to.scale[at] = k.scale;
        to.offset[at] = k.offset;
    }
    BATCHNORM_HOST_DEVICE void copy(const PerChannel& from, double* rows, int64_t cell, int64_t c, double value) const {
        if (rows != nullptr && (from.row_stride != 0 || cell == 0)) rows[(from.row_stride == 0 ? 0 : cell) * shape.channels + c] = value;
    }
    BATCHNORM_HOST_DEVICE double reference_mean(int64_t c) const {
        return options.reference_mean ? options.reference_mean.at(0, c) : options.running_mean.at(0, c);
    }
    BATCHNORM_HOST_DEVICE double reference_std(int64_t c) const {
        return options.reference_std ? options.reference_std.at(0, c) : std::sqrt(options.running_var.at(0, c) + options.eps);
    }
};
// Where statistics are given and none are measured.
template <class C>
struct SettleGiven {
    static constexpr int kThreads = 128;
    using Shared = NoShared;
    Settle<C> settle;

    int64_t blocks() const { return blocks_for(settle.shape.parts.count * settle.shape.channels, kThreads); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.index() * kThreads + thread, channels = settle.shape.channels;
            if (at < settle.shape.parts.count * channels) settle(at / channels, at % channels);
        });
    }
};

// Copies of what says which positions count, for backward.
template <class T>
struct CopyValues {
    static constexpr int kThreads = 256;
    using Shared = NoShared;
    const T* from;
    T* to;
    int64_t n;

    int64_t blocks() const { return blocks_for(n, kThreads); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.index() * kThreads + thread;
            if (at < n) to[at] = from[at];
        });
    }
};

// ---- backward ------------------------------------------------------------------------------------------------------

// What a forward left, as a cell and a channel see it.
struct Kept {
    Shape shape;
    bool batch, is_double;
    const double *mean, *inv_std, *count, *values, *r, *d;
    const double *gamma, *beta;
    int64_t gamma_rows, beta_rows;

    struct Numbers {
        double mean, inv_std, gamma_r, offset, r, d, shift;
        bool single;  // so few values count that x_hat is 0
        double values;
    };
    BATCHNORM_HOST_DEVICE Numbers of(int64_t cell, int64_t c) const {
        const int64_t part = shape.part_of_cell(cell), at = part * shape.channels + c;
        const auto row = [&](const double* v, int64_t rows, double otherwise) {
            return v == nullptr ? otherwise : v[(rows == 0 ? 0 : cell) * shape.channels + c];
        };
        Numbers k{mean[at], inv_std[at], row(gamma, gamma_rows, 1), row(beta, beta_rows, 0), 1, 0, 0, false, values[at]};
        if (r != nullptr) {
            k.r = r[at];
            k.d = d[at];
            k.offset += k.gamma_r * k.d;
            k.gamma_r *= k.r;
        }
        k.shift = coeffs::gradient_shift(k.mean, k.inv_std, is_double);
        k.single = batch && k.values < 2;
        return k;
    }
};

template <class C>
BATCHNORM_INLINE coeffs::Affine<C> affine_of(const Kept::Numbers& k) {
    return coeffs::affine<C>(k.mean, k.single ? 0 : k.inv_std, k.gamma_r, k.offset);
}

// Sums of g and g (x - shift).
template <class T, Gate gate>
struct GradSumsOp {
    Array<const T> dy, x, z;  // z may be absent
    Kept kept;
    Counted counted;
    const std::uint8_t* bits;  // where the activation was on, by element; may be null
    Curve curve;

    struct Number {
        Compute<T> value;
        BATCHNORM_INLINE Compute<T> at(int64_t) const { return value; }
    };
    struct Bit {
        bool is;
        std::uint8_t value;
        BATCHNORM_INLINE bool given() const { return is; }
        BATCHNORM_INLINE std::uint32_t get() const { return value; }
    };
    template <bool shifted, bool some>
    struct Sums {
        static constexpr int kAhead = some ? 2 : gate == kernels::curve || is_double<T> ? 8 : 16;
        const GradSumsOp& op;
        double shift;
        coeffs::Affine<Compute<T>> k;
        GradSums<shifted> s{0, 0};
        struct Value {
            Compute<T> dy, x, z;
            std::uint8_t bit;
            bool kept;
        };
        BATCHNORM_INLINE Value load(const Place& p) const {
            Value v{value_of(*op.dy.at(p)), value_of(*op.x.at(p)), 0, 0, true};
            const int64_t element = op.kept.shape.number(p.outer, p.channel, p.inner);
            if constexpr (gate == kernels::masked || gate == kernels::curve) {
                if (op.bits != nullptr) v.bit = static_cast<std::uint8_t>(mask_bits(op.bits, element) & 1);
                if (gate == kernels::curve && op.z) v.z = value_of(*op.z.at(p));
            }
            if constexpr (some) v.kept = op.counted.kept(p.outer * op.kept.shape.inner + p.inner, element);
            return v;
        }
        BATCHNORM_INLINE void add(const Value& v) {
            if (some && !v.kept && op.skips()) return;
            const Compute<T> g = through_gate<gate>(v.dy, v.x, v.z, Number{k.center}, Number{k.scale}, Number{k.offset}, 0,
                                                    Bit{op.bits != nullptr, v.bit}, op.curve);
            s.add(to_double(v.kept ? g : 0), to_double(v.kept ? v.x : 0), shift);
        }
        BATCHNORM_INLINE double first() const { return s.dy; }
        BATCHNORM_INLINE double second() const { return s.dy_x; }
    };
    BATCHNORM_KERNEL_BODY void begin(const ThreadBlock&) const {}
    BATCHNORM_INLINE bool anything() const { return true; }
    BATCHNORM_INLINE bool wanted(int64_t, int64_t) const { return true; }
    BATCHNORM_INLINE bool compacts() const { return false; }
    // Whole rows that do not count are passed over where they are not folded; else they add 0.
    BATCHNORM_INLINE bool skips() const {
        return !kept.shape.runs() && counted.bits == nullptr && kept.shape.channels >= kernels::kFoldBelow;
    }
    template <class F>
    BATCHNORM_INLINE void with_sums(int64_t, int64_t cell, int64_t channel, const F& f) const {
        const Kept::Numbers k = kept.of(cell, channel);
        const coeffs::Affine<Compute<T>> affine = affine_of<Compute<T>>(k);
        if (counted.mask != nullptr || counted.bits != nullptr) return f(Sums<true, true>{*this, k.shift, affine});
        if (is_double<T> || k.shift != 0) return f(Sums<true, false>{*this, k.shift, affine});
        f(Sums<false, false>{*this, 0, affine});
    }
};

// Numbers of dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0, cells * channels each.
template <class C>
struct GradientNumbers {
    AffineNumbers<C> affine;
    C *k_dy, *x_scale, *k_x, *k_0;
};

// From sums to these, and to dgamma and dbeta of each cell.
template <class C>
struct FinishGradients {
    static constexpr int kThreads = Merge::kThreads;
    using Shared = NoShared;
    Merge merge;
    bool summed;  // else all sums are 0
    Kept kept;
    Counted counted;
    GradientNumbers<C> to;
    PerChannel dgamma, dbeta;          // the caller's, if there is one cell
    double *dgamma_rows, *dbeta_rows;  // else rows to be added up: cells * channels; null: not wanted

    int64_t blocks() const { return kept.shape.parts.count * merge.columns(); }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        const int64_t begin = block.index() % merge.columns() * Merge::kChannels;
        finish(block, block.index() / merge.columns(), begin, merge.end_of(begin));
    }
    BATCHNORM_KERNEL_BODY void finish(const ThreadBlock& block, int64_t part, int64_t begin, int64_t end) const {
        const Shape& shape = kept.shape;
        if (summed) merge.add(block, part, begin, end);
        block.each([&](int thread) {
            const int64_t c = begin + thread % Merge::kChannels;
            if (c >= end) return;
            for (int64_t q = thread / Merge::kChannels; q < shape.cells_of(part); q += Merge::kGroups) {
                const int64_t cell = shape.first_cell(part) + q;
                const Kept::Numbers k = kept.of(cell, c);
                parameters(cell, c, k, sums_of(cell, c, k));
            }
        });
        // dx follows from the sums of all cells of a part.
        block.each([&](int thread) {
            const int64_t c = begin + thread % Merge::kChannels;
            if (c >= end) return;
            const int64_t cells = shape.cells_of(part), first = shape.first_cell(part);
            Sums all{0, 0};
            for (int64_t q = 0; cells > 1 && q < cells; ++q) {
                const Kept::Numbers k = kept.of(first + q, c);
                const Sums s = sums_of(first + q, c, k);
                all.g += k.gamma_r * s.g;
                all.g_xc += k.gamma_r * s.g_xc;
            }
            const double n = kept.count[part * shape.channels + c] * counted.scaled();
            for (int64_t q = thread / Merge::kChannels; q < cells; q += Merge::kGroups) {
                const Kept::Numbers k = kept.of(first + q, c);
                if (cells == 1) all = sums_of(first, c, k);
                numbers((first + q) * shape.channels + c, k, all, n, cells == 1);
            }
        });
    }

private:
    struct Sums {
        double g, g_xc;
    };
    BATCHNORM_HOST_DEVICE Sums sums_of(int64_t cell, int64_t c, const Kept::Numbers& k) const {
        if (!summed) return {0, 0};
        const int64_t at = cell * kept.shape.channels + c;
        Sums s{merge.first[at].total(), merge.second[at].total()};
        s.g_xc = coeffs::about_mean(s.g, s.g_xc, k.mean, k.shift);
        if (k.single) {
            s.g_xc = 0;
            if (k.values == 0) s.g = 0;
        }
        return s;
    }
    BATCHNORM_HOST_DEVICE void parameters(int64_t cell, int64_t c, const Kept::Numbers& k, const Sums& s) const {
        double gradient = s.g_xc * k.inv_std;
        if (kept.r != nullptr) gradient = k.r * gradient + k.d * s.g;
        if (k.single) gradient = kept.r == nullptr || k.values == 0 ? 0 : k.d * s.g;
        if (kept.shape.cells() == 1) {
            if (dgamma) dgamma.put(0, c, gradient);
            if (dbeta) dbeta.put(0, c, s.g);
        } else if (dgamma_rows != nullptr) {
            dgamma_rows[cell * kept.shape.channels + c] = gradient;
            dbeta_rows[cell * kept.shape.channels + c] = s.g;
        }
    }
    BATCHNORM_HOST_DEVICE void numbers(int64_t at, const Kept::Numbers& k, const Sums& all, double n, bool alone) const {
        const coeffs::Affine<C> a = affine_of<C>(k);
        to.affine.center[at] = a.center;
        to.affine.scale[at] = a.scale;
        to.affine.offset[at] = a.offset;
        const double slope = k.gamma_r * k.inv_std;
        const coeffs::Slopes slopes{slope, alone ? slope : k.inv_std, k.inv_std, k.mean, k.inv_std};
        const coeffs::Gradient<C> g = coeffs::gradient<C>(slopes, all.g, all.g_xc, n);
        to.k_dy[at] = k.single ? 0 : g.k_dy;
        to.x_scale[at] = g.x_scale;
        to.k_x[at] = k.single ? 0 : g.k_x;
        to.k_0[at] = k.single ? 0 : g.k_0;
    }
};

// Gradients of a parameter in the caller's form: a row for each cell, or all added up in order.
struct PutRows {
    static constexpr int kThreads = 128;
    using Shared = NoShared;
    const double* cells;
    int64_t n_cells, channels;
    PerChannel to;
    int64_t rows;

    int64_t blocks() const { return to ? blocks_for((rows == 0 ? 1 : n_cells) * channels, kThreads) : 0; }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.index() * kThreads + thread;
            if (at >= (rows == 0 ? 1 : n_cells) * channels) return;
            double value = cells[at];
            for (int64_t cell = 1; rows == 0 && cell < n_cells; ++cell) value += cells[cell * channels + at];
            to.put(at / channels, at % channels, value);
        });
    }
};

// Gradients of nothing.
struct Zeros {
    static constexpr int kThreads = 128;
    using Shared = NoShared;
    PerChannel to;
    int64_t rows, channels;

    int64_t blocks() const { return to ? blocks_for(rows * channels, kThreads) : 0; }
    BATCHNORM_KERNEL_BODY void operator()(const ThreadBlock& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.index() * kThreads + thread;
            if (at < rows * channels) to.put(at / channels, at % channels, 0);
        });
    }
};

}  // namespace batchnorm::cuda
