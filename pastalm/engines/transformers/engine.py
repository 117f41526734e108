"""The engine over transformers: any loaded RoPE decoder, unpatched, torch on CPU or GPU.

All threads of all requests go through the model as one sequence [1, tokens] (no padding in the
linear layers); only inside attention are the tokens laid out by request. Keys and values of a layer
lie in one pool [max_num_seqs, kv_heads, max_model_len, head_dim], allocated once; a request owns one
row, a token the slot that its `Layout` gave it. What a token sees is a row of booleans, made into a
mask once per step. Forks and joins move nothing. (PASTA section 4: interpreter and KV cache pool.)
Rows of like length that lie side by side are read in one attention call, others in calls of their own.

A free row remembers the prompt it holds, and the logits behind it: a request that begins like it prefills only the
rest. A prompt is read in blocks that begin at multiples of their length, and only whole ones are used again: so what is
remembered does not change an answer.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pastalm.engines.base import Capabilities, Schedule
from pastalm.engines.batching import (
    PREFILL_BUDGET,
    PREFILL_CHUNK,
    Batch,
    BatchingEngine,
    Bools,
    Ints,
    RequestState,
    common_prefix,
)
from pastalm.engines.transformers import packed_linear
from pastalm.engines.transformers.cuda_graphs import Graphs, Inputs
from pastalm.engines.transformers.sampling import TensorSampler
from pastalm.errors import CapabilityError, EngineError, RequestError, complaint

CAPABILITIES = Capabilities(
    name="transformers",
    weights="any RoPE decoder of transformers, adapters; CPU and GPU",
    positions=("promised", "overlap"),
    exact=True,
)
ATTENTION = "pastalm"
"""The name under which transformers finds this attention."""
BLOCK = 128
"""Prompt tokens that are read, and remembered, together on a CPU: as fast as passes of 512, by measurement."""
ALIGNMENT = 8
"""The pool is read up to a multiple of this: attention kernels want masks of such widths."""


# ------------------------------------------------------------------------------ inside the model


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows first .. last - 1 of the pool, read together up to slot `width`. queries: of each row.
    lay: [last - first, queries], the token at each query (any token where there is none). start: where
    its mask begins in the flat mask."""

    first: int
    last: int
    width: int
    queries: int
    lay: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the tokens of one forward go. rows, slots: [tokens], where each token is written. width:
    slots read at most. parts: what of the pool is read; none where it is one row. flat: [tokens], each
    token's query among those of all parts, flattened."""

    rows: Tensor
    slots: Tensor
    width: int
    parts: tuple[_Part, ...] = ()
    flat: Tensor | None = None


class _Planned(Cache):
    """Keys and values of every layer. `plan` stands during a forward. cut: a layer hands out only what the plan is
    wide, for models that attend by themselves."""

    def __init__(self, capacity: int, layers: list[CacheLayerMixin], *, cut: bool = False) -> None:
        self.capacity, self.cut = capacity, cut
        self.plan: _Plan | None = None
        super().__init__(layers=layers)


class _Pool(_Planned):
    """All rows, [rows, kv_heads, capacity, head_dim] a layer. `row(i)`: one of them as a cache of its own
    over the same memory."""

    def __init__(self, layers: int, rows: int, capacity: int, *, cut: bool = False) -> None:
        self.rows = rows
        super().__init__(capacity, [_PoolLayer(self) for _ in range(layers)], cut=cut)
        self._views: dict[int, _Planned] = {}

    def row(self, index: int) -> _Planned:
        if index not in self._views:
            view = _Planned(self.capacity, [], cut=self.cut)
            view.layers += [_RowLayer(view, layer, index) for layer in self.layers]
            self._views[index] = view
        return self._views[index]


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    is_sliding = False

    def __init__(self, cache: _Planned) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the tokens into their slots; all that is there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._cache.plan
        assert plan is not None and self.keys is not None and self.values is not None
        self._write(self.keys, key_states, plan)
        self._write(self.values, value_states, plan)
        if self._cache.cut:
            return self.keys[:, :, : plan.width], self.values[:, :, : plan.width]
        return self.keys, self.values

    def _write(self, there: Tensor, states: Tensor, plan: _Plan) -> None:
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return self._cache.plan.width if self._cache.plan else 0

    def get_max_length(self) -> int:
        return self._cache.capacity


