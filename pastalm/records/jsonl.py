"""Files of one JSON object a line: read with the place named, written row by row, gone on with after a cut.

What is read (`read`): JSONL or one JSON list, gzipped or not, with or without a byte-order mark; header lines are
passed over. What is written (`Results`): a header that says what made the file, then a row a line:

    {"pasta": {"format": 1, "command": "sample", "model": {"name": …, "sha256": …}, "seed": 0, …}}
    {"id": "1", …}

A file is gone on with where all of that is what it was. Names are not compared, contents are.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pastalm.errors import DataError, RequestError, check_text
from pastalm.records import disk

HEADER = "pasta"
FORMAT = 1
Bad = Callable[[DataError], None]
"""Is told of a row that cannot be used; then that is left out. None: it ends the run."""


# ------------------------------------------------------------------------------ reading


def read(path: Path, *, bad: Bad | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every row of a file. Raises DataError for what is none, unless `bad` takes it."""
    for where, row in entries(path):
        if not isinstance(row, DataError):
            yield where, row
        elif bad is None:
            raise row
        else:
            bad(row)


def entries(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """As `read`; for a row that is no object, the error. Raises DataError for a file that cannot be read at all."""
    try:
        with _opened(path) as file:
            yield from _entries(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"cannot read {path}: its gzip data are not whole") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if file.peek(2)[:2] != b"\x1f\x8b":
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]


