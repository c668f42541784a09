"""The table of faults in tests/mutation: each can still be put into the sources. The runs are no test."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from mutation.faults import ROOT, Fault, faulty, place, read, switched

pytestmark = pytest.mark.quick

needs_source = pytest.mark.skipif(
    not (ROOT / "cpp" / "isa.cmake").exists(), reason="the source tree (cpp/) is not here"
)


@needs_source
def test_every_fault_has_its_place() -> None:
    faults = read()
    assert [number for number, n in Counter(fault.number for fault in faults).items() if n > 1] == []
    of_cpp = {
        fault.file: [f for f in faults if f.file == fault.file] for fault in faults if not fault.is_python
    }
    for file, own in of_cpp.items():
        text = switched(own, (ROOT / file).read_text())
        assert all(f"batchnorm_fault[{fault.number}]" in text for fault in own)
    for fault in faults:
        source = (ROOT / fault.file).read_text()
        begin, end = place(fault, source)
        assert source[begin:end] == fault.text
        if fault.is_python:
            compile(faulty(fault, source), fault.file, "exec")
        else:  # compilers want whole expressions
            cut = re.search(r"(\w|\.|->)$", source[:begin]) and re.match(r"\w", fault.text)
            assert not cut and not re.match(r"\w", source[end:]), fault


@needs_source
def test_there_are_two_hundred_all_over() -> None:
    real = [fault for fault in read() if not fault.equal]
    areas = Counter("Python" if fault.is_python else fault.file.split("/")[1] for fault in real)
    assert areas.total() >= 200
    assert min(areas[name] for name in ("kernels", "core", "bind", "Python")) >= 30


TABLE = """
# a remark

7 bound a.cpp
@ for (int i = 0; i < n; ++i)
- i < n
+ i <= n

8 dropped a.cpp
- if (n > 0) {
    stop();
}
+

9 order b.py
- a - b
+ b - a
= both are 0
"""


def test_faults_of_cpp_are_switched() -> None:
    bound, dropped, order = read(TABLE)
    assert order == Fault(9, "order", "b.py", "a - b", "b - a", equal="both are 0")
    source = "#pragma once\nint i < n;\nfor (int i = 0; i < n; ++i) f();\nif (n > 0) {\n    stop();\n}\n"
    text = switched([bound, dropped], source)
    assert text.startswith('#pragma once\nextern "C" ')
    assert "for (int i = 0; (batchnorm_fault[7] ? (i <= n) : (i < n)); ++i) f();\n" in text
    assert text.endswith("if (batchnorm_fault[8]) {} else { if (n > 0) {\n    stop();\n} }\n")
    assert faulty(order, "x = a - b\n") == "x = b - a\n"


def test_a_text_that_is_gone_or_there_twice_is_an_error() -> None:
    bound = read(TABLE)[0]
    with pytest.raises(ValueError, match=r"fault 7 bound a\.cpp: 'for .*' occurs 0 times, expected once"):
        place(bound, "while (i < n) f();")
    with pytest.raises(ValueError, match="occurs 2 times"):
        place(bound, 2 * "for (int i = 0; i < n; ++i) f();")
    with pytest.raises(ValueError, match="overlaps another one"):
        switched([bound, bound], "for (int i = 0; i < n; ++i) f();")
