"""Drives an interpreter with chosen tokens and holds every event to the rules of SPEC "Threads"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pastalm.core.events import (
    Blocked,
    Decoded,
    Event,
    Finished,
    FinishReason,
    Forked,
    Joined,
    Path,
    SampledToken,
    TokenSet,
)
from pastalm.core.interpreter import Interpreter, Limits
from pastalm.core.language import topic_key
from pastalm.core.layout import Layout, Policy
from pastalm.core.params import SamplingParams
from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.engines.scripted import byte_vocabulary
from pastalm.records.xml import Scanner

PIECES = (
    '<promise topic="', '" tokens="', "10", "20", "30", '"/>', '"/>\n', "/><", '"/></', "<async>", "</async>",
    "</", "async>", "<sync/>", "<sync", "/>x", "a", "b", " ", ". <sync/>Now", '0"/>', "é",
)  # fmt: skip


def piece_vocabulary() -> Vocabulary:
    """An unprepared vocabulary: bytes, the end, and pieces that straddle the XML's tags."""
    raw = [bytes([i]) for i in range(256)] + [b""] + [p.encode() for p in PIECES]
    longest = sorted(range(257, len(raw)), key=lambda i: -len(raw[i]))

    def encode(text: str) -> list[int]:
        rest, ids = text.encode(), list[int]()
        while rest:
            ids.append(next((i for i in longest if rest.startswith(raw[i])), rest[0]))
            rest = rest[len(raw[ids[-1]]) :]
        return ids

    return Vocabulary(len(raw), frozenset({256}), encode, raw.__getitem__, Scanner)


PREPARED = byte_vocabulary()
XML_BYTES = byte_vocabulary(prepared=False)
XML_PIECES = piece_vocabulary()


@dataclass
class Player:
    """One response. What it knows of threads it has from the events alone."""

    vocabulary: Vocabulary = PREPARED
    max_tokens: int = 200
    limits: Limits = field(default_factory=Limits)
    prompt_length: int = 3
    parallelism: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        params = SamplingParams(max_tokens=self.max_tokens, parallelism=self.parallelism, ignore_eos=self.ignore_eos)
        self.interpreter = Interpreter(self.vocabulary, params, self.prompt_length, self.limits)
        self.events: list[Event] = []
        self.state: dict[Path, str] = {}
        self.allowed: dict[Path, TokenSet | None] = {}
        self.groups: dict[Path, dict[Path, str]] = {}
        self.last: dict[Path, int | None] = {}
        self.tokens = 0
        self._see(self.interpreter.start())

    @property
    def live(self) -> list[Path]:
        return [path for path, state in self.state.items() if state == "live"]

    def sample(self, token: int, path: Path = ()) -> list[Event]:
        """A token of a thread, and what followed from it."""
        assert self.state[path] == "live"
        sampled = SampledToken(request_id="r", path=path, token=token)
        events = self._see(self.interpreter.advance(sampled))
        if events and isinstance(events[0], Decoded):
            assert events[0].replaced == (events[0].token != token)
        return events

    def say(self, text: str | Sequence[int], path: Path = ()) -> list[Event]:
        """Tokens of a thread one after another; the events of all."""
        ids = self.vocabulary.encode(text) if isinstance(text, str) else text
        return [event for token in ids for event in self.sample(token, path)]

    def promise(self, topic: str = "a", tokens: int = 10, path: Path = ()) -> Path:
        """A whole promise of a prepared model; its child."""
        self.say([self.tags.promise, *self.vocabulary.encode(topic)], path)
        return self.promised(tokens, path)

    def promised(self, tokens: int, path: Path) -> Path:
        """The rest of a promise whose topic stands; its child."""
        before = len(self.events)
        rest = [*self.vocabulary.encode(str(tokens)), self.tags.promise_end]
        if self.interpreter.threads[path].mode == "topic":
            rest = [self.tags.tokens, *rest]
        while rest:
            (decoded, *_) = self.sample(rest[0], path)
            assert isinstance(decoded, Decoded)
            rest = rest[1 + len(decoded.forced) :]
        return next(e.path for e in self.events[before:] if isinstance(e, Forked))

    @property
    def tags(self) -> Tags:
        assert self.vocabulary.tags is not None
        return self.vocabulary.tags

    def finish(self, reason: FinishReason = "abort") -> list[Event]:
        return self._see(self.interpreter.finish(reason))

    def reasons(self) -> dict[Path, FinishReason]:
        return {event.path: event.reason for event in self.events if isinstance(event, Finished)}

    def text(self, path: Path = ()) -> str:
        return "".join(e.text for e in self.events if e.path == path and isinstance(e, Decoded | Finished))

    def run(self, choose: Callable[[Player], tuple[Path, int]]) -> None:
        """Samples what is chosen until every thread has ended."""
        while self.live:
            path, token = choose(self)
            self.sample(token, path)
        assert self.interpreter.finished
        assert set(self.state.values()) == {"finished"}

    def positions(self, policy: Policy) -> list[int]:
        """The position of every token, by the layout's own account."""
        layout = Layout(self.prompt_length, self.prompt_length + self.tokens, policy)
        return [placed.position for event in self.events for placed in layout.apply(event)]

    # ------------------------------------------------------------------ the rules

    def _see(self, events: list[Event]) -> list[Event]:
        for event in events:
            self._check(event)
            ids = [*([event.token] if isinstance(event, Decoded) else []), *event.forced]
            self.tokens += len(ids)
            self.last[event.path] = ids[-1] if ids else self.last.get(event.path)
            self.allowed[event.path] = event.allowed
        self.events += events
        assert self.tokens <= self.max_tokens
        assert len(self.live) <= self.limits.max_threads
        return events

    def _check(self, event: Event) -> None:
        path, before = event.path, self.state.get(event.path)
        assert event.step == 0
        assert event.time == 0
        match event:
            case Forked():
                assert before is None
                self._check_fork(event)
                self.state[path], self.groups[path] = "live", {}
            case Decoded():
                assert before == "live"
            case Blocked(on=on):
                assert before == "live"
                self.state[path] = on
                assert (on == "sync") <= bool(self.groups[path])
            case Joined(children=children):
                assert before in (("sync", "live") if children else ("thread",))
                assert event.forced
                assert set(children) in (set(), set(self.groups[path]))
                assert all(self.state[child] == "finished" for child in children)
                self.state[path] = "live"
                self.groups[path] = {} if children else self.groups[path]
            case Finished():
                assert before in ("live", "thread", "sync")
                assert event.allowed is None
                self.state[path] = "finished"

    def _check_fork(self, event: Forked) -> None:
        if not event.path:
            assert not self.state
            return
        parent = event.path[:-1]
        assert self.parallelism > 0
        assert self.state[parent] == "live"
        assert len(event.path) <= self.limits.max_depth
        if self.vocabulary.tags is not None:  # else the child would see what its parent wrote later
            assert self.last[parent] == self.vocabulary.tags.promise_end
        group = self.groups[parent]
        assert topic_key(event.topic) not in group.values()
        group[event.path] = topic_key(event.topic)
        assert len(group) <= self.limits.max_promises
