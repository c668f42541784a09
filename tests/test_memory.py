"""The cache of warm memory for results: what it keeps, what it gives back, and that nobody can tell."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import threading
import tracemalloc

import batchnorm
import numpy as np
import pytest
from batchnorm import _core, cache_info, empty_cache, set_cache_limit

from processes import output, run

MIB = 2**20
SMALLEST = 128 * 1024  # bytes; kSmallest in cpp/core/memory.h

try:
    from numpy._core.multiarray import get_handler_name
except ImportError:  # NumPy 1
    from numpy.core.multiarray import get_handler_name

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(autouse=True)
def _empty():
    """An empty cache with room, and the limit as it was."""
    before = cache_info().limit
    gc.collect()
    set_cache_limit(512 * MIB)
    empty_cache()
    yield
    set_cache_limit(before)


def tensor(mib, seed=0):
    """(4, 8, n) float32 of that many MiB."""
    shape = (4, 8, int(mib * MIB) // 128)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def forward(x):
    return batchnorm.batch_norm_train(x).y


def address(a):
    return a.__array_interface__["data"][0]


def change(before):
    """What cache_info() counts since `before`, without the limit."""
    return tuple(now - then for now, then in zip(cache_info()[1:], before[1:], strict=True))


# ---- what it keeps ----


@pytest.mark.parametrize("mib", [0.125, 0.3, 1, 3, 20])
def test_memory_of_a_dead_array_is_used_again(mib):
    x = tensor(mib)
    y = forward(x)
    want, where = y.tobytes(), address(y)
    del y
    y = forward(x)
    assert address(y) == where and y.tobytes() == want
    assert cache_info().hits >= 1


def test_every_large_result_comes_from_it():
    x = tensor(1)
    before = cache_info()
    y, mean, inv_std = batchnorm.batch_norm_train(x)
    z = batchnorm.batch_norm(x, np.zeros(8), np.ones(8))
    dx = batchnorm.batch_norm_backward(x, x, mean, inv_std).dx
    layer = batchnorm.BatchNorm(8)
    layer_y = layer(x)
    layer_dx = layer.backward(x)
    arrays = (y, z, dx, layer_y, layer_dx)
    assert {get_handler_name(a) for a in arrays} == {"batchnorm"}
    assert len({address(a) for a in arrays}) == 5
    assert change(before) == (0, 5 * MIB, 0, 0, 5)


def test_a_result_is_an_array_like_any_other():
    y = forward(tensor(4))
    assert type(y) is np.ndarray and y.base is None
    assert y.flags.owndata and y.flags.writeable and y.flags.c_contiguous and y.flags.aligned
    assert address(y) % (2 * MIB) == 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 1, 2, 0), (1, 0, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_memory_order_follows_x(order, dtype):
    x = np.ones((8, 16, 64, 64), dtype).transpose(order)
    y = batchnorm.batch_norm(x, np.zeros(x.shape[1]), np.ones(x.shape[1]))
    assert y.strides == np.empty_like(x).strides and y.dtype == x.dtype
    assert get_handler_name(y) == "batchnorm"


def test_small_results_do_not_come_from_it():
    before = cache_info()
    x = np.ones((4, 8, SMALLEST // 128 - 1), np.float32)
    assert get_handler_name(forward(x)) == "default_allocator"
    assert change(before) == (0, 0, 0, 0, 0)
    x = np.ones((4, 8, SMALLEST // 128), np.float32)
    assert get_handler_name(forward(x)) == "batchnorm"


def test_out_is_left_alone():
    x = tensor(1)
    out = np.empty_like(x)
    before = cache_info()
    assert batchnorm.batch_norm_train(x, out=out).y is out
    assert change(before) == (0, 0, 0, 0, 0)


def test_a_buffer_serves_somewhat_smaller_results():
    before = cache_info()
    y = forward(tensor(10))
    where = address(y)
    del y
    y = forward(tensor(9))
    assert address(y) == where and change(before) == (0, 10 * MIB, 0, 1, 1)
    del y
    y = forward(tensor(8))
    assert address(y) != where and change(before) == (10 * MIB, 8 * MIB, 1, 1, 2)


def test_the_best_fitting_buffer_is_used():
    sizes = 10, 9.5, 9
    arrays = [forward(tensor(mib)) for mib in sizes]
    where = {mib: address(a) for mib, a in zip(sizes, arrays, strict=True)}
    del arrays
    arrays = [forward(tensor(mib)) for mib in (9, 9.5, 10)]
    assert [address(a) for a in arrays] == [where[9], where[9.5], where[10]]


# ---- how much it keeps ----


def test_cache_info_adds_up():
    before = cache_info()
    assert (before.held, before.buffers) == (0, 0)
    x = tensor(1)
    y, z = forward(x), forward(x)
    assert change(before) == (0, 2 * MIB, 0, 0, 2)
    del y
    assert change(before) == (MIB, MIB, 1, 0, 2)
    y = forward(x)
    assert change(before) == (0, 2 * MIB, 0, 1, 2)
    del y, z
    assert change(before) == (2 * MIB, 0, 2, 1, 2)
    assert empty_cache() == 2 * MIB
    assert change(before) == (0, 0, 0, 1, 2)
    assert empty_cache() == 0


def test_sizes_are_whole_huge_pages_where_that_adds_little():
    before = cache_info().in_use
    y = forward(tensor(15.01))
    assert cache_info().in_use - before == 15 * MIB + 64 * 1024
    z = forward(tensor(17))
    assert cache_info().in_use - before == 33 * MIB + 64 * 1024
    del y, z


def test_never_holds_more_than_the_limit():
    set_cache_limit(10 * MIB)
    arrays = [forward(tensor(mib)) for mib in (1, 2, 3, 4, 5, 6)]
    for _ in range(6):
        arrays.pop()
        assert cache_info().held <= 10 * MIB
    assert cache_info().held == 10 * MIB


def test_the_oldest_buffers_give_way():
    set_cache_limit(9 * MIB)
    arrays = {mib: forward(tensor(mib)) for mib in (2, 3, 4, 5)}
    for mib in (3, 4, 2):
        del arrays[mib]
    assert cache_info().held == 9 * MIB
    del arrays[5]  # 3 and then 4 must go
    assert (cache_info().held, cache_info().buffers) == (7 * MIB, 2)
    hits = cache_info().hits
    for mib, hit in ((3, 0), (4, 0), (2, 1), (5, 1)):
        arrays[mib] = forward(tensor(mib))
        assert cache_info().hits - hits == hit, mib
        hits = cache_info().hits


def test_what_exceeds_the_limit_alone_drives_nothing_out():
    set_cache_limit(4 * MIB)
    small, large = forward(tensor(2)), forward(tensor(5))
    del small, large
    assert cache_info().held == 2 * MIB


def test_a_lower_limit_holds_at_once():
    arrays = [forward(tensor(2)) for _ in range(4)]
    del arrays
    assert cache_info().held == 8 * MIB
    set_cache_limit(5 * MIB)
    assert cache_info()[:2] == (5 * MIB, 4 * MIB)


def test_limit_0_switches_it_off():
    x = tensor(1)
    y, z = forward(x), forward(x)
    del z
    set_cache_limit(0)
    assert cache_info().held == 0
    in_use = cache_info().in_use
    del y
    assert (cache_info().held, cache_info().in_use) == (0, in_use - MIB)
    before = cache_info()
    y = forward(x)
    assert get_handler_name(y) == "default_allocator"
    assert change(before) == (0, 0, 0, 0, 0)


def test_a_refused_call_takes_nothing():
    x = tensor(1)
    before = cache_info()
    for arguments in ({"gamma": np.ones(7)}, {"gamma": np.full(8, np.nan)}, {"eps": -1.0}):
        with pytest.raises(ValueError):
            batchnorm.batch_norm_train(x, **arguments)
    assert cache_info().in_use == before.in_use


@pytest.mark.parametrize(
    ("limit", "error", "got"),
    [
        (-1, ValueError, "-1"),
        (-(2**70), ValueError, "-1.18059e+21"),
        (2**70, ValueError, "1.18059e+21"),
        (2**63, ValueError, "9.22337e+18"),
        (2.5, TypeError, "2.5 (float)"),
        (1e9, TypeError, "1000000000.0 (float)"),
        (True, TypeError, "True (bool)"),
        ("1GB", TypeError, "'1GB' (str)"),
        (None, TypeError, "None"),
        ([1], TypeError, "of type list"),
        (np.ones(2, int), TypeError, "of type numpy.ndarray"),
    ],
    ids=repr,
)
def test_bad_limits(limit, error, got):
    before = cache_info()
    with pytest.raises(error, match=f"^limit is {re.escape(got)}, expected an int >= 0, in bytes$"):
        set_cache_limit(limit)
    assert cache_info() == before


def test_limits_up_to_64_bits():
    for limit in (0, 1, np.int64(5), 2**63 - 1):
        set_cache_limit(limit)
        assert cache_info().limit == limit
    y = forward(tensor(1))
    del y
    assert cache_info().held == MIB


# ---- safe ----


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y[1:, ::2],
        lambda y: y.T,
        lambda y: y.view(np.int32),
        lambda y: y.reshape(-1)[-1:],
        lambda y: np.broadcast_to(y[0, :1, 7], (3, 3)),
        memoryview,
        lambda y: np.asarray(memoryview(y))[2],
    ],
    ids=["slice", "transposed", "other dtype", "one element", "broadcast", "memoryview", "of a memoryview"],
)
def test_views_keep_the_memory(view):
    x, other = tensor(1), tensor(1, seed=1)
    y = forward(x)
    where, seen, want = address(y), view(y), np.array(view(y.copy()))
    del y
    gc.collect()
    assert cache_info().in_use >= MIB
    results = [forward(other) for _ in range(3)]
    assert where not in map(address, results)
    assert np.array_equal(np.asarray(seen), want)
    del seen
    gc.collect()
    assert address(forward(other)) == where, "free when the last view is gone"


def test_resize():
    y = forward(tensor(4))
    want, in_use = y.ravel().copy(), cache_info().in_use
    y.resize((8, 8, y.shape[2]), refcheck=False)  # twice as large
    assert cache_info().in_use == in_use + 4 * MIB
    assert np.array_equal(y.ravel()[: want.size], want) and not y.ravel()[want.size :].any()
    where = address(y)
    y.resize(y.size - 5, refcheck=False)
    assert address(y) == where
    y.resize(want.size // 2, refcheck=False)
    assert cache_info().in_use == in_use - 2 * MIB
    y.resize(10, refcheck=False)  # now memory of malloc
    assert cache_info().in_use == in_use - 4 * MIB and np.array_equal(y, want[:10])
    y.resize(10**6, refcheck=False)
    assert np.array_equal(y[:10], want[:10]) and not y[10:].any()
    del y
    assert cache_info().in_use == in_use - 4 * MIB


def test_pickle_and_copies():
    y = forward(tensor(1))
    before = cache_info()
    for twin in (pickle.loads(pickle.dumps(y)), copy.deepcopy(y), copy.copy(y), y.copy(), y + 0):
        assert np.array_equal(twin, y) and get_handler_name(twin) != "batchnorm"
    assert cache_info() == before


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
    assert during - before == pytest.approx(4 * MIB, abs=10000)
    assert after - before == pytest.approx(0, abs=10000)


def test_a_subclass_of_ndarray():
    class Sub(np.ndarray):
        pass

    x = tensor(1).view(Sub)
    y = forward(x)
    assert np.array_equal(np.asarray(y), forward(np.asarray(x)))


def test_numpys_own_handler_stays_in_force():
    forward(tensor(1))
    assert get_handler_name() == "default_allocator"
    assert get_handler_name(np.empty(MIB)) == "default_allocator"


def test_a_handler_of_the_users_own_is_respected():
    code = """
        import ctypes as c, numpy as np, batchnorm as b
        from importlib import import_module
        core = import_module("numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray")
        libc = c.CDLL(None)
        V, S = c.c_void_p, c.c_size_t
        F = c.CFUNCTYPE
        kinds = F(V, V, S), F(V, V, S, S), F(V, V, V, S), F(None, V, V, S)
        for f in (libc.malloc, libc.calloc, libc.realloc): f.restype = V
        libc.malloc.argtypes, libc.calloc.argtypes = [S], [S, S]
        libc.realloc.argtypes, libc.free.argtypes = [V, S], [V]
        calls = []
        def malloc(_, n):
            calls.append(n)
            return libc.malloc(n)
        functions = [kind(f) for kind, f in zip(kinds, (
            malloc, lambda _, n, m: libc.calloc(n, m), lambda _, p, n: libc.realloc(p, n),
            lambda _, p, n: libc.free(p)))]
        class Handler(c.Structure):
            _fields_ = [("name", c.c_char * 127), ("version", c.c_uint8), ("context", V)] + [
                (f"f{i}", kind) for i, kind in enumerate(kinds)]
        mine = Handler(b"mine", 1, None, *functions)
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
    assert output(code).split("\n") == [
        "mine mine True", "batchnorm", "True", "batchnorm default_allocator 1",
    ]  # fmt: skip


