"""The shape of the code and of what is installed: which file may know what, how long it may be, what the
objects of the kernels contain, what is in the wheel. Nothing is built here; tools only read files."""

from __future__ import annotations

import ast
import functools
import io
import re
import shutil
import subprocess
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

import batchnorm
import pytest
from batchnorm import _core

pytestmark = pytest.mark.quick

SOURCE = Path(__file__).resolve().parents[2]
CPP = SOURCE / "cpp"
PYTHON = SOURCE / "python" / "batchnorm"
PACKAGE = Path(_core.__file__ or "").parent  # where the built extension is installed

BUILD_FILES = (SOURCE / "CMakeLists.txt", CPP / "CMakeLists.txt", CPP / "isa.cmake")

needs_source = pytest.mark.skipif(
    not (CPP / "isa.cmake").exists(), reason="the source tree (cpp/) is not here"
)


# ---- C++: who includes whom --------------------------------------------------------------------------------


def cpp_files(folder: str = "") -> list[str]:
    """Paths below cpp/, as an include writes them."""
    kinds = (".h", ".hpp", ".cpp", ".def", ".cu")
    return sorted(p.relative_to(CPP).as_posix() for p in (CPP / folder).rglob("*") if p.suffix in kinds)


@functools.cache
def code(name: str) -> str:
    """A file without its comments."""
    return re.sub(r"//.*|/\*.*?\*/", "", (CPP / name).read_text(), flags=re.MULTILINE)


@functools.cache
def includes(name: str) -> set[str]:
    """What a file includes: the project's files by their path below cpp/, the rest as written."""
    found = set()
    for quote, target in re.findall(r'^#include ([<"])([^>"]+)', code(name), re.MULTILINE):
        paths = (
            [f"{Path(name).parent.as_posix()}/{target}", target, f"include/{target}"] if quote == '"' else []
        )
        found.add(next((p for p in paths if (CPP / p).is_file()), target))
    return found


