"""What depends on the process: environment, fork, Ctrl-C, threads. Each case in a process of its own."""

from __future__ import annotations

import os

import batchnorm
import pytest

from processes import output, run


@pytest.mark.parametrize("name", batchnorm.isa_levels())
def test_isa_by_environment(name):
    code = "import batchnorm as b; print(b.get_isa(), b.config()['isa_reason'])"
    assert output(code, BATCHNORM_ISA=name) == f"{name} BATCHNORM_ISA"


def test_empty_isa_means_the_best():
    assert output("import batchnorm as b; print(b.get_isa())", BATCHNORM_ISA="") == batchnorm.isa_levels()[-1]


@pytest.mark.parametrize("name", ["AVX2", "sse9", "avx512 "])
def test_unknown_isa_fails_at_import(name):
    done = run("import batchnorm", BATCHNORM_ISA=name)
    assert done.returncode != 0
    assert f"BATCHNORM_ISA: isa is '{name}', expected one of 'baseline'" in done.stderr


def test_isa_levels_give_the_same_bytes():
    code = """
        import hashlib, numpy as np, batchnorm as b
        h = hashlib.sha256()
        for dtype in (np.float32, np.float64, np.float16):
            for shape, axis in (((5, 7, 9, 11), 1), ((5, 9, 11, 7), -1), ((300, 65), 1)):
                x = (np.random.default_rng(0).standard_normal(shape) * 3 + 1).astype(dtype)
                f = b.batch_norm_train(x, axis=axis, activation="relu")
                g = b.batch_norm_backward(x[::-1], x, f.mean, f.inv_std, axis=axis, activation="relu")
                for a in (*f, *g):
                    h.update(a.tobytes())
        print(h.hexdigest())
    """
    assert len({output(code, BATCHNORM_ISA=name) for name in batchnorm.isa_levels()}) == 1


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


def test_wait_policy_of_openmp_is_ours_only_while_loading():
    code = "import os, batchnorm; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert output(code) == "None"
    assert output(code, GOMP_SPINCOUNT="77") == "77"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use():
    code = """
        import os, warnings, numpy as np, batchnorm as b
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads is the point
        b.set_num_threads(3)
        x = np.random.default_rng(0).standard_normal((16, 32, 40, 40)).astype(np.float32)
        y = b.batch_norm_train(x).y
        children = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if np.array_equal(b.batch_norm_train(x).y, y) else 1)
            children.append(pid)
        print([os.waitpid(pid, 0)[1] for pid in children], np.array_equal(b.batch_norm_train(x).y, y))
    """
    assert output(code) == "[0, 0, 0] True"


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_inside_one_long_call(threads):
    # float16 without an instruction for it takes its time: a second or so for this array.
    code = f"""
        import os, signal, threading, time, numpy as np, batchnorm as b
        b.set_num_threads({threads})
        x = np.zeros((8, 64, 2**18), np.float16)
        mean, var = np.ones(64), np.ones(64)
        def interrupt():
            time.sleep(0.1)
            started.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        started = []
        threading.Thread(target=interrupt).start()
        try:
            b.batch_norm_train(x, running_mean=mean, running_var=var, decay=0.5, out=x)
        except KeyboardInterrupt:
            waited = time.perf_counter() - started[0]
        assert waited < 0.5, waited
        assert (mean == 1).all() and (var == 1).all()
        b.batch_norm_train(x[:, :, :9], running_mean=mean, running_var=var, decay=0.5)
        assert (mean == 0.5).all() and (var == 0.5).all()
        print("interrupted")
    """
    assert output(code, BATCHNORM_ISA="baseline") == "interrupted"


def test_many_threads_at_once():
    code = """
        import threading, numpy as np, batchnorm as b
        x = np.random.default_rng(0).standard_normal((8, 16, 64, 64)).astype(np.float32)
        layer = b.BatchNorm(16, zero_debias=True)
        layer(x)
        layer.eval()
        want = layer(x).tobytes(), b.batch_norm_train(x).y.tobytes()
        wrong = []
        def work():
            for _ in range(20):
                if (layer(x).tobytes(), b.batch_norm_train(x).y.tobytes()) != want:
                    wrong.append(1)
        workers = [threading.Thread(target=work) for _ in range(6)]
        for w in workers: w.start()
        for w in workers: w.join()
        print(len(wrong))
    """
    assert output(code) == "0"


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_daemon_threads_at_exit(size, threads):
    code = f"""
        import threading, time, numpy as np, batchnorm as b
        b.set_num_threads({threads})
        x = np.ones(({size}, 64, 64, 64), np.float32)
        def work():
            while True:
                b.batch_norm_train(x)
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.3)
        print("leaving", flush=True)
    """
    assert output(code) == "leaving"


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
                        f = b.batch_norm_train(v)
                        beta = np.ones(shape[1])
                        b.batch_norm_backward(v, v, f.mean, f.inv_std, None, beta, activation="relu")
            print("done")
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    """
    assert output(code, OMP_STACKSIZE="128k") == "done"


def test_more_threads_than_the_system_gives():
    resource = pytest.importorskip("resource", reason="this system has no resource limits")
    code = f"""
        import resource, numpy as np, batchnorm as b
        x = np.ones((64, 64, 64, 64), np.float32)
        y = np.empty_like(x)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, {resource.RLIM_INFINITY}))
        b.set_num_threads(4096)
        b.batch_norm(x, np.zeros(64), np.ones(64), out=y)
        print("done")
    """
    assert output(code) == "done"
