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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

from pastalm.core.events import Blocked, Decoded, Event, Finished, FinishReason, Forked, Joined, Path
from pastalm.core.language import Async, Document, Node, Promise, Sync, Text, normalize, render


@dataclass(slots=True)
class ThreadRecord:
    """One thread so far.

    parts: its text as it came, children where they stand, and syncs, in order; it only grows. A sampled token that
    carries log-probabilities is kept whole.
    token_ids: its tokens in order; a child's path where the child stands in linear form.
    forced: indices in `token_ids` of tokens that the thread did not sample.
    """

    path: Path
    topic: str = ""
    promised: int = 0
    tokens: int = 0
    depth: int = 0
    start_step: int = 0
    end_step: int | None = None
    start_time: float = 0.0
    end_time: float | None = None
    state: Literal["live", "waiting", "done"] = "live"
    reason: FinishReason | None = None
    why: str = ""
    parts: list[str | Decoded | Path | Sync] = field(default_factory=list)
    token_ids: list[int | Path] = field(default_factory=list)
    forced: set[int] = field(default_factory=set)

    @property
    def parent(self) -> Path | None:
        return self.path[:-1] if self.path else None

    @property
    def text(self) -> str:
        """The thread's own reader's text, without its children's."""
        return "".join(_text(part) for part in self.parts if isinstance(part, str | Decoded))

    def write(self, text: str) -> None:
        """Text that follows."""
        if text:
            self.parts.append(text)


def _text(piece: str | Decoded) -> str:
    return piece if isinstance(piece, str) else piece.text


