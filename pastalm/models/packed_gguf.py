"""Reads a GGUF file for the native engine: architecture, weights and tokenizer, without llama.cpp.

Weights of types that the engine has are used unchanged. Others become Q8_0, or F32 if one matrix mixes float types.
Metadata are interpreted as in llama.cpp. Raises ModelError if the file is not GGUF, CapabilityError if it has a feature
that is unknown here; llama.cpp can then run it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pastalm.engines.native import weights
from pastalm.engines.native.weights import Architecture, Bytes, Floats, Rope, Rows, WeightType
from pastalm.errors import CapabilityError, ModelError, complaint
from pastalm.models import gguf_tokenizers
from pastalm.models.gguf_files import MARKER_KEY
from pastalm.models.packed_models import Packable, Tensor

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3")
_GEMMA = ("gemma2", "gemma3")
_INTERLEAVED = ("llama", "smollm3")
"""Architectures that rotate neighbouring dimensions: their rows of queries and keys are ordered differently."""
_FULL_LAYER = {"gemma2": 2, "gemma3": 6}
"""Every n-th layer sees all positions, the others a window."""
_UNSCALED = {"gemma2": 46, "gemma3": 62}
"""Number of layers of the one model size whose queries are scaled by hidden size / heads, not by the head size."""


def read(path: Path) -> Packable:
    """Reads a GGUF file's metadata. Its weights are read when they are packed."""
    import gguf

    try:
        file = _File(gguf.GGUFReader(path))
    except Exception as error:
        raise ModelError(f"cannot read {path} as a GGUF file: {str(error).splitlines()[0]}") from None
    shape = _architecture(file)
    tokenizer, eos = gguf_tokenizers.from_metadata(file.fields)
    _check_tensors(file, shape)
    return Packable(
        architecture=shape,
        tensors=lambda: _tensors(file, shape),
        tokenizer=tokenizer,
        eos=eos,
        sequential_marker=file.fields.get(MARKER_KEY),
        context_length=file["context_length"],
    )


def _refuse(reason: str) -> CapabilityError:
    return CapabilityError(f"the native engine cannot run this GGUF file: {reason}")


