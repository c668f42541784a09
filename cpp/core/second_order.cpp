// The driver of double backward. With x_hat = u = (x - m) s, v = gamma (r u + d) + beta + z and a = gamma r g, g = dy act'(v), backward is
//     dx = s (a - w sum a / n - w u sum a u / n),  dgamma = sum g (r u + d),  dbeta = sum g,  dz = g
// so that L = <ddx, dx> + <ddgamma, dgamma> + <ddbeta, dbeta> + <ddz, dz> = sum g c with p = ddx and
//     h = s (p - sum w p / n - u sum w p u / n),  c = gamma r h + ddgamma (r u + d) + ddbeta + ddz.
// With e = dy act''(v) c and U = dL/du = gamma r e + r ddgamma g - s (a sum w p u + w p sum a u) / n the gradients of L are
//     ddy = act'(v) c,  dz = e,  dbeta = sum e,  dgamma = sum (g r h + e (r u + d)),
//     dx = s (U - w sum U / n - w u (sum U u + sum a h) / n);   given statistics: h = s p, U = gamma r e + r ddgamma g, dx = s U.
// All in double, element by element: three passes over a part's channels.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <thread>

#include "coefficient_rows.h"
#include "float_mode.h"
#include "gate.h"
#include "reduce.h"
#include "saved.h"
#include "storage.h"

