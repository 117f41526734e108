"""Models for the native engine: an architecture in numbers, packed matrices, a tokenizer.

`load` packs a model with its adapter merged, and stores the result as one file in the cache. The next start maps that
file, and imports neither torch nor transformers. `load_gguf` does the same for a GGUF file, without llama.cpp. A model
that the engine would compute differently from transformers raises CapabilityError; the transformers engine or llama.cpp
can run it.

A packed file consists of a prologue of 64 bytes (`_PROLOGUE`), the tensors, each at a multiple of 64 bytes, the
tokenizer, and a header in JSON with their places. Its name ends with a hash of the contents that it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.native import weights
from pastalm.engines.native.weights import (
    Architecture,
    Bytes,
    Floats,
    Matrix,
    Rope,
    Rows,
    Tensors,
    WeightType,
)
from pastalm.errors import CapabilityError, ModelError, complaint
from pastalm.models import adapters, contents, downloads, loading, lossless
from pastalm.models.chat_tokenizer import ChatTokenizer, described
from pastalm.models.checkpoints import quiet
from pastalm.records import disk

log = logging.getLogger(__name__)

Tensor = tuple[str, Matrix | Floats]
DEFAULT: WeightType = "Q8_0"
"""The default type of weights. On the embedded model it raises perplexity by half a percent over bfloat16; 4 bits raise
it by a fifth (benchmarks/README.md)."""
_HEADS: Mapping[WeightType, WeightType] = {"Q4_0": "Q8_0"}
"""The head's type if it differs from the other weights', as in GGML's files of 4 bits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """A packed model with its tokenizer.

    name: the model's name.
    architecture, tensors: for the native engine. The packed file stays mapped as long as the tensors are referenced.
    tokenizer: with the chat template.
    vocabulary: the tokenizer's Vocabulary.
    sequential_marker, context_length: as in `Loaded`.
    """

    name: str
    architecture: Architecture
    tensors: Tensors
    tokenizer: ChatTokenizer
    vocabulary: Vocabulary
    sequential_marker: str | None
    context_length: int

    @property
    def loaded(self) -> loading.Loaded:
        """The same as a `Loaded`."""
        return loading.Loaded(
            name=self.name,
            model=self,
            tokenizer=self.tokenizer,
            vocabulary=self.vocabulary,
            prepared=self.vocabulary.tags is not None,
            sequential_marker=self.sequential_marker,
            context_length=self.context_length,
        )


def load(
    name: str = downloads.EMBEDDED,
    *,
    adapter: str | None = "auto",
    weights: WeightType = DEFAULT,
    head: WeightType | None = None,
) -> Packed:
    """Loads a model with its adapter merged, from the cache if it is packed already.

    name, adapter: as in `loading.load`.
    weights: type of the matrices.
    head: type of the head, and of the embedding if they are tied. None: Q8_0 with Q4_0, else the same as `weights`.

    Raises ModelError, CapabilityError.
    """
    folder = downloads.pull(name)
    adapter_path = adapters.adapter_folder(name, adapter)
    _check_kind(folder)
    origin = Origin(
        name,
        (folder, *([adapter_path] if adapter_path else ())),
        (weights, head or _HEADS.get(weights, weights)),
    )
    return _cached(origin, lambda: _packable(name, adapter, *origin.types))


def load_gguf(path: str | Path) -> Packed:
    """Loads a GGUF file. Weights of types that the engine has are used unchanged, others become Q8_0.

    Raises ModelError, CapabilityError.
    """
    from pastalm.models import packed_gguf

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no GGUF file at {path}")
    return _cached(Origin(path.name, (path,), ()), lambda: packed_gguf.read(path))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packable:
    """A model to be packed.

    architecture: of the model.
    tensors: yields the packed tensors one by one; may be called again.
    tokenizer: the description of a ChatTokenizer.
    eos: ids that end an answer.
    sequential_marker, context_length: as in `Loaded`.
    """

    architecture: Architecture
    tensors: Callable[[], Iterator[Tensor]]
    tokenizer: Mapping[str, Any]
    eos: Sequence[int]
    sequential_marker: str | None
    context_length: int


def _refuse(reason: str) -> CapabilityError:
    return CapabilityError(f"the native engine cannot run this model: {reason}")


def _check_kind(folder: Path) -> None:
    """Raises CapabilityError for an unknown type of model, before its files are hashed."""
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, LookupError):
        return  # loading the model gives a better error
    if kind not in _CLASSES:
        raise _refuse(f"it is of type {kind!r}, not one of {', '.join(_CLASSES)}")


def _check_configuration(folder: Path) -> None:
    """Raises CapabilityError before the weights are read, which another engine would have to read again."""
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder)
    except Exception:
        return  # loading the model gives a better error
    architecture(config)


def _packable(name: str, adapter: str | None, type: WeightType, head_type: WeightType) -> Packable:
    _check_configuration(downloads.pull(name))
    loaded = loading.load(name, adapter=adapter, dtype="stored")
    shape = _architecture_of(loaded.model)
    return Packable(
        architecture=shape,
        tensors=lambda: _tensors(loaded.model, shape, type, head_type),
        tokenizer=described(loaded.tokenizer),
        eos=sorted(loaded.vocabulary.eos),
        sequential_marker=loaded.sequential_marker,
        context_length=loaded.context_length,
    )


def _packed(name: str, packable: Packable, tensors: Tensors) -> Packed:
    tokenizer = ChatTokenizer(packable.tokenizer)
    return Packed(
        name=name,
        architecture=packable.architecture,
        tensors=tensors,
        tokenizer=tokenizer,
        vocabulary=lossless.vocabulary_of(tokenizer, eos=packable.eos, size=packable.architecture.vocabulary),
        sequential_marker=packable.sequential_marker,
        context_length=packable.context_length,
    )


# ------------------------------------------------------------------------------ packed files

_FORMAT = 1
"""Part of every packed file's name: whoever changes what such a file holds, or means, raises it."""
_PROLOGUE = struct.Struct("<16sQQ32x")
"""A magic word; where the header begins; how long it is."""
_MAGIC = b"pastalm packed\n\0"
_UNREAD = 30 * 24 * 3600.0
"""Seconds after which an unused packed file is removed, when another is written."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a packed model is made from.

    name: the model's name.
    paths: its folders or files.
    types: the requested weight types.
    """

    name: str
    paths: tuple[Path, ...]
    types: tuple[WeightType, ...]


