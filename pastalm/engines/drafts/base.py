"""What a drafter is, and what it knows of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, TypeAlias

from pastalm.core.events import Path
from pastalm.core.vocabulary import Vocabulary

Evidence: TypeAlias = tuple[int, int]
"""How well a guess is founded: the length of the context that matched, and how many continuations of it agree. Guesses
of one drafter with equal evidence share a hit rate."""

LONGEST = 4
"""Tokens of the longest context that is matched."""
BITS = 20
"""Of a token's id in a number that stands for several. Larger ids may be taken for others: a guess may be wrong."""

NGram: TypeAlias = int
"""Some tokens in a row as one number: cheaper to look up than a tuple of them."""
Tail: TypeAlias = tuple[NGram, ...]
"""The last token of a sequence, its last two, and so on: at most `LONGEST`."""


def extended(tail: Tail, token: int) -> Tail:
    """The tail of a sequence that goes on with a token."""
    return tuple([ngram << BITS | token for ngram in (1, *tail[: LONGEST - 1])])


def tail_of(tokens: Sequence[int]) -> Tail:
    """The tail of a sequence."""
    return reduce(extended, tokens[-LONGEST:], ())


def never(vocabulary: Vocabulary | None) -> frozenset[int]:
    """Tokens that are not worth a guess: behind them their thread samples nothing, or not from what they see."""
    if vocabulary is None:
        return frozenset()
    tags = vocabulary.tags
    return vocabulary.eos | ({tags.async_open, tags.async_close, tags.sync} if tags else set())


@dataclass(slots=True)
class Context:
    """Where a guess stands.

    path: the thread.
    tail: of what it sees, earlier guesses included.
    index: number of tokens of the thread before the guess.
    sees: bit p says whether the thread sees place p.
    """

    path: Path
    tail: Tail
    index: int
    sees: int

    def then(self, token: int) -> Context:
        """Where the next guess stands if this one is `token`."""
        return Context(self.path, extended(self.tail, token), self.index + 1, self.sees)


class Drafter(Protocol):
    """Guesses for one response."""

    @property
    def name(self) -> str: ...

    def write(self, context: Context, token: int, place: int) -> None:
        """A thread has a further token, in this place."""

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        """The next token of a thread and how well that is founded; None without an idea."""

    def close(self) -> None:
        """The response has ended."""


class SilentDrafter:
    """A drafter that takes notice of nothing: what others are made of."""

    def write(self, context: Context, token: int, place: int) -> None:
        pass

    def close(self) -> None:
        pass
