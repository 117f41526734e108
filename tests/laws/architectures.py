"""A tiny random model of every architecture that the transformers engine runs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pastalm.engines.transformers import TransformersEngine
from tests.laws.double import AllDouble
from tests.laws.oracle import Linear
from tests.laws.script import play, random_scripts
from tests.laws.tiny import EOS, SIZE, WINDOW

_SMALL: dict[str, Any] = {
    **{"vocab_size": SIZE, "vocab_size_per_layer_input": SIZE, "max_position_embeddings": 4096, "n_positions": 4096},
    **{"hidden_size": 32, "n_embd": 32, "d_model": 32, "head_dim": 8, "query_pre_attn_scalar": 8},
    **{"intermediate_size": 48, "ffn_hidden_size": 48, "n_inner": 48, "moe_intermediate_size": 16},
    **{"shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16, "hidden_size_per_layer_input": 8},
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2},
    **{"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "rotary_dim": 4},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"num_shared_experts": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"sliding_window": WINDOW, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS},
}
"""What makes a configuration small, wherever it has such a field."""
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "axk1", "longcat_flash", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT),
}
"""What else the configuration of a type needs."""


def configuration(kind: str, **more: Any) -> Any:
    """A small configuration of a type of model."""
    made = CONFIG_MAPPING[kind]
    known = {f.name for f in fields(made)} | set(getattr(made, "attribute_map", ()))
    small = {name: value for name, value in _SMALL.items() if name in known}
    return made(**(small | _OWN.get(kind, {}) | more))


def build(kind: str, **more: Any) -> PreTrainedModel:
    """A random model in float64, the same for the same arguments."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    torch.manual_seed(0)
    model: Any = getattr(transformers, names)(configuration(kind, **more))
    for parameter in model.parameters():
        if not parameter.any():  # biases and sinks, which would be tested by nothing
            torch.nn.init.normal_(parameter, std=0.2)
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
        script.id = str(i)
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
