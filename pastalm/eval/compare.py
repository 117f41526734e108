"""Compares systems by their answers to the same prompts: all figures are relative to the baseline (SPEC "Figures").

In: a file of answers for each system (`pasta eval` or `pasta sample`), and optionally files of scores. Every figure is
a mean, with a 95 % interval, over the prompts that both the system and the baseline answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pastalm.core.language import Promise
from pastalm.core.vocabulary import TAG_TOKENS
from pastalm.errors import DataError
from pastalm.eval.intervals import Mean, mean, rank_correlation
from pastalm.records.answers import Answer
from pastalm.records.documents import Async, Document, strip
from pastalm.records.labels import LABELS, Label
from pastalm.records.parts import parts
from pastalm.records.repetition import repetition, retold
from pastalm.records.scores import Length, Scored

CountTokens = Callable[[str], int]

LAMBDAS = (1.0, 2.0, 4.0, 8.0, math.inf)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with the system's and the baseline's answer.

    answer: the system's.
    baseline: the baseline's.
    text_tokens: tokens of the answer's text, with its end token.
    baseline_text_tokens: the same of the baseline's answer.
    scored: scores of the answer, by scorer.
    lengths: (promised, decoded) tokens of each of the answer's chunks.
    """

    answer: Answer
    baseline: Answer
    text_tokens: int
    baseline_text_tokens: int
    scored: Mapping[str, Scored] = field(default_factory=dict)
    lengths: Sequence[tuple[int, int]] = ()

    @property
    def chunks(self) -> int:
        return len(self.answer.chunks)

    @property
    def forks(self) -> bool:
        return self.chunks >= 2

    @property
    def parts(self) -> Sequence[str]:
        """The chunks, or, of an answer that does not fork, the parts of its text."""
        return self.answer.chunks if self.forks else parts(self.answer.text)

    @property
    def speedups(self) -> dict[str, float]:
        """Speedups by name: theoretical, in forward passes and realized, relative to the baseline's answer, and
        length-matched, relative to sequential decoding of the same text. Those that were not measured are left out."""
        own, base = self.answer, self.baseline
        ratios = {
            "theoretical": base.tokens / own.critical_path,
            "theoretical, matched": self.text_tokens / own.critical_path,
            "theoretical, smaller": min(base.tokens, self.text_tokens) / own.critical_path,
        }
        if own.passes:
            ratios["in passes"] = base.tokens / own.passes
            ratios["in passes, matched"] = self.text_tokens / own.passes
        if own.seconds and base.seconds:
            ratios["realized"] = base.seconds / own.seconds
        if own.seconds and own.matched_seconds:
            ratios["realized, matched"] = own.matched_seconds / own.seconds
        return ratios


@dataclass(frozen=True, slots=True)
class SystemFigures:
    """One system: its pairs, and figures by name."""

    system: str
    pairs: list[Pair]
    figures: dict[str, Mean]


def pairs(
    answers: Sequence[Answer],
    baseline: Sequence[Answer],
    count_tokens: CountTokens,
    scored: Mapping[str, Sequence[Scored]] | None = None,
) -> list[Pair]:
    """Pairs the answers of a system and the baseline, in order of ids.

    answers: the system's.
    baseline: the baseline's.
    count_tokens: counts the tokens of a text.
    scored: scores of the system's answers, by scorer.

    Raises DataError if they have no prompt in common.
    """
    base = {matched.id: matched for matched in baseline}
    scores_by_scorer = {name: {row.id: row for row in rows} for name, rows in (scored or {}).items()}
    matched = [
        Pair(
            answer,
            base[answer.id],
            _text_tokens(answer, count_tokens),
            _text_tokens(base[answer.id], count_tokens),
            {name: rows[answer.id] for name, rows in scores_by_scorer.items() if answer.id in rows},
            list(_lengths(answer.document, count_tokens)),
        )
        for answer in sorted(answers, key=lambda a: _place(a.id))
        if answer.id in base and answer.critical_path
    ]
    if not matched:
        raise DataError("no prompt was answered by both system and baseline: evaluate both on the same prompts")
    return matched


def _place(identity: str) -> tuple[int, int, str]:
    """Sort key of an id: numbers in numeric order, then names."""
    return (0, int(identity), "") if identity.isdecimal() else (1, 0, identity)


def _text_tokens(answer: Answer, count_tokens: CountTokens) -> int:
    return max(1, count_tokens(answer.text) + (answer.finish_reason == "stop"))


def _lengths(document: Document, count_tokens: CountTokens) -> Iterator[tuple[int, int]]:
    for promise, chunk in pairwise(document):
        if isinstance(promise, Promise) and isinstance(chunk, Async):
            yield promise.tokens, count_tokens(strip(chunk.body))
            yield from _lengths(chunk.body, count_tokens)


