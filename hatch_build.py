"""Compiles the native CPU engine, when the package is built and by itself.

A hook of hatchling's and not scikit-build-core: five files and no Python ABI need no CMake, and a machine without
a compiler shall install the package all the same.

    python hatch_build.py                       the library in the package's folder; only what changed
    python hatch_build.py --sanitize address    one with checks, in build/native; or thread

Contract: `build` compiles the sources with the compiler that CXX names (else c++, g++, clang++), an object for
each file, and for kernels.cpp one for each instruction set of the compiler's target; the processor is looked at
when the library runs. Where that is not possible it raises NotBuilt with one line; the hook then goes on
without the library, and leaves the line in the package for `pasta env`. Objects are kept in build/native by a
hash of what they are made of.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # by itself it needs nothing but Python
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "pastalm" / "engines" / "native"
LIBRARY = PACKAGE / "libpastalm.so"
REASON = PACKAGE / "not_built.txt"
WORK = ROOT / "build" / "native"

AVX512 = [f"-m{x}" for x in ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c"]]
INSTRUCTION_SETS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "plain": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
    },
    "aarch64": {"plain": [], "neon": ["-march=armv8.2-a+dotprod+fp16"]},
}
COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
TRACEABLE = ["-O1", "-g", "-fno-omit-frame-pointer"]
MACOS = "11.0"


class NotBuilt(Exception):
    """Why there is no library: one line. `output` is all that the compiler said."""

    def __init__(self, line: str, output: str = "") -> None:
        super().__init__(line)
        self.output = output


class NoCompiler(NotBuilt):
    """Nothing here compiles C++."""


def find_compiler() -> list[str]:
    """The command that compiles C++."""
    if os.name != "posix":
        raise NoCompiler("the native engine is built on Linux and macOS only")
    named = os.environ.get("CXX")
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        if command and shutil.which(command[0]):
            return command
    missing = f"no C++ compiler {named!r}, which CXX names," if named else "no C++ compiler"
    raise NoCompiler(f"{missing} was found")


def run(command: Sequence[str]) -> str:
    """What a compiler prints, or NotBuilt with its first error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        said = lines[0].strip() if lines else f"exit status {done.returncode}"
        raise NotBuilt(f"{command[0]} failed: {said}", done.stderr)
    return done.stdout


def instruction_sets(compiler: Sequence[str]) -> dict[str, list[str]]:
    """Names and flags of the instruction sets that kernels.cpp is compiled for."""
    target = run([*compiler, "-dumpmachine"]).strip().replace("arm64", "aarch64").partition("-")[0]
    return INSTRUCTION_SETS.get(target, {"plain": []})


def make(target: Path, command: Sequence[str]) -> Path:
    """Runs a command that writes `target`, which appears whole or not at all."""
    part = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        run([*command, "-o", str(part)])
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """One build at a time in a folder."""
    import fcntl

    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link_flags(sanitizer: str | None, work: Path) -> list[str]:
    """A library that asks for nothing but the C library, and offers nothing but the C interface."""
    if sys.platform == "darwin":
        return ["-shared", f"-mmacosx-version-min={MACOS}", "-Wl,-exported_symbol,_pastalm_*"]
    exports = work / "exports.map"
    exports.write_text("{ global: pastalm_*; local: *; };\n", encoding="utf-8")
    own = [] if sanitizer else ["-static-libgcc", "-static-libstdc++", "-Wl,-s"]
    return ["-shared", "-pthread", f"-Wl,--version-script={exports}", *own]


def jobs(source: Path, compiler: Sequence[str], flags: Sequence[str], work: Path) -> list[tuple[Path, list[str]]]:
    """Each object's file, and the command that makes it but for the output; what any processor runs comes first.

    A linker keeps the first copy of a function that several objects have inline, and that must not be one
    with instructions that another processor lacks.
    """
    files = sorted(source.glob("*.cpp"), key=lambda file: (file.stem == "kernels", file.stem))
    shared = b"".join(path.read_bytes() for path in sorted(source.iterdir()) if path.suffix in (".h", ".hpp", ".inc"))
    found = []
    for file in files:
        variants = instruction_sets(compiler) if file.stem == "kernels" else {"": []}
        for name, own in variants.items():
            define = [f"-DPASTALM_ISA={name}"] if name else []
            command = [*compiler, *flags, *own, *define, "-c", str(file)]
            made_of = "\0".join(command).encode() + shared + file.read_bytes()
            digest = hashlib.sha256(made_of).hexdigest()[:16]
            found.append((work / f"{file.stem}{name and '-'}{name}-{digest}.o", command))
    return found


