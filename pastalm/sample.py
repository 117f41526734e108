"""A model's own answers to many prompts, many requests at once: to finetune on or against them, and to evaluate.

In: prompts of prompts.py. Out: JSONL of answers.py, one line an answer, written as soon as it has ended, so that a run
goes on where it was cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pastalm import answers, jsonl
from pastalm.answers import Answer
from pastalm.engine import SamplingParams
from pastalm.errors import RequestError
from pastalm.llm import LLM, Running
from pastalm.prompts import Prompt


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
    asked: Sequence[Prompt],
    target: Path,
    params: SamplingParams,
    *,
    timed: bool = True,
    progress: Callable[[Sampled], None] = lambda _: None,
) -> Sampled:
    """`params.n` answers to each prompt, as many at once as the engine takes. timed: with the seconds each took.

    A seed makes each answer a matter of its prompt's place, its choice and the seed alone, in whatever
    company it is decoded. Raises DataError for files that cannot be read or written.
    """
    there = {answer.key for answer in answers.resume(target)}
    counts = Sampled()
    todo = _wanted(asked, params, there, counts)
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
                    answer = _answer(running, waiting.pop(identity), params)
                    answer = answer if timed else replace(answer, seconds=None)
                    file.write(answer.to_dict())
                    counts.written += 1
                    counts.tokens += answer.tokens
                    counts.ended[answer.finish_reason] = counts.ended.get(answer.finish_reason, 0) + 1
                    progress(counts)
    finally:
        for running in list(llm.driver.running.values()):
            llm.driver.cancel(running)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An answer to be sampled: the place of its prompt among all, its choice, and the prompt."""

    place: int
    choice: int
    prompt: Prompt


def _begin(llm: LLM, wanted: _Wanted, params: SamplingParams, counts: Sampled) -> Running | None:
    seed = None if params.seed is None else params.seed + wanted.place
    messages = [{"role": "user", "content": wanted.prompt.text}]
    try:
        return llm.submit(messages, replace(params, n=1), choice=wanted.choice, seed=seed)[0]
    except RequestError:  # longer than the context
        counts.refused += 1
        return None


def _answer(running: Running, wanted: _Wanted, params: SamplingParams) -> Answer:
    prompt = wanted.prompt
    return Answer(
        id=prompt.id,
        choice=wanted.choice,
        prompt=prompt.text,
        sequential=params.parallelism == 0,
        category=prompt.category,
        source=prompt.source,
        licence=prompt.licence,
        **answers.figures(running.transcript),
    )


def _wanted(
    asked: Sequence[Prompt], params: SamplingParams, there: set[tuple[str, int, bool]], counts: Sampled
) -> Iterator[_Wanted]:
    """What is not there yet; what is, is counted."""
    for place, prompt in enumerate(asked):
        for choice in range(params.n):
            if (prompt.id, choice, params.parallelism == 0) in there:
                counts.skipped += 1
            elif prompt.text.strip():
                yield _Wanted(place, choice, prompt)
