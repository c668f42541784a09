"""The table of faults, `faults.txt`: reading it, finding each text in its file, and putting faults in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("faults.txt")
ROOT = TABLE.parents[2]
# Volatile, so that the compiler neither moves the question out of loops nor copies loops for its answers.
HIDDEN = '__attribute__((visibility("hidden")))'
DECLARATION = f'extern "C" {HIDDEN} volatile unsigned char batchnorm_fault[1000];\n'
DEFINITION = """
#include <cstdlib>
volatile unsigned char batchnorm_fault[1000] = {};
__attribute__((constructor(101))) static void read_batchnorm_faults() {
    const char* text = std::getenv("MUTATION_FAULTS");  // numbers, with a character between them
    while (text != nullptr && *text != '\\0') {
        char* end = nullptr;
        batchnorm_fault[std::strtoul(text, &end, 10) % 1000] = 1;
        text = *end == '\\0' ? end : end + 1;
    }
}
"""
DEFINED_IN = "cpp/kernels/dispatch.cpp"


@dataclass(frozen=True)
class Fault:
    number: int
    kind: str
    file: str
    text: str
    instead: str
    within: str = ""
    equal: str = ""  # why it changes nothing

    @property
    def is_python(self) -> bool:
        return self.file.endswith(".py")

    def __str__(self) -> str:
        return f"{self.number} {self.kind} {self.file}"


def read(table: str | None = None) -> list[Fault]:
    lines = (TABLE.read_text() if table is None else table).splitlines()
    code = "\n".join(line for line in lines if not line.startswith("#"))
    return [_fault(block) for block in code.split("\n\n") if block.strip()]


def _fault(block: str) -> Fault:
    head, *lines = block.strip("\n").split("\n")
    number, kind, file = head.split()
    parts: dict[str, str] = {}
    place = ""
    for line in lines:
        if line[:2] in ("@ ", "- ", "+ ", "= ") or line == "+":
            place = line[0]
            parts[place] = line[2:]
        else:
            parts[place] += f"\n{line}"
    return Fault(int(number), kind, file, parts["-"], parts["+"], parts.get("@", ""), parts.get("=", ""))


def place(fault: Fault, source: str) -> tuple[int, int]:
    """Where a fault's text begins and ends in its file."""
    within = fault.within or fault.text
    if source.count(within) != 1:
        raise ValueError(f"fault {fault}: {within!r} occurs {source.count(within)} times, expected once")
    if within.count(fault.text) != 1:
        raise ValueError(f"fault {fault}: {fault.text!r} is not once in {within!r}")
    begin = source.index(within) + within.index(fault.text)
    return begin, begin + len(fault.text)


def faulty(fault: Fault, source: str) -> str:
    """A file with one fault in the place of the text."""
    begin, end = place(fault, source)
    return source[:begin] + fault.instead + source[end:]


def _switch(fault: Fault) -> str:
    asked = f"batchnorm_fault[{fault.number}]"
    if not fault.text.endswith(";") and not fault.text.startswith("if ("):
        return f"({asked} ? ({fault.instead}) : ({fault.text}))"
    if not fault.instead:
        return f"if ({asked}) {{}} else {{ {fault.text} }}"
    return f"if ({asked}) {{ {fault.instead} }} else {{ {fault.text} }}"


def switched(faults: Iterable[Fault], source: str) -> str:
    """A C++ file with all its faults, each of which `batchnorm_fault` switches on."""
    end = len(source) + 1
    placed = [(place(fault, source), fault) for fault in faults]
    for (begin, stop), fault in sorted(placed, key=lambda each: each[0], reverse=True):
        if stop > end:
            raise ValueError(f"fault {fault} overlaps another one")
        source = source[:begin] + _switch(fault) + source[stop:]
        end = begin
    once = "#pragma once\n"
    return source.replace(once, once + DECLARATION, 1) if once in source else DECLARATION + source
