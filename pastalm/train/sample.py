"""A model's own answers to many prompts, for finetuning on or against them. Many requests at once.

In: JSONL {id, prompt}. Out: JSONL, one line an answer, written as soon as it has ended, so that a run goes on
where it was cut off: {id, choice, prompt, sequential, annotated, tokens, critical_path, finish_reason}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pastalm.engine import SamplingParams
from pastalm.errors import DataError, RequestError
from pastalm.llm import LLM, Running
from pastalm.train.annotate import keep_whole_lines


@dataclass(slots=True)
class Sampled:
    """What a run did. skipped: answers that were there; tokens: of those it wrote; refused: prompts that
    do not fit."""

    written: int = 0
    skipped: int = 0
    tokens: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    refused: int = 0


def sample(
    llm: LLM,
    source: Path,
    target: Path,
    params: SamplingParams,
    *,
    limit: int | None = None,
    progress: Callable[[Sampled], None] = lambda _: None,
) -> Sampled:
    """`params.n` answers to each of the first `limit` prompts, as many at once as the engine takes.

    A seed makes each answer a matter of its prompt's place, its choice and the seed alone, in whatever
    company it is decoded. Raises DataError for files that cannot be read or written.
    """
    there = _there(target)
    counts = Sampled(skipped=len(there))
    todo = _wanted(_read(source, limit), params, there)
    most = llm.driver.engine.capabilities.max_num_seqs
    waiting: dict[str, tuple[str, int, str]] = {}
    try:
        with target.open("a", encoding="utf-8") as file:
            while True:
                while len(waiting) < most and (entry := next(todo, None)) is not None:
                    if running := _begin(llm, entry, params, counts):
                        waiting[running.request.id] = entry[1:]
                if not waiting:
                    return counts
                ended = {r.request.id: r for r, _ in llm.driver.step() if r.transcript.finished}
                for identity, running in ended.items():
                    record = _record(running, *waiting.pop(identity), params)
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
                    counts.written += 1
                    counts.tokens += record["tokens"]
                    reason = record["finish_reason"]
                    counts.ended[reason] = counts.ended.get(reason, 0) + 1
                    progress(counts)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error}; what it holds is whole, start again to go on") from None
    finally:
        for running in list(llm.driver.running.values()):
            llm.driver.cancel(running)


def _begin(
    llm: LLM, entry: tuple[int, str, int, str], params: SamplingParams, counts: Sampled
) -> Running | None:
    row, _, choice, prompt = entry
    seed = None if params.seed is None else params.seed + row
    one = replace(params, n=1)
    try:
        return llm.submit([{"role": "user", "content": prompt}], one, choice=choice, seed=seed)[0]
    except RequestError:  # longer than the context
        counts.refused += 1
        return None


def _record(
    running: Running, identity: str, choice: int, prompt: str, params: SamplingParams
) -> dict[str, Any]:
    transcript = running.transcript
    return {
        "id": identity,
        "choice": choice,
        "prompt": prompt,
        "sequential": params.parallelism == 0,
        "annotated": transcript.annotated,
        "tokens": transcript.tokens,
        "critical_path": transcript.critical_path,
        "finish_reason": transcript.finish_reason,
    }


def _wanted(
    rows: list[tuple[str, str]], params: SamplingParams, there: set[tuple[str, int, bool]]
) -> Iterator[tuple[int, str, int, str]]:
    for row, (identity, prompt) in enumerate(rows):
        for choice in range(params.n):
            if prompt.strip() and (identity, choice, params.parallelism == 0) not in there:
                yield row, identity, choice, prompt


def _read(source: Path, limit: int | None) -> list[tuple[str, str]]:
    try:
        lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines[:limit]]
        return [(str(row["id"]), str(row["prompt"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read prompts from {source} ({{id, prompt}} a line): {error}") from None


def _there(target: Path) -> set[tuple[str, int, bool]]:
    """Which answers a target holds already; a half-written last line is cut off."""
    if not target.is_file():
        return set()
    keep_whole_lines(target)
    try:
        rows = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
        return {(row["id"], row["choice"], row["sequential"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{target} holds something else than answers: {error}; use another file") from None