def _entries(path: Path, file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    lines = ((number, line) for number, line in enumerate(_without_mark(file), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith(b"["):
        yield from _listed(path, first[1] + file.read())
        return
    for number, line in itertools.chain([first], lines):
        where = f"{path}, line {number}"
        if (row := _row(line, where)) is not None:
            yield where, row


def _without_mark(file: IO[bytes]) -> Iterator[bytes]:
    """The lines without the byte-order mark that editors on Windows put first."""
    for number, line in enumerate(file):
        yield line if number else line.removeprefix(b"\xef\xbb\xbf")


def _row(line: bytes, where: str) -> dict[str, Any] | DataError | None:
    """None for a header."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return DataError(f"{where}: not UTF-8 text; give one JSON object a line")
    except (ValueError, RecursionError):
        return DataError(f"{where}: not a line of JSON; give one object a line")
    if not isinstance(value, dict):
        return DataError(f"{where}: not a JSON object; give one object a line")
    return None if _is_header(value) else value


def _listed(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    try:
        rows = json.loads(content.decode())
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; give a JSON or JSONL file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON list ({error}); give a JSON or JSONL file") from None
    for number, row in enumerate(rows, 1):
        where = f"{path}, entry {number}"
        yield where, row if isinstance(row, dict) else DataError(f"{where}: not a JSON object")


def string(value: Mapping[str, Any], key: str, where: str, *, needed: bool = True) -> str:
    """The string under a key (of `id` a whole number too); "" if it is missing and not needed. Raises DataError, also
    for one that is no text: half of a pair of surrogates, which no tokenizer takes and no file."""
    found = value.get(key, None if needed else "")
    if found is None and not needed:
        return ""
    if key == "id" and type(found) is int:
        return str(found)
    if not isinstance(found, str):
        raise DataError(f"{where}: {key!r} must be a string, got {found!r:.40}")
    return text(found, key, where)


def text(value: str, key: str, where: str) -> str:
    """The string itself, if it is text. Raises DataError."""
    try:
        check_text(value, f"{where}: {key!r}")
    except RequestError as error:
        raise DataError(str(error)) from None
    return value


# ------------------------------------------------------------------------------ what made a file


def _is_header(value: Mapping[str, Any]) -> bool:
    return set(value) == {HEADER} and isinstance(value[HEADER], dict)


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What two descriptions of a run do not have in common, in words. Of values with a `sha256` that alone counts."""
    keys = dict.fromkeys((*there, *asked))
    return [
        f"{key} is {_shown(there.get(key))}, asked for {_shown(asked.get(key))}"
        for key in keys
        if _compared(there.get(key)) != _compared(asked.get(key))
    ]


def _compared(value: Any) -> Any:
    if isinstance(value, Mapping) and "sha256" in value:
        return value["sha256"]
    return json.loads(json.dumps(value))  # as it is read again: tuples are lists there


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and "sha256" in value:
        return f"{value.get('name', '')} ({str(value['sha256'])[:8]})"
    return "none" if value is None else json.dumps(value)


def header(path: Path) -> dict[str, Any] | None:
    """What made a file; None where it does not say, or there is none."""
    try:
        with path.open("rb") as file:
            return _header_of(file.readline())
    except OSError:
        return None


# ------------------------------------------------------------------------------ writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a command writes. command: as in `pasta sample`. name: of a row, with its article. fields: that every row
    has."""

    command: str
    name: str
    fields: Sequence[str]


class Results:
    """A file of rows that a command writes, or goes on with. rows: (where, row) of what is there.

    made: what decides the rows (model and adapter by their contents, seed, settings). Nothing is touched until it is
    entered; then rows can be written, each safe once `write` has returned. A last line that was cut in the middle is
    left out, and one that is whole gets the newline that it lacks. Where all went well, `order` sorts the rows, so that
    a run that was cut off leaves the same bytes as one that was not. overwrite: what an earlier run of the same command
    wrote makes way. Raises DataError for a file that is something else, or that was made otherwise, or cannot be
    written.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        made: Mapping[str, Any],
        *,
        overwrite: bool = False,
        order: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.path, self.kind, self._order = path, kind, order
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self._header = _line({HEADER: {"format": FORMAT, "command": kind.command, **made}})
        content = _content(path)
        self._size, self._whole = len(content), 0
        if not self._header.startswith(content):  # of nothing, or of a header that was cut off, nothing is kept
            self._check(content, made, overwrite)

    def _check(self, content: bytes, made: Mapping[str, Any], overwrite: bool) -> None:
        there = _header_of(content)
        if there is None:
            self._refuse_other(content, overwrite)
            return
        wrote = there.pop("command", None)
        if there.pop("format", None) != FORMAT:
            raise DataError(f"{self.path} was written by another version of pastalm: give another file")
        if wrote != self.kind.command:
            raise DataError(
                f"{self.path} was written by pasta {wrote}, not by pasta {self.kind.command}: give another file"
            )
        if overwrite:
            return
        if apart := differences(there, made):
            raise DataError(
                f"{self.path} was made otherwise ({'; '.join(apart)}): give another file, or --overwrite to start anew"
            )
        for where, row, end in _lines(self.path, content):
            self._has_fields(where, row)
            self.rows.append((where, row))
            self._whole = end
        self._whole = max(self._whole, content.find(b"\n") + 1)

    def _refuse_other(self, content: bytes, overwrite: bool) -> None:
        """Of a file without a header. Raises DataError, unless it holds rows of this kind that may go."""
        if content.lstrip().startswith(b"["):
            raise DataError(f"{self.path} is a JSON list, not a file of pasta {self.kind.command}: use another file")
        for where, row, _ in _lines(self.path, content, cut=False):
            self._has_fields(where, row)
        if not overwrite:
            raise DataError(
                f"{self.path} does not say what made it (it has no header): use another file, or --overwrite to start "
                "anew"
            )

    def _has_fields(self, where: str, row: Mapping[str, Any]) -> None:
        if missing := [key for key in self.kind.fields if key not in row]:
            raise DataError(f"{where}: not {self.kind.name} ({missing[0]!r} is missing): use another file")

    def __enter__(self) -> Results:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._begin()
        except OSError as error:
            self._file.close()
            raise self._unwritable(error) from None
        except DataError:
            self._file.close()
            raise
        return self

    def _begin(self) -> None:
        _lock(self._file, self.path)
        if self._file.seek(0, os.SEEK_END) != self._size:
            raise DataError(f"{self.path} was changed by another run meanwhile: start again to go on")
        if self._size > self._whole:
            self._file.truncate(self._whole)
        if not self._whole:
            self._append(self._header)
        elif not _ends_line(self.path):
            self._append(b"\n")

    def write(self, value: Mapping[str, Any]) -> None:
        """Appends a row. Raises DataError, which says that what stands in the file is whole."""
        self._append(_line(value))

    def _append(self, data: bytes) -> None:
        before = self._file.seek(0, os.SEEK_END)
        try:
            done = self._file.write(data)
            while done < len(data):  # a full disk may take part of a line before it says so
                done += self._file.write(data[done:])
        except OSError as error:
            self._file.truncate(before)
            raise DataError(
                f"cannot write {self.path}: {error.strerror}; what it holds is whole: make room and "
                "start again to go on"
            ) from None

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"cannot write {self.path}: {error.strerror}")

    def __exit__(self, failed: object, *_: object) -> None:
        self._file.close()
        if failed is None and self._order is not None:
            self._sort(self._order)

    def _sort(self, order: Callable[[dict[str, Any]], Any]) -> None:
        header, *lines = _split(self.path.read_bytes())
        ordered = sorted(lines, key=lambda line: order(json.loads(line)))
        if ordered == lines:
            return
        try:
            with disk.replacing(self.path.resolve()) as file:
                file.writelines([header, *ordered])
        except OSError as error:
            raise self._unwritable(error) from None


def by_place(keys: Iterable[Any], key: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], int]:
    """An order of rows: that of `keys`, and last what is not among them. key: of a row."""
    places = {one: place for place, one in enumerate(keys)}
    return lambda row: places.get(key(row), len(places))


def _line(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair: only its escape can be written
        return json.dumps(value).encode() + b"\n"


def _content(path: Path) -> bytes:
    """b"" where there is nothing yet. Raises DataError for what is no file."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a file: cannot write results to it, give another")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _header_of(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content.partition(b"\n")[0].decode())
    except (ValueError, RecursionError):
        return None
    return dict(value[HEADER]) if isinstance(value, dict) and _is_header(value) else None


def _lines(path: Path, content: bytes, *, cut: bool = True) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(where, row, where its line ends) of every row. cut: a last line without its newline that does not parse was cut
    in the middle. Raises DataError for any other line that is no row."""
    at = 0
    for number, line in enumerate(_split(content), 1):
        at += len(line)
        row = _row(line, where := f"{path}, line {number}") if line.strip() else None
        if isinstance(row, DataError):
            if cut and not line.endswith(b"\n") and not _parses(line):
                return
            raise DataError(f"{row}: use another file")
        if row is not None:
            yield where, row, at


def _split(content: bytes) -> list[bytes]:
    """The lines, each with the newline that it has."""
    lines = [line + b"\n" for line in content.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return [line for line in lines if line]


def _parses(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _lock(file: IO[bytes], path: Path) -> None:
    """Held until the file is closed. Raises DataError where another run has it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another run is writing {path}: wait for it, or give another file") from None
    except OSError:  # a file system without locks
        return
