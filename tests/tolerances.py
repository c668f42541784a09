"""How far a result may lie from the reference, with the derivation of every bound.

Notation. u is the unit roundoff, half the distance from 1 to the next number: a single rounded operation is
off by at most u times its result. The library computes in float32 for 16- and 32-bit storage and in float64
for float64 (`u_compute`); all sums, and all work per channel, are float64 (U64). The bounds are first order
in u; what they drop is below 1e-6 of them, and `SLACK` covers it.

Forward, per element (center = mean rounded to the compute type, scale = gamma * inv_std, offset = beta - the
part of the mean that center lost, times scale):

    y = (x - center) * scale + offset

has five roundings: the difference, scale and the product (each u * |gamma * x_hat|), offset (u * |offset|)
and the sum (u * |y|). Storing a 16-bit result adds its own roundoff. In float32 the part lost by center comes
back through offset, so a mean of any size costs nothing but the size of that part, `lost` below; in float64
there is no wider type and the mean's own rounding stays in y. A residual is one sum more: u * |y| is then the
rounding of that, and what it is added to, at most |gamma * x_hat| + |beta|, has a rounding of its own.
"""

from __future__ import annotations

import numpy as np

U64 = 2.0**-53
SLACK = 1 + 2.0**-10

# The project's contract for the normalised value in float32: |error| <= 3e-7 * max(1, |y|), five times u =
# 2^-24.
NORMALIZED_FLOAT32 = 3e-7

# Relative error of var for float64 data, any |mean| / std up to 1e6 (contract).
VAR_FLOAT64 = 1e-14

# The same for narrower data. The contract is one ulp of float32 (1.2e-7), which `ulp_distance` tests; sums in
# float64 do far better even where the values' distance from the point they are summed about costs three
# digits.
VAR_NARROW = 1e-11

