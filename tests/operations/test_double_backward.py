"""`batch_norm_double_backward` against the second derivatives of the reference, with every option."""

from __future__ import annotations

import itertools
from dataclasses import replace

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_backward as backward
from batchnorm import batch_norm_double_backward as double_backward
from batchnorm import batch_norm_train as train

from support import reference, tolerances
from support.checks import all_same_bits, differing, environments, excess, running_on, same_bits
from support.problem import ACTIVATIONS, AFFINES, DTYPES, POSITIONS, SMOOTH, STATS, Problem, rng

FLOAT32, FLOAT64 = DTYPES[:2]
SHAPES = {
    "runs": (Problem(6, 3, (5,)), (None, 4)),
    "rows": (Problem(6, 4), (None, 3)),
    "wide": (Problem(4, 17, (3,)), (None, 3)),
}
NAMES = ("ddy", "dx", "dgamma", "dbeta", "dresidual")


def cotangents(p: Problem) -> dict[str, np.ndarray]:
    """ddx, ddgamma, ddbeta and ddresidual as far as the forward had them; tensors (N, C, S)."""
    g, d = rng("cotangents", str(replace(p, last=False))), p.data
    made = {"ddx": g.standard_normal(d.x.shape).astype(p.dtype)}
    for name, parameter in zip(("ddgamma", "ddbeta"), p.parameters, strict=True):
        if parameter is not None:
            made[name] = g.standard_normal(parameter.shape).astype(parameter.dtype)
    if p.residual:
        made["ddresidual"] = g.standard_normal(d.x.shape).astype(p.dtype)
    return made


def results(p: Problem, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    users = {name: p.placed(a) if a.ndim == 3 else a for name, a in given.items()}
    _, saved = p.train()
    got = double_backward(p.dy, saved, **users)
    return {name: a for name, a in zip(NAMES, got, strict=True) if a is not None}


def complaints(p: Problem, given: dict[str, np.ndarray]) -> list[str]:
    """Everything but v is computed in float64. A result is a sum of products of dy, ddx and gamma with up to
    three factors x_hat, two inv_std and derivatives of the activation, below 2 up to the third: their largest
    magnitudes bound every term."""
    got = results(p, given)
    c = p.call()
    f = reference.forward(c)
    want = reference.double_backward(
        c, f, p.data.dy, *(given.get(n) for n in ("ddx", "ddgamma", "ddbeta", "ddresidual"))
    )
    largest = 1 + max(float(np.abs(c.wide(a)).max()) for a in (*given.values(), p.data.dy))
    with np.errstate(invalid="ignore"):
        inv_std = np.nanmax(f.inv_std)
        term = (
            largest**2
            * 4
            * (1 + inv_std) ** 2
            * (1 + np.abs(f.x_hat).max()) ** 3
            * (1 + np.nanmax(np.abs(f.mean)) * inv_std)
        )
    off_v = 2 * tolerances.forward(c, f, p.dtype).v.max() if p.activation in SMOOTH else 0
    bound, found = (2.0**-46 + off_v) * term, []
    rows = (lambda a: a) if p.affine == "NC" else (lambda a: a[0])
    flip = flipping(p, c, f)
    for name, value in got.items():
        tensor = name in ("ddy", "dx", "dresidual")
        right = getattr(want, name) if tensor else rows(getattr(want, name))
        off = tolerances.stored(value.dtype, right, bound if tensor else bound * f.x_hat[:, 0].size)
        if value.dtype == np.float32:
            off = off + 2.0**-24 * np.abs(right)
        if tensor:
            value = p.plain(value)
        if value.shape != right.shape:
            found.append(f"{name} has shape {value.shape}")
        elif not flip and (worst := excess(value, right, off)) > 1:
            found.append(f"{name} has {worst:.3g} times its bound")
    expected = (
        {"ddy", "dx"}
        | ({"dgamma", "dbeta"} if p.affine else set())
        | ({"dresidual"} if p.residual else set())
    )
    return found + ([] if got.keys() == expected else [f"has {sorted(got)}"])


def flipping(p: Problem, c, f) -> bool:
    """Whether some v lies so near a kink that float32 may see it on the other side."""
    kinks = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6)}.get(p.activation or "", ())
    return any(bool((np.abs(f.v[f.counts] - kink) < 1e-5).any()) for kink in kinks)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_combines(shape, dtype):
    plain, sizes = SHAPES[shape]
    wrong, count = [], 0
    for stats, size, positions, affine, activation, residual in itertools.product(
        STATS, sizes, POSITIONS, AFFINES, ACTIVATIONS, (False, True)
    ):
        p = replace(
            plain, dtype=dtype, stats=stats, size=size, positions=positions, affine=affine,
            activation=activation, residual=residual, last=count % 2 == 1,
        )  # fmt: skip
        count += 1
        if p.forbidden() is None:
            wrong += [f"{p}: {found}" for found in complaints(p, cotangents(p))]
    assert not wrong, f"{len(wrong)} of {count} combinations:\n" + "\n".join(wrong[:30])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "p",
    [Problem(16, 8, (9, 9)), Problem(16, 65, last=True), Problem(300, 20), Problem(3, 2, (4097,))],
    ids=str,
)
def test_larger_ones(p, dtype):
    p = replace(p, dtype=dtype, activation="silu", residual=True, positions="mask")
    given = cotangents(p)
    assert not (found := complaints(p, given)), found
    with running_on(batchnorm.isa_levels()[0], 1):
        want = results(p, given)
    for isa, threads in environments()[::3]:
        with running_on(isa, threads, "parallel_elements=0"):
            assert not differing(results(p, given), want), (isa, threads)
    for layout in ("F", "channels last", "C, step 0", "C, reverse 1", "batch last"):
        assert not complaints(replace(p, layout=layout), given), layout


