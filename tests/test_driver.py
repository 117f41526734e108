"""Responses own their events: however they are read, cancelled and left, each reader gets exactly its own, in order."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.answering import run_tasks
from pastalm.core.driver import Driver, Response
from pastalm.core.events import Event, Finished, SampledToken
from pastalm.core.interpreter import Limits
from pastalm.core.params import SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.engines.base import Engine
from pastalm.engines.native import library
from pastalm.engines.scripted import ScriptedEngine, byte_vocabulary
from pastalm.errors import EngineError
from tests.laws.tiny import tiny_model, tiny_vocabulary
from tests.server.serving import playing

SCRIPTS = (
    'Two.\n<promise topic="a" tokens="20"/><async>one two\n</async>'
    '<promise topic="b" tokens="20"/><async>three four\n</async><sync/>end.',
    "plain",
    '<promise topic="c" tokens="10"/><async>alone\n</async>never joined, and a little more',
)
VOCABULARY = byte_vocabulary()
PARAMS = SamplingParams(temperature=0, max_tokens=200)


def scripted(most: int = 2) -> Driver:
    return Driver(ScriptedEngine(VOCABULARY, SCRIPTS, max_num_seqs=most), VOCABULARY)


def bare(events: list[Event]) -> list[tuple[object, ...]]:
    """Events without steps and times, which depend on company."""
    return [(type(e), e.path, e.forced, getattr(e, "token", None), getattr(e, "text", None)) for e in events]


def read_alone(turn: int) -> list[tuple[object, ...]]:
    """The events of a script, decoded by itself: the engine plays its scripts in turn."""
    driver = scripted()
    for _ in range(turn):
        driver.submit([1], PARAMS).cancel()
    return bare(list(driver.submit([1], PARAMS)))


ALONE = [read_alone(turn) for turn in range(len(SCRIPTS))]

ACTIONS = st.lists(st.tuples(st.sampled_from(["read"] * 12 + ["take", "cancel", "leave", "step"]), st.integers(0, 5)))


class Reader:
    """One response, and what was read of it."""

    def __init__(self, response: Response) -> None:
        self.response = response
        self.read: list[Event] = []
        self.iterator: Iterator[Event] | None = iter(response)
        self.started = self.ended_early = False

    def act(self, action: str) -> None:
        if action == "take":
            self.read += self.response.take()
        elif action == "cancel":
            self.ended_early |= not self.response.finished
            self.response.cancel()
        elif action == "leave":
            if self.started and self.iterator is not None:  # one that was never begun has nothing to leave
                self.ended_early |= not self.response.finished
                self.iterator.close()  # type: ignore[attr-defined]
                self.iterator = None
        elif self.iterator is not None:
            self.started = True
            self.read += [event for event in [next(self.iterator, None)] if event is not None]

    def finish(self) -> None:
        if self.iterator is not None:
            self.read += self.iterator
        self.read += self.response.take()


def check(readers: list[Reader], alone: list[list[tuple[object, ...]]]) -> None:
    """What was read is the whole response, or its beginning and the ends of all threads that were cancelled."""
    for reader in readers:
        reader.finish()
    for reader, expected in zip(readers, alone, strict=True):
        got = bare(reader.read)
        assert Transcript(reader.read).text == reader.response.transcript.text
        if not reader.ended_early:
            assert got == expected
            continue
        cut = next(i for i, e in enumerate(reader.read) if isinstance(e, Finished) and e.reason == "abort")
        assert got[:cut] == expected[:cut]
        assert all(isinstance(event, Finished) for event in reader.read[cut:])
        assert reader.response.finished


@given(ACTIONS, st.integers(1, 3))
def test_each_reader_gets_its_own_events_in_order(actions: list[tuple[str, int]], most: int) -> None:
    """Reads, cancels, iterations that are left, and steps of others, in any order; more responses than places."""
    driver = scripted(most)
    readers = [Reader(driver.submit([1], PARAMS)) for _ in range(6)]
    for action, which in actions:
        if action == "step":
            driver.step()
        else:
            readers[which].act(action)
    check(readers, [ALONE[i % 3] for i in range(6)])
    assert not driver.running and not driver.engine.has_unfinished()


@pytest.mark.skipif(bool(library.unavailable()), reason=library.unavailable())
@pytest.mark.parametrize("seed", range(4))
def test_on_a_real_engine_too(seed: int) -> None:
    from pastalm.engines.native.engine import NativeEngine
    from pastalm.engines.native.model import NativeModel
    from pastalm.models import packed_models

    rng = random.Random(seed)
    model = NativeModel(*packed_models.from_model(tiny_model("llama"), "F32"))
    vocabulary = tiny_vocabulary()
    engine = NativeEngine(model, max_num_seqs=2, max_model_len=256, cache_type="F32", prefill_budget=3)
    driver = Driver(engine, vocabulary, limits=Limits(max_threads=4))
    bias = {vocabulary.tags.promise: 6.0} if vocabulary.tags else {}
    # without drafts: with them a thread may be ahead of its siblings, by what passes cost in company
    params = [
        SamplingParams(temperature=1, seed=seed * 9 + i, max_tokens=90, logit_bias=bias, drafts="off") for i in range(5)
    ]
    prompts = [range(20 + i, 40 + 3 * i) for i in range(5)]
    alone = [bare(list(driver.submit(prompt, each))) for prompt, each in zip(prompts, params, strict=True)]
    readers = [Reader(driver.submit(prompt, each)) for prompt, each in zip(prompts, params, strict=True)]
    while rng.random() < 0.995:
        rng.choice(readers).act(rng.choices(("read", "take", "cancel", "leave"), (60, 4, 1, 1))[0])
    check(readers, alone)
    assert any("(0,)" in repr(events) for events in alone), "nothing forked"
    driver.close()


def test_streams_are_read_side_by_side() -> None:
    driver = scripted()
    first, second = driver.submit([1], PARAMS), driver.submit([1], PARAMS)
    pairs = list(zip(first, second, strict=False))
    assert len(pairs) == min(len(ALONE[0]), len(ALONE[1])) > 5
    assert Transcript(b for _, b in pairs).text == "plain"


def test_who_leaves_the_loop_frees_the_place() -> None:
    """With one place, the next answer does not wait for one that nobody reads any more."""
    driver = scripted(1)
    for _ in driver.submit([1], PARAMS):
        break
    assert not driver.running
    second = driver.submit([1], PARAMS)
    assert len(list(second)) == len(ALONE[1])
    with driver.submit([1], PARAMS) as third:
        next(iter(third))
    assert third.transcript.finish_reason == "abort" and not driver.running


def test_async_readers_share_the_steps() -> None:
    driver = scripted(3)

    async def read(response: Response) -> list[Event]:
        return [event async for event in response]

    async def all_of_them() -> list[list[Event]]:
        return list(await asyncio.gather(*(read(driver.submit([1], PARAMS)) for _ in range(3))))

    for got, expected in zip(asyncio.run(all_of_them()), ALONE, strict=True):
        assert bare(got) == expected


def test_an_llm_streams_to_async_code() -> None:
    llm = playing("one two three", "four")

    async def text(prompt: str) -> str:
        return Transcript([event async for event in llm.astream(prompt, PARAMS)]).text

    async def both() -> list[str]:
        return list(await asyncio.gather(text("a"), text("b")))

    assert asyncio.run(both()) == ["one two three", "four"]
    assert not llm.driver.running


def test_threads_read_side_by_side() -> None:
    driver = scripted(3)
    readers = [Reader(driver.submit([1], PARAMS)) for _ in range(6)]
    threads = [threading.Thread(target=reader.finish) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    check(readers, [ALONE[i % 3] for i in range(6)])


class Failing(ScriptedEngine):
    """Fails in its fifth step."""

    steps = 0

    def step(self) -> list[SampledToken]:
        self.steps += 1
        if self.steps == 5:
            raise EngineError("out of memory")
        return super().step()


def test_a_failed_step_reaches_every_reader() -> None:
    """After the events that came before it; the driver can be used again."""
    engine: Engine = Failing(VOCABULARY, SCRIPTS)
    driver = Driver(engine, VOCABULARY)
    first, second = driver.submit([1], PARAMS), driver.submit([1], PARAMS)
    for response in (first, second):
        events = iter(response)
        seen: list[Event] = []
        with pytest.raises(EngineError, match="out of memory"):
            seen.extend(events)
        assert response.transcript.finish_reason == "abort"
    with pytest.raises(EngineError):
        driver.run([second])
    assert driver.submit([1], PARAMS) and not first.take()


def test_tasks_are_cancelled_when_nobody_asks_on() -> None:
    driver = scripted(2)

    def task(i: int):  # type: ignore[no-untyped-def]
        response = driver.submit([1], PARAMS, keep_events=False)
        yield [response]
        return i, response.transcript.finish_reason

    running = run_tasks(driver, (task(i) for i in range(6)), 2)
    assert next(running)[1] == "stop"  # type: ignore[index]
    assert driver.running
    running.close()
    assert not driver.running
