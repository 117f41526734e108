"""Files of prompts: every form says the same, and what is none is said with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.core.language import Text
from pastalm.errors import DataError
from pastalm.records.documents import render
from pastalm.records.prompts import Prompt, read, read_references
from pastalm.train.annotate import read_rows

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
    "alpaca": (
        {"instruction": "Sort these.", "input": "b a", "output": "a b"},
        Prompt(id="0", text="Sort these.\n\nb a", references=("a b",)),
    ),
    "alpaca without an input": (
        {"instruction": "Hi?", "input": "", "output": "Hello."},
        Prompt(id="0", text="Hi?", references=("Hello.",)),
    ),
    "messages": (
        {
            "prompt_id": "m1",
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Again."},
            ],
        },
        Prompt(id="m1", text="Hi?", references=("Hello.",)),
    ),
    "messages in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}], "source": None},
        Prompt(id="0", text="Hi?"),
    ),
    "prompt and completion as messages": (
        {
            "prompt": [{"role": "user", "content": "Hi?"}],
            "completion": [{"role": "assistant", "content": "Hello."}],
        },
        Prompt(id="0", text="Hi?", references=("Hello.",)),
    ),
    "sharegpt": (
        {
            "id": "s1",
            "conversations": [
                {"from": "gpt", "value": "Welcome."},
                {"from": "human", "value": "Hi?"},
                {"from": "gpt", "value": "Hello."},
            ],
        },
        Prompt(id="s1", text="Hi?", references=("Hello.",)),
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
        ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "line 2: duplicate id '1'"),
        ('{"id": 1, "queries": []}', "'queries' must be a list"),
        ('{"id": 1, "turns": "a"}', "'turns' must be a list"),
        ('[{"id": 1}, 2]', "entry 1: 'prompt' must be a string"),
        ('[{"id": 1, "prompt": "a"}, 2]', "entry 2: not a JSON object"),
        ("[1, 2", "not a JSON list"),
        ("nonsense", "line 1: not a line of JSON"),
        ('{"text": "a"}', "line 1: 'prompt' must be.*'instruction' .and 'input'.*'messages'.*'queries'"),
        ('{"messages": ["a"]}', "line 1: 'messages' must be a list of"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "line 1: 'messages' has no user message"),
        ('{"conversations": [{"from": "human"}]}', "line 1: 'conversations' must be a list of"),
        ('{"prompt": "a \\ud83d"}', "line 1: 'prompt' contains a lone surrogate, U.D83D"),
        ('{"prompt": "a", "reference": "\\udc00"}', "line 1: 'reference' "),
        ('{"prompt": "a", "category": "\\udc00"}', "line 1: 'category' "),
        ('{"turns": ["\\udc00"]}', "line 1: 'turns' "),
        ('{"queries": ["\\udc00"]}', "line 1: 'queries' "),
        ('{"instruction": "a", "input": "\\udc00"}', "line 1: 'input' "),
        ('{"conversations": [{"from": "human", "value": "\\udc00"}]}', "line 1: 'conversations' "),
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


def test_bad_rows_are_named_and_the_others_keep_their_places(tmp_path: Path) -> None:
    path, said = tmp_path / "p.jsonl", list[str]()
    path.write_text('{"prompt": "a"}\nnonsense\n{"prompt": "\\udc00"}\n{"id": 0, "prompt": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match="line 2: not a line of JSON"):
        read(path)
    found = read(path, bad=lambda error: said.append(str(error)))
    assert [(p.id, p.text) for p in found] == [("0", "a"), ("4", "c")]
    assert [line.split(": ")[0].rpartition(", ")[2] for line in said] == ["line 2", "line 3", "line 4"]
    said.clear()
    assert [p.id for p in read(path, limit=3, bad=lambda error: said.append(str(error)))] == ["0"]
    assert len(said) == 2


def test_references_need_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rows = [{"id": 1, "reference": "a"}, {"index": "x", "output": "b"}, {"id": 3}, {"id": 4, "outputs": {"m": "c"}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_references(path) == {"1": "a", "x": "b", "4": "c"}


@given(asked=st.text(min_size=1), replied=st.text(min_size=1), more=st.text())
def test_training_reads_what_sampling_reads(
    asked: str, replied: str, more: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every form that holds an answer is a row to annotate, with the same prompt."""
    path = tmp_path_factory.mktemp("forms") / "rows.json"
    rows: list[dict[str, Any]] = [
        {"id": "0", "prompt": asked, "response": replied},
        {"id": "1", "instruction": asked, "input": more, "output": replied},
        {"id": "2", "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]},
        {"id": "3", "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": replied}]},
        {"id": "4", "prompt": asked, "annotated": render((Text(replied),)), "finish_reason": "stop"},
    ]
    path.write_text(json.dumps(rows))
    prompts, found = read(path), list(read_rows(path))
    assert [(row.id, row.prompt) for row in found] == [(prompt.id, prompt.text) for prompt in prompts]
    assert {row.response for row in found} == {replied}
    blank = not asked.strip()  # a blank instruction is left out before its input
    assert all(prompt.text.startswith(asked) for prompt in prompts if not (blank and prompt.id == "1"))
    assert prompts[1].text.startswith("" if blank else asked) and prompts[1].text.endswith(more.strip() and more)
