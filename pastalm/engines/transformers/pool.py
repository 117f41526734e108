"""The KV pool: keys and values of every layer, [rows, kv_heads, slots + 1, head_dim], a row for each request.

The pool grows: rows and slots double as they are needed, so memory follows what is in use and not `max_num_seqs` x
`max_model_len`. Growing moves the pool to other memory, so nothing may hold on to its tensors. The last slot of a row
is spare: tokens that only fill up a fixed shape are written there, and no mask shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_SLOTS = 256
"""Slots of a row at the start; doubled as they are needed."""


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring rows of the pool that are read in one attention call.

    first, last: the rows first .. last - 1.
    width: slots that are read of each.
    queries: queries of each row, the most that any of them has.
    tokens: [last - first, queries], the packed token at each query (any token where there is none).
    start: where the mask of these rows begins in the flat mask.
    """

    first: int
    last: int
    width: int
    queries: int
    tokens: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the packed tokens of one forward pass are written, and what they read.

    rows, slots: [tokens], where the keys and values of each token are written.
    width: slots that are read at most.
    parts: the rows that are read, in attention calls; empty where one row is read.
    queries: [tokens], the index of each token's query among the flattened queries of all parts; None for one row.
    row: [1], the one row that is read, where it is not chosen by the cache (`Pool.row`).
    """

    rows: Tensor
    slots: Tensor
    width: int
    parts: tuple[Part, ...] = ()
    queries: Tensor | None = None
    row: Tensor | None = None


class PlannedCache(Cache):
    """A cache for transformers whose forward passes follow a plan.

    capacity: slots of a row at most.
    cut: layers return only the planned width, for models with an attention of their own.
    plan: set during a forward pass.
    """

    def __init__(self, capacity: int, layers: list[CacheLayerMixin], *, cut: bool = False) -> None:
        self.capacity, self.cut = capacity, cut
        self.plan: Plan | None = None
        super().__init__(layers=layers)


class Pool(PlannedCache):
    """All rows of all layers.

    rows, capacity: the most rows, and slots of a row, that it can grow to.
    whole: slots are all allocated at the start (rows still grow), for steps that are compiled for one size.
    held_rows, held_slots: what is allocated now, the spare slot not counted.
    """

    def __init__(self, layers: int, rows: int, capacity: int, *, cut: bool = False, whole: bool = False) -> None:
        self.rows = rows
        self.held_rows = 1
        self.held_slots = capacity if whole else min(capacity, FIRST_SLOTS)
        super().__init__(capacity, [_PoolLayer(self) for _ in range(layers)], cut=cut)
        self._views: dict[int, PlannedCache] = {}

    @property
    def spare(self) -> int:
        """The slot that nothing sees."""
        return self.held_slots

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        held = (tensor for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None)
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def fits(self, rows: int, slots: int) -> bool:
        """Whether so many rows of so many slots are allocated."""
        return rows <= self.held_rows and slots <= self.held_slots

    @torch.inference_mode()
    def grow(self, rows: int, slots: int) -> None:
        """Allocates at least so many rows of so many slots and moves what is held, one layer after the other."""
        if self.fits(rows, slots):
            return
        before = self.held_rows, self.held_slots
        self.held_rows = _doubled(self.held_rows, rows, self.rows)
        self.held_slots = _doubled(self.held_slots, slots, self.capacity)
        self._views.clear()
        try:
            for layer in self.layers:
                layer.grow(*before)
        except BaseException:
            self.held_rows, self.held_slots = before  # layers that have grown hold more than that, which is harmless
            raise

    @torch.inference_mode()
    def copy(self, source: int, target: int, slots: int) -> None:
        """Copies the first slots of one row to another."""
        for layer in self.layers:
            for held in (layer.keys, layer.values):
                if held is not None:
                    held[target, :, :slots] = held[source, :, :slots]

    def row(self, index: int) -> PlannedCache:
        """One row as a cache of its own over the same memory; valid until the pool grows."""
        if index not in self._views:
            view = PlannedCache(self.capacity, [], cut=self.cut)
            view.layers += [_RowLayer(view, layer, index) for layer in self.layers]
            self._views[index] = view
        return self._views[index]


def _doubled(held: int, needed: int, most: int) -> int:
    """`held`, doubled until it is `needed`; `most` at most."""
    while held < needed:
        held *= 2
    return min(held, most)


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    is_sliding = False

    def __init__(self, cache: PlannedCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the tokens into their slots; returns all keys and values that the plan reads from."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._cache.plan
        assert plan is not None and self.keys is not None and self.values is not None
        self._write(self.keys, key_states, plan)
        self._write(self.values, value_states, plan)
        if plan.row is not None:
            # the row is an input of the step, so that one captured step serves every row
            return tuple(held[:, :, : plan.width].index_select(0, plan.row) for held in (self.keys, self.values))
        if self._cache.cut:
            return self.keys[:, :, : plan.width], self.values[:, :, : plan.width]
        return self.keys, self.values

    def _write(self, held: Tensor, states: Tensor, plan: Plan) -> None:
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return self._cache.plan.width if self._cache.plan else 0

    def get_max_length(self) -> int:
        return self._cache.capacity


class _PoolLayer(_Layer):
    """Keys and values of one layer, [rows, kv_heads, slots + 1, head_dim]."""

    _cache: Pool

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = map(self._allocated, (key_states, value_states))
        self.is_initialized = True

    def grow(self, rows: int, slots: int) -> None:
        """Moves rows and slots held so far to memory of the pool's size."""
        if self.is_initialized:
            self.keys = self._moved(self.keys, rows, slots)
            self.values = self._moved(self.values, rows, slots)

    def _moved(self, held: Tensor, rows: int, slots: int) -> Tensor:
        grown = self._allocated(held)
        grown[:rows, :, :slots] = held[:, :, :slots]
        return grown

    def _allocated(self, like: Tensor) -> Tensor:
        # zeros: a slot never written is hidden, but 0 * NaN would not be 0
        return like.new_zeros(self._cache.held_rows, like.shape[1], self._cache.held_slots + 1, like.shape[3])

    def _write(self, held: Tensor, states: Tensor, plan: Plan) -> None:
        held[plan.rows, :, plan.slots] = states[0].transpose(0, 1)


class _RowLayer(_Layer):
    """One row of a pool's layer, [1, kv_heads, slots + 1, head_dim]."""

    def __init__(self, cache: PlannedCache, whole: _PoolLayer, row: int) -> None:
        super().__init__(cache)
        self._whole, self._row = whole, row

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self._whole.is_initialized:
            self._whole.lazy_initialization(key_states, value_states)
        only = slice(self._row, self._row + 1)
        self.keys, self.values = self._whole.keys[only], self._whole.values[only]
        self.is_initialized = True

    def _write(self, held: Tensor, states: Tensor, plan: Plan) -> None:
        held.index_copy_(2, plan.slots, states)
