// Mean and population variance of one part of x: sums about 0, of double data about a value near each channel's, and once more about the
// mean where that lay too far off; of double data whose squares leave a double's range once more, scaled. A pass of reduce.h without a map;
// the drivers of forward and moments build on it.
#pragma once

#include <bit>
#include <cmath>

#include "call.h"
#include "coefficient_rows.h"
#include "exact_sums.h"
#include "exchange.h"
#include "kernels/dispatch.h"
#include "moment_sums.h"
#include "reduce.h"

namespace batchnorm {

// What all parts of a call share.
struct StatisticsOf {
    const Call& call;
    const kernels::KernelTable& table;
    const ConstTensor& x;
    const Counting& counting;
    kernels::Weights weights;  // counting.all_weights<double>
    double eps;
    bool far;                      // whether double data is summed once more where its squares leave the range of doubles
    double *mean, *var, *inv_std;  // out, parts * channels; inv_std may be null
    bool together = false;         // by all ranks of a group: shifts then follow from what was exchanged alone, the first being 0
};

class Statistics {
public:
    Statistics(Workspace& ws, const Plan& plan, const StatisticsOf& of, int64_t part, int64_t c0, int64_t c1)
        : of_(of),
          ws_(ws),
          part_(part),
          is_double_(of.x.dtype == Dtype::float64),
          // A sum of squares errs by 1e-13 at worst (1024 additions per lane), 4e-15 as a rule. Of double data that must stay below 1e-14;
          // of float data, where half an ulp is 3e-8 or more, it may grow: up to |mean| / std = 128 one pass is enough.
          most_amplification_(is_double_ ? 4 : 16384),
          args_{{},
                to_operand(of.x, of.call.parts.begin(part)),
                nullptr,
                nullptr,
                nullptr,
                of.counting.weighted() && !of.counting.by_element() ? kernels::Kept{} : of.counting.kept(part),
                of.counting.weights<double>(of.weights, part)},
          kernel_(of.table.moments[plan.direction][to_kernel(of.x.dtype)]),
          shift_(ws, plan, c0, c1),
          sums_(ws, 1, c0, c1),
          first_(part * plan.channels) {
        if (!by_first_values()) shift_.fill(0);
    }

    void prepare(int64_t c0, int64_t c1) {
        if (!by_first_values()) return;
        by_columns(c0, c1, [&](int64_t c, int64_t n) {
            FirstPositions first(of_, part_, c);
            Column<double> shift;
            for_entries(n, [&](int64_t i) {
                if (of_.counting.by_element()) first = FirstPositions(of_, part_, c + i);
                shift[i] = shift_of(c + i, first);
            });
            shift_.put(c, n, shift);
        });
    }
    void begin(int round) {
        // The ranks have agreed on a scale since.
        if (of_.together && round == 1) args_.weights = of_.counting.weights<double>(of_.counting.all_weights<double>(ws_), part_);
        if (round < 2) return;
        args_.scale = scale_of(round).s;
        if (round > 2 || of_.counting.weighted()) return;
        args_.weights = of_.counting.weights_of<double>(ws_, of_.call.parts.begin(part_), of_.call.parts.size(part_));
        if (!of_.counting.by_element()) args_.kept = {};
    }
    void sums(const Where& where, int round, double* sum, double* sum_sq) {
        kernels::MomentsArgs a = args_;
        a.where = where;
        const bool shifted = is_double_ || round > 0 || of_.counting.weighted() || of_.counting.by_element();
        a.shift = shifted ? shift_.from(where.box.channel_begin) : nullptr;
        a.sum = sum;
        a.sum_sq = sum_sq;
        kernel_(a);
    }
    // Round 1 is about better shifts: summed again for another channel's sake, a trusted channel gives the same numbers, as its shift
    // stayed. Round 2 is of channels whose squares overflow, round 3 of those whose squares underflow.
    bool finish(int64_t c0, int64_t c1, int round) {
        bool content = true;
        by_columns(c0, c1,
                   [&](int64_t c, int64_t n) { content &= round < 2 ? from_sums(c, n, round == 1) : from_scaled_sums(c, n, round); });
        return content;
    }
    bool maps() const { return false; }
    void map(const Where&) {}
    ChannelSums& channel_sums() { return sums_; }
    auto taker(int64_t c0, int64_t c1) const {
        return [c0, c1](int64_t, const double* a, const double* b, const ExactSums& to, int64_t row) {
            to.add(row, c0, c1 - c0, a);
            to.add(row + 1, c0, c1 - c0, b);
        };
    }

