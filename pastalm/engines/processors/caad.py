"""CAAD, context-aware adaptive decoding: where a thread stands as a true answer once stood, its logits are drawn
towards those of the true answer.

Source: CAAD (Nguyen et al., arXiv 2508.02184): a store of pairs of context embedding and next-token logits from about
ten true answers; at each token the nearest contexts' logits, weighted by a softmax over similarities, are added to the
model's. Tokens below 1 % of probability are left out of the store. Written from the abstract and from public reviews,
not from the paper's equations. Ours: logits are stored as what they exceed the 1 % by, so that a token outside the
store counts as 0; contexts that are not similar at all count nothing; and `bag` stands in for a sentence encoder, which
`embed` takes.

With drafts: the answer is the same with and without. Answers come nearer to the stored ones, so more guesses come true
where these are repeated; a sentence encoder costs a call for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pastalm.core.events import SampledToken
from pastalm.core.params import Request
from pastalm.engines.processors.base import Ints, LogitRow, ThreadProcessor, Visible
from pastalm.errors import RequestError

Floats: TypeAlias = NDArray[np.float32]
Embed: TypeAlias = Callable[[Sequence[int]], Floats]
"""The embedding [dimensions] of the last ids of a context."""
Score: TypeAlias = Callable[[Sequence[int], int], Sequence[SampledToken] | None]
"""An engine's `score`."""

WINDOW = 32
"""Tokens of a context that are embedded."""
DIMENSIONS = 512
LEAST_SHARE = 0.01
"""Probability of a token below which it is not stored."""
CANDIDATES = 20
"""Most tokens stored of a context."""


def bag(ids: Sequence[int]) -> Floats:
    """A bag of tokens: each adds 1 to a dimension that is a hash of it. float32 [DIMENSIONS]."""
    hashes = (np.asarray(ids, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    counts = np.bincount((hashes >> np.uint64(40)).astype(np.int64) % DIMENSIONS, minlength=DIMENSIONS)
    return counts.astype(np.float32)


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """Contexts of true answers and what the model expected there.

    contexts: embeddings of length 1, float32 [contexts, dimensions].
    ids, gains: of each context the likeliest tokens, and by how much their logits exceed that of a token of 1 %;
        [contexts, CANDIDATES], unused ones with gain 0.
    """

    contexts: Floats
    ids: Ints
    gains: Floats

    @classmethod
    def of(cls, answers: Iterable[tuple[Sequence[int], Sequence[int]]], score: Score, embed: Embed = bag) -> Store:
        """Reads true answers: pairs of a prompt's token ids and the answer's. score: of the engine that will use the
        store. Raises RequestError if there is no answer, or no room in the engine."""
        contexts, ids, gains = [], [], []
        for prompt, answer in answers:
            tokens = [*prompt, *answer]
            scored = score(tokens, CANDIDATES)
            if scored is None:
                raise RequestError("the engine has no room to read the true answers: make the store when it is idle")
            for i in range(len(prompt), len(tokens)):
                likeliest = scored[i - 1].top_logprobs
                gain = np.array([logprob for _, logprob in likeliest]) - np.log(LEAST_SHARE)
                contexts.append(embed(tokens[max(0, i - WINDOW) : i]))
                ids.append([token for token, _ in likeliest])
                gains.append(np.maximum(gain, 0))
        if not contexts:
            raise RequestError("a store needs at least one token of a true answer")
        return cls(_unit(np.array(contexts)), np.array(ids), np.array(gains, dtype=np.float32))

    def save(self, path: str | Path) -> None:
        """Writes an .npz file."""
        np.savez(path, contexts=self.contexts, ids=self.ids, gains=self.gains)

    @classmethod
    def load(cls, path: str | Path) -> Store:
        """Reads what `save` wrote. Raises OSError, ValueError."""
        with np.load(path, allow_pickle=False) as file:
            if missing := {"contexts", "ids", "gains"} - set(file.files):
                raise ValueError(f"{path} is no store: it lacks {', '.join(sorted(missing))}")
            return cls(file["contexts"], file["ids"], file["gains"])


class Caad(ThreadProcessor):
    """store: a Store, or the file of one.
    embed: the embedding of a context; the one that the store was made with.
    strength: factor of what is added.
    neighbours: contexts that are looked up.
    least: similarity (cosine) below which a context counts nothing.
    sharpness: divides similarities before their softmax.

    It keeps nothing of a thread but what it reads of its visible ids, so all threads share one."""

    def __init__(
        self,
        store: Store | str | Path,
        *,
        embed: Embed = bag,
        strength: float = 1.0,
        neighbours: int = 8,
        least: float = 0.5,
        sharpness: float = 0.1,
    ) -> None:
        if neighbours < 1 or sharpness <= 0:
            raise ValueError("neighbours must be 1 or more, sharpness above 0")
        self._store = store if isinstance(store, Store) else Store.load(store)
        self._embed, self._strength = embed, strength
        self._neighbours, self._least, self._sharpness = neighbours, least, sharpness

    def begin(self, request: Request) -> Caad:
        return self

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        similarity = self._store.contexts @ _unit(self._embed(visible[-WINDOW:]))
        nearest = np.argsort(-similarity, kind="stable")[: self._neighbours]
        nearest = nearest[similarity[nearest] >= self._least]
        if len(nearest):
            weights = np.exp((similarity[nearest] - similarity[nearest[0]]) / self._sharpness)
            gains = self._strength * (weights / weights.sum())[:, None] * self._store.gains[nearest]
            np.add.at(logits, self._store.ids[nearest], gains.astype(logits.dtype))
        return logits
