"""Drafts change nothing: the same text, tokens, log-probabilities and events of every thread with and without them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pastalm.core.driver import Driver, Response
from pastalm.core.events import Blocked, Decoded, Event, Finished, Path
from pastalm.core.interpreter import Limits
from pastalm.core.layout import Policy
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.batching import BatchingEngine
from pastalm.engines.drafts import drafting
from pastalm.engines.drafts.base import Context, Evidence, SilentDrafter
from pastalm.engines.drafts.budget import StepCosts
from pastalm.engines.native import library
from pastalm.engines.native.engine import NativeEngine
from pastalm.engines.native.model import NativeModel
from pastalm.engines.processors.base import LogitRow, ThreadProcessor, Visible
from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.models import packed_models
from tests.engines.test_batching import HashingEngine
from tests.laws.tiny import SIZE, TAGS, tiny_model, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
FREE = StepCosts(lambda rows: 1 + rows * 1e-6)
"""Rows that cost next to nothing: every guess is fed."""
Threads = dict[Path, list[int]]
Guessing = Callable[[Path, int], int | None]
"""A guess by thread and index of the token in it."""


class Scripted(SilentDrafter):
    """A drafter that guesses what a test wants."""

    name = "lookup"

    def __init__(self, guessing: Guessing) -> None:
        self._guessing = guessing

    def guess(self, context: Context) -> tuple[int, Evidence] | None:
        token = self._guessing(context.path, context.index)
        return None if token is None else (token, (6, 4))


def right(record: Threads) -> Guessing:
    """What the thread will say."""
    return lambda path, index: record[path][index] if index < len(record.get(path, ())) else None


def wrong(record: Threads) -> Guessing:
    """Never what the thread will say."""
    oracle = right(record)
    return lambda path, index: None if (token := oracle(path, index)) is None else (token + 1) % SIZE


def mixed(record: Threads) -> Guessing:
    """Right for some tokens, wrong for some, silent at others."""
    kinds = (right(record), right(record), wrong(record), lambda path, index: None)
    return lambda path, index: kinds[random.Random(str((path, index))).randrange(4)](path, index)


def tags(record: Threads) -> Guessing:
    """Tags, everywhere."""
    every = sorted(TAGS)
    return lambda path, index: every[(index + len(path)) % len(every)]


DRAFTERS: dict[str, Callable[[Threads], Guessing]] = {"right": right, "wrong": wrong, "mixed": mixed, "tags": tags}


def plain(events: Sequence[Event]) -> dict[Path, list[Event]]:
    """The events of each thread, without when they came and who guessed them. Whether a thread has to wait for others
    depends on when these end, so that is left out."""
    by_path: dict[Path, list[Event]] = {}
    for event in events:
        if isinstance(event, Blocked):
            continue
        marks: dict[str, Any] = {"step": 0, "time": 0.0}
        if isinstance(event, Decoded):
            marks |= {"drafter": "", "drafted": ()}
        by_path.setdefault(event.path, []).append(replace(event, **marks))
    return by_path


def threads(engine: BatchingEngine, run: Callable[[], list[Response]]) -> tuple[list[Response], dict[str, Threads]]:
    """The responses of a run, and all tokens of every thread as they were placed, by request."""
    tokens: dict[str, Threads] = {}
    lay = engine._lay

    def noted(state: Any, thread: Any, event: Event) -> None:
        placed = (event.token, *event.forced) if isinstance(event, Decoded) else event.forced
        tokens.setdefault(state.request.id, {}).setdefault(event.path, []).extend(placed)
        lay(state, thread, event)

    engine._lay = noted  # type: ignore[method-assign]
    try:
        return run(), tokens
    finally:
        engine._lay = lay  # type: ignore[method-assign]


def decode(
    engine: BatchingEngine, params: Sequence[SamplingParams], policy: Policy, limits: Limits, drop: int = -1
) -> list[Response]:
    """Responses to a few prompts, all at once. drop: a response that is cancelled after its first steps."""
    driver = Driver(engine, VOCABULARY, limits=limits)
    responses = [
        driver.submit([7 + i, 8, 9, 7 + i, 8], each, seed=3, choice=i, positions=policy)
        for i, each in enumerate(params)
    ]
    for _ in range(9):
        if drop >= 0 and driver.running:
            driver.step()
    if drop >= 0:
        responses[drop].cancel()
    while driver.running:
        driver.step()
    return responses


def compare(
    engine: BatchingEngine,
    monkeypatch: pytest.MonkeyPatch,
    *,
    drafter: str,
    params: SamplingParams,
    policy: Policy = "promised",
    requests: int = 3,
    max_threads: int = 16,
    drop: int = -1,
) -> int:
    """Decodes without drafts, then with; how many guesses came true."""
    limits = Limits(max_threads=max_threads, max_promises=4)
    every = [params] * requests
    off, tokens = threads(
        engine, lambda: decode(engine, [replace(each, drafts="off") for each in every], policy, limits)
    )
    record = {response.request.choice: tokens[response.request.id] for response in off}
    made = lambda request, *_: Scripted(DRAFTERS[drafter](record[request.choice]))  # noqa: E731
    monkeypatch.setitem(drafting.MAKERS, "lookup", made)
    engine._drafting.costs = FREE
    on, drafted = threads(
        engine, lambda: decode(engine, [replace(each, drafts="lookup") for each in every], policy, limits, drop)
    )
    assert not engine.has_unfinished()
    accepted = 0
    for i, (before, after) in enumerate(zip(off, on, strict=True)):
        expected, events = plain(before.take()), plain(taken := after.take())
        accepted += sum(bool(event.drafter) for event in taken if isinstance(event, Decoded))
        if i == drop:
            for path, own in events.items():
                whole = own[:-1] if isinstance(own[-1], Finished) else own
                assert whole == expected[path][: len(whole)]
        elif max_threads < 16:
            assert after.transcript.text == before.transcript.text
            assert drafted[after.request.id] == record[i]
        else:
            assert events == expected
            assert after.transcript.text == before.transcript.text
    return accepted


class ByHistory(ThreadProcessor):
    """Adds to the logits by a hash of all that its thread sees, in order, and of all that it was told."""

    def __init__(self, told: tuple[Any, ...] = ()) -> None:
        self.told = told

    def begin(self, request: Request) -> ByHistory:
        return ByHistory()

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        added = np.random.default_rng(zlib.crc32(str((list(visible), self.told)).encode())).standard_normal(len(logits))
        self.told += ("called",)
        return logits + added.astype(logits.dtype)

    def fork(self, path: Path) -> ByHistory:
        return ByHistory((*self.told, path))

    def write(self, token: int, *, tag: bool, forced: bool) -> None:
        self.told += (token, tag, forced)

    def join(self, children: Sequence[ByHistory]) -> None:
        self.told += tuple(child.told for child in children)


PARAMS = SamplingParams(max_tokens=60, logprobs=2, parallelism=60.0, ignore_eos=True)
SAMPLED = st.builds(
    replace,
    st.just(PARAMS),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    processors=st.sampled_from([None, (ByHistory(),)]),
    logit_bias=st.just({TAGS.sync: 3.0, TAGS.tokens: 4.0, TAGS.promise_end: 4.0, TAGS.async_close: 3.0}),
)


@given(
    params=SAMPLED,
    drafter=st.sampled_from(sorted(DRAFTERS)),
    policy=st.sampled_from(["promised", "overlap"]),
    page=st.sampled_from([1, 16]),
    spare=st.sampled_from([0, 3, 500]),
    max_threads=st.sampled_from([2, 16]),
    drop=st.sampled_from([-1, 0, 1]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_drafter_changes_nothing(
    params: SamplingParams,
    drafter: str,
    policy: Policy,
    page: int,
    spare: int,
    max_threads: int,
    drop: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an engine whose logits are a hash of all that a token sees, also where its places are nearly all taken."""
    engine = HashingEngine(page=page, places=5 + params.max_tokens + 20 + spare)
    accepted = compare(
        engine, monkeypatch, drafter=drafter, params=params, policy=policy, max_threads=max_threads, drop=drop
    )
    assert accepted or drafter != "right"
    assert not accepted or drafter != "wrong"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", sorted(DRAFTERS))
