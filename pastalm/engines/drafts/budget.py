"""How many guesses are fed: as many as raise the expected tokens per second.

A guess is worth the probability that it and those before it in its thread come true; a row costs what passes with more
rows take longer, which is measured as they are made. Guesses of all threads of all requests compete. (Sequoia, arXiv
2402.12374, chooses by measured step times likewise; vLLM's adaptive speculation by acceptance.)
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from pastalm.engines.drafts.base import Context
from pastalm.engines.drafts.response import Guess, ResponseDrafts

ROWS = (*range(1, 18), 24, 32, 48, 64)
"""Rows whose cost is kept; between them it is interpolated, and above no guesses are fed. Few rows have a cost each: it
rises in steps, where rows fill what an engine computes together."""
USUAL = 0.06
"""What a further row costs of a pass with one, until passes have been measured."""
PACE = 0.06
"""Share of what a pass took that goes into what is kept."""
STRANGE = 1.2
"""A pass that takes so many times as long, or as short, as expected counts as this much: something else happened. So
what is kept tends to the median."""
REFRESHED = 16
"""Passes after which measurements come into use."""
OLD = 64
"""Passes after which a cost that none of them had yields to its neighbours: what seems too dear is never
tried, and would be believed for ever."""
LEAST = 0.1
"""A guess that comes true more rarely is never fed."""
MOST = 32
"""Guesses of a pass."""
DEEPEST = 16
"""Guesses of one thread in a pass."""


class StepCosts:
    """What a pass costs by its number of rows, relative to one row. Passes that an engine measures when it is made are
    the beginning, and those of answers correct them as they come: so it follows the machine, the load on it, and the
    length of answers.

    fixed: costs by rows that no measurement changes.
    """

    def __init__(self, fixed: Callable[[int], float] | None = None) -> None:
        self._fixed = fixed
        self._ratios = [1 + USUAL * (rows - 1) for rows in ROWS]
        self._level = 0.0
        self._passes = 0
        self._seen = [0] * len(ROWS)
        self._refresh()

    def begin(self, seconds: Mapping[int, float]) -> None:
        """Takes measured passes: seconds by rows, one row among them. Longer ones are taken to go on as the last two
        do."""
        if len(seconds) < 2 or self._fixed is not None:
            return
        known = sorted(seconds)
        before, last = known[-2:]
        further = (seconds[last] - seconds[before]) / (last - before)
        self._level = seconds[known[0]]
        for i, rows in enumerate(ROWS):
            expected = float(np.interp(rows, known, [seconds[n] for n in known]))
            self._ratios[i] = (expected + max(0, rows - last) * further) / self._level
        self._refresh()

    def note(self, rows: int, seconds: float) -> None:
        """A pass was made."""
        if rows > ROWS[-1] or self._fixed is not None:
            return
        after = bisect_left(ROWS, rows)
        share = 1.0 if ROWS[after] == rows else (rows - ROWS[after - 1]) / (ROWS[after] - ROWS[after - 1])
        ratio = self._ratios[after] * share + self._ratios[after - 1] * (1 - share)
        expected = self._level * ratio or seconds
        seconds = min(max(seconds, expected / STRANGE), expected * STRANGE)
        self._level = self._level or seconds / ratio
        error = seconds / self._level - ratio
        for i, part in ((after, share), (after - 1, 1 - share)):
            if i > 0 and part > 0:
                self._ratios[i] += PACE * part * error
                self._seen[i] = self._passes
        self._level += PACE * (seconds / ratio - self._level)
        self._passes += 1
        if self._passes % REFRESHED == 0:
            self._yield()
            self._refresh()

    def _yield(self) -> None:
        """Moves costs that have not been seen for long half the way to the line between their neighbours'."""
        for i in range(1, len(ROWS) - 1):
            if self._passes - self._seen[i] > OLD:
                line = float(np.interp(ROWS[i], ROWS[i - 1 : i + 2 : 2], self._ratios[i - 1 : i + 2 : 2]))
                self._ratios[i] += (line - self._ratios[i]) / 2

    def _refresh(self) -> None:
        rising = np.maximum.accumulate(self._ratios)
        self._costs: list[float] = np.interp(range(ROWS[-1] + 1), ROWS, rising).tolist()
        if self._fixed is not None:
            self._costs = [self._fixed(rows) for rows in range(ROWS[-1] + 1)]
        self._least: dict[tuple[int, int], float] = {}

    @property
    def most(self) -> int:
        """Rows of the longest pass whose cost is known."""
        return len(self._costs) - 1

    def of(self, rows: int) -> float:
        return self._costs[rows]

    def least(self, rows: int, tokens: int) -> float:
        """How likely further guesses must be on the average, at least, to be worth their rows in a pass of so many rows
        that gives so many tokens."""
        known = self._least.get((rows, tokens))
        if known is None:
            base = self._costs[rows]
            further = range(1, len(self._costs) - rows)
            known = min(((self._costs[rows + n] / base - 1) * tokens / n for n in further), default=math.inf)
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
    least = max(costs.least(rows, len(candidates)), LEAST)
    ordered = _by_worth(candidates, min(costs.most - rows, MOST), least)
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
        if candidate.drafts.goes_on(guess):
            look(candidate, context.then(guess.token), -negative, depth + 1)
    return ordered
