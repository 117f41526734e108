"""Samples answers to many prompts, many requests at once: for preference training and evaluation.

In: prompts (records/prompts.py). Out: JSONL of answers (records/answers.py). Each answer is written as soon as it
ends, so an interrupted run can be resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pastalm.core.driver import Driver, Response
from pastalm.core.params import SamplingParams, parameters
from pastalm.errors import RequestError
from pastalm.llm import LLM
from pastalm.records import answers, transcripts
from pastalm.records.answers import Answer
from pastalm.records.prompts import Prompt

T = TypeVar("T")


@dataclass(slots=True)
class SampleCounts:
    """Progress of a run.

    written: answers written.
    skipped: answers that the file already had.
    tokens: decoded tokens of the written answers.
    ended: number of written answers by finish_reason.
    refused: answers not decoded because their prompt is longer than the context.
    """

    written: int = 0
    skipped: int = 0
    tokens: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    refused: int = 0


def file_header(params: SamplingParams, models: Mapping[str, Any]) -> dict[str, Any]:
    """The file header: everything that determines an answer, except its prompt, its choice and whether it forks, which
    are in its row.

    params: of the answers. Those at their default are left out, except the ones that every file has.
    models: name and hash of each model used.

    Raises RequestError if the parameters cannot be written down: logits processors that are Python objects.
    """
    settings = {
        name: getattr(params, name)
        for name, row in parameters().items()
        if name in _IN_EVERY_HEADER or name not in _NOT_IN_HEADER and getattr(params, name) != row.default
    }
    try:
        as_read: dict[str, Any] = json.loads(json.dumps(settings))
    except TypeError:
        message = "a file of answers records logits processors by name: give each a name and plain settings"
        raise RequestError(message) from None
    return {**models, "seed": params.seed, **as_read}


_IN_EVERY_HEADER = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
_NOT_IN_HEADER = ("n", "logprobs", "parallelism", "seed", "drafts", "references")
"""They do not change an answer, or are recorded elsewhere."""


def sample(
    llm: LLM,
    prompts: Sequence[Prompt],
    target: Path,
    params: SamplingParams,
    *,
    models: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[SampleCounts], None] = lambda _: None,
    refuse: Callable[[RequestError], None] = lambda _: None,
) -> SampleCounts:
    """Writes `params.n` answers to each prompt, as many at once as the engine can decode.

    With a seed, each answer depends only on the seed, its prompt's place in the list and its choice, not on other
    requests in the batch.

    llm: the model.
    prompts: the prompts.
    target: the JSONL file to write or to resume.
    params: sampling parameters of each answer.
    models: name and hash of the models, for the file's header.
    overwrite: delete the answers that the file has.
    progress: called after each written answer.
    refuse: called with the error for each prompt that is longer than the context.

    Raises DataError if a file cannot be read or written, or its header differs from this run's, and RequestError if
    `params` has logits processors without names.
    """
    results, existing = answers.results(
        target, answers.KIND, file_header(params, models or {}), prompts, overwrite=overwrite
    )
    counts = SampleCounts()
    tasks = _missing(llm, prompts, params, {result.key for result in existing}, counts)
    most = llm.driver.engine.capabilities.max_num_seqs
    with results as file, closing(run_tasks(llm.driver, tasks, most)) as ended:
        for result in ended:
            if isinstance(result, RequestError):  # longer than the context
                counts.refused += 1
                refuse(result)
                continue
            # in a shared batch these mean nothing, and, as drafts hang on the clock, would make equal runs differ
            file.write(replace(result, seconds=None, steps=None, passes=None).to_dict())
            counts.written += 1
            counts.tokens += result.tokens
            counts.ended[result.finish_reason] = counts.ended.get(result.finish_reason, 0) + 1
            progress(counts)
    return counts


def answer(
    llm: LLM, prompt: Prompt, params: SamplingParams, *, choice: int = 0, place: int = 0, threads: bool = False
) -> Task[Answer]:
    """A task that decodes one answer.

    llm: the model.
    prompt: the prompt; a conversation of one user message.
    params: sampling parameters; n is ignored.
    choice: which of the prompt's answers this is.
    place: index of the prompt, which is added to the seed.
    threads: keep the thread records that the timeline is drawn from.

    Raises RequestError if the prompt is empty or longer than the context.
    """
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
        threads=transcripts.threads(response.transcript) if threads else (),
        **answers.figures(response.transcript),
        **(answers.sampled(response.transcript) if llm.loaded.prepared else {}),
    )


def _missing(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    existing: set[tuple[str, int, bool]],
    counts: SampleCounts,
) -> Iterator[Task[Answer]]:
    """Tasks for the answers that are not in the file yet; counts the others as skipped."""
    for place, prompt in enumerate(prompts):
        for choice in range(params.n):
            if (prompt.id, choice, params.parallelism == 0) in existing:
                counts.skipped += 1
            else:
                yield answer(llm, prompt, params, choice=choice, place=place)


Task: TypeAlias = Generator[Sequence[Response], None, T]
"""Submits responses, yields them, is resumed when all of them have ended, and so on; returns what it made of them."""


def run_tasks(driver: Driver, tasks: Iterable[Task[T]], most: int) -> Generator[T | RequestError, None, None]:
    """What tasks return, in the order in which they end, `most` of them under way at once; of a task that is refused,
    its RequestError. What is still under way is cancelled when the iterator is closed. Raises as `Driver.step`."""
    todo, waiting = iter(tasks), dict[Task[T], Sequence[Response]]()

    def resume(task: Task[T]) -> Iterator[T | RequestError]:
        for response in waiting.pop(task, ()):
            response.check()
        try:
            waiting[task] = next(task)
        except StopIteration as ended:
            yield ended.value
        except RequestError as error:
            yield error

    try:
        while True:
            while len(waiting) < most and (task := next(todo, None)) is not None:
                yield from resume(task)
            if not waiting:
                return
            driver.step()
            for task in [t for t, phase in waiting.items() if all(r.finished for r in phase)]:
                yield from resume(task)
    finally:
        for response in [r for phase in waiting.values() for r in phase]:
            response.cancel()
