"""The engine over the native CPU step: quantised weights, one KV pool, one call of the library a step.

A request owns a range of the pool, one of `max_num_seqs`; memory is taken as slots are first written, not reserved.
Its `Layout` gives each thread runs of 16 slots of its own, so that what a token sees is whole words of 16 bits: a
fork, a join move nothing. All due tokens of all requests are rows of one pass, and a prompt is a pass of more rows.
Rows of one request read what they share once. (PASTA section 4.)

A range remembers the prompt that it began with (`prefixes`), token by token: a row of a pass is the same to the last
bit whatever other rows the pass has. No torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pastalm.core.layout import Placed
from pastalm.core.params import Request
from pastalm.engines.base import Capabilities, Schedule
from pastalm.engines.batching import (
    PREFILL_BUDGET,
    PREFILL_CHUNK,
    Batch,
    RequestState,
)
from pastalm.engines.native import library as lib
from pastalm.engines.native.model import CACHE_TYPES, PAGE, NativeModel, Pool, processors
from pastalm.engines.prefixes import PrefixCachingEngine
from pastalm.errors import CapabilityError, RequestError

CAPABILITIES = Capabilities(
    name="native",
    weights="Llama, Mistral, Qwen 2 and 3, SmolLM, Gemma 2 and 3, adapters; GGUF files; CPU",
    positions=("promised", "overlap"),
    drafts=True,
)
SHARE = 16
"""Pages that attention sums up as one task."""
SHORT = 256
"""Slots of an answer whose memory is not worth a millisecond of giving back: the next answer in that range takes it."""
MEASURING = 0.2
"""Seconds after which no further passes are measured when an engine is made."""
ROUNDS = 3
"""How often each pass is measured then."""
SPARE = 8
"""Slots of a range that are there for runs not filled, as a share of its tokens: 1 in so many."""


Order: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Pages in the order of summing, and the share to which each belongs."""


def unavailable() -> str:
    """Why this engine cannot run here and what to do, in one line; "" where it can."""
    return lib.unavailable()


def notes() -> str:
    """The kernels that were chosen for this CPU, and the threads of a step."""
    kernels: str = lib.library().pastalm_kernels().decode()
    return f"{kernels} kernels, {processors()} threads"


