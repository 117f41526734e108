"""Answers on disk: JSONL, one answer a line, written by `pasta sample` and `pasta eval`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pastalm.core.transcript import Transcript
from pastalm.errors import DataError, LanguageError
from pastalm.records import jsonl
from pastalm.records.documents import Async, Document, parse, strip
from pastalm.records.jsonl import Bad
from pastalm.records.prompts import Prompt
from pastalm.records.transcripts import linear_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to one prompt.

    id: the prompt's id.
    choice: which of the prompt's answers this is.
    prompt: the prompt's text.
    sequential: decoded with forking off.
    annotated: the answer as PASTA-LANG.
    tokens: decoded tokens, tags included.
    critical_path: tokens on the longest chain of dependent tokens (SPEC "Figures").
    steps: engine steps; None if not counted.
    passes: forward passes; fewer than steps where drafts came true. None if not counted.
    finish_reason: "stop", "length", ...
    seconds: wall-clock time to the end; None if not measured, as the next two.
    first_seconds: time to the first character that a reader sees.
    matched_seconds: time of decoding the same text sequentially, with forced tokens.
    threads: as `records.transcripts.threads` gives them; empty if not stored.
    token_ids: all decoded tokens in linear order, tags included; empty if not stored.
    forced: indices into token_ids of the tokens that no thread sampled.
    category, source, licence: the prompt's.
    """

    id: str
    choice: int = 0
    prompt: str
    sequential: bool = False
    annotated: str
    tokens: int
    critical_path: int
    steps: int | None = 0
    passes: int | None = None
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
        """Unique in a file."""
        return self.id, self.choice, self.sequential

    @property
    def document(self) -> Document:
        return parse(self.annotated)

    @property
    def text(self) -> str:
        """The text without tags, as a reader sees it."""
        return strip(self.document)

    @property
    def chunks(self) -> tuple[str, ...]:
        """The texts of all chunks, including nested ones."""
        return tuple(_chunks(self.document))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without fields that were not measured or stored."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != ()}


def _chunks(document: Document) -> Iterator[str]:
    for node in document:
        if isinstance(node, Async):
            yield strip(node.body)
            yield from _chunks(node.body)


def to(prompt: Prompt, **measured: Any) -> Answer:
    """An Answer with the prompt's fields filled in. measured: the other fields."""
    return Answer(
        id=prompt.id,
        prompt=prompt.text,
        category=prompt.category,
        source=prompt.source,
        licence=prompt.licence,
        **measured,
    )


def figures(transcript: Transcript) -> dict[str, Any]:
    """The fields of an Answer that come from a finished response."""
    return {
        "annotated": transcript.annotated,
        "tokens": transcript.tokens,
        "critical_path": transcript.critical_path,
        "steps": transcript.steps,
        "passes": transcript.passes,
        "finish_reason": str(transcript.finish_reason),
        "seconds": round(transcript.seconds, 4),
    }


def sampled(transcript: Transcript) -> dict[str, Any]:
    """The token fields of an Answer. Empty if a stop string cut the answer: then its tokens do not match its text."""
    if transcript.cut is not None:
        return {}
    tokens = list(linear_tokens(transcript))
    return {
        "token_ids": tuple(one.token for one in tokens),
        "forced": tuple(place for place, one in enumerate(tokens) if not one.sampled),
    }


KIND = jsonl.Kind(
    command="sample",
    name="an answer",
    fields=("id", "prompt", "annotated", "finish_reason", "choice", "tokens", "critical_path"),
)
"""Rows of `pasta sample`."""
_NUMBERS = ("choice", "tokens", "critical_path")


def read(path: Path, *, bad: Bad | None = None) -> list[Answer]:
    """All answers of a file. Raises DataError for the first invalid row, unless `bad` is given; also if there is no
    answer."""
    answers = list(parsed(jsonl.read(path, bad=bad), bad=bad))
    if not answers:
        raise DataError(f"{path} has no answers: sample some first (pasta sample)")
    return answers


def parsed(rows: Iterable[tuple[str, dict[str, Any]]], *, bad: Bad | None = None) -> Iterator[Answer]:
    """Parses rows, (where, row), into answers. Raises DataError for an invalid row, unless `bad` is given."""
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
    values = {key: value for key, value in row.items() if key in names}
    values |= {key: jsonl.string(row, key, where) for key in KIND.fields if key not in _NUMBERS}
    try:
        values |= {key: int(row[key]) for key in _NUMBERS}
        values["threads"] = tuple(row.get("threads", ()))
        values |= {key: tuple(map(int, row.get(key, ()))) for key in ("token_ids", "forced")}
        answer = Answer(**values)
        parse(answer.annotated)
    except (TypeError, ValueError, LanguageError) as error:
        raise DataError(f"{where}: not an answer ({error}): sample it again (pasta sample)") from None
    return answer


def results(
    path: Path, kind: jsonl.Kind, header: Mapping[str, Any], prompts: Sequence[Prompt], *, overwrite: bool = False
) -> tuple[jsonl.Results, list[Answer]]:
    """Opens a file for answers. Returns it and the answers that it has already. On exit it is sorted by prompt.

    path: the JSONL file.
    kind: the kind of its rows.
    header: what determines the rows, for the file's header.
    prompts: the prompts, in order.
    overwrite: delete the answers that the file has.

    Raises DataError as `jsonl.Results`, and if the file answers a different prompt with the same id.
    """
    places = jsonl.by_place((prompt.id for prompt in prompts), lambda row: row["id"])
    file = jsonl.Results(
        path,
        kind,
        header,
        overwrite=overwrite,
        order=lambda row: (places(row), row["choice"], not row.get("sequential", False)),
    )
    texts = {prompt.id: prompt.text for prompt in prompts}
    existing = list(parsed(file.rows))
    for answer in existing:
        if texts.get(answer.id, answer.prompt) != answer.prompt:
            raise DataError(
                f"{path} answers another prompt with id {answer.id!r}: give another file, or --overwrite to start again"
            )
    return file, existing
