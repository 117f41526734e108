"""Drafts of a server: options of a request, figures of an answer, metrics, and whose answers are drafted from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pastalm.core.params import DRAFTERS
from pastalm.engines.batching import BatchingEngine
from pastalm.engines.drafts.budget import StepCosts
from pastalm.engines.drafts.ngrams import NGrams
from pastalm.server.gate import owner
from tests.server.serving import HELLO, Served, curl, playing, serving, tiny

BODY = {"prompt": "Five tips", "max_tokens": 60, "temperature": 0}


@pytest.fixture
def drafting() -> Iterator[Served]:
    """A server whose further rows cost next to nothing, so that every guess is fed."""
    llm = tiny()
    assert isinstance(llm.driver.engine, BatchingEngine)
    llm.driver.engine._drafting.costs = StepCosts(lambda rows: 1 + rows * 1e-6)
    with serving(llm) as here:
        yield here
        assert here.becomes_idle()


def asked(served: Served, key: str = "", **pasta: Any) -> tuple[str, dict[str, Any]]:
    """Text and figures of an answer."""
    header = ("--header", f"Authorization: Bearer {key}") if key else ()
    status, _, body = curl(f"{served.url}/v1/completions", {**BODY, "pasta": {"parallelism": 0, **pasta}}, *header)
    assert status == 200, body
    return body["choices"][0]["text"], body["usage"]["pasta"]["choices"][0]


def test_a_request_names_its_drafters_and_gives_references(drafting: Served) -> None:
    text, off = asked(drafting, drafts="off")
    assert (off["passes"], off["drafted"], off["accepted"]) == (off["steps"], {}, {})
    again, copied = asked(drafting, drafts="references", references=["Not this.", text])
    assert again == text
    assert set(copied["drafted"]) == set(copied["accepted"]) == {"references"}
    assert copied["passes"] == copied["steps"] - copied["accepted"]["references"] < off["passes"]
    told = drafting.metrics()
    assert told["pasta_passes_total"] == off["passes"] + copied["passes"]
    for kind in ("drafted", "accepted"):
        counts = {name: told[f'pasta_{kind}_tokens_total{{drafter="{name}"}}'] for name in DRAFTERS}
        assert counts == {**dict.fromkeys(DRAFTERS, 0), "references": copied[kind]["references"]}


def test_answers_of_one_key_are_never_drafts_of_another(drafting: Served) -> None:
    """Nor of those without a key; the same key gets its own."""
    first, seen = asked(drafting, "one", drafts="answers")
    assert seen["passes"] == seen["steps"], "there was no earlier answer"
    for other in ("two", ""):
        text, figures = asked(drafting, other, drafts="answers")
        assert text == first
        assert (figures["drafted"], figures["accepted"]) == (seen["drafted"], seen["accepted"]) == ({}, {})
    text, own = asked(drafting, "one", drafts="answers")
    assert text == first and own["accepted"]["answers"] > 0 and own["passes"] < seen["passes"]
    engine = drafting.llm.driver.engine
    assert isinstance(engine, BatchingEngine)
    owners = engine._drafting._stores._stores
    assert len(owners) == 3 and "" in owners and not {"one", "two"} & set(owners)


def test_an_owner_is_a_hash_of_the_key_that_is_sent() -> None:
    def of(*values: str) -> str:
        return owner({"headers": [(b"authorization", value.encode()) for value in values]})

    assert of() == of("Bearer ") == of("Basic abc") == ""
    assert of("Bearer abc") == of("bearer  abc ") != of("Bearer abd")
    assert "abc" not in of("Bearer abc")


def test_the_servers_default_is_for_requests_that_name_none() -> None:
    llm = tiny()
    assert isinstance(llm.driver.engine, BatchingEngine)
    llm.driver.engine._drafting.costs = StepCosts(lambda rows: 1 + rows * 1e-6)
    with serving(llm, drafts="off") as here:
        text, off = asked(here)
        assert off["drafted"] == {}
        assert asked(here, references=[text])[1]["drafted"] == {}
        assert asked(here, references=[text], drafts="references")[1]["accepted"]["references"] > 0


@pytest.mark.parametrize(
    ("pasta", "param"),
    [
        ({"drafts": "jacobi"}, "pasta.drafts"),
        ({"drafts": ""}, "pasta.drafts"),
        ({"drafts": ["lookup"]}, "pasta.drafts"),
        ({"references": "a text"}, "pasta.references"),
        ({"references": ["x"] * 17}, "pasta.references"),
        ({"references": ["x" * 60_000] * 2}, "pasta.references"),
    ],
)
def test_bad_values_are_refused_by_name(pasta: dict[str, Any], param: str) -> None:
    with serving(playing()) as here:
        status, _, body = curl(f"{here.url}/v1/chat/completions", {"messages": HELLO, "pasta": pasta})
        assert status == 400 and body["error"]["param"].startswith(param), body
        for name, value in (("drafts", "off"), ("references", ["x"])):
            assert curl(f"{here.url}/v1/completions", {**BODY, name: value})[0] == 400, "they are PASTA's own"


def test_an_engine_without_drafts_takes_the_options_and_answers_the_same() -> None:
    with serving(playing()) as here:
        texts = []
        for pasta in ({}, {"drafts": "lookup", "references": ["Two tips."]}):
            _, _, body = curl(f"{here.url}/v1/chat/completions", {"messages": HELLO, "max_tokens": 400, "pasta": pasta})
            texts.append(body["choices"][0]["message"]["content"])
            figures = body["usage"]["pasta"]["choices"][0]
            assert figures["drafted"] == {} and figures["passes"] == figures["steps"]
        assert texts[0] == texts[1]


def test_references_of_too_many_tokens_are_refused_and_choices_share_a_table(drafting: Served) -> None:
    """The tiny model's tokens are bytes."""
    body = {**BODY, "n": 2, "temperature": 1, "pasta": {"references": ["x" * 40_000], "parallelism": 0}}
    status, _, told = curl(f"{drafting.url}/v1/completions", body)
    assert status == 400 and told["error"]["param"] == "pasta.references" and "40000 tokens" in told["error"]["message"]
    made: list[int] = []
    add_all = NGrams.add_all
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NGrams, "add_all", lambda self, tokens: made.append(len(tokens)) or add_all(self, tokens))
        body["pasta"] = {"references": ["y" * 300, "z" * 20], "parallelism": 0}
        status, _, told = curl(f"{drafting.url}/v1/completions", body)
    assert status == 200 and len(told["choices"]) == 2
    assert made.count(300) == made.count(20) == 1, "one table for both choices"
