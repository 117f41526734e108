"""Sampling parameters: one table says what a value may be, and every reader of it says the same."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pastalm.bounds import Parameter
from pastalm.core.params import SamplingParams, parameters
from pastalm.errors import RequestError

DRAFTS = "drafts must be auto, off, or some of lookup,siblings,promises,references,answers"
BOUNDED = [row for row in parameters().values() if (row.ge, row.gt, row.le) != (None, None, None)]


def inside(row: Parameter, value: float) -> bool:
    lowest = row.ge is None or value >= row.ge
    return lowest and (row.gt is None or value > row.gt) and (row.le is None or value <= row.le)


def given_to(row: Parameter, value: Any) -> dict[str, Any]:
    """Arguments with that value, which nothing beside it makes wrong."""
    return {"min_tokens": value, "max_tokens": max(value, 1)} if row.name == "min_tokens" else {row.name: value}


def test_every_field_is_a_row_with_help() -> None:
    assert list(parameters()) == [field.name for field in fields(SamplingParams)]
    assert all(row.help.endswith((".", ")", "off")) for row in parameters().values())
    assert all(row.problem(row.default) is None for row in parameters().values())


@given(st.sampled_from(BOUNDED), st.integers(-4, 30))
def test_a_value_is_taken_within_its_bounds_and_refused_by_name_outside(row: Parameter, value: int) -> None:
    typed = value / 4 if row.kind is float else value
    if inside(row, typed):
        assert getattr(SamplingParams(**given_to(row, typed)), row.name) == typed
    else:
        with pytest.raises(RequestError, match=f"^{row.name} must be "):
            SamplingParams(**given_to(row, typed))


@pytest.mark.parametrize("row", [row for row in BOUNDED if row.kind is float], ids=lambda row: row.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(row: Parameter, value: float) -> None:
    with pytest.raises(RequestError, match=f"^{row.name} must be "):
        SamplingParams(**{row.name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_p": 0}, "top_p must be in (0, 1]"),
        ({"min_p": 2}, "min_p must be in [0, 1]"),
        ({"logprobs": 21}, "logprobs must be in 0..20"),
        ({"top_k": -2}, "top_k must be 0 (off) or more"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"min_tokens": 17}, "min_tokens must be in 0..max_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be token ids"),
        ({"stop": ""}, "a stop string must not be empty"),
        ({"logit_bias": {1: float("nan")}}, "the values of logit_bias must be finite"),
        ({"drafts": "jacobi"}, f"{DRAFTS}, not 'jacobi'"),
        ({"drafts": "lookup,lookup"}, f"{DRAFTS}, not 'lookup,lookup'"),
        ({"drafts": "auto,lookup"}, f"{DRAFTS}, not 'auto,lookup'"),
        ({"drafts": ""}, f"{DRAFTS}, not ''"),
        ({"drafts": None}, f"{DRAFTS}, not None"),
        ({"drafts": ["lookup"]}, f"{DRAFTS}, not ['lookup']"),
        ({"references": "a text"}, "references must be texts"),
        ({"references": [b"bytes"]}, "references must be texts"),
        ({"references": ["caf\udce9"]}, "a reference is not UTF-8: byte 0xe9 at character 3; give valid UTF-8"),
    ],
)
def test_messages_are_plain(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**arguments)
    assert str(refused.value) == message


def test_a_row_is_an_option_of_the_command_and_a_field_of_a_request() -> None:
    """Those that have another form there are named where they do; a new row needs no line in either."""
    from typer.main import get_command

    from pastalm.cli import app
    from pastalm.server.requests import OTHER_FORM, CompletionRequest
    from pastalm.text_options import LIBRARY_ONLY

    options = {param.name: param for param in get_command(app).commands["generate"].params}  # type: ignore[attr-defined]
    schema = CompletionRequest.model_json_schema()["properties"]
    for row in parameters().values():
        option = "reference" if row.name == "references" else row.name  # of each text a file
        assert row.name in LIBRARY_ONLY or options[option].help.startswith(row.help)
        assert option == row.name or row.name not in options
        assert row.name in OTHER_FORM or schema[row.name]["description"] == row.help


@given(st.sampled_from(BOUNDED), st.integers(-4, 200))
def test_a_server_takes_no_value_that_python_refuses(row: Parameter, value: int) -> None:
    from pydantic import ValidationError

    from pastalm.server.requests import CompletionRequest

    if row.name == "parallelism":
        return
    typed = value / 4 if row.kind is float else value
    try:
        CompletionRequest(prompt="a", **given_to(row, typed))
    except ValidationError:
        return
    assert row.problem(typed) is None or (row.name, typed) == ("max_tokens", 0)
