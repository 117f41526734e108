"""Numbers of a schema: bounds, constants and lengths of any size and spelling."""

from __future__ import annotations

import re
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from pastalm.errors import RequestError
from pastalm.structured.plan import plan
from tests.structured.walks import grammars, leaf, values

NUMBERS = st.one_of(
    st.integers(-(2**66), 2**66),
    st.sampled_from([2**53, -(2**53), 2**63 - 1, -(2**63), 2**64, 1e300, -1e300, 5e-324, 1e22, 0.1, 1e3, -0.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-9, 9),
)


@given(NUMBERS, st.sampled_from(["const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]))
@settings(max_examples=60, deadline=None)
def test_a_number_is_held_or_refused_by_name(number: float, keyword: str) -> None:
    schema = {keyword: number} | ({} if keyword == "const" else {"type": "number"})
    try:
        written = values(schema, 4, b"-.0")
    except RequestError as refused:
        assert "cannot be held" in str(refused) and "Failed to generate" not in str(refused)
        return
    assert all(jsonschema_rs.is_valid(schema, value) for value in written), (schema, written)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "number", "minimum": -1e19, "maximum": 1e300},
    ],
)
def test_bounds_of_wide_types_are_those_that_every_parser_keeps(schema: Any) -> None:
    written = values(schema, 20)
    assert all(abs(value) < 2**53 and jsonschema_rs.is_valid(schema, value) for value in written)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"const": 2**53}, "const 9007199254740992 at #"),
        ({"enum": [{"a": [123456789.12345679]}]}, "enum 123456789.12345679 at #"),
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf 1000003 at #"),
        ({"type": "object", "properties": {"a": {"minimum": 2**60}}}, "minimum 1152921504606846976 at #/properties/a"),
    ],
)
def test_a_number_beyond_is_named_with_its_place(schema: Any, named: str) -> None:
    with pytest.raises(RequestError, match=re.escape(named)):
        plan(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 2.0, "maxLength": 3e0},
        {"type": "array", "items": {"type": "null"}, "minItems": 1.0, "maxItems": 2.0},
        {"type": "integer", "minimum": 1e3, "maximum": 1005.0},
    ],
)
def test_a_whole_number_may_be_spelled_as_a_float(schema: Any) -> None:
    assert all(jsonschema_rs.is_valid(schema, value) for value in values(schema, 10))
    assert leaf(schema)


@pytest.mark.parametrize("number", ["1e999", "1" + 400 * "0", "-9e99"])
@pytest.mark.parametrize(
    ("schema", "around"),
    [
        ({}, "%s"),
        ({"type": "array"}, "[[%s]]"),
        ({"type": "object"}, '{"a": {"b": [%s]}}'),
        ({"type": "object", "properties": {"a": True, "b": {}}}, '{"a": %s}'),
        ({"type": "object", "properties": {"a": {"title": "A"}}}, '{"a": {"x": %s}}'),
        ({"type": "object", "patternProperties": {"^a": True}}, '{"a": %s}'),
        ({"$ref": "#/x", "x": {"type": ["array", "null"]}}, "[%s]"),
        ({"minLength": 2}, "[%s]"),
    ],
)
def test_a_number_of_which_nothing_is_said_is_one_that_every_parser_keeps(
    schema: Any, around: str, number: str
) -> None:
    for text, writable in ((number, False), ("1.5", True), ("true", True), ('{"a": null}', True)):
        value = grammars().value(leaf(schema), ",")
        assert all(map(value.write, f"{around % text},".encode())) == writable


@pytest.mark.parametrize("schema", [{"properties": [1]}, {"type": 3}, {"$defs": [], "type": "object"}, {"items": 7}])
def test_what_is_no_schema_is_refused_in_one_line_or_read_over(schema: Any) -> None:
    try:
        assert leaf(schema)
    except RequestError as refused:
        assert len(str(refused).splitlines()) == 1
