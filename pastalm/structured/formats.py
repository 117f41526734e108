"""Formats of texts: what is written under one is accepted by the common checkers.

llguidance's own forms of days, times and addresses are wider than what Python's `jsonschema` and `jsonschema_rs`
accept: 30 February, second 60, a label of 64 characters. For these the patterns here stand in the schema instead. They
may be narrower than their source: one way of writing a value is enough.

    date, time, date-time    RFC 3339, section 5.6: days that the month has, years from 0001, no leap seconds, `T` and
                             `Z` in capitals
    hostname                 RFC 1123, section 2.1, and RFC 1034, section 3.1: labels of up to 63 characters, 253 in
                             all; no two hyphens in a row, which RFC 5891 reserves
    email                    RFC 5321, section 4.1.2: up to 64 characters before the `@`, nothing quoted
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pastalm.errors import RequestError
from pastalm.structured.schemas import kinds

_LONG_MONTH = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
_SHORT_MONTH = "(0[469]|11)-(0[1-9]|[12][0-9]|30)"
_FEBRUARY = "02-(0[1-9]|1[0-9]|2[0-8])"
_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = f"([0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DATE = f"({_YEAR}-({_LONG_MONTH}|{_SHORT_MONTH}|{_FEBRUARY})|{_LEAP_YEAR}-02-29)"
_HOUR = "([01][0-9]|2[0-3])"
_TIME = f"{_HOUR}:[0-5][0-9]:[0-5][0-9]([.][0-9]{{1,9}})?(Z|[+-]{_HOUR}:[0-5][0-9])"
_LABEL = "([a-zA-Z0-9]{1,63}|[a-zA-Z0-9](-?[a-zA-Z0-9]){0,31})"
_HOST = f"{_LABEL}([.]{_LABEL})*"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]"
_MAILBOX = f"({_ATOM}{{1,64}}|{_ATOM}([.]?{_ATOM}){{0,31}})@{_HOST}"

_PATTERNS = {
    "date": (_DATE, None),
    "time": (_TIME, None),
    "date-time": (f"{_DATE}T{_TIME}", None),
    "hostname": (_HOST, 253),
    "email": (_MAILBOX, 254),
}
"""For each format a pattern of the whole text, and its most characters where the pattern does not bound them."""
_KEPT = frozenset({"duration", "ipv4", "ipv6", "uuid", "uri"})
"""Formats that llguidance writes as the checkers want them."""


def held(schema: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    """One part of a schema, in a form that holds its format.

    at: JSON pointer of the part.

    Raises RequestError for a format that cannot be held.
    """
    if "format" not in schema:
        return schema
    rest = {key: value for key, value in schema.items() if key != "format"}
    name = schema["format"]
    if "type" in schema and "string" not in kinds(schema):
        return rest  # a format says nothing about other values
    if name in _KEPT:
        return schema
    if name not in _PATTERNS:
        known = ", ".join(sorted({*_KEPT, *_PATTERNS}))
        raise RequestError(f"the schema cannot be held: format {name!r} at {at} is not supported: use one of {known}")
    text, most = _PATTERNS[name]
    if most is not None:
        own = rest.get("maxLength", most)
        rest["maxLength"] = min(own, most) if isinstance(own, int) else own
    pattern = f"^({text})$"
    if "pattern" not in rest:
        return {**rest, "pattern": pattern}
    return {**rest, "allOf": [*rest.get("allOf", []), {"type": "string", "pattern": pattern}]}
