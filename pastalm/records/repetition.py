"""How far a text says the same words again: what greedy decoding of small models runs into."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

RUN = 4
"""Words in a row that count as said again when they come again."""


def _runs(text: str) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    return [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]


def repetition(text: str) -> float:
    """The share of runs of RUN words that the text has said before, 0 to 1."""
    runs = _runs(text)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def sameness(chunks: Sequence[str]) -> float:
    """How alike the two likest chunks are: Jaccard index of their runs of RUN words, 0 to 1."""
    sets = [found for chunk in chunks if (found := set(_runs(chunk)))]
    return max((len(a & b) / len(a | b) for a, b in combinations(sets, 2)), default=0.0)
