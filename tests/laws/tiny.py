"""Tiny random models of every architecture the laws run on, and a vocabulary of bytes for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pastalm.vocabulary import Tags, Vocabulary

EOS = 256
TAGS = Tags(257, 258, 259, 260, 261, 262)
SIZE = 300
WINDOW = 12

_SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}
_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-sliding": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 16, **_SLIDING}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 16, **_SLIDING}),
}
ARCHITECTURES = tuple(_KINDS)


def tiny_model(
    name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 4
) -> PreTrainedModel:
    """A random model of SIZE ids, the same for the same arguments; attention is exact (sdpa or eager)."""
    config, model, extra = _KINDS[name]
    torch.manual_seed(seed)
    made: PreTrainedModel = model(
        config(
            vocab_size=SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=EOS,
            **extra,
        )
    )
    return made.to(dtype).eval()


def tiny_vocabulary(*, tags: bool = True) -> Vocabulary:
    """Bytes are tokens 0..255, then EOS and the six tags; the other ids are no text."""
    return Vocabulary(
        size=SIZE,
        eos=frozenset({EOS}),
        encode=lambda text: list(text.encode()),
        piece=lambda token: bytes([token]) if token < 256 else b"",
        tags=TAGS if tags else None,
    )
