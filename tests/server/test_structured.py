"""Answers whose form is given: `response_format`, tools, and what a client gets of them, whole and streamed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pastalm.server.calls import CallReader
from pastalm.server.structured import JsonSchema
from tests.server.serving import HELLO, TIPS_TEXT, Served, curl, events_of, joined, playing, serving, tiny

pytest.importorskip("llguidance")

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
WORD = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 3}},
    "required": ["word"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {"messages": HELLO, "max_tokens": 200, "seed": 1}


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def tool(name: str = "move", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": POINT, **more}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(tiny(max_model_len=2048, native=True)) as here:
        yield here
        assert here.becomes_idle()


def post(served: Served, body: dict[str, Any], path: str = "chat/completions") -> Any:
    status, _, reply = curl(f"{served.url}/v1/{path}", body)
    assert status == 200, reply
    return reply


def fits_point(text: str) -> bool:
    value = json.loads(text)
    return list(value) == ["x", "on"] and 0 <= value["x"] <= 99 and isinstance(value["on"], bool)


# ------------------------------------------------------------------------------ response_format


@pytest.mark.parametrize("parallelism", [0, 1])
@pytest.mark.parametrize(
    "form",
    [
        {"response_format": json_schema(POINT)},
        {"response_format": json_schema(POINT, strict=True, description="A point.")},
        {"structured_outputs": {"json": POINT}},
        {"structured_outputs": {"json": json.dumps(POINT), "disable_any_whitespace": True}},
    ],
)
def test_an_answer_fits_its_schema(served: Served, form: dict[str, Any], parallelism: float) -> None:
    body = {**CHAT, **form, "n": 2, "pasta": {"parallelism": parallelism}}
    choices = post(served, body)["choices"]
    assert all(fits_point(choice["message"]["content"]) for choice in choices) and len(choices) == 2
    assert all(choice["finish_reason"] == "stop" and choice["message"]["refusal"] is None for choice in choices)
    streamed = events_of(curl(f"{served.url}/v1/chat/completions", {**body, "stream": True})[2])
    assert [joined(streamed, i) for i in (0, 1)] == [choice["message"]["content"] for choice in choices]


def test_any_object_is_an_object(served: Served) -> None:
    bias = {"response_format": {"type": "json_object"}, "max_tokens": 60}
    for seed in range(4):
        (choice,) = post(served, {**CHAT, **bias, "seed": seed})["choices"]
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_a_completion_has_a_form_too(served: Served) -> None:
    body = {"prompt": "A point: ", "max_tokens": 200, "response_format": json_schema(POINT), "seed": 1}
    (choice,) = post(served, body, "completions")["choices"]
    assert fits_point(choice["text"])
    (choice,) = post(served, {**body, "echo": True}, "completions")["choices"]
    assert fits_point(choice["text"].removeprefix("A point: "))


def test_a_field_waits_for_those_that_it_needs(served: Served) -> None:
    waited: list[bool] = []
    for depends in ({}, {"depends": {"x": ["on"]}}):
        body = {**CHAT, "response_format": json_schema(POINT), "stream": True, "pasta": {"events": True, **depends}}
        chunks = events_of(curl(f"{served.url}/v1/chat/completions", body)[2])
        assert fits_point(joined(chunks))
        events = [(e["kind"], e["path"]) for c in chunks for e in c.get("pasta", {}).get("events", [])]
        waited.append(events.index(("decoded", [0])) > events.index(("finished", [1])))
    assert waited == [False, True]


def test_text_is_text() -> None:
    with serving(playing()) as here:
        for form in ({"type": "text"}, None):
            (choice,) = post(here, {**CHAT, "max_tokens": 400, "response_format": form})["choices"]
            assert choice["message"]["content"] == TIPS_TEXT
        error = curl(f"{here.url}/v1/chat/completions", {**CHAT, "response_format": json_schema(POINT)})[2]["error"]
        assert error["param"] == "response_format" and "scripted engine" in error["message"]


class Story(BaseModel):
    story: str


def test_a_limit_that_is_reached_leaves_json(served: Served) -> None:
    """The client is told that the answer was cut short, and its text is JSON that fits all the same."""
    body: Any = {"model": "played", "messages": HELLO, "max_tokens": 90, "seed": 1, "response_format": Story}
    with pytest.raises(openai.LengthFinishReasonError) as caught:
        served.client.chat.completions.parse(**body)
    (choice,) = caught.value.completion.choices
    assert choice.finish_reason == "length" and Story.model_validate_json(choice.message.content or "").story


# ------------------------------------------------------------------------------ tools


def calls_of(chunks: list[Any], index: int = 0) -> tuple[dict[str, Any], str]:
    """The beginning of a streamed call, and its arguments, put together as the openai package's users do."""
    deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    assert calls and {call["index"] for call in calls} == {0}
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in calls[1:])
    return calls[0], "".join(call["function"]["arguments"] for call in calls)


