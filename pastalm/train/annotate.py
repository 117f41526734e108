"""Files of answers -> files of annotated answers, the training data of stage 1, by any annotator.

An annotator marks the independent parts of a row's response in PASTA-LANG: structure.py by reading lists and
titles, annotate_remote.py by asking a large language model (the paper's way, section 5.1). Whatever it is, what is
written here strips to the response byte for byte; a row for which it does not is dropped, and its reason counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pastalm.core.language import Document, Promise, parse, render, strip
from pastalm.errors import DataError, LanguageError
from pastalm.records import jsonl, prompts
from pastalm.records.jsonl import Bad
from pastalm.records.prompts import Prompt
from pastalm.records.repetition import repetition
from pastalm.train.structure import CountTokens, annotate


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """A prompt with its response. cut: the response is not whole."""

    id: str
    prompt: str
    response: str
    source: str = ""
    licence: str = ""
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Annotated:
    """A row with its marks, `annotated` in text form. tokens: of the plain response."""

    id: str
    prompt: str
    annotated: str
    tokens: int
    chunks: int
    source: str = ""
    licence: str = ""


@dataclass(frozen=True, slots=True)
class AnnotationCounts:
    """What became of the rows of a file. dropped: rows by the reason they were left out."""

    read: int = 0
    skipped: int = 0
    written: int = 0
    structured: int = 0
    chunks: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


class Annotator(Protocol):
    """Takes rows as it can work on them; gives each once, in any order, with its document or why it has none."""

    def __call__(self, rows: Iterable[PlainAnswer]) -> Iterator[tuple[PlainAnswer, Document | str]]: ...


def structural(response: str, count_tokens: CountTokens, prompt: str) -> Document:
    """The rules of structure.py."""
    return annotate(response, count_tokens, prompt=prompt)


@dataclass(frozen=True, slots=True)
class Structural:
    """An annotator by rules, without a model. rules: response, token counter and prompt -> document."""

    count_tokens: CountTokens
    rules: Callable[[str, CountTokens, str], Document] = structural

    def __call__(self, rows: Iterable[PlainAnswer]) -> Iterator[tuple[PlainAnswer, Document | str]]:
        for row in rows:
            yield row, self.rules(row.response, self.count_tokens, row.prompt)


FORMS = (
    "give each row a 'prompt' and a 'response' (or 'instruction', 'input' and 'output'; 'messages'; 'conversations')"
)


def read_rows(source: Path, limit: int | None = None, *, bad: Bad | None = None) -> Iterator[PlainAnswer]:
    """The rows of a file, or its first `limit`: prompts with answers in any form that prompts.py reads, or what
    `pasta sample` wrote. Raises DataError, with the line, for what is none, unless `bad` takes it."""
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
    """Why a row is not worth annotating, if it is not. max_repetition: share of its runs of words said before."""
    if not row.prompt.strip():
        return "empty prompt"
    if not row.response.strip():
        return "empty response"
    if row.cut:
        return "cut off"
    return "repetitive" if repetition(row.response) > max_repetition else None


def checked(row: PlainAnswer, document: Document | str, count_tokens: CountTokens) -> Annotated | str:
    """What is written for a row, or why nothing is."""
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
    """Each row annotated; one whose text would not be kept is left out."""
    for row, document in annotator(row for row in rows if unusable(row) is None):
        result = checked(row, document, count_tokens)
        if isinstance(result, Annotated):
            yield result


@dataclass(slots=True)
class _Run:
    """What became of the rows so far, and which are still to be annotated. present: text of what is annotated already,
    by id."""

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
                        f"{self.target} holds another text of id {row.id!r}: give another file, or --overwrite to "
                        "start anew"
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
    """Annotates a file of rows into another, line by line, and goes on where it stopped.

    Rows whose id stands in `target` are skipped. limit: rows of `source` to look at. max_repetition: rows that
    say more of their words again are dropped. models: what annotates and what counts tokens, for the file's header.
    overwrite: rows that are there make way. bad: is told of rows that cannot be read. progress: called after every row.
    Raises DataError for a file or line that cannot be read, or was made otherwise, RemoteError for a server.
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
    """The rows; where each first stands is put into `places`."""
    for row in rows:
        places.setdefault(row.id, len(places))
        yield row