    // After finish: sums of x and x^2 about 0, of n values.
    BatchSum sum(int64_t c, double n) const { return sum_about_0(sums_.first_sum(c), shift_[c], n); }
    double scale() const { return of_.counting.scale(); }
    bool exact_integers() const { return is_integer(of_.x.dtype) && !of_.counting.any_weighted(); }
    coeffs::IntegerMoments integer_moments(int64_t c, int64_t n, int64_t ddof) const {
        return coeffs::from_integer_sums(sums_.first_sum(c), sums_.second_sum(c), n, ddof);
    }
    BatchSum sum_sq(int64_t c, double n) const { return sum_sq_about_0(sums_.first_sum(c), sums_.second_sum(c), shift_[c], n); }

private:
    bool by_first_values() const { return is_double_ && !of_.together; }
    // The first positions that count, up to 16: as many as a power of two.
    struct FirstPositions {
        int64_t n, position[16];
        FirstPositions(const StatisticsOf& of, int64_t part, int64_t c) {
            n = static_cast<int64_t>(std::bit_floor(static_cast<std::uint64_t>(of.counting.first(part, c, position, 16))));
        }
    };
    // The value about which a channel of double data is summed: the mean of its first 16 values, or 8, 4, 2, which lies within a fraction
    // of the standard deviation. Sums of equal values halve exactly, so a constant stays exact.
    double shift_of(int64_t channel, const FirstPositions& first) const {
        if (first.n == 0) return 0;
        const ConstTensor& x = of_.x;
        const auto* const data = static_cast<const double*>(args_.x.data);
        double values[16];
        for (int64_t i = 0; i < first.n; ++i) {
            const int64_t p = first.position[i];
            values[i] = data[p / x.inner * x.outer_stride + channel * x.channel_stride + p % x.inner * x.inner_stride];
        }
        for (int64_t half = first.n / 2; half > 0; half /= 2) {
            for (int64_t i = 0; i < half; ++i) values[i] = (values[i] + values[i + half]) * 0.5;
        }
        return values[0];
    }
    // Mean and var of a column; false if another round is wanted for any of its channels, at first about a better shift, which is then in
    // place. Sums of integers are exact as they are, unless they are weighted.
    bool from_sums(int64_t c, int64_t n, bool again) {
        const Column<double> sum = sums_.first({0, c, n, false}), sum_sq = sums_.second({0, c, n, false}), shift = shift_.column(c, n);
        const Counts& counts = of_.call.counts;
        const double scale = of_.counting.scale(), most = most_amplification_;
        Column<double> mean, var, better;
        int64_t distrusted = 0, beyond = 0;
        const auto take = [&](const auto& values) {
            for_entries(n, [&](int64_t i) {
                const coeffs::Moments m = coeffs::from_sums(sum[i], sum_sq[i], shift[i], values(i), most);
                mean[i] = m.mean;
                var[i] = m.var;
                better[i] = m.trusted ? shift[i] : m.better_shift;
                distrusted += m.trusted ? 0 : 1;
            });
        };
        if (counts.same()) {
            take([all = counts.weight(part_, 0) * scale](int64_t) { return all; });
        } else {
            take([&](int64_t i) { return counts.weight(part_, c + i) * scale; });
        }
        put(c, n, mean, var, inv_std_of(var, n, of_.eps));
        for (int64_t i = 0; of_.far && is_double_ && i < n; ++i) {
            if (is_near(var[i])) ++beyond;
            if (std::isfinite(var[i]) || std::isnan(sum[i]) || sum_sq[i] == 0) continue;  // NaN in the data; no values
            ++beyond;
            if (!std::isfinite(mean[i]) && std::isfinite(shift[i])) better[i] = shift[i];
        }
        if (again) return beyond == 0;
        if (distrusted + beyond == 0 || exact_integers()) return true;
        for_entries(n, [&](int64_t i) {
            // A float for float data: then a constant differs from it by exactly 0.
            if (!is_double_) better[i] = static_cast<float>(better[i]);
        });
        shift_.put(c, n, better);
        return false;
    }

