"""The server as clients see it: the openai package and curl, streaming and not, and what is refused.

Over scripts, so that what comes is known: the tokenizer is real, the weights are not there.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from pastalm import SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.errors import RequestError
from pastalm.records.traces import from_json
from pastalm.server.app import listen
from pastalm.server.settings import Settings
from tests.server.serving import (
    HELLO,
    TIPS,
    TIPS_TEXT,
    Served,
    curl,
    events_of,
    eventually,
    joined,
    open_stream,
    playing,
    serving,
)

CHAT: dict[str, Any] = {"model": "played", "messages": HELLO, "max_tokens": 400}
SLOW = {"step_seconds": 0.02}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(playing(TIPS)) as here:
        yield here
        assert here.becomes_idle()


# ------------------------------------------------------------------------------ the openai client


def test_the_openai_client_gets_the_text(served: Served) -> None:
    reply = served.client.chat.completions.create(**CHAT)
    assert reply.choices[0].message.content == TIPS_TEXT
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    (told,) = reply.usage.pasta["choices"]
    assert told["tokens"] == reply.usage.completion_tokens > told["critical_path"]
    assert told["threads"] == 3


def test_the_openai_client_gets_the_same_as_a_stream(served: Served) -> None:
    stream = served.client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TIPS_TEXT
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 20
    assert {c.id for c in chunks} == {chunks[0].id}
    assert len(chunks) > 10, "it came at once, not live"


def test_completions_whole_and_streaming(served: Served) -> None:
    asked: dict[str, Any] = {"model": "played", "prompt": "Say", "max_tokens": 400}
    reply = served.client.completions.create(**asked)
    assert reply.choices[0].text == TIPS_TEXT
    chunks = list(served.client.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == TIPS_TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_choices_and_prompts() -> None:
    with serving(playing("one", "two", "three", "four")) as here:
        asked: dict[str, Any] = {"model": "played", "prompt": ["a", [65, 66]], "n": 2}
        assert curl(f"{here.url}/v1/completions", asked)[0] == 400, "texts and ids are not to be mixed"
        reply = here.client.completions.create(**{**asked, "prompt": ["a", "b"]})
        assert [(c.index, c.text) for c in reply.choices] == [*enumerate(["one", "two", "three", "four"])]
        chunks = list(here.client.chat.completions.create(**CHAT, n=2, stream=True))
        texts = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in (0, 1)]
        assert texts == ["one", "two"]
        ends = [c.choices[0].index for c in chunks if c.choices[0].finish_reason]
        assert sorted(ends) == [0, 1]


def test_stream_options_that_ask_for_nothing_are_taken(served: Served) -> None:
    url = f"{served.url}/v1/chat/completions"
    assert curl(url, {**CHAT, "stream": False, "stream_options": {"include_usage": False}})[0] == 200


def test_the_document_asks_for_a_key_if_the_server_does(served: Served) -> None:
    with serving(playing(), api_key="secret") as locked:
        bearer = ("--header", "Authorization: Bearer secret")
        for here, wanted, options in ((served, None, ()), (locked, [{"HTTPBearer": []}], bearer)):
            document = curl(f"{here.url}/openapi.json", None, *options)[2]
            assert document["paths"]["/v1/models"]["get"].get("security") == wanted


def test_max_tokens_is_the_reason(served: Served) -> None:
    reply = served.client.chat.completions.create(**{**CHAT, "max_tokens": 5})
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None and reply.usage.completion_tokens == 5
    assert served.client.completions.create(model="played", prompt="x").usage.completion_tokens == 16


def test_log_probabilities_are_of_the_text(served: Served) -> None:
    asked = {**CHAT, "logprobs": True, "top_logprobs": 1, "stop": ["hungry"]}
    reply = served.client.chat.completions.create(**asked)
    told = reply.choices[0].logprobs.content
    whole = b"".join(bytes(token.bytes) for token in told).decode()
    assert reply.choices[0].message.content == TIPS_TEXT.partition("hungry")[0]
    assert whole.startswith(reply.choices[0].message.content)
    assert len(whole) < len(reply.choices[0].message.content) + len("hungry"), "none after the cut"
    assert all(t.logprob == 0 and t.top_logprobs[0].token == t.token for t in told)
    chunks = list(served.client.chat.completions.create(**asked, stream=True))
    assert [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content] == told
    raw = served.client.completions.create(model="played", prompt="x", max_tokens=400, logprobs=1)
    text, told = raw.choices[0].text, raw.choices[0].logprobs
    assert all(text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True))
    assert "".join(told.tokens) == text and set(told.token_logprobs) == {0}


def test_parallelism_is_the_requests_own(served: Served) -> None:
    for parallelism, threads in ((0, 1), (1, 3), (2.5, 3)):
        reply = served.client.chat.completions.create(**CHAT, extra_body={"pasta": {"parallelism": parallelism}})
        assert reply.choices[0].message.content == TIPS_TEXT
        assert reply.usage.pasta["fork_odds"] == parallelism
        assert reply.usage.pasta["choices"][0]["threads"] == threads


def test_events_are_a_trace(served: Served) -> None:
    body = {**CHAT, "stream": True, "stop": "practice", "pasta": {"events": True}}
    status, _, text = curl(f"{served.url}/v1/chat/completions", body)
    chunks = events_of(text)
    events = [from_json(json.dumps(e)) for c in chunks for e in c.get("pasta", {}).get("events", [])]
    told = Transcript(events)
    assert status == 200
    assert told.text == joined(chunks) == TIPS_TEXT.partition("practice")[0]
    assert len(told.threads) == 3 and told.finished
    silent = events_of(curl(f"{served.url}/v1/chat/completions", {**body, "pasta": {"events": False}})[2])
    assert joined(silent) == told.text
    assert not any("pasta" in chunk for chunk in silent)


def test_the_first_unfinished_chunk_is_live() -> None:
    """The second chunk of the answer is there long before the first ends, and is held until then."""
    script = (
        '<promise topic="a" tokens="100"/><async>' + "a " * 60 + '</async><promise topic="b" tokens="10"/>'
        "<async>b</async><sync/>c"
    )
    with serving(playing(script)) as here:
        chunks = events_of(curl(f"{here.url}/v1/chat/completions", {**CHAT, "stream": True})[2])
    pieces = [c["choices"][0]["delta"].get("content") for c in chunks if c["choices"][0]["delta"].get("content")]
    assert "".join(pieces) == "a " * 60 + "bc"
    assert len(pieces) > 60, "the first chunk is shown while it is written"
    assert [p for p in pieces if "b" in p][0].endswith("b"), "the second is shown once the first is whole"


def test_history_is_the_readers_text() -> None:
    with serving(playing(TIPS, "Well.")) as here:
        first = here.client.chat.completions.create(**CHAT)
        history = [*HELLO, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
        second = here.client.chat.completions.create(**{**CHAT, "messages": history})
        assert second.choices[0].message.content == "Well."
        said = here.llm.encode(
            [*HELLO, {"role": "assistant", "content": TIPS_TEXT}, {"role": "user", "content": "Why?"}],
            SamplingParams(),
        )
        assert second.usage.prompt_tokens == len(said)


# ------------------------------------------------------------------------------ what is refused


def refused(reply: tuple[int, dict[str, str], Any], status: int, code: str | None, *words: str) -> None:
    """OpenAI's error shape, with the status, the code and some words."""
    got, _, body = reply
    assert (got, body["error"]["code"]) == (status, code), body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert all(word in body["error"]["message"] for word in words), body
    assert "\n" not in body["error"]["message"]


