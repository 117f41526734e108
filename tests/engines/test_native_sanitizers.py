"""The native engine over random plans under the compiler's checks, and on processors that this one is not.

`make sanitize` runs it, `make test` does not: it compiles everything in other ways, which takes minutes. No Python
runs under a sanitizer: tests/native/fuzz.cpp calls the C interface, with right arguments and wrong ones.
"""

from __future__ import annotations

import sys

import pytest

from tests.native.programs import agree, compiler, need, program, run

pytestmark = [pytest.mark.sanitizers, pytest.mark.timeout(3600)]

AARCH64 = "aarch64-linux-gnu-g++"


def test_no_byte_is_touched_that_is_not_ours() -> None:
    """AddressSanitizer (leaks too) and UndefinedBehaviorSanitizer; 10^5 plans by two callers."""
    assert "no surprise" in run([program("fuzz", "address"), "50000", "1", "2"])


def test_threads_do_not_race() -> None:
    """ThreadSanitizer; two callers with models of their own, whose steps run on up to four threads each."""
    assert "no surprise" in run([program("fuzz", "thread"), "5000", "2", "2"])


def test_where_memory_ends_calls_fail_and_nothing_else_does() -> None:
    if sys.platform != "linux":
        pytest.skip("limits are set as on Linux")
    assert "no surprise" in run([program("limits")])


def test_neon_computes_what_others_compute() -> None:
    """Compiled for aarch64 and emulated, with dot products and without."""
    need(AARCH64, "qemu-aarch64")
    compiler()
    here = run([program("logits"), "plain", "1"])
    logits = program("logits", "aarch64", [AARCH64], ["-static"])
    for kernels in ("plain", "neon"):
        agree(here, run(["qemu-aarch64", logits, kernels, "1"]))
    fuzz = program("fuzz", "aarch64", [AARCH64], ["-static"])
    assert "neon: " in run(["qemu-aarch64", fuzz, "1000", "3"])
    assert "neon: " not in run(["qemu-aarch64", "-cpu", "cortex-a53", fuzz, "100", "3"])


@pytest.mark.parametrize(("processor", "runs"), [("Nehalem", ["plain"]), ("Haswell", ["plain", "avx2"])])
def test_older_processors_run_what_they_have(processor: str, runs: list[str]) -> None:
    """What is compiled for a better processor is not called, or the emulator ends the program."""
    need("qemu-x86_64")
    said = run(["qemu-x86_64", "-cpu", processor, program("fuzz"), "200", "4"])
    assert [line.partition(":")[0] for line in said.splitlines()] == runs
