"""Drafts from Python: names and references go through every way of asking, and change no answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm import LLM, SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.engines.batching import BatchingEngine
from pastalm.engines.drafts.base import LONGEST, tail_of
from pastalm.engines.drafts.budget import StepCosts
from pastalm.engines.drafts.ngrams import RECENT, NGrams, vote
from tests.server.serving import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=60, parallelism=0, drafts="off")
MESSAGES = [{"role": "user", "content": "Five tips"}]


def generated(llm: LLM, params: SamplingParams) -> Transcript:
    return llm.generate("Five tips", params)[0].outputs[0].transcript


def chatted(llm: LLM, params: SamplingParams) -> Transcript:
    return llm.chat(MESSAGES, params)[0].outputs[0].transcript


def streamed(llm: LLM, params: SamplingParams) -> Transcript:
    response = llm.stream(MESSAGES, params)
    events = list(response)
    told = Transcript(events)
    assert (told.passes, told.drafted, told.accepted) == (
        response.transcript.passes,
        response.transcript.drafted,
        response.transcript.accepted,
    )
    return response.transcript


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """On an engine whose further rows cost next to nothing."""
    with tiny() as here:
        assert isinstance(here.driver.engine, BatchingEngine)
        here.driver.engine._drafting.costs = StepCosts(lambda rows: 1 + rows * 1e-6)
        yield here


@pytest.mark.parametrize("ask", [generated, chatted, streamed])
def test_references_are_drafted_from(llm: LLM, ask: Callable[[LLM, SamplingParams], Transcript]) -> None:
    off = ask(llm, GREEDY)
    assert off.passes == off.steps and not off.drafted and off.tokens_per_pass == off.tokens / off.steps
    for texts in ([off.text], ("Not this.", off.text)):
        on = ask(llm, replace(GREEDY, drafts="references", references=texts))
        assert on.text == off.text and on.tokens == off.tokens
        assert set(on.accepted) == {"references"} and on.accepted["references"] <= on.drafted["references"]
        assert on.passes == on.steps - on.accepted.total() and on.tokens_per_pass > off.tokens_per_pass
    assert not ask(llm, replace(GREEDY, references=[off.text])).drafted, "drafts are off"
    assert "references" not in ask(llm, replace(GREEDY, drafts="auto")).drafted, "there are none"


def test_an_engine_says_whether_it_has_drafts(llm: LLM) -> None:
    from pastalm.engines import scripted
    from pastalm.engines.transformers import engine

    assert llm.driver.engine.capabilities.drafts and "; drafts" in str(engine.CAPABILITIES)
    assert not scripted.CAPABILITIES.drafts and "drafts" not in str(scripted.CAPABILITIES)


def test_measured_passes_say_what_rows_cost() -> None:
    costs = StepCosts()
    usual = [costs.of(rows) for rows in range(1, costs.most + 1)]
    costs.begin({1: 0.010, 4: 0.010, 8: 0.012, 16: 0.024})
    assert [costs.of(rows) for rows in (1, 2, 4, 6, 8, 12, 16)] == pytest.approx([1, 1, 1, 1.1, 1.2, 1.8, 2.4])
    assert costs.of(32) == pytest.approx(2.4 + 16 * 0.15), "as the last two go on"
    assert costs.least(1, 1) < 0.1 < costs.least(8, 1)
    unmeasured = StepCosts()
    unmeasured.begin({1: 0.01})
    assert [unmeasured.of(rows) for rows in range(1, costs.most + 1)] == usual


def test_a_number_of_rows_that_seemed_too_dear_is_believed_no_longer_than_its_neighbours() -> None:
    """A wrong measurement at the start. Passes of 6, 7 and 9 rows are made, none of 8."""
    costs = StepCosts()
    costs.begin({1: 0.010, 4: 0.012, 8: 0.040, 16: 0.020})
    wrong = costs.of(8)
    for _ in range(500):
        for rows in (1, 6, 7, 9):
            costs.note(rows, 0.010 * (1 + 0.05 * (rows - 1)))
    assert wrong > 3
    assert costs.of(8) == pytest.approx(1.35, rel=0.1)


def test_what_delays_some_passes_hardly_changes_costs() -> None:
    """One pass of 8 rows in four takes three times as long: what is kept stays near the others."""
    costs = StepCosts()
    costs.begin({1: 0.010, 4: 0.0115, 8: 0.0135, 16: 0.0175})
    for number in range(2000):
        rows = (1, 2, 4, 8)[number % 4]
        costs.note(rows, 0.010 * (1 + 0.05 * (rows - 1)) * (3 if rows == 8 and number % 16 == 3 else 1))
    assert costs.of(8) == pytest.approx(1.35, rel=0.08)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=6), st.integers(0, 2**40))
def test_a_guess_is_what_followed_the_longest_match(written: list[int], last: list[int], seen: int) -> None:
    """Against a search through all that was written, also where a table is asked again after it has grown."""
    ngrams, tail = NGrams(), tail_of(last)
    for begin, end in ((0, len(written) // 2), (len(written) // 2, len(written))):
        for i in range(begin, end):
            ngrams.add(tail_of(written[:i]), written[i], i)
        known = written[:end]
        for counts in (None, lambda place: seen >> place & 1):
            expected = None
            for n in range(min(LONGEST, len(last)), 0, -1):
                places = [i for i in range(n, len(known)) if known[i - n : i] == last[-n:]][-RECENT:]
                tokens = [known[i] for i in places if counts is None or counts(i)]
                if tokens:
                    expected = vote(n, tokens)
                    break
            assert ngrams.guess(tail, counts) == expected
