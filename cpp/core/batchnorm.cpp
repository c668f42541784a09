// The drivers: check -> plan -> sums -> per-channel numbers -> elementwise pass. What runs on every element is in kernels/, what
// runs once per channel in coeffs.h, how work is cut in plan.cpp and carried out in reduce.h.
#include "batchnorm/batchnorm.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "coefficient_rows.h"
#include "gate.h"
#include "image.h"
#include "moment_sums.h"
#include "positions.h"
#include "reduce.h"
#include "tuning.h"

namespace batchnorm {
namespace {

using kernels::KernelTable;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Lets a driver be written once and run with C = float or double, the type the elementwise kernels compute in.
template <class F>
void with_compute(Dtype dtype, F f) {
    if (dtype == Dtype::float64) {
        f.template operator()<double>();
    } else {
        f.template operator()<float>();
    }
}

// ---- statistics ----------------------------------------------------------------------------------------------------------------

// The first positions that count, up to 16: as many as a power of two.
struct FirstPositions {
    int64_t n, position[16];
    explicit FirstPositions(const Counting& counting) {
        n = static_cast<int64_t>(std::bit_floor(static_cast<std::uint64_t>(counting.first(position, 16))));
    }
};

// The value about which a channel of double data is summed: the mean of its first 16 values, or 8, 4, 2, which lies within a fraction of
// the standard deviation. Sums of equal values halve exactly, so a constant stays exact.
double shift_of(const ConstTensor& x, int64_t channel, const FirstPositions& first) {
    const int64_t n = first.n;
    double values[16];
    for (int64_t i = 0; i < n; ++i) {
        const int64_t p = first.position[i];
        const int64_t offset = p / x.inner * x.outer_stride + channel * x.channel_stride + p % x.inner * x.inner_stride;
        values[i] = static_cast<const double*>(x.data)[offset];
    }
    for (int64_t half = n / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) values[i] = (values[i] + values[i + half]) * 0.5;
    }
    return values[0];
}

// Mean and population variance of x: sums about 0, of double data about a value near each channel's, and once more about the mean where
// that lay too far off.
class Statistics {
public:
    Statistics(Workspace& ws, const Plan& plan, const KernelTable& table, const ConstTensor& x, const Counting& counting,
               std::span<double> mean, std::span<double> var)
        : plan_(plan),
          args_{{}, to_operand(x), nullptr, nullptr, nullptr, {}, counting.weights<double>(ws)},
          kernel_(table.moments[plan.direction][to_kernel(x.dtype)]),
          n_(counting.n()),
          first_(counting),
          is_double_(x.dtype == Dtype::float64),
          // A sum of squares errs by 1e-13 at worst (1024 additions per lane), 4e-15 as a rule. Of double data that must stay below 1e-14;
          // of float data, where half an ulp is 3e-8 or more, it may grow: up to |mean| / std = 128 one pass is enough.
          most_amplification_(is_double_ ? 4 : 16384),
          shift_(ws, plan),
          sums_(ws, plan.channels),
          mean_(mean),
          var_(var),
          x_(x) {
        if (args_.weights.data == nullptr) args_.kept = counting.kept();
    }

    // `then(c, n)` runs when mean and var of n channels from c on are final; map as in sums_then_map.
    template <class Then, class Map>
    void run(const Then& then, const Map* map) {
        const auto prepare = [&](int64_t c0, int64_t c1) {
            by_columns(c0, c1, [&](int64_t c, int64_t n) {
                Column<double> shift;
                for_entries(n, [&](int64_t i) { shift[i] = shift_of(x_, c + i, first_); });
                shift_.put(c, n, shift);
            });
        };
        const auto kernel = [&](const Where& where, bool again, double* sum, double* sum_sq) {
            kernels::MomentsArgs a = args_;
            a.where = where;
            a.shift = is_double_ || again || a.weights.data != nullptr ? shift_.from(where.box.channel_begin) : nullptr;
            a.sum = sum;
            a.sum_sq = sum_sq;
            kernel_(a);
        };
        const auto finish = [&](int64_t c0, int64_t c1, bool again) {
            bool content = true;
            // Summed a second time for another channel's sake, a trusted channel gives the same numbers: its shift stayed.
            by_columns(c0, c1, [&](int64_t c, int64_t n) { content &= from_sums(c, n, again); });
            if (content) by_columns(c0, c1, then);
            return content;
        };
        if (is_double_) {
            sums_then_map(plan_, prepare, kernel, sums_, finish, map);
        } else {
            shift_.fill(0);
            sums_then_map(plan_, NothingToPrepare(), kernel, sums_, finish, map);
        }
    }

