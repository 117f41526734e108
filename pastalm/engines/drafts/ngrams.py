"""What followed each n-gram of some token sequences: the table behind the drafters that copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pastalm.engines.drafts.base import LONGEST, Evidence

SHORTEST = 1
"""Tokens of the shortest context that is matched."""
RECENT = 4
"""Continuations that are kept of each context: the last."""


class NGrams:
    """Continuations of contexts of `SHORTEST` to `LONGEST` tokens; of each the last few, with the place where each
    stands (-1: in no place of the response)."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self._next)

    def add(self, context: Sequence[int], token: int, place: int = -1) -> None:
        """Notes that a token follows the last tokens of a context."""
        context = tuple(context[-LONGEST:])
        for n in range(SHORTEST, len(context) + 1):
            known = self._next.setdefault(context[-n:], [])
            known.append((token, place))
            if len(known) > RECENT:
                del known[0]

    def add_all(self, tokens: Sequence[int]) -> None:
        """Notes a whole sequence."""
        for i in range(1, len(tokens)):
            self.add(tokens[max(0, i - LONGEST) : i], tokens[i])

    def matches(self, tail: tuple[int, ...]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The contexts that a tail ends in, the longest first: length, continuations in order of time."""
        for n in range(min(LONGEST, len(tail)), SHORTEST - 1, -1):
            if (known := self._next.get(tail[-n:])) is not None:
                yield n, known


def vote(length: int, continuations: Sequence[int]) -> tuple[int, Evidence]:
    """The token that most of the continuations of a context name, the last of them at a tie."""
    token = max(reversed(continuations), key=continuations.count)
    return token, (length, continuations.count(token) - (len(continuations) - continuations.count(token)))
