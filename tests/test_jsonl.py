"""Files of results: what is not ours is left alone, what is ours loses nothing, and readers take every form."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.errors import DataError
from pastalm.records import jsonl

KIND = jsonl.Kind(command="sample", name="a row", fields=("id", "text"))
MADE: dict[str, Any] = {"model": {"name": "a", "sha256": "0" * 64}, "adapter": None, "seed": 1, "top_p": 0.5}
ROWS = st.lists(
    st.fixed_dictionaries(
        {"id": st.text(), "text": st.text(st.characters())}, optional={"n": st.floats(allow_nan=False)}
    ),
    max_size=5,
)


def results(path: Path, **more: Any) -> jsonl.Results:
    return jsonl.Results(path, KIND, MADE, **more)


def write(path: Path, rows: list[dict[str, Any]]) -> bytes:
    with results(path) as file:
        for row in rows:
            file.write(row)
    return path.read_bytes()


@given(rows=ROWS, data=st.data())
def test_cut_at_any_byte_nothing_whole_is_lost(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    whole = write(path, rows)
    assert [row for _, row in jsonl.read(path)] == rows, "half of a surrogate pair too is read as it was written"
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at])
    there = [row for _, row in results(path).rows]
    assert path.read_bytes() == whole[:at], "nothing is touched before it is entered"
    assert there == rows[: len(there)]
    standing = [line for line in whole[:at].split(b"\n")[1:] if line in whole.split(b"\n")]
    assert len(there) >= len([line for line in standing if line]), "a line that is whole but for its newline stays"
    assert write(path, rows[len(there) :]) == whole


FOREIGN = {
    "a JSON list": (b'[{"id": "1", "text": "x"},\n {"id": "2", "text": "y"}]', "is a JSON list"),
    "a JSON list on one line": (b'[{"id": "1", "text": "x"}]', "is a JSON list"),
    "a JSON object over lines": (b'{\n  "id": "1"\n}', "line 1: not a line of JSON"),
    "one object": (b'{"name": "x"}', "line 1: not a row .'id' is missing"),
    "text": (b"my notes", "line 1: not a line of JSON"),
    "text of several lines": (b"my\nnotes\n", "line 1: not a line of JSON"),
    "bytes": (b"\xff\xd8" + bytes(range(256)), "line 1: not UTF-8"),
    "gzip": (gzip.compress(b"x", mtime=0), "line 1: not UTF-8"),
    "rows of another kind": (b'{"id": "1", "prompt": "x"}\n', "line 1: not a row .'text' is missing"),
    "rows without a header": (b'{"id": "1", "text": "x"}\n', "has no header that says what made it"),
    "rows without a header or newline": (b'{"id": "1", "text": "x"}', "has no header that says what made it"),
    "blank lines": (b"\n\n", "has no header that says what made it"),
    "another command's": (
        b'{"pasta": {"format": 1, "command": "score"}}\n',
        "written by pasta score, not by pasta sample",
    ),
    "a later version's": (b'{"pasta": {"format": 2, "command": "sample"}}\n', "another version"),
    "ours with a line in the middle that is none": (
        b'{"pasta": {"format": 1, "command": "sample", "seed": 1}}\n{"id": "1", "te\n{"id": "2", "text": "x"}\n',
        "was made with other settings",
    ),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_refused_and_left_alone(name: str, overwrite: bool, tmp_path: Path) -> None:
    content, said = FOREIGN[name]
    path = tmp_path / "bench.json"
    path.write_bytes(content)
    if overwrite and said in ("has no header that says what made it", "was made with other settings"):
        with results(path, overwrite=True):
            pass
        assert path.read_bytes() == write(tmp_path / "new", [])
        return
    with pytest.raises(DataError, match=said) as caught:
        results(path, overwrite=overwrite)
    assert "\n" not in str(caught.value) and path.read_bytes() == content


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        results(tmp_path)
    with pytest.raises(DataError, match="is not a file"):
        results(Path("/dev/null"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"), results(tmp_path / "file" / "out"):
        pass


def test_a_line_in_the_middle_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = write(path, [{"id": str(i), "text": "x"} for i in range(3)]).split(b"\n")
    path.write_bytes(b"\n".join([*whole[:2], whole[2][:9], whole[3], b""]))
    with pytest.raises(DataError, match="line 3: not a line of JSON"):
        results(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 2}, "seed is 1, asked for 2"),
        ({"top_p": 1}, "top_p is 0.5, asked for 1"),
        ({"new": "x"}, 'new is none, asked for "x"'),
        ({"model": {"name": "a", "sha256": "1" * 64}}, r"model is a \(00000000\), asked for a \(11111111\)"),
        ({"adapter": {"name": "b", "sha256": "2" * 64}}, r"adapter is none, asked for b \(22222222\)"),
    ],
)
def test_what_was_made_otherwise_is_refused_with_what_differs(change: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    before = write(path, [{"id": "1", "text": "x"}])
    with pytest.raises(DataError, match=f"{said}.*--overwrite") as caught:
        jsonl.Results(path, KIND, MADE | change)
    assert "\n" not in str(caught.value) and path.read_bytes() == before
    with jsonl.Results(path, KIND, MADE | change, overwrite=True) as file:
        assert file.rows == []
    assert jsonl.header(path) == {"format": 1, "command": "sample", **MADE, **change}


def test_names_do_not_count_but_contents(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, [{"id": "1", "text": "x"}])
    moved = MADE | {"model": MADE["model"] | {"name": "elsewhere"}}
    assert len(jsonl.Results(path, KIND, moved).rows) == 1


def test_rows_end_in_order_however_they_came(tmp_path: Path) -> None:
    rows = [{"id": name, "text": "x"} for name in "cabdz"]
    order = jsonl.by_place("abcd", lambda row: row["id"])
    path = tmp_path / "out.jsonl"
    for part in (rows[:2], rows[2:]):
        with results(path, order=order) as file:
            for row in part:
                file.write(row)
    assert [row["id"] for _, row in jsonl.read(path)] == [*"abcdz"]
    assert path.read_bytes() == write(tmp_path / "other", sorted(rows, key=lambda row: row["id"]))


def test_two_runs_do_not_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first, late = results(path), results(path)
    with first as file:
        file.write({"id": "1", "text": "x"})
        with pytest.raises(DataError, match="another run is writing"), results(path):
            pass
    with pytest.raises(DataError, match="changed by another run"), late:
        pass
    assert len(results(path).rows) == 1


OBJECTS = [{"id": "1", "text": "caf\xe9"}, {"id": "2", "text": "x"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OBJECTS).encode()
LIST = json.dumps(OBJECTS, indent=1).encode()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.rstrip(),
        LIST,
        b"\n\n" + LIST,
        LINES.replace(b"\n", b"\r\n"),
        b'{"pasta": {"command": "x"}}\n' + LINES,
    ],
)
def test_every_form_of_file_reads_alike(content: bytes, mark: bytes, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "any"
    path.write_bytes(gzip.compress(mark + content, mtime=0) if packed else mark + content)
    assert [row for _, row in jsonl.read(path)] == OBJECTS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(LINES, mtime=0)[:-9], "gzip"),
        (gzip.compress(LINES, mtime=0)[:20] + bytes(30), "gzip"),
        (b"[" * 100_000, "not a JSON list"),
        (b'{"a":' * 100_000, "line 1: not a line of JSON"),
        (LINES + b'{"id": "\xff"}\n', "line 3: not UTF-8"),
        ("\ufeff{}".encode("utf-16-le"), "line 1: not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(jsonl.read(path))
    assert "\n" not in str(caught.value)


def test_bad_rows_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "any"
    path.write_bytes(b'{"id": 1}\n{"id": \xff}\nnonsense\n[1]\n{"id": 2}\n')
    said: list[str] = []
    assert [row["id"] for _, row in jsonl.read(path, bad=lambda e: said.append(str(e)))] == [1, 2]
    assert [line.split(": ")[0].rpartition(", ")[2] for line in said] == ["line 2", "line 3", "line 4"]
    path.write_text('[{"id": 1}, 5, {"id": 2}]')
    assert [row["id"] for _, row in jsonl.read(path, bad=lambda e: said.append(str(e)))] == [1, 2]
    assert "entry 2" in said[-1]