def test_threads_create_and_drop():
    set_cache_limit(8 * MIB)  # evicts all the time
    inputs = [tensor(mib, seed) for seed, mib in enumerate((0.5, 1, 1.1, 2, 3))]
    want = [forward(x).tobytes() for x in inputs]
    in_use = cache_info().in_use
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        kept = {}
        for step in range(60):
            i = int(rng.integers(len(inputs)))
            y = forward(inputs[i])
            kept[int(rng.integers(3))] = (i, y)
            if step % 20 == 7:
                empty_cache()
            if cache_info().held > 8 * MIB:
                wrong.append("too much held")
            wrong.extend(j for j, z in kept.values() if step % 6 == 0 and z.tobytes() != want[j])

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []
    assert cache_info().in_use == in_use


def test_arrays_dropped_on_another_thread():
    x = tensor(1)
    arrays = [forward(x) for _ in range(10)]
    in_use = cache_info().in_use
    worker = threading.Thread(target=arrays.clear)
    worker.start()
    worker.join()
    assert (cache_info().in_use, cache_info().held) == (in_use - 10 * MIB, 10 * MIB)


# ---- the process ----

PRELUDE = """
        import warnings; warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        import gc, os, sys, threading, time, numpy as np, batchnorm as b
        def tensor(mib, seed=0):
            return np.random.default_rng(seed).standard_normal((4, 8, int(mib * 2**20) // 128), np.float32)
        def forward(x):
            return b.batch_norm_train(x).y
"""


