// The backward driver: sums of g and of g (u - shift) per group, numbers per channel, elementwise pass; u is the kept tensor, x or y. All
// formulas follow from x_hat = (u - center) * u_inv_std: of x these are mean and inv_std, of y the forward's offset and 1 / (gamma r).
#include <algorithm>
#include <cmath>

#include "coefficient_rows.h"
#include "exact_sums.h"
#include "exchange.h"
#include "float_mode.h"
#include "gate.h"
#include "reduce.h"
#include "saved.h"

namespace batchnorm {
namespace {

// A call on its way.
struct Work {
    const Backward& b;
    const Saved::Impl& s;
    const Call& call;
    const kernels::KernelTable& table;
    const Counting& counting;
    kernels::Weights weights;    // of all parts, of the compute type
    std::span<const bool> lost;  // channels whose results are made elsewhere; empty: none
    double *dgamma, *dbeta;      // out, a row of doubles for each group of each part; null: not wanted
    // Whether so few values count that x_hat is 0 and no gradient reaches x.
    bool single(int64_t part, int64_t c) const { return s.batch && s.values[part * channels() + c] < 2; }
    bool sums() const { return dgamma != nullptr || (b.dx && s.batch); }
    bool rows() const { return s.gamma.rows != 0 || s.beta.rows != 0; }
    int64_t channels() const { return call.geometry.channels; }
    int64_t group(int64_t part, int64_t q) const { return part * call.groups(0) + q; }
};

// What is known of some groups and channels of a part.
struct Numbers {
    Column<double> inv_std, gamma_r, center, u_inv_std, offset, r, d;

    Numbers(const Work& w, int64_t part, const Cells& k)
        : inv_std(k.of(w.s.inv_std + part * w.channels())),
          gamma_r(k.of(w.s.gamma.view(w.channels()), w.call.sample(part, k.group), 1)),
          center(k.of(w.s.mean + part * w.channels())),
          u_inv_std(k.of(w.s.inv_std + part * w.channels())),
          offset(k.of(w.s.beta.view(w.channels()), w.call.sample(part, k.group), 0)) {
        const Saved::Impl& s = w.s;
        if (s.r != nullptr) {
            r = k.of(s.r + part * w.channels());
            d = k.of(s.d + part * w.channels());
            for_entries(k.n, [&](int64_t i) {
                offset[i] += gamma_r[i] * d[i];
                gamma_r[i] *= r[i];
            });
        }
        if (s.keep == Keep::x) return;
        for_entries(k.n, [&](int64_t i) {
            if (!w.lost.empty() && w.lost[index(k.channel_of(i))]) gamma_r[i] = 1;  // whatever comes of it is overwritten
            center[i] = offset[i];
            u_inv_std[i] = 1 / gamma_r[i];
        });
    }
};

// The output in which the sums leave g = dy act'(v), so that the derivative of a smooth activation is computed once: dz, which is g, or
// else dx, to be overwritten. None where g would not fit exactly or the kept tensor would be lost.
Tensor left_gradient(const Work& w, const Act& act, const Plan& plan) {
    const Tensor& to = w.b.dresidual ? w.b.dresidual : w.b.dx;
    const bool smooth = act.gate == kernels::curve && !piecewise_linear(w.s.activation);
    const bool exact = w.call.geometry.dtype == Dtype::float32 || w.call.geometry.dtype == Dtype::float64;
    const bool dense = plan.fold == 1 || (plan.row_split == 1 && to.outer_stride == plan.channels);
    return to && smooth && exact && w.counting.every() && dense && to.data != w.b.kept.data ? to : Tensor();
}

// One part, some channels: a pass of reduce.h. `together`: of a batch that ranks of a group hold; a type of its own, so that the compiler
// inlines what a call of one process runs as if there were no other.
template <class C, bool together = false>
class Gradients {
public:
    Gradients(Workspace& ws, const Plan& plan, const Work& w, int64_t part, int64_t c0, int64_t c1)
        : w_(w),
          part_(part),
          begin_(w.call.parts.begin(part)),
          row_split_(plan.row_split),
          groups_(w.call.groups(part)),
          down_(plan.direction == kernels::ncs),
          act_(act_back(w.s.activation, w.s.slope, w.call.geometry.dtype, w.s.bits != nullptr, static_cast<bool>(w.b.residual),
                        w.s.keep == Keep::y)),
          bits_(BitLayout(w.call.geometry, w.call.parts).mask(w.s.bits, part)),
          // With a group outputs are written once nothing can fail any more.
          left_(w.sums() && !together ? left_gradient(w, act_, plan) : Tensor()),
          stream_(plan.stream),
          shift_(ws, groups_, plan, c0, c1),
          affine_(ws, groups_, plan, c0, c1, lead_of(w.b.dx, begin_)),
          gradient_(ws, groups_, plan, c0, c1, lead_of(w.b.dx, begin_)),
          ones_(ws, plan, c0, c1),
          sums_(ws, groups_, c0, c1),
          sums_kernel_(w.table.grad_sums[plan.direction][to_kernel(w.call.geometry.dtype)]),
          map_kernel_(w.table.grad_apply[plan.direction][to_kernel(w.call.geometry.dtype)]) {
        // The residual's gradient comes on the way of dx behind bits or a curve. Else it is dx with fixed statistics and k_dy = 1; without
        // an activation, dy itself.
        dz_ = left_ ? Tensor() : w.b.dresidual;
        dz_alone_ = dz_ && (!w.b.dx || (act_.gate != kernels::masked && act_.gate != kernels::curve));
        if (dz_alone_) ones_.fill(1);
        is_double_ = w.call.geometry.dtype == Dtype::float64;
    }

