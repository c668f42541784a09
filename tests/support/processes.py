"""Python code in a process of its own, for what depends on the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run(code: str, *, deadline: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process with these environment variables set; it has so many seconds."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("BATCHNORM_", "OMP_", "GOMP_"))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=deadline,
        env=env | environment,
    )


def output(code: str, *, deadline: float = 120, **environment: str) -> str:
    """Standard output of a process that must succeed in silence otherwise."""
    done = run(code, deadline=deadline, **environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()
