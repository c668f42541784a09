// The per-channel numbers of the elementwise kernels, as rows: columns of statistics go in, the formulas of coeffs.h are applied, and
// kernels are given what starts at their box's first channel. Used by the drivers.
#pragma once

#include <new>
#include <type_traits>

#include "coeffs.h"
#include "columns.h"

namespace batchnorm {

inline Column<double> inv_std_of(const Column<double>& var, int64_t n, double eps) {
    Column<double> inv_std;
    for_entries(n, [&](int64_t i) { inv_std[i] = coeffs::inv_std(var[i], eps); });
    return inv_std;
}

// Elements of an output from row `begin` of outer on that come before its first block on a cache line.
__attribute__((always_inline)) inline int64_t lead_of(const ConstTensor& out, int64_t begin) {
    if (!out) return 0;
    const auto size = static_cast<std::uintptr_t>(element_size(out.dtype)), line = std::min<std::uintptr_t>(64, kernels::kLanes * size);
    const auto at = reinterpret_cast<std::uintptr_t>(to_operand(out, begin).data);
    return static_cast<int64_t>((line - at % line) % line / size);
}

// Of y = (x - center) * scale + offset.
template <class C>
class AffineRows {
public:
    AffineRows(Workspace& ws, const Plan& plan, int64_t c0, int64_t c1, int64_t lead)
        : center_(ws, plan, c0, c1, lead), scale_(ws, plan, c0, c1, lead), offset_(ws, plan, c0, c1, lead) {}
    struct Columns {
        Column<C> center, scale, offset;
        // Not inlined: g++ 12 then no longer vectorises it.
        __attribute__((noinline)) Columns(int64_t n, const Column<double>& mean, const Column<double>& inv_std, const Column<double>& gamma,
                                          const Column<double>& beta) {
            for_entries(n, [&](int64_t i) {
                const coeffs::Affine<C> k = coeffs::affine<C>(mean[i], inv_std[i], gamma[i], beta[i]);
                center[i] = k.center;
                scale[i] = k.scale;
                offset[i] = k.offset;
            });
        }
    };
    // Those of n channels from c on.
    void put(int64_t c, int64_t n, const Columns& k) {
        center_.put(c, n, k.center);
        scale_.put(c, n, k.scale);
        offset_.put(c, n, k.offset);
    }
    // That of channel c, entry i of columns.
    void set(int64_t c, const Columns& k, int64_t i) {
        center_.set(c, k.center, i);
        scale_.set(c, k.scale, i);
        offset_.set(c, k.offset, i);
    }
    kernels::Affine from(int64_t c) const { return {center_.from(c), scale_.from(c), offset_.from(c)}; }

private:
    Row<C> center_, scale_, offset_;
};

// Numbers of each channel in each of some groups, as gradients of a parameter: a row each, or added up in index order if it has one row.
inline void put_rows(const double* groups, int64_t n_groups, int64_t channels, const Rows& to) {
    if (!to) return;
    by_columns(0, channels, [&](int64_t c, int64_t n) {
        Column<double> total(groups + c, n);
        for (int64_t g = 0; g < n_groups; ++g) {
            const Column<double> row(groups + g * channels + c, n);
            if (to.rows != 0) {
                row.put(row_of(to, g), c, n);
            } else if (g > 0) {
                for_entries(n, [&](int64_t i) { total[i] += row[i]; });
            }
        }
        if (to.rows == 0) total.put(to.values, c, n);
    });
}

// Of dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0; center is the forward's.
template <class C>
class GradientRows {
public:
    GradientRows(Workspace& ws, const Plan& plan, int64_t c0, int64_t c1, int64_t lead)
        : k_dy_(ws, plan, c0, c1, lead), x_scale_(ws, plan, c0, c1, lead), k_x_(ws, plan, c0, c1, lead), k_0_(ws, plan, c0, c1, lead) {}
    struct Columns {
        Column<C> k_dy, x_scale, k_x, k_0;
        // of(i) is number i's coeffs::Gradient<C>.
        template <class Of>
        Columns(int64_t n, const Of& of) {
            for_entries(n, [&](int64_t i) {
                const coeffs::Gradient<C> k = of(i);
                k_dy[i] = k.k_dy;
                x_scale[i] = k.x_scale;
                k_x[i] = k.k_x;
                k_0[i] = k.k_0;
            });
        }
    };
    void put(int64_t c, int64_t n, const Columns& k) {
        k_dy_.put(c, n, k.k_dy);
        x_scale_.put(c, n, k.x_scale);
        k_x_.put(c, n, k.k_x);
        k_0_.put(c, n, k.k_0);
    }
    void set(int64_t c, const Columns& k, int64_t i) {
        k_dy_.set(c, k.k_dy, i);
        x_scale_.set(c, k.x_scale, i);
        k_x_.set(c, k.k_x, i);
        k_0_.set(c, k.k_0, i);
    }
    // All numbers of the channels for which which(i) become 0.
    template <class Which>
    void drop(int64_t c, int64_t n, const Which& which) {
        for (Row<C>* row : {&k_dy_, &k_x_, &k_0_}) {
            Column<C> k = row->column(c, n);
            for (int64_t i = 0; i < n; ++i) {
                if (which(i)) k[i] = 0;
            }
            row->put(c, n, k);
        }
    }
    const C* k_dy(int64_t c) const { return k_dy_.from(c); }
    const C* x_scale(int64_t c) const { return x_scale_.from(c); }
    const C* k_x(int64_t c) const { return k_x_.from(c); }
    const C* k_0(int64_t c) const { return k_0_.from(c); }

private:
    Row<C> k_dy_, x_scale_, k_x_, k_0_;
};

// Rows for each of n groups.
template <class Rows>
class Groups {
public:
    Groups(Workspace& ws, int64_t n, const Plan& plan, int64_t c0, int64_t c1, int64_t lead = 0) : rows_(ws.take<Rows>(n)) {
        static_assert(std::is_trivially_destructible_v<Rows>);
        for (int64_t q = 0; q < n; ++q) new (rows_ + q) Rows(ws, plan, c0, c1, lead);
    }
    Rows& operator[](int64_t q) const { return rows_[q]; }
    void put(const Cells& k, const typename Rows::Columns& columns) const {
        if (!k.down) return rows_[k.group].put(k.channel, k.n, columns);
        for (int64_t i = 0; i < k.n; ++i) rows_[k.group + i].set(k.channel, columns, i);
    }

private:
    Rows* rows_;
};

}  // namespace batchnorm
