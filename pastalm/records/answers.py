"""Answers on disk: one JSON object a line, written by `pasta sample` and `pasta eval`, read by all who look at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pastalm.core.language import Async, Document, parse, strip
from pastalm.core.transcript import Transcript
from pastalm.errors import DataError, LanguageError
from pastalm.records import jsonl
from pastalm.records.jsonl import Bad
from pastalm.records.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to one prompt. choice: which of several. sequential: decoded with forking off. annotated:
    PASTA-LANG. tokens: with tags; critical_path, steps: as in SPEC "Figures". seconds: to its end, first_seconds: to
    the first character that a reader sees; matched_seconds: the same text decoded sequentially, forced (None: not
    measured). threads: of `Transcript.to_dict`, where kept. token_ids: all decoded tokens in linear order, tags too,
    under the model that answered; forced: the places in it of those that no thread sampled. Both empty: not kept.
    category: of the prompt."""

    id: str
    choice: int = 0
    prompt: str
    sequential: bool = False
    annotated: str
    tokens: int
    critical_path: int
    steps: int = 0
    finish_reason: str
    seconds: float | None = None
    first_seconds: float | None = None
    matched_seconds: float | None = None
    threads: tuple[dict[str, Any], ...] = ()
    token_ids: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    category: str = ""
    source: str = ""
    licence: str = ""

    @property
    def key(self) -> tuple[str, int, bool]:
        """What no two answers of a file share."""
        return self.id, self.choice, self.sequential

    @property
    def document(self) -> Document:
        return parse(self.annotated)

    @property
    def text(self) -> str:
        """The reader's text."""
        return strip(self.document)

    @property
    def chunks(self) -> tuple[str, ...]:
        """The texts of all chunks, nested ones too."""
        return tuple(_chunks(self.document))

    def to_dict(self) -> dict[str, Any]:
        """Without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != ()}


def _chunks(document: Document) -> Iterator[str]:
    for node in document:
        if isinstance(node, Async):
            yield strip(node.body)
            yield from _chunks(node.body)


def to(prompt: Prompt, **measured: Any) -> Answer:
    """An answer to a prompt, with all that is known of that."""
    return Answer(
        id=prompt.id,
        prompt=prompt.text,
        category=prompt.category,
        source=prompt.source,
        licence=prompt.licence,
        **measured,
    )


def figures(transcript: Transcript) -> dict[str, Any]:
    """The fields of an Answer that a finished response tells."""
    return {
        "annotated": transcript.annotated,
        "tokens": transcript.tokens,
        "critical_path": transcript.critical_path,
        "steps": transcript.steps,
        "finish_reason": str(transcript.finish_reason),
        "seconds": round(transcript.seconds, 4),
    }


def sampled(transcript: Transcript) -> dict[str, Any]:
    """The fields of an Answer that say which tokens it is made of. Of an answer that a stop string cut: none, as its
    tokens say more than its text."""
    if transcript.was_cut:
        return {}
    tokens = list(transcript.sampled_tokens())
    return {
        "token_ids": tuple(token for token, _ in tokens),
        "forced": tuple(place for place, (_, by_thread) in enumerate(tokens) if not by_thread),
    }


KIND = jsonl.Kind(
    command="sample",
    name="an answer",
    fields=("id", "prompt", "annotated", "finish_reason", "choice", "tokens", "critical_path"),
)
"""Rows of `pasta sample`."""
_NUMBERS = ("choice", "tokens", "critical_path")


def read(path: Path, *, bad: Bad | None = None) -> list[Answer]:
    """All answers of a file, their PASTA-LANG checked. Raises DataError with the line that cannot be read, unless `bad`
    takes it."""
    found = list(parsed(jsonl.read(path, bad=bad), bad=bad))
    if not found:
        raise DataError(f"{path} has no answers: sample some first (pasta sample)")
    return found


def parsed(rows: Iterable[tuple[str, dict[str, Any]]], *, bad: Bad | None = None) -> Iterator[Answer]:
    """The answers that rows stand for. Raises DataError for one that is none, unless `bad` takes it."""
    for where, row in rows:
        try:
            yield _answer(where, row)
        except DataError as error:
            if bad is None:
                raise
            bad(error)


def _answer(where: str, row: Mapping[str, Any]) -> Answer:
    if missing := [key for key in KIND.fields if key not in row]:
        raise DataError(f"{where}: not an answer ({missing[0]!r} is missing): use another file")
    names = {f.name for f in fields(Answer)}
    known = {key: value for key, value in row.items() if key in names}
    known |= {key: jsonl.string(row, key, where) for key in KIND.fields if key not in _NUMBERS}
    try:
        known |= {key: int(row[key]) for key in _NUMBERS}
        known["threads"] = tuple(row.get("threads", ()))
        known |= {key: tuple(map(int, row.get(key, ()))) for key in ("token_ids", "forced")}
        answer = Answer(**known)
        parse(answer.annotated)
    except (TypeError, ValueError, LanguageError) as error:
        raise DataError(f"{where}: not an answer ({error}): sample it again (pasta sample)") from None
    return answer


def results(
    path: Path, kind: jsonl.Kind, made: Mapping[str, Any], asked: Sequence[Prompt], *, overwrite: bool = False
) -> tuple[jsonl.Results, list[Answer]]:
    """A file that answers are written to, and those that are there. In the end they stand in order of the prompts.
    Raises DataError as `jsonl.Results`, also for an answer to another prompt of the same id."""
    places = jsonl.by_place((prompt.id for prompt in asked), lambda row: row["id"])
    file = jsonl.Results(
        path,
        kind,
        made,
        overwrite=overwrite,
        order=lambda row: (places(row), row["choice"], not row.get("sequential", False)),
    )
    texts = {prompt.id: prompt.text for prompt in asked}
    there = list(parsed(file.rows))
    for found in there:
        if texts.get(found.id, found.prompt) != found.prompt:
            raise DataError(
                f"{path} answers another prompt of id {found.id!r}: give another file, or --overwrite to start anew"
            )
    return file, there
