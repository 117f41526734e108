"""DecoRTL: for code of circuits. A temperature by the class of the last token, and the top candidates ranked again.

Source: DecoRTL (Akyash, Azar and Kamali, arXiv 2507.02226), and its authors' code for the numbers: after a structural
token the temperature falls by 0.1, after an operator it rises by 0.1; of the 5 likeliest candidates those near to the
mean of all 5 embeddings lose 0.5 times their cosine to it. Ours: the candidates keep the sampler's draw, where the
authors take the best; all other tokens stay below them as they were, since tags may have to be said.

With drafts: the answer is the same with and without. Guesses come true more often after structural tokens and less
often after operators, as the temperature has it; a candidate that wins only by the new ranking is one that copies of
earlier text seldom guess.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pastalm.core.params import Request
from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.processors.base import LogitRow, ThreadProcessor, Visible
from pastalm.errors import RequestError

STRUCTURAL = frozenset(
    "module endmodule input output inout wire reg logic parameter assign always begin end if else case default "  # noqa: SIM905
    "for while posedge negedge ; , . [ ] ( ) { }".split()
)
OPERATORS = frozenset("+ - * / & | ^ ~ ! = == != < <= > >= ? : => && ||".split())  # noqa: SIM905
GREEDY = 0.7
"""The temperature that weighs candidates against each other where the request is greedy: the authors' own."""
COLDEST = 0.01


class DecoRtl:
    """embeddings: of the model's tokens, [vocabulary, dimensions], or a .npy file of them; None leaves the ranking out.
    candidates: how many are ranked again.
    penalty: factor of the cosine.
    structural, operator: what is added to the temperature after such a token."""

    def __init__(
        self,
        embeddings: NDArray[Any] | str | Path | None = None,
        *,
        candidates: int = 5,
        penalty: float = 0.5,
        structural: float = -0.1,
        operator: float = 0.1,
    ) -> None:
        if candidates < 1 or penalty < 0:
            raise ValueError("candidates must be 1 or more, penalty 0 or more")
        self.embeddings: NDArray[Any] | None = (
            np.load(embeddings, mmap_mode="r", allow_pickle=False) if isinstance(embeddings, str | Path) else embeddings
        )
        self.candidates, self.penalty = candidates, penalty
        self.structural, self.operator = structural, operator

    def begin(self, request: Request) -> ThreadProcessor:
        """Raises RequestError if the vocabulary is unknown, or is not that of the embeddings."""
        if request.vocabulary is None:
            raise RequestError("decortl needs the model's vocabulary")
        if self.embeddings is not None and len(self.embeddings) < request.vocabulary.size:
            size = request.vocabulary.size
            raise RequestError(f"decortl's embeddings are of {len(self.embeddings)} tokens, the model has {size}")
        return _Thread(self, request.vocabulary, request.params.temperature)


class _Thread(ThreadProcessor):
    """It reads the last visible id only, so all threads share one."""

    def __init__(self, settings: DecoRtl, vocabulary: Vocabulary, temperature: float) -> None:
        self._settings, self._vocabulary, self._temperature = settings, vocabulary, temperature

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        scaled: LogitRow = logits / logits.dtype.type(self._after(visible[-1]))
        if self._settings.embeddings is not None:
            self._rank(scaled, self._settings.embeddings)
        if self._temperature != 0:
            scaled *= logits.dtype.type(self._temperature)
        return scaled

    def _after(self, token: int) -> float:
        """The temperature after a token."""
        text = self._vocabulary.piece(token).decode("utf-8", errors="replace").strip()
        added = 0.0
        if text in STRUCTURAL:
            added = self._settings.structural
        elif text in OPERATORS:
            added = self._settings.operator
        return max((self._temperature or GREEDY) + added, COLDEST)

    def _rank(self, scaled: LogitRow, embeddings: NDArray[Any]) -> None:
        """Raises the candidates by what they lack of a cosine of 1: as if every other token had the whole penalty."""
        n = min(self._settings.candidates, len(scaled))
        likeliest = np.argpartition(-scaled, n - 1)[:n]
        vectors = np.asarray(embeddings[np.minimum(likeliest, len(embeddings) - 1)], dtype=np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        cosine = vectors @ vectors.mean(axis=0)
        scaled[likeliest] += (self._settings.penalty * (1 - cosine)).astype(scaled.dtype)
