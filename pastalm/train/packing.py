"""Documents and events in linear form as training sequences: `unroll`, `pack`, `pack_serial`, and back: `retell`.

Training drives the same `Layout` as the engines, with the events of a finished document in linear order. Visibility
depends on that history only through what was joined when, so a trained model sees what a decoding one sees.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from pastalm.core.events import Decoded, Event, Finished, Forked, Joined, Path
from pastalm.core.language import CHUNK_TAGS, AsyncClose, AsyncOpen, Promise, Text, round_length
from pastalm.core.layout import Layout, Placed, Policy
from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.engines.mask_rows import mask_row
from pastalm.errors import DataError
from pastalm.records.documents import Document, encode, linearize

MIXED: Mapping[Policy, float] = MappingProxyType({"promised": 0.65, "overlap": 0.35})
"""How often training takes each policy, unless told otherwise: one model then serves every engine."""


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
            for token in encode([mark], vocabulary):
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
            yield Decoded(path=thread.path, token=token, text=text, tag=token in tags, replaced=place in given)
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
        if token in tags or token in vocabulary.eos:
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


def with_true_lengths(
    token_ids: Sequence[int], vocabulary: Vocabulary, *, forced: Iterable[int] = ()
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a response in linear order with the lengths of its chunks in their promises, and the new places of
    `forced`. A chunk's length is the number of its tokens, those of its own chunks too, rounded as promises are."""
    tags = vocabulary.tags
    assert tags is not None, "tokens tell threads only under a prepared vocabulary"
    chunks, opened = dict[int, int](), list[int]()
    for place, token in enumerate(token_ids):
        if token == tags.async_open:
            opened.append(place)
        elif token == tags.async_close and opened:
            begin = opened.pop()
            chunks[begin] = place - begin - 1
    told: list[tuple[int, int | None]] = []  # each token and its place before; None: it is new
    number = 0
    for place, token in enumerate(token_ids):
        if token == tags.async_open and place in chunks and number and told[-1][0] == tags.promise_end:
            told[number:-1] = [(digit, None) for digit in vocabulary.encode(str(round_length(chunks[place])))]
        told.append((token, place))
        if token == tags.tokens:
            number = len(told)
    given = frozenset(forced)
    return tuple(token for token, _ in told), tuple(i for i, (_, place) in enumerate(told) if place in given)


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
            rows[i] = mask_row(layout.decode(path, 0).sees, n)[self.order]
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
            seen = np.flatnonzero(mask_row(layout.sees(event.path), length)).tolist()
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
