"""Who sees whom, and at which position: one incremental object for engines and for training.

A `Layout` is told what happens to the threads of one response (fork, decode, join), in any order that
respects cause and effect, and gives every token a place (the slot of the KV pool, in order of
decoding), a position id, and the set of places it sees. Engines drive it with events while decoding;
training drives it with the events of a finished document in linear order (`pack`). Visibility
depends on that history only through what was joined when, so both give the same model.

What a thread sees is one integer, bit p for place p: a fork shares the parent's, decoding sets one bit, a join is
an OR. Keys and values never move.

Places come in runs of `page`, each filled by one thread, so that an engine whose attention reads `page` slots
together wastes little where threads decode side by side. Visibility is by bit: who fills a run decides speed alone.

Positions, with p the position of the promise's last token and N its length:

    promised   the child starts at p+1; its parent goes on at p+1+N+2 (the tags of the chunk are 2)
    overlap    both go on at p+1; after a join, at the largest visible position + 1
    serial     no masked pass: the response is expanded into ordinary causal rows (`SerialLayout` while decoding,
               `pack_serial` for training)

Source: PASTA section 4 (interpreter, positions "Pred-10X").
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path
from pastalm.core.language import (
    CHUNK_TAGS,
    AsyncClose,
    AsyncOpen,
    Document,
    Promise,
    Text,
    linearize,
)
from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.errors import CapabilityError, DataError

Policy: TypeAlias = Literal["promised", "overlap", "serial"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
MIXED: Mapping[Policy, float] = MappingProxyType({"promised": 0.65, "overlap": 0.35})
"""How often training takes each policy, unless told otherwise: one model then serves every engine."""

Row: TypeAlias = NDArray[np.bool_]


def seen_row(sees: int, places: int) -> Row:
    """[places] bool: the first bits of what is seen, as an array."""
    packed = np.frombuffer(sees.to_bytes(-(-max(places, sees.bit_length()) // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=places, bitorder="little").view(np.bool_)


@dataclass(frozen=True, slots=True)
class Placed:
    """A token in its place. sees: bit p says whether it sees place p; its own is set. capacity: the layout's."""

    path: Path
    token: int
    place: int
    position: int
    sees: int
    capacity: int
    forced: bool = False

    @property
    def row(self) -> Row:
        """[capacity] bool: the places that it sees, itself included."""
        return seen_row(self.sees, self.capacity)


