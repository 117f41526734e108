"""What engines share, on one whose logits are a hash of all that a token sees, in memory that it writes anew."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pastalm.core.driver import Driver
from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path, SampledToken
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.base import Capabilities, Schedule
from pastalm.engines.batching import Batch, BatchingEngine, RequestState, Thread
from pastalm.engines.mask_rows import mask_row
from pastalm.engines.processors.penalty import RepetitionPenalty
from pastalm.engines.sampling import Draw
from pastalm.errors import RequestError
from tests.laws.oracle import Linear
from tests.laws.script import Script, play, random_scripts
from tests.laws.test_exactness import SCHEDULES
from tests.laws.tiny import SIZE, TAGS, tiny_vocabulary

CAPABILITIES = Capabilities(
    name="hashing", weights="none", positions=("promised", "overlap"), drafts=True, max_model_len=256, max_num_seqs=2
)


def hashed(ids: Iterable[int]) -> NDArray[np.float32]:
    """Logits that hang on the ids, in whatever order."""
    return np.random.default_rng(sorted(ids)).standard_normal(SIZE).astype(np.float32)


class HashingEngine(BatchingEngine):
    """page: places of a run. places: of each request (None: as many as tokens)."""

    def __init__(
        self, *, page: int = 1, places: int | None = None, schedule: Schedule | None = None, **options: int
    ) -> None:
        super().__init__(CAPABILITIES, vocabulary_size=SIZE, schedule=schedule, **options)
        self.pieces: list[int] = []
        self._page = page
        self._places = places
        self._logits = np.zeros((256, SIZE), dtype=np.float32)
        self._cells: dict[str, NDArray[np.int64]] = {}
        self.forwards = 0

    def _room(self, request: Request) -> int:
        return self._places or super()._room(request)

    def _place(self, state: RequestState) -> bool:
        self._logits[:] = np.nan
        self._cells[state.request.id] = np.full(len(state.tokens), -1)
        return len(self._running) < self.capabilities.max_num_seqs

    def _prefill(self, state: RequestState, stop: int, logits: bool) -> NDArray[np.float32] | None:
        assert state.cached < stop <= len(state.prompt)
        self.pieces.append(stop - state.cached)
        self._cells[state.request.id][:stop] = state.prompt[:stop]
        return hashed(state.prompt.tolist()) if logits else None

    def _leave(self, state: RequestState) -> None:
        pass

    def _forward(self, batch: Batch, keep: list[int]) -> NDArray[np.float32]:
        self._logits[:] = np.nan
        self.forwards += 1
        fed = [(self._cells[state.request.id], token) for state, due in batch for token in due]
        for cells, token in fed:
            cells[token.place] = token.token
        for row, i in enumerate(keep):
            cells, token = fed[i]
            self._logits[row] = hashed(cells[mask_row(token.sees, len(cells))].tolist())
        return self._logits[: len(keep)]

    def forget(self) -> None:
        pass


def wrong(script: Script) -> int:
    """Of the tokens that a script sampled, how many had other logits than what they see gives."""
    linear = Linear(script.prompt, script.record, script.policy)
    ids, visible = linear.tokens, linear.visible
    assert len(script.logits) > 10
    return sum(
        logits.numpy().tolist() != hashed(ids[visible[linear.place[at]]].tolist()).tolist()
        for at, logits in script.logits.items()
    )


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_thread_is_sampled_from_the_logits_of_what_it_sees(schedule: str, page: int) -> None:
    """Also where its logits were computed steps ago, and that memory has been written since."""
    engine = HashingEngine(page=page, places=400, schedule=SCHEDULES[schedule]())
    scripts = random_scripts(3, "promised", 4)
    play(engine, scripts)  # type: ignore[arg-type]
    assert [wrong(script) for script in scripts] == [0] * 4


def request(name: str, *, prompt: int = 5, most: int = 20, penalty: float = 1.0) -> Request:
    params = SamplingParams(temperature=0, max_tokens=most, repetition_penalty=penalty, drafts="off")
    return Request(id=name, prompt_token_ids=tuple(range(1, 1 + prompt)), params=params)


def apply(engine: BatchingEngine, name: str, *events: Event) -> None:
    for event in events:
        engine.apply(name, event)


def paths(sampled: list[SampledToken]) -> list[tuple[str, tuple[int, ...]]]:
    return [(s.request_id, s.path) for s in sampled]


def test_threads_are_sampled_by_request_then_by_path() -> None:
    engine = HashingEngine()
    for name in ("b", "a"):
        engine.add(request(name, most=100))
        children = [Forked(path=(i,), promised=10, forced=(9,)) for i in (2, 0, 1)]
        apply(engine, name, Forked(path=()), *children)
    every = [("b", ()), ("b", (0,)), ("b", (1,)), ("b", (2,)), ("a", ()), ("a", (0,)), ("a", (1,)), ("a", (2,))]
    sampled = engine.step()
    assert paths(sampled) == every
    random.Random(0).shuffle(sampled)
    for s in sampled:
        engine.apply(s.request_id, Decoded(path=s.path, token=s.token))
    assert paths(engine.step()) == every
    assert engine.forwards == 2
    apply(engine, "b", Blocked(path=(1,)), Finished(path=(0,)), Decoded(path=(2,), token=4), Decoded(path=(), token=4))
    apply(engine, "a", *[Decoded(path=p, token=4) for p in ((), (0,), (1,), (2,))])
    left = [each for each in every if each not in (("b", (0,)), ("b", (1,)))]
    assert paths(engine.step()) == left
    apply(engine, "b", Joined(path=(1,), forced=(4,)), *[Decoded(path=p, token=4) for p in ((), (2,))])
    apply(engine, "a", *[Decoded(path=p, token=4) for p in ((), (0,), (1,), (2,))])
    assert ("b", (1,)) in paths(engine.step())


def test_the_last_thread_that_finishes_ends_the_request() -> None:
    engine = HashingEngine()
    engine.add(request("a"))
    apply(engine, "a", Forked(path=()), Forked(path=(0,), promised=10, forced=(9,)))
    engine.step()
    apply(engine, "a", Finished(path=()), Finished(path=()))
    assert engine.has_unfinished()
    apply(engine, "a", Finished(path=(0,)))
    assert not engine.has_unfinished()


def test_a_prompt_is_read_beside_those_who_decode_and_fork() -> None:
    """In pieces of the budget, whole chunks while nobody decodes; cancelled in the middle it leaves at once."""
    engine = HashingEngine(prefill_chunk=50, prefill_budget=8)
    engine.add(request("a", prompt=120))
    engine.apply("a", Forked(path=()))
    assert [paths(engine.step()) for _ in range(3)] == [[], [], [("a", ())]]
    assert engine.pieces == [50, 50, 20]
    engine.pieces.clear()
    for name in ("b", "c"):
        engine.add(request(name, prompt=20))
        engine.apply(name, Forked(path=()))
    apply(engine, "a", Decoded(path=(), token=9), Forked(path=(0,), promised=10, forced=(9,)))
    said = [paths(engine.step())]
    apply(engine, "a", *[Decoded(path=p, token=7) for _, p in said[0]])
    apply(engine, "a", Blocked(path=()), Finished(path=(0,)), Joined(path=(), children=((0,),), forced=(5,)))
    said.append(paths(engine.step()))
    assert said == [[("a", ()), ("a", (0,))], [("a", ())]] and engine.pieces == [8, 8]
    engine.cancel("b")
    apply(engine, "a", Decoded(path=(), token=9))
    assert paths(engine.step()) == [("a", ())] and engine.pieces == [8, 8, 8]
    assert list(engine._running) == ["a", "c"]
    engine.cancel("a")
    assert paths(engine.step()) == [("c", ())] and engine.pieces == [8, 8, 8, 12], "nobody decodes any more"


@pytest.mark.parametrize("bad", [{"prefill_chunk": 0}, {"prefill_budget": 0}])
def test_pieces_have_tokens(bad: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="1 or more"):
        HashingEngine(**bad)


@pytest.mark.parametrize(("page", "places"), [(1, None), (16, 512)])
def test_tokens_count_not_places(page: int, places: int | None) -> None:
    """A response may decode as many tokens as its model's length leaves, however sparsely they lie."""
    engine = HashingEngine(page=page, places=places)
    engine.add(request("a", prompt=200, most=56))
    apply(engine, "a", Forked(path=()))
    for i in range(3):
        apply(engine, "a", Forked(path=(i,), promised=10, forced=(9,)))
    engine.step()
    for i in range(53):
        apply(engine, "a", Decoded(path=((), (0,), (1,), (2,))[i % 4], token=7))
    with pytest.raises(RequestError, match="past max_model_len"):
        apply(engine, "a", Decoded(path=(), token=7))
    with pytest.raises(RequestError, match="exceed max_model_len"):
        engine.add(request("b", prompt=200, most=57))


