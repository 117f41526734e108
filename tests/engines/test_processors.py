"""Logits processors: what they are told of their thread, when they run, their names, and what they may return."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from pastalm import SamplingParams
from pastalm.core.driver import Driver
from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined
from pastalm.core.events import Path as ThreadPath
from pastalm.core.params import Request
from pastalm.engines.mask_rows import mask_row
from pastalm.engines.processors import chain
from pastalm.engines.processors.base import LogitRow, ThreadProcessor, Visible
from pastalm.engines.sampling import ArraySampler, Draw
from pastalm.engines.scripted import ScriptedEngine, byte_vocabulary
from pastalm.engines.transformers.sampling import TensorSampler
from pastalm.errors import CapabilityError, RequestError
from tests.engines.test_batching import HashingEngine
from tests.laws.script import play, random_scripts
from tests.laws.tiny import SIZE

PROMPT = (1, 2, 3)


def unchanged(visible: Visible, logits: LogitRow) -> LogitRow:
    return logits


class Log(ThreadProcessor):
    """Keeps all that it is told. told: of each thread, by path."""

    def __init__(self, path: ThreadPath = (), told: dict[ThreadPath, list[Any]] | None = None) -> None:
        self.path = path
        self.told: dict[ThreadPath, list[Any]] = {} if told is None else told
        self.told[path] = []

    def begin(self, request: Request) -> Log:
        self.request = request
        return self

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        self.told[self.path].append(list(visible))
        return logits

    def fork(self, path: ThreadPath) -> Log:
        return Log(path, self.told)

    def write(self, token: int, *, tag: bool, forced: bool) -> None:
        self.told[self.path].append((token, tag, forced))

    def join(self, children: Sequence[Log]) -> None:
        self.told[self.path].append([child.path for child in children])


def begun(*processors: Any, **params: Any) -> HashingEngine:
    """An engine with one request."""
    engine = HashingEngine(page=16, places=256)
    made = SamplingParams(temperature=0, max_tokens=60, drafts="off", processors=processors, **params)
    engine.add(Request(id="a", prompt_token_ids=PROMPT, params=made))
    engine.apply("a", Forked(path=()))
    return engine


def apply(engine: HashingEngine, *events: Event) -> None:
    for event in events:
        engine.apply("a", event)


def test_a_thread_is_told_of_its_tokens_and_of_what_it_sees() -> None:
    log = Log()
    engine = begun(log)
    engine.step()
    apply(engine, Decoded(path=(), token=60), Forked(path=(0,), promised=10, forced=(50,)))
    engine.step()
    apply(engine, Decoded(path=(0,), token=61, tag=True), Decoded(path=(), token=62), Blocked(path=()))
    engine.step()
    apply(engine, Decoded(path=(0,), token=63, forced=(64,)), Finished(path=(0,)))
    apply(engine, Joined(path=(), children=((0,),), forced=(65,)))
    engine.step()
    assert log.request.prompt_token_ids == PROMPT
    assert log.told[()] == [
        [1, 2, 3],
        (60, False, False),
        [1, 2, 3, 60],
        (62, False, False),
        [(0,)],
        (65, False, True),
        [1, 2, 3, 60, 62, 50, 61, 63, 64, 65],
    ]
    assert log.told[(0,)] == [
        (50, False, True),
        [1, 2, 3, 60, 50],
        (61, True, False),
        [1, 2, 3, 60, 50, 61],
        (63, False, False),
        (64, False, True),
    ]


class SeeingEngine(HashingEngine):
    """Every request has a processor. seen: what each thread saw, one list for each of its tokens."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.seen: dict[tuple[str, ThreadPath], list[list[int]]] = {}

    def add(self, request: Request) -> None:
        super().add(replace(request, params=replace(request.params, processors=(unchanged,))))

    def _draw(self, state: Any, thread: Any) -> Draw:
        draw = super()._draw(state, thread)
        places = np.flatnonzero(mask_row(state.layout.sees(thread.path), len(state.tokens)))
        assert draw.visible.ids.tolist() == list(draw.visible)
        assert sorted(draw.visible) == sorted(state.tokens[places].tolist())
        self.seen.setdefault((state.request.id, thread.path), []).append(list(draw.visible))
        return draw


