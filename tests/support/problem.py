"""A call of batch_norm_train and its backward as data: shape, dtype, layout and options.

A Problem makes its arrays, calls the library, and compares every result with the reference within the bounds
of tolerances.py. A new option of the call is a field here and a line in `reference.py`.
"""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import batchnorm
import numpy as np

from . import reference, tolerances
from .checks import excess
from .layouts import at_offset, place

try:
    import ml_dtypes

    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    BFLOAT16 = None

Array = np.ndarray[Any, Any]

DTYPES = [np.dtype(t) for t in ("float32", "float64", "float16")] + ([] if BFLOAT16 is None else [BFLOAT16])
STATS = ("batch", "given", "renorm", "given and renorm")
POSITIONS = (
    "all", "mask", "lengths", "weights", "mask and weights", "mask per channel",
    "weights and mask per channel",
)  # fmt: skip
AFFINES = (None, "C", "NC")
PIECEWISE, SMOOTH = ("relu", "leaky_relu", "relu6"), ("sigmoid", "tanh", "silu")
ACTIVATIONS = (None, *PIECEWISE, *SMOOTH)
LIMITS = {"rmin": 0.6, "rmax": 1.6, "dmax": 0.75}


def rng(*seed: object) -> np.random.Generator:
    """A generator that depends on nothing but its arguments."""
    return np.random.default_rng([zlib.crc32(repr(part).encode()) for part in seed])


class Forbidden(NamedTuple):
    """An option combination that is an error, and words of its message."""

    error: type[Exception]
    words: str

    def mismatch(self, error: Exception) -> str | None:
        """What another error than the right one is."""
        right = isinstance(error, self.error) and re.search(self.words, str(error))
        return None if right else f"expected {self.error.__name__} with {self.words!r}, got {error!r}"


