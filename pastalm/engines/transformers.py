"""The engine over transformers: any loaded RoPE decoder, unpatched, torch on CPU or GPU.

All threads of all requests go through the model as one sequence [1, tokens] (no padding in the
linear layers); only inside attention are the tokens laid out by request. Keys and values of a layer
lie in one pool [max_num_seqs, kv_heads, max_model_len, head_dim], allocated once; a request owns one
row, a token the slot that its `Layout` gave it. What a token sees is a row of booleans, made into a
mask once per step. Forks and joins move nothing. (PASTA section 4: interpreter and KV cache pool.)

A free row remembers the prompt it holds: a request that begins like it prefills only the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from pastalm.engine import Capabilities, Schedule
from pastalm.engines import packing
from pastalm.engines.batching import Batch, BatchingEngine, Bools, Ints, Response, common_prefix
from pastalm.errors import CapabilityError, EngineError, RequestError, complaint
from pastalm.layout import Policy

POSITIONS: tuple[Policy, ...] = ("promised", "overlap")
ATTENTION = "pastalm"
"""The name under which transformers finds this attention."""
ALIGNMENT = 8
"""The pool is read up to a multiple of this: attention kernels want masks of such widths."""


# ------------------------------------------------------------------------------ inside the model


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the tokens of one forward go. first, last: the pool's rows that it reads, `last`
    excluded; width: how many of their slots. rows, slots: [tokens], where each token is written.
    lay: [last - first, queries], the token at each query (any token where there is none); flat:
    [tokens], each token's query in that layout, flattened. Both None where one row is read."""

    first: int
    last: int
    width: int
    rows: Tensor
    slots: Tensor
    lay: Tensor | None = None
    flat: Tensor | None = None


class _Pool(Cache):
    """Keys and values of every layer. `plan` stands during a forward."""

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.plan: _Plan | None = None
        super().__init__(layers=[_PoolLayer(self) for _ in range(layers)])


class _PoolLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, [rows, kv_heads, capacity, head_dim]."""

    is_sliding = False

    def __init__(self, pool: _Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            # zeros: a slot never written is hidden, but 0 * NaN would not be 0
            x.new_zeros(self._pool.rows, x.shape[1], self._pool.capacity, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the tokens into their slots; the part of the pool that the forward reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._pool.plan
        assert plan is not None and self.keys is not None and self.values is not None
        return _written(self.keys, key_states, plan), _written(self.values, value_states, plan)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return self._pool.plan.width if self._pool.plan else 0

    def get_max_length(self) -> int:
        return self._pool.capacity


def _written(pool: Tensor, states: Tensor, plan: _Plan) -> Tensor:
    if plan.lay is None:
        pool[plan.first].index_copy_(1, plan.slots, states[0])
    else:
        pool[plan.rows, :, plan.slots] = states[0].transpose(0, 1)
    return pool[plan.first : plan.last, :, : plan.width]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    plan: _Plan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed queries [1, heads, tokens, d] over the pool [rows, kv_heads, width, d].

    attention_mask: [rows, 1, groups * queries, width], added. Query heads that share keys become
    rows of one product, which spares a copy of the keys for each of them.
    """
    if plan is None:
        raise EngineError("the model does not pass keyword arguments on to its attention")
    heads, kv_heads = query.shape[1], key.shape[1]
    if plan.lay is not None:
        query = query[0][:, plan.lay].transpose(0, 1)
    rows, _heads, queries, width = query.shape
    folded = query.reshape(rows, kv_heads, heads // kv_heads * queries, width)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=attention_mask, scale=scaling
        )
    else:
        out = _capped(folded, key, value, attention_mask, scaling or width**-0.5, softcap)
    out = out.reshape(rows, heads, queries, -1).transpose(1, 2)
    if plan.flat is not None:
        out = out.reshape(rows * queries, heads, -1)[plan.flat][None]
    return out.contiguous(), None


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Attention with capped scores (Gemma 2); softmax in float32, or float64 for float64."""
    scores = softcap * torch.tanh(torch.matmul(query, key.transpose(2, 3)) * scaling / softcap)
    exact = torch.promote_types(query.dtype, torch.float32)
    return torch.matmul(torch.softmax(scores + mask, -1, dtype=exact).to(query.dtype), value)


AttentionInterface.register(ATTENTION, _attention)
# unregistered, a mask that is not 4-D would count as no mask at all
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def _attending(config: Any) -> Iterator[None]:
    """The model attends with `_attention` inside, and as before outside."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


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


