"""Files of prompts: every form says the same, and what is none is said with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pastalm.errors import DataError
from pastalm.prompts import Prompt, read

FORMS: dict[str, tuple[dict[str, Any], Prompt]] = {
    "plain": (
        {"id": 7, "prompt": "Hi?", "source": "own", "licence": "Apache-2.0", "response": "Hello."},
        Prompt(id="7", text="Hi?", references=("Hello.",), source="own", licence="Apache-2.0"),
    ),
    "alpaca_eval": (
        {"index": 3, "instruction": "Hi?", "dataset": "koala", "outputs": {"a": "Hello.", "b": "Yes?"}},
        Prompt(id="3", text="Hi?", category="koala", references=("Hello.", "Yes?")),
    ),
    "alpaca_eval outputs": ({"instruction": "Hi?", "output": "Yes?"}, Prompt(id="0", text="Hi?", references=("Yes?",))),
    "mt_bench": (
        {"question_id": 81, "category": "writing", "turns": ["Hi?", "Again."], "reference": ["Hello.", "Hello!"]},
        Prompt(id="81", text="Hi?", category="writing", references=("Hello.",)),
    ),
    "sub-queries": (
        {"id": "q", "queries": ["Who?", "When?"]},
        Prompt(id="q", text="Answer each of these:\n1. Who?\n2. When?"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_as_jsonl_and_as_a_list(form: str, tmp_path: Path) -> None:
    row, wanted = FORMS[form]
    lines, whole = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text(json.dumps(row) + "\n")
    whole.write_text(json.dumps([row], indent=1))
    assert read(lines) == read(whole) == [wanted]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"id": 1}', "line 1: 'prompt' must be a string"),
        ('{"id": 1.5, "prompt": "a"}', "'id' must be a string"),
        ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "line 2: id '1' was there before"),
        ('{"id": 1, "queries": []}', "'queries' must be a list"),
        ('{"id": 1, "turns": "a"}', "'turns' must be a list"),
        ('[{"id": 1}, 2]', "entry 1: 'prompt' must be a string"),
        ('[{"id": 1, "prompt": "a"}, 2]', "entry 2: not a JSON object"),
        ("[1, 2", "no JSON list"),
        ("nonsense", "line 1: not a line of JSON"),
    ],
)
def test_what_is_no_prompt_is_said_with_its_place(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        read(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path / "binary")
    (tmp_path / "two.jsonl").write_text('{"id": 1, "prompt": "a"}\n{"id": 2, "prompt": "b"}\n')
    assert [p.id for p in read(tmp_path / "two.jsonl", limit=1)] == ["1"]
