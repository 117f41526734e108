"""Shows a response in a terminal. It only reads events, and knows no model or engine.

`View` makes a picture of the events so far: the answer in document order, each chunk in its thread's colour, and below
it one row for each thread on a common axis of steps, so that threads decoded at the same time stand side by side. A
promised length is an outline that fills in. `Live` draws the picture while events arrive; `Plain` writes text as soon
as it is certain.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from types import TracebackType
from typing import Protocol, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.text import Text

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path
from pastalm.core.language import CHUNK_TAGS
from pastalm.core.transcript import ThreadRecord, Transcript
from pastalm.records.transcripts import thread_name

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green")
FRAMES_PER_SECOND = 6.0
"""A frame takes up to 10 ms from decoding."""

_NAME, _TOPIC, _COUNT, _STATE = 6, 24, 9, 9
_MIN_BAR = 10
_CONTROL = {c: None for c in (*range(32), 127, *range(128, 160)) if chr(c) not in "\n\t"}


class Output(Protocol):
    """Shows events as they arrive; `close` shows the rest at the end."""

    def apply(self, event: Event) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Course:
    """A thread's steps.

    steps: of each decoded token its step, and whether it was guessed and so needed no pass.
    waits: first and last step of each wait (None: it still waits).
    queued: it waits for a place among the running threads.
    """

    steps: list[tuple[int, bool]] = field(default_factory=list)
    waits: list[tuple[int, int | None]] = field(default_factory=list)
    queued: bool = False


class View:
    """The picture of one response, from the events so far."""

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.transcript = Transcript()
        self._courses: dict[Path, _Course] = {}

    def apply(self, event: Event) -> None:
        """Takes one event into account."""
        self.transcript.apply(event)
        course = self._courses.setdefault(event.path, _Course())
        if isinstance(event, Decoded):
            course.steps.append((event.step, bool(event.drafter)))
        course.steps += [(event.step, False)] * bool(event.forced and not isinstance(event, Decoded))
        if isinstance(event, Blocked):
            course.waits.append((event.step, None))
            course.queued = event.on == "thread"
        elif isinstance(event, Joined | Finished) and course.waits and course.waits[-1][1] is None:
            course.waits[-1] = (course.waits[-1][0], event.step)

    # ------------------------------------------------------------------ pictures

    def frame(self, console: Console, width: int, height: int) -> RenderableType:
        """The picture while events arrive, in at most `height` lines (8 or more)."""
        rows = self._rows(width, max(3, (height - 4) // 2))
        room = max(1, height - len(rows) - 4)
        lines = [self._head(width), *self._window(console, width, room), Text(), *rows, Text()]
        return Group(*lines, self.figures())

    def final(self, width: int) -> RenderableType:
        """The picture at the end: the whole answer, every thread, the figures."""
        rows = self._rows(width, len(self.transcript.threads))
        return Group(self._head(width), self.answer(), Text(), *rows, Text(), self.figures())

    def answer(self) -> Text:
        """The answer in document order, coloured by thread; an unfinished chunk shows where it grows."""
        answer = Text()
        shown = segments(self.transcript)
        last = {path: i for i, (path, _) in enumerate(shown)}
        for i, (path, text) in enumerate(shown):
            answer.append(text.translate(_CONTROL), self._colour(path))
            thread = self.transcript.threads[path]
            if path and thread.state != "done" and last[path] == i:
                hint = "▍" if text else f"[{thread.topic.translate(_CONTROL)} …]"
                answer.append(f"{hint}\n", f"dim {self._colour(path)}")
        if self.transcript.threads[()].state == "live":
            answer.append("▍", "dim")
        if self.transcript.finished:
            answer = answer[: len(self.transcript.text.translate(_CONTROL))]
        return answer

    def figures(self) -> Text:
        """The numbers of the response so far, in one line."""
        style = "bold" if self.transcript.finished else "dim"
        return Text(figures(self.transcript), style, no_wrap=True, overflow="ellipsis")

    def _head(self, width: int) -> Text:
        title = f"── {self.title} " if self.title else ""
        return Text(title + "─" * max(0, width - cell_len(title)), "dim")

    def _colour(self, path: Path) -> str:
        if not path:
            return ""
        chunks = [p for p in self.transcript.threads if p]
        return COLOURS[chunks.index(path) % len(COLOURS)]

    def _window(self, console: Console, width: int, room: int) -> list[Text]:
        """The lines around the end of the certain text. room: number of lines."""
        lines = list(self.answer().wrap(console, width))
        certain = len(Text(self.transcript.settled.translate(_CONTROL)).wrap(console, width))
        first = max(0, min(certain - room // 3 - 1, len(lines) - room))
        return lines[first : first + room]

    # ------------------------------------------------------------------ threads

    def _rows(self, width: int, most: int) -> list[Text]:
        threads = list(self.transcript.threads.values())
        shown = threads
        if len(threads) > most:
            urgent = sorted(threads, key=lambda t: (bool(t.path), t.state == "done"))[: most - 1]
            kept = {t.path for t in urgent}
            shown = [t for t in threads if t.path in kept]
        rows = [self._row(thread, width) for thread in shown]
        if len(shown) < len(threads):
            rows.append(Text(f"… and {len(threads) - len(shown)} more threads", "dim"))
        return rows

    def _row(self, thread: ThreadRecord, width: int) -> Text:
        bar = max(_MIN_BAR, width - _NAME - _TOPIC - _COUNT - _STATE - 4)
        colour = self._colour(thread.path)
        count = f"{thread.tokens}/{thread.promised}" if thread.path else str(thread.tokens)
        row = Text(no_wrap=True, overflow="crop")
        row.append(set_cell_size(thread_name(thread.path), _NAME) + " ", colour)
        topic = thread.topic.translate(_CONTROL) if thread.path else ""
        row.append(set_cell_size(topic, _TOPIC) + " ", colour)
        row.append_text(self._bar(thread, bar, colour))
        row.append(" " + count.rjust(_COUNT - 1) + "  ")
        row.append(self._state(thread), "dim" if thread.state == "done" else "bold")
        return row

    def _bar(self, thread: ThreadRecord, width: int, colour: str) -> Text:
        """The thread over the steps of the response: ━ decoded, ─ mostly guessed, ╌ promised, · waited."""
        scale = width / (self._horizon() + 1)
        cells = [(" ", "")] * width
        course = self._courses[thread.path]

        def fill(first: int, last: int, char: str, style: str) -> None:
            for i in range(int(first * scale), min(width, int(last * scale) + 1)):
                cells[i] = (char, style)

        if thread.path:
            fill(thread.start_step, _due(thread), "╌", f"dim {colour}")
        for first, last in course.waits:
            fill(first, self.transcript.steps if last is None else last, "·", "dim")
        guessed: Counter[int] = Counter()  # by column, less those that were not
        for step, guess in course.steps:
            guessed[int(step * scale)] += 1 if guess else -1
        for step, _ in course.steps:
            fill(step, step, "─" if guessed[int(step * scale)] > 0 else "━", colour)
        bar = Text()
        for (char, style), run in groupby(cells):
            bar.append(char * len(list(run)), style)
        return bar

    def _horizon(self) -> int:
        return max(self.transcript.steps, *(_due(t) for t in self.transcript.threads.values()))

    def _state(self, thread: ThreadRecord) -> str:
        if thread.state == "done":
            return {"stop": "done", "length": "cut", "abort": "stopped"}[thread.reason or "stop"]
        queued = thread.state == "waiting" and self._courses[thread.path].queued
        return "queued" if queued else thread.state


def segments(transcript: Transcript) -> list[tuple[Path, str]]:
    """The reader's text in document order, by thread, adjacent pieces of one thread merged. An unfinished or empty
    chunk has a place too."""
    runs = groupby(_pieces(transcript, ()) if transcript.threads else (), key=itemgetter(0))
    return [(path, "".join(text for _, text in run)) for path, run in runs]


def _pieces(transcript: Transcript, path: Path) -> Iterator[tuple[Path, str]]:
    empty = bool(path)
    for event in transcript.threads[path].events:
        if isinstance(event, Forked) and event.path != path:
            empty = False
            yield from _pieces(transcript, event.path)
        elif event.text:
            empty = False
            yield path, event.text
    if empty:
        yield path, ""


def _due(thread: ThreadRecord) -> int:
    """The step at which a thread ends if it has exactly the promised length."""
    return thread.start_step + (thread.promised + CHUNK_TAGS if thread.path else 0)


def figures(transcript: Transcript) -> str:
    """The numbers of a response in one line."""
    rate = transcript.tokens / transcript.seconds if transcript.seconds else 0.0
    chunks = sum(bool(path) for path in transcript.threads)
    parts = [
        f"{transcript.tokens} tokens",
        f"{chunks} chunk{'' if chunks == 1 else 's'}",
        f"{transcript.steps} steps",
        f"critical path {transcript.critical_path}",
        f"parallelism {transcript.parallelism:.2f}",
        f"{transcript.tokens_per_pass:.2f} tokens/pass",
        f"{transcript.seconds:.2f} s",
        f"{rate:.1f} tokens/s",
    ]
    if guesses := transcript.drafted.total():
        parts.append(f"{transcript.accepted.total()} of {guesses} guesses came true (─)")
    reason = transcript.finish_reason
    if reason == "length":
        parts.append("cut at the limit of tokens")
    return " · ".join(parts + (["stopped"] if reason == "abort" else []))


# ------------------------------------------------------------------------------ outputs


class Live:
    """Draws the picture on a terminal while events arrive, and leaves the final one there."""

    def __init__(self, console: Console, title: str = "") -> None:
        self.view = View(title)
        self._console = console
        self._drawn = 0.0
        self._live = RichLive(console=console, transient=True, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def apply(self, event: Event) -> None:
        """Takes an event, and draws if the last frame is old enough."""
        self.view.apply(event)
        now = time.perf_counter()
        if now - self._drawn >= 1 / FRAMES_PER_SECOND:
            self._drawn = now
            width, height = self._console.size
            self._live.update(self.view.frame(self._console, width, height - 1), refresh=True)

    def close(self) -> None:
        """Replaces the moving picture by the final one."""
        self._live.stop()
        self._console.print(self.view.final(self._console.width))


class Plain:
    """Writes the reader's text to a file as soon as it is certain.

    stops: stop strings; text that one may still cut off is held back.
    cut: characters of the answer, if it is known to be cut.
    """

    def __init__(self, out: TextIO, *, stops: Sequence[str] = (), cut: int | None = None) -> None:
        self._out, self._stops, self._cut = out, tuple(stops), cut
        self._transcript = Transcript()
        self._written = 0

    def apply(self, event: Event) -> None:
        """Takes an event, and writes the text that is certain now."""
        self._transcript.apply(event)
        self._write(self._transcript.certain(self._stops, start=self._written))

    def close(self) -> None:
        """Writes the rest: text that was held back, and text after an unfinished chunk."""
        text = self._transcript.text
        self._write(text[self._written :])
        if text and not text.endswith("\n"):
            self._out.write("\n")
        self._out.flush()

    def _write(self, text: str) -> None:
        """Writes the next piece of text, up to the cut."""
        if self._cut is not None:
            text = text[: self._cut - self._written]
        if text:
            self._out.write(text)
            self._out.flush()
            self._written += len(text)


class Silent:
    """Shows nothing; keeps the transcript."""

    def __init__(self) -> None:
        self.transcript = Transcript()

    def apply(self, event: Event) -> None:
        """Takes an event."""
        self.transcript.apply(event)

    def close(self) -> None:
        """Nothing is left to show."""


def paced(events: Sequence[Event], speed: float) -> Iterator[Event]:
    """Yields events at their recorded times, `speed` times as fast."""
    begun = time.perf_counter()
    for event in events:
        wait = event.time / speed - (time.perf_counter() - begun)
        if wait > 0:
            time.sleep(wait)
        yield event
