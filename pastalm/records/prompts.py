"""Reads prompts from files, in the formats of common data sets and benchmarks. Only the first turn is used.

| format | fields |
| --- | --- |
| plain | `id`, `prompt`; optional `category`, `source`, `licence`, `reference` or `response` |
| Alpaca (Taori et al. 2023) | `instruction`, `input`, `output`; the input is appended to the instruction |
| AlpacaEval (Li et al. 2023) | `index`, `instruction`, `dataset`, `output` or `outputs` by model |
| OpenAI's messages | `messages`: [{`role`, `content`}] (or `prompt` and `completion` as such lists) |
| ShareGPT | `conversations`: [{`from`, `value`}] |
| MT-bench, Vicuna (Zheng et al. 2023), Spec-Bench (Xia et al. 2024) | `question_id`, `turns`, `category`, `reference` |
| independent sub-queries (as in ParallelPrompt, Kolawole et al. 2025) | `id`, `queries`: sent as one numbered list |

The prompt of a conversation is its first user message, and the answer to that is a reference; system messages are
ignored. Files are JSONL or one JSON list, gzipped or not (jsonl.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pastalm.errors import DataError
from pastalm.records import jsonl
from pastalm.records.jsonl import Bad

FORMS = "give each row a 'prompt', an 'instruction' (and 'input'), 'messages', 'conversations', 'turns' or 'queries'"
IDS = ("id", "question_id", "prompt_id", "index")
REPLIES = ("reference", "response", "completion", "output")
"""Fields that may contain a reference answer."""
_USERS = ("user", "human")
_ASSISTANTS = ("assistant", "gpt", "chatgpt", "model", "bot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt.

    id: from the file (a string or an integer), else the index of the row.
    text: what the user asks.
    category: of the prompt, "" if unknown.
    references: reference answers.
    source, licence: of the prompt, "" if unknown.
    """

    id: str
    text: str
    category: str = ""
    references: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""


def read(path: Path, limit: int | None = None, *, bad: Bad | None = None) -> list[Prompt]:
    """The prompts of a file.

    path: the file.
    limit: read only so many rows.
    bad: called with the error for each invalid row, which is then skipped. None: the error is raised.

    Raises DataError for an invalid row, a duplicate id, or a file that cannot be read.
    """
    prompts: dict[str, Prompt] = {}
    for where, _, prompt in rows(path, limit, bad=bad):
        if prompt.id not in prompts:
            prompts[prompt.id] = prompt
            continue
        error = DataError(f"{where}: duplicate id {prompt.id!r}; give each prompt its own id")
        if bad is None:
            raise error
        bad(error)
    return list(prompts.values())


def rows(
    path: Path, limit: int | None = None, *, bad: Bad | None = None
) -> Iterator[tuple[str, dict[str, Any], Prompt]]:
    """Yields (where, row, prompt) for each row of a file; arguments as `read`. Raises DataError for a row without a
    valid prompt, unless `bad` is given."""
    for place, (where, row) in enumerate(islice(jsonl.entries(path), limit)):
        try:
            if isinstance(row, DataError):
                raise row
            prompt = _prompt(row, where, place)
        except DataError as error:
            if bad is None:
                raise error from None
            bad(error)
            continue
        yield where, row, prompt


def read_references(path: Path, *, bad: Bad | None = None) -> dict[str, str]:
    """The first reference of each id. The rows need no prompt. Raises DataError as `read`."""
    references: dict[str, str] = {}
    for place, (where, row) in enumerate(jsonl.entries(path)):
        try:
            if isinstance(row, DataError):
                raise row
            if (reference := next(_references(row, where), None)) is not None:
                references.setdefault(identity(row, where, place), reference)
        except DataError as error:
            if bad is None:
                raise error from None
            bad(error)
    return references


def identity(row: Mapping[str, Any], where: str, place: int) -> str:
    """The id of a row, else its index in the file. Raises DataError if the id is invalid."""
    value = next((row[key] for key in IDS if row.get(key) is not None), place)
    return jsonl.string({"id": value}, "id", where)


def _prompt(row: Mapping[str, Any], where: str, place: int) -> Prompt:
    category = row.get("category", row.get("dataset", ""))
    return Prompt(
        id=identity(row, where, place),
        text=_text(row, where),
        category=jsonl.text(str(category), "category", where),
        references=tuple(_references(row, where)),
        source=jsonl.string(row, "source", where, needed=False),
        licence=jsonl.string(row, "licence", where, needed=False),
    )


def _text(row: Mapping[str, Any], where: str) -> str:
    if "queries" in row:
        queries = row["queries"]
        if not isinstance(queries, list) or not queries or not all(isinstance(q, str) for q in queries):
            raise DataError(f"{where}: 'queries' must be a list of strings")
        lines = ["Answer each of these:", *(f"{i}. {query}" for i, query in enumerate(queries, 1))]
        return jsonl.text("\n".join(lines), "queries", where)
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise DataError(f"{where}: 'turns' must be a list of strings")
        return jsonl.text(turns[0], "turns", where)
    if (key := _conversation(row)) is not None:
        return _first_turn(row[key], key, where)[0]
    if "instruction" in row:
        parts = (jsonl.string(row, key, where, needed=key == "instruction") for key in ("instruction", "input"))
        return "\n\n".join(part for part in parts if part.strip())
    if not isinstance(row.get("prompt"), str):
        raise DataError(f"{where}: 'prompt' must be a string, got {row.get('prompt')!r:.40}; {FORMS}")
    return jsonl.string(row, "prompt", where)


def _conversation(row: Mapping[str, Any]) -> str | None:
    """The key of a row's list of messages; None if it has none."""
    return next((key for key in ("messages", "conversations", "prompt") if isinstance(row.get(key), list)), None)


def _first_turn(messages: Sequence[Any], key: str, where: str) -> tuple[str, str | None]:
    """The first user message, and the assistant's answer to it (None: none). Raises DataError."""
    turns = [_message(message, key, where) for message in messages]
    start = next((place for place, (role, _) in enumerate(turns) if role in _USERS), None)
    if start is None:
        raise DataError(f"{where}: {key!r} has no user message")
    role, text = turns[start + 1] if start + 1 < len(turns) else ("", "")
    return turns[start][1], text if role in _ASSISTANTS else None


def _message(message: Any, key: str, where: str) -> tuple[str, str]:
    """(role, text) of a message in OpenAI's or ShareGPT's format."""
    if isinstance(message, dict):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if content is None and role in _ASSISTANTS:  # a tool call
            content = ""
        if isinstance(role, str) and isinstance(content, str):
            return role, jsonl.text(content, key, where)
    raise DataError(
        f"{where}: {key!r} must be a list of {{'role', 'content'}} or {{'from', 'value'}}, got {message!r:.40}"
    )


def _references(row: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in REPLIES:
        value = row.get(key)
        if isinstance(value, list) and value:
            value = value[0] if not isinstance(value[0], dict) else _message(value[0], key, where)[1]
        if isinstance(value, str):
            yield jsonl.text(value, key, where)
    if (key := _conversation(row) or "") and (reply := _first_turn(row[key], key, where)[1]) is not None:
        yield reply
    outputs = row.get("outputs")
    if isinstance(outputs, dict):
        yield from (jsonl.text(text, "outputs", where) for text in outputs.values() if isinstance(text, str))
