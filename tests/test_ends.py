"""What ends an answer beside the model's own end: stop tokens, and how early an end may come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pastalm.core.driver import Driver, Response
from pastalm.core.params import SamplingParams
from pastalm.engines.scripted import EOS, Script, ScriptedEngine, byte_vocabulary
from pastalm.records.transcripts import linear_tokens

CHUNKS = (
    'Two.\n<promise topic="a" tokens="20"/><async>one x two\n</async>'
    '<promise topic="b" tokens="20"/><async>three y four\n</async><sync/>end z.'
)
TEXT = "Two.\none x two\nthree y four\nend z."


def played(script: Script, schedule: object = None, prepared: bool = True, **params: object) -> Response:
    vocabulary = byte_vocabulary(prepared)
    driver = Driver(ScriptedEngine(vocabulary, [script], schedule=schedule), vocabulary)  # type: ignore[arg-type]
    running = driver.submit([1], SamplingParams(**{"max_tokens": 400, **params}))  # type: ignore[arg-type]
    while driver.running:
        driver.step()
    assert not driver.engine.has_unfinished()
    return running


@st.composite
def schedules(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    choices = draw(st.lists(st.integers(0, 5), min_size=1, max_size=20))
    turns = iter(choices * 1000)
    return lambda live: [live[next(turns) % len(live)]] if live else []


@given(stops=st.sets(st.sampled_from("xyz.oT"), min_size=1), schedule=schedules(), prepared=st.booleans())
def test_a_stop_token_ends_the_answer_where_it_stands(stops: set[str], schedule: object, prepared: bool) -> None:
    """Wherever it is, in whichever order threads decode: the text is what stands before the first in the document."""
    running = played(CHUNKS, schedule, prepared, stop_token_ids=[ord(s) for s in stops])
    # the main thread goes on where it promised, and its own stop token ends nothing that stands before it
    assert running.transcript.text == TEXT[: min(TEXT.index(s) for s in stops)]
    assert running.transcript.finish_reason == "stop"


@given(stop=st.sampled_from("abcdef"), early=st.integers(0, 12), by_token=st.booleans())
def test_no_end_counts_before_min_tokens(stop: str, early: int, by_token: bool) -> None:
    """As in vLLM: a stop string counts that ends in a later token, and a stop token is not sampled before."""
    text = "abcdefabcdef"
    if by_token:
        running = played(text, min_tokens=early, stop_token_ids=[ord(stop)])
        assert stop not in running.transcript.text, "it is sampled neither before nor as text"
        assert len(running.transcript.text) >= early and running.transcript.finish_reason == "stop"
    else:
        running = played(text, min_tokens=early, stop=[stop])
        after = text.find(stop, early)
        assert running.transcript.text == (text[:after] if after >= 0 else text)
    assert running.transcript.tokens >= early


@given(early=st.integers(0, 40), schedule=schedules(), prepared=st.booleans())
def test_the_end_is_not_sampled_before_min_tokens(early: int, schedule: object, prepared: bool) -> None:
    script = '<promise topic="a" tokens="10"/><async>one\n</async><sync/>ok'
    running = played(script, schedule, prepared, min_tokens=early)
    same = played(script, None, prepared, min_tokens=early)
    assert running.transcript.tokens >= early
    assert running.transcript.text == same.transcript.text
    assert running.transcript.text.startswith("one\nok")


def test_a_stop_string_in_the_first_tokens_may_end_in_later_ones() -> None:
    assert played("abcdefabcdef", min_tokens=3, stop=["cd"]).transcript.text == "ab"
    assert played("abcdefabcdef", min_tokens=4, stop=["cd"]).transcript.text == "abcdefab"


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    running = played("ok", ignore_eos=True, max_tokens=20)
    assert running.transcript.tokens == 20 and running.transcript.finish_reason == "length"
    assert EOS not in [one.token for one in linear_tokens(running.transcript)]


def test_a_stop_token_ends_it_also_where_eos_is_ignored() -> None:
    running = played("abc.def", ignore_eos=True, stop_token_ids=[ord(".")])
    assert (running.transcript.text, running.transcript.finish_reason) == ("abc", "stop")