    // After run: sums of x and x^2 about 0.
    BatchSum sum(int64_t c) const { return sum_about_0(sums_.first_sum(c), shift_[c], n_); }
    BatchSum sum_sq(int64_t c) const { return sum_sq_about_0(sums_.first_sum(c), sums_.second_sum(c), shift_[c], n_); }

private:
    // Mean and var of a column; false if sums about a better shift, which is then in place, are wanted for any of its channels. `again`:
    // these are such sums. Sums of integers are exact as they are.
    bool from_sums(int64_t c, int64_t n, bool again) {
        const Column<double> sum = sums_.first(c, n), sum_sq = sums_.second(c, n), shift = shift_.column(c, n);
        Column<double> mean, var, better;
        int64_t distrusted = 0;
        for_entries(n, [&](int64_t i) {
            const coeffs::Moments m = coeffs::from_sums(sum[i], sum_sq[i], shift[i], n_, most_amplification_);
            mean[i] = m.mean;
            var[i] = m.var;
            better[i] = m.trusted ? shift[i] : m.better_shift;
            distrusted += m.trusted ? 0 : 1;
        });
        mean.put(&mean_[static_cast<std::size_t>(c)], n);
        var.put(&var_[static_cast<std::size_t>(c)], n);
        if (distrusted == 0 || again || is_integer(x_.dtype)) return true;
        for_entries(n, [&](int64_t i) {
            // A float for float data: then a constant differs from it by exactly 0.
            if (!is_double_) better[i] = static_cast<float>(better[i]);
        });
        shift_.put(c, n, better);
        return false;
    }

    const Plan& plan_;
    kernels::MomentsArgs args_;
    kernels::MomentsFn kernel_;
    double n_;
    FirstPositions first_;
    bool is_double_;
    double most_amplification_;
    Row<double> shift_;
    ChannelSums sums_;
    std::span<double> mean_, var_;
    const ConstTensor& x_;
};

using NoMap = void (*)(const Where&);
constexpr const NoMap* kNoMap = nullptr;

// Running statistics of n channels from c on.
void update_running_of(const Channels& running_mean, const Channels& running_var, int64_t c, int64_t n, const Column<double>& mean,
                       const Column<double>& var, double decay, double count, double ddof) {
    Column<double> new_mean(running_mean, c, n), new_var(running_var, c, n);
    for_entries(n, [&](int64_t i) {
        new_mean[i] = coeffs::running(new_mean[i], mean[i], decay);
        new_var[i] = coeffs::running(new_var[i], coeffs::with_ddof(var[i], count, ddof), decay);
    });
    new_mean.put(running_mean, c, n);
    new_var.put(running_var, c, n);
}

std::size_t index(int64_t c) { return static_cast<std::size_t>(c); }

// r and d of n channels from c on.
struct RenormColumns {
    Column<double> r, d;
    RenormColumns(const Renorm& a, int64_t c, int64_t n, const Column<double>& mean, const Column<double>& inv_std) {
        const Column<double> reference_mean(a.mean, c, n), reference_std(a.std, c, n);
        for_entries(n, [&](int64_t i) {
            const coeffs::Renorm k = coeffs::renorm(mean[i], inv_std[i], reference_mean[i], reference_std[i], a.rmin, a.rmax, a.dmax);
            r[i] = k.r;
            d[i] = k.d;
        });
    }
};

// What the elementwise pass of a forward function, whose arguments `a` are, needs besides its box and per-channel numbers.
template <class Args>
kernels::ApplyArgs apply_args(const Args& a, const Geometry& g, const Plan& plan, const Counting& counting) {
    const Act act = act_of(a.activation, a.slope, g.dtype, !a.activation_mask.empty());
    return {{},
            to_operand(a.x),
            to_operand(a.residual),
            to_operand(a.y),
            {},
            act.gate,
            to_mask(g, a.activation_mask.empty() ? nullptr : a.activation_mask.data()),
            plan.stream,
            act.curve,
            counting.kept()};
}

template <class C>
void apply(const kernels::ApplyFn kernel, kernels::ApplyArgs args, const Where& where, const AffineRows<C>& affine) {
    args.where = where;
    args.affine = affine.from(where.box.channel_begin);
    kernel(args);
}

// The output in which the sums of backward leave g = dy act'(v), so that the derivative of a smooth activation is computed once: dz, which
// is g, or else dx, to be overwritten. None where g would not fit exactly or x would be lost.
Tensor left_gradient(const BatchNormBackwardArgs& a, const Act& act, const Plan& plan, const Counting& counting) {
    const Tensor& to = a.dresidual ? a.dresidual : a.dx;
    const bool smooth = act.gate == kernels::curve && !piecewise_linear(a.activation);
    const bool exact = a.x.dtype == Dtype::float32 || a.x.dtype == Dtype::float64;
    const bool every = counting.kept().data == nullptr;
    const bool dense = plan.fold == 1 || (plan.row_split == 1 && to.outer_stride == plan.channels);
    return to && smooth && exact && every && dense && to.data != a.x.data ? to : Tensor();
}

}  // namespace

void moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof, int num_threads,
             const Positions& positions) {
    const Geometry g = check::moments_arguments(x, mean, var, ddof, num_threads, positions);
    const parallel::Limit limit(num_threads);
    const KernelTable& table = check::active_level();
    if (g.counting == 0) {
        for (double& v : mean) v = kNaN;
        for (double& v : var) v = kNaN;
        return;
    }
    if (is_integer(g.dtype)) return integer_moments(g, x, mean, var, ddof);
    const Plan plan = make_plan(g, {.reads = 1, .writes = 0, .sums = true});
    Workspace ws;
    const Counting counting(ws, g, positions);
    // The caller's arrays are written at the end, so that an interrupt leaves them as they were.
    const std::span<double> m(ws.take<double>(g.channels), index(g.channels)), v(ws.take<double>(g.channels), index(g.channels));
    Statistics(ws, plan, table, x, counting, m, v).run([](int64_t, int64_t) {}, kNoMap);
    for_columns(plan, [&](int64_t c, int64_t n) {
        Column<double>(&m[index(c)], n).put(&mean[index(c)], n);
        Column<double> variance(&v[index(c)], n);
        for_entries(n, [&](int64_t i) { variance[i] = coeffs::with_ddof(variance[i], g.weight, static_cast<double>(ddof)); });
        variance.put(&var[index(c)], n);
    });
}

void moment_sums(const ConstTensor& x, std::span<double> sums, int num_threads, const Positions& positions) {
    const Geometry g = check::moment_sums_arguments(x, sums, num_threads, positions);
    const parallel::Limit limit(num_threads);
    const KernelTable& table = check::active_level();
    if (g.counting == 0) {
        std::fill(sums.begin(), sums.end(), 0.0);
        return;
    }
    const Plan plan = make_plan(g, {.reads = 1, .writes = 0, .sums = true});
    Workspace ws;
    const Counting counting(ws, g, positions);
    const std::span<double> mean(ws.take<double>(g.channels), index(g.channels)), var(ws.take<double>(g.channels), index(g.channels));
    Statistics statistics(ws, plan, table, x, counting, mean, var);
    statistics.run([](int64_t, int64_t) {}, kNoMap);
    const SumsArray<double> out(sums.data(), g.channels);
    out.set_count({{g.weight}});
    const double scale = g.weight / counting.n();  // a power of two, that of the weights as the kernels get them
    for_channels(plan, [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) {
            out.set_sum(c, statistics.sum(c).scaled(scale));
            out.set_sum_sq(c, statistics.sum_sq(c).scaled(scale));
        }
    });
}

