"""A model's own answers to many prompts, for finetuning on or against them. Many requests at once.

In: JSONL {id, prompt}, and source and licence of the prompt where known. Out: JSONL, one line an answer, written as
soon as it has ended, so that a run goes on where it was cut off: {id, choice, prompt, sequential, annotated, tokens,
critical_path, finish_reason, source, licence}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pastalm import jsonl
from pastalm.engine import SamplingParams
from pastalm.errors import DataError, RequestError
from pastalm.llm import LLM, Running


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
    waiting: dict[str, _Wanted] = {}
    try:
        with jsonl.Appender(target) as file:
            while True:
                while len(waiting) < most and (wanted := next(todo, None)) is not None:
                    if running := _begin(llm, wanted, params, counts):
                        waiting[running.request.id] = wanted
                if not waiting:
                    return counts
                ended = {r.request.id: r for r, _ in llm.driver.step() if r.transcript.finished}
                for identity, running in ended.items():
                    record = _record(running, waiting.pop(identity), params)
                    file.write(record)
                    counts.written += 1
                    counts.tokens += record["tokens"]
                    reason = record["finish_reason"]
                    counts.ended[reason] = counts.ended.get(reason, 0) + 1
                    progress(counts)
    finally:
        for running in list(llm.driver.running.values()):
            llm.driver.cancel(running)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An answer to be sampled: the line of its prompt, its choice, and the prompt with what is known of it."""

    line: int
    choice: int
    prompt: dict[str, str]


def _begin(llm: LLM, wanted: _Wanted, params: SamplingParams, counts: Sampled) -> Running | None:
    seed = None if params.seed is None else params.seed + wanted.line
    messages = [{"role": "user", "content": wanted.prompt["prompt"]}]
    try:
        return llm.submit(messages, replace(params, n=1), choice=wanted.choice, seed=seed)[0]
    except RequestError:  # longer than the context
        counts.refused += 1
        return None


def _record(running: Running, wanted: _Wanted, params: SamplingParams) -> dict[str, Any]:
    transcript = running.transcript
    return {
        "id": wanted.prompt["id"],
        "choice": wanted.choice,
        "prompt": wanted.prompt["prompt"],
        "sequential": params.parallelism == 0,
        "annotated": transcript.annotated,
        "tokens": transcript.tokens,
        "critical_path": transcript.critical_path,
        "finish_reason": transcript.finish_reason,
        "source": wanted.prompt["source"],
        "licence": wanted.prompt["licence"],
    }


def _wanted(
    prompts: list[dict[str, str]], params: SamplingParams, there: set[tuple[str, int, bool]]
) -> Iterator[_Wanted]:
    for line, prompt in enumerate(prompts):
        for choice in range(params.n):
            present = (prompt["id"], choice, params.parallelism == 0) in there
            if prompt["prompt"].strip() and not present:
                yield _Wanted(line, choice, prompt)


def _read(source: Path, limit: int | None) -> list[dict[str, str]]:
    """Prompts, and what is known of them. Raises DataError."""
    return [
        {key: jsonl.string(value, key, where) for key in ("id", "prompt")}
        | {key: jsonl.string(value, key, where, needed=False) for key in ("source", "licence")}
        for where, value in islice(jsonl.read(source), limit)
    ]


def _there(target: Path) -> set[tuple[str, int, bool]]:
    """Which answers a target holds already; a half-written last line is cut off. Raises DataError."""
    try:
        return {(v["id"], v["choice"], v["sequential"]) for _, v in jsonl.resume(target)}
    except KeyError as error:
        raise DataError(f"{target} holds something else than answers ({error} is missing): use another file") from None
