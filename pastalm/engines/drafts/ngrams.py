"""What followed each n-gram of some token sequences: the table behind the drafters that copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from pastalm.engines.drafts.base import LONGEST, Evidence

RECENT = 4
"""Continuations that are kept of each context: the last."""

Continuation: TypeAlias = tuple[int, int]
"""A token and the place where it stands."""


class NGrams:
    """Continuations of contexts of 1 to `LONGEST` tokens: of each the last few, with the places where they stand (-1:
    none in the response)."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], list[Continuation]] = {}

    def __len__(self) -> int:
        return len(self._next)

    def add(self, tail: tuple[int, ...], token: int, place: int = -1) -> None:
        """Notes that a token follows a tail of at most `LONGEST` tokens."""
        continuation = (token, place)
        for n in range(1, len(tail) + 1):
            known = self._next.setdefault(tail[-n:], [])
            known.append(continuation)
            if len(known) > RECENT:
                del known[0]

    def add_all(self, tokens: Sequence[int]) -> None:
        """Notes a whole sequence."""
        for i in range(1, len(tokens)):
            self.add(tuple(tokens[max(0, i - LONGEST) : i]), tokens[i], i)

    def guess(self, tail: tuple[int, ...], counts: Callable[[int], int] | None = None) -> tuple[int, Evidence] | None:
        """What most continuations name of the longest context that has some whose place counts (None: all do)."""
        table, found = self._next, list[list[Continuation]]()
        for n in range(1, len(tail) + 1):
            if (known := table.get(tail[-n:])) is None:
                break  # what no short context has, no longer one has
            found.append(known)
        for n in range(len(found), 0, -1):
            if tokens := [token for token, place in found[n - 1] if counts is None or counts(place)]:
                return vote(n, tokens)
        return None


def vote(length: int, continuations: Sequence[int]) -> tuple[int, Evidence]:
    """The token that most of the continuations of a context name, the last of them at a tie."""
    total = len(continuations)
    if total == 1:
        return continuations[0], (length, 1)
    token = max(reversed(continuations), key=continuations.count)
    return token, (length, 2 * continuations.count(token) - total)