class NativeEngine(PrefixCachingEngine):
    """Decodes all threads of all requests in one forward pass per step, on CPUs.

    max_num_seqs: requests that decode at once; max_model_len: tokens of each, cut to the positions the model can take.
    cache_type: of keys and values, BF16 or F32. prefill_chunk, prefill_budget: as `BatchingEngine`'s. Raises
    RequestError, CapabilityError, ModelError.
    """

    _page = PAGE
    _rows_alike = True

    def __init__(
        self,
        model: NativeModel,
        *,
        max_num_seqs: int = 8,
        max_model_len: int = 2048,
        cache_type: str = "BF16",
        prefill_chunk: int = PREFILL_CHUNK,
        prefill_budget: int = PREFILL_BUDGET,
        schedule: Schedule | None = None,
    ) -> None:
        if min(max_num_seqs, max_model_len) < 1:
            raise RequestError("max_num_seqs and max_model_len must be 1 or more")
        if cache_type not in CACHE_TYPES:
            raise CapabilityError(f"unknown cache_type {cache_type!r}: one of {', '.join(CACHE_TYPES)}")
        most = model.architecture.max_positions
        capacity = min(max_model_len, most or max_model_len)
        super().__init__(
            replace(CAPABILITIES, max_model_len=capacity, max_num_seqs=max_num_seqs, max_position=most),
            vocabulary_size=model.architecture.vocabulary,
            schedule=schedule,
            prefill_chunk=prefill_chunk,
            prefill_budget=prefill_budget,
        )
        self._model = model
        self._range = -(-(capacity + capacity // SPARE) // PAGE) * PAGE
        self._pool = Pool(model, max_num_seqs * self._range, cache_type)
        self._orders: dict[str, Order] = {}
        self._drafting.costs.begin(self._measured())

    def _measured(self) -> dict[int, float]:
        """Seconds of passes by their rows, the shortest of some, as many as a short while allows. They take turns, so
        that what else the machine does meets all alike."""
        seconds: dict[int, float] = {}
        sizes = [rows for rows in (1, 2, 4, 8, 16) if rows <= self._range]
        self._pass(1)  # reads the weights from disk
        begun = time.perf_counter()
        for rows in sizes * ROUNDS:
            seconds[rows] = min(self._pass(rows), seconds.get(rows, math.inf))
            if time.perf_counter() - begun > MEASURING:
                break
        self._pool.clear(0, min(16, self._range))
        return seconds

    def _pass(self, rows: int) -> float:
        """Seconds of a pass over some tokens, each of which sees those before it."""
        places = np.arange(rows, dtype=np.int32)
        groups = self._groups([(0, _causal(places))])
        begun = time.perf_counter()
        self._pool.step(np.zeros(rows, dtype=np.int32), places, places, groups, places)
        return time.perf_counter() - begun

    def close(self) -> None:
        """Frees the pool and the model; the engine cannot be used any more."""
        self._pool.close()
        self._model.close()

    # ------------------------------------------------------------------ ranges and prompts

    def _room(self, request: Request) -> int:
        return self._range

    def _copy(self, source: int, target: int, count: int) -> None:
        self._pool.copy(source * self._range, target * self._range, count)

    def _leave(self, state: RequestState) -> None:
        """The range is free; what a long answer took of it is given back, the prompt is kept."""
        base = state.slot * self._range
        kept = -(-len(state.prompt) // PAGE) * PAGE
        used = -(-state.layout.used // PAGE) * PAGE
        if used - kept > SHORT:
            self._pool.clear(base + kept, used - kept)
        super()._leave(state)
        self._orders.pop(state.request.id, None)

    def _prefill(self, state: RequestState, stop: int, logits: bool) -> NDArray[np.float32] | None:
        prompt, own = state.prompt, state.slot
        where = np.arange(state.cached, stop, dtype=np.int32)
        rows = self._pool.step(
            prompt[where].astype(np.int32),
            where,
            where + np.int32(own * self._range),
            self._groups([(own, _causal(where))]),
            np.array([len(where) - 1] if logits else [], dtype=np.int32),
        )
        return rows[0].copy() if logits else None

    # ------------------------------------------------------------------ decoding

    def _forward(self, batch: Batch, keep: list[int]) -> NDArray[np.float32]:
        """Logits [len(keep), vocabulary] of one pass over the due tokens of some requests."""
        placed = [token for _, due in batch for token in due]
        base = np.repeat([r.slot * self._range for r, _ in batch], [len(due) for _, due in batch])
        logits = self._pool.step(
            np.array([token.token for token in placed], dtype=np.int32),
            np.array([token.position for token in placed], dtype=np.int32),
            (base + [token.place for token in placed]).astype(np.int32),
            self._groups(
                [(state.slot, _words(state, due)) for state, due in batch], [self._order(state) for state, _ in batch]
            ),
            np.array(keep, dtype=np.int32),
        )
        self._likeliest = self._pool.likeliest.tolist()
        return logits

    def _order(self, state: RequestState) -> Order:
        """The pages of a request in the order in which attention sums over them: thread by thread, a few pages of one
        thread at a time. So a sum does not depend on when its pages were begun, nor on what other threads do."""
        name, runs = state.request.id, state.layout.runs
        order = self._orders.get(name)
        if order is None or len(order[0]) != sum(map(len, runs.values())):
            own = [np.array(runs[path], dtype=np.int32) for path in sorted(runs)]
            begins = np.concatenate([np.arange(len(pages)) % SHARE == 0 for pages in own])
            order = np.concatenate(own), np.cumsum(begins, dtype=np.int32) - np.int32(1)
            self._orders[name] = order
        return order

    def _groups(self, seen: Sequence[tuple[int, NDArray[np.uint8]]], orders: Sequence[Order] = ()) -> Any:
        """The requests of a pass for the library, an array of its `Group`, which keeps its arrays alive.

        seen: of each request its range, and what each of its tokens sees, as words [tokens, bytes].
        orders: of each request; none: as the pages lie.
        """
        groups: Any = (lib.Group * len(seen))()
        first = 0
        for i, (own, words) in enumerate(seen):
            count, size = words.shape
            addresses = (array.ctypes.data for array in orders[i]) if orders else (None, None)
            groups[i] = lib.Group(first, count, own * self._range, size // 2, words.ctypes.data, *addresses)
            first += count
        groups.kept = seen, orders
        return groups


def _causal(places: NDArray[np.int32]) -> NDArray[np.uint8]:
    """As `_words`, of tokens that lie one behind the other and see all before them."""
    slots = np.arange(-(-(int(places[-1]) + 1) // PAGE) * PAGE)
    return np.packbits(slots <= places[:, None], axis=1, bitorder="little")


def _words(state: RequestState, due: Sequence[Placed]) -> NDArray[np.uint8]:
    """What each token sees of its range, [tokens, bytes], two bytes a page of 16 slots."""
    size = 2 * -(-state.layout.used // PAGE)
    joined = b"".join([token.sees.to_bytes(size, "little") for token in due])
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(due), size)
