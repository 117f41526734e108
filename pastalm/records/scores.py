"""Scored answers: written by `pasta score`, used to choose preference pairs in stage 2 (PASTA section 5.3).

score = speedup + lambda * quality; with lambda = inf it is the quality alone. A fork that nothing asked for is no
speed: where the sequential answer is not made of parts, a forked one scores the speedup that its text has on one
thread. Quality is the probability of winning against the baseline's answer: a judge's, or sigmoid(difference / sigma)
for other scorers, where sigma is the standard deviation of the differences over all samples (our choice).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pastalm.core.language import Promise
from pastalm.errors import DataError, RequestError
from pastalm.records import jsonl
from pastalm.records.documents import parse
from pastalm.records.jsonl import Bad

Length = Literal["theoretical", "matched", "smaller", "parallelism"]
"""The number of tokens that a speedup divides by the critical path. theoretical: of the baseline's answer (the
paper's). matched: of the answer's own text. smaller: the smaller of these two; neither a short nor a padded answer
raises it. parallelism: all decoded tokens, tags included (the paper's ablation; padding raises it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One sampled answer and its score. Fields not listed here are as in answers.py.

    tokens: decoded tokens, tags included.
    text_tokens: tokens of the reader's text.
    baseline_tokens: tokens of the baseline's answer.
    scorer: the scorer's name.
    difference: the scorer's value minus the baseline's, in the scorer's unit; None for a judge.
    win: a judge's probability that the answer beats the baseline's; None for other scorers.
    repetition: share of repeated 4-grams, 0 to 1.
    against: hash of the baseline's answer and the reference that it was compared with.
    asked: whether the sequential answer (the reference, else the baseline's) is made of parts, so that the prompt may
        be taken to ask for them; None if not known.
    """

    id: str
    choice: int
    prompt: str
    annotated: str
    finish_reason: str
    tokens: int
    text_tokens: int
    critical_path: int
    baseline_tokens: int
    scorer: str
    difference: float | None = None
    win: float | None = None
    repetition: float = 0.0
    source: str = ""
    licence: str = ""
    token_ids: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    against: str = ""
    asked: bool | None = None

    def speedup(self, length: Length = "theoretical") -> float:
        """The theoretical speedup; 1 is sequential decoding of the baseline's answer."""
        lengths = {
            "theoretical": self.baseline_tokens,
            "matched": self.text_tokens,
            "smaller": min(self.baseline_tokens, self.text_tokens),
            "parallelism": self.tokens,
        }
        return lengths[length] / max(1, self.critical_path)

    def quality(self, sigma: float) -> float | None:
        """Quality, 0 to 1; 0.5 is as good as the baseline's answer. None if it was not scored."""
        if self.win is not None or self.difference is None:
            return self.win
        return 0.5 * (1 + math.tanh(0.5 * self.difference / sigma)) if sigma > 0 else 0.5

    def score(self, lambda_: float, sigma: float, length: Length = "theoretical") -> float | None:
        """speedup + lambda * quality; None if there is no quality.

        lambda_: weight of the quality; inf: the quality alone.
        sigma: unit of the differences, > 0.
        length: the tokens that the speedup counts.
        """
        quality = self.quality(sigma)
        if quality is None:
            return None
        return quality if math.isinf(lambda_) else self._earned(length) + lambda_ * quality

    def _earned(self, length: Length) -> float:
        """The speedup that counts in the score: one thread's, if the answer forks and nothing asked for that."""
        if self.text_tokens <= self.critical_path or not self.unasked:
            return self.speedup(length)
        return replace(self, critical_path=self.text_tokens).speedup(length)

    @property
    def unasked(self) -> bool:
        """Whether the answer forks although nothing asked for that."""
        return self.asked is False and any(isinstance(node, Promise) for node in parse(self.annotated))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


KIND = jsonl.Kind(
    command="score", name="a scored answer", fields=("id", "choice", "prompt", "annotated", "scorer", "baseline_tokens")
)
"""Rows of `pasta score`."""
_STRINGS = ("id", "prompt", "annotated", "finish_reason", "scorer")


def read(path: Path, *, bad: Bad | None = None) -> list[Scored]:
    """All rows of a file of `pasta score`. Raises DataError for the first invalid row, unless `bad` is given; also if
    there is no row."""
    scored = []
    for where, row in jsonl.read(path, bad=bad):
        try:
            scored.append(parsed(where, row))
        except DataError as error:
            if bad is None:
                raise
            bad(error)
    if not scored:
        raise DataError(f"{path} is empty: score some answers first (pasta score)")
    return scored


def parsed(where: str, row: Mapping[str, Any]) -> Scored:
    """Parses a row. Raises DataError if it is invalid."""
    try:
        tokens = {key: tuple(map(int, row.get(key, ()))) for key in ("token_ids", "forced")}
        strings = {key: jsonl.string(row, key, where) for key in _STRINGS if key in row}
        return Scored(**{**row, **strings, **tokens})
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: not a scored answer ({error}): make it with pasta score") from None


def spread(rows: Sequence[Scored]) -> float:
    """Sigma: the standard deviation of the differences; 1 if there are fewer than two."""
    differences = [row.difference for row in rows if row.difference is not None]
    return float(np.std(differences)) if len(differences) > 1 else 1.0


def check_length(length: str) -> Length:
    """Returns the name as a Length. Raises RequestError if it is unknown."""
    names: dict[str, Length] = {name: name for name in get_args(Length)}
    if length not in names:
        raise RequestError(f"unknown length {length!r}: use {', '.join(names)}")
    return names[length]


def summary(
    rows: Sequence[Scored], lambdas: Sequence[float], sigma: float, length: Length = "theoretical"
) -> dict[str, float]:
    """Means over all answers with a quality: speedups (geometric), quality, repetition and scores, by name.

    rows: the answers.
    lambdas: report the score at each of these.
    sigma: unit of the differences.
    length: the tokens that the scores' speedup counts.
    """
    scored = [row for row in rows if row.quality(sigma) is not None]
    if not scored:
        return {"answers": 0.0}
    table: dict[str, float] = {"answers": float(len(scored))}
    for counted in get_args(Length):
        logs = [math.log(max(row.speedup(counted), 1e-3)) for row in scored]
        table[f"speedup, {counted}"] = math.exp(float(np.mean(logs)))
    table["quality"] = float(np.mean([row.quality(sigma) for row in scored]))
    table["repetition"] = float(np.mean([row.repetition for row in scored]))
    table["cut off"] = float(np.mean([row.finish_reason == "length" for row in scored]))
    for lambda_ in lambdas:
        values = [row.score(lambda_, sigma, length) for row in scored]
        table[f"score, lambda {lambda_:g}"] = float(np.mean([v for v in values if v is not None]))
    return table