class Layout:
    """The threads of one response over `capacity` places, the first `prompt_length` of them the prompt.

    used: all places that hold a token are below. page: places in a run. A thread whose run is full begins the next
    fresh one; where none is left it takes over the rest of another thread's, so that whatever `capacity` holds with
    page=1 it holds with any. The main thread goes on in the prompt's last run. Raises CapabilityError for the policy
    `serial` (it is not one masked pass), IndexError when full.
    """

    def __init__(self, prompt_length: int, capacity: int, policy: Policy = "promised", *, page: int = 1) -> None:
        if policy not in ("promised", "overlap"):
            raise CapabilityError(f"positions={policy!r} is not one masked pass; use promised or overlap")
        self.policy = policy
        self.capacity = capacity
        self.page = page
        self.used = prompt_length
        self.positions = np.zeros(capacity, dtype=np.int64)
        self.positions[:prompt_length] = np.arange(prompt_length)
        self._sees: dict[Path, int] = {(): (1 << prompt_length) - 1}
        self._next: dict[Path, int] = {(): prompt_length}
        self._open: dict[Path, int] = {}
        """Of each thread whose run is not full, the first free place of that run."""
        self._idle: dict[Path, int] = {}
        """How little a thread would miss its run: 2 one that is finished, 1 one that waits."""
        self._leave_open((), prompt_length)

    def fork(self, path: Path, promised: int) -> None:
        """Thread `path` begins where its parent stands now."""
        parent = path[:-1]
        self._sees[path] = self._sees[parent]
        self._next[path] = self._next[parent]
        if self.policy == "promised":
            self._next[parent] += promised + CHUNK_TAGS

    def decode(self, path: Path, token: int, *, forced: bool = False) -> Placed:
        """The next token of thread `path`."""
        place, position = self._take(path), self._next[path]
        self.positions[place] = position
        sees = self._sees[path] = self._sees[path] | 1 << place
        self._next[path] = position + 1
        return Placed(path, token, place, position, sees, self.capacity, forced)

    def join(self, path: Path, children: Sequence[Path]) -> None:
        """From now on thread `path` sees what each of `children` sees."""
        for child in children:
            self._sees[path] |= self._sees[child]
            if self.policy == "overlap":  # what a thread sees ends right before its next position
                self._next[path] = max(self._next[path], self._next[child])

    def apply(self, event: Event) -> list[Placed]:
        """Does what an event means; the tokens it places, in order."""
        path, placed = event.path, list[Placed]()
        if isinstance(event, Decoded):
            placed.append(self.decode(path, event.token))
        elif isinstance(event, Forked) and path:
            self.fork(path, event.promised)
        elif isinstance(event, Joined):
            self.join(path, event.children)
            self._idle.pop(path, None)
        elif isinstance(event, Blocked):
            self._idle[path] = 1
        elif isinstance(event, Finished):
            self._idle[path] = 2
        for token in event.forced:
            placed.append(self.decode(path, token, forced=True))
        return placed

    def visible(self, path: Path) -> Row:
        """[capacity] bool: the places that thread `path` sees now."""
        return seen_row(self._sees[path], self.capacity)

    def _take(self, path: Path) -> int:
        """A free place: in the thread's own run, in a fresh one, in the rest of another thread's."""
        place = self._open.pop(path, None)
        if place is None:
            place = -(-self.used // self.page) * self.page
        if place >= self.capacity:
            if not self._open:
                raise IndexError(f"all {self.capacity} places are taken")
            place = self._open.pop(max(self._open, key=lambda other: self._idle.get(other, 0)))
        self._leave_open(path, place + 1)
        self.used = max(self.used, place + 1)
        return place

    def _leave_open(self, path: Path, place: int) -> None:
        """Notes that the thread's run goes on at `place`, if it does."""
        if place % self.page and place < self.capacity:
            self._open[path] = place


class SerialLayout:
    """What each thread reads under `serial`: an ordinary causal row, the linear form of all that it may see.

    Told the same events as a `Layout`. A row only grows until the thread joins; then it is a new one.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = list(prompt)
        self._threads: dict[Path, _Written] = {}

    def apply(self, event: Event) -> None:
        """Does what an event means."""
        path = event.path
        if isinstance(event, Forked):
            self._threads[path] = _Written(self.row(path[:-1]) if path else self._prompt)
            if path:
                self._threads[path[:-1]].own.append(path)
        elif isinstance(event, Joined):
            self._threads[path].joined.update(event.children)
        own = self._threads[path].own
        if isinstance(event, Decoded):
            own.append(event.token)
        own += event.forced

    def row(self, path: Path) -> list[int]:
        """All that thread `path` sees now, in linear order."""
        return [*self._threads[path].context, *self._expanded(path)]

    def _expanded(self, path: Path) -> Iterator[int]:
        thread = self._threads[path]
        for item in thread.own:
            if isinstance(item, int):
                yield item
            elif item in thread.joined:
                yield from self._expanded(item)


def decoded_rows(
    prompt: Sequence[int], events: Iterable[Event]
) -> Iterator[tuple[list[int], list[tuple[int, Decoded | None]]]]:
    """Of a decoded response under `serial`, what each stretch of a thread between syncs read before it began, and its
    own tokens, each with the event that decoded it (None: it was forced): what a plain causal model must be asked to
    replay it."""
    layout = SerialLayout(prompt)
    begun: dict[Path, tuple[list[int], list[tuple[int, Decoded | None]]]] = {}
    for event in events:
        if isinstance(event, Joined) and event.path in begun:
            yield begun.pop(event.path)
        layout.apply(event)
        if isinstance(event, Forked | Joined):
            begun[event.path] = (layout.row(event.path), [])
        elif isinstance(event, Decoded | Finished):
            own = begun[event.path][1]
            if isinstance(event, Decoded):
                own.append((event.token, event))
            own += [(token, None) for token in event.forced]
    yield from begun.values()


@dataclass(slots=True)
class _Written:
    """A thread's own part of a row: its tokens, and its children where they stand."""

    context: list[int]
    own: list[int | Path] = field(default_factory=list)
    joined: set[Path] = field(default_factory=set)


# ------------------------------------------------------------------------------ over linear form


def unroll(document: Document, vocabulary: Vocabulary, *, eos: int | None = None) -> Iterator[Event]:
    """The events that would have decoded `document`, in linear order; `eos` ends the main thread."""
    tags = vocabulary.tags
    assert tags is not None, "a document has token ids only under a prepared vocabulary"
    path: Path = ()
    forks: dict[Path, int] = {(): 0}
    unjoined: dict[Path, list[Path]] = {(): []}
    promise = Promise("part", 10)
    yield Forked(path=())
    for mark in linearize(document):
        if isinstance(mark, Text):
            for token in vocabulary.encode(mark.text):
                yield Decoded(path=path, token=token)
        elif isinstance(mark, Promise):
            promise = mark
            for token in vocabulary.encode_document([mark]):
                yield Decoded(path=path, token=token, tag=True)
        elif isinstance(mark, AsyncOpen):
            child = (*path, forks[path])
            forks[path] += 1
            unjoined[path].append(child)
            forks[child], unjoined[child], path = 0, [], child
            yield Forked(path=child, topic=promise.topic, promised=promise.tokens, forced=(tags.async_open,))
        elif isinstance(mark, AsyncClose):
            yield Decoded(path=path, token=tags.async_close, tag=True)
            yield Finished(path=path)
            path = path[:-1]
        else:
            yield Joined(path=path, children=tuple(unjoined[path]), forced=(tags.sync,))
            unjoined[path] = []
    if eos is not None:
        yield Decoded(path=(), token=eos, tag=True)
    yield Finished(path=())


def retell(token_ids: Sequence[int], vocabulary: Vocabulary, *, forced: Iterable[int] = ()) -> Iterator[Event]:
    """The events that decoded some tokens, given in linear order, tags too. forced: places of tokens that no thread
    sampled; they come back as `replaced`. Text stands on the events, as the interpreter puts it there. Raises DataError
    where the tokens are no response of a model with these tags."""
    tags = vocabulary.tags
    assert tags is not None, "tokens tell threads only under a prepared vocabulary"
    given = frozenset(forced)
    thread = _Retold(())
    threads = [thread]
    yield Forked(path=())
    for place, token in enumerate(token_ids):
        if token == tags.async_open:
            if thread.promise is None:
                raise DataError("a chunk begins without its promise")
            promise, thread.promise = thread.promise, None
            thread = thread.child()
            threads.append(thread)
            yield Forked(path=thread.path, topic=promise.topic, promised=promise.tokens, forced=(token,))
        elif token == tags.sync and thread.unjoined:
            yield Joined(path=thread.path, children=tuple(thread.unjoined), forced=(token,))
            thread.unjoined.clear()
        else:
            text = thread.text(token, vocabulary, tags, forced=place in given)
            yield Decoded(path=thread.path, token=token, text=text, tag=token in tags.ids, replaced=place in given)
            if token == tags.async_close and thread.path:
                yield Finished(path=thread.path)
                threads.pop()
                thread = threads[-1]
    if thread.path:
        raise DataError("a chunk has no end")
    yield Finished(path=())


@dataclass(slots=True)
class _Retold:
    """A thread whose tokens are told again. tag: tokens of a promise so far, None outside of one. promise: the one that
    was just completed."""

    path: Path
    forks: int = 0
    unjoined: list[Path] = field(default_factory=list)
    tag: list[int] | None = None
    promise: Promise | None = None
    characters: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def child(self) -> _Retold:
        """The thread that keeps the promise."""
        made = _Retold((*self.path, self.forks))
        self.unjoined.append(made.path)
        self.forks += 1
        return made

    def text(self, token: int, vocabulary: Vocabulary, tags: Tags, *, forced: bool) -> str:
        """The reader's text that a token adds."""
        self.promise = None
        if self.tag is not None:
            self._promise(token, vocabulary, tags)
            return ""
        if token == tags.promise:
            self.tag = []
        if token in tags.ids or token in vocabulary.eos:
            text = "" if forced else self.characters.decode(b"", final=True)
            self.characters.reset()
            return text
        return self.characters.decode(vocabulary.piece(token))

    def _promise(self, token: int, vocabulary: Vocabulary, tags: Tags) -> None:
        """Goes on with a promise, which its last token completes."""
        assert self.tag is not None
        if token != tags.promise_end:
            self.tag.append(token)
            return
        at = self.tag.index(tags.tokens) if tags.tokens in self.tag else len(self.tag)
        length = vocabulary.numbers.get(tuple(self.tag[at + 1 :]))
        if length is None:
            raise DataError("a promise names no length")
        self.promise, self.tag = Promise.clip(vocabulary.text(self.tag[:at]), length), None


IGNORED = -100
"""The label of a token that is not in the loss."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One response as one training sequence of n tokens, thread after thread.

    input_ids, position_ids, labels: [n]; labels[i] is input_ids[i] or -100, and belongs to the logits
    at i - 1 (the caller's loss shifts by one, as the field's trainers do). paths: each token's thread. order: [n], how
    many tokens were decoded before each. joins: the chunks that a thread reads from its token of that `order` on; None:
    the sequence is an ordinary causal one, whatever threads it is made of. It holds nothing of size n x n.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    paths: tuple[Path, ...]
    order: NDArray[np.int64]
    joins: tuple[tuple[int, tuple[Path, ...]], ...] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def visible(self) -> NDArray[np.bool_]:
        """[n, n] bool, made when asked for; visible[i, j]: i sees j."""
        n = len(self)
        if self.joins is None:
            return np.tri(n, dtype=np.bool_)
        layout, joins, begun = Layout(0, n), dict(self.joins), {()}
        rows = np.empty((n, n), dtype=np.bool_)
        for place, i in enumerate(np.argsort(self.order).tolist()):
            path = self.paths[i]
            if path not in begun:
                layout.fork(path, 0)
                begun.add(path)
            layout.join(path, joins.get(place, ()))
            rows[i] = layout.decode(path, 0).row[self.order]
        return rows


def pack(
    prompt: Sequence[int],
    document: Document,
    vocabulary: Vocabulary,
    policy: Policy = "promised",
    *,
    eos: int | None = None,
    oracle: bool = False,
) -> Packed:
    """The response as one masked sequence: prompt and main thread first, then each chunk as one run.
    oracle: positions as if every promise named its chunk's true length (an ablation, PASTA section 6).

    Within each run the target is the next token, so that after a promise it is the parent's next
    token (PASTA section 5); the forced `<|async|>` and the prompt are left out of the loss. `<|sync|>`
    stays in: the model sampled it, it was only fed late.
    """
    events = list(unroll(document, vocabulary, eos=eos))
    return pack_events(prompt, _foreseen(events) if oracle else events, vocabulary, policy)


def pack_events(
    prompt: Sequence[int], events: Iterable[Event], vocabulary: Vocabulary, policy: Policy = "promised"
) -> Packed:
    """`pack` for events in linear order. What was put in the place of a sampled token is left out of the loss."""
    events = list(events)
    length = len(prompt) + sum(map(_tokens, events))
    layout = Layout(len(prompt), length, policy)
    placed, joins, unsampled = list[Placed](), list[tuple[int, tuple[Path, ...]]](), set[int]()
    for event in events:
        if isinstance(event, Joined):
            joins.append((layout.used, event.children))
        elif isinstance(event, Decoded) and event.replaced:
            unsampled.add(layout.used)
        placed += layout.apply(event)
    rank = {path: i for i, path in enumerate(dict.fromkeys(((), *(t.path for t in placed))))}
    placed.sort(key=lambda t: rank[t.path])  # stable: linear order within a thread
    order = np.array([*range(len(prompt)), *(t.place for t in placed)], dtype=np.int64)
    ids = np.array([*prompt, *(t.token for t in placed)], dtype=np.int64)
    labels = ids.copy()
    labels[: len(prompt)] = IGNORED
    if vocabulary.tags is not None:
        labels[ids == vocabulary.tags.async_open] = IGNORED
    labels[np.isin(order, list(unsampled))] = IGNORED
    return Packed(
        input_ids=ids,
        position_ids=layout.positions[order],
        labels=labels,
        paths=((),) * len(prompt) + tuple(t.path for t in placed),
        order=order,
        joins=tuple(joins),
    )


def _tokens(event: Event) -> int:
    return isinstance(event, Decoded) + len(event.forced)


def _foreseen(events: Sequence[Event]) -> list[Event]:
    """The events with the true length of each chunk in place of what was promised."""
    lengths: Counter[Path] = Counter()
    for event in events:
        for depth in range(len(event.path) + 1):
            lengths[event.path[:depth]] += _tokens(event)
    return [
        replace(e, promised=lengths[e.path] - CHUNK_TAGS) if isinstance(e, Forked) and e.path else e for e in events
    ]


def pack_serial(
    prompt: Sequence[int], document: Document, vocabulary: Vocabulary, *, eos: int | None = None
) -> list[Packed]:
    """The response under `serial`: one ordinary causal row for each stretch of a thread between syncs.

    A row is the linear form of all that the stretch may see, then the stretch; only the stretch is
    labelled. `<|sync|>` is predicted by the stretch that it ends (its label's row) and read, as
    context, by the one after it.
    """
    events = list(unroll(document, vocabulary, eos=eos))
    length = len(prompt) + sum(map(_tokens, events))
    layout = Layout(len(prompt), length, "promised")
    tokens = list(prompt)
    paths: list[Path] = [()] * len(prompt)
    stretches: dict[Path, tuple[list[int], list[int]]] = {(): (list(range(len(prompt))), [])}
    done: list[tuple[Path, list[int], list[int]]] = []
    for event in events:
        if isinstance(event, Joined):
            # the sync's label ends the old stretch, its keys open the new one's context
            context, own = stretches[event.path]
            sync = layout.used
            done.append((event.path, context, [*own, sync]))
        placed = layout.apply(event)
        for token in placed:
            tokens.append(token.token)
            paths.append(token.path)
        if isinstance(event, Joined) or isinstance(event, Forked) and event.path:
            seen = np.flatnonzero(layout.visible(event.path)).tolist()
            stretches[event.path] = (seen, [])
        else:
            for token in placed:
                stretches[token.path][1].append(token.place)
    done += [(path, context, own) for path, (context, own) in stretches.items()]
    return [_row(tokens, paths, context, own) for _, context, own in done if own]


def _row(tokens: list[int], paths: list[Path], context: list[int], own: list[int]) -> Packed:
    places = context + own  # both ascend in linear order, and all of `context` comes first
    ids = np.array([tokens[i] for i in places], dtype=np.int64)
    labels = ids.copy()
    labels[: len(context)] = IGNORED
    n = len(places)
    return Packed(
        input_ids=ids,
        position_ids=np.arange(n),
        labels=labels,
        paths=tuple(paths[i] for i in places),
        order=np.arange(n),
    )