def _shape(model: PreTrainedModel) -> _Shape:
    """Raises CapabilityError for a model that this engine cannot drive."""
    name = type(model).__name__
    config: Any = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    rope = getattr(config, "rope_parameters", None)
    checks = (
        (not model.config.is_encoder_decoder, "it is an encoder-decoder"),
        (model.can_generate(), "it is no causal language model"),
        (not getattr(model, "_is_stateful", False), "it keeps a state that is no KV cache"),
        (kinds <= {"full_attention", "sliding_attention"}, f"it has layers of {sorted(kinds)}"),
        (bool(rope), "its positions are not rotary"),
        (not _rescales(rope), "its rotary frequencies change with the length"),
        (getattr(model, "_supports_attention_backend", False), "its attention cannot be replaced"),
    )
    if said := complaint(checks):
        raise CapabilityError(f"the transformers engine cannot run {name}: {said}")
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


def _rescales(rope: Any) -> bool:
    """Whether keys already in the pool would be wrong once the sequence is longer."""
    parameters = (
        rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    )
    return any((p or {}).get("rope_type") in ("dynamic", "longrope") for p in parameters)


# ------------------------------------------------------------------------------ the engine


class TransformersEngine(BatchingEngine):
    """Decodes all threads of all requests in one forward pass per step.

    model: a loaded decoder-only model with rotary positions; put into eval mode, and moved to
    `device` if one is given. max_num_seqs: requests that decode at once; max_model_len: slots of
    each, cut to the positions the model can take. prefill_chunk: prompt tokens in one forward. pack:
    lay the weights out for decoding where that helps (CPUs); the model can then only
    infer. Raises CapabilityError for a model that it cannot drive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_num_seqs: int = 8,
        max_model_len: int = 2048,
        device: str | torch.device | None = None,
        schedule: Schedule | None = None,
        prefill_chunk: int = 512,
        pack: bool = False,
    ) -> None:
        if min(max_num_seqs, max_model_len, prefill_chunk) < 1:
            raise RequestError("max_num_seqs, max_model_len and prefill_chunk must be 1 or more")
        self._shape = _shape(model)
        self._model: Any = model
        self._model.to(device or model.device).eval()
        self._device = model.device
        if pack and packing.can_pack(model):
            packing.pack(model)
        capacity = min(max_model_len, self._shape.max_positions or max_model_len)
        super().__init__(
            Capabilities(
                name="transformers",
                positions=POSITIONS,
                max_model_len=capacity,
                max_num_seqs=max_num_seqs,
                max_position=self._shape.max_positions,
            ),
            vocabulary_size=self._shape.vocabulary,
            schedule=schedule,
        )
        self._chunk = prefill_chunk
        self._pool = _Pool(self._shape.layers, max_num_seqs, capacity)
        self._memory: list[Ints] = [np.empty(0, dtype=np.int64)] * max_num_seqs
        self._free = set(range(max_num_seqs))

    def forget(self) -> None:
        """Forgets the prompts that free rows remember."""
        for row in self._free:
            self._memory[row] = self._memory[row][:0]

    # ------------------------------------------------------------------ prompts

    def _place(self, response: Response) -> bool:
        """A row of the pool: the free one that remembers most of the prompt."""
        if not self._free:
            return False
        prompt = response.prompt
        row = max(self._free, key=lambda r: (common_prefix(self._memory[r], prompt), -r))
        self._prefill(response, row)
        self._free.remove(row)
        response.slot = row
        return True

    def _leave(self, response: Response) -> None:
        self._free.add(response.slot)

    def _prefill(self, response: Response, row: int) -> None:
        """Feeds a prompt but for what the row holds of it already, the last token always."""
        prompt, n, main = response.prompt, len(response.prompt), response.main
        begin = min(common_prefix(self._memory[row], prompt), n - 1)
        self._memory[row] = prompt[:0]
        for start in range(begin, n, self._chunk):
            stop = min(start + self._chunk, n)
            width = self._width(stop)
            where = np.arange(start, stop)
            logits = self._run(
                ids=prompt[start:stop],
                positions=where,
                plan=_Plan(row, row + 1, width, *self._tensors(np.full(len(where), row), where)),
                visible=(np.arange(width) <= where[:, None])[None],
                query_positions=where[None],
                key_positions=response.layout.positions[None, :width],
                keep=[len(where) - 1] if stop == n and main.last < 0 else [],
            )
        self._memory[row] = prompt
        main.logits = logits[0] if main.last < 0 else None

    # ------------------------------------------------------------------ decoding

    def _forward(self, batch: Batch, keep: list[int]) -> Tensor:
        """Logits [len(keep), vocabulary] of one forward over the due tokens of some requests."""
        batch_rows = [response.slot for response, _ in batch]
        first, last = min(batch_rows), max(batch_rows) + 1
        longest = max(len(due) for _, due in batch)
        width = self._width(max(response.layout.used for response, _ in batch))
        placed = [token for _, due in batch for token in due]
        # queries that stand for no token see nothing; what comes out for them is never read
        visible = np.zeros((last - first, longest, width), dtype=np.bool_)
        query_positions = np.zeros((last - first, longest), dtype=np.int64)
        key_positions = np.zeros((last - first, width), dtype=np.int64)
        lay = np.zeros((last - first, longest), dtype=np.int64)
        flat: list[int] = []
        for response, due in batch:
            r, q = response.slot - first, len(due)
            visible[r, :q] = [token.row[:width] for token in due]
            query_positions[r, :q] = [token.position for token in due]
            key_positions[r] = response.layout.positions[:width]
            lay[r, :q] = range(len(flat), len(flat) + q)
            flat += range(r * longest, r * longest + q)
        where = self._tensors(
            np.repeat(batch_rows, [len(due) for _, due in batch]),
            np.array([token.place for token in placed]),
        )
        laid = () if last - first == 1 else self._tensors(lay, np.array(flat))
        return self._run(
            ids=np.array([token.token for token in placed]),
            positions=np.array([token.position for token in placed]),
            plan=_Plan(first, last, width, *where, *laid),
            visible=visible,
            query_positions=query_positions,
            key_positions=key_positions,
            keep=keep,
        )

    def _run(
        self,
        *,
        ids: Ints,
        positions: Ints,
        plan: _Plan,
        visible: Bools,
        query_positions: Ints,
        key_positions: Ints,
        keep: list[int],
    ) -> Tensor:
        """Logits [len(keep), vocabulary] at the tokens `keep` of the packed tokens [tokens].

        visible: [rows, queries, width]; query_positions, key_positions: [rows, queries or width].
        """
        ids_, positions_, kept = self._tensors(ids, positions, np.array(keep, dtype=np.int64))
        masks = {}
        for kind, window in self._shape.windows.items():
            if window is not None:
                near = query_positions[:, :, None] - key_positions[:, None] < window
            masks[kind] = self._mask(visible if window is None else visible & near)
        self._pool.plan = plan
        try:
            with _attending(self._model.config):
                out = self._model(
                    input_ids=ids_[None],
                    position_ids=positions_[None],
                    attention_mask=masks if self._shape.by_type else masks.popitem()[1],
                    past_key_values=self._pool,
                    use_cache=True,
                    logits_to_keep=kept,
                    plan=plan,
                )
        finally:
            self._pool.plan = None
        logits: Tensor = out.logits[0]
        return logits

    def _mask(self, visible: Bools) -> Tensor:
        """[rows, 1, groups * queries, width], 0 where visible and -inf elsewhere."""
        hidden = torch.from_numpy(~visible).to(self._device)[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=self._device)
        return mask.masked_fill_(hidden, -torch.inf).repeat(1, 1, self._shape.groups, 1)

    def _tensors(self, *arrays: NDArray[Any]) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array).to(self._device) for array in arrays)

    def _width(self, used: int) -> int:
        return min(self._capacity, -(-used // ALIGNMENT) * ALIGNMENT)
