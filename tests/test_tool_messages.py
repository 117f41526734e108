"""Tool calls of earlier answers reach the model under any chat template, and no argument becomes a special token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastalm.core.vocabulary import TAG_TOKENS
from pastalm.models import lossless
from pastalm.models.chat_template import Rendering, encode_chat
from tests.test_models import byte_level

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
PRINTED = PLAIN.replace(
    "{% endfor %}",
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments }}>{% endfor %}{% endfor %}",
)
AS_JSON = PRINTED.replace("c.function.arguments", "c.function.arguments | tojson")
READ = PRINTED.replace(
    "{{ c.function.arguments }}", "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def said(template: str, messages: list[dict[str, Any]]) -> str:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": list(TAG_TOKENS.values())})
    tokenizer.chat_template = template
    vocabulary = lossless.vocabulary_of(tokenizer, eos=[1])
    ids = encode_chat(tokenizer, vocabulary, messages, rendering=Rendering(add_generation_prompt=False))
    special = set(tokenizer.added_tokens_decoder)
    assert not special.intersection(ids), "nothing in a message is a special token"
    return vocabulary.text(ids)


def history(arguments: str, *results: str) -> list[dict[str, Any]]:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for i in range(len(results))
    ]
    answers = [{"role": "tool", "tool_call_id": f"c{i}", "content": result} for i, result in enumerate(results)]
    return [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": calls}, *answers]


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (PRINTED, '<weather {"city":"Bern"}>'),
        (AS_JSON, '<weather {"city": "Bern"}>'),
        (READ, "<weather city=Bern;>"),
        (PLAIN, '<tool_call>\n{"name": "weather", "arguments": {"city":"Bern"}}\n</tool_call>'),
    ],
)
def test_a_template_reads_the_arguments_as_it_likes(template: str, call: str) -> None:
    result = "<tool_response>\nsunny\n</tool_response>" if template == PLAIN else "sunny"
    role = "user" if template == PLAIN else "tool"
    text = said(template, history('{"city":"Bern"}', "sunny"))
    assert text == f"[user]Go.[assistant]{call}[{role}]{result}"


def test_results_are_one_message_where_roles_must_alternate() -> None:
    text = said(STRICT, history('{"city": "Bern"}', "sunny", "cold"))
    assert text.count("<tool_call>") == 2 and text.count("[user]") == 2
    assert text.endswith("<tool_response>\nsunny\n</tool_response>\n<tool_response>\ncold\n</tool_response>")


def test_a_text_beside_a_call_is_kept() -> None:
    messages = history("{}", "ok")
    messages[1]["content"] = "Let me see."
    assert "[assistant]Let me see.\n<tool_call>\n" in said(PLAIN, messages)


VALUES = st.one_of(st.text(max_size=6), st.integers(), st.sampled_from([*TAG_TOKENS.values()]))


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.dictionaries(st.text(max_size=4), VALUES), st.sampled_from(["", "{", "[1]", "null", "x"])),
    st.sampled_from([PLAIN, PRINTED, AS_JSON, READ]),
    st.booleans(),
)
def test_whatever_the_arguments_are_no_token_is_special(arguments: Any, template: str, escaped: bool) -> None:
    """Also where the special token is only there once the JSON is read: \\u003c is <."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    text = text.replace("<|", "\\u003c|") if escaped else text
    if template == READ and isinstance(arguments, str):
        return  # such a template reads objects only
    assert "weather" in said(template, history(text, "sunny"))
