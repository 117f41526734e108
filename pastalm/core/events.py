"""Events: the one thing that crosses layers. A list of them is the trace of a response.

The interpreter makes them, engines apply them, and transcripts, views and trace files consume them. Each can say what
the next tokens of its thread are: `forced` ids, which the engine feeds in that order without sampling, and `allowed`,
the ids it may sample next (None: any). This is how grammar, budgets and forced tokens reach an engine, which knows
nothing about the language. A token of a thread stands either as the `token` of one `Decoded` or in the `forced` of one
event, never in both. `text` is the reader's text that an event adds to its thread.

The driver stamps `step` (rounds of sampling so far; each needs a forward pass, but where guesses came true) and `time`
(seconds since the request began).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Path: TypeAlias = "tuple[int, ...]"
"""A thread: () is the main thread, p + (k,) the child that keeps the k-th promise of thread p."""

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class TokenSet:
    """A set of token ids, written by its members or, `inverted`, by those it leaves out."""

    ids: frozenset[int]
    inverted: bool = False

    def __contains__(self, token: int) -> bool:
        return (token in self.ids) != self.inverted


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A thread's next token as the engine sampled it. logprob: raw log-softmax (before bias, penalty,
    temperature and masks), None unless the request wants it. lost: why the engine gives the thread up, one line for
    people (for example, its server failed for good); `token` means nothing then. drafter: who had guessed the token
    before it, so that it needed no forward pass of its own ("": it did). drafted: drafters of the guesses that were
    fed along with its own pass."""

    request_id: str
    path: Path
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    lost: str = ""
    drafter: str = ""
    drafted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    path: Path
    forced: tuple[int, ...] = ()
    allowed: TokenSet | None = None
    text: str = ""
    step: int = 0
    time: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked(_Event):
    """Thread `path` begins; it sees what its parent, path[:-1], sees now.

    The main thread begins with this event too (topic "", promised 0). topic: the promise's; promised:
    its length N in tokens, which moves the parent's positions under the policy `promised`.
    """

    topic: str = ""
    promised: int = 0
    kind: Literal["forked"] = "forked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded(_Event):
    """Thread `path` sampled `token`: it is fed next.

    text: may be empty: part of a character or of a tag.
    tag: whether it belongs to a tag. replaced: the grammar put it in the place of the one sampled (a
    topic's fourth word became the topic's end; masks cannot say that). logprob, top_logprobs: raw
    log-softmax, natural logarithm. drafter, drafted: as `SampledToken`'s.
    """

    token: int
    tag: bool = False
    replaced: bool = False
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    drafter: str = ""
    drafted: tuple[str, ...] = ()
    kind: Literal["decoded"] = "decoded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked(_Event):
    """Thread `path` waits: for its children (`sync`) or for one of `max_threads` places (`thread`)."""

    on: Literal["sync", "thread"] = "sync"
    kind: Literal["blocked"] = "blocked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(_Event):
    """Thread `path` goes on, and sees from now on what each of `children` sees (none: it only waited)."""

    children: tuple[Path, ...] = ()
    kind: Literal["joined"] = "joined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(_Event):
    """Thread `path` ended: `stop` by its own end token or a stop string, `length` by a budget, or `abort`.

    text: what was held back as a possible tag, the newline of a chunk that would end inside a line. cut: the whole
    answer ends before this character, where a stop string begins.
    why: one line for people, if the engine caused an `abort`.
    """

    reason: FinishReason = "stop"
    cut: int | None = None
    why: str = ""
    kind: Literal["finished"] = "finished"


Event: TypeAlias = "Forked | Decoded | Blocked | Joined | Finished"


def stamp(event: Event, step: int, time: float) -> None:
    """Sets the driver's step and time on an event that no other code has seen yet. It does not change after that."""
    object.__setattr__(event, "step", step)
    object.__setattr__(event, "time", time)
