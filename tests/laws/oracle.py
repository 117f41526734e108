"""Who sees whom and at which position, by brute force from SPEC.md, apart from pastalm.core.layout.

A response is written down as what each thread did, in its own order (`Record`); `Linear` puts that
into linear form and answers, token by token, by the text of the specification.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pastalm.core.events import Decoded, Event, Forked, Joined, Path
from pastalm.core.layout import Policy


@dataclass(frozen=True)
class Fed:
    """A token of a thread. joins: children that it joins, for a sync."""

    token: int
    joins: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Fork:
    """The thread promised `promised` tokens to thread `child`, right after its last token."""

    child: Path
    promised: int


@dataclass
class Record:
    """What each thread of a response did, in order."""

    threads: dict[Path, list[Fed | Fork]] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        if isinstance(event, Forked):
            self.threads[event.path] = []
            if event.path:
                self.threads[event.path[:-1]].append(Fork(event.path, event.promised))
        own = self.threads[event.path]
        if isinstance(event, Decoded):
            own.append(Fed(event.token))
        for i, token in enumerate(event.forced):
            joins = event.children if isinstance(event, Joined) and i == 0 else ()
            own.append(Fed(token, joins))

    @classmethod
    def of(cls, events: Iterable[Event]) -> Record:
        record = cls()
        for event in events:
            record.add(event)
        return record


@dataclass
class Linear:
    """A response in linear form behind its prompt; n tokens in all, prompt included."""

    prompt: tuple[int, ...]
    record: Record
    policy: Policy = "promised"

    @cached_property
    def entries(self) -> list[tuple[Path, int, Fed]]:
        """(thread, index within it, token) in linear order; the prompt belongs to the main thread, with
        negative indices."""
        n = len(self.prompt)
        head: list[tuple[Path, int, Fed]] = [((), i - n, Fed(t)) for i, t in enumerate(self.prompt)]
        return head + self._expanded(())

    def _expanded(self, path: Path) -> list[tuple[Path, int, Fed]]:
        out: list[tuple[Path, int, Fed]] = []
        index = 0
        for item in self.record.threads[path]:
            if isinstance(item, Fork):
                out += self._expanded(item.child)
            else:
                out.append((path, index, item))
                index += 1
        return out

    @property
    def tokens(self) -> NDArray[np.int64]:
        return np.array([fed.token for _, _, fed in self.entries], dtype=np.int64)

    @cached_property
    def place(self) -> dict[tuple[Path, int], int]:
        """Linear place of token `index` of a thread."""
        return {(path, index): i for i, (path, index, _) in enumerate(self.entries)}

    def _joined(self, chunk: Path, thread: Path, at: int) -> bool:
        """Whether a sync of `thread` at a place <= at made `chunk` visible to it."""
        for place, (path, _, fed) in enumerate(self.entries[: at + 1]):
            if path == thread:
                for child in fed.joins:
                    if child == chunk or self._joined(chunk, child, place):
                        return True
        return False

    def sees(self, i: int, j: int) -> bool:
        if j > i:
            return False
        reader, written = self.entries[i][0], self.entries[j][0]
        lineage = [reader[:k] for k in range(len(reader) + 1)]
        return any(written == t or self._joined(written, t, i) for t in lineage)

    @cached_property
    def visible(self) -> NDArray[np.bool_]:
        """[n, n]: row sees column."""
        n = len(self.entries)
        seen: dict[tuple[Path, Path, int], bool] = {}
        out = np.zeros((n, n), dtype=np.bool_)
        syncs = [i for i, (_, _, fed) in enumerate(self.entries) if fed.joins]
        for i in range(n):
            since = max((s for s in syncs if s <= i), default=-1)
            for j in range(i + 1):
                # between two syncs, only the threads decide
                key = (self.entries[i][0], self.entries[j][0], since)
                if key not in seen:
                    seen[key] = self.sees(i, j)
                out[i, j] = seen[key]
        return out

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """[n]: position ids by the policy, computed in linear order."""
        at: list[int] = []
        last: dict[Path, int] = {}
        shift: dict[Path, int] = {}
        forks = {
            item.child: item.promised
            for items in self.record.threads.values()
            for item in items
            if isinstance(item, Fork)
        }
        for i, (path, index, fed) in enumerate(self.entries):
            if path and index == 0:
                p = last[path[:-1]] + shift.get(path[:-1], 0)
                if self.policy == "promised":
                    shift[path[:-1]] = shift.get(path[:-1], 0) + forks[path] + 2
                position = p + 1
            else:
                position = last.get(path, -1) + shift.pop(path, 0) + 1
            if fed.joins and self.policy == "overlap":
                position = max(at[j] for j in range(i) if self.sees(i, j)) + 1
            last[path] = position
            at.append(position)
        return np.array(at, dtype=np.int64)
