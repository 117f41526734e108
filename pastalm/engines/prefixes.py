"""The prefix cache of engines whose requests own one place each of a pool: a range, or a row.

A place remembers the prompt that it began with, and the logits behind it. A request that begins like it prefills only
the rest: in that place if it is free, else in another, to which what they share is copied. Where rounding depends on
the rows of a pass, a prompt is read in blocks that begin at multiples of their length, and only whole ones are used
again. So what is remembered does not change an answer.
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
        usable = [self._usable(state, place) for place in range(len(self._memory))]
        nearest = max(range(len(usable)), key=lambda place: (usable[place], place in self._free, -place))
        own = nearest
        if nearest not in self._free:
            own = min(self._free, key=lambda place: (usable[place], len(self._memory[place]), place))
        if own != nearest and usable[nearest] > usable[own]:
            self._copy(nearest, own, usable[nearest])
        self._free.remove(own)
        state.slot = own
        self._take_over(state, nearest, usable[nearest])
        return True

    def _recall(self, state: RequestState) -> None:
        usable = [self._usable(state, place) for place in range(len(self._memory))]
        nearest = max(range(len(usable)), key=lambda place: (usable[place], -place))
        if usable[nearest] > state.cached:
            self._copy(nearest, state.slot, usable[nearest])
            self._take_over(state, nearest, usable[nearest])

    def _usable(self, state: RequestState, place: int) -> int:
        """How many of the prompt's tokens a place holds that need not be read again: all of them only where the logits
        behind them are known, or not needed because given tokens follow."""
        prompt, held = state.prompt, self._memory[place]
        shared = common_prefix(held, prompt)
        if shared == len(held) == len(prompt) and self._next[place] is not None:
            return shared
        read_again = 0 if state.main.last >= 0 else 1
        return min(shared, len(prompt) - read_again) // self._block * self._block

    def _take_over(self, state: RequestState, source: int, count: int) -> None:
        """The request's place holds so many tokens of the prompt, as another or the same place remembers them."""
        known = self._next[source] if count == len(state.prompt) == len(self._memory[source]) else None
        state.cached = count
        self._note(state.slot, state.prompt[:count], known)
        if state.main.last < 0:
            state.main.logits = known

    def _remember(self, state: RequestState, logits: Any) -> None:
        self._note(state.slot, state.prompt[: state.cached], logits)

    def _note(self, place: int, prompt: Ints, logits: Any) -> None:
        """Notes what a place begins with."""
        self._memory[place], self._next[place] = prompt.copy(), logits

    def _leave(self, state: RequestState) -> None:
        """The place is free; it keeps its prompt."""
        self._free.add(state.slot)

    def forget(self) -> None:
        """Clears the prefix cache."""
        self._memory = [prompt[:0] for prompt in self._memory]
        self._next = [None] * len(self._next)
