"""Files of annotated answers: what is written keeps its text; runs go on where they were cut; bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pastalm.errors import DataError
from pastalm.records import jsonl
from pastalm.records.documents import parse, strip
from pastalm.train.annotate import AnnotationCounts, PlainAnswer, Structural, annotate_file, annotate_rows
from tests.train.test_structure import listed, words

MARKS = Structural(words)

RESPONSE = "Some tips:\n\n" + listed("- ") + "\n\nOverall, small habits count."


def write(path: Path, *rows: object) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def row(id: str, response: str = RESPONSE, **more: object) -> dict[str, object]:
    return {"id": id, "prompt": "Tips?", "response": response, **more}


def read(path: Path) -> list[dict[str, object]]:
    return [row for _, row in jsonl.read(path)]


def test_rows_keep_their_text_and_say_what_they_hold() -> None:
    typed = "Write <sync/> to wait; caf\u00e9."
    rows = [
        PlainAnswer("a", "Tips?", RESPONSE, "ours", "MIT"),
        PlainAnswer("b", "Tag?", typed),
        PlainAnswer("c", "", "x"),
    ]
    first, second = annotate_rows(rows, MARKS, words)
    assert strip(parse(first.annotated)) == RESPONSE
    assert first.chunks == 3
    assert (first.tokens, first.source, first.licence) == (words(RESPONSE), "ours", "MIT")
    assert strip(parse(second.annotated)) == typed
    assert second.chunks == 0


def test_a_file_is_annotated_line_by_line(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", row("a"), row("b", "Yes."), row("a"), row("c", " "), "")
    seen: list[AnnotationCounts] = []
    counts = annotate_file(source, tmp_path / "out.jsonl", MARKS, words, progress=seen.append)
    rows = read(tmp_path / "out.jsonl")
    assert [r["id"] for r in rows] == ["a", "b"]
    fields = ["id", "prompt", "annotated", "tokens", "chunks", "source", "licence"]
    assert list(rows[0]) == fields
    assert [strip(parse(str(r["annotated"]))) for r in rows] == [RESPONSE, "Yes."]
    dropped = {"duplicate id": 1, "empty response": 1}
    assert counts == AnnotationCounts(4, 0, 2, 1, 3, dropped)
    assert [c.read for c in seen] == [1, 2, 3, 4]
    assert seen[-1] == counts


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", row("a"), row("b"), row("c"))
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    annotate_file(source, whole, MARKS, words)
    annotate_file(source, target, MARKS, words, limit=2)
    content = target.read_bytes()
    target.write_bytes(content[:-25])
    counts = annotate_file(source, target, MARKS, words)
    assert (counts.skipped, counts.written) == (1, 2)
    assert target.read_bytes() == whole.read_bytes()
    assert annotate_file(source, target, MARKS, words).written == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not a line of JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"id": "b", "prompt": "p"}', "line 2: 'response' must be a string"),
        ('{"id": [3], "prompt": "p", "response": "r"}', "line 2: 'id' must be a string"),
        ('{"id": "b", "prompt": "p", "response": "r", "source": 1}', "line 2: 'source' must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    source = write(tmp_path / "in.jsonl", row("a"), line)
    with pytest.raises(DataError, match=said) as caught:
        annotate_file(source, tmp_path / "out.jsonl", MARKS, words)
    assert "\n" not in str(caught.value)
    assert [r["id"] for r in read(tmp_path / "out.jsonl")] == ["a"], "what was done is kept"


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", row("a"))
    with pytest.raises(DataError, match=r"cannot read .*missing\.jsonl"):
        annotate_file(tmp_path / "missing.jsonl", tmp_path / "out.jsonl", MARKS, words)
    with pytest.raises(DataError, match=r"cannot write .*out\.jsonl"):
        annotate_file(source, source / "out.jsonl", MARKS, words)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="not UTF-8"):
        annotate_file(tmp_path / "bytes.jsonl", tmp_path / "out.jsonl", MARKS, words)
    target = write(tmp_path / "other.jsonl", "not json")
    with pytest.raises(DataError, match=r"other\.jsonl, line 1"):
        annotate_file(source, target, MARKS, words)


def test_sampled_answers_are_rows_and_those_cut_off_are_left_out(tmp_path: Path) -> None:
    said = {"prompt": "Tips?", "annotated": "So: <\\sync/>.", "licence": "MIT"}
    rows = [said | {"id": name, "finish_reason": name} for name in ("stop", "length")]
    source = write(tmp_path / "in.jsonl", *rows)
    counts = annotate_file(source, tmp_path / "out.jsonl", MARKS, words)
    (kept,) = read(tmp_path / "out.jsonl")
    assert (strip(parse(str(kept["annotated"]))), kept["licence"]) == ("So: <sync/>.", "MIT")
    assert counts.dropped == {"cut off": 1}


def test_answers_that_say_the_same_again_can_be_left_out(tmp_path: Path) -> None:
    loop = row("loop", "It goes on and on. " * 20)
    source = write(tmp_path / "in.jsonl", row("a"), loop)
    counts = annotate_file(source, tmp_path / "out.jsonl", MARKS, words, max_repetition=0.3)
    assert counts.dropped == {"repetitive": 1}
    assert annotate_file(source, tmp_path / "all.jsonl", MARKS, words).written == 2