@needs_fork
def test_fork_with_held_and_used_buffers():
    code = (
        PRELUDE
        + """
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
    )
    assert output(code) == ("[0, 0, 0] True True True 1")


@needs_fork
def test_fork_while_other_threads_use_the_cache():
    code = (
        PRELUDE
        + """
        b.set_num_threads(1)
        b.set_cache_limit(5 * 2**20)
        inputs = [tensor(mib) for mib in (1, 2, 3)]
        want = [forward(x).tobytes() for x in inputs]
        stop = []
        def work(i):
            while not stop:
                forward(inputs[i])
                b.empty_cache()
        workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for w in workers: w.start()
        codes = set()
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
    )
    assert output(code) == "{0}"


@pytest.mark.parametrize(
    "ending",
    [
        "kept = forward(x)",
        "import atexit; kept = forward(x); atexit.register(lambda: forward(x)[0, 0, 0])",
        "sys.kept = forward(x); np.kept = forward(x); b.kept = [forward(x)]; b.kept.append(b.kept)",
        """class Late:
            def __init__(self): self.y = forward(x)
            def __del__(self, forward=forward, x=x): del self.y; forward(x)
        late = Late(); late.loop = late""",
        """def work():
            while True: forward(x)
        for _ in range(3): threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)""",
        """def work(y):
            time.sleep(60)
        threading.Thread(target=work, args=(forward(x),), daemon=True).start()""",
        """local = threading.local(); local.y = forward(x)
        def work(): local.y = forward(x); time.sleep(0.1)
        threading.Thread(target=work).start()""",
        "kept = forward(x); sys.exit(0)",
    ],
    ids=["live", "atexit", "modules", "del", "daemons", "daemon holds", "thread local", "exit"],
)
def test_interpreter_exit(ending):
    code = (
        PRELUDE
        + f"""
        x = tensor(2)
        del sys
        import sys
        print("leaving", flush=True)
        {ending}
    """
    )
    done = run(code)
    assert done.returncode == 0 and done.stdout.strip() == "leaving"
    assert "Traceback" not in done.stderr.replace("Exception ignored", ""), done.stderr


