"""Labels that say where an answer should fork, and what share of the answers does, by label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.errors import DataError
from pastalm.eval import compare
from pastalm.records import labels
from pastalm.records.labels import LABELS, Label
from tests.eval.test_evaluate import ANSWER, PLAIN

MARKS = Path(__file__).parents[2] / "runs" / "marks"


def written(folder: Path, rows: Sequence[object]) -> Path:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_are_read_by_id(tmp_path: Path) -> None:
    path = written(tmp_path, [{"id": 3, "label": "one"}, {"id": "b", "label": "should", "note": "x"}])
    assert labels.read(path, ["3", "b", "c"]) == {"3": "one", "b": "should"}


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"id": "1", "label": "never"}], "line 1: .*'never'.*one, may, should"),
        ([{"id": "1"}], "line 1: 'label' must be a string"),
        ([{"label": "one"}], "'id' must be"),
        ([{"id": "1", "label": "one"}, {"id": 1, "label": "may"}], "line 2: .*'1'"),
        ([], "labels none of"),
        ([{"id": "9", "label": "one"}], "labels none of"),
    ],
)
def test_a_file_that_labels_nothing_or_unclearly_is_refused(tmp_path: Path, rows: list[object], error: str) -> None:
    with pytest.raises(DataError, match=error):
        labels.read(written(tmp_path, rows), ["1"])


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([*LABELS, None])), min_size=1, max_size=12))
def test_the_share_that_forks_is_told_apart_by_label(rows: list[tuple[bool, Label | None]]) -> None:
    answers = [replace(ANSWER if forks else PLAIN, id=str(i)) for i, (forks, _) in enumerate(rows)]
    known = {str(i): label for i, (_, label) in enumerate(rows) if label is not None}
    pairs = compare.pairs(answers, [replace(PLAIN, id=a.id) for a in answers], len)
    table = compare.figures(pairs, {}, labels=known)
    for label in LABELS:
        forked = [forks for forks, own in rows if own == label]
        figure = table.get(f"forks, {label}")
        assert (figure.n if figure else 0) == len(forked)
        if figure:
            assert figure.mean == pytest.approx(sum(forked) / len(forked))
    assert not any(name.startswith("forks,") for name in compare.figures(pairs, {}))


def test_a_column_for_each_label() -> None:
    pairs = compare.pairs([ANSWER], [PLAIN], len)
    row = compare.SystemFigures("own", pairs, compare.figures(pairs, {}, labels={"1": "one"}))
    assert "| forks | forks, one | chunks |" in compare.markdown([row])


@pytest.mark.parametrize(("name", "prompts"), [("alpaca_eval_dev_forking", 200), ("vicuna_80_forking", 80)])
def test_prompts_are_labelled_by_id_alone(name: str, prompts: int) -> None:
    path = MARKS / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(row) == {"id", "label"} for row in rows)
    assert len(labels.read(path, [row["id"] for row in rows])) == len(rows) == prompts