void batch_norm(const BatchNormArgs& a) {
    const Geometry g = check::arguments(a);
    const parallel::Limit limit(a.num_threads);
    const KernelTable& table = check::active_level();
    if (g.count() == 0) return;
    if (is_integer(g.dtype)) return integer_batch_norm(g, a);
    const Plan plan = make_plan(g, {.reads = a.residual ? 2 : 1, .writes = 1, .sums = false});
    with_compute(g.dtype, [&]<class C>() {
        Workspace ws;
        AffineRows<C> affine(ws, plan);
        for_columns(plan, [&](int64_t c, int64_t n) {
            affine.put(c, n, {a.mean, c, n}, inv_std_of({a.var, c, n}, n, a.eps), {a.gamma, c, n, 1}, {a.beta, c, n, 0});
        });
        const kernels::ApplyFn kernel = table.apply[plan.direction][to_kernel(g.dtype)];
        const Counting counting(ws, g, a.positions);
        const kernels::ApplyArgs args = apply_args(a, g, plan, counting);
        for_each(plan.map_items(), plan, [&](int64_t i) { apply(kernel, args, plan.map_item(i), affine); });
    });
}

void batch_norm_train(const BatchNormTrainArgs& a) {
    const Geometry g = check::arguments(a);
    const parallel::Limit limit(a.num_threads);
    const KernelTable& table = check::active_level();
    if (g.counting == 0) {
        for (double& v : a.mean) v = kNaN;
        for (double& v : a.inv_std) v = kNaN;
        for (double& v : a.renorm.r) v = kNaN;
        for (double& v : a.renorm.d) v = kNaN;
        clear(a.y);
        return;
    }
    const Plan plan = make_plan(g, {.reads = a.residual ? 2 : 1, .writes = 1, .sums = true});
    Workspace ws;
    // The caller's arrays receive the statistics at the end, so that an interrupt leaves them as they were.
    const std::span<double> mean(ws.take<double>(g.channels), index(g.channels)), var(ws.take<double>(g.channels), index(g.channels));
    const std::span<double> inv_std(ws.take<double>(g.channels), index(g.channels));
    with_compute(g.dtype, [&]<class C>() {
        AffineRows<C> affine(ws, plan);
        const auto then = [&](int64_t c, int64_t n) {
            const Column<double> m(&mean[index(c)], n), s = inv_std_of({&var[index(c)], n}, n, a.eps);
            s.put(&inv_std[index(c)], n);
            Column<double> gamma(a.gamma, c, n, 1), beta(a.beta, c, n, 0);
            if (a.renorm.mean) {
                const RenormColumns k(a.renorm, c, n, m, s);
                for_entries(n, [&](int64_t i) {
                    beta[i] += gamma[i] * k.d[i];
                    gamma[i] *= k.r[i];
                });
            }
            affine.put(c, n, m, s, gamma, beta);
        };
        const kernels::ApplyFn kernel = table.apply[plan.direction][to_kernel(g.dtype)];
        const Counting counting(ws, g, a.positions);
        const kernels::ApplyArgs args = apply_args(a, g, plan, counting);
        const auto map = [&](const Where& where) { apply(kernel, args, where, affine); };
        Statistics(ws, plan, table, a.x, counting, mean, var).run(then, &map);
    });
    for_columns(plan, [&](int64_t c, int64_t n) {
        const Column<double> m(&mean[index(c)], n), s(&inv_std[index(c)], n);
        m.put(&a.mean[index(c)], n);
        s.put(&a.inv_std[index(c)], n);
        if (a.renorm.mean) {
            const RenormColumns k(a.renorm, c, n, m, s);
            k.r.put(&a.renorm.r[index(c)], n);
            k.d.put(&a.renorm.d[index(c)], n);
        }
        if (a.running_mean) {
            update_running_of(a.running_mean, a.running_var, c, n, m, {&var[index(c)], n}, a.decay, g.weight, a.running_ddof);
        }
    });
}