@pytest.mark.parametrize("stats", STATS)
def test_it_is_linear_and_none_is_zero(stats):
    p = Problem(5, 3, (4,), dtype=FLOAT64, stats=stats, residual=True, activation="tanh")
    given = cotangents(p)
    whole, alone = results(p, given), [results(p, {name: a}) for name, a in given.items()]
    for name in whole:
        np.testing.assert_allclose(sum(a[name] for a in alone), whole[name], rtol=1e-12, atol=1e-12)


def test_what_the_first_order_maps_to_zero():
    """dx does not change with a constant or x itself added to dy, so no ddx leads there."""
    p = Problem(8, 2, (6,), dtype=FLOAT64, eps=0)
    ddy = results(p, {"ddx": cotangents(p)["ddx"]})["ddy"]
    np.testing.assert_allclose(ddy.sum(axis=(0, 2)), 0, atol=1e-12)
    np.testing.assert_allclose((ddy * p.x).sum(axis=(0, 2)), 0, atol=1e-11)


def test_a_gradient_penalty_goes_down():
    """Along the gradient of sum dx^2 with respect to x, that sum falls as fast as the gradient says."""
    p = Problem(6, 3, (4,), dtype=FLOAT64, activation="silu")
    gamma, beta = p.parameters

    def penalty(x):
        _, saved = train(x, gamma, beta, activation="silu")
        return saved, backward(p.dy, saved).dx

    saved, dx = penalty(p.x)
    slope = double_backward(p.dy, saved, ddx=2 * dx)
    assert np.abs(slope.dbeta).max() > 1e-3, "behind a smooth activation beta matters too"
    step = 1e-6
    ahead, behind = (np.sum(penalty(p.x + s * slope.dx)[1] ** 2) for s in (step, -step))
    np.testing.assert_allclose((ahead - behind) / (2 * step), np.sum(slope.dx**2), rtol=1e-6)


def test_x_and_the_residual_may_come_with_the_call():
    p = Problem(5, 4, (3,), activation="silu", residual=True)
    given = cotangents(p)
    users = {name: p.placed(a) if a.ndim == 3 else a for name, a in given.items()}
    saved = p.train(keep=None)[1]
    got = double_backward(p.dy, saved, x=p.x, residual=p.z, **users)
    assert all_same_bits(got, results(p, given).values())


@pytest.mark.parametrize("activation", [None, "silu"])
def test_an_empty_batch(activation):
    x = np.empty((0, 3, 4), np.float32)
    _, saved = train(x, np.ones(3, np.float32), activation=activation)
    got = double_backward(x, saved, ddx=x, ddgamma=np.ones(3, np.float32))
    assert got.ddy.shape == got.dx.shape == x.shape and same_bits(got.dgamma, np.zeros(3, np.float32))
    assert got.dbeta is None and got.dresidual is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ddx": None, "ddgamma": None}, ValueError, "ddx.*(all None|expected at least one)"),
        ({"ddx": np.ones((4, 3, 4))}, ValueError, r"ddx has shape \(4, 3, 4\), expected \(4, 3, 5\)"),
        ({"ddx": np.ones((4, 3, 5), np.float32)}, TypeError, "ddx has dtype float32, expected float64"),
        ({"ddgamma": np.ones(2)}, ValueError, r"ddgamma has shape \(2,\), expected \(3,\)"),
        ({"ddgamma": np.array([0, np.nan, 0])}, ValueError, "ddgamma is nan at channel 1"),
        ({"ddbeta": np.ones(3)}, ValueError, "ddbeta"),
        ({"ddresidual": np.ones((4, 3, 5))}, ValueError, "ddresidual"),
        ({"dy": np.ones((4, 3))}, ValueError, "dy has shape"),
        ({"x": np.ones((4, 3, 5))}, ValueError, "x"),
    ],
    ids=str,
)
def test_errors(change, error, words):
    a = rng("errors").standard_normal((4, 3, 5))
    _, saved = train(a, np.ones(3))
    arguments = {"dy": a, "ddx": a, "ddgamma": np.ones(3)} | change
    with pytest.raises(error, match=words):
        double_backward(arguments.pop("dy"), saved, **arguments)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=str)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_y_serves_as_well(activation, dtype):
    p = Problem(6, 4, (5,), dtype=dtype, activation=activation, affine="NC", positions="mask", stats="renorm")
    given = cotangents(p)
    got, want = results(replace(p, keep="y"), given), results(p, given)
    for name in want:
        near = 2.0**14 * np.finfo(dtype).eps
        np.testing.assert_allclose(got[name], want[name], rtol=near, atol=near * np.abs(want[name]).max())