    static const coeffs::Scale& scale_of(int round) { return round == 2 ? coeffs::kFar : coeffs::kNear; }
    // Whether inv_std of this variance has lost digits to underflow.
    bool is_near(double var) const { return of_.inv_std != nullptr && of_.eps < coeffs::kNearest && var < coeffs::kNearest; }
    // The same as from_sums of the channels whose squares had overflowed, or underflowed, and of no others.
    bool from_scaled_sums(int64_t c, int64_t n, int round) {
        const Column<double> sum = sums_.first({0, c, n, false}), sum_sq = sums_.second({0, c, n, false}), shift = shift_.column(c, n);
        Column<double> mean(of_.mean + first_ + c, n), var(of_.var + first_ + c, n), inv_std = inv_std_of(var, n, of_.eps);
        if (of_.inv_std != nullptr) inv_std = {of_.inv_std + first_ + c, n};
        const coeffs::Scale& scale = scale_of(round);
        bool content = true;
        for (int64_t i = 0; i < n; ++i) {
            content &= round == 3 || !is_near(var[i]);
            if (round == 2 ? std::isfinite(var[i]) : !is_near(var[i])) continue;
            const double count = of_.call.counts.weight(part_, c + i) * of_.counting.scale();
            const coeffs::Moments m = coeffs::from_scaled_sums(sum[i], sum_sq[i], shift[i], count, scale);
            mean[i] = m.mean;
            var[i] = m.var / scale.square;
            inv_std[i] = coeffs::inv_std(m.var, of_.eps, scale);
        }
        put(c, n, mean, var, inv_std);
        return content;
    }
    void put(int64_t c, int64_t n, const Column<double>& mean, const Column<double>& var, const Column<double>& inv_std) const {
        mean.put(of_.mean + first_ + c, n);
        var.put(of_.var + first_ + c, n);
        if (of_.inv_std != nullptr) inv_std.put(of_.inv_std + first_ + c, n);
    }

    const StatisticsOf& of_;
    Workspace& ws_;
    int64_t part_;
    bool is_double_;
    double most_amplification_;
    kernels::MomentsArgs args_;
    kernels::MomentsFn kernel_;
    Row<double> shift_;
    ChannelSums sums_;
    int64_t first_;  // of the part's channels in the arrays of all parts
};

// Statistics of a batch of which this rank holds some samples, by all ranks: `call` gets the counts of all, `counting` their scale.
// counted() is asked once they are there, and throws if they do not do. Then finish(pass) takes the result, unless nothing counts.
class StatisticsTogether {
public:
    StatisticsTogether(Exchange& exchange, Exchange::Same same, Call& call, Counting& counting)
        : exchange_(exchange), same_(same), call_(call), counting_(counting), channels_(call.geometry.channels) {}

