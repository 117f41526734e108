"""The engine over transformers: any loaded RoPE decoder, unpatched, torch on CPU or GPU.

The tokens of all threads of all requests are one sequence [1, tokens], without padding in the linear layers; only
inside attention are they laid out by request (`attention`). A request owns one row of the KV pool (`pool`), which grows
with use, and a token the slot that its `Layout` gave it. What a token sees is a row of booleans, which become a mask
once a step (`masks`). Forks and joins move nothing. (PASTA section 4: interpreter and KV cache pool.)

A row remembers the prompt that it began with (`prefixes`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pastalm.engines.base import Capabilities, Schedule
from pastalm.engines.batching import (
    PREFILL_BUDGET,
    PREFILL_CHUNK,
    Batch,
    Bools,
    Ints,
    RequestState,
)
from pastalm.engines.mask_rows import mask_row
from pastalm.engines.prefixes import PrefixCachingEngine
from pastalm.engines.transformers import packed_linear, rope
from pastalm.engines.transformers.attention import ATTENTION, attending
from pastalm.engines.transformers.compiled import BUCKETS, CompiledModel
from pastalm.engines.transformers.cuda_graphs import Graphs, Inputs, StepShape, step_shape
from pastalm.engines.transformers.masks import RowQueries, grouped, query_layout, visibility
from pastalm.engines.transformers.pool import Part, Plan, PlannedCache, Pool
from pastalm.engines.transformers.sampling import TensorSampler
from pastalm.engines.transformers.supported import attention_is_replaceable, is_tested, refusal, shape_of
from pastalm.errors import CapabilityError, RequestError

CAPABILITIES = Capabilities(
    name="transformers",
    weights="any RoPE decoder of transformers, adapters; CPU and GPU",
    positions=("promised", "overlap"),
    drafts=True,
    exact=True,
)
BLOCK = 128
"""Prompt tokens that are read, and remembered, together on a CPU: measured to be as fast as passes of 512."""
ALIGNMENT = 8
"""Rows are read up to a multiple of this: attention kernels want masks of such widths."""


class TransformersEngine(PrefixCachingEngine):
    """Decodes all threads of all requests in one forward pass per step.

    model: a loaded decoder-only model with rotary positions; put into eval mode. One whose attention cannot be
        replaced (Falcon, GPT-J) uses its own, in one forward pass for each request.
    max_num_seqs: requests that decode at once.
    max_model_len: slots of each, limited to the positions the model can take. Memory grows with use up to both.
    device: where the model is moved to (None: it stays).
    schedule, prefill_chunk, prefill_budget: as `BatchingEngine`'s.
    pack: change the layout of the weights for decoding where that helps (CPUs); the model can then only infer.
    compiled: instead of `pack`, let torch.compile make a graph for steps of one request with up to each of `BUCKETS`
        tokens (CPUs). Each is made when it is first needed, which takes minutes, and holds the weights once more.
    graphs: run decoding steps in fixed shapes, as CUDA graphs need them (None: on a GPU).

    Raises CapabilityError for a model that it cannot run: two short forward passes check that.
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
        self._shape = shape_of(model)
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
        self._ropes = rope.ropes_of(model, capacity)
        limits = [each.limit for each in self._ropes] + [self._shape.max_positions or 2**31]
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
        self._compiled: CompiledModel | None = None
        self._graphs: Graphs[StepShape] | None = None
        self._pool = Pool(self._shape.layers, max_num_seqs, capacity)
        self._choose_attention()
        if compiled and self.own_attention:
            raise refusal(model, "its attention cannot be replaced, as compiled steps need it")
        if pack and not compiled and packed_linear.can_pack(model):
            packed_linear.pack(model)
        self._compiled = CompiledModel(model) if compiled else None
        in_fixed_shapes = (self._device.type == "cuda" if graphs is None else graphs) and not self.own_attention
        self._graphs = Graphs(self._fixed_step, self._device) if in_fixed_shapes else None
        self._pool = Pool(self._shape.layers, max_num_seqs, capacity, cut=self.own_attention, whole=compiled)

    # ------------------------------------------------------------------ what the model can do

    @property
    def own_attention(self) -> bool:
        """Whether the model keeps its own attention: a step is then a forward pass for each request."""
        return self._attention != ATTENTION

    def _choose_attention(self) -> None:
        """Ours if the model takes another, else its own. Raises CapabilityError for a model that works with neither."""
        model, reason = self._model, "its attention cannot be replaced"
        if attention_is_replaceable(model):
            try:
                return self._check_runs()
            except CapabilityError as error:
                raise refusal(model, error) from None
            except Exception as error:
                reason = _first_line(error)
        self._attention = "sdpa" if model._supports_sdpa else "eager"
        self._shape = replace(self._shape, groups=1)
        self._pool = Pool(self._shape.layers, self._pool.rows, self._pool.capacity, cut=True)
        try:
            self._check_runs()
        except Exception as error:
            own = error if isinstance(error, CapabilityError) else f"{reason}, and by its own: {_first_line(error)}"
            raise refusal(model, own) from None

    @torch.inference_mode()
    def _check_runs(self) -> None:
        """Runs a prompt and a step that does not see the prompt's last token. The logits of a model of an untested type
        must be those without a cache. Raises CapabilityError, or what the model raises."""
        n = min(6, self._capacity)
        ids, positions = np.arange(n) % self._shape.vocabulary, np.arange(n)
        visible = np.tril(np.ones((n, n), dtype=np.bool_))
        if n > 1:
            visible[-1, -2] = False
            positions[-1] -= 1
        outputs: list[Tensor] = []
        for part in filter(len, (np.arange(n - 1), np.arange(n - 1, n))):
            queries = RowQueries(0, visible[part], positions[part], positions, np.arange(len(part)))
            rows = np.zeros_like(part)
            single = len(outputs) == 0 or self.own_attention
            plan, masks = self._row_plan(rows, part, queries) if single else self._plan(rows, part, [[queries]])
            cache = self._pool.row(0) if single else self._pool
            ids_, positions_, kept = self._tensors(ids[part], positions[part], np.arange(len(part)))
            outputs.append(self._call_model(self._model, ids_, positions_, masks, cache, plan, kept))
        logits = torch.cat(outputs)
        if logits.shape != (n, self._shape.vocabulary):
            raise CapabilityError(f"its logits are {list(logits.shape)} for {n} tokens")
        if not is_tested(self._model):
            self._check_same(logits, ids, positions, visible)

    def _check_same(self, logits: Tensor, ids: Ints, positions: Ints, visible: Bools) -> None:
        """Compares logits [n, vocabulary] with those of one forward pass without a cache. Raises CapabilityError."""
        config, n = self._model.config, len(ids)
        plain = self._attention if self.own_attention else "eager"
        queries = [RowQueries(0, visible, positions, positions, np.arange(n))]
        masks = {
            kind: torch.zeros(1, 1, n, n, dtype=self._model.dtype, device=self._device).masked_fill_(
                *self._tensors(~visibility(queries, n, n, window)), -torch.inf
            )
            for kind, window in self._shape.windows.items()
        }
        ids_, positions_ = self._tensors(ids, positions)
        with attending(config, plain), rope.fixed(self._ropes):
            out = self._model(
                input_ids=ids_[None],
                position_ids=positions_[None],
                attention_mask=masks if self._shape.by_type else masks.popitem()[1],
                use_cache=False,
            )
        expected = out.logits[0].float()
        spread = float(expected.std()) or 1.0
        worst = float((logits.float() - expected).abs().max()) / spread
        if not worst < (0.25 if self._model.dtype.itemsize < 4 else 1e-2):
            raise CapabilityError(f"with a cache it says something else than without, by {worst:.2g} of the spread")

    @staticmethod
    def _block_of(model: PreTrainedModel, chunk: int) -> int:
        """Prompt tokens that are read together. A GPU is faster with whole chunks. In float64 rounding is too small to
        change a token, so every token of a common prefix is used again."""
        if model.dtype == torch.float64:
            return 1
        return BLOCK if model.device.type == "cpu" else chunk

    # ------------------------------------------------------------------ prompts

    def _place(self, state: RequestState) -> bool:
        placed = super()._place(state)
        if placed:
            self._grow(state.slot + 1, 1)
        return placed

    @torch.inference_mode()
    def _copy(self, source: int, target: int, count: int) -> None:
        self._grow(target + 1, count)
        self._pool.copy(source, target, count)

    def _grow(self, rows: int, slots: int) -> None:
        """Makes room in the pool. Captured steps are dropped then, since the pool moves."""
        if self._pool.fits(rows, slots):
            return
        if self._graphs is not None:
            self._graphs.clear()
        self._pool.grow(rows, slots)

    @torch.inference_mode()
    def _prefill(self, state: RequestState, stop: int, logits: bool) -> Tensor | None:
        prompt, row, begin = state.prompt, state.slot, state.cached
        width = self._width(stop)
        slots = np.arange(begin, stop)
        queries = RowQueries(
            row,
            np.arange(width)[None] <= slots[:, None],
            slots,
            state.layout.positions[:width],
            np.arange(len(slots)),
        )
        outputs = self._run(
            ids=prompt[begin:stop],
            positions=slots,
            rows=np.full(len(slots), row),
            slots=slots,
            groups=[[queries]],
            keep=[len(slots) - 1] if logits else [],
            decoding=False,
        )
        return outputs[0].clone() if logits else None

    # ------------------------------------------------------------------ decoding

    @torch.inference_mode()
    def _forward(self, batch: Batch, keep: list[int]) -> Tensor:
        """Logits [len(keep), vocabulary] of one forward over the due tokens of some requests."""
        placed = [token for _, due in batch for token in due]
        queries, n = [], 0
        for state, due in batch:
            positions = state.layout.positions[: self._width(state.layout.used)]
            queries.append(
                RowQueries(
                    state.slot,
                    np.stack([mask_row(token.sees, len(positions)) for token in due]),
                    np.array([token.position for token in due]),
                    positions,
                    np.arange(n, n + len(due)),
                )
            )
            n += len(due)
        queries.sort(key=lambda one: one.row)
        ranges = grouped([one.row for one in queries], [one.width for one in queries])
        return self._run(
            ids=np.array([token.token for token in placed]),
            positions=np.array([token.position for token in placed]),
            rows=np.repeat([state.slot for state, _ in batch], [len(due) for _, due in batch]),
            slots=np.array([token.place for token in placed]),
            groups=[queries[i:j] for i, j in ranges],
            keep=keep,
        )

    def _run(
        self,
        *,
        ids: Ints,
        positions: Ints,
        rows: Ints,
        slots: Ints,
        groups: list[list[RowQueries]],
        keep: list[int],
        decoding: bool = True,
    ) -> Tensor:
        """Logits [len(keep), vocabulary] of one forward pass over packed tokens.

        ids, positions: [tokens].
        rows, slots: [tokens], where each is written.
        groups: what each request's tokens see; the rows that one attention call reads are one group.
        keep: the tokens whose logits are wanted.
        decoding: whether this is a decoding step, not a prompt.
        """
        queries = [one for group in groups for one in group]
        single = len(queries) == 1
        self._grow(1, max(one.width for one in queries))
        if not single and self.own_attention:
            return self._one_by_one(ids, positions, rows, slots, queries, keep)
        n, wanted, model = len(ids), len(keep), self._model
        if self._graphs is not None and decoding:
            shape = step_shape(queries, n, self._pool.held_rows, self._capacity)
            if shape is not None:
                return self._run_fixed(shape, (ids, positions, rows, slots), queries, keep)
        if self._compiled is not None and single and decoding and n <= BUCKETS[-1]:
            model = self._compiled
            bucket = next(size for size in BUCKETS if size >= n)
            queries = [queries[0].padded(bucket)]
            ids, positions, rows, slots = self._padded((ids, positions, rows, slots), bucket)
            keep = keep + [n - 1] * (bucket - len(keep))
        plan, masks = self._row_plan(rows, slots, queries[0]) if single else self._plan(rows, slots, groups)
        ids_, positions_, kept = self._tensors(ids, positions, np.array(keep, dtype=np.int64))
        cache = self._pool.row(queries[0].row) if single else self._pool
        return self._call_model(model, ids_, positions_, masks, cache, plan, kept)[:wanted]

    def _call_model(
        self,
        model: Any,
        ids: Tensor,
        positions: Tensor,
        masks: dict[str, Tensor],
        cache: PlannedCache,
        plan: Plan,
        kept: Tensor | int,
    ) -> Tensor:
        """Logits [kept, vocabulary] of the model's forward; kept 0: of all tokens."""
        cache.plan = plan
        options: dict[str, Any] = {} if self.own_attention else {"plan": plan}
        if self._keeps:
            options["logits_to_keep"] = kept
        try:
            with attending(self._model.config, self._attention), rope.fixed(self._ropes):
                out = model(
                    input_ids=ids[None],
                    position_ids=positions[None],
                    attention_mask=masks if self._shape.by_type else masks.popitem()[1],
                    past_key_values=cache,
                    use_cache=True,
                    **options,
                )
        finally:
            cache.plan = None
        logits: Tensor = out.logits[0]
        return logits if self._keeps or isinstance(kept, int) else logits[kept]

    def _one_by_one(
        self, ids: Ints, positions: Ints, rows: Ints, slots: Ints, queries: list[RowQueries], keep: list[int]
    ) -> Tensor:
        """As `_run`, in a forward pass for each row: for a model with its own attention."""
        logits: dict[int, Tensor] = {}
        for one in queries:
            tokens = one.tokens
            kept = [i for i, token in enumerate(tokens) if token in set(keep)]
            out = self._run(
                ids=ids[tokens],
                positions=positions[tokens],
                rows=rows[tokens],
                slots=slots[tokens],
                groups=[[replace(one, tokens=np.arange(len(tokens)))]],
                keep=kept,
            )
            logits |= {int(tokens[i]): row for i, row in zip(kept, out, strict=True)}
        return torch.stack([logits[token] for token in keep]) if keep else out

    def _padded(self, packed: Sequence[Ints], n: int) -> Ints:
        """ids, positions, rows and slots of n tokens, [4, n]: filling tokens are written to the spare slot."""
        padded = np.zeros((4, n), dtype=np.int64)
        padded[2:] = [[packed[2][0]], [self._pool.spare]]
        padded[:, : len(packed[0])] = packed
        return padded

    def _row_plan(self, rows: Ints, slots: Ints, queries: RowQueries) -> tuple[Plan, dict[str, Tensor]]:
        """The plan of a forward pass that reads one row, and the mask of each layer type."""
        count, width = queries.visible.shape
        masks = {
            kind: self._mask(*self._tensors(~visibility([queries], count, width, window))).view(1, 1, -1, width)
            for kind, window in self._shape.windows.items()
        }
        rows_, slots_ = self._tensors(rows, slots)
        return Plan(rows_, slots_, width), masks

    def _plan(self, rows: Ints, slots: Ints, groups: list[list[RowQueries]]) -> tuple[Plan, dict[str, Tensor]]:
        """The plan of a forward pass that reads several rows, and the flat mask of each layer type."""
        parts, start, queries_before = [], 0, 0
        query_of_token = np.empty(len(rows), dtype=np.int64)
        masks: dict[str, list[Tensor]] = {kind: [] for kind in self._shape.windows}
        for group in groups:
            first, last = group[0].row, group[-1].row + 1
            longest = max(len(one.tokens) for one in group)
            width = max(one.width for one in group)
            tokens = query_layout(group, range(first, last), longest, query_of_token, queries_before)
            for kind, window in self._shape.windows.items():
                masks[kind] += map(self._mask, self._tensors(~visibility(group, longest, width, window)))
            parts.append(Part(first, last, width, longest, self._tensors(tokens)[0], start))
            start += (last - first) * self._shape.groups * longest * width
            queries_before += (last - first) * longest
        rows_, slots_, queries_ = self._tensors(rows, slots, query_of_token)
        plan = Plan(rows_, slots_, max(part.width for part in parts), tuple(parts), queries_)
        return plan, {kind: (torch.cat(m) if len(m) > 1 else m[0])[None, None, None] for kind, m in masks.items()}

    # ------------------------------------------------------------------ steps of fixed shapes

    def _run_fixed(
        self, shape: StepShape, packed: Sequence[Ints], queries: list[RowQueries], keep: list[int]
    ) -> Tensor:
        """Logits [len(keep), vocabulary] of the packed tokens (ids, positions, rows, slots), by a captured step."""
        assert self._graphs is not None
        self._grow(1, shape.width)
        first = queries[0].row if shape.single else 0
        rows = range(first, first + 1 if shape.single else self._pool.held_rows)
        query_of_token = np.zeros(shape.tokens, dtype=np.int64)
        tokens = query_layout(queries, rows, shape.queries, query_of_token, 0)
        inputs: dict[str, NDArray[Any]] = {
            "tokens": np.concatenate([self._padded(packed, shape.tokens), query_of_token[None]]),
            "rows": np.array(rows[:1]) if shape.single else tokens,
        }
        for kind, window in self._shape.windows.items():
            hidden = np.ones((len(rows), shape.queries, shape.width), dtype=np.bool_)
            visible = visibility(queries, shape.queries, shape.width, window)
            hidden[queries[0].row - first :][: len(visible)] = ~visible
            inputs[kind] = hidden
        return self._graphs(shape, inputs)[keep]  # a copy: the next replay overwrites its output

    def _fixed_step(self, shape: StepShape, inputs: Inputs) -> Tensor:
        """Logits [tokens, vocabulary]: what a graph captures, from masks on."""
        ids, positions, rows, slots, query_of_token = inputs["tokens"].unbind()
        masks = {kind: self._mask(inputs[kind])[None, None, None] for kind in self._shape.windows}
        if shape.single:
            masks = {kind: mask.view(1, 1, -1, shape.width) for kind, mask in masks.items()}
            plan = Plan(rows, slots, shape.width, row=inputs["rows"])
        else:
            part = Part(0, self._pool.held_rows, shape.width, shape.queries, inputs["rows"], 0)
            plan = Plan(rows, slots, shape.width, (part,), query_of_token)
        return self._call_model(self._model, ids, positions, masks, self._pool, plan, 0)

    # ------------------------------------------------------------------ to the device

    def _mask(self, hidden: Tensor) -> Tensor:
        """[rows * groups * queries * width] of hidden [rows, queries, width]: -inf where hidden and 0 elsewhere, once
        for each query head of a group."""
        mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=self._device)[:, None]
        return mask.masked_fill_(hidden[:, None], -torch.inf).repeat(1, self._shape.groups, 1, 1).view(-1)

    def _tensors(self, *arrays: NDArray[Any]) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array).to(self._device) for array in arrays)

    def _width(self, used: int) -> int:
        return min(self._capacity, -(-used // ALIGNMENT) * ALIGNMENT)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
