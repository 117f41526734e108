"""Lets systems answer the same prompts side by side: one process, one request at a time, in rotating order; or, with
`under_load`, each system many at once.

Out: a file of answers.py for each system. Each answer is written as soon as it is there, so a run can be gone on
with; prompts come in a seeded random order, so that an unfinished run is a fair sample. Beside each asynchronous answer
stands how long its text takes when it is decoded sequentially, forced ("length-matched": an answer that is only
shorter is no speedup; SPEC "Figures").
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pastalm.core.params import SamplingParams
from pastalm.errors import RequestError
from pastalm.eval.systems import Decoding, System, cold, force
from pastalm.records import answers, jsonl
from pastalm.records.answers import Answer
from pastalm.records.prompts import Prompt
from pastalm.sampling import run_tasks


@dataclass(slots=True)
class MeasureCounts:
    """What a run did. refused: answers that a system would not give, by the reason."""

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


def spread(prompts: Sequence[Prompt], many: int) -> list[Prompt]:
    """So many of the prompts, one at equal distances: files have their categories in a row."""
    many = min(many, len(prompts))
    return [prompts[i * len(prompts) // many] for i in range(many)]


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
    """Every system's answer to every prompt that it has not answered yet, to `folder`/NAME.jsonl.

    matched: the system on which texts are decoded again, forced (None: they are not). among: all prompts of the file,
    by which answers stand in the end (None: these). headers: what each system is, for the header of its file. overwrite:
    answers that are there make way. Raises DataError for files that cannot be read or written, or were headers otherwise.
    """
    opened = {
        system.name: results(folder, system.name, headers or {}, among or prompts, overwrite=overwrite)
        for system in systems
    }
    existing = {name: {found.id for found in rows} for name, (_, rows) in opened.items()}
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
                    found = system.answer(prompt, max_tokens)
                except RequestError as error:
                    counts.refuse(RequestError(f"prompt {prompt.id!r}: {error}"))
                    continue
                if matched is not None:
                    found = replace(found, matched_seconds=_forced(matched, found))
                writers[system.name].write(found.to_dict())
                counts.written += 1
                progress(counts, found)
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
    """The file of a system's answers, and those that are there. Raises DataError as `answers.results`."""
    return answers.results(folder / f"{name}.jsonl", KIND, headers.get(name, {}), prompts, overwrite=overwrite)


def _forced(system: Decoding, answer: Answer) -> float | None:
    """Seconds that the text of an answer takes sequentially. An answer without chunks is its own match."""
    if answer.critical_path == answer.tokens:
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
    """As `measure`, but system after system, each with as many requests at once as its engine takes. timed: an answer's
    seconds are those it took in that company; else none are written."""
    counts = MeasureCounts(prompts=len(prompts))
    for system in systems:
        opened, rows = results(folder, system.name, headers or {}, among or prompts, overwrite=overwrite)
        existing = {found.id for found in rows}
        tasks = [system.task(prompt, max_tokens) for prompt in prompts if prompt.id not in existing]
        counts.skipped += len(prompts) - len(tasks)
        driver = system.llm.driver
        most = driver.engine.capabilities.max_num_seqs
        with opened as file, closing(run_tasks(driver, tasks, most)) as ended:
            for found in ended:
                if isinstance(found, RequestError):
                    counts.refuse(found)
                    continue
                found = found if timed else replace(found, seconds=None, first_seconds=None)
                file.write(found.to_dict())
                counts.written += 1
                progress(counts, found)
        del system, driver, tasks, ended  # before the next is loaded
    return counts
