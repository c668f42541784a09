// Sums that do not depend on how a batch is cut: each sample's are rounded by themselves, in tiles as ever, and added up exactly. Three
// doubles a sum (D20); two additions in any order give the same total, while all terms lie within 159 bits of the largest and no sum
// overflows. What ranks of a group exchange (exchange.h). Used by the drivers.
#pragma once

#include "moment_sums.h"
#include "reduce.h"

namespace batchnorm {

// So many sums of each channel.
class ExactSums {
public:
    ExactSums(Workspace& ws, int64_t rows, int64_t channels)
        : data_(ws.take<double>(rows * 3 * channels)), rows_(rows), channels_(channels) {
        clear(0, rows, 0, channels);
    }
    // The first rows of others.
    ExactSums(const ExactSums& of, int64_t rows) : data_(of.data_), rows_(rows), channels_(of.channels_) {}
    void clear(int64_t row0, int64_t row1, int64_t c0, int64_t c1) const {
        for (int64_t i = 3 * row0; i < 3 * row1; ++i) std::fill(data_ + i * channels_ + c0, data_ + i * channels_ + c1, 0.0);
    }
    // Adds one number to each of n channels from c on, as Expansion does; but once a first part is not finite the others mean nothing.
    void add(int64_t row, int64_t c, int64_t n, const double* x) const {
        double* __restrict first = part(row, 0) + c, * __restrict second = part(row, 1) + c, * __restrict third = part(row, 2) + c;
        for (int64_t i = 0; i < n; ++i) {
            coeffs::Sum a{first[i], 0}, b{second[i], 0};
            a.add(x[i]);
            b.add(a.error);
            first[i] = a.value;
            second[i] = b.value;
            third[i] += b.error;
        }
    }
    // Adds the sums of a row that others have, as data() lays them out, times a power of two.
    void merge(int64_t row, const double* of_row, double factor = 1) const {
        by_columns(0, channels_, [&](int64_t c, int64_t n) {
            for (int64_t k = 0; k < 3; ++k) {
                Column<double> x(of_row + k * channels_ + c, n);
                if (k > 0) {
                    for (int64_t i = 0; i < n; ++i) x[i] = std::isfinite(of_row[c + i]) ? x[i] : 0;
                }
                for_entries(n, [&](int64_t i) { x[i] *= factor; });
                add(row, c, n, x.value);
            }
        });
    }
    void set(int64_t row, int64_t c, const BatchSum& s) const {
        for (int64_t k = 0; k < 3; ++k) part(row, k)[c] = s.part[k];
    }
    BatchSum get(int64_t row, int64_t c) const { return {{part(row, 0)[c], part(row, 1)[c], part(row, 2)[c]}}; }
    // Expansion::total of n channels from c on.
    Column<double> totals(int64_t row, int64_t c, int64_t n) const {
        const Column<double> first(part(row, 0) + c, n);
        Column<double> a(first), b(part(row, 1) + c, n), d(part(row, 2) + c, n);
        const auto renormalise = [&](Column<double>& high, Column<double>& low) {
            for_entries(n, [&](int64_t i) {
                coeffs::Sum s{high[i], 0};
                s.add(low[i]);
                high[i] = s.value;
                low[i] = s.error;
            });
        };
        for (int pass = 0; pass < 2; ++pass) {
            renormalise(b, d);
            renormalise(a, b);
        }
        for_entries(n, [&](int64_t i) {
            const double total = d[i] + b[i] + a[i];
            a[i] = std::isfinite(first[i]) ? total : first[i];
        });
        return a;
    }
    // All, row by row: of each the first parts of all channels, the second, the third.
    std::span<const double> data() const { return {data_, index(rows_ * 3 * channels_)}; }
    const double* row(int64_t row) const { return part(row, 0); }
    int64_t rows() const { return rows_; }

private:
    double* part(int64_t row, int64_t k) const { return data_ + (row * 3 + k) * channels_; }

    double* data_;
    int64_t rows_, channels_;
};

// The sums of all samples of a part, which the plan has as sets, added to `total`. A pass of reduce.h that also has
//     auto taker(c0, c1)   a function (sample, a, b, to, row) that adds what a sample's two sums of channels from c0 to c1 come to, to rows
//                          of `to` from `row` on
template <class Pass>
void sample_sums(const Plan& plan, Pass& pass, int round, const ExactSums& total) {
    const int64_t most = plan.parallel ? 16 : 1, rows = total.rows();
    const int64_t each = (plan.sets + most - 1) / most, stretches = (plan.sets + each - 1) / each;
    Workspace ws;
    const ExactSums of_stretch(ws, stretches * rows, plan.channels);
    for_each(stretches * plan.blocks(), plan.parallel, [&](int64_t item) {
        const int64_t stretch = item / plan.blocks(), block = item % plan.blocks();
        const Where where = plan.block_of_channels(block);
        const int64_t c0 = where.box.channel_begin, c1 = where.box.channel_end;
        Workspace own;
        ChannelSums sums(own, 1, c0, c1);
        const auto take = pass.taker(c0, c1);
        double *const a = own.take<double>(c1 - c0), *const b = own.take<double>(c1 - c0);
        for (int64_t sample = stretch * each; sample < std::min((stretch + 1) * each, plan.sets); ++sample) {
            if (plan.tiles() == 1) {
                tile_sums(plan, sample, 0, block, pass, round, [&](int64_t, int64_t, const double* first, const double* second) {
                    take(sample, first, second, of_stretch, stretch * rows);
                });
                continue;
            }
            sums.clear(c0, c1);
            for (int64_t t = 0; t < plan.tiles(); ++t) {
                tile_sums(plan, sample, t, block, pass, round,
                          [&](int64_t c, int64_t n, const double* first, const double* second) { sums.add(0, c, n, first, second); });
            }
            by_columns(c0, c1, [&](int64_t c, int64_t n) {
                sums.first({0, c, n, false}).put(a + (c - c0), n);
                sums.second({0, c, n, false}).put(b + (c - c0), n);
            });
            take(sample, a, b, of_stretch, stretch * rows);
        }
    });
    for (int64_t i = 0; i < stretches * rows; ++i) total.merge(i % rows, of_stretch.row(i));
}

}  // namespace batchnorm
