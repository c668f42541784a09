#include "image.h"

#include "coefficient_rows.h"
#include "reduce.h"

namespace batchnorm {

void integer_moments(const Geometry& g, const ConstTensor& x, std::span<double> mean, std::span<double> var, std::int64_t ddof) {
    const Plan plan = make_plan(g, {.reads = 1, .writes = 0, .sums = true});
    const kernels::MomentsFn moments = check::active_level().moments[plan.direction][to_kernel(g.dtype)];
    Workspace ws;
    ChannelSums sums(ws, g.channels);
    const auto kernel = [&](const Where& where, bool, double* sum, double* sum_sq) {
        moments({where, to_operand(x), nullptr, sum, sum_sq});
    };
    // The caller's arrays are written at the end, so that an interrupt leaves them as they were.
    sums_then_map(
        plan, NothingToPrepare(), kernel, sums, [](int64_t, int64_t, bool) { return true; },
        static_cast<void (*const*)(const Where&)>(nullptr));
    for_channels(plan, [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; ++c) {
            const coeffs::IntegerMoments m = coeffs::from_integer_sums(sums.first_sum(c), sums.second_sum(c), g.count(), ddof);
            mean[static_cast<std::size_t>(c)] = m.mean;
            var[static_cast<std::size_t>(c)] = m.var;
        }
    });
}

void integer_batch_norm(const Geometry& g, const BatchNormArgs& a) {
    // y is what takes memory and time.
    Geometry result = g;
    result.dtype = a.y.dtype;
    const Plan plan = make_plan(result, {.reads = 0, .writes = 1, .sums = false});
    Workspace ws;
    AffineRows<double> affine(ws, plan);
    for_columns(plan, [&](int64_t c, int64_t n) {
        affine.put(c, n, {a.mean, c, n}, inv_std_of({a.var, c, n}, n, a.eps), {a.gamma, c, n, 1}, {a.beta, c, n, 0});
    });
    const kernels::ImageFn kernel = check::active_level().image[plan.direction][to_kernel(g.dtype)];
    const bool to_runs = plan.direction == kernels::nsc && a.y.channels > 1 && a.y.channel_stride != 1;
    for_each(plan.map_items(), plan, [&](int64_t i) {
        const Where where = plan.map_item(i);
        const int64_t c = where.box.channel_begin;
        kernel({where, to_operand(a.x), to_operand(a.y), affine.from(c), to_kernel(a.y.dtype), to_runs, plan.stream});
    });
}

}  // namespace batchnorm
