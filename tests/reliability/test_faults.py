"""Faults of the world around a call, each in a process of its own with a deadline: none may hang, end the
process or change a result. What depends on the process without being a fault is in
operations/test_process.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from support.processes import output, run

PRELUDE = """
        import os, signal, sys, threading, time, numpy as np, batchnorm as b
        rng = np.random.default_rng(0)
        x = rng.standard_normal((8, 32, 40, 40)).astype(np.float32)
        def results(n=None):
            y, saved = b.batch_norm_train(x, num_threads=n, activation="relu")
            dx = b.batch_norm_backward(x, saved, num_threads=n).dx
            return b"".join(a.tobytes() for a in (y, saved.mean, dx))
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


# ---- processes ---------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_fork_and_spawn_pools_after_use(tmp_path, start):
    # As in a data loader: the parent has a team of threads, its children make their own.
    (tmp_path / "work.py").write_text(
        "import hashlib, numpy as np, batchnorm as b\n"
        "def work(n):\n"
        "    x = np.random.default_rng(0).standard_normal((8, 32, 40, 40)).astype(np.float32)\n"
        "    y, saved = b.batch_norm_train(x, num_threads=n)\n"
        "    return hashlib.sha256(y.tobytes() + b.batch_norm_backward(x, saved).dx.tobytes()).hexdigest()\n"
    )
    code = f"""
        import warnings; warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        import multiprocessing, sys
        sys.path.insert(0, {str(tmp_path)!r})
        from work import b, work
        if __name__ == "__main__":
            b.set_num_threads(3)
            want = work(None)
            with multiprocessing.get_context({start!r}).Pool(3) as pool:
                print(set(pool.map(work, [1, 2, 3, None] * 3)) == {{want}}, work(2) == want)
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "True True", done.stderr


def test_a_child_that_is_killed_inside_a_call():
    # Its parent, which shares the pages of the cache and of x, goes on.
    code = """
        import multiprocessing, warnings; warnings.simplefilter("ignore", DeprecationWarning)
        want = results()
        def work():
            while True: results()
        children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
        for child in children: child.start()
        time.sleep(0.3)
        for child in children: child.kill()
        for child in children: child.join(30)
        print([child.exitcode for child in children], results() == want)
    """
    assert output(PRELUDE + code) == f"[{', '.join([str(-signal.SIGKILL)] * 3)}] True"


# ---- threads -----------------------------------------------------------------------------------------------


def test_threads_of_ones_own_on_one_layer_in_eval_mode():
    code = """
        layer = b.BatchNorm(32, zero_debias=True)
        for _ in range(3): layer(x)
        layer.eval()
        want, state = layer(x).tobytes(), {k: v.tobytes() for k, v in layer.state_dict().items()}
        wrong = []
        def work():
            for _ in range(40):
                if layer(x).tobytes() != want: wrong.append(1)
        workers = [threading.Thread(target=work) for _ in range(8)]
        for w in workers: w.start()
        for w in workers: w.join()
        print(wrong, {k: v.tobytes() for k, v in layer.state_dict().items()} == state)
    """
    assert output(PRELUDE + code) == "[] True"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system lists no threads in /proc")
def test_an_outer_pool_of_threads_leaves_few():
    # Each thread that calls has a team; it ends with the thread.
    code = """
        from concurrent.futures import ThreadPoolExecutor
        b.set_num_threads(4)
        want = results()
        with ThreadPoolExecutor(32) as pool:
            same = set(pool.map(lambda n: results() == want, range(128)))
        for _ in range(100):
            left = len(os.listdir("/proc/self/task"))
            if left <= 64: break
            time.sleep(0.1)
        print(same, left <= 64, results() == want)
    """
    assert output(PRELUDE + code) == "{True} True True"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_affinity_reduced_after_import():
    code = """
        b.set_num_threads(4)
        want = results()
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(results() == want, results(8) == want, b.get_num_threads())
    """
    assert output(PRELUDE + code) == "True True 4"


@pytest.mark.parametrize("value", ["7", "2,3", "0", "-1", "1e3", "99999999999999999999", " "])
def test_openmp_num_threads_of_any_kind(value):
    done = run(PRELUDE + "        print(len(results()), b.get_num_threads() >= 1)", OMP_NUM_THREADS=value)
    assert done.returncode == 0 and done.stdout.strip().endswith("True"), done.stderr


# ---- memory that changes or goes while a call reads it -----------------------------------------------------


def test_x_is_written_by_another_thread_during_calls():
    # The caller's race: results are anybody's, but memory is safe, and the next call on quiet data is right.
    code = """
        want, stop = results(), []
        def write():
            while not stop:
                for value in (np.nan, np.inf, 1e38, 0): noisy[...] = value
        noisy = x.copy()
        weights = np.ones(8)
        threading.Thread(target=write, daemon=True).start()
        layer = b.BatchNorm(32, on_nonfinite="skip")
        for _ in range(60):
            for options in ({}, {"keep": "y"}, {"virtual_batch_size": 3}, {"mask": noisy > 0}):
                y, saved = b.batch_norm_train(noisy, **options)
                try: b.batch_norm_backward(noisy, saved)
                except RuntimeError as error: assert "overwritten" in str(error)
            layer(noisy)
        stop.append(1)
        print(np.isfinite(layer.running_mean).all(), results() == want)
    """
    assert output(PRELUDE + code) == "True True"


def test_x_is_dropped_by_another_thread_during_a_call():
    code = """
        import gc
        want, box, wrong = results(), [], []
        def drop():
            while True:
                box.clear(); gc.collect()
        threading.Thread(target=drop, daemon=True).start()
        y = b.batch_norm_train(x).y.tobytes()
        for _ in range(200):
            box.append(x.copy())
            try: got, saved = b.batch_norm_train(box[0])
            except IndexError: continue
            dx = b.batch_norm_backward(x, saved).dx
            wrong += [1] * (got.tobytes() != y) + [2] * (not np.isfinite(dx).all())
        print(wrong, results() == want)
    """
    assert output(PRELUDE + code) == "[] True"


def test_a_read_only_file_in_memory(tmp_path):
    code = f"""
        np.save({str(tmp_path / "x.npy")!r}, x)
        mapped = np.load({str(tmp_path / "x.npy")!r}, mmap_mode="r")
        want = results()
        x, keep = mapped, x
        same = results() == want
        try: b.batch_norm_train(mapped, out=mapped)
        except ValueError as error: print(same, "read-only" in str(error), (mapped == keep).all())
    """
    assert output(PRELUDE + code) == "True True True"


def test_memory_runs_out_in_each_call_and_the_state_stays():
    # Forward, backward, double backward, moments and the layer: MemoryError, and the same again when there is
    # memory.
    pytest.importorskip("resource", reason="this system has no resource limits")
    code = """
        import resource
        b.set_num_threads(1); b.set_cache_limit(0)
        x = rng.standard_normal((64, 64, 64, 64)).astype(np.float32)              # 64 MiB
        layer = b.BatchNorm(64); layer(x[:2]); layer.backward(x[:2]); layer(x)
        y, saved = b.batch_norm_train(x)
        calls = (
            lambda: b.batch_norm_train(x, mask=x > 0), lambda: b.batch_norm_backward(x, saved),
            lambda: b.batch_norm_double_backward(x, saved, ddx=x),
            lambda: layer(x), lambda: layer.backward(x),
            lambda: b.batch_norm(x, saved.mean, saved.var),
            lambda: b.batch_norm_train(x.swapaxes(1, 3)[:, ::2]),
        )
        def state(): return {k: v.tobytes() for k, v in layer.state_dict().items()}
        before, soft = state(), resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as f: size = int(f.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + 8 * 2**20, soft[1]))
        refused = 0
        for call in calls:
            try: call()
            except MemoryError as error: refused += bool(str(error))
        resource.setrlimit(resource.RLIMIT_AS, soft)
        unchanged = state() == before
        for call in calls: call()
        print(refused == len(calls), unchanged, y.tobytes() == b.batch_norm_train(x).y.tobytes())
    """
    assert output(PRELUDE + code) == "True True True"


# ---- the floating-point mode -------------------------------------------------------------------------------


FLUSHED = """
        import ctypes
        tiny = (rng.standard_normal(x.shape) * 1e-40).astype(np.float32)
        def of_tiny(n):
            y, saved = b.batch_norm_train(tiny, eps=0, num_threads=n)
            dx = b.batch_norm_backward(tiny, saved).dx
            return [a.tobytes() for a in (y, saved.mean, saved.inv_std, dx)]
        want, before = of_tiny(1), [results(n) for n in (1, 3)]
        one = np.float32(1e-40)
        assert one * np.float32(0.5) != 0
        {flush}
        really = np.array([one] * 4) * np.float32(0.5)
        same = [results(n) for n in (1, 3)] == before
        print((really == 0).all(), [of_tiny(n) == want for n in (1, 2, 3)], same)
