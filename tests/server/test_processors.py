"""Logits processors of a server: named ones, and only those that it was started with."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from pastalm.engines.processors import chain
from pastalm.errors import RequestError
from pastalm.server.settings import Settings
from tests.engines.test_processors import Wanting
from tests.server.serving import HELLO, curl, playing, serving, tiny

BODY = {"prompt": "Five tips", "max_tokens": 5, "temperature": 0}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {name: EntryPoint(name, f"{__name__}:Wanting", chain.GROUP) for name in ("wanting", "other")}
    monkeypatch.setattr(chain, "_installed", lambda: points)


def test_a_request_names_processors_that_the_server_allows() -> None:
    llm = tiny()
    wanted = llm.loaded.vocabulary.text([Wanting().token] * 5)
    with serving(llm, logits_processors=("wanting",)) as here:
        texts = []
        for pasta in ({"parallelism": 0}, {"parallelism": 0, "processors": ["wanting"]}):
            status, _, body = curl(f"{here.url}/v1/completions", {**BODY, "pasta": pasta})
            assert status == 200, body
            texts.append(body["choices"][0]["text"])
        assert texts[1] == wanted != texts[0]
        status, _, body = curl(f"{here.url}/v1/completions", {**BODY, "pasta": {"processors": ["wanting", "other"]}})
        assert status == 400 and body["error"]["param"] == "pasta.processors"
        assert "'other'" in body["error"]["message"] and "wanting" in body["error"]["message"]
        assert curl(f"{here.url}/v1/completions", {**BODY, "processors": ["wanting"]})[0] == 400, "it is PASTA's own"


def test_without_the_option_none_is_allowed() -> None:
    with serving(tiny()) as here:
        status, _, body = curl(f"{here.url}/v1/completions", {**BODY, "pasta": {"processors": ["wanting"]}})
        assert status == 400 and "--logits-processors" in body["error"]["message"]


def test_an_engine_without_logits_refuses_them() -> None:
    with serving(playing(), logits_processors=("wanting",)) as here:
        body = {"messages": HELLO, "pasta": {"processors": ["wanting"]}}
        status, _, answer = curl(f"{here.url}/v1/chat/completions", body)
        assert status == 400 and "leave out processors" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("names", "message"),
    [(("unknown",), "no logits processor 'unknown'"), (("caad",), "'caad' does not take these settings")],
)
def test_a_server_does_not_start_with_a_name_that_cannot_be_used(names: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Settings(name="m", logits_processors=names)
