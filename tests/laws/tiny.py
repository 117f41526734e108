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
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.records.xml import Scanner

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


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **parameters}}


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_MORE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": WINDOW}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {}),
    "llama, untied, biases": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False, "attention_bias": True}),
    "llama, linear": (LlamaConfig, LlamaForCausalLM, _rope("linear")),
    "llama, llama3": (LlamaConfig, LlamaForCausalLM, _rope("llama3", **_LLAMA3)),
    "llama, yarn": (LlamaConfig, LlamaForCausalLM, _rope("yarn", original_max_position_embeddings=64)),
}
MORE_ARCHITECTURES = tuple(_MORE)
"""What else the native engine claims."""


def tiny_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 4) -> PreTrainedModel:
    """A random model of SIZE ids, the same for the same arguments; attention is exact (sdpa or eager)."""
    config, model, extra = (_KINDS | _MORE)[name]
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
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=EOS,
            **({"max_position_embeddings": 4096} | extra),
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
        scanner=Scanner,
        tags=TAGS if tags else None,
    )
