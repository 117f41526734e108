"""The interpreter: sampled tokens of one response in, events out. No tensor, no clock, no engine.

It keeps the grammar, the budgets and the threads of one response (PASTA, arXiv 2502.11517, section 4):

    a promise    forks a child thread, which writes the chunk
    <|sync|>     blocks the thread until its children have finished
    <|/async|>   finishes a chunk, the model's end token the main thread

The events say what a thread may sample next (`allowed`) and what it must write (`forced`). Where the grammar leaves one
token only, it is forced and costs no step. An engine without masks may sample a token that is not allowed: it is
replaced or has no effect. Nothing here raises, and every thread ends within its budget, whatever tokens come.

A prepared model writes six special tokens; in the text of any other model the XML is searched.
"""

from __future__ import annotations

import codecs
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

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
from pastalm.core.language import (
    CHUNK_TAGS,
    LENGTH_STEP,
    MAX_TOPIC_WORDS,
    AsyncClose,
    Mark,
    Promise,
    Scanner,
    Sync,
    Text,
    render_mark,
    topic_key,
)
from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.errors import RequestError

State: TypeAlias = Literal["live", "queued", "blocked", "finished"]

CHUNK_SLACK = 16
"""A chunk promised N tokens may take 2N and this many more."""
MAX_TOPIC_TOKENS = 8
DISTINCTION_TOKENS = 4
"""Digits that may be needed to make a topic different from those of its siblings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one response, besides its max_tokens.

    max_threads: threads that decode at once; a child beyond it waits.
    max_depth: 0 forbids promises, 1 lets only the main thread make them.
    max_promises: in one group, that is since the last sync.
    max_chunk_tokens: most tokens of a chunk.
    max_position: largest position id + 1 that the model can take (None: unbounded).

    Raises RequestError if a value is out of range.
    """

    max_threads: int = 16
    max_depth: int = 2
    max_promises: int = 16
    max_chunk_tokens: int = 1024
    max_position: int | None = None

    def __post_init__(self) -> None:
        if self.max_threads < 1 or self.max_depth < 0 or self.max_promises < 0 or self.max_chunk_tokens < 8:
            raise RequestError(
                "max_threads must be 1 or more, max_depth and max_promises 0 or more, max_chunk_tokens 8 or more"
            )


@dataclass(slots=True)
class Thread:
    """A thread as the interpreter knows it.

    budget: tokens it may still decode, without those granted to its children.
    reach: upper bound on its next position id.
    room: the least budget and the greatest reach at which it can make a promise as long as its last one.
    mode: the part of a tag that it writes, `text` outside of tags.
    tag: tokens of that part so far. topic: of the promise that it writes.
    key: key of its own topic. group: its children since the last sync, with the keys of their topics.
    forks: number of its children so far.
    lent: budgets of the children in its group. origin: its `written` and `budget` together when it began.
    resume: tokens that are forced when it goes on.
    carry: text that belongs to the next event.
    last: the end of the text before its next token.
    """

    path: Path
    budget: int
    reach: int
    room: tuple[int, float]
    state: State = "live"
    mode: Literal["text", "topic", "number"] = "text"
    tag: list[int] = field(default_factory=list)
    topic: str = ""
    key: str = ""
    origin: int = 0
    lent: int = 0
    forks: int = 0
    group: dict[Path, str] = field(default_factory=dict)
    resume: tuple[int, ...] = ()
    carry: str = ""
    last: str = "\n"
    scanner: Scanner = field(default_factory=Scanner)
    characters: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    @property
    def written(self) -> int:
        """Number of tokens so far: its own, those of the chunks it has joined, and those of its parent before the
        promise. It does not depend on the progress of threads that decode beside it."""
        return self.origin - self.budget - self.lent


def _distinct(thread: Thread, topic: str) -> bool:
    """Whether a topic may end here: it is not empty, not the thread's own, and no sibling in the group has it."""
    key = topic_key(topic)
    return bool(key) and key != thread.key and key not in thread.group.values()


