// The drivers: check -> plan -> sums -> per-channel numbers -> elementwise pass. What runs on every element is in kernels/, what
// runs once per channel in coeffs.h, how work is cut in plan.cpp and carried out in reduce.h.
#include "batchnorm/batchnorm.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

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

template <class C>
struct AffineRows {
    Row<C> center, scale, offset;
    AffineRows(Workspace& ws, const Plan& plan) : center(ws, plan), scale(ws, plan), offset(ws, plan) {}
    void set(int64_t c, const coeffs::Affine<C>& a) {
        center.set(c, a.center);
        scale.set(c, a.scale);
        offset.set(c, a.offset);
    }
    kernels::Affine from(int64_t c) const { return {center.from(c), scale.from(c), offset.from(c)}; }
};

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

    // `then(c0, c1)` runs when mean and var of those channels are final; map as in sums_then_map.
    template <class Then, class Map>
    void run(const Then& then, const Map* map) {
        const auto prepare = [&](int64_t c0, int64_t c1) {
            for (int64_t c = c0; c < c1; ++c) shift_.set(c, shift_of(x_, c, first_));
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
            for (int64_t c = c0; c < c1; ++c) {
                // Summed a second time for another channel's sake, a trusted channel gives the same numbers: its shift stayed.
                const coeffs::Moments m = coeffs::from_sums(sums_.first(c), sums_.second(c), shift_[c], n_, most_amplification_);
                mean_[static_cast<std::size_t>(c)] = m.mean;
                var_[static_cast<std::size_t>(c)] = m.var;
                // Sums of integers are exact as they are.
                if (!m.trusted && !again && !is_integer(x_.dtype)) {
                    // A float for float data: then a constant differs from it by exactly 0.
                    shift_.set(c, is_double_ ? m.better_shift : static_cast<float>(m.better_shift));
                    content = false;
                }
            }
            if (content) then(c0, c1);
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

void update_channels(const Channels& running_mean, const Channels& running_var, int64_t c0, int64_t c1, auto mean, auto var, double decay,
                     double n, double ddof) {
    for (int64_t c = c0; c < c1; ++c) {
        set(running_mean, c, coeffs::running(at(running_mean, c), mean(c), decay));
        set(running_var, c, coeffs::running(at(running_var, c), coeffs::with_ddof(var(c), n, ddof), decay));
    }
}

std::size_t index(int64_t c) { return static_cast<std::size_t>(c); }

coeffs::Renorm renorm(const Renorm& a, int64_t c, double mean, double inv_std) {
    return coeffs::renorm(mean, inv_std, at(a.mean, c), at(a.std, c), a.rmin, a.rmax, a.dmax);
}

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
    const Plan plan = make_plan(g, 1, 0);
    Workspace ws;
    const Counting counting(ws, g, positions);
    // The caller's arrays are written at the end, so that an interrupt leaves them as they were.
    const std::span<double> m(ws.take<double>(g.channels), index(g.channels)), v(ws.take<double>(g.channels), index(g.channels));
    Statistics(ws, plan, table, x, counting, m, v).run([](int64_t, int64_t) {}, kNoMap);
    for_channels(plan, [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) {
            mean[index(c)] = m[index(c)];
            var[index(c)] = coeffs::with_ddof(v[index(c)], g.weight, static_cast<double>(ddof));
        }
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
    const Plan plan = make_plan(g, 1, 0);
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
    const Plan plan = make_plan(g, a.residual ? 2 : 1, 1);
    with_compute(g.dtype, [&]<class C>() {
        Workspace ws;
        AffineRows<C> affine(ws, plan);
        for_channels(plan, [&](int64_t c0, int64_t c1) {
            for (int64_t c = c0; c < c1; ++c) {
                const double inv_std = coeffs::inv_std(at(a.var, c), a.eps);
                affine.set(c, coeffs::affine<C>(at(a.mean, c), inv_std, value_or(a.gamma, c, 1), value_or(a.beta, c, 0)));
            }
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
    const Plan plan = make_plan(g, a.residual ? 2 : 1, 1);
    Workspace ws;
    // The caller's arrays receive the statistics at the end, so that an interrupt leaves them as they were.
    const std::span<double> mean(ws.take<double>(g.channels), index(g.channels)), var(ws.take<double>(g.channels), index(g.channels));
    const std::span<double> inv_std(ws.take<double>(g.channels), index(g.channels));
    const auto renorm_of = [&](int64_t c) { return renorm(a.renorm, c, mean[index(c)], inv_std[index(c)]); };
    with_compute(g.dtype, [&]<class C>() {
        AffineRows<C> affine(ws, plan);
        const auto then = [&](int64_t c0, int64_t c1) {
            for (int64_t c = c0; c < c1; ++c) {
                inv_std[index(c)] = coeffs::inv_std(var[index(c)], a.eps);
                double gamma = value_or(a.gamma, c, 1), beta = value_or(a.beta, c, 0);
                if (a.renorm.mean) {
                    const coeffs::Renorm k = renorm_of(c);
                    beta += gamma * k.d;
                    gamma *= k.r;
                }
                affine.set(c, coeffs::affine<C>(mean[index(c)], inv_std[index(c)], gamma, beta));
            }
        };
        const kernels::ApplyFn kernel = table.apply[plan.direction][to_kernel(g.dtype)];
        const Counting counting(ws, g, a.positions);
        const kernels::ApplyArgs args = apply_args(a, g, plan, counting);
        const auto map = [&](const Where& where) { apply(kernel, args, where, affine); };
        Statistics(ws, plan, table, a.x, counting, mean, var).run(then, &map);
    });
    for_channels(plan, [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) {
            a.mean[index(c)] = mean[index(c)];
            a.inv_std[index(c)] = inv_std[index(c)];
            if (a.renorm.mean) {
                const coeffs::Renorm k = renorm_of(c);
                a.renorm.r[index(c)] = k.r;
                a.renorm.d[index(c)] = k.d;
            }
        }
        if (a.running_mean) {
            update_channels(
                a.running_mean, a.running_var, c0, c1, [&](int64_t c) { return mean[index(c)]; }, [&](int64_t c) { return var[index(c)]; },
                a.decay, g.weight, a.running_ddof);
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
    const Plan plan = make_plan(g, a.residual ? 3 : 2, (a.dx ? 1 : 0) + (a.dresidual ? 1 : 0));
    Workspace ws;
    const Counting counting(ws, g, a.positions);
    ChannelSums sums(ws, g.channels);
    const bool is_double = g.dtype == Dtype::float64;
    Row<double> shift(ws, plan);
    const auto sum_dy_xc = [&](int64_t c) { return coeffs::about_mean(sums.first(c), sums.second(c), at(a.mean, c), shift[c]); };
    with_compute(g.dtype, [&]<class C>() {
        AffineRows<C> affine(ws, plan);
        Row<C> k_dy(ws, plan), x_scale(ws, plan), k_x(ws, plan), k_0(ws, plan);
        const auto prepare = [&](int64_t c0, int64_t c1) {
            for (int64_t c = c0; c < c1; ++c) {
                shift.set(c, coeffs::gradient_shift(at(a.mean, c), at(a.inv_std, c), is_double));
                affine.set(c, coeffs::affine<C>(at(a.mean, c), at(a.inv_std, c), value_or(a.gamma, c, 1), value_or(a.beta, c, 0)));
            }
        };
        const Act act = act_of(a);
        const kernels::Gate gate = act.gate;
        const kernels::Mask mask = to_mask(g, a.activation_mask.empty() ? nullptr : const_cast<std::uint8_t*>(a.activation_mask.data()));
        const kernels::Operand z = to_operand(a.residual);
        const kernels::GradSumsFn sums_kernel = table.grad_sums[plan.direction][to_kernel(g.dtype)];
        const auto sum_tile = [&](const Where& where, bool, double* dy, double* dy_x) {
            const int64_t c = where.box.channel_begin;
            // Zeros subtracted one by one give the same bits as none, only later.
            const double* const about = shift.from(c);
            const int64_t channels = where.box.channel_end - c;
            const bool shifted =
                is_double || gate == kernels::curve || std::any_of(about, about + channels, [](double s) { return s != 0; });
            sums_kernel({where, to_operand(a.dy), to_operand(a.x), shifted ? about : nullptr, affine.from(c), dy, dy_x, gate, mask,
                         act.curve, z, counting.kept()});
        };
        const auto finish = [&](int64_t c0, int64_t c1, bool) {
            for (int64_t c = c0; c < c1; ++c) {
                const coeffs::Gradient<C> k = coeffs::gradient<C>(at(a.mean, c), at(a.inv_std, c), value_or(a.gamma, c, 1), sums.first(c),
                                                                  sum_dy_xc(c), counting.n());
                k_dy.set(c, k.k_dy);
                x_scale.set(c, k.x_scale);
                k_x.set(c, k.k_x);
                k_0.set(c, k.k_0);
            }
            return true;
        };
        const kernels::GradApplyFn apply_kernel = table.grad_apply[plan.direction][to_kernel(g.dtype)];
        // The residual's gradient comes on the way of dx behind a mask or a curve. Else it is dx with fixed statistics and k_dy = 1;
        // without an activation, dy itself.
        const bool dz_alone = a.dresidual && (!a.dx || (gate != kernels::masked && gate != kernels::curve));
        Row<C> ones(ws, plan);
        if (dz_alone) ones.fill(1);
        const Tensor& dx = a.dx ? a.dx : a.dresidual;
        const kernels::Weights weights = a.dx ? counting.weights<C>(ws) : kernels::Weights{};
        const auto map = [&](const Where& where) {
            const int64_t c = where.box.channel_begin;
            kernels::GradApplyArgs args{where,
                                        to_operand(a.dy),
                                        to_operand(a.x),
                                        to_operand(dx),
                                        {},
                                        affine.from(c),
                                        k_dy.from(c),
                                        x_scale.from(c),
                                        k_x.from(c),
                                        k_0.from(c),
                                        gate,
                                        mask,
                                        fixed,
                                        plan.stream,
                                        act.curve,
                                        z,
                                        counting.kept(),
                                        weights};
            if (dz_alone) {
                kernels::GradApplyArgs dz = args;
                dz.dx = to_operand(a.dresidual);
                dz.k_dy = ones.from(c);
                dz.fixed = true;
                apply_kernel(dz);
                if (!a.dx) return;
            } else if (a.dresidual) {
                args.dz = to_operand(a.dresidual);
            }
            apply_kernel(args);
        };
        if (want_sums) {
            sums_then_map(plan, prepare, sum_tile, sums, finish, dx ? &map : nullptr);
        } else if (dx) {
            for_channels(plan, [&](int64_t c0, int64_t c1) {
                prepare(c0, c1);
                sums.clear(c0, c1);
                finish(c0, c1, false);
            });
            for_each(plan.map_items(), plan, [&](int64_t i) { map(plan.map_item(i)); });
        }
    });
    if (!a.dgamma && !a.dbeta) return;
    for_channels(plan, [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) {
            if (a.dgamma) set(a.dgamma, c, sum_dy_xc(c) * at(a.inv_std, c));
            if (a.dbeta) set(a.dbeta, c, sums.first(c));
        }
    });
}

std::int64_t activation_mask_bytes(const ConstTensor& x) { return mask_bytes(check::mask_geometry(x)); }

void update_running(const UpdateRunningArgs& a) {
    check::arguments(a);
    update_channels(
        a.running_mean, a.running_var, 0, a.running_mean.size, [&](int64_t c) { return at(a.mean, c); },
        [&](int64_t c) { return at(a.var, c); }, a.decay, static_cast<double>(a.count), a.ddof);
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
