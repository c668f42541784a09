"""The documentation: what it shows is run, what it names exists, its lines are short."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import batchnorm
import batchnorm.distributed
import batchnorm.formats
import batchnorm.typing
import pytest
from batchnorm import _core

import scorecard
from project.proofs import PROOFS

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
PUBLIC = [name for name in batchnorm.__all__ if name != "__version__"]
FORMATS = [name for name in batchnorm.formats.__all__ if name != "FORMATS"]
# Public functions and classes whose docstring needs no example: results, and what only reports.
WITHOUT_EXAMPLE = {
    *("CacheInfo", "ColdStatisticsWarning", "Compared", "DatasetMoments", "Diagnosis", "DoubleGradients"),
    *("Finding", "Gradients", "History", "MeanVar", "Parameter", "TrainResult", "Saved"),
    *("Folded", "Format", "Inspection", "Norm", "Pair"),
    *("cache_info", "config", "empty_cache", "get_cmake_dir", "get_include", "get_isa", "get_num_threads"),
    *("isa_levels", "set_cache_limit", "set_isa", "set_num_threads", "show_config"),
}


def documents() -> list[Path]:
    """Every Markdown file that is the project's own."""
    folders = (".", "docs", "docs/decisions", "docs/gallery", "cpp", "bench", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.md"))]


needs_documents = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="README.md is not here")


# ---- docstrings --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = batchnorm.get_num_threads()
    yield
    batchnorm.set_num_threads(before)


def methods(thing: object, name: str) -> Iterator[tuple[str, object]]:
    """An object and, of a class, its public methods and properties: whatever has a docstring of its own."""
    yield name, thing
    if isinstance(thing, type):
        for attribute, value in vars(thing).items():
            inner = getattr(value, "__func__", value)
            if not attribute.startswith("_") and inspect.getdoc(inner):
                yield f"{name}.{attribute}", inner


def examples(thing: object, name: str) -> list[doctest.DocTest]:
    """The examples in its docstring; doctest's finder does not know C callables."""
    parser = doctest.DocTestParser()
    found = []
    for title, inner in methods(thing, name):
        text = inspect.getdoc(inner) or ""
        if parser.get_examples(text):
            found.append(parser.get_doctest(text, {}, title, None, None))
    return found


def run(tests: list[doctest.DocTest]) -> int:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        assert runner.run(test).failed == 0, f"doctest of {test.name} failed"
    return sum(len(test.examples) for test in tests)