"""


def test_flush_to_zero_set_by_a_library_built_with_fast_math(tmp_path):
    # g++ until 12 links a constructor into it that sets the mode of the thread that loads it.
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    (tmp_path / "fast.cpp").write_text('extern "C" int one() { return 1; }\n')
    library = tmp_path / "libfast.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Ofast", "-o", library, tmp_path / "fast.cpp"], check=True)
    flush = f"ctypes.CDLL({str(library)!r}).one()"
    found = output(PRELUDE + FLUSHED.format(flush=flush))
    if found.startswith("False"):
        pytest.skip("this g++ sets no mode in a library (it is 13 or later)")
    assert found == "True [True, True, True] True"


@needs("torch")
def test_flush_to_zero_set_by_torch():
    flush = "import torch; assert torch.set_flush_denormal(True)"
    assert output(PRELUDE + FLUSHED.format(flush=flush)) == "True [True, True, True] True"


# ---- other libraries ---------------------------------------------------------------------------------------

OTHERS = {
    "torch": "import torch; torch.ones(2**18).add_(1).sum()",
    "numba": "import numba; numba.njit(parallel=True)(lambda n: sum([i for i in numba.prange(n)]))",
    "sklearn": "from sklearn.cluster import KMeans; KMeans(2, n_init=1).fit(rng.random((3000, 4)))",
}


@pytest.mark.parametrize("names", ["torch numba", "torch numba sklearn"])
def test_openmp_of_other_libraries(names):
    """The same bits whichever comes first, and no OpenMP runtime that is not there without us.

    scikit-learn's wheel has one of its own, under a name of its own, which nothing else can share.
    """
    missing = [n for n in (*names.split(), "threadpoolctl") if importlib.util.find_spec(n) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    quiet = (
        "import warnings; warnings.simplefilter('ignore'); import numpy as np; rng = np.random.default_rng(0)"
    )
    count = """import threadpoolctl