OFF: dict[str, list[Any]] = {
    "frequency_penalty": [0], "presence_penalty": [0.0], "response_format": [{"type": "text"}],
    "modalities": [["text"]], "tools": [[]], "tool_choice": ["none", "auto"], "functions": [[]],
    "function_call": ["none", "auto"], "suffix": [""], "use_beam_search": [False], "skip_special_tokens": [True],
    "include_stop_str_in_output": [False], "bad_words": [[]], "watermarking": [False], "truncate_prompt_tokens": [-1],
    "thinking_token_budget": [-1], "return_tokens_as_token_ids": [False], "return_token_ids": [False],
    "return_prompt_text": [False], "routed_experts_prompt_start": [0], "vllm_xargs": [{}],
}  # fmt: skip
"""Values of fields that are not supported which change nothing."""
VLLM = {
    "allowed_token_ids", "bad_words", "cache_salt", "chat_template", "documents", "ec_transfer_params", "echo",
    "include_reasoning", "include_stop_str_in_output", "kv_transfer_params", "length_penalty", "logprob_token_ids",
    "media_io_kwargs", "mm_processor_kwargs", "priority", "prompt_logprobs", "repetition_detection", "request_id",
    "return_prompt_text", "return_token_ids", "return_tokens_as_token_ids", "routed_experts_prompt_start",
    "session_id", "skip_special_tokens", "spaces_between_special_tokens", "stream_interval", "structured_outputs",
    "thinking_token_budget", "truncate_prompt_tokens", "truncation_side", "use_beam_search", "vllm_xargs",
    "watermarking", "ignore_eos", "min_tokens", "stop_token_ids", "add_special_tokens", "top_k", "min_p",
    "repetition_penalty", "return_token_offsets", "return_mm_kwargs",
}  # fmt: skip
"""vLLM's fields beside OpenAI's."""
ASKED: dict[str, Any] = {"chat/completions": CHAT, "completions": {"model": "played", "prompt": "x"}}


