"""Fixtures shared by all tests: every ISA level, several thread counts, and hypothesis profiles."""

from __future__ import annotations

import os

import batchnorm
import pytest
from batchnorm import _core
from hypothesis import HealthCheck, settings

from support.checks import THREADS, running_on

# `quick` is the default, HYPOTHESIS_PROFILE=thorough the long run. Both choose the same examples every time.
for _name, _examples in (("quick", 60), ("thorough", 5000)):
    settings.register_profile(
        _name, max_examples=_examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(params=batchnorm.isa_levels())
def isa(request):
    """Each instruction set level this machine runs, in force during the test."""
    with running_on(isa=request.param):
        yield request.param


@pytest.fixture
def set_tuning():
    """A function that changes how work is laid out, until the test ends."""
    with running_on():
        yield _core.set_tuning


@pytest.fixture(params=THREADS, ids=lambda n: f"{n} threads")
def threads(request):
    """Each thread count, in force during the test; work of any size is shared among them."""
    with running_on(threads=request.param, tuning="parallel_elements=0"):
        yield request.param
