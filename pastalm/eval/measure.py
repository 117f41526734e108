"""Measures systems on the same prompts. `measure`: one request at a time, the systems in rotating order. `under_load`:
one system after another, many requests at once.

Out: a file of answers for each system. Each answer is written as soon as it ends, so a run can be resumed. Prompts are
in a seeded random order, so an unfinished run is a fair sample. For each asynchronous answer, the time of decoding its
text sequentially, with forced tokens, is measured too ("length-matched": a shorter answer alone is not a speedup; SPEC
"Figures").
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pastalm.answering import run_tasks
from pastalm.core.params import SamplingParams
from pastalm.errors import RequestError
from pastalm.eval.systems import Decoding, System, cold, force
from pastalm.records import answers, jsonl
from pastalm.records.answers import Answer
from pastalm.records.prompts import Prompt


@dataclass(slots=True)
class MeasureCounts:
    """Progress of a run.

    prompts: prompts finished.
    written: answers written.
    skipped: answers that the files already had.
    refused: number of prompts that a system rejected, by error message.
    """

    prompts: int = 0
    written: int = 0
    skipped: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def refuse(self, error: RequestError) -> None:
        self.refused[str(error)] = self.refused.get(str(error), 0) + 1

    def __add__(self, other: MeasureCounts) -> MeasureCounts:
        refused = dict(Counter(self.refused) + Counter(other.refused))
        return MeasureCounts(
            self.prompts + other.prompts, self.written + other.written, self.skipped + other.skipped, refused
        )


def evenly_spaced(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts at equal distances, since files are often sorted by category."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


KIND = replace(answers.KIND, command="eval")
"""Rows of a system's file."""


def measure(
    systems: Sequence[System],
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    matched: Decoding | None = None,
    max_tokens: int = 1024,
    seed: int = 0,
    among: Sequence[Prompt] | None = None,
    headers: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    progress: Callable[[MeasureCounts, Answer], None] = lambda *_: None,
) -> MeasureCounts:
    """Writes every system's answers to the prompts that it has not answered yet, to `folder`/NAME.jsonl.

    systems: the systems.
    prompts: the prompts to answer.
    folder: of the answers.
    matched: the sequential system that decodes each text again with forced tokens. None: not measured.
    max_tokens: of an answer.
    seed: of the order of prompts.
    among: all prompts of the file, whose order the written answers get. None: `prompts`.
    headers: of the systems' files, by name.
    overwrite: delete the answers that the files have.
    progress: called after each answer.

    Raises DataError if a file cannot be read or written, or was made with other settings.
    """
    opened = {
        system.name: results(folder, system.name, headers or {}, among or prompts, overwrite=overwrite)
        for system in systems
    }
    existing = {name: {answer.id for answer in rows} for name, (_, rows) in opened.items()}
    counts = MeasureCounts()
    shuffled = random.Random(seed).sample(list(prompts), len(prompts))
    with ExitStack() as stack:
        writers = {name: stack.enter_context(file) for name, (file, _) in opened.items()}
        for turn, prompt in enumerate(shuffled):
            first = turn % len(systems)
            for system in [*systems[first:], *systems[:first]]:
                if prompt.id in existing[system.name]:
                    counts.skipped += 1
                    continue
                try:
                    result = system.answer(prompt, max_tokens)
                except RequestError as error:
                    counts.refuse(RequestError(f"prompt {prompt.id!r}: {error}"))
                    continue
                if matched is not None:
                    result = replace(result, matched_seconds=_forced(matched, result))
                writers[system.name].write(result.to_dict())
                counts.written += 1
                progress(counts, result)
            counts.prompts += 1
    return counts


def results(
    folder: Path,
    name: str,
    headers: Mapping[str, Mapping[str, Any]],
    prompts: Sequence[Prompt],
    *,
    overwrite: bool = False,
) -> tuple[jsonl.Results, list[Answer]]:
    """The file of a system's answers and the answers that it has; see `answers.results`."""
    return answers.results(folder / f"{name}.jsonl", KIND, headers.get(name, {}), prompts, overwrite=overwrite)


def _forced(system: Decoding, answer: Answer) -> float | None:
    """Seconds to decode the answer's text sequentially. An answer without chunks for which no guess saved a pass was
    decoded so already."""
    if answer.critical_path == answer.tokens and answer.passes == answer.steps:
        return answer.seconds
    llm = system.llm
    params = SamplingParams(temperature=0, max_tokens=1, parallelism=0)
    prompt = llm.encode([{"role": "user", "content": answer.prompt}], params)
    cold(llm)
    tokens = [*llm.loaded.vocabulary.encode(answer.text), min(llm.loaded.vocabulary.eos)]
    return round(force(llm.driver.engine, prompt, tokens), 4)


def under_load(
    systems: Iterable[System],
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    max_tokens: int = 1024,
    timed: bool = True,
    among: Sequence[Prompt] | None = None,
    headers: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    progress: Callable[[MeasureCounts, Answer], None] = lambda *_: None,
) -> MeasureCounts:
    """As `measure`, but one system after another, each with as many requests at once as its engine can decode.

    timed: store the times, which depend on the other requests in the batch.
    """
    counts = MeasureCounts(prompts=len(prompts))
    for system in systems:
        opened, rows = results(folder, system.name, headers or {}, among or prompts, overwrite=overwrite)
        existing = {answer.id for answer in rows}
        tasks = [system.task(prompt, max_tokens) for prompt in prompts if prompt.id not in existing]
        counts.skipped += len(prompts) - len(tasks)
        driver = system.llm.driver
        most = driver.engine.capabilities.max_num_seqs
        with opened as file, closing(run_tasks(driver, tasks, most)) as ended:
            for answer in ended:
                if isinstance(answer, RequestError):
                    counts.refuse(answer)
                    continue
                answer = answer if timed else replace(answer, seconds=None, first_seconds=None)
                file.write(answer.to_dict())
                counts.written += 1
                progress(counts, answer)
        del system, driver, tasks, ended  # before the next is loaded
    return counts
