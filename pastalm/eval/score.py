"""Scores sampled answers: how fast and how good each is, relative to the baseline's answer.

In: answers of `pasta sample` (N each prompt), the baseline's (`pasta sample --sequential`, one for each prompt), and
reference answers if a scorer needs them. Out: JSONL of scores, written every few prompts, so a run can be resumed. An
answer without a verdict (the judge failed, or its reply was invalid) is counted but not written; the next run tries it
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from pastalm.errors import DataError
from pastalm.eval.quality import Candidate, Scorer, Verdict, asked_for_parts
from pastalm.records import answers, jsonl, prompts, scores
from pastalm.records import labels as forking
from pastalm.records.answers import Answer
from pastalm.records.jsonl import Bad
from pastalm.records.repetition import repetition
from pastalm.records.scores import Scored

CountTokens = Callable[[str], int]


@dataclass(slots=True)
class ScoreCounts:
    """Progress of a run.

    written: scores written.
    skipped: answers that the file had scored already.
    unscored: number of answers without a verdict, by reason.
    """

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
    labels: Path | None = None,
    limit: int | None = None,
    models: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    bad: Bad | None = None,
    progress: Callable[[ScoreCounts], None] = lambda _: None,
) -> ScoreCounts:
    """Scores answers, all answers to a prompt together.

    samples: the file of answers.
    baselines: the file of the baseline's answers.
    target: the file to write or to resume.
    scorer: the scorer.
    count_tokens: counts the tokens of a text with the model's tokenizer.
    references: a file of reference answers.
    labels: a file of labels (labels.py): whether an answer to a prompt should fork. What is not labelled is judged by
        its sequential answer.
    limit: score only the first so many prompts.
    models: name and hash of the models used, for the file's header.
    overwrite: delete the scores that the file has.
    bad: called with the error for each invalid answer. None: the error is raised.
    progress: called after each group of answers.

    Raises DataError if a file cannot be read, does not fit the others, or was made with other settings; RemoteError if
    a judge fails. All scores so far are then written.
    """
    for path in (samples, baselines, references, labels):
        if path is not None and path.exists() and target.exists() and target.samefile(path):
            raise DataError(f"{target} is an input of this command: give another file for the result")
    base = {answer.id: answer for answer in answers.read(baselines, bad=bad)}
    reference_of = prompts.read_references(references, bad=bad) if references is not None else {}
    samples_sorted = sorted(answers.read(samples, bad=bad), key=lambda row: (row.id, row.choice))
    to_score = [row for _, rows in islice(groupby(samples_sorted, key=lambda row: row.id), limit) for row in rows]
    to_score = list(_with_baseline(to_score, base, baselines, bad))
    label_of = {} if labels is None else forking.read(labels, [row.id for row in to_score])
    pairs = {
        (row.id, row.choice): _candidate(row, base[row.id], reference_of.get(row.id), label_of.get(row.id))
        for row in to_score
    }
    places = jsonl.by_place(pairs, lambda row: (row["id"], row["choice"]))
    header = {"scorer": scorer.name, **(models or {})}
    results = jsonl.Results(target, scores.KIND, header, overwrite=overwrite, order=places)
    scored_keys = set(_scored_keys(results, {(row.id, row.choice): row for row in to_score}, pairs))
    counts = ScoreCounts(skipped=len(scored_keys))
    groups = groupby(to_score, key=lambda row: row.id)
    with results as file:
        while rows := list(_next_answers(groups)):
            for row, candidate, verdict in _verdicts(scorer, rows, pairs, scored_keys):
                if verdict.why:
                    counts.unscored[verdict.why] = counts.unscored.get(verdict.why, 0) + 1
                    continue
                file.write(_scored(row, candidate, verdict, base[row.id].tokens, scorer.name, count_tokens).to_dict())
                counts.written += 1
            progress(counts)
    return counts


def _verdicts(
    scorer: Scorer,
    rows: Sequence[Answer],
    pairs: Mapping[tuple[str, int], Candidate],
    scored_keys: Container[tuple[str, int]],
) -> Iterator[tuple[Answer, Candidate, Verdict]]:
    """Verdicts on the answers that have no score yet.

    scorer: the scorer.
    rows: answers to some prompts, all of each.
    pairs: what each answer is compared with, by id and choice.
    scored_keys: ids and choices that have a score.
    """
    missing = [row for row in rows if (row.id, row.choice) not in scored_keys]
    # the last bits of a model's values depend on the batch: score whole groups again, unless it is a judge
    todo = missing if getattr(scorer, "asks", False) or not missing else rows
    candidates = [pairs[row.id, row.choice] for row in todo]
    for row, candidate, verdict in zip(todo, candidates, scorer.compare(candidates) if todo else (), strict=True):
        if (row.id, row.choice) not in scored_keys:
            yield row, candidate, verdict


def _with_baseline(
    rows: Iterable[Answer], base: Mapping[str, Answer], baselines: Path, bad: Bad | None
) -> Iterator[Answer]:
    """Yields the answers to prompts that the baseline answered. Raises DataError for others, unless `bad` is given."""
    for row in rows:
        if row.id in base:
            yield row
            continue
        error = DataError(f"{baselines} has no answer to prompt {row.id!r}: sample the baseline on all prompts")
        if bad is None:
            raise error
        bad(error)


def _candidate(row: Answer, baseline: Answer, reference: str | None, label: forking.Label | None) -> Candidate:
    asked = None if label is None else label != "one"
    return Candidate(row.prompt, row.text, row.chunks, baseline.text, reference, asked)


def _against(candidate: Candidate) -> str:
    """A hash of what an answer is compared with."""
    labelled = [] if candidate.asked is None else [candidate.asked]
    text = json.dumps([candidate.baseline, candidate.reference, *labelled])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


AT_ONCE = 64
"""Minimum number of answers that are scored together, for requests at once and full batches."""


def _next_answers(groups: Iterator[tuple[str, Iterator[Answer]]]) -> Iterator[Answer]:
    """All answers to the next prompts, at least AT_ONCE."""
    count = 0
    for _, rows in groups:
        for row in rows:
            yield row
            count += 1
        if count >= AT_ONCE:
            return


def _scored_keys(
    results: jsonl.Results, rows: Mapping[tuple[str, int], Answer], pairs: Mapping[tuple[str, int], Candidate]
) -> Iterator[tuple[str, int]]:
    """Keys of the answers that are scored already. Raises DataError if one, or what it is compared with, changed."""
    for where, row in results.rows:
        scored = scores.parsed(where, row)
        key = (scored.id, scored.choice)
        if key not in pairs:
            continue
        if (scored.prompt, scored.annotated, scored.against) != (
            rows[key].prompt,
            rows[key].annotated,
            _against(pairs[key]),
        ):
            raise DataError(
                f"{where}: answer {scored.choice} to prompt {scored.id!r}, or what it is compared with, has changed: "
                "give another file, or --overwrite to start again"
            )
        yield key


def _scored(
    row: Answer, candidate: Candidate, verdict: Verdict, baseline_tokens: int, scorer: str, count_tokens: CountTokens
) -> Scored:
    return Scored(
        id=row.id,
        choice=row.choice,
        prompt=row.prompt,
        annotated=row.annotated,
        finish_reason=row.finish_reason,
        tokens=row.tokens,
        text_tokens=count_tokens(candidate.text),
        critical_path=row.critical_path,
        baseline_tokens=baseline_tokens,
        scorer=scorer,
        difference=verdict.difference,
        win=verdict.win,
        repetition=repetition(candidate.text),
        source=row.source,
        licence=row.licence,
        token_ids=row.token_ids,
        forced=row.forced,
        against=_against(candidate),
        asked=asked_for_parts(candidate),
    )
