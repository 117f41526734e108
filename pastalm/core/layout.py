"""The attention mask and position ids of one response, kept up to date: which token sees which, and at what position.

A `Layout` follows the threads of a response (fork, decode, join) in any order that respects cause and effect. It gives
every token a place (its slot in the KV cache, in order of decoding), a position id, and the set of places it sees.
Engines drive it with events while decoding; training drives it with the events of a finished document
(`train/packing.py`). What a token sees depends only on what was joined before it, so both compute the same model.

What a thread sees is one integer, in which bit p stands for place p: a fork copies its parent's, decoding sets one bit,
a join is an OR. Keys and values never move.

Places come in runs of `page`, each filled by one thread, so that an engine whose attention reads `page` slots at once
wastes little where threads decode side by side. Visibility is by bit: which thread fills a run matters for speed alone.

Position policies, with p the position of a promise's last token and N its length:

    promised   the child starts at p+1; its parent goes on at p+1+N+2 (the tags of the chunk are 2)
    overlap    both go on at p+1; after a join, at the largest visible position + 1
    serial     no masked pass: each stretch of a thread is an ordinary causal row (`engines/completions/serial.py`
               while decoding, `train/packing.py` for training)

Source: PASTA (arXiv 2502.11517), section 4 (interpreter, positions "Pred-10X").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path
from pastalm.core.language import CHUNK_TAGS
from pastalm.errors import CapabilityError

Policy: TypeAlias = Literal["promised", "overlap", "serial"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True)
class Placed:
    """A token in its place. sees: bit p says whether it sees place p; its own is set."""

    path: Path
    token: int
    place: int
    position: int
    sees: int


class Layout:
    """The threads of one response over `capacity` places, the first `prompt_length` of them the prompt.

    used: all places that hold a token are below. page: places in a run. A thread whose run is full begins the next
    fresh one; where none is left it takes over the rest of another thread's, so that whatever `capacity` holds with
    page=1 it holds with any. The main thread goes on in the prompt's last run. Raises CapabilityError for the policy
    `serial` (it is not one masked pass), IndexError when full.
    """

    def __init__(self, prompt_length: int, capacity: int, policy: Policy = "promised", *, page: int = 1) -> None:
        if policy not in ("promised", "overlap"):
            raise CapabilityError(f"positions={policy!r} is not one masked pass; use promised or overlap")
        self.policy = policy
        self.capacity = capacity
        self.page = page
        self.used = prompt_length
        self.positions = np.zeros(capacity, dtype=np.int64)
        self.positions[:prompt_length] = np.arange(prompt_length)
        self._sees: dict[Path, int] = {(): (1 << prompt_length) - 1}
        self._next: dict[Path, int] = {(): prompt_length}
        self._open: dict[Path, int] = {}
        """Of each thread whose run is not full, the first free place of that run."""
        self._kept: dict[Path, deque[int]] = {}
        """Of each thread with guesses, the places that its next tokens take."""
        self.runs: dict[Path, list[int]] = {(): list(range(-(-prompt_length // page)))}
        """The runs that each thread has begun, in order: what lies where depends on its own tokens alone, as long as
        there are fresh ones."""
        self._idle: dict[Path, int] = {}
        """How little a thread would miss its run: 2 one that is finished, 1 one that waits."""
        self._fill((), prompt_length)

    def fork(self, path: Path, promised: int) -> None:
        """Thread `path` begins where its parent stands now."""
        parent = path[:-1]
        self._sees[path] = self._sees[parent]
        self._next[path] = self._next[parent]
        if self.policy == "promised":
            self._next[parent] += promised + CHUNK_TAGS

    def decode(self, path: Path, token: int) -> Placed:
        """The next token of thread `path`."""
        place, position = self._take(path), self._next[path]
        self.positions[place] = position
        sees = self._sees[path] = self._sees[path] | 1 << place
        self._next[path] = position + 1
        return Placed(path, token, place, position, sees)

    def guess(self, path: Path, tokens: Sequence[int]) -> list[Placed]:
        """Where the next tokens of thread `path` lie if they are these; fewer where no place is free.

        The thread does not have them yet and nobody sees them. Their places are kept for its next tokens, whatever
        those are, so that a guess that comes true lies where it was fed.
        """
        kept = self._kept.setdefault(path, deque())
        while len(kept) < len(tokens) and (place := self._fresh(path)) is not None:
            kept.append(place)
        placed, sees = list[Placed](), self._sees[path]
        for position, (token, place) in enumerate(zip(tokens, kept, strict=False), self._next[path]):
            self.positions[place] = position
            sees |= 1 << place
            placed.append(Placed(path, token, place, position, sees))
        return placed

    def join(self, path: Path, children: Sequence[Path]) -> None:
        """From now on thread `path` sees what each of `children` sees."""
        for child in children:
            self._sees[path] |= self._sees[child]
            if self.policy == "overlap":  # what a thread sees ends right before its next position
                self._next[path] = max(self._next[path], self._next[child])

    def apply(self, event: Event) -> list[Placed]:
        """Does what an event means; the tokens it places, in order."""
        path, placed = event.path, list[Placed]()
        if isinstance(event, Decoded):
            placed.append(self.decode(path, event.token))
        elif isinstance(event, Forked) and path:
            self.fork(path, event.promised)
        elif isinstance(event, Joined):
            self.join(path, event.children)
            self._idle.pop(path, None)
        elif isinstance(event, Blocked):
            self._idle[path] = 1
        elif isinstance(event, Finished):
            self._idle[path] = 2
        for token in event.forced:
            placed.append(self.decode(path, token))
        return placed

    def sees(self, path: Path) -> int:
        """The places that thread `path` sees now, as bits."""
        return self._sees[path]

    def next_position(self, path: Path) -> int:
        """The position of the next token of thread `path`."""
        return self._next[path]

    def _take(self, path: Path) -> int:
        """The place of the next token of thread `path`: one kept for it, a fresh one, one that another thread has."""
        if kept := self._kept.get(path):
            return kept.popleft()
        place = self._fresh(path)
        return self._taken_over(path) if place is None else place

    def _fresh(self, path: Path) -> int | None:
        """The next place of the thread's own run, or the first of a fresh run. None where there is none left."""
        place = self._open.pop(path, None)
        if place is None:
            place = -(-self.used // self.page) * self.page
            if place >= self.capacity:
                return None
            self.runs.setdefault(path, []).append(place // self.page)
        self._fill(path, place + 1)
        return place

    def _taken_over(self, path: Path) -> int:
        """A place from the thread that would miss it least: the rest of its run, else the last one kept for it."""
        others = [other for other in self._open.keys() | self._kept.keys() if other in self._open or self._kept[other]]
        if not others:
            raise IndexError(f"all {self.capacity} places are taken")
        other = max(sorted(others), key=lambda other: self._idle.get(other, 0))
        if other not in self._open:
            return self._kept[other].pop()
        place = self._open.pop(other)
        self._fill(path, place + 1)
        return place

    def _fill(self, path: Path, place: int) -> None:
        """Notes that the thread's run is filled up to `place`, where it may go on."""
        self.used = max(self.used, place)
        if place % self.page and place < self.capacity:
            self._open[path] = place
