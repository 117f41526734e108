"""Sampled answers with what they are worth: `pasta score` writes them, stage 2 chooses by them (PASTA section 5.3).

score = speedup + lambda * quality; lambda = inf: quality alone. Quality is a win probability against the baseline's
answer: a judge's, or sigmoid(difference / sigma) of a scorer's difference, sigma the standard deviation of the
differences over the stage-1 samples (ours; METHOD of the offline runs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pastalm.errors import DataError, RequestError
from pastalm.records import jsonl
from pastalm.records.jsonl import Bad

Length = Literal["theoretical", "matched", "smaller", "parallelism"]
"""Tokens that a speedup divides by the critical path: those of the baseline's answer (the paper's), the answer's own
text, the smaller of the two, which neither a short nor a padded answer can raise, or all that was decoded, tags too
(the paper's ablation: padding raises it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One sampled answer. tokens: with tags; text_tokens: of the reader's text; baseline_tokens: of the baseline's
    answer. difference: the scorer's number less the baseline's, in its unit; win: a judge's probability. Both
    None: it could not be scored. token_ids, forced: as in answers.py. against: a hash of what it was held against."""

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

    def speedup(self, length: Length = "theoretical") -> float:
        """Larger is faster; 1 is the sequential baseline."""
        lengths = {
            "theoretical": self.baseline_tokens,
            "matched": self.text_tokens,
            "smaller": min(self.baseline_tokens, self.text_tokens),
            "parallelism": self.tokens,
        }
        return lengths[length] / max(1, self.critical_path)

    def quality(self, sigma: float) -> float | None:
        """0 to 1; 0.5 is as good as the baseline's answer."""
        if self.win is not None or self.difference is None:
            return self.win
        return 0.5 * (1 + math.tanh(0.5 * self.difference / sigma)) if sigma > 0 else 0.5

    def score(self, lambda_: float, sigma: float, length: Length = "theoretical") -> float | None:
        """None where there is no quality."""
        quality = self.quality(sigma)
        if quality is None:
            return None
        return quality if math.isinf(lambda_) else self.speedup(length) + lambda_ * quality

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


KIND = jsonl.Kind(
    command="score", name="a scored answer", fields=("id", "choice", "prompt", "annotated", "scorer", "baseline_tokens")
)
"""Rows of `pasta score`."""
_STRINGS = ("id", "prompt", "annotated", "finish_reason", "scorer")


def read(path: Path, *, bad: Bad | None = None) -> list[Scored]:
    """What `pasta score` wrote. Raises DataError with the line that is something else, unless `bad` takes it."""
    found = []
    for where, row in jsonl.read(path, bad=bad):
        try:
            found.append(parsed(where, row))
        except DataError as error:
            if bad is None:
                raise
            bad(error)
    if not found:
        raise DataError(f"{path} is empty: score some answers first (pasta score)")
    return found


def parsed(where: str, row: Mapping[str, Any]) -> Scored:
    """The scored answer that a row stands for. Raises DataError."""
    try:
        tokens = {key: tuple(map(int, row.get(key, ()))) for key in ("token_ids", "forced")}
        strings = {key: jsonl.string(row, key, where) for key in _STRINGS if key in row}
        return Scored(**{**row, **strings, **tokens})
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: not a scored answer ({error}): make it with pasta score") from None


def spread(rows: Sequence[Scored]) -> float:
    """The standard deviation of the differences: sigma."""
    differences = [row.difference for row in rows if row.difference is not None]
    return float(np.std(differences)) if len(differences) > 1 else 1.0


def check_length(length: str) -> Length:
    """Raises RequestError for what is none."""
    names: dict[str, Length] = {name: name for name in get_args(Length)}
    if length not in names:
        raise RequestError(f"unknown length {length!r}: use {', '.join(names)}")
    return names[length]


def summary(
    rows: Sequence[Scored], lambdas: Sequence[float], sigma: float, length: Length = "theoretical"
) -> dict[str, float]:
    """Means over the answers that were scored: speedups (geometric), quality, repetition, and the score at each
    lambda."""
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
