"""Regular expressions in schemas: ECMA-262's, as JSON Schema has them, written as llguidance reads them.

llguidance has the syntax of Rust's `regex`: other white space, sets in brackets, word bounds behind `\\<`. What the two
read apart is rewritten here to what they read alike; what llguidance cannot hold is refused by name.

Python's `jsonschema` reads a third syntax, Python's `re`. A text is written only where `\\s`, `\\S` and `.` mean the
same in both; `\\d`, `\\w` and their opposites are ECMA-262's (ASCII).

Source: ECMA-262, section 22.2; JSON Schema 2020-12 (core), section 6.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pastalm.errors import RequestError

_SPACE = r"\x09-\x0d\x20\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space of ECMA-262 and of Python."""
_ECMA_ONLY, _PYTHON_ONLY = r"\ufeff", r"\x1c-\x1f\x85"
_NO_LINE = r"[^\n\r\u2028\u2029]"
_CONTROL = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_GROUP = re.compile(r"\(\?(:|P?<[A-Za-z_]\w*>|i[:)])")
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([dD][89abAB]..)\\u([dD][c-fC-F]..)|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]+)\}")
_PROPERTY = re.compile(r"[pP]\{[^}]*\}")


def held(schema: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    """One part of a schema with patterns that llguidance reads as they are meant.

    at: JSON pointer of the part.

    Raises RequestError for a pattern that cannot be held.
    """
    held = dict(schema)
    if isinstance(pattern := schema.get("pattern"), str):
        held["pattern"] = _Pattern(pattern, f"pattern {pattern!r} at {at}").written()
    if isinstance(named := schema.get("patternProperties"), Mapping):
        held["patternProperties"] = {
            _Pattern(pattern, f"patternProperties {pattern!r} at {at}", exact=True).written(): value
            for pattern, value in named.items()
        }
    return held


class _Pattern:
    """A pattern that is read once from its beginning.

    exact: white space is ECMA-262's, and nothing narrower: what does not match is written too.
    """

    def __init__(self, pattern: str, name: str, *, exact: bool = False) -> None:
        self._pattern, self._name, self._at, self._exact = pattern, name, 0, exact

    def written(self) -> str:
        parts: list[str] = []
        while self._at < len(self._pattern):
            parts.append(self._next())
        return "".join(parts)

    def _refuse(self, what: str) -> RequestError:
        return RequestError(f"the schema cannot be held: {self._name} is not supported: {what}")

    def _next(self) -> str:
        """The next part of the pattern, rewritten."""
        character = self._pattern[self._at]
        if character == "\\":
            return self._escape()
        if character == "[":
            return self._set()
        text = character
        if self._pattern.startswith("(?", self._at):
            group = _GROUP.match(self._pattern, self._at)
            if group is None:
                raise self._refuse(f"{self._pattern[self._at : self._at + 4]!r} cannot be held")
            text = group[0]
        self._at += len(text)
        return _NO_LINE if character == "." else text

    def _set(self) -> str:
        """A set of characters in brackets."""
        negated = self._pattern.startswith("[^", self._at)
        parts = ["[^" if negated else "["]
        self._at += len(parts[0])
        while self._at < len(self._pattern) and (character := self._pattern[self._at]) != "]":
            if character == "\\":
                part = self._escape(within=True, negated=negated)
                if _is_class(part) and parts[-1] == "-":
                    raise self._refuse("a range to a class of characters cannot be held")
                parts.append(part)
                continue
            dash = character == "-" and (parts[-1] in ("-", "[", "[^") or _is_class(parts[-1]))
            parts.append(f"\\{character}" if character in "[&~^" or dash else character)
            self._at += 1
        if self._at >= len(self._pattern):
            raise self._refuse("a bracket is not closed")
        if len(parts) == 1:
            raise self._refuse("a set without a character cannot be held")
        self._at += 1
        return "".join(parts) + "]"

    def _escape(self, *, within: bool = False, negated: bool = False) -> str:
        """An escape. within: of a set; negated: what it stands for is excluded."""
        rest = self._pattern[self._at + 1 :]
        name = rest[:1]
        if name in ("s", "S") and name:
            self._at += 2
            return self._space(name, within, negated)
        if name and name in "dDwW":
            self._at += 2
            return f"\\{name}"
        if found := _PROPERTY.match(rest):
            self._at += 1 + found.end()
            return f"\\{found[0]}"
        if name == "b" and within:
            return self._character(8, 2)
        if name in _CONTROL and not (name == "0" and rest[1:2].isdigit()):
            return self._character(_CONTROL[name], 2)
        if name == "c" and rest[1:2].isascii() and rest[1:2].isalpha():
            return self._character(ord(rest[1]) % 32, 3)
        if found := _CODE.match(rest):
            return self._character(_code(*found.groups()), 1 + found.end())
        if name and not (name.isascii() and name.isalnum()):
            return self._character(ord(name), 2)
        raise self._refuse(f"'\\{name}' cannot be held")

    def _character(self, code: int, length: int) -> str:
        """A character by its number. length: of what stands for it in the pattern."""
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise self._refuse(f"there is no character {code:#x}")
        self._at += length
        return f"\\u{code:04x}" if code < 0x10000 else chr(code)

    def _space(self, name: str, within: bool, negated: bool) -> str:
        """White space or the opposite, so that a text matches in ECMA-262 and in Python."""
        if self._exact:
            space = _SPACE + _ECMA_ONLY
        elif (name == "s") == negated:
            space = _SPACE + _ECMA_ONLY + _PYTHON_ONLY
        else:
            space = _SPACE
        if name == "S":
            return f"[^{space}]"
        return space if within else f"[{space}]"


def _is_class(part: str) -> bool:
    """Whether a part of a set stands for several characters."""
    return len(part) > 1 and part != "[^" and not re.fullmatch(r"\\u[0-9a-f]{4}|\\[^dDwW]", part)


def _code(two: str | None, high: str | None, low: str | None, four: str | None, braced: str | None) -> int:
    """The character that an escape names."""
    if high and low:
        return 0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF)
    return int(two or four or braced or "", 16)