@pytest.mark.parametrize("parallelism", [0, 1])
@pytest.mark.parametrize("choice", ["required", named("move"), named("none")])
def test_a_call_is_a_call(served: Served, choice: Any, parallelism: float) -> None:
    tools = [tool("move", description="Moves."), tool("none"), {**tool("stay"), "function": {"name": "stay"}}]
    body = {**CHAT, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "n": 2}
    body["pasta"] = {"parallelism": parallelism}
    whole = post(served, body)["choices"]
    chunks = events_of(curl(f"{served.url}/v1/chat/completions", {**body, "stream": True})[2])
    for i, each in enumerate(whole):
        message = each["message"]
        assert message["content"] is None and message["refusal"] is None and each["finish_reason"] == "tool_calls"
        (call,) = message["tool_calls"]
        assert call["type"] == "function" and call["id"].startswith("call_")
        wanted = ["move", "none", "stay"] if choice == "required" else [choice["function"]["name"]]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        assert name in wanted and (fits_point(arguments) if name != "stay" else json.loads(arguments) == {})
        first, streamed = calls_of(chunks, i)
        assert (first["type"], first["function"]) == ("function", {"name": name, "arguments": ""})
        assert streamed == arguments
        reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["index"] == i]
        assert reasons[-1] == "tool_calls" and not any(reasons[:-1])


def test_an_answer_may_be_text_where_a_call_is_free(served: Served) -> None:
    body = {**CHAT, "tools": [tool()], "max_tokens": 60, "temperature": 0}
    (choice,) = post(served, body)["choices"]
    assert choice["finish_reason"] in ("stop", "length") and choice["message"]["content"]
    assert "tool_calls" not in choice["message"]
    streamed = events_of(curl(f"{served.url}/v1/chat/completions", {**body, "stream": True})[2])
    assert joined(streamed) == choice["message"]["content"]


def test_the_prompt_names_the_tools(served: Served) -> None:
    without, with_tools = (
        curl(f"{served.url}/tokenize", {"messages": HELLO, **more})[2]["count"] for more in ({}, {"tools": [tool()]})
    )
    assert with_tools > without
    body = {**CHAT, "tools": [tool()], "pasta": {"parallelism": 1}}
    assert post(served, body)["usage"]["prompt_tokens"] == with_tools
    assert post(served, {**body, "tool_choice": "none"})["usage"]["prompt_tokens"] == without


def test_a_conversation_goes_on_behind_a_result(served: Served) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "move", "arguments": '{"x": 1, "on": true}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "c1", "content": ""})
    body = {**CHAT, "messages": messages, "tools": [tool()], "tool_choice": "required"}
    assert post(served, body)["choices"][0]["finish_reason"] == "tool_calls"
    tokens = curl(f"{served.url}/tokenize", {"messages": messages})[2]["tokens"]
    assert '"x": 1' in curl(f"{served.url}/detokenize", {"tokens": tokens})[2]["prompt"]


# ------------------------------------------------------------------------------ from text to calls

NAMES = st.text("abcXYZ_-019", min_size=1, max_size=8)
ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text('a"\\{}[],: é', max_size=6)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
        max_leaves=6,
    ),
    max_size=4,
)


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)] + [""]