class _PoolLayer(_Layer):
    """Keys and values of one layer, [rows, kv_heads, capacity, head_dim]."""

    _cache: _Pool

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            # zeros: a slot never written is hidden, but 0 * NaN would not be 0
            x.new_zeros(self._cache.rows, x.shape[1], self._cache.capacity, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def _write(self, there: Tensor, states: Tensor, plan: _Plan) -> None:
        there[plan.rows, :, plan.slots] = states[0].transpose(0, 1)


class _RowLayer(_Layer):
    """One row of a pool's layer, [1, kv_heads, capacity, head_dim]."""

    def __init__(self, cache: _Planned, whole: _PoolLayer, row: int) -> None:
        super().__init__(cache)
        self._whole, self._row = whole, row

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self._whole.is_initialized:
            self._whole.lazy_initialization(key_states, value_states)
        only = slice(self._row, self._row + 1)
        self.keys, self.values = self._whole.keys[only], self._whole.values[only]
        self.is_initialized = True

    def _write(self, there: Tensor, states: Tensor, plan: _Plan) -> None:
        there.index_copy_(2, plan.slots, states)


_IDLE = frozenset(
    {
        *("dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "deterministic"),
    }
)
"""Arguments of an attention that change nothing here: what is seen stands in the mask, and nothing is dropped from a
model in eval mode."""


@dataclass(frozen=True, slots=True)
class _Scores:
    """How scores are made. scaling: of the products; None: 1 / sqrt(head_dim). softcap: bounds them by a tanh (Gemma
    2). sinks: [heads], the score of a place that takes weight and has no value (gpt-oss)."""

    scaling: float | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    plan: _Plan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of packed queries [1, heads, tokens, d] over cached keys [rows, kv_heads, capacity, d].

    attention_mask: added; [1, 1, groups * tokens, width] for one row, else [1, 1, 1, n]: the masks
    [rows, 1, groups * queries, width] of the plan's parts, one after the other. s_aux: [heads], attention
    sinks. Raises CapabilityError for an argument that might change what comes out and is not known.
    """
    if unknown := [name for name, value in others.items() if value is not None and name not in _IDLE]:
        raise CapabilityError(f"its attention takes {unknown[0]!r}, which is not known here")
    if plan is None:
        raise EngineError("it does not pass keyword arguments on to its attention")
    scores = _Scores(scaling, softcap, s_aux)
    if plan.flat is None:
        return _attended(query, key, value, attention_mask, scores).contiguous(), None
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    masks, outs = attention_mask.view(-1), []
    for part in plan.parts:
        laid = query[0][:, part.lay].transpose(0, 1)
        shape = (part.last - part.first, 1, groups * part.queries, part.width)
        mask = masks[part.start : part.start + math.prod(shape)].view(shape)
        keys, values = key[part.first : part.last], value[part.first : part.last]
        out = _attended(laid, keys, values, mask, scores)
        outs.append(out.reshape(-1, heads, out.shape[-1]))
    return (torch.cat(outs) if len(outs) > 1 else outs[0])[plan.flat][None], None


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: _Scores) -> Tensor:
    """Attention [rows, queries, heads, d] of [rows, heads, queries, d] over what the mask is wide.

    Query heads that share keys become rows of one product, which spares a copy of the keys for each.
    """
    rows, heads, queries, head_dim = query.shape
    folded = query.reshape(rows, key.shape[1], mask.shape[2], head_dim)
    key, value = key[:, :, : mask.shape[3]], value[:, :, : mask.shape[3]]
    if scores.plain:
        out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scores.scaling)
    else:
        out = _by_hand(folded, key, value, mask, scores)
    return out.reshape(rows, heads, queries, -1).transpose(1, 2)


def _by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, given: _Scores) -> Tensor:
    """Attention with capped scores (Gemma 2) or sinks (gpt-oss); softmax in float32, or float64 for float64."""
    scores = torch.matmul(query, key.transpose(2, 3)) * (given.scaling or query.shape[3] ** -0.5)
    if given.softcap is not None:
        scores = given.softcap * torch.tanh(scores / given.softcap)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (scores + mask).to(exact)
    if given.sinks is not None:
        kv_heads, folded = scores.shape[1:3]
        groups = given.sinks.numel() // kv_heads
        sinks = given.sinks.to(exact).view(1, kv_heads, groups, 1).expand(len(scores), -1, -1, folded // groups)
        scores = torch.cat([scores, sinks.reshape(len(scores), kv_heads, folded, 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return torch.matmul(weights.to(query.dtype), value)


AttentionInterface.register(ATTENTION, _attention)
# unregistered, a mask that is not 4-D would count as no mask at all
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def _attending(config: Any, how: str) -> Iterator[None]:
    """The model attends with the implementation `how` inside, and as before outside."""
    before = config._attn_implementation
    config._attn_implementation = how
    try:
        yield
    finally:
        config._attn_implementation = before


# ------------------------------------------------------------------------------ what is read


@dataclass(frozen=True, slots=True)
class _Sight:
    """What the due tokens of one request see of its row. visible: [queries, width]; query_positions,
    key_positions: [queries] and [width]; tokens: [queries], which of the packed tokens they are."""

    slot: int
    visible: Bools
    query_positions: Ints
    key_positions: Ints
    tokens: Ints


CALL = 512
"""What one more attention call costs, in slots of the pool that it might have read instead."""


def together(rows: Sequence[int], widths: Sequence[int]) -> list[tuple[int, int]]:
    """Which rows of the pool are read in one attention call: ranges i, j of `rows`, which ascend.

    A call reads all rows between its first and its last, each as far as its widest (widths: how far
    each must be read). The ranges are those for which slots read, and CALL for each call, are least:
    a short request does not pay for a long one beside it.
    """
    best, cut = [0.0], [0]
    for j in range(1, len(rows) + 1):
        width, least, begin = 0, math.inf, j - 1
        for i in range(j - 1, -1, -1):
            width = max(width, widths[i])
            cost = best[i] + (rows[j - 1] + 1 - rows[i]) * width + CALL
            if cost < least:
                least, begin = cost, i
        best.append(least)
        cut.append(begin)
    ranges, end = [], len(rows)
    while end:
        ranges.append((cut[end], end))
        end = cut[end]
    return ranges[::-1]


def _filled(sight: _Sight, queries: int) -> _Sight:
    """The sight with as many queries; those that stand for no token see the first slot."""
    missing = queries - len(sight.tokens)
    sees_first = np.arange(sight.visible.shape[1]) == 0
    return replace(
        sight,
        visible=np.concatenate([sight.visible, np.repeat(sees_first[None], missing, 0)]),
        query_positions=np.pad(sight.query_positions, (0, missing)),
        tokens=np.arange(queries),
    )


def _laid(sights: Sequence[_Sight], rows: range, queries: int, flat: Ints, before: int) -> Ints:
    """Which token each query of some rows is [rows, queries]; writes into `flat` [tokens] which query each token
    is, `before` of them standing before these rows."""
    lay = np.zeros((len(rows), queries), dtype=np.int64)
    for sight in sights:
        row, n = sight.slot - rows[0], len(sight.tokens)
        lay[row, :n] = sight.tokens
        flat[sight.tokens] = before + row * queries + np.arange(n)
    return lay


def _visible(sights: Sequence[_Sight], queries: int, width: int, window: int | None) -> Bools:
    """[rows, queries, width] from the first to the last of some rows; a query that stands for no token
    sees nothing, and what comes out for it is never read."""
    first = sights[0].slot
    visible = np.zeros((sights[-1].slot + 1 - first, queries, width), dtype=np.bool_)
    for sight in sights:
        sees = sight.visible
        if window is not None:
            sees = sees & (sight.query_positions[:, None] - sight.key_positions < window)
        visible[sight.slot - first, : sees.shape[0], : sees.shape[1]] = sees
    return visible


# ------------------------------------------------------------------------------ what a model is


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the engine must know of a model. groups: query heads per key head. windows: sliding
    window (or None) of each layer type; by_type: whether the model wants a mask for each type."""

    layers: int
    groups: int
    vocabulary: int
    max_positions: int | None
    windows: dict[str, int | None]
    by_type: bool


def _refuse(model: PreTrainedModel, said: object) -> CapabilityError:
    return CapabilityError(f"the transformers engine cannot run {type(model).__name__}: {said}")


def _shape(model: PreTrainedModel) -> _Shape:
    """Raises CapabilityError for a model that this engine cannot drive."""
    config: Any = model.config.get_text_config(decoder=True)
    if said := complaint(_checks(model, config)):
        raise _refuse(model, said)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    by_type = "sliding_attention" in kinds
    windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
    heads = config.num_attention_heads
    return _Shape(
        layers=config.num_hidden_layers,
        groups=heads // (getattr(config, "num_key_value_heads", None) or heads),
        vocabulary=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        windows=windows if by_type else {"all": None if kinds else window},
        by_type=by_type,
    )


def _checks(model: PreTrainedModel, config: Any) -> Iterator[tuple[bool, str]]:
    """What must hold, and what to say if it does not."""
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


# ------------------------------------------------------------------------------ rotary frequencies


@dataclass(frozen=True, slots=True)
class _Rope:
    """Rotary frequencies that transformers would choose anew by the length of each forward pass, settled for an engine:
    keys that lie in the pool must stay right. buffer: where the module keeps them."""

    module: torch.nn.Module
    kind: str | None
    buffer: str
    frequencies: Tensor
    limit: int
    """Positions that they hold for, where they are those of short texts."""


def _ropes(model: torch.nn.Module, length: int) -> list[_Rope]:
    """Frequencies of `dynamic` and `longrope` for texts of up to `length` positions.

    dynamic: up to max_position_embeddings they are the plain ones; the engine takes no more. longrope: the short
    factors up to original_max_position_embeddings, else the long ones for every position, as vLLM does.
    """
    found = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for kind, name in types.items() if isinstance(types, dict) else [(None, types)]:
            if name is not None and ("dynamic" in name or name == "longrope"):
                found.append(_settled_rope(module, kind, name, length))
    return found


def _settled_rope(module: Any, kind: str | None, name: str, length: int) -> _Rope:
    prefix = "" if kind is None else f"{kind}_"
    short = getattr(module, f"{prefix}original_inv_freq")
    parameters = module.config.rope_parameters if kind is None else module.config.rope_parameters[kind]
    if name != "longrope":
        return _Rope(module, kind, f"{prefix}inv_freq", short, module.original_max_seq_len)
    limit = int(parameters["original_max_position_embeddings"])
    if length <= limit:
        return _Rope(module, kind, f"{prefix}inv_freq", short, limit)
    long, _ = ROPE_INIT_FUNCTIONS[name](module.config, short.device, seq_len=limit + 1, layer_type=kind)
    return _Rope(module, kind, f"{prefix}inv_freq", long.to(short.device), 2**31)


@contextmanager
def _settled(ropes: Sequence[_Rope]) -> Iterator[None]:
    """Inside, the frequencies are these, whatever the positions of a forward pass are."""
    before = [(rope.module.rope_type, rope.module._buffers[rope.buffer]) for rope in ropes]
    for rope in ropes:
        types: Any = rope.module.rope_type
        settled = "settled" if rope.kind is None else {**types, rope.kind: "settled"}
        rope.module.rope_type = settled  # type: ignore[assignment]
        rope.module._buffers[rope.buffer] = rope.frequencies
    try:
        yield
    finally:
        for rope, (types, frequencies) in zip(ropes[::-1], before[::-1], strict=True):
            rope.module.rope_type, rope.module._buffers[rope.buffer] = types, frequencies


# ------------------------------------------------------------------------------ compiled steps

BUCKETS = (4, 16)
"""Tokens of a compiled step: with weights laid out, one of 4 takes as long as one of 1."""
_FREEZING = {
    "freezing": True,  # weights become constants that are laid out for the kernels made for them
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}


class _Compiled:
    """The model's forward as torch.compile makes it, one graph for each number of tokens.

    Frozen graphs cannot be kept on disk (torch's cache leaves them out), only the kernels that were
    chosen for them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False  # a page for each of the model's shapes
        self._forward = torch.compile(model, dynamic=False)

    def __call__(self, **inputs: Any) -> Any:
        masks = inputs["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            torch._dynamo.maybe_mark_dynamic(mask, 3)  # how far the cache is read
        with torch._inductor.config.patch(_FREEZING):
            return self._forward(**inputs)


# ------------------------------------------------------------------------------ captured steps

ALONE = (1, 2, 4, 8, 16, 32)
"""Tokens of a captured step of one response."""
SHARES = (0.25, 1, 2, 4)
"""Tokens of a captured step of several, for each row of the pool."""
QUERIES = (4, 16)
"""Tokens of one response in a captured step of several."""
NARROWEST = 256
"""Captured steps read the pool up to this, or twice, four times … as far."""


@dataclass(frozen=True, slots=True)
class _Fixed:
    """The shape of a captured step: tokens in all, slots that are read, and the one row that it reads, or
    (row None) how many tokens of each."""

    tokens: int
    width: int
    row: int | None
    queries: int


def _bucket(n: float, sizes: Sequence[float]) -> int | None:
    """The least of some sizes, ascending, that holds n."""
    return next((int(size) for size in sizes if size >= n), None)


# ------------------------------------------------------------------------------ the engine

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
"""Types of models of which a test builds a small one and holds it to plain transformers (docs/models.md)."""


def _of_transformers(model: PreTrainedModel) -> bool:
    return type(model).__module__.startswith("transformers.")


def _replaceable(model: PreTrainedModel) -> bool:
    """Whether the model looks its attention up by name."""
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


class TransformersEngine(BatchingEngine):
    """Decodes all threads of all requests in one forward pass per step.

    model: a loaded decoder-only model with rotary positions; put into eval mode, and moved to
    `device` if one is given. One whose attention cannot be replaced (Falcon, GPT-J) attends by itself, in one
    forward pass for each request. max_num_seqs: requests that decode at once; max_model_len: slots of
    each, cut to the positions the model can take. prefill_chunk, prefill_budget: as `BatchingEngine`'s. pack:
    lay the weights out for decoding where that helps (CPUs); the model can then only
    infer. compiled: instead of packed_linear, let torch.compile make a graph of its own with its weights
    laid out (CPUs) for steps of one response with up to each of `BUCKETS` threads; it is made when it
    is first needed, which takes minutes, and holds the weights once more. Raises CapabilityError for
    a model that it cannot drive: two short forward passes show that before anything is asked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_num_seqs: int = 8,
        max_model_len: int = 2048,
        device: str | torch.device | None = None,
        schedule: Schedule | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        prefill_budget: int = PREFILL_BUDGET,
        pack: bool = False,
        compiled: bool = False,
        graphs: bool | None = None,
    ) -> None:
        if min(max_num_seqs, max_model_len) < 1:
            raise RequestError("max_num_seqs and max_model_len must be 1 or more")
        self._shape = _shape(model)
        self._model: Any = model
        if device is not None and torch.device(device) != model.device:
            self._model.to(device)
        self._model.eval()
        self._device = model.device
        if compiled and self._device.type != "cpu":
            raise CapabilityError("compiled=True is for CPUs: leave it out, CUDA graphs are used here")
        if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            self._model.set_experts_implementation("eager")  # the grouped products have no float64
        capacity = min(max_model_len, self._shape.max_positions or max_model_len)
        self._ropes = _ropes(model, capacity)
        limits = [rope.limit for rope in self._ropes] + [self._shape.max_positions or 2**31]
        if min(limits) < 2**31:
            self._shape = replace(self._shape, max_positions=min(limits))
        super().__init__(
            replace(
                CAPABILITIES,
                max_model_len=capacity,
                max_num_seqs=max_num_seqs,
                max_position=self._shape.max_positions,
            ),
            vocabulary_size=self._shape.vocabulary,
            schedule=schedule,
            sampler=TensorSampler(self._shape.vocabulary),
            prefill_chunk=prefill_chunk,
            prefill_budget=prefill_budget,
            prefill_block=self._block_of(model, prefill_chunk),
        )
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._attention = ATTENTION
        self._compiled: _Compiled | None = None
        self._graphs: Graphs[_Fixed] | None = None
        self._pool = _Pool(self._shape.layers, max_num_seqs, capacity)
        self._choose_attention()
        own = self._attention != ATTENTION
        if compiled and own:
            raise _refuse(model, "its attention cannot be replaced, as compiled steps need it")
        if pack and not compiled and packed_linear.can_pack(model):
            packed_linear.pack(model)
        self._compiled = _Compiled(model) if compiled else None
        fixed = (self._device.type == "cuda" if graphs is None else graphs) and not own
        self._graphs = Graphs(self._captured, self._device) if fixed else None
        # one slot more: what fills a bucket up is written there, and nothing sees it
        self._pool = _Pool(self._shape.layers, max_num_seqs, capacity + (compiled or fixed), cut=own)
        self._memory: list[Ints] = [np.empty(0, dtype=np.int64)] * max_num_seqs
        self._next: list[Tensor | None] = [None] * max_num_seqs
        self._free = set(range(max_num_seqs))

    # ------------------------------------------------------------------ what the model can do

    @property
    def own_attention(self) -> bool:
        """Whether the model attends by itself: then a step is a forward pass for each request."""
        return self._attention != ATTENTION

    def _choose_attention(self) -> None:
        """Ours if the model takes another, else its own. Raises CapabilityError for a model that neither drives."""
        model, said = self._model, "its attention cannot be replaced"
        if _replaceable(model):
            try:
                return self._check_driven()
            except CapabilityError as error:
                raise _refuse(model, error) from None
            except Exception as error:
                said = _first_line(error)
        self._attention = "sdpa" if model._supports_sdpa else "eager"
        self._shape = replace(self._shape, groups=1)
        self._pool = _Pool(self._shape.layers, self._pool.rows, self._pool.capacity, cut=True)
        try:
            self._check_driven()
        except Exception as error:
            own = error if isinstance(error, CapabilityError) else f"{said}, and by its own: {_first_line(error)}"
            raise _refuse(model, own) from None

    @torch.inference_mode()
    def _check_driven(self) -> None:
        """A prompt, and a step beside it that does not see its last token. A model of a type that is not in
        `MODEL_TYPES` must say what it says without a cache. Raises CapabilityError, or whatever the model raises."""
        n = min(6, self._capacity)
        ids, positions = np.arange(n) % self._shape.vocabulary, np.arange(n)
        visible = np.tril(np.ones((n, n), dtype=np.bool_))
        if n > 1:
            visible[-1, -2] = False
            positions[-1] -= 1
        found: list[Tensor] = []
        for part in filter(len, (np.arange(n - 1), np.arange(n - 1, n))):
            sight = _Sight(0, visible[part], positions[part], positions, np.arange(len(part)))
            rows = np.zeros_like(part)
            alone = len(found) == 0 or self._attention != ATTENTION
            plan, masks = self._row_planned(rows, part, sight) if alone else self._planned(rows, part, [[sight]])
            cache = self._pool.row(0) if alone else self._pool
            at, where, kept = self._tensors(ids[part], positions[part], np.arange(len(part)))
            found.append(self._fed(self._model, at, where, masks, cache, plan, kept))
        got = torch.cat(found)
        if got.shape != (n, self._shape.vocabulary):
            raise CapabilityError(f"its logits are {list(got.shape)} for {n} tokens")
        if self._model.config.model_type not in MODEL_TYPES or not _of_transformers(self._model):
            self._check_same(got, ids, positions, visible)

    def _check_same(self, got: Tensor, ids: Ints, positions: Ints, visible: Bools) -> None:
        """Holds logits [n, vocabulary] to those of one forward pass without a cache. Raises CapabilityError."""
        config, n = self._model.config, len(ids)
        plain = "eager" if self._attention == ATTENTION else self._attention
        masks = {
            kind: torch.zeros(1, 1, n, n, dtype=self._model.dtype, device=self._device).masked_fill_(
                *self._tensors(~_visible([_Sight(0, visible, positions, positions, np.arange(n))], n, n, window)),
                -torch.inf,
            )
            for kind, window in self._shape.windows.items()
        }
        at, where = self._tensors(ids, positions)
        with _attending(config, plain), _settled(self._ropes):
            out = self._model(
                input_ids=at[None],
                position_ids=where[None],
                attention_mask=masks if self._shape.by_type else masks.popitem()[1],
                use_cache=False,
            )
        want = out.logits[0].float()
        spread = float(want.std()) or 1.0
        worst = float((got.float() - want).abs().max()) / spread
        if not worst < (0.25 if self._model.dtype.itemsize < 4 else 1e-2):
            raise CapabilityError(f"with a cache it says something else than without, by {worst:.2g} of the spread")

    @staticmethod
    def _block_of(model: PreTrainedModel, chunk: int) -> int:
        """A GPU is better with whole chunks. In float64 rounding is too small to decide: there every token that is
        shared is used again."""
        if model.dtype == torch.float64:
            return 1
        return BLOCK if model.device.type == "cpu" else chunk

    def forget(self) -> None:
        """Forgets the prompts that free rows remember."""
        for row in self._free:
            self._memory[row] = self._memory[row][:0]
            self._next[row] = None

    # ------------------------------------------------------------------ prompts

    def _place(self, state: RequestState) -> bool:
        """A row of the pool: the free one that remembers most of the prompt."""
        if not self._free:
            return False
        prompt = state.prompt
        row = max(self._free, key=lambda r: (common_prefix(self._memory[r], prompt), -r))
        known = self._next[row] if np.array_equal(self._memory[row], prompt) else None
        begin = self._reusable(prompt, self._memory[row]) if known is None else len(prompt)
        self._memory[row], self._next[row] = prompt[:begin], known
        if state.main.last < 0:
            state.main.logits = known
        self._free.remove(row)
        state.slot, state.cached = row, begin
        return True

    @torch.inference_mode()
    def _recall(self, state: RequestState) -> None:
        prompt, row, n = state.prompt, state.slot, len(state.prompt)
        for source, logits in enumerate(self._next):
            if logits is not None and np.array_equal(self._memory[source], prompt):
                for layer in self._pool.layers:
                    for held in (layer.keys, layer.values):
                        if held is not None:
                            held[row, :, :n] = held[source, :, :n]
                self._memory[row], self._next[row] = prompt, logits
                state.cached = n
                state.main.logits = logits if state.main.last < 0 else None
                return

    def _leave(self, state: RequestState) -> None:
        self._free.add(state.slot)

    @torch.inference_mode()
    def _prefill(self, state: RequestState, stop: int, logits: bool) -> Tensor | None:
        prompt, row, begin = state.prompt, state.slot, state.cached
        width = self._width(stop)
        where = np.arange(begin, stop)
        sight = _Sight(
            row,
            np.arange(width)[None] <= where[:, None],
            where,
            state.layout.positions[:width],
            np.arange(len(where)),
        )
        rows = self._run(
            ids=prompt[begin:stop],
            positions=where,
            rows=np.full(len(where), row),
            slots=where,
            seen=[[sight]],
            keep=[len(where) - 1] if logits else [],
            decoding=False,
        )
        self._memory[row], self._next[row] = prompt[:stop], rows[0].clone() if logits else None
        return self._next[row]

    # ------------------------------------------------------------------ decoding

    @torch.inference_mode()
    def _forward(self, batch: Batch, keep: list[int]) -> Tensor:
        """Logits [len(keep), vocabulary] of one forward over the due tokens of some requests."""
        placed = [token for _, due in batch for token in due]
        sights, n = [], 0
        for state, due in batch:
            width = self._width(state.layout.used)
            sights.append(
                _Sight(
                    state.slot,
                    np.stack([token.row[:width] for token in due]),
                    np.array([token.position for token in due]),
                    state.layout.positions[:width],
                    np.arange(n, n + len(due)),
                )
            )
            n += len(due)
        sights.sort(key=lambda sight: sight.slot)
        ranges = together([s.slot for s in sights], [s.visible.shape[1] for s in sights])
        return self._run(
            ids=np.array([token.token for token in placed]),
            positions=np.array([token.position for token in placed]),
            rows=np.repeat([state.slot for state, _ in batch], [len(due) for _, due in batch]),
            slots=np.array([token.place for token in placed]),
            seen=[sights[i:j] for i, j in ranges],
            keep=keep,
        )

    def _run(
        self,
        *,
        ids: Ints,
        positions: Ints,
        rows: Ints,
        slots: Ints,
        seen: list[list[_Sight]],
        keep: list[int],
        decoding: bool = True,
    ) -> Tensor:
        """Logits [len(keep), vocabulary] at the tokens `keep` of the packed tokens [tokens].

        rows, slots: [tokens], where each is written; seen: what each row's tokens see, the rows that
        are read together in one list. decoding: not a prompt.
        """
        wanted = len(keep)
        alone = len(seen) == 1 and len(seen[0]) == 1
        if not alone and self._attention != ATTENTION:
            return self._one_by_one(ids, positions, rows, slots, seen, keep)
        n, model = len(ids), self._model
        if self._graphs is not None and decoding:
            shape = self._fixed([sight for together_ in seen for sight in together_], n)
            if shape is not None:
                return self._replayed(shape, (ids, positions, rows, slots), seen, keep)
        if self._compiled is not None and alone and decoding and n <= BUCKETS[-1]:
            model = self._compiled
            bucket = next(size for size in BUCKETS if size >= n)
            seen = [[_filled(seen[0][0], bucket)]]
            ids, positions, rows, slots = self._padded((ids, positions, rows, slots), bucket)
            keep = keep + [n - 1] * (bucket - len(keep))
        plan, masks = self._row_planned(rows, slots, seen[0][0]) if alone else self._planned(rows, slots, seen)
        ids_, positions_, kept = self._tensors(ids, positions, np.array(keep, dtype=np.int64))
        cache = self._pool.row(seen[0][0].slot) if alone else self._pool
        return self._fed(model, ids_, positions_, masks, cache, plan, kept)[:wanted]

    def _fed(
        self,
        model: Any,
        ids: Tensor,
        positions: Tensor,
        masks: dict[str, Tensor],
        cache: _Planned,
        plan: _Plan,
        kept: Tensor | int,
    ) -> Tensor:
        """Logits [kept, vocabulary] of the model's forward; kept 0: of all tokens."""
        cache.plan = plan
        given: dict[str, Any] = {"plan": plan} if self._attention == ATTENTION else {}
        if self._keeps:
            given["logits_to_keep"] = kept
        try:
            with _attending(self._model.config, self._attention), _settled(self._ropes):
                out = model(
                    input_ids=ids[None],
                    position_ids=positions[None],
                    attention_mask=masks if self._shape.by_type else masks.popitem()[1],
                    past_key_values=cache,
                    use_cache=True,
                    **given,
                )
        finally:
            cache.plan = None
        logits: Tensor = out.logits[0]
        return logits if self._keeps or isinstance(kept, int) else logits[kept]

    def _one_by_one(
        self, ids: Ints, positions: Ints, rows: Ints, slots: Ints, seen: list[list[_Sight]], keep: list[int]
    ) -> Tensor:
        """As `_run`, by a forward pass for each row: of a model that attends by itself."""
        logits: dict[int, Tensor] = {}
        for sight in (sight for together_ in seen for sight in together_):
            tokens = sight.tokens
            kept = [i for i, token in enumerate(tokens) if token in set(keep)]
            out = self._run(
                ids=ids[tokens],
                positions=positions[tokens],
                rows=rows[tokens],
                slots=slots[tokens],
                seen=[[replace(sight, tokens=np.arange(len(tokens)))]],
                keep=kept,
            )
            logits |= {int(tokens[i]): row for i, row in zip(kept, out, strict=True)}
        return torch.stack([logits[token] for token in keep]) if keep else out

    def _padded(self, packed: Sequence[Ints], n: int) -> Ints:
        """ids, positions, rows and slots of n tokens [4, n]: those that are missing are written where nothing
        sees them."""
        padded = np.zeros((4, n), dtype=np.int64)
        padded[2:] = [[packed[2][0]], [self._capacity]]
        padded[:, : len(packed[0])] = packed
        return padded

    def _row_planned(self, rows: Ints, slots: Ints, sight: _Sight) -> tuple[_Plan, dict[str, Tensor]]:
        """The plan of a forward that reads one row, and the mask of each layer type."""
        queries, width = sight.visible.shape
        masks = {
            kind: self._mask(*self._tensors(~_visible([sight], queries, width, window))).view(1, 1, -1, width)
            for kind, window in self._shape.windows.items()
        }
        rows_, slots_ = self._tensors(rows, slots)
        return _Plan(rows_, slots_, width), masks

    def _planned(self, rows: Ints, slots: Ints, seen: list[list[_Sight]]) -> tuple[_Plan, dict[str, Tensor]]:
        """The plan of a forward that reads several rows, and the flat mask of each layer type."""
        parts, start, queries_before = [], 0, 0
        flat = np.empty(len(rows), dtype=np.int64)
        masks: dict[str, list[Tensor]] = {kind: [] for kind in self._shape.windows}
        for together_ in seen:
            first, last = together_[0].slot, together_[-1].slot + 1
            longest = max(len(sight.tokens) for sight in together_)
            width = max(sight.visible.shape[1] for sight in together_)
            lay = _laid(together_, range(first, last), longest, flat, queries_before)
            for kind, window in self._shape.windows.items():
                masks[kind] += map(self._mask, self._tensors(~_visible(together_, longest, width, window)))
            parts.append(_Part(first, last, width, longest, self._tensors(lay)[0], start))
            start += (last - first) * self._shape.groups * longest * width
            queries_before += (last - first) * longest
        rows_, slots_, flat_ = self._tensors(rows, slots, flat)
        plan = _Plan(rows_, slots_, max(part.width for part in parts), tuple(parts), flat_)
        return plan, {kind: (torch.cat(m) if len(m) > 1 else m[0])[None, None, None] for kind, m in masks.items()}

    # ------------------------------------------------------------------ captured steps

    def _fixed(self, sights: Sequence[_Sight], n: int) -> _Fixed | None:
        """The least shape that holds n tokens of some responses; None if there is none."""
        used = max(sight.visible.shape[1] for sight in sights)
        width = min(self._capacity, max(NARROWEST, 1 << (used - 1).bit_length()))
        if len(sights) == 1:
            tokens = _bucket(n, ALONE)
            return None if tokens is None else _Fixed(tokens, width, sights[0].slot, tokens)
        tokens = _bucket(n, [math.ceil(share * self._pool.rows) for share in SHARES])
        queries = _bucket(max(len(sight.tokens) for sight in sights), QUERIES)
        return None if tokens is None or queries is None else _Fixed(tokens, width, None, queries)

    def _replayed(self, shape: _Fixed, packed: Sequence[Ints], seen: list[list[_Sight]], keep: list[int]) -> Tensor:
        """Logits [len(keep), vocabulary] of the packed tokens (ids, positions, rows, slots), by a captured step."""
        assert self._graphs is not None
        sights = [sight for together_ in seen for sight in together_]
        rows = range(self._pool.rows) if shape.row is None else range(shape.row, shape.row + 1)
        flat = np.zeros(shape.tokens, dtype=np.int64)
        lay = _laid(sights, rows, shape.queries, flat, 0)
        given = {"tokens": np.concatenate([self._padded(packed, shape.tokens), flat[None]]), "lay": lay}
        for kind, window in self._shape.windows.items():
            hidden = np.ones((len(rows), shape.queries, shape.width), dtype=np.bool_)
            visible = _visible(sights, shape.queries, shape.width, window)
            hidden[sights[0].slot - rows[0] :][: len(visible)] = ~visible
            given[kind] = hidden
        return self._graphs(shape, given)[keep]  # a copy: the next replay overwrites what this one gave

    def _captured(self, shape: _Fixed, inputs: Inputs) -> Tensor:
        """Logits [tokens, vocabulary]: what a graph holds, from masks on."""
        ids, positions, rows, slots, flat = inputs["tokens"].unbind()
        masks = {kind: self._mask(inputs[kind])[None, None, None] for kind in self._shape.windows}
        if shape.row is not None:
            masks = {kind: mask.view(1, 1, -1, shape.width) for kind, mask in masks.items()}
            plan = _Plan(rows, slots, shape.width)
            return self._fed(self._model, ids, positions, masks, self._pool.row(shape.row), plan, 0)
        part = _Part(0, self._pool.rows, shape.width, shape.queries, inputs["lay"], 0)
        plan = _Plan(rows, slots, shape.width, (part,), flat)
        return self._fed(self._model, ids, positions, masks, self._pool, plan, 0)

    # ------------------------------------------------------------------ to the device

    def _mask(self, hidden: Tensor) -> Tensor:
        """[rows * groups * queries * width] of hidden [rows, queries, width]: -inf where hidden and 0
        elsewhere, once for each query head of a group."""
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=self._device)[:, None]
        return mask.masked_fill_(hidden[:, None], -torch.inf).repeat(1, self._shape.groups, 1, 1).view(-1)

    def _tensors(self, *arrays: NDArray[Any]) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array).to(self._device) for array in arrays)

    def _width(self, used: int) -> int:
        return min(self._capacity, -(-used // ALIGNMENT) * ALIGNMENT)
