"""Contestants as run.py sees them: a process each, pinned, asked by lines (peers/protocol.py)."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import native
from machine import cpus
from peers import PROGRAMS
from peers.protocol import Case

HERE = Path(__file__).resolve().parent

# Outputs of peers without out= come back from the heap warm instead of as fresh pages.
WARM_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}


class Absent(Exception):
    """The contestant cannot start; the message says why."""


class Died(Exception):
    """The contestant's process ended in the middle."""


@dataclass(frozen=True)
class Setting:
    """How contestants are started."""

    threads: int
    outputs: str = "reused"
    pythons: dict[str, str] = field(default_factory=dict)  # name -> interpreter
    dnnl_prefix: Path = Path(sys.prefix)

    def cpus(self) -> list[int]:
        return cpus()[: self.threads]

    def environment(self) -> dict[str, str]:
        """Thread counts and places for all kinds of pools; the CPU mask serves those that read neither."""
        n = str(self.threads)
        env = dict(os.environ)
        env |= {
            "OMP_NUM_THREADS": n,
            "OMP_PROC_BIND": "close",
            "OMP_PLACES": ",".join(f"{{{c}}}" for c in self.cpus()),
            "OMP_DYNAMIC": "false",
            "MKL_NUM_THREADS": n,
            "OPENBLAS_NUM_THREADS": n,
            "NUMBA_NUM_THREADS": n,
            "DPCPP_CPU_NUM_CUS": n,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        driver = native.opencl_driver(self.dnnl_prefix)
        if driver:
            env.setdefault("OCL_ICD_FILENAMES", driver)
        return env | (WARM_HEAP if self.outputs == "reused" else {})


@functools.cache
def programs(dnnl_prefix: Path) -> Path | str:
    """The folder of the built programs, or why there is none."""
    try:
        return native.build(dnnl_prefix)
    except native.BuildFailed as e:
        return str(e)


def command(name: str, setting: Setting) -> list[str]:
    """The command line of a contestant."""
    threads = str(setting.threads)
    if name not in PROGRAMS:
        return [setting.pythons.get(name, sys.executable), "-m", "peers.serve", name, threads]
    program, arguments = PROGRAMS[name]
    folder = programs(setting.dnnl_prefix)
    if isinstance(folder, str):
        why = folder if name == "bandwidth" else "see bandwidth"  # one reason for all programs, told once
        raise Absent(f"bench/cpp cannot be built: {why}")
    if not (folder / program).exists():
        raise Absent(
            f"{program} is not built: oneDNN 3 (headers and library) not found in {setting.dnnl_prefix}"
        )
    return [str(folder / program), *arguments, threads]


class Contestant:
    """One contestant's process."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self.threads = setting.threads
        arguments = command(name, setting)
        affinity = functools.partial(os.sched_setaffinity, 0, setting.cpus())
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            arguments, cwd=HERE, env=setting.environment(), preexec_fn=affinity,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        try:
            first = self._read()
        except Died as e:
            self.close()
            raise Absent(str(e)) from None
        if "absent" in first:
            self.close()
            raise Absent(first["absent"])
        self.version: str = first["version"]
        self.kernels: list[str] = first.get("kernels", [])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = [t for t in self._log.read().splitlines() if t.strip()][-1:]
            raise Died(f"{self.name} ended with code {code}" + (f": {last[0]}" if last else ""))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(request, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # reading says why
        return self._read()

    def prepare(self, case: Case) -> str | None:
        """None when ready, otherwise why this contestant cannot."""
        return self._ask(case.words()).get("unsupported")

    def sample(self, count: int) -> list[float] | str:
        """Values of the results, or why there are none."""
        answer = self._ask(f"sample count={count}")
        values: list[float] | str = answer["sample"] if "sample" in answer else answer["unsupported"]
        return values

    def time(self, inner: int, repeat: int, warm: int = 1, kernel: str | None = None) -> list[float]:
        """Seconds per call, `repeat` means of `inner` calls."""
        extra = f" kernel={kernel}" if kernel else ""
        answer = self._ask(f"time warm={warm} repeat={repeat} inner={inner}{extra}")
        if "unsupported" in answer:
            raise Died(f"{self.name}: {answer['unsupported']}")
        seconds: list[float] = answer["seconds"]
        return seconds

    def drop(self) -> None:
        """Free the arrays."""
        self._ask("drop")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@dataclass
class Field:
    """Everybody who takes part, alive at once."""

    contestants: list[Contestant]
    absent: dict[str, str]

    @classmethod
    def start(cls, names: list[str], setting: Setting) -> Field:
        """Starts the roof (bandwidth, or NumPy's copy in its place), batchnorm and the named peers."""
        contestants: list[Contestant] = []
        absent: dict[str, str] = {}
        try:
            for name in ["bandwidth", "batchnorm", *names]:
                try:
                    contestants.append(Contestant(name, setting))
                except Absent as e:
                    absent[name] = str(e)
                    if name == "bandwidth":
                        contestants.append(Contestant("numpy.copyto", setting))
        except BaseException:
            cls(contestants, absent).close()
            raise
        return cls(contestants, absent)

    def versions(self) -> dict[str, str]:
        return {c.name: c.version for c in self.contestants}

    def close(self) -> None:
        for c in self.contestants:
            c.close()

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