    void prepare(int64_t c0, int64_t c1) {
        by_columns(c0, c1, [&](int64_t c, int64_t n) {
            for_cells(groups_, down_, c, n, [&](const Cells& cells) {
                const Numbers k(w_, part_, cells);
                Column<double> about, inv_std;
                for_entries(cells.n, [&](int64_t i) {
                    about[i] = coeffs::gradient_shift(k.center[i], k.u_inv_std[i], is_double_);
                    inv_std[i] = w_.single(part_, cells.channel_of(i)) ? 0 : k.inv_std[i];
                });
                shift_.put(cells, about);
                affine_.put(cells, {cells.n, k.center, inv_std, k.gamma_r, k.offset});
            });
        });
    }
    void begin(int) {}
    void sums(const Where& where, int, double* g, double* g_u) {
        const int64_t c = where.box.channel_begin, channels = where.box.channel_end - c;
        const int64_t q = groups_ == 1 ? 0 : where.box.outer_begin / (w_.call.group_rows(part_) * row_split_);
        const double* const about = shift_[q].from(c);
        // Zeros subtracted one by one give the same bits as none, only later.
        const bool shifted =
            is_double_ || act_.gate == kernels::curve || std::any_of(about, about + channels, [](double s) { return s != 0; });
        sums_kernel_({where, to_operand(w_.b.dy, begin_), to_operand(w_.b.kept, begin_), shifted ? about : nullptr, affine_[q].from(c), g,
                      g_u, act_.gate, bits_, act_.curve, to_operand(w_.b.residual, begin_), w_.counting.kept(part_),
                      to_operand(left_, begin_)});
    }
    bool finish(int64_t c0, int64_t c1, int) {
        by_columns(c0, c1, [&](int64_t c, int64_t n) { finish_column(c, n); });
        return true;
    }
    // Takes what the sums of samples come to, about the mean and of x; those that go through the statistics, and with parameters per
    // sample also those of parameters.
    auto taker(int64_t c0, int64_t c1) {
        std::vector<Numbers> same;  // in all samples
        if (!w_.rows()) by_columns(c0, c1, [&](int64_t c, int64_t n) { same.emplace_back(w_, part_, Cells{0, c, n, false}); });
        return [this, c0, c1, same = std::move(same)](int64_t sample, const double* a, const double* b, const ExactSums& to, int64_t row) {
            by_columns(c0, c1, [&](int64_t c, int64_t n) {
                const Cells cells{groups_ == 1 ? 0 : sample, c, n, false};
                Sums s{{a + (c - c0), n}, {b + (c - c0), n}};
                if (same.empty()) return take_rows(cells, s, to, row);
                about_mean(same[index((c - c0) / kColumn)], cells, s);
                to.add(row, c, n, s.g.value);
                to.add(row + 1, c, n, s.g_xc.value);
            });
        };
    }
    // What map needs, from the sums of all samples.
    void finish_together(int64_t c, int64_t n, const Column<double>& g, const Column<double>& g_xc) {
        const Sums all{g, g_xc};
        for_cells(groups_, down_, c, n, [&](const Cells& cells) { put(cells, Numbers(w_, part_, cells), all, c, w_.rows()); });
        drop_single_values(c, n);
    }
    // Gradients of parameters with one row, from the same.
    void put_parameters(int64_t c, int64_t n, const Column<double>& g, const Column<double>& g_xc) {
        const Cells cells{0, c, n, false};
        put_parameters(cells, Numbers(w_, part_, cells), {g, g_xc});
    }
    bool maps() const { return w_.b.dx || dz_; }
    void map(const Where& where) {
        by_groups(w_.call, part_, row_split_, where, [&](int64_t q, const Where& box) { map_group(q, box); });
    }
    ChannelSums& channel_sums() { return sums_; }

