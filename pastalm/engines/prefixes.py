"""The prefix cache of engines whose requests own one place each of a pool: a range, or a row.

A place remembers the prompt that it began with, and the logits behind it. A request that begins like it prefills only
the rest: in that place if it is free, else in another, to which what they share is copied. A prompt is read in blocks
that begin at multiples of their length, and only whole ones are used again: so what is remembered does not change an
answer.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from pastalm.engines.base import Capabilities
from pastalm.engines.batching import BatchingEngine, Ints, RequestState, common_prefix


class PrefixCachingEngine(BatchingEngine):
    """A `BatchingEngine` with `max_num_seqs` places. `state.slot` is the number of a request's."""

    def __init__(self, capabilities: Capabilities, **options: Any) -> None:
        super().__init__(capabilities, **options)
        places = capabilities.max_num_seqs
        self._memory: list[Ints] = [np.empty(0, dtype=np.int64)] * places
        self._next: list[Any] = [None] * places
        """Of each place the logits [vocabulary] behind the prompt that it remembers (None: they are not known)."""
        self._free = set(range(places))

    @abstractmethod
    def _copy(self, source: int, target: int, count: int) -> None:
        """Copies keys and values of the first tokens of one place to another."""

    def _place(self, state: RequestState) -> bool:
        """The free place that remembers most of the prompt, or any with a copy of what another remembers."""
        if not self._free:
            return False
        prompt = state.prompt
        shared = [common_prefix(held, prompt) for held in self._memory]
        nearest = max(range(len(shared)), key=lambda place: (shared[place], place in self._free, -place))
        own = nearest
        if nearest not in self._free:
            own = min(self._free, key=lambda place: (shared[place], len(self._memory[place]), place))
        known = self._next[nearest] if len(self._memory[nearest]) == shared[nearest] == len(prompt) else None
        begin = len(prompt) if known is not None else min(shared[nearest], len(prompt) - 1) // self._block * self._block
        if own != nearest and begin > shared[own]:
            self._copy(nearest, own, begin)
        self._remember(own, prompt[:begin], known)
        if state.main.last < 0:
            state.main.logits = known
        self._free.remove(own)
        state.slot, state.cached = own, begin
        return True

    def _recall(self, state: RequestState) -> None:
        prompt, own = state.prompt, state.slot
        for source, logits in enumerate(self._next):
            if logits is not None and np.array_equal(self._memory[source], prompt):
                self._copy(source, own, len(prompt))
                self._remember(own, prompt, logits)
                state.cached = len(prompt)
                state.main.logits = logits if state.main.last < 0 else None
                return

    def _remember(self, place: int, prompt: Ints, logits: Any) -> None:
        """Notes what a place begins with."""
        self._memory[place], self._next[place] = prompt.copy(), logits

    def _leave(self, state: RequestState) -> None:
        """The place is free; it keeps its prompt."""
        self._free.add(state.slot)

    def forget(self) -> None:
        """Clears the prefix cache."""
        self._memory = [prompt[:0] for prompt in self._memory]
        self._next = [None] * len(self._next)
