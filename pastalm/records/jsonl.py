"""JSONL files: errors that name the line, rows written one by one, runs that can be resumed.

`read` takes JSONL or one JSON list, gzipped or not, with or without a byte-order mark, and skips header lines.
`Results` writes a header that records what produced the file, then one row a line:

    {"pasta": {"format": 1, "command": "sample", "model": {"name": …, "sha256": …}, "seed": 0, …}}
    {"id": "1", …}

A run resumes a file only if the header is the same. Models are compared by hash, not by name.
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
"""Called with the error for each invalid row, which is then skipped. None instead: the error is raised."""


# ------------------------------------------------------------------------------ reading


def read(path: Path, *, bad: Bad | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, object) for every row; `where` names file and line. Raises DataError for an invalid row, unless
    `bad` is given."""
    for where, row in entries(path):
        if not isinstance(row, DataError):
            yield where, row
        elif bad is None:
            raise row
        else:
            bad(row)


def entries(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Like `read`, but yields the error in place of an invalid row. Raises DataError if the file cannot be read."""
    try:
        with _opened(path) as file:
            yield from _entries(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"cannot read {path}: its gzip data are truncated or damaged") from None
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
    """The lines without the byte-order mark that editors on Windows write."""
    for number, line in enumerate(file):
        yield line if number else line.removeprefix(b"\xef\xbb\xbf")


def _row(line: bytes, where: str) -> dict[str, Any] | DataError | None:
    """The object in a line, an error, or None for a header."""
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
        raise DataError(f"{path} is not a JSON list ({error}); give a JSON or JSONL file") from None
    for number, row in enumerate(rows, 1):
        where = f"{path}, entry {number}"
        yield where, row if isinstance(row, dict) else DataError(f"{where}: not a JSON object")


def string(value: Mapping[str, Any], key: str, where: str, *, needed: bool = True) -> str:
    """The string in a field.

    value: the row.
    key: the field's name; `id` may be an integer too.
    where: file and line, for the error.
    needed: False: a missing field is "".

    Raises DataError if the field is missing or not a string, or contains a lone surrogate, which cannot be encoded.
    """
    content = value.get(key, None if needed else "")
    if content is None and not needed:
        return ""
    if key == "id" and type(content) is int:
        return str(content)
    if not isinstance(content, str):
        raise DataError(f"{where}: {key!r} must be a string, got {content!r:.40}")
    return text(content, key, where)


def text(value: str, key: str, where: str) -> str:
    """Returns the string. Raises DataError if it contains a lone surrogate."""
    try:
        check_text(value, f"{where}: {key!r}")
    except RequestError as error:
        raise DataError(str(error)) from None
    return value


# ------------------------------------------------------------------------------ headers


def _is_header(value: Mapping[str, Any]) -> bool:
    return set(value) == {HEADER} and isinstance(value[HEADER], dict)


def differences(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Messages about the settings in which two runs differ. Values that have a `sha256` are compared by that alone.

    recorded: the settings in a file's header.
    requested: the settings of this run.
    """
    keys = dict.fromkeys((*recorded, *requested))
    return [
        f"{key} is {_shown(recorded.get(key))}, asked for {_shown(requested.get(key))}"
        for key in keys
        if _compared(recorded.get(key)) != _compared(requested.get(key))
    ]


def _compared(value: Any) -> Any:
    if isinstance(value, Mapping) and "sha256" in value:
        return value["sha256"]
    return json.loads(json.dumps(value))  # as it would be read from a file: tuples become lists


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and "sha256" in value:
        return f"{value.get('name', '')} ({str(value['sha256'])[:8]})"
    return "none" if value is None else json.dumps(value)


def header(path: Path) -> dict[str, Any] | None:
    """The header of a file; None if it has none or cannot be read."""
    try:
        with path.open("rb") as file:
            return _header_of(file.readline())
    except OSError:
        return None


# ------------------------------------------------------------------------------ writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What kind of rows a file has.

    command: the command that writes them, as in `pasta sample`.
    name: what error messages call a row, with its article.
    fields: fields that every row has.
    """

    command: str
    name: str
    fields: Sequence[str]


class Results:
    """A file of rows that a command writes or resumes. A context manager: the file is not touched before it is entered.

    Each row is on disk when `write` returns. When a run resumes, a truncated last line is removed and a missing final
    newline is added. At the end the rows are sorted by `order`, so an interrupted run that was resumed gives the same
    bytes as an uninterrupted one.

    path: the file.
    kind: the kind of its rows.
    run: what determines the rows (hashes of model and adapter, seed, settings), for the header.
    overwrite: delete the rows of an earlier run of the same command.
    order: sort key of a row. None: rows stay in the order written.

    `rows` are the (where, row) that the file has already. Raises DataError if the file has other content or was
    written with other settings, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        run: Mapping[str, Any],
        *,
        overwrite: bool = False,
        order: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.path, self.kind, self._order = path, kind, order
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self._header = _line({HEADER: {"format": FORMAT, "command": kind.command, **run}})
        content = _content(path)
        self._size, self._whole = len(content), 0
        if not self._header.startswith(content):  # an empty file or a truncated header is written anew
            self._check(content, run, overwrite)

    def _check(self, content: bytes, run: Mapping[str, Any], overwrite: bool) -> None:
        recorded = _header_of(content)
        if recorded is None:
            self._refuse_other(content, overwrite)
            return
        writer = recorded.pop("command", None)
        if recorded.pop("format", None) != FORMAT:
            raise DataError(f"{self.path} was written by another version of pastalm: give another file")
        if writer != self.kind.command:
            raise DataError(
                f"{self.path} was written by pasta {writer}, not by pasta {self.kind.command}: give another file"
            )
        if overwrite:
            return
        if changes := differences(recorded, run):
            raise DataError(
                f"{self.path} was made with other settings ({'; '.join(changes)}): give another file, or "
                "--overwrite to start again"
            )
        for where, row, end in _lines(self.path, content):
            self._has_fields(where, row)
            self.rows.append((where, row))
            self._whole = end
        self._whole = max(self._whole, content.find(b"\n") + 1)

    def _refuse_other(self, content: bytes, overwrite: bool) -> None:
        """Handles a file without a header. Raises DataError, unless it has rows of this kind and may be overwritten."""
        if content.lstrip().startswith(b"["):
            raise DataError(f"{self.path} is a JSON list, not a file of pasta {self.kind.command}: use another file")
        for where, row, _ in _lines(self.path, content, cut=False):
            self._has_fields(where, row)
        if not overwrite:
            raise DataError(
                f"{self.path} has no header that says what made it: use another file, or --overwrite to start again"
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
            raise DataError(f"{self.path} was changed by another run meanwhile: run again to resume")
        if self._size > self._whole:
            self._file.truncate(self._whole)
        if not self._whole:
            self._append(self._header)
        elif not _ends_line(self.path):
            self._append(b"\n")

    def write(self, value: Mapping[str, Any]) -> None:
        """Appends a row. Raises DataError if that fails; the rows before it stay intact."""
        self._append(_line(value))

    def _append(self, data: bytes) -> None:
        before = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            while written < len(data):  # a full disk may accept part of a line before it fails
                written += self._file.write(data[written:])
        except OSError as error:
            self._file.truncate(before)
            raise DataError(
                f"cannot write {self.path}: {error.strerror}; all rows so far are intact: free some space and "
                "run again to resume"
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
    """A sort key for rows: the order of `keys`; rows with other keys come last. key: gives a row's key."""
    places = {value: place for place, value in enumerate(keys)}
    return lambda row: places.get(key(row), len(places))


def _line(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate can only be written as an escape
        return json.dumps(value).encode() + b"\n"


def _content(path: Path) -> bytes:
    """The content of a file; b"" if it does not exist. Raises DataError if it cannot be read."""
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
    """Yields (where, row, byte offset of its line's end) for every row.

    path: for `where`.
    content: of the file.
    cut: accept a truncated last line (no newline, not JSON) and leave it out.

    Raises DataError for any other invalid line.
    """
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
    """The lines, each with its newline if it has one."""
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
    """Locks the file until it is closed. Raises DataError if another run has the lock."""
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
