"""What the documentation shows is run: every example in a docstring, and the Python in the README."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import batchnorm
import pytest

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [name for name in batchnorm.__all__ if name != "__version__"]


@pytest.fixture(autouse=True)
def _restore_threads():
    before = batchnorm.get_num_threads()
    yield
    batchnorm.set_num_threads(before)


def _run(examples: list[doctest.DocTest]) -> int:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in examples:
        assert runner.run(example).failed == 0, f"doctest of {example.name} failed"
    return sum(len(example.examples) for example in examples)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    thing = getattr(batchnorm, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    _run(doctest.DocTestFinder().find(thing, name, globs={}))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "BatchNorm",
            "batch_norm",
            "batch_norm_train",
            "batch_norm_backward",
            "activation_mask_bytes",
            "moments",
            "Moments",
            "dataset_moments",
            "normalize_images",
        ),
        *("batch_renorm_train", "batch_renorm_backward"),
        *("batch_norm_train_saving", "batch_norm_backward_from_output"),
        *("ghost_batch_norm_train", "ghost_batch_norm_backward"),
        "update_running",
        "effective_decay",
        "recalibrate",
        "weight_decay_groups",
    ],
)
def test_has_an_example(name):
    assert _run(doctest.DocTestFinder().find(getattr(batchnorm, name), name, globs={})) >= 2


def test_package_docstring():
    assert _run(doctest.DocTestFinder(exclude_empty=True).find(batchnorm, "batchnorm", globs={})) >= 2


@pytest.mark.parametrize(
    "name",
    [
        "batch_norm",
        "batch_norm_train",
        "batch_norm_backward",
        "activation_mask_bytes",
        "moments",
        "normalize_images",
    ],
)
def test_docstring_names_every_parameter(name):
    function = getattr(batchnorm, name)
    text = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert parameter == "unknown" or re.search(rf"\b{parameter}\b", text), parameter


def test_readme_runs(tmp_path, monkeypatch):
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not beside the tests")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    assert names["y"].shape == (32, 64, 28, 28)
    assert names["dx"].shape == (32, 64, 28, 28)
    assert names["z"].shape == (1, 64, 28, 28)
    assert names["mean"].shape == (64,)
