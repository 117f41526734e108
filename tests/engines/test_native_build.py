"""The native library: how it is built and found, that Python knows its interface, and that all kernels agree."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pastalm.engines.native import library
from pastalm.errors import CapabilityError
from tests.native.programs import (
    ROOT,
    SOURCE,
    agree,
    compiler,
    hatch_build,
    kernels,
    need,
    program,
    run,
)

C_TYPES = {
    ctypes.c_int32: "int32_t", ctypes.c_int64: "int64_t", ctypes.c_char_p: "const char *", ctypes.c_void_p: "pointer",
    ctypes.c_float: "float", None: "void",
}  # fmt: skip
NATIVE = "pastalm/engines/native"


# ------------------------------------------------------------------------------ the interface


def test_structures_lie_in_memory_as_in_the_header(tmp_path: Path) -> None:
    asks, knows = [], []
    for name, structure in library.STRUCTURES.items():
        asks.append(f"sizeof({name})")
        knows.append(ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            asks += [f"offsetof({name}, {field})", f"sizeof((({name} *)0)->{field})"]
            knows += [getattr(structure, field).offset, getattr(structure, field).size]
    prints = "".join(f'printf("%zu\\n", (size_t){ask});\n' for ask in asks)
    source = tmp_path / "sizes.cpp"
    source.write_text(f'#include <cstddef>\n#include <cstdio>\n#include "pastalm.h"\nint main() {{ {prints} }}\n')
    hatch_build.make(tmp_path / "sizes", [*compiler(), "-I", str(SOURCE), str(source)])
    says = run([tmp_path / "sizes"]).split()
    assert dict(zip(asks, knows, strict=True)) == dict(zip(asks, map(int, says), strict=True))


@pytest.mark.parametrize("source", sorted((ROOT / "benchmarks").glob("*.cpp")), ids=lambda path: path.name)
def test_programs_of_benchmarks_fit_the_sources(source: Path) -> None:
    run([*compiler(), "-std=c++17", "-fsyntax-only", "-I", str(SOURCE), str(source)])


def header() -> str:
    text = (SOURCE / "pastalm.h").read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def test_structures_have_all_fields_of_the_header() -> None:
    found = {name: body for body, name in re.findall(r"typedef struct \{(.*?)\}\s*(\w+);", header(), re.DOTALL)}
    assert found.keys() == library.STRUCTURES.keys()
    for name, body in found.items():
        fields = re.findall(r"(\w+)\s*[,;]", body)
        assert fields == [field for field, *_ in library.STRUCTURES[name]._fields_], name


def plain(declared: str) -> str:
    """A C type as one word, without a parameter's name; pointers are all alike but text."""
    text = " ".join(declared.split())
    if "char *" in text:
        return "const char *"
    return "pointer" if "*" in text else text.split()[0]


def test_functions_are_declared_as_in_the_header() -> None:
    found = {
        name: (plain(result), [plain(each) for each in arguments.split(",") if plain(each) != "void"])
        for result, name, arguments in re.findall(
            r"^((?:const )?\w+ \*?)(pastalm_\w+)\((.*?)\);", header(), re.MULTILINE | re.DOTALL
        )
    }
    declared = {
        name: (C_TYPES[result], [C_TYPES.get(each, "pointer") for each in arguments])
        for name, (result, arguments) in library.SIGNATURES.items()
    }
    assert found == declared
    assert f"#define PASTALM_ABI {library.ABI}" in header()