def reached(name: str) -> set[str]:
    """What a file includes, directly or not."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        new = includes(todo.pop()) - seen
        seen |= new
        todo += [n for n in new if (CPP / n).is_file()]
    return seen


def project(names: set[str]) -> set[str]:
    return {n for n in names if (CPP / n).is_file()}


def files_with(pattern: str) -> set[str]:
    return {n for n in cpp_files() if re.search(pattern, code(n))}


@needs_source
def test_kernels_know_kernels_alone() -> None:
    for name in cpp_files("kernels"):
        assert all(n.startswith("kernels/") for n in project(reached(name))), name


@needs_source
def test_core_knows_the_kernels_table_alone() -> None:
    for name in cpp_files("core"):
        used = project(includes(name)) - set(cpp_files("core")) - {"include/batchnorm/batchnorm.hpp"}
        assert used <= {"kernels/kernels.h", "kernels/dispatch.h", "kernels/host_device.h"}, name


@needs_source
def test_plan_and_coeffs_know_no_kernel() -> None:
    for name in ("core/plan.h", "core/plan.cpp"):
        kernels = {n for n in reached(name) if n.startswith("kernels/")}
        assert kernels <= {"kernels/kernels.h", "kernels/host_device.h"}
        assert not reached(name) & {"core/parallel.h", "core/coeffs.h"}
    assert project(reached("core/coeffs.h")) == {"kernels/host_device.h"}


@needs_source
def test_the_public_header_needs_nothing_else() -> None:
    header = "include/batchnorm/batchnorm.hpp"
    assert all(re.fullmatch(r"[a-z_]+", n) for n in includes(header)), "standard headers only"


@needs_source
def test_bindings_know_the_public_header_and_the_memory() -> None:
    # Memory for NumPy arrays, and the limits it keeps to, are no part of the C++ API: its callers own theirs.
    # gpu.cpp has what a Saved holds of gamma and beta in the GPU's memory.
    known = {"include/batchnorm/batchnorm.hpp", "core/memory.h", "core/limits.h", *cpp_files("bind")}
    of_gpu = {"include/batchnorm/cuda.hpp", "core/saved.h"}
    for name in cpp_files("bind"):
        assert project(includes(name)) <= known | (of_gpu if name == "bind/gpu.cpp" else set()), name
    for name in cpp_files("core"):
        assert not [n for n in includes(name) if n.startswith("bind/")], name


@needs_source
def test_nothing_knows_the_gpu() -> None:
    # Of the kernels it takes the formulas of elements, never a loop over them.
    taken = {"kernels/host_device.h", "kernels/one_lane.h", "kernels/elements.h"}
    for name in cpp_files():
        used = project(includes(name))
        if name.startswith("cuda/"):
            assert {n for n in used if n.startswith("kernels/")} <= taken, name
            assert not {n for n in used if n.startswith("bind/")}, name
        else:
            assert not {n for n in used if n.startswith("cuda/")}, name
    assert files_with(r"\bcuda[A-Z]\w+\(|<<<") <= {"cuda/launch.h", "cuda/runtime.cu", "bind/gpu.cpp"}


@needs_source
def test_memory_knows_no_arithmetic() -> None:
    for name in ("core/memory.cpp", "core/limits.cpp"):
        used = project(includes(name))
        assert used <= {"core/memory.h", "core/limits.h", "core/check.h", "include/batchnorm/batchnorm.hpp"}


@needs_source
def test_isa_units_include_no_library_code() -> None:
    # Of an inline function that one unit compiles with AVX-512 and another without, the linker keeps one for
    # all, perhaps the one with AVX-512. So these units include nothing that has inline functions.
    units = [n for n in cpp_files("kernels") if n.startswith("kernels/isa_") and n.endswith(".cpp")]
    assert len(units) == 3
    for name in units:
        others = reached(name) - project(reached(name))
        assert others <= {"stddef.h", "stdint.h", "string.h", "immintrin.h"}, name
        assert len(code(name).split("\n")) <= 4, f"{name} is two defines and one include"


@needs_source
def test_one_place_for_each() -> None:
    assert files_with(r"\bomp\.h|#pragma omp|\bomp_\w+\(") == {"core/team_openmp.cpp"}
    assert {n for n in files_with(r"\bthrow\b") if not n.startswith("bind/")} == {
        "core/check.cpp",
        "cuda/runtime.cu",
    }
    assert files_with(r"mmintrin|\b_mm\d*_|\b__m\d+") == {"kernels/vec.h", "core/float_mode.h"}
    # limits.cpp: OMP_NUM_THREADS is OpenMP's to read, but whether it is set decides on the CPU quota.
    readers = {"core/check.cpp", "core/limits.cpp", "kernels/dispatch.cpp"}
    assert files_with(r"\bgetenv\b") <= {*readers, "core/team_openmp.cpp", "core/team_threads.cpp"}
    assert files_with(r"\bmmap\b|\bmadvise\b") == {"core/memory.cpp"}
    assert files_with(r"(?m)^#(?:el)?if.*(?:__AVX|__SSE|VECTOR_BYTES)") == {
        "kernels/vec.h",
        "kernels/scalar.h",
    }


@needs_source
def test_every_kernel_is_listed_once() -> None:
    lines = re.findall(
        r"^BATCHNORM_KERNEL\((\w+), (\w+), (\w+)\)$", code("kernels/kernels.def"), re.MULTILINE
    )
    operations = {op for op, _, _ in lines}
    floats, integers = ("float32", "float64", "float16", "bfloat16"), ("uint8", "int16", "uint16")
    dtypes = {op: floats for op in operations} | {"moments": (*floats, *integers), "image": integers}
    assert sorted(lines) == sorted((o, d, t) for o in operations for d in ("ncs", "nsc") for t in dtypes[o])


@needs_source
def test_compiler_flags() -> None:
    for path in (*BUILD_FILES, SOURCE / "pyproject.toml"):
        flags = re.sub(r"#.*", "", path.read_text())
        for banned in ("-ffast-math", "-Ofast", "-march=", "-funsafe"):
            assert banned not in flags, f"{banned} in {path.name}"
    for flag in ("-ffp-contract=off", "-fmad=false"):
        assert any(flag in path.read_text() for path in BUILD_FILES)
    # So fma is used where it is written, and it is written where the product is exact.
    assert files_with(r"fmadd|\bfma\(") <= {"kernels/vec.h", "kernels/one_lane.h"}
    functions = re.findall(r"(\w+)\([^)]*\) \{[^}]*fmadd", code("kernels/vec.h"))
    assert set(functions) == {"add_product"}, functions
    for name in ("apply", "grad_apply", "image"):
        assert "add_product(" not in code(f"kernels/{name}.h")


@needs_source
def test_version_is_written_once() -> None:
    number = re.compile(r"(?<![\d.])" + re.escape(batchnorm.__version__) + r"(?![\d.])")
    files = [*BUILD_FILES, SOURCE / "pyproject.toml", *(CPP / n for n in cpp_files()), *PYTHON.rglob("*.py*")]
    assert [p.name for p in files if p.suffix != ".pyc" and number.search(p.read_text())] == ["_version.py"]


@needs_source
def test_the_namespace_is_that_of_the_version() -> None:
    major, minor, _ = batchnorm.__version__.split(".")
    assert f"inline namespace v{major}_{minor} {{" in code("include/batchnorm/batchnorm.hpp")


# ---- Python: who imports whom ------------------------------------------------------------------------------

# From the bottom up. A module imports modules of rows below its own, or of its own row without a circle.
ROWS = (
    ("_core", "_version", "typing", "_hints", "_arrays", "_openmp"),
    ("functional",),
    ("settings",),
    ("running", "parameter", "runtime", "fold", "tune", "progress", "distributed"),
    ("moments", "dataset", "images", "_gpu", "dask"),
    ("diagnose",),
    ("io",),
    ("layer",),
    ("formats", "torch", "keras"),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
# Places that the public operations and the layer share by contract; _core.pyi names them.
SHARED = {"_owner", "_serial", "_shares"}
# Public methods of named tuples, whose names begin with an underscore so that no field can have them.
TUPLES = {"_asdict", "_fields", "_field_defaults", "_make", "_replace"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Each module of the package by its dotted name below it ("diagnose.findings"), parsed."""
    found = {}
    for path in sorted(PYTHON.rglob("*.py")):
        parts = path.relative_to(PYTHON).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imported(name: str) -> set[str]:
    """The package's modules that a module imports, also inside functions and under TYPE_CHECKING."""
    is_package = (PYTHON / name.replace(".", "/")).is_dir()
    here = [] if name == "__init__" else name.split(".")[: None if is_package else -1]
    found = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "batchnorm":
            base = (node.module or "").split(".")[1:]
        else:
            continue
        for alias in node.names:
            deeper = ".".join([*base, alias.name])
            found.add(deeper if deeper in modules() or deeper == "_core" else ".".join(base) or "__init__")
    return found - {name}