void batch_norm_backward(const BatchNormBackwardArgs& a) {
    const Geometry g = check::arguments(a);
    const parallel::Limit limit(a.num_threads);
    const KernelTable& table = check::active_level();
    const bool fixed = a.stats == Stats::fixed;
    const bool want_sums = a.dgamma || a.dbeta || (a.dx && !fixed);
    if (g.counting == 0) {
        for (int64_t c = 0; c < g.channels; ++c) {
            if (a.dgamma) set(a.dgamma, c, 0);
            if (a.dbeta) set(a.dbeta, c, 0);
        }
        if (a.dx) clear(a.dx);
        if (a.dresidual) clear(a.dresidual);
        return;
    }
    const Plan plan = make_plan(g, {.reads = a.residual ? 3 : 2, .writes = (a.dx ? 1 : 0) + (a.dresidual ? 1 : 0), .sums = want_sums});
    Workspace ws;
    const Counting counting(ws, g, a.positions);
    ChannelSums sums(ws, g.channels);
    const bool is_double = g.dtype == Dtype::float64;
    Row<double> shift(ws, plan);
    const auto sum_dy_xc = [&](int64_t c, int64_t n) {
        const Column<double> sum_dy = sums.first(c, n), sum_dy_x = sums.second(c, n), mean(a.mean, c, n), about = shift.column(c, n);
        Column<double> sum;
        for_entries(n, [&](int64_t i) { sum[i] = coeffs::about_mean(sum_dy[i], sum_dy_x[i], mean[i], about[i]); });
        return sum;
    };
    with_compute(g.dtype, [&]<class C>() {
        AffineRows<C> affine(ws, plan);
        GradientRows<C> gradient(ws, plan);
        const auto prepare_column = [&](int64_t c, int64_t n) {
            const Column<double> mean(a.mean, c, n), inv_std(a.inv_std, c, n);
            Column<double> about;
            for_entries(n, [&](int64_t i) { about[i] = coeffs::gradient_shift(mean[i], inv_std[i], is_double); });
            shift.put(c, n, about);
            affine.put(c, n, mean, inv_std, {a.gamma, c, n, 1}, {a.beta, c, n, 0});
        };
        const auto prepare = [&](int64_t c0, int64_t c1) { by_columns(c0, c1, prepare_column); };
        const Act act = act_of(a);
        const kernels::Gate gate = act.gate;
        const kernels::Mask mask = to_mask(g, a.activation_mask.empty() ? nullptr : const_cast<std::uint8_t*>(a.activation_mask.data()));
        const kernels::Operand z = to_operand(a.residual);
        // Where the sums leave g behind, dx is made of that, and dz is there already.
        const Tensor g_left = want_sums ? left_gradient(a, act, plan, counting) : Tensor();
        const kernels::Operand left = to_operand(g_left);
        const kernels::GradSumsFn sums_kernel = table.grad_sums[plan.direction][to_kernel(g.dtype)];
        const auto sum_tile = [&](const Where& where, bool, double* dy, double* dy_x) {
            const int64_t c = where.box.channel_begin;
            // Zeros subtracted one by one give the same bits as none, only later.
            const double* const about = shift.from(c);
            const int64_t channels = where.box.channel_end - c;
            const bool shifted =
                is_double || gate == kernels::curve || std::any_of(about, about + channels, [](double s) { return s != 0; });
            sums_kernel({where, to_operand(a.dy), to_operand(a.x), shifted ? about : nullptr, affine.from(c), dy, dy_x, gate, mask,
                         act.curve, z, counting.kept(), left});
        };
        const double count = counting.n();
        const auto finish_column = [&](int64_t c, int64_t n) {
            const Column<double> mean(a.mean, c, n), inv_std(a.inv_std, c, n), gamma(a.gamma, c, n, 1);
            const Column<double> sum_dy = sums.first(c, n), sum_dy_x = sum_dy_xc(c, n);
            gradient.put(c, n,
                         [&](int64_t i) { return coeffs::gradient<C>(mean[i], inv_std[i], gamma[i], sum_dy[i], sum_dy_x[i], count); });
        };
        const auto finish = [&](int64_t c0, int64_t c1, bool) {
            by_columns(c0, c1, finish_column);
            return true;
        };
        const kernels::GradApplyFn apply_kernel = table.grad_apply[plan.direction][to_kernel(g.dtype)];
        // The residual's gradient comes on the way of dx behind a mask or a curve. Else it is dx with fixed statistics and k_dy = 1;
        // without an activation, dy itself.
        const Tensor dz = g_left ? Tensor() : a.dresidual;
        const bool dz_alone = dz && (!a.dx || (gate != kernels::masked && gate != kernels::curve));
        Row<C> ones(ws, plan);
        if (dz_alone) ones.fill(1);
        const Tensor& dx = a.dx ? a.dx : dz;
        const kernels::Weights weights = a.dx ? counting.weights<C>(ws) : kernels::Weights{};
        const auto map = [&](const Where& where) {
            const int64_t c = where.box.channel_begin;
            kernels::GradApplyArgs args{where,
                                        g_left ? left : to_operand(a.dy),
                                        to_operand(a.x),
                                        to_operand(dx),
                                        {},
                                        affine.from(c),
                                        gradient.k_dy(c),
                                        gradient.x_scale(c),
                                        gradient.k_x(c),
                                        gradient.k_0(c),
                                        g_left ? kernels::open : gate,
                                        mask,
                                        fixed,
                                        plan.stream,
                                        act.curve,
                                        z,
                                        counting.kept(),
                                        weights};
            if (dz_alone) {
                kernels::GradApplyArgs alone = args;
                alone.dx = to_operand(dz);
                alone.k_dy = ones.from(c);
                alone.fixed = true;
                apply_kernel(alone);
                if (!a.dx) return;
            } else {
                args.dz = to_operand(dz);
            }
            apply_kernel(args);
        };
        if (want_sums) {
            sums_then_map(plan, prepare, sum_tile, sums, finish, dx ? &map : nullptr);
        } else if (dx) {
            for_columns(plan, [&](int64_t c, int64_t n) {
                prepare_column(c, n);
                sums.clear(c, c + n);
                finish_column(c, n);
            });
            for_each(plan.map_items(), plan, [&](int64_t i) { map(plan.map_item(i)); });
        }
    });
    if (!a.dgamma && !a.dbeta) return;
    for_columns(plan, [&](int64_t c, int64_t n) {
        Column<double> dgamma = sum_dy_xc(c, n);
        const Column<double> inv_std(a.inv_std, c, n);
        for_entries(n, [&](int64_t i) { dgamma[i] *= inv_std[i]; });
        dgamma.put(a.dgamma, c, n);
        sums.first(c, n).put(a.dbeta, c, n);
    });
}

