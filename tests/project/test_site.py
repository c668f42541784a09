"""The site in docs/: every block of code runs, every public name has its place, and it builds."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import batchnorm
import batchnorm.formats
import batchnorm.typing
import pytest

from support.checks import running_on

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not (DOCS / "conf.py").exists(), reason="docs/ is not here")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, code) of each fenced block of a language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in found]


def pages_with(language: str) -> list[Path]:
    return [page for page in sorted(DOCS.rglob("*.md")) if blocks(page, language)]


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


# ---- code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_the_pages_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block in one namespace, as a reader would; sessions must print what they show."""
    if "plot_statistics" in page.read_text():
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra demo)")
    for needed in re.findall(r"^import (keras|torch|dask)(?:\.array as da)?$", page.read_text(), re.M):
        os.environ.setdefault("KERAS_BACKEND", "torch")
        if needed != "dask":
            pytest.importorskip("torch", reason="torch is not installed (extra torch)")
        pytest.importorskip(needed, reason=f"{needed} is not installed (extra {needed})")
    if 'device="cuda"' in page.read_text() and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    with warnings.catch_warnings(), running_on(), contextlib.redirect_stdout(io.StringIO()) as printed:
        warnings.simplefilter("error")
        for line, code in blocks(page, "python"):
            if code.startswith(">>>"):
                session = doctest.DocTestParser().get_doctest(code, names, name(page), str(page), line)
                session.globs = names
                assert runner.run(session, clear_globs=False).failed == 0, printed.getvalue()
            else:
                exec(compile("\n" * line + code, str(page), "exec"), names)


def find(program: str) -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(program, path=path)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("how", ["find_package", "add_subdirectory", "FetchContent"])
def test_the_guides_projects_work_as_written(how: str, tmp_path: Path) -> None:
    """The one that finds the library is built and run; those that compile it are configured. test_cpp.py
    builds one of them."""
    (project,) = (code for _, code in blocks(DOCS / "cpp.md", "cmake") if how in code)
    (tmp_path / "CMakeLists.txt").write_text(project)
    shutil.copy(DOCS / "cpp" / "guide.cpp", tmp_path / "main.cpp")
    (tmp_path / "third_party").mkdir()
    (tmp_path / "third_party" / "batchnorm").symlink_to(ROOT)
    build = tmp_path / "build"
    ninja = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find('ninja')}")
    where = {
        "find_package": f"-Dbatchnorm_DIR={batchnorm.get_cmake_dir()}",
        "add_subdirectory": "-DBATCHNORM_OPENMP=AUTO",
        "FetchContent": f"-DFETCHCONTENT_SOURCE_DIR_BATCHNORM={ROOT}",  # instead of a download
    }
    run(find("cmake"), "-S", tmp_path, "-B", build, *ninja, where[how], "-DCMAKE_CXX_FLAGS=-Wall -Werror")
    if how == "find_package":
        run(find("cmake"), "--build", build)
        assert run(build / "app").startswith("gamma: gamma has 2 values, expected 3")


def test_what_pages_include_is_there() -> None:
    for page in DOCS.rglob("*.md"):
        found = re.findall(r"^```\{literalinclude\} (\S+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.M)
        for file, options in found:
            (mark,) = re.findall(r'start-after: "(.*)"', options)
            assert f"// {mark}\n" in (page.parent / file).read_text(), f"{name(page)}: {mark}"


# ---- what there is -----------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_api() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    listed = re.findall(r"^\.\. auto(?:function|class|exception):: batchnorm\.(\w+)$", pages, re.M)
    assert sorted(listed) == sorted(set(batchnorm.__all__) - {"__version__"})
    listed = re.findall(r"^\.\. auto(?:function|class):: batchnorm\.formats\.(\w+)$", pages, re.M)
    assert sorted(listed) == sorted(set(batchnorm.formats.__all__) - {"FORMATS"})


@pytest.mark.parametrize("room", ["torch", "keras", "dask"])
def test_every_name_for_other_libraries_is_in_the_api(room: str) -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    if room != "dask":
        pytest.importorskip("torch", reason="torch is not installed (extra torch)")
    pytest.importorskip(room, reason=f"{room} is not installed (extra {room})")
    module = importlib.import_module(f"batchnorm.{room}")
    text = (DOCS / "api" / f"{room}.rst").read_text()
    listed = re.findall(rf"^\.\. auto(?:function|class):: batchnorm\.{room}\.(\w+)$", text, re.M)
    assert sorted(listed) == sorted(module.__all__)


def gallery() -> dict[str, list[str]]:
    """The table of docs/_ext/pictures.py; its imports are those of the extra `docs`."""
    for node in ast.parse((DOCS / "_ext" / "pictures.py").read_text()).body:
        if isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == "GALLERY":
            return ast.literal_eval(node.value)  # type: ignore[no-any-return]
    raise AssertionError("no GALLERY")


def test_every_example_has_its_page() -> None:
    programs = {p.stem for p in (ROOT / "examples").glob("*.py") if "__main__" in p.read_text()}
    pages = {p.stem: p.read_text() for p in (DOCS / "gallery").glob("*.md") if p.stem != "index"}
    assert set(gallery()) == set(pages) == programs
    for program, text in pages.items():
        assert f"```{{example}} {program}\n```" in text


def test_every_picture_is_shown() -> None:
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    shown = set(re.findall(r"^```\{picture\} (\w+)$", text, re.M))
    own = {path.stem for path in (DOCS / "pictures").glob("*.py")}
    assert own <= shown <= own | set(gallery())


# ---- the whole ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for needed in (
        "sphinx",
        "numpydoc",
        "furo",
        "myst_parser",
        "sklearn",
        "matplotlib",
        "rich",
        "torch",
        "keras",
        "dask",
    ):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed (extra docs)")
    run(sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, tmp_path)
    for page in (*DOCS.rglob("*.md"), *DOCS.rglob("*.rst")):
        assert (tmp_path / page.relative_to(DOCS)).with_suffix(".html").exists(), page
    # Nothing is loaded from elsewhere.
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]+)"', page.read_text()), page.name
