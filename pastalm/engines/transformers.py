"""The engine over transformers: any loaded RoPE decoder, unpatched, torch on CPU or GPU.

All threads of all requests go through the model as one sequence [1, tokens] (no padding in the
linear layers); only inside attention are the tokens laid out by request. Keys and values of a layer
lie in one pool [max_num_seqs, kv_heads, max_model_len, head_dim], allocated once; a request owns one
row, a token the slot that its `Layout` gave it. What a token sees is a row of booleans, made into a
mask once per step. Forks and joins move nothing. (PASTA section 4: interpreter and KV cache pool.)

A free row remembers the prompt it holds: a request that begins like it prefills only the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from pastalm.engine import Capabilities, Request, SampledToken, Schedule
from pastalm.engines import packing
from pastalm.engines.sampling import Draw, Sampled, Sampler, noise_key
from pastalm.errors import CapabilityError, EngineError, PastaError, RequestError, complaint
from pastalm.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path, TokenSet
from pastalm.layout import Layout, Placed, Policy

POSITIONS: tuple[Policy, ...] = ("promised", "overlap")
ATTENTION = "pastalm"
"""The name under which transformers finds this attention."""
ALIGNMENT = 8
"""The pool is read up to a multiple of this: attention kernels want masks of such widths."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


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


# ------------------------------------------------------------------------------ requests


@dataclass(slots=True)
class _Thread:
    """A thread as the engine knows it. live: neither blocked nor finished. last: place of its last
    token (-1: none yet). count: its tokens so far. logits: of its next token, once its last is fed."""

    path: Path
    live: bool = True
    finished: bool = False
    allowed: TokenSet | None = None
    last: int = -1
    count: int = 0
    logits: Tensor | None = None


@dataclass(slots=True)
class _Sequence:
    """A request, its threads and its tokens. tokens, readable: by place; readable: whether a
    penalty counts it. pending: placed but not fed yet, in order. row: of the pool, -1 while waiting."""

    request: Request
    layout: Layout
    tokens: Ints
    readable: Bools
    threads: dict[Path, _Thread] = field(default_factory=dict)
    pending: list[Placed] = field(default_factory=list)
    row: int = -1

    @property
    def prompt(self) -> Ints:
        return self.tokens[: len(self.request.prompt_token_ids)]

    def due(self, chosen: set[Path] | None) -> list[Placed]:
        """The pending tokens of the chosen threads, and those that they see (None: all)."""
        if chosen is None:
            return self.pending
        needed = np.zeros(len(self.tokens), dtype=np.bool_)
        for token in self.pending:
            if token.path in chosen:
                needed |= token.row
        return [token for token in self.pending if needed[token.place]]

    def fed(self, due: Sequence[Placed]) -> None:
        places = {token.place for token in due}
        self.pending = [token for token in self.pending if token.place not in places]

    def seen(self, path: Path) -> Ints:
        """The distinct ids of reader's text and prompt that a thread sees."""
        return np.unique(self.tokens[self.layout.visible(path) & self.readable])


def _common(a: Ints, b: Ints) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