def _cached(origin: Origin, make: Callable[[], Packable]) -> Packed:
    """The packed model of an origin, read from the cache, or packed and written to it. If the cache cannot be written,
    the model is packed in memory."""
    folder = downloads.cache_folder() / "packed"
    place, digest = _names(origin)
    path = next(folder.glob(f"*-{digest}.packed"), folder / f"{place}-{digest}.packed")
    if (packed := _read(path, origin.name)) is not None:
        with contextlib.suppress(OSError):
            os.utime(path)  # recently used
        return packed
    log.info("packing %s for this CPU, once", origin.name)
    packable = make()
    with contextlib.suppress(OSError):
        _write(path, packable)
        _tidy(folder, place, path)
    return _read(path, origin.name) or _packed(origin.name, packable, dict(packable.tensors()))


def _tidy(folder: Path, place: str, new: Path) -> None:
    """Removes older packed files of the same origin, and files that were not read for a month."""
    for old in folder.glob("*.packed"):
        unread = time.time() - old.stat().st_mtime > _UNREAD
        if old != new and (unread or old.name.startswith(f"{place}-")):
            old.unlink(missing_ok=True)


def _names(origin: Origin) -> tuple[str, str]:
    """Two parts of a packed file's name: for the origin's path, and a hash of its contents."""
    hashes = [contents.files(path) for path in origin.paths]
    slug = re.sub(r"[^a-z0-9.]+", "-", Path(origin.name).name.lower())
    place = _hash([str(path.resolve()) for path in origin.paths], origin.types)[:8]
    stem = "-".join((slug, *dict.fromkeys(origin.types), place))
    return stem, _hash(_FORMAT, weights.fingerprint(), hashes, origin.types)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _write(path: Path, packable: Packable) -> None:
    with disk.replacing(path) as file:
        file.write(bytes(_PROLOGUE.size))
        places = {}
        for name, tensor in packable.tensors():
            if isinstance(tensor, Matrix):
                shape, data = [tensor.outputs, tensor.inputs], tensor.data
            else:
                shape, data = [len(tensor)], tensor.view(np.uint8)
            kind = tensor.type if isinstance(tensor, Matrix) else None
            places[name] = {"type": kind, "shape": shape, "at": _append(file, data)}
        rest = dict(packable.tokenizer)
        backend = rest.pop("backend").encode()
        header = {
            "architecture": packable.architecture.to_json(),
            "tensors": places,
            "backend": [_append(file, backend), len(backend)],
            "tokenizer": rest,
            "eos": list(packable.eos),
            "sequential_marker": packable.sequential_marker,
            "context_length": packable.context_length,
        }
        text = json.dumps(header).encode()
        at = _append(file, text)
        file.seek(0)
        file.write(_PROLOGUE.pack(_MAGIC, at, len(text)))


