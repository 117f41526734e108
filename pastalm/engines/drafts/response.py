"""The drafters of one response together: the best guess among them, and how often each kind of guess comes true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pastalm.core.events import Path
from pastalm.core.layout import Placed
from pastalm.core.params import Request
from pastalm.engines.drafts.base import Context, Drafter, Evidence, Tail, never, tail_of
from pastalm.engines.drafts.ngrams import NGrams

PRIOR = 8
"""Guesses of one kind after which a response's own hit rate weighs as much as the engine's."""
FADED = 4096
"""Guesses after which older ones count half."""


@dataclass(slots=True)
class Rates:
    """Hits and guesses of each kind: of a drafter with some evidence."""

    counts: dict[tuple[str, Evidence], list[float]] = field(default_factory=dict)

    def note(self, drafter: str, evidence: Evidence, hit: bool) -> None:
        count = self.counts.setdefault((drafter, evidence), [0.0, 0.0])
        count[0] += hit
        count[1] += 1
        if count[1] > FADED:
            count[0], count[1] = count[0] / 2, count[1] / 2

    def rate(self, drafter: str, evidence: Evidence) -> float:
        """The hit rate so far, as if a few guesses before had come true as often as is usual with such evidence."""
        hits, guesses = self.counts.get((drafter, evidence), (0.0, 0.0))
        return (hits + PRIOR * _usual(*evidence)) / (guesses + PRIOR)


def _usual(length: int, agreement: int) -> float:
    """The hit rate of guesses, roughly, as answers to prompts of AlpacaEval show it (benchmarks/README.md)."""
    return 0.08 + 0.1 * length + 0.08 * agreement if agreement > 0 else 0.12


@dataclass(frozen=True, slots=True)
class Guess:
    """A guessed token. probability: that it comes true if those before it do."""

    token: int
    drafter: str
    probability: float


@dataclass(slots=True)
class _Shadow:
    """The guess of each drafter for a token of a thread, if it comes to stand behind `tail`: fed or not, they tell the
    hit rates."""

    tail: Tail
    guesses: list[tuple[str, int, Evidence]]


class ResponseDrafts:
    """The drafters of one response. What is written is only noted, and read when a guess is wanted next: under load
    none is, and a token then costs next to nothing.

    request: that it answers.
    written: n-grams of prompt and answer, as the drafters that copy from them share them.
    rates: those of the engine; the response's own come on top.
    """

    def __init__(self, request: Request, written: NGrams, drafters: Sequence[Drafter], rates: Rates) -> None:
        prompt = request.prompt_token_ids
        self._drafters = tuple(drafters)
        self._written = written
        self._rates, self._own = rates, Rates()
        self._contexts: dict[Path, Context] = {(): Context((), tail_of(prompt), 0, 0)}
        self._shadows: dict[tuple[Path, int], _Shadow] = {}
        self._prompt: Sequence[int] = prompt
        self._unread: list[Path | Placed] = []
        self._never = never(request.vocabulary)
        tags = None if request.vocabulary is None else request.vocabulary.tags
        self._jumps = tags.promise_end if tags and request.positions == "promised" else -1

    def begin(self, path: Path) -> None:
        """A thread begins with what its parent has written so far."""
        self._unread.append(path)

    def write(self, placed: Placed) -> None:
        """A thread has a further token."""
        self._unread.append(placed)

    def _read(self) -> None:
        """Takes into account what has been noted."""
        if self._prompt:
            self._written.add_all(self._prompt)
            self._prompt = ()
        unread, self._unread = self._unread, []
        for noted in unread:
            if isinstance(noted, Placed):
                self._read_token(noted)
            elif noted:
                self._contexts[noted] = replace(self._contexts[noted[:-1]], path=noted, index=0)

    def _read_token(self, placed: Placed) -> None:
        context = self._contexts[placed.path]
        shadow = self._shadows.pop((placed.path, context.index), None)
        if shadow is not None and shadow.tail == context.tail:
            self._score(shadow, placed.token)
        if placed.token not in self._never:
            self._written.add(context.tail, placed.token, placed.place)
        for drafter in self._drafters:
            drafter.write(context, placed.token, placed.place)
        self._contexts[placed.path] = context.then(placed.token)

    def _score(self, shadow: _Shadow, token: int) -> None:
        for drafter, guessed, evidence in shadow.guesses:
            self._rates.note(drafter, evidence, guessed == token)
            self._own.note(drafter, evidence, guessed == token)

    def context(self, path: Path, sees: int) -> Context:
        """Where the next token of a thread stands."""
        if self._unread or self._prompt:
            self._read()
        known = self._contexts[path]
        return Context(path, known.tail, known.index, sees)

    def best(self, context: Context) -> Guess | None:
        """The likeliest guess for the token at a context."""
        guesses = [(d.name, *guess) for d in self._drafters if (guess := d.guess(context)) is not None]
        if not guesses:
            return None
        self._shadows[context.path, context.index] = _Shadow(context.tail, guesses)
        rated = [(self._rate(name, evidence), name, token) for name, token, evidence in guesses]
        probability, name, token = max(rated, key=lambda guess: guess[0])
        return Guess(token, name, probability) if token not in self._never else None

    def goes_on(self, guess: Guess) -> bool:
        """Whether a further guess may be fed behind this one: not where its thread goes on at another position."""
        return guess.token != self._jumps

    def _rate(self, drafter: str, evidence: Evidence) -> float:
        hits, guesses = self._own.counts.get((drafter, evidence), (0.0, 0.0))
        return (hits + PRIOR * self._rates.rate(drafter, evidence)) / (guesses + PRIOR)

    def close(self) -> None:
        """The response has ended. What has not been read since is left out."""
        for drafter in self._drafters:
            drafter.close()
