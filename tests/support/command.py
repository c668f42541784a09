"""`python -m batchnorm` in a process of its own: what it prints, its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

Done = subprocess.CompletedProcess[str]


MAIN = "import runpy, sys; sys.argv[0] = 'batchnorm'; runpy.run_module('batchnorm', None, '__main__')"


def command(folder: Path, *arguments: str, code: str = "", shell: tuple[str, ...] = ()) -> Done:
    """Run in this folder; `code` goes first, in the same process, `shell` in its parent."""
    how = ["-c", f"{code}\n{MAIN}"] if code else ["-m", "batchnorm"]
    line = [*shell, sys.executable, "-W", "error", *how, *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("BATCHNORM_", "OMP_", "GOMP_"))}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


def output(done: Done) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def error(done: Done, which: str = "stats") -> str:
    """Its one line, without what says who speaks."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    who, _, text = line.partition(": error: ")
    assert who == f"python -m batchnorm {which}"
    return text
