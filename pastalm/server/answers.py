"""What is new of an answer, step by step, for a client that can only append.

Text is sent in document order, through the first unfinished chunk, and never past what may be the start of a stop
string. All of it comes from the response's own transcript.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pastalm.core.events import Decoded, Event, SampledToken
from pastalm.core.transcript import Transcript

PlacedToken = tuple[int, Decoded | SampledToken]
"""A token with log-probabilities, and the character of the text at which it begins."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that its answer starts with.

    text: the prompt's text.
    token_ids: its tokens.
    end_ids: ids that end an answer. Clients that request an echo count tokens, so a sampled end token is one of them.
    scores: log-probabilities of all tokens but the first (None: not requested).
    """

    text: str
    token_ids: list[int]
    end_ids: frozenset[int]
    scores: list[SampledToken] | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What a client can append after a step.

    text: the new text; it will not change any more.
    tokens: the tokens of the new text that have log-probabilities, with their places in the answer (echo included).
    events: the events of the step.
    finish_reason: why the answer ended; None if more follows.
    """

    text: str
    tokens: list[PlacedToken]
    events: list[Event]
    finish_reason: str | None


class ServedAnswer:
    """One answer for a client. The texts of its deltas together are the transcript's text.

    transcript: of the response. The engine's thread changes it until the answer has finished.
    stops: the stop strings.
    echo: the prompt, if the answer is to start with it.
    """

    def __init__(self, transcript: Transcript, stops: Sequence[str] = (), echo: Echo | None = None) -> None:
        self.transcript = transcript
        self.echo = echo
        self._stops = stops
        self._characters = 0
        self._tokens = 0
        self._end: Decoded | None = None

    def take(self, events: list[Event]) -> Delta:
        """What is new after a step.

        events: the events of the step, which the transcript already has.
        """
        self._note_end_token(events)
        text = self.transcript.certain(self._stops, start=self._characters)
        self._characters += len(text)
        finished = self.transcript.finished
        tokens = self.transcript.scored(self._tokens, end=math.inf if finished else self._characters)
        self._tokens += len(tokens)
        return Delta(text, self._placed(tokens), events, self.transcript.finish_reason)

    def _note_end_token(self, events: Sequence[Event]) -> None:
        """Keeps the end token that the main thread sampled; the transcript's text has no end tokens."""
        end_ids = self.echo.end_ids if self.echo else frozenset()
        for event in events if end_ids else ():
            if isinstance(event, Decoded) and event.tag and event.token in end_ids:
                self._end = event if not event.path and event.logprob is not None else self._end

    def _placed(self, tokens: Sequence[tuple[int, Decoded]]) -> list[PlacedToken]:
        """Tokens of the transcript's text with their places behind the echo, and in the end the end token."""
        start = len(self.echo.text) if self.echo else 0
        placed: list[PlacedToken] = [(start + at, token) for at, token in tokens]
        if self._end is not None and self.transcript.finished:
            placed.append((start + len(self.transcript.text), self._end))
        return placed

    def text(self) -> str:
        """The whole text of a finished answer, echo included."""
        return (self.echo.text if self.echo else "") + self.transcript.text

    def tokens(self) -> list[PlacedToken]:
        """All tokens of a finished answer that have log-probabilities, with their places in the text."""
        return self._placed(self.transcript.scored())
