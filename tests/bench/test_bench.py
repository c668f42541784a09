"""The benchmarks run, refuse what they cannot do, and their contestants compute the same thing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
FAST = ["--set", "tiny", "--rounds", "1"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BENCH.exists(), reason="bench/ is not beside the tests"),
]


def program(name, *arguments, cwd=BENCH.parent):
    """A program of bench/, run to its end."""
    command = [sys.executable, str(BENCH / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def bench():
    """Imports a module of bench/, whose modules find each other by name."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    sys.path.remove(str(BENCH))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


# ---- the contestants ----


@pytest.fixture(scope="module")
def field(bench):
    """Everybody whom the test environment has, alive, on one thread."""
    names = ["numpy", *(["numba"] if importlib.util.find_spec("numba") else [])]
    contestants = bench("contestants")
    with contestants.Field.start(names, contestants.Setting(1)) as started:
        yield started


CASES = [((4, 5, 6, 7), 1), ((4, 6, 7, 5), 3), ((30, 5), 1)]


@pytest.mark.parametrize("outputs", ["reused", "returned"])
@pytest.mark.parametrize("activation", ["none", "relu", "residual_relu"])
@pytest.mark.parametrize("dims, axis", CASES)
@pytest.mark.parametrize("op", ["forward", "backward", "inference"])
def test_contestants_agree(bench, field, op, dims, axis, activation, outputs):
    protocol = bench("peers.protocol")
    case = protocol.Case(op, dims, axis, "float32", activation, outputs)
    found = {}
    for c in field.contestants:
        if c.name not in bench("measure").ROOFS:
            assert c.prepare(case) is None
            found[c.name] = c.sample(30)
    assert {"numpy", "batchnorm"} <= set(found)
    arrays = {"forward": 1, "inference": 1, "backward": 3}[op]
    arrays += op == "backward" and activation == "residual_relu"
    for name, values in found.items():
        assert len(values) == 30 * arrays, name
        assert max(map(abs, values)) > 0.5
        assert values == pytest.approx(found["numpy"], rel=2e-4, abs=2e-4), name


def test_a_contestant_says_what_it_cannot_do(bench, field):
    protocol = bench("peers.protocol")
    (numpy,) = (c for c in field.contestants if c.name == "numpy")
    assert "16-bit" in numpy.prepare(protocol.Case("forward", (4, 5), 1, "float16"))


def test_a_contestant_that_computes_something_else_is_not_timed(bench):
    measure, protocol = bench("measure"), bench("peers.protocol")
    case = protocol.Case("forward", (4, 5), 1)
    ours = [1.0] * measure.SAMPLES
    assert measure.differs(case, ours, ours) is None
    assert measure.differs(case, ours, [*ours[:-1], float("nan")]) is None  # one may be off
    assert "differ" in measure.differs(case, ours, [1.1] * measure.SAMPLES)
    assert "differ" in measure.differs(case, ours, [float("nan")] * measure.SAMPLES)
    assert "results" in measure.differs(case, ours, ours * 2)


def test_a_contestant_without_its_library_is_absent(bench, monkeypatch):
    contestants = bench("contestants")
    monkeypatch.setitem(bench("peers").MODULES, "numpy", "no_such_module")
    broken = contestants.Setting(1, pythons={"numpy": "/bin/false"})
    with pytest.raises(contestants.Absent, match="ended with code 1"):
        contestants.Contestant("numpy", broken)


def test_data_are_the_same_in_every_language(bench):
    # The first values, worked out by hand from the formula; cpp/protocol.h has the same one.
    protocol = bench("peers.protocol")

    def value(i, seed):
        h = (i + seed * 0x9E3779B9) * 0x9E3779B1 % 2**32
        h ^= h >> 15
        h = h * 0x85EBCA77 % 2**32
        h ^= h >> 13
        return (h >> 8) / 2**23 - 1

    assert protocol.uniform(50, 3).tolist() == [value(i, 3) for i in range(50)]


