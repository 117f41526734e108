"""Prompts from files, in the forms that the field's data and benchmarks have; the first turn of each.

| form | fields |
| --- | --- |
| plain | `id`, `prompt`; where known `category`, `source`, `licence`, `reference` or `response` |
| Alpaca (Taori et al. 2023) | `instruction`, `input`, `output`; the input stands below the instruction |
| AlpacaEval (Li et al. 2023) | `index`, `instruction`, `dataset`, `output` or `outputs` by model |
| messages, as OpenAI's | `messages`: [{`role`, `content`}] (or `prompt` and `completion` as such lists) |
| ShareGPT | `conversations`: [{`from`, `value`}] |
| MT-bench, Vicuna (Zheng et al. 2023), Spec-Bench (Xia et al. 2024) | `question_id`, `turns`, `category`, `reference` |
| independent sub-queries (as in ParallelPrompt, Kolawole et al. 2025) | `id`, `queries`: asked as one list |

Of a conversation the first thing that the user says is the prompt, and what is answered to it a reference; a system
message is left out. Files are as jsonl.py reads them: JSONL or one JSON list, gzipped or not.
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
"""Where an answer to a prompt may stand."""
_USERS = ("user", "human")
_ASSISTANTS = ("assistant", "gpt", "chatgpt", "model", "bot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """id: a whole number or a string in the file, else the place in it. references: good answers, where known.
    source and licence: of the prompt."""

    id: str
    text: str
    category: str = ""
    references: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""


def read(path: Path, limit: int | None = None, *, bad: Bad | None = None) -> list[Prompt]:
    """The prompts of a file, or of its first `limit` rows. Raises DataError with the line or entry that is none, or an
    id that two share, unless `bad` takes it."""
    found: dict[str, Prompt] = {}
    for where, _, prompt in rows(path, limit, bad=bad):
        if prompt.id not in found:
            found[prompt.id] = prompt
            continue
        error = DataError(f"{where}: id {prompt.id!r} was there before; give each prompt its own")
        if bad is None:
            raise error
        bad(error)
    return list(found.values())


def rows(
    path: Path, limit: int | None = None, *, bad: Bad | None = None
) -> Iterator[tuple[str, dict[str, Any], Prompt]]:
    """(where, row, prompt) of a file, or of its first `limit` rows. Raises DataError for a row that has none, unless
    `bad` takes it."""
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
    """The first reference of each id; prompts need not stand beside them. Raises DataError as `read`."""
    found: dict[str, str] = {}
    for place, (where, row) in enumerate(jsonl.entries(path)):
        try:
            if isinstance(row, DataError):
                raise row
            if (reference := next(_references(row, where), None)) is not None:
                found.setdefault(identity(row, where, place), reference)
        except DataError as error:
            if bad is None:
                raise error from None
            bad(error)
    return found


def identity(row: Mapping[str, Any], where: str, place: int) -> str:
    """The id of a row, else its place in the file. Raises DataError for one that is no id."""
    given = next((row[key] for key in IDS if row.get(key) is not None), place)
    return jsonl.string({"id": given}, "id", where)


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
        asked = ["Answer each of these:", *(f"{i}. {query}" for i, query in enumerate(queries, 1))]
        return jsonl.text("\n".join(asked), "queries", where)
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
    """Under which key a row has messages."""
    return next((key for key in ("messages", "conversations", "prompt") if isinstance(row.get(key), list)), None)


def _first_turn(messages: Sequence[Any], key: str, where: str) -> tuple[str, str | None]:
    """What a user says first, and what is answered to it. Raises DataError."""
    said = [_message(message, key, where) for message in messages]
    asked = next((place for place, (role, _) in enumerate(said) if role in _USERS), None)
    if asked is None:
        raise DataError(f"{where}: {key!r} has no message of a user")
    role, text = said[asked + 1] if asked + 1 < len(said) else ("", "")
    return said[asked][1], text if role in _ASSISTANTS else None


def _message(message: Any, key: str, where: str) -> tuple[str, str]:
    """Who says what, in OpenAI's or in ShareGPT's form."""
    if isinstance(message, dict):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if content is None and role in _ASSISTANTS:  # it called a tool
            content = ""
        if isinstance(role, str) and isinstance(content, str):
            return role, jsonl.text(content, key, where)
    raise DataError(
        f"{where}: {key!r} must be a list of {{'role', 'content'}} or {{'from', 'value'}}, got {message!r:.40}"
    )


def _references(row: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in REPLIES:
        found = row.get(key)
        if isinstance(found, list) and found:
            found = found[0] if not isinstance(found[0], dict) else _message(found[0], key, where)[1]
        if isinstance(found, str):
            yield jsonl.text(found, key, where)
    if (key := _conversation(row) or "") and (reply := _first_turn(row[key], key, where)[1]) is not None:
        yield reply
    outputs = row.get("outputs")
    if isinstance(outputs, dict):
        yield from (jsonl.text(text, "outputs", where) for text in outputs.values() if isinstance(text, str))