def row(name: str) -> int:
    return RANK[name.split(".")[0]]


@needs_source
def test_top_level_names() -> None:
    expected = {n for n in RANK if n not in ("_core", "__main__")}
    assert {n.split(".")[0] for n in modules()} - {"__main__"} == expected
    others = {p.name for p in PYTHON.iterdir() if p.suffix not in (".py", ".so") and p.name != "__pycache__"}
    assert others <= {"_core.pyi", "py.typed", "diagnose", "io", "torch", "keras", "include", "lib"}


@needs_source
def test_imports_go_down() -> None:
    for name in modules():
        for other in imported(name):
            assert row(other) <= row(name), f"{name} imports {other}"
            same = name.split(".")[0] == other.split(".")[0]
            assert row(other) < row(name) or same or row(name) in (0, 4), f"{name} imports {other}"


@needs_source
def test_imports_have_no_circle() -> None:
    below: dict[str, set[str]] = {name: imported(name) & set(modules()) for name in modules()}
    while below:
        free = [name for name, others in below.items() if not others]
        assert free, f"a circle among {sorted(below)}"
        for name in free:
            del below[name]
        for others in below.values():
            others.difference_update(free)


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines: functions, classes, variables, attributes it assigns, slots, arguments."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)  # a slot, or a name for setattr
    return found


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


@needs_source
def test_nothing_private_is_used_in_another_file() -> None:
    for name, tree in modules().items():
        own = defined(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr):
                assert node.attr in own | TUPLES | SHARED, f"{name}:{node.lineno} uses .{node.attr}"
            elif isinstance(node, ast.ImportFrom) and node.level:
                for alias in node.names:
                    known = alias.name in RANK or (node.module, alias.name) == ("_openmp", "_core")
                    assert known or not private(alias.name), f"{name}:{node.lineno} imports {alias.name}"


@needs_source
def test_public_names_are_declared() -> None:
    for name, tree in modules().items():
        if not any(private(part) or part.startswith("__main") for part in name.split(".")):
            assert "__all__" in defined(tree), f"{name} has no __all__"


# ---- how long ----------------------------------------------------------------------------------------------


def python_lines(path: Path) -> int:
    """Lines of code: neither blank, nor comment, nor docstring."""
    text = path.read_text()
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Module):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docs.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*kinds, tokenize.ENDMARKER):
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - docs)


@needs_source
def test_the_package_stays_small() -> None:
    # What is for other libraries has ceilings of its own.
    def room(path: Path) -> str:
        states = ("__init__.py", "layer_state.py", "npz.py")
        of_files = path.parts[0] == "io" and path.name not in states
        return "formats" if of_files or path.name == "formats.py" else path.parts[0]

    rooms = {
        "formats": 1577,
        "torch": 1057,
        "keras": 304,
        "distributed.py": 149,
        "_gpu.py": 348,
        "dask.py": 286,
        "": 4100,
    }
    count = {p: python_lines(p) for p in PYTHON.rglob("*.py")}
    for name, ceiling in rooms.items():
        own = {}
        for p, n in count.items():
            of = room(p.relative_to(PYTHON))
            if (of if of in rooms else "") == name:
                own[p] = n
        longest = sorted(((n, p.name) for p, n in own.items()), reverse=True)[:5]
        lines = f"{sum(own.values())} lines of Python without docstrings; the longest: {longest}"
        assert sum(own.values()) <= ceiling, f"{name or 'the package'}: {lines}"


