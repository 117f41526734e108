"""Patterns: they are ECMA-262's, whatever their classes, sets and escapes."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from pastalm.errors import RequestError
from tests.structured.walks import grammars, leaf, values

SPACES = "\t\n\v\f\r \xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
PROBES = [*SPACES, *"\x1c\x1f\x85\ufeff\u180e\u200b", *"09AZ_az", *"$-[]^&~/\\.+,<{é²😀٣"]
BOTH = {
    "\\s": set(SPACES),
    "[\\s]": set(SPACES),
    "[^\\S]": set(SPACES),
    "\\S": set(PROBES) - set(SPACES) - set("\x1c\x1f\x85\ufeff"),
    "[^\\s]": set(PROBES) - set(SPACES) - set("\x1c\x1f\x85\ufeff"),
    ".": set(PROBES) - set("\n\r\u2028\u2029"),
    "\\d": set("09"),
    "\\w": set("09AZ_az"),
    "[^\\w]": set(PROBES) - set("09AZ_az"),
    "\\D": set(PROBES) - set("09"),
    "[[&~^]": set("[&~^"),
    "[a&&z]": set("a&z"),
    "[^[a]": set(PROBES) - set("[a"),
    "[+--]": set("+,-"),
    "[-a]": set("-a"),
    "[--.]": set("-."),
    "[\\w-$]": set("09AZ_az-$"),
    "[$-]": set("$-"),
    "[\\]\\[\\^\\-\\\\]": set("][^-\\"),
    "\\$": {"$"},
    "\\cI": {"\t"},
    "\\v": {"\v"},
    "\\<": {"<"},
    "\\é": {"é"},
    "\\/": {"/"},
    "\\x41|\\u005a|\\u{5f}": set("AZ_"),
    "\\uD83D\\uDE00": {"😀"},
    "(?<name>a)|(?:z)": set("az"),
}


def admits(schema: Any, text: str) -> bool:
    value = grammars().value(leaf(schema), ",")
    return all(map(value.write, f"{json.dumps(text, ensure_ascii=False)},".encode())) and value.ended


@pytest.mark.parametrize("pattern", BOTH)
def test_a_class_has_the_characters_of_both_readings(pattern: str) -> None:
    schema = {"type": "string", "pattern": f"^(?:{pattern})$", "minLength": 1}
    writable = {text for text in PROBES if admits(schema, text)}
    assert writable == {text for text in BOTH[pattern] if admits({"type": "string"}, text)}


def test_a_pattern_of_keys_is_exact() -> None:
    schema = {"type": "object", "patternProperties": {"^\\s$": {"const": 1}}, "additionalProperties": {"const": 2}}
    node = leaf(schema)
    for key in PROBES:
        for number in (1, 2):
            value = grammars().value(node, ",")
            text = json.dumps({key: number}, ensure_ascii=False)
            if all(map(value.write, f"{text},".encode())):
                assert number == (1 if key in {*SPACES, "\ufeff"} else 2), repr(key)


PIECES = [
    "\\s",
    "\\S",
    ".",
    "\\d",
    "\\w",
    "[\\s\\d]",
    "[^\\s]",
    "[^\\S ]",
    "[\\w.-]",
    "a",
    "\\.",
    "(?:ab|\\s)",
    "x{0,2}",
]


@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.sampled_from(["", "^"]), st.sampled_from(["", "$"])
)
@settings(max_examples=40, deadline=None)
def test_texts_of_a_pattern_match_everywhere(pieces: list[str], begin: str, end: str) -> None:
    pattern = begin + "".join(pieces) + end
    schema = {"type": "string", "pattern": pattern}
    for text in values(schema, 8, "\x85\ufeff\u2028 a.x".encode()):
        assert jsonschema_rs.is_valid(schema, text) and re.search(pattern, text), (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    ["a\\$$", "\\^a", "^\\$[0-9]+\\.[0-9]{2}$", "^[A-Z]{2,3}-\\d+$", "^(a|b)*$", "^$", '^[^"\\\\]+$', "x|^y$"],
)
def test_common_patterns_are_held(pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert all(jsonschema_rs.is_valid(schema, text) for text in values(schema, 10, b"$^a1-."))


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("a\\b", "'\\b'"),
        ("^(?=a)a", "'(?=a'"),
        ("(?<!a)b", "'(?<!'"),
        ("(a)\\1", "'\\1'"),
        ("[]a]", "set"),
        ("[^]", "set"),
        ("[a-\\d]", "range"),
        ("\\ud800", "0xd800"),
        ("a\\", "'\\'"),
        ("[a", "not closed"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(pattern: str, named: str) -> None:
    for schema in ({"type": "string", "pattern": pattern}, {"type": "object", "patternProperties": {pattern: {}}}):
        with pytest.raises(RequestError) as refused:
            leaf({"type": "object", "properties": {"p": schema}})
        said = str(refused.value)
        assert named in said and "at #/properties/p" in said and repr(pattern) in said


@pytest.mark.parametrize(
    ("pattern", "begun"),
    [
        ("^\\$[0-9]+\\.[0-9]{2}$", '"$1'),
        ("^[0-9]+[.][0-9]{4}$", '"1'),
        ("^[a-z]+[.][a-z]+[.][a-z]{3}$", '"a'),
        ("a\\$$", '"bb'),
    ],
)
def test_a_value_that_has_begun_has_a_way_to_its_end(pattern: str, begun: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    value = grammars().value(leaf(schema), ",")
    assert all(map(value.write, begun.encode())) and all(map(value.write, value.ending())) and value.ended
