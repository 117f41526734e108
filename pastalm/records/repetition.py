"""n-gram repetition, a common failure of small models under greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

N = 4
"""Words in an n-gram."""
SHARED = 6
"""Words in a row that two parts of an answer do not share by chance."""


def _ngrams(text: str, n: int = N) -> list[tuple[str, ...]]:
    words = text.casefold().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repetition(text: str) -> float:
    """The share of a text's word 4-grams that repeat an earlier one, 0 to 1."""
    ngrams = _ngrams(text)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def sameness(chunks: Sequence[str]) -> float:
    """The similarity of the two most similar chunks: Jaccard index of their word 4-grams, 0 to 1."""
    sets = [ngrams for chunk in chunks if (ngrams := set(_ngrams(chunk)))]
    return max((len(a & b) / len(a | b) for a, b in combinations(sets, 2)), default=0.0)


def retold(parts: Sequence[str]) -> float:
    """The share of the parts that say again 6 words in a row of an earlier one, 0 to 1."""
    seen, again = set[tuple[str, ...]](), 0
    for part in parts:
        ngrams = set(_ngrams(part, SHARED))
        again += not seen.isdisjoint(ngrams)
        seen |= ngrams
    return again / len(parts) if parts else 0.0
