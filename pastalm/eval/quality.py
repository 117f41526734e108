"""How good an answer is, as a number: scorers behind one protocol.

`PmiScorer` needs no judge: log p(answer | prompt) - log p(answer | a neutral prompt), summed over the answer
under a frozen model, less what repetition, chunks that say the same, and a length far from the baseline's
cost. It sees whether an answer belongs to its prompt and holds together. It cannot see whether it is
true, and it is no win rate: only a judge's is called so.

`win_probabilities` turns any scorer's numbers into the quality that a preference score multiplies
(PASTA section 5.3): sigmoid((s(y) - s(baseline)) / sigma).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch

from pastalm.errors import RequestError
from pastalm.models import Loaded, chat_prompt

NEUTRAL = "Write something."
"""The prompt that says nothing of the answer."""
RUN = 4
"""Words in a row that count as said again when they come again."""
REPETITION, SAMENESS, LENGTH = 100.0, 50.0, 20.0
"""Nats: what an answer loses that is all repetition; whose two likest chunks are the same; and for each
doubling of the baseline's length, up or down, beyond the first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer to be scored. text: the reader's. chunks: texts of its asynchronous parts.
    baseline: the sequential answer to the same prompt, whose length is taken as right (None: none)."""

    prompt: str
    text: str
    chunks: tuple[str, ...] = ()
    baseline: str | None = None


class Scorer(Protocol):
    """Larger is better; the unit is the scorer's own."""

    name: str

    def score(self, candidates: Sequence[Candidate]) -> list[float]: ...


def win_probabilities(
    scores: Sequence[float], baselines: Sequence[float], *, sigma: float | None = None
) -> list[float]:
    """sigmoid((s(y) - s(baseline)) / sigma) of each; sigma: the standard deviation of the differences, unless
    one is given (that of the stage-1 samples). Raises RequestError where the two are not as many."""
    if len(scores) != len(baselines) or not scores:
        raise RequestError(
            f"{len(scores)} scores cannot be held against {len(baselines)} baselines"
        )
    differences = np.asarray(scores) - np.asarray(baselines)
    spread = float(differences.std()) if sigma is None else sigma
    scaled = differences / spread if spread > 0 else np.zeros_like(differences)
    return [float(p) for p in 1 / (1 + np.exp(-scaled))]


@dataclass(slots=True)
class PmiScorer:
    """See the module. model: frozen; the one finetuned without tags, where there is one. batch_tokens: padded
    tokens in one forward pass."""

    model: Loaded
    batch_tokens: int = 4096
    name: str = field(default="pmi", init=False)

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """Nats. An empty answer belongs to no prompt: its information is 0."""
        information = self.information([(c.prompt, c.text) for c in candidates])
        return [pmi - penalty(c) for pmi, c in zip(information, candidates, strict=True)]

    def information(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(answer | prompt) - log p(answer | neutral prompt), nats, of (prompt, answer) pairs."""
        rows = []
        for prompt, answer in pairs:
            ids = self.model.vocabulary.encode(answer)
            for asked in (prompt, NEUTRAL):
                rows.append((chat_prompt(self.model, [{"role": "user", "content": asked}]), ids))
        sums = log_likelihoods(self.model.model, rows, batch_tokens=self.batch_tokens)
        return [given - neutral for given, neutral in zip(sums[::2], sums[1::2], strict=True)]


def penalty(candidate: Candidate) -> float:
    """Nats that an answer loses by what the likelihood rewards and a reader does not."""
    lost = REPETITION * repetition(candidate.text) + SAMENESS * sameness(candidate.chunks)
    if candidate.baseline is not None:
        ratio = (1 + len(candidate.text)) / (1 + len(candidate.baseline))
        lost += LENGTH * max(0.0, abs(math.log2(ratio)) - 1)
    return lost


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


@torch.inference_mode()
def log_likelihoods(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_tokens: int = 4096
) -> list[float]:
    """Summed log p(answer | prompt), nats, of rows (prompt ids, answer ids) under a causal model.

    Rows of like length go through the model together, padded on the right; sums are in float64.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    sums = [0.0] * len(rows)
    batch: list[int] = []
    for i in order:
        length = len(rows[i][0]) + len(rows[i][1])
        if batch and (len(batch) + 1) * length > batch_tokens:
            _add(model, rows, batch, sums)
            batch = []
        batch.append(i)
    if batch:
        _add(model, rows, batch, sums)
    return sums


def _add(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: list[int],
    sums: list[float],
) -> None:
    """The sums of some rows, from one forward pass."""
    longest = max(len(rows[i][0]) + len(rows[i][1]) for i in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    answer = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, i in enumerate(batch):
        prompt, said = rows[i]
        n = len(prompt) + len(said)
        ids[row, :n] = torch.tensor([*prompt, *said])
        answer[row, len(prompt) : n] = True
    ids, answer = ids.to(model.device), answer.to(model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    wanted = answer[:, 1:]
    head = model.get_output_embeddings()
    owners = wanted.nonzero()[:, 0]
    targets = ids[:, 1:][wanted]
    states = hidden[:, :-1][wanted]
    for start in range(0, len(targets), 512):
        part = slice(start, start + 512)
        logits = head(states[part])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        cap = getattr(model.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        each = logits.log_softmax(-1).gather(1, targets[part, None])[:, 0].double()
        for row, value in zip(owners[part].tolist(), each.tolist(), strict=True):
            sums[batch[row]] += value
