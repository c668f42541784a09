// The drivers of channel_sums and combine: the kernels of backward by themselves, with the caller's numbers per channel.
#include "batchnorm/batchnorm.hpp"
#include "gate.h"
#include "reduce.h"

namespace batchnorm {
namespace {

using kernels::KernelTable;

template <class C>
void combine_as(const CombineArgs& a, const Geometry& g, const KernelTable& table) {
    const Plan plan = make_plan(g, a.k_b || a.k_0 || a.activation != Activation::none ? 2 : 1, 1);
    Workspace ws;
    Row<C> center(ws, plan), scale(ws, plan), offset(ws, plan), k_a(ws, plan), x_scale(ws, plan), k_b(ws, plan), k_0(ws, plan);
    for_channels(plan, [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) {
            const double about = value_or(a.center, c, 0);
            const coeffs::Gradient<C> k =
                coeffs::combination<C>(value_or(a.k_a, c, 1), about, value_or(a.k_b, c, 0), value_or(a.k_0, c, 0));
            const coeffs::Affine<C> forward =
                coeffs::affine<C>(about, value_or(a.inv_std, c, 1), value_or(a.gamma, c, 1), value_or(a.beta, c, 0));
            center.set(c, forward.center);
            scale.set(c, forward.scale);
            offset.set(c, forward.offset);
            k_a.set(c, k.k_dy);
            x_scale.set(c, k.x_scale);
            k_b.set(c, k.k_x);
            k_0.set(c, k.k_0);
        }
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
                {center.from(c), scale.from(c), offset.from(c)},
                k_a.from(c),
                x_scale.from(c),
                k_b.from(c),
                k_0.from(c),
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
    const Plan plan = make_plan(g, 2, 0);
    Workspace ws;
    ChannelSums sums(ws, g.channels);
    Row<double> shift(ws, plan);
    shift.fill(0);
    for (int64_t c = 0; a.shift && c < g.channels; ++c) shift.set(c, at(a.shift, c));
    const bool shifted = a.shift || g.dtype == Dtype::float64;
    const kernels::GradSumsFn kernel = table.grad_sums[plan.direction][to_kernel(g.dtype)];
    const auto sum_tile = [&](const Where& where, bool, double* sum_a, double* sum_ab) {
        const double* const about = shifted ? shift.from(where.box.channel_begin) : nullptr;
        kernel({where, to_operand(a.a), to_operand(a.b), about, {}, sum_a, sum_ab, kernels::open, {}});
    };
    using NoMap = void (*)(const Where&);
    sums_then_map(
        plan, NothingToPrepare(), sum_tile, sums, [](int64_t, int64_t, bool) { return true; }, static_cast<const NoMap*>(nullptr));
    for (int64_t c = 0; c < g.channels; ++c) {
        a.sum_a[static_cast<std::size_t>(c)] = sums.first(c);
        a.sum_ab[static_cast<std::size_t>(c)] = sums.second(c);
    }
}

void combine(const CombineArgs& a) {
    const Geometry g = check::arguments(a);
    const parallel::Limit limit(a.num_threads);
    const KernelTable& table = check::active_level();
    if (g.count() == 0) return;
    g.dtype == Dtype::float64 ? combine_as<double>(a, g, table) : combine_as<float>(a, g, table);
}

}  // namespace batchnorm
