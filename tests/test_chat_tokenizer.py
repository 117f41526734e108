"""A tokenizer without transformers gives the ids and the prompts that transformers' own gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pastalm.core.vocabulary import TAG_TOKENS
from pastalm.errors import CapabilityError
from pastalm.models import chat_template, downloads
from pastalm.models.chat_template import encode_chat
from pastalm.models.chat_tokenizer import ChatTokenizer, described
from pastalm.models.lossless import vocabulary_of
from tests.test_models import ANY_TEXT, BYTE_LEVEL, prepared_tokenizer, sentence_pieces

ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
MESSAGES = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, ROLES, ANY_TEXT),
    min_size=1,
    max_size=5,
)
TEMPLATES = [
    BYTE_LEVEL.chat_template,
    # what templates in use are made of, each at least once
    """
{%- if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}
{{ bos_token }}{% set seen = namespace(count=0) %}
    {%- for m in messages %}
        {% if m.role == 'tool' %}{% continue %}{% endif %}
        {% if loop.index0 > 3 %}{% break %}{% endif %}
        {% set seen.count = seen.count + 1 %}
    {{- '[' ~ m.role ~ ']' }}{% if m.name is defined %}named{% endif %}
    {% generation %}{{ m.content.strip() }}{{ eos_token }}{% endgeneration %}
    {%- endfor %}
{{ {'count': seen.count, 'text': messages[-1].content} | tojson }} {{ dict(a=1) | tojson(indent=2) }}
{% if tools is none and not documents %}no tools{% endif %} {{ strftime_now('%Y') }}
{% if m is undefined %}gone{% endif %}{% for m in messages if m.thinking is defined %}{{ m.thinking }}{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}
""",
]


def both(tokenizer: Any) -> tuple[Any, ChatTokenizer]:
    return tokenizer, ChatTokenizer(described(tokenizer))


BYTES, SENTENCES, PREPARED = (
    both(BYTE_LEVEL),
    both(sentence_pieces()),
    both(prepared_tokenizer()[0]),
)
ALL = st.sampled_from([BYTES, SENTENCES, PREPARED])


@given(pair=ALL, text=ANY_TEXT, special=st.booleans())
def test_ids_are_transformers(pair: tuple[Any, ChatTokenizer], text: str, special: bool) -> None:
    theirs, ours = pair
    assert (
        ours(text, add_special_tokens=special)["input_ids"] == (theirs(text, add_special_tokens=special)["input_ids"])
    )


@pytest.mark.parametrize("pair", [BYTES, SENTENCES, PREPARED], ids=["bytes", "sentences", "prepared"])
def test_what_is_known_of_tokens_is_the_same(pair: tuple[Any, ChatTokenizer]) -> None:
    theirs, ours = pair
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.added_tokens_decoder == theirs.added_tokens_decoder
    for name in ("bos_token", "eos_token", "bos_token_id", "eos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    for i in range(len(ours)):
        assert ours.convert_ids_to_tokens(i) == theirs.convert_ids_to_tokens(i)
    assert ours.convert_ids_to_tokens(len(ours)) is None


@pytest.mark.parametrize("template", TEMPLATES)
@given(messages=MESSAGES, prompt=st.booleans())
@example(messages=[{"role": "user", "content": "x", "reasoning": "y", "name": None}], prompt=True)
def test_templates_render_as_in_transformers(template: str, messages: list[dict[str, Any]], prompt: bool) -> None:
    theirs = copy.copy(BYTE_LEVEL)
    theirs.chat_template = template
    ours = ChatTokenizer(described(theirs))

    def rendered(tokenizer: Any) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            return text
        except Exception as error:
            return f"refused: {error}"

    assert rendered(ours) == rendered(theirs)


def test_a_template_cannot_reach_out() -> None:
    ours = ChatTokenizer(described(BYTE_LEVEL) | {"chat_template": "{{ messages.__class__.__mro__ }}"})
    with pytest.raises(Exception, match="unsafe"):
        ours.apply_chat_template([{"role": "user", "content": "x"}])


class Spelled(str):
    def open(self) -> str:
        return "reached"


def test_a_template_sees_plain_data() -> None:
    template = "{{ messages[0].x.open is defined }} {{ messages[0].y }} {{ messages[0].z }}"
    ours = ChatTokenizer(described(BYTE_LEVEL) | {"chat_template": template})
    message = {"role": "user", "x": Spelled("x"), "y": object(), "z": (1, 2.5, True)}
    assert ours.apply_chat_template([message]) == "False <object> (1, 2.5, True)"


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(CapabilityError, match="transformers only"):
        described(object())


# ------------------------------------------------------------------------------ the embedded model


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, ChatTokenizer]:
    """With tags, as it is decoded with."""
    tokenizer = AutoTokenizer.from_pretrained(downloads.pull())
    tokenizer.add_special_tokens({"extra_special_tokens": list(TAG_TOKENS.values())})
    return both(tokenizer)


@given(text=st.text() | ANY_TEXT)
def test_the_embedded_models_ids_are_transformers(embedded: tuple[Any, ChatTokenizer], text: str) -> None:
    theirs, ours = embedded
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@given(messages=MESSAGES, marker=st.sampled_from([None, chat_template.SEQUENTIAL_MARKER]))
def test_so_are_its_prompts(
    embedded: tuple[Any, ChatTokenizer], messages: list[dict[str, str]], marker: str | None
) -> None:
    prompts = (
        encode_chat(tokenizer, vocabulary_of(tokenizer, eos=[2]), messages, marker=marker) for tokenizer in embedded
    )
    assert next(prompts) == next(prompts)
