"""Budgets: what is said to be enough is enough, and an answer that needs no more is not refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("llguidance")

from pastalm.errors import RequestError
from tests.structured.test_structured import TEXT, Traced, rows, valid


@pytest.mark.parametrize("parallelism", [1.0, 0.0])
def test_fields_that_may_be_left_out_need_no_budget(parallelism: float) -> None:
    names = [f"field{i}" for i in range(200)]
    schema = {"type": "object", "properties": dict.fromkeys(names, TEXT), "required": names[:1]}
    response = Traced(layers=1).run(schema, max_tokens=60, parallelism=parallelism)
    assert valid(schema, response.transcript.text) and response.transcript.tokens <= 60


@pytest.mark.parametrize("parallelism", [1.0, 0.0])
@pytest.mark.parametrize(
    "row", [*rows("schemas.jsonl")[5::28], *rows("functions.jsonl")[3::17]], ids=lambda r: r["name"]
)
def test_the_least_that_is_named_is_enough(row: Any, parallelism: float) -> None:
    with pytest.raises(RequestError) as refused:
        Traced(layers=1).run(row["schema"], max_tokens=1, parallelism=parallelism)
    named = re.search(r"takes (\d+) or more", str(refused.value))
    assert named is not None
    least = int(named[1])
    response = Traced(layers=1).run(row["schema"], max_tokens=least, parallelism=parallelism)
    assert valid(row["schema"], response.transcript.text) and response.transcript.tokens <= least
