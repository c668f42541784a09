"""How far a result may lie from the reference, with the derivation of every bound.

Notation. u is the unit roundoff, half the distance from 1 to the next number: a single rounded operation is
off by at most u times its result. The library computes in float32 for 16- and 32-bit storage and in float64
for float64 (`u_compute`); all sums, and all work per channel, are float64 (U64). The bounds are first order
in u; what they drop is below 1e-6 of them, and `SLACK` covers it.

With A = |gamma r| and B = |beta + gamma d|, a forward computes, per element,

    v = (x - center) * scale + offset + residual,   scale = gamma r inv_std,  y = act(v)

where center is the mean rounded to the compute type. In float32 what center lost of the mean comes back
through offset, so that a mean of any size costs nothing but the size of that part (`lost`); in float64 there
is no wider type, and the mean's own rounding stays in y. Backward has

    dx = (g * k_g + w * ((x - center) * k_x + k_0)),   g = dy act'(v)

with k_x and k_0 made of the sums of g and g x_hat over the part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .reference import Call, Forward, Gradients, per_row

Array = np.ndarray[Any, Any]

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

UNIT = {"float64": U64, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Half the smallest subnormal: the absolute error of rounding to storage next to zero.
TINY = {"float64": 2.0**-1075, "float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}
# Where it begins, |act''| at most, and how far act may carry an error of v.
JUMPS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0)}
BEND = {"sigmoid": 0.1, "tanh": 0.77, "silu": 0.5}
STEEPEST = {"sigmoid": 0.25, "silu": 1.1}


def u_compute(dtype: Any) -> float:
    return U64 if np.dtype(dtype) == np.float64 else UNIT["float32"]


def stored(dtype: Any, value: Array, error: Any) -> Array:
    """`error` of `value` after storing it; the roundoff counts once if storage is the compute type."""
    name = np.dtype(dtype).name
    rounding = UNIT[name] * (np.abs(value) + error) if name in ("float16", "bfloat16") else 0.0
    return SLACK * (error + rounding + TINY[name])


def ulp_distance(a: Any, b: Any) -> Array:
    """How many float32 numbers lie between non-negative a and b; as many bit patterns."""
    return np.abs(np.float32(a).view(np.int32).astype(np.int64) - np.float32(b).view(np.int32))


def var_error(dtype: Any) -> float:
    """Relative error of var."""
    return VAR_FLOAT64 if np.dtype(dtype) == np.float64 else VAR_NARROW


def mean_error(dtype: Any, mean: Any, std: Any, weighted: bool = False) -> Any:
    """That of the sums, relative to about std per value, and two roundings of mean = shift + sum / n. Weights
    bring two more, of their product and their sum."""
    return SLACK * ((4 if weighted else 2) * U64 * np.abs(mean) + var_error(dtype) * std)


def inv_std_error(dtype: Any) -> float:
    """Relative error of inv_std = 1 / sqrt(var + eps): half that of var, and three roundings."""
    return SLACK * (var_error(dtype) / 2 + 3 * U64)


class Bounds(NamedTuple):
    """Of y, v and x_hat (N, C, S), and of mean, var, inv_std, r and d (P, C)."""

    y: Array
    v: Array
    x_hat: Array
    mean: Array
    var: Array
    inv_std: Array
    r: Array
    d: Array


@np.errstate(all="ignore")
def forward(c: Call, f: Forward, dtype: Any) -> Bounds:
    """Roundings of v: in float32 the difference, scale and the product, 3 u A |x_hat|; offset, u (B + lost);
    the last sum, u |v|. In float64 scale has four (+ eps, root, quotient, * gamma), all stay. A residual is
    one sum more, of what was at most A |x_hat| + B. x_hat itself has the errors of mean and inv_std."""
    u, slope = u_compute(dtype), abs(float(c.slope))
    gamma, beta = c.affine()
    r, d, inv_std, mean = (c.rows(t) for t in (f.r, f.d, f.inv_std, f.mean))
    a, b, size = np.abs(gamma * r), np.abs(beta + gamma * d), np.abs(f.x_hat)
    given = c.mean is not None
    off_mean = (
        np.zeros_like(f.mean) if given else mean_error(dtype, f.mean, np.sqrt(f.var), c.weights is not None)
    )
    off_inv = np.full_like(f.mean, 4 * U64 if given else inv_std_error(dtype))
    of_x_hat = c.rows(off_mean) * inv_std + size * c.rows(off_inv)
    off_r, off_d = np.zeros_like(f.r), np.zeros_like(f.d)
    if c.renorm is not None:
        off_r = f.r * (off_inv + 3 * U64)
        off_d = off_mean / c.wide(c.renorm["std"]) + 6 * U64 * (
            np.abs(f.d) + np.abs(f.mean) / c.wide(c.renorm["std"])
        )
    lost = a * u * np.abs(mean) * inv_std
    error = u * ((6 if u == U64 else 3) * a * size + 2 * b + np.abs(f.v)) + lost * (1 if u == U64 else 4 * u)
    error = error + a * of_x_hat + np.abs(gamma) * (size * c.rows(off_r) + c.rows(off_d))
    if c.residual is not None:
        error = error + u * (a * size + b)
    subnormal = 3 * TINY["float64" if u == U64 else "float32"]  # product, offset and sum next to zero
    error = np.where(f.counts, SLACK * error + subnormal, 0)
    carried = error * max(STEEPEST.get(c.activation or "", 1.0), slope if c.activation == "leaky_relu" else 0)
    of_y = stored(dtype, f.y, carried + u * _ACTIVATION.get(c.activation or "", 0.0) * np.abs(f.y))
    return Bounds(
        np.where(f.counts, of_y, 0), error, np.where(f.counts, of_x_hat, 0), off_mean,
        SLACK * (var_error(dtype) + 2 * U64) * np.abs(f.var) + (4 * U64 * f.mean) ** 2,
        off_inv * f.inv_std, off_r, off_d,
    )  # fmt: skip


@np.errstate(all="ignore")
def backward(
    c: Call, f: Forward, dy: Array, want: Gradients, dtype: Any, bounds: Bounds, kept: Array | None = None
) -> Gradients:
    """Of each gradient, in float64 for dgamma and dbeta: `parameter_error` adds their storage.

    g errs by a rounding or two of its own, by what v errs where act' bends, and by act's jump where v lies
    within its error of a kink. `kept` says of which channels x itself is there (None: all); where x comes
    back from y, x_hat has y's error over A, and some roundings of its own and of B / A.
    """
    u, name = u_compute(dtype), c.activation or ""
    gamma, beta = c.affine()
    r, d, s, mean = (c.rows(t) for t in (f.r, f.d, f.inv_std, f.mean))
    a, size, dy = np.abs(gamma * r), np.abs(f.x_hat), np.where(f.counts, np.abs(c.wide(dy)), 0)
    g = np.abs(want.dresidual)
    off_g = u * (1 + _DERIVATIVE.get(name, 0.0)) * (g + (dy if name == "silu" else 0)) * (name != "")
    off_g = off_g + BEND.get(name, 0.0) * dy * bounds.v
    for kink in JUMPS.get(name, ()):
        near = np.abs(f.v - kink) <= bounds.v + 2 * TINY[np.dtype(dtype).name]
        off_g = off_g + near * dy * (np.abs(1 - c.slope) if name == "leaky_relu" else 1)
    off_x, lost = bounds.x_hat, u * np.abs(mean) * s
    if kept is not None:
        back = bounds.y + bounds.v + 8 * u * (a * size + np.abs(beta + gamma * d))
        if (
            name == "leaky_relu"
        ):  # its output and its gradient are rounded once more, and divided by the slope
            back = 3 * back / min(1, abs(float(c.slope)))
            off_g = off_g + UNIT[np.dtype(dtype).name] * g
        from_y = ~np.asarray(kept)[None, :, None] & (a > 0)
        off_x = np.where(from_y, back / a, off_x)
        lost = np.where(from_y, lost + u * np.abs(beta + gamma * d) / a, lost)
    # Sums: a term's own error, and any order's roundings (Higham, Accuracy and Stability of Numerical
    # Algorithms, section 4.2) of terms (x - shift), the shift being one of the values, or 0.
    n = f.x_hat.shape[0] * f.x_hat.shape[2]
    far = 1 + c.rows(np.maximum.reduceat(size.max(axis=2), c.starts, axis=0)) + np.abs(mean) * s
    off_term = off_g * (r * size + np.abs(d)) + g * (r * off_x + size * c.rows(bounds.r) + c.rows(bounds.d))
    off_term = off_term + (n + 8) * U64 * g * (r * (size + far) + np.abs(d))
    dgamma = SLACK * per_row(c, np.where(f.counts, off_term, 0), c.gamma)
    dbeta = SLACK * per_row(c, off_g + (n + 4) * U64 * g, c.beta)
    off_w = a * off_g + (c.rows(bounds.inv_std / f.inv_std) * 2 + 4 * U64) * a * g
    error = off_w + 4 * u * a * g
    if c.mean is None:
        along = want.dresidual * gamma * r
        m0, m1 = (np.abs(c.rows(c.sums(t) / f.n)) for t in (along, along * f.x_hat))
        e0, e1 = (
            c.rows(c.sums(np.where(f.counts, t, 0)) / f.n)
            for t in (
                off_w + (n + 4) * U64 * a * g,
                off_w * size + a * g * off_x + (n + 8) * U64 * a * g * (size + far),
            )
        )
        pulled = u * (7 * (size + lost) * m1 + 4 * (m0 + lost * m1)) + e0 + (size + lost) * e1 + off_x * m1
        if u == U64:  # the center has the mean's rounding, and no wider type gives it back
            pulled = pulled + 2 * lost * (m1 + size * m0)
        error = error + f.w * pulled
    dx = np.where(f.counts, stored(dtype, want.dx, s * error), 0)
    return Gradients(dx, dgamma, dbeta, np.where(f.counts, stored(dtype, g, off_g), 0))


def parameter_error(dtype: Any, value: Array, error: Array) -> Array:
    """That of a sum in float64, after storing it."""
    name = np.dtype(dtype).name
    return SLACK * (error + UNIT[name] * np.abs(value) + TINY[name])


@np.errstate(all="ignore")
def batch_errors(c: Call, f: Forward, dtype: Any, ddof: int = 1) -> tuple[Array, Array]:
    """Of the mean and variance that running statistics take, (C,): of the worst part. n / (n - ddof) has n's
    rounding, which counts n / (n - ddof) times."""
    grown = f.n / (f.n - ddof)
    of_mean = mean_error(dtype, f.batch_mean, np.sqrt(f.batch_var), c.weights is not None)
    of_var = (
        f.batch_var * grown * (var_error(dtype) + 4 * U64 * grown) + (4 * U64 * f.batch_mean) ** 2 * grown
    )
    enters = (f.values > 1) & (f.n > ddof)
    return tuple(np.where(enters, e, 0).max(axis=0) for e in (of_mean, of_var))


def running_error(dtype: Any, decay: Any, old: Any, new: Any, new_error: Any = 0.0) -> Any:
    """Of decay * old + (1 - decay) * new.

    In float64 some roundings (1 - decay, n / (n - ddof), the parts' average, two products, one sum), each at
    most U64 times the sum of magnitudes; then one rounding to the running array's type.
    """
    size = decay * np.abs(old) + (1 - decay) * np.abs(new)
    name = np.dtype(dtype).name
    return SLACK * (8 * U64 * size + (1 - decay) * new_error + UNIT[name] * size + TINY[name])


# Roundings of an activation, in units of u times its value. It takes e = exp(t), of which q = exp(r) - 1 with
# |r| <= ln 2 / 2 is off by 3 u |q| (r: 2, its polynomial: 1), so 1 + q by (3 |q| + |1 + q|) u, at most
# 2.3 u |1 + q|, and e by 3 u with what Taylor's series omits; 1 + e by at most 3 u / 2 + u.
_EXP = 3.0
_ACTIVATION = {
    "relu": 0.0,
    "leaky_relu": 1.0,
    "relu6": 0.0,
    "sigmoid": _EXP + 2.5 + 1,  # e / (1 + e)
    # m / (2 + m), m = exp(t) - 1 off by 3.5: 2^n q and 2^n - 1 are exact, the sum is at least |q| / 1.5
    "tanh": 3.5 + 3.5 + 2,
    "silu": _EXP + 1 + 2.5 + 1,
}
_DERIVATIVE = {"sigmoid": _EXP + 2 * 2.5 + 1 + 1, "tanh": _EXP + 2 * 2.5 + 1 + 1, "silu": _EXP + 1 + 2.5 + 1}


def activation_error(dtype: Any, y: Array, activation: str) -> Array:
    """Bound of |act(v) - y| for v as it is."""
    return stored(dtype, y, u_compute(dtype) * _ACTIVATION[activation] * np.abs(y) + _subnormal(dtype))


def activation_gradient_error(dtype: Any, v: Array, dy: float, want: Array, activation: str) -> Array:
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


def _subnormal(dtype: Any) -> Any:
    """The least number of the compute type: results below the normal ones are off by about half of it."""
    return np.longdouble(2) ** (-1074 if np.dtype(dtype) == np.float64 else -149)
