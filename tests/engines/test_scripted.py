"""The scripted engine is an engine: it waits, cancels and refuses as the protocol says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pastalm.core.driver import Driver, Response
from pastalm.core.params import SamplingParams
from pastalm.engines.scripted import ScriptedEngine, byte_vocabulary
from pastalm.errors import LanguageError, RequestError

SCRIPT = 'Two:\n<promise topic="a" tokens="10"/><async>1. A\n</async><sync/>Done.'
VOCABULARY = byte_vocabulary()


def _driver(scripts: Sequence[str] = (SCRIPT,), most: int = 8, room: int = 500) -> Driver:
    engine = ScriptedEngine(VOCABULARY, scripts, max_num_seqs=most, max_model_len=room)
    return Driver(engine, VOCABULARY)


def _submit(driver: Driver, **params: object) -> Response:
    return driver.submit([1], SamplingParams(max_tokens=200, **params))  # type: ignore[arg-type]


def _run(driver: Driver) -> None:
    while driver.running:
        driver.step()


def test_scripts_come_in_turn() -> None:
    driver = _driver(["one", "two"])
    told = [_submit(driver) for _ in range(3)]
    _run(driver)
    assert [running.transcript.text for running in told] == ["one", "two", "one"]


def test_requests_beyond_the_rows_wait() -> None:
    driver = _driver(["first", "second"], most=1)
    first, second = _submit(driver), _submit(driver)
    while not first.transcript.finished:
        assert second.transcript.text == ""
        driver.step()
    _run(driver)
    assert second.transcript.text == "second"


def test_a_cancelled_request_leaves_the_others_alone() -> None:
    driver = _driver()
    cancelled, other = _submit(driver), _submit(driver)
    for _ in range(3):
        driver.step()
    driver.cancel(cancelled)
    assert cancelled.transcript.finish_reason == "abort"
    assert cancelled.take()
    driver.cancel(cancelled)
    assert cancelled.take() == []
    _run(driver)
    assert not driver.engine.has_unfinished()
    assert other.transcript.annotated == SCRIPT
    assert cancelled.transcript.text == SCRIPT[:3]


def test_what_can_never_be_played_is_refused() -> None:
    with pytest.raises(RequestError, match="shorten"):
        _submit(_driver(room=200))
    with pytest.raises(RequestError, match="empty"):
        _driver().submit([], SamplingParams())
    with pytest.raises(RequestError, match="script"):
        ScriptedEngine(VOCABULARY, [])
    with pytest.raises(LanguageError):
        ScriptedEngine(VOCABULARY, ["<async>"])


@pytest.mark.parametrize("asked", [None, 0, 3])
def test_scripted_tokens_are_certain(asked: int | None) -> None:
    driver = _driver()
    running = _submit(driver, logprobs=asked)
    _run(driver)
    told = [token for _, token in running.transcript.scored()]
    assert "".join(d.text for d in told) == ("" if asked is None else running.transcript.text)
    assert {d.logprob for d in told} <= {0.0}
    assert all(d.top_logprobs == (((d.token, 0.0),) if asked else ()) for d in told)