namespace batchnorm {
namespace {

// exp(t) for t <= 0, of operations that round alike everywhere: as in kernels/activation.h.
double exp_of(double t) {
    t = t < -745 ? -745 : t;
    const double rounded = t * 0x1.71547652b82fep+0 + 0x1.8p52, n = rounded - 0x1.8p52;
    const double r = (t - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    double p = 1;
    for (int k = 15; k >= 1; --k) p = 1 + p * r / k;
    return std::ldexp(p, static_cast<int>(n));
}

// act'(v) and act''(v).
struct Derivatives {
    double first, second;
};
Derivatives derivatives(Activation activation, double slope, double v) {
    const auto of_sigmoid = [](double x) {  // s', and s'' = s' (1 - 2 s)
        const double e = exp_of(-std::abs(x)), d = 1 + e, first = e / (d * d);
        return Derivatives{first, first * (std::signbit(x) ? 1 - e : e - 1) / d};
    };
    switch (activation) {
        case Activation::relu:
            return {v > 0 ? 1.0 : 0.0, 0};
        case Activation::leaky_relu:
            return {v > 0 ? 1.0 : slope, 0};
        case Activation::relu6:
            return {v > 0 && v < 6 ? 1.0 : 0.0, 0};
        case Activation::sigmoid:
            return of_sigmoid(v);
        case Activation::tanh: {  // tanh(v) = 2 sigmoid(2 v) - 1
            const Derivatives s = of_sigmoid(2 * v);
            return {4 * s.first, 8 * s.second};
        }
        case Activation::silu: {  // (v s)' = s + v s'
            const Derivatives s = of_sigmoid(v);
            const double e = exp_of(-std::abs(v)), value = (v < 0 ? e : 1) / (1 + e), near = std::clamp(v, -800.0, 800.0);
            return {value + near * s.first, 2 * s.first + near * s.second};
        }
        default:
            return {1, 0};
    }
}

constexpr int64_t kBlock = 16;  // channels of an item

// One value of each of an item's channels.
using Values = std::array<double, kBlock>;
// A sum of which every 64 terms are added plainly: the chain of a compensated addition is six times as long.
struct LongSum {
    coeffs::Sum sum{0, 0};
    double few = 0;
    int terms = 0;

    void add(double x) {
        few += x;
        if (++terms == 64) flush();
    }
    double total() {
        flush();
        return sum.total();
    }

private:
    void flush() {
        sum.add(few);
        few = 0;
        terms = 0;
    }
};
using Sums = std::array<LongSum, kBlock>;

// Looked at every so often inside an item, since one may be a whole tensor: throws in each thread once the user has interrupted.
class Interrupt {
public:
    void look() {
        if (std::this_thread::get_id() == caller_ && parallel::asked_to_stop()) stopped_ = true;
        if (stopped_.load(std::memory_order_relaxed)) check::interrupted();
    }

private:
    const std::thread::id caller_ = std::this_thread::get_id();
    std::atomic<bool> stopped_{false};
};

// One part, up to kBlock channels from c0 on.
template <class C>
class Item {
public:
    Item(const DoubleBackward& b, const Saved::Impl& s, const Call& call, int64_t part, int64_t c0, Interrupt& interrupt)
        : b_(b), s_(s), call_(call), interrupt_(interrupt), part_(part), c0_(c0), n_(std::min(kBlock, call.geometry.channels - c0)) {
        for (int64_t k = 0; k < n_; ++k) count_[index(k)] = s.count[part * call.geometry.channels + c0 + k];
    }
    // dgamma, dbeta: a row per group of all parts, or null.
    void run(double* dgamma, double* dbeta) {
        Sums p{}, p_u{}, a_u{};
        each([&](std::size_t k, const Element& e) {
            p[k].add(e.w * e.p);
            p_u[k].add(e.w * e.p * e.u);
            a_u[k].add(e.a * e.u);
        });
        for (std::size_t k = 0; k < kBlock; ++k) {
            p_[k] = p[k].total() / count_[k];
            p_u_[k] = p_u[k].total() / count_[k];
            a_u_[k] = a_u[k].total() / count_[k];
        }
        Sums all{}, all_u{};
        const int64_t channels = call_.geometry.channels, first = part_ * call_.groups(0);
        Sums gamma{}, beta{};
        const auto put = [&](int64_t q) {
            for (int64_t k = 0; dgamma != nullptr && k < n_; ++k) {
                dgamma[(first + q) * channels + c0_ + k] = gamma[index(k)].total();
                dbeta[(first + q) * channels + c0_ + k] = beta[index(k)].total();
            }
            gamma = beta = {};
        };
        int64_t q = 0;
        each([&](std::size_t k, const Element& e) {
            if (e.q != q) {
                put(q);
                q = e.q;
            }
            const double h = this->h(k, e), c = this->c(e, h), curved = e.dy * e.act.second * c;
            const double u = of_u(k, e, curved);
            all[k].add(u);
            all_u[k].add(u * e.u + e.a * h);
            gamma[k].add(e.g * e.of.r * h + curved * (e.of.r * e.u + e.of.d));
            beta[k].add(curved);
            if (b_.ddy) store(b_.ddy, e.at(b_.ddy), e.act.first * c);
            if (b_.dresidual) store(b_.dresidual, e.at(b_.dresidual), curved);
        });
        put(q);
        if (!b_.dx) return;
        Values total, total_u;
        for (std::size_t k = 0; k < kBlock; ++k) {
            total[k] = all[k].total();
            total_u[k] = all_u[k].total();
        }
        each([&](std::size_t k, const Element& e) {
            const double u = of_u(k, e, e.dy * e.act.second * this->c(e, this->h(k, e)));
            const double through = s_.batch ? e.w * (total[k] + e.u * total_u[k]) / count_[k] : 0;
            store(b_.dx, e.at(b_.dx), e.of.s * (u - through));
        });
    }

private:
    // What all elements of a channel in one group share.
    struct Channel {
        double mean, s, r, d, gamma_r, offset, ddgamma, ddbeta;
        coeffs::Affine<C> affine;
        int64_t lost;  // its place among the channels whose x was kept, or -1
        bool single;   // so few values count that x_hat is 0
    };
    struct Element {
        const Channel& of;
        int64_t o, c, i, q;
        double dy, p, ddz, u, w, g, a;
        Derivatives act;
        template <bool writable>
        int64_t at(const AnyView<writable>& v) const {
            return o * v.outer_stride + c * v.channel_stride + i * v.inner_stride;
        }
    };
    double h(std::size_t k, const Element& e) const {
        if (!s_.batch) return e.of.s * e.p;
        return e.of.s * (e.p - p_[k] - e.u * p_u_[k]);
    }
    double c(const Element& e, double h) const { return e.of.gamma_r * h + e.of.ddgamma * (e.of.r * e.u + e.of.d) + e.of.ddbeta + e.ddz; }
    double of_u(std::size_t k, const Element& e, double curved) const {
        const double direct = e.of.gamma_r * curved + e.of.r * e.of.ddgamma * e.g;
        return s_.batch ? direct - e.of.s * (e.a * p_u_[k] + e.w * e.p * a_u_[k]) : direct;
    }
    static double value(const ConstTensor& v, const Element& e) { return v ? load(v, e.at(v)) : 0; }
    static double value(const ConstRows& v, int64_t sample, int64_t c) { return v ? batchnorm::at(row_of(v, sample), c) : 0; }

    // Whether bit (o, c, i) is set.
    bool bit(const kernels::Mask& m, int64_t o, int64_t c, int64_t i) const {
        const Geometry& g = call_.geometry;
        const int64_t n =
            g.direction == kernels::ncs ? o * m.outer_stride + c * m.channel_stride + i : (o * g.inner + i) * m.outer_stride + c;
        return (m.bits[n >> 3] >> (n & 7) & 1) != 0;
    }
    bool counts(int64_t o, int64_t c, int64_t i) const {
        const Geometry& g = call_.geometry;
        if (s_.element_bits != nullptr) return bit(BitLayout(g, call_.parts).mask(s_.element_bits, part_), o, c, i);
        return s_.mask.empty() || PerPosition(s_.mask, g.count())[(call_.parts.begin(part_) + o) * g.inner + i] != 0;
    }
    Channel channel(int64_t c, int64_t q) const {
        const int64_t channels = call_.geometry.channels, n = part_ * channels + c, sample = call_.sample(part_, q);
        const double gamma = s_.gamma ? s_.gamma.row(sample, channels)[c] : 1, beta = s_.beta ? s_.beta.row(sample, channels)[c] : 0;
        Channel k;
        k.mean = s_.mean[n];
        k.single = s_.batch && s_.values[n] < 2;
        k.s = k.single ? 0 : s_.inv_std[n];
        k.r = s_.r == nullptr ? 1 : s_.r[n];
        k.d = s_.d == nullptr ? 0 : s_.d[n];
        k.gamma_r = gamma * k.r;
        k.offset = beta + gamma * k.d;
        k.ddgamma = value(b_.ddgamma, sample, c);
        k.ddbeta = value(b_.ddbeta, sample, c);
        k.affine = coeffs::affine<C>(k.mean, k.s, k.gamma_r, k.offset);
        const auto lost = std::find(s_.lost.begin(), s_.lost.end(), c);
        k.lost = lost == s_.lost.end() ? -1 : lost - s_.lost.begin();
        return k;
    }
    // x_hat and the activation's input.
    double input(Element& e) const {
        const Channel& k = e.of;
        double kept = value(b_.kept, e);
        if (s_.keep == Keep::y && k.lost < 0) {
            const double v = s_.activation == Activation::leaky_relu && !(kept > 0) ? kept / s_.slope : kept;
            e.u = k.single ? 0 : (v - k.offset) / k.gamma_r;
            return v;
        }
        if (s_.keep == Keep::y) {
            Element place = e;
            place.c = k.lost;
            kept = value(s_.lost_tensor(call_.geometry), place);
        }
        e.u = (kept - k.mean) * k.s;
        // As the forward computed it, so that both are on the same side of a bend.
        C v = (static_cast<C>(kept) - k.affine.center) * k.affine.scale + k.affine.offset;
        if (b_.residual) v += static_cast<C>(value(b_.residual, e));
        return static_cast<double>(v);
    }
    // Fills in what follows from the tensors.
    void look(Element& e, int64_t o) const {
        const Geometry& g = call_.geometry;
        e.w = s_.weights.empty() ? 1 : PerPosition(s_.weights, g.count())[e.o * g.inner + e.i];
        e.dy = value(b_.dy, e);
        e.p = value(b_.ddx, e);
        e.ddz = value(b_.ddresidual, e);
        const double v = input(e);
        if (s_.bits != nullptr) {
            const bool on = bit(BitLayout(g, call_.parts).mask(s_.bits, part_), o, e.c, e.i);
            e.act = {on ? 1 : s_.activation == Activation::leaky_relu ? s_.slope : 0, 0};
        } else {
            e.act = derivatives(s_.activation, s_.slope, v);
        }
        e.g = e.dy * e.act.first;
        e.a = e.of.gamma_r * e.g;
    }
    // f(k, element) for what counts, in the order of memory.
    template <class F>
    void each(const F& f) const {
        const Geometry& g = call_.geometry;
        const int64_t rows = call_.group_rows(part_), begin = call_.parts.begin(part_);
        const bool all = s_.mask.empty() && s_.element_bits == nullptr;
        std::array<Channel, kBlock> channels;
        int64_t seen = 0;
        const auto one = [&](int64_t o, int64_t k, int64_t i) {
            if (++seen % 65536 == 0) interrupt_.look();  // a few milliseconds
            if ((!all && !counts(o, c0_ + k, i)) || (s_.batch && count_[index(k)] == 0)) return;
            Element e{channels[index(k)], begin + o, c0_ + k, i, o / rows, 0, 0, 0, 0, 0, 0, 0, {}};
            look(e, o);
            f(index(k), e);
        };
        for (int64_t o = 0; o < call_.parts.size(part_); ++o) {
            for (int64_t k = 0; o % rows == 0 && k < n_; ++k) channels[index(k)] = channel(c0_ + k, o / rows);
            for (int64_t k = 0; g.direction == kernels::ncs && k < n_; ++k) {
                for (int64_t i = 0; i < g.inner; ++i) one(o, k, i);
            }
            for (int64_t i = 0; g.direction == kernels::nsc && i < g.inner; ++i) {
                for (int64_t k = 0; k < n_; ++k) one(o, k, i);
            }
        }
    }

    const DoubleBackward& b_;
    const Saved::Impl& s_;
    const Call& call_;
    Interrupt& interrupt_;
    int64_t part_, c0_, n_;
    Values count_{}, p_{}, p_u_{}, a_u_{};
};

}  // namespace

inline namespace v0_2 {

void batch_norm_double_backward(const DoubleBackward& b) {
    const FloatMode mode;
    const Saved::Impl& s = check::double_backward(b);
    const parallel::Limit limit(b.execution.num_threads);
    const Call call = s.call(b.kept);
    const int64_t channels = call.geometry.channels, blocks = (channels + kBlock - 1) / kBlock;
    const int64_t groups = (call.parts.count - 1) * call.groups(0) + call.groups(call.parts.count - 1);
    Workspace ws;
    double* const dgamma = ws.take<double>(groups * channels);
    double* const dbeta = ws.take<double>(groups * channels);
    std::fill_n(dgamma, groups * channels, 0.0);
    std::fill_n(dbeta, groups * channels, 0.0);
    const bool every = s.mask.empty() && s.element_bits == nullptr &&
                       std::none_of(s.values, s.values + call.parts.count * channels, [](double n) { return n == 0; });
    for (const Tensor* v : {&b.ddy, &b.dx, &b.dresidual}) {
        if (*v && !every) clear(*v);  // what does not count stays so
    }
    Interrupt interrupt;
    if (call.geometry.count() != 0) {
        with_compute(call.geometry.dtype, [&]<class C>() {
            for_each(call.parts.count * blocks, call.geometry.elements() >= 4096,
                     [&](int64_t i) { Item<C>(b, s, call, i / blocks, i % blocks * kBlock, interrupt).run(dgamma, dbeta); });
        });
    }
    put_rows(dgamma, groups, channels, b.dgamma);
    put_rows(dbeta, groups, channels, b.dbeta);
}

}  // namespace v0_2

}  // namespace batchnorm