# ------------------------------------------------------------------------------ finding and loading it


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The library is looked for again, here and after the test."""
    library._loaded.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library._loaded.cache_clear()


def test_where_there_is_a_compiler_there_is_the_library() -> None:
    compiler()
    assert library.unavailable() == ""
    assert library.load() is library.library()
    assert library.library().pastalm_kernels().decode() in kernels()


def test_what_is_missing_is_said_in_one_line(anew: pytest.MonkeyPatch, tmp_path: Path) -> None:
    anew.setattr(library, "_FOLDER", tmp_path)
    (tmp_path / "not_built.txt").write_text("no C++ compiler was found\n")
    assert library.unavailable() == (
        "no C++ compiler was found when pastalm was installed: apt-get install g++, then "
        "pip install --force-reinstall --no-deps --no-cache-dir pastalm"
    )
    assert library.load() is None
    with pytest.raises(CapabilityError, match="no C\\+\\+ compiler was found"):
        library.library()


def test_a_checkout_is_told_of_make(anew: pytest.MonkeyPatch, tmp_path: Path) -> None:
    anew.setattr(library, "_FOLDER", tmp_path)
    (tmp_path / "src").mkdir()
    assert library.unavailable().endswith("libpastalm.so is missing: make native")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "which is not a file"),
        ("", "cannot be loaded"),
        ('extern "C" int pastalm_abi() { return 0; }', "has version 0 of the interface, not 3"),
        ('extern "C" int pastalm_abi() { return 3; }', "cannot be loaded"),
    ],
)
def test_a_library_that_does_not_fit_is_not_used(
    code: str | None, says: str, anew: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named, source = tmp_path / "named.so", tmp_path / "named.cpp"
    if code == "":
        named.write_bytes(b"no library")
    elif code is not None:
        source.write_text(code)
        hatch_build.make(named, [*compiler(), "-shared", "-fPIC", str(source)])
    anew.setenv("PASTALM_LIBRARY", str(named))
    assert library.load() is None
    assert says in library.unavailable() and "\n" not in library.unavailable()


# ------------------------------------------------------------------------------ building it

PUBLIC = 'extern "C" __attribute__((visibility("default")))'
STUB = {
    "one.cpp": f'#include "one.h"\n{PUBLIC} int pastalm_abi() {{ return ONE; }}\n',
    "kernels.cpp": "namespace PASTALM_ISA { float twice(float x) { return x + x; } }\n",
    "one.h": "constexpr int ONE = 1;\n",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    for name, text in STUB.items():
        (folder / name).write_text(text)
    return folder


def test_only_what_changed_is_compiled_again(source: Path, tmp_path: Path) -> None:
    compiler()

    def built() -> dict[str, int]:
        hatch_build.build(tmp_path / "out.so", source=source, work=tmp_path / "work")
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work" / "plain").iterdir() if p.suffix == ".o"}

    first = built()
    assert sorted({name.partition("-")[0] for name in first}) == ["kernels", "one"]
    assert built() == first
    (source / "one.cpp").write_text(STUB["one.cpp"].replace("ONE;", "ONE + 6;"))
    second = built()
    assert len(second) == len(first) and len(set(first.items()) & set(second.items())) == len(first) - 1
    assert ctypes.CDLL(str(tmp_path / "out.so")).pastalm_abi() == 7
    (source / "one.h").write_text("constexpr int ONE = 2;\n")
    assert not set(second.items()) & set(built().items())


def test_code_for_better_processors_is_linked_last(source: Path) -> None:
    command = compiler()
    names = [path.name.rpartition("-")[0] for path, _ in hatch_build.jobs(source, command, [], source)]
    assert names == ["one", *(f"kernels-{name}" for name in hatch_build.instruction_sets(command))]
    assert names[1] == "kernels-plain"


def test_a_library_offers_its_interface_and_nothing_else(source: Path, tmp_path: Path) -> None:
    compiler()
    need("nm")
    if sys.platform != "linux":
        pytest.skip("symbols are listed as on Linux")
    (source / "two.cpp").write_text(f"#include <string>\n{PUBLIC} void other(int i) {{ throw std::to_string(i); }}\n")
    built = hatch_build.build(tmp_path / "out.so", source=source, work=tmp_path / "work")
    assert run(["nm", "-D", "--defined-only", "--format=just-symbols", built]).split() == ["pastalm_abi"]


@pytest.fixture
def tree(tmp_path: Path, source: Path) -> Path:
    """As little of the project as makes a wheel."""
    tree = tmp_path / "tree"
    package = tree / NATIVE
    package.mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore", "pastalm/__init__.py"):
        shutil.copy(ROOT / name, tree / name)
    source.rename(package / "src")
    return tree


def wheel(tree: Path, target: str = "wheel", **environment: str) -> Path:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(tree / "out")]
    done = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = (tree / "out").iterdir()
    return made


def contents(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return {name.removeprefix(NATIVE + "/") for name in opened.namelist() if name.startswith(NATIVE)}


def test_a_wheel_has_the_library_and_names_its_platform(tree: Path) -> None:
    compiler()
    made = wheel(tree)
    platforms = r"(manylinux_2_\d+|linux|macosx_11_0|musllinux_1_\d)_\w+"
    assert re.fullmatch(rf"pastalm-[\d.]+-py3-none-{platforms}\.whl", made.name)
    assert contents(made) == {"libpastalm.so"}
    with zipfile.ZipFile(made) as opened:
        there = opened.extract(f"{NATIVE}/libpastalm.so", tree / "there")
        (about,) = (name for name in opened.namelist() if name.endswith("/WHEEL"))
        assert b"Root-Is-Purelib: false" in opened.read(about)
    assert ctypes.CDLL(there).pastalm_abi() == 1


@pytest.mark.parametrize("why", ["no C++ compiler 'nothing', which CXX names, was found", "one.cpp"])
def test_a_wheel_without_the_library_is_pure_and_says_why(tree: Path, why: str) -> None:
    """Where there is no compiler, and where it fails; also with a library of before lying there."""
    (tree / NATIVE / "libpastalm.so").write_bytes(b"old")
    if why == "one.cpp":
        compiler()
        (tree / NATIVE / "src" / "one.cpp").write_text("this is no C++\n")
        made = wheel(tree)
    else:
        made = wheel(tree, CXX="nothing")
    assert made.name.endswith("-py3-none-any.whl")
    assert contents(made) == {"not_built.txt"}
    assert not (tree / NATIVE / "libpastalm.so").exists(), "it is not what the sources say"
    with zipfile.ZipFile(made) as opened:
        said = opened.read(f"{NATIVE}/not_built.txt").decode()
    assert why in said and said.count("\n") == 1


def test_the_source_distribution_has_the_sources(tree: Path) -> None:
    made = wheel(tree, "sdist")
    files = run(["tar", "tzf", made]).splitlines()
    inside = {name.partition("/")[2] for name in files}
    assert {f"{NATIVE}/src/{name}" for name in STUB} | {"hatch_build.py"} <= inside


def test_by_itself_it_says_what_is_wrong(tree: Path) -> None:
    def fails(status: int, **environment: str) -> str:
        done = subprocess.run([sys.executable, "hatch_build.py"], cwd=tree, env=os.environ | environment,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == status and not done.stdout
        return done.stderr

    assert fails(2, CXX="nothing").count("\n") == 1
    compiler()
    (tree / NATIVE / "src" / "one.cpp").write_text("this is no C++\n")
    assert "one.cpp:1" in fails(1)


# ------------------------------------------------------------------------------ what it computes


def test_kernels_agree() -> None:
    compiler()
    plainly = run([program("logits"), "plain", "1"])
    for name in kernels()[1:]:
        agree(plainly, run([program("logits"), name, "1"]), 0.03 if name.endswith("bf16") else 1e-4)


def test_random_plans_and_wrong_ones() -> None:
    """tests/engines/test_native_sanitizers.py runs many more, and watches memory and threads."""
    compiler()
    seed = np.random.default_rng().integers(1 << 30)
    assert "no surprise" in run([program("fuzz"), "600", str(seed), "2"])