def test_seeing_by_place_is_for_places_that_are_used() -> None:
    """What a repetition penalty counts, where places are left free between threads."""
    engine = HashingEngine(page=16, places=256)
    engine.add(request("a", prompt=3, penalty=1.3))
    apply(engine, "a", Forked(path=()), Forked(path=(0,), promised=10, forced=(50,)))
    engine.step()
    apply(engine, "a", Decoded(path=(), token=60, forced=(70,)), Decoded(path=(0,), token=61, tag=True))
    apply(engine, "a", Decoded(path=(0,), token=62))
    state = engine._running["a"]
    assert counted(state.threads[()]) == [1, 2, 3, 60]
    assert counted(state.threads[(0,)]) == [1, 2, 3, 62]
    assert state.layout.used > state.count == 8


def counted(thread: Thread) -> list[int]:
    """The ids to which a thread's repetition penalty applies."""
    (penalty,) = thread.processors
    assert isinstance(penalty, RepetitionPenalty)
    return sorted(penalty.ids.tolist())


class PenalisedEngine(HashingEngine):
    """Every request has a repetition penalty. seen: the ids that it counted for each sampled token, by request, thread
    and number. text: which tokens belong to the reader's text."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.seen: dict[tuple[str, Path, int], list[int]] = {}
        self.text: set[tuple[str, Path, int]] = set()

    def add(self, request: Request) -> None:
        super().add(replace(request, params=replace(request.params, repetition_penalty=1.3)))

    def apply(self, request_id: str, event: Event) -> None:
        if isinstance(event, Decoded) and not event.tag:
            self.text.add((request_id, event.path, self._running[request_id].threads[event.path].count))
        super().apply(request_id, event)

    def _draw(self, state: RequestState, thread: Thread) -> Draw:
        draw = super()._draw(state, thread)
        self.seen[state.request.id, thread.path, thread.count - 1] = counted(thread)
        return draw


@pytest.mark.parametrize("page", [1, 16])
def test_a_repetition_penalty_counts_the_text_that_a_thread_sees(page: int) -> None:
    """Its own, its ancestors' before the fork, and that of the chunks it has joined; the prompt; no tags."""
    engine = PenalisedEngine(page=page, places=400)
    scripts = random_scripts(5, "promised", 6)
    play(engine, scripts)  # type: ignore[arg-type]
    assert len(engine.seen) > 100
    linears = {script.id: Linear(script.prompt, script.record) for script in scripts}
    for (name, path, index), seen in engine.seen.items():
        linear = linears[name]
        row = linear.visible[linear.place[path, index]]
        expected = [
            fed.token
            for (thread, i, fed), visible in zip(linear.entries, row, strict=True)
            if visible and (i < 0 or (name, thread, i) in engine.text)
        ]
        assert seen == sorted(set(expected))


