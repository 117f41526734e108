"""The openai client's own helpers against a server of the embedded model on the native engine: what it parses is whole,
and what it puts together from a stream is the same."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from pastalm import LLM
from pastalm.models import adapters, downloads
from tests.server.serving import Served, serving

pytest.importorskip("llguidance")
pytestmark = pytest.mark.skipif(
    not (adapters.SHIPPED / downloads.EMBEDDED / "adapter_config.json").is_file(),
    reason="no adapter ships in this tree",
)


class Kind(enum.StrEnum):
    PLANT = "plant"
    ANIMAL = "animal"


class Size(BaseModel):
    """How large something is."""

    height_cm: int
    weight_kg: float


class Thing(BaseModel):
    name: str = Field(max_length=20)
    kind: Kind
    alive: bool | None
    size: Size
    colors: list[str] = Field(max_length=2)


LION: Any = [
    {"role": "user", "content": "A lion is 110 cm high, weighs 190.5 kg, and is yellow and brown. Describe it."}
]
NOTE_SIZE: Any = openai.pydantic_function_tool(Size, name="note_size")
NOTE_THING: Any = openai.pydantic_function_tool(Thing, name="note_thing", description="Writes down a thing.")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(LLM(engine="native", max_num_seqs=2, max_model_len=2048)) as here:
        yield here
        assert here.becomes_idle()


def asked(**more: Any) -> Any:
    return {"model": "played", "messages": LION, "temperature": 0, "max_tokens": 300, **more}


@pytest.mark.parametrize("parallelism", [0, 1])
def test_a_pydantic_model_is_parsed(served: Served, parallelism: float) -> None:
    body = asked(response_format=Thing, extra_body={"pasta": {"parallelism": parallelism}})
    completion = served.client.chat.completions.parse(**body)
    (choice,), (figures,) = completion.choices, completion.usage.pasta["choices"]  # type: ignore[union-attr]
    assert (figures["threads"] > len(Thing.model_fields)) == (parallelism > 0), "fields are threads"
    assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Thing)
    assert choice.message.refusal is None and choice.message.parsed.size.height_cm == 110
    with served.client.chat.completions.stream(**body) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    assert kinds.count("content.delta") > 1 and kinds.count("content.done") == 1
    assert streamed.message.parsed == choice.message.parsed


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "note_size"}}])
def test_a_call_is_parsed_and_its_result_is_answered(served: Served, choice: Any) -> None:
    body = asked(tools=[NOTE_SIZE, NOTE_THING], tool_choice=choice)
    (whole,) = served.client.chat.completions.parse(**body).choices
    assert whole.finish_reason == "tool_calls" and whole.message.content is None and whole.message.tool_calls
    (call,) = whole.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Size | Thing)
    with served.client.chat.completions.stream(**body) as stream:
        events = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert len(events) > 1 and "".join(event.arguments_delta for event in events) == call.function.arguments
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is written down."}
    earlier = {**whole.message.to_dict(), "content": None}
    earlier["tool_calls"] = [{**c, "function": {k: v for k, v in c["function"].items() if k != "parsed_arguments"}}
                             for c in earlier["tool_calls"]]  # type: ignore[attr-defined]  # fmt: skip
    answer = served.client.chat.completions.create(**asked(messages=[*LION, earlier, result], max_tokens=16))
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_a_call_that_is_free_is_a_call_or_a_text(served: Served) -> None:
    (whole,) = served.client.chat.completions.create(**asked(tools=[NOTE_SIZE], max_tokens=40)).choices
    assert bool(whole.message.content) != bool(whole.message.tool_calls)