_UNIT = {"float64": U64, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Half the smallest subnormal: the absolute error of rounding to storage next to zero.
_TINY = {"float64": 2.0**-1075, "float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}


def u_compute(dtype):
    return U64 if np.dtype(dtype) == np.float64 else _UNIT["float32"]


def stored(dtype, value, error):
    """`error` of `value` after storing it; the roundoff counts once if storage is the compute type."""
    name = np.dtype(dtype).name
    rounding = _UNIT[name] * (np.abs(value) + error) if name in ("float16", "bfloat16") else 0.0
    return SLACK * (error + rounding + _TINY[name])


def ulp_distance(a, b):
    """How many float32 numbers lie between non-negative a and b; as many bit patterns."""
    return np.abs(np.float32(a).view(np.int32).astype(np.int64) - np.float32(b).view(np.int32))


def var_error(dtype):
    """Relative error of var."""
    return VAR_FLOAT64 if np.dtype(dtype) == np.float64 else VAR_NARROW


def mean_error(dtype, mean, std):
    """That of the sums, relative to about std per value, and two roundings of mean = shift + sum / n."""
    return SLACK * (2 * U64 * np.abs(mean) + var_error(dtype) * std)


def inv_std_error(dtype):
    """Relative error of inv_std = 1 / sqrt(var + eps): half that of var, and three roundings."""
    return SLACK * (var_error(dtype) / 2 + 3 * U64)


def _lost(dtype, mean, inv_std):
    """What rounding the mean to the compute type loses, in standard deviations."""
    return u_compute(dtype) * np.abs(mean) * inv_std


def y_error(dtype, y, x_hat, mean, inv_std, gamma=1.0, beta=0.0, exact_mean=False, with_residual=False):
    """Bound of |y - reference|. Per-channel arguments broadcast against x.

    `exact_mean`: mean and var are arguments (inference), so that only float64's rounding of the mean itself
    is missing.
    """
    u, gamma = u_compute(dtype), np.abs(gamma)
    lost = gamma * _lost(dtype, mean, inv_std)
    if u == U64:  # center is the mean; scale has four roundings: + eps, root, quotient, * gamma
        error = u * (6 * gamma * np.abs(x_hat) + np.abs(beta) + np.abs(y))
    else:
        error = u * (3 * (gamma * np.abs(x_hat) + lost) + (np.abs(beta) + lost) + np.abs(y))
    if with_residual:
        error = error + u * (gamma * np.abs(x_hat) + np.abs(beta))
    if not exact_mean:
        error = error + gamma * (2 * U64 * np.abs(mean) * inv_std + var_error(dtype) * (1 + np.abs(x_hat)))
    return stored(dtype, y, error)


def sum_error(n, abs_sum, result, out_dtype):
    """Of a float64 sum of n terms, rounded to the gradient's type.

    The sum is off by at most n * U64 * sum |terms| in any order (Higham, Accuracy and Stability of Numerical
    Algorithms, section 4.2); each term of dgamma has three roundings of its own.
    """
    return SLACK * ((n + 4) * U64 * abs_sum + _UNIT[np.dtype(out_dtype).name] * np.abs(result))


def dgamma_error(n, abs_sum, result, out_dtype, mean, inv_std, abs_dy_sum):
    """`sum_error`, and the mean's error times sum |dy|."""
    shift = (2 * U64 * np.abs(mean) * inv_std + VAR_FLOAT64) * abs_dy_sum
    return sum_error(n, abs_sum, result, out_dtype) + SLACK * (shift + VAR_FLOAT64 * abs_sum)


def dx_error(dtype, dx, dy, x_hat, mean, inv_std, dgamma, dbeta, n, gamma=1.0, stats="batch", sums_error=0.0):
    """Bound of |dx - reference| for dx = (dy * k_dy + (x - center) * k_x) + k_0.

    Roundings that reach each part: k_dy, its product and two sums: 4 u |k_dy dy|; x - center, k_x, its
    product and two sums: 5 u |k_x (x - center)|; k_0 and the last sum: 2 u |k_0|. With fixed statistics dx =
    dy * k_dy: 2 u |dx|. `sums_error` is the error of dbeta / n plus |x_hat| times that of dgamma / n, before
    rounding to the gradient's type.
    """
    u, scale = u_compute(dtype), np.abs(gamma) * inv_std
    if stats == "fixed":
        return stored(dtype, dx, 2 * u * scale * np.abs(dy))
    mean_dy, mean_dy_x_hat, lost = np.abs(dbeta / n), np.abs(dgamma / n), _lost(dtype, mean, inv_std)
    error = 4 * np.abs(dy) + 5 * (np.abs(x_hat) + lost) * mean_dy_x_hat + 2 * (mean_dy + lost * mean_dy_x_hat)
    if u == U64:  # center has the mean's rounding, twice u; no wider type gives it back
        sums_error = sums_error + 2 * lost * (mean_dy_x_hat + np.abs(x_hat) * mean_dy)
    return stored(dtype, dx, scale * (u * error + sums_error))


def running_error(dtype, decay, old, new):
    """Of decay * old + (1 - decay) * new.

    In float64 five roundings (1 - decay, n / (n - ddof), two products, one sum), each at most U64 times the
    sum of magnitudes; then one rounding to the running array's type.
    """
    size = decay * np.abs(old) + (1 - decay) * np.abs(new)
    return SLACK * (5 * U64 * size + _UNIT[np.dtype(dtype).name] * size + _TINY[np.dtype(dtype).name])


def difference_error(size, curvature, step):
    """Of (f(x + h) - f(x - h)) / 2h in float64, for a sum f of many terms of either sign.

    `size` is the sum of the terms' magnitudes: each has about five roundings, which leaves 5 U64 size / h.
    `curvature` bounds the third derivative: truncation is h^2 / 6 of it.
    """
    return SLACK * (5 * U64 * size / step + curvature * step * step / 6)


# Roundings of an activation, in units of u times its value. It takes e = exp(t), of which q = exp(r) - 1 with
# |r| <= ln 2 / 2 is off by 3 u |q| (r: 2, its polynomial: 1), so 1 + q by (3 |q| + |1 + q|) u, at most
# 2.3 u |1 + q|, and e by 3 u with what Taylor's series omits; 1 + e by at most 3 u / 2 + u.
_EXP = 3.0
_ACTIVATION = {
    "relu": 0.0,
    "leaky_relu": 1.0,
    "relu6": 0.0,
    "sigmoid": _EXP + 2.5 + 1,  # e / (1 + e)
    "tanh": 3.5
    + 3.5
    + 2,  # m / (2 + m), m = exp(t) - 1 off by 3.5: 2^n q and 2^n - 1 are exact, the sum is at least |q| / 1.5
    "silu": _EXP + 1 + 2.5 + 1,
}
_DERIVATIVE = {"sigmoid": _EXP + 2 * 2.5 + 1 + 1, "tanh": _EXP + 2 * 2.5 + 1 + 1, "silu": _EXP + 1 + 2.5 + 1}


def activation_error(dtype, y, activation):
    """Bound of |act(v) - y| for v as it is."""
    return stored(dtype, y, u_compute(dtype) * _ACTIVATION[activation] * np.abs(y) + _subnormal(dtype))


def activation_gradient_error(dtype, v, dy, want, activation):
    """Bound of |dy act'(v) - want|: act' and one product.

    silu' = s (1 + v (1 - s)) has a root, near which the bracket's roundings, 7.5 u |v (1 - s)| + u, stay.
    """
    if activation not in _DERIVATIVE:
        return stored(dtype, want, u_compute(dtype) * np.abs(want))
    error = (_DERIVATIVE[activation] + 1) * np.abs(want)
    if activation == "silu":
        e = np.exp(-np.abs(v))
        error = error + np.abs(dy) * (7.5 * np.abs(v) * e / (1 + e) ** 2 + np.abs(want / dy))
    return stored(dtype, want, u_compute(dtype) * error + 4 * np.abs(dy) * _subnormal(dtype))


def _subnormal(dtype):
    """The least number of the compute type: results below the normal ones are off by about half of it."""
    return np.longdouble(2) ** (-1074 if np.dtype(dtype) == np.float64 else -149)
