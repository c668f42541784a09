// What a batch does to running statistics and to the reference of batch renormalisation: worked out of the statistics of its parts, taken
// once nothing can fail any more. C values; no tensors, no threads.
#pragma once

#include <cmath>

#include "call.h"
#include "coeffs.h"

namespace batchnorm {

// A channel's values in all parts that have enough of them.
struct RunningBatch {
    double n = 0, mean = 0, var = 0, unbiased = 0;  // var with 0, unbiased with ddof taken from each part's n
};
// mean and var: parts * channels, var the population's. n(part) is the sum of the weights of n_values(part) values.
template <class N, class Values>
BATCHNORM_HOST_DEVICE RunningBatch running_batch(int64_t parts, int64_t channels, int64_t c, double ddof, const double* mean,
                                                 const double* var, const N& n, const Values& n_values) {
    RunningBatch b, sums;
    int64_t counted = 0;
    for (int64_t p = 0; p < parts; ++p) {
        const double of_part = n(p);
        if (n_values(p) < 2 || of_part <= ddof) continue;
        const int64_t at = p * channels + c;
        const RunningBatch part{of_part, mean[at], var[at], coeffs::with_ddof(var[at], of_part, ddof)};
        if (++counted == 1) b = part;
        sums.mean += part.n * part.mean;
        sums.var += part.n * part.var;
        sums.unbiased += part.n * part.unbiased;
        if (counted > 1) b.n += part.n;
    }
    return counted < 2 ? b : RunningBatch{b.n, sums.mean / b.n, sums.var / b.n, sums.unbiased / b.n};
}

class RunningStep {
public:
    // mean and var: parts * channels, var the population's.
    RunningStep(const Forward& f, const Call& call, const double* mean, const double* var) : f_(f), call_(call), mean_(mean), var_(var) {}

    // Whether NaN, Inf or what the arrays' type cannot hold would enter them.
    bool not_finite() {
        bool finite = true;
        each([&](const Channels& to, int64_t c, double value) {
            if (to.is_double ? std::isfinite(value) : std::isfinite(static_cast<float>(value))) return;
            finite = false;
            channel_ = c;
        });
        return !finite;
    }
    int64_t channel() const { return channel_; }

    // Makes it so. Whether any channel was updated.
    bool take() {
        if (!f_.running.mean && f_.renorm.decay < 0) return false;
        if (everyday()) return take_columns();
        if (f_.running.on_nonfinite == OnNonfinite::skip && not_finite()) return false;
        bool any = false;
        each([&](const Channels& to, int64_t c, double value) {
            set(to, c, value);
            any = true;
        });
        return any;
    }

private:
    // One part, one decay, and all channels have the same number of values: worth doing several channels at a time.
    bool everyday() const {
        return call_.parts.count == 1 && call_.counts.same() && f_.renorm.decay < 0 && !f_.running.decays && !f_.running.seen &&
               f_.running.on_nonfinite != OnNonfinite::skip;
    }
    bool take_columns() {
        const double n = call_.counts.weight(0, 0), ddof = f_.running.ddof, decay = f_.running.decay;
        if (call_.counts.positions(0, 0) < 2 || n <= ddof) return false;
        by_columns(0, call_.geometry.channels, [&](int64_t c, int64_t width) {
            Column<double> mean(f_.running.mean, c, width), var(f_.running.var, c, width);
            for_entries(width, [&](int64_t i) {
                mean[i] = coeffs::running(mean[i], mean_[c + i], decay);
                var[i] = coeffs::running(var[i], coeffs::with_ddof(var_[c + i], n, ddof), decay);
            });
            mean.put(f_.running.mean, c, width);
            var.put(f_.running.var, c, width);
        });
        return true;
    }
    RunningBatch batch(int64_t c) const {
        return running_batch(
            call_.parts.count, call_.geometry.channels, c, f_.running.ddof, mean_, var_,
            [&](int64_t p) { return call_.counts.weight(p, c); }, [&](int64_t p) { return call_.counts.positions(p, c); });
    }
    double decay(const RunningBatch& b, int64_t c) const {
        const Running& r = f_.running;
        if (r.seen) return at(r.seen, c) / (at(r.seen, c) + b.n);
        return r.decays ? at(r.decays, c) : r.decay;
    }
    // f(array, channel, new value) for every value that changes.
    template <class F>
    void each(const F& f) const {
        for (int64_t c = 0; c < call_.geometry.channels; ++c) {
            const RunningBatch b = batch(c);
            if (b.n == 0) continue;
            if (f_.running.mean) {
                const double decay = this->decay(b, c);
                f(f_.running.mean, c, coeffs::running(at(f_.running.mean, c), b.mean, decay));
                f(f_.running.var, c, coeffs::running(at(f_.running.var, c), b.unbiased, decay));
            }
            if (f_.renorm.decay >= 0) {
                f(f_.renorm.mean, c, coeffs::running(at(f_.renorm.mean, c), b.mean, f_.renorm.decay));
                f(f_.renorm.std, c, coeffs::running(at(f_.renorm.std, c), std::sqrt(b.var + f_.eps), f_.renorm.decay));
            }
        }
    }

    const Forward& f_;
    const Call& call_;
    const double *mean_, *var_;
    int64_t channel_ = 0;
};

}  // namespace batchnorm
