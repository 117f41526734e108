"""Promises: how one goes on, and how its chunk begins.

After a promise comes another, for the next number of the list, of the same length; a topic ends within a few words; a
chunk begins with its topic. Most of that stands nowhere before, so drafters that copy do not have it. (No publication
known; PASTA section 3 has the form of a promise.) Silent for a model without tags of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pastalm.core.events import Path
from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.engines.drafts.base import LONGEST, Context, Evidence, NGram, SilentDrafter, extended

CHUNK, NEXT, LENGTH, END = 4, 3, 2, 1
"""First number of the evidence: of a chunk's topic, of the next promise, of its length, of a topic's end. The second
one says how far it has come: each has a hit rate of its own."""
SHORTEST = 3
"""Tokens of a topic before its end is guessed."""
_NUMBER = re.compile(r"\s*(\d{1,3})([.):]?)")


@dataclass(slots=True)
class _Thread:
    """What a thread has promised, and what it probably writes.

    expected: the token behind some tokens, a tag the first of them, and its evidence.
    topic, length: tokens of its last promise.
    writes: which of the two it is writing (None: neither).
    begin: number of the thread's tokens before the topic.
    """

    expected: dict[NGram, tuple[int, Evidence]] = field(default_factory=dict)
    topic: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    writes: list[int] | None = None
    begin: int = 0

    def promise(self, begin: int) -> None:
        """It begins a promise."""
        self.topic, self.length, self.begin = [], [], begin
        self.writes = self.topic

    def expect(self, tag: int, tokens: Sequence[int], kind: int) -> None:
        """Behind a tag it probably writes these."""
        tail = extended((), tag)
        for i, token in enumerate(tokens[:LONGEST]):
            self.expected[tail[-1]] = (token, (kind, LONGEST - i))
            tail = extended(tail, token)


class Promises(SilentDrafter):
    """vocabulary: of the model (None: unknown)."""

    name = "promises"

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._tags = None if vocabulary is None else vocabulary.tags
        self._threads: dict[Path, _Thread] = {}

    def write(self, context: Context, token: int, place: int) -> None:
        tags, path = self._tags, context.path
        if tags is None:
            return
        thread = self._threads.get(path)
        if token == tags.promise:
            thread = self._threads.setdefault(path, _Thread())
            thread.promise(context.index + 1)
        elif token == tags.async_open:
            if path and (parent := self._threads.get(path[:-1])) is not None:
                self._threads[path] = chunk = _Thread()
                chunk.expect(token, parent.topic, CHUNK)
        elif thread is None or thread.writes is None:
            return
        elif token == tags.tokens:
            thread.writes = thread.length
        elif token == tags.promise_end:
            thread.writes = None
            self._expect_another(thread, tags)
        else:
            thread.writes.append(token)

    def _expect_another(self, thread: _Thread, tags: Tags) -> None:
        """The thread has completed a promise."""
        assert self._vocabulary is not None
        numbered = _NUMBER.match(self._vocabulary.text(thread.topic))
        number = self._vocabulary.encode(f"{int(numbered[1]) + 1}{numbered[2]}") if numbered else ()
        thread.expect(tags.promise_end, (tags.promise,), NEXT)
        thread.expect(tags.promise, number, NEXT)
        thread.expect(tags.tokens, (*thread.length, tags.promise_end), LENGTH)

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        thread = self._threads.get(context.path)
        if thread is None or self._tags is None:
            return None
        for tokens in reversed(context.tail):
            if (known := thread.expected.get(tokens)) is not None:
                return known
        written = len(thread.topic)
        if thread.writes is thread.topic and written >= SHORTEST and context.index == thread.begin + written:
            return self._tags.tokens, (END, written)
        return None
