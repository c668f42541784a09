"""Activations: their values and derivatives, fused with every other option, with and without a residual.

An activation is applied to v, what the call would give without it. So its accuracy is measured where v is x
itself (mean 0, variance 1, eps 0), and everywhere else a fused call must have the very bits of two calls.
"""

from __future__ import annotations

import batchnorm
import numpy as np
import pytest

import reference
import tolerances
from cases import (
    AVAILABLE_DTYPES,
    BFLOAT16,
    DTYPES,
    FLOAT32,
    FLOAT64,
    SHARED_SHAPES,
    SOME_SHAPES,
    Shape,
    gradient_of,
    normal,
    parameters,
    residual_of,
    rng,
    same_bits,
)

PIECEWISE = ("relu", "leaky_relu", "relu6")
SMOOTH = ("sigmoid", "tanh", "silu")
ACTIVATIONS = PIECEWISE + SMOOTH
NEW = ACTIVATIONS[1:]
NEEDS = ("dx", "dgamma", "dbeta", "dresidual")
SHAPES = [*SOME_SHAPES, Shape("ncs", 40, 20, 1), Shape("nsc", 7, 2051, 1), Shape("nsc", 130, 64, 1)]
ONE, ZERO = np.ones(1), np.zeros(1)


# ---- reference -----------------------------------------------------------------------------------


def activate(v, activation, slope=0.01):
    """act(v), by formulas that do not overflow; `v` is wide."""
    e = np.exp(-np.abs(v))
    sigmoid = np.where(v < 0, e / (1 + e), 1 / (1 + e))
    return {
        None: v,
        "relu": np.where(v < 0, 0, v),
        "leaky_relu": np.where(v > 0, v, v * slope),
        "relu6": np.where(v < 0, 0, np.where(v > 6, 6, v)),
        "sigmoid": sigmoid,
        "tanh": np.tanh(v),
        "silu": np.where(v < -1e30, -0.0, v) * sigmoid,
    }[activation]


def derivative(v, activation, slope=0.01):
    e, e2 = np.exp(-np.abs(v)), np.exp(-2 * np.abs(v))
    s, not_s = (np.where(side, e, 1) / (1 + e) for side in (v < 0, v >= 0))
    return {
        "relu": np.where(v > 0, 1, 0),
        "leaky_relu": np.where(v > 0, 1, slope),
        "relu6": np.where((v > 0) & (v < 6), 1, 0),
        "sigmoid": e / (1 + e) ** 2,
        "tanh": 4 * e2 / (1 + e2) ** 2,
        "silu": s * (1 + v * not_s),
    }[activation] * np.ones_like(v)


def column(values, dtype):
    return np.asarray(values, np.float64).astype(dtype)[:, None]


def apply(x, activation, **options):
    """act(x) by the library: a mean of 0 and a variance of 1 leave x as it is."""
    return batchnorm.batch_norm(x, ZERO, ONE, eps=0.0, activation=activation, **options)


def slope_at(x, dy, activation, **options):
    return batchnorm.batch_norm_backward(
        dy, x, ZERO, ONE, stats="fixed", activation=activation, needs=("dx",), **options
    ).dx


def many_values(dtype):
    """From near 0 to where every activation has ended, and around each bend."""
    least = {"float64": 760, "float16": 30}.get(dtype.name, 110)
    generator = rng(5)
    tiny = 2.0 ** -{"float64": 1070, "float16": 22}.get(dtype.name, 130)
    sizes = np.exp(generator.uniform(np.log(tiny), 0, 3000))
    bends = [
        sign * size * (1 + step) for sign in (1, -1) for size in (6, 9, 88, 104) for step in (-1e-7, 0, 1e-7)
    ]
    return column(
        [
            *(generator.normal(size=9000) * 3),
            *generator.uniform(-least, least, 9000),
            *sizes,
            *-sizes,
            *bends,
        ],
        dtype,
    )


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_derivatives(dtype, activation, isa):
    x = many_values(dtype)
    wide = reference.widen(x, np.longdouble)
    slope = float(np.float32(0.01)) if dtype != FLOAT64 else 0.01
    want = activate(wide, activation, slope)
    bound = tolerances.activation_error(dtype, want, activation)
    error = np.abs(reference.widen(apply(x, activation), np.longdouble) - want)
    assert np.all(error <= bound), (x[np.argmax(error / bound)], (error / bound).max())

    dy = np.full_like(x, 1.5)
    want = 1.5 * derivative(wide, activation, slope)
    bound = tolerances.activation_gradient_error(dtype, wide, 1.5, want, activation)
    error = np.abs(reference.widen(slope_at(x, dy, activation), np.longdouble) - want)
    assert np.all(error <= bound), (x[np.argmax(error / bound)], (error / bound).max())