class _File:
    """A file's metadata by key, and tensors by name. file["context_length"] reads a key of the architecture."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.tensors: dict[str, Any] = {t.name: t for t in reader.tensors}

    @cached_property
    def fields(self) -> dict[str, Any]:
        return {name: field.contents() for name, field in self._reader.fields.items()}

    @property
    def kind(self) -> Any:
        return self.fields.get("general.architecture")

    @cached_property
    def own(self) -> dict[str, Any]:
        """Metadata of the architecture, by key without its name."""
        prefix = f"{self.kind}."
        return {k.removeprefix(prefix): v for k, v in self.fields.items() if k.startswith(prefix)}

    def __getitem__(self, key: str) -> Any:
        if key not in self.own:
            raise _refuse(f"it has no {key}")
        return self.own[key]


# ------------------------------------------------------------------------------ architecture

_NEEDED = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
}
_READ = _NEEDED | {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
_READ_OF_GEMMA = {
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base_swa",
}
_WITHOUT_EFFECT = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
_ONLY_VALUE = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
"""Keys that must have this value, if they are present."""


def _architecture(file: _File) -> Architecture:
    if problem := complaint(_checks(file)):
        raise _refuse(problem)
    gemma = file.kind in _GEMMA
    heads, hidden, layers = (file[key] for key in ("attention.head_count", "embedding_length", "block_count"))
    head_dim = file.own.get("attention.key_length", hidden // heads)
    scaled = hidden // heads if _UNSCALED.get(file.kind) == layers else head_dim
    windows = _windows(file, layers)
    return Architecture(
        layers=layers,
        hidden=hidden,
        intermediate=file["feed_forward_length"],
        heads=heads,
        kv_heads=file.own.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocabulary=_shape(file.tensors["token_embd.weight"])[0],
        activation="gelu_tanh" if gemma else "silu",
        epsilon=file["attention.layer_norm_rms_epsilon"],
        attention_scale=float(scaled**-0.5),
        ropes=_ropes(file, head_dim),
        layer_ropes=_layer_ropes(file, windows),
        windows=windows,
        embedding_scale=float(np.float32(hidden**0.5)) if gemma else 1.0,
        attention_softcap=file["attn_logit_softcapping"] if file.kind == "gemma2" else 0.0,
        logit_softcap=file["final_logit_softcapping"] if file.kind == "gemma2" else 0.0,
        max_positions=file["context_length"],
    )


def _checks(file: _File) -> Iterator[tuple[bool, str]]:
    own = file.own
    yield (
        file.kind in _ARCHITECTURES,
        f"it is a {file.kind!r}, not one of {', '.join(_ARCHITECTURES)}",
    )
    yield file.fields.get("split.count", 1) <= 1, "it is one part of several"
    for key in sorted(_NEEDED - set(own)):
        yield False, f"it has no {key}"
    for key, value in own.items():
        read_keys = _READ | _WITHOUT_EFFECT | (_READ_OF_GEMMA if file.kind in _GEMMA else set())
        expected = key in _ONLY_VALUE and value == _ONLY_VALUE[key]
        yield key in read_keys or expected, f"it has a {key} of {value!r}"
        scalar = not isinstance(value, list) or key == "attention.sliding_window_pattern"
        yield scalar, f"its {key} differs from layer to layer"
    capped = file.kind == "gemma3" and (own.keys() & {"attn_logit_softcapping", "final_logit_softcapping"})
    yield not capped, "its logits are capped"
    yield "token_embd.weight" in file.tensors, "it has no token_embd.weight"
    wide = own["feed_forward_length"]
    yield wide % weights.GROUP == 0, f"its MLP is {wide} wide"
    head_dim = own.get("attention.key_length", own["embedding_length"] // own["attention.head_count"])
    for key in ("attention.value_length", "rope.dimension_count"):
        yield own.get(key, head_dim) == head_dim, f"its {key} is not the size of a head"


def _windows(file: _File, layers: int) -> tuple[int, ...]:
    if file.kind not in _GEMMA:
        return (0,) * layers
    every = file.own.get("attention.sliding_window_pattern", _FULL_LAYER[file.kind])
    sliding = every if isinstance(every, list) else [bool((i + 1) % every) for i in range(layers)]
    return tuple(file["attention.sliding_window"] if slides else 0 for slides in sliding)


def _layer_ropes(file: _File, windows: Sequence[int]) -> tuple[int, ...]:
    if file.kind == "smollm3":
        return tuple(0 if (i + 1) % 4 else -1 for i in range(len(windows)))
    return tuple(1 if file.kind == "gemma3" and window else 0 for window in windows)


def _ropes(file: _File, head_dim: int) -> tuple[Rope, ...]:
    """The rotary tables: of all layers, or (Gemma 3) of layers that see all positions, and of those with a window."""
    base = float(file.own.get("rope.freq_base", 10_000.0))
    inverse, factor = _scaled(file, base, head_dim)
    if (divisors := file.tensors.get("rope_freqs.weight")) is not None:
        inverse = inverse / _vector(divisors)
    ropes = [Rope(_rounded(inverse), factor)]
    if file.kind == "gemma3":
        base = float(file.own.get("rope.freq_base_swa", 10_000.0))
        ropes.append(Rope(_rounded(_frequencies(base, head_dim))))
    return tuple(ropes)


def _rounded(inverse: Any) -> tuple[float, ...]:
    return tuple(np.asarray(inverse, np.float32).tolist())


def _frequencies(base: float, head_dim: int) -> Any:
    return base ** (-np.arange(0, head_dim, 2) / head_dim)


def _scaled(file: _File, base: float, head_dim: int) -> tuple[Any, float]:
    """Inverse frequencies scaled for longer contexts, and the factor of cosine and sine (YaRN,
    https://arxiv.org/abs/2309.00071, section 3.3)."""
    plain, kind = _frequencies(base, head_dim), file.own.get("rope.scaling.type", "none")
    if kind == "none":
        return plain, 1.0
    stretch = float(file["rope.scaling.factor"])
    if kind == "linear":
        return plain / stretch, 1.0
    if kind != "yarn":
        raise _refuse(f"its rotary positions are scaled by {kind!r}")
    length = file.own.get("rope.scaling.original_context_length", file["context_length"])

    def turning(times: float) -> float:
        """The dimension that makes so many turns within the length that the model was trained for."""
        return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(turning(32)), 0), min(math.ceil(turning(1)), head_dim - 1)
    slow = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain / stretch * slow + plain * (1 - slow), 0.1 * math.log(stretch) + 1 if stretch > 1 else 1.0


# ------------------------------------------------------------------------------ weights

_LAYER = {
    "qkv": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "attention_out": ("attn_output.weight",),
    "gate_up": ("ffn_gate.weight", "ffn_up.weight"),
    "down": ("ffn_down.weight",),
    "input_norm": ("attn_norm.weight",),
    "mlp_norm": ("ffn_norm.weight",),
    "qkv_bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "attention_out_bias": ("attn_output.bias",),
    "q_norm": ("attn_q_norm.weight",),
    "k_norm": ("attn_k_norm.weight",),
    "attention_post_norm": ("post_attention_norm.weight",),
    "mlp_post_norm": ("post_ffw_norm.weight",),
}


