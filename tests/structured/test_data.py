"""The committed texts with known values, and the schemas: what they say of themselves holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import extraction
from pastalm.server.structured import _within_bounds

jsonschema_rs = pytest.importorskip("jsonschema_rs")
HERE = Path(__file__).parent
ROWS = Path(extraction.__file__).with_name("extraction.jsonl")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_texts_are_those_of_the_script() -> None:
    assert lines(ROWS) == extraction.rows() and len(lines(ROWS)) == 100


def test_every_value_fits_and_stands_in_its_text() -> None:
    for row in lines(ROWS):
        assert extraction.FEWEST <= len(row["values"]) <= extraction.MOST
        assert jsonschema_rs.Draft202012Validator(row["schema"], validate_formats=True).is_valid(row["values"])
        assert all(leaf in row["text"] for leaf in leaves(row["values"])), row["id"]


def leaves(value: Any) -> list[str]:
    """Texts and numbers in a value; booleans are sentences of their own."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
    return [] if isinstance(value, bool) else [str(value)]


def test_the_server_takes_every_schema_that_can_be_held() -> None:
    schemas = [*lines(HERE / "schemas.jsonl"), *lines(HERE / "functions.jsonl")]
    assert len(schemas) == 250 and len({row["name"] for row in schemas}) == 250
    for row in [*schemas, *lines(ROWS)]:
        assert _within_bounds(row["schema"]) == row["schema"]
        jsonschema_rs.meta.validate(row["schema"])
