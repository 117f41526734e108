"""A tiny random model of every architecture that the transformers engine runs, and how exactly the engine runs it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pastalm.engines.transformers.engine import TransformersEngine
from tests.laws.double import AllDouble
from tests.laws.oracle import Linear
from tests.laws.script import play, random_scripts
from tests.laws.tiny import EOS, SIZE, WINDOW

_SMALL: dict[str, Any] = {
    "vocab_size": SIZE,
    "vocab_size_per_layer_input": SIZE,
    "max_position_embeddings": 4096,
    "n_positions": 4096,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "rotary_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "sliding_window": WINDOW,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
"""What makes a configuration small, wherever it has such a field."""
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "axk1", "longcat_flash", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT
    ),
    "longcat_flash": {**_LATENT, "zero_expert_num": 2, "moe_topk": 2},
    "falcon": {"multi_query": True},
    "mimo_v2_flash": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4,
    },
}  # fmt: skip
"""What else the configuration of a type needs."""


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


_SHORT, _LONG = [1.0, 1.5, 1.25, 2.0], [2.0, 7.0, 9.0, 16.0]


def longrope(short: list[float] = _SHORT, long: list[float] = _LONG) -> dict[str, Any]:
    """Rotary parameters that change at 512 positions."""
    first = {"original_max_position_embeddings": 512}
    return _rope("longrope", short_factor=short, long_factor=long, factor=8.0, **first) | first


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, one key head to each": ("falcon", {"multi_query": False}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, not parallel": ("falcon", {"parallel_attn": False, "bias": True}),
    "gpt_neox, not parallel": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True}),
    "phi, norms of queries": ("phi", {"qk_layernorm": True}),
    "phi3, longrope": ("phi3", longrope()),
    "phi3, a part rotates": ("phi3", _rope("default", partial_rotary_factor=0.5)),
    "llama, dynamic": ("llama", _rope("dynamic", factor=4.0)),
    "llama, yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "starcoder2, no window": ("starcoder2", {"sliding_window": None}),
}
"""Shapes of a type that its usual configuration does not have."""


def configuration(kind: str, **more: Any) -> Any:
    """A small configuration of a type of model."""
    made = CONFIG_MAPPING[kind]
    known = {f.name for f in fields(made)} | set(getattr(made, "attribute_map", ()))
    small = {name: value for name, value in _SMALL.items() if name in known}
    return made(**(small | _OWN.get(kind, {}) | more))


_LARGE = frozenset(
    [
        "bart", "bigbird_pegasus", "blenderbot", "blt", "cpmant", "fuyu", "git", "got_ocr2", "marian", "mbart",
        "mllama", "mvp", "pegasus", "prophetnet", "roc_bert", "moss_transcribe_diarize", "phi4_multimodal", "gemma3",
        "gemma4", "gemma4_unified", "musicgen", "musicgen_melody",
    ]
)  # fmt: skip
"""Types of which these settings make no small model."""


def tries(kind: str) -> bool:
    """Whether `build` is worth a try."""
    return kind not in _LARGE


def build(kind: str, **more: Any) -> PreTrainedModel:
    """A random model in float64, the same for the same arguments."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    torch.manual_seed(0)
    model: Any = getattr(transformers, names)(configuration(kind, **more))
    for parameter in model.parameters():
        if not parameter.any():  # biases and sinks, which would be tested by nothing
            torch.nn.init.normal_(parameter, std=0.2)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products have no float64
    made: PreTrainedModel = model.double().eval()
    return made


def _masks(model: Any, linear: Linear) -> Any:
    """What each layer type sees, as transformers takes it."""
    config, positions = model.config, linear.positions
    near = positions[:, None] - positions[None] < (getattr(config, "sliding_window", None) or 2**31)
    full, sliding = (
        torch.zeros(seen.shape, dtype=torch.float64).masked_fill(torch.from_numpy(~seen), -torch.inf)[None, None]
        for seen in (linear.visible, linear.visible & near)
    )
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds:
        return {"full_attention": full, "sliding_attention": sliding}
    return full if kinds else sliding


def plain_logits(model: Any, linear: Linear) -> torch.Tensor:
    """Logits [n, vocabulary] of one forward pass of transformers' own, without a cache."""
    model.set_attn_implementation("eager")
    with torch.inference_mode(), AllDouble():
        out = model(
            input_ids=torch.from_numpy(linear.tokens)[None],
            position_ids=torch.from_numpy(linear.positions)[None],
            attention_mask=_masks(model, linear),
            use_cache=False,
        )
    logits: torch.Tensor = out.logits[0]
    return logits


def exactness(model: PreTrainedModel, *, responses: int = 2, length: int = 256) -> tuple[float, float]:
    """The largest difference between the engine's logits and plain transformers', over some random responses decoded
    together, and the spread of the logits."""
    engine = TransformersEngine(model, max_num_seqs=2, max_model_len=length)
    scripts = random_scripts(11, "promised", 1) + random_scripts(12, "overlap", responses - 1)
    for i, script in enumerate(scripts):
        script.id, script.tokens_left = str(i), 30
    with AllDouble():
        play(engine, scripts)
    worst, spread = 0.0, 0.0
    for script in scripts:
        linear = Linear(script.prompt, script.record, script.policy)
        want = plain_logits(model, linear)
        spread = max(spread, float(want.std()))
        for (path, index), logits in script.logits.items():
            worst = max(worst, float((logits - want[linear.place[path, index]]).abs().max()))
    return worst, spread
