"""Sampled answers -> scored answers: how fast and how good each is, held against the baseline's answer.

In: answers of `pasta sample` (N to a prompt), the baseline's (`pasta sample --sequential`, one each), and reference
answers where a scorer needs them. Out: JSONL of scored.py, a prompt at a time, so that a run goes on where it was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pastalm import jsonl
from pastalm.errors import DataError, LanguageError
from pastalm.eval.quality import Candidate, Scorer, Verdict
from pastalm.lang import Async, Document, parse, strip
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
    """Scores all answers to a prompt at once, prompt after prompt.

    count_tokens: tokens of a text under the model's vocabulary. limit: prompts to look at. Raises DataError for
    files that cannot be read or do not fit together, RemoteError where a judge fails; what was written is whole.
    """
    base = {row["id"]: row for _, row in read_samples(baselines)}
    known = read_references(references) if references is not None else {}
    counts = Counts()
    there = _there(target, scorer)
    with jsonl.Appender(target) as file:
        for i, (identity, rows) in enumerate(_by_prompt(samples)):
            if i == limit:
                break
            todo = [row for row in rows if (identity, row["choice"]) not in there]
            counts.skipped += len(rows) - len(todo)
            if not todo:
                continue
            if identity not in base:
                raise DataError(f"{baselines} has no answer to prompt {identity!r}: sample the baseline on all prompts")
            plain = strip(parse(base[identity]["annotated"]))
            candidates = [_candidate(row, plain, known.get(identity)) for row in todo]
            for row, candidate, verdict in zip(todo, candidates, scorer.compare(candidates), strict=True):
                if verdict.why:
                    counts.unscored[verdict.why] = counts.unscored.get(verdict.why, 0) + 1
                scored = _scored(row, candidate, verdict, base[identity]["tokens"], scorer.name, count_tokens)
                file.write(scored.to_dict())
                counts.written += 1
            progress(counts)
    return counts


def _there(target: Path, scorer: Scorer) -> set[tuple[str, int]]:
    there = set()
    for where, row in jsonl.resume(target):
        if row.get("scorer") != scorer.name:
            raise DataError(f"{where}: scored by {row.get('scorer')!r}, not by {scorer.name}: use another file")
        there.add((str(row["id"]), int(row["choice"])))
    return there


def _by_prompt(samples: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """All answers to each prompt, which may lie apart in the file, in order of the prompts."""
    rows = sorted((row for _, row in read_samples(samples)), key=lambda r: (r["id"], r["choice"]))
    for identity, group in groupby(rows, key=lambda r: r["id"]):
        yield identity, list(group)


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of what `pasta sample` wrote, its PASTA-LANG checked. Raises DataError."""
    found = False
    for where, row in jsonl.read(path):
        found = True
        for key in ("id", "prompt", "annotated", "finish_reason"):
            row[key] = jsonl.string(row, key, where)
        try:
            parse(row["annotated"])
            row["choice"], row["tokens"] = int(row["choice"]), int(row["tokens"])
            row["critical_path"] = int(row["critical_path"])
        except (KeyError, TypeError, ValueError, LanguageError) as error:
            raise DataError(f"{where}: {error}; sample it again (pasta sample)") from None
        yield where, row
    if not found:
        raise DataError(f"{path} is empty: sample some answers first (pasta sample)")


def read_references(path: Path) -> dict[str, str]:
    """Reference answers by id: `reference`, `response` or `output` of each line. Raises DataError."""
    known = {}
    for where, row in jsonl.read(path):
        key = next((k for k in ("reference", "response", "output") if k in row), "reference")
        known[jsonl.string(row, "id", where)] = jsonl.string(row, key, where)
    return known


def _candidate(row: Mapping[str, Any], baseline: str, reference: str | None) -> Candidate:
    document = parse(row["annotated"])
    return Candidate(row["prompt"], strip(document), tuple(chunks(document)), baseline, reference)


def chunks(document: Document) -> Iterable[str]:
    """The texts of all chunks, nested ones too."""
    for node in document:
        if isinstance(node, Async):
            yield strip(node.body)
            yield from chunks(node.body)


def _scored(
    row: Mapping[str, Any],
    candidate: Candidate,
    verdict: Verdict,
    baseline_tokens: int,
    scorer: str,
    count_tokens: CountTokens,
) -> Scored:
    return Scored(
        id=row["id"],
        choice=row["choice"],
        prompt=row["prompt"],
        annotated=row["annotated"],
        finish_reason=row["finish_reason"],
        tokens=row["tokens"],
        text_tokens=count_tokens(candidate.text),
        critical_path=row["critical_path"],
        baseline_tokens=baseline_tokens,
        scorer=scorer,
        difference=verdict.difference,
        win=verdict.win,
        repetition=repetition(candidate.text),
        source=str(row.get("source", "")),
        licence=str(row.get("licence", "")),
    )
