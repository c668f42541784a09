"""The same bits from every compiler, at every optimisation, on x86-64 and aarch64: a hash of many results of
the C++ library."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from support.builds import SOURCE, configure, program, run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine is not x86-64"),
]

# In the configuration Debug the kernels have the optimisation of the rest.
BUILDS = [(compiler, level) for compiler in ("g++", "clang++") for level in ("-O0", "-O2", "-O3")]
QEMU = "qemu-aarch64"
CROSS = "aarch64-linux-gnu-g++"


def hash_of(folder: Path, compiler: str, level: str, *options: str) -> Path:
    """The program that prints the hash."""
    configure(
        SOURCE, folder, f"-DCMAKE_CXX_COMPILER={program(compiler)}", "-DCMAKE_BUILD_TYPE=Debug",
        f"-DCMAKE_CXX_FLAGS_DEBUG={level}", "-DBATCHNORM_TESTS=ON", "-DBATCHNORM_OPENMP=OFF", *options,
    )  # fmt: skip
    run(program("cmake"), "--build", folder, "--target", "test_batchnorm")
    return folder / "test_batchnorm"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The hash of the build that users have, on its lowest level."""
    folder = tmp_path_factory.mktemp("release")
    configure(SOURCE, folder, "-DBATCHNORM_TESTS=ON", "-DBATCHNORM_WERROR=ON")
    run(program("cmake"), "--build", folder, "--target", "test_batchnorm")
    return run(folder / "test_batchnorm", "--hash", BATCHNORM_ISA="baseline")


@pytest.mark.parametrize(("compiler", "level"), BUILDS, ids=[" ".join(b) for b in BUILDS])
def test_compilers_and_optimisations(tmp_path, compiler, level, expected, record_property):
    binary = hash_of(tmp_path, compiler, level)
    levels = run(binary, "--levels").split()
    assert [run(binary, "--hash", BATCHNORM_ISA=name) for name in levels] == [expected] * len(levels)
    record_property("tried", len(levels))


@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3"])
def test_aarch64(tmp_path, level, expected):
    emulator = (program(QEMU), "-L", "/usr/aarch64-linux-gnu")
    if shutil.which(CROSS) is None:
        pytest.skip(f"{CROSS} is not installed")
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    assert run(*emulator, hash_of(tmp_path, CROSS, level, *system), "--hash") == expected
