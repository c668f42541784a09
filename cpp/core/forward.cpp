// The forward driver: check -> plan -> sums -> numbers per channel -> elementwise pass -> running statistics -> Saved. What runs on every
// element is in kernels/, what runs once per channel in coeffs.h, how work is cut in plan.cpp and carried out in reduce.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "coefficient_rows.h"
#include "exchange.h"
#include "float_mode.h"
#include "gate.h"
#include "image.h"
#include "running.h"
#include "saved.h"
#include "statistics.h"

namespace batchnorm {

void lay_out(Cutter& cut, const Forward& f, const Call& call, bool keep, Saved::Impl& s) {
    const Geometry& g = call.geometry;
    // Inference looks at nothing but the arguments.
    const int64_t n = keep || !f.mean || f.renorm.enabled ? call.parts.count * g.channels : 0;
    for (double** p : {&s.mean, &s.var, &s.inv_std, &s.count}) *p = cut.take<double>(n);
    // Of a group's ranks others may have weights.
    s.values = f.positions.weights.empty() && f.execution.group == nullptr ? s.count : cut.take<double>(n);
    s.r = s.d = nullptr;
    if (f.renorm.enabled) {
        s.r = cut.take<double>(n);
        s.d = cut.take<double>(n);
    }
    const BitLayout bits(g, call.parts);
    s.element_bits = f.positions.element_mask ? cut.take<std::uint8_t>(bits.bytes()) : nullptr;
    s.bits = nullptr;
    s.mask = f.positions.mask;
    s.weights = f.positions.weights;
    s.gamma = s.beta = {};
    if (!keep) return;
    if (f.residual && piecewise_linear(f.activation)) s.bits = cut.take<std::uint8_t>(bits.bytes());
    for (const auto& [from, to] : {std::pair{&f.gamma, &s.gamma}, {&f.beta, &s.beta}}) {
        if (*from) *to = {cut.take<double>(std::max<int64_t>(from->rows, 1) * g.channels), from->rows};
    }
    s.mask = {cut.take<std::uint8_t>(static_cast<int64_t>(s.mask.size())), s.mask.size()};
    s.weights = {cut.take<double>(static_cast<int64_t>(s.weights.size())), s.weights.size()};
}

void describe(const Forward& f, const Call& call, Saved::Impl& s) {
    s.geometry = call.geometry;
    s.parts = call.parts;
    s.group_outer = call.group_outer;
    s.sample_outer = call.sample_outer;
    s.scale = 0;
    s.batch = !f.mean;
    s.keep = f.keep;
    s.slope = f.slope;
    s.activation = f.activation;
    s.has_residual = static_cast<bool>(f.residual);
    s.updated = false;
    s.device = f.execution.device;
    s.lost = {};
}

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A call on its way: its arguments, what check made of them, and where its numbers go.
struct Work {
    const Forward& f;
    const Call& call;
    const kernels::KernelTable& table;
    const Counting& counting;
    Saved::Impl& s;
    int64_t channels() const { return call.geometry.channels; }
    // What n channels from c on are normalised by.
    Column<double> mean(int64_t part, int64_t c, int64_t n) const {
        return f.mean ? Column<double>(f.mean, c, n) : Column<double>(s.mean + part * channels() + c, n);
    }
    Column<double> inv_std(int64_t part, int64_t c, int64_t n) const {
        return f.var ? inv_std_of(Column<double>(f.var, c, n), n, f.eps) : Column<double>(s.inv_std + part * channels() + c, n);
    }
};

// Copies of the arguments that backward will ask for.
void copy_arguments(const Forward& f, const Call& call, Saved::Impl& s) {
    const auto copy = [&](const ConstRows& from, const SavedRows& to) {
        for (int64_t r = 0; to && r < std::max<int64_t>(from.rows, 1); ++r) {
            by_columns(0, call.geometry.channels, [&](int64_t c, int64_t n) {
                Column<double>(row_of(from, r), c, n).put(to.data + r * call.geometry.channels + c, n);
            });
        }
    };
    copy(f.gamma, s.gamma);
    copy(f.beta, s.beta);
    std::copy(f.positions.mask.begin(), f.positions.mask.end(), const_cast<std::uint8_t*>(s.mask.data()));
    std::copy(f.positions.weights.begin(), f.positions.weights.end(), const_cast<double*>(s.weights.data()));
}

// The Impl that a call fills: that of its Saved, or `local`, whose arrays are in `ws`.
Saved::Impl& open(const Forward& f, const Call& call, Workspace& ws, Saved::Impl& local) {
    Saved::Impl& s = f.saved != nullptr ? prepared(*f.saved) : local;
    Cutter size(nullptr);
    lay_out(size, f, call, f.saved != nullptr, s);
    Cutter cut(f.saved != nullptr ? s.block.take(size.used()) : ws.take<std::byte>(static_cast<int64_t>(size.used())));
    lay_out(cut, f, call, f.saved != nullptr, s);
    if (f.saved != nullptr) copy_arguments(f, call, s);
    if (s.element_bits != nullptr) elements_to_bits(call.geometry, call.parts, f.positions.element_mask, s.element_bits);
    describe(f, call, s);
    return s;
}

void count(const Call& call, Saved::Impl& s) {
    const int64_t channels = call.geometry.channels;
    for (int64_t p = 0; p < call.parts.count; ++p) {
        by_columns(0, channels, [&](int64_t c, int64_t n) { call.counts.weights(p, c, n).put(s.count + (p * channels + c), n); });
        if (s.values == s.count) continue;
        for (int64_t c = 0; c < channels; ++c) s.values[p * channels + c] = static_cast<double>(call.counts.positions(p, c));
    }
}

// The reference of batch renormalisation, and r and d of n channels from c on.
struct RenormColumns {
    Column<double> r, d;
    RenormColumns(const Forward& f, int64_t c, int64_t n, const Column<double>& mean, const Column<double>& inv_std) {
        Column<double> reference_mean, reference_std;
        if (f.renorm.mean) {
            reference_mean = {f.renorm.mean, c, n};
            reference_std = {f.renorm.std, c, n};
        } else {
            reference_mean = {f.running.mean, c, n};
            reference_std = {f.running.var, c, n};
            for_entries(n, [&](int64_t i) { reference_std[i] = std::sqrt(reference_std[i] + f.eps); });
        }
        for_entries(n, [&](int64_t i) {
            const coeffs::Renorm k =
                coeffs::renorm(mean[i], inv_std[i], reference_mean[i], reference_std[i], f.renorm.rmin, f.renorm.rmax, f.renorm.dmax);
            r[i] = k.r;
            d[i] = k.d;
        });
    }
    // In place number `at` of a Saved's.
    void put(const Saved::Impl& s, int64_t at, int64_t n) const {
        r.put(s.r + at, n);
        d.put(s.d + at, n);
    }
};

// From mean and var to y, of some channels of one part.
template <class C>
class Normalisation {
public:
    Normalisation(Workspace& ws, const Plan& plan, const Work& w, int64_t part, int64_t c0, int64_t c1)
        : w_(w),
          part_(part),
          row_split_(plan.row_split),
          down_(plan.direction == kernels::ncs),
          affine_(ws, w.call.groups(part), plan, c0, c1, lead_of(w.f.y, w.call.parts.begin(part))) {
        const Forward& f = w.f;
        const int64_t begin = w.call.parts.begin(part);
        const Act act = act_of(f.activation, f.slope, w.call.geometry.dtype, w.s.bits != nullptr);
        args_ = {{},
                 to_operand(f.x, begin),
                 to_operand(f.residual, begin),
                 to_operand(f.y, begin),
                 {},
                 act.gate,
                 BitLayout(w.call.geometry, w.call.parts).mask(w.s.bits, part),
                 plan.stream,
                 act.curve,
                 w.counting.kept(part)};
        kernel_ = w.table.apply[plan.direction][to_kernel(w.call.geometry.dtype)];
    }
    // What n channels from c on are multiplied by and moved by.
    void numbers(int64_t c, int64_t n) {
        Saved::Impl& s = w_.s;
        const int64_t at = part_ * w_.channels() + c;
        const bool given = static_cast<bool>(w_.f.mean);
        const Column<double> mean = w_.mean(part_, c, n);
        Column<double> inv_std = w_.inv_std(part_, c, n);
        if (given && w_.f.saved != nullptr) {
            mean.put(s.mean + at, n);
            inv_std.put(s.inv_std + at, n);
            Column<double>(w_.f.var, c, n).put(s.var + at, n);
        }
        Column<double> r, d;
        if (s.r != nullptr) {
            const RenormColumns k(w_.f, c, n, mean, inv_std);
            k.put(s, at, n);
            r = k.r;
            d = k.d;
        }
        // Of a single value x_hat is 0, and of those with weight 0 beside it, whatever eps is.
        const Counts& counts = w_.call.counts;
        const bool some = counts.same() ? counts.positions(part_, 0) < 2 : true;
        for (int64_t i = 0; !given && some && i < n; ++i) {
            if (counts.positions(part_, c + i) < 2) inv_std[i] = 0;
        }
        for_cells(w_.call.groups(part_), down_, c, n, [&](const Cells& k) {
            const int64_t sample = w_.call.sample(part_, k.group);
            Column<double> gamma = k.of(w_.f.gamma, sample, 1), beta = k.of(w_.f.beta, sample, 0);
            if (s.r != nullptr) {
                const Column<double> by = k.of(r, c), to = k.of(d, c);
                for_entries(k.n, [&](int64_t i) {
                    beta[i] += gamma[i] * to[i];
                    gamma[i] *= by[i];
                });
            }
            affine_.put(k, {k.n, k.of(mean, c), k.of(inv_std, c), gamma, beta});
        });
    }
    void map(const Where& where) {
        by_groups(w_.call, part_, row_split_, where, [&](int64_t q, const Where& box) {
            kernels::ApplyArgs a = args_;
            a.where = box;
            a.affine = affine_[q].from(box.box.channel_begin);
            kernel_(a);
        });
    }

private:
    const Work& w_;
    int64_t part_, row_split_;
    bool down_;
    Groups<AffineRows<C>> affine_;
    kernels::ApplyArgs args_;
    kernels::ApplyFn kernel_;
};

// Statistics and, while the data is in cache, y: a pass of reduce.h.
template <class C>
class StatisticsThenY : public Statistics {
public:
    StatisticsThenY(Workspace& ws, const Plan& plan, const Work& w, const StatisticsOf& of, int64_t part, int64_t c0, int64_t c1)
        : Statistics(ws, plan, of, part, c0, c1), y_(ws, plan, w, part, c0, c1) {}
    bool finish(int64_t c0, int64_t c1, int round) {
        if (!Statistics::finish(c0, c1, round)) return false;
        by_columns(c0, c1, [&](int64_t c, int64_t n) { y_.numbers(c, n); });
        return true;
    }
    bool maps() const { return true; }
    void map(const Where& where) { y_.map(where); }

private:
    Normalisation<C> y_;
};

// y of statistics that are in place.
template <class C>
void normalise(const Work& w) {
    const PartPlans plans(w.call.geometry, w.call.parts, {.reads = w.f.residual ? 2 : 1, .writes = 1, .sums = false});
    if (plans.together()) {
        return for_each(w.call.parts.count, true, [&](int64_t part) {
            const Plan& plan = plans.of(part);
            Workspace ws;
            Normalisation<C> y(ws, plan, w, part, 0, plan.channels);
            by_columns(0, plan.channels, [&](int64_t c, int64_t n) { y.numbers(c, n); });
            for (int64_t i = 0; i < plan.map_items(); ++i) y.map(plan.map_item(i));
        });
    }
    for (int64_t part = 0; part < w.call.parts.count; ++part) {
        const Plan& plan = plans.of(part);
        Workspace ws;
        Normalisation<C> y(ws, plan, w, part, 0, plan.channels);
        for_columns(plan, [&](int64_t c, int64_t n) { y.numbers(c, n); });
        map_part(plan, y);
    }
}

void fill(double* to, int64_t n, double value) {
    if (to != nullptr) std::fill_n(to, n, value);
}

// mean and var as they were given, for each part.
void take_given(const Forward& f, const Call& call, Saved::Impl& s) {
    for (int64_t p = 0; p < call.parts.count; ++p) {
        by_columns(0, call.geometry.channels, [&](int64_t c, int64_t n) {
            const int64_t at = p * call.geometry.channels + c;
            Column<double>(f.mean, c, n).put(s.mean + at, n);
            Column<double>(f.var, c, n).put(s.var + at, n);
            inv_std_of({s.var + at, n}, n, f.eps).put(s.inv_std + at, n);
        });
    }
}

// What is left of a forward without values.
void without_values(const Forward& f, const Call& call, Saved::Impl& s) {
    const int64_t n = call.parts.count * call.geometry.channels;
    if (f.mean) {
        if (f.saved != nullptr) take_given(f, call, s);
    } else {
        for (double* v : {s.mean, s.var, s.inv_std}) fill(v, n, kNaN);
    }
    fill(s.r, n, kNaN);
    fill(s.d, n, kNaN);
    clear(f.y);
}

// Without elements: what Saved holds.
void numbers_alone(const Work& w) {
    const Forward& f = w.f;
    if (f.mean && f.saved != nullptr) take_given(f, w.call, w.s);
    by_columns(0, w.channels(), [&](int64_t c, int64_t n) {
        if (w.s.r != nullptr) RenormColumns(f, c, n, w.mean(0, c, n), w.inv_std(0, c, n)).put(w.s, c, n);
    });
}

// Largest numbers and roundoffs of the storage types.
struct Format {
    double roundoff, smallest, largest;
};
Format format_of(Dtype t) {
    switch (t) {
        case Dtype::float64:
            return {0x1p-53, 0x1p-1074, std::numeric_limits<double>::max()};
        case Dtype::float16:
            return {0x1p-11, 0x1p-24, 65504};
        case Dtype::bfloat16:
            return {0x1p-8, 0x1p-133, 0x1.fep127};
        default:
            return {0x1p-24, 0x1p-149, std::numeric_limits<float>::max()};
    }
}

// Whether y does not tell x of some channel: x_hat = (y - offset) / slope is off by u |x_hat| + (u |offset| + t / 2) / |slope| with u the
// roundoff and t the smallest number of y's type (behind leaky_relu up to 1 / factor times that), which must leave two thirds of the
// digits; and y must not overflow, |x_hat| being below sqrt(n). Ranks with given statistics do not know n; they must agree nonetheless.
bool is_lost(const Work& w, int64_t c) {
    const Format t = format_of(w.call.geometry.dtype);
    const double factor = w.f.activation == Activation::leaky_relu ? w.f.slope : 1;
    const double coarse = t.smallest / 2 / std::min(factor, 1.0), enough = std::pow(t.roundoff, 2.0 / 3);
    for (int64_t p = 0; p < w.call.parts.count; ++p) {
        const int64_t at = p * w.channels() + c;
        for (int64_t q = 0; q < w.call.groups(p); ++q) {
            const int64_t sample = w.call.sample(p, q);
            const double gamma = w.f.gamma ? batchnorm::at(row_of(w.f.gamma, sample), c) : 1;
            const double beta = w.f.beta ? batchnorm::at(row_of(w.f.beta, sample), c) : 0;
            const double slope = std::abs(w.s.r == nullptr ? gamma : gamma * w.s.r[at]);
            const double offset = std::abs(w.s.d == nullptr ? beta : beta + gamma * w.s.d[at]);
            const double n = w.f.mean && w.f.execution.group != nullptr ? 0x1p20 : w.call.counts.weight(p, c);
            const double reach = (offset + slope * std::sqrt(n)) * std::max(factor, 1.0);
            if (!(t.roundoff * (offset + slope) + coarse <= enough * slope) || !(reach < t.largest)) return true;
        }
    }
    return false;
}

// With Keep::y: x of the channels that y will not tell, before y takes its place.
void keep_lost(const Work& w) {
    const Geometry& g = w.call.geometry;
    std::vector<int64_t> lost;
    for (int64_t c = 0; c < g.channels; ++c) {
        if (is_lost(w, c)) lost.push_back(c);
    }
    const auto n = static_cast<int64_t>(lost.size());
    const int64_t size = element_size(g.dtype);
    const auto lay = [&](Cutter& cut) { return std::pair{cut.take<int64_t>(n), cut.take<std::byte>(n * g.count() * size)}; };
    Cutter needed(nullptr);
    lay(needed);
    Cutter cut(w.s.lost_block.take(needed.used()));
    const auto [channels, x] = lay(cut);
    std::copy(lost.begin(), lost.end(), channels);
    w.s.lost = {channels, lost.size()};
    w.s.lost_x = x;
    if (n != 0) copy_channels(w.f.x, w.s.lost, compact<Tensor>(g, n, x));
}

bool learns(const Forward& f) { return f.running.mean || f.renorm.decay >= 0; }
// Whether ranks of a group have anything to tell each other.
bool exchanges(const Forward& f) { return !f.mean || learns(f); }

// What ranks must have in common beside x: what statistics, running statistics and failures depend on.
double options_of(const Forward& f) {
    Exchange::Options options;
    options << f.eps << (f.mean ? 1 : 0) << static_cast<double>(f.running.on_nonfinite) << (f.running.mean ? 1 : 0);
    if (f.running.mean) options << f.running.decay << f.running.ddof << f.running.decays << f.running.seen;
    options << (f.renorm.enabled ? 1 : 0);
    if (f.renorm.enabled) options << f.renorm.rmin << f.renorm.rmax << f.renorm.dmax << f.renorm.decay << (f.renorm.mean ? 1 : 0);
    return options.word();
}

// Mean and var of all parts, and unless it comes later, y. `all`: what makes statistics of the batch that ranks of a group hold, or null.
template <class C>
void statistics(const Work& w, const StatisticsOf& of, bool y_later, StatisticsTogether* all) {
    if (all != nullptr) return all->run(of, [&] { check::enough_values(w.f, w.call); }, [](const Statistics&) {});
    const Traffic traffic{.reads = w.f.residual && !y_later ? 2 : 1, .writes = y_later ? 0 : 1, .sums = true};
    const PartPlans plans(w.call.geometry, w.call.parts, traffic);
    if (y_later) {
        for_parts(plans, w.call.parts.count, [&](Workspace& own, const Plan& plan, int64_t part, int64_t c0, int64_t c1) {
            return Statistics(own, plan, of, part, c0, c1);
        });
    } else {
        for_parts(plans, w.call.parts.count, [&](Workspace& own, const Plan& plan, int64_t part, int64_t c0, int64_t c1) {
            return StatisticsThenY<C>(own, plan, w, of, part, c0, c1);
        });
    }
}

// Statistics, then y, then running statistics.
template <class C>
void run(const Work& w, Workspace& ws, StatisticsTogether* all) {
    const Forward& f = w.f;
    const Parts& parts = w.call.parts;
    const bool given = static_cast<bool>(f.mean), learns = batchnorm::learns(f);
    const int64_t n = parts.count * w.channels();
    double* const mean = given && learns ? ws.take<double>(n) : w.s.mean;
    double* const var = given && learns ? ws.take<double>(n) : w.s.var;
    double* const inv_std = given ? nullptr : w.s.inv_std;
    const bool keeps_y = f.saved != nullptr && f.keep == Keep::y;
    const bool known_later = f.renorm.enabled || all != nullptr;  // what y will not tell of x
    const bool y_later = given || f.running.on_nonfinite == OnNonfinite::raise || (keeps_y && f.renorm.enabled) || all != nullptr;
    if (keeps_y && !known_later) keep_lost(w);
    if (!given || learns) {
        const StatisticsOf of{w.call, w.table, f.x,     w.counting,    w.counting.all_weights<double>(ws), f.eps, true,
                              mean,   var,     inv_std, all != nullptr};
        statistics<C>(w, of, y_later, all);
    }
    if (all != nullptr) {
        w.s.scale = w.counting.scale();
        if (f.saved != nullptr) count(w.call, w.s);
        if (!given && w.call.counts.most() == 0) return without_values(f, w.call, w.s);
    }
    RunningStep step(f, w.call, mean, var);
    if (f.running.on_nonfinite == OnNonfinite::raise && step.not_finite()) check::not_finite(step.channel());
    if (y_later) {
        if (keeps_y && known_later) {
            for (int64_t part = 0; part < parts.count && f.renorm.enabled; ++part) {  // r and d, which tell what is lost
                by_columns(0, w.channels(), [&](int64_t c, int64_t m) {
                    RenormColumns(f, c, m, w.mean(part, c, m), w.inv_std(part, c, m)).put(w.s, part * w.channels() + c, m);
                });
            }
            keep_lost(w);
        }
        if (w.call.geometry.count() != 0) {
            normalise<C>(w);
        } else {
            numbers_alone(w);
        }
    }
    if (w.counting.weighted() && !given) {
        clear_where(w.call.geometry, parts, f.y, [&](int64_t p, int64_t c) { return w.call.counts.positions(p, c) == 0; });
    }
    w.s.updated = step.take();
}

void forward(const Forward& f, Call& call, Exchange* exchange) {
    const kernels::KernelTable& table = check::active_level();
    Workspace ws;
    Saved::Impl local(std::pmr::null_memory_resource());
    Saved::Impl& s = open(f, call, ws, local);
    if (!exchanges(f)) exchange = nullptr;
    if (f.saved != nullptr && exchange == nullptr) count(call, s);
    if (f.execution.group == nullptr && (call.geometry.count() == 0 || (!f.mean && call.counts.most() == 0))) {
        without_values(f, call, s);
    } else {
        Counting counting(ws, call.geometry, call.parts, f.positions.mask, f.positions.weights, s.element_bits);
        const Work w{f, call, table, counting, s};
        std::optional<StatisticsTogether> all;
        if (exchange != nullptr) {
            const Exchange::Same same{Exchange::training, call.geometry.dtype, call.geometry.channels, options_of(f)};
            all.emplace(*exchange, same, call, counting);
        }
        with_compute(call.geometry.dtype, [&]<class C>() { run<C>(w, ws, all ? &*all : nullptr); });
    }
    s.full = f.saved != nullptr;
}

}  // namespace

