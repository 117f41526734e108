"""Which models the transformers engine can run, and what it must know of one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from pastalm.errors import CapabilityError, complaint

MODEL_TYPES = frozenset(
    [
        "afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "bitnet", "codegen", "cohere", "cohere2",
        "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe",
        "exaone4", "exaone_moe", "falcon", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text",
        "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_neox",
        "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
        "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
        "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "lfm2", "llama", "longcat_flash", "mellum",
        "mimo_v2_flash", "minicpm3", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral",
        "mixtral", "modernbert-decoder", "moshi", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe",
        "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
        "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
    ]
)  # fmt: skip
"""Model types that a test compares with plain transformers, on a small model of each (docs/models.md)."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the engine must know of a model.

    groups: query heads per key head.
    vocabulary: rows of logits.
    max_positions: that it was trained for; None: unknown.
    windows: sliding window (or None) of each layer type.
    by_type: whether the model takes a mask for each layer type.
    """

    layers: int
    groups: int
    vocabulary: int
    max_positions: int | None
    windows: dict[str, int | None]
    by_type: bool


def refusal(model: PreTrainedModel, reason: object) -> CapabilityError:
    return CapabilityError(f"the transformers engine cannot run {type(model).__name__}: {reason}")


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Raises CapabilityError for a model that this engine cannot run."""
    config: Any = model.config.get_text_config(decoder=True)
    if reason := complaint(_checks(model, config)):
        raise refusal(model, reason)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    by_type = "sliding_attention" in kinds
    windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        groups=heads // (getattr(config, "num_key_value_heads", None) or heads),
        vocabulary=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        windows=windows if by_type else {"all": None if kinds else window},
        by_type=by_type,
    )


def _checks(model: PreTrainedModel, config: Any) -> Iterator[tuple[bool, str]]:
    """Conditions, each with the message for a model that does not meet it."""
    yield not model.config.is_encoder_decoder, "it is an encoder-decoder"
    yield model.can_generate(), "it is no causal language model"
    yield not getattr(model, "_is_stateful", False), "it keeps a state that is no KV cache"
    kinds = set(getattr(config, "layer_types", None) or ())
    yield kinds <= {"full_attention", "sliding_attention"}, f"it has layers of {sorted(kinds)}"
    biased = getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt")
    yield not biased, "its positions are not rotary but biases in the attention (ALiBi)"
    yield "position_ids" in inspect.signature(model.forward).parameters, "it takes no position ids"
    rotates = getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None)
    yield bool(rotates), "its positions are not rotary"


def is_tested(model: PreTrainedModel) -> bool:
    """Whether a test of this package runs models of its type."""
    return model.config.model_type in MODEL_TYPES and type(model).__module__.startswith("transformers.")


def attention_is_replaceable(model: PreTrainedModel) -> bool:
    """Whether the model looks its attention up by name."""
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
