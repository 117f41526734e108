"""Requests made from the server's own OpenAPI document, valid and not: none of them is the server's fault,
and what it replies is documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.serving import Served, playing, serving

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message that says something, whatever its role needs besides."""
    role, content = message.get("role"), message.get("content")
    return {"role": role if role in ("system", "assistant") else "user", "content": content or "x"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(playing("Hello.")) as here:
        yield here
        assert here.becomes_idle()


_LEAN = ("model", "messages", "prompt", "stream", "tokens")
PATHS = {
    "/v1/chat/completions": "POST", "/v1/completions": "POST", "/tokenize": "POST", "/detokenize": "POST",
    "/v1/models": "GET", "/v1/models/{model}": "GET", "/tokenizer_info": "GET", "/health": "GET", "/metrics": "GET",
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_request_is_a_server_error(served: Served, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operation = schema[path][PATHS[path]]
    modes = schemathesis.GenerationMode
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))
    statuses: set[int] = set()

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases, lean=st.booleans())
    def holds(case: Any, lean: bool) -> None:
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "played"  # no made-up name would get further
            if lean:  # nor many a set of fields that exclude each other
                case.body = {k: v for k, v in case.body.items() if k in _LEAN}
            if lean and isinstance(messages := case.body.get("messages"), list):
                case.body["messages"] = [plain(m) for m in messages if isinstance(m, dict)]
        elif lean and "model" in (case.path_parameters or {}):
            case.path_parameters["model"] = "played"
        response = case.call()
        statuses.add(response.status_code)
        assert response.status_code < 500, (case.body, response.text)
        case.validate_response(response, checks=[checks.content_type_conformance, checks.response_schema_conformance])
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    holds()
    assert served.client.chat.completions.create(model="played", messages=[{"role": "user", "content": "x"}]).choices
    assert 200 in statuses, "none of them got through"
