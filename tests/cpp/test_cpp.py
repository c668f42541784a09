"""The C++ library by itself: it builds without Python, its own tests pass, and a small consumer project finds
it installed statically, as a shared library, and inside the wheel."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import batchnorm
import pytest

from support.builds import ENVIRONMENT, SOURCE, configure, program, run

pytestmark = pytest.mark.slow

CPP_INCLUDE = SOURCE / "cpp" / "include"


def built(build, prefix, shared):
    """Build and install the library with its tests: static with OpenMP, shared with threads of its own. Both
    come from one build tree: the second reuses the kernels' objects."""
    configure(
        SOURCE, build, "-DBATCHNORM_TESTS=ON", "-DBATCHNORM_WERROR=ON",
        f"-DBUILD_SHARED_LIBS={'ON' if shared else 'OFF'}", f"-DBATCHNORM_OPENMP={'OFF' if shared else 'ON'}",
        f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DCMAKE_INSTALL_LIBDIR=lib",
    )  # fmt: skip
    run(program("cmake"), "--build", build)
    run(program("cmake"), "--install", build)
    return prefix


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    if not (SOURCE / "CMakeLists.txt").exists():
        pytest.skip("the source tree (CMakeLists.txt) is not here")
    return tmp_path_factory.mktemp("cpp")


@pytest.fixture(scope="module")
def static_install(tree):
    prefix = built(tree / "build", tree / "static", shared=False)
    for name in ("test_batchnorm", "test_cuda", "train_and_serve"):
        shutil.copy(tree / "build" / name, prefix)  # the shared build replaces it
    return prefix


@pytest.fixture(scope="module")
def shared_install(tree, static_install):
    return built(tree / "build", tree / "shared", shared=True)


@pytest.fixture(params=["static", "shared", "wheel"])
def cmake_dir(request):
    """Where find_package finds each kind of installation."""
    if request.param == "wheel":
        return Path(batchnorm.get_cmake_dir())
    return request.getfixturevalue(f"{request.param}_install") / "lib" / "cmake" / "batchnorm"


@pytest.fixture
def quickstart(cmake_dir, tmp_path):
    """examples/cpp, built against that installation with all warnings as errors."""
    example = SOURCE / "examples" / "cpp"
    if not example.exists():
        pytest.skip("examples/cpp is not here")
    flags = "-Wall -Wextra -Werror"
    configure(example, tmp_path, f"-Dbatchnorm_DIR={cmake_dir}", f"-DCMAKE_CXX_FLAGS={flags}")
    run(program("cmake"), "--build", tmp_path)
    return tmp_path / "quickstart"


def counts(output):
    """How many bad calls were tried and how many checks passed, of a run without a failure."""
    last = output.splitlines()[-1]
    found = re.fullmatch(r"(\d+) bad calls, (\d+) passed, 0 failed", last)
    assert found, output[-4000:]
    return int(found[1]), int(found[2])


def test_static_library_passes_its_tests(static_install):
    assert counts(run(static_install / "test_batchnorm"))[1] > 10**5
    run(static_install / "train_and_serve")


def test_a_gpus_kernels_give_the_same_bits_in_rehearsal(static_install):
    assert "0 failed" in run(static_install / "test_cuda", "a_gpu")


def test_errors_of_the_cpp_interface(static_install, record_property):
    bad, _ = counts(run(static_install / "test_batchnorm", "errors_"))
    record_property("tried", bad)
    assert bad > 200


def test_calls_of_any_size_and_pointers(static_install, record_property):
    kept = SOURCE / "tests" / "data" / "calls"
    bad, _ = counts(run(static_install / "test_batchnorm", "calls_", BATCHNORM_CALLS=str(kept)))
    record_property("tried", bad)
    assert bad > 10**4


def test_shared_library_passes_its_quick_tests(tree, shared_install):
    # Its objects are the static library's; what differs is what it exports.
    done = run(program("ctest"), "--test-dir", tree / "build", "-R", "quick|serve", "--output-on-failure")
    assert "100% tests passed" in done


def test_consumer(quickstart):
    output = run(quickstart)
    assert output.startswith(f"batchnorm {batchnorm.__version__}, ")
    assert output.count(" ok\n") == 12
    assert "batchnorm::Error: gamma has 2 values, expected 3" in output


