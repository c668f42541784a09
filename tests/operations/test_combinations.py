"""Every option with every other, against one reference.

First the full product of the options on four tiny shapes. Then all pairs of the options, edge shapes, dtypes
and memory layouts, whose bits must also be the same on every instruction set, with any number of threads and
at any address.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import batchnorm
import numpy as np
import pytest
from batchnorm import batch_norm_train as train

from support.checks import differing, environments, running_on
from support.problem import ACTIVATIONS, AFFINES, DTYPES, POSITIONS, STATS, Problem, rng
from support.tolerances import U64, VAR_FLOAT64

# ---- the full product ------------------------------------------------------------------------------------

# Runs, rows, rows of more than one block of lanes, and several inner axes. The sizes of parts: all samples,
# equal parts, and ragged ones.
TINY = {
    "runs": (Problem(6, 3, (5,)), (None, 3, 4)),
    "rows": (Problem(6, 4, dtype=DTYPES[1]), (None, 2, 4)),
    "wide rows": (Problem(4, 17, (3,)), (None, 2, 3)),
    "images": (Problem(8, 2, (2, 2), dtype=DTYPES[2]), (None, 4, 3)),
}


def product(shape: str) -> Iterable[Problem]:
    """All combinations; those that share the reference's work follow one another."""
    plain, sizes = TINY[shape]
    for stats, size, positions, affine, activation, residual in itertools.product(
        STATS, sizes, POSITIONS, AFFINES, ACTIVATIONS, (False, True)
    ):
        p = replace(
            plain,
            stats=stats,
            size=size,
            positions=positions,
            affine=affine,
            activation=activation,
            residual=residual,
        )
        for keep, running, last in itertools.product("xy", (False, True), (False, True)):
            yield replace(p, keep=keep, running=running, last=last)


def complaint(p: Problem) -> str | None:
    """What is wrong with a combination, or None. Forbidden ones must be errors that say why."""
    forbidden = p.forbidden()
    try:
        made = p.results()
    except Exception as error:
        if forbidden is None:
            return f"{type(error).__name__}: {error}"
        return forbidden.mismatch(error)
    if forbidden is not None:
        return "is served, though mathematics forbids it"
    return "; ".join(p.failures(made)) or None


@pytest.mark.quick
def test_some_of_everything_combines():
    check_all(itertools.islice(product("runs"), 0, None, 97))


@pytest.mark.parametrize("shape", TINY)
def test_everything_combines(shape):
    check_all(product(shape))


def check_all(problems: Iterable[Problem]) -> None:
    found = {p: complaint(p) for p in problems}
    wrong = [f"{p}: {said}" for p, said in found.items() if said is not None]
    assert not wrong, f"{len(wrong)} of {len(found)} combinations:\n" + "\n".join(wrong[:30])


# ---- all pairs -------------------------------------------------------------------------------------------

# (n, channels, inner): one step on either side of lanes (16), folded rows (64), tiles and blocks, few rows
# and many, and enough elements for some threads in every way of cutting them.
EDGES = [
    (1, 3, (17,)), (3, 2, (4097,)), (5, 20, (49,)), (2, 65, (33,)), (300, 2, (7,)), (17, 3, ()),
    (4097, 3, ()), (245, 20, ()), (33, 65, ()), (9, 16, (7, 7)), (37, 1000, ()), (2, 2, (16385,)),
    (1, 1, (40001,)), (17, 64, (35,)), (3, 33, (529,)), (1500, 3, (9,)), (40001, 1, ()), (90, 20, (49,)),
    (1025, 100, ()), (31, 1000, ()), (20, 2049, ()), (2, 1, ()), (2, 16, ()), (3, 64, ()), (6, 128, ()),
    (5, 63, ()), (4, 15, (15,)), (16, 17, (2,)), (7, 5, (2, 3, 4)), (2, 31, (4, 4)),
]  # fmt: skip
LAYOUTS = [
    "C", "F", "channels last", "batch last", "channels first", "C, step 0", "C, reverse 0", "C, crop 1",
    "C, step -1", "C, reverse -1", "channels last, step 1", "channels last, crop -1", "rest first",
    "batch last, reverse 1",
]  # fmt: skip
FACTORS: dict[str, list[Any]] = {
    "shape": EDGES,
    "layout": LAYOUTS,
    "activation": list(ACTIVATIONS),
    "positions": list(POSITIONS),
    "dtype": DTYPES,
    "parts": ["one", "two", "ragged", "of two samples"],
    "stats": list(STATS),
    "affine": list(AFFINES),
    "last": [False, True],
    "residual": [False, True],
    "keep": ["x", "y"],
    "running": [False, True],
}


