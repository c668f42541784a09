"""What depends on the process: environment, instruction set, threads, tuning, container, cache, signals."""

from __future__ import annotations

import ast
import copy
import functools
import gc
import itertools
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import batchnorm
import numpy as np
import pytest
from batchnorm import _core, cache_info, empty_cache, set_cache_limit

from support.checks import THREADS, differing, running_on
from support.problem import DTYPES, Problem
from support.processes import output, run

MIB, GIB = 2**20, 2**30
SMALLEST = 128 * 1024  # bytes; kSmallest in cpp/core/memory.h
SHARED = "parallel_elements=0"
CPUS = batchnorm.config()["cpus"]

try:
    from numpy._core.multiarray import get_handler_name
except ImportError:  # NumPy 1
    from numpy.core.multiarray import get_handler_name

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# Bytes of a few calls, the same in any process.
HASH = """
        import hashlib, numpy as np, batchnorm as b
        h = hashlib.sha256()
        for dtype in (np.float32, np.float64, np.float16):
            for shape, axis in (((5, 7, 9, 11), 1), ((5, 9, 11, 7), -1), ((300, 65), 1)):
                x = (np.random.default_rng(0).standard_normal(shape) * 3 + 1).astype(dtype)
                for options in ({}, {"residual": x}, {"virtual_batch_size": 2}):
                    y, saved = b.batch_norm_train(x, channel_axis=axis, activation="relu", **options)
                    g = b.batch_norm_backward(x[::-1], saved)
                    for a in (y, saved.mean, saved.inv_std, g.dx, g.dresidual):
                        h.update(b"" if a is None else a.tobytes())
        print(h.hexdigest())
"""


# ---- configuration -----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_config_and_show_config(capsys):
    c = batchnorm.config()
    assert c["version"] == batchnorm.__version__ == _core.version() and c["isa"] in c["isa_supported"]
    assert set(c["isa_supported"]) <= set(c["isa_built"]) and c["threads"] >= 1
    batchnorm.show_config()
    shown = capsys.readouterr().out
    cuda = f"CUDA         {c['cuda'] or 'no'}"
    for word in (c["version"], c["isa"], c["compiler"], c["openmp"], c["numpy"], cuda):
        assert word in shown
    assert os.path.exists(os.path.join(batchnorm.get_include(), "batchnorm", "batchnorm.hpp"))
    assert os.path.exists(os.path.join(batchnorm.get_cmake_dir(), "batchnormConfig.cmake"))


def test_a_wheel_without_the_cpp_library_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(_core, "__file__", str(tmp_path / "_core.so"))
    for folder in (batchnorm.get_include, batchnorm.get_cmake_dir):
        with pytest.raises(FileNotFoundError, match="came as a wheel; `pip install --no-binary batchnorm"):
            folder()


WRONG = [
    (batchnorm.set_num_threads, 0, ValueError, "num_threads is 0, expected an int from 1 to 65536"),
    (batchnorm.set_num_threads, 65537, ValueError, "num_threads is 65537"),
    (batchnorm.set_num_threads, 2.0, TypeError, r"num_threads is 2.0 \(float\)"),
    (batchnorm.set_num_threads, True, TypeError, r"num_threads is True \(bool\)"),
    (batchnorm.set_isa, "sse9", ValueError, "isa is 'sse9', expected one of 'baseline'"),
    (batchnorm.set_isa, "AVX2", ValueError, "isa is 'AVX2', expected one of 'baseline'"),
    (batchnorm.set_isa, 2, TypeError, r"isa is 2 \(int\), expected a str, one of 'baseline'"),
    (set_cache_limit, -1, ValueError, "limit is -1, expected an int >= 0, in bytes"),
    (set_cache_limit, -(2**70), ValueError, r"limit is -1\S+, expected"),
    (set_cache_limit, 2**63, ValueError, r"limit is 9\S+, expected"),
    (set_cache_limit, 2.5, TypeError, r"limit is 2.5 \(float\), expected"),
    (set_cache_limit, True, TypeError, r"limit is True \(bool\), expected"),
    (set_cache_limit, "1GB", TypeError, r"limit is '1GB' \(str\), expected"),
    (set_cache_limit, None, TypeError, "limit is None, expected"),
    (set_cache_limit, np.ones(2, int), TypeError, "limit is of type numpy.ndarray, expected"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "value", "error", "words"), WRONG, ids=range(len(WRONG)))
def test_wrong_values_change_nothing(call, value, error, words):
    before = batchnorm.config()
    with pytest.raises(error, match=f"^{words}"):
        call(value)
    assert batchnorm.config() == before


# ---- instruction set ---------------------------------------------------------------------------------------


def test_isa_by_environment():
    code = "import batchnorm as b; print(b.get_isa(), b.config()['isa_reason'])"
    for name in batchnorm.isa_levels():
        assert output(code, BATCHNORM_ISA=name) == f"{name} BATCHNORM_ISA"
    assert output("import batchnorm as b; print(b.get_isa())", BATCHNORM_ISA="") == batchnorm.isa_levels()[-1]


JUNK = [
    ("BATCHNORM_ISA", "AVX2", "isa is 'AVX2', expected one of 'baseline'"),
    ("BATCHNORM_ISA", "avx512 ", "isa is 'avx512 ', expected one of 'baseline'"),
    ("BATCHNORM_TUNING", "junk", "tuning has 'junk', expected one of l2_bytes, "),
    ("BATCHNORM_TUNING", "map_bytes=many", "tuning has map_bytes='many', expected an integer from 0 to 2^50"),
    ("BATCHNORM_TUNING", "map_bytes=1, l2_bytes=1", "tuning has ' l2_bytes', expected one of l2_bytes, "),
    *(
        ("BATCHNORM_CACHE_LIMIT", text, f"limit is '{text}', expected an int >= 0, in bytes")
        for text in ("1GB", "-1", "2.5", " 1", "1 ", "1e9", "0x10", "None", str(2**63))
    ),
]


@pytest.mark.parametrize(("variable", "text", "words"), JUNK)
def test_junk_in_the_environment_fails_at_import(variable, text, words):
    done = run("import batchnorm", **{variable: text})
    assert done.returncode != 0 and f"environment variable {variable}: {words}" in done.stderr