NAN, INF = np.nan, np.inf
AT_SPECIAL = {  # value and derivative at NaN, inf, -inf, 0, 6 and -1; None: not exact
    "relu": ([NAN, INF, 0, 0, 6, 0], [0, 1, 0, 0, 1, 0]),
    "leaky_relu": ([NAN, INF, -INF, 0, 6, -0.25], [0.25, 1, 0.25, 0.25, 1, 0.25]),
    "relu6": ([NAN, 6, 0, 0, 6, 0], [0, 0, 0, 0, 0, 0]),
    "sigmoid": ([NAN, 1, 0, 0.5, None, None], [NAN, 0, 0, 0.25, None, None]),
    "tanh": ([NAN, 1, -1, 0, None, None], [NAN, 0, 0, 1, None, None]),
    "silu": ([NAN, INF, -0.0, 0, None, None], [NAN, 1, -0.0, 0.5, None, None]),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, activation, isa):
    slope = {"slope": 0.25} if activation == "leaky_relu" else {}
    for copies in (1, 5):  # in the tail, and in whole blocks as well
        x = column([NAN, INF, -INF, 0, 6, -1] * copies, dtype)
        y, dx = apply(x, activation, **slope), slope_at(x, np.ones_like(x), activation, **slope)
        for got, want in zip((y, dx), AT_SPECIAL[activation], strict=True):
            known = [w is not None for w in want] * copies
            value, wanted = reference.widen(got[known, 0]), np.array(want * copies, float)[known]
            assert np.array_equal(value, wanted, equal_nan=True), (value, wanted)
    if activation == "silu":
        assert np.signbit(y[2, 0]), "the limit from below"


@pytest.mark.parametrize("slope", [0.0, -0.5, 1.0, 3, 1e-45, -1e38])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_slopes(dtype, slope):
    x = column([-np.inf, -3.0, -0.5, -0.0, 0.0, 0.5, 3.0, np.inf], dtype)
    factor = dtype.type(slope)
    y = apply(x, "leaky_relu", slope=slope)
    with np.errstate(over="ignore"):
        want = np.where(x > 0, x, x * (factor or dtype.type(1)))
    want[(factor == 0) & (x < 0)] = 0
    assert np.array_equal(y, want)
    dy = np.nan_to_num(x[::-1], posinf=9, neginf=-9)
    dx = slope_at(x, dy, "leaky_relu", slope=slope)
    with np.errstate(over="ignore"):
        assert np.array_equal(dx, np.where(x > 0, dy, dy * factor))
    if factor == 0:
        assert same_bits(y, apply(x, "relu")) and same_bits(dx, slope_at(x, dy, "relu"))
    assert same_bits(apply(x, "leaky_relu"), apply(x, "leaky_relu", slope=0.01)), "the default"


# ---- fused is unfused ----------------------------------------------------------------------------


