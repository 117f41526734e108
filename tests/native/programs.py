"""Programs that test the C interface from outside of Python, linked with the engine's own sources."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hatch_build = _build_script()
SOURCE: Path = hatch_build.PACKAGE / "src"


def compiler() -> list[str]:
    """The C++ compiler; the test is skipped where there is none."""
    try:
        found: list[str] = hatch_build.find_compiler()
    except hatch_build.NoCompiler as error:
        pytest.skip(str(error))
    return found


def need(*tools: str) -> None:
    """Skips the test where a command is missing."""
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"there is no {tool} here")


def program(name: str, kind: str = "plain", command: Sequence[str] = (), flags: Sequence[str] = ()) -> Path:
    """tests/native/NAME.cpp and the engine's sources as one program; compiled anew only where they changed.

    kind: plain, address or thread (a sanitizer), or another name for other compilers and flags.
    """
    command = command or compiler()
    if kind in hatch_build.SANITIZERS:
        flags = [*flags, *hatch_build.TRACEABLE, *hatch_build.SANITIZERS[kind]]
    work: Path = hatch_build.WORK / kind
    flags = [*hatch_build.COMPILE, *flags]
    own = [*command, *flags, "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(SOURCE), str(HERE / f"{name}.cpp")]
    with hatch_build.alone(work):
        objects: list[Path] = hatch_build.objects(command, flags, SOURCE, work)
        made, parts = work / name, [*HERE.glob("*.cpp"), *HERE.glob("*.h"), *objects]
        if not made.exists() or made.stat().st_mtime < max(part.stat().st_mtime for part in parts):
            hatch_build.make(made, [*own, *map(str, objects)])
    return made


def run(command: Sequence[str | Path], **environment: str) -> str:
    """What a program says; its failure is the test's, with its last lines."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment or None)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def kernels() -> list[str]:
    """The names of the kernels that fuzz found on this processor."""
    said = run([program("fuzz"), "0", "0"])
    return [line.partition(":")[0] for line in said.splitlines()]


def agree(some: str, others: str, typically: float = 1e-4) -> None:
    """What two runs of logits.cpp say is the same, by the largest difference as a share of the largest logit.

    Rounding may flip where an activation is quantised, or a key or a value becomes bfloat16; nothing else may differ.
    typically: half of those steps differ by less (kernels that compute in bfloat16 by more than others).
    """
    off: dict[bool, list[float]] = {True: [], False: []}
    for some_line, other_line in zip(some.splitlines(), others.splitlines(), strict=True):
        (kind, pool, *x), (same_kind, same_pool, *y) = some_line.split(), other_line.split()
        assert (kind, pool, len(x)) == (same_kind, same_pool, len(y))
        if x:
            a, b = np.array(x, float), np.array(y, float)
            off[kind == pool == "3"].append(np.abs(a - b).max() / np.abs(a).max())
    assert max(off[True]) < 1e-4
    assert max(off[False]) < 0.1 and np.median(off[False]) < typically