@pytest.mark.parametrize("graphs", [False, True], ids=["", "fixed shapes"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_on_transformers_in_float64(
    name: str, graphs: bool, drafter: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    assert model.dtype == torch.float64
    engine = TransformersEngine(model, max_num_seqs=2, max_model_len=256, graphs=graphs)
    params = replace(PARAMS, temperature=temperature, logprobs=None)
    accepted = compare(engine, monkeypatch, drafter=drafter, params=params)
    assert accepted > 20 or drafter != "right"


@pytest.fixture
def native() -> Iterator[Callable[[str, str], NativeEngine]]:
    if reason := library.unavailable():
        pytest.skip(reason)
    made: list[NativeEngine] = []

    def make(kind: str, cache_type: str) -> NativeEngine:
        model = NativeModel(*packed_models.from_model(tiny_model("llama", dtype=torch.float32), kind), threads=2)  # type: ignore[arg-type]
        made.append(NativeEngine(model, max_num_seqs=2, max_model_len=256, cache_type=cache_type))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", sorted(DRAFTERS))
@pytest.mark.parametrize(("kind", "cache_type"), [("F32", "F32"), ("Q8_0", "BF16"), ("Q4_0", "BF16")])
def test_on_the_native_engine_to_the_last_bit(
    kind: str,
    cache_type: str,
    drafter: str,
    temperature: float,
    native: Callable[[str, str], NativeEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Log-probabilities too, though weights and cache are rounded: no sum depends on what else is fed."""
    params = replace(PARAMS, temperature=temperature)
    accepted = compare(native(kind, cache_type), monkeypatch, drafter=drafter, params=params)
    assert accepted > 20 or drafter != "right"


def test_passes_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """With guesses that are always right a thread needs a pass for each run of guesses, not for each token."""
    engine = HashingEngine(page=16, places=200)
    accepted = compare(engine, monkeypatch, drafter="right", params=replace(PARAMS, parallelism=0.0), requests=1)
    assert accepted >= 0.8 * PARAMS.max_tokens
