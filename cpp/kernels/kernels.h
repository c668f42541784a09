// The kernels' contract: the argument structs, the table of function pointers an ISA level fills, and what every kernel
// promises. Included by the ISA translation units and by core/; it knows nothing of NumPy, threads, errors or plans, and
// includes nothing beyond <stddef.h> and <stdint.h>.
//
// Every kernel works on one Box of an (outer, channels, inner) tensor, in one of two memory directions:
//   ncs  inner is contiguous (stride 1): long runs of one channel. The box cuts all three dimensions.
//   nsc  channels are contiguous (stride 1): every row holds all channels. Rows are the flattened (outer, inner) index
//        r = outer_index * row_split + inner_index; the box's outer range counts rows and its inner range is (0, 1).
// Kernels are noexcept, allocate nothing, start no threads, and never read or write an element outside the box. They accept
// any alignment that suits the element type and any n, 0 included. An output may be the same array as an input (same data,
// same strides), never a partly overlapping one. NaN and Inf propagate within their channel. Results depend on the values
// alone: lanes are assigned by index, sums run in one order on every ISA, and a product is fused with a sum only where it is exact.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace batchnorm::kernels {

enum Dtype : int { float32, float64, float16, bfloat16, uint8, int16, uint16 };
inline constexpr int kDtypes = 7;

enum Direction : int { ncs, nsc };
inline constexpr int kDirections = 2;

// Elements per block. Every ISA runs the same 16 lanes (1, 2 or 4 native vectors of float), so a sum has the same terms in the
// same order everywhere. Per-channel arrays that a kernel reads as rows (direction nsc) are padded to a multiple of this.
inline constexpr int64_t kLanes = 16;

// The most channels whose sums one ncs box may hold: their lanes (2 * 16 doubles each, 8 KiB in all) stay in L1.
inline constexpr int64_t kMaxGroup = 32;

// The most channels of one nsc box, and the widest folded row: fewer than 64 channels, at most 16 times.
inline constexpr int64_t kMaxChannelBlock = 2048;
inline constexpr int64_t kMaxFoldedWidth = 1024;
inline constexpr int64_t kFoldBelow = 64;

struct Operand {
    void* data;                                          // element (0, 0, 0) of the whole tensor
    int64_t outer_stride, channel_stride, inner_stride;  // in elements
};

struct Box {
    int64_t outer_begin, outer_end, channel_begin, channel_end, inner_begin, inner_end;
};

// What all share. `fold` (nsc only): with few channels, `fold` consecutive rows are treated as one row of
// fold * channels values, so that vectors stay full; box.outer_begin is then a multiple of fold and per-channel arrays hold
// the channels fold times over. 1 otherwise. Where a box has all channels, per-channel Compute arrays repeat their first 16 values
// behind the fold * channels-th, so that rows without gaps can be taken as one stretch.
struct Where {
    Box box;
    int64_t row_split;
    int64_t fold;
    int64_t ahead;  // bytes by which reads are fetched ahead; 0: they are not
};

// What stands between the normalised value v (after z) and y, and in backward between dy and the normalisation: nothing; ReLU, its on and
// off recomputed from x, or read from a mask; or a curve, which one being a run-time choice.
enum Gate : int { open, relu, masked, curve };

// Gate curve: y = act(v) and g = dy act'(v). NaN stays NaN in y, and -0 is passed on as by max(v, 0).
//   relu        v < 0 ? 0 : v                      g = v > 0 ? dy : 0
//   leaky_relu  v > 0 ? v : slope v                g = v > 0 ? dy : slope dy      slope finite in Compute, not 0 (that is relu)
//   relu6       v < 0 ? 0 : v > 6 ? 6 : v          g = 0 < v < 6 ? dy : 0
//   sigmoid     1 / (1 + exp(-v))                  g = dy y (1 - y)
//   tanh        (1 - exp(-2v)) / (1 + exp(-2v))    g = dy (1 - y^2)
//   silu        v sigmoid(v)                       g = dy (s + v s (1 - s)), s = sigmoid(v)
enum class CurveKind : int { relu, leaky_relu, relu6, sigmoid, tanh, silu };
// In backward leaky_relu's tensor may be its output (`of_y`, slope > 0): x is then taken for y > 0 ? y : y / slope, and g by y's sign.
struct Curve {
    CurveKind kind = CurveKind::relu;
    double slope = 0;
    bool of_y = false;
};

// One bit per element of a tensor, set where the activation's slope is 1 (v > 0, for relu6 also v < 6): bit (outer, channel, inner) is
// number outer * outer_stride + channel * channel_stride + inner, from the lowest of the first byte on. Bits of the box are written, others
// kept; a byte that two boxes share may be written by one thread at a time. kMaskSlack bytes behind the last bit's may be read.
struct Mask {
    uint8_t* bits;
    int64_t outer_stride, channel_stride;
};
inline constexpr int64_t kMaskSlack = 4;

// What counts; the other elements are as if they were not there: they add nothing to a sum, whatever they hold, and 0 is written for
// them. With channel_stride 0 positions (outer, inner) count or do not. Direction ncs: a bit each, number outer * outer_stride + inner,
// with a Mask's slack behind the last. Direction nsc: a byte per row, 0 for a row that does not count. With another channel_stride
// elements do, in the layout of a Mask, in both directions. Without data all count.
struct Kept {
    const uint8_t* data;
    int64_t outer_stride;
    int64_t channel_stride = 0;
};

