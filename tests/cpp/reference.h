// What batchnorm.hpp says of forward and backward, in plain doubles, and the comparison with what the library made.
#pragma once

#include "problem.h"

namespace test {

// act(v), act'(v).
inline std::pair<double, double> activated(const Problem& p, double v) {
    const double s = 1 / (1 + std::exp(-v)), t = std::tanh(v), line = v > 0 ? 1 : p.activation == Activation::leaky_relu ? p.slope : 0;
    if (p.activation == Activation::none) return {v, 1};
    if (p.activation == Activation::relu6) return {std::clamp(v, 0.0, 6.0), v < 6 ? line : 0};
    if (p.activation == Activation::sigmoid) return {s, s * (1 - s)};
    if (p.activation == Activation::tanh) return {t, 1 - t * t};
    if (p.activation == Activation::silu) return {v * s, s + v * s * (1 - s)};
    return {line == 0 ? 0 : line * v, line};
}

// For each result its value and, as "~name", the size of the terms whose rounding it has.
inline Outcome reference(const Problem& p, const Data& d, const Outcome& got) {
    const Shape& s = p.shape;
    const size_t elements = static_cast<size_t>(s.elements()), channels = static_cast<size_t>(s.channels);
    Outcome o{{{"running_mean", d.running_mean}, {"running_var", d.running_var}, {"own_mean", d.own_mean}, {"own_std", d.own_std}}};
    for (const char* const name : {"y", "~y", "dx", "~dx", "dz", "~dz"}) o[name] = Vector(elements);
    for (const char* const name : {"dgamma", "~dgamma", "dbeta", "~dbeta"}) o[name] = Vector(d.gamma.size());
    Vector g(elements), u(elements), total(channels), mean_sum(channels), var_sum(channels), unbiased_sum(channels);
    const auto part = [&](int64_t begin, int64_t end, int64_t channel) {
        const auto c = static_cast<size_t>(channel);
        const auto each = [&](const auto& f) {  // f(element, weight, row of gamma and beta)
            for (int64_t n = begin; n < end; ++n) {
                for (int64_t i = 0; i < s.inner; ++i) {
                    const auto row = static_cast<size_t>(p.rows == 0 ? 0 : n / (s.outer / p.rows)) * channels + c;
                    if (d.counts(n, channel, i)) f(s.at(n, channel, i), d.weight(n * s.inner + i), row);
                }
            }
        };
        long double weight = 0, sum = 0, squares = 0;
        double values = 0;
        each([&](size_t i, double w, size_t) { weight += w, values += w > 0, sum += w * d.x[i]; });
        const auto n = static_cast<double>(weight);
        const double batch_mean = static_cast<double>(sum / weight);
        each([&](size_t i, double w, size_t) { squares += w * (d.x[i] - sum / weight) * (d.x[i] - sum / weight); });
        const double batch_var = static_cast<double>(squares / weight);
        const double mean = p.given ? d.given_mean[c] : batch_mean, var = p.given ? d.given_var[c] : batch_var,
                     inv = 1 / std::sqrt(var + p.eps);
        if (values >= 2 && n > 1) {
            total[c] += n, mean_sum[c] += n * batch_mean, var_sum[c] += n * batch_var, unbiased_sum[c] += n * batch_var * n / (n - 1);
        }
        double r = 1, move = 0;
        if (p.renorm != Problem::none) {
            const bool own = p.renorm >= Problem::own;
            const double std = own ? rounded(Dtype::float32, d.own_std[c]) : std::sqrt(d.running_var[c] + p.eps);
            r = std::clamp(1 / inv / std, 0.75, 1.25);
            move = std::clamp((mean - (own ? d.own_mean[c] : d.running_mean[c])) / std, -0.5, 0.5);
            o["r"].push_back(r), o["d"].push_back(move);
            r = got.of("r")[o["r"].size() - 1], move = got.of("d")[o["d"].size() - 1];  // which gradients take for constants
        }
        o["mean"].push_back(mean), o["var"].push_back(var), o["inv_std"].push_back(inv), o["count"].push_back(n);
        if (values == 0 && !p.given) return;
        const bool single = values == 1 && !p.given,
                   of_y = p.keeps_y() && std::count(got.of("lost").begin(), got.of("lost").end(), channel) == 0;
        const double coarse = p.dtype == Dtype::float64 ? std::abs(mean) + 1 / inv : std::abs(mean) * 0x1p-24;  // of the mean, rounded
        double a = 0, a_u = 0, a_size = 0;
        each([&](size_t i, double, size_t row) {
            const double gamma = p.gamma ? d.gamma[row] : 1, beta = (p.beta ? d.beta[row] : 0) + gamma * move, z = p.residual ? d.z[i] : 0;
            u[i] = single ? 0 : (d.x[i] - mean) * inv;
            double v = gamma * r * u[i] + beta + z, y = got.of("y")[i];
            o["y"][i] = activated(p, v).first;
            const double size = o["~y"][i] = std::abs(gamma * r) * inv * (std::abs(d.x[i] - mean) + coarse) + std::abs(beta) + std::abs(z);
            if (of_y) {  // x as y tells it
                v = p.activation == Activation::leaky_relu && !(y > 0) ? y / p.slope : y;
                u[i] = single ? 0 : (v - beta) / (gamma * r);
            } else if (!p.smooth() && std::min(std::abs(v), std::abs(v - 6)) < 6e-7 * size) {
                v = p.residual && v > 3 ? (got.of("dz")[i] != 0 ? 5 : 7) : y;  // on which side of a bend rounding put it
            }
            g[i] = d.dy[i] * activated(p, v).second;
            const double g_size = p.smooth() ? std::abs(d.dy[i]) * (1 + size) : std::abs(g[i]);
            o["dz"][i] = g[i], o["~dz"][i] = g_size;
            a += gamma * r * g[i], a_u += gamma * r * g[i] * u[i], a_size += std::abs(gamma * r) * g_size * (1 + std::abs(u[i]));
            o["dgamma"][row] += g[i] * (r * u[i] + move), o["~dgamma"][row] += g_size * (1 + r * (std::abs(u[i]) + inv * std::abs(d.x[i])));
            o["dbeta"][row] += g[i], o["~dbeta"][row] += g_size;
        });
        each([&](size_t i, double w, size_t row) {
            const double own = (p.gamma ? d.gamma[row] : 1) * r, by = p.given ? 0 : w / n;
            o["dx"][i] = single ? 0 : inv * (own * g[i] - by * (a + u[i] * a_u));
            o["~dx"][i] = inv * (std::abs(own) * o["~dz"][i] + by * a_size * (1 + std::abs(u[i])));
        });
    };
    for (int64_t begin = 0, end; begin < s.outer; begin = end) {
        end = p.part_outer == 0 ? s.outer : std::min(begin + p.part_outer, s.outer);
        if ((s.outer - end) * s.inner == 1) end = s.outer;  // a single value joins
        for (int64_t c = 0; c < s.channels; ++c) part(begin, end, c);
    }
    for (size_t c = 0; c < channels; ++c) {
        if (total[c] == 0) continue;
        const double decay = p.decay == Problem::each ? d.decays[c] : p.decay == Problem::seen ? d.seen[c] / (d.seen[c] + total[c]) : 0.75;
        const auto move = [&](const char* name, double keep, double batch) { o[name][c] = keep * o[name][c] + (1 - keep) * batch; };
        if (p.has_running()) move("running_mean", decay, mean_sum[c] / total[c]), move("running_var", decay, unbiased_sum[c] / total[c]);
        if (p.renorm != Problem::moving) continue;
        move("own_mean", 0.875, mean_sum[c] / total[c]), move("own_std", 0.875, std::sqrt(var_sum[c] / total[c] + p.eps));
    }
    return o;
}

// Bounds: relative to the size of the terms, the roundings of arithmetic (in double, where no wider sums hide it, those of both sides'
// sums) and one to storage.
inline void compare(const Problem& p, const Outcome& got, const Outcome& want) {
    context = text(p);
    const bool is_double = p.dtype == Dtype::float64;
    const double compute = is_double ? 1e-14 : 0x1p-24, storage = is_double ? 0 : std::ldexp(1.001, -format(p.dtype).fraction - 1);
    const double tiny = std::ldexp(1, format(p.dtype).low - format(p.dtype).fraction), sums = p.smooth() ? 16 * compute : 1e-13;
    const auto close = [&](const char* name, double by_size, double by_value, double least) {
        if (!got.contains(name)) return;
        const Vector &a = got.of(name), &b = want.contains(name) ? want.of(name) : a;
        const Vector size = want.contains(std::string("~") + name) ? want.of(std::string("~") + name) : Vector(b.size());
        bool good = a.size() == b.size();
        for (size_t i = 0; good && i < b.size(); ++i) {
            const double bound = by_size * size[i] + by_value * (std::abs(b[i]) + by_size * size[i]) + least;
            if (near(a[i], b[i], bound)) continue;
            good = false;
            context += std::string(" ") + name + "[" + std::to_string(i) + "] " + std::to_string(a[i]) + " not " + std::to_string(b[i]) +
                       ": off by " + std::to_string(std::abs(a[i] - b[i]) / bound) + " bounds";
        }
        CHECK(good);
    };
    close("mean", 0, 1e-13, 1e-13);
    close("var", 0, 1e-11, 1e-26);
    close("inv_std", 0, 1e-11, 0);
    close("count", 0, 1e-14, 0);
    close("r", 0, 1e-11, 0);
    close("d", 0, 1e-12, 1e-13);
    for (const char* const name : {"running_mean", "running_var", "own_mean", "own_std"}) close(name, 0, 2e-7, 1e-7);
    close("y", (p.smooth() ? 12 : 7) * compute, storage, tiny + (p.smooth() ? 4 * compute : 0));
    close("dx", 10 * compute, storage, tiny);
    close("dz", (p.smooth() ? 10 : 1) * compute, storage, tiny);
    close("dgamma", sums, 0x1p-24, 1e-40);
    close("dbeta", sums, 0, 1e-300);
}

}  // namespace test