class Transcript:
    """One response, built up from its events. Never raises on the events of one interpreter."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.threads: dict[Path, ThreadRecord] = {}
        self.critical_path = 0
        self.tokens = 0
        self.steps = 0
        self.seconds = 0.0
        self._cut: int | None = None
        self._unfinished = 0
        self._settled = io.StringIO(newline="")
        self._settled_scores: list[tuple[int, Decoded]] = []
        self._marks: dict[tuple[Path, int], int | None] = {}
        self._settling = self._certain_pieces(())
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Takes one event into account."""
        if isinstance(event, Forked):
            self._begin(event)
        thread = self.threads[event.path]
        if event.step > self.steps:
            self.steps = event.step
        if event.time > self.seconds:
            self.seconds = event.time
        if isinstance(event, Decoded):
            self._append(thread, event)
        elif isinstance(event, Blocked):
            thread.state = "waiting"
        elif isinstance(event, Joined):
            thread.state = "live"
            if event.children:
                thread.parts.append(Sync())
                thread.depth = max(thread.depth, *(self.threads[c].depth for c in event.children))
        sync = isinstance(event, Joined) and bool(event.children)  # it was sampled, and is only fed late
        for token in event.forced:
            self._count(thread, token, forced=not sync)
        if isinstance(event, Finished):
            self._end(thread, event)

    def _begin(self, event: Forked) -> None:
        record = ThreadRecord(event.path, event.topic, event.promised, start_step=event.step, start_time=event.time)
        if event.path:
            parent = self.threads[event.path[:-1]]
            record.depth = parent.depth
            parent.parts.append(event.path)
            parent.token_ids.append(event.path)
        self.threads[event.path] = record
        self._unfinished += 1

    def _append(self, thread: ThreadRecord, event: Decoded) -> None:
        self._count(thread, event.token, forced=event.replaced)
        if event.logprob is not None and not event.tag:
            thread.parts.append(event)
        else:
            thread.write(event.text)

    def _count(self, thread: ThreadRecord, token: int, *, forced: bool) -> None:
        thread.tokens += 1
        thread.depth += 1
        if forced:
            thread.forced.add(len(thread.token_ids))
        thread.token_ids.append(token)
        self.tokens += 1
        if thread.depth > self.critical_path:
            self.critical_path = thread.depth

    def _end(self, thread: ThreadRecord, event: Finished) -> None:
        thread.write(event.text)
        if event.cut is not None:
            self.cut(event.cut)
        self._unfinished -= thread.state != "done"
        thread.state, thread.reason, thread.why = "done", event.reason, event.why
        thread.end_step, thread.end_time = event.step, event.time

    # ------------------------------------------------------------------ text

    def segments(self) -> list[tuple[Path, str]]:
        """The reader's text in document order, by thread, adjacent pieces of one thread merged."""
        runs = groupby(self._pieces(), key=itemgetter(0))
        return [(path, "".join(_text(piece) for _, piece in run)) for path, run in runs]

    def _pieces(self, path: Path = ()) -> Iterator[tuple[Path, str | Decoded]]:
        """Pieces in document order; an unfinished or empty chunk too, so that it has its place."""
        thread = self.threads.get(path)
        if thread is None:
            return
        if path and not thread.parts:
            yield path, ""
        for part in thread.parts:
            if isinstance(part, str | Decoded):
                yield path, part
            elif isinstance(part, tuple):
                yield from self._pieces(part)

    def _certain_pieces(self, path: Path) -> Iterator[str | Decoded | None]:
        """Pieces in document order, through the first unfinished chunk; None where the next one has not come yet. The
        iterator goes on from there later, so no piece is visited twice."""
        while (thread := self.threads.get(path)) is None:
            yield None
        given = 0
        while True:
            for part in thread.parts[given:]:
                self._note_mark(path, given)
                given += 1
                if isinstance(part, tuple):
                    yield from self._certain_pieces(part)
                elif not isinstance(part, Sync):
                    yield part
            if given == len(thread.parts):
                self._note_mark(path, given)
                if thread.state == "done":
                    return
                yield None

    def _settle(self) -> io.StringIO:
        """The settled text, up to date."""
        text = self._settled
        text.seek(0, io.SEEK_END)
        for piece in self._settling:
            if piece is None:
                break
            if isinstance(piece, Decoded):
                self._settled_scores.append((text.tell(), piece))
            text.write(_text(piece))
        return text

    def _note_mark(self, path: Path, part: int) -> None:
        if (path, part) in self._marks:
            self._marks[path, part] = self._settled.tell()

    def mark(self, path: Path, part: int) -> None:
        """Asks for the character at which part number `part` of a thread begins. That part is not settled yet."""
        self._marks[path, part] = None

    def marked(self, path: Path, part: int) -> int | None:
        """The character that was asked for with `mark`; None while the text before it may still grow."""
        self._settle()
        return self._marks[path, part]

    @property
    def text(self) -> str:
        """The reader's text: tags removed, chunks in their places, cut where a stop string began."""
        text = "".join(_text(piece) for _, piece in self._pieces())
        return text if self._cut is None else text[: self._cut]

    @property
    def settled(self) -> str:
        """The text up to where it may still change: through what the first unfinished chunk has so far."""
        return self._settle().getvalue()

    def settled_from(self, start: int) -> str:
        """The settled text from character `start` on."""
        text = self._settle()
        text.seek(start)
        return text.read()

    def certain(self, stops: Iterable[str] = (), *, start: int = 0) -> str:
        """Text that will not change any more, from character `start` on: the settled text without what a stop string
        may still cut off, and at the end all of it. For readers who can only append: with `start` the number of
        characters they have, they get what is new."""
        if self.finished:
            return self.text[start:]
        text = self.settled_from(start)
        return text[: min((begins(text, stop) for stop in stops), default=len(text))]

    def cut(self, at: int) -> None:
        """Ends the answer before character `at`, where a stop string begins."""
        self._cut = at

    # ------------------------------------------------------------------ linear form

    @property
    def document(self) -> Document:
        """The response in linear form."""
        document = normalize(self._nodes(())) if self.threads else ()
        return document if self._cut is None else _first(document, self._cut)[0]

    @property
    def annotated(self) -> str:
        """The linear form as text (PASTA-LANG)."""
        return render(self.document)

    def _nodes(self, path: Path) -> Iterator[Node]:
        for part in self.threads[path].parts:
            if isinstance(part, str | Decoded):
                yield Text(_text(part))
            elif isinstance(part, Sync):
                yield part
            else:
                child = self.threads[part]
                yield Promise.clip(child.topic, child.promised)
                yield Async(tuple(self._nodes(part)))

    def linear_tokens(self, path: Path = ()) -> Iterator[tuple[Path, int]]:
        """Every decoded token in linear order with its thread."""
        for token in self.threads[path].token_ids if self.threads else ():
            if isinstance(token, tuple):
                yield from self.linear_tokens(token)
            else:
                yield path, token

    def sampled_tokens(self, path: Path = ()) -> Iterator[tuple[int, bool]]:
        """Every decoded token in linear order, and whether its thread sampled it. A forced token was not sampled, nor
        one that replaced another."""
        if (thread := self.threads.get(path)) is None:
            return
        for place, token in enumerate(thread.token_ids):
            if isinstance(token, tuple):
                yield from self.sampled_tokens(token)
            else:
                yield token, place not in thread.forced

    def logprobs(self) -> Iterator[Decoded]:
        """The text's tokens with their log-probabilities, in document order (tags: only in the trace)."""
        return (token for _, token in self.scored())

    def scored(self) -> Iterator[tuple[int, Decoded]]:
        """Tokens of the text with log-probabilities, each with the character at which it begins, up to the cut."""
        at = 0
        for _, piece in self._pieces():
            if self._cut is not None and at >= self._cut:
                return
            if isinstance(piece, Decoded):
                yield at, piece
            at += len(_text(piece))

    def scored_from(self, start: int, *, end: float = math.inf) -> list[tuple[int, Decoded]]:
        """`scored` of the settled text without the first `start` tokens, up to character `end`."""
        self._settle()
        end = end if self._cut is None else min(end, self._cut)
        stop = bisect_left(self._settled_scores, end, lo=start, key=itemgetter(0))
        return self._settled_scores[start:stop]

    # ------------------------------------------------------------------ figures

    @property
    def parallelism(self) -> float:
        """Tokens / critical path (PASTA section 6, "theoretical parallelism")."""
        return self.tokens / self.critical_path if self.critical_path else 1.0

    @property
    def finished(self) -> bool:
        return bool(self.threads) and not self._unfinished

    @property
    def was_cut(self) -> bool:
        """Whether a stop string cut the text."""
        return self._cut is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        """`abort` or `length` if any thread ended so, else `stop`; None while one decodes."""
        if not self.finished:
            return None
        if self._cut is not None:
            return "stop"
        reasons = {t.reason for t in self.threads.values()}
        if "abort" in reasons:
            return "abort"
        return "length" if "length" in reasons else "stop"

    @property
    def why(self) -> str:
        """Why an engine lost a thread, if one was lost."""
        return next((t.why for t in self.threads.values() if t.why), "")

    def to_dict(self) -> dict[str, Any]:
        """One JSON object for a response."""
        return {
            "text": self.text,
            "annotated": self.annotated,
            "tokens": self.tokens,
            "steps": self.steps,
            "critical_path": self.critical_path,
            "parallelism": round(self.parallelism, 4),
            "seconds": round(self.seconds, 4),
            "finish_reason": self.finish_reason,
            "threads": [
                {
                    "id": thread_name(t.path),
                    "parent": None if t.parent is None else thread_name(t.parent),
                    "topic": t.topic,
                    "promised_tokens": t.promised,
                    "tokens": t.tokens,
                    "start_step": t.start_step,
                    "end_step": t.end_step,
                }
                for t in self.threads.values()
            ],
        }


def _first(document: Document, characters: int) -> tuple[Document, int]:
    """The document up to so many characters of its text, and how many of them it lacks."""
    kept: list[Node] = []
    for node in document:
        if isinstance(node, Text):
            text = node.text[:characters]
            characters -= len(text)
            kept.append(Text(text))
        elif isinstance(node, Async):
            body, characters = _first(node.body, characters)
            kept.append(Async(body))
        else:
            kept.append(node)
        if not characters and not isinstance(node, Promise):
            break
    return normalize(kept), characters


def begins(text: str, stop: str) -> int:
    """The character at which a stop string begins in a text, or at which the text ends in the start of one; the text's
    length if neither is so."""
    if (at := text.find(stop)) >= 0:
        return at
    longest = min(len(stop) - 1, len(text))
    return next((len(text) - k for k in range(longest, 0, -1) if text.endswith(stop[:k])), len(text))


def thread_name(path: Path) -> str:
    """A thread's name for people: `main`, `0`, `0.1`."""
    return ".".join(map(str, path)) or "main"
