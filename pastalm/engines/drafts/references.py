"""References: what followed the same n-gram in texts that the user gives along, from which the answer copies.

Source: LLMA, "Inference with Reference" (Yang et al., arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

from pastalm.engines.drafts.base import Context, Evidence, SilentDrafter
from pastalm.engines.drafts.ngrams import NGrams

_TABLES: WeakValueDictionary[tuple[tuple[int, ...], ...], NGrams] = WeakValueDictionary()
"""The tables in use, by references: all choices of a request share one."""


class References(SilentDrafter):
    """references: token ids of each text."""

    name = "references"

    def __init__(self, references: Sequence[Sequence[int]]) -> None:
        key = tuple(map(tuple, references))
        ngrams = _TABLES.get(key)
        if ngrams is None:
            ngrams = _TABLES[key] = NGrams()
            for tokens in key:
                ngrams.add_all(tokens)
        self._ngrams = ngrams

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        return self._ngrams.guess(context.tail)
