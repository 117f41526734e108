"""Numbers in schemas: what is written keeps its value in every JSON parser, and in llguidance.

llguidance reads bounds and constants as float64 and writes them with up to 16 digits; beyond 2^53 they are others, and
the bounds of 64 bits end the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeGuard

from pastalm.errors import RequestError
from pastalm.structured.schemas import hidden, kinds, rebuilt, scalars

LARGEST = 2**53 - 1
"""Numbers that every JSON parser keeps (RFC 7493, section 2.2)."""
DIGITS = 15
"""Of a number that float64 keeps, before and behind its point."""
MOST_STEP = 9999
"""Of `multipleOf`, without its point: a grammar has a state for each remainder, and larger ones take minutes."""
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_ELSEWHERE = frozenset({"$ref", "anyOf", "oneOf", "allOf", "const", "enum"})
"""Keywords beside which another part says what a value is."""
_NAME = "pastalm-any"
_ANY = {"$ref": f"#/$defs/{_NAME}"}
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def held(schema: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    """One part of a schema with numbers that can be held, and with bounds for numbers that have none.

    at: JSON pointer of the part.

    Raises RequestError for a number that cannot be held.
    """
    held = dict(schema)
    for key in _COUNTS & set(schema):
        if isinstance(count := schema[key], float) and count.is_integer():
            held[key] = int(count)
    for key in ("const", "enum"):
        for number in filter(_is_number, scalars(schema.get(key))):
            _kept(number, key, at)
    step = schema.get("multipleOf")
    if _is_number(step) and not 0 < Decimal(repr(step)).scaleb(_places(step)) <= MOST_STEP:
        most = f"steps above 0 of up to {MOST_STEP} without their point are"
        raise RequestError(f"the schema cannot be held: multipleOf {step} at {at} is not supported: {most}")
    _bound(held, at)
    return held


def bounded(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with bounds for the numbers in values of which it says nothing: `{}`, items, other keys."""

    def change(part: Mapping[str, Any], _: str) -> Mapping[str, Any]:
        if set(part) & _ELSEWHERE:
            return part
        named = part.get("type")
        if not isinstance(named, str | list | None):
            return part
        held = dict(part) if named is not None else {"minimum": -LARGEST, "maximum": LARGEST, **part}
        for kind, keyword in (("array", "items"), ("object", "additionalProperties")):
            if (named is None or kind in kinds(part)) and part.get(keyword, True) is True:
                held[keyword] = _ANY
        for keyword in {"properties", "patternProperties"} & set(part):
            if isinstance(named := part[keyword], Mapping):
                held[keyword] = {name: _ANY if each is True else each for name, each in named.items()}
        return held

    with_bounds = rebuilt(schema, change, also=hidden(schema))
    defined = with_bounds.get("$defs")
    known = defined if isinstance(defined, Mapping) else {}
    return {**with_bounds, "$defs": {**known, _NAME: change({}, "")}}


def _bound(schema: dict[str, Any], at: str) -> None:
    """Bounds within what can be held."""
    for key in _BOUNDS:
        bound = schema.get(key, 0)
        if key not in schema or not _is_number(bound):
            continue
        if abs(bound) > LARGEST and (bound < 0) == key.lower().endswith("minimum"):
            del schema[key]  # it bounds nothing that can be held
        else:
            _kept(bound, key, at)
    if ("integer" in kinds(schema) or "number" in kinds(schema)) and not {"enum", "const"} & set(schema):
        if not {"minimum", "exclusiveMinimum"} & set(schema):
            schema["minimum"] = -LARGEST
        if not {"maximum", "exclusiveMaximum"} & set(schema):
            schema["maximum"] = LARGEST


def _kept(number: float, keyword: str, at: str) -> None:
    digits = len(Decimal(repr(number)).normalize().as_tuple().digits)
    if abs(number) > LARGEST or (isinstance(number, float) and max(digits, _places(number)) > DIGITS):
        most = f"numbers up to 2^53 - 1 with up to {DIGITS} digits are"
        raise RequestError(f"the schema cannot be held: {keyword} {number} at {at} is not supported: {most}")


def _places(number: float) -> int:
    """Digits behind the point."""
    exponent = Decimal(repr(number)).normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
