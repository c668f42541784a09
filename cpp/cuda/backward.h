// Backward on a GPU, of one storage type, as core/backward.cpp.
#pragma once

#include "driver.h"
#include "small.h"

namespace batchnorm::cuda {

template <class C>
struct BackwardMemory {
    Counting counting;
    SumsMemory sums;
    GradientNumbers<C> numbers{};
    double *dgamma = nullptr, *dbeta = nullptr;

    void lay_out(Cutter& cut, const Shape& shape, const Tiling* tiling, bool parameters) {
        const int64_t cells = shape.cells() * shape.channels;
        counting.lay_out(cut, false);
        if (tiling != nullptr) sums.lay_out(cut, shape, *tiling);
        for (C** p : {&numbers.affine.center, &numbers.affine.scale, &numbers.affine.offset, &numbers.k_dy, &numbers.x_scale, &numbers.k_x,
                      &numbers.k_0}) {
            *p = cut.take<C>(cells);
        }
        const bool rows = parameters && shape.cells() > 1;
        dgamma = rows ? cut.take<double>(cells) : nullptr;
        dbeta = rows ? cut.take<double>(cells) : nullptr;
    }
};

template <class T>
void backward(const Backward& b, const Saved::Impl& s, const Stream& stream) {
    using C = Compute<T>;
    Launcher launch(stream, "batch_norm_backward");
    const Call call = s.call(b.kept);
    const Shape shape(call);
    const bool parameters = b.dgamma || b.dbeta, sums = parameters || (b.dx && s.batch);
    if (call.geometry.count() == 0) {
        start(launch, Zeros{PerChannel(b.dgamma), std::max<int64_t>(b.dgamma.rows, 1), shape.channels});
        start(launch, Zeros{PerChannel(b.dbeta), std::max<int64_t>(b.dbeta.rows, 1), shape.channels});
        return;
    }
    const Traffic traffic{.reads = 2, .writes = 1, .sums = true};
    const Tiling tiling(PartPlans(call.geometry, call.parts, traffic, call.group_outer), call.parts.count);
    const std::span<const double> weights = s.batch ? s.weights : std::span<const double>();
    const auto place = [&](Cutter& cut) {
        BackwardMemory<C> m{Counting(shape, s.mask, weights, s.element_bits != nullptr), {}};
        m.lay_out(cut, shape, sums ? &tiling : nullptr, parameters);
        return m;
    };
    Cutter needed(nullptr);
    place(needed);
    Cutter cut(launch.scratch(needed.used()));
    BackwardMemory<C> memory = place(cut);
    Counted counted = memory.counting.run(launch, s.element_bits);
    counted.values = s.values;
    const Kept kept{shape, s.batch, is_double<T>, s.mean,      s.inv_std,    s.count,    s.values,
                    s.r,   s.d,     s.gamma.data, s.beta.data, s.gamma.rows, s.beta.rows};
    const Act act = act_back(s.activation, s.slope, call.geometry.dtype, s.bits != nullptr, static_cast<bool>(b.residual), false);
    const bool small = is_small(shape, tiling, s.bits != nullptr), rows = parameters && shape.cells() > 1;
    const FinishGradients<C> finish{memory.sums.merge(shape, tiling),
                                    sums,
                                    kept,
                                    counted,
                                    memory.numbers,
                                    PerChannel(b.dgamma),
                                    PerChannel(b.dbeta),
                                    memory.dgamma,
                                    memory.dbeta};
    const Array<const T> dy(b.dy), x(b.kept), z(b.residual);
    const Array<T> dx(b.dx), dz(b.dresidual);
    const bool vectors =
        has_vectors(dy, shape) && has_vectors(x, shape) && has_vectors(z, shape) && has_vectors(dx, shape) && has_vectors(dz, shape);
    with_gate(act.gate, [&]<Gate gate>() {
        const GradSumsOp<T, gate> op{dy, x, z, kept, counted, s.bits, act.curve};
        const GradApplyOp<T, gate, false> apply{dy,
                                                x,
                                                z,
                                                dx,
                                                dz,
                                                shape,
                                                counted,
                                                memory.numbers,
                                                s.bits,
                                                !s.batch,
                                                s.batch && counted.weights != nullptr,
                                                counted.weights != nullptr,
                                                act.curve,
                                                vectors};
        if (small) return start(launch, SmallBackward<T, gate>{op, finish, apply, channels_of_block(shape, tiling)});
        if (sums) sum_tiles(launch, op, shape, tiling, memory.sums.tiles);
        start(launch, finish);
        if (dx || dz) pass_over_all(launch, apply);
    });
    if (!rows) return;
    start(launch, PutRows{memory.dgamma, shape.cells(), shape.channels, PerChannel(b.dgamma), b.dgamma.rows});
    start(launch, PutRows{memory.dbeta, shape.cells(), shape.channels, PerChannel(b.dbeta), b.dbeta.rows});
}

}  // namespace batchnorm::cuda
