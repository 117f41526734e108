"""Keys of objects: each has one spelling, so that none stands for another that has a schema of its own."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from pastalm.errors import RequestError
from pastalm.structured.checked import ByteGrammars
from pastalm.structured.grammar import Grammars
from pastalm.structured.plan import Leaf, plan
from tests.laws.tiny import tiny_vocabulary
from tests.structured.walks import grammars, leaf, walk

NUMBER, TEXT = {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 2}
KEYS = ["a", "b", "/", '"', "\\", "\n", "\x01", "\x1f", "\x7f", "é", "😀", "\\u0061"]
OPEN = st.fixed_dictionaries(
    {},
    optional={
        "properties": st.dictionaries(st.sampled_from(KEYS), st.just(NUMBER), min_size=1, max_size=3),
        "patternProperties": st.sampled_from([{"^a": NUMBER}, {"[/\\n]": NUMBER}, {"^[^b-z]$": NUMBER}]),
        "additionalProperties": st.sampled_from([TEXT, True]),
    },
)


def spelled(key: str) -> str:
    """A key as JSON, each of its characters as \\uXXXX."""
    units = key.encode("utf-16-be").hex()
    return '"' + "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)) + '"'


def admits(grammars: Grammars, node: Leaf, text: str) -> bool:
    value = grammars.value(node, ",")
    return all(map(value.write, f"{text},".encode())) and value.ended


def where(schema: Any) -> list[Any]:
    """Schemas with a schema in several of their places."""
    return [
        schema,
        {"type": "array", "items": schema, "minItems": 1},
        {"type": "object", "properties": {"in": {"$ref": "#/$defs/it"}}, "required": ["in"], "$defs": {"it": schema}},
        {"anyOf": [{"type": "null"}, schema]},
    ]


@given(OPEN)
@settings(max_examples=40, deadline=None)
def test_objects_of_open_keys_validate(keywords: dict[str, Any]) -> None:
    schema = {"type": "object"} | keywords
    spellings = [spelled(key)[1:].encode() for key in KEYS]
    for seed in range(6):
        value = json.loads(walk(leaf(schema), seed, b'"ab', spellings))
        assert jsonschema_rs.is_valid(schema, value), (schema, value)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_never_spelled_as_another_one(key: str) -> None:
    named = {"type": "object", "properties": {key: NUMBER}}
    for schema, around in zip(where(named), ["{}", "[{}]", '{"in": {}}', "{}"], strict=True):
        for text in (spelled(key), spelled(key).upper().replace("U", "u")):
            wrong = around.replace("{}", f'{{{text}: "x"}}')
            assert json.loads(wrong)
            assert not admits(grammars(), leaf(schema), wrong)
            assert not admits(ByteGrammars(tiny_vocabulary()), leaf(schema), wrong)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_named_can_be_written(key: str) -> None:
    schema = {"type": "object", "properties": {key: NUMBER}, "required": [key]}
    assert admits(grammars(), leaf(schema), json.dumps({key: 1}, ensure_ascii=False))


def test_a_constant_that_needs_a_long_escape_is_held_or_refused_by_name() -> None:
    closed = {"type": "object", "properties": {"a": {"enum": ["\x01", "b"]}}, "additionalProperties": False}
    assert admits(grammars(), leaf(closed), '{"a": "\\u0001"}')
    with pytest.raises(RequestError, match="enum at #/properties/a"):
        leaf({**closed, "additionalProperties": True})
    assert isinstance(plan({"const": "\x01\t"}), Leaf) and admits(grammars(), leaf({"const": "\t"}), '"\\t"')