class Problem:
    """All arguments for one shape."""

    def __init__(self, shape, dtype, activation, seed=0):
        self.x, self.dy = normal(shape, dtype, seed), gradient_of(shape, dtype, seed)
        self.z = residual_of(shape, dtype, seed)
        kind = np.float64 if dtype == FLOAT64 else np.float32
        self.gamma, self.beta = parameters(shape.channels, kind, seed)
        self.beta = (self.beta * 3 + 1).astype(kind)  # a few values beyond 6
        self.options = {"activation": activation}
        if activation == "leaky_relu":
            self.options["slope"] = 0.125

    def wide(self):
        """The same in float32, in which 16-bit types compute: v is then stored as it is."""
        other = object.__new__(Problem)
        other.__dict__ = {
            name: value.astype(np.float32) if getattr(value, "itemsize", 4) == 2 else value
            for name, value in self.__dict__.items()
        }
        return other

    def forward(self, **options):
        return batchnorm.batch_norm_train(self.x, self.gamma, self.beta, **(self.options | options))

    def backward(self, forward, **options):
        return batchnorm.batch_norm_backward(
            self.dy, self.x, forward.mean, forward.inv_std, self.gamma, self.beta, **(self.options | options)
        )

    def two_steps(self, residual, stats):
        """y, and the gradients, by calls without an activation around calls of nothing but an activation."""
        v = batchnorm.batch_norm_train(self.x, self.gamma, self.beta, residual=residual)
        flat, dy = (np.ascontiguousarray(a).reshape(-1, 1) for a in (v.y, self.dy))
        y, gated = np.empty_like(self.x), np.empty_like(self.x)
        y[...] = apply(flat, **self.options).reshape(self.x.shape)
        gated[...] = slope_at(flat, dy, **self.options).reshape(self.x.shape)
        gradients = batchnorm.batch_norm_backward(
            gated, self.x, v.mean, v.inv_std, self.gamma, self.beta, stats=stats
        )
        return v, y, gradients, gated