def test_levels_and_tuning_by_environment_give_the_same_bytes():
    everywhere = [{"BATCHNORM_ISA": name} for name in batchnorm.isa_levels()]
    everywhere += [{"BATCHNORM_TUNING": settings, "OMP_NUM_THREADS": "3"} for settings in TOGETHER]
    assert len({output(HASH, **environment) for environment in everywhere}) == 1


# ---- tuning ------------------------------------------------------------------------------------------------

NAMES = (
    "l2_bytes", "cached_bytes", "stream_run_bytes", "group_bytes", "map_bytes", "fetch_bytes",
    "parallel_elements", "gpu_block_values",
)  # fmt: skip
MOST = 2**50
TOGETHER = [
    ",".join(f"{name}=0" for name in NAMES),
    ",".join(f"{name}={MOST}" for name in NAMES),
    f"l2_bytes=0,map_bytes=0,cached_bytes=0,stream_run_bytes=0,parallel_elements={MOST}",
    "group_bytes=5000,map_bytes=5000,cached_bytes=0,stream_run_bytes=0,parallel_elements=0",
]


def tuning():
    return {name: int(number) for name, number in (s.split("=") for s in _core.tuning().split(","))}


def test_tuning_names_and_defaults(set_tuning):
    set_tuning("")
    defaults = tuning()
    assert tuple(defaults) == NAMES and all(0 < n <= MOST for n in defaults.values())
    assert defaults["cached_bytes"] <= 32 << 20, "what a machine says of its L3 is believed up to here"
    for name, number in itertools.product(NAMES, (0, 12345, MOST)):
        set_tuning(f"{name}={number}")
        assert tuning() == defaults | {name: number}
        set_tuning("")
        assert tuning() == defaults
    set_tuning("group_bytes=9,l2_bytes=1,l2_bytes=10")
    text = _core.tuning()
    assert (tuning()["l2_bytes"], tuning()["group_bytes"]) == (10, 9)
    set_tuning("")
    set_tuning(text)
    assert _core.tuning() == text


UNKNOWN = ("l3_bytes=1", "L2_bytes=1", " l2_bytes=1", "l2_bytes =1", "=1", ",", "l2", "1")
NUMBERS = ("", "x", "-1", "+1", "1.5", "1e3", "0x10", " 5", "5;", "5=5", str(MOST + 1), str(10**30))
REFUSED = {s: f"'{s.split(',')[0].split('=')[0]}', expected one of {', '.join(NAMES)}" for s in UNKNOWN} | {
    f"l2_bytes=1,group_bytes={n},map_bytes=2": f"group_bytes='{n}', expected an integer from 0 to 2^50"
    for n in NUMBERS
}


@pytest.mark.parametrize("settings", REFUSED)
def test_tuning_that_is_refused_changes_nothing(settings, set_tuning):
    set_tuning("map_bytes=7")
    before = _core.tuning()
    with pytest.raises(ValueError) as caught:
        set_tuning(settings)
    assert str(caught.value) == f"tuning has {REFUSED[settings]}"
    assert _core.tuning() == before, "not what came before the fault either"


SHAPES = [
    Problem(3, 33, (700,)), Problem(300, 20, (9,)), Problem(1100, 64), Problem(40, 2051), Problem(2, 3, (5,)),
    Problem(9, 3, (49,), last=True),
]  # fmt: skip


def problems(dtype):
    return [replace(shape, dtype=dtype, activation="relu", residual=True) for shape in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_result_depends_on_any_one_setting(dtype, set_tuning):
    for p in problems(dtype):
        set_tuning("")
        want = p.results()
        for name, number in itertools.product(NAMES, (0, 100, MOST)):
            set_tuning("")
            set_tuning(f"{name}={number}")
            assert not (found := differing(p.results(), want)), (str(p), name, number, found)


def test_a_second_pass_about_the_mean(set_tuning):
    # Data far from its first value is summed twice; the elementwise pass follows the second.
    x = np.random.default_rng(0).standard_normal((6, 20, 300)) + 1e6
    x[0, :, 0] = 0
    want = batchnorm.batch_norm_train(x)
    for settings in TOGETHER:
        set_tuning(settings)
        for order in (x, np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)):
            got = batchnorm.batch_norm_train(order)
            np.testing.assert_allclose(got.saved.mean, want.saved.mean, rtol=1e-14)
            np.testing.assert_allclose(got.y, want.y, atol=1e-8)


def test_what_the_environment_sets_are_the_defaults():
    code = "from batchnorm import _core as c; a = c.tuning(); c.set_tuning('map_bytes=5,l2_bytes=5'); "
    code += "c.set_tuning(''); print(c.tuning() == a, 'map_bytes=77,' in a)"
    assert output(code, BATCHNORM_TUNING="map_bytes=77") == "True True"


# ---- threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1", "2", "3", "64", "junk", "-4", ""])
def test_any_omp_num_threads(value):
    code = """
        import numpy as np, batchnorm as b
        y = b.batch_norm_train(np.ones((8, 16, 64, 64), np.float32), beta=np.full(16, 2.0)).y
        assert (y == 2).all() and b.get_num_threads() >= 1
        print("done")
    """
    done = run(code, OMP_NUM_THREADS=value)  # libgomp itself complains of junk on standard error
    assert done.stdout.strip() == "done" and done.returncode == 0, done.stderr


