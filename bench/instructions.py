"""Instructions of one small call of each public function: a figure that repeats on any machine, however busy,
where times of microseconds do not.

    python bench/instructions.py [--calls 200]

Runs the calls under callgrind (valgrind), one thread, and prints instructions per call on float32 data of
[2, 3, 4, 4]: (those of 2N calls - those of N calls) / N, so that what a stretch costs once does not count.
valgrind has no AVX-512: the library takes its avx2 kernels there, which at this size is all the same.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import options

DIMS = (2, 3, 4, 4)
MARK = "getppid"  # called between the stretches: callgrind writes its counters and begins anew
STRETCHES = 3  # what came before, N calls, 2N calls


def calls() -> dict[str, Callable[[], object]]:
    """The calls, outputs reused."""
    import batchnorm as bn
    import numpy as np

    x, dy = np.random.default_rng(0).standard_normal((2, *DIMS)).astype(np.float32)
    out = np.empty_like(x)
    gamma, beta = np.ones(3, np.float32), np.zeros(3, np.float32)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    saved = bn.batch_norm_train(x, gamma, beta).saved
    batch_mean, batch_var = np.array(saved.mean), np.array(saved.var)
    layer = bn.BatchNorm(3)

    def step() -> None:
        layer(x)
        layer.backward(dy)

    return {
        "batch_norm": lambda: bn.batch_norm(x, mean, var, gamma, beta, out=out),
        "batch_norm_train": lambda: bn.batch_norm_train(
            x, gamma, beta, running_mean=mean, running_var=var, out=out
        ),
        "batch_norm_backward": lambda: bn.batch_norm_backward(dy, saved, out=out),
        "moments": lambda: bn.moments(x),
        "update_running": lambda: bn.update_running(mean, var, batch_mean, batch_var, decay=0.9, count=32),
        "BatchNorm forward and backward": step,
        "nothing (the loop)": lambda: None,
    }


def measured(count: int) -> None:
    """What runs under callgrind."""
    for call in calls().values():
        for _ in range(20):  # caches of the interpreter and of the library fill
            call()
        os.getppid()
        for n in (count, 2 * count):
            for _ in range(n):
                call()
            os.getppid()


def instructions(folder: Path) -> list[int]:
    """The totals of callgrind's dumps, in order."""
    found = {}
    for path in folder.glob("counts.*"):
        match = re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE)
        number = path.name.removeprefix("counts.")
        if match and number.isdigit():
            found[int(number)] = int(match[1])
    return [found[k] for k in sorted(found)]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calls", type=options.at_least(1), default=200, metavar="N", help="N of the formula (default: 200)"
    )
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measured:
        measured(args.calls)
        return 0
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed (Debian: apt install valgrind)")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/counts", f"--dump-before={MARK}",
            sys.executable, __file__, "--measured", "--calls", str(args.calls),
        ]  # fmt: skip
        # One thread does the same in every run; hashes of strings decide how far dictionaries probe.
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return 1
        totals = instructions(Path(folder))
    names = list(calls())
    if len(totals) < STRETCHES * len(names):
        print(f"callgrind wrote {len(totals)} stretches, expected {STRETCHES * len(names)}", file=sys.stderr)
        return 1
    for i, name in enumerate(names):
        once, twice = totals[STRETCHES * i + 1 : STRETCHES * i + 3]
        print(f"{name:32} {(twice - once) / args.calls:10.0f} instructions per call")
    return 0


if __name__ == "__main__":
    sys.exit(main())
