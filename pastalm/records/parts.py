"""The parts that a text is made of: items of lists and titled sections, by form alone, whoever wrote it and however.

It tells whether a sequential answer is a list, and which parts of it to compare with each other. What can be written
independently is another question (pastalm/train/structure.py).
"""

from __future__ import annotations

import re

MIN_PARTS = 3
PART_CHARACTERS = 70
"""About a sentence: shorter items are names, and not worth a thread."""
_BEGINS = re.compile(r"(?:\(?\d{1,2}[.)]|[-*\u2022]|#{1,6})\s+\S|\*\*[^*\n]{2,80}\*\*")
"""A line that begins a part: an item that is not indented, a heading, a title in bold."""


def parts(text: str) -> list[str]:
    """The parts of a text in order, without what stands before, between and after its lists and sections. An item ends
    at a blank line after which no item follows; a titled section holds one paragraph at least."""
    ended: list[str] = []
    current: list[str] = []
    for line in text.split("\n"):
        begins = _BEGINS.match(line) is not None
        if current and (begins or (line.strip() and not line[0].isspace() and _ended(current))):
            ended.append("\n".join(current).strip())
            current = []
        if begins or current:
            current.append(line)
    return [part for part in (*ended, "\n".join(current).strip()) if part]


def _ended(lines: list[str]) -> bool:
    """Whether a part has its text, and a blank line after it."""
    titled = lines[0].startswith("#") or lines[0].rstrip(" :").endswith("**")
    return not lines[-1].strip() and any(line.strip() for line in lines[1 if titled else 0 :])


def in_parts(text: str) -> bool:
    """Whether a text is made of parts of a sentence or more."""
    return sum(len(part) >= PART_CHARACTERS for part in parts(text)) >= MIN_PARTS
