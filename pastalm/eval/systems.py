"""The systems that are evaluated: they answer prompts greedily, one or many at a time, and measure the cost.

`Decoding` is a PASTA model, with or without forking, with or without drafts: prompt lookup decoding and LLMA are it
without forking. Other methods are in baselines/.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pastalm import answering
from pastalm.answering import Task
from pastalm.core.driver import Response
from pastalm.core.events import Decoded, Finished, Forked
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.base import Engine
from pastalm.llm import LLM
from pastalm.records import answers, transcripts
from pastalm.records.answers import Answer
from pastalm.records.prompts import Prompt


class System(Protocol):
    """Something that answers prompts.

    name: of its row in the table and of its file.
    llm: the model that it uses.
    """

    name: str
    llm: LLM

    def answer(self, prompt: Prompt, max_tokens: int) -> Answer:
        """Decodes and times one answer, with an empty prefix cache. Raises RequestError if the prompt is too long."""
        ...

    def task(self, prompt: Prompt, max_tokens: int) -> Task[Answer]:
        """The same answer as a task, for decoding together with others (`run_tasks`)."""
        ...


@dataclass(slots=True)
class Decoding:
    """A model that decodes asynchronously or sequentially, with or without drafts.

    name: of the system.
    llm: the model.
    parallelism: as in SamplingParams; 0 is sequential.
    drafts: as in SamplingParams. The prompt's references are drafted from only where `references` is named, since they
    may be answers that no user would have.
    """

    name: str
    llm: LLM
    parallelism: float = 1.0
    drafts: str = "off"

    def answer(self, prompt: Prompt, max_tokens: int) -> Answer:
        params = self._params(prompt, max_tokens)
        cold(self.llm)
        response = self.llm.stream([{"role": "user", "content": prompt.text}], params)
        first = play(response)
        return answers.to(
            prompt,
            sequential=self.parallelism == 0,
            first_seconds=first,
            threads=transcripts.threads(response.transcript),
            **answers.figures(response.transcript),
        )

    def task(self, prompt: Prompt, max_tokens: int) -> Task[Answer]:
        return answering.answer(self.llm, prompt, self._params(prompt, max_tokens), threads=True)

    def _params(self, prompt: Prompt, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            parallelism=self.parallelism,
            drafts=self.drafts,
            references=prompt.references if "references" in self.drafts.split(",") else None,
        )


def play(response: Response) -> float | None:
    """Decodes to the end. Returns seconds to the first character that a reader sees (None: the text is empty)."""
    first = None
    for _ in response:
        if first is None and response.transcript.settled:
            first = response.transcript.seconds
    return first


def cold(llm: LLM) -> None:
    """Clears the prefix cache."""
    forget = getattr(llm.driver.engine, "forget", None)
    if forget is not None:
        forget()


def force(engine: Engine, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Seconds to decode given tokens one by one after a prompt, prefill included."""
    params = SamplingParams(temperature=0, max_tokens=len(tokens), drafts="off")
    positions = engine.capabilities.positions[0]
    request = Request(id="forced", prompt_token_ids=tuple(prompt), params=params, positions=positions)
    started = time.perf_counter()
    engine.add(request)
    engine.apply(request.id, Forked(path=()))
    for token in tokens:
        engine.step()
        engine.apply(request.id, Decoded(path=(), token=token))
    seconds = time.perf_counter() - started
    engine.apply(request.id, Finished(path=()))
    return seconds