@pytest.mark.skipif("libgomp" not in batchnorm.config()["openmp"], reason="this build does without libgomp")
def test_a_system_without_libgomp_hears_what_to_install(tmp_path):
    # A copy of the package whose extension asks for a library that is nowhere.
    copied = shutil.copytree(os.path.dirname(batchnorm.__file__), tmp_path / "copied")
    binary = Path(_core.__file__).read_bytes()
    assert binary.count(b"libgomp.so.1\0") == 1
    (copied / Path(_core.__file__).name).write_bytes(binary.replace(b"libgomp.so.1\0", b"libgomp.so.0\0"))
    done = subprocess.run(
        [sys.executable, "-c", "import copied"], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: libgomp.so.0: cannot open shared object file")
    for command in ("apt install libgomp1", "dnf install libgomp", "apk add libgomp"):
        assert command in last


def test_wait_policy_of_openmp_is_ours_only_while_loading():
    code = "import os, batchnorm; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert output(code) == "None"
    assert output(code, GOMP_SPINCOUNT="77") == "77"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_num_threads_of_a_call(dtype, set_tuning):
    # The same bits, and the default is as before.
    before = batchnorm.get_num_threads()
    for p, settings in itertools.product(problems(dtype), ("", SHARED)):
        set_tuning(settings)
        want = p.results()
        for n in (*THREADS, 65536, np.int64(2)):
            assert not differing(p.results(num_threads=n), want), (str(p), n)
    assert batchnorm.get_num_threads() == before


def test_several_threads_of_python_with_a_number_each():
    p, wrong = Problem(3, 33, (700,), activation="relu", residual=True), []
    want = p.results()

    def work(n, default):
        for _ in range(10):
            if differing(p.results(num_threads=n), want) or batchnorm.get_num_threads() != default:
                wrong.append(n)

    for default in (1, 3):
        with running_on(threads=default, tuning=SHARED):
            in_parallel([functools.partial(work, n, default) for n in (1, 2, 3, None)])
    assert not wrong


def in_parallel(functions):
    workers = [threading.Thread(target=f) for f in functions]
    for each in (threading.Thread.start, threading.Thread.join):
        for worker in workers:
            each(worker)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system lists no threads in /proc")
def test_how_many_threads_there_are():
    # OpenMP starts its threads when they are first needed, and keeps them.
    code = """
        import os, numpy as np, batchnorm as b
        x = np.random.default_rng(0).standard_normal((8, 32, 40, 40)).astype(np.float32)
        y, saved = b.batch_norm_train(x, num_threads=1)
        total = b.Moments()
        calls = (
            lambda n: b.moments(x, num_threads=n),
            lambda n: b.batch_norm(x, saved.mean, saved.var, num_threads=n),
            lambda n: b.batch_norm_train(x, num_threads=n),
            lambda n: b.batch_norm_backward(x, saved, num_threads=n),
            lambda n: total.update(x, num_threads=n),
        )
        b.set_num_threads(8)
        before = len(os.listdir("/proc/self/task"))
        for call, n in (*((call, 1) for call in calls), *zip(calls, range(2, 7)), (calls[0], None)):
            call(n)
            print(len(os.listdir("/proc/self/task")) - before, end=" ")
    """
    assert output(code) == "0 0 0 0 0 1 2 3 4 5 7"


def test_threads_with_small_stacks():
    code = """
        import threading, numpy as np, batchnorm as b
        b.set_num_threads(2)
        threading.stack_size(128 * 1024)
        rng = np.random.default_rng(0)
        def work():
            for shape in ((8, 64, 50, 50), (300, 8), (3000, 2048), (40, 3000), (700, 63)):
                for dtype in (np.float32, np.float64, np.float16):
                    x = rng.standard_normal(shape).astype(dtype)
                    for v in (x, np.repeat(x, 2, 0)[::2], np.repeat(x, 2, 1)[:, : shape[1]]):
                        y, saved = b.batch_norm_train(v, None, np.ones(shape[1]), activation="relu")
                        b.batch_norm_backward(v, saved)
            print("done")
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    """
    assert output(code, OMP_STACKSIZE="192k") == "done"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system lists no threads in /proc")
def test_no_call_makes_threads_after_the_first():
    # Whatever is to be done and however few threads a call asks for. set_num_threads() is another matter.
    code = """
        import os, numpy as np, batchnorm as b
        b.set_num_threads(6)
        seen = set()
        for shape in ((32, 512, 14, 14), (8, 2048, 7, 7), (2, 3, 40, 40), (3, 30000), (64, 8, 9, 9)):
            x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            for order in (x, np.ascontiguousarray(x.swapaxes(1, -1)).swapaxes(1, -1)):
                for n in (None, 2, 6, 1, 3):
                    y, saved = b.batch_norm_train(order, num_threads=n)
                    b.batch_norm_backward(order, saved, num_threads=n)
                    b.batch_norm(order, saved.mean, saved.var, num_threads=n)
                    seen |= {*os.listdir("/proc/self/task")}
            print(len(seen) - first if seen and "first" in globals() else 0, end=" ")
            first = len(seen)
        b.set_num_threads(2)
        b.moments(x)
        b.set_num_threads(6)
        b.moments(x)
        print(len({*os.listdir("/proc/self/task")}) <= first)
    """
    assert output(code, BATCHNORM_TUNING=SHARED) == "0 0 0 0 0 True"


# ---- limits of the system: fewer threads or an exception, never the end of the process ---------------------

LARGE = """
        import os, resource, threading, numpy as np, batchnorm as b
        from resource import setrlimit
        x = np.ones((64, 64, 64, 64), np.float32)
        y = np.empty_like(x)
        def call(threads):
            b.set_num_threads(threads)
            try:
                for _ in range(3):
                    b.batch_norm(x, np.zeros(64), np.full(64, 4.0), eps=0, out=y)
                    assert (y == 0.5).all()
            except MemoryError as error:
                assert str(error)
            os.write(1, b"done ")
        def another_user():  # root may have any number of threads
            os.getuid() or os.setuid(65534)
"""


UNBOUND = "resource.RLIM_INFINITY"
ONE_THREAD = "another_user(); setrlimit(resource.RLIMIT_NPROC, (1, 1))"
LIMITS = {
    "4 GiB of addresses": f"setrlimit(resource.RLIMIT_AS, (4 << 30, {UNBOUND})); call(4096)",
    "2 GiB of addresses": f"setrlimit(resource.RLIMIT_AS, (2 << 30, {UNBOUND})); call(64)",
    "little more than there is": "from pathlib import Path; "
    "size = int(Path('/proc/self/statm').read_text().split()[0]) << 12; "
    f"setrlimit(resource.RLIMIT_AS, (size + (96 << 20), {UNBOUND})); call(64)",
    "one thread": f"{ONE_THREAD}; call(8)",
    "one thread, after two": f"call(2); {ONE_THREAD}; call(8); call(2); call(64)",
    "one thread, and a second one calls": f"worker = threading.Thread(target=lambda: (go.wait(), call(8))); "
    f"go = threading.Event(); worker.start(); {ONE_THREAD}; go.set(); worker.join(); call(3)",
    "room for two teams, of four threads at once": "another_user(); go = threading.Barrier(4); "
    "workers = [threading.Thread(target=lambda: (go.wait(), call(8))) for _ in range(4)]; "
    "size = len(os.listdir('/proc/self/task')) + 4 + 16; setrlimit(resource.RLIMIT_NPROC, (size, size)); "
    "[worker.start() for worker in workers]; [worker.join() for worker in workers]",
    "a smaller team of another user of OpenMP": "import ctypes; call(8); "
    "omp = ctypes.CDLL('libgomp.so.1'); body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None); "
    f"omp.GOMP_parallel(body, None, 2, 0); {ONE_THREAD}; call(8)",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_more_threads_than_the_system_gives(limit):
    pytest.importorskip("resource", reason="this system has no resource limits")
    calls = LIMITS[limit].count("call(") * (4 if "at once" in limit else 1)
    assert output(f"{LARGE}\n        {LIMITS[limit]}\n").split() == ["done"] * calls


@pytest.mark.skipif(not os.path.isfile("/proc/loadavg"), reason="this system does not count its threads")
@pytest.mark.parametrize(
    "limit", [{"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true", "OMP_THREAD_LIMIT": "3"}]
)
def test_a_team_that_openmp_keeps_small_is_not_asked_for_at_every_call(limit):
    code = """
        import numpy as np, batchnorm as b
        def last_thread():
            with open("/proc/loadavg") as file:
                return int(file.read().split()[4])
        x = np.ones((8, 32, 40, 40), np.float32)
        b.set_num_threads(8)
        b.moments(x)
        before = last_thread()
        for _ in range(100):
            b.moments(x)
        print(last_thread() - before < 300)
    """
    assert output(code, **limit) == "True"


@pytest.mark.parametrize(
    "size", ["0", "1b", "16k", "64k", "128", "192k", "1M", "100G", "99999999999G", "16KB", "1 M", "junk"]
)
def test_any_stack_size_of_openmp(size):
    # What is too little for a call, or too much for the system, means one thread; the first says so.
    done = run(LARGE + "        call(3)\n        b.show_config()\n", OMP_STACKSIZE=size)
    assert done.returncode == 0 and done.stdout.startswith("done "), (done.returncode, done.stderr)
    small = size in ("16k", "64k", "128") and "OpenMP" in batchnorm.config()["openmp"]
    assert ("less than 192 KiB of stack (OMP_STACKSIZE)" in done.stdout) == small


# ---- the caller's floating-point mode ----------------------------------------------------------------------

MODES = """
        import ctypes, ctypes.util, numpy as np, batchnorm as b
        m = ctypes.CDLL(ctypes.util.find_library("m"))
        rng = np.random.default_rng(0)
        x = rng.standard_normal((8, 32, 40, 40)).astype(np.float32)
        tiny = (rng.standard_normal(x.shape) * 1e-38).astype(np.float32)
        def results(threads):
            y, saved = b.batch_norm_train(x, num_threads=threads)
            got = b.batch_norm_backward(tiny, saved, num_threads=threads)
            mean, var = b.moments(tiny, num_threads=threads)
            sums = b.Moments().update(x, num_threads=threads)
            both = b.Moments.merged([sums, sums])
            return [a.tobytes() for a in (y, saved.mean, got.dx, mean, var, sums.m2, both.m2)]
        want = results(2)                    # the pool is made in the usual mode
        environment = ctypes.create_string_buffer(64)
        m.fegetenv(environment)
        def set_csr(bits):                   # of x86-64: glibc's fenv_t ends with mxcsr
            changed = ctypes.create_string_buffer(environment.raw, 64)
            csr = int.from_bytes(environment.raw[28:32], "little") | bits
            changed[28:32] = csr.to_bytes(4, "little")
            m.fesetenv(changed)
        found, up, zero = [], lambda: m.fesetround(0x800), lambda: m.fesetround(0xC00)
        for name, change in (("up", up), ("zero", zero), ("flush", lambda: set_csr(0x8040))):
            change()
            got, mode = [results(n) for n in (1, 2)], m.fegetround()
            held = ctypes.create_string_buffer(64)
            m.fegetenv(held)
            m.fesetenv(environment)
            found.append((name, [[a == b for a, b in zip(want, g)].count(False) for g in got]))
            found.append((name, mode, held.raw[28:32].hex()))
        print(found)
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not sys.platform.startswith("linux"), reason="knows x86-64 Linux"
)
def test_the_floating_point_mode_of_the_caller_changes_nothing_and_stays():
    # Rounding upward, towards zero; and denormals taken for zero, as torch.set_flush_denormal does.
    found = ast.literal_eval(output(MODES))
    assert [f for f in found if len(f) == 2] == [(name, [0, 0]) for name in ("up", "zero", "flush")]
    left = {f[0]: f[1:] for f in found if len(f) == 3}
    assert left["up"][0] == 0x800 and left["zero"][0] == 0xC00
    assert int.from_bytes(bytes.fromhex(left["flush"][1]), "little") & 0x8040 == 0x8040


# ---- interrupts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", ["", "virtual_batch_size=2", "residual=x, activation='silu'"])
def test_ctrl_c_inside_one_long_call(threads, options):
    # float16 without an instruction for it takes its time: a second or so for this array.
    code = f"""
        import os, signal, threading, time, numpy as np, batchnorm as b
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        b.set_num_threads({threads})
        x, y = np.zeros((2, 8, 64, 2**18), np.float16)
        mean, var = np.ones(64), np.ones(64)
        def interrupt():
            time.sleep(0.1)
            started.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        started = []
        threading.Thread(target=interrupt).start()
        try:
            b.batch_norm_train(x, running_mean=mean, running_var=var, decay=0.5, out=y, {options})
        except KeyboardInterrupt:
            waited = time.perf_counter() - started[0]
        assert waited < 0.5, waited
        assert (mean == 1).all() and (var == 1).all()
        b.batch_norm_train(x[:, :, :9], running_mean=mean, running_var=var, decay=0.5)
        assert (mean == 0.5).all() and (var == 0.5).all()
        print("interrupted")
    """
    assert output(code, BATCHNORM_ISA="baseline") == "interrupted"


# ---- containers --------------------------------------------------------------------------------------------


NO_GROUPS = ("", "\n", "junk", "1:cpu", "::", "0::/", "7:cpuset:/\n8:cpu2:/x", ":" * 99)
FOLDER = {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"}
DEEP = {
    "a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n", "a/b/c/cpu.max": "800000 100000\n",
    "a/memory.max": f"{4 * GIB}\n", "a/b/memory.max": f"{GIB}\n", "a/b/c/memory.max": "max\n",
    "other/cpu.max": "1000 100000\n",
}  # fmt: skip
# Without a name space of its own, a container's groups carry the host's path but lie at its own top.
OUTSIDE = {
    "cpu.max": "300000 100000\n", "cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": f"{GIB}",
}  # fmt: skip
CPU_MAX = {
    "max 100000\n": 0, "150000 100000\n": 2, "100000 100000\n": 1, "100001 100000\n": 2, "400000 100000\n": 4,
    "1000 100000\n": 1, "50000 25000": 2, "18446744073709551615 1\n": 2**31 - 1, "": 0, "\n": 0, "junk\n": 0,
    "-1 100000\n": 0, "0 100000\n": 0, "100000 0\n": 0, "100000 max\n": 0, "100000\n": 0, "1e5 100000\n": 0,
    "99999999999999999999999 100000\n": 0,
}  # fmt: skip
QUOTAS = {
    ("-1\n", "100000\n"): 0, ("250000\n", "100000\n"): 3, ("50000\n", "100000\n"): 1, ("junk", "100000\n"): 0,
    ("100000\n", ""): 0, ("100000\n", "0\n"): 0, ("500000\n", "100000\n"): 5,
}  # fmt: skip
SIZES = {"max\n": 0, f"{GIB}\n": GIB, "junk\n": 0, "-1\n": 0, "9223372036854771712\n": 0}
# The groups of a process, the files there, and the CPUs and bytes that they leave it.
TREES = [
    *(("0::/\n", {"cpu.max": text}, (cpus, 0)) for text, cpus in CPU_MAX.items()),
    *(
        (f"12:pids:/x\n3:{folder}:/job\n0::/job\n",
         {f"{folder}/job/cpu.cfs_quota_us": quota, f"{folder}/job/cpu.cfs_period_us": period}, (cpus, 0))
        for (quota, period), cpus in QUOTAS.items() for folder in ("cpu", "cpu,cpuacct")
    ),
    *(("0::/a\n", {"a/memory.max": text, "cpu.max": "max"}, (0, size)) for text, size in SIZES.items()),
    *(("5:memory:/b\n", {"memory/b/memory.limit_in_bytes": text}, (0, size)) for text, size in SIZES.items()),
    ("0::/a/b/c\n", DEEP, (2, GIB)),  # parents count
    ("0::/a/b/c", DEEP | {"cpu.max": "100000 100000\n"}, (1, GIB)),
    *((f"0::{path}\n", OUTSIDE, (3, 0)) for path in ("/docker/1234", "/../outside", "/..", "", "/a//b/")),
    *((f"1:cpu,cpuacct:{path}\n2:memory:{path}\n", OUTSIDE, (2, GIB)) for path in ("/docker/12", "/..", "")),
    *((g, FOLDER, (0, 0)) for g in NO_GROUPS),
    ("4:cpu:/job\n0::/job\n", {  # both versions at once
        "cpu/job/cpu.cfs_quota_us": "500000\n", "cpu/job/cpu.cfs_period_us": "100000\n",
        "unified/job/cpu.max": "600000 100000\n",
    }, (5, 0)),
]  # fmt: skip


def test_limits_of_groups(tmp_path):
    for i, (groups, files, limits) in enumerate(TREES):
        for path, text in files.items():
            file = tmp_path / str(i) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert _core.container_limits(str(tmp_path / str(i)), groups) == limits, (groups, files)
    (tmp_path / "cpu.max").mkdir()  # a folder instead of a file
    assert _core.container_limits(str(tmp_path), "0::/\n") == (0, 0)


def inside(tmp_path, code, quota, memory="max", **environment):
    """Output of a process that sees such a tree in the place of its own."""
    for path, text in {
        "cpu.max": f"{quota} 100000", "cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": 100000,
        "memory.max": memory, "memory/memory.limit_in_bytes": memory,
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")
    unshare = [shutil.which("unshare") or "", "--map-root-user", "--mount", "--"]
    mount = f"mount --bind {tmp_path} /sys/fs/cgroup"
    if not unshare[0] or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not let a process mount a folder of its own (unshare)")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("BATCHNORM_", "OMP_", "GOMP_"))}
    done = subprocess.run(
        [*unshare, "sh", "-c", f'{mount} && exec "$0" -W error -c "$1"', sys.executable, code],
        capture_output=True, text=True, timeout=60, env=env | environment,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(CPUS < 2, reason="one CPU is all there is")
def test_threads_and_cache_follow_the_container(tmp_path):
    code = "import batchnorm as b; print(b.get_num_threads())"
    for quota, environment, threads in (
        (60000, {}, 1), (10**9, {}, CPUS), (60000, {"OMP_NUM_THREADS": "2"}, 2),
        (60000, {"OMP_NUM_THREADS": "2,3"}, 2),
    ):  # fmt: skip
        assert inside(tmp_path, code, quota, **environment) == str(threads)
    code = "import batchnorm as b; b.set_num_threads(3); print(b.get_num_threads(), b.cache_info().limit)"
    assert inside(tmp_path, code, 60000, GIB) == f"3 {GIB // 8}"


# ---- the cache: what it keeps ------------------------------------------------------------------------------


@pytest.fixture
def cache():
    """An empty cache with room, and the limit as it was."""
    before = cache_info().limit
    gc.collect()
    set_cache_limit(512 * MIB)
    empty_cache()
    yield
    set_cache_limit(before)


cached = pytest.mark.usefixtures("cache")


def tensor(mib, seed=0):
    """(4, 8, n) float32 of that many MiB."""
    return np.random.default_rng(seed).standard_normal((4, 8, int(mib * MIB) // 128), np.float32)


def forward(x):
    return batchnorm.batch_norm_train(x).y


def address(a):
    return a.__array_interface__["data"][0]


def change(before):
    """What cache_info() counts since `before`, without the limit."""
    return tuple(now - then for now, then in zip(cache_info()[1:], before[1:], strict=True))


@cached
def test_every_large_result_comes_from_it_and_is_an_array_like_any_other():
    x, layer = tensor(1), batchnorm.BatchNorm(8)
    before = cache_info()
    y, saved = batchnorm.batch_norm_train(x)
    z = batchnorm.batch_norm(x, np.zeros(8), np.ones(8))
    arrays = (y, z, batchnorm.batch_norm_backward(x, saved).dx, layer(x), layer.backward(x))
    assert len({address(a) for a in arrays}) == 5 and change(before) == (0, 5 * MIB, 0, 0, 5)
    for a in (*arrays, forward(tensor(4))):
        assert get_handler_name(a) == "batchnorm" and type(a) is np.ndarray and a.base is None
        assert a.flags.owndata and a.flags.writeable and a.flags.c_contiguous and a.flags.aligned
    assert address(a) % (2 * MIB) == 0
    orders = (0, 1, 2, 3), (0, 3, 1, 2), (3, 1, 2, 0), (1, 0, 2, 3)
    for order, dtype in itertools.product(orders, (np.float32, np.float64, np.float16)):
        x = np.ones((8, 16, 64, 64), dtype).transpose(order)
        y = batchnorm.batch_norm(x, np.zeros(x.shape[1]), np.ones(x.shape[1]))
        assert y.strides == np.empty_like(x).strides and y.dtype == x.dtype
        assert get_handler_name(y) == "batchnorm"
    copies = pickle.loads(pickle.dumps(y)), copy.deepcopy(y), y.copy(), y + 0
    assert "batchnorm" not in map(get_handler_name, copies)


@cached
def test_what_does_not_come_from_it():
    before = cache_info()
    small, x = np.ones((4, 8, SMALLEST // 128 - 1), np.float32), tensor(1)
    assert get_handler_name(forward(small)) == "default_allocator"
    out = np.empty_like(x)
    assert batchnorm.batch_norm_train(x, out=out).y is out
    assert change(before) == (0, 0, 0, 0, 0)
    with pytest.raises(ValueError):
        batchnorm.batch_norm_train(x, np.full(8, np.nan))
    assert cache_info().in_use == before.in_use, "a refused call takes nothing"
    assert get_handler_name(forward(np.ones((4, 8, SMALLEST // 128), np.float32))) == "batchnorm"
    assert get_handler_name() == get_handler_name(np.empty(MIB)) == "default_allocator"


@cached
def test_buffers_serve_somewhat_smaller_results_the_best_fitting_first():
    before = cache_info()
    y = forward(tensor(10))
    where = address(y)
    del y
    y = forward(tensor(9))
    assert address(y) == where and change(before) == (0, 10 * MIB, 0, 1, 1)
    del y
    y = forward(tensor(8))
    assert address(y) != where and change(before) == (10 * MIB, 8 * MIB, 1, 1, 2)
    del y
    empty_cache()
    sizes = 10, 9.5, 9
    arrays = [forward(tensor(mib)) for mib in sizes]
    where = {mib: address(a) for mib, a in zip(sizes, arrays, strict=True)}
    del arrays
    arrays = [forward(tensor(mib)) for mib in (9, 9.5, 10)]
    assert [address(a) for a in arrays] == [where[9], where[9.5], where[10]]


# ---- how much it keeps -------------------------------------------------------------------------------------


@cached
def test_cache_info_adds_up(capsys):
    before = cache_info()
    assert (before.held, before.buffers) == (0, 0)
    x = tensor(1)
    y, z = forward(x), forward(x)
    assert change(before) == (0, 2 * MIB, 0, 0, 2)
    want, where = y.tobytes(), address(y)
    del y
    assert change(before) == (MIB, MIB, 1, 0, 2)
    batchnorm.show_config()
    assert "cache        1 of 512 MiB held" in capsys.readouterr().out
    y = forward(x)
    assert change(before) == (0, 2 * MIB, 0, 1, 2)
    assert address(y) == where and y.tobytes() == want
    del y, z
    assert change(before) == (2 * MIB, 0, 2, 1, 2)
    assert [empty_cache(), empty_cache()] == [2 * MIB, 0] and change(before) == (0, 0, 0, 1, 2)
    y = forward(tensor(15.01))
    assert change(before)[1] == 15 * MIB + 64 * 1024, "whole huge pages where that adds little"
    z = forward(tensor(17))
    assert change(before)[1] == 33 * MIB + 64 * 1024
    del y, z


@cached
def test_never_holds_more_than_the_limit():
    set_cache_limit(10 * MIB)
    arrays = [forward(tensor(mib)) for mib in (1, 2, 3, 4, 5, 6)]
    while arrays:
        arrays.pop()
        assert cache_info().held <= 10 * MIB
    assert cache_info().held == 10 * MIB
    set_cache_limit(5 * MIB)  # a lower limit holds at once
    assert cache_info().limit == 5 * MIB and cache_info().held <= 5 * MIB
    empty_cache()
    small, large = forward(tensor(2)), forward(tensor(6))
    del small, large
    assert cache_info().held == 2 * MIB, "what exceeds the limit alone drives nothing out"


@cached
def test_the_oldest_buffers_give_way():
    set_cache_limit(9 * MIB)
    arrays = {mib: forward(tensor(mib)) for mib in (2, 3, 4, 5)}
    for mib in (3, 4, 2):
        del arrays[mib]
    assert cache_info().held == 9 * MIB
    del arrays[5]  # 3 and then 4 must go
    assert (cache_info().held, cache_info().buffers) == (7 * MIB, 2)
    for mib, hit in ((3, 0), (4, 0), (2, 1), (5, 1)):
        hits = cache_info().hits
        arrays[mib] = forward(tensor(mib))
        assert cache_info().hits - hits == hit, mib


@cached
def test_limits_from_0_to_64_bits():
    x = tensor(1)
    y, z = forward(x), forward(x)
    del z
    set_cache_limit(0)
    before = cache_info()
    assert before.held == 0
    del y
    assert change(before) == (0, -MIB, 0, 0, 0)
    before = cache_info()
    y = forward(x)
    assert get_handler_name(y) == "default_allocator" and change(before) == (0, 0, 0, 0, 0)
    for limit in (1, np.int64(5), 2**63 - 1):
        set_cache_limit(limit)
        assert cache_info().limit == limit
    forward(x)
    assert cache_info().held == MIB


LIMIT = "import batchnorm as b; print(b.cache_info().limit, b.config()['cache_limit'])"


def test_the_limit_by_default_and_by_environment():
    limit = int(output(LIMIT).split()[0])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert 0 < limit <= min(2**31, memory // 8)
    assert output(LIMIT, BATCHNORM_CACHE_LIMIT="") == f"{limit} {limit}"
    for text in ("0", "123456789", str(2**63 - 1)):
        assert output(LIMIT, BATCHNORM_CACHE_LIMIT=text) == f"{text} {text}"
    resource = pytest.importorskip("resource", reason="this system has no resource limits")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, {resource.RLIM_INFINITY})); "
    assert int(output(code + LIMIT).split()[0]) <= 2**29


# ---- nobody can tell ---------------------------------------------------------------------------------------

VIEWS = {
    "slice": lambda y: y[1:, ::2],
    "transposed": lambda y: y.T,
    "other dtype": lambda y: y.view(np.int32),
    "one element": lambda y: y.reshape(-1)[-1:],
    "broadcast": lambda y: np.broadcast_to(y[0, :1, 7], (3, 3)),
    "memoryview": memoryview,
    "of a memoryview": lambda y: np.asarray(memoryview(y))[2],
}


@cached
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_keep_the_memory(view):
    x, other = tensor(1), tensor(1, seed=1)
    y = forward(x)
    where, seen, want = address(y), view(y), np.array(view(y.copy()))
    del y
    gc.collect()
    results = [forward(other) for _ in range(3)]
    assert where not in map(address, results) and np.array_equal(np.asarray(seen), want)
    del seen
    gc.collect()
    assert address(forward(other)) == where, "free when the last view is gone"


@cached
def test_resize():
    y = forward(tensor(4))
    want, in_use, size = y.ravel().copy(), cache_info().in_use, y.size
    # The new length, what is then in use in MiB: twice as large, a little smaller, half, memory of malloc.
    for n, more in ((2 * size, 4), (2 * size - 5, 4), (size // 2, -2), (10, -4), (10**6, -4)):
        before, where = min(n, y.size), address(y)
        y.resize(n, refcheck=False)
        assert cache_info().in_use == in_use + more * MIB, n
        assert np.array_equal(y[: min(before, size)], want[: min(before, size)])
        assert not y[max(before, size) :].any() and (n != 2 * size - 5 or address(y) == where)
    del y
    assert cache_info().in_use == in_use - 4 * MIB


@cached
def test_tracemalloc_sees_it():
    x = tensor(4)
    forward(x)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        y = forward(x)
        during = tracemalloc.get_traced_memory()[0]
        del y
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert during - before == pytest.approx(4 * MIB, abs=20000)
    assert after - before == pytest.approx(0, abs=20000)


HANDLER = """
        import ctypes as c, numpy as np, batchnorm as b
        from importlib import import_module
        core = import_module("numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray")
        libc, V, S, F, calls = c.CDLL(None), c.c_void_p, c.c_size_t, c.CFUNCTYPE, []
        for f, of in ((libc.malloc, [S]), (libc.calloc, [S, S]), (libc.realloc, [V, S]), (libc.free, [V])):
            f.restype, f.argtypes = V, of
        kinds = F(V, V, S), F(V, V, S, S), F(V, V, V, S), F(None, V, V, S)
        functions = (
            lambda _, n: calls.append(n) or libc.malloc(n), lambda _, n, m: libc.calloc(n, m),
            lambda _, p, n: libc.realloc(p, n), lambda _, p, n: libc.free(p) and None)
        class Handler(c.Structure):
            _fields_ = [("name", c.c_char * 127), ("version", c.c_uint8), ("context", V)] + [
                (f"f{i}", kind) for i, kind in enumerate(kinds)]
        mine = Handler(b"mine", 1, None, *(kind(f) for kind, f in zip(kinds, functions)))
        new, get = c.pythonapi.PyCapsule_New, c.pythonapi.PyCapsule_GetPointer
        new.restype, new.argtypes = c.py_object, [V, c.c_char_p, V]
        get.restype, get.argtypes = V, [c.py_object, c.c_char_p]
        table = c.cast(get(core._ARRAY_API, None), c.POINTER(V))
        set_handler = c.PYFUNCTYPE(c.py_object, c.py_object)(table[304])
        x = np.ones((4, 8, 2**15), np.float32)
        cached = b.batch_norm_train(x).y
        before = set_handler(new(c.addressof(mine), b"mem_handler", None))
        calls.clear()
        y = b.batch_norm_train(x).y
        print(core.get_handler_name(y), core.get_handler_name(), x.nbytes in calls)
        print(core.get_handler_name(cached))
        del cached                                   # returns to the cache all the same
        print(b.cache_info().held == x.nbytes)
        del y
        set_handler(before)
        y = b.batch_norm_train(x).y
        print(core.get_handler_name(y), core.get_handler_name(), b.cache_info().hits)
"""


def test_a_handler_of_the_users_own_is_respected():
    words = "mine mine True", "batchnorm", "True", "batchnorm default_allocator 1"
    assert output(HANDLER).split("\n") == list(words)


@cached
def test_threads_create_and_drop():
    set_cache_limit(8 * MIB)  # evicts all the time
    inputs = [tensor(mib, seed) for seed, mib in enumerate((0.5, 1, 1.1, 2, 3))]
    want, wrong = [forward(x).tobytes() for x in inputs], []
    in_use = cache_info().in_use

    def work(seed):
        generator, kept = np.random.default_rng(seed), {}
        for step in range(60):
            i = int(generator.integers(len(inputs)))
            kept[int(generator.integers(3))] = (i, forward(inputs[i]))
            if step % 20 == 7:
                empty_cache()
            if cache_info().held > 8 * MIB:
                wrong.append("too much held")
            wrong.extend(j for j, z in kept.values() if step % 6 == 0 and z.tobytes() != want[j])

    in_parallel([functools.partial(work, seed) for seed in range(8)])
    assert wrong == [] and cache_info().in_use == in_use
    arrays = [forward(inputs[1]) for _ in range(5)]
    in_parallel([arrays.clear])  # dropped on another thread
    assert cache_info().in_use == in_use


# ---- fork, exit, out of memory -----------------------------------------------------------------------------

PRELUDE = """
        import warnings; warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        import gc, os, sys, threading, time, numpy as np, batchnorm as b
        def tensor(mib, seed=0):
            return np.random.default_rng(seed).standard_normal((4, 8, int(mib * 2**20) // 128), np.float32)
        def forward(x):
            return b.batch_norm_train(x).y
"""


@needs_fork
def test_fork_after_use():
    code = """
        b.set_num_threads(3)
        x = tensor(8)
        y, z = forward(x), forward(x)
        want = y.tobytes()
        del z
        before = b.cache_info()
        children = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                ok = b.cache_info()[1:4] == (0, 8 * 2**20, 0) and y.tobytes() == want
                y[:] = 7                                       # the child's own copy
                del y
                ok = ok and b.cache_info()[1:4] == (8 * 2**20, 0, 1)
                for _ in range(5):
                    ok = ok and forward(x).tobytes() == want
                ok = ok and b.empty_cache() == 8 * 2**20 and forward(x).tobytes() == want
                os._exit(0 if ok else 1)
            children.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
        same = b.cache_info() == before
        print(codes, same, y.tobytes() == want, forward(x).tobytes() == want, b.cache_info().hits)
    """
    assert output(PRELUDE + code) == "[0, 0, 0] True True True 1"


@needs_fork
def test_fork_while_other_threads_use_the_cache():
    code = """
        b.set_num_threads(1)
        b.set_cache_limit(5 * 2**20)
        inputs, stop, codes = [tensor(mib) for mib in (1, 2, 3)], [], set()
        want = [forward(x).tobytes() for x in inputs]
        def work(x):
            while not stop: forward(x); b.empty_cache()
        workers = [threading.Thread(target=work, args=(x,)) for x in inputs]
        for w in workers: w.start()
        for _ in range(40):
            pid = os.fork()
            if pid == 0:
                ok = all(forward(x).tobytes() == w for x, w in zip(inputs, want))
                os._exit(0 if ok and b.cache_info().held <= 5 * 2**20 else 1)
            codes.add(os.waitpid(pid, 0)[1])
        stop.append(1)
        for w in workers: w.join()
        print(codes)
    """
    assert output(PRELUDE + code) == "{0}"


ENDINGS = {
    "live": "kept = forward(x)",
    "atexit": "import atexit; kept = forward(x); atexit.register(lambda: forward(x)[0, 0, 0])",
    "modules": "sys.kept = forward(x); np.kept = forward(x); b.kept = [forward(x)]; b.kept.append(b.kept)",
    "del": """class Late:
            def __init__(self): self.y = forward(x)
            def __del__(self, forward=forward, x=x): del self.y; forward(x)
        late = Late(); late.loop = late""",
    "daemons": """def work():
            while True: forward(x)
        for _ in range(3): threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)""",
    "daemon holds": """def work(y):
            time.sleep(60)
        threading.Thread(target=work, args=(forward(x),), daemon=True).start()""",
    "thread local": """local = threading.local(); local.y = forward(x)
        def work(): local.y = forward(x); time.sleep(0.1)
        threading.Thread(target=work).start()""",
    "exit": "kept = forward(x); sys.exit(0)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_interpreter_exit(ending):
    done = run(
        f"{PRELUDE}\n        x = tensor(2)\n        print('leaving', flush=True)\n        {ENDINGS[ending]}\n"
    )
    assert done.returncode == 0 and done.stdout.strip() == "leaving"
    assert "Traceback" not in done.stderr.replace("Exception ignored", ""), done.stderr


def test_out_of_memory():
    pytest.importorskip("resource", reason="this system has no resource limits")
    code = """
        import resource
        b.set_num_threads(1)
        b.set_cache_limit(2**30)
        x = tensor(64)
        y = forward(x)
        del y
        layer = b.BatchNorm(8)
        layer(x[:, :, :1000])
        kept = [forward(tensor(10))]
        del kept
        assert b.cache_info().buffers == 2
        def used():
            with open("/proc/self/statm") as f:
                return int(f.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        large = np.concatenate([x, x[:1]])                               # 80 MiB
        resource.setrlimit(resource.RLIMIT_AS, (used() + 40 * 2**20, resource.RLIM_INFINITY))
        y = forward(large)                                               # fits once the cache is empty
        assert (b.cache_info().held, b.cache_info().in_use) == (0, 80 * 2**20)
        state = layer.running_mean.tobytes(), layer.running_var.tobytes()
        for _ in range(3):
            try:
                layer(large)
            except MemoryError as error:
                print("MemoryError", str(error)[:25])
        assert state == (layer.running_mean.tobytes(), layer.running_var.tobytes())
        assert b.cache_info().in_use == 80 * 2**20
        small = forward(x[:, :, :10000])                                 # what fits still works
        del y
        y = forward(large)
        print(y.shape == large.shape, b.cache_info().hits)
    """
    assert output(PRELUDE + code).split("\n") == ["MemoryError Unable to allocate 80.0 M"] * 3 + ["True 1"]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system has no /proc/self/statm")
def test_memory_goes_back_and_does_not_grow():
    code = """
        def rss():
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
        x = tensor(64)
        forward(x)
        empty = rss() - b.cache_info().held / 2**20
        arrays = [forward(x) for _ in range(4)]
        del arrays
        full = rss()
        given = b.empty_cache()
        assert given == 256 * 2**20 and full - rss() > 250, (full, rss())
        assert rss() - empty < 10, (rss(), empty)
        small = [tensor(mib)[:, :, :-5] for mib in (0.3, 0.4, 0.5)]
        def loop(n):
            kept = [None] * 5
            for i in range(n):
                y, saved = b.batch_norm_train(small[i % 3], keep="y" if i % 2 else "x")
                kept[i % 5] = b.batch_norm_backward(y, saved).dx
                if i % 7 == 0:
                    try: b.batch_norm_train(small[0], eps=-1.0)
                    except ValueError: pass
            gc.collect()
            return rss()
        before = loop(1000)
        assert loop(4000) - before < 4
        b.empty_cache()
        print("done", b.cache_info().in_use)
    """
    assert output(PRELUDE + code) == "done 0"


@cached
def test_no_page_faults_when_results_are_discarded():
    resource = pytest.importorskip("resource", reason="this system has no resource limits")
    x = tensor(32)
    forward(x)

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            forward(x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(3)) < 100  # 10 x 8192 small pages, or 10 x 16 huge ones