    // Where no sums are wanted: what map needs of channels from c0 to c1.
    void without_sums(int64_t c0, int64_t c1) {
        prepare(c0, c1);
        sums_.clear(c0, c1);
        finish(c0, c1, 0);
    }

private:
    // sum g and sum g (x - mean) of some groups and channels.
    struct Sums {
        Column<double> g, g_xc;
    };
    Sums sums_of(const Numbers& k, const Cells& cells) const {
        Sums s{sums_.first(cells), sums_.second(cells)};
        about_mean(k, cells, s);
        return s;
    }
    // What was taken about a shift, and of the kept tensor, is then about the mean and of x.
    void about_mean(const Numbers& k, const Cells& cells, Sums& s) const {
        for_entries(cells.n, [&](int64_t i) {
            const double about = coeffs::gradient_shift(k.center[i], k.u_inv_std[i], is_double_);
            s.g_xc[i] = coeffs::about_mean(s.g[i], s.g_xc[i], k.center[i], about);
        });
        if (w_.s.keep == Keep::y) {
            for_entries(cells.n, [&](int64_t i) { s.g_xc[i] *= k.inv_std[i] == 0 ? 0 : k.u_inv_std[i] / k.inv_std[i]; });
        }
        for (int64_t i = 0; i < cells.n; ++i) {
            if (!w_.single(part_, cells.channel_of(i))) continue;
            s.g_xc[i] = 0;
            if (w_.s.values[part_ * w_.channels() + cells.channel_of(i)] == 0) s.g[i] = 0;
        }
    }
    // `all`: sums of channels from c on, of all groups, each times its gamma r (`summed`); of one alone, without.
    void put(const Cells& cells, const Numbers& k, const Sums& all, int64_t c, bool summed) {
        const double* const count = w_.s.count + part_ * w_.channels();
        const double scale = w_.counting.scale();
        const Column<double> n_of = cells.of(count), g = cells.of(all.g, c), g_xc = cells.of(all.g_xc, c);
        gradient_.put(cells, {cells.n, [&](int64_t i) {
                                  const double slope = k.gamma_r[i] * k.inv_std[i];
                                  const coeffs::Slopes slopes{slope, summed ? k.inv_std[i] : slope, k.inv_std[i], k.center[i],
                                                              k.u_inv_std[i]};
                                  return coeffs::gradient<C>(slopes, g[i], g_xc[i], n_of[i] * scale);
                              }});
    }
    void take_rows(const Cells& cells, Sums& s, const ExactSums& to, int64_t row) {
        const Numbers k(w_, part_, cells);
        about_mean(k, cells, s);
        if (w_.dgamma != nullptr) {
            put_parameters(cells, k, s);
            const int64_t at = w_.group(part_, cells.group) * w_.channels() + cells.channel;
            to.add(row + 2, cells.channel, cells.n, w_.dbeta + at);
            to.add(row + 3, cells.channel, cells.n, w_.dgamma + at);
        }
        for_entries(cells.n, [&](int64_t i) {
            s.g[i] *= k.gamma_r[i];
            s.g_xc[i] *= k.gamma_r[i];
        });
        to.add(row, cells.channel, cells.n, s.g.value);
        to.add(row + 1, cells.channel, cells.n, s.g_xc.value);
    }
    void finish_column(int64_t c, int64_t n) {
        Sums all;
        for_entries(n, [&](int64_t i) { all.g[i] = all.g_xc[i] = 0; });
        for_cells(groups_, down_, c, n, [&](const Cells& cells) {
            const Numbers k(w_, part_, cells);
            const Sums s = sums_of(k, cells);
            put_parameters(cells, k, s);
            if (groups_ == 1) return put(cells, k, s, c, false);
            for_entries(cells.n, [&](int64_t i) {
                all.g[cells.channel_of(i) - c] += k.gamma_r[i] * s.g[i];
                all.g_xc[cells.channel_of(i) - c] += k.gamma_r[i] * s.g_xc[i];
            });
        });
        if (groups_ > 1) for_cells(groups_, down_, c, n, [&](const Cells& cells) { put(cells, Numbers(w_, part_, cells), all, c, true); });
        drop_single_values(c, n);
    }
    void drop_single_values(int64_t c, int64_t n) {
        const double* const values = w_.s.values + part_ * w_.channels() + c;
        if (!w_.s.batch || std::none_of(values, values + n, [](double v) { return v < 2; })) return;
        for (int64_t q = 0; q < groups_; ++q) gradient_[q].drop(c, n, [&](int64_t i) { return w_.single(part_, c + i); });
    }
    void put_parameters(const Cells& cells, const Numbers& k, const Sums& s) {
        if (w_.dgamma == nullptr) return;
        Column<double> dgamma;
        for_entries(cells.n, [&](int64_t i) { dgamma[i] = s.g_xc[i] * k.inv_std[i]; });
        if (w_.s.r != nullptr) for_entries(cells.n, [&](int64_t i) { dgamma[i] = k.r[i] * dgamma[i] + k.d[i] * s.g[i]; });
        for (int64_t i = 0; i < cells.n; ++i) {
            if (!w_.single(part_, cells.channel_of(i))) continue;
            const bool none = w_.s.r == nullptr || w_.s.values[part_ * w_.channels() + cells.channel_of(i)] == 0;  // then d is NaN
            dgamma[i] = none ? 0 : k.d[i] * s.g[i];
        }
        const int64_t first = w_.group(part_, 0) * w_.channels();
        cells.put(dgamma, w_.dgamma + first, w_.channels());
        cells.put(s.g, w_.dbeta + first, w_.channels());
    }
    void map_group(int64_t q, const Where& where) {
        const int64_t c = where.box.channel_begin;
        const Tensor& dx = w_.b.dx ? w_.b.dx : dz_;
        const kernels::Operand left = to_operand(left_, begin_);
        const bool weighted = w_.b.dx && w_.s.batch;
        kernels::GradApplyArgs args{where,
                                    left_ ? left : to_operand(w_.b.dy, begin_),
                                    to_operand(w_.b.kept, begin_),
                                    to_operand(dx, begin_),
                                    {},
                                    affine_[q].from(c),
                                    gradient_[q].k_dy(c),
                                    gradient_[q].x_scale(c),
                                    gradient_[q].k_x(c),
                                    gradient_[q].k_0(c),
                                    left_ ? kernels::open : act_.gate,
                                    bits_,
                                    !w_.s.batch,
                                    stream_,
                                    act_.curve,
                                    to_operand(w_.b.residual, begin_),
                                    w_.counting.kept(part_),
                                    weighted ? w_.counting.weights<C>(w_.weights, part_) : kernels::Weights{}};
        if (dz_alone_) {
            kernels::GradApplyArgs alone = args;
            alone.dx = to_operand(dz_, begin_);
            alone.k_dy = ones_.from(c);
            alone.fixed = true;
            alone.weights = {};
            map_kernel_(alone);
            if (!w_.b.dx) return;
        } else {
            args.dz = to_operand(dz_, begin_);
        }
        map_kernel_(args);
    }

