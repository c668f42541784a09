"""What a result must say about where it comes from: the machine, the library, the options."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
CPU = Path("/sys/devices/system/cpu")


def read(path: str | Path) -> str:
    """A file's text, empty if there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def field(text: str, name: str) -> str:
    """The value of "name : value" in /proc's files."""
    match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else ""


def cpu_list(text: str) -> list[int]:
    """The numbers of "0-3,8"."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1) if first else []
    return numbers


def cpus() -> list[int]:
    """The CPUs this process may use, those of different cores first: two threads that share a core share its
    caches and ports."""

    def rank(cpu: int) -> int:
        siblings = cpu_list(read(CPU / f"cpu{cpu}/topology/thread_siblings_list"))
        return siblings.index(cpu) if cpu in siblings else 0

    return sorted(os.sched_getaffinity(0), key=lambda cpu: (rank(cpu), cpu))


def caches() -> dict[str, int]:
    """Bytes by level ("L1", "L2", "L3") as the system reports them: per core, or per group of cores."""
    sizes: dict[str, int] = {}
    for index in sorted((CPU / "cpu0/cache").glob("index*")):
        if read(index / "type").strip() == "Instruction":
            continue
        number, unit = re.fullmatch(r"(\d*)([KM]?)\s*", read(index / "size")).groups()  # type: ignore[union-attr]
        if number:
            sizes[f"L{read(index / 'level').strip()}"] = int(number) << {"": 0, "K": 10, "M": 20}[unit]
    return sizes


def free_memory() -> int:
    """Bytes that new arrays may take: the system's, or what the control group still allows."""
    available = int(field(read("/proc/meminfo"), "MemAvailable").split()[0] or 0) << 10
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = read(limit).strip(), read(used).strip()
        if most.isdigit() and now.isdigit():
            available = min(available, int(most) - int(now))
    return available


def huge_pages() -> str:
    """The setting in force for transparent huge pages."""
    match = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return match[1] if match else "unknown"


def describe() -> dict[str, Any]:
    """The machine."""
    info = read("/proc/cpuinfo")
    flags = field(info, "flags").split()
    return {
        "cpu": field(info, "model name") or platform.processor() or platform.machine(),
        "family": field(info, "cpu family"),
        "model": field(info, "model"),
        "cpus": cpus(),
        "caches": caches(),
        "memory": int(field(read("/proc/meminfo"), "MemTotal").split()[0] or 0) << 10,
        "kernel": platform.release(),
        "huge_pages": huge_pages(),
        "hypervisor": "hypervisor" in flags,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def library() -> dict[str, Any]:
    """batchnorm as this interpreter has it, and this checkout's commit, of which it need not be built."""
    import batchnorm

    c = batchnorm.config()
    keys = ("version", "compiler", "isa", "isa_supported", "openmp")
    return {**{k: c.get(k) for k in keys}, "commit": commit()}


def commit() -> str | None:
    """The checkout's commit, with "+" if files differ from it."""
    try:
        run = ["git", "-C", str(CHECKOUT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