def _append(file: BinaryIO, data: Bytes | bytes) -> int:
    """Writes at the next multiple of 64. Returns that offset."""
    file.write(bytes(-file.tell() % weights.ALIGNMENT))
    at = file.tell()
    file.write(data)  # type: ignore[arg-type]
    return at


def _read(path: Path, name: str) -> Packed | None:
    """Maps a packed file; None if it does not exist or is incomplete."""
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    if len(mapping) < _PROLOGUE.size:
        return None
    magic, at, length = _PROLOGUE.unpack_from(mapping)
    if magic != _MAGIC or at + length != len(mapping):
        return None
    if hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_WILLNEED)
    header = json.loads(mapping[at:])
    tensors = {key: _mapped(mapping, **place) for key, place in header["tensors"].items()}
    start, size = header["backend"]
    packable = Packable(
        architecture=Architecture.from_json(header["architecture"]),
        tensors=lambda: iter(tensors.items()),
        tokenizer=header["tokenizer"] | {"backend": mapping[start : start + size].decode()},
        eos=header["eos"],
        sequential_marker=header["sequential_marker"],
        context_length=header["context_length"],
    )
    return _packed(name, packable, tensors)


def _mapped(mapping: mmap.mmap, type: WeightType | None, shape: list[int], at: int) -> Matrix | Floats:
    if type is None:
        return np.frombuffer(mapping, np.float32, shape[0], at)
    size = weights.packed_bytes(type, *shape)
    return Matrix(np.frombuffer(mapping, np.uint8, size, at), type, *shape)


# ------------------------------------------------------------------------------ architecture

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
    """The architecture in a transformers configuration. Raises CapabilityError if the engine does not support it."""
    if problem := complaint(_checks(config)):
        raise _refuse(problem)
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
    """(valid, message) for each requirement of the engine."""
    kind = getattr(config, "model_type", None)
    yield kind in _CLASSES, f"it is of type {kind!r}, not one of {', '.join(_CLASSES)}"
    yield getattr(config, "quantization_config", None) is None, "its weights are quantised already"
    yield not getattr(config, "mlp_bias", False), "its MLP has biases"
    yield not getattr(config, "use_bidirectional_attention", False), "its attention looks ahead"
    expected = "gelu_pytorch_tanh" if kind in _GEMMA else "silu"
    activation = config.hidden_activation if kind in _GEMMA else config.hidden_act
    yield activation == expected, f"its activation is {activation!r}, not {expected!r}"
    yield (
        config.intermediate_size % weights.GROUP == 0,
        f"its MLP is {config.intermediate_size} wide",
    )
    yield (
        config.num_attention_heads % config.num_key_value_heads == 0,
        "its heads share keys unevenly",
    )
    yield _head_dim(config) % 2 == 0, f"its heads are {_head_dim(config)} wide"
    # transformers passes no softcap to Gemma 3's attention, whatever the configuration says
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
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _softcap(config: Any, name: str) -> float:
    return float(getattr(config, name, None) or 0.0) if config.model_type in _GEMMA else 0.0