    template <class Counted, class Finish>
    void run(const StatisticsOf& of, const Counted& counted, const Finish& finish) {
        const bool some = call_.geometry.count() != 0;
        Geometry g = call_.geometry;
        if (!some) g.outer = g.inner = 1;  // for the sizes of rows
        const PartPlans plans(g, {g.outer, g.outer, 1}, {.reads = 1, .writes = 0, .sums = true}, some ? call_.sample_outer : 0);
        const Plan& plan = plans.of(0);
        Workspace ws;
        Statistics pass(ws, plan, of, 0, 0, channels_);
        for (int round = 0;; ++round) {
            // The first sums come with counts: how many, and the sum of weights.
            const ExactSums mine(ws, round == 0 ? 4 : 2, channels_);
            if (round > 0) pass.begin(round);
            if (some) sample_sums(plan, pass, round, ExactSums(mine, 2));
            if (round == 0) {
                for (int64_t c = 0; c < channels_; ++c) {
                    mine.set(2, c, {{static_cast<double>(call_.counts.positions(0, c)), 0, 0}});
                    mine.set(3, c, call_.counts.exact_weight(0, c));
                }
            }
            const auto parts = exchange_.gather(same_, some && call_.counts.most() > 0 ? counting_.own_scale() : kNothing,
                                                counting_.weighted(), mine.data());
            if (round == 0) agree(parts, counted);
            if (call_.counts.most() == 0) return;
            add(parts, pass, pass.channel_sums());
            std::atomic<bool> content{true};
            for_channels(plan, [&](int64_t c0, int64_t c1) {
                if (!pass.finish(c0, c1, round)) content = false;
            });
            if (content) return finish(pass);
            exchange_.expect();
        }
    }

private:
    static constexpr double kNothing = std::numeric_limits<double>::infinity();  // the scale of who has no values

    template <class Counted>
    void agree(const std::vector<Exchange::Part>& parts, const Counted& counted) {
        double scale = kNothing;
        bool weighted = false;
        for (const Exchange::Part& part : parts) {
            scale = std::min(scale, part.scale);
            weighted |= part.weighted;
        }
        counting_.agree(scale == kNothing ? 1 : scale, weighted);
        Workspace ws;
        const ExactSums counts(ws, 2, channels_);
        std::vector<int64_t> positions(index(channels_));
        std::vector<double> weights(index(channels_));
        for (const Exchange::Part& part : parts) {
            for (int64_t row = 0; row < 2; ++row) counts.merge(row, part.sums() + (2 + row) * 3 * channels_);
        }
        by_columns(0, channels_, [&](int64_t c, int64_t n) {
            const Column<double> many = counts.totals(0, c, n);
            for (int64_t i = 0; i < n; ++i) positions[index(c + i)] = static_cast<int64_t>(many[i]);
            counts.totals(1, c, n).put(weights.data() + c, n);
        });
        call_.counts = Counts(call_.parts, std::move(positions), weights);
        counted();
    }
    void add(const std::vector<Exchange::Part>& parts, const Statistics& pass, ChannelSums& to) const {
        Workspace ws;
        const ExactSums sums(ws, 2, channels_);
        for (const Exchange::Part& part : parts) {
            for (int64_t row = 0; row < 2; ++row) {
                sums.merge(row, part.sums() + row * 3 * channels_, part.scale == kNothing ? 1 : counting_.scale() / part.scale);
            }
        }
        by_columns(0, channels_, [&](int64_t c, int64_t n) {
            const Column<double> a = sums.totals(0, c, n), b = sums.totals(1, c, n);
            // What rounding left is asked of integers alone.
            const auto rest = [&](int64_t row, int64_t i, double total) {
                BatchSum s = sums.get(row, c + i);
                s.add(-total);
                return pass.exact_integers() ? s.total() : 0;
            };
            for (int64_t i = 0; i < n; ++i) to.set(c + i, {a[i], rest(0, i, a[i])}, {b[i], rest(1, i, b[i])});
        });
    }

    Exchange& exchange_;
    Exchange::Same same_;
    Call& call_;
    Counting& counting_;
    int64_t channels_;
};

}  // namespace batchnorm