def objects(compiler: Sequence[str], flags: Sequence[str], source: Path, work: Path) -> list[Path]:
    """Compiles what is not there yet, all at once, and throws away what is of no use any more."""
    wanted = jobs(source, compiler, flags, work)
    if not wanted:
        raise NotBuilt(f"no C++ sources in {source}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda job: job[0] if job[0].exists() else make(*job), wanted))
    for old in set(work.glob("*.o")) - set(made):
        old.unlink()
    return made


def link(command: Sequence[str], work: Path) -> Path:
    """The library that a command links, made again only for other objects."""
    linked = work / f"lib-{hashlib.sha256(chr(0).join(command).encode()).hexdigest()[:16]}.so"
    if not linked.exists():
        try:
            make(linked, command)
        except NotBuilt:  # there may be no static libstdc++
            make(linked, [part for part in command if not part.startswith("-static-")])
    for old in set(work.glob("lib-*.so")) - {linked}:
        old.unlink()
    return linked


def build(target: Path, sanitizer: str | None = None, source: Path = PACKAGE / "src", work: Path = WORK) -> Path:
    """Makes the library at `target`. Raises NotBuilt."""
    compiler = find_compiler()
    checks = SANITIZERS[sanitizer] if sanitizer else []
    flags = [*COMPILE, *(TRACEABLE if sanitizer else []), *checks]
    if sys.platform == "darwin":
        flags.append(f"-mmacosx-version-min={MACOS}")
    work = work / (sanitizer or "plain")
    with alone(work):
        made = objects(compiler, flags, source, work)
        linked = link([*compiler, *map(str, made), *link_flags(sanitizer, work), *checks], work)
        if not target.exists() or target.read_bytes() != linked.read_bytes():
            part = target.with_name(f".{os.getpid()}-{target.name}")
            shutil.copy(linked, part)
            part.replace(target)  # a process that has the old one mapped keeps it
    return target


def platform_tag(library: Path) -> str:
    """The platform that a wheel with this library is for, as PEP 600 and auditwheel name it."""
    from packaging import tags

    machine = platform.machine()
    if sys.platform == "darwin":
        return f"macosx_{MACOS.replace('.', '_')}_{machine}"
    asks = library.read_bytes()
    glibc = [(int(major), int(minor)) for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", asks)]
    if b"libstdc++.so" in asks or not glibc:
        return next(iter(tags.platform_tags())) if not glibc else f"linux_{machine}"
    major, minor = max(max(glibc), (2, 17))
    return f"manylinux_{major}_{minor}_{machine}"


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc, valid-type, unused-ignore]
    """Compiles before a wheel is put together, or an editable install's."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the library, or the line that says why there is none."""
        package = PACKAGE.relative_to(ROOT).as_posix()
        try:
            build(LIBRARY)
            REASON.unlink(missing_ok=True)
        except (NotBuilt, OSError) as error:
            LIBRARY.unlink(missing_ok=True)
            REASON.write_text(f"{error}\n", encoding="utf-8")
            self.app.display_warning(f"pastalm: {error}; goes on without the native CPU engine")
            build_data["force_include"][str(REASON)] = f"{package}/{REASON.name}"
            return
        if version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag(LIBRARY)}"
            build_data["force_include"][str(LIBRARY)] = f"{package}/{LIBRARY.name}"


def main() -> int:
    """0; 1 where the sources do not compile; 2 where nothing compiles."""
    parser = argparse.ArgumentParser(description="Compile the native CPU engine.")
    parser.add_argument("--sanitize", choices=sorted(SANITIZERS))
    sanitizer = parser.parse_args().sanitize
    names = {"address": "libpastalm-asan.so", "thread": "libpastalm-tsan.so"}
    target = WORK / names[sanitizer] if sanitizer else LIBRARY
    try:
        print(build(target, sanitizer))
    except NotBuilt as error:
        print(error.output, f"pastalm: {error}", sep="\n" if error.output else "", file=sys.stderr)
        return 2 if isinstance(error, NoCompiler) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