@pytest.mark.parametrize("name", [*PUBLIC, *FORMATS])
def test_docstring(name: str) -> None:
    thing = getattr(batchnorm if name in PUBLIC else batchnorm.formats, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    count = run(examples(thing, name))
    assert count >= 2 or name in WITHOUT_EXAMPLE, f"{name} has no example"


MODULES = [batchnorm, batchnorm.typing, batchnorm.formats, batchnorm.distributed]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_docstring_of_a_module(module: object) -> None:
    text = inspect.getdoc(module) or ""
    assert run([doctest.DocTestParser().get_doctest(text, {}, "module", None, None)]) >= 2


@pytest.mark.parametrize(
    ("name", "needs"), [("torch", ("torch",)), ("keras", ("torch", "keras")), ("dask", ("dask",))]
)
def test_docstrings_for_other_libraries(name: str, needs: tuple[str, ...]) -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    for each in needs:
        pytest.importorskip(each, reason=f"{each} is not installed (extra {name})")
    module = importlib.import_module(f"batchnorm.{name}")
    text = inspect.getdoc(module) or ""
    assert run([doctest.DocTestParser().get_doctest(text, {}, "module", None, None)]) >= 2
    for public in module.__all__:
        thing = getattr(module, public)
        assert inspect.getdoc(thing), public
        tests = examples(thing, public)
        if inspect.isfunction(thing):
            assert run(tests) >= 2 or public == "revert", f"{public} has no example"
            for parameter in parameters_of(thing):
                assert re.search(rf"\b{parameter}\b", inspect.getdoc(thing) or ""), parameter
        else:
            run(tests)


def parameters_of(thing: object) -> list[str]:
    function = thing.__init__ if isinstance(thing, type) else thing  # type: ignore[misc]
    names = inspect.signature(function).parameters  # type: ignore[arg-type]
    return [n for n, p in names.items() if n not in ("self", "unknown") and p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize(
    "name", [n for n in PUBLIC if isinstance(getattr(batchnorm, n), FunctionType | _core.Operation)]
)
def test_docstring_names_every_parameter(name: str) -> None:
    function = getattr(batchnorm, name)
    text = inspect.getdoc(function) or ""
    for parameter in parameters_of(function):
        assert re.search(rf"\b{parameter}\b", text), parameter


def test_the_layers_docstring_names_every_parameter() -> None:
    text = (inspect.getdoc(batchnorm.BatchNorm) or "") + (inspect.getdoc(batchnorm.BatchNorm.__init__) or "")
    for parameter in parameters_of(batchnorm.BatchNorm):
        assert re.search(rf"\b{parameter}\b", text), parameter


# ---- Markdown ----------------------------------------------------------------------------------------------


@needs_documents
@pytest.mark.parametrize("path", documents(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_document_is_in_form(path: Path) -> None:
    text = path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= 110, f"{path.name}:{number} has {len(line)} characters"
    assert "[measure]" not in text, f"{path.name} lacks a figure"
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@needs_documents
@pytest.mark.parametrize("path", documents(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_a_document_names_exist(path: Path) -> None:
    folders = ("python", "cpp", "tests", "bench", "examples", "docs")
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for name in re.findall(rf"`((?:{'|'.join(folders)})/[\w./-]+)`", text):
        planned = f"`{name}` (not there yet)" in text
        there = (ROOT / name).exists() or (path.parent / name).exists()
        assert planned or there, f"{path.name} names {name}"


@needs_documents
def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def python_of(path: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))


@needs_documents
def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(python_of(ROOT / "README.md"), names)
    assert names["y"].shape == names["dx"].shape == (32, 64, 28, 28)  # type: ignore[attr-defined]
    assert names["z"].shape == (1, 64, 28, 28)  # type: ignore[attr-defined]


@needs_documents
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (extra dev)")
def test_the_readmes_python_is_typed(tmp_path: Path) -> None:
    program = tmp_path / "readme.py"
    program.write_text(python_of(ROOT / "README.md"))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}"]
    done = subprocess.run([*command, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ---- decisions ---------------------------------------------------------------------------------------------


@needs_documents
def test_every_decision_has_its_page() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = {p.name: p.read_text() for p in folder.glob("D*.md")}
    listed = re.findall(r"^\| \[D(\d+)\]\((D\d+[\w-]+\.md)\) \|", (folder / "README.md").read_text(), re.M)
    assert {name for _, name in listed} == set(pages)
    assert [int(number) for number, _ in listed] == list(range(1, len(pages) + 1))
    for number, name in listed:
        text = pages[name]
        assert name.startswith(f"D{int(number):02}-") and text.startswith(f"# D{number}. "), name
        assert "**Context.**" in text and "**Choice.**" in text, name


@needs_documents
def test_the_page_of_reliability_has_the_rows_of_the_scorecard() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = [row.split("|")[1].strip() for row in page.splitlines() if re.match(r"\|.*\|.*\|.*\|.*\|$", row)]
    wanted = [name for chapter, kinds in scorecard.ROWS.items() for name in (f"**{chapter}**", *kinds)]
    assert [row for row in rows if row in wanted] == wanted


@needs_documents
def test_decisions_that_code_names_exist() -> None:
    count = len(list((ROOT / "docs" / "decisions").glob("D*.md")))
    for folder, kinds in (("cpp", (".h", ".hpp", ".cpp", ".def", ".md")), ("python", (".py",))):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kinds:
                for number in re.findall(r"\bD(\d\d?)\b(?!\.)", path.read_text()):
                    assert 1 <= int(number) <= count, f"{path.name} names D{number}"


# ---- features ----------------------------------------------------------------------------------------------


def rows() -> list[tuple[str, str]]:
    """(feature, what serves it) of docs/features.md."""
    text = (ROOT / "docs" / "features.md").read_text()
    cells = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [(c[0], c[1]) for c in cells if len(c) == 2 and not set(c[0]) <= set("-| ") and c[0] != "what"]


def functions_in(path: Path) -> set[str]:
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}


@needs_documents
def test_every_feature_has_its_proof_and_no_other() -> None:
    assert [feature for feature, _ in rows()] == list(PROOFS)


@needs_documents
@pytest.mark.parametrize("feature", PROOFS)
def test_a_feature_is_there(feature: str) -> None:
    served_by = dict(rows())[feature]
    names = re.findall(r"`([A-Za-z0-9_.]+)(?:\(([^`]*)\))?`", served_by)
    assert names
    for name, arguments in names:
        room = name.partition(".")[0]
        if room in ("torch", "keras", "dask"):
            os.environ.setdefault("KERAS_BACKEND", "torch")
            if room != "dask":
                pytest.importorskip("torch", reason="torch is not installed (extra torch)")
            pytest.importorskip(room, reason=f"{room} is not installed (extra {room})")
            importlib.import_module(f"batchnorm.{room}")
        thing: object = batchnorm
        for part in name.split("."):
            thing = getattr(thing, part)
        for keyword in re.findall(r"(\w+)=", arguments):
            assert keyword in inspect.signature(thing).parameters, f"{name} has no {keyword}="  # type: ignore[arg-type]
    for proof in PROOFS[feature]:
        file, _, test = proof.partition("::")
        assert test in functions_in(TESTS / file), f"{file} has no {test}"
