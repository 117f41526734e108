"""Stop conditions: the answer is cut at the first stop string of its text, or where a stop token ended a chunk.

Only new text is searched, so that a token costs the same at any length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pastalm.core.events import Path
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
        """So many characters of the settled text hold no whole stop string."""
        self._early: int | None = None
        """Number of events of the main thread in which no stop string counts (None: all so far)."""
        self._ended: dict[Path, int] = {}
        """Chunks that a stop token ended, and the numbers of their last events, with newlines that were forced."""

    def update(self, written: int, stopped: Iterable[Path], transcript: Transcript) -> None:
        """Notes what the last events, which the transcript already has, say about stop conditions.

        written: tokens of the main thread. stopped: threads that a stop token has ended.
        """
        threads = transcript.threads
        if self._early is None and written >= self._min_tokens:
            self._early = len(threads[()].events) if self._min_tokens else 0
        for path in stopped:
            if path:
                self._ended[path] = len(threads[path].events) - 1

    def cut(self, transcript: Transcript) -> int | None:
        """The character before which the text ends: the first at which a stop token stood or a stop string begins.

        None: there is none, or an earlier one may still turn up.
        """
        if not self._ended and not self._strings:
            return None
        ends = (transcript.place(path, last) for path, last in self._ended.items())
        first_token = min((end for end in ends if end is not None), default=None)
        first_string = self._first_string(transcript, first_token)
        return first_token if first_string is None else first_string

    def _first_string(self, transcript: Transcript, end: int | None) -> int | None:
        """The character before `end` at which the first stop string begins."""
        if not self._strings or self._early is None:
            return None
        early = transcript.place((), self._early) if self._early else 0
        if early is None:
            return None
        start = max(0, self._searched - max(map(len, self._strings)) + 1)
        text = transcript.settled_from(start)[: None if end is None else end - start]
        self._searched = start + len(text)
        begin = {string: max(0, early - start - len(string) + 1) for string in self._strings}
        places = [text.find(string, begin[string]) for string in self._strings]
        first = min((place for place in places if place >= 0), default=None)
        if first is None:
            return None
        complete = transcript.finished or end is not None
        if not complete and min(at + begins(text[at:], string) for string, at in begin.items()) < first:
            return None  # a longer stop string may begin before it
        return start + first
