"""The shape of the code and of what is installed: which file may know what, what the objects of the kernels
contain, what is in the wheel. Nothing is built here; tools only read files."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import batchnorm
import pytest
from batchnorm import _core

SOURCE = Path(__file__).parents[1]
CPP = SOURCE / "cpp"
PACKAGE = Path(batchnorm.__file__).parent

needs_source = pytest.mark.skipif(
    not (CPP / "isa.cmake").exists(), reason="the source tree (cpp/) is not here"
)


# ---- the source tree ----


def cpp_files(folder=""):
    """Paths below cpp/, as an include writes them."""
    kinds = (".h", ".hpp", ".cpp", ".def")
    return sorted(p.relative_to(CPP).as_posix() for p in (CPP / folder).rglob("*") if p.suffix in kinds)


@functools.cache
def code(name):
    """A file without its comments."""
    return re.sub(r"//.*", "", (CPP / name).read_text())


@functools.cache
def includes(name):
    """What a file includes: the project's files by their path below cpp/, the rest as written."""
    found = set()
    for quote, target in re.findall(r'^#include ([<"])([^>"]+)', code(name), re.MULTILINE):
        paths = (
            [f"{Path(name).parent.as_posix()}/{target}", target, f"include/{target}"] if quote == '"' else []
        )
        found.add(next((p for p in paths if (CPP / p).is_file()), target))
    return found


def reached(name):
    """What a file includes, directly or not."""
    seen = set()
    todo = [name]
    while todo:
        new = includes(todo.pop()) - seen
        seen |= new
        todo += [n for n in new if (CPP / n).is_file()]
    return seen


def project(names):
    return {n for n in names if (CPP / n).is_file()}


def files_with(pattern):
    return {n for n in cpp_files() if re.search(pattern, code(n))}


@needs_source
def test_kernels_know_kernels_alone():
    for name in cpp_files("kernels"):
        assert all(n.startswith("kernels/") for n in project(reached(name))), name


@needs_source
def test_core_knows_the_kernels_table_alone():
    for name in cpp_files("core"):
        used = project(includes(name)) - set(cpp_files("core")) - {"include/batchnorm/batchnorm.hpp"}
        assert used <= {"kernels/kernels.h", "kernels/dispatch.h"}, name


@needs_source
def test_plan_and_coeffs_know_no_kernel():
    for name in ("core/plan.h", "core/plan.cpp"):
        assert {n for n in reached(name) if n.startswith("kernels/")} == {"kernels/kernels.h"}
        assert not reached(name) & {"core/parallel.h", "core/coeffs.h"}
    assert project(reached("core/coeffs.h")) == set()


@needs_source
def test_the_public_header_needs_nothing_else():
    header = "include/batchnorm/batchnorm.hpp"
    assert all(re.fullmatch(r"[a-z_]+", n) for n in includes(header)), "standard headers only"


@needs_source
def test_bindings_know_the_public_header_and_the_memory():
    # Memory for NumPy arrays, and the limits it keeps to, are no part of the C++ API: its callers own theirs.
    known = {"include/batchnorm/batchnorm.hpp", "bind/ndarray.h", "bind/output.h"}
    for name in cpp_files("bind"):
        assert project(includes(name)) <= known | {"core/memory.h", "core/limits.h"}, name


@needs_source
def test_memory_knows_no_arithmetic():
    for name in ("core/memory.cpp", "core/limits.cpp"):
        used = project(includes(name))
        assert used <= {"core/memory.h", "core/limits.h", "core/check.h"}, name


@needs_source
def test_isa_units_include_no_library_code():
    # Of an inline function that one unit compiles with AVX-512 and another without, the linker keeps one for
    # all, perhaps the one with AVX-512. So these units include nothing that has inline functions.
    units = [n for n in cpp_files("kernels") if n.startswith("kernels/isa_") and n.endswith(".cpp")]
    assert len(units) == 3
    for name in units:
        others = reached(name) - project(reached(name))
        assert others <= {"stddef.h", "stdint.h", "string.h", "immintrin.h"}, name
        assert len(code(name).splitlines()) == 3, f"{name} is two defines and one include"


@needs_source
def test_one_place_for_each():
    assert files_with(r"\bomp\.h|#pragma omp|\bomp_\w+\(") == {"core/parallel.cpp"}
    assert files_with(r"\bthrow\b") <= {"core/check.cpp", "bind/module.cpp"}
    assert files_with(r"immintrin|\b_mm\d*_|\b__m\d+") == {"kernels/vec.h"}
    # limits.cpp: OMP_NUM_THREADS is OpenMP's to read, but whether it is set decides on the CPU quota.
    assert files_with(r"\bgetenv\b") <= {"core/check.cpp", "core/limits.cpp", "kernels/dispatch.cpp"}
    assert files_with(r"\bmmap\b|\bmadvise\b") == {"core/memory.cpp"}
    assert files_with(r"(?m)^#(?:el)?if.*(?:__AVX|__SSE|VECTOR_BYTES)") == {"kernels/vec.h"}


@needs_source
def test_every_kernel_is_listed_once():
    lines = re.findall(
        r"^BATCHNORM_KERNEL\((\w+), (\w+), (\w+)\)$", code("kernels/kernels.def"), re.MULTILINE
    )
    operations = {op for op, _, _ in lines}
    floats, integers = ("float32", "float64", "float16", "bfloat16"), ("uint8", "int16", "uint16")
    dtypes = {op: floats for op in operations} | {"moments": (*floats, *integers), "image": integers}
    assert sorted(lines) == sorted((o, d, t) for o in operations for d in ("ncs", "nsc") for t in dtypes[o])