// How often each position counts: finite numbers >= 0, double for moments and Compute for grad_apply. Direction ncs: number outer *
// outer_stride + inner * inner_step; 15 more behind the last of a run may be read. With step 0 a run has one weight, kLanes times in
// memory. Direction nsc: one per row. Without data each counts once.
struct Weights {
    const void* data;
    int64_t outer_stride, inner_step;
};

// Per-channel arrays below start at box.channel_begin. `Compute` is double for float64 storage and float otherwise.

// sum[c] = sum of (x - shift[c]), sum_sq[c] = sum of (x - shift[c])^2 over the box, in double; overwritten. No shift (null) means 0, which
// is faster; float64 storage always has one, and so has whatever has weights or single elements that count. Integers have none
// otherwise: their sums are exact below 2^53, which is of up to 2^21 values. With weights each sum's term is multiplied by its own; where
// that is 0 x is not looked at. Weights and kept positions are not given together.
struct MomentsArgs {
    Where where;
    Operand x;
    const double* shift;
    double* sum;
    double* sum_sq;
    Kept kept{};
    Weights weights{};
    double scale = 1;  // with weights x - shift is multiplied by this power of two
};

// y = (x - center) * scale + offset, three roundings in Compute, plus z (a fourth) if there is one, then through the gate, max(y, 0) unless
// it is open or curve (NaN stays NaN), then one rounding to storage. `center`, `scale`, `offset` are Compute arrays.
struct Affine {
    const void* center;
    const void* scale;
    const void* offset;
};

struct ApplyArgs {
    Where where;
    Operand x, z, y;  // z, the residual, without data: none
    Affine affine;
    Gate gate;  // masked: ReLU, and where it was on is written to mask; curve: to the mask if that has bits and the curve is no smooth one
    Mask mask;
    bool stream;  // non-temporal stores: for outputs that no cache will hold
    Curve curve{};
    Kept kept{};
};

// g = dy where the gate lets through, else 0: open always, relu where apply(x) > 0, masked where the bit is set. Gate curve: g = dy
// act'(v), v = apply(x) before its gate, with z if that has data; or, of leaky_relu with a mask, dy where the bit is set, else slope dy.
// sum_dy[c] = sum of g, sum_dy_x[c] = sum of g * (x - shift[c]), in double. As for moments, no shift (null) means 0; float64 storage and
// gate curve always have one. With gate curve of float32 or float64 storage g can be left in a tensor; where rows are folded (fold > 1),
// one whose rows follow one another without a gap.
struct GradSumsArgs {
    Where where;
    Operand dy, x;
    const double* shift;
    Affine affine;  // read only with gate relu or curve
    double* sum_dy;
    double* sum_dy_x;
    Gate gate;
    Mask mask;
    Curve curve{};
    Operand z{};  // the residual; read only with gate curve
    Kept kept{};
    Operand g{};  // without data: g is not left
};

// dx = g * k_dy + ((x - center) * x_scale) * k_x + k_0 with g as above; with fixed statistics dx = g * k_dy and x is read only
// with gate relu or curve. dz = g, if wanted. x_scale is a power of two that brings x - center to about 1, so that k_x has the size of dx
// whatever the spread of x. With weights, which fixed statistics have none of, dx = g * k_dy + w * (((x - center) * x_scale) * k_x) + w *
// k_0.
struct GradApplyArgs {
    Where where;
    Operand dy, x, dx, dz;  // dz, the residual's gradient, with gate masked or curve alone; without data: none
    Affine affine;          // center always; scale and offset only with gate relu or curve
    const void* k_dy;
    const void* x_scale;
    const void* k_x;
    const void* k_0;
    Gate gate;
    Mask mask;
    bool fixed;
    bool stream;
    Curve curve{};
    Operand z{};  // as for grad_sums
    Kept kept{};
    Weights weights{};
};

// y = (x - center) * scale + offset of integer x, three roundings in double (center, scale and offset are double arrays), then one to float
// or double storage, two (by way of float) to 16 bits. y is of x's direction; or, x being nsc, its inner is contiguous (`to_runs`).
struct ImageArgs {
    Where where;
    Operand x, y;
    Affine affine;
    Dtype y_dtype;
    bool to_runs;
    bool stream;
};

using MomentsFn = void (*)(const MomentsArgs&) noexcept;
using ApplyFn = void (*)(const ApplyArgs&) noexcept;
using GradSumsFn = void (*)(const GradSumsArgs&) noexcept;
using GradApplyFn = void (*)(const GradApplyArgs&) noexcept;
using ImageFn = void (*)(const ImageArgs&) noexcept;

struct KernelTable {
    const char* isa;
    MomentsFn moments[kDirections][kDtypes];
    ApplyFn apply[kDirections][kDtypes];
    GradSumsFn grad_sums[kDirections][kDtypes];
    GradApplyFn grad_apply[kDirections][kDtypes];
    ImageFn image[kDirections][kDtypes];  // of x's storage type
};

}  // namespace batchnorm::kernels