def figures(
    pairs: Sequence[Pair],
    sigmas: Mapping[str, float],
    length: Length = "theoretical",
    *,
    labels: Mapping[str, Label] | None = None,
) -> dict[str, Mean]:
    """All figures of a system, by name.

    pairs: its answers.
    sigmas: for each scorer to report, the unit of its differences.
    length: the tokens that the scores' speedup counts.
    labels: whether an answer should fork, by the prompt's id; the share that does is reported by label.
    """
    own = [pair.answer for pair in pairs]
    table = {"forks": mean([pair.forks for pair in pairs]), **_forks(pairs, labels or {})}
    table["chunks"] = mean([pair.chunks for pair in pairs])
    names = dict.fromkeys(name for pair in pairs for name in pair.speedups)
    for name in names:
        values = [pair.speedups[name] for pair in pairs if name in pair.speedups]
        table[name] = mean(values, "geometric")
        if not name.endswith("smaller"):
            table[f"{name}, arithmetic mean"] = mean(values)
            table[f"{name}, harmonic mean"] = mean(values, "harmonic")
    both = [pair.speedups for pair in pairs if "realized, matched" in pair.speedups]
    if both:
        ratios = [s["realized, matched"] / s["theoretical, matched"] for s in both]
        table["realized over theoretical, matched"] = mean(ratios, "geometric")
    table["parallelism"] = mean([a.tokens / a.critical_path for a in own], "geometric")
    if all(a.passes for a in own):
        table["tokens a pass"] = mean([a.tokens / a.passes for a in own if a.passes], "geometric")
    table["text against the baseline's"] = mean([p.text_tokens / p.baseline_text_tokens for p in pairs], "geometric")
    times = {"seconds": [a.seconds for a in own], "seconds to the first token": [a.first_seconds for a in own]}
    for name, measured in times.items():
        if values_measured := [value for value in measured if value is not None]:
            table[name] = mean(values_measured)
    table["tokens"] = mean([a.tokens for a in own])
    table["critical path"] = mean([a.critical_path for a in own])
    for name, sigma in sigmas.items():
        rows = [pair.scored[name] for pair in pairs if name in pair.scored]
        qualities = [q for row in rows if (q := row.quality(sigma)) is not None]
        if qualities:
            table[f"quality, {name}"] = mean(qualities)
        for lambda_ in LAMBDAS:
            scores = [s for row in rows if (s := row.score(lambda_, sigma, length)) is not None]
            if scores:
                table[f"score, {name}, lambda {lambda_:g}"] = mean(scores)
    if any(pair.lengths for pair in pairs):
        table["promised lengths, rank correlation"] = rank_correlation([pair.lengths for pair in pairs])
    table["a part retold"] = mean([retold(pair.parts) > 0 for pair in pairs])
    table["repetition"] = mean([repetition(a.text) for a in own])
    table["cut off"] = mean([a.finish_reason == "length" for a in own])
    table["malformed"] = mean([any(tag in a.text for tag in TAG_TOKENS.values()) for a in own])
    return table


def _forks(pairs: Sequence[Pair], labels: Mapping[str, Label]) -> dict[str, Mean]:
    """The share of answers that fork, by label; labels that no answer's prompt has are left out."""
    by_label = {label: [p.forks for p in pairs if labels.get(p.answer.id) == label] for label in LABELS}
    return {f"forks, {label}": mean(forks) for label, forks in by_label.items() if forks}


def differences(
    row: SystemFigures, other: SystemFigures, sigmas: Mapping[str, float], length: Length = "theoretical"
) -> dict[str, Mean]:
    """Scores of one system minus another's, on the prompts that both answered, by scorer and lambda."""
    theirs = {pair.answer.id: pair.scored for pair in other.pairs}
    table = {}
    for name, sigma in sigmas.items():
        both = [
            (pair.scored[name], theirs[pair.answer.id][name])
            for pair in row.pairs
            if name in pair.scored and name in theirs.get(pair.answer.id, {})
        ]
        for lambda_ in LAMBDAS:
            scores = [(a.score(lambda_, sigma, length), b.score(lambda_, sigma, length)) for a, b in both]
            values = [a - b for a, b in scores if a is not None and b is not None]
            if values:
                table[f"{name}, lambda {lambda_:g}"] = mean(values)
    return table


def groups(pairs: Sequence[Pair], key: Callable[[Pair], Any]) -> dict[str, dict[str, Mean]]:
    """Speedups of the pairs that share a key, by key, in order of keys."""
    parts: dict[Any, list[Pair]] = {}
    for pair in pairs:
        parts.setdefault(key(pair), []).append(pair)
    table: dict[str, dict[str, Mean]] = {}
    for value in sorted(parts):
        names = dict.fromkeys(name for pair in parts[value] for name in pair.speedups)
        table[str(value)] = {
            name: mean([p.speedups[name] for p in parts[value] if name in p.speedups], "geometric") for name in names
        }
    return table


COLUMNS = (
    "forks",
    *(f"forks, {label}" for label in LABELS),
    "chunks",
    "theoretical",
    "theoretical, matched",
    "theoretical, smaller",
    "in passes",
    "in passes, matched",
    "realized",
    "realized, matched",
    "realized over theoretical, matched",
    "text against the baseline's",
)


def markdown(
    rows: Sequence[SystemFigures],
    sigmas: Mapping[str, float] | None = None,
    against: str | None = None,
    length: Length = "theoretical",
) -> str:
    """A Markdown table: means with intervals, one line for each system.

    rows: the systems' figures.
    sigmas: unit of each scorer's differences.
    against: a system; a second table shows how much higher the other systems' scores are.
    length: the tokens that the scores' speedup counts.
    """
    shown = [name for name in COLUMNS if any(name in row.figures for row in rows)]
    shown += [n for n in dict.fromkeys(n for r in rows for n in r.figures) if n.startswith("quality")]
    shown += ["a part retold", "repetition", "cut off", "malformed", "tokens"]
    lines = [f"| system | prompts | {' | '.join(shown)} |", "| --- " * (len(shown) + 2) + "|"]
    for row in rows:
        cells = [str(row.figures[name]) if name in row.figures else "" for name in shown]
        lines.append(f"| {row.system} | {len(row.pairs)} | {' | '.join(cells)} |")
    other = next((row for row in rows if row.system == against), None)
    if other is not None:
        tables = {row.system: differences(row, other, sigmas or {}, length) for row in rows if row is not other}
        names = list(dict.fromkeys(name for table in tables.values() for name in table))
        lines += ["", f"| score ({length}) less {against}'s | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
        for system, table in tables.items():
            cells = [f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})" for d in table.values()]
            lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
