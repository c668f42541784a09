// What check.cpp hands on of a call whose arguments are right: sizes, parts, and how much of each counts.
#pragma once

#include "positions.h"
#include "types.h"

namespace batchnorm {

// gamma and beta have one row for a whole part, or one for each group: `group_outer` rows of outer, which divide the parts.
struct Call {
    Geometry geometry{};
    Parts parts{};
    int64_t group_outer = 0;  // 0: a part is a group
    Counts counts{};
    int64_t sample_outer = 0;  // rows of outer of a sample, whose sums are taken apart; 0: as it suits

    int64_t groups(int64_t p) const { return group_outer == 0 ? 1 : parts.size(p) / group_outer; }
    int64_t group_rows(int64_t p) const { return group_outer == 0 ? parts.size(p) : group_outer; }
    // Of group q of part p, the row of gamma and beta.
    int64_t sample(int64_t p, int64_t q) const { return group_outer == 0 ? 0 : parts.begin(p) / group_outer + q; }
};

// The boxes of `where`, which is part `part`'s, that lie in one group each: f(group, box). In a plan's rows, row_split to one of outer.
template <class F>
void by_groups(const Call& call, int64_t part, int64_t row_split, const kernels::Where& where, const F& f) {
    const int64_t groups = call.groups(part);
    if (groups == 1) return f(0, where);
    const int64_t rows = call.group_rows(part) * row_split;
    for (int64_t q = where.box.outer_begin / rows; q < groups && q * rows < where.box.outer_end; ++q) {
        kernels::Where box = where;
        box.box.outer_begin = std::max(where.box.outer_begin, q * rows);
        box.box.outer_end = std::min(where.box.outer_end, (q + 1) * rows);
        f(q, box);
    }
}

}  // namespace batchnorm