def test_without_a_penalty_nothing_is_counted() -> None:
    engine = HashingEngine()
    engine.add(request("a"))
    apply(engine, "a", Forked(path=()), Forked(path=(0,), promised=10), Decoded(path=(0,), token=7))
    assert not any(thread.processors or thread.visible for thread in engine._waiting["a"].threads.values())


def test_engines_that_need_no_torch_import_none() -> None:
    program = (
        "import importlib.util, sys; from pastalm.engines.batching import ArraySampler; ArraySampler(10)\n"
        "if importlib.util.find_spec('llama_cpp'): import pastalm.engines.llama_cpp\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class TellingEngine(HashingEngine):
    """Tells which logit is the largest, now and then."""

    def _forward(self, batch: Batch, keep: list[int]) -> NDArray[np.float32]:
        logits = super()._forward(batch, keep)
        self._likeliest = [int(row.argmax()) if int(1000 * row[0]) % 5 else -1 for row in logits]
        return logits


@pytest.mark.parametrize("drafts", ["off", "lookup,siblings"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_an_engine_tells_of_its_logits_changes_nothing(drafts: str, schedule: str) -> None:
    """Nor does it where a thread keeps its logits for steps, or has them from a guess."""
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1),
        SamplingParams(temperature=0, logprobs=1),
        SamplingParams(temperature=0, repetition_penalty=1.5),
    ]
    bias = {TAGS.sync: 3.0, TAGS.tokens: 4.0, TAGS.promise_end: 4.0, TAGS.async_close: 3.0}
    events = []
    for make in (HashingEngine, TellingEngine):
        driver = Driver(make(page=16, places=400, schedule=SCHEDULES[schedule]()), tiny_vocabulary())
        responses = [
            driver.submit(
                [7, 8, 9, 7, 8],
                replace(each, max_tokens=60, parallelism=60.0, ignore_eos=True, drafts=drafts, logit_bias=own),
                seed=i,
            )
            for i, each in enumerate(params)
            for own in (None, bias)
        ]
        driver.run(responses)
        events.append([[replace(event, time=0.0) for event in response.take()] for response in responses])
    assert events[0] == events[1]