# ---- the model of traffic ----

MB = 1 << 20


@pytest.mark.parametrize(
    "op, activation, dims, axis, minimal, real",
    [
        # A tensor of 2 MB (2^19 float32), cache of 1 MB, 2 threads: a channel has 1/8 of it.
        ("forward", "none", (8, 8, 8192), 1, 4, 4),
        ("forward", "none", (8, 8192, 8), 2, 4, 6),  # rows hold all channels: read twice
        ("backward", "none", (8, 8, 8192), 1, 6, 6),  # 2 threads x 2 tensors x 256 KB just fit
        ("backward", "none", (8, 8192, 8), 2, 6, 10),
        ("inference", "none", (8, 8192, 8), 2, 4, 4),
        ("forward", "none", (8, 1, 65536), 1, 4, 6),  # a single channel of 2 MB does not fit
        ("forward", "none", (65536, 8), 1, 4, 6),  # a matrix is rows
        ("forward", "relu", (8, 8192, 8), 2, 4, 6),
        # with a residual, and a mask of 1/32 of 2 MB
        ("forward", "residual_relu", (8, 8192, 8), 2, 6 + 1 / 16, 8 + 1 / 16),
        ("backward", "residual_relu", (8, 8192, 8), 2, 8 + 1 / 16, 12 + 1 / 16),
        ("inference", "residual_relu", (8, 8192, 8), 2, 6, 6),
    ],
)
def test_traffic(bench, op, activation, dims, axis, minimal, real):
    case = bench("peers.protocol").Case(op, dims, axis, "float32", activation)
    assert bench("traffic").traffic(case, 1 * MB, 2) == (minimal * MB, real * MB)


def test_a_cached_tensor_is_read_once(bench):
    case = bench("peers.protocol").Case("forward", (8, 8192, 8), 2)
    assert bench("traffic").traffic(case, 2 * MB, 2) == (4 * MB, 4 * MB)


def test_a_virtual_machine_is_not_believed(bench):
    usable = bench("traffic").usable_cache
    caches = {"L2": 2 * MB, "L3": 480 * MB}
    assert usable({"caches": caches, "hypervisor": True}, 2) == 32 * MB
    assert usable({"caches": caches, "hypervisor": False}, 2) == 480 * MB
    assert usable({"caches": {}, "hypervisor": False}, 2) == 32 * MB


# ---- shapes ----


def test_the_listed_shapes(bench):
    shapes_of, thinned = bench("shapes").shapes_of, bench("shapes").thinned
    everything = shapes_of("shapes")
    assert len(set(everything)) == len(everything) > 250
    assert min(s.weight for s in everything) == 1 and max(s.weight for s in everything) > 10
    few = thinned(everything, 5)
    assert len(few) == 5 and few[0].elements == min(s.elements for s in everything)
    assert thinned(few, 7) == thinned(few, None) == few


