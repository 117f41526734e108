"""Events survive JSON unchanged, and what is no event is refused with one error."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, TokenSet, stamp
from pastalm.errors import DataError
from pastalm.records.traces import from_json, to_json

ids = st.integers(0, 2**31)
paths = st.lists(st.integers(0, 99), max_size=4).map(tuple)
floats = st.floats(allow_nan=False)
sets = st.builds(TokenSet, st.frozensets(ids, max_size=5), st.booleans())
texts = st.text(st.characters(codec="utf-8"), max_size=8)
common = {
    "path": paths,
    "forced": st.lists(ids, max_size=3).map(tuple),
    "allowed": st.none() | sets,
    "step": st.integers(0, 10**6),
    "time": st.floats(0, 1e9),
}
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Forked, **common, topic=texts, promised=st.integers(0, 500)),
    st.builds(
        Decoded,
        **common,
        token=ids,
        text=texts,
        tag=st.booleans(),
        replaced=st.booleans(),
        logprob=st.none() | floats,
        top_logprobs=st.lists(st.tuples(ids, floats), max_size=3).map(tuple),
    ),
    st.builds(Blocked, **common, on=st.sampled_from(["sync", "thread"])),
    st.builds(Joined, **common, children=st.lists(paths, max_size=3).map(tuple)),
    st.builds(
        Finished,
        **common,
        reason=st.sampled_from(["stop", "length", "abort"]),
        text=texts,
        cut=st.none() | st.integers(0, 999),
    ),
)


@given(events)
def test_an_event_survives_json(event: Event) -> None:
    line = to_json(event)
    assert "\n" not in line
    assert from_json(line) == from_json(line.encode()) == event


@pytest.mark.parametrize("value", [-math.inf, math.inf, 1e-300, -745.1332191019412])
def test_no_log_probability_is_lost(value: float) -> None:
    event = Decoded(path=(), token=1, logprob=value, top_logprobs=((1, value),))
    assert from_json(to_json(event)) == event
    json.loads(to_json(event), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "line",
    ["", "{", "null", "[]", "1", "{}", '{"kind":"forked"}', '{"kind":"other","path":[]}', b"\xff"]
    + ['{"kind":"decoded","path":[]}', '{"kind":"decoded","path":["x"],"token":1}'],
)
def test_junk_is_refused(line: str | bytes) -> None:
    with pytest.raises(DataError, match="not an event") as caught:
        from_json(line)
    assert "\n" not in str(caught.value)


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_string_raises_anything_else(line: str) -> None:
    with pytest.raises(DataError):
        from_json(line)


@given(sets, ids)
def test_a_token_set_and_its_complement_share_nothing(some: TokenSet, token: int) -> None:
    rest = TokenSet(some.ids, not some.inverted)
    assert (token in some) != (token in rest)


@pytest.mark.parametrize(("inverted", "inside"), [(False, True), (True, False)])
def test_the_two_ways_to_write_a_set(inverted: bool, inside: bool) -> None:
    some = TokenSet(frozenset({3, 5}), inverted)
    assert (3 in some) is inside
    assert (4 in some) is not inside


@given(events, st.integers(0, 99), st.floats(0, 9))
def test_a_stamp_changes_step_and_time_only(event: Event, step: int, time: float) -> None:
    after = replace(event)
    stamp(after, step, time)
    assert (after.step, after.time) == (step, time)
    stamp(after, event.step, event.time)
    assert after == event
