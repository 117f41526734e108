"""Siblings: what followed the same n-gram in text of the answer that the thread does not see.

Chunks of one answer share phrases and form: list numbers, topics, how a paragraph begins and ends. A sibling's text is
hidden from the thread but not from a guess, which the model confirms or not. (As `lookup`; no publication known.)
"""

from __future__ import annotations

from pastalm.engines.drafts.base import Context, Evidence, SilentDrafter
from pastalm.engines.drafts.ngrams import NGrams


class Siblings(SilentDrafter):
    """written: n-grams of the prompt and of all threads, which the response keeps up to date."""

    name = "siblings"

    def __init__(self, written: NGrams) -> None:
        self._written = written

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        sees = context.sees
        return self._written.guess(context.tail, lambda place: not sees >> place & 1)
