#include "image.h"

#include "coefficient_rows.h"
#include "kernels/dispatch.h"
#include "reduce.h"

namespace batchnorm {
namespace {

// What an activation or a residual adds, on y in place.
void finish(const Forward& f) {
    const std::vector<double> zeros(index(f.x.channels), 0.0), ones(index(f.x.channels), 1.0);
    Forward rest;
    rest.x = ConstTensor(f.y);
    rest.y = f.y;
    rest.residual = f.residual;
    rest.mean = zeros;
    rest.var = ones;
    rest.eps = 0;
    rest.activation = f.activation;
    rest.slope = f.slope;
    rest.positions = f.positions;
    rest.execution = f.execution;
    batch_norm(rest);
}

// y becomes 0 where nothing counts.
void clear_excluded(const Forward& f, const Call& call) {
    const Geometry& g = call.geometry;
    const PerPosition mask(f.positions.mask, g.count());
    const PerElement elements(f.positions.element_mask);
    const std::size_t size = index(element_size(f.y.dtype));
    for (int64_t o = 0; o < g.outer; ++o) {
        for (int64_t i = 0; i < g.inner; ++i) {
            const bool counts = f.positions.mask.empty() || mask[o * g.inner + i] != 0;
            for (int64_t c = 0; c < g.channels; ++c) {
                if (counts && (!f.positions.element_mask || elements.at(o, c, i) != 0)) continue;
                std::memset(static_cast<std::byte*>(f.y.data) +
                                (o * f.y.outer_stride + c * f.y.channel_stride + i * f.y.inner_stride) * static_cast<int64_t>(size),
                            0, size);
            }
        }
    }
}

}  // namespace

void integer_batch_norm(const Forward& f, const Call& call) {
    const kernels::KernelTable& table = check::active_level();
    if (call.geometry.count() == 0) return;
    // y is what takes memory and time.
    Geometry result = call.geometry;
    result.dtype = f.y.dtype;
    const Plan plan = make_plan(result, {.reads = 0, .writes = 1, .sums = false});
    Workspace ws;
    const Groups<AffineRows<double>> affine(ws, call.groups(0), plan, 0, plan.channels, lead_of(f.y, 0));
    for_columns(plan, [&](int64_t c, int64_t n) {
        const Column<double> mean(f.mean, c, n), inv_std = inv_std_of({f.var, c, n}, n, f.eps);
        for (int64_t q = 0; q < call.groups(0); ++q) {
            affine[q].put(c, n, {n, mean, inv_std, {row_of(f.gamma, q), c, n, 1}, {row_of(f.beta, q), c, n, 0}});
        }
    });
    const kernels::ImageFn kernel = table.image[plan.direction][to_kernel(call.geometry.dtype)];
    const bool to_runs = plan.direction == kernels::nsc && f.y.channels > 1 && f.y.channel_stride != 1;
    for_each(plan.map_items(), plan.parallel, [&](int64_t i) {
        by_groups(call, 0, plan.row_split, plan.map_item(i), [&](int64_t q, const Where& where) {
            kernel({where, to_operand(f.x), to_operand(f.y), affine[q].from(where.box.channel_begin), to_kernel(f.y.dtype), to_runs,
                    plan.stream});
        });
    });
    if (f.residual || f.activation != Activation::none) return finish(f);
    if (f.positions) clear_excluded(f, call);
}

}  // namespace batchnorm
