"""What followed each n-gram of some token sequences: the table behind the drafters that copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from pastalm.engines.drafts.base import Evidence, NGram, Tail, extended

RECENT = 4
"""Continuations that are kept of each context: the last."""

Continuation: TypeAlias = tuple[int, int]
"""A token and the place where it stands."""


class NGrams:
    """Continuations of contexts of 1 to `LONGEST` tokens: of each the last few, with the places where they stand (-1:
    none in the response)."""

    def __init__(self) -> None:
        self._next: dict[NGram, list[Continuation]] = {}
        self._looked_up: tuple[Tail, list[list[Continuation]]] = ((), [])

    def __len__(self) -> int:
        return len(self._next)

    def add(self, tail: Tail, token: int, place: int = -1) -> None:
        """Notes that a token follows a tail."""
        continuation = (token, place)
        for ngram in tail:
            known = self._next.setdefault(ngram, [])
            known.append(continuation)
            if len(known) > RECENT:
                del known[0]
        self._looked_up = ((), [])

    def add_all(self, tokens: Sequence[int]) -> None:
        """Notes a whole sequence."""
        tail: Tail = ()
        for i, token in enumerate(tokens):
            self.add(tail, token, i)
            tail = extended(tail, token)

    def guess(self, tail: Tail, counts: Callable[[int], int] | None = None) -> tuple[int, Evidence] | None:
        """What most continuations name of the longest context that has some whose place counts (None: all do)."""
        found = self._found(tail)
        for n in range(len(found), 0, -1):
            known = found[n - 1]
            if counts is not None:
                known = [continuation for continuation in known if counts(continuation[1])]
            if known:
                return vote(n, [token for token, _ in known])
        return None

    def _found(self, tail: Tail) -> list[list[Continuation]]:
        """The continuations of a tail's n-grams, from the shortest to the longest that has some. Drafters that share a
        table ask for the same tail by turns: it is looked up once."""
        looked_up, found = self._looked_up
        if looked_up is tail:
            return found
        found = []
        for ngram in tail:
            if (known := self._next.get(ngram)) is None:
                break  # what no short context has, no longer one has
            found.append(known)
        self._looked_up = (tail, found)
        return found


def vote(length: int, continuations: Sequence[int]) -> tuple[int, Evidence]:
    """The token that most of the continuations of a context name, the last of them at a tie."""
    total = len(continuations)
    if total == 1:
        return continuations[0], (length, 1)
    token = max(reversed(continuations), key=continuations.count)
    return token, (length, 2 * continuations.count(token) - total)