def assert_like(got, wide):
    """`got` is `wide` rounded to its type."""
    assert same_bits(got, wide.astype(got.dtype)), np.flatnonzero(got != wide.astype(got.dtype))[:5]


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("activation", NEW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_residual(shape, dtype, activation, stats):
    p = Problem(shape, dtype, activation)
    v, y, gradients, _ = p.wide().two_steps(None, stats)
    forward = p.forward()
    assert type(forward) is batchnorm.TrainResult
    assert_like(forward.y, y)
    assert same_bits(forward.mean, v.mean) and same_bits(forward.inv_std, v.inv_std)
    for got, want in zip(p.backward(forward, stats=stats), gradients, strict=True):
        assert_like(got, want)
    var = batchnorm.moments(p.x).var
    assert same_bits(batchnorm.batch_norm(p.x, v.mean, var, p.gamma, p.beta, **p.options), forward.y)


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("activation", NEW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_residual(shape, dtype, activation, stats):
    p = Problem(shape, dtype, activation)
    wide = p.wide()
    _, y, gradients, gated = wide.two_steps(wide.z, stats)
    forward = p.forward(residual=p.z)
    assert_like(forward.y, y)
    assert hasattr(forward, "activation_mask") == (activation in PIECEWISE)
    ways = [{"residual": p.z}]
    if activation in PIECEWISE:
        ways.append({"activation_mask": forward.activation_mask})
    for way in ways:
        got = p.backward(forward, stats=stats, needs=NEEDS, **way)
        assert_like(got.dresidual, gated)
        for value, want in zip(got, gradients, strict=True):
            assert_like(value, want)
        alone = p.backward(forward, stats=stats, needs=("dresidual",), **way)
        assert same_bits(alone.dresidual, got.dresidual)
        without = p.backward(forward, stats=stats, **way)
        assert all(same_bits(a, b) for a, b in zip(got, without, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_with_its_residual_instead_of_a_mask(shape, dtype):
    p = Problem(shape, dtype, "relu")
    forward = p.forward(residual=p.z)
    mask = p.backward(forward, needs=NEEDS, activation_mask=forward.activation_mask)
    read = p.backward(forward, needs=NEEDS, residual=p.z)
    assert same_bits(mask.dresidual, read.dresidual)
    assert all(same_bits(a, b) for a, b in zip(mask, read, strict=True))


@pytest.mark.parametrize("activation", PIECEWISE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_tell_where_the_slope_is_1(shape, activation):
    p = Problem(shape, FLOAT32, activation)
    mean, var = batchnorm.moments(p.x)
    mask = np.zeros(batchnorm.activation_mask_bytes(p.x), np.uint8)
    y = batchnorm.batch_norm(p.x, mean, var, p.gamma, p.beta, residual=p.z, activation_mask=mask, **p.options)
    forward = p.forward(residual=p.z)
    assert same_bits(forward.y, y) and same_bits(forward.activation_mask, mask)
    v = p.forward(residual=p.z, activation=None, slope=None).y
    dy = np.ones_like(p.x)
    on = batchnorm.batch_norm_backward(
        dy,
        p.x,
        mean,
        ONE.repeat(shape.channels),
        activation="relu",
        activation_mask=mask,
        needs=("dresidual",),
    ).dresidual
    assert np.array_equal(on, (v > 0) & ((v < 6) | (activation != "relu6")))


@pytest.mark.parametrize("activation", NEW)
@pytest.mark.parametrize("dtype", AVAILABLE_DTYPES, ids=str)
def test_in_place(dtype, activation):
    p = Problem(Shape("nsc", 245, 20, 1), dtype, activation)
    forward = p.forward(residual=p.z)
    needs = p.backward(forward, residual=p.z, needs=NEEDS)
    for out, out_residual in (("dy", "z"), ("z", "dy"), ("x", "z"), (None, "z")):
        q = Problem(Shape("nsc", 245, 20, 1), dtype, activation)
        given = {"out": getattr(q, out) if out else None, "out_residual": getattr(q, out_residual)}
        got = q.backward(forward, residual=q.z, needs=NEEDS, **given)
        assert got.dresidual is given["out_residual"] and (out is None or got.dx is given["out"])
        assert same_bits(got.dresidual, needs.dresidual)
        assert all(same_bits(a, b) for a, b in zip(got, needs, strict=True))
    q = Problem(Shape("nsc", 245, 20, 1), dtype, activation)
    assert same_bits(q.forward(residual=q.z, out=q.z).y, forward.y)
    q = Problem(Shape("nsc", 245, 20, 1), dtype, activation)
    assert same_bits(q.forward(residual=q.z, out=q.x).y, forward.y)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_derivative_is_the_same_once_or_twice(shape, dtype, activation, with_residual, set_tuning):
    """The sums leave dy act'(v) in an output, for dx to be made of it, unless that is x, positions are left
    out, or the rows of the output are apart: then it is computed again."""
    set_tuning("parallel_elements=0")
    p = Problem(shape, dtype, activation)
    residual = p.z if with_residual else None
    forward = p.forward(residual=residual)
    needs = NEEDS if with_residual else NEEDS[:3]
    want = p.backward(forward, residual=residual, needs=needs)
    out = "out_residual" if with_residual else "out"
    n, c, s = p.x.shape
    apart = shape._replace(channels=c + 3).like((n, c + 3, s), dtype)[:, :c]

    def again(**options):
        got = p.backward(forward, residual=residual, **({"needs": needs} | options))
        assert all(a is None or same_bits(a, b) for a, b in zip(got, want, strict=True)), options

    again(mask=np.ones((n, s), bool))
    again(**{out: apart})
    again(needs=needs[1:])
    set_tuning("cached_bytes=0,stream_run_bytes=0,l2_bytes=0,group_bytes=0,map_bytes=0")
    again()
    again(out=p.x)


def test_any_memory_order_of_the_residual():
    for activation in ("silu", "leaky_relu"):
        p = Problem(Shape("ncs", 5, 20, 49), FLOAT32, activation)
        forward = p.forward(residual=p.z)
        want = p.backward(forward, residual=p.z, needs=NEEDS)
        z = np.asfortranarray(p.z)
        got = p.backward(forward, residual=z, needs=NEEDS)
        assert same_bits(got.dresidual, want.dresidual) and same_bits(got.dx, want.dx)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_differences(activation, with_residual, stats):
    """Of the library's own forward in float64, along random directions of x, gamma, beta and the residual."""
    p = Problem(Shape("ncs", 4, 3, 11), FLOAT64, activation)
    z = p.z if with_residual else None
    forward = p.forward(residual=z)
    needs = NEEDS if with_residual else NEEDS[:3]
    gradients = p.backward(forward, residual=z, needs=needs, stats=stats)
    mean, var = batchnorm.moments(p.x)

    def loss(x, gamma, beta, z):
        if stats == "batch":
            y = batchnorm.batch_norm_train(x, gamma, beta, residual=z, **p.options).y
        else:
            y = batchnorm.batch_norm(x, mean, var, gamma, beta, residual=z, **p.options)
        return float((y * p.dy).sum())

    at = [p.x, p.gamma, p.beta, z]
    got = [*gradients, getattr(gradients, "dresidual", None)]
    generator, step = rng(7), 1e-6
    for i in range(4 if with_residual else 3):
        direction = generator.normal(size=at[i].shape)
        ahead, behind = (
            loss(*[a + sign * step * direction if j == i else a for j, a in enumerate(at)])
            for sign in (1, -1)
        )
        difference = (ahead - behind) / (2 * step)
        assert abs(difference - (got[i] * direction).sum()) <= 2e-7 * np.abs(got[i] * direction).sum() + 1e-8


# ---- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["leaky_relu", "relu6", "tanh", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_level(dtype, activation):
    x = many_values(dtype)
    before = batchnorm.get_isa()
    results = []
    try:
        for level in batchnorm.isa_levels():
            batchnorm.set_isa(level)
            p = Problem(Shape("nsc", 245, 20, 1), dtype, activation)
            forward = p.forward(residual=p.z)
            gradients = p.backward(forward, residual=p.z, needs=NEEDS)
            results.append((apply(x, activation), slope_at(x, x, activation), forward.y, *gradients))
    finally:
        batchnorm.set_isa(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("activation", ["leaky_relu", "sigmoid"])
@pytest.mark.parametrize("streamed", [False, True])
def test_same_bits_by_any_number_of_threads(activation, streamed, threads, set_tuning):
    for shape in SHARED_SHAPES[::2]:
        p = Problem(shape, FLOAT32, activation)
        batchnorm.set_num_threads(1)
        want = p.forward(residual=p.z)
        wanted = p.backward(want, residual=p.z, needs=NEEDS)
        batchnorm.set_num_threads(threads)
        set_tuning(
            "cached_bytes=0,stream_run_bytes=0,parallel_elements=0" if streamed else "parallel_elements=0"
        )
        got = p.forward(residual=p.z)
        gradients = p.backward(got, residual=p.z, needs=NEEDS)
        assert same_bits(got.y, want.y) and same_bits(gradients.dresidual, wanted.dresidual)
        assert all(same_bits(a, b) for a, b in zip(gradients, wanted, strict=True))


# ---- other functions, and the layer ----------------------------------------------------------------


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_layer(activation, with_residual, training):
    p = Problem(Shape("ncs", 5, 4, 33), FLOAT32, activation)
    layer = batchnorm.BatchNorm(4, allow_initial_statistics=True, **p.options)
    layer.gamma, layer.beta = p.gamma, p.beta
    layer(p.x, residual=p.z)
    z = p.z if with_residual else None
    mean, var = layer.running_mean.astype(np.float64), layer.running_var
    y = layer(p.x, residual=z, training=training, keep=True)
    dx = layer.backward(p.dy)
    if training:
        forward = p.forward(residual=z)
    else:
        given = batchnorm.batch_norm(p.x, mean, var, p.gamma, p.beta, residual=z, **p.options)
        forward = batchnorm.TrainResult(given, mean, 1 / np.sqrt(var.astype(np.float64) + 1e-5))
    stats = "batch" if training else "fixed"
    want = p.backward(forward, residual=z, stats=stats, needs=NEEDS if with_residual else NEEDS[:3])
    assert same_bits(y, forward.y) and same_bits(dx, want.dx)
    assert same_bits(layer.dgamma, want.dgamma) and same_bits(layer.dbeta, want.dbeta)
    if with_residual:
        assert same_bits(layer.dresidual, want.dresidual)


def test_the_layer_keeps_its_slope(tmp_path):
    assert batchnorm.BatchNorm(activation="relu").slope is None
    assert "slope" not in repr(batchnorm.BatchNorm(activation="leaky_relu"))
    assert batchnorm.BatchNorm(activation="leaky_relu").slope == 0.01
    layer = batchnorm.BatchNorm(3, activation="leaky_relu", slope=0.25)
    assert "activation='leaky_relu', slope=0.25" in repr(layer)
    state = layer.state_dict()
    assert state["slope"] == 0.25 and "slope" not in batchnorm.BatchNorm(3, activation="tanh").state_dict()
    layer.save(tmp_path / "layer.npz")
    loaded = batchnorm.BatchNorm.load(tmp_path / "layer.npz")
    assert (loaded.activation, loaded.slope) == ("leaky_relu", 0.25)
    assert batchnorm.BatchNorm(activation="leaky_relu", slope=0.25).load_state_dict(state).num_features == 3
    with pytest.raises(ValueError, match=r"slope is 0\.25 in the state, expected 0.01 as in this layer"):
        batchnorm.BatchNorm(activation="leaky_relu").load_state_dict(state)
    with pytest.raises(ValueError, match="missing slope"):
        layer.load_state_dict({name: value for name, value in state.items() if name != "slope"})
    with pytest.raises(ValueError, match="slope is given with activation='relu'"):
        batchnorm.BatchNorm(activation="relu", slope=0.25)


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_knows_that_its_residual_is_gone(training):
    p = Problem(Shape("ncs", 5, 4, 33), FLOAT32, "silu")
    layer = batchnorm.BatchNorm(4, activation="silu", allow_initial_statistics=True)
    layer(p.x)
    layer(p.x, residual=p.z, out=p.z, training=training, keep=True)
    with pytest.raises(RuntimeError, match=r"overwritten.*nor the residual"):
        layer.backward(p.dy)
    z = residual_of(Shape("ncs", 5, 4, 33), FLOAT32)
    layer(p.x, residual=z, training=training, keep=True)
    layer.backward(p.dy, out=z)
    with pytest.raises(RuntimeError, match=r"overwritten.*nor the residual"):
        layer.backward(p.dy)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", NEW)
def test_ghost_batches(activation, with_residual):
    """Each part is a call of its own."""
    p = Problem(Shape("ncs", 6, 4, 9), FLOAT64, activation)
    z = p.z if with_residual else None
    size = {"virtual_batch_size": 2}
    forward = batchnorm.ghost_batch_norm_train(p.x, p.gamma, p.beta, residual=z, **size, **p.options)
    statistics = (forward.mean, forward.inv_std, p.gamma, p.beta)
    needs = NEEDS if with_residual else NEEDS[:3]
    got = batchnorm.ghost_batch_norm_backward(
        p.dy, p.x, *statistics, residual=z, needs=needs, **size, **p.options
    )
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        q = Problem(Shape("ncs", 6, 4, 9), FLOAT64, activation)
        q.x, q.dy, q.z = p.x[part], p.dy[part], p.z[part]
        want = q.forward(residual=q.z if with_residual else None)
        gradients = q.backward(want, residual=q.z if with_residual else None, needs=needs)
        assert same_bits(forward.y[part], want.y) and same_bits(got.dx[part], gradients.dx)
        assert not with_residual or same_bits(got.dresidual[part], gradients.dresidual)


@pytest.mark.parametrize("stats", ["batch", "fixed"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("direction", ["ncs", "nsc"])
def test_scale_and_shift_per_sample(direction, activation, with_residual, in_place, stats):
    """With equal rows they are those of all samples."""
    shape = Shape(direction, 3, 4, 9)
    p = Problem(shape, FLOAT64, activation)
    gamma, beta = (np.tile(v, (3, 1)) for v in (p.gamma, p.beta))
    z = p.z if with_residual else None
    forward = batchnorm.batch_norm_train(p.x, gamma, beta, residual=z, **p.options)
    want = p.forward(residual=z)
    assert np.allclose(forward.y, want.y, rtol=1e-13, atol=1e-13)
    assert hasattr(forward, "activation_mask") == (with_residual and activation in PIECEWISE)
    needs = NEEDS if with_residual else NEEDS[:3]
    wanted = p.backward(want, residual=z, stats=stats, needs=needs)
    outs = {"out": p.dy.copy(order="K"), "out_residual": z} if in_place and with_residual else {}
    got = batchnorm.batch_norm_backward(
        p.dy,
        p.x,
        want.mean,
        want.inv_std,
        gamma,
        beta,
        residual=z,
        stats=stats,
        needs=needs,
        **outs,
        **p.options,
    )
    assert np.allclose(got.dx, wanted.dx, rtol=1e-12, atol=1e-12)
    assert np.allclose(got.dgamma.sum(axis=0), wanted.dgamma, rtol=1e-12, atol=1e-12)
    if with_residual:
        assert np.allclose(got.dresidual, wanted.dresidual, rtol=1e-13, atol=1e-13)


def test_per_sample_residual_below_the_output():
    p = Problem(Shape("ncs", 3, 4, 9), FLOAT64, "silu")
    gamma = np.tile(p.gamma, (3, 1))
    forward = batchnorm.batch_norm_train(p.x, gamma, p.beta, residual=p.z, **p.options)
    arguments = (p.dy, p.x, forward.mean, forward.inv_std, gamma, p.beta)
    options = {"stats": "fixed", "needs": ("dx",), **p.options}
    want = batchnorm.batch_norm_backward(*arguments, residual=p.z, **options).dx
    memory = np.zeros((4, 4, 9))
    memory[:3] = p.z
    got = batchnorm.batch_norm_backward(*arguments, residual=memory[:3], out=memory[1:], **options).dx
    assert same_bits(got, want)


@pytest.mark.parametrize("activation", PIECEWISE)
def test_double_backward_of_piecewise_linear_ones(activation):
    """They only scale dy: the second order is that without an activation, of the gated dy."""
    p = Problem(Shape("ncs", 5, 4, 33), FLOAT64, activation)
    forward = p.forward()
    v = p.forward(activation=None, slope=None).y
    slope = derivative(v, activation, 0.125)
    ddx = p.z
    rest = (p.x, forward.mean, forward.inv_std, p.gamma, p.beta)
    got = batchnorm.batch_norm_double_backward(ddx, None, None, p.dy, *rest, **p.options)
    want = batchnorm.batch_norm_double_backward(ddx, None, None, p.dy * slope, *rest)
    assert np.allclose(got.dx, want.dx, rtol=1e-13, atol=1e-13)
    assert np.allclose(got.ddy, want.ddy * slope, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="activation is 'silu', whose curvature is not computed"):
        batchnorm.batch_norm_double_backward(ddx, None, None, p.dy, *rest, activation="silu")


# ---- errors --------------------------------------------------------------------------------------


def calls(**options):
    """One call of each function with an activation, and its name."""
    x = np.ones((4, 2, 3), np.float32) * np.arange(4, dtype=np.float32)[:, None, None]
    mean, var = np.zeros(2), np.ones(2)
    yield lambda: batchnorm.batch_norm(x, mean, var, **options)
    yield lambda: batchnorm.batch_norm_train(x, **options)
    yield lambda: batchnorm.batch_norm_backward(x, x, mean, var, **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"activation": "Leaky_ReLU"},
            ValueError,
            "activation is 'Leaky_ReLU'.*'silu'; did you mean 'leaky_relu'",
        ),
        ({"activation": "swish"}, ValueError, "activation is 'swish'.*'silu'"),
        ({"activation": 1}, TypeError, "activation is 1 .*'silu'"),
        ({"activation": "relu", "slope": 0.1}, ValueError, "slope is given with activation='relu'.*drop it"),
        ({"slope": 0.1}, ValueError, "slope is given with activation=None.*drop it, or use.*'leaky_relu'"),
        ({"activation": "leaky_relu", "slope": "0.1"}, TypeError, "slope is '0.1' .str., expected a finite"),
        ({"activation": "leaky_relu", "slope": True}, TypeError, "slope is True .bool., expected a finite"),
        ({"activation": "leaky_relu", "slope": np.ones(2)}, TypeError, "slope is of type numpy.ndarray"),
        ({"activation": "leaky_relu", "slope": np.nan}, ValueError, "slope is nan, expected a finite number"),
        ({"activation": "leaky_relu", "slope": -np.inf}, ValueError, "slope is -inf, expected a finite"),
        ({"activation": "leaky_relu", "slope": 1e39}, ValueError, r"slope is 1e\+39.*range of float32"),
        ({"activation": "leaky_relu", "slope": 10**400}, ValueError, "slope is too large for a float"),
    ],
    ids=str,
)
def test_errors(options, error, words):
    for call in calls(**options):
        with pytest.raises(error, match=words):
            call()


def test_slopes_that_are_numbers():
    x = column([-1.0, 2.0, 3.0], FLOAT64)
    want = apply(x, "leaky_relu", slope=2.0)
    for slope in (2, np.float32(2), np.int64(2)):
        assert same_bits(apply(x, "leaky_relu", slope=slope), want)
    assert apply(x, "leaky_relu", slope=1e39)[0] == -1e39


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "silu", "needs": NEEDS}, "residual is None, expected that of the forward pass"),
        (
            {"activation": "relu6", "needs": NEEDS},
            "activation_mask is None, expected that of the forward pass",
        ),
        ({"residual": 1}, "residual is given without an activation.*drop it"),
        (
            {"activation": "relu", "residual": 1, "activation_mask": 1},
            "residual and activation_mask.*drop one",
        ),
        (
            {"activation": "tanh", "activation_mask": 1},
            "activation_mask is given with activation='tanh'.*drop one",
        ),
    ],
    ids=str,
)
def test_errors_of_backward(options, words):
    p = Problem(Shape("ncs", 3, 2, 5), FLOAT32, None)
    given = {"residual": p.z, "activation_mask": np.zeros(batchnorm.activation_mask_bytes(p.x), np.uint8)}
    options = {name: given.get(name, value) for name, value in options.items()}
    with pytest.raises(ValueError, match=words):
        batchnorm.batch_norm_backward(p.dy, p.x, np.zeros(2), np.ones(2), **options)


def test_errors_about_the_residual_of_backward():
    p = Problem(Shape("ncs", 3, 2, 5), FLOAT32, "silu")
    forward = p.forward(residual=p.z)
    for z, error, words in (
        (p.z.astype(np.float64), TypeError, "residual has dtype float64, expected float32"),
        (p.z[:, :, 1:], ValueError, "residual has shape"),
        ([1.0], TypeError, "residual is"),
    ):
        with pytest.raises(error, match=words):
            p.backward(forward, residual=z)
    both = np.zeros((4, 2, 5), np.float32)
    with pytest.raises(ValueError, match="out overlaps residual without being the same array"):
        p.backward(forward, residual=both[:3], out=both[1:])


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.skipif(BFLOAT16 is None, reason="ml_dtypes is not installed")
def test_bfloat16_is_rounded_once(activation):
    """float32 is so much wider that rounding its result is rounding the exact one, almost everywhere."""
    bits = np.arange(2**16, dtype=np.uint16)
    x = bits[(bits & 0x7F80) != 0x7F80].view(BFLOAT16)[:, None]  # all finite ones
    want = activate(reference.widen(x), activation).astype(BFLOAT16)
    assert np.mean(apply(x, activation) == want) > 0.999
