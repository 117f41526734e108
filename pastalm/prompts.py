"""Prompts from files, in the forms that the field's benchmarks have; the first turn of each.

| form | fields |
| --- | --- |
| plain | `id`, `prompt`; where known `category`, `source`, `licence`, `reference` or `response` |
| AlpacaEval (Li et al. 2023) | `index`, `instruction`, `dataset`, `output` or `outputs` by model |
| MT-bench, Vicuna (Zheng et al. 2023), Spec-Bench (Xia et al. 2024) | `question_id`, `turns`, `category`, `reference` |
| independent sub-queries (as in ParallelPrompt, Kolawole et al. 2025) | `id`, `queries`: asked as one list |

A file is JSONL, or one JSON list, as AlpacaEval's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pastalm import jsonl
from pastalm.errors import DataError


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


def read(path: Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, or its first `limit`. Raises DataError with the line or entry that is none, or an id
    that two share."""
    found: dict[str, Prompt] = {}
    for place, (where, row) in enumerate(islice(_rows(path), limit)):
        prompt = _prompt(row, where, place)
        if prompt.id in found:
            raise DataError(f"{where}: id {prompt.id!r} was there before; give each prompt its own")
        found[prompt.id] = prompt
    return list(found.values())


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            is_list = file.read(1) == "["
        rows = json.loads(path.read_text(encoding="utf-8")) if is_list else None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; give a JSON or JSONL file") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON list ({error}); give a JSON or JSONL file") from None
    if rows is None:
        yield from jsonl.read(path)
        return
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, entry {number}: not a JSON object")
        yield f"{path}, entry {number}", row


def _prompt(row: Mapping[str, Any], where: str, place: int) -> Prompt:
    identity = next((row[key] for key in ("id", "question_id", "index") if key in row), place)
    return Prompt(
        id=jsonl.string({"id": identity}, "id", where),
        text=_text(row, where),
        category=str(row.get("category", row.get("dataset", ""))),
        references=tuple(_references(row)),
        source=jsonl.string(row, "source", where, needed=False),
        licence=jsonl.string(row, "licence", where, needed=False),
    )


def _text(row: Mapping[str, Any], where: str) -> str:
    if "queries" in row:
        queries = row["queries"]
        if not isinstance(queries, list) or not queries or not all(isinstance(q, str) for q in queries):
            raise DataError(f"{where}: 'queries' must be a list of strings")
        return "\n".join(["Answer each of these:", *(f"{i}. {query}" for i, query in enumerate(queries, 1))])
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise DataError(f"{where}: 'turns' must be a list of strings")
        return turns[0]
    return jsonl.string(row, "instruction" if "instruction" in row else "prompt", where)


def _references(row: Mapping[str, Any]) -> Iterator[str]:
    for key in ("reference", "response", "output"):
        found = row.get(key)
        if isinstance(found, str):
            yield found
        elif isinstance(found, list) and found and isinstance(found[0], str):
            yield found[0]
    outputs = row.get("outputs")
    if isinstance(outputs, dict):
        yield from (text for text in outputs.values() if isinstance(text, str))
