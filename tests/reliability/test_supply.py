"""What the package is made of: no pickle in it, inputs of its builds pinned, extras without known holes."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.builds import SOURCE

PACKAGE = SOURCE / "python" / "batchnorm"
needs_source = pytest.mark.skipif(not PACKAGE.exists(), reason="the source tree is not here")

# What runs code of a file's, or may. `torch.load` stands with weights_only alone.
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
LOADS = {"eval", "exec", "compile", "__import__"}


def parsed() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


@needs_source
def test_nothing_reads_a_pickle_or_runs_code(record_property):
    files = parsed()
    for path, tree in files:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names]
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not RUNS_CODE & {name.partition(".")[0] for name in names}, (
                    f"{path.name}:{node.lineno}"
                )
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                where = f"{path.name}:{node.lineno}: {name}"
                assert name not in LOADS, where
                assert keywords.get("allow_pickle", "False") == "False", where
                if name.endswith(("np.load", "numpy.load", "read_array")):
                    assert keywords.get("allow_pickle") == "False", where
                if name.endswith("torch.load"):
                    assert keywords.get("weights_only") == "True", where
    record_property("tried", len(files))


@needs_source
def test_inputs_of_builds_are_pinned():
    # Tools whose next version may change a result by exact versions; others from a least version on. Actions
    # of workflows by a version, never a branch.
    text = (SOURCE / "pyproject.toml").read_text()
    for tool in ("ruff", "mypy", "clang-format", "codespell"):
        assert re.search(rf'"{tool}==[\d.]+"', text), tool
    lists = re.findall(r"^(?:requires|dependencies|\w+) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    named = [item for each in lists for item in re.findall(r'"([A-Za-z][\w.-]*(?:\[[\w,]+\])?[^"]*)"', each)]
    wanted = [n for n in named if re.fullmatch(r"[A-Za-z][\w.-]*(\[[\w,]+\])?((>=|==)[\d.]+)?(;.*)?", n)]
    packages = {"scikit-build-core", "pybind11", "numpy", "torch", "keras", "h5py", "onnx", "safetensors"}
    for package in packages:
        found = [n for n in wanted if re.match(rf"{re.escape(package)}\b", n)]
        assert any(">=" in n or "==" in n for n in found), package
    workflows = sorted((SOURCE / ".github" / "workflows").glob("*.yml"))
    for path in workflows:
        for action in re.findall(r"uses:\s*(\S+)", path.read_text()):
            assert re.search(r"@(v\d+[\w.]*|[0-9a-f]{40})$", action), f"{path.name}: {action}"


@pytest.mark.long
@needs_source
def test_extras_have_no_known_holes(tmp_path):
    """`pip-audit` of what the extras install here; it asks the package index for what is known."""
    if importlib.util.find_spec("pip_audit") is None:
        pytest.skip("pip-audit is not installed")
    text = (SOURCE / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    names = {re.match(r"[\w-]+", n)[0] for n in re.findall(r'"([A-Za-z][^"]*)"', extras)}
    names = sorted(names - {"batchnorm"})
    found = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True
    ).stdout
    installed = [
        line.partition("+")[0] for line in found.splitlines()
        if line.partition("==")[0].lower().replace("_", "-") in names
    ]  # fmt: skip
    (tmp_path / "requirements.txt").write_text("\n".join([*installed, ""]))
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", "requirements.txt"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900, env=dict(os.environ),
    )  # fmt: skip
    assert len(installed) > 3
    assert done.returncode == 0, done.stdout + done.stderr
