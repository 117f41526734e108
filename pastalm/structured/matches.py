"""A short text that a regular expression matches, read off the expression itself.

Python's own parser reads the expression; what it cannot read has no such text.
"""

from __future__ import annotations

import re
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LONGEST = 1000
USUAL = "a0A _-.:/@\t\n\u00a0\u00e9"
"""Characters for sets that name none."""
_CATEGORIES = {
    codes.CATEGORY_DIGIT: "[0-9]",
    codes.CATEGORY_NOT_DIGIT: "[^0-9]",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: "[0-9A-Za-z_]",
    codes.CATEGORY_NOT_WORD: "[^0-9A-Za-z_]",
}


def short(pattern: str) -> str:
    """A text that probably matches, near the shortest; "" where none is found. Anchors and look-arounds are not minded:
    who uses it tries it."""
    try:
        return _of(parser.parse(pattern))[:LONGEST]
    except (re.error, RecursionError, OverflowError, ValueError):
        return ""


def _of(parts: Any) -> str:
    return "".join(_part(code, value) for code, value in parts)


def _part(code: Any, value: Any) -> str:
    if code is codes.LITERAL:
        return chr(value)
    if code in (codes.ANY, codes.NOT_LITERAL):
        return "a" if value != ord("a") else "b"
    if code is codes.IN:
        return _member(value)
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
        least, _, repeated = value
        return _of(repeated) * min(int(least), LONGEST)
    if code is codes.SUBPATTERN:
        return _of(value[-1])
    if code is codes.ATOMIC_GROUP:
        return _of(value)
    if code is codes.BRANCH:
        return min(map(_of, value[1]), key=len)
    return ""


def _member(members: Any) -> str:
    """A character of a set: the first that it names, or one of the usual ones."""
    listed = [(code, value) for code, value in members if code is not codes.NEGATE]
    named = [
        chr(value if code is codes.LITERAL else value[0])
        for code, value in listed
        if code in (codes.LITERAL, codes.RANGE)
    ]
    left_out = len(listed) < len(members)
    return next((c for c in (*named, *USUAL) if any(_names(c, *each) for each in listed) != left_out), "")


def _names(character: str, code: Any, value: Any) -> bool:
    """Whether a part of a set names a character."""
    if code is codes.LITERAL:
        return bool(ord(character) == value)
    if code is codes.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    return re.fullmatch(_CATEGORIES.get(value, "(?!)"), character) is not None
