"""Load: many calls, large arrays, odd sizes, threads at once, memory under pressure. Each in a process of its
own with a deadline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batchnorm import batch_norm_backward, batch_norm_train

from support.processes import output

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system has no /proc/self/statm"),
]
PROGRAMS = Path(__file__).parent / "programs"
HOURS = 3600


def program(name: str, *arguments: object, deadline: float = HOURS) -> str:
    """Output of a program of the folder beside this file, which must succeed."""
    line = [sys.executable, PROGRAMS / name, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=deadline, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_soak(long, record_property):
    calls = 1_000_000 if long else 10_000
    grown = float(program("soak.py", calls, deadline=12 * HOURS))
    record_property("tried", calls)
    record_property("MiB more", grown)
    assert grown <= 4, f"{grown} MiB more after {calls} calls"


def need(gib: float) -> None:
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    if free < gib + 1:
        pytest.skip(f"{free:.0f} GiB of memory are free, this takes {gib:.0f}")


@pytest.mark.long
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("dtype", "gib"), [("float16", 9), ("uint8", 7)])
def test_beyond_2_to_the_31(dtype, gib, channels):
    need(gib)
    assert program("beyond.py", dtype, channels) == "done"


ODD = [
    (880_801, 1), (1, 880_801), (3, 2**20 + 1), (2**20 + 1, 3), (65_537, 17), (2, 1, 2**20 + 7),
    (1, 2**20 + 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_sizes(shape, dtype):
    # Against the plain formula in extended precision, both directions.
    x, dy = (np.random.default_rng(i).standard_normal(shape).astype(dtype) for i in (1, 2))
    if x.size == shape[1]:
        with pytest.raises(ValueError, match="one value per channel"):
            batch_norm_train(x)
        return
    axes = tuple(a for a in range(x.ndim) if a != 1)
    y, saved = batch_norm_train(x)
    dx = batch_norm_backward(dy, saved).dx
    x_hat, g = x.astype(np.longdouble), dy.astype(np.longdouble)
    mean = x_hat.mean(axes, keepdims=True)
    x_hat -= mean
    inv_std = 1 / np.sqrt((x_hat * x_hat).mean(axes, keepdims=True) + np.longdouble(1e-5))
    x_hat *= inv_std
    # A channel of few values may by chance be far from zero, where their own last digits decide.
    unit = np.finfo(dtype).eps * (1 + np.abs(mean) * inv_std)
    assert (np.abs(y - x_hat) <= 4 * unit * np.maximum(1, np.abs(x_hat))).all()
    want = inv_std * (g - g.mean(axes, keepdims=True) - x_hat * (g * x_hat).mean(axes, keepdims=True))
    # Two values of a channel cancel to nothing in dx, at the size of what is subtracted.
    size = np.abs(inv_std) * (np.abs(g).max() * (1 + np.abs(x_hat).max() ** 2))
    assert (np.abs(dx - want) <= 4 * unit * size).all()


PRESSURE = """
        import os, resource, threading, numpy as np, batchnorm as b
        b.set_num_threads(2); b.set_cache_limit(6 * 2**20)
        threading.stack_size(256 * 1024)
        sizes = [2**13 + i * 2**11 for i in range(6)]
        inputs = [np.random.default_rng(0).standard_normal((4, 8, n), np.float32) for n in sizes]
        def both(x):
            y, saved = b.batch_norm_train(x)
            return y.tobytes() + b.batch_norm_backward(x, saved).dx.tobytes()
        want, wrong, served, refused = [both(x) for x in inputs], [], [], []
        def work(seed):
            generator, kept = np.random.default_rng(seed), {{}}
            for _ in range({rounds}):
                i = int(generator.integers(len(inputs)))
                try:
                    kept[int(generator.integers(3))] = b.batch_norm_train(inputs[i]).y
                    if both(inputs[i]) != want[i]: wrong.append(i)
                    served.append(i)
                except MemoryError: refused.append(i)
                if b.cache_info().held > 6 * 2**20: wrong.append("held")
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for w in workers: w.start()
        with open("/proc/self/statm") as f: size = int(f.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        unbound = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_AS, (size + 24 * 2**20, unbound))
        for w in workers: w.join()
        resource.setrlimit(resource.RLIMIT_AS, (unbound, unbound))
        print(wrong, len(served) + len(refused), [both(x) for x in inputs] == want)
"""


def test_threads_at_once_with_little_memory(long, record_property):
    # 8 threads whose results come and go, a cache that has to evict all the time, and 24 MiB of addresses
    # more than there are at the start: what is refused is a MemoryError, what is not is right.
    rounds = 2000 if long else 60
    record_property("tried", 8 * rounds)
    assert output(PRESSURE.format(rounds=rounds), deadline=HOURS) == f"[] {8 * rounds} True"
