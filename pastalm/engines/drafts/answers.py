"""Earlier answers: what followed the same n-gram in answers that the engine gave before, to the same owner.

Source: as REST (He et al., arXiv 2311.08252), which drafts from a datastore; here the store is what the model itself
has said lately, so it needs no building, and holds the model's own phrases.
"""

from __future__ import annotations

from collections import OrderedDict

from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.drafts.base import Context, Evidence, SilentDrafter, Tail, never
from pastalm.engines.drafts.ngrams import NGrams

OWNERS = 16
"""Owners whose answers are kept: those seen last."""
MOST = 150_000
"""Contexts of one generation of a store, some 40,000 tokens. Two are kept: about 60 MB at most."""


class Store:
    """The n-grams of the last answers to one owner, in two generations: the older goes when the newer is full."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._newer, self._older = NGrams(), NGrams()

    def add(self, tail: Tail, token: int) -> None:
        self._newer.add(tail, token)
        if len(self._newer) >= self._most:
            self._newer, self._older = NGrams(), self._newer

    def guess(self, tail: Tail) -> tuple[int, Evidence] | None:
        newer = self._newer.guess(tail)
        if not len(self._older) or newer is not None and newer[1][0] == len(tail):
            return newer
        guesses = [guess for guess in (newer, self._older.guess(tail)) if guess is not None]
        return max(guesses, key=lambda guess: guess[1][0], default=None)  # of equal lengths the newer


class Stores:
    """The stores of an engine, by owner."""

    def __init__(self) -> None:
        self._stores: OrderedDict[str, Store] = OrderedDict()

    def of(self, owner: str) -> Store:
        store = self._stores.setdefault(owner, Store())
        self._stores.move_to_end(owner)
        if len(self._stores) > OWNERS:
            self._stores.popitem(last=False)
        return store


class Answers(SilentDrafter):
    """Guesses from the store, and writes the answer into it once it has ended."""

    name = "answers"

    def __init__(self, store: Store, vocabulary: Vocabulary | None) -> None:
        self._store = store
        self._never = never(vocabulary)
        self._written: list[tuple[Tail, int]] = []

    def write(self, context: Context, token: int, place: int) -> None:
        if token not in self._never:
            self._written.append((context.tail, token))

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        return self._store.guess(context.tail)

    def close(self) -> None:
        for tail, token in self._written:
            self._store.add(tail, token)
        self._written = []
