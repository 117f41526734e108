"""Skeleton-of-Thought (Ning et al., "Skeleton-of-Thought: Prompting LLMs for efficient parallel generation", 2024).

No training. The model first writes a skeleton of the answer, 3 to 10 points of a few words; then it expands all points
at once. A router (SoT-R, prompted) asks the model whether such an answer suits the question. The prompts are ours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pastalm.answering import Task, run_tasks
from pastalm.core.driver import Response
from pastalm.core.language import Promise, Sync, Text
from pastalm.core.params import SamplingParams
from pastalm.errors import RequestError
from pastalm.eval.systems import cold
from pastalm.llm import LLM
from pastalm.records import answers
from pastalm.records.answers import Answer
from pastalm.records.documents import Async, Node, normalize, render
from pastalm.records.prompts import Prompt

MOST_POINTS = 10

_SKELETON = """\
Plan the answer to this question. Write only its skeleton: a numbered list of 3 to 10 points, each of 3 to 5 words, \
no sentences, no explanations.

Question: {question}

Skeleton:"""
_EXPAND = """\
Write one part of the answer to a question; other writers do the other parts.

Question: {question}

Skeleton of the answer:
{skeleton}

Write point {number} only, in one or two short sentences, and go on with no other point."""
_ROUTE = """\
Question: {question}

Could a good answer be a list of points each of which can be written without knowing the others (and is it not a \
calculation, code, or an answer of one sentence)? Say Yes or No."""
_POINT = re.compile(r"^\s*(\d{1,2})[.)][ \t]*(\S[^\n]*?)[ \t]*$", re.MULTILINE)


@dataclass(slots=True)
class SkeletonOfThought:
    """A system that answers by Skeleton-of-Thought.

    name: of the system.
    llm: the baseline's model.
    routed: ask the router first; questions that it rejects are answered sequentially.
    max_point: maximum number of tokens of a point.
    """

    name: str
    llm: LLM
    routed: bool = False
    max_point: int = 200

    def answer(self, prompt: Prompt, max_tokens: int) -> Answer:
        """See `System`."""
        cold(self.llm)
        (answer_or_error,) = run_tasks(self.llm.driver, [self.task(prompt, max_tokens)], 1)
        if isinstance(answer_or_error, RequestError):
            raise answer_or_error
        return answer_or_error

    def task(self, prompt: Prompt, max_tokens: int) -> Task[Answer]:
        """See `System`. The critical path is router, skeleton and longest point. Without a valid skeleton, a sequential
        answer follows these."""
        started = time.perf_counter()
        spent = Spent()
        if not self.routed or (yield from self._suits(prompt.text, spent)):
            content = _SKELETON.format(question=prompt.text)
            (skeleton,) = yield from self._decode([(content, "1.")], 200, spent, stop=f"\n{MOST_POINTS + 1}.")
            points = points_of("1." + skeleton.transcript.text)
            if len(points) >= 2:
                first = time.perf_counter() - started
                whole = "\n".join(f"{i}. {point}" for i, point in enumerate(points, 1))
                parts = yield from self._decode(
                    [(_expand(prompt.text, whole, i), f"{i}. {point}:") for i, point in enumerate(points, 1)],
                    self.max_point,
                    spent,
                )
                texts = [part.transcript.text for part in parts]
                seconds = time.perf_counter() - started
                reason = "length" if any(p.transcript.finish_reason == "length" for p in parts) else "stop"
                return self._answer(prompt, render(assembled(points, texts, parts)), spent, reason, first, seconds)
        (plain,) = yield from self._decode([(prompt.text, "")], max_tokens, spent)
        seconds = time.perf_counter() - started
        text = render((Text(plain.transcript.text),)) if plain.transcript.text else ""
        first = seconds - plain.transcript.seconds
        return self._answer(prompt, text, spent, str(plain.transcript.finish_reason), first, seconds)

    def _answer(
        self, prompt: Prompt, annotated: str, spent: Spent, reason: str, first: float, seconds: float
    ) -> Answer:
        return answers.to(
            prompt,
            annotated=annotated,
            tokens=spent.tokens,
            critical_path=spent.critical_path,
            steps=spent.steps,
            passes=spent.passes,
            finish_reason=reason,
            first_seconds=round(first, 4),
            seconds=round(seconds, 4),
        )

    def _suits(self, question: str, spent: Spent) -> Task[bool]:
        """The router: whether "Yes" is more likely than "No"."""
        vocabulary = self.llm.loaded.vocabulary
        words = {word: vocabulary.encode(word)[0] for word in ("Yes", "No")}
        bias = dict.fromkeys(words.values(), 100.0)
        (reply,) = yield from self._decode([(_ROUTE.format(question=question), "")], 1, spent, logit_bias=bias)
        return reply.transcript.text == "Yes"

    def _decode(
        self, questions: Sequence[tuple[str, str]], max_tokens: int, spent: Spent, **params: Any
    ) -> Task[list[Response]]:
        """Decodes greedily, all at once.

        questions: (question, start of the answer).
        max_tokens: limit of each answer.
        spent: the costs are added to it.
        params: further sampling parameters.
        """
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, parallelism=0, drafts="off", **params)
        running: list[Response] = []
        try:
            for question, start in questions:
                ids = self.llm.encode([{"role": "user", "content": question}], sampling)
                ids += self.llm.loaded.vocabulary.encode(start)
                running.append(self.llm.driver.submit(ids, sampling, positions=self.llm.positions, keep_events=False))
        except RequestError:
            for one in running:
                one.cancel()
            raise
        yield running
        spent.add(running)
        return running


@dataclass(slots=True)
class Spent:
    """The cost of an answer so far. Phases follow each other; the requests of a phase run at once."""

    tokens: int = 0
    critical_path: int = 0
    steps: int = 0
    passes: int = 0

    def add(self, phase: Sequence[Response]) -> None:
        self.tokens += sum(one.transcript.tokens for one in phase)
        self.critical_path += max(one.transcript.critical_path for one in phase)
        self.steps += max(one.transcript.steps for one in phase)
        self.passes += max(one.transcript.passes for one in phase)


def _expand(question: str, skeleton: str, number: int) -> str:
    return _EXPAND.format(question=question, skeleton=skeleton, number=number)


def points_of(skeleton: str) -> list[str]:
    """The distinct points of a skeleton, in order."""
    points = [match.group(2).strip().rstrip(":") for match in _POINT.finditer(skeleton)]
    return [point for point in dict.fromkeys(points) if point][:MOST_POINTS]


def assembled(points: Sequence[str], texts: Sequence[str], parts: Sequence[Response]) -> tuple[Node, ...]:
    """The answer as a document with its points as chunks.

    points: of the skeleton.
    texts: their expansions.
    parts: the responses that wrote them.
    """
    nodes: list[Node] = []
    for i, (point, text, part) in enumerate(zip(points, texts, parts, strict=True), 1):
        nodes.append(Promise.clip(point, part.transcript.tokens))
        nodes.append(Async((Text(f"{i}. {point}: {text.strip()}\n"),)))
    return normalize([*nodes, Sync()])