# ---- run.py ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of everything on the tiny shape: (its JSON file, the folder of its pictures, what it printed)."""
    folder = tmp_path_factory.mktemp("run")
    done = program(
        "run.py", *FAST, "--peers", "numpy", "onnxruntime", "--activation", "none", "residual_relu",
        "--outputs", "reused", "returned", "--json", folder / "r.json", "--picture", folder / "pictures",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "r.json", folder / "pictures", done.stdout


def test_run_reports(tiny):
    path, _, printed = tiny
    report = json.loads(path.read_text())
    assert (report["schema"], report["kind"]) == (1, "run")
    assert {"cpu", "cpus", "caches", "memory", "kernel", "huge_pages", "hypervisor"} <= set(report["machine"])
    assert {"version", "compiler", "isa", "commit"} <= set(report["library"])
    assert report["options"]["set"] == "tiny"
    assert {"batchnorm", "numpy"} <= set(report["versions"])
    assert len(report["results"]) == 3 * 2 * 2 * 2  # operations, layouts, activations, outputs
    for result in report["results"]:
        assert result["weight"] == 1 and result["real"] == result["minimal"] > 0
        assert all(len(gbs) == 1 and gbs[0] > 0 for gbs in result["bandwidth"].values())
        assert all(min(times) > 0 for times in result["seconds"].values())
        assert result["activation"] != "none" or {"batchnorm", "numpy"} <= set(result["seconds"])
    for word in (
        "forward:",
        "backward:",
        "inference:",
        "total",
        "geometric mean",
        "NHWC float32",
        "returned",
    ):
        assert word in printed
    assert "onnxruntime" in printed  # measured, or named as missing


def test_run_measures_the_roof(tiny):
    report = json.loads(tiny[0].read_text())
    roof = "bandwidth" if "bandwidth" in report["versions"] else "numpy.copyto"
    assert roof in report["versions"], tiny[2]
    kernels = set(report["results"][0]["bandwidth"])
    assert {"copy", "triad"} <= kernels if roof == "bandwidth" else kernels == {"copy"}


def test_run_draws(tiny):
    assert sorted(p.name for p in tiny[1].iterdir()) == ["backward.png", "forward.png", "inference.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tiny[1].iterdir())


def test_a_report_can_be_drawn_again(tiny, tmp_path):
    done = program("picture.py", tiny[0], tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "forward.png").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "r51"], "r51"),
        (["--op", "sideways"], "sideways"),
        (["--layout", "chwn"], "chwn"),
        (["--dtype", "int8"], "int8"),
        (["--activation", "gelu"], "gelu"),
        (["--outputs", "lost"], "lost"),
        (["--peers", "caffe"], "caffe"),
        (["--threads", "0"], "0 is less than 1"),
        (["--threads", "-2"], "-2 is less than 1"),
        (["--threads", "two"], "'two' is not an integer"),
        (["--threads", "100000"], "this process may use"),
        (["--rounds", "0"], "0 is less than 1"),
        (["--limit", "0"], "0 is less than 1"),
        (["--cache", "big"], "'big' is not a size"),
        (["--python", "/usr/bin/python3"], "is not NAME=PATH"),
        (["--python", "caffe=/usr/bin/python3"], "no peer is called 'caffe'"),
        (["--python", "torch=/no/such/python"], "'/no/such/python' is not a program"),
        (["--onednn", "/no/such/folder"], "is not a folder"),
        (["--json", "/no/such/folder/r.json"], "does not exist"),
        (["--json", "/"], "is a folder"),
        (["--picture", "/no/such/folder/pictures"], "does not exist"),
        (["--picture", "/proc/cpuinfo"], "is not a folder"),
        (["--speed", "fast"], "--speed"),
    ],
)
def test_bad_options_of_run(bench, capsys, arguments, words):
    parser = bench("run").parser()
    with pytest.raises(SystemExit) as e:
        parser.parse_args(arguments)
    assert e.value.code == 2
    assert words in capsys.readouterr().err