print(len({p["filepath"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "openmp"}))"""
    theirs = "\n".join(OTHERS[name] for name in names.split())
    ours = f"""{textwrap.dedent(PRELUDE)}
import hashlib
got = {{hashlib.sha256(results(n)).hexdigest() for n in (None, 2, 3)}}
assert len(got) == 1
print(*got)"""
    alone, first, with_us = output("\n".join((quiet, theirs, count, ours, theirs, count))).split()
    second, as_well = output("\n".join((quiet, ours, theirs, ours, count))).split()[1:]
    assert first == second and with_us == as_well == alone
    assert alone == ("2" if "sklearn" in names else "1")


# ---- Ctrl-C ------------------------------------------------------------------------------------------------

LONG_CALLS = {
    "inference": "b.batch_norm(x, mean, var, out=y)",
    "training": "b.batch_norm_train(x, running_mean=mean, running_var=var, out=y)",
    "backward": "b.batch_norm_backward(x, saved, out=y)",
    "double backward": "b.batch_norm_double_backward(x, saved, ddx=x)",
    "moments": "b.moments(x)",
    "accumulated moments": "total.update(x)",
    "a layer": "layer(x, out=y)",
    "a layer's backward": "layer.backward(x, out=y)",
}


@pytest.mark.parametrize("call", LONG_CALLS)
def test_ctrl_c_inside_any_call(call):
    # The slowest level and storage type, and as many values as keep one call busy for half a second or more.
    code = f"""
        import os, signal, threading, time, numpy as np, batchnorm as b
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        b.set_num_threads(1)
        x, y = np.zeros((2, 8, 64, 2**{20 if "moments" in call else 17}), np.float16)
        x[0] = 1
        mean, var = np.ones(64), np.ones(64)
        layer, total = b.BatchNorm(64), b.Moments()
        layer(x[:, :, :9]); total.update(x[:, :, :9])
        saved = b.batch_norm_train(x, keep="x").saved if "saved" in {LONG_CALLS[call]!r} else None
        if {call!r} == "a layer's backward": layer(x)
        def state():
            arrays = mean, var, x, total.mean, total.m2, *layer.state_dict().values()
            return [np.asarray(a).tobytes() for a in arrays]
        before = state()
        def interrupt():
            time.sleep(0.05)
            started.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        started = []
        threading.Thread(target=interrupt).start()
        called = time.perf_counter()
        try:
            {LONG_CALLS[call]}
            print("was done in", time.perf_counter() - called)
            time.sleep(1)
        except KeyboardInterrupt:
            waited = time.perf_counter() - started[0]
            assert waited < 0.5, waited
            assert state() == before
            print("interrupted")
    """
    assert output(code, BATCHNORM_ISA="baseline") == "interrupted"