class Interpreter:
    """The threads of one response.

    max_tokens: budget of the whole response, tags too.
    prompt_length: tokens of the prompt; positions begin after it.
    parallelism: 0 forbids forks.
    ignore_eos, min_tokens, stop_token_ids: as in SamplingParams.

    threads: all threads so far, by path. stopped: the threads that a stop token has ended.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        max_tokens: int,
        prompt_length: int = 0,
        limits: Limits | None = None,
        parallelism: float = 1.0,
        ignore_eos: bool = False,
        min_tokens: int = 0,
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self._limits = limits or Limits()
        self._forking = parallelism > 0
        self._ignore_eos = ignore_eos
        self._min_tokens = min_tokens
        self._stops = frozenset(stop_token_ids)
        self.stopped: list[Path] = []
        self._queue: deque[Thread] = deque()
        tags = vocabulary.tags
        self._open = (tags.async_open,) if tags else tuple(vocabulary.encode("<async>"))
        self._close = (tags.async_close,) if tags else tuple(vocabulary.encode("</async>"))
        self._newline = tuple(vocabulary.encode("\n"))
        self._chunk_end = len(self._newline) + len(self._close)
        self._digits = max(map(len, vocabulary.numbers)) if tags else 0
        self._digit_ids = {i for ids in vocabulary.numbers for i in ids} if tags else set()
        self._silent = vocabulary.eos.union(tags.ids if tags else ())
        self._masks: dict[tuple[bool, bool, bool, bool], TokenSet] = {}
        self._spelling = 3 + MAX_TOPIC_TOKENS + DISTINCTION_TOKENS + self._digits if tags else 0
        room = self._room(0, LENGTH_STEP, self._spelling)
        self._main = Thread((), max_tokens, prompt_length, room, origin=max_tokens)
        self.threads: dict[Path, Thread] = {(): self._main}
        self._unfinished = self._live = 1
        self._spelled: dict[str, frozenset[int]] = {}

    # ------------------------------------------------------------------ what a driver calls

    def start(self) -> list[Event]:
        """The event that begins the main thread."""
        return [Forked(path=(), allowed=self._allowed(self._main))]

    def advance(self, sampled: SampledToken) -> list[Event]:
        """The events that follow from a sampled token; none if its thread does not decode. A thread that the engine
        has lost ends (`abort`) with the text it has, and its parent goes on."""
        thread = self.threads.get(sampled.path)
        if thread is None or thread.state != "live":
            return []
        if sampled.lost:
            return list(self._cut(thread, "abort", sampled.lost))
        if self._vocabulary.tags is None:
            return list(self._xml_token(thread, sampled))
        if thread.mode == "text" and sampled.token not in self._silent and sampled.token not in self._stops:
            return list(self._text_token(thread, sampled))
        return list(self._tag_token(thread, sampled))

    def finish(self, reason: FinishReason) -> list[Event]:
        """Ends every thread now: `abort`, or `stop` where the driver found a stop string."""
        unfinished = [t for t in self.threads.values() if t.state != "finished"]
        self._queue.clear()
        for thread in unfinished:
            self._become(thread, "finished")
        self._unfinished = 0
        return [Finished(path=t.path, reason=reason) for t in unfinished]

    @property
    def finished(self) -> bool:
        return not self._unfinished

    @property
    def written(self) -> int:
        """Number of tokens of the main thread and of the chunks it has joined."""
        return self._main.written

    # ------------------------------------------------------------------ prepared models

    def _text_token(self, thread: Thread, sampled: SampledToken) -> Iterator[Event]:
        """The events of a token of ordinary text."""
        thread.budget -= 1
        thread.reach += 1
        text = thread.characters.decode(self._vocabulary.piece(sampled.token))
        thread.last = text or thread.last
        return self._token_events(thread, sampled, sampled.token, text)

    def _tag_token(self, thread: Thread, sampled: SampledToken) -> Iterator[Event]:
        """The events of a tag, a part of one, or an end token."""
        tags = self._tags
        token = self._admitted(thread, sampled.token)
        if thread.mode == "text" and token == tags.sync and thread.group:
            thread.budget -= 1
            thread.reach += 1
            yield from self._sync(thread, token)
            return
        inside = thread.mode != "text"
        text, promise = self._take(thread, token)
        thread.last = text or thread.last
        ended = not inside and self._ends(thread, token)
        if ended and thread.path and token in self._stops:
            token = tags.async_close
        forced: list[int] = []
        if ended and (newline := self._newline_due(thread)):
            token, *forced = (*newline, *self._close)
        while not (ended or promise) and (only := self._only(thread)) is not None:
            forced.append(only)
            _, promise = self._take(thread, only)
        is_tag = inside or ended or token in tags.ids
        yield from self._token_events(
            thread, sampled, token, text, tag=is_tag, forced=tuple(forced), promise=promise, ended=ended
        )

    def _token_events(
        self,
        thread: Thread,
        sampled: SampledToken,
        token: int,
        text: str,
        *,
        tag: bool = False,
        forced: tuple[int, ...] = (),
        promise: Promise | None = None,
        ended: bool = False,
    ) -> Iterator[Event]:
        """The event of a token, and those of the fork or the end that it causes."""
        child = self._adopt(thread, promise) if promise else None
        spent = not ended and self._spent(thread)
        yield Decoded(
            path=thread.path,
            token=token,
            text=text,
            tag=tag,
            replaced=token != sampled.token,
            forced=forced,
            allowed=None if ended or spent else self._allowed(thread),
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
        )
        if child is not None and promise is not None:
            yield from self._fork(child, promise)
        if ended:
            yield from self._end(thread, "stop", self._newline_due(thread))
        elif spent:
            yield from self._cut(thread)

    @property
    def _tags(self) -> Tags:
        assert self._vocabulary.tags is not None
        return self._vocabulary.tags

    def _admitted(self, thread: Thread, token: int) -> int:
        """The sampled token, or the one that replaces it where the grammar forbids it."""
        if thread.mode == "number":
            allowed = self._lengths(thread)
            return token if token in allowed else min(allowed)
        if thread.mode == "topic":
            text = self._vocabulary.text([*thread.tag, token]) + "x"
            if token in self._silent or len(text.split()) > MAX_TOPIC_WORDS:
                return self._closing(thread)
        return token

    def _take(self, thread: Thread, token: int) -> tuple[str, Promise | None]:
        """Counts a token and advances the grammar. Returns the reader's text it adds and the promise it completes."""
        tags = self._tags
        opens = token == tags.promise and self._may_promise(thread)
        thread.budget -= 1
        thread.reach += 1
        if thread.mode == "text":
            if opens:
                thread.mode, thread.tag = "topic", []
            text = thread.characters.decode(b"", final=True)
            thread.characters.reset()
            return text, None
        if thread.mode == "topic" and token == tags.tokens:
            thread.topic, thread.mode, thread.tag = self._topic(thread), "number", []
        elif token == tags.promise_end:
            length = self._vocabulary.numbers[tuple(thread.tag)]
            thread.mode, thread.tag = "text", []
            return "", Promise.clip(thread.topic, length)
        else:
            thread.tag.append(token)
        return "", None

    def _ends(self, thread: Thread, token: int) -> bool:
        if token in self._stops:
            self.stopped.append(thread.path)
            return True
        if thread.path:
            return token == self._tags.async_close or token in self._vocabulary.eos
        return token in self._vocabulary.eos and not self._ignore_eos

    def _topic(self, thread: Thread) -> str:
        return " ".join(self._vocabulary.text(thread.tag).split()[:MAX_TOPIC_WORDS])

    def _closing(self, thread: Thread) -> int:
        """The next token of a topic that has to end: `<|tokens|>`, or first a digit that makes it distinct."""
        topic = self._topic(thread)
        if _distinct(thread, topic):
            return self._tags.tokens
        number = 2
        while not _distinct(thread, f"{topic}{number}"):
            number += 1
        return self._vocabulary.encode(str(number))[-1]

    # ------------------------------------------------------------------ grammar

    def _only(self, thread: Thread) -> int | None:
        """The one token that may come next inside a tag, if there is only one."""
        if thread.mode == "topic" and len(thread.tag) >= MAX_TOPIC_TOKENS:
            return self._closing(thread)
        if thread.mode == "number":
            allowed = self._lengths(thread)
            return next(iter(allowed)) if len(allowed) == 1 else None
        return None

    def _allowed(self, thread: Thread) -> TokenSet | None:
        """The ids that a thread may sample next."""
        tags = self._vocabulary.tags
        early = thread.written < self._min_tokens
        if tags is None:
            return TokenSet(self._vocabulary.eos | self._stops, inverted=True) if early else None
        if thread.mode == "number":
            return TokenSet(frozenset(self._lengths(thread)))
        if thread.mode == "topic":
            return TokenSet(frozenset(self._banned_in_topic(thread)), inverted=True)
        key = (not self._may_promise(thread), not thread.group, bool(thread.path), early)
        if key not in self._masks:
            banned = {tags.tokens, tags.promise_end, tags.async_open}
            banned |= {tags.promise} if key[0] else set()
            banned |= {tags.sync} if key[1] else set()
            banned |= self._vocabulary.eos if key[2] or self._ignore_eos else set()
            banned |= set() if key[2] else {tags.async_close}
            banned |= self._stops | (set() if key[2] else self._vocabulary.eos) if early else set()
            self._masks[key] = TokenSet(frozenset(banned), inverted=True)
        return self._masks[key]

    def _banned_in_topic(self, thread: Thread) -> set[int]:
        """The tokens that may not follow in a topic: those that would repeat a sibling's topic, and the end while it
        repeats one. So the model writes its next best word instead. Numbers are free, as they may go on: after
        "step 1" may come "step 10"."""
        banned = set(self._silent)
        topic = self._topic(thread)
        key = topic_key(topic)
        for sibling in thread.group.values():
            rest = sibling[len(key) :].strip() if sibling.startswith(key) else ""
            if rest and not rest.isdigit():
                banned |= self._spellings(rest)
        if _distinct(thread, topic):
            return banned - {self._tags.tokens}
        # another word can still come, unless there are as many as a topic may have
        open_ended = key and not topic[-1].isdigit() and len(topic.split()) < MAX_TOPIC_WORDS
        return banned | (self._digit_ids if open_ended else set())

    def _spellings(self, word: str) -> frozenset[int]:
        """The single tokens that spell a case-folded word, with any case and with or without a space."""
        if word not in self._spelled:
            forms = {form for w in (word, f" {word}") for form in (w, w.title(), w.upper())}
            ids = map(self._vocabulary.encode, forms)
            self._spelled[word] = frozenset(one[0] for one in ids if len(one) == 1)
        return self._spelled[word]

    def _may_promise(self, thread: Thread) -> bool:
        """Whether a promise may begin: a chunk as long as the last one promised must fit."""
        if not self._forking or len(thread.path) >= self._limits.max_depth:
            return False
        if len(thread.group) >= self._limits.max_promises:
            return False
        budget, reach = thread.room
        return thread.budget >= budget and thread.reach <= reach

    def _affords(self, thread: Thread, tokens: int, *, spare: int) -> bool:
        """Whether `spare` more tokens, a chunk of that length and the thread's own end fit."""
        budget, reach = self._room(len(thread.path), tokens, spare)
        return thread.budget >= budget and thread.reach <= reach

    def _room(self, depth: int, tokens: int, spare: int) -> tuple[int, float]:
        """The least budget and the greatest reach of a thread at which `spare` more tokens, a chunk of that length
        and its own end fit."""
        grant, end = self._grant(tokens), self._chunk_end if depth else len(self._close)
        after = self._positions(depth) - tokens - CHUNK_TAGS - end
        within = self._positions(depth + 1) - grant
        fits = grant > len(self._open) + self._chunk_end
        return spare + grant + end, min(after, within) - spare if fits else -math.inf

    def _positions(self, depth: int) -> float:
        """Positions that a thread at that depth may use. Each level leaves its parent room for a sync and an end."""
        limit = self._limits.max_position
        return math.inf if limit is None else limit - depth * (1 + self._chunk_end)

    def _grant(self, tokens: int) -> int:
        return min(self._limits.max_chunk_tokens, 2 * tokens + CHUNK_SLACK)

    def _lengths(self, thread: Thread) -> set[int]:
        """The ids that may come next in a promised length, so that the budget allows the length."""
        done = len(thread.tag)
        allowed: set[int] = set()
        for ids, tokens in self._vocabulary.numbers.items():
            spare = len(ids) - done + 1
            if ids[:done] == tuple(thread.tag) and self._affords(thread, tokens, spare=spare):
                allowed.add(ids[done] if done < len(ids) else self._tags.promise_end)
        return allowed or self._shortest(tuple(thread.tag))

    def _shortest(self, done: tuple[int, ...]) -> set[int]:
        """The next id of the smallest length that begins with `done`, whether the budget allows it or not."""
        _, ids = min((n, ids) for ids, n in self._vocabulary.numbers.items() if ids[: len(done)] == done)
        return {ids[len(done)]} if len(done) < len(ids) else {self._tags.promise_end}

    # ------------------------------------------------------------------ models that write XML

    def _xml_token(self, thread: Thread, sampled: SampledToken) -> Iterator[Event]:
        thread.budget -= 1
        thread.reach += 1
        ended = sampled.token in self._vocabulary.eos and (bool(thread.path) or not self._ignore_eos)
        if sampled.token in self._stops and not thread.scanner.held:
            self.stopped.append(thread.path)
            ended = True
        text, thread.carry = thread.carry, ""
        promise: Promise | None = None
        sync = False
        marks = self._marks(thread, sampled.token, ended)
        for mark in marks:
            if isinstance(mark, AsyncClose) and thread.path:
                ended = True
                break
            if promise or sync:
                thread.carry += mark.text if isinstance(mark, Text) else render_mark(mark)
            elif isinstance(mark, Text):
                text += mark.text
            elif isinstance(mark, Promise):
                promise = mark if self._writable(thread, mark) else None
                text += "" if promise else render_mark(mark)
            elif isinstance(mark, Sync):
                sync = bool(thread.group)
        if sync:
            thread.carry = text + thread.carry
            yield from self._sync(thread, sampled.token)
            return
        thread.last = text or thread.last
        is_tag = not text and bool(thread.scanner.held or marks)
        yield from self._token_events(thread, sampled, sampled.token, text, tag=is_tag, promise=promise, ended=ended)

    def _marks(self, thread: Thread, token: int, ended: bool) -> list[Mark]:
        piece = b"" if ended else self._vocabulary.piece(token)
        if not self._forking:
            return [Text(thread.characters.decode(piece, final=ended))]
        return thread.scanner.feed(piece) + (thread.scanner.flush() if ended else [])

    def _writable(self, thread: Thread, promise: Promise) -> bool:
        return (
            self._may_promise(thread)
            and self._affords(thread, promise.tokens, spare=0)
            and _distinct(thread, promise.topic)
        )

    # ------------------------------------------------------------------ threads

    def _adopt(self, parent: Thread, promise: Promise) -> Thread:
        """Makes the child thread of a promise. Its budget is taken from its parent's."""
        grant = self._grant(promise.tokens)
        path = (*parent.path, parent.forks)
        key = topic_key(promise.topic)
        child = Thread(
            path,
            grant - len(self._open),
            parent.reach + len(self._open),
            self._room(len(path), LENGTH_STEP, self._spelling),
            "queued",
            key=key,
            resume=self._open,
            last=parent.last,
            origin=parent.written + grant,
        )
        parent.forks += 1
        parent.budget -= grant
        parent.lent += grant
        parent.reach += promise.tokens + CHUNK_TAGS
        parent.group[path] = key
        parent.last = "\n"  # as every chunk ends in white space
        parent.room = self._room(len(parent.path), promise.tokens, self._spelling)
        self.threads[path] = child
        self._unfinished += 1
        return child

    def _fork(self, child: Thread, promise: Promise) -> Iterator[Event]:
        forked = Forked(path=child.path, topic=promise.topic, promised=promise.tokens)
        if self._live >= self._limits.max_threads:
            self._queue.append(child)
            yield forked
            yield Blocked(path=child.path, on="thread")
        else:
            self._become(child, "live")
            child.resume = ()
            yield replace(forked, forced=self._open, allowed=self._allowed(child))

    def _become(self, thread: Thread, state: State) -> None:
        self._live += (state == "live") - (thread.state == "live")
        thread.state = state

    def _sync(self, thread: Thread, token: int) -> Iterator[Event]:
        thread.resume = (token,)
        if self._children_done(thread):
            yield self._join(thread)
            if self._spent(thread):
                yield from self._cut(thread)
        else:
            self._become(thread, "blocked")
            yield Blocked(path=thread.path)
            yield from self._release()

    def _children_done(self, thread: Thread) -> bool:
        return all(self.threads[path].state == "finished" for path in thread.group)

    def _join(self, thread: Thread) -> Joined:
        """Lets a thread go on after its children. The budget that they did not use returns to it."""
        children = tuple(thread.group)
        for path in children:
            child = self.threads[path]
            thread.budget += child.budget
            thread.reach = max(thread.reach, child.reach + 1)  # the sync's own, under `overlap`
        thread.group.clear()
        thread.lent = 0
        self._become(thread, "live")
        forced, thread.resume = thread.resume, ()
        return Joined(path=thread.path, children=children, forced=forced, allowed=self._allowed(thread))

    def _release(self) -> Iterator[Event]:
        """Lets queued threads go on while fewer than `max_threads` are live."""
        while self._queue and self._live < self._limits.max_threads:
            thread = self._queue.popleft()
            joined = thread.group and self._children_done(thread)
            yield self._join(thread) if joined else self._begin(thread)
            if self._spent(thread):
                yield from self._cut(thread)

    def _begin(self, thread: Thread) -> Joined:
        self._become(thread, "live")
        forced, thread.resume = thread.resume, ()
        return Joined(path=thread.path, forced=forced, allowed=self._allowed(thread))

    def _spent(self, thread: Thread) -> bool:
        """Whether the budget and the positions leave room for the end of the thread only."""
        end = self._chunk_end if thread.path else 0
        return thread.budget <= end or thread.reach >= self._positions(len(thread.path)) - end

    def _cut(self, thread: Thread, reason: FinishReason = "length", why: str = "") -> Iterator[Event]:
        """Ends a thread. The end of a chunk, for which room was kept, is forced."""
        close = self._close if thread.path else ()
        thread.budget -= len(close)
        thread.reach += len(close)
        yield from self._end(thread, reason, (*self._newline_due(thread), *close), why)

    def _newline_due(self, thread: Thread) -> tuple[int, ...]:
        """The newline that is forced at the end of a chunk whose text does not end in white space, so that what
        follows begins on a new line. Its text is part of the event that ends the thread."""
        if not thread.path or (thread.carry or thread.last)[-1:].isspace():
            return ()
        thread.carry += "\n"
        thread.budget -= len(self._newline)
        thread.reach += len(self._newline)
        return self._newline

    def _end(self, thread: Thread, reason: FinishReason, forced: Iterable[int] = (), why: str = "") -> Iterator[Event]:
        self._become(thread, "finished")
        self._unfinished -= 1
        yield Finished(path=thread.path, reason=reason, text=thread.carry, forced=tuple(forced), why=why)
        if thread.path:
            parent = self.threads[thread.path[:-1]]
            if parent.state == "blocked" and self._children_done(parent):
                self._become(parent, "queued")
                self._queue.append(parent)
        yield from self._release()