std::int64_t activation_mask_bytes(const ConstTensor& x) { return mask_bytes(check::mask_geometry(x)); }

void update_running(const UpdateRunningArgs& a) {
    check::arguments(a);
    by_columns(0, a.running_mean.size, [&](int64_t c, int64_t n) {
        update_running_of(a.running_mean, a.running_var, c, n, {a.mean, c, n}, {a.var, c, n}, a.decay, static_cast<double>(a.count),
                          a.ddof);
    });
}

int num_threads() { return parallel::threads(); }

void set_num_threads(int n) {
    check::thread_count(n);
    parallel::set_threads(n);
}

std::string tuning() {
    check::active_level();  // the environment's settings are in force
    return tune::text();
}

void set_tuning(std::string_view settings) {
    check::active_level();
    check::tuning(settings);
}

std::string isa() { return check::active_level().isa; }

void set_isa(std::string_view name) { kernels::use(&check::level(name)); }

std::vector<std::string> isa_levels() {
    std::vector<std::string> names;
    for (const auto& l : kernels::levels()) {
        if (l.supported) names.emplace_back(l.table->isa);
    }
    return names;
}

std::vector<std::string> isa_built() {
    std::vector<std::string> names;
    for (const auto& l : kernels::levels()) names.emplace_back(l.table->isa);
    return names;
}

std::string isa_reason() { return kernels::reason(); }

std::string openmp_runtime() { return parallel::runtime(); }

std::string compiler() {
#if defined(__clang__)
    return "clang++ " __clang_version__;
#elif defined(__GNUC__)
    return "g++ " __VERSION__;
#else
    return "unknown";
#endif
}

std::string version() { return BATCHNORM_VERSION; }

void set_interrupt_poll(bool (*poll)()) { parallel::set_poll(poll); }

}  // namespace batchnorm