@pytest.mark.parametrize("path", ASKED)
def test_every_field_of_openai_and_vllm_is_taken_or_refused(served: Served, path: str) -> None:
    params = chat_params if path.startswith("chat") else completion_params
    known = {*params.CompletionCreateParamsBase.__annotations__, "stream"} | VLLM
    schema = curl(f"{served.url}/openapi.json")[2]["components"]["schemas"]
    taken = set(schema["ChatRequest" if path.startswith("chat") else "CompletionRequest"]["properties"])
    url = f"{served.url}/v1/{path}"
    for name in sorted(known):
        needed = name in ("messages", "prompt")
        assert curl(url, {**ASKED[path], name: None})[0] == (400 if needed else 200), name
    for name in sorted(known - taken):
        reply = curl(url, {**ASKED[path], name: {"type": "anything"}})
        refused(reply, 400, "unsupported_parameter", name, "not supported")
        assert reply[2]["error"]["param"] == name
        if name in OFF and not (path == "completions" and ("tool" in name or "func" in name or name == "modalities")):
            for value in OFF[name]:
                assert name == "suffix" and path.startswith("chat") or curl(url, {**ASKED[path], name: value})[0] == 200


def test_tools_and_formats_are_refused_to_the_openai_client(served: Served) -> None:
    for extra in (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"response_format": {"type": "json_object"}},
        {"web_search_options": {}},
    ):
        with pytest.raises(openai.BadRequestError, match="not supported"):
            served.client.chat.completions.create(**CHAT, **extra)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"surprise": 1}, "unsupported_parameter", "surprise"),
        ({"pasta": {"surprise": 1}}, "unsupported_parameter", "pasta.surprise"),
        ({"pasta": {"events": True}}, "invalid_value", "stream"),
        ({"pasta": {"parallelism": -1}}, "invalid_value", "parallelism"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "invalid_value", "empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "role"),
        ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "unsupported_parameter", "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_value", "messages"),
        ({"\ud800": 1}, "invalid_value", "unicode"),
        ({"model": "gpt-4"}, "model_not_found", "played"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": float("nan")}, "invalid_value", "temperature"),
        ({"temperature": "0"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 100}, None, "at most"),
        ({"n": True}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 3000}, "context_length_exceeded", "2048"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "not both"),
        ({"top_logprobs": 3}, "invalid_value", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"stop": ["a"] * 65}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": "x" * 257}, "invalid_value", "stop"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"3": 101}}, "invalid_value", "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream"),
    ],
)
def test_bad_values_are_refused(served: Served, change: dict[str, Any], code: str | None, words: str) -> None:
    for stream in (False, True) if code not in ("invalid_value",) else (False,):
        reply = curl(f"{served.url}/v1/chat/completions", {**CHAT, "stream": stream, **change})
        refused(reply, 404 if code == "model_not_found" else 400, code, words)