def read(choice: Any, parts: list[str]) -> tuple[CallReader, list[dict[str, Any]]]:
    reader = CallReader(choice)
    return reader, [d for i, part in enumerate(parts) for d in reader.read(part, last=i == len(parts) - 1)]


@settings(max_examples=200)
@given(NAMES, ARGUMENTS, st.booleans(), st.lists(st.integers(0, 200), max_size=12), st.integers(0, 400))
def test_a_call_is_read_however_it_is_cut(name: str, values: Any, free: bool, cuts: list[int], length: int) -> None:
    arguments = json.dumps(values, ensure_ascii=False)
    text = f'{{"name": "{name}", "arguments": {arguments}}}'
    text = f"<tool_call>\n{text}\n</tool_call>" if free else text
    choice: Any = "auto" if free else "required"
    reader, deltas = read(choice, pieces(text, cuts))
    assert (reader.name, reader.arguments, reader.finish_reason("stop")) == (name, arguments, "tool_calls")
    assert all("content" not in delta for delta in deltas)
    first, *rest = (delta["tool_calls"][0] for delta in deltas)
    assert first == {"index": 0, "id": reader.id, "type": "function", "function": {"name": name, "arguments": ""}}
    assert "".join(call["function"]["arguments"] for call in rest) == arguments
    cut, _ = read(choice, pieces(text[:length], cuts))
    assert arguments.startswith(cut.arguments) and cut.name in (None, name)
    whole = cut.arguments == arguments and cut.called
    assert cut.finish_reason("length") == "length" and cut.finish_reason("stop") == ("tool_calls" if whole else "stop")


@settings(max_examples=200)
@given(st.text("<tool_call> \n{}ab", max_size=30), st.lists(st.integers(0, 30), max_size=8))
def test_what_is_no_call_is_text(text: str, cuts: list[int]) -> None:
    reader, deltas = read("auto", pieces(text, cuts))
    if text.lstrip().startswith("<tool_call>"):
        assert not any("content" in delta for delta in deltas)
        return
    assert "".join(delta["content"] for delta in deltas) == text == reader.message()["content"]
    assert not reader.called and reader.finish_reason("stop") == "stop"


# ------------------------------------------------------------------------------ what is refused

DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(70):
    DEEP = {"type": "array", "items": DEEP}
LARGE = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(3000)}}
DOUBLED = {
    "$defs": {
        f"d{i}": {
            "type": "object",
            "properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"},
            "required": ["a", "b"],
        }
        for i in range(24)
    },
    "$ref": "#/$defs/d0",
}
"""Small, but its answer has 2^24 fields."""
CUBE: dict[str, Any] = {"type": "boolean"}
for _ in range(3):
    CUBE = {"type": "array", "items": CUBE, "minItems": 32, "maxItems": 32}
