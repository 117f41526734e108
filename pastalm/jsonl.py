"""Files of one JSON object a line: read with the place named, appended line by line, gone on with after a cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pastalm.errors import DataError


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every line that is not blank. Raises DataError with the line that is none."""
    for number, line in _numbered(path):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError:
            raise DataError(f"{where}: not a line of JSON; give one object a line") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: not a JSON object; give one object a line")
        yield where, value


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; give a JSONL file") from None


def string(value: Mapping[str, Any], key: str, where: str, *, needed: bool = True) -> str:
    """The string under a key (of `id` a whole number too); "" if it is missing and not needed. Raises DataError."""
    found = value.get(key, None if needed else "")
    if key == "id" and type(found) is int:
        return str(found)
    if not isinstance(found, str):
        raise DataError(f"{where}: {key!r} must be a string, got {found!r:.40}")
    return found


def resume(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What an earlier run wrote ([] where there was none); a half-written last line is cut off, so that
    the file can be appended to. Raises DataError."""
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return list(read(path))


class Appender:
    """Appends objects to a file, each safe once `write` has returned. Raises DataError, which says that
    what stands in the file is whole, so that the run can go on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab", buffering=0)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from None

    def write(self, value: Mapping[str, Any]) -> None:
        data = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        before = self._file.tell()
        try:
            done = self._file.write(data)
            while done < len(data):  # a full disk may take part of a line before it says so
                done += self._file.write(data[done:])
        except OSError as error:
            self._file.truncate(before)
            raise DataError(
                f"cannot write {self._path}: {error.strerror}; what it holds is whole: make room and "
                "start again to go on"
            ) from None

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
