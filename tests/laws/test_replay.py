"""Law 7: a trace replayed without a model gives the same text and figures. Law 2's core: the text does
not depend on the schedule, the places, or the company of other requests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pastalm.cli.view import segments
from pastalm.core.driver import Driver
from pastalm.core.events import Decoded, Event, Finished, Joined, Path
from pastalm.core.interpreter import Limits
from pastalm.core.language import AsyncClose, AsyncOpen, Mark, Promise, Sync, Text
from pastalm.core.params import SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.engines.base import Schedule
from pastalm.engines.scripted import ScriptedEngine, byte_vocabulary
from pastalm.errors import DataError
from pastalm.records.documents import Async, Document, linearize, nest, normalize, render, strip
from pastalm.records.traces import from_json, to_json
from pastalm.records.transcripts import linear_tokens, summary
from tests.strategies import LOOK_ALIKES, as_decoded, documents

PLENTY = 20_000
ROOM = Limits(max_threads=99, max_depth=3, max_promises=99, max_chunk_tokens=PLENTY)
figures = ("tokens", "steps", "critical_path", "parallelism", "seconds", "finish_reason")


def _play(
    scripts: Sequence[Document | str],
    *,
    schedule: Schedule | None = None,
    limits: Limits = ROOM,
    max_tokens: int = PLENTY,
    prepared: bool = True,
    parallelism: float = 1.0,
    stop: str | None = None,
    max_num_seqs: int = 8,
) -> list[tuple[Transcript, list[Event]]]:
    """What is decoded when the scripts are played at once."""
    vocabulary = byte_vocabulary(prepared)
    engine = ScriptedEngine(vocabulary, scripts, schedule=schedule, max_num_seqs=max_num_seqs)
    driver = Driver(engine, vocabulary, limits=limits)
    params = SamplingParams(max_tokens=max_tokens, parallelism=parallelism, stop=stop, logprobs=1)
    started = [driver.submit([1, 2], params) for _ in scripts]
    driver.run(started)
    assert not engine.has_unfinished()
    return [(response.transcript, response.take()) for response in started]


def _lockstep(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
    return live


def _last_alone(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
    return live[-1:]


def _random(seed: int) -> Schedule:
    rng = random.Random(seed)

    def schedule(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
        return rng.sample(list(live), rng.randint(1, len(live))) if live else []

    return schedule


schedules = st.sampled_from([_lockstep, _last_alone]) | st.integers(0, 999).map(_random)


def _keeps(document: Document) -> Document:
    """The document with distinct topics that are short enough to stay, and lengths that suffice."""
    topics, depth, marks = count(), 0, list[Mark]()
    for mark in linearize(document):
        depth += isinstance(mark, AsyncOpen) - isinstance(mark, AsyncClose)
        named = Promise(f"t{next(topics)}", 100 if depth else 500)
        marks.append(named if isinstance(mark, Promise) else mark)
    return nest(marks)


short = st.sampled_from(LOOK_ALIKES)
roomy = documents(2, short, size=3).map(_keeps)


def _unsynced(document: Document) -> Document:
    """Without syncs: one that has nothing to wait for is left out by the grammar."""
    return nest(mark for mark in linearize(document) if not isinstance(mark, Sync))


def _told(transcript: Transcript) -> tuple[str, str, int, int]:
    return transcript.text, transcript.annotated, transcript.tokens, transcript.critical_path


@settings(max_examples=100)
@given(documents(), schedules, st.integers(1, 4), st.booleans())
def test_a_response_does_not_depend_on_its_schedule(
    document: Document, schedule: Schedule, places: int, prepared: bool
) -> None:
    """Whatever caps and refusals the budgets bring: they are the same under every schedule."""
    limits = Limits(max_depth=2, max_promises=3)
    ((expected, _),) = _play([document], limits=limits, max_tokens=400, prepared=prepared)
    limits = Limits(max_depth=2, max_promises=3, max_threads=places)
    ((other, _),) = _play([document], limits=limits, max_tokens=400, prepared=prepared, schedule=schedule)
    assert _told(other) == _told(expected)


@settings(max_examples=100)
@given(st.lists(documents(), min_size=1, max_size=4), schedules, st.integers(1, 3))
def test_a_response_does_not_depend_on_its_company(scripts: list[Document], schedule: Schedule, most: int) -> None:
    alone = [_told(_play([script], max_tokens=300)[0][0]) for script in scripts]
    together = _play(scripts, max_tokens=300, schedule=schedule, max_num_seqs=most)
    assert [_told(transcript) for transcript, _ in together] == alone


@settings(max_examples=100)
@given(roomy, schedules)
@example((Promise("t1", 500), Async((Promise("t10", 100), Async(())))), _lockstep)
@example((Promise("t1", 500), Async(()), Promise("t10", 500), Async(())), _lockstep)
def test_a_script_with_room_is_played_as_written(document: Document, schedule: Schedule) -> None:
    ((transcript, _),) = _play([document], schedule=schedule)
    assert transcript.text == strip(as_decoded(document))
    assert _unsynced(nest(transcript.marks())) == _unsynced(as_decoded(document))


@settings(max_examples=100)
@given(documents(), schedules, st.integers(1, 400), st.sampled_from([None, "a", "<", "sync"]))
def test_a_trace_tells_the_same_again(
    document: Document, schedule: Schedule, max_tokens: int, stop: str | None
) -> None:
    ((live, events),) = _play([document], schedule=schedule, max_tokens=max_tokens, stop=stop)
    lines = [to_json(event) for event in events]
    replayed = Transcript(map(from_json, lines))
    assert summary(replayed) == summary(live)
    assert [getattr(replayed, f) for f in figures] == [getattr(live, f) for f in figures]
    assert [*linear_tokens(replayed)] == [*linear_tokens(live)]
    assert replayed.scored() == live.scored()
    assert segments(replayed) == segments(live)


@settings(max_examples=100)
@given(roomy)
def test_tags_off_writes_the_reader_text_and_nothing_else(document: Document) -> None:
    ((transcript, events),) = _play([document], parallelism=0.0)
    assert transcript.text == strip(document)
    assert nest(transcript.marks()) == normalize([Text(strip(document))])
    assert list(transcript.threads) == [()]
    assert transcript.parallelism == 1.0


@settings(max_examples=100)
@given(roomy, st.sampled_from(["a", "<", "sync", "\\", "promise"]))
def test_a_stop_string_cuts_the_text_where_it_begins(document: Document, stop: str) -> None:
    ((transcript, events),) = _play([document], stop=stop)
    text, found, _ = strip(as_decoded(document)).partition(stop)
    assert transcript.text == text
    assert transcript.finish_reason == "stop"
    ends = [event for event in events if isinstance(event, Finished)]
    assert [event.cut for event in ends if event.cut is not None] == ([len(text)] if found else [])


def _oracle(events: Sequence[Event]) -> int:
    """The critical path, from each thread's tokens one by one."""
    depth: dict[Path, int] = {(): 0}
    for event in events:
        if event.path not in depth:
            depth[event.path] = depth[event.path[:-1]]
        if isinstance(event, Joined):
            depth[event.path] = max([depth[event.path], *(depth[c] for c in event.children)])
        depth[event.path] += len(event.forced) + isinstance(event, Decoded)
    return max(depth.values())


@settings(max_examples=100)
@given(documents(), st.booleans())
def test_unbounded_lockstep_takes_no_more_steps_than_the_critical_path(document: Document, prepared: bool) -> None:
    """A forced token costs no step of its own, so steps may be fewer, never more."""
    ((transcript, events),) = _play([document], prepared=prepared, max_tokens=400)
    assert transcript.critical_path == _oracle(events)
    assert transcript.steps <= transcript.critical_path <= transcript.tokens


@pytest.mark.parametrize("line", ["", '{"kind":"decoded"}', "text"])
def test_a_trace_with_junk_in_it_is_refused(line: str) -> None:
    with pytest.raises(DataError):
        Transcript(from_json(each) for each in [line])


def test_an_empty_trace_is_an_empty_response() -> None:
    transcript = Transcript()
    assert (transcript.text, transcript.annotated, transcript.settled) == ("", "", "")
    assert [*linear_tokens(transcript)] == []
    assert transcript.scored() == []
    assert segments(transcript) == []
    assert not transcript.finished
    assert render(nest(transcript.marks())) == ""
    summary(transcript)
