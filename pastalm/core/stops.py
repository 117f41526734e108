"""Where an answer is cut: at the first stop string of its text, or where a stop token stood in a chunk.

Looks at new text alone, so that a token costs the same at the beginning of an answer and at its end.
"""

from __future__ import annotations

from collections.abc import Sequence

from pastalm.core.events import Path
from pastalm.core.interpreter import Interpreter
from pastalm.core.language import Sync
from pastalm.core.transcript import Transcript, begins


class Stops:
    """The stop conditions of one response.

    strings: each ends the answer where it begins.
    min_tokens: before so many tokens of the main thread and the chunks that it has joined, no string counts.
    """

    def __init__(self, strings: Sequence[str], min_tokens: int) -> None:
        self._strings = strings
        self._min_tokens = min_tokens
        self._searched = 0
        """Characters of the settled text in which no stop string begins and ends."""
        self._early: int | None = None
        """How many parts of the main thread are too early for stop strings (None: all so far)."""
        self._ended: dict[Path, int] = {}
        """Chunks that a stop token ended, and after how many parts."""

    def update(self, interpreter: Interpreter, transcript: Transcript) -> None:
        """Takes in what the interpreter knows of ends, once its events are in the transcript."""
        threads = transcript.threads
        if self._early is None and interpreter.written >= self._min_tokens:
            self._early = len(threads[()].parts) if self._min_tokens else 0
        for path in filter(None, interpreter.stopped):
            if path not in self._ended and threads[path].state == "done":
                last = threads[path].parts[-1:]
                self._ended[path] = len(threads[path].parts) - (last == ["\n"])  # what the end of a chunk forces

    def cut(self, transcript: Transcript) -> int | None:
        """The character where the text is to be cut: a stop token stood there or the first stop string begins there,
        and no other may yet turn out to begin before it. None: nowhere so far."""
        ends = (_offset(transcript, path, parts) for path, parts in self._ended.items())
        end = min((at for at in ends if at is not None), default=None)
        found = self._first_string(transcript, end)
        return end if found is None else found

    def _first_string(self, transcript: Transcript, end: int | None) -> int | None:
        """Where the first stop string begins in the text before character `end`."""
        if not self._strings or self._early is None:
            return None
        early = _offset(transcript, (), self._early) if self._early else 0
        if early is None:
            return None
        start = max(0, self._searched - max(map(len, self._strings)) + 1)
        text = transcript.settled_from(start)[: None if end is None else end - start]
        self._searched = start + len(text)
        begin = {s: max(0, early - start - len(s) + 1) for s in self._strings}
        places = (text.find(s, begin[s]) for s in self._strings)
        found = min((at for at in places if at >= 0), default=None)
        over = transcript.finished or end is not None
        if found is None or not over and min(at + begins(text[at:], s) for s, at in begin.items()) < found:
            return None
        return start + found


def _offset(transcript: Transcript, path: Path, parts: int) -> int | None:
    """Characters of the text before part number `parts` of a thread; None while what stands before it may grow."""
    at: int = 0
    here: Path = ()
    while True:
        for i, part in enumerate(transcript.threads[here].parts):
            if here == path and i == parts:
                return at
            if not isinstance(part, tuple):
                at += 0 if isinstance(part, Sync) else len(part if isinstance(part, str) else part.text)
            elif path[: len(part)] == part:
                here = part
                break
            else:
                within = [t for p, t in transcript.threads.items() if p[: len(part)] == part]
                if any(thread.state != "done" for thread in within):
                    return None
                at += sum(len(thread.text) for thread in within)
        else:
            return at
