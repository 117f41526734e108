"""What an engine keeps for drafts: hit rates, earlier answers, and what its passes cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pastalm.core.params import Request
from pastalm.engines.drafts.answers import Answers, Stores
from pastalm.engines.drafts.base import Drafter
from pastalm.engines.drafts.budget import USUAL, Candidate, StepCosts, choose
from pastalm.engines.drafts.lookup import Lookup
from pastalm.engines.drafts.ngrams import NGrams
from pastalm.engines.drafts.promises import Promises
from pastalm.engines.drafts.references import References
from pastalm.engines.drafts.response import Rates, ResponseDrafts
from pastalm.engines.drafts.siblings import Siblings

Make = Callable[[Request, NGrams, Stores], Drafter]
MAKERS: dict[str, Make] = {
    "lookup": lambda request, written, stores: Lookup(written),
    "siblings": lambda request, written, stores: Siblings(written),
    "promises": lambda request, written, stores: Promises(request.vocabulary),
    "references": lambda request, written, stores: References(request.reference_token_ids),
    "answers": lambda request, written, stores: Answers(stores.of(request.owner), request.vocabulary),
}
"""How the drafter of each name is made (`core.params.DRAFTERS`)."""


LIKELY = 0.7
"""Few guesses come true more often than this."""


class Drafting:
    """Makes the drafts of an engine's responses and chooses what is fed.

    learns: whether measured costs, hit rates of all responses and, with `drafts="auto"`, earlier answers count. They
        must not where the rounding of a pass depends on its rows, or the same request would not give the same tokens
        again: what is fed then depends on the response alone.
    costs: of a pass by its rows.
    """

    def __init__(self, *, learns: bool) -> None:
        self.costs = StepCosts(None if learns else lambda rows: 1 + USUAL * rows)
        self._learns = learns
        self._rates = Rates()
        self._stores = Stores()

    def of(self, request: Request) -> ResponseDrafts | None:
        """The drafts of a response; None where it wants none."""
        names = request.params.drafters
        if request.params.drafts == "auto" and not self._learns:
            names = tuple(name for name in names if name != "answers")
        if not names:
            return None
        written = NGrams()
        drafters = [MAKERS[name](request, written, self._stores) for name in names]
        rates = self._rates if self._learns else Rates()
        return ResponseDrafts(request, written, drafters, rates)

    def pays(self, rows: int, tokens: int) -> bool:
        """Whether guesses that are as likely as the best mostly are would be worth their rows in a pass of so many rows
        for so many tokens. Looking for guesses costs time too, most of all where much was written since the last."""
        return rows < self.costs.most and self.costs.least(rows, tokens) < LIKELY

    def choose(self, candidates: Sequence[Candidate], rows: int) -> None:
        """Gives each candidate its guesses for a pass that has `rows` without them."""
        choose(candidates, rows, self.costs)
