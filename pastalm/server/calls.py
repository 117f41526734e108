"""From the text of an answer that calls a tool to OpenAI's tool calls, whole or piece by piece.

The text of a call is {"name": NAME, "arguments": {...}}. Where text is possible too, a call is between <tool_call> and
</tool_call>.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Delta: TypeAlias = "dict[str, Any]"
"""What a chunk adds to a message."""

_OPEN = "<tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(slots=True)
class CallReader:
    """Reads the text of one answer as it comes.

    choice: whether the answer may be text ("auto"), or is a call.
    id: of the call.
    name: of the tool; None before it is known.
    content: the text, if the answer is text.
    arguments: of the call, as far as they are there.
    """

    choice: Literal["auto", "required"]
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")
    name: str | None = None
    content: str = ""
    arguments: str = ""
    _held: str = ""
    _is_call: bool | None = None
    _complete: bool = False
    _object_end: _ObjectEnd = field(default_factory=lambda: _ObjectEnd())

    def __post_init__(self) -> None:
        self._is_call = True if self.choice == "required" else None

    def read(self, text: str, *, last: bool = False) -> list[Delta]:
        """The deltas of new text: content, or the beginning of a call and pieces of its arguments.

        last: nothing follows.
        """
        self._held += text
        if self._is_call is None:
            self._decide(last)
        if self._is_call is False:
            text, self._held = self._held, ""
            self.content += text
            return [{"content": text}] if text else []
        return self._read_call() if self._is_call else []

    def _decide(self, last: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(_OPEN):
            self._is_call, self._held = True, begun.removeprefix(_OPEN)
        elif last or begun and not _OPEN.startswith(begun):
            self._is_call = False

    def _read_call(self) -> list[Delta]:
        deltas: list[Delta] = []
        if self.name is None:
            if (head := _HEAD.match(self._held)) is None:
                return []
            self.name, self._held = json.loads(head[1]), self._held[head.end() :]
            function = {"name": self.name, "arguments": ""}
            deltas.append(_delta({"index": 0, "id": self.id, "type": "function", "function": function}))
        if not self._complete and (piece := self._argument_piece()):
            deltas.append(_delta({"index": 0, "function": {"arguments": piece}}))
        return deltas

    def _argument_piece(self) -> str:
        """What is new of the arguments. What stands behind their end is dropped."""
        end = self._object_end.find(self._held)
        piece, self._held, self._complete = self._held[:end], "", end is not None
        self.arguments += piece
        return piece

    @property
    def called(self) -> bool:
        """Whether the answer calls a tool, as far as it came."""
        return self.name is not None

    def finish_reason(self, reason: str) -> str:
        """Why the answer ended: a whole call is a reason of its own."""
        return "tool_calls" if self._complete and reason == "stop" else reason

    def message(self) -> Delta:
        """The content of the whole message, and its calls."""
        if not self.called:
            return {"content": None if self._is_call else self.content}
        function = {"name": self.name, "arguments": self.arguments}
        return {"content": None, "tool_calls": [{"id": self.id, "type": "function", "function": function}]}


def _delta(call: dict[str, Any]) -> Delta:
    return {"tool_calls": [call]}


@dataclass(slots=True)
class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    def find(self, text: str) -> int | None:
        """The place behind the object's end in the next piece; None if it is not in it."""
        for i, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    return i + 1
        return None
