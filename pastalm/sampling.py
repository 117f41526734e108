"""A model's own answers to many prompts, many requests at once: to finetune on or against them, and to evaluate.

In: prompts of prompts.py. Out: JSONL of answers.py, one line an answer, written as soon as it has ended, so that a run
goes on where it was cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pastalm.core.driver import Task, run_tasks
from pastalm.core.engine import SamplingParams
from pastalm.errors import RequestError
from pastalm.llm import LLM
from pastalm.records import answers
from pastalm.records.answers import Answer
from pastalm.records.prompts import Prompt


@dataclass(slots=True)
class Sampled:
    """What a run did. skipped: answers that were there; tokens: of those it wrote; refused: answers to prompts that
    do not fit."""

    written: int = 0
    skipped: int = 0
    tokens: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    refused: int = 0


def made(params: SamplingParams, models: Mapping[str, Any]) -> dict[str, Any]:
    """What decides an answer beside its prompt, its choice and whether it forks, which stand in its row. models: what
    they are, by their contents."""
    chosen = {key: getattr(params, key) for key in _DECIDING}
    return {**models, "seed": params.seed, **chosen}


_DECIDING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")


def sample(
    llm: LLM,
    asked: Sequence[Prompt],
    target: Path,
    params: SamplingParams,
    *,
    models: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[Sampled], None] = lambda _: None,
    refuse: Callable[[RequestError], None] = lambda _: None,
) -> Sampled:
    """`params.n` answers to each prompt, as many at once as the engine takes.

    A seed makes each answer a matter of its prompt's place, its choice and the seed alone, in whatever
    company it is decoded. models: what answers, for the file's header. overwrite: answers that are there make way.
    refuse: is told of a prompt that does not fit. Raises DataError for files that cannot be read or written, or were
    made otherwise.
    """
    results, there = answers.results(target, answers.KIND, made(params, models or {}), asked, overwrite=overwrite)
    counts = Sampled()
    tasks = _missing(llm, asked, params, {found.key for found in there}, counts)
    most = llm.driver.engine.capabilities.max_num_seqs
    with results as file, closing(run_tasks(llm.driver, tasks, most)) as ended:
        for found in ended:
            if isinstance(found, RequestError):  # longer than the context
                counts.refused += 1
                refuse(found)
                continue
            file.write(replace(found, seconds=None).to_dict())  # in company they say nothing, and are never the same
            counts.written += 1
            counts.tokens += found.tokens
            counts.ended[found.finish_reason] = counts.ended.get(found.finish_reason, 0) + 1
            progress(counts)
    return counts


def answer(
    llm: LLM, prompt: Prompt, params: SamplingParams, *, choice: int = 0, place: int = 0, threads: bool = False
) -> Task[Answer]:
    """One answer to a prompt, its seed the parameters' and its prompt's place. threads: keep what its timeline is drawn
    from. Raises RequestError for a prompt that is empty or longer than the context."""
    seed = None if params.seed is None else params.seed + place
    messages = [{"role": "user", "content": prompt.text}]
    try:
        response = llm.submit(messages, replace(params, n=1), choice=choice, seed=seed, keep_events=False)
    except RequestError as error:
        raise RequestError(f"prompt {prompt.id!r}: {error}") from None
    yield [response]
    return answers.to(
        prompt,
        choice=choice,
        sequential=params.parallelism == 0,
        threads=tuple(response.transcript.to_dict()["threads"]) if threads else (),
        **answers.figures(response.transcript),
        **(answers.sampled(response.transcript) if llm.loaded.prepared else {}),
    )


def _missing(
    llm: LLM, asked: Sequence[Prompt], params: SamplingParams, there: set[tuple[str, int, bool]], counts: Sampled
) -> Iterator[Task[Answer]]:
    """The answers that are not there yet; those that are, are counted."""
    for place, prompt in enumerate(asked):
        for choice in range(params.n):
            if (prompt.id, choice, params.parallelism == 0) in there:
                counts.skipped += 1
            else:
                yield answer(llm, prompt, params, choice=choice, place=place)
