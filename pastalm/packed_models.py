"""Models for the native engine: an architecture in numbers and packed matrices.

They come from transformers' models (`from_model`), which takes torch. What the engine would compute otherwise than
transformers does is refused with a CapabilityError of one line; then the transformers engine is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pastalm.engines.native import weights
from pastalm.engines.native.weights import Architecture, Floats, Matrix, Rope, WeightType
from pastalm.errors import CapabilityError, complaint

Tensor = tuple[str, "Matrix | Floats"]

# ------------------------------------------------------------------------------ what a model is

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GEMMA = ("gemma2", "gemma3_text")
_ROPES = ("default", "linear", "llama3", "yarn")


def architecture(config: Any) -> Architecture:
    """What transformers' configuration says, in numbers. Raises CapabilityError for what the engine cannot do."""
    if said := complaint(_checks(config)):
        raise CapabilityError(f"the native engine cannot run this model: {said}")
    gemma = config.model_type in _GEMMA
    ropes, layer_ropes = _ropes(config)
    scale = getattr(config, "query_pre_attn_scalar", None) if gemma else None
    return Architecture(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocabulary=config.vocab_size,
        activation="gelu_tanh" if gemma else "silu",
        epsilon=config.rms_norm_eps,
        attention_scale=float((scale or _head_dim(config)) ** -0.5),
        ropes=ropes,
        layer_ropes=layer_ropes,
        windows=_windows(config),
        embedding_scale=float(np.float32(config.hidden_size**0.5)) if gemma else 1.0,
        attention_softcap=_softcap(config, "attn_logit_softcapping"),
        logit_softcap=_softcap(config, "final_logit_softcapping"),
        max_positions=config.max_position_embeddings,
    )


def _checks(config: Any) -> Iterator[tuple[bool, str]]:
    """What must hold, and what to say if it does not."""
    kind = getattr(config, "model_type", None)
    yield kind in _CLASSES, f"it is of type {kind!r}, not one of {', '.join(_CLASSES)}"
    yield getattr(config, "quantization_config", None) is None, "its weights are quantised already"
    yield not getattr(config, "mlp_bias", False), "its MLP has biases"
    yield not getattr(config, "use_bidirectional_attention", False), "its attention looks ahead"
    wanted = "gelu_pytorch_tanh" if kind in _GEMMA else "silu"
    used = config.hidden_activation if kind in _GEMMA else config.hidden_act
    yield used == wanted, f"its activation is {used!r}, not {wanted!r}"
    yield (
        config.intermediate_size % weights.GROUP == 0,
        f"its MLP is {config.intermediate_size} wide",
    )
    yield (
        config.num_attention_heads % config.num_key_value_heads == 0,
        "its heads share keys unevenly",
    )
    yield _head_dim(config) % 2 == 0, f"its heads are {_head_dim(config)} wide"
    # transformers hands no softcap to Gemma 3's attention, whatever the configuration says
    capped = kind == "gemma3_text" and getattr(config, "attn_logit_softcapping", None)
    yield not capped, "its attention is capped"
    for rope in _rope_parameters(config).values():
        name = rope.get("rope_type", "default")
        yield name in _ROPES, f"its rotary positions are {name!r}, not one of {', '.join(_ROPES)}"
        yield rope.get("partial_rotary_factor", 1.0) == 1.0, "only a part of each head rotates"
    kinds = set(_layer_types(config))
    yield kinds <= {"full_attention", "sliding_attention"}, f"it has layers of {sorted(kinds)}"
    windowed = "sliding_attention" in kinds
    yield not windowed or bool(getattr(config, "sliding_window", None)), "its window has no size"


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _softcap(config: Any, name: str) -> float:
    return float(getattr(config, name, None) or 0.0) if config.model_type in _GEMMA else 0.0


def _layer_types(config: Any) -> list[str]:
    if config.model_type == "mistral":  # its layers are all of one type, whatever the list says
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        return [kind] * config.num_hidden_layers
    return list(
        getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    )


def _windows(config: Any) -> tuple[int, ...]:
    return tuple(
        config.sliding_window if t == "sliding_attention" else 0 for t in _layer_types(config)
    )


def _rope_parameters(config: Any) -> dict[str | None, Any]:
    """Rotary parameters of each type of layer; of None where all layers have the same."""
    parameters = config.rope_parameters
    if config.model_type != "gemma3_text":
        return {None: parameters}
    return {kind: parameters.get(kind) for kind in _layer_types(config)}


def _ropes(config: Any) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """The rotary tables, and which of them each layer uses."""
    kinds = list(_rope_parameters(config))
    ropes = tuple(_rope(config, kind) for kind in kinds)
    if kinds == [None]:
        used = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
        return ropes, tuple(0 if rotates else -1 for rotates in used[: config.num_hidden_layers])
    return ropes, tuple(kinds.index(t) for t in _layer_types(config))