class TransformersEngine:
    """Decodes all threads of all requests in one forward pass per step.

    model: a loaded decoder-only model with rotary positions; put into eval mode, and moved to
    `device` if one is given. max_num_seqs: requests that decode at once; max_model_len: slots of
    each, cut to the positions the model can take. schedule: which live threads decode in a step (all);
    tokens that a chosen thread needs to see are fed with it. prefill_chunk: prompt tokens in one
    forward. pack: lay the weights out for decoding where that helps (float32 on CPUs); the model can
    then only infer.

    Raises CapabilityError for a model that it cannot drive. `on_logits`, if set, is called with the
    request's id, the path and the raw logits [vocabulary] of every token sampled.
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
        self._capacity = min(max_model_len, self._shape.max_positions or max_model_len)
        self._chunk = prefill_chunk
        self._schedule = schedule
        self._pool = _Pool(self._shape.layers, max_num_seqs, self._capacity)
        self._sampler = Sampler(self._shape.vocabulary)
        self._memory: list[Ints] = [np.empty(0, dtype=np.int64)] * max_num_seqs
        self._free = set(range(max_num_seqs))
        self._waiting: dict[str, _Sequence] = {}
        self._running: dict[str, _Sequence] = {}
        self.on_logits: Callable[[str, Path, Tensor], None] | None = None
        self.capabilities = Capabilities(
            name="transformers",
            positions=POSITIONS,
            max_model_len=self._capacity,
            max_num_seqs=max_num_seqs,
            max_position=self._shape.max_positions,
        )

    # ------------------------------------------------------------------ the protocol

    def add(self, request: Request) -> None:
        """Takes a request; it waits while no row is free. Raises RequestError if it can never fit."""
        self._check(request)
        n = len(request.prompt_token_ids)
        tokens = np.zeros(self._capacity, dtype=np.int64)
        tokens[:n] = request.prompt_token_ids
        readable = np.arange(self._capacity) < n
        layout = Layout(n, self._capacity, request.positions)
        self._waiting[request.id] = _Sequence(request, layout, tokens, readable)

    def apply(self, request_id: str, event: Event) -> None:
        """Does what an event means. Raises RequestError for one that cannot follow."""
        sequence = self._running.get(request_id) or self._waiting.get(request_id)
        if sequence is None:
            if isinstance(event, Finished):
                return
            raise RequestError(f"no unfinished request {request_id!r}: add it first")
        thread = self._addressed(sequence, event)
        self._place(sequence, thread, event)
        thread.allowed = event.allowed
        if isinstance(event, (Blocked, Finished)):
            thread.live = False
        elif isinstance(event, Joined):
            thread.live = True
        if isinstance(event, Finished):
            thread.finished = True
            if all(t.finished for t in sequence.threads.values()):
                self.cancel(request_id)

    @torch.inference_mode()
    def step(self) -> list[SampledToken]:
        """Admits what fits, then one forward pass over all that is due. Raises EngineError if it
        fails; nothing counts as fed then."""
        try:
            self._admit()
            chosen = self._chosen()
            self._feed(chosen)
        except PastaError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise EngineError(
                f"the forward pass failed: {type(error).__name__}: {reason[0]}"
            ) from error
        return self._sample(chosen)

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def cancel(self, request_id: str) -> None:
        """Frees the request's row at once; unknown ids are ignored."""
        self._waiting.pop(request_id, None)
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            self._free.add(sequence.row)

    def forget(self) -> None:
        """Forgets the prompts that free rows remember: the next request is prefilled whole."""
        for row in self._free:
            self._memory[row] = self._memory[row][:0]

    # ------------------------------------------------------------------ requests and events

    def _check(self, request: Request) -> None:
        n, most = len(request.prompt_token_ids), request.params.max_tokens
        size = self._shape.vocabulary
        odd = [t for t in (*request.prompt_token_ids, *request.logit_bias) if not 0 <= t < size]
        if request.positions not in POSITIONS:
            raise CapabilityError(
                f"positions={request.positions!r} is not offered here; use one of {', '.join(POSITIONS)}"
            )
        checks = (
            (
                request.id not in self._waiting | self._running,
                f"request {request.id!r} is unfinished",
            ),
            (n > 0, "the prompt is empty: give at least one token"),
            (not odd, f"token id {odd[:1]} is outside the model's vocabulary of {size}"),
            (
                n + most <= self._capacity,
                f"prompt ({n}) + max_tokens ({most}) exceed max_model_len ({self._capacity}): shorten one",
            ),
        )
        if said := complaint(checks):
            raise RequestError(said)

    def _addressed(self, sequence: _Sequence, event: Event) -> _Thread:
        """The thread of an event; a new one for `Forked`."""
        path, threads = event.path, sequence.threads
        forked = isinstance(event, Forked)
        if forked == (path in threads) or (forked and path and path[:-1] not in threads):
            name = type(event).__name__
            raise RequestError(f"{name} of thread {path} cannot follow in {sequence.request.id!r}")
        if forked:
            threads[path] = _Thread(path)
        return threads[path]

    def _place(self, sequence: _Sequence, thread: _Thread, event: Event) -> None:
        """Gives the event's tokens their places and queues them to be fed."""
        try:
            placed = sequence.layout.apply(event)
        except IndexError:
            raise RequestError(
                f"request {sequence.request.id!r} is past max_model_len ({self._capacity})"
            ) from None
        for token in placed:
            if not 0 <= token.token < self._shape.vocabulary:
                raise RequestError(f"token id {token.token} is outside the model's vocabulary")
            sequence.tokens[token.place] = token.token
            sequence.readable[token.place] = (
                isinstance(event, Decoded) and not event.tag and not token.forced
            )
        if placed:
            sequence.pending += placed
            thread.count += len(placed)
            thread.last = placed[-1].place
            thread.logits = None

    # ------------------------------------------------------------------ prefill

    def _admit(self) -> None:
        """Prefills waiting requests that have been started, first come first, while rows are free."""
        for sequence in [s for s in self._waiting.values() if s.threads]:
            if not self._free:
                return
            prompt = sequence.prompt
            row = max(self._free, key=lambda r: (_common(self._memory[r], prompt), -r))
            self._prefill(sequence, row)
            self._free.remove(row)
            sequence.row = row
            self._running[sequence.request.id] = self._waiting.pop(sequence.request.id)

    def _prefill(self, sequence: _Sequence, row: int) -> None:
        """Feeds a prompt but for what the row holds of it already, the last token always."""
        prompt, n = sequence.prompt, len(sequence.prompt)
        begin = min(_common(self._memory[row], prompt), n - 1)
        self._memory[row] = prompt[:0]
        main = sequence.threads[()]
        for start in range(begin, n, self._chunk):
            stop = min(start + self._chunk, n)
            width = self._width(stop)
            where = np.arange(start, stop)
            logits = self._forward(
                ids=prompt[start:stop],
                positions=where,
                plan=_Plan(row, row + 1, width, *self._tensors(np.full(len(where), row), where)),
                visible=(np.arange(width) <= where[:, None])[None],
                query_positions=where[None],
                key_positions=sequence.layout.positions[None, :width],
                keep=[len(where) - 1] if stop == n and main.last < 0 else [],
            )
        self._memory[row] = prompt
        main.logits = logits[0] if main.last < 0 else None

    # ------------------------------------------------------------------ decoding

    def _chosen(self) -> dict[str, set[Path]] | None:
        """The threads that decode in this step (None: all that live)."""
        if self._schedule is None:
            return None
        chosen: dict[str, set[Path]] = {}
        for request_id, path in self._schedule([(s.request.id, t.path) for s, t in self._live()]):
            chosen.setdefault(request_id, set()).add(path)
        return chosen

    def _live(self) -> Iterator[tuple[_Sequence, _Thread]]:
        """The live threads, by request, then by path."""
        for sequence in self._running.values():
            for path in sorted(sequence.threads):
                if sequence.threads[path].live:
                    yield sequence, sequence.threads[path]

    def _feed(self, chosen: dict[str, set[Path]] | None) -> None:
        """One forward over all due tokens; afterwards threads that are fed up have their logits."""
        batch = []
        for request_id, sequence in self._running.items():
            due = sequence.due(None if chosen is None else chosen.get(request_id, set()))
            if due:
                batch.append((sequence, due))
        if not batch:
            return
        tokens = [(sequence, token) for sequence, due in batch for token in due]
        ready = [
            (i, thread)
            for i, (sequence, token) in enumerate(tokens)
            if (thread := sequence.threads[token.path]).last == token.place and not thread.finished
        ]
        logits = self._packed(batch, [i for i, _ in ready])
        for (_, thread), row in zip(ready, logits.unbind(0), strict=True):
            thread.logits = row
        for sequence, due in batch:
            sequence.fed(due)

    def _packed(self, batch: list[tuple[_Sequence, list[Placed]]], keep: list[int]) -> Tensor:
        """Logits [len(keep), vocabulary] of one forward over the due tokens of some requests."""
        batch_rows = [sequence.row for sequence, _ in batch]
        first, last = min(batch_rows), max(batch_rows) + 1
        longest = max(len(due) for _, due in batch)
        width = self._width(max(sequence.layout.used for sequence, _ in batch))
        placed = [token for _, due in batch for token in due]
        # queries that stand for no token see nothing; what comes out for them is never read
        visible = np.zeros((last - first, longest, width), dtype=np.bool_)
        query_positions = np.zeros((last - first, longest), dtype=np.int64)
        key_positions = np.zeros((last - first, width), dtype=np.int64)
        lay = np.zeros((last - first, longest), dtype=np.int64)
        flat: list[int] = []
        for sequence, due in batch:
            r, q = sequence.row - first, len(due)
            visible[r, :q] = [token.row[:width] for token in due]
            query_positions[r, :q] = [token.position for token in due]
            key_positions[r] = sequence.layout.positions[:width]
            lay[r, :q] = range(len(flat), len(flat) + q)
            flat += range(r * longest, r * longest + q)
        where = self._tensors(
            np.repeat(batch_rows, [len(due) for _, due in batch]),
            np.array([token.place for token in placed]),
        )
        laid = () if last - first == 1 else self._tensors(lay, np.array(flat))
        return self._forward(
            ids=np.array([token.token for token in placed]),
            positions=np.array([token.position for token in placed]),
            plan=_Plan(first, last, width, *where, *laid),
            visible=visible,
            query_positions=query_positions,
            key_positions=key_positions,
            keep=keep,
        )

    def _forward(
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

    # ------------------------------------------------------------------ sampling

    def _sample(self, chosen: dict[str, set[Path]] | None) -> list[SampledToken]:
        """Samples every live, chosen thread."""
        threads = [
            (sequence, thread)
            for sequence, thread in self._live()
            if chosen is None or thread.path in chosen.get(sequence.request.id, ())
        ]
        rows = []
        for sequence, thread in threads:
            if thread.logits is None:
                raise EngineError(
                    f"thread {thread.path} of {sequence.request.id!r} has no token to go on from: "
                    "apply what follows from a sampled token before the next step"
                )
            rows.append(thread.logits)
        if not rows:
            return []
        draws = [self._draw(sequence, thread) for sequence, thread in threads]
        sampled = self._sampler(torch.stack(rows), draws)
        for sequence, thread in threads:
            if self.on_logits is not None and thread.logits is not None:
                self.on_logits(sequence.request.id, thread.path, thread.logits)
            thread.logits = None
        return [_token(s, t, x) for (s, t), x in zip(threads, sampled, strict=True)]

    def _draw(self, sequence: _Sequence, thread: _Thread) -> Draw:
        request = sequence.request
        penalised = request.params.repetition_penalty != 1
        return Draw(
            params=request.params,
            key=noise_key(request.seed, request.choice, thread.path, thread.count),
            logit_bias=request.logit_bias,
            allowed=thread.allowed,
            seen=sequence.seen(thread.path) if penalised else sequence.tokens[:0],
        )


def _token(sequence: _Sequence, thread: _Thread, sampled: Sampled) -> SampledToken:
    return SampledToken(
        request_id=sequence.request.id,
        path=thread.path,
        token=sampled.token,
        logprob=sampled.logprob,
        top_logprobs=sampled.top_logprobs,
    )
