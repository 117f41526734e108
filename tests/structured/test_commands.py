"""JSON from the command and from `llm`: a schema is a file, a dictionary or llm's own short form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

pytest.importorskip("llguidance")

from tests.test_cli import complains, pasta

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    file = tmp_path / "point.json"
    file.write_text(json.dumps(POINT))
    return file


def generated(tiny: Path, schema: Path, *options: str) -> Result:
    return pasta("generate", "A point.", "--model", tiny, "--schema", schema, "--max-tokens", "200", *options)


def fits(text: str) -> bool:
    value = json.loads(text)
    return list(value) == ["x", "on"] and 0 <= value["x"] <= 99 and isinstance(value["on"], bool)


@pytest.mark.parametrize(
    "option", [(), ("--sequential",), ("--depends", "x=on"), ("--temperature", "1", "--seed", "3")]
)
def test_what_is_printed_is_json_that_fits(tiny: Path, schema: Path, option: tuple[str, ...]) -> None:
    result = generated(tiny, schema, *option)
    assert result.exit_code == 0, result.stderr
    assert fits(result.stdout)


def test_a_conversation_has_a_schema(tiny: Path, schema: Path) -> None:
    asked = ("chat", "--model", tiny, "--schema", schema, "--max-tokens", "200")
    result = pasta(*asked, stdin="A point.\nAnother.\n\n")
    assert result.exit_code == 0, result.stderr
    answers = [line for line in result.stdout.splitlines() if line]
    assert len(answers) == 2 and all(map(fits, answers))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"type": ', "(line 1, column 10)"),
        ("[]", "JSON object"),
        ("true", "JSON object"),
        ('"x"', "JSON object"),
        ('{"not": {}}', "not at #"),
        ('{"type": "float"}', "float"),
        ("[" * 100_000, "deep"),
    ],
)
def test_a_file_that_is_no_schema_is_a_line(tiny: Path, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    complains(generated(tiny, file), 2, said)


def test_what_does_not_go_together_is_a_line(tiny: Path, schema: Path, tmp_path: Path) -> None:
    complains(pasta("generate", "hi", "--model", tiny, "--depends", "x=on"), 2, "--depends", "--schema")
    complains(generated(tiny, tmp_path / "nowhere.json"), 2, "cannot read")
    for depends in ("x", "=on", "x=", "x=on,"):
        complains(generated(tiny, schema, "--depends", depends), 2, "FIELD=FIELD")
    complains(generated(tiny, schema, "--depends", "x=nothing"), 2, "nothing")
    complains(pasta("generate", "hi", "--model", tiny, "--schema", schema, "--max-tokens", "2"), 2, "max_tokens 2")


# ------------------------------------------------------------------------------ llm


def test_llm_gets_json(tiny: Path, own_cache: Any) -> None:
    pytest.importorskip("llm")
    from pastalm.llm_plugin import Pasta

    response = Pasta().prompt("A point.", schema=POINT, model=str(tiny), max_tokens=200)
    pieces = list(response)
    assert len(pieces) > 1 and fits("".join(pieces)) and response.response_json["finish_reason"] == "stop"


def test_llm_says_what_cannot_be_held(tiny: Path, own_cache: Any) -> None:
    llm = pytest.importorskip("llm")
    from pastalm.llm_plugin import Pasta

    with pytest.raises(llm.ModelError, match="not at #"):
        Pasta().prompt("A point.", schema={"not": {}}, model=str(tiny)).text()


def test_the_llm_command_takes_a_schema(tiny: Path, own_cache: Any, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    command = [str(Path(sys.executable).with_name("llm")), "-m", "pasta", "A dog.", "-o", "model", str(tiny)]
    done = subprocess.run(
        [*command, "-o", "max_tokens", "300", "--schema", "age int, tame bool, legs int"],
        env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert list(value) == ["age", "tame", "legs"]
    assert isinstance(value["age"], int) and isinstance(value["tame"], bool)
