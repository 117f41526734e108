"""What every engine is: requests in, sampled tokens out, events applied. Nothing here knows the language.

The driver's loop, the same for every engine:

    engine.add(request)
    engine.apply(request.id, event)            # the main thread's Forked event starts it
    while engine.has_unfinished():
        for sampled in engine.step():          # one forward pass for every live thread of every request
            for event in interpreter.advance(sampled):
                engine.apply(sampled.request_id, event)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pastalm.core.events import Event, Path, SampledToken
from pastalm.core.layout import Policy
from pastalm.core.params import Request
from pastalm.errors import CapabilityError, complaint


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do. Asking for anything else is a CapabilityError.

    Each engine's module declares its own as CAPABILITIES; an engine that has been made adds its sizes.
    """

    name: str
    weights: str
    """What it runs, for people."""
    positions: tuple[Policy, ...]
    masks: bool = True
    """Whether `allowed` is honoured. Where it is not, the interpreter puts right what is sampled."""
    untagged: bool = False
    """Whether tags can be kept out of a whole response where `allowed` is not honoured."""
    logprobs: bool = True
    prompt_logprobs: bool = False
    """Whether it scores given tokens (`score`)."""
    drafts: bool = False
    """Whether it feeds guesses ahead (engines/drafts). One that does not takes `drafts` and `references`, and answers
    the same: they change no answer."""
    processors: bool = False
    """Whether it runs logits processors (engines/processors)."""
    checks: bool = False
    """Whether a thread's token can be refused and asked for again (structured/checked.py)."""
    guides: tuple[str, ...] = ()
    """What it holds a thread's next text to itself (`Request.guide`): regex, json (a schema)."""
    exact: bool = False
    """Whether float64 laws hold on it."""
    max_model_len: int = 0
    """Slots a request may fill: prompt and every decoded token."""
    max_num_seqs: int = 0
    max_position: int | None = None
    """Largest position id + 1 that the model takes (None: unbounded)."""

    def check(self, request: Request) -> None:
        """Raises CapabilityError if a request asks for what is not offered."""
        params = request.params
        checks = (
            (
                request.positions in self.positions,
                f"offers positions {' and '.join(self.positions)}, not {request.positions!r}",
            ),
            (self.logprobs or params.logprobs is None, "gives no log-probabilities"),
            (
                self.processors or self.checks or not (params.schema is not None or params.calls),
                "cannot hold a schema or tools",
            ),
            (self.processors or not params.processors, "has no logits to process: leave out processors"),
            (self.masks or params.min_tokens == 0, "cannot forbid the end: leave out min_tokens"),
            (
                self.masks or self.untagged or params.parallelism > 0,
                "cannot forbid tags: parallelism 0 is not possible",
            ),
        )
        if problem := complaint(checks):
            raise CapabilityError(f"the {self.name} engine {problem}")

    def __str__(self) -> str:
        """One line for people."""
        offered = (
            (self.masks, "grammar masks"),
            (self.logprobs, "logprobs"),
            (self.prompt_logprobs, "logprobs of prompts"),
            (self.drafts, "drafts"),
            (self.exact, "exact in float64"),
        )
        parts = [self.weights, f"positions {', '.join(self.positions)}"]
        return "; ".join([*parts, *(what for has, what in offered if has)])


Schedule = Callable[[Sequence[tuple[str, Path]]], Sequence[tuple[str, Path]]]
"""Which of the live threads decode in a step (a law: the text does not depend on it)."""


class Engine(Protocol):
    """An engine. Not thread-safe: one driver calls it."""

    @property
    def capabilities(self) -> Capabilities: ...

    def add(self, request: Request) -> None:
        """Takes a request; it waits while the pool is full. Raises RequestError if it never could fit,
        CapabilityError if it asks for what is not offered."""

    def apply(self, request_id: str, event: Event) -> None:
        """Does what an event means: fork, feed, block, join, end. The main thread's `Forked` starts it.
        When every thread of a request is finished its slots are free."""

    def step(self) -> list[SampledToken]:
        """One forward pass over all that is to be fed; the tokens sampled after it, one a thread at most (none
        if the pass only fed the ends of threads). Where the forward passes are a server's, a step is a round:
        what has come of each thread, after waiting a moment for the first."""

    def score(self, token_ids: Sequence[int], logprobs: int) -> list[SampledToken] | None:
        """Each given token but the first with its raw log-probability behind those before it, and the `logprobs`
        likeliest in its place; None while there is no room. To be asked where `prompt_logprobs` is offered.
        Raises RequestError."""

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""

    def cancel(self, request_id: str) -> None:
        """Frees the request's slots at once; unknown ids are ignored."""
