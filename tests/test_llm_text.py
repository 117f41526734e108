"""Python's own entry points: what is no text, or no prompt at all, is one clear RequestError."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.core.params import SamplingParams
from pastalm.errors import RequestError, check_text
from pastalm.llm import LLM
from tests.server.serving import tiny

HALVES = ("caf\udce9", "a \ud83d b", "\udf5d")
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny()


def said_in_one_line(call: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", HALVES)
def test_half_a_character_is_refused_wherever_text_enters(llm: LLM, text: str) -> None:
    user = {"role": "user", "content": "hello"}
    calls = (
        lambda: llm.generate(text, GREEDY),
        lambda: llm.generate(["hello", text], GREEDY),
        lambda: llm.stream(text, GREEDY),
        lambda: llm.chat([{"role": "user", "content": text}], GREEDY),
        lambda: llm.chat([{"role": "system", "content": text}, user], GREEDY),
        lambda: llm.chat([{"role": text, "content": "x"}, user], GREEDY),
        lambda: llm.chat([[user], [{**user, "name": text}]], GREEDY),
        lambda: llm.stream([{"role": "user", "content": text}], GREEDY),
        lambda: llm.encode(text, GREEDY),
        lambda: SamplingParams(stop=text),
        lambda: SamplingParams(stop=["x", text]),
    )
    for call in calls:
        assert "at character" in said_in_one_line(call)
    assert not llm.driver.running, "a prompt beside a bad one is not left behind"
    assert llm.generate("hello", GREEDY)[0].outputs[0].finish_reason


@pytest.mark.parametrize("prompt", [None, 5, b"bytes", ["a", 1], [1, "a"], [None], {"role": "user"}])
def test_what_is_no_prompt_is_a_request_error(llm: LLM, prompt: Any) -> None:
    said_in_one_line(lambda: llm.generate(prompt, GREEDY))
    said_in_one_line(lambda: llm.stream(prompt, GREEDY))


@pytest.mark.parametrize("messages", ["hello", b"x", [], None, [None], [[]], [5], {"role": "user", "content": "x"}])
def test_what_is_no_conversation_is_a_request_error(llm: LLM, messages: Any) -> None:
    said_in_one_line(lambda: llm.chat(messages, GREEDY))


@pytest.mark.parametrize("stop", [[5], [None], [b"x"]])
def test_a_stop_that_is_no_text(stop: Any) -> None:
    said_in_one_line(lambda: SamplingParams(stop=stop))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bias_that_is_no_number(value: float) -> None:
    said_in_one_line(lambda: SamplingParams(logit_bias={3: value}))


@given(st.text(st.characters(exclude_categories=()), max_size=6))
def test_text_is_what_can_be_written(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        assert f"at character {error.start}" in said_in_one_line(lambda: check_text(text, "it"))
    else:
        check_text(text, "it")