def _rope(config: Any, kind: str | None) -> Rope:
    """As transformers computes it, in float32: a model that was cast to bfloat16 has rounded its own."""
    import transformers

    name = _CLASSES[config.model_type]
    module = sys.modules[getattr(transformers, name).__module__]
    table = getattr(module, name.replace("ForCausalLM", "RotaryEmbedding"))(config)
    prefix = "" if kind is None else f"{kind}_"
    inverse = getattr(table, f"{prefix}inv_freq")
    return Rope(tuple(inverse.tolist()), float(getattr(table, f"{prefix}attention_scaling")))


# ------------------------------------------------------------------------------ weights of a model


def from_model(
    model: Any, type: WeightType, *, head_type: WeightType | None = None
) -> tuple[Architecture, dict[str, Matrix | Floats]]:
    """A transformers model, packed; its vectors stay float32. head_type: the head's, and so the embedding's where
    they are one. Raises CapabilityError."""
    made = _architecture_of(model)
    return made, dict(_tensors(model, made, type, head_type or type))


def _architecture_of(model: Any) -> Architecture:
    import torch

    config = model.config
    made = architecture(config)
    name = model.__class__.__name__
    if name != _CLASSES[config.model_type]:
        raise CapabilityError(f"the native engine cannot run this model: {name} is not known to it")
    table = model.get_input_embeddings().weight
    if config.model_type in _GEMMA:
        scale = torch.tensor(config.hidden_size**0.5).to(table.dtype)  # the model rounds it so
        made = replace(made, embedding_scale=float(scale))
    return replace(made, vocabulary=table.shape[0])


def _tensors(
    model: Any, made: Architecture, type: WeightType, head_type: WeightType
) -> Iterator[Tensor]:
    """The packed tensors, one after the other."""
    state = model.state_dict()
    sources = _sources(state, made)
    tied = _tied(model)
    if unknown := sorted(set(state) - {name for names in sources.values() for name in names}):
        raise CapabilityError(
            f"the native engine cannot run this model: it does not know {unknown[0]}"
        )
    added = np.float32(1 if model.config.model_type in _GEMMA else 0)
    for name, of in sources.items():
        parts = [state[n].detach() for n in of]
        if name == "head" and tied:
            continue
        if parts[0].dim() == 1:
            vector = np.concatenate([_floats(p) for p in parts])
            yield name, vector + added if name.endswith("norm") else vector
        else:
            as_head = name == "head" or (name == "embedding" and tied)
            yield (
                name,
                _matrix(parts, head_type if as_head else type, by_turns=name.endswith("gate_up")),
            )


_LAYER = {
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention_out": ("self_attn.o_proj.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
    "input_norm": ("input_layernorm.weight",),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attention_out_bias": ("self_attn.o_proj.bias",),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
}
_POST_NORMS = {
    "attention_post_norm": ("post_attention_layernorm.weight",),
    "mlp_norm": ("pre_feedforward_layernorm.weight",),
    "mlp_post_norm": ("post_feedforward_layernorm.weight",),
}


def _sources(state: Mapping[str, Any], made: Architecture) -> dict[str, tuple[str, ...]]:
    """Which of a model's weights each packed tensor is made of."""
    found: dict[str, tuple[str, ...]] = {"embedding": ("model.embed_tokens.weight",)}
    for i in range(made.layers):
        at = f"model.layers.{i}."
        gemma = f"{at}pre_feedforward_layernorm.weight" in state
        norms = _POST_NORMS if gemma else {"mlp_norm": ("post_attention_layernorm.weight",)}
        for name, names in (_LAYER | norms).items():
            if at + names[0] in state:
                found[f"{i}.{name}"] = tuple(at + n for n in names)
    return found | {"norm": ("model.norm.weight",), "head": ("lm_head.weight",)}


def _tied(model: Any) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return bool(head.weight.data_ptr() == table.weight.data_ptr())


Rows = Callable[[int, int], NDArray[Any]]


def _matrix(parts: list[Any], type: WeightType, *, by_turns: bool) -> Matrix:
    """The rows of all parts, one part after the other or, gate and up, by turns."""
    import torch

    outputs, inputs = sum(len(part) for part in parts), parts[0].shape[1]
    if by_turns:
        gate, up = parts

        def both(first: int, last: int) -> Floats:
            pair = (_floats(part[first // 2 : last // 2]) for part in (gate, up))
            return weights.gate_up(*pair)

        return _filled(type, outputs, inputs, both)
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return _filled(type, outputs, inputs, lambda a, b: _floats(whole[a:b]))


def _filled(type: WeightType, outputs: int, inputs: int, rows: Rows) -> Matrix:
    matrix = weights.empty(type, outputs, inputs)
    for first, last in weights.slices(outputs, inputs):
        weights.fill(matrix, first, rows(first, last))
    return matrix


def _floats(tensor: Any) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array