CHAIN = {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(1200)}, "$ref": "#/$defs/d0"}
FORMAT = "response_format"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({FORMAT: {}}, "response_format.type"), ({FORMAT: {"type": "xml"}}, "response_format.type"),
        ({FORMAT: "json_object"}, "response_format"), ({FORMAT: {"type": "structural_tag"}}, "response_format.type"),
        ({FORMAT: {"type": "json_schema"}}, "response_format.json_schema"),
        ({FORMAT: {"type": "json_schema", "json_schema": None}}, "response_format.json_schema"),
        ({FORMAT: {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}}, "response_format.json_schema"),
        ({FORMAT: {"type": "json_object", "schema": POINT}}, "response_format.schema"),
        ({FORMAT: {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
        ({FORMAT: {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({FORMAT: json_schema([])}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema(True)}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema("{}")}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema(POINT, name="a b")}, "response_format.json_schema.name"),
        ({FORMAT: json_schema(POINT, name="a" * 65)}, "response_format.json_schema.name"),
        ({FORMAT: json_schema(POINT, strict="yes")}, "response_format.json_schema.strict"),
        ({FORMAT: json_schema(DEEP)}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema(LARGE)}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema({"enum": ["x" * 130_000]})}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema({"const": "\ud800"})}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema({"minimum": float("nan")})}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema(CHAIN)}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema({**POINT, "properties": {"x": {"x-depends-on": 5}, "on": {}}})}, "response_format"),
        ({FORMAT: json_schema(DOUBLED)}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema(CUBE)}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema({"type": "array", "minItems": 10**5})}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema({"type": "string", "minLength": 10**9})}, "response_format.json_schema.schema"),
        ({FORMAT: json_schema({"not": {}})}, "response_format"),
        ({FORMAT: json_schema({"type": "float"})}, "response_format"),
        ({FORMAT: json_schema({"$ref": "#/$defs/a"})}, "response_format"),
        ({FORMAT: json_schema({"$ref": "https://example.com/a"})}, "response_format"),
        ({FORMAT: json_schema(POINT), "max_tokens": 2}, "max_tokens"),
        ({FORMAT: json_schema(POINT), "min_tokens": 2}, "min_tokens"),
        ({FORMAT: json_schema(POINT), "tools": [tool()]}, "tools"),
        ({FORMAT: json_schema(POINT), "structured_outputs": {"json": POINT}}, "structured_outputs"),
        ({"pasta": {"depends": {"x": ["on"]}}}, "pasta.depends"),
        ({FORMAT: json_schema(POINT), "pasta": {"depends": {"x": ["nothing"]}}}, "response_format"),
        ({FORMAT: json_schema(POINT), "pasta": {"depends": {"x": "on"}}}, "pasta.depends.x"),
        ({"structured_outputs": {}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": POINT, "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_json": POINT}, "guided_json"),
        ({"tools": {}}, "tools"), ({"tools": [{}]}, "tools[0].type"), ({"tools": ["move"]}, "tools[0]"),
        ({"tools": [tool(), {"type": "custom", "custom": {"name": "x"}}]}, "tools[1].custom"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"), ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("é")]}, "tools[0].function.name"), ({"tools": [tool("a" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool("a\n")]}, "tools[0].function.name"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "object", "properties": {"a": DEEP}})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "object", "not": {}})], "tool_choice": "required"}, "tools"),
        ({"tools": [tool(parameters={"type": "object", "not": {}})]}, "tools"),
        ({"tools": [tool(inputs={})]}, "tools[0].function.inputs"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": named("move")}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": named("stay")}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [tool()], "tool_choice": "required", "max_tokens": 2}, "max_tokens"),
        ({"functions": [{"name": "move", "parameters": POINT}]}, "functions"),
        ({"function_call": {"name": "move"}}, "function_call"),
        ({"messages": [*HELLO, {"role": "assistant", "function_call": {"name": "a"}}]}, "messages[1].function_call"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_is_refused_by_its_place(served: Served, change: dict[str, Any], param: str) -> None:
    body = json.dumps({**CHAT, **change})
    status, _, reply = curl(f"{served.url}/v1/chat/completions", body)
    assert status == 400, reply
    assert reply["error"]["param"] == param, reply
    assert "\n" not in reply["error"]["message"] and len(reply["error"]["message"]) < 300


@pytest.mark.parametrize("limit", [0, 10_000])
def test_how_deep_references_may_lead_does_not_hang_on_the_interpreter(limit: int) -> None:
    """A library may have raised its limit of recursion."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, before))
    try:
        with pytest.raises(ValidationError, match="more than 200 levels"):
            JsonSchema(name="a", schema=CHAIN)
    finally:
        sys.setrecursionlimit(before)
    shorter = {"$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(100)}, "d100": POINT}}
    assert JsonSchema(name="a", schema={**shorter, "$ref": "#/$defs/d0"})


def test_what_was_once_is_told_its_new_name(served: Served) -> None:
    for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
        error = curl(f"{served.url}/v1/chat/completions", {**CHAT, old: [{"name": "a"}]})[2]["error"]
        assert error["code"] == "unsupported_parameter" and error["message"].endswith(f"give {new}")
