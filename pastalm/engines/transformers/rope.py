"""Rotary frequencies that must not change with the length of a forward pass, because keys in the pool keep theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True, slots=True)
class Rope:
    """Fixed rotary frequencies of a module. transformers would choose them by the length of each forward pass.

    module: the rotary embedding.
    kind: its layer type, if it has frequencies for several.
    buffer: where the module keeps them.
    frequencies: [head_dim / 2].
    limit: number of positions for which they are valid.
    """

    module: torch.nn.Module
    kind: str | None
    buffer: str
    frequencies: Tensor
    limit: int


def ropes_of(model: torch.nn.Module, length: int) -> list[Rope]:
    """Fixed frequencies of a model's `dynamic` and `longrope` modules, for texts of up to `length` positions.

    `dynamic` modules get their plain frequencies, which are valid up to max_position_embeddings, the engine's limit.
    `longrope` modules get the short factors up to original_max_position_embeddings, else the long ones for every
    position, as vLLM does.
    """
    ropes = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for kind, name in types.items() if isinstance(types, dict) else [(None, types)]:
            if name is not None and ("dynamic" in name or name == "longrope"):
                ropes.append(_fixed_rope(module, kind, name, length))
    return ropes


def _fixed_rope(module: Any, kind: str | None, name: str, length: int) -> Rope:
    prefix = "" if kind is None else f"{kind}_"
    short = getattr(module, f"{prefix}original_inv_freq")
    parameters = module.config.rope_parameters if kind is None else module.config.rope_parameters[kind]
    if name != "longrope":
        return Rope(module, kind, f"{prefix}inv_freq", short, module.original_max_seq_len)
    limit = int(parameters["original_max_position_embeddings"])
    if length <= limit:
        return Rope(module, kind, f"{prefix}inv_freq", short, limit)
    long, _ = ROPE_INIT_FUNCTIONS[name](module.config, short.device, seq_len=limit + 1, layer_type=kind)
    return Rope(module, kind, f"{prefix}inv_freq", long.to(short.device), 2**31)


@contextmanager
def fixed(ropes: Sequence[Rope]) -> Iterator[None]:
    """Inside, the model rotates with these frequencies, whatever the positions of a forward pass are."""
    before = [(rope.module.rope_type, rope.module._buffers[rope.buffer]) for rope in ropes]
    for rope in ropes:
        types: Any = rope.module.rope_type
        # a type that transformers does not update
        rope.module.rope_type = "fixed" if rope.kind is None else {**types, rope.kind: "fixed"}  # type: ignore[assignment]
        rope.module._buffers[rope.buffer] = rope.frequencies
    try:
        yield
    finally:
        for rope, (types, frequencies) in zip(ropes[::-1], before[::-1], strict=True):
            rope.module.rope_type, rope.module._buffers[rope.buffer] = types, frequencies
