// Activations as the kernels take them: a gate and, with gate curve, which one. Used by check.cpp and the drivers.
#pragma once

#include "types.h"

namespace batchnorm {

struct Act {
    kernels::Gate gate = kernels::open;
    kernels::Curve curve{};
};

// Two or three straight pieces, told apart by bits. The derivative of the others takes an exp.
inline bool piecewise_linear(Activation a) { return a == Activation::relu || a == Activation::leaky_relu || a == Activation::relu6; }

// ReLU, and so leaky_relu where the compute type's slope is 0, has gates of its own, faster ones.
inline Act act_of(Activation activation, double slope, Dtype dtype, bool masked = false) {
    if (activation == Activation::none) return {};
    if (dtype != Dtype::float64) slope = static_cast<float>(slope);
    if (activation == Activation::relu || (activation == Activation::leaky_relu && slope == 0)) {
        return {masked ? kernels::masked : kernels::relu, {}};
    }
    return {kernels::curve, {static_cast<kernels::CurveKind>(static_cast<int>(activation) - 1), slope}};
}

// In backward relu6 does behind a mask what relu does, and a residual that is read makes any of them a curve.
inline Act act_of(const BatchNormBackwardArgs& a) {
    const bool masked = !a.activation_mask.empty();
    Act act = act_of(a.activation, a.slope, a.x.dtype, masked);
    if (a.activation == Activation::relu6 && masked) act.gate = kernels::masked;
    if (a.residual && act.gate == kernels::relu) act.gate = kernels::curve;
    return act;
}

}  // namespace batchnorm
