"""Sampled answers -> scored answers: how fast and how good each is, held against the baseline's answer.

In: answers of `pasta sample` (N to a prompt), the baseline's (`pasta sample --sequential`, one each), and reference
answers where a scorer needs them. Out: JSONL of scored.py, some prompts at a time, so that a run goes on where it was
cut. An answer without a verdict (a judge that failed on it, or said something else) is counted and not written: start
again and it is asked about again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

from pastalm import answers, jsonl, prompts
from pastalm.answers import Answer
from pastalm.errors import DataError
from pastalm.eval.quality import Candidate, Scorer, Verdict
from pastalm.scored import Scored
from pastalm.wording import repetition

CountTokens = Callable[[str], int]


@dataclass(slots=True)
class Counts:
    """What a run did. unscored: answers without a verdict, by the reason."""

    written: int = 0
    skipped: int = 0
    unscored: dict[str, int] = field(default_factory=dict)


def score(
    samples: Path,
    baselines: Path,
    target: Path,
    scorer: Scorer,
    count_tokens: CountTokens,
    *,
    references: Path | None = None,
    limit: int | None = None,
    progress: Callable[[Counts], None] = lambda _: None,
) -> Counts:
    """Scores the answers, those to a prompt together.

    count_tokens: tokens of a text under the model's vocabulary. limit: prompts to look at. Raises DataError for
    files that cannot be read or do not fit together, RemoteError where a judge fails; what was written is whole.
    """
    base = {answer.id: answer for answer in answers.read(baselines)}
    known = {p.id: next(iter(p.references), None) for p in prompts.read(references)} if references is not None else {}
    counts = Counts()
    there = _there(target, scorer)
    groups = islice(_by_prompt(samples), limit)
    with jsonl.Appender(target) as file:
        while some := list(_some(groups)):
            todo = [row for row in some if (row.id, row.choice) not in there]
            counts.skipped += len(some) - len(todo)
            if missing := {row.id for row in todo} - set(base):
                raise DataError(
                    f"{baselines} has no answer to prompt {min(missing)!r}: sample the baseline on all prompts"
                )
            candidates = [Candidate(r.prompt, r.text, r.chunks, base[r.id].text, known.get(r.id)) for r in todo]
            for row, candidate, verdict in zip(todo, candidates, scorer.compare(candidates), strict=True):
                if verdict.why:
                    counts.unscored[verdict.why] = counts.unscored.get(verdict.why, 0) + 1
                    continue
                scored = _scored(row, candidate.text, verdict, base[row.id].tokens, scorer.name, count_tokens)
                file.write(scored.to_dict())
                counts.written += 1
            progress(counts)
    return counts


AT_ONCE = 64
"""Answers that are scored together, at least: a judge is asked many questions at once, a model fills its batches."""


def _some(groups: Iterator[tuple[str, list[Answer]]]) -> Iterator[Answer]:
    """All answers to the next prompts."""
    found = 0
    for _, rows in groups:
        yield from rows
        found += len(rows)
        if found >= AT_ONCE:
            return


def _there(target: Path, scorer: Scorer) -> set[tuple[str, int]]:
    there = set()
    for where, row in jsonl.resume(target):
        if row.get("scorer") != scorer.name:
            raise DataError(f"{where}: scored by {row.get('scorer')!r}, not by {scorer.name}: use another file")
        there.add((str(row["id"]), int(row["choice"])))
    return there


def _by_prompt(samples: Path) -> Iterator[tuple[str, list[Answer]]]:
    """All answers to each prompt, which may lie apart in the file, in order of the prompts."""
    rows = sorted(answers.read(samples), key=lambda r: (r.id, r.choice))
    for identity, group in groupby(rows, key=lambda r: r.id):
        yield identity, list(group)


def _scored(
    row: Answer, text: str, verdict: Verdict, baseline_tokens: int, scorer: str, count_tokens: CountTokens
) -> Scored:
    return Scored(
        id=row.id,
        choice=row.choice,
        prompt=row.prompt,
        annotated=row.annotated,
        finish_reason=row.finish_reason,
        tokens=row.tokens,
        text_tokens=count_tokens(text),
        critical_path=row.critical_path,
        baseline_tokens=baseline_tokens,
        scorer=scorer,
        difference=verdict.difference,
        win=verdict.win,
        repetition=repetition(text),
        source=row.source,
        licence=row.licence,
    )
