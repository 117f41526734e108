"""Layout, pack and pack_serial against the brute-force oracle of the laws."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.core.events import Blocked, Decoded, Finished, Forked, Path
from pastalm.core.language import LENGTHS, Promise, Sync, Text
from pastalm.core.layout import Layout, Policy
from pastalm.engines.mask_rows import mask_row
from pastalm.errors import CapabilityError
from pastalm.eval.replay import decoded_rows
from pastalm.records.documents import Async, Document, encode, normalize
from pastalm.train.packing import IGNORED, Packed, pack, pack_serial, unroll
from tests.laws.oracle import Fed, Fork, Linear, Record
from tests.laws.tiny import EOS, TAGS, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
PROMPT = (1, 2, 3, 4)
words = st.text("abc ", min_size=1, max_size=4).map(Text)


def documents(depth: int) -> st.SearchStrategy[Document]:
    """Documents in normal form with chunks down to `depth`; a sync only where there is something to join."""
    chunk = documents(depth - 1) if depth > 1 else st.lists(words, max_size=2).map(tuple)
    promised = st.tuples(
        st.builds(Promise, st.sampled_from(["a", "bc", "a b"]), st.sampled_from(LENGTHS[:4])),
        st.builds(Async, chunk),
    )
    text, sync = words.map(lambda t: (t,)), st.just((Sync(),))
    return st.lists(st.one_of(text, promised, promised, sync), max_size=6).map(_joinable)


def _joinable(parts: Sequence[Document]) -> Document:
    kept: list[Document] = []
    unjoined = False
    for part in parts:
        if part == (Sync(),) and not unjoined:
            continue
        unjoined = part != (Sync(),) and (unjoined or len(part) == 2)
        kept.append(part)
    return normalize(node for part in kept for node in part)


def linear(document: Document, policy: Policy = "promised") -> Linear:
    return Linear(PROMPT, Record.of(unroll(document, VOCABULARY, eos=EOS)), policy)


def linear_places(packed: Packed, line: Linear) -> list[int]:
    """The linear place of each packed token: threads are runs, in their own order."""
    seen: dict[Path, int] = {(): -len(PROMPT)}
    places = []
    for path in packed.paths:
        index = seen.get(path, 0)
        seen[path] = index + 1
        places.append(line.place[path, index])
    return places


@pytest.mark.parametrize("policy", ["promised", "overlap"])
@given(document=documents(3))
@settings(max_examples=60, deadline=None)
def test_pack_is_the_specification(policy: Policy, document: Document) -> None:
    packed = pack(PROMPT, document, VOCABULARY, policy, eos=EOS)
    line = linear(document, policy)
    order = linear_places(packed, line)
    assert sorted(order) == list(range(len(packed)))
    np.testing.assert_array_equal(packed.input_ids, line.tokens[order])
    np.testing.assert_array_equal(packed.position_ids, line.positions[order])
    np.testing.assert_array_equal(packed.visible, line.visible[np.ix_(order, order)])


@given(documents(2))
def test_an_oracles_positions_are_the_places_in_linear_form(document: Document) -> None:
    """A promise that names the true length leaves neither gap nor overlap."""
    packed = pack(PROMPT, document, VOCABULARY, eos=EOS, oracle=True)
    assert packed.position_ids.tolist() == linear_places(packed, linear(document))


@given(document=documents(3))
@settings(max_examples=60, deadline=None)
def test_pack_labels_each_sampled_token_once_behind_its_predecessor(document: Document) -> None:
    packed = pack(PROMPT, document, VOCABULARY, eos=EOS)
    sampled = packed.input_ids != TAGS.async_open
    sampled[: len(PROMPT)] = False
    np.testing.assert_array_equal(packed.labels, np.where(sampled, packed.input_ids, IGNORED))
    for i in np.flatnonzero(sampled):
        assert packed.paths[i - 1] == packed.paths[i]


@pytest.mark.parametrize("policy", ["promised", "overlap"])
@given(
    document=documents(3),
    rng=st.randoms(use_true_random=False),
    page=st.sampled_from([1, 2, 3, 16]),
    spare=st.sampled_from([0, 0, 1, 7, 500]),
)
@settings(max_examples=100, deadline=None)
def test_order_of_decoding_and_places_change_nothing(
    policy: Policy, document: Document, rng: random.Random, page: int, spare: int
) -> None:
    """Threads interleaved at random see and stand the same as in linear order, in runs of any length, and in no
    more places than there are tokens."""
    line = linear(document, policy)
    layout = Layout(len(PROMPT), len(line.entries) + spare, policy, page=page)
    placed = _interleaved(layout, line, rng)
    assert len(placed) == len(line.entries) - len(PROMPT)
    assert not placed.keys() & set(range(len(PROMPT)))
    at = {place: line.place[key] for place, (key, _, _) in placed.items()}
    at |= {i: i for i in range(len(PROMPT))}
    assert layout.used == max(at) + 1 <= layout.capacity
    for place, (key, position, row) in placed.items():
        i = line.place[key]
        assert position == layout.positions[place] == line.positions[i]
        seen = {at[slot] for slot in np.flatnonzero(row).tolist()}
        assert seen == set(np.flatnonzero(line.visible[i])), (place, key)


def _interleaved(
    layout: Layout, line: Linear, rng: random.Random
) -> dict[int, tuple[tuple[Path, int], int, np.ndarray]]:
    """place -> ((thread, index), position, row), with the threads advanced at random."""
    todo = {path: list(items) for path, items in line.record.threads.items()}
    counts: dict[Path, int] = dict.fromkeys(todo, 0)
    born: set[Path] = {()}
    out: dict[int, tuple[tuple[Path, int], int, np.ndarray]] = {}
    while any(todo.values()):
        ready = [p for p in born if todo[p] and _can_go(todo[p][0], todo)]
        path = rng.choice(sorted(ready))
        item = todo[path].pop(0)
        if isinstance(item, Fork):
            layout.fork(item.child, item.promised)
            born.add(item.child)
            continue
        layout.join(path, item.joins)
        token = layout.decode(path, item.token)
        assert token.place not in out
        out[token.place] = ((path, counts[path]), token.position, mask_row(token.sees, layout.capacity))
        counts[path] += 1
        if not todo[path] and rng.random() < 0.5:
            layout.apply(Finished(path=path))
    return out


@given(
    prompt=st.integers(1, 40),
    page=st.sampled_from([1, 2, 3, 16]),
    turns=st.lists(st.integers(0, 5), max_size=120),
)
@settings(max_examples=100, deadline=None)
def test_with_room_a_run_is_of_one_thread(prompt: int, page: int, turns: list[int]) -> None:
    """The main thread goes on in the prompt's last run, every other thread begins and fills runs of its own."""
    layout = Layout(prompt, prompt + page * (len(turns) + 1), page=page)
    paths: list[Path] = [(), *((i,) for i in range(5))]
    for path in paths[1:]:
        layout.fork(path, 10)
    owner: dict[int, Path] = {prompt // page: ()} if prompt % page else {}
    filled: dict[Path, int] = {}
    for turn in turns:
        path = paths[turn]
        place = layout.decode(path, 5).place
        begins = place % page == 0
        assert owner.setdefault(place // page, path) == path
        assert begins or place == filled.get(path, prompt - 1) + 1
        filled[path] = place
    assert layout.used <= prompt + page * (len(turns) + 1)


def test_a_full_layout_takes_over_the_runs_of_threads_that_need_them_least() -> None:
    """Of two started runs that of the finished thread first, then that of the waiting one, then any."""
    layout = Layout(4, 12, page=4)
    for path in ((0,), (1,)):
        layout.apply(Forked(path=path))
    layout.apply(Decoded(path=(0,), token=5))  # 4..7
    layout.apply(Decoded(path=(1,), token=5))  # 8..11
    layout.apply(Blocked(path=(0,)))
    layout.apply(Finished(path=(1,)))
    places = [layout.apply(Decoded(path=(), token=5))[0].place for _ in range(6)]
    assert places == [9, 10, 11, 5, 6, 7]
    with pytest.raises(IndexError):
        layout.decode((), 5)


def _can_go(item: Fed | Fork, todo: dict[Path, list[Fed | Fork]]) -> bool:
    return isinstance(item, Fork) or not any(todo[child] for child in item.joins)


@given(document=documents(3))
@settings(max_examples=60, deadline=None)
def test_serial_rows_are_what_a_stretch_may_see_then_the_stretch(document: Document) -> None:
    rows = pack_serial(PROMPT, document, VOCABULARY, eos=EOS)
    line = linear(document)
    want = _serial_rows(line)
    got = sorted((r.input_ids.tolist(), r.labels.tolist()) for r in rows)
    assert got == sorted(want)
    decoded = decoded_rows(PROMPT, unroll(document, VOCABULARY, eos=EOS))
    replayed = [([*context, *(token for token, _ in own)], len(context)) for context, own in decoded]
    packed = [(ids, labels.count(IGNORED)) for ids, labels in got]
    synced = [(ids[:-1], n) if ids[-1] == TAGS.sync else (ids, n) for ids, n in packed]
    # a stretch without a token of its own has no row to train on, and nothing to replay
    assert sorted(r for r in replayed if len(r[0]) > r[1]) == sorted(r for r in synced if len(r[0]) > r[1])
    for row in rows:
        n = len(row)
        np.testing.assert_array_equal(row.position_ids, np.arange(n))
        np.testing.assert_array_equal(row.visible, np.tril(np.ones((n, n), dtype=bool)))


def _serial_rows(line: Linear) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each stretch of a thread between syncs: what it sees in linear form, then it.

    A stretch begins behind `<|async|>` or a sync, both context of it, and is labelled up to the
    next sync, that included."""
    stretches = []
    for path in line.record.threads:
        own = [i for i, (p, index, _) in enumerate(line.entries) if p == path and index >= 0]
        context = [*np.flatnonzero(line.visible[own[0]])] if path else list(range(len(PROMPT)))
        stretch: list[int] = []
        for i in own[1:] if path else own:
            stretch.append(i)
            if line.entries[i][2].joins:
                stretches.append((context, stretch))
                context, stretch = [*np.flatnonzero(line.visible[i])], []
        stretches.append((context, stretch))
    rows = []
    for context, stretch in stretches:
        if stretch:
            ids = [line.entries[i][2].token for i in [*context, *stretch]]
            rows.append((ids, [IGNORED] * len(context) + ids[len(context) :]))
    return rows


def test_positions_by_example() -> None:
    document = (Promise("a", 20), Async((Text("xy"),)), Text("z"), Sync())
    head = len(PROMPT) + len(encode([Promise("a", 20)], VOCABULARY))
    promised = {p: i for i, p in zip(*_by_place(document, "promised"), strict=True)}
    assert promised[((), 0)] == len(PROMPT)
    assert promised[((0,), 0)] == head
    assert promised[((), head - len(PROMPT))] == head + 22  # z
    assert promised[((), head - len(PROMPT) + 1)] == head + 23  # the sync
    overlap = {p: i for i, p in zip(*_by_place(document, "overlap"), strict=True)}
    assert overlap[((), head - len(PROMPT))] == head
    assert overlap[((), head - len(PROMPT) + 1)] == head + 4  # behind <|async|> x y <|/async|>


def _by_place(document: Document, policy: Policy) -> tuple[list[int], list[tuple[Path, int]]]:
    packed = pack(PROMPT, document, VOCABULARY, policy)
    line = Linear(PROMPT, Record.of(unroll(document, VOCABULARY)), policy)
    keys = [line.entries[i][:2] for i in linear_places(packed, line)]
    return packed.position_ids.tolist(), keys


def test_a_layout_refuses_serial_and_to_overflow() -> None:
    with pytest.raises(CapabilityError):
        Layout(1, 4, "serial")
    layout = Layout(2, 3)
    layout.apply(Forked(path=()))
    layout.apply(Decoded(path=(), token=5))
    with pytest.raises(IndexError):
        layout.apply(Decoded(path=(), token=5))
