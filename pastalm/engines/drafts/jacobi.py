"""Jacobi: what the model would have said behind guesses that were wrong.

Behind a wrong guess the model has still been asked, and its answer to nearly the right context is often right one place
later. The n-grams of such answers are kept for the response.

Source: lookahead decoding (Fu et al., arXiv 2402.02057), its pool of n-grams from Jacobi iterations; models trained for
such iterations (CLLMs, arXiv 2403.00835) should profit more.
"""

from __future__ import annotations

from collections.abc import Sequence

from pastalm.engines.drafts.base import Context, Evidence, SilentDrafter
from pastalm.engines.drafts.ngrams import NGrams, vote


class Jacobi(SilentDrafter):
    name = "jacobi"

    def __init__(self) -> None:
        self._pool = NGrams()

    def rejected(self, context: Context, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._pool.add(context.tail, token)
            context = context.then(token)

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        for length, known in self._pool.matches(context.tail):
            return vote(length, [token for token, _ in known])
        return None