@needs_source
def test_compiler_flags():
    for path in (SOURCE / "CMakeLists.txt", CPP / "isa.cmake", SOURCE / "pyproject.toml"):
        flags = re.sub(r"#.*", "", path.read_text())
        for banned in ("-ffast-math", "-Ofast", "-march=", "-funsafe"):
            assert banned not in flags, f"{banned} in {path.name}"
    assert "-ffp-contract=off" in (SOURCE / "CMakeLists.txt").read_text()
    # So fma is used where it is written, and it is written where the product is exact.
    uses = {n for n in cpp_files() if re.search(r"fmadd|std::fma", code(n))}
    assert uses <= {"kernels/vec.h"}
    functions = re.findall(r"(\w+)\([^)]*\) \{[^}]*fmadd", code("kernels/vec.h"))
    assert set(functions) == {"add_product"}, functions
    for name in ("apply", "grad_apply", "image"):
        assert "add_product(" not in code(f"kernels/{name}.h")


@needs_source
def test_version_is_written_once():
    number = re.compile(r"(?<![\d.])" + re.escape(batchnorm.__version__) + r"(?![\d.])")
    files = [SOURCE / "CMakeLists.txt", SOURCE / "pyproject.toml", *(CPP / n for n in cpp_files())]
    files += [CPP / "isa.cmake", *(SOURCE / "python" / "batchnorm").glob("*.py*")]
    assert [p.name for p in files if number.search(p.read_text())] == ["_version.py"]


# ---- the kernels' objects, in the static library that the wheel carries ----


def tool(name, *arguments):
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def symbols():
    """(type, name) of every symbol, by ISA level."""
    listing = tool("nm", PACKAGE / "lib" / "libbatchnorm.a")
    found = {}
    for member in listing.split("\n\n"):
        title, *lines = member.strip().splitlines()
        if match := re.fullmatch(r"isa_(\w+)\.cpp\.o:", title):
            found[match[1]] = [tuple(line.split()[-2:]) for line in lines]
    assert sorted(found) == sorted(_core.isa_built())
    return found


def test_kernel_objects_define_their_table_alone(symbols):
    for isa, all_symbols in symbols.items():
        defined = [name for kind, name in all_symbols if kind.isupper() and kind != "U"]
        assert defined == [f"_ZN9batchnorm{len(isa)}{isa}5tableE"]


def test_kernel_objects_have_no_weak_symbols(symbols):
    for isa, all_symbols in symbols.items():
        assert [name for kind, name in all_symbols if kind in "wWvVu"] == [], isa


def test_kernel_objects_need_memory_functions_alone(symbols):
    allowed = {"memcpy", "memset", "memmove", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
    for isa, all_symbols in symbols.items():
        assert {name for kind, name in all_symbols if kind == "U"} <= allowed, isa


def test_kernel_objects_run_nothing_at_start():
    for member in tool("readelf", "-SW", PACKAGE / "lib" / "libbatchnorm.a").split("File: ")[1:]:
        if "(isa_" in member.splitlines()[0]:
            assert not re.search(r"\.(init|fini)_array|\.[cd]tors", member), member.splitlines()[0]


def test_extension_exports_its_entry_alone():
    # What it exported could be taken for, or replaced by, the same name in another library.
    listing = tool("nm", "-D", "--defined-only", _core.__file__)
    names = [line.split()[-1] for line in listing.splitlines()]
    assert [n for n in names if "batchnorm" in n] == []
    assert "PyInit__core" in names


# ---- what is installed ----


def installed():
    return {
        p.relative_to(PACKAGE).as_posix(): p
        for p in PACKAGE.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


def test_files_of_the_wheel():
    files = set(installed())
    cmake = "lib/cmake/batchnorm/batchnorm"
    assert {
        "__init__.py", "_core.pyi", "py.typed", "include/batchnorm/batchnorm.hpp", "lib/libbatchnorm.a",
        f"{cmake}Config.cmake", f"{cmake}ConfigVersion.cmake", f"{cmake}Targets.cmake",
    } <= files  # fmt: skip
    assert Path(batchnorm.get_include()) == PACKAGE / "include"
    assert Path(batchnorm.get_cmake_dir()) == PACKAGE / "lib" / "cmake" / "batchnorm"
    suffixes = {Path(f).suffix for f in files if not f.startswith(("lib/", "include/"))}
    assert suffixes <= {".py", ".pyi", ".so", ".typed"}


def test_size_of_the_wheel():
    # Most of it is the kernels, twice: in the extension and in the static library.
    packed = sum(len(zlib.compress(p.read_bytes())) for p in installed().values())
    assert packed < 3.5e6, f"the wheel takes {packed / 1e6:.1f} MB"
    assert sum(p.stat().st_size for p in installed().values()) < 10e6


def test_version_of_the_core():
    assert _core.version() == batchnorm.__version__


def test_stub_matches_the_extension():
    stub = ast.parse((PACKAGE / "_core.pyi").read_text())
    functions = {f.name: len(f.args.posonlyargs) for f in stub.body if isinstance(f, ast.FunctionDef)}
    assert set(functions) == {n for n in dir(_core) if not n.startswith("_")}
    for name, count in functions.items():
        documented = getattr(_core, name).__doc__
        if documented:
            assert len(re.findall(r"\barg\d+:", documented.splitlines()[0])) == count, documented
        else:  # those that are called without pybind11's dispatch
            with pytest.raises(TypeError, match=f"takes {count} arguments, got 0"):
                getattr(_core, name)()
