"""An answer that is either text or the call of a tool: text, unless it begins with `<tool_call>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pastalm.core.events import Event, FinishReason, Forked, Path, SampledToken
from pastalm.core.interpreter import Interpreter
from pastalm.engines.processors.base import ThreadProcessor
from pastalm.structured.grammar import Value
from pastalm.structured.interpreter import FieldInterpreter
from pastalm.structured.mask import ValueMask
from pastalm.structured.plan import CALL_CLOSE, CALL_OPEN


class CallInterpreter:
    """The language's interpreter, until the text so far is `<tool_call>`; then that of the call.

    text: of an answer in the language. call: of the calls that are possible.
    """

    def __init__(self, text: Interpreter, call: FieldInterpreter) -> None:
        self._interpreter, self._fields = text, call
        self._calls: bool | None = None
        """Whether it calls a tool (None: not clear yet)."""
        self._text = ""

    @property
    def _threads(self) -> Interpreter | FieldInterpreter:
        return self._fields if self._calls else self._interpreter

    @property
    def threads(self) -> Mapping[Path, Any]:
        return self._threads.threads

    @property
    def stopped(self) -> Sequence[Path]:
        return self._threads.stopped

    @property
    def finished(self) -> bool:
        return self._threads.finished

    def start(self) -> list[Event]:
        """The event that begins the main thread."""
        return self._interpreter.start()

    def advance(self, sampled: SampledToken) -> list[Event]:
        """The events that follow from a sampled token."""
        events = self._threads.advance(sampled)
        if self._calls is None:
            self._decide(events)
            if self._calls:
                events += self._called()
        return events

    def finish(self, reason: FinishReason) -> list[Event]:
        """Ends every thread now."""
        return self._threads.finish(reason)

    def _decide(self, events: Sequence[Event]) -> None:
        self._text += "".join(event.text for event in events)
        begun, opening = self._text.lstrip(), CALL_OPEN.strip()
        if begun.rstrip() == opening and not any(isinstance(event, Forked) for event in events):
            self._calls = not self._interpreter.finished
        elif begun and not opening.startswith(begun):
            self._calls = False

    def _called(self) -> list[Event]:
        """The call begins behind what opened it."""
        rest = CALL_OPEN[len(CALL_OPEN.strip()) :] if self._text.rstrip() == self._text else ""
        spent = self._interpreter.threads[()].written
        return self._fields.start_behind(rest, spent, close=CALL_CLOSE)

    def begin(self, request: Any) -> ThreadProcessor:
        """What masks the logits of the main thread."""
        return ValueMask(self._value, ())

    def guide(self, path: Path) -> Any:
        """What a thread writes next is held to, once it is a call."""
        return self._fields.guide(path) if self._calls else None

    def _value(self, path: Path) -> Value | None:
        return self._fields.value(path) if self._calls else None
