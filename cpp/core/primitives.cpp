// The drivers of channel_sums and combine: the kernels of backward by themselves, with the caller's numbers per channel.
#include "batchnorm/batchnorm.hpp"
#include "coefficient_rows.h"
#include "gate.h"
#include "reduce.h"

namespace batchnorm {
namespace {

using kernels::KernelTable;

template <class C>
void combine_as(const CombineArgs& a, const Geometry& g, const KernelTable& table) {
    const Plan plan = make_plan(g, {.reads = a.k_b || a.k_0 || a.activation != Activation::none ? 2 : 1, .writes = 1, .sums = false});
    Workspace ws;
    AffineRows<C> affine(ws, plan);
    GradientRows<C> combination(ws, plan);
    for_columns(plan, [&](int64_t c, int64_t n) {
        const Column<double> about(a.center, c, n, 0), k_a(a.k_a, c, n, 1), k_b(a.k_b, c, n, 0), k_0(a.k_0, c, n, 0);
        combination.put(c, n, [&](int64_t i) { return coeffs::combination<C>(k_a[i], about[i], k_b[i], k_0[i]); });
        affine.put(c, n, about, {a.inv_std, c, n, 1}, {a.gamma, c, n, 1}, {a.beta, c, n, 0});
    });
    const kernels::GradApplyFn kernel = table.grad_apply[plan.direction][to_kernel(g.dtype)];
    const bool a_alone = !a.k_b && !a.k_0;
    const Act act = act_of(a.activation, a.slope, g.dtype);
    for_each(plan.map_items(), plan, [&](int64_t i) {
        const Where where = plan.map_item(i);
        const int64_t c = where.box.channel_begin;
        kernel({where,
                to_operand(a.a),
                to_operand(a.b),
                to_operand(a.out),
                {},
                affine.from(c),
                combination.k_dy(c),
                combination.x_scale(c),
                combination.k_x(c),
                combination.k_0(c),
                act.gate,
                {},
                a_alone,
                plan.stream,
                act.curve});
    });
}

}  // namespace

void channel_sums(const ChannelSumsArgs& a) {
    const Geometry g = check::arguments(a);
    const parallel::Limit limit(a.num_threads);
    const KernelTable& table = check::active_level();
    if (g.count() == 0) {
        std::fill(a.sum_a.begin(), a.sum_a.end(), 0.0);
        std::fill(a.sum_ab.begin(), a.sum_ab.end(), 0.0);
        return;
    }
    const Plan plan = make_plan(g, {.reads = 2, .writes = 0, .sums = true});
    Workspace ws;
    ChannelSums sums(ws, g.channels);
    Row<double> shift(ws, plan);
    shift.fill(0);
    if (a.shift) by_columns(0, g.channels, [&](int64_t c, int64_t n) { shift.put(c, n, {a.shift, c, n}); });
    const bool shifted = a.shift || g.dtype == Dtype::float64;
    const kernels::GradSumsFn kernel = table.grad_sums[plan.direction][to_kernel(g.dtype)];
    const auto sum_tile = [&](const Where& where, bool, double* sum_a, double* sum_ab) {
        const double* const about = shifted ? shift.from(where.box.channel_begin) : nullptr;
        kernel({where, to_operand(a.a), to_operand(a.b), about, {}, sum_a, sum_ab, kernels::open, {}});
    };
    using NoMap = void (*)(const Where&);
    sums_then_map(
        plan, NothingToPrepare(), sum_tile, sums, [](int64_t, int64_t, bool) { return true; }, static_cast<const NoMap*>(nullptr));
    by_columns(0, g.channels, [&](int64_t c, int64_t n) {
        sums.first(c, n).put(&a.sum_a[static_cast<std::size_t>(c)], n);
        sums.second(c, n).put(&a.sum_ab[static_cast<std::size_t>(c)], n);
    });
}

void combine(const CombineArgs& a) {
    const Geometry g = check::arguments(a);
    const parallel::Limit limit(a.num_threads);
    const KernelTable& table = check::active_level();
    if (g.count() == 0) return;
    g.dtype == Dtype::float64 ? combine_as<double>(a, g, table) : combine_as<float>(a, g, table);
}

}  // namespace batchnorm
