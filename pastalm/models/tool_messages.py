"""Tool calls of earlier answers and their results, in the form that a chat template reads.

Some templates read a call's arguments as a mapping, some print them as JSON. A template that shows no tool calls gets
them as text in the messages, in the form that answers have (Hermes'):

    assistant   <tool_call>
                {"name": "weather", "arguments": {"city": "Bern"}}
                </tool_call>
    user        <tool_response>
                sunny
                </tool_response>
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

Messages: TypeAlias = "Sequence[Mapping[str, Any]]"
Form: TypeAlias = Literal["mapping", "json", "text"]
_NAME, _RESULT, _KEY = "\ue004", "\ue005", "probed_key"


def readable(messages: Messages, render: Callable[[Messages], str]) -> Messages:
    """A conversation whose tool calls and results a template shows.

    messages: each with role and content; the arguments of calls are JSON.
    render: of the template. Raises ValueError for messages that it rejects.
    """
    if not any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
        return messages
    form = _form(render)
    if form == "text":
        return _as_text(messages)
    return [_with_mappings(message) for message in messages] if form == "mapping" else messages


def _form(render: Callable[[Messages], str]) -> Form:
    """How a template reads the arguments of a call; text if it shows no calls or no results."""
    for form, arguments in (("mapping", {_KEY: "x"}), ("json", json.dumps({_KEY: "x"}))):
        try:
            text = render(_probe(arguments))
        except ValueError:
            continue
        printed_as_python = f"'{_KEY}'" in text
        if _NAME in text and _RESULT in text and not printed_as_python:
            return "mapping" if form == "mapping" else "json"
    return "text"


def _probe(arguments: Any) -> Messages:
    """A conversation with a call and its result. The id has the form that the strictest templates ask for."""
    call = {"id": "call00000", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return (
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00000", "name": _NAME, "content": _RESULT},
    )


def _with_mappings(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return message
    functions = [(call, call["function"]) for call in message["tool_calls"]]
    read = [{**call, "function": {**each, "arguments": _read(each["arguments"])}} for call, each in functions]
    return {**message, "tool_calls": read}


def _read(arguments: Any) -> Any:
    """Arguments as a mapping; those that are no JSON object stay as they are."""
    try:
        values = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return arguments
    return values if isinstance(values, dict) else arguments


def _as_text(messages: Messages) -> list[dict[str, Any]]:
    """Each call in the content of its message, and the results behind it as one message of the user."""
    written: list[dict[str, Any]] = []
    for before, message in zip([None, *messages], messages, strict=False):
        if message["role"] != "tool":
            written.append(_called(message))
            continue
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        if before is not None and before["role"] == "tool":
            written[-1]["content"] += f"\n{result}"
        else:
            written.append({"role": "user", "content": result})
    return written


def _called(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [_spelled(call["function"]) for call in message.get("tool_calls") or ()]
    said = [message["content"]] if message["content"] or not calls else []
    return {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": "\n".join([*said, *calls])}


def _spelled(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    as_json = isinstance(_read(arguments), dict)
    text = arguments if as_json else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {text}}}\n</tool_call>'
