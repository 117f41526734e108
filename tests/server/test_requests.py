"""What clients send that changes nothing, what ends an answer, and how a conversation or a prompt is read: as at
OpenAI, else as at vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pastalm import SamplingParams
from tests.server.serving import (
    HELLO,
    TIPS,
    TIPS_TEXT,
    Served,
    curl,
    events_of,
    playing,
    serving,
    tiny,
)

CHAT: dict[str, Any] = {"messages": HELLO, "max_tokens": 400}
RAW: dict[str, Any] = {"prompt": "x", "max_tokens": 400}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(playing(TIPS)) as here:
        yield here
        assert here.becomes_idle()


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    with serving(tiny(max_model_len=256)) as here:
        yield here
        assert here.becomes_idle()


def text_of(reply: Any) -> str:
    status, _, body = reply
    assert status == 200, body
    (choice,) = body["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


# ------------------------------------------------------------------------------ fields that change nothing

ANYWHERE: dict[str, list[Any]] = {
    "user": ["me", None], "safety_identifier": ["me"], "prompt_cache_key": ["k"], "prompt_cache_retention": ["24h"],
    "metadata": [{"a": "b"}, {}], "store": [True, False], "service_tier": ["auto", "default", "flex", "priority"],
    "ignore_eos": [False], "min_tokens": [0], "skip_special_tokens": [True], "stop_token_ids": [[]], "stop": [[]],
    "length_penalty": [1, 1.0, 2.0], "early_stopping": [False, True], "use_beam_search": [False],
    "spaces_between_special_tokens": [True, False], "include_stop_str_in_output": [False], "logit_bias": [{}],
    "frequency_penalty": [0], "presence_penalty": [0.0], "repetition_penalty": [1], "top_k": [-1, 0], "min_p": [0],
    "response_format": [{"type": "text"}], "priority": [0, 3], "request_id": ["r"], "bad_words": [[]],
    "truncation_side": ["left"], "structured_outputs": [None], "guided_json": [None], "anything_at_all": [None],
    "stream_options": [{"include_usage": False}, {"include_obfuscation": True}, None], "model": [None, "played"],
}  # fmt: skip
CHAT_ONLY: dict[str, list[Any]] = {
    "chat_template_kwargs": [{}, {"enable_thinking": False}], "continue_final_message": [False],
    "add_generation_prompt": [True], "add_special_tokens": [False], "documents": [[]], "echo": [False],
    "tools": [[], None], "tool_choice": ["none", "auto", None], "parallel_tool_calls": [True, False],
    "modalities": [["text"]], "prediction": [None, {"type": "content", "content": "x"}], "verbosity": ["low"],
    "reasoning_effort": ["low", None], "include_reasoning": [True, False], "functions": [[]], "function_call": ["none"],
    "top_logprobs": [0], "logprobs": [False],
}  # fmt: skip
RAW_ONLY: dict[str, list[Any]] = {
    "best_of": [1], "echo": [False], "suffix": ["", None], "add_special_tokens": [True], "logprobs": [None],
}  # fmt: skip


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_fields_that_change_nothing_are_taken(served: Served, path: str) -> None:
    body, own = (CHAT, CHAT_ONLY) if path.startswith("chat") else (RAW, RAW_ONLY)
    url = f"{served.url}/v1/{path}"
    for name, values in {**ANYWHERE, **own}.items():
        for value in values:
            assert text_of(curl(url, {**body, name: value})) == TIPS_TEXT, (name, value)
    every = {name: values[0] for name, values in {**ANYWHERE, **own}.items()}
    assert text_of(curl(url, {**body, **every})) == TIPS_TEXT


def test_tools_that_are_not_to_be_called_are_taken(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    url = f"{served.url}/v1/chat/completions"
    assert text_of(curl(url, {**CHAT, "tools": tools, "tool_choice": "none"})) == TIPS_TEXT
    for change in ({"tools": [], "tool_choice": "required"}, {"tool_choice": "required"}):
        assert curl(url, {**CHAT, **change})[2]["error"]["param"] == "tool_choice"
    for change in ({"tools": tools}, {"tools": tools, "tool_choice": "auto"}):
        error = curl(url, {**CHAT, **change})[2]["error"]
        assert error["param"] == "tools" and "scripted engine" in error["message"], "it has no logits to mask"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skip_special_tokens", False), ("include_stop_str_in_output", True), ("use_beam_search", True),
        ("use_beam_search", 1), ("best_of", 2), ("presence_penalty", 0.5), ("frequency_penalty", False),
        ("bad_words", ["x"]), ("prompt_logprobs", 0), ("truncate_prompt_tokens", 5), ("suffix", "y"),
        ("response_format", {"type": "json_object"}), ("guided_regex", "a"), ("allowed_token_ids", [1]),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_its_name(served: Served, name: str, value: Any) -> None:
    status, _, body = curl(f"{served.url}/v1/completions", {**RAW, name: value})
    assert status == 400 and body["error"]["param"] == name


# ------------------------------------------------------------------------------ messages

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ({"role": "user", "content": "x", "name": "me"}, "x"),
        ({"role": "user", "content": "x", "type": "text"}, "x"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}, "x"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]}, "a\nb"),
        ({"role": "user", "content": ["a", "b"]}, "a\nb"),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": "x", "reasoning_content": "why"}, "x"),
        ({"role": "assistant", "content": "x", "tool_calls": [], "function_call": None, "refusal": None}, "x"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "no"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}], "audio": None}, "x"),
        ({"role": "developer", "content": "x"}, "x"),
    ],
)
def test_messages_of_every_form_read_the_same(served: Served, message: dict[str, Any], plain: str) -> None:
    role = {"developer": "system"}.get(message["role"], message["role"])
    same = {"role": role, "content": plain}
    told = [curl(f"{served.url}/tokenize", {"messages": [m, *HELLO]}) for m in (message, same)]
    assert told[0][0] == 200 and told[0][2] == told[1][2]
    assert text_of(curl(f"{served.url}/v1/chat/completions", {**CHAT, "messages": [message, *HELLO]})) == TIPS_TEXT


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user", "content": ["x", {"type": "image_url", "image_url": {"url": "u"}}]}],
         "messages[0].content[1].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "file", "text": "x"}]}], "messages[0].content[0].type"),
        ([*HELLO, {"role": "user", "content": 5}], "messages[1].content"),
        ([*HELLO, {"role": "user"}], "messages[1].content"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x", "reasoning_content": "y"}], "messages[0].reasoning_content"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([*HELLO, {"role": "assistant", "tool_calls": [{"id": "c"}]}, *HELLO], "messages[1].tool_calls[0].function"),
        ("x", "messages"),
    ],
)  # fmt: skip
def test_errors_say_where_as_openai_writes_it(served: Served, messages: Any, param: str) -> None:
    status, _, body = curl(f"{served.url}/v1/chat/completions", {**CHAT, "messages": messages})
    assert (status, body["error"]["param"]) == (400, param), body
    assert "function-" not in body["error"]["message"] and "[Text" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["a", 5]}, "prompt[1]"), ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [99999999]}, "prompt"), ({"prompt": [[1], [99999999]]}, "prompt"), ({"prompt": ""}, "prompt"),
        ({"prompt": ["x", ""]}, "prompt"), ({"prompt": {}}, "prompt"), ({}, "prompt"),
        ({"prompt": "x", "stop": [1]}, "stop[0]"), ({"prompt": "x", "stop": "\ud800"}, "stop"),
        ({"prompt": "x", "logit_bias": {"999999": 1}}, "logit_bias"), ({"prompt": "x", "stop_token_ids": [99999999]},
        "stop_token_ids"), ({"prompt": "x", "min_tokens": 50}, "min_tokens"), ({"prompt": "x", "user": 3}, "user"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
        ({"prompt": "x", "stream_options": {"mood": 1}}, "stream_options.mood"),
        ({"prompt": "x y" * 3000}, "prompt"), ({"prompt": "x", "max_tokens": 99999}, "max_tokens"),
    ],
)  # fmt: skip
def test_every_refusal_names_its_field(served: Served, body: dict[str, Any], param: str) -> None:
    status, _, reply = curl(f"{served.url}/v1/completions", body)
    assert (status, reply["error"]["param"]) == (400, param), reply


def test_tool_calls_are_rendered_where_the_template_shows_them() -> None:
    llm = playing("Fine.")
    llm.loaded.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<{{ c.function.name }} {{ c.function.arguments }}>{% endfor %}{% endfor %}"
    )
    with serving(llm) as here:
        history = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
        history += [{"role": "tool", "tool_call_id": "c1", "content": "sunny"}]
        assert text_of(curl(f"{here.url}/v1/chat/completions", {**CHAT, "messages": history})) == "Fine."
        tokens = curl(f"{here.url}/tokenize", {"messages": history})[2]["tokens"]
        said = curl(f"{here.url}/detokenize", {"tokens": tokens})[2]["prompt"]
        assert said.endswith('[assistant]<weather {"city": "Bern"}>[tool]sunny')


# ------------------------------------------------------------------------------ how a conversation is rendered


def rendered(here: Served, **body: Any) -> str:
    status, _, told = curl(f"{here.url}/tokenize", body)
    assert status == 200, told
    return curl(f"{here.url}/detokenize", {"tokens": told["tokens"]})[2]["prompt"]


def test_a_final_message_can_be_continued(served: Served) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hello, "}]
    closed = rendered(served, messages=HELLO)
    again = rendered(served, messages=HELLO, add_generation_prompt=False)
    opened = rendered(served, messages=messages, continue_final_message=True)
    assert closed.startswith(again) and closed != again
    assert opened == closed + "Hello, "
    assert opened == rendered(served, messages=messages, continue_final_message=True, add_generation_prompt=False)
    asked = {"messages": messages, "max_tokens": 400, "continue_final_message": True}
    status, _, reply = curl(f"{served.url}/v1/chat/completions", asked)
    assert status == 200
    prompt = curl(f"{served.url}/tokenize", {"messages": messages, "continue_final_message": True})[2]["count"]
    assert reply["usage"]["prompt_tokens"] == prompt
    refused = curl(f"{served.url}/v1/chat/completions", {**asked, "add_generation_prompt": True})
    assert refused[2]["error"]["param"] == "continue_final_message"


def test_names_reach_the_chat_template() -> None:
    llm = playing("ok")
    llm.loaded.tokenizer.chat_template = (
        "{{ mood }}|{{ reasoning_effort }}|{% for d in documents or [] %}{{ d.text }}{% endfor %}|"
        "{{ messages[0].content }}"
    )
    with serving(llm) as here:
        url = f"{here.url}/v1/chat/completions"
        base = curl(url, CHAT)[2]["usage"]["prompt_tokens"]
        for change, more in (
            ({"chat_template_kwargs": {"mood": "abc"}}, 3),
            ({"reasoning_effort": "low"}, 3),
            ({"documents": [{"text": "abcd"}]}, 4),
        ):
            assert curl(url, {**CHAT, **change})[2]["usage"]["prompt_tokens"] == base + more
        for name in ("tokenize", "messages", "add_generation_prompt"):
            reply = curl(url, {**CHAT, "chat_template_kwargs": {name: "x"}})[2]
            assert reply["error"]["param"] == "chat_template_kwargs"
        special = {"messages": HELLO, "chat_template_kwargs": {"mood": "<|sync|>"}}
        tags = here.llm.loaded.vocabulary.tags
        assert tags is not None and tags.sync not in curl(f"{here.url}/tokenize", special)[2]["tokens"]


# ------------------------------------------------------------------------------ ends


def test_ends_are_as_at_vllm(served: Served) -> None:
    url = f"{served.url}/v1/completions"
    stop = ord("h")
    (h,) = served.llm.loaded.vocabulary.encode("h")
    whole = curl(url, {**RAW, "stop_token_ids": [h]})[2]["choices"][0]
    assert (whole["text"], whole["finish_reason"]) == (TIPS_TEXT.partition(chr(stop))[0], "stop")
    streamed = events_of(curl(url, {**RAW, "stop_token_ids": [h], "stream": True})[2])
    assert "".join(c["choices"][0]["text"] for c in streamed) == whole["text"]
    many = [f"no{i}" for i in range(63)] + ["eight"]
    assert text_of(curl(url, {**RAW, "stop": many})) == TIPS_TEXT.partition("eight")[0]
    longer = curl(url, {**RAW, "ignore_eos": True, "max_tokens": 300})[2]
    assert longer["usage"]["completion_tokens"] == 300 and longer["choices"][0]["finish_reason"] == "length"
    least = curl(url, {**RAW, "min_tokens": 200})[2]
    assert least["usage"]["completion_tokens"] >= 200
    assert text_of(curl(url, {**RAW, "min_tokens": 10, "stop": "Two"})) == TIPS_TEXT


# ------------------------------------------------------------------------------ several prompts


def test_the_same_prompt_again_gets_another_answer(small: Served) -> None:
    """With a seed and without; and any prompt alone gets with its seed what it gets among others."""
    url = f"{small.url}/v1/completions"

    def texts(**body: Any) -> list[str]:
        status, _, reply = curl(url, {"max_tokens": 12, "temperature": 1, "pasta": {"parallelism": 0}, **body})
        assert status == 200, reply
        return [choice["text"] for choice in reply["choices"]]

    assert len(set(texts(prompt=["hello"] * 3))) == 3
    many = texts(prompt=["hello", "there", "hello", "there"], seed=7)
    assert len(set(many)) == 4
    assert [texts(prompt="hello", seed=7), texts(prompt="there", seed=7)] == [many[:1], many[1:2]]
    assert texts(prompt="hello", n=2, seed=7) == [many[0], many[2]] == texts(prompt=["hello"] * 2, seed=7)
    assert texts(prompt=["hello"] * 2, n=2, seed=7) == texts(prompt="hello", n=4, seed=7)


# ------------------------------------------------------------------------------ tokens


def test_tokens_there_and_back(served: Served) -> None:
    text = "Hello, ✓ world"
    status, _, told = curl(f"{served.url}/tokenize", {"model": "played", "prompt": text, "return_token_strs": True})
    assert status == 200 and told["tokens"] == served.llm.encode(text, SamplingParams())
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 2048 and "".join(told["token_strs"]) == text
    assert curl(f"{served.url}/detokenize", {"tokens": told["tokens"]})[2] == {"prompt": text}
    chat = curl(f"{served.url}/tokenize", {"messages": HELLO})[2]
    assert chat["tokens"] == served.llm.encode(HELLO, SamplingParams()) and chat["token_strs"] is None
    empty = curl(f"{served.url}/tokenize", {"prompt": ""})
    assert empty[0] == 200
    assert curl(f"{served.url}/detokenize", {"tokens": [99999999]})[2]["error"]["param"] == "tokens"
    assert curl(f"{served.url}/tokenize", {})[2]["error"]["param"] == "prompt"
    assert curl(f"{served.url}/tokenizer_info")[2]["chat_template"]


# ------------------------------------------------------------------------------ echo


def scores(small: Served, ids: list[int]) -> list[float]:
    """What plain transformers gives each token but the first."""
    import torch

    model = small.llm.loaded.model
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [right[i, token].item() for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_log_probabilities_of_the_prompt(small: Served, max_tokens: int, stream: bool) -> None:
    vocabulary = small.llm.loaded.vocabulary
    prompts = [vocabulary.encode("some words ✓"), vocabulary.encode("other")]
    body = {"prompt": prompts, "max_tokens": max_tokens, "echo": True, "logprobs": 2, "temperature": 0}
    asked = {**body, "stream": stream, "pasta": {"parallelism": 0}}
    status, _, reply = curl(f"{small.url}/v1/completions", asked)
    assert status == 200, reply
    chunks = [c["choices"][0] for c in events_of(reply)] if stream else reply["choices"]
    for i, ids in enumerate(prompts):
        mine = [c for c in chunks if c["index"] == i]
        told = {
            key: [x for c in mine for x in c["logprobs"][key]]
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        text = "".join(c["text"] for c in mine)
        assert text.startswith(vocabulary.text(ids))
        assert len(told["tokens"]) == len(ids) + max_tokens == len(told["text_offset"])
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert told["token_logprobs"][1 : len(ids)] == pytest.approx(scores(small, ids), abs=1e-6)
        rows = zip(told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)
        assert all(top[token] >= logprob for token, logprob, top in rows), "of tokens of one text the likeliest"
        assert told["text_offset"] == sorted(told["text_offset"]) and max(told["text_offset"]) <= len(text)
        assert mine[-1]["finish_reason"] in ("length", "stop")


def test_the_end_is_a_token_behind_an_echo(small: Served) -> None:
    """Whoever scores an answer drops the one token that was asked for: it must be there, also where it is the end."""
    ids = small.llm.loaded.vocabulary.encode("word")
    body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "logit_bias": {"1": 100}}
    (choice,) = curl(f"{small.url}/v1/completions", body)[2]["choices"]
    assert choice["text"] == "word" and choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1


def test_an_echo_without_log_probabilities_and_nothing_at_all(served: Served) -> None:
    url = f"{served.url}/v1/completions"
    assert text_of(curl(url, {**RAW, "prompt": "Say: ", "echo": True})) == "Say: " + TIPS_TEXT
    assert text_of(curl(url, {"prompt": "Say: ", "echo": True, "max_tokens": 0})) == "Say: "
    nothing = curl(url, {"prompt": "Say: ", "max_tokens": 0})[2]
    assert nothing["choices"][0]["finish_reason"] == "length" and nothing["usage"]["completion_tokens"] == 0
    refused = curl(url, {**RAW, "echo": True, "logprobs": 1})
    assert refused[0] == 400 and refused[2]["error"]["param"] == "echo", "scripts have no prompt to score"


# ------------------------------------------------------------------------------ who may ask


def test_one_model_by_its_name(served: Served) -> None:
    told = curl(f"{served.url}/v1/models/played")[2]
    assert told["id"] == "played" and told["object"] == "model"
    assert served.client.models.retrieve("played").id == "played"
    status, _, body = curl(f"{served.url}/v1/models/other/one")
    assert (status, body["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type_is_said(served: Served, kind: str | None) -> None:
    header = f"Content-Type: {kind}" if kind else "Content-Type:"
    sent = ("--header", header, "--data-binary", json.dumps(RAW))
    status, _, body = curl(f"{served.url}/v1/completions", None, *sent)
    assert status == 400 and body["error"]["code"] == "unsupported_content_type"
    assert "application/json" in body["error"]["message"]


def test_a_page_elsewhere_may_ask_only_where_it_is_named() -> None:
    def asked(here: Served, origin: str, *options: str) -> tuple[int, str | None]:
        status, headers, _ = curl(f"{here.url}/v1/models", None, "--header", f"Origin: {origin}", *options)
        return status, headers.get("access-control-allow-origin")

    before = ("--request", "OPTIONS", "--header", "Access-Control-Request-Method: POST", "--header",
              "Access-Control-Request-Headers: authorization,content-type")  # fmt: skip
    with serving(playing(), api_key="secret", cors_origins=("https://a.example",)) as here:
        assert asked(here, "https://a.example", *before) == (200, "https://a.example"), "the key comes later"
        assert asked(here, "https://a.example") == (401, "https://a.example"), "it may read why"
        assert asked(here, "https://b.example", *before)[1] is None
    with serving(playing()) as here:
        assert asked(here, "https://a.example")[1] is None
    with serving(playing(), cors_origins=("*",)) as here:
        assert asked(here, "https://b.example") == (200, "*")


def test_a_name_that_points_here_is_not_this_server() -> None:
    with serving(playing(), hosts=("proxied.example",)) as here:
        port = here.url.rpartition(":")[2]

        def status(host: str) -> int:
            return curl(f"{here.url}/v1/models", None, "--header", f"Host: {host}")[0]

        for host in ("localhost", "LOCALHOST", "127.0.0.1", f"localhost:{port}", f"[::1]:{port}", "proxied.example"):
            assert status(host) == 200, host
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example"):
            assert status(host) == 403, host
        code = curl(f"{here.url}/health", None, "--header", "Host: evil.example")[2]["error"]["code"]
        assert code == "host_not_allowed"
    with serving(playing(), api_key="secret") as here:
        allowed = ("--header", "Authorization: Bearer secret", "--header", "Host: proxied.example")
        assert curl(f"{here.url}/v1/models", None, *allowed)[0] == 200, "a page elsewhere has no key"