def test_the_header_says_which_standard_it_needs(tmp_path):
    source = tmp_path / "old.cpp"
    source.write_text("#include <batchnorm/batchnorm.hpp>\n")
    done = subprocess.run(
        [program(os.environ.get("CXX", "c++")), "-std=c++17", "-fsyntax-only", "-I", CPP_INCLUDE, source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    (error,) = (line for line in done.stderr.splitlines() if "error:" in line)
    assert done.returncode != 0 and "-std=c++20" in error


@pytest.mark.parametrize("choice", ["AUTO", "ON"])
def test_a_compiler_without_openmp_hears_what_to_install(tmp_path, choice):
    # As with clang without libomp: what finds OpenMP finds nothing.
    absent = "-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=TRUE"
    command = [program("cmake"), "-S", SOURCE, "-B", tmp_path, absent, f"-DBATCHNORM_OPENMP={choice}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = " ".join(done.stderr.split())
    assert "for clang install libomp-dev (Debian, Ubuntu), libomp-devel (Fedora)" in words
    assert "makes its own threads" in words and (done.returncode == 0) == (choice == "AUTO")


def embedded(tmp_path, how):
    """A project that has the library in its own build, which changes none of its settings."""
    (tmp_path / "main.cpp").write_text(
        "#include <batchnorm/batchnorm.hpp>\n#include <cstdio>\n"
        "int main() { std::puts(batchnorm::version().c_str()); }\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(app CXX)\n"
        f"{how}\nadd_executable(app main.cpp)\ntarget_link_libraries(app PRIVATE batchnorm::batchnorm)\n"
        'if(TARGET test_batchnorm OR CMAKE_BUILD_TYPE)\n  message(FATAL_ERROR "a setting changed")\nendif()\n'
        "install(TARGETS app DESTINATION bin)\n"
    )
    return tmp_path


EMBEDDED = {
    "add_subdirectory": f"add_subdirectory({SOURCE} batchnorm EXCLUDE_FROM_ALL)",
    "FetchContent": "include(FetchContent)\n"
    f"FetchContent_Declare(batchnorm SOURCE_DIR {SOURCE})\nFetchContent_MakeAvailable(batchnorm)",
}


@pytest.mark.parametrize("how", EMBEDDED)
def test_a_part_of_another_build(how, tmp_path, static_install):
    # Once whole; FetchContent, which comes to the same, is only configured.
    project = embedded(tmp_path, EMBEDDED[how])
    configure(project, tmp_path / "build")
    if how == "add_subdirectory":
        run(program("cmake"), "--build", tmp_path / "build")
        assert run(tmp_path / "build" / "app") == f"{batchnorm.__version__}\n"
        run(program("cmake"), "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
        assert [p.name for p in (tmp_path / "prefix").rglob("*") if p.is_file()] == ["app"]


def test_symbols_carry_the_version(shared_install):
    """A program compiled with the header of another minor version does not link."""
    library = next((shared_install / "lib").glob("libbatchnorm.so"))
    names = [line.split()[-1] for line in run(program("nm"), "-D", "--defined-only", library).splitlines()]
    ours = [name for name in names if "9batchnorm" in name]
    major, minor, _ = batchnorm.__version__.split(".")
    version = f"v{major}_{minor}"
    assert ours and all(f"9batchnorm{len(version)}{version}" in name for name in ours)


def test_installed_files(static_install, shared_install):
    for prefix in (static_install, shared_install):
        assert (prefix / "include" / "batchnorm" / "batchnorm.hpp").exists()
        for file in (prefix / "lib" / "cmake" / "batchnorm").iterdir():
            assert str(SOURCE) not in file.read_text(), f"{file.name} names the source tree"
            assert str(prefix) not in file.read_text(), f"{file.name} cannot be moved"


def test_unusable_isa_in_environment(static_install):
    done = subprocess.run(
        [static_install / "test_batchnorm", "--hash"],
        env=ENVIRONMENT | {"BATCHNORM_ISA": "sse9"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    message = "environment variable BATCHNORM_ISA: isa is 'sse9', expected one of 'baseline'"
    assert done.stderr.startswith(message)


def test_same_bits_in_every_process(static_install, tree, shared_install):
    static = static_install / "test_batchnorm"
    hashes = {run(tree / "build" / "test_batchnorm", "--hash")}
    for isa in batchnorm.isa_levels():
        for threads in ("1", "3"):
            hashes.add(run(static, "--hash", BATCHNORM_ISA=isa, OMP_NUM_THREADS=threads))
    assert len(hashes) == 1


# Prints the level in use and a hash of what every function returns for small arrays.
RESULTS = """
import hashlib
import batchnorm
import numpy as np

digest = hashlib.sha256()
for dtype in (np.float32, np.float64, np.float16):
    for axis in (1, -1):
        x = np.arange(-300, 300).astype(dtype).reshape(2, 3, 20, 5) / 16
        mean, var = (np.zeros(x.shape[axis], np.float32) for _ in range(2))
        options = {"channel_axis": axis, "activation": "relu"}
        y, saved = batchnorm.batch_norm_train(x, running_mean=mean, running_var=var, **options)
        z = batchnorm.batch_norm(x, mean, var, channel_axis=axis)
        needs = ("dx", "dgamma", "dbeta")
        gradients = batchnorm.batch_norm_backward(z, saved, needs=needs)
        for a in (y, saved.mean, saved.inv_std, mean, var, z, *gradients):
            digest.update(np.ascontiguousarray(a).tobytes())
print(batchnorm.get_isa(), digest.hexdigest())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine is not x86-64")
def test_wheel_on_an_old_cpu():
    # A CPU of 2011, with AVX but without AVX2: nothing on the way to the baseline level may need more.
    emulated = run(program("qemu-x86_64"), "-cpu", "SandyBridge", sys.executable, "-c", RESULTS).splitlines()
    isa, digest = emulated[-1].split()  # before it, qemu's warnings
    assert isa == "baseline"
    assert digest == run(sys.executable, "-c", RESULTS).split()[1]
