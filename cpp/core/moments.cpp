// The drivers of moments, of the sums that are merged, and of the running step by itself.
#include <algorithm>
#include <limits>

#include "float_mode.h"
#include "running.h"
#include "statistics.h"

namespace batchnorm {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Statistics of all of x whose result for some channels `then` takes: then(statistics, c0, c1).
template <class Then>
class Measured : public Statistics {
public:
    Measured(Workspace& ws, const Plan& plan, const StatisticsOf& of, int64_t part, int64_t c0, int64_t c1, const Then& then)
        : Statistics(ws, plan, of, part, c0, c1), then_(then) {}
    bool finish(int64_t c0, int64_t c1, int round) {
        if (!Statistics::finish(c0, c1, round)) return false;
        then_(*this, c0, c1);
        return true;
    }

private:
    const Then& then_;
};

template <class Then>
void measure(const Call& call, const ConstTensor& x, const Positions& positions, bool far, double* mean, double* var, const Then& then) {
    Workspace ws;
    std::uint8_t* elements = nullptr;
    if (positions.element_mask) {
        elements = ws.take<std::uint8_t>(BitLayout(call.geometry, call.parts).bytes());
        elements_to_bits(call.geometry, call.parts, positions.element_mask, elements);
    }
    const Counting counting(ws, call.geometry, call.parts, positions.mask, positions.weights, elements);
    const StatisticsOf of{call, check::active_level(), x, counting, counting.all_weights<double>(ws), 0, far, mean, var, nullptr};
    const PartPlans plans(call.geometry, call.parts, {.reads = 1, .writes = 0, .sums = true});
    for_parts(plans, 1, [&](Workspace& own, const Plan& plan, int64_t part, int64_t c0, int64_t c1) {
        return Measured<Then>(own, plan, of, part, c0, c1, then);
    });
}

// The same of a batch of which each rank of a group holds some samples.
template <class Counted, class Then>
void measure_together(Exchange& exchange, const Exchange::Same& same, Call& call, const ConstTensor& x, const Positions& positions,
                      double* mean, double* var, const Counted& counted, const Then& then) {
    Workspace ws;
    std::uint8_t* elements = nullptr;
    if (positions.element_mask) {
        elements = ws.take<std::uint8_t>(BitLayout(call.geometry, call.parts).bytes());
        elements_to_bits(call.geometry, call.parts, positions.element_mask, elements);
    }
    Counting counting(ws, call.geometry, call.parts, positions.mask, positions.weights, elements);
    const StatisticsOf of{call, check::active_level(), x, counting, counting.all_weights<double>(ws), 0, true, mean, var, nullptr, true};
    StatisticsTogether(exchange, same, call, counting).run(of, counted, [&](const Statistics& s) { then(s, 0, call.geometry.channels); });
}

void moments_of(Call& call, const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof,
                const Positions& positions, Exchange* exchange) {
    const auto without_values = [&] {
        for (double& v : mean) v = kNaN;
        for (double& v : var) v = kNaN;
    };
    bool integers = is_integer(x.dtype) && positions.weights.empty();  // mean and var are made of exact sums
    if (exchange == nullptr && call.counts.most() == 0) return without_values();
    Workspace ws;
    // The caller's arrays are written at the end, so that an interrupt leaves them as they were.
    const int64_t channels = call.geometry.channels;
    double* const m = ws.take<double>(channels);
    double* const v = ws.take<double>(channels);
    double* const exact = ws.take<double>(channels);
    const auto of_integers = [&](const Statistics& s, int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1 && s.exact_integers(); ++c) {
            const int64_t n = call.counts.positions(0, c);
            if (n <= ddof) continue;
            const coeffs::IntegerMoments k = s.integer_moments(c, n, ddof);
            m[c] = k.mean;
            exact[c] = k.var;
        }
    };
    if (exchange == nullptr) {
        measure(call, x, positions, true, m, v, of_integers);
    } else {
        const Exchange::Same same{Exchange::measuring, x.dtype, channels, static_cast<double>(ddof)};
        measure_together(
            *exchange, same, call, x, positions, m, v, [&] { check::enough_for(ddof, call, positions); },
            [&](const Statistics& s, int64_t c0, int64_t c1) {
                integers = s.exact_integers();
                of_integers(s, c0, c1);
            });
        if (call.counts.most() == 0) return without_values();
    }
    by_columns(0, channels, [&](int64_t c, int64_t n) {
        const Column<double> count = call.counts.weights(0, c, n);
        Column<double>(m + c, n).put(mean.data() + c, n);
        Column<double> variance(v + c, n);
        for_entries(n, [&](int64_t i) { variance[i] = coeffs::with_ddof(variance[i], count[i], static_cast<double>(ddof)); });
        for (int64_t i = 0; i < n; ++i) {
            if (integers && count[i] > static_cast<double>(ddof)) variance[i] = exact[c + i];
            if (count[i] <= static_cast<double>(ddof)) variance[i] = kNaN;
        }
        variance.put(var.data() + c, n);
    });
}

}  // namespace

inline namespace v0_2 {

void moments(const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof, int num_threads,
             const Positions& positions, Group* group, std::int64_t sample_outer) {
    const FloatMode mode;
    const parallel::Limit limit(num_threads);
    together(group, true, [&](Exchange* exchange) {
        Call call = check::moments(x, mean, var, ddof, num_threads, positions, group, sample_outer);
        moments_of(call, x, mean, var, ddof, positions, exchange);
    });
}

void moment_sums(const ConstTensor& x, std::span<double> sums, int num_threads, const Positions& positions) {
    const FloatMode mode;
    const parallel::Limit limit(num_threads);
    const Call call = check::moment_sums(x, sums, num_threads, positions);
    const int64_t channels = call.geometry.channels;
    Workspace ws;
    double* const made = ws.take<double>(moment_sums_size(channels));
    std::fill_n(made, moment_sums_size(channels), 0.0);
    if (call.counts.most() != 0) {
        double* const mean = ws.take<double>(channels);
        double* const var = ws.take<double>(channels);
        const SumsArray<double> out(made, channels);
        const auto take = [&](const Statistics& s, int64_t c0, int64_t c1) {
            for (int64_t c = c0; c < c1; ++c) {
                const double n = call.counts.weight(0, c), scale = s.scale();
                if (n == 0) continue;
                out.set_count(c, {{n}});
                out.set_sum(c, s.sum(c, n * scale).scaled(1 / scale));
                out.set_sum_sq(c, s.sum_sq(c, n * scale).scaled(1 / scale));
            }
        };
        measure(call, x, positions, false, mean, var, take);
        for (int64_t c = 0; c < channels; ++c) {
            if (std::isfinite(out.sum(c).part[0]) && !std::isfinite(out.sum_sq(c).part[0])) check::squares_overflow("x", c);
        }
    }
    std::copy_n(made, moment_sums_size(channels), sums.data());
}

void update_running(const UpdateRunningArgs& a) {
    const FloatMode mode;
    check::running_step(a);
    const Running& r = a.running;
    for (int64_t c = 0; c < r.mean.size; ++c) {
        const double n = at(a.count, c), ddof = r.ddof;
        if (n < 2 || n <= ddof) continue;
        const double decay = r.seen ? at(r.seen, c) / (at(r.seen, c) + n) : r.decays ? at(r.decays, c) : r.decay;
        set(r.mean, c, coeffs::running(at(r.mean, c), at(a.mean, c), decay));
        set(r.var, c, coeffs::running(at(r.var, c), coeffs::with_ddof(at(a.var, c), n, ddof), decay));
    }
}

}  // namespace v0_2

}  // namespace batchnorm
