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
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from typing import Literal, TypeAlias

from pastalm.core import events, language
from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path, SampledToken, TokenSet
from pastalm.core.language import AsyncClose, MarkScanner, Promise, Sync, Text, clip_topic, render_mark, topic_key
from pastalm.core.params import SamplingParams
from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.errors import RequestError

State: TypeAlias = Literal["live", "queued", "blocked", "finished"]

_UTF8 = codecs.getincrementaldecoder("utf-8")
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
    positions: position ids that are certain to be left for it, and for what its children write below it.
    room: the least budget and positions with which it can make a promise as long as its last one.
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
    positions: float
    room: tuple[float, float]
    origin: int
    scanner: MarkScanner
    state: State = "live"
    mode: Literal["text", "topic", "number"] = "text"
    tag: list[int] = field(default_factory=list)
    topic: str = ""
    key: str = ""
    lent: int = 0
    forks: int = 0
    group: dict[Path, str] = field(default_factory=dict)
    resume: tuple[int, ...] = ()
    carry: str = ""
    last: str = "\n"
    characters: codecs.IncrementalDecoder = field(default_factory=lambda: _UTF8("replace"))

    @property
    def written(self) -> int:
        """Number of tokens so far: its own, those of the chunks it has joined, and those of its parent before the
        promise. It does not depend on the progress of threads that decode beside it."""
        return self.origin - self.budget - self.lent

    def spend(self, tokens: int = 1) -> None:
        """Counts tokens that it decodes."""
        self.budget -= tokens
        self.positions -= tokens

    def has(self, room: tuple[float, float]) -> bool:
        """Whether so large a budget and so many positions are left."""
        return self.budget >= room[0] and self.positions >= room[1]

    def is_new(self, topic: str) -> bool:
        """Whether a topic may end here: it is not empty, not the thread's own, and no sibling in the group has it."""
        key = topic_key(topic)
        return bool(key) and key != self.key and key not in self.group.values()


@dataclass(slots=True)
class Reading:
    """What a sampled token means for its thread.

    token: the one that is fed, where the grammar puts another in its place. forced: those that follow it.
    text: the reader's text that it adds. tag: whether it belongs to a tag.
    promise: the one that it completes. sync, ended: whether the thread waits for its children, or ends.
    """

    token: int
    text: str = ""
    tag: bool = False
    forced: tuple[int, ...] = ()
    promise: Promise | None = None
    sync: bool = False
    ended: bool = False