    const Work& w_;
    int64_t part_, begin_, row_split_, groups_;
    bool down_;
    Act act_;
    kernels::Mask bits_;
    Tensor left_;
    bool stream_;
    Groups<Row<double>> shift_;
    Groups<AffineRows<C>> affine_;
    Groups<GradientRows<C>> gradient_;
    Row<C> ones_;
    ChannelSums sums_;
    kernels::GradSumsFn sums_kernel_;
    kernels::GradApplyFn map_kernel_;
    Tensor dz_{};
    bool dz_alone_ = false, is_double_ = false;
};

// Everything but dgamma and dbeta in the caller's form.
template <class C>
void run(const Work& w) {
    const Backward& b = w.b;
    const Traffic traffic{.reads = b.residual ? 3 : 2, .writes = (b.dx ? 1 : 0) + (b.dresidual ? 1 : 0), .sums = w.sums(), .numbers = 7};
    const PartPlans plans(w.call.geometry, w.call.parts, traffic, w.call.group_outer);
    const auto make = [&](Workspace& ws, const Plan& plan, int64_t part, int64_t c0, int64_t c1) {
        return Gradients<C>(ws, plan, w, part, c0, c1);
    };
    if (w.sums()) return for_parts(plans, w.call.parts.count, make);
    for (int64_t part = 0; part < w.call.parts.count && traffic.writes > 0; ++part) {
        const Plan& plan = plans.of(part);
        Workspace ws;
        Gradients<C> pass = make(ws, plan, part, 0, plan.channels);
        for_channels(plan, [&](int64_t c0, int64_t c1) { pass.without_sums(c0, c1); });
        map_part(plan, pass);
    }
}

// What ranks of a group need of each other: sums for dx, which a tensor without elements may ask for too, and for dgamma and dbeta.
bool exchanges_dx(const Backward& b) {
    const bool batch = b.saved == nullptr || b.saved->empty() || b.saved->get()->batch;
    return (b.dx || b.dx.channels != 0) && batch;
}
bool exchanges_parameters(const Backward& b) { return b.all_reduce && (b.dgamma || b.dbeta); }
bool exchanges(const Backward& b) { return exchanges_dx(b) || exchanges_parameters(b); }

// The same of a batch of which this rank of a group holds some samples. Only dgamma and dbeta per sample are in place then.
template <class C>
void run_together(const Work& w, Exchange& exchange, Exchange::Kind kind, const Rows& dgamma, const Rows& dbeta) {
    const Backward& b = w.b;
    const int64_t channels = w.channels();
    const bool some = w.call.geometry.count() != 0, parameters = dgamma || dbeta;
    const bool all_dx = exchanges_dx(b), reduces = exchanges_parameters(b);
    Geometry g = w.call.geometry;
    if (!some) g.outer = g.inner = 1;  // for the sizes of rows
    const Traffic traffic{.reads = b.residual ? 3 : 2, .writes = (b.dx ? 1 : 0) + (b.dresidual ? 1 : 0), .sums = w.sums(), .numbers = 7};
    const PartPlans plans(g, {g.outer, g.outer, 1}, traffic, some ? w.call.sample_outer : 0);
    const Plan& plan = plans.of(0);
    Workspace ws;
    Gradients<C, true> pass(ws, plan, w, 0, 0, channels);
    for_channels(plan, [&](int64_t c0, int64_t c1) { pass.prepare(c0, c1); });
    const bool own_rows = w.rows() && parameters;  // of parameters per sample, sums for those that are not
    const ExactSums mine(ws, own_rows ? 4 : 2, channels), all(ws, mine.rows(), channels);
    if (some && w.sums()) sample_sums(plan, pass, 0, mine);
    if (all_dx || reduces) {
        const int64_t sent = reduces ? mine.rows() : 2;
        const double option = (all_dx ? 1 : 0) + (reduces ? 2 : 0);
        const auto parts = exchange.gather({kind, g.dtype, channels, option}, 1, false, mine.data().first(index(sent * 3 * channels)));
        for (int64_t row = 0; row < sent; ++row) {
            for (const Exchange::Part& part : parts) all.merge(row, part.sums() + row * 3 * channels);
        }
    }
    const ExactSums& of_parameters = reduces ? all : mine;
    by_columns(0, channels, [&](int64_t c, int64_t n) {
        if (parameters && !w.rows()) pass.put_parameters(c, n, of_parameters.totals(0, c, n), of_parameters.totals(1, c, n));
        if (own_rows && dbeta.rows == 0) of_parameters.totals(2, c, n).put(dbeta.values, c, n);
        if (own_rows && dgamma.rows == 0) of_parameters.totals(3, c, n).put(dgamma.values, c, n);
    });
    if (!some || traffic.writes == 0) return;
    for_columns(plan, [&](int64_t c, int64_t n) { pass.finish_together(c, n, all.totals(0, c, n), all.totals(1, c, n)); });
    if (pass.maps()) map_part(plan, pass, plan.map_backwards);
}

void backward(const Backward& b, const Saved::Impl& s, const kernels::KernelTable& table, std::span<const bool> lost,
              Exchange* exchange = nullptr, Exchange::Kind kind = Exchange::gradients) {
    const Call call = s.call(b.kept);
    if (call.geometry.count() == 0 && exchange == nullptr) {
        for (const Rows* v : {&b.dgamma, &b.dbeta}) {
            for (int64_t r = 0; *v && r < std::max<int64_t>(v->rows, 1); ++r) {
                for (int64_t c = 0; c < call.geometry.channels; ++c) set(row_of(*v, r), c, 0);
            }
        }
        return;
    }
    Workspace ws;
    const Counting counting(ws, call.geometry, call.parts, s.mask, s.batch ? s.weights : std::span<const double>(), s.element_bits,
                            s.scale);
    const bool parameters = b.dgamma || b.dbeta;
    const int64_t groups = (call.parts.count - 1) * call.groups(0) + call.groups(call.parts.count - 1);
    const int64_t n = parameters ? groups * call.geometry.channels : 0;
    Work w{b, s, call, table, counting, {}, lost, parameters ? ws.take<double>(n) : nullptr, parameters ? ws.take<double>(n) : nullptr};
    with_compute(call.geometry.dtype, [&]<class C>() {
        w.weights = counting.all_weights<C>(ws);
        exchange == nullptr ? run<C>(w) : run_together<C>(w, *exchange, kind, b.dgamma, b.dbeta);
    });
    if (counting.weighted()) {
        const auto weightless = [&](int64_t p, int64_t c) { return s.values[p * call.geometry.channels + c] == 0; };
        clear_where(call.geometry, call.parts, b.dx, weightless);
        clear_where(call.geometry, call.parts, b.dresidual, weightless);
    }
    const bool done = exchange != nullptr && w.rows();  // those with one row
    if (!done || b.dgamma.rows != 0) put_rows(w.dgamma, groups, w.channels(), b.dgamma);
    if (!done || b.dbeta.rows != 0) put_rows(w.dbeta, groups, w.channels(), b.dbeta);
}

// What was saved, of the channels whose x was kept alone.
class LostChannels {
public:
    LostChannels(Workspace& ws, const Saved::Impl& s, const Call& call)
        : impl(std::pmr::null_memory_resource()), s_(s), n_(static_cast<int64_t>(s.lost.size())) {
        impl.full = true;
        impl.geometry = call.geometry;
        impl.geometry.channels = n_;
        impl.parts = call.parts;
        impl.group_outer = call.group_outer;
        impl.sample_outer = call.sample_outer;
        impl.scale = s.scale;
        impl.batch = s.batch;
        impl.slope = s.slope;
        impl.activation = s.activation;
        impl.mask = s.mask;
        impl.weights = s.weights;
        const int64_t parts = s.parts.count;
        for (double* Saved::Impl::* v :
             {&Saved::Impl::mean, &Saved::Impl::inv_std, &Saved::Impl::count, &Saved::Impl::values, &Saved::Impl::r, &Saved::Impl::d}) {
            impl.*v = s.*v == nullptr ? nullptr : chosen(ws, s.*v, parts);
        }
        for (SavedRows Saved::Impl::* v : {&Saved::Impl::gamma, &Saved::Impl::beta}) {
            if (s.*v) impl.*v = {chosen(ws, (s.*v).data, std::max<int64_t>((s.*v).rows, 1)), (s.*v).rows};
        }
        if (s.element_bits != nullptr) choose_bits(ws);
    }
    Saved::Impl impl;

private:
    double* chosen(Workspace& ws, const double* from, int64_t rows) const {
        double* const to = ws.take<double>(rows * n_);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t k = 0; k < n_; ++k) to[r * n_ + k] = from[r * s_.geometry.channels + s_.lost[index(k)]];
        }
        return to;
    }
    void choose_bits(Workspace& ws) {
        Geometry all = impl.geometry;
        all.channels = s_.geometry.channels;
        const BitLayout from(all, impl.parts), to(impl.geometry, impl.parts);
        impl.element_bits = ws.take<std::uint8_t>(to.bytes());
        std::memset(impl.element_bits, 0, index(to.bytes()));
        const bool runs = all.direction == kernels::ncs;
        for (int64_t p = 0; p < impl.parts.count; ++p) {
            const std::uint8_t* const source = from.mask(s_.element_bits, p).bits;
            std::uint8_t* const target = to.mask(impl.element_bits, p).bits;
            for (int64_t o = 0; o < impl.parts.size(p) * (runs ? 1 : all.inner); ++o) {
                for (int64_t k = 0; k < n_; ++k) {
                    for (int64_t i = 0; i < (runs ? all.inner : 1); ++i) {
                        const int64_t bit = o * from.outer_stride() + s_.lost[index(k)] * from.channel_stride() + i;
                        const int64_t put = o * to.outer_stride() + k * to.channel_stride() + i;
                        if ((source[bit >> 3] >> (bit & 7) & 1) != 0) target[put >> 3] |= static_cast<std::uint8_t>(1 << (put & 7));
                    }
                }
            }
        }
    }