def test_out_of_memory():
    pytest.importorskip("resource", reason="this system has no resource limits")
    code = (
        PRELUDE
        + """
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
    )
    assert output(code).split("\n") == ["MemoryError Unable to allocate 80.0 M"] * 3 + ["True 1"]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system has no /proc/self/statm")
def test_memory_goes_back_and_does_not_grow():
    code = (
        PRELUDE
        + """
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
                kept[i % 5] = forward(small[i % 3])
                if i % 7 == 0:
                    try: b.batch_norm_train(small[0], eps=-1.0)
                    except ValueError: pass
        loop(2000)
        gc.collect()
        before = rss()
        loop(20000)
        gc.collect()
        assert rss() - before < 4, (before, rss())
        print("done", b.cache_info().in_use)
    """
    )
    assert output(code) == "done 0"


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


# ---- the limit by default ----

LIMIT = "import batchnorm as b; print(b.cache_info().limit, b.config()['cache_limit'])"


def test_limit_by_default():
    limit = int(output(LIMIT).split()[0])
    assert 0 < limit <= 2**31
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert limit <= memory // 8
    assert output(LIMIT, BATCHNORM_CACHE_LIMIT="") == f"{limit} {limit}"


@pytest.mark.parametrize("limit", ["0", "123456789", str(2**63 - 1)])
def test_limit_by_environment(limit):
    assert output(LIMIT, BATCHNORM_CACHE_LIMIT=limit) == f"{limit} {limit}"


@pytest.mark.parametrize("limit", ["1GB", "-1", "2.5", " 1", "1 ", "1e9", "0x10", "junk", str(2**63), "None"])
def test_junk_in_the_environment_fails_at_import(limit):
    done = run("import batchnorm", BATCHNORM_CACHE_LIMIT=limit)
    assert done.returncode != 0
    assert (
        f"environment variable BATCHNORM_CACHE_LIMIT: limit is '{limit}', expected an int >= 0, in bytes"
        in done.stderr
    )


def test_limit_follows_the_resource_limit():
    resource = pytest.importorskip("resource", reason="this system has no resource limits")
    code = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, {resource.RLIM_INFINITY}))
        import batchnorm as b
        print(b.cache_info().limit)
    """
    assert int(output(code)) <= 2**29


def test_show_config(capsys):
    y = forward(tensor(1))
    del y
    batchnorm.show_config()
    assert "cache        1 of 512 MiB held" in capsys.readouterr().out
    assert batchnorm.config()["cache_held"] == _core.cache_info()[1] == MIB