inline namespace v0_2 {

void batch_norm(const Forward& f) {
    const FloatMode mode;
    const parallel::Limit limit(f.execution.num_threads);
    Call call = check::inference(f);
    if (is_integer(call.geometry.dtype)) return integer_batch_norm(f, call);
    forward(f, call, nullptr);
}

void batch_norm_train(const Forward& f) {
    const FloatMode mode;
    const parallel::Limit limit(f.execution.num_threads);
    together(f.execution.group, f.execution.group != nullptr && exchanges(f), [&](Exchange* exchange) {
        Call call = check::training(f);
        forward(f, call, exchange);
    });
}

void save(const Forward& f, const ConstChannels& inv_std, bool batch_statistics) {
    const FloatMode mode;
    const Call call = check::saving(f, inv_std);
    Workspace ws;
    Saved::Impl local(std::pmr::null_memory_resource());
    Forward bare = f;
    bare.residual = {};  // no pass writes its bits
    Saved::Impl& s = open(bare, call, ws, local);
    count(call, s);
    s.has_residual = static_cast<bool>(f.residual);
    s.batch = batch_statistics;
    by_columns(0, call.geometry.channels, [&](int64_t c, int64_t n) {
        Column<double>(f.mean, c, n).put(s.mean + c, n);
        const Column<double> k(inv_std, c, n);
        k.put(s.inv_std + c, n);
        Column<double> var;
        for_entries(n, [&](int64_t i) { var[i] = 1 / (k[i] * k[i]); });
        var.put(s.var + c, n);
    });
    s.full = true;
}

}  // namespace v0_2

}  // namespace batchnorm