@needs_source
def test_the_core_stays_small() -> None:
    count = {n: sum(bool(line.strip()) for line in code(n).splitlines()) for n in cpp_files()}
    gpu = {n for n in count if "cuda" in n} | {"bind/gpu.cpp", "bind/dlpack.h"}
    of_gpu = sum(count[n] for n in gpu)
    assert of_gpu <= 2644, f"{of_gpu} lines of C++ for GPUs without comments"
    total = sum(count.values()) - of_gpu
    assert total <= 11814, f"{total} lines of C++ without comments"


@needs_source
def test_functions_stay_short() -> None:
    """Python functions have at most 60 lines of code (style.md 5), those without a body aside."""
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert length <= 60, f"{name}.{node.name} has {length} lines"


# ---- the kernels' objects, in the static library that the wheel carries ------------------------------------


def tool(name: str, *arguments: object) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def symbols() -> dict[str, list[tuple[str, str]]]:
    """(type, name) of every symbol, by ISA level."""
    listing = tool("nm", PACKAGE / "lib" / "libbatchnorm.a")
    found = {}
    for member in listing.split("\n\n"):
        title, *lines = member.strip().splitlines()
        if match := re.fullmatch(r"isa_(\w+)\.cpp\.o:", title):
            found[match[1]] = [(line.split()[-2], line.split()[-1]) for line in lines]
    assert sorted(found) == sorted(_core.isa_built())
    return found


Symbols = dict[str, list[tuple[str, str]]]


def test_kernel_objects_define_their_table_alone(symbols: Symbols) -> None:
    for isa, all_symbols in symbols.items():
        defined_here = [name for kind, name in all_symbols if kind.isupper() and kind != "U"]
        assert len(defined_here) == 1
        assert defined_here[0].endswith(f"{len(isa)}{isa}5tableE"), defined_here


def test_kernel_objects_have_no_weak_symbols(symbols: Symbols) -> None:
    for isa, all_symbols in symbols.items():
        assert [name for kind, name in all_symbols if kind in "wWvVu"] == [], isa


def test_kernel_objects_need_memory_functions_alone(symbols: Symbols) -> None:
    allowed = {"memcpy", "memset", "memmove", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
    for isa, all_symbols in symbols.items():
        assert {name for kind, name in all_symbols if kind == "U"} <= allowed, isa


def test_kernel_objects_run_nothing_at_start() -> None:
    for member in tool("readelf", "-SW", PACKAGE / "lib" / "libbatchnorm.a").split("File: ")[1:]:
        if "(isa_" in member.splitlines()[0]:
            assert not re.search(r"\.(init|fini)_array|\.[cd]tors", member), member.splitlines()[0]


def test_extension_exports_its_entry_alone() -> None:
    # What it exported could be taken for, or replaced by, the same name in another library.
    listing = tool("nm", "-D", "--defined-only", _core.__file__)
    names = [line.split()[-1] for line in listing.splitlines()]
    assert [n for n in names if "batchnorm" in n] == []
    assert "PyInit__core" in names


# ---- what is installed -------------------------------------------------------------------------------------


def installed() -> Iterator[tuple[str, Path]]:
    """Files of the installed package by their path in it; an editable one lies in two places."""
    for root in {PACKAGE, Path(batchnorm.__file__).parent}:
        for path in root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(root).as_posix(), path


def test_files_of_the_wheel() -> None:
    files = {name for name, _ in installed()}
    cmake = "lib/cmake/batchnorm/batchnorm"
    assert {
        "__init__.py", "_core.pyi", "py.typed", "include/batchnorm/batchnorm.hpp", "lib/libbatchnorm.a",
        f"{cmake}Config.cmake", f"{cmake}ConfigVersion.cmake", f"{cmake}Targets.cmake",
    } <= files  # fmt: skip
    assert Path(batchnorm.get_include()) == PACKAGE / "include"
    assert Path(batchnorm.get_cmake_dir()) == PACKAGE / "lib" / "cmake" / "batchnorm"
    suffixes = {Path(f).suffix for f in files if not f.startswith(("lib/", "include/"))}
    assert suffixes <= {".py", ".pyi", ".so", ".typed"}


def test_size_of_the_wheel() -> None:
    # Most of it is the kernels. What is published comes without the C++
    # library and without what serves GPUs.
    published = [p for name, p in installed() if not name.startswith(("lib/", "include/", "_cuda."))]
    packed = sum(len(zlib.compress(p.read_bytes())) for p in published)
    assert packed < 2.5e6, f"the wheel takes {packed / 1e6:.1f} MB"
    assert sum(p.stat().st_size for p in published) < 7e6


def test_version_of_the_core() -> None:
    assert _core.version() == batchnorm.__version__