@pytest.mark.parametrize("page", [1, 16])
def test_the_visible_ids_are_those_of_the_layout_and_grow_at_their_end(page: int) -> None:
    engine = SeeingEngine(page=page, places=400)
    play(engine, random_scripts(5, "promised", 6))  # type: ignore[arg-type]
    assert sum(map(len, engine.seen.values())) > 100 and any(len(path) > 1 for _, path in engine.seen)
    for (name, path), lists in engine.seen.items():
        for before, after in zip(lists, lists[1:], strict=False):
            assert after[: len(before)] == before
        if path and (above := engine.seen.get((name, path[:-1]))):
            assert any(lists[0][: len(seen)] == seen for seen in above)


def test_visible_ids_cost_nothing_where_nobody_reads_them() -> None:
    engine = begun(logit_bias={4: 1.0}, repetition_penalty=1.2)
    apply(engine, Forked(path=(0,), promised=10, forced=(50,)))
    assert all(thread.visible is None for thread in engine._waiting["a"].threads.values())


def test_a_token_takes_the_same_work_at_any_length() -> None:
    """Lines of the engines' code that are run for a token, with a penalty, a bias and a function of visible ids."""

    class Endless(HashingEngine):
        def _forward(self, batch: Any, keep: list[int]) -> Any:
            return np.zeros((len(keep), SIZE), dtype=np.float32)

    def late(visible: Visible, logits: LogitRow) -> LogitRow:
        logits[visible.ids[-1]] += len(visible)
        return logits

    engine = Endless(places=4000)
    engine._capacity = 4000
    params = SamplingParams(
        temperature=0, max_tokens=3000, repetition_penalty=1.2, logit_bias={3: 1.0}, processors=(late,), drafts="off"
    )
    engine.add(Request(id="a", prompt_token_ids=PROMPT, params=params, logit_bias={3: 1.0}))
    engine.apply("a", Forked(path=()))
    work = []
    lines = 0

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if "/pastalm/engines/" in frame.f_code.co_filename else None

    for i in range(1500):
        lines = 0
        sys.settrace(on_call)
        engine.step()
        engine.apply("a", Decoded(path=(), token=i % 200))
        sys.settrace(None)
        work.append(lines)
    assert max(work[-300:]) <= max(work[300:600])