@pytest.mark.parametrize("body", ["", "{", "[]", "[" * 5000, '"x"', "null", "\x00"])
def test_what_is_no_request_is_refused(served: Served, body: str) -> None:
    status, _, reply = curl(f"{served.url}/v1/chat/completions", body)
    assert status == 400
    assert reply["error"]["message"]


def test_paths_and_methods_that_are_not_there(served: Served) -> None:
    refused(curl(f"{served.url}/v1/embeddings", {}), 404, None, "Not Found")
    refused(curl(f"{served.url}/v1/completions"), 405, None, "Method Not Allowed")


def test_limits_on_prompts_and_bodies() -> None:
    with serving(playing(), max_prompt_tokens=60, max_body=4000) as here:
        url = f"{here.url}/v1/completions"
        asked = {"model": "played", "max_tokens": 5}
        assert curl(url, {**asked, "prompt": "x y" * 20})[0] == 200
        refused(curl(url, {**asked, "prompt": "x y" * 31}), 400, "context_length_exceeded", "most is 60")
        refused(curl(url, {**asked, "prompt": []}), 400, None, "empty")
        refused(curl(url, {**asked, "prompt": ""}), 400, "invalid_value", "empty")
        refused(curl(url, {**asked, "prompt": "x" * 4000}), 413, None, "4000 bytes")
        chunked = curl(url, {**asked, "prompt": "x" * 4000}, "--header", "Transfer-Encoding: chunked")
        refused(chunked, 413, None, "4000 bytes")


def test_an_api_key_is_wanted() -> None:
    with serving(playing(), api_key="secret") as here:
        for path in ("v1/models", "v1/chat/completions", "metrics", "docs", "openapi.json", "tokenize", "other"):
            body = CHAT if "chat" in path else None
            for options in ((), ("--header", "Authorization: Bearer wrong"), ("--header", "Authorization: secret")):
                reply = curl(f"{here.url}/{path}", body, *options)
                refused(reply, 401, "invalid_api_key", "Bearer")
                assert reply[1]["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            here.client.models.list()
        assert here.client.with_options(api_key="secret").chat.completions.create(**CHAT).choices
        assert curl(f"{here.url}/health")[0] == curl(f"{here.url}/")[0] == 200
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert curl(f"{here.url}/metrics", None, "--header", f"Authorization: {scheme} secret")[0] == 200


# ------------------------------------------------------------------------------ load


def test_a_full_queue_answers_429() -> None:
    with serving(playing(TIPS, max_num_seqs=1, **SLOW), max_queue=1) as here:
        url = f"{here.url}/v1/chat/completions"
        with open_stream(url, CHAT), open_stream(url, CHAT):
            reply = curl(url, CHAT)
            refused(reply, 429, "rate_limit_exceeded", "later")
            assert int(reply[1]["retry-after"]) >= 1
        assert here.becomes_idle()
        patient = here.client.with_options(max_retries=5)
        with open_stream(url, CHAT) as one, open_stream(url, CHAT) as two:
            held = [events_of(each.read().decode()) for each in (one, two)]
            assert [joined(chunks) for chunks in held] == [TIPS_TEXT] * 2
            assert patient.chat.completions.create(**CHAT).choices[0].message.content == TIPS_TEXT


def test_no_more_forks_where_enough_threads_live() -> None:
    """Of requests that give no parallelism, and until some of the threads have ended."""
    with serving(playing(TIPS, **SLOW), thread_target=2, parallelism=1.5) as here:
        url = f"{here.url}/v1/chat/completions"
        assert here.client.chat.completions.create(**CHAT).usage.pasta["fork_odds"] == 1.5
        with open_stream(url, CHAT), open_stream(url, CHAT), open_stream(url, CHAT):
            assert eventually(lambda: here.metrics()["pasta_live_threads"] >= 3)
            assert here.client.chat.completions.create(**CHAT).usage.pasta["fork_odds"] == 0
            own = here.client.chat.completions.create(**CHAT, extra_body={"pasta": {"parallelism": 1}})
            assert own.usage.pasta["fork_odds"] == 1
        assert here.becomes_idle()
        assert here.client.chat.completions.create(**CHAT).usage.pasta["fork_odds"] == 1.5


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_told_so(stream: bool) -> None:
    with serving(playing("x" * 500, **SLOW), timeout=0.3) as here:
        status, headers, body = curl(f"{here.url}/v1/chat/completions", {**CHAT, "stream": stream})
        told = events_of(body)[-1] if stream else body
        assert (status, told["error"]["code"]) == (200 if stream else 504, "timeout")
        assert stream or headers["x-should-retry"] == "false"
        assert here.becomes_idle()


def test_a_body_that_does_not_come_is_told_so() -> None:
    with serving(playing(), client_timeout=0.3) as here:
        host, port = here.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)
        assert here.becomes_idle()


