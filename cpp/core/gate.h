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
inline Act act_of(Activation activation, double slope, Dtype dtype, bool bits = false) {
    if (activation == Activation::none) return {};
    if (dtype != Dtype::float64) slope = static_cast<float>(slope);
    if (activation == Activation::relu || (activation == Activation::leaky_relu && slope == 0)) {
        return {bits ? kernels::masked : kernels::relu, {}};
    }
    return {kernels::curve, {static_cast<kernels::CurveKind>(static_cast<int>(activation) - 1), slope}};
}

// What backward does with it: with the forward's bits relu6 is what relu is, a residual that is read makes any of them a curve, and so
// does a tensor that is y.
inline Act act_back(Activation activation, double slope, Dtype dtype, bool bits, bool residual, bool of_y) {
    Act act = act_of(activation, slope, dtype, bits);
    if (activation == Activation::relu6 && bits) act.gate = kernels::masked;
    if (residual && act.gate == kernels::relu) act.gate = kernels::curve;
    act.curve.of_y = of_y;
    return act;
}

}  // namespace batchnorm