def _layer_types(config: Any) -> list[str]:
    if config.model_type == "mistral":  # its layers are all of one type, whatever the list says
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        return [kind] * config.num_hidden_layers
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def _windows(config: Any) -> tuple[int, ...]:
    return tuple(config.sliding_window if t == "sliding_attention" else 0 for t in _layer_types(config))


def _rope_parameters(config: Any) -> dict[str | None, Any]:
    """Rotary parameters by type of layer; the key is None if all layers share them."""
    parameters = config.rope_parameters
    if config.model_type != "gemma3_text":
        return {None: parameters}
    return {kind: parameters.get(kind) for kind in _layer_types(config)}


def _ropes(config: Any) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """The rotary tables, and for each layer the index of its table (-1: none)."""
    kinds = list(_rope_parameters(config))
    ropes = tuple(_rope(config, kind) for kind in kinds)
    if kinds == [None]:
        used = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
        return ropes, tuple(0 if rotates else -1 for rotates in used[: config.num_hidden_layers])
    return ropes, tuple(kinds.index(t) for t in _layer_types(config))


def _rope(config: Any, kind: str | None) -> Rope:
    """The rotary table as transformers computes it, in float32. A model that was cast to bfloat16 has a rounded one."""
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
    """Packs a transformers model. Vectors stay in float32.

    model: the model.
    type: type of the matrices.
    head_type: type of the head, and of the embedding if they are tied (None: `type`).

    Raises CapabilityError.
    """
    shape = _architecture_of(model)
    return shape, dict(_tensors(model, shape, type, head_type or type))


def _architecture_of(model: Any) -> Architecture:
    import torch

    config = model.config
    result = architecture(config)
    name = model.__class__.__name__
    if name != _CLASSES[config.model_type]:
        raise _refuse(f"{name} is not known to it")
    table = model.get_input_embeddings().weight
    if config.model_type in _GEMMA:
        scale = torch.tensor(config.hidden_size**0.5).to(table.dtype)  # rounded as in the model
        result = replace(result, embedding_scale=float(scale))
    return replace(result, vocabulary=table.shape[0])


def _tensors(model: Any, shape: Architecture, type: WeightType, head_type: WeightType) -> Iterator[Tensor]:
    """Yields the packed tensors."""
    state = model.state_dict()
    sources = _sources(state, shape)
    tied = _tied(model)
    if unknown := sorted(set(state) - {name for names in sources.values() for name in names}):
        raise _refuse(f"it does not know {unknown[0]}")
    added = np.float32(1 if model.config.model_type in _GEMMA else 0)
    for name, names in sources.items():
        parts = [state[n].detach() for n in names]
        if name == "head" and tied:
            continue
        if parts[0].dim() == 1:
            vector = np.concatenate([_floats(p) for p in parts])
            yield name, vector + added if name.endswith("norm") else vector
        else:
            as_head = name == "head" or (name == "embedding" and tied)
            rows = [_rows(p) for p in parts]
            whole = weights.interleaved(*rows) if name.endswith("gate_up") else weights.joined(rows)
            yield name, weights.pack_rows(whole, head_type if as_head else type)


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


def _sources(state: Mapping[str, Any], shape: Architecture) -> dict[str, tuple[str, ...]]:
    """The model's weights that each packed tensor is made from."""
    sources: dict[str, tuple[str, ...]] = {"embedding": ("model.embed_tokens.weight",)}
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        gemma = f"{at}pre_feedforward_layernorm.weight" in state
        norms = _POST_NORMS if gemma else {"mlp_norm": ("post_attention_layernorm.weight",)}
        for name, names in (_LAYER | norms).items():
            if at + names[0] in state:
                sources[f"{i}.{name}"] = tuple(at + n for n in names)
    return sources | {"norm": ("model.norm.weight",), "head": ("lm_head.weight",)}


def _tied(model: Any) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return bool(head.weight.data_ptr() == table.weight.data_ptr())


def _rows(tensor: Any) -> Rows:
    outputs, inputs = tensor.shape
    return Rows(outputs, inputs, lambda first, last: _floats(tensor[first:last]))


def _floats(tensor: Any) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array
