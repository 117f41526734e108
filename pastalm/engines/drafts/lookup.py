"""Prompt lookup: what followed the same n-gram in the prompt, or in what else the thread sees.

Source: prompt lookup decoding (Saxena, 2023), which transformers has as `prompt_lookup_num_tokens`; here what a thread
sees also holds what it, its ancestors and the chunks it has joined wrote.
"""

from __future__ import annotations

from pastalm.engines.drafts.base import Context, Evidence, SilentDrafter
from pastalm.engines.drafts.ngrams import NGrams


class Lookup(SilentDrafter):
    """written: n-grams of the prompt and of all threads, which the response keeps up to date."""

    name = "lookup"

    def __init__(self, written: NGrams) -> None:
        self._written = written

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        sees = context.sees
        return self._written.guess(context.tail, lambda place: sees >> place & 1)
