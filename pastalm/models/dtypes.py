"""The dtypes of weights: what each name stands for, and which is fastest on a device."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from pastalm.errors import ModelError

CLEARLY = 1.25
"""How many times as fast bfloat16 must be to be worth its rounding."""


def named(name: str, device: str) -> Any:
    """The torch dtype of a name; "auto": bfloat16 if the device supports it. Raises ModelError for an unknown name."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device != "cpu" or cpu_has_bfloat16() else torch.float32
    if name not in ("bfloat16", "float16", "float32", "float64"):
        raise ModelError(f"unknown dtype {name!r}: auto, bfloat16, float16, float32 or float64")
    return getattr(torch, name)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    import torch

    capabilities = torch.backends.cpu.get_cpu_capability()
    if "AVX512" not in capabilities and "SVE" not in capabilities:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def throughput_dtype(device: str) -> str:
    """The fastest dtype for large matrix products (training, scoring): bfloat16 on GPUs, on CPUs what a product of each
    takes. Two processors with the same instructions differ: on one bfloat16 was half as fast, on another twice."""
    return "bfloat16" if device != "cpu" else _fastest_on_cpu()


@cache
def _fastest_on_cpu() -> str:
    if not cpu_has_bfloat16():
        return "float32"
    seconds = {name: min(_product_seconds(name) for _ in range(5)) for name in ("bfloat16", "float32")}
    return "bfloat16" if seconds["bfloat16"] * CLEARLY < seconds["float32"] else "float32"


def _product_seconds(name: str) -> float:
    """What a product of 1,024 rows takes, some ten milliseconds."""
    import torch

    rows, matrix = (torch.ones(shape, dtype=getattr(torch, name)) for shape in ((1024, 512), (512, 1024)))
    begun = time.perf_counter()
    torch.matmul(rows, matrix)
    return time.perf_counter() - begun
