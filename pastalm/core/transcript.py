"""The transcript: from the events of one response, its text, its linear form and its figures.

It works alike on events as they come and on those of a trace: no model, no vocabulary, no clock. What is settled, the
text through the first unfinished chunk, is built once, so that a token costs the same at any length.

The depth of a token is 1 + the largest depth among the tokens it waits for: the one before it in its thread; for the
first of a chunk, the last of its promise; for a sync, the last of every joined child. The critical path is the largest
depth: the fewest steps in which the response can be decoded.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Literal

from pastalm.core.events import Blocked, Decoded, Event, Finished, FinishReason, Forked, Joined, Path
from pastalm.core.language import AsyncClose, AsyncOpen, Mark, Promise, Sync, Text, merged, render_mark


@dataclass(slots=True)
class ThreadRecord:
    """One thread so far.

    tokens: number of its tokens. depth: that of its last one.
    events: its own and the `Forked` of its children, in order.
    places: where in the answer's text each event stands, and behind them the next one, as far as the text is settled.
    """

    path: Path
    topic: str = ""
    promised: int = 0
    tokens: int = 0
    depth: int = 0
    start_step: int = 0
    end_step: int | None = None
    state: Literal["live", "waiting", "done"] = "live"
    reason: FinishReason | None = None
    why: str = ""
    events: list[Event] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class Transcript:
    """One response, built up from its events. Never raises on the events of one interpreter.

    threads: by path, in the order in which they began. critical_path, tokens, steps, seconds: so far.
    passes: forward passes that the sampled tokens needed. drafted, accepted: guessed tokens by drafter, those that were
    fed and those that came true and saved their thread a pass.
    cut: the answer ends before this character, where a stop string begins (None: no stop string cuts it).
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.threads: dict[Path, ThreadRecord] = {}
        self.critical_path = 0
        self.tokens = 0
        self.steps = 0
        self.passes = 0
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self._last_pass = 0
        self.seconds = 0.0
        self.cut: int | None = None
        self._unfinished = 0
        self._settled = io.StringIO(newline="")
        self._scored: list[tuple[int, Decoded]] = []
        self._settling = self._settle_thread(())
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Takes one event into account."""
        thread = self._begin(event) if isinstance(event, Forked) else self.threads[event.path]
        thread.events.append(event)
        count = len(event.forced)
        if isinstance(event, Decoded):
            count += 1
            if event.drafter:
                self.accepted[event.drafter] += 1
            elif event.step != self._last_pass:
                self.passes, self._last_pass = self.passes + 1, event.step
            if event.drafted:
                self.drafted.update(event.drafted)
        elif isinstance(event, Blocked):
            thread.state = "waiting"
        elif isinstance(event, Joined):
            thread.state = "live"
            thread.depth = max(thread.depth, *(self.threads[child].depth for child in event.children), 0)
        elif isinstance(event, Finished):
            self._unfinished -= thread.state != "done"
            thread.state, thread.reason, thread.why, thread.end_step = "done", event.reason, event.why, event.step
            self.cut = event.cut if event.cut is not None else self.cut
        thread.tokens += count
        thread.depth += count
        self.tokens += count
        self.steps, self.seconds = event.step, event.time
        if thread.depth > self.critical_path:
            self.critical_path = thread.depth

    def _begin(self, event: Forked) -> ThreadRecord:
        thread = ThreadRecord(event.path, event.topic, event.promised, start_step=event.step)
        if event.path:
            parent = self.threads[event.path[:-1]]
            parent.events.append(event)
            thread.depth = parent.depth
        self.threads[event.path] = thread
        self._unfinished += 1
        return thread

    # ------------------------------------------------------------------ text

    @property
    def text(self) -> str:
        """The reader's text: tags removed, chunks in their places, cut where a stop string began."""
        return "".join(mark.text for mark in self.marks() if isinstance(mark, Text))

    @property
    def settled(self) -> str:
        """The text up to where it may still change: through what the first unfinished chunk has so far."""
        return self.settled_from(0)

    def settled_from(self, start: int) -> str:
        """The settled text from character `start` on."""
        self._settle()
        self._settled.seek(start)
        return self._settled.read()

    def certain(self, stops: Iterable[str] = (), *, start: int = 0) -> str:
        """Text that will not change any more, from character `start` on: the settled text without what a stop string
        may still cut off, and at the end all of it. For readers who can only append: with `start` the number of
        characters they have, they get what is new."""
        if self.finished:
            return self.text[start:]
        text = self.settled_from(start)
        return text[: min((begins(text, stop) for stop in stops), default=len(text))]

    def place(self, path: Path, number: int) -> int | None:
        """The character at which event `number` of a thread stands; None while the text before it may still grow."""
        self._settle()
        places = self.threads[path].places
        return places[number] if number < len(places) else None

    def scored(self, start: int = 0, *, end: float = math.inf) -> list[tuple[int, Decoded]]:
        """The settled text's tokens that have log-probabilities, in document order, each with the character at which
        it begins (tags: only in the trace). Without the first `start` of them, up to character `end`."""
        self._settle()
        end = end if self.cut is None else min(end, self.cut)
        return self._scored[start : bisect_left(self._scored, end, lo=start, key=itemgetter(0))]

    def _settle(self) -> None:
        """Brings the settled text up to date."""
        if self.threads:
            self._settled.seek(0, io.SEEK_END)
            next(self._settling, None)

    def _settle_thread(self, path: Path) -> Iterator[None]:
        """Settles the text of a thread, event by event; yields where the next one has not come yet. It goes on from
        there later, so that no event is visited twice."""
        thread = self.threads[path]
        thread.places.append(self._settled.tell())
        while True:
            for event in thread.events[len(thread.places) - 1 :]:
                if isinstance(event, Forked) and event.path != path:
                    yield from self._settle_thread(event.path)
                else:
                    if isinstance(event, Decoded) and event.logprob is not None and not event.tag:
                        self._scored.append((thread.places[-1], event))
                    self._settled.write(event.text)
                thread.places.append(self._settled.tell())
            if len(thread.places) > len(thread.events):
                if thread.state == "done":
                    return
                yield

    # ------------------------------------------------------------------ linear form

    @property
    def annotated(self) -> str:
        """The linear form as text (PASTA-LANG)."""
        return "".join(map(render_mark, self.marks()))

    def marks(self) -> Iterator[Mark]:
        """The linear form, in normal form, cut where a stop string began."""
        self._settle()
        return merged(self._marks(()) if self.threads else ())

    def _marks(self, path: Path) -> Iterator[Mark]:
        thread = self.threads[path]
        for number, event in enumerate(thread.events):
            left = None if self.cut is None else self.cut - thread.places[number]
            if left is not None and left <= 0:
                return
            if isinstance(event, Forked) and event.path != path:
                yield Promise.clip(event.topic, event.promised)
                yield AsyncOpen()
                yield from self._marks(event.path)
                yield AsyncClose()
            else:
                if isinstance(event, Joined) and event.children:
                    yield Sync()
                yield Text(event.text[:left])

    # ------------------------------------------------------------------ figures

    @property
    def parallelism(self) -> float:
        """Tokens / critical path (PASTA section 6, "theoretical parallelism")."""
        return self.tokens / self.critical_path if self.critical_path else 1.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens / forward passes: what threads and drafts save together."""
        return self.tokens / self.passes if self.passes else 1.0

    @property
    def finished(self) -> bool:
        return bool(self.threads) and not self._unfinished

    @property
    def finish_reason(self) -> FinishReason | None:
        """`abort` or `length` if any thread ended so, else `stop`; None while one decodes."""
        if not self.finished:
            return None
        reasons = {thread.reason for thread in self.threads.values()} if self.cut is None else set()
        return "abort" if "abort" in reasons else "length" if "length" in reasons else "stop"

    @property
    def why(self) -> str:
        """Why an engine lost a thread, if one was lost."""
        return next((thread.why for thread in self.threads.values() if thread.why), "")


def begins(text: str, stop: str) -> int:
    """The character at which a stop string begins in a text, or at which the text ends in the start of one; the text's
    length if neither is so."""
    if (at := text.find(stop)) >= 0:
        return at
    longest = min(len(stop) - 1, len(text))
    return next((len(text) - k for k in range(longest, 0, -1) if text.endswith(stop[:k])), len(text))