    const Saved::Impl& s_;
    int64_t n_;
};

// y kept: the plain driver on y, and once more on the x of the channels that y does not tell, which comes first as dx may take dy's place.
void backward_from_y(const Backward& b, const Saved::Impl& s, const kernels::KernelTable& table, Exchange* exchange) {
    Workspace ws;
    const auto n = static_cast<int64_t>(s.lost.size());
    const Geometry g = s.call(b.kept).geometry;
    const LostChannels lost(ws, s, s.call(b.kept));
    const int64_t bytes = n * g.count() * element_size(g.dtype);
    const Tensor dy = compact<Tensor>(g, n, ws.take<std::byte>(bytes));
    copy_channels(b.dy, s.lost, dy);
    Backward of_x = b;
    of_x.dy = ConstTensor(dy);
    of_x.kept = s.lost_tensor(g);
    if (b.dx) of_x.dx = compact<Tensor>(g, n, ws.take<std::byte>(bytes));
    const auto parameter = [&](const Rows& v) -> Rows {
        if (!v) return {};
        const int64_t rows = std::max<int64_t>(v.rows, 1);
        return {Channels(ws.take<double>(rows * n), true, n, 1), v.rows, n};
    };
    of_x.dgamma = parameter(b.dgamma);
    of_x.dbeta = parameter(b.dbeta);
    if (exchange != nullptr && exchanges(b)) exchange->expect();  // two in all
    backward(of_x, lost.impl, table, {}, exchange, Exchange::gradients_of_lost);

    bool* const is_lost = ws.take<bool>(s.geometry.channels);
    std::fill_n(is_lost, s.geometry.channels, false);
    for (const int64_t c : s.lost) is_lost[c] = true;
    backward(b, s, table, {is_lost, index(s.geometry.channels)}, exchange);
    if (b.dx) copy_channels(ConstTensor(of_x.dx), s.lost, b.dx, true);
    for (const auto& [from, to] : {std::pair{&of_x.dgamma, &b.dgamma}, {&of_x.dbeta, &b.dbeta}}) {
        for (int64_t r = 0; *to && r < std::max<int64_t>(to->rows, 1); ++r) {
            for (int64_t k = 0; k < n; ++k) set(row_of(*to, r), s.lost[index(k)], at(row_of(*from, r), k));
        }
    }
}

}  // namespace

inline namespace v0_2 {

void batch_norm_backward(const Backward& b) {
    const FloatMode mode;
    const parallel::Limit limit(b.execution.num_threads);
    together(b.execution.group, b.execution.group != nullptr && exchanges(b), [&](Exchange* exchange) {
        const Saved::Impl& s = check::backward(b);
        const kernels::KernelTable& table = check::active_level();
        s.lost.empty() ? backward(b, s, table, {}, exchange) : backward_from_y(b, s, table, exchange);
    });
}

}  // namespace v0_2

}  // namespace batchnorm
