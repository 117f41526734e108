"""Texts that a pattern matches: read off it, and by them the end of a value whose budget is spent."""

from __future__ import annotations

import re
import time
from typing import Any

import jsonschema_rs
import pytest

pytest.importorskip("llguidance")

from pastalm.structured.matches import short
from tests.structured.walks import grammars, leaf, values

TEXT = {"type": "string", "pattern": "foo.*bar"}
PATTERNS = (
    "foo.*bar",
    "^foo.*bar$",
    "(cat|dog).*(mouse|bird)",
    "^(cat|dog)s?-[^a-y]{2,}z$",
    "a\\$$",
    "[0-9]{3}.+[a-f]",
    '^"[^"]*"$',
    "^\\d+(\\.\\d{2})?\\s\\w+$",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_read_off_a_pattern_matches_it(pattern: str) -> None:
    assert re.search(pattern, short(pattern)), short(pattern)


@pytest.mark.parametrize("pattern", ["(", "\\p{L}", "(?<=a)", ""])
def test_nothing_is_read_off_what_cannot_be_read(pattern: str) -> None:
    assert short(pattern) == ""


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_text_ends_soon_wherever_it_stands_in_its_pattern(pattern: str) -> None:
    schema: dict[str, Any] = {"type": "string", "pattern": pattern}
    for value in values(schema, 10):
        assert jsonschema_rs.is_valid(schema, value), value


def test_a_search_for_an_end_keeps_to_its_limit() -> None:
    node = leaf({"type": "string", "minLength": 3})
    value = grammars().value(node, ",")
    assert value._search(bytes(grammars().bytes), time.monotonic() - 1)[0] == b""


def test_a_pattern_is_no_reason_to_begin_a_text() -> None:
    for schema in ({"type": "array", "items": TEXT}, {"anyOf": [TEXT, {"type": "array"}]}):
        value = grammars().value(leaf(schema), ",")
        begun = value.begin()
        assert begun + bytes(value.ending()) == b"[],"