@dataclass(frozen=True)
class Problem:
    """x is (n, channels, *inner), or (n, *inner, channels) with `last`. `size` is virtual_batch_size."""

    n: int
    channels: int
    inner: tuple[int, ...] = ()
    last: bool = False
    dtype: np.dtype = DTYPES[0]
    stats: str = "batch"
    size: int | None = None
    positions: str = "all"
    affine: str | None = "C"
    activation: str | None = None
    slope: float = 0.125
    residual: bool = False
    keep: str | None = "x"
    running: bool = False
    layout: str = "C"
    offset: int = 0
    eps: float = 1e-5
    seed: int = 0

    def __str__(self) -> str:
        """What it takes to see the case: the sizes, and what is not plain."""
        named = (f for f in fields(self)[3:] if getattr(self, f.name) != f.default)
        sizes = "x".join(map(str, (self.n, self.channels, *self.inner)))
        return " ".join([sizes, *(f"{f.name}={getattr(self, f.name)}" for f in named)])

    # ---- arrays ------------------------------------------------------------------------------------------

    @property
    def spread(self) -> int:
        return int(np.prod(self.inner, dtype=int))

    @property
    def channel_axis(self) -> int:
        return -1 if self.last else 1

    @property
    def starts(self) -> tuple[int, ...]:
        """First samples of the parts; a last part of one value joins a larger one before."""
        starts = tuple(range(0, self.n, self.size or max(self.n, 1))) or (0,)
        alone = len(starts) > 1 and (self.n - starts[-1]) * self.spread < 2 <= starts[1] * self.spread
        return starts[:-1] if alone else starts

    @property
    def data(self) -> SimpleNamespace:
        return _data(self.n, self.channels, self.inner, self.dtype, self.seed)

    def user(self, a: Array) -> Array:
        """(N, C or 1, S) values as the call's tensors have them."""
        a = a.reshape(*a.shape[:2], *(self.inner if a.shape[2] == self.spread else a.shape[2:]))
        return np.moveaxis(a, 1, -1) if self.last else a

    def plain(self, a: Array) -> Array:
        """A tensor of the call as (N, C, S)."""
        return (np.moveaxis(a, -1, 1) if self.last else a).reshape(self.n, self.channels, self.spread)

    def placed(self, a: Array) -> Array:
        """In this layout, or `offset` bytes past a multiple of 64."""
        view = place(self.user(a), self.layout).view
        return at_offset(view, self.offset) if self.offset else view

    @property
    def x(self) -> Array:
        return self.placed(self.data.x)

    @property
    def dy(self) -> Array:
        return self.placed(self.data.dy)

    @property
    def z(self) -> Array:
        return self.placed(self.data.z)

    @property
    def parameters(self) -> tuple[Array | None, Array | None]:
        d = self.data
        return {
            None: (None, None),
            "C": (d.gamma[0], d.beta[0]),
            "NC": (d.gamma[: self.n], d.beta[: self.n]),
        }[self.affine]

    def position_arguments(self) -> dict[str, Any]:
        d, given = self.data, {}
        if "mask" in self.positions:
            given["mask"] = self.user(d.element_mask) if "channel" in self.positions else self.short(d.mask)
        if "weights" in self.positions:
            given["weights"] = self.short(d.weights)
        if self.positions == "lengths":
            given["lengths"] = d.lengths
            if len(self.inner) > 1:
                given["lengths_axis"] = 1 if self.last else 2
        return given

    def short(self, a: Array) -> Array:
        """(N, 1, S) values in the shape of x without its channel axis."""
        return a.reshape(self.n, *self.inner)

    def options(self, **more: Any) -> dict[str, Any]:
        """Keywords of batch_norm_train; written arrays are new ones."""
        d = self.data
        given: dict[str, Any] = {"channel_axis": self.channel_axis, "eps": self.eps, "keep": self.keep}
        if "given" in self.stats:
            given |= {"mean": d.mean, "var": d.var}
        if "renorm" in self.stats:
            given["renorm"] = {"mean": d.mean.copy(), "std": d.std.copy(), **LIMITS}
        if self.size is not None:
            given["virtual_batch_size"] = self.size
        if self.activation is not None:
            given["activation"] = self.activation
        if self.activation == "leaky_relu":
            given["slope"] = self.slope
        if self.residual:
            given["residual"] = self.z
        if self.running:
            given |= {
                "running_mean": d.running_mean.copy(),
                "running_var": d.running_var.copy(),
                "decay": 0.75,
            }
        return given | self.position_arguments() | more

    # ---- the library -------------------------------------------------------------------------------------

    def forbidden(self) -> Forbidden | None:
        """Why mathematics forbids the call, if it does; any one reason will do."""
        from_y = "keep.*(activation|residual).*y does not tell x"
        reasons = {
            from_y: self.keep == "y" and (self.residual or self.activation not in (None, "leaky_relu")),
            "lengths": self.positions == "lengths" and not self.inner,
            "one value per channel": "given" not in self.stats and self.size == self.spread == 1 < self.n,
        }
        words = "|".join(word for word, there in reasons.items() if there)
        return Forbidden(ValueError, words) if words else None

    def train(self, **more: Any) -> Any:
        """`y, saved` of the library."""
        return batchnorm.batch_norm_train(self.x, *self.parameters, **self.options(**more))

    def results(self, dy: Array | None = None, **more: Any) -> dict[str, Array]:
        """All that a forward and a backward give, by name. `more` goes to both."""
        options = self.options(**more)
        x = self.x
        y, saved = batchnorm.batch_norm_train(x, *self.parameters, **options)
        made = {"y": y, **{name: getattr(saved, name) for name in ("mean", "var", "inv_std", "count")}}
        made |= {name: options[name] for name in ("running_mean", "running_var") if self.running}
        if "renorm" in self.stats:
            made |= {"r": saved.r, "d": saved.d}
        threads = {name: a for name, a in more.items() if name == "num_threads"}
        got = batchnorm.batch_norm_backward(self.dy if dy is None else dy, saved, **threads)
        made |= {name: getattr(got, name) for name in ("dx", "dgamma", "dbeta", "dresidual")}
        if self.keep == "y":
            made["kept_channels"] = saved.kept_channels
        return {name: a for name, a in made.items() if a is not None}

    # ---- the reference -----------------------------------------------------------------------------------

    def call(self) -> reference.Call:
        """The same for the reference."""
        d = self.data
        gamma, beta = self.parameters
        masks = {"channel": d.element_mask, "mask": d.mask, "lengths": d.length_mask}
        mask = next((a for word, a in masks.items() if word in self.positions), None)
        return reference.Call(
            x=d.x, gamma=None if gamma is None else np.atleast_2d(gamma),
            beta=None if beta is None else np.atleast_2d(beta),
            mean=d.mean if "given" in self.stats else None, var=d.var if "given" in self.stats else None,
            residual=d.z if self.residual else None, mask=mask,
            weights=d.weights if "weights" in self.positions else None, starts=self.starts,
            renorm={"mean": d.mean, "std": d.std, **LIMITS} if "renorm" in self.stats else None,
            eps=self.eps, activation=self.activation, slope=self.stored_slope,
            kind=np.longdouble if self.dtype == np.float64 else np.float64,
        )  # fmt: skip

    @property
    def stored_slope(self) -> float:
        """The slope in the type that it is applied in."""
        return self.slope if self.dtype == np.float64 else float(np.float32(self.slope))

    def failures(self, made: dict[str, Array] | None = None) -> list[str]:
        """What is not as the reference has it, in words."""
        made = self.results() if made is None else made
        return _failures(self, made)

    def check(self) -> None:
        found = self.failures()
        assert not found, f"{self}: {'; '.join(found)}"


def _as_the_reference_sees(p: Problem) -> Problem:
    return replace(p, last=False, layout="C", offset=0, keep="x", running=False)


@functools.lru_cache(maxsize=4)
def _solution(p: Problem) -> tuple[Any, ...]:
    c = p.call()
    f = reference.forward(c)
    return c, f, reference.backward(c, f, p.data.dy), tolerances.forward(c, f, p.dtype)


@functools.lru_cache(maxsize=4)
def _limits(p: Problem, kept: tuple[bool, ...] | None) -> Any:
    """Bounds of the gradients; `kept` says of which channels x is kept beside y."""
    c, f, want, bounds = _solution(p)
    return tolerances.backward(c, f, p.data.dy, want, p.dtype, bounds, kept)