def test_one_who_does_not_read_is_left() -> None:
    body = json.dumps({**CHAT, "max_tokens": 1500, "stream": True, "pasta": {"events": True}}).encode()
    with serving(playing("x" * 2000), send_buffer=4096, client_timeout=0.3) as here:
        host, port = here.url.removeprefix("http://").split(":")
        with socket.socket() as idle:
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            idle.connect((host, int(port)))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            idle.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            assert eventually(lambda: here.metrics()["pasta_unfinished_answers"] == 1)
            assert here.becomes_idle()
            assert here.metrics()["pasta_disconnects_total"] == 1


def test_one_who_leaves_frees_the_slots_within_a_step() -> None:
    """The step after the one under way does not decode for a client that has left."""
    llm = playing("x" * 2000, step_seconds=0.05, max_num_seqs=1)
    with serving(llm) as here:
        url = f"{here.url}/v1/chat/completions"
        for body in ({**CHAT, "max_tokens": 1500}, {"model": "played", "prompt": "x", "max_tokens": 1500}):
            path = url if "messages" in body else f"{here.url}/v1/completions"
            stream = open_stream(path, body)
            assert stream.readline()
            assert eventually(lambda: bool(llm.driver.running))
            (running,) = llm.driver.running.values()
            stream.close()
            left = running.transcript.steps
            assert eventually(lambda: not llm.driver.running)
            assert running.transcript.steps - left < 20, "slots were held for many steps"
            assert running.transcript.finish_reason == "abort"
        with pytest.raises(openai.APITimeoutError):
            here.client.with_options(timeout=0.4).chat.completions.create(**{**CHAT, "max_tokens": 1500})
        assert here.becomes_idle()
        assert here.metrics()["pasta_disconnects_total"] == 3


# ------------------------------------------------------------------------------ the other pages


def test_models_health_docs_and_metrics(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["played"]
    assert curl(f"{served.url}/health")[2] == {"status": "ok"}
    page = curl(f"{served.url}/docs")[2]
    asked = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(asked) >= 3 and not any("//" in path for path in asked), "another host is asked"
    assert all(curl(f"{served.url}{path}")[0] == 200 for path in asked if path.endswith(("js", "css")))
    before = served.metrics()
    served.client.chat.completions.create(**CHAT)
    curl(f"{served.url}/v1/completions", {})
    assert eventually(lambda: served.metrics()["pasta_request_seconds_count"] > before["pasta_request_seconds_count"])
    after = served.metrics()
    key = 'pasta_requests_total{path="/v1/chat/completions",status="200"}'
    assert after[key] == before.get(key, 0) + 1
    assert after["pasta_tokens_total"] > before["pasta_tokens_total"]
    assert after["pasta_critical_path_tokens_total"] < after["pasta_tokens_total"]
    bad = 'pasta_requests_total{path="/v1/completions",status="400"}'
    assert after[bad] == before.get(bad, 0) + 1


@pytest.mark.parametrize(
    "bad", [{"parallelism": -1}, {"timeout": 0}, {"max_body": 0}, {"max_queue": -1}, {"api_key": ""}]
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Settings(**{"name": "x", **bad})


def test_a_port_that_is_taken_is_one_line() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(RequestError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])
