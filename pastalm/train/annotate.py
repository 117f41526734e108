"""Annotates answers: makes the training data of stage 1.

An annotator marks the independent parts of a response in PASTA-LANG: structure.py by rules for lists and titles,
annotate_remote.py with a large language model (as in the paper, section 5.1). Without its tags, every annotated answer
equals the response byte for byte. Rows for which it does not are dropped, and counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pastalm.core.language import Promise
from pastalm.errors import DataError, LanguageError
from pastalm.records import jsonl, prompts
from pastalm.records.documents import Document, parse, render, strip
from pastalm.records.jsonl import Bad
from pastalm.records.prompts import Prompt
from pastalm.records.repetition import repetition
from pastalm.train.structure import CountTokens, annotate


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """A prompt with its response. cut: the response did not end by itself."""

    id: str
    prompt: str
    response: str
    source: str = ""
    licence: str = ""
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Annotated:
    """An annotated answer. annotated: PASTA-LANG. tokens: of the response without tags. chunks: their number."""

    id: str
    prompt: str
    annotated: str
    tokens: int
    chunks: int
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class AnnotationCounts:
    """Progress of a run.

    read: rows read.
    skipped: rows that the target file already had.
    written: rows written.
    structured: rows written with two or more chunks.
    chunks: chunks in all rows written.
    dropped: number of rows left out, by reason.
    """

    read: int = 0
    skipped: int = 0
    written: int = 0
    structured: int = 0
    chunks: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


class Annotator(Protocol):
    """Yields each row once, in any order, with its document or the reason why it has none. Reads rows as needed."""

    def __call__(self, rows: Iterable[PlainAnswer]) -> Iterator[tuple[PlainAnswer, Document | str]]: ...


def structural(response: str, count_tokens: CountTokens, prompt: str) -> Document:
    """The rules of structure.py."""
    return annotate(response, count_tokens, prompt=prompt)


@dataclass(frozen=True, slots=True)
class Structural:
    """An annotator that uses rules, no model. rules: (response, token counter, prompt) -> document."""

    count_tokens: CountTokens
    rules: Callable[[str, CountTokens, str], Document] = structural

    def __call__(self, rows: Iterable[PlainAnswer]) -> Iterator[tuple[PlainAnswer, Document | str]]:
        for row in rows:
            yield row, self.rules(row.response, self.count_tokens, row.prompt)


FORMS = (
    "give each row a 'prompt' and a 'response' (or 'instruction', 'input' and 'output'; 'messages'; 'conversations')"
)


def read_rows(source: Path, limit: int | None = None, *, bad: Bad | None = None) -> Iterator[PlainAnswer]:
    """Yields the rows of a file: prompts with answers in any format of prompts.py, or rows of `pasta sample`.

    source: the file.
    limit: read only so many rows.
    bad: called with the error for each invalid row, which is then skipped. None: the error is raised.

    Raises DataError.
    """
    for where, value, prompt in prompts.rows(source, limit, bad=bad):
        try:
            yield _row(where, value, prompt)
        except DataError as error:
            if bad is None:
                raise
            bad(error)


def _row(where: str, value: Mapping[str, object], prompt: Prompt) -> PlainAnswer:
    sampled = "response" not in value and "annotated" in value
    return PlainAnswer(
        id=prompt.id,
        prompt=prompt.text,
        response=_plain(value, where) if sampled else _response(value, prompt, where),
        source=prompt.source,
        licence=prompt.licence,
        cut=sampled and value.get("finish_reason") != "stop",
    )


def _response(value: Mapping[str, object], prompt: Prompt, where: str) -> str:
    if "response" in value and not isinstance(value["response"], list):
        return jsonl.string(value, "response", where)
    if not prompt.references:
        raise DataError(f"{where}: 'response' must be a string, got None; {FORMS}")
    return prompt.references[0]


def _plain(value: Mapping[str, object], where: str) -> str:
    try:
        return strip(parse(jsonl.string(value, "annotated", where)))
    except LanguageError as error:
        raise DataError(f"{where}: {error}") from None


def unusable(row: PlainAnswer, max_repetition: float = 1.0) -> str | None:
    """The reason why a row is not annotated; None if it is. max_repetition: largest allowed share of repeated
    4-grams."""
    if not row.prompt.strip():
        return "empty prompt"
    if not row.response.strip():
        return "empty response"
    if row.cut:
        return "cut off"
    return "repetitive" if repetition(row.response) > max_repetition else None


def checked(row: PlainAnswer, document: Document | str, count_tokens: CountTokens) -> Annotated | str:
    """The annotated answer to write, or the reason to drop the row.

    row: the row.
    document: its annotation, or the reason why there is none.
    count_tokens: counts the tokens of a text.
    """
    if isinstance(document, str):
        return document
    text = render(document)
    try:
        jsonl.text(text, "annotated", row.id)
        unchanged = strip(parse(text)) == row.response
    except (DataError, LanguageError):
        unchanged = False
    if not unchanged:
        return "text not kept"
    chunks = sum(isinstance(node, Promise) for node in document)
    return Annotated(row.id, row.prompt, text, count_tokens(row.response), chunks, row.source, row.licence)


def annotate_rows(rows: Iterable[PlainAnswer], annotator: Annotator, count_tokens: CountTokens) -> Iterator[Annotated]:
    """Yields the annotated rows; rows whose annotation is invalid are left out."""
    for row, document in annotator(row for row in rows if unusable(row) is None):
        result = checked(row, document, count_tokens)
        if isinstance(result, Annotated):
            yield result


@dataclass(slots=True)
class _Run:
    """State of a run. present: (prompt, response) of the rows that are annotated already, by id."""

    target: Path
    present: Mapping[str, tuple[str, str]]
    progress: Callable[[AnnotationCounts], None]
    max_repetition: float
    seen: set[str] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    read: int = 0
    skipped: int = 0
    written: int = 0
    structured: int = 0
    chunks: int = 0

    @property
    def counts(self) -> AnnotationCounts:
        return AnnotationCounts(self.read, self.skipped, self.written, self.structured, self.chunks, dict(self.dropped))

    def todo(self, rows: Iterable[PlainAnswer]) -> Iterator[PlainAnswer]:
        for row in rows:
            self.read += 1
            why = "duplicate id" if row.id in self.seen else unusable(row, self.max_repetition)
            self.seen.add(row.id)
            if row.id in self.present and why is None:
                if self.present[row.id] != (row.prompt, row.response):
                    raise DataError(
                        f"{self.target} has another text for id {row.id!r}: give another file, or --overwrite to "
                        "start again"
                    )
                self.skipped += 1
            elif why is not None:
                self.drop(why)
            else:
                yield row
                continue
            self.progress(self.counts)

    def drop(self, why: str) -> None:
        self.dropped[why] += 1

    def keep(self, result: Annotated) -> None:
        self.written += 1
        self.structured += result.chunks >= 2
        self.chunks += result.chunks


KIND = jsonl.Kind(
    command="annotate", name="an annotated answer", fields=("id", "prompt", "annotated", "tokens", "chunks")
)
"""Rows of `pasta annotate`."""


def annotate_file(
    source: Path,
    target: Path,
    annotator: Annotator,
    count_tokens: CountTokens,
    *,
    limit: int | None = None,
    max_repetition: float = 1.0,
    models: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    bad: Bad | None = None,
    progress: Callable[[AnnotationCounts], None] = lambda _: None,
) -> AnnotationCounts:
    """Annotates the rows of a file and writes them to another. Resumes: rows that `target` has are skipped.

    source: the file to annotate.
    target: the file to write.
    annotator: marks the rows.
    count_tokens: counts the tokens of a text.
    limit: read only so many rows of `source`.
    max_repetition: drop rows with a larger share of repeated 4-grams.
    models: name and hash of the models used, for the file's header.
    overwrite: delete the rows that `target` has.
    bad: called with the error for each invalid row. None: the error is raised.
    progress: called after each row.

    Raises DataError if a file or row cannot be read, or `target` was made with other settings; RemoteError if a server
    fails.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError(f"{target} is what is to be annotated: give another file for the result")
    places: dict[str, int] = {}
    results = jsonl.Results(
        target,
        KIND,
        {**(models or {}), "max_repetition": max_repetition},
        overwrite=overwrite,
        order=lambda row: places.get(row["id"], len(places)),
    )
    run = _Run(target, dict(_present(results)), progress, max_repetition)
    rows = _noted(read_rows(source, limit, bad=bad), places)
    with results as file:
        for row, document in annotator(run.todo(rows)):
            result = checked(row, document, count_tokens)
            if isinstance(result, Annotated):
                file.write(asdict(result))
                run.keep(result)
            else:
                run.drop(result)
            progress(run.counts)
    return run.counts


def _present(results: jsonl.Results) -> Iterator[tuple[str, tuple[str, str]]]:
    for where, row in results.rows:
        yield jsonl.string(row, "id", where), (jsonl.string(row, "prompt", where), _plain(row, where))


def _noted(rows: Iterable[PlainAnswer], places: dict[str, int]) -> Iterator[PlainAnswer]:
    """Passes the rows on and stores the index of each id in `places`."""
    for row in rows:
        places.setdefault(row.id, len(places))
        yield row
