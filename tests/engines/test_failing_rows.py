"""What fails for one thread ends this thread alone: it is lost, with a reason, and all others go on unharmed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.core.driver import Driver, Response
from pastalm.core.events import Decoded, Event, Finished, Path, TokenSet
from pastalm.core.interpreter import Limits
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.processors.base import LogitRow, ThreadProcessor, Visible
from pastalm.engines.sampling import ArraySampler, Draw, Sampler
from pastalm.engines.transformers.sampling import TensorSampler
from pastalm.errors import EngineError
from tests.engines.test_batching import HashingEngine
from tests.laws.tiny import SIZE, TAGS, tiny_vocabulary

VOCABULARY = tiny_vocabulary()
PARAMS = SamplingParams(
    max_tokens=60,
    parallelism=60.0,
    ignore_eos=True,
    logit_bias={TAGS.sync: 3.0, TAGS.tokens: 4.0, TAGS.promise_end: 4.0, TAGS.async_close: 3.0},
)


class Failing(ThreadProcessor):
    """Fails at the n-th time that one of its methods is called for a response. counts: so far, of all threads."""

    def __init__(self, where: str, after: int, counts: dict[str, int] | None = None) -> None:
        self.where, self.after = where, after
        self.counts = {} if counts is None else counts

    def begin(self, request: Request) -> Failing:
        made = Failing(self.where, self.after)
        made._note("begin")
        return made

    def _note(self, where: str) -> None:
        self.counts[where] = self.counts.get(where, 0) + 1
        if where == self.where and self.counts[where] == self.after:
            raise KeyError("no such state")

    def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
        self._note("call")
        return logits

    def fork(self, path: Path) -> Failing:
        self._note("fork")
        return Failing(self.where, self.after, self.counts)

    def write(self, token: int, *, tag: bool, forced: bool) -> None:
        self._note("write")

    def join(self, children: Sequence[Failing]) -> None:
        assert all(isinstance(child, Failing) for child in children)
        self._note("join")


def decode(params: Sequence[SamplingParams], drafts: str) -> list[Response]:
    driver = Driver(HashingEngine(page=16, places=512), VOCABULARY, limits=Limits(max_promises=4))
    responses = [
        driver.submit([7 + i, 8, 9, 7 + i, 8], replace(each, drafts=drafts), seed=3, choice=i)
        for i, each in enumerate(params)
    ]
    while driver.running:
        driver.step()
    assert not driver.engine.has_unfinished()
    return responses


def by_thread(events: Sequence[Event]) -> dict[Path, list[Event]]:
    own: dict[Path, list[Event]] = {}
    for event in events:
        plain = replace(event, step=0, time=0.0)
        own.setdefault(event.path, []).append(
            replace(plain, drafter="", drafted=()) if isinstance(plain, Decoded) else plain
        )
    return own


@given(
    where=st.sampled_from(["call", "write", "fork", "join"]),
    after=st.sampled_from([1, 2, 3, 5, 17]),
    temperature=st.sampled_from([0.0, 1.0]),
    drafts=st.sampled_from(["off", "lookup"]),
)
@settings(max_examples=50, deadline=None)
def test_a_failing_processor_ends_its_own_thread(where: str, after: int, temperature: float, drafts: str) -> None:
    plain = replace(PARAMS, temperature=temperature)
    failing = Failing(where, after)
    before = decode([replace(plain, processors=(Failing("never", 0),)), plain, plain], drafts)
    responses = decode([replace(plain, processors=(failing,)), plain, plain], drafts)
    for without, response in zip(before[1:], responses[1:], strict=True):
        assert by_thread(response.take()) == by_thread(without.take())
        assert response.error is None and not response.transcript.why
    events, expected = by_thread(responses[0].take()), by_thread(before[0].take())
    lost = [own[-1] for own in events.values() if isinstance(own[-1], Finished) and own[-1].why]
    assert all("the logits processor Failing failed: KeyError: 'no such state'" in end.why for end in lost)
    assert all(end.reason == "abort" for end in lost)
    assert responses[0].transcript.finish_reason == ("abort" if lost else before[0].transcript.finish_reason)
    for end in lost[:1]:
        decoded = [event for event in events[end.path] if isinstance(event, Decoded)]
        assert decoded == [event for event in expected[end.path] if isinstance(event, Decoded)][: len(decoded)]


@pytest.mark.parametrize("where", ["call", "write", "fork", "join"])
def test_each_failure_is_met(where: str) -> None:
    """That the law above is about something."""
    response = decode([replace(PARAMS, temperature=0, processors=(Failing(where, 1),))], "off")[0]
    assert response.transcript.why == "the logits processor Failing failed: KeyError: 'no such state'"
    lost = [thread.path for thread in response.transcript.threads.values() if thread.why]
    assert lost == ([(0,)] if where == "fork" else [()]) or where in ("write", "call")


def test_a_processor_that_cannot_begin_is_refused_with_its_name() -> None:
    with pytest.raises(EngineError, match="the logits processor Failing failed: KeyError"):
        decode([replace(PARAMS, processors=(Failing("begin", 1),))], "off")


class OnDevice:
    def __init__(self, size: int) -> None:
        self.inner = TensorSampler(size)

    def __call__(self, logits: LogitRow, draws: Sequence[Draw]) -> object:
        return self.inner.on_device(torch.from_numpy(np.array(logits)), draws)


@pytest.mark.parametrize("sampler", [ArraySampler(SIZE), OnDevice(SIZE)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_beside_one_that_fails_are_sampled_as_alone(sampler: Sampler, temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(0).standard_normal((6, SIZE)).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_p=top_p, logprobs=2)

    def bad(visible: Visible, row: LogitRow) -> LogitRow:
        raise ValueError("bad row")

    class Bad(ThreadProcessor):
        def __call__(self, visible: Visible, logits: LogitRow) -> LogitRow:
            return bad(visible, logits)

    draws = [Draw(params, key=i) for i in range(6)]
    alone = sampler(logits, draws)
    draws[1] = replace(draws[1], processors=(Bad(),))
    draws[2] = replace(draws[2], allowed=TokenSet(frozenset({SIZE + 5})))
    draws[4] = replace(draws[4], allowed=TokenSet(frozenset(range(SIZE)), inverted=True))
    sampled = sampler(logits, draws)
    assert [s.lost for s in sampled] == [
        "",
        "the logits processor Bad failed: ValueError: bad row",
        "a thread is allowed no token of the vocabulary",
        "",
        "a thread is allowed no token of the vocabulary",
        "",
    ]
    assert [sampled[i] for i in (0, 3, 5)] == [alone[i] for i in (0, 3, 5)]
