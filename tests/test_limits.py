"""What a container grants: control groups as files in a folder, and the threads and memory that follow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import batchnorm
import pytest
from batchnorm import _core

GIB = 2**30


@pytest.fixture
def tree(tmp_path):
    """A function that writes files (path: text) as a tree of control groups, and reads its limits."""

    def limits(groups, files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return _core.container_limits(str(tmp_path), groups)

    return limits


@pytest.mark.parametrize(
    "text, cpus",
    [
        ("max 100000\n", 0),
        ("150000 100000\n", 2),
        ("100000 100000\n", 1),
        ("100001 100000\n", 2),
        ("400000 100000\n", 4),
        ("1000 100000\n", 1),
        ("50000 25000", 2),
        ("18446744073709551615 1\n", 2**31 - 1),
        ("", 0),
        ("\n", 0),
        ("junk\n", 0),
        ("-1 100000\n", 0),
        ("0 100000\n", 0),
        ("100000 0\n", 0),
        ("100000 max\n", 0),
        ("100000\n", 0),
        ("1e5 100000\n", 0),
        ("99999999999999999999999 100000\n", 0),
    ],
)
def test_cpus_of_version_2(tree, text, cpus):
    assert tree("0::/\n", {"cpu.max": text}) == (cpus, 0)


@pytest.mark.parametrize(
    "quota, period, cpus",
    [
        ("-1\n", "100000\n", 0),
        ("250000\n", "100000\n", 3),
        ("50000\n", "100000\n", 1),
        ("junk", "100000\n", 0),
        ("100000\n", "", 0),
        ("100000\n", "0\n", 0),
    ],
)
@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_cpus_of_version_1(tree, quota, period, cpus, folder):
    files = {f"{folder}/job/cpu.cfs_quota_us": quota, f"{folder}/job/cpu.cfs_period_us": period}
    assert tree(f"12:pids:/other\n3:{folder}:/job\n", files) == (cpus, 0)


@pytest.mark.parametrize(
    "text, size",
    [("max\n", 0), ("1073741824\n", GIB), ("junk\n", 0), ("-1\n", 0), ("9223372036854771712\n", 0)],
)
def test_memory(tree, text, size):
    assert tree("0::/a\n", {"a/memory.max": text}) == (0, size)
    assert tree("5:memory:/b\n", {"memory/b/memory.limit_in_bytes": text}) == (0, size)


def test_parents_count(tree):
    files = {
        "a/cpu.max": "200000 100000\n",
        "a/b/cpu.max": "max 100000\n",
        "a/b/c/cpu.max": "800000 100000\n",
        "a/memory.max": f"{4 * GIB}\n",
        "a/b/memory.max": f"{GIB}\n",
        "a/b/c/memory.max": "max\n",
        "other/cpu.max": "1000 100000\n",
    }
    assert tree("0::/a/b/c\n", files) == (2, GIB)
    assert tree("0::/a/b/c", {"cpu.max": "100000 100000\n"}) == (1, GIB)


@pytest.mark.parametrize("path", ["/docker/1234", "/../outside", "/..", "", "/a//b/"])
def test_a_path_seen_from_outside_ends_at_the_top(tree, path):
    # Without a name space of its own, a container's groups carry the host's path but lie at its own top.
    files = {
        "cpu.max": "300000 100000\n",
        "cpu/cpu.cfs_quota_us": "200000",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": f"{GIB}",
    }
    assert tree(f"0::{path}\n", files) == (3, 0)
    assert tree(f"1:cpu,cpuacct:{path}\n2:memory:{path}\n", files) == (2, GIB)


def test_both_versions_at_once(tree):
    files = {
        "unified/job/cpu.max": "600000 100000\n",
        "cpu/job/cpu.cfs_quota_us": "500000\n",
        "cpu/job/cpu.cfs_period_us": "100000\n",
    }
    assert tree("4:cpu:/job\n0::/job\n", files) == (5, 0)


@pytest.mark.parametrize(
    "groups", ["", "\n", "junk", "1:cpu", "::", "0::/", "7:cpuset:/\n8:cpu2:/x", ":" * 99]
)
def test_nothing_there(tree, groups):
    assert tree(groups, {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"}) == (0, 0)


def test_folders_instead_of_files(tree, tmp_path):
    (tmp_path / "cpu.max").mkdir()
    assert tree("0::/\n", {}) == (0, 0)


# ---- a process that sees such a tree in the place of its own ----


def inside(tmp_path, code, quota, memory="max", **environment):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory.max").write_text(f"{memory}\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{memory}\n")
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


CPUS = batchnorm.config()["cpus"]
THREADS = "import batchnorm as b; print(b.get_num_threads())"


@pytest.mark.skipif(CPUS < 2, reason="one CPU is all there is")
@pytest.mark.parametrize(
    "quota, environment, threads",
    [
        (60000, {}, 1),
        (10**9, {}, CPUS),
        (60000, {"OMP_NUM_THREADS": "2"}, 2),
        (60000, {"OMP_NUM_THREADS": "2,3"}, 2),
    ],
)
def test_threads_follow_the_quota(tmp_path, quota, environment, threads):
    assert inside(tmp_path, THREADS, quota, **environment) == str(threads)


def test_set_num_threads_wins_over_the_quota(tmp_path):
    code = "import batchnorm as b; b.set_num_threads(3); print(b.get_num_threads())"
    assert inside(tmp_path, code, 60000) == "3"


def test_cache_limit_follows_the_container(tmp_path):
    code = "import batchnorm as b; print(b.cache_info().limit)"
    assert inside(tmp_path, code, 10**9, GIB) == str(GIB // 8)
