"""How many guesses are fed: as many as raise the expected tokens per second.

A guess is worth the probability that it and those before it in its thread come true; a row costs what a pass of one row
more takes longer, as measured. Guesses of all threads of all requests compete. (Sequoia, arXiv 2402.12374, chooses by
measured step times likewise; vLLM's adaptive speculation by an acceptance rate.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import median

import numpy as np

from pastalm.engines.drafts.base import Context
from pastalm.engines.drafts.response import Guess, ResponseDrafts

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Rows of a pass whose cost is measured."""
ROUNDS = 3
DEAR = 3
"""Passes that take so many times as long as one row's are long enough: longer ones are not measured, nor made."""
LEAST = 0.1
"""A guess that comes true more rarely is never fed."""
MOST = 32
"""Guesses of a pass."""
DEEPEST = 16
"""Guesses of one thread in a pass."""


class StepCosts:
    """Seconds of a pass by its number of rows: measured ones, interpolated, and never less for more rows."""

    def __init__(self, seconds: dict[int, float]) -> None:
        """seconds: by rows, 1 among them."""
        measured = sorted(seconds)
        rising = np.maximum.accumulate([seconds[rows] for rows in measured])
        self._seconds: list[float] = np.interp(range(measured[-1] + 1), measured, rising).tolist()
        self._least: dict[tuple[int, int], float] = {}

    @classmethod
    def measure(cls, step: Callable[[int], float], most: int = ROWS[-1]) -> StepCosts:
        """step: makes a pass of so many rows and returns its seconds. Each number of rows is tried a few times, in
        turn, so that what else the processor does meets all alike; the median counts."""
        step(1)
        tried: dict[int, list[float]] = {}
        for rows in (rows for rows in ROWS if rows <= most):
            tried[rows] = [step(rows)]
            if tried[rows][0] > DEAR * tried[1][0]:
                break
        for _ in range(ROUNDS - 1):
            for rows, seconds in tried.items():
                seconds.append(step(rows))
        return cls({rows: median(seconds) for rows, seconds in tried.items()})

    @property
    def most(self) -> int:
        """Rows of the longest pass that was measured: nothing is known of longer ones."""
        return len(self._seconds) - 1

    def of(self, rows: int) -> float:
        return self._seconds[rows]

    def least(self, rows: int, tokens: int) -> float:
        """How likely further guesses must be on the average, at least, to be worth their rows in a pass of so many rows
        that gives so many tokens."""
        known = self._least.get((rows, tokens))
        if known is None:
            base = self._seconds[rows]
            further = range(1, len(self._seconds) - rows)
            known = min(((self._seconds[rows + n] / base - 1) * tokens / n for n in further), default=math.inf)
            self._least[rows, tokens] = known
        return known


@dataclass(slots=True)
class Candidate:
    """A thread that may be given guesses.

    drafts: of its response.
    context: where its next token stands.
    most: guesses that it can take at most.
    first: whether a token may be its next one.
    guesses: those chosen.
    """

    drafts: ResponseDrafts
    context: Context
    most: int
    first: Callable[[int], bool]
    guesses: list[Guess] = field(default_factory=list)


def choose(candidates: Sequence[Candidate], rows: int, costs: StepCosts) -> None:
    """Gives the candidates the guesses that are worth their rows in a pass that has `rows` already."""
    if rows >= costs.most or (least := costs.least(rows, len(candidates))) >= 1:
        return
    ordered = _by_worth(candidates, min(costs.most - rows, MOST), max(least, LEAST))
    expected, best, chosen = float(len(candidates)), len(candidates) / costs.of(rows), 0
    for n, (worth, _, _) in enumerate(ordered, 1):
        expected += worth
        if expected / costs.of(rows + n) > best:
            best, chosen = expected / costs.of(rows + n), n
    for _, candidate, guess in ordered[:chosen]:
        candidate.guesses.append(guess)


def _by_worth(candidates: Sequence[Candidate], most: int, least: float) -> list[tuple[float, Candidate, Guess]]:
    """Guesses of all threads that are worth at least so much, the likeliest first, each behind those it depends on."""
    order = count()
    heap: list[tuple[float, int, Candidate, Context, Guess, int]] = []

    def look(candidate: Candidate, context: Context, worth: float, depth: int) -> None:
        guess = candidate.drafts.best(context) if depth < min(candidate.most, DEEPEST) else None
        if guess is None or (depth == 0 and not candidate.first(guess.token)):
            return
        if (worth := worth * guess.probability) >= least:
            heapq.heappush(heap, (-worth, next(order), candidate, context, guess, depth))

    for candidate in candidates:
        look(candidate, candidate.context, 1.0, 0)
    ordered: list[tuple[float, Candidate, Guess]] = []
    while heap and len(ordered) < most:
        negative, _, candidate, context, guess, depth = heapq.heappop(heap)
        ordered.append((-negative, candidate, guess))
        look(candidate, context.then(guess.token), -negative, depth + 1)
    return ordered
