"""The dtypes of weights: what each name stands for, and which is fastest on a device."""

from __future__ import annotations

from typing import Any

from pastalm.errors import ModelError


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
    """The fastest dtype for large matrix products (scoring): bfloat16 on GPUs and on CPUs with AMX, else
    float32. AVX-512's bfloat16 halves memory traffic, which helps decoding steps of few rows; with 256 rows it was half
    as fast as float32."""
    import torch

    return "bfloat16" if device != "cpu" or torch.cpu._is_amx_tile_supported() else "float32"


def training_dtype(device: str) -> str:
    """The dtype of products in training: bfloat16 on GPUs. Not on CPUs: with AMX a step took as long as in float32,
    most of it casts."""
    return "float32" if device == "cpu" else "bfloat16"