class Interpreter:
    """The threads of one response.

    params: its max_tokens, min_tokens, ignore_eos, stop_token_ids and parallelism count here.
    prompt_length: tokens of the prompt; positions begin after it.
    limits: bounds on forking.

    threads: all threads so far, by path. stopped: the threads that a stop token has ended.
    """

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams, prompt_length: int, limits: Limits) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._forking = params.parallelism > 0
        self._min_tokens = params.min_tokens
        self._prepared = vocabulary.tags is not None
        self._tags = tags = vocabulary.tags or Tags(*range(-6, 0))  # no token has these ids
        self._open = (tags.async_open,) if self._prepared else tuple(vocabulary.encode("<async>"))
        self._close = (tags.async_close,) if self._prepared else tuple(vocabulary.encode("</async>"))
        self._newline = tuple(vocabulary.encode("\n"))
        self._chunk_end = len(self._newline) + len(self._close)
        self._stops = frozenset(params.stop_token_ids or ())
        self._silent = vocabulary.eos.union(tags)
        self._special = self._silent | self._stops
        self._chunk_ends = vocabulary.eos | {tags.async_close}
        self._answer_ends = frozenset[int]() if params.ignore_eos else vocabulary.eos
        self._masks: dict[tuple[bool, bool, bool, bool], TokenSet] = {}
        self._sync_tokens = (tags.sync,) if self._prepared else tuple(vocabulary.encode("<sync/>"))
        self._sync_alone = TokenSet(frozenset(self._sync_tokens))
        self._spellings = cache(partial(_spellings, vocabulary))
        digits = max(map(len, vocabulary.numbers)) if self._prepared else 0
        self._promise_tokens = 3 + MAX_TOPIC_TOKENS + DISTINCTION_TOKENS + digits if self._prepared else 0
        positions = math.inf if limits.max_position is None else limits.max_position - prompt_length
        room, scanner = self._room(0, language.LENGTH_STEP), vocabulary.scanner()
        main = Thread((), params.max_tokens, positions, room, params.max_tokens, scanner)
        self.threads: dict[Path, Thread] = {(): main}
        self.stopped: list[Path] = []
        self._queue: deque[Thread] = deque()
        self._unfinished = self._live = 1

    # ------------------------------------------------------------------ what a driver calls

    def start(self) -> list[Event]:
        """The event that begins the main thread."""
        return [Forked(path=(), allowed=self._allowed(self.threads[()]))]

    def advance(self, sampled: SampledToken) -> list[Event]:
        """The events that follow from a sampled token; none if its thread does not decode. A thread that the engine
        has lost ends (`abort`) with the text it has, and its parent goes on."""
        thread = self.threads.get(sampled.path)
        if thread is None or thread.state != "live":
            return []
        if sampled.lost:
            return list(self._end(thread, "abort", sampled.lost))
        if not self._prepared:
            read = self._read_xml(thread, sampled.token)
        elif thread.mode == "text":
            read = self._read_text(thread, sampled.token)
        else:
            read = self._read_promise(thread, sampled.token)
        return list(self._sync(thread, (read.token,)) if read.sync else self._decoded(thread, sampled, read))

    def finish(self, reason: events.FinishReason) -> list[Event]:
        """Ends every thread now: `abort`, or `stop` where the driver found a stop string."""
        unfinished = [thread for thread in self.threads.values() if thread.state != "finished"]
        self._queue.clear()
        for thread in unfinished:
            self._become(thread, "finished")
        return [Finished(path=thread.path, reason=reason) for thread in unfinished]

    @property
    def finished(self) -> bool:
        return not self._unfinished

    def _decoded(self, thread: Thread, sampled: SampledToken, read: Reading) -> Iterator[Event]:
        """The event of a token, and those of the fork or the end that it causes."""
        forked = self._fork(thread, read.promise) if read.promise else []
        ends = read.ended or self._spent(thread)
        yield Decoded(
            path=thread.path,
            token=read.token,
            text=read.text,
            tag=read.tag,
            replaced=read.token != sampled.token,
            forced=read.forced,
            allowed=None if ends else self._allowed(thread),
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            drafter=sampled.drafter,
            drafted=sampled.drafted,
        )
        yield from forked
        if ends:
            yield from self._end(thread, "stop" if read.ended else "length")
        elif not self._prepared and self._joins_now(thread):
            thread.spend(len(self._sync_tokens))
            thread.carry += "".join(mark.text for mark in thread.scanner.flush() if isinstance(mark, Text))
            yield from self._sync(thread, self._sync_tokens)

    # ------------------------------------------------------------------ reading a token

    def _read_text(self, thread: Thread, token: int) -> Reading:
        """A token of a prepared model outside of promises."""
        opens = token == self._tags.promise and self._may_promise(thread)
        syncs = bool(thread.group) and (token == self._tags.sync or self._joins_now(thread))
        thread.spend()
        if syncs:
            return Reading(self._tags.sync, sync=True)
        special = token in self._special
        text = thread.characters.decode(b"" if special else self._vocabulary.piece(token), special)
        if text:
            thread.last = text
        if not special:
            return Reading(token, text)
        if opens:
            thread.mode = "topic"
        ended = self._ends(thread, token)
        tokens: tuple[int, ...] = (token,)
        if ended and thread.path and token in self._stops:
            tokens = self._close
        if ended and (newline := self._newline_due(thread)):
            tokens = (*newline, *self._close)
        return Reading(tokens[0], text, tag=ended or tokens[0] in self._tags, forced=tokens[1:], ended=ended)

    def _read_promise(self, thread: Thread, token: int) -> Reading:
        """A token of a topic or a length, and those behind it that are the only ones that can follow."""
        tokens: list[int] = []
        promise: Promise | None = None
        following: int | None = self._admitted(thread, token)
        while promise is None and following is not None:
            tokens.append(following)
            promise = self._extend(thread, following)
            following = self._admitted(thread)
        return Reading(tokens[0], tag=True, forced=tuple(tokens[1:]), promise=promise)

    def _read_xml(self, thread: Thread, token: int) -> Reading:
        """A token of a model that is not prepared, with the marks that its text completes. What stands behind a
        promise or a sync belongs to the next event."""
        thread.spend()
        ended = self._ends(thread, token)
        piece = b"" if ended else self._vocabulary.piece(token)
        if not self._forking:
            text = thread.characters.decode(piece, final=ended)
            return Reading(token, text, tag=not text, ended=ended)
        text, thread.carry = thread.carry, ""
        promise: Promise | None = None
        sync = False
        marks = thread.scanner.feed(piece) + (thread.scanner.flush() if ended else [])
        for mark in marks:
            if isinstance(mark, AsyncClose) and thread.path:
                ended = True
                break
            if promise or sync:
                thread.carry += mark.text if isinstance(mark, Text) else render_mark(mark)
            elif isinstance(mark, Text):
                text += mark.text
            elif isinstance(mark, Promise):
                fits = self._may_promise(thread) and thread.has(self._room(len(thread.path), mark.tokens, 0))
                promise = mark if fits and thread.is_new(mark.topic) else None
                text += "" if promise else render_mark(mark)
            elif isinstance(mark, Sync):
                sync = bool(thread.group)
        if sync:
            thread.carry = text + thread.carry
            return Reading(token, sync=True)
        thread.last = text or thread.last
        is_tag = not text and bool(thread.scanner.held or marks)
        return Reading(token, text, is_tag, promise=promise, ended=ended)

    def _ends(self, thread: Thread, token: int) -> bool:
        if token in self._stops and not thread.scanner.held:
            self.stopped.append(thread.path)
            return True
        return token in (self._chunk_ends if thread.path else self._answer_ends)

    # ------------------------------------------------------------------ grammar

    def _allowed(self, thread: Thread) -> TokenSet | None:
        """The ids that a thread may sample next."""
        tags, early = self._tags, thread.written < self._min_tokens
        if not self._prepared:
            return TokenSet(self._vocabulary.eos | self._stops, inverted=True) if early else None
        if thread.mode == "number":
            return TokenSet(frozenset(self._lengths(thread)))
        if thread.mode == "topic":
            return TokenSet(frozenset(self._banned_in_topic(thread)), inverted=True)
        if self._joins_now(thread):
            return self._sync_alone
        promises, chunk = self._may_promise(thread), bool(thread.path)
        key = (promises, bool(thread.group), chunk, early)
        if key not in self._masks:
            ends = {tags.async_close} if chunk else self._answer_ends
            banned = {tags.tokens, tags.promise_end, tags.async_open} | (self._chunk_ends - ends)
            if not promises:
                banned.add(tags.promise)
            if not thread.group:
                banned.add(tags.sync)
            if early:
                banned |= self._stops if chunk else self._stops | ends
            self._masks[key] = TokenSet(frozenset(banned), inverted=True)
        return self._masks[key]

    def _admitted(self, thread: Thread, token: int | None = None) -> int | None:
        """The sampled token of a promise, or the one that replaces it where the grammar forbids it. Before one is
        sampled: the only one that can follow, if there is only one."""
        if thread.mode == "number":
            allowed = self._lengths(thread)
            return token if token in allowed or (token is None and len(allowed) > 1) else min(allowed)
        if token is None:
            closes = thread.mode == "topic" and len(thread.tag) >= MAX_TOPIC_TOKENS
        else:
            text = self._vocabulary.text([*thread.tag, token]) + "x"
            closes = token in self._silent or clip_topic(text) != " ".join(text.split())
        return self._closing(thread) if closes else token

    def _extend(self, thread: Thread, token: int) -> Promise | None:
        """Adds a token to the promise that a thread writes. Returns the promise once it is complete."""
        thread.spend()
        if token == self._tags.tokens and thread.mode == "topic":
            thread.topic, thread.mode, thread.tag = self._topic(thread), "number", []
        elif token == self._tags.promise_end:
            length = self._vocabulary.numbers[tuple(thread.tag)]
            thread.mode, thread.tag = "text", []
            return Promise.clip(thread.topic, length)
        else:
            thread.tag.append(token)
        return None

    def _topic(self, thread: Thread) -> str:
        return clip_topic(self._vocabulary.text(thread.tag))

    def _closing(self, thread: Thread) -> int:
        """The next token of a topic that has to end: `<|tokens|>`, or first a digit that makes it distinct."""
        topic = self._topic(thread)
        if thread.is_new(topic):
            return self._tags.tokens
        number = next(number for number in count(2) if thread.is_new(f"{topic}{number}"))
        return self._vocabulary.encode(str(number))[-1]

    def _banned_in_topic(self, thread: Thread) -> frozenset[int]:
        """The tokens that may not follow in a topic: those that would repeat a sibling's topic, and the end while it
        repeats one. So the model writes its next best word instead. Numbers are free, as they may go on: after
        "step 1" may come "step 10"."""
        banned = self._silent
        topic = self._topic(thread)
        key = topic_key(topic)
        for sibling in thread.group.values():
            rest = sibling[len(key) :].strip() if sibling.startswith(key) else ""
            if rest and not rest.isdigit():
                banned |= self._spellings(rest)
        if thread.is_new(topic):
            return banned - {self._tags.tokens}
        # another word can still come, unless there are as many as a topic may have
        open_ended = key and not topic[-1].isdigit() and clip_topic(f"{topic} x") != topic
        return banned.union(*self._vocabulary.numbers) if open_ended else banned

    def _lengths(self, thread: Thread) -> set[int]:
        """The ids that may come next in a promised length: those that lead to a length that the budget allows, else
        to the smallest."""
        done, numbers = len(thread.tag), self._vocabulary.numbers
        possible = [(n, ids) for ids, n in numbers.items() if ids[:done] == tuple(thread.tag)]
        within = [(n, ids) for n, ids in possible if thread.has(self._room(len(thread.path), n, len(ids) - done + 1))]
        return {(*ids, self._tags.promise_end)[done] for _, ids in within or [min(possible)]}

    # ------------------------------------------------------------------ budgets

    def _may_promise(self, thread: Thread) -> bool:
        """Whether a promise may begin: a chunk as long as the last one promised must fit."""
        if not self._forking or len(thread.path) >= self._limits.max_depth:
            return False
        return len(thread.group) < self._limits.max_promises and thread.has(thread.room)

    def _room(self, depth: int, tokens: int, spare: int | None = None) -> tuple[float, float]:
        """The least budget and positions of a thread with which `spare` more tokens (None: a whole promise), a chunk
        of that length and the thread's own end fit. A chunk leaves its parent positions for a sync and an end."""
        spare = self._promise_tokens if spare is None else spare
        grant, end = self._grant(tokens), self._chunk_end if depth else len(self._close)
        if grant <= len(self._open) + self._chunk_end:
            return math.inf, math.inf
        return spare + grant + end, spare + max(tokens + language.CHUNK_TAGS + end, grant + 1 + self._chunk_end)

    def _grant(self, tokens: int) -> int:
        """Budget of a chunk of that promised length."""
        return min(self._limits.max_chunk_tokens, 2 * tokens + CHUNK_SLACK)

    def _spent(self, thread: Thread) -> bool:
        """Whether only the end of the thread fits."""
        end = self._end_tokens(thread)
        return thread.budget <= end or thread.positions <= end

    def _joins_now(self, thread: Thread) -> bool:
        """Whether all that a thread has left is a sync and its end, while its children hold a part of its budget:
        joined, they give back what they do not use, and it goes on. A prepared model may sample nothing else then, and
        what it samples is taken for the sync; for others one is forced."""
        if not thread.group:
            return False
        return thread.budget == self._end_tokens(thread) + len(self._sync_tokens) < thread.positions

    def _end_tokens(self, thread: Thread) -> int:
        """Number of tokens that are kept for the thread's end."""
        return self._chunk_end if thread.path else 0

    # ------------------------------------------------------------------ threads

    def _become(self, thread: Thread, state: State) -> None:
        self._live += (state == "live") - (thread.state == "live")
        self._unfinished -= state == "finished"
        thread.state = state

    def _fork(self, parent: Thread, promise: Promise) -> list[Event]:
        """Makes the child thread of a promise. Its budget is taken from its parent's."""
        grant, path = self._grant(promise.tokens), (*parent.path, parent.forks)
        child = Thread(
            path,
            budget=grant,
            positions=parent.positions - 1 - self._chunk_end,
            room=self._room(len(path), language.LENGTH_STEP),
            origin=parent.written + grant,
            scanner=self._vocabulary.scanner(),
            state="queued",
            key=topic_key(promise.topic),
            last=parent.last,
        )
        child.spend(len(self._open))
        self.threads[path] = child
        self._unfinished += 1
        parent.forks += 1
        parent.budget -= grant
        parent.lent += grant
        parent.positions -= promise.tokens + language.CHUNK_TAGS
        parent.group[path] = child.key
        parent.last = "\n"  # as every chunk ends in white space
        parent.room = self._room(len(parent.path), promise.tokens)
        forked = partial(Forked, path=path, topic=promise.topic, promised=promise.tokens)
        if self._live < self._limits.max_threads:
            self._become(child, "live")
            return [forked(forced=self._open, allowed=self._allowed(child))]
        child.resume = self._open
        self._queue.append(child)
        return [forked(), Blocked(path=path, on="thread")]

    def _sync(self, thread: Thread, tokens: tuple[int, ...]) -> Iterator[Event]:
        """A thread waits for its children; the tokens are fed when it goes on."""
        thread.resume = tokens
        if self._children_done(thread):
            self._become(thread, "queued")
            self._queue.appendleft(thread)
        else:
            self._become(thread, "blocked")
            yield Blocked(path=thread.path)
        yield from self._release()

    def _children_done(self, thread: Thread) -> bool:
        return all(self.threads[path].state == "finished" for path in thread.group)

    def _release(self) -> Iterator[Event]:
        """Lets queued threads go on while fewer than `max_threads` are live, after the children that they waited for.
        The budget that the children did not use returns."""
        while self._queue and self._live < self._limits.max_threads:
            thread = self._queue.popleft()
            for child in (self.threads[path] for path in thread.group):
                thread.budget += child.budget
                thread.positions = min(thread.positions, child.positions + self._chunk_end)  # under `overlap`
            children, forced = tuple(thread.group), thread.resume
            thread.group.clear()
            thread.lent, thread.resume = 0, ()
            self._become(thread, "live")
            yield Joined(path=thread.path, children=children, forced=forced, allowed=self._allowed(thread))
            if self._spent(thread):
                yield from self._end(thread, "length")

    def _newline_due(self, thread: Thread) -> tuple[int, ...]:
        """The newline that is forced at the end of a chunk whose text does not end in white space, so that what
        follows begins on a new line. Its text is part of the event that ends the thread."""
        if not thread.path or (thread.carry or thread.last)[-1:].isspace():
            return ()
        thread.carry += "\n"
        thread.spend(len(self._newline))
        return self._newline

    def _end(self, thread: Thread, reason: events.FinishReason, why: str = "") -> Iterator[Event]:
        """The end of a thread, and what it lets go on. Where a chunk does not end by itself, its end tag, for which
        room was kept, is forced."""
        close = () if reason == "stop" or not thread.path else self._close
        thread.spend(len(close))
        forced = (*self._newline_due(thread), *close)
        self._become(thread, "finished")
        yield Finished(path=thread.path, reason=reason, text=thread.carry, forced=forced, why=why)
        if thread.path:
            parent = self.threads[thread.path[:-1]]
            if parent.state == "blocked" and self._children_done(parent):
                self._become(parent, "queued")
                self._queue.append(parent)
        yield from self._release()


def _spellings(vocabulary: Vocabulary, word: str) -> frozenset[int]:
    """The single tokens that spell a case-folded word, with any case and with or without a space."""
    forms = {form for w in (word, f" {word}") for form in (w, w.title(), w.upper())}
    return frozenset(one[0] for one in map(vocabulary.encode, forms) if len(one) == 1)
