"""The walk over a schema: what is a keyword, and what only has its name."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llguidance")

from pastalm.core.params import SamplingParams
from pastalm.errors import RequestError
from pastalm.structured.structures import instructions
from tests.structured.walks import leaf, values

OURS = {"x-depends-on": ["a"], "x-count-first": True}
NAMED = {name: {"type": "integer"} for name in OURS}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": NAMED},
        {"$defs": NAMED, "type": "object"},
        {"enum": [OURS]},
        {"const": OURS},
        {"type": "object", "default": OURS},
    ],
)
def test_what_is_only_named_like_our_keywords_is_told(schema: Any) -> None:
    for asked in (
        SamplingParams(schema=schema),
        SamplingParams(tools=[{"name": "x", "parameters": schema}], tool_choice="x"),
    ):
        said = instructions(asked)
        assert said is not None and all(name in said for name in OURS)


def test_our_keywords_are_not_told() -> None:
    schema = {"type": "array", "items": {"anyOf": [{"type": "string"} | OURS]}} | OURS
    assert "x-" not in str(instructions(SamplingParams(schema=schema)))
    tools = [{"name": "x", "description": "x-count-first", "parameters": schema}]
    said = str(instructions(SamplingParams(tools=tools, tool_choice="x")))
    assert said.count("x-count-first") == 1 and "x-depends-on" not in said


def test_what_is_refused_is_named_with_its_place() -> None:
    schema = {"type": "object", "properties": {"not": {"type": "string"}, "b": {"anyOf": [{"not": {}}]}}}
    with pytest.raises(RequestError, match="not at #/properties/b/anyOf/0"):
        leaf(schema)
    assert values({"type": "object", "properties": {"not": {"const": 1}}, "required": ["not"]}, 1)[0]["not"] == 1


@pytest.mark.parametrize("schema", [{"minProperties": 2}, {"minProperties": 3, "required": ["a"]}])
def test_a_number_of_keys_that_may_be_the_same_is_refused_by_name(schema: Any) -> None:
    with pytest.raises(RequestError, match=f"minProperties {schema['minProperties']} at #"):
        leaf({"type": "object"} | schema)


@pytest.mark.parametrize("schema", [{"minProperties": 1}, {"minProperties": 2, "required": ["a"]}])
def test_a_number_of_keys_that_differ_is_held(schema: Any) -> None:
    assert all(len(value) >= schema["minProperties"] for value in values({"type": "object"} | schema, 10))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "null"}, "uniqueItems": False},
        {"type": "object", "propertyNames": True},
        {"type": "object", "properties": {"propertyNames": {"propertyNames": {}, "type": "object"}}},
    ],
)
def test_keywords_that_leave_all_open_are_held(schema: Any) -> None:
    assert values(schema, 3)
