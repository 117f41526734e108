"""The law of the stream: for any script, schedule, thread limit and stop strings, what was sent is at every moment
a beginning of the final text, and in the end all of it; the same for log-probabilities.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pastalm import Limits, SamplingParams
from pastalm.core.driver import Driver
from pastalm.core.events import Event, Path
from pastalm.core.language import Text
from pastalm.core.transcript import Transcript
from pastalm.engines.scripted import ScriptedEngine, byte_vocabulary
from pastalm.records.documents import Document, normalize, strip
from pastalm.server.answers import Delta, ServedAnswer
from tests.strategies import documents

VOCABULARY = byte_vocabulary()
SCRIPTS = documents(pieces=st.text("ab\n é", max_size=6))


def stream(
    script: Document, stops: Sequence[str], *, seed: int, max_threads: int, max_tokens: int, parallelism: float = 1
) -> tuple[list[Delta], ServedAnswer]:
    """The deltas of an answer, step by step, under a random schedule."""
    rng = random.Random(seed)

    def schedule(live: Sequence[tuple[str, Path]]) -> Sequence[tuple[str, Path]]:
        return rng.sample(list(live), rng.randint(1, len(live))) if live else []

    engine = ScriptedEngine(VOCABULARY, [script], schedule=schedule)
    driver = Driver(engine, VOCABULARY, limits=Limits(max_threads=max_threads))
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, stop=tuple(stops), logprobs=0, parallelism=parallelism
    )
    running = driver.submit([65], params)
    answer = ServedAnswer(running.transcript, params.stop_strings)
    deltas = [answer.take(running.take())]
    while driver.running:
        driver.step()
        deltas.append(answer.take(running.take()))
    assert answer.transcript.text == running.transcript.text
    return deltas, answer


@settings(max_examples=300)
@given(
    SCRIPTS, st.lists(st.text("ab\n é", min_size=1, max_size=4), max_size=3), st.integers(0, 99),
    st.sampled_from((1, 2, 16)), st.sampled_from((20, 2000)),
)  # fmt: skip
@example((Text("ba"),), ["a", "baa"], 0, 1, 2000)  # only the end decides
@example((Text("ab\n"),), ["b", "ab\n"], 0, 1, 2000)  # the one that begins first is complete last
def test_deltas_are_the_text(script: Document, stops: list[str], seed: int, max_threads: int, max_tokens: int) -> None:
    deltas, answer = stream(script, stops, seed=seed, max_threads=max_threads, max_tokens=max_tokens)
    final, sent = answer.transcript.text, ""
    for delta in deltas:
        sent += delta.text
        assert final.startswith(sent)
    assert sent == final
    assert [each for delta in deltas for each in delta.tokens] == [*answer.transcript.scored()]
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert [event for delta in deltas for event in delta.events]
    if max_tokens == 2000 and answer.transcript.finish_reason == "stop":
        _, undisturbed = stream(script, (), seed=0, max_threads=16, max_tokens=max_tokens)
        whole = undisturbed.transcript.text
        if undisturbed.transcript.finish_reason == "stop":  # as written, but for newlines behind chunks
            assert whole.replace("\n", "") == strip(script).replace("\n", "")
        cut = min((whole.find(s) for s in stops if s in whole), default=len(whole))
        assert final == whole[:cut], "the text does not hang on the schedule"


@given(SCRIPTS, st.integers(0, 99))
def test_without_stop_strings_all_that_is_settled_is_sent(script: Document, seed: int) -> None:
    deltas, _ = stream(script, (), seed=seed, max_threads=16, max_tokens=2000)
    events: list[Event] = []
    sent = ""
    for delta in deltas:
        events += delta.events
        sent += delta.text
        assert sent == Transcript(events).settled


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=5))
def test_only_what_may_begin_a_stop_string_is_held(text: str, stop: str) -> None:
    """What is held back is a beginning of the stop string, and nothing once it cannot be one."""
    deltas, _ = stream(normalize([Text(text)]), (stop,), seed=0, max_threads=1, max_tokens=100)
    sent = written = ""
    for delta, character in zip(deltas[1:-1], text, strict=False):
        written += character
        sent += delta.text
        held = written.removeprefix(sent)
        assert stop.startswith(held) and held != stop
        assert not any(written.endswith(stop[:k]) for k in range(len(held) + 1, len(stop)))