_ALWAYS = ("qkv", "attention_out", "gate_up", "down", "input_norm", "mlp_norm")
_FLOATS = ("F32", "F16", "BF16")


def _sources(file: _File, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """The file's tensors that each packed tensor is made from."""
    sources: dict[str, tuple[str, ...]] = {"embedding": ("token_embd.weight",)}
    for i in range(architecture.layers):
        for name, parts in _LAYER.items():
            if name in _ALWAYS or f"blk.{i}.{parts[0]}" in file.tensors:
                sources[f"{i}.{name}"] = tuple(f"blk.{i}.{part}" for part in parts)
    sources["norm"] = ("output_norm.weight",)
    return sources | ({"head": ("output.weight",)} if "output.weight" in file.tensors else {})


def _check_tensors(file: _File, architecture: Architecture) -> None:
    """Raises CapabilityError for a tensor that is missing, unknown, or of another shape than the architecture's."""
    sources = _sources(file, architecture)
    used = {name for names in sources.values() for name in names}
    if missing := sorted(used - set(file.tensors)):
        raise _refuse(f"it has no {missing[0]}")
    if unknown := sorted(set(file.tensors) - used - {"rope_freqs.weight"}):
        raise _refuse(f"it has a tensor {unknown[0]}")
    heads, wide = architecture.heads * architecture.head_dim, architecture.intermediate
    both = heads + 2 * architecture.kv_heads * architecture.head_dim
    shapes = {
        "embedding": (architecture.vocabulary, architecture.hidden),
        "head": (architecture.vocabulary, architecture.hidden),
        "qkv": (both, architecture.hidden),
        "attention_out": (architecture.hidden, heads),
        "gate_up": (2 * wide, architecture.hidden),
        "down": (architecture.hidden, wide),
        "qkv_bias": (both,),
        "q_norm": (architecture.head_dim,),
        "k_norm": (architecture.head_dim,),
    }
    for name, names in sources.items():
        parts = [_shape(file.tensors[n]) for n in names]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        if shape != shapes.get(name.split(".")[-1], (architecture.hidden,)):
            raise _refuse(f"its {names[0]} has the shape {list(parts[0])}")


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape.tolist()))


def _tensors(file: _File, architecture: Architecture) -> Iterator[Tensor]:
    """Yields the packed tensors."""
    for name, names in _sources(file, architecture).items():
        parts = [file.tensors[n] for n in names]
        orders = [_order(file, architecture, n) for n in names]
        if len(_shape(parts[0])) == 1:
            vectors = [_vector(part)[order] for part, order in zip(parts, orders, strict=True)]
            yield name, np.concatenate(vectors)
            continue
        type = _type(parts)
        blocks = type in ("Q4_0", "Q8_0") and all(part.tensor_type.name == type for part in parts)
        rows = [_rows(part, order, blocks) for part, order in zip(parts, orders, strict=True)]
        whole = weights.interleaved(*rows) if name.endswith("gate_up") else weights.joined(rows)
        yield name, weights.pack_rows(whole, type, blocks=blocks)


def _type(parts: Sequence[Any]) -> WeightType:
    """The packed type of a matrix that is made from some tensors."""
    kinds = {part.tensor_type.name for part in parts}
    if len(kinds) == 1:
        return next((weight_type for weight_type in weights.TYPES if weight_type in kinds), "Q8_0")
    return "F32" if kinds <= set(_FLOATS) else "Q8_0"


def _order(file: _File, architecture: Architecture, name: str) -> Any:
    """The order of a tensor's rows in which halves of a head rotate together, not neighbours."""
    part = name.split(".")[-2]
    if file.kind not in _INTERLEAVED or part not in ("attn_q", "attn_k"):
        return slice(None)
    heads = architecture.heads if part == "attn_q" else architecture.kv_heads
    return np.arange(heads * architecture.head_dim).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def _rows(tensor: Any, order: Any, blocks: bool) -> Rows:
    outputs, inputs = _shape(tensor)
    raw = tensor.data.view(np.uint8).reshape(outputs, -1)

    def read(first: int, last: int) -> Bytes | Floats:
        part = raw[first:last] if isinstance(order, slice) else raw[order[first:last]]
        return part if blocks else _floats(part, tensor)

    return Rows(outputs, inputs, read)


def _floats(raw: Bytes, tensor: Any) -> Floats:
    import gguf

    try:
        values: Floats = gguf.quants.dequantize(np.ascontiguousarray(raw), tensor.tensor_type)
    except NotImplementedError:
        raise _refuse(f"{tensor.name} is of type {tensor.tensor_type.name}") from None
    return values.astype(np.float32, copy=False)


def _vector(tensor: Any) -> Floats:
    return _floats(tensor.data.view(np.uint8).reshape(-1), tensor)
