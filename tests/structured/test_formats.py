"""Formats: whatever the grammar lets through, the common checkers accept."""

from __future__ import annotations

import datetime
import ipaddress
import re
import uuid
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest

pytest.importorskip("llguidance")

from pastalm.errors import RequestError
from pastalm.structured.plan import Leaf, plan
from tests.structured.walks import grammars, leaf, values

LIKELY = {
    "date": b"0229-",
    "time": b"0569:.+-Zz",
    "date-time": b"02569:.+-ZzTt",
    "email": b"@.-[]xna1",
    "hostname": b"-.xna1",
    "duration": b"PT1DHMSYW",
    "ipv6": b":f0",
    "ipv4": b"0125.",
    "uuid": b"-a0",
    "uri": b":/[]@%?#v.a1",
}
PYTHON: dict[str, Callable[[str], Any]] = {
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "date-time": datetime.datetime.fromisoformat,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
}


def accepted(name: str, text: str) -> bool:
    """Whether both jsonschema_rs and, where it knows the format, Python accept a text."""
    try:
        PYTHON.get(name, str)(text)
    except ValueError:
        return False
    return bool(jsonschema_rs.is_valid({"format": name}, text, validate_formats=True))


@pytest.mark.parametrize("name", LIKELY)
def test_every_text_of_a_format_is_accepted(name: str) -> None:
    for text in values({"type": "string", "format": name}, 120, LIKELY[name]):
        assert accepted(name, text), text


def admits(schema: Any, text: str) -> bool:
    value = grammars().value(leaf(schema), ",")
    return all(map(value.write, f'"{text}",'.encode())) and value.ended


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("date", ["2023-02-29", "2023-02-30", "1900-02-29", "2024-04-31", "0000-01-01", "2024-13-01"]),
        ("time", ["23:59:60Z", "24:00:00Z", "12:00:00", "12:00:00+24:00"]),
        ("date-time", ["2023-02-29T00:00:00Z", "0000-01-01T00:00:00Z", "2016-12-31T23:59:60Z"]),
        ("email", [f"{'a' * 65}@b.c", f"a@{'b' * 64}.c", "a@[999.0.0.1]", "a..b@c.d", "a@-b.c"]),
        ("hostname", ["a" * 64, "-a", "a-", "xn--a", ".".join(["a" * 63] * 4)]),
    ],
)
def test_what_the_checkers_refuse_is_never_written(name: str, texts: list[str]) -> None:
    assert not [text for text in texts if admits({"type": "string", "format": name}, text)]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("date", ["2024-02-29", "2000-02-29", "0001-01-01", "9999-12-31", "2023-02-28", "1000-10-10", "2023-04-30"]),
        ("time", ["00:00:00Z", "23:59:59.123456789+05:30", "12:30:00-08:00"]),
        ("date-time", ["2024-02-29T12:00:00Z", "1999-12-31T23:59:59.5-08:00"]),
        ("email", ["anna@example.org", "a.b-c+d@mail.example.co.uk", f"{'a' * 64}@b.c", "a@b"]),
        ("hostname", ["localhost", "a.example.org", "a-b.c", "a" * 63, "127.0.0.1"]),
    ],
)
def test_common_texts_of_a_format_can_be_written(name: str, texts: list[str]) -> None:
    assert all(accepted(name, text) for text in texts)
    assert all(admits({"type": "string", "format": name}, text) for text in texts)


@pytest.mark.parametrize(
    "more",
    [{"pattern": "^2"}, {"pattern": "29$", "maxLength": 10}, {"enum": ["2023-02-30", "2024-02-29", "x"]}],
)
def test_a_format_goes_with_other_keywords(more: Any) -> None:
    schema = {"type": "string", "format": "date"} | more
    for text in values(schema, 40, b"0229-"):
        assert accepted("date", text) and jsonschema_rs.is_valid(schema, text)
    with pytest.raises(RequestError):
        leaf({"type": "string", "format": "date", "maxLength": 9})
    assert max(map(len, values({"type": "string", "format": "email", "maxLength": 7}, 20))) <= 7


@pytest.mark.parametrize("name", ["idn-email", "regex", "my-own", "unknown", 5])
def test_another_format_is_refused_with_its_place(name: Any) -> None:
    schema = {"type": "object", "properties": {"a/b": {"format": name, "type": "string"}}, "required": ["a/b"]}
    with pytest.raises(RequestError, match=re.escape(f"format {name!r} at #/properties/a~1b")):
        plan(schema)


def test_a_format_of_a_number_says_nothing_and_a_property_of_that_name_is_none() -> None:
    assert all(isinstance(value, int) for value in values({"type": "integer", "format": "int32"}, 5))
    schema = {"type": "object", "properties": {"format": {"const": "any"}}, "required": ["format"]}
    assert {"format": "any"} in [{"format": value["format"]} for value in values(schema, 1)]
    assert isinstance(plan({"enum": [{"format": "any"}]}), Leaf)


def test_a_format_behind_a_reference_is_held_wherever_it_stands() -> None:
    schema = {"$ref": "#/parts/all/day", "parts": {"all": {"day": {"type": "string", "format": "date"}}}}
    assert all(accepted("date", text) for text in values(schema, 40, b"0229-"))
    schema = {"$ref": "#/$defs/day", "$defs": {"day": {"type": "string", "format": "date"}}}
    assert all(accepted("date", text) for text in values(schema, 40, b"0229-"))
