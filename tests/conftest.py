"""What all tests share: every ISA level, several thread counts, hypothesis profiles, the long form, the
scorecard."""

from __future__ import annotations

import os

import batchnorm
import pytest
from batchnorm import _core
from hypothesis import HealthCheck, settings

from scorecard import Scorecard
from support.checks import THREADS, running_on

# `quick` is the default, --long or HYPOTHESIS_PROFILE=thorough the long run. Both choose the same examples
# every time.
for _name, _examples in (("quick", 60), ("thorough", 5000)):
    settings.register_profile(
        _name, max_examples=_examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--scorecard", nargs="?", const="all", choices=("all", "only"),
        help="print what was tried and what held (only: run nothing but the tests of that table)",
    )  # fmt: skip
    parser.addoption("--long", action="store_true", help="the tests marked long as well: hours")


def pytest_configure(config: pytest.Config) -> None:
    long = config.getoption("--long")
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "thorough" if long else "quick"))
    if which := config.getoption("--scorecard"):
        config.pluginmanager.register(Scorecard(long, which == "only"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        later = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=later)


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether this is the long form, which tries more."""
    return bool(request.config.getoption("--long"))


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
