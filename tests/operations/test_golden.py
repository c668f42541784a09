"""The bits of 0.1: every call gives what it gave then, but for the changes listed with their reasons."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from support import golden

pytestmark = pytest.mark.quick
STORED = golden.stored()


def changed(case: str, result: str) -> list[str]:
    return [pattern for pattern in golden.CHANGED if fnmatchcase(f"{case} {result}", pattern)]


@pytest.mark.parametrize("kind", golden.KINDS)
def test_results_have_the_bits_of_0_1(kind):
    found = []
    for name, case in golden.CASES.items():
        if case["kind"] == kind:
            found += [f"{name} {r}" for r in golden.differences(name, STORED[name]) if not changed(name, r)]
    assert not found, f"{len(found)} results differ:\n" + "\n".join(found[:40])


def test_every_case_is_stored_once():
    assert golden.CASES.keys() <= STORED.keys()
    assert all("bfloat16" in name for name in STORED.keys() - golden.CASES.keys()), "needs ml_dtypes"


def test_every_listed_change_is_one():
    used = set()
    for name in golden.CASES:
        for result in golden.differences(name, STORED[name]):
            used |= set(changed(name, result))
    assert used == golden.CHANGED.keys(), "patterns that no longer match a difference"
