// The per-channel numbers of the elementwise kernels, as rows: columns of statistics go in, the formulas of coeffs.h are applied, and
// kernels are given what starts at their box's first channel. Used by the drivers.
#pragma once

#include "coeffs.h"
#include "columns.h"

namespace batchnorm {

inline Column<double> inv_std_of(const Column<double>& var, int64_t n, double eps) {
    Column<double> inv_std;
    for_entries(n, [&](int64_t i) { inv_std[i] = coeffs::inv_std(var[i], eps); });
    return inv_std;
}

// Of y = (x - center) * scale + offset.
template <class C>
class AffineRows {
public:
    AffineRows(Workspace& ws, const Plan& plan) : center_(ws, plan), scale_(ws, plan), offset_(ws, plan) {}
    // Those of n channels from c on.
    void put(int64_t c, int64_t n, const Column<double>& mean, const Column<double>& inv_std, const Column<double>& gamma,
             const Column<double>& beta) {
        Column<C> center, scale, offset;
        for_entries(n, [&](int64_t i) {
            const coeffs::Affine<C> k = coeffs::affine<C>(mean[i], inv_std[i], gamma[i], beta[i]);
            center[i] = k.center;
            scale[i] = k.scale;
            offset[i] = k.offset;
        });
        center_.put(c, n, center);
        scale_.put(c, n, scale);
        offset_.put(c, n, offset);
    }
    kernels::Affine from(int64_t c) const { return {center_.from(c), scale_.from(c), offset_.from(c)}; }

private:
    Row<C> center_, scale_, offset_;
};

// Of dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0; center is the forward's.
template <class C>
class GradientRows {
public:
    GradientRows(Workspace& ws, const Plan& plan) : k_dy_(ws, plan), x_scale_(ws, plan), k_x_(ws, plan), k_0_(ws, plan) {}
    // Those of n channels from c on; of(i) is number i's coeffs::Gradient<C>.
    template <class Of>
    void put(int64_t c, int64_t n, const Of& of) {
        Column<C> k_dy, x_scale, k_x, k_0;
        for_entries(n, [&](int64_t i) {
            const coeffs::Gradient<C> k = of(i);
            k_dy[i] = k.k_dy;
            x_scale[i] = k.x_scale;
            k_x[i] = k.k_x;
            k_0[i] = k.k_0;
        });
        k_dy_.put(c, n, k_dy);
        x_scale_.put(c, n, x_scale);
        k_x_.put(c, n, k_x);
        k_0_.put(c, n, k_0);
    }
    const C* k_dy(int64_t c) const { return k_dy_.from(c); }
    const C* x_scale(int64_t c) const { return x_scale_.from(c); }
    const C* k_x(int64_t c) const { return k_x_.from(c); }
    const C* k_0(int64_t c) const { return k_0_.from(c); }

private:
    Row<C> k_dy_, x_scale_, k_x_, k_0_;
};

}  // namespace batchnorm