def test_the_pages_example_follows_its_thread() -> None:
    page = (Path(__file__).parents[2] / "docs" / "processors.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Sentences" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    engine = begun(names["Sentences"](stop=60))
    apply(engine, Decoded(path=(), token=61), Decoded(path=(), token=62), Forked(path=(0,), promised=10, forced=(50,)))
    apply(engine, Decoded(path=(), token=60))
    threads = engine._waiting["a"].threads
    assert [threads[path].processors[0].length for path in ((), (0,))] == [0, 3]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------ what is returned


def doubled(visible: Visible, logits: LogitRow) -> Any:
    return logits.astype(np.float64) * 2


def listed(visible: Visible, logits: LogitRow) -> Any:
    return torch.from_numpy(logits) + 1


@pytest.mark.parametrize("make", [ArraySampler, lambda size: OnDevice(size)], ids=["numpy", "torch"])
def test_what_is_returned_becomes_a_row_like_the_one_given(make: Any) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    before = rows.copy()
    chains: list[Any] = [(doubled, listed), (unchanged,), ()]
    draws = [
        Draw(SamplingParams(temperature=1.0, logprobs=1), key=i, processors=tuple(map(chain.Function, each)))
        for i, each in enumerate(chains)
    ]
    sampled = make(40)(rows, draws)
    assert (rows == before).all()
    plain = make(40)(rows, [replace(draw, processors=()) for draw in draws])
    assert sampled[1:] == plain[1:]
    (wanted,) = make(40)(rows[:1] * 2 + 1, [replace(draws[0], processors=())])
    assert sampled[0].token == wanted.token


class OnDevice:
    def __init__(self, size: int) -> None:
        self.inner = TensorSampler(size)

    def __call__(self, logits: Any, draws: Sequence[Draw]) -> Any:
        return self.inner.on_device(torch.from_numpy(np.array(logits)), draws)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda visible, logits: None, "must return logits of shape"),
        (lambda visible, logits: logits[:3], "must return logits of shape"),
        (lambda visible, logits: ["x"] * len(logits), "must return logits of shape"),
        (lambda visible, logits: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_processor_that_fails_is_named(bad: Any, message: str) -> None:
    (sampled,) = begun(bad).step()
    assert re.search(f"logits processor <lambda> .*{message}", sampled.lost)


def test_a_state_needs_a_fork() -> None:
    with pytest.raises(TypeError, match="must define fork"):

        class Counting(ThreadProcessor):
            def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
                return logits

            def write(self, token: int, *, tag: bool, forced: bool) -> None:
                pass


# ------------------------------------------------------------------------------ names


class Wanting:
    """Makes one token likelier; the maker of an entry point."""

    def __init__(self, token: int = 7) -> None:
        if token < 0:
            raise ValueError("token must be 0 or more")
        self.token = token

    def begin(self, request: Request) -> ThreadProcessor:
        def wanting(visible: Visible, logits: LogitRow) -> LogitRow:
            logits[self.token] += 100
            return logits

        return chain.Function(wanting)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("wanting", f"{__name__}:Wanting", chain.GROUP)
    broken = EntryPoint("broken", "no_such_package:Made", chain.GROUP)
    monkeypatch.setattr(chain, "_installed", lambda: {"wanting": point, "broken": broken})


@pytest.mark.parametrize(
    ("given", "token"), [("wanting", 7), (("wanting", {"token": 9}), 9), (["wanting", {}], 7), (Wanting(11), 11)]
)
def test_processors_have_names_with_settings_or_are_objects(installed: None, given: Any, token: int) -> None:
    (sampled,) = begun(given).step()
    assert sampled.token == token


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("unknown", "no logits processor 'unknown': installed are broken, caad, decortl, wanting"),
        (("wanting", {"tokens": 3}), "'wanting' does not take these settings"),
        ("broken", "'broken' cannot be loaded: No module named"),
        (("wanting", {"token": -3}), "token must be 0 or more"),
    ],
)
def test_a_name_or_setting_that_is_unknown_is_refused(installed: None, given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        begun(given)


def test_a_named_processor_is_made_once_for_its_settings(installed: None) -> None:
    made = [chain.named("wanting", {"token": token}) for token in (3, 3, 4)]
    assert made[0] is made[1] is not made[2]
    assert chain.named("wanting", {"token": np.array([3, 4])[:1]}).token.tolist() == [3]


@pytest.mark.parametrize("bad", [(3,), (("wanting",),), (("wanting", 3),), ((3, {}),), "wanting", {"wanting": {}}])
def test_what_is_no_processor_is_refused(bad: Any) -> None:
    with pytest.raises(RequestError, match="processor"):
        SamplingParams(processors=bad)


def test_an_engine_without_logits_refuses_processors() -> None:
    vocabulary = byte_vocabulary()
    driver = Driver(ScriptedEngine(vocabulary, ["text"]), vocabulary)
    with pytest.raises(CapabilityError, match="leave out processors"):
        driver.submit([1], SamplingParams(processors=(unchanged,)))


def test_a_processor_knows_the_vocabulary() -> None:
    vocabulary = replace(byte_vocabulary(), size=SIZE)
    log = Log()
    driver = Driver(HashingEngine(), vocabulary)
    driver.submit(PROMPT, SamplingParams(processors=(log,)))
    assert log.request.vocabulary is vocabulary