def problem_of(row: dict[str, Any]) -> Problem:
    n, channels, inner = row["shape"]
    size = {"one": None, "two": (n + 1) // 2, "ragged": n // 3 + 1, "of two samples": 2}[row["parts"]]
    options = {name: value for name, value in row.items() if name not in ("shape", "parts")}
    return Problem(n, channels, inner, size=size, **options)


def served(row: dict[str, Any]) -> bool:
    return problem_of(row).forbidden() is None


def all_pairs(
    factors: dict[str, list[Any]], allowed: Callable[[dict[str, Any]], bool], seed: int = 0
) -> list[dict[str, Any]]:
    """Rows that hold every pair of values that is allowed with the other factors' first values; greedily."""
    order, names = random.Random(seed), list(factors)
    first = {name: values[0] for name, values in factors.items()}
    pairs = [
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
        if allowed(first | {a: factors[a][i], b: factors[b][j]})
    ]
    order.shuffle(pairs)
    missing, rows = dict.fromkeys(pairs), []

    def gain(chosen: dict[str, int], name: str, i: int) -> int:
        key = lambda other: tuple(sorted(((name, i), other), key=lambda p: names.index(p[0])))  # noqa: E731
        return sum(key(other) in missing for other in chosen.items())

    while missing:
        chosen = dict(next(iter(missing)))
        for name in order.sample(names, len(names)):
            if name not in chosen:
                values = order.sample(range(len(factors[name])), len(factors[name]))
                row = {other: factors[other][i] for other, i in chosen.items()}
                values = [i for i in values if allowed(first | row | {name: factors[name][i]})]
                chosen[name] = max(values, key=lambda i, name=name: gain(chosen, name, i))
        rows.append({name: factors[name][chosen[name]] for name in names})
        for couple in itertools.combinations([(name, chosen[name]) for name in names], 2):
            missing.pop(couple, None)
    return rows


@functools.cache
def rows() -> list[Problem]:
    return [problem_of(row) for row in all_pairs(FACTORS, served)]


def test_the_rows_hold_every_pair():
    held, first = set(), {name: values[0] for name, values in FACTORS.items()}
    for row in all_pairs(FACTORS, served):
        assert served(row)
        held |= set(itertools.combinations([(name, repr(row[name])) for name in FACTORS], 2))
    for a, b in itertools.combinations(FACTORS, 2):
        for i, j in itertools.product(FACTORS[a], FACTORS[b]):
            assert ((a, repr(i)), (b, repr(j))) in held or not served(first | {a: i, b: j}), (a, i, b, j)


def rows_of(shape: tuple[Any, ...]) -> list[Problem]:
    return [p for p in rows() if (p.n, p.channels, p.inner) == shape]


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_pairs_are_right(shape):
    found = [f"{p}: {'; '.join(wrong)}" for p in rows_of(shape) if (wrong := p.failures())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_pairs_have_the_same_bits_everywhere(shape):
    found = []
    for p in rows_of(shape):
        with running_on(batchnorm.isa_levels()[0], 1):
            want = p.results()
        for isa, threads in environments():
            with running_on(isa, threads, "parallel_elements=0"):
                found += [
                    f"{p}: {name} on {isa} with {threads} threads" for name in differing(p.results(), want)
                ]
    assert not found, f"{len(found)}:\n" + "\n".join(found[:20])


@pytest.mark.parametrize("shape", [s for s in EDGES if np.prod((s[0], s[1], *s[2])) < 5000], ids=str)
def test_pairs_have_the_same_bits_at_any_address(shape):
    found = []
    for p in rows_of(shape):
        if "," in p.layout:
            continue  # has gaps, which a copy at an address has not
        want = p.results()
        for offset in range(p.dtype.itemsize, 64, 3 * p.dtype.itemsize):
            found += [
                f"{p}: {name} {offset} bytes on"
                for name in differing(replace(p, offset=offset).results(), want)
            ]
    assert not found, f"{len(found)}:\n" + "\n".join(found[:20])


# ---- float64 at scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_a_million_values_far_from_zero_and_from_their_first(last):
    """Sums are about a value near the mean: the first 16 lie off it, and |mean| / std is 1000."""
    x = 1000 + rng("million").standard_normal((2**20 + 3, 1) if last else (1, 1, 2**20 + 3))
    x.reshape(-1)[:16] = 1001.7
    wide = x.astype(np.longdouble)
    mean, var = wide.mean(), wide.var()
    y, saved = train(x)
    for got, bound in ((saved.var[0], VAR_FLOAT64), (batchnorm.moments(x).var[0], VAR_FLOAT64)):
        assert abs(got - var) <= bound * var
    assert abs(saved.mean[0] - mean) <= 2 * U64 * mean
    assert np.abs(y - (wide - mean) / np.sqrt(var + 1e-5)).max() <= 1e-11