def test_activations():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    done = program("activations.py", "--shape", "2", "3", "4", "4", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "bfloat16 NHWC" in done.stdout and done.stdout.count(" / ") >= 24, done.stdout


def test_group():
    done = program("group.py", "--tiny", "--rounds", "2")
    assert done.returncode == 0 and done.stdout.count("float64") == 2, done.stderr


def test_blocks():
    pytest.importorskip("dask", reason="dask is not installed (extra dask)")
    done = program("blocks.py", "--tiny", "--rounds", "1")
    assert done.returncode == 0 and "32 x 3 x 8 x 8" in done.stdout, done.stderr


def test_features():
    done = program("features.py", "--set", "tiny", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    names = (
        *("renorm", "ghost", "per_sample", "from_output"),
        *("padding", "mask", "channel_mask", "weights", "all_weights"),
    )
    for name in names:
        assert f"{name} / plain" in done.stdout
    assert done.stdout.count("2x3x4x4") == done.stdout.count("total") == 2 * len(names)


def test_bad_options_end_the_program():
    done = program("run.py", "--threads", "none")
    assert done.returncode == 2 and "'none' is not an integer" in done.stderr and done.stdout == ""


# ---- compare.py ----


def write_report(path, cases, **changes):
    """A file as of run.py: {shape: {contestant: seconds}}, with a roof of 10 GB/s in all rounds."""
    results = [
        {
            "op": "forward", "layout": "nchw", "dtype": "float32", "activation": "none", "outputs": "reused",
            "shape": shape, "seconds": seconds,
            "bandwidth": {"copy": [10.0] * len(seconds["batchnorm"])},
        }
        for shape, seconds in cases.items()
    ]  # fmt: skip
    machine = {"cpu": "this one", "cpus": [0], "caches": {}, "huge_pages": "never", "kernel": "6"}
    content = {"schema": 1, "kind": "run", "machine": machine, "options": {"threads": 1}, "results": results}
    path.write_text(json.dumps(content | changes))
    return path


STEADY = [1.00, 1.01, 1.02, 0.99, 0.98]
NOISY = [1.0, 1.6, 0.9, 1.5, 1.3]


def test_compare_lists_what_got_slower(tmp_path):
    old = write_report(tmp_path / "old", {"a": {"batchnorm": STEADY}, "b": {"batchnorm": STEADY}})
    slow = [1.2 * t for t in STEADY]
    new = write_report(tmp_path / "new", {"a": {"batchnorm": slow}, "b": {"batchnorm": STEADY}})
    done = program("compare.py", old, new)
    assert done.returncode == 1, done.stderr
    assert "forward nchw float32 none reused a" in done.stdout and "1.20" in done.stdout
    assert "reused b" not in done.stdout and "1 slower" in done.stdout
    assert program("compare.py", old, new, "--threshold", "0.3").returncode == 0
    back = program("compare.py", new, old)
    assert back.returncode == 0 and "1 faster" in back.stdout


def test_compare_lets_noise_pass(bench):
    compare = bench("compare")
    assert compare.verdict(STEADY, NOISY, 0.05) == (pytest.approx(1.3), "same")
    assert compare.verdict(STEADY, [1.3] * 5, 0.05)[1] == "slower"
    assert compare.verdict([1.0], [1.04], 0.05)[1] == "same"
    assert compare.verdict([1.0], [0.5], 0.05)[1] == "faster"


def test_compare_takes_the_machines_speed_out(tmp_path):
    # Twice the time at half the bandwidth, or with a peer that also takes twice as long, is the same speed.
    slow = [2 * t for t in STEADY]
    old = write_report(tmp_path / "old", {"a": {"batchnorm": STEADY, "torch": STEADY}})
    new = write_report(tmp_path / "new", {"a": {"batchnorm": slow, "torch": slow}})
    assert program("compare.py", old, new).returncode == 1  # the roof stayed
    assert program("compare.py", old, new, "--by", "torch").returncode == 0
    assert program("compare.py", old, new, "--by", "seconds").returncode == 1
    report = json.loads(new.read_text())
    report["results"][0]["bandwidth"]["copy"] = [5.0] * 5
    new.write_text(json.dumps(report))
    assert program("compare.py", old, new).returncode == 0


def test_compare_warns_of_another_machine(tmp_path):
    cases = {"a": {"batchnorm": STEADY}}
    machine = {"cpu": "another", "cpus": [0], "caches": {}, "huge_pages": "never", "kernel": "6"}
    old, new = write_report(tmp_path / "old", cases), write_report(tmp_path / "new", cases, machine=machine)
    done = program("compare.py", old, new)
    assert done.returncode == 0 and "another machine: cpu was this one" in done.stdout


def test_compare_refuses(bench, tmp_path, capsys, monkeypatch):
    good = write_report(tmp_path / "good", {"a": {"batchnorm": STEADY}})
    other = write_report(tmp_path / "other", {"b": {"batchnorm": STEADY}})
    (tmp_path / "text").write_text("not JSON")
    (tmp_path / "list").write_text("[]")
    future = write_report(tmp_path / "future", {"a": {"batchnorm": STEADY}}, schema=99)
    for arguments, words in [
        ([good, tmp_path / "missing"], "cannot be read"),
        ([good, tmp_path / "text"], "is not JSON"),
        ([tmp_path / "list", good], "is not a file of run.py"),
        ([good, future], "schema 99"),
        ([good, other], "no case in common"),
        ([good, good, "--by", "torch"], "has no torch"),
        ([good, good, "--threshold", "-1"], "is not a share"),
        ([good, good, "--threshold", "much"], "is not a number"),
    ]:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as e:
            bench("compare").main()
        assert e.value.code == 2
        assert words in capsys.readouterr().err


# ---- scaling.py ----


def test_scaling_by_size(tmp_path):
    done = program(
        "scaling.py", "sizes", "--max-bytes", "4K", "--rounds", "1", "--peers",
        "--json", tmp_path / "s.json", "--picture", tmp_path / "s.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["kind"] == "sizes" and {r["bytes"] for r in report["results"]} == {1024, 4096}
    assert all(min(r["nanoseconds"].values()) > 0 for r in report["results"])
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_scaling_by_threads(tmp_path):
    done = program(
        "scaling.py", "threads", "--threads", "1", "--batch", "1", "--rounds", "1", "--op", "forward",
        "--layout", "nchw", "--json", tmp_path / "t.json", "--picture", tmp_path / "t.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["kind"] == "threads" and report["threads"] == [1]
    assert all(r["speed_up"] == {"1": 1.0} and r["share"]["1"] > 0 for r in report["results"])
    assert (tmp_path / "t.png").exists()


def test_thread_counts(bench):
    counts = bench("scaling").thread_counts
    assert [counts(n) for n in (1, 2, 6)] == [[1], [1, 2], [1, 2, 3, 4, 5, 6]]
    assert counts(24) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "sizes|threads"),
        (["sizes", "--max-bytes", "-5"], "'-5' is not a size"),
        (["sizes", "--max-bytes", "4 GB"], "'4 GB' is not a size"),
        (["threads", "--threads", "1", "zero"], "'zero' is not an integer"),
        (["threads", "--batch", "0"], "0 is less than 1"),
        (["sizes", "--picture", "/no/such/folder/s.png"], "does not exist"),
    ],
)
def test_bad_options_of_scaling(bench, capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        bench("scaling").parser().parse_args(arguments)
    assert e.value.code == 2
    assert words in capsys.readouterr().err


# ---- PyTorch models ----


@pytest.mark.parametrize("what", ["steps", "recalibrate"])
def test_pytorch_models(bench, what, capfd):
    """On small tensors; a converted network does what the plain one does."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    module = bench("models")
    for name, made in module.NETWORKS.items():
        torch.manual_seed(0)
        plain, x = made().eval(), torch.randn(2, 3, 32, 32)
        fused = made(fused=True)
        fused.load_state_dict(plain.state_dict())
        for other in (module.ours.convert(fused.eval()), module.ours.fold(plain)):
            torch.testing.assert_close(other(x), plain(x), rtol=1e-3, atol=1e-4, msg=name)
    if what == "recalibrate":
        module.recalibrate()
        lines = capfd.readouterr().out.splitlines()
        assert len(lines) == 8 and float(lines[4].split()[2]) < 1e-5
        return
    module.steps_of("ResNet-18", 2, 32, 1)
    module.peak_of("ResNet-18", 2, 32, "convert, BatchNormAddAct2d")
    printed = capfd.readouterr().out
    for line in ("step, torch", "step, convert, BatchNormAddAct2d", "inference, fold", "peak, convert"):
        assert line in printed
