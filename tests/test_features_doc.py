"""docs/features.md promises nothing that is not there: the functions it names exist, and so do the tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import batchnorm
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "features.md"

if not DOCUMENT.exists():
    pytest.skip("docs/features.md is not beside the tests", allow_module_level=True)

ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in DOCUMENT.read_text().splitlines()
    if line.startswith("|") and "`test_" in line
]


def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_there_are_rows():
    assert len(ROWS) >= 40


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_row(row):
    feature, served_by, proof = row
    names = re.findall(r"`([A-Za-z_.]+)(?:\([^`]*\))?`", served_by)
    assert feature and names
    for name in names:
        thing = batchnorm
        for part in name.split("."):
            thing = getattr(thing, part)
    proofs = re.findall(r"`(test_\w+)\.py::(\w+)`", proof)
    assert proofs
    for file, test in proofs:
        assert test in functions_in(ROOT / "tests" / f"{file}.py"), f"{file}.py has no {test}"