def _failures(p: Problem, made: dict[str, Array]) -> list[str]:
    seen = _as_the_reference_sees(p)
    c, f, want, bounds = _solution(seen)
    kept = tuple(i in made["kept_channels"] for i in range(p.channels)) if p.keep == "y" else None
    limits = _limits(seen, kept)
    per_part = (lambda a: a) if p.size is not None else (lambda a: a[0])
    gamma, beta = p.parameters
    rows = (lambda a: a) if p.affine == "NC" else (lambda a: a[0])
    expected = {"y": (p.plain(made["y"]), f.y, bounds.y, p.dtype)}
    for name in ("mean", "var", "inv_std", "r", "d"):
        expected[name] = (
            made.get(name),
            per_part(getattr(f, name)),
            per_part(getattr(bounds, name)),
            np.float64,
        )
    expected["count"] = (made["count"], per_part(f.n), 2**-50 * per_part(f.n), np.float64)
    expected["dx"] = (p.plain(made["dx"]), want.dx, limits.dx, p.dtype)
    if p.residual:
        expected["dresidual"] = (p.plain(made["dresidual"]), want.dresidual, limits.dresidual, p.dtype)
    for name, parameter in (("dgamma", gamma), ("dbeta", beta)):
        if parameter is not None:
            value, error = rows(getattr(want, name)), rows(getattr(limits, name))
            bound = tolerances.parameter_error(parameter.dtype, value, error)
            expected[name] = (made[name], value, bound, parameter.dtype)
    if p.running:
        old = {name: getattr(p.data, name) for name in ("running_mean", "running_var")}
        new = reference.running(c, f, *old.values(), 0.75)
        for (name, before), value, error in zip(
            old.items(), new, tolerances.batch_errors(c, f, p.dtype), strict=True
        ):
            step = (value - 0.75 * before) / 0.25
            bound = tolerances.running_error(before.dtype, 0.75, before, step, error)
            expected[name] = (made[name], value, bound, before.dtype)
    found = []
    for name, (got, value, bound, dtype) in expected.items():
        if got is None:
            continue
        if got.shape != value.shape or got.dtype != dtype:
            found.append(f"{name} is {got.dtype} {got.shape}, expected {dtype} {value.shape}")
        elif (worst := excess(got, value, bound)) > 1:
            found.append(f"{name} has {worst:.3g} times its bound")
    absent = {"dresidual": not p.residual, "dgamma": gamma is None, "dbeta": beta is None}
    found += [f"{name} is there" for name, no in absent.items() if no and name in made]
    return found


@functools.lru_cache(maxsize=64)
def _data(n: int, channels: int, inner: tuple[int, ...], dtype: np.dtype, seed: int) -> SimpleNamespace:
    """All arrays a Problem of these sizes may need. Tensors and masks are (N, C or 1, S)."""
    g = rng(n, channels, inner, seed)
    spread = int(np.prod(inner, dtype=int))
    shape, kind = (n, channels, spread), np.float64 if dtype == np.float64 else np.float32
    rows = (max(n, 1), channels)
    offset, scale = g.uniform(-3, 3, (channels, 1)), 2.0 ** g.uniform(-2, 2, (channels, 1))
    d = SimpleNamespace(
        x=(g.standard_normal(shape) * scale + offset).astype(dtype),
        dy=(g.standard_normal(shape) + 0.25).astype(dtype), z=(2 * g.standard_normal(shape)).astype(dtype),
        gamma=(g.uniform(0.5, 2, rows) * g.choice([-1, 1], rows)).astype(kind),
        beta=(2 * g.standard_normal(rows)).astype(kind),
        mean=(offset[:, 0] + g.uniform(-1, 1, channels)).astype(kind),
        std=(scale[:, 0] * 2.0 ** g.uniform(-1, 1, channels)).astype(kind),
        running_mean=g.standard_normal(channels).astype(kind),
        running_var=g.uniform(0.5, 2, channels).astype(kind),
        mask=g.random((n, 1, spread)) < 0.7, element_mask=g.random(shape) < 0.6,
        weights=g.uniform(0.1, 3, (n, 1, spread)) * (g.random((n, 1, spread)) < 0.9),
    )  # fmt: skip
    d.var = d.std * d.std
    # Something counts; but of the last channel one value, and of the one before none.
    d.mask.reshape(-1)[:2], d.weights.reshape(-1)[:2], d.element_mask[:2, :1, :2] = True, 1.5, True
    if channels > 1 and d.x.size:
        d.element_mask[:, -1] = False
        d.element_mask[n // 2 : n // 2 + 1, -1, :1] = True
    if channels > 2:
        d.element_mask[:, -2] = False
    steps = inner[0] if inner else 1
    d.lengths = g.integers(0, steps + 1, n)
    d.lengths[: n // 2] = steps
    full = np.arange(steps) < d.lengths[:, None]
    d.length_mask = np.repeat(full, spread // steps if steps else 0, axis=1)[:, None, :]
    for a in vars(d).values():
        a.flags.writeable = False
    return d
